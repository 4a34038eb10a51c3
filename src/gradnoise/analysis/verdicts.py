"""From tests to verdicts: families adjusted, and the plan's rules applied. No number of its own."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from gradnoise.analysis.statistics.families import holm
from gradnoise.registration import Plan
from gradnoise.registration.plan import Condition, Hypothesis

Entry = dict[str, Any]


def read_hypotheses(plan: Plan, tests: list[Entry]) -> tuple[list[Entry], list[Entry]]:
    """Entries of `families` and `hypotheses` in results.json.

    A hypothesis' p is the largest of its tests' p, None if one is missing; Holm's adjustment counts that as
    the family's `missing_p`. Its rule is met when every condition of `met` holds and the adjusted p is at
    most the family's alpha; not met when a condition of `not_met` holds; otherwise neither.
    """
    by_id = {test["id"]: test for test in tests}
    p_values = {hypothesis.id: _largest(hypothesis, by_id) for hypothesis in plan.hypotheses}
    families: list[Entry] = []
    adjusted: dict[str, float] = {}
    alphas: dict[str, float] = {}
    for family in plan.families:
        corrected = holm([p_values[member] for member in family.members], family.missing_p)
        members = [
            {"hypothesis": member, "p": p_values[member], "p_adjusted": p}
            for member, p in zip(family.members, corrected, strict=True)
        ]
        adjusted |= dict(zip(family.members, corrected, strict=True))
        alphas |= dict.fromkeys(family.members, family.alpha)
        families.append({"id": family.id, "method": family.method, "alpha": family.alpha, "members": members})
    readings = {name: test["outcome"] for name, test in by_id.items()}
    hypotheses = [
        {
            "id": hypothesis.id,
            "text": hypothesis.text,
            "rule": _rule(plan, hypothesis, alphas[hypothesis.id]),
            "outcome": verdict(plan, hypothesis, readings, adjusted[hypothesis.id] <= alphas[hypothesis.id]),
            "p": p_values[hypothesis.id],
            "p_adjusted": adjusted[hypothesis.id],
        }
        for hypothesis in plan.hypotheses
    ]
    return families, hypotheses


def verdict(plan: Plan, hypothesis: Hypothesis, readings: Mapping[str, str], small: bool) -> str:
    """The study's word for a hypothesis, by the readings of the tests and whether its adjusted p is small."""
    met, not_met, neither = plan.study.verdicts

    def holds(condition: Condition) -> bool:
        return readings[condition.test] in condition.reading

    if any(holds(condition) for condition in hypothesis.not_met.any):
        return not_met
    return met if small and all(holds(condition) for condition in hypothesis.met.all) else neither


def _largest(hypothesis: Hypothesis, tests: Mapping[str, Entry]) -> float | None:
    p_values = [tests[name]["p"] for name in hypothesis.p.max_of]
    return None if None in p_values else max(p_values)


def _rule(plan: Plan, hypothesis: Hypothesis, alpha: float) -> str:
    def say(conditions: tuple[Condition, ...], link: str) -> str:
        return f" {link} ".join(f"{c.test} reads {' / '.join(c.reading)}" for c in conditions)

    met, not_met, neither = plan.study.verdicts
    holds, fails = say(hypothesis.met.all, "and"), say(hypothesis.not_met.any, "or")
    return f"{met}: {holds}, and adjusted p <= {alpha:g}; {not_met}: {fails}; otherwise {neither}"
