"""A checkpoint far beyond its training length: `lrnn eval CHECKPOINT --length 16x`.

    by position   loss and accuracy along long rows, in bins that grow with the position
    states        root mean square of each recurrent layer's state, by position
    memory        how far back a change of one input token still moves the output: total variation between the
                  distributions at the last position with and without the change, d tokens before it
    transitions   eigenvalues and absolute row sums of A_t, of each layer that has such matrices

Rows are new ones of the run's synthetic task at the given length, or the run's held-out documents in a row.
No state is reset within a row.

Legend: b rows, N length in tokens, V vocabulary.
"""

import copy
import math
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from ...data import SyntheticTask
from ...model.cache import CACHE
from ...model.decoding.long_input import prefill
from ...runs.layout import RunFolder
from ...runs.load import CheckpointInfo, context_length, describe, load_checkpoint
from ..show import (
    check_at_least,
    check_output,
    decimal,
    print_table,
    print_written,
    table_console,
    write_json,
)
from ..tasks.heldout import heldout_path
from ..tasks.synthetic import run_source
from ..text import documents_of, in_name, other_text, stem_of
from .recall import PIECE_LOGITS, doublings, text_rows
from .transitions import mixer_inputs, transitions

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

BINS = 4  # an octave
MEMORY_LENGTHS = 64  # memory is probed up to this many training lengths
MOVED = 0.01  # a change that moves the output by more than this total variation counts as remembered


def probe_length(
    checkpoint: str | Path,
    length: str = "16x",
    *,
    rows: int = 16,
    data: Path | None = None,
    output: Path | None = None,
    device: str = "auto",
    seed: int = 0,
    trust_remote_code: bool = False,
) -> dict[str, Any]:
    """Probe a checkpoint at rows of `length`, print a table, write JSON and a picture; returns the facts.

    length: `16x` the training length, or a number of tokens. rows: b. data: held-out documents (JSONL), for
    a checkpoint outside a run. output: a folder (default: eval/ and plots/ of the run). trust_remote_code:
    let the checkpoint's folder run its own code.

    Raises ValueError for a malformed length, or one that exceeds the model's positions or the text.
    """
    from .length_plot import draw_length

    info = describe(checkpoint)
    check_output(info.results(output))
    check_at_least(1, rows=rows)
    model, tokenizer = load_checkpoint(info.path, device, trust_remote_code=trust_remote_code)
    trained = context_length(model, info.run)
    N = parse_length(length, trained)
    if model.config.model_type != "lrnn" and trained < N:  # ours take any length
        raise ValueError(f"{N} tokens are longer than this {model.config.model_type} takes: {trained}")
    inputs, labels = _rows(info, model, tokenizer, N, rows, data, seed)
    symbols = inputs[:, 1:].unique() if run_source(info.path) and data is None else None
    with torch.no_grad(), mixer_inputs(model) as seen:
        bins, states = _by_position(model, inputs, labels, trained)
        matrices = transitions(model, seen)
        memory = _memory(model, inputs[:4, : min(N, MEMORY_LENGTHS * trained)], seed, symbols)
    asked = {"length": N, "rows": len(inputs), "seed": seed}  # rows: fewer where the text ends
    facts = {
        "checkpoint": {"path": str(info.path), "step": info.step},
        "settings": asked | {"trained": trained, "device": str(model.device)},
        "by_position": bins,
        "states": states,
        "memory": memory,
        "effective_memory": max((m["distance"] for m in memory if m["moved"] > MOVED), default=0),
        "transitions": matrices,
    }
    _show(facts)
    written = []
    if (folder := info.results(output)) is not None:
        plots = folder if output is not None else RunFolder(info.run).plots
        text = in_name(other_text(info, documents_of(info, data)))
        name = stem_of(info, output, f"length-{N}{text}")
        written = [folder / f"{name}.json", plots / f"{name}.png"]
        write_json(facts, written[0])
        draw_length(facts, written[1])
    print_written(written)
    return facts


def parse_length(text: str, trained: int) -> int:
    """Tokens from `16x` (training lengths) or `4096`; ValueError if it is neither, or below 2 tokens."""
    number = text.strip().lower()
    try:
        N = round(float(number[:-1]) * trained) if number.endswith("x") else int(number.replace("_", ""))
    except (ValueError, OverflowError):
        raise ValueError(
            f"length {text!r}: give training lengths, as in 16x, or tokens, as in 4096"
        ) from None
    if N < 2:
        raise ValueError(f"length {text!r} is {N} tokens; expected at least 2")
    return N


def _rows(
    info: CheckpointInfo,
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    N: int,
    rows: int,
    data: Path | None,
    seed: int,
) -> tuple[Tensor, Tensor]:
    """Inputs and labels (b, N) on the CPU: of the run's synthetic task, or of held-out text."""
    source = run_source(info.path)
    if source and data is None:
        task = SyntheticTask(source["task"], N, source["options"])
        inputs, labels = task.rows(seed, "length", np.arange(rows))
        return torch.from_numpy(inputs), torch.from_numpy(labels)
    return text_rows(model, tokenizer, heldout_path(data, info.path), rows, N)


def bin_edges(N: int, trained: int | None = None) -> list[int]:
    """Edges from 0 to N, about BINS an octave, with the training length and its doublings among them."""
    grid = {min(N, round(2 ** (i / BINS))) for i in range(BINS * math.ceil(math.log2(N)) + 1)}
    return [0, *sorted(grid.union([N], doublings(trained, N) if trained else []))]


def _by_position(
    model: "PreTrainedModel", inputs: Tensor, labels: Tensor, trained: int | None = None
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Loss and accuracy in each bin of positions, and the states' norms at its end.

    Rows are read in pieces through the cache, so that memory does not grow with N.
    """
    b, N = inputs.shape
    piece = max(1, PIECE_LOGITS // (b * model.config.vocab_size))
    cache: Any = None
    bins, states = [], []
    for first, last in pairwise(bin_edges(N, trained)):
        sums = np.zeros(3)  # nats, hits, targets
        for start in range(first, last, piece):
            part = slice(start, min(start + piece, last))
            outputs = model(inputs[:, part].to(model.device), use_cache=True, **{CACHE: cache})
            cache = getattr(outputs, CACHE)
            target = labels[:, part].to(model.device)
            valid = target >= 0
            logits = outputs.logits.float()
            loss = torch.nn.functional.cross_entropy(
                logits.transpose(1, 2), target.where(valid, -100), ignore_index=-100, reduction="sum"
            )
            hits = (logits.argmax(dim=-1) == target) & valid
            sums += [float(loss), int(hits.sum()), int(valid.sum())]
        count = sums[2]
        bins.append({
            "from": first, "to": last, "targets": int(count),
            "loss": float(sums[0] / count) if count else None,
            "accuracy": float(sums[1] / count) if count else None,
        })  # fmt: skip
        states.append({"position": last, "rms": _state_norms(model, cache)})
    return bins, states


def _state_norms(model: "PreTrainedModel", cache: Any) -> dict[str, float]:
    """Root mean square of each recurrent layer's state, by layer; empty for others' models."""
    if model.config.model_type != "lrnn":
        return {}
    from ...model.cache import layer_state

    found = {}
    for layer in range(len(model.config.layer_types)):
        state = layer_state(cache, layer)
        if isinstance(state, Tensor):
            found[str(layer)] = float(state.float().square().mean().sqrt())
    return found


def _memory(
    model: "PreTrainedModel", inputs: Tensor, seed: int, symbols: Tensor | None = None
) -> list[dict[str, float]]:
    """Total variation at the last position after a change d tokens before it, mean over rows.

    The token there becomes any other of `symbols` (sorted; None: the vocabulary). The part before the change
    is read once for all distances and the part after it once for each: about 7 N tokens in all, as the
    distances grow by a constant factor.
    """
    b, N = inputs.shape
    distances = sorted({N - 1, *(edge for edge in bin_edges(N)[:-1])})
    if symbols is None or len(symbols) < 2:
        symbols = torch.arange(model.config.vocab_size)
    shifts = torch.randint(
        1, len(symbols), (b, len(distances)), generator=torch.Generator().manual_seed(seed)
    )
    ends: list[Tensor] = []
    cache: Any = None
    read = 0
    for i, distance in reversed(list(enumerate(distances))):
        place = N - 1 - distance
        if place > read:
            cache = getattr(prefill(model, inputs[:, read:place], past_key_values=cache), CACHE)
            read = place
        rest = inputs[:, place:].clone()
        # A start symbol is not among them; then any place will do.
        index = torch.searchsorted(symbols, rest[:, 0].contiguous())
        rest[:, 0] = symbols[(index + shifts[:, i]) % len(symbols)]
        ends.append(_last_distribution(model, rest, copy.deepcopy(cache)))
    plain = _last_distribution(model, inputs[:, read:], cache)
    moved = [float((end - plain).abs().sum(dim=-1).mean() / 2) for end in reversed(ends)]
    return [{"distance": d, "moved": value} for d, value in zip(distances, moved, strict=True)]


def _last_distribution(model: "PreTrainedModel", inputs: Tensor, cache: Any) -> Tensor:
    """Distribution (b, V) in fp32 of the token after inputs (b, T), which follow what the cache holds."""
    logits = prefill(model, inputs, past_key_values=cache).logits
    return logits[:, -1].float().softmax(dim=-1)


def by_multiple(facts: dict[str, Any]) -> list[tuple[str, float | None, float | None]]:
    """(positions, loss, accuracy) between successive doublings of the training length."""
    N, trained = facts["settings"]["length"], facts["settings"]["trained"]
    rows = []
    for low, high in pairwise([0, *doublings(trained, N), N]):
        inside = [bin for bin in facts["by_position"] if low < bin["to"] <= high and bin["targets"]]
        count = sum(bin["targets"] for bin in inside)
        if count:
            loss = sum(bin["loss"] * bin["targets"] for bin in inside) / count
            hits = sum(bin["accuracy"] * bin["targets"] for bin in inside) / count
            rows.append((f"{low + 1:,} - {high:,}", loss, hits))
    return rows


def _show(facts: dict[str, Any]) -> None:
    console = table_console()
    settings = facts["settings"]
    title = f"{Path(facts['checkpoint']['path']).name}, trained at {settings['trained']:,} tokens"
    title += f"; {settings['rows']} rows of {settings['length']:,}"
    rows = [(places, decimal(loss), decimal(accuracy)) for places, loss, accuracy in by_multiple(facts)]
    print_table(["positions", "loss", "accuracy"], rows, left=0, title=title)
    probed = facts["memory"][-1]["distance"]
    console.print(f"effective memory: {facts['effective_memory']:,} tokens, of {probed:,} probed")
    for layer in facts["transitions"]:
        if not layer["finite"]:
            console.print(f"layer {layer['layer']}: no A_t is finite")
            continue
        radius, sums = layer["spectral_radius"], layer["row_sum"]
        console.print(
            f"layer {layer['layer']}: spectral radius of A_t {radius['50%']:.3f} (median), "
            f"{radius['max']:.3f} (largest); row sums up to {sums['max']:.3f}; "
            f"{layer['complex_share']:.0%} of eigenvalues complex"
        )
