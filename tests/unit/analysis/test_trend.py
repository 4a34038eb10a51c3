"""Trends over ordered levels, against R and against what a trend test alone would hide."""

from itertools import combinations, permutations

import numpy as np
import pandas as pd
import pytest
from scipy import optimize, stats
from tests.unit.analysis.oracle import D1, D3, D5_RUNS, R

from gradnoise.analysis import ebar2_test, isotonic_band, trend
from gradnoise.analysis.statistics.bands import simultaneous_band
from gradnoise.analysis.statistics.ebar2 import ebar2, isotonic_fit, isotonic_fits, level_probabilities
from gradnoise.analysis.statistics.isotonic import isotonic_curve, reversals_of
from gradnoise.base.errors import InputError


def wide(frame: pd.DataFrame) -> np.ndarray:
    return frame.pivot(index="seed", columns="level", values="icl").to_numpy()


@pytest.mark.parametrize(
    ("frame", "answer"), [(D1, R["d1"]["ebar2"]), (D5_RUNS, R["d5"]["ebar2_runmeans"])], ids=["d1", "d5"]
)
def test_ebar2_and_its_exact_p_are_rs(frame: pd.DataFrame, answer: dict) -> None:
    found = ebar2_test(frame, "icl", "level")
    assert found.ebar2 == pytest.approx(answer["E2"], rel=1e-12)
    assert found.p == pytest.approx(answer["p"], rel=1e-12)
    assert found.weights == pytest.approx(answer["weights"], rel=1e-13)
    assert list(found.fitted.values()) == pytest.approx(answer["iso"], rel=1e-12)
    assert frame.groupby("level")["icl"].mean().tolist() == pytest.approx(answer["means"], rel=1e-12)
    assert found.runs == len(frame)
    turned = ebar2_test(frame.assign(icl=-frame["icl"]), "icl", "level", "decreasing")
    assert (turned.ebar2, turned.p) == (found.ebar2, found.p)


def test_level_probabilities_are_those_of_the_isotonic_fit() -> None:
    draw = np.random.default_rng(8)
    fits = isotonic_fits(draw.normal(size=(40_000, 4)))
    distinct = 1 + (np.diff(fits, axis=1) > 1e-12).sum(axis=1)
    shares = np.bincount(distinct, minlength=5)[1:] / len(fits)
    probabilities = level_probabilities(4)
    assert probabilities == pytest.approx(np.array([6, 11, 6, 1]) / 24)
    assert np.all(np.abs(shares - probabilities) < 4 * np.sqrt(probabilities / len(fits)))


def test_ebar2_refuses_what_its_p_does_not_hold_for() -> None:
    for frame, message in (
        (D5_RUNS.iloc[1:], "level: "),
        (D5_RUNS[D5_RUNS["level"] < 2], "3 or more levels"),
        (D5_RUNS.drop_duplicates("level"), "at least 2"),
        (D5_RUNS.assign(icl=0.4), "same in every run"),
    ):
        with pytest.raises(InputError, match=message):
            ebar2_test(frame, "icl", "level")
    flat = D5_RUNS.assign(icl=-D5_RUNS["level"] + D5_RUNS["icl"] / 100)
    assert ebar2_test(flat, "icl", "level").p == 1.0


@pytest.mark.parametrize(("frame", "name"), [(D1, "d1"), (D3, "d3")])
def test_page_is_rs(frame: pd.DataFrame, name: str) -> None:
    theirs = R[name]["page"]
    normal = stats.page_trend_test(wide(frame), method="asymptotic")
    assert normal.pvalue == pytest.approx(theirs["p_norm"], rel=1e-12)
    assert stats.norm.isf(normal.pvalue) == pytest.approx(theirs["z"], rel=1e-12)
    found = trend(frame, "icl", "level", margin=0.02, draws=99)
    assert found.page == theirs["L"]
    # Ours is the exact p, which the normal one is several times above this far out.
    assert found.page_p == stats.page_trend_test(wide(frame), method="exact").pvalue < normal.pvalue


def test_jonckheere_from_scipys_rank_sums_is_rs() -> None:
    # It takes runs as independent, so the study has no use for it.
    levels = [group.to_numpy() for _, group in D1.groupby("level")["icl"]]
    j = sum(stats.mannwhitneyu(high, low).statistic for low, high in combinations(levels, 2))
    sizes, n = np.array([len(level) for level in levels]), len(D1)
    mean = (n**2 - (sizes**2).sum()) / 4
    variance = (n**2 * (2 * n + 3) - (sizes**2 * (2 * sizes + 3)).sum()) / 72
    z = (j - mean) / np.sqrt(variance)
    theirs = R["d1"]["jt"]
    assert (j, z, stats.norm.sf(z)) == pytest.approx((theirs["J"], theirs["z"], theirs["p_norm"]), rel=1e-12)


@pytest.mark.parametrize(("predictor", "answer"), [("pne", "isoreg"), ("level", "isoreg_ties")])
def test_isotonic_curve_averages_ties_like_r(predictor: str, answer: str) -> None:
    x, fitted = isotonic_curve(D1[predictor].to_numpy(dtype=float), D1["icl"].to_numpy())
    theirs = dict(zip(R["d1"][answer]["x"], R["d1"][answer]["yf"], strict=True))
    assert list(x) == pytest.approx(sorted(theirs))
    assert list(fitted) == pytest.approx([theirs[point] for point in sorted(theirs)], rel=1e-12)


def test_isotonic_fits_are_rs_and_scipys_where_there_are_no_ties() -> None:
    pava = R["d1"]["pava_means"]
    assert isotonic_fit(np.array(pava["means"])) == pytest.approx(pava["fit"], rel=1e-12)
    means = np.random.default_rng(3).normal(size=(200, 6))
    fits = isotonic_fits(means)
    for row, fit in zip(means, fits, strict=True):
        assert fit == pytest.approx(isotonic_fit(row))
        assert fit == pytest.approx(optimize.isotonic_regression(row).x)
    # scipy's knows no x: on runs with tied levels it is not the least-squares fit.
    ordered = D1.sort_values(["level", "seed"])
    tied = isotonic_curve(ordered["level"].to_numpy(dtype=float), ordered["icl"].to_numpy())[1]
    untied = optimize.isotonic_regression(ordered["icl"].to_numpy()).x
    assert np.abs(untied - np.repeat(tied, 5)).max() > 0.005


def test_trend_sees_a_rise_a_fall_and_a_dip() -> None:
    found = trend(D1, "icl", "level", "seed", margin=0.02, draws=9999)
    assert (found.reading, found.p) == ("monotone", 1e-4)
    # The same rise with a margin that its steps cannot be shown to keep.
    assert trend(D1, "icl", "level", "seed", margin=0.002, draws=9999).reading == "ordered"
    falling = trend(D1, "icl", "level", "seed", margin=0.02, draws=9999, alternative="decreasing")
    assert (falling.reading, falling.ebar2) == ("undecided", pytest.approx(0, abs=1e-12))
    dip = D1.assign(icl=D1["icl"] - 0.08 * (D1["level"] == 3))
    dipped = trend(dip, "icl", "level", "seed", margin=0.02, draws=9999)
    assert dipped.reading == "reversal"
    worst = min(dipped.reversals, key=lambda step: step.p)
    assert (worst.lower, worst.upper) == (2, 3)
    assert dipped.noninferior_p > 0.9
    assert list(dipped.fitted.values()) == sorted(dipped.fitted.values())


def test_steps_are_paired_t_tests() -> None:
    y = wide(D1)
    steps = reversals_of(y, range(6), 1.0, 0.01)
    for k, step in enumerate(steps):
        against = stats.ttest_rel(y[:, k + 1], y[:, k], alternative="less")
        margin = stats.ttest_1samp(y[:, k + 1] - y[:, k], -0.01, alternative="greater")
        assert (step.p, step.p_margin) == pytest.approx((against.pvalue, margin.pvalue), rel=1e-9)
    order = np.argsort([step.p for step in steps])
    smallest = steps[order[0]]
    assert smallest.p_adjusted == pytest.approx(min(1.0, 5 * smallest.p))


def test_trend_turned_round_is_the_same_trend() -> None:
    rising = trend(D1, "icl", "level", "seed", margin=0.02, draws=999)
    falling = trend(
        D1.assign(icl=-D1["icl"]), "icl", "level", "seed", margin=0.02, draws=999, alternative="decreasing"
    )
    assert (falling.ebar2, falling.p, falling.reading) == (rising.ebar2, rising.p, rising.reading)
    assert falling.reversals[0].difference == -rising.reversals[0].difference


def test_trend_names_incomplete_seeds_and_repeats_its_draws() -> None:
    missing = D1[~((D1["seed"] == "s1") & (D1["level"] == 3))]
    found = trend(missing, "icl", "level", "seed", margin=0.02, draws=999, seed=7)
    assert (found.clusters, found.incomplete) == (4, ("s1",))
    assert trend(missing, "icl", "level", "seed", margin=0.02, draws=999, seed=7) == found


def test_permutation_p_is_the_share_of_all_permutations() -> None:
    # Three seeds of three levels have 6^3 arrangements: enough draws must find their share.
    frame = pd.DataFrame([(s, k) for s in range(3) for k in range(3)], columns=["seed", "level"])
    frame["icl"] = [0.10, 0.30, 0.20, 0.25, 0.40, 0.41, 0.50, 0.45, 0.72]
    y = wide(frame)
    rows = [np.array(list(permutations(row))) for row in y - y.mean(axis=1, keepdims=True)]
    every = np.array([[a, b, c] for a in rows[0] for b in rows[1] for c in rows[2]]).mean(axis=1)
    explained = np.array([(isotonic_fit(means) ** 2).sum() for means in every])
    share = (explained >= explained[0] - 1e-12).mean()
    found = trend(frame, "icl", "level", margin=0.1, draws=20_000, seed=5)
    assert found.p == pytest.approx(share, abs=4 * np.sqrt(share / 20_000))
    assert found.ebar2 == pytest.approx(ebar2(y - y.mean(axis=1, keepdims=True)))


def test_trend_refuses_what_it_cannot_judge() -> None:
    for frame, settings, message in (
        (D1[D1["seed"] == "s0"], {}, "1 complete clusters"),
        (D1[D1["level"] < 2], {}, "2 levels"),
        (D1, {"margin": -0.01}, "margin: -0.01"),
        (D1, {"draws": 0}, "draws: 0"),
        (D1, {"alpha": 5}, "alpha: 5"),
        (D1.assign(icl=D1["level"] / 10), {}, "step between levels"),
        (D1.assign(icl=D1["icl"].where(D1["level"] > 0)), {}, "icl: missing"),
        (pd.concat([D1, D1.iloc[:1]]), {}, "given twice"),
    ):
        with pytest.raises(InputError, match=message):
            trend(frame, "icl", "level", **{"margin": 0.02, "draws": 99} | settings)


def test_band_is_bonferroni_made_monotone_and_says_how_often_the_bootstrap_covers() -> None:
    found = isotonic_band(D1, "icl", "level", draws=499, trials=200)
    y = wide(D1)
    half = stats.t.ppf(1 - 0.05 / 12, 4) * y.std(axis=0, ddof=1) / np.sqrt(5)
    low, high = y.mean(axis=0) - half, y.mean(axis=0) + half
    for k in range(6):
        assert found.low[k] == pytest.approx(low[: k + 1].max())
        assert found.high[k] == pytest.approx(high[k:].min())
    assert not found.empty
    assert found.fitted == pytest.approx(tuple(isotonic_fit(y.mean(axis=0))))
    # With 5 seeds the usual bootstrap band covers far less often than it says.
    assert 0.7 < found.bootstrap_coverage < 0.9 < found.confidence
    ends = (found.bootstrap_low, found.fitted, found.bootstrap_high)
    assert all(a <= b <= c for a, b, c in zip(*ends, strict=True))
    turned = isotonic_band(
        D1.assign(icl=-D1["icl"]), "icl", "level", alternative="decreasing", draws=499, trials=200
    )
    assert turned.high == pytest.approx([-end for end in found.low])
    assert turned.bootstrap_low == pytest.approx([-end for end in found.bootstrap_high])
    assert turned.bootstrap_coverage == found.bootstrap_coverage


def test_band_closes_where_no_ordered_curve_fits() -> None:
    fall = D1.assign(icl=D1["icl"] - 0.1 * D1["level"])
    assert isotonic_band(fall, "icl", "level", draws=99, trials=2).empty
    assert not isotonic_band(fall, "icl", "level", alternative="decreasing", draws=99, trials=2).empty


def test_band_covers_the_whole_curve_at_once() -> None:
    # Flat curves are the hardest to cover. 1000 studies of 5 seeds, three standard errors.
    draw = np.random.default_rng(21)
    trials, inside = 1000, 0
    for _ in range(trials):
        y = draw.normal(size=(5, 1)) + draw.normal(size=(5, 6))
        low, high = simultaneous_band(y, 0.95)
        inside += bool(np.all((low <= 0) & (high >= 0)))
    assert inside / trials > 0.95 - 3 * np.sqrt(0.95 * 0.05 / trials)
