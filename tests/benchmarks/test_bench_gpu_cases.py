"""Checks in processes of their own, as `python -m benchmarks.gpu.walk` runs them."""

from benchmarks.gpu.cases import Item, run_items


def test_a_case_that_fails_at_length_is_reported(tmp_path, monkeypatch, capsys):
    """A compiler that fails prints more than a pipe holds."""
    (tmp_path / "noisy.py").write_text(
        "import sys\nprint('line ' * 100_000, file=sys.stderr)\nprint('the last', file=sys.stderr)\n"
        "sys.exit(sys.argv[2] == 'bad')\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    items = {"one": Item([("good",), ("bad",)], None), "other": Item([("good",)], None)}
    assert run_items("noisy", items, ["--seconds", "20"]) == ([], False)
    said = capsys.readouterr().out
    assert "bad: FAILED, exit code 1" in said
    assert "the last" in said
    assert "not done: nothing" in said
    assert run_items("noisy", items, ["--items", "other"]) == ([], True)
