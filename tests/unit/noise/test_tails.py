"""Hill's index on known tails, and that only the difference from Gaussian noise counts (noise.md 2.7)."""

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from gradnoise import exposure
from gradnoise.noise.tails import gaussian_index, hill, standardise, tails

SIZE = 1_000_000


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=generator(seed), dtype=torch.float64)


def chi(degrees: float, *shape: int, seed: int = 1) -> Tensor:
    """Square root of chi^2 / degrees."""
    half = torch.full(shape, degrees / 2, dtype=torch.float64)
    return (torch._standard_gamma(half, generator=generator(seed)) * 2 / degrees).sqrt()


def student(degrees: float, *shape: int) -> Tensor:
    return normal(*shape) / chi(degrees, *shape)


TABLE: dict[str, tuple[Callable[[], Tensor], tuple[float, float, float]]] = {
    "Gaussian": (lambda: normal(SIZE), (13.2, 9.0, 6.0)),
    "t3": (lambda: student(3, SIZE), (2.90, 2.85, 2.65)),
    "t2": (lambda: student(2, SIZE), (2.04, 1.99, 1.94)),
}


@pytest.mark.parametrize("kind", TABLE)
def test_hill_gives_the_specifications_table(kind: str) -> None:
    """noise.md 2.7 at k/n = 0.1, 1 and 5 %; within 4 standard errors of both figures and its rounding."""
    values = TABLE[kind][0]()
    for share, expected in zip((0.001, 0.01, 0.05), TABLE[kind][1], strict=True):
        found = hill(values, round(share * SIZE))
        assert found.value == pytest.approx(expected, abs=4 * math.sqrt(2) * found.stderr + 0.05)


def test_hill_is_exact_for_a_pareto_tail_and_its_error_is_right() -> None:
    """x = u^(-1/a): index a whatever k, spread a / sqrt(k) over 300 samples, whatever the scale."""
    u = torch.rand(300, 2000, generator=generator(2), dtype=torch.float64)
    samples = 7.0 * u.pow(-1 / 2.5)
    found = [hill(-row, 100) for row in samples]
    values = torch.tensor([f.value for f in found])
    assert values.mean().item() == pytest.approx(2.5, abs=4.5 * 0.25 / math.sqrt(300) + 0.025)
    assert values.std().item() == pytest.approx(0.25, rel=0.2)
    assert sum(f.stderr for f in found) / 300 == pytest.approx(0.25, rel=0.05)


def test_hill_is_unknown_where_there_is_no_tail() -> None:
    assert math.isnan(hill(torch.ones(10), 3).value)
    assert math.isnan(hill(torch.tensor([1.0, 2.0]), 2).value)
    assert math.isnan(hill(torch.tensor([1.0, 2.0]), 0).value)
    assert math.isnan(hill(torch.zeros(10), 3).value)


@pytest.mark.parametrize("contributions", [8, 32, 256])
def test_gaussian_noise_gives_the_reference_for_any_number_of_contributions(
    contributions: int,
) -> None:
    """Few contributions estimate a coordinate's deviation badly, which looks heavy: so does the reference."""
    values = 256_000
    found = hill(standardise(normal(contributions, values // contributions, seed=3)), values // 100)
    reference = gaussian_index(contributions, values, values // 100)
    # The tail of one coordinate is shared by its contributions: errors a little over index / sqrt(k).
    assert found.value == pytest.approx(reference, abs=6 * found.stderr)
    if contributions == 256:
        assert reference == pytest.approx(9.0, rel=0.05)
    if contributions == 8:
        assert reference < 6


def test_standardising_takes_scale_and_mean_of_every_coordinate_away() -> None:
    """Closed form: (x - mean of the others) / their standard deviation, by brute force."""
    rows = normal(6, 50, seed=4)
    scale = normal(50, seed=5).mul(3).exp()
    found = standardise(rows)
    torch.testing.assert_close(standardise(5 * scale + scale * rows), found, rtol=1e-6, atol=1e-6)
    for r in range(6):
        rest = torch.cat([rows[:r], rows[r + 1 :]])
        torch.testing.assert_close(found[r], (rows[r] - rest.mean(0)) / rest.std(0), rtol=1e-9, atol=1e-9)


def test_coordinates_that_do_not_vary_are_left_out() -> None:
    rows = normal(6, 5, seed=6)
    rows[:, 2] = 0.0
    rows[:, 3] = 0.0
    rows[1, 3] = 1.0  # one contribution alone: the others do not vary
    assert standardise(rows).shape == (6, 3)


def test_a_mixture_of_scales_is_heavy_raw_and_gaussian_standardised() -> None:
    """Log-normal scales of coordinates: raw 2.21, 1.82, 1.46 in the specification, as alpha-stable noise."""
    scale = normal(4000, seed=7).mul(1.5).exp()
    found = tails(scale * normal(64, 4000, seed=8), torch.ones(0), math.nan)
    assert found.raw.value < 2.5
    assert found.standardised.value == pytest.approx(found.gaussian, abs=6 * found.standardised.stderr)
    assert (found.n, found.k) == (256_000, 2560)
    mixture = normal(SIZE, seed=9) * normal(SIZE, seed=10).mul(1.5).exp()
    for share, expected in ((0.001, 2.21), (0.01, 1.82), (0.05, 1.46)):
        assert hill(mixture, round(share * SIZE)).value == pytest.approx(expected, rel=0.1)


def test_heavy_noise_differs_from_the_reference() -> None:
    """t3 in every coordinate: its own index standardised, far below the Gaussian one."""
    found = tails(student(3, 64, 4000), torch.ones(0), math.nan)
    assert found.standardised.value < 3.3
    assert found.gaussian > 7


def test_norms_tell_elliptical_noise_from_independent_coordinates() -> None:
    """Elliptical t3 has norms of index 3 (2.96); iid t3 looks light (6.0): both in 1000 coordinates.

    2000 examples, k/n = 5 %: the figures of the specification within 4 of their errors.
    """
    apart = student(3, 2000, 1000).norm(dim=1)
    together = (normal(2000, 1000, seed=11) / chi(3, 2000, 1, seed=12)).norm(dim=1)
    loose, tight = hill(apart, 100), hill(together, 100)
    assert tight.value == pytest.approx(2.96, abs=4 * tight.stderr)
    assert loose.value == pytest.approx(6.0, abs=4 * loose.stderr)
    assert loose.value > tight.value + 3 * loose.stderr


def test_the_norm_tail_has_its_own_reference() -> None:
    """Squared distances of Gaussian noise of effective rank 30, pooled over updates: like chi^2 of 30."""
    light = normal(1000, 30, seed=13).square().sum(1) / 30
    heavy = light / chi(3, 1000, seed=14).square()
    rows = normal(8, 500, seed=15)
    calm, loud = (tails(rows, pooled, 30.0) for pooled in (light, heavy))
    assert calm.norm.value == pytest.approx(calm.norm_gaussian, rel=0.35)
    assert loud.norm.value < 0.4 * loud.norm_gaussian
    assert (calm.norm_n, calm.norm_k) == (1000, 100)
    assert math.isnan(tails(rows, light, math.nan).norm_gaussian)


def test_too_few_contributions_have_no_standardised_tail() -> None:
    found = tails(normal(3, 500, seed=16), torch.ones(5), 10.0)
    assert math.isnan(found.standardised.value)
    assert math.isnan(found.gaussian)
    assert math.isnan(found.norm.value)
    assert found.raw.value > 0


def metered(tokens: Tensor, updates: int) -> object:
    """Micro-batches of one example with Gaussian gradients, |noise| as of so many tokens; SGD."""
    net = nn.Linear(1000, 1, bias=False).double()
    optimizer = torch.optim.SGD(net.parameters(), lr=1e-3)
    meter = exposure(net, optimizer, every=1, estimator="micro", tails=True)
    for n in range(updates):
        for count, x in zip(tokens, normal(len(tokens), 1, 1000, seed=n), strict=True):
            meter.count(count)
            (net(x / count.sqrt()).sum() * count / tokens.sum()).backward()
        optimizer.step()
        optimizer.zero_grad()
    return meter.last


def test_contributions_of_unequal_size_do_not_pass_for_heavy_tails() -> None:
    """|h_r - w_r g|^2 goes with w_r (1 - w_r): micro-batches of 1 to 400 tokens of Gaussian noise."""
    found = metered(torch.logspace(0, 2.6, 16).round().double(), updates=8)
    assert found.hill.value == pytest.approx(found.hill_gaussian, rel=0.25)  # type: ignore[attr-defined]
    assert found.norm_hill == pytest.approx(found.norm_hill_gaussian, rel=0.5)  # type: ignore[attr-defined]
