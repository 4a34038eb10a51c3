"""What must hold of the statistics for any data."""

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gradnoise.analysis import (
    anova,
    cluster_robust,
    contrast,
    ebar2_test,
    holm,
    isotonic_band,
    mediation,
    seed_slopes,
    spearman,
    tost,
    trend,
    wild_bootstrap,
)
from gradnoise.base.errors import InputError

SEEDS = st.integers(0, 2**32 - 1)


def runs(seed: int, clusters: int = 5, levels: int = 4) -> pd.DataFrame:
    """One run per seed and level, with a random slope and random offsets."""
    draw = np.random.default_rng(seed)
    frame = pd.DataFrame([(s, k) for s in range(clusters) for k in range(levels)], columns=["seed", "level"])
    frame["dose"] = frame["level"] + draw.normal(0, 0.1, len(frame))
    frame["sharp"] = -0.5 * frame["dose"] + draw.normal(0, 0.3, len(frame))
    slopes = draw.normal(0.01, 0.01, clusters)[frame["seed"]]
    frame["icl"] = 0.5 + slopes * frame["dose"] + draw.normal(0, 0.01, len(frame))
    return frame


ANALYSES = (
    "slope",
    "slope given a covariate",
    "contrast",
    "tost",
    "trend",
    "ebar2",
    "band",
    "spearman",
    "anova",
    "cr2",
    "wild",
    "mediation",
)


def analyse(name: str, frame: pd.DataFrame, unit: float = 1.0) -> list[float]:
    """The numbers of one analysis that no choice of units may change; margins are in units of the outcome."""
    match name:
        case "slope":
            slope = seed_slopes(frame, "icl", "dose")
            return [slope.t, slope.p]
        case "slope given a covariate":
            return [seed_slopes(frame, "icl", "dose", covariates=["sharp"]).p]
        case "contrast":
            return [contrast(frame, "icl", "level", ([2, 3], [0])).p]
        case "tost":
            pair = tost(frame, "icl", "level", (0, 3), low=-0.02 * unit, high=0.03 * unit)
            return [pair.p_low, pair.p_high, pair.p_zero]
        case "trend":
            found = trend(frame, "icl", "level", margin=0.02 * unit, draws=19)
            steps = [step.p_adjusted for step in found.reversals]
            return [found.ebar2, found.page_p, found.noninferior_p, *steps]
        case "ebar2":
            return [ebar2_test(frame, "icl", "level").p]
        case "band":
            band = isotonic_band(frame, "icl", "level", draws=9, trials=2)
            return [(end - frame["icl"].mean()) / unit for end in band.low + band.high]
        case "spearman":
            rank = spearman(frame, "icl", "dose")
            return [rank.p, rank.pooled_rho]
        case "anova":
            terms = anova(frame, "icl", ["level"]).terms.values()
            return [p for term in terms for p in (term.p, term.robust_p)]
        case "cr2":
            pooled = cluster_robust(frame, "icl", ["dose", "sharp"]).terms["dose"]
            within = cluster_robust(frame, "icl", ["dose"], within=True).terms["dose"]
            return [pooled.p, pooled.df, within.p, within.df]
        case "wild":
            return [wild_bootstrap(frame, "icl", "dose", covariates=["sharp"]).p]
        case _:
            path = mediation(frame, "icl", "dose", "sharp")
            return [path.p, path.rho_at_zero, path.low / path.indirect, path.high / path.indirect]


analyses = pytest.mark.parametrize("name", ANALYSES)


@analyses
@settings(max_examples=10, deadline=None, derandomize=True)
@given(seed=SEEDS, factor=st.floats(0.01, 100), shift=st.floats(-10, 10))
def test_units_do_not_decide(name: str, seed: int, factor: float, shift: float) -> None:
    frame = runs(seed)
    other = frame.assign(icl=frame["icl"] * factor + shift)
    expected = analyse(name, frame)
    assert analyse(name, other, factor) == pytest.approx(expected, rel=1e-6, abs=1e-9)


@analyses
@settings(max_examples=10, deadline=None, derandomize=True)
@given(seed=SEEDS, factor=st.floats(0.01, 100), shift=st.floats(-10, 10))
def test_units_of_the_dose_do_not_decide(name: str, seed: int, factor: float, shift: float) -> None:
    frame = runs(seed)
    other = frame.assign(dose=frame["dose"] * factor + shift)
    expected = analyse(name, frame)
    assert analyse(name, other) == pytest.approx(expected, rel=1e-6, abs=1e-9)


@analyses
@settings(max_examples=10, deadline=None, derandomize=True)
@given(seed=SEEDS, order=st.randoms(use_true_random=False))
def test_row_order_and_names_of_seeds_do_not_matter(name: str, seed: int, order) -> None:
    frame = runs(seed)
    rows, names = list(range(len(frame))), list("abcde")
    order.shuffle(rows)
    order.shuffle(names)
    other = frame.iloc[rows].assign(seed=lambda rows: rows["seed"].map(dict(enumerate(names))))
    assert analyse(name, other) == pytest.approx(analyse(name, frame), rel=1e-6, abs=1e-9)


@analyses
def test_a_run_given_twice_is_refused(name: str) -> None:
    frame = runs(1)
    with pytest.raises(InputError, match="rows: .* is given twice"):
        analyse(name, pd.concat([frame, frame.iloc[[7]]]))


@analyses
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_run_without_a_score_is_refused(name: str, value: float) -> None:
    frame = runs(1)
    frame.loc[3, "icl"] = value
    with pytest.raises(InputError, match="icl: missing or infinite"):
        analyse(name, frame)


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
