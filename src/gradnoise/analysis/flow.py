"""The flow of runs: planned, started, finished, matched, excluded, analysed."""

from __future__ import annotations

from typing import TYPE_CHECKING

from gradnoise.base.errors import InputError
from gradnoise.base.study import Study
from gradnoise.base.vocabulary import STAGES
from gradnoise.registration import Plan, run_id

if TYPE_CHECKING:
    import pandas as pd


def flow_of_runs(
    plan: Plan, study: Study, scores: pd.DataFrame, matched: set[str], excluded: set[str]
) -> list[dict[str, object]]:
    """Count the runs of every cell at every stage (rows of table `flow`).

    planned: the study's cells x seeds; started: has scores; finished: no branch diverged; matched: reached
    the deciding matched point (`matched`, run names); excluded: matched, but without the primary exposure
    (`excluded`); analysed: the rest. The runs of a block that the plan does not match are neither matched nor
    analysed, so that block has no rows of these stages.

    Checked: no run is outside the plan or under another plan's name, the stages are nested, and in the block
    that is matched planned = analysed + excluded + unmatched + unfinished + missing. Raises `InputError`
    otherwise.
    """
    planned = {
        run_id(plan.sha256, block_name, cell.name, index): (block_name, cell.name)
        for block_name, block in study.blocks.items()
        for cell in block.cells()
        for index in range(block.seeds)
    }
    started = _started(planned, scores)
    finished = started - set(scores.loc[scores["status"] != "finished", "run_id"])
    stages = (set(planned), started, finished, matched, excluded & matched, matched - excluded)
    _check(stages, excluded, {name for name, (block, _) in planned.items() if block == plan.matching.block})
    rows: list[dict[str, object]] = []
    for block_name, block in study.blocks.items():
        last = STAGES[-1] if block_name == plan.matching.block else "finished"
        for cell in block.cells():
            here = {name for name, place in planned.items() if place == (block_name, cell.name)}
            rows.extend(
                {"block": block_name, "cell": cell.name, "stage": stage, "runs": len(here & runs)}
                for stage, runs in list(zip(STAGES, stages, strict=True))[: STAGES.index(last) + 1]
            )
    return rows


def totals(rows: list[dict[str, object]]) -> dict[str, int]:
    """Runs at each stage, over all cells."""
    return {stage: sum(int(str(row["runs"])) for row in rows if row["stage"] == stage) for stage in STAGES}


def _started(planned: dict[str, tuple[str, str]], scores: pd.DataFrame) -> set[str]:
    runs = scores[["run_id", "block", "cell", "seed_index"]].drop_duplicates()
    for name, block, cell in zip(runs["run_id"], runs["block"], runs["cell"], strict=True):
        if planned.get(name) != (block, cell):
            raise InputError(
                "run_id", f"{name} ({block}, {cell})", "no run of this plan: train again under it"
            )
    if runs["run_id"].duplicated().any():
        raise InputError("run_id", runs["run_id"][runs["run_id"].duplicated()].iloc[0], "names two runs")
    return set(runs["run_id"])


def _check(stages: tuple[set[str], ...], excluded: set[str], compared: set[str]) -> None:
    """Refuse stages that are not nested, or that do not add up over the runs which the plan compares."""
    planned, started, finished, matched, _, analysed = stages
    nested = analysed <= matched <= finished <= started <= planned and excluded <= matched <= compared
    lost = len(compared - started) + len(compared & started - finished) + len(compared & finished - matched)
    if not nested or len(compared) != len(analysed) + len(excluded) + lost:
        raise InputError("flow", [len(stage) for stage in stages], "runs are lost or counted twice")
