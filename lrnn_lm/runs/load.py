"""A checkpoint folder as evaluation sees it: any Hugging Face causal language model with its tokenizer."""

import json
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError
from typing import TYPE_CHECKING, Any

import yaml
from safetensors import SafetensorError

from ..files import pick_device, user_path
from ..recipe import parse_count, recipe_from_dict
from ..requirements import check_extra
from .layout import CheckpointFolder, RunFolder, checkpoint_folder, step_of

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from ..model import LRNNConfig

DEFAULT_LENGTH = 2048
# By what reads a file, and where it is torn.
_DAMAGED = (OSError, ValueError, KeyError, TypeError, AttributeError, SafetensorError, UnpicklingError)
_LENGTH_KEYS = ("max_position_embeddings", "n_positions", "n_ctx", "sequence_length")


@dataclass(frozen=True)
class CheckpointInfo:
    """Where a checkpoint lies and how far it was trained; None for what its folder and run do not tell."""

    path: Path
    run: Path | None
    step: int | None
    tokens: int | None

    @property
    def name(self) -> str:
        return self.path.name

    def results(self, output: Path | None) -> Path | None:
        """The folder of its results: `output`, else eval/ of its run; None outside of a run."""
        if output is not None:
            return user_path(output)
        return None if self.run is None else RunFolder(self.run).scores


def describe(checkpoint: str | Path) -> CheckpointInfo:
    """Look at a checkpoint folder without loading it. A path that ends in `latest` needs no such link.

    Raises ValueError if the folder is not there or holds no model.
    """
    path = checkpoint_folder(user_path(checkpoint))
    if not path.is_dir():
        raise ValueError(f"{checkpoint}: no such checkpoint folder")
    if not CheckpointFolder(path).config.is_file():
        inside = (RunFolder(path).latest, RunFolder(path.parent).latest)  # of a run, or of its checkpoints/
        near = next((link for link in inside if link.exists() and path in link.parents), None)
        hint = f"; did you mean {near}?" if near else " (there is no config.json in it)"
        if (path / "adapter_config.json").is_file():
            hint = ", but one of a PEFT adapter: merge it into its model (docs/huggingface.md, LoRA)"
        raise ValueError(f"{checkpoint}: not a checkpoint folder{hint}")
    path = path.resolve()
    run = folder.path if (folder := CheckpointFolder(path).run) else None
    step = step_of(path)
    if step is None:
        with suppress(ValueError):  # a damaged manifest: scores need only the model, resuming checks it
            step = json_table(CheckpointFolder(path).manifest).get("step")
    recipe = _run_recipe(run)
    train = recipe.get("train", {})
    tokens = None
    if step is not None and train.get("ramp") is not None:
        tokens = recipe_from_dict({"name": "run", **recipe}).tokens_at(step)
    elif step is not None and "tokens_per_step" in train:
        tokens = step * parse_count(train["tokens_per_step"])
    return CheckpointInfo(path, run, step, tokens)


def load_checkpoint(
    checkpoint: str | Path,
    device: str = "auto",
    *,
    autoencoder: bool = False,
    trust_remote_code: bool = False,
    weights: "dict[str, Tensor] | None" = None,
) -> "tuple[PreTrainedModel, PreTrainedTokenizerBase]":
    """The model, in evaluation mode and in its stored precision, and its tokenizer.

    device: auto (CUDA if there is any), cpu, cuda, cuda:N or mps.
    autoencoder: accept the auto-encoder of the synthetic task compression, too.
    trust_remote_code: let the folder run its own code. This project's models never need it: they load with
    this package, not with the code beside the weights.
    weights: by name, in place of those in the folder of a language model of ours.

    Raises ValueError for a folder that cannot be loaded, code that is not trusted, or a missing device.
    """
    path = describe(checkpoint).path
    target = pick_device(device)
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
    from transformers.utils.logging import disable_progress_bar

    from ..model import LRNNForCausalLM, LRNNForReconstruction

    config = json_table(CheckpointFolder(path).config)
    encodes = "LRNNForReconstruction" in (config.get("architectures") or [])
    if encodes and not autoencoder:
        raise ValueError(f"{checkpoint}: an auto-encoder (task compression), which is no language model")
    _check_files(path, checkpoint, weights is None)
    disable_progress_bar()  # transformers' bar would cut through our messages and the generated text
    part = "model"
    trust = {"trust_remote_code": trust_remote_code}  # without it transformers asks on standard input
    try:
        own = AutoConfig.from_pretrained(path, local_files_only=True, **trust)  # first: the clearest error
        part = "tokenizer"
        tokenizer = AutoTokenizer.from_pretrained(path, local_files_only=True, **trust)
        part = "model"
        kind, trust = (LRNNForReconstruction, {}) if encodes else (AutoModelForCausalLM, trust)
        settings = {"dtype": "auto", "local_files_only": True, "output_loading_info": True}
        if weights is not None:
            kind, path, settings = LRNNForCausalLM, None, settings | {"config": own, "state_dict": weights}
        model, told = kind.from_pretrained(path, **settings, **trust)
    except (*_DAMAGED, ImportError) as error:  # of a package that the folder asks for
        if "trust_remote_code" in str(error):
            raise ValueError(
                f"{checkpoint}: only loads with code of its own, which an export does not take along; "
                "read it, then pass --trust-remote-code"
            ) from error
        reason = " ".join(str(error).split())
        raise ValueError(f"{checkpoint}: cannot be loaded as a {part}: {reason[:300]}") from error
    except RuntimeError as error:  # transformers has printed the weights that do not fit
        raise ValueError(
            f"{checkpoint}: cannot be loaded as a model: its weights do not have the sizes of its config.json"
        ) from error
    if missing := sorted(told["missing_keys"]):  # which transformers draws at random
        remedy = _remedy(missing, config)
        raise ValueError(f"{checkpoint}: {len(missing)} weights are missing, such as {missing[0]}; {remedy}")
    _check_vocabulary(checkpoint, model, tokenizer)
    return model.to(target).eval(), without_dropout(tokenizer)


def _check_vocabulary(
    checkpoint: str | Path, model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase"
) -> None:
    """Raise ValueError if text may become a token without an embedding: reading it ends in an IndexError, on
    a GPU in a failed assertion. Control tokens aside, as some tokenizers have one more than their model."""
    try:
        rows = model.get_input_embeddings().weight.shape[0]
    except (NotImplementedError, AttributeError):  # code of a folder's own need not say which they are
        return
    control = {number for number, token in tokenizer.added_tokens_decoder.items() if token.special}
    beyond = [t for t, number in tokenizer.get_vocab().items() if number >= rows and number not in control]
    if beyond:
        raise ValueError(
            f"{checkpoint}: tokens of its tokenizer have no embedding in its model, {len(beyond)} of them, "
            f"such as {beyond[0]!r}; call model.resize_token_embeddings(len(tokenizer)), and save both again"
        )


def without_dropout(tokenizer: "PreTrainedTokenizerBase") -> "PreTrainedTokenizerBase":
    """The tokenizer, which no longer leaves out merges at random: BPE dropout is for training, tokenizer.json
    keeps it, and scores must repeat."""
    core = tokenizer.backend_tokenizer.model if tokenizer.is_fast else None
    if hasattr(core, "dropout"):
        core.dropout = None
    return tokenizer


def _remedy(missing: list[str], config: dict[str, Any]) -> str:
    """What to do where a folder lacks these weights."""
    if missing != ["lm_head.weight"]:
        return "copy the folder again"
    if config.get("architectures") == ["LRNNModel"]:
        return "it was saved as LRNNModel, without a head: save the LRNNForCausalLM"
    return "set tie_word_embeddings to true in its config.json"


def model_configuration(folder: Path) -> "LRNNConfig":
    """The config.json of one of our models, read without its weights; ValueError for one that is damaged, and
    for a classifier."""
    from ..model import LRNNConfig

    try:
        config = LRNNConfig.from_pretrained(folder, local_files_only=True)
    except ValueError as error:
        raise ValueError(f"{folder}/config.json: {error}") from error
    except _DAMAGED as error:  # a value that was changed by hand
        raise ValueError(
            f"{folder}/config.json: {' '.join(str(error).split())[:200]}; copy it again"
        ) from error
    _check_kind(folder, config.architectures)
    return config


def _check_kind(folder: str | Path, kinds: list[str] | None) -> None:
    if any(str(kind).endswith("Classification") for kind in kinds or []):
        raise ValueError(f"{folder}: a classifier, which is no language model; load it with transformers")


def json_table(file: Path) -> dict[str, Any]:
    """A JSON object from a file, empty if the file is not there; ValueError for anything else."""
    if not file.is_file():
        return {}
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError):
        found = None
    if not isinstance(found, dict):
        raise ValueError(f"{file}: not a JSON object; copy the folder again")
    return found


def _check_files(path: Path, checkpoint: str | Path, weights: bool) -> None:
    """Raise ValueError for a classifier, a folder without tokenizer, or without weights if they are needed,
    UnmetRequirementError for one of integers where torchao is missing."""
    config = json_table(CheckpointFolder(path).config)
    _check_kind(checkpoint, config.get("architectures"))
    quantised = config.get("quantization_config") or {}
    if quantised.get("quant_method") == "torchao":
        check_extra("torchao", "torchao")
    needed = {"tokenizer.json": ("tokenizer*", "vocab*", "*.model")}
    if weights:
        needed = {"model.safetensors": ("*.safetensors", "*.bin")} | needed
    for what, patterns in needed.items():
        if any(file for pattern in patterns for file in path.glob(pattern)):
            continue
        if what == "model.safetensors" and CheckpointFolder(path).shards.is_dir():
            raise ValueError(
                f"{checkpoint}: sharded, so only training reads it; first: lrnn export {checkpoint} DIR"
            )
        remedy = "export it again" if what == "model.safetensors" else "save its tokenizer there"
        raise ValueError(f"{checkpoint}: {what} is missing; copy the folder again, or {remedy}")


def document_start(model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase") -> int | None:
    """The token before every document in training; None for others' models, whose tokenizer adds its own."""
    if model.config.model_type != "lrnn":
        return None
    return tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id


def context_length(model: "PreTrainedModel", run: Path | None = None) -> int:
    """Tokens in the window that scores are computed over.

    The position limit in the model's config; else the run's training length, as a recurrent model takes any
    length but has seen only that one; else 2048.
    """
    config = model.config.to_dict()
    for key in _LENGTH_KEYS:
        if isinstance(config.get(key), int) and config[key] > 0:
            return config[key]
    length = _run_recipe(run).get("data", {}).get("sequence_length")
    if isinstance(length, int) and length > 0:
        return length
    return DEFAULT_LENGTH


def has_window(model: "PreTrainedModel") -> bool:
    """Whether the model reads a limited length at once: all but this project's models without attention."""
    return model.config.model_type != "lrnn" or "full_attention" in model.config.layer_types


def check_window(model: "PreTrainedModel", tokens: int) -> None:
    """Raise ValueError if a model with a learnt vector for each position has fewer than `tokens` of them."""
    from torch.nn import Embedding

    config = model.config.to_dict()
    names = [name.rpartition(".")[2] for name, m in model.named_modules() if isinstance(m, Embedding)]
    learnt = any("pos" in name for name in names)  # embed_positions, position_embeddings, ..
    keys = ("n_positions", "n_ctx", *(("max_position_embeddings",) if learnt else ()))
    limits = [config[key] for key in keys if isinstance(config.get(key), int)]
    if limits and tokens > min(limits):
        raise ValueError(
            f"{tokens} tokens are longer than this {model.config.model_type} takes: {min(limits)}"
        )


def widest_window(model: "PreTrainedModel", run: Path | None = None, wanted: int | None = None) -> int:
    """Tokens in a window: `wanted` (None: `context_length`), cut to what others' models take at most."""
    usual = context_length(model, run)
    if wanted is None or model.config.model_type == "lrnn":
        return wanted or usual
    return min(wanted, usual)


def _run_recipe(run: Path | None) -> dict[str, Any]:
    """Sections of the recipe that a run was trained by; empty if there is none."""
    file = RunFolder(run).recipe if run is not None else None
    if file is None or not file.is_file():
        return {}
    try:
        sections = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError):
        raise ValueError(f"{file}: not valid YAML; copy it again") from None
    sections = sections if isinstance(sections, dict) else {}
    return {key: section for key, section in sections.items() if isinstance(section, dict)}
