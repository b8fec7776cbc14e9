"""The one library whose age matters at run time: transformers, on whose cache layers the model stands."""

import re

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
