"""Power of t tests and TOST on one number a cluster."""

from __future__ import annotations

from gradnoise.analysis.statistics.student import Alternative
from gradnoise.base.errors import InputError


def t_power(
    clusters: int,
    difference: float,
    sd: float,
    alternative: Alternative = "two-sided",
    alpha: float = 0.05,
    paired: bool = True,
) -> float:
    """Power of a t test at a true `difference` (statsmodels).

    Paired (or for slopes: one number a cluster): `sd` is that of the numbers, df = S - 1. Unpaired: `sd` is
    that within each of two groups of `clusters`, df = 2 (S - 1). Raises `InputError` with fewer than 2
    clusters or a sd that is not positive.
    """
    from statsmodels.stats.power import TTestIndPower, TTestPower

    _check(clusters, sd)
    sides = {"two-sided": "two-sided", "greater": "larger", "less": "smaller"}[alternative]
    test = TTestPower() if paired else TTestIndPower()
    return float(test.power(difference / sd, clusters, alpha, alternative=sides))


def tost_power(
    clusters: int, low: float, high: float, sd: float, difference: float = 0.0, alpha: float = 0.05
) -> float:
    """Power of the paired TOST to find a true `difference` inside the margins; `sd` of the differences.

    With se = sd / sqrt(S), s ~ chi(S - 1) / sqrt(S - 1) and t the upper alpha point of t(S - 1), the
    estimate must fall in (low + t s se, high - t s se):
    E_s[max(0, Phi((high - difference) / se - t s) - Phi((low - difference) / se + t s))].
    The usual shortcut with two noncentral t tails is below 0 where few clusters make that range close.
    Raises `InputError` unless low < high, with fewer than 2 clusters, or a sd that is not positive.
    """
    import numpy as np
    from scipy import integrate, stats

    _check(clusters, sd)
    if not low < high:
        raise InputError("low", low, f"must be below high ({high})")
    df, se = clusters - 1, sd / np.sqrt(clusters)
    t = stats.t.isf(alpha, df)

    def found(s: float) -> float:
        inside = stats.norm.cdf((high - difference) / se - t * s) - stats.norm.cdf(
            (low - difference) / se + t * s
        )
        return float(inside * stats.chi.pdf(s * np.sqrt(df), df) * np.sqrt(df))

    # Beyond `closed` no estimate is inside; beyond `rare` s itself does not occur.
    closed = (high - low) / (2 * t * se)
    rare = stats.chi.isf(1e-14, df) / np.sqrt(df)
    value, _ = integrate.quad(found, 0, min(closed, rare), epsabs=1e-13, epsrel=1e-12, limit=200)
    # Quadrature may end a rounding above 1.
    return min(1.0, float(value))


def _check(clusters: int, sd: float) -> None:
    if clusters < 2:
        raise InputError("clusters", clusters, "give at least 2")
    if not sd > 0:
        raise InputError("sd", sd, "must be above 0")
