"""The maximum of the restricted likelihood over the covariances of the random effects."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product

import numpy as np
from numpy.typing import NDArray

from gradnoise.analysis.statistics.reml import Contrasts, Model, lower_triangle

Array = NDArray[np.float64]
Factors = list[Array]

# Deviance per unit of a covariance: what rounding leaves at an optimum lies orders below.
_STATIONARY = 1e-5
# From a standard deviation that adds nothing to one that swamps the residual, in units of an effect.
_STEPS = np.concatenate([[0.0], np.logspace(-1.5, 7, 69)])
# How many scans are followed by a search, and where one starts that follows none, in units of the effects.
_SCANS, _LARGE = 2, 3.0


@dataclass(frozen=True)
class Optimum:
    """Maximum of the restricted likelihood: the Cholesky factor L of G / s^2 for each block, and s^2.

    `converged`: the score is zero, or where a covariance is singular points outwards.
    """

    factors: tuple[Array, ...]
    scale: float
    loglik: float
    converged: bool


def maximise(model: Model) -> Optimum:
    """Minimise the deviance of `reml.Contrasts` over the factors L, to the accuracy that rounding allows.

    The deviance may have several minima and those at zero variances are common, so: scans over the whole
    range of variances find the starts; from the most likely ones a quasi-Newton method (BFGS, exact
    gradient) descends, and Newton steps end it. The entries of L need no bounds: the deviance is even in a
    variance's root, so that a variance of zero is an inner minimum. But where L is nearly singular it can
    look stationary in L though it is not in G, so then a step in G leads to another start; and where
    variances of very different size stop BFGS, a trust-region Newton method goes on.
    """
    contrasts = Contrasts(model)
    searches = [_Search(contrasts, start) for start in _starts(contrasts)]
    ends = [(search, search.descend(search.start)) for search in searches]
    violation, factors = _best(ends)
    if violation >= _STATIONARY:
        searches = [_Search(contrasts, search.pulled(entries)) for search, entries in ends]
        ends += [(search, search.descend(search.start)) for search in searches]
        violation, factors = _best(ends)
    if violation >= _STATIONARY:
        ends = [(search, search.descend(entries, method="trust-exact")) for search, entries in ends]
        violation, factors = _best(ends)
    point, spare = contrasts.at(factors), model.spare
    determinant = 2 * np.log(np.abs(np.diag(model.x))).sum()
    loglik = -0.5 * (spare * (np.log(2 * np.pi / spare) + 1) + point.deviance + determinant)
    return Optimum(tuple(factors), point.residual / spare, float(loglik), violation < _STATIONARY)


def _best(ends: Sequence[tuple[_Search, Array]]) -> tuple[float, Factors]:
    """The lowest end; among ends that are one minimum up to rounding, the nearest to it."""
    values = [search.value_and_slope(entries)[0] for search, entries in ends]
    polished: list[tuple[float, Factors]] = []
    for value, (search, entries) in sorted(zip(values, ends, strict=True), key=lambda end: end[0]):
        if value <= min(values) + 1e-7 and (not polished or polished[-1][0] >= _STATIONARY):
            entries = search.polish(entries)
            polished.append((search.violation(entries), search.factors(entries)))
    return min(polished, key=lambda end: end[0])


def _starts(contrasts: Contrasts) -> list[Factors]:
    """The best of scans (variances together, one by one, correlated), and one that no scan has chosen.

    That one has all variances well above what shows: scans also end at zero where a second minimum, which
    needs several variances at once, lies lower.
    """
    units = contrasts.units()
    none: Factors = [np.zeros((len(unit), len(unit))) for unit in units]
    together = _scan(contrasts, none, [np.diag(unit) for unit in units])
    found = [together, _one_by_one(contrasts, none, units)]
    for b, unit in enumerate(units):
        others = [*together[1][:b], none[b], *together[1][b + 1 :]]
        rays = [_only(none, b, (signs * unit)[:, None]) for signs in _sign_patterns(len(unit))]
        found += [_scan(contrasts, others, ray) for ray in rays]
    found.sort(key=lambda scanned: scanned[0])
    return [*(start for _, start in found[:_SCANS]), [np.diag(_LARGE * unit) for unit in units]]


def _one_by_one(contrasts: Contrasts, none: Factors, units: Sequence[Array]) -> tuple[float, Factors]:
    deviance, factors = np.inf, none
    for _ in range(2):
        for b, unit in enumerate(units):
            for k in range(len(unit)):
                others = [factor.copy() for factor in factors]
                others[b][k] = 0
                ray = np.zeros_like(none[b])
                ray[k, k] = unit[k]
                deviance, factors = _scan(contrasts, others, _only(none, b, ray))
    return deviance, factors


def _scan(contrasts: Contrasts, fixed: Factors, ray: Sequence[Array]) -> tuple[float, Factors]:
    """The least deviance along a ray of covariances, and the factors there."""
    values = contrasts.along(fixed, ray, _STEPS)
    best = int(np.argmin(values))
    factors = [lower_triangle(np.hstack([a, _STEPS[best] * d])) for a, d in zip(fixed, ray, strict=True)]
    return float(values[best]), factors


def _only(none: Factors, b: int, part: Array) -> Factors:
    """A ray that moves block `b` alone, with as many columns in each block."""
    return [part if k == b else np.zeros((len(factor), part.shape[1])) for k, factor in enumerate(none)]


def _sign_patterns(size: int) -> Iterator[Array]:
    """Directions in which two or more effects vary as one, up to a common sign."""
    for signs in product((0, 1, -1), repeat=size):
        used = [sign for sign in signs if sign]
        if len(used) > 1 and used[0] > 0:
            yield np.array(signs, dtype=float)


class _Search:
    """The deviance as a function of the entries of the factors, each row in the unit of its effect.

    The unit is the standard deviation at the start, or the one that begins to show if that is larger.
    """

    def __init__(self, contrasts: Contrasts, start: Factors) -> None:
        self._contrasts = contrasts
        self._units = [
            np.maximum(unit, np.linalg.norm(factor, axis=1))
            for unit, factor in zip(contrasts.units(), start, strict=True)
        ]
        self._lower = [np.tril_indices(len(unit)) for unit in self._units]
        self._ends = np.cumsum([len(rows) for rows, _ in self._lower])
        scaled = [factor / unit[:, None] for factor, unit in zip(start, self._units, strict=True)]
        for factor in scaled:
            # Not from a variance of 0: the deviance is flat there, whatever it does beyond.
            np.fill_diagonal(factor, np.maximum(np.diag(factor), 0.1))
        self.start = np.concatenate(
            [factor[lower] for factor, lower in zip(scaled, self._lower, strict=True)]
        )

    def factors(self, entries: Array) -> Factors:
        found = []
        for part, lower, unit in zip(
            np.split(entries, self._ends[:-1]), self._lower, self._units, strict=True
        ):
            factor = np.zeros((len(unit), len(unit)))
            factor[lower] = part
            found.append(unit[:, None] * factor)
        return found

    def value_and_slope(self, entries: Array) -> tuple[float, Array]:
        factors = self.factors(entries)
        point = self._contrasts.at(factors)
        parts = [
            (2 * unit[:, None] * (slope @ factor))[lower]
            for slope, factor, lower, unit in zip(
                point.slopes, factors, self._lower, self._units, strict=True
            )
        ]
        return point.deviance, np.concatenate(parts)

    def descend(self, start: Array, method: str = "BFGS") -> Array:
        from scipy.optimize import minimize

        curvature = self._curvature if method == "trust-exact" else None
        options = {"gtol": 1e-7}
        found = minimize(
            self.value_and_slope, start, jac=True, hess=curvature, method=method, options=options
        )
        return np.asarray(found.x)

    def polish(self, entries: Array) -> Array:
        """Newton steps while they bring the slope nearer to 0, then exact zeros for what is nearly 0."""
        slope = self.value_and_slope(entries)[1]
        for _ in range(5):
            moved = entries - np.linalg.lstsq(self._curvature(entries), slope, rcond=1e-10)[0]
            next_slope = self.value_and_slope(moved)[1]
            if not np.abs(next_slope).max() < np.abs(slope).max():
                break
            entries, slope = moved, next_slope
        return np.where(np.abs(entries) < 1e-6, 0.0, entries)

    def pulled(self, entries: Array) -> Factors:
        """The best of some steps against the gradient in the G, cut off where a G would leave its cone."""
        factors = self.factors(entries)
        scaled = [factor / unit[:, None] for factor, unit in zip(factors, self._units, strict=True)]
        slopes = [
            unit[:, None] * slope * unit
            for slope, unit in zip(self._contrasts.at(factors).slopes, self._units, strict=True)
        ]
        size = sum(np.linalg.norm(factor) ** 2 for factor in scaled) / sum(map(np.linalg.norm, slopes))
        steps = []
        for step in size * np.logspace(-3, 2, 11):
            moved = []
            for factor, slope, unit in zip(scaled, slopes, self._units, strict=True):
                values, vectors = np.linalg.eigh(factor @ factor.T - step * slope)
                moved.append(unit[:, None] * lower_triangle(vectors * np.sqrt(np.maximum(values, 0))))
            steps.append(moved)
        return min(steps, key=lambda moved: self._contrasts.at(moved).deviance)

    def violation(self, entries: Array) -> float:
        """How far from an optimum: the score, and where a covariance is singular its pull inwards.

        With M the gradient of the deviance in G = L L', an optimum has M L = 0 and no direction v in which
        v' M v < 0, for there a variance would want to grow.
        """
        factors = self.factors(entries)
        worst = 0.0
        for slope, factor, unit in zip(self._contrasts.at(factors).slopes, factors, self._units, strict=True):
            scaled = unit[:, None] * slope * unit
            score = 2 * scaled @ (factor / unit[:, None])
            worst = max(worst, float(np.abs(score).max()), -float(np.linalg.eigvalsh(scaled).min()))
        return worst

    def _curvature(self, entries: Array) -> Array:
        """Second derivatives, by central differences of the exact first ones."""
        step = 1e-5
        ahead, behind = (
            np.array([self.value_and_slope(entries + h * unit)[1] for unit in np.eye(len(entries))])
            for h in (step, -step)
        )
        matrix = (ahead - behind) / (2 * step)
        return np.asarray((matrix + matrix.T) / 2)
