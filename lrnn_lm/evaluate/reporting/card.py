"""The model card: a README.md with the model, its training, data and scores, and how to load it.

Everything in it is read from the checkpoint and its run: config.json, recipe.yaml, data.json (the data's
manifest), parent.json, metrics.jsonl, eval/*.json and plots/loss.png. What is missing is left out.
"""

import json
import shutil
import sys
from contextlib import suppress
from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from typing import Any

import yaml

from ...files import replace_file, user_path
from ...output import say
from ...runs.layout import CheckpointFolder, RunFolder
from ...runs.load import describe, json_table, model_configuration
from ..show import markdown_table
from .report import to_markdown
from .runs import mixer_in_words, read_run

UNKNOWN_LICENCE = "unknown"  # the hub's word; the licence depends on the training data, so assume nothing
_MARK = "\n<!-- lrnn-lm writes this card anew as the run goes on, unless it is edited: "
_AVERAGE = "average_"  # before what a validation measures of the moving average
_PAPER = "https://arxiv.org/abs/2602.12021"
_KINDS = {
    "bd_lru": f"a block-diagonal linear recurrent unit (BD-LRU, {_PAPER})",
    "bd_matrix": f"a block-diagonal linear recurrent unit with a matrix for a state (after {_PAPER})",
    "h_lru": f"a higher-order linear recurrent unit (H-LRU, {_PAPER})",
    "attention": "causal softmax attention",
    "lstm": "an LSTM",
    "mamba2": "Mamba-2",
    "mlstm": "an mLSTM (xLSTM)",
    "min_gru": "a minGRU",
    "rg_lru": "an RG-LRU",
    "complex_lru": "a complex diagonal linear recurrent unit (LRU)",
    "slice": "a block-diagonal SLiCE",
    "bd_gru": "a block-diagonal GRU",
    "bd_slstm": "a block-diagonal sLSTM (xLSTM)",
    "m2rnn": "an M2RNN, whose non-linear state is a matrix",
    "fixed_point": "a Fixed-Point RNN",
    "pd_ssm": "a block-diagonal PD-SSM",
}


def write_run_card(run: str | Path) -> Path:
    """Write RUN/README.md for the run's newest checkpoint; returns the file. One that a person has written or
    edited stays, and a line says so.

    Raises ValueError if the run has no checkpoint.
    """
    folder = RunFolder(user_path(run))
    picture = "plots/loss.png" if folder.loss_plot.is_file() else None
    text = model_card(folder.latest, picture=picture, folder="checkpoints/latest")
    stored = folder.card.read_text(encoding="utf-8", errors="replace") if folder.card.is_file() else ""
    if stored and not stored.endswith(_mark(stored.rpartition(_MARK)[0])):
        told = "is edited (or of an older version), and stays; remove it for a new card"
        say(f"{folder.card}: {told}", sys.stderr)
        return folder.card
    replace_file(folder.card, text + _mark(text))  # half a card would count as edited, and stay
    return folder.card


def _mark(text: str) -> str:
    """The last line of a run's card, by which an edited one is told."""
    return f"{_MARK}{sha256(text.encode()).hexdigest()[:16]} -->\n"


def write_export_card(
    checkpoint: str | Path, target: Path, licence: str | None = None, average: bool = False
) -> Path:
    """Write TARGET/README.md, and the picture of the curve beside it, for an exported checkpoint.

    average: the exported weights are the moving average.
    """
    run = describe(checkpoint).run
    curve = RunFolder(run).loss_plot if run is not None else None
    picture = None
    if curve is not None and curve.is_file():
        picture = shutil.copyfile(curve, target / "loss.png").name
    file = target / "README.md"
    file.write_text(model_card(checkpoint, licence, picture, average=average), encoding="utf-8")
    return file


def model_card(
    checkpoint: str | Path,
    licence: str | None = None,
    picture: str | None = None,
    folder: str = ".",
    average: bool = False,
) -> str:
    """The card's text.

    Args:
        checkpoint: a checkpoint folder; its run is looked for two folders above.
        licence: the model's licence, as the hub abbreviates it (`apache-2.0`); None for the recipe's.
        picture: path of the loss curve, relative to the card.
        folder: path of the model, relative to the card.
        average: the weights are the moving average of the checkpoint's run.
    Raises ValueError if there is no checkpoint.
    """
    info = describe(checkpoint)
    config = json.loads(CheckpointFolder(info.path).config.read_text(encoding="utf-8"))
    run = RunFolder(info.run) if info.run is not None else None
    stored = run.recipe.read_text(encoding="utf-8") if run is not None and run.recipe.is_file() else ""
    recipe = yaml.safe_load(stored) or {}
    parent = json_table(run.parent) if run is not None else {}
    try:
        training = _training(recipe, info.step, parent, average)
    except (KeyError, TypeError, AttributeError):
        raise ValueError(f"{info.run}: recipe.yaml or parent.json is not a run's (damaged?)") from None
    mixers = config.get("layer_pattern") or [config.get("mixer") or {"type": "bd_lru"}]
    is_autoencoder = "LRNNForReconstruction" in (config.get("architectures") or [])
    parts = [
        _front_matter(licence or recipe.get("license") or UNKNOWN_LICENCE, mixers, is_autoencoder),
        f"# {recipe.get('name') or info.path.name}\n",
        _model(info.path, mixers, "An auto-encoder" if is_autoencoder else "A causal language model"),
        training,
        _data(run.data) if run is not None else "",
        _results(run.path, info.step, average, picture) if run is not None else "",
        "" if is_autoencoder else _loading(folder),
        f"## Recipe\n\n```yaml\n{stored.strip()}\n```\n" if stored else "",
    ]
    return "\n".join(part for part in parts if part)


def _front_matter(licence: str, mixers: list[dict[str, Any]], is_autoencoder: bool) -> str:
    types = list(dict.fromkeys(mixer["type"] for mixer in mixers))
    fields = {
        "license": licence,
        "library_name": "transformers",
        **({} if is_autoencoder else {"pipeline_tag": "text-generation"}),
        "tags": ["lrnn", "linear-recurrent-network", *types],
    }
    return f"---\n{yaml.safe_dump(fields, sort_keys=False)}---\n"


def _model(checkpoint: Path, mixers: list[dict[str, Any]], kind: str) -> str:
    from ...model.accounting import account

    config = model_configuration(checkpoint)
    costs = account(config, config.max_position_embeddings)
    kinds = list(dict.fromkeys(_KINDS.get(mixer["type"], mixer["type"]) for mixer in mixers))
    text = (
        f"{kind} of {costs.total_parameters:,} parameters, trained with lrnn-lm. "
        f"Its layers mix the sequence by {' and '.join(kinds)}, each followed by a SwiGLU.\n\n"
    )
    rows = [
        ("layers", f"{config.num_hidden_layers}" + f", applied {config.repeat} times" * (config.repeat > 1)),
        ("width", f"{config.hidden_size}, SwiGLU {config.intermediate_size}"),
        ("mixer", "; ".join(map(mixer_in_words, mixers))),
        ("vocabulary", f"{config.vocab_size:,}" + (", tied head" if config.tie_word_embeddings else "")),
        ("trained at", f"{config.max_position_embeddings:,} tokens"),
        ("FLOPs a token, forward", f"{costs.flops_per_token:,}"),
        ("recurrent state of a sequence", f"{costs.recurrent_state_bytes:,} bytes, the same at any length"),
    ]
    return text + markdown_table(["", ""], rows)


def _training(recipe: dict[str, Any], step: int | None, parent: dict[str, Any], average: bool) -> str:
    """parent: what a branch stored of the checkpoint that it began from; empty for other runs."""
    if not recipe:
        return ""
    train, optim = recipe["train"], recipe["optim"]
    steps = f", this is step {step:,}" if step is not None else ""
    rows = [
        ("budget", f"{train['tokens']} tokens, {train['tokens_per_step']} a step{steps}"),
        ("optimizer", f"{optim['name']}, betas {optim['betas']}, weight decay {optim['weight_decay']}"),
        ("learning rate", f"{optim['lr']}, {optim['schedule']}, warm-up {optim['warmup']}"),
        ("gradient clipping", f"{optim['grad_clip']}"),
        ("precision", f"{train['precision']}"),
        ("seed", f"{recipe['seed']}"),
    ]
    if average:
        rows.append(("weights", f"the moving average ({train.get('average')})"))
    if source := recipe["model"].get("init_from"):
        rows.append(("initial weights", source))
    if parent:
        recipe_hash = parent["recipe_sha256"][:16]
        rows.append(("branch of", f"step {parent['step']:,} of {parent['run']} (recipe `{recipe_hash}`)"))
    return "## Training\n\n" + markdown_table(["", ""], rows)


def _data(manifest: Path) -> str:
    """Source, sizes and tokenizer of the data; empty if there is no manifest. ValueError if it is damaged."""
    if not manifest.is_file():
        return ""
    try:
        rows = _data_rows(json.loads(manifest.read_text(encoding="utf-8")))
    except (ValueError, KeyError, TypeError, AttributeError):
        raise ValueError(f"{manifest}: not a run's data manifest (damaged?)") from None
    return "## Data\n\n" + markdown_table(["", ""], rows)


def _data_rows(facts: dict[str, Any]) -> list[tuple[str, str]]:
    rows = []
    for name, part in facts.get("sources", {"": facts}).items():
        label = f"{name}: " if name else ""
        source = {key: value for key, value in part["source"].items() if value is not None}
        rows.append((f"{label}source", ", ".join(f"{key} {value}" for key, value in source.items())))
        for split, sizes in part["splits"].items():
            counts = (("tokens", "num_tokens"), ("documents", "num_documents"), ("bytes", "num_bytes"))
            known = [f"{sizes[key]:,} {unit}" for unit, key in counts if sizes[key] is not None]
            rows.append((f"{label}{split}", ", ".join(known)))
    tokenizer = facts["tokenizer"]
    rows.append(("tokenizer", f"{Path(tokenizer['name']).name}, {tokenizer['vocab_size']:,} tokens"))
    rows.append(("content hash", f"`{facts['content_hash'][:16]}`"))
    return rows


def _results(run: Path, step: int | None, average: bool, picture: str | None) -> str:
    """The run's losses and scores at a step; empty if it has none there. Scores are not of the average."""
    with suppress(ValueError):
        found = read_run(run, step)
        lines = [line for line in found.validation if step in (None, line["step"])]  # not of weights before
        if average:
            lines = [
                {"step": line["step"], "tokens": line["tokens"]}
                | {key.removeprefix(_AVERAGE): line[key] for key in line if key.startswith(_AVERAGE)}
                for line in lines
            ]
        found = replace(found, validation=lines, scores={} if average else found.scores)
        text = f"## Results\n\n{to_markdown([found])}"
        return text + (f"\n![Loss against tokens]({picture})\n" if picture else "")
    return ""


def _loading(folder: str) -> str:
    return f"""## Use

With torch and transformers only; the model's code lies beside the weights:

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

folder = "{folder}"
tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
start = tokenizer.bos_token or tokenizer.eos_token or ""  # as every document in training began
inputs = tokenizer(start + "Once", add_special_tokens=False, return_tensors="pt")
print(tokenizer.decode(model.generate(**inputs, max_new_tokens=40)[0]))
```

With lrnn-lm installed, `import lrnn_lm` takes the place of `trust_remote_code=True`,
and `lrnn serve {folder}` that of the next command.

Answers over HTTP, by OpenAI's protocol (`pip install 'transformers[serving]'`):

```bash
transformers serve {folder} --trust-remote-code
```

Scores:

```bash
lm_eval --model hf --tasks lambada_openai \\
    --model_args pretrained={folder},trust_remote_code=True,add_bos_token=True
```
"""
