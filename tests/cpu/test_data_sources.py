"""Rows from files: every shape and format, order and hold-out, and a sentence for everything that can be broken."""

import json
import pickle

import datasets
import pyarrow
import pyarrow.parquet
import pytest

from lrsa_ds.config import DataConfig
from lrsa_ds.data.shapes import canonical
from lrsa_ds.data.sources import Rows
from lrsa_ds.errors import LRSAError

QA = {"context": "c", "question": "q", "answer": "a"}
SHAPES = {
    "chat": {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]},
    "completion": {"prompt": "p", "completion": "c"},
    "qa": QA,
    "text": {"text": "t"},
}


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))


def write(path, rows):
    if path.suffix == ".parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows, indent=1))
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def numbered(count, start=0):
    return [{**QA, "answer": str(i)} for i in range(start, start + count)]


def open_rows(path, num_validation=2, seed=0, **data):
    return Rows(DataConfig(source="files", path=str(path), **data), seed, num_validation)


def answers(rows):
    return [row["answer"] for _, row in rows]


@pytest.mark.parametrize(
    ("row", "task"),
    [
        *((row, task) for task, row in SHAPES.items()),
        ({"context": "c", "question": "q", "answers": "a"}, "qa"),
        ({"context": "c", "question": "q", "answers": ["a", "b"]}, "qa"),
        ({"context": "c", "question": "q", "answers": {"text": ["a"], "answer_start": [0]}}, "qa"),
        ({**QA, "text": "ignored", "id": 3, "task": "hotpot"}, "hotpot"),
    ],
)
def test_shapes(row, task):
    found = canonical(row)
    assert found["task"] == task
    assert found.get("answer", "a") == "a"
    assert canonical(found) == found


def test_columns_are_renamed():
    row = {"passage": "c", "query": "q", "gold": ["a"]}
    columns = {"context": "passage", "question": "query", "answers": "gold"}
    assert canonical(row, columns) == {**QA, "task": "qa"}
    with pytest.raises(LRSAError, match=r"data.columns says that context is in column 'nope'.*passage, query, gold"):
        canonical(row, {"context": "nope"})
    with pytest.raises(LRSAError, match=r"data.columns='passage' is not valid"):
        DataConfig(columns={"passage": "context"})


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("suffix", ["jsonl", "json", "parquet"])
@pytest.mark.parametrize("task", list(SHAPES))
def test_formats(tmp_path, suffix, streaming, task):
    path = write(tmp_path / f"rows.{suffix}", [SHAPES[task]] * 5)
    rows = open_rows(path, streaming=streaming)
    assert rows.validation()[0][1] == canonical(SHAPES[task])
    assert [row for _, row in rows.epoch(0)] == [canonical(SHAPES[task])] * 3


@pytest.mark.parametrize("streaming", [False, True])
def test_hold_out_and_order(tmp_path, streaming):
    for k in range(3):
        write(tmp_path / f"{k}.jsonl", numbered(20, 20 * k))
    rows = open_rows(tmp_path, num_validation=8, streaming=streaming)
    held, first, second = answers(rows.validation()), answers(rows.epoch(0)), answers(rows.epoch(1))
    assert sorted(held + first, key=int) == [str(i) for i in range(60)]
    assert sorted(first) == sorted(second) and first != second
    again = open_rows(tmp_path, num_validation=8, streaming=streaming)
    assert (answers(again.validation()), answers(again.epoch(1))) == (held, second)
    assert answers(open_rows(tmp_path, num_validation=8, seed=1, streaming=streaming).epoch(0)) != first
    assert (held == [str(i) for i in range(8)]) == streaming
    assert answers(pickle.loads(pickle.dumps(rows)).epoch(0)) == first


@pytest.mark.parametrize("streaming", [False, True])
def test_validation_path(tmp_path, streaming):
    train, validation = write(tmp_path / "t[1].jsonl", numbered(6)), write(tmp_path / "v.jsonl", numbered(4, 90))
    rows = open_rows(train, num_validation=3, validation_path=validation, streaming=streaming)
    assert answers(rows.validation()) == ["90", "91", "92"]
    assert sorted(answers(rows.epoch(0))) == [str(i) for i in range(6)]


def test_row_numbers_name_the_row(tmp_path):
    rows = open_rows(write(tmp_path / "a.jsonl", numbered(9)))
    assert all(str(index) == row["answer"] for index, row in [*rows.epoch(3), *rows.validation()])
    assert rows.place(4).endswith("a.jsonl', row 5")


GOOD = json.dumps(QA)
BROKEN = {
    "broken json": (GOOD + '\n{"context": \n' + GOOD, r"rows.jsonl, line 2: broken JSON"),
    "not utf-8": (GOOD.encode() + b'\n{"text": "\xff"}', r"rows.jsonl, line 2: broken JSON"),
    "blank": ("\n \n", r"rows.jsonl is empty: it has no rows"),
    "no bytes": ("", r"rows.jsonl, which is empty"),
    "not an object": ("3\n", r"line 1: a row has to be an object"),
    "unknown shape": ('{"foo": 1, "bar": 2}', r"line 1: no known shape in its columns \(foo, bar\): use messages "),
    "no answer": (GOOD + '\n{"context": "c", "question": "q"}', r"line 2: answer is missing"),
    "empty answer": (GOOD + '\n\n{"context": "c", "question": "q", "answer": " "}', r"line 3: answer is empty"),
    "empty list": ('{"context": "c", "question": "q", "answers": {"text": []}}', r"line 1: answers is empty"),
    "number": ('{"context": "c", "question": "q", "answer": 3}', r"line 1: answer has to be text, not int"),
    "no completion": ('{"prompt": "c"}', r"line 1: completion is missing"),
    "no assistant": (
        '{"messages": [{"role": "user", "content": "q"}]}',
        r"line 1: answer is missing: none of its mess",
    ),
    "no role": ('{"messages": [{"content": "q"}]}', r"line 1: message 1 has no role"),
}


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("case", list(BROKEN))
def test_broken_files(tmp_path, case, streaming):
    content, sentence = BROKEN[case]
    path = tmp_path / "rows.jsonl"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(LRSAError, match=sentence) as caught:
        open_rows(path, streaming=streaming)
    assert "\n" not in str(caught.value)


def test_a_late_bad_row_of_a_stream_is_named_when_met(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"text": "a"}\n' * 1100 + '{"txt": "a"}')
    rows = open_rows(path, streaming=True)  # only the first 1,000 lines are checked here
    with pytest.raises(LRSAError, match=r"rows.jsonl, line 1101: no known shape"):
        list(rows.epoch(0))
    path.write_text('{"text": "a"}\n' * 1100 + '{"text": ')
    # Read in large blocks, the stream meets this one at once.
    with pytest.raises(LRSAError, match=r"rows.jsonl, line 1101: broken JSON"):
        open_rows(path, streaming=True)


def test_parquet_rows_are_named(tmp_path):
    path = write(tmp_path / "rows.parquet", [*numbered(3), {**QA, "answer": ""}])
    for streaming in (False, True):
        with pytest.raises(LRSAError, match=r"rows.parquet, row 4: answer is empty"):
            list(open_rows(path, streaming=streaming).epoch(0))
    (tmp_path / "bad.parquet").write_text("no")
    with pytest.raises(LRSAError, match=r"bad.parquet is not a readable Parquet file"):
        open_rows(tmp_path / "bad.parquet")


def test_paths_that_lead_nowhere(tmp_path):
    (tmp_path / "notes.txt").write_text("x")
    (tmp_path / "none").mkdir()
    for path, sentence in {
        "missing.jsonl": "data.path='.*missing.jsonl' does not exist: give a .jsonl, .json or .parquet file",
        "*.jsonl": "matches no file",
        "none": "holds no such file",
        "notes.txt": "notes.txt, whose suffix is not known",
    }.items():
        with pytest.raises(LRSAError, match=sentence):
            open_rows(tmp_path / path)
    good = write(tmp_path / "good.jsonl", numbered(3))
    with pytest.raises(LRSAError, match=r"data.validation_path='./nope.jsonl' does not exist"):
        open_rows(good, validation_path="./nope.jsonl")
    write(tmp_path / "good.parquet", numbered(3))
    with pytest.raises(LRSAError, match=r"mixes JSON and Parquet"):
        open_rows(tmp_path / "good.*")


@pytest.mark.parametrize("streaming", [False, True])
def test_too_few_rows_to_hold_out(tmp_path, streaming):
    path = write(tmp_path / "rows.jsonl", numbered(4))
    with pytest.raises(LRSAError, match=r"eval.num_examples=4 rows cannot be held out.*set data.validation_path"):
        open_rows(path, num_validation=4, streaming=streaming)
    assert len(list(open_rows(path, num_validation=3, streaming=streaming).epoch(0))) == 1


def test_columns_that_do_not_agree(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"text": "a"}\n\n{"text": "b", "id": 1}\n\n{"text": "c", "id": "x"}\n')
    with pytest.raises(
        LRSAError, match=r"cannot be read .*: look for blank lines, and for columns whose names or types"
    ):
        open_rows(path)


@pytest.mark.parametrize("streaming", [False, True])
def test_hub(tmp_path, streaming):
    def hub(**data):
        return Rows(DataConfig(source="hub", streaming=streaming, **data), 0, 2)

    with pytest.raises(
        LRSAError, match=r"data.name='some/set' is not on this machine and the hub cannot be reached: use"
    ):
        hub(name="some/set")
    with pytest.raises(LRSAError, match=r"data.name='./none' does not exist"):
        hub(name="./none")
    # A directory in the layout of the hub takes the same way as a data set of the hub.
    write(tmp_path / "train.jsonl", numbered(6))
    write(tmp_path / "test.jsonl", numbered(3, 50))
    rows = hub(name=str(tmp_path), validation_split="test")
    assert answers(rows.validation()) == ["50", "51"] and len(list(rows.epoch(0))) == 6
    with pytest.raises(LRSAError, match=r"data.split='dev' of data.name="):
        hub(name=str(tmp_path), split="dev")
    with pytest.raises(LRSAError, match=r"data.subset='xx' of data.name="):
        hub(name=str(tmp_path), subset="xx")
    write(tmp_path / "train.jsonl", numbered(2))
    with pytest.raises(LRSAError, match=r"eval.num_examples=2 rows cannot be held out.*set data.validation_split"):
        hub(name=str(tmp_path))
