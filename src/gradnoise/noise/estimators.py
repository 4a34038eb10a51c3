r"""From the contributions to one gradient to the noise of the update.

A gradient g = sum_r h_r is made from independent contributions h_r (micro-batches, examples, workers), each
with a share w_r of the batch, sum w_r = 1 (equal: 1/R; by tokens where the loss is a mean over tokens). With
d_r = h_r - w_r g,

.. math:: E \|P d_r\|^2 = w_r (1 - w_r) \, \operatorname{Tr}(P (C/B) P),

so each x_r = |P d_r|^2 / (w_r (1 - w_r)) estimates the trace without bias, and so does their mean weighted by
w_r (1 - w_r). For equal shares that is R/(R-1) [ sum |P h_r|^2 - |P g|^2 / R ]. Batch size, micro-batch size
and the convention of loss scaling cancel; only scalars need to cross a network. If only some of the
contributions were looked at, the same mean over those is still unbiased, because g is the whole batch's.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from gradnoise.noise.estimate import Estimate


@dataclass
class Statistics:
    """Sufficient statistics of one measured update: n tensors, R contributions; float64, on the CPU.

    `shares` (R,) w_r; `pcp` and `c` (n, R) squared norms of P d_r and of d_r; `signal_pcp` and `signal_c`
    (n,) squared norms of P g and g; `inner_pcp` and `inner_c` (R,) <P d_r, P g> and <d_r, g> over all
    tensors; `grams`: a matrix of <P d_r, P d_s> for each process that took part; `trace_p` (n,) sum of P;
    `few`: which contributions the inner products and the Gram matrix are of (None: all);
    `ratio` (n,) effective over nominal learning rate (`preconditioners`); `factor` scales every variance
    (without replacement: 1 - B/N); `probe_variance`: what random probes or sampled coordinates add to the
    variance of Tr(P C/B P) and of Tr(C/B); `sample` (R, m): some coordinates of d_r; `sketch` (R, width): of
    P d_r.
    """

    shares: Tensor
    pcp: Tensor
    c: Tensor
    signal_pcp: Tensor
    signal_c: Tensor
    inner_pcp: Tensor
    inner_c: Tensor
    grams: tuple[Tensor, ...]
    trace_p: Tensor
    ratio: Tensor
    factor: float = 1.0
    probe_variance: tuple[float, float] = (0.0, 0.0)
    sample: Tensor | None = None
    sketch: Tensor | None = None
    few: Tensor | None = None

    @classmethod
    def blank(cls, shares: Tensor, tensors: int) -> "Statistics":
        """Nothing known but the shares."""
        unknown = torch.full((tensors,), math.nan, dtype=torch.float64)
        wide, inner = unknown[:, None].expand(tensors, len(shares)), torch.full_like(shares, math.nan)
        ones = torch.ones_like(unknown)
        return cls(shares, wide, wide, unknown, unknown, inner, inner, (), unknown, ones)

    @property
    def contributions(self) -> int:
        return len(self.shares)

    def traces(self, members: Tensor) -> tuple[Tensor, Tensor]:
        """Tr(P C/B P) of parts of the model and errors, (k,); `members` (k, n): 1 where a tensor belongs."""
        return self._means(members.double() @ self.pcp)

    def traces_c(self, members: Tensor) -> tuple[Tensor, Tensor]:
        """Tr(C/B) alike."""
        return self._means(members.double() @ self.c)

    def trace(self) -> Estimate:
        """Tr(P C/B P) of the whole model."""
        return self._total(self.pcp, self.probe_variance[0])

    def trace_c(self) -> Estimate:
        """Tr(C/B) of the whole model."""
        return self._total(self.c, self.probe_variance[1])

    def _means(self, distances: Tensor) -> tuple[Tensor, Tensor]:
        values, errors = means(distances, self.shares)
        return self.factor * values, self.factor * errors

    def _total(self, distances: Tensor, extra: float) -> Estimate:
        values, errors = self._means(distances.sum(0))
        return Estimate(values.item(), math.sqrt(errors.item() ** 2 + extra))

    def signal(self) -> tuple[Estimate, float]:
        """Unbiased squared norm of the mean preconditioned gradient, and its covariance with `trace`."""
        return self._signal(self.pcp, self.inner_pcp, self.signal_pcp)

    def signal_plain(self) -> tuple[Estimate, float]:
        """The same of the plain gradient, with `trace_c`."""
        return self._signal(self.c, self.inner_c, self.signal_c)

    def _signal(self, distances: Tensor, inner: Tensor, norms: Tensor) -> tuple[Estimate, float]:
        r"""|g|^2 - Tr(C/B); errors by leaving contributions out: g_(-r) = g - d_r / (1 - w_r)."""
        square = norms.sum().item()
        value = square - self._total(distances, 0.0).value
        if self.contributions < 3:
            return Estimate(value, math.nan), math.nan
        few = torch.arange(self.contributions) if self.few is None else self.few
        shares, lengths = self.shares[few], distances.sum(0)
        left = square - 2 * inner / (1 - shares) + lengths[few] / (1 - shares) ** 2
        # All `size` contributions make |g|^2, `count` of them the trace, and of `few` both are known.
        size, count = 1 / self.shares.mean().item(), self.contributions
        traces = self.factor * _left_out(lengths, self.shares)
        left, traces = left - left.mean(), traces - traces.mean()
        of_norm = (size - 1) / len(few) * left.square().sum().item()
        of_trace = (count - 1) / count * traces.square().sum().item()
        of_both = (count - 1) / len(few) * (left * traces[few]).sum().item()
        larger = size / (size - 1)  # the noise of a batch without one of them
        variance = of_norm + larger**2 * of_trace - 2 * larger * of_both
        # nan must stay nan.
        return Estimate(value, math.sqrt(0.0 if variance < 0 else variance)), of_both - larger * of_trace


def means(distances: Tensor, shares: Tensor) -> tuple[Tensor, Tensor]:
    r"""Weighted means of x_r = distances_r / (w_r (1 - w_r)) over the last dimension, with standard errors.

    The delete-one jackknife, which for equal shares is closed: (R-1)/(R-2) times the standard error of the
    mean of the x_r. It needs R >= 3 (else nan). `distances` (..., R), `shares` (R,), float64.
    """
    weights = shares * (1 - shares)
    values = distances.sum(-1) / weights.sum()
    count, size = len(shares), 1 / shares.mean()  # contributions looked at, and all there were
    if count < 3:
        return values, torch.full_like(values, math.nan)
    squares = (weights / weights.sum() * (distances / weights - values[..., None])).square().sum(-1)
    return values, (size - 1) / (size - 2) * (squares * (count / (count - 1))).sqrt()


def _left_out(distances: Tensor, shares: Tensor) -> Tensor:
    """The trace of the whole batch as estimated without contribution r, for each r, to first order in w_r."""
    weights = shares * (1 - shares)
    value, size, count = distances.sum() / weights.sum(), 1 / shares.mean(), len(shares)
    return value + (size - 1) / (size - 2) * (value - distances / weights) / (count - 1)


def effective_projected(statistics: Statistics, clip: float) -> float:
    r"""Trace through the Jacobian of clipping by norm, s (I - u u'), u = g/|g|: mode "project".

    .. math:: s^2 [ \operatorname{Tr} PCP - 2 u' P^2 C u + (u'Cu)(u'P^2u) ]

    C/B enters by its sample over contributions. A diagnostic only: u is itself estimated from the batch.
    """
    if clip == 1.0:
        return statistics.trace().value
    norm = statistics.signal_c.sum()
    shares = statistics.shares if statistics.few is None else statistics.shares[statistics.few]
    scale = statistics.factor / (shares * (1 - shares)).sum()
    cross = scale * (statistics.inner_pcp * statistics.inner_c).sum() / norm
    along = scale * statistics.inner_c.square().sum() / norm
    inside = statistics.signal_pcp.sum() / norm
    return clip**2 * (statistics.trace().value - 2 * cross + along * inside).item()


def effective_clipped_each(statistics: Statistics, threshold: float) -> float:
    r"""Trace of contributions clipped one by one, as in P-NE draft 2's pseudocode: mode "clip_each".

    Micro-batch gradients are longer than the batch's, so each is clipped harder than the run clipped: this
    reads several times too low (docs/exposure.md). Equal shares.
    """
    shares, size = statistics.shares, len(statistics.shares)
    inner = statistics.inner_pcp
    # From distances d_r = h_r - w_r g back to h_r: the Gram matrix of P h_r and the norms of the means R h_r.
    gram = statistics.grams[0] + shares[:, None] * inner + inner[:, None] * shares
    gram = gram + shares[:, None] * shares * statistics.signal_pcp.sum()
    squares = statistics.c.sum(0) + 2 * shares * statistics.inner_c + shares**2 * statistics.signal_c.sum()
    factors = (threshold / (size * squares.clamp_min(0).sqrt() + 1e-6)).clamp(max=1.0)
    clipped = factors[:, None] * gram * factors
    return (size / (size - 1) * (clipped.trace() - clipped.sum() / size)).item()
