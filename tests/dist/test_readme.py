"""Every command of README and docs: run for real where two CPU cores can, composed and typed where they cannot."""

import json
import re
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from hydra.core.override_parser.overrides_parser import OverridesParser
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from launch import benchmark, benchmark_steps, chat, compare, plan, sweep
from launch.cli.accelerator import register_resolver
from launch.cli.checkout import CONF, register_checkout
from launch.cli.plugins import typed_with_plugins
from launch.cli.schema import register_schema
from lrsa_ds.__main__ import split_flags
from lrsa_ds.config import TrainConfig
from lrsa_ds.costs.settings import PlanConfig
from lrsa_ds.data.tokenizer import load_tokenizer
from lrsa_ds.evaluate.config import EvaluateConfig
from lrsa_ds.families.tiny import families
from lrsa_ds.settings.model import ModelConfig
from tests.cpu.test_benchmarks import ASKED, LIMITS, QUESTION, longbench_row, write_rows
from tests.dist.launcher import rows_of, run, run_alone
from tests.helpers import ROOT, example, free_port

pytestmark = pytest.mark.dist
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
EXAMPLES = {"farthest.py": "A selection rule", "smoothed.py": "An objective", "all_kv.py": "An exchange"}
PROGRAMS = ("make", "python", "deepspeed", "sbatch")
SCHEMAS = {"train": TrainConfig, "evaluate": EvaluateConfig}


def commands_of(page: Path) -> set[str]:
    """The commands of the shell blocks and of the text of a page, without comments."""
    text = page.read_text()
    blocks = "".join(re.findall(r"```bash\n(.*?)```", text, re.DOTALL)).replace("\\\n", " ")
    blocks = re.sub(r"(^|\s)#\s.*", "", blocks)
    lines = re.findall(r"(?:'[^']*'|[^\n'])+", blocks)  # quoted words may hold line breaks
    inline = re.findall(rf"`((?:{'|'.join(PROGRAMS)}) [^`]+)`", re.sub(r"```.*?```", "", text, flags=re.DOTALL))
    found = [shlex.join(shlex.split(line, comments=True)) for line in [*lines, *inline]]
    return {command for command in found if command}


def commands() -> list[str]:
    return sorted(set().union(*map(commands_of, PAGES)))


def split(command: str) -> tuple[str, list[str]]:
    """The script of a command, or its program, and what is typed behind it."""
    words = shlex.split(command)
    if words[1:3] == ["-m", "lrsa_ds"]:  # the commands of an installed package
        return f"{words[3]}.py" if words[3:] else "", split_flags(words[4:])[1]
    place = next((i for i, word in enumerate(words) if word.startswith(("launch/", "docs/"))), 0)
    return Path(words[place]).name, [word for word in words[place + 1 :] if word != "..."]


def check_overrides(name: str, overrides: list[str], schema: type | None = None) -> list:
    """Composes and types a configuration; of a sweep, that of every job. Returns them."""
    schema = schema or SCHEMAS[name]
    register_resolver()
    register_checkout()
    register_schema(name, schema)
    jobs = [[]]
    for override in OverridesParser.create().parse_overrides(overrides):
        values = [override.input_line]
        if override.is_sweep_override():
            values = [f"{override.get_key_element()}={value}" for value in override.sweep_string_iterator()]
        jobs = [[*job, value] for job in jobs for value in values]
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return [typed_with_plugins(compose(name, job), schema) for job in jobs]


def check_arguments(program, typed: list[str], monkeypatch):
    monkeypatch.setattr(sys, "argv", ["program", *typed])
    return program.arguments()


@pytest.fixture(scope="module")
def tiny_model(tmp_path_factory) -> Path:
    """A saved model with a tokenizer, as from the hub."""
    start = tmp_path_factory.mktemp("model")
    shape = dict(hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=8, vocab_size=320)
    LlamaForCausalLM(LlamaConfig(**shape, num_key_value_heads=2)).save_pretrained(start)
    load_tokenizer(ModelConfig(random={"model_type": "llama"}, tokenizer="bytes")).save_pretrained(start)
    assert len(AutoTokenizer.from_pretrained(start)) <= 320
    return start


@pytest.mark.parametrize("command", commands())
def test_a_command_of_the_pages_is_right(command, monkeypatch, tmp_path, tiny_model):
    script, typed = split(command)
    monkeypatch.chdir(ROOT)
    for name, heading in EXAMPLES.items():  # the file that the page has above the command
        (tmp_path / name).write_text(example(heading))
        typed = [word.replace(f"[{name}]", f"[{tmp_path / name}]") for word in typed]
    match script:
        case "":
            assert command == "python -m lrsa_ds"  # tests/cpu/test_package.py runs it
        case "make":
            assert subprocess.run(["make", "-n", *typed], capture_output=True, cwd=ROOT).returncode == 0
        case "train.py" | "selftest.py" | "slurm.sh":
            check_overrides("train", typed)
        case "plan.py":
            (config,) = check_overrides("train", typed, PlanConfig)
            if config.model.random is None:  # of these config.json is on the hub
                here = [word for word in typed if not word.startswith("model.name=")]
                (config,) = check_overrides("train", [*here, f"model.name={tiny_model}"], PlanConfig)
            assert plan.action(config)
        case "evaluate.py":
            check_overrides("evaluate", [word.replace("model.name=...", "model.name=x") for word in typed])
        case "sweep.py":
            _, overrides = check_arguments(sweep, typed, monkeypatch)
            check_overrides("train", [word for word in overrides if not word.startswith("-")])
        case "benchmark.py":
            check_arguments(benchmark, typed, monkeypatch)
        case "benchmark_steps.py":
            check_overrides("train", check_arguments(benchmark_steps, typed, monkeypatch).overrides)
        case "chat.py":
            check_arguments(chat, typed, monkeypatch)
        case "compare.py":
            check_arguments(compare, typed, monkeypatch)
        case "families.py":
            assert set(typed) <= {"--refresh", "NAME", *families()}
        case "harness.py":
            assert typed[:2] == ["--model", "lrsa"]  # tests/cpu/test_harness.py runs it
        case "figures.py" | "keys.py":
            assert typed == []  # tests/cpu/test_config.py and test_docs.py run them
        case "docker":
            assert typed[0] in ("build", "run")  # tests/cpu/test_package.py reads the Dockerfile
        case "pip" if typed == ["install", "."]:
            pass  # tests/cpu/test_package.py installs the wheel
        case "pip":
            extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
            assert typed[0] == "install" and re.fullmatch(r"lrsa-ds\[(.*)\]", typed[1])[1] in extras
        case _:
            pytest.fail(f"a page has a command that no test knows: {command}")


def readme_command(part: str) -> list[str]:
    """The words of the one command of the README that has `part` in it, with paths from anywhere."""
    (command,) = (command for command in commands() if part in command)
    words = [str(ROOT / word) if word.startswith("launch/") else word for word in shlex.split(command)]
    if words[0] == "deepspeed":
        words[1:1] = ["--num_gpus", "1", "--master_port", str(free_port())]
    return [sys.executable, *words[1:]] if words[0] == "python" else words


def test_training_evaluating_and_asking_as_the_readme_has_it(tmp_path, tiny_model, monkeypatch):
    """On data of one's own, from a directory of one's own, with a few overrides behind the README's words."""
    (tmp_path / "my").mkdir()
    with open(tmp_path / "my" / "rows.jsonl", "w") as file:
        for i in range(24):
            row = {"my passage": "Words. " * 60 + str(i), "question": "Which?", "answer": str(i)}
            file.write(json.dumps(row) + "\n")
    small = [
        f"model.name={tiny_model}", "seq_len=1024", "attention.lag_size=64", "optim.num_steps=2",
        "optim.warmup_steps=1", "eval.num_examples=4", "eval.before=false", "log.wandb=disabled",
        "data.columns={context: 'my passage'}", "output_dir=run",
    ]  # fmt: skip
    done = run([*readme_command("data.path=my/*.jsonl"), *small], cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert len(rows_of(tmp_path / "run", "train")) == 2 and (tmp_path / "run" / "model").is_dir()

    few = ["model.name=run/model", "lengths=[640]", "num_samples=1", "log.wandb=disabled", "output_dir=evaluated"]
    done = run([*readme_command("tasks=[passkey,needle,signature]"), *few], cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert len((tmp_path / "evaluated" / "results.jsonl").read_text().splitlines()) == 3 * 3

    monkeypatch.chdir(tmp_path)
    for page, made in (("README.md", "output"), ("docs/inference.md", "answer")):  # use in Python, block by block
        names = {"document": "Some words. " * 100, "question": "Which?", "questions": ["Which?", "Why?"]}
        for code in re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(), re.DOTALL):
            exec(code.replace("outputs/.../model", "run/model").replace("=100)", "=4)"), names)
            assert names[made].shape[1] <= names["ids"].shape[1] + 4, page

    (tmp_path / "long.txt").write_text("Some words. " * 100)
    words = [word.replace("outputs/.../model", "run/model") for word in readme_command("chat.py")]
    done = run([*words, "--max-new-tokens", "4"], cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "A question?" in done.stdout


def test_long_contexts_are_evaluated_as_the_page_has_it(tmp_path, tiny_model):
    """At lengths that a CPU can take."""
    words = readme_command("lengths=[32768,131072]")[2:]
    here = [f"model.name={tiny_model}", "lengths=[512,1024]", "cache.lag_size=32", "num_samples=1"]
    done = run_alone("evaluate", *words, *here, "log.wandb=disabled", f"output_dir={tmp_path / 'evaluated'}")
    assert done.returncode == 0, done.stdout + done.stderr
    assert len((tmp_path / "evaluated" / "results.jsonl").read_text().splitlines()) == 2 * 2 * 2


def test_benchmarks_of_others_as_the_page_has_them(tmp_path, tiny_model):
    """On folders in the layout of their authors."""
    for length in (512, 1024):
        write_rows(tmp_path / f"RULER_OUTPUT/{length}/data/vt/validation.jsonl", QUESTION)
    longbench = tmp_path / "LongBench"
    write_rows(longbench / "data/hotpotqa.jsonl", longbench_row("hotpotqa", context="Long ago. " * 40))
    write_rows(longbench / "config/dataset2prompt.json", ASKED)
    write_rows(longbench / "config/dataset2maxlen.json", LIMITS)
    for task, folder, lengths, found in (
        ("ruler", "RULER_OUTPUT", "[512,1024]", {("ruler/vt", 512), ("ruler/vt", 1024)}),
        ("longbench", "LongBench/data", "[512]", {("longbench/hotpotqa", 512)}),
    ):
        output, words = tmp_path / task, readme_command(f"tasks=[{task}]")[2:]
        here = [f"model.name={tiny_model}", f"{task}={tmp_path / folder}", f"lengths={lengths}", "cache.lag_size=32"]
        done = run_alone("evaluate", *words, *here, "log.wandb=disabled", f"output_dir={output}")
        assert done.returncode == 0, done.stdout + done.stderr
        rows = [json.loads(line) for line in (output / "results.jsonl").read_text().splitlines()]
        assert {(row["task"], row["length"]) for row in rows} == found and len(rows) == 3 * len(found)
