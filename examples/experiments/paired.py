"""Statistics of paired runs: how far two methods lie apart when each seed was run with both.

A seed fixes the initial weights and the batches, so a difference within a seed is free of the spread that both methods
share. Intervals are Student's, over seeds, or over splits of the data where there are several, since seeds on one split
have more in common. Welch's interval needs no pairs; the bootstrap's speaks of other test images too.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from scipy import stats

Values = npt.NDArray[np.float64]
Key = tuple[int, int]  # split of the data, and seed
ByKey = Mapping[Key, float]


class Estimate(NamedTuple):
    """A mean over seeds, and its standard error, nan for a single one."""

    mean: float
    standard_error: float


class PairedDifference(NamedTuple):
    """The mean of first − second, the ends of its confidence interval, and p that it is zero; nan for a single pair."""

    mean: float
    low: float
    high: float
    p: float = math.nan


def estimate(values: Sequence[float]) -> Estimate:
    """The mean of one value or more."""
    return Estimate(float(np.mean(values)), float(stats.sem(values)) if len(values) > 1 else math.nan)


def paired_difference(first: Sequence[float], second: Sequence[float]) -> PairedDifference:
    """The mean of first − second over one pair or more, with Student's 95 % interval."""
    mean, error = estimate(np.subtract(first, second).tolist())
    half_width = float(stats.t.ppf(0.975, df=len(first) - 1)) * error
    p = float(mean == 0) if error == 0 else 2 * float(stats.t.sf(abs(mean) / error, df=len(first) - 1))
    return PairedDifference(mean, mean - half_width, mean + half_width, p)


def paired_values(first: ByKey, second: ByKey) -> tuple[list[float], list[float]]:
    """Values of the runs that both have: of every seed, or, where there are several splits, the mean of every split."""
    keys = sorted(first.keys() & second.keys())
    splits = sorted({split for split, _ in keys})
    units = [[key] for key in keys] if len(splits) == 1 else [[k for k in keys if k[0] == split] for split in splits]
    both = [[float(np.mean([values[key] for key in unit])) for unit in units] for values in (first, second)]
    return both[0], both[1]


def difference_by_key(first: ByKey, second: ByKey) -> PairedDifference | None:
    """The mean of first − second over the runs that both have; None where they have none in common."""
    both = paired_values(first, second)
    return paired_difference(*both) if both[0] else None


def welch_by_key(first: ByKey, second: ByKey) -> PairedDifference | None:
    """The same with Welch's interval, where pairs share no spread, so do not correlate above 0; None elsewhere."""
    one, other = paired_values(first, second)
    if len(one) < 3 or np.ptp(one) == 0 or np.ptp(other) == 0 or np.corrcoef(one, other)[0, 1] > 0:
        return None
    tested = stats.ttest_ind(one, other, equal_var=False)
    low, high = tested.confidence_interval(0.95)
    return PairedDifference(float(np.mean(one) - np.mean(other)), float(low), float(high), float(tested.pvalue))


def holm(differences: Sequence[PairedDifference | None]) -> list[float]:
    """The p of the differences of a table, by Holm's procedure over its rows; nan where a row is no test."""
    adjusted = [difference.p if difference else math.nan for difference in differences]
    tested = sorted((p, number) for number, p in enumerate(adjusted) if not math.isnan(p))
    largest = 0.0
    for rank, (p, number) in enumerate(tested):
        largest = max(largest, min(1.0, (len(tested) - rank) * p))
        adjusted[number] = largest
    return adjusted


def over_images(differences: Sequence[Values], resamples: int = 2000) -> tuple[float, float]:
    """The 95 % interval of the mean of each split's differences by test image: a bootstrap of splits and images."""
    generator = np.random.default_rng(0)
    table = np.stack(differences)  # (splits, images)
    splits, images = table.shape
    means = np.empty(resamples)
    for number in range(resamples):
        weights = generator.multinomial(splits, np.full(splits, 1 / splits))
        means[number] = (weights @ table / splits)[generator.integers(images, size=images)].mean()
    low, high = np.quantile(means, [0.025, 0.975])
    return 100 * float(low), 100 * float(high)
