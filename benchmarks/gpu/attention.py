"""Attention by blocks on a GPU: against a mask and fp64, then its time and memory.

    python -m benchmarks.gpu.attention [out.json]        # about a minute on one H100, most of it compiling

A case is one layer of a model: full attention, a window, packed documents, both, padding too. By blocks
its outputs and all gradients may be twice as far from fp64 as with a mask. The exit code is 1 where they are
further, where a window of 1,024 is not twice as fast as full attention at T 32,768, and where packed rows
need more memory there than as many tokens at T 2,048. Every case is compiled in a process of its own, all at
once; times are measured after that, with the block compiled as in training.
"""

import copy
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask

from lrnn_lm import LRNNConfig, LRNNModel
from lrnn_lm.mixers import SequenceContext
from lrnn_lm.model import modeling

from .. import measure
from .matrix_scan import milliseconds

DEVICE = "cuda"
TOKENS, LENGTHS, WINDOW = 32_768, (4096, 32_768), 1024  # of what is timed
KINDS = ("full", "window", "packed", "window packed")
CHECKED = [
    (kind, dtype) for kind in (*KINDS[1:], "window packed padded") for dtype in ("float32", "bfloat16")
]


def layer(kind: str, window: int, **sizes: int) -> LRNNModel:
    """A model of one layer, with next to nothing but attention."""
    torch.manual_seed(0)
    options = {"type": "attention", "qk_norm": True, **sizes, "window": window if "window" in kind else None}
    width = options["num_heads"] * 64
    config = LRNNConfig(
        vocab_size=64,
        hidden_size=width,
        num_hidden_layers=1,
        intermediate_size=64,
        mixer=options,
        initializer_range=0.1,
        use_cache=False,
    )
    return LRNNModel(config).to(DEVICE).train()


def batch(kind: str, B: int, T: int, width: int) -> dict[str, Tensor]:
    """Inputs, documents of 300 tokens on average, and padding in front of, within and after the tokens."""
    generator = torch.Generator().manual_seed(T)
    given = {"inputs_embeds": torch.randn(B, T, width, generator=generator)}
    if "packed" in kind:
        given["reset"] = torch.rand(B, T, generator=generator) < 1 / 300
    if "padded" in kind:
        mask = torch.ones(B, T, dtype=torch.long)
        mask[0, :200] = mask[0, 700:705] = mask[1, -400:] = 0
        given["attention_mask"] = mask
    return {key: value.to(DEVICE) for key, value in given.items()}


def results(model: LRNNModel, given: dict[str, Tensor]) -> list[Tensor]:
    """Outputs on tokens, and the gradients of inputs and parameters."""
    x = given["inputs_embeds"].to(model.dtype).requires_grad_()
    y = model(**{**given, "inputs_embeds": x}).last_hidden_state
    if "attention_mask" in given:
        y = y * given["attention_mask"].unsqueeze(-1)
    weights = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(y)
    return [y.detach(), *torch.autograd.grad((y * weights).sum(), [x, *model.layers.parameters()])]


def check(kind: str, dtype: str) -> bool:
    """Whether attention by blocks is as close to fp64 as the mask, and a second run has the same bits.

    The length is no multiple of a block.
    """
    model = layer(kind, 300, num_heads=4, num_kv_heads=2).to(getattr(torch, dtype))
    given = batch(kind, 2, 4200, model.config.hidden_size)
    contexts: list[SequenceContext] = []
    hook = model.layers[0].register_forward_pre_hook(lambda _, inputs: contexts.append(inputs[1]))
    got, again = results(model, given), results(model, given)
    hook.remove()
    seen = contexts[0].window_mask if "window" in kind else contexts[0].attention_mask
    assert isinstance(seen, BlockMask), "attention did not go by blocks"
    with mock.patch.object(modeling, "takes_blocks", return_value=False):
        plain, exact = results(model, given), results(copy.deepcopy(model).double(), given)
    ours, masks = (
        [float((x.double() - want).norm() / want.norm()) for x, want in zip(found, exact, strict=True)]
        for found in (got, plain)
    )
    same = all(map(torch.equal, got, again))
    right = all(a <= 2 * b + 1e-6 for a, b in zip(ours, masks, strict=True))  # false of NaN
    verdict = f"{'ok' if right else 'WRONG'}; largest error {max(ours):.1e}, with a mask {max(masks):.1e}"
    print(f"{kind} {dtype}: {verdict}; same bits twice: {same}")
    return right and same


def clock(kind: str, T: int) -> dict[str, Any]:
    """Milliseconds and peak bytes of forward and backward passes under bf16 autocast, 12 heads of 64."""
    model = layer(kind, WINDOW, num_heads=12)
    given = batch(kind, TOKENS // T, T, model.config.hidden_size)
    model.layers[0].compile(dynamic=False)

    def step() -> None:
        with torch.autocast(DEVICE, torch.bfloat16):
            model(**given).last_hidden_state.float().mean().backward()

    step()
    model.zero_grad(set_to_none=False)
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    step()
    peak = torch.cuda.max_memory_allocated() - before
    return {"kind": kind, "B": TOKENS // T, "T": T, "ms": milliseconds(step), "peak_bytes": peak}


def run_alone(case: tuple[str, ...]) -> bool:
    """Whether a case succeeds in a process of its own; what that said is printed."""
    command = [sys.executable, "-m", "benchmarks.gpu.attention", "case", *map(str, case)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        print(
            f"{case}: FAILED with exit code {done.returncode}\n{done.stdout}{done.stderr[-3000:]}", flush=True
        )
    elif done.stdout:
        print(done.stdout.strip(), flush=True)
    return done.returncode == 0


def main() -> int:
    if sys.argv[1:2] == ["case"]:
        kind, value = sys.argv[2:]
        if value.isdigit():  # only to compile it
            return 0 if clock(kind, int(value)) else 1
        return 0 if check(kind, value) else 1
    timed = [(kind, T) for kind in KINDS for T in LENGTHS]
    with ThreadPoolExecutor(8) as pool:
        right = list(pool.map(run_alone, [*CHECKED, *timed]))
    if not all(right):
        return 1
    rows = {case: clock(*case) for case in timed}
    for row in rows.values():
        print(
            f"{row['kind']:14} T {row['T']:6} {row['ms']:8.2f} ms {row['peak_bytes'] / 1e6:8.0f} MB",
            flush=True,
        )
    short, long = LENGTHS
    speed = rows["full", long]["ms"] / rows["window", long]["ms"]
    memory = rows["packed", long]["peak_bytes"] / rows["packed", short]["peak_bytes"]
    print(f"T {long}: a window is {speed:.1f} times as fast; packed memory {memory:.2f} of T {short}'s")
    if len(sys.argv) > 1:
        about = measure.describe(torch.device(DEVICE))
        measure.write_json(Path(sys.argv[1]), {"about": about, "rows": list(rows.values())})
    return 0 if speed >= 2 and memory <= 1.1 else 1


if __name__ == "__main__":
    sys.exit(main())
