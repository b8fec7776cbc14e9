"""The language-model study: which device a training is told."""

import pytest
import torch

from studies import lm


@pytest.mark.parametrize(
    ("given", "count", "told"),
    [(None, 3, ["0", "1", "2"]), ("2,3", 2, ["2", "3"]), ("1", 1, ["1"]), ("", 0, []), (None, 0, [])],
)
def test_trainings_take_the_devices_that_the_study_was_given(monkeypatch, given, count, told):
    if given is None:
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    else:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", given)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    assert lm.visible_devices() == told
