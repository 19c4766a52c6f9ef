"""Rows from files: every shape and format, order and hold-out, and a sentence for everything that can be broken."""

import json
import pickle

import datasets
import pyarrow
import pyarrow.parquet
import pytest

from lrsa_ds.data import jsonfiles
from lrsa_ds.data.shapes import canonical
from lrsa_ds.data.sources import Rows
from lrsa_ds.errors import LRSAError
from lrsa_ds.settings.data import DataConfig

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
    return [row.content["answer"] for row in rows]


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
    assert rows.validation()[0].content == canonical(SHAPES[task])
    assert [row.content for row in rows.epoch(0)] == [canonical(SHAPES[task])] * 3


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
    assert all(str(row.index) == row.content["answer"] for row in [*rows.epoch(3), *rows.validation()])
    assert {str(row.place) for row in rows.epoch(0)} <= {f"{tmp_path}/a.jsonl, line {i + 1}" for i in range(9)}


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


def errors(rows):
    return [str(row.content) for row in rows if isinstance(row.content, LRSAError)]


@pytest.mark.parametrize("last", ['{"txt": "a"}', '{"text": '])
def test_a_late_bad_row_of_a_stream_is_named_when_met(tmp_path, last):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"text": "a"}\n' * 1100 + last)
    rows = open_rows(path, streaming=True)  # only the first 1,000 lines are checked here
    (error,) = errors(rows.epoch(0))
    assert error.startswith(
        f"{path}, line 1101: no known shape" if "txt" in last else f"{path}, line 1101: broken JSON"
    )


@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
@pytest.mark.parametrize("streaming", [False, True])
def test_bad_rows_may_stay_in_their_places(tmp_path, suffix, streaming):
    """All others have the numbers that they would have if these were mended, and are read in the same order."""
    rows = numbered(20)
    whole = write(tmp_path / f"whole.{suffix}", rows)
    for number in (7, 13):
        rows[number] = {**rows[number], "answer": " "}
    bad = write(tmp_path / f"bad.{suffix}", rows)
    if not streaming:
        with pytest.raises(LRSAError, match=rf"bad.{suffix}, (line|row) 8: answer is empty"):
            open_rows(bad)
    found = open_rows(bad, streaming=streaming, on_bad_row="skip")
    assert sorted(errors(found.epoch(0))) == [
        f"{bad}, {'line' if suffix == 'jsonl' else 'row'} {number + 1}: answer is empty." for number in (13, 7)
    ]
    good = [row for row in found.epoch(0) if isinstance(row.content, dict)]
    mended = [a for a in answers(open_rows(whole, streaming=streaming).epoch(0)) if a not in ("7", "13")]
    assert answers(good) == mended


def test_parquet_rows_are_named(tmp_path):
    path = write(tmp_path / "rows.parquet", [*numbered(3), {**QA, "answer": ""}])
    for streaming in (False, True):
        with pytest.raises(LRSAError, match=r"rows.parquet, row 4: answer is empty"):
            open_rows(path, streaming=streaming)
    (tmp_path / "bad.parquet").write_text("no")
    with pytest.raises(LRSAError, match=r"bad.parquet is not a readable Parquet file"):
        open_rows(tmp_path / "bad.parquet")
    path = write(tmp_path / "columns.parquet", [{"passage": "c", "question": "q", "reply": "a"}])
    with pytest.raises(LRSAError, match=r"row 1: no known shape in its columns \(passage, question, reply\)"):
        open_rows(path)


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


def test_lists_of_files(tmp_path):
    (tmp_path / "more").mkdir()
    first, second = write(tmp_path / "b.jsonl", numbered(6)), write(tmp_path / "more" / "a.jsonl", numbered(6, 50))
    data = DataConfig(source="files", path=[first, str(tmp_path / "more")])
    rows = Rows(data, 0, 2)
    assert sorted(answers([*rows.epoch(0), *rows.validation()]), key=int) == [*map(str, [*range(6), *range(50, 56)])]
    assert {str(row.place) for row in rows.epoch(0) if row.index == 6} <= {f"{second}, line 1"}
    with pytest.raises(LRSAError, match=r"names .*b.jsonl twice"):
        Rows(DataConfig(source="files", path=[first, str(tmp_path / "*.jsonl")]), 0, 2)
    for path in ([], [3], {"a": 1}):
        with pytest.raises(LRSAError, match=r"data.path=.* is not valid: give a file, a directory"):
            DataConfig(source="files", path=path)


DATES = ["2021-03-02", "2021-03-02T10:00:00+02:00", "12:30", "1e5", "007", "true", "null", "3.10", "unknown"]


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("suffix", ["jsonl", "json"])
def test_text_is_text(tmp_path, suffix, streaming):
    """Whatever it looks like, and whatever stands before it: nothing infers a type."""
    rows = [{**QA, "context": "word " * 1000, "answer": DATES[i // 20 % len(DATES)]} for i in range(200)]
    rows = open_rows(write(tmp_path / f"rows.{suffix}", rows), streaming=streaming)
    found = {int(row.index): row.content["answer"] for row in [*rows.validation(), *rows.epoch(0)]}
    assert set(found.values()) == set(DATES)
    if not streaming:
        assert found == {i: DATES[i // 20 % len(DATES)] for i in range(200)}


@pytest.mark.parametrize("streaming", [False, True])
def test_columns_that_are_not_used_never_matter(tmp_path, streaming):
    rows = numbered(12)
    for number, row in enumerate(rows):
        row["id"] = number if number % 2 else str(number)
        if number > 6:
            row |= {"late": {"a": [number]}, "date": "2021-03-02", "note": "\ud800"}
    write(tmp_path / "a.jsonl", rows[:6])
    write(tmp_path / "b.jsonl", rows[6:])
    messages = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a", "weight": 1}]
    write(tmp_path / "c.jsonl", [{"messages": messages, "id": None}])
    found = open_rows(tmp_path, streaming=streaming)
    assert len([*found.validation(), *found.epoch(0)]) == 13


@pytest.mark.parametrize("streaming", [False, True])
def test_parquet_files_may_differ_in_columns_that_are_not_used(tmp_path, streaming):
    write(tmp_path / "a.parquet", [{**row, "id": 3} for row in numbered(4)])
    write(tmp_path / "b.parquet", [{**row, "id": "x", "extra": [1]} for row in numbered(4, 4)])
    write(tmp_path / "c.parquet", [{**row, "answer": [row["answer"]]} for row in numbered(4, 8)])
    found = open_rows(tmp_path, streaming=streaming)
    assert sorted(answers([*found.validation(), *found.epoch(0)]), key=int) == [str(i) for i in range(12)]
    indices = {row.content["answer"]: row for row in found.epoch(0)}
    for answer, row in indices.items():
        file, number = "abc"[int(answer) // 4], int(answer) % 4 + 1
        assert str(row.place) == f"{tmp_path}/{file}.parquet, row {number}"


def test_keys_that_arrow_fills_with_none_are_absent(tmp_path):
    tool = {"type": "function", "function": {"name": "f", "arguments": {"a": "1"}}}
    other = {"type": "function", "function": {"name": "g", "arguments": {"b": "2"}}}
    rows = [
        {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a", "tool_calls": [call]}]}
        for call in (tool, other, tool)
    ]
    found = open_rows(write(tmp_path / "rows.parquet", rows), num_validation=1)
    calls = [row.content["messages"][1]["tool_calls"] for row in [*found.validation(), *found.epoch(0)]]
    assert sorted(calls, key=str) == [[tool], [tool], [other]]


TEXTS = {
    "byte order mark": lambda lines: "\ufeff" + "\n".join(lines),
    "carriage returns": lambda lines: "\r\n".join(lines) + "\r\n",
    "blank lines": lambda lines: "\n\n  \n" + "\n \t\n".join(lines) + "\n\n",
    "an array": lambda lines: "[" + ",\n".join(lines) + "]",
    "an array behind a mark": lambda lines: "\ufeff \n[\r\n" + " , ".join(lines) + "\r\n]\r\n",
    "an indented array": lambda lines: json.dumps([json.loads(line) for line in lines], indent=3, ensure_ascii=False),
    "an object with data": lambda lines: '{"version": {"n": [1]}, "data": [' + ",".join(lines) + '], "end": [{}]}',
    "an indented object": lambda lines: json.dumps({"v": "1", "data": [json.loads(line) for line in lines]}, indent=1),
}


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("suffix", ["jsonl", "json"])
@pytest.mark.parametrize("chunk", [1, 7, 1 << 20])
@pytest.mark.parametrize("layout", list(TEXTS))
def test_layouts_of_json(tmp_path, monkeypatch, layout, chunk, suffix, streaming):
    monkeypatch.setattr(jsonfiles, "CHUNK", chunk)
    rows = [{**QA, "context": f'é😀\u2028]}}"[{{ {i}' * (i % 3), "answer": str(i)} for i in range(8)]
    path = tmp_path / f"rows.{suffix}"
    path.write_bytes(TEXTS[layout]([json.dumps(row, ensure_ascii=False) for row in rows]).encode())
    found = open_rows(path, streaming=streaming)
    by_answer = {row.content["answer"]: row.content["context"] for row in [*found.validation(), *found.epoch(0)]}
    assert by_answer == {row["answer"]: row["context"] for row in rows}


@pytest.mark.parametrize("indent", [None, 1])
@pytest.mark.parametrize("streaming", [False, True])
def test_squad_as_it_is_published(tmp_path, indent, streaming):
    def article(number):
        context = f"It is {number}, they say."
        answers = [{"text": str(number), "answer_start": 6}]
        qas = [{"id": f"{number}-{i}", "question": f"Which {i}?", "answers": answers} for i in range(3)]
        return {"title": "T", "paragraphs": [{"context": context, "qas": qas}, {"context": context + "!", "qas": qas}]}

    path = tmp_path / "dev-v1.1.json"
    path.write_text(json.dumps({"data": [article(n) for n in range(4)], "version": "1.1"}, indent=indent))
    found = open_rows(path, streaming=streaming)
    rows = [row.content for row in [*found.validation(), *found.epoch(0)]]
    assert len(rows) == 24 and {(row["answer_start"], row["title"]) for row in rows} == {(6, "T")}
    assert {(row["question"], row["context"]) for row in rows} == {
        (f"Which {i}?", f"It is {n}, they say.{end}") for n in range(4) for i in range(3) for end in ("", "!")
    }
    places = {str(row.place) for row in found.epoch(0)}
    assert places <= {
        f"{path}, row {n}{q}" for n in range(1, 5) for q in ("", *(f", question {i}" for i in range(2, 7)))
    }


def test_broken_arrays_name_the_row(tmp_path):
    for text, sentence in {
        '[{"text": "a"}, {"text": ]': r"rows.json, row 2: broken JSON",
        '[{"text": "a"}, ': r"rows.json, row 2: broken JSON \(the array has no end\)",
        '[{"text": "a"}, {"text": "b"}, {"txt": "a"}]': r"rows.json, row 3: no known shape",
        "[]": r"rows.json is empty: it has no rows",
        '{"text": "a",\n "text"}': r"rows.json, line 1: broken JSON",
    }.items():
        (tmp_path / "rows.json").write_text(text)
        with pytest.raises(LRSAError, match=sentence):
            open_rows(tmp_path / "rows.json")
    (tmp_path / "rows.json").write_bytes(json.dumps([QA] * 4).encode("utf-16"))
    with pytest.raises(LRSAError, match=r"rows.json is UTF-16 text: save it as UTF-8"):
        open_rows(tmp_path / "rows.json")
    (tmp_path / "rows.jsonl").write_text('{"text": "a", "n": ' + "1" * 5000 + "}")
    with pytest.raises(LRSAError, match=r"line 1: broken JSON \(Exceeds the limit"):
        open_rows(tmp_path / "rows.jsonl")


@pytest.mark.parametrize("streaming", [False, True])
def test_a_rewrite_of_the_same_size_is_noticed(tmp_path, streaming):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps({"text": f"{i} " * 5000}) + "\n" for i in range(400)))
    before = open_rows(path, streaming=streaming).fingerprint()
    assert open_rows(path, streaming=streaming).fingerprint() == before
    assert open_rows(path, num_validation=3, streaming=streaming).fingerprint() != before
    with open(path, "r+b") as file:
        file.seek(1_234_567)
        file.write(b"7")
    assert open_rows(path, streaming=streaming).fingerprint() != before


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
