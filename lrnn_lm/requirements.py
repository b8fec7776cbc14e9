"""Libraries that may be missing (those of the extras) or too old (transformers, for its cache layers)."""

import re
from importlib.util import find_spec

MINIMUM_TRANSFORMERS = (5, 17)


class UnmetRequirementError(ImportError):
    """A library is missing or too old; the message names the version that is needed."""


def check_transformers() -> None:
    """Raise UnmetRequirementError if the installed transformers is older than needed; imports nothing."""
    import importlib.metadata  # not above: `lrnn --help` should not wait for it

    needed = ".".join(map(str, MINIMUM_TRANSFORMERS))
    remedy = f"pip install 'transformers>={needed}'"
    try:
        found = importlib.metadata.version("transformers")
    except importlib.metadata.PackageNotFoundError:
        raise UnmetRequirementError(f"lrnn-lm needs transformers {needed} or newer: {remedy}") from None
    numbers = tuple(int(number) for number in re.findall(r"\d+", found)[:2])
    if numbers < MINIMUM_TRANSFORMERS:
        raise UnmetRequirementError(
            f"lrnn-lm needs transformers {needed} or newer, {found} is installed: {remedy}"
        )


def check_extra(extra: str, *modules: str) -> None:
    """Raise UnmetRequirementError if one of these modules, which an extra brings, is not installed."""
    missing = [module for module in modules if find_spec(module) is None]
    if missing:
        raise UnmetRequirementError(
            f"{' and '.join(missing)} {'is' if len(missing) == 1 else 'are'} not installed: "
            f"pip install 'lrnn-lm[{extra}]'"
        )
