"""`lrnn bench --compare OLD`: is anything slower than before?

OLD is a result file. The benchmark runs again with the settings in OLD, or OLD is compared with another
result file. Rows are matched by what they measured.
"""

from dataclasses import fields
from pathlib import Path
from typing import Any

from lrnn_lm.files import pick_device

from . import measure
from .results import Row, read_results

KEY = ("contender", "size", "what", "B", "T", "mode", "context", "emulated")
# What is compared, in seconds: of each benchmark's rows, those that are there. Not the prefills of
# `bench decode`: so short a pass is the host's, which varies by half.
TIMES = ("step_seconds", "token_seconds", "forward", "backward")
TOLERANCE = 0.05


def compare_with(
    old: Path, new: Path | None = None, device: str = "auto", tolerance: float = TOLERANCE
) -> list[str]:
    """Print every time of OLD beside the new one; returns what is slower by more than the tolerance.

    Args:
        old: JSON of an earlier run.
        new: JSON of a later one; None runs the benchmark of `old` again here.
        tolerance: share of the old time.
    Raises:
        ValueError: files that are no benchmark's, or not of the same kind and device.
    """
    if not 0 <= tolerance < 10:
        raise ValueError(f"--tolerance is a share such as 0.05, not {tolerance:g}")
    about, before = read_results(old)
    if new is not None:
        about_new, after = read_results(new)
        if about_new.get("benchmark") != about.get("benchmark"):
            raise ValueError(f"{old} and {new} are of different benchmarks")
        if about_new.get("device") != about.get("device"):
            raise ValueError(
                f"{old} was measured on {about.get('device')}, {new} on {about_new.get('device')}: "
                "times of two devices say nothing of a change"
            )
    else:
        after = _run_again(about, old, device)
    return judge(before, after, tolerance)


def _run_again(about: dict[str, Any], old: Path, device: str) -> list[Row]:
    benchmark = about.get("benchmark")
    here = measure.describe(pick_device(device)).get("device")
    if benchmark not in ("train", "decode"):
        raise ValueError(
            f"{old} is not of lrnn bench train or decode, which alone --compare runs again: run its command "
            f"with --output NEW, then lrnn bench --compare {old} --against NEW"
        )
    if here != about.get("device"):
        raise ValueError(f"{old} was measured on {about.get('device')}, here is {here}")
    from . import decode, train

    module, kind = (train, train.TrainSettings) if benchmark == "train" else (decode, decode.DecodeSettings)
    try:
        wanted = settings_of(about, kind)
    except TypeError as error:
        raise ValueError(f"{old} is of another version of the benchmark: {error}") from None
    return module.run(wanted, device)


def settings_of(about: dict[str, Any], kind: type) -> Any:
    """What a file's rows were measured with.

    An option that was off, and that the benchmark no longer has, changed nothing. TypeError for any other.
    """
    known = {field.name for field in fields(kind)}
    settings = {**about.get("settings")}
    return kind(**{key: value for key, value in settings.items() if key in known or value})


def judge(before: list[Row], after: list[Row], tolerance: float) -> list[str]:
    """Print a table; returns a line for each time that is slower, and each row that no longer runs."""
    newer = {_key(row): row for row in after}
    cells, worse = [], []
    for row in before:
        now, name = newer.get(_key(row)), ", ".join(str(row[key]) for key in KEY if key in row)
        for time in TIMES:
            if not _is_time(row.get(time)):
                continue
            if now is None or not _is_time(now.get(time)):
                reason = "it is not there" if now is None else now.get("reason", "it was not measured")
                worse.append(f"{name}: {time} was measured before; now {reason}")
                cells.append([name, time, f"{1e3 * row[time]:.3f}", "", "", reason[:40]])
                continue
            ratio = now[time] / row[time]
            slower = ratio > 1 + tolerance
            if slower:
                worse.append(f"{name}: {time} is {ratio:.2f} times what it was")
            verdict = "slower" if slower else "faster" if ratio < 1 - tolerance else ""
            cells.append(
                [name, time, f"{1e3 * row[time]:.3f}", f"{1e3 * now[time]:.3f}", f"{ratio:.2f}", verdict]
            )
    measure.print_table("old and new, ms", ["", "time", "old", "new", "new/old", ""], cells)
    return worse


def _is_time(value: Any) -> bool:
    return isinstance(value, int | float) and value > 0


def _key(row: Row) -> tuple:
    return tuple(row.get(key) for key in KEY)
