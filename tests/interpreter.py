"""Triton's interpreter in half of its time: the same numbers, without what it computes to throw away.

A kernel of a hundred lines makes ten thousand types, and nearly all are equal to one made before. This
replaces private functions, so it is for one version of Triton; others run as they are. It may go once the
interpreter keeps its types.
"""

import dataclasses
import inspect
import math
from collections.abc import Callable

VERSION = "3.7."  # as constraints.txt pins it


def quicken() -> None:
    try:
        import triton
        from triton import language as tl
        from triton.language import core, semantic
        from triton.runtime import interpreter
    except ImportError:
        return
    if not triton.__version__.startswith(VERSION):
        return
    _patch_language_once_a_launch(interpreter)
    # Sums of integers are checked for overflow, and the check is dropped unless `debug` is set.
    builder = interpreter.interpreter_builder
    builder.options = dataclasses.replace(builder.options, sanitize_overflow=False)
    _keep_types(core)
    _leave_equal_types(tl, semantic.TritonSemantic)
    _call_at_once(interpreter)
    numpy_type, known = interpreter._get_np_dtype, {}

    def get_np_dtype(dtype):
        scalar = dtype.scalar
        if isinstance(scalar, tl.pointer_type):
            return numpy_type(scalar)
        if (found := known.get(scalar.name)) is None:
            found = known[scalar.name] = numpy_type(scalar)
        return found

    interpreter._get_np_dtype = get_np_dtype


def _patch_language_once_a_launch(interpreter) -> None:
    """Each call of a kernel's function replaces the language anew, which takes half of the time."""
    patch, launch = interpreter._patch_lang, interpreter.GridExecutor.__call__
    patched: set[int] = set()  # ids of the modules' globals

    def patch_once(function: Callable) -> object:
        if id(function.__globals__) in patched:
            return None
        patched.add(id(function.__globals__))
        return patch(function)

    def start(self, *args, **kwargs):
        patched.clear()
        return launch(self, *args, **kwargs)

    interpreter._patch_lang, interpreter.GridExecutor.__call__ = patch_once, start


def _call_at_once(interpreter) -> None:
    """A builtin takes the interpreter's semantics; here without two wrappers around it."""

    def patch_attr(where, name, member, builder, scope=None) -> None:
        plain, semantics = inspect.unwrap(member), interpreter.interpreter_semantic

        def call(*args, **options):
            options["_semantic"] = semantics
            return plain(*args, **options)

        (scope.set_attr if scope else setattr)(where, name, call)

    interpreter._patch_attr = patch_attr


def _keep_types(core) -> None:
    """Types of blocks are values: one object each. What a tensor takes from its type is kept with that."""
    made, constexpr, unwrap = core.block_type.__init__, core.constexpr, core._unwrap_if_constexpr
    equal = core.dtype.__eq__
    known: dict[tuple, dict] = {}
    shapes: dict[tuple, tuple] = {}  # one object each, so that equal shapes are known by `is`

    def block_type(self, element_ty, shape) -> None:
        sizes = tuple([s if type(s) is int else unwrap(s) for s in shape])
        if (found := known.get((id(element_ty), sizes))) is None:
            made(self, element_ty, shape)  # `found` holds `element_ty`, so its id stays its own
            shared = shapes.setdefault(sizes, (self.shape, core.tuple(map(constexpr, sizes))))
            found = {**self.__dict__, "shape": shared[0], "parts": (shared[1], constexpr(math.prod(sizes)))}
            known[id(element_ty), sizes] = found
        self.__dict__.update(found)

    scalar = core.tuple([]), constexpr(1)

    def tensor(self, handle, type) -> None:
        self.handle, self.type, self.dtype = handle, type, type.scalar
        self.shape, self.numel = type.parts if type.is_block() else scalar

    def unwrapped(o):
        if isinstance(o, constexpr):
            return o.value
        return unwrap(o) if isinstance(o, (list, tuple, core.tuple)) else o

    core.block_type.__init__, core.tensor.__init__ = block_type, tensor
    core._unwrap_if_constexpr = unwrapped
    core.dtype.__eq__ = lambda self, other: self is other or equal(self, other)


def _leave_equal_types(tl, language) -> None:
    """Operands of one type need neither casts nor broadcasts, which is found out by ten calls else."""
    check, broadcast = language.binary_op_type_checking_impl, language.broadcast_impl_value
    plain = {id(dtype) for dtype in (tl.float32, tl.int32, tl.int64)}  # results have the same type

    def binary_op_type_checking_impl(self, lhs, rhs, *rest, **options):
        tensors = isinstance(lhs, tl.tensor) and isinstance(rhs, tl.tensor)
        if tensors and lhs.shape is rhs.shape and lhs.dtype is rhs.dtype and id(lhs.dtype) in plain:
            return lhs, rhs
        return check(self, lhs, rhs, *rest, **options)

    def broadcast_impl_value(self, lhs, rhs):
        return (lhs, rhs) if lhs.shape is rhs.shape else broadcast(self, lhs, rhs)

    language.binary_op_type_checking_impl = binary_op_type_checking_impl
    language.broadcast_impl_value = broadcast_impl_value
