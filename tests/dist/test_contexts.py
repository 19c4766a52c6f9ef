"""Contexts out of the user's questions, as users ask for them: trained on, scored, resumed, and refused."""

import json
import shutil

import pytest

from lrsa_ds.intervals import share_interval
from lrsa_ds.logs.report import evaluation_table
from tests.dist.launcher import rows_of, train_alone
from tests.dist.test_launch import refused
from tests.helpers import free_port

pytestmark = pytest.mark.dist

NUM_STEPS = 4


def squad(path, num_articles=8):
    """A file as SQuAD is published: two passages an article, two questions a passage."""
    articles = []
    for article in range(num_articles):
        paragraphs = []
        for passage in range(2):
            name = f"{article}x{passage}"
            facts = {f"n{name}q{i}": f"c{name}a{i}" for i in range(2)}
            context = " ".join(f"The colour of {thing} is {colour}." for thing, colour in facts.items())
            asked = [
                {"question": f"What is the colour of {thing}?", "answers": [{"text": colour, "answer_start": 0}]}
                for thing, colour in facts.items()
            ]
            paragraphs.append({"context": context, "qas": asked})
        articles.append({"title": f"Article {article}", "paragraphs": paragraphs})
    path.write_text(json.dumps({"version": "1.1", "data": articles}))
    return str(path)


def settings(path, output, *more):
    contexts = ["data.make_contexts=true", "data.questions_per_context=3", "eval.num_examples=4", "eval.before=false"]
    length = ["optim.warmup_steps=1", f"optim.num_steps={NUM_STEPS}", "checkpoint.every=2", "checkpoint.keep=9"]
    where = ["+recipe=smoke", "data=files", f"data.path={path}", f"output_dir={output}", "log.wandb=disabled"]
    return [*where, *contexts, *length, *more]


def test_a_run_over_contexts_and_its_resume(tmp_path):
    path, output = squad(tmp_path / "squad.json"), tmp_path / "run"
    done = train_alone(*settings(path, output))
    assert done.returncode == 0, done.stderr
    steps = rows_of(output, "train")
    # An example fills the length that the recipe gives it, and has several answers.
    assert all(row["num_tokens"] > 900 for row in steps)
    scores = rows_of(output, "eval")
    assert {row["retention"] for row in scores} == {1.0, 0.5, 0.25, 0.125}
    assert {(row["num_examples"], row["num_answers"]) for row in scores} == {(2, 4)}
    for row in scores:  # three answers about one context and one about the other: 16/10 independent ones
        ends = row["exact_match_low"], row["exact_match_high"]
        assert ends == pytest.approx(share_interval(row["exact_match"], 4**2 / (3**2 + 1)))
        assert row["token_accuracy_low"] <= row["token_accuracy"] <= row["token_accuracy_high"]
    (data,) = rows_of(output, "data")
    assert data["num_bad_rows"] == data["num_cut_tokens"] == 0
    # As after a kill between the checkpoints.
    broken = tmp_path / "broken"
    shutil.copytree(output, broken)
    (broken / "COMPLETED").unlink()
    shutil.rmtree(broken / "checkpoints" / f"step_{NUM_STEPS:06d}")
    done = train_alone(*settings(path, broken))
    assert done.returncode == 0, done.stderr
    names = ("step", "loss", "grad_norm", "num_tokens", "num_target_tokens")
    resumed = rows_of(broken, "train")
    assert [[row[name] for name in names] for row in resumed] == [[row[name] for name in names] for row in steps]


def test_a_mixture_of_questions_recall_and_keys(tmp_path):
    output = tmp_path / "run"
    made = "{source: recall, num_examples: 8, weight: 1}, {source: stdlib_qa, tasks: [lookup], weight: 1}"
    sources = f"data.sources=[{{path: {squad(tmp_path / 'squad.json', 16)}, make_contexts: true, weight: 2}}, {made}]"
    more = ["data=mixture", sources, "data.questions_per_context=2", "data.context_length=1000"]
    short = ["optim.num_steps=2", "optim.warmup_steps=1", "eval.before=false"]
    done = train_alone("+recipe=smoke", *more, *short, f"output_dir={output}", "log.wandb=disabled")
    assert done.returncode == 0, done.stderr
    tasks = {row["task"] for row in rows_of(output, "eval")}
    assert tasks == {"qa", "continue", "fill", "heading", "order", "lookup"}
    table = evaluation_table(rows_of(output, "eval"))
    assert all(task in table for task in tasks)


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["data.recall_tasks=[continue,sum]"], "data.recall_tasks"),
        (["data.questions_per_context=50"], "data.questions_per_context=50 is more than fits"),
        (["data.path=PATH"], "line 1: it has no text, which contexts are made of"),
        (["data.path=PATH", "data.name=a/b"], "data=recall takes its texts from data.path or data.name"),
    ],
)
def test_recall_that_cannot_be_made(capfd, monkeypatch, tmp_path, more, said):
    monkeypatch.setenv("MASTER_PORT", str(free_port()))
    path = tmp_path / "rows.jsonl"
    path.write_text('{"prompt": "a", "completion": "b"}\n')
    more = [argument.replace("PATH", str(path)) for argument in more]
    where = [f"output_dir={tmp_path / 'run'}", "log.wandb=disabled"]
    assert said in refused(capfd, monkeypatch, "+recipe=smoke", "data=recall", *where, *more)


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (
            ["data.context_length=1024", "eval.num_examples=20"],
            "too few for a context of data.context_length=1024",
        ),
        (["data.questions_per_context=20"], "data.questions_per_context=20 is more than fits"),
        (["data.streaming=true"], "data.streaming=true reads rows in order"),
        (["data.make_contexts=false"], "data.questions_per_context=3 is read where contexts are made"),
        (["data.chat_template=false"], "data.questions_per_context=3 makes conversations, which need a chat template"),
    ],
)
def test_contexts_that_cannot_be_made(capfd, monkeypatch, tmp_path, more, said):
    monkeypatch.setenv("MASTER_PORT", str(free_port()))
    assert said in refused(capfd, monkeypatch, *settings(squad(tmp_path / "squad.json"), tmp_path / "run", *more))
