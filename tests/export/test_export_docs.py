"""The examples of docs/checkpoints.md run as they are written, one after the other."""

import re
from pathlib import Path

from lrnn_lm.runs.export import export

PAGE = Path(__file__).parents[2] / "docs" / "checkpoints.md"


def test_examples_run(make_checkpoint, tmp_path, monkeypatch, capsys):
    export(make_checkpoint("bd_lru"), tmp_path / "demo-model")
    monkeypatch.chdir(tmp_path)
    examples = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    assert len(examples) == 4
    names = {}
    for example in examples:
        exec(example, names)
    assert "bd_lru" in capsys.readouterr().out
    assert (tmp_path / "tuned-model" / "modeling_lrnn.py").is_file()
