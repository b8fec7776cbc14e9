"""`prepare` that is interrupted, killed or run twice at once, and prepared data that is damaged."""

import importlib
import multiprocessing
import os
import signal
import time
from collections.abc import Iterator
from dataclasses import replace
from multiprocessing.synchronize import Event

import pytest
from corpora import leftovers
from forks import server

from lrnn_lm.data import (
    DataError,
    DataSpec,
    open_prepared,
    prepare,
)


def test_damage_is_named(spec: DataSpec) -> None:
    prepared = prepare(spec, progress=False)
    shard = prepared.folder / "train-00001.tokens.bin"
    data = bytearray(shard.read_bytes())
    data[10] ^= 1
    shard.write_bytes(data)
    open_prepared(prepared.folder)  # sizes are right
    with pytest.raises(DataError, match=r"train-00001\.tokens\.bin: damaged .*sha256.*lrnn prepare"):
        open_prepared(prepared.folder, verify=True)
    shard.write_bytes(data[:-2])
    with pytest.raises(DataError, match=r"train-00001\.tokens\.bin: damaged \(\d+ bytes instead of \d+\)"):
        prepare(spec, progress=False)
    shard.unlink()
    with pytest.raises(DataError, match=r"train-00001\.tokens\.bin: cannot be read"):
        prepare(spec, progress=False)


def test_damaged_manifest_and_foreign_tokenizer(spec: DataSpec) -> None:
    prepared = prepare(spec, progress=False)
    path = prepared.tokenizer_dir / "tokenizer.json"
    path.write_text(path.read_text().replace('"recurrence"', '"recurrenxe"').replace('" the"', '" thx"'))
    with pytest.raises(DataError, match="did not make the shards"):
        open_prepared(prepared.folder)
    (prepared.folder / "manifest.json").write_text("{")
    with pytest.raises(DataError, match=r"manifest\.json: damaged"):
        open_prepared(prepared.folder)
    # It may be anybody's folder: no advice to remove it.
    with pytest.raises(DataError, match=r"no prepared data here \(manifest\.json is missing\)$"):
        open_prepared(prepared.folder.parent)


@pytest.mark.parametrize(
    ("module", "function"), [("tokenize", "fast_tokenizer"), ("prepare", "_write_manifest")]
)
def test_interrupt_leaves_nothing(
    spec: DataSpec, monkeypatch: pytest.MonkeyPatch, module: str, function: str
) -> None:
    def interrupt(*args: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(importlib.import_module(f"lrnn_lm.data.{module}"), function, interrupt)
        with pytest.raises(KeyboardInterrupt):
            prepare(replace(spec, num_proc=2), progress=False)
    assert leftovers(spec) == []
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    open_prepared(prepare(spec, progress=False).folder, verify=True)


def _prepare_slowly(spec: DataSpec, half_way: Event) -> None:
    signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored in what a script starts with "&"
    module = importlib.import_module("lrnn_lm.data.prepare")
    real = module._tagged_documents

    def slow(*args: object) -> Iterator[object]:
        for k, pair in enumerate(real(*args)):
            if k == 30:
                half_way.set()
                time.sleep(60)
            yield pair

    module._tagged_documents = slow
    prepare(spec, progress=False)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL, signal.SIGINT])
def test_killed_half_way(spec: DataSpec, number: signal.Signals) -> None:
    half_way = server().Event()
    process = server().Process(target=_prepare_slowly, args=(replace(spec, num_proc=2), half_way))
    process.start()
    assert half_way.wait(60)
    os.kill(process.pid, number)
    process.join(20)
    assert process.exitcode not in (None, 0)
    if number != signal.SIGKILL:
        assert leftovers(spec) == []
    open_prepared(prepare(spec, progress=False).folder, verify=True)
    assert leftovers(spec) == []


def _prepare_in_child(spec: DataSpec) -> None:
    open_prepared(prepare(spec, progress=False).folder, verify=True)
    os._exit(7)


def test_two_processes_at_once(spec: DataSpec) -> None:
    children = [
        multiprocessing.get_context("fork").Process(target=_prepare_in_child, args=(spec,)) for _ in range(3)
    ]
    for child in children:
        child.start()
    for child in children:
        child.join(timeout=60)
    assert [child.exitcode for child in children] == [7, 7, 7]
    assert leftovers(spec) == []
