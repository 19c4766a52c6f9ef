"""The shapes of rows that people have, recognised and checked.

A *row* is a dict as a file or a data set holds it. `canonical` turns it into a dict with the keys of one shape only:
`messages`, or `prompt` and `completion`, or `context`, `question` and `answer`, or `text`; and always `task`.
"""

from collections.abc import Callable
from functools import partial
from traceback import extract_tb
from typing import Any

from lrsa_ds.errors import LRSAError

ACCEPTED = "messages; prompt and completion; context, question and answer (or answers); or text"
_TASK_OF_SHAPE = {"messages": "chat", "question": "qa", "prompt": "completion", "text": "text"}


ReadRow = Callable[[Any], dict[str, Any]]
"""From a row as it was read to what is made of it; raises LRSAError for a row that cannot be used."""

ToRow = Callable[[dict[str, Any]], dict[str, Any]]
"""From a row as it was read, where a column that the row lacks may be there as None, to one in any of the shapes."""


def row_reader(columns: dict[str, str], to_row: ToRow | None = None) -> ReadRow:
    """Reads rows as `canonical` does with `columns`, after `to_row` if there is one; picklable where `to_row` is."""
    return partial(canonical, columns=columns) if to_row is None else partial(_converted, to_row, columns)


def _converted(to_row: ToRow, columns: dict[str, str], row: Any) -> dict[str, Any]:
    try:
        row = to_row(row)
    except LRSAError:
        raise
    except Exception as error:  # the code of others may raise anything
        said = f"{type(error).__name__}: {error}".splitlines()[0]
        place = extract_tb(error.__traceback__)[-1]
        raise LRSAError(f"to_row failed ({said}; {place.filename}, line {place.lineno}).") from error
    return canonical(row, columns)


def canonical(row: Any, columns: dict[str, str] | None = None) -> dict[str, Any]:
    """The row in our names, checked.

    Args:
        row: what was read. A column whose value is None counts as absent: Arrow fills None into rows of other shapes.
        columns: our name -> the name of the row's column, for the columns that are called differently.

    Raises:
        LRSAError: no shape is recognised, or something of it is missing, empty or not text. The sentence starts with
            what is wrong: the caller knows the place and puts it in front.
    """
    if not isinstance(row, dict):
        raise LRSAError(f"a row has to be an object with named columns, not {type(row).__name__}.")
    named = _renamed(row, columns or {})
    shape = next((key for key in _TASK_OF_SHAPE if key in named), None)
    if shape == "messages":
        kept = {"messages": _messages(named["messages"])}
    elif shape == "question" and "context" in named:
        kept = {
            "context": _text(named, "context", may_be_empty=True),
            "question": _text(named, "question"),
            "answer": _answer(named),
            **_answers(named),
        }
    elif shape == "prompt":
        kept = {"prompt": _text(named, "prompt"), "completion": _text(named, "completion")}
    elif shape == "text":
        kept = {"text": _text(named, "text")}
    else:
        found = ", ".join(map(str, row)) or "none"
        raise LRSAError(f"no known shape in its columns ({found}): use {ACCEPTED}, or map names with data.columns.")
    task = named.get("task")
    return {**kept, "task": task if isinstance(task, str) and task else _TASK_OF_SHAPE[shape]}


def _renamed(row: dict, columns: dict[str, str]) -> dict[str, Any]:
    for ours, theirs in columns.items():
        if theirs not in row:
            found = ", ".join(map(str, row))
            raise LRSAError(f"data.columns says that {ours} is in column {theirs!r}, and the row has only {found}.")
    # A column that was mapped away does not also serve under its own name.
    taken = set(columns.values()) | set(columns)
    named = {key: value for key, value in row.items() if key not in taken}
    named.update({ours: row[theirs] for ours, theirs in columns.items()})
    return {key: value for key, value in named.items() if value is not None}


def _text(row: dict, key: str, may_be_empty: bool = False) -> str:
    value = row.get(key)
    if value is None:
        raise LRSAError(f"{key} is missing.")
    if not isinstance(value, str):
        raise LRSAError(f"{key} has to be text, not {type(value).__name__}.")
    if not value.strip() and not may_be_empty:
        raise LRSAError(f"{key} is empty.")
    return value


def _answer(row: dict) -> str:
    """`answer` or `answers`: text, a list of texts or SQuAD's {"text": [...]}, of which the first is taken."""
    key = "answer" if "answer" in row else "answers"
    if key not in row:
        raise LRSAError("answer is missing (a column answer or answers).")
    value = row[key]
    if isinstance(value, dict):
        value = value.get("text")
    if isinstance(value, (list, tuple)):
        if not value:
            raise LRSAError(f"{key} is empty.")
        value = value[0]
    return _text({key: value}, key)


def _answers(row: dict) -> dict[str, list[str]]:
    """`answers`, where there is more than one that counts as right; the first of them is the one to learn."""
    texts = row.get("answers", row.get("answer"))
    if isinstance(texts, dict):
        texts = texts.get("text")
    if not isinstance(texts, (list, tuple)):
        return {}
    texts = list(dict.fromkeys(text for text in texts if isinstance(text, str) and text.strip()))
    return {"answers": texts} if len(texts) > 1 else {}


def _messages(messages: Any) -> list[dict[str, str]]:
    if not isinstance(messages, (list, tuple)) or not messages:
        raise LRSAError("messages has to be a list of objects with role and content, and not an empty one.")
    checked = []
    for number, message in enumerate(messages, start=1):
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise LRSAError(f"message {number} has no role: every message needs role and content.")
        if message.get("tool_calls"):
            raise LRSAError(f"message {number} has tool_calls, which are not supported: write them into content.")
        if not isinstance(message.get("content"), str):
            raise LRSAError(f"the content of message {number} has to be text.")
        checked.append({"role": message["role"], "content": message["content"]})
    answers = [message["content"] for message in checked if message["role"] == "assistant"]
    if not answers:
        raise LRSAError("answer is missing: none of its messages has the role assistant.")
    if not all(answer.strip() for answer in answers):
        raise LRSAError("answer is empty: a message of the role assistant has no content.")
    return checked
