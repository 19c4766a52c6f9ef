"""Several mistakes at once are all said, and defaults that do not fit give way: the commands in this process."""

import json
import re

import pytest

from tests.dist.launcher import rows_of, train_alone
from tests.dist.test_launch import refused

pytestmark = pytest.mark.dist
TRAIN = ["+recipe=smoke", "log.wandb=disabled"]


def numbered(sentence: str) -> int:
    return len(re.findall(r"\(\d+\) ", sentence))


@pytest.mark.parametrize(
    "arguments,said",
    [
        (["optim.lr=-1", "seed=-1", "eval.every=-2"], ["optim.lr=-1", "seed=-1", "eval.every=-2"]),
        (["optim.lr=0", "optim.beta1=2", "zero.stage=7"], ["optim.lr=0", "optim.beta1=2", "zero.stage=7"]),
        (["optim.lrr=1", "sedd=2", "optim.lr=fast"], ["optim.lrr is not a key", "sedd is not a key", "optim.lr: "]),
        (["+attention.typo=1", "seed=-1", "eval.num_examples=x"], ["attention.typo", "eval.num_examples", "seed=-1"]),
        (["model=hub", "model.name=/no/such/model", "data=files", "data.path=a=b"], ["data.path: the value a=b"]),
        (["run_name=ä", "optim.beta2=2", "data.tasks=[poem]"], ["run_name: ", "optim.beta2=2", "data.tasks='poem'"]),
    ],
)
def test_all_mistakes_are_said_at_once(capfd, monkeypatch, arguments, said):
    sentence = refused(capfd, monkeypatch, *TRAIN, *arguments)
    for part in said:
        assert sentence.count(part) == 1, sentence
    assert numbered(sentence) in (0, len(said)) and (len(said) == 1 or numbered(sentence) == len(said))


def test_places_that_are_not_there_are_said_at_once(capfd, monkeypatch, tmp_path):
    arguments = ["model.tokenizer=/no/tokenizer", "attention.backend=flex", "model.random.num_attention_heads=4"]
    sentence = refused(capfd, monkeypatch, *TRAIN, *arguments, f"output_dir={tmp_path}/run")
    assert "model.tokenizer='/no/tokenizer' does not exist" in sentence and "needs a CUDA device" in sentence


def rows(path, count: int) -> str:
    line = {"context": "The key is under the mat. " * 20, "question": "Where is the key?", "answer": "under the mat"}
    path.write_text("".join(json.dumps(line | {"context": line["context"] + str(i)}) + "\n" for i in range(count)))
    return f"data.path={path}"


@pytest.mark.parametrize(
    "settings,said",
    [
        (["data.streaming=true", "optim.num_steps=1"], "=1 (its default, 2, is more than optim.num_steps=1)"),
        (["optim.num_epochs=0.1"], "=1 in place of 2: optim.num_epochs=0.1 makes 1 steps."),
    ],
)
def test_a_small_file_and_few_steps_are_enough(tmp_path, settings, said):
    """Neither the warm-up nor the number of held-out rows was typed: both give way, and that is said."""
    data = rows(tmp_path / "rows.jsonl", 12)
    more = ["checkpoint.export=false", f"output_dir={tmp_path}/run", *settings]
    done = train_alone(*TRAIN, "data=files", data, "eval.before=false", *more)
    assert done.returncode == 0, done.stderr
    assert f"optim.warmup_steps{said}" in done.stdout + done.stderr
    assert "eval.num_examples=4 is a default" in done.stderr and "has 12 rows: 3 of them are held out" in done.stderr
    assert {row["num_examples"] for row in rows_of(tmp_path / "run", "eval")} == {3}


def test_numbers_that_were_typed_do_not_give_way(capfd, monkeypatch, tmp_path):
    data = rows(tmp_path / "rows.jsonl", 4)
    command = [*TRAIN, "data=files", data]
    assert "eval.num_examples=4 rows cannot be held out" in refused(capfd, monkeypatch, *command, "eval.num_examples=4")
    said = refused(capfd, monkeypatch, *command, "optim.num_steps=3", "optim.warmup_steps=9")
    assert "optim.warmup_steps=9 is more than optim.num_steps=3" in said
    few = [*command, "eval.num_examples=1", "optim.num_epochs=0.1", "optim.warmup_steps=9"]
    said = refused(capfd, monkeypatch, *few)
    assert "optim.num_epochs=0.1 makes 1 steps, fewer than optim.warmup_steps=9" in said
