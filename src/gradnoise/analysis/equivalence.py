"""Two one-sided tests (TOST): is a difference inside stated margins?"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from gradnoise.base.errors import InputError

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True)
class Tost:
    """Mean paired difference, first arm minus second, against the margins `low` < 0 < `high`.

    `p_low` tests difference <= low, `p_high` tests difference >= high, `p` is the larger of the two;
    `p_zero` is the two-sided test of no difference. `interval` has level 1 - 2 alpha, so it lies inside the
    margins exactly when p < alpha; `ci90` is the same at alpha = .05.

    `reading`: `inside margins` (p <= alpha), `outside zero` (p_zero <= alpha), `both`, or `undecided`.
    """

    difference: float
    se: float
    df: int
    p: float
    p_low: float
    p_high: float
    p_zero: float
    low: float
    high: float
    alpha: float
    interval: tuple[float, float]
    ci90: tuple[float, float]
    reading: str
    differences: tuple[float, ...]


def tost(
    frame: pd.DataFrame,
    outcome: str,
    arm: str,
    arms: tuple[object, object],
    cluster: str = "seed",
    *,
    low: float,
    high: float,
    alpha: float = 0.05,
) -> Tost:
    """Paired TOST on clusters: d_s = mean(arm a in s) - mean(arm b in s), df = S - 1.

    t_low = (mean(d) - low) / se,  t_high = (mean(d) - high) / se,  p = max(P(T > t_low), P(T < t_high)).
    Rows of one cluster and arm are averaged first: taking tasks or steps as replicates would find arms alike
    that are not. Clusters without both arms are left out. `low` and `high` are in the outcome's units; both
    must be given.

    Raises `InputError` unless low < high, two different arms exist, and at least 2 clusters have both.
    Source: Schuirmann, Journal of Pharmacokinetics and Biopharmaceutics 1987.
    """
    if not low < high:
        raise InputError("low", low, f"must be below high ({high})")
    if arms[0] == arms[1]:
        raise InputError("arms", arms, "must be two different arms")
    differences = paired_differences(frame, outcome, arm, arms, cluster)
    return _tost(differences, low, high, alpha)


def paired_differences(
    frame: pd.DataFrame, outcome: str, arm: str, arms: tuple[object, object], cluster: str
) -> tuple[float, ...]:
    """First arm minus second in each cluster that has both, in the order of the clusters' names."""
    means = frame.groupby([cluster, arm], sort=True)[outcome].mean().unstack(arm)
    for name in arms:
        if name not in means:
            raise InputError(arm, name, f"must be one of {sorted(map(str, means.columns))}")
    pairs = means[list(arms)].dropna()
    if len(pairs) < 2:
        raise InputError(cluster, f"{len(pairs)} pairs", "give at least 2 clusters with both arms")
    return tuple(float(value) for value in pairs[arms[0]] - pairs[arms[1]])


def _tost(differences: tuple[float, ...], low: float, high: float, alpha: float) -> Tost:
    from scipy import stats

    df = len(differences) - 1
    mean = float(np.mean(differences))
    se = float(np.std(differences, ddof=1) / np.sqrt(len(differences)))
    if se == 0:
        raise InputError("differences", mean, "do not vary between clusters, so they have no standard error")
    p_low = float(stats.t.sf((mean - low) / se, df))
    p_high = float(stats.t.cdf((mean - high) / se, df))
    p_zero = float(2 * stats.t.sf(abs(mean) / se, df))
    p = max(p_low, p_high)
    readings = {
        (True, False): "inside margins",
        (False, True): "outside zero",
        (True, True): "both",
        (False, False): "undecided",
    }

    def interval(tail: float) -> tuple[float, float]:
        half = float(stats.t.isf(tail, df)) * se
        return mean - half, mean + half

    return Tost(
        difference=mean,
        se=se,
        df=df,
        p=p,
        p_low=p_low,
        p_high=p_high,
        p_zero=p_zero,
        low=low,
        high=high,
        alpha=alpha,
        interval=interval(alpha),
        ci90=interval(0.05),
        reading=readings[p <= alpha, p_zero <= alpha],
        differences=differences,
    )


def tost_by_pingouin(differences: tuple[float, ...], low: float, high: float) -> float:
    """The same p from pingouin: the second path that every reported TOST is held against."""
    import pingouin

    # pingouin's margins are symmetrical, so the differences are moved to the middle of the margins.
    centred = np.array(differences) - (low + high) / 2
    test = pingouin.tost(centred, np.zeros_like(centred), bound=(high - low) / 2, paired=True)
    return float(test["pval"].iloc[0])
