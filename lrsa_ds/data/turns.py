"""The prompt that inference renders before a turn, and the answer that has to be generated after it.

Both come from the tokenizer's chat template. The prompt is the rendering of the messages before the turn with
`add_generation_prompt=True`. The answer is the continuation of that text in the rendering of the finished turn. No
particular template is known here, with one exception, reasoning tags: see `_behind_reasoning_tag`.
"""

import json
import re
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from jinja2.exceptions import TemplateError, TemplateSyntaxError

from lrsa_ds.data.conversation import Conversation
from lrsa_ds.data.special import SpecialTokens
from lrsa_ds.data.tokenizer import Tokenizer
from lrsa_ds.errors import LRSAError

# What a template may raise, apart from jinja's own errors, for messages that it was not written for.
TEMPLATE_ERRORS = (TemplateError, TypeError, ValueError, LookupError, AttributeError, ArithmeticError, RuntimeError)
# The names under which templates read the reasoning of a message.
REASONING_KEYS = ("reasoning_content", "reasoning", "thinking")
_PLACEHOLDER = "xPLACEHOLDERx"
# At the end of a generation prompt: a tag that is opened, and what closes it, if anything does.
_REASONING_TAG = re.compile(r"<([^<>/\s]+)>\s*(</\1>\s*)?$")


@dataclass(frozen=True, slots=True)
class Turn:
    """One turn that is trained on.

    Args:
        message: its index in the conversation.
        prompt: the text that inference renders before the model generates the turn.
        answer: the text to generate after the prompt, without the token that ends it.
        end: the special token with which the template ends the answer; if "", the tokenizer's own token ends it.
        after: what the template adds after that, which is not trained on.
    """

    message: int
    prompt: str
    answer: str
    end: str = ""
    after: str = ""

    @property
    def text(self) -> str:
        return self.prompt + self.answer + self.end


class PlainText:
    """Turns without a chat template: the first message is the prompt, the second its continuation."""

    def turns(self, conversation: Conversation) -> list[Turn]:
        return [self.turn(conversation, message) for message in conversation.trained]

    def turn(self, conversation: Conversation, message: int) -> Turn:
        prompt, answer = (m["content"] for m in conversation.messages)
        return Turn(message, prompt, answer)

    def opened(self, asked: str) -> str:
        return asked


class ChatTemplate:
    """Turns as the chat template of a tokenizer renders them."""

    def __init__(self, tokenizer: Tokenizer, special: SpecialTokens):
        self.tokenizer = tokenizer
        self.special = special
        source = json.dumps(tokenizer.chat_template)
        self.reasoning_keys = [key for key in REASONING_KEYS if re.search(rf"\b{key}\b", source)]

    def turns(self, conversation: Conversation) -> list[Turn]:
        """All turns of a conversation that are trained on.

        Raises:
            LRSAError: as `turn`; or the template leaves out a message, its reasoning or its tool calls, or the tools
                of the row; the error names what is left out.
        """
        last = conversation.trained[-1]
        prompt = self._render(conversation, last, generate=True) if last > 0 else None
        if prompt is not None:
            self._check_prompt(conversation, prompt)
        turns = [self.turn(conversation, message) for message in conversation.trained[:-1]]
        turns.append(self.turn(conversation, last, prompt))
        for turn in turns:
            _check_answer(turn, conversation.messages[turn.message])
        return turns

    def turn(self, conversation: Conversation, message: int, prompt: str | None = None) -> Turn:
        """The turn of `messages[message]`, a message of the assistant; `prompt` is its prompt, if already rendered.

        Raises:
            LRSAError: the template refuses the messages, or its rendering of the turn does not continue its own
                generation prompt.
        """
        finished = self._render(conversation, message + 1)
        prompt = prompt or self._prompt(conversation, message, finished)
        after = self._after_content(conversation, message, finished)
        end = self.special.first(after)
        stop = len(finished) - len(after) + (end.start() if end else len(after.rstrip()))
        if finished.startswith(prompt):
            answer = finished[len(prompt) : stop]
        else:
            answer = _behind_reasoning_tag(prompt, finished[:stop], conversation.messages[message])
        return Turn(message, prompt, answer, end.group(), after[end.end() :]) if end else Turn(message, prompt, answer)

    def opened(self, asked: str) -> str:
        """What inference renders for one message of the user, up to where the answer begins.

        Reasoning that the generation prompt opens (`<think>`) is closed at once: the text goes on with the answer.

        Raises:
            LRSAError: the template refuses the message.
        """
        prompt = self._render(Conversation(({"role": "user", "content": asked},), ()), 1, generate=True)
        tag = _REASONING_TAG.search(prompt)
        return prompt if not tag or tag.group(2) else f"{prompt.rstrip()}\n</{tag.group(1)}>\n\n"

    def _check_prompt(self, conversation: Conversation, prompt: str) -> None:
        """Raises LRSAError unless the prompt of the last trained turn contains all messages before it."""
        last = conversation.trained[-1]
        for number, message in enumerate(conversation.messages[:last], start=1):
            for call in message.get("tool_calls") or ():
                _require_call(call, prompt, number)
            if message["role"] != "assistant" and not _renders(prompt, message["content"]):
                raise LRSAError(
                    f"the chat template drops or changes message {number} of the role {message['role']}, which starts "
                    f"with {message['content'].strip()[:40]!r}."
                )
        if conversation.tools:
            without = replace(conversation, tools=None)
            if prompt == self._render(without, last, generate=True):
                raise LRSAError("the chat template ignores tools: use a tokenizer whose template has them.")

    def end_tokens(self) -> list[str]:
        """The special tokens with which the template ends a turn: after text, and after a tool call if it has them."""
        call = {"type": "function", "function": {"name": "look", "arguments": {"at": "it"}}}
        asked = {"role": "user", "content": "?"}
        found = []
        for message in ({"content": "x"}, {"content": "", "tool_calls": [call]}):
            conversation = Conversation((asked, {"role": "assistant", **message}), (1,))
            try:
                found += self.turns(conversation)
            except LRSAError:
                continue  # the template takes no tools, or needs other messages first
        return [end for end in dict.fromkeys(turn.end for turn in found) if end]

    def _render(self, conversation: Conversation, count: int, generate: bool = False) -> str:
        """Renders the first `count` messages, with the generation prompt if a turn is to be generated."""
        messages = [self._for_template(message) for message in conversation.messages[:count]]
        options: dict[str, Any] = {"tools": conversation.tools} if conversation.tools else {}
        try:
            text = self.tokenizer.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=generate, **options
            )
        except TemplateSyntaxError as error:
            raise LRSAError(
                f"the chat template of the tokenizer is broken ({error.message}, line {error.lineno}): repair it, or "
                "set data.chat_template=false."
            ) from error
        except TEMPLATE_ERRORS as error:
            roles = ", ".join(message["role"] for message in messages)
            said = " ".join(str(error).split()).rstrip(".")
            raise LRSAError(
                f"the chat template refuses the roles {roles} ({said}): change the messages, "
                "or set data.chat_template=false for rows that are not messages."
            ) from error
        assert isinstance(text, str)  # because of tokenize=False
        return text

    def _for_template(self, message: dict[str, Any]) -> dict[str, Any]:
        reasoning = message.get(REASONING_KEYS[0])
        if not reasoning:
            return message
        rest = {key: value for key, value in message.items() if key != REASONING_KEYS[0]}
        return rest | dict.fromkeys(self.reasoning_keys, reasoning)

    def _prompt(self, conversation: Conversation, message: int, finished: str) -> str:
        if message > 0:
            return self._render(conversation, message, generate=True)
        # Templates do not render an empty conversation: use the finished text up to the end of the generation prompt.
        asked = self._generation_prompt
        head, found, _ = finished.partition(asked) if asked else ("", "", "")
        if not found:
            raise LRSAError(
                "its first message is from the assistant, with no prompt before it: set train to false on it."
            )
        return head + found

    @cached_property
    def _generation_prompt(self) -> str:
        probe = Conversation(({"role": "user", "content": "?"},), ())
        return self._render(probe, 1, generate=True).removeprefix(self._render(probe, 1))

    @cached_property
    def _usual_end(self) -> str | None:
        """What the template renders after the content of a last turn; None if it refuses one question and answer."""
        messages = ({"role": "user", "content": "?"}, {"role": "assistant", "content": _PLACEHOLDER})
        try:
            return self._render(Conversation(messages, (1,)), 2).rpartition(_PLACEHOLDER)[2]
        except LRSAError:
            return None

    def _after_content(self, conversation: Conversation, message: int, finished: str) -> str:
        """What the template renders after the content and the tool calls of the last of these messages."""
        if self._usual_end is not None and finished.endswith(self._usual_end):
            return self._usual_end
        messages = list(conversation.messages[: message + 1])
        if messages[message].get("tool_calls"):
            end = self.special.last(finished)
            return finished[end.start() :] if end else ""
        messages[message] = {**messages[message], "content": _PLACEHOLDER}
        marked = self._render(replace(conversation, messages=tuple(messages)), message + 1)
        _, found, after = marked.rpartition(_PLACEHOLDER)
        if not found or not finished.endswith(after):
            raise LRSAError(f"the chat template drops or changes message {message + 1} of the role assistant.")
        return after


def _behind_reasoning_tag(prompt: str, finished: str, message: dict[str, Any]) -> str:
    """The answer, if the generation prompt has a reasoning tag that the finished turn lacks.

    Some generation prompts open a tag (`<think>`): the model generates the reasoning, closes the tag, and answers.
    Others open and close it: the model answers at once. Finished turns are rendered without either, since the history
    does not keep reasoning. The text trained on is the text to be generated after the prompt.

    Raises:
        LRSAError: the two differ in another way, or there is reasoning but the prompt has closed the tag.
    """
    tag = _REASONING_TAG.search(prompt)
    before = prompt[: tag.start()] if tag else ""
    if not tag or not finished.startswith(before):
        shared = next((i for i, (a, b) in enumerate(zip(prompt, finished, strict=False)) if a != b), 0)
        raise LRSAError(
            f"the chat template's generation prompt ends with {prompt[shared:][-60:]!r}, and the finished turn has "
            f"{finished[shared:][:60]!r} there: what is trained would not be what is generated."
        )
    opening, closing = f"<{tag.group(1)}>", f"</{tag.group(1)}>"
    answer = finished[len(before) :]
    reasoning, found, _ = message["content"].rpartition(closing)
    reasoning = message.get(REASONING_KEYS[0]) or (reasoning.replace(opening, "") if found else "")
    if tag.group(2):
        if reasoning:
            raise LRSAError(f"the chat template's generation prompt closes {opening}: reasoning_content has no place.")
        return answer
    if answer.startswith(opening):
        return answer.removeprefix(opening).lstrip("\n")
    return f"{reasoning.strip()}\n{closing}\n\n{answer.lstrip()}"


def _check_answer(turn: Turn, message: dict[str, Any]) -> None:
    number = turn.message + 1
    # The content may begin in the prompt, with a reasoning tag.
    answer, content = _dense(turn.prompt[-64:] + turn.answer), _dense(message["content"])
    is_last = bool(turn.end) and not message.get("tool_calls")
    if not (answer.endswith(content) if is_last else content in answer):
        raise LRSAError(
            f"the chat template changes the content of message {number}, which starts with "
            f"{message['content'].strip()[:40]!r}."
        )
    reasoning = message.get(REASONING_KEYS[0])
    if reasoning and _dense(reasoning) not in answer:
        raise LRSAError(
            f"the chat template ignores reasoning_content, which message {number} has: use a tokenizer whose template "
            "has it, or write it into content."
        )
    for call in message.get("tool_calls") or ():
        _require_call(call, turn.answer, number)


def _require_call(call: dict[str, Any], text: str, number: int) -> None:
    name = call.get("function", call).get("name", "")
    if name not in text:
        raise LRSAError(f"the chat template ignores tool_calls, which message {number} has: it leaves out {name!r}.")


def _renders(text: str, content: str) -> bool:
    """Whether `text` contains `content`, ignoring white space, or with the escapes of JSON."""
    stripped = content.strip()
    return (
        stripped in text or json.dumps(stripped, ensure_ascii=False)[1:-1] in text or _dense(stripped) in _dense(text)
    )


def _dense(text: str) -> str:
    """The text without its white space."""
    return "".join(text.split())
