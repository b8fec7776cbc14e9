"""What the YAML files beside this one name with `!function`: the project's functions, and lm-eval's own."""

from lm_eval.tasks.wikitext.preprocess_wikitext import process_results, wikitext_detokenizer

from lrnn_lm.evaluate.tasks.offline import (
    blimp_dataset,
    lambada_dataset,
    mean_over_paradigms,
    score_pair,
    wikitext_dataset,
)

__all__ = [
    "blimp_dataset",
    "lambada_dataset",
    "mean_over_paradigms",
    "process_results",
    "score_pair",
    "wikitext_dataset",
    "wikitext_detokenizer",
]
