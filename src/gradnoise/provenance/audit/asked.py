"""Checks of what was asked: each registered test once, with the registered values, rightly labelled."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from gradnoise.base import layout
from gradnoise.provenance.audit.evidence import Evidence, sha256_of
from gradnoise.provenance.audit.findings import check, settle
from gradnoise.provenance.audit.mirror import beside_label, labels
from gradnoise.provenance.audit.trees import differences, same

Entry = dict[str, Any]

# Fields of an entry of `tests` that say what was asked, not what came out; and such fields of its details.
_ASKED = ("asked", "alpha", "level", "matching", "description", "kind", "hypothesis", "runs", "seeds", "df")
_DETAILS = (
    "alternative",
    "predictor",
    "draws",
    "margin",
    "margin_low",
    "margin_high",
    "arms",
    "type",
    "coding",
)
_SECTIONS = {
    *("label", "study", "plan", "descriptive", "thresholds", "matched_points", "tests", "families"),
    *("hypotheses", "deviations", "deviated", "bands", "sensitivity", "exploratory", "reliability"),
    *("cells", "arms", "missing", "fates", "flow"),
}


@check(
    "A15", "each registered test is reported exactly once, and nothing is called more than it is", "critical"
)
def reported_once(evidence: Evidence) -> str:
    """Identity and labels of tests, hypotheses, sensitivities and explorations; one file of results."""
    plan, results, faults = evidence.plan, evidence.results, []
    may_be = labels(plan, evidence.deviations)
    for section, known in (("tests", plan.tests), ("hypotheses", plan.hypotheses)):
        shown, wanted = [entry["id"] for entry in results[section]], [item.id for item in known]
        if shown != wanted:
            odd = sorted(set(shown) ^ set(wanted)) or ["the order, or one of them twice"]
            faults.append(f"results.json: {section}: {odd[0]} is not as registered")
        faults += [
            f"{entry['id']} is labelled {entry['label']}, may be called {may_be.get(entry['id'], 'nothing')}"
            for entry in results[section]
            if entry["label"] != may_be.get(entry["id"])
        ]
    for entry in results["tests"]:
        test = next((test for test in plan.tests if test.id == entry["id"]), None)
        if test is not None and (entry["kind"], entry["asked"]["outcome"]) != (test.kind, test.outcome):
            faults.append(f"{test.id} is reported as another kind of test, or of another outcome")
    beside = beside_label(plan)
    for entry in [*results["sensitivity"], *results["exploratory"]]:
        name = entry.get("id", f"{entry.get('test')} by {entry.get('method')}")
        if entry["label"] != beside:
            faults.append(f"{name} is labelled {entry['label']}, may be called {beside}")
        if {"outcome", "reading", "verdict", "p_adjusted"} & (entry.keys() | entry["details"].keys()):
            faults.append(f"{name} is exploratory and carries a verdict")
    faults += [f"results.json: {name} is no section" for name in sorted(results.keys() - _SECTIONS)]
    folder = Path("results", evidence.name)
    others = [path.as_posix() for path in sorted(folder.rglob("*.json")) if "provenance" not in path.parts]
    faults += [
        f"{path} is another file of results" for path in others if path != layout.results(evidence.name)
    ]
    count = len(plan.tests)
    return settle(faults, f"{count} tests, each once, labelled {', '.join(sorted(set(may_be.values())))}")


@check("A16", "margins, alpha, terms, units and matching are those of the plan", "critical")
def as_registered(evidence: Evidence) -> str:
    """What results.json says was asked, and the points and runs that were compared, against the plan."""
    plan, results, mirror = evidence.plan, evidence.results, evidence.mirror
    faults = [*_about_faults(evidence), *_test_faults(evidence), *_matched_faults(evidence)]
    for section, expected in (
        ("thresholds", mirror.thresholds()),
        ("descriptive", mirror.descriptive()),
        ("matched_points", evidence.compared.points),
    ):
        faults += [str(found) for found in differences(results[section], expected, (section,))]
    for section, wanted in (("sensitivity", mirror.sensitivity()), ("exploratory", mirror.exploratory())):
        for entry, item in zip(results[section], wanted, strict=False):
            for name in ("test", "method", "id", "kind", "description", "matching", "level", "runs", "df"):
                if not same(entry.get(name), item.get(name)):
                    faults.append(f"{section}: {name} is {entry.get(name)}, should be {item.get(name)}")
        if len(results[section]) != len(wanted):
            faults.append(f"{section}: {len(results[section])} entries, the plan has {len(wanted)}")
    points = ", ".join(f"{name} {point['value']:g}" for name, point in evidence.compared.points.items())
    rows = len(evidence.frame(layout.analysis(evidence.name, "matched")))
    return settle(faults, f"{len(plan.tests)} tests as asked; {rows} matched quantities again ({points})")


def _about_faults(evidence: Evidence) -> Iterator[str]:
    """What results.json says of study, plan and lock."""
    plan, lock = evidence.plan, None
    if evidence.registered:
        lock = {"path": evidence.lock_file, "sha256": evidence.sha256(evidence.lock_file)}
    about = {
        **{"id": plan.study.id, "title": plan.study.title, "path": evidence.study.plan},
        **{"sha256": sha256_of(evidence.plan_document), "kind": plan.study.kind},
        **{"prior_access": plan.study.prior_access, "lock": lock},
    }
    expected = {"label": plan.study.label, "study": evidence.name, "plan": about}
    found = {name: evidence.results.get(name) for name in expected}
    yield from (str(difference) for difference in differences(found, expected))


def _test_faults(evidence: Evidence) -> Iterator[str]:
    """What the entries of tests, families and hypotheses say was asked."""
    shown = {entry["id"]: entry for entry in evidence.results["tests"]}
    for wanted in evidence.tests:
        entry = shown.get(wanted["id"], {})
        for name in _ASKED:
            yield from map(str, differences(entry.get(name), wanted[name], (wanted["id"], name)))
        details, own = entry.get("details", {}), wanted["details"]
        for name in (name for name in _DETAILS if name in own):
            yield from map(str, differences(details.get(name), own[name], (wanted["id"], name)))
    wanted_hypotheses = evidence.mirror.hypotheses(evidence.tests)
    for entry, hypothesis in zip(wanted_hypotheses, evidence.results["hypotheses"], strict=False):
        for name in ("id", "text", "rule"):
            if hypothesis.get(name) != entry[name]:
                yield f"hypothesis {entry['id']}: its {name} is not the plan's"
    for family, entry in zip(evidence.plan.families, evidence.results["families"], strict=False):
        if (entry["id"], entry["method"], entry["alpha"]) != (family.id, family.method, family.alpha):
            yield f"family {family.id} is not adjusted as the plan says"


def _matched_faults(evidence: Evidence) -> Iterator[str]:
    """Table `matched` against the runs brought to the matched points once more."""
    path = layout.analysis(evidence.name, "matched")
    found: dict[tuple[str, str], dict[str, float]] = {}
    for row in evidence.rows(path):
        found.setdefault((row["run_id"], row["matching"]), {})[row["quantity"]] = row["value"]
        run = evidence.planned.get(row["run_id"])
        cell = evidence.study.block(run.block).cell(run.cell) if run else None
        shown = [row[name] for name in ("block", "cell", "seed_index", "batch", "learning_rate")]
        if run is None or cell is None:
            yield f"{path}: run {row['run_id']} is not planned"
        elif shown != [run.block, run.cell, run.seed_index, cell.batch, cell.learning_rate]:
            yield f"{path}: run {row['run_id']} stands at another place than the design gives it"
    wanted = evidence.compared.matched
    for key in sorted(found.keys() | wanted.keys()):
        where = (path, f"run {key[0]} at matched {key[1]}")
        if key in found and key in wanted:
            yield from map(str, differences(found[key], wanted[key], where))
        else:
            yield f"{': '.join(where)}: {'should not be there' if key in found else 'is absent'}"
