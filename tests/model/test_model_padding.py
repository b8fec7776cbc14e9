"""Any mask of 0 and 1: outputs, states and losses are those of each row's tokens alone.

Masks in turn: a layer is given a bool tensor, whatever it is of. Outputs, states and gradients for every
model; for what hangs on them, models with one state of each kind.
"""

import pytest
import torch
from small_models import OF_EACH_STATE, RECURRENT, close, in_turn, shallow_model, small_model, states, tokens
from tolerances import TOLERANCE
from torch.nn import functional as F
from transformers import DynamicCache

from lrnn_lm.model import copy_states

SUMS = TOLERANCE["other order of sums"]
T = 13
MASKS = {
    "left": ["0001111111111", "1111111111111", "0000000000001"],
    "right": ["1111111000000", "1111111111111", "1000000000000"],
    "holes": ["1100111011011", "0110000111100", "1010101010101"],
    "rows of padding": ["0000000000000", "1111111111111", "0011110000000"],
}
KINDS = list(MASKS)


def mask_of(kind: str) -> torch.Tensor:
    return torch.tensor([[int(c) for c in row] for row in MASKS[kind]])


def tokens_alone(ids, mask, row):
    return ids[row : row + 1, mask[row].bool()]


def check_rows(model, ids, mask, logits, cache):
    """Each row's logits, and those of what follows its state, are those of its tokens alone."""
    follow = torch.full((len(ids), 2), 5)
    longer = torch.cat([mask, torch.ones_like(follow)], dim=1)
    after = model(follow, attention_mask=longer, past_key_values=cache, use_cache=True).logits
    for row in range(len(ids)):
        alone = tokens_alone(ids, mask, row)
        want = model(torch.cat([alone, follow[:1]], dim=1)).logits[0]
        close(logits[row, mask[row].bool()], want[: alone.shape[1]], SUMS)
        close(after[row], want[alone.shape[1] :], SUMS)


@pytest.mark.parametrize(("name", "kind"), in_turn(KINDS))
@torch.no_grad()
def test_one_pass(name, kind):
    model, ids, mask = small_model(name), tokens(rows=3, length=T), mask_of(kind)
    out = model(ids, attention_mask=mask, use_cache=True)
    if name in RECURRENT:
        check_states(model, ids, mask, states(out.past_key_values))
    check_rows(model, ids, mask, out.logits, out.past_key_values)
    without = model(ids, attention_mask=mask.bool(), use_cache=False).logits
    close(without[mask.bool()], out.logits[mask.bool()], SUMS)


def check_states(model, ids, mask, found):
    """Each row's states are those of its tokens alone; zero where there are none."""
    for row in range(3):
        alone = tokens_alone(ids, mask, row)
        if not alone.shape[1]:
            assert not any(state[row].any() for state in found)
            continue
        want = states(model(alone, use_cache=True).past_key_values)
        for got, one in zip(found, want, strict=True):
            close(got[row], one[0], SUMS)


@pytest.mark.parametrize(
    ("name", "kind", "cuts"),
    [(*x, [1, 2, 9]) for x in in_turn(KINDS)] + [(name, "holes", range(1, T)) for name in OF_EACH_STATE],
)
@torch.no_grad()
def test_several_passes(name, kind, cuts):
    model, ids, mask = small_model(name), tokens(rows=3, length=T), mask_of(kind)
    cache, logits = DynamicCache(config=model.config), []
    for start, stop in zip([0, *cuts], [*cuts, T], strict=True):
        part = {"attention_mask": mask[:, :stop], "past_key_values": cache, "use_cache": True}
        logits.append(model(ids[:, start:stop], **part).logits)
    check_rows(model, ids, mask, torch.cat(logits, dim=1), cache)


@pytest.mark.parametrize(("name", "kind"), in_turn(KINDS, OF_EACH_STATE))
@torch.no_grad()
def test_what_lies_on_padding_is_never_read(name, kind):
    """Not even NaN shows, as in memory that nobody wrote."""
    model, ids, mask = small_model(name), tokens(rows=3, length=T), mask_of(kind)
    x = model.get_input_embeddings()(ids)
    want = model(inputs_embeds=x, attention_mask=mask).logits[mask.bool()]
    broken = x.masked_fill(mask.unsqueeze(-1) == 0, float("nan"))
    close(model(inputs_embeds=broken, attention_mask=mask).logits[mask.bool()], want, SUMS)


@pytest.mark.parametrize(("name", "kind"), in_turn(KINDS, OF_EACH_STATE))
@torch.no_grad()
def test_documents_among_padding(name, kind):
    """A document begins at its first token, wherever in the padding before it `reset` says so."""
    model, ids, mask = small_model(name), tokens(rows=3, length=T), mask_of(kind)
    reset = torch.zeros_like(mask, dtype=torch.bool)
    reset[:, [2, 7]] = True
    out = model(ids, attention_mask=mask, reset=reset, labels=ids, use_cache=True)
    nats, count = 0, 0
    for row in range(3):
        kept = mask[row].bool()
        for place in reset[row].cumsum(0).unique():
            inside = kept & (reset[row].cumsum(0) == place)
            if inside.any():
                alone = model(ids[row : row + 1, inside], labels=ids[row : row + 1, inside])
                size = alone.logits.abs().max().clamp(min=1)  # 4.4 at most: fp32 rounds more there
                close(out.logits[row, inside] / size, alone.logits[0] / size, SUMS)
                targets = int(inside.sum()) - 1
                nats, count = nats + alone.loss * targets, count + targets
    close(out.loss, nats / count, SUMS)


@pytest.mark.parametrize(("name", "kind"), in_turn(KINDS))
def test_gradients_and_loss(name, kind):
    """The loss is that of the rows alone: padding neither is a target nor predicts one."""
    model, ids, mask = small_model(name).train(), tokens(rows=3, length=T), mask_of(kind)
    loss = model(ids, labels=ids, attention_mask=mask, use_cache=False).loss
    loss.backward()
    got = {key: p.grad.clone() for key, p in model.named_parameters()}
    model.zero_grad()
    rows = [tokens_alone(ids, mask, row) for row in range(3)]
    rows = [row for row in rows if row.shape[1] > 1]
    count = sum(row.shape[1] - 1 for row in rows)
    sums = [F.cross_entropy(model(row).logits[0, :-1], row[0, 1:], reduction="sum") for row in rows]
    want = sum(sums) / count
    want.backward()
    close(loss, want.detach(), SUMS)
    for key, p in model.named_parameters():
        close(got[key], p.grad, TOLERANCE["gradient"] * max(1.0, p.grad.abs().max().item()))


@pytest.mark.parametrize("kind", KINDS)
def test_targets_that_the_trainer_counts(kind):
    """It counts each row's labels but the first column's: right for one batch, refused for a part."""
    model, ids, mask = small_model("bd_lru"), tokens(rows=3, length=T), mask_of(kind)
    labels = ids.masked_fill(mask == 0, -100)
    counted = (labels[:, 1:] != -100).sum()
    true = int((mask.sum(1) - 1).clamp_min(0).sum())
    want = model(ids, labels=labels, attention_mask=mask).loss
    close(model(ids, labels=labels, attention_mask=mask, num_items_in_batch=counted).loss, want, SUMS)
    close(model(ids, labels=labels, attention_mask=mask, num_items_in_batch=int(counted)).loss, want, SUMS)
    if counted == true:
        part = model(ids, labels=labels, attention_mask=mask, num_items_in_batch=counted + 7).loss
        close(part * (counted + 7), want * true, 1e-4)
        return
    with pytest.raises(ValueError, match=r"labels that nothing predicts.*padding_side = 'right'"):
        model(ids, labels=labels, attention_mask=mask, num_items_in_batch=counted + 7)


@pytest.mark.parametrize("name", ["attention", "hybrid", "hybrid-attention-first"])
@torch.no_grad()
def test_attention_asks_for_the_whole_mask(name):
    """Its keys hold the padding, so it cannot go on without being told; a recurrent state holds none."""
    model, ids, mask = small_model(name), tokens(rows=3, length=T), mask_of("holes")
    cache = model(ids, attention_mask=mask, use_cache=True).past_key_values
    for part in (None, torch.ones(3, 2)):
        with pytest.raises(ValueError, match=r"need an attention_mask over all 15 tokens: 13 in the cache"):
            model(ids[:, :2], attention_mask=part, past_key_values=copy_of(cache), use_cache=True)
    cache = model(ids, use_cache=True).past_key_values
    with pytest.raises(ValueError, match="need an attention_mask over all 15"):
        model(ids[:, :2], attention_mask=torch.tensor([[0, 1]] * 3), past_key_values=cache)


def copy_of(cache):
    """copy_states does not know of the padding: the mark that it was there is the layer's own."""
    copied = copy_states(cache)
    for old, new in zip(cache.layers, copied.layers, strict=True):
        if hasattr(old, "padded"):
            new.padded = old.padded
    return copied


@pytest.mark.parametrize("name", [name for name in OF_EACH_STATE if name in RECURRENT])
@torch.no_grad()
def test_a_mask_of_the_new_tokens_alone(name):
    model, ids = small_model(name), tokens(rows=2, length=T)
    cache = model(ids[:, :6], use_cache=True).past_key_values
    mask = torch.tensor([[0, 0, 1, 0, 1, 1, 0], [1, 1, 1, 1, 1, 1, 1]])
    got = model(ids[:, 6:], attention_mask=mask, past_key_values=cache, use_cache=True).logits
    for row in range(2):
        kept = torch.cat([torch.ones(6), mask[row]]).bool()
        close(got[row, mask[row].bool()], model(ids[row : row + 1, kept]).logits[0, 6:], SUMS)


@torch.no_grad()
def test_one_graph_for_any_mask():
    """A layer each of bd_lru, attention and h_lru."""
    torch.compiler.reset()
    model, ids = shallow_model("hybrid"), tokens(rows=3, length=T)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    for kind in KINDS:
        mask = mask_of(kind)
        got = compiled(ids, attention_mask=mask, labels=ids, use_cache=False)
        want = model(ids, attention_mask=mask, labels=ids, use_cache=False)
        close(got.logits[mask.bool()], want.logits[mask.bool()], SUMS)
        close(got.loss, want.loss, SUMS)


@pytest.mark.parametrize(
    ("mask", "words"),
    [
        (torch.ones(2, T - 1), r"attention_mask of shape \(2, 12\) does not fit 2 rows of 13 new tokens"),
        (torch.ones(3, T), "does not fit 2 rows"),
        (torch.ones(2, 1, T), "does not fit 2 rows"),
        (torch.ones(T), "does not fit 2 rows"),
        (torch.ones(2, T) * 2, "other numbers than 0 and 1; pass documents as seq_idx"),
        (torch.tensor([[1.0] * 12 + [0.5]] * 2), "other numbers than 0 and 1"),
        (torch.zeros(2, T) - torch.inf, "other numbers than 0 and 1"),
    ],
)
@pytest.mark.parametrize("name", ["bd_lru", "attention", "hybrid"])
def test_masks_that_are_none(name, mask, words):
    with pytest.raises(ValueError, match=words):
        small_model(name)(tokens(length=T), attention_mask=mask)


STATIC = {"cache_implementation": "static", "disable_compile": True}


@pytest.mark.parametrize("options", [{}, {"num_beams": 2}, STATIC, {"embeds": True}])
@pytest.mark.parametrize(("name", "kind"), in_turn(KINDS, OF_EACH_STATE))
def test_generated_text_after_any_padding(name, kind, options):
    """At the end of a row too, where the first new token was that of padding."""
    model, ids, mask = small_model(name), tokens(rows=3, length=T), mask_of(kind)
    embeds = "embeds" in options
    options = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0, **options}
    options.pop("embeds", None)
    if STATIC.items() <= options.items() and "window" in name:
        pytest.skip("a static cache with a window takes padding on the left only")

    def written(ids, mask):
        if embeds:
            given = model.get_input_embeddings()(ids)
            return model.generate(inputs_embeds=given, attention_mask=mask, **options)
        return model.generate(ids, attention_mask=mask, **options)[:, ids.shape[1] :]

    got = written(ids, mask)
    for row in range(3):
        alone = tokens_alone(ids, mask, row)
        if alone.shape[1]:
            assert torch.equal(got[row], written(alone, torch.ones_like(alone))[0]), row


@pytest.mark.parametrize("whole", [True, False], ids=["whole text", "new tokens"])
@pytest.mark.parametrize(("name", "kind"), in_turn(["left", "right", "holes"], OF_EACH_STATE))
def test_generated_text_after_a_padded_second_turn(name, kind, whole):
    """After a cache that the caller gives, with all tokens or with the new ones."""
    model, first, second = small_model(name), tokens(rows=3, length=5), tokens(rows=3, length=T, seed=4)
    mask = torch.cat([torch.ones_like(first), mask_of(kind)], dim=1)
    mask[1, 0] = 0
    cache, options = (
        DynamicCache(config=model.config),
        {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0},
    )
    with torch.no_grad():
        model(first, attention_mask=mask[:, :5], past_key_values=cache, use_cache=True)
    ids = torch.cat([first, second], dim=1)
    given = ids if whole else second
    got = model.generate(given, attention_mask=mask, past_key_values=cache, **options)
    for row in range(3):
        alone = tokens_alone(ids, mask, row)
        want = model.generate(alone, attention_mask=torch.ones_like(alone), **options)
        assert torch.equal(got[row, given.shape[1] :], want[0, alone.shape[1] :]), row


@pytest.mark.parametrize("whole", [True, False], ids=["whole text", "new tokens"])
@pytest.mark.parametrize("name", OF_EACH_STATE)
def test_a_second_turn_in_which_a_row_says_nothing(name, whole):
    """Its last column is padding, from which its text would go on. A row without any text is no row."""
    model, first, second = small_model(name), tokens(rows=3, length=5), tokens(rows=3, length=4, seed=4)
    mask = torch.ones(3, 9, dtype=torch.long)
    mask[1, 5:] = mask[2] = 0
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(first, attention_mask=mask[:, :5], past_key_values=cache, use_cache=True)
    given = torch.cat([first, second], dim=1) if whole else second
    options = {"past_key_values": cache, "max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    with pytest.raises(ValueError, match="row 1 has no new token"):
        model.generate(given, attention_mask=mask, **options)
    mask[1, 6:] = 1
    assert model.generate(given, attention_mask=mask, **options).shape[1] == given.shape[1] + 4


@pytest.mark.parametrize("name", ["attention", "hybrid"])
def test_positions_given_once_are_those_of_every_row(name):
    """As rows are padded in other places, a token's position goes with it."""
    model, ids, mask = small_model(name), tokens(rows=3, length=T), mask_of("holes")
    options = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    places = torch.arange(T).unsqueeze(0)
    got = model.generate(ids, attention_mask=mask, position_ids=places, **options)[:, T:]
    want = model.generate(ids, attention_mask=mask, position_ids=places.expand(3, -1), **options)[:, T:]
    assert torch.equal(got, want)
    for row in range(3):
        there = mask[row].bool()
        alone = model.generate(ids[row : row + 1, there], position_ids=places[:, there], **options)
        assert torch.equal(got[row], alone[0, there.sum() :]), row
