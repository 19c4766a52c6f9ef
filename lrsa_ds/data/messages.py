"""Conversations of several formats, converted to one canonical list of messages; see `lrsa_ds.data.shapes`."""

import json
from typing import Any

from lrsa_ds.errors import LRSAError

# Names that data sets give to the roles, in lower case; other roles are passed to the chat template unchanged.
_ROLES = {
    **dict.fromkeys(("user", "human"), "user"),
    **dict.fromkeys(("assistant", "gpt", "chatgpt", "bot", "model", "function_call"), "assistant"),
    **dict.fromkeys(("tool", "observation", "function", "function_response"), "tool"),
    **dict.fromkeys(("system", "developer"), None),  # known, and not renamed
}
# Flags of a message -> whether a true flag means that the message is trained on.
_FLAGS = {"train": True, "trainable": True, "loss": True, "loss_mask": True, "weight": True}
_FLAGS |= {"mask": False, "masked": False}
# Content other than text. A row that has it is refused, since the model would never see it.
_NOT_TEXT = ("image", "images", "audio", "audios", "video", "videos")


def normalise_messages(messages: Any, train: bool = True, key: str = "messages") -> list[dict[str, Any]]:
    """Converts messages with role and content, or with from and value, to the canonical form.

    Args:
        messages: the value of the column.
        train: whether an assistant message without a flag of its own is trained on.
        key: the name of the column, for errors.

    Raises:
        LRSAError: a message has no role or text, or content that is not supported; the error names the message.
    """
    if not isinstance(messages, (list, tuple)) or not messages:
        raise LRSAError(f"{key} has to be a list of objects with role and content, and not an empty one.")
    return [_message(message, number, train) for number, message in enumerate(messages, start=1)]


def check_answers(messages: list[dict[str, Any]]) -> None:
    """Raises LRSAError unless at least one assistant message is trained on, and those that are have content."""
    answers = [message for message in messages if message["role"] == "assistant"]
    if not answers:
        raise LRSAError("answer is missing: none of its messages has the role assistant.")
    trained = [message for message in answers if message["train"]]
    if not trained:
        raise LRSAError("nothing to learn: every message of the role assistant is marked as not trained on.")
    if any(not message["content"].strip() and "tool_calls" not in message for message in trained):
        raise LRSAError("answer is empty: a message of the role assistant has no content.")


def normalise_tools(tools: Any) -> list[dict[str, Any]]:
    """The tools of a row, or a JSON text of them, each as {"type": "function", "function": {...}}."""
    if isinstance(tools, str):
        tools = _from_json(tools, "tools") if tools.strip() else []
    if not isinstance(tools, (list, tuple)) or not all(isinstance(tool, dict) for tool in tools):
        raise LRSAError("tools has to be a list of objects, or a JSON text of one.")
    wrapped = [tool if "function" in tool else {"type": "function", "function": tool} for tool in tools]
    for tool in wrapped:
        if not isinstance(tool["function"], dict) or not isinstance(tool["function"].get("name"), str):
            raise LRSAError("tools has to be a list of objects, and one of them has no name.")
    return wrapped


def _message(message: Any, number: int, train: bool) -> dict[str, Any]:
    given = {k: v for k, v in message.items() if v is not None} if isinstance(message, dict) else {}
    speaker = given.get("role", given.get("from"))
    if not isinstance(speaker, str):
        raise LRSAError(f"message {number} has no role: every message needs role and content (or from and value).")
    for key in _NOT_TEXT:
        if given.get(key):
            raise LRSAError(f"message {number} has {key}, which cannot be trained on: only text can.")
    role = _ROLES.get(speaker.lower()) or speaker
    found = {"role": role, "content": ""}
    calls = _tool_calls(given, number)
    content = given.get("content", given.get("value"))
    if speaker.lower() == "function_call":
        calls = _calls_of(_from_json(content, f"message {number}"), number)
    elif content is not None or not calls:
        found["content"] = _content(content, number)
    reasoning = next((given[key] for key in ("reasoning_content", "reasoning", "thinking") if key in given), "")
    if not isinstance(reasoning, str):
        raise LRSAError(f"reasoning_content of message {number} has to be text.")
    if reasoning:
        found["reasoning_content"] = checked_text(reasoning, f"reasoning_content of message {number}")
    if calls:
        found["tool_calls"] = calls
    found |= {key: given[key] for key in ("tool_call_id", "name") if isinstance(given.get(key), str)}
    if role == "assistant":
        found["train"] = _is_trained(given, number, train)
    elif _is_trained(given, number, False):
        raise LRSAError(f"message {number} of the role {role} is marked as trained on: only the assistant's can be.")
    return found


def checked_text(text: str, name: str) -> str:
    """Returns the text. Raises LRSAError for half of a surrogate pair, which JSON can write and UTF-8 cannot."""
    try:
        if not text.isascii():
            text.encode("utf-8")
    except UnicodeEncodeError as error:
        code = ord(text[error.start])
        raise LRSAError(
            f"{name} holds half of a surrogate pair (\\u{code:04x} at character {error.start + 1}): not valid text."
        ) from None
    return text


def _content(content: Any, number: int) -> str:
    """Text, or a list of parts of text, which are joined without separators."""
    name = f"the content of message {number}"
    parts = content if isinstance(content, (list, tuple)) else [content]
    texts = []
    for part in parts:
        if isinstance(part, dict) and parts is content:
            kind = part.get("type", "text")
            if kind not in ("text", "input_text", "output_text"):
                raise LRSAError(f"{name} has a part of type {kind!r}, which cannot be trained on: only text can.")
            part = part.get("text")
        if not isinstance(part, str):
            raise LRSAError(f"{name} has to be text, or a list of parts of text.")
        texts.append(part)
    return checked_text("".join(texts), name)


def _is_trained(message: dict, number: int, default: bool) -> bool:
    found = {}
    for key, means_trained in _FLAGS.items():
        if key in message:
            value = message[key]
            # 0 and 1 are clear as a weight, but not as a mask.
            valid = value in (0, 1) if means_trained and not isinstance(value, str) else isinstance(value, bool)
            if not valid:
                choice = "give 0 or 1" if key == "weight" else "give true or false"
                raise LRSAError(f"{key} of message {number} is {value!r}: {choice}.")
            found[key] = bool(value) == means_trained
    if len(set(found.values())) > 1:
        raise LRSAError(f"{' and '.join(found)} of message {number} contradict each other: give one of them.")
    return next(iter(found.values()), default)


def _tool_calls(message: dict, number: int) -> list[dict[str, Any]]:
    calls = message.get("tool_calls") or message.get("function_call") or []
    return _calls_of(calls, number)


def _calls_of(calls: Any, number: int) -> list[dict[str, Any]]:
    """Tool calls as {"type": "function", "function": {"name", "arguments"}}, with an object as arguments."""
    calls = [calls] if isinstance(calls, dict) else calls
    if not isinstance(calls, (list, tuple)):
        raise LRSAError(f"tool_calls of message {number} has to be a list of objects.")
    found = []
    for call in calls:
        function = call.get("function", call) if isinstance(call, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise LRSAError(f"a tool call of message {number} has no name.")
        arguments = function.get("arguments", function.get("parameters"))
        if isinstance(arguments, str):
            arguments = _from_json(arguments, f"the arguments of a tool call of message {number}") if arguments else {}
        if not isinstance(arguments or {}, dict):
            raise LRSAError(f"the arguments of a tool call of message {number} have to be an object.")
        identity = {"id": call["id"]} if isinstance(call.get("id"), str) else {}
        function = {"name": function["name"], "arguments": arguments or {}}
        found.append({"type": "function", **identity, "function": function})
    return found


def _from_json(text: Any, name: str) -> Any:
    try:
        return json.loads(text)
    except (TypeError, ValueError):
        raise LRSAError(f"{name} has to be JSON, and cannot be read as such.") from None
