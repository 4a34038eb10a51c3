"""Monotone trends over ordered levels, blocked by seed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from gradnoise.analysis.statistics.ebar2 import Array, Direction, ebar2, isotonic_fit, permutation_p
from gradnoise.analysis.statistics.families import holm
from gradnoise.analysis.statistics.rows import table_of_means
from gradnoise.analysis.statistics.student import mean_over_clusters
from gradnoise.base.errors import InputError

if TYPE_CHECKING:
    import pandas as pd


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
    steps, which tests all of them at once (intersection-union, so without correction). `clusters`: complete
    clusters used; `incomplete`: those left out because a level is missing.
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
    alternative: Direction
    draws: int
    clusters: int
    incomplete: tuple[object, ...]

    @property
    def reading(self) -> str:
        """`reversal`, `monotone`, `ordered` or `undecided`.

        A trend (p <= alpha) is not enough for `monotone`: a curve that drops at its last level has one too.
        `reversal`: a step against the direction is found (adjusted p <= alpha). `monotone`: a trend, and
        every step is shown not to go against the direction by the margin (noninferior_p <= alpha). `ordered`:
        a trend whose steps are not all settled.
        """
        if any(reversal.p_adjusted <= self.alpha for reversal in self.reversals):
            return "reversal"
        if self.p > self.alpha:
            return "undecided"
        return "monotone" if self.noninferior_p <= self.alpha else "ordered"


def trend(
    frame: pd.DataFrame,
    outcome: str,
    level: str,
    cluster: str = "seed",
    *,
    margin: float,
    alternative: Direction = "increasing",
    alpha: float = 0.05,
    draws: int = 99_999,
    seed: int = 0,
) -> Trend:
    """Isotonic trend of `outcome` over the sorted values of `level`, blocked by `cluster`.

    With cluster means removed, E-bar-squared = sum_k n_k (m*_k - m)^2 / sum (y - m)^2, where m* is the
    isotonic fit of the level means. Its p permutes levels within clusters, (1 + #{E* >= E}) / (1 + draws),
    which tests "no effect in any cluster": where clusters react in opposite ways it finds an effect although
    the mean is flat. Rows of one cluster and level are averaged first. A dip is tested separately, step by
    step, because a trend over all levels can hide one.

    `margin` is in the outcome's units; `seed` seeds the permutations (numpy PCG64). Raises `InputError` with
    fewer than 2 complete clusters or 3 levels, a margin below 0, or rows that are not usable (see
    `rows.used_rows`).
    Sources: Barlow, Bartholomew, Bremner and Brunk 1972; Phipson and Smyth 2010; Page 1963.
    """
    from scipy import stats

    if not margin >= 0:
        raise InputError("margin", margin, "must be 0 or more")
    if not 0 < alpha < 1:
        raise InputError("alpha", alpha, "must lie between 0 and 1")
    if draws < 1:
        raise InputError("draws", draws, "must be 1 or more")
    complete, incomplete = table_of_means(frame, outcome, cluster, level)
    levels = list(complete.columns)
    if len(complete) < 2 or len(levels) < 3:
        found = f"{len(complete)} complete clusters, {len(levels)} levels"
        raise InputError(cluster, found, "give at least 2 clusters that have every one of 3 or more levels")
    sign = 1.0 if alternative == "increasing" else -1.0
    y = sign * complete.to_numpy(dtype=float)
    page = stats.page_trend_test(y)
    means = y.mean(axis=0)
    reversals = reversals_of(y, levels, sign, margin)
    return Trend(
        ebar2=ebar2(y - y.mean(axis=1, keepdims=True)),
        p=permutation_p(y, draws, seed),
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


def isotonic_curve(x: Array, y: Array, increasing: bool = True) -> tuple[Array, Array]:
    """Isotonic least-squares fit of y on x at the sorted distinct x; ties in x are averaged first."""
    from sklearn.isotonic import IsotonicRegression

    points = np.unique(x)
    fit = IsotonicRegression(increasing=increasing).fit(x, y)
    return points, np.asarray(fit.predict(points), dtype=float)


def reversals_of(y: Array, levels: Sequence[object], sign: float, margin: float) -> tuple[Reversal, ...]:
    """Every step of a table clusters x levels that was turned by `sign` to rise; p-values by t(S - 1)."""
    scale = float(np.abs(y).max())
    steps = [mean_over_clusters(step, scale, "step between levels") for step in np.diff(y, axis=1).T]
    against = [step.p("less") for step in steps]
    return tuple(
        Reversal(
            lower=levels[k],
            upper=levels[k + 1],
            difference=sign * step.estimate,
            se=step.se,
            p=against[k],
            p_adjusted=adjusted,
            p_margin=step.p("greater", null=-margin),
        )
        for k, (step, adjusted) in enumerate(zip(steps, holm(against), strict=True))
    )
