"""Kill a run with SIGKILL again and again at random moments, go on each time, and compare its end with a run
that nobody disturbed:

    python tests/kill_resume.py [--kills 20] [--seed 0] [--folder DIR]

Exits with 0 if the final weights, optimiser state, random state and losses are equal, bit for bit.
"""

import argparse
import random
import sys
import tempfile
import time
from pathlib import Path

from tiny_run import TOKENS_PER_STEP, fingerprint, finish, losses, start, validations, write_recipe


def kill_and_resume(folder: Path, kills: int, seed: int) -> list[int]:
    """Train twice in `folder`, once with `kills` kills; returns the lines of metrics.jsonl at each kill.

    A kill comes at a random moment, a few steps after a process has found its checkpoint: within a step, a
    validation or a save (there is one after every step). Fewer kills if the run is done before.
    AssertionError if the two ends differ.
    """
    rng = random.Random(seed)
    total = 6 * max(1, kills)
    often = (f"train.tokens={total * TOKENS_PER_STEP}", "checkpoint.every=1 steps", "eval.every=2 steps")
    last = f"checkpoints/step-{total:08d}"
    recipe = write_recipe(folder)
    code, errors = finish(start(recipe, *often, "name=straight"))
    assert code == 0, errors
    run = folder / "runs/tiny"
    lines: list[int] = []
    while len(lines) < kills:
        before = _identity(run)
        process = start(recipe, *often)
        while process.poll() is None and _identity(run) == before:
            time.sleep(0.002)
        begun, more = _lines(run), rng.randint(0, 8)
        while process.poll() is None and _lines(run) < begun + more:
            time.sleep(0.002)
        time.sleep(rng.uniform(0, 0.05))
        process.kill()
        code, errors = finish(process)
        assert code in (-9, 0), errors
        if code == 0:  # it was done before the blow fell
            break
        lines.append(_lines(run))
    code, errors = finish(start(recipe, *often))
    assert code == 0, errors
    straight = folder / "runs/straight"
    assert fingerprint(run / last) == fingerprint(straight / last)
    assert losses(run) == losses(straight)
    assert validations(run) == validations(straight)
    assert not [p for p in run.rglob("*") if p.name.endswith(".tmp")]
    return lines


def _identity(run: Path) -> int:
    """Which file metrics.jsonl is: a run that goes on puts another in its place as its training begins."""
    path = run / "metrics.jsonl"
    return path.stat().st_ino if path.exists() else 0


def _lines(run: Path) -> int:
    return (run / "metrics.jsonl").read_text().count("\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, default=None)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = options.folder or Path(scratch)
        lines = kill_and_resume(folder, options.kills, options.seed)
    print(f"killed {len(lines)} times, at lines {lines} of metrics.jsonl; same end as undisturbed")


if __name__ == "__main__":
    sys.exit(main())
