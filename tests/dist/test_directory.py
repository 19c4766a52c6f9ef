"""What is not a run's own in or about its directory stays as it is, whatever is asked for."""

import json
import os
import shutil

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from lrsa_ds.directories.layout import MARK, TRAIN, marked_by, remove_run
from tests.dist.launcher import run_alone, train_alone
from tests.dist.test_launch import SHORT, refused

pytestmark = pytest.mark.dist
# Places where users keep things of their own in a run's directory.
FOREIGN = (
    "notes.txt",
    "mine/keep.txt",
    "checkpoints/notes.txt",
    "checkpoints/mine/keep.txt",
    "checkpoints/step_best/trainer.json",
    "checkpoints/old.partial/keep.pt",
    "checkpoints/step_000001/notes.txt",
    "checkpoints/step_000001/state/keep.bin",
    "checkpoints/step_000002.partial/keep.txt",
    "model/README.md",
    "model/mine/config.json",
    "model.partial/keep.txt",
    "best/notes.txt",
    "ranks/notes.txt",
    "wandb/offline-run-20200101_000000-mine/run-mine.wandb",
)


def tree(directory):
    """Every file with its content, every link with its target."""
    found = {}
    for path in sorted(directory.rglob("*")):
        name = path.relative_to(directory).as_posix()
        found[name] = os.readlink(path) if path.is_symlink() else path.read_bytes() if path.is_file() else None
    return found


def put(directory, *names):
    for name in names:
        (directory / name).parent.mkdir(parents=True, exist_ok=True)
        (directory / name).write_text(f"of the user: {name}")


def command(output, *more):
    short = ["checkpoint.every=1", "checkpoint.keep=1", "eval.num_examples=1"]
    return ["+recipe=smoke", *SHORT, "log.wandb=offline", *short, f"output_dir={output}", *more]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    output = tmp_path_factory.mktemp("finished") / "run"
    done = train_alone(*command(output, "eval.after=true", "log.profile_steps=[1,1]"))
    assert done.returncode == 0, done.stderr
    return output


@pytest.fixture(scope="module")
def tiny_model(tmp_path_factory):
    directory = tmp_path_factory.mktemp("tiny") / "model"
    sizes = dict(hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, vocab_size=512)
    with torch.device("cpu"):
        LlamaForCausalLM(LlamaConfig(**sizes)).save_pretrained(directory)
    return directory


def test_every_file_of_a_run_is_known_and_can_be_removed(finished, tmp_path):
    output = tmp_path / "run"
    shutil.copytree(finished, output, symlinks=True)
    assert marked_by(output) == "train"
    remove_run(output, TRAIN)
    assert sorted(os.listdir(output)) == [MARK, "wandb"]


def test_the_console_is_kept(finished):
    lines = (finished / "console.log").read_text().splitlines()
    assert lines[0].startswith("--- 20")
    assert any(line.startswith("step 2/2 ") for line in lines) and f"model: {finished / 'model'}" in lines


def test_overwriting_leaves_what_is_not_of_the_run(finished, tmp_path):
    output = tmp_path / "run"
    shutil.copytree(finished, output, symlinks=True)
    put(output, *FOREIGN)
    before = tree(output)
    wandb = {name: content for name, content in before.items() if name.startswith("wandb/") and "latest" not in name}
    done = train_alone(*command(output, "checkpoint.overwrite=true", "seed=1", "log.wandb=disabled"))
    assert done.returncode == 0, done.stderr
    after = tree(output)
    for name in FOREIGN:
        assert after.get(name) == before[name], name
    assert all(after[name] == content for name, content in wandb.items())
    assert "COMPLETED" in after and after["model/model.safetensors"] != before["model/model.safetensors"]
    assert "evaluation.txt" not in after and "trace.json" not in after and "wandb_run.txt" not in after
    assert "checkpoints/step_000002/trainer.json" in after


@pytest.mark.parametrize(
    "held",
    [
        ["notes.txt"],
        ["checkpoints/step_000003/weights.pt"],
        ["model/config.json", "model/model.safetensors"],
        ["metrics.jsonl", "config.yaml"],
        ["COMPLETED"],
        [MARK],
    ],
)
@pytest.mark.parametrize("overwrite", [False, True])
def test_a_directory_without_the_mark_is_refused(capfd, monkeypatch, tmp_path, held, overwrite):
    put(tmp_path, *held)
    before = tree(tmp_path)
    said = refused(capfd, monkeypatch, *command(tmp_path, f"checkpoint.overwrite={str(overwrite).lower()}"))
    assert held[0].split("/")[0] in said and "is not marked as the directory of a run" in said
    assert tree(tmp_path) == before


def test_a_run_from_before_the_mark_is_not_thrown_away(capfd, monkeypatch, finished, tmp_path):
    output = tmp_path / "run"
    shutil.copytree(finished, output, symlinks=True)
    (output / MARK).unlink()
    assert "not marked" in refused(capfd, monkeypatch, *command(output))
    (output / "COMPLETED").unlink()
    assert "not marked" in refused(capfd, monkeypatch, *command(output, "checkpoint.overwrite=true"))
    put(output, "notes.txt")
    assert "holds notes.txt and is not marked" in refused(capfd, monkeypatch, *command(output))


OF_MODELS = ["model=hub", "output_dir={t}/P", "model.tokenizer=bytes"]
OF_DATA = ["data=files", "output_dir={t}/P", "data.path={t}/all.jsonl"]


@pytest.mark.parametrize(
    "arguments",
    [
        [*OF_MODELS, "model.name={t}/P/model"],
        [*OF_MODELS, "model.name={t}/P/model", "output_dir={t}/P/model"],
        [*OF_MODELS, "model.name={t}/P/model", "output_dir={t}/link"],
        [*OF_MODELS, "model.name={t}/behind"],
        [*OF_MODELS, "model.name={t}/files"],
        [*OF_MODELS, "model.name={t}/outside", "model.tokenizer={t}/P/model"],
        [*OF_MODELS, "model.name={t}/adapters"],
        [*OF_DATA, "data.path={t}/P/rows.jsonl"],
        [*OF_DATA, "data.path=[{t}/all.jsonl,{t}/P/rows.jsonl]"],
        ["data=mixture", "output_dir={t}/P", "data.sources=[{{path:{t}/all.jsonl}},{{path:{t}/P/data}}]"],
        [*OF_DATA, "data.path='{t}/P/*.jsonl'"],
        [*OF_DATA, "data.path={t}/P/data"],
        [*OF_DATA, "data.path={t}/linked"],
        [*OF_DATA, "data.validation_path={t}/P/rows.jsonl"],
    ],
)
def test_inputs_where_the_run_would_write_are_refused(capfd, monkeypatch, tmp_path, tiny_model, arguments):
    place, row = tmp_path / "P", json.dumps({"prompt": "a", "completion": "b"}) + "\n"
    for target in (place / "model", tmp_path / "outside"):
        shutil.copytree(tiny_model, target)
    for path in (place / "rows.jsonl", place / "data" / "rows.jsonl", tmp_path / "all.jsonl"):
        path.parent.mkdir(exist_ok=True)
        path.write_text(row * 20)
    (tmp_path / "link").symlink_to(place)
    (tmp_path / "behind").symlink_to(place / "model")
    for name, target in (("files", "model"), ("linked", "data")):
        (tmp_path / name).mkdir()
        for path in (place / target).iterdir():
            (tmp_path / name / path.name).symlink_to(path)
    (tmp_path / "adapters").mkdir()
    peft = {"peft_type": "LORA", "r": 4, "base_model_name_or_path": str(place / "model")}
    (tmp_path / "adapters" / "adapter_config.json").write_text(json.dumps(peft))
    for is_marked in (False, True):
        if is_marked:
            for directory in (place, place / "model"):
                (directory / MARK).write_text(json.dumps({"program": "lrsa-ds", "command": "train"}))
        before = tree(tmp_path)
        typed = [argument.format(t=tmp_path) for argument in arguments]
        said = refused(capfd, monkeypatch, "+recipe=smoke", "log.wandb=disabled", "checkpoint.overwrite=true", *typed)
        assert "lies in output_dir=" in said and "where a run replaces and removes files" in said
        assert tree(tmp_path) == before


def test_a_link_in_the_place_of_a_run_s_file_is_refused(capfd, monkeypatch, finished, tmp_path):
    output, elsewhere = tmp_path / "run", tmp_path / "elsewhere"
    for name in ("checkpoints", "config.yaml"):
        shutil.copytree(finished, output, symlinks=True)
        shutil.move(output / name, elsewhere)
        (output / name).symlink_to(elsewhere)
        before = tree(tmp_path)
        said = refused(capfd, monkeypatch, *command(output, "checkpoint.overwrite=true"))
        assert f"has a link where a run writes its own files, {name}:" in said
        assert tree(tmp_path) == before
        shutil.rmtree(output)
        shutil.rmtree(elsewhere) if elsewhere.is_dir() else elsewhere.unlink()


def test_an_unfinished_run_without_a_checkpoint(capfd, monkeypatch, finished, tmp_path):
    """The same command resumes with it, another one does not throw its rows away."""
    output = tmp_path / "run"
    shutil.copytree(finished, output, symlinks=True)
    (output / "COMPLETED").unlink()
    shutil.rmtree(output / "checkpoints")
    before = tree(output)
    said = refused(capfd, monkeypatch, *command(output, "eval.after=true", "optim.lr=1e-4"))
    assert "that left no checkpoint, with other settings, optim.lr=0.0001 (was 0.003)" in said
    said = refused(capfd, monkeypatch, *command(output, "checkpoint.resume=never"))
    assert "holds an unfinished run: set checkpoint.resume=auto" in said
    assert tree(output) == before


def test_other_commands_keep_to_their_own_directories(capfd, monkeypatch, finished, tmp_path):
    output = tmp_path / "run"
    shutil.copytree(finished, output, symlinks=True)
    put(tmp_path / "other", "notes.txt")
    before = tree(tmp_path)
    evaluate = [f"model.name={finished / 'model'}", "tasks=[needle]", "lengths=[512]", "overwrite=true"]
    evaluate.append("log.wandb=disabled")
    said = refused(capfd, monkeypatch, *evaluate, f"output_dir={output}", command="evaluate")
    assert "belongs to a run of launch/train.py" in said
    said = refused(capfd, monkeypatch, *evaluate, f"output_dir={finished}", command="evaluate")
    assert "model.name=" in said and "lies in output_dir=" in said
    said = refused(capfd, monkeypatch, *evaluate, f"output_dir={tmp_path}/other", command="evaluate")
    assert "holds notes.txt and is not marked" in said
    for place, reason in (("run", "belongs to a run of launch/train.py"), ("other", "holds notes.txt and is not")):
        arguments = ["--multirun", "+recipe=smoke", "seed=1,2", f"output_dir={tmp_path / place}"]
        done = run_alone("sweep", *arguments)
        assert done.returncode == 2 and reason in done.stderr
    assert tree(tmp_path) == before
