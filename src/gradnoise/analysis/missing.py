"""Runs that are missing from a comparison: how many, and how far they could move it."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING, Any

from gradnoise.base.errors import InputError
from gradnoise.registration.plan import Limits, Plan

if TYPE_CHECKING:
    import pandas as pd

# Ends of the range of a score, by its unit; others have none.
_RANGES = {"accuracy": (0.0, 1.0)}


def missing_runs(plan: Plan, frame: pd.DataFrame, planned: Mapping[str, int]) -> list[dict[str, Any]]:
    """Of every cell of the matched block: planned and compared runs, and worst-case bounds of its means.

    Runs that never reach the target loss are missing for a reason, so nothing is filled in. The bounds put
    every missing score at the one and at the other end of its range: [(sum + m low) / n, (sum + m high) / n].
    """
    found = []
    for cell, count in planned.items():
        rows = frame[frame["cell"] == cell]
        absent = count - len(rows)
        bounds = {}
        for outcome in plan.outcomes:
            if outcome.block == plan.matching.block:
                ends = _RANGES.get(outcome.unit)
                total = float(rows[outcome.score].sum())
                bounds[outcome.id] = [(total + absent * end) / count for end in ends] if ends else None
        found.append(
            {
                "cell": cell,
                "planned": count,
                "compared": len(rows),
                "missing_share": absent / count,
                "bounds": bounds,
            }
        )
    return found


def check_missing(
    limits: Limits, frame: pd.DataFrame, planned: Mapping[str, int], cells: Collection[str]
) -> None:
    """Raise `InputError` when a test on these cells misses more of its planned runs than the plan allows."""
    shares = {cell: 1 - int((frame["cell"] == cell).sum()) / planned[cell] for cell in cells}
    total = sum(share * planned[cell] for cell, share in shares.items()) / sum(planned[c] for c in cells)
    if total > limits.missing:
        raise InputError("runs", f"{total:.3g} of them missing", f"the plan allows {limits.missing:g}")
    difference = max(shares.values()) - min(shares.values())
    if difference > limits.difference:
        found = f"shares missing differ by {difference:.3g} between cells"
        raise InputError("runs", found, f"the plan allows {limits.difference:g}")
