"""Sign flips, seed bootstrap and wild cluster bootstrap: the deciding slope once more, by other means."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations_with_replacement
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import ArrayLike, NDArray

from gradnoise.analysis.statistics.ebar2 import BLOCK
from gradnoise.analysis.statistics.rows import memberships, used_rows
from gradnoise.analysis.statistics.student import ROUNDING, Alternative, mean_over_clusters
from gradnoise.base.errors import InputError

if TYPE_CHECKING:
    import pandas as pd

Array = NDArray[np.float64]

# All sign patterns are listed up to this many clusters.
_MOST_FLIPPED = 20
# t values that agree to this share are one.
_SAME_T = 1e-9
_WEBB = np.sqrt([0.5, 1.0, 1.5])
WEBB_WEIGHTS = np.concatenate([-_WEBB[::-1], _WEBB])


@dataclass(frozen=True)
class SignFlip:
    """Exact sign-flip test. `smallest_p`: what p cannot fall below with so few clusters, whatever the data.

    Two-sided it is 2^(1 - S), so a threshold of .05 / 4 needs S >= 8 (one-sided 7).
    """

    p: float
    smallest_p: float
    alternative: Alternative
    clusters: int


@dataclass(frozen=True)
class SeedBootstrap:
    """Mean of one number a cluster with its studentised bootstrap interval; `p` is two-sided for a mean of 0.

    `exact`: all resamples were listed, so that the result does not depend on draws.
    """

    estimate: float
    se: float
    low: float
    high: float
    p: float
    level: float
    exact: bool
    clusters: int


@dataclass(frozen=True)
class WildBootstrap:
    """Wild cluster bootstrap-t of one coefficient; `exact`: all weights were listed, not drawn."""

    estimate: float
    t: float
    p: float
    alternative: Alternative
    exact: bool
    draws: int
    clusters: int


def sign_flip(values: ArrayLike, alternative: Alternative = "two-sided") -> SignFlip:
    """Exact p of the mean of one number a cluster, over all 2^S ways to turn their signs.

    Exact for numbers that are symmetrical about 0 under the null. p is the share of sign patterns whose mean
    is at least as far out as the data's, which are one of them. Raises `InputError` with fewer than 2 or more
    than 20 numbers, or ones that are not finite.
    """
    x = _finite(values)
    if len(x) > _MOST_FLIPPED:
        raise InputError("clusters", len(x), f"all sign patterns are listed for {_MOST_FLIPPED} at most")
    sums = np.zeros(1)
    for value in x:
        sums = np.concatenate([sums + value, sums - value])
    rounding = ROUNDING * float(np.abs(x).sum())
    p = float(_beyond(sums, float(x.sum()), alternative, rounding).mean())
    smallest = 2.0 ** (-len(x) + (alternative == "two-sided"))
    return SignFlip(p, smallest, alternative, len(x))


def seed_bootstrap(
    values: ArrayLike, level: float = 0.95, draws: int = 99_999, seed: int = 0
) -> SeedBootstrap:
    """Studentised bootstrap interval for the mean of one number a cluster.

    t* = (mean* - mean) / se* over resamples of clusters; the interval is mean - q(t*) se at its two
    quantiles, and p is twice the smaller share of t* beyond mean / se. Percentile and BCa intervals are
    not offered: with few seeds they cover far too rarely. A resample of one cluster alone has no standard
    error and is left out, which matters below 5 clusters: there the interval is too short as well.

    Raises `InputError` with fewer than 3 numbers, or ones that do not vary.
    Source: Cameron, Gelbach and Miller, Review of Economics and Statistics 2008.
    """
    x = _finite(values)
    if len(x) < 3:
        raise InputError("clusters", len(x), "give at least 3")
    test = mean_over_clusters(x, float(np.abs(x).max()), "values")
    counts, weights, exact = resamples(len(x), draws, seed)
    means = counts @ x / len(x)
    # Around the mean, so that squares do not cancel.
    variances = counts @ (x - test.estimate) ** 2 - len(x) * (means - test.estimate) ** 2
    errors = np.sqrt(np.maximum(variances, 0) / (len(x) * (len(x) - 1)))
    kept = (counts > 0).sum(axis=1) > 1
    kept &= errors > ROUNDING * test.se
    t = (means[kept] - test.estimate) / errors[kept]
    low, high, p = studentised(test.estimate, test.se, t, weights[kept], level)
    return SeedBootstrap(test.estimate, test.se, low, high, p, level, exact, len(x))


def resamples(clusters: int, draws: int, seed: int) -> tuple[NDArray[np.int64], Array, bool]:
    """Counts of each cluster in each resample, the resamples' probabilities, and whether all are listed.

    There are C(2 S - 1, S) different resamples, so up to 10 clusters `draws` = 99 999 lists them all.
    """
    if draws < 1:
        raise InputError("draws", draws, "must be 1 or more")
    if math.comb(2 * clusters - 1, clusters) > draws:
        generator = np.random.default_rng(seed)
        drawn = generator.multinomial(clusters, np.full(clusters, 1 / clusters), size=draws)
        return drawn, np.full(draws, 1 / draws), False
    picks = np.array(list(combinations_with_replacement(range(clusters), clusters)))
    counts = (picks[:, :, None] == np.arange(clusters)).sum(axis=1)
    factorials = np.array([math.factorial(k) for k in range(clusters + 1)], dtype=float)
    ways = factorials[clusters] / factorials[counts].prod(axis=1)
    return counts, ways / float(clusters) ** clusters, True


def studentised(
    estimate: float, se: float, t: Array, weights: Array, level: float
) -> tuple[float, float, float]:
    """Interval and two-sided p for 0 from bootstrap t values of given probabilities.

    p is at least twice the share of the rarest resample: so few clusters cannot show a p of 0.
    """
    order = np.argsort(t, kind="stable")
    t, shares = t[order], np.cumsum(weights[order]) / weights.sum()
    tail = (1 - level) / 2
    lower, upper = (t[min(int(np.searchsorted(shares, q)), len(t) - 1)] for q in (tail, 1 - tail))
    observed = estimate / se
    total = weights.sum()
    beyond = min(float(weights[order][t <= observed].sum()), float(weights[order][t >= observed].sum()))
    p = min(1.0, 2 * max(beyond, float(weights.min())) / float(total))
    return estimate - float(upper) * se, estimate - float(lower) * se, p


def wild_bootstrap(
    frame: pd.DataFrame,
    outcome: str,
    predictor: str,
    cluster: str = "seed",
    *,
    covariates: Sequence[str] = (),
    alternative: Alternative = "two-sided",
    draws: int = 99_999,
    seed: int = 0,
) -> WildBootstrap:
    """Wild cluster bootstrap-t for one coefficient of a least-squares fit, with the null imposed.

    The fit without `predictor` gives y0 and residuals u0; each resample is y* = y0 + w_g u0 with one of
    Webb's six weights +-sqrt(1/2), +-1, +-sqrt(3/2) for each cluster, and t* its coefficient over its
    cluster-robust standard error (the constant factor of CR1 cancels). p = share of t* at least as far out as
    t: over all 6^S weights where there are at most `draws`, else (1 + count) / (1 + draws).

    `frame` has one row a run. Raises `InputError` with fewer than 2 clusters, predictors that are not
    independent, or rows that are not usable (see `rows.used_rows`).
    Sources: Cameron, Gelbach and Miller 2008; Webb, Canadian Journal of Economics 2023.
    """
    rows = used_rows(frame, [outcome, predictor, *covariates], [cluster])
    members = memberships(rows[cluster])
    count = members.shape[1]
    others = np.column_stack([np.ones(len(rows)), rows[list(covariates)].to_numpy()])
    x, y = rows[predictor].to_numpy(), rows[outcome].to_numpy()
    if draws < 1:
        raise InputError("draws", draws, "must be 1 or more")
    if count < 2:
        raise InputError(cluster, f"{count} clusters", "give at least 2")
    design = np.column_stack([x, others])
    if np.linalg.matrix_rank(design) < design.shape[1]:
        raise InputError("predictors", [predictor, *covariates], "must vary and be linearly independent")
    fitted = others @ np.linalg.lstsq(others, y, rcond=None)[0]
    residuals = y - fitted
    if np.abs(residuals).max() <= ROUNDING * np.abs(y).max():
        raise InputError(
            outcome, "no residual variation", f"what is beside {predictor} explains it without error"
        )
    estimate, t = (float(value[0]) for value in _t_values(x, others, members, y[None]))
    exact = len(WEBB_WEIGHTS) ** count <= draws
    reached = drawn = 0
    for weights in _webb(count, draws, seed, exact):
        _, t_star = _t_values(x, others, members, fitted + weights @ members.T * residuals)
        # The resamples with one weight everywhere have the data's own t: rounding must not lose them.
        reached += int(_beyond(t_star, t, alternative, _SAME_T * abs(t)).sum())
        drawn += len(weights)
    p = reached / drawn if exact else (1 + reached) / (1 + drawn)
    return WildBootstrap(estimate, t, p, alternative, exact, drawn, count)


def _webb(clusters: int, draws: int, seed: int, exact: bool) -> list[Array]:
    """Weights of the clusters, resamples x clusters, in blocks."""
    if exact:
        grid = np.indices((len(WEBB_WEIGHTS),) * clusters).reshape(clusters, -1).T
    else:
        grid = np.random.default_rng(seed).integers(0, len(WEBB_WEIGHTS), size=(draws, clusters))
    return [WEBB_WEIGHTS[grid[start : start + BLOCK]] for start in range(0, len(grid), BLOCK)]


def _t_values(x: Array, others: Array, members: Array, y: Array) -> tuple[Array, Array]:
    """Coefficient of x given `others`, and over its cluster-robust error, for each row of y (many, runs).

    With x~ what `others` leave of x, b = x~'y / x~'x~ and se = sqrt(sum_g (x~_g'e_g)^2) / x~'x~.
    """
    q = np.linalg.qr(others)[0]
    left = x - q @ (q.T @ x)
    size = float(left @ left)
    y = y - y @ q @ q.T
    b = y @ left / size
    scores = ((y - b[:, None] * left) * left) @ members
    errors = np.sqrt((scores**2).sum(axis=1)) / size
    return b, b / errors


def _beyond(values: Array, observed: float, alternative: Alternative, rounding: float) -> NDArray[np.bool_]:
    if alternative == "greater":
        return values >= observed - rounding
    if alternative == "less":
        return values <= observed + rounding
    return np.abs(values) >= abs(observed) - rounding


def _finite(values: ArrayLike) -> Array:
    x = np.asarray(values, dtype=float)
    if x.ndim != 1 or len(x) < 2 or not np.isfinite(x).all():
        raise InputError("values", f"{x.size} numbers", "give at least 2 finite ones, one a cluster")
    return x
