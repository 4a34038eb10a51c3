"""Cluster-robust standard errors that hold with few clusters: CR2 with Satterthwaite degrees of freedom."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import ArrayLike, NDArray

from gradnoise.analysis.statistics.rows import memberships, used_rows
from gradnoise.analysis.statistics.student import ROUNDING, Student
from gradnoise.base.errors import InputError

if TYPE_CHECKING:
    import pandas as pd

Array = NDArray[np.float64]


@dataclass(frozen=True)
class RobustTerm:
    """A coefficient with its CR2 standard error, Satterthwaite df, two-sided p, and interval at `level`."""

    estimate: float
    se: float
    df: float
    t: float
    p: float
    low: float
    high: float


@dataclass(frozen=True)
class ClusterRobust:
    """Least-squares fit with cluster-robust errors; `terms` by predictor, and "1" if it has one intercept."""

    terms: Mapping[str, RobustTerm]
    level: float
    clusters: int
    runs: int


def cluster_robust(
    frame: pd.DataFrame,
    outcome: str,
    predictors: Sequence[str],
    cluster: str = "seed",
    *,
    within: bool = False,
    level: float = 0.95,
) -> ClusterRobust:
    """Least squares of `outcome` on numeric `predictors` with CR2 errors and Satterthwaite df.

    `within`: one intercept for each cluster instead of one for all, so that only differences within clusters
    count, as in `seed_slopes`; balanced, the two then agree exactly. `frame` has one row a run. Raises
    `InputError` with fewer than 2 clusters, predictors that are not independent, or rows that are not usable
    (see `rows.used_rows`).
    """
    rows = used_rows(frame, [outcome, *predictors], [cluster])
    if not predictors:
        raise InputError("predictors", "none", "name at least one")
    members = memberships(rows[cluster])
    intercepts = members if within else np.ones((len(rows), 1))
    design = np.column_stack([rows[list(predictors)].to_numpy(), intercepts])
    beta, se, df = cr2(design, rows[outcome].to_numpy(), members.argmax(axis=1))
    names = [*predictors, *([] if within else ["1"])]
    terms = {}
    for k, name in enumerate(names):
        term = Student(float(beta[k]), float(se[k]), float(df[k]))
        low, high = term.interval((1 - level) / 2)
        t = term.estimate / term.se
        terms[name] = RobustTerm(term.estimate, term.se, term.df, t, term.p(), low, high)
    return ClusterRobust(terms, level, members.shape[1], len(rows))


def cr2(design: Array, outcome: Array, clusters: ArrayLike) -> tuple[Array, Array, Array]:
    """Coefficients, CR2 standard errors and Satterthwaite df of the least-squares fit.

    With H = X (X'X)^-1 X', residuals e and A_g = (I - H_gg)^(-1/2) (generalised, as fixed effects may use up
    a direction): V = (X'X)^-1 [sum_g X_g' A_g e_g e_g' A_g X_g] (X'X)^-1. For coefficient k,
    p_g = (I - H)_(.g) A_g X_g (X'X)^-1 e_k, G = (p_g' p_h), df = tr(G)^2 / tr(G G). `design` (n, columns),
    `outcome` and `clusters` (n,). Raises `InputError` for columns that are not independent, and fewer than 2
    clusters.
    Sources: Bell and McCaffrey, Survey Methodology 2002; Pustejovsky and Tipton, Journal of Business and
    Economic Statistics 2018.
    """
    names = np.asarray(clusters)
    groups = [np.flatnonzero(names == name) for name in dict.fromkeys(names.tolist())]
    if len(groups) < 2:
        raise InputError("cluster", f"{len(groups)} clusters", "give at least 2")
    if np.linalg.matrix_rank(design) < design.shape[1]:
        raise InputError("predictors", f"{design.shape[1]} columns", "must be linearly independent")
    q, r = np.linalg.qr(design)
    residuals = outcome - q @ (q.T @ outcome)
    if np.abs(residuals).max() <= ROUNDING * np.abs(outcome).max():
        raise InputError("outcome", "no residual variation", "is explained without error")
    # X = Q R: H = Q Q' and X (X'X)^-1 = Q R^-T, without squaring the condition of X.
    influence = np.linalg.solve(r, q.T).T
    beta = influence.T @ outcome
    left = np.eye(len(design)) - q @ q.T
    weighted = [_inverse_root(left[np.ix_(g, g)]) @ influence[g] for g in groups]
    scores = np.array([w.T @ residuals[g] for w, g in zip(weighted, groups, strict=True)])
    df = np.empty(len(beta))
    for k in range(len(beta)):
        p = np.column_stack([left[:, g] @ w[:, k] for w, g in zip(weighted, groups, strict=True)])
        products = p.T @ p
        df[k] = np.trace(products) ** 2 / (products**2).sum()
    return beta, np.sqrt((scores**2).sum(axis=0)), df


def _inverse_root(matrix: Array) -> Array:
    """Symmetric M^(-1/2), with 0 where M has no extent."""
    values, vectors = np.linalg.eigh(matrix)
    # Of a projection's block, eigenvalues lie in [0, 1]; rounding leaves about 1e-16 of a 0.
    roots = np.where(values > 1e-10, 1 / np.sqrt(np.maximum(values, 1e-10)), 0.0)
    return np.asarray(vectors * roots @ vectors.T)
