"""Error rates and power over thousands of simulated studies: what the tests claim must be what they do.

Every bound is three standard errors of the simulation, so with other seeds about one assertion in 400 would
fail by chance; the seeds are fixed.
"""

from collections.abc import Callable

import numpy as np
import pandas as pd
import pytest

from gradnoise.analysis import contrast, seed_bootstrap, seed_slopes, sign_flip, tost, wild_bootstrap
from gradnoise.analysis.statistics.ebar2 import permutation_p
from gradnoise.analysis.statistics.isotonic import reversals_of
from gradnoise.analysis.statistics.resampling import resamples

pytestmark = pytest.mark.slow

ALPHA, LEVELS, STUDIES = 0.05, 6, 2000
DOSES = np.linspace(-1, 1, LEVELS)


def studies(seeds: int, slope_sd: float, stream: int, count: int = STUDIES) -> np.ndarray:
    """Scores, studies x seeds x levels: seeds differ in offset and slope, and on average nothing happens."""
    draw = np.random.default_rng([stream, seeds])
    offsets = draw.normal(0, 0.02, (count, seeds, 1))
    slopes = draw.normal(0, slope_sd, (count, seeds, 1)) * DOSES
    return 0.4 + offsets + slopes + draw.normal(0, 0.010, (count, seeds, LEVELS))


def framed(y: np.ndarray) -> pd.DataFrame:
    seed, level = np.indices(y.shape)
    return pd.DataFrame(
        {"seed": seed.ravel(), "level": level.ravel(), "dose": DOSES[level.ravel()], "icl": y.ravel()}
    )


def near(found: float, expected: float, count: int = STUDIES) -> bool:
    return abs(found - expected) <= 3 * np.sqrt(expected * (1 - expected) / count)


def lifted(y: np.ndarray) -> np.ndarray:
    """The last level truly differs from the first by the margin of the equivalence test."""
    return y + 0.03 * (np.arange(LEVELS) == LEVELS - 1)


TESTS: dict[str, Callable[[np.ndarray], float]] = {
    "slope": lambda y: seed_slopes(framed(y), "icl", "dose").p,
    "contrast": lambda y: contrast(framed(y), "icl", "level", ([4, 5], [0, 1])).p,
    "tost": lambda y: tost(framed(lifted(y)), "icl", "level", (5, 0), low=-0.03, high=0.03).p,
}


@pytest.mark.parametrize("seeds", [5, 8])
@pytest.mark.parametrize("name", list(TESTS))
def test_paired_tests_keep_their_level_though_seeds_differ_in_slope(name: str, seeds: int) -> None:
    # Seeds' slopes of this size make a mixed model without random slopes reject in 22 % of such studies.
    slope_sd = 0.002 if name == "tost" else 0.010
    p = [TESTS[name](y) for y in studies(seeds, slope_sd, stream=1)]
    assert near(np.mean(np.array(p) <= ALPHA), ALPHA)


@pytest.mark.parametrize("seeds", [5, 8])
def test_trend_and_reversals_keep_their_level_where_nothing_happens(seeds: int) -> None:
    trends, families = [], []
    for number, y in enumerate(studies(seeds, 0.0, stream=2)):
        trends.append(permutation_p(y, draws=199, seed=number))
        families.append(min(step.p_adjusted for step in reversals_of(y, range(LEVELS), 1.0, 0.02)))
    assert near(np.mean(np.array(trends) <= ALPHA), ALPHA)
    # One false reversal among five steps: Holm holds the family, and wastes little.
    assert near(np.mean(np.array(families) <= ALPHA), ALPHA)


def test_trend_finds_effects_in_seeds_that_cancel_on_average() -> None:
    # Permuting within seeds tests "no effect in any seed": with slopes of both signs it rejects too often for
    # a test of the mean, which is why the slope test decides beside it.
    p = [permutation_p(y, 199, k) for k, y in enumerate(studies(5, 0.010, stream=3))]
    assert np.mean(np.array(p) <= ALPHA) > 0.09


@pytest.mark.parametrize("seeds", [5, 8])
def test_sensitivities_have_the_error_rates_that_the_report_states(seeds: int) -> None:
    rejected = {"flip": 0, "studentised": 0, "wild": 0}
    for number, y in enumerate(studies(seeds, 0.010, stream=4)):
        slopes = y @ DOSES / (DOSES @ DOSES)
        rejected["flip"] += sign_flip(slopes).p <= ALPHA
        rejected["studentised"] += seed_bootstrap(slopes, draws=999, seed=number).p <= ALPHA
        rejected["wild"] += wild_bootstrap(framed(y), "icl", "dose", draws=399, seed=number).p <= ALPHA
    rates = {name: count / STUDIES for name, count in rejected.items()}
    # Exact, at the multiple of 2 / 2^S next below alpha: nothing at 5 seeds.
    assert near(rates["flip"], 12 / 256) if seeds == 8 else rates["flip"] == 0
    assert near(rates["studentised"], {5: 0.051, 8: 0.058}[seeds])
    assert near(rates["wild"], {5: 0.060, 8: 0.056}[seeds])


@pytest.mark.parametrize(("seeds", "expected"), [(5, 0.160), (8, 0.115)])
def test_percentile_intervals_of_seeds_would_err_far_too_often(seeds: int, expected: float) -> None:
    # Why they are not offered.
    counts, weights, _ = resamples(seeds, 10_000, 0)
    slopes = studies(seeds, 0.010, stream=5) @ DOSES / (DOSES @ DOSES)
    missed = 0
    for values in slopes:
        means = counts @ values / seeds
        order = np.argsort(means)
        low, high = means[order][np.searchsorted(np.cumsum(weights[order]), [0.025, 0.975])]
        missed += not low <= 0 <= high
    assert near(missed / STUDIES, expected)


@pytest.mark.parametrize(
    ("seeds", "reversal", "noninferior"), [(5, 0.25, 0.15), (10, 0.71, 0.27)], ids=["5", "10"]
)
def test_a_late_drop_passes_as_a_trend_and_is_found_by_its_reversal(
    seeds: int, reversal: float, noninferior: float
) -> None:
    curve = np.array([0, 0.01, 0.02, 0.03, 0.04, 0.025])
    trends, reversals, passes = [], [], []
    for number, y in enumerate(curve + studies(seeds, 0.0, stream=6, count=1000)):
        if number < 200:
            trends.append(permutation_p(y, 99, number) <= ALPHA)
        steps = reversals_of(y, range(LEVELS), 1.0, 0.02)
        reversals.append(min(step.p_adjusted for step in steps) <= ALPHA)
        passes.append(max(step.p_margin for step in steps) <= ALPHA)
    assert np.mean(trends) > 0.99
    assert near(np.mean(reversals), reversal, 1000)
    assert near(np.mean(passes), noninferior, 1000)


def test_a_hump_is_significant_in_both_directions() -> None:
    curve = np.array([0, 0.01, 0.02, 0.03, 0.02, 0.005])
    found = {1.0: 0, -1.0: 0}
    falls = 0
    for number, y in enumerate(curve + studies(10, 0.0, stream=7, count=200)):
        for sign in found:
            found[sign] += permutation_p(sign * y, 99, number) <= ALPHA
        falls += min(step.p_adjusted for step in reversals_of(y, range(LEVELS), 1.0, 0.02)) <= ALPHA
    assert found[1.0] / 200 > 0.95
    assert found[-1.0] / 200 > 0.3
    assert falls / 200 > 0.7
