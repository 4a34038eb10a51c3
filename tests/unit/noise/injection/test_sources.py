"""Draws against the covariance that was asked for: at 200 000 draws relative Frobenius errors within 1 %.

For covariance S the sample covariance of n draws errs by sqrt((tr(S)^2/tr(S^2) + 1)/n), here 0.4 to 0.6 %
(draws are fixed, so nothing fails by chance). A wrong factor anywhere errs by 10 % or more.
"""

import math
from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from gradnoise import gaussian, inject, low_rank, student_t
from gradnoise.base.errors import InputError
from gradnoise.noise.injection.sources import Draws, Factors, Place, Source
from gradnoise.noise.members import layer_of
from gradnoise.noise.tails import hill

DRAWS = 200_000
STD = torch.tensor([0.5, 2.0, 1.0, 1.5])


def place(*shape: int, name: str = "0.weight") -> Place:
    return Place(name, nn.Parameter(torch.zeros(shape)), 0, layer_of(name))


def covariance(draws: Iterable[Tensor]) -> Tensor:
    """Second moments about 0 of rows (..., d)."""
    total: Any = 0
    count = 0
    for rows in draws:
        flat = rows.double().flatten(0, -2)
        total, count = total + flat.T @ flat, count + len(flat)
    assert count == DRAWS
    found: Tensor = total / count
    return found


def drawn(source: Source, at: Place, update: int = 1) -> Tensor:
    noise = source.draw(at, Draws(seed=3, update=update))
    assert noise is not None
    assert noise.shape == at.parameter.shape
    return noise


def close(found: Tensor, expected: Tensor) -> None:
    expected = expected.double()
    assert (found - expected).norm() <= 0.01 * expected.norm()


@pytest.mark.parametrize("make", [gaussian, lambda std: student_t(std, degrees=12)])
@pytest.mark.parametrize("std", [0.7, STD], ids=["isotropic", "diagonal"])
def test_coordinates_are_independent_with_the_variance_asked_for(
    make: Callable[[Any], Source], std: Tensor | float
) -> None:
    """Rows of one draw. t_12 has all moments that the error needs: its excess kurtosis is 3/4."""
    at = place(DRAWS, 4)
    expected = torch.as_tensor(std) ** 2 * torch.ones(4)
    source = make(std if isinstance(std, float) else {"0.weight": std.expand(DRAWS, 4)})
    noise = drawn(source, at)
    close(covariance([noise]), expected.diag())
    assert noise.mean(0).abs().max() < 5 * 2.0 / math.sqrt(DRAWS)
    told = source.variance(at)
    assert told is not None
    torch.testing.assert_close(torch.as_tensor(told) * torch.ones(DRAWS, 4), expected.expand(DRAWS, 4))


@pytest.mark.parametrize("kind", ["elliptical", "tensor"])
def test_a_stretch_of_the_whole_update_leaves_the_covariance(kind: Any) -> None:
    """20 000 updates of 10 rows: of one stretch an update, E s^4 - 1 = 2/(nu - 4) adds 0.22 % at nu = 20."""
    places = [place(10, 2, name=name) for name in ("0.weight", "1.weight")]
    std = {"0.weight": STD[:2].expand(10, 2), "1.weight": STD[2:].expand(10, 2)}
    source = student_t(std, degrees=20, kind=kind)
    draws = [torch.cat([drawn(source, at, t) for at in places], 1) for t in range(1, DRAWS // 10 + 1)]
    close(covariance(draws), STD.square().diag())
    # Whether a large update of one tensor is a large one of the other.
    sizes = torch.stack(draws).square().view(-1, 10, 2, 2).sum((1, 3))
    correlation = torch.corrcoef(sizes.T)[0, 1].item()
    assert (correlation > 0.3) if kind == "elliptical" else (abs(correlation) < 5 / math.sqrt(len(draws)))


def blocks(matrix: Tensor, count: int) -> Tensor:
    """Block diagonal: `count` independent draws at once."""
    return torch.kron(torch.eye(count), matrix)


@pytest.mark.parametrize("joint", [True, False])
@pytest.mark.parametrize("stretched", [False, True])
def test_a_low_rank_covariance_reaches_across_tensors_only_if_joint(joint: bool, stretched: bool) -> None:
    """U diag(S) U' + diag(lam) over two tensors of 3 and 2 coordinates, 50 copies a draw."""
    u = torch.tensor([[1.0, 0.5], [-2.0, 0.3], [0.4, 1.0], [1.0, -1.5], [0.2, 0.8]])
    s, lam, copies = torch.tensor([2.0, 0.5]), torch.tensor([0.3, 0.1, 0.5]), 50
    factors: dict[str, Factors] = {
        "0.weight": (blocks(u[:3], copies), s.repeat(copies), lam.repeat(copies)),
        "1.weight": (blocks(u[3:], copies), s.repeat(copies), 0.2),
    }
    source: Source = low_rank(factors, joint=joint)
    if stretched:
        # One stretch of 50 draws: 2/(nu - 4) over 4000 updates is 0.3 % at nu = 64.
        source = student_t(source, degrees=64, kind="elliptical")
    places = [place(copies, 3), place(copies * 2, name="1.weight")]
    updates = range(1, DRAWS // copies + 1)
    found = covariance(
        torch.cat([drawn(source, at, t).view(copies, -1) for at in places], 1) for t in updates
    )
    expected = u @ s.diag() @ u.T + torch.cat([lam, torch.tensor([0.2, 0.2])]).diag()
    if not joint:
        expected[:3, 3:] = expected[3:, :3] = 0
    close(found, expected)
    for n, (at, part) in enumerate(zip(places, (expected.diag()[:3], expected.diag()[3:]), strict=True)):
        told = source.variance(at)
        assert isinstance(told, Tensor), n
        torch.testing.assert_close(told.view(copies, -1), part.expand(copies, -1))


def test_only_an_elliptical_law_has_updates_of_heavy_tailed_size() -> None:
    """t_3: Hill's index over norms of 2000 coordinates is about 8 if they are independent, else about 3."""
    count = 2000
    at = place(count)
    iid = drawn(student_t(1.0, degrees=3), place(count, count))
    elliptical = student_t(1.0, degrees=3, kind="elliptical")
    stretched = torch.stack([drawn(elliptical, at, t).norm() for t in range(1, count + 1)])
    # From 5 % of the norms, which errs by 10 %; at 5 % a t_3 itself reads 2.65.
    assert hill(iid.norm(dim=1), count // 20).value > 6
    assert hill(stretched, count // 20).value == pytest.approx(2.65, rel=0.3)
    # Far out among 4 million coordinates, where uniform numbers need many digits.
    assert hill(iid, 100).value == pytest.approx(3, rel=0.3)


def test_draws_of_other_updates_tensors_and_seeds_share_nothing() -> None:
    """Correlations of a million numbers within 5 standard deviations of 0; the same key, the same bits."""
    size = 1_000_000
    source = gaussian(1.0)
    keys = [(0, 1, "a"), (0, 2, "a"), (0, 12, "a"), (1, 2, "a"), (0, 1, "b"), (0, 1, "a.b")]
    draws = [source.draw(place(size, name=name), Draws(seed, update)) for seed, update, name in keys]
    rows = torch.stack([noise for noise in draws if noise is not None])
    assert (torch.corrcoef(rows) - torch.eye(len(keys))).abs().max() < 5 / math.sqrt(size)
    again = source.draw(place(size, name="a"), Draws(0, 1))
    assert torch.equal(again, rows[0])  # type: ignore[arg-type]


def test_half_precision_parameters_get_noise_in_float32_and_others_in_their_own() -> None:
    for dtype, expected in ((torch.bfloat16, torch.float32), (torch.float64, torch.float64)):
        at = Place("w", nn.Parameter(torch.zeros(6, 2, dtype=dtype)), 0, "w")
        factors = {"w": (torch.ones(12, 1, dtype=torch.float64), torch.ones(1), torch.ones(12))}
        for source in (gaussian(1.0), student_t(1.0), low_rank(factors), student_t(1.0, kind="tensor")):
            assert drawn(source, at).dtype == expected


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: gaussian(-1.0), "std: -1.0: must be 0 or more"),
        (lambda: gaussian(math.nan), "std: nan"),
        (lambda: gaussian({"w": torch.tensor([1.0, -1.0])}), "std.w"),
        (lambda: gaussian({"w": math.inf}), "std.w: inf"),
        (lambda: student_t(1.0, degrees=2.0), "degrees: 2.0: must be above 2"),
        (lambda: student_t(1.0, degrees=math.inf), "degrees: inf"),
        (lambda: student_t(1.0, kind="cauchy"), "kind: cauchy: must be iid, elliptical or tensor"),  # type: ignore[arg-type]
        (lambda: student_t(gaussian(1.0)), "std: Gaussian: kind iid needs standard deviations"),
        (lambda: student_t(low_rank({}, joint=True), kind="tensor"), "kind: tensor: .* take elliptical"),
        (lambda: low_rank({"w": (torch.ones(4), torch.ones(1), 0.0)}), r"factors.w: U \(4,\)"),
        (lambda: low_rank({"w": (torch.ones(4, 2), torch.ones(3), 0.0)}), r"factors.w: .* S \(3,\)"),
        (lambda: low_rank({"w": (torch.ones(4, 2), torch.ones(2), torch.ones(2, 2))}), r"lam \(2, 2\)"),
        (lambda: low_rank({"w": (torch.ones(4, 1), -torch.ones(1), 0.0)}), "factors.w: .*0 or more"),
        (lambda: low_rank({"w": (torch.ones(4, 1), torch.ones(1), -0.1)}), "factors.w: -0.1"),
        (
            lambda: low_rank({"w": (torch.full((4, 1), math.nan), torch.ones(1), 0.1)}),
            "factors.w: U: must be finite",
        ),
    ],
)
def test_a_source_that_cannot_be_is_refused_at_once(make: Callable[[], Source], message: str) -> None:
    with pytest.raises(InputError, match=message):
        make()


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (gaussian({"0.weight": torch.ones(3)}), r"std.0.weight: of shape \(3,\): .*\(2, 3\)"),
        (
            low_rank({"0.weight": (torch.ones(5, 1), torch.ones(1), 0.0)}),
            "factors.0.weight: U of 5 rows: .* 6",
        ),
    ],
)
def test_numbers_that_do_not_fit_their_tensor_are_refused_at_the_step(source: Source, message: str) -> None:
    """A row would be broadcast over the matrix without a word."""
    net = nn.Sequential(nn.Linear(3, 2))
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    inject(optimizer, source, model=net)
    net(torch.ones(1, 3)).sum().backward()
    with pytest.raises(InputError, match=message):
        optimizer.step()
