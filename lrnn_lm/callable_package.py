"""Packages that can be called: `lrnn_lm.train(recipe)` beside `lrnn_lm.train.loop`."""

import importlib
import sys
from types import ModuleType
from typing import Any


def make_callable(package: str, home: str, name: str) -> None:
    """Let a package stand for its main function too: `lrnn_lm.train(recipe)` beside `lrnn_lm.train.loop`.

    Once the package is imported, the import system makes `lrnn_lm.train` mean the package, whatever else had
    that name.
    """

    class CallableModule(ModuleType):
        @property
        def __wrapped__(self) -> Any:  # where `inspect.signature` looks
            return getattr(importlib.import_module(home), name)

        def __call__(self, *arguments: Any, **options: Any) -> Any:
            return self.__wrapped__(*arguments, **options)

    sys.modules[package].__class__ = CallableModule
