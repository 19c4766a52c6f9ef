"""Generated contexts: several questions over one text of `data.context_length` tokens."""

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple, Protocol

# Tokens left free, since a joined text may have more tokens than the sum of its parts.
MARGIN = 16


class Asked(NamedTuple):
    """A question, its answer, and the kind of question."""

    question: str
    answer: str
    task: str


class ContextSource(Protocol):
    """Generated rows of one split; picklable, the same on every rank.

    Row `index` of `epoch` is a pure function of the seed, the epoch and the index, so a run can resume at any row.
    """

    context_length: int  # maximum tokens of a complete example: template, context, questions and answers

    def num_contexts(self, epoch: int) -> int:
        """Rows of an epoch."""

    def row(self, epoch: int, index: int, task: str | None = None, margin: int = MARGIN) -> dict[str, Any]:
        """A canonical row, see `asked_row`.

        Args:
            task: one of `tasks`, or None for the tasks that training draws.
            margin: tokens of `context_length` to leave free.
        """

    def scored(self, num_examples: int) -> Iterable[tuple[int, str | None]]:
        """Index and task of the rows for scoring; `num_examples` is `eval.num_examples`."""

    def fingerprint(self) -> str:
        """Identifies the material of the rows."""


def asked_row(context: str, asked: Sequence[Asked]) -> dict[str, Any]:
    """A canonical row: one question over a context, or several as turns of a conversation, all of them trained on.

    Its task is that of the questions, or "mixed" if they differ.
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
