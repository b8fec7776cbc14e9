"""The block-diagonal GRU and sLSTM: walk and Newton on each backend against the reference in fp64."""

import pytest
import torch
from scans import assert_close, drawing, in_fp64, with_gradients
from torch.utils._python_dispatch import TorchDispatchMode
from triton_cases import TOLERANCES, cut_time, inside, poison, to_device  # noqa: F401  (fixtures)

from lrnn_lm.kernels import BACKENDS, gru_scan, reference, slstm_scan

NAMES = ("h", "h_last", "inputs", "weight", "bias", "h0")
SLSTM = (4, 3)  # planes of the inputs and of the state


def make_inputs(
    B=2, T=19, N=3, M=4, dtype=torch.float32, reset_probability=0.1, scale=0.6, planes=(3,)
) -> list:
    G, *kept = planes
    generator, draw = drawing(1000 * B + 10 * T + M)
    weight = scale * draw(G, N, M, M) / M**0.5
    reset = torch.rand(B, T, generator=generator) < reset_probability if reset_probability else None
    state = torch.float64 if dtype == torch.float64 else torch.float32
    return [
        draw(B, T, G, N, M).to(dtype),
        *(x.to(state) for x in (weight, draw(4, N, M), draw(B, *kept, N, M))),
        reset,
    ]


def run(inputs: list, function=gru_scan, **options) -> list[torch.Tensor]:
    """Both outputs, and gradients of a random weighing of them."""
    *numbers, reset = inputs
    return with_gradients(lambda *given: function(*given, reset, **options)[:2], numbers)


def compare(inputs: list, tolerance: float, **options) -> None:
    of_slstm = inputs[0].shape[2] == 4
    wanted = run(in_fp64(inputs), reference.slstm_scan if of_slstm else reference.gru_scan)
    given = to_device(inputs) if options["backend"] == "triton" else inputs
    assert_close(NAMES, run(given, slstm_scan if of_slstm else gru_scan, **options), wanted, tolerance)


def test_one_block_is_torchs_gru():
    """All units in one block: torch's GRU, whose rows are r, z, n too."""
    torch.manual_seed(0)
    theirs, x, h0 = (
        torch.nn.GRU(5, 4, batch_first=True).double(),
        torch.randn(2, 9, 5).double(),
        torch.randn(1, 2, 4),
    )
    inputs = (x @ theirs.weight_ih_l0.T).view(2, 9, 3, 1, 4)
    b, recurrent = theirs.bias_ih_l0.view(3, 4), theirs.bias_hh_l0.view(3, 4)
    bias = torch.stack([b[0] + recurrent[0], b[1] + recurrent[1], b[2], recurrent[2]]).view(4, 1, 4)
    weight = theirs.weight_hh_l0.view(3, 1, 4, 4)
    h, _ = reference.gru_scan(inputs, weight, bias, h0[0].unsqueeze(1).double())
    torch.testing.assert_close(h.flatten(2), theirs(x, h0.double())[0])


@pytest.mark.parametrize("solver", ["walk", "newton"])
@pytest.mark.parametrize("resets", [0.0, 0.15])
def test_torch_in_fp64(solver, resets):
    compare(
        make_inputs(T=23, M=5, dtype=torch.float64, reset_probability=resets),
        1e-9,
        backend="torch",
        solver=solver,
    )


def test_slstm_is_the_papers():
    """Step by step with its stabiliser m, in units of e^m; n starts with 1."""
    x, weight, bias, _, _ = make_inputs(dtype=torch.float64, planes=SLSTM)
    x = 3 * x
    h = c = m = torch.zeros(2, 3, 4, dtype=torch.float64)
    n, outputs = torch.ones_like(h), []
    for t in range(19):
        recurrent = torch.einsum("gnij,bnj->bgni", weight, h)
        z, i, f, o = (x[:, t] + recurrent + bias).unbind(1)
        kept = torch.nn.functional.logsigmoid(f) + m
        m = torch.maximum(kept, i)
        write, keep = (i - m).exp(), (kept - m).exp()
        c, n = keep * c + write * z.tanh(), keep * n + write
        h = o.sigmoid() * c / n
        outputs.append(h)
    got, (_, ratio, log_n) = slstm_scan(x, weight, bias)[0], slstm_scan(x, weight, bias)[1].unbind(1)
    torch.testing.assert_close(got, torch.stack(outputs, dim=1))
    torch.testing.assert_close(ratio, c / n)
    torch.testing.assert_close(log_n, n.log() + m)


@pytest.mark.parametrize("resets", [0.0, 0.15])
def test_torch_slstm_in_fp64(resets):
    compare(
        make_inputs(T=9, M=5, dtype=torch.float64, reset_probability=resets, planes=SLSTM),
        1e-9,
        backend="torch",
    )


# (M, T): whole groups and rests
TRITON = [(1, 1), (1, 20), (3, 12), (4, 19), (8, 9), (16, 7)]


@pytest.mark.parametrize(("M", "T"), TRITON)
@pytest.mark.parametrize("planes", [(3,), SLSTM])
def test_triton_walk(planes, M, T):
    compare(make_inputs(T=T, M=M, N=1 if M == 16 else 3, planes=planes), 3e-6, backend="triton")


@pytest.mark.parametrize(("M", "T"), [(3, 11), (4, 18), (16, 5)])
def test_triton_newton(M, T):
    compare(make_inputs(B=1, T=T, M=M, N=1 if M == 16 else 2), 1e-5, backend="triton", solver="newton")


@pytest.mark.parametrize("planes", [(3,), SLSTM])
def test_bf16_inputs_and_no_resets(planes):
    """Only the inputs and their gradient are rounded; gates and states are fp32."""
    inputs = make_inputs(dtype=torch.bfloat16, reset_probability=0.0, planes=planes)
    compare(inputs, TOLERANCES[torch.bfloat16], backend="triton")


def test_newton_in_chunks_of_time(monkeypatch):
    """Where rows are few the scans of the corrections are cut; steps by themselves always are."""
    cut_time(monkeypatch, 8)
    compare(make_inputs(B=1, T=19, N=1, M=9), 1e-5, backend="triton", solver="newton")


@pytest.mark.parametrize(("M", "N"), [(3, 9), (1, 35)])
def test_rows_of_several_programs(monkeypatch, M, N):
    """A warp each, as on a GPU; the interpreter is given wider ones elsewhere."""
    from lrnn_lm.kernels.scan import gru_triton

    monkeypatch.setattr(gru_triton, "INTERPRETED", False)
    compare(make_inputs(T=5, N=N, M=M), 3e-6, backend="triton")


@pytest.mark.parametrize("planes", [(3,), SLSTM])
@pytest.mark.parametrize("backend", BACKENDS)
def test_no_rows_at_all(planes, backend):
    *tensors, reset = make_inputs(planes=planes, B=0)
    function = slstm_scan if planes == SLSTM else gru_scan
    h, last, *gradients = run(to_device([*tensors, reset]), function, backend=backend)
    assert len(h) == len(last) == 0
    assert all(x.shape == g.shape and not g.any() for x, g in zip(tensors, gradients, strict=True))


def test_newton_tells_its_iterations():
    inputs = make_inputs(B=1, T=600, dtype=torch.float64)
    h, _, told = gru_scan(*inputs, solver="newton")
    torch.testing.assert_close(h, gru_scan(*inputs)[0], rtol=0, atol=1e-9)
    iterations, residual = told.tolist()
    assert 2 <= iterations <= 12
    assert 0 < residual <= 1e-5
    assert gru_scan(*inputs)[2].tolist() == [0, 0]


def test_newton_that_does_not_converge():
    with pytest.raises(ValueError, match=r"did not converge: a residual of .* use the walk \(solver: walk\)"):
        gru_scan(*make_inputs(B=1, T=400, M=8, scale=12.0, reset_probability=0), solver="newton")


def test_scanning_in_two_parts():
    x, weight, bias, h0, reset = make_inputs(dtype=torch.float64)
    h, last, _ = gru_scan(x, weight, bias, h0, reset)
    first, state, _ = gru_scan(x[:, :7], weight, bias, h0, reset[:, :7])
    second, after, _ = gru_scan(x[:, 7:], weight, bias, state, reset[:, 7:])
    torch.testing.assert_close(torch.cat([first, second], dim=1), h)
    torch.testing.assert_close(after, last)


class Made(TorchDispatchMode):
    """Names of the operators, our own aside, that return as many numbers as `size`, or more."""

    def __init__(self, size: int):
        super().__init__()
        self.size, self.names = size, []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        found = function(*args, **(kwargs or {}))
        if function.namespace == "aten" and isinstance(found, torch.Tensor) and found.numel() >= self.size:
            self.names.append(str(function))
        return found


@pytest.mark.parametrize(("scan", "planes"), [(gru_scan, (3,)), (slstm_scan, SLSTM)])
def test_the_way_back_makes_no_planes_of_zeros(scan, planes):
    *tensors, reset = make_inputs(planes=planes)
    h = scan(*(x.requires_grad_() for x in tensors), reset, backend="torch")[0]
    grad = torch.ones_like(h)
    with Made(h.numel()) as made:
        torch.autograd.grad(h, tensors[:3], grad)
    assert [name for name in made.names if "detach" not in name] == []


def test_slstm_in_two_parts():
    x, weight, bias, h0, reset = make_inputs(dtype=torch.float64, planes=SLSTM)
    h, last = slstm_scan(x, weight, bias, h0, reset)
    first, state = slstm_scan(x[:, :7], weight, bias, h0, reset[:, :7])
    second, after = slstm_scan(x[:, 7:], weight, bias, state, reset[:, 7:])
    torch.testing.assert_close(torch.cat([first, second], dim=1), h)
    torch.testing.assert_close(after, last)


@pytest.mark.parametrize(("change", "message"), [
    ({"solver": "jacobi"}, "unknown solver 'jacobi'; known: walk, newton"),
    ({"backend": "cuda"}, "unknown backend 'cuda'"),
    ({"weight": torch.zeros(3, 3, 4, 5)}, "weight has shape"),
    ({"bias": torch.zeros(3, 3, 4)}, "bias has shape"),
    ({"inputs": torch.zeros(2, 5, 3, 12)}, "inputs has shape"),
])  # fmt: skip
def test_mistakes(change, message):
    inputs, weight, bias, _, _ = make_inputs()
    given = {"inputs": inputs, "weight": weight, "bias": bias}
    with pytest.raises(ValueError, match=message):
        gru_scan(**{**given, **change})


@pytest.mark.parametrize(("dtype", "M", "message"), [
    (torch.float64, 2, "too coarse for fp64"), (torch.float32, 17, "block size 17 is above 16"),
])  # fmt: skip
def test_triton_says_why_not(dtype, M, message):
    with pytest.raises(ValueError, match=message):
        gru_scan(*to_device(make_inputs(dtype=dtype, M=M)), backend="triton")
