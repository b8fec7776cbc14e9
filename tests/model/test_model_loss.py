"""The chunked cross-entropy is torch's cross-entropy, in value and in every gradient."""

import itertools
import re
from unittest import mock

import pytest
import torch
from small_models import NAMES, VOCAB, close, small_config, small_model, tokens
from tolerances import TOLERANCE
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from lrnn_lm.model import LRNNForCausalLM, LRNNForReconstruction, loss
from lrnn_lm.model.loss import (
    IGNORE,
    counted_targets,
    cross_entropy,
    loss_and_z,
    shift_labels,
)

SUMS, GRADIENT = TOLERANCE["other order of sums"], TOLERANCE["gradient"]


def linear_cross_entropy(*inputs, **options):
    """The loss alone."""
    return loss_and_z(*inputs, **options)[0]


def case(ignored: float = 0.3, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(3, 7, 8, generator=generator, dtype=dtype, requires_grad=True)
    weight = torch.randn(19, 8, generator=generator, dtype=dtype, requires_grad=True)
    labels = torch.randint(0, 19, (3, 7), generator=generator)
    labels[torch.rand(3, 7, generator=generator) < ignored] = IGNORE
    return hidden, weight, labels


def both(hidden, weight, labels, num_items, chunk):
    """[loss, d_hidden, d_weight] of ours and of torch's, with a factor behind the loss."""
    results = []
    for ours in (True, False):
        hidden.grad = weight.grad = None
        if ours:
            loss = linear_cross_entropy(hidden, weight, labels, num_items, chunk)
        else:
            total = F.cross_entropy(
                (hidden @ weight.t()).flatten(0, 1).float(), labels.flatten(), reduction="sum"
            )
            loss = total / (num_items if num_items is not None else (labels != IGNORE).sum().clamp_min(1))
        (3 * loss).backward()
        results.append([loss.detach(), hidden.grad.clone(), weight.grad.clone()])
    return results


@pytest.mark.parametrize("chunk", [1, 4, 5, 21, 1000])
@pytest.mark.parametrize("num_items", [None, 11, torch.tensor(11)], ids=str)
def test_values_and_gradients(chunk, num_items):
    for got, want in zip(*both(*case(), num_items, chunk), strict=True):
        close(got, want, SUMS)


@pytest.mark.parametrize("chunk", [4, 1000])
def test_z_loss(chunk):
    """Value, its part alone and gradients against logits in fp64; without a gradient the same value."""
    hidden, weight, labels = case(dtype=torch.float64)
    total, z = loss_and_z(hidden, weight, labels, 11, chunk, z_loss=0.03)
    got = torch.autograd.grad(3 * total, (hidden, weight))
    logits = (hidden @ weight.t()).flatten(0, 1)
    want_z = 0.03 * logits.logsumexp(1)[labels.flatten() != IGNORE].square().sum() / 11
    want = F.cross_entropy(logits, labels.flatten(), reduction="sum") / 11 + want_z
    close(z, want_z.detach(), 1e-12)
    close(total, want.detach(), 1e-12)
    assert not z.requires_grad
    for ours, theirs in zip(got, torch.autograd.grad(3 * want, (hidden, weight)), strict=True):
        close(ours, theirs, 1e-12)
    with torch.no_grad():
        for ours, before in zip(loss_and_z(hidden, weight, labels, 11, chunk, 0.03), (total, z), strict=True):
            close(ours, before, 1e-12)


def test_the_model_has_it_in_training_only():
    model, ids = small_model("bd_lru").train(), tokens()
    plain, with_z = model(ids, labels=ids), model(ids, labels=ids, z_loss=0.1)
    assert with_z.z_loss > 0
    close(with_z.loss - with_z.z_loss, plain.loss, SUMS)
    assert plain.z_loss is None
    assert torch.equal(model.eval()(ids, labels=ids, z_loss=0.1).loss, model(ids, labels=ids).loss)


def test_nothing_ignored_and_everything_ignored():
    for ignored in (0.0, 1.0):
        got, want = both(*case(ignored), None, 4)
        for a, b in zip(got, want, strict=True):
            close(a, b, SUMS)
    assert got[0] == 0
    assert not got[1].any()


def test_large_logits_stay_finite():
    hidden, weight, labels = case()
    got, want = both((200 * hidden).detach().requires_grad_(), weight, labels, None, 4)
    for a, b in zip(got, want, strict=True):
        assert a.isfinite().all()
        assert (a - b).norm() <= GRADIENT * b.norm()


def test_bf16_autocast():
    hidden, weight, labels = case()
    _, want = both(hidden, weight, labels, None, 4)
    hidden.grad = weight.grad = None
    with torch.autocast("cpu", torch.bfloat16):
        loss = linear_cross_entropy(hidden, weight, labels, None, 4)
    (3 * loss).backward()
    assert loss.dtype == hidden.grad.dtype == weight.grad.dtype == torch.float32
    for a, b in zip((loss, hidden.grad, weight.grad), want, strict=True):
        assert (a - b).norm() <= TOLERANCE["bf16"] * b.norm()


@pytest.mark.parametrize("ignored", [0.0, 0.3, 1.0])
def test_in_fp64_to_its_precision(ignored):
    hidden, weight, labels = case(ignored, torch.float64)
    total = F.cross_entropy((hidden @ weight.t()).flatten(0, 1), labels.flatten(), reduction="sum")
    want = total / max(1, int((labels != IGNORE).sum()))
    got = linear_cross_entropy(hidden, weight, labels, None, 4)
    assert got.dtype == torch.float64
    for a, b in zip(
        (got, *torch.autograd.grad(3 * got, (hidden, weight))),
        (want, *torch.autograd.grad(3 * want, (hidden, weight))),
        strict=True,
    ):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize(("chunk", "cached", "rows"), [(50, 1, 50), (1024, 1, 128), (1024, 19 * 200, 200)])
def test_the_logits_of_a_chunk_at_most_exist(chunk, cached, rows, monkeypatch):
    """On a CPU of what its caches hold, but of 128 tokens."""
    seen = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            out = function(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor) and out.ndim == 2 and out.shape[1] == 19:
                seen.append(out.shape[0])
            return out

    monkeypatch.setattr(loss, "CACHED_LOGITS", cached)
    hidden, labels = torch.randn(1, 450, 8, requires_grad=True), torch.zeros(1, 450, dtype=torch.long)
    with Watch():
        linear_cross_entropy(hidden, torch.randn(19, 8), labels, None, chunk).backward()
    assert max(seen) == rows


@pytest.mark.parametrize("starts", [None, "0000", "0100", "0010", "1011", "1111"])
def test_shifted_labels(starts):
    """Each token predicts the next token of its row, padding skipped, unless that begins a document."""
    masks = torch.tensor(list(itertools.product([False, True], repeat=4)))
    labels = torch.arange(64).view(16, 4)
    begins = None if starts is None else torch.tensor([[c == "1" for c in starts]] * 16)
    for mask in (None, masks):
        got = shift_labels(labels, begins, mask)
        for row, t in itertools.product(range(16), range(4)):
            kept = [k for k in range(4) if mask is None or mask[row, k]]
            later = [k for k in kept if k > t]
            nothing = t not in kept or not later or (begins is not None and begins[row, later[0]])
            assert got[row, t] == (IGNORE if nothing else labels[row, later[0]])


def test_a_count_of_labels_that_nothing_predicts():
    """Four labels but each row's first, of which three are targets: the Trainer's count is put right."""
    labels = torch.tensor([[IGNORE, 5, 6, 7], [IGNORE, 8, IGNORE, IGNORE]])
    targets = torch.tensor([[IGNORE, 6, 7, IGNORE], [8, IGNORE, IGNORE, IGNORE]])
    assert counted_targets(labels, targets, None) is None
    for given in (4, torch.tensor(4), torch.tensor([4, 4])):
        assert counted_targets(labels, targets, given) == 3
    for given in (3, 1, 3.5, torch.tensor(2)):
        assert counted_targets(labels, targets, given) is given, "no count of labels"
    for given in (5, torch.tensor([5, 5])):
        with pytest.raises(ValueError, match=r"counts 1 labels that nothing predicts"):
            counted_targets(labels, targets, given)
    for given in (3, 4, 7):  # nothing to put right, whatever other batches hold
        assert counted_targets(labels[:, :3], targets[:, :3], given) is given
    assert counted_targets(labels, torch.full_like(targets, IGNORE), 4) == 1


def test_frozen_parts_and_no_gradients():
    hidden, weight, labels = case()
    want = linear_cross_entropy(hidden, weight, labels, None, 4)
    linear_cross_entropy(hidden.detach(), weight, labels, None, 4).backward()
    assert hidden.grad is None
    assert weight.grad.abs().sum() > 0
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        close(linear_cross_entropy(hidden, weight, labels, None, 4), want.detach(), 0.0)
    assert counter.get_total_flops() == 2 * 21 * 8 * 19, "validation pays for the logits alone"


@pytest.mark.parametrize("name", NAMES)
def test_the_models_loss_is_the_logits_cross_entropy(name):
    model, ids = small_model(name), tokens()
    out = model(ids, labels=ids)
    close(out.loss, F.cross_entropy(out.logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()), SUMS)
    close(model(ids, shift_labels=shift_labels(ids)).loss, out.loss, 0.0)
    close(model(ids, labels=ids, num_items_in_batch=10).loss, out.loss * 40 / 10, SUMS)


@pytest.mark.parametrize(
    "shape", [(2, 20), (2, 22), (1, 21), (2, 1), (2, 15), (42,), (2, 21, 1), (0, 21)], ids=str
)
@pytest.mark.parametrize("kind", ["labels", "shift_labels"])
@pytest.mark.parametrize("adapted", [False, True])
def test_labels_of_another_shape(shape, kind, adapted):
    """Refused with both shapes, whatever the chunks leave for the last: (2, 15) leaves one label for it."""
    model = small_model("bd_lru")
    if adapted:
        model.lm_head = torch.nn.Sequential(model.lm_head)
    words = f"labels of shape {shape} do not fit inputs of shape (2, 21)"
    for given in (
        {"input_ids": tokens()},
        {"inputs_embeds": model.get_input_embeddings()(tokens()).detach()},
    ):
        with pytest.raises(ValueError, match=re.escape(words)):
            model(**given, **{kind: torch.zeros(shape, dtype=torch.long)})


@pytest.mark.parametrize("ignored", [0.3, 1.0])
@pytest.mark.parametrize("dtype", [torch.int64, torch.int32])
def test_a_head_that_is_no_plain_matrix_has_the_same_loss(ignored, dtype):
    """Also where no label is left, and in fp32 from logits in bf16."""
    model, ids = small_model("bd_lru"), tokens()
    labels = ids.masked_fill(
        torch.rand(ids.shape, generator=torch.Generator().manual_seed(4)) < ignored, IGNORE
    )
    given = [{"labels": labels.to(dtype), **more} for more in ({}, {"num_items_in_batch": 10})]
    want = [model(ids, **each).loss for each in given]
    model.lm_head = torch.nn.Sequential(model.lm_head)
    for each, plain in zip(given, want, strict=True):
        close(model(ids, **each).loss, plain, SUMS)
    logits = model(ids).logits.bfloat16()
    got = cross_entropy(logits, labels)
    assert got.dtype == torch.float32
    close(got, cross_entropy(logits.float(), labels), 0)


@pytest.mark.parametrize("kind", [LRNNForCausalLM, LRNNForReconstruction])
def test_another_head_in_fp64(kind):
    """A head that was replaced is called for the loss, whose precision is that of a plain one."""
    torch.manual_seed(0)
    model, ids = kind(small_config("bd_lru")).double().train(), tokens()
    want = model(ids, shift_labels=ids).loss
    model.lm_head = torch.nn.Sequential(model.lm_head)
    assert want.dtype == torch.float64
    close(model(ids, shift_labels=ids).loss, want, 1e-12)
    model.lm_head.append(torch.nn.Softplus())
    assert (model(ids, shift_labels=ids).loss - want).abs() > 1e-3


def test_a_single_target_counts_once():
    hidden, weight, labels = case(1.0)
    labels[1, 2] = 5
    logits = hidden @ weight.t()
    want = F.cross_entropy(logits[1, 2], labels[1, 2])
    close(linear_cross_entropy(hidden, weight, labels), want, SUMS)
    close(cross_entropy(logits, labels), want, SUMS)


@pytest.mark.parametrize("kind", ["labels", "shift_labels"])
def test_labels_of_another_dtype(kind):
    model, ids = small_model("bd_lru"), tokens()
    with pytest.raises(ValueError, match=r"labels are whole numbers, not torch.float32"):
        model(ids, **{kind: ids.float()})
    for dtype in (torch.int32, torch.int16, torch.int8, torch.uint8):  # which has no -100
        close(model(ids, **{kind: ids.to(dtype)}).loss, model(ids, **{kind: ids}).loss, 0)


@pytest.mark.parametrize("training", [False, True])
def test_labels_beside_shifted_labels_are_not_read(training):
    """As in transformers, whose Trainer passes both where a row is shared among ranks."""
    model, ids = small_model("bd_lru").train(training), tokens()
    shifted = torch.nn.functional.pad(ids[:, 1:], (0, 1), value=-100)
    want = model(ids, shift_labels=shifted).loss
    close(model(ids, labels=ids.roll(1, 0), shift_labels=shifted).loss, want, 0)
    assert model(ids, labels=ids, shift_labels=shifted.roll(1, 0)).loss != want


@pytest.mark.parametrize("number", [0, 1])
def test_second_derivatives_are_refused(number):
    """The backward pass multiplies constants: a second one through them would be wrong without a word."""
    hidden, weight, labels = case(dtype=torch.float64)
    loss = linear_cross_entropy(hidden, weight, labels, None, 4)
    with pytest.raises(RuntimeError, match=r"the chunked loss has no second derivatives.*logits"):
        torch.autograd.grad(loss, (hidden, weight)[number], create_graph=True)


@pytest.mark.parametrize("name", ["lstm", "attention"])
def test_second_derivatives_through_the_logits(name):
    """What the error advises gives finite differences of the first derivative."""
    model, ids = small_model(name).double(), tokens(length=7)
    weight = model.model.norm.weight
    direction = torch.randn(16, generator=torch.Generator().manual_seed(0), dtype=torch.float64)

    def first(create_graph):
        logits = model(ids, use_cache=False).logits[:, :-1].flatten(0, 1)
        loss = F.cross_entropy(logits, ids[:, 1:].flatten())
        return torch.autograd.grad(loss, weight, create_graph=create_graph)[0]

    got = torch.autograd.grad(first(True) @ direction, weight)[0]
    ends = []
    for step in (1e-5, -2e-5):
        with torch.no_grad():
            weight += step * direction
        ends.append(first(False))
    close(got, (ends[0] - ends[1]) / 2e-5, 1e-7)


def test_training_makes_no_logits_unless_asked():
    model, ids = small_model("bd_lru").train(), tokens()
    assert model(ids, labels=ids).logits is None
    assert model(ids, labels=ids, return_logits=True).logits.shape == (2, 21, VOCAB)
    assert model(ids).logits is not None


@pytest.mark.parametrize("tied", [False, True])
def test_gradients_of_the_whole_model(tied):
    model, ids = small_model("hybrid", tie_word_embeddings=tied).train(), tokens()
    model(ids, labels=ids).loss.backward()
    ours = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    logits = model(ids).logits
    F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).backward()
    for name, p in model.named_parameters():
        assert (ours[name] - p.grad).abs().max() <= GRADIENT * p.grad.abs().max(), name


@pytest.mark.skipif(not torch.backends.cuda.is_built(), reason="needs torch with CUDA, though no device")
def test_a_compiler_can_trace_it_as_on_a_gpu():
    """With tensors that only pretend: torch 2.11 cannot decompose a product with another output's dtype."""

    class Context:
        needs_input_grad = (True, True, False, False, False, False)

        def save_for_backward(self, *kept):
            pass

        mark_non_differentiable = save_for_backward

    def forward(hidden, weight, labels):
        return loss._LinearCrossEntropy.forward(Context(), hidden, weight, labels, 32, True, 0.0)

    with FakeTensorMode(), mock.patch.object(torch.compiler, "is_compiling", return_value=True):
        hidden = torch.empty(64, 32, device="cuda", dtype=torch.bfloat16)
        labels = torch.empty(64, device="cuda", dtype=torch.long)
        make_fx(torch.func.functionalize(forward))(hidden, torch.empty(50, 32, device="cuda"), labels)


@pytest.mark.gpu
@pytest.mark.parametrize("rows", [4096, 5000])
def test_fused_on_a_gpu(rows):
    """The fused passes over bf16 logits against torch's loss in fp32; the last chunk is a short one."""
    torch.manual_seed(0)
    hidden = torch.randn(1, rows, 64, device="cuda", requires_grad=True)
    weight = (0.3 * torch.randn(5003, 64, device="cuda")).requires_grad_()
    labels = torch.randint(5003, (1, rows), device="cuda")
    labels[0, ::7] = IGNORE
    _, want = both(hidden, weight, labels, None, 1024)
    hidden.grad = weight.grad = None
    with torch.autocast("cuda", torch.bfloat16):
        got = linear_cross_entropy(hidden, weight, labels, None, 1024)
    (3 * got).backward()
    assert weight.grad.dtype == torch.float32
    for a, b in zip((got, hidden.grad, weight.grad), want, strict=True):
        assert (a - b).norm() <= TOLERANCE["bf16"] * b.norm()
