"""LRNNConfig: the contents of config.json, in Hugging Face's names.

The mixers are imported only where their options are read, so importing this module loads no layers or
kernels.
"""

import copy
import importlib
import os
from pathlib import Path
from typing import Any

from transformers import PreTrainedConfig
from transformers.models.auto.configuration_auto import AutoConfig

_HEADS = ("num_attention_heads", "num_key_value_heads")


class LRNNConfig(PreTrainedConfig):
    """Configuration of a linear recurrent network language model.

    Args:
        vocab_size, hidden_size, num_hidden_layers, tie_word_embeddings: as everywhere in transformers.
        intermediate_size, rms_norm_eps, initializer_range: likewise; the first is the width of the SwiGLU.
        mixer: `{"type": "bd_lru", "num_blocks": .., "block_size": .., "gate": ..}`; see `lrnn_lm.mixers`.
        layer_pattern: mixers repeated over depth, for hybrids; None for `mixer` in every layer. An entry is a
            table as above, or a type's name, which takes `mixer`'s options where they fit.
        repeat: times that all layers are applied, one pass after the other, with the same weights. Each
            application has its own state.
        learn_initial_state: whether documents begin with a learnt state in the recurrent layers, not zeros.
        max_position_embeddings: the training length. It limits no mixer; evaluation cuts text by it.
        loss_chunk: tokens whose logits exist at once while the training loss is computed.
        residual_in_fp32: whether the residual stream stays in fp32 under autocast instead of taking
            autocast's dtype. With weights in bf16 it is in bf16.
        prefix_cache_bytes: memory in which `generate` keeps states of texts that it read, so that a second
            question on a text costs its own tokens only; 0: keep none.
        synthetic_task: the task that a model learnt, for evaluation: `{"task", "length", "options"}`.

    Raises:
        ValueError: an unknown mixer, an entry that is no table of options, or a size below 1.
    """

    model_type = "lrnn"
    keys_to_ignore_at_inference = ["past_key_values", "cache"]  # noqa: RUF012

    vocab_size: int = 32_000
    hidden_size: int = 768
    num_hidden_layers: int = 12
    intermediate_size: int = 2048
    rms_norm_eps: float = 1e-6
    initializer_range: float = 0.02
    tie_word_embeddings: bool = False
    mixer: dict[str, Any] | None = None
    layer_pattern: list[Any] | None = None
    repeat: int = 1
    learn_initial_state: bool = False
    max_position_embeddings: int = 2048
    loss_chunk: int = 1024
    residual_in_fp32: bool = True
    prefix_cache_bytes: int = 0
    synthetic_task: dict[str, Any] | None = None
    use_cache: bool = True
    pad_token_id: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        from ..mixers import mixer_options

        sizes = "vocab_size", "hidden_size", "num_hidden_layers", "intermediate_size", "loss_chunk", "repeat"
        for name in (*sizes, "max_position_embeddings"):
            if not isinstance(size := getattr(self, name), int) or isinstance(size, bool):
                raise ValueError(f"{name} must be a whole number, not {size!r}")
            if size < 1:
                raise ValueError(f"{name} must be at least 1, not {size}")
        if not isinstance(eps := self.rms_norm_eps, int | float) or not eps > 0:
            raise ValueError(f"rms_norm_eps must be a number above 0, not {eps!r}")
        if not isinstance(most := self.prefix_cache_bytes, int) or most < 0:
            raise ValueError(f"prefix_cache_bytes must be a whole number, 0 or more, not {most!r}")
        options = dict(_table("mixer", self.mixer or {}))
        self.mixer = mixer_options(options)
        if self.layer_pattern is not None:
            if not isinstance(self.layer_pattern, list | tuple):
                raise ValueError(f"layer_pattern must be a list of mixers, not {self.layer_pattern!r}")
            entries = [{"type": e} if isinstance(e, str) else e for e in self.layer_pattern]
            self.layer_pattern = [
                mixer_options({**options, **_table("layer_pattern", entry)}) for entry in entries
            ]
        windows = {spec.get("window") for spec in self.layer_pattern or ()} - {None}
        if len(windows) > 1:
            raise ValueError(
                f"layer_pattern has windows of {sorted(windows)} tokens; a model has one size of window"
            )
        if self.learn_initial_state:
            self._check_initial_state()
        for name in _HEADS:  # written by `to_dict`, computed from the mixers
            kwargs.pop(name, None)
        super().__post_init__(**kwargs)
        # Register the model classes now: the Auto classes look a model up by an existing config, and by the
        # time one exists transformers has been imported as a whole.
        importlib.import_module("lrnn_lm.model.classification")  # and with it, modeling

    def _check_initial_state(self) -> None:
        from ..mixers import mixer_class

        kinds = [spec["type"] for spec in self.layer_mixers if spec["type"] != "attention"]
        if not kinds:
            raise ValueError("learn_initial_state: attention has no state; give the model a recurrent layer")
        for kind in kinds:
            if not mixer_class(kind).differentiable_state:
                raise ValueError(
                    f"learn_initial_state: gradients through the state of {kind} are not supported; take "
                    "another mixer, or leave it out"
                )

    @property
    def layer_mixers(self) -> list[dict[str, Any]]:
        """The mixer of each layer; with `repeat` of each application, one pass after the other."""
        pattern = self.layer_pattern or [self.mixer]
        return [pattern[i % len(pattern)] for i in range(self.num_hidden_layers)] * self.repeat

    @property
    def num_applied_layers(self) -> int:
        """Layers that a token passes: `num_hidden_layers`, `repeat` times."""
        return self.num_hidden_layers * self.repeat

    @property
    def layer_types(self) -> list[str]:
        """The kind of cache layer that each layer needs; transformers' caches read this."""
        from ..mixers import mixer_class

        return [
            "sliding_attention" if spec.get("window") else mixer_class(spec["type"]).layer_type
            for spec in self.layer_mixers
        ]

    @property
    def per_layer_config(self) -> list["LRNNConfig"]:
        """This configuration for each of `layer_types`; transformers' caches read both, side by side."""
        return [self] * len(self.layer_mixers)

    def validate(self) -> None:
        """transformers' checks, one of which asks for as many layer types as layers: without `repeat`."""
        once = copy.copy(self)
        once.repeat = 1
        super(LRNNConfig, once).validate()

    @property
    def sliding_window(self) -> int | None:
        """Tokens of attention's window, None if no layer has one; transformers' caches read this."""
        return next((spec["window"] for spec in self.layer_mixers if spec.get("window")), None)

    @sliding_window.setter
    def sliding_window(self, tokens: int | None) -> None:
        """Sets the window of every attention layer, as in transformers' configurations. Others have none."""
        from ..mixers import mixer_options

        for spec in self.layer_pattern or [self.mixer]:
            if spec["type"] == "attention":
                spec.update(mixer_options({**spec, "window": tokens}))

    @property
    def num_attention_heads(self) -> int:
        """Heads of the first attention layer, 1 if there is none; read by some of transformers' helpers."""
        return self._heads("num_heads")

    @property
    def num_key_value_heads(self) -> int:
        """The same of keys and values."""
        return self._heads("num_kv_heads", "num_heads")

    def _heads(self, *options: str) -> int:
        attention = next((spec for spec in self.layer_mixers if spec["type"] == "attention"), None)
        if attention is None:
            return 1
        return next((attention[key] for key in options if attention.get(key) is not None), 8)

    def to_dict(self) -> dict[str, Any]:
        """What config.json holds, and the numbers of heads, which PEFT looks for there."""
        return {**super().to_dict(), **{name: getattr(self, name) for name in _HEADS}}

    def save_pretrained(self, save_directory: str | os.PathLike, **options: Any) -> None:
        """As transformers'. `auto_map` goes along where the code that it names does: in the folder that it
        came from, on the hub (`--`), or copied by transformers, which then sets `_auto_class`."""
        named, saved = vars(self).get("auto_map") or {}, self
        files = [f"{value.partition('.')[0]}.py" for value in named.values() if "--" not in str(value)]
        if self._auto_class is None and not all(Path(save_directory, file).is_file() for file in files):
            saved = copy.copy(self)
            del saved.auto_map
        super(LRNNConfig, saved).save_pretrained(save_directory, **options)


def _table(name: str, value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ValueError(f'{name}: a mixer is a table, as in {{"type": "bd_lru"}}, not {value!r}')
    return value


AutoConfig.register(LRNNConfig.model_type, LRNNConfig, exist_ok=True)
