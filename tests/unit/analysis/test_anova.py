"""Analysis of variance, and the planned comparison that stands before it, against R."""

import numpy as np
import pandas as pd
import pingouin
import pytest
from statsmodels.formula.api import ols
from statsmodels.stats.anova import anova_lm
from tests.unit.analysis.oracle import D2, D8, D8_UNBALANCED, R

from gradnoise.analysis import anova, contrast
from gradnoise.base.errors import InputError

FACTORS = ["total", "phase"]
DESIGNS = {"balanced": D8, "unbalanced": D8_UNBALANCED}
KEYS = (
    ("sum_sq", "Sum Sq"),
    ("mean_sq", "Mean Sq"),
    ("F", "F value"),
    ("F", "F"),
    ("PR(>F)", "Pr(>F)"),
)
SUM = "C(total, Sum) * C(phase, Sum)"


def rows_of(table: pd.DataFrame) -> dict[str, pd.Series]:
    """statsmodels' rows under R's names."""
    names = {"Intercept": "(Intercept)", "Residual": "Residuals"}
    plain = {term: term.replace("C(", "").replace(", Sum)", "") for term in table.index}
    return {names.get(name, name): table.loc[term] for term, name in plain.items()}


def assert_is_rs(found: dict[str, pd.Series], theirs: dict[str, dict]) -> None:
    assert set(found) == set(theirs)
    for name, row in theirs.items():
        assert found[name]["df"] == row["Df"]
        for ours, key in KEYS:
            if row.get(key) is not None:
                assert found[name][ours] == pytest.approx(row[key], rel=1e-9)


@pytest.mark.parametrize("design", list(DESIGNS))
@pytest.mark.parametrize(("answer", "block"), [("type3", None), ("type3_seed", "seed")])
def test_type_three_is_rs(design: str, answer: str, block: str | None) -> None:
    found, theirs = anova(DESIGNS[design], "icl", FACTORS, block), R["d8"][design][answer]
    assert set(found.terms) == set(theirs) - {"(Intercept)", "Residuals"}
    for name, term in found.terms.items():
        row = theirs[name]
        assert term.df == row["Df"]
        assert (term.sum_sq, term.F, term.p) == pytest.approx(
            (row["Sum Sq"], row["F value"], row["Pr(>F)"]), rel=1e-9
        )
    assert found.residual_sum_sq == pytest.approx(theirs["Residuals"]["Sum Sq"], rel=1e-9)
    assert (found.residual_df, found.runs) == (theirs["Residuals"]["Df"], len(DESIGNS[design]))


@pytest.mark.parametrize("design", list(DESIGNS))
def test_hc3_is_rs(design: str) -> None:
    found, theirs = anova(DESIGNS[design], "icl", FACTORS, block=None), R["d8"][design]["type3_hc3"]
    for name, term in found.terms.items():
        row = theirs[name]
        assert (term.robust_F, term.robust_p) == pytest.approx((row["F"], row["Pr(>F)"]), rel=1e-9)


def test_other_data_with_a_numeric_factor_is_rs() -> None:
    found, theirs = anova(D2, "icl", ["source", "level"]), R["d2"]["anova3"]
    for ours, name in (("source", "source"), ("level", "factor(level)"), ("seed", "seed")):
        assert pytest.approx(theirs[name]["F value"], rel=1e-9) == found.terms[ours].F
        assert found.terms[ours].p == pytest.approx(theirs[name]["Pr(>F)"], rel=1e-9)
    interaction = found.terms["source:level"]
    assert interaction.sum_sq == pytest.approx(theirs["source:factor(level)"]["Sum Sq"], rel=1e-9)
    assert R["d8"]["n_unbalanced"] == len(D8_UNBALANCED)


@pytest.mark.parametrize("design", list(DESIGNS))
@pytest.mark.parametrize(
    "answer", ["type1", "type2", "type3", "type2_seed", "type3_seed", "type2_hc3", "type3_hc3"]
)
def test_statsmodels_types_are_rs(design: str, answer: str) -> None:
    # The library behind `anova`, with its intercept, and at the types that the study does not use.
    blocks = "C(seed, Sum) + " if answer.endswith("seed") else ""
    fit = ols(f"icl ~ {blocks}{SUM}", DESIGNS[design]).fit()
    robust = {"robust": "hc3"} if answer.endswith("hc3") else {}
    assert_is_rs(rows_of(anova_lm(fit, typ=int(answer[4]), **robust)), R["d8"][design][answer])


def test_statsmodels_types_of_the_other_data_are_rs() -> None:
    fit = ols("icl ~ C(seed, Sum) + C(source, Sum) * C(level, Sum)", D2).fit()
    for answer in ("anova2", "anova3"):
        found = {
            name.replace("level", "factor(level)"): row
            for name, row in rows_of(anova_lm(fit, typ=int(answer[-1]))).items()
        }
        assert_is_rs(found, R["d2"][answer])


def test_another_coding_than_sum_tests_something_else() -> None:
    trap = rows_of(anova_lm(ols("icl ~ total * phase", D8_UNBALANCED).fit(), typ=3))
    # R's first levels are in alphabetical order too, so the trap is the same one in both.
    assert_is_rs(trap, R["d8"]["type3_treatment_contrasts"])
    ours = anova(D8_UNBALANCED, "icl", FACTORS, block=None).terms["total"]
    assert trap["total"]["PR(>F)"] > 0.5
    assert ours.p < 0.01


def test_column_names_are_never_read_as_formulas() -> None:
    names = {
        "total": "total * seed",
        "phase": "np.log(phase):x",
        "icl": "Q('icl') - 1",
        "seed": "C(seed, Sum)",
    }
    found = anova(
        D8.rename(columns=names), names["icl"], [names["total"], names["phase"]], block=names["seed"]
    )
    plain = anova(D8, "icl", FACTORS)
    assert [term.F for term in found.terms.values()] == [term.F for term in plain.terms.values()]
    assert set(found.terms) == {
        names["seed"],
        names["total"],
        names["phase"],
        f"{names['total']}:{names['phase']}",
    }


def test_hc3_is_left_out_where_one_run_determines_a_coefficient() -> None:
    single = D8[~((D8["total"] == "low") & (D8["phase"] == "late")) | (D8["seed"] == "s0")]
    found = anova(single, "icl", FACTORS, block=None)
    assert all(term.robust_F is None and term.robust_p is None for term in found.terms.values())
    assert all(np.isfinite(term.F) for term in found.terms.values())


def test_what_anova_refuses() -> None:
    empty = D8[~((D8["total"] == "low") & (D8["phase"] == "late"))]
    for frame, factors, message in (
        (empty, FACTORS, "5 of 6 combinations"),
        (D8.assign(task=0), ["total"], "several rows"),
        (D8[D8["phase"] == "late"], FACTORS, r"phase: \['late'\]"),
        (D8[D8["seed"] == "s0"], FACTORS, "do not determine"),
        (D8.assign(icl=0.5), FACTORS, "no residual variation"),
        (D8, [], "must be different columns"),
        (D8, ["total", "seed"], "must be different columns"),
        (pd.concat([D8, D8]), FACTORS, "given twice"),
    ):
        with pytest.raises(InputError, match=message):
            anova(frame, "icl", factors)


def test_contrast_pairs_seeds_as_r_does() -> None:
    theirs = R["d8"]["late_minus_early_paired"]
    found = contrast(D8, "icl", "phase", (["late"], ["early"]))
    assert (found.estimate, found.t, found.p) == pytest.approx(
        (theirs["mean"], theirs["t"], theirs["p"]), rel=1e-9
    )
    assert (found.df, found.reading) == (theirs["df"], "undecided")
    assert (found.low, found.high) == pytest.approx(theirs["ci95"], rel=1e-9)
    assert contrast(D8, "icl", "phase", (["late"], ["early"]), alternative="greater").p == pytest.approx(
        theirs["p"] / 2
    )


def test_contrast_weighs_arms_alike_and_leaves_out_seeds_that_lack_one() -> None:
    frame = D8.assign(cell=D8["total"] + "-" + D8["phase"])
    groups = (["low-late", "high-late"], ["low-mid", "low-early", "high-early"])
    table = frame.pivot(index="seed", columns="cell", values="icl")
    differences = table[groups[0]].mean(axis=1) - table[groups[1]].mean(axis=1)
    assert contrast(frame, "icl", "cell", groups).differences == pytest.approx(tuple(differences))
    missing = frame[~((frame["seed"] == "s3") & (frame["cell"] == "low-mid"))]
    found = contrast(missing, "icl", "cell", groups)
    assert found.incomplete == ("s3",)
    assert found.differences == pytest.approx(tuple(differences.drop("s3")))
    rise = frame.assign(icl=frame["icl"] + 0.1 * frame["phase"].eq("late"))
    assert contrast(rise, "icl", "cell", groups).reading == "above zero"
    assert contrast(rise, "icl", "cell", groups[::-1]).reading == "below zero"


def test_what_contrast_refuses() -> None:
    for groups, message in (
        ((["late"], []), "share none"),
        ((["late"], ["late", "mid"]), "share none"),
        ((["late"], ["never"]), "phase: never"),
    ):
        with pytest.raises(InputError, match=message):
            contrast(D8, "icl", "phase", groups)
    with pytest.raises(InputError, match="1 clusters"):
        contrast(D8[D8["seed"] == "s0"], "icl", "phase", (["late"], ["early"]))
    with pytest.raises(InputError, match="does not vary"):
        contrast(D8.assign(icl=D8["phase"].eq("late") * 0.3), "icl", "phase", (["late"], ["early"]))


def test_pingouins_strata_and_welch_are_rs() -> None:
    # Other libraries' secondary analyses of the same data; the study itself pairs by seed.
    strata = pingouin.rm_anova(D8, dv="icl", within=FACTORS, subject="seed").set_index("Source")
    for source, stratum in (("total", "total"), ("phase", "phase"), ("total * phase", "total:phase")):
        theirs, row = R["d8"]["rm_aov"][f"Error: seed:{stratum}"], strata.loc[source]
        effect, residual = theirs[stratum], theirs["Residuals"]
        assert (row["SS"], row["MS"], row["F"], row["p_unc"]) == pytest.approx(
            [effect[key] for key in ("Sum Sq", "Mean Sq", "F value", "Pr(>F)")], rel=1e-9
        )
        assert (row["ddof1"], row["ddof2"]) == (effect["Df"], residual["Df"])
        left = row["MS"] / row["F"]
        assert (left, left * row["ddof2"]) == pytest.approx(
            (residual["Mean Sq"], residual["Sum Sq"]), rel=1e-9
        )
    welch = pingouin.welch_anova(D8, dv="icl", between="phase").iloc[0]
    theirs = R["d8"]["welch_anova_phase"]
    assert (welch["F"], welch["ddof1"], welch["ddof2"], welch["p_unc"]) == pytest.approx(
        (theirs["F"], theirs["df1"], theirs["df2"], theirs["p"]), rel=1e-9
    )
