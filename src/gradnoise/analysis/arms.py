"""Noise arms side by side, without a test: what each scored at its end, and the noise it had up to there."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from gradnoise.base.study import Study
from gradnoise.evaluation.names import NAMES
from gradnoise.registration import Plan

if TYPE_CHECKING:
    import pandas as pd

SHARE = "share_injected"


def arms(plan: Plan, study: Study, branches: pd.DataFrame) -> list[dict[str, Any]]:
    """Every arm of every block, with means over its finished runs at the last branch of each.

    `branches`: as `branch_table` gives them. Quantities are the scores among the plan's outcomes, the
    logarithm of the primary exposure, and the share of `pne2` that was injected. `stderr` is that of the mean
    over runs, null for a single run.
    """
    # In the order of their sequences, so a run's last row is its last branch.
    last = branches.groupby("run_id", sort=False).tail(1)
    doses = last.reindex(columns=["log10_pne2", "log10_pne2_injected"]).astype(float)
    # Nothing injected has no logarithm.
    share = (10 ** (doses["log10_pne2_injected"] - doses["log10_pne2"])).fillna(0.0)
    last = last.assign(**{SHARE: share.where(doses["log10_pne2"].notna())})
    dose = f"{plan.exposure.transform}_{plan.exposure.primary}"
    scores = list(dict.fromkeys(outcome.score for outcome in plan.outcomes))
    found: list[dict[str, Any]] = []
    for block_name, block in study.blocks.items():
        units = NAMES[block.task.kind]
        own = {score: units[score] for score in scores if score in units} | {dose: "", SHARE: ""}
        for name, arm in block.arms.items():
            runs = last[(last["block"] == block_name) & (last["cell"] == name)]
            found.append(
                {
                    "block": block_name,
                    "arm": name,
                    "noise": arm.noise and arm.noise.model_dump(mode="json", exclude_unset=True),
                    "branch": "last",
                    "planned": block.seeds,
                    "finished": len(runs),
                    "quantities": [
                        {"quantity": quantity, "unit": unit, **_mean(runs, quantity)}
                        for quantity, unit in own.items()
                    ],
                }
            )
    return found


def _mean(runs: pd.DataFrame, quantity: str) -> dict[str, float | None]:
    """Mean over the runs that have the quantity, with its standard error."""
    values = runs.reindex(columns=[quantity])[quantity].dropna().astype(float)
    if values.empty:
        return {"mean": None, "stderr": None}
    stderr = float(values.std(ddof=1)) / math.sqrt(len(values)) if len(values) > 1 else None
    return {"mean": float(values.mean()), "stderr": stderr}
