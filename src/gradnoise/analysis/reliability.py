"""How much of the differences in loss between runs is more than error of measurement."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from gradnoise.analysis.statistics.rows import used_rows
from gradnoise.base.errors import InputError

if TYPE_CHECKING:
    import pandas as pd


def reliability(scores: pd.DataFrame, block: str, variable: str) -> float | None:
    """1 - mean(se^2) / var over finished runs of log(`variable`) at each run's last branch.

    The logarithm is taken because matching interpolates in it, so errors in it are the ones that move a
    matched score; se(log l) = se(l) / l. Raw loss would be dominated by the few runs that have learnt least.
    Can be negative; None with fewer than 2 runs or no differences between them.
    """
    rows = scores[(scores["block"] == block) & (scores["score"] == variable)]
    diverged = set(rows.loc[rows["status"] != "finished", "run_id"])
    rows = rows[~rows["run_id"].isin(diverged)].sort_values(["sequences", "branch"])
    last = rows.groupby("run_id", sort=True).tail(1)
    values = np.log(last["value"].to_numpy(dtype=float))
    errors = (last["stderr"] / last["value"]).to_numpy(dtype=float)
    if len(values) < 2 or values.var(ddof=1) == 0:
        return None
    return float(1 - np.mean(errors**2) / values.var(ddof=1))


def centre_covariate(
    frame: pd.DataFrame, covariate: str, value: float | None, minimum: float, centred: str = "loss_c"
) -> pd.DataFrame:
    """`frame` with the column `centred`: the covariate minus its mean over the runs, for `fit_mixed`.

    A covariate that is measured with error adjusts too little: at a reliability of .64 a difference of .02 in
    loss was taken for an effect in 19 of 100 studies without one. So it is refused while its reliability
    `value` is below the registered `minimum`, or unknown (None). Centring changes no slope; it makes the
    intercept that of an average run. Raises `InputError` for that, and for rows that are not usable (see
    `rows.used_rows`).
    """
    if value is None or not value >= minimum:
        raise InputError(
            f"reliability of {covariate}", value, f"must be {minimum:g} or more to adjust for it"
        )
    rows = used_rows(frame, [covariate], [])
    values = rows[covariate].to_numpy()
    return frame.assign(**{centred: values - values.mean()})
