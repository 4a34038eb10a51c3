"""A number and its standard error."""

from typing import NamedTuple


class Estimate(NamedTuple):
    """A number that travels with its standard error; `float(estimate)` is its value."""

    value: float
    stderr: float

    def __float__(self) -> float:
        return self.value
