"""The auditor's own way to every test: against R, against the analysis's code, and by brute force."""

from itertools import product
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import pytest
from tests.unit.analysis.oracle import D1, D3, D8, D8_UNBALANCED, D10, R

from gradnoise.analysis.statistics.bands import isotonic_band
from gradnoise.analysis.statistics.ebar2 import permutation_p
from gradnoise.analysis.statistics.resampling import seed_bootstrap, wild_bootstrap
from gradnoise.base.closure import code_closure
from gradnoise.provenance.audit import described, resampled, second_path, trends, verdicts
from gradnoise.provenance.audit.second_path import Unable
from gradnoise.registration.kinds import AnovaTest, ContrastTest, SlopeTest, TostTest, TrendTest

# Seeds of a study are numbers.
SLOPES = D3.assign(seed=D3["seed"].factorize()[0])
ABOUT: dict[str, Any] = {"id": "t", "description": "a test", "outcome": "icl", "matching": "loss"}


def plan(score: str = "icl", level: float = 0.95) -> Any:
    """As much of a plan as a test asks of it."""
    return SimpleNamespace(
        outcome=lambda name: SimpleNamespace(score=score if name == "icl" else name),
        intervals=SimpleNamespace(level=level),
        reading_alpha=round(1 - level, 12),
        descriptive=SimpleNamespace(band_draws=999, band_trials=100),
    )


@pytest.mark.parametrize("module", ["recompute", "asked", "mirror", "second_path", "resampled", "described"])
def test_second_path_shares_no_code_with_what_it_checks(module: str) -> None:
    rooms = {path.split("/")[2] for path in code_closure(f"gradnoise.provenance.audit.{module}", "src")}
    assert not rooms & {"analysis", "figures", "noise", "report", "training"}


def test_slopes_are_r_slopes() -> None:
    test = SlopeTest(kind="slope", predictor="pne", cluster="seed", alternative="two-sided", **ABOUT)
    found, answer = second_path.slope(plan(), test, SLOPES), R["d3"]["seed_slopes"]
    assert (found["estimate"], found["details"]["t"], found["df"]) == pytest.approx(
        (answer["mean"], answer["t"], answer["df"])
    )
    assert [found["low"], found["high"]] == pytest.approx(answer["ci95"])
    assert found["p"] == pytest.approx(answer["p"])
    assert found["outcome"] == "above zero"


def test_seed_without_different_doses_has_no_slope() -> None:
    frame = SLOPES.assign(pne=SLOPES["pne"].where(SLOPES["seed"] != 1, 0.25))
    test = SlopeTest(kind="slope", predictor="pne", cluster="seed", alternative="greater", **ABOUT)
    found = second_path.slope(plan(), test, frame)
    assert (found["seeds"], found["runs"], found["details"]["seeds_without_slope"]) == (7, 49, 1)


def test_contrast_is_r_paired_difference() -> None:
    cells = D8.assign(cell=D8["phase"])
    late, early = ("late",), ("early",)
    test = ContrastTest(
        kind="contrast", first=late, second=early, cluster="seed", alternative="two-sided", **ABOUT
    )
    found, answer = second_path.contrast(plan(), test, cells), R["d8"]["late_minus_early_paired"]
    assert (found["estimate"], found["p"], found["df"]) == pytest.approx(
        (answer["mean"], answer["p"], answer["df"])
    )
    assert [found["low"], found["high"]] == pytest.approx(answer["ci95"])


@pytest.mark.parametrize("name", ["balanced", "unbalanced"])
def test_anova_is_r_type_three_blocked_by_seed(name: str) -> None:
    frame = (D8 if name == "balanced" else D8_UNBALANCED).rename(
        columns={"total": "batch", "phase": "learning_rate"}
    )
    test = AnovaTest(
        kind="anova", factors=("batch", "learning_rate"), block="seed", type="III", robust="hc3", **ABOUT
    )
    terms = second_path.anova(plan(), test, frame)["details"]["terms"]
    for term, theirs in {
        "seed": "seed",
        "batch": "total",
        "learning_rate": "phase",
        "batch:learning_rate": "total:phase",
    }.items():
        answer = R["d8"][name]["type3_seed"][theirs]
        found = terms[term]
        assert (found["sum_sq"], found["df"], found["F"], found["p"]) == pytest.approx(
            (answer["Sum Sq"], answer["Df"], answer["F value"], answer["Pr(>F)"]), rel=1e-8
        )


def test_equivalence_takes_the_larger_p_whatever_the_side() -> None:
    generator = np.random.default_rng(1)
    rows = [
        {"seed": s, "cell": c, "icl": 0.5 + 0.015 * (c == "a") + generator.normal(0, 0.01)}
        for s, c in product(range(8), "ab")
    ]
    frame = pd.DataFrame(rows)
    test = TostTest(kind="tost", arms=("a", "b"), cluster="seed", low=-0.02, high=0.03, **ABOUT)
    found = second_path.tost(plan(), test, frame)
    details = found["details"]
    assert details["p_high"] > details["p_low"]
    assert found["p"] == details["p_high"]
    turned = TostTest(kind="tost", arms=("b", "a"), cluster="seed", low=-0.03, high=0.02, **ABOUT)
    assert second_path.tost(plan(), turned, frame)["p"] == pytest.approx(found["p"])
    inside = details["margin_low"] < found["low"] and found["high"] < details["margin_high"]
    assert inside == (found["p"] < 0.05)


def test_pooling_finds_the_isotonic_fit() -> None:
    generator = np.random.default_rng(2)
    means = generator.normal(size=(200, 5))
    means -= means.mean(axis=1, keepdims=True)
    fits = np.array([trends.isotonic(row) for row in means])
    assert (np.diff(fits, axis=1) >= 0).all()
    assert described.many_isotonic(means) == pytest.approx(fits)
    assert trends.fitted_squares(means) == pytest.approx((fits**2).sum(axis=1))
    answer = R["d1"]["isoreg_ties"]
    assert trends.isotonic(D1.groupby("level")["icl"].mean().to_numpy()) == pytest.approx(answer["yf"][::5])


@pytest.mark.parametrize("draws", [999, 4500])
def test_replay_draws_the_same_permutations(draws: int) -> None:
    y = np.random.default_rng(3).normal(size=(6, 4)) + np.linspace(0, 0.8, 4)
    assert trends.replay(y, draws, 17) == permutation_p(y, draws, 17)
    assert trends.replay(y, draws, 18) != trends.replay(y, draws, 17)


def test_decreasing_trend_with_a_reversal() -> None:
    curve = {"a": 0.60, "b": 0.55, "c": 0.57, "d": 0.50}
    noise = np.random.default_rng(4).normal(0, 0.002, (6, 4))
    rows = [
        {"seed": s, "cell": cell, "icl": value + noise[s, k]}
        for s in range(6)
        for k, (cell, value) in enumerate(curve.items())
    ]
    fields = {
        "cluster": "seed",
        "alternative": "decreasing",
        "margin": 0.01,
        "steps": "required",
        "draws": 999,
    }
    test = TrendTest(kind="trend", levels=tuple((cell,) for cell in curve), **fields, **ABOUT)
    found = trends.trend(plan(), test, pd.DataFrame(rows), "key")
    steps = found["details"]["steps"]
    assert found["outcome"] == "reversal"
    assert [step["p_adjusted"] < 0.05 for step in steps] == [False, True, False]
    assert found["p"] == found["details"]["noninferior_p"] > 0.9
    fitted = [level["fitted"] for level in found["details"]["levels"]]
    assert fitted[1] == fitted[2] == pytest.approx(0.56, abs=0.003)


def test_level_without_runs_is_no_trend() -> None:
    fields = {
        "cluster": "seed",
        "alternative": "increasing",
        "margin": 0.01,
        "steps": "reported",
        "draws": 999,
    }
    test = TrendTest(kind="trend", levels=(("a",), ("b",), ("c",)), **fields, **ABOUT)
    frame = pd.DataFrame({"seed": [0, 1] * 2, "cell": ["a", "a", "b", "b"], "icl": [0.1, 0.2, 0.3, 0.5]})
    with pytest.raises(Unable):
        trends.trend(plan(), test, frame, "key")


def test_cluster_robust_error_is_clubsandwich_where_doses_are_balanced() -> None:
    # There one intercept, as R has it, and one for each seed give the same.
    answer = R["d3"]["cr2"]["pne"]
    found = resampled.cluster_robust(SLOPES, "icl", "pne", 0.95)
    numbers = (found["estimate"], found["stderr"], found["df"], found["p"])
    assert numbers == pytest.approx((answer["beta"], answer["se"], answer["df"], answer["p"]), rel=1e-7)


def test_sign_flips_are_r_sign_flips() -> None:
    slopes = np.array(R["d1"]["seed_slopes"]["slopes"])
    assert resampled.flips(slopes, "greater")["p"] == R["d1"]["signflip"]["p_one"]
    assert resampled.flips(slopes, "two-sided")["p"] == R["d1"]["signflip"]["p_two"]


@pytest.mark.parametrize(("count", "draws"), [(5, 9999), (8, 999)])
def test_bootstraps_draw_what_the_analysis_draws(count: int, draws: int) -> None:
    generator = np.random.default_rng(count)
    seeds = np.repeat(np.arange(count), 4)
    dose = np.tile(np.arange(4.0), count) + generator.normal(0, 0.1, 4 * count)
    frame = pd.DataFrame(
        {"seed": seeds, "pne": dose, "icl": 0.02 * dose + generator.normal(0, 0.05, 4 * count)}
    )
    centred = frame - frame.groupby("seed").transform("mean").assign(seed=0)
    test = SlopeTest(kind="slope", predictor="pne", cluster="seed", alternative="greater", **ABOUT)
    theirs = wild_bootstrap(centred, "icl", "pne", "seed", alternative="greater", draws=draws, seed=9)
    ours = resampled.wild(frame, "icl", test, draws, 9)
    assert ours["p"] == theirs.p
    assert (ours["details"]["exact"], ours["details"]["draws"]) == (theirs.exact, theirs.draws)
    slopes = np.array([line[0] for line in second_path.seed_lines(frame, "icl", "pne")[0].values()])
    booted, mean = (
        seed_bootstrap(slopes, draws=draws, seed=9),
        resampled.studentised_bootstrap(slopes, 0.95, draws, 9),
    )
    assert (mean["p"], mean["low"], mean["high"]) == pytest.approx((booted.p, booted.low, booted.high))


def test_paths_of_mediation_are_r_paths() -> None:
    asked: Any = SimpleNamespace(id="m", outcome="icl", predictor="pne", mediator="sharp", resamples=999)
    found, answer = resampled.mediation(plan(), asked, D10, "key"), R["d10"]
    for name in ("a", "b", "total", "direct"):
        assert found["details"][name]["estimate"] == pytest.approx(answer[name])
    assert [found["details"][name]["se"] for name in ("a", "b")] == pytest.approx(
        [answer["se_a"], answer["se_b"]]
    )
    assert found["estimate"] == pytest.approx(answer["indirect"])
    assert found["low"] < found["estimate"] < found["high"]


def test_band_is_the_analysis_band() -> None:
    y = np.random.default_rng(6).normal([0.4, 0.45, 0.44, 0.5], 0.02, (6, 4))
    rows = [{"seed": s, "level": k + 1, "icl": y[s, k]} for s in range(6) for k in range(4)]
    seed = trends.draws_seed("key", "t/band")
    theirs = isotonic_band(pd.DataFrame(rows), "icl", "level", "seed", draws=999, trials=100, seed=seed)
    fields = {
        "cluster": "seed",
        "alternative": "increasing",
        "margin": 0.01,
        "steps": "reported",
        "draws": 999,
    }
    test = TrendTest(kind="trend", levels=(("a",), ("b",), ("c",), ("d",)), **fields, **ABOUT)
    ours = described.band(plan(), test, y, list(range(6)), [], "key")
    for name in ("fitted", "low", "high", "bootstrap_low", "bootstrap_high", "bootstrap_coverage"):
        assert ours[name] == pytest.approx(getattr(theirs, name)), name


def test_holm_is_r_holm_and_keeps_what_is_missing() -> None:
    assert verdicts.holm(R["holm"]["p"], 1.0) == pytest.approx(R["holm"]["holm"])
    assert verdicts.holm([0.01, None, 0.02], 1.0) == pytest.approx([0.03, 1.0, 0.04])
