"""Harm a run at random moments, go on each time, and compare its end with a run that nobody disturbed:

    python tests/kill_resume.py [--kills 50] [--ranks 2] [--parallel fsdp2] [--seed 0] [--folder DIR]

What may happen: SIGKILL to one rank or to all, SIGTERM to one rank or to all, a disk that is full (where a
small file system can be mounted). Exits with 0 if the final weights, optimizer, random states, position and
losses are equal, bit for bit, and a whole checkpoint was there to go on from each time.
"""

import argparse
import hashlib
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from rank_runs import Ranks
from safetensors.torch import load_file
from tiny_run import TOKENS_PER_STEP, losses, sha256, validations, write_recipe

KINDS = ("kill one", "kill all", "term one", "term all", "full disk")
_CODES = {  # of a rank, by what happened; the first must be there unless all were done before the blow
    "kill one": (-signal.SIGKILL, 1, 0),  # killed; failed because another was
    "kill all": (-signal.SIGKILL, 1, 0),
    "term one": (85, 0),
    "term all": (85, 0),
    "full disk": (2, 1, 0),  # no room; lost a rank that had none
}
_DISK_MB = 24


def harm_and_resume(
    folder: Path, kills: int, seed: int, ranks: int = 1, parallel: str = "ddp", kinds: tuple[str, ...] = KINDS
) -> list[str]:
    """Train twice in `folder`, once with `kills` harms; returns what was done at which step.

    A harm comes at a random moment, a few steps after the ranks have found their checkpoint: within a step, a
    validation or a save (there is one after every step). Fewer if the run is done before. AssertionError if
    the two ends differ, or no whole checkpoint is left.
    """
    rng = random.Random(seed)
    total = 6 * max(1, kills)
    often = (f"train.tokens={total * TOKENS_PER_STEP}", "checkpoint.every=1 steps", "eval.every=3 steps",
             "train.micro_batch=4")  # fmt: skip
    recipe = write_recipe(folder, model={"num_hidden_layers": 1})
    Ranks(recipe, ranks, *often, "name=straight", parallel=parallel).expect()
    with _small_disk(folder) as disk:
        kinds = tuple(kind for kind in kinds if disk is not None or kind != "full disk")
        runs = disk or folder / "harmed"
        run, straight = runs / "tiny", folder / "runs/straight"
        options = (*often, f"train.runs_dir={runs}")
        done: list[str] = []
        while len(done) < kills:
            before, saved = _identity(run), (run / "checkpoints/latest").exists()
            started = Ranks(recipe, ranks, *options, parallel=parallel)
            if not _await_training(started, run, before, rng):
                break
            kind = rng.choice(kinds)
            at = _lines(run)
            _harm(started, kind, run, rng)
            codes = started.wait()
            (runs / "filler").unlink(missing_ok=True)
            assert_codes(kind, codes, started.errors)
            if codes == [0] * ranks:  # it was done before the blow fell
                break
            _assert_whole(run, saved)
            done.append(f"{kind} at line {at}")
        Ranks(recipe, ranks, *options, parallel=parallel).expect()
        _assert_same_end(run, straight, total)
    return done


def assert_codes(kind: str, codes: list[int], errors: str) -> None:
    """Each rank ends as it may after this harm, and one because of it: a plain crash does not pass."""
    expected = set(codes) <= set(_CODES[kind]) and (_CODES[kind][0] in codes or not any(codes))
    assert expected, f"{kind}: {codes}: {errors}"


def _assert_whole(run: Path, saved: bool) -> None:
    """Once there has been a checkpoint, there is one whose files are all as its manifest says."""
    from lrnn_lm.runs.checkpoint import list_checkpoints, verify

    folders = list_checkpoints(run / "checkpoints")
    assert any(verify(folder) is None for folder in folders) or not saved, folders


def _await_training(started: Ranks, run: Path, before: int, rng: random.Random) -> bool:
    """Until it trains, and a few steps more; false if it ends by itself."""

    def alive() -> bool:
        return all(process.exitcode is None for process in started.processes)

    while alive() and _identity(run) in (0, before):  # 0: a run without a checkpoint puts it away
        time.sleep(0.002)
    begun, more = _lines(run), rng.randint(0, 8)
    while alive() and _lines(run) < begun + more:
        time.sleep(0.002)
    time.sleep(rng.uniform(0, 0.05))
    if not alive():
        assert set(started.wait()) == {0}, started.errors
        return False
    return True


def _harm(started: Ranks, kind: str, run: Path, rng: random.Random) -> None:
    if kind == "full disk":
        _fill(run.parent)
        return
    number = signal.SIGKILL if kind.startswith("kill") else signal.SIGTERM
    victims = started.processes if kind.endswith("all") else [rng.choice(started.processes)]
    for victim in victims:
        if victim.exitcode is None:
            os.kill(victim.pid, number)


def _fill(disk: Path) -> None:
    """Leave no room, whatever the run frees or writes meanwhile, until it has met that."""
    with (disk / "filler").open("wb", buffering=0) as filler:
        patience = time.monotonic() + 3
        while time.monotonic() < patience:
            try:
                filler.write(bytes(1 << 16))
            except OSError:
                time.sleep(0.01)


@contextmanager
def _small_disk(folder: Path) -> Iterator[Path | None]:
    """A file system of a few megabytes; None where it cannot be mounted."""
    disk = folder / "disk"
    disk.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={_DISK_MB}m", "tmpfs", disk], capture_output=True
    )
    if mounted.returncode:
        yield None
        return
    try:
        yield disk
    finally:
        subprocess.run(["umount", "-l", disk], check=True)


def _assert_same_end(run: Path, straight: Path, total: int) -> None:
    assert losses(run) == losses(straight)
    assert validations(run) == validations(straight)
    ends = [x / f"checkpoints/step-{total:08d}" for x in (run, straight)]
    ours, theirs = (_contents(end) for end in ends)
    assert ours == theirs
    left = [p for p in run.rglob("*") if p.name.endswith(".tmp")]
    assert not left, left


def _contents(checkpoint: Path) -> dict[str, str]:
    """What a resumed run must have in common with an undisturbed one: tensors, random states, position."""
    from lrnn_lm.train.tensors import is_sharded_folder, read_shards

    found = {
        path.name: sha256(path)
        for path in (checkpoint / "trainer").glob("*.json")
        if "manifest" not in path.name
    }
    tensors = {p.name: load_file(p) for p in checkpoint.rglob("*.safetensors") if "shard-" not in p.name}
    if is_sharded_folder(checkpoint):
        tensors["shards"] = read_shards(checkpoint, "optimizer")
    for file, inside in tensors.items():
        found |= {f"{file}/{key}": _hash(value) for key, value in inside.items()}
    return found


def _hash(tensor: torch.Tensor) -> str:
    return hashlib.sha256(tensor.contiguous().numpy().tobytes()).hexdigest()


def _identity(run: Path) -> int:
    """Which file metrics.jsonl is: a run that goes on puts another in its place as its training begins."""
    path = run / "metrics.jsonl"
    return path.stat().st_ino if path.exists() else 0


def _lines(run: Path) -> int:
    return (run / "metrics.jsonl").read_text().count("\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--parallel", choices=["ddp", "fsdp2"], default="fsdp2")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, default=None)
    options = parser.parse_args()
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as scratch:
        folder = options.folder or Path(scratch)
        done = harm_and_resume(folder, options.kills, options.seed, options.ranks, options.parallel)
    kinds = Counter(what.rpartition(" at line")[0] for what in done)
    told = ", ".join(f"{kind} {count}" for kind, count in sorted(kinds.items()))
    print(
        f"harmed {len(done)} times ({told}) on {options.ranks} ranks, {options.parallel}: the same end as "
        f"undisturbed, bit for bit; {time.monotonic() - began:.0f} s"
    )


if __name__ == "__main__":
    sys.exit(main())
