"""Statistics of paired runs: how far two methods lie apart when each seed was run with both.

A seed fixes the initial weights and the batches, so the difference within a seed is freed of the spread that both
methods share. Intervals of differences are Student's, over the seeds; over splits of the data, where there are several,
since seeds on one split have more in common. Where both methods share no spread, Welch's interval without pairs says
as much. Intervals that speak of other test images too come from the bootstrap.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy import stats

Values = npt.NDArray[np.float64]
Key = tuple[int, int]  # split of the data, and seed


@dataclass(frozen=True)
class Estimate:
    """A mean over seeds."""

    mean: float
    standard_error: float


@dataclass(frozen=True)
class PairedDifference:
    """The mean of first − second, the ends of its confidence interval, and p that it is zero; nan for a single pair."""

    mean: float
    low: float
    high: float
    confidence: float
    p: float = math.nan


def estimate(values: Sequence[float]) -> Estimate:
    """The mean of one value or more, with its standard error."""
    return Estimate(float(np.mean(values)), float(stats.sem(values)) if len(values) > 1 else math.nan)


def paired_difference(first: Sequence[float], second: Sequence[float], confidence: float = 0.95) -> PairedDifference:
    """The mean of first − second over one pair or more, with Student's interval."""
    difference = estimate(np.subtract(first, second).tolist())
    mean, error = difference.mean, difference.standard_error
    half_width = float(stats.t.ppf((1 + confidence) / 2, df=len(first) - 1)) * error
    p = float(mean == 0) if error == 0 else 2 * float(stats.t.sf(abs(mean) / error, df=len(first) - 1))
    return PairedDifference(mean, mean - half_width, mean + half_width, confidence, p)


def welch_difference(first: Sequence[float], second: Sequence[float], confidence: float = 0.95) -> PairedDifference:
    """The mean of first − the mean of second, over two values or more of each, with Welch's interval."""
    tested = stats.ttest_ind(first, second, equal_var=False)
    low, high = tested.confidence_interval(confidence)
    mean = float(np.mean(first) - np.mean(second))
    return PairedDifference(mean, float(low), float(high), confidence, float(tested.pvalue))


def paired_values(first: Mapping[Key, float], second: Mapping[Key, float]) -> tuple[list[float], list[float]]:
    """Values of the runs that both have: of every seed, or, where there are several splits, the mean of every split."""
    keys = sorted(first.keys() & second.keys())
    splits = sorted({split for split, _ in keys})
    units = [[key] for key in keys] if len(splits) == 1 else [[k for k in keys if k[0] == split] for split in splits]
    both = [[float(np.mean([values[key] for key in unit])) for unit in units] for values in (first, second)]
    return both[0], both[1]


def difference_by_key(first: Mapping[Key, float], second: Mapping[Key, float]) -> PairedDifference | None:
    """The mean of first − second over the runs that both have, with Student's interval: over seeds, or over splits."""
    both = paired_values(first, second)
    return paired_difference(*both) if both[0] else None


def welch_by_key(first: Mapping[Key, float], second: Mapping[Key, float]) -> PairedDifference | None:
    """The same with Welch's interval, where pairs share no spread, so do not correlate above 0; None elsewhere."""
    one, other = paired_values(first, second)
    if len(one) < 3 or np.ptp(one) == 0 or np.ptp(other) == 0 or np.corrcoef(one, other)[0, 1] > 0:
        return None
    return welch_difference(one, other)


def holm(ps: Sequence[float]) -> list[float]:
    """The p of several tests, by Holm's procedure; what is not a number is no test and stays."""
    tested = sorted((p, number) for number, p in enumerate(ps) if not math.isnan(p))
    adjusted, largest = list(ps), 0.0
    for rank, (p, number) in enumerate(tested):
        largest = max(largest, min(1.0, (len(tested) - rank) * p))
        adjusted[number] = largest
    return adjusted


def clear_of_zero(differences: Sequence[PairedDifference | None]) -> list[bool]:
    """Which differences of a table are not zero at the 5 % level, by Holm's procedure over its rows."""
    adjusted = holm([math.nan if difference is None else difference.p for difference in differences])
    return [p < 0.05 for p in adjusted]


def over_images(differences: Mapping[Key, Values], resamples: int = 2000) -> tuple[float, float]:
    """The 95 % interval of a mean difference in error that speaks of other seeds, splits and test images.

    Seeds and images are drawn anew, crossed, within each split; splits too, where there are several.

    Args:
        differences: by split and seed: wrong labels of the first method − those of the second for each test image.
        resamples: of the bootstrap.
    """
    generator = np.random.default_rng(0)
    by_split: dict[int, list[Values]] = {}
    for (split, _), values in sorted(differences.items()):
        by_split.setdefault(split, []).append(values)
    means = np.empty((len(by_split), resamples))
    for row, values_of_seeds in zip(means, by_split.values(), strict=True):
        table = np.stack(values_of_seeds)  # (seeds, images)
        seeds, images = table.shape
        for number in range(resamples):
            weights = generator.multinomial(seeds, np.full(seeds, 1 / seeds))
            row[number] = (weights @ table / seeds)[generator.integers(images, size=images)].mean()
    chosen = (
        generator.integers(len(means), size=(len(means), resamples))
        if len(means) > 1
        else np.zeros((1, resamples), int)
    )
    drawn = np.take_along_axis(means, chosen, axis=0).mean(axis=0)
    low, high = np.quantile(drawn, [0.025, 0.975])
    return 100 * float(low), 100 * float(high)
