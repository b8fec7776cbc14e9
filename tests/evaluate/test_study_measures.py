"""What the study reports: rows that no step has read, at the length named, and a rate chosen without them."""

import numpy as np
import pytest
import torch
from test_study import CPU, job

from eval.studies import replicas, synthetic, tables
from eval.studies.replicas import Replica
from lrnn_lm.data.pack import IGNORED


@pytest.mark.parametrize("task", ["s3", "in_context_recall", "compression"])
def test_accuracy_is_measured_on_rows_of_the_held_out_split(task, monkeypatch):
    """Those of the task's generator: a model that knows exactly them is always right."""
    one = job(task=task, stages=((12, 2),), tested=(12,), options={"start": 1} if task == "s3" else {})
    count = replicas.HELDOUT_ROWS["causal" if task == "s3" else "autoencoder"]
    inputs, labels = one.task_at(12).rows(one.seed, "validation", np.arange(count))
    known = {row.tobytes(): answer for row, answer in zip(inputs, labels, strict=True)}

    def recall(self, rows, **arguments):
        answers = [known.get(row.tobytes(), np.full(len(row), -1)) for row in rows.numpy()]
        chosen = torch.from_numpy(np.stack(answers)).clamp_min(-1)
        vocabulary = one.task_at(12).vocab_size
        logits = torch.nn.functional.one_hot(chosen.clamp_min(0), vocabulary).float()
        logits[chosen == -1] = 0
        return type("Output", (), {"logits": logits})

    replica = Replica(one, CPU)
    replica.losses = [0.0]
    monkeypatch.setattr(Replica, "_forward", recall)
    assert replica.measure()["accuracy"] == 1.0
    for row in known:
        known[row] = np.where(known[row] == IGNORED, IGNORED, (known[row] + 1) % one.task_at(12).vocab_size)
    assert replica.measure()["accuracy"] == 0.0


def test_each_accuracy_is_of_the_length_it_names(monkeypatch):
    """A model that is right up to the training length only, and then up to another."""
    one = job(stages=((6, 1), (12, 1)), tested=(12, 48))
    _, labels = one.task_at(48).rows(one.seed, "validation", np.arange(256))
    right = 12

    def answer(self, rows, **_):
        first = len(answer.done)
        chosen = torch.from_numpy(labels[first : first + len(rows)]).clone()
        answer.done.extend(range(len(rows)))
        chosen[:, right:] = (chosen[:, right:] + 1) % 6
        return type("Output", (), {"logits": torch.nn.functional.one_hot(chosen.clamp_min(0), 7).float()})

    monkeypatch.setattr(Replica, "_forward", answer)
    replica = Replica(one, CPU)
    replica.losses = [0.0]
    asked = (labels != IGNORED).sum(0)
    for right in (12, 24):
        answer.done = []
        found = replica.measure()
        assert found["accuracy"] == found["by_length"]["12"] == 1.0, "at the training length"
        assert found["by_length"]["48"] == pytest.approx(asked[:right].sum() / asked.sum())
        assert found["last_half"]["12"] == 1.0
        assert found["last_half"]["48"] == 0.0


def test_the_rate_is_not_chosen_by_the_test_length():
    """The better at the training length wins, though the other is far better at 16 times that length; among
    equals the lower loss does.
    """
    near = {"accuracy": 0.99, "loss": 0.5, "by_length": {"32": 0.99, "512": 0.1}, "last_half": {"512": 0.1}}
    far = {"accuracy": 0.95, "loss": 0.1, "by_length": {"32": 0.95, "512": 0.9}, "last_half": {"512": 0.9}}
    assert tables.rank(near) > tables.rank(far)
    assert tables.rank({**near, "loss": 0.4}) > tables.rank(near)
    assert tables.rank({"error": "no"}) < tables.rank(far)


def test_study_and_table_take_that_rate(tmp_path):
    """What trains with the other seeds, and what the table shows."""
    given = ["--output", str(tmp_path), "--tasks", "s3", "--models", "bd_lru-m4", "--lrs", "1e-3,1e-2",
             "--seeds", "0,1", "--hidden", "16", "--device", "cpu"]  # fmt: skip
    options = synthetic.arguments(given)
    tried = synthetic.study_jobs("states", options, {})
    near, far = ({"accuracy": 0.99, "by_length": {"32": 0.99, "512": 0.1}},
                 {"accuracy": 0.95, "by_length": {"32": 0.95, "512": 0.9}})  # fmt: skip
    facts = [{"seed": 0, "model": one.model, "parameters": 1, "loss": 0.1, "lr": one.lr} for one in tried]
    found = {one.name: {**fact, **score} for one, fact, score in zip(tried, facts, (near, far), strict=True)}
    jobs = synthetic.study_jobs("states", options, found)
    assert [(one.seed, one.lr) for one in jobs[2:]] == [(1, 1e-3)]
    assert "| 0.001 | 1 | 0.9900 |" in tables.table(jobs, found)
