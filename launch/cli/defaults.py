"""Defaults that do not fit the values that were typed: they are lowered, and the change is printed."""

from collections.abc import Sequence

from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import DictConfig

from lrsa_ds.settings.data import makes_contexts
from lrsa_ds.settings.run import shortened_warmup


def fit_defaults(composed: DictConfig, overrides: Sequence[str]) -> dict[str, str]:
    """Lowers defaults of files in `conf/` that do not fit the values that were typed.

    Args:
        composed: a configuration of `launch/train.py`, changed in place.
        overrides: the command line. Values in it are never changed.

    Returns:
        A note for each key that was lowered.
    """
    notes = {}
    steps, warmup = composed.optim.num_steps, composed.optim.warmup_steps
    is_warmup_typed = _is_typed("optim.warmup_steps", overrides)
    if composed.optim.get("num_epochs") is not None:
        # The number of steps is known only when the data are read.
        composed.optim.shorten_warmup |= not is_warmup_typed
    elif 0 < steps < warmup and not is_warmup_typed:
        composed.optim.warmup_steps = fewer = shortened_warmup(steps)
        notes["optim.warmup_steps"] = (
            f"optim.warmup_steps={fewer} (its default, {warmup}, is more than optim.num_steps={steps})"
        )
    several = composed.data.get("questions_per_context", 1) > 1
    sources = [composed.data, *(composed.data.get("sources") or ())]
    if several and not any(map(makes_contexts, sources)) and not _is_typed("data.questions_per_context", overrides):
        composed.data.questions_per_context = 1  # a value of the recipe, for generated contexts only
    if not _is_typed("eval.num_examples", overrides) and not _is_typed("eval.allow_fewer", overrides):
        composed.eval.allow_fewer = True  # the number of rows is known only when the data are read
    return notes


def _is_typed(key: str, overrides: Sequence[str]) -> bool:
    """Whether an override sets `key`, or a dictionary that contains it."""
    for override in OverridesParser.create().parse_overrides(list(overrides)):
        if override.key_or_group == key:
            return True
        if key.startswith(f"{override.key_or_group}.") and isinstance(override.value(), dict):
            return True
    return False
