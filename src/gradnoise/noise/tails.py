r"""Tail indices of gradient noise, with what a Gaussian gives under the same treatment.

"Heavy tails" over raw coordinates are mostly an artefact of mixing coordinates of different scale. So
coordinates are divided by their own standard deviation first, estimated from the other contributions, and the
index is shown beside that of Gaussian noise that went through the same steps with the same numbers: only the
difference counts.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from gradnoise.noise.estimate import UNKNOWN, Estimate

SAMPLE = 100_000
SHARE = 0.01


@dataclass(frozen=True)
class Tails:
    """Hill indices; smaller is heavier (Student's t with nu degrees of freedom: nu).

    `standardised`: over coordinates divided by their own scale; `gaussian`: what Gaussian noise gives under
    the same steps; `raw`: over coordinates as they are (the literature's number; misleading); `norm` and
    `norm_gaussian`: over squared distances of contributions, pooled over updates, and those of Gaussian noise
    of the same effective rank. `k` of `n` order statistics were used (and `norm_k` of `norm_n`).
    """

    standardised: Estimate
    gaussian: float
    raw: Estimate
    norm: Estimate
    norm_gaussian: float
    k: int
    n: int
    norm_k: int
    norm_n: int


def hill(values: Tensor, k: int) -> Estimate:
    r"""Hill's tail index from the k largest of |values|: 1 / mean(log x_(i) - log x_(k+1)).

    `values`: any shape; k < number of values. The error is index/sqrt(k). Source: Hill, Ann. Statist. 3
    (1975).
    """
    if not 0 < k < values.numel():
        return UNKNOWN
    top = values.abs().flatten().topk(k + 1).values.double()
    if not top[-1] > 0:
        return UNKNOWN
    spacing = (top[:-1] / top[-1]).log().mean().item()
    return Estimate(1 / spacing, 1 / spacing / math.sqrt(k)) if spacing > 0 else UNKNOWN


def standardise(rows: Tensor) -> Tensor:
    """(R, n) contributions, each coordinate less the mean of the others and over their standard deviation.

    Divided by a deviation that includes itself, no value of R could exceed (R - 1)/sqrt(R). Needs R >= 4;
    coordinates that do not vary are left out.
    """
    size = len(rows)
    rows = rows.double()
    rest = (rows.sum(0) - rows) / (size - 1)
    squares = (rows.square().sum(0) - rows.square()) / (size - 1)
    deviation = (squares - rest.square()).clamp_min(0) * ((size - 1) / (size - 2))
    kept = (deviation > 1e-12 * squares.amax(0).clamp_min(torch.finfo(torch.float64).tiny)).all(0)
    return ((rows - rest) / deviation.sqrt())[:, kept]


def gaussian_index(contributions: int, values: int, k: int) -> float:
    """`hill` of standardised Gaussian contributions with the same numbers, from a fixed seed."""
    draw = torch.Generator().manual_seed(contributions)
    rows = torch.randn(contributions, values // contributions, generator=draw, dtype=torch.float64)
    return hill(standardise(rows), k).value


def tails(rows: Tensor, pooled: Tensor, effective_rank: float) -> Tails:
    """Tail indices of (R, n) contributions d_r, and of the squared distances `pooled` over updates.

    `pooled`: any number of values |P d_r|^2, each relative to its update's mean. Gaussian noise of effective
    rank r has squared norms like chi^2_r / r. The largest 1 % of coordinates and 10 % of norms are used.
    """
    standard = standardise(rows) if len(rows) >= 4 else rows[:0]
    n = standard.numel()
    k = max(1, round(SHARE * n)) if n else 0
    norm_n = pooled.numel()
    norm_k = norm_n // 10
    reference = math.nan
    if norm_k and effective_rank > 0:
        draw = torch.Generator().manual_seed(norm_n)
        shape = torch.full((norm_n,), effective_rank / 2, dtype=torch.float64)
        reference = hill(torch._standard_gamma(shape, generator=draw).sqrt(), norm_k).value
    return Tails(
        standardised=hill(standard, k),
        gaussian=gaussian_index(len(rows), n, k) if n else math.nan,
        raw=hill(rows, max(1, round(SHARE * rows.numel()))),
        norm=hill(pooled.sqrt(), norm_k),
        norm_gaussian=reference,
        k=k,
        n=n,
        norm_k=norm_k,
        norm_n=norm_n,
    )
