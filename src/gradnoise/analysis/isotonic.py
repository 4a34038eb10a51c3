"""Monotone trends over ordered levels, blocked by seed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np
from numpy.typing import NDArray

from gradnoise.analysis.families import holm
from gradnoise.base.errors import InputError

if TYPE_CHECKING:
    import pandas as pd

Array = NDArray[np.float64]

# Draws are compared in blocks, to bound the memory of a long list of draws.
_BLOCK = 2000


@dataclass(frozen=True)
class Reversal:
    """One step between adjacent levels, upper minus lower, paired over clusters.

    `p` tests for a step against the direction; `p_adjusted` is Holm's over all steps. `p_margin` tests that
    the step does not go against the direction by the margin or more.
    """

    lower: object
    upper: object
    difference: float
    se: float
    p: float
    p_adjusted: float
    p_margin: float


@dataclass(frozen=True)
class Trend:
    """A trend over levels.

    `ebar2`: share of the within-cluster sum of squares that the isotonic fit explains, in [0, 1]; it is
    positive by chance alone, so only `p` (permutation) is evidence. `page` and `page_p`: Page's L and its
    p. `fitted` and `means`: level to isotonic and raw mean. `noninferior_p`: largest `p_margin` of the
    steps. `clusters`: complete clusters used; `incomplete`: those left out because a level is missing.

    `reading`: `reversal` when a step against the direction is found (adjusted p <= alpha), else `ordered`
    when p <= alpha, else `undecided`.
    """

    ebar2: float
    p: float
    page: float
    page_p: float
    reversals: tuple[Reversal, ...]
    noninferior_p: float
    fitted: Mapping[object, float]
    means: Mapping[object, float]
    margin: float
    alpha: float
    alternative: str
    draws: int
    clusters: int
    incomplete: tuple[object, ...]

    @property
    def reading(self) -> str:
        """`reversal`, `ordered` or `undecided`."""
        if any(reversal.p_adjusted <= self.alpha for reversal in self.reversals):
            return "reversal"
        return "ordered" if self.p <= self.alpha else "undecided"


def trend(
    frame: pd.DataFrame,
    outcome: str,
    level: str,
    cluster: str = "seed",
    *,
    margin: float,
    alternative: Literal["increasing", "decreasing"] = "increasing",
    alpha: float = 0.05,
    draws: int = 99_999,
    seed: int = 0,
) -> Trend:
    """Isotonic trend of `outcome` over the sorted values of `level`, blocked by `cluster`.

    With cluster means removed, E-bar-squared = sum_k n_k (m*_k - m)^2 / sum (y - m)^2, where m* is the
    isotonic fit of the level means. Its p permutes levels within clusters, (1 + #{E* >= E}) / (1 + draws),
    which tests "no effect in any cluster". Rows of one cluster and level are averaged first. A dip is tested
    separately, step by step, because a trend over all levels can hide one.

    `margin` is in the outcome's units; `seed` seeds the permutations (numpy PCG64). Raises `InputError` with
    fewer than 2 complete clusters or 3 levels.
    Sources: Barlow, Bartholomew, Bremner and Brunk 1972; Phipson and Smyth 2010; Page 1963.
    """
    from scipy import stats

    table = frame.groupby([cluster, level], sort=True)[outcome].mean().unstack(level)
    complete = table.dropna()
    incomplete = tuple(name for name in table.index if name not in complete.index)
    levels = list(table.columns)
    if len(complete) < 2 or len(levels) < 3:
        found = f"{len(complete)} complete clusters, {len(levels)} levels"
        raise InputError(cluster, found, "give at least 2 clusters that have every one of 3 or more levels")
    sign = 1.0 if alternative == "increasing" else -1.0
    y = sign * complete.to_numpy(dtype=float)
    page = stats.page_trend_test(y)
    means = y.mean(axis=0)
    reversals = _reversals(y, levels, sign, margin)
    return Trend(
        ebar2=ebar2(y - y.mean(axis=1, keepdims=True)),
        p=_permutation_p(y, draws, seed),
        page=float(page.statistic),
        page_p=float(page.pvalue),
        reversals=reversals,
        noninferior_p=max(reversal.p_margin for reversal in reversals),
        fitted=dict(zip(levels, (sign * isotonic_fit(means)).tolist(), strict=True)),
        means=dict(zip(levels, (sign * means).tolist(), strict=True)),
        margin=margin,
        alpha=alpha,
        alternative=alternative,
        draws=draws,
        clusters=len(y),
        incomplete=incomplete,
    )


def isotonic_fit(means: Array) -> Array:
    """Increasing least-squares fit to level means of equal weight (scikit-learn)."""
    from sklearn.isotonic import isotonic_regression

    return np.asarray(isotonic_regression(means), dtype=float)


def isotonic_curve(x: Array, y: Array, increasing: bool = True) -> tuple[Array, Array]:
    """Isotonic least-squares fit of y on x at the sorted distinct x; ties in x are averaged first."""
    from sklearn.isotonic import IsotonicRegression

    points = np.unique(x)
    fit = IsotonicRegression(increasing=increasing).fit(x, y)
    return points, np.asarray(fit.predict(points), dtype=float)


def ebar2(y: Array) -> float:
    """E-bar-squared of a balanced table, clusters (rows) x levels: isotonic over total sum of squares."""
    total = float(((y - y.mean()) ** 2).sum())
    if total == 0:
        return 0.0
    return float(len(y) * ((isotonic_fit(y.mean(axis=0)) - y.mean()) ** 2).sum()) / total


def _permutation_p(y: Array, draws: int, seed: int) -> float:
    """Share of within-cluster permutations whose isotonic fit explains at least as much."""
    generator = np.random.default_rng(seed)
    centred = y - y.mean(axis=1, keepdims=True)
    # The total sum of squares is the same in every permutation, so the fitted one decides.
    observed = _explained(centred.mean(axis=0)[None])[0]
    # Rounding must not turn a tie into a miss, nor decide between fits that are flat.
    least = observed - 1e-12 * float((centred**2).sum())
    reached = 0
    for start in range(0, draws, _BLOCK):
        count = min(_BLOCK, draws - start)
        shuffled = generator.permuted(np.broadcast_to(centred, (count, *y.shape)), axis=2)
        reached += int((_explained(shuffled.mean(axis=1)) >= least).sum())
    return (1 + reached) / (1 + draws)


def _explained(means: Array) -> Array:
    """Sum of squares of the isotonic fit to each row of means of sum 0, for thousands of rows at once.

    fit_k = max over s <= k of min over t >= k of mean(m_s, ..., m_t).
    """
    sums = np.concatenate([np.zeros((len(means), 1)), np.cumsum(means, axis=1)], axis=1)
    levels = means.shape[1]
    fit = np.full_like(means, -np.inf)
    for start in range(levels):
        lengths = np.arange(1, levels - start + 1)
        averages = (sums[:, start + 1 :] - sums[:, start : start + 1]) / lengths
        smallest = np.minimum.accumulate(averages[:, ::-1], axis=1)[:, ::-1]
        fit[:, start:] = np.maximum(fit[:, start:], smallest)
    squares: Array = (fit**2).sum(axis=1)
    return squares


def _reversals(y: Array, levels: Sequence[object], sign: float, margin: float) -> tuple[Reversal, ...]:
    from scipy import stats

    steps = np.diff(y, axis=1)
    df = len(y) - 1
    mean, se = steps.mean(axis=0), steps.std(axis=0, ddof=1) / np.sqrt(len(y))
    if (se == 0).any():
        raise InputError("outcome", "steps that do not vary", "between clusters they have no standard error")
    against = stats.t.cdf(mean / se, df)
    margins = stats.t.sf((mean + margin) / se, df)
    return tuple(
        Reversal(
            lower=levels[k],
            upper=levels[k + 1],
            difference=float(sign * mean[k]),
            se=float(se[k]),
            p=float(against[k]),
            p_adjusted=adjusted,
            p_margin=float(margins[k]),
        )
        for k, adjusted in enumerate(holm([float(p) for p in against]))
    )
