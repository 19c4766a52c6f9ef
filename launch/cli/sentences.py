"""Hydra's errors as one sentence that names the key and the valid values."""

import re
import shlex

from hydra.errors import MissingConfigException, OverrideParseException
from omegaconf.errors import OmegaConfBaseException

from lrsa_ds.config import TrainConfig, config_sentence
from lrsa_ds.errors import LRSAError

_QUOTES = "'\""


def hydra_sentence(error: Exception, schema: type = TrainConfig) -> str:
    """One sentence for an error of ours, of OmegaConf or of Hydra; `schema` is the root of the configuration."""
    if isinstance(error, LRSAError):
        return str(error)
    if isinstance(error, OverrideParseException):
        return _unreadable(error.override)
    if isinstance(error, MissingConfigException) and error.options is not None:
        return f"there is no {error.missing_cfg_file}; valid here: {', '.join(sorted(error.options))}."
    for found in (error, error.__cause__):
        if isinstance(found, OmegaConfBaseException):
            return config_sentence(found, schema)
    return " ".join(str(error).split())


def _unreadable(typed: str) -> str:
    """What is wrong with an argument that Hydra's grammar does not accept, and how to write it."""
    key, equals, value = typed.partition("=")
    if not equals:
        return f"{typed} is no setting: write KEY=VALUE, such as {typed.lstrip('+')}=1."
    if value.lstrip().startswith(("[", "{")):
        return (
            f"{key}: {value} cannot be read: close every bracket, and put quotes around each text with a character "
            "such as = ( # ~ ' or a letter that is not English, as in \"data.columns={context: 'a=b'}\"."
        )
    written = f"{key}={quoted(value.strip(_QUOTES))}"
    in_shell = f'"{written}"' if not set(written) & set('"$`\\!') else shlex.quote(written)
    return (
        f"{key}: the value {value} cannot be read: a text with a character such as = ( # ~ ' or a letter that is not "
        f"English needs quotes inside those of the shell: {in_shell}."
    )


def quoted(value: object) -> str:
    """A value in the form that Hydra parses back to the same value, for any characters."""
    # A backslash is literal, except before a quote and at the end.
    return "'" + re.sub(r"(\\*)('|$)", lambda found: found[1] * 2 + found[2].replace("'", r"\'"), str(value)) + "'"
