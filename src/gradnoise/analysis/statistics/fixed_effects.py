"""Estimates and tests of a mixed model's fixed effects, with Kenward and Roger's standard errors and df."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from gradnoise.analysis.statistics.kenward_roger import KenwardRoger
from gradnoise.analysis.statistics.reml import FitError
from gradnoise.analysis.statistics.student import Student
from gradnoise.base.errors import InputError

Array = NDArray[np.float64]

# By its name: a 90 % interval leaves 5 % beyond each end. No analysis may choose another.
_CI90_TAIL = 0.05


@dataclass(frozen=True)
class Term:
    """A fixed effect, or a linear combination of them, in units of the outcome per unit of the predictor.

    `se` is adjusted for small samples, `se_unadjusted` is the plain REML one. t = estimate / se has `df`
    degrees of freedom (Kenward-Roger); `p` is two-sided; `low` and `high` are the interval at `level`.
    """

    estimate: float
    se: float
    se_unadjusted: float
    df: float
    t: float
    p: float
    low: float
    high: float
    level: float


@dataclass(frozen=True)
class WaldTest:
    """All of `names` are 0: F = `scale` x Wald statistic / `numerator_df`, scale and df by Kenward-Roger."""

    names: tuple[str, ...]
    f: float
    numerator_df: int
    denominator_df: float
    scale: float
    p: float


@dataclass(frozen=True)
class Equivalence:
    """A linear combination of fixed effects against the margins `low` < `high`, by two one-sided t tests.

    `p_low` tests estimate <= low, `p_high` tests estimate >= high, `p` is the larger of the two; `p_zero` is
    the two-sided test of 0. `interval` has level 1 - 2 alpha; `ci90` is the same at alpha = .05. `reading` as
    in `equivalence.Tost`: `inside margins`, `outside zero`, `both` or `undecided`.
    """

    estimate: float
    se: float
    df: float
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


def linear_combination(beta: Array, errors: KenwardRoger, weights: Array, level: float) -> Term:
    """weights @ beta with its t test; se^2 = w' Phi_A w, df by Kenward and Roger for one contrast."""
    student = _student(beta, errors, weights)
    low, high = student.interval((1 - level) / 2)
    return Term(
        estimate=student.estimate,
        se=student.se,
        se_unadjusted=float(np.sqrt(weights @ errors.covariance @ weights)),
        df=student.df,
        t=student.estimate / student.se,
        p=student.p(),
        low=low,
        high=high,
        level=level,
    )


def wald_test(beta: Array, errors: KenwardRoger, rows: Array, names: tuple[str, ...]) -> WaldTest:
    """F test of rows @ beta = 0; raises `FitError` where too few clusters leave the F no distribution."""
    from scipy import stats

    f, df, scale = errors.f_test(rows, beta)
    if not (df > 0 and scale > 0):
        raise FitError(f"{', '.join(names)}: too few clusters for an F test of {len(rows)} coefficients")
    return WaldTest(names, f, len(rows), df, scale, float(stats.f.sf(f, len(rows), df)))


def two_one_sided_tests(
    beta: Array, errors: KenwardRoger, weights: Array, low: float, high: float, alpha: float
) -> Equivalence:
    """t_low = (w' beta - low) / se, t_high = (w' beta - high) / se, p = max(P(T > t_low), P(T < t_high))."""
    if not low < high:
        raise InputError("low", low, f"must be below high ({high})")
    if not 0 < alpha < 0.5:
        raise InputError("alpha", alpha, "must lie between 0 and 0.5")
    student = _student(beta, errors, weights)
    p_low, p_high = student.p("greater", null=low), student.p("less", null=high)
    p, p_zero = max(p_low, p_high), student.p()
    readings = {
        (True, False): "inside margins",
        (False, True): "outside zero",
        (True, True): "both",
        (False, False): "undecided",
    }
    return Equivalence(
        estimate=student.estimate,
        se=student.se,
        df=student.df,
        p=p,
        p_low=p_low,
        p_high=p_high,
        p_zero=p_zero,
        low=low,
        high=high,
        alpha=alpha,
        interval=student.interval(alpha),
        ci90=student.interval(_CI90_TAIL),
        reading=readings[p <= alpha, p_zero <= alpha],
    )


def _student(beta: Array, errors: KenwardRoger, weights: Array) -> Student:
    _, df, _ = errors.f_test(weights[None, :], beta)
    return Student(float(weights @ beta), float(np.sqrt(weights @ errors.adjusted @ weights)), df)
