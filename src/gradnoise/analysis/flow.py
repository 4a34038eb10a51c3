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
    (`excluded`); analysed: the rest. A block that is not matched by the plan is compared as it ended, so its
    finished runs count as matched.

    Checked: no run is outside the plan or under another plan's name, the stages are nested, and
    planned = analysed + excluded + unmatched + unfinished + missing. Raises `InputError` otherwise.
    """
    planned = {
        run_id(plan.sha256, block_name, cell.name, index): (block_name, cell.name)
        for block_name, block in study.blocks.items()
        for cell in block.cells()
        for index in range(block.seeds)
    }
    started = _started(planned, scores)
    finished = started - set(scores.loc[scores["status"] != "finished", "run_id"])
    unmatched_blocks = {name for name in finished if planned[name][0] != plan.matching.block}
    matched = matched | unmatched_blocks
    analysed = matched - excluded
    stages = (set(planned), started, finished, matched, excluded & matched, analysed)
    _check(stages, excluded)
    rows: list[dict[str, object]] = []
    for block_name, block in study.blocks.items():
        for cell in block.cells():
            here = {name for name, place in planned.items() if place == (block_name, cell.name)}
            rows.extend(
                {"block": block_name, "cell": cell.name, "stage": stage, "runs": len(here & runs)}
                for stage, runs in zip(STAGES, stages, strict=True)
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


def _check(stages: tuple[set[str], ...], excluded: set[str]) -> None:
    planned, started, finished, matched, _, analysed = stages
    nested = analysed <= matched <= finished <= started <= planned and excluded <= matched
    lost = len(planned - started) + len(started - finished) + len(finished - matched)
    if not nested or len(planned) != len(analysed) + len(excluded) + lost:
        raise InputError("flow", [len(stage) for stage in stages], "runs are lost or counted twice")
