"""A whole results.json worked out twice: by the analysis and by the auditor, on made-up studies with gaps."""

import json
from typing import Any

import numpy as np
import pandas as pd
import pytest

from gradnoise.analysis import analyse
from gradnoise.analysis.arms import arms
from gradnoise.analysis.beside import bands, explorations, sensitivities
from gradnoise.analysis.curves import curves
from gradnoise.analysis.decisions import evaluate
from gradnoise.analysis.flow import fate_totals, flow_of_runs, totals
from gradnoise.analysis.gather import Gathered, gather
from gradnoise.analysis.missing import missing_runs
from gradnoise.analysis.simulate import simulate
from gradnoise.base.files import canonical_json
from gradnoise.base.study import Study
from gradnoise.provenance.audit import described, mirror
from gradnoise.provenance.audit.compared import Compared
from gradnoise.provenance.audit.evidence import Evidence
from gradnoise.provenance.audit.trees import differences
from gradnoise.registration import Plan

Rows = tuple[pd.DataFrame, pd.DataFrame]
EVIDENCE = Evidence("quick")


def studies(number: int, gaps: int) -> Rows:
    """A simulated study in which so many runs are lost, diverged, unmatched or too little exposed."""
    plan = EVIDENCE.plan
    scores, exposure = simulate(plan, EVIDENCE.study, plan.power.truths[number % 3], number)
    draw = np.random.default_rng(number)
    for place, run in enumerate(draw.choice(sorted(scores["run_id"].unique()), gaps, replace=False)):
        own = scores["run_id"] == run
        last = own & (scores["branch"] == scores.loc[own, "branch"].max())
        dosed = exposure["run_id"] == run
        if place % 4 == 0:
            scores, exposure = scores[~own], exposure[~dosed]
        elif place % 4 == 1:
            scores.loc[last, ["value", "stderr"]] = np.nan
            scores.loc[last, "status"] = "diverged"
        elif place % 4 == 2:
            scores.loc[own & (scores["score"] == "validation_loss"), "value"] *= 50
        else:
            exposure.loc[dosed & (exposure["branch"] == 1), "value"] = -1e-9
    return scores, exposure


def by_analysis(plan: Plan, study: Study, gathered: Gathered, scores: pd.DataFrame) -> dict[str, Any]:
    evaluation = evaluate(plan, gathered, cross_check=False)
    found = {
        "tests": evaluation.tests,
        "families": evaluation.families,
        "hypotheses": evaluation.hypotheses,
        "bands": bands(plan, gathered),
        "sensitivity": [_unlabelled(entry) for entry in sensitivities(plan, gathered)],
        "exploratory": [_unlabelled(entry) for entry in explorations(plan, gathered)],
        "missing": missing_runs(plan, gathered.frames["loss"], gathered.planned),
        "fates": fate_totals(gathered.fates),
        "flow": totals(flow_of_runs(plan, gathered.fates)),
        "cells": analyse._cells(study, scores),
        "arms": arms(plan, study, gathered.branches),
        "reliability": gathered.reliability,
        "matched": _matched(gathered.matched.rows.to_dict("records")),
    }
    value: dict[str, Any] = json.loads(canonical_json(found))
    return value


def by_auditor(rows: Rows, shown: dict[str, Any]) -> dict[str, Any]:
    compared = Compared(EVIDENCE.plan, EVIDENCE.study, EVIDENCE.planned, *rows)
    own = mirror.Mirror(compared, EVIDENCE.key, shown["tests"])
    tests = own.tests()
    return {
        "tests": tests,
        "families": own.families(tests),
        "hypotheses": own.hypotheses(tests),
        "bands": own.bands(),
        "sensitivity": own.sensitivity(),
        "exploratory": own.exploratory(),
        "missing": described.missing(compared, own.frames["loss"]),
        "fates": described.fates(compared),
        "flow": described.totals(compared),
        "cells": described.cells(compared),
        "arms": described.arms(compared),
        "reliability": own.reliability,
        "matched": {f"{run} {name}": values for (run, name), values in compared.matched.items()},
    }


def _unlabelled(entry: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in entry.items() if name != "label"}


def _matched(rows: list[dict[Any, Any]]) -> dict[str, dict[str, float]]:
    found: dict[str, dict[str, float]] = {}
    for row in rows:
        found.setdefault(f"{row['run_id']} {row['matching']}", {})[row["quantity"]] = row["value"]
    return found


@pytest.mark.parametrize(("number", "gaps"), [(0, 0), (1, 3), (2, 6), (5, 12), (7, 40)])
def test_two_ways_to_one_results_file(number: int, gaps: int) -> None:
    plan, study = EVIDENCE.plan, EVIDENCE.study
    rows = studies(number, gaps)
    gathered = gather(plan, study, *rows)
    shown = by_analysis(plan, study, gathered, rows[0])
    assert [str(found) for found in differences(shown, by_auditor(rows, shown))] == []
    own = mirror.Mirror(Compared(plan, study, EVIDENCE.planned, *rows), EVIDENCE.key, shown["tests"])
    for name, frame in gathered.frames.items():
        drawn = json.loads(canonical_json(curves(plan, name, frame)))
        assert [str(found) for found in differences(drawn, mirror.curves(own, name), (), 1e-4)] == []


def test_every_number_of_every_test_is_held_against_something() -> None:
    # A number that is moved by a thousandth of itself, wherever it stands, is found, but for a p of nearly 0.
    rows = studies(2, 3)
    shown = by_analysis(EVIDENCE.plan, EVIDENCE.study, gather(EVIDENCE.plan, EVIDENCE.study, *rows), rows[0])
    taken_over = {"theta", "sigma", "cross_check"}  # certified by what follows from them

    def places(value: Any) -> list[tuple[Any, Any]]:
        found = []
        items = (
            value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
        )
        for key, item in items:
            if isinstance(item, float) and abs(item) > 1e-9 and key not in taken_over:
                found.append((value, key))
            elif key not in taken_over:
                found += places(item)
        return found

    right = by_auditor(rows, shown)
    assert list(differences(shown, right)) == []
    moved = [
        place for section in ("tests", "bands", "sensitivity", "cells") for place in places(shown[section])
    ]
    assert len(moved) > 300
    for parent, key in moved:
        before = parent[key]
        parent[key] = before * 1.001
        assert len(list(differences(shown, right))) == 1, (parent, key)
        parent[key] = before


@pytest.mark.parametrize("change", ["theta", "sigma"])
def test_variances_that_are_no_optimum_are_found(change: str) -> None:
    rows = studies(2, 0)
    shown = by_analysis(EVIDENCE.plan, EVIDENCE.study, gather(EVIDENCE.plan, EVIDENCE.study, *rows), rows[0])
    details = next(test for test in shown["tests"] if test["id"] == "icl-mixed")["details"]
    details[change] = (
        [value * 1.05 for value in details["theta"]] if change == "theta" else details["sigma"] * 1.05
    )
    found = [str(difference) for difference in differences(shown["tests"], by_auditor(rows, shown)["tests"])]
    assert any("icl-mixed.details.converged is True, should be False" in text for text in found)
