"""Checks of every number of results.json by a second path."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from gradnoise.base import layout
from gradnoise.provenance.audit import described, verdicts
from gradnoise.provenance.audit.evidence import Evidence
from gradnoise.provenance.audit.findings import check, settle
from gradnoise.provenance.audit.mirror import curves
from gradnoise.provenance.audit.trees import differences, same

Entry = dict[str, Any]

# Shown beside a test, never read: A15 sees to labels.
_LABEL = "label"
# Two searches for one optimum end this near to each other, where a variance is zero.
_SEARCHED = 1e-4


def _entries(evidence: Evidence, kinds: set[str]) -> Iterator[tuple[Entry, Entry]]:
    """Reported and expected entries of tests of these kinds."""
    shown = {entry["id"]: entry for entry in evidence.results["tests"]}
    for wanted in evidence.tests:
        if wanted["kind"] in kinds:
            entry = shown.get(wanted["id"], {})
            yield {name: value for name, value in entry.items() if name != _LABEL}, wanted


def _faults(evidence: Evidence, kinds: set[str]) -> list[str]:
    pairs = _entries(evidence, kinds)
    return [str(found) for entry, wanted in pairs for found in differences(entry, wanted, (wanted["id"],))]


@check(
    "A17",
    "slopes, mixed models, contrasts and what is described are found again by a second path",
    "critical",
)
def models(evidence: Evidence) -> str:
    """Least squares by seed; a certificate that the reported mixed model is the optimum, and all from it."""
    kinds = {"slope", "mixed", "contrast", "anova"}
    faults = _faults(evidence, kinds)
    compared, results = evidence.compared, evidence.results
    rule = evidence.plan.matching
    value = evidence.mirror.reliability
    reliability = {
        **{"quantity": f"log {rule.variable}", "value": value, "minimum": rule.minimum_reliability},
        "reached": value is not None and value >= rule.minimum_reliability,
    }
    for section, expected in (
        ("cells", described.cells(compared)),
        ("arms", described.arms(compared)),
        ("reliability", reliability),
    ):
        faults += [str(found) for found in differences(results.get(section), expected, (section,))]
    faults += [*_curve_faults(evidence), *_explained_faults(evidence)]
    count = sum(1 for _ in _entries(evidence, kinds))
    return settle(
        faults, f"{count} tests, {len(results['cells'])} means of cells and every curve by a second path"
    )


def _curve_faults(evidence: Evidence) -> Iterator[str]:
    """Rows of table `curves` against lines and steps that were fitted again."""
    found: dict[str, list[Entry]] = {}
    for row in evidence.rows(layout.analysis(evidence.name, "curves")):
        found.setdefault(f"{row['matching']} {row['curve']}", []).append(row)
    wanted: dict[str, list[Entry]] = {}
    for matching in evidence.mirror.frames:
        for row in curves(evidence.mirror, matching):
            wanted.setdefault(f"{matching} {row['curve']}", []).append(row)
    yield from map(str, differences(found, wanted, ("curves",), _SEARCHED))


def _explained_faults(evidence: Evidence) -> Iterator[str]:
    """Rows of table `explained` against R^2 within seeds that were computed again."""
    plan = evidence.plan
    found = {
        f"{row['matching']} {row['predictor']} {row['statistic']}": [
            row[name] for name in ("value", "low", "high", "runs")
        ]
        for row in evidence.rows(layout.analysis(evidence.name, "explained"))
    }
    wanted = {
        f"{matching} {predictor} r2_within_seed": described.explained(plan, frame, predictor)
        for matching, frame in evidence.mirror.frames.items()
        for predictor in (plan.descriptive.predictor, *plan.descriptive.rivals)
    }
    there = {name: value for name, value in wanted.items() if value is not None}
    yield from map(str, differences(found, there, ("explained",)))


@check("A18", "equivalence: p is the larger of two, and the interval agrees with it", "critical")
def equivalence(evidence: Evidence) -> str:
    """Two one-sided tests by statsmodels; the interval of level 1 - 2 alpha against the margins."""
    faults, said = _faults(evidence, {"tost"}), []
    for entry, _ in _entries(evidence, {"tost"}):
        if not entry or entry["p"] is None:
            continue
        details = entry["details"]
        inside = details["margin_low"] < entry["low"] and entry["high"] < details["margin_high"]
        if inside != (entry["p"] < entry["alpha"]):
            faults.append(f"{entry['id']}: p and interval disagree about the margins")
        if not same(entry["p"], max(details["p_low"], details["p_high"])):
            faults.append(f"{entry['id']}: p is not the larger of its two")
        said.append(entry["id"])
    return settle(faults, f"{', '.join(said) or 'no test of equivalence'}: p and interval found again")


@check("A19", "families are adjusted whole, a missing p counting as 1", "critical")
def adjusted(evidence: Evidence) -> str:
    """Holm's step-down from the reported p of the tests, and from those found again."""
    shown = {entry["id"]: entry for entry in evidence.results["tests"]}
    faults = []
    for tests in (shown, {entry["id"]: entry for entry in evidence.tests}):
        wanted = verdicts.families(evidence.plan, tests)
        faults += [str(found) for found in differences(evidence.results["families"], wanted, ("families",))]
    members = {
        member["hypothesis"]: member
        for family in evidence.results["families"]
        for member in family["members"]
    }
    for entry in evidence.results["hypotheses"]:
        own = members.get(entry["id"], {})
        if not (same(entry["p"], own.get("p")) and same(entry["p_adjusted"], own.get("p_adjusted"))):
            faults.append(f"{entry['id']}: its p are not those of its family")
    sizes = ", ".join(f"{family.id} of {len(family.members)}" for family in evidence.plan.families)
    return settle(faults, f"family {sizes}: adjusted p found again")


@check("A20", "verdicts follow from the plan's rules", "critical")
def decided(evidence: Evidence) -> str:
    """The truth table applied to the reported readings, and to those found again."""
    shown = {entry["id"]: entry for entry in evidence.results["tests"]}
    said = {entry["id"]: entry["outcome"] for entry in evidence.results["hypotheses"]}
    faults = []
    for source, tests in (
        ("reported", shown),
        ("recomputed", {entry["id"]: entry for entry in evidence.tests}),
    ):
        for wanted in verdicts.hypotheses(evidence.plan, tests):
            if said.get(wanted["id"]) != wanted["outcome"]:
                found = said.get(wanted["id"])
                faults.append(
                    f"{wanted['id']} is called {found}, by {source} readings it is {wanted['outcome']}"
                )
    faults += [
        f"{name} is no hypothesis of the plan"
        for name in said.keys() - {h.id for h in evidence.plan.hypotheses}
    ]
    return settle(faults, "; ".join(f"{name}: {outcome}" for name, outcome in said.items()))


@check("A21", "permutations, bootstraps and explorations give the same with the registered draws", "critical")
def redrawn(evidence: Evidence) -> str:
    """The registered generator, seed and number of draws, other code."""
    faults, mirror = _faults(evidence, {"trend"}), evidence.mirror
    draws = [test.draws for test in evidence.plan.tests if test.kind == "trend"]
    for section, wanted in (
        ("bands", mirror.bands()),
        ("sensitivity", mirror.sensitivity()),
        ("exploratory", mirror.exploratory()),
    ):
        shown = [{k: v for k, v in entry.items() if k != _LABEL} for entry in evidence.results[section]]
        faults += [str(found) for found in differences(shown, wanted, (section,))]
    beside = len(evidence.results["sensitivity"]) + len(evidence.results["exploratory"])
    return settle(
        faults, f"{len(draws)} trends ({sum(draws)} permutations) and {beside} entries beside the tests"
    )
