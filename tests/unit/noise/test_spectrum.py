"""Spectra of known covariances, and what persists across updates."""

import math

import pytest
import torch
from torch import Tensor

from gradnoise.noise.spectrum import Sketch, eigenvalues, spectrum, unbiased


def normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def gram(contributions: int, scale: Tensor, seed: int, mean: float = 0.0) -> Tensor:
    rows = mean + scale * normal(contributions, len(scale), seed=seed)
    return rows @ rows.T


COVARIANCES = {
    "isotropic": torch.ones(50),
    "power law": torch.arange(1, 201).double().pow(-0.5),
    "one direction": torch.cat([torch.tensor([10.0]), 0.1 * torch.ones(99)]),
}


@pytest.mark.parametrize("kind", COVARIANCES)
@pytest.mark.parametrize("law", ["normal", "exponential"])
def test_both_squares_are_unbiased_whatever_the_law(kind: str, law: str) -> None:
    """(tr S)^2 and tr S^2 from 5 contributions with a mean: over 20 000 samples within 4.5 errors."""
    scale = COVARIANCES[kind].double()[:30]
    noise = normal(20_000, 5, len(scale), seed=8)
    if law == "exponential":
        noise = noise.exponential_(generator=torch.Generator().manual_seed(9)) - 1
    rows = 0.5 + scale * noise
    truths = scale.square().sum() ** 2, scale.pow(4).sum()
    for values, truth in zip(unbiased(rows @ rows.transpose(1, 2)), truths, strict=True):
        error = values.std().item() / math.sqrt(len(values))
        assert values.mean().item() == pytest.approx(truth.item(), abs=4.5 * error)


@pytest.mark.parametrize("kind", COVARIANCES)
@pytest.mark.parametrize("contributions", [8, 16])
def test_the_effective_rank_is_that_of_the_covariance(kind: str, contributions: int) -> None:
    """(tr S)^2 / tr S^2 over 30 samples: the median within a fifth (a third of 8 contributions).

    A plain Gram matrix of R contributions cannot show more than R - 1, here 7 or 15 of up to 50.
    """
    scale = COVARIANCES[kind].double()
    truth = (scale.square().sum() ** 2 / scale.pow(4).sum()).item()
    found = [spectrum((gram(contributions, scale, seed=n, mean=3.0),)) for n in range(30)]
    ranks = torch.tensor([f.effective_rank.value for f in found])
    assert ranks.median().item() == pytest.approx(truth, rel=0.2 if contributions > 8 else 0.34)
    errors = torch.tensor([f.effective_rank.stderr for f in found])
    # The reported error is of the size of what samples vary by.
    spread = ((ranks - ranks.median()).abs().median() * 1.4826).item()
    assert 0.4 * spread <= errors.median().item() <= 2.5 * spread + 0.05 * truth


def test_contributions_of_unequal_size_show_the_same_rank() -> None:
    """Shares over a factor of 30: d_r = h_r - w_r g, isotropic in 50 dimensions around a large mean.

    Centred as if equal, the common gradient in them would pass for a direction of the noise.
    """
    shares = torch.logspace(0, 1.5, 12).double()
    shares = shares / shares.sum()
    found, naive = [], []
    for n in range(40):
        h = 2.0 * shares[:, None] + shares.sqrt()[:, None] * normal(12, 50, seed=n)
        d = h - shares[:, None] * h.sum(0)
        found.append(spectrum((d @ d.T,), shares=shares).effective_rank.value)
        naive.append(spectrum((d @ d.T,)).effective_rank.value)
    assert torch.tensor(found).median().item() == pytest.approx(50, rel=0.2)
    assert torch.tensor(naive).median().item() < 40
    equal = torch.full((12,), 1 / 12, dtype=torch.float64)
    assert spectrum((d @ d.T,), shares=equal).top == pytest.approx(spectrum((d @ d.T,)).top, rel=1e-9)
    # Some of the contributions of a larger batch, and those of two processes.
    part = spectrum((d[:8] @ d[:8].T,), shares=shares)
    double = spectrum((d @ d.T,) * 2, shares=shares.repeat(2))
    assert part.effective_rank.value > 10
    assert double.effective_rank.value == pytest.approx(found[-1])


def test_the_mean_gradient_is_not_noise() -> None:
    """A common shift of all contributions changes nothing."""
    scale = COVARIANCES["power law"]
    plain, shifted = (spectrum((gram(12, scale, seed=0, mean=m),)) for m in (0.0, 100.0))
    assert shifted.effective_rank.value == pytest.approx(plain.effective_rank.value, rel=1e-6)
    assert shifted.top == pytest.approx(plain.top, rel=1e-6)


def test_isotropic_noise_shows_the_floor() -> None:
    """R contributions in very many dimensions are orthogonal: R - 1 equal eigenvalues."""
    found = spectrum((gram(16, torch.ones(20_000, dtype=torch.float64), seed=1),), count=3)
    assert found.floor == pytest.approx(1 / 15)
    assert found.top == pytest.approx((1 / 15,) * 3, rel=0.1)


def test_top_shares_are_eigenvalues_over_their_sum() -> None:
    """Against the sample covariance's own eigenvalues, D x D."""
    rows = normal(10, 6, seed=2) * torch.tensor([5.0, 2.0, 1.0, 1.0, 0.5, 0.1])
    expected = torch.linalg.eigvalsh(torch.cov(rows.T)).flip(0)
    found = spectrum((rows @ rows.T,), count=4)
    assert found.top == pytest.approx((expected / expected.sum())[:4].tolist(), rel=1e-9)
    assert math.isnan(eigenvalues(torch.zeros(3, 3))[0])  # no noise has no shape


def test_few_contributions_show_no_shape() -> None:
    """Fewer than 4: unknown; 4: a value without error; a process that saw too few is left out."""
    scale = torch.ones(30, dtype=torch.float64)
    none = spectrum((gram(3, scale, seed=3),))
    assert math.isnan(none.effective_rank.value)
    assert none.top == ()
    four = spectrum((gram(4, scale, seed=3),))
    assert four.effective_rank.value > 0
    assert math.isnan(four.effective_rank.stderr)
    eight = gram(8, scale, seed=4)
    assert spectrum((eight, gram(3, scale, seed=3))) == spectrum((eight,))


def test_several_processes_are_averaged() -> None:
    scale = torch.ones(30, dtype=torch.float64)
    grams = tuple(gram(8, scale, seed=n) for n in range(3))
    each = [spectrum((g,)).effective_rank for g in grams]
    found = spectrum(grams).effective_rank
    assert found.value == pytest.approx(sum(e.value for e in each) / 3)
    assert found.stderr == pytest.approx(math.sqrt(sum(e.stderr**2 for e in each)) / 3)


def test_sketches_keep_inner_products_on_average() -> None:
    """E <s(x), s(y)> = <x, y> over sign draws, also where x is sketched in pieces, which add up."""
    x, y = normal(2, 1000, seed=5)
    both = torch.stack([x, y])
    found = []
    for seed in range(400):
        sketch = Sketch(64, seed=10_000 * seed)
        pieces = [sketch.project(both[:, a:b], a) for a, b in ((0, 300), (300, 333), (333, 1000))]
        s = sum(pieces[1:], pieces[0])
        found.append(torch.stack([s[0] @ s[1], s[0] @ s[0]]))
    values = torch.stack(found)
    error = values.std(0) / 20
    assert ((values.mean(0) - torch.stack([x @ y, x @ x])).abs() < 4.5 * error).all()
    # One sketch errs by about |x||y| / sqrt(width).
    assert values[:, 0].std().item() == pytest.approx((x.norm() * y.norm()).item() / 8, rel=0.2)


def test_noise_without_memory_overlaps_by_directions_over_width() -> None:
    """Fresh isotropic noise each update: 4 / 64, its mean over 200 updates within 10 %."""
    sketch = Sketch(64, directions=4)
    found = [sketch.update(sketch.project(normal(8, 3000, seed=n), 0))[0] for n in range(200)]
    assert math.isnan(found[0])
    assert sum(found[1:]) / 199 == pytest.approx(4 / 64, rel=0.1)


def test_noise_in_a_fixed_subspace_overlaps_wholly_and_a_new_one_does_not() -> None:
    """Three directions among 4 kept: near 1, whatever the noise's size; then fresh ones: little."""
    basis, other = normal(2, 3, 3000, seed=6)
    sketch = Sketch(128, directions=4)
    overlaps = []
    for n in range(12):
        rows = 10.0 ** (n % 3) * normal(8, 3, seed=100 + n) @ basis
        overlap, top = sketch.update(sketch.project(rows, 0))
        overlaps.append(overlap)
    assert min(overlaps[1:]) > 0.999
    assert sum(top[:3]) == pytest.approx(1.0, abs=1e-6)
    assert sketch.update(sketch.project(normal(8, 3, seed=200) @ other, 0))[0] < 0.2


def test_the_past_is_forgotten_with_the_decay() -> None:
    old, new = normal(2, 1, 2000, seed=7)
    sketch = Sketch(64, directions=1, decay=0.5)
    overlaps = [sketch.update(sketch.project(rows, 0))[0] for rows in (old, old, old, new, new, new)]
    assert overlaps[2] > 0.99
    assert overlaps[3] < 0.2
    assert overlaps[5] > 0.9
