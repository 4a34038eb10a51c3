"""Inference that does without the deciding test's assumptions, against clubSandwich, base R and scipy."""

from itertools import product
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
from scipy import stats
from tests.unit.analysis.oracle import D1, D2, D3, D5, R_CENTRE, R

from gradnoise.analysis import (
    cluster_robust,
    seed_bootstrap,
    seed_slopes,
    sign_flip,
    wild_bootstrap,
)
from gradnoise.analysis.statistics.cluster_robust import cr2
from gradnoise.analysis.statistics.resampling import WEBB_WEIGHTS, resamples
from gradnoise.base.errors import InputError

SLOPES = np.array(R["d1"]["seed_slopes"]["slopes"])


def sum_coded(column: pd.Series) -> np.ndarray:
    """Columns of a factor that sum to zero over its levels, as R's contr.sum."""
    names = sorted(column.unique())
    indicators = (column.to_numpy()[:, None] == names).astype(float)
    return indicators[:, :-1] - indicators[:, -1:]


@pytest.mark.parametrize(
    ("frame", "answer", "cluster", "names"),
    [
        (D1.assign(lossc=D1["loss"] - R_CENTRE), R["d1"]["cr2"], "seed", ["pne", "lossc"]),
        (
            D2.assign(lossc=D2["loss"] - R_CENTRE, source1=np.where(D2["source"] == "batch", 1.0, -1.0)),
            R["d2"]["cr2"],
            "seed",
            ["pne", "lossc", "source1"],
        ),
        (D3, R["d3"]["cr2"], "seed", ["pne"]),
        (D5, R["d5"]["cr2"], "run", ["pne"]),
    ],
    ids=["d1", "d2 unbalanced", "d3", "d5"],
)
def test_cr2_is_clubsandwichs(frame, answer, cluster, names) -> None:
    found = cluster_robust(frame, "icl", names, cluster)
    assert found.clusters == frame[cluster].nunique()
    for name, theirs in answer.items():
        ours = found.terms["1" if name == "(Intercept)" else name]
        assert (ours.estimate, ours.se, ours.t) == pytest.approx(
            (theirs["beta"], theirs["se"], theirs["t"]), rel=1e-10
        )
        assert (ours.df, ours.p) == pytest.approx((theirs["df"], theirs["p"]), rel=1e-10)


def test_cr2_with_an_intercept_for_each_seed_is_clubsandwichs() -> None:
    answer = R["d1"]["cr2_fe"]
    loss = D1["loss"] - R_CENTRE
    design = np.column_stack([np.ones(len(D1)), D1["pne"], loss, sum_coded(D1["seed"])])
    beta, se, df = cr2(design, D1["icl"].to_numpy(), D1["seed"])
    t = beta / se
    p = 2 * stats.t.sf(np.abs(t), df)
    for ours, key in ((beta, "beta"), (se, "se"), (df, "df"), (t, "t"), (p, "p")):
        assert ours == pytest.approx([term[key] for term in answer.values()], rel=1e-8)
    within = cluster_robust(D1, "icl", ["pne", "loss"], within=True)
    for name, key in (("pne", "pne"), ("loss", "lossc")):
        ours, theirs = within.terms[name], answer[key]
        assert (ours.estimate, ours.se, ours.df, ours.p) == pytest.approx(
            (theirs["beta"], theirs["se"], theirs["df"], theirs["p"]), rel=1e-10
        )


def test_balanced_cr2_is_the_seed_slope_test() -> None:
    slope = seed_slopes(D3, "icl", "pne")
    for within in (False, True):
        term = cluster_robust(D3, "icl", ["pne"], within=within).terms["pne"]
        assert (term.estimate, term.se, term.df, term.p, term.low, term.high) == pytest.approx(
            (slope.estimate, slope.se, slope.df, slope.p, slope.low, slope.high), rel=1e-9
        )


def test_sign_flips_are_rs() -> None:
    theirs = R["d1"]["signflip"]
    one, two = sign_flip(SLOPES, "greater"), sign_flip(SLOPES)
    assert (one.p, two.p) == (theirs["p_one"], theirs["p_two"])
    assert (one.smallest_p, two.smallest_p) == (1 / theirs["n_perm"], 2 / theirs["n_perm"])
    assert sign_flip(SLOPES, "less").p == 1.0
    mixed = np.array([1.0, 2.0, -0.5, 3.0, -4.0, 2.5, 0.7])
    library = stats.permutation_test(
        (mixed,), np.mean, permutation_type="samples", n_resamples=np.inf, alternative="two-sided"
    )
    assert sign_flip(mixed).p == library.pvalue


def test_too_few_seeds_for_a_sign_flip_show_in_its_smallest_p() -> None:
    # Under Holm with four hypotheses the first threshold is .0125: seven seeds one-sided, eight two-sided.
    reaches = {
        alternative: [
            s for s in range(3, 12) if sign_flip(np.arange(1, s + 1), alternative).smallest_p <= 0.0125
        ]
        for alternative in ("greater", "two-sided")
    }
    assert (reaches["greater"][0], reaches["two-sided"][0]) == (7, 8)


def test_listed_resamples_are_all_of_them() -> None:
    counts, weights, exact = resamples(5, draws=3125, seed=0)
    assert exact
    every = np.array([np.bincount(pick, minlength=5) for pick in product(range(5), repeat=5)])
    distinct, ways = np.unique(every, axis=0, return_counts=True)
    order = np.lexsort(counts.T[::-1])
    assert np.array_equal(counts[order], distinct)
    assert weights[order] * R["d1"]["exact_boot"]["n"] == pytest.approx(ways)
    drawn, even, exact = resamples(5, draws=100, seed=0)
    assert not exact
    assert drawn.shape == (100, 5)
    assert even == pytest.approx(0.01)


def test_percentile_and_bca_of_all_resamples_are_rs() -> None:
    # The study reports neither (they cover too rarely); what scipy does with every resample is R's answer.
    theirs = R["d1"]["exact_boot"]
    means = np.array([np.mean(pick) for pick in product(SLOPES, repeat=5)])
    every = SimpleNamespace(bootstrap_distribution=means)
    ends = {}
    for method in ("percentile", "BCa"):
        interval = stats.bootstrap(
            (SLOPES,), np.mean, n_resamples=0, bootstrap_result=every, method=method
        ).confidence_interval
        ends[method] = tuple(interval)
    assert len(means) == theirs["n"]
    assert ends["percentile"] == pytest.approx(theirs["pct95"], rel=1e-9)
    assert ends["BCa"] == pytest.approx(theirs["bca95"], rel=1e-6)
    z0 = stats.norm.ppf(
        (means < SLOPES.mean() - 1e-15).mean() + (np.abs(means - SLOPES.mean()) <= 1e-15).mean() / 2
    )
    deviations = SLOPES.mean() - SLOPES
    a = (deviations**3).sum() / (6 * (deviations**2).sum() ** 1.5) * -1
    levels = stats.norm.cdf([z0 + (z0 + z) / (1 - a * (z0 + z)) for z in stats.norm.ppf([0.025, 0.975])])
    assert (z0, a, *levels) == pytest.approx((theirs["z0"], theirs["a"], *theirs["bca_levels"]), rel=1e-9)


def test_studentised_bootstrap_is_the_definition_over_all_resamples() -> None:
    estimate, se = SLOPES.mean(), SLOPES.std(ddof=1) / np.sqrt(5)
    picks = np.array([pick for pick in product(SLOPES, repeat=5) if len(set(pick)) > 1])
    t = np.sort((picks.mean(axis=1) - estimate) / (picks.std(axis=1, ddof=1) / np.sqrt(5)))
    lower, upper = np.quantile(t, [0.025, 0.975], method="inverted_cdf")
    found = seed_bootstrap(SLOPES)
    assert found.exact
    assert (found.low, found.high) == pytest.approx((estimate - upper * se, estimate - lower * se), rel=1e-9)
    observed = estimate / se
    p = 2 * min((t >= observed).mean(), (t <= observed).mean())
    assert found.p == pytest.approx(p, abs=1e-12)
    assert (found.p <= 0.05) == (found.low > 0 or found.high < 0)


def test_no_bootstrap_p_is_below_what_so_few_clusters_can_show() -> None:
    found = seed_bootstrap([0.1201, 0.1199, 0.1212, 0.1190, 0.1205])
    # The rarest resamples are one cluster four times and another once: 5 of 5^5 - 5 that have an error.
    assert found.p == pytest.approx(2 * 5 / (5**5 - 5))


def test_drawn_bootstraps_come_near_the_listed_ones_and_repeat() -> None:
    values = np.append(SLOPES, [0.012, 0.021, 0.017])
    listed, drawn = seed_bootstrap(values), seed_bootstrap(values, draws=6000, seed=3)
    assert (listed.exact, drawn.exact) == (True, False)
    assert (drawn.low, drawn.high) == pytest.approx((listed.low, listed.high), rel=0.05)
    assert seed_bootstrap(values, draws=6000, seed=3) == drawn
    whole = wild_bootstrap(D1, "icl", "loss")
    part = wild_bootstrap(D1, "icl", "loss", draws=5000, seed=1)
    assert (whole.exact, whole.draws, part.exact, part.draws) == (True, 6**5, False, 5000)
    assert part.p == pytest.approx(whole.p, abs=0.03)  # four standard errors of 5000 draws
    assert wild_bootstrap(D1, "icl", "loss", draws=5000, seed=1) == part


def test_wild_bootstrap_is_its_definition_over_all_weights() -> None:
    import statsmodels.api as sm

    frame = D1[D1["seed"].isin(["s0", "s1", "s2"])].reset_index(drop=True)
    full = sm.add_constant(frame[["pne", "loss"]])
    seeds = frame["seed"].astype("category").cat.codes.to_numpy()

    def t_of(y) -> float:
        fit = sm.OLS(y, full).fit(cov_type="cluster", cov_kwds={"groups": seeds, "use_correction": False})
        return float(fit.tvalues["pne"])

    null = sm.OLS(frame["icl"], sm.add_constant(frame["loss"])).fit()
    observed = t_of(frame["icl"])
    t = np.array(
        [
            t_of(null.fittedvalues + np.array(weights)[seeds] * null.resid)
            for weights in product(WEBB_WEIGHTS, repeat=3)
        ]
    )
    found = wild_bootstrap(frame, "icl", "pne", covariates=["loss"])
    assert found.t == pytest.approx(observed, rel=1e-9)
    assert found.p == pytest.approx((np.abs(t) >= abs(observed) * (1 - 1e-9)).mean(), abs=1e-12)
    upper = wild_bootstrap(frame, "icl", "pne", covariates=["loss"], alternative="greater")
    assert upper.p == pytest.approx((t >= observed - 1e-9).mean(), abs=1e-12)
    assert pytest.approx(1) == WEBB_WEIGHTS @ WEBB_WEIGHTS / 6


def test_what_they_refuse() -> None:
    flat = D1.assign(pne=1.0)
    one = D1[D1["seed"] == "s0"]
    for call, message in (
        (lambda: sign_flip([0.1]), "values: 1 numbers"),
        (lambda: sign_flip([0.1, np.nan]), "values: 2 numbers"),
        (lambda: sign_flip(np.ones(21)), "clusters: 21"),
        (lambda: seed_bootstrap([0.1, 0.2]), "clusters: 2"),
        (lambda: seed_bootstrap([0.1, 0.1, 0.1]), "does not vary"),
        (lambda: wild_bootstrap(flat, "icl", "pne"), "must vary"),
        (lambda: wild_bootstrap(one, "icl", "pne"), "seed: 1 clusters"),
        (lambda: cluster_robust(one, "icl", ["pne"]), "cluster: 1 clusters"),
        (lambda: cluster_robust(flat, "icl", ["pne"]), "linearly independent"),
        (lambda: cluster_robust(D1, "icl", []), "predictors: none"),
        (lambda: cluster_robust(D1.assign(icl=0.3), "icl", ["pne"]), "no residual variation"),
        (lambda: wild_bootstrap(D1.assign(icl=0.3), "icl", "pne"), "no residual variation"),
        (lambda: wild_bootstrap(D1, "icl", "pne", draws=0), "draws: 0"),
        (lambda: seed_bootstrap(SLOPES, draws=0), "draws: 0"),
        (lambda: cluster_robust(D1, "icl", ["dose"]), "column: dose"),
    ):
        with pytest.raises(InputError, match=message):
            call()
