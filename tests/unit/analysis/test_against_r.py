"""The statistics against R's answers (tests/oracle/data) and against other libraries."""

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pingouin
import pytest
from statsmodels.stats.multitest import multipletests
from statsmodels.stats.weightstats import ttost_paired

from gradnoise.analysis import FitError, fit_mixed, holm, seed_slopes, tost, trend
from gradnoise.analysis.equivalence import tost_by_pingouin
from gradnoise.analysis.isotonic import _explained, ebar2, isotonic_curve, isotonic_fit
from gradnoise.base.errors import InputError

DATA = Path("tests/oracle/data")
R = json.loads((DATA / "r_statistics.json").read_text())
D1, D3, D5, D8 = (
    pd.read_csv(DATA / f"{name}.csv")
    for name in ("d1_balanced_ri", "d3_random_slope", "d5_null_between", "d8_twofactor")
)


@pytest.mark.parametrize(
    ("frame", "answer", "outcome", "fixed", "random"),
    [
        (D1, R["d1"]["lmm"], "icl", ["pne", "loss"], {"seed": ["1"]}),
        (D1, R["d1"]["lmm_mem"], "mem", ["pne", "loss"], {"seed": ["1"]}),
        (D3, R["d3"]["lmm_ri"], "icl", ["pne"], {"seed": ["1"]}),
        (D3, R["d3"]["lmm_rs"], "icl", ["pne"], {"seed": ["1", "pne"]}),
        (D5, R["d5"]["lmm"], "icl", ["pne"], {"run": ["1"]}),
    ],
    ids=["d1", "d1 recall", "d3 intercept", "d3 slope", "d5"],
)
def test_mixed_model_is_lme4s(frame, answer, outcome, fixed, random) -> None:
    fit = fit_mixed(frame, outcome, fixed, random)
    assert fit.loglik == pytest.approx(answer["loglik_reml"], rel=1e-9)
    assert fit.sigma == pytest.approx(answer["sigma"], rel=1e-6)
    assert fit.theta == pytest.approx(np.atleast_1d(answer["theta"]), rel=1e-5)
    for name in fixed:  # R's covariate is centred, so its intercept is another one
        theirs = answer["fixed"]["lossc" if name == "loss" else name]
        assert fit.terms[name].estimate == pytest.approx(theirs["Estimate"], rel=1e-6)
        assert fit.terms[name].se == pytest.approx(theirs["Std. Error"], rel=1e-6)
        assert fit.terms[name].p is None
    assert (fit.converged, fit.singular) == (True, False)


def test_mixed_model_survives_a_singular_fit_on_the_scale_of_accuracies() -> None:
    # statsmodels alone returns an infinite likelihood here. The scale of the data must not matter.
    draw = np.random.default_rng(4)
    frame = pd.DataFrame([(s, x) for s in range(5) for x in np.linspace(-1, 1, 6)], columns=["seed", "dose"])
    frame["icl"] = 0.5 + draw.normal(0, 0.01, len(frame))
    fit = fit_mixed(frame, "icl", ["dose"], {"seed": ["1", "dose"]})
    scaled = fit_mixed(
        frame.assign(icl=frame["icl"] * 100 + 3, dose=frame["dose"] * 7 + 2),
        "icl",
        ["dose"],
        {"seed": ["1", "dose"]},
    )
    assert fit.singular
    assert scaled.singular
    assert scaled.terms["dose"].se * 7 / 100 == pytest.approx(fit.terms["dose"].se, rel=1e-5)
    assert scaled.loglik == pytest.approx(fit.loglik - 28 * np.log(100) - np.log(7), rel=1e-9)


def test_mixed_model_says_what_it_cannot_fit() -> None:
    with pytest.raises(FitError, match="independent"):
        fit_mixed(D1.assign(twice=2 * D1["pne"]), "icl", ["pne", "twice"], {"seed": ["1"]})
    with pytest.raises(FitError, match="vary"):
        fit_mixed(D1.assign(icl=0.5), "icl", ["pne"], {"seed": ["1"]})
    with pytest.raises(InputError, match="column: dose"):
        fit_mixed(D1, "icl", ["dose"], {"seed": ["1"]})
    with pytest.raises(InputError, match="1 clusters"):
        fit_mixed(D1[D1["seed"] == "s0"], "icl", ["pne"], {"seed": ["1"]})
    with pytest.raises(InputError, match="pne: missing value"):
        fit_mixed(D1.assign(pne=D1["pne"].where(D1["pne"] < 0)), "icl", ["pne"], {"seed": ["1"]})


def test_seed_slopes_are_rs() -> None:
    slope, theirs = seed_slopes(D3, "icl", "pne"), R["d3"]["seed_slopes"]
    assert slope.estimate == pytest.approx(theirs["mean"], rel=1e-9)
    assert (slope.t, slope.df) == (pytest.approx(theirs["t"], rel=1e-9), theirs["df"])
    assert slope.p == pytest.approx(theirs["p"], rel=1e-9)
    assert (slope.low, slope.high) == pytest.approx(theirs["ci95"], rel=1e-9)
    assert slope.reading == "above zero"
    assert seed_slopes(D3, "icl", "pne", alternative="greater").p == pytest.approx(theirs["p"] / 2)
    assert seed_slopes(D3, "icl", "pne", alternative="less").p == pytest.approx(1 - theirs["p"] / 2)


def test_a_seed_with_one_dose_has_no_slope_and_is_named() -> None:
    flat = D3.assign(pne=D3["pne"].where(D3["seed"] != "s0", 1.0))
    slope = seed_slopes(flat, "icl", "pne")
    assert slope.flat == ("s0",)
    assert slope.df == 6
    assert slope.runs == len(D3) - 7


def test_tost_pairs_runs_not_rows_as_r_does() -> None:
    theirs = R["d8"]["late_minus_early_paired"]
    found = tost(D8, outcome="icl", arm="phase", arms=("late", "early"), cluster="seed", low=-0.02, high=0.02)
    assert found.difference == pytest.approx(theirs["mean"], rel=1e-9)
    assert found.df == theirs["df"]  # two rows of each seed and phase are one pair, not two
    assert found.p_zero == pytest.approx(theirs["p"], rel=1e-9)
    assert (found.difference / found.se) == pytest.approx(theirs["t"], rel=1e-9)


@pytest.mark.parametrize(("low", "high"), [(-0.02, 0.02), (-0.03, 0.01), (0.0, 0.05), (-0.01, 0.04)])
def test_tost_is_pingouins_and_statsmodels(low: float, high: float) -> None:
    found = tost(D1, outcome="icl", arm="level", arms=(1, 0), cluster="seed", low=low, high=high)
    differences = np.array(found.differences)
    p, lower, upper = ttost_paired(differences, np.zeros_like(differences), low, high)
    assert found.p == pytest.approx(p, rel=1e-7)
    assert (found.p_low, found.p_high) == pytest.approx((lower[1], upper[1]), rel=1e-7)
    assert tost_by_pingouin(found.differences, low, high) == pytest.approx(found.p, rel=1e-7)
    if low == -high:
        theirs = pingouin.tost(differences, np.zeros_like(differences), bound=high, paired=True)
        assert found.p == pytest.approx(theirs["pval"].iloc[0], rel=1e-7)
    assert found.p == max(found.p_low, found.p_high) != min(found.p_low, found.p_high)


@pytest.mark.parametrize(
    ("mean", "spread", "reading"),
    [
        (0.001, 0.004, "inside margins"),
        (0.08, 0.004, "outside zero"),
        (0.02, 0.004, "both"),
        (0.02, 0.2, "undecided"),
    ],
)
def test_tost_has_four_readings(mean: float, spread: float, reading: str) -> None:
    shape = np.array([-1.2, -0.5, 0.1, 0.4, 1.2])
    arm = pd.DataFrame({"seed": range(5), "arm": "a", "icl": mean + spread * shape})
    frame = pd.concat([arm, arm.assign(arm="b", icl=0.0)])
    found = tost(frame, "icl", "arm", ("a", "b"), "seed", low=-0.05, high=0.05)
    assert found.reading == reading
    # Swapping the arms turns the difference round and nothing else.
    other = tost(frame, "icl", "arm", ("b", "a"), "seed", low=-0.05, high=0.05)
    assert (other.reading, other.difference) == (reading, -found.difference)


def test_tost_leaves_out_unpaired_seeds_and_refuses_nonsense() -> None:
    missing = D1[~((D1["seed"] == "s0") & (D1["level"] == 0))]
    assert tost(missing, "icl", "level", (0, 1), low=-0.1, high=0.1).df == 3
    for arguments, named in (
        ({"arms": (0, 1), "low": 0.02, "high": 0.02}, "low"),
        ({"arms": (0, 0), "low": -0.02, "high": 0.02}, "arms"),
        ({"arms": (0, 9), "low": -0.02, "high": 0.02}, "level: 9"),
    ):
        with pytest.raises(InputError, match=named):
            tost(D1, "icl", "level", **arguments)


def test_ebar2_isotonic_fits_and_page_are_rs() -> None:
    wide = D1.pivot(index="seed", columns="level", values="icl").to_numpy()
    assert ebar2(wide) == pytest.approx(R["d1"]["ebar2"]["E2"], rel=1e-9)
    runs = D5.groupby(["seed", "level"])["icl"].mean().unstack().to_numpy()
    assert ebar2(runs) == pytest.approx(R["d5"]["ebar2_runmeans"]["E2"], rel=1e-9)
    assert isotonic_fit(runs.mean(axis=0)) == pytest.approx(R["d5"]["ebar2_runmeans"]["iso"], rel=1e-9)
    for frame, name in ((D1, "d1"), (D3, "d3")):
        found = trend(frame, "icl", "level", "seed", margin=0.02, draws=999)
        assert found.page == R[name]["page"]["L"]


@pytest.mark.parametrize(("predictor", "answer"), [("pne", "isoreg"), ("level", "isoreg_ties")])
def test_isotonic_curve_averages_ties_like_r(predictor: str, answer: str) -> None:
    x, fitted = isotonic_curve(D1[predictor].to_numpy(dtype=float), D1["icl"].to_numpy())
    theirs = dict(zip(R["d1"][answer]["x"], R["d1"][answer]["yf"], strict=True))
    assert list(x) == pytest.approx(sorted(theirs))
    assert list(fitted) == pytest.approx([theirs[point] for point in sorted(theirs)], rel=1e-9)


def test_max_min_form_of_the_isotonic_fit_is_scikit_learns() -> None:
    means = np.random.default_rng(3).normal(size=(200, 6))
    means -= means.mean(axis=1, keepdims=True)
    assert _explained(means) == pytest.approx([float((isotonic_fit(row) ** 2).sum()) for row in means])


def test_trend_sees_a_rise_a_fall_and_a_dip() -> None:
    found = trend(D1, "icl", "level", "seed", margin=0.02, draws=9999)
    assert (found.reading, found.p) == ("ordered", 1e-4)
    falling = trend(D1, "icl", "level", "seed", margin=0.02, draws=9999, alternative="decreasing")
    assert (falling.reading, falling.ebar2) == ("undecided", pytest.approx(0, abs=1e-12))
    dip = D1.assign(icl=D1["icl"] - 0.08 * (D1["level"] == 3))
    dipped = trend(dip, "icl", "level", "seed", margin=0.02, draws=9999)
    assert dipped.reading == "reversal"
    worst = min(dipped.reversals, key=lambda step: step.p)
    assert (worst.lower, worst.upper) == (2, 3)
    assert dipped.noninferior_p > 0.9
    assert list(dipped.fitted.values()) == sorted(dipped.fitted.values())


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


def test_holm_is_rs_and_a_missing_p_does_not_shrink_the_family() -> None:
    assert holm(R["holm"]["p"]) == pytest.approx(R["holm"]["holm"], rel=1e-12)
    assert holm(R["holm"]["p"]) == pytest.approx(multipletests(R["holm"]["p"], method="holm")[1], rel=1e-12)
    assert holm([0.01, None, 0.04]) == pytest.approx([0.03, 1.0, 0.08])
    assert holm([]) == []
    with pytest.raises(InputError, match=r"p: 1\.2"):
        holm([0.1, 1.2])
