"""What the YAML files beside this one name with `!function`, from lrnn_lm.evaluate."""

from lrnn_lm.evaluate.long_context import needle_dataset, passkey_dataset
from lrnn_lm.evaluate.synthetic_tasks import score_answer

__all__ = ["needle_dataset", "passkey_dataset", "score_answer"]
