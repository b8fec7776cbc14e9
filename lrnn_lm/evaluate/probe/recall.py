"""Where a model's loss comes from: `lrnn eval CHECKPOINT.. --recall`, several checkpoints side by side.

    n-gram hits   loss of the tokens that complete an n-gram seen earlier in the same row, against all others
                  (the split of Zoology, arXiv 2312.04927): what a model with perfect memory could copy
    distance      the same for bigrams, by the distance to the last occurrence
    position      loss by position in the row
    frequency     loss by how often the target occurs in the whole held-out text
    gates         of each BD-LRU layer: half-life, share of rows with one gate above 0.99, share of A_t off
                  its diagonal; and the loss when every A_t is cut down to its diagonal

Rows are held-out documents, one after the other, each row read from an empty state.

Legend: b rows, T tokens a row, V vocabulary.
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ...data.pack import IGNORED
from ...runs.load import context_length, describe, document_start, load_checkpoint
from ..compare import checkpoint_names
from ..reporting.plot import colour, name_curves, picture, tidy
from ..show import (
    check_at_least,
    check_output,
    decimal,
    print_table,
    print_written,
    table_console,
    write_json,
)
from ..tasks.heldout import heldout_path, read_documents
from ..text import free_stem, in_name, other_text
from .transitions import mixer_inputs

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

LONGEST = 4  # longer n-grams count as this long
DISTANCES = (1, 4, 16, 64, 256, 1024, 4096)  # lower edges of the bins of distances, in tokens
PIECE_LOGITS = 2**25  # logits in memory at once: 128 MiB in fp32
SATURATED = 0.99  # a gate above this share of its row
ROWS_OF_GATES = 4096  # tokens of a layer whose gates are measured


def probe_recall(
    checkpoints: Sequence[str | Path],
    *,
    rows: int = 64,
    data: Path | None = None,
    output: Path | None = None,
    device: str = "auto",
    trust_remote_code: bool = False,
) -> list[dict[str, Any]]:
    """Split each checkpoint's held-out loss; print a table, write JSON and a picture; returns the facts.

    All checkpoints read the same documents, each with its own tokenizer and in rows of its training length.
    rows: maximum number of rows. data: held-out documents (JSONL; default: those of the first checkpoint's
    run). output: a folder (default: eval/ of the first checkpoint's run). trust_remote_code: let the
    checkpoints' folders run their own code.

    Raises ValueError if there is no held-out text, or too little for a row.
    """
    check_at_least(1, rows=rows)
    names = checkpoint_names(checkpoints)
    first = describe(checkpoints[0])
    check_output(first.results(output))
    text = heldout_path(data, first.path)
    found, read = [], []
    for name, checkpoint in zip(names, checkpoints, strict=True):
        info = describe(checkpoint)
        model, tokenizer = load_checkpoint(info.path, device, trust_remote_code=trust_remote_code)
        inputs, targets = text_rows(model, tokenizer, text, rows, context_length(model, info.run))
        read.append(inputs)
        size = {"rows": len(inputs), "length": inputs.shape[1]}
        place = {"path": str(info.path), "step": info.step}
        found.append({"name": name, "checkpoint": place, **size, **split(model, inputs, targets)})
    _show(found)
    if not all(torch.equal(inputs, read[0]) for inputs in read):
        table_console().print(
            "they read other tokens (tokenizers or row lengths differ): their losses a token do not compare, "
            "bits per byte do (--tasks heldout_bits_per_byte)"
        )
    written = []
    if (folder := first.results(output)) is not None:
        stem = f"recall{in_name(other_text(first, str(text)))}"
        name = free_stem(folder, stem, [describe(checkpoint) for checkpoint in checkpoints])
        written = [folder / f"{name}.json", folder / f"{name}.png"]
        write_json(found, written[0])
        _draw(found, written[1])
    print_written(written)
    return found


def text_rows(
    model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase", path: Path, rows: int, T: int
) -> tuple[Tensor, Tensor]:
    """Inputs and targets (b, T), b <= rows: held-out documents in a row, each between a start token and EOS.

    As in training a start token is no target: -100. Raises ValueError if the text does not fill one row.
    """
    start, end = document_start(model, tokenizer), tokenizer.eos_token_id
    ids: list[int] = []
    begins: list[int] = []
    for document in read_documents(path):
        begins.append(len(ids))
        ids += [] if start is None else [start]
        ids += tokenizer(document, add_special_tokens=False, split_special_tokens=True)["input_ids"]
        ids += [] if start is None or end is None else [end]
        if len(ids) > rows * T:
            break
    whole = min(rows, (len(ids) - 1) // T)
    if not whole:
        raise ValueError(
            f"the held-out text {path} has {len(ids)} tokens, which do not fill one row of {T} + 1"
        )
    stream = torch.tensor(ids[: whole * T + 1])
    targets = stream[1:].clone()
    if start is not None:
        targets[[begin - 1 for begin in begins if 0 < begin <= whole * T]] = IGNORED
    return stream[:-1].view(whole, T), targets.view(whole, T)


def split(model: "PreTrainedModel", inputs: Tensor, targets: Tensor) -> dict[str, Any]:
    """The loss of a model on rows, split as this module's docstring says."""
    counted = targets != IGNORED
    with mixer_inputs(model) as seen:
        losses = token_losses(model, inputs, targets)[counted]
    before = seen_before(torch.cat([inputs, targets[:, -1:]], dim=1))
    order, distance = (values[counted] for values in before)
    counts = targets[counted].bincount(minlength=int(model.config.vocab_size))[targets[counted]]
    positions = torch.arange(targets.shape[1]).expand_as(targets)[counted]
    copyable = order >= 2

    def by_bin(values: Tensor, bins: list[tuple[int, int]], among: Tensor | bool = True) -> list[dict]:
        """The mean loss where `values` lie in each bin [low, high)."""
        return [
            {"from": low, "to": high - 1, **_mean(losses, among & (values >= low) & (values < high))}
            for low, high in bins
        ]

    facts = {
        "loss": float(losses.mean()),
        "seen_ngram": {
            f"n={n}" if n < LONGEST else f"n>={n}": _mean(losses, order == n) for n in range(LONGEST + 1)
        },
        "copyable": _mean(losses, copyable),
        "other": _mean(losses, ~copyable),
        "distance": by_bin(distance, list(pairwise((*DISTANCES, 2**31))), copyable),
        "position": by_bin(positions, _octaves(targets.shape[1])),
        "frequency": by_bin(counts, _octaves(int(counts.max()) + 1)[1:]),
        "gates": gate_facts(model, seen),
    }
    with only_diagonals(model) as cut:
        facts["loss_with_diagonal_transitions"] = (
            float(token_losses(model, inputs, targets)[counted].mean()) if cut else None
        )
    return facts


@torch.no_grad()
def token_losses(model: "PreTrainedModel", inputs: Tensor, targets: Tensor) -> Tensor:
    """Cross-entropy (b, T) in nats, fp32, on the CPU; 0 where there is no target."""
    size = max(1, PIECE_LOGITS // (inputs.shape[1] * model.config.vocab_size))
    parts = []
    for ids, labels in zip(inputs.split(size), targets.split(size), strict=True):
        logits = model(ids.to(model.device), use_cache=False).logits.float().transpose(1, 2)  # (b, V, T)
        parts.append(torch.nn.functional.cross_entropy(logits, labels.to(model.device), reduction="none"))
    return torch.cat(parts).cpu()


def seen_before(rows: Tensor) -> tuple[Tensor, Tensor]:
    """For each target of rows (b, T + 1): its longest repeated n-gram, and the distance of its last bigram.

    Returns n (b, T), up to LONGEST: the n tokens that end with the target occurred earlier in the row (0: the
    token is new). And tokens (b, T) back to the last such bigram (0: none).
    """
    b, length = rows.shape
    order = torch.zeros(b, length - 1, dtype=torch.long)
    distance = torch.zeros(b, length - 1, dtype=torch.long)
    for r, row in enumerate(rows.tolist()):
        last: dict[tuple[int, ...], int] = {}
        for t in range(length):
            for n in range(1, LONGEST + 1):
                if n > t + 1:
                    break
                gram = tuple(row[t - n + 1 : t + 1])
                if t and gram in last:
                    order[r, t - 1] = n
                    if n == 2:
                        distance[r, t - 1] = t - last[gram]
                last[gram] = t
    return order, distance


@torch.no_grad()
def gate_facts(model: "PreTrainedModel", seen: dict[int, list[Tensor]]) -> list[dict[str, Any]]:
    """For each layer with A_t: quantiles of half-lives, share of saturated rows, mass off the diagonal.

    A row's half-life, in tokens, is ln 2 / -ln(sum of |A_t| over the row): that of its state under constant
    gates.
    """
    found = []
    for layer, parts in sorted(seen.items()):
        x = torch.cat([part.reshape(1, -1, part.shape[-1]) for part in parts], dim=1)[:, :ROWS_OF_GATES]
        mixer = model.model.layers[layer].mixer
        A = mixer.transitions(x)
        if A is None:
            continue
        if model.config.layer_mixers[layer]["type"] == "h_lru":
            A = A[..., :1, :]  # the other rows of a companion matrix only shift
        A = A.abs().cpu()
        kept = A.sum(dim=-1)  # (1, tokens, N, rows)
        largest = torch.maximum(A.amax(dim=-1), 1 - kept)
        own = A.diagonal(dim1=-2, dim2=-1) if A.shape[-1] == A.shape[-2] else A[..., 0]
        lives = math.log(2) / -kept.clamp(1e-6, 1 - 1e-6).log()
        mean = lives.log().mean(dim=1).exp().flatten().sort().values  # (rows,), over tokens
        found.append({
            "layer": layer,
            "half_life": {q: float(mean[int(float(q) * (len(mean) - 1))]) for q in ("0.1", "0.5", "0.9")},
            "saturated": float((largest > SATURATED).float().mean()),
            "off_diagonal": float((1 - own.sum() / A.sum()).item()) if A.shape[-1] == A.shape[-2] else None,
        })  # fmt: skip
    return found


@contextmanager
def only_diagonals(model: "PreTrainedModel") -> Iterator[bool]:
    """Inside, BD-LRU layers with blocks above 1 use only the diagonal of A_t; yields whether any do."""
    mixers = [layer.mixer for layer in model.model.layers] if model.config.model_type == "lrnn" else []
    mixed = [m for m in mixers if hasattr(m, "diagonal_only") and m.block_size > 1]
    for mixer in mixed:
        mixer.diagonal_only = True
    try:
        yield bool(mixed)
    finally:
        for mixer in mixed:
            mixer.diagonal_only = False


def _mean(losses: Tensor, chosen: Tensor) -> dict[str, Any]:
    count = int(chosen.sum())
    return {"tokens": count, "loss": float(losses[chosen].mean()) if count else None}


def _octaves(end: int) -> list[tuple[int, int]]:
    return list(pairwise([0, *doublings(1, end), end]))


def doublings(first: int, end: int) -> list[int]:
    """`first` times 1, 2, 4, .. below `end`."""
    return [first * 2**i for i in range(64) if first * 2**i < end]


def _show(found: list[dict[str, Any]]) -> None:
    total = sum(part["tokens"] for part in found[0]["seen_ngram"].values())
    rows = [("all", "100%", [facts["loss"] for facts in found])]
    for key, label in (("copyable", "complete a bigram seen before"), ("other", "do not")):
        rows.append(
            (label, f"{found[0][key]['tokens'] / total:.1%}", [facts[key]["loss"] for facts in found])
        )
    for i, part in enumerate(found[0]["distance"]):
        label = f"  last seen {part['from']} to {part['to']:,} back" if part["to"] < 2**30 else "  farther"
        if part["tokens"]:
            share = f"{part['tokens'] / total:.1%}"
            rows.append((label, share, [facts["distance"][i]["loss"] for facts in found]))
    rows.append(("all, A_t cut to its diagonal", "", [f["loss_with_diagonal_transitions"] for f in found]))
    header = ["tokens that", "share", *(facts["name"] for facts in found)]
    cells = [[label, share, *map(decimal, values)] for label, share, values in rows]
    print_table(header, cells, title="loss in nats a token, by what the context holds")


def _draw(found: list[dict[str, Any]], path: Path) -> None:
    """Write the picture of what `probe_recall` found."""
    with picture(path, 13, 7) as figure:
        axes = figure.subplots(2, 2)
        grams = list(found[0]["seen_ngram"])
        for i, facts in enumerate(found):
            values = [facts["seen_ngram"][gram]["loss"] for gram in grams]
            axes[0][0].plot(range(len(grams)), values, "o-", color=colour(i), label=facts["name"])
            for axis, key in ((axes[0][1], "distance"), (axes[1][0], "position"), (axes[1][1], "frequency")):
                parts = [part for part in facts[key] if part["tokens"]]
                starts = [max(1, part["from"]) for part in parts]
                axis.plot(starts, [part["loss"] for part in parts], "o-", color=colour(i))
        unit = "nats a token"
        axes[0][0].set_xticks(range(len(grams)), grams)
        tidy(axes[0][0], "Longest n-gram seen before in the row", "n (0: the token is new)", unit)
        for axis, title, label in (
            (axes[0][1], "Bigrams seen before, by distance", "tokens back, from"),
            (axes[1][0], "By position", "position in the row, from"),
            (axes[1][1], "By frequency of the target", "occurrences in the held-out rows, from"),
        ):
            tidy(axis, title, label, unit, octaves=True)
        name_curves(axes[0][0], fontsize=8)
