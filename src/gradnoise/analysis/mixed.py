"""Linear mixed models by restricted maximum likelihood (REML)."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from gradnoise.base.errors import InputError

if TYPE_CHECKING:
    import pandas as pd

Array = NDArray[np.float64]

# lme4's isSingular uses the same bound on the same quantity, the diagonal of the relative Cholesky factor.
_SINGULAR = 1e-4


class FitError(ArithmeticError):
    """The model could not be fitted to these rows."""


@dataclass(frozen=True)
class Term:
    """A fixed effect: estimate and standard error in units of the outcome per unit of the predictor.

    `t` is estimate / se. `df`, `p`, `low` and `high` are None: the library behind the fit has only a normal
    approximation, which is far too narrow with few clusters, so nothing is reported instead.
    """

    estimate: float
    se: float
    t: float
    df: float | None = None
    p: float | None = None
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True)
class MixedFit:
    """A fitted model, in the units of the data.

    `loglik` is the restricted log-likelihood in lme4's convention; `theta` the lower triangle, by columns,
    of the Cholesky factor of the random effects' covariance divided by the residual variance; `sigma` the
    residual standard deviation. `singular`: the optimum lies on the edge of the covariances, which is
    common with few clusters and no reason to drop a term. `converged`: the optimiser's own word.
    """

    terms: Mapping[str, Term]
    loglik: float
    theta: tuple[float, ...]
    sigma: float
    singular: bool
    converged: bool
    runs: int
    clusters: int


def fit_mixed(
    frame: pd.DataFrame, outcome: str, fixed: Sequence[str], random: Mapping[str, Sequence[str]]
) -> MixedFit:
    """Fit y = X b + Z u + e by REML, with u ~ N(0, G) per cluster and e ~ N(0, sigma^2 I).

    `frame` has one row a run. X is an intercept and the numeric columns `fixed`. `random` names one cluster
    column and its terms: "1" for the intercept, otherwise columns; G is unstructured.

    Outcome and predictors are standardised for the fit and the answer is put back in the data's units (the
    optimum is the same one): on the scale of accuracies optimisers stop early. statsmodels' MixedLM with
    Powell's method, the only one of its optimisers that was right on every reference fit, finds the
    neighbourhood; because its likelihood is infinite at a singular covariance, which is where few seeds often
    lead, and its standard errors are up to 3 % off, the last step maximises the profiled likelihood itself.

    Raises `InputError` for unknown columns, missing values, fewer than 2 clusters or no spare rows, and
    `FitError` when the fit breaks down.
    Sources: Lindstrom and Bates, JASA 1988 (statsmodels); Bates et al., JSS 2015 (the profiled criterion).
    """
    design = _design(frame, outcome, list(fixed), random)
    fit = _fit(design)
    beta = design.spread * design.to_fixed @ fit.beta
    beta[0] += design.mean
    covariance = fit.scale * design.to_fixed @ fit.unit_covariance @ design.to_fixed.T
    errors = design.spread * np.sqrt(np.diag(covariance))
    relative = fit.factor @ fit.factor.T
    theta = _cholesky(design.to_random @ relative @ design.to_random.T)
    # |X' V^-1 X| and |V| change with the units: this is the log-likelihood of the data as given.
    spare = len(design.y) - len(beta)
    loglik = fit.loglik - spare * np.log(design.spread) + np.linalg.slogdet(design.to_fixed)[1]
    return MixedFit(
        terms={
            name: Term(float(b), float(se), float(b / se))
            for name, b, se in zip(["1", *fixed], beta, errors, strict=True)
        },
        loglik=float(loglik),
        theta=tuple(float(theta[i, j]) for j in range(len(theta)) for i in range(j, len(theta))),
        sigma=float(design.spread * np.sqrt(fit.scale)),
        singular=bool(np.diag(_cholesky(relative)).min() < _SINGULAR),
        converged=fit.converged,
        runs=len(design.y),
        clusters=len(np.unique(design.groups)),
    )


@dataclass(frozen=True)
class _Design:
    """The standardised model, and the way back: matrices from its coefficients to those of the data."""

    y: Array
    exog: Array
    exog_re: Array
    groups: NDArray[np.generic]
    mean: float
    spread: float
    to_fixed: Array
    to_random: Array


def _design(
    frame: pd.DataFrame, outcome: str, fixed: list[str], random: Mapping[str, Sequence[str]]
) -> _Design:
    cluster, random_terms = _one_cluster(random)
    slopes = [term for term in random_terms if term != "1"]
    _check(frame, [outcome, *fixed, *slopes, cluster])
    groups = frame[cluster].to_numpy()
    y = frame[outcome].to_numpy(dtype=float)
    if len(np.unique(groups)) < 2 or len(y) <= len(fixed) + 1:
        raise InputError(cluster, f"{len(np.unique(groups))} clusters, {len(y)} rows", "give more runs")
    columns = {name: frame[name].to_numpy(dtype=float) for name in dict.fromkeys([*fixed, *slopes])}
    # Shifting a predictor leaves the model unchanged only where its slope has an intercept beside it.
    centred = "1" in random_terms or not slopes
    shift = {name: float(x.mean()) if centred else 0.0 for name, x in columns.items()}
    scale = {name: float(x.std()) for name, x in columns.items()}
    spread = float(y.std())
    if spread == 0 or 0 in scale.values():
        raise FitError("a column does not vary")
    standard = {name: (x - shift[name]) / scale[name] for name, x in columns.items()} | {"1": np.ones_like(y)}
    exog = np.column_stack([standard[name] for name in ["1", *fixed]])
    if np.linalg.matrix_rank(exog) < exog.shape[1]:
        raise FitError(f"the fixed terms {fixed} are not independent of one another")
    return _Design(
        y=(y - y.mean()) / spread,
        exog=exog,
        exog_re=np.column_stack([standard[term] for term in random_terms]),
        groups=groups,
        mean=float(y.mean()),
        spread=spread,
        to_fixed=_unstandardise(["1", *fixed], shift, scale),
        to_random=_unstandardise(random_terms, shift, scale),
    )


def _one_cluster(random: Mapping[str, Sequence[str]]) -> tuple[str, list[str]]:
    if len(random) != 1 or not all(random.values()):
        raise InputError("random", dict(random), "give one cluster column and at least one term")
    ((cluster, terms),) = random.items()
    return cluster, list(terms)


def _check(frame: pd.DataFrame, names: Sequence[str]) -> None:
    for name in names:
        if name not in frame:
            raise InputError("column", name, f"must be one of {list(frame.columns)}")
        if frame[name].isna().any():
            raise InputError(name, "missing value", "drop the row or give the value")


@dataclass(frozen=True)
class _Profile:
    """The model at one `factor`, the Cholesky factor of the relative covariance of the random effects."""

    loglik: float
    beta: Array
    unit_covariance: Array
    scale: float
    factor: Array
    converged: bool = True


def _fit(design: _Design) -> _Profile:
    """Maximise the restricted likelihood: statsmodels to the neighbourhood, the exact profile to the end."""
    from scipy.optimize import minimize

    members = [design.groups == name for name in np.unique(design.groups)]
    blocks = [(design.y[rows], design.exog[rows], design.exog_re[rows]) for rows in members]
    size = design.exog_re.shape[1]
    lower = np.tril_indices(size)

    def profile(entries: Array) -> _Profile:
        factor = np.zeros((size, size))
        factor[lower] = entries
        return _profile(blocks, factor)

    starts = [np.eye(size)[lower]]
    near = _statsmodels_factor(design)
    if near is not None:
        starts.insert(0, near[lower])
    options = {"xatol": 1e-9, "fatol": 1e-12, "maxiter": 2000 * size, "maxfev": 2000 * size}
    found = [
        minimize(lambda entries: -profile(entries).loglik, start, method="Nelder-Mead", options=options)
        for start in starts
    ]
    best = min(found, key=lambda result: float(result.fun))
    fit = profile(best.x)
    if not np.isfinite(fit.loglik):
        raise FitError("the restricted log-likelihood is not finite")
    return replace(fit, converged=bool(best.success))


def _statsmodels_factor(design: _Design) -> Array | None:
    from statsmodels.regression.mixed_linear_model import MixedLM

    with warnings.catch_warnings():
        # Its boundary warning is an absolute bound on variances and fires on every set of accuracies.
        warnings.simplefilter("ignore")
        try:
            model = MixedLM(design.y, design.exog, groups=design.groups, exog_re=design.exog_re)
            fit = model.fit(reml=True, method="powell")
        except (np.linalg.LinAlgError, ValueError, ZeroDivisionError):
            return None
        relative = np.asarray(fit.cov_re) / fit.scale
    return _cholesky(relative) if np.all(np.isfinite(relative)) else None


def _profile(blocks: Sequence[tuple[Array, Array, Array]], factor: Array) -> _Profile:
    """Restricted log-likelihood with the fixed effects and the residual variance s2 profiled out.

    -1/2 [(n - p)(log(2 pi s2) + 1) + sum_i log|V_i| + log|sum_i X_i' V_i^-1 X_i|] with
    V_i = I + Z_i F F' Z_i', s2 = residual sum of squares / (n - p).  Source: Bates et al., JSS 2015, eq. 41.
    """
    columns = blocks[0][1].shape[1]
    gram, log_det, n = np.zeros((columns + 1, columns + 1)), 0.0, 0
    for y, x, z in blocks:
        root = np.linalg.cholesky(np.eye(len(y)) + (z @ factor) @ (z @ factor).T)
        whitened = np.linalg.solve(root, np.column_stack([x, y]))
        gram += whitened.T @ whitened
        log_det += 2 * float(np.log(np.diag(root)).sum())
        n += len(y)
    normal, right = gram[:columns, :columns], gram[:columns, columns]
    beta = np.linalg.solve(normal, right)
    # A residual of rounding size would make the likelihood whatever rounding makes it.
    scale = max(float(gram[columns, columns] - right @ beta), 1e-12 * n) / (n - columns)
    spare = n - columns
    loglik = -0.5 * (spare * (np.log(2 * np.pi * scale) + 1) + log_det + np.linalg.slogdet(normal)[1])
    return _Profile(float(loglik), beta, np.linalg.inv(normal), scale, factor)


def _unstandardise(terms: Sequence[str], shift: Mapping[str, float], scale: Mapping[str, float]) -> Array:
    """Matrix from coefficients of (1, (x - shift) / scale) to coefficients of (1, x)."""
    matrix = np.diag([1.0 if term == "1" else 1 / scale[term] for term in terms])
    if "1" in terms:
        for column, term in enumerate(terms):
            if term != "1":
                matrix[list(terms).index("1"), column] = -shift[term] / scale[term]
    return matrix


def _cholesky(matrix: Array) -> Array:
    """Lower Cholesky factor that also exists for a singular covariance."""
    values, vectors = np.linalg.eigh(matrix)
    upper = np.linalg.qr((vectors * np.sqrt(np.maximum(values, 0))).T).R
    signs = np.where(np.diag(upper) < 0, -1.0, 1.0)
    return np.asarray(upper.T * signs, dtype=float)
