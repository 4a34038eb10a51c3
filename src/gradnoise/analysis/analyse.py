"""The phase `analyse`: scores and exposures in, matched tables and every number of the plan out."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from gradnoise.analysis.arms import arms
from gradnoise.analysis.beside import bands, explorations, sensitivities
from gradnoise.analysis.curves import curves
from gradnoise.analysis.decisions import Evaluation, evaluate
from gradnoise.analysis.explained import explained
from gradnoise.analysis.flow import fate_totals, flow_of_runs, totals
from gradnoise.analysis.gather import Gathered, gather
from gradnoise.analysis.missing import missing_runs
from gradnoise.base import layout, tables
from gradnoise.base.errors import InputError
from gradnoise.base.files import canonical_json, sha256, write_json
from gradnoise.base.study import Study, load_study, study_path
from gradnoise.base.vocabulary import EXPLORATORY, STANDING
from gradnoise.base.wording import check_rehearsal
from gradnoise.registration import Plan, load_plan
from gradnoise.registration.deviations import Deviation, label_of, read_deviations, under_deviations
from gradnoise.registration.kinds import TostTest, TrendTest
from gradnoise.registration.lockfile import lock_path

if TYPE_CHECKING:
    import pandas as pd

    from gradnoise.base.vocabulary import Matching

Entry = dict[str, Any]


def analyse(study: str) -> None:
    """Analyse one study as its plan says.

    Reads the tables of scores and exposure, `config/<study>.yaml`, the plan it names, and of a registered
    plan its lock and deviations; writes the tables `matched`, `fates`, `flow`, `curves` and `explained`, and
    `results.json` with every number in full precision. The same inputs give the same bytes. Raises
    `InputError` for tables that are not of this plan; a test that cannot be carried out is no error but an
    undecided outcome.
    """
    settings = load_study(study)
    plan = load_plan(settings.plan)
    if plan.study.config != str(study_path(study)):
        raise InputError(f"{settings.plan}: study.config", plan.study.config, f"must be {study_path(study)}")
    scores = tables.read_table(layout.scores(study), tables.SCORES).to_pandas()
    exposure = tables.read_table(layout.exposure(study), tables.EXPOSURE).to_pandas()
    gathered = gather(plan, settings, scores, exposure)
    _write_tables(study, plan, gathered)
    evaluation = evaluate(plan, gathered)
    deviations = read_deviations(settings.plan) if plan.study.kind == "registered" else []
    results = {
        "label": plan.study.label,
        "study": study,
        "plan": _about(plan, settings.plan),
        "descriptive": _descriptive(plan),
        "thresholds": _thresholds(plan),
        "matched_points": {name: asdict(point) for name, point in gathered.matched.points.items()},
        **_labelled(plan, plan, evaluation, deviations),
        "deviations": [deviation.model_dump(mode="json") for deviation in deviations],
        "deviated": _deviated(plan, settings, deviations, scores, exposure),
        "bands": bands(plan, gathered),
        "sensitivity": sensitivities(plan, gathered),
        "exploratory": explorations(plan, gathered),
        "reliability": _reliability(plan, gathered),
        "cells": _cells(settings, scores),
        "arms": arms(plan, settings, gathered.branches),
        "missing": missing_runs(plan, gathered.frames["loss"], gathered.planned),
        "fates": fate_totals(gathered.fates),
        "flow": totals(flow_of_runs(plan, gathered.fates)),
    }
    if plan.study.kind == "rehearsal":
        check_rehearsal(canonical_json(results).decode(), layout.results(study))
    write_json(layout.results(study), results)


def _write_tables(study: str, plan: Plan, gathered: Gathered) -> None:
    drawn = [row for name, frame in gathered.frames.items() for row in curves(plan, name, frame)]
    for table, rows in (
        (tables.MATCHED, gathered.matched.rows.to_dict("records")),
        (tables.FATES, gathered.fates),
        (tables.FLOW, flow_of_runs(plan, gathered.fates)),
        (tables.CURVES, drawn),
        (tables.EXPLAINED, _explained(plan, gathered.frames)),
    ):
        columns = {column.name: [row[column.name] for row in rows] for column in table.columns}
        tables.write_table(layout.analysis(study, table.name), table, columns, plan.study.label)


def _about(plan: Plan, path: str) -> Entry:
    """The plan behind the numbers, and of a registered one its lock."""
    lock = lock_path(path)
    locked = {"path": lock.as_posix(), "sha256": sha256(lock)} if plan.study.kind == "registered" else None
    return {
        "id": plan.study.id,
        "title": plan.study.title,
        "path": path,
        "sha256": plan.sha256,
        "kind": plan.study.kind,
        "prior_access": plan.study.prior_access,
        "lock": locked,
    }


def _labelled(
    plan: Plan, carried: Plan, evaluation: Evaluation, deviations: list[Deviation]
) -> dict[str, list[Entry]]:
    """Tests, families and hypotheses with the labels that the deviations leave them.

    `plan` is the registered one, `carried` the one that was carried out, which may hold further tests.
    """
    registered = {test.id for test in plan.tests}
    labels = {
        test.id: label_of(plan, test.id, deviations) if test.id in registered else EXPLORATORY
        for test in carried.tests
    }
    tests = [test | {"label": labels[test["id"]]} for test in evaluation.tests]
    hypotheses = []
    for entry, hypothesis in zip(evaluation.hypotheses, carried.hypotheses, strict=True):
        # A hypothesis carries the weakest label of the tests that decide it.
        used = {labels[name] for name in hypothesis.p.max_of}
        used |= {labels[condition.test] for condition in hypothesis.not_met.any}
        hypotheses.append(entry | {"label": max(used, key=STANDING.index)})
    return {"tests": tests, "families": evaluation.families, "hypotheses": hypotheses}


def _deviated(
    plan: Plan, study: Study, deviations: list[Deviation], scores: pd.DataFrame, exposure: pd.DataFrame
) -> Entry | None:
    """Everything once more under the plan as it was carried out; None while nothing of the plan deviates."""
    changed = under_deviations(plan, study.plan, deviations)
    if changed is None:
        return None
    evaluation = evaluate(changed, gather(changed, study, scores, exposure))
    return _labelled(plan, changed, evaluation, deviations)


def _explained(plan: Plan, frames: Mapping[Matching, pd.DataFrame]) -> list[Entry]:
    described = plan.descriptive
    rows: list[Entry] = []
    for name, frame in frames.items():
        for predictor in (described.predictor, *described.rivals):
            score = plan.outcome(described.outcome).score
            found = explained(frame, score, predictor, level=plan.intervals.level)
            if found is not None:
                row = {"matching": name, "predictor": predictor, "statistic": "r2_within_seed"}
                rows.append(row | asdict(found))
    return rows


def _descriptive(plan: Plan) -> Entry:
    """What the figures draw."""
    outcome = plan.outcome(plan.descriptive.outcome)
    predictor, rivals = plan.descriptive.predictor, list(plan.descriptive.rivals)
    return {"score": outcome.score, "unit": outcome.unit, "predictor": predictor, "rivals": rivals}


def _thresholds(plan: Plan) -> Entry:
    """What captions print beside the figures."""
    margins = [test.high for test in plan.tests if isinstance(test, TostTest)]
    trends = [test for test in plan.tests if isinstance(test, TrendTest)]
    return {
        "target_loss": plan.matching.target,
        "alpha": plan.families[0].alpha,
        "reading_alpha": plan.reading_alpha,
        "level": plan.intervals.level,
        "margin": margins[0] if margins else None,
        "trend_margin": trends[0].margin if trends else None,
        "draws": trends[0].draws if trends else None,
        "reliability": plan.matching.minimum_reliability,
        "fewest_seeds": plan.seeds.fewest_analysed,
        "missing": plan.matching.limits.missing,
        "missing_difference": plan.matching.limits.difference,
    }


def _reliability(plan: Plan, gathered: Gathered) -> Entry:
    return {
        "quantity": f"log {plan.matching.variable}",
        "value": gathered.reliability,
        "minimum": plan.matching.minimum_reliability,
        "reached": gathered.reliable(plan),
    }


def _cells(study: Study, scores: pd.DataFrame) -> list[Entry]:
    """Mean and standard deviation over finished runs of every score at each run's last branch.

    `stderr` is that of the mean: over runs, or of a single run the standard error of its score.
    """
    diverged = set(scores.loc[scores["status"] != "finished", "run_id"])
    finished = scores[~scores["run_id"].isin(diverged)].sort_values(["sequences", "branch"])
    last = finished.groupby(["run_id", "score"], sort=True).tail(1)
    cells: list[Entry] = []
    for block_name, block in study.blocks.items():
        for cell in block.cells():
            rows = last[(last["block"] == block_name) & (last["cell"] == cell.name)]
            for score, group in rows.groupby("score", sort=True):
                values = group.sort_values("seed_index")["value"]
                sd = float(values.std(ddof=1)) if len(values) > 1 else None
                stderr = sd / math.sqrt(len(values)) if sd is not None else float(group["stderr"].iloc[0])
                cells.append(
                    {
                        "block": block_name,
                        "cell": cell.name,
                        "batch": cell.batch,
                        "learning_rate": cell.learning_rate,
                        "score": score,
                        "unit": str(group["unit"].iloc[0]),
                        "branch": "last",
                        "mean": float(values.mean()),
                        "sd": sd,
                        "stderr": stderr,
                        "runs": len(values),
                    }
                )
    return cells
