"""Text from a checkpoint, printed as it comes."""

from pathlib import Path
from typing import TYPE_CHECKING

from .checkpoint import load_checkpoint

if TYPE_CHECKING:
    from transformers import GenerationConfig, PreTrainedTokenizerBase


def generate(
    checkpoint: str | Path,
    prompt: str,
    *,
    max_new_tokens: int = 100,
    temperature: float = 0.8,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int | None = None,
    greedy: bool = False,
    device: str = "auto",
) -> str:
    """Print the prompt and its continuation to stdout, word by word, and return them.

    The text starts at BOS, as documents did in training, so an empty prompt is allowed. Sampling divides
    logits by temperature and keeps the top_k likeliest tokens and the likeliest that hold top_p of the
    probability (None: all); temperature 0 is greedy. The same seed gives the same text on the same machine;
    the caller's random state is left as it was. Raises ValueError for a number out of range or a checkpoint
    that is not one.
    """
    _check(max_new_tokens, temperature, top_k, top_p)
    model, tokenizer = load_checkpoint(checkpoint, device)
    import torch
    from transformers import TextStreamer

    ids = torch.tensor([prompt_ids(tokenizer, prompt)], device=model.device)  # (1, T)
    settings = _settings(tokenizer, max_new_tokens, 0.0 if greedy else temperature, top_k, top_p)
    ends = model.generation_config.eos_token_id  # one id or several; 0 is one too
    settings.eos_token_id = tokenizer.eos_token_id if ends is None else ends
    streamer = TextStreamer(tokenizer, skip_special_tokens=True)
    with torch.random.fork_rng(devices=[model.device] if model.device.type == "cuda" else []):
        if seed is not None:
            torch.manual_seed(seed)
        else:
            torch.seed()
        out = model.generate(
            ids, attention_mask=torch.ones_like(ids), generation_config=settings, streamer=streamer
        )
    return tokenizer.decode(out[0], skip_special_tokens=True)


def prompt_ids(tokenizer: "PreTrainedTokenizerBase", prompt: str) -> list[int]:
    """Token ids of a prompt after the document start: BOS, or EOS for a tokenizer that has no BOS.

    Raises ValueError if the prompt is empty and the tokenizer has neither.
    """
    start = tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id
    ids = tokenizer.encode(prompt, add_special_tokens=False) if prompt else []
    if start is not None and ids[:1] != [start]:
        ids = [start, *ids]
    if not ids:
        raise ValueError("the tokenizer has no token to start a document with: pass a prompt")
    return ids


def _check(max_new_tokens: int, temperature: float, top_k: int | None, top_p: float | None) -> None:
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens must be at least 1, not {max_new_tokens}")
    if not temperature >= 0:
        raise ValueError(f"temperature must be at least 0, not {temperature}")
    if top_k is not None and top_k < 1:
        raise ValueError(f"top_k must be at least 1, not {top_k}")
    if top_p is not None and not 0 < top_p <= 1:
        raise ValueError(f"top_p must lie in (0, 1], not {top_p}")


def _settings(
    tokenizer: "PreTrainedTokenizerBase",
    max_new_tokens: int,
    temperature: float,
    top_k: int | None,
    top_p: float | None,
) -> "GenerationConfig":
    from transformers import GenerationConfig

    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    settings = GenerationConfig(max_new_tokens=max_new_tokens, do_sample=temperature > 0, pad_token_id=pad)
    if settings.do_sample:
        settings.temperature = temperature
        settings.top_k = top_k or 0  # 0: no limit; transformers' own default is 50
        settings.top_p = 1.0 if top_p is None else top_p
    return settings
