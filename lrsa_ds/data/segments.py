"""A row as segments of text: what is learnt, what may be cut, and what the template or the question fixes.

A chat template is rendered with placeholders as contents and split at them. So every segment is tokenized and labelled
for itself, and the template needs no markers of its own for what the assistant says.
"""

from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from jinja2.exceptions import TemplateError

from lrsa_ds.data.tokenizer import Tokenizer
from lrsa_ds.errors import LRSAError

FIXED, CUTTABLE, TARGET, END = "fixed", "cuttable", "target", "end"
# A prompt holds its question somewhere, mostly at one end: this many tokens of it stay.
KEPT_OF_PROMPT = 64


@dataclass(frozen=True, slots=True)
class Segment:
    """A piece of text and what happens to its tokens.

    Args:
        text: the piece.
        kind: FIXED; CUTTABLE (tokens may be taken out of its middle); TARGET (to be predicted); or END, what follows
            a target: to be predicted up to and including the first special token, which ends the turn.
        keep: tokens of a CUTTABLE segment that have to stay.
    """

    text: str
    kind: str
    keep: int = 0


def plain_segments(row: dict[str, Any]) -> list[Segment]:
    """A canonical row of questions or prompts for a model without a chat template; the end is left to the caller."""
    if "question" in row:
        return [
            Segment(row["context"], CUTTABLE),
            Segment(f"\n\nQuestion: {row['question']}\nAnswer: ", FIXED),
            Segment(row["answer"], TARGET),
            Segment("", END),
        ]
    return [
        Segment(row["prompt"], CUTTABLE, KEPT_OF_PROMPT),
        Segment(row["completion"], TARGET),
        Segment("", END),
    ]


def chat_segments(row: dict[str, Any], tokenizer: Tokenizer) -> list[Segment]:
    """A canonical row as the tokenizer's chat template renders it: the texts joined are exactly that.

    Raises:
        LRSAError: the template refuses the messages (a role it does not know, say), or changes their contents by more
            than stripping white space.
    """
    _refuse_what_is_not_rendered(row)
    roles, contents = zip(*_turns(row), strict=True)
    texts = ["".join(segment.text for segment in content) for content in contents]
    pieces = _template_pieces(tokenizer, roles)
    rendered = _render(tokenizer, roles, texts)
    segments = [Segment(pieces[0], FIXED)]
    position = 0
    for content, text, (before, after) in zip(contents, texts, pairwise(pieces), strict=True):
        position += len(before)
        start, stop = _span_after_stripping(rendered, position, text, after)
        segments += _sliced(content, start, stop)
        segments.append(Segment(after, END if content[-1].kind == TARGET else FIXED))
        position += stop - start
    return _merged(segments)


def _refuse_what_is_not_rendered(row: dict[str, Any]) -> None:
    fields = ("reasoning_content", "tool_calls")
    found = [key for key in fields if any(key in message for message in row.get("messages", ()))]
    found += [key for key in ("tools",) if key in row]
    if found:
        raise LRSAError(f"messages with {found[0]} are not supported: write it into content.")


def _turns(row: dict[str, Any]) -> list[tuple[str, list[Segment]]]:
    """Roles, and their contents as segments. Of a conversation, the longest content not to be learnt may be cut."""
    if "question" in row:
        question = Segment(f"Question: {row['question']}", FIXED)
        context = [Segment(row["context"], CUTTABLE), Segment("\n\n", FIXED)] if row["context"] else []
        return [("user", [*context, question]), ("assistant", [Segment(row["answer"], TARGET)])]
    if "prompt" in row:
        prompt = Segment(row["prompt"], CUTTABLE, KEPT_OF_PROMPT)
        return [("user", [prompt]), ("assistant", [Segment(row["completion"], TARGET)])]
    messages = row["messages"]
    others = [i for i, message in enumerate(messages) if message["role"] != "assistant"]
    longest = max(others, key=lambda i: len(messages[i]["content"]), default=None)
    turns = []
    for i, message in enumerate(messages):
        kind = TARGET if message.get("train") else CUTTABLE if i == longest else FIXED
        turns.append((message["role"], [Segment(message["content"], kind, KEPT_OF_PROMPT)]))
    return turns


def _render(tokenizer: Tokenizer, roles: tuple[str, ...], texts: list[str]) -> str:
    messages = [{"role": role, "content": text} for role, text in zip(roles, texts, strict=True)]
    try:
        return tokenizer.apply_chat_template(messages, tokenize=False)
    except TemplateError as error:
        raise LRSAError(
            f"the chat template refuses the roles {', '.join(roles)} ({error}): change the messages, "
            "or set data.chat_template=false for rows that are not messages."
        ) from error


def _template_pieces(tokenizer: Tokenizer, roles: tuple[str, ...]) -> list[str]:
    """What the template puts before the first content, between two, and after the last: one more than contents."""
    placeholders = [f"xPLACEHOLDERx{i}x" for i in range(len(roles))]
    rest = _render(tokenizer, roles, placeholders)
    pieces = []
    for placeholder in placeholders:
        piece, found, rest = rest.partition(placeholder)
        if not found:
            raise LRSAError(f"the chat template drops or reorders messages of the roles {', '.join(roles)}.")
        pieces.append(piece)
    return [*pieces, rest]


def _span_after_stripping(rendered: str, position: int, text: str, after: str) -> tuple[int, int]:
    """The part of `text` that stands in `rendered` at `position`, followed by `after`: all of it, or stripped."""
    left = len(text) - len(text.lstrip())
    right = max(len(text.rstrip()), left)
    for start, stop in ((0, len(text)), (left, right), (left, len(text)), (0, right)):
        if rendered.startswith(text[start:stop] + after, position):
            return start, stop
    raise LRSAError(f"the chat template changes the content that starts with {text.strip()[:40]!r}.")


def _sliced(content: list[Segment], start: int, stop: int) -> list[Segment]:
    """The characters from `start` to `stop` of the content's text, still in segments."""
    sliced = []
    offset = 0
    for segment in content:
        text = segment.text[max(start - offset, 0) : max(stop - offset, 0)]
        sliced.append(Segment(text, segment.kind, segment.keep))
        offset += len(segment.text)
    return sliced


def _merged(segments: list[Segment]) -> list[Segment]:
    """Neighbouring fixed texts as one, so that they are tokenized as they would be in the whole."""
    merged: list[Segment] = []
    for segment in segments:
        if merged and merged[-1].kind == segment.kind == FIXED:
            segment = Segment(merged.pop().text + segment.text, FIXED)
        merged.append(segment)
    return merged
