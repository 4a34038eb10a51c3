"""Checks of who is compared: exposures, exclusions, and the fate of every planned run."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

from gradnoise.base import layout
from gradnoise.provenance.audit import described
from gradnoise.provenance.audit.evidence import Evidence
from gradnoise.provenance.audit.findings import check, settle
from gradnoise.provenance.audit.trees import differences, same

TRUNK = 0
# Definition: weight of an event, its trace, and what was injected.
_SUMS = {
    "pne": ("sum_lr", "trace_pcp", "injected_pne"),
    "pne2": ("sum_lr2", "trace_pcp", "injected_pne2"),
    "ne": ("sum_lr2_c", "trace_c", "injected_ne"),
    "pne_effective": ("sum_lr", "trace_effective", "injected_pne"),
    "pne2_effective": ("sum_lr2", "trace_effective", "injected_pne2"),
}


@check("A13", "exposures follow from the noise logs, and exclusions from blind columns alone", "critical")
def exclusions(evidence: Evidence) -> str:
    """Every exposure summed again from its events; every rule applied again; fates compared."""
    faults = list(_exposure_faults(evidence))
    blind = {run: rule for run, rule in evidence.compared.excluded.items() if run in evidence.planned}
    shown = evidence.frame(layout.analysis(evidence.name, "fates"))
    left_out = {row.run_id: row.rule for row in shown.itertuples() if row.fate == "excluded"}
    matched = {run for run, name in evidence.compared.matched if name == "loss"}
    for run in sorted(left_out.keys() | (blind.keys() & matched)):
        if left_out.get(run) != blind.get(run):
            faults.append(
                f"run {run} is left out by {left_out.get(run)}, the plan's rules say {blind.get(run)}"
            )
    rows = len(evidence.frame(layout.exposure(evidence.name)))
    rules = len(evidence.plan.exclusions)
    return settle(
        faults, f"{rows} exposures as their events; {rules} rules, {len(left_out)} runs left out by them"
    )


def _exposure_faults(evidence: Evidence) -> Iterator[str]:
    """Sums over events that are not those of the table, and branches that it lacks or has besides."""
    import numpy as np

    path = layout.exposure(evidence.name)
    table = evidence.frame(path)
    shown = {(row.run_id, row.branch, row.definition): row for row in table.itertuples()}
    scores = evidence.runs_frame("scores")
    finished = scores[scores["status"] == "finished"].drop_duplicates(["run_id", "branch"])
    events = dict(tuple(evidence.runs_frame("noise_events").groupby("run_id")))
    there = set(zip(table["run_id"], table["branch"], strict=True))
    for run, branch in there ^ set(zip(finished["run_id"], finished["branch"], strict=True)):
        yield f"{path}: run {run}, branch {branch} is in one of exposures and scores only"
    for row in finished.itertuples():
        own = events.get(row.run_id)
        if own is None:
            yield f"run {row.run_id} has no measured update"
            continue
        trunk = (own["segment"] == TRUNK) & (own["step"] <= row.trunk_sequences // row.batch)
        own = own[trunk | (own["segment"] == row.branch)]
        sums: dict[str, tuple[float, float]] = {}
        for name, (weight, trace, injected) in _SUMS.items():
            w, t, error = (own[column].to_numpy(dtype=float) for column in (weight, trace, f"{trace}_se"))
            sums[name] = (math.fsum(w * t + own[injected].to_numpy()), math.sqrt(math.fsum((w * error) ** 2)))
        # Weight decay shrinks what was added before it.
        kept = np.exp(
            np.cumsum(own["log_retention"].to_numpy()[::-1])[::-1] - own["log_retention"].to_numpy()
        )
        w, t, error = (
            own[column].to_numpy(dtype=float) for column in ("sum_lr2", "trace_pcp", "trace_pcp_se")
        )
        added = kept * (w * t + own["injected_pne2"].to_numpy())
        sums["retained"] = (math.fsum(added), math.sqrt(math.fsum((kept * w * error) ** 2)))
        sums["pne2_injected"] = (math.fsum(own["injected_pne2"]), 0.0)
        for name, (value, stderr) in sums.items():
            at = shown.get((row.run_id, row.branch, name))
            if at is None or not (
                _near(at.value, value) and _near(at.stderr, stderr) and at.events == len(own)
            ):
                found = "absent" if at is None else f"{at.value} +- {at.stderr}"
                yield f"{path}: {name} of run {row.run_id}, branch {row.branch} is {found}, events sum to {value}"


def _near(found: float, expected: float) -> bool:
    return same(None if math.isnan(found) else found, None if math.isnan(expected) else expected)


@check(
    "A14", "every planned run is accounted for, and missing runs stay within the plan's limits", "critical"
)
def conservation(evidence: Evidence) -> str:
    """planned = analysed + excluded + unmatched + diverged + missing (+ not compared), by cell and seed."""
    compared = evidence.compared
    shown = evidence.frame(layout.analysis(evidence.name, "fates"))
    faults = []
    rows: dict[str, Any] = {row.run_id: row for row in shown.itertuples()}
    for name in sorted(rows.keys() ^ evidence.planned.keys()):
        faults.append(f"run {name} is {'not planned' if name in rows else 'planned, and without a fate'}")
    for name, run in evidence.planned.items():
        row, (fate, _) = rows.get(name), compared.fates[name]
        if row is not None and (row.block, row.cell, row.seed_index) != (run.block, run.cell, run.seed_index):
            faults.append(f"run {name} stands at another place than the design gives it")
        if row is not None and row.fate != fate:
            faults.append(f"run {name} ({run.cell} #{run.seed_index}) is called {row.fate}, and is {fate}")
    flow = evidence.frame(layout.analysis(evidence.name, "flow"))
    counted = {(row.block, row.cell, row.stage): row.runs for row in flow.itertuples()}
    wanted = described.flow(compared)
    faults += [
        f"flow: {'/'.join(key)} is {counted.get(key)}, should be {wanted.get(key)}"
        for key in sorted(counted.keys() | wanted.keys())
        if counted.get(key) != wanted.get(key)
    ]
    sections = {"fates": described.fates(compared), "flow": described.totals(compared)}
    sections["missing"] = described.missing(compared, evidence.mirror.frames["loss"])  # type: ignore[assignment]
    for section, expected in sections.items():
        found = evidence.results.get(section)
        faults += [f"results.json: {difference}" for difference in differences(found, expected, (section,))]
    faults += _limit_faults(evidence)
    said = ", ".join(f"{n} {fate}" for fate, n in described.fates(compared).items() if n)
    return settle(faults, f"{len(evidence.planned)} planned = {said}")


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
