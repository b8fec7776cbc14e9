"""Classifiers and reward models made of language models: scores of rows and of tokens, padded anyhow."""

import pytest
import torch
from datasets import Dataset
from small_models import OF_EACH_STATE, VOCAB, close, small_model, tokens
from tolerances import TOLERANCE
from transformers import (
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    AutoTokenizer,
    DataCollatorForTokenClassification,
    DataCollatorWithPadding,
    Trainer,
    TrainingArguments,
    pipeline,
)

from lrnn_lm.runs.load import load_checkpoint
from lrnn_lm.train.info import print_info

LENGTHS = (9, 4, 1, 7)
PAD = 1  # EOS too, as in the tokenizers that this project makes
SUMS = TOLERANCE["other order of sums"]


@pytest.fixture
def classifier(tmp_path):
    """A function from a name in small_models to a classifier that was made of it, saved and read again."""

    def make(name: str = "bd_lru", kind=AutoModelForSequenceClassification, **options):
        small_model(name).save_pretrained(tmp_path / "language")
        torch.manual_seed(0)
        made, told = kind.from_pretrained(tmp_path / "language", output_loading_info=True, **options)
        assert (told["missing_keys"], told["unexpected_keys"]) == ({"score.weight"}, {"lm_head.weight"})
        made.save_pretrained(tmp_path / "made")
        again, told = kind.from_pretrained(tmp_path / "made", output_loading_info=True)
        assert not told["missing_keys"] | told["unexpected_keys"]
        assert again.num_labels == options.get("num_labels", 2)
        return again.eval()

    return make


def rows() -> list[torch.Tensor]:
    """Rows whose last token is the padding token: an EOS."""
    return [torch.cat([ids[:n], torch.tensor([PAD])]) for ids, n in zip(tokens(4, 9), LENGTHS, strict=True)]


def padded(side: str) -> dict[str, torch.Tensor]:
    width = max(LENGTHS) + 1
    ids, mask = torch.full((len(LENGTHS), width), PAD), torch.zeros(len(LENGTHS), width, dtype=torch.long)
    for b, row in enumerate(rows()):
        where = slice(width - len(row), None) if side == "left" else slice(len(row))
        ids[b, where], mask[b, where] = row, 1
    return {"input_ids": ids, "attention_mask": mask}


@torch.no_grad()
@pytest.mark.parametrize("name", OF_EACH_STATE)
def test_a_row_has_the_scores_of_its_last_token(name, classifier):
    model = classifier(name, num_labels=3)
    hidden = [model.model(row.unsqueeze(0)).last_hidden_state[:, -1] for row in rows()]
    alone = model.score(torch.cat(hidden))
    assert (alone[0] - alone[1]).abs().max() > 1e-3
    for pad in (None, PAD):
        model.config.pad_token_id = pad
        for side in ("left", "right"):
            batch = padded(side)
            close(model(**batch).logits, alone, SUMS)
            embeds = model.get_input_embeddings()(batch["input_ids"])
            close(model(inputs_embeds=embeds, attention_mask=batch["attention_mask"]).logits, alone, SUMS)
        if pad is None:
            close(model(rows()[0].unsqueeze(0)).logits, alone[:1], SUMS)


@torch.no_grad()
def test_without_a_mask_rows_end_before_the_padding_token(classifier):
    model, ids = classifier(), padded("right")["input_ids"]
    model.config.pad_token_id = PAD
    alone = torch.cat([model(row[:-1].unsqueeze(0)).logits for row in rows()])
    close(model(ids).logits, alone, SUMS)
    model.config.pad_token_id = None
    with pytest.raises(ValueError, match=r"pass attention_mask \(rows, tokens\), or set"):
        model(ids)


@torch.no_grad()
def test_a_mask_that_tells_no_padding(classifier):
    """Of prefixes, or any 4-d one in a graph: as without a mask, by the padding token."""
    model, batch = classifier("attention"), padded("right")
    model.config.pad_token_id = VOCAB - 1
    ids = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, VOCAB - 1)
    T = ids.shape[1]
    prefix = batch["attention_mask"].bool()[:, None, None].expand(-1, 1, T, T)
    causal = prefix & torch.ones(T, T, dtype=torch.bool).tril()
    compiled = torch.compile(model, backend="eager")
    close(compiled(ids, attention_mask=causal).logits, model(**batch | {"input_ids": ids}).logits, SUMS)
    last = batch["attention_mask"].sum(1) - 1
    hidden = model.model(ids, attention_mask=prefix).last_hidden_state[torch.arange(len(ids)), last]
    close(model(ids, attention_mask=prefix).logits, model.score(hidden), SUMS)


@torch.no_grad()
@pytest.mark.parametrize("name", ["bd_lru", "hybrid"])
def test_a_row_is_one_document(name, classifier):
    model, batch = classifier(name), padded("left")
    begins = batch["attention_mask"].cumsum(1) == 1
    close(model(**batch, reset=begins).logits, model(**batch).logits, SUMS)
    inside = torch.zeros_like(begins)
    inside[0, 3] = True
    for packed in ({"reset": inside}, {"seq_idx": inside.int().cumsum(1).int()}):
        with pytest.raises(ValueError, match="several documents"):
            model(**batch, **packed)


@torch.no_grad()
@pytest.mark.parametrize("name", ["bd_lru", "hybrid"])
def test_scores_of_tokens(name, classifier):
    """Each document's as alone, and a loss over the labels that there are, not shifted."""
    model, ids = classifier(name, AutoModelForTokenClassification, num_labels=3), tokens(1, 12)
    reset = torch.arange(12).unsqueeze(0) == 5
    labels = torch.tensor([[0, 1, -100, 2, 1, 0, 0, -100, 1, 2, 2, 1]])
    got = model(ids, reset=reset, labels=labels)
    alone = torch.cat([model(ids[:, :5]).logits, model(ids[:, 5:]).logits], dim=1)
    close(got.logits, alone, SUMS)
    close(got.loss, torch.nn.functional.cross_entropy(alone[0], labels[0]), SUMS)


PROBLEMS = {  # kind, number of classes, label of a row of n tokens
    "classes": (AutoModelForSequenceClassification, 3, lambda n: n % 3),
    "several classes": (AutoModelForSequenceClassification, 3, lambda n: [1.0, n % 2.0, 0.0]),
    "a number": (AutoModelForSequenceClassification, 1, lambda n: n / 4),
    "a whole number": (AutoModelForSequenceClassification, 1, lambda n: n),
    "tokens": (AutoModelForTokenClassification, 3, lambda n: [n % 3] * n + [-100]),
}


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("problem", PROBLEMS)
def test_a_step_is_the_same_in_any_micro_batches(problem, side, classifier, tokenizer, tmp_path, monkeypatch):
    kind, classes, label = PROBLEMS[problem]
    data = [
        {"input_ids": row.tolist(), "attention_mask": [1] * len(row), "labels": label(len(row) - 1)}
        for row in rows()
    ]
    losses, weights = [], []
    for size, steps in ((4, 1), (2, 2), (1, 4)):
        model = classifier("bd_lru", kind, num_labels=classes)
        monkeypatch.setattr(tokenizer, "padding_side", side)
        collator = DataCollatorForTokenClassification if problem == "tokens" else DataCollatorWithPadding
        arguments = TrainingArguments(
            tmp_path, max_steps=1, per_device_train_batch_size=size, gradient_accumulation_steps=steps,
            report_to=[], use_cpu=True, disable_tqdm=True, logging_steps=1, learning_rate=0.01, optim="sgd",
            max_grad_norm=0, save_strategy="no",
        )  # fmt: skip
        trainer = Trainer(model, arguments, collator(tokenizer), data)
        trainer.train()
        losses.append(trainer.state.log_history[0]["loss"])
        weights.append(model.score.weight.detach())
    assert losses[1:] == pytest.approx([losses[0]] * 2, abs=2e-4)  # the Trainer rounds what it logs
    for other in weights[1:]:
        close(other, weights[0], SUMS)


def test_labels_that_do_not_fit_are_refused(classifier):
    """Some of them were broadcast, or read row by row in another order."""
    for classes, shapes in ((1, [(2,), (), (4, 4), (1, 4)]), (3, [(2,), (), (4, 2), (3, 4), (12,)])):
        model = classifier(num_labels=classes)
        for shape in shapes:
            with pytest.raises(ValueError, match=r"labels of shape \(.*\) do not fit scores of shape \(4, "):
                model(**padded("left"), labels=torch.ones(shape))
    model, batch = classifier(kind=AutoModelForTokenClassification), padded("left")
    T = batch["input_ids"].shape[1]
    for shape in ((4,), (4, T - 1), (T, 4), (4 * T,)):
        with pytest.raises(ValueError, match=r"labels of shape \(.*\) do not fit inputs of shape \(4, 1"):
            model(**batch, labels=torch.ones(shape, dtype=torch.long))


def test_a_loss_is_in_fp64_where_the_model_is(classifier):
    batch = padded("right")
    of_tokens = batch["input_ids"] % 2
    for kind, own in (
        (AutoModelForSequenceClassification, of_tokens[:, 0]),
        (AutoModelForTokenClassification, of_tokens),
    ):
        for dtype, want in ((torch.float64, torch.float64), (torch.bfloat16, torch.float32)):
            assert classifier(kind=kind).to(dtype)(**batch, labels=own).loss.dtype == want


def test_a_batch_of_tokens_without_labels_has_no_loss(classifier):
    """Its mean would be no number, and that of all micro-batches with it."""
    model, batch = classifier(kind=AutoModelForTokenClassification), padded("right")
    assert model(**batch, labels=torch.full_like(batch["input_ids"], -100)).loss == 0


@pytest.mark.parametrize("labels", [[1, -100, 2, 0], [1.5, -100.0, 2.0, 0.0]], ids=str)
def test_a_batch_has_the_loss_of_its_rows(labels, classifier):
    """With a row without a class, whose mean alone is no number; of numbers -100 is one."""
    of_numbers = isinstance(labels[0], float)
    model = classifier(num_labels=1 if of_numbers else 3).double()
    batch = padded("right") | {"labels": torch.tensor(labels)}
    counted = {"num_items_in_batch": torch.tensor(3)}  # by the Trainer: all but -100
    rows_alone = [{name: each[b : b + 1] for name, each in batch.items()} for b in range(4)]
    parts = [model(**row, **counted).loss for row in rows_alone]
    close(torch.stack(parts).sum(), model(**batch, **counted).loss, SUMS)


@pytest.mark.parametrize("kind", [AutoModelForSequenceClassification, AutoModelForTokenClassification])
def test_it_is_not_counted_as_a_language_model(kind, classifier, tmp_path):
    classifier("bd_lru", kind)
    with pytest.raises(ValueError, match=f"{tmp_path}/made: a classifier, which is no language model"):
        print_info(str(tmp_path / "made"))


def test_rewards_by_trl(make_checkpoint, tmp_path):
    """Trained from a checkpoint's folder, saved, and asked through a pipeline; no language model any more."""
    trl = pytest.importorskip("trl", reason="TRL is not installed: pip install 'lrnn-lm[finetune]'")
    pair = {"chosen": "The gardener walked to the river.", "rejected": "A compiler reads"}
    arguments = trl.RewardConfig(
        tmp_path / "run", max_steps=12, per_device_train_batch_size=4, report_to=[], use_cpu=True, bf16=False,
        save_strategy="no", logging_steps=1, learning_rate=1e-2, disable_tqdm=True, max_length=64,
    )  # fmt: skip
    trainer = trl.RewardTrainer(
        str(make_checkpoint("hybrid")), arguments, train_dataset=Dataset.from_list([pair] * 8)
    )
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < 0.5 * losses[0]
    trainer.save_model(tmp_path / "reward")
    AutoTokenizer.from_pretrained(make_checkpoint("hybrid")).save_pretrained(tmp_path / "reward")
    reward = pipeline("text-classification", model=str(tmp_path / "reward"), function_to_apply="none")
    better, worse = reward([pair["chosen"], pair["rejected"]], batch_size=2)
    assert better["score"] > worse["score"]
    with pytest.raises(ValueError, match="a classifier, which is no language model"):
        load_checkpoint(tmp_path / "reward")
