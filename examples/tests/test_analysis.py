"""The statistics of paired runs."""

from __future__ import annotations

import math

import numpy as np
import pytest
from experiments.analysis import PairedDifference, estimate, holm, over_images, paired_difference
from scipy import stats


def test_the_paired_interval_is_that_of_the_paired_t_test():
    generator = np.random.default_rng(0)
    first = generator.normal(6, 1, size=9)
    second = first - generator.normal(0.5, 0.4, size=9)
    result = paired_difference(first.tolist(), second.tolist())
    expected = stats.ttest_rel(first, second).confidence_interval(0.95)
    assert (result.low, result.high) == pytest.approx((expected.low, expected.high), rel=1e-12)
    assert result.mean == pytest.approx((first - second).mean(), rel=1e-12)
    assert result.p == pytest.approx(stats.ttest_rel(first, second).pvalue, rel=1e-9)


def test_the_standard_error_is_that_of_the_mean():
    assert estimate([1.0, 2.0, 3.0, 4.0]).standard_error == pytest.approx(math.sqrt(5 / 3 / 4))


def test_equal_runs_differ_by_nothing():
    assert paired_difference([5.0, 6.0], [5.0, 6.0]) == PairedDifference(0, 0, 0, p=1)


def test_p_is_below_the_level_where_the_interval_excludes_zero():
    inside, outside = paired_difference([1.0, 2.0, 3.0], [0.0] * 3), paired_difference([2.0, 2.5, 3.0], [0.0] * 3)
    assert inside.low < 0 < outside.low
    assert inside.p > 0.05 > outside.p
    assert math.isnan(paired_difference([1.0], [0.0]).p)


def test_holm_multiplies_the_smallest_p_by_all_tests_and_keeps_their_order():
    """Worked by hand: 0.01 × 4, 0.02 × 3, then 0.03 × 2 which is no more, and 0.5; what is no test stays."""
    found = [None if p is None else PairedDifference(1, 0, 2, p) for p in (0.5, 0.01, None, 0.03, 0.02)]
    assert holm(found) == pytest.approx([0.5, 0.04, math.nan, 0.06, 0.06], nan_ok=True)


def test_an_interval_over_images_speaks_of_images_where_all_splits_agree():
    generator = np.random.default_rng(0)
    wrong = (generator.random(400) < 0.1).astype(float)
    low, high = over_images([wrong] * 5)
    deviation = 100 * wrong.std() / 400**0.5
    assert low == pytest.approx(100 * wrong.mean() - 1.96 * deviation, abs=0.3)
    assert high == pytest.approx(100 * wrong.mean() + 1.96 * deviation, abs=0.3)


def test_an_interval_over_images_speaks_of_splits_where_all_images_agree():
    low, high = over_images([np.full(50, float(split % 2)) for split in range(16)])
    assert low == pytest.approx(50 - 1.96 * 100 * 0.5 / 4, abs=6)
    assert high == pytest.approx(50 + 1.96 * 100 * 0.5 / 4, abs=6)
