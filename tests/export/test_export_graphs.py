"""`lrnn export --format onnx | executorch | torch-export`: graphs with the model's numbers."""

import json
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from small_models import MIXER_ROWS, small_model

from lrnn_lm import LRNNForCausalLM, cli
from lrnn_lm.kernels import written_out
from lrnn_lm.mixers import build_mixer
from lrnn_lm.runs.export import export_graphs

LAYERS = {"num_hidden_layers": 2}  # graphs take as long to make as they have layers
OTHERS = [name for name in MIXER_ROWS if name not in ("mamba2", "mlstm") and "attention" not in name]
RUNNER = Path(__file__).parents[2] / "examples" / "onnx_generate.py"


@pytest.fixture(scope="module")
def exported(make_checkpoint, tmp_path_factory):
    """Of a layer with a learnt initial state; graphs without are below, in another format."""
    checkpoint = make_checkpoint("bd_lru")
    model = small_model("bd_lru", num_hidden_layers=1, learn_initial_state=True)
    torch.nn.init.normal_(model.model.layers[0].initial_state)
    model.save_pretrained(checkpoint)
    return checkpoint, export_graphs(checkpoint, tmp_path_factory.mktemp("onnx") / "out", prefill=3)


@torch.no_grad()
def test_prompt_and_tokens_have_the_models_logits(exported):
    """Of several sequences: two passes of prefill.onnx, then token by token, from states of zeros."""
    checkpoint, folder = exported
    states = [
        np.zeros((3, *shape), np.float32)
        for shape in json.loads((folder / "onnx.json").read_text())["states"]
    ]
    ids, logits = torch.randint(53, (3, 8), generator=torch.Generator().manual_seed(0)), []
    for name, start, stop in (("prefill", 0, 3), ("prefill", 3, 6), ("token", 6, 7), ("token", 7, 8)):
        graph = onnxruntime.InferenceSession(folder / f"{name}.onnx")
        names = [given.name for given in graph.get_inputs()]
        given = [ids[:, start:stop].numpy(), *states]
        part, *states = graph.run(None, dict(zip(names, given, strict=True)))
        logits.append(torch.from_numpy(part))
    want = LRNNForCausalLM.from_pretrained(checkpoint).eval()(ids).logits
    torch.testing.assert_close(torch.cat(logits, dim=1), want, rtol=1e-4, atol=1e-4)
    inside = onnx.load(folder / "token.onnx", load_external_data=False).graph.initializer
    assert max(len(weight.raw_data) for weight in inside) < 1024  # the weights are in weights.bin, once


@torch.no_grad()
@pytest.mark.parametrize(("format", "rows"), [("torch-export", 3), ("executorch", 1)])
def test_other_graphs_have_the_models_logits(format, rows, make_checkpoint, tmp_path):
    """Of prefill and a token after it."""
    checkpoint, folder = make_checkpoint("bd_lru", **LAYERS), tmp_path / "out"
    if format == "executorch":
        runtime = pytest.importorskip("executorch.runtime", reason="pip install 'lrnn-lm[executorch]'")
    export_graphs(checkpoint, folder, format, prefill=3)
    if format == "executorch":
        program = runtime.Runtime.get().load_program(folder / "model.pte")
        run = lambda name, given: program.load_method(name).execute(given)  # noqa: E731
    else:
        run = lambda name, given: torch.export.load(folder / f"{name}.pt2").module()(*given)  # noqa: E731
    shapes = json.loads((folder / f"{format}.json").read_text())["states"]
    ids = torch.randint(53, (rows, 4), generator=torch.Generator().manual_seed(0))
    before, *states = run("prefill", [ids[:, :3], *(torch.zeros(rows, *shape) for shape in shapes)])
    after = run("token", [ids[:, 3:], *states])[0]
    want = LRNNForCausalLM.from_pretrained(checkpoint).eval()(ids).logits
    torch.testing.assert_close(torch.cat([before, after], dim=1), want, rtol=1e-4, atol=1e-4)


def test_the_example_writes_the_models_text_without_pytorch(exported):
    checkpoint, folder = exported
    text = "w11 w12 w13 w14"
    code = "import runpy, sys; sys.modules['torch'] = None; del sys.argv[0]; runpy.run_path(sys.argv[0])"
    command = [sys.executable, "-c", code, RUNNER, folder, text, "5"]
    told = subprocess.run(command, capture_output=True, text=True)
    assert told.returncode == 0, told.stderr
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    model = LRNNForCausalLM.from_pretrained(checkpoint).eval()
    start = [tokenizer.bos_token_id, *tokenizer.encode(text, add_special_tokens=False)]
    want = model.generate(torch.tensor([start]), max_new_tokens=5, do_sample=False)[0]
    assert told.stdout.strip() == tokenizer.decode(want, skip_special_tokens=True).strip()


@pytest.mark.parametrize(
    ("format", "needs"),
    [("transformers", "torch and transformers"), ("onnx", "onnxruntime"), ("torch-export", "torch"),
     ("executorch", "executorch")],
)  # fmt: skip
def test_it_says_what_loads_the_folder(format, needs, monkeypatch, capsys, tmp_path):
    """A package to install, not the name of a format."""
    monkeypatch.setattr("lrnn_lm.api.export_checkpoint", lambda *given: None)
    with pytest.raises(SystemExit) as end:
        cli.main(["export", "checkpoint", str(tmp_path / "out"), "--format", format])
    assert not end.value.code
    assert f"it loads with {needs} alone" in capsys.readouterr().out


def test_what_has_no_graph_is_refused(make_checkpoint, tmp_path, capsys):
    folder = make_checkpoint("hybrid")
    for words, message in (
        (["--format", "onnx"], "layer 1 (attention) cannot be exported as a graph: its keys and values grow"),
        (["--format", "gguf"], "format 'gguf': use transformers, onnx, executorch or torch-export"),
        (["--format", "onnx", "--dtype", "bf16"], "writes fp32 and no card"),
    ):
        with pytest.raises(SystemExit) as stop:
            cli.main(["export", str(folder), str(tmp_path / "out"), *words])
        assert stop.value.code == 2
        assert message in capsys.readouterr().err
        assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "name", ["mamba2", *(pytest.param(name, marks=pytest.mark.slow) for name in ("mlstm", *OTHERS))]
)
def test_a_layer_alone_for_onnx(name, tmp_path):
    """In a model of one's own, for rows of one shape: onnxscript rewrites products of matrices,
    and made one that does not exist of those of blocks of one."""
    layer, x = build_mixer(MIXER_ROWS[name], 16).eval(), torch.randn(2, 3, 16)
    layer.reset_parameters(0.3)
    with warnings.catch_warnings(), torch.no_grad(), written_out():
        warnings.simplefilter("ignore")
        torch.onnx.export(layer, (x,), tmp_path / "layer.onnx", dynamo=True, verbose=False)
        want = layer(x)[0].numpy()
    session = onnxruntime.InferenceSession(tmp_path / "layer.onnx")
    got = session.run(None, {session.get_inputs()[0].name: x.numpy()})[0]
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-5)
