"""What Triton's interpreter does not notice: addresses outside of the tensors of a launch, and hints that are
false.

    with memcheck.checked(): ...        # TRITON_INTERPRET=1; Triton 3.6 to 3.9

Every tensor of a launch is given addresses of its own, far from those of the others, and every lane whose
mask is true must stay inside that tensor's storage: on a GPU the rest is "an illegal memory access", or
another tensor's numbers. `tl.multiple_of` must be true as well, and a gather's places must exist.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from triton.runtime import interpreter

SPACE = 1 << 44  # bytes of addresses a tensor


@dataclass
class Argument:
    name: str
    bytes: int
    shift: int  # from its own addresses to the real ones


class Launch:
    """The tensors of one launch by their addresses."""

    def __init__(self, kernel: str, names: list[str]) -> None:
        self.kernel = kernel
        self._names = iter(names)
        self._arguments: list[Argument] = []

    def address(self, x: torch.Tensor, name: str) -> np.ndarray:
        storage = x.untyped_storage()
        start = (len(self._arguments) + 1) * SPACE
        self._arguments.append(Argument(name, storage.nbytes(), storage.data_ptr() - start))
        return np.array([start + x.data_ptr() - storage.data_ptr()], dtype=np.uint64)

    def next_name(self) -> str:
        return next(self._names)

    def real(self, pointers: np.ndarray, mask: np.ndarray, size: int, verb: str) -> np.ndarray:
        """The real addresses; IndexError where a true lane's `size` bytes are in no tensor."""
        pointers, mask = np.broadcast_arrays(pointers, mask)
        real = np.zeros_like(pointers)
        addresses = pointers[mask].astype(np.int64)
        owner, offset = np.divmod(addresses, SPACE)
        shifts = np.zeros_like(addresses)
        for index in np.unique(owner):
            mine = owner == index
            if not 1 <= index <= len(self._arguments):
                raise IndexError(
                    f"{self.kernel} {verb} address {addresses[mine][0]:#x}, which is no tensor's"
                )
            argument = self._arguments[index - 1]
            outside = mine & (offset + size > argument.bytes)
            if outside.any():
                raise IndexError(self._message(argument, offset[outside], size, verb, len(addresses)))
            shifts[mine] = argument.shift
        real[mask] = (addresses + shifts).astype(np.uint64)
        return real

    def _message(self, argument: Argument, offset: np.ndarray, size: int, verb: str, lanes: int) -> str:
        first, about = int(offset[0]), argument
        later = self._arguments[self._arguments.index(argument) + 1 :]
        if first >= SPACE // 2 and later:  # the last addresses of one tensor are those just below the next
            first, about = first - SPACE, later[0]
        where = f"element {first // size} of" if first >= 0 else f"element {-first // size} before"
        return (
            f"{self.kernel} {verb} {where} {about.name}, which has {about.bytes // size} of {size} "
            f"bytes: {len(offset)} of {lanes} lanes"
        )


@contextmanager
def checked() -> Iterator[list[str]]:
    """Raises `InterpreterError` at what is false; yields the names of the kernels as they are launched."""
    launched: list[str] = []
    current: list[Launch] = []
    builder, executor, handle = (
        interpreter.InterpreterBuilder,
        interpreter.GridExecutor,
        interpreter.TensorHandle,
    )
    convert, call, set_attr = interpreter._implicit_cvt, executor.__call__, handle.set_attr
    load, store = builder.create_masked_load, builder.create_masked_store
    rmw, cas, gather = builder.create_atomic_rmw, builder.create_atomic_cas, builder.create_gather

    def checked_call(self, *args, **kwargs):
        names = [name for name in self.arg_names if name not in self.constexprs]
        launched.append(self.fn.__name__)
        current.append(Launch(self.fn.__name__, names))
        try:
            return call(self, *args, **kwargs)
        finally:
            current.pop()

    def checked_convert(arg):
        converted, name = convert(arg), current[-1].next_name()
        if isinstance(arg, torch.Tensor):
            converted.handle.data = current[-1].address(arg, name)
        return converted

    def real(ptr, mask: np.ndarray, verb: str):
        size = max(1, ptr.get_element_ty().primitive_bitwidth // 8)
        return handle(current[-1].real(ptr.data, mask, size, verb), ptr.dtype)

    def checked_load(self, ptr, mask, *rest):
        return load(self, real(ptr, mask.data, "reads"), mask, *rest)

    def checked_store(self, ptr, value, mask, *rest):
        return store(self, real(ptr, mask.data, "writes"), value, mask, *rest)

    def checked_rmw(self, operation, ptr, value, mask, *rest):
        return rmw(self, operation, real(ptr, mask.data, "updates"), value, mask, *rest)

    def checked_cas(self, ptr, *rest):
        return cas(self, real(ptr, np.ones_like(ptr.data, dtype=bool), "updates"), *rest)

    def checked_gather(self, src, indices, axis):
        if ((indices.data < 0) | (indices.data >= src.data.shape[axis])).any():
            raise IndexError(f"{current[-1].kernel} gathers from beyond {src.data.shape[axis]} lanes")
        return gather(self, src, indices, axis)

    def checked_attr(self, key, value):
        if key == "tt.divisibility" and (self.data.astype(np.int64) % np.asarray(value)).any():
            raise ValueError(f"{current[-1].kernel}: {self.data.ravel()[0]} is no multiple of {value}")
        return set_attr(self, key, value)

    patches = [
        (interpreter, "_implicit_cvt", checked_convert), (executor, "__call__", checked_call),
        (builder, "create_masked_load", checked_load), (builder, "create_masked_store", checked_store),
        (builder, "create_atomic_rmw", checked_rmw), (builder, "create_atomic_cas", checked_cas),
        (builder, "create_gather", checked_gather), (handle, "set_attr", checked_attr),
    ]  # fmt: skip
    before = [getattr(where, name) for where, name, _ in patches]
    for where, name, patched in patches:
        setattr(where, name, patched)
    try:
        yield launched
    finally:
        for (where, name, _), original in zip(patches, before, strict=True):
            setattr(where, name, original)
