"""Prepared folders have the mode of any new folder, and the process's umask is never changed for it."""

import os
import stat
from pathlib import Path

import pytest

from lrnn_lm.data.storage import build_folder


@pytest.mark.parametrize("umask", [0o022, 0o027, 0o077])
def test_a_prepared_folder_has_the_mode_of_a_new_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, umask: int
) -> None:
    before = os.umask(umask)
    try:
        monkeypatch.setattr(os, "umask", lambda value: pytest.fail("another thread would see it"))
        build_folder(tmp_path / "made", lambda aside: (aside / "file").write_text("x"))
    finally:
        monkeypatch.undo()
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "made").stat().st_mode) == 0o777 & ~umask
    assert [path.name for path in tmp_path.iterdir() if not path.name.startswith(".")] == ["made"]
