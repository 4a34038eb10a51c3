"""Checks of who is compared: exposures, exclusions, and the fate of every planned run."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from gradnoise.base import layout
from gradnoise.provenance.audit import described
from gradnoise.provenance.audit.evidence import Evidence
from gradnoise.provenance.audit.exposures import DEFINITIONS, exposure_faults, remade_faults
from gradnoise.provenance.audit.findings import check, settle
from gradnoise.provenance.audit.trees import differences


@check("A13", "exposures follow from the noise logs, and exclusions from blind columns alone", "critical")
def exclusions(evidence: Evidence) -> str:
    """Exposures summed again from their events, the tables made again; every rule applied again."""
    faults = [*exposure_faults(evidence), *remade_faults(evidence)]
    fates = evidence.rows(layout.analysis(evidence.name, "fates"))
    shown = {row["run_id"]: row["rule"] for row in fates if row["rule"] or row["fate"] == "excluded"}
    wanted = {name: rule for name, (fate, rule) in evidence.compared.fates.items() if fate == "excluded"}
    faults += [
        f"run {run} is left out by {shown.get(run)}, the plan's rules say {wanted.get(run)}"
        for run in sorted(shown.keys() | wanted.keys())
        if shown.get(run) != wanted.get(run) or run not in shown
    ]
    rules = ", ".join(rule.id for rule in evidence.plan.exclusions)
    summed = f"{len(DEFINITIONS)} definitions of exposure summed again"
    return settle(faults, f"{summed}; {len(wanted)} runs left out by {rules or 'no rule'}")


@check("A14", "every planned run is accounted for, and missing ones stay within the limits", "critical")
def conservation(evidence: Evidence) -> str:
    """planned = analysed + excluded + unmatched + diverged + missing (+ not compared), by cell and seed."""
    compared = evidence.compared
    faults = [*_fate_faults(evidence), *_limit_faults(evidence)]
    flow = evidence.rows(layout.analysis(evidence.name, "flow"))
    counted = {f"{row['block']}/{row['cell']} {row['stage']}": row["runs"] for row in flow}
    wanted = {f"{block}/{cell} {stage}": n for (block, cell, stage), n in described.flow(compared).items()}
    faults += map(str, differences(counted, wanted, ("flow",)))
    sections: dict[str, Any] = {
        "fates": described.fates(compared),
        "flow": described.totals(compared),
        "missing": described.missing(compared, evidence.mirror.frames["loss"]),
    }
    for section, expected in sections.items():
        faults += map(str, differences(evidence.results.get(section), expected, ("results.json", section)))
    said = ", ".join(f"{n} {fate}" for fate, n in sections["fates"].items() if n)
    return settle(faults, f"{len(evidence.planned)} planned = {said}")


def _fate_faults(evidence: Evidence) -> Iterator[str]:
    """Rows of table `fates` against the design and what became of each run."""
    rows = {row["run_id"]: row for row in evidence.rows(layout.analysis(evidence.name, "fates"))}
    for name in sorted(rows.keys() ^ evidence.planned.keys()):
        yield f"run {name} is {'not planned' if name in rows else 'planned, and without a fate'}"
    for name, run in evidence.planned.items():
        row, (fate, _) = rows.get(name), evidence.compared.fates[name]
        if row is None:
            continue
        if (row["block"], row["cell"], row["seed_index"]) != (run.block, run.cell, run.seed_index):
            yield f"run {name} stands at another place than the design gives it"
        if row["fate"] != fate:
            yield f"run {name} ({run.cell} #{run.seed_index}) is called {row['fate']}, and is {fate}"


def _limit_faults(evidence: Evidence) -> Iterator[str]:
    """Tests that are read although more of their runs are missing than the plan allows."""
    for entry in evidence.results["tests"]:
        test = next((test for test in evidence.plan.tests if test.id == entry["id"]), None)
        if test is None:
            continue
        frame = evidence.mirror.used(test)
        if evidence.mirror.too_many_missing(test, frame) and (entry["outcome"], entry["p"]) != (
            "undecided",
            None,
        ):
            yield f"{test.id} is read although more of its runs are missing than the plan allows"
