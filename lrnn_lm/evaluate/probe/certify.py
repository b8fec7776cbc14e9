"""Is a checkpoint right at every length? `lrnn eval CHECKPOINT --certify s5`, docs/certificate.md.

Short rows are asked first: one for each symbol after each state of the task. If all are right, boxes of
states say up to which length the model stays right (`state_boxes`). Beside it: what each block's gates do
once they are rounded to 0, 1 or -1.

Legend: Q states of the automaton, N blocks, M block size.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from ...data import SYNTHETIC_TASKS, SyntheticTask
from ...runs.load import CheckpointInfo, describe, load_checkpoint
from ..show import check_output, print_table, print_written, table_console, write_json
from ..tasks.synthetic import run_source
from ..text import stem_of
from .harden import harden
from .state_boxes import FAR, Maps, affine_maps, certified_length

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from ...data.synthetic.state_tracking import Automaton


@torch.no_grad()
def certify(
    checkpoint: str | Path,
    task: str,
    *,
    output: Path | None = None,
    hardened: Path | None = None,
    device: str = "auto",
    trust_remote_code: bool = False,
) -> dict[str, Any]:
    """Certify a checkpoint on a state task, print the verdict, write JSON; returns the facts.

    `length` of the facts: the answers to all rows of up to this many symbols are proved right; None for rows
    of any length. `wrong`: the shortest row that is answered wrongly, if one of the short ones is.

    The model is taken in fp32. hardened: a folder for a copy with rounded gates, see `harden`.

    Raises ValueError if the task is not an automaton, or if no certificate exists for such a model.
    """
    info = describe(checkpoint)
    check_output(info.results(output))
    source = run_source(info.path)
    options = source["options"] if source.get("task") == task else {}
    made = SyntheticTask(task, 32, {key: value for key, value in options.items() if key != "seed"})
    if made.kind.automaton is None:
        known = ", ".join(name for name, kind in SYNTHETIC_TASKS.items() if kind.automaton)
        raise ValueError(f"task {task} has no finite number of states: --certify takes {known}")
    automaton = made.kind.automaton(made.options)
    model, tokenizer = load_checkpoint(info.path, device, trust_remote_code=trust_remote_code)
    _check(model, made)
    model = model.float()
    start = automaton.ids if made.options["start"] else None
    words = _words(automaton)
    wrong = _first_mistake(model, automaton, words, start)
    on_cpu = model.device.type == "cpu"
    model = model.double().cpu()
    symbols = automaton.ids + 1 if start is not None else len(automaton.table)
    maps = affine_maps(model, symbols, exact_division=on_cpu)
    facts = {
        "checkpoint": {"path": str(info.path), "step": info.step},
        "device": "cpu" if on_cpu else "gpu",
        "task": {"name": task, "options": made.options, "states": len(automaton.labels)},
        "wrong": wrong,
        **({"length": 0, "margin": None} if wrong else certified_length(model, maps, automaton, start)),
        "blocks": rounded_blocks(maps, automaton, words, start),
    }
    _write_and_show(facts, info, output)
    if hardened is not None:
        kept = harden(model, tokenizer, maps, facts["blocks"], hardened)
        table_console().print(
            f"hardened with {len(kept)} blocks: {hardened}. Then train what reads them, with "
            f"model.init_from={hardened} model.mixer.num_blocks={len(kept)}",
            soft_wrap=True,
            highlight=False,
        )
    return facts


def _check(model: "PreTrainedModel", task: SyntheticTask) -> None:
    """Raise ValueError for a model without a certificate."""
    if model.config.model_type != "lrnn":
        raise ValueError(
            f"a {model.config.model_type} has no certificate: --certify reads the gates of bd_lru"
        )
    config = model.config
    if (layers := len(config.layer_mixers)) != 1:
        raise ValueError(
            f"{layers} layers have no certificate: from the second on, a symbol's gates "
            "depend on the symbols before it"
        )
    if (kind := config.layer_mixers[0]["type"]) != "bd_lru":
        raise ValueError(f"a {kind} layer has no certificate: --certify reads the gates of bd_lru")
    mixer = model.model.layers[0].mixer
    if mixer.conv is not None or mixer.output_gate_proj is not None or mixer.norm_groups is not None:
        raise ValueError(
            "short_conv, output_gate and norm_groups have no certificate: it takes a plain bd_lru"
        )
    if config.learn_initial_state:
        raise ValueError("a learnt initial state has no certificate: it takes states that begin with zeros")
    if mixer.gate == "none":
        raise ValueError("gate none has no certificate: its states are not bounded")
    if config.vocab_size < task.vocab_size:
        raise ValueError(
            f"task {task.name} has {task.vocab_size} symbols, and the model knows {config.vocab_size}"
        )


def _words(automaton: "Automaton") -> dict[int, list[int]]:
    """A shortest row of symbols that leads to each state."""
    words: dict[int, list[int]] = {automaton.start: []}
    queue = [automaton.start]
    for state in queue:
        for symbol, after in enumerate(automaton.table[:, state].tolist()):
            if after >= 0 and after not in words:
                words[after] = [*words[state], symbol]
                queue.append(after)
    return words


def _first_mistake(
    model: "PreTrainedModel", automaton: "Automaton", words: dict[int, list[int]], start: int | None
) -> dict[str, Any] | None:
    """The first of all rows of a word and one symbol more that the model, as it is, answers wrongly."""
    by_length: dict[int, list[list[int]]] = {}
    for state, word in words.items():
        for symbol in np.nonzero(automaton.table[:, state] >= 0)[0].tolist():
            by_length.setdefault(len(word), []).append([state, *word, symbol])
    for _, rows in sorted(by_length.items()):
        states, inputs = np.array(rows)[:, 0], np.array(rows)[:, 1:]
        labels = automaton.labels[automaton.table[inputs[:, -1], states]]
        ids = inputs if start is None else np.pad(inputs, ((0, 0), (1, 0)), constant_values=start)
        said = torch.cat([
            model(part.to(model.device), logits_to_keep=1).logits[:, -1].argmax(dim=-1).cpu()
            for part in torch.from_numpy(ids).split(4096)
        ]).numpy()  # fmt: skip
        for i in np.nonzero((said != labels) & (labels >= 0))[0][:1]:
            return {"symbols": inputs[i].tolist(), "said": int(said[i]), "right": int(labels[i])}
    return None


def rounded_blocks(
    maps: Maps, automaton: "Automaton", words: dict[int, list[int]], start: int | None
) -> list[dict[str, Any]]:
    """Each block with rounded gates: is its state then a function of the automaton's, and how many are there?

    Of a row of gates the largest becomes 1 or -1 and the others 0: the row copies an entry of the state, or
    the input.
    """
    largest = maps.gates.abs().argmax(dim=-1, keepdim=True)
    p = torch.zeros_like(maps.gates).scatter(-1, largest, maps.gates.gather(-1, largest).sign())
    off = (p - maps.gates).abs().sum(dim=-1).amax(dim=(0, 2))  # (N,)
    A, b = p[..., :-1], p[..., -1] * maps.values
    states = {}
    for state, word in words.items():
        h = maps.b.new_zeros(maps.b.shape[1:]) if start is None else b[start]
        for symbol in word:
            h = (A[symbol] @ h.unsqueeze(-1)).squeeze(-1) + b[symbol]
        states[state] = h
    order = sorted(states)
    h = torch.stack([states[state] for state in order])  # (Q, N, M)
    place = {state: i for i, state in enumerate(order)}
    kept = torch.ones(h.shape[1], dtype=torch.bool)
    for symbol, targets in enumerate(automaton.table):
        pairs = [(i, place[int(targets[state])]) for i, state in enumerate(order) if targets[state] >= 0]
        before, after = (list(side) for side in zip(*pairs, strict=True)) if pairs else ([], [])
        moved = torch.einsum("nij,qnj->qni", A[symbol], h[before]) + b[symbol]
        kept &= (moved - h[after]).abs().amax(dim=(0, 2)) <= 1e-9
    shrinks = maps.shrinks
    return [
        {
            "block": n,
            "off": float(off[n]),
            "leak": float(1 - shrinks[n]),
            "exact": float(maps.exact[:, n].float().mean()),
            "follows": bool(kept[n]),
            "values": len(torch.unique(h[:, n].round(decimals=6), dim=0)),
        }
        for n in range(h.shape[1])
    ]


def _write_and_show(facts: dict[str, Any], info: CheckpointInfo, output: Path | None) -> None:
    folder = info.results(output)
    task, states = facts["task"]["name"], facts["task"]["states"]
    rows = []
    for b in facts["blocks"]:
        follows = "no" if not b["follows"] else "yes" if b["values"] > 1 else "constant"
        numbers = [str(b["values"]), f"{b['off']:.2g}", f"{b['leak']:.2g}", f"{b['exact']:.0%}"]
        rows.append([str(b["block"]), follows, *numbers])
    header = ["block", f"rounded, follows {task}", f"states of {states}", "off by", "leak", "exact rows"]
    print_table(header, rows, left=0, title=info.name)
    table_console().print(verdict(facts), highlight=False)
    if folder is not None:
        path = folder / f"{stem_of(info, output, f'certify-{task}')}.json"
        write_json(facts, path)
        print_written([path])


def verdict(facts: dict[str, Any]) -> str:
    """The result in one line."""
    task, wrong, length = facts["task"]["name"], facts["wrong"], facts["length"]
    where = f"(fp32 on a {facts['device'].upper()})"
    if wrong:
        symbols = " ".join(map(str, wrong["symbols"]))
        return f"{task}: wrong. After {symbols} the model says {wrong['said']}; right is {wrong['right']}"
    if length is None:
        lead = f"the right logit leads by at least {facts['margin']:.3g}"
        return f"{task}: certified at every length {where}; {lead}"
    if length == 0:
        return f"{task}: not certified. Short rows are right, but the bounds do not tell the answers apart"
    more = " or more" if length >= FAR else ""
    return (
        f"{task}: certified up to {length:,} symbols{more} {where}, where the right logit leads by at least "
        f"{facts['margin']:.3g}; beyond, nothing is proved"
    )
