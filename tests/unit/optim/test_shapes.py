"""The covariance of what aligned noise really adds to weights, against covariances made from the data."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from gradnoise import align_noise
from gradnoise.noise.injection.sources import Draws, Place
from gradnoise.noise.preconditioners import read
from gradnoise.optim.nap import Alignment
from gradnoise.optim.shapes import Shaped

RATE, TEMPERATURE, TASKS = 0.1, 0.3, 5
# Updates that see the same data over and over, after which a sketch of full rank is their covariance.
LEARNING = 200

DRAW = torch.Generator().manual_seed(1)
INPUTS = torch.randn(40, 3, generator=DRAW, dtype=torch.float64) * torch.tensor([2.0, 1.0, 0.5]) + 0.5
# Gradients of tasks: of layer a (2, 3) and of layer b (3, 2), which have to do with one another.
SHARED = torch.randn(TASKS, 6, generator=DRAW, dtype=torch.float64)
OWN = torch.randn(2, TASKS, 6, generator=DRAW, dtype=torch.float64)
GRADIENTS = [(SHARED + 0.3 * OWN[n]).view(TASKS, *shape) for n, shape in enumerate(((2, 3), (3, 2)))]
# Known directions, neither orthogonal nor of length 1.
DIRECTIONS = torch.randn(12, 2, generator=DRAW, dtype=torch.float64)
SIZES, REST = torch.tensor([3.0, 0.5], dtype=torch.float64), 0.2

Mix = Callable[[Tensor], Tensor]

pytestmark = pytest.mark.filterwarnings("ignore:target tasks")


class Two(nn.Module):
    """Weights a (2, 3) and b (3, 2)."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b = (nn.Linear(n, m, bias=False, dtype=torch.float64) for n, m in ((3, 2), (2, 3)))

    def forward(self, x: Tensor) -> Tensor:
        moved: Tensor = self.b(torch.tanh(self.a(x)))
        return moved


def normalised(covariance: Tensor) -> Tensor:
    return covariance * len(covariance) / covariance.trace()


def moment(rows: Tensor) -> Tensor:
    return normalised(rows.T @ rows)


def hidden() -> Tensor:
    return torch.tanh(Two().a(INPUTS)).detach()


def between(side: str, *layers: int) -> Tensor:
    """Covariance between tasks, of a side of one layer or of all coordinates of several."""
    off = [GRADIENTS[n] - GRADIENTS[n].mean(0) for n in layers]
    if side == "whole":
        return moment(torch.cat([part.flatten(1) for part in off], 1))
    return moment(off[0].mT.flatten(0, 1) if side == "left" else off[0].flatten(0, 1))


def known(first: int, last: int) -> Tensor:
    """U diag(S) U' + lam I."""
    directions = DIRECTIONS[first:last]
    return normalised((directions * SIZES) @ directions.T + REST * torch.eye(len(directions)).double())


def given(first: int, last: int) -> tuple[Tensor, Tensor, float]:
    return DIRECTIONS[first:last], SIZES, REST


def on_input(m: Mix, a: Tensor, b: Tensor) -> Tensor:
    return torch.block_diag(torch.kron(torch.eye(2), m(a)), torch.kron(torch.eye(3), m(b)))


def on_output(m: Mix, a: Tensor, b: Tensor) -> Tensor:
    return torch.block_diag(torch.kron(m(a), torch.eye(3)), torch.kron(m(b), torch.eye(2)))


def both_sides(m: Mix, layer: int) -> Tensor:
    return torch.kron(m(between("left", layer)), m(between("right", layer)))


# Options, and the covariance of all weights' noise, rows first; `m` mixes one with the identity.
CASES: dict[str, tuple[dict[str, Any], Callable[[Mix], Tensor]]] = {
    "features": ({"target": "features"}, lambda m: on_input(m, moment(INPUTS), moment(hidden()))),
    "tasks": ({"target": "tasks"}, lambda m: torch.block_diag(both_sides(m, 0), both_sides(m, 1))),
    "vec": (
        {"target": "tasks", "structure": "vec"},
        lambda m: torch.block_diag(m(between("whole", 0)), m(between("whole", 1))),
    ),
    "joint": ({"target": "tasks", "structure": "joint"}, lambda m: m(between("whole", 0, 1))),
    "by pattern": (
        {"target": "tasks", "structure": {"b": "vec", "*": "kronecker"}},
        lambda m: torch.block_diag(both_sides(m, 0), m(between("whole", 1))),
    ),
    "own, in": (
        {"target": lambda name, _: given(0, 3) if name == "a" else given(0, 2)},
        lambda m: on_input(m, known(0, 3), known(0, 2)),
    ),
    "own, out": (
        {"target": lambda name, _: {"out": given(0, 2) if name == "a" else given(0, 3)}},
        lambda m: on_output(m, known(0, 2), known(0, 3)),
    ),
    "own, both": (
        {"target": lambda *_: {"in": given(0, 3), "out": given(3, 5)}, "layers": "a"},
        lambda m: torch.kron(m(known(3, 5)), m(known(0, 3))),
    ),
    "own, whole": (
        {"target": lambda *_: {"whole": given(0, 6)}, "layers": "a", "structure": "vec"},
        lambda m: m(known(0, 6)),
    ),
    "own, joint": (
        {"target": lambda name, _: given(0, 6) if name == "a" else given(6, 12), "structure": "joint"},
        lambda m: m(known(0, 12)),
    ),
}

OPTIMIZERS: dict[str, Callable[[list[Tensor]], torch.optim.Optimizer]] = {
    "sgd": lambda parameters: torch.optim.SGD(parameters, lr=RATE),
    "adamw": lambda parameters: torch.optim.AdamW(parameters, lr=RATE),
}


def backward(net: Two, target: Any) -> None:
    """Gradients that do not depend on the weights."""
    if target == "tasks":
        for a, b in zip(*GRADIENTS, strict=True):
            ((net.a.weight * a).sum() + (net.b.weight * b).sum()).backward()
        return
    net(INPUTS)
    for weight, gradients in zip(net.parameters(), GRADIENTS, strict=True):
        weight.grad = gradients[0].clone()


def draws_of_units(noise: Alignment, learning: int) -> Callable[[Draws, Place], Tensor]:
    """Instead of standard normal numbers the unit vectors, one an update: what is added is then a root."""
    sizes = [place.parameter.numel() for place in noise.places]
    first = {place.name: sum(sizes[:n]) for n, place in enumerate(noise.places)}

    def normal(draws: Draws, place: Place) -> Tensor:
        flat = torch.zeros(place.parameter.numel(), dtype=torch.float64)
        at = draws.update - 1 - learning - first[place.name]
        flat[at : at + 1] = 1 if at >= 0 else 0
        return flat.view_as(place.parameter)

    return normal


def realised(
    patch: pytest.MonkeyPatch, options: dict[str, Any], optimizer: str = "sgd"
) -> tuple[Tensor, Tensor]:
    """Covariance of what noise adds to the weights, without P and temperature, and its diagonal as claimed.

    The same gradients go to an optimizer without noise: the weights differ by noise alone. Each update starts
    from the first weights.
    """
    net = Two()
    moving = OPTIMIZERS[optimizer](list(net.parameters()))
    learning = 1 if callable(options["target"]) else LEARNING
    options = {"rank": 12, "half_life": 5.0, "sketch_every": 1, "mode": "absolute", "limit": 1e9} | options
    noise = align_noise(moving, net, temperature=lambda t: TEMPERATURE * (t > learning), **options)
    patch.setattr(Draws, "normal", draws_of_units(noise, learning))
    start = {name: p.detach().clone() for name, p in net.named_parameters()}
    copies = {name: p.detach().clone().requires_grad_() for name, p in net.named_parameters()}
    still = OPTIMIZERS[optimizer](list(copies.values()))
    root = []
    for _ in range(learning + sum(place.parameter.numel() for place in noise.places)):
        backward(net, options["target"])
        for name, p in net.named_parameters():
            copies[name].grad = p.grad
        moving.step()
        still.step()
        added = {
            name: (p - copies[name]) / read(still, copies[name])().view_as(p)
            for name, p in net.named_parameters()
        }
        root.append(torch.cat([added[place.name].detach().flatten() for place in noise.places]))
        for name, p in net.named_parameters():
            p.data.copy_(start[name])
            copies[name].data.copy_(start[name])
        moving.zero_grad()
    found = torch.stack(root[learning:]) / math.sqrt(2 * RATE * TEMPERATURE)
    claimed = torch.cat([noise.variance(place).flatten() for place in noise.places])
    return found.T @ found, claimed * RATE / (2 * TEMPERATURE)


def error(found: Tensor, expected: Tensor) -> float:
    """Relative, in the Frobenius norm."""
    return ((found - expected).norm() / expected.norm()).item()


@pytest.mark.parametrize("alignment", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("name", CASES)
def test_weights_get_the_covariance_of_the_target(
    name: str, alignment: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Within .2 % (the sketch still learns a little); of equal power, and with the diagonal it claims."""
    options, expected = CASES[name]
    found, claimed = realised(monkeypatch, options | {"alignment": alignment})
    target = expected(lambda full: alignment * full + (1 - alignment) * torch.eye(len(full)).double())
    assert error(found, target) <= 2e-3
    torch.testing.assert_close(claimed, found.diagonal(), rtol=1e-3, atol=1e-3)
    assert found.trace().item() == pytest.approx(len(found), rel=1e-5)


@pytest.mark.parametrize("name", ["own, both", "own, joint"])
def test_a_preconditioner_comes_after_the_shape(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """AdamW: what is added is P n, P that of the step, so P divided out leaves the target."""
    options, expected = CASES[name]
    found, claimed = realised(monkeypatch, options, "adamw")
    assert error(found, expected(lambda full: full)) <= 1e-3
    torch.testing.assert_close(claimed, found.diagonal(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["own, in", "own, both", "own, whole", "own, joint"])
def test_controls_have_the_same_power_and_another_shape(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Reversed: variances proportional to 1/variance. Random: the same variances along other directions."""
    options, expected = CASES[name]
    target = expected(lambda full: full)
    backwards, _ = realised(monkeypatch, options | {"spectrum": "reversed"})
    inverse = expected(lambda full: normalised(torch.linalg.inv(full).contiguous()))
    assert error(backwards, inverse) <= 1e-3
    other, claimed = realised(monkeypatch, options | {"spectrum": "random"})
    values, expected_values = torch.linalg.eigvalsh(other), torch.linalg.eigvalsh(target)
    torch.testing.assert_close(values, expected_values, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(claimed, other.diagonal(), rtol=1e-5, atol=1e-5)
    assert error(other, target) > 0.1


def aligned(options: dict[str, Any]) -> Alignment:
    net = Two()
    optimizer = torch.optim.SGD(net.parameters(), lr=RATE)
    return align_noise(optimizer, net, rank=12, temperature=TEMPERATURE, mode="absolute", **options)


@pytest.mark.parametrize("name", ["own, in", "own, out", "own, both", "own, whole", "own, joint"])
def test_samples_have_that_covariance(name: str) -> None:
    """200 000 draws of normal numbers, shaped: within 1 % of the target."""
    options, expected = CASES[name]
    draw, samples = torch.Generator().manual_seed(2), []
    for shape in aligned(options).shapes:
        white = [
            torch.randn(200_000, *w.place.parameter.shape, generator=draw, dtype=torch.float64)
            for w in shape.weights
        ]
        colour = torch.vmap(lambda *each, shape=shape: tuple(shape.colour(each, 1.0)))
        samples += [noise.flatten(1) for noise in colour(*white)]
    flat = torch.cat(samples, 1)
    assert error(flat.T @ flat / len(flat), expected(lambda full: full)) <= 0.01


def test_one_step_of_a_tall_layer_is_a_sample() -> None:
    """200 000 rows of one weight under AdamW, learned from its inputs: noise of one real update."""
    torch.manual_seed(0)
    net = nn.Linear(3, 200_000, bias=False, dtype=torch.float64)
    optimizer = torch.optim.AdamW(net.parameters(), lr=RATE, weight_decay=0.0)
    noise = align_noise(
        optimizer,
        net,
        rank=3,
        temperature=lambda t: TEMPERATURE * (t > 60),
        mode="absolute",
        sketch_every=1,
        half_life=4.0,
    )
    gradient = 1 + torch.rand(net.weight.shape, dtype=torch.float64)
    for _ in range(61):
        net(INPUTS)
        net.weight.grad = gradient
        before = net.weight.detach().clone()
        optimizer.step()
    noise.remove()
    # With one gradient all along, Adam's own step is the learning rate in its direction.
    p = read(optimizer, net.weight)().view_as(net.weight)
    own = -RATE * gradient * p
    added = (net.weight.detach() - before - own) / p / math.sqrt(2 * RATE * TEMPERATURE)
    assert error(added.T @ added / len(added), moment(INPUTS)) <= 0.01


def test_draws_are_independent_between_weights_and_updates() -> None:
    """Beyond what a joint covariance says; a draw is a function of (seed, update, name) alone."""
    noise = aligned(CASES["own, in"][0])
    source, (a, b) = Shaped(noise.shapes, lambda _: 1.0), noise.places
    draws = [
        torch.cat([source.draw(place, Draws(0, update)).flatten() for place in (a, b)])
        for update in range(1, 3001)
    ]
    flat = torch.stack(draws)
    cross = flat[:, :6].T @ flat[:, 6:] / len(flat)
    later = flat[1:].T @ flat[:-1] / len(flat)
    # Products of independent numbers of variance about 1: standard error 1/sqrt(3000).
    assert cross.abs().max() < 0.12
    assert later.abs().max() < 0.12
    again = torch.cat([source.draw(place, Draws(0, 17)).flatten() for place in (b, a)])
    torch.testing.assert_close(again, torch.cat([draws[16][6:], draws[16][:6]]), rtol=0, atol=0)
