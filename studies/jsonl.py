"""Files of rows, one JSON object a line, that studies append to."""

import json
from pathlib import Path
from typing import Any

Row = dict[str, Any]


def read_rows(path: Path) -> list[Row]:
    """Read all rows. A file that does not exist has none.

    A killed process may leave a last line that is cut short. It is skipped, and its run is repeated.

    Raises:
        ValueError: another line is not a JSON object.
    """
    *lines, last = path.read_text(encoding="utf-8", errors="replace").split("\n") if path.is_file() else [""]
    rows = [_row(line, f"{path}, line {i}") for i, line in enumerate(lines, 1) if line.strip()]
    return rows if _is_begun(last) else [*rows, _row(last, f"{path}, line {len(lines) + 1}")]


def rows_to_continue(path: Path, *keys: str) -> list[Row]:
    """The rows of a file that more are to be appended to, before any is made.

    Raises:
        ValueError: a row of another study, without one of `keys`; or as `read_rows`.
        OSError: the file cannot be written.
    """
    rows = read_rows(path)
    if any(key not in row for row in rows for key in keys):
        raise ValueError(f"{path}: holds rows of another study; name another file with --output")
    path.parent.mkdir(parents=True, exist_ok=True)
    end_line(path)
    return rows


def append_row(path: Path, row: Row) -> None:
    """Append a row on a line of its own."""
    end_line(path)
    with path.open("ab") as file:
        file.write(json.dumps(row).encode() + b"\n")


def end_line(path: Path) -> None:
    """Remove the beginning of a row that a killed process has written last; end a whole one's line."""
    with path.open("a+b") as file:
        file.seek(0)
        last = file.read().split(b"\n")[-1]
        if not _is_begun(last.decode(errors="replace")):
            file.write(b"\n")
        elif last:
            file.truncate(file.tell() - len(last))


def _is_begun(line: str) -> bool:
    """Whether a line without an end is nothing, or the beginning of a row."""
    if not line.startswith("{"):
        return not line.strip()
    try:
        json.loads(line)
    except ValueError:
        return True
    return False


def _row(line: str, where: str) -> Row:
    try:
        row = json.loads(line)
    except ValueError:
        row = None
    if not isinstance(row, dict):
        raise ValueError(f"{where}: is no row, a JSON object; mend the line or remove it")
    return row
