"""What must hold of the statistics for any data."""

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gradnoise.analysis import holm, seed_slopes, tost, trend

SEEDS = st.integers(0, 2**32 - 1)


def runs(seed: int, clusters: int = 5, levels: int = 4) -> pd.DataFrame:
    """One run per seed and level, with a random slope and random offsets."""
    draw = np.random.default_rng(seed)
    frame = pd.DataFrame([(s, k) for s in range(clusters) for k in range(levels)], columns=["seed", "level"])
    frame["dose"] = frame["level"] + draw.normal(0, 0.1, len(frame))
    slopes = draw.normal(0.01, 0.01, clusters)[frame["seed"]]
    frame["icl"] = 0.5 + slopes * frame["dose"] + draw.normal(0, 0.01, len(frame))
    return frame


@settings(max_examples=25, deadline=None, derandomize=True)
@given(seed=SEEDS, factor=st.floats(0.01, 100), shift=st.floats(-10, 10))
def test_units_do_not_decide(seed: int, factor: float, shift: float) -> None:
    frame = runs(seed)
    other = frame.assign(icl=frame["icl"] * factor + shift)
    assert seed_slopes(other, "icl", "dose").p == pytest.approx(seed_slopes(frame, "icl", "dose").p, rel=1e-6)
    first = tost(frame, "icl", "level", (0, 3), low=-0.02, high=0.03)
    second = tost(other, "icl", "level", (0, 3), low=-0.02 * factor, high=0.03 * factor)
    assert second.p == pytest.approx(first.p, rel=1e-6)
    assert second.reading == first.reading
    settings_ = {"outcome": "icl", "level": "level", "draws": 99}
    assert trend(other, margin=0.02 * factor, **settings_).p == trend(frame, margin=0.02, **settings_).p


@settings(max_examples=25, deadline=None, derandomize=True)
@given(seed=SEEDS, order=st.randoms(use_true_random=False))
def test_row_order_and_names_of_seeds_do_not_matter(seed: int, order) -> None:
    frame = runs(seed)
    rows = list(range(len(frame)))
    order.shuffle(rows)
    other = frame.iloc[rows].assign(seed=lambda rows: "s" + rows["seed"].astype(str))
    assert tost(other, "icl", "level", (0, 3), low=-0.02, high=0.02).p == pytest.approx(
        tost(frame, "icl", "level", (0, 3), low=-0.02, high=0.02).p
    )
    assert seed_slopes(other, "icl", "dose").p == pytest.approx(seed_slopes(frame, "icl", "dose").p)
    assert trend(other, "icl", "level", margin=0.02, draws=99).ebar2 == pytest.approx(
        trend(frame, "icl", "level", margin=0.02, draws=99).ebar2
    )


@settings(max_examples=50, deadline=None, derandomize=True)
@given(
    seed=SEEDS, low=st.floats(-0.1, -0.001), high=st.floats(0.001, 0.1), alpha=st.sampled_from([0.01, 0.05])
)
def test_tost_and_its_interval_agree(seed: int, low: float, high: float, alpha: float) -> None:
    found = tost(runs(seed), "icl", "level", (0, 3), low=low, high=high, alpha=alpha)
    inside = low < found.interval[0] and found.interval[1] < high
    assert inside == (found.p < alpha) == (found.reading in ("inside margins", "both"))


@settings(max_examples=100, deadline=None, derandomize=True)
@given(p=st.lists(st.one_of(st.none(), st.floats(0, 1)), min_size=1, max_size=8))
def test_holm_keeps_order_never_lowers_and_a_failure_helps_nobody(p: list[float | None]) -> None:
    adjusted = holm(p)
    filled = [1.0 if value is None else value for value in p]
    assert all(raw <= corrected <= 1 for raw, corrected in zip(filled, adjusted, strict=True))
    for i, first in enumerate(filled):
        for j, second in enumerate(filled):
            assert not (first < second and adjusted[i] > adjusted[j])
    failed = holm([None, *p[1:]])
    assert all(after >= before - 1e-12 for before, after in zip(adjusted, failed, strict=True))


def test_the_deciding_tests_keep_their_error_rate_at_five_seeds() -> None:
    # No effect in any seed: each must reject at .05 about 5 times in 100 (300 trials, 3 standard errors).
    draw = np.random.default_rng(11)
    frame, trials = runs(0), 300
    rejected = np.zeros(2)
    for _ in range(trials):
        frame["icl"] = draw.normal(size=len(frame)) + draw.normal(size=5)[frame["seed"]]
        rejected[0] += seed_slopes(frame, "icl", "dose").p <= 0.05
        rejected[1] += trend(frame, "icl", "level", margin=0.1, draws=199).p <= 0.05
    assert np.all(np.abs(rejected / trials - 0.05) < 3 * np.sqrt(0.05 * 0.95 / trials))
