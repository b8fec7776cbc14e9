"""Quantities of a recipe: counts of tokens, cadences, spans of a schedule."""

import pytest

from lrnn_lm.recipe import Every, Span, format_count, load_recipe, parse_count


@pytest.mark.parametrize(
    ("written", "number"),
    [("2M", 2_000_000), ("1.5B", 1_500_000_000), ("524_288", 524_288), ("524,288", 524_288), (4096, 4096),
     (1e6, 1_000_000), ("10k", 10_000), ("0", 0), ("2T", 2 * 10**12), ("64.1K", 64_100), ("8.04k", 8040)],
)  # fmt: skip
def test_counts(written, number):
    assert parse_count(written) == number
    assert parse_count(format_count(number)) == number


@pytest.mark.parametrize(
    "number", [1, 999, 1000, 1100, 524_288, 9_882_828_800, 1_234_567_000, 10**13, 12_300, 64_100, 2**53 + 1]
)
def test_counts_are_written_exactly(number):
    assert parse_count(format_count(number)) == number


@pytest.mark.parametrize(
    "wrong", ["", "many", "-2M", "2.5", "1.0001K", True, None, [1], float("inf"), float("nan")]
)
def test_wrong_counts(wrong):
    with pytest.raises(ValueError, match="count"):
        parse_count(wrong)


@pytest.mark.parametrize(
    ("written", "amount", "unit"),
    [("100K", 100_000, "tokens"), ("200 steps", 200, "steps"), ("1 step", 1, "steps"),
     ("30 min", 30, "minutes"), ("2.5 minutes", 2.5, "minutes"),
     ("2M tokens", 2_000_000, "tokens"), (5000, 5000, "tokens"),
     (2**63 - 1, 2**63, "tokens"), (f"{2**63 - 1} steps", 2**63, "steps")],  # never
)  # fmt: skip
def test_cadences(written, amount, unit):
    every = Every.model_validate(written)
    assert (every.amount, every.unit) == (amount, unit)
    assert Every.model_validate(str(every)) == every


@pytest.mark.parametrize(
    "wrong",
    [
        "soon",
        "0 steps",
        "-5 steps",
        "x5 min",
        "0 min",
        True,
        None,
        "1.5 steps",
        {"amount": -1, "unit": "steps"},
        {"amount": 0, "unit": "steps"},
    ],
)
def test_wrong_cadences(wrong):
    with pytest.raises(ValueError, match=r"cadence|count|valid"):
        Every.model_validate(wrong)


@pytest.mark.parametrize("key", ["checkpoint.every", "eval.every"])
def test_minutes_are_not_taken_for_millions(key):
    """`30m` is 30 minutes to most programs, and was 30M tokens: a run of fewer was never saved on the way."""
    section, name = key.split(".")
    for written, fits in (
        ("30m", r"30M \(tokens\) or '30 min'"),
        ("1.5m", r"1\.5M \(tokens\) or '1\.5 min'"),
    ):
        with pytest.raises(ValueError, match=rf"{key}: .*{fits}"):
            load_recipe("recipes/demo.yaml", [f"{key}={written}"])
    for written in ("30M", "30m tokens", "30000k"):
        recipe = load_recipe("recipes/demo.yaml", [f"{key}={written}"])
        assert getattr(getattr(recipe, section), name) == Every(amount=30_000_000, unit="tokens")


@pytest.mark.parametrize("amount", [-5, float("nan"), float("inf")])
def test_wrong_spans(amount):
    with pytest.raises(ValueError, match="amount"):
        Span.model_validate({"amount": amount, "unit": "steps"})


@pytest.mark.parametrize(
    ("written", "steps"),
    [
        ("10%", 100),
        (0.1, 100),
        ("0.1", 100),
        ("409600", 100),
        ("200 steps", 200),
        (0, 0),
        ("100%", 1000),
        (1.0, 1000),
        ("1 steps", 1),
    ],
)
def test_spans(written, steps):
    span = Span.model_validate(written)
    assert span.steps(total_steps=1000, tokens_per_step=4096) == steps
    assert Span.model_validate(str(span)) == span


@pytest.mark.parametrize("share", [0.1, 1 / 3, 0.07, 0.123456789, 1e-6])
def test_shares_are_written_exactly(share):
    span = Span(amount=share, unit="fraction")
    assert Span.model_validate(str(span)).amount == pytest.approx(share, rel=1e-6)


def test_intervals_below_a_step_are_told():
    """500 without a unit are tokens; writers of `eval_steps: 500` elsewhere mean steps."""
    wrong = ("checkpoint.every=500", "eval.every=2K", "eval.during={tasks: [heldout_cloze], every: 30}")
    lines = load_recipe("recipes/demo.yaml", wrong).notes()
    assert [line.split()[0] for line in lines] == ["checkpoint.every", "eval.every", "eval.during.every"]
    assert "500 tokens" in lines[0]
    assert "'500 steps'" in lines[0]
    right = ("checkpoint.every=500 steps", "eval.every=1 min", "eval.during={tasks: [heldout_cloze]}")
    assert load_recipe("recipes/demo.yaml", right).notes() == []
