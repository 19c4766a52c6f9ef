"""What is installed: one package, which works without the checkout, and its commands."""

import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tomllib
import venv
import zipfile
from pathlib import Path

import pytest
import yaml

import lrsa_ds
from launch.cli.checkout import check_fetched
from lrsa_ds.__main__ import COMMANDS, ROOT, command_line, main, split_flags
from lrsa_ds.errors import LRSAError
from lrsa_ds.settings.model import ModelConfig
from tests.helpers import metrics_of

FOLDERS = ("benchmarks", "conf", "launch", "lrsa_ds", "recipes")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """Built from a copy, which keeps the checkout clean."""
    folder = tmp_path_factory.mktemp("wheel")
    for name in FOLDERS:
        shutil.copytree(ROOT / name, folder / "source" / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder / "source")
    build = "import sys; from setuptools.build_meta import build_wheel; build_wheel(sys.argv[1])"
    done = subprocess.run(
        [sys.executable, "-c", build, str(folder)], cwd=folder / "source", capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return next(folder.glob("*.whl"))


def test_a_wheel_holds_one_package_with_commands_and_settings(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
    assert {name.split("/")[0] for name in names} == {"lrsa_ds"} and "lrsa_ds/py.typed" in names
    inside = {name.removeprefix("lrsa_ds/_checkout/") for name in names if "/_checkout/" in name}
    here = {path.relative_to(ROOT).as_posix() for name in FOLDERS for path in (ROOT / name).rglob("*")}
    assert inside == {
        path
        for path in here
        if path.endswith((".py", ".yaml")) and not path.startswith(("lrsa_ds/", "benchmarks/results"))
    }


def test_an_installed_wheel_trains_from_any_directory(wheel, tmp_path):
    """In an environment of its own: it has the libraries of this one, but not its editable installation."""
    venv.create(tmp_path / "venv", with_pip=False)
    python = tmp_path / "venv" / "bin" / "python"
    site = Path(sysconfig.get_path("purelib", vars={"base": str(tmp_path / "venv")}))
    (site / "libraries.pth").write_text(sysconfig.get_path("purelib") + "\n")
    pip = [sys.executable, "-m", "pip", "--python", str(python), "install", "--quiet", "--no-index", "--no-deps"]
    subprocess.run([*pip, "--ignore-installed", str(wheel)], check=True, capture_output=True, timeout=60)
    environment = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "RANK")}
    settings = ["optim.num_steps=1", "eval.before=false", "eval.num_examples=1", "log.wandb=disabled", "output_dir=run"]
    (tmp_path / "anywhere" / "recipes").mkdir(parents=True)  # hides nothing
    done = subprocess.run(
        [python, "-m", "lrsa_ds", "train", "+recipe=smoke", *settings],
        cwd=tmp_path / "anywhere",
        env=environment | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert [row["step"] for row in metrics_of(tmp_path / "anywhere" / "run") if row["kind"] == "train"] == [1]
    assert (tmp_path / "anywhere" / "run" / "model").is_dir()


@pytest.mark.parametrize(
    "typed,flags",
    [
        ("+recipe=smoke seed=1", 0),
        ("--num_gpus 2 +recipe=smoke", 2),
        ("--num_gpus=2 --no_local_rank +recipe=smoke", 2),
        ("--no_local_rank seed=1", 1),
        ("--include localhost:0,1 --master_port 29501 model.name=x", 4),
        ("--num_nodes 2 ~eval.layers", 2),
        ("--help", 0),
        ("--num_gpus 2 --cfg job", 2),
        ("", 0),
    ],
)
def test_flags_of_the_launcher_come_before_the_settings(typed, flags):
    words = typed.split()
    assert split_flags(words) == (words[:flags], words[flags:])


def test_the_launcher_is_started_for_several_gpus_or_with_its_flags():
    launcher = [sys.executable, "-m", "deepspeed.launcher.runner"]
    script = str(ROOT / "launch" / "train.py")
    assert command_line("train", ["seed=1"], 8, False) == [*launcher, script, "seed=1"]
    typed = ["--num_gpus", "2", "seed=1"]
    assert command_line("train", typed, 0, False) == [*launcher, "--num_gpus", "2", script, "seed=1"]
    assert command_line("train", ["seed=1"], 1, False) is None
    assert command_line("train", ["--help"], 8, False) is None
    assert command_line("train", ["seed=1"], 8, True) is None  # one of the ranks already
    assert command_line("sweep", ["--at-once", "2", "seed=1,2"], 8, False) is None  # it starts its jobs itself


def test_commands_are_listed_and_a_wrong_one_is_named(capsys, monkeypatch):
    assert all((ROOT / "launch" / f"{name}.py").is_file() for name in COMMANDS)
    monkeypatch.setattr(sys, "argv", ["lrsa_ds"])
    assert main() == 0
    listed = capsys.readouterr().out
    assert all(f"\n  {name} " in listed for name in COMMANDS)
    monkeypatch.setattr(sys, "argv", ["lrsa_ds", "trian"])
    assert main() == 2
    assert capsys.readouterr().err == (f"error: there is no command 'trian'; valid here: {', '.join(COMMANDS)}.\n")


def test_the_version_is_the_same_everywhere():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert project["version"] == citation["version"] == lrsa_ds.__version__
    dated = rf"^## {re.escape(project['version'])} - {citation['date-released']}$"
    assert re.search(dated, (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    minors = re.findall(r"Python :: (3\.\d+)", " ".join(project["classifiers"]))
    workflow = yaml.safe_load((ROOT / ".github/workflows/ci.yml").read_text())
    assert workflow["jobs"]["install"]["strategy"]["matrix"]["python"] == minors


def instructions(text: str) -> list[tuple[str, str]]:
    """The instructions of a Dockerfile with their arguments, without comments and line breaks."""
    lines = [line for line in text.splitlines() if not line.lstrip().startswith("#")]
    joined = "\n".join(lines).replace("\\\n", " ")
    return [(line.split()[0], line.split(maxsplit=1)[1]) for line in joined.splitlines() if line.strip()]


def test_the_images_install_what_is_there():
    """There is no daemon in the tests: what can be read off the Dockerfile, for each image."""
    text = (ROOT / "Dockerfile").read_text()
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    ignored = (ROOT / ".dockerignore").read_text().split()
    images: dict[str, list[tuple[str, str]]] = {}
    for name, value in instructions(text):
        if name == "FROM":
            source, _, target = value.partition(" AS ")
            assert ":" in source and not source.endswith(":latest"), value
            images[target] = []
        elif images:
            images[target].append((name, value))
    workflow = (ROOT / ".github/workflows/ci.yml").read_text()
    assert set(images) == {"cpu", "cuda"} == set(re.findall(r"--target (\w+)", workflow + text))
    for image in images.values():
        values = {name: [value for n, value in image if n == name] for name, _ in image}
        sources = {word for value in values["COPY"] for word in value.split()[:-1]}
        assert sources >= {"setup.py", "pyproject.toml", "constraints.txt", *FOLDERS}
        assert all((ROOT / source).exists() and source not in ignored for source in sources)
        assert project["readme"] in sources and set(project["license-files"]) <= sources
        assert values["ENTRYPOINT"] == ['["python", "-m", "lrsa_ds"]'] and all(w[0] == "/" for w in values["WORKDIR"])
        extras = re.search(r"pip install '\.\[([\w,]+)\]'", " ".join(values["RUN"]))[1]
        assert set(extras.split(",")) <= set(project["optional-dependencies"])
        for run in values["RUN"]:
            assert subprocess.run(["sh", "-n", "-c", run]).returncode == 0, run
            assert run.count("pip install") == run.count("PIP_CONSTRAINT=constraints.txt PIP_BUILD_CONSTRAINT=")
            assert "apt-get install" not in run or ("--no-install-recommends" in run and "rm -rf /var/lib/apt" in run)


def test_the_small_model_is_not_in_a_wheel(tmp_path, monkeypatch):
    monkeypatch.setattr("launch.cli.checkout.ROOT", tmp_path)
    model = ModelConfig(name=str(tmp_path / "models" / "SmolLM2"), gguf_file="small.gguf")
    with pytest.raises(LRSAError, match="an installed package does not contain this model, `make setup` in a checkout"):
        check_fetched(model)
