"""An unknown key is answered with the key that was meant, also by the names that other trainers use."""

import pytest

from lrnn_lm.recipe import RecipeError, load_recipe
from lrnn_lm.recipe.explain import _ELSEWHERE_CALLED, _OUR_KEYS
from lrnn_lm.recipe.reading import field_type
from lrnn_lm.recipe.schema import Recipe


def answer(override):
    with pytest.raises(RecipeError) as error:
        load_recipe("recipes/demo.yaml", [override])
    return str(error.value)


def test_each_key_of_the_table_exists_and_each_other_name_stands_there_once():
    for ours in _ELSEWHERE_CALLED:
        *section, key = ours.split(".")
        assert key in field_type(Recipe, *section).model_fields, ours
    assert len(_OUR_KEYS) == sum(len(names.split()) for names in _ELSEWHERE_CALLED.values())


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        ("max_steps", "train.tokens' (the budget: steps times tokens_per_step"),
        ("num_train_epochs", "train.tokens"),
        ("learning_rate", "optim.lr"),
        ("per_device_train_batch_size", "train.micro_batch' (rows per rank in one forward pass)"),
        ("gradient_accumulation_steps", "train.tokens_per_step"),
        ("warmup_steps", "optim.warmup' (length of the warm-up: 10%, 2M (tokens) or 200 steps)"),
        ("save_steps", "checkpoint.every"),
        ("bf16", "train.precision"),
        ("seq_len", "data.sequence_length"),
        ("hidden_dim", "model.hidden_size"),
        ("n_layers", "model.num_hidden_layers"),
        ("num_attention_heads", "model.mixer.num_heads"),
        ("resume", "name' (name of the run, and of its folder; lrnn train resumes a run of that name)"),
    ],
)
@pytest.mark.parametrize("section", ["", "train.", "model.", "optim."])
def test_the_names_of_other_trainers_are_told_ours(section, theirs, ours):
    assert f"{section}{theirs}: unknown key; did you mean '{ours}" in answer(f"{section}{theirs}=3")


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("train.steps=3", "did you mean 'train.tokens'"),  # not data.curriculum.steps, which has that name
        ("optimizer.lr=1", "did you mean 'optim'?"),  # a section is meant, not optim.name
        ("train.seed=1", "did you mean 'seed'?"),
        ("train.profile={at: 2, step: 3}", "did you mean 'steps'?"),
        ("data.stages=[{tokens: 2M, num_tokens: 3}]", "did you mean 'tokens'?"),
        ("model.mixer.n_heads=2", "did you mean 'model.mixer.num_heads'?"),
    ],
)
def test_the_nearest_meaning_comes_first(override, words):
    assert words in answer(override)
