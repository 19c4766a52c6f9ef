"""What a run asks of a procedure and of its data: the interface of an extension.

A procedure is a module (or any object) with one function, `prepare`. `recipes/qa.py` is the one that ships with the
program; `procedure=package.module` or `procedure=path/to/file.py` names another one, from anywhere. One whose rows only
have other columns is short:

    from recipes import qa

    def to_row(row):  # a row as the file or the data set holds it, to one of the shapes of lrsa_ds.data.shapes
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
    """The data of a run: what `TrainingRows` has, and the two below. `data.num_workers=1` hands it to another process.

    Data may also have what helps the report before training (see `lrsa_ds.data.survey`): `num_rows` and `num_bad_rows`
    of an epoch, and `row_order(epoch)`, the indices of its rows in their order, if every epoch has the same rows.
    """

    def validation_examples(self) -> list[Example]:
        """What answers are scored on, at least one; the same on every rank. `Example.task` groups the scores."""

    def fingerprint(self) -> str:
        """What the training rows are: a run that is resumed refuses data with another fingerprint,
        unless `checkpoint.accept_data_change` is set."""


class Procedure(Protocol):
    """How the rows of `config.data` become tokens and labels."""

    def prepare(self, config: TrainConfig, tokenizer: Tokenizer) -> RunData:
        """The data of a run, read and checked on every rank, before there is a process group.

        Raises:
            LRSAError: the data cannot be used; one sentence that names the key or the place of the row.
        """


def prepare_data(procedure: Procedure, config: TrainConfig, tokenizer: Tokenizer) -> RunData:
    """What `procedure.prepare` returns.

    Raises:
        LRSAError: it lacks something that a run uses, or what `prepare` raises.
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
