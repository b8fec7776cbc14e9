"""Tokenizers: train one with SentencePiece, or take an existing one; the result is a fast one's folder.

A trained tokenizer normalises nothing. SentencePiece's own files write a space as U+2581; the fast tokenizer
has real spaces in its pieces, so that a text with U+2581 is decoded exactly too. What no piece covers falls
back to UTF-8 bytes. Hence decode(encode(x)) == x for every text, and no text encodes to a control token.
"""

import hashlib
import json
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import yaml
from pydantic import ConfigDict, Field, ValidationError
from pydantic.dataclasses import dataclass as checked

from ..files import hub_is_reachable, user_path
from ..output import error_console
from ..requirements import check_extra
from .specs import DataError

if TYPE_CHECKING:
    from tokenizers import Tokenizer

SPECIAL_TOKENS = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
SPACE = "\u2581"  # how SentencePiece writes a space
MODEL_FILE = "sentencepiece.model"  # kept beside the fast tokenizer made from it
_FILES = (".json", ".model", ".txt", ".jinja")  # endings of what a tokenizer's folder holds
_NEVER = -1000.0  # a log-probability so low that no segmentation uses the piece
_CHUNK = 4000  # characters of training text given to SentencePiece at once; it drops longer "sentences"
_UNTRAINABLE = re.compile("[\0\t\u2581\u2585]+")  # SentencePiece reserves these; they become bytes
_CONTROL = "<(?=(?:unk|s|/s|pad|0x[0-9A-F]{2})>)"  # the first character of a control token's or byte's name
_CONTROL_CHARACTERS = "<>/unkspadx0123456789ABCDEF"
_WORD = " +[^ ]*|[^ ]+"  # no piece has a space after a non-space, so a text may be cut there


@checked(frozen=True, config=ConfigDict(extra="forbid", strict=True))
class TokenizerRecipe:
    """The keys of a SentencePiece recipe (tokenizers/*.yaml)."""

    model_type: Literal["bpe", "unigram"] = "bpe"
    vocab_size: Annotated[int, Field(lt=2**31)] = 4096
    byte_fallback: bool = True
    character_coverage: Annotated[float, Field(ge=0.98, le=1)] = 0.9995  # as SentencePiece takes it
    max_piece_length: Annotated[int, Field(ge=1, le=512)] = 16
    split_digits: bool = False
    sample_bytes: Annotated[int, Field(ge=1)] = 16_000_000


def read_recipe(path: Path, vocab_size: int | None = None) -> TokenizerRecipe:
    """Read and check a SentencePiece recipe; `vocab_size` overrides the one in the file. Raises DataError."""
    try:
        text = path.read_text(encoding="utf-8")
        data, node = yaml.safe_load(text), yaml.compose(text, yaml.SafeLoader)
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:  # ValueError: not UTF-8
        raise DataError(
            f"{path}: cannot read this tokenizer recipe: {' '.join(str(error).split())}"
        ) from None
    if not isinstance(data, dict):
        raise DataError(f"{path}: a tokenizer recipe is a mapping of keys such as model_type and vocab_size")
    names = [key.value for key, _ in node.value]
    if twice := [name for name in names if names.count(name) > 1]:
        raise DataError(f"{path}: {twice[0]} is given twice; make one of them")
    if vocab_size is not None:
        data["vocab_size"] = vocab_size
    try:
        recipe = TokenizerRecipe(**{str(key): value for key, value in data.items()})
    except ValidationError as error:
        wrong = error.errors()[0]
        is_key = wrong["type"] == "unexpected_keyword_argument"
        known = ", ".join(field.name for field in fields(TokenizerRecipe))
        what = f"no such key; known: {known}" if is_key else wrong["msg"]
        raise DataError(f"{path}: {wrong['loc'][0]}: {what} (got {wrong['input']!r})") from None
    least = 5 + 256 * recipe.byte_fallback
    if recipe.vocab_size < least:
        raise DataError(
            f"{path}: vocab_size {recipe.vocab_size} has no room for special tokens and bytes ({least})"
        )
    return recipe


def recipe_key(recipe: TokenizerRecipe) -> str:
    """What decides the trained tokenizer besides the text: the recipe and SentencePiece's version."""
    return json.dumps({**asdict(recipe), "sentencepiece": version("sentencepiece")}, sort_keys=True)


def train(texts: Iterable[str], recipe: TokenizerRecipe, folder: Path) -> None:
    """Train on `texts` and write a fast HF tokenizer into `folder`. Deterministic.

    Raises DataError if the text cannot fill the vocabulary, with the largest size that works if it is known.
    """
    check_extra("train", "sentencepiece")
    import sentencepiece
    from transformers import PreTrainedTokenizerFast

    model = folder / MODEL_FILE
    try:
        with model.open("wb") as file:
            sentencepiece.SentencePieceTrainer.Train(
                sentence_iterator=_chunks(texts),
                model_writer=file,
                model_type=recipe.model_type,
                vocab_size=recipe.vocab_size,
                character_coverage=recipe.character_coverage,
                byte_fallback=recipe.byte_fallback,
                max_sentencepiece_length=recipe.max_piece_length,
                split_digits=recipe.split_digits,
                normalization_rule_name="identity",
                add_dummy_prefix=False,
                remove_extra_whitespaces=False,
                allow_whitespace_only_pieces=True,
                max_sentence_length=8 * _CHUNK,
                unk_id=0,
                bos_id=1,
                eos_id=2,
                pad_id=3,
                pad_piece=SPECIAL_TOKENS["pad_token"],
                num_threads=2,  # fixed, as unigram's sums depend on the number of threads
                minloglevel=2,
            )
    except (RuntimeError, ValueError, OSError) as error:
        raise _training_error(error, recipe) from None
    PreTrainedTokenizerFast(
        tokenizer_object=fast_tokenizer(model, recipe.model_type),
        clean_up_tokenization_spaces=False,
        padding_side="left",
        **SPECIAL_TOKENS,
    ).save_pretrained(folder)


def fast_tokenizer(model: Path, model_type: str) -> "Tokenizer":
    """A model made by `train` as a tokenizer of `tokenizers`, with the same ids for any text without U+2581.

    Except where two unigram segmentations have the same probability (`=` `==` and `==` `=`): the libraries
    round differently, so each may choose another.
    """
    import sentencepiece

    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

    spm = sentencepiece.SentencePieceProcessor(model_file=str(model))
    pieces, scores, plain = [], [], []
    for i in range(spm.GetPieceSize()):
        piece = spm.IdToPiece(i)
        normal = not (spm.IsControl(i) or spm.IsUnknown(i) or spm.IsByte(i))
        pieces.append(piece.replace(SPACE, " ") if normal else piece)
        scores.append(spm.GetScore(i) if normal else _NEVER)
        plain.append(normal)
    byte_fallback = spm.IsByte(spm.PieceToId("<0x0A>"))
    if model_type == "bpe":
        tokenizer = Tokenizer(_bpe(pieces, scores, plain, byte_fallback))
    else:  # bytes score `_NEVER`, so that the text `<0x0A>` does not become a byte
        vocab = list(zip(pieces, scores, strict=True))
        tokenizer = Tokenizer(models.Unigram(vocab, unk_id=0, byte_fallback=byte_fallback))
    words = pre_tokenizers.Split(Regex(_WORD), "isolated")
    if model_type == "unigram" and not set(_CONTROL_CHARACTERS) <= set(pieces):
        # An unknown character costs more than `_NEVER`: a control token could be the best segmentation.
        words = pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(_CONTROL), "isolated"), words])
    tokenizer.pre_tokenizer = words
    tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    return tokenizer


def _bpe(pieces: list[str], scores: list[float], plain: list[bool], byte_fallback: bool) -> Any:
    """A BPE model whose merges are all ways to make a piece of two others, in the order of learning."""
    from tokenizers import models

    normal = {piece: score for piece, score, ok in zip(pieces, scores, plain, strict=True) if ok}
    merges = []
    for piece in sorted(normal, key=lambda p: -normal[p]):
        cuts = ((piece[:i], piece[i:]) for i in range(1, len(piece)))
        merges += [(left, right) for left, right in cuts if left in normal and right in normal]
    vocab = {piece: i for i, piece in enumerate(pieces)}
    return models.BPE(
        vocab, merges, unk_token=SPECIAL_TOKENS["unk_token"], fuse_unk=True, byte_fallback=byte_fallback
    )


def _chunks(texts: Iterable[str]) -> Iterator[str]:
    """Training text in pieces short enough for SentencePiece, cut at line ends and spaces if possible."""
    for text in texts:
        for part in _UNTRAINABLE.split(text):
            start = 0
            while start < len(part):
                stop = cut_point(part, start, _CHUNK)
                yield part[start:stop]
                start = stop


def cut_point(text: str, start: int, length: int) -> int:
    """Where to cut text[start:] after at most `length` characters.

    Before a space that follows a non-space; if there is none, after a line end; else after `length`.
    """
    stop = start + length
    if stop >= len(text):
        return len(text)
    at = stop
    while (at := text.rfind(" ", start + 1, at)) > start:
        if text[at - 1] != " ":
            return at
    at = text.rfind("\n", start, stop)
    return at + 1 if at >= 0 else stop


def _training_error(error: Exception, recipe: TokenizerRecipe) -> DataError:
    text = " ".join(str(error).split())
    if found := re.search(r"too high \(\d+\).*?<= (\d+)", text):
        return DataError(
            f"tokenizer vocab_size {recipe.vocab_size} is larger than the training text can fill; "
            f"the largest that works is {found[1]}: set model.vocab_size={found[1]}"
        )
    if found := re.search(r"smaller than required_chars\. \d+ vs (\d+)", text):
        return DataError(
            f"tokenizer vocab_size {recipe.vocab_size} is too small for the characters of the text; "
            f"use at least {found[1]}, or a lower character_coverage"
        )
    if "sentences_.empty()" in text:
        return DataError("no tokenizer can be trained: the text holds nothing but NULs, tabs and U+2581")
    return DataError(f"SentencePiece could not train a tokenizer with vocab_size {recipe.vocab_size}: {text}")


def import_tokenizer(name: str, folder: Path) -> None:
    """Copy an existing tokenizer (a folder or a hub name) into `folder` as a fast one. Raises DataError."""
    from transformers import AutoTokenizer

    local = Path(name).is_dir()
    try:
        # Without a network the hub's cache may still hold it.
        offline = local or not hub_is_reachable()
        tokenizer = AutoTokenizer.from_pretrained(name, local_files_only=offline, trust_remote_code=False)
    except Exception as error:  # damaged files make transformers raise errors of Python's and Rust's, too
        if "trust_remote_code" in str(error):
            raise DataError(
                f"tokenizer {name!r} only loads with code of its own (trust_remote_code), which is not run "
                "here; choose a fast tokenizer (tokenizer.json)"
            ) from None
        why = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        advice = (
            "it needs tokenizer.json and tokenizer_config.json"
            if local
            else "if there is no network here, give the folder of a local copy"
        )
        raise DataError(f"tokenizer {name!r} cannot be loaded; {advice} ({why})") from None
    if not tokenizer.is_fast:
        raise DataError(f"tokenizer {name!r} has no fast version (tokenizer.json); choose one that has")
    if tokenizer.eos_token_id is None:
        raise DataError(f"tokenizer {name!r} has no end-of-text token (eos_token), which separates documents")
    tokenizer = _as_in_its_file(tokenizer, name, offline)
    # We pass this option where text is data. Saved, it would split the control tokens of chat templates.
    tokenizer.split_special_tokens = False
    tokenizer.init_kwargs.pop("split_special_tokens", None)
    model = tokenizer.backend_tokenizer.model
    if chance := getattr(model, "dropout", None):  # of BPE alone
        model.dropout = None
        error_console().print(
            f"lrnn: tokenizer {name!r} leaves out merges at random (dropout {chance:g}), so that ids "
            "differ each time; its copy here has no dropout",
            markup=False,
            soft_wrap=True,
        )
    tokenizer.save_pretrained(folder)


def _as_in_its_file(tokenizer: Any, name: str, offline: bool) -> Any:
    """The tokenizer that tokenizer.json describes, with the special tokens of `tokenizer`.

    transformers 5 builds some classes from the vocabulary alone. If a file names such a class and splits or
    normalises text in another way, then that is lost and every id may differ.
    """
    from huggingface_hub import try_to_load_from_cache
    from transformers import PreTrainedTokenizerFast

    from tokenizers import Tokenizer

    local = Path(name) / "tokenizer.json"
    file = local if Path(name).is_dir() else Path(str(try_to_load_from_cache(name, local.name)))
    if not file.is_file():
        return tokenizer
    own = Tokenizer.from_file(str(file))
    if _steps(own) == _steps(tokenizer.backend_tokenizer):
        return tokenizer
    special = tokenizer.special_tokens_map.items()
    known = {key: token for key, token in special if own.token_to_id(str(token)) is not None}
    known["padding_side"] = tokenizer.padding_side  # of some classes it is left
    return PreTrainedTokenizerFast.from_pretrained(name, local_files_only=offline, **known)


def _steps(tokenizer: "Tokenizer") -> list[Any]:
    """What decides the ids of a text and the text of ids, control tokens aside."""
    data = json.loads(tokenizer.to_str())
    model = {key: value for key, value in data["model"].items() if value not in (None, "")}
    if model.get("byte_fallback") and all(f"<0x{byte:02X}>" in model["vocab"] for byte in range(256)):
        model.pop("unk_token", None)  # no text is unknown
    # Offsets decide no id, and a byte-level decoder heeds no option.
    decoder = _without(data["decoder"], "trim_offsets", "add_prefix_space", "use_regex")
    return [model, data["normalizer"], _without(data["pre_tokenizer"], "trim_offsets"), decoder]


def _without(step: Any, *options: str) -> Any:
    """A step of a tokenizer, and those within it, without these options."""
    text = json.dumps(step)
    return json.loads(text, object_pairs_hook=lambda table: {k: v for k, v in table if k not in options})


def fingerprint(name: str) -> list[object]:
    """What identifies a ready tokenizer: hashes of its folder's files; or its hub name, without a network."""
    folder = user_path(name)
    if not folder.is_dir():
        return [name]
    files = sorted(f for f in folder.iterdir() if f.suffix in _FILES and f.is_file())
    files += sorted(f for f in folder.glob("*/*.jinja") if f.is_file())  # further chat templates
    return [[str(f.relative_to(folder)), hashlib.sha256(f.read_bytes()).hexdigest()] for f in files]


@dataclass(frozen=True)
class TokenizerFacts:
    """What the shards need to know of a tokenizer."""

    vocab_size: int  # largest id + 1
    first: int  # the token that starts a document
    last: int  # the token that ends it
    hash: str
    unknown: int | None = None  # the token of text that the tokenizer has none for


def read_facts(folder: Path) -> TokenizerFacts:
    """Facts of a fast tokenizer's folder, read without transformers; DataError if it is no such folder."""
    tokenizer = load_backend(folder)
    try:
        config = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"{folder}: not a tokenizer folder: {error}") from None

    def token_id(key: str) -> int | None:
        token = config.get(key)
        token = token["content"] if isinstance(token, dict) else token
        return None if token is None else tokenizer.token_to_id(token)

    eos = token_id("eos_token")
    if eos is None:
        raise DataError(f"{folder}: the tokenizer has no end-of-text token (eos_token)")
    bos = token_id("bos_token")
    size = max(tokenizer.get_vocab(with_added_tokens=True).values()) + 1
    return TokenizerFacts(
        size, eos if bos is None else bos, eos, tokenizer_hash(folder), token_id("unk_token")
    )


def tokenizer_hash(folder: str | Path) -> str:
    """sha256 of what a fast tokenizer folder does to text; unchanged by a save_pretrained round trip."""
    path = Path(folder) / "tokenizer.json"
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: not a fast tokenizer: {error}") from None
    for key in ("truncation", "padding", "version"):
        data.pop(key, None)
    if isinstance(model := data.get("model"), dict) and model.get("dropout"):
        model["dropout"] = None  # as `import_tokenizer` copies it
    return hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()


def spells(tokenizer: Any, ids: list[int], text: str, **options: bool) -> bool:
    """Whether ids decode to the text that they are of; a space that a tokenizer puts before it aside.

    By the Rust tokenizer or transformers' around it; `options` of its `decode`.
    """
    return tokenizer.decode(ids, skip_special_tokens=False, **options).lstrip(" ") == text.lstrip(" ")


@contextmanager
def no_token_told(text: str) -> Iterator[None]:
    """Inside, a text that a tokenizer without an unknown token has no token for is a DataError."""
    try:
        yield
    except Exception as error:
        if type(error) is not Exception:  # tokenizers raises no narrower one
            raise
        raise DataError(f"the tokenizer cannot read a text ({error}), which begins {text[:60]!r}") from None


def load_backend(folder: Path) -> "Tokenizer":
    """The Rust tokenizer of a folder, with control tokens in text read as plain text."""
    from tokenizers import Tokenizer

    path = folder / "tokenizer.json"
    if not path.is_file():
        raise DataError(f"{path}: no such file; the folder does not hold a fast tokenizer")
    tokenizer = Tokenizer.from_file(str(path))
    tokenizer.encode_special_tokens = True
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer
