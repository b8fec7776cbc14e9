"""The scan of a matrix-valued state: closed forms, the specification, plain torch, and Triton in the
interpreter (natively on a GPU, for which `benchmarks/gpu/matrix_scan.py` has larger shapes).

The interpreter takes seconds for a row of a chunk: shapes are the smallest that have the case.
"""

from itertools import pairwise

import pytest
import torch
from scans import TOLERANCE, assert_close, drawing, in_fp64, with_gradients
from triton_cases import DEVICE, TOLERANCES, inside, poison, to_device  # noqa: F401  (fixtures)

from lrnn_lm.kernels import BACKENDS, matrix_scan

NAMES = ("y", "last", "transitions", "writes", "values", "queries", "h0", "erase")
PLAIN = [name for name in BACKENDS if name != "triton"]


def make_inputs(B=2, T=9, H=2, K=4, M=2, V=4, dtype=torch.float32, reset_probability=0.1):
    """Gates as the mixer lays them out, M + 1 planes in fp32 or more; the first half of the slots is slow."""
    generator, draw = drawing(B * 1000 + T * 100 + K * 10 + M)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    z = draw(B, T, M + 1, H, K)
    z[:, :, M, :, : K // 2] -= 4
    gates = z.softmax(dim=2).to(wide)
    reset = torch.rand(B, T, generator=generator) < reset_probability
    return [
        gates[:, :, :M].permute(0, 1, 3, 4, 2), gates[:, :, M], draw(B, T, H, V).to(dtype),
        draw(B, T, H, K).to(dtype), draw(B, H, K, V).to(wide), reset,
    ]  # fmt: skip


def erasing(inputs):
    """The same inputs, with keys of length 1 as what is erased, and writes of a part of them."""
    transitions, _, values, queries, h0, reset = inputs
    keys = torch.nn.functional.normalize(queries.roll(1, 1).to(transitions.dtype), dim=-1)
    rates = torch.rand(keys.shape[:3], generator=torch.Generator().manual_seed(2)).to(keys)
    return [transitions, rates.unsqueeze(-1) * keys, values, queries, h0, keys, reset]


def run(inputs, backend):
    """y, h_last and the gradients of a random weighing of both."""
    *numbers, reset = inputs
    return with_gradients(lambda *given: matrix_scan(*given[:5], reset, backend, *given[5:]), numbers)


def compare(backend, dtype=torch.float32, inputs=None, **shape):
    inputs = make_inputs(dtype=dtype, **shape) if inputs is None else inputs
    tolerance = TOLERANCES[dtype] if backend == "triton" else TOLERANCE[dtype]
    if dtype in (torch.bfloat16, torch.float16) and backend == "triton":
        tolerance *= 2.5  # what passes between its kernels is in that dtype, too
    given = to_device(inputs) if backend == "triton" else inputs
    assert_close(NAMES, run(given, backend), run(in_fp64(inputs), "reference"), tolerance)


def test_the_state_is_a_sum_of_products():
    """S_T = A_T .. A_1 S_0 + sum_s A_T .. A_{s+1} k_s v_s^T, with dense block-diagonal matrices."""
    A, k, v, q, h0, _ = make_inputs(B=1, H=1, T=5, K=6, M=3, dtype=torch.float64)
    dense = [torch.block_diag(*A[0, t, 0].unflatten(0, (2, 3))) for t in range(5)]
    S = h0[0, 0]
    for t in range(5):
        S = dense[t] @ S + torch.outer(k[0, t, 0], v[0, t, 0])
    for backend in PLAIN:
        y, last = matrix_scan(A, k, v, q, h0, backend=backend)
        torch.testing.assert_close(last[0, 0], S)
        torch.testing.assert_close(y[0, -1, 0], S.T @ q[0, -1, 0])


def test_a_block_of_one_is_a_gated_sum():
    """M = 1, with decays d and k = 1 - d: HGRN2's S_t = d S_{t-1} + (1 - d) v^T, all steps at once."""
    A, _, v, q, _, _ = make_inputs(T=7, M=1, dtype=torch.float64)
    d = A.squeeze(-1)  # (B, T, H, K)
    decay = d.log().cumsum(dim=1)
    weight = (decay.unsqueeze(2) - decay.unsqueeze(1)).exp() * (1 - d).unsqueeze(1)  # (B, t, s, H, K)
    weight = weight * torch.ones(7, 7).tril().view(1, 7, 7, 1, 1)
    want = torch.einsum("btshk,bthk,bshv->bthv", weight, q, v)
    torch.testing.assert_close(matrix_scan(A, 1 - d, v, q)[0], want)


@pytest.mark.parametrize("T", [1, 2, 7, 33])
@pytest.mark.parametrize(("K", "M"), [(3, 1), (6, 3), (5, 5), (8, 4)])
def test_plain_torch(T, K, M):
    compare("torch", torch.float64, T=T, K=K, M=M, V=3)
    compare("torch", T=T, K=K, M=M, V=5)
    compare("torch", torch.float64, erasing(make_inputs(T=T, K=K, M=M, V=3, dtype=torch.float64)))
    compare("torch", inputs=erasing(make_inputs(T=T, K=K, M=M, V=5)))


def test_slabs_of_time(monkeypatch):
    """Memory is bounded: states of a few steps at once."""
    from lrnn_lm.kernels.scan import matrix_scan as module

    monkeypatch.setattr(module, "SLAB_BYTES", 3 * 8 * 2 * 2 * 4 * 4)
    compare("torch", torch.float64, T=11)
    compare("torch", torch.float64, erasing(make_inputs(T=11, dtype=torch.float64)))


@pytest.mark.parametrize("backend", PLAIN)
@pytest.mark.parametrize("T", [1, 9])
def test_autocast_leaves_products_in_their_dtype(backend, T):
    want = run(erasing(make_inputs(T=T)), backend)
    with torch.autocast("cpu", torch.bfloat16):  # around the backward pass too
        got = run(erasing(make_inputs(T=T)), backend)
    if backend == "reference" or T == 1:  # whose backward pass is autograd's: call it outside of autocast
        got, want = got[:2], want[:2]
    for name, a, b in zip(NAMES, got, want, strict=False):
        torch.testing.assert_close(a, b, rtol=0, atol=0, msg=name)


def test_gradcheck_and_no_second_derivative():
    *numbers, reset = make_inputs(B=1, T=4, H=1, dtype=torch.float64)
    numbers = [x.requires_grad_() for x in numbers]
    assert torch.autograd.gradcheck(lambda *x: matrix_scan(*x, reset), numbers)
    (gradient,) = torch.autograd.grad(matrix_scan(*numbers)[0].square().sum(), numbers[2], create_graph=True)
    with pytest.raises(RuntimeError, match="scans have no second derivatives"):
        gradient.sum().backward()


@pytest.mark.parametrize(
    ("T", "K", "M", "V"),
    [
        (2, 4, 4, 4),
        (19, 4, 1, 4),
        (17, 4, 2, 16),
        (18, 64, 1, 4),
        (16, 32, 8, 8),
        (17, 6, 2, 3),
    ],
)
def test_triton(T, K, M, V):
    pytest.importorskip("triton")
    compare("triton", T=T, K=K, M=M, V=V, B=1 if M > 4 else 2)


@pytest.mark.parametrize(
    ("T", "K", "M", "V", "dtype"),
    [(19, 6, 2, 3, torch.float32), (33, 8, 4, 8, torch.bfloat16), (16, 4, 1, 4, torch.float32)],
)
def test_triton_erases(T, K, M, V, dtype):
    pytest.importorskip("triton")
    compare("triton", dtype, erasing(make_inputs(T=T, K=K, M=M, V=V, B=1, dtype=dtype)))


@pytest.mark.parametrize(("kind", "M", "V"), [(list, 2, 32), (erasing, 1, 20), (erasing, 2, 48)])
def test_triton_splits_wide_heads(monkeypatch, kind, M, V):
    """Heads of more columns than a program holds, of which the last may be padding."""
    pytest.importorskip("triton")
    from lrnn_lm.kernels.scan import matrix

    monkeypatch.setattr(matrix, "PROGRAM_STATE", 16 * 64)
    compare("triton", inputs=kind(make_inputs(T=17, K=4, M=M, V=V)))


def test_programs_of_wide_heads_hold_as_much_as_registers_do():
    """By slots and columns: those of a program, and programs a head. The interpreter would take any."""
    pytest.importorskip("triton")
    from lrnn_lm.kernels.scan.matrix import _chunks
    from lrnn_lm.kernels.scan.matrix_scan import _padded

    told = {}
    for K, V in ((64, 64), (64, 128), (128, 64), (128, 256), (64, 200), (128, 130), (4, 256)):
        slots, columns = _padded(K, 1, V)
        chunks = _chunks(torch.zeros(1, 1, 1, slots, 1), columns, None)
        told[K, V] = chunks.columns, chunks.parts
    assert told == {
        (64, 64): (64, 1), (64, 128): (128, 1), (128, 64): (64, 1), (128, 256): (64, 4),
        (64, 200): (128, 2), (128, 130): (64, 3), (4, 256): (128, 2),
    }  # fmt: skip


def test_triton_splits_the_widest_heads():
    """128 slots, as `recipes/recurrent.yaml` has, and programs as large as on a GPU."""
    pytest.importorskip("triton")
    compare("triton", inputs=erasing(make_inputs(T=2, K=128, M=1, V=70, B=1, H=1)))


def test_what_a_write_erases():
    """S_t = (I - k_t e_t^T) A_t S_{t-1} + k_t v_t^T, with dense matrices; a step alone is the same."""
    A, k, v, q, h0, e, _ = erasing(make_inputs(B=1, H=1, T=5, K=6, M=3, dtype=torch.float64))
    S = h0[0, 0]
    for t in range(5):
        dense = torch.block_diag(*A[0, t, 0].unflatten(0, (2, 3)))
        S = (torch.eye(6) - torch.outer(k[0, t, 0], e[0, t, 0])) @ dense @ S + torch.outer(
            k[0, t, 0], v[0, t, 0]
        )
    first = matrix_scan(*(x[:, :4] for x in (A, k, v, q)), h0, erase=e[:, :4])[1]
    for last in (
        matrix_scan(A, k, v, q, h0, erase=e)[1],
        matrix_scan(*(x[:, 4:] for x in (A, k, v, q)), first, erase=e[:, 4:])[1],
    ):
        torch.testing.assert_close(last[0, 0], S)


@pytest.mark.slow  # the interpreter takes longer than for all other shapes
def test_triton_of_blocks_of_sixteen():
    pytest.importorskip("triton")
    compare("triton", T=3, K=16, M=16, V=2, B=1, H=1)


def test_triton_in_half_precision():
    """fp16; with bf16 in test_triton_erases."""
    pytest.importorskip("triton")
    compare("triton", torch.float16, T=17, K=4, M=2, V=4, B=1)


def test_triton_without_states_or_documents():
    pytest.importorskip("triton")
    *numbers, _, _ = make_inputs(T=35, B=1)
    compare("triton", inputs=[*numbers, None, None])


def test_triton_programs_take_several_chunks(monkeypatch):
    """Four programs for the six chunks of two heads: some take two, some one."""
    pytest.importorskip("triton")
    from lrnn_lm.kernels.scan import matrix

    monkeypatch.setattr(matrix, "INTERPRETED", False)  # an item a warp, as on a GPU
    monkeypatch.setattr(matrix, "PROGRAMS_PER_SM", 2)
    monkeypatch.setattr(matrix, "multiprocessors", lambda device: 2)
    compare("triton", T=33, K=8, M=2, V=4, B=1)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", [list, erasing])
def test_no_rows_at_all(backend, kind):
    *tensors, reset = kind(make_inputs(B=0))
    y, last, *gradients = run(to_device([*tensors, reset]), backend)
    assert len(y) == len(last) == 0
    assert all(x.shape == g.shape for x, g in zip(tensors, gradients, strict=True))


def test_triton_reads_any_strides():
    """And gradients that are expanded, as those of a sum are."""
    pytest.importorskip("triton")
    inputs = to_device(make_inputs(T=18))
    strange = [x.transpose(0, 1).contiguous().transpose(0, 1) for x in inputs[:4]]
    strange[0] = inputs[0].contiguous()
    strange += inputs[4:]
    for got, want in zip(run(strange, "triton"), run(inputs, "triton"), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-6)
    inputs = [x[:1] for x in inputs]
    values = inputs[2].clone().requires_grad_()
    y, _ = matrix_scan(*inputs[:2], values, inputs[3], backend="triton")
    (got,) = torch.autograd.grad(y.sum(), values)
    y, _ = matrix_scan(*inputs[:2], values, inputs[3], backend="torch")
    torch.testing.assert_close(got, torch.autograd.grad(y.sum(), values)[0], rtol=1e-5, atol=1e-5)


def test_triton_reads_what_heads_and_slots_share():
    """One decay a head, writes and queries of all heads: views whose strides are 0, as of Mamba-2."""
    pytest.importorskip("triton")
    A, k, v, q, h0, reset = to_device(make_inputs(T=18, K=4, M=1, B=1))
    numbers = [x.detach().requires_grad_() for x in (A[:, :, :, :1], k[:, :, :1], v, q[:, :, :1], h0)]
    shared = [x.expand(like.shape) for x, like in zip(numbers, (A, k, v, q, h0), strict=True)]
    for triton, plain in zip(
        matrix_scan(*shared, reset, "triton"), matrix_scan(*shared, reset, "torch"), strict=True
    ):
        torch.testing.assert_close(triton, plain, rtol=1e-5, atol=1e-5)
        weight = torch.randn_like(plain)
        for got, want in zip(
            torch.autograd.grad((triton * weight).sum(), numbers, retain_graph=True),
            torch.autograd.grad((plain * weight).sum(), numbers, retain_graph=True), strict=True,
        ):  # fmt: skip
            torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("backend", BACKENDS)
def test_documents_are_sequences_of_their_own(backend):
    if backend == "triton":
        pytest.importorskip("triton")
    A, k, v, q, _, _ = to_device(make_inputs(T=20, B=1))
    starts = [0, 3, 4, 17, 20]
    reset = torch.zeros(1, 20, dtype=torch.bool, device=DEVICE)
    reset[:, starts[1:-1]] = True
    whole, last = matrix_scan(A, k, v, q, None, reset, backend=backend)
    parts = [matrix_scan(*(x[:, a:b] for x in (A, k, v, q)), backend=backend) for a, b in pairwise(starts)]
    torch.testing.assert_close(whole, torch.cat([y for y, _ in parts], 1), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(last, parts[-1][1], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("cut", [1, 17])
def test_a_split_scan_is_the_whole_scan(backend, cut):
    if backend == "triton":
        pytest.importorskip("triton")
    *numbers, h0, reset = to_device(make_inputs(T=19, B=1))
    whole, last = matrix_scan(*numbers, h0, reset, backend=backend)
    first, S = matrix_scan(*(x[:, :cut] for x in numbers), h0, reset[:, :cut], backend=backend)
    second, end = matrix_scan(*(x[:, cut:] for x in numbers), S, reset[:, cut:], backend=backend)
    torch.testing.assert_close(whole, torch.cat([first, second], 1), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(last, end, rtol=1e-5, atol=1e-5)


def test_the_triton_scan_compiles_without_a_graph_break():
    """Plain torch's: tests/model/test_model_compile.py."""
    pytest.importorskip("triton")
    torch.compiler.reset()
    *numbers, h0, reset = to_device(make_inputs(T=5, B=1, H=1))
    numbers = [x.requires_grad_() for x in numbers]

    def loss(h0):
        y, last = matrix_scan(*numbers, h0, reset, backend="triton")
        return y.square().sum() + last.sum()

    compiled = torch.compile(loss, backend="aot_eager", fullgraph=True)
    for got, want in zip(
        torch.autograd.grad(compiled(h0), numbers), torch.autograd.grad(loss(h0), numbers), strict=True
    ):
        torch.testing.assert_close(got, want)


def test_mistakes_are_told():
    A, k, v, q, h0, reset = make_inputs(K=6, M=3)
    wrong = [
        ((A, k, v[:, :1], q, None, None, "auto"), "values has shape"),
        ((A, k, v, q[..., :1], None, None, "auto"), "queries has shape"),
        ((A, k, v, q, h0[:1], None, "auto"), "h0 has shape"),
        ((A, k, v, q, None, reset.float(), "auto"), "bool mask"),
        ((A[:, :, :, :4], k, v, q, None, None, "auto"), "do not split into blocks"),
        ((A.unsqueeze(0), k, v, q, None, None, "auto"), r"\(B, T, H, K, M\)"),
        ((A, k, v.long(), q, None, None, "auto"), "floating-point"),
        ((A, k, v, q, None, None, "cuda"), "unknown backend 'cuda'"),
        ((A, k, v, q, None, None, "auto", q[..., :1]), "erase has shape"),
    ]
    for given, message in wrong:
        with pytest.raises(ValueError, match=message):
            matrix_scan(*given)


def test_what_triton_cannot_run_is_told(monkeypatch):
    pytest.importorskip("triton")

    def told(message, **shape):
        with pytest.raises(ValueError, match=f"backend 'triton' cannot run here: .*{message}"):
            matrix_scan(*to_device(make_inputs(**shape)), backend="triton")

    told("block size 3", K=6, M=3)
    told("128 slots is above 64", K=128, M=4)
    told("129 slots is above 128", K=129, M=1)
    told("fp64", dtype=torch.float64)
    if DEVICE == "cpu":
        monkeypatch.delenv("TRITON_INTERPRET")
        told("triton compiles for GPUs")
