"""Scores: equal to a computation by hand, the same every time, written where promised; plain messages."""

import json
import math
import random
import shutil

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from lrnn_lm.evaluate.harness import evaluate, flatten
from lrnn_lm.evaluate.tasks import heldout
from lrnn_lm.evaluate.tasks.names import read_suite
from lrnn_lm.runs.load import context_length, load_checkpoint

BOTH = ["heldout_bits_per_byte", "heldout_cloze"]


@pytest.fixture(scope="module")
def results(checkpoint, loaded):
    model, tokenizer = loaded
    return evaluate(checkpoint, BOTH, model=model, tokenizer=tokenizer, max_length=1024)


def _logprobs(model, ids):
    """Log-probability of each of ids[1:] given those before it: (T-1,)."""
    with torch.no_grad():
        logits = model(torch.tensor([ids[:-1]])).logits[0].double()
    return logits.log_softmax(-1).gather(1, torch.tensor(ids[1:])[:, None])[:, 0], logits.argmax(-1)


def _score(results, task, metric):
    return results["results"][task][f"{metric},none"]


def test_bits_per_byte_equals_direct_log_softmax(results, loaded, documents):
    model, tokenizer = loaded
    nats = 0.0
    for text in documents:
        ids = [tokenizer.bos_token_id, *tokenizer.encode(text, add_special_tokens=False)]
        nats -= _logprobs(model, ids)[0].sum().item()
    size = len("".join(documents).encode())
    bits = nats / math.log(2) / size
    assert _score(results, BOTH[0], "bits_per_byte") == pytest.approx(bits, rel=1e-5)
    assert _score(results, BOTH[0], "byte_perplexity") == pytest.approx(2**bits, rel=1e-5)
    gzip = heldout.gzip_bits_per_byte(list(enumerate(documents)))
    assert _score(results, BOTH[0], "gzip_bits_per_byte") == gzip


def test_cloze_equals_direct_log_softmax(results, loaded, checkpoint):
    model, tokenizer = loaded
    rows = list(heldout.cloze_dataset(pretrained=str(checkpoint))["test"])
    nats, hits = [], []
    for row in rows:
        context = tokenizer.encode(row["context"], add_special_tokens=False)
        whole = tokenizer.encode(row["context"] + row["answer"], add_special_tokens=False)
        logprobs, guesses = _logprobs(model, whole)
        asked = len(whole) - len(context)
        nats.append(-logprobs[-asked:].sum().item())
        hits.append(guesses[-asked:].tolist() == whole[-asked:])
    assert _score(results, BOTH[1], "acc") == pytest.approx(np.mean(hits))
    assert _score(results, BOTH[1], "perplexity") == pytest.approx(math.exp(np.mean(nats)), rel=1e-5)
    assert {"acc_stderr,none", "perplexity_stderr,none"} <= results["results"][BOTH[1]].keys()


def test_cloze_of_our_models_is_read_from_bos(checkpoint, loaded, tmp_path, monkeypatch):
    from lrnn_lm.evaluate import scoring

    model, tokenizer = loaded
    monkeypatch.setattr(scoring, "document_start", lambda model, tokenizer: tokenizer.bos_token_id)
    out = evaluate(
        checkpoint, BOTH[1:], model=model, tokenizer=tokenizer, max_length=1024, output=tmp_path, batch_size=3
    )
    nats = []
    for row in heldout.cloze_dataset(pretrained=str(checkpoint))["test"]:
        context = tokenizer.encode(row["context"], add_special_tokens=False)
        whole = tokenizer.encode(row["context"] + row["answer"], add_special_tokens=False)
        logprobs, _ = _logprobs(model, [tokenizer.bos_token_id, *whole])
        nats.append(-logprobs[-(len(whole) - len(context)) :].sum().item())
    assert _score(out, BOTH[1], "perplexity") == pytest.approx(math.exp(np.mean(nats)), rel=1e-5)


def test_cloze_accuracy_of_a_model_that_knows(checkpoint, loaded, tmp_path, monkeypatch):
    """Accuracy is not merely 0 of a random model: answers set to what the model says give 1."""
    model, tokenizer = loaded
    rows = list(heldout.cloze_dataset(pretrained=str(checkpoint))["test"])[:4]
    for row in rows:
        ids = tokenizer.encode(row["context"], add_special_tokens=False)
        row["answer"] = tokenizer.decode([_logprobs(model, [*ids, 0])[1][-1].item()])
    kept = [r for r in rows if r["answer"].strip() and "\ufffd" not in r["answer"]
            and tokenizer.encode(r["context"] + r["answer"], add_special_tokens=False)[:-1]
            == tokenizer.encode(r["context"], add_special_tokens=False)]  # fmt: skip
    assert kept, "choose another seed for the tiny model"
    monkeypatch.setattr(heldout, "_cloze_passages", lambda _: iter(kept))
    out = evaluate(checkpoint, BOTH[1:], model=model, tokenizer=tokenizer, max_length=1024, output=tmp_path)
    assert _score(out, BOTH[1], "acc") == 1.0


def test_the_batch_size_does_not_matter(results, checkpoint, loaded, tmp_path):
    model, tokenizer = loaded
    settings = {"model": model, "tokenizer": tokenizer, "max_length": 1024, "output": tmp_path}
    again = evaluate(checkpoint, BOTH[:1], batch_size=1, **settings)
    want = _score(results, BOTH[0], "bits_per_byte")
    assert _score(again, BOTH[0], "bits_per_byte") == pytest.approx(want, rel=1e-5)


def test_long_documents_are_scored_in_windows_each_token_once(checkpoint, loaded, documents, tmp_path):
    model, tokenizer = loaded
    window, nats = 48, 0.0
    for text in documents:
        ids = [tokenizer.bos_token_id, *tokenizer.encode(text, add_special_tokens=False)]
        done = 1
        while done < len(ids):
            end = min(done + window, len(ids))
            nats -= _logprobs(model, ids[max(0, end - window - 1) : end])[0][-(end - done) :].sum().item()
            done = end
    out = evaluate(checkpoint, BOTH[:1], model=model, tokenizer=tokenizer, output=tmp_path)
    assert out["settings"]["max_length"] == window
    bits = nats / math.log(2) / len("".join(documents).encode())
    assert _score(out, BOTH[0], "bits_per_byte") == pytest.approx(bits, rel=1e-5)


def test_scores_repeat_exactly_and_leave_the_random_state_alone(results, checkpoint, loaded, tmp_path):
    model, tokenizer = loaded
    random.seed(1), np.random.seed(1), torch.manual_seed(1)
    want = random.random(), np.random.rand(), torch.rand(1)
    random.seed(1), np.random.seed(1), torch.manual_seed(1)
    model.train()
    again = evaluate(checkpoint, BOTH, model=model, tokenizer=tokenizer, max_length=1024, output=tmp_path)
    assert (random.random(), np.random.rand(), torch.rand(1)) == want
    assert model.training
    model.eval()
    assert again["results"] == results["results"]


def test_scores_repeat_whatever_dropout_a_tokenizer_has(checkpoint, loaded, results, tmp_path):
    """BPE dropout, which tokenizer.json keeps: each reading of a text gives other tokens."""
    model, _ = loaded
    copied = shutil.copytree(checkpoint, tmp_path / "copy")
    stored = json.loads((copied / "tokenizer.json").read_text())
    stored["model"]["dropout"] = 0.5
    (copied / "tokenizer.json").write_text(json.dumps(stored))
    given = AutoTokenizer.from_pretrained(copied)
    assert len({tuple(given.encode("the old river runs on")) for _ in range(20)}) > 1
    for tokenizer in (given, load_checkpoint(copied, "cpu")[1]):
        pair = {"model": model, "tokenizer": tokenizer}
        again = evaluate(checkpoint, BOTH[:1], max_length=1024, output=tmp_path / "out", **pair)
        assert _score(again, BOTH[0], "bits_per_byte") == _score(results, BOTH[0], "bits_per_byte")
    assert given.backend_tokenizer.model.dropout == 0.5, "the caller's stays as it was"
    assert tokenizer.backend_tokenizer.model.dropout is None


def test_the_callers_tokenizer_stays_as_it_was(checkpoint, loaded, tmp_path):
    """A padding token that is EOS would take EOS out of the labels of who trains on with this tokenizer."""
    model, tokenizer = loaded
    before = tokenizer.special_tokens_map, len(tokenizer)
    assert tokenizer.pad_token is None
    evaluate(checkpoint, BOTH[:1], limit=1, model=model, tokenizer=tokenizer, output=tmp_path)
    assert (tokenizer.special_tokens_map, len(tokenizer)) == before


def test_documents_start_at_bos_for_our_models_only(checkpoint, loaded):
    from lrnn_lm.evaluate.lm import LiveLM
    from lrnn_lm.runs.load import document_start

    model, tokenizer = loaded
    assert document_start(model, tokenizer) is None
    bos, plain = tokenizer.bos_token_id, tokenizer.encode("river", add_special_tokens=False)
    settings = {"batch_size": 1, "max_length": 48}
    assert LiveLM(model, tokenizer, start=None, **settings).tok_encode("river") == plain
    ours = LiveLM(model, tokenizer, start=bos, **settings)
    assert ours.tok_encode("river") == [bos, *plain]
    spelt = tokenizer.encode("<s>river", add_special_tokens=False, split_special_tokens=True)
    assert bos not in spelt
    assert ours.tok_encode("<s>river") == [bos, *spelt], "what spells a control token is text"
    assert ours.tok_encode("river", add_special_tokens=False) == plain
    assert ours.tok_encode("river", left_truncate_len=1) == plain[-1:]
    ids, mask = ours.tok_batch_encode(["river", "the old river"])
    assert ids.shape == mask.shape
    assert [row[keep.bool()][0].item() for row, keep in zip(ids, mask, strict=True)] == [bos, bos]
    context, answer = ours._encode_pair("the old", " river")
    assert context[0] == bos
    assert bos not in answer


def test_rolling_starts_once_even_if_the_tokenizer_adds_bos(checkpoint, loaded, results, tmp_path):
    from tokenizers.processors import TemplateProcessing

    model, tokenizer = load_checkpoint(checkpoint, "cpu")
    bos = (tokenizer.bos_token, tokenizer.bos_token_id)
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single=f"{bos[0]} $A", special_tokens=[bos]
    )
    assert tokenizer.encode("a")[0] == bos[1]
    again = evaluate(checkpoint, BOTH[:1], model=model, tokenizer=tokenizer, max_length=1024, output=tmp_path)
    assert _score(again, BOTH[0], "bits_per_byte") == _score(results, BOTH[0], "bits_per_byte")


def test_json_lies_in_the_run_and_holds_what_is_needed(results, checkpoint, documents):
    name = "step-00000020-heldout_bits_per_byte+heldout_cloze-window-1024.json"
    path = checkpoint.parent.parent / "eval" / name
    stored = json.loads(path.read_text())
    assert stored == results
    assert stored["checkpoint"] == {"path": str(checkpoint), "step": 20, "tokens": None}
    assert stored["settings"]["limit"] is None
    assert {"torch", "transformers", "lm-eval", "python"} <= stored["software"].keys()
    assert stored["configs"].keys() == set(BOTH)
    assert stored["n-samples"][BOTH[0]]["effective"] == len(documents)
    assert not list(path.parent.glob(".*")), "nothing is left half-written"


def test_table_and_gzip_line_are_printed(checkpoint, capsys, tmp_path, documents):
    out = evaluate(checkpoint, BOTH[:1], limit=3, output=tmp_path / "here", device="cpu")
    shown = capsys.readouterr().out
    assert "bits_per_byte" in shown
    assert "gzip -9 on the same bytes" in shown
    written = next((tmp_path / "here").iterdir())
    assert written.name in shown.replace("\n", "")
    assert "bootstrapping" not in shown
    gzip = heldout.gzip_bits_per_byte(list(enumerate(documents[:3])))
    assert _score(out, BOTH[0], "gzip_bits_per_byte") == gzip, "gzip reads what the model reads"
    assert json.loads(written.read_text()) == out


def test_git_says_nothing_outside_a_clone(checkpoint, tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    evaluate(checkpoint, ["heldout_cloze"], limit=1, output=tmp_path / "scores")
    assert "fatal" not in capfd.readouterr().err


def test_a_model_outside_a_run_needs_data(checkpoint, tmp_path, capsys, documents, write_documents):
    model, tokenizer = (
        AutoModelForCausalLM.from_pretrained(checkpoint),
        AutoTokenizer.from_pretrained(checkpoint),
    )
    model.save_pretrained(tmp_path / "m")
    tokenizer.save_pretrained(tmp_path / "m")
    with pytest.raises(ValueError, match="--data"):
        evaluate(tmp_path / "m", BOTH[:1], device="cpu")
    data = write_documents(tmp_path / "some.jsonl", documents[:2])
    out = evaluate(tmp_path / "m", ["heldout"], data=data, device="cpu")
    assert out["results"].keys() == set(BOTH)
    assert "pass --output" in capsys.readouterr().out


def test_a_suite_names_tasks_and_settings(checkpoint, loaded, tmp_path):
    model, tokenizer = loaded
    suite = tmp_path / "mine.yaml"
    suite.write_text("tasks: [heldout_bits_per_byte]\nlimit: 2\n")
    out = evaluate(checkpoint, [], suite=suite, model=model, tokenizer=tokenizer, output=tmp_path)
    assert out["settings"]["limit"] == 2
    assert (tmp_path / "tiny-step-00000020-mine-limit2.json").exists()
    assert read_suite("demo").tasks == BOTH
    assert "lambada_openai" in read_suite("standard").tasks
    suite.write_text("task: [x]\n")
    with pytest.raises(ValueError, match=r"mine\.yaml.*task"):
        read_suite(suite)
    suite.write_text("tasks: [a]\nlimit: 2\ntasks: [b]\n")
    with pytest.raises(ValueError, match=r"mine\.yaml: tasks is given twice"):
        read_suite(suite)


def test_context_length_comes_from_config_then_recipe(loaded, tmp_path, monkeypatch):
    model, _ = loaded
    assert context_length(model) == 48
    monkeypatch.setattr(type(model.config), "to_dict", lambda self: {"max_position_embeddings": None})
    assert context_length(model) == 2048
    assert context_length(model, tmp_path) == 2048
    (tmp_path / "recipe.yaml").write_text("data: {sequence_length: 256}\n")
    assert context_length(model, tmp_path) == 256


def test_flatten_keeps_filters_apart():
    scores = {
        "t": {
            "alias": "t",
            "acc,none": 0.5,
            "acc_stderr,none": 0.1,
            "em,strict": 1.0,
            "em_stderr,strict": "N/A",
        }
    }
    assert flatten({"results": scores}) == [("t", "acc", 0.5, 0.1), ("t", "em (strict)", 1.0, None)]
