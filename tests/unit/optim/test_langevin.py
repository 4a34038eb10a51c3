"""Temperatures in parameter groups, the ledger's part of them, and the stationary law of shaped noise."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from scipy.linalg import solve_continuous_lyapunov, solve_discrete_lyapunov
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from gradnoise import align_noise, exposure
from gradnoise.base.errors import InputError
from gradnoise.noise.injection.sources import Place
from gradnoise.noise.schedules import ramp
from gradnoise.optim.nap import Alignment, Mode

# --- The stationary law on a quadratic ----------------------------------------------------------------------

CHAINS, SNAPSHOTS = 4000, 8
RATE, TEMPERATURE = 0.02, 0.3
HESSIAN = torch.tensor([[2.0, 0.6, 0.0], [0.6, 1.0, -0.3], [0.0, -0.3, 0.5]], dtype=torch.float64)
P = torch.tensor([0.5, 1.0, 1.6], dtype=torch.float64).diag()
TILTED = torch.tensor([[3.0, -1.0, 0.4], [-1.0, 1.5, 0.0], [0.4, 0.0, 0.2]], dtype=torch.float64)


def trace_normalised(covariance: Tensor) -> Tensor:
    return covariance * len(covariance) / covariance.trace()


def stationary(sigma: Tensor, alignment: float) -> Tensor:
    """Sample covariance of chains, the rows of one weight, under RMSprop whose P stands still."""
    net = nn.Linear(3, CHAINS, bias=False, dtype=torch.float64)
    nn.init.zeros_(net.weight)
    optimizer = torch.optim.RMSprop(net.parameters(), lr=RATE, alpha=1 - 1e-15, eps=0.0)
    second = P.diagonal().pow(-2).expand(CHAINS, 3).clone()
    optimizer.state[net.weight] = {"step": torch.tensor(0.0), "square_avg": second}
    variances, directions = torch.linalg.eigh(sigma)
    align_noise(
        optimizer,
        net,
        temperature=TEMPERATURE,
        alignment=alignment,
        mode="absolute",
        target=lambda *_: (directions, variances, 0.0),
    )
    found = []
    for step in range(600 + SNAPSHOTS * 150):
        net.weight.grad = net.weight.detach() @ HESSIAN + 1e-12
        optimizer.step()
        if step >= 600 and (step - 600) % 150 == 0:
            found.append(net.weight.detach().clone())
    return torch.cov(torch.cat(found).T)


def predicted(sigma: Tensor) -> tuple[Tensor, Tensor]:
    """Of P H S + S H P = 2 T P Sigma P, and of the chain at its learning rate."""
    noise = 2 * TEMPERATURE * P @ sigma @ P
    limit = solve_continuous_lyapunov((P @ HESSIAN).numpy(), noise.numpy())
    turn = torch.eye(3, dtype=torch.float64) - RATE * P @ HESSIAN
    chain = solve_discrete_lyapunov(turn.numpy(), (RATE * noise).numpy())
    return torch.from_numpy(limit), torch.from_numpy(chain)


def error(found: Tensor, expected: Tensor) -> float:
    return ((found - expected).norm() / expected.norm()).item()


@pytest.mark.parametrize("name", ["isotropic", "tilted", "half tilted", "inverse of P"])
def test_the_stationary_covariance_solves_the_lyapunov_equation(name: str) -> None:
    """And is T H^-1, Gibbs', only where Sigma is proportional to P^-1."""
    wanted = torch.linalg.inv(P) if name == "inverse of P" else TILTED
    alignment = {"isotropic": 0.0, "half tilted": 0.5}.get(name, 1.0)
    identity = torch.eye(3, dtype=torch.float64)
    sigma = alignment * trace_normalised(wanted) + (1 - alignment) * identity
    found, (limit, chain) = stationary(wanted, alignment), predicted(sigma)
    assert error(found, chain) < 0.025
    assert error(found, limit) < 0.04
    gibbs = torch.linalg.inv(HESSIAN)
    # Whatever the temperature: the best multiple of T H^-1.
    off = error((gibbs * found).sum() / gibbs.square().sum() * gibbs, found)
    if name == "inverse of P":
        assert off < 0.025
        scale = 3 / torch.linalg.inv(P).trace().item()
        assert error(found, scale * TEMPERATURE * gibbs) < 0.04
    else:
        assert off > 0.05


# --- Settings -----------------------------------------------------------------------------------------------


def net_of(width: int = 4) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, width), nn.Tanh(), nn.Linear(width, 3))


def update(net: nn.Module, optimizer: torch.optim.Optimizer, seed: int = 0, parts: int = 3) -> None:
    draw = torch.Generator().manual_seed(seed)
    for _ in range(parts):
        x, y = torch.randn(8, 6, generator=draw), torch.randint(3, (8,), generator=draw)
        (cross_entropy(net(x), y) / parts).backward()
    optimizer.step()
    optimizer.zero_grad()


def test_groups_hold_settings_that_others_may_write() -> None:
    """A number is written once, and one that a group has of its own stays; a function, before each update."""
    net = net_of()
    groups = [{"params": net[0].parameters(), "temperature": 0.7}, {"params": net[2].parameters()}]
    optimizer = torch.optim.SGD(groups, lr=0.5)
    noise = align_noise(optimizer, net, temperature=0.2, alignment=ramp(0, 1, 10), mode="absolute")
    assert [group["temperature"] for group in optimizer.param_groups] == [0.7, 0.2]
    first, second = noise.places
    for step in (1, 2, 3):
        update(net, optimizer, step)
        assert [group["alignment"] for group in optimizer.param_groups] == [step / 10] * 2
    assert noise.powers()[noise.channel(first)] == pytest.approx(2 * 0.7 / 0.5)
    optimizer.param_groups[0]["temperature"] = 0.0
    optimizer.param_groups[1]["alignment"] = 0.9
    update(net, optimizer)
    assert noise.powers()[noise.channel(first)] == 0
    assert noise.powers()[noise.channel(second)] == pytest.approx(2 * 0.2 / 0.5)
    assert optimizer.param_groups[1]["alignment"] == 0.4
    noise.remove()
    assert not {"temperature", "alignment"} & set(optimizer.param_groups[0])


def test_noises_on_one_optimizer_have_settings_of_their_own() -> None:
    """And each its own shape; the settings of one that is removed do not come back with the next."""
    net = net_of()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.5)
    options: dict[str, Any] = {"mode": "absolute", "target": first_input}
    one = align_noise(optimizer, net, layers="0", temperature=0.2, alignment=0.0, **options)
    two = align_noise(optimizer, net, layers="2", temperature=0.1, alignment=1.0, **options)
    (group,) = optimizer.param_groups
    assert (group["temperature"], group["alignment"]) == (0.2, 0.0)
    assert (group["temperature_2"], group["alignment_2"]) == (0.1, 1.0)
    before = [p.detach().clone() for p in (net[0].weight, net[2].weight)]
    update(net, optimizer)
    torch.testing.assert_close(one.variance(one.places[0]), torch.full((4, 6), 0.8))
    aligned = two.variance(two.places[0])
    torch.testing.assert_close(aligned[:, 0], torch.full((3,), 0.4 * 4), rtol=0.01, atol=0)
    assert aligned[:, 1:].max() < 0.01
    assert all((p != old).all() for p, old in zip((net[0].weight, net[2].weight), before, strict=True))
    one.remove()
    assert "temperature" not in group
    assert group["temperature_2"] == 0.1
    again = align_noise(optimizer, net, layers="0", temperature=0.3, **options)
    update(net, optimizer)
    assert again.powers() == {"0": pytest.approx(1.2)}
    assert two.powers() == {"0": pytest.approx(0.4)}


def first_input(_: str, layer: nn.Module) -> tuple[Tensor, Tensor, float]:
    """Noise along the first input alone."""
    return torch.eye(int(layer.in_features))[:, :1], torch.ones(1), 0.0


@pytest.mark.parametrize("temperature", [-1.0, math.inf, math.nan])
def test_a_temperature_that_is_none_is_refused_at_once_and_when_written(temperature: float) -> None:
    for mode in ("absolute", "relative"):
        net = net_of()
        optimizer = torch.optim.SGD(net.parameters(), lr=0.5)
        with pytest.raises(InputError, match=r"temperature: .*: must be 0 or more, and finite"):
            align_noise(optimizer, net, temperature=temperature, mode=mode)
        align_noise(optimizer, net, mode=mode)
        optimizer.param_groups[0]["temperature"] = temperature
        with pytest.raises(InputError, match=r"temperature: .*: must be 0 or more, and finite"):
            update(net, optimizer)


# --- The ledger ---------------------------------------------------------------------------------------------

OPTIMIZERS: dict[str, Callable[[nn.Module], torch.optim.Optimizer]] = {
    "sgd": lambda net: torch.optim.SGD(net.parameters(), lr=0.05),
    "momentum": lambda net: torch.optim.SGD(net.parameters(), lr=0.01, momentum=0.9, dampening=0.2),
    "adamw": lambda net: torch.optim.AdamW(net.parameters(), lr=1e-3),
    "amsgrad": lambda net: torch.optim.AdamW(net.parameters(), lr=1e-3, amsgrad=True, fused=True),
    "adafactor": lambda net: torch.optim.Adafactor(net.parameters(), lr=1e-2),
    "rmsprop": lambda net: torch.optim.RMSprop(net.parameters(), lr=1e-3, centered=True, momentum=0.5),
}


def watched(noise: Alignment, monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Squared displacement by noise, one number a weight and update, as it is made."""
    moved: list[float] = []
    displace = noise._displace

    def watch(place: Place, drawn: Tensor) -> None:
        before = place.parameter.detach().double()
        displace(place, drawn)
        moved.append((place.parameter.detach().double() - before).square().sum().item())

    monkeypatch.setattr(noise, "_displace", watch)
    return moved


def wide_update(net: nn.Module, optimizer: torch.optim.Optimizer, draw: torch.Generator) -> None:
    for _ in range(4):
        x, y = torch.randn(8, 40, generator=draw), torch.randint(8, (8,), generator=draw)
        (cross_entropy(net(x), y) / 4).backward()
    optimizer.step()
    optimizer.zero_grad()


@pytest.mark.parametrize("mode", ["absolute", "relative"])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_injected_exposure_is_the_mean_squared_displacement(
    name: str, mode: Mode, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Update by update, on average over 60 updates of 2400 coordinates: a standard error of .4 to 1 %.

    With P of the step that was made and momentum's long-run rate. `pne` has it without the learning rate: in
    mode "absolute" 2 T Tr(P Sigma P) an update; in mode "relative" the last reading's trace times T.
    """
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(40, 50), nn.Tanh(), nn.Linear(50, 8))
    optimizer = OPTIMIZERS[name](net)
    lr = optimizer.param_groups[0]["lr"]
    meter = exposure(net, optimizer, every=1, p="step")
    temperature = 1e-4 if mode == "absolute" else 0.5
    options: dict[str, Any] = {"rank": 8, "alignment": 0.8, "sketch_every": 1, "mode": mode}
    noise = align_noise(optimizer, net, temperature=temperature, **options)
    wide_update(net, optimizer, draw := torch.Generator().manual_seed(0))
    moved = watched(noise, monkeypatch)
    for _ in range(60):
        expected = (
            2 * temperature / lr
            if mode == "absolute"
            else temperature * meter.trace / meter.account.unit(noise, "0")
        )
        wide_update(net, optimizer, draw)
        assert noise.powers() == {"0": pytest.approx(expected, rel=1e-9)}
    meter.remove()
    pairs = zip(moved[::2], moved[1::2], meter.events[1:], strict=True)
    ratios = torch.tensor([(one + other) / event.injected_pne2 for one, other, event in pairs])
    assert ratios.mean().item() == pytest.approx(1, abs=0.03)
    if name != "adafactor":  # whose effective rate differs between tensors
        effective = meter.events[-1].sum_lr
        assert all(e.injected_pne2 == pytest.approx(effective * e.injected_pne) for e in meter.events[1:])


def test_the_ledger_is_too_low_while_adams_second_moment_is_young(monkeypatch: pytest.MonkeyPatch) -> None:
    """What docs/nap.md says of the expected P: over 20 runs, updates 1 to 5, and 20 to 30."""
    moved, counted = torch.zeros(30), torch.zeros(30)
    for seed in range(20):
        torch.manual_seed(seed)
        net = nn.Sequential(nn.Linear(40, 20), nn.Tanh(), nn.Linear(20, 8))
        optimizer = torch.optim.AdamW(net.parameters(), lr=1e-3)
        meter = exposure(net, optimizer, every=1)
        noise = align_noise(optimizer, net, temperature=1e-9, mode="absolute", rank=4, seed=seed)
        found = watched(noise, monkeypatch)
        draw = torch.Generator().manual_seed(seed)
        for _ in range(30):
            wide_update(net, optimizer, draw)
        meter.remove()
        moved += torch.tensor(found).view(30, 2).sum(1)
        counted += torch.tensor([event.injected_pne2 for event in meter.events])
    assert 2 < (moved[:5].sum() / counted[:5].sum()).item() < 4
    assert (moved[20:].sum() / counted[20:].sum()).item() == pytest.approx(1, abs=0.03)


@pytest.mark.parametrize("name", ["adamw", "adafactor", "sgd"])
def test_a_meter_of_its_own_keeps_the_ratio_of_injected_to_intrinsic(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also while the second moment is young: within a third from the tenth update on, 10 % on average."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(40, 50), nn.Tanh(), nn.Linear(50, 8))
    optimizer = OPTIMIZERS[name](net)
    noise = align_noise(optimizer, net, rank=8, temperature=0.5)
    meter = exposure(net, optimizer, every=1)
    moved, draw = watched(noise, monkeypatch), torch.Generator().manual_seed(0)
    for _ in range(120):
        wide_update(net, optimizer, draw)
    meter.remove()
    pairs = zip(moved[::2], moved[1::2], meter.events[1:], strict=True)
    ratios = torch.tensor([(one + other) / (e.sum_lr2 * e.trace_pcp) for one, other, e in pairs])[9:]
    assert ratios.mean().item() == pytest.approx(0.5, rel=0.1)
    assert ((ratios / 0.5).log().abs() < math.log(1.5)).all()
