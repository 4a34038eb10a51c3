"""What aligned noise is compared with, attached to an optimizer as it is and counted by the same ledger.

- `sgld`: theta <- theta + sqrt(2 eta T) n after SGD's step (Welling and Teh, ICML 2011);
- `psgld`: theta <- theta + sqrt(2 eta T P) n after an adaptive optimizer's (Li et al., AAAI 2016, without the
  term for how P changes with theta, which they drop too);
- `annealed`: n of variance scale / t^decay in the gradient, before the preconditioner (Neelakantan et al.,
  2015, arXiv 1511.06807);
- `scale_batch`: the batch size as a schedule.

The plain optimizer is the baseline without any of them.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import nn
from torch.optim import SGD, Adam, AdamW, Optimizer, RMSprop

from gradnoise.base.errors import InputError
from gradnoise.noise.injection.inject import Injection, inject, skipped
from gradnoise.noise.injection.sources import gaussian
from gradnoise.optim.langevin import Langevin, Schedule


def sgld(
    optimizer: SGD,
    temperature: Schedule,
    *,
    model: nn.Module | None = None,
    layers: str = "*",
    seed: int = 0,
) -> Langevin:
    """Stochastic gradient Langevin dynamics over SGD; `layers`, `model` and `seed` as in `inject`.

    Its stationary law is exp(-loss / T) as the learning rate goes to 0, plus what minibatches add: for the
    posterior given N examples and a loss that is their mean, T = 1/N. `temperature`: a number or a function
    of the update, kept in the parameter groups. Raises `InputError` for an optimizer with a preconditioner.
    """
    if not isinstance(optimizer, SGD):
        mend = "must be SGD, whose preconditioner is 1: take psgld or align_noise"
        raise InputError("optimizer", type(optimizer).__name__, mend)
    settings = {"temperature": temperature}
    return Langevin(optimizer, gaussian(1.0), settings, model=model, layers=layers, seed=seed)


def psgld(
    optimizer: RMSprop | Adam | AdamW,
    temperature: Schedule,
    *,
    model: nn.Module | None = None,
    layers: str = "*",
    seed: int = 0,
    limit: float = math.inf,
) -> Langevin:
    """Preconditioned SGLD over RMSprop, Adam or AdamW: noise of covariance 2 eta T P; else as `sgld`.

    With P held still the stationary law is that of `sgld`: P only changes how fast it is reached. `limit`: P
    counts at most this times the P of a coordinate whose 1/P is its tensor's root mean square; without it,
    coordinates that get no gradient have P = 1/eps.
    """
    if not isinstance(optimizer, RMSprop | Adam | AdamW):
        raise InputError("optimizer", type(optimizer).__name__, "must be RMSprop, Adam or AdamW")
    settings = {"temperature": temperature}
    return Langevin(
        optimizer,
        gaussian(1.0),
        settings,
        model=model,
        layers=layers,
        seed=seed,
        metric=0.5,
        limit=limit,
    )


def annealed(
    optimizer: Optimizer,
    scale: float = 0.01,
    decay: float = 0.55,
    *,
    model: nn.Module | None = None,
    layers: str = "*",
    seed: int = 0,
) -> Injection:
    """Annealed isotropic gradient noise N(0, scale / t^decay), t the update from 1.

    The decay is the published one, the scale one of those that were tried there.
    """
    if not scale >= 0:
        raise InputError("scale", scale, "must be 0 or more")
    return inject(
        optimizer,
        gaussian(math.sqrt(scale)),
        where="pre",
        model=model,
        layers=layers,
        power=Decay(decay),
        seed=seed,
    )


@dataclass(frozen=True)
class Decay:
    """t^-decay at update t."""

    decay: float

    def __call__(self, update: int) -> float:
        return math.pow(update, -self.decay)


class BatchScale:
    """See `scale_batch`. `batch`: of the coming update; `step`: updates done."""

    def __init__(self, optimizer: Optimizer, schedule: Callable[[int], float], multiple: int) -> None:
        if multiple < 1:
            raise InputError("multiple", multiple, "must be at least 1 sequence")
        self.step, self._schedule, self._multiple = 0, schedule, multiple
        self._hook = optimizer.register_step_post_hook(self._count)

    def _count(self, optimizer: Optimizer, *_: object) -> None:
        self.step += not skipped(optimizer)

    @property
    def batch(self) -> int:
        wanted = self._schedule(self.step + 1)
        if not 0 < wanted < math.inf:
            raise InputError(f"batch at update {self.step + 1}", wanted, "must be above 0, and finite")
        return max(1, round(wanted / self._multiple)) * self._multiple

    def remove(self) -> None:
        """Detach."""
        self._hook.remove()

    def state_dict(self) -> dict[str, Any]:
        return {"step": self.step}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.step = state["step"]


def scale_batch(optimizer: Optimizer, batch: Callable[[int], float], multiple: int = 1) -> BatchScale:
    """Batch-size scaling: `scale.batch` is the coming update's size, the loop draws so many sequences.

    `batch`: a function of the update (from 1), rounded to a `multiple` of the micro-batch, at least one. What
    it does to the noise the meter reads by itself.
    """
    return BatchScale(optimizer, batch, multiple)
