"""P and the momentum filter of each optimizer, against what its own step() does."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD, Adafactor, Adagrad, Adam, AdamW, Muon, Optimizer, RMSprop, Rprop

from gradnoise.base.errors import InputError
from gradnoise.noise.preconditioners import (
    decoupled_decay,
    is_diagonal,
    learning_filter,
    preconditioner,
    read,
)

LR = 1e-2
Make = Callable[[list[nn.Parameter]], Optimizer]


def made(kind: type[Optimizer], **options: Any) -> Make:
    def make(parameters: list[nn.Parameter]) -> Optimizer:
        return kind(parameters, lr=LR, **options)

    make.__name__ = " ".join([kind.__name__, *(f"{name}={value}" for name, value in options.items())])
    return make


ADAPTIVE = {
    "Adam": made(Adam),
    "Adam with a large eps": made(Adam, eps=0.3),
    "AdamW": made(AdamW, weight_decay=0.0),
    "AdamW amsgrad": made(AdamW, amsgrad=True, weight_decay=0.0),
    "RMSprop": made(RMSprop),
    "RMSprop centered": made(RMSprop, centered=True),
    "RMSprop with momentum": made(RMSprop, momentum=0.8, centered=True),
}
PLAIN = {
    "SGD": made(SGD),
    "SGD with momentum": made(SGD, momentum=0.9),
    "SGD nesterov": made(SGD, momentum=0.9, nesterov=True),
}


def parameter(*shape: int, seed: int = 0) -> nn.Parameter:
    draw = torch.Generator().manual_seed(seed)
    return nn.Parameter(torch.randn(*shape, generator=draw, dtype=torch.float64))


def gradient(like: Tensor, seed: int) -> Tensor:
    return torch.randn(like.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def step(optimizer: Optimizer, weight: nn.Parameter, value: Tensor) -> Tensor:
    """One step with a gradient; the move."""
    before = weight.detach().clone()
    weight.grad = value.clone()
    optimizer.step()
    return weight.detach() - before


@pytest.mark.parametrize("name", [*ADAPTIVE, *PLAIN])
def test_the_first_move_is_lr_times_what_the_filter_lets_through_at_once(name: str) -> None:
    """move = -lr x instant x P g, P read after the step."""
    weight = parameter(4, 3)
    optimizer = (ADAPTIVE | PLAIN)[name]([weight])
    g = gradient(weight, 1)
    move = step(optimizer, weight, g)
    instant = learning_filter(optimizer, weight, 0.0).instant
    torch.testing.assert_close(move, -LR * instant * preconditioner(optimizer, weight) * g, rtol=1e-9, atol=0)


@pytest.mark.parametrize("name", [name for name in ADAPTIVE if "momentum" not in name and "Adam" not in name])
def test_later_moves_without_momentum_too(name: str) -> None:
    weight = parameter(4, 3)
    optimizer = ADAPTIVE[name]([weight])
    for n in range(6):
        g = gradient(weight, n)
        move = step(optimizer, weight, g)
        torch.testing.assert_close(move, -LR * preconditioner(optimizer, weight) * g, rtol=1e-9, atol=0)


@pytest.mark.parametrize("amsgrad", [False, True])
def test_later_moves_of_adam_are_the_corrected_first_moment_times_p(amsgrad: bool) -> None:
    """move = -lr P m / (1 - beta1^t): the first moment's correction is not in P; amsgrad's v is the top."""
    weight = parameter(5)
    optimizer = Adam([weight], lr=LR, betas=(0.8, 0.9), amsgrad=amsgrad)
    moment = torch.zeros_like(weight)
    for t in range(1, 9):
        g = gradient(weight, t) * (10.0 if t == 3 else 0.1)
        moment = 0.8 * moment + 0.2 * g
        move = step(optimizer, weight, g)
        expected = -LR * preconditioner(optimizer, weight) * moment / (1 - 0.8**t)
        torch.testing.assert_close(move, expected, rtol=1e-9, atol=0)


def displacement(make: Make, change: Tensor, warm: int, after: int) -> tuple[Tensor, Tensor, Any]:
    """What a change of one gradient moves at once and in all, and the filter; eps keeps P nearly fixed."""
    ends, moves, found = [], [], None
    for extra in (torch.zeros_like(change), change):
        weight = nn.Parameter(torch.zeros_like(change))
        optimizer = make([weight])
        for n in range(warm + 1 + after):
            # The changed gradient is 0 but for the change, so that v changes in second order only.
            move = step(optimizer, weight, extra if n == warm else torch.full_like(change, 0.01))
            if n == warm:
                moves.append(move)
                found = learning_filter(optimizer, weight, 0.0), preconditioner(optimizer, weight)
        ends.append(weight.detach().clone())
    return moves[1] - moves[0], ends[1] - ends[0], found


@pytest.mark.parametrize(
    "make",
    [
        made(Adam, eps=1.0),
        made(AdamW, eps=1.0, betas=(0.5, 0.999), weight_decay=0.0),
        made(AdamW, eps=1.0, amsgrad=True, weight_decay=0.0),
        made(RMSprop, eps=1.0),
        made(RMSprop, eps=1.0, momentum=0.9),
        made(SGD, momentum=0.9),
        made(SGD, momentum=0.9, dampening=0.4),
        made(SGD, momentum=0.9, nesterov=True),
        made(SGD),
    ],
)
def test_momentum_spreads_a_gradient_but_moves_as_far(make: Make) -> None:
    """Two runs apart by one gradient: lr x instant x P change at once, lr x total x P change in the end."""
    change = torch.linspace(-1e-4, 2e-4, 5, dtype=torch.float64)
    once, total, (filtered, p) = displacement(make, change, warm=150, after=300)
    torch.testing.assert_close(once, -LR * filtered.instant * p * change, rtol=1e-3, atol=0)
    torch.testing.assert_close(total, -LR * filtered.total * p * change, rtol=2e-3, atol=0)


ADAFACTOR = {
    "as it is": {},
    "loose": {"d": 5.0},
    "not relative": {"eps": (None, 10.0)},
    "constant decay": {"beta2_decay": -0.1},
}


@pytest.mark.parametrize("shape", [(4, 6), (7,), (2, 3, 4)])
@pytest.mark.parametrize("options", ADAFACTOR)
def test_adafactors_move_is_its_own_learning_rate_times_p(shape: tuple[int, ...], options: str) -> None:
    """move = -lr x total x P g, at every step, with P of v factored for matrices and full for vectors."""
    weight = parameter(*shape)
    optimizer = Adafactor([weight], lr=LR, **ADAFACTOR[options])
    clipped = []
    for n in range(5):
        size = weight.detach().square().mean().sqrt().item()
        g = (1 + n) * gradient(weight, n) * torch.linspace(0.01, 3, shape[-1])  # rises, so moves are clipped
        move = step(optimizer, weight, g)
        found = learning_filter(optimizer, weight, size)
        assert found.total == found.instant
        u = preconditioner(optimizer, weight) * g
        torch.testing.assert_close(move, -LR * found.total * u, rtol=1e-6, atol=0)
        clipped.append(u.square().mean().sqrt().item() > optimizer.param_groups[0]["d"])
    assert any(clipped) == (options != "loose")


def test_a_small_parameter_has_adafactors_least_step() -> None:
    weight = nn.Parameter(torch.zeros(3, 3, dtype=torch.float64))
    optimizer = Adafactor([weight], lr=LR)
    step(optimizer, weight, torch.ones_like(weight))
    assert learning_filter(optimizer, weight, 0.0).total == pytest.approx(1e-3)  # eps2


def test_expected_p_bounds_the_noise_of_every_coordinate() -> None:
    """P^2 V <= (1 - beta2^t)/(1 - beta2) for any V: also for a coordinate whose gradient happened to be 0."""
    variance = torch.tensor([1e-12, 1e-6, 1.0, 1e6], dtype=torch.float64)
    for optimizer_of, bound in (
        (made(Adam, betas=(0.9, 0.99), eps=1e-30), (1 - 0.99**3) / 0.01),
        (made(RMSprop, alpha=0.99, eps=1e-30), 1 / 0.01),
        (made(Adafactor, eps=(1e-30, 1e-3)), 3**0.8),
    ):
        weight = parameter(4)
        optimizer = optimizer_of([weight])
        for _ in range(3):
            step(optimizer, weight, torch.tensor([0.0, 1e-9, 1.0, 1e-9], dtype=torch.float64))
        noise = preconditioner(optimizer, weight, variance).square() * variance
        assert (noise <= bound * (1 + 1e-9)).all()
        # The bound is what noise without signal has.
        assert noise[1].item() == pytest.approx(bound, rel=1e-3)
        assert (preconditioner(optimizer, weight).square() * variance)[1] > 10 * bound
        # Without variance nothing is added.
        none = preconditioner(optimizer, weight, torch.zeros_like(variance))
        torch.testing.assert_close(none, preconditioner(optimizer, weight), rtol=1e-12, atol=0)


def test_expected_p_of_adafactor_adds_the_noise_to_rows_and_columns() -> None:
    """v = (row + w mean_j V)(col + w mean_i V) / mean row, w = t^-0.8: by the formula."""
    weight = parameter(3, 4)
    optimizer = Adafactor([weight], lr=LR)
    for n in range(4):
        step(optimizer, weight, gradient(weight, n))
    variance = gradient(weight, 9).square()
    state, share = optimizer.state[weight], 4**-0.8
    row = state["row_var"] + share * variance.mean(1, keepdim=True)
    column = state["col_var"] + share * variance.mean(0, keepdim=True)
    expected = (row @ column / row.mean()).rsqrt()
    torch.testing.assert_close(preconditioner(optimizer, weight, variance), expected, rtol=1e-9, atol=0)


@pytest.mark.parametrize("name", [*ADAPTIVE, *PLAIN, "Adafactor"])
def test_some_coordinates_of_p_are_those_of_the_whole(name: str) -> None:
    weight = parameter(4, 3)
    optimizer = (ADAPTIVE | PLAIN | {"Adafactor": made(Adafactor)})[name]([weight])
    for n in range(3):
        step(optimizer, weight, gradient(weight, n))
    index = torch.tensor([1, 5, 11])
    found = read(optimizer, weight)
    torch.testing.assert_close(found(None, lambda flat: flat[index]), found()[index], rtol=0, atol=0)


@pytest.mark.parametrize("kind", [Adam, RMSprop, Adafactor, SGD])
def test_p_can_be_read_before_the_first_step(kind: type[Optimizer]) -> None:
    """No state yet: v is 0, P = 1/eps; Adafactor's is unknown and 1."""
    weight = parameter(3)
    optimizer = kind([weight], lr=LR, **({"eps": 1e-4} if kind in (Adam, RMSprop) else {}))
    expected = 1e4 if kind in (Adam, RMSprop) else 1.0
    torch.testing.assert_close(preconditioner(optimizer, weight), torch.full_like(weight, expected))


@pytest.mark.parametrize("kind", [Adagrad, Rprop])
def test_unknown_optimizers_are_refused_by_name(kind: type[Optimizer]) -> None:
    weight = parameter(3)
    optimizer = kind([weight])
    assert not is_diagonal(optimizer)
    with pytest.raises(InputError, match=kind.__name__):
        read(optimizer, weight)
    with pytest.raises(InputError, match=kind.__name__):
        learning_filter(optimizer, weight, 0.0)


def test_muon_has_a_filter_but_no_p() -> None:
    weight = parameter(3, 3)
    optimizer = Muon([weight], momentum=0.9)
    assert not is_diagonal(optimizer)
    assert learning_filter(optimizer, weight, 0.0).total == 1.0
    with pytest.raises(InputError, match="Muon"):
        read(optimizer, weight)


@pytest.mark.parametrize(
    ("make", "apart"),
    [
        (made(AdamW, weight_decay=0.1), True),
        (made(Adam, weight_decay=0.1), False),
        (made(Adam, weight_decay=0.1, decoupled_weight_decay=True), True),
        (made(SGD, weight_decay=0.1, momentum=0.9), False),
        (made(RMSprop, weight_decay=0.1), False),
        (made(Adafactor, weight_decay=0.1), True),
        (made(Muon, weight_decay=0.1), True),
    ],
)
def test_decoupled_decay_is_what_a_step_without_gradient_forgets(make: Make, apart: bool) -> None:
    """theta <- (1 - lr lambda) theta; decay that is part of the gradient becomes something else."""
    weight = nn.Parameter(torch.tensor([[1.0, 5.0], [-2.0, 0.3]]))
    optimizer = make([weight])
    decay = decoupled_decay(optimizer, optimizer.param_groups[0])
    move = step(optimizer, weight, torch.zeros_like(weight))
    assert decay == (0.1 if apart else 0.0)
    if apart:
        torch.testing.assert_close(move, -LR * decay * (weight.detach() - move))


def test_groups_have_their_own_filter() -> None:
    first, second = parameter(2), parameter(3)
    optimizer = SGD([{"params": [first]}, {"params": [second], "momentum": 0.5}], lr=LR, momentum=0.9)
    totals = [learning_filter(optimizer, weight, 0.0).total for weight in (first, second)]
    assert totals == pytest.approx([10.0, 2.0])
    assert math.isclose(read(optimizer, second)().sum().item(), 3.0)
