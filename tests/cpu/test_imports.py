"""Read off the source: imports flow one way, few places know a large dependency, functions and files are short."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

# Who may import whom inside lrsa_ds: a module imports from its own layer and from those before it, never from a later
# one. A new module gets a place here.
LAYERS = (
    ("dtypes", "errors", "intervals", "labels", "notices", "pictures", "registry", "process"),
    ("layer_ranges", "layer_settings", "layers", "lrsa_config"),
    ("settings",),
    ("config", "hub"),
    ("attention",),
    ("parallel",),
    ("compression", "directories"),
    ("data",),
    ("models",),
    ("inputs",),
    ("objectives",),
    ("families",),
    ("costs",),
    ("logs",),
    ("telemetry",),
    ("evaluate",),
    ("train",),
    ("sweep", "sweep_picture", "comparison"),
    ("__main__",),
)

# The same for the whole project.
PACKAGES = ("lrsa_ds", "recipes", "benchmarks", "launch")

# The only places that may import these: files, or whole folders.
ONLY_IN = {
    "hydra": ("launch/",),
    "omegaconf": ("launch/", "lrsa_ds/config.py", "lrsa_ds/settings/"),
    "wandb": ("lrsa_ds/logs/wandb_thread.py",),
    "transformers": (
        "lrsa_ds/models/",
        "lrsa_ds/data/",
        "lrsa_ds/evaluate/",
        "lrsa_ds/families/",
        "lrsa_ds/train/output.py",
        "launch/benchmark.py",  # says its version
        "benchmarks/generation.py",  # the stock model and cache are its baseline
    ),
    "deepspeed": (
        "lrsa_ds/models/loading.py",
        "lrsa_ds/parallel/",
        "lrsa_ds/train/",
    ),
}

# A file can be read in a sitting, and a function fits on a screen.
MOST_LINES_OF_A_FILE, MOST_LINES_OF_A_FUNCTION = 350, 60

LAYER_OF = {module: number for number, modules in enumerate(LAYERS) for module in modules}


def project_imports(root):
    """Yields ("lrsa_ds/model.py", 12, "transformers.cache_utils.Cache") for every import of every file."""
    for package in PACKAGES:
        for path in sorted((root / package).rglob("*.py")):
            file = path.relative_to(root)
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"), str(file))):
                if isinstance(node, ast.Import):
                    names = [alias.name for alias in node.names]
                elif isinstance(node, ast.ImportFrom):
                    origin = [node.module] if node.module else []
                    if node.level:
                        origin = [*file.parent.parts[: len(file.parent.parts) - node.level + 1], *origin]
                    names = [".".join([*origin, alias.name]) for alias in node.names]
                else:
                    continue
                for name in names:
                    yield file.as_posix(), node.lineno, name


def misplaced_dependencies(root):
    return [
        f"{file}:{line} imports {name}: only {', '.join(places)} may"
        for file, line, name in project_imports(root)
        for places in [ONLY_IN.get(name.split(".")[0])]
        if places and not any(file.startswith(place) if place.endswith("/") else file == place for place in places)
    ]


def later_packages(root):
    return [
        f"{file}:{line} imports {name}: imports flow {' → '.join(PACKAGES)}"
        for file, line, name in project_imports(root)
        if name.split(".")[0] in PACKAGES[PACKAGES.index(file.split("/")[0]) + 1 :]
    ]


def later_layers(root):
    found = []
    for file, line, name in project_imports(root):
        package, module = file.removesuffix(".py").split("/")[:2]
        if package != "lrsa_ds" or name.split(".")[0] != "lrsa_ds" or module in ("__init__", "__main__"):
            continue
        imported = name.removeprefix("lrsa_ds").removeprefix(".").split(".")[0]
        if imported not in LAYER_OF and name.count(".") < 2:
            found.append(f"{file}:{line} imports {name}: import it from the module that defines it, not from lrsa_ds")
        elif LAYER_OF.get(imported, 0) > LAYER_OF.get(module, len(LAYERS)):
            found.append(f"{file}:{line} imports {name}: {imported} is a later layer than {module}")
    return found


def modules_without_layer(root):
    modules = {path.relative_to(root / "lrsa_ds").parts[0] for path in (root / "lrsa_ds").rglob("*.py")}
    return [
        f"lrsa_ds/{module} has no place in LAYERS"
        for module in sorted(modules - {"__init__.py"})
        if module.removesuffix(".py") not in LAYER_OF
    ]


def functions_and_files_too_long(root):
    found = []
    for package in PACKAGES:
        for path in sorted((root / package).rglob("*.py")):
            source, file = path.read_text(encoding="utf-8"), path.relative_to(root)
            if (count := len(source.splitlines())) > MOST_LINES_OF_A_FILE:
                found.append(f"{file} has {count} lines: at most {MOST_LINES_OF_A_FILE}")
            found += [
                f"{file}:{node.lineno} {node.name} has {node.end_lineno - node.lineno + 1} lines: at most "
                f"{MOST_LINES_OF_A_FUNCTION}"
                for node in ast.walk(ast.parse(source))
                if isinstance(node, ast.FunctionDef) and node.end_lineno - node.lineno >= MOST_LINES_OF_A_FUNCTION
            ]
    return found


CHECKS = (functions_and_files_too_long, misplaced_dependencies, later_packages, later_layers, modules_without_layer)


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_project_has_no(check):
    found = check(ROOT)
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    ("file", "source", "reported_by"),
    [
        ("lrsa_ds/train/trainer.py", "import wandb", misplaced_dependencies),
        ("lrsa_ds/train/trainer.py", "def f():\n    from hydra.core import x", misplaced_dependencies),
        ("recipes/qa.py", "from transformers import AutoTokenizer", misplaced_dependencies),
        ("lrsa_ds/objectives/distill.py", "import recipes.qa", later_packages),
        ("recipes/qa.py", "from launch import train", later_packages),
        ("lrsa_ds/config.py", "from lrsa_ds.attention.lrsa import lrsa_attention", later_layers),
        ("lrsa_ds/attention/lrsa.py", "from lrsa_ds import models", later_layers),
        ("lrsa_ds/attention/lrsa.py", "from ..parallel import mesh", later_layers),
        ("lrsa_ds/train/trainer.py", "from lrsa_ds import LRSAConfig", later_layers),
        ("lrsa_ds/unheard_of.py", "", modules_without_layer),
        ("recipes/qa.py", "x = 1\n" * 351, functions_and_files_too_long),
        ("recipes/qa.py", "def f():\n" + "    x = 1\n" * 60, functions_and_files_too_long),
    ],
)
def test_violation_is_reported(tmp_path, file, source, reported_by):
    path = tmp_path / file
    path.parent.mkdir(parents=True)
    path.write_text(source)
    assert [check for check in CHECKS if check(tmp_path)] == [reported_by]


def test_allowed_imports_are_not_reported(tmp_path):
    for file, source in {
        "lrsa_ds/__init__.py": "from lrsa_ds.models.patch import apply_lrsa",
        "lrsa_ds/attention/lrsa.py": "import torch\nfrom lrsa_ds.config import x\nfrom .. import errors",
        "lrsa_ds/data/sources.py": "import transformers",
        "lrsa_ds/logs/wandb_thread.py": "import wandb",
        "recipes/qa.py": "from lrsa_ds import LRSAConfig",
        "launch/train.py": "import hydra\nfrom recipes import qa",
    }.items():
        path = tmp_path / file
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(source)
    assert [found for check in CHECKS for found in check(tmp_path)] == []
