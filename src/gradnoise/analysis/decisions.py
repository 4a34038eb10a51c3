"""Carry out a plan's tests. Every number that decides comes from the plan."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from gradnoise.analysis.gather import Gathered
from gradnoise.analysis.missing import check_missing
from gradnoise.analysis.reliability import centre_covariate
from gradnoise.analysis.statistics.anova import anova
from gradnoise.analysis.statistics.contrasts import contrast
from gradnoise.analysis.statistics.equivalence import tost, tost_by_pingouin
from gradnoise.analysis.statistics.isotonic import trend
from gradnoise.analysis.statistics.mixed import FitError, fit_mixed
from gradnoise.analysis.statistics.slopes import seed_slopes
from gradnoise.analysis.statistics.student import Student, sign_reading
from gradnoise.analysis.verdicts import read_hypotheses
from gradnoise.base.errors import InputError
from gradnoise.base.files import sha256_of
from gradnoise.registration import Plan
from gradnoise.registration.kinds import (
    COVARIATE,
    AnovaTest,
    AnyTest,
    ContrastTest,
    MixedTest,
    SlopeTest,
    TostTest,
    TrendTest,
)

if TYPE_CHECKING:
    import pandas as pd

Entry = dict[str, Any]

# Two ways to the same p may differ by rounding alone.
_AGREEMENT = 1e-9
_NUMBERS = ("estimate", "stderr", "df", "p", "low", "high", "level")


@dataclass(frozen=True)
class Evaluation:
    """Every test of a plan with the verdicts that follow: these entries of results.json."""

    tests: list[Entry]
    families: list[Entry]
    hypotheses: list[Entry]


def evaluate(plan: Plan, gathered: Gathered, cross_check: bool = True) -> Evaluation:
    """Carry out the whole plan; `cross_check`: mixed models are held against statsmodels."""
    tests = [run_test(plan, test, gathered, cross_check) for test in plan.tests]
    return Evaluation(tests, *read_hypotheses(plan, tests))


def run_test(plan: Plan, test: AnyTest, gathered: Gathered, cross_check: bool = True) -> Entry:
    """One entry of `tests` in results.json.

    A test that cannot be carried out (too few seeds, too many runs missing, a fit that breaks down) has no
    numbers, outcome `undecided` and the reason in its details.
    """
    frame = gathered.frames[test.matching]
    cells = cells_of(test, gathered)
    frame = frame[frame["cell"].isin(list(cells))].reset_index(drop=True)
    entry: Entry = {
        "id": test.id,
        "kind": test.kind,
        "hypothesis": test.hypothesis,
        "outcome": "undecided",
        "matching": test.matching,
        "description": test.description,
        **dict.fromkeys(_NUMBERS),
        "runs": len(frame),
        "seeds": int(frame["seed"].nunique()),
        # What was asked, word for word, so that an auditor need not trust this code with it.
        "asked": test.model_dump(mode="json"),
        "alpha": plan.reading_alpha,
        "details": {},
    }
    try:
        check_missing(plan.matching.limits, frame, gathered.planned, cells)
        enough_seeds(plan, entry["seeds"])
        match test:
            case SlopeTest():
                found = _slope(plan, test, frame)
            case MixedTest():
                found = _mixed(plan, test, frame, gathered, cross_check)
            case ContrastTest():
                found = _contrast(plan, test, frame)
            case TrendTest():
                found = _trend(plan, test, frame)
            case TostTest():
                found = _tost(plan, test, frame)
            case AnovaTest():
                found = _anova(plan, test, frame)
        # Of a test that compares whole seeds, fewer may be left.
        enough_seeds(plan, (entry | found)["seeds"])
    except (InputError, FitError) as error:
        return entry | {"details": {"reason": str(error)}}
    return entry | found


def cells_of(test: AnyTest, gathered: Gathered) -> Collection[str]:
    """Cells that a test is about."""
    match test:
        case ContrastTest():
            return [*test.first, *test.second]
        case TrendTest():
            return [cell for level in test.levels for cell in level]
        case TostTest():
            return test.arms
        case _:
            return test.cells or list(gathered.planned)


def levels_of(test: TrendTest, frame: pd.DataFrame) -> pd.DataFrame:
    """Runs with the number of their `level`, from 1: those of a seed and level that has all of its cells.

    A level's mean stands for all of its cells or for nothing. Raises `InputError` when a level has no runs.
    """
    level_of = {cell: number for number, level in enumerate(test.levels, start=1) for cell in level}
    rows = frame[frame["cell"].isin(list(level_of))]
    rows = rows.assign(level=rows["cell"].map(level_of))
    sizes = rows["level"].map({number: len(level) for number, level in enumerate(test.levels, start=1)})
    rows = rows[rows.groupby(["seed", "level"])["cell"].transform("count") == sizes]
    if rows["level"].nunique() < len(test.levels):
        found = f"{rows['level'].nunique()} of {len(test.levels)} reached"
        raise InputError("levels", found, "every level needs runs")
    return rows


def permutation_seed(plan: Plan, test: str) -> int:
    """Seed of a test's draws: it follows from the plan, like the seeds of the runs."""
    return int(sha256_of([plan.key, "permutations", test])[:16], 16)


def enough_seeds(plan: Plan, seeds: int) -> None:
    """Raise `InputError` with fewer seeds than the plan analyses."""
    if seeds < plan.seeds.fewest_analysed:
        raise InputError("seeds", seeds, f"the plan tests on {plan.seeds.fewest_analysed} or more")


def _slope(plan: Plan, test: SlopeTest, frame: pd.DataFrame) -> Entry:
    score = plan.outcome(test.outcome).score
    slope = seed_slopes(
        frame, score, test.predictor, alternative=test.alternative, level=plan.intervals.level
    )
    return {
        "outcome": slope.reading,
        "estimate": slope.estimate,
        "stderr": slope.se,
        "df": slope.df,
        "p": slope.p,
        "low": slope.low,
        "high": slope.high,
        "level": slope.level,
        "runs": slope.runs,
        "seeds": len(slope.slopes),
        "details": {
            "alternative": slope.alternative,
            "t": slope.t,
            "predictor": test.predictor,
            "slopes": list(slope.slopes.values()),
            "seeds_without_slope": len(slope.flat),
        },
    }


def _mixed(plan: Plan, test: MixedTest, frame: pd.DataFrame, gathered: Gathered, cross_check: bool) -> Entry:
    if COVARIATE in test.fixed:
        frame = _with_covariate(plan, frame, gathered.reliability)
    level = plan.intervals.level
    fit = fit_mixed(
        frame,
        plan.outcome(test.outcome).score,
        test.fixed,
        test.random,
        level=level,
        cross_check=cross_check,
    )
    first = fit.terms[test.fixed[0]]
    checked = fit.cross_check
    if checked is not None and checked.agrees is False:
        raise FitError(f"statsmodels finds another optimum ({checked})")
    return {
        "outcome": sign_reading(first.low, first.high) if fit.converged else "undecided",
        "estimate": first.estimate,
        "stderr": first.se,
        "df": first.df,
        "p": Student(first.estimate, first.se, first.df).p(test.alternative) if fit.converged else None,
        "low": first.low,
        "high": first.high,
        "level": level,
        "runs": fit.runs,
        "seeds": fit.clusters,
        "details": {
            "alternative": test.alternative,
            "terms": {name: asdict(term) for name, term in fit.terms.items()},
            "loglik": fit.loglik,
            "theta": list(fit.theta),
            "sigma": fit.sigma,
            "singular": fit.singular,
            "converged": fit.converged,
            "cross_check": checked and asdict(checked),
        },
    }


def _with_covariate(plan: Plan, frame: pd.DataFrame, reliability: float | None) -> pd.DataFrame:
    """Runs with the logarithm of the loss, centred: errors in it are those that matching knows."""
    variable, minimum = plan.matching.variable, plan.matching.minimum_reliability
    logs = frame.assign(**{f"log {variable}": np.log(frame[variable].astype(float))})
    return centre_covariate(logs, f"log {variable}", reliability, minimum, centred=COVARIATE)


def _contrast(plan: Plan, test: ContrastTest, frame: pd.DataFrame) -> Entry:
    score, level = plan.outcome(test.outcome).score, plan.intervals.level
    groups = (test.first, test.second)
    found = contrast(frame, score, "cell", groups, "seed", alternative=test.alternative, level=level)
    return {
        "outcome": found.reading,
        "estimate": found.estimate,
        "stderr": found.se,
        "df": found.df,
        "p": found.p,
        "low": found.low,
        "high": found.high,
        "level": level,
        "runs": len(found.differences) * len([*test.first, *test.second]),
        "seeds": len(found.differences),
        "details": {"alternative": test.alternative, "differences": list(found.differences)},
    }


def _trend(plan: Plan, test: TrendTest, frame: pd.DataFrame) -> Entry:
    rows = levels_of(test, frame)
    seed = permutation_seed(plan, test.id)
    found = trend(
        rows,
        plan.outcome(test.outcome).score,
        "level",
        "seed",
        margin=test.margin,
        alternative=test.alternative,
        alpha=plan.reading_alpha,
        draws=test.draws,
        seed=seed,
    )
    required = test.steps == "required"
    return {
        "outcome": found.reading,
        "estimate": found.ebar2,
        "p": max(found.p, found.noninferior_p) if required else found.p,
        "runs": len(rows[~rows["seed"].isin(found.incomplete)]),
        "seeds": found.clusters,
        "details": {
            "estimate": "E-bar-squared",
            "alternative": found.alternative,
            "draws": found.draws,
            "seed": seed,
            "page": {"l": found.page, "p": found.page_p},
            "levels": [
                {
                    "level": number,
                    "cells": list(cells),
                    "mean": found.means[number],
                    "fitted": found.fitted[number],
                }
                for number, cells in enumerate(test.levels, start=1)
            ],
            "steps": [asdict(reversal) for reversal in found.reversals],
            "margin": found.margin,
            "trend_p": found.p,
            "noninferior_p": found.noninferior_p,
            "incomplete_seeds": len(found.incomplete),
        },
    }


def _tost(plan: Plan, test: TostTest, frame: pd.DataFrame) -> Entry:
    alpha = plan.reading_alpha
    score = plan.outcome(test.outcome).score
    found = tost(frame, score, "cell", test.arms, "seed", low=test.low, high=test.high, alpha=alpha)
    second = tost_by_pingouin(found.differences, test.low, test.high)
    if abs(second - found.p) > _AGREEMENT:
        raise FitError(f"p: {found.p}: pingouin finds {second}")
    return {
        "outcome": found.reading,
        "estimate": found.difference,
        "stderr": found.se,
        "df": found.df,
        "p": found.p,
        "low": found.interval[0],
        "high": found.interval[1],
        "level": round(1 - 2 * alpha, 12),
        "runs": 2 * len(found.differences),
        "seeds": len(found.differences),
        "details": {
            "arms": list(test.arms),
            "margin_low": found.low,
            "margin_high": found.high,
            "p_low": found.p_low,
            "p_high": found.p_high,
            "p_zero": found.p_zero,
            "p_by_pingouin": second,
            "differences": list(found.differences),
        },
    }


def _anova(plan: Plan, test: AnovaTest, frame: pd.DataFrame) -> Entry:
    found = anova(frame, plan.outcome(test.outcome).score, list(test.factors), block=test.block)
    terms = {name: asdict(term) for name, term in found.terms.items()}
    return {
        "outcome": "reported",
        "runs": len(frame),
        "details": {"type": test.type, "coding": "sum", "terms": terms},
    }
