"""The optimizers by name, and the learning rate as a pure function of the step.

A new optimizer is a class here and a line in OPTIMIZERS (docs/extending.md).
"""

import difflib
import math
from collections import defaultdict
from collections.abc import Iterable
from fnmatch import fnmatchcase
from importlib.util import find_spec
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn import functional

from ..recipe.optim import GroupSection, OptimSection, check_optimizer
from .muon import look_ahead, orthogonalised, runs_of
from .parallel import like_parameter, whole


class Optimizer(torch.optim.Optimizer):
    """What the trainer needs of an optimizer beyond torch's.

    takes_shards: whether it can update the shards of a parameter one by one, as FSDP2 has them.
    needs: a package that it needs and that is optional here, an extra of the same name.
    """

    takes_shards: ClassVar[bool] = True
    needs: ClassVar[str | None] = None

    @classmethod
    def build(cls, model: nn.Module, optim: OptimSection, device: torch.device) -> Self:
        """An optimizer of the parameters of `model` that are trained."""
        raise NotImplementedError

    def new_state(self, parameter: nn.Parameter) -> dict[str, Tensor]:
        """What `self.state[parameter]` is before the first step, all zeros, by name.

        Checkpoints, loading and the memory estimate of `lrnn info` go by it. A first step from this state
        must be the first step of an optimizer that has none.
        """
        raise NotImplementedError


def decay_groups(parameters: Iterable[nn.Parameter], weight_decay: float) -> list[dict]:
    """Parameter groups: `weight_decay` for matrices and embeddings, none for vectors (norms, biases).

    `make_optimizer` also takes it from what a mixer holds itself.
    """
    trained = [p for p in parameters if p.requires_grad]
    matrices = [p for p in trained if p.ndim >= 2]
    vectors = [p for p in trained if p.ndim < 2]
    groups = [{"params": matrices, "weight_decay": weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]


def _adamw_settings(optim: OptimSection, device: torch.device) -> dict[str, Any]:
    fused = True if device.type == "cuda" else None  # one kernel launch for all parameters
    return {"lr": optim.lr, "betas": optim.betas, "eps": optim.eps, "fused": fused}


def _adamw_state(parameter: nn.Parameter, fused: bool | None) -> dict[str, Tensor]:
    return {
        "step": torch.zeros((), device=parameter.device if fused else "cpu"),
        "exp_avg": torch.zeros_like(parameter, requires_grad=False),
        "exp_avg_sq": torch.zeros_like(parameter, requires_grad=False),
    }


class AdamW(Optimizer, torch.optim.AdamW):
    """torch's AdamW (Loshchilov and Hutter, arXiv 1711.05101)."""

    @classmethod
    def build(cls, model: nn.Module, optim: OptimSection, device: torch.device) -> Self:
        return cls(decay_groups(model.parameters(), optim.weight_decay), **_adamw_settings(optim, device))

    def new_state(self, parameter: nn.Parameter) -> dict[str, Tensor]:
        return _adamw_state(parameter, self.defaults["fused"])


class Muon(Optimizer):
    """Muon with Nesterov momentum over `matrices`, AdamW over `others`, as one optimizer.

    A matrix moves by its momentum with all singular values brought near 1 (`muon.py`), scaled by
    0.2 sqrt(max(rows, columns)) so that an update has the size of AdamW's and one learning rate and weight
    decay serve both (arXiv 2502.16982). All matrices of one shape go through the iteration as a batch: for 60
    matrices 15 kernel launches instead of torch.optim.Muon's 900. A projection that stacks several maps
    (planes) counts as one matrix a plane. Under FSDP2 the matrices of one shape are gathered, and every rank
    computes all of them, as under DDP, and takes its shards.

    Args:
        matrices: (parameter (rows, columns), the rows of each of its planes).
        others: AdamW's parameter groups.
        lr, weight_decay: of the matrices; decoupled, as AdamW's.
        adamw: further settings of AdamW.
    """

    def __init__(
        self,
        matrices: list[tuple[nn.Parameter, list[int]]],
        others: list[dict[str, Any]],
        lr: float,
        weight_decay: float,
        **adamw: Any,
    ):
        self._adamw = torch.optim.AdamW(others, lr=lr, **adamw)
        group = {"params": [p for p, _ in matrices], "weight_decay": weight_decay, "matrices": True}
        super().__init__([group], {**self._adamw.defaults, "matrices": False})
        self.param_groups += [{**group, "matrices": False} for group in self._adamw.param_groups]
        self._adamw.state = self.state
        self._runs = {parameter: runs_of(planes) for parameter, planes in matrices}

    @classmethod
    def build(cls, model: nn.Module, optim: OptimSection, device: torch.device) -> Self:
        matrices = layer_matrices(model)
        taken = {p for p, _ in matrices}
        others = decay_groups((p for p in model.parameters() if p not in taken), optim.weight_decay)
        return cls(matrices, others, weight_decay=optim.weight_decay, **_adamw_settings(optim, device))

    def new_state(self, parameter: nn.Parameter) -> dict[str, Tensor]:
        if parameter in self._runs:
            return {"momentum": torch.zeros_like(parameter, requires_grad=False)}
        return _adamw_state(parameter, self.defaults["fused"])

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        """One update of every parameter that has a gradient."""
        for group in self.param_groups:
            if group["matrices"]:
                self._move(group)
        self._adamw.param_groups = [group for group in self.param_groups if not group["matrices"]]
        self._adamw.step()

    def _move(self, group: dict[str, Any]) -> None:
        """Update the matrices of a parameter group."""
        parameters = [p for p in group["params"] if p.grad is not None]
        if not parameters:
            return
        for parameter in parameters:
            if "momentum" not in self.state[parameter]:
                self.state[parameter].update(self.new_state(parameter))
        momenta = [self.state[parameter]["momentum"] for parameter in parameters]
        moved = look_ahead([parameter.grad for parameter in parameters], momenta)
        by_shape: dict[tuple[int, ...], list[tuple[nn.Parameter, Tensor, int]]] = defaultdict(list)
        for parameter, ahead in zip(parameters, moved, strict=True):
            runs, first = self._runs[parameter], 0
            # Gathered once, not for each run.
            parts = [ahead] if len(runs) == 1 else whole(ahead).split([length for *_, length in runs])
            for (rows, number, length), part in zip(runs, parts, strict=True):
                # A second run of that shape is a batch of its own: kernels may not write to a tensor twice.
                by_shape[(rows, parameter.shape[1], number)].append((parameter, part, first))
                first += length
        torch._foreach_mul_(parameters, 1 - group["lr"] * group["weight_decay"])
        for (*shape, _), members in by_shape.items():
            # Rows below each other are the planes of a batch (planes, rows, columns), and back.
            stacks = [whole(part) for _, part, _ in members]
            updates = orthogonalised(torch.cat(stacks).view(-1, *shape)).flatten(0, 1)
            shares = []
            for update, (parameter, _, first) in zip(
                updates.split([stack.shape[0] for stack in stacks]), members, strict=True
            ):
                rest = parameter.shape[0] - first - update.shape[0]
                if first or rest:  # zeros for other planes: a shard may hold any rows
                    update = functional.pad(update, (0, 0, first, rest))
                shares.append(like_parameter(update, parameter))
            targets = [parameter for parameter, *_ in members]
            torch._foreach_add_(targets, shares, alpha=-group["lr"] * 0.2 * max(shape) ** 0.5)


class AdamW8bit(Optimizer):
    """torchao's AdamW, its moments in 8 bits with a scale for every 256 values (arXiv 2110.02861).

    A parameter keeps fp32 moments if it has fewer than 4096 values, or if 256 does not divide their number.
    torchao packs a moment into a tensor of a class of its own. `state` holds that tensor's plain parts, in
    the same memory: checkpoints store them.
    """

    takes_shards = False  # a shard may end within a block of 256
    needs = "torchao"
    _BLOCK = 256

    def __init__(self, groups: list[dict[str, Any]], **settings: Any):
        from torchao.optim import AdamW8bit as Packed

        super().__init__(groups, settings | {"amsgrad": False})
        self._packed = Packed([dict(group) for group in groups], **settings, block_size=self._BLOCK)

    @classmethod
    def build(cls, model: nn.Module, optim: OptimSection, device: torch.device) -> Self:
        groups = decay_groups(model.parameters(), optim.weight_decay)
        return cls(groups, lr=optim.lr, betas=optim.betas, eps=optim.eps)

    def new_state(self, parameter: nn.Parameter) -> dict[str, Tensor]:
        state = {"step": torch.zeros(())}
        for moment in ("exp_avg", "exp_avg_sq"):
            if parameter.numel() < 4096 or parameter.numel() % self._BLOCK:
                state[moment] = torch.zeros_like(parameter, requires_grad=False)
            else:
                scales = parameter.numel() // self._BLOCK
                state[f"{moment}_codes"] = torch.zeros_like(parameter, dtype=torch.uint8, requires_grad=False)
                state[f"{moment}_scale"] = torch.zeros(scales, device=parameter.device)
        return state

    def step(self, closure: None = None) -> None:
        """One update of every parameter that has a gradient."""
        for parameter in (p for group in self.param_groups for p in group["params"] if p.grad is not None):
            state, packed = self.state[parameter], self._packed.state[parameter]
            if not state:
                state.update(self.new_state(parameter))
            if packed.get("step") is not state["step"]:  # new, or loaded
                packed["step"] = state["step"]
                packed["exp_avg"] = self._pack(parameter, "exp_avg", signed=True)
                packed["exp_avg_sq"] = self._pack(parameter, "exp_avg_sq", signed=False)
        # torchao takes a tensor for the rate, or it would compile for every number.
        groups = [{**group, "lr": torch.tensor(group["lr"])} for group in self.param_groups]
        self._packed.param_groups = groups
        self._packed.step()

    def _pack(self, parameter: nn.Parameter, moment: str, signed: bool) -> Tensor:
        state = self.state[parameter]
        if moment in state:
            return state[moment]
        from torchao.optim.subclass_8bit import OptimState8bit

        packed = OptimState8bit.zeros(
            parameter.shape, signed, self._BLOCK, parameter.device, dtype=parameter.dtype
        )
        packed.codes, packed.scale = state[f"{moment}_codes"], state[f"{moment}_scale"]
        return packed


OPTIMIZERS: dict[str, type[Optimizer]] = {"adamw": AdamW, "muon": Muon, "adamw8bit": AdamW8bit}


def optimizer_class(name: str) -> type[Optimizer]:
    """The class that `optim.name` names.

    Raises ValueError, with the nearest name if there is none, or with the extra to install.
    """
    check_optimizer(name, OPTIMIZERS)
    cls = OPTIMIZERS[name]
    if cls.needs is not None and find_spec(cls.needs) is None:
        raise ValueError(
            f"optim.name={name} needs {cls.needs}, which is not installed: pip install 'lrnn-lm[{cls.needs}]'"
        )
    return cls


def make_optimizer(model: nn.Module, optim: OptimSection, device: torch.device) -> Optimizer:
    """The optimizer that `optim.name` names; each of its groups has an `lr_scale`, times the schedule's rate.

    Raises ValueError for an unknown name, for sharded parameters that the optimizer needs whole, and for a
    group of `optim.groups` that gets no parameter.
    """
    cls = optimizer_class(optim.name)
    if not cls.takes_shards and any(isinstance(p, DTensor) for p in model.parameters()):
        raise ValueError(
            f"optim.name={optim.name} needs whole parameters on each rank and FSDP2 shards them: "
            "set train.parallel=ddp, or optim.name=adamw"
        )
    optimizer = cls.build(model, optim, device)
    scales = width_scales(model, optim) if optim.base_width is not None else {}
    rules = _rules(model, optim.groups)
    # What a mixer, or a module of modules in it (a library's layer), holds itself are norms, shares and
    # recurrent matrices: to decay the identity is to forget.
    inside = [(block.mixer, module) for block in model.model.layers for module in block.mixer.modules()]
    layers = [module for mixer, module in inside if module is mixer or any(module.children())]
    own = {p for layer in layers for p in layer.parameters(recurse=False)}
    optimizer.param_groups[:] = [
        part for group in optimizer.param_groups for part in _split(group, rules, scales, own)
    ]
    return optimizer


def width_scales(model: nn.Module, optim: OptimSection) -> dict[nn.Parameter, float]:
    """What muP multiplies the learning rate of matrices by: base_width / width (arXiv 2203.03466, table 8).

    Those of linear layers and LSTMs, as only their inputs grow with the width: those of the embedding, of
    convolutions and of a mixer's recurrent blocks do not. How the weights begin is `scale_for_width`'s.

    Raises ValueError for an optimizer or a model that this is not made for.
    """
    if not issubclass(optimizer_class(optim.name), AdamW | AdamW8bit):
        raise ValueError(f"optim.base_width is for AdamW, not for optim.name={optim.name}: leave it out")
    if model.config.tie_word_embeddings:
        raise ValueError(
            "optim.base_width scales embedding and head differently: set model.tie_word_embeddings=false"
        )
    scale = optim.base_width / model.config.hidden_size
    layers = [module for module in model.modules() if isinstance(module, nn.Linear | nn.LSTM)]
    return {p: scale for layer in layers for p in layer.parameters(recurse=False) if p.ndim == 2}


def scale_for_width(model: nn.Module, base_width: int) -> None:
    """Complete muP's start of a model drawn with initializer_range sqrt(base_width / width).

    With s = base_width / width, matrices begin with sqrt(s) times the base's deviation, the embedding with
    all of it, the head with s times it.
    """
    root = (base_width / model.config.hidden_size) ** 0.5
    with torch.no_grad():
        model.get_input_embeddings().weight.div_(root)
        model.get_output_embeddings().weight.mul_(root)


def _rules(model: nn.Module, groups: list[GroupSection]) -> dict[nn.Parameter, GroupSection]:
    """The first group that matches each parameter, where one does."""
    rules: dict[nn.Parameter, GroupSection] = {}
    names = [name for name, _ in model.named_parameters()]
    for number, group in enumerate(groups):
        matching = [p for name, p in model.named_parameters() if fnmatchcase(name, group.match)]
        if not matching:
            parts = {part for name in names for part in (name, *name.split("."))}
            near = difflib.get_close_matches(group.match.strip("*."), parts, n=3, cutoff=0.5)
            hint = f"near it: {', '.join(near)}" if near else f"names are such as {names[0]}, {names[-1]}"
            if model.config.tie_word_embeddings and fnmatchcase("lm_head.weight", group.match):
                hint = "model.tie_word_embeddings makes head and embedding one: match '*embed_tokens*'"
            raise ValueError(f"optim.groups.{number}: no parameter matches {group.match!r}; {hint}")
        if rules.keys() >= set(matching):
            raise ValueError(
                f"optim.groups.{number}: groups before it take all that {group.match!r} matches; put it first"
            )
        rules = dict.fromkeys(matching, group) | rules
    return rules


def _split(
    group: dict[str, Any], rules: dict[nn.Parameter, GroupSection], scales: dict[nn.Parameter, float],
    own: set[nn.Parameter],
) -> list[dict[str, Any]]:  # fmt: skip
    """A parameter group of an optimizer as one for each rate and weight decay that its parameters have.

    own: the parameters that decay only by a rule.
    """
    parts: dict[tuple[float, float], dict[str, Any]] = {}
    for parameter in group["params"]:
        rule, scale = rules.get(parameter), scales.get(parameter, 1.0)
        decay = 0.0 if parameter in own else group["weight_decay"]
        if rule is not None and rule.weight_decay is not None:
            decay = rule.weight_decay
        # A matrix decays by rate x weight decay a step; a scale for the width leaves that product alone.
        decay /= scale
        rate = scale * (rule.lr_scale if rule is not None else 1.0)
        changes = {"params": [], "lr_scale": rate, "weight_decay": decay}
        parts.setdefault((rate, decay), group | changes)["params"].append(parameter)
    return list(parts.values())


def drop_frozen_gradients(optimizer: torch.optim.Optimizer) -> None:
    """Of what `lr_scale: 0` freezes: they say nothing of the step's size, and a NaN times 0 is a NaN."""
    for group in optimizer.param_groups:
        if group["lr_scale"] == 0:
            for parameter in group["params"]:
                parameter.grad = None


def state_bytes(model: nn.Module, optim: OptimSection) -> int:
    """Bytes of the optimizer's state for all parameters of `model`, which may be on `meta`."""
    optimizer = make_optimizer(model, optim, torch.device("meta"))
    trained = [p for group in optimizer.param_groups for p in group["params"]]
    return sum(value.nbytes for parameter in trained for value in optimizer.new_state(parameter).values())


def layer_matrices(model: nn.Module) -> list[tuple[nn.Parameter, list[int]]]:
    """The weights of the blocks' linear layers, each with the rows of its planes (maps stacked in it)."""
    planes: dict[nn.Parameter, int | list[int]] = {}
    for block in model.model.layers:
        named = block.mixer.planes().items()
        planes |= {block.mixer.get_parameter(name): stacked for name, stacked in named}
    weights = [m.weight for m in model.model.layers.modules() if isinstance(m, nn.Linear)]
    matrices = [(w, planes.get(w, 1)) for w in weights if w.requires_grad]
    return [(w, [w.shape[0] // n] * n if isinstance(n, int) else n) for w, n in matrices]


def learning_rate(step: int, total_steps: int, tokens_per_step: int, optim: OptimSection) -> float:
    """The learning rate of optimizer step `step`, counted from 0.

    Linear warm-up to `lr`; then a cosine down to `final_lr` at the last step (cosine), a plateau and a linear
    decay to `final_lr` over the last `decay` (wsd), or `lr` for ever (constant).
    """
    warmup = optim.warmup.steps(total_steps, tokens_per_step)
    if step < warmup:
        return optim.lr * (step + 1) / warmup
    if optim.schedule == "constant" or total_steps == 1:  # a last step that is the first trains, too
        return optim.lr
    if optim.schedule == "cosine":
        progress = (step - warmup) / max(1, total_steps - 1 - warmup)
        share = 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
    else:
        decay = optim.decay.steps(total_steps, tokens_per_step)
        decay = max(1, min(decay, total_steps - warmup))  # both may have been rounded up
        share = min(1.0, max(0, total_steps - 1 - step) / decay)
    return optim.final_lr + (optim.lr - optim.final_lr) * share
