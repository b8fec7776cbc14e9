"""`train.cuda_graphs`: passes that are recorded and replayed give the numbers of passes as they are."""

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch
from tiny_run import STEPS, fingerprint, losses, validations
from trainers import Build, send_at

from lrnn_lm.train import graphed
from lrnn_lm.train.loop import Trainer
from lrnn_lm.train.stop import Stopped

ON = "train.cuda_graphs=true"
HYBRID = "model.layer_pattern=[bd_lru, attention]"
KINDS = {
    "one pass a step": (),
    "four passes a step": ("train.micro_batch=2", "train.z_loss=1e-3"),
    "a last pass of fewer rows": ("train.micro_batch=3",),
    "averages, inspections and outliers": (
        "train.average={decay: 0.9}", "train.inspect_every=3", "train.guard={deviations: 1, window: 4}",
    ),
    "frozen weights": ("optim.groups=[{match: '*embed_tokens*', lr_scale: 0}]",),
}  # fmt: skip
GPU_KINDS = KINDS | {
    "hybrid, muon": (HYBRID, "optim.name=muon"),
    "matrix state": ("model.mixer={type: bd_matrix, num_heads: 2, head_dim: 16}",),
    "mamba2": ("model.mixer={type: mamba2}",),
}


def same_numbers(one: Trainer, other: Trainer) -> None:
    assert losses(one.folder) == losses(other.folder)
    assert validations(one.folder) == validations(other.folder)
    last = f"checkpoints/step-{STEPS:08d}"
    assert fingerprint(one.folder / last) == fingerprint(other.folder / last)


class Replayed:
    """Stands in for a CUDA graph on a CPU: what was recorded is called again, and written to its memory."""

    def __init__(self, passes: graphed.GraphedPasses):
        self.passes, self.replays = passes, 0

    def replay(self) -> None:
        self.replays += 1
        first, own = next((k[1] is None, r) for k, r in self.passes._recorded.items() if r.graph is self)
        for parameter, gradient in zip(self.passes._parameters, own.gradients, strict=True):
            parameter.grad = None if first else gradient
        own.result.copy_(self.passes._run(own.batch, own.num_items))
        for parameter, gradient in zip(self.passes._parameters, own.gradients, strict=True):
            if first and gradient is not None:
                gradient.copy_(parameter.grad)


@pytest.fixture
def record_on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[object]]:
    """Recordings on a CPU; yields how torch was told to treat waiting for the device, the newest last."""
    modes = [0]

    @contextmanager
    def record(graph: Replayed, _: object, pool: object, warm_up: Callable[[], None]) -> Iterator[None]:
        warm_up()
        before = [(p, p.grad, None if p.grad is None else p.grad.clone()) for p in graph.passes._parameters]
        yield
        for _, gradient, value in before:
            if gradient is not None:  # a recording adds nothing
                gradient.copy_(value)

    monkeypatch.setattr(graphed, "record", record)
    monkeypatch.setattr(graphed, "replay", lambda graph, _: graph.replay())
    for name in ("graph_pool_handle", "get_rng_state", "set_rng_state"):
        monkeypatch.setattr(torch.cuda, name, lambda *_: None)
    monkeypatch.setattr(torch.cuda, "get_sync_debug_mode", lambda: modes[-1])
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", modes.append)
    yield modes
    assert modes[-1] == 0


def recording(build: Build, monkeypatch: pytest.MonkeyPatch, *options: str) -> tuple[Trainer, list[Replayed]]:
    """A trainer that records on a CPU, and its graphs, which will be there once it has run."""
    trainer, graphs = build("name=recorded", ON, *options), []
    trainer.graphed.obstacle = None

    def graph() -> Replayed:
        graphs.append(Replayed(trainer.graphed))
        return graphs[-1]

    monkeypatch.setattr(torch.cuda, "CUDAGraph", graph)
    return trainer, graphs


@pytest.mark.parametrize("kind", KINDS)
def test_on_a_cpu(
    build: Build, kind: str, record_on_a_cpu: list[object], monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = build("name=plain", *KINDS[kind])
    plain.run()
    recorded, graphs = recording(build, monkeypatch, *KINDS[kind])
    recorded.run()
    same_numbers(plain, recorded)
    made, passes = {"four passes a step": (2, 4), "a last pass of fewer rows": (3, 3)}.get(kind, (1, 1))
    assert len(graphs) == made
    assert sum(graph.replays for graph in graphs) == passes * STEPS  # all


@pytest.mark.parametrize("call", [6, 7], ids=["warming up", "recording"])
def test_no_memory_for_a_steps_second_pass(
    build: Build, call: int, record_on_a_cpu: list[object], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first pass, recorded and replayed in calls 1 to 4, keeps its gradients, and no memory else."""
    kind = KINDS["four passes a step"]
    plain = build("name=plain", *kind)
    plain.run()
    recorded, graphs = recording(build, monkeypatch, *kind)
    run, calls, drawn = recorded.graphed._run, [], []

    def limited(batch: graphed.Batch, num_items: torch.Tensor) -> torch.Tensor:
        calls.append(batch)
        if len(calls) == call:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 GiB")
        return run(batch, num_items)

    recorded.graphed._run = limited
    monkeypatch.setattr(torch.cuda, "get_rng_state", lambda *_: "as it was")
    monkeypatch.setattr(torch.cuda, "set_rng_state", lambda state, _: drawn.append(state))
    with pytest.warns(UserWarning, match="without a CUDA graph: CUDA out of memory"):
        recorded.run()
    same_numbers(plain, recorded)
    assert [graph.replays for graph in graphs] == [1, 0]
    assert not recorded.graphed._recorded
    assert drawn == ["as it was"] * 2


def test_a_pass_that_would_wait_is_never_recorded(
    build: Build, record_on_a_cpu: list[object], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A recording that breaks off damages torch 2.11's allocator, so a pass is tried before."""
    plain = build("name=plain")
    plain.run()
    asked, graphs = recording(build, monkeypatch)
    run, tried = asked.graphed._run, []

    def waits(batch: graphed.Batch, num_items: torch.Tensor) -> torch.Tensor:
        tried.append(record_on_a_cpu[-1])
        if tried[-1] == "error":
            raise RuntimeError("called a synchronizing CUDA operation")
        return run(batch, num_items)

    asked.graphed._run = waits
    with pytest.warns(UserWarning, match="without a CUDA graph: called a synchronizing CUDA operation"):
        asked.run()
    same_numbers(plain, asked)
    assert tried == [0, "error", *[0] * STEPS]  # two to warm up, none in a recording
    assert [graph.replays for graph in graphs] == [0]


def test_turns_are_taken_on_the_device_of_the_weights(build: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    """Accelerate's `cuda` of one process and decoding's `cuda:0` are two keys to `turns`."""
    of, weights = build(ON), [torch.nn.Parameter(torch.zeros(1, device="meta"))]
    monkeypatch.setattr(of.accelerator.state, "device", torch.device("cuda"))
    passes = graphed.graphed_passes(of.recipe, of.accelerator, of._backward, weights)
    assert passes._device == weights[0].device


def test_without_a_gpu_passes_run_as_they_are(build: Build) -> None:
    plain, asked = build("name=plain"), build("name=asked", ON)
    plain.run()
    asked.run()
    same_numbers(plain, asked)
    assert "cpu" in asked.graphed.obstacle


@pytest.mark.gpu
@pytest.mark.parametrize("kind", GPU_KINDS)
def test_on_a_gpu(build: Build, kind: str) -> None:
    plain = build("name=plain", "train.device=cuda", *GPU_KINDS[kind])
    plain.run()
    recorded = build("name=recorded", "train.device=cuda", ON, *GPU_KINDS[kind])
    recorded.run()
    assert recorded.graphed.obstacle is None
    assert recorded.graphed._recorded
    same_numbers(plain, recorded)


@pytest.mark.gpu
def test_stopped_and_resumed(build: Build) -> None:
    """Compiled and under autocast; what is resumed has compiled and recorded anew."""
    options = ("train.device=cuda", ON, HYBRID, "train.compile=true", "train.micro_batch=4")
    whole = build("name=whole", *options)
    whole.run()
    torch.compiler.reset()
    first = build(*options)
    send_at(first, 7, signal.SIGTERM)
    with pytest.raises(Stopped):
        first.run()
    torch.compiler.reset()
    second = build(*options)
    second.run()
    assert second.graphed.obstacle is None
    same_numbers(whole, second)


@pytest.mark.gpu
def test_a_pass_that_waits_for_the_device_is_not_recorded(
    build: Build, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = build("name=plain", "train.device=cuda")
    plain.run()
    asked = build("name=asked", "train.device=cuda", ON)
    original = asked.graphed._run

    def waits(batch: graphed.Batch, num_items: torch.Tensor) -> torch.Tensor:
        assert num_items.item() > 0
        return original(batch, num_items)

    asked.graphed._run = waits
    with pytest.warns(UserWarning, match="training without a CUDA graph: .*synchronizing"):
        asked.run()
    same_numbers(plain, asked)
