"""Libraries that may be missing (those of the extras) or too old or new (transformers, lm-eval)."""

import re
from importlib.util import find_spec

TRANSFORMERS = ((5, 17), (5, 25))  # from, and before: minor versions change caches
TRANSFORMERS_TEXT = ">={}.{},<{}.{}".format(*TRANSFORMERS[0], *TRANSFORMERS[1])
# Of libraries of the extras, as pyproject.toml asks for them. Older ones of lm-eval have no TaskManager.load,
# and 0.4.9 does not import with transformers 5. torchao 0.17 writes int8 weights that cannot be saved.
LEAST = {"lm_eval": (0, 4, 12), "torchao": (0, 18)}


class UnmetRequirementError(ImportError):
    """A library is missing or too old; the message names the version that is needed."""


def check_transformers() -> None:
    """Raise UnmetRequirementError if the installed transformers is too old or too new; imports nothing."""
    _check_version("transformers", TRANSFORMERS_TEXT, *TRANSFORMERS)


def _check_version(
    package: str, text: str, first: tuple[int, ...], before: tuple[int, ...] | None = None
) -> None:
    import importlib.metadata  # not above: `lrnn --help` should not wait for it

    needs, remedy = f"lrnn-lm needs {package} {text}", f"pip install '{package}{text}'"
    try:
        found = importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        if find_spec(package) is not None:  # a checkout on the path, whose version is not known
            return
        raise UnmetRequirementError(f"{needs}: {remedy}") from None
    numbers = tuple(int(number) for number in re.findall(r"\d+", found)[: len(first)])
    if numbers < first or (before is not None and numbers >= before):
        raise UnmetRequirementError(f"{needs}, {found} is installed: {remedy}")


def check_extra(extra: str, *modules: str) -> None:
    """Raise UnmetRequirementError if one of these modules, which an extra brings, is missing or too old."""
    missing = [module for module in modules if find_spec(module) is None]
    if missing:
        raise UnmetRequirementError(
            f"{' and '.join(missing)} {'is' if len(missing) == 1 else 'are'} not installed: "
            f"pip install 'lrnn-lm[{extra}]'"
        )
    for module in LEAST.keys() & modules:
        _check_version(module, f">={'.'.join(map(str, LEAST[module]))}", LEAST[module])
