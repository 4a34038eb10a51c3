"""A mixed model written out with whole matrices, line by line from the papers: slow, and independent."""

from collections.abc import Sequence

import numpy as np
import pandas as pd
from numpy.typing import NDArray

Array = NDArray[np.float64]
# One cluster column with the columns whose coefficients vary over it, correlated.
Block = tuple[NDArray[np.generic], Array]


def block(frame: pd.DataFrame, cluster: str, terms: Sequence[str]) -> Block:
    columns = [np.ones(len(frame)) if term == "1" else frame[term].to_numpy(float) for term in terms]
    return frame[cluster].to_numpy(), np.column_stack(columns)


def unpack(theta: Sequence[float], blocks: Sequence[Block]) -> list[Array]:
    """Relative covariances L L' from `MixedFit.theta`."""
    found, rest = [], list(theta)
    for _, values in blocks:
        k = values.shape[1]
        factor = np.zeros((k, k))
        for j in range(k):
            for i in range(j, k):
                factor[i, j] = rest.pop(0)
        found.append(factor @ factor.T)
    assert not rest
    return found


def basis(blocks: Sequence[Block]) -> list[Array]:
    """dV / d gamma for each variance and covariance, in the order of theta, and for the residual."""
    parts = []
    for names, values in blocks:
        same = names[:, None] == names[None, :]
        k = values.shape[1]
        for j in range(k):
            for i in range(j, k):
                outer = np.outer(values[:, i], values[:, j])
                parts.append(same * (outer if i == j else outer + outer.T))
    return [*parts, np.eye(len(blocks[0][0]))]


def covariance(relative: Sequence[Array], blocks: Sequence[Block]) -> Array:
    """V / s^2."""
    total = np.eye(len(blocks[0][0]))
    for (names, values), matrix in zip(blocks, relative, strict=True):
        total += (names[:, None] == names[None, :]) * (values @ matrix @ values.T)
    return total


def restricted(y: Array, x: Array, total: Array) -> tuple[float, float]:
    """Restricted log-likelihood with b and s^2 profiled out, and s^2; `total` is V / s^2."""
    n, p = x.shape
    inverse = np.linalg.inv(total)
    information = x.T @ inverse @ x
    residual = y - x @ np.linalg.solve(information, x.T @ inverse @ y)
    s2 = float(residual @ inverse @ residual) / (n - p)
    logdets = np.linalg.slogdet(total)[1] + np.linalg.slogdet(information)[1]
    return float(-0.5 * ((n - p) * (np.log(2 * np.pi * s2) + 1) + logdets)), s2


def certificate(
    y: Array, x: Array, relative: Sequence[Array], blocks: Sequence[Block]
) -> tuple[float, float]:
    """Largest entry of M L and lowest eigenvalue of M over the blocks; M is d(-2 loglik) / d(L L'), scaled.

    M is scaled to where each effect adds as much as the residual. At an optimum both are 0, or the second is
    above 0.
    """
    total = covariance(relative, blocks)
    _, s2 = restricted(y, x, total)
    inverse = np.linalg.inv(total)
    projector = inverse - inverse @ x @ np.linalg.solve(x.T @ inverse @ x, x.T @ inverse)
    pull = projector - np.outer(projector @ y, projector @ y) / s2
    scores, lowest = [0.0], [np.inf]
    for (names, values), matrix in zip(blocks, relative, strict=True):
        same = names[:, None] == names[None, :]
        slope = values.T @ (same * pull) @ values
        unit = 1 / np.sqrt(np.array([np.linalg.norm(same * np.outer(v, v), 2) for v in values.T]))
        slope = unit[:, None] * slope * unit
        scores.append(float(np.abs(slope @ (matrix / np.outer(unit, unit))).max()))
        lowest.append(float(np.linalg.eigvalsh(slope).min()))
    return max(scores), min(lowest)


def kenward_roger(
    x: Array, total: Array, parts: Sequence[Array], contrasts: Array
) -> tuple[Array, float, float]:
    """Adjusted covariance of b, df and scale of the F of `contrasts`, for V itself: pbkrtest's formulas."""
    inverse = np.linalg.inv(total)
    phi = np.linalg.inv(x.T @ inverse @ x)
    r = len(parts)
    first = [-x.T @ inverse @ part @ inverse @ x for part in parts]
    second = [[x.T @ inverse @ a @ inverse @ b @ inverse @ x for b in parts] for a in parts]
    information = np.array(
        [
            [
                np.trace(inverse @ parts[i] @ inverse @ parts[j])
                - 2 * np.trace(phi @ second[i][j])
                + np.trace(phi @ first[i] @ phi @ first[j])
                for j in range(r)
            ]
            for i in range(r)
        ]
    )
    weights = 2 * np.linalg.inv(information)
    middle = sum(
        weights[i, j] * (second[i][j] - first[i] @ phi @ first[j]) for i in range(r) for j in range(r)
    )
    adjusted = phi + 2 * phi @ middle @ phi
    q = len(contrasts)
    theta = contrasts.T @ np.linalg.inv(contrasts @ phi @ contrasts.T) @ contrasts
    moved = [theta @ phi @ part @ phi for part in first]
    a1 = sum(weights[i, j] * np.trace(moved[i]) * np.trace(moved[j]) for i in range(r) for j in range(r))
    a2 = sum(weights[i, j] * np.trace(moved[i] @ moved[j]) for i in range(r) for j in range(r))
    b = (a1 + 6 * a2) / (2 * q)
    g = ((q + 1) * a1 - (q + 4) * a2) / ((q + 2) * a2)
    bottom = 3 * q + 2 * (1 - g)
    mean = 1 / (1 - a2 / q)
    variance = (
        2 / q * (1 + g / bottom * b) / ((1 - (q - g) / bottom * b) ** 2 * (1 - (q + 2 - g) / bottom * b))
    )
    rho = variance / (2 * mean**2)
    df = 4 + (q + 2) / (q * rho - 1)
    return adjusted, float(df), float(df / (mean * (df - 2)))
