"""Runs that the plan leaves out, by what is known of them without seeing any outcome."""

from __future__ import annotations

import operator
from typing import TYPE_CHECKING

from gradnoise.registration.plan import Plan

if TYPE_CHECKING:
    import pandas as pd

_COMPARE = {"<": operator.lt, "<=": operator.le, ">": operator.gt, ">=": operator.ge}


def blind_facts(plan: Plan, exposure: pd.DataFrame) -> pd.DataFrame:
    """Blind columns of every run of the matched block, indexed by run_id.

    Over the run's branches: `exposure`, the least primary exposure; `exposure_relative_stderr`, the largest
    standard error over the exposure; `events`, the fewest measured updates.
    """
    rows = exposure[
        (exposure["block"] == plan.matching.block) & (exposure["definition"] == plan.exposure.primary)
    ]
    rows = rows.assign(relative=rows["stderr"] / rows["value"].where(rows["value"] > 0))
    runs = rows.groupby("run_id", sort=True)
    return runs.agg(
        exposure=("value", "min"), exposure_relative_stderr=("relative", "max"), events=("events", "min")
    )


def excluded(plan: Plan, exposure: pd.DataFrame) -> dict[str, str]:
    """Run to the first rule of the plan that leaves it out; an unknown value breaks no rule."""
    facts = blind_facts(plan, exposure)
    found: dict[str, str] = {}
    for rule in plan.exclusions:
        broken = facts.index[_COMPARE[rule.op](facts[rule.column].astype(float), rule.value)]
        found = {str(run): rule.id for run in broken} | found
    return found
