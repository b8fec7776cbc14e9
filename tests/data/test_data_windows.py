"""Long documents and prompts, tokenised window by window: the tokens of the whole text, for every kind of
tokenizer that people bring.
"""

import random
from functools import cache, partial

import pytest
from corpora import make_texts

from lrnn_lm.data import windows
from lrnn_lm.data.encode import Encoder
from lrnn_lm.data.tokenize import read_facts
from lrnn_lm.data.windows import encode_stream
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers

BYTES, SPACES = pre_tokenizers.ByteLevel, pre_tokenizers.Metaspace
WORDS = Regex(r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")
LLAMA_2 = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
KINDS = {  # normalizer, pre-tokenizer, model
    "llama-2": (LLAMA_2, None, "bpe"),
    "llama-2, converted anew": (None, SPACES(prepend_scheme="first", split=False), "bpe"),
    "a space before every word": (None, SPACES(prepend_scheme="always"), "bpe"),
    "gpt-2": (None, BYTES(add_prefix_space=False), "bpe"),
    "gpt-2, a space first": (None, BYTES(add_prefix_space=True), "bpe"),
    "llama-3": (
        None,
        pre_tokenizers.Sequence([pre_tokenizers.Split(WORDS, "isolated"), BYTES(use_regex=False)]),
        "bpe",
    ),
    "t5": (normalizers.NFKC(), SPACES(), "unigram"),
    "bert": (normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer(), "wordpiece"),
    "stripped": (normalizers.Strip(), BYTES(add_prefix_space=False), "bpe"),
}


@cache
def tokenizer_of(kind: str) -> Tokenizer:
    normalizer, words, name = KINDS[kind]
    trainer = {
        "bpe": trainers.BpeTrainer, "unigram": trainers.UnigramTrainer, "wordpiece": trainers.WordPieceTrainer
    }[name]  # fmt: skip
    model = {
        "bpe": lambda: models.BPE(unk_token="<unk>"),
        "unigram": models.Unigram,
        "wordpiece": lambda: models.WordPiece(unk_token="<unk>"),
    }[name]()
    tokenizer = Tokenizer(model)
    if normalizer:
        tokenizer.normalizer = normalizer
    if words:
        tokenizer.pre_tokenizer = words
    texts = make_texts(150) + ["=" * 64, " " * 64 + "a"] * 5
    lines = [line for text in texts for line in text.splitlines()]
    settings = {"unk_token": "<unk>"} if name == "unigram" else {}
    if "gpt" in kind or kind in ("llama-3", "stripped"):
        settings["initial_alphabet"] = BYTES.alphabet()
    settings |= {"vocab_size": 600, "special_tokens": ["<unk>", "<s>", "</s>"], "show_progress": False}
    tokenizer.train_from_iterator(texts if words else lines, trainer(**settings))
    return tokenizer


@cache
def mixed_text() -> str:
    """Prose with what is hard to cut: long runs, words longer than an overlap, no spaces at all, emoji."""
    rng = random.Random(0)
    hard = [
        "=" * 700,
        " " * 900,
        "\n" * 500,
        "两个字符" * 100,
        "naïve 🙂🙂 ",
        "\t\t",
        "ab" * 300,
        "x" * 800,
        "",
    ]
    return "".join(text + rng.choice(hard)[: rng.randint(1, 900)] for text in make_texts(150))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("window", [4001, 20_000])
def test_tokens_of_the_whole(kind: str, window: int) -> None:
    tokenizer, text = tokenizer_of(kind), mixed_text()
    encode = partial(tokenizer.encode, add_special_tokens=False)
    pieces = [text[start : start + window] for start in range(0, len(text), window)]
    assert len(pieces) > 3
    assert [token for ids in encode_stream(pieces, encode) for token in ids] == encode(text).ids


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("character", [" ", "\n", "x"])
def test_runs_longer_than_the_overlap(kind: str, character: str) -> None:
    tokenizer = tokenizer_of(kind)
    text = make_texts(1)[0] * 20 + character * 3001 + make_texts(1)[0] * 20
    encode = partial(tokenizer.encode, add_special_tokens=False)
    want = encode(text).ids
    for start in range(4000, 9000, 700):  # the seam before, in and after the run
        pieces = [text[:start], text[start:]]
        got = [token for ids in encode_stream(pieces, encode) for token in ids]
        assert got == want, start


def test_pieces_of_any_size_and_none() -> None:
    encode = partial(tokenizer_of("llama-2").encode, add_special_tokens=False)
    text = mixed_text()[:9000]
    for size in (1, 7, 2500, 9000):
        pieces = [text[start : start + size] for start in range(0, len(text), size)]
        assert [token for ids in encode_stream(pieces, encode) for token in ids] == encode(text).ids
    assert list(encode_stream([], encode)) == []
    assert [ids for ids in encode_stream(["", ""], encode) if ids] == []


def test_memory_stays_that_of_a_few_windows() -> None:
    """A run without end is cut sooner or later, rather than read again as a whole for every window."""
    longest = 0
    encode = partial(tokenizer_of("llama-2").encode, add_special_tokens=False)

    def watched(text: str):
        nonlocal longest
        longest = max(longest, len(text))
        return encode(text)

    for character in " =x":
        pieces = []
        for ids in encode_stream([character * 4000] * 30, watched):
            pieces += [tokenizer_of("llama-2").id_to_token(token) for token in ids]
        assert 120_000 <= len("".join(pieces)) <= 120_000 + 30, "a space more at a cut, and nothing lost"
    assert longest < 3 * 4000


@pytest.mark.parametrize("kind", ["llama-2", "gpt-2, a space first"])
def test_long_documents_and_prompts_have_no_stray_tokens(
    kind: str, tmp_path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    from lrnn_lm.evaluate.prompt import stream_ids

    names = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer_of(kind), **names).save_pretrained(tmp_path)
    monkeypatch.setattr("lrnn_lm.data.encode.WINDOW", 5000)
    text = mixed_text()
    facts = read_facts(tmp_path)
    whole = tokenizer_of(kind).encode(text, add_special_tokens=False).ids
    assert Encoder(tmp_path, facts)(text).tolist() == [facts.first, *whole, facts.last]
    pieces = [text[start : start + 5000] for start in range(0, len(text), 5000)]
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    assert [token for ids in stream_ids(tokenizer, pieces) for token in ids] == [facts.first, *whole]
    assert windows.WINDOW == 100_000, "what training and prompts cut by"
