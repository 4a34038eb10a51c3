"""A number and its standard error."""

import math
from statistics import NormalDist
from typing import NamedTuple


class Estimate(NamedTuple):
    """A number that travels with its standard error; `float(estimate)` is its value."""

    value: float
    stderr: float

    def __float__(self) -> float:
        return self.value

    def interval(self, level: float = 0.9, df: float = math.inf) -> tuple[float, float]:
        """value -+ q stderr, q the quantile of Student's t with `df` degrees of freedom (inf: normal).

        A single reading from R contributions has R - 1; a sum over many events is close to normal. The
        quantile is the Cornish-Fisher series (Abramowitz and Stegun 26.7.5), within 0.5 % from df = 3 on at
        level 0.9.
        """
        z = NormalDist().inv_cdf((1 + level) / 2)
        terms = (
            (z**3 + z) / 4,
            (5 * z**5 + 16 * z**3 + 3 * z) / 96,
            (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
            (79 * z**9 + 776 * z**7 + 1482 * z**5 - 1920 * z**3 - 945 * z) / 92160,
        )
        quantile = z + sum(term / df**power for power, term in enumerate(terms, start=1))
        return self.value - quantile * self.stderr, self.value + quantile * self.stderr

    def scaled(self, factor: float) -> "Estimate":
        """Times an exact number."""
        return Estimate(self.value * factor, self.stderr * abs(factor))


UNKNOWN = Estimate(math.nan, math.nan)


def ratio(numerator: Estimate, denominator: Estimate, covariance: float = 0.0) -> Estimate:
    """numerator / denominator with the delta method's error; nan where the denominator is 0 or less.

    A quotient over a quantity that cannot be told from 0 has no meaning; its sign is not hidden behind a
    floor.
    """
    if not denominator.value > 0:
        return UNKNOWN
    quotient = numerator.value / denominator.value
    variance = numerator.stderr**2 + (quotient * denominator.stderr) ** 2 - 2 * quotient * covariance
    # A covariance that was itself estimated can overshoot; nan must stay nan.
    return Estimate(quotient, math.sqrt(0.0 if variance < 0 else variance) / denominator.value)
