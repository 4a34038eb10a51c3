"""The flow of runs: what was planned, and what became of every single run."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from gradnoise.base.errors import InputError
from gradnoise.base.study import Study
from gradnoise.base.vocabulary import FATES, STAGES
from gradnoise.registration import Plan, run_id

if TYPE_CHECKING:
    import pandas as pd

Row = dict[str, object]

# Stages of the flow that a run of each fate has reached.
_REACHED = {
    "missing": ("planned",),
    "diverged": ("planned", "started"),
    "not compared": ("planned", "started", "finished"),
    "unmatched": ("planned", "started", "finished"),
    "excluded": ("planned", "started", "finished", "matched", "excluded"),
    "analysed": ("planned", "started", "finished", "matched", "analysed"),
}


def fates(
    plan: Plan, study: Study, scores: pd.DataFrame, matched: set[str], excluded: Mapping[str, str]
) -> list[Row]:
    """What became of every planned run (rows of table `fates`).

    missing: has no scores; diverged: a branch did; unmatched: never reached the deciding matched point, whose
    runs are `matched`; excluded: by the rule of the plan that `excluded` names; analysed: the rest. Finished
    runs of a block that the plan does not match are not compared. So in each cell and seed planned =
    analysed + excluded + unmatched + diverged + missing (+ not compared).

    Raises `InputError` for a run that the plan does not have, or that stands under another run's name.
    """
    started = _started(plan, study, scores)
    diverged = set(scores.loc[scores["status"] != "finished", "run_id"])
    rows: list[Row] = []
    for name, (block, cell, index) in _planned(plan, study).items():
        if name not in started:
            fate = "missing"
        elif name in diverged:
            fate = "diverged"
        elif block != plan.matching.block:
            fate = "not compared"
        elif name not in matched:
            fate = "unmatched"
        else:
            fate = "excluded" if name in excluded else "analysed"
        rule = excluded[name] if fate == "excluded" else None
        place = {"run_id": name, "block": block, "cell": cell, "seed_index": index}
        rows.append({**place, "fate": fate, "rule": rule})
    return rows


def flow_of_runs(plan: Plan, fates: list[Row]) -> list[Row]:
    """Runs of every cell at every stage (rows of table `flow`); unmatched blocks end at finished."""
    cells: dict[tuple[object, object], list[str]] = {}
    for row in fates:
        cells.setdefault((row["block"], row["cell"]), []).append(str(row["fate"]))
    rows: list[Row] = []
    for (block, cell), found in cells.items():
        last = STAGES[-1] if block == plan.matching.block else "finished"
        for stage in STAGES[: STAGES.index(last) + 1]:
            runs = sum(stage in _REACHED[fate] for fate in found)
            rows.append({"block": block, "cell": cell, "stage": stage, "runs": runs})
    return rows


def totals(rows: list[Row]) -> dict[str, int]:
    """Runs at each stage, over all cells."""
    return {stage: sum(int(str(row["runs"])) for row in rows if row["stage"] == stage) for stage in STAGES}


def fate_totals(rows: list[Row]) -> dict[str, int]:
    """Runs of each fate, over all cells."""
    return {fate: sum(row["fate"] == fate for row in rows) for fate in FATES}


def _planned(plan: Plan, study: Study) -> dict[str, tuple[str, str, int]]:
    return {
        run_id(plan.key, block_name, cell.name, index): (block_name, cell.name, index)
        for block_name, block in study.blocks.items()
        for cell in block.cells()
        for index in range(block.seeds)
    }


def _started(plan: Plan, study: Study, scores: pd.DataFrame) -> set[str]:
    planned = _planned(plan, study)
    runs = scores[["run_id", "block", "cell", "seed_index"]].drop_duplicates()
    for name, block, cell, index in runs.itertuples(index=False):
        if planned.get(name) != (block, cell, index):
            found = f"{name} ({block}, {cell}, seed {index})"
            raise InputError("run_id", found, "no run of this plan: train again under it")
    return set(runs["run_id"])
