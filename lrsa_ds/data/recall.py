"""Contexts of the user's own text, with questions that are answered by the text itself."""

import random
from collections.abc import Callable, Sequence
from itertools import accumulate
from typing import Any

import numpy as np

from lrsa_ds.data.contexts import MARGIN, asked_row
from lrsa_ds.data.lengths import TokenCounts
from lrsa_ds.data.recall_questions import Recalled, RecallText
from lrsa_ds.data.recall_texts import pieces_of
from lrsa_ds.errors import LRSAError
from lrsa_ds.settings.data import RECALL_TASKS

# Text is added to and removed from a context in pieces: this fraction of its tokens, in characters, within limits.
_PIECES, _LEAST_CHARACTERS, _MOST_CHARACTERS = 16, 64, 1000
# A piece is cut, or left out if fewer tokens than this would remain of it.
_LEAST_TOKENS = 16
# A text serves a task if one of this many contexts has a question of it; a row tries more contexts before it fails.
_CONTEXTS_LOOKED_INTO, _CONTEXTS_TRIED = 6, 100
_DRAWS = 4  # draws for each question of a context


class RecallContexts:
    """Contexts of `context_length` tokens of consecutive text, for one split; see `ContextSource`.

    A context begins at a random place of a random excerpt and continues with other excerpts, in random order, until it
    is full. Its questions are drawn from its text.

    Args:
        excerpts: the text asked about.
        others: more text, used after `excerpts` if they do not fill a context.
        tasks: the tasks that questions are drawn from, uniformly; None: all tasks that the text serves.
        name: the split; it determines a row together with the seed, the epoch and the index.
        frame_length: the number of tokens of a canonical row when it is encoded.
        label: the setting that names the data, for errors.

    Raises:
        LRSAError: there is too little text for a context, the text does not serve a task, or no context holds
            `questions_per_context` questions.
    """

    def __init__(
        self,
        excerpts: Sequence[str],
        others: Sequence[str],
        tasks: list[str] | None,
        name: str,
        seed: int,
        context_length: int,
        num_examples: int,
        questions_per_context: int,
        counts: TokenCounts,
        frame_length: Callable[[dict[str, Any]], int],
        label: str,
        fingerprint: str,
    ):
        self.excerpts, self.others = list(excerpts), list(others)
        self.name, self.seed, self.label, self._fingerprint = name, seed, label, fingerprint
        self.context_length, self.num_examples = context_length, num_examples
        self.questions_per_context = questions_per_context
        self.counts, self.frame_length = counts, frame_length
        self.piece_characters = min(max(context_length // _PIECES, _LEAST_CHARACTERS), _MOST_CHARACTERS)
        self._check_length()
        served = [task for task in RECALL_TASKS if self._serves(task)]
        self.tasks = served if tasks is None else list(tasks)
        if not self.tasks or not set(self.tasks) <= set(served):
            raise LRSAError(
                f"data.recall_tasks={'null' if tasks is None else self.tasks}: the text of {label} serves "
                f"{', '.join(served) or 'none'} in contexts of {context_length} tokens; choose among them, "
                "raise data.context_length or add texts."
            )
        self._check_number_of_questions()

    def num_contexts(self, epoch: int) -> int:
        return self.num_examples

    def scored(self, num_examples: int) -> list[tuple[int, str]]:
        return [(index, task) for task in self.tasks for index in range(num_examples)]

    def fingerprint(self) -> str:
        return f"{self.num_examples} contexts of {', '.join(self.tasks)} over {self._fingerprint}"

    def row(self, epoch: int, index: int, task: str | None = None, margin: int = MARGIN) -> dict[str, Any]:
        for attempt in range(_CONTEXTS_TRIED):
            rng = random.Random(f"{self.name} {self.seed} {epoch} {index} {task} {attempt}")
            pieces, num_own = self._pieces(rng)
            questions = self._draw(pieces, num_own, task, rng)
            if (row := self._fitted(pieces, questions, margin, rng)) is not None:
                return row
        raise LRSAError(
            f"{self.label} serves no question of data.recall_tasks={[task] if task else self.tasks} that fits into "
            f"{self.context_length} tokens: raise data.context_length, or leave the task out."
        )

    def _pieces(self, rng: random.Random) -> tuple[list[str], int]:
        """Pieces of text with at least `context_length` tokens in total, and how many of them may be asked about."""
        pieces: list[str] = []
        total, num_own = 0, 0
        order = np.random.default_rng(rng.randrange(2**63))
        for texts in (self.excerpts, self.others):
            for number in order.permutation(len(texts)).tolist():
                found = pieces_of(texts[number], self.piece_characters)
                lengths = self.counts.count(found)
                start = 0
                if not pieces:  # start no later than where the rest of the excerpt still fills the context
                    behind = np.cumsum(lengths[::-1])[::-1]
                    start = rng.randrange(max(1, int((behind >= self.context_length).sum())))
                pieces += found[start:]
                total += int(lengths[start:].sum())
                if total >= self.context_length:
                    return pieces, num_own or len(pieces)
            num_own = num_own or len(pieces)
        return pieces, num_own

    def _draw(self, pieces: list[str], num_own: int, task: str | None, rng: random.Random) -> list[Recalled]:
        """Different questions about the first `num_own` pieces: `questions_per_context`, or as many as there are."""
        text = RecallText("".join(pieces), sum(map(len, pieces[:num_own])))
        found: dict[tuple, Recalled] = {}
        for _ in range(_DRAWS * self.questions_per_context):
            if len(found) == self.questions_per_context:
                break
            if (drawn := text.draw(task or rng.choice(self.tasks), rng)) is not None:
                found.setdefault(drawn.spans, drawn)
        return list(found.values())

    def _fitted(
        self, pieces: list[str], questions: list[Recalled], margin: int, rng: random.Random
    ) -> dict[str, Any] | None:
        """A row with the first questions: as many as fit with the pieces that they need; None if none fits."""
        lengths, from_end = self.counts.count(pieces), rng.random() < 0.5
        found, low, high = None, 1, len(questions)
        count = high  # usually all fit
        while low <= high:
            asked = [question.asked for question in questions[:count]]
            room = self.context_length - self.frame_length(asked_row("", asked)) - margin
            needed = _needed(pieces, questions[:count])
            if lengths[needed].sum() <= room:
                found = asked_row(self._filled(pieces, lengths, needed, room, from_end), asked)
                low = count + 1
            else:
                high = count - 1
            count = (low + high) // 2
        return found

    def _filled(self, pieces: list[str], lengths: np.ndarray, needed: np.ndarray, room: int, from_end: bool) -> str:
        """Joins the pieces. Those not needed are removed from one end until the text fits; the last of them is cut."""
        kept, excess = np.ones(len(pieces), dtype=bool), int(lengths.sum()) - room
        texts = list(pieces)
        removable = np.flatnonzero(~needed)
        for place in removable[::-1] if from_end else removable:
            if excess <= 0:
                break
            excess -= int(lengths[place])
            kept[place] = False
            if -excess > _LEAST_TOKENS and (rest := self.counts.beginning(pieces[place], -excess - 2).strip()):
                texts[place], kept[place] = f"{rest}\n\n", True
        return "".join(text for text, stays in zip(texts, kept, strict=True) if stays).strip()

    def _serves(self, task: str) -> bool:
        """Whether one of a few contexts has a question of the task."""
        for number in range(_CONTEXTS_LOOKED_INTO):
            rng = random.Random(f"{self.name} {self.seed} {task} {number}")
            pieces, num_own = self._pieces(rng)
            if self._fitted(pieces, self._draw(pieces, num_own, task, rng), MARGIN, rng) is not None:
                return True
        return False

    def _check_number_of_questions(self) -> None:
        most, several = 0, self.questions_per_context
        for index in range(_CONTEXTS_LOOKED_INTO):
            most = max(most, len(self.row(0, index).get("messages", ())) // 2 or 1)
            if most == several:
                return
        raise LRSAError(
            f"data.questions_per_context={several} is more than fits: a context of {self.context_length} tokens of "
            f"{self.label} holds at most {most} questions with the text that they are about."
        )

    def _check_length(self) -> None:
        total = 0
        for text in (*self.excerpts, *self.others):
            total += int(self.counts.count([text])[0])
            if total >= self.context_length:
                return
        raise LRSAError(
            f"{self.label} holds {total:,} tokens to train on, too few for a context of {self.context_length}: lower "
            "data.context_length or add texts."
        )


def _needed(pieces: list[str], questions: list[Recalled]) -> np.ndarray:
    """For each piece, whether a question is about some of its text: bool [pieces]."""
    stops = list(accumulate(map(len, pieces)))
    needed = np.zeros(len(pieces), dtype=bool)
    for first, last in (span for question in questions for span in question.spans):
        low, high = np.searchsorted(stops, [first + 1, last])
        needed[low : high + 1] = True
    return needed
