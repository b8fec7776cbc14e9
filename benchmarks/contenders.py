"""The models of `lrnn bench train` and `decode`, and how they are brought to equal sizes.

A contender is a recipe of `recipes/paper`. Some get another number of layers, so that all have as many
parameters as the reference (BD-LRU with blocks of 4). Other sizes scale the recipe's widths and counts.

Legend: D model width, V vocabulary.
"""

from dataclasses import dataclass, replace
from typing import Any

from lrnn_lm.model import LRNNConfig
from lrnn_lm.model.accounting import account
from lrnn_lm.recipe import load_recipe, shipped
from lrnn_lm.recipe.schema import ModelSection
from lrnn_lm.train.build import model_config

REFERENCE = "bd-m4"
TOLERANCE = 0.015  # of the parameters: further off, the SwiGLU's width makes up for it
MLP_STEP = 64  # what that width is changed by: a size that matrix products like
PAPER_WIDTH = 768


@dataclass(frozen=True)
class Contender:
    """A model to time.

    recipe: a recipe's path; relative ones are looked for among the project's.
    backend: of the scans, see `kernels.dispatch`; `associative` is the formulation of the paper's code.
    exact: whether the recipe's own depth and widths stay, equal or not; at another size they scale with it.
    foreign: whether the mixer's kernels are another package's, which run as they are written: of a block the
        rest is compiled.
    """

    name: str
    recipe: str
    backend: str = "auto"
    exact: bool = False
    foreign: bool = False


@dataclass(frozen=True)
class Size:
    """Width D, layers of the reference model, and width of its SwiGLU."""

    hidden_size: int
    layers: int
    intermediate_size: int


def _paper(name: str, recipe: str, **rest: Any) -> Contender:
    return Contender(name, f"recipes/paper/{recipe}.yaml", **rest)


CONTENDERS: dict[str, Contender] = {
    c.name: c
    for c in (
        _paper("bd-m4", "bd-lru-m4", exact=True),
        _paper("transformer", "transformer"),  # deeper than the reference
        _paper("transformer-same-shape", "transformer", exact=True),  # as deep and wide, fewer parameters
        _paper("paper-m4", "bd-lru-m4", backend="associative", exact=True),
        _paper("mamba2", "mamba2-expand3-state1"),
        _paper("gated-deltanet", "gated-deltanet", foreign=True),
        _paper("bd-m1", "bd-lru-m1", exact=True),
        _paper("bd-m2", "bd-lru-m2", exact=True),
        _paper("bd-m8", "bd-lru-m8", exact=True),
        _paper("bd-m16", "bd-lru-m16", exact=True),
        _paper("h-m16", "h-lru-m16", exact=True),
        _paper("lstm", "lstm", exact=True),
        _paper("paper-h16", "h-lru-m16", backend="associative", exact=True),
    )
}

SIZES: dict[str, Size] = {
    "50M": Size(384, 6, 1024),
    "125M": Size(576, 10, 1536),
    "212M": Size(768, 12, 2048),  # the paper's
    "350M": Size(1024, 12, 2752),
    "760M": Size(1536, 13, 4096),
    "1.3B": Size(2048, 14, 5504),
}
PAPER_SIZE = "212M"


def pick_contenders(text: str) -> list[Contender]:
    """Contenders by name, separated by commas, or by the path of a recipe, which is then taken as it stands.

    Raises ValueError naming those that there are.
    """
    names = [name.strip() for name in text.split(",") if name.strip()]
    if not names:
        raise ValueError(f"no contenders; known: {', '.join(CONTENDERS)}, or a recipe's path")
    chosen = []
    for name in names:
        if name in CONTENDERS:
            chosen.append(CONTENDERS[name])
        elif name.endswith((".yaml", ".yml")):
            load_recipe(name)  # raises what is wrong with it now, not when its turn comes
            chosen.append(Contender(name.removesuffix(".yaml").rpartition("/")[2], name, exact=True))
        else:
            raise ValueError(
                f"unknown contender {name!r}; known: {', '.join(CONTENDERS)}, or a recipe's path"
            )
    return chosen


def pick_size(name: str, width: int | None, layers: int | None) -> Size:
    """A size by name, its width and layers replaced by those that are given."""
    if name not in SIZES:
        raise ValueError(f"unknown size {name!r}; known: {', '.join(SIZES)}")
    size = SIZES[name]
    if width is not None:
        if width < 16 or width % 16:
            raise ValueError(f"a width is a multiple of 16, not {width}")
        size = replace(size, hidden_size=width, intermediate_size=max(16, width * 8 // 3 // 16 * 16))
    if layers is not None:
        if layers < 1:
            raise ValueError(f"layers must be at least 1, not {layers}")
        size = replace(size, layers=layers)
    return size


def label_of(name: str, size: Size) -> str:
    """The size's name, or width x layers where they were given otherwise."""
    return name if size == SIZES[name] else f"{size.hidden_size}x{size.layers}"


def build_config(contender: Contender, size: Size, vocab_size: int | None, length: int) -> LRNNConfig:
    """The contender's model at a size, with the reference's parameters as nearly as may be.

    Args:
        contender: what to build.
        size: width and the reference's depth.
        vocab_size: V; None for the recipe's.
        length: T, what the config calls the training length.
    Raises:
        ValueError: a recipe that is not there, or a model that cannot be built here.
    """
    config = _scaled(contender, size, vocab_size, length)
    if contender.exact:
        return config
    target = count(_scaled(CONTENDERS[REFERENCE], size, vocab_size, length))
    one, two = (count(_changed(config, num_hidden_layers=n)) for n in (1, 2))
    layers = max(1, round((target - 2 * one + two) / (two - one)))
    config = _changed(config, num_hidden_layers=layers)
    missing = target - count(config)
    if abs(missing) > TOLERANCE * target:
        wider = round(missing / (3 * layers * config.hidden_size * MLP_STEP)) * MLP_STEP
        config = _changed(config, intermediate_size=max(MLP_STEP, config.intermediate_size + wider))
    return config


def count(config: LRNNConfig) -> int:
    """Parameters of a model, without building it."""
    return account(config, 1).total_parameters


def _changed(config: LRNNConfig, **changes: Any) -> LRNNConfig:
    plain = {k: v for k, v in config.to_dict().items() if k in _KEPT}
    return LRNNConfig(**{**plain, **changes})


_KEPT = (
    "vocab_size", "hidden_size", "num_hidden_layers", "intermediate_size", "rms_norm_eps",
    "initializer_range", "tie_word_embeddings", "mixer", "layer_pattern", "max_position_embeddings",
    "loss_chunk", "residual_in_fp32",
)  # fmt: skip


def _scaled(contender: Contender, size: Size, vocab_size: int | None, length: int) -> LRNNConfig:
    """The recipe's model at a width: blocks, heads and cells in proportion, where the recipe names them."""
    recipe = load_recipe(shipped(contender.recipe) if contender.name in CONTENDERS else contender.recipe)
    model = recipe.model
    if contender.name in CONTENDERS:
        scale = size.hidden_size / PAPER_WIDTH
        mixer = model.mixer.model_dump()
        rows = mixer["block_size"] if mixer["type"] == "bd_lru" else 1
        mixer |= {k: _at(mixer[k], scale, rows) for k in ("num_blocks", "width") if mixer.get(k) is not None}
        if mixer["type"] in ("attention", "gated_deltanet"):  # heads stay as wide as they are
            mixer["num_heads"] = max(1, round(mixer["num_heads"] * scale))
        if mixer["type"] == "mamba2":
            mixer["head_dim"] = min(mixer["head_dim"], size.hidden_size)
        model = ModelSection.model_validate(
            {
                **model.model_dump(),
                "hidden_size": size.hidden_size,
                "num_hidden_layers": size.layers,
                "intermediate_size": size.intermediate_size,
                "mixer": mixer,
                "parameters": None,
            }
        )
    vocabulary = vocab_size or model.vocab_size
    if vocabulary is None:
        raise ValueError(f"{contender.recipe} leaves its vocabulary to a tokenizer: pass --vocab")
    recipe = recipe.model_copy(update={"model": model})
    config = model_config(recipe, vocabulary)
    config.max_position_embeddings = length
    return config


def _at(value: int, scale: float, rows: int) -> int:
    """A count of blocks of `rows` rows at another width; rows in sixteens keep matrix products aligned."""
    multiple = max(1, 16 // rows)
    scaled = value * scale
    if scale == 1 or scaled < 2 * multiple:
        return max(1, round(scaled))
    return round(scaled / multiple) * multiple
