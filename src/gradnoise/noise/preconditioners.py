"""The diagonal preconditioner P of a step, read from the optimizer that made it."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.optim import SGD, Adafactor, Adam, AdamW, Muon, Optimizer, RMSprop

from gradnoise.base.errors import InputError

KNOWN = "SGD, Adam, AdamW, Adafactor and RMSprop"


@dataclass(frozen=True)
class Filter:
    """How one gradient becomes an update: learning rate x P g, spread over steps by momentum.

    `total`: effective over nominal learning rate, the sum of all that one gradient ever adds (SGD with
    momentum mu and dampening tau: (1 - tau)/(1 - mu); Adam: 1, because its filter sums to 1, whatever beta1).
    Exposure uses it: long-run noise does not depend on how momentum spreads it. `instant`: what this step
    already adds of it, by which a difference of updates is turned into long-run units.
    """

    total: float
    instant: float


@dataclass(frozen=True)
class Preconditioner:
    """P of one parameter as a function of the second moment v that it is made from.

    `second`: v (flat; None: P is 1). `weight`: that of this step's squared gradient in v. `finish`: from v to
    P. `elementwise` is False for Adafactor, whose v mixes coordinates: it is then given for the whole
    parameter.
    """

    parameter: Tensor
    second: Tensor | None
    weight: float
    finish: Callable[[Tensor], Tensor]
    elementwise: bool = True

    def __call__(
        self, variance: Tensor | None = None, take: Callable[[Tensor], Tensor] | None = None
    ) -> Tensor:
        """P, flat, where `take` takes it from a flat tensor (everywhere if None).

        With `variance`, v is replaced by v + weight x variance. A coordinate whose gradient happens to be
        near 0 has a tiny v while v is young, and 1/v is then no property of training: at Adam's first step
        P = 1/|g| and P^2 C/B has no mean. With max(0, C/B - g^2), which puts the larger of g^2 and its noise
        C/B into v, or with C/B itself, P^2 C/B is at most (1 - beta2^t)/(1 - beta2).
        """
        if not self.elementwise:
            p = self._whole(variance)
            return p if take is None else take(p)
        if self.second is None:
            ones = torch.ones_like(self.parameter).flatten()
            return ones if take is None else take(ones)
        second = self.second if take is None else take(self.second)
        return self.finish(second if variance is None else second.add(variance, alpha=self.weight))

    def _whole(self, variance: Tensor | None) -> Tensor:
        fed = torch.zeros_like(self.parameter) if variance is None else variance.view_as(self.parameter)
        return self.finish(self.weight * fed).flatten()


def read(optimizer: Optimizer, parameter: Tensor, group: dict[str, Any] | None = None) -> Preconditioner:
    """The parameter's P as the optimizer's state has it now: after a step, that of the step.

    Adam, AdamW: 1/(sqrt(v/(1 - beta2^t)) + eps) (`amsgrad`: the largest v); the bias correction of the first
    moment belongs to the momentum filter. RMSprop: 1/(sqrt(v) + eps) (centred: v - m^2). Adafactor:
    1/sqrt(row col / mean row). SGD: 1. All without the learning rate, in parameter units per gradient unit.
    Without state v is 0.

    Raises `InputError` for an optimizer whose P is not diagonal or not known.
    """
    group = group_of(optimizer, parameter) if group is None else group
    state = optimizer.state.get(parameter, {})
    eps = group.get("eps", 0.0)

    def moment(name: str) -> Tensor:
        found = state.get(name)
        return torch.zeros_like(parameter).flatten() if found is None else found.flatten()

    if isinstance(optimizer, SGD):
        return Preconditioner(parameter, None, 0.0, torch.ones_like)
    if isinstance(optimizer, Adam | AdamW):
        beta2 = float(group["betas"][1])
        correction = 1 - beta2 ** max(float(state.get("step", 0)), 1)
        second = moment("max_exp_avg_sq" if group["amsgrad"] else "exp_avg_sq")
        return Preconditioner(
            parameter, second, 1 - beta2, lambda v: (v / correction).sqrt_().add_(eps).reciprocal_()
        )
    if isinstance(optimizer, RMSprop):
        second, weight = moment("square_avg"), 1 - group["alpha"]
        if group["centered"]:
            # v - m^2, of which m takes back (1 - alpha)^2 of the squared gradient.
            second, weight = second - moment("grad_avg").square(), weight * group["alpha"]
        return Preconditioner(
            parameter, second, weight, lambda v: v.clamp_min(0).sqrt_().add_(eps).reciprocal_()
        )
    if isinstance(optimizer, Adafactor):
        return _adafactor(state, group, parameter)
    raise InputError(
        "optimizer",
        type(optimizer).__name__,
        f"its preconditioner is not a known diagonal one ({KNOWN}): take effective='jackknife'",
    )


def group_of(optimizer: Optimizer, parameter: Tensor) -> dict[str, Any]:
    """The parameter group that holds the parameter."""
    return next(g for g in optimizer.param_groups if any(p is parameter for p in g["params"]))


def preconditioner(optimizer: Optimizer, parameter: Tensor, variance: Tensor | None = None) -> Tensor:
    """`read`, in the parameter's shape; `variance` (same shape) as in `Preconditioner`."""
    flat = None if variance is None else variance.flatten()
    return read(optimizer, parameter)(flat).view_as(parameter)


def _adafactor(state: dict[str, Any], group: dict[str, Any], parameter: Tensor) -> Preconditioner:
    eps = torch.finfo(parameter.dtype).eps if group["eps"][0] is None else group["eps"][0]
    if "step" not in state:
        return Preconditioner(parameter, None, 0.0, torch.ones_like)

    def factored(fed: Tensor) -> Tensor:
        row = state["row_var"] + fed.mean(-1, keepdim=True)
        column = state["col_var"] + fed.mean(-2, keepdim=True)
        second: Tensor = row @ column / row.mean(-2, keepdim=True).clamp_min(eps)
        return second.clamp_min(eps * eps).rsqrt()

    def vector(fed: Tensor) -> Tensor:
        second: Tensor = state["variance"] + fed
        return second.clamp_min(eps * eps).rsqrt()

    weight = float(state["step"]) ** group["beta2_decay"]
    finish = factored if parameter.dim() > 1 else vector
    return Preconditioner(parameter, None, weight, finish, elementwise=False)


def learning_filter(
    optimizer: Optimizer,
    parameter: Tensor,
    root_mean_square: float,
    group: dict[str, Any] | None = None,
    gradient: Tensor | None = None,
) -> Filter:
    """The parameter's `Filter` after its step, made with `gradient` (None: the one that it holds).

    `root_mean_square` of the parameter before the step: Adafactor scales its step by it (and by
    min(lr, 1/sqrt(t)) / max(1, rms(P g)/d)), tensor by tensor; it is ignored elsewhere. Muon's adjustment of
    the learning rate to a matrix's shape counts as part of its update. Raises `InputError` for an unknown
    optimizer.
    """
    group = group_of(optimizer, parameter) if group is None else group
    state = optimizer.state.get(parameter, {})
    if isinstance(optimizer, Adam | AdamW):
        beta1 = float(group["betas"][0])
        return Filter(1.0, (1 - beta1) / (1 - beta1 ** max(float(state.get("step", 1)), 1)))
    if isinstance(optimizer, SGD):
        momentum, given = float(group["momentum"]), 1 - float(group["dampening"])
        if momentum == 0:
            return Filter(1.0, 1.0)
        return Filter(given / (1 - momentum), 1 + momentum * given if group["nesterov"] else given)
    if isinstance(optimizer, RMSprop):
        return Filter(1 / (1 - float(group["momentum"])), 1.0)
    if isinstance(optimizer, Muon):
        momentum = float(group["momentum"])
        return Filter(1.0, 1 - momentum**2 if group["nesterov"] else 1 - momentum)
    if isinstance(optimizer, Adafactor):
        step, rate = float(state.get("step", 1)), float(group["lr"])
        alpha = max(group["eps"][1], root_mean_square) * min(rate, 1 / math.sqrt(step))
        update = 0.0
        gradient = parameter.grad if gradient is None else gradient
        if gradient is not None:
            moved = read(optimizer, parameter, group)() * gradient.flatten()
            update = moved.double().square().mean().sqrt().item()
        ratio = alpha / max(1.0, update / group["d"]) / rate
        return Filter(ratio, ratio)
    raise InputError("optimizer", type(optimizer).__name__, f"how it filters is known for {KNOWN} and Muon")


def is_diagonal(optimizer: Optimizer) -> bool:
    """Whether `read` knows the optimizer."""
    return isinstance(optimizer, SGD | Adam | AdamW | RMSprop | Adafactor)


def decoupled_decay(optimizer: Optimizer, group: dict[str, Any]) -> float:
    """lambda of theta <- (1 - lr lambda) theta; 0 where decay is part of the gradient (coupled L2)."""
    apart = group.get("decoupled_weight_decay") or isinstance(optimizer, Adafactor | Muon)
    return float(group["weight_decay"]) if apart else 0.0
