"""Masks by blocks: exactly the mask of the formula, and attention over them with its gradients.

On a CPU, torch has flex_attention's reference alone, which reads no blocks; so these are read here. On a GPU:
`python -m benchmarks.gpu.attention`.
"""

import pytest
import torch
from torch import Tensor
from torch.nn import functional
from torch.nn.attention import flex_attention

from lrnn_lm.mixers.spans import attend_by_blocks, blocks_of_spans, mask_of_spans

CASES = [(T, window, documents, padding) for T in (128, 300, 640) for window in (None, 50, 257)
         for documents in (False, True) for padding in (False, True)]  # fmt: skip


def spans(T: int, window: int | None, documents: bool, padding: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Numbers of keys, queries and first visible tokens of two rows, or of one that stands for both."""
    token = torch.ones(2 if documents or padding else 1, T, dtype=torch.bool)
    if padding:
        token[0, :40] = token[0, -5:] = token[1, 60:90] = False
    queries = token.long().cumsum(1) - token.long()
    starts = torch.zeros_like(queries) if window is None else (queries - window + 1).clamp_min(0)
    if documents:
        reset = torch.zeros_like(token)
        reset[0, [50, 51, 120]] = reset[1, T // 2] = True
        starts = torch.maximum(starts, torch.where(reset, queries, 0).cummax(1).values)
    return queries.masked_fill(~token, -1), queries, starts


@pytest.mark.parametrize("case", CASES, ids=str)
def test_blocks_are_the_mask(case):
    """A block that is listed as whole is seen whole, one that is not listed not at all."""
    T = case[0]
    keys, queries, starts = spans(*case)
    want = mask_of_spans(keys, queries, starts)[:, 0] & torch.ones(T, T, dtype=torch.bool).tril()
    blocks = blocks_of_spans(keys, starts, len(keys))
    rows, steps = torch.arange(len(keys)).view(-1, 1, 1), torch.arange(T)
    formula = blocks.mask_mod(rows, torch.tensor(0), steps.view(1, -1, 1), steps.view(1, 1, -1))
    got = torch.zeros_like(want)
    listed = ((blocks.kv_num_blocks, blocks.kv_indices), (blocks.full_kv_num_blocks, blocks.full_kv_indices))
    for whole, (numbers, indices) in enumerate(listed):
        for row, _, q in torch.cartesian_prod(*map(torch.arange, numbers.shape)).tolist():
            for k in indices[row, 0, q, : numbers[row, 0, q]].tolist():
                part = row, slice(128 * q, 128 * q + 128), slice(128 * k, 128 * k + 128)
                got[part] = True if whole else formula[part]
    assert torch.equal(got, want)
    if case == (640, 50, False, False):
        assert blocks.kv_num_blocks.tolist() == [[[1, 2, 2, 2, 2]]]  # in proportion to T
    if case == (640, None, False, False):
        assert blocks.full_kv_num_blocks.tolist() == [[[0, 1, 2, 3, 4]]]


@pytest.mark.filterwarnings("ignore:flex_attention called without")
@pytest.mark.parametrize(
    "case", [CASES[0], *((300, 257, documents, documents) for documents in (False, True))], ids=str
)
def test_attention_over_blocks(case, monkeypatch):
    """Where a query sees nothing, as leading padding does, there are zeros, and no gradient is NaN."""
    monkeypatch.setattr(flex_attention, "_validate_device", lambda *inputs: None)  # no gradients on a CPU
    torch.manual_seed(5)
    shapes = [(2, heads, case[0], 16) for heads in (4, 2, 2)]
    q, k, v = (torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes)
    keys, queries, starts = spans(*case)
    got = attend_by_blocks(q, k, v, blocks_of_spans(keys, starts, 2))
    shared = [x.repeat_interleave(2, dim=1) for x in (k, v)]
    want = functional.scaled_dot_product_attention(q, *shared, attn_mask=mask_of_spans(keys, queries, starts))
    token = (keys >= 0)[:, None, :, None]
    weights = torch.randn_like(got) * token
    torch.testing.assert_close(got * token, want * token)
    gradients, expected = (torch.autograd.grad((y * weights).sum(), (q, k, v)) for y in (got, want))
    for gradient, one in zip(gradients, expected, strict=True):
        torch.testing.assert_close(gradient, one)
