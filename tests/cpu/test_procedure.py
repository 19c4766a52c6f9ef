"""Procedures from outside the repository: found, checked, and refused in one sentence."""

import sys

import pytest

from lrsa_ds.config import TrainConfig
from lrsa_ds.data.procedure import prepare_data
from lrsa_ds.data.tokenizer import load_tokenizer
from lrsa_ds.errors import LRSAError
from lrsa_ds.settings.data import DataConfig
from lrsa_ds.settings.model import ModelConfig
from recipes import load_procedure

MODEL = ModelConfig(random={"model_type": "llama"}, tokenizer="bytes")
OWN_COLUMNS = """
from recipes import qa

def to_row(row):
    return {"context": row["body"], "question": row["ask"], "answer": row["reply"], "task": row["kind"]}

def prepare(config, tokenizer):
    return qa.prepare(config, tokenizer, to_row)
"""


@pytest.fixture
def outside(tmp_path, monkeypatch):
    """A working directory outside the repository; what is imported from it is forgotten."""
    known = set(sys.modules)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    yield tmp_path
    for name in set(sys.modules) - known:
        if name.split(".")[0] in ("my_package", "my_module", "my_helper") or name.startswith("user_code_"):
            del sys.modules[name]


def config_of(path, **settings) -> TrainConfig:
    return TrainConfig(model=MODEL, data=DataConfig(source="files", path=str(path)), **settings)


def rows(path, count=60):
    lines = [f'{{"body": "The key is {i}. ", "ask": "Which?", "reply": "{i}", "kind": "keys"}}\n' for i in range(count)]
    path.write_text("".join(lines))
    return path


@pytest.mark.parametrize("name", ["my_package.tasks", "my_package/tasks.py", "./my_package/tasks.py", "my_module"])
def test_a_procedure_is_a_module_or_a_file(outside, name):
    (outside / "my_package").mkdir()
    (outside / "my_package" / "tasks.py").write_text(OWN_COLUMNS)
    (outside / "my_module.py").write_text(OWN_COLUMNS)
    data = prepare_data(load_procedure(name), config_of(rows(outside / "rows.jsonl")), load_tokenizer(MODEL))
    assert {example.task for example in data.validation_examples()} == {"keys"}
    assert len(list(data.examples_of_rows(0))) == 12


def test_a_file_finds_the_modules_beside_it(outside):
    (outside / "elsewhere").mkdir()
    (outside / "elsewhere" / "my_helper.py").write_text("prepare = print\n")
    (outside / "elsewhere" / "tasks.py").write_text("from my_helper import prepare\n")
    assert load_procedure("elsewhere/tasks.py").prepare is print


def test_a_procedure_of_ones_own_through_and_through(outside):
    """One that reads no file and uses nothing of recipes: the interface alone."""
    (outside / "my_module.py").write_text(
        """
from lrsa_ds.data.packing import IGNORE, Example

class Counting:
    def __init__(self, config, tokenizer):
        self.seq_len, self.pad_id = config.seq_len, tokenizer.pad_token_id

    def example(self, index):
        ids = [(index + i) % 250 for i in range(80)]
        return Example(ids, [IGNORE] * 40 + ids[40:], "counting", index)

    def examples_of_rows(self, epoch, first=0):
        return ([self.example(i)] for i in range(first, 30))

    def examples_at(self, epoch, rows):
        return {i: [self.example(i)] for i in rows}

    def validation_examples(self):
        return [self.example(1000)]

    def fingerprint(self):
        return "counting"

prepare = Counting
"""
    )
    data = prepare_data(load_procedure("my_module"), TrainConfig(model=MODEL), load_tokenizer(MODEL))
    assert data.fingerprint() == "counting" and len(list(data.examples_of_rows(0, 10))) == 20


@pytest.mark.parametrize(
    "name,text,said",
    [
        ("nothing.py", None, "'nothing.py' does not exist: give qa or a module .* or the path of a .py file"),
        ("no.such.module", None, "'no.such.module' is not valid: give qa or a module"),
        ("my_module", "import no_such_thing", r"cannot be imported \(ModuleNotFoundError: .*no_such_thing.*line 1"),
        ("my_module.py", "x = 1\ny = 1 / 0", r"cannot be imported \(ZeroDivisionError: .*my_module.py, line 2"),
        ("my_module.py", "def prepare(:", r"cannot be imported \(SyntaxError"),
        ("my_module.py", "x = 1", r"has no function prepare\(config, tokenizer\)"),
        ("json", None, "has no function prepare"),
    ],
)
def test_what_is_no_procedure_is_said_in_one_sentence(outside, name, text, said):
    if text is not None:
        (outside / "my_module.py").write_text(text)
    with pytest.raises(LRSAError, match=said) as caught:
        load_procedure(name)
    assert "\n" not in str(caught.value) and "procedure=" in str(caught.value)


def test_data_that_lack_something_are_refused(outside):
    (outside / "my_module.py").write_text(
        "class Half:\n    seq_len = 8\n    def fingerprint(self): pass\ndef prepare(c, t): return Half()"
    )
    with pytest.raises(
        LRSAError, match=r"the Half .* lacks pad_id, examples_of_rows, examples_at, validation_examples"
    ):
        prepare_data(load_procedure("my_module"), TrainConfig(model=MODEL), load_tokenizer(MODEL))


@pytest.mark.parametrize("streaming", [False, True])
def test_a_row_that_a_procedure_cannot_read_is_named(outside, streaming):
    (outside / "my_module.py").write_text(OWN_COLUMNS)
    path = rows(outside / "rows.jsonl")
    path.write_text(path.read_text() + '{"body": "x", "ask": "y", "kind": "z"}\n')
    config = config_of(path)
    config.data.streaming = streaming
    with pytest.raises(LRSAError, match=r"rows.jsonl, line 61: .*(KeyError: 'reply'|answer is missing)"):
        prepare_data(load_procedure("my_module"), config, load_tokenizer(MODEL))
