"""Task files as users write them, at a short window: right numbers in sound JSON, or a line."""

import json
import math

import pytest
from short_models import LONG, RECURRENT, WINDOW, build, by_hand, encode

from lrnn_lm.evaluate import evaluate
from lrnn_lm.evaluate.lm import LiveLM
from lrnn_lm.evaluate.tasks import names as tasks


@pytest.fixture(scope="module")
def recurrent(tokenizer):
    return build(tokenizer, mixer=RECURRENT)


@pytest.fixture
def write_task(tmp_path, monkeypatch):
    """A function (name, output type, rows, more YAML) that writes a task which `evaluate` finds."""
    monkeypatch.setattr(tasks, "own_tasks_path", lambda: tmp_path)

    def write(name, kind, rows, more=""):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        (tmp_path / f"{name}.yaml").write_text(
            f"task: {name}\ndataset_path: json\n"
            f"dataset_kwargs: {{data_files: {{test: {tmp_path}/{name}.jsonl}}}}\n"
            f'test_split: test\noutput_type: {kind}\ndoc_to_text: "{{{{q}}}}"\ndoc_to_target: "{{{{a}}}}"\n'
            f'target_delimiter: ""\n{more}\n'
        )

    return write


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tokenizer, recurrent):
    folder = tmp_path_factory.mktemp("runs") / "short" / "checkpoints" / "step-00000003"
    recurrent.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def strictly(path):
    """JSON by the standard, which has no NaN and no Infinity."""

    def refuse(constant):
        raise AssertionError(f"{path} holds {constant}")

    return json.loads(path.read_text(), parse_constant=refuse)


EXACT = "metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]"
PERPLEXITY = "metric_list: [{metric: perplexity, aggregation: perplexity, higher_is_better: false}]"


def test_task_files_of_each_kind_at_a_short_window(
    folder, recurrent, tokenizer, write_task, tmp_path, capsys
):
    """`until` in YAML's forms, a long answer, a token over a join, choices, a text of many windows."""
    long_choices = [" rope", LONG, " river"]
    for name, until in (("list", '["\\n"]'), ("text", '"\\n"'), ("none", "null"), ("empty", "[]")):
        write_task(
            f"g_{name}",
            "generate_until",
            [{"q": "the old", "a": "x"}],
            f"generation_kwargs: {{until: {until}}}\n{EXACT}",
        )
    write_task("long", "loglikelihood", [{"q": "the old", "a": LONG}], PERPLEXITY)
    write_task("join", "loglikelihood", [{"q": "the strang", "a": "ers"}, {"q": "", "a": "the"}], PERPLEXITY)
    write_task(
        "choice", "multiple_choice", [{"q": LONG, "a": 1}], f"doc_to_choice: {json.dumps(long_choices)}"
    )
    write_task(
        "rolling", "loglikelihood_rolling", [{"q": "", "a": LONG}], "metric_list: [{metric: bits_per_byte}]"
    )
    names = ["g_list", "g_text", "g_none", "g_empty", "long", "join", "choice", "rolling"]
    found = evaluate(folder, names, device="cpu", output=tmp_path)["results"]
    shown = capsys.readouterr().out
    assert "lost the beginning" not in shown
    assert {found[name]["exact_match,none"] for name in names[:4]} == {0.0}
    bos = tokenizer.bos_token_id

    def nats(context, answer, asked=None):
        ids = [bos, *encode(tokenizer, context + answer)]
        return by_hand(recurrent, ids, asked or len(ids) - 1 - len(encode(tokenizer, context)))[0]

    long = nats("the old", LONG)
    assert long < -709.8, "its perplexity is no number"
    assert found["long"]["perplexity,none"] is None
    assert "inf" in shown
    join = [nats("the strang", "ers", 1), nats("", "the")]
    assert found["join"]["perplexity,none"] == pytest.approx(math.exp(-sum(join) / 2), rel=1e-4)
    best = max(range(3), key=lambda i: nats(LONG, long_choices[i]))
    assert found["choice"]["acc,none"] == float(best == 1)
    assert strictly(next(tmp_path.glob("*.json")))["results"] == found


def test_large_perplexities_have_a_deviation(folder, write_task, tmp_path):
    """Their squares overflow where they do not: the scores of the other tasks are not lost with them."""
    rows = [{"q": "", "a": LONG[: 90 * i]} for i in (1, 2, 3)]
    write_task("many", "loglikelihood", rows, PERPLEXITY)
    write_task("easy", "loglikelihood", rows, "metric_list: [{metric: acc}]")
    evaluate(folder, ["many", "easy"], device="cpu", output=tmp_path)
    assert strictly(next(tmp_path.glob("*.json")))["results"]["easy"]["acc,none"] == 0.0


def test_an_explicit_window_is_kept_to(folder, write_task, tmp_path, capsys):
    write_task("context", "loglikelihood", [{"q": LONG, "a": " rope"}], PERPLEXITY)
    found = evaluate(folder, ["context"], device="cpu", output=tmp_path, max_length=WINDOW)
    assert found["settings"]["truncated_requests"] == 1
    assert not found["settings"]["unlimited"]
    assert "1 requests were longer than 16 tokens" in capsys.readouterr().out
    whole = evaluate(folder, ["context"], device="cpu", output=tmp_path)
    assert whole["settings"]["unlimited"]
    assert whole["results"]["context"]["perplexity,none"] != found["results"]["context"]["perplexity,none"]
    write_task("long", "loglikelihood", [{"q": "the old", "a": LONG}], PERPLEXITY)
    with pytest.raises(ValueError, match="task long: an answer of"):
        evaluate(folder, ["long"], device="cpu", max_length=WINDOW)


def test_what_lm_eval_asserts_is_a_line(folder, write_task):
    rows = [{"q": "the old", "a": "river"}, {"q": "a", "a": "b"}]
    shots = "fewshot_split: test\nfewshot_config: {sampler: first_n}\n"
    write_task("shots", "loglikelihood", rows, shots + PERPLEXITY)
    with pytest.raises(ValueError, match=r"lm-eval refuses a task of shots: .*exceeds the 1 that") as error:
        evaluate(folder, ["shots"], device="cpu", num_fewshot=5)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("split", ["test", "validation"])
@pytest.mark.parametrize("named", [True, False], ids=["fewshot_split", "no fewshot_split"])
def test_solved_examples_are_never_the_question(folder, write_task, tmp_path, monkeypatch, split, named):
    """Whichever split is asked, and whether or not the task's file says where examples come from."""
    rows = [{"q": f"question {i}", "a": f" answer {i}"} for i in range(4)]
    write_task("shots", "loglikelihood", rows, (f"fewshot_split: {split}\n" if named else "") + PERPLEXITY)
    file = tmp_path / "shots.yaml"
    file.write_text(
        file.read_text()
        .replace("{test:", f"{{{split}:")
        .replace("test_split: test", f"{split}_split: {split}")
    )
    asked = []
    own = LiveLM.loglikelihood
    monkeypatch.setattr(
        LiveLM, "loglikelihood", lambda lm, requests, **quiet: asked.extend(requests) or own(lm, requests)
    )
    found = evaluate(folder, ["shots"], device="cpu", num_fewshot=3)
    assert found["n-shot"] == {"shots": 3}
    contexts = [request.args[0] for request in asked]
    assert len(contexts) == len(rows)
    for context in contexts:  # three others with their answers, and the question
        assert [sum(row["q"] + row["a"] in context for row in rows), context.count("question")] == [3, 4]
    with pytest.raises(
        ValueError, match="task shots: it has fewer than 4 solved examples beside the question"
    ):
        evaluate(folder, ["shots"], device="cpu", num_fewshot=4)
