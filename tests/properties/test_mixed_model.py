"""What must hold of the mixed model for any data."""

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gradnoise.analysis import MixedFit, fit_mixed

SEEDS = st.integers(0, 2**32 - 1)
SLOPES = {"seed": ["1", "dose"]}


def runs(seed: int, balanced: bool = False) -> pd.DataFrame:
    """5 to 8 seeds with 5 doses; the random effects are as often absent as large."""
    draw = np.random.default_rng(seed)
    clusters = int(draw.integers(5, 9))
    rows = [(s, x, t) for s in range(clusters) for t, x in enumerate(np.linspace(-1, 1, 5))]
    frame = pd.DataFrame(rows, columns=["seed", "dose", "level"])
    frame["batch"] = draw.normal(size=clusters)[frame["seed"]]  # the same in all runs of a seed
    intercepts, slopes = (sd * draw.normal(size=clusters) for sd in draw.choice([0, 0.01, 0.03], 2))
    frame["icl"] = 0.5 + (intercepts[frame["seed"]] + slopes[frame["seed"]] * frame["dose"])
    frame["icl"] += draw.normal(0, 0.01, len(frame))
    if not balanced:
        frame["dose"] += draw.normal(0, 0.1, len(frame))
        frame = frame[draw.random(len(frame)) < 0.9].reset_index(drop=True)
    return frame


def fit(frame: pd.DataFrame, fixed: list[str], random: dict[str, list[str]], **options) -> MixedFit:
    found = fit_mixed(frame, "icl", fixed, random, cross_check=False, **options)
    assert found.converged
    return found


def inference(found: MixedFit, name: str) -> tuple[float, ...]:
    term = found.terms[name]
    return (term.df, term.t, term.p)


@settings(max_examples=25, deadline=None, derandomize=True)
@given(seed=SEEDS, factor=st.floats(1e-3, 1e3), shift=st.floats(-10, 10), unit=st.floats(0.01, 100))
def test_units_do_not_decide(seed: int, factor: float, shift: float, unit: float) -> None:
    frame = runs(seed)
    first = fit(frame, ["dose"], SLOPES)
    scaled = fit(frame.assign(icl=frame["icl"] * factor + shift), ["dose"], SLOPES)
    assert inference(scaled, "dose") == pytest.approx(inference(first, "dose"), rel=1e-5)
    assert scaled.terms["dose"].se == pytest.approx(factor * first.terms["dose"].se, rel=1e-5)
    assert (scaled.theta, scaled.singular) == (pytest.approx(first.theta, rel=1e-4, abs=1e-5), first.singular)
    spare = len(frame) - 2
    assert scaled.loglik == pytest.approx(first.loglik - spare * np.log(factor), rel=1e-8, abs=1e-7)
    moved = fit(frame.assign(dose=frame["dose"] * unit + shift), ["dose"], SLOPES)
    assert inference(moved, "dose") == pytest.approx(inference(first, "dose"), rel=1e-5)
    assert moved.terms["dose"].estimate * unit == pytest.approx(first.terms["dose"].estimate, rel=1e-6)


@settings(max_examples=25, deadline=None, derandomize=True)
@given(seed=SEEDS, order=st.randoms(use_true_random=False), correlated=st.booleans())
def test_row_order_and_names_of_seeds_do_not_matter(seed: int, order, correlated: bool) -> None:
    frame = runs(seed)
    rows, names = list(range(len(frame))), [f"s{k}" for k in range(frame["seed"].nunique())]
    order.shuffle(rows)
    order.shuffle(names)
    other = frame.iloc[rows].assign(seed=lambda moved: moved["seed"].map(dict(enumerate(names))))
    first, second = (fit(rows, ["dose", "batch"], SLOPES, correlated=correlated) for rows in (frame, other))
    assert second.loglik == pytest.approx(first.loglik, rel=1e-10)
    assert second.theta == pytest.approx(first.theta, rel=1e-4, abs=1e-5)
    for name in first.terms:
        assert inference(second, name) == pytest.approx(inference(first, name), rel=1e-5)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(seed=SEEDS)
def test_df_are_never_those_of_rows(seed: int) -> None:
    # Balanced data, singular or not: S - 1 for the intercept and for what varies within seeds with slopes of
    # their own; S - 2 for what varies between seeds.
    frame = runs(seed, balanced=True)
    clusters = frame["seed"].nunique()
    slopes = fit(frame, ["dose"], SLOPES)
    assert [term.df for term in slopes.terms.values()] == pytest.approx([clusters - 1] * 2, rel=1e-5)
    for random in (SLOPES, {"seed": ["1"]}):
        between = fit(frame, ["batch", "dose"], random)
        assert between.terms["batch"].df == pytest.approx(clusters - 2, rel=1e-5)


@settings(max_examples=25, deadline=None, derandomize=True)
@given(seed=SEEDS, weight=st.floats(-3, 3).filter(lambda value: abs(value) > 0.01))
def test_contrasts_intervals_and_tests_are_one_thing(seed: int, weight: float) -> None:
    found = fit(runs(seed), ["dose", "batch"], SLOPES)
    one = found.contrast({"dose": weight})
    assert (one.estimate, one.se) == pytest.approx(
        (weight * found.terms["dose"].estimate, abs(weight) * found.terms["dose"].se)
    )
    assert (one.df, one.p) == pytest.approx((found.terms["dose"].df, found.terms["dose"].p))
    assert (one.low > 0 or one.high < 0) == (one.p < 0.05)
    single = found.wald(["dose"])
    assert (single.f, single.denominator_df, single.p) == pytest.approx((one.t**2, one.df, one.p))
    bounds = found.equivalence({"dose": 1, "batch": weight}, -0.01, 0.02)
    inside = bounds.interval[0] > -0.01 and bounds.interval[1] < 0.02
    assert inside == (bounds.p < 0.05) == (bounds.reading in ("inside margins", "both"))


@settings(max_examples=25, deadline=None, derandomize=True)
@given(seed=SEEDS)
def test_richer_covariances_never_fit_worse(seed: int) -> None:
    # Nested models with the same fixed part: a search that stops early breaks this order.
    frame = runs(seed)
    intercept = fit(frame, ["dose"], {"seed": ["1"]})
    free = fit(frame, ["dose"], SLOPES, correlated=False)
    full = fit(frame, ["dose"], SLOPES)
    crossed = fit(frame, ["dose"], {"seed": ["1"], "level": ["1"]})
    assert intercept.loglik <= free.loglik + 1e-8
    assert free.loglik <= full.loglik + 1e-8
    assert intercept.loglik <= crossed.loglik + 1e-8
