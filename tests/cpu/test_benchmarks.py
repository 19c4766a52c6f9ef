"""Benchmarks of others: their folders, prompts and limits, and scores that are those of the authors' own code."""

import json

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
from recipes.samples import Samples
from tests.cpu.test_evaluate import make_evaluator

TOKENIZER = byte_tokenizer()
MODEL = ModelConfig(random={"model_type": "llama"}, tokenizer="bytes")


def make_samples(tokenizer=TOKENIZER, **settings):
    samples = Samples(EvaluateConfig(model=MODEL, **settings), tokenizer)
    samples.check()
    return samples


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


def test_rows_of_earlier_versions_of_ruler_hold_the_prefix_in_their_input(tmp_path):
    old = {"index": 0, "input": "List: 1. a 2. b\nQuestion: Which? Answer: The words are:", "outputs": ["a"]}
    path = write_rows(tmp_path / "cwe.jsonl", old)
    sample = make_samples(tasks=["ruler"], ruler=path).sample("ruler/cwe", 4096, 0)
    assert prompt_of(sample).endswith("Which?<|im_end|>\n<|im_start|>assistant\n Answer: The words are:")
    assert sample.max_new_tokens == 120


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
