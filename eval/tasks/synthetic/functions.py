"""What the YAML files beside this one name with `!function`, from lrnn_lm.evaluate.tasks.synthetic."""

from lrnn_lm.evaluate.tasks.synthetic import score_answer, score_written, synthetic_dataset

__all__ = ["score_answer", "score_written", "synthetic_dataset"]
