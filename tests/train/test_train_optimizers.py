"""The registry of optimizers: what each must say of itself, and a new one that is a class and a line."""

import signal
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Self

import pytest
import torch
from safetensors.torch import load_file
from small_models import MIXER_ROWS, small_model
from test_train_muon import with_gradients
from test_train_resume import LAST, assert_same_run
from tiny_run import STEPS, losses
from torch import Tensor, nn
from trainers import Build, send_at

from lrnn_lm import LRNNConfig, LRNNForCausalLM
from lrnn_lm.recipe.optim import OptimSection
from lrnn_lm.runs.checkpoint import CheckpointError
from lrnn_lm.train.optim import OPTIMIZERS, Optimizer, decay_groups, make_optimizer, state_bytes
from lrnn_lm.train.stop import Stopped

CPU = torch.device("cpu")
needs_torchao = pytest.mark.skipif(find_spec("torchao") is None, reason="torchao is not installed")
NAMES = [pytest.param(name, marks=needs_torchao if cls.needs else ()) for name, cls in OPTIMIZERS.items()]


@pytest.fixture(autouse=True)
def eager() -> Iterator[None]:
    """torchao compiles its update, which takes seconds for each shape on a CPU."""
    with torch.compiler.set_stance("force_eager"):
        yield


class SGD(Optimizer, torch.optim.SGD):
    """The docs' example (docs/extending.md)."""

    @classmethod
    def build(cls, model: nn.Module, optim: OptimSection, device: torch.device) -> Self:
        return cls(decay_groups(model.parameters(), optim.weight_decay), lr=optim.lr, momentum=0.9)

    def new_state(self, parameter: nn.Parameter) -> dict[str, Tensor]:
        return {"momentum_buffer": torch.zeros_like(parameter, requires_grad=False)}


@pytest.fixture
def sgd(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(OPTIMIZERS, "sgd", SGD)


@pytest.mark.usefixtures("sgd")
@pytest.mark.parametrize("name", [*NAMES, "sgd"])
def test_the_new_state_is_the_state_that_a_step_begins_from(name: str) -> None:
    """Names, shapes, dtypes and devices, and the first step from it."""
    section = OptimSection(name=name, lr=0.02)
    plain, filled = with_gradients(small_model("hybrid")), with_gradients(small_model("hybrid"))
    optimizers = [make_optimizer(model, section, CPU) for model in (plain, filled)]
    expected = {}
    for key, parameter in filled.named_parameters():
        expected[key] = optimizers[1].new_state(parameter)
        optimizers[1].state[parameter] = optimizers[1].new_state(parameter)
    for optimizer in optimizers:
        optimizer.step()
    for (key, ours), theirs in zip(plain.named_parameters(), filled.parameters(), strict=True):
        assert torch.equal(ours, theirs), key
        made = optimizers[0].state[ours]
        assert made.keys() == expected[key].keys()
        for kind, value in made.items():
            like = expected[key][kind]
            assert (value.shape, value.dtype, value.device) == (like.shape, like.dtype, like.device)
            assert not like.any()
            assert not like.requires_grad
    held = sum(value.nbytes for state in optimizers[0].state.values() for value in state.values())
    assert state_bytes(plain.to("meta"), section) == held


@pytest.mark.parametrize("name", NAMES)
def test_what_is_frozen_or_has_no_gradient_stays(name: str) -> None:
    """All of one kind in turn: nothing decays it, and no state is kept of it."""
    model = with_gradients(small_model("hybrid"))
    before = {key: p.detach().clone() for key, p in model.named_parameters()}
    frozen, idle = ({key for number, key in enumerate(before) if number % 3 == kind} for kind in (0, 1))
    for key, parameter in model.named_parameters():
        parameter.requires_grad_(key not in frozen)
        if key in frozen | idle:
            parameter.grad = None
    optimizer = make_optimizer(model, OptimSection(name=name, lr=0.02), CPU)
    listed = {id(p) for group in optimizer.param_groups for p in group["params"]}
    optimizer.step()
    for key, parameter in model.named_parameters():
        assert (id(parameter) in listed) == (key not in frozen), key
        assert torch.equal(parameter, before[key]) == (key in frozen | idle), key
        assert bool(optimizer.state[parameter]) == (key not in frozen | idle), key


@pytest.mark.parametrize("name", NAMES)
def test_a_rate_that_is_set_is_everybodys(name: str) -> None:
    """At none nothing moves; the trainer sets it before each step."""
    model = with_gradients(small_model("bd_lru"))
    optimizer = make_optimizer(model, OptimSection(name=name, lr=0.02), CPU)
    for rate, moves in ((0.0, False), (0.02, True)):
        for group in optimizer.param_groups:
            group["lr"] = rate
        before = [p.detach().clone() for p in model.parameters()]
        optimizer.step()
        assert all(torch.equal(p, q) != moves for p, q in zip(model.parameters(), before, strict=True))


@pytest.mark.parametrize("name", NAMES)
def test_groups_by_pattern(name: str) -> None:
    """The first pattern counts; a scale acts as that rate for all would, a decay as that decay would."""

    def stepped(**changes: object) -> dict[str, Tensor]:
        model = with_gradients(small_model("bd_lru"))
        optimizer = make_optimizer(model, OptimSection(name=name, lr=0.02, **changes), CPU)
        for group in optimizer.param_groups:
            group["lr"] = 0.02 * group["lr_scale"]
        optimizer.step()
        assert sum(len(group["params"]) for group in optimizer.param_groups) == len(list(model.parameters()))
        return {key: p.detach() for key, p in model.named_parameters()}

    groups = [
        {"match": "*gate_proj.weight", "lr_scale": 0.5, "weight_decay": 0.0},
        {"match": "*.layers.0.*", "lr_scale": 0.0},
        {"match": "*norm*", "weight_decay": 0.3},
    ]
    plain, got = stepped(), stepped(groups=groups)
    half = stepped(groups=[{"match": "*", "lr_scale": 0.5, "weight_decay": 0.0}])
    fresh = {key: p.detach() for key, p in with_gradients(small_model("bd_lru")).named_parameters()}
    decayed = {key for key in got if "norm" in key and ".layers.0." not in key}
    for key, value in got.items():
        if key.endswith("gate_proj.weight"):
            assert torch.equal(value, half[key]), key
        elif ".layers.0." in key:
            assert torch.equal(value, fresh[key]), key
        elif key in decayed:
            torch.testing.assert_close(value, plain[key] - 0.02 * 0.3 * fresh[key])
        else:
            assert torch.equal(value, plain[key]), key
    assert decayed


@pytest.mark.parametrize(
    ("patterns", "words"),
    [
        (["*gate_prj*"], "optim.groups.0: no parameter matches '\\*gate_prj\\*'; near it: gate_proj"),
        (["*", "*norm*"], "optim.groups.1: groups before it take all that"),
        (["*lm_head*"], "makes head and embedding one: match '\\*embed_tokens\\*'"),
    ],
)
def test_a_group_without_parameters(patterns: list[str], words: str, build: Build, tmp_path: Path) -> None:
    groups = ", ".join(f"{{match: '{pattern}'}}" for pattern in patterns)
    with pytest.raises(ValueError, match=words):
        build(f"optim.groups=[{groups}]", "model.tie_word_embeddings=true")
    assert not (tmp_path / "tiny").exists()


@pytest.mark.usefixtures("sgd")
def test_a_new_optimizer_trains_saves_and_resumes(build: Build, straight: Path) -> None:
    whole = build("name=whole", "optim.name=sgd")
    whole.run()
    first = build("optim.name=sgd")
    send_at(first, 5, signal.SIGTERM)
    with pytest.raises(Stopped):
        first.run()
    second = build("optim.name=sgd")
    assert second.position.step == 5
    second.run()
    assert_same_run(second.folder, whole.folder)
    assert len(losses(second.folder)) == STEPS
    assert losses(second.folder) != losses(straight)


def test_width_transfer(build: Build) -> None:
    """Rates, decays and start of a model four times as wide as its base; the base's own are unchanged."""
    plain, same = build("name=plain"), build("name=same", "optim.base_width=32")
    for ours, theirs in zip(plain.optimizer.param_groups, same.optimizer.param_groups, strict=True):
        assert (ours["lr_scale"], ours["weight_decay"]) == (theirs["lr_scale"], theirs["weight_decay"])
    for ours, theirs in zip(plain.bare_model.parameters(), same.bare_model.parameters(), strict=True):
        assert torch.equal(ours, theirs)
    wide = build("name=wide", "optim.base_width=8", "optim.groups=[{match: '*up_proj*', lr_scale: 0.5}]")
    held = {p: group for group in wide.optimizer.param_groups for p in group["params"]}
    expected = {
        "embed_tokens": (1.0, 0.1, 1.0),
        "lm_head": (0.25, 0.4, 0.25),
        "value_proj": (0.25, 0.4, 0.5),
        "up_proj": (0.125, 0.4, 0.5),
        "norm": (1.0, 0.0, 1.0),
        "gate_proj.bias": (1.0, 0.0, 1.0),
    }
    narrow = dict(plain.bare_model.named_parameters())
    for key, (rate, decay, start) in expected.items():
        found = [(name, p) for name, p in wide.bare_model.named_parameters() if key in name]
        assert found, key
        for name, parameter in found:
            group = held[parameter]
            assert (group["lr_scale"], group["weight_decay"]) == pytest.approx((rate, decay)), name
            torch.testing.assert_close(parameter, start * narrow[name])


@pytest.mark.parametrize("mixer", MIXER_ROWS)
def test_what_decays_and_what_width_scales(mixer: str) -> None:
    """Of every mixer: linear layers and LSTMs do both, convolutions only decay, what it holds itself neither.

    A norm must not shrink, nor a recurrent matrix forget, and its blocks are of the same size at every width.
    """
    model = small_model(mixer, tie_word_embeddings=False)
    optim = OptimSection(lr=1e-3, weight_decay=0.1, base_width=8)
    held = {p: g for g in make_optimizer(model, optim, CPU).param_groups for p in g["params"]}
    assert held.keys() == set(model.parameters())
    for path, module in model.named_modules():
        own = path.endswith(".mixer")
        for name, parameter in module.named_parameters(recurse=False):
            scaled = isinstance(module, nn.Linear | nn.LSTM) and parameter.ndim == 2
            decays = parameter.ndim > 1 and not own
            group = held[parameter]
            assert group["lr_scale"] == (0.5 if scaled else 1.0), f"{path}.{name}"
            expected = (0.1 if decays else 0.0) / group["lr_scale"]
            assert group["weight_decay"] == expected, f"{path}.{name}"


class RWKV7Attention(nn.Module):
    """Stands in for fla's, which needs Triton to be imported: its parameters, by name and shape."""

    def __init__(self, hidden_size: int, num_heads: int, head_dim: int, **_: int):
        super().__init__()
        D = hidden_size
        for share in "rwkvag":
            self.register_parameter(f"x_{share}", nn.Parameter(torch.ones(1, 1, D)))
        self.k_k, self.k_a = nn.Parameter(torch.ones(D)), nn.Parameter(torch.ones(D))
        self.r_k = nn.Parameter(torch.ones(num_heads, head_dim))
        self.r_proj, self.k_proj, self.v_proj = (nn.Linear(D, D, bias=False) for _ in "rkv")
        self.w_lora, self.a_lora, self.g_lora = nn.Module(), nn.Module(), nn.Module()
        for lora in (self.w_lora, self.a_lora, self.g_lora):
            lora.lora = nn.Sequential(nn.Linear(D, 4, bias=False), nn.Tanh(), nn.Linear(4, D))
        self.g_norm = nn.GroupNorm(num_heads, D)


def test_what_the_layer_of_a_library_holds_itself_does_not_decay(monkeypatch: pytest.MonkeyPatch) -> None:
    """RWKV-7's shares of the token before have three axes, and r_k has two; published, neither decays."""
    layers = SimpleNamespace(RWKV7Attention=RWKV7Attention)
    monkeypatch.setitem(sys.modules, "fla", SimpleNamespace(layers=layers))
    monkeypatch.setitem(sys.modules, "fla.layers", layers)
    spec = {"type": "rwkv7", "head_dim": 8}
    config = LRNNConfig(vocab_size=17, hidden_size=16, num_hidden_layers=1, intermediate_size=16, mixer=spec)
    model = LRNNForCausalLM(config)
    groups = make_optimizer(model, OptimSection(lr=1e-3, weight_decay=0.1), CPU).param_groups
    decay = {p: group["weight_decay"] for group in groups for p in group["params"]}
    for path, module in model.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            decays = isinstance(module, nn.Linear | nn.Embedding) and name == "weight"
            assert decay[parameter] == (0.1 if decays else 0.0), f"{path}.{name}"


def test_a_group_may_let_a_mixers_own_decay() -> None:
    model = small_model("m2rnn")
    groups = [{"match": "*recurrent_weight", "weight_decay": 0.2}]
    optimizer = make_optimizer(model, OptimSection(lr=1e-3, weight_decay=0.1, groups=groups), CPU)
    found = {p: group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    assert found[model.model.layers[0].mixer.recurrent_weight] == 0.2


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("optim.name=muon",), r"optim\.base_width is for AdamW"),
        (("model.tie_word_embeddings=true",), r"set model\.tie_word_embeddings=false"),
    ],
)
def test_width_transfer_is_not_for_all(
    build: Build, tmp_path: Path, options: tuple[str, ...], words: str
) -> None:
    with pytest.raises(ValueError, match=words):
        build("optim.base_width=8", *options)
    assert not (tmp_path / "tiny").exists()


@needs_torchao
def test_8_bit_moments_are_saved_and_resumed(build: Build, straight: Path) -> None:
    """The embedding's are packed, norms' are not; the losses stay near AdamW's."""
    whole = build("name=whole", "optim.name=adamw8bit")
    whole.run()
    stored = load_file(whole.folder / LAST / "trainer/optimizer.safetensors")
    assert stored["model.embed_tokens.weight/exp_avg_codes"].dtype == torch.uint8
    assert stored["model.embed_tokens.weight/exp_avg_sq_scale"].shape == (320 * 32 // 256,)
    assert stored["model.norm.weight/exp_avg"].dtype == torch.float32
    first = build("optim.name=adamw8bit")
    send_at(first, 5, signal.SIGTERM)
    with pytest.raises(Stopped):
        first.run()
    second = build("optim.name=adamw8bit")
    second.run()
    assert_same_run(second.folder, whole.folder)
    ours, theirs = ([loss for _, loss in losses(run)] for run in (whole.folder, straight))
    assert ours == pytest.approx(theirs, abs=0.02)
    assert ours != theirs


def test_without_torchao(build: Build, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lrnn_lm.train.optim.find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"needs torchao, .*: pip install 'lrnn-lm\[torchao\]'"):
        build("optim.name=adamw8bit")
    assert not any(tmp_path.iterdir())


def test_a_run_does_not_go_on_with_another_optimizer(build: Build) -> None:
    first = build()
    send_at(first, 5, signal.SIGTERM)
    with pytest.raises(Stopped):
        first.run()
    words = r"another optimizer \(exp_avg, .*: set optim\.name back"
    with pytest.raises(CheckpointError, match=words) as raised:
        build("optim.name=muon")
    assert "\n" not in str(raised.value)


def test_an_unknown_name_is_told_before_anything_is_written(build: Build, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"optim\.name: 'muonn' is not known; did you mean 'muon'"):
        build("optim.name=muonn")
    with pytest.raises(ValueError, match=r"optim\.name: 'sgd' is not known; known here: adamw, muon"):
        build("optim.name=sgd")
    assert not any(tmp_path.iterdir())
