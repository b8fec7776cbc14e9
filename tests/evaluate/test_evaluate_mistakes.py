"""Mistakes of who scores a checkpoint: told in plain lines, before the work and not after it."""

import json
import shutil

import pytest

from lrnn_lm.evaluate.harness import evaluate
from lrnn_lm.evaluate.tasks.names import read_suite
from lrnn_lm.runs.load import load_checkpoint

BOTH = ["heldout_bits_per_byte", "heldout_cloze"]


@pytest.mark.parametrize(
    ("tasks", "settings", "message"),
    [
        ([], {}, "no tasks"),
        ([""], {}, "no tasks"),
        (BOTH, {"limit": 0}, "limit must be at least 1"),
        (BOTH, {"limit": -3}, "limit must be at least 1"),
        (BOTH, {"batch_size": 0}, "batch_size must be at least 1"),
        (BOTH, {"num_fewshot": -1}, "num_fewshot"),
        (BOTH, {"device": "abacus"}, "abacus"),
        (BOTH, {"device": "cuda:99"}, "no such CUDA device"),
        (BOTH, {"data": "nowhere.jsonl"}, "no such file"),
        (BOTH, {"suite": "nosuite"}, "ships demo, long"),
    ],
)
def test_mistakes_are_told_plainly(checkpoint, tasks, settings, message):
    with pytest.raises(ValueError, match=message) as error:
        evaluate(checkpoint, tasks, **settings)
    assert len(str(error.value).splitlines()) <= 2


@pytest.mark.usefixtures("few_tasks")
def test_names_are_checked_against_all_of_lm_eval():
    from lrnn_lm.evaluate.tasks.names import find_tasks

    for name, near in [("heldout_clozze", "heldout_cloze"), ("hellaswagg", "hellaswag")]:
        with pytest.raises(ValueError, match=f"unknown task '{name}'; did you mean {near}") as error:
            find_tasks(["heldout_bits_per_byte", name], {})
        assert len(str(error.value).splitlines()) == 1
    with pytest.raises(ValueError, match="lm_eval ls tasks"):
        find_tasks(["zzzzqqqqzzzz*"], {})
    standard = read_suite("standard").tasks
    assert find_tasks(standard, {})[1:] == (standard, True)
    for pattern in ("arc_eas*", "arc_eas?", "arc_[ef]asy"):
        assert find_tasks([pattern, "heldout_*"], {})[1] == ["arc_easy", *BOTH]
    assert find_tasks(["heldout_*"], {})[1:] == (BOTH, False)


def test_a_name_in_no_file_is_refused_without_the_index(monkeypatch):
    """Which takes twenty seconds to read."""
    from lm_eval import tasks

    from lrnn_lm.evaluate.tasks.names import find_tasks

    index = tasks.TaskManager

    def own_only(include_defaults=True, **keys):
        assert not include_defaults
        return index(include_defaults=False, **keys)

    monkeypatch.setattr(tasks, "TaskManager", own_only)
    for name, hint in [("heldout_clozze", "mean heldout_cloze"), ("hellaswagg", "mean hellaswag or"),
                       ("zzzzqqqqzzzz", "lm_eval ls tasks")]:  # fmt: skip
        with pytest.raises(ValueError, match=f"unknown task '{name}'.*{hint}"):
            find_tasks(["heldout_cloze", name], {})


def test_what_is_not_a_checkpoint_is_told(checkpoint, tmp_path):
    with pytest.raises(ValueError, match="no such checkpoint"):
        evaluate(tmp_path / "gone", BOTH)
    with pytest.raises(ValueError, match=r"did you mean .*latest"):
        evaluate(checkpoint.parent.parent, BOTH)
    with pytest.raises(ValueError, match=r"no config\.json"):
        evaluate(tmp_path, BOTH)
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"broken/config\.json: not a JSON object"):
        load_checkpoint(broken, "cpu")
    (broken / "config.json").write_text("{}")
    (broken / "model.safetensors").write_bytes(b"no weights")
    (broken / "tokenizer.json").write_text("{}")
    with pytest.raises(ValueError, match="cannot be loaded"):
        evaluate(broken, BOTH, data=checkpoint.parent.parent)


@pytest.mark.parametrize("missing", ["model.safetensors", "tokenizer"])
def test_a_missing_file_is_named(checkpoint, tmp_path, missing):
    copy = shutil.copytree(checkpoint, tmp_path / "copy")
    for file in copy.glob(f"{missing}*"):
        file.unlink()
    with pytest.raises(ValueError, match=rf"copy: {missing}.* is missing; copy the folder again"):
        load_checkpoint(copy, "cpu")


def test_weights_of_other_sizes_than_the_configs(checkpoint, tmp_path):
    copy = shutil.copytree(checkpoint, tmp_path / "copy")
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps({**config, "intermediate_size": 24}))
    with pytest.raises(ValueError, match=r"do not have the sizes of its config\.json") as error:
        load_checkpoint(copy, "cpu")
    assert "\n" not in str(error.value)


@pytest.mark.usefixtures("few_tasks")
def test_a_hub_task_without_a_network_ends_at_once(checkpoint, loaded, tmp_path, monkeypatch):
    import datasets
    from huggingface_hub import constants

    from lrnn_lm.evaluate.tasks import names as tasks

    monkeypatch.setattr(tasks, "hub_is_reachable", lambda: False)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    model, tokenizer = loaded
    with pytest.raises(ValueError, match="EleutherAI/lambada_openai") as error:
        evaluate(checkpoint, ["lambada_openai"], model=model, tokenizer=tokenizer, limit=1)
    assert len(str(error.value).splitlines()) == 2
    assert "heldout_cloze" in str(error.value)
    assert not constants.HF_HUB_OFFLINE, "the switch is put back"


def test_the_hub_is_tried_before_it_is_given_up(monkeypatch):
    import socket

    from huggingface_hub import constants

    from lrnn_lm.files import hub_is_reachable

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    for name in ("http_proxy", "https_proxy", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)
    with socket.create_server(("127.0.0.1", 0)) as server:
        monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{server.getsockname()[1]}")
        assert hub_is_reachable()
    assert not hub_is_reachable()
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:1")
    monkeypatch.setattr(constants, "ENDPOINT", "https://nowhere.invalid")
    assert hub_is_reachable()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert not hub_is_reachable()


@pytest.mark.parametrize("special", [False, True])
def test_tokens_without_an_embedding_are_told(checkpoint, tmp_path, special):
    """On a GPU they end the process. A control token more, as for padding, is no text."""
    copy = shutil.copytree(checkpoint, tmp_path / "copy")
    tokenizer = load_checkpoint(checkpoint, "cpu")[1]
    tokenizer.add_tokens(["river"], special_tokens=special)
    tokenizer.save_pretrained(copy)
    if special:
        assert len(load_checkpoint(copy, "cpu")[1]) > load_checkpoint(copy, "cpu")[0].config.vocab_size
        return
    with pytest.raises(ValueError, match=r"no embedding in its model, 1 of them, such as 'river'"):
        load_checkpoint(copy, "cpu")
