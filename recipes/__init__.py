"""Procedures: how documents and questions become tokens and labels. `procedure` names one of them, or one of yours."""

from typing import cast

from lrsa_ds.data.procedure import Procedure
from lrsa_ds.errors import require
from recipes.user_code import import_code

PROCEDURES = {"qa": "recipes.qa"}


def load_procedure(name: str) -> Procedure:
    """The procedure of a run; see `lrsa_ds.data.procedure` for what it has to have.

    Args:
        name: one of `PROCEDURES`, or what `import_code` takes.

    Raises:
        LRSAError: there is no such module or file, it cannot be imported, or it has no function `prepare`.
    """
    module = import_code(f"procedure={name!r}", PROCEDURES.get(name, name), known=" or ".join(PROCEDURES))
    require(
        callable(getattr(module, "prepare", None)),
        f"procedure={name!r} has no function prepare(config, tokenizer): see lrsa_ds/data/procedure.py.",
    )
    return cast(Procedure, module)
