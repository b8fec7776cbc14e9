"""Pydantic's errors about a recipe in plain words, with the key that was probably meant."""

import difflib
import re
import textwrap
from typing import Any

from pydantic import BaseModel

from .reading import field_type, section_in
from .schema import Recipe

# Removed keys: the values that a stored recipe may still have, so that its run can resume; what to do else.
REMOVED: dict[str, tuple[tuple[str, ...], str]] = {
    "train.fp8": (("false",), "it was no faster than bf16; delete the key and use train.precision=bf16"),
    "train.max_rewinds": (
        ("0", "3"),
        "after train.max_bad_steps the run ends and says what to do; delete the key",
    ),
}

# What transformers, nanoGPT, litgpt, Megatron and others call a key of ours.
_ELSEWHERE_CALLED = {
    "name": "run_name output_name experiment_name resume resume_from_checkpoint auto_resume",
    "model.hidden_size": "hidden_dim n_embd d_model dim model_dim embed_dim embedding_dim width",
    "model.num_hidden_layers": "n_layers n_layer num_layers depth",
    "model.intermediate_size": "d_ff ffn_hidden_size ffn_dim mlp_dim d_inner",
    "model.vocab_size": "n_vocab padded_vocab_size vocabulary_size",
    "model.tie_word_embeddings": "tie_embeddings tie_weights weight_tying",
    "model.init_from": "model_name_or_path pretrained_model_name_or_path pretrained base_model",
    "model.mixer.num_heads": "n_heads n_head num_attention_heads heads",
    "model.mixer.num_kv_heads": "num_key_value_heads n_kv_heads num_query_groups",
    "model.mixer.window": "sliding_window window_size",
    "data.source.path": "dataset dataset_name dataset_path data_path data_dir train_file train_data",
    "data.source.name": "dataset_config dataset_config_name",
    "data.source.text_field": "text_column text_key content_field dataset_text_field",
    "data.tokenizer": "tokenizer_name tokenizer_path tokenizer_name_or_path tokenizer_model",
    "data.sequence_length": "seq_len seq_length max_seq_length max_seq_len max_length context_length n_ctx "
    "n_positions max_position_embeddings",
    "data.num_workers": "dataloader_num_workers",
    "optim.name": "optimizer optim optimizer_type",
    "optim.lr": "learning_rate max_lr peak_lr base_lr",
    "optim.final_lr": "min_lr end_lr",
    "optim.betas": "adam_beta1 adam_beta2 beta1 beta2",
    "optim.eps": "adam_epsilon adam_eps epsilon",
    "optim.weight_decay": "wd",
    "optim.grad_clip": "max_grad_norm clip_grad gradient_clipping gradient_clip_val clip_grad_norm max_norm",
    "optim.schedule": "lr_scheduler_type lr_scheduler lr_schedule scheduler lr_decay_style",
    "optim.warmup": "warmup_steps warmup_ratio warmup_iters warmup_tokens num_warmup_steps lr_warmup_iters",
    "train.tokens": "steps max_steps train_steps num_train_steps num_steps total_steps train_iters max_iters "
    "iterations epochs num_epochs num_train_epochs max_epochs max_tokens total_tokens train_tokens",
    "train.tokens_per_step": "batch_size global_batch_size train_batch_size total_batch_size "
    "tokens_per_batch gradient_accumulation_steps accumulate_grad_batches grad_accum grad_accum_steps",
    "train.micro_batch": "per_device_train_batch_size micro_batch_size device_batch_size",
    "train.precision": "bf16 fp16 mixed_precision amp dtype torch_dtype",
    "train.compile": "torch_compile",
    "train.activation_checkpointing": "gradient_checkpointing recompute activation_recompute",
    "train.parallel": "fsdp ddp deepspeed strategy",
    "train.z_loss": "z_loss_weight z_loss_coeff",
    "train.average": "ema ema_decay",
    "train.runs_dir": "output_dir out_dir save_dir save_folder",
    "train.log_every": "logging_steps log_interval log_steps",
    "checkpoint.every": "save_steps save_interval save_every save_strategy checkpoint_interval ckpt_interval",
    "checkpoint.keep_last": "save_total_limit keep_checkpoints",
    "eval.every": "eval_steps eval_interval eval_strategy val_check_interval",
    "eval.tokens": "eval_iters",
    "tracking.trackers": "report_to wandb log_with logger",
    "tracking.project": "wandb_project project_name",
    "launch.nodes": "num_nodes nnodes num_machines",
    "launch.gpus_per_node": "num_gpus gpus n_gpus devices num_processes nproc_per_node",
}
_OUR_KEYS = {theirs: ours for ours, names in _ELSEWHERE_CALLED.items() for theirs in names.split()}


def explain(detail: Any, schema: type[BaseModel] = Recipe) -> str:
    """One of pydantic's errors about a file of `schema` as a plain sentence."""
    where = ".".join(str(part) for part in detail["loc"]) or schema.__name__.lower()
    if where in REMOVED:
        return f"{where}: was removed: {REMOVED[where][1]}"
    if detail["type"] == "extra_forbidden":
        return f"{where}: unknown key; {_meant(detail['loc'], detail['input'], schema)}"
    if detail["type"] == "literal_error" and isinstance(detail["input"], str):
        known = re.findall(r"'([^']+)'", detail["ctx"]["expected"])
        near = difflib.get_close_matches(detail["input"], known, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"known here: {', '.join(known)}"
        return f"{where}: {detail['input']!r} is not known; {hint}"
    if detail["type"] == "missing":
        return f"{where}: is missing"
    if detail["type"] == "string_pattern_mismatch":  # all patterns are one or two sets of characters
        *first, allowed = re.findall(r"\[A-Za-z0-9([^]]*)\]", detail["ctx"]["pattern"])
        begins = ", a letter or digit first" if first else ""
        got = textwrap.shorten(repr(detail["input"]), 100)
        return f"{where}: takes letters a to z, digits and {' '.join(allowed)}{begins}, not {got}"
    wanted = dict.fromkeys(("model", "dict"), "keys and values")
    wanted |= dict.fromkeys(("list", "tuple"), "a list, as in [a, b]")
    if (kind := detail["type"].removesuffix("_type")) in wanted:
        return f"{where}: takes {wanted[kind]}, not {textwrap.shorten(repr(detail['input']), 100)}"
    message = detail["msg"].removeprefix("Value error, ")
    if not detail["loc"] and schema is Recipe:  # two keys that do not agree: the message names both
        return message
    message = message.split(", unable to parse")[0]
    got = repr(detail["input"]) if isinstance(detail["input"], str | int | float | None) else ""
    is_new = 0 < len(got) < 200 and got not in message
    return f"{where}: {message[0].lower() + message[1:]}" + (f" (got {got})" if is_new else "")


def _meant(loc: tuple[str | int, ...], value: Any, schema: type[BaseModel]) -> str:
    """What to write in place of an unknown key: the nearest one, else all of its section."""
    *section, key = (str(part) for part in loc if isinstance(part, str))  # without places in a list
    ours = _OUR_KEYS.get(key, "") if schema is Recipe else ""
    known = section_in(field_type(schema, *section)).model_fields
    near_here = len(section) < 2 or ours.startswith(".".join([*section, ""]))
    if ours and near_here and not isinstance(value, dict):
        *above, name = ours.split(".")
        says = section_in(field_type(Recipe, *above)).model_fields[name].description
        return f"did you mean {ours!r}" + (f" ({textwrap.shorten(says, 120)})?" if says else "?")
    longer = [name for name in known if f"_{key}_" in f"_{name}_"]  # as num_hidden_layers of `layers`
    typo, like = (difflib.get_close_matches(key, known, n=1, cutoff=share) for share in (0.8, 0.5))
    near = typo or longer or _elsewhere(key, schema) or like
    told = textwrap.shorten(", ".join(known), 200, placeholder=" ..")
    return f"did you mean {' or '.join(map(repr, near))}?" if near else f"known here: {told}"


def _elsewhere(key: str, section: type[BaseModel], prefix: str = "") -> list[str]:
    """[dotted path] of the first section that has a key of exactly this name, as for `train.lr`; else []."""
    if key in section.model_fields:
        return [f"{prefix}{key}"]
    inner = {name: section_in(field.annotation) for name, field in section.model_fields.items()}
    found = (_elsewhere(key, below, f"{prefix}{name}.") for name, below in inner.items() if below is not None)
    return next(filter(None, found), [])
