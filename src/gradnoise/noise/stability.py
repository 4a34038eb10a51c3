"""When is a run called unstable? Markers with their thresholds, and caps on exposure."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from statistics import median
from typing import NamedTuple

from gradnoise.base.errors import InputError


@dataclass(frozen=True)
class Thresholds:
    """A marker above its threshold is raised; a run with a raised marker is called unstable.

    `gradient_norm`: gradient norm over its median of the last `window` events. `clip_rate`: share of updates
    that were clipped. `loss`: rise of the loss over the lowest seen, in its own unit (needs
    `meter.observe(loss)`). `second_moment`: mean of the optimizer's second moment v over its median of the
    last `window` events. The defaults are working values for small transformers, to be set anew for a model
    or learning rate of another scale.
    """

    gradient_norm: float = 10.0
    clip_rate: float = 0.5
    loss: float = 1.0
    second_moment: float = 10.0
    window: int = 20

    def __post_init__(self) -> None:
        for name in ("gradient_norm", "clip_rate", "loss", "second_moment", "window"):
            if not getattr(self, name) > 0:
                raise InputError(f"thresholds.{name}", getattr(self, name), "must be above 0")


class Marker(NamedTuple):
    """A marker's value, its threshold, and whether it is raised; an unknown value (nan) raises nothing."""

    value: float
    threshold: float
    raised: bool


class Cap(NamedTuple):
    """At most `most` of `definition` over the updates `first` to `last` (counted from 1, both included)."""

    first: int
    last: int
    most: float
    definition: str = "pne2"


class Stability:
    """Markers over a run; keeps the last `window` events."""

    def __init__(self, thresholds: Thresholds) -> None:
        self.thresholds = thresholds
        self.history: dict[str, list[float]] = {"gradient_norm": [], "second_moment": []}
        self.lowest = math.inf

    def update(self, values: Mapping[str, float]) -> dict[str, Marker]:
        """Markers of one event, of gradient_norm, second_moment, clip_rate and loss (nan: unknown)."""
        found = {name: self._against_median(name, values[name]) for name in self.history}
        found["clip_rate"] = self._marker("clip_rate", values["clip_rate"])
        loss = values["loss"]
        rise = loss - min(self.lowest, loss)
        if not math.isnan(loss):
            rise = math.inf if math.isinf(loss) else rise
            self.lowest = min(self.lowest, loss)
        found["loss"] = self._marker("loss", rise)
        return found

    def _against_median(self, name: str, value: float) -> Marker:
        history = self.history[name]
        usual = median(history) if history else math.nan
        relative = value / usual if usual > 0 else math.nan
        relative = math.inf if math.isinf(value) else relative
        if math.isfinite(value):
            history.append(value)
            del history[: -self.thresholds.window]
        return self._marker(name, relative)

    def _marker(self, name: str, value: float) -> Marker:
        threshold = getattr(self.thresholds, name)
        return Marker(value, threshold, value > threshold)
