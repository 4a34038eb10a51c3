r"""Phases: a fixed amount of exposure, put into one part of a run.

budget = PhaseBudget(extra=0.02, updates=1000, phase="late")
part = budget.attach(meter, inject(optimizer, gaussian(meter.std()), power=0))   # by injected noise, or
size = budget.batches(meter, baseline, base=64, multiple=8)    # by the batch, size(step) at an update, or
warm = budget.temperatures(meter, baseline)                    # by reweight(n, temperature=warm(step), ...)
...
part.report().ratio

`extra` is `pne2` on top of the run's own. With a baseline (a `Trajectory` of the same training without the
phase) what counts as spent is the run's exposure so far less the baseline's, so that arms have the total of
the whole run in common; injection without a baseline counts what was injected. After each measured update
what is left is spread anew over the updates left in the window, at one trace (so in proportion to eta^2).

An adaptive optimizer remembers a phase whose noise it saw (all but noise injected "post" or "frozen_v"): v
stays large after it, so P is small and the run's own noise counts less than the baseline's, for about 1 / (1
- beta2) updates. Early in a run that takes away more exposure than the phase added. `hold` keeps the exposure
at the baseline's after the window, and the total comes out; but the small batch that it takes feeds v in
turn, so where noise makes most of v the batch goes back slowly, or not within the run. Without it the batch
goes back at once, and the report tells what is missing.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, get_args

from gradnoise.base.errors import InputError
from gradnoise.noise.estimate import UNKNOWN, Estimate, ratio
from gradnoise.noise.exposure import Exposure
from gradnoise.noise.injection.inject import Injection
from gradnoise.noise.integrals import Event
from gradnoise.noise.matching.follow import Rate, check, growth, since
from gradnoise.noise.matching.trajectory import Trajectory, held

Phase = Literal["early", "middle", "late", "uniform"]
_THIRDS = {"early": (0, 1), "middle": (1, 2), "late": (2, 3), "uniform": (0, 3)}

# Feedback on temperature and batch: share of a gap that is answered at once, and by what share of the wanted
# exposure an interval may make good for earlier ones.
GAIN = 0.5
SLACK = 0.25


@dataclass(frozen=True)
class Spent:
    """How a phase's budget was spent up to now.

    `spent`: `pne2` on top of the run's own; `wanted`: all of the budget. `ratio`: with a baseline, the run's
    exposure over the baseline's plus `wanted`, with both errors; else `spent` over `wanted`. `window`: the
    same of intervals that begin in the window. `at_most`: share of the window's updates at the largest power
    or temperature, or the smallest batch.
    """

    spent: Estimate
    wanted: float
    ratio: Estimate
    window: Estimate
    at_most: float


@dataclass(frozen=True)
class PhaseBudget:
    """`extra` `pne2` for the phase of a run of `updates` updates.

    `phase`: "early", "middle" or "late" (thirds), "uniform" (all), or first and last update. Raises
    `InputError` for an amount that is not above 0 and a window that is not within the run.
    """

    extra: float
    updates: int
    phase: Phase | tuple[int, int] = "uniform"

    def __post_init__(self) -> None:
        if not 0 < self.extra < math.inf:
            raise InputError("extra", self.extra, "must be above 0 and finite")
        if isinstance(self.phase, str) and self.phase not in get_args(Phase):
            raise InputError("phase", self.phase, "must be early, middle, late, uniform or (first, last)")
        first, last = self.window
        if not 1 <= first <= last <= self.updates:
            raise InputError("phase", (first, last), f"must be within updates 1 to {self.updates}")

    @property
    def window(self) -> tuple[int, int]:
        """First and last update of the phase; adjacent thirds share none."""
        if not isinstance(self.phase, str):
            return self.phase
        first, last = _THIRDS[self.phase]
        return round(first * self.updates / 3) + 1, round(last * self.updates / 3)

    def due(self, every: int) -> Callable[[int], bool]:
        """Which updates to measure: one in `every`, and those at which the phase begins and has ended."""
        first, last = self.window
        return lambda step: (step - 1) % every == 0 or step in (first, last + 1)

    def attach(
        self,
        meter: Exposure,
        noise: Injection,
        *,
        most: float = 100.0,
        rate: Rate | None = None,
        baseline: Trajectory | None = None,
        offset: int = 0,
    ) -> "PhaseNoise":
        """Spend the budget by setting the noise's power, at most `most`.

        `rate`: the learning rate as a function of the update; without it, it is taken to go like the
        baseline's, or to be constant. `offset`: updates of the run before the meter's first. Raises
        `InputError` as `follow` does.
        """
        return PhaseNoise(self, meter, noise, most, rate, baseline, offset)

    def temperatures(
        self,
        meter: Exposure,
        baseline: Trajectory,
        *,
        most: float = 16.0,
        hold: bool = True,
        offset: int = 0,
    ) -> "PhaseFactor":
        """Spend the budget through a temperature of `reweight`, at most `most`; 1 before the phase.

        `hold`: whether the run's exposure is kept at the baseline's after the phase; else the temperature is
        1 there (see the module). The learning rate must go like the baseline's, and the meter measure the
        updates at which the phase begins and has ended (`due`), because the temperature is one from each
        measured update to the next. Raises `InputError` where it does not.
        """
        return PhaseFactor(self, meter, baseline, most, hold, offset)

    def batches(
        self,
        meter: Exposure,
        baseline: Trajectory,
        base: int,
        *,
        multiple: int = 1,
        least: int | None = None,
        hold: bool = True,
        offset: int = 0,
    ) -> "PhaseBatch":
        """Spend the budget through the batch, which is `base`, as in the baseline, before the phase.

        Batches are multiples of `multiple`, at least `least` (default `multiple`). As `temperatures` else.
        """
        return PhaseBatch(self, meter, baseline, base, multiple, least or multiple, hold, offset)


class _Part(ABC):
    """What all ways of spending share: counting what was spent."""

    def __init__(
        self, budget: PhaseBudget, meter: Exposure, baseline: Trajectory | None, most: float, offset: int
    ) -> None:
        if not 0 < most < math.inf:
            raise InputError("most", most, "must be above 0 and finite")
        self.budget, self._meter, self._baseline = budget, meter, baseline
        self._most, self._offset = most, offset
        # First update that counts, and last one of intervals that were counted; over these, exposure, its
        # variance, and what was injected; and the same over those of them that begin in the window.
        self._first, self._until = 0, 0
        self._sums, self._within = [0.0] * 3, [0.0] * 3
        self._at_most = 0
        meter.after.append(self._decide)

    def remove(self) -> None:
        """Change nothing from now on."""
        self._count()
        if self._decide in self._meter.after:
            self._meter.after.remove(self._decide)

    @abstractmethod
    def _decide(self) -> None:
        """After a measured update: what holds up to the next one."""

    def _begin(self) -> tuple[Event, int]:
        """Count up to the update just measured; return its event so far and its number in the run."""
        interval = self._meter.interval
        assert interval is not None
        step = interval[0].step + self._offset
        if not self._first:
            self._first, self._until = step, step - 1
        self._count()
        return interval[0], step

    def _count(self) -> None:
        """Count the intervals that ended since the last time."""
        if self._first:
            for event in since(self._meter.events, self._until - self._offset):
                self._sums, self._within, self._until = self._with(event)

    def _with(self, event: Event) -> tuple[list[float], list[float], int]:
        """The sums with one more interval, and its last update."""
        exposure, step = held(event).exposure, event.step + self._offset
        added = exposure.value, exposure.stderr**2, event.injected_pne2
        first, last = self.budget.window
        inside = float(first <= step <= last)
        sums = [total + x for total, x in zip(self._sums, added, strict=True)]
        within = [total + inside * x for total, x in zip(self._within, added, strict=True)]
        return sums, within, step + event.updates - 1

    def _spent(self, sums: list[float], last: int) -> float:
        """Of the budget, by sums up to an update."""
        if self._baseline is None:
            return sums[2]
        return sums[0] - self._baseline.exposure(self._first, last).value

    def report(self) -> Spent:
        """How the budget was spent up to now."""
        self._count()
        sums, within, last, interval = self._sums, self._within, self._until, self._meter.interval
        if not self._first:
            return Spent(Estimate(0.0, 0.0), self.budget.extra, UNKNOWN, UNKNOWN, 0.0)
        if interval is not None and interval[0].step + self._offset > self._until:
            sums, within, last = self._with(interval[0])
        first, final = self.budget.window
        share, extra = self._at_most / (final - first + 1), self.budget.extra
        if self._baseline is None:
            spent = Estimate(sums[2], 0.0)
            inside = Estimate(within[2] / extra, 0.0)
            return Spent(spent, extra, spent.scaled(1 / extra), inside, share)
        there = self._baseline.exposure(self._first, last)
        spent = Estimate(sums[0] - there.value, math.sqrt(sums[1] + there.stderr**2))
        inside = self._over(within, self._baseline.exposure(first, min(final, last)))
        return Spent(spent, extra, self._over(sums, there), inside, share)

    def _over(self, sums: list[float], there: Estimate) -> Estimate:
        """Exposure had over the baseline's and the budget."""
        wanted = Estimate(there.value + self.budget.extra, there.stderr)
        return ratio(Estimate(sums[0], math.sqrt(sums[1])), wanted)

    def state_dict(self) -> dict[str, Any]:
        """All that a resumed run needs beside the states of noise and meter: plain data."""
        return {
            "first": self._first,
            "until": self._until,
            "sums": list(self._sums),
            "within": list(self._within),
            "at_most": self._at_most,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over what `state_dict` of the same budget gave."""
        self._first, self._until = state["first"], state["until"]
        self._sums, self._within = list(state["sums"]), list(state["within"])
        self._at_most = state["at_most"]


class PhaseNoise(_Part):
    """See `PhaseBudget.attach`."""

    def __init__(
        self,
        budget: PhaseBudget,
        meter: Exposure,
        noise: Injection,
        most: float,
        rate: Rate | None,
        baseline: Trajectory | None,
        offset: int,
    ) -> None:
        check(meter, noise)
        super().__init__(budget, meter, baseline, most, offset)
        self._noise, self._rate = noise, rate
        # Power within the window, and updates of the run before the noise's first.
        self._level, self._shift = 0.0, 0
        noise.power = self._power

    def _power(self, update: int) -> float:
        first, last = self.budget.window
        return self._level if first <= update + self._shift <= last else 0.0

    def _decide(self) -> None:
        event, step = self._begin()
        first, last = self.budget.window
        first, self._shift = max(first, step + 1), step - self._noise.step
        if first > last:
            return
        left = self.budget.extra - self._spent(self._with(event)[0], step)
        unit = self._unit() * self._weight(event, step, first, last)
        self._level = min(max(left, 0.0) / unit, self._most) if unit > 0 else 0.0
        if left >= self._most * unit:
            ahead = min(last, step + self._meter.stride)
            self._at_most += max(0, ahead - first + 1)

    def _unit(self) -> float:
        """`pne2` of one update at unit power and the present learning rates."""
        noise = self._noise
        channels = {noise.channel(place): place for place in noise.places}
        return math.fsum(x for ch in channels for x in self._meter.account.unit_pne2(noise, ch).values())

    def _weight(self, event: Event, step: int, first: int, last: int) -> float:
        """Sum of eta^2 over updates, over that of the update just made."""
        if self._rate is not None or self._baseline is None:
            return growth(self._rate, step, first, last)
        return self._baseline.curve().sum_lr2(first, last) / event.sum_lr2 if event.sum_lr2 > 0 else 0.0

    def remove(self) -> None:
        """Detach; the noise injects nothing until its power is set."""
        super().remove()
        self._noise.power = 0.0

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "level": self._level, "shift": self._shift}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self._level, self._shift = state["level"], state["shift"]


class PhaseFactor(_Part):
    r"""See `PhaseBudget.temperatures`: called with an update's number, from 1, it gives its temperature.

    tau, the temperature (or baseline batch over batch), is one from each measured update to the next. With
    the trace T measured at the last one, r the baseline's trace, and in the window b the budget's:

    .. math:: \tau' = \tau f \Big( \frac{(r + b')(1 + \operatorname{clip}(x, \pm s))}{f T} \Big)^g, \quad
              f = \frac{r + b'}{r + b}, \quad x = \frac{g D}{w (r + b')},

    primes for the next interval, D the exposure wanted so far less what was had, w the sum of eta^2 over that
    interval. f answers the window's edges at once, the rest is feedback. It needs no law of the trace against
    tau: they are proportional under SGD, and under Adam at first, but hardly related any more once v has
    caught up. Any elasticity up to 1 converges; with too little of it tau ends at its bound.
    """

    def __init__(
        self, budget: PhaseBudget, meter: Exposure, baseline: Trajectory, most: float, hold: bool, offset: int
    ) -> None:
        for step in (budget.window[0], budget.window[1] + 1):
            if offset < step <= budget.updates and not meter.measures(step - offset):
                mend = "must be measured: exposure(..., every=budget.due(100))"
                raise InputError("meter", f"passes over update {step}", mend)
        super().__init__(budget, meter, baseline, most, offset)
        self._there, self._hold = baseline, hold
        # tau up to the next measured update, which is `_switch`, and from it on.
        self._now, self._switch = 1.0, offset + 1
        self._next = min(self._edge(offset, offset + 1), most)

    def __call__(self, step: int) -> float:
        """The temperature of an update."""
        return self._applied(self._factor(step))

    def _factor(self, step: int) -> float:
        first, last = self.budget.window
        acts = step >= first and (self._hold or step <= last)
        return (self._next if step >= self._switch else self._now) if acts else 1.0

    def _applied(self, factor: float) -> float:
        """What comes of a wanted factor."""
        return factor

    def _budget(self, step: int) -> float:
        """The budget's trace at an update, b."""
        first, last = self.budget.window
        return self.budget.extra / self._there.curve().sum_lr2(first, last) if first <= step <= last else 0.0

    def _edge(self, step: int, later: int) -> float:
        """f, from one update to a later one."""
        there = self._there.at(step).value
        return (there + self._budget(later)) / (there + self._budget(step)) if there > 0 else 1.0

    def _wanted(self, first: int, last: int) -> float:
        """Exposure wanted of updates: the baseline's and the budget's."""
        (begin, end), curve = self.budget.window, self._there.curve()
        inside = curve.sum_lr2(max(first, begin), min(last, end))
        return curve.exposure(first, last).value + inside * self._budget(begin)

    def _decide(self) -> None:
        event, step = self._begin()
        used, stride = self._applied(self._factor(step)), self._meter.stride
        self._now, self._switch = self._factor(step), step + stride
        curve, until = self._there.curve(), step + stride - 1
        # What the interval under way will have is known: its trace is held.
        had = self._with(event)[0][0] + event.trace_pcp * curve.sum_lr2(step + 1, until)
        short = self._wanted(self._first, until) - had
        weight = curve.sum_lr2(self._switch, until + stride)
        wanted = self._wanted(self._switch, until + stride)
        if not (weight > 0 and wanted > 0 and event.trace_pcp > 0):
            return
        edge = self._edge(step, self._switch)
        aim = wanted / weight * (1 + min(max(GAIN * short / wanted, -SLACK), SLACK))
        self._next = min(max(used * edge * (aim / (edge * event.trace_pcp)) ** GAIN, 1.0), self._most)
        first, last = self.budget.window
        if self._next == self._most and first <= self._switch <= last:
            self._at_most += min(stride, last - self._switch + 1)

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "factors": [self._now, self._next], "switch": self._switch}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        (self._now, self._next), self._switch = state["factors"], state["switch"]


class PhaseBatch(PhaseFactor):
    """See `PhaseBudget.batches`: called with an update's number, from 1, it gives its batch."""

    def __init__(
        self,
        budget: PhaseBudget,
        meter: Exposure,
        baseline: Trajectory,
        base: int,
        multiple: int,
        least: int,
        hold: bool,
        offset: int,
    ) -> None:
        if multiple < 1 or base % multiple or least % multiple or not multiple <= least <= base:
            raise InputError("multiple", multiple, f"base={base} and least={least} must be multiples of it")
        self._base, self._multiple = base, multiple
        super().__init__(budget, meter, baseline, base / least, hold, offset)

    def __call__(self, step: int) -> int:
        """The batch of an update."""
        return round(self._base / self._applied(self._factor(step)))

    def _applied(self, factor: float) -> float:
        size = self._multiple * max(1, round(self._base / factor / self._multiple))
        return self._base / size
