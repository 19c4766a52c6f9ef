"""Rotary positions of a model: replaced by those of `model.rope`, and the length that they cover."""

from typing import Any

from transformers import PreTrainedConfig, PreTrainedModel

from lrsa_ds.errors import LRSAError, require
from lrsa_ds.notices import say_once
from lrsa_ds.settings.rope import KEY, NEEDED, by_layers, check_fields, fields_of

# Keys of a configuration that describe positions; `saved_rope` saves both with adapters.
PARAMETERS, REACH = "rope_parameters", "max_position_embeddings"
ORIGINAL = "original_max_position_embeddings"


def set_rope(config: PreTrainedConfig, rope: dict[str, Any]) -> None:
    """Applies `rope` to the configuration of a model before it is created, in place; an empty one changes nothing.

    A `rope_type` replaces the model's own scaling and keeps its theta; fields without one change the model's own. If
    types of layers have their own settings (Gemma 3), fields without a type of layer apply to full attention.
    `max_position_embeddings` becomes the length that the scaling covers.

    Raises:
        LRSAError: the model has no rotary positions, or other types of layers, or the scaling does not have a field.
    """
    if not rope:
        return
    text = config.get_text_config()
    own, name = getattr(text, PARAMETERS, None), type(text).__name__
    if not own:
        raise LRSAError(f"{KEY} needs rotary positions of transformers (rope_parameters), which {name} does not have.")
    positions = getattr(text, REACH)
    if by_layers(own):
        given = rope if by_layers(rope) else {"full_attention": rope}
        for layers in given:
            require(layers in own, f"{KEY}.{layers}: {name} has no such layers, but {' and '.join(own)}.")
        changed = {layers: _scaled(f"{KEY}.{layers}", own[layers], given[layers], positions) for layers in given}
        setattr(text, PARAMETERS, own | {layers: parameters for layers, (parameters, _) in changed.items()})
        setattr(text, REACH, max(reach for _, reach in changed.values()))
        return
    require(
        not by_layers(rope),
        f"{KEY} is given for {' and '.join(rope)}, and the layers of {name} share one: give its fields alone.",
    )
    parameters, reach = _scaled(KEY, own, rope, positions)
    setattr(text, PARAMETERS, parameters)
    setattr(text, REACH, reach)


def _scaled(key: str, own: dict[str, Any], given: dict[str, Any], positions: int) -> tuple[dict[str, Any], int]:
    """The parameters for transformers, from the model's `own` and the given ones, and the positions that they cover."""
    rope_type = given.get("rope_type") or own.get("rope_type", "default")
    if "rope_type" in given:
        # Fields that belong to no scaling are kept, such as theta and the rotated part of a head.
        base = {name: value for name, value in own.items() if name not in _SCALING}
    else:
        require(rope_type in NEEDED, f"{key} needs rope_type, since the model's own {rope_type} cannot be changed.")
        check_fields(key, {"rope_type": rope_type, **own, **given} if rope_type != "default" else given, rope_type)
        base = own
    parameters = {**base, **given, "rope_type": rope_type}
    original = given.get(ORIGINAL) or own.get(ORIGINAL) or positions
    if ORIGINAL in fields_of(rope_type):
        parameters[ORIGINAL] = original
    reach = round(original * parameters["factor"]) if parameters.get("factor") else positions
    # Llama 3.1 was trained at twice the length that its factor gives.
    return parameters, max(reach, positions) if rope_type == "llama3" else reach


_SCALING = {name for rope_type in NEEDED for name in fields_of(rope_type)} - {"rope_theta", "partial_rotary_factor"}


def check_taken(model: PreTrainedModel, rope: dict[str, Any]) -> None:
    """Raises LRSAError if no module of the model computes its positions from the settings."""
    require(
        not rope or any(hasattr(module, "rope_type") for module in model.modules()),
        f"{KEY} has no effect on {type(model).__name__}, which does not compute its positions as transformers does.",
    )


def has_factor(rope: dict[str, Any]) -> bool:
    """Whether the settings determine how many positions they cover; a theta alone does not."""
    return "factor" in rope or any("factor" in given for given in rope.values() if isinstance(given, dict))


def check_reach(config: PreTrainedConfig, rope: dict[str, Any], key: str, length: int) -> None:
    """Warns once if `length`, the value of `key`, exceeds the model's positions and `rope` does not extend them."""
    reach = getattr(config.get_text_config(), REACH, None)
    if reach is None or length <= reach or (rope and not has_factor(rope)):
        return
    say_once(
        f"{key}={length} is beyond the {reach:,} positions of the model: answers there may be poor unless {KEY} "
        f"scales them, such as {KEY}={{rope_type: yarn, factor: {-(-length // reach)}}}."
        if not rope
        else f"{key}={length} is beyond the {reach:,} positions that {KEY} reaches: raise its factor."
    )


def raise_reach(config: PreTrainedConfig, rope: dict[str, Any], length: int) -> None:
    """With a `rope` without a factor, such as a theta: sets the positions to the training length, if it is longer."""
    text = config.get_text_config()
    if rope and not has_factor(rope) and getattr(text, REACH, length) < length:
        setattr(text, REACH, length)


def saved_rope(config: PreTrainedConfig) -> dict[str, Any]:
    """The settings from which `restore_rope` gives the base of adapters the positions of their training."""
    text = config.get_text_config()
    return {name: getattr(text, name) for name in (PARAMETERS, REACH) if getattr(text, name, None)}


def restore_rope(config: PreTrainedConfig, saved: dict[str, Any]) -> None:
    """Applies the result of `saved_rope` to the configuration of a model before it is created, in place."""
    for name, value in saved.items():
        setattr(config.get_text_config(), name, value)


def check_fixed(model: PreTrainedModel) -> None:
    """Refuses frequencies that depend on the length of a pass: they would differ for chunks, shards and documents.

    The types are read from the modules that compute them and from the settings, whose place and key depend on the age
    of the model.
    """
    config = model.config.get_text_config()
    settings = [getattr(config, key, None) for key in ("rope_parameters", "rope_scaling")]
    settings += [value for given in settings if given for value in given.values() if isinstance(value, dict)]
    types = [given.get(key) for given in settings if given for key in ("rope_type", "type")]
    for module in model.modules():
        found = getattr(module, "rope_type", None)
        types += found.values() if isinstance(found, dict) else [found]
    for name in types:
        require(
            not isinstance(name, str) or ("dynamic" not in name and name not in ("longrope", "su")),
            f"{type(model).__name__} has rope_type={name}, whose frequencies depend on the length of each pass, so "
            "documents, chunks and ranks would not agree: use one that is fixed, such as yarn, linear or llama3.",
        )
