"""The evaluation under compressed caches: its samples, its rows, what it writes, and what it continues."""

import json
import re
from dataclasses import replace

import pytest
import torch
from matplotlib.image import imread

from lrsa_ds import LRSAConfig, apply_lrsa
from lrsa_ds.data.tokenizer import byte_tokenizer
from lrsa_ds.errors import LRSAError
from lrsa_ds.evaluate.config import CacheConfig, EvaluateConfig
from lrsa_ds.evaluate.evaluator import DENSE, Evaluator, Mode, Sample, modes
from lrsa_ds.evaluate.page import predictions_page
from lrsa_ds.evaluate.report import METRICS as LEGEND
from lrsa_ds.evaluate.report import _needles, draw_results, results_table
from lrsa_ds.evaluate.results import collect, part_of, read_results, summary, wilson
from lrsa_ds.settings.data import DataConfig
from lrsa_ds.settings.model import ModelConfig
from recipes import benchmarks
from recipes.longeval import GENERATED, GeneratedSamples
from recipes.samples import Samples
from recipes.scoring import METRICS, score
from tests.cpu.test_model import tiny

TOKENIZER = byte_tokenizer()
MODEL = ModelConfig(random={"model_type": "llama"}, tokenizer="bytes")
ALL_TASKS = [*GENERATED, "signature", "perplexity"]


@pytest.fixture(scope="module")
def generated():
    return GeneratedSamples(TOKENIZER, seed=0, num_depths=5)


def text_of(sample):
    return TOKENIZER.decode(sample.prompt_ids)


@pytest.mark.parametrize("task", ALL_TASKS)
@pytest.mark.parametrize("length", [1500, 4096])
def test_samples_fit_their_length_and_nearly_fill_it(generated, task, length):
    for index in range(3):
        sample = generated.sample(task, length, index)
        taken = len(sample.prompt_ids) + sample.max_new_tokens
        assert taken <= length
        # A paragraph that does not fit is left out, and common words come in whole rounds.
        assert taken > length * (0.6 if task == "common_words" else 0.8) - 700
        assert sample == generated.sample(task, length, index)
        if task != "perplexity":
            assert text_of(sample).rstrip().endswith("assistant")
    assert generated.sample(task, length, 0).prompt_ids != generated.sample(task, length, 1).prompt_ids


@pytest.mark.parametrize("task", ["passkey", "needle", "needle_multikey"])
def test_the_fact_stands_at_its_depth(generated, task):
    for index in range(5):
        sample = generated.sample(task, 6000, index)
        (answer,) = sample.answers
        text = text_of(sample)
        assert sample.depth == index / 4
        assert text.count(answer) == (2 if task == "passkey" else 1)
        assert abs(text.index(answer) / len(text) - sample.depth) < 0.2


def test_the_key_of_a_needle_is_asked_for(generated):
    for index in range(4):
        text = text_of(generated.sample("needle_multikey", 3000, index))
        facts = dict(re.findall(r"The special number for (\w+) is (\d+)\.", text))
        asked = re.search(r"What is the special number for (\w+)\?", text).group(1)
        assert len(facts) == 4
        assert generated.sample("needle_multikey", 3000, index).answers == (facts[asked],)


def test_variables_are_tracked_in_the_order_of_the_text(generated):
    for index in range(4):
        sample = generated.sample("variable_tracking", 3000, index)
        text = text_of(sample)
        value = re.search(r"give the value (\d+)", text).group(1)
        has_value = set()
        for name, source in re.findall(r"Assignment: (\w+) = (\w+)\.", text):
            assert source == value or source in has_value
            has_value.add(name)
        assert has_value == set(sample.answers) and len(has_value) == 5


def test_common_words_are_the_most_common(generated):
    sample = generated.sample("common_words", 8000, 0)
    counts = {}
    for word in re.findall(r"\d+\. (\w+)", text_of(sample)):
        counts[word] = counts.get(word, 0) + 1
    common = sorted(counts, key=counts.get)[-10:]
    assert set(common) == set(sample.answers)
    assert min(counts[w] for w in common) > 2 * max(n for w, n in counts.items() if w not in common)


@pytest.mark.parametrize("task", ["passkey", "needle_multikey", "common_words"])
def test_too_short_a_length_is_said(generated, task):
    with pytest.raises(LRSAError, match=r"lengths=80 is too short for .*: give at least \d+"):
        generated.sample(task, 80, 0)


def make_evaluator(retention=0.25, **settings):
    attention = LRSAConfig(sink_size=4, lag_size=16, retention=retention)
    torch.manual_seed(3)
    model = apply_lrsa(tiny("llama", vocab_size=TOKENIZER.vocab_size + 10, **settings), attention)
    return Evaluator(model, TOKENIZER, attention, score)


def make_sample(num_tokens=150, metrics=("recall",), **settings):
    ids = tuple(torch.randint(3, 250, (num_tokens,)).tolist())
    defaults = dict(task="t", index=0, length=200, answers=("a",), max_new_tokens=20)
    return Sample(prompt_ids=ids, metrics=metrics, **{**defaults, **settings})


WANTED = modes(["dense", "chunked", "after"], [0.5, 0.25])


def test_modes():
    assert [DENSE, Mode("chunked", 0.5), Mode("chunked", 0.25), Mode("after", 0.5), Mode("after", 0.25)] == WANTED
    assert modes(["chunked"], [0.5]) == [Mode("chunked", 0.5)]


@torch.no_grad()
def test_answers_are_those_of_the_training_pass():
    """Chunked and dense answers are the arg-max, token by token, of one pass with LRSA attention."""
    evaluator, sample = make_evaluator(), make_sample()
    rows = evaluator.rows(sample, WANTED)
    assert [Mode(row["prefill"], row["retention"]) for row in rows] == WANTED
    for row in rows[:3]:
        config = replace(evaluator.attention, retention=row["retention"])
        ids = list(sample.prompt_ids)
        for _ in range(sample.max_new_tokens):
            logits = evaluator.model(torch.tensor([ids]), use_cache=False, lrsa_config=config).logits
            ids.append(int(logits[0, -1].argmax()))
            if ids[-1] in evaluator.ends:
                break
        assert row["prediction"] == TOKENIZER.decode(ids[150:], skip_special_tokens=True)
    assert "first_token" not in rows[0]["scores"]
    assert all(row["scores"]["first_token"] in (0.0, 100.0) for row in rows[1:])


def test_rows_do_not_depend_on_which_others_are_wanted():
    evaluator, sample = make_evaluator(), make_sample()
    together = evaluator.rows(sample, WANTED)
    behind_storage = Evaluator(evaluator.model, TOKENIZER, evaluator.attention, score, uses_storage=True)
    for one in (make_sample(140), sample):  # the second uses the storage of the first
        found = behind_storage.rows(one, WANTED)
    assert [row["prediction"] for row in found] == [row["prediction"] for row in together]
    assert [row["cache_bytes"] for row in found] == [row["cache_bytes"] for row in together]
    assert len(behind_storage._storages) == 3  # one for each retention
    for mode, row in zip(WANTED, together, strict=True):
        (alone,) = evaluator.rows(sample, [mode])
        assert alone["prediction"] == row["prediction"]


@torch.no_grad()
def test_perplexity_is_that_of_the_training_pass():
    evaluator, sample = make_evaluator(), make_sample(metrics=("nll",), task="perplexity")
    rows = evaluator.rows(sample, WANTED)
    assert [row["prefill"] for row in rows] == ["dense", "chunked", "chunked"]
    for row in rows:
        config = replace(evaluator.attention, retention=row["retention"])
        ids = torch.tensor([sample.prompt_ids])
        logits = evaluator.model(ids, use_cache=False, lrsa_config=config).logits[0, :-1]
        nll = torch.nn.functional.cross_entropy(logits, ids[0, 1:], reduction="none")
        assert row["scores"]["nll"] == pytest.approx(nll.mean().item(), rel=1e-5)
        assert row["nll_by_position"][-1] == pytest.approx(nll.tensor_split(16)[-1].mean().item(), rel=1e-4)


def result(index, prefill="chunked", retention=0.25, task="needle", score=100.0, **more):
    identity = dict(task=task, length=1024, index=index, prefill=prefill, retention=retention, layers="", depth=0.5)
    held = 1000 if prefill == "dense" else 1000 * retention + 100
    return identity | {"num_tokens": 1000, "num_held": held, "scores": {"recall": score}} | more


def test_parts_are_merged_and_a_torn_last_line_is_dropped(tmp_path):
    (tmp_path / "results.jsonl").write_text(json.dumps(result(0)) + "\n")
    part_of(tmp_path, 0).write_text(json.dumps(result(2)) + "\n" + json.dumps(result(0)) + "\n")
    part_of(tmp_path, 1).write_text(json.dumps(result(1)) + '\n{"task": "nee')
    rows = collect(tmp_path)
    assert [row["index"] for row in rows] == [0, 1, 2]
    assert read_results(tmp_path) == rows
    assert [p.name for p in tmp_path.iterdir()] == ["results.jsonl"]
    part_of(tmp_path, 1).write_text('{"task": "nee\n' + json.dumps(result(1)) + "\n")
    with pytest.raises(LRSAError, match=r"results.rank1.jsonl, line 1 is broken"):
        collect(tmp_path)


def test_intervals():
    assert wilson([100.0] * 10) == (100.0, pytest.approx(72.2, abs=0.1), 100.0)
    assert wilson([100.0, 0.0] * 10) == (50.0, pytest.approx(29.9, abs=0.1), pytest.approx(70.1, abs=0.1))


def test_table_and_pictures(tmp_path):
    tasks = ["needle", "a_task_with_a_very_long_name", "signature"]
    cells = [(task, *mode) for task in tasks for mode in [("dense", 1.0), ("chunked", 0.25), ("chunked", 0.125)]]
    cells += [(task, "after", r) for task in tasks for r in (0.25, 0.125)]
    samples = [result(i, p, r, task, score=25.0 * i) for task, p, r in cells for i in range(5)]
    samples += [
        dict(
            task="perplexity",
            length=1024,
            index=i,
            prefill=p,
            retention=r,
            num_tokens=1024,
            layers="",
            num_held=1024 * r,
            scores={"nll": 2.5},
            nll_by_position=[3, 2],
        )
        for i in range(2)
        for p, r in (("dense", 1.0), ("chunked", 0.25))
    ]
    rows = summary(samples)
    table = results_table(rows)
    assert max(map(len, table.splitlines())) <= 100
    lines = table.splitlines()
    assert "50.0 (17–83)" in table and "2.500" in table
    place = lines.index("a_task_with_a_very_long_name")  # not cut: its scores stand below it
    assert lines[place + 1].split()[:2] == ["recall", "(5)"]
    assert lines[0].split("  ")[0] == "1,024 tokens"
    assert [cell.strip() for cell in lines[0][28:].split("  ") if cell] == [
        "dense",
        "chunked 1/4",
        "chunked 1/8",
        "after 1/4",
    ]
    assert lines[1].split() == ["smaller", "2.86–4.00x", "4.44x", "2.86x"]
    for word in ("dense: holds", "chunked: ", "after: prefilled densely", "smaller: tokens seen", "recall: ", "nll: "):
        assert any(line.startswith(word) for line in lines), word
    assert "first_token:" not in table and "1.00x" not in table  # nothing of the kind is in it
    assert all(row["num_samples"] == 5 for row in rows if row["task"] != "perplexity")
    pictures = draw_results(rows, samples, tmp_path, "title")
    assert set(pictures) == {"scores_1024", "needles", "perplexity"}
    assert all(imread(path).shape[0] > 300 for path in pictures.values())
    alike = [sample | {"depth": 0.5} for sample in samples if sample["task"] == "needle"]
    cells = {text.get_text() for panel in _needles(alike, "title").axes for text in panel.texts}
    assert cells == {"50", "17–83"}  # the mean and its interval, as in the table


def test_every_metric_has_a_legend():
    assert {*METRICS, *benchmarks.METRICS, "first_token", "nll"} == set(LEGEND)


def test_prompts_that_are_too_short_say_so_and_agree_with_nothing():
    """S + 2L = 36: a prompt of 35 tokens and one of 36 before its last token."""
    evaluator = make_evaluator()
    short, long = (evaluator.rows(make_sample(num_tokens=n), WANTED) for n in (36, 37))
    assert all(row["num_held"] == row["num_tokens"] == 35 and "first_token" not in row["scores"] for row in short)
    assert [row["num_held"] for row in long] == [36, 28, 24, 28, 24]
    assert [("first_token" in row["scores"]) for row in long] == [False, True, True, True, True]
    table = results_table(summary(short))
    assert table.splitlines()[1].split() == ["smaller", "1.00x", "1.00x", "1.00x"]
    assert "1.00x: too short for this cache to drop anything; such samples have no first_token" in table
    assert "100.0" not in table


def test_the_old_name_of_a_cache_is_read(tmp_path):
    assert CacheConfig(prefill=["dense", "full", "after"]).prefill == ["dense", "after"]
    (tmp_path / "results.jsonl").write_text(json.dumps(result(0, prefill="full")) + "\n")
    assert [row["prefill"] for row in read_results(tmp_path)] == ["after"]


def test_results_without_the_size_of_the_cache_have_no_factor():
    """Rows of an earlier version."""
    rows = [{k: v for k, v in result(i).items() if k != "num_held"} for i in range(2)]
    assert results_table(summary(rows)).splitlines()[1].split() == ["smaller", "-"]


def make_config(**settings):
    return EvaluateConfig(model=MODEL, **settings)


def test_file_tasks(tmp_path):
    squad = [{"context": f"c{i}" * 9, "question": "q?", "answers": {"text": ["x", "y"]}} for i in range(6)]
    (tmp_path / "squad.jsonl").write_text("".join(json.dumps(row) + "\n" for row in squad))
    config = make_config(
        tasks=["qa"],
        lengths=[600],
        num_samples=3,
        data=DataConfig(source="files", path=str(tmp_path / "squad.jsonl")),
    )
    samples = Samples(config, TOKENIZER)
    samples.check()
    items = samples.items()
    assert [item[0] for item in items] == ["qa", "qa", "qa"]
    assert samples.sample("qa", 600, 0).answers == ("x", "y")


@pytest.mark.parametrize(
    "settings,said",
    [
        (dict(tasks=["riddle"]), "tasks='riddle' .*passkey, needle"),
        (dict(tasks=[]), r"tasks=\[\]"),
        (dict(lengths=[0]), "lengths=0"),
        (dict(num_samples=0), "num_samples=0"),
        (dict(tasks=["longbench"]), "the task longbench needs longbench=PATH"),
        (dict(ruler="x"), "the task ruler needs ruler=PATH"),
        (dict(tasks=["qa"]), "the task qa needs data=files or data=hub"),
    ],
)
def test_mistakes(settings, said):
    with pytest.raises(LRSAError, match=said):
        make_config(**settings)


@pytest.mark.parametrize(
    "settings,said",
    [
        (dict(retentions=[-1.0]), "cache.retentions=-1.0 .*from 0 .* to 1"),
        (dict(retentions=[2]), "cache.retentions=2 "),
        (dict(retentions=[]), r"cache.retentions=\[\]"),
        (dict(prefill=["sparse"]), "cache.prefill='sparse' .*dense, chunked, after"),
        (dict(prefill=[]), r"cache.prefill=\[\]"),
        (dict(lag_size=0), "cache.lag_size=0"),
    ],
)
def test_mistakes_about_the_cache(settings, said):
    with pytest.raises(LRSAError, match=said):
        CacheConfig(**settings)


def test_the_cache_is_that_of_the_training_unless_told_otherwise():
    trained = {"sink_size": 4, "lag_size": 64, "retention": 0.5, "backend": "auto"}
    assert CacheConfig().attention(trained, 0.25) == LRSAConfig(sink_size=4, lag_size=64, retention=0.25)
    assert CacheConfig(lag_size=32).attention(trained, 0.25).lag_size == 32
    assert CacheConfig().attention(None, 0.25) == LRSAConfig(sink_size=16, lag_size=1024, retention=0.25)


def test_memory_and_speed_stand_above_the_scores():
    rows = [result(i) | {"cache_bytes": 2_000_000 * (i + 1), "num_said": 6, "seconds": 2.0} for i in range(2)]
    (found,) = summary(rows)
    assert found["cache_bytes"] == 3_000_000 and found["tokens_per_s"] == 3.0
    lines = results_table([found]).splitlines()
    assert any(line.split() == ["cache", "MB", "3.0"] for line in lines)
    assert any(line.split() == ["tokens/s", "3.0"] for line in lines)
    (old,) = summary([result(0)])  # written before they were measured
    assert old["cache_bytes"] is None and "tokens/s" not in results_table([old])


def test_predictions_are_a_page_of_their_own():
    said = result(0) | {"prediction": "<b>no & yes", "answers": ["a", "b"], "cache_bytes": 1_500_000}
    page = predictions_page([said, result(1)], "a <run>")
    assert "&lt;b&gt;no &amp; yes" in page and "<b>" not in page and "a &lt;run&gt;" in page
    assert page.count("<tr>") == 2 and "1.5" in page and "http" not in page
