"""Trends over assigned levels once more: isotonic fits from all ways to pool, and the same draws again."""

from __future__ import annotations

from itertools import combinations
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from gradnoise.provenance.audit.evidence import sha256_of
from gradnoise.provenance.audit.second_path import ROUNDING, Unable, one_sample
from gradnoise.provenance.audit.verdicts import holm

if TYPE_CHECKING:
    import pandas as pd

    from gradnoise.registration.kinds import TrendTest
    from gradnoise.registration.plan import Plan

Array = NDArray[np.float64]
Entry = dict[str, Any]

# Draws come from one generator in blocks of this size, so the same seed gives the same permutations.
BLOCK = 2000


def draws_seed(key: str, name: str) -> int:
    """Seed of the draws of a test: first 16 hex digits of SHA-256 of [key, "permutations", name]."""
    return int(sha256_of([key, "permutations", name])[:16], 16)


def isotonic(means: Array, weights: Array | None = None) -> Array:
    """Increasing least-squares fit of means of given weights: pool adjacent violators."""
    weights = np.ones(len(means)) if weights is None else weights
    pools: list[tuple[float, float, int]] = []
    for mean, weight in zip(means, weights, strict=True):
        pool = (float(mean), float(weight), 1)
        while pools and pools[-1][0] > pool[0]:
            mean_before, weight_before, count = pools.pop()
            total = weight_before + pool[1]
            middle = (mean_before * weight_before + pool[0] * pool[1]) / total
            pool = (middle, total, count + pool[2])
        pools.append(pool)
    return np.concatenate([np.full(count, mean) for mean, _, count in pools])


def fitted_squares(means: Array) -> Array:
    """Sum of squares of the increasing fit to each row of means of sum 0 (rows x levels).

    The fit is one of the 2^(K-1) ways to pool neighbours: of those whose pooled means increase, the one with
    the largest sum of squares.
    """
    levels = means.shape[1]
    sums = np.concatenate([np.zeros((len(means), 1)), np.cumsum(means, axis=1)], axis=1)
    best = np.zeros(len(means))
    for cuts in range(levels):
        for inner in combinations(range(1, levels), cuts):
            ends = np.array([0, *inner, levels])
            sizes = np.diff(ends)
            pooled = np.diff(sums[:, ends], axis=1) / sizes
            rising = (np.diff(pooled, axis=1) >= 0).all(axis=1)
            best = np.where(rising, np.maximum(best, pooled**2 @ sizes), best)
    return best


def replay(y: Array, draws: int, seed: int) -> float:
    """(1 + #{E* >= E}) / (1 + draws) over the permutations within seeds that the registered seed gives."""
    generator = np.random.default_rng(seed)
    centred = y - y.mean(axis=1, keepdims=True)
    least = fitted_squares(centred.mean(axis=0)[None])[0] - ROUNDING * float((centred**2).sum())
    reached = 0
    for start in range(0, draws, BLOCK):
        count = min(BLOCK, draws - start)
        shuffled = generator.permuted(np.broadcast_to(centred, (count, *y.shape)), axis=2)
        reached += int((fitted_squares(shuffled.mean(axis=1)) >= least).sum())
    return (1 + reached) / (1 + draws)


def trend(plan: Plan, test: TrendTest, frame: pd.DataFrame, key: str) -> Entry:
    """Isotonic trend, reversals and steps of one test."""
    from scipy import stats

    values, _, incomplete = levels(plan, test, frame)
    runs = len(values) * sum(len(level) for level in test.levels)
    alpha, direction = plan.reading_alpha, 1.0 if test.alternative == "increasing" else -1.0
    y = direction * values
    centred = y - y.mean(axis=1, keepdims=True)
    total = float((centred**2).sum())
    share = len(y) * float(fitted_squares(centred.mean(axis=0)[None])[0]) / total if total else 0.0
    seed = draws_seed(key, test.id)
    p = replay(y, test.draws, seed)
    steps = _steps(y, direction, test.margin)
    worst = max(step["p_margin"] for step in steps)
    page = stats.page_trend_test(y)
    if any(step["p_adjusted"] <= alpha for step in steps):
        reading = "reversal"
    elif p > alpha:
        reading = "undecided"
    else:
        reading = "monotone" if worst <= alpha else "ordered"
    fit, means = direction * isotonic(y.mean(axis=0)), values.mean(axis=0)
    shown = [
        {"level": n, "cells": list(cells), "mean": float(means[n - 1]), "fitted": float(fit[n - 1])}
        for n, cells in enumerate(test.levels, start=1)
    ]
    return {
        "outcome": reading,
        "estimate": share,
        "p": max(p, worst) if test.steps == "required" else p,
        "runs": runs,
        "seeds": len(y),
        "details": {
            "estimate": "E-bar-squared",
            **{"alternative": test.alternative, "draws": test.draws, "seed": seed},
            "page": {"l": float(page.statistic), "p": float(page.pvalue)},
            **{"levels": shown, "steps": steps, "margin": test.margin},
            **{"trend_p": p, "noninferior_p": worst, "incomplete_seeds": len(incomplete)},
        },
    }


def levels(plan: Plan, test: TrendTest, frame: pd.DataFrame) -> tuple[Array, list[int], list[int]]:
    """Seeds x levels of the complete seeds; their indices, and those of seeds that have some whole level."""
    score = plan.outcome(test.outcome).score
    if not len(frame):
        raise Unable("there are no runs")
    wide = frame.pivot_table(index="seed", columns="cell", values=score, aggfunc="mean")
    wide = wide.reindex(columns=[cell for level in test.levels for cell in level])
    # A level's mean stands for all of its cells or for nothing.
    means = np.column_stack([wide[list(level)].mean(axis=1, skipna=False) for level in test.levels])
    absent = np.isnan(means)
    if absent.all(axis=0).any():
        raise Unable("a level has no runs")
    complete = ~absent.any(axis=1)
    if complete.sum() < 2:
        raise Unable("fewer than 2 complete seeds")
    some = ~complete & ~absent.all(axis=1)
    return means[complete], wide.index[complete].tolist(), wide.index[some].tolist()


def _steps(y: Array, direction: float, margin: float) -> list[Entry]:
    """Every step between neighbouring levels of a table that was turned to rise."""
    scale, found = float(np.abs(y).max()), []
    for k in range(y.shape[1] - 1):
        step = y[:, k + 1] - y[:, k]
        against = one_sample(step, scale, "less", 0.9)
        lost = one_sample(step + margin, scale, "greater", 0.9)
        found.append(
            {
                **{"lower": k + 1, "upper": k + 2, "difference": direction * against["estimate"]},
                **{"se": against["stderr"], "p": against["p"], "p_margin": lost["p"]},
            }
        )
    adjusted = holm([step["p"] for step in found], 1.0)
    return [step | {"p_adjusted": p} for step, p in zip(found, adjusted, strict=True)]
