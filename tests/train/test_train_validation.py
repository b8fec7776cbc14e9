"""Validation: the mean over targets, and the bytes of exactly the text that was read."""

import json
import math
import random
from pathlib import Path

import pytest
from rich.console import Console
from test_train_step import plain_nats
from tiny_run import metrics, write_recipe
from trainers import Build

from lrnn_lm.data import validation_batches
from lrnn_lm.data.encode import Encoder
from lrnn_lm.data.tokenize import TokenizerRecipe, read_facts, train
from lrnn_lm.recipe import load_recipe
from lrnn_lm.train.build import build_trainer, prepare_data
from lrnn_lm.train.loop import Trainer
from lrnn_lm.train.validate import bytes_read

SCRIPTS = {"latin": "the state of a recurrence", "han": "状态与输入混合在一起", "emoji": "🙂🙃 naïve é 🚀 ok"}


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A recipe over documents of very different bytes a token; all but a few are held out."""
    folder = tmp_path_factory.mktemp("mixed")
    rng = random.Random(1)
    texts = [
        "".join(rng.choices(text.split() if script == "latin" else list(text), k=rng.randint(30, 90)))
        for _ in range(20)
        for script, text in SCRIPTS.items()
    ]
    texts = [text + chr(0x5000 + 7 * i) for i, text in enumerate(texts)]  # rare characters become bytes
    (folder / "text.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    (folder / "tokenizer.yaml").write_text("{model_type: bpe, vocab_size: 340, character_coverage: 0.98}\n")
    recipe = write_recipe(folder)
    recipe.write_text(recipe.read_text().replace("validation_fraction: 0.1", "validation_fraction: 0.7"))
    return recipe


def build_mixed(recipe: Path, runs: Path, *overrides: str) -> Trainer:
    loaded = load_recipe(recipe, [f"train.runs_dir={runs}", "train.tokens=512", *overrides])
    return build_trainer(loaded, Console(quiet=True))


@pytest.mark.parametrize("tokens", [64, 192, 1024, 2048, 10**6])
def test_bits_per_byte_counts_the_bytes_of_the_part_that_was_read(
    mixed: Path, tmp_path: Path, tokens: int
) -> None:
    """By hand: the bytes that each target of the rows read spells, as its token says."""
    trainer = build_mixed(mixed, tmp_path, f"eval.tokens={tokens}")
    trainer.run()
    nats = num_bytes = 0
    for batch in validation_batches(trainer.prepared.validation, 64, 4, tokens):
        nats += plain_nats(trainer.bare_model, batch)[0]
        labels = batch["labels"][batch["labels"] != -100].tolist()
        num_bytes += sum(map(spelt, trainer.tokenizer.convert_ids_to_tokens(labels)))
    held_out = trainer.prepared.validation
    overall = num_bytes * held_out.num_tokens / held_out.num_bytes
    assert tokens > 10**5 or abs(overall / tokens - 1) > 0.01  # the whole text's ratio would show
    line = next(line for line in metrics(trainer.folder) if "bits_per_byte" in line)
    assert line["bits_per_byte"] == pytest.approx(nats / math.log(2) / num_bytes, rel=1e-5)


def spelt(token: str) -> int:
    """Bytes of a token of our own tokenizers."""
    if token in ("<s>", "</s>"):
        return 0
    return 1 if token.startswith("<0x") else len(token.encode())


def test_every_row_count_has_its_bytes(mixed: Path) -> None:
    """From one row to all: what the tokens of the stream spell, up to the last one read."""
    prepared = prepare_data(load_recipe(mixed), progress=False)
    shards = prepared.validation
    tokens = json.loads((prepared.tokenizer_dir / "tokenizer.json").read_text())["model"]["vocab"]
    names = {number: token for token, number in tokens.items()}
    sizes = [spelt(names[i]) for i in shards.read(0, shards.num_tokens).tolist()]
    rows = -(-(shards.num_tokens - 1) // 16)
    found = [bytes_read(prepared, 16, 16 * count) for count in range(1, rows + 1)]
    assert found == [sum(sizes[: 16 * count + 1]) for count in range(1, rows + 1)]
    assert found[-1] == shards.num_bytes
    assert bytes_read(prepared, 16, 1) == bytes_read(prepared, 16, 31) == found[0], (
        "a row at least, whole rows"
    )


def byte_level(folder: Path, texts: list[str], blank: bool = False) -> None:
    """GPT-2's kind: bytes as letters, offsets without the blanks; `blank`: one is put before a text."""
    from transformers import PreTrainedTokenizerFast

    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=blank)
    core.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    core.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet))
    core.add_special_tokens(["<e>"])
    core.post_processor = processors.ByteLevel(trim_offsets=True)
    PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<e>").save_pretrained(folder)


def own(folder: Path, texts: list[str]) -> None:
    train([SCRIPTS["latin"]] * 9, TokenizerRecipe(vocab_size=280), folder)  # all else becomes bytes


@pytest.mark.parametrize("make", [byte_level, own])
def test_bytes_of_any_number_of_tokens(make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Within characters, blanks and pieces; a text that holds U+2581 and U+FFFD."""
    monkeypatch.setattr("lrnn_lm.data.encode.WINDOW", 40)
    monkeypatch.setattr("lrnn_lm.data.windows.OVERLAP", 16)
    text = " ".join(SCRIPTS.values()) + "  two blanks \u2581 \ufffd <0xE6> end\n" * 3
    make(tmp_path, [text])
    encoder = Encoder(tmp_path, read_facts(tmp_path))
    tokens = [encoder._tokenizer.id_to_token(i) for i in encoder(text)]
    one = len if make is byte_level else spelt
    sizes = [0, *map(one, tokens[1:-1]), 0]
    assert sum(sizes) == len(text.encode())
    counted = [encoder.bytes_of(text, count) for count in range(1, len(tokens) + 1)]
    assert counted == [sum(sizes[:count]) for count in range(1, len(tokens) + 1)]


def test_a_blank_that_a_tokenizer_puts_before_a_text_spells_nothing(tmp_path: Path) -> None:
    """Llama 2's kind: the blank's offsets are those of the first character."""
    from transformers import PreTrainedTokenizerFast

    from tokenizers import Tokenizer, models, normalizers

    vocab = {token: i for i, token in enumerate(["<s>", "\u2581", "a", "<0xC3>", "<0xA9>"])}
    core = Tokenizer(models.BPE(vocab, [], byte_fallback=True))
    core.normalizer = normalizers.Sequence(
        [normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")]
    )
    PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>", eos_token="<s>").save_pretrained(tmp_path)
    encoder = Encoder(tmp_path, read_facts(tmp_path))
    for text, sizes in {
        "a \u00e9": [0, 0, 1, 1, 1, 1, 0],
        "\u00e9": [0, 0, 1, 1, 0],
        " a": [0, 0, 1, 1, 0],
    }.items():
        counted = [encoder.bytes_of(text, count) for count in range(1, len(encoder(text)) + 1)]
        assert counted == [sum(sizes[:count]) for count in range(1, len(sizes) + 1)]


@pytest.mark.parametrize("merged", [False, True])
def test_a_blank_that_a_byte_level_tokenizer_puts_before_a_text_spells_nothing(
    tmp_path: Path, merged: bool
) -> None:
    """Also where it is one token with the first byte of the first character."""
    text = "éa \u00e9"
    byte_level(tmp_path, ["é"] * 9 if merged else [""], blank=True)
    if merged:  # of the merges that "é" gives, the one of the blank alone
        path = tmp_path / "tokenizer.json"
        saved = json.loads(path.read_text())
        saved["model"]["merges"] = [["\u0120", "\u00c3"]]
        saved["model"]["vocab"].setdefault("\u0120\u00c3", max(saved["model"]["vocab"].values()) + 2)
        path.write_text(json.dumps(saved))
    encoder = Encoder(tmp_path, read_facts(tmp_path))
    tokens = [encoder._tokenizer.id_to_token(i) for i in encoder(text)]
    # With the merge the blank before the second character is in a token with its first byte, too.
    sizes = [0, 1, 1, 1, 2, 1, 0] if merged else [0, 0, 1, 1, 1, 1, 1, 1, 0]
    assert len(tokens) == len(sizes), tokens
    counted = [encoder.bytes_of(text, count) for count in range(1, len(tokens) + 1)]
    assert counted == [sum(sizes[:count]) for count in range(1, len(sizes) + 1)]


def test_an_unknown_character_counts_for_what_it_is(tmp_path: Path) -> None:
    """A tokenizer without bytes has one token for all of it."""
    train([SCRIPTS["latin"]] * 9, TokenizerRecipe(vocab_size=24, byte_fallback=False), tmp_path)
    encoder = Encoder(tmp_path, read_facts(tmp_path))
    text = "the 状态 state"
    tokens = [encoder._tokenizer.id_to_token(i) for i in encoder(text)]
    after = tokens.index("<unk>") + 1
    assert encoder.bytes_of(text, after) == len("the 状态".encode())


def test_the_loss_is_a_mean_over_targets_not_over_batches(build: Build) -> None:
    """The last batch of the whole held-out text is one short row; each of its targets counts like any."""
    trainer = build("eval.tokens=1M", "train.tokens=512", "train.micro_batch=3")
    trainer.run()
    batches = list(validation_batches(trainer.prepared.validation, 64, 3))
    parts = [plain_nats(trainer.bare_model, batch) for batch in batches]
    expected = sum(nats for nats, _ in parts) / sum(count for _, count in parts)
    by_batch = sum(nats / count for nats, count in parts) / len(parts)
    assert abs(by_batch / expected - 1) > 1e-5
    line = next(line for line in metrics(trainer.folder) if "validation_loss" in line)
    assert line["validation_loss"] == pytest.approx(expected, rel=1e-6)
