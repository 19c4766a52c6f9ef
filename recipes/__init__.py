"""Procedures: they convert documents and questions to tokens and labels. `procedure` names one, or your own."""

from typing import cast

from lrsa_ds.data.procedure import Procedure
from lrsa_ds.errors import require
from recipes.user_code import import_code

PROCEDURES = {"qa": "recipes.qa"}


def load_procedure(name: str) -> Procedure:
    """The procedure of a run; see `lrsa_ds.data.procedure` for the interface.

    Args:
        name: one of `PROCEDURES`, or a name for `import_code`.

    Raises:
        LRSAError: there is no such module or file, it cannot be imported, or it has no function `prepare`.
    """
    module = import_code(f"procedure={name!r}", PROCEDURES.get(name, name), known=" or ".join(PROCEDURES))
    require(
        callable(getattr(module, "prepare", None)),
        f"procedure={name!r} has no function prepare(config, tokenizer): see lrsa_ds/data/procedure.py.",
    )
    return cast(Procedure, module)
