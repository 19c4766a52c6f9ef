"""The generated source: real documents, disjoint splits, answers that stand in the context, and the token budget."""

import ast
import pickle
import re

import pytest

from lrsa_ds.data.stdlib_docs import _signature, load_documents
from lrsa_ds.data.stdlib_qa import StdlibQA
from lrsa_ds.data.tokenizer import load_tokenizer
from lrsa_ds.errors import LRSAError
from lrsa_ds.settings.model import ModelConfig
from recipes.qa import Encoder

TASKS = ["signature", "passkey", "lookup"]
TOKENIZER = load_tokenizer(ModelConfig(random={"model_type": "llama"}, tokenizer="bytes"))


def source(split="train", context_length=4096, seed=0, tasks=TASKS):
    return StdlibQA(split, seed, tasks, context_length, TOKENIZER, Encoder(TOKENIZER, context_length).length)


def test_documents():
    documents = load_documents()
    by_name = {d.name: d for d in documents}
    assert len(by_name) == len(documents) > 3000
    assert sum(d.signature is not None for d in documents) > 2000
    assert by_name["shutil.copytree"].header.startswith("### shutil.copytree(src, dst, symlinks=False, ignore=None")
    assert by_name["argparse.ArgumentParser.error"].signature == "(message)"
    assert max(len(d.doc) for d in documents) <= 3000
    assert not [d.name for d in documents if re.search(r"\._|^(test|idlelib|tkinter)\.", d.name)]
    load_documents.cache_clear()
    assert load_documents() == documents


@pytest.mark.parametrize(
    ("code", "in_class", "signature"),
    [
        ("def f(a, /, b: int = 1, *, c='x', **d) -> str: ...", False, "(a, /, b: int=1, *, c='x', **d) -> str"),
        ("def f(self, a=None): ...", True, "(a=None)"),
        ("def f(self, /, a): ...", True, "(a)"),
        ("@classmethod\ndef f(cls, a): ...", True, "(a)"),
        ("@staticmethod\ndef f(a, b): ...", True, "(a, b)"),
        ("async def f(): ...", False, "()"),
        ("@property\ndef f(self): ...", True, None),
        ("class C:\n  def __init__(self, a) -> None: ...", False, "(a)"),
        ("class C: ...", False, None),
        (f"def f({', '.join(f'argument_{i}' for i in range(12))}): ...", False, None),
    ],
)
def test_signatures(code, in_class, signature):
    assert _signature(ast.parse(code).body[0], in_class) == signature


def test_splits_share_no_module():
    train, validation = (
        {d.module.split(".")[0] for d in load_documents() if d.is_validation == v} for v in (False, True)
    )
    assert not train & validation
    assert 0.08 < len(validation) / len(train | validation) < 0.25
    asked = {d.module.split(".")[0] for d in source("validation").signatures}
    assert asked <= validation and not asked & {d.module.split(".")[0] for d in source("train").signatures}


@pytest.mark.parametrize("split", ["train", "validation"])
def test_answers_stand_in_the_context(split):
    rows = source(split)
    for index in range(12):
        row = rows.row(0, index, "signature")
        name = re.fullmatch(r"What is the signature of (.+)\?", row["question"])[1]
        lines = row["context"].splitlines()
        assert f"### {name}{row['answer']}" in lines, "the header is there, uncut"
        assert sum(line.startswith((f"### {name}(", f"### {name}\n")) for line in lines) == 1
        row = rows.row(0, index, "passkey")
        assert re.fullmatch(r"\d{32}", row["answer"])
        assert f"The pass key is {row['answer']}. Remember it. {row['answer']} is the pass key." in row["context"]
        row = rows.row(0, index, "lookup")
        pairs = dict(re.findall(r"The special number for (\w+) is (\d{7})\.", row["context"]))
        word = re.fullmatch(r"What is the special number for (\w+)\?", row["question"])[1]
        assert len(pairs) == 16 and pairs[word] == row["answer"]


def test_an_example_is_a_function_of_split_seed_epoch_and_index():
    rows, again = source(), pickle.loads(pickle.dumps(source()))
    assert [rows.row(1, i) for i in (5, 3)] == [again.row(1, i) for i in (5, 3)]
    variants = [
        rows.row(1, 5),
        rows.row(1, 6),
        rows.row(2, 5),
        source(seed=1).row(1, 5),
        source("validation").row(1, 5),
    ]
    assert len({row["context"] for row in variants}) == 5
    assert {rows.row(0, i)["task"] for i in range(30)} == set(TASKS)


def test_the_longest_context_needs_documents_again():
    rows = source("validation", context_length=2**18, tasks=["passkey"])
    length = Encoder(TOKENIZER, 2**18).length(rows.row(0, 0))
    assert 0.99 * 2**18 < length <= 2**18


def test_too_short_for_one_question():
    with pytest.raises(LRSAError, match=r"^seq_len \(and data.context_length .*give at least \d+\.$") as caught:
        source(context_length=150)
    minimum = int(re.search(r"at least (\d+)", str(caught.value))[1])
    assert minimum <= 300
    rows = source(context_length=minimum)
    for index in range(30):
        assert Encoder(TOKENIZER, minimum).length(rows.row(0, index)) <= minimum


def test_several_questions_over_one_context():
    length = 6000
    options = (TASKS, length, TOKENIZER, Encoder(TOKENIZER, length).length, 8, 6)
    rows = StdlibQA("train", 0, *options)
    seen = set()
    for index in range(8):
        row = rows.row(0, index)
        assert Encoder(TOKENIZER, length).length(row) <= length + 64
        context, first = row["messages"][0]["content"].rsplit("\n\nQuestion: ", 1)
        questions = [first, *(m["content"].removeprefix("Question: ") for m in row["messages"][2::2])]
        answers = [m["content"] for m in row["messages"][1::2]]
        assert len(set(questions)) == len(answers) == 6 and questions.count("What is the pass key?") <= 1
        pairs = dict(re.findall(r"The special number for (\w+) is (\d{7})\.", context))
        for question, answer in zip(questions, answers, strict=True):
            seen.add(question.split(" ")[3])
            if found := re.fullmatch(r"What is the signature of (.+)\?", question):
                assert f"### {found[1]}{answer}" in context.splitlines()
            elif found := re.fullmatch(r"What is the special number for (\w+)\?", question):
                assert pairs[found[1]] == answer
            else:
                assert f"The pass key is {answer}." in context
    assert {"pass", "signature", "special"} <= seen
    assert len(rows.row(0, 0, "passkey")["answer"]) == 32
    assert {m["content"] for m in rows.row(0, 0, "lookup")["messages"][1::2]} <= set(
        re.findall(r"\d{7}", rows.row(0, 0, "lookup")["messages"][0]["content"])
    )
    assert rows.row(3, 5) == pickle.loads(pickle.dumps(rows)).row(3, 5)
    with pytest.raises(LRSAError, match=r"questions_per_context=6: a context holds one pass key"):
        StdlibQA("train", 0, ["passkey"], *options[1:])
    with pytest.raises(LRSAError, match=r"questions_per_context=90 is more than fits: they need \d+ tokens"):
        StdlibQA("train", 0, TASKS, *options[1:-1], 90)
