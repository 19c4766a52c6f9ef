"""The user's code that a setting names: a module, or the path of a .py file."""

import os
import sys
from importlib import import_module
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from traceback import extract_tb
from types import ModuleType

from lrsa_ds.errors import LRSAError, require


def import_code(setting: str, name: str, known: str = "") -> ModuleType:
    """Imports the module that a setting names; a module that was imported already is returned.

    Args:
        setting: the key and its value, for errors.
        name: the path of a .py file, or a module on Python's path or in the working directory.
        known: other values of the setting, for errors, such as "qa".

    Raises:
        LRSAError: there is no such module or file, or it cannot be imported.
    """
    valid = " or ".join(
        filter(None, [known, "a module that can be imported (package.module)", "the path of a .py file"])
    )
    try:
        return _from_file(setting, name, valid) if name.endswith(".py") else _from_module(setting, name, valid)
    except LRSAError:
        raise
    except Exception as error:  # the code of others may raise anything
        place = extract_tb(error.__traceback__)[-1]
        what = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else 'no message'}"
        raise LRSAError(f"{setting} cannot be imported ({what}; {place.filename}, line {place.lineno}).") from error


def _from_file(setting: str, name: str, valid: str) -> ModuleType:
    path = Path(name).expanduser().resolve()
    require(path.is_file(), f"{setting} does not exist: give {valid}.")
    _also_search(str(path.parent))
    spec = spec_from_file_location(f"user_code_{path.stem}", path)
    assert spec is not None  # as for any .py file
    assert spec.loader is not None
    known = sys.modules.get(spec.name)
    if known is not None and known.__file__ == str(path):
        return known
    module = module_from_spec(spec)
    sys.modules[spec.name] = module  # where pickle looks for its classes
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[spec.name]
        raise
    return module


def _from_module(setting: str, name: str, valid: str) -> ModuleType:
    _also_search(os.getcwd())
    try:
        return import_module(name)
    except ModuleNotFoundError as error:
        is_itself = error.name is not None and f"{name}.".startswith(f"{error.name}.")
        require(not is_itself, f"{setting} is not valid: give {valid}.")
        raise


def _also_search(folder: str) -> None:
    if folder not in sys.path:
        sys.path.append(folder)
