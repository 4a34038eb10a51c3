"""Kenward and Roger's small-sample inference for the fixed effects of a mixed model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from gradnoise.analysis.statistics.reml import Model, root

Array = NDArray[np.float64]


@dataclass(frozen=True)
class KenwardRoger:
    """What inference on fixed effects needs beside their estimates, in the units of the data.

    `covariance` is Phi = (X' V^-1 X)^-1 at the REML variances and `adjusted` its small-sample correction
    (p x p). `slopes` holds dPhi / d gamma for each variance and covariance gamma, `weights` the covariance
    matrix of their estimates.
    """

    covariance: Array
    adjusted: Array
    slopes: Array
    weights: Array

    def in_units(self, back: Array) -> KenwardRoger:
        """The same for the coefficients back @ beta."""
        return replace(
            self,
            covariance=back @ self.covariance @ back.T,
            adjusted=back @ self.adjusted @ back.T,
            slopes=back @ self.slopes @ back.T,
        )

    def f_test(self, contrasts: Array, beta: Array) -> tuple[float, float, float]:
        """Scaled F, its denominator degrees of freedom and its scale, for contrasts @ beta = 0 (q x p).

        With D_i = L dPhi_i L' and C = (L Phi L')^-1,

          A1 = sum_ij W_ij tr(C D_i) tr(C D_j),   A2 = sum_ij W_ij tr(C D_i C D_j),

        from which Kenward and Roger match the first two moments of F. For q = 1 this gives scale 1 and
        2 / A2 degrees of freedom. Source: Kenward and Roger, Biometrics 1997, section 3, as in pbkrtest.
        """
        q = len(contrasts)
        inverse = np.linalg.inv(contrasts @ self.covariance @ contrasts.T)
        moved = np.array([inverse @ contrasts @ slope @ contrasts.T for slope in self.slopes])
        traces = np.trace(moved, axis1=1, axis2=2)
        a1 = float(traces @ self.weights @ traces)
        a2 = float(np.einsum("ij,iab,jba->", self.weights, moved, moved))
        values = contrasts @ beta
        wald = float(values @ np.linalg.solve(contrasts @ self.adjusted @ contrasts.T, values)) / q
        if q == 1:
            return wald, 2 / a2, 1.0
        df, scale = _matched(q, a1, a2)
        return scale * wald, df, scale


def coefficients(model: Model, factors: Sequence[Array]) -> Array:
    """b = (X' V^-1 X)^-1 X' V^-1 y, by least squares on whitened data."""
    white = np.linalg.solve(root(model.z, factors), np.column_stack([model.x, model.y]))
    return np.asarray(np.linalg.lstsq(white[:, :-1], white[:, -1], rcond=None)[0])


def kenward_roger(model: Model, factors: Sequence[Array], scale: float) -> KenwardRoger:
    """The adjustment at V = scale (I + sum Z L L' Z').

    The variances enter V linearly: V = sum gamma_i G_i with G_i = Z_a Z_b' + Z_b Z_a' (Z_a Z_a' for a
    variance) and I for the residual. With P = V^-1 - V^-1 X Phi X' V^-1, W = 2 [tr(P G_i P G_j)]^-1 (the
    expected information) and Phi_i = dPhi / d gamma_i = Phi X' V^-1 G_i V^-1 X Phi,

      Phi_A = Phi + 2 Phi [ sum_ij W_ij X' V^-1 G_i P G_j V^-1 X ] Phi.

    In the basis that whitens V and has X first, the bracket and the information are plain products of
    blocks of the G_i. Nothing here needs the variances to be away from 0, so at a singular fit the degrees of
    freedom remain those of the clusters. Source: Kenward and Roger, Biometrics 1997, eqs. 3-6.
    """
    p = model.x.shape[1]
    parts, triangle = _whitened(model, factors)
    back = np.linalg.inv(triangle)
    inner, mixed, outer = parts[:, p:, p:], parts[:, :p, p:], parts[:, :p, :p]
    # In units of the residual variance; Phi and its slopes get theirs below.
    weights = 2 * _inverse(_information(inner, model.rest_df))
    bracket = np.einsum("ij,iab,jcb->ac", weights, mixed, mixed)
    covariance = back @ back.T
    return KenwardRoger(
        covariance=scale * covariance,
        adjusted=scale * (covariance + 2 * back @ bracket @ back.T),
        slopes=back @ outer @ back.T,
        weights=scale**2 * weights,
    )


def identifiable(model: Model) -> bool:
    """Can these rows tell the variances from one another and from the residual?

    Their expected information has the same rank at any variances, so it is taken where V = I.
    """
    parts, _ = _whitened(model, [np.zeros((block.shape[2], block.shape[2])) for block in model.z])
    p = model.x.shape[1]
    information = _information(parts[:, p:, p:], model.rest_df)
    size = np.sqrt(np.diag(information))
    if size.min() <= 1e-8 * size.max():
        return False
    return bool(np.linalg.eigvalsh(information / np.outer(size, size)).min() > 1e-10)


def _whitened(model: Model, factors: Sequence[Array]) -> tuple[Array, Array]:
    """Each G_i in a basis where V is s^2 I and X is [R; 0], the residual's last; and R."""
    lower = root(model.z, factors)
    basis, triangle = np.linalg.qr(np.linalg.solve(lower, model.x), mode="complete")
    p = model.x.shape[1]
    parts = []
    for block in model.z:
        white = basis.T @ np.linalg.solve(lower, block.reshape(len(lower), -1))
        white = white.reshape(block.shape)
        for b in range(block.shape[2]):
            for a in range(b, block.shape[2]):
                half = white[:, :, a] @ white[:, :, b].T
                parts.append(half if a == b else half + half.T)
    inverse = basis.T @ np.linalg.inv(lower)
    return np.array([*parts, inverse @ inverse.T]), triangle[:p]


def _information(inner: Array, rest_df: int) -> Array:
    """tr(P G_i P G_j); outside the basis of the data the residual alone has something to say."""
    information = np.einsum("iab,jab->ij", inner, inner)
    information[-1, -1] += rest_df
    return np.asarray(information)


def _inverse(matrix: Array) -> Array:
    """Inverse of a positive definite matrix whose rows may be of very different size."""
    size = np.sqrt(np.diag(matrix))
    return np.asarray(np.linalg.inv(matrix / np.outer(size, size)) / np.outer(size, size))


def _matched(q: int, a1: float, a2: float) -> tuple[float, float]:
    """Denominator degrees of freedom and scale of the F whose first two moments are matched, for q > 1."""
    b = (a1 + 6 * a2) / (2 * q)
    g = ((q + 1) * a1 - (q + 4) * a2) / ((q + 2) * a2)
    c1, c2, c3 = (part / (3 * q + 2 * (1 - g)) for part in (g, q - g, q + 2 - g))
    # With an exact F both of these are 1 - 2 / df, so 0 / 0 at 2 degrees of freedom; as in pbkrtest.
    above, below = 1 - a2 / q, 1 - c2 * b
    ratio = 1.0 if max(abs(above), abs(below)) < 1e-9 else above / below
    # df = 4 + (q + 2) / (q rho - 1), rho = ratio^2 (1 + c1 B) / (1 - c3 B) / q, which may be infinite.
    df = 4 + (q + 2) * (1 - c3 * b) / (ratio**2 * (1 + c1 * b) - (1 - c3 * b))
    scale = 1.0 if abs(df - 2) < 1e-2 else df * above / (df - 2)
    return df, scale
