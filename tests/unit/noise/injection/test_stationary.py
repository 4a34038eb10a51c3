"""On a quadratic, the stationary covariance of injected noise against the solution of its Lyapunov equation.

x' = A x + B n on x = (theta, m), m what the optimizer remembers: S = A S A' + B N B'. Chains are rows of one
parameter; gradients H theta are written by hand. 120 000 independent chains know S to sqrt(4/120000) = 0.6 %
(relative Frobenius error at 3 dimensions; draws are fixed).
"""

from typing import Any

import pytest
import torch
from scipy.linalg import solve_discrete_lyapunov
from torch import Tensor, nn
from torch.optim import SGD, Adam, Optimizer

from gradnoise import gaussian, inject
from gradnoise.noise.injection.inject import Where

CHAINS, WARM, READINGS, APART = 40_000, 120, 3, 40
H = torch.tensor([[1.0, 0.3, 0.0], [0.3, 0.6, -0.2], [0.0, -0.2, 1.4]])
STD = torch.tensor([1.0, 0.5, 0.2])
# Adam's constant second moment: P = 1/sqrt(v).
SECOND = torch.tensor([1.0, 4.0, 0.25])
ETA, MU, BETA = 0.2, 0.8, 0.9
KINDS = ("SGD", "momentum", "Adam")


def optimizer_of(kind: str, theta: nn.Parameter) -> Optimizer:
    if kind != "Adam":
        return SGD([theta], lr=ETA, momentum=MU if kind == "momentum" else 0.0)
    optimizer = Adam([theta], lr=ETA, betas=(BETA, 1 - 1e-12), eps=0.0)
    # So late that every bias correction is 1.
    optimizer.state[theta] = {
        "step": torch.tensor(1e15),
        "exp_avg": torch.zeros_like(theta),
        "exp_avg_sq": SECOND.repeat(CHAINS, 1),
    }
    return optimizer


def simulated(kind: str, where: Where) -> Tensor:
    """Covariance of theta over chains, averaged over readings far enough apart."""
    theta = nn.Parameter(torch.zeros(CHAINS, 3))
    optimizer = optimizer_of(kind, theta)
    inject(optimizer, gaussian({"parameters.0": STD.repeat(CHAINS, 1)}), where)
    found: Any = 0
    for n in range(1, WARM + APART * (READINGS - 1) + 1):
        theta.grad = theta.detach() @ H
        optimizer.step()
        if n >= WARM and (n - WARM) % APART == 0:
            found = found + theta.detach().T @ theta.detach() / CHAINS / READINGS
    covariance: Tensor = found.double()
    return covariance


def solved(kind: str, where: Where) -> Tensor:
    """The same from the Lyapunov equation; m' = a m + b (H theta + n), theta' = theta - eta P m'."""
    p = SECOND.rsqrt().diag() if kind == "Adam" else torch.eye(3)
    a, b = {"SGD": (0.0, 1.0), "momentum": (MU, 1.0), "Adam": (BETA, 1 - BETA)}[kind]
    identity, zero = torch.eye(3), torch.zeros(3, 3)
    top = torch.cat([identity - ETA * b * p @ H, -ETA * a * p], 1)
    transition = torch.cat([top, torch.cat([b * H, a * identity], 1)])
    if where == "post":
        # All that one gradient ever adds, at once, and m knows nothing of it.
        entry = torch.cat([-ETA * b / (1 - a) * p, zero])
    else:
        entry = torch.cat([-ETA * b * p, b * identity])
    noise = entry @ STD.square().diag() @ entry.T
    return torch.from_numpy(solve_discrete_lyapunov(transition.double().numpy(), noise.double().numpy()))[
        :3, :3
    ]


def distance(one: Tensor, other: Tensor) -> float:
    return float((one - other).norm() / other.norm())


@pytest.mark.parametrize("where", ["pre", "frozen_v", "post"])
@pytest.mark.parametrize("kind", KINDS)
def test_chains_have_the_covariance_of_the_lyapunov_equation(kind: str, where: Where) -> None:
    found = simulated(kind, where)
    assert distance(found, solved(kind, where)) < 0.015
    if kind != "SGD":
        # The two ways in differ by O(eta): at this eta the test tells them apart.
        other: Where = "pre" if where == "post" else "post"
        assert distance(found, solved(kind, other)) > 0.5
