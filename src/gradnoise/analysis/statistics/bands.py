"""Bands around an isotonic curve: one that holds, and the bootstrap one that is usually shown."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from gradnoise.analysis.statistics.ebar2 import Array, Direction, isotonic_fits
from gradnoise.analysis.statistics.rows import table_of_means
from gradnoise.analysis.statistics.student import mean_over_clusters
from gradnoise.base.errors import InputError

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True)
class IsotonicBand:
    """Isotonic fit of the level means with two bands; every tuple is in the order of `levels`.

    `low`, `high`: inferential. They hold at all levels at once with probability `confidence` or more, if the
    true means are ordered. `bootstrap_low`, `bootstrap_high`: percentile bootstrap over clusters, only
    descriptive. `bootstrap_coverage`: how often, in `trials` simulated studies, such a band covered the true
    mean of a level, with its standard error. `incomplete`: clusters left out because a level is missing.
    """

    levels: tuple[object, ...]
    fitted: tuple[float, ...]
    low: tuple[float, ...]
    high: tuple[float, ...]
    bootstrap_low: tuple[float, ...]
    bootstrap_high: tuple[float, ...]
    bootstrap_coverage: float
    bootstrap_coverage_se: float
    confidence: float
    alternative: Direction
    draws: int
    trials: int
    clusters: int
    incomplete: tuple[object, ...]

    @property
    def empty(self) -> bool:
        """Whether the inferential band closes somewhere: then no ordered curve fits the data."""
        return any(low > high for low, high in zip(self.low, self.high, strict=True))


def isotonic_band(
    frame: pd.DataFrame,
    outcome: str,
    level: str,
    cluster: str = "seed",
    *,
    alternative: Direction = "increasing",
    confidence: float = 0.95,
    draws: int = 1_999,
    trials: int = 1_000,
    seed: int = 0,
) -> IsotonicBand:
    """Isotonic fit of `outcome` over the sorted values of `level`, with its bands.

    Inferential: m_k +- t(S - 1) se_k at 1 - (1 - confidence) / K, then, as the truth is ordered, the running
    maximum of the lower ends and from the right the running minimum of the upper ones. Descriptive: the
    isotonic fit of resampled clusters' means, at its (1 - confidence) / 2 quantiles. The bootstrap is not
    consistent for isotonic fits and covers too rarely with few clusters, so its coverage is simulated in
    `trials` studies of the same size around the fitted curve, with normal cluster offsets and residuals of
    the estimated variances.

    Rows of one cluster and level are averaged first. `seed` seeds resamples and trials. Raises `InputError`
    with fewer than 2 complete clusters or levels, a level that does not vary between clusters, or rows that
    are not usable (see `rows.used_rows`).
    Source on the bootstrap: Sen, Banerjee and Woodroofe, Annals of Statistics 2010.
    """
    for name, number in (("draws", draws), ("trials", trials)):
        if number < 2:
            raise InputError(name, number, "must be 2 or more")
    complete, incomplete = table_of_means(frame, outcome, cluster, level)
    levels = tuple(complete.columns)
    if len(complete) < 2 or len(levels) < 2:
        found = f"{len(complete)} complete clusters, {len(levels)} levels"
        raise InputError(cluster, found, "give at least 2 clusters that have every one of 2 or more levels")
    sign = 1.0 if alternative == "increasing" else -1.0
    y = sign * complete.to_numpy(dtype=float)
    low, high = simultaneous_band(y, confidence)
    generator = np.random.default_rng(seed)
    boot_low, boot_high = _bootstrap(y, confidence, draws, generator)
    fitted = isotonic_fits(y.mean(axis=0)[None])[0]
    studies = _like(y, fitted, trials, generator)
    covered = np.array([_covers(fitted, study, confidence, draws, generator) for study in studies])

    def turned(lower: Array, upper: Array) -> tuple[tuple[float, ...], tuple[float, ...]]:
        ends = (lower, upper) if sign > 0 else (-upper, -lower)
        return tuple(ends[0].tolist()), tuple(ends[1].tolist())

    (low_, high_), (boot_low_, boot_high_) = turned(low, high), turned(boot_low, boot_high)
    return IsotonicBand(
        levels=levels,
        fitted=tuple((sign * fitted).tolist()),
        low=low_,
        high=high_,
        bootstrap_low=boot_low_,
        bootstrap_high=boot_high_,
        bootstrap_coverage=float(covered.mean()),
        bootstrap_coverage_se=float(covered.std(ddof=1) / np.sqrt(trials)),
        confidence=confidence,
        alternative=alternative,
        draws=draws,
        trials=trials,
        clusters=len(y),
        incomplete=incomplete,
    )


def simultaneous_band(y: Array, confidence: float) -> tuple[Array, Array]:
    """Ends of the inferential band of a table clusters x levels whose true means increase."""
    tail = (1 - confidence) / (2 * y.shape[1])
    scale = float(np.abs(y).max())
    intervals = [mean_over_clusters(column, scale, "level").interval(tail) for column in y.T]
    low, high = np.array(intervals).T
    return np.maximum.accumulate(low), np.minimum.accumulate(high[::-1])[::-1]


def _bootstrap(
    y: Array, confidence: float, draws: int, generator: np.random.Generator
) -> tuple[Array, Array]:
    counts = generator.multinomial(len(y), np.full(len(y), 1 / len(y)), size=draws)
    fits = isotonic_fits(counts @ y / len(y))
    tail = (1 - confidence) / 2
    low, high = np.quantile(fits, [tail, 1 - tail], axis=0)
    return low, high


def _covers(truth: Array, y: Array, confidence: float, draws: int, generator: np.random.Generator) -> float:
    """Share of the levels whose true mean a study's bootstrap band covers."""
    low, high = _bootstrap(y, confidence, draws, generator)
    return float(((low <= truth) & (truth <= high)).mean())


def _like(y: Array, truth: Array, trials: int, generator: np.random.Generator) -> Array:
    """Studies like `y` (clusters x levels) around `truth`: random offsets of clusters, and residuals.

    Variances by moments: residual from the two-way table, offsets from what clusters' means vary beyond it.
    """
    rows, columns = y.shape
    means = y.mean(axis=1)
    left = y - means[:, None] - y.mean(axis=0) + y.mean()
    residual = float((left**2).sum()) / ((rows - 1) * (columns - 1))
    offset = max(0.0, float(means.var(ddof=1)) - residual / columns)
    offsets = generator.normal(0, np.sqrt(offset), (trials, rows, 1))
    return np.asarray(truth + offsets + generator.normal(0, np.sqrt(residual), (trials, rows, columns)))
