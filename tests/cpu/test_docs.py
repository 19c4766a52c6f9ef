"""The pages: the site builds with every link checked, and the figures are those that the code draws."""

import re
import subprocess
import sys

import numpy as np
import pytest
import torch
from matplotlib.image import imread
from torch.nn.functional import cross_entropy

from docs import errors, figures
from lrsa_ds import LagKVCache, LRSAConfig, apply_lrsa, select_kept
from lrsa_ds.data.packing import IGNORE
from lrsa_ds.objectives import OBJECTIVES
from lrsa_ds.registry import LAYER_KINDS, SELECTION_RULES
from tests.cpu.test_cache import STEPS, logits_of_training, logits_with_cache
from tests.cpu.test_model import tiny
from tests.cpu.test_objectives import batch_of, logits_of, objective_of
from tests.helpers import ROOT, assert_close, example


def test_the_site_builds_strictly(tmp_path):
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "GB" in (tmp_path / "memory_128k.html").read_text()
    assert "is too short for anything to be compressed" in (tmp_path / "errors.html").read_text()


def test_the_figures_are_those_that_the_code_draws(tmp_path):
    figures.write(tmp_path)
    drawn = sorted(path.name for path in tmp_path.iterdir())
    assert len(drawn) >= 5
    for name in drawn:
        ours, theirs = imread(tmp_path / name), imread(ROOT / "docs" / "pictures" / name)
        # Fonts and antialiasing may differ between versions of matplotlib.
        assert ours.shape == theirs.shape and np.abs(ours - theirs).mean() < 0.02, f"run python docs/figures.py: {name}"


@pytest.fixture
def registries():
    """What examples register is gone afterwards."""
    tables = [SELECTION_RULES, LAYER_KINDS, OBJECTIVES]
    before = [dict(table._entries) for table in tables]
    yield
    for table, entries in zip(tables, before, strict=True):
        table._entries = entries


def test_the_example_of_a_selection_rule(registries):
    exec(example("A selection rule"), {})
    config = LRSAConfig(sink_size=3, lag_size=8, retention=0.3, selection="farthest")
    k, v = torch.randn(2, 1, 2, 3 + 3 * 8, 12)
    kept = select_kept(k, v, config)
    for head in range(2):
        distance = (k[0, head, 3:11] - k[0, head, 11:19].mean(0)).norm(dim=-1)
        assert kept[0, head, 0].tolist() == sorted((3 + distance.topk(2).indices).tolist())
    model, ids = apply_lrsa(tiny("llama"), config), torch.randint(0, 101, (1, 60))
    with_cache = logits_with_cache(model, ids, LagKVCache(config), STEPS["across chunks"](config))
    assert_close(with_cache, logits_of_training(model, ids), 1e-4, "logits")


@pytest.mark.parametrize("heading", ["A model family", "A kind of layer"])
def test_the_examples_that_check_themselves(registries, heading):
    exec(example(heading), {})


def test_the_example_of_an_objective(registries):
    exec(example("An objective"), {})
    model, batch = apply_lrsa(tiny("llama"), LRSAConfig(sink_size=2, lag_size=8, retention=0.25)), batch_of()
    loss, logged = objective_of(model, "objective.kind=smoothed")(**batch)
    logits, labels = logits_of(model, batch, 0.25), batch["labels"][0]
    for smoothing, found in ((0.1, loss), (0.0, logged[0])):
        settings = dict(ignore_index=IGNORE, reduction="sum", label_smoothing=smoothing)
        assert_close(found, cross_entropy(logits, labels, **settings), 1e-5, "loss")


def test_the_page_of_128k_tokens_has_the_figures_of_the_plan():
    page = (ROOT / "docs" / "memory_128k.md").read_text()
    written = [float(gb) for gb in re.findall(r"\| ([\d.]+) GB[^|]*\| estimated \|", page)]
    # Those of the 1.5B model are measured.
    planned = [figures.estimate(*s).gpu_gb for s in figures.PLANS.values() if s[0] != "+recipe=step_1b5"]
    assert written == pytest.approx(planned, rel=0.03)


@pytest.mark.parametrize(
    "asked,page",
    [
        ("resume", "docs/resume.md"),
        ("models", "docs/supported.md"),
        ("128K", "docs/memory_128k.md"),
        ("8×", "docs/evaluation.md#evaluate-at-8"),
        ("selection rule", "docs/extending.md#a-selection-rule"),
    ],
)
def test_a_stranger_finds_it_with_one_search_and_one_link(asked, page):
    """In the README, and in the table of questions on the first page; MkDocs checks that the links lead somewhere."""
    for name, link in (("README.md", page), ("docs/index.md", page.removeprefix("docs/"))):
        lines = [line for line in (ROOT / name).read_text().splitlines() if f"({link})" in line]
        assert any(asked in line.lower() or asked in line for line in lines), name


def test_the_sentences_of_troubleshooting_are_in_the_code():
    written = [sentence for sentences in errors.all_sentences().values() for sentence in sentences]
    assert len(written) > 300
    page = (ROOT / "docs" / "troubleshooting.md").read_text().split("## The run ends")[0]
    fragments = re.findall(r"^\| `([^`]+)` \|", page, re.MULTILINE)
    assert len(fragments) > 6
    assert [f for f in fragments if not any(f in sentence for sentence in written)] == []


# What runs the commands of shell blocks, with a smaller model, fewer steps or other names of files.
RUN = {
    "make (setup|test)": ".ci/run: make test",
    "make smoke": "tests/dist/test_launch.py: def smoke",
    "deepspeed launch/train.py model=hub model.name=.* data=files": "tests/dist/test_readme.py: data.path=my/*.jsonl",
    "deepspeed (--num_gpus [128] )?launch/train.py \\+recipe=qa_(128k|128k_1gpu|smollm2|passages)( |$)": (
        "tests/dist/test_long_recipes.py: def test_recipes_as_the_pages_start_them"
    ),
    "deepspeed launch/train.py .*data=mixture": "tests/dist/test_contexts.py: data=mixture",
    "deepspeed --num_gpus 1 launch/train.py .*plugins=": "tests/dist/test_extensions.py: plugins=",
    "deepspeed --num_gpus 2 launch/selftest.py": 'tests/dist/test_launch.py: script="selftest"',
    "python launch/evaluate.py model.name=DIR tasks=\\[(ruler|longbench)": "tests/dist/test_readme.py: tasks=[{task}]",
    "python launch/harness.py": "tests/cpu/test_harness.py: def test_the_command_runs_a_task",
    "(python|deepspeed) launch/evaluate.py model.name=": "tests/dist/test_readme.py: tasks=[passkey,needle,signature]",
    "python launch/chat.py": "tests/dist/test_readme.py: chat.py",
    "python launch/sweep.py --multirun \\+recipe=smoke": "tests/dist/test_sweep.py: --multirun",
    "python launch/sweep.py .*\\+sweep=retention_lag": "tests/dist/test_sweep.py: +sweep=retention_lag",
    "python launch/compare.py": "tests/cpu/test_comparison.py: compare.py",
    "python launch/plan.py": "tests/dist/test_readme.py: plan.action",
    r"pip install \.": 'tests/cpu/test_package.py: "install"',
    r"python -m lrsa_ds train \+recipe=smoke": 'tests/cpu/test_package.py: "-m", "lrsa_ds", "train", "+recipe=smoke"',
    "pip install 'lrsa-ds\\[lm-eval\\]'": "pyproject.toml: lm-eval,",
}
BY_HAND = re.compile(r"# .*\b(GPU|two CPU cores), run 20\d\d-\d\d-\d\d")


def test_every_command_of_a_shell_block_is_run_by_a_test_or_was_run_by_hand():
    """tests/dist/test_readme.py composes and types all of them, also those in the text."""
    unused = set(RUN)
    for page in [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]:
        for block in re.findall(r"```bash\n(.*?)```", page.read_text(), re.DOTALL):
            for command in re.findall(r"(?:'[^']*'|\"[^\"]*\"|[^\n])+", block.replace("\\\n", " ")):
                found = next((pattern for pattern in RUN if re.match(pattern, command)), None)
                assert BY_HAND.search(command) or found, f"{page.name}: {command}"
                if not BY_HAND.search(command):
                    unused.discard(found)
    assert not unused, "no page has such a command any more"
    for by in RUN.values():
        file, part = by.split(": ", 1)
        assert part in (ROOT / file).read_text(), by
