"""Schedules: from the number of an update, the first being 1, to a temperature, alignment or power."""

import math
from dataclasses import dataclass

from gradnoise.base.errors import InputError


@dataclass(frozen=True)
class constant:
    """`value` at every update. Raises `InputError` where it is not finite."""

    value: float

    def __post_init__(self) -> None:
        _check_finite(value=self.value)

    def __call__(self, step: int) -> float:
        """The value at update `step`."""
        return float(self.value)


@dataclass(frozen=True)
class ramp:
    """From `start` after `first` updates to `end` after `updates` more, linearly; held on both sides.

    value = start + (end - start) x, x = (step - first) / updates within 0 and 1: with first = 0 the first
    update gets 1/updates of the way and update number `updates` gets `end`.

    Raises `InputError` for fewer than 1 updates, a negative `first`, and ends that are not finite.
    """

    start: float
    end: float
    updates: int
    first: int = 0

    def __post_init__(self) -> None:
        _check_stretch(self.start, self.end, self.updates, self.first)

    def __call__(self, step: int) -> float:
        """The value at update `step`."""
        return _between(self.start, self.end, _way(step, self.first, self.updates))


@dataclass(frozen=True)
class cosine:
    """From `start` after `first` updates to `end` after `updates` more, by half a cosine; held on both sides.

    value = start + (end - start) (1 - cos(pi x)) / 2, x = (step - first) / updates within 0 and 1.

    Raises `InputError` for fewer than 1 updates, a negative `first`, and ends that are not finite.
    """

    start: float
    end: float
    updates: int
    first: int = 0

    def __post_init__(self) -> None:
        _check_stretch(self.start, self.end, self.updates, self.first)

    def __call__(self, step: int) -> float:
        """The value at update `step`."""
        way = _way(step, self.first, self.updates)
        return _between(self.start, self.end, (1 - math.cos(math.pi * way)) / 2)


@dataclass(frozen=True)
class window:
    """`value` at updates `first` to `last`, both included; 0 at all others.

    Raises `InputError` for `first` below 1, `last` before `first`, and a value that is not finite.
    """

    value: float
    first: int
    last: int

    def __post_init__(self) -> None:
        _check_finite(value=self.value)
        if self.first < 1:
            raise InputError("first", self.first, "must be 1 or more: 1 is the first update")
        if self.last < self.first:
            raise InputError("last", self.last, f"must be first={self.first} or later")

    def __call__(self, step: int) -> float:
        """The value at update `step`."""
        return float(self.value) if self.first <= step <= self.last else 0.0


def _way(step: int, first: int, updates: int) -> float:
    return min(max((step - first) / updates, 0.0), 1.0)


def _between(start: float, end: float, share: float) -> float:
    # start + (end - start) need not be end in floating point.
    return float(end) if share == 1 else start + (end - start) * share


def _check_stretch(start: float, end: float, updates: int, first: int) -> None:
    _check_finite(start=start, end=end)
    if updates < 1:
        raise InputError("updates", updates, "must be 1 or more")
    if first < 0:
        raise InputError("first", first, "must be 0 or more")


def _check_finite(**values: float) -> None:
    for field, value in values.items():
        if not math.isfinite(value):
            raise InputError(field, value, "must be finite")
