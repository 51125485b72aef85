"""Statistics of paired runs: how far two methods lie apart when each seed was run with both.

A seed fixes the initial weights and the batches, so the difference within a seed is freed of the spread between
seeds. Intervals of differences are Student's, over the seeds; those of shares come from the bootstrap.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy import stats

Values = npt.NDArray[np.float64]
VAST = 1e9  # share of a whole that a resample left without anything; SciPy needs it finite


@dataclass(frozen=True)
class Estimate:
    """A mean over seeds.

    Attributes:
        mean: the mean.
        standard_error: its standard error; nan for a single value.
    """

    mean: float
    standard_error: float


@dataclass(frozen=True)
class Share:
    """How large one mean is as a share of another, and its 95 % interval.

    Attributes:
        value: mean of the first / mean of the second.
        low: lower end of the interval.
        high: upper end of the interval.
    """

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class PairedDifference:
    """The mean difference within pairs and its confidence interval.

    Attributes:
        mean: mean of first − second.
        low: lower end of the interval; nan for a single pair, as is the upper end.
        high: upper end of the interval.
        confidence: the interval's level.
    """

    mean: float
    low: float
    high: float
    confidence: float

    @property
    def excludes_zero(self) -> bool:
        """Whether the whole interval lies on one side of zero."""
        return self.low > 0 or self.high < 0


def estimate(values: Sequence[float]) -> Estimate:
    """The mean of one value or more, with its standard error.

    Args:
        values: one a seed.

    Returns:
        Mean and standard error.
    """
    return Estimate(float(np.mean(values)), float(stats.sem(values)) if len(values) > 1 else math.nan)


def paired_difference(first: Sequence[float], second: Sequence[float], confidence: float = 0.95) -> PairedDifference:
    """The mean of first − second over one pair or more, with Student's interval.

    Args:
        first: one value a seed.
        second: one value a seed, in the same order.
        confidence: level of the interval.

    Returns:
        The mean difference and its interval.
    """
    difference = estimate(np.subtract(first, second).tolist())
    half_width = float(stats.t.ppf((1 + confidence) / 2, df=len(first) - 1)) * difference.standard_error
    return PairedDifference(difference.mean, difference.mean - half_width, difference.mean + half_width, confidence)


def difference_by_seed(first: Mapping[int, float], second: Mapping[int, float]) -> PairedDifference | None:
    """The mean of first − second over the seeds that both have.

    Args:
        first: values by seed.
        second: values by seed.

    Returns:
        The mean difference and its interval, or None without a seed in common.
    """
    seeds = sorted(first.keys() & second.keys())
    return paired_difference([first[seed] for seed in seeds], [second[seed] for seed in seeds]) if seeds else None


def paired_share(first: Sequence[float], second: Sequence[float]) -> Share | None:
    """The mean of one quantity as a share of the mean of another, with a bootstrap interval (BCa) over the pairs.

    Args:
        first: one value a seed.
        second: one value a seed, in the same order.

    Returns:
        The share; None where it is not defined, since Student's interval of the second mean includes zero.
    """
    if not paired_difference(second, [0.0] * len(second)).excludes_zero:
        return None

    def share(first: Values, second: Values, axis: int = -1) -> Values:
        part, whole = first.mean(axis=axis), second.mean(axis=axis)
        shares: Values = np.divide(part, whole, out=np.full_like(whole, VAST), where=whole != 0)
        return shares

    found = stats.bootstrap(
        (first, second), share, paired=True, vectorized=True, method="BCa", rng=np.random.default_rng(0)
    )
    interval = found.confidence_interval
    return Share(float(np.mean(first) / np.mean(second)), float(interval.low), float(interval.high))
