"""Restricted maximum likelihood (REML): the criterion, with all but the covariances profiled out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


class FitError(ArithmeticError):
    """The model could not be fitted to these rows."""


@dataclass(frozen=True)
class Model:
    """y = X b + sum over blocks Z u + e, rotated so that its size no longer depends on the rows.

    With [X Z y] = Q R, the rows of R are the data in the basis Q: nothing but residual is outside it, with
    sum of squares `rest` on `rest_df` degrees of freedom. `x` is m x p and zero below row p; each of `z` is
    m x clusters x effects; `y` has length m.
    """

    x: Array
    z: tuple[Array, ...]
    y: Array
    rest: float
    rest_df: int

    @property
    def spare(self) -> int:
        """n - p, the degrees of freedom of the restricted likelihood."""
        return len(self.y) - int(self.x.shape[1]) + self.rest_df


@dataclass(frozen=True)
class Point:
    """The criterion at one set of factors: deviance, its gradient in each L L', residual sum of squares."""

    deviance: float
    slopes: tuple[Array, ...]
    residual: float


def rotate(x: Array, z: Sequence[Array], y: Array) -> Model:
    """The model in the basis of its own columns. `x` is n x p, each of `z` n x clusters x effects."""
    n, p = x.shape
    triangle = _qr(np.column_stack([x, *(block.reshape(n, -1) for block in z), y]))
    m = min(n, triangle.shape[1] - 1)
    ends = np.cumsum([block[0].size for block in z])
    parts = np.split(triangle[:m, p:-1], ends[:-1], axis=1)
    return Model(
        x=triangle[:m, :p],
        z=tuple(part.reshape(m, *block.shape[1:]) for part, block in zip(parts, z, strict=True)),
        y=triangle[:m, -1],
        rest=float(triangle[m, -1] ** 2) if len(triangle) > m else 0.0,
        rest_df=n - m,
    )


def root(z: Sequence[Array], factors: Sequence[Array]) -> Array:
    """Lower triangular C with C C' = V / s^2 = I + sum Z L L' Z', without forming that matrix.

    Squaring would lose the residual beside a large variance.
    """
    rows = len(z[0])
    columns = [(block @ factor).reshape(rows, -1) for block, factor in zip(z, factors, strict=True)]
    return _qr(np.vstack([*(part.T for part in columns), np.eye(rows)])).T


def lower_triangle(columns: Array) -> Array:
    """The lower triangular L >= 0 on its diagonal with L L' = A A' for A = `columns` (k x any).

    Gram-Schmidt on the rows of A: no squaring, and at a singular covariance still one definite answer, with
    zeros below a zero on the diagonal.
    """
    size = len(columns)
    factor, rest = np.zeros((size, size)), np.array(columns, dtype=float)
    for k in range(size):
        length = float(np.linalg.norm(rest[k]))
        if length > 1e-8 * float(np.linalg.norm(columns[k])):
            direction = rest[k] / length
            factor[k:, k] = rest[k:] @ direction
            rest[k:] -= np.outer(factor[k:, k], direction)
    return factor


class Contrasts:
    """y* = A' y and Z* = A' Z, where A' X = 0: the part of the data that the restricted likelihood sees.

    With V* = I + sum Z* L L' Z*' the deviance, in which b and s^2 are profiled out, is

      d = log|V*| + (n - p) log(y*' V*^-1 y*),     s^2 = y*' V*^-1 y* / (n - p).

    Source: Bates et al., Journal of Statistical Software 2015, section 3, with the columns of X taken out.
    """

    def __init__(self, model: Model) -> None:
        below = model.x.shape[1]
        self.y = model.y[below:]
        self.z = tuple(block[below:] for block in model.z)
        self._rest, self._spare = model.rest, model.spare
        self._columns = self._with_y(self.z)

    def at(self, factors: Sequence[Array]) -> Point:
        """The criterion at L; its gradient in L L' is Z*' W Z* - Z*' W y* y*' W Z* / s^2 with W = V*^-1."""
        triangle = root(self.z, factors)
        white = np.linalg.solve(triangle, self._columns)
        y = white[:, -1]
        residual = self._rest + float(y @ y)
        deviance = 2 * np.log(np.abs(np.diag(triangle))).sum() + self._spare * np.log(residual)
        slopes, end = [], 0
        for block in self.z:
            start, end = end, end + block[0].size
            part = white[:, start:end]
            shown = (y @ part).reshape(block.shape[1:])
            rows = part.reshape(-1, block.shape[2])
            slopes.append(rows.T @ rows - self._spare / residual * (shown.T @ shown))
        return Point(float(deviance), tuple(slopes), residual)

    def along(self, fixed: Sequence[Array], ray: Sequence[Array], steps: Array) -> Array:
        """Deviance at L L' = fixed fixed' + t^2 ray ray' for each t of `steps`, for one decomposition."""
        triangle = root(self.z, fixed)
        moved = [block @ part for block, part in zip(self.z, ray, strict=True) if part.any()]
        white = np.linalg.solve(triangle, self._with_y(moved))
        vectors, values, _ = np.linalg.svd(white[:, :-1], full_matrices=False)
        shown = vectors.T @ white[:, -1]
        left = self._rest + float(((white[:, -1] - vectors @ shown) ** 2).sum())
        spread = 1 + (steps[:, None] * values) ** 2
        residual = left + (shown**2 / spread).sum(axis=1)
        constant = 2 * np.log(np.abs(np.diag(triangle))).sum()
        return np.asarray(constant + np.log(spread).sum(axis=1) + self._spare * np.log(residual))

    def units(self) -> list[Array]:
        """For each effect the standard deviation, relative to the residual's, that begins to show."""
        return [
            np.array([1 / np.linalg.norm(block[:, :, k], 2) for k in range(block.shape[2])])
            for block in self.z
        ]

    def _with_y(self, blocks: Sequence[Array]) -> Array:
        return np.column_stack([*(block.reshape(len(self.y), -1) for block in blocks), self.y])


def _qr(matrix: Array) -> Array:
    return np.asarray(np.linalg.qr(matrix, mode="r"))
