"""Makes transformers' Auto classes know LRNN models, without importing transformers before the user does.

If transformers' table of configurations is loaded already, ours is imported and registers; otherwise an
import hook waits for it. So `import lrnn_lm`, and with it `lrnn --help`, takes 0.05 s of CPU time in place of
the 4 s of torch and transformers, and whoever then uses the Auto classes finds `model_type: lrnn` in them; no
plug-in interface of transformers does that. The model classes follow with the first LRNNConfig, see
model/config.py: importing them from the hook, in the middle of transformers' own imports, would run into
half-made modules.
"""

import importlib
import sys
from collections.abc import Sequence
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType

_THEIRS, _OURS = "transformers.models.auto.configuration_auto", "lrnn_lm.model.config"


class _AutoFinder:
    """Finds transformers' table alone, as Python would, with a loader that imports ours right after."""

    @staticmethod
    def find_spec(
        name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        spec = PathFinder.find_spec(name, path, target) if name == _THEIRS else None
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def execute_both(module: ModuleType) -> None:
                execute(module)
                importlib.import_module(_OURS)  # it registers at its end

            spec.loader.exec_module = execute_both
        return spec


def register() -> None:
    """Register with transformers' table if it is loaded, else when it is. Safe to call twice."""
    if _THEIRS in sys.modules:
        importlib.import_module(_OURS)
    elif _AutoFinder not in sys.meta_path:
        sys.meta_path.insert(0, _AutoFinder)
