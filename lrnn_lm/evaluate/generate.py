"""Text from a checkpoint, printed as it comes."""

import io
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from ..files import no_default_device, user_path
from ..runs.load import check_window, load_checkpoint
from .prompt import prompt_ids, read_prompt, read_text, stream_ids
from .show import check_at_least

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

_LEAST_TEMPERATURE = 1e-6  # logits divided by less may be no fp32 number, which torch cannot draw from


@no_default_device()
def generate(
    checkpoint: str | Path,
    prompt: str = "",
    *,
    prompt_file: str | Path | None = None,
    prompt_twice: bool = False,
    segment: int = 2048,
    max_new_tokens: int = 100,
    temperature: float = 0.8,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int | None = None,
    greedy: bool = False,
    device: str = "auto",
    trust_remote_code: bool = False,
) -> str:
    """Print the prompt and its continuation to stdout, word by word, and return them.

    The text starts at BOS, like documents in training, so the prompt may be empty. A prompt file comes before
    the prompt. It is read `segment` tokens at a time, in memory that does not grow with its length (except
    for attention layers); then only the continuation is printed and returned, as with `prompt_twice`: read
    file and prompt, a line break, and both again, so that a recurrence knows what to keep (arXiv 2407.05483).

    Sampling divides logits by temperature, then keeps the top_k most likely tokens and of these the smallest
    set with probability top_p (None: all); temperature 0 is greedy. The same seed gives the same text on the
    same machine; the caller's random state stays. trust_remote_code: let the folder run its own code. Raises
    ValueError for a number out of range, an unreadable file, too long a text, no checkpoint, or NaN in it.

    Example:
        >>> from lrnn_lm import generate
        >>> text = generate("runs/demo/checkpoints/latest", "the state", max_new_tokens=5, greedy=True)
        >>> text.startswith("the state")
        True
    """
    _check(max_new_tokens, temperature, top_k, top_p, segment, seed)
    prompt = _text(prompt)
    model, tokenizer = load_checkpoint(checkpoint, device, trust_remote_code=trust_remote_code)
    import torch
    from transformers import TextStreamer

    from ..model.cache import CACHE

    cache, shown = None, prompt_file is None and not prompt_twice
    if shown:
        ids = torch.tensor([prompt_ids(tokenizer, prompt)], device=model.device)  # (1, T)
        check_window(model, (length := ids.shape[1]) + max_new_tokens)
    else:
        texts = _texts(prompt, prompt_file, times=2 if prompt_twice else 1)
        cache, ids, length = read_prompt(model, stream_ids(tokenizer, texts), segment, max_new_tokens)
    _check_numbers(checkpoint, model, ids)
    settings = _settings(model, tokenizer, max_new_tokens, 0.0 if greedy else temperature, top_k, top_p)
    streamer = TextStreamer(tokenizer, skip_prompt=not shown, skip_special_tokens=True)
    with torch.random.fork_rng([model.device] if model.device.type == "cuda" else []), _any_text_printed():
        torch.seed() if seed is None else torch.manual_seed(seed)
        out = model.generate(
            ids,
            attention_mask=torch.ones(1, length, dtype=torch.bool, device=model.device),
            generation_config=settings, streamer=streamer, tokenizer=tokenizer, **{CACHE: cache},
        )  # fmt: skip
    return tokenizer.decode(out[0, 0 if shown else 1 :], skip_special_tokens=True)


def _check_numbers(checkpoint: str | Path, model: "PreTrainedModel", ids: "Tensor") -> None:
    """Raise ValueError where logits are NaN: torch cannot draw from them, greedy text is token 0."""
    if bool(model(ids[:, :1], use_cache=False).logits.isnan().any()):
        raise ValueError(
            f"{checkpoint}: no text, as logits are NaN: the weights hold such numbers, or overflow"
        )


def _texts(prompt: str, prompt_file: str | Path | None, times: int) -> Iterator[str]:
    """The file and the prompt after it, in pieces; each time after the first on a line of its own.

    Raises ValueError for a pipe that would be read more than once: it is empty the second time.
    """
    path = user_path(prompt_file or "")
    if times > 1 and path.exists() and not (path.is_file() or path.is_dir()):
        raise ValueError(f"{path}: a pipe can be read only once; write its text to a file for --prompt-twice")
    for time in range(times if prompt or prompt_file is not None else 0):
        if time:
            yield "\n"
        if prompt_file is not None:
            yield from read_text(prompt_file)
        if prompt:
            yield prompt


def _check(
    max_new_tokens: int,
    temperature: float,
    top_k: int | None,
    top_p: float | None,
    segment: int,
    seed: int | None,
) -> None:
    check_at_least(1, max_new_tokens=max_new_tokens, segment=segment, top_k=top_k)
    check_at_least(0, temperature=temperature)
    if 0 < temperature < _LEAST_TEMPERATURE:
        raise ValueError(f"temperature {temperature} is too small to divide by; pass 0 for greedy text")
    if top_p is not None and not 0 < top_p <= 1:
        raise ValueError(f"top_p must lie in (0, 1], not {top_p}")
    if seed is not None and not -(2**63) <= seed < 2**63:
        raise ValueError(f"seed must fit in 64 bits, unlike {seed}")


def _text(prompt: str) -> str:
    """The prompt as UTF-8; under an ASCII locale Python holds the command line's bytes as surrogates."""
    try:
        return prompt.encode(errors="surrogateescape").decode()
    except UnicodeError as error:
        raise ValueError(f"the prompt is not UTF-8 text (character {error.start})") from None


@contextmanager
def _any_text_printed() -> Iterator[None]:
    """Inside, stdout prints characters that its encoding lacks as escapes."""
    out = sys.stdout
    if not isinstance(out, io.TextIOWrapper):  # in a notebook
        yield
        return
    before = out.errors
    out.reconfigure(errors="backslashreplace")
    try:
        yield
    finally:
        out.reconfigure(errors=before)


def _settings(
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    max_new_tokens: int,
    temperature: float,
    top_k: int | None,
    top_p: float | None,
) -> "GenerationConfig":
    from transformers import GenerationConfig

    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    # The folder's own settings hold where nothing is said here; these ask for what cannot be streamed.
    one = {"num_beams": 1, "num_return_sequences": 1, "return_dict_in_generate": False}
    drawn = temperature > 0
    settings = GenerationConfig(max_new_tokens=max_new_tokens, do_sample=drawn, pad_token_id=pad, **one)
    ends = model.generation_config.eos_token_id  # an id (which may be 0), several, or None
    settings.eos_token_id = tokenizer.eos_token_id if ends is None else ends
    if settings.do_sample:
        settings.temperature = temperature
        settings.top_k = top_k or 0  # 0: no limit; transformers' own default is 50
        settings.top_p = 1.0 if top_p is None else top_p
    return settings
