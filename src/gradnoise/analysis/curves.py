"""Lines that are drawn through the runs."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from gradnoise.analysis.statistics.isotonic import isotonic_curve
from gradnoise.analysis.statistics.mixed import FitError, fit_mixed
from gradnoise.base.errors import InputError
from gradnoise.registration import Plan
from gradnoise.registration.kinds import MixedTest, TrendTest

if TYPE_CHECKING:
    import pandas as pd

Row = dict[str, object]

_POINTS = 50


def curves(plan: Plan, matching: str, frame: pd.DataFrame) -> list[Row]:
    """Rows of table `curves` for one matching: the mixed model's line and the isotonic step.

    The line is the fixed part of the plan's mixed model for the described outcome and predictor, on 50 equal
    steps, with its Kenward-Roger interval at each step: it holds point by point. The step is the
    least-squares isotonic fit in the direction of the plan's trend test, with no band: bootstrap bands of it
    cover too rarely with few seeds. What cannot be fitted has no rows.
    """
    outcome = plan.outcome(plan.descriptive.outcome)
    predictor = plan.descriptive.predictor
    rows: list[Row] = []
    for test in plan.tests:
        if isinstance(test, MixedTest) and (test.outcome, test.fixed) == (outcome.id, (predictor,)):
            rows += _line(plan, test, matching, frame, outcome.score)
            break
    directions = [t.alternative for t in plan.tests if isinstance(t, TrendTest) and t.outcome == outcome.id]
    if directions and len(frame):
        x, y = frame[predictor].to_numpy(dtype=float), frame[outcome.score].to_numpy(dtype=float)
        points, fitted = isotonic_curve(x, y, increasing=directions[0] == "increasing")
        rows += [_row(matching, "isotonic", a, b) for a, b in zip(points, fitted, strict=True)]
    return rows


def _line(plan: Plan, test: MixedTest, matching: str, frame: pd.DataFrame, score: str) -> list[Row]:
    predictor = test.fixed[0]
    level = plan.intervals.level
    try:
        fit = fit_mixed(frame, score, test.fixed, test.random, level=level, cross_check=False)
    except (InputError, FitError):
        return []
    grid = np.linspace(frame[predictor].min(), frame[predictor].max(), _POINTS)
    line = [(x, fit.contrast({"1": 1.0, predictor: x})) for x in grid]
    return [_row(matching, "mixed_model", x, at.estimate, at.low, at.high) for x, at in line]


def _row(
    matching: str, curve: str, x: float, y: float, low: float | None = None, high: float | None = None
) -> Row:
    return {"matching": matching, "curve": curve, "x": float(x), "y": float(y), "low": low, "high": high}
