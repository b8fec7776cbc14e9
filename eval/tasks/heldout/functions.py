"""What the YAML files beside this one name with `!function`, from lrnn_lm.evaluate.tasks.heldout."""

from lrnn_lm.evaluate.tasks.heldout import cloze_dataset, gzip_bits_per_byte, heldout_dataset, score_passage

__all__ = ["cloze_dataset", "gzip_bits_per_byte", "heldout_dataset", "score_passage"]
