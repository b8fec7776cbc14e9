"""What the YAML files beside this one name with `!function`, from lrnn_lm.evaluate.synthetic_tasks."""

from lrnn_lm.evaluate.synthetic_tasks import score_answer, score_written, synthetic_dataset

__all__ = ["score_answer", "score_written", "synthetic_dataset"]
