"""What masks mean, against plain definitions, over all small masks."""

from itertools import product

import pytest
import torch
from torch import Tensor

from lrnn_lm.model import masks
from lrnn_lm.model.masks import HIDDEN, Layout, layout, padding, positions_of, tokens_last

T = 4
ROWS = [list(row) for row in product([0, 1], repeat=T)]
ALL = torch.tensor(ROWS)  # every row of 4 tokens, 1 where there is one
PAIRS = [torch.tensor([a, b]) for a, b in product(ROWS, repeat=2)]
NO_PACKING = {"seq_idx": None}


def bools(rows: list[list[bool]]) -> Tensor:
    return torch.tensor(rows, dtype=torch.bool)


def same(got: Tensor | None, want: Tensor | None) -> bool:
    return got is want if got is None or want is None else got.dtype == want.dtype and torch.equal(got, want)


@pytest.mark.parametrize("past", range(T))
@pytest.mark.parametrize("dtype", [torch.long, torch.bool, torch.float32])
def test_padding(past: int, dtype: torch.dtype) -> None:
    """The last columns are the new tokens'; a sequence begins at its first token, if padding precedes any."""
    for mask in PAIRS:
        attention, tokens, first = padding(mask.to(dtype), 2, T - past, past)
        if mask.all():
            assert attention is tokens is first is None
            continue
        begins = [[bool(row[t]) and not any(row[:t]) for t in range(past, T)] for row in mask.tolist()]
        assert same(attention, mask.bool())
        assert same(tokens, None if mask[:, past:].all() else mask[:, past:].bool())
        assert same(first, bools(begins) if any(map(any, begins)) else None)


def test_padding_of_the_new_tokens_alone() -> None:
    """The cache holds what came before, of which nothing is told: no sequence begins here."""
    for mask in PAIRS:
        attention, tokens, first = padding(mask, 2, T, 3)
        whole = bool(mask.all())
        assert same(attention, None if whole else mask.bool())
        assert same(tokens, None if whole else mask.bool())
        assert first is None


@pytest.mark.parametrize("shape", [(2, 5), (2, 8), (2, 3), (1, 4), (3, 4), (4,), (2, 4, 1)])
def test_padding_of_another_shape(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"does not fit 2 rows of 4 new tokens after 3: pass \(rows, tokens"):
        padding(torch.ones(shape), 2, T, 3)


@pytest.mark.parametrize("value", [2, -1, 0.5])
def test_padding_of_other_numbers(value: float) -> None:
    mask = ALL.float()
    mask[3, 2] = value
    with pytest.raises(ValueError, match="other numbers than 0 and 1"):
        padding(mask, len(ALL), T, 0)


@pytest.mark.parametrize("keep_state", [False, True])
def test_padding_is_moved_to_the_front_where_it_has_to_be(keep_state: bool) -> None:
    """Not for padding in front, nor for that at the end where nobody keeps the state."""
    for mask in PAIRS:
        rows = ["".join(map(str, row)) for row in mask.tolist()]
        told = ["10" in (row if keep_state else row.rstrip("0")) for row in rows]
        order = [sorted(range(T), key=lambda t, row=row: int(row[t])) for row in rows]
        assert same(tokens_last(mask.bool(), keep_state), torch.tensor(order) if any(told) else None)
    assert tokens_last(torch.tensor([[True], [False]]), keep_state) is None


@pytest.mark.parametrize("past", range(T))
def test_positions_count_the_tokens_before(past: int) -> None:
    x = torch.zeros(len(ALL), T - past, 3)
    want = [[max(sum(row[: t + 1]) - 1, 0) for t in range(past, T)] for row in ROWS]
    assert positions_of(ALL, x, past).tolist() == want
    for mask in (None, torch.ones(len(ALL), 1, T, T)):
        assert positions_of(mask, x, past).tolist() == [list(range(past, T))]


def block_masks(size: int) -> dict[tuple, tuple[list, list]]:
    """By the rows of the mask that a token sees: which are tokens, and which begin a block after a token."""
    found = {}
    for token, begins in product(product([False, True], repeat=size), repeat=2):
        kept = [t for t in range(size) if token[t]]
        if not {t for t in range(size) if begins[t]} <= set(kept) or (kept and not begins[kept[0]]):
            continue
        block = [sum(begins[: t + 1]) for t in range(size)]
        seen = [
            [token[q] and token[k] and k <= q and block[k] == block[q] for k in range(size)]
            for q in range(size)
        ]
        found[tuple(map(tuple, seen))] = (list(token), [begins[t] and t != kept[0] for t in range(size)])
    return found


def test_masks_that_are_causal_in_blocks() -> None:
    """All masks of three tokens: those of tokens in blocks are read, whatever padding sees, no others are."""
    known = block_masks(3)
    for entries in product([False, True], repeat=9):
        seen = bools([list(entries[i : i + 3]) for i in (0, 3, 6)])
        by_tokens = seen & seen.diagonal().unsqueeze(1)  # what a token does not see itself is padding
        want = known.get(tuple(map(tuple, by_tokens.tolist())))
        added = torch.zeros(3, 3).masked_fill(~seen, HIDDEN)
        for mask in (seen, added, 2 * added, torch.zeros(3, 3).masked_fill(~seen, float("-inf"))):
            got = masks._blocks(mask.expand(1, 2, 3, 3), 2, 3)
            if want is None:
                assert got is None
                continue
            token, begins = got
            assert token.tolist() == [[int(each) for each in want[0]]] * 2
            assert begins.tolist() == [want[1]] * 2


def test_masks_that_are_not_read_as_blocks() -> None:
    causal = torch.ones(3, 3, dtype=torch.bool).tril()
    added = torch.zeros(3, 3).masked_fill(~causal, HIDDEN)
    assert masks._blocks(added[None, None], 1, 3) is not None
    for mask in (
        added[None, None] * 0.99,  # hides too little
        added[None, None].long(),  # whole numbers add nothing that is known
        added[None, None] + 1.0 * (added == 0),  # something is added to what is seen
        causal[None, None, :2],
        causal[None, None, :, :2],
        causal[None, None].expand(3, 1, 3, 3),  # of three rows
        torch.stack([causal, torch.eye(3).bool()])[None],  # heads that see different things
    ):
        assert masks._blocks(mask, 2, 3) is None


def test_a_4d_mask_of_attention_alone() -> None:
    """It is handed on unread where it is no mask of blocks, or after a past; never beside documents."""
    tokens, odd = torch.zeros(2, 3, 5), torch.ones(2, 1, 3, 3, dtype=torch.bool)
    causal = odd.tril()
    assert layout(tokens, 0, odd, None, None, NO_PACKING, any_mask=True) == Layout(odd)
    assert layout(tokens, 2, causal, None, None, NO_PACKING, any_mask=True) == Layout(causal)
    assert layout(tokens, 0, causal, None, None, NO_PACKING, any_mask=True) == Layout()
    with pytest.raises(ValueError, match="recurrent layers and windows take a 4-d attention_mask only if"):
        layout(tokens, 0, odd, None, None, NO_PACKING, any_mask=False)
    reset, ids = torch.zeros(2, 3, dtype=torch.bool), torch.zeros(2, 3, dtype=torch.long)
    for given in ({"reset": reset, "packing": NO_PACKING}, {"reset": None, "packing": {"seq_idx": ids}}):
        with pytest.raises(ValueError, match="give no documents beside it"):
            layout(tokens, 0, odd, None, any_mask=True, **given)
