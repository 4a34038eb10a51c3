"""Columns of a linear mixed model from the columns of a frame. There are no free formulas."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from gradnoise.base.errors import InputError

if TYPE_CHECKING:
    import pandas as pd

Array = NDArray[np.float64]

INTERCEPT = "1"


@dataclass(frozen=True)
class FixedMatrix:
    """X (rows x coefficients), an intercept first.

    `names` are the coefficients' names; `members` says which coefficients each term of the model has.
    """

    names: tuple[str, ...]
    values: Array
    members: Mapping[str, tuple[str, ...]]


@dataclass(frozen=True)
class RandomBlock:
    """Random effects of one cluster column that share an unstructured covariance.

    `values` is rows x effects; `codes` numbers each row's cluster, 0 .. clusters - 1.
    """

    cluster: str
    names: tuple[str, ...]
    values: Array
    codes: NDArray[np.intp]
    clusters: int

    @property
    def effects(self) -> Array:
        """Z, rows x clusters x effects."""
        indicator = self.codes[:, None] == np.arange(self.clusters)
        return np.asarray(indicator[:, :, None] * self.values[:, None, :])


def fixed_matrix(frame: pd.DataFrame, fixed: Sequence[str]) -> FixedMatrix:
    """An intercept and the terms `fixed`: columns, or interactions of columns written "a:b".

    A numeric column is itself. Strings, categories and booleans are categorical and get sum (deviation)
    coding as in R's contr.sum: of the K levels in sorted order, column k of K - 1 is 1 on level k, -1 on the
    last level and 0 elsewhere, and its coefficient is named `phase1`, `phase2`, ...; a coefficient is its
    level's deviation from the mean over levels. An interaction's columns are the products, the first factor
    varying fastest, named `total1:phase1`.

    Raises `InputError` for unknown or repeated terms, missing or infinite values, a categorical column with
    one level, and an interaction without the terms that its coding stands on.
    """
    terms = [INTERCEPT, *fixed]
    if isinstance(fixed, str) or len(set(terms)) < len(terms):
        raise InputError("fixed", list(fixed), "list each term once; the intercept is always in the model")
    names, values, members = [], [], {}
    for term in terms:
        _check_margins(frame, term, terms)
        found, columns = _term(frame, term)
        names += found
        values.append(columns)
        members[term] = tuple(found)
    if len(set(names)) < len(names):
        raise InputError("fixed", list(fixed), f"two coefficients would share a name: {names}")
    return FixedMatrix(tuple(names), np.column_stack(values), members)


def random_blocks(
    frame: pd.DataFrame, random: Mapping[str, Sequence[str]], *, correlated: bool
) -> list[RandomBlock]:
    """One block a cluster column, or with `correlated=False` one block a term (as lme4's `||`).

    `random` gives for each cluster column its terms, "1" being the intercept; a categorical term has the same
    columns as in `fixed_matrix`. Raises `InputError` for no terms, repeated ones, or fewer than 2 clusters.
    """
    if not random or not all(random.values()):
        raise InputError("random", dict(random), "give a cluster column and at least one term for it")
    blocks = []
    for cluster, terms in random.items():
        if isinstance(terms, str) or len(set(terms)) < len(terms):
            raise InputError(f"random: {cluster}", terms, "list each term once")
        _check_column(frame, cluster)
        codes, found = frame[cluster].factorize()
        if len(found) < 2:
            raise InputError(cluster, f"{len(found)} clusters", "give runs from at least 2")
        columns = [_term(frame, term) for term in terms]
        for group in [columns] if correlated else [[column] for column in columns]:
            names = tuple(name for part, _ in group for name in part)
            values = np.column_stack([values for _, values in group])
            blocks.append(RandomBlock(cluster, names, values, codes, len(found)))
    return blocks


def numeric(frame: pd.DataFrame, name: str) -> Array:
    """A column of finite numbers, or an `InputError`."""
    _check_column(frame, name)
    try:
        values = frame[name].to_numpy(dtype=float)
    except (TypeError, ValueError):
        raise InputError(name, f"a column of {frame[name].dtype}", "must hold numbers") from None
    if not np.all(np.isfinite(values)):
        raise InputError(name, "infinite value", "drop the row or give the value")
    return values


def _term(frame: pd.DataFrame, term: str) -> tuple[list[str], Array]:
    if term == INTERCEPT:
        return [INTERCEPT], np.ones((len(frame), 1))
    parts = [_main_effect(frame, name) for name in _factors(frame, term)]
    # The first factor varies fastest, so it is the last that `product` is given.
    chosen = [combination[::-1] for combination in product(*(range(len(names)) for names, _ in parts[::-1]))]
    names = [":".join(parts[f][0][k] for f, k in enumerate(picks)) for picks in chosen]
    columns = [
        np.prod([parts[f][1][:, k] for f, k in enumerate(picks)], axis=0, dtype=float) for picks in chosen
    ]
    return names, np.column_stack(columns)


def _main_effect(frame: pd.DataFrame, name: str) -> tuple[list[str], Array]:
    _check_column(frame, name)
    if not _categorical(frame, name):
        return [name], numeric(frame, name)[:, None]
    try:
        levels = sorted(frame[name].unique())
    except TypeError:
        raise InputError(name, "values of several kinds", "must hold numbers, or one kind of names") from None
    if len(levels) < 2:
        raise InputError(name, f"one level: {levels}", "must have at least 2, or leave the term out")
    indicators = np.column_stack([(frame[name] == level).to_numpy(dtype=float) for level in levels])
    return [f"{name}{k + 1}" for k in range(len(levels) - 1)], indicators[:, :-1] - indicators[:, -1:]


def _factors(frame: pd.DataFrame, term: str) -> list[str]:
    return [term] if term in frame else term.split(":")


def _categorical(frame: pd.DataFrame, name: str) -> bool:
    from pandas.api import types

    if types.is_bool_dtype(frame[name]):
        return True
    kinds = ("integer", "floating", "mixed-integer-float")  # also numbers kept as objects
    return not (types.is_numeric_dtype(frame[name]) or types.infer_dtype(frame[name]) in kinds)


def _check_margins(frame: pd.DataFrame, term: str, terms: Sequence[str]) -> None:
    """Sum coding of a factor in an interaction is right only beside the interaction without that factor."""
    factors = _factors(frame, term)
    if len(factors) < 2:
        return
    present = {frozenset(_factors(frame, other)) for other in terms}
    for name in factors:
        _check_column(frame, name)
        rest = [other for other in factors if other != name]
        if _categorical(frame, name) and frozenset(rest) not in present:
            raise InputError("fixed", term, f"put {':'.join(rest)} into the model too")


def _check_column(frame: pd.DataFrame, name: str) -> None:
    if name not in frame:
        raise InputError("column", name, f"must be one of {list(frame.columns)}")
    if frame[name].ndim > 1:
        raise InputError("column", name, "occurs more than once")
    if frame[name].isna().any():
        raise InputError(name, "missing value", "drop the row or give the value")
