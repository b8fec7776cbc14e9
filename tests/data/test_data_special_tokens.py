"""Control tokens: text that spells one is text wherever text is data, and one where people call a tokenizer.

Trained tokenizers and ready ones alike; the option is passed call by call and saved nowhere.
"""

import importlib
import json
import shutil
from dataclasses import replace
from functools import cache
from itertools import chain
from pathlib import Path

import pytest
from corpora import make_texts, write_jsonl, write_recipe

from lrnn_lm.data import DataSpec, PreparedData, SourceSpec, prepare, tokenizer_hash
from lrnn_lm.data.encode import Encoder
from lrnn_lm.data.tokenize import read_facts
from lrnn_lm.recipe import shipped

TRAINED, READY = ("bpe", "unigram"), ("gpt-2", "llama-2", "split before")
KINDS = (*TRAINED, *READY)


def save_ready(kind: str, folder: Path) -> None:
    """A tokenizer as people bring them: GPT-2's one control token, or Llama 2's three, "split before" with
    the option saved.
    """
    from transformers import PreTrainedTokenizerFast

    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

    controls = ["<|endoftext|>"] if kind == "gpt-2" else ["<unk>", "<s>", "</s>"]
    if kind == "gpt-2":
        core = Tokenizer(models.BPE())
        core.pre_tokenizer, core.decoder = pre_tokenizers.ByteLevel(False), decoders.ByteLevel()
        alphabet, names = (
            pre_tokenizers.ByteLevel.alphabet(),
            {"bos_token": controls[0], "eos_token": controls[0]},
        )
    else:
        core = Tokenizer(models.BPE(unk_token="<unk>"))
        core.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        core.decoder = decoders.Sequence(
            [decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 1)]
        )
        alphabet = [chr(c) for c in range(32, 127)] + ["\n"]
        names = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}
    settings = {"vocab_size": 400, "special_tokens": controls, "show_progress": False}
    lines = [line for text in make_texts(40) for line in text.splitlines()]
    core.train_from_iterator(lines, trainers.BpeTrainer(initial_alphabet=alphabet, **settings))
    split = {"split_special_tokens": True} if kind == "split before" else {}
    PreTrainedTokenizerFast(tokenizer_object=core, **names, **split).save_pretrained(folder)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory):
    """Data prepared with a tokenizer of a kind, from texts some of which spell its control tokens."""

    @cache
    def make(kind: str) -> PreparedData:
        folder = tmp_path_factory.mktemp("special")
        if kind in TRAINED:
            tokenizer = write_recipe(folder / "r.yaml", model_type=kind, vocab_size=350)
        else:
            save_ready(kind, tokenizer := folder / "ready")
        spelt = [f"It ends with {' '.join(controls(kind))}, number {k}." for k in range(20)]
        source = write_jsonl(
            folder / "x.jsonl", [text for pair in zip(make_texts(20), spelt, strict=True) for text in pair]
        )
        return prepare(
            DataSpec(
                source=SourceSpec(type="jsonl", path=str(source)), tokenizer=str(tokenizer),
                validation_fraction=0.3, sequence_length=16, cache_dir=str(folder / "cache"), num_proc=1,
            ),
            progress=False,
        )  # fmt: skip

    return make


def controls(kind: str) -> list[str]:
    return ["<|endoftext|>"] if kind == "gpt-2" else ["<s>", "</s>", "<unk>", "<pad>"]


def spelling(kind: str) -> list[str]:
    """Texts that spell control tokens: alone, first, last, inside a word, twice, with spaces around."""
    frames = ("{}", "{}and more", "before {}", "in{}side", "{}{}", " {} ", "\n{}\n", "a {} b {} c")
    return [frame.replace("{}", token) for frame in frames for token in controls(kind)]


@pytest.fixture(scope="module")
def live(made):
    """A model with the tokenizer of a kind, as `lrnn eval` holds it."""
    from transformers import AutoTokenizer

    from lrnn_lm import LRNNConfig, LRNNForCausalLM
    from lrnn_lm.evaluate.lm import LiveLM
    from lrnn_lm.runs.load import document_start

    @cache
    def make(kind: str) -> LiveLM:
        tokenizer = AutoTokenizer.from_pretrained(made(kind).tokenizer_dir)
        config = LRNNConfig(
            vocab_size=len(tokenizer), hidden_size=8, num_hidden_layers=1, intermediate_size=8,
            mixer={"type": "bd_lru", "num_blocks": 2, "block_size": 2},
        )  # fmt: skip
        model = LRNNForCausalLM(config)
        start = document_start(model, tokenizer)
        return LiveLM(model, tokenizer, batch_size=1, max_length=64, start=start)

    return make


@pytest.mark.parametrize("kind", KINDS)
def test_training_scores_and_prompts_read_the_same(kind: str, made, live) -> None:
    from lrnn_lm.evaluate.prompt import prompt_ids

    tokenizer_dir, lm = made(kind).tokenizer_dir, live(kind)
    encoder = Encoder(tokenizer_dir, facts := read_facts(tokenizer_dir))
    special = set(lm.tokenizer.all_special_ids)
    for text in [*spelling(kind), *make_texts(3)]:
        ids = encoder(text).tolist()
        body = ids[1:-1]
        assert (ids[0], ids[-1]) == (facts.first, facts.last)
        assert not special & set(body), text
        assert lm.tok_encode(text, add_special_tokens=False) == body
        assert lm.tok_encode(text) == [facts.first, *body]
        assert prompt_ids(lm.tokenizer, text) == [facts.first, *body]
        assert lm.tokenizer.decode(body) == text
        context, answer = lm._encode_pair("Question:", " " + text)
        assert not special & {*context[1:], *answer}


@pytest.mark.parametrize("kind", KINDS)
def test_shards_hold_what_is_scored(kind: str, made, live) -> None:
    data, lm = made(kind), live(kind)
    shards, special = data.validation, set(lm.tokenizer.all_special_ids)
    starts = [*shards.document_starts(0, shards.num_tokens).tolist(), shards.num_tokens]
    texts = [json.loads(line)["text"] for line in data.heldout_path.read_text().splitlines()]
    assert any(controls(kind)[0] in text for text in texts)
    for text, start, end in zip(texts, starts[:-1], starts[1:], strict=True):
        body = shards.read(start + 1, end - 1).tolist()
        assert lm.tok_encode(text, add_special_tokens=False) == body
        assert not special & set(body)


@pytest.mark.parametrize("kind", KINDS)
def test_the_option_is_saved_nowhere(kind: str, made, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    folders = [made(kind).tokenizer_dir, tmp_path]
    tokenizer = AutoTokenizer.from_pretrained(folders[0])
    tokenizer("</s>", split_special_tokens=True)
    tokenizer.save_pretrained(tmp_path)
    for folder in folders:
        config = json.loads((folder / "tokenizer_config.json").read_text())
        assert not config.get("split_special_tokens", False)
        assert "split_special_tokens" not in (folder / "tokenizer.json").read_text()
    assert tokenizer_hash(tmp_path) == tokenizer_hash(folders[0])


@pytest.mark.parametrize("kind", KINDS)
def test_people_call_it_as_any_tokenizer(kind: str, made) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(made(kind).tokenizer_dir)
    for name in ("bos_token", "eos_token"):
        token, number = getattr(tokenizer, name), getattr(tokenizer, f"{name}_id")
        assert tokenizer(f"{token}a{token}").input_ids.count(number) == 2
        assert number not in tokenizer(f"{token}a{token}", split_special_tokens=True).input_ids
        assert tokenizer(f"{token}a{token}").input_ids.count(number) == 2, "one call does not change the next"
        assert tokenizer([f"a{token}"] * 2).input_ids[1][-1] == number


@pytest.mark.parametrize("kind", KINDS)
def test_chat_templates_and_added_markers(kind: str, made, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(made(kind).tokenizer_dir)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|user|>", "<|model|>"]})
    tokenizer.chat_template = (
        "{{ bos_token }}{% for m in messages %}<|{{ m.role }}|>{{ m.content }}{{ eos_token }}{% endfor %}"
        "{% if add_generation_prompt %}<|model|>{% endif %}"
    )
    tokenizer.save_pretrained(tmp_path)
    for own in (tokenizer, AutoTokenizer.from_pretrained(tmp_path)):
        user, model = own.convert_tokens_to_ids(["<|user|>", "<|model|>"])
        chat = [{"role": "user", "content": "the state"}, {"role": "model", "content": "mixes"}]
        ids = own.apply_chat_template(chat, add_generation_prompt=True, return_dict=False)
        marks = [token for token in ids if token in {user, model, own.bos_token_id, own.eos_token_id}]
        assert marks == [own.bos_token_id, user, own.eos_token_id, model, own.eos_token_id, model]
        assert len(ids) - len(marks) == len(own("the state").input_ids) + len(own("mixes").input_ids)


@pytest.mark.parametrize("kind", [*TRAINED, "gpt-2", "llama-2"])
def test_the_shipped_chat_template(kind: str, made) -> None:
    """A prompt's tokens begin the whole chat, and the mask of answers is their tokens and EOS, exactly."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(made(kind).tokenizer_dir)
    tokenizer.chat_template = shipped("tokenizers/chat.jinja").read_text()
    begin, end = tokenizer.bos_token_id, tokenizer.eos_token_id
    texts = ["It is\n", "\n the state", " mixes  what", "\n\nit has read. "]
    chat = [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)]
    parts = [tokenizer(text, add_special_tokens=False).input_ids for text in texts]
    whole = tokenizer.apply_chat_template(chat, return_assistant_tokens_mask=True, return_dict=True)
    pairs = list(zip(whole["input_ids"], whole["assistant_masks"], strict=True))
    assert [token for token, answered in pairs if answered] == [*parts[1], end, *parts[3], end]
    roles = [tokenizer(message["role"], add_special_tokens=False).input_ids for message in chat]
    written = [[begin, *role, begin, *part, end] for role, part in zip(roles, parts, strict=True)]
    assert whole["input_ids"] == [*chain(*written)]
    for asked in (1, 3):
        prompt = tokenizer.apply_chat_template(chat[:asked], add_generation_prompt=True)["input_ids"]
        assert prompt == [*chain(*written[:asked]), begin, *roles[asked], begin]


@pytest.mark.parametrize("kind", ["bpe", "split before"])
def test_checkpoints_that_saved_the_option_are_read_the_same(kind: str, made, tmp_path: Path) -> None:
    """As versions before format 3 of the data did."""
    from transformers import AutoTokenizer

    from lrnn_lm.evaluate.prompt import prompt_ids

    old = tmp_path / "old"
    shutil.copytree(made(kind).tokenizer_dir, old)
    config = json.loads((old / "tokenizer_config.json").read_text())
    (old / "tokenizer_config.json").write_text(json.dumps({**config, "split_special_tokens": True}))
    made(kind).check_tokenizer(old)
    before, now = (AutoTokenizer.from_pretrained(folder) for folder in (old, made(kind).tokenizer_dir))
    assert before.split_special_tokens
    for text in spelling(kind):
        assert prompt_ids(before, text) == prompt_ids(now, text)


@pytest.mark.parametrize("ready", [False, True])
def test_caches_of_other_formats_are_left_alone(
    spec: DataSpec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ready: bool
) -> None:
    if ready:
        save_ready("gpt-2", tmp_path / "ready")
        spec = replace(spec, tokenizer=str(tmp_path / "ready"))
    new = prepare(spec, progress=False)
    monkeypatch.setattr(importlib.import_module("lrnn_lm.data.prepare"), "FORMAT", 2)
    old = prepare(spec, progress=False)
    assert old.folder != new.folder
    assert len([f for f in (Path(spec.cache_dir) / "tokenizers").iterdir() if f.is_dir()]) == 2
    assert old.manifest["content_hash"] == new.manifest["content_hash"], (
        "a run goes on, with the tokenizer as it is saved now"
    )
