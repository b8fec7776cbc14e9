"""The kernel benchmark: what it compares is equal, what it counts is right, and it runs without a GPU."""

import json

import pytest
import torch

from benchmarks import kernel_peers, kernels
from benchmarks.kernels import Shape
from lrnn_lm.files import pick_device


@pytest.mark.parametrize("family", ["bd_lru", "h_lru"])
def test_the_associative_formulation_is_the_same_recurrence(family):
    shape = Shape(family, M=2, N=3)
    gates, values, _ = kernels.make_inputs(shape, 2, 8, torch.float32, torch.device("cpu"))
    peer = kernel_peers.associative_peer(family, gates, values, compiled=False)
    torch.testing.assert_close(peer.forward(), shape.scan(gates, values, "reference"))


@pytest.mark.parametrize("family", ["bd_lru", "h_lru"])
def test_the_timed_backward_is_the_scans_backward(family):
    pytest.importorskip("triton")
    shape = Shape(family, M=2, N=3)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    planes = shape.planes(2, 4, torch.float32, device).requires_grad_()
    h = shape.scan_planes(planes)
    grad = torch.randn_like(h)
    wanted = torch.autograd.grad(h, planes, grad)[0]
    torch.testing.assert_close(kernels.scan_backward(shape, planes.detach(), h.detach(), grad)()[0], wanted)


def test_bytes_are_counted_once():
    """BD M=4, one token: 4 rows of 5 gates, 4 values and 4 states in; gradients of all but h, and dh, the
    other way."""
    assert Shape("bd_lru", 4, 1).moved_bytes(1, 1, 2) == (2 * (20 + 4 + 4), 2 * (2 * 20 + 4 * 4))
    assert Shape("h_lru", 4, 1).moved_bytes(1, 1, 2) == (2 * (5 + 2), 2 * (10 + 4))


def test_runs_on_a_cpu(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(kernels, "CPU_SHAPES", (Shape("bd_lru", 2, 4), Shape("h_lru", 2, 4)))
    result = kernels.run(device="cpu", output=tmp_path / "rows.json")
    assert json.loads((tmp_path / "rows.json").read_text())["rows"] == result["rows"]
    assert [row["what"].split()[-1] for row in result["rows"]] == ["reference", "torch"] * 2
    assert all(row["tokens_per_second"] > 0 for row in result["rows"])
    printed = capsys.readouterr().out
    assert "fwd + bwd ms" in printed  # what was timed, as the column's name
    assert "fwd ms" not in printed


def test_an_absent_gpu_is_said():
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(ValueError, match="no such CUDA device"):
        kernels.run(device="cuda")


def test_an_absent_mps_is_said(monkeypatch):
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    with pytest.raises(ValueError, match="device 'mps': this machine or this build of torch has no MPS"):
        pick_device("mps")
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert pick_device("mps").type == "mps"


def test_an_unknown_device_is_told():
    with pytest.raises(ValueError, match="device 'foo': use auto"):
        pick_device("foo")
