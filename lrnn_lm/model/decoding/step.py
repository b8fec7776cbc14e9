"""A decoding step: how it runs, and which call may use its memory.

Capturing a CUDA graph takes long, and a graph writes to fixed memory, so a `Pool` keeps captured steps and
lends each to one call at a time.

Calls may run on streams of their own. `after` makes one stream wait for what another has been given. Captures
and replays of all models take turns (`turns`), because graphs share the workspace of cuBLAS, which belongs to
the stream that they were captured on.

Legend: B batch, D model width, V vocabulary.
"""

import ctypes
import threading
import warnings
import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from functools import cache
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.cache_utils import Cache

from ...mixers.base import Joint, JointProjections, SequenceContext, plain_weight
from ..cache import tokens_seen
from .built import all_modules
from .memory import KEPT_KEYS, Memory, held_by, room_for

KEPT = 4  # captured steps a model keeps, in use or not; more calls at the same time run without a graph
_NUMBERS = (int, float, str)  # bool too
turns = threading.Lock()  # held by captures, replays, and draws of random numbers, which a capture forbids
_turn: dict[torch.device, torch.cuda.Stream | None] = {}  # the stream of the last one


def after(
    last: torch.cuda.Stream | None, device: torch.device, tensors: Iterable[Tensor] = ()
) -> torch.cuda.Stream | None:
    """The current stream, after making it wait for all work that `last` has so far; None on a CPU.

    tensors: used by both; they are not freed before the current stream is done with them.
    """
    if device.type != "cuda":
        return None
    current = torch.cuda.current_stream(device)
    if last is not None and last != current:
        current.wait_stream(last)
        for tensor in tensors:
            tensor.record_stream(current)
    return current


class Pool:
    """The captured steps of one model, each lent to one call at a time, and its joint weights."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._memories: list[Memory] = []  # the least recently used first
        self._joint: list[tuple[Joint | None, Joint | None]] = []
        self._stream: torch.cuda.Stream | None = None  # that copied them last

    def joint(self, model: PreTrainedModel) -> list[tuple[Joint | None, Joint | None]]:
        """(mixer's, MLP's) joint weights of each block: one product for all projections of the same input."""
        # Copied anew for each call of `generate`, about the time of one token: writes through `.data` or in
        # inference mode leave a tensor's version as it is, so nothing tells that a weight has changed. The
        # memory stays the same where shapes do, as captured graphs read it. Steps of other calls may read it
        # meanwhile: they find the same numbers, as no weight changes during a call.
        groups = [(block.mixer, block.mlp) for block in model.model.layers]
        with self._lock, torch.inference_mode(False), torch.no_grad():
            copies = [t for joint in chain(*self._joint) if joint for t in joint if t is not None]
            self._stream = after(self._stream, model.device, copies)
            old = self._joint if len(self._joint) == len(groups) else [(None, None)] * len(groups)
            new = [
                tuple(_side_by_side(module, into) for module, into in zip(*pair, strict=True))
                for pair in zip(groups, old, strict=True)
            ]
            if any(n is not o for n, o in zip(chain(*new), chain(*old), strict=True)):
                self._joint = new
            return self._joint

    def borrow(self, cache: Cache, joint: Any, key: Any) -> Memory | None:
        """A memory that no step uses, with its graph if it has one; None if KEPT are in use."""
        with self._lock:
            # Those whose weights have moved cannot be used again, nor those that were dropped.
            known = [m for m in self._memories if m.lent or m.key is not None]
            kept = [m for m in known if m.lent or (m.joint is joint and m.key[1] == key[1])]
            free = [m for m in kept if not m.lent]
            memory = next((m for m in free if m.key == key and m.joint is joint), None)
            if memory is None and len(kept) >= KEPT:
                if not free:
                    return None
                kept.remove(free[0])
            if memory is None:
                memory = Memory(cache, joint, key)
            else:
                kept.remove(memory)
            memory.lent = True
            self._memories = [*kept, memory]
            return memory


class DecodeStep:
    """A step of one model for one batch size, for one call of `generate` (or one caller at a time)."""

    def __init__(self, memory: Memory, fused: bool, tiled: bool):
        self.memory, self.fused, self.tiled = memory, fused, tiled
        self._owners: list[Callable[[], Any]] = []  # the cache layers that hold the states
        # Return the memory when this step is garbage collected, after an exception too.
        weakref.finalize(self, _give_back, memory, self._owners).atexit = False

    def has_room(self, cache: Cache) -> bool:
        """Whether one more token fits behind a cache's keys."""
        token = self.memory.token
        return token is None or tokens_seen(cache) < token.mask.shape[-1]

    def __call__(
        self,
        model: PreTrainedModel,
        ids: Tensor,
        cache: Cache,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
    ) -> Tensor:
        """Feed ids (B, 1), write the states in place, count the token; logits (B, 1, V).

        attention_mask, position_ids: as the model takes them; read where a cache comes, for attention. There
        must be room.
        """
        memory = self.memory
        self._adopt(model, ids, cache, attention_mask, position_ids)
        memory.ids.copy_(ids)
        if memory.key is not None and memory.graph is None and not memory.uncapturable:
            self._capture(model)
        if memory.graph is not None:
            replay(memory.graph, memory.ids.device)
        else:
            memory.logits = self.forward(model)
        memory.count(cache)
        return memory.logits

    def forward(self, model: PreTrainedModel) -> Tensor:
        """The step without a graph; a capture records this."""
        if self.fused:  # four kernels a layer, and one for the head
            x = model.model.embed_tokens(self.memory.ids).squeeze(1)  # (B, D)
            step = self._step_of_many if self.tiled else self._step_of_few
            return step(model, x).unsqueeze(1)
        x = model.model.embed_tokens(self.memory.ids)  # (B, 1, D)
        blocks, token = model.model.applied_layers, self.memory.token
        context = SequenceContext() if token is None else token.context(model)
        for block, state, joint in zip(blocks, self.memory.states, self._joints(model), strict=True):
            x, after = block.step(x, state, context, *joint)
            if after is not state:
                state.copy_(after)
        if token is not None:
            token.advance()
        return model.lm_head(model.model.norm(x))

    def _joints(self, model: PreTrainedModel) -> list[Any]:
        """The joint weights of each of `applied_layers`; () for none."""
        joints = self.memory.joint or [()] * len(model.model.layers)
        return joints[: model.config.num_hidden_layers] * model.config.repeat

    def _step_of_few(self, model: PreTrainedModel, x: Tensor) -> Tensor:
        from ...kernels.decode.fused_step import linear_step

        blocks, states = model.model.applied_layers, self.memory.states
        for block, state, joint in zip(blocks, states, self._joints(model), strict=True):
            x = block.fused_step(x, state, *joint)
        norm = model.model.norm
        return linear_step(x, model.lm_head.weight, norm.weight, norm.eps)

    def _step_of_many(self, model: PreTrainedModel, x: Tensor) -> Tensor:
        from ...kernels.decode.fused_tiles import Workspace, begin, normed_step

        memory = self.memory
        if memory.workspace is None:
            memory.workspace = Workspace(x.device)
        blocks, last = model.model.applied_layers, model.model.norm
        joints = self._joints(model)
        norms = [*(block.mixer_norm.weight for block in blocks), last.weight]
        stream = begin(x, norms[0])
        for block, state, joint, norm in zip(blocks, memory.states, joints, norms[1:], strict=True):
            stream = block.fused_step_of_many(stream, state, *joint, norm, memory.workspace)
        return normed_step(stream, last.eps, model.lm_head.weight)

    def _adopt(
        self, model: PreTrainedModel, ids: Tensor, cache: Cache, mask: Tensor | None, positions: Tensor | None
    ) -> None:
        """Let this cache hold the step's states; the one before, if it still exists, gets copies."""
        memory = self.memory
        if memory.is_in(cache):
            return
        # The memory's last run may have been on another stream: wait for it.
        tensors = [memory.ids, *memory.moving, *memory.keys]
        memory.stream = after(memory.stream, memory.ids.device, tensors)
        memory.part(self._owners)
        if memory.token is not None:
            context = model.model.context_after(ids, cache, mask, positions)
            memory.token.begin(tokens_seen(cache), context)
        memory.take(cache)
        self._owners[:] = [weakref.ref(layer) for layer in cache.layers]

    def _capture(self, model: PreTrainedModel) -> None:
        """Record the step as a CUDA graph; if that fails, warn and run without one from then on."""
        memory, device = self.memory, self.memory.ids.device
        moving = memory.moving
        before = [tensor.clone() for tensor in moving]
        try:
            _capture_stream(device)  # first, as it says what a device without graphs lacks
            graph = torch.cuda.CUDAGraph()

            def warm_up() -> None:
                for _ in range(2):  # kernels are compiled and chosen here
                    self.forward(model)
                    _write(moving, before)  # it has advanced them; attention has room for one token

            with record(graph, device, warm_up=warm_up):
                memory.logits = self.forward(model)
            memory.graph = graph
        except (RuntimeError, ValueError, OSError) as error:
            warnings.warn(f"decoding without a CUDA graph: {first_words(error)}", stacklevel=4)
            memory.uncapturable = True
        _write(moving, before)


def _write(tensors: list[Tensor], values: list[Tensor]) -> None:
    for tensor, value in zip(tensors, values, strict=True):
        tensor.copy_(value)


def _give_back(memory: Memory, owners: list[Callable[[], Any]]) -> None:
    """Give a dropped step's cache copies of its states, and let the next call use the memory."""
    if memory.key is None:  # this memory is not in the pool, so the cache can keep it
        return
    if sum(t.nbytes for t in memory.keys) > KEPT_KEYS:
        memory.drop()
    else:
        with nullcontext() if memory.stream is None else torch.cuda.stream(memory.stream):
            memory.part(owners)
    memory.lent = False  # no lock: the garbage collector may call this during `Pool.borrow`


def _take_turn(device: torch.device) -> None:
    """Make the current stream wait for the last capture or replay. `turns` must be held."""
    _turn[device] = after(_turn.get(device), device)


@contextmanager
def record(
    graph: torch.cuda.CUDAGraph,
    device: torch.device,
    pool: Any = None,
    warm_up: Callable[[], None] | None = None,
) -> Iterator[None]:
    """Within it, work on `device` is recorded in `graph`, and not run. warm_up: run before, on that stream.

    Raises:
        RuntimeError, ValueError, OSError: the device has no graphs, or work that cannot be recorded.
    """
    with turns:
        stream = _capture_stream(device)
        _take_turn(device)
        current = torch.cuda.current_stream(device)
        stream.wait_stream(current)
        if warm_up is not None:
            with torch.cuda.stream(stream):
                warm_up()
            current.wait_stream(stream)
        # thread_local: other threads go on launching and allocating meanwhile.
        with (
            nothing_left_behind(device),
            torch.cuda.graph(graph, pool=pool, stream=stream, capture_error_mode="thread_local"),
        ):
            yield


def replay(graph: torch.cuda.CUDAGraph, device: torch.device) -> None:
    """Launch what was recorded, after all that other graphs have launched."""
    with turns:
        _take_turn(device)
        graph.replay()


def first_words(error: BaseException) -> str:
    """The first line of what an error says."""
    return (str(error).strip().splitlines() or [""])[0]


@contextmanager
def nothing_left_behind(device: torch.device) -> Iterator[None]:
    """If a capture fails: torch would keep its stream as the current one, and draw no random numbers."""
    stream = torch.cuda.current_stream(device)
    try:
        yield
    except BaseException:
        torch.cuda.set_stream(stream)
        generator = torch.cuda.default_generators[stream.device_index]
        generator.graphsafe_set_state(generator.clone_state())
        raise


@cache
def _capture_stream(device: torch.device) -> torch.cuda.Stream:
    """A stream for all captures, on which nothing else is launched.

    It comes from the driver, as torch hands out the same 32 streams again and again: what another thread
    launched on it during a capture would be recorded instead of run. There is one for all captures because
    cuBLAS keeps 32 MiB for each stream.

    Raises:
        ValueError: a device without graphs. OSError, RuntimeError: no driver, or it makes no stream.
    """
    if device.type != "cuda":
        raise ValueError(f"there are none on {device}")
    library, function = "libcuda.so.1", "cuStreamCreate"
    if torch.version.hip is not None:
        library, function = "libamdhip64.so", "hipStreamCreateWithFlags"
    stream, non_blocking = ctypes.c_void_p(), 1  # it does not wait for the default stream
    with torch.cuda.device(device):
        error = getattr(ctypes.CDLL(library), function)(ctypes.byref(stream), ctypes.c_uint(non_blocking))
    if error:
        raise RuntimeError(f"{function}: error {error}")
    return torch.cuda.ExternalStream(stream.value, device=device)


def graph_key(model: PreTrainedModel, cache: Cache, way: tuple[bool, bool]) -> tuple:
    """What a captured graph depends on: ((shapes of the states, way of decoding), addresses of the weights
    and numbers that modules hold)."""
    # A graph reads weights at their addresses. It sees new values there, but not that a weight has moved.
    shapes = tuple((room_for(layer), (h := held_by(layer)).dtype, h.device) for layer in cache.layers)
    return (shapes, way), what_modules_hold(model)


def what_modules_hold(model: PreTrainedModel) -> tuple:
    """Addresses and shapes of all weights, and the numbers that modules hold."""
    holds: list[Any] = []
    for module in [*all_modules(model.model), model.lm_head]:
        own = vars(module)
        holds.append(type(module))
        holds += [value for value in own.values() if isinstance(value, _NUMBERS)]
        for t in chain(own["_parameters"].values(), own["_buffers"].values()):
            holds.append(t if t is None else (t.data_ptr(), t.dtype, t.shape, t.stride()))
    return tuple(holds)


def _side_by_side(module: nn.Module, into: Joint | None) -> Joint | None:
    """A module's projections of the same input as one: weight (sum of outputs, D), and bias if one has it.

    Written to `into` if that has the right shape. None for a module without such projections, or with one
    that does more than W x + b.
    """
    if not isinstance(module, JointProjections):
        return None
    projections = module.joint_projections()
    weights = [plain_weight(p) for p in projections]
    if any(weight is None for weight in weights):
        return None
    like, rows = weights[0], sum(weight.shape[0] for weight in weights)
    biased = any(p.bias is not None for p in projections)
    if (
        into is None
        or (into[0].shape, into[0].dtype) != ((rows, like.shape[1]), like.dtype)
        or into[0].device != like.device
        or (into[1] is not None) != biased
    ):
        into = like.new_empty(rows, like.shape[1]), like.new_empty(rows) if biased else None
    torch.cat(weights, out=into[0])
    if biased:
        biases = [
            w.new_zeros(len(w)) if p.bias is None else p.bias
            for p, w in zip(projections, weights, strict=True)
        ]
        torch.cat(biases, out=into[1])
    return into
