"""Long contexts for short questions: the passages asked about, among other passages, in random order (as in RULER)."""

import random
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from lrsa_ds.data.contexts import MARGIN, Asked, asked_row
from lrsa_ds.data.lengths import TokenCounts
from lrsa_ds.data.passages import Passage
from lrsa_ds.errors import LRSAError

# The last passage of a context is cut, or left out if fewer tokens than this would remain of it.
_LEAST_TOKENS = 16
_BETWEEN = "\n\n"


class PassageContexts:
    """Contexts of `context_length` tokens over passages, for one split.

    An epoch asks every question once, in random order. A context has as many questions as fit with their passages, at
    most `questions_per_context`. The rest of it is filled with other passages, all complete except the last.

    Args:
        passages: the passages asked about; also distractors.
        others: more distractors, used after those of `passages`.
        name: the split; it determines a row together with the seed, the epoch and the index.
        frame_length: the number of tokens of a canonical row when it is encoded.
        label: the setting that names the data, for errors.

    Raises:
        LRSAError: the passages have too few tokens for a context, or no context holds so many questions.
    """

    def __init__(
        self,
        passages: Sequence[Passage],
        others: Sequence[Passage],
        name: str,
        seed: int,
        context_length: int,
        questions_per_context: int,
        counts: TokenCounts,
        frame_length: Callable[[dict[str, Any]], int],
        label: str,
        fingerprint: str,
    ):
        self.name, self.seed, self.label, self._fingerprint = name, seed, label, fingerprint
        self.context_length, self.questions_per_context = context_length, questions_per_context
        self.counts, self.frame_length = counts, frame_length
        pool = [*passages, *others]
        self.num_asked_about = len(passages)
        self.texts = [f"{passage.text}{_BETWEEN}" for passage in pool]
        self.lengths = counts.count(self.texts)
        self.asked = [(place, asked) for place, passage in enumerate(passages) for asked in passage.asked]
        frame, self.turn_lengths = self._frame_and_turns()
        # Leave some tokens free: a joined text may have more tokens than the sum of its parts.
        self.room = context_length - frame - 2 * MARGIN - context_length // 128
        needed = self.turn_lengths + self.lengths[[place for place, _ in self.asked]]
        self.too_long = [self.asked[number][1] for number in np.flatnonzero(needed > self.room)]
        self._usable = np.flatnonzero(needed <= self.room)
        self._last_plan: tuple[int, list[list[int]]] | None = None
        self._check()

    def num_contexts(self, epoch: int) -> int:
        return len(self._plan(epoch))

    def row(self, epoch: int, index: int, task: str | None = None, margin: int = MARGIN) -> dict[str, Any]:
        """See `ContextSource`; the questions of a row do not depend on the margin."""
        rng = random.Random(f"{self.name} {self.seed} {epoch} {index}")
        numbers = self._plan(epoch)[index]
        asked = [self.asked[number][1] for number in numbers]
        places = list(dict.fromkeys(self.asked[number][0] for number in numbers))
        room = self.context_length - self.frame_length(asked_row("", asked)) - margin
        texts = [self.texts[place] for place in places]
        texts += self._distractors(set(places), room - int(self.lengths[places].sum()), rng)
        rng.shuffle(texts)
        return asked_row("".join(texts).rstrip(), asked)

    def scored(self, num_examples: int) -> list[tuple[int, None]]:
        """The contexts that together ask at least `num_examples` questions."""
        rows, count = [], 0
        for index, numbers in enumerate(self._plan(0)):
            if count >= num_examples:
                break
            rows.append((index, None))
            count += len(numbers)
        return rows

    def fingerprint(self) -> str:
        return self._fingerprint

    def _plan(self, epoch: int) -> list[list[int]]:
        """For each context of an epoch, the numbers of its questions."""
        if self._last_plan is None or self._last_plan[0] != epoch:
            order = np.random.default_rng([self.seed, epoch + 1]).permutation(self._usable)
            self._last_plan = epoch, list(self._in_contexts(order.tolist()))
        return self._last_plan[1]

    def _in_contexts(self, order: list[int]) -> Iterator[list[int]]:
        """Groups consecutive questions of the order, as many as a context holds."""
        members: list[int] = []
        places: set[int] = set()
        used = 0
        for number in order:
            place = self.asked[number][0]
            added = int(self.turn_lengths[number]) + (0 if place in places else int(self.lengths[place]))
            if members and (len(members) == self.questions_per_context or used + added > self.room):
                yield members
                members, places, used = [], set(), 0
                added = int(self.turn_lengths[number] + self.lengths[place])
            members.append(number)
            places.add(place)
            used += added
        if members:
            yield members

    def _distractors(self, taken: set[int], room: int, rng: random.Random) -> list[str]:
        """Other passages in random order that fill `room` tokens, those of `passages` first; the last one is cut."""
        found = []
        own, count = self.num_asked_about, len(self.texts)
        random_order = np.random.default_rng(rng.randrange(2**63))
        order = np.concatenate([random_order.permutation(own), own + random_order.permutation(count - own)])
        for place in order.tolist():
            if place in taken:
                continue
            length = int(self.lengths[place])
            if length > room:
                if room > _LEAST_TOKENS and (text := self.counts.beginning(self.texts[place], room - 2).strip()):
                    found.append(f"{text}{_BETWEEN}")
                break
            found.append(self.texts[place])
            room -= length
        return found

    def _frame_and_turns(self) -> tuple[int, np.ndarray]:
        """Tokens around all turns, and tokens of each question with its answer and the text around: int64 [questions].

        Without a chat template there is one turn, and all the text around it counts as part of the turn.
        """
        lengths = self.counts.count([f"{asked.question} {asked.answer}" for _, asked in self.asked])
        frames = [
            self.frame_length(asked_row("", [Asked("?", "?", "qa")] * number))
            for number in range(1, 2 + (self.questions_per_context > 1))
        ]
        turn = frames[-1] - frames[0] if len(frames) > 1 else frames[0]
        return frames[0] - turn, lengths + turn

    def _check(self) -> None:
        total = int(self.lengths.sum())
        if total < self.room:
            raise LRSAError(
                f"{self.label} holds {total:,} tokens in {len(self.texts):,} passages, too few for a context of "
                f"data.context_length={self.context_length}, which needs {self.room:,}: lower data.context_length or "
                "add passages."
            )
        if len(self._usable) == 0:
            raise LRSAError(
                f"{self.label}: no question fits with its passage into data.context_length={self.context_length}: "
                "raise data.context_length."
            )
        most = max(len(numbers) for numbers in self._plan(0))
        if self.name == "train" and most < self.questions_per_context:
            raise LRSAError(
                f"data.questions_per_context={self.questions_per_context} is more than fits: a context of "
                f"data.context_length={self.context_length} tokens of {self.label} holds at most {most} questions with "
                "their passages."
            )
