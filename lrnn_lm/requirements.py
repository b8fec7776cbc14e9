"""Libraries that may be missing (those of the extras) or too old or new (transformers, for its caches)."""

import re
from importlib.util import find_spec

TRANSFORMERS = ((5, 17), (5, 25))  # from, and before: minor versions change caches
TRANSFORMERS_TEXT = ">={}.{},<{}.{}".format(*TRANSFORMERS[0], *TRANSFORMERS[1])


class UnmetRequirementError(ImportError):
    """A library is missing or too old; the message names the version that is needed."""


def check_transformers() -> None:
    """Raise UnmetRequirementError if the installed transformers is too old or too new; imports nothing."""
    import importlib.metadata  # not above: `lrnn --help` should not wait for it

    needs = f"lrnn-lm needs transformers {TRANSFORMERS_TEXT}"
    remedy = f"pip install 'transformers{TRANSFORMERS_TEXT}'"
    try:
        found = importlib.metadata.version("transformers")
    except importlib.metadata.PackageNotFoundError:
        raise UnmetRequirementError(f"{needs}: {remedy}") from None
    numbers = tuple(int(number) for number in re.findall(r"\d+", found)[:2])
    if not TRANSFORMERS[0] <= numbers < TRANSFORMERS[1]:
        raise UnmetRequirementError(f"{needs}, {found} is installed: {remedy}")


def check_extra(extra: str, *modules: str) -> None:
    """Raise UnmetRequirementError if one of these modules, which an extra brings, is not installed."""
    missing = [module for module in modules if find_spec(module) is None]
    if missing:
        raise UnmetRequirementError(
            f"{' and '.join(missing)} {'is' if len(missing) == 1 else 'are'} not installed: "
            f"pip install 'lrnn-lm[{extra}]'"
        )
