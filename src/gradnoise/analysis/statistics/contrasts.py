"""Planned comparisons of two groups of arms, paired by seed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from gradnoise.analysis.statistics.rows import table_of_means
from gradnoise.analysis.statistics.student import Alternative, mean_over_clusters, sign_reading
from gradnoise.base.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Sequence

    import pandas as pd


@dataclass(frozen=True)
class Contrast:
    """Mean over clusters of one group of arms minus another, with its t test.

    `p` follows `alternative`; `low` and `high` are the two-sided interval at `level`; `differences` holds
    each complete cluster's; `incomplete` names the clusters left out because an arm is missing.
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
    differences: tuple[float, ...]
    incomplete: tuple[object, ...]

    @property
    def reading(self) -> str:
        """`above zero`, `below zero` or `undecided`: where the two-sided interval lies."""
        return sign_reading(self.low, self.high)


def contrast(
    frame: pd.DataFrame,
    outcome: str,
    arm: str,
    groups: tuple[Sequence[object], Sequence[object]],
    cluster: str = "seed",
    alternative: Alternative = "two-sided",
    level: float = 0.95,
) -> Contrast:
    """First group of arms minus second, one number a cluster, then a one-sample t over clusters.

    d_s = mean over arms of group 1 of y_(s, arm) - the same of group 2;  t = mean(d) / (sd(d) / sqrt(S)),
    df = S - 1. Every arm counts alike in its group; rows of one cluster and arm are averaged first. It needs
    no equal variances of arms, because each cluster gives one difference, and it is exact for normal ones.

    Raises `InputError` for an empty group or an arm named twice, with fewer than 2 complete clusters, when
    the differences do not vary, and for rows that are not usable (see `rows.used_rows`).
    """
    first, second = (list(group) for group in groups)
    names = [*first, *second]
    if not first or not second or len(set(names)) < len(names):
        raise InputError("groups", groups, "must be two groups of arms that share none")
    table, incomplete = table_of_means(frame, outcome, cluster, arm, wanted=names)
    values = table.to_numpy(dtype=float)
    differences = values[:, : len(first)].mean(axis=1) - values[:, len(first) :].mean(axis=1)
    scale = float(np.abs(values).max(initial=0))
    test = mean_over_clusters(differences, scale, "difference of the groups")
    low, high = test.interval((1 - level) / 2)
    return Contrast(
        estimate=test.estimate,
        se=test.se,
        df=int(test.df),
        t=test.estimate / test.se,
        p=test.p(alternative),
        low=low,
        high=high,
        level=level,
        alternative=alternative,
        differences=tuple(differences.tolist()),
        incomplete=incomplete,
    )
