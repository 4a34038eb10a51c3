"""Isotonic fits of level means, and E-bar-squared, the share of variation that such a fit explains."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np
from numpy.typing import NDArray

from gradnoise.analysis.statistics.rows import used_rows
from gradnoise.analysis.statistics.student import ROUNDING
from gradnoise.base.errors import InputError

if TYPE_CHECKING:
    import pandas as pd

Array = NDArray[np.float64]
Direction = Literal["increasing", "decreasing"]

# Draws are compared in blocks, to bound the memory of a long list of draws.
BLOCK = 2000


@dataclass(frozen=True)
class Ebar2:
    """E-bar-squared of unblocked runs with its exact p.

    `weights`: under the null, the probability that the isotonic fit has 1, 2, ... distinct values; `fitted`:
    level to isotonic mean; `runs`: how many.
    """

    ebar2: float
    p: float
    weights: tuple[float, ...]
    fitted: Mapping[object, float]
    runs: int


def isotonic_fit(means: Array) -> Array:
    """Increasing least-squares fit to level means of equal weight (scikit-learn)."""
    from sklearn.isotonic import isotonic_regression

    return np.asarray(isotonic_regression(means), dtype=float)


def isotonic_fits(means: Array) -> Array:
    """The same for every row of a table of means: thousands at once.

    fit_k = max over s <= k of min over t >= k of mean(m_s, ..., m_t).
    """
    sums = np.concatenate([np.zeros((len(means), 1)), np.cumsum(means, axis=1)], axis=1)
    levels = means.shape[1]
    fits = np.full_like(means, -np.inf)
    for start in range(levels):
        lengths = np.arange(1, levels - start + 1)
        averages = (sums[:, start + 1 :] - sums[:, start : start + 1]) / lengths
        smallest = np.minimum.accumulate(averages[:, ::-1], axis=1)[:, ::-1]
        fits[:, start:] = np.maximum(fits[:, start:], smallest)
    return fits


def ebar2(y: Array) -> float:
    """E-bar-squared of a balanced table, runs (rows) x levels: isotonic over total sum of squares.

    sum_k n (m*_k - m)^2 / sum (y - m)^2, with m* the increasing fit of the level means and m the mean of all.
    """
    total = float(((y - y.mean()) ** 2).sum())
    if total == 0:
        return 0.0
    return float(len(y) * ((isotonic_fit(y.mean(axis=0)) - y.mean()) ** 2).sum()) / total


def ebar2_test(frame: pd.DataFrame, outcome: str, level: str, alternative: Direction = "increasing") -> Ebar2:
    """Exact test of "all levels have one mean" against a trend, for runs that share nothing.

    For K levels of n independent normal runs each, N = K n,
    P(E >= e) = sum_(l=2..K) |s(K, l)| / K! P(Beta((l - 1) / 2, (N - l) / 2) >= e), with s the Stirling
    numbers of the first kind. Runs that share seeds are not independent: use `trend`, which permutes within
    them. `frame` has one row a run. Raises `InputError` unless there are 3 or more levels with equally many
    runs, at least 2, whose outcomes differ.
    Source: Barlow, Bartholomew, Bremner and Brunk, Statistical Inference under Order Restrictions, 1972.
    """
    rows = used_rows(frame, [outcome], [level])
    groups = {name: group.to_numpy() for name, group in rows.groupby(level, sort=True)[outcome]}
    sizes = [len(group) for group in groups.values()]
    if len(sizes) < 3 or len(set(sizes)) != 1 or sizes[0] < 2:
        raise InputError(level, f"{sizes} runs", "give 3 or more levels with equally many runs, at least 2")
    y = np.column_stack(list(groups.values()))
    if float(np.ptp(y)) <= ROUNDING * float(np.abs(y).max()):
        raise InputError(outcome, float(y.mean()), "is the same in every run: there is nothing to explain")
    sign = 1.0 if alternative == "increasing" else -1.0
    share = ebar2(sign * y)
    weights = level_probabilities(len(groups))
    fitted = sign * isotonic_fit(sign * y.mean(axis=0))
    return Ebar2(
        ebar2=share,
        p=exact_p(share, weights, y.size),
        weights=tuple(weights.tolist()),
        fitted=dict(zip(groups, fitted.tolist(), strict=True)),
        runs=y.size,
    )


def level_probabilities(levels: int) -> Array:
    """Probability, under the null with equal weights, of 1, ..., K distinct values: |s(K, l)| / K!.

    x (x + 1) ... (x + K - 1) / K! = sum_l P(l) x^l, built up one factor at a time.
    """
    polynomial = np.array([1.0])
    for k in range(1, levels + 1):
        polynomial = np.convolve(polynomial, [k - 1, 1.0]) / k
    return polynomial[1:]


def exact_p(share: float, weights: Array, runs: int) -> float:
    """P(E-bar-squared >= share) of `runs` independent runs; a share of 0 is always reached."""
    from scipy import stats

    # A flat fit, exactly or up to rounding, is no evidence.
    if share <= ROUNDING:
        return 1.0
    parts = np.arange(2, len(weights) + 1)
    return float(weights[1:] @ stats.beta.sf(share, (parts - 1) / 2, (runs - parts) / 2))


def permutation_p(y: Array, draws: int, seed: int) -> float:
    """Share of permutations within rows whose increasing fit explains at least as much as the data's.

    (1 + #{E* >= E}) / (1 + draws), which is never 0 and keeps its level at any number of draws.
    Source: Phipson and Smyth, Statistical Applications in Genetics and Molecular Biology 2010.
    """
    generator = np.random.default_rng(seed)
    centred = y - y.mean(axis=1, keepdims=True)
    # The total sum of squares is the same in every permutation, so the fitted one decides.
    observed = _explained(centred.mean(axis=0)[None])[0]
    # Rounding must not turn a tie into a miss, nor decide between fits that are flat.
    least = observed - ROUNDING * float((centred**2).sum())
    reached = 0
    for start in range(0, draws, BLOCK):
        count = min(BLOCK, draws - start)
        shuffled = generator.permuted(np.broadcast_to(centred, (count, *y.shape)), axis=2)
        reached += int((_explained(shuffled.mean(axis=1)) >= least).sum())
    return (1 + reached) / (1 + draws)


def _explained(means: Array) -> Array:
    """Sum of squares of the increasing fit to each row of means of sum 0."""
    squares: Array = (isotonic_fits(means) ** 2).sum(axis=1)
    return squares
