"""Linear mixed models by restricted maximum likelihood (REML), with Kenward and Roger's inference."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from gradnoise.analysis.statistics.cross_check import CrossCheck, Ours, by_statsmodels
from gradnoise.analysis.statistics.fixed_effects import (
    Equivalence,
    Term,
    WaldTest,
    linear_combination,
    two_one_sided_tests,
    wald_test,
)
from gradnoise.analysis.statistics.kenward_roger import (
    KenwardRoger,
    coefficients,
    identifiable,
    kenward_roger,
)
from gradnoise.analysis.statistics.model_matrix import (
    INTERCEPT,
    RandomBlock,
    fixed_matrix,
    numeric,
    random_blocks,
)
from gradnoise.analysis.statistics.reml import FitError, Model, lower_triangle, rotate
from gradnoise.analysis.statistics.reml_search import maximise
from gradnoise.base.errors import InputError

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["CrossCheck", "Equivalence", "FitError", "MixedFit", "Term", "WaldTest", "fit_mixed"]

Array = NDArray[np.float64]

# lme4's isSingular uses the same bound on the same quantity, the diagonal of the relative Cholesky factor.
_SINGULAR = 1e-4
# What is left by rounding alone, relative to the outcome's spread.
_ROUNDING = 1e-10


@dataclass(frozen=True)
class MixedFit:
    """A fitted model, in the units of the data.

    `terms` has the fixed effects, the intercept as "1"; `members` says which of them each term of the model
    has. `loglik` is the restricted log-likelihood in lme4's convention and `sigma` the residual standard
    deviation s. `theta` holds for each block of random effects, in the order of `random`, the lower triangle
    by columns of the Cholesky factor L of their covariance divided by s^2: G = s^2 L L', diagonal of L >= 0;
    a block is a cluster column, or a term of it when the terms are not correlated. `theta_names` names its
    entries. The optimum can be certified from `theta` alone: the gradient M of -2 loglik in L L' has M L = 0
    and no negative eigenvalue.

    `singular`: the optimum lies on the edge of the covariances, which is common with few clusters and no
    reason to drop a term. `converged`: that certificate holds. `runs` counts rows, `clusters` those of the
    first cluster column. `cross_check` is None if it was switched off.
    """

    terms: Mapping[str, Term]
    members: Mapping[str, tuple[str, ...]]
    loglik: float
    theta: tuple[float, ...]
    theta_names: tuple[str, ...]
    sigma: float
    singular: bool
    converged: bool
    runs: int
    clusters: int
    level: float
    cross_check: CrossCheck | None
    errors: KenwardRoger = field(repr=False, compare=False)

    def contrast(self, weights: Mapping[str, float]) -> Term:
        """The sum of weight x coefficient, with its own Kenward-Roger df; `InputError` for unknown names."""
        return linear_combination(self._beta, self.errors, self._weights(weights), self.level)

    def wald(self, names: Sequence[str]) -> WaldTest:
        """F test that all named coefficients are 0; a term of the model stands for its coefficients.

        With sum coding this is the type III test of a term. Raises `InputError` for unknown or no names.
        """
        named = [name for given in names for name in self.members.get(given, (given,))]
        if not named or len(set(named)) < len(named):
            raise InputError("names", list(names), "name at least one coefficient, and each once")
        rows = np.array([self._weights({name: 1.0}) for name in named])
        return wald_test(self._beta, self.errors, rows, tuple(named))

    def equivalence(
        self, weights: Mapping[str, float], low: float, high: float, alpha: float = 0.05
    ) -> Equivalence:
        """Two one-sided tests of a contrast against margins in the outcome's units, by Kenward-Roger t.

        Raises `InputError` for unknown names, unless low < high, and for alpha outside (0, .5).
        """
        return two_one_sided_tests(self._beta, self.errors, self._weights(weights), low, high, alpha)

    @property
    def _beta(self) -> Array:
        return np.array([term.estimate for term in self.terms.values()])

    def _weights(self, weights: Mapping[str, float]) -> Array:
        for name in weights:
            if name not in self.terms:
                raise InputError("coefficient", name, f"must be one of {list(self.terms)}")
        vector = np.array([float(weights.get(name, 0.0)) for name in self.terms])
        if not np.all(np.isfinite(vector)) or not np.any(vector):
            raise InputError("weights", dict(weights), "give finite weights that are not all 0")
        return vector


def fit_mixed(
    frame: pd.DataFrame,
    outcome: str,
    fixed: Sequence[str],
    random: Mapping[str, Sequence[str]],
    *,
    correlated: bool = True,
    level: float = 0.95,
    cross_check: bool = True,
) -> MixedFit:
    """Fit y = X b + Z u + e by REML, with u ~ N(0, G) per cluster and e ~ N(0, sigma^2 I).

    `fixed` names columns and interactions ("total:phase") beside an intercept; columns that are not numeric
    get sum coding (see `model_matrix.fixed_matrix`). `random` gives each cluster column its terms, "1" for
    the intercept, otherwise columns: {"seed": ["1", "pne"]} is lme4's (1 + pne | seed), and several cluster
    columns are crossed or nested as their values say. G is unstructured for each cluster column;
    `correlated=False` keeps the terms of a cluster column independent (lme4's `||`). `level` is that of the
    intervals. `cross_check` fits once more with statsmodels, which takes far longer than the fit.

    Everything is standardised for the fit and put back: on the scale of accuracies optimisers stop early. A
    predictor is shifted only where that leaves the model as it is. Standard errors and df are those of
    `kenward_roger`, at a singular fit too: there they still follow the clusters.

    Raises `InputError` for unknown columns, missing or infinite values, fewer than 2 clusters, too few
    rows, or a level outside (0, 1), and `FitError` when a column does not vary, fixed terms are not
    independent, or the rows cannot tell the variances from one another or leave no residual.
    Sources: Bates et al., JSS 2015 (profiled criterion); Kenward and Roger, Biometrics 1997.
    """
    if not 0 < level < 1:
        raise InputError("level", level, "must lie between 0 and 1")
    y, x, blocks = (
        numeric(frame, outcome),
        fixed_matrix(frame, fixed),
        random_blocks(frame, random, correlated=correlated),
    )
    _check_size(len(y), len(x.names), blocks)
    mean, spread = _location(outcome, y)
    standard_y = (y - mean) / spread
    standard_x, to_fixed = _standardised(x.names, x.values)
    if np.linalg.matrix_rank(standard_x, rtol=1e-8) < len(x.names):
        raise FitError(f"the fixed terms {list(fixed)} are not independent of one another")
    scaled = [_standardised(block.names, block.values) for block in blocks]
    standard = [replace(block, values=values) for block, (values, _) in zip(blocks, scaled, strict=True)]
    model = rotate(standard_x, [block.effects for block in standard], standard_y)
    _check_variances(model, random)
    best = maximise(model)
    beta = coefficients(model, best.factors)
    errors = kenward_roger(model, best.factors, best.scale)
    singular = min(float(np.diag(lower_triangle(factor)).min()) for factor in best.factors) < _SINGULAR
    checked = None
    if cross_check:
        se = np.sqrt(np.diag(errors.covariance))
        ours = Ours(best.loglik, beta, se, [factor @ factor.T for factor in best.factors], singular)
        checked = by_statsmodels(standard_x, standard, standard_y, ours)
    estimates = spread * to_fixed @ beta
    estimates[0] += mean
    errors = errors.in_units(spread * to_fixed)
    factors = [lower_triangle(back @ factor) for (_, back), factor in zip(scaled, best.factors, strict=True)]
    # |X' V^-1 X| and |V| change with the units: this is the log-likelihood of the data as given.
    loglik = best.loglik - model.spare * np.log(spread) + np.log(np.diag(to_fixed)).sum()
    return MixedFit(
        terms={
            name: linear_combination(estimates, errors, weights, level)
            for name, weights in zip(x.names, np.eye(len(x.names)), strict=True)
        },
        members=x.members,
        loglik=float(loglik),
        theta=tuple(float(factor[i, j]) for factor in factors for i, j in _by_columns(len(factor))),
        theta_names=tuple(
            _entry_name(block, i, j) for block in blocks for i, j in _by_columns(len(block.names))
        ),
        sigma=float(spread * np.sqrt(best.scale)),
        singular=singular,
        converged=best.converged,
        runs=len(y),
        clusters=blocks[0].clusters,
        level=level,
        cross_check=checked,
        errors=errors,
    )


def _check_size(rows: int, coefficients: int, blocks: Sequence[RandomBlock]) -> None:
    if rows <= coefficients:
        raise InputError("rows", rows, f"give more than the {coefficients} coefficients")
    for block in blocks:
        effects = block.clusters * len(block.names)
        if rows <= effects:
            raise InputError(
                f"random: {block.cluster}", list(block.names), f"{effects} effects need more than {rows} rows"
            )


def _check_variances(model: Model, random: Mapping[str, Sequence[str]]) -> None:
    if not identifiable(model):
        described = {cluster: list(terms) for cluster, terms in random.items()}
        raise FitError(f"these rows cannot tell the variances of {described} and the residual apart")
    columns = np.column_stack([model.x, *(block.reshape(len(model.y), -1) for block in model.z)])
    left = model.y - columns @ np.linalg.lstsq(columns, model.y, rcond=_ROUNDING)[0]
    if model.rest + float(left @ left) < _ROUNDING**2 * len(model.y):
        raise FitError("the model leaves no residual")


def _location(name: str, values: Array) -> tuple[float, float]:
    mean, spread = float(values.mean()), float(values.std())
    if spread <= 1e-12 * float(np.abs(values).max()):
        raise FitError(f"{name} does not vary")
    return mean, spread


def _standardised(names: Sequence[str], values: Array) -> tuple[Array, Array]:
    """Columns scaled, and shifted where there is an intercept to take it; and the way back.

    The way back is the matrix from coefficients of the new columns to coefficients of the given ones.
    """
    standard, back = np.array(values, dtype=float), np.eye(len(names))
    for k, name in enumerate(names):
        if name == INTERCEPT:
            continue
        mean, spread = _location(name, values[:, k])
        if INTERCEPT in names:
            back[list(names).index(INTERCEPT), k] = -mean / spread
            standard[:, k] -= mean
        back[k, k] = 1 / spread
        standard[:, k] /= spread
    return standard, back


def _by_columns(size: int) -> list[tuple[int, int]]:
    return [(i, j) for j in range(size) for i in range(j, size)]


def _entry_name(block: RandomBlock, i: int, j: int) -> str:
    names = block.names
    return f"{block.cluster}: {names[i]}" if i == j else f"{block.cluster}: {names[i]}, {names[j]}"
