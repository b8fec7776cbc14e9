"""Makes transformers' Auto classes know LRNN models, without importing transformers before the user does.

If transformers' auto modules are loaded already they are told at once; otherwise an import hook waits for them. So
`import lrnn_lm` stays quick, and whoever then imports `AutoModelForCausalLM` finds `model_type: lrnn` in it.
"""

import importlib.util
import sys
from collections.abc import Callable, Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType


def _register_config(module: ModuleType) -> None:
    from .model.config import LRNNConfig

    module.AutoConfig.register(LRNNConfig.model_type, LRNNConfig, exist_ok=True)


def _register_models(module: ModuleType) -> None:
    from .model import LRNNConfig, LRNNForCausalLM, LRNNModel

    module.AutoModel.register(LRNNConfig, LRNNModel, exist_ok=True)
    module.AutoModelForCausalLM.register(LRNNConfig, LRNNForCausalLM, exist_ok=True)


_AFTER_IMPORT: dict[str, Callable[[ModuleType], None]] = {
    "transformers.models.auto.configuration_auto": _register_config,
    "transformers.models.auto.modeling_auto": _register_models,
}


class _NotifyingLoader(Loader):
    """Loads as the real loader does, then tells."""

    def __init__(self, loader: Loader, notify: Callable[[ModuleType], None]):
        self._loader = loader
        self._notify = notify

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self._loader.exec_module(module)
        self._notify(module)


class _AutoFinder(MetaPathFinder):
    """Finds nothing itself; wraps the loaders of the modules that are waited for."""

    def __init__(self) -> None:
        self._busy = False

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name not in _AFTER_IMPORT or self._busy:
            return None
        self._busy = True
        try:
            spec = importlib.util.find_spec(name)
        finally:
            self._busy = False
        if spec is not None and spec.loader is not None:
            spec.loader = _NotifyingLoader(spec.loader, _AFTER_IMPORT[name])
        return spec


def register() -> None:
    """Register with the auto modules that are there, and wait for the others. Safe to call twice."""
    waiting = False
    for name, notify in _AFTER_IMPORT.items():
        if name in sys.modules:
            notify(sys.modules[name])
        else:
            waiting = True
    if waiting and not any(isinstance(finder, _AutoFinder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _AutoFinder())
