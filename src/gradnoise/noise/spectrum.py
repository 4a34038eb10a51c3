r"""Shape of the update noise: eigenvalues of P (C/B) P from Gram matrices, and directions that persist.

The nonzero eigenvalues of the sample covariance of P h_r are those of the R x R Gram matrix of P d_r, so no
D x D matrix and no random projection is needed.
"""

import math
from dataclasses import dataclass
from itertools import combinations

import torch
from torch import Tensor

from gradnoise.noise.estimate import UNKNOWN, Estimate

_SPLITS = 32


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


def spectrum(grams: tuple[Tensor, ...], count: int = 3) -> Spectrum:
    r"""From the Gram matrices of P d_r, one for each process that saw its own contributions.

    tr S^2 is estimated without bias as the mean over splits in halves A, B of tr(S_A S_B), and (tr S)^2 as
    that of tr S_A tr S_B (a split's two halves are independent). `count` shares of eigenvalues are kept. The
    error is the jackknife over contributions. Fewer than 4 contributions in a process: unknown.
    """
    grams = tuple(gram for gram in grams if len(gram) >= 4)
    if not grams:
        return Spectrum(UNKNOWN, (), math.nan)
    ranks = [_effective_rank(gram) for gram in grams]
    value = math.fsum(rank.value for rank in ranks) / len(ranks)
    stderr = math.sqrt(math.fsum(rank.stderr**2 for rank in ranks)) / len(ranks)
    floor = math.fsum(1 / (len(gram) - 1) for gram in grams) / len(grams)
    tops = [shares(_centred(gram))[:count] for gram in grams]
    width = min(len(top) for top in tops)
    top = tuple(math.fsum(t[n] for t in tops) / len(tops) for n in range(width))
    return Spectrum(Estimate(value, stderr), top, floor)


def shares(gram: Tensor) -> list[float]:
    """Eigenvalues of a Gram or covariance matrix as shares of its trace, largest first."""
    found = torch.linalg.eigvalsh(gram.double().cpu()).flip(0).clamp_min(0)
    total = found.sum().item()
    return [value / total if total > 0 else math.nan for value in found.tolist()]


def _centred(gram: Tensor) -> Tensor:
    return gram - gram.mean(0) - gram.mean(1, keepdim=True) + gram.mean()


def _effective_rank(gram: Tensor) -> Estimate:
    gram = gram.double().cpu()
    value = _rank_of(gram)
    size = len(gram)
    if size < 5:
        return Estimate(value, math.nan)
    keep = [[n for n in range(size) if n != r] for r in range(size)]
    left = torch.tensor([_rank_of(gram[rows][:, rows]) for rows in keep], dtype=torch.float64)
    variance = (size - 1) / size * (left - left.mean()).square().sum()
    return Estimate(value, variance.sqrt().item())


def _rank_of(gram: Tensor) -> float:
    first, second = _halves(len(gram))
    # H_A G H_B: inner products of the two halves' centred contributions, for all splits at once.
    inside = torch.stack([_block(gram, a, b) for a, b in zip(first, second, strict=True)])
    one = torch.stack([_block(gram, a, a).diagonal().sum() for a in first]) / (len(first[0]) - 1)
    two = torch.stack([_block(gram, b, b).diagonal().sum() for b in second]) / (len(second[0]) - 1)
    squares = inside.square().sum((1, 2)) / ((len(first[0]) - 1) * (len(second[0]) - 1))
    total = squares.mean().item()
    return (one * two).mean().item() / total if total > 0 else math.nan


def _block(gram: Tensor, rows: list[int], columns: list[int]) -> Tensor:
    block = gram[rows][:, columns]
    return block - block.mean(0) - block.mean(1, keepdim=True) + block.mean()


def _halves(size: int) -> tuple[list[list[int]], list[list[int]]]:
    """At most 32 splits of range(size) into halves, the same every time."""
    half = size // 2
    if math.comb(size, half) <= 2 * _SPLITS:
        first = [list(members) for members in combinations(range(size), half) if 0 in members or size % 2]
    else:
        draw = torch.Generator().manual_seed(size)
        first = [sorted(torch.randperm(size, generator=draw)[:half].tolist()) for _ in range(_SPLITS)]
    return first, [[n for n in range(size) if n not in set(members)] for members in first]


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
        return overlap, shares(self.covariance)[: self.directions]
