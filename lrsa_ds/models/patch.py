"""Replaces the attention of Hugging Face causal language models by LRSA.

The layers of the model are not changed. `apply_lrsa` checks that every layer is plain causal attention, and selects the
attention function that is registered here as "lrsa". Hooks on the decoder read the inputs of each pass.
"""

import warnings
from collections.abc import Mapping, Sequence
from functools import partial
from inspect import signature
from typing import Any, cast

import torch
from transformers import AttentionInterface, PreTrainedConfig, PreTrainedModel
from transformers.masking_utils import AttentionMaskInterface

from lrsa_ds.attention import AttentionFunction
from lrsa_ds.attention.decoding import Step
from lrsa_ds.attention.extras import Extras
from lrsa_ds.attention.kinds.kind import layer_attention
from lrsa_ds.attention.opaque import OpaquePass
from lrsa_ds.attention.ragged import Rows, attention_behind
from lrsa_ds.attention.saved_outputs import checkpoint_contexts, put_nowhere
from lrsa_ds.errors import LRSAError, require
from lrsa_ds.layer_ranges import said_of_kinds
from lrsa_ds.layers import (
    AnyConfig,
    describe,
    from_saved,
    in_model,
    largest_first,
    resolve,
    saved_turns,
    source_of,
    trained_turns,
)
from lrsa_ds.lrsa_config import LRSAConfig
from lrsa_ds.models.cache import LagKVCache
from lrsa_ds.models.counted_positions import place_tokens
from lrsa_ds.models.generation import use_lrsa_cache
from lrsa_ds.models.keywords import calls_interface, hand_on_keywords
from lrsa_ds.models.latent import cache_expanded
from lrsa_ds.models.logits import other_logits
from lrsa_ds.models.offload import HostStore, offload_checkpoints
from lrsa_ds.models.parts import decoder_of, reads_encoder
from lrsa_ds.models.passes import attend_rows, read_pass
from lrsa_ds.models.recurrent import keep_documents_apart
from lrsa_ds.models.rope import check_fixed
from lrsa_ds.models.shared_keys import through_all_layers
from lrsa_ds.models.structure import (
    layers_of,
    nothing_to_take,
    other_attention,
    unfit_decoder,
    unknown_type,
    without_dropout,
)
from lrsa_ds.models.wrappers import refuse_images
from lrsa_ds.notices import say_once

NAME = "lrsa"


def apply_lrsa(
    model: PreTrainedModel, config: AnyConfig | Sequence[AnyConfig], layers: Mapping[Any, Any] | None = None
) -> PreTrainedModel:
    """Replaces full attention by LRSA under `config` in every layer that has it, in place, and returns the model.

    Layers of other kinds (a sliding window, a recurrence) stay what they are; a sentence says which.

    The settings are stored in `model.config.lrsa`, and saved with the model. A forward pass accepts `document_lengths`
    (packed documents), `lrsa_config` (other settings for this pass) and `attend` (a function with the signature of
    `lrsa_attention`, for sequence parallelism). Without `document_lengths`, documents are read from the inputs of
    packing collators: restarting `position_ids`, `cu_seq_lens_q` and `_k`, `seq_idx`, or a mask of document numbers.

    Args:
        config: settings, or several that training uses in turn: the model gets those with the smallest cache, and
            stores all of them (`trained_caches`).
        layers: settings of layers that differ from `config`: layers mapped to a retention, such as
            {"0 3 7-9": 1.0, "rest": 0.1}, to some settings, or to an `LRSAConfig`; see
            `lrsa_ds.layer_ranges.read_layers`.

    Raises:
        LRSAError: a layer is of a kind that is not supported; the message names the layer and the reason. Or `layers`
            leaves out a layer, or names one twice, or one that LRSA does not take.
    """
    check_supported(model)
    configs = [config] if isinstance(config, AnyConfig) else config
    own = layers_of(model.config)
    if len(own.taken) < len(own):
        say_once(f"{said_of_kinds(own)}.")
    model.config.lrsa = saved_turns([resolve(each, layers, own) for each in configs])
    model.set_attn_implementation(NAME)
    decoder = decoder_of(model)  # all passes go through it, also those that do not call `model`
    decoder.config.lrsa = model.config.lrsa  # a separate object if the model has encoders
    without_dropout(model)
    if _begin_pass not in decoder._forward_pre_hooks.values():
        decoder.register_forward_pre_hook(_begin_pass, with_kwargs=True)
        decoder.register_forward_hook(_end_pass, with_kwargs=True, always_call=True)
    cache_expanded(model)
    hand_on_keywords(decoder)
    place_tokens(decoder)
    keep_documents_apart(model)
    use_lrsa_cache(model, NAME, new_cache)
    if decoder is not model:
        refuse_images(model)
    return model


def new_cache(
    model: PreTrainedModel, layers: Mapping[Any, Any] | None = None, max_tokens: int | None = None
) -> LagKVCache:
    """An empty cache with the settings of the model's attention, layer by layer.

    Args:
        layers: settings of layers that differ, as for `apply_lrsa`: {"0-": 1.0} makes a dense cache.
        max_tokens: maximum tokens of each row, for a cache of fixed storage; see `LagKVCache`.

    Raises:
        LRSAError: the model is not under `apply_lrsa`, or `layers` does not fit it.
    """
    return LagKVCache(resolve(model_settings(model), layers, layers_of(model.config)), max_tokens)


def trained_caches(model: PreTrainedModel) -> list[AnyConfig]:
    """The settings that training used in turn, the largest cache first; `LagKVCache` accepts each of them.

    Raises:
        LRSAError: the model is not under `apply_lrsa`.
    """
    model_settings(model)
    return largest_first([in_model(turn, layers_of(model.config)) for turn in trained_turns(model.config.lrsa)])


def check_applied(model: PreTrainedModel) -> None:
    """Raises LRSAError unless the attention of the model is LRSA."""
    model_settings(model)
    attention = model.config._attn_implementation
    require(
        attention == NAME,
        f"the attention of the model is {attention!r}: call lrsa_ds.apply_lrsa(model, config), or "
        f"model.set_attn_implementation({NAME!r}) if you have done so, first.",
    )


def num_layers(model: PreTrainedModel) -> int:
    return len(layers_of(model.config))


def model_settings(model: PreTrainedModel) -> AnyConfig:
    """The settings that a model remembers; raises LRSAError if it has none."""
    settings = getattr(model.config, "lrsa", None)
    if settings is None:
        raise LRSAError("the model has no LRSA settings: call lrsa_ds.apply_lrsa(model, config) first.")
    return in_model(from_saved(settings), layers_of(model.config))


def _begin_pass(model: PreTrainedModel, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
    """Hook before a forward pass: reads documents, padding and positions from its inputs, and opens its cache.

    Under other attention than LRSA the cache stays closed, so it refuses new tokens.
    """
    if model.config._attn_implementation != NAME:
        return args, kwargs
    if kwargs.get("step") is not None:  # its cache is open, and all that is known of its tokens is on the device
        return args, kwargs | {"attention_mask": None, "position_ids": kwargs["step"].positions}
    named = dict(zip(signature(model.forward).parameters, args, strict=False)) if args else {}
    inputs = read_pass({"lrsa_config": model_settings(model)} | named | kwargs, lambda: new_cache(model))
    cache = inputs.get("past_key_values")
    if isinstance(cache, LagKVCache):
        open_cache(model, cache, inputs.get("rows"))
        inputs |= {"num_seen": cache.get_seq_length(), "lrsa_config": cache.config, "pass_cache": cache}
        return (), inputs
    if given := inputs.get("lrsa_config"):
        inputs["lrsa_config"] = in_model(given, layers_of(model.config))
    return (), through_all_layers(inputs)


def _end_pass(model: PreTrainedModel, args: tuple, kwargs: dict, output) -> None:
    """Hook after a forward pass, even one that failed: closes its cache."""
    if kwargs.get("step") is None and isinstance(cache := kwargs.get("past_key_values"), LagKVCache):
        cache.end_pass()


def open_cache(model: PreTrainedModel, cache: LagKVCache, rows: Rows | None) -> None:
    """Opens a cache for a pass of `model`; warns if training did not use its settings.

    Raises:
        LRSAError: the cache cannot serve the model.
    """
    _check_layers(cache, num_layers(model))
    cache.config = in_model(cache.config, layers_of(model.config))
    if cache.config != model_settings(model):
        kept, trained = describe(cache.config, _sizes), [describe(turn, _sizes) for turn in trained_caches(model)]
        if kept not in trained:
            said = " and, in turn, ".join(trained)
            warnings.warn(
                f"the cache keeps {kept}, and the model was trained with {said}: its answers may suffer.", stacklevel=4
            )
    cache.begin_pass(rows)


def _check_layers(cache: LagKVCache, count: int) -> None:
    """Raises LRSAError unless a cache is for, and was filled by, a model of `count` layers."""
    planned, filled = len(cache.config.layers), len(cache.layers)
    require(
        planned in (1, count) and filled in (0, count),
        f"the cache is one of {filled or planned} layers, and the model has {count}: make another with "
        "lrsa_ds.new_cache(model).",
    )


def _sizes(config: LRSAConfig) -> str:
    """The settings that determine what is kept; the selection only if it is not the default."""
    if config.is_dense:
        return "retention=1"
    names = {"backend": None, "retention": f"{config.retention:g}"}
    shown = {name: names.get(name, value) for name, value in config.saved().items()}
    return ", ".join(f"{name}={value}" for name, value in shown.items() if value is not None)


def check_supported(model: PreTrainedModel) -> None:
    """Raises LRSAError unless LRSA can replace full attention in `model`, and knows its other kinds of layers."""
    name, config = type(model).__name__, model.config.get_text_config()
    require(
        model._can_set_attn_implementation()
        and (model._supports_attention_backend or calls_interface(decoder_of(model), layers_of(model.config).taken)),
        f"{name} does not call transformers' attention interface, through which LRSA replaces the attention.",
    )
    reason = unfit_decoder(model)
    require(reason is None, f"{name} {reason}: LRSA cannot take the place of its attention.")
    reason = other_logits(model)
    require(reason is None, f"{name} {reason}: the loss would not be that of its own logits.")
    check_fixed(model)
    own = set(decoder_of(model).modules())  # models for images or sound also have encoders
    layers = [(p, m) for p, m in model.named_modules() if m in own and isinstance(getattr(m, "layer_idx", None), int)]
    for path, module in layers:
        reason = None if reads_encoder(path) else _unlike_causal_attention(module, config)
        require(reason is None, f"layer {module.layer_idx} of {name} ({path}) {reason}: LRSA cannot take its place.")
    reason = nothing_to_take(config)
    require(reason is None, f"{name} {reason}.")


def _unlike_causal_attention(module: Any, config: PreTrainedConfig) -> str | None:
    """What distinguishes a layer from plain causal attention or a known kind; None if nothing."""
    if (layer_type := unknown_type(config, module.layer_idx)) is not None:
        return f"is of type {layer_type}"
    if getattr(module, "is_causal", True) is False:
        return "is not causal"
    return other_attention(module)


def _lrsa_attention_function(
    module: Any,  # an attention layer of transformers
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    document_lengths: tuple[int, ...] | None = None,
    lrsa_config: AnyConfig | None = None,
    attend: AttentionFunction = layer_attention,
    num_seen: int | None = None,
    pass_cache: LagKVCache | None = None,
    rows: Rows | None = None,
    step: Step | OpaquePass | None = None,
    expanded_cache: LagKVCache | None = None,
    query_scale: torch.Tensor | None = None,
    **kwargs,
) -> tuple[torch.Tensor, None]:
    """The signature that transformers calls: query [B, H, N, D], key and value [B, G, N, D] to ([B, N, H, D], None).

    A layer passes its own `scaling`, `softcap` and `s_aux`, which are learned sinks [H]. `pass_cache` is the cache that
    the pass fills, and has compressed in this layer already: its kept KV need not be selected again. With an
    `expanded_cache`, keys and values are those of the new tokens and still have to be cached; `query_scale` multiplies
    the queries.
    """
    require(attention_mask is None, "LRSA attention makes its own mask: a 4D attention_mask is not supported.")
    extras = Extras(scaling, softcap, s_aux)
    if query_scale is not None:
        query = (query * query_scale).to(query.dtype)
    if expanded_cache is not None:
        key, value = expanded_cache.update(key, value, module.layer_idx)
    if step is not None:  # before the settings are read, for which a compiler would compile again
        return step.attend(query, key, value, module.layer_idx, extras).transpose(1, 2).contiguous(), None
    settings = lrsa_config or in_model(from_saved(module.config.lrsa), layers_of(module.config))
    config, layer = settings.at_layer(module.layer_idx), source_of(settings, module.layer_idx)
    # What a cache holds has no gradient: where one is wanted, the attention selects for itself.
    held = None if pass_cache is None or key.requires_grad else pass_cache.held(key)
    if num_seen is not None:
        only_last = pass_cache is not None and pass_cache.answering_layer == module.layer_idx
        output = attention_behind(query, key, value, num_seen, rows, config, extras, layer, held, only_last)
        return output.transpose(1, 2).contiguous(), None
    require(
        query.shape[2] == key.shape[2],
        f"a model with LRSA attention needs a cache that keeps what its attention keeps, and got one of "
        f"{key.shape[2] - query.shape[2]} tokens: use past_key_values=lrsa_ds.LagKVCache(config), or "
        "model.set_attn_implementation('sdpa') for dense attention.",
    )
    output = attend_rows(attend, query, key, value, config, document_lengths, extras, layer)
    return output.transpose(1, 2).contiguous(), None


def _lrsa_mask(attention_mask: torch.Tensor | None = None, **kwargs) -> None:
    """Returns no mask: LRSA makes its own, and `_begin_pass` has removed that of the caller."""
    require(
        attention_mask is None or bool(attention_mask.all()),
        "the attention mask has not been read: call lrsa_ds.apply_lrsa(model, config) before the pass.",
    )


AttentionInterface.register(NAME, _lrsa_attention_function)
AttentionMaskInterface.register(NAME, _lrsa_mask)


def to_device(model: PreTrainedModel, device: torch.device | str) -> PreTrainedModel:
    """`model.to(device)`; transformers wraps it in a way that type checkers misread."""
    return cast(Any, model).to(device)


def layer_classes(model: PreTrainedModel) -> list[str]:
    """Names of the classes of the decoder layers."""
    present = {type(module).__name__ for module in model.modules()}
    return sorted(present & set(model._no_split_modules or ()))


def enable_checkpointing(
    model: PreTrainedModel, offload: bool = False, save_attention: bool = False
) -> HostStore | None:
    """Recomputes the activations of each decoder layer in the backward pass instead of storing them.

    Args:
        offload: whether the inputs of the layers are stored in host memory.
        save_attention: whether the outputs of attention are stored too, in the same place, instead of recomputed.

    Returns:
        What stores them in host memory, or None.
    """
    store = HostStore() if offload else None
    put = (store.put if store else put_nowhere) if save_attention else None
    kwargs = {"use_reentrant": False, "context_fn": partial(checkpoint_contexts, put)}
    if hasattr(model, "activation_checkpointing_enable"):  # the name since transformers 5.2x; the older one warns there
        model.activation_checkpointing_enable(kwargs)
    else:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=kwargs)
    if store is not None:
        offload_checkpoints(model, store)
    return store
