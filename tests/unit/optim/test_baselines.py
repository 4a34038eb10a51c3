"""Baselines against the laws that they are known to have."""

import math

import pytest
import torch
from scipy.linalg import solve_discrete_lyapunov
from torch import Tensor, nn

from gradnoise import exposure
from gradnoise.base.errors import InputError
from gradnoise.optim.baselines import annealed, psgld, scale_batch, sgld

# Independent chains as a leading dimension of one parameter; their states at SNAPSHOTS times far apart.
CHAINS, SNAPSHOTS = 4000, 8
PRECISION = torch.tensor([[2.0, 0.6, 0.0], [0.6, 1.0, -0.3], [0.0, -0.3, 0.5]], dtype=torch.float64)
CENTRE = torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)
TEMPERATURE = 0.3


def states(optimizer: torch.optim.Optimizer, theta: nn.Parameter, first: int, apart: int) -> Tensor:
    """Chains of exact gradients of (theta - centre)' precision (theta - centre) / 2, far from its start."""
    found = []
    for step in range(first + SNAPSHOTS * apart):
        theta.grad = (theta.detach() - CENTRE) @ PRECISION
        optimizer.step()
        if step >= first and (step - first) % apart == 0:
            found.append(theta.detach().clone())
    return torch.cat(found)


def divergence(sample: Tensor, mean: Tensor, covariance: Tensor) -> float:
    """KL(N(sample moments) || N(mean, covariance))."""
    shift, found = sample.mean(0) - mean, torch.cov(sample.T)
    precision = torch.linalg.inv(covariance)
    trace = (precision @ found).trace() + shift @ precision @ shift - len(mean)
    return 0.5 * (trace + torch.logdet(covariance) - torch.logdet(found)).item()


def test_sgld_recovers_a_gaussian_posterior() -> None:
    """Mean, covariance and KL of exp(-loss/T), as libraries of samplers test theirs.

    With 32 000 nearly independent draws an entry of the covariance has an error of .8 % of the geometric mean
    of its diagonal, and the KL divergence is about d (d + 3) / (4 n) = 1.4e-4.
    """
    rate = 0.02
    theta = nn.Parameter(torch.zeros(CHAINS, 3, dtype=torch.float64))
    optimizer = torch.optim.SGD([theta], lr=rate)
    sgld(optimizer, TEMPERATURE, seed=1)
    sample = states(optimizer, theta, first=700, apart=150)
    posterior = TEMPERATURE * torch.linalg.inv(PRECISION)
    # The discrete chain's own law, and how near the continuous one is at this learning rate.
    turn = torch.eye(3, dtype=torch.float64) - rate * PRECISION
    noise = 2 * rate * TEMPERATURE * torch.eye(3, dtype=torch.float64)
    exact = torch.from_numpy(solve_discrete_lyapunov(turn.numpy(), noise.numpy()))
    assert (exact - posterior).norm() / posterior.norm() < 0.025
    assert (torch.cov(sample.T) - exact).norm() / exact.norm() < 0.025
    assert ((sample.mean(0) - CENTRE) / (posterior.diagonal() / len(sample)).sqrt()).abs().max() < 6
    assert divergence(sample, CENTRE, exact) < 1e-3
    assert divergence(sample, CENTRE, posterior) < 2e-3
    # It can tell: noise of std 2 eta sqrt(T), a known slip, is another law.
    assert divergence(sample, CENTRE, 2 * posterior) > 0.1


def test_preconditioned_sgld_has_the_same_law_where_p_is_still() -> None:
    second = torch.tensor([4.0, 1.0, 0.25], dtype=torch.float64)
    theta = nn.Parameter(torch.zeros(CHAINS, 3, dtype=torch.float64))
    optimizer = torch.optim.RMSprop([theta], lr=0.01, alpha=1 - 1e-15, eps=0.0)
    optimizer.state[theta] = {
        "step": torch.tensor(0.0),
        "square_avg": second.expand(CHAINS, 3).clone(),
    }
    psgld(optimizer, TEMPERATURE, seed=2)
    sample = states(optimizer, theta, first=1500, apart=300)
    posterior = TEMPERATURE * torch.linalg.inv(PRECISION)
    assert divergence(sample, CENTRE, posterior) < 2e-3


def test_temperature_enters_the_ledger_as_2_t_per_update() -> None:
    """2 T Tr(P) per update of pSGLD in `pne`, times the learning rate in `pne2`; 2 T d of SGLD."""
    torch.manual_seed(0)
    for adaptive in (False, True):
        net = nn.Linear(6, 3)
        rate = 0.05 if not adaptive else 1e-3
        optimizer: torch.optim.Optimizer
        if adaptive:
            optimizer = torch.optim.RMSprop(net.parameters(), lr=rate)
            psgld(optimizer, 1e-3, model=net)
        else:
            optimizer = torch.optim.SGD(net.parameters(), lr=rate)
            sgld(optimizer, 1e-3, model=net)
        meter = exposure(net, optimizer, every=1, p="step")
        expected = 0.0
        for _ in range(5):
            for _ in range(3):
                nn.functional.cross_entropy(net(torch.randn(8, 6)), torch.randint(3, (8,))).backward()
            optimizer.step()
            for parameter in net.parameters():
                p: Tensor | float = 1.0
                if adaptive:
                    p = 1 / (optimizer.state[parameter]["square_avg"].sqrt() + 1e-8)
                expected += 2 * 1e-3 * rate * float((torch.ones_like(parameter) * p).sum())
            optimizer.zero_grad()
        assert meter.last is not None
        assert float(meter.last.pne2_injected) == pytest.approx(expected, rel=1e-5)


def test_annealed_noise_has_its_published_variance_and_goes_into_the_gradient() -> None:
    theta = nn.Parameter(torch.zeros(200_000))
    optimizer = torch.optim.SGD([theta], lr=1.0)
    annealed(optimizer, scale=0.3, decay=0.55, seed=3)
    before = torch.zeros(200_000)
    for update in range(1, 6):
        theta.grad = torch.zeros_like(theta)
        optimizer.step()
        # The standard error of a variance over 2e5 draws is .3 %.
        moved = (theta.detach() - before).var().item()
        assert moved == pytest.approx(0.3 / update**0.55, rel=0.015)
        before = theta.detach().clone()


def test_batch_scaling_follows_its_schedule_and_resumes() -> None:
    theta = nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([theta], lr=0.1)
    scale = scale_batch(optimizer, lambda update: 10 * 1.5**update, multiple=8)
    seen = []
    for _ in range(4):
        seen.append(scale.batch)
        theta.grad = torch.zeros_like(theta)
        optimizer.step()
    assert seen == [16, 24, 32, 48]
    again = scale_batch(optimizer, lambda update: 10 * 1.5**update, multiple=8)
    again.load_state_dict(scale.state_dict())
    assert again.batch == scale.batch == 72


def test_baselines_refuse_what_they_are_not_defined_for() -> None:
    theta = nn.Parameter(torch.zeros(2))
    with pytest.raises(InputError, match="optimizer: Adam.*psgld"):
        sgld(torch.optim.Adam([theta]), 1.0)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="optimizer: SGD.*must be RMSprop"):
        psgld(torch.optim.SGD([theta]), 1.0)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="scale"):
        annealed(torch.optim.SGD([theta]), scale=-1.0)
    optimizer = torch.optim.SGD([theta], lr=0.1)
    sgld(optimizer, -1.0)
    theta.grad = torch.zeros_like(theta)
    with pytest.raises(InputError, match="temperature.*-1.0"):
        optimizer.step()
    with pytest.raises(InputError, match="batch at update 1"):
        _ = scale_batch(optimizer, lambda _: math.nan).batch
