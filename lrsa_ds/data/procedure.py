"""The interface between a run and an extension: a procedure and its data.

A procedure is a module (or any object) with a function `prepare`. `recipes/qa.py` is the procedure of this package;
`procedure=package.module` or `procedure=path/to/file.py` names another one. A procedure whose rows only have other
columns is short:

    from recipes import qa

    def to_row(row):  # to one of the shapes of lrsa_ds.data.shapes
        return {"context": row["body"], "question": row["ask"], "answer": row["reply"], "task": "support"}

    def prepare(config, tokenizer):
        return qa.prepare(config, tokenizer, to_row)
"""

from typing import Protocol

from lrsa_ds.config import TrainConfig
from lrsa_ds.data.packing import Example
from lrsa_ds.data.stream import TrainingRows
from lrsa_ds.data.tokenizer import Tokenizer
from lrsa_ds.errors import require


class RunData(TrainingRows, Protocol):
    """The data of a run: `TrainingRows` and the two methods below. `data.num_workers=1` pickles it for another process.

    Optional attributes improve the report before training (see `lrsa_ds.data.survey`): `num_rows` and `num_bad_rows` of
    an epoch, and, if every epoch has the same rows, `row_order(epoch)`, the indices of the rows in order.
    """

    def validation_examples(self) -> list[Example]:
        """The examples for scoring, at least one; the same on every rank. `Example.task` groups the scores."""

    def fingerprint(self) -> str:
        """Identifies the training rows.

        A resumed run refuses data with another fingerprint, unless `checkpoint.accept_data_change` is set.
        """


class Procedure(Protocol):
    """Converts the rows of `config.data` to tokens and labels."""

    def prepare(self, config: TrainConfig, tokenizer: Tokenizer) -> RunData:
        """The data of a run, read and checked on every rank, before there is a process group.

        Raises:
            LRSAError: the data cannot be used; one sentence that names the key or the place of the row.
        """


def prepare_data(procedure: Procedure, config: TrainConfig, tokenizer: Tokenizer) -> RunData:
    """Calls `procedure.prepare` and checks the result.

    Raises:
        LRSAError: the data lack a member that a run uses, or `prepare` raises it.
    """
    data = procedure.prepare(config, tokenizer)
    members = _members(TrainingRows) + _members(RunData)
    missing = [name for name in members if not hasattr(data, name)]
    require(
        not missing,
        f"procedure={config.procedure!r}: the {type(data).__name__} that its prepare() returned lacks "
        f"{', '.join(missing)}; a run uses {', '.join(members)} (see lrsa_ds/data/procedure.py).",
    )
    return data


def _members(protocol: type) -> list[str]:
    return [name for name in {**protocol.__annotations__, **vars(protocol)} if not name.startswith("_")]
