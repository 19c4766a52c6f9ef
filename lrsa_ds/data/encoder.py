"""Converts canonical rows to examples: the tokens that generation sees, and those that it has to produce.

The prompt of a turn is tokenized as inference does it, and its target is the continuation that the tokenizer itself
produces. Several turns of a conversation share an example as long as this holds for each of them. A turn whose prompt
differs in generation (for example the history without its reasoning) becomes an example of its own.
"""

from typing import Any, NamedTuple

from lrsa_ds.data.conversation import Conversation, chat_conversation, plain_conversation
from lrsa_ds.data.cutting import TooLong, is_spared, kept_parts
from lrsa_ds.data.packing import IGNORE, Example
from lrsa_ds.data.shapes import canonical
from lrsa_ds.data.shorten import shortened, token_ends, tokens_of
from lrsa_ds.data.special import SpecialTokens
from lrsa_ds.data.tokenized import tokenized_examples
from lrsa_ds.data.tokenizer import Tokenizer, decoded
from lrsa_ds.data.turns import ChatTemplate, PlainText, Turn
from lrsa_ds.errors import LRSAError

# Characters before an answer that are tokenized again together with it, and how many of their tokens have to agree.
WINDOW_CHARACTERS = 512
WINDOW_TOKENS = 8
# A text with more than this many characters for each token of the limit is cut before it is rendered the first time.
LONG_TEXT = 8


class Prompt(NamedTuple):
    """The input of inference for a row, as tokens, and the expected output.

    Args:
        ids: the prompt.
        answer_ids: the right answer, including the token that ends it.
        lead_end: the last word of a right answer before its content, such as the end of its reasoning; "" if none.
    """

    ids: list[int]
    answer_ids: list[int]
    lead_end: str


def after_lead(said: str, lead_end: str) -> str:
    """The output of a model after `Prompt.lead_end`, stripped of white space."""
    return (said.partition(lead_end)[2] if lead_end and lead_end in said else said).strip()


class Encoder:
    r"""Converts rows to examples; looks up once what it needs to know of the tokenizer.

    Args:
        tokenizer: any; its chat template is used if it has one and `chat_template` is true.
        seq_len: the maximum number of tokens of an example.
        chat_template: False uses "{context}\n\nQuestion: {question}\nAnswer: {answer}" even if there is a template.
        may_cut: False refuses rows that would have to be cut.
    """

    def __init__(self, tokenizer: Tokenizer, seq_len: int, chat_template: bool = True, may_cut: bool = True):
        self.tokenizer = tokenizer
        self.seq_len = seq_len
        self.may_cut = may_cut
        self.special = SpecialTokens(tokenizer)
        self.use_template = chat_template and tokenizer.chat_template is not None
        self.frame = ChatTemplate(tokenizer, self.special) if self.use_template else PlainText()
        self.eos = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
        self.start = _start_of_text(tokenizer)
        # A template writes the beginning-of-sequence token itself; without one, add it if the tokenizer does.
        self.before = [] if self.use_template else self.start

    def examples(self, row: dict[str, Any], index: int = 0, place: object = "a row") -> list[Example]:
        """As `recipes.qa.encode`; `place` names the row in an error."""
        try:
            row = canonical(row)
            if "text" in row:
                return self._text_examples(row, index)
            if "input_ids" in row:
                return tokenized_examples(row, index, self.seq_len, len(self.tokenizer), self.may_cut)
            return self._examples(self._conversation(row), index, self.seq_len)
        except LRSAError as error:
            raise type(error)(f"{place}: {error}") from error

    def uncut(self, row: dict[str, Any], index: int) -> list[Example]:
        """The examples of a canonical row, however long."""
        return self._examples(self._conversation(row), index, None)

    def length(self, row: dict[str, Any]) -> int:
        """The number of tokens of the last example of a canonical row, uncut."""
        return len(self.uncut(row, 0)[-1].input_ids)

    def prompt(self, row: dict[str, Any]) -> Prompt:
        """The prompt of the last turn of a row, with at most `seq_len` tokens including the right answer.

        Raises:
            LRSAError: as `recipes.qa.encode`, without the place of the row.
        """
        conversation = self._conversation(canonical(row))
        turns = self.frame.turns(conversation)
        found = self._fitting(conversation, turns, self.seq_len)
        labels = found.labels[found.num_prompt :]
        answer_ids = [label for label in labels if label != IGNORE]
        content = conversation.messages[turns[-1].message]["content"].strip()
        lead = turns[-1].answer[: max(0, turns[-1].answer.rfind(content))] if content else ""
        said = decoded(self.tokenizer, self._tokens([lead])[0], skip_special_tokens=True).split()
        return Prompt(found.ids[: found.num_prompt], answer_ids, said[-1] if said else "")

    def open_prompt(self, asked: str, answer_prefix: str = "") -> list[int]:
        """The tokens of what a user says, uncut, up to where a model goes on with an answer that has a beginning.

        Raises:
            LRSAError: the chat template refuses the message.
        """
        ids = self._tokens([self.frame.opened(asked) + answer_prefix])[0]
        return ids if ids[: len(self.before)] == self.before else self.before + ids

    def _conversation(self, row: dict[str, Any]) -> Conversation:
        return (chat_conversation if self.use_template else plain_conversation)(row)

    def _examples(self, conversation: Conversation, index: int, limit: int | None) -> list[Example]:
        """Usually one example; several (see the head of this file) are in the order of their turns."""
        turns, found = self.frame.turns(conversation), []
        while turns:
            encoded = self._fitting(conversation, turns, limit)
            cut = {"num_cut": encoded.num_cut, "answer_lost": encoded.answer_lost}
            found.append(Example(encoded.ids, encoded.labels, conversation.task, index, **cut))
            turns = [turn for turn in turns if turn.message not in encoded.trained]
        return found[::-1]

    def _fitting(self, conversation: Conversation, turns: list[Turn], limit: int | None) -> "_Encoded":
        """As `_encoded`, cut as far as `limit` requires."""
        cuttable = conversation.cuttable_before(turns[-1].message)
        text = conversation.text_of(cuttable)
        is_long = limit is not None and self.may_cut and len(text) > LONG_TEXT * limit
        encoded = None if is_long else self._encoded(turns)
        if limit is None or (encoded is not None and len(encoded.ids) <= limit):
            assert encoded is not None  # without a limit, `is_long` is False
            return encoded
        if encoded is not None and not self.may_cut:
            raise TooLong.of(len(encoded.ids), limit)
        ends = token_ends(self.tokenizer, text)
        answers = conversation.answers_in(cuttable, [turn.message for turn in turns])
        spared = [tokens_of(ends, place) for place in answers]
        parts, left = [range(len(ends))], len(ends)

        def cut() -> _Encoded:
            shorter = conversation.with_text(cuttable, shortened(text, ends, parts))
            return self._encoded([self.frame.turn(shorter, turn.message) for turn in turns])

        if encoded is None:
            left = min(left, limit)
            parts = kept_parts(len(ends), left, spared)
            encoded = cut()
        others, keep = len(encoded.ids) - left, min(cuttable.keep, len(ends))
        while len(encoded.ids) > limit:
            left -= len(encoded.ids) - limit
            if left < keep:
                raise LRSAError(
                    f"its question and answer alone need {others + keep} tokens, more than seq_len={limit}: "
                    "raise seq_len or leave the row out."
                )
            parts = kept_parts(len(ends), left, spared)
            encoded = cut()
        lost = any(not is_spared(parts, place) for place in spared)
        return encoded._replace(num_cut=others + len(ends) - len(encoded.ids), answer_lost=lost)

    def _encoded(self, turns: list[Turn]) -> "_Encoded":
        """The last turn, together with the turns before it that stand unchanged in its prompt."""
        last = turns[-1]
        shared = [t for t in turns[:-1] if self.special.is_border(t.end) and last.prompt.startswith(t.text)]
        sections = self._sections([*shared, last])
        while None in (section.target for section in sections[:-1]):
            shared = [turn for turn, section in zip(shared, sections, strict=False) if section.target is not None]
            sections = self._sections([*shared, last])
        ids, labels, num_prompt = list(self.before), [IGNORE] * len(self.before), 0
        for number, (prompt, target) in enumerate(sections):
            assert target is not None  # turns without a target were removed
            # A section after another one begins with the token that ends the previous turn.
            ends = prompt[: min(number, 1)]
            num_prompt = len(ids) + len(prompt)
            ids += prompt + target
            labels += ends + [IGNORE] * (len(prompt) - len(ends)) + target
        end = self._tokens([last.end + last.after])[0] if last.end else self.eos
        if last.end or ids[-1:] != end:
            ids += end
            labels += end[:1] + [IGNORE] * len(end[1:])
        labels[0] = IGNORE
        return _Encoded(ids, labels, num_prompt, {turn.message for turn in (*shared, last)})

    def _sections(self, turns: list[Turn]) -> list["_Section"]:
        """The text of the last turn in sections, one for each turn; a section ends with the answer of its turn.

        Everything is tokenized once, except a few characters before each answer, which are tokenized again together
        with it. The target of a turn is None if the tokenizer joins it with its prompt; the last one is never None.
        """
        pieces, borders, start = [], [], 0
        for turn in turns:
            stop = len(turn.prompt)
            border = self.special.last_border(turn.prompt, start, stop)
            near = turn.prompt[max(start, stop - WINDOW_CHARACTERS) if border is None else border :]
            pieces += [turn.prompt[start:border], near, near + turn.answer]
            borders.append(border)
            start = stop + len(turn.answer)
        tokens = iter(self._tokens(pieces))
        sections = []
        for border, head, near, answered in zip(borders, tokens, tokens, tokens, strict=True):
            # After a border, tokens are those of the complete text; without one, the last tokens are compared.
            is_alike = border is not None or head[-WINDOW_TOKENS:] == near[-WINDOW_TOKENS:]
            is_continued = is_alike and answered[: len(near)] == near
            target = answered[len(near) :] if is_continued else None
            sections.append(_Section(head if border is None else head + near, target))
        if target is None:
            text = pieces[-2] if is_alike else pieces[-3]
            sections[-1] = _Section(sections[-1].prompt, self._continuation(text, turns[-1].answer))
        return sections

    def _continuation(self, text: str, answer: str) -> list[int]:
        """Tokens of the answer after those of `text`, if the tokenizer would join the end of the two in one token.

        In inference the prompt is tokenized already: its tokens stay, and the answer gets other tokens than in one
        text. The answer is tokenized after several beginnings; the right tokens decode to the same text.

        Raises:
            LRSAError: none of them is right.
        """
        prompt, whole = self._tokens([text, text + answer])
        for before in (text, "", "\n", "x", text[-1:]):
            known, found = self._tokens([before, before + answer])
            target = found[len(known) :]
            if found[: len(known)] == known and self._decoded(prompt + target) == self._decoded(whole):
                return target
        raise LRSAError(
            f"the tokenizer joins the end of the prompt, {text[-20:]!r}, with the beginning of the answer, "
            f"{answer[:20]!r}, in one token, and has no others for the answer alone: end the prompt elsewhere."
        )

    def _tokens(self, texts: list[str]) -> list[list[int]]:
        options = {"add_special_tokens": False, "return_attention_mask": False, "verbose": False}
        return self.tokenizer(texts, **options).input_ids

    def _decoded(self, ids: list[int]) -> str:
        return decoded(self.tokenizer, ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)

    def _text_examples(self, row: dict[str, Any], index: int) -> list[Example]:
        ids = self.start + self._tokens([row["text"]])[0] + self.eos
        pieces = [ids[start : start + self.seq_len] for start in range(0, len(ids), self.seq_len)]
        # A single token has no target.
        return [Example(piece, [IGNORE, *piece[1:]], row["task"], index) for piece in pieces if len(piece) > 1]


class _Section(NamedTuple):
    """Tokens of a prompt, from the end of the previous section on, and of the answer after it."""

    prompt: list[int]
    target: list[int] | None


class _Encoded(NamedTuple):
    """An example without index and task: `num_prompt` tokens before its last target; `trained` are its messages."""

    ids: list[int]
    labels: list[int]
    num_prompt: int
    trained: set[int]
    num_cut: int = 0
    answer_lost: bool = False


def _start_of_text(tokenizer: Tokenizer) -> list[int]:
    """The tokens that the tokenizer adds before a text."""
    alone = tokenizer("a", add_special_tokens=False).input_ids
    framed = tokenizer("a").input_ids
    return next((framed[:i] for i in range(len(framed)) if framed[i : i + len(alone)] == alone), [])
