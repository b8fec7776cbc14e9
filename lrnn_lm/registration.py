"""Makes transformers' Auto classes know LRNN models, without importing transformers before the user does.

If transformers' table of configurations is loaded already, ours is imported and registers; otherwise an
import hook waits for it. So `import lrnn_lm`, and with it `lrnn --help`, takes 0.05 s of CPU time in place of
the 4 s of torch and transformers, and whoever then uses the Auto classes finds `model_type: lrnn` in them; no
plug-in interface of transformers does that. The model classes follow with the first LRNNConfig, see
model/config.py: importing them from the hook, in the middle of transformers' own imports, would run into
half-made modules.
"""

import importlib
import importlib.util
import sys
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

# Importing ours registers it (see the end of that module); it waits for transformers' own.
_AFTER_IMPORT = {"transformers.models.auto.configuration_auto": "lrnn_lm.model.config"}


class _NotifyingLoader(Loader):
    """Loads as the real loader does, then imports the module that waited."""

    def __init__(self, loader: Loader, waiting: str):
        self._loader = loader
        self._waiting = waiting

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self._loader.exec_module(module)
        importlib.import_module(self._waiting)


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
    """Register with the auto module if it is there, else wait for it. Safe to call twice."""
    waiting = False
    for name, ours in _AFTER_IMPORT.items():
        if name in sys.modules:
            importlib.import_module(ours)
        else:
            waiting = True
    if waiting and not any(isinstance(finder, _AutoFinder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _AutoFinder())
