"""The shapes of rows: each is recognised, checked and converted to its canonical form.

A *row* is a dict, as read from a file or a data set. `canonical` converts it to a dict with the keys of one of these
shapes, and `task` (text):

- `messages`: a list of dicts, in the order of the conversation, and `tools` if the row has any. A message has
    - `role`: "system", "user", "assistant", "tool", or another one that the chat template knows;
    - `content`: text, which may be "";
    - `train` (assistant messages only): whether the message is trained on; true for at least one message of a row;
    - optional: `reasoning_content` (text), `tool_calls` (a list of {"type": "function", "id" (optional),
      "function": {"name": text, "arguments": dict}}), `tool_call_id` and `name` (text).
  `tools` is a list of {"type": "function", "function": {"name", ...}}, as `apply_chat_template` takes it.
- `prompt`, `completion`: texts.
- `context`, `question`, `answer`: texts; optional: `answers`, all texts that are accepted as an answer, `answer_start`,
  the index of the character of the context at which the answer begins (checked), and `title`, the article that the
  context is from.
- `text`: a text.
- `input_ids`, `labels`: lists of integers of one length; a label is the token itself, or -100 for a token that is not
  trained on.
"""

from collections.abc import Callable
from functools import partial
from traceback import extract_tb
from typing import Any, NamedTuple

from lrsa_ds.data.messages import check_answers, checked_text, normalise_messages, normalise_tools
from lrsa_ds.data.packing import IGNORE
from lrsa_ds.errors import LRSAError
from lrsa_ds.settings.data import COLUMNS

# The task of a row that names none, by a key of its canonical form.
_TASK_WITH = {"input_ids": "tokens", "messages": "chat", "question": "qa", "prompt": "completion", "text": "text"}
# All columns that any shape looks at.
USED_COLUMNS = (*COLUMNS, "response", "history", "attention_mask")
ACCEPTED = (
    "messages (or conversations); prompt and completion; instruction, input and output; context, question and answer "
    "(or answers); text; or input_ids and labels"
)


ReadRow = Callable[[Any], dict[str, Any]]
"""Converts a row as it was read; raises LRSAError for a row that cannot be used."""

ToRow = Callable[[dict[str, Any]], dict[str, Any]]
"""Converts a row as it was read to one of any shape. A column that the row lacks may be present with the value None."""


def row_reader(columns: dict[str, str], to_row: ToRow | None = None, needs: str | None = None) -> ReadRow:
    """A reader of rows: first `to_row`, if given, then `canonical` with `columns`. Picklable if `to_row` is.

    Args:
        needs: a key that the canonical row must have; rows without it are refused.
    """
    read = partial(canonical, columns=columns) if to_row is None else partial(_converted, to_row, columns)
    return read if needs is None else partial(_with_key, read, needs)


def _with_key(read: ReadRow, needs: str, row: Any) -> dict[str, Any]:
    found = read(row)
    if needs not in found:
        raise LRSAError(f"it has no {needs}, which contexts are made of: its columns are {', '.join(row)}.")
    return found


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
    """The canonical form of a row, checked.

    Args:
        row: as it was read. A column whose value is None counts as absent: Arrow adds None to rows of other shapes.
        columns: our name -> name of the column in the row, for columns with other names.

    Raises:
        LRSAError: no shape is recognised, or a value is missing, empty or not text. The message begins with the
            problem: the caller puts the place of the row before it.
    """
    if not isinstance(row, dict):
        raise LRSAError(f"a row has to be an object with named columns, not {type(row).__name__}.")
    named = _renamed(row, columns or {})
    shape = _shape_of(named, columns or {})
    if shape is None:
        found = ", ".join(map(str, row)) or "none"
        raise LRSAError(
            f"no known shape in its columns ({found}): use {ACCEPTED}, or "
            "map names with 'data.columns={context: passage}'."
        )
    task = named.get("task")
    found = shape.read(named)
    if not isinstance(task, str) or not task:
        task = next(name for key, name in _TASK_WITH.items() if key in found)
    return {**found, "task": task}


def uncut_length(row: dict[str, Any]) -> int:
    """Characters (or tokens) of a canonical row that are never cut, even if the row is too long."""
    if "messages" in row:
        lengths = [len(message["content"]) + len(message.get("reasoning_content", "")) for message in row["messages"]]
        others = [n for n, message in zip(lengths, row["messages"]) if message["role"] != "assistant"]
        beside = [row.get("tools", ""), *(message.get("tool_calls", "") for message in row["messages"])]
        return sum(lengths) - max(others, default=0) + sum(len(str(value)) for value in beside)
    if "input_ids" in row:
        num_targets = sum(label != IGNORE for label in row["labels"])
        return num_targets if num_targets < len(row["labels"]) else 0
    return sum(len(row[key]) for key in ("question", "answer", "completion") if key in row)


class _Shape(NamedTuple):
    """The columns of a shape, and the function that reads them.

    Args:
        columns: groups of column names; a row of this shape has one column of each group.
        read: converts the named columns of a row to its canonical form, without the task.
    """

    columns: tuple[tuple[str, ...], ...]
    read: Callable[[dict[str, Any]], dict[str, Any]]


def _shape_of(named: dict[str, Any], columns: dict[str, str]) -> _Shape | None:
    """The first shape that the row has; a shape with a column that the user has mapped takes precedence."""
    found = [s for s in _SHAPES if all(any(name in named for name in group) for group in s.columns)]
    mapped = [s for s in found if any(name in columns for group in s.columns for name in group)]
    return next(iter([*mapped, *found]), None)


def _renamed(row: dict, columns: dict[str, str]) -> dict[str, Any]:
    for ours, theirs in columns.items():
        if theirs not in row:
            found = ", ".join(map(str, row))
            raise LRSAError(f"data.columns says that {ours} is in column {theirs!r}, and the row has only {found}.")
    # A column that is mapped to another name is not read under its own name as well.
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
    return checked_text(value, key)


def _first_of(row: dict, *keys: str) -> str:
    """The first of the columns that the row has; the first of all if it has none."""
    return next((key for key in keys if key in row), keys[0])


def _conversation(row: dict) -> dict[str, Any]:
    key = _first_of(row, "messages", "conversations")
    messages = normalise_messages(row[key], key=key)
    if row.get("system") and messages[0]["role"] != "system":
        messages = [{"role": "system", "content": _text(row, "system")}, *messages]
    check_answers(messages)
    tools = normalise_tools(row.get("tools") or [])
    return {"messages": messages, **({"tools": tools} if tools else {})}


def _prompt_and_completion(row: dict) -> dict[str, Any]:
    """Two texts, or two lists of messages, of which those of the completion are trained on."""
    key = _first_of(row, "completion", "response")
    if isinstance(row["prompt"], (list, tuple)) and isinstance(row.get(key), (list, tuple)):
        prompt = normalise_messages(row["prompt"], train=False, key="prompt")
        return _conversation({**row, "messages": [*prompt, *normalise_messages(row[key], key=key)]})
    return {"prompt": _text(row, "prompt"), "completion": _text(row, key)}


def _instruction(row: dict) -> dict[str, Any]:
    """Alpaca's form; with `system` or `history` (pairs of an instruction and its output) it becomes a conversation."""
    keys = _first_of(row, "input", "context"), _first_of(row, "output", "response", "completion")
    more = _text(row, keys[0], may_be_empty=True) if keys[0] in row else ""
    prompt = _text(row, "instruction") + (f"\n\n{more}" if more.strip() else "")
    completion = _text(row, keys[1])
    history = row.get("history") or []
    if not history and not row.get("system"):
        return {"prompt": prompt, "completion": completion}
    if not all(isinstance(turn, (list, tuple)) and len(turn) == 2 for turn in history):
        raise LRSAError("history has to be a list of pairs, an instruction and its output.")
    turns = [*history, (prompt, completion)]
    roles = ("user", "assistant")
    messages = [{"role": role, "content": text} for turn in turns for role, text in zip(roles, turn)]
    return _conversation({"messages": messages, "system": row.get("system")})


def _question(row: dict) -> dict[str, Any]:
    row = {**row, "context": _passages(row["context"])}
    found: dict[str, Any] = {"context": _text(row, "context", may_be_empty=True), "question": _text(row, "question")}
    key = _first_of(row, "answer", "answers")
    if key not in row:
        raise LRSAError("answer is missing (a column answer or answers).")
    texts, starts = _answers(row[key])
    if not texts:
        raise LRSAError(f"{key} is empty.")
    answer = found["answer"] = _text({key: texts[0]}, key)
    if "answers" in row:
        texts = [*texts, *_answers(row["answers"])[0]]
    right = list(dict.fromkeys(text for text in texts if isinstance(text, str) and text.strip()))
    if len(right) > 1:
        found["answers"] = right
    start = next(iter([*starts, *_listed(row.get("answer_start"))]), None)
    # Some data sets count bytes, or were edited later: a place without the answer is ignored.
    if type(start) is int and start >= 0 and found["context"].startswith(answer, start):
        found["answer_start"] = start
    title = row.get("title")
    if isinstance(title, (str, int)) and str(title).strip():
        found["title"] = str(title).strip()
    return found


def _passages(context: Any) -> Any:
    """Joins a list of texts, or HotpotQA's pairs of a title and sentences, as published or as two columns."""
    if isinstance(context, dict) and {"title", "sentences"} <= context.keys():
        context = list(zip(context["title"], context["sentences"]))
    if not isinstance(context, (list, tuple)) or not context:
        return context
    titled = [isinstance(p, (list, tuple)) and len(p) == 2 and isinstance(p[1], (list, tuple)) for p in context]
    passages = [f"{title}\n{''.join(sentences)}" for title, sentences in context] if all(titled) else context
    return "\n\n".join(passages) if all(isinstance(passage, str) for passage in passages) else context


def _answers(value: Any) -> tuple[list[Any], list[int]]:
    """Answers and where they begin.

    `value` is a text, a list of texts, SQuAD's {"text": [...], "answer_start": [...]}, or a list of {"text",
    "answer_start"}.
    """
    if isinstance(value, dict):
        return _listed(value.get("text")), _listed(value.get("answer_start"))
    values = _listed(value)
    texts = [v.get("text") if isinstance(v, dict) else v for v in values]
    starts = [v["answer_start"] for v in values if isinstance(v, dict) and "answer_start" in v]
    return texts, starts


def _listed(value: Any) -> list[Any]:
    return [] if value is None else list(value) if isinstance(value, (list, tuple)) else [value]


def _tokens(row: dict) -> dict[str, Any]:
    """Tokens and labels, not shifted, as transformers takes them. Without labels, every token is trained on."""
    ids, labels = row["input_ids"], row.get("labels", row["input_ids"])
    for key, values in (("input_ids", ids), ("labels", labels)):
        if not isinstance(values, (list, tuple)) or not all(type(value) is int for value in values):
            raise LRSAError(f"{key} has to be a list of whole numbers.")
    if len(labels) != len(ids):
        raise LRSAError(f"labels has {len(labels)} entries and input_ids {len(ids)}: give one for each.")
    mask = row.get("attention_mask")
    if mask is not None and not all(mask):
        raise LRSAError("attention_mask has zeros: leave padding out of input_ids and labels.")
    for place, (token, label) in enumerate(zip(ids, labels)):
        if token < 0:
            raise LRSAError(f"input_ids[{place}]={token} is not a token id: give numbers from 0 on.")
        if label not in (token, IGNORE):
            raise LRSAError(
                f"labels[{place}]={label} is neither input_ids[{place}]={token} nor {IGNORE}: give labels that "
                "are not shifted."
            )
    # The first token cannot be predicted: there is nothing before it.
    if all(label == IGNORE for label in labels[1:]):
        raise LRSAError("labels has no target token.")
    return {"input_ids": list(ids), "labels": list(labels)}


_SHAPES = (
    _Shape((("input_ids",),), _tokens),
    _Shape((("messages", "conversations"),), _conversation),
    _Shape((("context",), ("question",)), _question),
    _Shape((("instruction",), ("output", "response", "completion")), _instruction),
    _Shape((("prompt",),), _prompt_and_completion),
    _Shape((("text",),), lambda row: {"text": _text(row, "text")}),
)
