"""Statistics of paired studies, in which every method generates images from the same (prompt, seed)
pairs.

Images of one prompt resemble one another, so intervals come from a bootstrap that resamples
prompts, each with all its seeds (Davison and Hinkley 1997, section 3.8). All methods share the
resamples. Rates have Wilson's interval (Wilson 1927). Paired values that are right or wrong are
compared by McNemar's exact test (1947).
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

DRAWS = 10_000
FEW = 10  # with fewer prompts than this the bootstrap resamples pairs instead


class Estimate(NamedTuple):
    """A mean and its 95 % interval."""

    value: float
    low: float
    high: float


class Resample:
    """A bootstrap of means over (prompt, seed) pairs. `groups` has one entry per pair: the number
    of the pair's prompt. The bootstrap resamples prompts, each with all its pairs, or single pairs
    if there are fewer than 10 prompts. `draws` is the number of resamples."""

    def __init__(self, groups: Sequence[int], draws: int = DRAWS, seed: int = 0):
        names, where = np.unique(np.asarray(groups), return_inverse=True)
        self.by_prompt = len(names) >= FEW
        self.where = where if self.by_prompt else np.arange(len(where))
        n = len(names) if self.by_prompt else len(where)
        rng = np.random.default_rng(seed)
        # How often each resample contains each group, (draws, groups).
        self.times = rng.multinomial(n, np.full(n, 1 / n), size=draws).astype(float)

    def means(self, values: np.ndarray) -> np.ndarray:
        """Returns, for each resample, the mean of `values` over the pairs in the resample. `values`
        has one entry per pair, and the result one per resample. NaN values are left out."""
        there = np.isfinite(values)
        n = self.times.shape[1]
        sums = np.bincount(self.where, np.where(there, values, 0.0), n)
        counts = np.bincount(self.where, there, n)
        with np.errstate(invalid="ignore", divide="ignore"):
            return (self.times @ sums) / (self.times @ counts)

    def estimate(self, values: np.ndarray) -> Estimate:
        """Returns the mean of `values`, one per pair, with its 95 % bootstrap interval. NaN values
        are left out; if there are no others, the mean and its interval are NaN."""
        values = np.asarray(values, float)
        if not np.isfinite(values).any():
            return Estimate(math.nan, math.nan, math.nan)
        low, high = np.nanpercentile(self.means(values), [2.5, 97.5])
        return Estimate(float(np.nanmean(values)), float(low), float(high))


def wins(values: np.ndarray, baseline: np.ndarray) -> np.ndarray:
    """Compares the values of a method and of a baseline, one per pair. Returns for each pair 1 if
    the method's value is greater (better), 0.5 if it is equal, 0 if it is smaller, and NaN if
    either value is missing."""
    out = np.where(values > baseline, 1.0, np.where(values == baseline, 0.5, 0.0))
    return np.where(np.isfinite(values) & np.isfinite(baseline), out, np.nan)


def preference(values: np.ndarray, baseline: np.ndarray) -> np.ndarray:
    """Returns, for each pair, the probability that a method's image is preferred to the baseline's,
    given the PickScore values of both. PickScore's model is the logistic function of their
    difference."""
    return 1 / (1 + np.exp(-(values - baseline)))


def wilson(successes: float, n: int, z: float = 1.959964) -> Estimate:
    """Returns the rate successes / n with Wilson's interval, at 95 % for the default `z`. If n is
    0, the rate is NaN and the interval 0 to 1."""
    if n == 0:
        return Estimate(math.nan, 0.0, 1.0)
    p = successes / n
    middle = p + z * z / (2 * n)
    half = z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    scale = 1 + z * z / n
    return Estimate(p, max(0.0, (middle - half) / scale), min(1.0, (middle + half) / scale))


def mcnemar(repaired: int, broken: int) -> float:
    """Returns the two-sided p-value of McNemar's exact test for pairs that changed: `repaired` from
    wrong to right, and `broken` from right to wrong. It is the probability of a split at least as
    uneven as this one, if a change is equally likely in both directions."""
    n = repaired + broken
    tail = sum(math.comb(n, i) for i in range(min(repaired, broken) + 1))
    return min(1.0, 2 * tail / 2**n)
