"""Slopes within seeds: the test that decides on a dose."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from gradnoise.analysis.statistics.rows import used_rows
from gradnoise.analysis.statistics.student import ROUNDING, Alternative, mean_over_clusters, sign_reading
from gradnoise.base.errors import InputError

if TYPE_CHECKING:
    import pandas as pd

# Share of its size up to which a measured dose is taken for the same one.
_SAME_DOSE = 1e-9


@dataclass(frozen=True)
class Slope:
    """Mean of the clusters' slopes with its t test.

    `p` follows `alternative`; `low` and `high` are the two-sided interval at `level`; `slopes` and
    `intercepts` hold each cluster's line; `flat` names the clusters that have none, because their runs
    do not differ in the predictor enough to fit one.
    """

    estimate: float
    se: float
    df: int
    t: float
    p: float
    low: float
    high: float
    level: float
    alternative: Alternative
    slopes: Mapping[object, float]
    intercepts: Mapping[object, float]
    flat: tuple[object, ...]
    runs: int

    @property
    def reading(self) -> str:
        """`above zero`, `below zero` or `undecided`: where the two-sided interval lies."""
        return sign_reading(self.low, self.high)


def seed_slopes(
    frame: pd.DataFrame,
    outcome: str,
    predictor: str,
    alternative: Alternative = "two-sided",
    level: float = 0.95,
    *,
    covariates: Sequence[str] = (),
    cluster: str = "seed",
) -> Slope:
    """Least-squares slope of `outcome` on `predictor` in each cluster, then a one-sample t over clusters.

    b_s = S_xy / S_xx within cluster s;  t = mean(b) / (sd(b) / sqrt(S)),  df = S - 1. Exact for normal slopes
    at any S >= 2, also when clusters differ in slope; with balanced data it equals the test of the
    random-slope mixed model. With `covariates` each cluster's fit holds them too, and its intercept is at
    their means over all runs. `frame` has one row a run. Raises `InputError` with fewer than 2 slopes, slopes
    that do not vary, or rows that are not usable (see `rows.used_rows`).
    """
    names = [predictor, *covariates]
    rows = used_rows(frame, [outcome, *names], [cluster])
    middle = np.array([0.0, *rows[list(covariates)].mean()])
    slopes: dict[object, float] = {}
    intercepts: dict[object, float] = {}
    flat: list[object] = []
    runs = 0
    for name, group in rows.groupby(cluster, sort=True, observed=True):
        line = _line(group[names].to_numpy(), group[outcome].to_numpy(), middle)
        if line is None:
            flat.append(name)
            continue
        intercepts[name], slopes[name] = line
        runs += len(group)
    if len(slopes) < 2:
        raise InputError(cluster, f"{len(slopes)} slopes", "give at least 2 seeds with 2 doses each")
    values = np.array(list(slopes.values()))
    # The slope that the largest outcome would make by itself.
    scale = float(rows[outcome].abs().max() / np.ptp(rows[predictor].to_numpy()))
    test = mean_over_clusters(values, scale, f"slope on {predictor}")
    low, high = test.interval((1 - level) / 2)
    return Slope(
        estimate=test.estimate,
        se=test.se,
        df=int(test.df),
        t=test.estimate / test.se,
        p=test.p(alternative),
        low=low,
        high=high,
        level=level,
        alternative=alternative,
        slopes=slopes,
        intercepts=intercepts,
        flat=tuple(flat),
        runs=runs,
    )


def _line(x: np.ndarray, y: np.ndarray, middle: np.ndarray) -> tuple[float, float] | None:
    """Intercept at `middle` and slope on the first column; None if the columns do not determine it."""
    centre = x.mean(axis=0)
    deviations = x - centre
    spread = np.abs(deviations).max(axis=0)
    # Equal doses that differ only by rounding are one dose.
    if (spread <= _SAME_DOSE * np.abs(x).max(axis=0)).any():
        return None
    slopes, _, rank, _ = np.linalg.lstsq(deviations / spread, y - y.mean(), rcond=ROUNDING)
    if rank < x.shape[1]:
        return None
    slopes = slopes / spread
    return float(y.mean() + (middle - centre) @ slopes), float(slopes[0])
