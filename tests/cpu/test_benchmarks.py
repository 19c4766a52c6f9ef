"""Benchmarks of others: their folders, prompts and limits, and scores that are those of the authors' own code."""

import json
from dataclasses import replace
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from lrsa_ds.data.tokenizer import byte_tokenizer
from lrsa_ds.errors import LRSAError
from lrsa_ds.evaluate.config import EvaluateConfig
from lrsa_ds.evaluate.evaluator import Mode
from lrsa_ds.evaluate.report import results_table
from lrsa_ds.evaluate.results import summary
from lrsa_ds.settings.data import DataConfig
from lrsa_ds.settings.model import ModelConfig
from recipes.benchmarks import METRICS
from recipes.benchmarks.longbench import TASKS
from recipes.samples import Samples
from tests.cpu.test_evaluate import make_evaluator

TOKENIZER = byte_tokenizer()
MODEL = ModelConfig(random={"model_type": "llama"}, tokenizer="bytes")


def make_samples(tokenizer=TOKENIZER, **settings):
    samples = Samples(EvaluateConfig(model=MODEL, **settings), tokenizer)
    samples.check()
    return samples


# Prompts and limits in the form of the authors' two files.
ASKED = {task: f"About {task}. {{context}}\nQuestion: {{input}}\nAnswer:" for task in TASKS}
LIMITS = {task: 20 + number for number, task in enumerate(TASKS)} | {"lcc": 64, "qasper": 128}


def make_longbench(path, length=4096, tokenizer=TOKENIZER, **settings):
    """Samples of the data at `path`, with `config` beside them."""
    folder = Path(path) if Path(path).is_dir() else Path(path).parent
    for name, content in (("dataset2prompt.json", ASKED), ("dataset2maxlen.json", LIMITS)):
        write_rows(folder / "config" / name, content)
    return make_samples(tokenizer, tasks=["longbench"], longbench=str(path), lengths=[length], **settings)


def prompt_of(sample):
    return TOKENIZER.decode(sample.prompt_ids)


def write_rows(path, *rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


NEEDLE = {
    "index": 7,
    "input": "A special magic number is hidden within the following text.\n" + "One grey day. " * 40
    + "\nWhat is the special magic number for apple mentioned in the provided text?",
    "outputs": ["1234567"],
    "length": 700,
    "length_w_model_temp": 700,
    "answer_prefix": " The special magic number for apple mentioned in the provided text is",
    "token_position_answer": 20,
}  # fmt: skip
QUESTION = {"index": 0, "input": "Read this. " * 20, "outputs": ["Paris", "Lutetia"], "answer_prefix": " Answer:"}


@pytest.fixture
def ruler(tmp_path):
    """As RULER's scripts leave it: a folder for each length, each task below "data", what models said in "pred"."""
    for length in (1024, 2048):
        for task in ("niah_single_1", "niah_multikey_2"):
            write_rows(tmp_path / f"{length}/data/{task}/validation.jsonl", NEEDLE | {"index": length})
        write_rows(tmp_path / f"{length}/pred/niah_single_1.jsonl", NEEDLE | {"pred": "2"})
    write_rows(tmp_path / "2048/data/qa_2/validation.jsonl", QUESTION, QUESTION)
    return tmp_path


def test_ruler_asks_what_its_authors_ask(ruler):
    """`call_api.py` joins `input` and `answer_prefix`; `prepare.py` puts the prefix behind the template of a model."""
    samples = make_samples(tasks=["ruler"], ruler=str(ruler), lengths=[1024, 2048])
    needles = [(f"ruler/{task}", n, 0) for n in (1024, 2048) for task in ("niah_multikey_2", "niah_single_1")]
    assert samples.items() == [*needles, ("ruler/qa_2", 2048, 0), ("ruler/qa_2", 2048, 1)]
    needle = samples.sample("ruler/niah_single_1", 1024, 0)
    turn = "<|im_start|>user\n" + NEEDLE["input"] + "<|im_end|>\n<|im_start|>assistant\n"
    assert prompt_of(needle) == turn + NEEDLE["answer_prefix"]
    assert (needle.answers, needle.metrics, needle.max_new_tokens) == (("1234567",), ("string_match_all",), 128)
    assert TOKENIZER.decode(needle.answer_ids) == " 1234567"
    question = samples.sample("ruler/qa_2", 2048, 0)
    assert (question.metrics, question.max_new_tokens) == (("string_match_part",), 32)
    plain = make_samples(tasks=["ruler"], ruler=str(ruler), lengths=[1024], data=DataConfig(chat_template=False))
    assert prompt_of(plain.sample("ruler/niah_single_1", 1024, 0)) == NEEDLE["input"] + NEEDLE["answer_prefix"]


@pytest.mark.parametrize("place", [".", "validation.jsonl", "../vt", "../*/validation.jsonl"])
def test_a_ruler_task_is_named_by_its_folder(tmp_path, monkeypatch, place):
    write_rows(tmp_path / "vt/validation.jsonl", {"input": "q", "outputs": ["a"]})
    monkeypatch.chdir(tmp_path / "vt")
    samples = make_samples(tasks=["ruler"], ruler=place)
    assert samples.items() == [("ruler/vt", 4096, 0)]
    assert samples.sample("ruler/vt", 4096, 0).max_new_tokens == 30


@pytest.mark.parametrize(
    "folder,length",
    [("600/data/vt", 600), ("600/vt", 600), ("600", 600), ("600/mine/vt", 4096), ("20261126/ruler/data/vt", 4096)],
)
def test_a_number_is_a_length_where_ruler_writes_one(tmp_path, folder, length):
    name = "validation.jsonl" if folder.endswith("vt") else "vt.jsonl"
    write_rows(tmp_path / folder / name, {"input": "q", "outputs": ["a"]})
    samples = make_samples(tasks=["ruler"], ruler=str(tmp_path), lengths=[length])
    assert samples.items() == [("ruler/vt", length, 0)]


def test_rows_of_earlier_versions_of_ruler_hold_the_prefix_in_their_input(tmp_path):
    old = {"index": 0, "input": "List: 1. a 2. b\nQuestion: Which? Answer: The words are:", "outputs": ["a"]}
    path = write_rows(tmp_path / "cwe.jsonl", old)
    sample = make_samples(tasks=["ruler"], ruler=path).sample("ruler/cwe", 4096, 0)
    assert prompt_of(sample).endswith("Which?<|im_end|>\n<|im_start|>assistant\n Answer: The words are:")
    assert sample.max_new_tokens == 120


KVPRESS = {
    "context": "A special magic number is hidden within the following text.\nOne grey day. ",
    "question": "What is the special magic number for apple mentioned in the provided text? ",
    "answer_prefix": "The special magic number for apple mentioned in the provided text is",
    "answer": ["1234567"],
    "task": "niah_multikey_3",
    "max_new_tokens": 120,
}


def test_ruler_as_kvpress_publishes_it(tmp_path):
    """A Parquet file for each length, whose rows name their tasks."""
    rows = [KVPRESS, KVPRESS | {"task": "qa_1", "max_new_tokens": 32, "answer": ["a", "b"]}]
    for length in (4096, 8192):
        (tmp_path / str(length)).mkdir()
        table = pyarrow.Table.from_pylist(rows)
        pyarrow.parquet.write_table(table, tmp_path / str(length) / "test-00000-of-00001.parquet")
    samples = make_samples(tasks=["ruler"], ruler=str(tmp_path), lengths=[4096])
    assert samples.items() == [("ruler/niah_multikey_3", 4096, 0), ("ruler/qa_1", 4096, 0)]
    needle, question = (samples.sample(*item) for item in samples.items())
    turn = f"<|im_start|>user\n{KVPRESS['context']}{KVPRESS['question']}<|im_end|>\n<|im_start|>assistant\n"
    assert prompt_of(needle) == turn + KVPRESS["answer_prefix"]
    assert (needle.max_new_tokens, needle.metrics) == (120, ("string_match_all",))
    assert (question.max_new_tokens, question.metrics) == (32, ("string_match_part",))


def test_reasoning_is_closed_before_an_answer_that_has_a_beginning(tmp_path):
    path = write_rows(tmp_path / "qa_1.jsonl", QUESTION)
    tokenizer = byte_tokenizer()
    for opened in ("<think>\n", "<think>\n\n</think>\n\n"):
        tokenizer.chat_template = TOKENIZER.chat_template.replace("assistant\n", f"assistant\n{opened}")
        sample = make_samples(tokenizer, tasks=["ruler"], ruler=path).sample("ruler/qa_1", 4096, 0)
        assert prompt_of(sample).endswith("</think>\n\n Answer:") and prompt_of(sample).count("</think>") == 1


# What string_match_all and string_match_part of scripts/eval/synthetic/constants.py (github.com/NVIDIA/RULER, commit
# c3f5e3b) give in percent for one prediction behind postprocess_pred of scripts/eval/evaluate.py, and for all of them.
RULER_SCORES = [
    (" 1234567, and 7654321.", ["1234567", "7654321", "1111111"], 66.67, 100.0),
    ("\x00ABCDE\tFGHIJ \n", ["abcde", "fghij"], 100.0, 100.0),
    ("", ["x"], 0.0, 0.0),
    ("The answer is\tParis", ["is\nparis", "Rome"], 50.0, 100.0),
    (" 12345", ["1234", "2345", "99", "5"], 75.0, 100.0),
]
RULER_MEANS = {"string_match_all": 58.33, "string_match_part": 80.0}


def test_ruler_scores_are_those_of_its_authors():
    for number, (name, mean) in enumerate(RULER_MEANS.items(), start=2):
        found = [100 * METRICS[name](row[0], row[1], ()) for row in RULER_SCORES]
        assert found == pytest.approx([row[number] for row in RULER_SCORES], abs=0.005)
        assert sum(found) / len(found) == pytest.approx(mean, abs=0.005)


def test_ruler_from_its_folder_to_the_table(ruler):
    path = str(ruler / "2048/data/qa_2")
    samples = make_samples(tasks=["ruler"], ruler=path, lengths=[2048], num_samples=1)
    evaluator = make_evaluator(max_position_embeddings=4096)
    modes = [Mode("dense", 1.0), Mode("chunked", 0.25)]
    rows = [row for item in samples.items() for row in evaluator.rows(samples.sample(*item), modes)]
    assert all(row["num_said"] <= 32 for row in rows)
    assert "ruler/qa_2\n  string_match_part (1)" in results_table(summary(rows))


@pytest.mark.parametrize(
    "file,row,said",
    [
        ("validation.jsonl", QUESTION, "RULER has no task '.*', whose name is that of the folder .*niah, vt, cwe"),
        ("riddle_1.jsonl", QUESTION, "line 1: RULER has no task 'riddle_1'"),
        ("vt.jsonl", {"outputs": ["a"]}, "line 1: input is missing"),
        ("vt.jsonl", {"input": "q"}, "line 1: outputs has to be a list of texts"),
        ("vt.jsonl", {"input": "q", "outputs": "a"}, "line 1: outputs has to be a list of texts"),
        ("vt.jsonl", {"input": "q", "outputs": ["a"], "answer_prefix": 3}, "line 1: answer_prefix is .*not text"),
        ("x.jsonl", KVPRESS | {"task": "riddle"}, "line 1: RULER has no task 'riddle'.* the column task"),
        ("x.jsonl", KVPRESS | {"task": None}, "line 1: task is missing"),
        ("x.jsonl", KVPRESS | {"question": None}, "line 1: question is missing"),
        ("x.jsonl", KVPRESS | {"max_new_tokens": "9"}, "line 1: max_new_tokens is missing or not a whole number"),
        ("x.jsonl", KVPRESS | {"answer": None}, "line 1: answer has to be a list of texts"),
        ("vt.jsonl", ["q"], "row 1: a row has to be an object"),
        ("4096/data/vt/validation.jsonl", QUESTION, r"lengths=\[600\] are none of those of ruler=.*lengths=\[4096\]"),
        ("pred/vt.jsonl", QUESTION, "holds no tasks, only files below pred"),
        (
            "vt.jsonl",
            QUESTION | {"input": "x" * 600},
            r"lengths=600 is too short for ruler/vt.*may not be cut: give \d",
        ),
        ("vt.jsonl", QUESTION | {"input": "<|im_start|>user\nQ"}, "begins with <.im_start.>.*data.chat_template=false"),
        ("vt.txt", QUESTION, "holds no such file"),
    ],
)
def test_what_is_wrong_with_a_copy_of_ruler(tmp_path, file, row, said):
    write_rows(tmp_path / "ruler" / file, row)
    with pytest.raises(LRSAError, match=said):
        make_samples(tasks=["ruler"], ruler=str(tmp_path / "ruler"), lengths=[600])


def longbench_row(task, **columns):
    row = {"input": "Who?", "context": "Long ago.", "answers": ["Ann", "Anne"], "length": 5000, "dataset": task}
    return row | {"language": "en", "all_classes": None, "_id": "1"} | columns


def test_longbench_asks_what_its_authors_ask(tmp_path):
    """With the prompts and limits of the folder `config`; in the chat template, except for examples and code."""
    for task in TASKS:
        answer = {"passage_retrieval_en": "Paragraph 3", "passage_retrieval_zh": "段落3"}.get(task, "Ann")
        row = longbench_row(task, answers=[answer], all_classes=["Ann", "Bob"])
        write_rows(tmp_path / f"data/{task}.jsonl", row)
    samples = make_longbench(tmp_path)
    assert {task for task, _, _ in samples.items()} == {f"longbench/{task}" for task in TASKS} and len(TASKS) == 21
    question = samples.sample("longbench/hotpotqa", 4096, 0)
    asked = "About hotpotqa. Long ago.\nQuestion: Who?\nAnswer:"
    assert prompt_of(question) == f"<|im_start|>user\n{asked}<|im_end|>\n<|im_start|>assistant\n"
    assert question.metrics == ("qa_f1",)
    code = samples.sample("longbench/lcc", 4096, 0)
    assert prompt_of(code) == "About lcc. Long ago.\nQuestion: Who?\nAnswer:"
    dialogue = samples.sample("longbench/samsum", 4096, 0)
    assert TOKENIZER.decode(dialogue.stop_ids) == "\n" and not question.stop_ids
    assert samples.sample("longbench/trec", 4096, 0).classes == ("Ann", "Bob")
    assert {task: samples.sample(f"longbench/{task}", 4096, 0).max_new_tokens for task in TASKS} == LIMITS


def test_the_middle_of_a_long_prompt_of_longbench_is_taken_out(tmp_path):
    """`pred.py` joins the first and the last half of the tokens as text; what is left of `lengths` are the halves."""
    context = "".join(f"<{number:04d}>" for number in range(400))
    write_rows(tmp_path / "lcc_e.jsonl", longbench_row("lcc", context=context, length=300))
    write_rows(tmp_path / "qasper.jsonl", longbench_row("qasper", context=context))
    samples = make_longbench(tmp_path, 1500)
    code = samples.sample("longbench/lcc_e/0-4k", 1500, 0)
    whole = ASKED["lcc"].format(context=context, input="Who?")
    assert prompt_of(code) == whole[:718] + whole[-718:]  # 1500 tokens of one byte, and 64 of them for the answer
    article = samples.sample("longbench/qasper", 1500, 0)
    turn = "<|im_start|>user\n", "<|im_end|>\n<|im_start|>assistant\n"
    whole = ASKED["qasper"].format(context=context, input="Who?")
    half = (1500 - 128 - len(TOKENIZER("".join(turn)).input_ids)) // 2
    assert prompt_of(article) == turn[0] + whole[:half] + whole[-half:] + turn[1]
    with pytest.raises(LRSAError, match=r"lengths=150 is too short for longbench/qasper, whose answer may take 128"):
        make_longbench(tmp_path / "qasper.jsonl", 150)


def test_longbench_e_is_told_apart_by_words(tmp_path):
    rows = [longbench_row("qasper", length=n) for n in (3999, 4000, 7999, 8000)]
    write_rows(tmp_path / "qasper_e.jsonl", *rows)
    write_rows(tmp_path / "qasper.jsonl", *rows)
    counts = make_longbench(tmp_path).counts
    assert counts == {
        ("longbench/qasper", 4096): 4,
        ("longbench/qasper_e/0-4k", 4096): 1,
        ("longbench/qasper_e/4-8k", 4096): 2,
        ("longbench/qasper_e/8k+", 4096): 1,
    }


LABELS = ["Abbreviation", "Expression abbreviated", "Description of something", "Human", "Date", "Other entity"]
LABELS += ["Description of a person", "Description"]
# What `scorer` of LongBench/eval.py (github.com/THUDM/LongBench, commit 2e00731) gives in percent for one prediction,
# with rouge 1.0.1, jieba 0.42.1 and fuzzywuzzy 0.18.0 as its requirements.txt installs them.
LONGBENCH_SCORES = [
    ("narrativeqa", " The Eiffel tower, in a city.", ["Eiffel Tower", "the tower"], None, 66.67),
    ("qasper", "", ["unanswerable"], None, 0.0),
    ("qasper", "A the", ["an"], None, 0.0),
    ("triviaqa", "\n\nParis\nPassage: more", ["paris", "Lutetia"], None, 100.0),
    ("hotpotqa", "The cat's toy", ["the cats' toys"], None, 50.0),
    ("2wikimqa", "nothing alike", ["Paris"], None, 0.0),
    ("multifieldqa_zh", "答案是：北京，天安门广场。", ["北京天安门"], None, 33.33),
    ("dureader", "北京是中国的首都。它很大。", ["中国的首都是北京。", "上海"], None, 57.14),
    ("vcsum", "", ["会议总结"], None, 0.0),
    (
        "gov_report",
        "The report covers spending. It rose in 2010. The agency agrees. ",
        ["The report says spending rose in 2010. The agency disagrees."],
        None,
        70.0,
    ),
    (
        "qmsum",
        "  They agreed on a red  remote.",
        ["They agreed that the remote is red.", "They agreed on red"],
        None,
        80.0,
    ),
    ("multi_news", "", ["Something happened."], None, 0.0),
    ("multi_news", "...", ["Something happened."], None, 0.0),
    ("samsum", "\nAnna will meet Tom at 5.\nDialogue: next", ["Anna meets Tom at 5 pm."], None, 66.67),
    ("trec", "Description of something", ["Description of something"], LABELS, 100.0),
    ("trec", "\nDescription of a person\nType: Human", ["Description of a person"], LABELS, 100.0),
    ("trec", "Description of something or Human", ["Description of something"], LABELS, 50.0),
    ("trec", "Date or Human", ["Human"], LABELS, 50.0),
    ("trec", "Expression abbreviated", ["Abbreviation"], LABELS, 0.0),
    ("lsht", "体育新闻", ["体育"], ["体育", "体育新闻", "新闻"], 33.33),
    ("passage_count", "There are 17, or 3 or 17", ["17"], None, 66.67),
    ("passage_count", "none", ["5"], None, 0.0),
    ("passage_retrieval_en", "Paragraph 4 or paragraph 40", ["Paragraph 4"], None, 50.0),
    ("passage_retrieval_zh", "段落12，段落3", ["段落3"], None, 50.0),
    ("lcc", "\n```python\n# a comment\n    return self.value + 1\n", ["    return self.values + 2"], None, 94.0),
    ("lcc", "", ["x = 1"], None, 0.0),
    ("lcc", "  \nx = 1", ["x = 1"], None, 57.0),
    ("repobench-p", "for (int i = 0; i < n; ++i) { sum += i; }", ["for (int j = 0; j < n; j++) {"], None, 74.0),
    ("repobench-p", "x" * 150 + "abc" + "yz" * 60, ["x" * 100 + "abd" + "zy" * 70], None, 40.0),
]


def test_longbench_scores_are_those_of_its_authors():
    found = [
        100 * METRICS[TASKS[task]](said, right, classes or ()) for task, said, right, classes, _ in LONGBENCH_SCORES
    ]
    assert found == pytest.approx([score for *_, score in LONGBENCH_SCORES], abs=0.005)


def test_an_answer_ends_at_the_stop_of_its_task(tmp_path):
    path = write_rows(tmp_path / "samsum.jsonl", longbench_row("samsum"))
    sample = replace(make_longbench(path).sample("longbench/samsum", 4096, 0), stop_ids=tuple(range(256)))
    (row,) = make_evaluator().rows(sample, [Mode("dense", 1.0)])
    assert row["num_said"] == 2  # the first token may not be one of them, and the second is


@pytest.mark.parametrize(
    "file,row,said",
    [
        ("riddles.jsonl", longbench_row("riddles"), "line 1: LongBench has no task 'riddles'.*it has narrativeqa"),
        ("qasper.jsonl", longbench_row("qasper", answers=[]), "line 1: answers has to be a list of texts"),
        ("qasper.jsonl", longbench_row("qasper", context=None), "line 1: context is missing"),
        ("trec.jsonl", longbench_row("trec"), "line 1: all_classes has to be a list"),
        ("qasper_e.jsonl", longbench_row("qasper", length=None), "line 1: length is missing"),
        ("qasper.md", longbench_row("qasper"), "holds no tasks, only files below config"),
    ],
)
def test_what_is_wrong_with_a_copy_of_longbench(tmp_path, file, row, said):
    write_rows(tmp_path / file, row)
    with pytest.raises(LRSAError, match=said):
        make_longbench(tmp_path)


def test_longbench_without_the_prompts_of_its_authors(tmp_path):
    path = write_rows(tmp_path / "a/b/c/data/qasper.jsonl", longbench_row("qasper"))
    settings = dict(tasks=["longbench"], longbench=path, lengths=[4096])
    with pytest.raises(LRSAError, match="its prompts are missing, config"):
        make_samples(**settings)
    for name, content in (("dataset2prompt.json", ASKED), ("dataset2maxlen.json", {"lcc": 64})):
        write_rows(tmp_path / "a/b/c/config" / name, content)
    with pytest.raises(LRSAError, match="c/config has no prompt or no limit for narrativeqa, qasper"):
        make_samples(**settings)
    for broken, said in (('{"lcc": ', "dataset2maxlen.json cannot be read"), ("[64]", "holds no object of tasks")):
        (tmp_path / "a/b/c/config/dataset2maxlen.json").write_text(broken)
        with pytest.raises(LRSAError, match=said):
            make_samples(**settings)


def test_a_metric_without_its_library_says_what_to_install(tmp_path, monkeypatch):
    write_rows(tmp_path / "vcsum.jsonl", longbench_row("vcsum"))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(LRSAError, match=r"longbench/vcsum is scored with jieba and rouge: pip install 'lrsa-ds.longb"):
        make_longbench(tmp_path)
