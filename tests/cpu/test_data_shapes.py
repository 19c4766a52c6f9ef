"""Rows in the shapes that people publish, each with its one right canonical form; the contents are ours."""

import pytest

from lrsa_ds.data.shapes import canonical
from lrsa_ds.errors import LRSAError


def said(*turns, **fields):
    """Canonical messages of "u: text", "a: text" (trained on) and "x: text" (the assistant's, not trained on)."""
    roles = {"s": "system", "u": "user", "a": "assistant", "x": "assistant", "t": "tool"}
    messages = []
    for turn in turns:
        letter, content = turn.split(": ", 1)
        message = {"role": roles[letter], "content": content}
        messages.append(message | ({"train": letter == "a"} if letter in "ax" else {}))
    return {"messages": messages, "task": "chat", **fields}


def call(name, arguments, **identity):
    return {"type": "function", **identity, "function": {"name": name, "arguments": arguments}}


def asked(context, **fields):
    return {"context": context, "question": "Where?", "answer": "in Rome", "task": "qa", **fields}


CONTEXT = "It stands in Rome, on a hill."
U, A = {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}
WEATHER = {"name": "weather", "description": "Of a city.", "parameters": {"type": "object", "properties": {}}}
TOOL = {"type": "function", "function": WEATHER}
CALLED = {"role": "assistant", "content": "", "tool_calls": [call("weather", {"city": "Rome"})], "train": True}
RESULT = {"role": "tool", "content": "Sun"}
TOOL_CHAT = {"messages": [said("u: Hi")["messages"][0], CALLED, RESULT, A | {"train": True}], "task": "chat"}

ROWS = {
    "openai chat": ({"messages": [{"role": "system", "content": "S"}, U, A]}, said("s: S", "u: Hi", "a: Ho")),
    "several turns": ({"messages": [U, A, U, A]}, said("u: Hi", "a: Ho", "u: Hi", "a: Ho")),
    "a prompt beside messages": ({"prompt": "Hi", "prompt_id": "7", "messages": [U, A]}, said("u: Hi", "a: Ho")),
    "keys filled with None": (
        {"messages": [U | {"tool_calls": None, "name": None}, A | {"tool_calls": None}], "tools": None},
        said("u: Hi", "a: Ho"),
    ),
    "sharegpt": (
        {"id": "x1", "conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Ho"}]},
        said("u: Hi", "a: Ho"),
    ),
    "sharegpt with system": (
        {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Ho"}], "system": "S"},
        said("s: S", "u: Hi", "a: Ho"),
    ),
    "sharegpt with a system turn": (
        {
            "conversations": [
                {"from": "system", "value": "S"},
                {"from": "user", "value": "Hi"},
                {"from": "assistant", "value": "Ho"},
            ]
        },
        said("s: S", "u: Hi", "a: Ho"),
    ),
    "conversations of roles": ({"conversations": [U, A], "source": "x"}, said("u: Hi", "a: Ho")),
    "messages of from and value": (
        {"messages": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Ho"}]},
        said("u: Hi", "a: Ho"),
    ),
    "content in parts": (
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "H"}, {"type": "text", "text": "i"}]}, A]},
        said("u: Hi", "a: Ho"),
    ),
    "content in parts of text": ({"messages": [{"role": "user", "content": ["H", "i"]}, A]}, said("u: Hi", "a: Ho")),
    "train: false": ({"messages": [U, A | {"train": False}, U, A]}, said("u: Hi", "x: Ho", "u: Hi", "a: Ho")),
    "weight: 0": (
        {"messages": [U, A | {"weight": 0}, U, A | {"weight": 1}]},
        said("u: Hi", "x: Ho", "u: Hi", "a: Ho"),
    ),
    "weight: 0.0": ({"messages": [U, A | {"weight": 0.0}, U, A]}, said("u: Hi", "x: Ho", "u: Hi", "a: Ho")),
    "loss on a message": (
        {"messages": [U | {"loss": False}, A | {"loss": False}, U, A | {"loss": True}]},
        said("u: Hi", "x: Ho", "u: Hi", "a: Ho"),
    ),
    "a mask on a message": (
        {"messages": [U | {"masked": True}, A | {"masked": True}, U, A | {"mask": False}]},
        said("u: Hi", "x: Ho", "u: Hi", "a: Ho"),
    ),
    "reasoning": (
        {"messages": [U, A | {"reasoning_content": "So."}]},
        {"messages": [U, A | {"train": True, "reasoning_content": "So."}], "task": "chat"},
    ),
    "reasoning by another name": (
        {"messages": [U, A | {"thinking": "So."}]},
        {"messages": [U, A | {"train": True, "reasoning_content": "So."}], "task": "chat"},
    ),
    "tool calls with JSON text": (
        {
            "messages": [
                U,
                {
                    "role": "assistant",
                    "content": None,
                    "tool_calls": [
                        {
                            "id": "c1",
                            "type": "function",
                            "function": {"name": "weather", "arguments": '{"city": "Rome"}'},
                        }
                    ],
                },
                {"role": "tool", "tool_call_id": "c1", "content": "Sun"},
                A,
            ],
            "tools": [TOOL],
        },
        {
            "messages": [
                U,
                CALLED | {"tool_calls": [call("weather", {"city": "Rome"}, id="c1")]},
                RESULT | {"tool_call_id": "c1"},
                A | {"train": True},
            ],
            "tools": [TOOL],
            "task": "chat",
        },
    ),
    "tool calls with an object": (
        {
            "messages": [U, {"role": "assistant", "tool_calls": [call("weather", {"city": "Rome"})]}, RESULT, A],
            "tools": [WEATHER],
        },
        {**TOOL_CHAT, "tools": [TOOL]},
    ),
    "a flat tool call, and tools as JSON text": (
        {
            "messages": [
                U,
                {"role": "assistant", "tool_calls": [{"name": "weather", "arguments": {"city": "Rome"}}]},
                RESULT,
                A,
            ],
            "tools": '[{"name": "weather"}]',
        },
        {**TOOL_CHAT, "tools": [{"type": "function", "function": {"name": "weather"}}]},
    ),
    "function_call and role function": (
        {
            "messages": [
                U,
                {
                    "role": "assistant",
                    "content": None,
                    "function_call": {"name": "weather", "arguments": '{"city": "Rome"}'},
                },
                {"role": "function", "content": "Sun"},
                A,
            ]
        },
        TOOL_CHAT,
    ),
    "sharegpt with tools": (
        {
            "conversations": [
                {"from": "human", "value": "Hi"},
                {"from": "function_call", "value": '{"name": "weather", "arguments": {"city": "Rome"}}'},
                {"from": "observation", "value": "Sun"},
                {"from": "gpt", "value": "Ho"},
            ],
            "tools": "[]",
        },
        TOOL_CHAT,
    ),
    "alpaca": (
        {"instruction": "Add.", "input": "1 2", "output": "3"},
        {"prompt": "Add.\n\n1 2", "completion": "3", "task": "completion"},
    ),
    "alpaca without input": (
        {"instruction": "Sing.", "input": "", "output": "La"},
        {"prompt": "Sing.", "completion": "La", "task": "completion"},
    ),
    "alpaca with its rendered text": (
        {"instruction": "Sing.", "input": "", "output": "La", "text": "Below is ... Sing. ... La"},
        {"prompt": "Sing.", "completion": "La", "task": "completion"},
    ),
    "alpaca with history": (
        {"instruction": "More.", "input": "", "output": "Lo", "history": [["Sing.", "La"]], "system": "S"},
        said("s: S", "u: Sing.", "a: La", "u: More.", "a: Lo"),
    ),
    "instruction, context, response": (
        {"instruction": "Where?", "context": CONTEXT, "response": "Rome", "category": "closed_qa"},
        {"prompt": f"Where?\n\n{CONTEXT}", "completion": "Rome", "task": "completion"},
    ),
    "instruction and response": (
        {"instruction": "Sing.", "response": "La"},
        {"prompt": "Sing.", "completion": "La", "task": "completion"},
    ),
    "prompt and completion": (
        {"prompt": "Sing:", "completion": " La"},
        {"prompt": "Sing:", "completion": " La", "task": "completion"},
    ),
    "prompt and response": (
        {"prompt": "Sing:", "response": "La"},
        {"prompt": "Sing:", "completion": "La", "task": "completion"},
    ),
    "prompt and completion as messages": (
        {"prompt": [U, A, U], "completion": [A]},
        said("u: Hi", "x: Ho", "u: Hi", "a: Ho"),
    ),
    "squad, flat": (
        {
            "id": "5",
            "title": "T",
            "context": CONTEXT,
            "question": "Where?",
            "answers": {"text": ["in Rome"], "answer_start": [10]},
        },
        asked(CONTEXT, answer_start=10, title="T"),
    ),
    "squad, several answers": (
        {"context": CONTEXT, "question": "Where?", "answers": {"text": ["in Rome", "Rome"], "answer_start": [10, 13]}},
        asked(CONTEXT, answer_start=10, answers=["in Rome", "Rome"]),
    ),
    "squad, answers as published": (
        {"context": CONTEXT, "question": "Where?", "answers": [{"text": "in Rome", "answer_start": 10}]},
        asked(CONTEXT, answer_start=10),
    ),
    "a wrong place of the answer": (
        {"context": CONTEXT, "question": "Where?", "answer": "in Rome", "answer_start": 3},
        asked(CONTEXT),
    ),
    "an answer with its place": (
        {"context": CONTEXT, "question": "Where?", "answer": "in Rome", "answer_start": 10, "n": 1},
        asked(CONTEXT, answer_start=10),
    ),
    "answer and its aliases": (
        {"context": "", "question": "Where?", "answer": "in Rome", "answers": ["Rome", "in Rome"], "task": "trivia"},
        asked("", answers=["in Rome", "Rome"]) | {"task": "trivia"},
    ),
    "context as a list of passages": (
        {"context": ["One.", "Two."], "question": "Where?", "answers": ["in Rome"]},
        asked("One.\n\nTwo."),
    ),
    "hotpotqa, as published": (
        {
            "context": [["A", ["One.", " Two."]], ["B", ["Three."]]],
            "question": "Where?",
            "answer": "in Rome",
            "_id": "5",
        },
        asked("A\nOne. Two.\n\nB\nThree."),
    ),
    "hotpotqa, as columns": (
        {
            "context": {"title": ["A", "B"], "sentences": [["One.", " Two."], ["Three."]]},
            "question": "Where?",
            "answer": "in Rome",
        },
        asked("A\nOne. Two.\n\nB\nThree."),
    ),
    "plain text with metadata": (
        {"text": "Once.", "meta": {"set": "x"}, "url": "u", "timestamp": "2020-01-01T00:00:00Z"},
        {"text": "Once.", "task": "text"},
    ),
    "tokens": ({"input_ids": [5, 6, 7]}, {"input_ids": [5, 6, 7], "labels": [5, 6, 7], "task": "tokens"}),
    "tokens with labels": (
        {"input_ids": [5, 6, 7], "attention_mask": [1, 1, 1], "labels": [-100, -100, 7], "text": "abc"},
        {"input_ids": [5, 6, 7], "labels": [-100, -100, 7], "task": "tokens"},
    ),
}


@pytest.mark.parametrize("shape", list(ROWS))
def test_a_row_that_people_have(shape):
    row, expected = ROWS[shape]
    assert canonical(row) == expected
    assert canonical(expected) == expected


def test_a_mapped_column_decides_the_shape():
    row = {"messages": [U, A], "in": "Sing:", "out": "La", "passage": CONTEXT}
    assert canonical(row, {"prompt": "in", "completion": "out"})["completion"] == "La"
    assert canonical({"dialog": [U, A], "text": "x"}, {"messages": "dialog"}) == said("u: Hi", "a: Ho")


REFUSED = {
    "an image": (
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}, A]},
        r"the content of message 1 has a part of type 'image_url'",
    ),
    "images on a message": ({"messages": [U | {"images": ["x.png"]}, A]}, r"message 1 has images"),
    "content that is an object": (
        {"messages": [U, {"role": "assistant", "content": {"a": 1}}]},
        r"message 2 has to be",
    ),
    "nothing trained": ({"messages": [U, A | {"train": False}]}, r"nothing to learn: every message"),
    "a share as weight": ({"messages": [U, A | {"weight": 0.5}]}, r"weight of message 2 is 0.5: give 0 or 1"),
    "a mask as a number": ({"messages": [U, A | {"mask": 1}]}, r"mask of message 2 is 1: give true or false"),
    "two flags": ({"messages": [U, A | {"train": True, "weight": 0}]}, r"train and weight of message 2 contradict"),
    "a user to learn from": ({"messages": [U | {"train": True}, A]}, r"message 1 of the role user is marked"),
    "arguments that are no JSON": (
        {"messages": [U, {"role": "assistant", "tool_calls": [{"name": "f", "arguments": "{city"}]}]},
        r"the arguments of a tool call of message 2 has to be JSON",
    ),
    "tools without names": ({"messages": [U, A], "tools": [{"a": 1}]}, r"one of them has no name"),
    "an empty answer": ({"messages": [U, {"role": "assistant", "content": " "}]}, r"answer is empty"),
    "half a surrogate pair": (
        {"prompt": "a\ud83d", "completion": "b"},
        r"prompt holds half of a surrogate pair \(\\ud83d at character 2\)",
    ),
    "half a pair in a message": (
        {"messages": [U, {"role": "assistant", "content": "\udc00"}]},
        r"message 2 holds half",
    ),
    "an unanswerable question": (
        {"context": "c", "question": "q", "answers": {"text": [], "answer_start": []}, "is_impossible": True},
        r"answers is empty",
    ),
    "a preference pair": ({"prompt": "p", "chosen": "a", "rejected": "b"}, r"completion is missing"),
    "shifted labels": ({"input_ids": [5, 6, 7], "labels": [6, 7, -100]}, r"labels\[0\]=6 is neither .* not shifted"),
    "labels of another length": ({"input_ids": [5, 6], "labels": [5]}, r"labels has 1 entries and input_ids 2"),
    "no label": ({"input_ids": [5, 6], "labels": [5, -100]}, r"labels has no target token"),
    "padding": ({"input_ids": [5, 6, 0], "attention_mask": [1, 1, 0]}, r"attention_mask has zeros"),
    "tokens that are none": ({"input_ids": [5, 6.5]}, r"input_ids has to be a list of whole numbers"),
}


@pytest.mark.parametrize("case", list(REFUSED))
def test_what_cannot_be_honoured_is_refused(case):
    row, sentence = REFUSED[case]
    with pytest.raises(LRSAError, match=sentence):
        canonical(row)


def test_a_column_that_is_not_used_never_matters():
    for rest in ({"note": "\ud83d"}, {"id": 10**400}, {"score": float("nan")}, {"answer": 3}, {"images": ["x"]}):
        assert canonical({"prompt": "p", "completion": "c", **rest})["completion"] == "c"
