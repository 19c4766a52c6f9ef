"""Finds all mistakes of a command line; Hydra raises only the first one."""

from collections.abc import Sequence

from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import HydraException, MissingConfigException, OverrideParseException
from omegaconf.errors import OmegaConfBaseException

from launch.cli.checkout import CONF
from launch.cli.plugins import typed_with_plugins
from launch.cli.sentences import hydra_sentence, quoted
from lrsa_ds.errors import LRSAError, all_of, sentences_of

Found = LRSAError | HydraException | OmegaConfBaseException


def every_mistake(error: Found, overrides: Sequence[str], name: str, schema: type) -> LRSAError:
    """The error for `error`, which composing `overrides` raised, and for the mistakes after it.

    Repeatedly, the argument that an error names is corrected or left out, and the rest is composed again.
    """
    sentences, keys, left = [hydra_sentence(error, schema)], [], list(overrides)
    while (wrong := _argument_of(error, left)) is not None:
        key = _key(wrong)
        keys.append(key)
        place = left.index(wrong)
        is_unreadable = isinstance(error, OverrideParseException) and "=" in wrong
        left[place : place + 1] = [f"{wrong.partition('=')[0]}={quoted('x')}"] if is_unreadable else []
        found = _first_mistake(left, name, schema)
        if found is None:
            break
        error = found
        more = sentences_of(found) if isinstance(found, LRSAError) else [hydra_sentence(found, schema)]
        # What names one of these arguments may be wrong only because that is missing.
        sentences += [sentence for sentence in more if not any(key in sentence for key in keys)]
    return all_of(sentences)


def _first_mistake(overrides: list[str], name: str, schema: type) -> Found | None:
    GlobalHydra.instance().clear()
    try:
        with initialize_config_dir(str(CONF), version_base="1.3"):
            typed_with_plugins(compose(name, overrides), schema)
    except (LRSAError, HydraException, OmegaConfBaseException) as error:
        return error
    return None


def _argument_of(error: Found, overrides: list[str]) -> str | None:
    """The argument that Hydra refuses; None if the error is about a file, or about values that conflict."""
    if isinstance(error, (MissingConfigException, LRSAError)) and not isinstance(
        error.__cause__, OmegaConfBaseException
    ):
        return None
    if isinstance(error, OverrideParseException):
        return error.override if error.override in overrides else None
    chain = [error, error.__cause__]
    named = {getattr(found, "full_key", None) for found in chain}
    text = " ".join(str(found) for found in chain)
    for override in overrides:
        if _key(override) in named or f"'{_key(override)}'" in text or f"'{override}'" in text:
            return override
    return None


def _key(override: str) -> str:
    return override.lstrip("+~").partition("=")[0]
