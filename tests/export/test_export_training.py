"""What `lrnn train` leaves is self-contained: its last checkpoint is read where the package is not."""

import json

import pytest
from tiny_run import STEPS, write_recipe

from lrnn_lm import cli
from lrnn_lm.model.export.remote_code import remote_code
from lrnn_lm.runs.checkpoint import verify

READ = """
from transformers import AutoModelForCausalLM, AutoTokenizer
tokenizer = AutoTokenizer.from_pretrained(arguments, trust_remote_code=True)
model = AutoModelForCausalLM.from_pretrained(arguments, trust_remote_code=True)
inputs = tokenizer("the state of a", return_tensors="pt")
out = model.generate(**inputs, max_new_tokens=3, do_sample=False)
result["module"] = type(model).__module__.split(".")[0]
result["text"] = tokenizer.decode(out[0], skip_special_tokens=True)
"""


def test_a_trained_checkpoint_is_read_elsewhere(tmp_path, read_elsewhere):
    recipe = write_recipe(tmp_path)
    with pytest.raises(SystemExit) as stop:
        cli.main(["train", str(recipe), f"train.runs_dir={tmp_path / 'runs'}", "eval.tasks=[]"])
    assert not stop.value.code
    run = tmp_path / "runs" / "tiny"
    checkpoint = run / "checkpoints" / "latest"
    assert set(remote_code()) == {file.name for file in checkpoint.glob("*.py")}
    assert verify(checkpoint) is None  # the code is in the manifest too
    assert f"this is step {STEPS}" in (run / "README.md").read_text()
    assert json.loads((run / "data.json").read_text())["content_hash"][:16] in (run / "README.md").read_text()
    got = read_elsewhere(READ, str(checkpoint))
    assert got["module"] == "transformers_modules"
    assert got["text"].startswith("the state of a")
