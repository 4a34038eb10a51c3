"""From exposure through a mediator to the outcome: exploratory, because no mediator is randomised."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np
from numpy.typing import NDArray

from gradnoise.analysis.statistics.resampling import resamples, studentised
from gradnoise.analysis.statistics.rows import used_rows
from gradnoise.analysis.statistics.student import ROUNDING
from gradnoise.base.errors import InputError

if TYPE_CHECKING:
    import pandas as pd

Array = NDArray[np.float64]

# Predictor and mediator that leave each other this share of their variation, or less, are one thing.
_ALIKE = 1e-9


@dataclass(frozen=True)
class Path:
    """A coefficient and its least-squares standard error."""

    estimate: float
    se: float


@dataclass(frozen=True)
class Mediation:
    """Paths within clusters. `label` says what the result is.

    `a`: predictor to mediator; `b`: mediator to outcome *given the predictor*; `total`: predictor to outcome;
    `direct`: the same given the mediator; `indirect` = a b = total - direct, with its seed-bootstrap-t
    interval `low` to `high` at `level`, its p for 0, its jackknife error `se` and Sobel's `sobel_se`.
    `rho_at_zero`: correlation of the two equations' errors, as an unmeasured common cause would make, at
    which the indirect effect would be 0; near 0 means that little hidden confounding explains it away.
    """

    a: Path
    b: Path
    total: Path
    direct: Path
    indirect: float
    se: float
    sobel_se: float
    low: float
    high: float
    p: float
    level: float
    rho_at_zero: float
    exact: bool
    clusters: int
    runs: int
    label: Literal["exploratory"] = "exploratory"


def mediation(
    frame: pd.DataFrame,
    outcome: str,
    predictor: str,
    mediator: str,
    cluster: str = "seed",
    *,
    level: float = 0.95,
    draws: int = 99_999,
    seed: int = 0,
) -> Mediation:
    """Mediation by two linear models, each with one intercept a cluster.

    mediator = i_s + a x,  outcome = j_s + c' x + b mediator,  outcome = k_s + c x;  indirect = a b = c - c'.
    Interval: clusters are resampled, and t* = (ab* - ab) / se* with the delete-one-cluster jackknife error in
    each resample. With e1, e2 the residuals of outcome and mediator on x, the indirect effect vanishes where
    the errors correlate by rho = corr(e1, e2). It means cause only if, given x, nothing drives both mediator
    and outcome, which no such data can show.

    pingouin's path "Y ~ M" is without the predictor, so it is not this b, and its bootstrap draws runs as if
    they shared no seed. `frame` has one row a run. Raises `InputError` with fewer than 3 clusters, paths that
    the runs do not determine, or rows that are not usable (see `rows.used_rows`).
    Source: Imai, Keele and Yamamoto, Statistical Science 2010.
    """
    names = [predictor, mediator, outcome]
    rows = used_rows(frame, names, [cluster])
    groups = [group[names].to_numpy() for _, group in rows.groupby(cluster, sort=True, observed=True)]
    if len(groups) < 3:
        raise InputError(cluster, f"{len(groups)} clusters", "give at least 3")
    # Each cluster's sums of squares and products about its own means: all that the paths depend on.
    products = np.array([(z - z.mean(axis=0)).T @ (z - z.mean(axis=0)) for z in groups])
    left = len(rows) - len(groups)
    whole = products.sum(axis=0)
    _check(whole, rows[names].abs().max().to_numpy(), left, names)
    paths, rho = _paths(whole, left)
    a, b, total, direct = paths
    indirect = a.estimate * b.estimate
    se = float(_jackknife(products, np.ones((1, len(groups)), dtype=int))[1][0])
    if not se > ROUNDING * abs(indirect):
        raise InputError(
            cluster, "indirect effect", "does not vary between clusters: it has no standard error"
        )
    counts, weights, exact = resamples(len(groups), draws, seed)
    effects, errors = _jackknife(products, counts)
    kept = ((counts > 0).sum(axis=1) > 1) & (errors > ROUNDING * se)
    low, high, p = studentised(indirect, se, (effects[kept] - indirect) / errors[kept], weights[kept], level)
    return Mediation(
        a=a,
        b=b,
        total=total,
        direct=direct,
        indirect=indirect,
        se=se,
        sobel_se=float(np.hypot(a.estimate * b.se, b.estimate * a.se)),
        low=low,
        high=high,
        p=p,
        level=level,
        rho_at_zero=rho,
        exact=exact,
        clusters=len(groups),
        runs=len(rows),
    )


def _paths(products: Array, left: int) -> tuple[tuple[Path, Path, Path, Path], float]:
    """a, b, total and direct, and corr(e1, e2); `left` runs are free of the clusters' intercepts."""
    xx, xm, xy, mm, my, yy = (float(products[i, j]) for i, j in zip(*np.triu_indices(3), strict=True))
    mm_x, my_x, yy_x = mm - xm**2 / xx, my - xm * xy / xx, yy - xy**2 / xx
    b = my_x / mm_x
    residual = (yy_x - b * my_x) / (left - 2)
    a, total = xm / xx, xy / xx
    return (
        Path(a, float(np.sqrt(mm_x / (left - 1) / xx))),
        Path(b, float(np.sqrt(residual / mm_x))),
        Path(total, float(np.sqrt(yy_x / (left - 1) / xx))),
        Path(total - a * b, float(np.sqrt(residual * mm / (xx * mm_x)))),
    ), float(my_x / np.sqrt(mm_x * yy_x))


def _jackknife(products: Array, counts: NDArray[np.int64]) -> tuple[Array, Array]:
    """a b of each resample, and its delete-one-cluster jackknife error (S - 1) / S sum (ab_(-s) - mean)^2."""
    sums = np.tensordot(counts, products, axes=1)
    # A cluster that was drawn k times is deleted k times, one at a time.
    without = np.where(counts > 0, _indirect(sums[:, None] - products), 0.0)
    clusters = len(products)
    middle = (counts * without).sum(axis=1, keepdims=True) / clusters
    squares = (counts * (without - middle) ** 2).sum(axis=1)
    return _indirect(sums), np.sqrt((clusters - 1) / clusters * squares)


def _indirect(products: Array) -> Array:
    xx, xm, xy = products[..., 0, 0], products[..., 0, 1], products[..., 0, 2]
    mm, my = products[..., 1, 1], products[..., 1, 2]
    # A resample whose clusters do not determine the paths has none: its NaN is left out by the caller. What
    # rounding leaves of a cluster that was taken out is no variation.
    determinant = mm * xx - xm**2
    there = (xx > _ALIKE * xx.max()) & (determinant > _ALIKE * mm * xx)
    b = (my * xx - xm * xy) / np.where(there, determinant, np.nan)
    return np.asarray(xm / np.where(there, xx, np.nan) * b)


def _check(products: Array, sizes: Array, left: int, names: list[str]) -> None:
    """Refuse runs that do not determine the paths or leave no error to judge them by."""
    if left < 4:
        raise InputError("rows", f"{left} runs beyond one a cluster", "give at least 4")
    spread = np.sqrt(np.diag(products))
    for name, size, variation in zip(names, sizes, spread, strict=True):
        if variation <= 1e-9 * size:
            raise InputError(name, "one value in each cluster", "must vary within clusters")
    correlation = products / np.outer(spread, spread)
    if np.linalg.eigvalsh(correlation[:2, :2])[0] < 1e-9 or np.linalg.eigvalsh(correlation)[0] < ROUNDING:
        raise InputError(
            names[1], "determined by the others", "predictor, mediator, outcome must be independent"
        )
