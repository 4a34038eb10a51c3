"""The meter: exposure to gradient noise, measured in the step that training really took.

meter = exposure(model, optimizer, every=100)
...                                    # K calls of backward() before step() are K micro-batches
meter.last.trace, meter.last.pne2      # each an Estimate(value, stderr)
"""

import copy
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_

from gradnoise.base.errors import InputError
from gradnoise.noise.estimate import Estimate
from gradnoise.noise.estimators import diagonal, gram, trace, trace_value
from gradnoise.noise.integrals import Event, Integral
from gradnoise.noise.preconditioners import preconditioner

if TYPE_CHECKING:
    import pandas as pd

Estimator = Literal["auto", "micro"]
Preconditioner = Literal["expected", "step"]
# A gradient in half precision is a sum up to its rounding.
_ROUNDING = 0.02


@dataclass(frozen=True)
class Reading:
    """The last measured update: its trace, and the exposure integrated up to now."""

    step: int
    lr: float
    trace: Estimate
    pne: Estimate
    pne2: Estimate
    ne: Estimate
    retained: Estimate
    estimator: str = "micro"


@dataclass(frozen=True)
class TensorTrace:
    """One tensor's part of a measured update."""

    step: int
    tensor: str
    trace_pcp: float
    trace_c: float


def exposure(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    every: int = 100,
    *,
    estimator: Estimator = "auto",
    p: Preconditioner = "expected",
) -> "Exposure":
    """Attach a meter that measures one update in `every`.

    `estimator`: "micro" compares the contributions of the update's calls of `backward()`; "auto" takes it
    too, being the only one yet. A measured update needs at least two of them; one made from a single call is
    left out and counted in `skipped`. Contributions are kept for that update only (R copies of the gradient),
    and P is read after the step, so C and P come from the same batch. `p="expected"` (default) puts the
    expected square of this batch's noise into Adam's second moment; `p="step"` takes it as it is, which a
    few young coordinates then dominate in the first updates (see `preconditioner`).

    Clip with `meter.clip_grad_norm_`: a factor that it does not know would be taken for noise.

    Raises `InputError` for `every` < 1, an unknown `estimator` or `p`, parameters unknown to the model,
    parameter groups of different learning rates, an optimizer whose preconditioner is unknown, and at a
    measured step for gradients that are not the sum of its `backward()` calls (loss scaling, other clipping).
    """
    if estimator not in ("auto", "micro"):
        raise InputError("estimator", estimator, "must be auto or micro")
    return Exposure(model, optimizer, every, p)


class Exposure:
    """See `exposure`. `events` and `tensors` are the ledger so far."""

    def __init__(
        self, model: nn.Module, optimizer: torch.optim.Optimizer, every: int, p: Preconditioner = "expected"
    ) -> None:
        if every < 1:
            raise InputError("every", every, "must be at least 1 update")
        if p not in ("expected", "step"):
            raise InputError("p", p, "must be expected or step")
        self._expected = p == "expected"
        names = {parameter: name for name, parameter in model.named_parameters()}
        used = [p for group in optimizer.param_groups for p in group["params"] if p.requires_grad]
        if any(parameter not in names for parameter in used):
            raise InputError("optimizer", "a parameter the model lacks", "give the model that it trains")
        self._names = {names[parameter]: parameter for parameter in used}
        self._optimizer = optimizer
        self._every = every
        self._step = 0
        # The event that covers the updates now, without its sums; their learning rates; updates since a try.
        self._open: Event | None = None
        self._rates: list[float] = []
        self._waited = 0
        self._rows: dict[str, list[Tensor]] = {}
        self._listeners: list[Any] = []
        self._clip = 1.0
        self._closed = Integral()
        self.events: list[Event] = []
        self.tensors: list[TensorTrace] = []
        self.skipped = 0
        self.last: Reading | None = None
        self._after_step = optimizer.register_step_post_hook(self._stepped)
        self._listen()

    @property
    def due(self) -> bool:
        """Whether the next update will be measured: a loop may then split its batch."""
        return bool(self._listeners)

    def clip_grad_norm_(self, largest: float) -> Tensor:
        """Clip as `torch.nn.utils.clip_grad_norm_` does, and remember the factor on measured updates."""
        norm = clip_grad_norm_(list(self._names.values()), largest)
        if self.due:
            self._clip = min(1.0, largest / (norm.item() + 1e-6))
        return norm

    def reading(self) -> dict[str, Estimate]:
        """Exposure of all updates so far, by definition."""
        integral = copy.deepcopy(self._closed)
        for event in self._covered():
            integral.add(event)
        return integral.estimates()

    @property
    def ledger(self) -> "pd.DataFrame":
        """The events so far, one row each; needs pandas."""
        import pandas as pd

        return pd.DataFrame([asdict(event) for event in [*self.events, *self._covered()]])

    def remove(self) -> None:
        """End the open interval and detach every hook; the ledger stays."""
        self._close()
        self._after_step.remove()
        self._unlisten()

    def _close(self) -> None:
        for event in self._covered():
            self.events.append(event)
            self._closed.add(event)
        self._open, self._rates = None, []

    def _covered(self) -> list[Event]:
        """The open event with the learning rates of the updates that it covers up to now."""
        if self._open is None:
            return []
        rates, decay = self._rates, self._decay()
        return [
            replace(
                self._open,
                updates=len(rates),
                sum_lr=math.fsum(rates),
                sum_lr2=math.fsum(rate * rate for rate in rates),
                log_retention=math.fsum(2 * math.log1p(-rate * decay) for rate in rates),
            )
        ]

    def _listen(self) -> None:
        self._rows = {name: [] for name in self._names}
        self._clip = 1.0

        def listener(name: str, parameter: Tensor) -> Callable[[Tensor], None]:
            rows = self._rows[name]

            # A leaf's hook sees what one backward() adds, before it is added.
            def record(gradient: Tensor) -> None:
                if parameter.grad is None:
                    rows.clear()  # whatever came before was thrown away by zero_grad()
                # A copy, because accumulation may adopt the tensor as .grad and then add to it in place.
                rows.append(gradient.detach().clone().flatten())

            return record

        self._listeners = [p.register_hook(listener(name, p)) for name, p in self._names.items()]

    def _unlisten(self) -> None:
        for handle in self._listeners:
            handle.remove()
        self._listeners = []

    def _stepped(self, optimizer: torch.optim.Optimizer, *_: object) -> None:
        # Runs after every update, so it does next to nothing where nothing is measured.
        self._step += 1
        rate = self._rate()
        measured = self.due and self._measure(rate)
        self._rates.append(rate)
        self._waited += 1
        if self._waited >= self._every:
            self._listen()
        if measured and self._open is not None:
            total = self.reading()
            self.last = Reading(
                step=self._step,
                lr=rate,
                trace=Estimate(self._open.trace_pcp, self._open.trace_pcp_se),
                pne=total["pne"],
                pne2=total["pne2"],
                ne=total["ne"],
                retained=total["retained"],
            )

    def _rate(self) -> float:
        """Learning rate of the step, the same in every group."""
        groups = self._optimizer.param_groups
        rate = groups[0]["lr"]
        if len(groups) > 1 and any(group["lr"] != rate for group in groups):
            raise InputError("optimizer", "groups of different lr", "give all parameter groups one lr")
        return float(rate)

    def _decay(self) -> float:
        """Decoupled weight decay, the same in every group."""
        groups = self._optimizer.param_groups
        found = {g["weight_decay"] if g.get("decoupled_weight_decay") else 0.0 for g in groups}
        if len(found) > 1:
            raise InputError(
                "optimizer", "groups of different weight_decay", "give all parameter groups one weight_decay"
            )
        return float(found.pop())

    def _check_sum(self, name: str, total: Tensor, gradient: Tensor | None) -> None:
        """What the optimizer used must be the sum of the contributions, times the known clip factor."""
        used = torch.zeros_like(total) if gradient is None else gradient.detach().flatten()
        if (used - self._clip * total).norm() > _ROUNDING * used.norm():
            raise InputError(
                f"gradient of {name}",
                "is not the sum of this step's backward() calls",
                "clip with meter.clip_grad_norm_ and scale no loss while measuring",
            )

    def _measure(self, rate: float) -> bool:
        """Turn this update's contributions into an event that opens an interval; False if there is none."""
        self._unlisten()
        self._waited = 0
        counts = {len(rows) for rows in self._rows.values()} - {0}
        if counts in (set(), {1}):
            self.skipped += 1
            return False
        if len(counts) != 1:
            raise InputError(
                "backward",
                f"{sorted(counts)} contributions",
                "every backward() must reach the same parameters",
            )
        size = counts.pop()
        plain, weighted = torch.zeros(2, size, size, dtype=torch.float64).unbind()
        for name, rows in self._rows.items():
            if not rows:
                continue
            contributions = torch.stack(rows)
            parameter = self._names[name]
            self._check_sum(name, contributions.sum(0), parameter.grad)
            variance = self._clip**2 * diagonal(contributions).view_as(parameter) if self._expected else None
            p = preconditioner(self._optimizer, parameter, variance)
            parts = gram(contributions * p.flatten()).cpu(), gram(contributions).cpu()
            weighted += parts[0]
            plain += parts[1]
            self.tensors.append(TensorTrace(self._step, name, *map(trace_value, parts)))
        self._close()
        pcp, c = trace(weighted), trace(plain)
        self._open = Event(
            step=self._step,
            updates=0,
            learning_rate=rate,
            sum_lr=0.0,
            sum_lr2=0.0,
            log_retention=0.0,
            contributions=size,
            clip=self._clip,
            trace_pcp=pcp.value,
            trace_pcp_se=pcp.stderr,
            trace_c=c.value,
            trace_c_se=c.stderr,
            signal_pcp=weighted.sum().item(),
            signal_c=plain.sum().item(),
        )
        self._rows = {}
        return True
