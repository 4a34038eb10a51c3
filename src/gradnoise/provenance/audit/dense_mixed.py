"""Linear mixed models once more, by dense matrices and from the formulas of the papers.

Nothing is shared with the analysis: V is built and inverted whole, a fit is not searched but certified, and
the standard errors and degrees of freedom follow pbkrtest's way through the derivatives of X' V^-1 X.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Certificate:
    """What follows from a reported fit (G / sigma^2 and sigma), and how far it is from the optimum.

    `score`: the largest violation of the conditions for a maximum of the restricted likelihood, in
    log-likelihood per natural unit of a covariance: the slope in G is zero, or where a variance is zero
    points outwards, and the slope in sigma^2 is zero. `least`: smallest eigenvalue of G in natural units.
    `phi` is (X' V^-1 X)^-1, `adjusted` Kenward and Roger's covariance of the coefficients, `slopes` its
    derivatives Phi P_r Phi, and `weights` twice the inverse of the information on the variances.
    """

    beta: Array
    phi: Array
    adjusted: Array
    slopes: Array
    weights: Array
    loglik: float
    score: float
    least: float

    def combination(self, weights: Array) -> tuple[float, float, float, float]:
        """l' beta with its adjusted and its plain standard error and its degrees of freedom.

        df = 2 (l' Phi l)^2 / sum_rs W_rs (l' Phi P_r Phi l) (l' Phi P_s Phi l).
        """
        plain = float(weights @ self.phi @ weights)
        slopes = np.array([weights @ part @ weights for part in self.slopes])
        df = 2 * plain**2 / float(slopes @ self.weights @ slopes)
        error = float(np.sqrt(weights @ self.adjusted @ weights))
        return float(weights @ self.beta), error, float(np.sqrt(plain)), df


def covariance(theta: Sequence[float]) -> Array:
    """G / sigma^2 = L L', where `theta` is the lower triangle of L by columns."""
    size = int((np.sqrt(8 * len(theta) + 1) - 1) / 2)
    if size * (size + 1) // 2 != len(theta):
        raise ValueError(f"{len(theta)} entries are no lower triangle")
    lower = np.zeros((size, size))
    columns, rows = np.triu_indices(size)
    lower[rows, columns] = theta
    return lower @ lower.T


def certify(
    y: Array, x: Array, z: Array, clusters: NDArray[np.intp], relative: Array, sigma: float
) -> Certificate:
    """Certify the fit V = sigma^2 (I + sum over clusters of Z G Z'), with G of `relative` = G / sigma^2.

    `x`: n x p with the intercept; `z`: n x effects; `clusters`: n numbers from 0.
    """
    derivatives = _derivatives(z, clusters)
    size = z.shape[1]
    entries = [relative[a, b] for b in range(size) for a in range(b, size)]
    v = sigma**2 * sum((g * d for g, d in zip([*entries, 1.0], derivatives, strict=True)), np.zeros(1))
    inverse = np.linalg.inv(v)
    phi = np.asarray(np.linalg.inv(x.T @ inverse @ x), dtype=float)
    beta = phi @ x.T @ inverse @ y
    projected = inverse - inverse @ x @ phi @ x.T @ inverse
    spare = len(y) - x.shape[1]
    determinants = np.linalg.slogdet(v)[1] - np.linalg.slogdet(phi)[1]
    quadratic = float(y @ projected @ y)
    adjusted, slopes, weights = _kenward_roger(x, inverse, phi, derivatives)
    score, least = _score(y, z, clusters, projected, relative, sigma)
    loglik = -0.5 * (spare * np.log(2 * np.pi) + determinants + quadratic)
    return Certificate(beta, phi, adjusted, slopes, weights, float(loglik), score, least)


def optimum(y: Array, x: Array, z: Array, clusters: NDArray[np.intp]) -> tuple[Array, float]:
    """G / sigma^2 and sigma that maximise the restricted likelihood, searched from small to large variances.

    Over the lower triangle L in natural units D, with G / sigma^2 = D L L' D and sigma profiled out: the
    deviance log|V| + log|X' V^-1 X| + (n - p) log(y' P y) has the slope -4 D M D L in L.
    """
    from scipy.optimize import minimize

    size, spare = z.shape[1], len(y) - x.shape[1]
    units, lower = _units(z, clusters), np.tril_indices(size)
    same = clusters[:, None] == clusters[None, :]

    def at(entries: Array) -> tuple[float, Array, Array, float]:
        triangle = np.zeros((size, size))
        triangle[lower] = entries
        relative = (units[:, None] * triangle) @ (units[:, None] * triangle).T
        inverse = np.linalg.inv(np.eye(len(y)) + same * (z @ relative @ z.T))
        inner = x.T @ inverse @ x
        projected = inverse - inverse @ x @ np.linalg.solve(inner, x.T @ inverse)
        variance = float(y @ projected @ y) / spare
        deviance = np.linalg.slogdet(inner)[1] - np.linalg.slogdet(inverse)[1] + spare * np.log(variance)
        m = _slope(y / np.sqrt(variance), z, clusters, projected)
        slope = -4 * np.outer(units, units) * m @ triangle
        return float(deviance), slope[lower], relative, float(np.sqrt(variance))

    starts = [scale * np.eye(size)[lower] for scale in (0.3, 2.0, 8.0)]
    found = [
        minimize(lambda e: at(e)[:2], s, jac=True, method="BFGS", options={"gtol": 1e-8}).x for s in starts
    ]
    _, _, relative, sigma = at(min(found, key=lambda entries: at(entries)[0]))
    return relative, sigma


def _units(z: Array, clusters: NDArray[np.intp]) -> Array:
    """For each effect the relative standard deviation at which it shows as much as the residual."""
    most = np.max([(z[clusters == code] ** 2).sum(axis=0) for code in np.unique(clusters)], axis=0)
    return np.asarray(np.sqrt(1 / most))


def _derivatives(z: Array, clusters: NDArray[np.intp]) -> list[Array]:
    """dV / dg for the entries g of G's lower triangle by columns, then for the residual variance."""
    same = (clusters[:, None] == clusters[None, :]).astype(float)
    size = z.shape[1]
    found = []
    for b in range(size):
        for a in range(b, size):
            half = np.outer(z[:, a], z[:, b])
            found.append(same * (half if a == b else half + half.T))
    return [*found, np.eye(len(z))]


def _kenward_roger(
    x: Array, inverse: Array, phi: Array, derivatives: Sequence[Array]
) -> tuple[Array, Array, Array]:
    """Adjusted covariance of the fixed effects, the slopes Phi P_r Phi, and the weights W.

    P_r = -X' V^-1 G_r V^-1 X,  Q_rs = X' V^-1 G_r V^-1 G_s V^-1 X,
    I_rs = tr(V^-1 G_r V^-1 G_s) - 2 tr(Phi Q_rs) + tr(Phi P_r Phi P_s),  W = 2 I^-1,
    Phi_A = Phi + 2 Phi [sum_rs W_rs (Q_rs - P_r Phi P_s)] Phi.
    Source: Kenward and Roger, Biometrics 1997; Halekoh and Hojsgaard, Journal of Statistical Software 2014.
    """
    left = [inverse @ g for g in derivatives]
    whole = inverse @ x
    p = [-whole.T @ g @ whole for g in derivatives]
    count = len(derivatives)
    q = [[x.T @ left[r] @ left[s] @ whole for s in range(count)] for r in range(count)]
    information = np.empty((count, count))
    for r in range(count):
        for s in range(count):
            information[r, s] = (
                np.sum(left[r] * left[s].T) - 2 * np.trace(phi @ q[r][s]) + np.trace(phi @ p[r] @ phi @ p[s])
            )
    scale = np.sqrt(np.diag(information))
    w = 2 * np.linalg.inv(information / np.outer(scale, scale)) / np.outer(scale, scale)
    u = sum(
        (w[r, s] * (q[r][s] - p[r] @ phi @ p[s]) for r in range(count) for s in range(count)),
        np.zeros_like(phi),
    )
    return phi + 2 * phi @ u @ phi, np.array([phi @ part @ phi for part in p]), w


def _slope(y: Array, z: Array, clusters: NDArray[np.intp], projected: Array) -> Array:
    """M = dl/dG = -1/2 sum over clusters of (Z' P Z - Z' P y y' P Z)."""
    right = projected @ y
    found = np.zeros((z.shape[1], z.shape[1]))
    for code in np.unique(clusters):
        rows = clusters == code
        shown = z[rows].T @ right[rows]
        found -= 0.5 * (z[rows].T @ projected[np.ix_(rows, rows)] @ z[rows] - np.outer(shown, shown))
    return found


def _score(
    y: Array, z: Array, clusters: NDArray[np.intp], projected: Array, relative: Array, sigma: float
) -> tuple[float, float]:
    """Violation of the conditions for a maximum, and the least eigenvalue of G, in natural units.

    At a maximum over semidefinite G: M G = 0 and M has no positive eigenvalue; tr P = y' P P y.
    """
    unit = _units(z, clusters)
    scaled = sigma**2 * _slope(y, z, clusters, projected) * np.outer(unit, unit)
    g = relative / np.outer(unit, unit)
    residual = 0.5 * sigma**2 * abs(float(np.trace(projected) - y @ projected @ projected @ y)) / len(y)
    outward = max(float(np.linalg.eigvalsh(scaled).max()), 0.0)
    return max(outward, float(np.abs(scaled @ g).max()), residual), float(np.linalg.eigvalsh(g).min())
