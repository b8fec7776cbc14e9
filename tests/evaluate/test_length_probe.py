"""The length probe: pieces equal one pass, memory is causal, transitions are bounded, mistakes are told."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from rich.console import Console
from small_models import MIXER_ROWS, small_model
from torch.nn import functional

from lrnn_lm.cli import main
from lrnn_lm.evaluate.probe import length as probe
from lrnn_lm.evaluate.probe.length import bin_edges, by_multiple, parse_length, probe_length
from lrnn_lm.model.cache import CACHE
from lrnn_lm.recipe import load_recipe
from lrnn_lm.train.build import build_trainer


def train(folder, task="s3", *overrides):
    """A checkpoint that has seen two steps of a task at length 8."""
    recipe = load_recipe(f"recipes/synthetic/{task}.yaml", [
        "model.hidden_size=16", "model.intermediate_size=16", "train.tokens=512", "train.tokens_per_step=256",
        "data.source.length=8", "data.source.validation_examples=8", "train.device=cpu",
        f"train.runs_dir={folder}", f"data.cache_dir={folder / 'cache'}", *overrides,
    ])  # fmt: skip
    return build_trainer(recipe, Console(quiet=True)).run()


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return train(tmp_path_factory.mktemp("length"))


@pytest.mark.parametrize(("text", "tokens"), [("16x", 512), ("4096", 4096), ("0.5x", 16), ("1_000", 1000)])
def test_lengths(text, tokens):
    assert parse_length(text, 32) == tokens


@pytest.mark.parametrize("text", ["", "x", "16 times", "-4x", "0", "1", "nanx", "infx"])
def test_lengths_that_are_none(text):
    with pytest.raises(ValueError, match="length"):
        parse_length(text, 32)


@pytest.mark.parametrize("N", [2, 3, 7, 64, 1000])
def test_bins_cover_every_position_once(N):
    edges = bin_edges(N)
    assert (edges[0], edges[-1]) == (0, N)
    assert edges == sorted(set(edges))


@pytest.mark.parametrize("name", ["bd_lru", "h_lru", "attention", "mamba2", "lstm"])
def test_pieces_equal_one_pass(name, monkeypatch):
    model = small_model(name)
    inputs = torch.randint(1, 53, (2, 40), generator=torch.Generator().manual_seed(0))
    labels = torch.where(inputs % 5 == 0, -100, inputs)
    monkeypatch.setattr(probe, "PIECE_LOGITS", 2 * 53 * 3)  # three tokens at once
    with torch.no_grad():
        bins, states = probe._by_position(model, inputs, labels)
        logits = model(inputs).logits
    for bin in bins:
        part = slice(bin["from"], bin["to"])
        valid = labels[:, part] >= 0
        assert bin["targets"] == valid.sum()
        if bin["targets"]:
            want = torch.nn.functional.cross_entropy(logits[:, part][valid], labels[:, part][valid])
            assert bin["loss"] == pytest.approx(float(want), abs=1e-4)
    layers = 0 if name == "attention" else 3
    assert len(states[-1]["rms"]) == layers


@pytest.mark.parametrize("name", [n for n in MIXER_ROWS if n.startswith(("bd_lru", "h_lru"))])
def test_transitions_are_those_of_the_scan(name):
    """h_t = A_t h_{t-1} when nothing is put in: the change of the state between two starts follows A_t."""
    mixer = small_model(name).model.layers[0].mixer
    x = torch.randn(1, 5, 16, generator=torch.Generator().manual_seed(0))
    A = mixer.transitions(x)[0]  # (T, N, M, M)
    N, M = A.shape[1:3]
    assert (A.abs().sum(dim=-1) <= 1 + 1e-5).all()
    from lrnn_lm.mixers import SequenceContext

    starts = torch.randn(2, 1, N, M, generator=torch.Generator().manual_seed(1))
    packed = mixer.state_elements(1) > N * M  # a convolution's inputs lie after the recurrence's state
    before = [start.flatten(1) if packed else start.clone() for start in starts]
    if packed:
        before = [functional.pad(state, (0, mixer.state_elements(1) - N * M)) for state in before]
    ends = [mixer(x, state, SequenceContext())[1].flatten(1)[:, : N * M].view(1, N, M) for state in before]
    moved = (starts[0] - starts[1])[0]
    for t in range(5):
        moved = (A[t] @ moved.unsqueeze(-1)).squeeze(-1)
    torch.testing.assert_close((ends[0] - ends[1])[0], moved, rtol=0, atol=1e-5)


def test_of_a_run(run, tmp_path, capsys):
    with pytest.raises(SystemExit) as left:
        main(
            ["eval", str(run), "--length", "64x", "--rows", "2", "--device", "cpu", "--output", str(tmp_path)]
        )
    assert not left.value.code
    assert "effective memory" in capsys.readouterr().out
    (file,) = tmp_path.glob("*.json")
    facts = json.loads(file.read_text())
    assert facts["by_position"][-1]["to"] == facts["settings"]["length"] == 512
    assert [layer["layer"] for layer in facts["transitions"]] == [0, 1]
    assert all(layer["row_sum"]["max"] <= 1 + 1e-5 for layer in facts["transitions"])
    assert facts["memory"][0]["distance"] == 0
    assert facts["memory"][0]["moved"] > 0
    assert facts["memory"][-1]["distance"] == 511
    assert len(list(tmp_path.glob("*.png"))) == 1
    rows = by_multiple(facts)
    assert rows[0][0] == "1 - 8"
    assert len(rows) == 7
    assert np.isfinite([loss for _, loss, _ in rows]).all()


class Echo:
    """In a model's place: says the token of `delay` steps ago, and for certain."""

    config, device = SimpleNamespace(vocab_size=53), torch.device("cpu")

    def __init__(self, delay):
        self.delay = delay

    def __call__(self, input_ids, **options):
        before = options.get(CACHE)
        seen = input_ids if before is None else torch.cat([before, input_ids], dim=1)
        said = seen[:, -1 - self.delay] if seen.shape[1] > self.delay else torch.zeros(len(seen), dtype=int)
        logits = 1e4 * torch.nn.functional.one_hot(said, 53).unsqueeze(1)
        return SimpleNamespace(logits=logits, **{CACHE: seen})


@pytest.mark.parametrize("delay", [0, 1, 8, 64, 199])
def test_a_change_is_not_seen_before_it_happens_nor_past_a_memory(delay):
    """The output moves with the token that it shows, and with none after or before that one."""
    inputs = torch.randint(1, 53, (2, 200), generator=torch.Generator().manual_seed(0))
    found = {m["distance"]: m["moved"] for m in probe._memory(Echo(delay), inputs, 0)}
    assert list(found) == sorted(found)
    assert (min(found), max(found)) == (0, 199)
    assert found == {distance: float(distance == delay) for distance in found}
    assert found[delay] == 1


USUAL = ("bd_lru-all", "h_lru", "attention-window", "lstm", "hybrid")


@pytest.mark.parametrize(
    "name",
    [*USUAL, *(pytest.param(name, marks=pytest.mark.slow) for name in MIXER_ROWS if name not in USUAL)],
)
def test_memory_is_that_of_whole_passes(name):
    model = small_model(name)
    inputs = torch.randint(1, 53, (3, 40), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        found = probe._memory(model, inputs, seed=1)
        shifts = torch.randint(1, 53, (3, len(found)), generator=torch.Generator().manual_seed(1))
        changed = inputs.repeat(len(found), 1, 1)  # (points, 3, 40)
        for rows, point, shift in zip(changed, found, shifts.T, strict=True):
            place = 39 - point["distance"]
            rows[:, place] = (rows[:, place] + shift) % 53
        last = model(torch.cat([inputs, changed.flatten(0, 1)])).logits[:, -1].softmax(dim=-1).view(-1, 3, 53)
    moved = (last[1:] - last[0]).abs().sum(dim=-1).mean(dim=-1) / 2
    assert [point["moved"] for point in found] == pytest.approx(moved.tolist(), abs=1e-5)
    assert found[0]["moved"] > 0.05


@pytest.mark.usefixtures("no_pictures")
def test_of_another_model_and_its_text(checkpoint, tmp_path):
    facts = probe_length(checkpoint, "1x", rows=2, output=tmp_path, device="cpu")
    assert facts["transitions"] == []
    assert facts["states"][-1]["rms"] == {}
    with pytest.raises(ValueError, match="longer than this llama takes: 48"):
        probe_length(checkpoint, "2x", rows=2, output=tmp_path, device="cpu")


@pytest.mark.parametrize(("arguments", "message"), [
    (["--length", "long"], "give training lengths, as in 16x"),
    (["--length", "2x", "--rows", "0"], "rows must be at least 1"),
    (["--length", "2x", "--data", "/no/such.jsonl"], "no such file"),
])  # fmt: skip
def test_mistakes_leave_with_2(run, arguments, message, capsys):
    with pytest.raises(SystemExit) as left:
        main(["eval", str(run), "--device", "cpu", *arguments])
    assert left.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.usefixtures("no_pictures")
def test_too_little_text(run, tmp_path):
    text = tmp_path / "text.jsonl"
    text.write_text('{"text": "1 2 3"}\n')
    with pytest.raises(ValueError, match="do not fill one row of 16"):
        probe_length(run, "2x", data=text, device="cpu")
    text.write_text(json.dumps({"text": "1 2 3 " * 20}) + "\n")
    facts = probe_length(run, "2x", rows=50, data=text, device="cpu", output=tmp_path)
    assert facts["settings"]["rows"] == facts["by_position"][0]["targets"] < 50  # as many as there are


def test_a_state_that_diverges_is_told_and_drawn(tmp_path, capsys):
    """Unnormalised gates: states and matrices overflow, and JSON has no word for that but null."""
    checkpoint = train(tmp_path, "s3", "model.mixer.gate=none", "model.mixer.gate_std=3")
    facts = probe_length(checkpoint, "64x", rows=2, output=tmp_path / "out", device="cpu")
    assert facts["transitions"][1]["finite"] < 1
    assert not np.isfinite(facts["by_position"][-1]["loss"])
    (file,) = (tmp_path / "out").glob("*.json")
    assert json.loads(file.read_text())["by_position"][-1]["loss"] is None
    assert "effective memory" in capsys.readouterr().out


@pytest.mark.usefixtures("no_pictures")
def test_row_sums_are_of_the_rows_that_gates_make(tmp_path):
    """Of a companion matrix that is the first: the others are a shifted identity, whose sums are 1."""
    checkpoint = train(tmp_path, "s3", "model.mixer.type=h_lru", "model.mixer.order=3")
    facts = probe_length(checkpoint, "2x", rows=2, output=tmp_path / "out", device="cpu")
    assert all(layer["row_sum"]["max"] < 0.99 for layer in facts["transitions"])


@pytest.mark.usefixtures("no_pictures")
def test_memory_is_probed_with_tokens_that_occur(tmp_path, monkeypatch):
    """Of modular counting two of five ids do; the rest was never trained."""
    checkpoint = train(tmp_path, "modular-counting", "data.source.options.start=1")
    given, plain = [], probe.prefill
    monkeypatch.setattr(
        probe, "prefill", lambda model, ids, **rest: given.append(ids) or plain(model, ids, **rest)
    )
    probe_length(checkpoint, "4x", rows=4, output=tmp_path / "out", device="cpu")
    assert set(torch.cat([ids[:, 1:].flatten() for ids in given]).tolist()) == {0, 1}
    assert {int(ids[0, 0]) for ids in given} <= {0, 1, 5}


@pytest.mark.parametrize("trained", [8, 24, 100])
def test_rows_of_the_table_begin_where_they_say(trained):
    edges = bin_edges(16 * trained, trained)
    assert {trained * 2**i for i in range(5)} <= set(edges)
