"""Spearman's rank correlation of runs, within seeds and pooled."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from gradnoise.analysis.statistics.rows import used_rows
from gradnoise.analysis.statistics.student import ROUNDING, mean_over_clusters
from gradnoise.base.errors import InputError

if TYPE_CHECKING:
    import pandas as pd


# Variance of z(rho) for ranks of normal pairs, times n - 3: Fieller, Hartley and Pearson, Biometrika 1957.
_FIELLER = 1.06


@dataclass(frozen=True)
class Spearman:
    """Rank correlation within clusters, and pooled over all runs.

    `rho`, `low`, `high`: mean over clusters by Fisher's z with its t(S - 1) interval at `level`; `p` tests a
    mean of 0, two-sided. `by_cluster`: each cluster's rho; `flat`: clusters that have none. `pooled_rho` with
    `pooled_low` and `pooled_high` (Bonett-Wright) takes all runs as independent, which runs of one seed are
    not: it is a description.
    """

    rho: float
    low: float
    high: float
    p: float
    df: int
    level: float
    by_cluster: Mapping[object, float]
    flat: tuple[object, ...]
    pooled_rho: float
    pooled_low: float
    pooled_high: float
    runs: int


def spearman(
    frame: pd.DataFrame, outcome: str, predictor: str, cluster: str = "seed", level: float = 0.95
) -> Spearman:
    """Spearman's rho of `outcome` and `predictor` in each cluster, averaged as z = artanh(rho).

    rho = tanh(mean(z)), its interval tanh(mean(z) +- t(S - 1) sd(z) / sqrt(S)). Ties share their mean rank.
    A cluster of n runs in perfect order has no z; its rho is taken half a step below 1, that is
    1 - 6 / (n (n^2 - 1)), half of what swapping two neighbours costs. `frame` has one row a run.

    Raises `InputError` with fewer than 2 clusters of 4 or more runs that vary, with equal z in all of
    them, or rows that are not usable (see `rows.used_rows`).
    Source of the pooled interval: Bonett and Wright, Psychometrika 2000.
    """
    from scipy import stats

    rows = used_rows(frame, [outcome, predictor], [cluster])
    found: dict[object, float] = {}
    transformed: list[float] = []
    flat: list[object] = []
    for name, group in rows.groupby(cluster, sort=True, observed=True):
        x, y = group[predictor].to_numpy(), group[outcome].to_numpy()
        if len(x) < 4 or np.ptp(x) == 0 or np.ptp(y) == 0:
            flat.append(name)
            continue
        found[name] = float(stats.spearmanr(x, y).statistic)
        most = 1 - 6 / (len(x) * (len(x) ** 2 - 1))
        transformed.append(float(np.arctanh(np.clip(found[name], -most, most))))
    if len(found) < 2:
        raise InputError(cluster, f"{len(found)} correlations", "give at least 2 clusters of 4 varying runs")
    test = mean_over_clusters(transformed, 1.0, f"rank correlation with {predictor}")
    low, high = np.tanh(test.interval((1 - level) / 2))
    pooled = float(stats.spearmanr(rows[predictor], rows[outcome]).statistic)
    intervals = spearman_intervals(pooled, len(rows), level)
    return Spearman(
        rho=float(np.tanh(test.estimate)),
        low=float(low),
        high=float(high),
        p=test.p(),
        df=int(test.df),
        level=level,
        by_cluster=found,
        flat=tuple(flat),
        pooled_rho=pooled,
        pooled_low=intervals["bonett_wright"][0],
        pooled_high=intervals["bonett_wright"][1],
        runs=len(rows),
    )


def spearman_intervals(rho: float, n: int, level: float = 0.95) -> dict[str, tuple[float, float]]:
    """Three normal intervals for the rho of n independent pairs: tanh(artanh(rho) +- z sqrt(v)).

    v: fisher 1 / (n - 3), which is too narrow for ranks; bonett_wright (1 + rho^2 / 2) / (n - 3); fieller
    1.06 / (n - 3). Raises `InputError` with n < 4 or for a rho that is no correlation.
    """
    from scipy import stats

    if n < 4:
        raise InputError("n", n, "give at least 4 pairs")
    if not -1 <= rho <= 1:
        raise InputError("rho", rho, "must lie between -1 and 1")
    variances = {"fisher": 1.0, "bonett_wright": 1 + rho**2 / 2, "fieller": _FIELLER}
    quantile = float(stats.norm.isf((1 - level) / 2))
    # At rho = 1 the transform is infinite and so is the interval's end: it stays at 1.
    centre = np.arctanh(np.clip(rho, -1 + ROUNDING, 1 - ROUNDING))
    return {
        name: tuple(np.tanh(centre + sign * quantile * np.sqrt(v / (n - 3))).tolist() for sign in (-1, 1))
        for name, v in variances.items()
    }
