"""What `lrnn train` leaves is self-contained: the code of its card reads it without the package."""

import json
import re

import pytest
from tiny_run import STEPS, write_recipe

from lrnn_lm import cli
from lrnn_lm.model.export.remote_code import remote_code
from lrnn_lm.runs.checkpoint import verify

READ = """
import os
os.chdir(arguments["run"])
exec(arguments["code"])
result["module"] = type(model).__module__.split(".")[0]
result["start"] = tokenizer.decode(inputs["input_ids"][0])
"""


@pytest.mark.slow  # of a run as it is made, `make test-fresh` asks the same
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
    [code] = re.findall(r"```python\n(.*?)```", (run / "README.md").read_text(), flags=re.DOTALL)
    got = read_elsewhere(READ, {"run": str(run), "code": code})
    assert got == {"module": "transformers_modules", "start": "<s>Once"}
