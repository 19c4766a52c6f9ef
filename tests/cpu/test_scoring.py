"""The metrics of answers."""

import pytest

from recipes.scoring import METRICS


@pytest.mark.parametrize(
    "metric,prediction,answers,score",
    [
        ("exact", "The Eiffel Tower.", ["eiffel tower"], 1),
        ("exact", "Eiffel", ["eiffel tower", "EIFFEL!"], 1),
        ("exact", "in Paris", ["Paris"], 0),
        ("f1", "in Paris", ["Paris"], 2 / 3),
        ("f1", "the cat sat", ["a cat sat down", "dog"], 4 / 5),
        ("f1", "nothing", ["Paris"], 0),
        ("f1", "", ["Paris"], 0),
        ("recall", "AB, CD and EF", ["ab", "CD", "XY", "EF"], 3 / 4),
        ("partial", "The key is 12345", ["1234567890"], 1 / 2),
        ("partial", "", ["1234"], 0),
    ],
)
def test_metrics(metric, prediction, answers, score):
    assert METRICS[metric](prediction, answers) == pytest.approx(score)


def test_every_metric_is_right_about_the_answer_itself():
    for name, metric in METRICS.items():
        assert metric("Room 12 b", ["Room 12 b"]) == 1, name
