"""push_to_hub into a local folder in the hub's place: what is pushed loads back as the same model."""

import shutil
import socket

import huggingface_hub
import pytest
import torch
from huggingface_hub import HfApi, RepoUrl
from small_models import close, small_model, tokens
from transformers import AutoModelForCausalLM, AutoTokenizer


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A folder that takes what is uploaded; whatever else asks for the network fails."""
    folder = tmp_path / "hub"

    def create_repo(self, repo_id, **options):
        (folder / repo_id).mkdir(parents=True, exist_ok=True)
        return RepoUrl(f"https://huggingface.co/{repo_id}")

    def create_commit(self, repo_id, operations, **options):
        for operation in operations:
            target = folder / repo_id / operation.path_in_repo
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(operation.path_or_fileobj, target)

    def connect(*arguments):
        raise AssertionError("the network was asked")

    monkeypatch.setattr(HfApi, "create_repo", create_repo)
    monkeypatch.setattr(HfApi, "create_commit", create_commit)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(socket.socket, "connect", connect)
    return folder


@pytest.mark.parametrize("name", ["bd_matrix-erase", "hybrid"])
def test_pushed_and_loaded_back(name, hub):
    model, ids = small_model(name), tokens()
    model.push_to_hub("someone/small")
    loaded = AutoModelForCausalLM.from_pretrained(hub / "someone/small").eval()
    with torch.no_grad():
        close(loaded(ids).logits, model(ids).logits, 0)
    assert "library_name: transformers" in (hub / "someone/small/README.md").read_text()


def test_saved_and_pushed_with_its_tokenizer(hub, tmp_path, tokenizer):
    """`save_pretrained(push_to_hub=True)`: the folder and the repository hold the same."""
    model, ids = small_model("bd_lru"), tokens()
    for part in (model, tokenizer):
        part.save_pretrained(tmp_path / "saved", push_to_hub=True, repo_id="someone/saved")
    pushed = {path.name: path.read_bytes() for path in (hub / "someone/saved").iterdir()}
    assert pushed == {path.name: path.read_bytes() for path in (tmp_path / "saved").iterdir()}
    loaded = AutoModelForCausalLM.from_pretrained(hub / "someone/saved").eval()
    with torch.no_grad():
        close(loaded(ids).logits, model(ids).logits, 0)
    text = "The gardener walked"
    assert AutoTokenizer.from_pretrained(hub / "someone/saved")(text).input_ids == tokenizer(text).input_ids
