"""What the pictures of runs share: smoothed curves, and their names."""

import math

from matplotlib.figure import Figure

from lrnn_lm.evaluate.reporting.plot import name_curves, smooth


def test_a_name_with_an_underscore_first_is_in_the_legend():
    """The pictures' library leaves such a curve out of it, and says nothing."""
    axes = Figure().subplots()
    axes.plot([1, 2], label="_best")
    axes.plot([2, 1])
    axes.axhline(1, label="gzip")
    name_curves(axes)
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["_best", "gzip"]


def test_smoothing_is_a_centred_mean_of_finite_values():
    assert smooth([1.0, 2.0, 3.0, 4.0], 1) == [1.0, 2.0, 3.0, 4.0]
    assert smooth([0.0, 3.0, 6.0, 9.0], 3) == [1.5, 3.0, 6.0, 7.5]
    assert smooth([1.0, math.nan, 3.0], 3) == [1.0, 2.0, 3.0]
    assert smooth([], 5) == []
