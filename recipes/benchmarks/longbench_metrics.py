"""LongBench's metrics: the scores of metrics.py and eval.py of github.com/THUDM/LongBench, commit 2e00731.

Oddities are intended: these are the authors' scores, even if a more careful metric would differ. ROUGE and Chinese
words come from the libraries that the authors use (the extra `longbench`); their fuzzywuzzy is, without further
packages, the ratio of `difflib` in whole percent.
"""

import importlib
import importlib.util
import logging
import re
import string
from collections import Counter
from collections.abc import Sequence
from difflib import SequenceMatcher
from typing import Any

from lrsa_ds.errors import LRSAError
from recipes.benchmarks.benchmark import Metric

LIBRARIES = {"qa_f1_zh": ("jieba",), "rouge_zh": ("jieba", "rouge")}
LIBRARIES |= dict.fromkeys(("rouge", "rouge_first_line"), ("rouge",))
_CHINESE_PUNCTUATION = (
    "！？｡。＂＃＄％＆＇（）＊＋，－／：；＜＝＞＠［＼］＾＿｀｛｜｝～｟｠｢｣､、〃》「」『』"
    "【】〔〕〖〗〘〙〚〛〜〝〞〟〰〾〿–—‘’‛“”„‟…‧﹏."
)


def require_libraries(metric: str, task: str) -> None:
    """Raises LRSAError if a library that a metric needs is not installed."""
    missing = [name for name in LIBRARIES.get(metric, ()) if importlib.util.find_spec(name) is None]
    if missing:
        raise LRSAError(
            f"{task} is scored with {' and '.join(missing)}: pip install 'lrsa-ds[longbench]', or leave its file out."
        )


def _library(name: str) -> Any:
    """An optional library without types, imported when a score needs it."""
    library = importlib.import_module(name)
    if name == "jieba":
        library.setLogLevel(logging.WARNING)  # suppress messages about its dictionary
    return library


def qa_f1(prediction: str, answers: Sequence[str], classes: Sequence[str] = ()) -> float:
    """F1 of the normalised words."""
    return max(_f1(_english_words(prediction), _english_words(answer)) for answer in answers)


def qa_f1_zh(prediction: str, answers: Sequence[str], classes: Sequence[str] = ()) -> float:
    """F1 of the words that jieba finds, without punctuation."""
    return max(_f1(_chinese_words(prediction), _chinese_words(answer)) for answer in answers)


def qa_f1_first_line(prediction: str, answers: Sequence[str], classes: Sequence[str] = ()) -> float:
    return qa_f1(_first_line(prediction), answers)


def rouge(prediction: str, answers: Sequence[str], classes: Sequence[str] = ()) -> float:
    """ROUGE-L of the summaries; 0 if the library refuses a text."""
    return max(_rouge_l(prediction, answer) for answer in answers)


def rouge_zh(prediction: str, answers: Sequence[str], classes: Sequence[str] = ()) -> float:
    """ROUGE-L over the words that jieba finds."""
    spaced = [" ".join(_library("jieba").cut(text)) for text in (prediction, *answers)]
    return rouge(spaced[0], spaced[1:])


def rouge_first_line(prediction: str, answers: Sequence[str], classes: Sequence[str] = ()) -> float:
    return rouge(_first_line(prediction), answers)


def classification(prediction: str, answers: Sequence[str], classes: Sequence[str]) -> float:
    """1 over the labels in the first line, if the right one is among them."""
    return max(_label_share(_first_line(prediction), answer, classes) for answer in answers)


def count(prediction: str, answers: Sequence[str], classes: Sequence[str] = ()) -> float:
    """Share of the numbers in the output that equal the answer."""
    return max(_number_share(prediction, answer) for answer in answers)


def retrieval(prediction: str, answers: Sequence[str], classes: Sequence[str] = ()) -> float:
    """Share of the numbers in the output that equal the answer's paragraph."""
    return max(_number_share(prediction, _paragraph(r"Paragraph (\d+)", answer)) for answer in answers)


def retrieval_zh(prediction: str, answers: Sequence[str], classes: Sequence[str] = ()) -> float:
    return max(_number_share(prediction, _paragraph(r"段落(\d+)", answer)) for answer in answers)


def code_sim(prediction: str, answers: Sequence[str], classes: Sequence[str] = ()) -> float:
    """How alike the first line without a back quote or a comment and the answer are, in whole percent."""
    lines = prediction.lstrip("\n").split("\n")
    line = next((line for line in lines if not any(mark in line for mark in ("`", "#", "//"))), "")
    return max(_ratio(line, answer) for answer in answers)


METRICS: dict[str, Metric] = {
    function.__name__: function
    for function in (
        *(qa_f1, qa_f1_zh, qa_f1_first_line, rouge, rouge_zh, rouge_first_line),
        *(classification, count, retrieval, retrieval_zh, code_sim),
    )
}


def _first_line(text: str) -> str:
    return text.lstrip("\n").split("\n")[0]


def _english_words(text: str) -> list[str]:
    bare = "".join(character for character in text.lower() if character not in string.punctuation)
    return re.sub(r"\b(a|an|the)\b", " ", bare).split()


def _chinese_words(text: str) -> list[str]:
    dropped = {*string.punctuation, *_CHINESE_PUNCTUATION}
    bare = ("".join(c for c in word.lower() if c not in dropped) for word in _library("jieba").cut(text))
    return [joined for word in bare if (joined := "".join(word.split()))]


def _f1(prediction: list[str], answer: list[str]) -> float:
    common = sum((Counter(prediction) & Counter(answer)).values())
    if common == 0:
        return 0.0
    precision, recall = common / len(prediction), common / len(answer)
    return 2 * precision * recall / (precision + recall)


def _rouge_l(prediction: str, answer: str) -> float:
    try:
        found = _library("rouge").Rouge().get_scores([prediction], [answer], avg=True)
    except (ValueError, RecursionError):  # a text without words, or one too long for it
        return 0.0
    return found["rouge-l"]["f"]


def _label_share(line: str, answer: str, classes: Sequence[str]) -> float:
    found = [label for label in classes if label in line]
    place = 0
    while place < len(found):
        if found[place] in answer and found[place] != answer:  # a label that is part of the right one
            found.remove(found[place])
        place += 1  # past the label behind a removed one, too: so does the authors' loop
    return 1 / len(found) if answer in found else 0.0


def _paragraph(pattern: str, answer: str) -> str:
    found = re.search(pattern, answer)
    if found is None:
        raise LRSAError(f"the answer {answer!r} of a retrieval task names no paragraph.")
    return found.group(1)


def _number_share(prediction: str, number: str) -> float:
    numbers = re.findall(r"\d+", prediction)
    return numbers.count(number) / len(numbers) if numbers else 0.0


def _ratio(line: str, answer: str) -> float:
    if line == answer:
        return 1.0
    return round(100 * SequenceMatcher(None, line, answer).ratio()) / 100 if line and answer else 0.0
