"""Leaves out training documents shorter than `data.min_document` tokens, and counts them for the manifest."""

from typing import Any

import numpy as np
import numpy.typing as npt

from . import sources
from .specs import DataError, DataSpec


class Short:
    """Tells and counts the documents of a source whose text has fewer than `min_document` tokens."""

    def __init__(self, spec: DataSpec) -> None:
        self._source, self._least = spec.source, spec.min_document or 0
        self.documents = self._tokens = self._longest = 0

    def left_out(self, lengths: npt.NDArray[np.int64], asked: npt.NDArray[np.bool_]) -> npt.NDArray[np.bool_]:
        """Which documents (n,) are too short, by their tokens; those of `asked` are counted."""
        short = (lengths < self._least) & asked
        self.documents += int(short.sum())
        self._tokens += int(lengths[short].sum())
        self._longest = max(self._longest, int(lengths.max(where=asked, initial=0)))
        return short

    def leaves_out(self, length: int) -> bool:
        """The same of one document."""
        return bool(self.left_out(np.array([length]), np.array([True]))[0])

    def facts(self) -> dict[str, Any]:
        """For the split's entry in the manifest; nothing where no length is asked for."""
        if not self._least:
            return {}
        return {"short": {"below": self._least, "num_documents": self.documents, "num_tokens": self._tokens}}

    def error(self) -> DataError:
        """The error for a source of which nothing is left."""
        return DataError(
            f"{sources.describe(self._source)}: data.min_document {self._least:,} leaves no training "
            f"document, as the longest has {self._longest:,} tokens; set a smaller one"
        )
