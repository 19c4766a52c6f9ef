"""Names and paths with any characters in them, and places that are not there or cannot be written."""

import os
import sys
from pathlib import Path

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser

from launch.cli.sentences import quoted
from lrsa_ds.config import TrainConfig
from lrsa_ds.data.tokenizer import byte_tokenizer
from lrsa_ds.evaluate.config import EvaluateConfig
from lrsa_ds.settings.data import DataConfig
from lrsa_ds.settings.model import ModelConfig
from tests.dist.launcher import run, run_alone, sentences
from tests.dist.test_launch import refused
from tests.helpers import ROOT

pytestmark = pytest.mark.dist
TRAIN = ["+recipe=smoke", "log.wandb=disabled"]
AWKWARD = ["a=b.jsonl", "my (1).jsonl", "x#1", "~/x", "größe/ä", "日本", "data[1].jsonl", "it's", "a;b", "a&b"]


@pytest.mark.parametrize("value", AWKWARD)
def test_a_value_that_needs_quotes(capfd, monkeypatch, value):
    said = refused(capfd, monkeypatch, *TRAIN, "data=files", f"data.path={value}")
    assert f"data.path: the value {value} cannot be read" in said
    assert f"data.path={quoted(value)}" in said.replace("""'"'"'""", "'")
    # Written so, the value arrives.
    said = refused(capfd, monkeypatch, *TRAIN, "data=files", f"data.path={quoted(value)}")
    assert "data.path=" in said and os.path.expanduser(value) in said.replace("\\'", "'")


def test_other_arguments_that_cannot_be_read(capfd, monkeypatch, tmp_path):
    for command in ("train", "selftest"):
        assert "optim.lr is no setting: write KEY=VALUE" in refused(capfd, monkeypatch, "optim.lr", command=command)
    said = refused(capfd, monkeypatch, "model.name=a(b", "data.columns={context: a", command="evaluate")
    assert "model.name: the value a(b cannot be read" in said
    assert "close every bracket" in refused(capfd, monkeypatch, *TRAIN, "data.columns={context: a=b}")
    done = run_alone("sweep", "--multirun", *TRAIN, "seed=1,2", f"output_dir={tmp_path}/a=b")
    (sentence,) = sentences(done.stderr)
    assert done.returncode == 2 and f"\"output_dir='{tmp_path}/a=b'\"" in sentence


@pytest.mark.parametrize("text", ["a'b", "a\\b", "a\\'b", "\\\\", "x\\", "a=b", "${x}", "ä", 'a"b', "'", "''", " a "])
def test_quoted_reads_back(text):
    (override,) = OverridesParser.create().parse_overrides([f"data.path={quoted(text)}"])
    assert override.value() == text


def test_the_home_directory_in_every_key_that_holds_a_path(monkeypatch):
    monkeypatch.setenv("HOME", "/some/home")
    model = ModelConfig(name="~/model", tokenizer="~/tokenizer")
    assert (model.name, model.tokenizer) == ("/some/home/model", "/some/home/tokenizer")
    data = DataConfig(source="files", path=["~/a.jsonl", "b.jsonl"], validation_path="~/c.jsonl")
    assert (data.path, data.validation_path) == (["/some/home/a.jsonl", "b.jsonl"], "/some/home/c.jsonl")
    assert DataConfig(source="hub", name="~/rows").name == "/some/home/rows"
    assert TrainConfig(model=model, output_dir="~/run").output_dir == "/some/home/run"
    both = {"tasks": ["longbench", "ruler"], "longbench": "~/bench", "ruler": "~/ruler"}
    evaluation = EvaluateConfig(model=model, output_dir="~/out", **both)
    assert (evaluation.output_dir, evaluation.longbench) == ("/some/home/out", "/some/home/bench")
    assert evaluation.ruler == "/some/home/ruler"


@pytest.mark.parametrize("command", ["train", "evaluate"])
def test_a_model_that_is_not_there(capfd, monkeypatch, tmp_path, command):
    first = TRAIN[:1] * (command == "train")
    arguments = [*first, "log.wandb=disabled", "model=hub"]
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in (f"{tmp_path}/missing", "./missing", "'~/missing'", "outputs/run/missing"):
        said = refused(capfd, monkeypatch, *arguments, f"model.name={name}", command=command)
        assert "model.name=" in said and "missing' does not exist: give a directory" in said
    (tmp_path / "model.gguf").touch()
    said = refused(capfd, monkeypatch, *arguments, f"model.name={tmp_path}/model.gguf", command=command)
    assert f"is a file: give its directory, {tmp_path}, and model.gguf_file" in said


@pytest.mark.parametrize(
    "template,said",
    [
        ("{{ raise_exception('only users here') }}", "(only users here)"),
        ("{{ messages[0].nothing.at_all }}", "the chat template refuses the roles"),
        ("{{ 1 + messages[0]['content'] }}", "the chat template refuses the roles"),
        ("{{ 1 // 0 }}", "the chat template refuses the roles"),
        ("{% for message in messages %}{{ message", "the chat template of the tokenizer is broken ("),
    ],
)
def test_a_chat_template_that_raises(capfd, monkeypatch, tmp_path, template, said):
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = template
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    sentence = refused(capfd, monkeypatch, *TRAIN, f"model.tokenizer={tmp_path}/tokenizer")
    assert said in sentence and "data.chat_template=false" in sentence


# A place that not even root can write to; chmod would not hold root up.
READ_ONLY = Path("/sys")


@pytest.mark.skipif(not READ_ONLY.is_dir(), reason="needs /sys, which nobody can write to")
@pytest.mark.parametrize("script", ["train", "evaluate"])
def test_a_working_directory_that_cannot_be_written(script):
    evaluation = ["log.wandb=disabled", "model=tiny_qwen2", "cache.lag_size=64", "lengths=[512]"]
    own = {"train": TRAIN, "evaluate": evaluation}
    done = run([sys.executable, str(ROOT / f"launch/{script}.py"), *own[script]], cwd=READ_ONLY)
    assert done.returncode == 2
    (sentence,) = sentences(done.stderr)
    assert "outputs" in sentence and "cannot be written" in sentence
    assert "Traceback" not in done.stderr and done.stderr.splitlines()[-1] == sentence


@pytest.mark.skipif(not READ_ONLY.is_dir(), reason="needs /sys, which nobody can write to")
def test_a_cache_that_cannot_be_written(tmp_path):
    """Of Parquet files `datasets` makes a copy there."""
    import pyarrow
    import pyarrow.parquet

    rows = [{"prompt": f"{i} " * 20, "completion": "b"} for i in range(20)]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "rows.parquet")
    command = [sys.executable, "launch/train.py", *TRAIN, "data=files", f"data.path={tmp_path}/rows.parquet"]
    done = run([*command, f"output_dir={tmp_path}/run"], env={"HF_HOME": f"{READ_ONLY}/cache"})
    assert done.returncode == 2
    (sentence,) = sentences(done.stderr)
    assert f"the cache {READ_ONLY}" in sentence and "set HF_HOME to a directory" in sentence
    assert "Traceback" not in done.stderr
