"""What the plan's tests work on: runs at each matched point, and what became of every planned run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from gradnoise.analysis.exclusions import excluded
from gradnoise.analysis.flow import Row, fates
from gradnoise.analysis.matching import Matched, branch_table, match
from gradnoise.analysis.reliability import reliability
from gradnoise.base.study import Study
from gradnoise.base.vocabulary import Matching
from gradnoise.evaluation.names import NAMES
from gradnoise.registration import Plan
from gradnoise.registration.faults import predictors

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True)
class Gathered:
    """Everything that is tested, described or counted.

    `branches`: one row a branch of every finished run; `matched`: runs at the matched points; `frames`: per
    matching one row a run, without excluded ones; `planned`: planned runs of each cell of the matched block;
    `fates`: rows of that table; `reliability`: of the loss between runs, None where there is none.
    """

    branches: pd.DataFrame
    matched: Matched
    frames: Mapping[Matching, pd.DataFrame]
    planned: Mapping[str, int]
    fates: list[Row]
    excluded: Mapping[str, str]
    reliability: float | None

    def reliable(self, plan: Plan) -> bool:
        """Whether the loss tells runs apart as well as the plan asks."""
        return self.reliability is not None and self.reliability >= plan.matching.minimum_reliability


def gather(plan: Plan, study: Study, scores: pd.DataFrame, exposure: pd.DataFrame) -> Gathered:
    """Match runs and leave out those that the plan excludes.

    `scores` and `exposure` have the columns of these tables. Raises `InputError` for rows that are not of
    this plan.
    """
    rule = plan.matching
    block = study.blocks[rule.block]
    branches = branch_table(scores, exposure)
    matched = match(branches, rule, NAMES[block.task.kind][rule.variable])
    left_out = excluded(plan, exposure)
    at_loss = set(matched.rows.loc[matched.rows["matching"] == "loss", "run_id"])
    return Gathered(
        branches=branches,
        matched=matched,
        frames={name: _frame(plan, matched, name, left_out) for name in rule.names},
        planned={cell.name: block.seeds for cell in block.cells()},
        fates=fates(plan, study, scores, at_loss, left_out),
        excluded=left_out,
        reliability=reliability(scores, rule.block, rule.variable),
    )


def _frame(plan: Plan, matched: Matched, matching: Matching, left_out: Mapping[str, Any]) -> pd.DataFrame:
    """Runs at a matched point that the plan does not leave out, with every column that a test may name."""
    scores = [outcome.score for outcome in plan.outcomes if outcome.block == plan.matching.block]
    wide = matched.wide(matching)
    # With no run at the point there are no columns either; the tests then say what is missing.
    known = ["run_id", "cell", "seed", "batch", "learning_rate"]
    needed = [*known, *scores, *predictors(plan), *plan.descriptive.rivals]
    wide = wide.reindex(columns=list(dict.fromkeys([*needed, *wide.columns])))
    return wide[~wide["run_id"].isin(list(left_out))].reset_index(drop=True)
