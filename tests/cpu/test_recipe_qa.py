"""The procedure: turns, labels and cutting; the data of a run are in test_recipe_data.py."""

import pickle

import pytest

from lrsa_ds.data.packing import IGNORE
from lrsa_ds.data.tokenizer import load_tokenizer
from lrsa_ds.errors import LRSAError
from lrsa_ds.settings.model import ModelConfig
from recipes import load_procedure
from recipes.qa import encode, prepare

MODEL = ModelConfig(random={"model_type": "llama"}, tokenizer="bytes")
CHATML = load_tokenizer(MODEL)
LLAMA3 = load_tokenizer(MODEL)
LLAMA3.add_special_tokens(
    {"bos_token": "<|begin|>", "additional_special_tokens": ["<|start_header|>", "<|end_header|>", "<|eot|>"]}
)
LLAMA3.chat_template = (
    "{% for m in messages %}{% if loop.first %}{{ bos_token }}{% endif %}"
    "<|start_header|>{{ m['role'] }}<|end_header|>\n\n{{ m['content'] | trim }}<|eot|>{% endfor %}"
    "{% if add_generation_prompt %}<|start_header|>assistant<|end_header|>\n\n{% endif %}"
)
PLAIN = load_tokenizer(MODEL)
PLAIN.chat_template = None

QA = {"context": "  Some long text.\nMore of it. ", "question": "Who?", "answer": "Nobody."}
PROMPT = {"prompt": "Say it:", "completion": " it"}
CHAT = {
    "messages": [
        {"role": "system", "content": "Be kind."},
        {"role": "user", "content": " Hello "},
        {"role": "assistant", "content": "Hi."},
        {"role": "user", "content": "Bye"},
        {"role": "assistant", "content": "See you\n"},
    ]
}


def targets(tokenizer, example):
    """The text of every run of targets."""
    runs, run = [], []
    for label, token in zip([*example.labels, IGNORE], [*example.input_ids, None], strict=True):
        assert label in (IGNORE, token)
        if label != IGNORE:
            run.append(label)
        elif run:
            runs.append(tokenizer.decode(run))
            run = []
    return runs


@pytest.mark.parametrize("tokenizer", [CHATML, LLAMA3], ids=["chatml", "llama3"])
def test_examples_are_what_the_template_renders(tokenizer):
    user = f"{QA['context']}\n\nQuestion: Who?"
    for row, messages, answers in (
        (CHAT, CHAT["messages"], ["Hi.", "See you\n"]),
        (PROMPT, [{"role": "user", "content": "Say it:"}, {"role": "assistant", "content": " it"}], [" it"]),
        (QA, [{"role": "user", "content": user}, {"role": "assistant", "content": "Nobody."}], ["Nobody."]),
    ):
        (example,) = encode(row, tokenizer, 4096)
        rendered = tokenizer.apply_chat_template(messages, tokenize=False)
        assert example.input_ids == tokenizer(rendered, add_special_tokens=False).input_ids
        end = "<|im_end|>" if tokenizer is CHATML else "<|eot|>"
        expected = answers if tokenizer is CHATML else [answer.strip() for answer in answers]
        assert targets(tokenizer, example) == [answer + end for answer in expected]


def test_without_a_template():
    for tokenizer, chat_template in ((PLAIN, True), (CHATML, False)):
        (example,) = encode(QA, tokenizer, 4096, chat_template)
        text = f"{QA['context']}\n\nQuestion: Who?\nAnswer: Nobody.<|im_end|>"
        assert tokenizer.decode(example.input_ids) == text and example.task == "qa"
        assert targets(tokenizer, example) == [" Nobody.<|im_end|>"]
        (example,) = encode(PROMPT, tokenizer, 4096, chat_template)
        assert tokenizer.decode(example.input_ids) == "Say it: it<|im_end|>"
        assert targets(tokenizer, example) == [" it<|im_end|>"]
        with pytest.raises(LRSAError, match=r"messages need a chat template: set data.chat_template=true"):
            encode(CHAT, tokenizer, 4096, chat_template)


def test_a_template_without_an_end_token_gets_one():
    tokenizer = pickle.loads(pickle.dumps(CHATML))
    tokenizer.chat_template = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
    # Nothing in the history says that a turn is over, so every turn is an example that does.
    assert [targets(tokenizer, example) for example in encode(CHAT, tokenizer, 4096)] == [
        ["assistant: Hi.<|im_end|>"],
        ["assistant: See you\n<|im_end|>"],
    ]


@pytest.mark.parametrize(
    ("template", "sentence"),
    [
        ("{{ raise_exception('System role not supported') }}", r"refuses the roles system, user.*System role not supp"),
        (
            "{% for m in messages %}{{ m['content'] | upper }}{% endfor %}",
            "drops or changes message 1 of the role system, which starts with 'Be kind.'",
        ),
        ("{{ messages[-1]['content'] }}", "drops or changes message 1 of the role system"),
        (
            "{% for m in messages %}[{{ m['content'] | replace('Hello', 'Hi') }}]{% endfor %}",
            r"drops or changes message 2 of the role user, which starts with 'Hello'",
        ),
    ],
)
def test_templates_that_cannot_be_used(template, sentence):
    tokenizer = pickle.loads(pickle.dumps(CHATML))
    tokenizer.chat_template = template
    with pytest.raises(LRSAError, match=sentence):
        encode(CHAT, tokenizer, 4096)


@pytest.mark.parametrize("tokenizer", [CHATML, LLAMA3, PLAIN], ids=["chatml", "llama3", "plain"])
def test_cutting_keeps_question_and_answer(tokenizer):
    context = " ".join(str(i) for i in range(500))
    row = {"context": context, "question": "What is asked here?", "answer": "This is answered."}
    (whole,) = encode(row, tokenizer, 10_000)
    for seq_len in (len(whole.input_ids), len(whole.input_ids) - 1, 512, 160):
        (example,) = encode(row, tokenizer, seq_len)
        assert len(example.input_ids) == len(example.labels) == seq_len
        text = tokenizer.decode(example.input_ids)
        assert "Question: What is asked here?" in text and "This is answered." in text
        assert "0 1 2" in text and "498 499" in text, "the middle is cut, not the ends"
        assert targets(tokenizer, example) == targets(tokenizer, whole)
        assert example.input_ids[-60:] == whole.input_ids[-60:]
    with pytest.raises(LRSAError, match=r"its question and answer alone need .* tokens, more than seq_len=64: raise"):
        encode({**row, "question": row["question"] * 9}, tokenizer, 64)


def test_cutting_conversations_and_prompts():
    long = " ".join(str(i) for i in range(300))
    messages = [*CHAT["messages"][:3], {"role": "user", "content": long}, {"role": "assistant", "content": "Fine."}]
    (example,) = encode({"messages": messages}, CHATML, 400)
    text = CHATML.decode(example.input_ids)
    assert len(example.input_ids) == 400 and "Be kind." in text and "298 299" in text and "0 1 2" in text
    assert targets(CHATML, example) == ["Hi.<|im_end|>", "Fine.<|im_end|>"]
    (example,) = encode({"prompt": long, "completion": "Fine."}, CHATML, 200)
    assert len(example.input_ids) == 200 and targets(CHATML, example) == ["Fine.<|im_end|>"]
    with pytest.raises(LRSAError, match=r"more than seq_len=80"):
        encode({"prompt": long, "completion": "Fine."}, CHATML, 80)


def test_text_gives_pieces_with_every_token_once():
    text = "All of this is to be learnt. " * 20
    pieces = encode({"text": text}, CHATML, 128)
    assert [len(p.input_ids) for p in pieces[:-1]] == [128] * (len(pieces) - 1)
    assert CHATML.decode([t for p in pieces for t in p.input_ids]) == text + "<|im_end|>"
    for piece in pieces:
        assert piece.labels == [IGNORE, *piece.input_ids[1:]] and piece.task == "text"


def test_an_unknown_row_and_an_unknown_procedure():
    with pytest.raises(LRSAError, match=r"a row: no known shape"):
        encode({"foo": 1}, CHATML, 128)
    assert load_procedure("qa").prepare is prepare
    with pytest.raises(LRSAError, match=r"procedure='nope' is not valid: give qa or a module"):
        load_procedure("nope")
