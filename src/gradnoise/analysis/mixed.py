"""Linear mixed models by restricted maximum likelihood (REML)."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from gradnoise.errors import InputError

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
    optimum is the same one): on the scale of accuracies the optimisers stop early. Of these only Powell's
    method was right on every reference fit, so it is the one used.

    Raises `InputError` for unknown columns, missing values, fewer than 2 clusters or no spare rows, and
    `FitError` when the fit breaks down.
    Source: statsmodels MixedLM (Lindstrom and Bates, JASA 1988).
    """
    cluster, random_terms = _one_cluster(random)
    slopes = [term for term in random_terms if term != "1"]
    _check(frame, [outcome, *fixed, *slopes, cluster])
    groups = frame[cluster].to_numpy()
    y = frame[outcome].to_numpy(dtype=float)
    names = list(dict.fromkeys([*fixed, *slopes]))
    columns = {name: frame[name].to_numpy(dtype=float) for name in names}
    if len(set(groups)) < 2 or len(y) <= len(fixed) + 1:
        raise InputError(cluster, f"{len(set(groups))} clusters, {len(y)} rows", "give more runs")
    # Shifting a predictor leaves the model unchanged only where its slope has an intercept beside it.
    centred = "1" in random_terms or not slopes
    shift = {name: float(x.mean()) if centred else 0.0 for name, x in columns.items()}
    scale = {name: float(x.std()) for name, x in columns.items()}
    spread = float(y.std())
    if spread == 0 or 0 in scale.values():
        raise FitError("a column does not vary")
    standard = {name: (x - shift[name]) / scale[name] for name, x in columns.items()}
    ones = np.ones_like(y)
    exog = np.column_stack([ones, *(standard[name] for name in fixed)])
    exog_re = np.column_stack([ones if term == "1" else standard[term] for term in random_terms])
    fit = _fit((y - y.mean()) / spread, exog, groups, exog_re)

    to_fixed = _unstandardise(["1", *fixed], shift, scale)
    to_random = _unstandardise(random_terms, shift, scale)
    beta = spread * to_fixed @ np.asarray(fit.fe_params)
    beta[0] += y.mean()
    relative = np.asarray(fit.cov_re) / fit.scale
    covariance = fit.scale * _unit_covariance(exog, exog_re, groups, relative)
    errors = spread * np.sqrt(np.diag(to_fixed @ covariance @ to_fixed.T))
    theta = _cholesky(to_random @ relative @ to_random.T)
    # |X' V^-1 X| and |V| change with the units: this is the log-likelihood of the data as given.
    jacobian = float(np.linalg.slogdet(to_fixed)[1])
    loglik = float(fit.llf) - (len(y) - exog.shape[1]) * np.log(spread) + jacobian
    return MixedFit(
        terms={
            name: Term(float(b), float(se), float(b / se))
            for name, b, se in zip(["1", *fixed], beta, errors, strict=True)
        },
        loglik=float(loglik),
        theta=tuple(float(theta[i, j]) for j in range(len(theta)) for i in range(j, len(theta))),
        sigma=float(spread * np.sqrt(fit.scale)),
        singular=bool(np.diag(_cholesky(relative)).min() < _SINGULAR),
        converged=bool(fit.converged),
        runs=len(y),
        clusters=len(set(groups)),
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


def _fit(y: Array, exog: Array, groups: NDArray[np.generic], exog_re: Array):  # type: ignore[no-untyped-def]
    from statsmodels.regression.mixed_linear_model import MixedLM

    with warnings.catch_warnings():
        # Its boundary warning is an absolute bound on variances and fires on every set of accuracies.
        warnings.simplefilter("ignore")
        try:
            model = MixedLM(y, exog, groups=groups, exog_re=exog_re)
            fit = model.fit(reml=True, method="powell", xtol=1e-8, ftol=1e-12)
        except (np.linalg.LinAlgError, ValueError, ZeroDivisionError) as error:
            raise FitError(" ".join(str(error).split())) from error
    if not (np.isfinite(fit.llf) and np.all(np.isfinite(fit.cov_re)) and fit.scale > 0):
        raise FitError("the fit has no finite log-likelihood and variances")
    return fit


def _unit_covariance(exog: Array, exog_re: Array, groups: NDArray[np.generic], relative: Array) -> Array:
    """Covariance of the fixed effects for residual variance 1: (X' V^-1 X)^-1, V = I + Z relative Z'.

    The library's own comes from the joint Hessian and was up to 3 % off.
    """
    same = groups[:, None] == groups[None, :]
    v = np.eye(len(exog)) + same * (exog_re @ relative @ exog_re.T)
    return np.asarray(np.linalg.inv(exog.T @ np.linalg.solve(v, exog)), dtype=float)


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
