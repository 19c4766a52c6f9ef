"""A canonical row as a conversation: its messages, the turns that are trained on, and the text that may be cut."""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

from lrsa_ds.errors import LRSAError

# A prompt contains its question, mostly at one end: at least this many tokens of it are kept.
KEPT_OF_PROMPT = 64


@dataclass(frozen=True, slots=True)
class Cuttable:
    """The part of a message that may be cut: characters `start` to `stop` of `messages[message]["content"]`.

    At least `keep` tokens of it are kept. `spared` are characters, counted from `start`, that are kept if there is
    room, such as the place of the answer.
    """

    message: int
    start: int
    stop: int
    keep: int = 0
    spared: tuple[int, int] | None = None


@dataclass(frozen=True, slots=True)
class Conversation:
    """The input of a chat template, and what is trained on.

    Args:
        messages: as the template takes them.
        trained: indices of the messages that are trained on, ascending.
        task: the kind of question.
        tools: the tools of the row, if any.
        cuttable: the text that may be cut; None: see `cuttable_before`.
    """

    messages: tuple[dict[str, Any], ...]
    trained: tuple[int, ...]
    task: str = ""
    tools: list[Any] | None = None
    cuttable: Cuttable | None = None

    def cuttable_before(self, message: int) -> Cuttable:
        """The text that may be cut before a message: the context, the prompt, or the longest text of another role."""
        if self.cuttable is not None:
            return self.cuttable
        others = [i for i in range(message) if self.messages[i]["role"] != "assistant"]
        longest = max(others, key=lambda i: len(self.messages[i]["content"]), default=0)
        length = len(self.messages[longest]["content"]) if others else 0
        return Cuttable(longest, 0, length, KEPT_OF_PROMPT)

    def answers_in(self, cuttable: Cuttable, turns: Iterable[int]) -> list[tuple[int, int]]:
        """Where the answers of these turns are in the text that may be cut: characters from its beginning.

        This is the place that the row names, or else the first occurrence of the same words, if there is one.
        """
        if cuttable.spared is not None:
            return [cuttable.spared]
        text, places = self.text_of(cuttable), []
        for turn in turns:
            answer = self.messages[turn]["content"].strip()
            start = text.find(answer) if answer else -1
            if start >= 0:
                places.append((start, start + len(answer)))
        return list(dict.fromkeys(places))

    def text_of(self, cuttable: Cuttable) -> str:
        return self.messages[cuttable.message]["content"][cuttable.start : cuttable.stop]

    def with_text(self, cuttable: Cuttable, text: str) -> "Conversation":
        """The conversation with `text` in the place of `text_of(cuttable)`."""
        messages = list(self.messages)
        content = messages[cuttable.message]["content"]
        content = content[: cuttable.start] + text + content[cuttable.stop :]
        messages[cuttable.message] = {**messages[cuttable.message], "content": content}
        return replace(self, messages=tuple(messages))


def chat_conversation(row: dict[str, Any]) -> Conversation:
    """Converts a canonical row for a chat template.

    Raises:
        LRSAError: no message is trained on.
    """
    if "messages" not in row:
        return _question(row, "", row["answer"]) if "question" in row else _continued(row)
    messages = tuple({key: value for key, value in message.items() if key != "train"} for message in row["messages"])
    trained = tuple(
        i for i, message in enumerate(row["messages"]) if message["role"] == "assistant" and message.get("train", True)
    )
    if not trained:
        raise LRSAError("nothing to learn: every message of the role assistant is marked as not trained on.")
    return Conversation(messages, trained, row["task"], row.get("tools"))


def plain_conversation(row: dict[str, Any]) -> Conversation:
    """Converts a canonical row for a model without a chat template: two messages, the second continues the first.

    The prompt of a question ends with a colon, and the answer begins with the space after it. Most tokenizers join a
    space with the word that follows: after a prompt that ends with a space, that token would never be generated.

    Raises:
        LRSAError: the row has messages.
        LRSAError: a row of messages.
    """
    if "messages" in row:
        raise LRSAError(
            "messages need a chat template: set data.chat_template=true and use a tokenizer that has one, "
            "or use prompt and completion."
        )
    if "question" not in row:
        return _continued(row)
    answer = row["answer"] if row["answer"][0].isspace() else f" {row['answer']}"
    return _question(row, "\nAnswer:", answer)


def _question(row: dict[str, Any], after: str, answer: str) -> Conversation:
    context, start = row["context"], row.get("answer_start")
    prompt = f"{context}\n\n" if context else ""
    spared = None if start is None else (start, start + len(row["answer"]))
    cuttable = Cuttable(0, 0, len(context), 0, spared)
    return _of_two(row, f"{prompt}Question: {row['question']}{after}", answer, cuttable)


def _continued(row: dict[str, Any]) -> Conversation:
    return _of_two(row, row["prompt"], row["completion"], Cuttable(0, 0, len(row["prompt"]), KEPT_OF_PROMPT))


def _of_two(row: dict[str, Any], prompt: str, answer: str, cuttable: Cuttable) -> Conversation:
    messages = ({"role": "user", "content": prompt}, {"role": "assistant", "content": answer})
    return Conversation(messages, (1,), row["task"], None, cuttable)
