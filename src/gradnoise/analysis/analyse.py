"""The phase `analyse`: scores and exposures in, matched tables and every number of the plan out."""

from __future__ import annotations

import math
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from gradnoise.analysis.arms import arms
from gradnoise.analysis.curves import curves
from gradnoise.analysis.decisions import read_hypotheses, reading_alpha, run_test
from gradnoise.analysis.explained import explained
from gradnoise.analysis.flow import flow_of_runs, totals
from gradnoise.analysis.matching import Matched, branch_table, match
from gradnoise.analysis.reliability import reliability
from gradnoise.base import layout, tables
from gradnoise.base.errors import InputError
from gradnoise.base.files import canonical_json, write_json
from gradnoise.base.study import Study, load_study, study_path
from gradnoise.base.wording import check_rehearsal
from gradnoise.evaluation.names import NAMES
from gradnoise.registration import Plan, load_plan
from gradnoise.registration.plan import TostTest, TrendTest

if TYPE_CHECKING:
    import pandas as pd

    from gradnoise.base.vocabulary import Matching

Entry = dict[str, Any]


def analyse(study: str) -> None:
    """Analyse one study as its plan says.

    Reads the tables of scores and exposure, `config/<study>.yaml` and the plan it names; writes the tables
    `matched`, `flow`, `curves` and `explained`, and `results.json` with every number in full precision. The
    same inputs give the same bytes. Raises `InputError` for tables that are not of this plan; a test that
    cannot be carried out is no error but an undecided outcome.
    """
    settings = load_study(study)
    plan = load_plan(settings.plan)
    if plan.study.config != str(study_path(study)):
        raise InputError(f"{settings.plan}: study.config", plan.study.config, f"must be {study_path(study)}")
    scores = tables.read_table(layout.scores(study), tables.SCORES).to_pandas()
    exposure = tables.read_table(layout.exposure(study), tables.EXPOSURE).to_pandas()
    rule = plan.matching
    unit = NAMES[settings.blocks[rule.block].task.kind][rule.variable]
    branches = branch_table(scores, exposure)
    matched = match(branches, rule, unit)
    frames = {name: _frame(plan, matched, name) for name in plan.matching.names}

    deciding = matched.rows[matched.rows["matching"] == "loss"]
    at_loss = set(deciding["run_id"])
    flow = flow_of_runs(plan, settings, scores, at_loss, at_loss - set(frames["loss"]["run_id"]))
    drawn = [row for name in plan.matching.names for row in curves(plan, name, frames[name])]

    for table, rows in (
        (tables.MATCHED, matched.rows.to_dict("records")),
        (tables.FLOW, flow),
        (tables.CURVES, drawn),
        (tables.EXPLAINED, _explained(plan, frames)),
    ):
        columns = {column.name: [row[column.name] for row in rows] for column in table.columns}
        tables.write_table(layout.analysis(study, table.name), table, columns, plan.study.label)
    tests = [run_test(plan, test, frames) for test in plan.tests]
    families, hypotheses = read_hypotheses(plan, tests)
    results = {
        "label": plan.study.label,
        "study": study,
        "plan": {
            "id": plan.study.id,
            "title": plan.study.title,
            "path": settings.plan,
            "sha256": plan.sha256,
            "prior_access": plan.study.prior_access,
        },
        "descriptive": _descriptive(plan),
        "thresholds": _thresholds(plan),
        "matched_points": {name: asdict(point) for name, point in matched.points.items()},
        "tests": tests,
        "families": families,
        "hypotheses": hypotheses,
        "reliability": _reliability(plan, scores),
        "cells": _cells(settings, scores),
        "arms": arms(plan, settings, branches),
        "flow": totals(flow),
    }
    if plan.study.kind == "rehearsal":
        check_rehearsal(canonical_json(results).decode(), layout.results(study))
    write_json(layout.results(study), results)


def _frame(plan: Plan, matched: Matched, matching: Matching) -> pd.DataFrame:
    """Runs at a matched point, without those whose primary exposure could not be measured."""
    scores = [outcome.score for outcome in plan.outcomes if outcome.block == plan.matching.block]
    definitions = (plan.exposure.primary, *plan.exposure.secondary)
    doses = [f"{plan.exposure.transform}_{definition}" for definition in definitions]
    wide = matched.wide(matching)
    # With no run at the point there are no columns either; the tests then say what is missing.
    needed = ["run_id", "cell", "seed", *scores, *doses, *plan.descriptive.rivals]
    wide = wide.reindex(columns=list(dict.fromkeys([*needed, *wide.columns])))
    return wide.dropna(subset=[doses[0]]).reset_index(drop=True)


def _explained(plan: Plan, frames: dict[Matching, pd.DataFrame]) -> list[Entry]:
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
        "reading_alpha": reading_alpha(plan),
        "level": plan.intervals.level,
        "margin": margins[0] if margins else None,
        "trend_margin": trends[0].margin if trends else None,
        "draws": trends[0].draws if trends else None,
        "reliability": plan.matching.minimum_reliability,
        "fewest_seeds": plan.seeds.fewest_analysed,
    }


def _reliability(plan: Plan, scores: pd.DataFrame) -> Entry:
    rule = plan.matching
    value = reliability(scores, rule.block, rule.variable)
    return {
        "quantity": f"log {rule.variable}",
        "value": value,
        "minimum": rule.minimum_reliability,
        "reached": value is not None and value >= rule.minimum_reliability,
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
