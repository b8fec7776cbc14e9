"""The synthetic tasks: rows are right, a function of (seed, split, index) alone, and mistakes are told."""

from itertools import permutations

import numpy as np
import pytest

from lrnn_lm.data import (
    MAD_TASKS,
    STATE_TASKS,
    SYNTHETIC_TASKS,
    DataError,
    SyntheticRows,
    SyntheticTask,
    prepare_synthetic,
)
from lrnn_lm.data.synthetic.draws import Draws
from lrnn_lm.data.synthetic.state_tracking import composition_table
from studies.synthetic import SWEEPS

GOLDEN = [[750, 221, 564], [340, 315, 29], [10, 851, 243]]
GOLDEN_S3 = [[0, 3, 0, 2, 2, 4, 4, 5]]
NAMES = list(SYNTHETIC_TASKS)


def task(name, length=None, **options):
    return SyntheticTask(name, length or SYNTHETIC_TASKS[name].length, options)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("split", ["train", "validation"])
def test_rows_hang_on_seed_split_and_index_alone(name, split):
    made = task(name)
    inputs, labels = made.rows(3, split, np.arange(40))
    assert inputs.shape == labels.shape == (40, made.length)
    assert inputs.min() >= 0
    assert max(inputs.max(), labels.max()) < made.vocab_size
    assert labels.min() >= -100
    assert (labels >= 0).any(axis=1).all()
    for i in (0, 17, 39):
        alone = made.rows(3, split, [i])
        assert (alone[0][0] == inputs[i]).all()
        assert (alone[1][0] == labels[i]).all()
    for other in (made.rows(4, split, np.arange(40)), made.rows(3, "another", np.arange(40))):
        assert (other[0] != inputs).any()


def test_rows_stay_the_same_for_ever():
    """Stored by hand: a change here would make other data of every recipe."""
    assert Draws(0, "x", [0, 1, 10**9]).integers(1000, 3).tolist() == GOLDEN
    assert task("s3", 8).rows(0, "train", [5])[0].tolist() == GOLDEN_S3


def test_draws_are_uniform():
    draws = Draws(1, "uniform", np.arange(2000))
    counts = np.bincount(draws.integers(7, 20).ravel(), minlength=7)
    assert abs(counts / counts.sum() - 1 / 7).max() < 0.006
    assert abs(draws.uniform(50).mean() - 0.5) < 0.005
    assert (np.sort(draws.permutations(9), axis=1) == np.arange(9)).all()


@pytest.mark.parametrize(("group", "size", "commutes"), [
    ("s3", 6, False), ("s4", 24, False), ("s5", 120, False), ("a5", 60, False), ("z60", 60, True),
])  # fmt: skip
def test_groups(group, size, commutes):
    table = composition_table(group)
    everything = np.arange(size)
    assert table.shape == (size, size)
    assert (np.sort(table, axis=0) == everything[:, None]).all()
    assert (np.sort(table, axis=1) == everything).all()
    assert (table[0] == everything).all()
    assert (table[:, 0] == everything).all()
    rng = np.random.default_rng(0)
    a, b, c = rng.integers(0, size, (3, 500))
    assert (table[table[a, b], c] == table[a, table[b, c]]).all()
    assert bool((table == table.T).all()) == commutes


def test_products_are_permutations_applied_in_order():
    elements = list(permutations(range(3)))
    inputs, states = task("s3", 12).rows(0, "train", [0])
    arrangement = (0, 1, 2)
    for new, state in zip(inputs[0], states[0], strict=True):
        arrangement = tuple(elements[new][i] for i in arrangement)
        assert elements[state] == arrangement


def test_formal_languages():
    inputs, labels = task("parity", 50).rows(0, "train", np.arange(5))
    assert (labels == inputs.cumsum(axis=1) % 2).all()
    inputs, labels = task("modular_counting", 50, modulus=7).rows(0, "train", np.arange(5))
    assert (labels == inputs.cumsum(axis=1) % 7).all()
    inputs, labels = task("aa_star", 200).rows(0, "train", np.arange(3))
    for row, states in zip(inputs, labels, strict=True):
        words = "".join("#" if symbol else "a" for symbol in row)
        want = [len(words[: t + 1].rpartition("#")[2]) % 2 == 0 for t in range(len(words))]
        assert states.tolist() == want
    inputs, labels = task("dyck1_depth", 300, max_depth=3).rows(0, "train", np.arange(5))
    assert (labels == (1 - 2 * inputs).cumsum(axis=1)).all()
    assert (labels.min(), labels.max()) == (0, 3)


def test_regular_languages_by_their_definitions():
    inputs, labels = task("even_pairs", 30).rows(0, "train", np.arange(20))
    for row, states in zip(inputs, labels, strict=True):
        word = "".join("ab"[symbol] for symbol in row)
        for t in range(1, len(word) + 1):
            pairs = [word[i : i + 2] for i in range(t - 1)]
            assert states[t - 1] == ((pairs.count("ab") + pairs.count("ba")) % 2 == 0)
    inputs, labels = task("cycle_navigation", 50, modulus=4).rows(0, "train", np.arange(5))
    assert (labels == np.array([0, 1, -1])[inputs].cumsum(axis=1) % 4).all()
    inputs, labels = task("modular_arithmetic", 40).rows(0, "train", np.arange(50))
    assert set(inputs.ravel()) == set(range(8))
    for row, values in zip(inputs, labels, strict=True):
        text = "".join("01234+-*"[symbol] for symbol in row)
        assert [eval(text[: t + 1]) % 5 if t % 2 == 0 else -100 for t in range(40)] == values.tolist()


def test_many_queries_are_answered_by_the_pairs():
    made = task("mqar", 40, vocab_size=64, pairs=5)
    inputs, labels = made.rows(0, "train", np.arange(400))
    for row, asked in zip(inputs, labels, strict=True):
        pairs = dict(zip(row[:10:2].tolist(), row[1:10:2].tolist(), strict=True))
        assert len(pairs) == 5
        assert all(0 < key < 32 <= value < 64 for key, value in pairs.items())
        (places,) = np.nonzero(asked >= 0)
        assert (places % 2 == 0).all()
        assert places.min() >= 10
        assert {key: pairs[key] for key in row[places].tolist()} == pairs
        assert [pairs[key] for key in row[places].tolist()] == asked[places].tolist()
    share = (labels[:, 10:25] >= 0).sum() / (labels >= 0).sum()
    assert share > 0.6  # near the pairs more often: a power law


@pytest.mark.parametrize("name", STATE_TASKS)
def test_a_start_symbol_goes_before_the_same_row(name):
    plain, started = task(name, 12), task(name, 13, start=1)
    assert started.vocab_size == plain.vocab_size + 1
    inputs, labels = started.rows(0, "train", np.arange(4))
    assert (inputs[:, 0] == plain.vocab_size).all()
    assert (labels[:, 0] == -100).all()
    want = plain.rows(0, "train", np.arange(4))
    assert (inputs[:, 1:] == want[0]).all()
    assert (labels[:, 1:] == want[1]).all()


def test_recall_labels_are_what_was_read():
    for name, options in (("in_context_recall", {}), ("noisy_in_context_recall", {"noise": 0.5})):
        made = task(name, 64, **options)
        plain = 16
        inputs, labels = made.rows(0, "validation", np.arange(50))
        for row, asked in zip(inputs, labels, strict=True):
            read = {}
            for key, value, label, none in zip(row[::2], row[1::2], asked[::2], asked[1::2], strict=True):
                assert none == -100
                if key >= plain:
                    assert label == -100
                    assert value >= plain
                    continue
                assert key < 8 <= value < plain
                assert label == read.get(key, -100)
                assert read.setdefault(key, value) == value
            assert asked[-2] >= 0, "the last pair is the probe"
    inputs, labels = task("in_context_recall").rows(0, "train", [0])
    assert (labels[:, :-1] == inputs[:, 1:]).all()


def test_noise_has_the_share_that_is_asked_for():
    inputs, _ = task("noisy_in_context_recall", noise=0.6).rows(0, "train", np.arange(300))
    assert abs((inputs >= 16).mean() - 0.6 * 62 / 64) < 0.01


def test_fuzzy_recall_asks_for_a_run_that_was_read():
    made = task("fuzzy_in_context_recall", 64)
    inputs, labels = made.rows(0, "validation", np.arange(200))
    for row, asked in zip(inputs, labels, strict=True):
        (places,) = np.nonzero(asked >= 0)
        last = [p for p in places if p >= places[-1] - 2 and set(range(p, places[-1] + 1)) <= set(places)]
        probe = row[last[0] - 2 : last[0] + 1].tolist()
        whole = " ".join(map(str, [*row.tolist(), asked[-1]]))
        answer = asked[last].tolist()
        assert asked[-1] >= 0
        assert max(probe) < 7 <= min(answer)
        assert whole.count(" ".join(map(str, probe + answer))) >= 2
        assert (row[: np.argmax(row != 15)] == 15).all()
        assert (row[np.argmax(row != 15) :] != 15).all()


def test_copying_memorisation_and_compression():
    inputs, labels = task("selective_copying", 40, copies=6).rows(0, "train", np.arange(20))
    front = inputs[:, :33]
    assert (front != 15).all()
    assert (inputs[:, 33] == 15).all()
    assert all((row[row < 14] == asked[34:]).all() for row, asked in zip(front, labels, strict=True))
    assert (labels[:, :34] == -100).all()
    made = task("memorisation", vocab_size=32)
    known = {}
    for split in ("train", "validation"):
        inputs, labels = made.rows(0, split, np.arange(50))
        for key, value in zip(inputs[:, ::2].ravel(), labels[:, 1::2].ravel(), strict=True):
            assert known.setdefault(key, value) == value
    assert len(set(known.values())) == len(known) == 15
    other = task("memorisation", vocab_size=32, map_seed=1).rows(0, "train", np.arange(50))
    assert any(
        known[k] != v for k, v in zip(other[0][:, ::2].ravel(), other[1][:, 1::2].ravel(), strict=True)
    )
    inputs, labels = task("compression").rows(0, "train", [0])
    assert (inputs == labels).all()
    assert inputs[0, -1] == 15


def test_published_baselines_and_sweeps_can_be_made():
    assert len(MAD_TASKS) == 6
    assert {*SWEEPS} == {*MAD_TASKS}
    assert len(STATE_TASKS) == 12
    for name in MAD_TASKS:
        for key, values in SWEEPS[name].items():
            for value in values:
                if key == "length":
                    task(name, value)
                elif key != "examples":
                    task(name, **{key: value})


@pytest.mark.parametrize(("make", "message"), [
    (lambda: task("paritty", 8), "unknown synthetic task 'paritty'; did you mean parity"),
    (lambda: SyntheticTask("s6", 8), "s5"),
    (lambda: task("parity", modulus=3), "no option 'modulus'"),
    (lambda: task("in_context_recall", vocabsize=3), "did you mean vocab_size"),
    (lambda: task("in_context_recall", 7), "even length"),
    (lambda: task("in_context_recall", vocab_size=3), "too small"),
    (lambda: task("noisy_in_context_recall", vocab_size=16), "too small"),
    (lambda: task("noisy_in_context_recall", noise=1.0), "below 1"),
    (lambda: task("fuzzy_in_context_recall", vocab_size=6), "at least 7"),
    (lambda: task("fuzzy_in_context_recall", 11), "too short"),
    (lambda: task("selective_copying", 32), "at least 33"),
    (lambda: task("memorisation", vocab_size=2), "vocab_size must be at least 3"),
    (lambda: task("modular_counting", modulus=1), "at least 2"),
    (lambda: task("dyck1_depth", max_depth=0), "at least 1"),
    (lambda: task("cycle_navigation", modulus=1), "at least 2"),
    (lambda: task("mqar", 128, pairs=33), "too short for 33 pairs: at least 132"),
    (lambda: task("mqar", 128, vocab_size=16), "at least 18"),
    (lambda: task("mqar", 128, power=0), "above 0"),
    (lambda: task("dyck1_depth", max_depth=2.5), "takes a number"),
    (lambda: task("s3", 1), "at least 2"),
    (lambda: task("s3", start=2), "0 or 1"),
])  # fmt: skip
def test_mistakes(make, message):
    with pytest.raises(DataError, match=message):
        make()


def test_a_kept_set_equals_an_endless_one():
    made = task("s4", 16)
    kept, endless = SyntheticRows(made, 0, "train", 50), SyntheticRows(made, 0, "train", 2**40)
    for row in (0, 49):
        assert all((kept[row][key] == endless[row][key]).all() for key in ("input_ids", "labels", "reset"))


def test_prepared(tmp_path):
    from transformers import AutoTokenizer

    prepared = prepare_synthetic(task("s3"), cache_dir=str(tmp_path))
    assert (prepared.vocab_size, prepared.task.length) == (6, 32)
    tokenizer = AutoTokenizer.from_pretrained(prepared.tokenizer_dir)
    assert tokenizer("3 0 5")["input_ids"] == [3, 0, 5]
    assert tokenizer.decode([3, 0, 5]) == "3 0 5"
    assert len(tokenizer) == 6
    hashes = {
        prepare_synthetic(task("s3", length), cache_dir=str(tmp_path), **change).manifest["content_hash"]
        for length, change in ((32, {}), (32, {"seed": 1}), (16, {}), (32, {"examples": 100}))
    }
    assert len(hashes) == 4
    assert prepared.manifest["content_hash"] in hashes
    with pytest.raises(DataError, match=r"vocab_size 5 is too small for task s3, which has 6"):
        prepare_synthetic(task("s3"), cache_dir=str(tmp_path), vocab_size=5)
