"""Procedures: how documents and questions become tokens and labels. `procedure` names one of them, or one of yours."""

import os
import sys
from importlib import import_module
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from traceback import extract_tb
from types import ModuleType
from typing import cast

from lrsa_ds.data.procedure import Procedure
from lrsa_ds.errors import LRSAError, require

PROCEDURES = {"qa": "recipes.qa"}


def load_procedure(name: str) -> Procedure:
    """The procedure of a run; see `lrsa_ds.data.procedure` for what it has to have.

    Args:
        name: one of `PROCEDURES`, the path of a .py file, or a module, which is searched for where Python searches and
            in the working directory.

    Raises:
        LRSAError: there is no such module or file, it cannot be imported, or it has no function `prepare`.
    """
    try:
        module = _from_file(name) if name.endswith(".py") else _from_module(PROCEDURES.get(name, name))
    except LRSAError:
        raise
    except Exception as error:  # the code of others may raise anything
        place = extract_tb(error.__traceback__)[-1]
        what = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else 'no message'}"
        raise LRSAError(
            f"procedure={name!r} cannot be imported ({what}; {place.filename}, line {place.lineno})."
        ) from error
    require(
        callable(getattr(module, "prepare", None)),
        f"procedure={name!r} has no function prepare(config, tokenizer): see lrsa_ds/data/procedure.py.",
    )
    return cast(Procedure, module)


def _from_file(name: str) -> ModuleType:
    path = Path(name).expanduser().resolve()
    require(path.is_file(), f"procedure={name!r} does not exist: give a .py file, a module, or {_names()}.")
    _also_search(str(path.parent))
    spec = spec_from_file_location(f"procedure_{path.stem}", path)
    assert spec is not None  # as for any .py file
    assert spec.loader is not None
    module = module_from_spec(spec)
    sys.modules[spec.name] = module  # where pickle looks for its classes
    spec.loader.exec_module(module)
    return module


def _from_module(name: str):
    _also_search(os.getcwd())
    try:
        return import_module(name)
    except ModuleNotFoundError as error:
        is_itself = error.name is not None and f"{name}.".startswith(f"{error.name}.")
        require(
            not is_itself,
            f"procedure={name!r} is not valid: give {_names()}, a module that can be imported (package.module), or the "
            "path of a .py file.",
        )
        raise


def _also_search(folder: str) -> None:
    if folder not in sys.path:
        sys.path.append(folder)


def _names() -> str:
    return " or ".join(PROCEDURES)
