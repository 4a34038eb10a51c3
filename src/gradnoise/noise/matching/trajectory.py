"""A recorded run's exposure along its updates: what another run can be made to follow."""

import math
from bisect import bisect_right
from collections.abc import Iterable, Mapping
from dataclasses import astuple, dataclass, field
from typing import Any

from gradnoise.base.errors import InputError
from gradnoise.noise.estimate import Estimate
from gradnoise.noise.exposure import Exposure
from gradnoise.noise.integrals import Trace
from gradnoise.noise.spectrum import noise_reduced

# Key of the whole model beside those of its layers.
WHOLE = ""


@dataclass(frozen=True)
class Held:
    """A measured update and the `updates` it stands for, over which eta^2 sums to `sum_lr2`.

    `trace` = Tr(P (C/B + N) P), what was injected included (as a mean over the interval).
    """

    step: int
    updates: int
    sum_lr2: float
    trace: float
    stderr: float

    @property
    def exposure(self) -> Estimate:
        """`pne2` of the interval."""
        return Estimate(self.trace, self.stderr).scaled(self.sum_lr2)


class Curve:
    """Exposure along a run, from rows in order; before the first and after the last it goes on as there."""

    def __init__(self, rows: Iterable[Held]) -> None:
        self.rows = tuple(sorted(rows, key=lambda row: row.step))
        if not self.rows:
            raise InputError("reference", "no measured update", "record one with a meter")
        for row in self.rows:
            if not (math.isfinite(row.trace) and row.updates > 0):
                raise InputError(
                    f"reference at update {row.step}", row.trace, "must be finite: cut it before"
                )
        self._steps = [row.step for row in self.rows]

    def at(self, step: float) -> Estimate:
        """Trace at an update, linear in its logarithm between measured ones."""
        n = bisect_right(self._steps, step) - 1
        left, right = self.rows[max(n, 0)], self.rows[min(n + 1, len(self.rows) - 1)]
        if left.step == right.step or n < 0 or not (left.trace > 0 and right.trace > 0):
            return Estimate(left.trace, left.stderr)
        way = (step - left.step) / (right.step - left.step)
        value = left.trace * (right.trace / left.trace) ** way
        errors = (1 - way) * left.stderr / left.trace, way * right.stderr / right.trace
        return Estimate(value, value * math.hypot(*errors))

    def exposure(self, first: int, last: int) -> Estimate:
        """`pne2` of updates `first` to `last` as a ledger has it: a measured update is held to the next."""
        parts = [row.exposure.scaled(share) for row, share in self.over(first, last)]
        return Estimate(math.fsum(p.value for p in parts), math.sqrt(math.fsum(p.stderr**2 for p in parts)))

    def sum_lr2(self, first: int, last: int) -> float:
        """Sum of eta^2 over updates `first` to `last`."""
        return math.fsum(share * row.sum_lr2 for row, share in self.over(first, last))

    def over(self, first: int, last: int) -> list[tuple[Held, float]]:
        """Rows that hold for the updates, each with the share of its own interval that is among them."""
        found, n = [], max(bisect_right(self._steps, first) - 1, 0)
        while first <= last:
            until = min(last, self._steps[n + 1] - 1) if n + 1 < len(self.rows) else last
            found.append((self.rows[n], (until - first + 1) / self.rows[n].updates))
            first, n = until + 1, n + 1
        return found


@dataclass(frozen=True)
class Trajectory:
    """A recorded run: of the model and by layer, and the shares of its noise's largest directions.

    `shares`, by measured update: of the trace, less what a sample of few contributions makes of all the other
    directions (`spectrum.noise_reduced`); without that the largest directions of any noise look equally large
    in 8 micro-batches. What is left of the bias is alike in runs measured with as many contributions.
    """

    total: Curve
    by_layer: Mapping[str, Curve] = field(default_factory=dict)
    shares: Mapping[int, tuple[float, ...]] = field(default_factory=dict)

    @classmethod
    def of(cls, meter: Exposure) -> "Trajectory":
        """Of a run up to now. Raises `InputError` before the first measured update."""
        events, parts = meter.rows()
        found = {
            event.step: tuple(noise_reduced(meter.shares.get(event.step, ()), event.contributions))
            for event in events
        }
        return cls.from_rows(events, parts, {step: shares for step, shares in found.items() if shares})

    @classmethod
    def from_rows(
        cls,
        events: Iterable[Trace | Mapping[str, Any]],
        parts: Iterable[Trace | Mapping[str, Any]] = (),
        shares: Mapping[int, tuple[float, ...]] | None = None,
    ) -> "Trajectory":
        """From a meter's events and parts, or from rows of one run's tables `noise_events`, `noise_parts`.

        Raises `InputError` for no rows, rows that lack a field, and traces that are not finite.
        """
        layers: dict[str, list[Held]] = {}
        for part in parts:
            if _field(part, "kind") == "layer":
                layers.setdefault(_field(part, "part"), []).append(held(part))
        return cls(
            Curve(held(event) for event in events),
            {name: Curve(rows) for name, rows in layers.items()},
            dict(shares or {}),
        )

    def at(self, step: float, layer: str | None = None) -> Estimate:
        """Tr(P (C/B + N) P) at an update; see `Curve.at`."""
        return self.curve(layer).at(step)

    def exposure(self, first: int, last: int, layer: str | None = None) -> Estimate:
        """`pne2` of updates `first` to `last`; see `Curve.exposure`."""
        return self.curve(layer).exposure(first, last)

    def shares_at(self, step: int) -> tuple[float, ...]:
        """Shares of the largest directions as last measured by the update; none where nobody recorded any."""
        known = [at for at in self.shares if at <= step] or sorted(self.shares)[:1]
        return self.shares[max(known)] if known else ()

    def curve(self, layer: str | None = None) -> Curve:
        """Of a layer, or of the whole model."""
        if layer is None or layer == WHOLE:
            return self.total
        if layer not in self.by_layer:
            known = ", ".join(self.by_layer) or "none"
            raise InputError("reference", f"no layer {layer}", f"its layers: {known}")
        return self.by_layer[layer]

    def state_dict(self) -> dict[str, Any]:
        """Plain numbers, strings and lists."""
        return {
            "total": [list(astuple(row)) for row in self.total.rows],
            "by_layer": [[name, [list(astuple(r)) for r in c.rows]] for name, c in self.by_layer.items()],
            "shares": [[step, list(found)] for step, found in self.shares.items()],
        }

    @classmethod
    def from_state_dict(cls, state: dict[str, Any]) -> "Trajectory":
        """What `state_dict` was of."""
        return cls(
            Curve(Held(*row) for row in state["total"]),
            {name: Curve(Held(*row) for row in rows) for name, rows in state["by_layer"]},
            {step: tuple(found) for step, found in state["shares"]},
        )


def held(row: Trace | Mapping[str, Any], offset: int = 0) -> Held:
    """An event or part, `offset` updates later; injected noise counts with the eta^2 of what was measured."""
    weight, injected = _field(row, "sum_lr2"), _field(row, "injected_pne2") or 0.0
    trace, error = _field(row, "trace_pcp"), _field(row, "trace_pcp_se")
    if weight > 0:
        trace = trace + injected / weight
    return Held(_field(row, "step") + offset, _field(row, "updates"), weight, trace, error)


def _field(row: Trace | Mapping[str, Any], name: str) -> Any:
    try:
        return row[name] if isinstance(row, Mapping) else getattr(row, name)
    except (KeyError, AttributeError):
        raise InputError(
            f"row.{name}", "missing", "give rows as a meter's events and parts have them"
        ) from None
