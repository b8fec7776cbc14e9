"""The notebooks in examples/, their cells run from top to bottom with less text; stored without outputs."""

import json
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[1] / "examples"
TINY = [
    "data.source.limit=40", "data.num_proc=1", "data.sequence_length=64", "model.vocab_size=400",
    "model.hidden_size=32", "model.num_hidden_layers=1", "train.tokens_per_step=512",
]  # fmt: skip


def code_cells(notebook: Path) -> list[str]:
    cells = json.loads(notebook.read_text(encoding="utf-8"))["cells"]
    assert all(cell["outputs"] == [] for cell in cells if cell["cell_type"] == "code")
    return ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]


def test_first_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    import matplotlib

    matplotlib.use("agg")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    names: dict = {}
    for source in code_cells(FOLDER / "first_model.ipynb"):
        source = source.replace('"600K"', '"5K"').replace('["name=notebook",', f'["name=notebook", *{TINY},')
        exec(compile(source, "first_model.ipynb", "exec"), names)
    assert names["recipe"].train.tokens == 5000
    assert names["seconds"][1] < names["seconds"][0]
    assert "to the first new token" in capsys.readouterr().out
    assert (tmp_path / "runs/notebook/exported/modeling_lrnn.py").is_file()
