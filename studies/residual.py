"""Does a residual stream in bf16 raise the loss? Small models on prepared text, each seed in both dtypes.

    lrnn prepare RECIPE                       # prints the folder DATA
    python -m studies.residual DATA --seeds 0,1,2,3 > residual.jsonl

Both see the same rows from the same initial weights, under bf16 autocast. One line per run: mean loss of the
last 50 steps, and loss of held-out text.
"""

import argparse
import json
import math
from pathlib import Path

import torch

from lrnn_lm import LRNNConfig, LRNNForCausalLM
from lrnn_lm.data import PreparedData, TrainLoader, open_prepared, validation_batches
from lrnn_lm.files import pick_device

LENGTH, ROWS, WARMUP, HELDOUT = 256, 16, 30, 150_000
BLOCKS = {"type": "bd_lru", "num_blocks": 32, "block_size": 4}


def train(
    data: PreparedData, seed: int, in_fp32: bool, steps: int, lr: float, device: str
) -> dict[str, float]:
    """One run's losses, in nats a token."""
    torch.manual_seed(seed)
    model = LRNNForCausalLM(LRNNConfig(
        vocab_size=data.vocab_size, hidden_size=128, num_hidden_layers=6, intermediate_size=344, mixer=BLOCKS,
        residual_in_fp32=in_fp32,
    )).to(device)  # fmt: skip

    def loss_of(batch: dict[str, torch.Tensor]) -> torch.Tensor:
        ids, reset, labels = (batch[key].to(device) for key in ("input_ids", "reset", "labels"))
        with torch.autocast(device, torch.bfloat16):
            return model(ids, reset=reset, shift_labels=labels, return_logits=False, use_cache=False).loss

    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.95), weight_decay=0.1)
    rows, losses = iter(TrainLoader(data.train, LENGTH, seed, ROWS, ROWS)), []
    for step in range(steps):
        decay = 0.5 * (1 + math.cos(math.pi * max(0, step - WARMUP) / (steps - WARMUP)))
        for group in optimizer.param_groups:
            group["lr"] = lr * min(1, (step + 1) / WARMUP) * decay
        loss = loss_of(next(rows)[0])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    model.eval()
    nats = targets = 0.0
    with torch.no_grad():
        for batch in validation_batches(data.validation, LENGTH, ROWS, HELDOUT):
            count = int((batch["labels"] >= 0).sum())
            nats, targets = nats + count * float(loss_of(batch)), targets + count
    return {"validation": nats / targets, "train_last50": sum(losses[-50:]) / len(losses[-50:])}


def main() -> None:
    """Runs of every seed in fp32 and in bf16."""
    parser = argparse.ArgumentParser(prog="python -m studies.residual")
    parser.add_argument("data", type=Path, help="a folder that `lrnn prepare` wrote")
    parser.add_argument("--seeds", default="0,1,2,3")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    given = parser.parse_args()
    try:
        pick_device(given.device)
        if given.steps <= WARMUP:
            raise ValueError(f"--steps {given.steps}: takes more than the {WARMUP} of the warm-up")
        data, seeds = open_prepared(given.data), [int(seed) for seed in given.seeds.split(",")]
    except ValueError as error:
        parser.error(str(error))
    for seed in seeds:
        for kind in ("fp32", "bf16"):
            found = train(data, seed, kind == "fp32", given.steps, given.lr, given.device)
            print(json.dumps({"kind": kind, "seed": seed, **found}), flush=True)


if __name__ == "__main__":
    main()
