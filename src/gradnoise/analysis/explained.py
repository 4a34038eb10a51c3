"""What exposure explains, beside its rivals. Descriptive: no test, no p."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True)
class Explained:
    """Within-seed R-squared with its jackknife interval (None where there is none) and the runs behind it."""

    value: float
    low: float | None
    high: float | None
    runs: int


def explained(frame: pd.DataFrame, outcome: str, predictor: str, level: float = 0.95) -> Explained | None:
    """R^2 = S_xy^2 / (S_xx S_yy) after each seed's mean is taken off both.

    The interval is a delete-one-seed jackknife: pseudo-values S R^2 - (S - 1) R^2_(-s), their mean and
    standard error, t with S - 1 degrees of freedom. It is descriptive, and may reach beyond 0 and 1. A
    predictor that does not vary explains 0, without interval. None when there are no runs or the outcome is
    constant.
    """
    from scipy import stats

    rows = frame[["seed", outcome, predictor]].dropna()
    if rows.empty or np.ptp(rows[outcome].to_numpy(dtype=float)) == 0:
        return None
    names = rows["seed"].to_numpy()
    groups = rows.groupby("seed")
    x = (rows[predictor] - groups[predictor].transform("mean")).to_numpy(dtype=float)
    y = (rows[outcome] - groups[outcome].transform("mean")).to_numpy(dtype=float)
    # Rounding alone makes no variation.
    if np.abs(x).max() <= 1e-9 * np.abs(rows[predictor].to_numpy(dtype=float)).max():
        return Explained(0.0, None, None, len(rows))
    whole = _r_squared(x, y)
    seeds = np.unique(names)
    count = len(seeds)
    if count < 3:
        return Explained(whole, None, None, len(rows))
    without = np.array([_r_squared(x[names != name], y[names != name]) for name in seeds])
    pseudo = count * whole - (count - 1) * without
    half = stats.t.isf((1 - level) / 2, count - 1) * pseudo.std(ddof=1) / np.sqrt(count)
    return Explained(whole, float(pseudo.mean() - half), float(pseudo.mean() + half), len(rows))


def _r_squared(x: NDArray[np.float64], y: NDArray[np.float64]) -> float:
    scale = float((x @ x) * (y @ y))
    return float((x @ y) ** 2 / scale) if scale > 0 else 0.0
