"""The model card tells what the run knows, and leaves out what it does not."""

import copy
import errno
import json
from pathlib import Path

import pytest
import yaml
from tokenizers.processors import TemplateProcessing

from lrnn_lm.evaluate.reporting.card import model_card, write_export_card, write_run_card
from lrnn_lm.recipe import dump_recipe, load_recipe


@pytest.fixture
def run(make_checkpoint, tmp_path):
    """A run with everything that a card is made of."""
    checkpoint = make_checkpoint("hybrid")
    run = checkpoint.parents[1]
    (run / "checkpoints" / "latest").symlink_to(checkpoint.name)
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        "name: tiny\nmodel: {hidden_size: 16, num_hidden_layers: 2, intermediate_size: 24}\n"
        "data: {source: {type: python-docs}, tokenizer: tokenizers/bpe-4k.yaml, sequence_length: 32}\n"
        "train: {tokens: 2K, tokens_per_step: 64, micro_batch: 2}\n"
    )
    (run / "recipe.yaml").write_text(dump_recipe(load_recipe(recipe, [])))
    split = {"num_tokens": 12345, "num_documents": 67, "num_bytes": 89012, "shards": []}
    manifest = {
        "source": {"type": "python-docs", "path": None},
        "tokenizer": {"name": "some/folder/words.yaml", "vocab_size": 53},
        "splits": {"train": split, "validation": split},
        "content_hash": "0123456789abcdef" * 4,
    }
    (run / "data.json").write_text(json.dumps(manifest))
    line = {"step": 7, "tokens": 448, "loss": 3.25, "tokens_per_second": 100.0}
    (run / "metrics.jsonl").write_text(json.dumps(line) + "\n")
    scores = {"results": {"heldout_cloze": {"acc,none": 0.4375, "acc_stderr,none": 0.03125}}}
    (run / "eval").mkdir()
    (run / "eval" / "step-00000007-heldout_cloze.json").write_text(json.dumps(scores))
    return run


def front_matter(text: str) -> dict:
    return yaml.safe_load(text.split("---")[1])


def test_card_of_a_run(run):
    text = write_run_card(run).read_text()
    fields = front_matter(text)
    assert fields["license"] == "unknown"
    assert fields["library_name"] == "transformers"
    assert {"bd_lru", "attention", "h_lru"} <= set(fields["tags"])
    for told in (
        "# tiny\n", "this is step 7", "12,345 tokens, 67 documents, 89,012 bytes", "words.yaml, 53 tokens",
        "0.4375 ± 0.0312", "3.2500", "trust_remote_code=True", "checkpoints/latest", "sequence_length: 32",
    ):  # fmt: skip
        assert told in text, told
    assert "loss.png" not in text
    assert "None" not in text, "options that were not given are left out"


def test_a_card_that_a_person_edits_stays(run, capsys):
    """`lrnn report`, and the end of a longer run, wrote it anew without a word."""
    card = write_run_card(run)
    (run / "metrics.jsonl").write_text(json.dumps({"step": 7, "tokens": 448, "loss": 2.25}) + "\n")
    assert "2.2500" in write_run_card(run).read_text()
    assert not capsys.readouterr().err
    for edited in (card.read_text().replace("# tiny", "# Our first"), card.read_text() + "Notes", "Notes é"):
        card.write_text(edited)
        assert write_run_card(run).read_text() == edited
        assert "README.md: is edited (or of an older version), and stays" in capsys.readouterr().err
    card.unlink()
    assert "2.2500" in write_run_card(run).read_text()


def test_a_card_that_was_cut_is_no_edited_one(run, monkeypatch):
    """A process that ends while it writes leaves the card of before, not half of one, which would stay."""
    before = write_run_card(run).read_text()
    (run / "metrics.jsonl").write_text(json.dumps({"step": 7, "tokens": 448, "loss": 2.25}) + "\n")

    def cut(self, content, *args, **kwargs):
        with self.open("wb") as file:
            file.write(content[:9] if isinstance(content, bytes) else content[:9].encode())
        raise OSError(errno.ENOSPC, "No space left on device", str(self))

    with monkeypatch.context() as patch:
        for way in ("write_text", "write_bytes"):
            patch.setattr(Path, way, cut)
        with pytest.raises(OSError, match="No space"):
            write_run_card(run)
    assert (run / "README.md").read_text() == before
    assert "2.2500" in write_run_card(run).read_text()


def test_the_licence_is_the_recipes_unless_one_is_passed(run):
    stored = run / "recipe.yaml"
    stored.write_text(stored.read_text().replace("license: unknown", "license: cc-by-4.0"))
    newest = run / "checkpoints" / "latest"
    assert front_matter(model_card(newest))["license"] == "cc-by-4.0"
    assert front_matter(model_card(newest, "mit"))["license"] == "mit"


def test_card_shows_the_curve_where_it_lies(run, tmp_path):
    (run / "plots").mkdir()
    (run / "plots" / "loss.png").write_bytes(b"picture")
    assert "(plots/loss.png)" in write_run_card(run).read_text()
    target = tmp_path / "export"
    target.mkdir()
    text = write_export_card(run / "checkpoints" / "latest", target, "mit").read_text()
    assert front_matter(text)["license"] == "mit"
    assert "(loss.png)" in text
    assert (target / "loss.png").read_bytes() == b"picture"


def test_results_are_those_of_the_weights(run, tmp_path):
    """Of an earlier checkpoint nothing of other steps, and of the average nothing of the live weights."""
    lines = [
        {"step": 6, "tokens": 384, "validation_loss": 3.75, "average_validation_loss": 3.75},
        {"step": 7, "tokens": 448, "validation_loss": 3.5, "average_validation_loss": 3.25},
        {"step": 8, "tokens": 512, "loss": 2.125, "tokens_per_second": 100.0},
        {"step": 8, "tokens": 512, "validation_loss": 2.375},
    ]
    with (run / "metrics.jsonl").open("a") as file:
        file.writelines(json.dumps(line) + "\n" for line in lines)
    scores = {"results": {"heldout_cloze": {"acc,none": 0.9375}}, "checkpoint": {"step": 8}}
    (run / "eval/step-00000008-heldout_cloze.json").write_text(json.dumps(scores))
    live, average = (tmp_path / name for name in ("live", "average"))
    for folder in (live, average):
        folder.mkdir()
        write_export_card(run / "checkpoints/latest", folder, average=folder is average)
    texts = [(folder / "README.md").read_text() for folder in (live, average)]
    told = [[number in text for number in ("3.2500", "3.5000", "0.4375", "moving average")] for text in texts]
    assert told == [[True, True, True, False], [True, False, False, True]]
    assert not any(other in text for text in texts for other in ("3.7500", "2.1250", "2.3750", "0.9375"))


def test_card_of_a_checkpoint_without_a_run(make_checkpoint, tmp_path):
    folder = make_checkpoint("bd_lru").rename(tmp_path / "model")
    text = model_card(folder)
    assert text.startswith("---\nlicense: unknown\n")
    assert "# model\n" in text
    assert "block_size 3" in text
    assert "## Training" not in text
    assert "## Results" not in text


@pytest.mark.parametrize("marks", ["BOS", "EOS alone", "adds BOS itself", "none"])
def test_its_example_begins_as_documents_did(make_checkpoint, tokenizer, tmp_path, marks, capsys):
    """With BOS, once, or with EOS where there is no BOS; with neither of a synthetic task."""
    folder = make_checkpoint("bd_lru").rename(tmp_path / "model")
    own = type(tokenizer)(tokenizer_object=copy.deepcopy(tokenizer.backend_tokenizer))
    if marks != "none":
        own.eos_token = "</s>"
    if marks not in ("EOS alone", "none"):
        own.bos_token = "<s>"
    if marks == "adds BOS itself":
        own.backend_tokenizer.post_processor = TemplateProcessing("<s> $A", None, [("<s>", 1)])
    own.save_pretrained(folder)
    code = model_card(folder, folder=str(folder)).split("```python\n")[1].split("```")[0]
    names: dict = {}
    exec(code, names)
    start = {"EOS alone": [2], "none": []}.get(marks, [1])
    assert names["inputs"]["input_ids"].tolist() == [[*start, 3]]
    assert len(capsys.readouterr().out.split()) > 2


@pytest.mark.parametrize(
    ("file", "content"),
    [("recipe.yaml", "[1, 2]"), ("recipe.yaml", "name: tiny\nseed: 0\n"), ("parent.json", '{"step": 1}')],
)
def test_what_a_half_copied_run_holds_is_named(run, tmp_path, file, content):
    (run / file).write_text(content)
    with pytest.raises(ValueError, match=r"recipe.yaml or parent.json is not a run's \(damaged\?\)"):
        write_run_card(run)


def test_card_of_no_checkpoint(tmp_path):
    with pytest.raises(ValueError, match="no such checkpoint"):
        write_run_card(tmp_path)
