"""Backpropagation by segments against that of whole rows: gradients, memory, and runs of the trainer.

On several ranks, and resumed: test_train_carry.py.
"""

from contextlib import nullcontext
from functools import partial
from pathlib import Path

import pytest
import torch
from long_rows import MIXERS, at_once, gradients, over_a_piece, rows
from small_models import small_model, tokens
from tiny_run import losses, validations
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter
from trainers import Build, refused_before_data

from lrnn_lm import LRNNForCausalLM
from lrnn_lm.model import layers
from lrnn_lm.model.carried import CarriedStates, mix_carried
from lrnn_lm.train.segments import backward_by_segments, evaluate_by_segments, split


def by_segments(model: nn.Module, batch: dict[str, Tensor], segment: int) -> Tensor:
    forward = partial(over_a_piece, model)
    loss, _ = backward_by_segments(
        forward,
        lambda part, carried: forward(part, carried, part["labels"]).loss,
        model.config,
        split(batch, segment),
        lambda last: nullcontext(),
    )
    return loss


def check(model: nn.Module, batch: dict[str, Tensor], tolerance: float, segments=(4, 12)) -> None:
    """Loss and each parameter's gradient, by the norm of the difference over the norm."""
    loss = at_once(model, batch)
    want = gradients(model)
    for segment in segments:
        got_loss = by_segments(model, batch, segment)
        assert float((got_loss - loss).abs() / loss) < tolerance
        for key, got in gradients(model).items():
            assert float((got - want[key]).norm() / want[key].norm()) < tolerance, (key, segment)


USUAL = ("bd_lru-all", "h_lru", "bd_matrix-erase", "lstm", "mamba2", "attention-window", "hybrid-window")


@pytest.mark.parametrize(
    "name", [*USUAL, *(pytest.param(name, marks=pytest.mark.slow) for name in MIXERS if name not in USUAL)]
)
def test_the_gradient_is_that_of_the_whole_row(name: str) -> None:
    """In fp64 with large weights; in fp32 with a new model's: large ones amplify rounding a hundredfold."""
    model = small_model("bd_lru", layer_pattern=MIXERS[name]).double().train()
    check(model, rows(), 1e-12, segments=(6,))
    check(model, rows(resets=False), 1e-12, segments=(8,))
    torch.manual_seed(0)
    check(LRNNForCausalLM(model.config).train(), rows(), 1e-6, segments=(4,))  # of the most boundaries


@pytest.mark.parametrize("name", ["bd_lru-all", "lstm", "hybrid-window"])
def test_a_learnt_initial_state_has_the_gradient_of_the_whole_row(name: str) -> None:
    """Of documents that start in any segment, and of rows that begin no document."""
    model = small_model("bd_lru", layer_pattern=MIXERS[name], learn_initial_state=True).double().train()
    with torch.no_grad():
        for block in model.model.layers:
            if block.initial_state is not None:
                block.initial_state.normal_()
    check(model, rows(), 1e-12)


def test_layers_are_recomputed_within_a_segment(monkeypatch: pytest.MonkeyPatch) -> None:
    model = small_model("bd_lru", layer_pattern=MIXERS["hybrid-window"]).double().train()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    calls = []
    monkeypatch.setattr(layers, "mix_carried", lambda *given: calls.append(1) or mix_carried(*given))
    check(model, rows(), 1e-12, segments=(8,))
    assert len(calls) == 3 * (2 + 3 + 3)  # layers, of 3 segments: no graph for 2, then each twice


def test_compiled_blocks_are_compiled_once_for_all_segments() -> None:
    """States are arguments of a block: where in its row a segment lies makes no graph of its own."""
    torch.compiler.reset()
    model = small_model("bd_lru", layer_pattern=MIXERS["hybrid-window"][:1]).double().train()
    counter = CompileCounter()
    for block in model.model.layers:
        block.compile(dynamic=False, backend=counter)
    frames = []
    with torch._dynamo.config.patch(recompile_limit=64):
        for length in (12, 24):
            by_segments(model, rows(24) if length == 24 else halved(rows(24)), 4)
            frames.append(counter.frame_count)
    torch.compiler.reset()
    assert frames == [4, 4]  # with and without gradients, with and without a state


def halved(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    return {key: value[:, : value.shape[1] // 2] for key, value in batch.items()}


def peak_bytes(model: nn.Module, length: int, segment: int) -> int:
    """The most bytes of tensors that are held at once for the backward pass, and by boundaries."""
    held: dict[int, int] = {}
    peak = 0

    class Saved:
        def __init__(self, tensor: Tensor):
            nonlocal peak
            self.tensor = tensor
            held[id(self)] = tensor.nbytes
            peak = max(peak, sum(held.values()))

        def __del__(self) -> None:
            held.pop(id(self), None)

    with torch.autograd.graph.saved_tensors_hooks(Saved, lambda saved: saved.tensor):
        by_segments(model, rows(length), segment)
    return peak


def test_memory_does_not_grow_with_the_row() -> None:
    """What is saved for backward passes is that of one segment; a boundary holds the states alone."""
    model = small_model("bd_lru", layer_pattern=MIXERS["hybrid-window"]).train()
    short, long = (peak_bytes(model, length, 8) for length in (32, 128))
    assert 0 < long <= short < peak_bytes(model, 128, 128) / 8
    states = CarriedStates(model.config)
    with torch.no_grad():
        model(input_ids=tokens(3, 128), past_key_values=states, return_logits=False)
    kept = [state for layer in states.boundary().layers for state in layer]
    assert all(state.untyped_storage().nbytes() == state.nbytes for state in kept)
    assert sum(state[0].numel() for state in kept) == sum(
        layer.mixer.state_elements(128) for layer in model.model.layers
    )


def test_validation_by_segments_is_that_of_whole_rows() -> None:
    model = small_model("bd_lru", layer_pattern=MIXERS["hybrid-window"]).double().eval()
    batch = rows()

    def forward(part, carried=None):
        more = {} if carried is None else {"past_key_values": carried}
        return model(
            input_ids=part["input_ids"], reset=part["reset"], shift_labels=part["labels"],
            num_items_in_batch=1.0, return_logits=True, use_cache=False, **more,
        )  # fmt: skip

    with torch.no_grad():
        whole = forward(batch)
    parts = evaluate_by_segments(forward, model.config, split(batch, 8), True)
    torch.testing.assert_close(parts.logits, whole.logits, rtol=0, atol=1e-12)
    torch.testing.assert_close(parts.loss, whole.loss, rtol=1e-12, atol=0)


# The trainer -----------------------------------------------------------------------------------------


def test_a_run_by_segments_is_that_of_whole_rows(build: Build) -> None:
    """In fp64, accumulated over unequal micro-batches, with validation, inspection and a curriculum."""
    options = (
        "train.micro_batch=3", "train.z_loss=0.01", "train.inspect_every=2", "train.tokens=3072",
        "eval.every=3 steps", "data.curriculum=[{length: 16, steps: 1}, {length: 40, steps: 2}]",
    )  # fmt: skip
    ended = {}
    for name, segment in (("whole", "null"), ("parts", "16")):
        trainer = build(f"name={name}", f"train.segment={segment}", *options)
        trainer.bare_model.double()
        trainer.run()
        ended[name] = trainer
    weights = [torch.cat([p.detach().flatten() for p in t.bare_model.parameters()]) for t in ended.values()]
    assert float((weights[0] - weights[1]).norm() / weights[0].norm()) < 1e-9
    for read in (losses, validations):
        whole, parts = (read(trainer.folder) for trainer in ended.values())
        assert parts == [(step, pytest.approx(loss, rel=1e-6)) for step, loss in whole] != []


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (("train.segment=65",), ("train.segment 65", "above", "64")),
        (("train.segment=48",), ("train.segment 48", "divide", "64")),
        (("train.segment=0",), ("train.segment",)),
        (("train.segment=16", "model.mixer={type: attention}"), ("attention", "window", "tokens before")),
        (("train.segment=16", "model.layer_pattern=[bd_lru, attention]"), ("attention", "window")),
        (("train.segment=16", "model.layer_pattern=[bd_lru, gla]"), ("gla", "gradients")),
    ],
    ids=lambda value: value[0] if isinstance(value, tuple) else "",
)
def test_what_cannot_be_is_said_before_data_is_prepared(
    recipe: Path, overrides: tuple[str, ...], words: tuple[str, ...], capsys: pytest.CaptureFixture
) -> None:
    refused_before_data(recipe, overrides, words, capsys)
