"""Rotary positions of a model: those of `model.rope` in the place of its own, and how far they reach."""

from typing import Any

from transformers import PreTrainedConfig, PreTrainedModel

from lrsa_ds.errors import LRSAError, require
from lrsa_ds.notices import say_once
from lrsa_ds.settings.rope import KEY, NEEDED, by_layers, check_fields, fields_of

# What a configuration says of positions; `saved_rope` writes both beside adapters.
PARAMETERS, REACH = "rope_parameters", "max_position_embeddings"
ORIGINAL = "original_max_position_embeddings"


def set_rope(config: PreTrainedConfig, rope: dict[str, Any]) -> None:
    """Puts `rope` into the configuration of a model that is not made yet, in place; an empty one changes nothing.

    A `rope_type` replaces the model's own scaling and keeps its theta; fields without one change the model's own.
    Where types of layers have settings of their own (Gemma 3), fields that name no type go to full attention.
    `max_position_embeddings` becomes the length that the scaling reaches.

    Raises:
        LRSAError: the model has no rotary positions, other types of layers, or a scaling that does not take a field.
    """
    if not rope:
        return
    text = config.get_text_config()
    own, name = getattr(text, PARAMETERS, None), type(text).__name__
    if not own:
        raise LRSAError(f"{KEY} needs rotary positions of transformers (rope_parameters), which {name} has none of.")
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
    """The parameters of transformers for a model whose own are `own`, and the number of positions that they reach."""
    rope_type = given.get("rope_type") or own.get("rope_type", "default")
    if "rope_type" in given:
        # What belongs to no scaling stays, such as theta and the part of a head that is rotated.
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
    # Llama 3.1 was trained at twice the length that its factor makes of the first one.
    return parameters, max(reach, positions) if rope_type == "llama3" else reach


_SCALING = {name for rope_type in NEEDED for name in fields_of(rope_type)} - {"rope_theta", "partial_rotary_factor"}


def check_taken(model: PreTrainedModel, rope: dict[str, Any]) -> None:
    """Raises LRSAError where no module of the model computes its positions from the settings that it was given."""
    require(
        not rope or any(hasattr(module, "rope_type") for module in model.modules()),
        f"{KEY} has no effect on {type(model).__name__}, which does not compute its positions as transformers does.",
    )


def has_factor(rope: dict[str, Any]) -> bool:
    """Whether the settings say how far they reach; a theta alone does not."""
    return "factor" in rope or any("factor" in given for given in rope.values() if isinstance(given, dict))


def check_reach(config: PreTrainedConfig, rope: dict[str, Any], key: str, length: int) -> None:
    """Warns once where `length`, the value of `key`, is beyond the model's positions and `rope` does not help."""
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
    """After `rope` without a factor, such as a theta: a model reaches what it was trained at."""
    text = config.get_text_config()
    if rope and not has_factor(rope) and getattr(text, REACH, length) < length:
        setattr(text, REACH, length)


def saved_rope(config: PreTrainedConfig) -> dict[str, Any]:
    """What `restore_rope` needs to give the base of adapters the positions that they were trained with."""
    text = config.get_text_config()
    return {name: getattr(text, name) for name in (PARAMETERS, REACH) if getattr(text, name, None)}


def restore_rope(config: PreTrainedConfig, saved: dict[str, Any]) -> None:
    """Puts what `saved_rope` gave into the configuration of a model that is not made yet, in place."""
    for name, value in saved.items():
        setattr(config.get_text_config(), name, value)
