"""Every kind of test of a plan once more, from the runs that are compared, by other means than the analysis.

Each function gives what an entry of `tests` must hold. `Unable`: the test cannot be carried out.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from gradnoise.provenance.audit.dense_mixed import Certificate, certify, covariance, optimum
from gradnoise.registration.kinds import COVARIATE

if TYPE_CHECKING:
    import pandas as pd

    from gradnoise.registration.kinds import AnovaTest, ContrastTest, MixedTest, SlopeTest, TostTest
    from gradnoise.registration.plan import Plan

Array = NDArray[np.float64]
Entry = dict[str, Any]

# Numbers that agree to this share of the outcome's size differ by rounding alone.
ROUNDING = 1e-12
_SAME_DOSE = 1e-9
# Log-likelihood per natural unit of a covariance by which a reported fit may miss the optimum, and the
# smallest variance in natural units that is surely not zero.
_STATIONARY, _SURELY = 1e-3, 1e-3


class Unable(Exception):
    """These runs do not allow the test."""


def sign(low: float, high: float) -> str:
    """What an interval says about zero."""
    return "above zero" if low > 0 else "below zero" if high < 0 else "undecided"


def one_sample(values: Sequence[float] | Array, scale: float, alternative: str, level: float) -> Entry:
    """Mean of one number a seed with its t test (scipy); `scale`: size of what the numbers came from."""
    from scipy import stats

    if len(values) < 2 or np.std(values, ddof=1) <= ROUNDING * scale:
        raise Unable("too few seeds, or no variation between them")
    test = stats.ttest_1samp(values, 0.0, alternative=alternative)
    ends = stats.ttest_1samp(values, 0.0).confidence_interval(level)
    return {
        "estimate": float(np.mean(values)),
        "stderr": float(stats.sem(values)),
        "df": len(values) - 1,
        "p": float(test.pvalue),
        "low": float(ends.low),
        "high": float(ends.high),
        "t": float(test.statistic),
    }


def seed_lines(frame: pd.DataFrame, score: str, predictor: str) -> tuple[dict[int, tuple[float, float]], int]:
    """(slope, intercept) of each seed whose doses differ, by polynomial least squares; how many do not."""
    lines: dict[int, tuple[float, float]] = {}
    flat = 0
    for seed in sorted(set(frame["seed"])):
        rows = frame[frame["seed"] == seed]
        x, y = rows[predictor].to_numpy(dtype=float), rows[score].to_numpy(dtype=float)
        if np.abs(x - x.mean()).max() <= _SAME_DOSE * np.abs(x).max():
            flat += 1
            continue
        slope, level = np.polyfit(x - x.mean(), y, 1)
        lines[int(seed)] = (float(slope), float(level - slope * x.mean()))
    return lines, flat


def slope(plan: Plan, test: SlopeTest, frame: pd.DataFrame) -> Entry:
    """Slopes within seeds."""
    score = plan.outcome(test.outcome).score
    lines, flat = seed_lines(frame, score, test.predictor)
    slopes = [line[0] for line in lines.values()]
    doses = frame[test.predictor].to_numpy(dtype=float)
    scale = float(frame[score].abs().max() / np.ptp(doses)) if len(lines) else 0.0
    found = one_sample(slopes, scale, test.alternative, plan.intervals.level)
    details = {"alternative": test.alternative, "t": found.pop("t"), "predictor": test.predictor}
    details |= {"slopes": slopes, "seeds_without_slope": flat}
    runs = int(frame["seed"].isin(list(lines)).sum())
    level = plan.intervals.level
    reading = sign(found["low"], found["high"])
    return found | {"outcome": reading, "level": level, "runs": runs, "seeds": len(lines), "details": details}


def table(frame: pd.DataFrame, score: str, cells: Sequence[str]) -> Array:
    """Seeds x cells of those seeds that have a run in every one of the cells."""
    wide = frame.pivot_table(index="seed", columns="cell", values=score, aggfunc="mean")
    wide = wide.reindex(columns=list(cells)).dropna()
    return np.asarray(wide.to_numpy(dtype=float))


def contrast(plan: Plan, test: ContrastTest, frame: pd.DataFrame) -> Entry:
    """Differences between two groups of cells, one a seed."""
    cells = [*test.first, *test.second]
    values = table(frame, plan.outcome(test.outcome).score, cells)
    weights = np.repeat([1 / len(test.first), -1 / len(test.second)], [len(test.first), len(test.second)])
    apart = (values @ weights).tolist()
    scale = float(np.abs(values).max(initial=0))
    found = one_sample(apart, scale, test.alternative, plan.intervals.level)
    del found["t"]
    details = {"alternative": test.alternative, "differences": apart}
    counts = {"runs": len(apart) * len(cells), "seeds": len(apart)}
    reading = sign(found["low"], found["high"])
    return found | counts | {"outcome": reading, "level": plan.intervals.level, "details": details}


def tost(plan: Plan, test: TostTest, frame: pd.DataFrame) -> Entry:
    """Two one-sided tests (statsmodels); the interval has level 1 - 2 alpha."""
    from scipy import stats
    from statsmodels.stats.weightstats import ttost_paired

    values = table(frame, plan.outcome(test.outcome).score, test.arms)
    alpha = plan.reading_alpha
    apart = (values[:, 0] - values[:, 1]).tolist()
    found = one_sample(apart, float(np.abs(values).max(initial=0)), "two-sided", 1 - 2 * alpha)
    p, (_, p_low, _), (_, p_high, _) = ttost_paired(values[:, 0], values[:, 1], test.low, test.high)
    p_zero = float(stats.ttest_rel(values[:, 0], values[:, 1]).pvalue)
    words = {
        (True, False): "inside margins",
        (False, True): "outside zero",
        (True, True): "both",
        (False, False): "undecided",
    }
    del found["t"]
    return found | {
        "outcome": words[bool(p <= alpha), bool(p_zero <= alpha)],
        "p": float(p),
        "level": round(1 - 2 * alpha, 12),
        "runs": 2 * len(apart),
        "seeds": len(apart),
        "details": {
            "arms": list(test.arms),
            "margin_low": test.low,
            "margin_high": test.high,
            "p_low": float(p_low),
            "p_high": float(p_high),
            "p_zero": p_zero,
            "p_by_pingouin": float(p),
            "differences": apart,
        },
    }


def anova(plan: Plan, test: AnovaTest, frame: pd.DataFrame) -> Entry:
    """Type III sums of squares as differences of nested fits, with orthonormal contrasts; HC3 by Wald."""
    from scipy import stats

    y = frame[plan.outcome(test.outcome).score].to_numpy(dtype=float)
    columns: dict[str, Array] = {test.block: _contrasts(frame[test.block].to_numpy())}
    for name in test.factors:
        own = _contrasts(frame[name].to_numpy())
        crossed = {
            f"{term}:{name}": _products(part, own) for term, part in columns.items() if term != test.block
        }
        columns |= {name: own, **crossed}
    x = np.column_stack([np.ones(len(y)), *columns.values()])
    left = len(y) - x.shape[1]
    if left < 1 or np.linalg.matrix_rank(x) < x.shape[1]:
        raise Unable("the runs do not determine the model")
    residuals = y - x @ np.linalg.lstsq(x, y, rcond=None)[0]
    rest = float(residuals @ residuals)
    if rest <= len(y) * (ROUNDING * float(np.abs(y).max())) ** 2:
        raise Unable("no residual variation")
    inverse = np.linalg.pinv(x)
    beta, leverage = inverse @ y, np.einsum("ij,ji->i", x, inverse)
    whole = leverage.max() > 1 - 1e-9
    robust = None if whole else (inverse * (residuals / (1 - leverage)) ** 2) @ inverse.T
    terms, start = {}, 1
    for term, part in columns.items():
        df, place = part.shape[1], slice(start, start + part.shape[1])
        start += df
        without = np.delete(x, place, axis=1)
        squares = float(((y - without @ np.linalg.lstsq(without, y, rcond=None)[0]) ** 2).sum()) - rest
        f = squares / df / (rest / left)
        wald = None
        if robust is not None:
            wald = float(beta[place] @ np.linalg.solve(robust[place, place], beta[place])) / df
        terms[term] = {
            **{"sum_sq": squares, "df": df, "F": f, "p": float(stats.f.sf(f, df, left))},
            **{"robust_F": wald, "robust_p": None if wald is None else float(stats.f.sf(wald, df, left))},
        }
    details = {"type": test.type, "coding": "sum", "terms": terms}
    return {"outcome": "reported", "runs": len(y), "details": details}


def _contrasts(values: NDArray[Any]) -> Array:
    """Columns that sum to zero over the levels of a factor: any such basis gives the same type III sums."""
    levels, codes = np.unique(values, return_inverse=True)
    if len(levels) < 2:
        raise Unable("a factor has one level")
    basis = np.linalg.qr(np.column_stack([np.ones(len(levels)), np.eye(len(levels))[:, :-1]]))[0]
    return np.asarray(basis[codes, 1:])


def _products(first: Array, second: Array) -> Array:
    return (first[:, :, None] * second[:, None, :]).reshape(len(first), -1)


def mixed(plan: Plan, test: MixedTest, frame: pd.DataFrame, details: Entry) -> Entry:
    """The fit with the variances of `details`, certified as the optimum, and all that follows from it.

    Of the reported details only `theta`, `sigma` and `cross_check` (another library's word) are taken over;
    the rest is computed from the variances by dense matrices.
    """
    from scipy import stats

    level, model = plan.intervals.level, design(plan, test, frame)
    found = certify(*model, covariance(details["theta"]), details["sigma"])
    # An end of another search that lies higher shows that this one is only a local optimum.
    higher = certify(*model, *optimum(*model)).loglik - found.loglik
    stationary = found.score < _STATIONARY and higher < _STATIONARY
    names = ["1", *test.fixed]
    terms = {name: term(found, row, level) for name, row in zip(names, np.eye(len(names)), strict=True)}
    first = terms[test.fixed[0]]
    tails = {"greater": stats.t.sf, "less": stats.t.cdf}
    p = first["p"]
    if test.alternative != "two-sided":
        p = float(tails[test.alternative](first["t"], first["df"]))
    singular = details["singular"] if found.least < _SURELY else False
    return {
        "outcome": sign(first["low"], first["high"]) if stationary else "undecided",
        **{"estimate": first["estimate"], "stderr": first["se"], "df": first["df"]},
        **{"p": p if stationary else None, "low": first["low"], "high": first["high"], "level": level},
        **{"runs": len(frame), "seeds": len(set(frame["seed"]))},
        "details": {
            "alternative": test.alternative,
            "terms": terms,
            "loglik": found.loglik,
            **{"theta": details["theta"], "sigma": details["sigma"]},
            "singular": singular,
            "converged": stationary,
            "cross_check": details["cross_check"],
        },
    }


def design(plan: Plan, test: MixedTest, frame: pd.DataFrame) -> tuple[Array, Array, Array, NDArray[np.intp]]:
    """Outcome, fixed and random columns, and numbers of the clusters."""
    y = frame[plan.outcome(test.outcome).score].to_numpy(dtype=float)
    columns = {"1": np.ones(len(y))}
    for name in test.fixed:
        covariate = name == COVARIATE
        values = frame[plan.matching.variable if covariate else name].to_numpy(dtype=float)
        columns[name] = np.log(values) - np.log(values).mean() if covariate else values
    ((cluster, effects),) = test.random.items()
    x, z = (np.column_stack([columns[name] for name in names]) for names in (["1", *test.fixed], effects))
    if np.linalg.matrix_rank(x) < x.shape[1] or len(y) <= x.shape[1]:
        raise Unable("the runs do not determine the model")
    return y, x, z, frame[cluster].factorize()[0]


def searched(plan: Plan, test: MixedTest, frame: pd.DataFrame) -> Certificate:
    """The fit where nothing is reported; `Unable` where the search ends nowhere."""
    try:
        model = design(plan, test, frame)
        found = certify(*model, *optimum(*model))
    except np.linalg.LinAlgError as error:
        raise Unable("the model cannot be fitted") from error
    if not found.score < _STATIONARY:
        raise Unable("the model cannot be fitted")
    return found


def term(found: Certificate, weights: Array, level: float) -> Entry:
    """A combination of fixed effects with its t test and interval by Kenward and Roger."""
    from scipy import stats

    estimate, error, plain, df = found.combination(weights)
    t, half = estimate / error, float(stats.t.ppf((1 + level) / 2, df)) * error
    numbers = {"estimate": estimate, "se": error, "se_unadjusted": plain, "df": df, "t": t}
    numbers |= {"p": float(2 * stats.t.sf(abs(t), df)), "low": estimate - half, "high": estimate + half}
    return numbers | {"level": level}
