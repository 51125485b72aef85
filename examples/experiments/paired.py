"""Statistics of paired runs: how far two methods lie apart when each seed was run with both.

A seed fixes the initial weights and the batches, so the difference within a seed is freed of the spread between
seeds. Intervals of differences are Student's, over the seeds; over splits of the data, where there are several, since
seeds on one split have more in common. Those that speak of other test images too come from the bootstrap.
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
    """The mean of first − second within pairs and the ends of its confidence interval, nan for a single pair."""

    mean: float
    low: float
    high: float
    confidence: float

    @property
    def excludes_zero(self) -> bool:
        """Whether the whole interval lies on one side of zero."""
        return self.low > 0 or self.high < 0


def estimate(values: Sequence[float]) -> Estimate:
    """The mean of one value or more, with its standard error."""
    return Estimate(float(np.mean(values)), float(stats.sem(values)) if len(values) > 1 else math.nan)


def paired_difference(first: Sequence[float], second: Sequence[float], confidence: float = 0.95) -> PairedDifference:
    """The mean of first − second over one pair or more, with Student's interval."""
    difference = estimate(np.subtract(first, second).tolist())
    half_width = float(stats.t.ppf((1 + confidence) / 2, df=len(first) - 1)) * difference.standard_error
    return PairedDifference(difference.mean, difference.mean - half_width, difference.mean + half_width, confidence)


def difference_by_key(first: Mapping[Key, float], second: Mapping[Key, float]) -> PairedDifference | None:
    """The mean of first − second over the runs that both have, with Student's interval: over seeds, or over splits."""
    keys = sorted(first.keys() & second.keys())
    if not keys:
        return None
    splits = sorted({split for split, _ in keys})
    if len(splits) == 1:
        return paired_difference([first[key] for key in keys], [second[key] for key in keys])
    means = [np.mean([first[key] - second[key] for key in keys if key[0] == split]) for split in splits]
    return paired_difference([float(mean) for mean in means], [0.0] * len(means))


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
