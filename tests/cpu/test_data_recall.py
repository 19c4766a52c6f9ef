"""Questions that raw text answers by itself: every answer is checked against its context; mixtures with the others."""

import json
import pickle
import random
import re
from itertools import islice

import pytest
import torch

from lrsa_ds.config import AttentionConfig, DataConfig, EvalConfig, ModelConfig, TrainConfig
from lrsa_ds.data.packing import IGNORE
from lrsa_ds.data.recall_questions import RecallText
from lrsa_ds.data.recall_texts import EXCERPT_CHARACTERS, pieces_of
from lrsa_ds.data.stream import TrainStream
from lrsa_ds.data.tokenizer import load_tokenizer
from lrsa_ds.errors import LRSAError
from recipes.qa import prepare
from tests.helpers import all_examples, write_rows

MODEL = ModelConfig(random={"model_type": "llama"}, tokenizer="bytes")
CHATML = load_tokenizer(MODEL)
TASKS = ("continue", "fill", "heading", "order")


def sentence(rng):
    words = ["".join(rng.choices("abcdefghijklmnopqrstuvwxyz", k=rng.randrange(3, 9))) for _ in range(16)]
    words[rng.randrange(9, 15)] = str(rng.randrange(1000, 9999))
    return f"{' '.join(words).capitalize()}."


def texts(num_texts=30, with_headings=True):
    """Each of several sections; no sentence stands twice."""
    for number in range(num_texts):
        rng = random.Random(number)
        parts = []
        for section in range(4):
            kinds = (
                f"## Part {section} of {number}",
                f"Part {section} of {number}\n======",
                f"Part {section} of {number}",
            )
            parts += [kinds[section % 3]] if with_headings else []
            parts += [" ".join(sentence(rng) for _ in range(4)) for _ in range(2)]
        yield {"text": "\n\n".join(parts)}


@pytest.fixture
def path(tmp_path):
    return write_rows(tmp_path / "texts.jsonl", texts())


def config(data, seed=0, num_validation=3, seq_len=4096):
    evaluation = EvalConfig(num_examples=num_validation)
    attention = AttentionConfig(lag_size=64)
    return TrainConfig(model=MODEL, seed=seed, seq_len=seq_len, data=data, eval=evaluation, attention=attention)


def recall(path=None, **data):
    return DataConfig(**({"source": "recall", "path": path, "num_examples": 12, "questions_per_context": 4} | data))


def turns(example):
    """The context, and each question with its answer."""
    text = CHATML.decode(example.input_ids)
    context = text.split("Question: ")[0].removeprefix("<|im_start|>user\n")
    pairs = re.findall(r"Question: (.+?)<\|im_end\|>\n<\|im_start\|>assistant\n(.+?)<\|im_end\|>", text)
    return " ".join(context.split()), pairs


def check_answer(context, question, answer):
    """Whether the context gives this answer, and no other; returns the task."""
    if found := re.fullmatch(r'How does the text go on after "(.+)"\?', question):
        assert context.count(found[1]) == 1 and f"{found[1]} {answer}" in context
        return "continue"
    if found := re.fullmatch(r'Which (?:word|number) is missing in "(.*)____(.*)"\?', question):
        before, after = map(re.escape, found.groups())
        assert re.findall(rf"{before}(\S+?){after}", context) == [answer]
        return "fill"
    if found := re.fullmatch(r'What follows the heading "(.+)"\?', question):
        assert re.search(rf"{re.escape(found[1])}(?: =+)? {re.escape(answer)}", context)
        return "heading"
    first, second = re.fullmatch(r'Which comes first in the text, "(.+)" or "(.+)"\?', question).groups()
    assert context.count(first) == context.count(second) == 1
    assert answer == min(first, second, key=context.index)
    return "order"


def test_every_answer_stands_in_its_context(path):
    data = prepare(config(recall(path)), CHATML)
    seen, answers = set(), []
    for epoch in (0, 1):
        examples = all_examples(data, epoch)
        assert len(examples) == data.num_rows == 12
        for example in examples:
            assert 4096 - 120 < len(example.input_ids) <= 4096
            context, pairs = turns(example)
            assert len(pairs) == len(set(pairs)) == 4
            seen |= {check_answer(context, *pair) for pair in pairs}
            answers += [answer for _, answer in pairs]
            targets = CHATML.decode([t for t in example.labels if t != IGNORE])
            assert targets == "".join(f"{answer}<|im_end|>" for _, answer in pairs)
    assert seen == set(TASKS)
    assert len(set(answers)) > 0.9 * len(answers), "hardly any target comes twice"


def test_validation_is_of_each_task_over_text_that_is_not_trained_on(tmp_path, path):
    data = prepare(config(recall(path)), CHATML)
    validation = data.validation_examples()
    assert [example.task for example in validation] == [task for task in TASKS for _ in range(3)]
    numbers = set(re.findall(r"\d{4}", "".join(CHATML.decode(e.input_ids) for e in all_examples(data))))
    for example in validation:
        context, pairs = turns(example)
        for question, answer in pairs:
            assert check_answer(context, question, answer) == example.task
            if example.task == "fill" and answer.isdigit():
                assert answer not in numbers
    other = write_rows(tmp_path / "other.jsonl", texts(3))
    held = prepare(config(recall(path, validation_path=other)), CHATML)
    assert len(held.rows.contexts.validation.excerpts) == 3
    assert not set(held.rows.contexts.train.excerpts) & set(held.rows.contexts.validation.excerpts)


def test_an_example_is_a_function_of_seed_epoch_and_index(path):
    data, again = prepare(config(recall(path)), CHATML), prepare(config(recall(path)), CHATML)
    whole = all_examples(data, 2)
    assert all_examples(pickle.loads(pickle.dumps(again)), 2) == whole != all_examples(data, 3)
    assert again.examples_at(2, [5, 2, 999]) == {5: [whole[5]], 2: [whole[2]]}
    assert all_examples(prepare(config(recall(path), seed=1), CHATML), 2) != whole
    assert data.fingerprint() == again.fingerprint()


@pytest.mark.parametrize("length", [512, 3000])
def test_the_embedded_documentation(length):
    data = prepare(config(recall(context_length=length, questions_per_context=1)), CHATML)
    tasks = set()
    for example in [*all_examples(data), *data.validation_examples()]:
        assert len(example.input_ids) <= length
        text = CHATML.decode(example.input_ids)
        question = re.search(r"Question: (.+?)<\|im_end\|>", text, re.DOTALL)[1]
        answer = CHATML.decode([t for t in example.labels if t != IGNORE]).removesuffix("<|im_end|>")
        tasks.add(example.task)
        assert answer in " ".join(text.split("Question: ")[0].split()), question
    assert tasks == set(TASKS)


def test_text_without_spaces_and_without_paragraphs(tmp_path):
    rng = random.Random(0)
    text = "".join("".join(chr(rng.randrange(0x4E00, 0x6000)) for _ in range(24)) + "\u3002" for _ in range(2000))
    data = prepare(config(recall(write_rows(tmp_path / "a.jsonl", [{"text": text}]))), CHATML)
    for example in all_examples(data):
        context, pairs = turns(example)
        assert 2 <= len(pairs) <= 4
        for question, answer in pairs:
            quote = re.search(r'"(.+?)"', question)[1]
            assert answer in context and (quote + answer in context or "missing" in question or "first" in question)
    assert data.rows.contexts.train.tasks == ["continue", "fill", "order"]


def test_pieces_are_the_text():
    text = "".join(row["text"] for row in texts(8)) + "x" * 300
    for most in (64, 300, EXCERPT_CHARACTERS):
        pieces = pieces_of(text, most)
        assert "".join(pieces) == text and max(map(len, pieces)) <= most


def test_what_a_text_does_not_serve():
    twice = RecallText(" ".join([sentence(random.Random(1))] * 2))
    assert all(twice.draw(task, random.Random(0)) is None for task in TASKS), "no quote has one place"


def mixture(tmp_path, **settings):
    text = write_rows(tmp_path / "texts.jsonl", texts())
    colours = [(n, f"c{n}") for n in range(60)]
    facts = [
        {"title": f"T{n // 3}", "context": f"The colour of n{n} is {c}. " * 4, "question": f"Which n{n}?", "answer": c}
        for n, c in colours
    ]
    asked = write_rows(tmp_path / "asked.jsonl", facts)
    plain = write_rows(tmp_path / "plain.jsonl", [{"prompt": f"Say {n}", "completion": f"said {n}"} for n in range(20)])
    sources = [
        {"path": asked, "make_contexts": True, "weight": 1},
        {"source": "recall", "path": text, "recall_tasks": ["continue", "fill"], "num_examples": 9, "weight": 1},
        {"source": "stdlib_qa", "tasks": ["lookup"], "num_examples": 7, "weight": 1},
        {"path": plain, "weight": 1},
    ]
    settings = {"questions_per_context": 3, "context_length": 2048} | settings
    return DataConfig(source="mixture", sources=sources, **settings)


def test_a_mixture_of_questions_recall_keys_and_rows(tmp_path):
    data = prepare(config(mixture(tmp_path), num_validation=8), CHATML)
    examples = all_examples(data)
    kinds = [example.task if example.task != "mixed" else "recall" for example in examples]
    count = data.num_rows // 4
    own = {"qa": "qa", "lookup": "lookup", "completion": "completion"}
    shares = {name: kinds.count(kind) for name, kind in own.items()}
    assert all(count - 1 <= found <= count + 1 for found in shares.values())
    assert sum(len(turns(e)[1]) == 3 for e in examples) > len(examples) / 2
    tasks = {example.task for example in data.validation_examples()}
    assert tasks == {"qa", "continue", "fill", "lookup", "completion"}
    whole = list(islice(iter(TrainStream(data, 3, 0, 1)), 8))
    position = json.loads(json.dumps(whole[3].position))
    for ours, theirs in zip(TrainStream(data, 3, 0, 1, position), whole[4:]):
        assert ours.position == theirs.position
        for a, b in zip(ours.sequences, theirs.sequences, strict=True):
            assert torch.equal(a.input_ids, b.input_ids) and torch.equal(a.labels, b.labels)


def test_bad_input(tmp_path, path):
    plain = write_rows(tmp_path / "plain.jsonl", texts(with_headings=False))
    cases = [
        (
            recall(path, context_length=2048, questions_per_context=60),
            r"questions_per_context=60 is more than fits: .* mo",
        ),
        (
            recall(plain, recall_tasks=["heading"]),
            r"recall_tasks=\['heading'\]: .* serves continue, fill, order in cont",
        ),
        (recall(write_rows(tmp_path / "few.jsonl", texts(2))), r"holds [\d,]+ tokens to train on, too few .* of 4096"),
        (recall(write_rows(tmp_path / "one.jsonl", texts(1))), r"holds one excerpt of 16,000 .*data.validation_path"),
        (
            recall(write_rows(tmp_path / "qa.jsonl", [{"prompt": "a", "completion": "b"}])),
            r"line 1: it has no text, which",
        ),
    ]
    for data, said in cases:
        with pytest.raises(LRSAError, match=said):
            prepare(config(data), CHATML)
    settings = [
        (lambda: recall(path, recall_tasks=["sum"]), "data.recall_tasks=sum|data.recall_tasks='sum'"),
        (lambda: recall(path, recall_tasks=[]), r"data.recall_tasks=\[\] is not valid"),
        (lambda: recall(path, name="a/b"), "data=recall takes its texts from data.path or data.name"),
        (lambda: recall(path, streaming=True), "data.streaming=true reads rows in order"),
        (lambda: DataConfig(source="mixture", sources=[{"weight": 1}]), "give path or name in each source"),
    ]
    for make, said in settings:
        with pytest.raises(LRSAError, match=said):
            make()
