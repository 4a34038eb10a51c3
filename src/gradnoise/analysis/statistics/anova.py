"""Factorial analysis of variance, blocked by seed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from gradnoise.analysis.statistics.rows import used_rows
from gradnoise.analysis.statistics.student import ROUNDING
from gradnoise.base.errors import InputError

if TYPE_CHECKING:
    import pandas as pd

# A leverage this near to 1 is 1.
_FULL = 1 - 1e-9


@dataclass(frozen=True)
class AnovaTerm:
    """One term: sum of squares, degrees of freedom, F and p; the same with HC3 covariance.

    `robust_F` and `robust_p` hold when variances differ between cells. They are None where a run alone
    determines a coefficient (leverage 1), because HC3 divides by what is left.
    """

    sum_sq: float
    df: int
    F: float
    p: float
    robust_F: float | None
    robust_p: float | None


@dataclass(frozen=True)
class Anova:
    """Type III analysis of variance: `terms` by name (`a`, `b`, `a:b`, and the block), and the residual."""

    terms: Mapping[str, AnovaTerm]
    residual_sum_sq: float
    residual_df: int
    block: str | None
    runs: int


def anova(frame: pd.DataFrame, outcome: str, factors: Sequence[str], block: str | None = "seed") -> Anova:
    """Type III analysis of variance of all factors and their interactions, with an additive block.

    Every factor, numbers too, is taken as a set of levels with Sum coding: with another coding type III
    tests differences at one level of the other factors, not main effects. With a block (the seeds), each run
    is compared within its block, and a row stands for one run: a block has each combination of levels at
    most once. `block=None`: runs share nothing.

    Raises `InputError` when a combination of levels has no run, a block has one twice, the runs do not
    determine the model or leave no error, or rows are not usable (see `rows.used_rows`).
    Source of the computation: statsmodels `anova_lm`; HC3: MacKinnon and White, Journal of Econometrics 1985.
    """
    from statsmodels.formula.api import ols
    from statsmodels.stats.anova import anova_lm

    names = [*factors, *([block] if block is not None else [])]
    if not factors or len(set(names)) < len(names) or outcome in names:
        raise InputError("factors", names, "must be different columns, and none the outcome")
    rows = used_rows(frame, [outcome], names)
    _check_cells(rows, list(factors), block)
    # A column's name is never read as a formula: each gets a safe one, and its levels become numbers.
    safe = {name: f"factor{k}" for k, name in enumerate(names)}
    data = rows.rename(columns={outcome: "outcome"})[["outcome"]]
    for name in names:
        data[safe[name]] = _codes(rows[name])
    terms = " * ".join(f"C({safe[name]}, Sum)" for name in factors)
    blocks = f"C({safe[block]}, Sum) + " if block is not None else ""
    fit = ols(f"outcome ~ {blocks}{terms}", data).fit()
    _check_fit(fit, outcome)
    plain = anova_lm(fit, typ=3)
    leverage = (np.linalg.qr(fit.model.exog)[0] ** 2).sum(axis=1)
    robust = None if leverage.max() > _FULL else anova_lm(fit, typ=3, robust="hc3")
    shown = {f"C({code}, Sum)": name for name, code in safe.items()}
    found = {
        ":".join(shown[part] for part in term.split(":")): AnovaTerm(
            sum_sq=float(row["sum_sq"]),
            df=int(row["df"]),
            F=float(row["F"]),
            p=float(row["PR(>F)"]),
            robust_F=None if robust is None else float(robust.loc[term, "F"]),
            robust_p=None if robust is None else float(robust.loc[term, "PR(>F)"]),
        )
        for term, row in plain.iterrows()
        if term not in ("Intercept", "Residual")
    }
    return Anova(found, float(plain.loc["Residual", "sum_sq"]), int(fit.df_resid), block, len(rows))


def _codes(column: pd.Series) -> np.ndarray:
    """0, 1, ... for a column's values, in an order that does not depend on that of the rows."""
    values = sorted(column.unique(), key=lambda value: (str(type(value)), value))
    return column.map({value: k for k, value in enumerate(values)}).to_numpy(dtype=int)


def _check_cells(rows: pd.DataFrame, factors: list[str], block: str | None) -> None:
    for name in factors:
        if rows[name].nunique() < 2:
            raise InputError(name, rows[name].unique().tolist(), "must have at least 2 levels")
    possible = int(np.prod([rows[name].nunique() for name in factors]))
    present = len(rows[factors].drop_duplicates())
    if present < possible:
        raise InputError("factors", f"{present} of {possible} combinations have runs", "all must have some")
    if block is not None:
        repeated = rows.duplicated([*factors, block])
        if repeated.any():
            row = rows.loc[repeated, [*factors, block]].iloc[0].to_dict()
            raise InputError("rows", row, "has several rows: average them to one run a cell and block")


def _check_fit(fit: Any, outcome: str) -> None:
    """Refuse a design that the runs do not determine, and a fit that leaves nothing over."""
    runs, columns = fit.model.exog.shape
    if np.linalg.matrix_rank(fit.model.exog) < columns or runs <= columns:
        raise InputError("rows", f"{runs} runs, {columns} coefficients", "do not determine the model")
    if fit.ssr <= runs * (ROUNDING * float(np.abs(fit.model.endog).max())) ** 2:
        raise InputError(outcome, "no residual variation", "is explained without error: there is no F")
