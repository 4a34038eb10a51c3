"""From measured events to exposure: every definition is a sum over the same events.

An event measured at update t stands for itself and the updates up to the next event (hold-last), over which
the learning rates were summed exactly. eta is the effective learning rate, all that one gradient ever adds
(SGD with momentum mu: lr/(1 - mu); Adafactor: its own per tensor; Adam, AdamW, RMSprop: lr).

- `pne`  = sum eta   Tr(P C/B P)   integral of the instantaneous temperature
- `pne2` = sum eta^2 Tr(P C/B P)   mean squared displacement by noise
- `ne`   = sum eta^2 Tr(C/B)       the same without the preconditioner
- `retained`: E <- (1 - lr lambda)^2 E + eta^2 Tr(P C/B P), what decoupled weight decay lambda has left
- `pne_effective`, `pne2_effective`: with the noise that the update really carried, after clipping
- `pne2_injected`: what `inject` and NAP added of `pne2`; every definition but `pne_star` contains it
- `pne_star` = sum eta Tr(P C/B P) / Tr(P F P), referred to curvature; nan if no curvature was measured, or if
  it was not positive

The definitions differ in what they hold fixed (docs/exposure.md); none is swapped silently.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass

from gradnoise.noise.estimate import UNKNOWN, Estimate, ratio

# AdamW: gradients in loss per parameter, P their inverse, so learning rate and update are in parameters.
UNITS = {
    "pne": "learning rate x squared preconditioned gradient",
    "pne2": "squared parameter",
    "ne": "squared learning rate x squared gradient",
    "retained": "squared parameter",
    "pne_effective": "learning rate x squared preconditioned gradient",
    "pne2_effective": "squared parameter",
    "pne_star": "learning rate",
    "pne2_injected": "squared parameter",
}
DEFINITIONS = tuple(UNITS)
# Those that parts of a model have.
PART_DEFINITIONS = ("pne", "pne2", "ne", "retained")


@dataclass(frozen=True)
class Trace:
    """A measured trace and the interval it stands for.

    `sum_lr`, `sum_lr2`: sums over the `updates` covered of eta and eta^2, `sum_lr2_c` of eta^2 for `trace_c`.
    Where eta differs between the tensors behind the trace, it is their mean weighted by their traces, so that
    sum times trace is exact. `log_retention`: log of the factor by which weight decay shrinks earlier
    exposure. `injected_pne`, `injected_pne2`, `injected_ne`: what injections of covariance N added over these
    updates: sums of eta Tr(P N P), eta^2 Tr(P N P) and eta^2 Tr(N).
    """

    step: int
    updates: int
    sum_lr: float
    sum_lr2: float
    sum_lr2_c: float
    log_retention: float
    trace_pcp: float
    trace_pcp_se: float
    trace_c: float
    trace_c_se: float
    injected_pne: float
    injected_pne2: float
    injected_ne: float


@dataclass(frozen=True)
class Part(Trace):
    """What one layer, class or tensor (`kind`) has of a measured update; fields as in `noise_parts`."""

    kind: str
    part: str


@dataclass(frozen=True)
class Event(Trace):
    """One measured update; fields as in table `noise_events`. What was not measured is nan.

    `signal_pcp` and `signal_c` are the squared norms of P g and g of the batch (biased up by the trace);
    `covariance_pcp` and `covariance_c` the covariances between trace and unbiased signal, `signal_pcp_se` and
    `signal_c_se` the errors of the latter. `curvature` is Tr(P F_token P), measured at update
    `curvature_step`.
    """

    learning_rate: float
    contributions: int
    batch: int
    tokens: int
    clip: float
    clip_rate: float
    trace_effective: float
    trace_effective_se: float
    trace_p: float
    signal_pcp: float
    signal_pcp_se: float
    covariance_pcp: float
    signal_c: float
    signal_c_se: float
    covariance_c: float
    effective_rank: float
    effective_rank_se: float
    top_share: float
    curvature: float
    curvature_se: float
    curvature_step: int
    hill: float
    hill_se: float
    hill_gaussian: float
    hill_raw: float
    norm_hill: float
    norm_hill_gaussian: float
    gradient_norm: float
    second_moment: float
    loss: float
    # 1 - B/N of batches drawn without replacement, which is in every variance; else 1.
    population_factor: float = 1.0

    @property
    def signal(self) -> tuple[Estimate, Estimate]:
        """Unbiased squared norms of the mean preconditioned and of the mean plain gradient."""
        return (
            Estimate(self.signal_pcp - self.trace_pcp, self.signal_pcp_se),
            Estimate(self.signal_c - self.trace_c, self.signal_c_se),
        )

    @property
    def temperature(self) -> Estimate:
        """eta Tr(P (C/B + N) P) / (2 Tr P): Gibbs temperature of the update, in units of the loss."""
        eta = self.sum_lr / self.updates if self.updates else self.learning_rate
        injected = self.injected_pne / self.sum_lr if self.sum_lr > 0 else 0.0
        scale = eta / (2 * self.trace_p) if self.trace_p > 0 else math.nan
        return Estimate(self.trace_pcp + injected, self.trace_pcp_se).scaled(scale)


class Integral:
    """Running sums of every definition, with variances that take events as independent.

    The error of a curvature that several events share counts once for all of them.
    """

    def __init__(self) -> None:
        self._value = dict.fromkeys(DEFINITIONS, 0.0)
        self._variance = dict.fromkeys(DEFINITIONS, 0.0)
        self._shared, self._shared_step = 0.0, 0

    def add(self, trace: Trace) -> None:
        """Go on by one event or part."""
        kept = math.exp(trace.log_retention)
        self._value["retained"] *= kept
        self._variance["retained"] *= kept**2
        pcp = Estimate(trace.trace_pcp, trace.trace_pcp_se)
        one, two = trace.injected_pne, trace.injected_pne2
        self._add("pne", trace.sum_lr, pcp, one)
        self._add("pne2", trace.sum_lr2, pcp, two)
        self._add("retained", trace.sum_lr2, pcp, two)
        self._add("ne", trace.sum_lr2_c, Estimate(trace.trace_c, trace.trace_c_se), trace.injected_ne)
        self._value["pne2_injected"] += two
        if isinstance(trace, Event):
            effective = Estimate(trace.trace_effective, trace.trace_effective_se)
            self._add("pne_effective", trace.sum_lr, effective, one)
            self._add("pne2_effective", trace.sum_lr2, effective, two)
            self._add_star(trace, pcp)

    def _add(self, name: str, weight: float, mean: Estimate, injected: float = 0.0) -> None:
        self._value[name] += weight * mean.value + injected
        self._variance[name] += (weight * mean.stderr) ** 2

    def _add_star(self, event: Event, pcp: Estimate) -> None:
        exact = Estimate(event.curvature, 0.0)
        self._add("pne_star", event.sum_lr, ratio(pcp, exact))
        if event.curvature_step != self._shared_step:
            self._variance["pne_star"] += self._shared**2
            self._shared, self._shared_step = 0.0, event.curvature_step
        share = event.curvature_se / event.curvature if event.curvature > 0 else math.nan
        self._shared += event.sum_lr * ratio(pcp, exact).value * share

    def estimates(self) -> dict[str, Estimate]:
        """Every definition up to here, with its standard error."""
        variances = self._variance | {"pne_star": self._variance["pne_star"] + self._shared**2}
        return {name: Estimate(self._value[name], math.sqrt(variances[name])) for name in DEFINITIONS}


def integrate(traces: Iterable[Trace]) -> dict[str, Estimate]:
    """Every definition over events, or over the parts of one kind and name."""
    integral = Integral()
    for trace in traces:
        integral.add(trace)
    return integral.estimates()


def noise_scale(events: Iterable[Event], half_life: float | None = None) -> tuple[Estimate, Estimate]:
    r"""Gradient noise scales: preconditioned, Tr(PCP) / |P g|^2, and plain, Tr(C) / |g|^2, in sequences.

    C = B times the update noise (without replacement: over 1 - B/N); numerator and unbiased denominator are
    averaged over the events first, apart, and divided last (a mean of ratios has no mean). With `half_life`
    (in events) newer ones weigh more, else all weigh the same. nan where the mean denominator is not
    positive: noise that drowns the signal has no scale yet. No critical batch size under Adam (arXiv
    2505.23971).
    """
    listed = list(events)
    if not listed or not all(event.population_factor > 0 for event in listed):
        return UNKNOWN, UNKNOWN
    decay = 1.0 if half_life is None else 0.5 ** (1 / half_life)
    weights = [decay ** (len(listed) - 1 - n) for n in range(len(listed))]
    total = math.fsum(weights)
    weights = [weight / total for weight in weights]

    sizes = [event.batch / event.population_factor for event in listed]

    def over(signal: int, trace: str, covariance: str) -> Estimate:
        rows = list(zip(weights, sizes, listed, strict=True))
        top = Estimate(
            math.fsum(w * b * getattr(e, trace) for w, b, e in rows),
            math.sqrt(math.fsum((w * b * getattr(e, f"{trace}_se")) ** 2 for w, b, e in rows)),
        )
        bottom = Estimate(
            math.fsum(w * e.signal[signal].value for w, _, e in rows),
            math.sqrt(math.fsum((w * e.signal[signal].stderr) ** 2 for w, _, e in rows)),
        )
        return ratio(top, bottom, math.fsum(w * w * b * getattr(e, covariance) for w, b, e in rows))

    return over(0, "trace_pcp", "covariance_pcp"), over(1, "trace_c", "covariance_c")


def averages(events: Iterable[Event]) -> dict[str, tuple[Estimate, str]]:
    """What is not summed but averaged over a run's events, with units; unknown (nan) where no event has it.

    `gns`, `gns_preconditioned`: noise scales of all events. `t_eff`: mean over updates. `effective_ratio`:
    effective over potential `pne2`. `effective_rank`, `top_share`: means over events. `clip_rate`:
    share of the measured updates that were clipped, each standing for its interval.
    """
    listed = list(events)
    preconditioned, plain = noise_scale(listed)
    sums = integrate(listed)
    potential = sums["pne2"].value
    updates = [float(event.updates) for event in listed]
    return {
        "gns": (plain, "sequences"),
        "gns_preconditioned": (preconditioned, "sequences"),
        "t_eff": (_average([event.temperature for event in listed], updates), "loss"),
        "effective_ratio": (
            sums["pne2_effective"].scaled(1 / potential) if potential > 0 else UNKNOWN,
            "",
        ),
        "effective_rank": (
            _average([Estimate(e.effective_rank, e.effective_rank_se) for e in listed], [1.0] * len(listed)),
            "",
        ),
        "top_share": (_average([Estimate(e.top_share, 0.0) for e in listed], [1.0] * len(listed)), ""),
        "clip_rate": (_average([Estimate(float(e.clip < 1), 0.0) for e in listed], updates), ""),
    }


def _average(values: list[Estimate], weights: list[float]) -> Estimate:
    """Weighted mean of those that are known, errors taken as independent."""
    known = [(v, w) for v, w in zip(values, weights, strict=True) if not math.isnan(v.value)]
    total = math.fsum(w for _, w in known)
    if not total > 0:
        return UNKNOWN
    mean = math.fsum(w * v.value for v, w in known) / total
    return Estimate(mean, math.sqrt(math.fsum((w * v.stderr) ** 2 for v, w in known)) / total)
