"""How `generate` works on these models: masks of a step, caches that know their length, our decoding step.

Legend: B batch, T new tokens, S tokens so far.
"""

import copy
import inspect
from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
from torch import Tensor
from transformers import (
    CompileConfig,
    GenerationConfig,
    GenerationMixin,
    LogitsProcessorList,
    StoppingCriteriaList,
)
from transformers.cache_utils import Cache

from ..cache import CACHE, RecurrentCache, adopt, check_cache, make_cache, one_cache, tokens_seen
from ..config import LRNNConfig
from ..documents import check_tokens
from ..masks import attention_masks
from .batching import StateBatching, check_prompt
from .decode import Decoder, can_decode
from .memory import can_hold
from .prefix import prefix_cache
from .sample import is_usual, sample


class LRNNGenerationMixin(GenerationMixin):
    """transformers' `generate`, with what recurrent states and windows of keys ask for."""

    @staticmethod
    def create_masks_for_generate(
        config: LRNNConfig,
        inputs_embeds: Tensor,
        attention_mask: Tensor | None,
        past_key_values: Cache | None = None,
        position_ids: Tensor | None = None,
        cache: Cache | None = None,
        **kwargs: Any,
    ) -> Tensor | dict[str, Tensor] | None:
        """`generate` passes the 2-d mask on: the model makes what each kind of layer needs of it.

        But for a step of one token, where it would grow with every token, and a compiled graph with it: where
        no row begins or is padding there, recurrent layers need no mask, and attention's is made here,
        (B, 1, 1, S) over all S places of a static cache, for each kind of layer.
        """
        if inputs_embeds.shape[1] > 1 or position_ids is None:
            return attention_mask
        if attention_mask is not None:
            goes_on = attention_mask[:, :-1].any(dim=1) & attention_mask[:, -1].bool()
            if not bool(goes_on.all()):
                return attention_mask
        cache = past_key_values if cache is None else cache
        masks, _ = attention_masks(config, inputs_embeds, attention_mask, None, cache)
        rows = inputs_embeds.shape[0]  # also without padding, where one row would do: of another shape
        return {
            kind: mask if mask is None else mask.expand(rows, -1, -1, -1) for kind, mask in masks.items()
        } or None

    @wraps(GenerationMixin.prepare_inputs_for_generation)
    def prepare_inputs_for_generation(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """transformers' inputs of a pass; for PEFT, whose own method calls this one, the cache by both names.

        PEFT 0.21.2 looks for `past_key_values` only: with transformers 5.24 it finds no cache, and puts its
        prompt before every new token. An empty cache has that name only, as PEFT replaces it by its prefix.
        Drop this method once PEFT looks for `cache`.
        """
        inputs = super().prepare_inputs_for_generation(*args, **kwargs)
        cache = inputs.get("cache")
        if cache is not None and "prepare_inputs_for_generation" in vars(self):
            inputs["past_key_values"] = cache
            if not tokens_seen(cache):
                del inputs["cache"]
        return inputs

    def _prepare_model_inputs(self, *args: Any, **kwargs: Any) -> tuple[Tensor, str | None, dict[str, Any]]:
        """transformers' inputs. Raises ValueError for lists, one row without its dimension, and no token."""
        given, name, model_kwargs = super()._prepare_model_inputs(*args, **kwargs)
        if not isinstance(given, Tensor):
            raise ValueError(
                f"{name or 'input_ids'} is a {type(given).__name__}, not a tensor (rows, tokens)"
            )
        check_tokens(*((None, given) if name == "inputs_embeds" else (given, None)))
        return given, name, model_kwargs

    def _prepare_attention_mask_for_generation(
        self, inputs_tensor: Tensor, generation_config: GenerationConfig, model_kwargs: dict[str, Any]
    ) -> Tensor:
        """transformers', which takes padding tokens for padding where no mask is given. An assistant's text
        may hold them: its tokens are the main model's, whose mask it is given if there is padding."""
        if generation_config.is_assistant:
            return inputs_tensor.new_ones(inputs_tensor.shape[:2], dtype=torch.long)
        return super()._prepare_attention_mask_for_generation(inputs_tensor, generation_config, model_kwargs)

    def _expand_inputs_for_generation(
        self, *args: Any, input_ids: Tensor | None = None, **model_kwargs: Any
    ) -> tuple[Tensor, dict[str, Any]]:
        """transformers', where padding at the end of a row is moved to its beginning: text goes on after the
        last column. transformers may warn of such padding, and would go on from it.
        """
        mask = model_kwargs.get("attention_mask")
        cache = one_cache(model_kwargs.get("past_key_values"), model_kwargs.get("cache"))
        if cache is not None:
            check_cache(self.config, cache)
        embeds = model_kwargs.get("inputs_embeds")
        B, T = (input_ids if embeds is None else embeds).shape[:2]
        plain = mask is not None and mask.ndim == 2 and mask.shape[0] == B
        past = tokens_seen(cache)
        there = mask[:, past:].bool() if plain else None  # of the new columns
        if plain and 0 < there.shape[1] <= T and past:
            silent = mask[:, :past].any(dim=1) & ~there.any(dim=1)
            if bool(silent.any()):
                raise ValueError(
                    f"row {int(silent.int().argmax())} has no new token, after which its text would go on; "
                    "leave the row out, or give it a token"
                )
        if plain and there.shape[1] <= T and bool((there.any(dim=1) & ~there[:, -1:].all(dim=1)).any()):
            order = there.long().argsort(dim=1, stable=True)
            for name in ("attention_mask", "position_ids", "inputs_embeds"):
                if (given := model_kwargs.get(name)) is not None:
                    # Positions may be one row for all, whose tokens now lie in orders of their own.
                    given = given.expand(B, -1) if given.ndim == 2 and given.shape[0] == 1 else given
                    model_kwargs[name] = _reordered(given, order)
            input_ids = _reordered(input_ids, order)
        return super()._expand_inputs_for_generation(*args, input_ids=input_ids, **model_kwargs)

    def _prepare_cache_for_generation(
        self, generation_config: Any, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> None:
        """Whatever cache transformers prepares or the caller gave: a view of it that knows its length."""
        if self._is_stateful and generation_config.is_assistant:
            raise ValueError(
                "assisted decoding cuts its assistant's cache back, which a recurrent state or a window "
                "cannot be; take an assistant whose layers are all attention without a window"
            )
        for name in ("reset", "seq_idx"):  # arguments of a pass, for which the Trainer has to find them
            if model_kwargs.get(name) is not None:
                raise ValueError(f"generate does not take {name}: give documents of a prompt as position_ids")
        given = model_kwargs.get(CACHE) is not None
        if given:
            check_cache(self.config, model_kwargs[CACHE])
            # Else all tokens would be read again after it. transformers' Trainer leaves False in configs.
            generation_config.use_cache = True
        super()._prepare_cache_for_generation(generation_config, model_kwargs, *args, **kwargs)
        cache = model_kwargs.get(CACHE)
        if cache is None:
            return
        adopt(cache)
        if all(kind == "linear_attention" for kind in self.config.layer_types):
            model_kwargs[CACHE] = cache = make_cache(self.config, cache)
        if isinstance(cache, RecurrentCache):
            cache.private = not given

    def _prefill(
        self,
        input_ids: Tensor,
        generation_config: GenerationConfig,
        model_kwargs: dict[str, Any],
        is_first_iteration: bool = True,
    ) -> Any:
        """transformers' first pass, which drops tokens that the cache seems to have seen.

        Raises ValueError where that would be all: transformers would take some of them, or the whole again.
        """
        read, embeds = tokens_seen(model_kwargs.get(CACHE)), model_kwargs.get("inputs_embeds")
        name, given = ("input_ids", input_ids) if embeds is None else ("inputs_embeds", embeds)
        T, mask = given.shape[1], model_kwargs.get("attention_mask")
        # A mask of ones is left out by now, and transformers keeps its length.
        columns = vars(generation_config).get("_mask_length") if mask is None else mask.shape[1]
        all_new = embeds is None and columns is not None and columns > T
        if is_first_iteration and 0 < read < T and embeds is not None and columns not in (None, T):
            raise ValueError(
                f"inputs_embeds has {T} tokens and attention_mask {columns}: after a cache pass those of the "
                "whole text, as transformers drops as many of them as the cache has seen"
            )
        if is_first_iteration and 0 < T <= read and not all_new:
            also = f", or the new tokens with an attention_mask of {read} columns and theirs"
            remedy = "pass the whole text" + (also if embeds is None else "")
            if read == T:
                remedy = "if that is the whole text, make the cache without its last token; else " + remedy
            raise ValueError(f"{name} has {T} tokens and the cache has seen {read}, so none is new: {remedy}")
        try:
            return super()._prefill(input_ids, generation_config, model_kwargs, is_first_iteration)
        except ValueError as error:
            if not read or generation_config.prefill_chunk_size is None:
                raise
            uncounted = "with prefill_chunk_size, transformers before 5.21 does not count a cache's tokens"
            raise ValueError(f"{error} ({uncounted}: leave it out)") from None

    def _sample(
        self,
        input_ids: Tensor,
        logits_processor: LogitsProcessorList,
        stopping_criteria: StoppingCriteriaList,
        generation_config: GenerationConfig,
        synced_gpus: bool = False,
        streamer: Any = None,
        tokenizer: Any = None,
        **model_kwargs: Any,
    ) -> Any:
        """Greedy decoding and sampling: our own loop for what is usual, transformers' for the rest.

        tokenizer: unused. Stop strings are criteria by now, and transformers would hand it to the model.
        """
        chosen = (logits_processor, stopping_criteria, generation_config)
        keep, cache = None, model_kwargs.get(CACHE)
        if (kept := prefix_cache(self, input_ids, model_kwargs)) is not None:
            keep = kept.read(self, input_ids, cache)
        if not synced_gpus and is_usual(self, *chosen, model_kwargs):
            return sample(self, input_ids, *chosen, streamer, model_kwargs, keep)
        text = super()._sample(input_ids, *chosen, synced_gpus=synced_gpus, streamer=streamer, **model_kwargs)
        if keep is not None:
            keep(text if isinstance(text, Tensor) else text.sequences, cache)
        return text

    def _valid_auto_compile_criteria(
        self, model_kwargs: dict[str, Any], generation_config: GenerationConfig
    ) -> bool:
        """Whether `generate` decodes through `get_compiled_call`; `disable_compile=True` is the way out."""
        asked, cache = generation_config.compile_config is not None, model_kwargs.get(CACHE)
        ours = can_decode(self) and (cache is None or can_hold(cache))
        if not asked and not generation_config.disable_compile and ours:
            return True
        asked = asked or generation_config.cache_implementation == "static"
        if {*self.config.layer_types} == {"linear_attention"} and not asked:
            return False  # transformers would compile whatever decodes on a GPU without keys and values
        if not super()._valid_auto_compile_criteria(model_kwargs, generation_config):
            return False
        # Tells `get_compiled_call`, which is not given the cache, that our step cannot write it.
        generation_config.compile_config = generation_config.compile_config or CompileConfig()
        return True

    def get_compiled_call(self, compile_config: CompileConfig | None) -> Callable[..., Any]:
        """What decodes a token: our own step where it can, transformers' otherwise."""
        if compile_config is None and can_decode(self):
            return Decoder(self)
        return super().get_compiled_call(compile_config)

    def init_continuous_batching(
        self, generation_config: GenerationConfig | None = None, *_: Any, **__: Any
    ) -> StateBatching:
        """A manager of requests that are decoded together; `generate_batch` enters here, too.

        transformers' settings for pages of keys and values say nothing here.
        """
        return StateBatching(self, generation_config or self.generation_config)

    def generate_batch(
        self,
        inputs: list[list[int]],
        generation_config: GenerationConfig | None = None,
        *args: Any,
        **options: Any,
    ) -> dict[str, Any]:
        """transformers' call, with the settings of `generate`: keywords, of which transformers' own takes
        max_new_tokens only, then those of `generation_config`, then the model's.

        Raises ValueError for a prompt that cannot be answered, before any is: transformers would log it, and
        return {} for all of them. As `generate`, for a keyword that nothing reads; and for padding. The model
        is left in training if it was.
        """
        config = copy.deepcopy(generation_config or self.generation_config)
        config.update(**self.generation_config.to_dict(), defaults_only=True)
        others = config.update(**options)
        theirs = inspect.signature(super().generate_batch).parameters
        of_model = {key: value for key, value in others.items() if key not in theirs and value is not None}
        self._validate_model_kwargs(of_model)
        # `generate` passes these two on, for cache_implementation="paged".
        mask = of_model.pop("attention_mask", None)
        of_model.pop("input_ids", None)
        if of_model or (mask is not None and not torch.as_tensor(mask).all()):
            what = ", ".join(of_model) or "padding"
            raise ValueError(f"continuous batching takes lists of tokens, and no {what}: leave it out")
        for number, ids in enumerate(inputs):
            try:
                check_prompt(ids, config, self.config.vocab_size)
            except ValueError as error:
                raise ValueError(f"inputs[{number}]: {error}") from None
        modes = {module: module.training for module in self.modules()}
        try:
            return super().generate_batch(inputs, config, *args, **others)
        finally:
            for module, training in modes.items():
                module.training = training


def _reordered(x: Tensor, order: Tensor) -> Tensor:
    """x (B, T, ..) with its last columns in this order, (B, new ones); as it is if it has not so many."""
    rows, T = order.shape
    if x.shape[0] != rows or x.shape[1] < T:
        return x
    places = order if x.ndim == 2 else order[..., None].expand(-1, -1, x.shape[2])
    return torch.cat([x[:, :-T], x[:, -T:].gather(1, places)], dim=1)
