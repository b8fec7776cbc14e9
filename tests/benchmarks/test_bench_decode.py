"""`lrnn bench decode` on a CPU: rows, what they count, what cannot be measured."""

import dataclasses

import pytest
import torch

from benchmarks import compare, decode, results
from benchmarks.contenders import CONTENDERS, build_config, pick_size
from benchmarks.decode import DecodeSettings

TINY = {"width": 32, "layers": 2, "vocab": 61, "tokens": 8}


def test_rows_and_files(tmp_path, capsys):
    settings = DecodeSettings(
        "bd-m4,transformer", batches="1,3", contexts="16,1M", modes="graph,generate", emulate=True, **TINY
    )
    rows = decode.run(settings, "cpu", tmp_path / "rows.jsonl")
    about, stored = results.read_results(tmp_path / "rows.jsonl")
    assert stored == rows
    assert DecodeSettings(**about["settings"]) == settings
    assert len(rows) == 16
    for row in rows:
        if row["contender"] == "transformer" and row["context"] == 1_000_000:
            assert "up to 65,536 tokens" in row["reason"]
            continue
        if row["mode"] == "generate" and row["context"] == 1_000_000:
            assert "generate reads its prompt" in row["reason"]
            continue
        assert row["token_seconds"] > 0
        assert row["tokens_per_second"] == pytest.approx(row["B"] / row["token_seconds"])
        assert row["prefill_tokens"] == (16 if row["context"] == 16 else decode.PREFILL)
        assert row.get("emulated", False) == (row["context"] > 16)
    assert (tmp_path / "rows.md").read_text().count("context emulated") == 2
    assert (tmp_path / "rows.png").stat().st_size > 1000
    assert len((tmp_path / "rows.md").read_text().splitlines()) == 2 + len(rows)
    assert "ms a token" in capsys.readouterr().out


def test_a_context_is_read_unless_it_is_emulated(monkeypatch):
    """Every token of it goes through the model before one is timed, and nothing says `emulated`."""
    seen = []
    step = decode.decode_step

    def look(model, cache, *rest, **options):
        seen.append([state.clone() for layer in cache.layers for state in layer.recurrent_states.values()])
        return step(model, cache, *rest, **options)

    monkeypatch.setattr(decode, "decode_step", look)
    counted = []
    forward = decode.LRNNForCausalLM.forward

    def count_tokens(self, input_ids, **more):
        counted.append(input_ids.shape[1])
        return forward(self, input_ids, **more)

    monkeypatch.setattr(decode.LRNNForCausalLM, "forward", count_tokens)
    settings = DecodeSettings("bd-m4", batches="1", contexts="5000", modes="graph", **TINY)
    (row,) = decode.run(settings, "cpu")
    assert (row["prefill_tokens"], "emulated" in row) == (5000, False)
    assert sum(counted) >= decode.PREFILL + 5000
    (told,) = decode.run(dataclasses.replace(settings, emulate=True), "cpu")
    assert (told["prefill_tokens"], told["emulated"]) == (decode.PREFILL, True)
    # The state after 5,000 tokens is another than after 1,024 of the same text.
    assert not torch.equal(seen[0][0], seen[1][0])


def test_two_ways_to_come_to_a_context_are_not_compared(tmp_path):
    rows = [{"contender": "bd-m4", "B": 1, "mode": "graph", "context": 4096, "token_seconds": 1.0}]
    assert compare.judge(rows, rows, 0.05) == []
    assert "it is not there" in compare.judge(rows, [{**rows[0], "emulated": True}], 0.05)[0]


def test_the_papers_formulation_has_no_step_of_its_own(tmp_path):
    """Its rows would be our own step under another's name."""
    (row,) = decode.run(DecodeSettings("paper-m4", batches="1", contexts="16", modes="graph", **TINY), "cpu")
    assert "trains only" in row["reason"]


def test_generate_is_timed_from_token_to_token():
    """As many times as were asked for, without the first tokens, which find and warm up the step."""
    model = decode.LRNNForCausalLM(build_config(CONTENDERS["bd-m4"], pick_size("212M", 32, 2), 61, 16)).eval()
    ids = torch.randint(61, (3, 7))
    taken = decode._generate_times(model, ids, 5)
    assert len(taken) == 5
    assert min(taken) > 0


def test_least_bytes_by_hand():
    """Every weight but the embedding's; a state of 2 layers x 16 blocks x 4 in fp32, read and written."""
    config = build_config(CONTENDERS["bd-m4"], pick_size("212M", 32, 2), 61, 16)
    parameters = sum(p.numel() for p in decode.LRNNForCausalLM(config).parameters()) - 61 * 32
    states = 2 * config.mixer["num_blocks"] * 4
    got = decode.least_bytes(config, 3, 1 << 20, torch.bfloat16)
    assert got == 2 * parameters + 3 * 2 * 4 * states
    config = build_config(CONTENDERS["transformer"], pick_size("212M", 32, 2), 61, 16)
    longer = [decode.least_bytes(config, 3, n, torch.bfloat16) for n in (10, 11)]
    assert longer[1] - longer[0] == 3 * 2 * 2 * 32 * config.num_hidden_layers


@torch.no_grad()
def test_a_token_is_the_models_next_token():
    """Both ways to decode give what `generate` gives."""
    for name in ("bd-m4", "transformer"):
        torch.manual_seed(0)
        config = build_config(CONTENDERS[name], pick_size("212M", 32, 2), 61, 16)
        config.initializer_range = 0.5
        model = decode.LRNNForCausalLM(config).eval()
        ids = torch.randint(61, (2, 7))
        want = model.generate(ids, max_new_tokens=5, do_sample=False, eos_token_id=None, pad_token_id=0)[
            :, 8:
        ]
        if name == "bd-m4":
            token = decode._recurrent_token(model, decode._prefill(model, [ids], None), 7, "graph")
        else:
            token = decode._attention_token(model, [ids], 7 + 4, "graph")
        assert torch.equal(torch.cat([token().clone() for _ in range(4)], dim=1), want), name


def test_every_block_is_compiled_however_many_there_are():
    """Beside a cache a block's graph depends on its number; torch compiles a function eight times only."""
    torch.compiler.reset()
    torch._dynamo.utils.counters.clear()
    attention = {"type": "attention", "num_heads": 2}
    config = decode.LRNNConfig(
        vocab_size=11, hidden_size=8, num_hidden_layers=10, intermediate_size=8, mixer=attention
    )
    model = decode.LRNNForCausalLM(config).eval()
    with torch._dynamo.config.patch(recompile_limit=8), torch.no_grad():
        decode.compile_blocks(model, backend="eager")
        cache = decode.StaticCache(config=config, max_cache_len=8)
        model(input_ids=torch.ones(1, 1, dtype=torch.long), past_key_values=cache, use_cache=True)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 10
