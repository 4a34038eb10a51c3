"""Estimators of the update's noise from the R contributions that made one gradient."""

import math

from torch import Tensor

from gradnoise.noise.estimate import Estimate


def trace(gram: Tensor) -> Estimate:
    r"""Tr(P C/B P) from the Gram matrix G of P h_r, where sum_r h_r is the batch gradient g.

    .. math:: \frac{R}{R-1} \Big[ \sum_r \|P h_r\|^2 - \|P g\|^2 / R \Big]
              = \frac{R}{R-1} \Big[ \operatorname{tr} G - 1^\top G 1 / R \Big]

    Unbiased for independent contributions of equal weight; batch size, micro-batch size and the convention
    of loss scaling cancel. The standard error is the delete-one jackknife, which needs R >= 3 (else nan).
    `gram`: (R, R), any float type, summed in float64. Derivation: docs/exposure.md.
    """
    gram = gram.double()
    size = len(gram)
    value = trace_value(gram)
    if size < 3:
        return Estimate(value, math.nan)
    # Leaving contribution j out: its row and column leave the Gram matrix. R - 1 contributions estimate the
    # variance of one, which is scaled back to a batch of R.
    traces = gram.trace() - gram.diagonal()
    sums = gram.sum() - 2 * gram.sum(1) + gram.diagonal()
    left_out = _scatter(traces, sums, size - 1) * size / (size - 1)
    variance = (size - 1) / size * (left_out - left_out.mean()).square().sum()
    return Estimate(value, variance.sqrt().item())


def trace_value(gram: Tensor) -> float:
    """`trace` without its standard error, for the many tensors of a model."""
    gram = gram.double()
    return _scatter(gram.trace(), gram.sum(), len(gram)).item()


def _scatter(trace_of_gram: Tensor, sum_of_gram: Tensor, size: int) -> Tensor:
    return size / (size - 1) * (trace_of_gram - sum_of_gram / size)


def gram(rows: Tensor) -> Tensor:
    """(R, R) inner products of the R rows, in float64."""
    rows = rows.double()
    return rows @ rows.T


def diagonal(rows: Tensor) -> Tensor:
    """Diagonal of C/B from the R >= 2 contributions (R, D): R/(R - 1) [ sum_r h_r^2 - g^2 / R ], unbiased."""
    size = len(rows)
    scatter = rows.square().sum(0) - rows.sum(0).square() / size
    # Rounding must not make a variance negative.
    return (scatter * (size / (size - 1))).clamp_min(0)
