"""From measured events to exposure: every definition is a sum over the same events.

An event measured at update t stands for itself and the updates up to the next event (hold-last), over which
the learning rates were summed exactly:

- `pne`  = sum eta   Tr(P C/B P)   integral of the instantaneous temperature
- `pne2` = sum eta^2 Tr(P C/B P)   mean squared displacement by noise
- `ne`   = sum eta^2 Tr(C/B)       the same without the preconditioner
- `retained`: E <- (1 - eta lambda)^2 E + eta^2 Tr(P C/B P), what decoupled weight decay lambda has left

The definitions differ in what they hold fixed (docs/exposure.md); none is swapped silently.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass

from gradnoise.noise.estimate import Estimate

DEFINITIONS = ("pne", "pne2", "ne", "retained")
# AdamW: gradients in loss per parameter, P their inverse, so learning rate and update are in parameters.
UNITS = {
    "pne": "learning rate x squared preconditioned gradient",
    "pne2": "squared parameter",
    "ne": "squared learning rate x squared gradient",
    "retained": "squared parameter",
}


@dataclass(frozen=True)
class Event:
    """One measured update and the interval it stands for; fields as in table `noise_events`."""

    step: int
    updates: int
    learning_rate: float
    sum_lr: float
    sum_lr2: float
    log_retention: float
    contributions: int
    clip: float
    trace_pcp: float
    trace_pcp_se: float
    trace_c: float
    trace_c_se: float
    signal_pcp: float
    signal_c: float


class Integral:
    """Running sums of every definition, with variances that take events as independent."""

    def __init__(self) -> None:
        self._value = dict.fromkeys(DEFINITIONS, 0.0)
        self._variance = dict.fromkeys(DEFINITIONS, 0.0)

    def add(self, event: Event) -> None:
        """Go on by one event."""
        kept = math.exp(event.log_retention)
        self._value["retained"] *= kept
        self._variance["retained"] *= kept**2
        self._add("pne", event.sum_lr, event.trace_pcp, event.trace_pcp_se)
        self._add("pne2", event.sum_lr2, event.trace_pcp, event.trace_pcp_se)
        self._add("retained", event.sum_lr2, event.trace_pcp, event.trace_pcp_se)
        self._add("ne", event.sum_lr2, event.trace_c, event.trace_c_se)

    def _add(self, name: str, weight: float, mean: float, stderr: float) -> None:
        self._value[name] += weight * mean
        self._variance[name] += (weight * stderr) ** 2

    def estimates(self) -> dict[str, Estimate]:
        """Every definition up to here, with its standard error."""
        return {name: Estimate(self._value[name], math.sqrt(self._variance[name])) for name in DEFINITIONS}


def integrate(events: Iterable[Event]) -> dict[str, Estimate]:
    """Every definition over the events."""
    integral = Integral()
    for event in events:
        integral.add(event)
    return integral.estimates()
