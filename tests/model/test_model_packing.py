"""Packed batches in every form that others make: equal to each example alone, or refused."""

from itertools import cycle, pairwise

import pytest
import torch
from small_models import HYBRIDS, NAMES, OF_EACH_STATE, close, in_turn, small_config, small_model, tokens
from tolerances import TOLERANCE
from torch.nn import functional as F
from transformers import DataCollatorWithFlattening, DynamicCache, Trainer, TrainingArguments

from lrnn_lm.model.autoencoder import LRNNForReconstruction

SUMS = TOLERANCE["other order of sums"]
EXACT = 1e-5  # what is asked of packed against alone
LENGTHS = (6, 1, 7, 4, 1)
BOUNDS = [0, 6, 7, 14, 18, 19]
FLASH = ("cu_seq_lens", "flash arguments", "all")
FORMS = ["position_ids", "from 2", "seq_idx", *FLASH, "4d bool", "4d added", "reset"]


def examples() -> list[dict[str, list[int]]]:
    ids = tokens(rows=1, length=sum(LENGTHS))[0].tolist()
    return [{"input_ids": ids[a:b]} for a, b in pairwise(BOUNDS)]


def flattened(form: str) -> dict[str, torch.Tensor]:
    """One row of all examples, as transformers' own collator makes it, or as a mask or `reset`."""
    asks = {
        "return_position_ids": form in ("position_ids", "from 2", "all"),
        "position_ids_start": 2 if form == "from 2" else 0,
        "return_seq_idx": form in ("seq_idx", "all"),
        "return_flash_attn_kwargs": form in FLASH,
    }
    batch = dict(DataCollatorWithFlattening(**asks)(examples()))
    if form == "cu_seq_lens":
        batch = {key: batch[key] for key in ("input_ids", "labels", "cu_seq_lens_q")}
    document = torch.repeat_interleave(torch.arange(len(LENGTHS)), torch.tensor(LENGTHS))
    seen = (document.unsqueeze(1) == document).tril()[None, None]
    if form == "4d bool":
        batch["attention_mask"] = seen
    if form == "4d added":
        batch["attention_mask"] = torch.zeros(seen.shape).masked_fill(~seen, torch.finfo(torch.float32).min)
    if form == "reset":
        batch["reset"] = torch.tensor([[t in BOUNDS for t in range(BOUNDS[-1])]])
    return batch


def alone(model):
    """Logits of every example alone, one after the other, and their mean loss in nats."""
    rows = [torch.tensor([example["input_ids"]]) for example in examples()]
    logits = [model(row, use_cache=False).logits for row in rows]
    sums = [
        F.cross_entropy(x[0, :-1], row[0, 1:], reduction="sum") for x, row in zip(logits, rows, strict=True)
    ]
    return torch.cat(logits, dim=1), sum(sums) / sum(length - 1 for length in LENGTHS)


@pytest.mark.parametrize(
    ("name", "form"),
    [*(("bd_lru", form) for form in FORMS), *zip(NAMES[1:], cycle(FORMS), strict=False)],
)
def test_flattened_examples(name, form):
    model, batch = small_model(name), flattened(form)
    want, loss = alone(model)
    got = model(**batch, use_cache=False)
    close(got.logits, want, EXACT)
    close(got.loss, loss, EXACT)
    whole = model(**{**batch, "labels": batch["input_ids"]}, use_cache=False)  # no label says where to stop
    close(whole.loss, loss, EXACT)
    loss.backward()
    expected = {key: p.grad.clone() for key, p in model.named_parameters()}
    model.zero_grad()
    got.loss.backward()
    for key, p in model.named_parameters():
        close(p.grad, expected[key], TOLERANCE["gradient"] * max(1.0, expected[key].abs().max().item()))


@pytest.mark.parametrize(
    ("name", "form"), in_turn(["position_ids", "seq_idx", "cu_seq_lens_q"], OF_EACH_STATE)
)
def test_rows_that_are_packed_differently(name, form):
    model, ids = small_model(name), tokens(rows=2, length=9)
    starts = ([0, 4, 5], [0, 8])
    reset = torch.zeros_like(ids, dtype=torch.bool)
    for row, places in zip(reset, starts, strict=True):
        row[places] = True
    index = reset.long().cumsum(1)
    first = torch.where(reset, torch.arange(9), 0).cummax(1).values
    arguments = {
        "position_ids": torch.arange(9) - first,
        "seq_idx": (index % 2).int(),  # only that it changes counts
        "cu_seq_lens_q": torch.tensor([0, 4, 5, 9, 17, 18]),
    }
    with torch.no_grad():
        got = model(ids, **{form: arguments[form]}).logits
        for row, places in enumerate(starts):
            for a, b in pairwise([*places, 9]):
                close(got[row, a:b], model(ids[row : row + 1, a:b]).logits[0], EXACT)
        all_at_once = model(ids, reset=reset, **arguments).logits
        close(all_at_once, got, EXACT)


@pytest.mark.parametrize(("name", "side"), in_turn(["left", "right"], OF_EACH_STATE))
def test_packed_and_padded_rows(name, side):
    """TRL pads packed rows, positions with 0; transformers pads positions with 0 or 1."""
    model, ids = small_model(name), tokens(rows=1, length=9)
    for value in (0, 1):
        padding, positions = torch.zeros(1, 3, dtype=torch.long), torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3, 4]])
        parts = [padding, ids] if side == "left" else [ids, padding]
        places = [padding + value, positions] if side == "left" else [positions, padding + value]
        mask = [padding, torch.ones_like(ids)] if side == "left" else [torch.ones_like(ids), padding]
        kept = slice(3, 12) if side == "left" else slice(0, 9)
        row, place, mask = (torch.cat(x, dim=1) for x in (parts, places, mask))
        with torch.no_grad():
            got = model(row, attention_mask=mask, position_ids=place, use_cache=True).logits[:, kept]
            close(got[:, :4], model(ids[:, :4]).logits, EXACT)
            close(got[:, 4:], model(ids[:, 4:]).logits, EXACT)


@pytest.mark.parametrize("name", OF_EACH_STATE)
def test_positions_of_one_document_are_no_boundaries(name):
    """Counted on, from anywhere, with gaps, through padding, and on from a cache."""
    model, ids = small_model(name), tokens(rows=2, length=9)
    mask = torch.tensor([[0, 0, 1, 1, 1, 0, 1, 1, 1], [1] * 9])
    with torch.no_grad():
        want = model(ids, attention_mask=mask).logits
        for padded in (0, 1, 7):
            positions = (mask.cumsum(1) - 1).masked_fill(mask == 0, padded)
            got = model(ids, attention_mask=mask, position_ids=positions).logits
            close(got[mask.bool()], want[mask.bool()], SUMS)
        plain = model(ids).logits
        close(model(ids, position_ids=torch.arange(9).unsqueeze(0)).logits, plain, SUMS)
        close(model(ids, position_ids=torch.arange(5, 14).expand(2, 9)).logits, plain, SUMS)
        cache = DynamicCache(config=model.config)
        parts = []
        for a, b in pairwise([0, 3, 4, 5, 9]):
            part = {"position_ids": torch.arange(a, b).unsqueeze(0), "past_key_values": cache}
            parts.append(model(ids[:, a:b], use_cache=True, **part).logits)
        close(torch.cat(parts, dim=1), plain, SUMS)
        gaps = torch.tensor([[0, 1, 2, 3, 40, 41, 42, 50, 60]])
        jumped = model(ids, position_ids=gaps).logits
    if not any("attention" in entry for entry in (name, *HYBRIDS.get(name, ()))):
        close(jumped, plain, SUMS)
    close(jumped[:, :4], plain[:, :4], SUMS)


@pytest.mark.parametrize("name", OF_EACH_STATE)
def test_packed_text_is_continued_in_passes(name):
    model, ids = small_model(name), tokens(rows=1, length=9)
    positions = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3, 4]])
    with torch.no_grad():
        want = model(ids, position_ids=positions).logits
        for cut in (1, 3, 5, 8):
            cache = model(ids[:, :cut], position_ids=positions[:, :cut], use_cache=True).past_key_values
            rest = {"position_ids": positions[:, cut:], "past_key_values": cache, "use_cache": True}
            close(model(ids[:, cut:], **rest).logits, want[:, cut:], SUMS)
        cache = model(ids[:, :4], use_cache=True).past_key_values
        rest = {"position_ids": positions[:, 4:], "past_key_values": cache, "use_cache": True}
        with pytest.raises(ValueError, match="begin again at 0 while the cache holds the tokens before"):
            model(ids[:, 4:], **rest)
        rest["position_ids"] = torch.tensor([[7, 0, 1, 2, 3]])  # the first is of padding
        with pytest.raises(ValueError, match="begin again at 0"):
            model(ids[:, 4:], attention_mask=torch.tensor([[1] * 4 + [0] + [1] * 4]), **rest)
        rest["position_ids"] = positions[:, 4:]
        reset = torch.tensor([[True, False, False, False, False]])
        close(model(ids[:, 4:], reset=reset, **rest).logits, want[:, 4:], SUMS)


@torch.no_grad()
def test_a_start_on_padding_is_the_next_tokens():
    """In a pass of two tokens too."""
    model, ids = small_model("bd_lru"), tokens(rows=1, length=6)
    cache = model(ids[:, :4], use_cache=True).past_key_values
    mask, reset = torch.tensor([[1, 1, 1, 1, 0, 1]]), torch.tensor([[True, False]])
    got = model(ids[:, 4:], attention_mask=mask, reset=reset, past_key_values=cache, use_cache=True).logits
    close(got[:, 1:], model(ids[:, 5:]).logits, SUMS)


@pytest.mark.parametrize("name", OF_EACH_STATE)
def test_generation_after_a_packed_prompt(name):
    """The text goes on from the last document; transformers' own position_ids are no documents."""
    model, ids = small_model(name), tokens(rows=1, length=9)
    options = {"max_new_tokens": 4, "do_sample": False}
    want = model.generate(ids[:, 4:], **options)[0, 5:]
    positions = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3, 4]])
    assert torch.equal(model.generate(ids, position_ids=positions, **options)[0, 9:], want)
    for other in ("reset", "seq_idx"):
        with pytest.raises(ValueError, match=f"generate does not take {other}: .* position_ids"):
            model.generate(ids, **options, **{other: positions == 0})


@pytest.mark.parametrize("name", OF_EACH_STATE)
def test_4d_masks_with_padding_and_without_documents(name):
    model, ids = small_model(name), tokens(rows=2, length=7)
    causal = torch.ones(7, 7, dtype=torch.bool).tril()
    padding = torch.tensor([[0, 0, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 0, 0]]).bool()
    seen = causal & padding[:, None, None, :]
    with torch.no_grad():
        close(model(ids, attention_mask=causal[None, None]).logits, model(ids).logits, SUMS)
        got = model(ids, attention_mask=seen).logits[padding]
        close(got, model(ids, attention_mask=padding).logits[padding], SUMS)


WINDOW = torch.ones(7, 7).tril().triu(-2).bool()[None, None]


@pytest.mark.parametrize(
    "mask",
    [WINDOW, torch.ones(1, 1, 7, 7).bool(), torch.ones(1, 1, 7, 9).bool(), torch.rand(1, 1, 7, 7),
     torch.ones(1, 1, 7, 7).tril().long(), torch.stack([WINDOW[0], WINDOW[0] | True], dim=1)],
    ids=["window", "all", "shape", "biases", "whole numbers", "heads"],
)  # fmt: skip
@pytest.mark.parametrize("name", ["bd_lru", "lstm", "hybrid"])
def test_4d_masks_that_recurrent_layers_cannot_read(name, mask):
    with pytest.raises(ValueError, match="recurrent layers and windows take a 4-d attention_mask only if"):
        small_model(name)(tokens(length=7), attention_mask=mask)


def test_attention_alone_takes_any_4d_mask():
    model, ids = small_model("attention"), tokens(length=7)
    with torch.no_grad():
        windowed = model(ids, attention_mask=WINDOW).logits
        close(windowed[:, :3], model(ids[:, :3]).logits, SUMS)
        assert (windowed - model(ids).logits)[:, 3:].abs().max() > 1e-3
    with pytest.raises(ValueError, match="give no documents beside it"):
        model(ids, attention_mask=WINDOW, seq_idx=torch.zeros(2, 7))


COUNTED = torch.arange(19).unsqueeze(0)
CONTRADICTIONS = {
    "positions and index": ({"position_ids": COUNTED}, ("seq_idx",)),
    "positions and reset": ({"position_ids": COUNTED}, ("reset",)),
    "positions and lengths": ({"position_ids": COUNTED}, ("cu_seq_lens_q",)),
    "index and reset": ({"seq_idx": torch.zeros(1, 19)}, ("reset",)),
    "lengths and index": ({"cu_seq_lens_q": torch.tensor([0, 6, 19])}, ("seq_idx",)),
    "lengths of keys": ({"cu_seq_lens_k": torch.tensor([0, 6, 19])}, ("cu_seq_lens_q",)),
    "mask and index": ({"attention_mask": torch.ones(1, 1, 19, 19).tril().bool()}, ("seq_idx",)),
}


@pytest.mark.parametrize("case", CONTRADICTIONS)
@pytest.mark.parametrize("name", ["bd_lru", "attention", "hybrid"])
def test_contradictions_are_refused(name, case):
    change, keys = CONTRADICTIONS[case]
    batch = {**flattened("all"), **flattened("reset")}
    arguments = {key: batch[key] for key in ("input_ids", *keys)} | change
    with pytest.raises(ValueError, match="let documents begin at different places; pass only one"):
        small_model(name)(**arguments)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"seq_idx": torch.zeros(1, 5)}, r"seq_idx of shape \(1, 5\) does not fit inputs of shape \(1, 19\)"),
        ({"position_ids": torch.zeros(3, 1, 19)}, r"position_ids of shape \(3, 1, 19\) does not fit"),
        ({"reset": torch.zeros(1, 18).bool()}, r"reset of shape \(1, 18\) does not fit"),
        ({"reset": torch.zeros(1, 19)}, "reset is a bool mask, not torch.float32"),
        ({"cu_seq_lens_q": torch.tensor([0, 6, 18])}, "must grow from 0 to the 19 tokens"),
        ({"cu_seq_lens_q": torch.tensor([1, 19])}, "must grow from 0 to the 19 tokens"),
        ({"cu_seq_lens_q": torch.tensor([0, 12, 6, 19])}, "must grow from 0 to the 19 tokens"),
        ({"cu_seq_lens_q": torch.tensor([[0, 19]])}, "must be one row of offsets"),
        ({"cu_seq_lens_q": torch.tensor([0, 19]), "max_length_q": 7}, "has 19 tokens, more than"),
        ({"max_length_q": 7}, "max_length_q says nothing without cu_seq_lens_q"),
        ({"seq_ids": torch.zeros(1, 19)}, "does not read the argument 'seq_ids'; did you mean 'seq_idx'"),
        ({"cu_seqlens": torch.tensor([0, 19])}, "the argument 'cu_seqlens'; did you mean 'cu_seq_lens"),
        ({"token_type_ids": torch.ones(1, 19).long()}, "does not read the argument 'token_type_ids'"),
        ({"is_causal": False}, "does not read the argument 'is_causal'"),
        ({"head_mask": torch.ones(2)}, "does not read the argument 'head_mask'; leave it out"),
    ],
    ids=str,
)  # fmt: skip
@pytest.mark.parametrize("body", [False, True])
def test_arguments_that_are_wrong(arguments, words, body):
    model = small_model("hybrid")
    model = model.model if body else model
    with pytest.raises(ValueError, match=words):
        model(tokens(rows=1, length=19), **arguments)


def test_a_document_does_not_go_on_in_the_next_row():
    with pytest.raises(ValueError, match="continue from one row of the batch to the next"):
        small_model("bd_lru")(tokens(rows=2, length=9), cu_seq_lens_q=torch.tensor([0, 4, 12, 18]))


def test_arguments_that_say_nothing():
    """What tokenizers and transformers pass by default changes nothing."""
    model, ids = small_model("hybrid"), tokens()
    nothing = {
        "token_type_ids": torch.zeros_like(ids),
        "seq_idx": None,
        "cu_seq_lens_q": None,
        "head_mask": None,
    }
    nothing |= {"return_dict": True, "output_attentions": False, "output_hidden_states": False}
    close(model(ids, **nothing).logits, model(ids).logits, 0)


def test_the_auto_encoder_takes_no_argument_that_it_does_not_read():
    with pytest.raises(TypeError, match="attention_mask"):
        LRNNForReconstruction(small_config("bd_lru"))(tokens(), attention_mask=torch.ones(2, 21))


@pytest.mark.parametrize("name", ["bd_lru", "hybrid"])
def test_padding_free_training_by_the_trainer(name, tmp_path):
    """Two steps of transformers' Trainer on flattened rows leave the weights of two steps on padded rows."""
    rows = examples()
    rows = [row for row in rows if len(row["input_ids"]) > 1] * 2

    def padded(batch):
        longest = max(len(row["input_ids"]) for row in batch)
        ids = torch.tensor([row["input_ids"] + [0] * (longest - len(row["input_ids"])) for row in batch])
        return {
            "input_ids": ids,
            "attention_mask": (ids > 0).long(),
            "labels": ids.masked_fill(ids == 0, -100),
        }

    weights = []
    for collate in (padded, DataCollatorWithFlattening(return_seq_idx=True, return_flash_attn_kwargs=True)):
        model = small_model(name)
        arguments = TrainingArguments(
            tmp_path, max_steps=2, per_device_train_batch_size=3, learning_rate=1e-2, optim="sgd", seed=1,
            report_to=[], use_cpu=True, disable_tqdm=True, save_strategy="no", remove_unused_columns=False,
        )  # fmt: skip
        Trainer(model=model, args=arguments, train_dataset=rows, data_collator=collate).train()
        weights.append(dict(model.named_parameters()))
    for key, weight in weights[0].items():
        close(weights[1][key], weight, SUMS)


@pytest.mark.parametrize("argument", ["reset", "seq_idx", "position_ids"])
def test_documents_in_a_data_set_reach_the_model_by_the_trainer(argument, tmp_path):
    """The Trainer drops columns that `forward` does not name, without a word."""
    ids = tokens(rows=4, length=12)
    starts = torch.zeros(4, 12, dtype=torch.bool)
    starts[:, 5] = starts[2:, 9] = True
    steps, documents = torch.arange(12).expand(4, 12), starts.long().cumsum(dim=1)
    first = torch.where(starts, steps, 0).cummax(dim=1).values
    column = {"reset": starts, "seq_idx": documents, "position_ids": steps - first}[argument]
    rows = [
        {"input_ids": row, "labels": row, argument: its}
        for row, its in zip(ids.tolist(), column.tolist(), strict=True)
    ]
    model = small_model("hybrid")
    arguments = TrainingArguments(
        tmp_path, max_steps=1, per_device_train_batch_size=4, learning_rate=0.0, logging_steps=1,
        report_to=[], use_cpu=True, disable_tqdm=True, save_strategy="no",
    )  # fmt: skip
    trainer = Trainer(model=model, args=arguments, train_dataset=rows)
    trainer.train()
    got = trainer.state.log_history[0]["loss"]
    close(torch.tensor(got), model(ids, labels=ids, **{argument: column}).loss.detach(), 1e-3)
    assert abs(got - float(model(ids, labels=ids).loss)) > 1e-2
