"""The copy of a run in another store (`checkpoint.copy_to`): written as it trains, read on a new machine.

    URL/NAME/                       the names of the run folder
        recipe.yaml, parent.json, metrics.jsonl, tracking.json     with every checkpoint, before its manifest
        checkpoints/step-00001000/  its manifest last
        everything else             once the run has ended and is scored

A checkpoint without a manifest there is half copied, and one whose files are not as the manifest says is
damaged: neither is used. A process of its own calls `main` (`train/copier.py`).
"""

import json
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory

from ..files import replace_file
from ..remote import RemoteFolder
from .checkpoint import CheckpointError, aside_of, verify
from .layout import CheckpointFolder, RunFolder, list_checkpoints, step_of

_WITH_EACH = ("recipe.yaml", "parent.json", "metrics.jsonl", "tracking.json")
_STAYS = ("checkpoints", "heartbeat.json", "launch", "logs")  # of the rest, what is of this machine


class RunCopy:
    """The copy of a run folder. Methods raise ValueError, naming the URL, if the store refuses."""

    def __init__(self, run: Path, copy_to: str):
        """copy_to: the folder of runs there, a URL or a folder of another disk."""
        self.run, self.url = run, f"{copy_to.rstrip('/')}/{run.name}"
        self._store = RemoteFolder(self.url)
        if self._store.lies_in(run):
            raise ValueError(f"checkpoint.copy_to {copy_to} is where the run is written: give another place")

    def check(self) -> None:
        """Raise ValueError if nothing can be written there."""
        self._store.check_writable()

    # Reading -----------------------------------------------------------------------------------------

    def newer(self) -> list[str]:
        """Names of the checkpoints there that are newer than those here, the newest first."""
        here = list_checkpoints(RunFolder(self.run).checkpoints)
        newest = step_of(here[-1]) if here else -1
        there = {step_of(Path(name)): name for name in self._store.folders("checkpoints")}
        there.pop(None, None)  # another name
        return [there[step] for step in sorted(there, reverse=True) if step > newest]

    def fetch(self, check: Callable[[Path, int], None], warn: Callable[[str], None]) -> str | None:
        """Bring the newest whole checkpoint here if it is newer than those here; its name, else None.

        check: is called with the recipe there and the checkpoint's step, before the rest is fetched; raises
        ValueError if the run cannot go on from it. warn: gets a line a damaged checkpoint. Raises
        CheckpointError if all there are damaged and there is none here.
        """
        damaged = False
        for name in self.newer():
            folder = f"checkpoints/{name}"
            manifest = self._store.read(_manifest(folder))
            if manifest is None:  # the copying was stopped
                continue
            files = {each: self._store.read(each) for each in _WITH_EACH}
            _check_recipe(files["recipe.yaml"], check, step_of(Path(name)))
            aside = aside_of(self.run / "checkpoints", step_of(Path(name)))
            shutil.rmtree(aside, ignore_errors=True)
            if (damage := self._fetch_checkpoint(folder, manifest, aside)) is not None:
                warn(f"checkpoint {self.url}/{folder} is damaged ({damage}); trying the one before")
                shutil.rmtree(aside, ignore_errors=True)
                damaged = True
                continue
            for each, content in files.items():
                if content is not None:
                    replace_file(self.run / each, content, durable=True)
            aside.rename(self.run / folder)  # last: once it is there the run goes on from it
            return name
        if damaged and not list_checkpoints(RunFolder(self.run).checkpoints):
            raise CheckpointError(
                f"no checkpoint in {self.url} is whole. Put one back from a copy, or give another "
                "checkpoint.copy_to to train from the beginning."
            )
        return None

    def _fetch_checkpoint(self, folder: str, manifest: bytes, aside: Path) -> str | None:
        """Write a checkpoint aside; None if it is whole, else what is wrong."""
        CheckpointFolder(aside).trainer.mkdir(parents=True)
        CheckpointFolder(aside).manifest.write_bytes(manifest)
        store, listed = RemoteFolder(f"{self.url}/{folder}"), _listed(manifest)
        store.get([name for name in store.files() if name in listed], aside)
        return verify(aside)

    # Writing -----------------------------------------------------------------------------------------

    def write(self, name: str, everything: bool = False) -> None:
        """Copy a checkpoint of the run, unless it is there; then remove those there that are gone here.

        everything: and all else that is in the run folder.
        """
        rest = [path for path in self.run.rglob("*") if path.is_file()] if everything else []
        names = [path.relative_to(self.run) for path in rest]
        kept = [path for path in names if path.parts[0] not in _STAYS and not _is_hidden(path)]
        with_each = [each for each in _WITH_EACH if (self.run / each).exists()]
        self._store.put(self.run, [*with_each, *(str(path) for path in kept if str(path) not in _WITH_EACH)])
        folder = f"checkpoints/{name}"
        manifest = (self.run / _manifest(folder)).read_bytes()
        if (before := self._store.read(_manifest(folder))) != manifest:
            have = json.loads(before)["files"] if before else {}
            files = json.loads(manifest)["files"].items()
            new = [f"{folder}/{file}" for file, facts in files if have.get(file) != facts]
            self._store.put(self.run, new)
            self._store.put(self.run, [_manifest(folder)])
        self._remove_old(name)

    def _remove_old(self, newest: str) -> None:
        here = {path.name for path in list_checkpoints(RunFolder(self.run).checkpoints)}
        for name in self._store.folders("checkpoints"):
            step = step_of(Path(name))
            # A newer one is another process's.
            if step is not None and step < step_of(Path(newest)) and name not in here:
                self._store.remove(_manifest(f"checkpoints/{name}"))  # first: what is left is not whole
                self._store.remove(f"checkpoints/{name}")


def _manifest(folder: str) -> str:
    return f"{folder}/trainer/manifest.json"


def _listed(manifest: bytes) -> set[str]:
    try:
        return set(json.loads(manifest)["files"])
    except (ValueError, KeyError, TypeError):  # `verify` says so
        return set()


def _is_hidden(path: Path) -> bool:
    return any(part.startswith(".") for part in path.parts)


def _check_recipe(content: bytes | None, check: Callable[[Path, int], None], step: int) -> None:
    with TemporaryDirectory() as scratch:
        path = Path(scratch) / "recipe.yaml"
        if content is not None:
            path.write_bytes(content)
        check(path, step)


def main(arguments: list[str]) -> None:
    """Copy once: RUN COPY_TO CHECKPOINT [everything]. If it cannot, print why and exit with 2."""
    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)  # a scheduler sends them to all processes of a job
    run, copy_to, name, *everything = arguments
    try:
        RunCopy(Path(run), copy_to).write(name, bool(everything))
    except ValueError as error:
        print(error)
        sys.exit(2)
