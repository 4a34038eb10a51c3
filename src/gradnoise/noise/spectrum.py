r"""Shape of the update noise: eigenvalues of P (C/B) P from Gram matrices, and directions that persist.

The nonzero eigenvalues of the sample covariance of P h_r are those of the R x R Gram matrix of P d_r, so no
D x D matrix and no random projection is needed.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from gradnoise.noise.estimate import UNKNOWN, Estimate


@dataclass(frozen=True)
class Spectrum:
    r"""Shape of S = P (C/B) P as R contributions show it.

    `effective_rank`: (tr S)^2 / tr S^2, the number of equal eigenvalues that would give both. `top`: shares
    of the largest sample eigenvalues, largest first; a sample of R has R - 1 of them, so even isotropic noise
    shows 1/(R - 1) each (`floor`).
    """

    effective_rank: Estimate
    top: tuple[float, ...]
    floor: float


def spectrum(grams: tuple[Tensor, ...], count: int = 3, shares: Tensor | None = None) -> Spectrum:
    r"""From the Gram matrices of P d_r, one for each process that saw its own contributions.

    tr S^2 and (tr S)^2 are estimated without bias, whatever the law of the contributions (`unbiased`).
    `count` shares of eigenvalues are kept. The error is the jackknife over contributions. Fewer than 4
    contributions in a process: unknown. `shares`: w_r of all processes' contributions, where not equal.
    """
    if shares is not None:
        parts = shares.view(len(grams), -1) if grams else shares
        grams = tuple(_whitened(gram, part[: len(gram)]) for gram, part in zip(grams, parts, strict=False))
    grams = tuple(gram.double().cpu() for gram in grams if len(gram) >= 4)
    if not grams:
        return Spectrum(UNKNOWN, (), math.nan)
    ranks = [_effective_rank(gram) for gram in grams]
    value = math.fsum(rank.value for rank in ranks) / len(ranks)
    stderr = math.sqrt(math.fsum(rank.stderr**2 for rank in ranks)) / len(ranks)
    floor = math.fsum(1 / (len(gram) - 1) for gram in grams) / len(grams)
    tops = [eigenvalues(_centred(gram))[:count] for gram in grams]
    width = min(len(top) for top in tops)
    top = tuple(math.fsum(t[n] for t in tops) / len(tops) for n in range(width))
    return Spectrum(Estimate(value, stderr), top, floor)


def _whitened(gram: Tensor, shares: Tensor) -> Tensor:
    r"""The Gram matrix as if of equal shares: d_r / sqrt(w_r), mirrored so that sqrt(w) becomes 1/sqrt(R).

    d_r = h_r - w_r g leaves out the direction sqrt(w) of the h_r / sqrt(w_r), which have one covariance; the
    mirror makes it the one that centring leaves out.
    """
    roots = shares.to(gram).sqrt()
    gram = gram / (roots[:, None] * roots)
    axis = roots / roots.norm() - 1 / math.sqrt(len(roots))
    if axis.norm() < 1e-9:
        return gram
    mirror = torch.eye(len(roots)).to(gram) - 2 * torch.outer(axis, axis) / axis.square().sum()
    mirrored: Tensor = mirror @ gram @ mirror
    return mirrored


def eigenvalues(gram: Tensor) -> list[float]:
    """Eigenvalues of a Gram or covariance matrix as shares of its trace, largest first; nan if it is."""
    if not gram.isfinite().all():
        return [math.nan] * len(gram)
    found = torch.linalg.eigvalsh(gram.double().cpu()).flip(0).clamp_min(0)
    total = found.sum().item()
    return [value / total if total > 0 else math.nan for value in found.tolist()]


def noise_reduced(shares: Sequence[float], contributions: int) -> list[float]:
    r"""Shares of the largest eigenvalues, less what a sample of R contributions makes of all the others.

    .. math:: \tilde s_j = s_j - \frac{1 - \sum_{i \le j} s_i}{R - 1 - j}, \quad j \le R - 2,

    0 at least, and for j > R - 2. With more dimensions than contributions each sample eigenvalue holds an
    equal part of what the directions not shown hold together.

    Source: Yata and Aoshima, J. Multivariate Analysis 105 (2012), 193-215.
    """
    found, rest = [], 1.0
    for j, share in enumerate(shares, start=1):
        rest -= share
        left = contributions - 1 - j
        found.append(max(0.0, share - rest / left) if left > 0 else 0.0)
    return found


def unbiased(gram: Tensor) -> tuple[Tensor, Tensor]:
    r"""Unbiased (tr S)^2 and tr S^2 from the Gram matrices (..., R, R) of R >= 4 draws with covariance S.

    With A the centred Gram matrix, a = tr A, b = |A|_F^2, q = sum A_rr^2 and n = R:

    .. math:: \widehat{\operatorname{tr} S^2} = \frac{n-1}{n(n-2)(n-3)}
              \Big[ \tfrac{n-2}{n-1} b + \tfrac{1}{(n-1)^2} a^2 - \tfrac{n}{n-1} q \Big], \quad
              \widehat{(\operatorname{tr} S)^2} = \frac{n-1}{n(n-2)(n-3)}
              \Big[ \tfrac{2}{(n-1)^2} b + \tfrac{n^2-3n+1}{(n-1)^2} a^2 - \tfrac{n}{n-1} q \Big].

    Source: Himeno and Yamada, J. Multivariate Analysis 130 (2014), 27-44.
    """
    centred, n = _centred(gram), gram.shape[-1]
    diagonal = centred.diagonal(dim1=-2, dim2=-1)
    a, b, q = diagonal.sum(-1), centred.square().sum((-2, -1)), diagonal.square().sum(-1)
    scale, rest = (n - 1) / (n * (n - 2) * (n - 3)), n / (n - 1) * q
    squared = scale * (2 * b / (n - 1) ** 2 + (n * n - 3 * n + 1) * a**2 / (n - 1) ** 2 - rest)
    of_square = scale * ((n - 2) * b / (n - 1) + a**2 / (n - 1) ** 2 - rest)
    return squared, of_square


def _centred(gram: Tensor) -> Tensor:
    rows = gram.mean(-1, keepdim=True)
    return gram - rows - rows.transpose(-2, -1) + rows.mean(-2, keepdim=True)


def _effective_rank(gram: Tensor) -> Estimate:
    squared, of_square = unbiased(gram)
    # A sample of few draws can show less than none of the second moment.
    value = (squared / of_square).item() if of_square > 0 else math.nan
    size = len(gram)
    if size < 5:
        return Estimate(value, math.nan)
    others = torch.arange(size).repeat(size, 1)[~torch.eye(size, dtype=torch.bool)].view(size, size - 1)
    squared, of_square = unbiased(gram[others[:, :, None], others[:, None, :]])
    left = torch.where(of_square > 0, squared / of_square, math.nan)
    return Estimate(value, ((size - 1) / size * (left - left.mean()).square().sum()).sqrt().item())


class Sketch:
    r"""Which directions of the noise persist across updates, in a random projection of fixed size.

    A vector x of D coordinates is sketched to `width` numbers s_k = sum over j = k mod width of e_j x_j, e_j
    = +-1 fixed by `seed`: E <s(x), s(y)> = <x, y>. The running covariance M of sketches (weight `1 - decay`
    on the newest event) keeps what recurs; `overlap` is the share of an event's power in the `directions`
    strongest ones of the events before it. For noise without memory it is about directions / width; 1 means
    the same subspace every time.
    """

    def __init__(self, width: int, directions: int = 4, decay: float = 0.9, seed: int = 0) -> None:
        self.width, self.directions, self.decay, self.seed = width, directions, decay, seed
        self.covariance = torch.zeros(width, width, dtype=torch.float64)

    def project(self, rows: Tensor, offset: int) -> Tensor:
        """(R, width) sketch of the coordinates `offset` and on of R vectors; sketches of pieces add up."""
        draw = torch.Generator().manual_seed(self.seed + offset)
        signs = torch.randint(0, 2, (rows.shape[1],), generator=draw, dtype=torch.int8).to(rows) * 2 - 1
        padded = torch.nn.functional.pad(rows * signs, (0, -rows.shape[1] % self.width))
        return padded.view(len(rows), -1, self.width).sum(1).double().cpu()

    def update(self, sketches: Tensor) -> tuple[float, list[float]]:
        """Take in one event; return its overlap with the past (nan at first) and the running top shares."""
        now = sketches.T @ sketches
        overlap = math.nan
        if self.covariance.any():
            basis = torch.linalg.eigh(self.covariance).eigenvectors[:, -self.directions :]
            overlap = ((basis.T @ now @ basis).trace() / now.trace()).item()
        # Every event counts the same, however large its noise.
        self.covariance = self.decay * self.covariance + (1 - self.decay) * now / now.trace()
        return overlap, eigenvalues(self.covariance)[: self.directions]
