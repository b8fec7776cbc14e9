"""Reports: curves from metrics.jsonl as runs leave it, scores of the newest checkpoint, pictures, tables."""

import json
import math
import shutil
from pathlib import Path

import pytest

from lrnn_lm.cli import main
from lrnn_lm.evaluate.harness import evaluate
from lrnn_lm.evaluate.probe.length import probe_length
from lrnn_lm.evaluate.probe.recall import probe_recall
from lrnn_lm.evaluate.reporting.report import report, to_markdown
from lrnn_lm.evaluate.reporting.runs import read_run


def _write_run(folder, steps=100, floor=3.0, tail=""):
    lines = []
    for step in range(1, steps + 1):
        loss = floor + 5 * math.exp(-step / 12) + 0.2 * math.sin(37.0 * step)
        line = {
            "step": step,
            "tokens": 4096 * step,
            "loss": loss,
            "lr": 1e-3,
            "tokens_per_second": 5000.0 + step,
        }
        lines.append(line)
        if step % 20 == 0:
            held = {
                "step": step,
                "tokens": 4096 * step,
                "validation_loss": loss + 0.1,
                "bits_per_byte": loss / 1.6,
            }
            lines.append(held)
    folder.mkdir(parents=True)
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (folder / "metrics.jsonl").write_text(text + tail, encoding="utf-8")
    return folder


def _write_scores(folder, name, step, acc, limit=None):
    (folder / "eval").mkdir(exist_ok=True)
    results = {
        "results": {"heldout_cloze": {"alias": "heldout_cloze", "acc,none": acc, "acc_stderr,none": 0.01}},
        "checkpoint": {"step": step},
        "settings": {"limit": limit},
    }
    (folder / "eval" / name).write_text(json.dumps(results))


def _is_png(path):
    return path.read_bytes().startswith(b"\x89PNG")


def test_a_resumed_and_torn_file_reads_as_one_curve(tmp_path):
    again = '{"step": 99, "tokens": 405504, "loss": 2.5}\n{"step": 100, "tokens": 409600, "loss": 1.5}\n'
    run = read_run(
        _write_run(tmp_path / "a", tail='{"step": 101, "tok\n' + again + '{"step": 102, "tokens": 41')
    )
    assert [line["step"] for line in run.training] == list(range(1, 101))
    assert run.training[-1]["loss"] == 1.5
    assert run.training_loss == pytest.approx(2.0)
    assert [line["step"] for line in run.validation] == [20, 40, 60, 80, 100]
    assert run.tokens == 409600


def test_one_run_gets_its_picture_and_table(tmp_path, capsys):
    run = _write_run(tmp_path / "solo")
    report([run])
    assert _is_png(run / "plots" / "loss.png")
    shown = capsys.readouterr().out
    assert "solo" in shown
    assert "410K" in shown


def test_tasks_during_training_are_drawn(tmp_path):
    """A panel a metric; of a step that was scored again the last line counts."""
    lines = [
        {"step": step, "tokens": 9, "tasks_seconds": 1.0, "cloze/acc": acc, "cloze/bits": 2.0, "x/acc": 1.0}
        for step, acc in ((40, 0.25), (80, 0.1), (80, 0.5))
    ]
    run = _write_run(tmp_path / "a", tail="".join(json.dumps(line) + "\n" for line in lines))
    found = read_run(run)
    assert [line["cloze/acc"] for line in found.tasks] == [0.25, 0.5]
    assert found.task_keys == ["cloze/acc", "cloze/bits", "x/acc"]
    assert len(found.training) == 100
    report([run, _write_run(tmp_path / "b")], output=tmp_path / "both.svg")
    drawn = (tmp_path / "both.svg").read_text()
    for words in ("cloze while training", "acc", "bits", "a: 0.500"):
        assert f"<!-- {words} -->" in drawn
    assert drawn.count('<g id="axes_') == 5, "and the sixth place is empty"


def test_two_runs_share_a_picture(tmp_path, capsys):
    runs = [_write_run(tmp_path / "bd"), _write_run(tmp_path / "h", floor=2.5)]
    report(runs)
    assert _is_png(tmp_path / "comparison.png")
    report(runs, output=tmp_path / "out" / "both.svg")
    assert (tmp_path / "out" / "both.svg").read_text().startswith("<?xml")
    report(runs, output=tmp_path / "folder")
    assert _is_png(tmp_path / "folder" / "loss.png")
    text = (tmp_path / "folder" / "report.md").read_text()
    assert "| bd |" in text
    assert "(loss.png)" in text
    report(runs, output=tmp_path / "page.md")
    assert _is_png(tmp_path / "page.png")
    assert "bd" in capsys.readouterr().out


def test_a_name_is_no_formula(tmp_path):
    """The pictures' library reads what stands between two $ as one, and ends with its own error."""
    names = ["lr $\\frac{1}$", "$a_b^$"]
    runs = [_write_run(tmp_path / name) for name in names]
    report(runs, tmp_path / "both.png")
    assert _is_png(tmp_path / "both.png")


def test_runs_of_one_name_are_told_apart(tmp_path, capsys):
    """By the folders before it; a run that is given twice, also through a link, is one."""
    one, two = _write_run(tmp_path / "lr-1/small"), _write_run(tmp_path / "lr-2/small", floor=2.0)
    (tmp_path / "link").symlink_to(one)
    report([one, two, tmp_path / "link", one], tmp_path / "out.md")
    rows = (tmp_path / "out.md").read_text().splitlines()
    assert [row.split("|")[1].strip() for row in rows if "small" in row] == ["lr-1/small", "lr-2/small"]
    report([one, tmp_path / "link"], tmp_path / "one.md")
    rows = (tmp_path / "one.md").read_text().splitlines()
    assert [row.split("|")[1].strip() for row in rows if "small" in row] == ["small"]
    capsys.readouterr()


def test_scores_come_from_the_newest_checkpoint_and_whole_tasks(tmp_path):
    folder = _write_run(tmp_path / "scored")
    _write_scores(folder, "b.json", step=50, acc=0.1)
    _write_scores(folder, "a.json", step=100, acc=0.3)
    _write_scores(folder, "c.json", step=100, acc=0.9, limit=5)
    (folder / "eval" / "other.json").write_text("[1, 2]")
    (folder / "eval" / "torn.json").write_text('{"results": ')
    (score,) = read_run(folder).scores.values()
    assert (score.value, score.error, score.step, score.limit) == (0.3, 0.01, 100, None)
    other = _write_run(tmp_path / "unscored")
    text = to_markdown([read_run(folder), read_run(other)])
    assert "| heldout_cloze | acc | 0.3000 ± 0.0100 |  |" in text
    (folder / "checkpoints/step-00000200").mkdir(parents=True)  # it went on, and was not scored again
    assert "| heldout_cloze | acc | 0.3000 ± 0.0100 (step 100) |" in to_markdown([read_run(folder)])


_DEEP, _LONG = "[" * 100_000, '{"step": ' + "9" * 5000 + "}"


@pytest.mark.parametrize("line", [_DEEP, _LONG, '{"step": 100, "tokens": 409600, "validation_loss": "x"}'])
def test_lines_of_another_program_in_the_metrics_are_left_out(tmp_path, line):
    whole, run = _write_run(tmp_path / "whole"), _write_run(tmp_path / "run", tail=line + "\n")
    assert to_markdown([read_run(run)]) == to_markdown([read_run(whole)]).replace("whole", "run")


@pytest.mark.parametrize(
    "content",
    [
        b"\xff\xfe{}", _DEEP.encode(), _LONG.encode(), b"null", b"[1]", b'{"results": {"t": [1]}}',
        b'{"results": {"t": {"acc,none": 1}}, "checkpoint": null}',
        b'{"results": {"t": {"acc,none": 1}}, "settings": null}',
        b'{"results": {"t": {"acc,none": 1}}, "checkpoint": {"step": "9"}}',
    ],
)  # fmt: skip
def test_files_of_another_program_beside_the_scores_are_left_out(tmp_path, content):
    folder = _write_run(tmp_path / "run")
    _write_scores(folder, "own.json", step=100, acc=0.6)
    (folder / "eval" / "a.json").write_bytes(content)
    (folder / "eval" / "folder.json").mkdir()
    scores = read_run(folder).scores
    assert {task for task, _ in scores} == {"heldout_cloze"}
    assert "0.6000" in to_markdown([read_run(folder)])


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", '{"sources": 3}', '{"source": {}, "splits": []}'])
def test_a_damaged_data_manifest_is_named(checkpoint, tmp_path, content, capsys):
    run = _write_run(tmp_path / "run")
    shutil.copytree(checkpoint, run / "checkpoints" / "step-00000100")
    (run / "README.md").touch()
    (run / "data.json").write_text(content)
    with pytest.raises(SystemExit) as ended:
        main(["report", str(run)])
    assert ended.value.code == 2
    assert f"{run / 'data.json'}: not a run's data manifest" in " ".join(capsys.readouterr().err.split())


def test_scores_taken_in_another_way_are_others(checkpoint, tmp_path, write_documents):
    """They replace neither the file nor the row of the usual ones; other text is told for held-out tasks."""
    run = tmp_path / "tiny"
    shutil.copytree(checkpoint.parents[1], run, symlinks=True, ignore=shutil.ignore_patterns("eval"))
    shutil.copytree(_write_run(tmp_path / "curve"), run, dirs_exist_ok=True)
    other = write_documents(tmp_path / "other.jsonl", ["Another text than that of the run."])
    ways = ({}, {"max_length": 20}, {"prompt_twice": True}, {"data": other})
    for way in ways:
        evaluate(run / "checkpoints/latest", ["heldout_bits_per_byte"], limit=2, device="cpu", **way)
    assert len(list((run / "eval").glob("*.json"))) == len(ways)
    tasks = {task for task, _ in read_run(run).scores}
    assert {"heldout_bits_per_byte", "heldout_bits_per_byte, window 20",
            "heldout_bits_per_byte, prompt twice"} < tasks  # fmt: skip
    assert sum("other" in task for task in tasks) == len(tasks) - 3 == 1
    for shots in (None, 1):  # of which the task takes none
        evaluate(
            run / "checkpoints/latest", ["heldout_bits_per_byte"], limit=2, device="cpu", num_fewshot=shots
        )
    assert len(list((run / "eval").glob("*.json"))) == len(ways)


def test_scores_with_examples_are_told_from_those_of_tasks_that_take_none(checkpoint, tmp_path, capsys):
    """The file of a task, or a text scored whole, may leave no place for them, whatever is asked for."""
    run = _write_run(tmp_path / "tiny")
    ignored = shutil.ignore_patterns("eval")
    shutil.copytree(checkpoint.parents[1], run, symlinks=True, ignore=ignored, dirs_exist_ok=True)
    data = tmp_path / "texts"
    data.mkdir()
    rows = [json.dumps({"text": f"She went to house {i} and came back from house {i}"}) for i in range(4)]
    (data / "lambada_openai.jsonl").write_text("\n".join(rows))
    (data / "wikitext2_test.txt").write_text(" = A = \n\n some text . \n")
    names = ["offline_lambada", "offline_wikitext"]
    evaluate(run / "checkpoints/latest", names, device="cpu", data=data, num_fewshot=2)
    assert "(--num-fewshot), as it takes none: offline_wikitext" in " ".join(capsys.readouterr().out.split())
    evaluate(run / "checkpoints/latest", names[1:], device="cpu", data=data, num_fewshot=2)
    files = sorted(file.name for file in (run / "eval").glob("*.json"))
    assert ["2-shot" in file for file in files] == [True, False]  # the second has usual scores
    ways = {task.split(",")[0]: "2-shot" in task for task, _ in read_run(run).scores}
    assert ways == {"offline_lambada": True, "offline_wikitext": False}


def test_scores_on_two_texts_outside_a_run(checkpoint, tmp_path, write_documents):
    """A text is known by its content: a changed one is another, the same one elsewhere is not."""
    alone = shutil.copytree(checkpoint, tmp_path / "alone", ignore=shutil.ignore_patterns("trainer"))
    moved = tmp_path / "moved"
    moved.mkdir()
    for place, name in (("a", "a"), ("b", "b"), ("a", "a"), ("a", "changed"), ("moved/a", "changed")):
        text = write_documents(tmp_path / f"{place}.jsonl", [f"The text {name} of a run."])
        evaluate(alone, ["heldout_bits_per_byte"], device="cpu", data=text, output=tmp_path / "out")
    assert len(list((tmp_path / "out").glob("*.json"))) == 3


def test_offline_scores_on_two_folders_are_told_apart(checkpoint, tmp_path):
    run = _write_run(tmp_path / "tiny")
    ignored = shutil.ignore_patterns("eval")
    shutil.copytree(checkpoint.parents[1], run, symlinks=True, ignore=ignored, dirs_exist_ok=True)
    for place, word in (("a/offline", "river"), ("b/offline", "house"), ("c/offline", "river")):
        folder = tmp_path / place
        folder.mkdir(parents=True)
        line = json.dumps({"text": f"She went to the {word} and came back from the {word}"})
        (folder / "lambada_openai.jsonl").write_text(line + "\n")
        evaluate(run / "checkpoints/latest", ["offline_lambada"], device="cpu", data=folder)
    assert len(list((run / "eval").glob("*.json"))) == 2
    tasks = {task for task, _ in read_run(run).scores}
    assert len(tasks) == 2
    assert all(task.startswith("offline_lambada, offline ") for task in tasks)


@pytest.mark.usefixtures("no_pictures")
@pytest.mark.parametrize("of_runs", [True, False], ids=["in runs of one name", "folders of one name"])
def test_results_of_checkpoints_of_one_name_in_one_folder(checkpoint, tmp_path, of_runs):
    """Those of one replace none of the other; a repeat replaces its own."""
    places = []
    for place in ("a", "b"):
        run = shutil.copytree(checkpoint.parents[1], tmp_path / place / "tiny", symlinks=True)
        places.append(run / "checkpoints/latest")
        if not of_runs:
            places[-1] = shutil.copytree(places[-1], tmp_path / place / "model")
    given = {"data": checkpoint.parents[1] / "heldout.jsonl", "device": "cpu", "output": tmp_path / "out"}
    for place in (*places, *places):
        evaluate(place, ["heldout_bits_per_byte"], limit=2, **given)
        probe_length(place, "24", rows=2, **given)
        probe_recall([place], rows=2, **given)
    files = list((tmp_path / "out").glob("*.json"))
    assert len(files) == 3 * len(places)
    assert len(list((tmp_path / "out").glob("*.png"))) == 2 * len(places)


@pytest.mark.usefixtures("no_pictures")
def test_probes_of_another_text_leave_those_of_the_runs(checkpoint, tmp_path, write_documents):
    run = shutil.copytree(checkpoint.parents[1], tmp_path / "tiny", symlinks=True)
    shutil.rmtree(run / "eval", ignore_errors=True)
    other = write_documents(tmp_path / "other.jsonl", ["Another text than that of the run. " * 20] * 4)
    for data in (None, other, run / "heldout.jsonl"):
        probe_length(run / "checkpoints/latest", "24", rows=2, data=data, device="cpu")
        probe_recall([run / "checkpoints/latest"], rows=2, data=data, device="cpu")
    names = sorted(path.name.split("other-")[0] for path in (run / "eval").glob("*.json"))
    assert [name.partition("-length")[1] for name in names] == ["", "", "-length", "-length"]
    assert sum(name.endswith("-") for name in names) == 2


def test_scores_of_other_lengths_are_others(tmp_path):
    folder = _write_run(tmp_path / "scored")
    for name, lengths in (("a.json", None), ("b.json", [64])):
        results = {"results": {"state_s3": {"acc,none": 0.5}}, "settings": {"lengths": lengths}}
        (folder / "eval").mkdir(exist_ok=True)
        (folder / "eval" / name).write_text(json.dumps(results))
    assert {task for task, _ in read_run(folder).scores} == {"state_s3", "state_s3 at 64"}


def test_parameters_are_counted_from_the_checkpoint(checkpoint, loaded, tmp_path):
    run = checkpoint.parent.parent
    (run / "metrics.jsonl").write_text('{"step": 1, "tokens": 10, "loss": 2.0}\n')
    try:
        assert read_run(run).parameters == sum(p.numel() for p in loaded[0].parameters())
    finally:
        (run / "metrics.jsonl").unlink()
    assert read_run(_write_run(tmp_path / "bare")).parameters is None


def test_a_run_of_one_step_or_with_bad_losses_still_draws(tmp_path):
    one = _write_run(tmp_path / "one", steps=1)
    report([one])
    tail = '{"step": 2, "tokens": 8192, "loss": NaN}\n{"step": 3, "tokens": 12288, "loss": Infinity}\n'
    report([_write_run(tmp_path / "bad", steps=1, tail=tail)])
    only = tmp_path / "only"
    only.mkdir()
    (only / "metrics.jsonl").write_text('{"step": 5, "tokens": 50, "validation_loss": 3.5}\n')
    report([only])
    assert _is_png(only / "plots" / "loss.png")


def test_a_last_value_that_was_not_finite_is_told(tmp_path, capsys):
    """Not the finite one before it, as of a run that did not diverge."""
    tail = '{"step": 120, "tokens": 491520, "validation_loss": null, "bits_per_byte": null}\n'
    tail += '{"step": 120, "tokens": 491520, "tasks_seconds": 1.0, "cloze/acc": null}\n'
    run = read_run(_write_run(tmp_path / "a", tail=tail))
    assert math.isnan(run.last("validation_loss"))
    assert math.isnan(run.tasks[-1]["cloze/acc"])
    report([tmp_path / "a", _write_run(tmp_path / "b")])
    row = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("│ a "))
    assert row.count("nan") == 2


def test_a_run_whose_weights_were_removed_is_reported(tmp_path, capsys):
    """Its model card stays as it was."""
    run = _write_run(tmp_path / "a")
    (run / "README.md").write_text("card")
    with pytest.raises(SystemExit) as left:
        main(["report", str(run)])
    assert not left.value.code, capsys.readouterr().err
    assert (run / "README.md").read_text() == "card"


def test_what_lies_beside_runs_is_left_out(tmp_path, capsys):
    """`lrnn report runs/*`, beside its own picture, a sweep, and a run that waits for its first step."""
    for name in ("a", "b"):
        _write_run(tmp_path / name)
    (tmp_path / "all.sweep").mkdir()
    (tmp_path / "queued" / "launch").mkdir(parents=True)
    for _ in range(2):
        report(sorted(tmp_path.iterdir()))
        assert (tmp_path / "comparison.png").is_file()
    said = capsys.readouterr()
    assert said.err.count("left out") == 2
    assert said.err.splitlines()[0].endswith("queued")
    for alone in ("comparison.png", "all.sweep", "queued"):
        with pytest.raises(ValueError, match=r"no such run|not a run"):
            report([tmp_path / alone])


def test_what_is_not_a_run_is_told(tmp_path):
    run, nothing = _write_run(tmp_path / "fine"), tmp_path / "nothing"
    for folder in (nothing, run / "checkpoints" / "latest"):
        folder.mkdir(parents=True, exist_ok=True)
    for runs, message in [
        ([], "no runs"),
        ([tmp_path / "gone"], "no such run"),
        ([run, tmp_path], r"not a run; did you mean the runs in it, .*\*\?"),
        ([run / "checkpoints" / "latest"], r"not a run; did you mean its run, .*fine\?"),
        ([nothing], r"not a run \(there is no metrics"),
        ([_empty(tmp_path / "empty")], "holds no step"),
    ]:
        with pytest.raises(ValueError, match=message):
            report(runs)
    with pytest.raises(ValueError, match="picture"):
        report([run], output=tmp_path / "report.docx")
    with pytest.raises(ValueError, match="s3://bucket/x: give a folder of this machine"):
        report([run], output=Path("s3://bucket/x"))
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="cannot be written"):
        report([run], output=tmp_path / "file" / "loss.png")


def _empty(folder):
    folder.mkdir()
    (folder / "metrics.jsonl").write_text("")
    return folder
