"""The certificate of state tracking: right on exact, soft, broken and untrained models; refusals."""

from itertools import permutations

import numpy as np
import pytest
import torch

from lrnn_lm import LRNNConfig, LRNNForCausalLM
from lrnn_lm.cli import main
from lrnn_lm.data import SyntheticTask
from lrnn_lm.data.synthetic.prepare import write_symbols
from lrnn_lm.evaluate.probe.certify import certify
from lrnn_lm.evaluate.probe.state_boxes import (
    Ball,
    _after,
    _first_states,
    _gate_error,
    _growth,
    _lead,
    _linear,
    _margin,
    _widened,
    affine_maps,
    certified_length,
)
from lrnn_lm.kernels.gates import GATES, normalise

ELEMENTS = list(permutations(range(3)))
START = 6
VALUES = torch.tensor([-1.0, 0.0, 1.0])


def model_of_s3(lead=200.0, blocks=1, gate="softmax", pull=0.0, input_logit=True):
    """One layer that permutes three values: gate logits of `lead` for the entry to copy, 0 for the others.

    The embedding is one-hot, and the head compares the state with the values in each of the six orders. What
    leaks through the input gate pulls the first entry to `pull`. Without `input_logit`, the same function.
    """
    shape = {"block_size": 3, "num_blocks": blocks, "gate": gate, "input_logit": input_logit}
    model = LRNNForCausalLM(LRNNConfig(
        vocab_size=7, hidden_size=10, num_hidden_layers=1, intermediate_size=4,
        mixer={"type": "bd_lru", **shape},
        synthetic_task={"task": "s3", "length": 8, "options": {"start": 1}},
    )).eval()  # fmt: skip
    torch.manual_seed(0)
    layer = model.model.layers[0]
    unit = 10**-0.5  # the norm makes of a one-hot vector sqrt(10) times it
    with torch.no_grad():
        model.model.embed_tokens.weight.copy_(torch.eye(7, 10))
        gates = torch.zeros(4, blocks, 3, 10)
        for symbol, element in enumerate(ELEMENTS):
            for i in range(3):
                gates[i, 0, element[i], symbol] = lead * unit
        gates[3, 0, :, START] = lead * unit
        values = layer.mixer.value_proj.weight.zero_().view(blocks, 3, 10)
        values[0, :, START] = VALUES * unit
        values[0, 0, :START] = pull * unit
        out = layer.mixer.out_proj.weight.zero_().view(10, blocks, 3)
        out[7:, 0] = 4 * torch.eye(3)
        layer.mlp.down_proj.weight.zero_()
        model.lm_head.weight.zero_()
        for state, element in enumerate(ELEMENTS):
            for i in range(3):
                model.lm_head.weight[state, 7 + element[i]] = VALUES[i]
        if blocks > 1:  # the others average what they read, and disturb the answers
            gates[:, 1:] = 0.1 * torch.randn(4, blocks - 1, 3, 10)
            values[1:] = torch.randn(blocks - 1, 3, 10)
            out[7:, 1:] = 0.1 * torch.randn(3, blocks - 1, 3)
        gates = gates if input_logit else gates[:3] - gates[3:]
        layer.mixer.gate_proj.weight.copy_(gates.flatten(0, 2))
    return model


def saved(model, folder):
    model.save_pretrained(folder)
    write_symbols(model.config.vocab_size, folder)
    return folder


def accuracy(model, length, rows=16):
    """The share of right answers at each position of random rows, (length,)."""
    inputs, labels = SyntheticTask("s3", length + 1, {"start": 1}).rows(0, "eval", np.arange(rows))
    with torch.no_grad():
        said = model(torch.from_numpy(inputs)).logits.argmax(dim=-1)
    return (said == torch.from_numpy(labels))[:, 1:].float().mean(dim=0)


@pytest.mark.parametrize(("gate", "lead"), [("softmax", 200.0), ("relu", 40.0)])
def test_exact_gates_are_right_at_every_length(gate, lead, tmp_path, capsys):
    model = model_of_s3(lead, gate=gate)
    if gate == "relu":  # zeros are below: a negative logit
        with torch.no_grad():
            model.model.layers[0].mixer.gate_proj.bias.fill_(-1.0)
    folder = saved(model, tmp_path / "exact")
    facts = certify(folder, "s3", device="cpu")
    assert facts["length"] is None
    assert facts["blocks"] == [
        {"block": 0, "off": 0.0, "leak": 0.0, "exact": 1.0, "follows": True, "values": 6}
    ]
    assert "certified at every length" in capsys.readouterr().out
    inputs, _ = SyntheticTask("s3", 3001, {"start": 1}).rows(0, "eval", [0])
    x = model.model.layers[0].mixer_norm(model.model.embed_tokens(torch.from_numpy(inputs)))
    _, state = model.model.layers[0].mixer(x)
    assert sorted(state[0, 0].tolist()) == sorted(model.model.layers[0].mixer(x[:, :1])[1][0, 0].tolist())
    leads = model(torch.from_numpy(inputs)).logits[0, 1:].topk(2, dim=-1).values
    assert (leads[:, 0] - leads[:, 1]).min() >= facts["margin"] > 0.9 * (leads[:, 0] - leads[:, 1]).min()


def test_soft_gates_are_right_up_to_a_length(tmp_path):
    """That length grows with the logits, and no row fails before it."""
    found = []
    for lead in (4.0, 7.0, 12.0, 16.0):
        model = model_of_s3(lead, pull=1.0)
        facts = certify(saved(model, tmp_path / f"soft-{lead}"), "s3", device="cpu")
        found.append(facts["length"])
        hits = accuracy(model, 200)
        assert (hits[: facts["length"]] == 1).all()
        assert (hits[8 * facts["length"] :] < 1).any() == (lead == 4)
    assert 1 < found[0] < found[1] < found[2] < found[3]
    assert found[3] > 100_000


def test_what_forgets_is_not_certified_at_every_length(tmp_path):
    """A block that leaks slowly tracks for long, and still forgets: these gates are not quite 0."""
    facts = certify(saved(model_of_s3(16.0), tmp_path / "soft"), "s3", device="cpu")
    assert 0 < facts["blocks"][0]["leak"] < 1e-6
    assert facts["blocks"][0]["exact"] == 0
    assert facts["length"] is not None


@pytest.mark.parametrize("broken", ["gates", "head", "identity", "untrained"])
def test_broken_models_are_wrong_and_say_where(broken, tmp_path, capsys):
    model = model_of_s3()
    with torch.no_grad():
        if broken == "gates":  # symbols 1 and 2 change places
            weight = model.model.layers[0].mixer.gate_proj.weight
            weight[:, [1, 2]] = weight[:, [2, 1]]
        elif broken == "head":
            model.lm_head.weight[[3, 4]] = model.lm_head.weight[[4, 3]]
        elif broken == "identity":  # only what should be answered with 0 is wrong
            model.lm_head.weight[0].neg_()
        else:
            model = LRNNForCausalLM(model.config)
    folder = saved(model, tmp_path / "broken")
    with pytest.raises(SystemExit) as left:
        main(["eval", str(folder), "--certify", "s3", "--device", "cpu", "--output", str(tmp_path / "out")])
    assert not left.value.code
    assert "s3: wrong. After" in capsys.readouterr().out
    facts = certify(folder, "s3", device="cpu")
    assert facts["length"] == 0
    row = facts["wrong"]
    ids = torch.tensor([[START, *row["symbols"]]])
    assert int(model(ids).logits[0, -1].argmax()) == row["said"] != row["right"]
    if broken == "gates":
        assert row == {"symbols": [1], "said": 2, "right": 1}
        assert not facts["blocks"][0]["follows"]
    if broken == "identity":
        assert row["right"] == 0
    if broken == "head":
        assert row["symbols"] in ([3], [4])
        assert facts["blocks"][0]["follows"]


def test_hardening_keeps_the_blocks_that_follow(tmp_path, capsys):
    folder = saved(model_of_s3(6.0, blocks=3), tmp_path / "soft")
    facts = certify(folder, "s3", device="cpu", hardened=tmp_path / "hard")
    assert [block["follows"] for block in facts["blocks"]] == [True, False, False]
    assert facts["length"] is not None
    assert "model.mixer.num_blocks=1" in capsys.readouterr().out
    assert certify(tmp_path / "hard", "s3", device="cpu")["length"] is None
    with pytest.raises(ValueError, match="not an empty folder"):
        certify(folder, "s3", device="cpu", hardened=tmp_path / "hard")


def test_without_the_input_logit_the_certificate_is_the_same(tmp_path):
    """Only differences of logits matter to a softmax; hardening keeps the input gate's logit at 0."""
    full, fewer = model_of_s3(6.0, blocks=3), model_of_s3(6.0, blocks=3, input_logit=False)
    ids = torch.randint(7, (2, 40))
    torch.testing.assert_close(fewer(ids).logits, full(ids).logits, rtol=0, atol=1e-5)
    want = certify(saved(full, tmp_path / "full"), "s3", device="cpu")
    facts = certify(saved(fewer, tmp_path / "soft"), "s3", device="cpu", hardened=tmp_path / "hard")
    assert [block["follows"] for block in facts["blocks"]] == [True, False, False]
    assert 0.5 < facts["length"] / want["length"] < 2
    assert facts["margin"] == pytest.approx(want["margin"], rel=0.1)
    assert certify(tmp_path / "hard", "s3", device="cpu")["length"] is None


@pytest.mark.parametrize("gate", [gate for gate in GATES if gate != "none"])
def test_gates_stay_within_their_error(gate):
    generator = torch.Generator().manual_seed(0)
    z = 4 * torch.randn(500, 4, generator=generator, dtype=torch.float64)
    error = 0.01 * torch.rand(500, 4, generator=generator, dtype=torch.float64)
    exact, bound = _gate_error(z, error, normalise(z, gate), gate)
    assert not exact.any()
    for sign in (-1, 1, 0):
        noise = sign or (2 * torch.rand(500, 4, generator=generator, dtype=torch.float64) - 1)
        moved = (normalise(z + noise * error, gate) - normalise(z, gate)).abs().sum(dim=-1)
        assert (moved <= bound).all()


@pytest.mark.parametrize(("gate", "low"), [("softmax", -120.0), ("relu", -0.1), ("silu", -110.0)])
def test_exact_means_exact_in_fp32(gate, low):
    z = torch.full((3, 4), low, dtype=torch.float64)
    z[0, 1], z[1, 0], z[2, 2] = 0.0 if gate == "softmax" else 33.0, 40.0, 80.0
    exact, bound = _gate_error(z, torch.full_like(z, 1e-3), normalise(z, gate), gate)
    assert exact.all()
    assert not bound.any()
    assert ((p := normalise(z.float(), gate)) == p.round()).all()
    exact, _ = _gate_error(z, torch.full_like(z, 20.0), normalise(z, gate), gate)
    assert not exact[0]


@pytest.mark.parametrize("start", [0, 1])
@pytest.mark.parametrize(("task", "gate"), [
    ("parity", "softmax"), ("aa_star", "silu"), ("dyck1_depth", "tanh"), ("even_pairs", "identity"),
    ("cycle_navigation", "relu"), ("modular_arithmetic", "sigmoid"), ("s3", "softmax"),
])  # fmt: skip
@torch.no_grad()
def test_states_are_in_their_boxes(task, gate, start):
    """Of random models, after random rows; and the lead of an answer is at least what is said."""
    torch.manual_seed(0)
    made = SyntheticTask(task, 13, {"start": start})
    automaton = made.kind.automaton(made.options)
    mixer = {"type": "bd_lru", "block_size": 3, "num_blocks": 2, "gate": gate, "gate_std": 2.0}
    model = LRNNForCausalLM(LRNNConfig(
        vocab_size=made.vocab_size, hidden_size=8, num_hidden_layers=1, intermediate_size=8, mixer=mixer,
        initializer_range=0.3,
    )).eval()  # fmt: skip
    inputs, labels = made.rows(0, "eval", np.arange(50))
    ids = torch.from_numpy(inputs)
    layer = model.model.layers[0]
    seen = []
    layer.mixer.out_proj.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    logits = model(ids).logits.double()
    h = seen[0].unflatten(-1, (2, 3)).double()  # (50, 13, N, M)
    exact = model.double()
    first = automaton.ids if start else None
    maps = affine_maps(exact, made.vocab_size if start else len(automaton.table))
    begun = boxes = _first_states(maps, automaton, first)
    state = np.full(50, automaton.start)
    for t in range(start, 13):
        ends = maps(boxes)
        low, high = (end[inputs[:, t], state] for end in ends)
        assert (h[:, t] >= low).all()
        assert (h[:, t] <= high).all()
        asked = labels[:, t] >= 0
        if asked.any():
            label = torch.from_numpy(labels[asked, t])
            box = Ball(((low + high) / 2)[asked], ((high - low) / 2)[asked])
            lead = _lead(exact, ids[asked, t], box, label)
            right = logits[asked, t].gather(1, label[:, None])
            others = logits[asked, t].scatter(1, label[:, None], -torch.inf).amax(dim=1)
            assert (right[:, 0] - others >= lead).all()
        boxes = _after(maps, automaton, boxes, begun)
        state = automaton.table[inputs[:, t], state]
        assert boxes.reached[state].all()
        assert (h[:, t] >= boxes.low[state]).all()
        assert (h[:, t] <= boxes.high[state]).all()


def test_rounding_grows_with_the_box():
    """A box around 0 holds what fp32 makes of its corners, whose sums are rounded too."""
    corner, weight = (
        torch.full((1, 500), 0.1),
        torch.rand(64, 500, generator=torch.Generator().manual_seed(0)),
    )
    r = _linear(Ball(torch.zeros(1, 500, dtype=torch.float64), corner.double()), weight.double()).r
    assert ((corner @ weight.T).double() <= r).all()


@torch.no_grad()
def test_what_overflows_in_fp32_is_not_certified():
    """Its squares are beyond fp32, where a norm makes 0 of it; in fp64, which bounds are computed in, not."""
    model = model_of_s3().double()
    automaton = SyntheticTask("s3", 8, {"start": 1}).kind.automaton({"start": 1})
    assert certified_length(model, affine_maps(model, 7), automaton, START)["length"] is None
    model.model.embed_tokens.weight *= 1e20
    model.model.layers[0].mixer.out_proj.weight *= 1e20
    assert certified_length(model, affine_maps(model, 7), automaton, START)["length"] == 0


@torch.no_grad()
def test_states_without_a_question_are_bounded_too():
    made = SyntheticTask("modular_arithmetic", 8)
    automaton = made.kind.automaton(made.options)
    config = LRNNConfig(vocab_size=8, hidden_size=8, num_hidden_layers=1, intermediate_size=8)
    model = LRNNForCausalLM(config).double()
    maps = affine_maps(model, 8)
    boxes = _after(maps, automaton, *2 * [_first_states(maps, automaton, None)])
    boxes = boxes._replace(reached=boxes.reached & (torch.from_numpy(automaton.labels) >= 0))  # after a digit
    assert _margin(model, maps, automaton, boxes) == float("inf")  # nothing is asked after a sign
    far = boxes._replace(high=boxes.high + 1e3)
    assert _margin(model, maps, automaton, far) == -float("inf")


@pytest.mark.parametrize("lead", [1.0, 4.0, 200.0])
@torch.no_grad()
def test_widened_boxes_hold_the_later_ones(lead):
    model = model_of_s3(lead, blocks=3, pull=1.0).double()
    automaton = SyntheticTask("s3", 8, {"start": 1}).kind.automaton({"start": 1})
    maps = affine_maps(model, 7)
    begun = boxes = _first_states(maps, automaton, START)
    found = []
    for _ in range(60):
        boxes = _after(maps, automaton, boxes, begun)
        found.append(boxes)
    for early in (1, 5, 20):
        growth = _growth(found[early], found[early + 1])
        assert bool(growth[0] == 0) == (lead == 200)
        for later in range(early + 1, 60):
            for more in (later - early, torch.inf):
                wide = _widened(found[early], growth, maps.shrinks, more)
                assert (wide.low <= found[later].low).all()
                assert (wide.high >= found[later].high).all()


@torch.no_grad()
def test_a_division_that_is_not_exact_bounds_the_length():
    """As in the Triton scan: about a millionth of a state may be lost at each symbol."""
    model = model_of_s3().double()
    automaton = SyntheticTask("s3", 8, {"start": 1}).kind.automaton({"start": 1})
    found = certified_length(model, affine_maps(model, 7, exact_division=False), automaton, START)
    assert 10_000 < found["length"] < 10**9


@torch.no_grad()
def test_the_maps_are_those_of_the_layer():
    model = model_of_s3(3.0, blocks=3).double()
    maps = affine_maps(model, 7)
    layer = model.model.layers[0]
    h = torch.randn(1, 3, 3, dtype=torch.float64)
    for symbol in range(7):
        x = layer.mixer_norm(model.model.embed_tokens(torch.tensor([[symbol]])))
        _, after = layer.mixer(x, h)
        want = (maps.A[symbol] @ h[0].unsqueeze(-1)).squeeze(-1) + maps.b[symbol]
        torch.testing.assert_close(after[0].double(), want, rtol=0, atol=1e-6)


MIXERS = {
    "h_lru": ({"type": "h_lru", "order": 2}, 1, "a h_lru layer has no certificate"),
    "lstm": ({"type": "lstm"}, 1, "a lstm layer has no certificate"),
    "layers": ({"type": "bd_lru"}, 2, "2 layers have no certificate"),
    "none": ({"type": "bd_lru", "gate": "none"}, 1, "gate none has no certificate"),
    "conv": ({"type": "bd_lru", "short_conv": 2}, 1, "it takes a plain bd_lru"),
    "learnt": ({"type": "bd_lru"}, 1, "a learnt initial state has no certificate"),
}


@pytest.mark.parametrize("name", MIXERS)
def test_models_without_a_certificate(name, tmp_path, capsys):
    mixer, layers, message = MIXERS[name]
    config = LRNNConfig(
        vocab_size=7, hidden_size=8, num_hidden_layers=layers, intermediate_size=8, mixer=mixer,
        learn_initial_state=name == "learnt",
    )  # fmt: skip
    folder = saved(LRNNForCausalLM(config), tmp_path / "model")
    with pytest.raises(SystemExit) as left:
        main(["eval", str(folder), "--certify", "s3", "--device", "cpu"])
    assert left.value.code == 2
    assert message in capsys.readouterr().err


def test_other_mistakes(checkpoint, tmp_path):
    folder = saved(model_of_s3(), tmp_path / "s3")
    for path, task, message in (
        (checkpoint, "s3", "a llama has no certificate"),
        (folder, "mqar", "no finite number of states"),
        (folder, "s9", "unknown synthetic task"),
        (folder, "s5", "120 symbols, and the model knows 7"),
    ):
        with pytest.raises(ValueError, match=message):
            certify(path, task, device="cpu")
    folder = saved(model_of_s3(gate="silu"), tmp_path / "silu")
    with pytest.raises(ValueError, match="sharpens softmax gates"):
        certify(folder, "s3", device="cpu", hardened=tmp_path / "hard")
