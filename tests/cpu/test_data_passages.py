"""Long contexts out of short questions: grouping, the split by article, distractors, lengths, and the place in them."""

import json
import pickle
import re
from itertools import islice

import pytest
import torch
from omegaconf import OmegaConf

from launch.cli.defaults import fit_defaults
from lrsa_ds.config import AttentionConfig, DataConfig, EvalConfig, ModelConfig, TrainConfig
from lrsa_ds.data.packing import IGNORE
from lrsa_ds.data.stream import TrainStream
from lrsa_ds.data.survey import survey
from lrsa_ds.data.tokenizer import load_tokenizer
from lrsa_ds.errors import LRSAError
from recipes.qa import prepare
from tests.helpers import all_examples, write_rows

MODEL = ModelConfig(random={"model_type": "llama"}, tokenizer="bytes")
CHATML = load_tokenizer(MODEL)
PLAIN = load_tokenizer(MODEL)
PLAIN.chat_template = None


def passage(article, number):
    """A passage with facts that stand nowhere else."""
    facts = " ".join(f"The colour of thing {article}x{number}x{i} is c{article}y{number}y{i}." for i in range(3))
    return f"Passage {number} of article {article}. {facts}"


def rows_of(num_articles=12, num_passages=4, titled=True):
    for article in range(num_articles):
        for number in range(num_passages):
            for i in range(3):
                yield {
                    **({"title": f"Article {article}"} if titled else {}),
                    "context": passage(article, number),
                    "question": f"What is the colour of thing {article}x{number}x{i}?",
                    "answers": {"text": [f"c{article}y{number}y{i}"], "answer_start": [0]},
                }


def config(path, seq_len=2048, num_validation=6, seed=0, questions=4, allow_fewer=False, **data):
    data = {
        "source": "files",
        "path": path,
        "make_contexts": True,
        "context_length": 1500,
        "questions_per_context": questions,
        **data,
    }
    return TrainConfig(
        model=MODEL,
        seed=seed,
        seq_len=seq_len,
        data=DataConfig(**data),
        eval=EvalConfig(num_examples=num_validation, allow_fewer=allow_fewer),
        attention=AttentionConfig(lag_size=64),
    )


@pytest.fixture
def path(tmp_path):
    return write_rows(tmp_path / "rows.jsonl", rows_of())


def articles_in(examples):
    return {int(n) for e in examples for n in re.findall(r"of article (\d+)", CHATML.decode(e.input_ids))}


def turns(example, tokenizer=CHATML):
    """The context, and each question with its answer."""
    text = tokenizer.decode(example.input_ids)
    context = text.split("Question: ")[0]
    pairs = re.findall(r"Question: (.+?)<\|im_end\|>\n<\|im_start\|>assistant\n(.+?)<\|im_end\|>", text)
    return context, pairs


def test_every_question_is_asked_once_an_epoch_beside_its_passage(path):
    data = prepare(config(path), CHATML)
    asked = {}
    for epoch in (0, 1):
        examples = all_examples(data, epoch)
        assert len(examples) == data.rows.contexts.train.num_contexts(epoch)
        for example in examples:
            assert 1380 < len(example.input_ids) <= 1500
            context, pairs = turns(example)
            assert 1 <= len(pairs) <= 4
            targets = [t for t in example.labels if t != IGNORE]
            assert CHATML.decode(targets) == "".join(f"{answer}<|im_end|>" for _, answer in pairs)
            for question, answer in pairs:
                thing = re.fullmatch(r"What is the colour of thing (\S+)\?", question)[1]
                assert f"thing {thing} is {answer}." in context
                assert context.count(answer + ".") == 1
            whole = re.findall(r"Passage \d+ of article \d+\.", context)
            assert len(whole) == len(set(whole)) >= 7, "no passage twice"
            asked.setdefault(epoch, []).extend(pairs)
    assert len(asked[0]) == len(set(asked[0])) and set(asked[0]) == set(asked[1]) and asked[0] != asked[1]
    sizes = [len(turns(example)[1]) for example in all_examples(data)]
    assert max(sizes) == 4 and sum(sizes) == len(asked[0])


@pytest.mark.parametrize("titled", [True, False])
def test_what_is_held_out_is_never_in_a_training_context(tmp_path, titled):
    path = write_rows(tmp_path / "rows.jsonl", rows_of(titled=titled))
    data = prepare(config(path), CHATML)
    validation = data.validation_examples()
    held = {match for e in validation for q, _ in turns(e)[1] for match in re.findall(r"thing (\d+)x(\d+)x", q)}
    assert sum(len(turns(e)[1]) for e in validation) >= 6
    assert len({article for article, _ in held}) == (1 if titled else len({article for article, _ in held}))
    text = "".join(CHATML.decode(e.input_ids) for epoch in (0, 1, 2) for e in all_examples(data, epoch))
    for article, number in held:
        assert f"thing {article}x{number}x" not in text
        assert not titled or f"article {article}." not in text
    other = prepare(config(path, seed=1), CHATML)
    assert other.validation_examples() != validation


def test_validation_data_of_their_own(tmp_path, path):
    held = list(islice(rows_of(), 12))  # an article of the training data, too
    other = write_rows(tmp_path / "other.jsonl", [*held, *({**row, "context": row["context"] + "!"} for row in held)])
    data = prepare(config(path, validation_path=other, num_validation=8), CHATML)
    assert 0 not in articles_in(all_examples(data))
    assert sum(len(turns(e)[1]) for e in data.validation_examples()) >= 8


def test_an_example_is_a_function_of_seed_epoch_and_index(path):
    data, again = prepare(config(path), CHATML), prepare(config(path), CHATML)
    whole = all_examples(data, 3)
    assert all_examples(pickle.loads(pickle.dumps(again)), 3) == whole != all_examples(data, 4)
    at = again.examples_at(3, [5, 2, 999])
    assert at == {5: [whole[5]], 2: [whole[2]]}
    assert [e for found in again.examples_of_rows(3, 7) for e in found] == whole[7:]
    assert all_examples(prepare(config(path, seed=1), CHATML), 3) != whole
    assert data.fingerprint() == again.fingerprint()


def test_a_stream_goes_on_at_any_step(path):
    data = prepare(config(path), CHATML)
    whole = list(islice(iter(TrainStream(data, 4, 0, 1)), 12))
    assert whole[-1].position["epoch"] >= 1
    for num_done in (1, 5, 9):
        position = json.loads(json.dumps(whole[num_done - 1].position))
        for ours, theirs in zip(TrainStream(data, 4, 0, 1, position), whole[num_done:]):
            assert ours.position == theirs.position
            for a, b in zip(ours.sequences, theirs.sequences, strict=True):
                assert torch.equal(a.input_ids, b.input_ids) and torch.equal(a.labels, b.labels)


def test_one_question_without_a_chat_template(path):
    data = prepare(config(path, questions=1), PLAIN)
    for example in all_examples(data):
        text = PLAIN.decode(example.input_ids)
        assert text.count("Question: ") == 1 and text.count("\nAnswer:") == 1 and len(example.input_ids) <= 1500
    with pytest.raises(LRSAError, match=r"^data.questions_per_context=4 .* chat template"):
        prepare(config(path), PLAIN)


def test_the_report_counts_contexts(path):
    data = prepare(config(path), CHATML)
    report = survey(data, short_length=0, limit=None)
    assert report.is_whole and report.num_rows == report.num_read == data.num_rows == len(all_examples(data))
    assert report.num_target_tokens == sum(t != IGNORE for e in all_examples(data) for t in e.labels)


def test_too_few_passages(tmp_path):
    path = write_rows(tmp_path / "few.jsonl", rows_of(3, 2))
    with pytest.raises(LRSAError, match=r"holds [\d,]+ tokens in 4 passages, too few .*1500, which needs 1,\d+:"):
        prepare(config(path, num_validation=1), CHATML)
    with pytest.raises(LRSAError, match=r"cannot be held out of the 18 over 3 articles"):
        prepare(config(path, num_validation=18), CHATML)


def test_more_questions_than_fit(path):
    with pytest.raises(LRSAError, match=r"questions_per_context=60 is more than fits: .* holds at most \d+ questions"):
        prepare(config(path, questions=60), CHATML)


def test_answers_that_stand_nowhere_are_counted_and_named_once(tmp_path):
    rows = list(rows_of())
    rows[4]["answers"] = {"text": ["no such colour"], "answer_start": [0]}
    rows[9]["answers"] = {"text": ["nor this", "c0y3y0"], "answer_start": [0, 0]}
    path = write_rows(tmp_path / "absent.jsonl", rows)
    with pytest.warns(UserWarning, match=r"1 of 144 answers do not stand in their context.* line 5;") as caught:
        data = prepare(config(path), CHATML)
    assert len([w for w in caught if "do not stand" in str(w.message)]) == 1
    answers = {a for e in [*all_examples(data), *data.validation_examples()] for _, a in turns(e)[1]}
    assert "c0y3y0" in answers and "nor this" not in answers


def test_rows_that_cannot_be_used(tmp_path):
    rows = [*rows_of(), {"text": "a text"}, {"context": passage(50, 1) * 20, "question": "Who?", "answer": "c50y1y1"}]
    path = write_rows(tmp_path / "bad.jsonl", rows)
    with pytest.raises(LRSAError, match=r"line 145: it has no question, which contexts are made of"):
        prepare(config(path), CHATML)
    with pytest.raises(LRSAError, match=r"1 questions do not fit .*'Who\?': raise data.context_length, or .*drop\."):
        prepare(config(path, on_bad_row="skip"), CHATML)
    data = prepare(config(path, on_bad_row="skip", too_long="drop"), CHATML)
    report = survey(data, short_length=0)
    assert (report.num_bad_rows, report.num_too_long_rows) == (1, 1)


def test_few_questions_are_held_out_where_nobody_has_said_how_many(path):
    data = prepare(config(path, num_validation=100, allow_fewer=True), CHATML)
    assert 36 <= len(data.rows.contexts.validation.asked) <= 48


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"make_contexts": False}, "data.questions_per_context=4 is read where contexts are made: add data.make_con"),
        ({"streaming": True}, "data.streaming=true reads rows in order, and contexts need all of them"),
        ({"context_length": 4096}, "data.context_length=4096 is longer than seq_len=2048"),
        ({"questions": 0}, "data.questions_per_context=0 is not valid"),
    ],
)
def test_settings_that_cannot_be_honoured(path, settings, said):
    with pytest.raises(LRSAError, match=said):
        config(path, **settings)
    with pytest.raises(LRSAError, match=r"data.make_contexts=true makes contexts of the rows of data=files"):
        DataConfig(source="stdlib_qa", make_contexts=True)


def test_rows_are_trained_on_as_they_are_where_nobody_asks_for_contexts(path):
    plain = prepare(config(path, questions=1, make_contexts=False, context_length=512), CHATML)  # as recipes set it
    assert plain.num_rows == 144 - 6
    assert max(len(example.input_ids) for example in all_examples(plain)) < 500


@pytest.mark.parametrize(("typed", "count"), [([], 1), (["data.questions_per_context=12"], 12)])
def test_the_questions_of_a_recipe_give_way_to_rows_as_they_are(typed, count):
    data = {"source": "files", "questions_per_context": 12}
    composed = OmegaConf.create({"data": data, "optim": {"num_steps": 9, "warmup_steps": 2}, "eval": {}})
    fit_defaults(composed, ["data=files", *typed])
    assert composed.data.questions_per_context == count
    composed.data.update({"make_contexts": True, "questions_per_context": 12})
    fit_defaults(composed, ["data=files", *typed])
    assert composed.data.questions_per_context == 12
