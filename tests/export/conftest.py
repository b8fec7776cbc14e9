"""Tiny models saved as checkpoints, and a Python of their readers: one with neither lrnn_lm nor Triton."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from forks import LIBRARIES
from small_models import VOCAB, small_model

# What a reader may not have is blocked by name, wherever it is installed.
PRELUDE = """
import json, sys
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {absent!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)
sys.meta_path.insert(0, Absent())
from transformers import dynamic_module_utils
dynamic_module_utils.HF_MODULES_CACHE = {cache!r}
arguments, result = json.loads(sys.argv[1]), {{}}
"""
EPILOGUE = "\nprint('RESULT' + json.dumps(result))\n"


@pytest.fixture(scope="session")
def tokenizer() -> Any:
    """A tokenizer of whole words: a padding token, the two marks of a text, then w3, w4 and so on."""
    from transformers import PreTrainedTokenizerFast

    from tokenizers import Tokenizer, models, pre_tokenizers

    words = ["<pad>", "<s>", "</s>", *(f"w{i}" for i in range(3, VOCAB))]
    core = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="w3"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=core, bos_token="<s>", eos_token="</s>", pad_token="<pad>"
    )


@pytest.fixture(scope="session")
def make_checkpoint(tmp_path_factory, tokenizer) -> Callable[..., Path]:
    """A function from a name in small_models.NAMES, and changes to its configuration, to a checkpoint folder
    in a run of that name."""

    def make(name: str, **changes: Any) -> Path:
        folder = tmp_path_factory.mktemp("runs") / name / "checkpoints" / "step-00000007"
        small_model(name, **changes).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        (folder / "trainer").mkdir()
        (folder / "trainer" / "state.json").write_text("{}")
        return folder

    return make


@pytest.fixture(scope="session")
def read_elsewhere(tmp_path_factory) -> Callable[..., dict[str, Any]]:
    """A function (script, arguments, absent) that runs a script in a Python without this package, in another
    folder.

    The script finds `arguments` and fills the dictionary `result`, which is returned; both pass as JSON.
    `absent` are the packages that it cannot import.
    """

    def read(script: str, arguments: Any, absent: tuple[str, ...] = ("lrnn_lm", "triton")) -> dict[str, Any]:
        cwd = tmp_path_factory.mktemp("elsewhere")
        code = PRELUDE.format(absent=absent, cache=str(cwd / "hf")) + script + EPILOGUE
        done = LIBRARIES.run(code, json.dumps(arguments), cwd=cwd)
        assert done.returncode == 0, done.stderr[-3000:]
        return json.loads(done.stdout.split("RESULT")[-1])

    return read
