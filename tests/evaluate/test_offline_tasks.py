"""The offline tasks give lm-eval's own numbers on the same files, for a tiny GPT-2; mistakes are told."""

import json
from runpy import run_path

import datasets
import pytest
from lm_eval.api.metrics import unweighted_mean_stderr

from lrnn_lm.cli import main
from lrnn_lm.evaluate import evaluate
from lrnn_lm.evaluate.harness import flatten
from lrnn_lm.evaluate.tasks.names import own_tasks_path
from lrnn_lm.evaluate.text import OFFLINE_FILES

FUNCTIONS = run_path(str(own_tasks_path() / "offline" / "functions.py"))
pages = FUNCTIONS["pages"]
blimp_dataset, lambada_dataset, wikitext_dataset = (
    FUNCTIONS[f"{name}_dataset"] for name in ("blimp", "lambada", "wikitext")
)
ARTICLE = (
    " \n = {0} = \n \n {0} is a river @-@ town , and {0} 's bridge ( old ) has 1 @,@ 000 stones . \n \n"
    ' = = Later = = \n \n In N years it grew ; people said " so be it " . \n\n'
)
PARADIGMS = {
    "adjunct_island": [("The tall man walks near the river.", "The tall man walk near river the.")] * 3
    + [("She waters roses.", "She roses waters.")],
    "causative": [
        ("A compiler reads the source.", "A compiler read the source source."),
        ("b b", "a a and so on and on"),
    ],
}
UPSTREAM = ["lambada_openai", "wikitext", *(f"blimp_{name}" for name in PARADIGMS)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Small files of the same form as the real ones."""
    path = tmp_path_factory.mktemp("files")
    passages = [
        f"The gardener carried {n} buckets to the river. When she came back the water was in the bucket{s}"
        for n, s in ((1, ""), (2, "s"), (12, "s"), (7, "."))
    ]
    lines = [json.dumps({"text": text}) for text in passages]
    (path / "lambada_openai.jsonl").write_text("\n".join(lines) + "\n")
    (path / "blimp").mkdir()
    for name, pairs in PARADIGMS.items():
        rows = [{"sentence_good": good, "sentence_bad": bad, "UID": name} for good, bad in pairs]
        (path / "blimp" / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (path / "wikitext2_test.txt").write_text(
        "".join(ARTICLE.format(name) for name in ("Elbe", "Rhine Falls"))
    )
    return path


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory, tokenizer):
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel

    path = tmp_path_factory.mktemp("gpt2")
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=len(tokenizer), n_embd=16, n_layer=2, n_head=2, n_positions=64,
                        bos_token_id=0, eos_token_id=1, initializer_range=0.5)  # fmt: skip
    GPT2LMHeadModel(config).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


def upstream(gpt2, folder, monkeypatch):
    """lm-eval's own tasks and model class, their data sets replaced by the files."""
    import lm_eval
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager
    from transformers import AutoModelForCausalLM, AutoTokenizer

    def load(path, name=None, **_):
        if "lambada" in path:
            rows = [json.loads(x) for x in (folder / "lambada_openai.jsonl").read_text().splitlines()]
            return datasets.DatasetDict(test=datasets.Dataset.from_list(rows))
        if "wikitext" in path:
            text = (folder / "wikitext2_test.txt").read_text()
            half = text.index(" \n = Rhine")
            rows = datasets.Dataset.from_list([{"page": text[2:half] + " "}, {"page": text[half + 2 :]}])
            return datasets.DatasetDict(train=rows, validation=rows, test=rows)
        rows = [json.loads(x) for x in (folder / "blimp" / f"{name}.jsonl").read_text().splitlines()]
        return datasets.DatasetDict(train=datasets.Dataset.from_list(rows))

    monkeypatch.setattr(datasets, "load_dataset", load)
    monkeypatch.setenv("DISABLE_MULTIPROC", "1")
    model = HFLM(
        pretrained=AutoModelForCausalLM.from_pretrained(gpt2),
        tokenizer=AutoTokenizer.from_pretrained(gpt2),
        batch_size=4,
        max_length=64,
        logits_cache=False,  # with it, texts that end alike have wrong numbers in lm-eval 0.4.13
    )
    results = lm_eval.simple_evaluate(
        model, tasks=list(UPSTREAM), task_manager=TaskManager(), bootstrap_iters=100, log_samples=False
    )
    found = flatten(results)
    return {(task, metric): value for task, metric, value, _ in found}, {
        (task, metric): error for task, metric, _, error in found
    }


@pytest.mark.usefixtures("few_tasks")
def test_numbers_are_upstreams(gpt2, folder, monkeypatch, tmp_path):
    ours = evaluate(gpt2, [], suite="offline", data=folder, output=tmp_path, batch_size=4, device="cpu")
    got = {(task, metric): value for task, metric, value, _ in flatten(ours)}
    want, errors = upstream(gpt2, folder, monkeypatch)
    for metric in ("perplexity", "acc"):
        assert got["offline_lambada", metric] == pytest.approx(
            want["lambada_openai", metric], abs=1e-6, rel=1e-6
        )
    for metric in ("word_perplexity", "byte_perplexity", "bits_per_byte"):
        assert got["offline_wikitext", metric] == pytest.approx(want["wikitext", metric], rel=1e-6)
    each = [want[f"blimp_{name}", "acc"] for name in PARADIGMS]
    assert [got["offline_blimp", f"acc_{name}"] for name in PARADIGMS] == pytest.approx(each, abs=1e-6)
    assert got["offline_blimp", "acc"] == pytest.approx(sum(each) / len(each), abs=1e-6)
    assert 0 < got["offline_blimp", "acc"] < 1, "a score that tells something"
    error = next(row[3] for row in flatten(ours) if row[:2] == ("offline_blimp", "acc"))
    each = [errors[f"blimp_{name}", "acc"] for name in PARADIGMS]
    assert error == pytest.approx(unweighted_mean_stderr(each), abs=1e-9)  # as of upstream's group
    assert error > 0


def test_the_files_that_they_read_are_those_that_tell_results_apart():
    read = {FUNCTIONS[name] for name in ("LAMBADA", "BLIMP", "WIKITEXT")}
    assert {name.partition("/")[0] for name in OFFLINE_FILES} == read


def test_pages_are_cut_at_titles_only():
    text = "".join(ARTICLE.format(name) for name in ("A", "B of C", "D"))
    cut = list(pages(text))
    assert len(cut) == 3
    assert all(page.lstrip().startswith("= ") and "= = Later = =" in page for page in cut)
    assert list(pages("")) == []
    assert list(pages("no title\n")) == ["no title\n"]


def test_paradigms_take_turns(folder):
    rows = blimp_dataset(str(folder))["validation"]
    turns = ["adjunct_island", "causative"] * 2 + ["adjunct_island"] * 2
    assert rows["paradigm"] == turns or list(rows["paradigm"]) == turns


@pytest.mark.parametrize("end", ["", " ", "\n", "\t \n"])
def test_white_space_at_a_passages_end_is_not_its_last_word(tmp_path, end):
    (tmp_path / "lambada_openai.jsonl").write_text("\ufeff" + json.dumps({"text": f"a long river{end}"}))
    assert lambada_dataset(str(tmp_path))["test"]["text"][:] == ["a long river"]


@pytest.mark.parametrize(
    ("name", "row", "message"),
    [
        ("lambada_openai", {"text": ""}, "line 1 .* none empty"),
        ("lambada_openai", {"text": "river "}, "a space before its last word, unlike 'river'"),
        ("blimp/x", {"sentence_good": "a", "sentence_bad": " "}, "line 1 .* none empty"),
    ],
)
def test_texts_without_an_answer_are_told(tmp_path, name, row, message):
    file = tmp_path / f"{name}.jsonl"
    file.parent.mkdir(exist_ok=True)
    file.write_text(json.dumps(row))
    with pytest.raises(ValueError, match=message):
        (blimp_dataset if "blimp" in name else lambada_dataset)(str(tmp_path))


@pytest.mark.parametrize(("arguments", "message"), [
    (["--tasks", "offline_lambada"], "pass --data DIR"),
    (["--tasks", "offline_lambada", "--data", "{empty}/file"], "pass --data DIR"),
    (["--suite", "{empty}/none"], "tasks: list should have at least 1 item"),
    (["--suite", "{empty}/key"], "limmit: unknown key; did you mean 'limit'?"),
    (["--suite", "{empty}/list"], "suite: takes keys and values, not ['a']"),
    (["--tasks", "offline_lambada", "--data", "{empty}"], "lambada_openai.jsonl: no such file"),
    (["--tasks", "offline_blimp", "--data", "{empty}"], "no such file"),
    (["--tasks", "offline_wikitext", "--data", "{empty}/no"], "no such file"),
    (["--tasks", "offline_lambda", "--data", "{empty}"], "offline_lambada"),
    (["--tasks", "heldout_cloze", "--data", "{empty}"], "no such file of held-out documents"),
    (["--tasks", "long_passkey", "--max-length", "128"], "128 tokens are longer than this gpt2 takes: 64"),
    (["--tasks", "long_passkey", "--limit", "2"], "long_passkey are longer than the 64 tokens of a window"),
])  # fmt: skip
@pytest.mark.usefixtures("few_tasks")
def test_mistakes_leave_with_2(gpt2, tmp_path, arguments, message, capsys):
    (tmp_path / "file").write_text('{"text": "Held-out text of a run."}\n')
    for name, text in (("none", "tasks: []"), ("key", "{tasks: [a], limmit: 3}"), ("list", "[a]")):
        (tmp_path / name).write_text(text)
    with pytest.raises(SystemExit) as left:
        main(["eval", str(gpt2), *(argument.format(empty=tmp_path) for argument in arguments)])
    assert left.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [["--prompt", "a b"], ["--prompt-file", "{file}"]])
def test_text_longer_than_a_model_takes(gpt2, tmp_path, arguments, capsys):
    (tmp_path / "prompt.txt").write_text("a b c d " * 50)
    arguments = [argument.format(file=tmp_path / "prompt.txt") for argument in arguments]
    with pytest.raises(SystemExit) as left:
        main(["generate", str(gpt2), *arguments, "--max-new-tokens", "63"])
    assert left.value.code == 2
    assert "tokens are longer than this gpt2 takes: 64" in capsys.readouterr().err


def test_a_line_that_cannot_be_read_is_named(tmp_path):
    (tmp_path / "blimp").mkdir()
    with pytest.raises(ValueError, match=r"holds no PARADIGM.jsonl"):
        blimp_dataset(str(tmp_path))
    (tmp_path / "blimp" / "x.jsonl").write_text('{"sentence_good": "a"}\n')
    with pytest.raises(ValueError, match=r"line 1 is not .*sentence_bad"):
        blimp_dataset(str(tmp_path))


@pytest.mark.parametrize(("content", "message"), [
    (b"", "holds no documents"),
    (b"\n\n", "holds no documents"),
    (b"\xff\xfe", "not a UTF-8 text file"),
    (b'{"text": 5}\n', 'line 1 is not a JSON object with texts "text"'),
    (b'{"text": "a b"}\n["text"]\n', "line 2 is not"),
])  # fmt: skip
def test_files_that_hold_no_passages(tmp_path, content, message):
    (tmp_path / "lambada_openai.jsonl").write_bytes(content)
    with pytest.raises(ValueError, match=message):
        lambada_dataset(str(tmp_path))


def test_a_line_ends_at_a_newline_only(tmp_path):
    text = "one\u2028two three"
    row = json.dumps({"text": text}, ensure_ascii=False)
    (tmp_path / "lambada_openai.jsonl").write_text(row + "\n", encoding="utf-8")
    assert list(lambada_dataset(str(tmp_path))["test"]) == [{"text": text}]


def test_empty_files_hold_no_documents(tmp_path):
    (tmp_path / "wikitext2_test.txt").write_text("\n")
    (tmp_path / "blimp").mkdir()
    (tmp_path / "blimp" / "x.jsonl").write_text("")
    for make in (wikitext_dataset, blimp_dataset):
        with pytest.raises(ValueError, match="holds no documents"):
            make(str(tmp_path))
