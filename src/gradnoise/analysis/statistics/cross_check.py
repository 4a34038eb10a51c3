"""The same mixed model by statsmodels: the second path that every reported fit is held against."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from gradnoise.analysis.statistics.model_matrix import RandomBlock

if TYPE_CHECKING:
    from statsmodels.regression.mixed_linear_model import MixedLM

Array = NDArray[np.float64]

# What statsmodels attains with Powell's method on every reference fit.
_LOGLIK, _BETA, _SE = 1e-5, 1e-5, 1e-2


@dataclass(frozen=True)
class CrossCheck:
    """What statsmodels' MixedLM (REML, Powell's method) finds beside `fit_mixed`, for standardised columns.

    `loglik` is its optimum minus ours; `beta` the largest difference of estimates, relative to the estimate
    or its standard error, whichever is larger; `se` that of unadjusted standard errors, relative; None where
    it gives no number. `agrees`: within 1e-5, 1e-5 and 1 %; False if it finds a higher likelihood, or other
    numbers at the same one; None, with the `reason`, where it cannot tell: it has no such model, it fails or
    gets only near, both at singular covariances, or it stops at a lower likelihood than ours.
    """

    agrees: bool | None
    loglik: float | None = None
    beta: float | None = None
    se: float | None = None
    reason: str = ""


@dataclass(frozen=True)
class Ours:
    """The fit to check, for the same columns: relative covariances of the blocks, and what they give."""

    loglik: float
    beta: Array
    se: Array
    covariances: Sequence[Array]
    singular: bool


def by_statsmodels(x: Array, blocks: Sequence[RandomBlock], y: Array, ours: Ours) -> CrossCheck:
    """Fit y = X b + sum Z u + e again and compare.

    Its standard errors are those at its own variances, (X' V^-1 X)^-1 with V written out: what it reports
    itself comes from another information matrix and is up to some per cent off.
    """
    if len(blocks) > 1 and any(len(block.names) > 1 for block in blocks):
        return CrossCheck(None, reason="statsmodels has no correlated effects for several cluster columns")
    # Before its warnings are switched off: its import switches them on.
    import statsmodels.regression.mixed_linear_model  # noqa: F401

    with warnings.catch_warnings(), np.errstate(all="ignore"):
        # Its boundary warning is an absolute bound on variances and fires on every set of accuracies.
        warnings.simplefilter("ignore")
        try:
            model = _model(x, blocks, y)
            # With its own tolerances Powell's method is right to 1e-3 of a standard error only.
            fit = model.fit(reml=True, method="powell", xtol=1e-9, ftol=1e-12, maxiter=500)
            loglik, beta = float(fit.llf), np.asarray(fit.fe_params, dtype=float)
            covariances = _covariances(fit, blocks)
            se = _standard_errors(x, blocks, covariances, float(fit.scale))
            at_ours = _loglik_at(model, ours, blocks)
        except (np.linalg.LinAlgError, ValueError, ZeroDivisionError) as error:
            return CrossCheck(None, reason=f"statsmodels fails: {str(error).splitlines()[0]}")
    if not (np.isfinite(loglik) and np.all(np.isfinite(se))):
        return CrossCheck(None, reason="statsmodels' likelihood is not finite")
    return _compare(ours, loglik, beta, se, at_ours)


def _compare(ours: Ours, loglik: float, beta: Array, se: Array, at_ours: float) -> CrossCheck:
    above = loglik - ours.loglik
    off_beta = float((np.abs(beta - ours.beta) / np.maximum(np.abs(ours.beta), ours.se)).max())
    off_se = float(np.abs(se / ours.se - 1).max())
    agrees: bool | None = above <= _LOGLIK and off_beta <= _BETA and off_se <= _SE
    reason = ""
    if np.isfinite(at_ours) and abs(at_ours - ours.loglik) > _LOGLIK:
        agrees, reason = False, "the likelihoods at one point differ"
    elif above < -_LOGLIK:
        agrees, reason = None, "statsmodels stops below our optimum"
    elif not agrees and above <= _LOGLIK and ours.singular:
        agrees, reason = None, "statsmodels can only come near a singular covariance"
    return CrossCheck(agrees, above, off_beta, off_se, reason)


def _model(x: Array, blocks: Sequence[RandomBlock], y: Array) -> MixedLM:
    from statsmodels.regression.mixed_linear_model import MixedLM, VCSpec

    if len(blocks) == 1:
        return MixedLM(y, x, groups=blocks[0].codes, exog_re=blocks[0].values)
    # Several cluster columns: one group of all rows, in which each block is a variance component.
    names = [f"{number:03d}" for number in range(len(blocks))]
    columns = [[str(code) for code in range(block.clusters)] for block in blocks]
    effects = VCSpec(names, [[part] for part in columns], [[block.effects[:, :, 0]] for block in blocks])
    return MixedLM(y, x, groups=np.zeros(len(y)), exog_vc=effects)


def _covariances(fit: Any, blocks: Sequence[RandomBlock]) -> list[Array]:
    """Relative covariances of the blocks, from its absolute ones."""
    if len(blocks) == 1:
        return [np.asarray(fit.cov_re, dtype=float) / fit.scale]
    return [np.array([[float(variance) / fit.scale]]) for variance in fit.vcomp]


def _standard_errors(
    x: Array, blocks: Sequence[RandomBlock], covariances: Sequence[Array], scale: float
) -> Array:
    total = np.eye(len(x))
    for block, covariance in zip(blocks, covariances, strict=True):
        same = block.codes[:, None] == block.codes
        total += same * (block.values @ covariance @ block.values.T)
    return np.asarray(np.sqrt(scale * np.diag(np.linalg.inv(x.T @ np.linalg.solve(total, x)))))


def _loglik_at(model: MixedLM, ours: Ours, blocks: Sequence[RandomBlock]) -> float:
    """Its likelihood at our covariances; not a number where they are singular, which it cannot express."""
    from statsmodels.regression.mixed_linear_model import MixedLMParams

    if ours.singular:
        return float("nan")
    if len(blocks) == 1:
        point = MixedLMParams.from_components(ours.beta, cov_re=ours.covariances[0])
    else:
        variances = np.array([covariance[0, 0] for covariance in ours.covariances])
        point = MixedLMParams.from_components(ours.beta, cov_re=np.zeros((0, 0)), vcomp=variances)
    return float(model.loglike(point))
