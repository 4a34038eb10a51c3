"""Linear mixed models once more, by dense matrices and from the formulas of the papers.

Nothing is shared with the analysis: V is built whole and whitened by its Cholesky factor, a fit is not
searched but certified, and standard errors and degrees of freedom follow from the derivatives of V.
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
    `phi` is (X' V^-1 X)^-1, `adjusted` Kenward and Roger's covariance of the coefficients, `slopes` the
    derivatives of phi, and `weights` twice the inverse of the information on the variances.
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

        df = 2 (l' Phi l)^2 / sum_rs W_rs (l' Phi_r l) (l' Phi_s l).
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
    # Orthonormal columns for X and Z: the same model, in which nothing cancels.
    (x, back), (z, turn) = np.linalg.qr(x), np.linalg.qr(z)
    relative = turn @ relative @ turn.T
    white = _Whitened(y, x, z, clusters, relative, sigma)
    phi, adjusted, slopes, weights = white.kenward_roger()
    undo = np.linalg.inv(back)
    quadratic, spare = float(white.residual @ white.residual), len(y) - x.shape[1]
    determinants = white.determinants + 2 * np.log(np.abs(np.diag(back))).sum()
    score, least = _score(white, relative, sigma)
    return Certificate(
        beta=undo @ white.beta,
        phi=undo @ phi @ undo.T,
        adjusted=undo @ adjusted @ undo.T,
        slopes=undo @ slopes @ undo.T,
        weights=weights,
        loglik=float(-0.5 * (spare * np.log(2 * np.pi) + determinants + quadratic)),
        score=score,
        least=least,
    )


def optimum(y: Array, x: Array, z: Array, clusters: NDArray[np.intp]) -> tuple[Array, float]:
    """G / sigma^2 and sigma that maximise the restricted likelihood, searched from small to large variances.

    Over the lower triangle L in natural units D, with G / sigma^2 = D L L' D and sigma profiled out: the
    deviance log|V| + log|X' V^-1 X| + (n - p) log(y' P y) has the slope -4 D M D L in L.
    """
    from scipy.optimize import minimize

    size, spare = z.shape[1], len(y) - x.shape[1]
    (x, _), (z, turn) = np.linalg.qr(x), np.linalg.qr(z)
    units, lower = _units(z, clusters), np.tril_indices(size)

    def at(entries: Array) -> tuple[float, Array, Array, float]:
        triangle = np.zeros((size, size))
        triangle[lower] = entries
        relative = (units[:, None] * triangle) @ (units[:, None] * triangle).T
        white = _Whitened(y, x, z, clusters, relative, 1.0)
        variance = float(white.residual @ white.residual) / spare
        slope = -4 * np.outer(units, units) * white.slope(variance) @ triangle
        return white.determinants + spare * np.log(variance), slope[lower], relative, float(np.sqrt(variance))

    starts = [scale * np.eye(size)[lower] for scale in (0.3, 2.0, 8.0, 50.0)]
    ends = [
        minimize(lambda e: at(e)[:2], s, jac=True, method="BFGS", options={"gtol": 1e-8}).x for s in starts
    ]
    _, _, relative, sigma = at(min(ends, key=lambda entries: at(entries)[0]))
    undo = np.linalg.inv(turn)
    return undo @ relative @ undo.T, sigma


def _units(z: Array, clusters: NDArray[np.intp]) -> Array:
    """For each effect the relative standard deviation at which it shows as much as the residual."""
    most = np.max([(z[clusters == code] ** 2).sum(axis=0) for code in np.unique(clusters)], axis=0)
    return np.asarray(np.sqrt(1 / most))


class _Whitened:
    """A model seen through C^-1, where V = C C': there V is I, and P projects off the columns of X.

    `residual` is P y and `beta` the coefficients; `determinants` is log|V| + log|X' V^-1 X|.
    """

    def __init__(
        self, y: Array, x: Array, z: Array, clusters: NDArray[np.intp], relative: Array, sigma: float
    ) -> None:
        from scipy.linalg import solve_triangular

        same = clusters[:, None] == clusters[None, :]
        root = sigma * np.linalg.cholesky(np.eye(len(y)) + same * (z @ relative @ z.T))
        self.inverse = solve_triangular(root, np.eye(len(y)), lower=True)
        self.z, self.clusters = z, clusters
        self.basis, self.triangle = np.linalg.qr(self.inverse @ x)
        shown = self.inverse @ y
        self.beta = np.linalg.solve(self.triangle, self.basis.T @ shown)
        self.residual = self.project(shown)
        logs = np.log(np.abs(np.diag(root))).sum() + np.log(np.abs(np.diag(self.triangle))).sum()
        self.determinants = float(2 * logs)

    def project(self, columns: Array) -> Array:
        """P times columns."""
        return np.asarray(columns - self.basis @ (self.basis.T @ columns))

    def slope(self, variance: float = 1.0) -> Array:
        """M = dl/dG = -1/2 sum over clusters of (Z' P Z - Z' P y y' P Z), with y of this variance."""
        found = np.zeros((self.z.shape[1], self.z.shape[1]))
        for columns in self._effects():
            seen, shown = self.project(columns), columns.T @ self.residual
            found -= 0.5 * (columns.T @ seen - np.outer(shown, shown) / variance)
        return found

    def trace(self) -> float:
        """tr P - y' P P y in the unwhitened space: twice the slope in sigma^2, turned in sign."""
        seen, shown = self.project(self.inverse), self.inverse.T @ self.residual
        return float((self.inverse * seen).sum() - shown @ shown)

    def kenward_roger(self) -> tuple[Array, Array, Array, Array]:
        """Phi, the adjusted covariance, the slopes of Phi and the weights W.

        With H_r = C^-1 G_r C^-T the whitened derivatives of V and X = C^-1 X: Phi_r = Phi X' H_r X Phi,
        I_rs = tr(P H_r P H_s), W = 2 I^-1, Phi_A = Phi + 2 Phi [sum_rs W_rs X' H_r P H_s X] Phi.
        Source: Kenward and Roger, Biometrics 1997; Halekoh and Hojsgaard, Journal of Statistical Software
        2014.
        """
        derivatives = self._derivatives()
        left = [h - self.basis @ (self.basis.T @ h) for h in derivatives]
        within = [half - (half @ self.basis) @ self.basis.T for half in left]
        mixed = [half @ self.basis for half in left]
        information = np.array([[np.sum(a * b.T) for b in within] for a in within])
        scale = np.sqrt(np.diag(information))
        weights = 2 * np.linalg.inv(information / np.outer(scale, scale)) / np.outer(scale, scale)
        count = range(len(derivatives))
        bracket = sum(weights[r, s] * mixed[r].T @ mixed[s] for r in count for s in count)
        undo = np.linalg.inv(self.triangle)
        phi = undo @ undo.T
        slopes = np.array([undo @ self.basis.T @ h @ self.basis @ undo.T for h in derivatives])
        return phi, phi + 2 * undo @ bracket @ undo.T, slopes, weights

    def _effects(self) -> list[Array]:
        """The whitened columns of Z of each cluster."""
        return [
            self.inverse[:, self.clusters == code] @ self.z[self.clusters == code]
            for code in np.unique(self.clusters)
        ]

    def _derivatives(self) -> list[Array]:
        """H_r for the entries of G's lower triangle by columns, then for the residual variance."""
        effects, size, found = self._effects(), self.z.shape[1], []
        for b in range(size):
            for a in range(b, size):
                half = sum((part[:, [a]] @ part[:, [b]].T for part in effects), np.zeros(1))
                found.append(half if a == b else half + half.T)
        return [*found, self.inverse @ self.inverse.T]


def _score(white: _Whitened, relative: Array, sigma: float) -> tuple[float, float]:
    """Violation of the conditions for a maximum, and the least eigenvalue of G, in natural units.

    At a maximum over semidefinite G: M G = 0 and M has no positive eigenvalue; tr P = y' P P y.
    """
    unit = _units(white.z, white.clusters)
    scaled = sigma**2 * white.slope() * np.outer(unit, unit)
    g = relative / np.outer(unit, unit)
    residual = 0.5 * sigma**2 * abs(white.trace()) / len(white.inverse)
    outward = max(float(np.linalg.eigvalsh(scaled).max()), 0.0)
    return max(outward, float(np.abs(scaled @ g).max()), residual), float(np.linalg.eigvalsh(g).min())
