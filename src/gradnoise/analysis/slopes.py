"""Slopes within seeds: the test that decides on a dose."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np

from gradnoise.base.errors import InputError

if TYPE_CHECKING:
    import pandas as pd

Alternative = Literal["greater", "less", "two-sided"]


@dataclass(frozen=True)
class Slope:
    """Mean of the seeds' slopes with its t test.

    `p` follows `alternative`; `low` and `high` are the two-sided interval at `level`; `slopes` and
    `intercepts` hold each seed's line; `flat` names the seeds that have none, because their runs
    share one value of the predictor.
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
        if self.low > 0:
            return "above zero"
        return "below zero" if self.high < 0 else "undecided"


def seed_slopes(
    frame: pd.DataFrame,
    outcome: str,
    predictor: str,
    alternative: Alternative = "two-sided",
    level: float = 0.95,
) -> Slope:
    """Least-squares slope of `outcome` on `predictor` in each seed, then a one-sample t over seeds.

    b_s = S_xy / S_xx within seed s;  t = mean(b) / (sd(b) / sqrt(S)),  df = S - 1. Exact for normal slopes
    at any S >= 2, also when seeds differ in slope; with balanced data it equals the test of the
    random-slope mixed model. `frame` has one row a run. Raises `InputError` with fewer than 2 slopes.
    """
    from scipy import stats

    slopes: dict[object, float] = {}
    intercepts: dict[object, float] = {}
    flat: list[object] = []
    runs = 0
    for name, rows in frame.groupby("seed", sort=True):
        x = rows[predictor].to_numpy(dtype=float)
        y = rows[outcome].to_numpy(dtype=float)
        # Equal doses that differ only by rounding are one dose.
        if np.ptp(x) <= 1e-9 * np.abs(x).max():
            flat.append(name)
            continue
        line = stats.linregress(x, y)
        slopes[name], intercepts[name] = float(line.slope), float(line.intercept)
        runs += len(x)
    if len(slopes) < 2:
        raise InputError("seed", f"{len(slopes)} slopes", "give at least 2 seeds with 2 doses each")
    values = np.array(list(slopes.values()))
    test = stats.ttest_1samp(values, 0.0, alternative=alternative)
    df = len(values) - 1
    se = float(values.std(ddof=1) / np.sqrt(len(values)))
    low, high = (values.mean() + sign * stats.t.isf((1 - level) / 2, df) * se for sign in (-1, 1))
    return Slope(
        estimate=float(values.mean()),
        se=se,
        df=df,
        t=float(test.statistic),
        p=float(test.pvalue),
        low=float(low),
        high=float(high),
        level=level,
        alternative=alternative,
        slopes=slopes,
        intercepts=intercepts,
        flat=tuple(flat),
        runs=runs,
    )
