"""In ranks that share rows: losses and gradients of small models against those of one rank."""

import json
import os
from contextlib import nullcontext
from datetime import timedelta
from functools import partial
from pathlib import Path

import torch
from long_rows import MIXERS, at_once, gradients, over_a_piece, rows
from small_models import MIXER_ROWS, small_model
from torch import Tensor, nn
from torch import distributed as dist

from lrnn_lm import LRNNForCausalLM
from lrnn_lm.train.segments import split
from lrnn_lm.train.sequence import SequenceParallel

T = 24
# Of 2 and of 4 ranks. Windows of 4 and 9 tokens reach over several pieces of 3.
SEGMENTS = {2: {"fp32": 4, "fp64": None}, 4: {"fp32": 3, "fp64": None}}
CASES = {
    "matrices, several states": [*MIXERS["bd_matrix-erase"], *MIXERS["lstm"]],
    "hybrid, long window": [MIXER_ROWS["bd_lru-all"], *MIXERS["attention-long-window"], MIXER_ROWS["h_lru"]],
    "hybrid, checkpointed": MIXERS["hybrid-window"],
    "hybrid, learnt start": MIXERS["hybrid-window"],
}


def cases(count: int) -> list[tuple[str, str]]:
    """(name, kind): four ranks have all, two pass on as four do."""
    if count == 2:
        return [("hybrid, long window", kind) for kind in SEGMENTS[count]]
    hybrids = [(name, kind) for name in CASES if "hybrid" in name for kind in SEGMENTS[count]]
    return [*hybrids, *((name, "fp32") for name in CASES if "hybrid" not in name)]


def model_of(name: str, fp64: bool) -> LRNNForCausalLM:
    """In fp64 with large weights, in fp32 a new one, as in test_train_segments.py."""
    model = small_model("bd_lru", layer_pattern=CASES[name], learn_initial_state="learnt" in name).train()
    if not fp64:
        torch.manual_seed(0)
        model = LRNNForCausalLM(model.config).train()
    with torch.no_grad():
        for block in model.model.layers:
            if block.initial_state is not None:
                block.initial_state.normal_()
    if "checkpointed" in name:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return model.double() if fp64 else model


def shared(model: nn.Module, sequence: SequenceParallel, batch: dict[str, Tensor]) -> Tensor:
    """The row's loss, and its gradients in the parameters, summed over ranks; validation's loss too."""
    forward = partial(over_a_piece, model)
    parts = split(sequence.own(batch), sequence.piece)
    found = sequence.evaluate(lambda part, carried: forward(part, carried, part["labels"]), parts, False).loss
    loss, _ = sequence.backward(
        forward,
        lambda part, carried: forward(part, carried, part["labels"]).loss,
        parts,
        lambda last: nullcontext(),
    )
    for summed in (loss, found, *(p.grad for p in model.parameters())):
        dist.all_reduce(summed)
    torch.testing.assert_close(found, loss)
    return loss


def compare(rank: int, count: int, port: int, out: Path) -> None:
    """In a rank: each case's largest relative error of the loss and of a parameter's gradient, by name."""
    torch.set_num_threads(1)
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    dist.init_process_group("gloo", rank=rank, world_size=count)
    errors = {}
    for name, kind in cases(count):
        model = model_of(name, kind == "fp64")
        place = (rank, count, torch.device("cpu"), timedelta(seconds=60))
        sequence = SequenceParallel(model.config, count, T, SEGMENTS[count][kind], *place)
        loss = shared(model, sequence, rows(T))
        got = gradients(model)
        if rank > 0:  # all have the same sums
            continue
        want_loss = at_once(model, rows(T))
        want = gradients(model)
        error = [float((loss - want_loss).abs() / want_loss)]
        error += [float((got[k] - value).norm() / value.norm()) for k, value in want.items()]
        errors[f"{kind} {name}"] = max(error)
    if rank == 0:
        out.write_text(json.dumps(errors))
    dist.destroy_process_group()
