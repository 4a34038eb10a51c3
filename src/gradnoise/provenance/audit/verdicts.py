"""From the p of tests to the word of a hypothesis, once more and from the plan alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gradnoise.registration.plan import Plan

Entry = dict[str, Any]


def holm(p_values: Sequence[float | None], missing: float) -> list[float]:
    """Holm's step-down by its definition: the j-th smallest of m times m - j + 1, not decreasing, at most 1.

    What is missing counts as `missing`; the family keeps its size.
    """
    filled = [missing if p is None else p for p in p_values]
    adjusted, least = [0.0] * len(filled), 0.0
    for rank, place in enumerate(sorted(range(len(filled)), key=filled.__getitem__)):
        least = max(least, min(1.0, (len(filled) - rank) * filled[place]))
        adjusted[place] = least
    return adjusted


def families(plan: Plan, tests: Mapping[str, Entry]) -> list[Entry]:
    """Entries of `families`: every member's p, the largest of its tests', and Holm's adjustment."""
    p_of = {hypothesis.id: largest(hypothesis.p.max_of, tests) for hypothesis in plan.hypotheses}
    found = []
    for family in plan.families:
        p_values = [p_of[member] for member in family.members]
        adjusted = holm(p_values, family.missing_p)
        members = [
            {"hypothesis": member, "p": p, "p_adjusted": q}
            for member, p, q in zip(family.members, p_values, adjusted, strict=True)
        ]
        found.append({"id": family.id, "method": family.method, "alpha": family.alpha, "members": members})
    return found


def largest(names: Sequence[str], tests: Mapping[str, Entry]) -> float | None:
    """The largest p of these tests; None if one has none."""
    p_values = [tests[name]["p"] for name in names]
    return None if None in p_values else max(p_values)


def hypotheses(plan: Plan, tests: Mapping[str, Entry]) -> list[Entry]:
    """Entries of `hypotheses`, without labels."""
    members = {
        member["hypothesis"]: (member, family["alpha"])
        for family in families(plan, tests)
        for member in family["members"]
    }
    readings = {name: test["outcome"] for name, test in tests.items()}
    found = []
    for hypothesis in plan.hypotheses:
        member, alpha = members[hypothesis.id]
        found.append(
            {
                "id": hypothesis.id,
                "text": hypothesis.text,
                "rule": rule(plan, hypothesis.id, alpha),
                "outcome": word(plan, hypothesis.id, readings, member["p_adjusted"] <= alpha),
                "p": member["p"],
                "p_adjusted": member["p_adjusted"],
            }
        )
    return found


def word(plan: Plan, name: str, readings: Mapping[str, str], small: bool) -> str:
    """The verdict: `not_met` goes first, `met` needs all of its conditions and a small adjusted p."""
    hypothesis = next(item for item in plan.hypotheses if item.id == name)
    met, not_met, neither = plan.study.verdicts
    for condition in hypothesis.not_met.any:
        if readings[condition.test] in condition.reading:
            return not_met
    if small and all(readings[item.test] in item.reading for item in hypothesis.met.all):
        return met
    return neither


def rule(plan: Plan, name: str, alpha: float) -> str:
    """The rule of a hypothesis as results.json says it."""
    hypothesis = next(item for item in plan.hypotheses if item.id == name)
    met, not_met, neither = plan.study.verdicts
    holds = " and ".join(f"{c.test} reads {' / '.join(c.reading)}" for c in hypothesis.met.all)
    fails = " or ".join(f"{c.test} reads {' / '.join(c.reading)}" for c in hypothesis.not_met.any)
    return f"{met}: {holds}, and adjusted p <= {alpha:g}; {not_met}: {fails}; otherwise {neither}"
