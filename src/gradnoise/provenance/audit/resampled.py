"""What stands beside the tests once more: bootstraps with the same draws, sign flips, CR2, ranks, paths."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import combinations_with_replacement, product
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from gradnoise.provenance.audit.second_path import ROUNDING, Unable, one_sample, seed_lines, slope
from gradnoise.provenance.audit.trends import BLOCK, draws_seed

if TYPE_CHECKING:
    import pandas as pd

    from gradnoise.registration.kinds import Correlation, Mediation, SlopeTest
    from gradnoise.registration.plan import Plan, Sensitivity

Array = NDArray[np.float64]
Entry = dict[str, Any]

_SAME_T = 1e-9
_NOTHING = 1e-9
_MOST_FLIPPED = 20


def sensitivity(
    plan: Plan, asked: Sensitivity, test: SlopeTest, method: str, frame: pd.DataFrame, key: str
) -> Entry:
    """One entry's numbers by one of the plan's methods, or by the slope test itself at another place."""
    score, level = plan.outcome(test.outcome).score, plan.intervals.level
    seed = draws_seed(key, f"{test.id}/{method}")
    if method == "wild_cluster_bootstrap":
        return wild(frame, score, test, asked.resamples, seed)
    if method == "cluster_robust":
        return cluster_robust(frame, score, test.predictor, level)
    if method not in ("sign_flip", "studentised_bootstrap"):
        found = slope(plan, test, frame)
        del found["details"]["slopes"]
        numbers = ("estimate", "stderr", "df", "p", "low", "high")
        return {name: found[name] for name in numbers} | {"details": {"alternative": test.alternative}}
    # What a mean of slopes must allow is what the slope test must.
    slope(plan, test, frame)
    slopes = np.array([line[0] for line in seed_lines(frame, score, test.predictor)[0].values()])
    if method == "sign_flip":
        return flips(slopes, test.alternative)
    return studentised_bootstrap(slopes, level, asked.resamples, seed)


def wild(frame: pd.DataFrame, score: str, test: SlopeTest, draws: int, seed: int) -> Entry:
    """Wild cluster bootstrap-t of the slope of seed-centred values: Webb's weights, the null imposed."""
    members = (frame["seed"].to_numpy()[:, None] == frame["seed"].unique()).astype(float)
    centre = members @ (members / members.sum(axis=0)).T
    x, y = (column - centre @ column for column in _columns(frame, test.predictor, score))
    weights = np.array([-math.sqrt(1.5), -1, -math.sqrt(0.5), math.sqrt(0.5), 1, math.sqrt(1.5)])
    count = members.shape[1]
    exact = len(weights) ** count <= draws
    if exact:
        picks = np.array(list(product(range(len(weights)), repeat=count)))
    else:
        picks = np.random.default_rng(seed).integers(0, len(weights), size=(draws, count))
    design = np.column_stack([x, np.ones(len(x))])
    if np.linalg.matrix_rank(design) < 2:
        raise Unable("the predictor does not vary")
    inverse = np.linalg.pinv(design)
    null = np.full(len(y), y.mean())

    def t_of(values: Array) -> tuple[Array, Array]:
        betas = values @ inverse.T
        left = (values - betas @ design.T) * inverse[0]
        return betas[:, 0], betas[:, 0] / np.sqrt(((left @ members) ** 2).sum(axis=1))

    estimate, t = (float(value[0]) for value in t_of(y[None]))
    reached = 0
    for start in range(0, len(picks), BLOCK):
        _, drawn = t_of(null + weights[picks[start : start + BLOCK]] @ members.T * (y - null))
        reached += int(_beyond(drawn, t, test.alternative, _SAME_T * abs(t)).sum())
    p = reached / len(picks) if exact else (1 + reached) / (1 + len(picks))
    details = {"alternative": test.alternative, "t": t, "exact": exact, "draws": len(picks), "seed": seed}
    return {"estimate": estimate, "p": p, "details": details}


def flips(slopes: Array, alternative: str) -> Entry:
    """Exact sign-flip test of the mean slope."""
    if len(slopes) > _MOST_FLIPPED:
        raise Unable("too many seeds to list their sign patterns")
    signs = np.array(list(product((1.0, -1.0), repeat=len(slopes))))
    near = ROUNDING * float(np.abs(slopes).sum())
    p = float(_beyond(signs @ slopes, float(slopes.sum()), alternative, near).mean())
    smallest = 2.0 ** (-len(slopes) + (alternative == "two-sided"))
    details = {"alternative": alternative, "smallest_p": smallest}
    return {"estimate": float(slopes.mean()), "p": p, "details": details}


def cluster_robust(frame: pd.DataFrame, score: str, predictor: str, level: float) -> Entry:
    """Slope with one intercept a seed, its CR2 standard error and Satterthwaite df (Bell and McCaffrey)."""
    from scipy import stats

    x, y = _columns(frame, predictor, score)
    members = (frame["seed"].to_numpy()[:, None] == frame["seed"].unique()).astype(float)
    design = np.column_stack([x, members])
    if members.shape[1] < 2 or np.linalg.matrix_rank(design) < design.shape[1]:
        raise Unable("the runs do not determine the slope")
    bread = np.linalg.inv(design.T @ design)
    hat = design @ bread @ design.T
    residuals = y - hat @ y
    row = design @ bread[:, 0]
    scores, shown = [], []
    for column in members.T.astype(bool):
        left, values, _ = np.linalg.svd(np.eye(column.sum()) - hat[np.ix_(column, column)], hermitian=True)
        roots = np.where(values > 1e-10, 1 / np.sqrt(np.maximum(values, 1e-10)), 0.0)
        weighted = (left * roots) @ left.T @ row[column]
        scores.append(float(weighted @ residuals[column]))
        shown.append((np.eye(len(y)) - hat)[:, column] @ weighted)
    products = np.array(shown) @ np.array(shown).T
    df = float(np.trace(products) ** 2 / (products**2).sum())
    estimate, stderr = float(bread[0] @ design.T @ y), math.sqrt(sum(value**2 for value in scores))
    half = float(stats.t.ppf((1 + level) / 2, df)) * stderr
    return {
        **{"estimate": estimate, "stderr": stderr, "df": df},
        "p": float(2 * stats.t.sf(abs(estimate / stderr), df)),
        **{"low": estimate - half, "high": estimate + half, "details": {"alternative": "two-sided"}},
    }


def studentised_bootstrap(slopes: Array, level: float, draws: int, seed: int) -> Entry:
    """Bootstrap-t of the mean slope over resampled seeds."""
    if len(slopes) < 3:
        raise Unable("fewer than 3 seeds")
    found = one_sample(slopes.tolist(), float(np.abs(slopes).max()), "two-sided", level)
    estimate, stderr = found["estimate"], found["stderr"]
    counts, weights, exact = multisets(len(slopes), draws, seed)
    t, kept = [], []
    for times in counts:
        drawn = np.repeat(slopes, times)
        error = float(np.std(drawn - estimate, ddof=1)) / math.sqrt(len(drawn))
        kept.append((times > 0).sum() > 1 and error > ROUNDING * stderr)
        t.append((float(drawn.mean()) - estimate) / error if kept[-1] else 0.0)
    low, high, p = _studentised(estimate, stderr, np.array(t), weights, np.array(kept), level)
    details = {"alternative": "two-sided", "exact": exact, "draws": draws, "seed": seed}
    return {"estimate": estimate, "stderr": stderr, "p": p, "low": low, "high": high, "details": details}


def multisets(count: int, draws: int, seed: int) -> tuple[NDArray[np.intp], Array, bool]:
    """How often each seed is drawn: all resamples with their probabilities, or `draws` of them at random."""
    if math.comb(2 * count - 1, count) > draws:
        drawn = np.random.default_rng(seed).multinomial(count, np.full(count, 1 / count), size=draws)
        return drawn, np.full(draws, 1 / draws), False
    listed = [
        np.bincount(pick, minlength=count) for pick in combinations_with_replacement(range(count), count)
    ]
    ways = [math.factorial(count) / math.prod(math.factorial(k) for k in times) for times in listed]
    return np.array(listed), np.array(ways) / count**count, True


def correlation(plan: Plan, asked: Correlation, frame: pd.DataFrame) -> Entry:
    """Spearman's rho in each seed as Pearson's of ranks, averaged by Fisher's z; pooled by Bonett-Wright."""
    from scipy import stats

    score, level = plan.outcome(asked.outcome).score, plan.intervals.level
    x, y = _columns(frame, asked.predictor, score)
    rhos, transformed = [], []
    for name in np.unique(frame["seed"]):
        own = (frame["seed"] == name).to_numpy()
        if own.sum() < 4 or np.ptp(x[own]) == 0 or np.ptp(y[own]) == 0:
            continue
        rhos.append(_rho(x[own], y[own]))
        most = 1 - 6 / (own.sum() * (own.sum() ** 2 - 1))
        transformed.append(math.atanh(min(max(rhos[-1], -most), most)))
    mean = one_sample(transformed, 1.0, "two-sided", level)
    pooled = _rho(x, y)
    half = float(stats.norm.isf((1 - level) / 2)) * math.sqrt((1 + pooled**2 / 2) / (len(x) - 3))
    centre = math.atanh(min(max(pooled, ROUNDING - 1), 1 - ROUNDING))
    ends = {"low": math.tanh(centre - half), "high": math.tanh(centre + half)}
    return {
        **{name: math.tanh(mean[name]) for name in ("estimate", "low", "high")},
        **{"df": mean["df"], "runs": len(x)},
        "details": {"by_seed": rhos, "pooled": {"estimate": pooled, **ends}},
    }


def mediation(plan: Plan, asked: Mediation, frame: pd.DataFrame, key: str) -> Entry:
    """Two linear models with an intercept a seed; bootstrap-t of a b over resampled seeds."""
    level = plan.intervals.level
    names = [asked.predictor, *(plan.outcome(name).score for name in (asked.mediator, asked.outcome))]
    columns = _columns(frame, *names)
    seeds = frame["seed"].to_numpy()
    members = [seeds == name for name in np.unique(seeds)]
    if len(members) < 3:
        raise Unable("fewer than 3 seeds")
    for own in members:
        columns = [np.where(own, column - column[own].mean(), column) for column in columns]
    x, m, y = columns
    free = len(x) - len(members)
    if free < 4 or np.linalg.matrix_rank(np.column_stack(columns)) < 3:
        raise Unable("the runs do not determine the paths")
    (a, total), (b, direct) = _fit(x[:, None], np.column_stack([m, y]), free, 0), _both(x, m, y, free)
    products = np.array([[[u[own] @ v[own] for v in columns] for u in columns] for own in members])
    effect, stderr = (float(value[0]) for value in _jackknife(products, np.ones((1, len(members)))))
    if not stderr > ROUNDING * abs(effect):
        raise Unable("the indirect effect does not vary between seeds")
    seed = draws_seed(key, f"{asked.id}/mediation")
    counts, weights, exact = multisets(len(members), asked.resamples, seed)
    effects, errors = _jackknife(products, counts)
    kept = ((counts > 0).sum(axis=1) > 1) & (errors > ROUNDING * stderr)
    t = (effects - effect) / np.where(kept, errors, 1.0)
    low, high, p = _studentised(effect, stderr, t, weights, kept, level)
    left = [column - x * (x @ column) / (x @ x) for column in (m, y)]
    paths = {"a": a, "b": b, "total": total, "direct": direct}
    details = paths | {"rho_at_zero": _pearson(*left), "exact": exact, "seed": seed}
    numbers = {"estimate": effect, "stderr": stderr, "p": p, "low": low, "high": high}
    return numbers | {"runs": len(x), "details": details}


def _fit(design: Array, outcomes: Array, free: int, k: int) -> list[dict[str, float]]:
    """Coefficient k of each outcome with its least-squares error; `free` runs are left by the intercepts."""
    inverse = np.linalg.inv(design.T @ design)
    found = []
    for outcome in outcomes.T:
        beta = inverse @ design.T @ outcome
        rest = float(((outcome - design @ beta) ** 2).sum()) / (free - design.shape[1])
        found.append({"estimate": float(beta[k]), "se": math.sqrt(rest * inverse[k, k])})
    return found


def _both(x: Array, m: Array, y: Array, free: int) -> tuple[dict[str, float], dict[str, float]]:
    design = np.column_stack([m, x])
    return _fit(design, y[:, None], free, 0)[0], _fit(design, y[:, None], free, 1)[0]


def _jackknife(products: Array, counts: NDArray[Any]) -> tuple[Array, Array]:
    """a b of each resample of seeds, and its error by deleting one drawn seed at a time."""
    sums = np.einsum("rs,sij->rij", counts, products)
    without = np.where(counts > 0, np.column_stack([_indirect(sums - part) for part in products]), 0.0)
    count = len(products)
    middle = (counts * without).sum(axis=1) / count
    squares = (counts * (without - middle[:, None]) ** 2).sum(axis=1)
    return _indirect(sums), np.sqrt((count - 1) / count * squares)


def _indirect(products: Array) -> Array:
    """a b from sums of products of (x, m, y) by the normal equations; NaN where nothing tells x from m."""
    xx, xm, mm = products[:, 0, 0], products[:, 0, 1], products[:, 1, 1]
    determinant = xx * mm - xm**2
    # What rounding leaves of a seed that is taken out is no variation.
    there = (xx > _NOTHING * xx.max()) & (determinant > _NOTHING * xx * mm)
    b = (xx * products[:, 1, 2] - xm * products[:, 0, 2]) / np.where(there, determinant, np.nan)
    return np.asarray(xm / np.where(there, xx, np.nan) * b)


def _studentised(
    estimate: float, stderr: float, t: Array, weights: Array, kept: NDArray[np.bool_], level: float
) -> tuple[float, float, float]:
    """Bootstrap-t interval and two-sided p for zero from t of given weights."""
    t, weights = t[kept], weights[kept]
    order = np.argsort(t, kind="stable")
    t, weights = t[order], weights[order]
    reached, tail = np.cumsum(weights) / weights.sum(), (1 - level) / 2
    low, high = (t[min(int(np.searchsorted(reached, q)), len(t) - 1)] for q in (1 - tail, tail))
    observed = estimate / stderr
    beyond = min(weights[t <= observed].sum(), weights[t >= observed].sum())
    p = min(1.0, 2 * float(max(beyond, weights.min()) / weights.sum()))
    return estimate - float(low) * stderr, estimate - float(high) * stderr, p


def _beyond(values: Array, observed: float, alternative: str, near: float) -> NDArray[np.bool_]:
    if alternative == "greater":
        return values >= observed - near
    if alternative == "less":
        return values <= observed + near
    return np.abs(values) >= abs(observed) - near


def _columns(frame: pd.DataFrame, *names: str) -> list[Array]:
    found = [frame.get(name) for name in names]
    if any(column is None or not np.isfinite(column.to_numpy(dtype=float)).all() for column in found):
        raise Unable("a value is missing")
    return [column.to_numpy(dtype=float) for column in found if column is not None]


def _rho(x: Array, y: Array) -> float:
    from scipy import stats

    return _pearson(stats.rankdata(x), stats.rankdata(y))


def _pearson(x: Array, y: Sequence[float] | Array) -> float:
    return float(np.corrcoef(x, y)[0, 1])
