"""Small checkpoints with a tokenizer, and which neighbours are installed."""

import pytest
from small_models import byte_tokenizer

TEXT = (
    "The gardener walked to the river every morning. She carried two buckets and a long rope. When the sun "
    "rose the water was still cold.\n\nA compiler reads a program and writes: naïve façade, 数学, 🙂.\n"
)


@pytest.fixture(scope="package")
def tokenizer():
    """A byte-level BPE with BOS and EOS that adds neither by itself."""
    return byte_tokenizer([TEXT], 320, pad_token="</s>", padding_side="left")


@pytest.fixture(scope="package")
def make_checkpoint(tmp_path_factory, tokenizer):
    """A function from a name in small_models to a checkpoint folder of that model and the tokenizer."""
    from small_models import small_model

    folders = {}

    def make(name: str = "bd_lru"):
        if name not in folders:
            folders[name] = tmp_path_factory.mktemp("checkpoint") / name
            model = small_model(
                name, vocab_size=len(tokenizer), bos_token_id=0, eos_token_id=1, pad_token_id=1
            )
            model.save_pretrained(folders[name])
            tokenizer.save_pretrained(folders[name])
        return folders[name]

    return make
