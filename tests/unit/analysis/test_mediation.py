"""Mediation within seeds, against R, a plain bootstrap and what pingouin calls the same thing."""

from itertools import product

import numpy as np
import pandas as pd
import pingouin
import pytest
from statsmodels.formula.api import ols
from tests.unit.analysis.oracle import D10, R

from gradnoise.analysis import mediation
from gradnoise.base.errors import InputError


def test_paths_are_rs() -> None:
    found, theirs = mediation(D10, "icl", "pne", "sharp"), R["d10"]
    ours = (found.a.estimate, found.b.estimate, found.total.estimate, found.direct.estimate, found.indirect)
    assert ours == pytest.approx(
        [theirs[name] for name in ("a", "b", "total", "direct", "indirect")], rel=1e-9
    )
    assert (found.a.se, found.b.se, found.sobel_se) == pytest.approx(
        (theirs["se_a"], theirs["se_b"], theirs["sobel_se"]), rel=1e-9
    )
    total = ols("icl ~ C(seed) + pne", D10).fit()
    both = ols("icl ~ C(seed) + pne + sharp", D10).fit()
    assert (found.total.se, found.direct.se) == pytest.approx((total.bse["pne"], both.bse["pne"]), rel=1e-9)
    assert found.label == "exploratory"
    assert (found.clusters, found.runs, found.exact) == (5, 30, True)


def test_rho_is_where_the_indirect_effect_vanishes() -> None:
    found = mediation(D10, "icl", "pne", "sharp")
    outcome, mediator = (ols(f"{name} ~ C(seed) + pne", D10).fit().resid for name in ("icl", "sharp"))
    assert found.rho_at_zero == pytest.approx(np.corrcoef(outcome, mediator)[0, 1], rel=1e-9)
    # Imai, Keele and Yamamoto: the indirect effect if the errors of the two equations correlate by rho.
    rho_tilde, ratio = found.rho_at_zero, outcome.std() / mediator.std()

    def indirect(rho: float) -> float:
        shift = rho * np.sqrt((1 - rho_tilde**2) / (1 - rho**2))
        return found.a.estimate * ratio * (rho_tilde - shift)

    assert indirect(0.0) == pytest.approx(found.indirect, rel=1e-9)
    assert indirect(found.rho_at_zero) == pytest.approx(0, abs=1e-12)


def test_interval_is_the_studentised_bootstrap_over_all_resamples_of_seeds() -> None:
    frame = D10[D10["seed"].isin(["s0", "s1", "s2", "s3"])]
    groups = [rows for _, rows in frame.groupby("seed")]

    def effect(seeds: list[int]) -> float:
        rows = pd.concat([groups[s].assign(seed=f"c{k}") for k, s in enumerate(seeds)])
        centred = rows[["pne", "sharp", "icl"]] - rows.groupby("seed")[["pne", "sharp", "icl"]].transform(
            "mean"
        )
        x, m, y = centred.to_numpy().T
        b = np.linalg.lstsq(np.column_stack([x, m]), y, rcond=None)[0][1]
        return float(x @ m / (x @ x) * b)

    def error(seeds: list[int]) -> float:
        without = np.array([effect([*seeds[:k], *seeds[k + 1 :]]) for k in range(4)])
        return float(np.sqrt(3 / 4 * ((without - without.mean()) ** 2).sum()))

    estimate, se = effect([0, 1, 2, 3]), error([0, 1, 2, 3])
    picks = [list(pick) for pick in product(range(4), repeat=4) if len(set(pick)) > 1]
    known = {tuple(sorted(pick)): None for pick in picks}
    t_of = {pick: (effect(list(pick)) - estimate) / error(list(pick)) for pick in known}
    t = np.array([t_of[tuple(sorted(pick))] for pick in picks])
    lower, upper = np.quantile(t, [0.025, 0.975], method="inverted_cdf")
    found = mediation(frame, "icl", "pne", "sharp")
    assert found.se == pytest.approx(se, rel=1e-9)
    assert (found.low, found.high) == pytest.approx((estimate - upper * se, estimate - lower * se), rel=1e-9)


def collinear_but_for(seeds: int) -> pd.DataFrame:
    """Five seeds; only in the last `seeds` of them is the mediator more than the predictor."""
    draw = np.random.default_rng(5)
    frame = pd.DataFrame([(s, x) for s in range(5) for x in draw.normal(0, 1, 4)], columns=["seed", "x"])
    frame["m"] = 0.3 * frame["x"] + draw.normal(0, 1, 20) * (frame["seed"] >= 5 - seeds)
    return frame.assign(y=frame["m"] + draw.normal(0, 0.1, 20))


def test_a_resample_that_does_not_tell_mediator_from_predictor_is_left_out() -> None:
    # Otherwise the interval rests on what rounding leaves, and changes with the unit of the predictor.
    frame = collinear_but_for(2)
    found, other = mediation(frame, "y", "x", "m"), mediation(frame.assign(x=frame["x"] / 3), "y", "x", "m")
    assert (other.low, other.high, other.p) == pytest.approx(
        (3 * found.low, 3 * found.high, found.p), rel=1e-6
    )
    with pytest.raises(InputError, match="indirect effect: does not vary"):
        mediation(collinear_but_for(1), "y", "x", "m")


def test_pingouins_path_from_the_mediator_leaves_the_predictor_out() -> None:
    table = pingouin.mediation_analysis(D10, x="pne", m="sharp", y="icl", n_boot=10, seed=1)
    path = table.set_index("path")["coef"]["Y ~ sharp"]
    assert path == pytest.approx(ols("icl ~ sharp", D10).fit().params["sharp"], rel=1e-9)
    given = ols("icl ~ sharp + pne", D10).fit().params["sharp"]
    assert abs(path - given) > 0.05 * abs(given)


def test_a_seed_with_one_dose_does_not_break_the_resamples() -> None:
    flat = D10.assign(pne=D10["pne"].where(D10["seed"] != "s0", 0.3))
    found = mediation(flat, "icl", "pne", "sharp")
    assert np.isfinite([found.low, found.high, found.p, found.se]).all()
    drawn = mediation(flat, "icl", "pne", "sharp", draws=99, seed=4)
    assert not drawn.exact
    assert drawn == mediation(flat, "icl", "pne", "sharp", draws=99, seed=4)


def test_what_it_refuses() -> None:
    for frame, message in (
        (D10[D10["seed"].isin(["s0", "s1"])], "2 clusters"),
        (D10.groupby("seed").head(1), "0 runs beyond"),
        (D10.assign(sharp=2 * D10["pne"]), "sharp: determined"),
        (D10.assign(icl=D10["pne"] - D10["sharp"]), "sharp: determined"),
        (D10.assign(pne=1.0), "pne: one value"),
        (pd.concat([D10, D10]), "given twice"),
    ):
        with pytest.raises(InputError, match=message):
            mediation(frame, "icl", "pne", "sharp")
