"""docs/scaling.md: what it says is what its tables say; the formulas behave as they must."""

import importlib
import re
from pathlib import Path

import pytest

DOCS = Path(__file__).parents[1] / "docs"


@pytest.fixture(scope="module")
def scaling():
    return importlib.import_module("benchmarks.pages.scaling")


@pytest.fixture(scope="module")
def model():
    return importlib.import_module("benchmarks.pages.scaling_model")


def test_what_the_page_says_is_what_the_tables_say(scaling):
    """The findings beside the table they are read from: least efficiencies, and the step of the smallest."""
    text, table = scaling.findings(), scaling.efficiency_table()
    rows = [line.split(" | ") for line in table.splitlines()[2:]]
    upto = [row for row in rows if int(row[1]) <= 64]
    ddp = [row[7] for row in upto if "fit" not in row[7]]
    fsdp2 = [row[9] for row in upto]
    assert f"DDP keeps {min(ddp)} or more where it fits, FSDP2 {min(fsdp2)} or more" in text.replace(
        "\n  ", " "
    )
    (small,) = [row for row in rows if row[:2] == ["| 200M", "1024"]]
    step = float(small[5]) + float(small[6])
    told = float(re.search(r"([0-9.]+) ms a step", text.replace("\n  ", " ")).group(1))
    assert told == pytest.approx(step, abs=0.6)


def test_efficiency_of_what_was_measured(scaling):
    """Like for like where it was measured; over all steps a slow one counts by its time."""
    two = scaling.two_gpus
    steady = {"tokens_per_second": 100.0, "tokens_per_second_each": [1.0, 100.0, 100.0]}
    slow = {"tokens_per_second": 200.0, "tokens_per_second_each": [1.0, 200.0, 50.0]}
    found = two.efficiency({"one": steady, "ddp": slow, "fsdp2": slow})
    assert found["ddp"] == found["fsdp2"] == {"steady": 1.0, "all": pytest.approx(0.4)}
    bf16 = {**steady, "tokens_per_second": 125.0}
    found = two.efficiency({"one": steady, "one, residual in bf16": bf16, "ddp": slow, "fsdp2": slow})
    assert found["fsdp2, like for like"]["steady"] == pytest.approx(0.8)


def test_the_sizes_are_what_they_are_called(model):
    for size, parameters in zip(model.SIZES, (2e8, 1.3e9, 7e9), strict=True):
        assert model.costs(size).parameters == pytest.approx(parameters, rel=0.06)


def test_ddp_by_hand(model):
    """200M on 8 GPUs: 13 buckets of gradients, all but one of them behind the backward pass."""
    step = model.ddp(model.SIZES[0], 8)
    compute = 524_288 / 8 * 1_040_099_040 / 406e12
    one_bucket = 2 * 7 / 8 * (4 * 211_875_360 / 13) / 314e9 + 2 * 7e-6
    assert step.compute == pytest.approx(compute)
    assert step.exposed == pytest.approx(one_bucket)


def test_hsdp_by_hand(model):
    """7B on 64 GPUs: gathers within a node, gradients' shards summed between 8 nodes."""
    size, cost = model.SIZES[2], model.costs(model.SIZES[2])
    step, whole = model.hsdp(size, 64), model.fsdp2(size, 64)
    assert model.hsdp(size, 8) == model.fsdp2(size, 8)
    bus, ring = 314e9, 7e-6
    gather = 7 / 8 * 2 * (cost.parameters - cost.embeddings) / 21 / bus + ring
    front = 7 / 8 * 2 * cost.embeddings / bus + ring + gather
    between = 2 * 7 / 8 / 8 / bus, 2 * 3 * 5e-6  # of a byte of gradients, and the delay of three levels
    last = 7 / 8 * 4 * cost.embeddings / bus + ring + 4 * cost.embeddings * between[0] + between[1]
    block = 4 * (cost.parameters - cost.embeddings) / 21
    last += 7 / 8 * block / bus + ring + block * between[0] + between[1]
    assert step.exposed == pytest.approx(16 * (front + gather) + last)
    assert step.compute == whole.compute


@pytest.mark.parametrize("gpus", [8, 64, 1024])
def test_slower_networks_and_faster_gpus_scale_worse(model, monkeypatch, gpus):
    size = model.SIZES[1]
    before = model.ddp(size, gpus).efficiency, model.fsdp2(size, gpus).efficiency
    assert all(0 < efficiency < 1 for efficiency in before)
    for name, factor in (("bus_node", 0.1), ("bus_network", 0.1), ("compute_large", 2)):
        monkeypatch.setitem(model.PIECES[name], "value", model.piece(name) * factor)
    after = model.ddp(size, gpus).efficiency, model.fsdp2(size, gpus).efficiency
    assert all(worse < better for worse, better in zip(after, before, strict=True))


def test_what_bounds_a_save(model):
    """A shard each: the stall falls with every GPU, the write only until the file system is busy."""
    saves = [model.checkpoint(model.SIZES[2], gpus, sharded=True) for gpus in (8, 64, 1024)]
    assert saves[0].stall == pytest.approx(8 * saves[1].stall)
    assert saves[1].stall == pytest.approx(16 * saves[2].stall)
    assert saves[2].background >= saves[2].bytes / model.piece("write_all")
    assert model.checkpoint(model.SIZES[2], 64, sharded=False).stall == pytest.approx(64 * saves[1].stall)
