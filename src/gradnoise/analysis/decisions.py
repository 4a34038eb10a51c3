"""Carry out a plan's tests and read its hypotheses. Every number that decides comes from the plan."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from gradnoise.analysis.equivalence import tost, tost_by_pingouin
from gradnoise.analysis.families import holm
from gradnoise.analysis.isotonic import trend
from gradnoise.analysis.mixed import FitError, fit_mixed
from gradnoise.analysis.slopes import seed_slopes
from gradnoise.base.errors import InputError
from gradnoise.base.files import sha256_of
from gradnoise.registration.plan import AnyTest, Hypothesis, MixedTest, Plan, SlopeTest, TostTest, TrendTest

if TYPE_CHECKING:
    import pandas as pd

    from gradnoise.base.vocabulary import Matching

Entry = dict[str, Any]

# Two ways to the same p may differ by rounding alone.
_AGREEMENT = 1e-9


def run_test(plan: Plan, test: AnyTest, frames: Mapping[Matching, pd.DataFrame]) -> Entry:
    """One entry of `tests` in results.json.

    `frames` holds one row a run for each matching. A test that cannot be carried out (too few seeds, a fit
    that breaks down) has no numbers, outcome `undecided` and the reason in its details.
    """
    frame = frames[test.matching]
    entry: Entry = {
        "id": test.id,
        "kind": test.kind,
        "hypothesis": test.hypothesis,
        "outcome": "undecided",
        "matching": test.matching,
        "description": test.description,
        **dict.fromkeys(("estimate", "stderr", "df", "p", "low", "high", "level")),
        "runs": len(frame),
        "seeds": int(frame["seed"].nunique()),
        "details": {},
    }
    try:
        match test:
            case SlopeTest():
                found = _slope(plan, test, frame)
            case MixedTest():
                found = _mixed(plan, test, frame)
            case TrendTest():
                found = _trend(plan, test, frame)
            case TostTest():
                found = _tost(plan, test, frame)
        _enough(plan, found["seeds"])
    except (InputError, FitError) as error:
        return entry | {"details": {"reason": str(error)}}
    return entry | found


def read_hypotheses(plan: Plan, tests: list[Entry]) -> tuple[list[Entry], list[Entry]]:
    """Entries of `families` and `hypotheses` in results.json.

    A hypothesis' p is the largest of its tests' p, None if one is missing; Holm's adjustment counts that as
    the family's `missing_p`. `condition met`: every condition of `met` holds and the adjusted p is at most
    the family's alpha; `condition not met`: a condition of `not_met` holds; otherwise `undecided`.
    """
    by_id = {test["id"]: test for test in tests}
    families: list[Entry] = []
    adjusted: dict[str, float] = {}
    alphas: dict[str, float] = {}
    p_values = {hypothesis.id: _largest(hypothesis, by_id) for hypothesis in plan.hypotheses}
    for family in plan.families:
        corrected = holm([p_values[member] for member in family.members], family.missing_p)
        members = [
            {"hypothesis": member, "p": p_values[member], "p_adjusted": p}
            for member, p in zip(family.members, corrected, strict=True)
        ]
        adjusted |= dict(zip(family.members, corrected, strict=True))
        alphas |= dict.fromkeys(family.members, family.alpha)
        families.append({"id": family.id, "method": family.method, "alpha": family.alpha, "members": members})
    hypotheses = [
        {
            "id": hypothesis.id,
            "text": hypothesis.text,
            "rule": _rule(hypothesis, alphas[hypothesis.id]),
            "outcome": _outcome(hypothesis, by_id, adjusted[hypothesis.id] <= alphas[hypothesis.id]),
            "p": p_values[hypothesis.id],
            "p_adjusted": adjusted[hypothesis.id],
        }
        for hypothesis in plan.hypotheses
    ]
    return families, hypotheses


def reading_alpha(plan: Plan) -> float:
    """Alpha at which tests are read: 1 - level, free of the rounding of that difference."""
    return round(1 - plan.intervals.level, 12)


def _enough(plan: Plan, seeds: int) -> None:
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


def _mixed(plan: Plan, test: MixedTest, frame: pd.DataFrame) -> Entry:
    _enough(plan, int(frame["seed"].nunique()))
    fit = fit_mixed(frame, plan.outcome(test.outcome).score, test.fixed, test.random)
    first = fit.terms[test.fixed[0]]
    return {
        "outcome": "reported",
        "estimate": first.estimate,
        "stderr": first.se,
        "runs": fit.runs,
        "seeds": fit.clusters,
        "details": {
            "terms": {
                name: {"estimate": term.estimate, "stderr": term.se} for name, term in fit.terms.items()
            },
            "loglik": fit.loglik,
            "theta": list(fit.theta),
            "sigma": fit.sigma,
            "singular": fit.singular,
            "converged": fit.converged,
            "note": "no degrees of freedom, so no p and no interval: nothing is decided by this model",
        },
    }


def _trend(plan: Plan, test: TrendTest, frame: pd.DataFrame) -> Entry:
    level_of = {cell: number for number, level in enumerate(test.levels, start=1) for cell in level}
    rows = frame[frame["cell"].isin(list(level_of))]
    rows = rows.assign(level=rows["cell"].map(level_of))
    # A level's mean stands for all of its cells or for nothing.
    sizes = rows["level"].map({number: len(level) for number, level in enumerate(test.levels, start=1)})
    rows = rows[rows.groupby(["seed", "level"])["cell"].transform("count") == sizes]
    if rows["level"].nunique() < len(test.levels):
        raise InputError(
            "levels", f"{rows['level'].nunique()} of {len(test.levels)} reached", "every level needs runs"
        )
    found = trend(
        rows,
        plan.outcome(test.outcome).score,
        "level",
        "seed",
        margin=test.margin,
        alternative=test.alternative,
        alpha=reading_alpha(plan),
        draws=test.draws,
        # The draws follow from the plan, like the seeds.
        seed=int(sha256_of([plan.sha256, "permutations", test.id])[:16], 16),
    )
    return {
        "outcome": found.reading,
        "estimate": found.ebar2,
        "p": found.p,
        "runs": len(rows[~rows["seed"].isin(found.incomplete)]),
        "seeds": found.clusters,
        "details": {
            "estimate": "E-bar-squared",
            "alternative": found.alternative,
            "draws": found.draws,
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
            "noninferior_p": found.noninferior_p,
            "incomplete_seeds": len(found.incomplete),
        },
    }


def _tost(plan: Plan, test: TostTest, frame: pd.DataFrame) -> Entry:
    alpha = reading_alpha(plan)
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


def _largest(hypothesis: Hypothesis, tests: Mapping[str, Entry]) -> float | None:
    p_values = [tests[name]["p"] for name in hypothesis.p.max_of]
    return None if None in p_values else max(p_values)


def _outcome(hypothesis: Hypothesis, tests: Mapping[str, Entry], small: bool) -> str:
    def holds(condition: Any) -> bool:
        return tests[condition.test]["outcome"] in condition.reading

    if any(holds(condition) for condition in hypothesis.not_met.any):
        return "condition not met"
    met = small and all(holds(condition) for condition in hypothesis.met.all)
    return "condition met" if met else "undecided"


def _rule(hypothesis: Hypothesis, alpha: float) -> str:
    def say(conditions: Any, link: str) -> str:
        return f" {link} ".join(f"{c.test} reads {' / '.join(c.reading)}" for c in conditions)

    met, not_met = say(hypothesis.met.all, "and"), say(hypothesis.not_met.any, "or")
    return f"met: {met}, and adjusted p <= {alpha:g}; not met: {not_met}; otherwise undecided"
