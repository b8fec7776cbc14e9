"""Whether modules still run the code of their classes.

Decoding computes what `forward` would without calling it. It may do so only if nobody has replaced that code:
by patching a class or an instance, by a hook, by compiling a module, by an adapter.
"""

from functools import cache
from inspect import ismethod
from typing import Any

from torch import Tensor, nn
from torch.nn.modules import module as torch_module

_OURS = ("torch", "transformers", "fla", __name__.split(".")[0])  # packages whose classes are trusted
# What a call of a module runs, and transformers' loop beside it.
_RUN = ("forward", "__call__", "_call_impl", "prepare_inputs_for_generation",
        "_update_model_kwargs_for_generation")  # fmt: skip
_written: dict[type, list[Any]] = {}  # the `_RUN` of each class


def _code(cls: type) -> list[Any]:
    # Of its bases too: a method may call the one that it replaces.
    return [vars(base).get(name) for base in cls.__mro__ for name in _RUN]


def remember(*classes: type[nn.Module]) -> None:
    """Note the code of classes as it is now: called where these are defined."""
    for cls in classes:
        _written[cls] = _code(cls)


remember(*(c for c in vars(nn).values() if isinstance(c, type) and issubclass(c, nn.Module)))


def as_written(model: nn.Module) -> bool:
    """Whether a call of the model runs its classes' own code, and nothing else, in every module."""
    # Classes of other packages that `remember` has not seen count as unchanged when they are first met.
    if torch_module._global_forward_hooks or torch_module._global_forward_pre_hooks:
        return False
    modules = all_modules(model)
    for cls in {type(module) for module in modules}:
        now = _code(cls)
        if cls.__module__.split(".")[0] not in _OURS or _written.setdefault(cls, now) != now:
            return False
    return all(map(_is_untouched, modules))


def all_modules(model: nn.Module) -> list[nn.Module]:
    """As `model.modules()`, in another order and ten times as fast, as every call of `generate` needs it."""
    found: dict[int, nn.Module] = {}
    ahead = [model]
    while ahead:
        module = ahead.pop()
        if id(module) not in found:
            found[id(module)] = module
            ahead += [child for child in module._modules.values() if child is not None]
    return list(found.values())


def all_parameters(model: nn.Module) -> list[Tensor]:
    """All parameters; a tied one as often as it is used."""
    return [p for module in all_modules(model) for p in module._parameters.values() if p is not None]


def _is_untouched(module: nn.Module) -> bool:
    own = vars(module)
    if module._forward_hooks or module._forward_pre_hooks or "_hf_hook" in own:
        return False
    if module._compiled_call_impl is not None:  # `module.compile()`
        return False
    for name in _methods(type(module)) & own.keys():
        value = own[name]  # the class's own method, where a patch was undone
        if not ismethod(value) or value.__self__ is not module:
            return False
        if value.__func__ is not getattr(type(module), name):
            return False
    return True


@cache
def _methods(cls: type) -> frozenset[str]:
    return frozenset(name for name in dir(cls) if callable(getattr(cls, name)))
