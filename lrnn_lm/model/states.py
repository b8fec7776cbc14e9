"""States as values: save them to disk and load them again, copy them, drop them.

A state is all that a recurrent layer keeps of earlier text; the states of a whole model are its cache
(`past_key_values`). Read a text once, keep the cache, and continue from it any number of times:

    cache = prefill(model, document_ids).past_key_values
    save_states(cache, "document.safetensors", model)
    cache = load_states("document.safetensors", model)
    model.generate(.., past_key_values=copy_states(cache))  # generate writes to its cache

A file holds one tensor for each recurrent layer, keys and values for each attention layer, and the identity
of the model: sizes of its config and a digest of its weights.
"""

import hashlib
import json
import os
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, DynamicLayer, DynamicSlidingWindowLayer, LinearAttentionLayer

from .cache import (
    NOTES,
    RecurrentCache,
    check_cache,
    is_recurrent,
    notes_of,
    state_mixer,
    tokens_seen,
    window_of,
)

_FORMAT = "lrnn-states-1"
_DIGEST_ENTRIES = 64  # of each parameter


def save_states(cache: Cache, path: str | Path, model: PreTrainedModel) -> None:
    """Write a cache to a safetensors file, aside first and then renamed.

    Raises ValueError for a cache that has seen no token or is of another model.
    """
    check_cache(model.config, cache)
    metadata = {
        "format": _FORMAT,
        "tokens": str(int(tokens_seen(cache))),
        "model": json.dumps(_identity(model)),
        "weights": _digest(model),
    }
    path = Path(path)
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        aside.touch()
        mode = aside.stat().st_mode  # as the umask has it: safetensors 0.8 makes files for one user alone
        save_file({name: t.contiguous() for name, t in tensors_of(cache).items()}, aside, metadata)
        with suppress(OSError):  # a file system may have modes of its own
            aside.chmod(mode)
        aside.replace(path)
    finally:
        aside.unlink(missing_ok=True)


def load_states(path: str | Path, model: PreTrainedModel) -> RecurrentCache:
    """Read a cache that `save_states` wrote, onto the model's device.

    Raises ValueError for a file that is missing, damaged, not of `save_states`, or of another model.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"{path}: no such file of states; write one with save_states")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name).to(model.device) for name in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(f"{path}: damaged ({error}); write it again with save_states") from error
    if metadata.get("format") != _FORMAT:
        raise ValueError(f"{path}: not a file of states; write one with save_states")
    wrote, here = json.loads(metadata["model"]), _identity(model)
    for key in here:
        if wrote.get(key) != here[key]:
            raise ValueError(
                f"{path}: states of a model with {key} {wrote.get(key)}, this one has {here[key]}; "
                "load the checkpoint that they were made with, or read the text again"
            )
    if metadata["weights"] != _digest(model):
        raise ValueError(
            f"{path}: states of a model with other weights; load the checkpoint that they were made with, "
            "or read the text again"
        )
    layers = [(spec["type"], spec.get("window")) for spec in model.config.layer_mixers]
    return cache_of(tensors, int(metadata["tokens"]), layers, model.dtype)


def copy_states(cache: Cache, repeats: int = 1) -> RecurrentCache:
    """A copy of a cache in which each row appears `repeats` times, for instance once for each question.

    Raises ValueError for a cache that has seen no token, or repeats below 1.
    """
    if repeats < 1:
        raise ValueError(f"repeats must be at least 1, not {repeats}")
    tensors = {name: t.repeat_interleave(repeats, dim=0) for name, t in tensors_of(cache).items()}
    layers = [(state_mixer(layer), window_of(layer)) for layer in cache.layers]
    return cache_of(tensors, int(tokens_seen(cache)), layers)


def drop_states(cache: Cache) -> None:
    """Empty a cache in place and free its memory (a static cache keeps its memory)."""
    fresh = []
    for layer in cache.layers:
        if type(layer) in (LinearAttentionLayer, DynamicLayer):
            fresh.append(type(layer)())
        elif type(layer) is DynamicSlidingWindowLayer:
            fresh.append(DynamicSlidingWindowLayer(layer.sliding_window))
        else:
            layer.reset()
            fresh.append(layer)
    cache.layers[:] = fresh  # the list itself stays: views of the cache share it


def tensors_of(cache: Cache) -> dict[str, Tensor]:
    """All tensors of a cache, by layer and kind; rows are the first dimension."""
    if not cache.layers or not tokens_seen(cache):
        raise ValueError("the cache has seen no token yet: pass it to the model first")
    tensors = {}
    for i, layer in enumerate(cache.layers):
        if is_recurrent(layer):
            tensors[f"{i}.state"] = layer.recurrent_states[0]
            continue
        length = int(layer.get_seq_length())
        first = 0 if (window := window_of(layer)) is None else 1 - window  # a static layer keeps one more
        tensors[f"{i}.keys"] = layer.keys[:, :, :length][:, :, first:]
        tensors[f"{i}.values"] = layer.values[:, :, :length][:, :, first:]
        tensors |= {f"{i}.{name}": note for name, note in notes_of(layer).items()}
    return tensors


def cache_of(
    tensors: dict[str, Tensor],
    tokens: int,
    layers: list[tuple[str | None, int | None]],
    dtype: torch.dtype | None = None,
) -> RecurrentCache:
    """The inverse of `tensors_of`.

    layers: the mixer and window of each. dtype: of keys and values; None: their own.
    """
    cache = RecurrentCache()
    for i, (mixer_type, window) in enumerate(layers):
        if f"{i}.state" in tensors:
            layer = LinearAttentionLayer()
            layer.update_recurrent_state(tensors[f"{i}.state"])
            layer.has_previous_state[0] = True
            layer.seen_tokens = tokens
            if mixer_type is not None:
                layer.mixer_type = mixer_type
        else:
            layer = DynamicLayer() if window is None else DynamicSlidingWindowLayer(window)
            layer.update(tensors[f"{i}.keys"].to(dtype), tensors[f"{i}.values"].to(dtype))
            if window is not None:
                layer.cumulative_length = tokens
            for name in NOTES:
                if f"{i}.{name}" in tensors:
                    setattr(layer, name, tensors[f"{i}.{name}"])
        cache.layers.append(layer)
    return cache


def _identity(model: PreTrainedModel) -> dict[str, Any]:
    """The part of the config that the size and meaning of a state depend on."""
    config = model.config
    sizes = ("vocab_size", "hidden_size", "num_hidden_layers")
    return {**{key: config.to_dict()[key] for key in sizes}, "layer_mixers": config.layer_mixers}


def _digest(model: PreTrainedModel) -> str:
    """A digest of some entries of every weight that a state depends on, the same in fp32 and bf16.

    Quantised and sharded weights, which are no plain tensors, are left out.
    """
    digest = hashlib.sha256()
    for name, weight in model.named_parameters():
        if name.endswith("lm_head.weight") or type(weight) is not torch.nn.Parameter:
            continue
        flat = weight.detach().flatten()
        entries = flat[spread(flat.numel(), _DIGEST_ENTRIES).to(flat.device)].to("cpu", torch.bfloat16)
        digest.update(entries.view(torch.int16).numpy().tobytes())
    return digest.hexdigest()


def spread(n: int, most: int) -> Tensor:
    """Of n indices `most`, or all if there are fewer, at even distances."""
    # fp32 has no odd numbers beyond 2^24: there the last may come out as n. Digests in files are of these.
    places = torch.linspace(0, n - 1, min(most, n), dtype=torch.float32, device="cpu")
    return places.long().clamp(max=n - 1)
