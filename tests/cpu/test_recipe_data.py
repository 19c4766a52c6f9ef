"""The data of a run of the qa recipe: epochs, rows left out or cut, the report, and the place in the data."""

import json
import pickle
from collections import Counter
from itertools import islice

import datasets
import pytest
import torch

from lrsa_ds.config import TrainConfig
from lrsa_ds.data.packing import IGNORE, LeftOut, pack
from lrsa_ds.data.stream import TrainStream, make_loader
from lrsa_ds.data.survey import survey
from lrsa_ds.errors import LRSAError
from lrsa_ds.settings.attention import AttentionConfig
from lrsa_ds.settings.data import DataConfig
from lrsa_ds.settings.run import EvalConfig
from recipes.qa import encode, prepare
from tests.cpu.test_recipe_qa import CHATML, MODEL, PLAIN, QA, targets


def config(seq_len=1024, num_validation=2, seed=0, **data):
    evaluation = EvalConfig(num_examples=num_validation)
    attention = AttentionConfig(lag_size=16)
    return TrainConfig(
        model=MODEL, seq_len=seq_len, seed=seed, attention=attention, data=DataConfig(**data), eval=evaluation
    )


def sequences_of_epoch(data, epoch):
    examples = (example for row in data.examples_of_rows(epoch) for example in row)
    return list(pack(examples, data.seq_len, data.pad_id))


@pytest.fixture
def rows_file(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    path = tmp_path / "rows.jsonl"
    rows = [{**QA, "context": "word " * (7 * i % 50), "answer": f"{i}."} for i in range(40)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.mark.parametrize("streaming", [False, True])
def test_an_epoch_of_a_file_for_every_world_size(rows_file, streaming):
    data = prepare(config(256, source="files", path=str(rows_file), streaming=streaming), CHATML)
    held_out = {answer for e in data.validation_examples() for answer in targets(CHATML, e)}
    epoch = sequences_of_epoch(data, 0)
    trained = [
        CHATML.decode(run[run != IGNORE])
        for sequence in epoch
        for run in sequence.labels.split(sequence.document_lengths)
        if (run != IGNORE).any()
    ]
    assert Counter([*trained, *held_out]) == Counter(f"{i}.<|im_end|>" for i in range(40))
    for world_size in (1, 2, 4):
        for num_workers in (0, 1):
            per_rank = 4 // world_size
            streams = [TrainStream(data, per_rank, r, world_size) for r in range(world_size)]
            steps = [islice(make_loader(s, num_workers), 3) for s in streams]
            order = [s for step in zip(*steps, strict=True) for part in step for s in part.sequences]
            expected = [*epoch, *sequences_of_epoch(data, 1)]
            for ours, theirs in zip(order, expected, strict=False):
                assert torch.equal(ours.input_ids, theirs.input_ids) and torch.equal(ours.labels, theirs.labels)


def test_a_file_s_errors_name_the_row(rows_file):
    rows_file.write_text((json.dumps({**QA, "question": "Who? " * 30}) + "\n") * 2)
    with pytest.raises(LRSAError, match=r"line [12]: its question and answer alone need .* more than seq_len=64"):
        prepare(config(64, 1, source="files", path=str(rows_file)), CHATML)


def test_a_row_that_is_too_long_may_be_left_out(rows_file):
    lines = rows_file.read_text().splitlines()
    lines[7] = json.dumps({**QA, "question": "Who? " * 300})
    rows_file.write_text("\n".join(lines))
    settings = {"source": "files", "path": str(rows_file), "on_bad_row": "skip"}
    data = prepare(config(1024, 1, **settings), CHATML)
    rows = [*data.examples_of_rows(0)]
    (left_out,) = (row for row in rows if isinstance(row, LeftOut))
    assert left_out.reason.startswith(f"{rows_file}, line 8: its question and answer alone need")
    assert len(rows) == 39 and sum(map(len, rows)) == 38


WORDS = [str(i) for i in range(700)]
SECRET = "the word is xyzzy"


def long_rows(kind):
    """Twenty rows with a secret at twenty depths of a text that is far too long, and the answer that is asked for."""
    for depth in range(20):
        words = [*WORDS[: 35 * depth], SECRET, *WORDS[35 * depth :]]
        text = " ".join(words)
        if kind == "answer_start":
            answers = {"text": [SECRET], "answer_start": [text.index(SECRET)]}
            yield {"context": text, "question": "Which?", "answers": answers}
        elif kind == "question":
            yield {"context": text, "question": "Which?", "answer": SECRET}
        elif kind == "prompt":
            yield {"prompt": text, "completion": SECRET}
        else:
            said = [
                ("system", "Be kind."),
                ("user", text),
                ("assistant", SECRET),
                ("user", "End?"),
                ("assistant", "699"),
            ]
            yield {"messages": [{"role": role, "content": content} for role, content in said]}


@pytest.mark.parametrize("chat_template", [True, False])
@pytest.mark.parametrize("kind", ["answer_start", "question", "prompt", "messages"])
def test_cuts_spare_the_answer(kind, chat_template):
    tokenizer = CHATML if chat_template or kind == "messages" else PLAIN
    for row in long_rows(kind):
        (example,) = encode(row, tokenizer, 600)
        text = tokenizer.decode(example.input_ids)
        assert len(example.input_ids) == len(example.labels) <= 600 and example.num_cut > 1000
        assert text.count(SECRET) == 2 and not example.answer_lost
        assert "0 1 2" in text and "698 699" in text


def test_an_answer_that_no_cut_can_spare_is_counted():
    context = " ".join(WORDS)
    row = {"context": context, "question": "Which?", "answer": context[800:1200]}
    (example,) = encode(row, CHATML, 600)
    assert example.answer_lost and example.num_cut > 0
    (example,) = encode({**row, "answer": "Not there."}, CHATML, 600)
    assert not example.answer_lost and example.num_cut > 0


@pytest.mark.parametrize("kind", ["question", "tokens"])
def test_rows_that_are_too_long_are_dropped_or_refused(tmp_path, kind):
    path = tmp_path / "rows.jsonl"
    rows = [{**QA, "answer": f"{i}."} for i in range(20)]
    rows[6] |= {"context": " ".join(WORDS)}
    if kind == "tokens":
        rows = [{"input_ids": [5] * (2000 if i == 6 else 90), "labels": [-100] * (1990 if i == 6 else 80) + [5] * 10}
                for i in range(20)]  # fmt: skip
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = {"source": "files", "path": str(path)}

    def report(**more):
        return survey(prepare(config(1024, 1, **settings, **more), CHATML), short_length=0)

    cut, dropped = report(), report(too_long="drop")
    assert (cut.num_read, cut.num_examples, cut.num_cut_examples, cut.num_too_long_rows) == (19, 19, 1, 0)
    assert (dropped.num_read, dropped.num_examples, dropped.num_cut_examples, dropped.num_too_long_rows) == (
        19,
        18,
        0,
        1,
    )
    stream = TrainStream(prepare(config(1024, 1, **settings), CHATML), 1, 0, 1)
    steps = islice(iter(stream), int(cut.num_sequences))
    assert sum(step.num_cut_tokens for step in steps) == cut.num_cut_tokens
    assert cut.num_cut_tokens > 900 and cut.num_rows == dropped.num_rows == 19
    with pytest.raises(LRSAError, match=r"rows.jsonl, line 7: it has .* more than seq_len=1024, and data.too_long"):
        report(too_long="error")
    assert report(too_long="error", on_bad_row="skip").num_bad_rows == 1


@pytest.mark.parametrize("kind", ["messages", "question", "completion"])
def test_one_row_late_in_a_file_that_no_cut_makes_fit_is_named_at_once(tmp_path, kind):
    def row(number):
        answer = "word " * (80 if number == 1500 else number % 9 + 1)
        if kind == "messages":
            said = [("user", "Say it " * 60), ("assistant", answer), ("user", "Again."), ("assistant", answer)]
            return {"messages": [{"role": role, "content": content} for role, content in said]}
        if kind == "question":
            return {"context": "long " * (number % 90), "question": answer, "answer": answer}
        return {"prompt": "long " * (number % 90 + 1), "completion": answer * 2}

    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row(i)) + "\n" for i in range(2000)))
    with pytest.raises(LRSAError, match=r"rows.jsonl, line 1501: its question and answer alone need"):
        prepare(config(512, 1, source="files", path=str(path)), CHATML)
    assert prepare(config(512, 1, source="files", path=str(path), on_bad_row="skip"), CHATML).num_rows == 1999


def test_no_validation_row_that_can_be_used_is_one_sentence(tmp_path):
    path, long = tmp_path / "rows.jsonl", tmp_path / "long.jsonl"
    path.write_text((json.dumps(QA) + "\n") * 4)
    long.write_text(json.dumps({**QA, "context": " ".join(WORDS)}) + "\n")
    settings = {"source": "files", "path": str(path), "validation_path": str(long), "too_long": "drop"}
    with pytest.raises(LRSAError, match=r"no validation row can be used: see data.on_bad_row, data.too_long"):
        prepare(config(1024, 1, **settings), CHATML)


def test_rows_that_are_known_to_be_bad_are_counted_beyond_the_sample(rows_file):
    rows_file.write_text(rows_file.read_text() + '{"text": 3}\n' * 7)
    data = prepare(config(1024, 2, source="files", path=str(rows_file), on_bad_row="skip"), CHATML)
    report = survey(data, short_length=0, limit=1)
    assert not report.is_whole and (report.num_rows, report.num_bad_rows) == (45, 7)


@pytest.mark.parametrize("seq_len", [300, 1024, 8192])
def test_the_generated_source_keeps_its_budget(seq_len):
    data = prepare(config(seq_len, num_examples=24), CHATML)
    sequences = sequences_of_epoch(data, 0)
    assert Counter(i for s in sequences for i in s.example_indices if i >= 0) == Counter(range(24))
    filled = sum(s.num_tokens for s in sequences) / sum(len(s.input_ids) for s in sequences)
    assert filled > {300: 0.8, 1024: 0.95, 8192: 0.98}[seq_len]
    validation = data.validation_examples()
    assert Counter(e.task for e in validation) == {"signature": 2, "passkey": 2, "lookup": 2}
    assert max(len(e.input_ids) for e in validation) <= seq_len
    for example in validation:
        text = CHATML.decode(example.input_ids)
        (answer,) = targets(CHATML, example)
        assert text.split("\n\nQuestion: ")[0].count(answer.removesuffix("<|im_end|>")) >= 1


def test_context_length_lets_several_examples_share_a_sequence():
    data = prepare(config(2048, num_examples=8, context_length=500, tasks=["lookup"]), CHATML)
    sequences = sequences_of_epoch(data, 0)
    assert len(sequences) == 2 and all(len([i for i in s.example_indices if i >= 0]) == 4 for s in sequences)
    assert {t for s in sequences for t in s.tasks if t} == {"lookup"}


def test_run_data_is_picklable_and_reproducible(rows_file):
    for data in ({"num_examples": 3}, {"source": "files", "path": str(rows_file)}):
        original, other = prepare(config(512, **data), CHATML), prepare(config(512, seed=1, **data), CHATML)
        copy = pickle.loads(pickle.dumps(original))
        first = [s.input_ids.tolist() for s in sequences_of_epoch(original, 0)]
        assert [s.input_ids.tolist() for s in sequences_of_epoch(copy, 0)] == first
        assert copy.validation_examples() == original.validation_examples()
        assert [s.input_ids.tolist() for s in sequences_of_epoch(original, 1)] != first
        assert [s.input_ids.tolist() for s in sequences_of_epoch(other, 0)] != first
        assert original.pad_id == CHATML.pad_token_id


@pytest.mark.parametrize("source", ["generated", "files", "streaming", "text", "tokens"])
def test_training_data_go_on_where_they_were(rows_file, source):
    settings = {"num_examples": 30}
    if source != "generated":
        settings = {"source": "files", "path": str(rows_file), "streaming": source == "streaming"}
    if source == "text":
        rows_file.write_text("".join(json.dumps({"text": f"{i} " * (60 * i % 400 + 9)}) + "\n" for i in range(30)))
    if source == "tokens":
        rows = [
            {"input_ids": [i] * (60 * i % 350 + 9), "labels": [-100] * 8 + [i] * (60 * i % 350 + 1)} for i in range(30)
        ]
        rows_file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = prepare(config(400, **settings), CHATML)
    whole = list(islice(iter(TrainStream(data, 3, 0, 1)), 9))
    for num_done in (1, 4, 7):
        position = json.loads(json.dumps(whole[num_done - 1].position))
        for ours, theirs in zip(TrainStream(data, 3, 0, 1, position), whole[num_done:]):
            assert ours.position == theirs.position
            for a, b in zip(ours.sequences, theirs.sequences, strict=True):
                assert torch.equal(a.input_ids, b.input_ids) and torch.equal(a.labels, b.labels)
