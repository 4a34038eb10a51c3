r"""Matching: noise injected so that a run follows the recorded exposure of another.

matcher = follow(meter, inject(optimizer, gaussian(meter.std()), power=0), Trajectory.of(reference_meter))
...
matcher.report().ratio, matcher.report().reading

After each measured update the power c is set for the updates up to the next one. In traces, with w the sum of
eta^2 over these updates, g the gain and s the slack:

.. math:: L \leftarrow L + g (r - o - L), \quad
          a = L + \operatorname{clip}(g D / w, \pm s r), \quad c = \operatorname{clip}(a, 0, b u) / u,

r the reference's exposure over these updates / w, o the trace that the run has without this noise, D the
exposure that the reference had so far and the run had not, u the trace of the noise at unit power, b the
largest power. Why so:

- What is injected is linear in the power and the meter knows the slope u, so c is solved for: where P does
  not answer to the noise ("post", "frozen_v", SGD), one step lands on the reference.
- Traces of one update are wrong by 7 to 25 %. Answered in full, these errors would become bursts of noise, so
  the gap r - o is averaged. What averaging lags behind, and the bias of a power that cannot be negative, come
  back through D. So the run's measured exposure is the reference's to about an interval's error; the true one
  has the errors of both measurements, which `Match.ratio` tells.
- D is answered within s of r. What was missed early is not made good by a burst late: when noise acts may be
  what a study asks.
- Noise before an adaptive preconditioner ("pre") ends up in v: once v has caught up, P^2 c N is below 1 in
  every coordinate, and more power lowers the signal alone (docs/injection.md). So the injected trace is
  bounded by `REACH` a coordinate. A power at that bound makes v grow until it is about ten times what it was
  and stops there, instead of growing without end.

Traces are those of `pne2`, before clipping. Both runs should be measured alike (estimator, p, contributions).
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import astuple, dataclass, field, replace
from typing import Any, Literal, TypeVar, get_args

from torch.optim import SGD

from gradnoise.base.errors import InputError
from gradnoise.noise.estimate import UNKNOWN, Estimate, ratio
from gradnoise.noise.exposure import Exposure, meters_of
from gradnoise.noise.injection.followed import FollowedFactors
from gradnoise.noise.injection.inject import Injection, injections_of
from gradnoise.noise.integrals import Event, Part, Trace
from gradnoise.noise.matching.trajectory import WHOLE, Held, Trajectory, held
from gradnoise.noise.spectrum import noise_reduced

By = Literal["total", "layer", "spectrum"]
Reading = Literal["matched", "saturated", "exceeded", "undecided"]
Rate = Callable[[int], float]
Row = TypeVar("Row", bound=Trace)

# Injected trace a coordinate beyond which noise before an adaptive preconditioner gets no more power.
REACH = 0.9
LEVEL = 0.9


@dataclass(frozen=True)
class Match:
    """How well a run followed its reference since the first measured update of the matcher.

    `achieved`, `wanted`: `pne2`; `ratio`: achieved over wanted, its error from both measurements, taken as
    independent; `thirds`: the same over each third of the updates. `at_most`, `at_floor`: shares of the
    updates for which the power was at its upper bound, and 0. `shares`: of the largest directions (wanted,
    held), means over updates (spectrum only). `reading`, with tolerance t:

    - "matched": the 90 % interval of `ratio` is within 1 -+ t (two one-sided tests at 5 %);
    - "saturated": it is below 1 - t: the reference is out of reach (see `at_most`);
    - "exceeded": it is above 1 + t: the run's own noise is more, and none can be taken away;
    - "undecided": it holds 1 - t or 1 + t: measure more updates.
    """

    ratio: Estimate
    achieved: Estimate
    wanted: Estimate
    thirds: tuple[Estimate, ...]
    at_most: float
    at_floor: float
    reading: Reading
    by_layer: Mapping[str, "Match"] = field(default_factory=dict)
    shares: tuple[tuple[float, float], ...] = ()

    @property
    def saturated(self) -> bool:
        """Whether the reference was out of reach."""
        return self.reading == "saturated"


@dataclass(frozen=True)
class Feedback:
    """Numbers of the feedback; see `follow`. Raises `InputError` for one out of range."""

    gain: float = 0.5
    most: float = 100.0
    slack: float = 0.1
    tolerance: float = 0.05

    def __post_init__(self) -> None:
        for name, fine, mend in (
            ("gain", 0 < self.gain <= 1, "must be above 0 and at most 1"),
            ("most", 0 < self.most < math.inf, "must be above 0 and finite"),
            ("slack", 0 <= self.slack < 1, "must be 0 or more and below 1"),
            ("tolerance", 0 < self.tolerance < 1, "must be above 0 and below 1"),
        ):
            if not fine:
                raise InputError(name, getattr(self, name), mend)


def follow(
    meter: Exposure,
    noise: Injection,
    reference: Trajectory,
    by: By = "total",
    *,
    rate: Rate | None = None,
    factors: FollowedFactors | None = None,
    offset: int = 0,
    **feedback: float,
) -> "Matcher":
    """Set the power of `noise` after each measured update so that exposure follows the reference's.

    `by` "total": one power, from the trace of the model. "layer": a gain for each of the noise's layers.
    "spectrum": the total, and of it the shares of the largest directions; the noise is then
    `low_rank(factors)` with `factors=meter.factors(rank=k)`, k up to 8 and at most R - 2 of R contributions.
    Noise only adds, so a direction of which the run has more than the reference keeps what it has.

    `rate`: the learning rate as a function of the update, if it does not go like the reference's (the same
    at every update, or a constant times it). `offset`: updates of the run before the meter's first, where a
    resumed run has a new meter. Feedback, by keyword: `gain` in (0, 1] (default 0.5), the share of a gap that
    is answered at once; `most` (100), the largest power, in units of the noise's variance; `slack` (0.1), by
    what share of the wanted exposure an interval may make good for earlier ones; `tolerance` (0.05) of
    `Match.reading`.

    Nothing is injected until the first measured update. What cannot be reached is reported
    (`Matcher.report`).

    Raises `InputError` for numbers out of range, noise of another optimizer, or whose power is a function or
    not its own (NAP, Langevin noise), and a reference without the layers or shares that are asked for.
    """
    if by not in get_args(By):
        raise InputError("by", by, "must be total, layer or spectrum")
    if (by == "spectrum") != (factors is not None):
        raise InputError("factors", by, "by='spectrum', and only it, needs factors=meter.factors(rank=k)")
    return Matcher(meter, noise, reference, by, Feedback(**feedback), rate, factors, offset)


@dataclass
class _Course:
    """What the matcher knows of the model or a layer.

    `rows`: closed intervals; `short`: exposure that the reference had over them and the run had not; `level`:
    mean gap of traces; `updates`: that powers were set for, of them `at_most` and `at_floor`.
    """

    rows: list[Held] = field(default_factory=list)
    short: float = 0.0
    level: float | None = None
    updates: int = 0
    at_most: int = 0
    at_floor: int = 0


class Matcher:
    """See `follow`. `report()`: how well it went so far."""

    def __init__(
        self,
        meter: Exposure,
        noise: Injection,
        reference: Trajectory,
        by: By,
        feedback: Feedback,
        rate: Rate | None,
        factors: FollowedFactors | None,
        offset: int,
    ) -> None:
        check(meter, noise)
        self._meter, self._noise, self._reference = meter, noise, reference
        self._feedback, self._rate, self._factors, self._offset = feedback, rate, factors, offset
        layers = sorted({place.layer for place in noise.places})
        self._keys = layers if by == "layer" else [WHOLE]
        self._courses = {key: _Course() for key in dict.fromkeys([WHOLE, *self._keys])}
        for key in self._courses:
            reference.curve(key)
        if factors is not None and len(reference.shares_at(1)) < factors.rank:
            raise InputError("reference", "too few shares of directions", "measure it with micro-batches")
        # First update that counts, and last measured one whose interval was counted.
        self._first, self._until = 0, 0
        # Shares of the largest directions, smoothed: the run's and the reference's; and, summed over updates,
        # those wanted and held.
        self._shares: list[list[float]] = []
        self._sums: list[list[float]] = []
        noise.power, noise.gains = 0.0, {}
        if by == "layer":
            noise.power, noise.gains = 1.0, dict.fromkeys(layers, 0.0)
        meter.after.append(self._decide)

    def remove(self) -> None:
        """Leave the power as it is from now on."""
        self._close()
        if self._decide in self._meter.after:
            self._meter.after.remove(self._decide)

    # The power of the coming updates.

    def _decide(self) -> None:
        interval = self._meter.interval
        assert interval is not None
        event = interval[0]
        if not self._first:
            self._first, self._until = event.step + self._offset, event.step + self._offset - 1
        self._close()
        others = self._others()
        for key in self._keys:
            row = next(row for row in (event, *interval[1]) if _key(row) == key)
            weight = self._weight(key, row)
            if not (row.sum_lr2 > 0 and weight > 0):
                continue  # without a learning rate there is nothing to set a power by
            own = row.trace_pcp + others[key] / row.sum_lr2
            aim = self._aim(key, row, own, weight)
            if self._factors is not None:
                self._shape(self._factors, event, own, max(aim, 0.0))
            self._set(key, aim, row.sum_lr2)

    def _close(self) -> None:
        """Count the intervals that ended since the last time."""
        if not self._first:
            return
        events = since(self._meter.events, self._until - self._offset)
        for row in (*events, *since(self._meter.parts, self._until - self._offset)):
            course = self._courses.get(_key(row) or "")
            if _key(row) is not None and course is not None:
                now = held(row, self._offset)
                course.short += self._missing(now, _key(row))
                course.rows.append(now)
        if events:
            self._until = events[-1].step + self._offset

    def _missing(self, row: Held, key: str | None) -> float:
        """What the reference had over a row's interval and the run had not."""
        wanted = self._reference.exposure(row.step, row.step + row.updates - 1, key)
        return wanted.value - row.exposure.value

    def _others(self) -> dict[str, float]:
        """What other injections added to the update just made, by layer and in all."""
        found: dict[str, float] = dict.fromkeys(self._courses, 0.0)
        for injection in injections_of(self._noise.optimizer):
            for channel, power in injection.powers().items() if injection is not self._noise else ():
                for layer, unit in self._meter.account.unit_pne2(injection, channel).items():
                    found[WHOLE] += power * unit
                    if layer in found:
                        found[layer] += power * unit
        return found

    def _weight(self, key: str, row: Trace) -> float:
        """Sum of eta^2 that is expected over the coming updates."""
        now = row.step + self._offset
        first, last = now + 1, now + self._meter.stride
        if self._rate is not None:
            return row.sum_lr2 * growth(self._rate, now, first, last)
        curve, rows = self._reference.curve(key), self._courses[key].rows
        # How the run's learning rate relates to the reference's shows over intervals that are over.
        scale = 1.0
        if rows:
            there = curve.sum_lr2(rows[-1].step, rows[-1].step + rows[-1].updates - 1)
            scale = rows[-1].sum_lr2 / there if there > 0 else 1.0
        return scale * curve.sum_lr2(first, last)

    def _aim(self, key: str, row: Trace, own: float, weight: float) -> float:
        """Trace to be injected, a of this module, before its bounds."""
        course, numbers = self._courses[key], self._feedback
        first = row.step + self._offset + 1
        wanted = self._reference.exposure(first, first + self._meter.stride - 1, key).value / weight
        level = wanted - own if course.level is None else course.level
        course.level = level + numbers.gain * (wanted - own - level)
        behind = course.short + self._missing(held(row, self._offset), key)
        limit = numbers.slack * wanted
        return course.level + min(max(numbers.gain * behind / weight, -limit), limit)

    def _set(self, key: str, aim: float, square: float) -> None:
        """The power that injects a trace, within its bounds; `square`: the present eta^2."""
        noise, course, count = self._noise, self._courses[key], self._meter.stride
        places = [place for place in noise.places if key in (WHOLE, place.layer)]
        units = [
            self._meter.account.unit_pne2(noise, channel) for channel in {noise.channel(p): p for p in places}
        ]
        unit = math.fsum(x / square for u in units for layer, x in u.items() if key in (WHOLE, layer))
        bound = self._feedback.most
        if noise.where == "pre" and not isinstance(noise.optimizer, SGD) and unit > 0:
            bound = min(bound, REACH * sum(place.parameter.numel() for place in places) / unit)
        power = min(max(aim / unit, 0.0), bound) if unit > 0 else 0.0
        course.updates += count
        course.at_floor += count * (aim <= 0)
        course.at_most += count * (aim > 0 and aim >= bound * unit)
        if key == WHOLE:
            noise.power = power
        else:
            noise.gains[key] = power

    def _shape(self, factors: FollowedFactors, event: Event, own: float, injected: float) -> None:
        """Spread what is injected over the largest directions and the rest.

        Direction k has share s_k of the run's own trace T and is to have q_k of T + I, so it gets what is
        missing, x_k = max(0, q_k (T + I) - s_k T), in proportion if all x_k are more than I; the rest gets
        I - sum x_k.
        """
        rank, sample = factors.rank, self._meter.shares[event.step]
        if rank > min(event.contributions - 2, len(sample)):
            mend = f"must be at most 8 and contributions - 2 = {event.contributions - 2}"
            raise InputError("factors.rank", rank, mend)
        wanted = self._reference.shares_at(event.step + self._offset)
        new = [noise_reduced(sample, event.contributions)[:rank], list(wanted[:rank])]
        self._shares = _mixed(self._shares or new, new, self._feedback.gain)
        shares, wanted_shares = self._shares
        whole = own + injected
        missing = [max(0.0, q * whole - s * own) for s, q in zip(shares, wanted_shares, strict=True)]
        scale = min(1.0, injected / math.fsum(missing)) if any(missing) else 1.0
        missing = [scale * x for x in missing]
        holds = [(s * own + x) / whole for s, x in zip(shares, missing, strict=True)]
        sums = self._sums or [[0.0] * rank] * 2
        count = self._meter.stride
        self._sums = [
            [total + count * x for total, x in zip(*pair, strict=True)]
            for pair in zip(sums, (wanted_shares, holds), strict=True)
        ]
        if injected > 0:
            # Gains of 1 are the sample's own covariance, of which power is a multiple.
            factors.gains = tuple(x / injected / s for x, s in zip(missing, sample, strict=False))
            left = max(0.0, 1 - math.fsum(missing) / injected)
            factors.rest_gain = left / (1 - math.fsum(sample[:rank]))
            self._meter.account.forget()

    # How well it went.

    def report(self) -> Match:
        """The match since the first measured update of the matcher, up to now."""
        self._close()
        by_layer = {key: self._match(key) for key in self._keys if key != WHOLE}
        whole, total = self._match(WHOLE), self._courses[WHOLE].updates
        if by_layer:
            at_most = math.fsum(match.at_most for match in by_layer.values()) / len(by_layer)
            at_floor = math.fsum(match.at_floor for match in by_layer.values()) / len(by_layer)
            whole = replace(whole, by_layer=by_layer, at_most=at_most, at_floor=at_floor)
        means = [[x / total for x in row] for row in self._sums]
        return replace(whole, shares=tuple(zip(*means, strict=True)))

    def _match(self, key: str) -> Match:
        course = self._courses[key]
        rows, updates = self._rows(key), max(course.updates, 1)
        if not rows:
            return Match(UNKNOWN, UNKNOWN, UNKNOWN, (UNKNOWN,) * 3, 0.0, 0.0, "undecided")
        length = rows[-1].step + rows[-1].updates - self._first
        thirds: list[list[Held]] = [[], [], []]
        for row in rows:
            thirds[3 * (row.step - self._first) // length].append(row)
        achieved, wanted = self._compared(rows, key)
        return Match(
            ratio(achieved, wanted),
            achieved,
            wanted,
            tuple(ratio(*self._compared(third, key)) for third in thirds),
            course.at_most / updates,
            course.at_floor / updates,
            read_ratio(ratio(achieved, wanted), self._feedback.tolerance),
        )

    def _rows(self, key: str) -> list[Held]:
        """Closed intervals, and the open one."""
        rows, interval = list(self._courses[key].rows), self._meter.interval
        if self._first and interval is not None and interval[0].step + self._offset > self._until:
            rows += [held(row, self._offset) for row in (interval[0], *interval[1]) if _key(row) == key]
        return rows

    def _compared(self, rows: Sequence[Held], key: str) -> tuple[Estimate, Estimate]:
        """`pne2` of the run and of the reference over adjacent rows."""
        if not rows:
            return UNKNOWN, UNKNOWN
        value = math.fsum(row.exposure.value for row in rows)
        error = math.sqrt(math.fsum(row.exposure.stderr**2 for row in rows))
        last = rows[-1].step + rows[-1].updates - 1
        return Estimate(value, error), self._reference.exposure(rows[0].step, last, key)

    def state_dict(self) -> dict[str, Any]:
        """All that a resumed run needs beside the states of noise and meter: plain data."""
        return {
            "first": self._first,
            "until": self._until,
            "courses": [
                [
                    key,
                    [list(astuple(row)) for row in c.rows],
                    c.short,
                    c.level,
                    c.updates,
                    c.at_most,
                    c.at_floor,
                ]
                for key, c in self._courses.items()
            ],
            "shares": [list(row) for row in self._shares],
            "sums": [list(row) for row in self._sums],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over what `state_dict` of a matcher with the same arguments gave; load the noise's too."""
        self._first, self._until = state["first"], state["until"]
        self._courses = {
            key: _Course([Held(*row) for row in rows], *numbers) for key, rows, *numbers in state["courses"]
        }
        self._shares = [list(row) for row in state["shares"]]
        self._sums = [list(row) for row in state["sums"]]


def check(meter: Exposure, noise: Injection) -> None:
    """Raises `InputError` for noise whose power cannot be set, or of an optimizer that is not the meter's."""
    if type(noise) is not Injection or callable(noise.power):
        raise InputError("noise", "an amount of its own", "give inject(...) with a number as power")
    if meter not in meters_of(noise.optimizer):
        raise InputError("noise", "of another optimizer", "inject into the optimizer that the meter is on")


def read_ratio(found: Estimate, tolerance: float) -> Reading:
    """What `Match.reading` says of achieved over wanted."""
    low, high = found.interval(LEVEL)
    if low >= 1 - tolerance and high <= 1 + tolerance:
        return "matched"
    if high < 1 - tolerance:
        return "saturated"
    return "exceeded" if low > 1 + tolerance else "undecided"


def growth(rate: Rate | None, now: int, first: int, last: int) -> float:
    """Sum of eta^2 over updates `first` to `last` over eta^2 of update `now`; without a rate their number."""
    if rate is None:
        return float(last - first + 1)
    return math.fsum((rate(step) / rate(now)) ** 2 for step in range(first, last + 1)) if rate(now) else 0.0


def _key(row: Trace) -> str | None:
    """What a row is of: the model or a layer; None for classes and tensors."""
    if not isinstance(row, Part):
        return WHOLE
    return row.part if row.kind == "layer" else None


def since(rows: Sequence[Row], step: int) -> list[Row]:
    """Rows after an update."""
    found = []
    for row in reversed(rows):
        if row.step <= step:
            break
        found.append(row)
    return found[::-1]


def _mixed(old: list[list[float]], new: list[list[float]], gain: float) -> list[list[float]]:
    """Each number brought nearer to its new value."""
    pairs = zip(old, new, strict=True)
    return [[x + gain * (y - x) for x, y in zip(*pair, strict=True)] for pair in pairs]
