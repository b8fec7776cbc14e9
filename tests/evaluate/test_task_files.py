"""Task files as users write them, at a short window: right numbers in sound JSON, or a line."""

import copy
import json
import math

import lm_eval
import pytest
import torch
from short_models import LONG, RECURRENT, WINDOW, build, by_hand, encode

from lrnn_lm.evaluate import evaluate
from lrnn_lm.evaluate.lm import LiveLM
from lrnn_lm.evaluate.scoring import refusals
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


def test_tasks_that_take_no_examples_are_told(folder, write_task, tmp_path, capsys):
    """Their file says so, and lm-eval leaves it at that: their results are not few-shot."""
    rows = [{"q": "the old", "a": " river"}, {"q": "a", "a": " b"}, {"q": "the", "a": " rope"}]
    write_task("takes", "loglikelihood", rows, f"fewshot_split: test\n{PERPLEXITY}")
    write_task("none", "loglikelihood", rows, f"num_fewshot: 0\n{PERPLEXITY}")
    names = {}
    for tasks_of in (["takes"], ["none"], ["takes", "none"]):
        for shots in (None, 1):
            out = tmp_path / "-".join([*tasks_of, str(shots)])
            evaluate(folder, tasks_of, device="cpu", output=out, num_fewshot=shots)
            told = "as it takes none: none" in capsys.readouterr().out
            assert told == (shots == 1 and "none" in tasks_of)
            names[(*tasks_of, shots)] = next(out.glob("*.json")).name
    assert "1-shot" in names["takes", 1]
    assert "1-shot" in names["takes", "none", 1]
    assert names["none", 1] == names["none", None]


@pytest.mark.parametrize("split", ["test", "validation"])
@pytest.mark.parametrize(
    "named", ["fewshot_split: {}\n", "fewshot_split: {}\nfewshot_config: {{samples: []}}\n", ""]
)
def test_solved_examples_are_never_the_question(folder, write_task, tmp_path, monkeypatch, split, named):
    """Whichever split is asked, and whether or not the task's file says where examples come from."""
    rows = [{"q": f"question {i}", "a": f" answer {i}"} for i in range(4)]
    write_task("shots", "loglikelihood", rows, named.format(split) + PERPLEXITY)
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


CHOICES = 'doc_to_choice: ["yes", "no"]\nmetric_list: [{metric: acc}, {metric: acc_norm}]'
FUNCTIONS = "def fails(doc):\n    return doc['nowhere']\n"


@pytest.mark.usefixtures("few_tasks")
@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (("a}}", "a.b.c}}"), "UndefinedError: .* has no attribute"),
        (("a}}", "a"), "TemplateSyntaxError"),
        (("metric: acc}", "metric: nope}"), "KeyError"),
        (("test_split: test", "test_split: dev"), "KeyError: 'dev'"),
        ((".jsonl", ".json"), r"FileNotFoundError: .*task.json"),
        (("yes", ""), "IndexError"),
        (('"{{a}}"', "!function functions.fails"), r"KeyError: 'nowhere' \(.*functions.py:2\)"),
        (('"{{a}}"', "!function functions.nope"), "AttributeError: .*has no function 'nope'"),
        (('"{{a}}"', "!function nowhere.f"), "ImportError: .*'nowhere'"),
        (("multiple_choice", "loglikelihood_rolling\nx: ["), "cannot read this task file"),
        (("task: ", "include: nowhere\ntask: "), "cannot read this task file"),
    ],
)
def test_a_mistake_in_a_tasks_file_is_a_line(folder, write_task, tmp_path, change, reason):
    write_task("task", "multiple_choice", [{"q": "the old", "a": "yes"}], CHOICES)
    (tmp_path / "functions.py").write_text(FUNCTIONS)
    file = tmp_path / "task.yaml"
    file.write_text(file.read_text().replace(*change))
    with pytest.raises(ValueError, match=reason) as error:
        evaluate(folder, ["task"], device="cpu")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "file", ["/mnt/datasets/lib/torch/x.py", "/home/lm_eval/x.py", f"{lm_eval.__path__[0]}/models/x.py"]
)
def test_a_fault_of_the_model_is_no_mistake_in_a_task(file):
    """Wherever its code is installed."""
    names: dict = {}
    exec(compile("def forward():\n    {}['missing']", file, "exec"), names)
    with pytest.raises(KeyError), refusals(["task"]):
        names["forward"]()


def test_two_files_with_one_name_are_told(folder, write_task, tmp_path):
    for name in ("first", "second"):
        write_task(name, "loglikelihood", [{"q": "the", "a": " old"}], PERPLEXITY)
    file = tmp_path / "second.yaml"
    file.write_text(file.read_text().replace("task: second", "task: first"))
    with pytest.raises(ValueError, match=r"'first' is in two files, .*first.yaml and .*second.yaml; rename"):
        evaluate(folder, ["fir*"], device="cpu")


@pytest.mark.parametrize(("answers", "wrong"), [(["yes", "no"], 0), (["yes", "maybe"], 1), (["2", "1"], 1)])
def test_right_answers_that_are_no_choice_are_told(folder, write_task, tmp_path, capsys, answers, wrong):
    rows = [{"q": "the old", "a": answer} for answer in answers]
    write_task("labels", "multiple_choice", sorted(rows, key=lambda row: row["a"] == "2"), CHOICES)
    found = evaluate(folder, ["labels"], device="cpu", output=tmp_path)
    assert found["settings"]["unanswerable"] == wrong
    told = f"{wrong} questions have a right answer that is none of their choices" in capsys.readouterr().out
    assert told == bool(wrong)


def test_a_model_of_nan_has_no_scores(recurrent, tokenizer, folder, write_task, tmp_path, capsys):
    """NaN is the likeliest to lm-eval: the first choice would be the answer to everything."""
    broken = copy.deepcopy(recurrent)
    with torch.no_grad():
        broken.lm_head.weight.fill_(math.nan)
    write_task("first", "multiple_choice", [{"q": "the", "a": "yes"}], CHOICES)
    write_task("word", "loglikelihood", [{"q": "the", "a": " old"}], "metric_list: [{metric: acc}]")
    write_task(
        "text", "loglikelihood_rolling", [{"q": "", "a": "the old"}], "metric_list: [{metric: bits_per_byte}]"
    )
    groups = "group: all\ntask: [first, word]\naggregate_metric_list: [{metric: acc}]\n"
    (tmp_path / "all.yaml").write_text(groups)
    (tmp_path / "outer.yaml").write_text(groups.replace("all", "outer", 1).replace("[first, word]", "[all]"))
    names = ["all", "first", "outer", "text", "word"]
    evaluate(folder, ["outer", "text"], device="cpu", output=tmp_path, model=broken, tokenizer=tokenizer)
    stored = strictly(next(tmp_path.glob("*.json")))
    assert sorted(stored["results"]) == names
    scores = [*stored["results"].values(), *stored["groups"].values()]
    numbers = [v for s in scores for k, v in s.items() if "," in k and v != "N/A"]
    assert len(numbers) > len(names)
    assert set(numbers) == {None}
    assert "first, text, word: no score, as log-likelihoods are NaN" in capsys.readouterr().out
