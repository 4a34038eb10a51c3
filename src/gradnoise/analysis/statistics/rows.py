"""What a table of runs must be before anything is computed from it."""

from __future__ import annotations

from collections.abc import Sequence
from numbers import Real
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from gradnoise.base.errors import InputError

if TYPE_CHECKING:
    import pandas as pd


def used_rows(frame: pd.DataFrame, numbers: Sequence[str], names: Sequence[str]) -> pd.DataFrame:
    """The columns of `frame` that an analysis uses: `names` as they are, `numbers` as floats.

    Raises `InputError` for an absent column, for a missing or infinite entry, which averaging would pass over
    in silence, and for a row that repeats another one in every column of `frame`: one run given twice. Rows
    that differ somewhere (tasks of one run, two cells of one level) are not repeated.
    """
    for column in (*names, *numbers):
        if list(frame.columns).count(column) != 1:
            raise InputError("column", column, f"must be one of {list(frame.columns)}, and there once")
    if frame.empty:
        raise InputError("rows", "none", "give at least one run")
    repeated = frame.duplicated()
    if repeated.any():
        row = frame.loc[repeated, [*names, *numbers]].iloc[0].to_dict()
        raise InputError("rows", row, "is given twice: keep one row a run")
    rows = frame[list(dict.fromkeys([*names, *numbers]))].reset_index(drop=True)
    for column in names:
        if rows[column].isna().any():
            raise InputError(column, "missing value", "name it in every row or leave the row out")
    for column in numbers:
        missing = rows[column].isna()
        if not rows.loc[~missing, column].map(lambda value: isinstance(value, (Real, np.bool_))).all():
            raise InputError(column, str(rows[column].dtype), "must hold numbers")
        values = rows[column].to_numpy(dtype=float, na_value=np.nan)
        if not np.isfinite(values).all():
            raise InputError(column, "missing or infinite value", "mend it or leave the run out")
        rows[column] = values
    return rows


def memberships(names: pd.Series) -> NDArray[np.float64]:
    """Rows x different names, in the names' order: 1 where a row has the name, else 0."""
    codes = names.groupby(names, sort=True, observed=True).ngroup().to_numpy()
    return np.eye(codes.max() + 1)[codes]


def table_of_means(
    frame: pd.DataFrame, outcome: str, cluster: str, column: str, wanted: Sequence[object] | None = None
) -> tuple[pd.DataFrame, tuple[object, ...]]:
    """Clusters x values of `column`, each entry the mean of its rows, and the clusters that were left out.

    A cluster without every value of `column` (of `wanted`, if given) is incomplete and left out, so that
    every comparison is made within clusters. Raises `InputError` for a wanted value that occurs nowhere.
    """
    if wanted is not None and column in frame:
        for name in wanted:
            if not (frame[column] == name).any():
                there = sorted(map(str, frame[column].dropna().unique()))
                raise InputError(column, name, f"must be one of {there}")
        frame = frame[frame[column].isin(list(wanted))]
    rows = used_rows(frame, [outcome], [cluster, column])
    means = rows.groupby([cluster, column], sort=True, observed=True)[outcome].mean().unstack(column)
    if wanted is not None:
        means = means[list(wanted)]
    complete = means.dropna()
    return complete, tuple(name for name in means.index if name not in complete.index)
