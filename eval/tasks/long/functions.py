"""What the YAML files beside this one name with `!function`, from lrnn_lm.evaluate."""

from lrnn_lm.evaluate.tasks.long_context import needle_dataset, passkey_dataset
from lrnn_lm.evaluate.tasks.synthetic import score_answer

__all__ = ["needle_dataset", "passkey_dataset", "score_answer"]
