"""The ledger of a run: measured updates, the intervals they stand for, and exposure integrated over them."""

import copy
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from gradnoise.noise.estimate import Estimate
from gradnoise.noise.integrals import Event, Integral, Part, Trace

_INJECTED = ("injected_pne", "injected_pne2", "injected_ne")
Rates = tuple[Any, ...]  # learning rates of one update, one a parameter group; floats or tensors


@dataclass(frozen=True)
class Share:
    """A layer's, class's or tensor's part of a measured update; `members`: positions of its tensors."""

    kind: str
    part: str
    members: tuple[int, ...]
    trace_pcp: float
    trace_pcp_se: float
    trace_c: float
    trace_c_se: float


@dataclass(frozen=True)
class Measurement:
    """A measured update before its interval is over.

    `event`: fields of `Event` but for the interval's sums. By tensor: traces, effective over nominal learning
    rate, parameter group. `decays`: decoupled weight decay of each group.
    """

    event: dict[str, Any]
    traces: tuple[float, ...]
    traces_c: tuple[float, ...]
    ratios: tuple[float, ...]
    groups: tuple[int, ...]
    decays: tuple[float, ...]
    shares: tuple[Share, ...]


@dataclass
class Ledger:
    """`events` and `parts` of closed intervals; the open one is in `covered`."""

    events: list[Event] = field(default_factory=list)
    parts: list[Part] = field(default_factory=list)
    open: Measurement | None = None
    _rates: list[Rates] = field(default_factory=list)
    _total: Integral = field(default_factory=Integral)
    _by_part: dict[tuple[str, str], Integral] = field(default_factory=dict)
    # Retained exposure by tensor, to know by how much decay shrinks the whole where groups decay differently.
    _kept: list[float] = field(default_factory=list)
    # Injected since the interval's start: sums of eta Tr(PNP), eta^2 Tr(PNP) and eta^2 Tr(N), by tensor.
    _injected: list[list[float]] = field(default_factory=list)

    def start(self, measurement: Measurement) -> None:
        """End the interval under way and open the next one, before its first update is counted."""
        self.close()
        self.open = measurement

    def advance(self, rates: Rates) -> None:
        """Count an update done at these learning rates."""
        if self.open is not None:
            self._rates.append(rates)

    @property
    def last_rates(self) -> list[float]:
        """Learning rates of the last update counted, one a parameter group; empty before the first."""
        return [float(rate) for rate in self._rates[-1]] if self._rates else []

    def inject(self, amounts: list[list[float]]) -> None:
        """Add what was injected into the update just counted: three sums, by tensor (see `_injected`)."""
        if self.open is None:
            return
        if len(self.open.traces) != len(amounts[0]):  # an estimator that does not tell tensors apart
            amounts = [[math.fsum(row)] for row in amounts]
        before = self._injected or [[0.0] * len(row) for row in amounts]
        self._injected = [
            [x + y for x, y in zip(*rows, strict=True)] for rows in zip(before, amounts, strict=True)
        ]

    def close(self) -> None:
        """End the interval under way."""
        covered = self.covered()
        if covered is None:
            return
        event, parts, kept = covered
        self.events.append(event)
        self.parts += parts
        self._add(event, parts)
        self._kept = kept
        self.open, self._rates, self._injected = None, [], []

    def _add(self, event: Event, parts: Sequence[Part]) -> None:
        self._total.add(event)
        for part in parts:
            if part.kind != "tensor":
                self._by_part.setdefault((part.kind, part.part), Integral()).add(part)

    def covered(self) -> tuple[Event, list[Part], list[float]] | None:
        """The open interval up to now: event, parts, and what is retained of each tensor's exposure."""
        if self.open is None or not self._rates:
            return None
        now = self.open
        rates = [[float(rate) for rate in step] for step in zip(*self._rates, strict=True)]
        first = [math.fsum(group) for group in rates]
        second = [math.fsum(rate * rate for rate in group) for group in rates]
        logs = [
            math.fsum(2 * math.log1p(-min(rate * decay, 1 - 1e-16)) for rate in group)
            for group, decay in zip(rates, now.decays, strict=True)
        ]
        sums = [ratio * first[group] for ratio, group in zip(now.ratios, now.groups, strict=True)]
        squares = [ratio**2 * second[group] for ratio, group in zip(now.ratios, now.groups, strict=True)]
        retention = [logs[group] for group in now.groups]
        before = self._kept or [0.0] * len(now.traces)
        injected = self._injected or [[0.0] * len(now.traces)] * 3

        def over(members: Sequence[int]) -> dict[str, Any]:
            traces, traces_c = [now.traces[n] for n in members], [now.traces_c[n] for n in members]
            return {
                "updates": len(self._rates),
                "sum_lr": _mean([sums[n] for n in members], traces),
                "sum_lr2": _mean([squares[n] for n in members], traces),
                "sum_lr2_c": _mean([squares[n] for n in members], traces_c),
                "log_retention": _log_mean([retention[n] for n in members], [before[n] for n in members]),
            } | {
                name: math.fsum(row[n] for n in members)
                for name, row in zip(_INJECTED, injected, strict=True)
            }

        event = Event(**now.event, **over(range(len(now.traces))))
        parts = [
            Part(
                kind=share.kind,
                part=share.part,
                step=event.step,
                trace_pcp=share.trace_pcp,
                trace_pcp_se=share.trace_pcp_se,
                trace_c=share.trace_c,
                trace_c_se=share.trace_c_se,
                **over(share.members),
            )
            for share in now.shares
        ]
        kept = [
            math.exp(log) * old + square * trace + added
            for log, old, square, trace, added in zip(
                retention, before, squares, now.traces, injected[1], strict=True
            )
        ]
        return event, parts, kept

    def estimates(self) -> tuple[dict[str, Estimate], dict[tuple[str, str], dict[str, Estimate]]]:
        """Exposure up to now, by definition: of the model, and of each (kind, part)."""
        covered = self.covered()
        if covered is None:
            return self._total.estimates(), {key: i.estimates() for key, i in self._by_part.items()}
        event, parts, _ = covered
        now = Ledger(_total=copy.deepcopy(self._total), _by_part=copy.deepcopy(self._by_part))
        now._add(event, parts)
        return now.estimates()

    def rows(self) -> tuple[list[Event], list[Part]]:
        """All events and parts up to now."""
        covered = self.covered()
        if covered is None:
            return self.events, self.parts
        return [*self.events, covered[0]], [*self.parts, *covered[1]]

    def state_dict(self) -> dict[str, Any]:
        """Plain numbers, strings and lists."""
        return {
            "events": [_values(event) for event in self.events],
            "parts": [_values(part) for part in self.parts],
            "open": None if self.open is None else asdict(self.open),
            "rates": [[float(rate) for rate in step] for step in self._rates],
            "kept": list(self._kept),
            "injected": [list(row) for row in self._injected],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over what `state_dict` gave."""
        self.events = [Event(*row) for row in state["events"]]
        self.parts = [Part(*row) for row in state["parts"]]
        self._rates = [tuple(step) for step in state["rates"]]
        self._kept = list(state["kept"])
        self._injected = [list(row) for row in state["injected"]]
        self._total, self._by_part = Integral(), {}
        by_step: dict[int, list[Part]] = {}
        for part in self.parts:
            by_step.setdefault(part.step, []).append(part)
        for event in self.events:
            self._add(event, by_step.get(event.step, []))
        self.open = None
        if state["open"] is not None:
            now = state["open"]
            shares = tuple(Share(**{**s, "members": tuple(s["members"])}) for s in now["shares"])
            lists = {name: tuple(now[name]) for name in ("traces", "traces_c", "ratios", "groups", "decays")}
            self.open = Measurement(event=dict(now["event"]), shares=shares, **lists)


def _values(row: Trace) -> list[Any]:
    return [getattr(row, f.name) for f in fields(row)]


def _mean(values: Sequence[float], weights: Sequence[float]) -> float:
    """Mean weighted by traces, so that it times their sum is exact; plain where they sum to 0 or less."""
    if all(value == values[0] for value in values):
        return values[0]
    total = math.fsum(weights)
    if total > 0:
        return math.fsum(v * w for v, w in zip(values, weights, strict=True)) / total
    return math.fsum(values) / len(values)


def _log_mean(logs: Sequence[float], weights: Sequence[float]) -> float:
    if all(log == logs[0] for log in logs):
        return logs[0]
    mean = _mean([math.exp(log) for log in logs], weights)
    return math.log(mean) if mean > 0 else math.fsum(logs) / len(logs)
