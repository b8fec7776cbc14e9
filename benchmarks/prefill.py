"""Peak memory of `lrnn generate --prompt-file` for a short and a long prompt, on a CPU with a tiny model.

    python -m benchmarks.prefill [SHORT LONG]     tokens, 65536 and 1048576 by default

Prints both peaks and their ratio; exits with 1 if the ratio is above 1.2.
"""

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]
LIMIT = 1.2


def make_checkpoint(folder: Path) -> None:
    """A model of two BD-LRU layers and a tokenizer with one token a word."""
    from transformers import PreTrainedTokenizerFast

    from lrnn_lm import LRNNConfig, LRNNForCausalLM
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = ["<s>", "</s>", *(f"w{i}" for i in range(254))]
    core = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="w0"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>", eos_token="</s>")
    tokenizer.save_pretrained(folder)
    config = LRNNConfig(
        vocab_size=256, hidden_size=32, num_hidden_layers=2, intermediate_size=64, eos_token_id=None
    )
    LRNNForCausalLM(config).save_pretrained(folder)


def peak_of_a_prompt(checkpoint: Path, tokens: int) -> tuple[float, float]:
    """Peak memory in MB and seconds of the command, in a process of its own."""
    prompt = checkpoint / "prompt.txt"
    with prompt.open("w") as file:
        for i in range(tokens):
            file.write(f"w{i * 7919 % 254} ")
    command = [
        sys.executable, "-m", "lrnn_lm.cli", "generate", str(checkpoint), "--prompt-file", str(prompt),
        "--max-new-tokens", "4", "--greedy", "--device", "cpu",
    ]  # fmt: skip
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path]),
    }
    start = time.perf_counter()
    process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    assert status == 0, "lrnn generate failed"
    unit = 1 if sys.platform == "darwin" else 1024  # bytes there, kilobytes elsewhere
    return usage.ru_maxrss * unit / 1e6, time.perf_counter() - start


def main() -> None:
    lengths = [int(length) for length in sys.argv[1:]] or [65_536, 1_048_576]
    with tempfile.TemporaryDirectory() as folder:
        make_checkpoint(Path(folder))
        peaks = []
        for length in lengths:
            peak, seconds = peak_of_a_prompt(Path(folder), length)
            peaks.append(peak)
            print(f"{length:>9,} tokens: peak {peak:.0f} MB, {seconds:.1f} s", flush=True)
    print(f"ratio {peaks[-1] / peaks[0]:.3f}, limit {LIMIT}")
    sys.exit(peaks[-1] > LIMIT * peaks[0])


if __name__ == "__main__":
    main()
