"""One small model a mixer, and two hybrids: a new mixer is a row in MIXER_ROWS."""

import io
import pickle
from collections.abc import Sequence
from functools import cache
from itertools import cycle, product

import pytest
import torch
from torch import Tensor, nn

from lrnn_lm import LRNNConfig, LRNNForCausalLM

VOCAB = 53
MIXER_ROWS = {
    "bd_lru": {"type": "bd_lru", "num_blocks": 5, "block_size": 3},
    "bd_lru-tanh": {"type": "bd_lru", "num_blocks": 4, "block_size": 2, "gate": "tanh"},
    "bd_lru-all": {
        "type": "bd_lru",
        "num_blocks": 6,
        "block_size": 2,
        "half_life": [2, 16],
        "short_conv": 3,
        "output_gate": True,
        "norm_groups": 2,
        "input_logit": False,
    },
    "bd_matrix": {"type": "bd_matrix", "num_heads": 2, "head_dim": 6, "value_dim": 8, "block_size": 3},
    "bd_matrix-conv": {
        "type": "bd_matrix",
        "num_heads": 2,
        "head_dim": 4,
        "block_size": 2,
        "gate": "silu",
        "short_conv": 3,
        "output_gate": False,
        "head_norm": False,
        "keys": True,
    },
    "bd_matrix-erase": {
        "type": "bd_matrix",
        "num_heads": 2,
        "head_dim": 4,
        "block_size": 2,
        "head_conv": 3,
        "keys": True,
        "erase": True,
        "input_logit": False,
    },
    "h_lru": {"type": "h_lru", "num_blocks": 7, "order": 4},
    "h_lru-1": {"type": "h_lru", "num_blocks": 7, "order": 1},
    "attention": {"type": "attention", "num_heads": 2},
    "attention-qk-norm": {"type": "attention", "num_heads": 2, "qk_norm": True},
    "attention-grouped": {"type": "attention", "num_heads": 4, "num_kv_heads": 2, "use_rope": False},
    "attention-window": {"type": "attention", "num_heads": 2, "window": 4},
    "lstm": {"type": "lstm", "width": 9},
    "mamba2": {"type": "mamba2", "expand": 2, "head_dim": 8, "state_size": 3},
    "mlstm": {"type": "mlstm", "num_heads": 2, "head_dim": 4},
    "min_gru": {"type": "min_gru", "width": 9},
    "rg_lru": {"type": "rg_lru", "width": 9},
    "complex_lru": {"type": "complex_lru", "num_blocks": 5},
    "slice": {"type": "slice", "num_blocks": 5, "block_size": 3, "scaled": True},
    "fixed_point": {"type": "fixed_point", "width": 9, "iterations": 3},
    "pd_ssm": {"type": "pd_ssm", "num_blocks": 3, "states": 2, "dictionary": 3},
    "bd_gru": {"type": "bd_gru", "num_blocks": 5, "block_size": 3},
    "bd_slstm": {"type": "bd_slstm", "num_blocks": 5, "block_size": 3},
    "m2rnn": {"type": "m2rnn", "num_heads": 2, "head_dim": 5, "value_dim": 3},
}
# What is added to a mixer's weights, where it is not 0.3. A head of bd_matrix, mlstm or m2rnn multiplies
# projections of its input and divides by the size of the product: with 0.3, an ulp becomes 1e-4 two layers
# later. In bf16 pd_ssm now and then selects another entry.
SPREAD = dict.fromkeys(("pd_ssm", "mlstm", "m2rnn", "bd_matrix", "bd_matrix-conv", "bd_matrix-erase"), 0.1)
HYBRIDS = {
    "hybrid": ["bd_lru", "attention", "h_lru"],
    "hybrid-attention-first": ["attention-grouped", "lstm", "attention-window"],
}
NAMES = [*MIXER_ROWS, *HYBRIDS]
RECURRENT = [name for name in MIXER_ROWS if not name.startswith("attention")]
# One of each way to take a mask: our scans, attention, an LSTM beside windows.
OF_EACH_KIND = ["bd_lru", "attention", "hybrid-attention-first"]
# One of each way to keep a state, for what the model does with states whatever the mixer: vectors beside a
# convolution's inputs, the last values, matrices, a walk's vectors, keys of all tokens and of a window, an
# LSTM's.
OF_EACH_STATE = ["bd_lru-all", "h_lru", "bd_matrix-erase", "bd_gru", "attention-window", *HYBRIDS]


def in_turn(cases: Sequence, names: Sequence[str] = NAMES) -> list[tuple]:
    """(name, case): models of each kind with every case, each other model with the next of the cases."""
    others = [name for name in names if name not in OF_EACH_KIND]
    return [*product(OF_EACH_KIND, cases), *zip(others, cycle(cases), strict=False)]


def small_config(name: str, **changes) -> LRNNConfig:
    settings = {
        "vocab_size": VOCAB, "hidden_size": 16, "num_hidden_layers": 3, "intermediate_size": 24,
        "loss_chunk": 7, "eos_token_id": None, "pad_token_id": 0,
    }  # fmt: skip
    if name in HYBRIDS:
        settings["layer_pattern"] = [MIXER_ROWS[entry] for entry in HYBRIDS[name]]
    else:
        settings["mixer"] = MIXER_ROWS[name]
    return LRNNConfig(**{**settings, **changes})


def small_model(name: str, **changes) -> LRNNForCausalLM:
    """A model in evaluation mode whose weights are large enough that every part shows in the logits.

    Biases too: with zeros, as a model starts, padding would leave most states at zero by itself.
    """
    torch.manual_seed(0)
    return _build(name, **changes) if changes else _copy(*_pickled(name))


@torch.inference_mode(False)
def _build(name: str, **changes) -> LRNNForCausalLM:
    model = LRNNForCausalLM(small_config(name, **changes)).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if parameter.ndim > 1 or key.split(".")[-1].startswith("bias"):
                spread = SPREAD.get(name, 0.3) if ".mixer." in key else 0.3
                parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=spread)
    return model


@cache
def _pickled(name: str) -> tuple[bytes, list[Tensor]]:
    """A model without its tensors, and those: a copy takes a fifth of the time of deepcopy's."""
    places: dict[Tensor, int] = {}  # by identity

    class Pickler(pickle.Pickler):
        def persistent_id(self, part: object) -> int | None:
            return places.setdefault(part, len(places)) if isinstance(part, Tensor) else None

    text = io.BytesIO()
    Pickler(text).dump(_build(name))
    return text.getvalue(), list(places)


def _copy(text: bytes, tensors: list[Tensor]) -> LRNNForCausalLM:
    copies = [tensor.detach().clone() for tensor in tensors]
    for place, tensor in enumerate(tensors):
        if isinstance(tensor, nn.Parameter):
            copies[place] = nn.Parameter(copies[place], requires_grad=tensor.requires_grad)

    class Unpickler(pickle.Unpickler):
        def persistent_load(self, place: int) -> Tensor:
            return copies[place]

    return Unpickler(io.BytesIO(text)).load()


def shallow_model(name: str) -> LRNNForCausalLM:
    """One layer of each mixer: for graphs, which take as long to make as they have layers."""
    return small_model(name, num_hidden_layers=len(HYBRIDS.get(name, "1")))


def tokens(rows: int = 2, length: int = 21, seed: int = 2) -> Tensor:
    return torch.randint(1, VOCAB, (rows, length), generator=torch.Generator().manual_seed(seed))


def close(got: Tensor, want: Tensor, tolerance: float) -> None:
    torch.testing.assert_close(got, want, rtol=0, atol=tolerance)


def states(cache) -> list[torch.Tensor]:
    return [layer.recurrent_states[0] for layer in cache.layers]


@torch.no_grad()
def prefilled(model, ids):
    return model(ids, use_cache=True).past_key_values


@torch.no_grad()
def plain(model, ids, cache):
    return model(ids, past_key_values=cache, use_cache=True).logits


def with_warning(one_step, model, ids, cache):
    """Where there is no GPU, the first capture says that it failed."""
    if model.device.type == "cuda":
        return one_step(model, ids, cache)
    with pytest.warns(UserWarning, match="without a CUDA graph"):
        return one_step(model, ids, cache)


def byte_tokenizer(texts: list[str], size: int, **options):
    """A byte-level BPE with BOS and EOS that adds neither by itself."""
    from transformers import PreTrainedTokenizerFast

    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=size, special_tokens=["<s>", "</s>"], initial_alphabet=alphabet, show_progress=False
    )
    core.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>", eos_token="</s>", **options)


def fill_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have every look-up of embeddings end as on a GPU without room for what it returns."""

    def embedding(*given: object, **options: object) -> None:
        raise torch.OutOfMemoryError(
            "CUDA out of memory. Tried to allocate 2.50 GiB. GPU 0 has a total capacity of 79.11 GiB of "
            "which 1.05 GiB is free. Process 1 has 78.06 GiB memory in use."
        )

    monkeypatch.setattr(torch.nn.functional, "embedding", embedding)
