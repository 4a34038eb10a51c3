"""Lines that are drawn through the runs."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from gradnoise.analysis.isotonic import isotonic_curve
from gradnoise.analysis.mixed import FitError, fit_mixed
from gradnoise.analysis.slopes import seed_slopes
from gradnoise.base.errors import InputError
from gradnoise.registration.plan import MixedTest, Plan, TrendTest

if TYPE_CHECKING:
    import pandas as pd

Row = dict[str, object]

_POINTS = 50


def curves(plan: Plan, matching: str, frame: pd.DataFrame) -> list[Row]:
    """Rows of table `curves` for one matching: the mixed model's line and the isotonic step.

    The line is the fixed part of the plan's mixed model for the described outcome and predictor, on 50 equal
    steps. Its band does not come from that model, which has no degrees of freedom, but from the lines of the
    seeds: at each x, line +- t(S-1) sd over seeds of a_s + b_s x / sqrt(S). It holds point by point. The
    step is the least-squares isotonic fit in the direction of the plan's trend test, with no band:
    bootstrap bands of it cover too rarely with few seeds. What cannot be fitted has no rows.
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
    try:
        fit = fit_mixed(frame, score, test.fixed, test.random)
    except (InputError, FitError):
        return []
    grid = np.linspace(frame[predictor].min(), frame[predictor].max(), _POINTS)
    line = fit.terms["1"].estimate + fit.terms[predictor].estimate * grid
    half = _half_width(frame, score, predictor, grid, plan.intervals.level)
    if half is None:
        return [_row(matching, "mixed_model", x, y) for x, y in zip(grid, line, strict=True)]
    return [
        _row(matching, "mixed_model", x, y, y - h, y + h) for x, y, h in zip(grid, line, half, strict=True)
    ]


def _half_width(
    frame: pd.DataFrame, score: str, predictor: str, grid: NDArray[np.float64], level: float
) -> NDArray[np.float64] | None:
    from scipy import stats

    try:
        slope = seed_slopes(frame, score, predictor, level=level)
    except InputError:
        return None
    intercepts, slopes = (np.array(list(part.values())) for part in (slope.intercepts, slope.slopes))
    lines = intercepts[:, None] + slopes[:, None] * grid
    half = stats.t.isf((1 - level) / 2, slope.df) * lines.std(axis=0, ddof=1) / np.sqrt(len(lines))
    return np.asarray(half, dtype=float)


def _row(
    matching: str, curve: str, x: float, y: float, low: float | None = None, high: float | None = None
) -> Row:
    return {"matching": matching, "curve": curve, "x": float(x), "y": float(y), "low": low, "high": high}
