"""Rotary positions (`model.rope`): the scalings of transformers with their own names and fields, and their limits."""

from typing import Any

from lrsa_ds.errors import require, require_one_of, require_whole

KEY = "model.rope"
# Required and optional fields of every scaling. A missing required field is an error, except
# original_max_position_embeddings, which the model has. `dynamic` and `longrope` depend on the length of a pass.
SHARED = ("rope_type", "rope_theta")
NEEDED: dict[str, tuple[str, ...]] = {
    "default": (),
    "linear": ("factor",),
    "yarn": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor"),
    "proportional": (),
}
OPTIONAL: dict[str, tuple[str, ...]] = {
    "default": (),
    "linear": (),
    "yarn": (
        "original_max_position_embeddings",
        "attention_factor",
        "beta_fast",
        "beta_slow",
        "mscale",
        "mscale_all_dim",
        "truncate",
    ),
    "llama3": ("original_max_position_embeddings",),
    "proportional": ("factor", "partial_rotary_factor"),
}


def fields_of(rope_type: str) -> tuple[str, ...]:
    return (*SHARED, *NEEDED[rope_type], *OPTIONAL[rope_type])


def by_layers(rope: dict[str, Any]) -> bool:
    """Whether settings are given for each type of layer, such as {full_attention: {...}}, rather than for all."""
    return bool(rope) and all(isinstance(value, dict) for value in rope.values())


def check_rope(rope: dict[str, Any]) -> None:
    """Raises LRSAError for an unknown type or field, a missing field, or a wrong value."""
    groups = {f"{KEY}.{layers}": given for layers, given in rope.items()} if by_layers(rope) else {KEY: rope}
    for key, given in groups.items():
        rope_type = given.get("rope_type")
        if rope_type is not None:
            require(
                rope_type not in ("dynamic", "longrope"),
                f"{key}.rope_type={rope_type} has frequencies that depend on the length of each pass, so documents, "
                f"chunks and ranks would not agree: choose one of {', '.join(NEEDED)}.",
            )
            require_one_of(f"{key}.rope_type", rope_type, tuple(NEEDED))
            if rope_type in NEEDED:  # go on only with a type that is known, where all mistakes are collected
                check_fields(key, given, rope_type)
        _check_values(key, given)


def check_fields(key: str, given: dict[str, Any], rope_type: str) -> None:
    """Raises LRSAError for fields that `rope_type` does not have, and for missing ones."""
    for name in given:
        require(
            name in fields_of(rope_type),
            f"{key}.{name} is not a field of rope_type={rope_type}: it takes {', '.join(fields_of(rope_type))}.",
        )
    missing = [name for name in NEEDED[rope_type] if given.get(name) is None]
    require(not missing, f"{key} with rope_type={rope_type} needs {' and '.join(missing)}.")


def _check_values(key: str, given: dict[str, Any]) -> None:
    known = dict.fromkeys(name for rope_type in NEEDED for name in fields_of(rope_type))
    for name, value in given.items():
        if name == "rope_type":
            continue
        if name == "original_max_position_embeddings":
            require_whole(f"{key}.{name}", value, 1)
        elif name == "truncate":
            require_one_of(f"{key}.{name}", value, (True, False))
        elif name == "partial_rotary_factor":
            _require_number(f"{key}.{name}", value, lambda x: 0 < x <= 1, "above 0 and at most 1")
        elif name == "factor":
            _require_number(f"{key}.{name}", value, lambda x: x >= 1, "of at least 1")
        elif name in known:
            _require_number(f"{key}.{name}", value, lambda x: x > 0, "above 0")
        else:
            require(False, f"{key}.{name} is not a field of rotary positions: valid are {', '.join(known)}.")
    _require_order(key, given, "beta_slow", 1.0, "beta_fast", 32.0)
    _require_order(key, given, "low_freq_factor", None, "high_freq_factor", None)


def _require_number(key: str, value: Any, holds, limits: str) -> None:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    require(number and holds(value), f"{key}={value!r} is not valid: give a number {limits}.")


def _require_order(
    key: str, given: dict[str, Any], low: str, default_low: float | None, high: str, default_high: float | None
) -> None:
    lower, higher = given.get(low, default_low), given.get(high, default_high)
    if isinstance(lower, int | float) and isinstance(higher, int | float):
        require(lower < higher, f"{key}.{low}={lower:g} has to be below {key}.{high}={higher:g}.")
