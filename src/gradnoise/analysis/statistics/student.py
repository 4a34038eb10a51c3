"""The t test on one number a cluster, which every deciding test comes down to."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike

from gradnoise.base.errors import InputError

Alternative = Literal["greater", "less", "two-sided"]

# Numbers that agree to this share of the outcome's size differ by rounding alone.
ROUNDING = 1e-12


@dataclass(frozen=True)
class Student:
    """An estimate with its standard error and degrees of freedom."""

    estimate: float
    se: float
    df: float

    def p(self, alternative: Alternative = "two-sided", null: float = 0.0) -> float:
        """p of "the estimate is `null`", from t = (estimate - null) / se."""
        from scipy import stats

        t = (self.estimate - null) / self.se
        if alternative == "two-sided":
            return float(2 * stats.t.sf(abs(t), self.df))
        return float(stats.t.sf(t, self.df) if alternative == "greater" else stats.t.cdf(t, self.df))

    def interval(self, tail: float) -> tuple[float, float]:
        """Interval that leaves the share `tail` beyond each end: (1 - level) / 2.

        Raises `InputError` unless that leaves something in between.
        """
        from scipy import stats

        if not 0 < 2 * tail < 1:
            raise InputError("level", f"{1 - 2 * tail:g}", "must lie between 0 and 1")
        half = float(stats.t.isf(tail, self.df)) * self.se
        return self.estimate - half, self.estimate + half


def mean_over_clusters(values: ArrayLike, scale: float, field: str) -> Student:
    """Mean of one number a cluster, se = sd / sqrt(S), df = S - 1.

    Exact for normal numbers at any S >= 2. `scale`: size of the outcomes that the numbers were taken from.
    Raises `InputError`, naming `field`, with fewer than 2 numbers or when they are equal up to rounding:
    there is then no standard error, and a p of 0 would be an accident.
    """
    x = np.asarray(values, dtype=float)
    if len(x) < 2:
        raise InputError(field, f"{len(x)} clusters", "give at least 2")
    sd = float(x.std(ddof=1))
    if sd <= ROUNDING * scale:
        raise InputError(field, float(x.mean()), "does not vary between clusters: it has no standard error")
    return Student(float(x.mean()), sd / float(np.sqrt(len(x))), len(x) - 1)


def sign_reading(low: float, high: float) -> str:
    """`above zero`, `below zero` or `undecided`: where an interval lies."""
    if low > 0:
        return "above zero"
    return "below zero" if high < 0 else "undecided"
