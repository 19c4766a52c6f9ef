"""Contexts that are made rather than read: several questions over one text of `data.context_length` tokens."""

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple, Protocol

# Room for what the tokens of joined texts may differ from the sum of their parts.
MARGIN = 16


class Asked(NamedTuple):
    """A question, its answer, and the kind of question."""

    question: str
    answer: str
    task: str


class ContextSource(Protocol):
    """Rows that are made, for one split; picklable, the same on every rank.

    Row `index` of `epoch` is a pure function of the seed, the epoch and the index, so that any place is found again.
    """

    context_length: int  # tokens that a whole example may have: template, context, questions and answers

    def num_contexts(self, epoch: int) -> int:
        """Rows of an epoch."""

    def row(self, epoch: int, index: int, task: str | None = None, margin: int = MARGIN) -> dict[str, Any]:
        """A canonical row, see `asked_row`.

        Args:
            task: one of `tasks`, or None for what training draws.
            margin: tokens of `context_length` that the estimate leaves free.
        """

    def scored(self, num_examples: int) -> Iterable[tuple[int, str | None]]:
        """Index and task of the rows that answers are scored on; `num_examples` is `eval.num_examples`."""

    def fingerprint(self) -> str:
        """What the rows are made of."""


def asked_row(context: str, asked: Sequence[Asked]) -> dict[str, Any]:
    """A canonical row: one question over a context, or several as turns of a conversation, all of which are trained.

    Its task is that of the questions, or "mixed" where they have several.
    """
    tasks = {question.task for question in asked}
    task = tasks.pop() if len(tasks) == 1 else "mixed"
    if len(asked) == 1:
        return {"context": context, "question": asked[0].question, "answer": asked[0].answer, "task": task}
    messages: list[dict[str, Any]] = []
    for number, question in enumerate(asked):
        before = f"{context}\n\n" if number == 0 and context else ""
        messages.append({"role": "user", "content": f"{before}Question: {question.question}"})
        messages.append({"role": "assistant", "content": question.answer, "train": True})
    return {"messages": messages, "task": task}
