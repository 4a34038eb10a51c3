"""Two one-sided tests (TOST): is a difference inside stated margins?"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from gradnoise.analysis.statistics.rows import table_of_means
from gradnoise.analysis.statistics.student import mean_over_clusters
from gradnoise.base.errors import InputError

if TYPE_CHECKING:
    import pandas as pd

# By its name: a 90 % interval leaves 5 % beyond each end. No analysis may choose another.
_CI90_TAIL = 0.05


@dataclass(frozen=True)
class Tost:
    """Mean paired difference, first arm minus second, against the margins `low` < `high`.

    `p_low` tests difference <= low, `p_high` tests difference >= high, `p` is the larger of the two;
    `p_zero` is the two-sided test of no difference. `interval` has level 1 - 2 alpha, so it lies inside the
    margins exactly when p < alpha; `ci90` is the same at alpha = .05. `incomplete`: clusters left out because
    an arm is missing.

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
    incomplete: tuple[object, ...]


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
    must be given. For several pairs of arms, "all alike" needs every p (their maximum, no correction), and
    "which are alike" needs `holm`.

    Raises `InputError` unless low < high, two different arms exist, at least 2 clusters have both, their
    differences vary, and the rows are usable (see `rows.used_rows`).
    Source: Schuirmann, Journal of Pharmacokinetics and Biopharmaceutics 1987.
    """
    if not low < high:
        raise InputError("low", low, f"must be below high ({high})")
    if arms[0] == arms[1]:
        raise InputError("arms", arms, "must be two different arms")
    pairs, incomplete = table_of_means(frame, outcome, cluster, arm, wanted=arms)
    values = pairs.to_numpy(dtype=float)
    differences = values[:, 0] - values[:, 1]
    test = mean_over_clusters(differences, float(np.abs(values).max(initial=0)), "difference of the arms")
    p_low, p_high = test.p("greater", null=low), test.p("less", null=high)
    p, p_zero = max(p_low, p_high), test.p()
    readings = {
        (True, False): "inside margins",
        (False, True): "outside zero",
        (True, True): "both",
        (False, False): "undecided",
    }
    return Tost(
        difference=test.estimate,
        se=test.se,
        df=int(test.df),
        p=p,
        p_low=p_low,
        p_high=p_high,
        p_zero=p_zero,
        low=low,
        high=high,
        alpha=alpha,
        interval=test.interval(alpha),
        ci90=test.interval(_CI90_TAIL),
        reading=readings[p <= alpha, p_zero <= alpha],
        differences=tuple(differences.tolist()),
        incomplete=incomplete,
    )


def tost_by_pingouin(differences: tuple[float, ...], low: float, high: float) -> float:
    """The same p from pingouin: the second path that every reported TOST is held against."""
    import pingouin

    # pingouin's margins are symmetrical, so the differences are moved to the middle of the margins.
    centred = np.array(differences) - (low + high) / 2
    test = pingouin.tost(centred, np.zeros_like(centred), bound=(high - low) / 2, paired=True)
    return float(test["pval"].iloc[0])
