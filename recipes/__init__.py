"""Procedures: how documents and questions become tokens and labels. `conf/` names one of them in `procedure`."""

from importlib import import_module
from types import ModuleType

from lrsa_ds.errors import LRSAError

PROCEDURES = {"qa": "recipes.qa"}


def load_procedure(name: str) -> ModuleType:
    """The module of a procedure: it has `prepare(config, tokenizer)`.

    Raises:
        LRSAError: there is no procedure of that name.
    """
    if name not in PROCEDURES:
        raise LRSAError(f"procedure={name!r} is not valid: choose one of {', '.join(PROCEDURES)}.")
    return import_module(PROCEDURES[name])
