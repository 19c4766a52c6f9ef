"""Intervals: against published values, and by how often they hold the truth."""

import math
import random
from statistics import fmean, median

import pytest

from lrsa_ds.intervals import (
    combined_interval,
    interval_of,
    mean_interval,
    median_interval,
    ratio_interval,
    share_interval,
    share_of_contexts,
)


def test_the_interval_of_a_share_is_wilsons():
    low, high = share_interval(50, 100)
    assert (low, high) == (pytest.approx(40.38, abs=0.01), pytest.approx(59.62, abs=0.01))
    assert share_interval(0, 48)[0] == pytest.approx(0) and share_interval(100, 48)[1] == pytest.approx(100)


def test_answers_about_one_context_count_by_how_alike_they_are():
    alike, apart = [12] * 24 + [0] * 24, [6] * 48
    assert share_of_contexts(alike, [12] * 48) == pytest.approx((50, *share_interval(50, 48)))
    assert share_of_contexts(apart, [12] * 48) == pytest.approx((50, *share_interval(50, 48 * 12)))
    # Nothing is known of how alike they are: contexts count, not answers.
    assert share_of_contexts([12] * 48, [12] * 48) == pytest.approx((100, *share_interval(100, 48)))
    assert share_of_contexts([3, 3], [4, 4]) == pytest.approx((75, *share_interval(75, 2)))
    assert share_of_contexts([3], [4])[1:] == pytest.approx(share_interval(75, 1))


def test_an_interval_of_answers_in_contexts_holds_the_truth_as_often_as_it_says():
    """Shares that differ between contexts by 0.2; intervals of independent answers hold it in 70 % of the cases."""
    draw, held, naive = random.Random(0), 0, 0
    for _ in range(400):
        right = []
        for _ in range(30):
            share = draw.uniform(0.3, 1.0)
            right.append(sum(draw.random() < share for _ in range(12)))
        _, low, high = share_of_contexts(right, [12] * 30)
        held += low <= 65 <= high
        low, high = share_interval(100 * sum(right) / 360, 360)
        naive += low <= 65 <= high
    assert 0.92 <= held / 400 <= 0.98 and naive / 400 < 0.85


def test_rows_of_earlier_releases_count_their_contexts():
    row = {"exact_match": 75.0, "num_examples": 48, "num_answers": 480}
    assert interval_of(row, "exact_match") == share_interval(75, 48)
    assert interval_of(row | {"exact_match_low": 70.0, "exact_match_high": 80.0}, "exact_match") == (70, 80)


def test_combined_estimates():
    """Two equal ones: the mean is known better by the root of two; and weights count."""
    ends = [(40.0, 70.0)] * 2
    assert combined_interval([50, 50], ends, [1, 1]) == pytest.approx((50, 50 - 10 / 2**0.5, 50 + 20 / 2**0.5))
    assert combined_interval([50, 90], [(40, 70), (90, 90)], [3, 1]) == pytest.approx((60, 52.5, 75))


def test_means_and_ratios():
    assert mean_interval([1.0, 3.0]) == pytest.approx((2, 2 - 1.96, 2 + 1.96))
    assert math.isnan(mean_interval([1.0])[1])
    assert ratio_interval([1.0, 3.0], [1, 1]) == mean_interval([1.0, 3.0])
    assert ratio_interval([2.0, 4.0, 6.0], [1, 2, 3]) == pytest.approx((2, 2, 2))  # alike in every context


@pytest.mark.parametrize("count,places", [(5, None), (6, (0, 5)), (9, (1, 7)), (20, (5, 14)), (100, (39, 60))])
def test_the_interval_of_a_median(count, places):
    """The places of a table of binomial intervals for quantiles, counted from 0."""
    low, high = median_interval(list(range(count)))
    assert (low, high) == places if places else math.isnan(low) and math.isnan(high)
    values = [5.0, 1.0, 4.0, 2.0, 3.0, 6.0]
    assert median_interval(values)[0] <= median(values) <= median_interval(values)[1] and fmean(values) == 3.5
