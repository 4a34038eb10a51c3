"""Slopes, equivalence, families and power against R's answers and against other libraries."""

import re

import numpy as np
import pandas as pd
import pingouin
import pytest
from scipy import stats
from statsmodels.formula.api import mixedlm, ols
from statsmodels.stats.multitest import multipletests
from statsmodels.stats.weightstats import ttost_ind, ttost_paired
from tests.unit.analysis.oracle import D1, D2, D3, D5, D5_RUNS, D8, R_CENTRE, R

from gradnoise.analysis import (
    centre_covariate,
    holm,
    seed_slopes,
    t_power,
    tost,
    tost_power,
)
from gradnoise.analysis.statistics.equivalence import tost_by_pingouin
from gradnoise.base.errors import InputError


def test_seed_slopes_are_rs() -> None:
    slope, theirs = seed_slopes(D3, "icl", "pne"), R["d3"]["seed_slopes"]
    assert slope.estimate == pytest.approx(theirs["mean"], rel=1e-9)
    assert (slope.t, slope.df) == (pytest.approx(theirs["t"], rel=1e-9), theirs["df"])
    assert slope.p == pytest.approx(theirs["p"], rel=1e-9)
    assert (slope.low, slope.high) == pytest.approx(theirs["ci95"], rel=1e-9)
    assert slope.reading == "above zero"
    assert seed_slopes(D3, "icl", "pne", alternative="greater").p == pytest.approx(theirs["p"] / 2)
    assert seed_slopes(D3, "icl", "pne", alternative="less").p == pytest.approx(1 - theirs["p"] / 2)


def test_seed_slopes_given_a_covariate_are_rs() -> None:
    slope, theirs = seed_slopes(D1, "icl", "pne", covariates=["loss"]), R["d1"]["seed_slopes"]
    assert list(slope.slopes.values()) == pytest.approx(theirs["slopes"], rel=1e-9)
    assert (slope.estimate, slope.t, slope.df, slope.p) == pytest.approx(
        (theirs["mean"], theirs["t"], theirs["df"], theirs["p"]), rel=1e-9
    )
    assert (slope.low, slope.high) == pytest.approx(theirs["ci95"], rel=1e-9)
    # A seed's line is where the covariate has its mean over all runs.
    first = D1[D1["seed"] == "s0"].assign(loss=lambda rows: rows["loss"] - D1["loss"].mean())
    assert slope.intercepts["s0"] == pytest.approx(ols("icl ~ pne + loss", first).fit().params["Intercept"])


def test_a_seed_with_one_dose_has_no_slope_and_is_named() -> None:
    flat = D3.assign(pne=D3["pne"].where(D3["seed"] != "s0", 1.0))
    slope = seed_slopes(flat, "icl", "pne")
    assert slope.flat == ("s0",)
    assert slope.df == 6
    assert slope.runs == len(D3) - 7
    # So has one whose covariate goes along with the dose.
    along = D3.assign(loss=np.where(D3["seed"] == "s1", D3["pne"], D3["pne"] ** 2))
    assert seed_slopes(along, "icl", "pne", covariates=["loss"]).flat == ("s1",)


def test_what_seed_slopes_refuse() -> None:
    for frame, message in (
        (D3.assign(icl=D3["icl"].where(D3["level"] > 0)), "icl: missing or infinite"),
        (D3.assign(pne=D3["pne"].where(D3["level"] > 0)), "pne: missing or infinite"),
        (D3.assign(icl="high"), "icl: .* must hold numbers"),
        (D3.assign(seed=D3["seed"].where(D3["level"] > 0)), "seed: missing value"),
        (D3.drop(columns="pne"), "column: pne"),
        (pd.concat([D3, D3[["icl"]]], axis=1), "column: icl: .* once"),
        (D3.iloc[:0], "rows: none"),
        (D3.assign(icl=0.1 * D3["pne"]), "does not vary"),
        (D3[D3["seed"] == "s0"], "1 slopes"),
        (pd.concat([D3, D3.iloc[3:4]]), "rows: .* given twice"),
    ):
        with pytest.raises(InputError, match=message):
            seed_slopes(frame, "icl", "pne")
    with pytest.raises(InputError, match="level: 95: must lie between 0 and 1"):
        seed_slopes(D3, "icl", "pne", level=95)


def test_tost_pairs_runs_not_rows_as_r_does() -> None:
    theirs = R["d8"]["late_minus_early_paired"]
    found = tost(D8, outcome="icl", arm="phase", arms=("late", "early"), cluster="seed", low=-0.02, high=0.02)
    assert found.difference == pytest.approx(theirs["mean"], rel=1e-9)
    assert found.df == theirs["df"]  # two rows of each seed and phase are one pair, not two
    assert found.p_zero == pytest.approx(theirs["p"], rel=1e-9)
    assert (found.difference / found.se) == pytest.approx(theirs["t"], rel=1e-9)
    half = stats.t.ppf(0.95, 4) * found.se
    assert found.ci90 == pytest.approx((found.difference - half, found.difference + half))


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


@pytest.mark.parametrize(("paired", "answer"), [(True, "t_paired"), (False, "t_two")])
def test_t_power_is_rs(paired: bool, answer: str) -> None:
    # R leaves out the far tail, so its power is the smaller one.
    ours = t_power(5, 0.02, 0.012, paired=paired)
    assert 0 <= ours - R["power"][answer] < 1e-5


def test_power_grows_as_r_says_and_refuses_nonsense() -> None:
    one_sided = t_power(5, 0.02, 0.012, "greater", paired=False)
    assert one_sided == pytest.approx(R["power"]["t_one_sided"], rel=1e-9)
    assert t_power(5, -0.02, 0.012, "less", paired=False) == pytest.approx(one_sided)
    powers = [tost_power(clusters, -0.02, 0.02, 0.012) for clusters in range(3, 13)]
    assert powers == pytest.approx(R["power"]["tost_paired"], rel=1e-9)
    assert tost_power(10_000, -0.02, 0.02, 0.012) == 1.0
    # At a margin the power is the error rate: with many seeds all of alpha, with few less.
    assert tost_power(50, -0.02, 0.02, 0.012, difference=0.02) == pytest.approx(0.05, abs=1e-6)
    assert tost_power(3, -0.02, 0.02, 0.05, difference=0.02) < 0.05
    for arguments, message in (
        ((1, -0.02, 0.02, 0.01), "clusters: 1"),
        ((5, 0.02, 0.02, 0.01), "low: 0.02"),
        ((5, -0.02, 0.02, 0.0), "sd: 0"),
    ):
        with pytest.raises(InputError, match=message):
            tost_power(*arguments)


UNPAIRED = {
    "ncss": (R["ncss"]["A"], R["ncss"]["B"], 110, R["ncss"]["pooled"], R["ncss"]["welch"]),
    "d2": (
        D2.loc[D2["source"] == "inject", "icl"].tolist(),
        D2.loc[D2["source"] == "batch", "icl"].tolist(),
        0.02,
        R["d2"]["tost_pooled"],
        R["d2"]["tost_welch"],
    ),
}


@pytest.mark.parametrize("case", list(UNPAIRED))
@pytest.mark.parametrize("variances", ["pooled", "unequal"])
def test_statsmodels_and_pingouins_unpaired_tost_are_rs(case: str, variances: str) -> None:
    # Published and synthetic vectors; the study pairs by seed, so it has no use for this test.
    a, b, margin, pooled, welch = UNPAIRED[case]
    theirs = pooled if variances == "pooled" else welch
    p, lower, upper = ttost_ind(np.array(a), np.array(b), -margin, margin, usevar=variances)
    assert p == pytest.approx(theirs["p_tost"], rel=1e-7)
    assert lower == pytest.approx((theirs["t_lower"], theirs["p_lower"], theirs["df"]), rel=1e-7)
    assert upper == pytest.approx((theirs["t_upper"], theirs["p_upper"], theirs["df"]), rel=1e-7)
    again = pingouin.tost(a, b, bound=margin, paired=False, correction=variances == "unequal")
    assert again["pval"].iloc[0] == pytest.approx(theirs["p_tost"], rel=1e-7)
    test = stats.ttest_ind(a, b, equal_var=variances == "pooled")
    interval = test.confidence_interval(0.90)
    assert np.mean(a) - np.mean(b) == pytest.approx(theirs["diff"], rel=1e-9)
    assert theirs["diff"] / test.statistic == pytest.approx(theirs["se"], rel=1e-7)
    assert (interval.low, interval.high) == pytest.approx(theirs["ci90"], rel=1e-7)


def test_holm_is_rs_and_a_missing_p_does_not_shrink_the_family() -> None:
    assert holm(R["holm"]["p"]) == pytest.approx(R["holm"]["holm"], rel=1e-12)
    for theirs, method in (("hochberg", "simes-hochberg"), ("bonf", "bonferroni"), ("bh", "fdr_bh")):
        ours = multipletests(R["holm"]["p"], method=method)[1]
        assert ours == pytest.approx(R["holm"][theirs], rel=1e-12)
    for missing in (None, float("nan")):
        assert holm([0.01, missing, 0.04]) == pytest.approx([0.03, 1.0, 0.08])
    assert holm([]) == []
    with pytest.raises(InputError, match=r"p: 1\.2"):
        holm([0.1, 1.2])


@pytest.mark.parametrize(
    ("frame", "formula", "theirs"),
    [
        (D1, "icl ~ pne + lossc + C(seed, Sum)", R["d1"]["ols_seed_fixed"]),
        (D1, "icl ~ pne + lossc", R["d1"]["ols_pooled"]),
        (D5, "icl ~ pne", R["d5"]["ols_rows"]),
        (D5_RUNS, "icl ~ pne", R["d5"]["ols_run_means"]),
    ],
    ids=["seed fixed", "pooled", "rows", "run means"],
)
def test_least_squares_of_statsmodels_is_rs(frame, formula, theirs) -> None:
    # What a mixed model and CR2 are compared with; on rows its errors are half of those on runs.
    fit = ols(formula, frame.assign(lossc=frame["loss"] - R_CENTRE) if "loss" in frame else frame).fit()
    columns = (fit.params, fit.bse, fit.tvalues, fit.pvalues)
    for column, key in zip(columns, ("Estimate", "Std. Error", "t value", "Pr(>|t|)"), strict=True):
        for name, row in theirs.items():
            seed = re.sub(r"^seed(\d)$", lambda found: f"C(seed, Sum)[S.s{int(found[1]) - 1}]", name)
            ours = column["Intercept" if name == "(Intercept)" else seed]
            assert ours == pytest.approx(row[key], rel=1e-8)


def test_likelihood_ratio_of_statsmodels_is_rs() -> None:
    with pytest.warns(UserWarning, match="boundary"):  # it warns on every fit to accuracies
        full, null = (
            mixedlm(f"icl ~ {terms}", D1, groups="seed").fit(reml=False, method="powell")
            for terms in ("pne + loss", "loss")
        )
    theirs, chisq = R["d1"]["lrt_ml"], 2 * (full.llf - null.llf)
    assert chisq == pytest.approx(theirs["chisq"], rel=1e-5)
    assert stats.chi2.sf(chisq, theirs["df"]) == pytest.approx(theirs["p"], rel=1e-4)


def test_a_covariate_is_centred_or_refused_where_it_is_measured_badly() -> None:
    centred = centre_covariate(D1, "loss", value=0.97, minimum=0.95)
    assert centred["loss_c"].mean() == pytest.approx(0, abs=1e-15)
    assert list(centred["loss_c"] + D1["loss"].mean()) == pytest.approx(list(D1["loss"]))
    assert "loss_c" not in D1
    for value in (0.94, None, float("nan")):
        with pytest.raises(InputError, match="reliability of loss"):
            centre_covariate(D1, "loss", value=value, minimum=0.95)
    with pytest.raises(InputError, match="loss: missing"):
        centre_covariate(D1.assign(loss=np.nan), "loss", value=0.97, minimum=0.95)
