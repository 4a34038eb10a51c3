"""Rank correlation against R, and why runs of one seed are not independent pairs."""

import numpy as np
import pandas as pd
import pytest
from scipy import stats
from tests.unit.analysis.oracle import D1, D2, D3, D5, D5_RUNS, R

from gradnoise.analysis import spearman
from gradnoise.analysis.statistics.correlation import spearman_intervals
from gradnoise.base.errors import InputError

CASES = {
    "d1": (D1, "pne", R["d1"]["spearman"]),
    "d1 ties": (D1, "level", R["d1"]["spearman_level_ties"]),
    "d2": (D2, "pne", R["d2"]["spearman"]),
    "d5 rows": (D5, "pne", R["d5"]["spearman_rows"]),
    "d5 runs": (D5_RUNS, "pne", R["d5"]["spearman_runs"]),
}


def edgeworth_p(s: float, n: int) -> float:
    """Two-sided p of S = sum of squared rank differences: algorithm AS 89, R's default without ties."""
    low = s <= (n**3 - n) / 6
    b = 1 / n
    x = (6 * (s + 1 if low else s - 2) * b / (n**2 - 1) - 1) * np.sqrt(n - 1)
    y = x**2
    last = 0.0879 + 0.0151 * b - y * (0.0072 - 0.0831 * b + y * b * (0.0131 - 4.6e-4 * y))
    middle = -0.0758 + b * (0.1033 + 0.3932 * b) - y * b * last
    u = x * b * (0.2274 + b * (0.2531 + 0.1745 * b) + y * middle)
    upper = u / np.exp(y / 2) + stats.norm.sf(x)
    return float(2 * (1 - upper if low else upper))


@pytest.mark.parametrize(("frame", "predictor", "theirs"), list(CASES.values()), ids=list(CASES))
def test_pooled_rho_and_three_intervals_are_rs(frame: pd.DataFrame, predictor: str, theirs: dict) -> None:
    rho, p = stats.spearmanr(frame[predictor], frame["icl"])
    n = len(frame)
    assert n == theirs["n"]
    assert (rho, p) == pytest.approx((theirs["rho"], theirs["p_asymptotic_t"]), rel=1e-9)
    assert (n**3 - n) * (1 - rho) / 6 == pytest.approx(theirs["S"], rel=1e-9)
    for name, interval in spearman_intervals(rho, n).items():
        assert interval == pytest.approx(theirs[f"ci95_{name}"], rel=1e-9)


def test_rs_default_p_is_another_approximation_than_scipys() -> None:
    # Without ties R sums an Edgeworth series: 1.7 times scipy's p at n = 30. With ties it too takes t.
    for frame, predictor, theirs in CASES.values():
        ties = frame[predictor].duplicated().any() or frame["icl"].duplicated().any()
        p = theirs["p_asymptotic_t"] if ties else edgeworth_p(theirs["S"], theirs["n"])
        assert p == pytest.approx(theirs["p_exact_or_edgeworth"], rel=1e-6)


def test_rho_is_averaged_over_seeds() -> None:
    found = spearman(D3, "icl", "pne")
    z = np.arctanh([stats.spearmanr(rows["pne"], rows["icl"]).statistic for _, rows in D3.groupby("seed")])
    test = stats.ttest_1samp(z, 0)
    interval = test.confidence_interval(0.95)
    assert found.rho == pytest.approx(np.tanh(z.mean()))
    assert (found.low, found.high) == pytest.approx((np.tanh(interval.low), np.tanh(interval.high)))
    assert (found.p, found.df) == (pytest.approx(test.pvalue), 7)
    assert list(found.by_cluster.values()) == pytest.approx(np.tanh(z))
    assert (found.pooled_low, found.pooled_high) == spearman_intervals(found.pooled_rho, len(D3))[
        "bonett_wright"
    ]
    wider = spearman(D3, "icl", "pne", level=0.99)
    assert wider.low < found.low < found.high < wider.high


def test_a_seed_in_perfect_order_keeps_the_mean_finite() -> None:
    ordered = D1.assign(icl=D1["icl"].where(D1["seed"] != "s0", 0.4 + 0.01 * D1["level"]))
    found = spearman(ordered, "icl", "level")
    assert 1.0 in found.by_cluster.values()
    assert found.high < 1
    # Half of what one swap of neighbours costs: between perfect order and the next lower rho.
    swapped = stats.spearmanr(range(6), [1, 0, 2, 3, 4, 5]).statistic
    z = [np.arctanh(min(rho, (1 + swapped) / 2)) for rho in found.by_cluster.values()]
    assert found.rho == pytest.approx(np.tanh(np.mean(z)))


def test_pooled_interval_ignores_seeds_and_so_is_only_a_description() -> None:
    # Seeds differ in both variables; within a seed nothing is related. 400 studies of 6 seeds x 5 runs.
    draw = np.random.default_rng(17)
    frame = pd.DataFrame([(s, k) for s in range(6) for k in range(5)], columns=["seed", "run"])
    missed = np.zeros(2)
    for _ in range(400):
        frame["dose"] = draw.normal(size=6)[frame["seed"]] * 2 + draw.normal(size=30)
        frame["icl"] = draw.normal(size=6)[frame["seed"]] * 2 + draw.normal(size=30)
        found = spearman(frame, "icl", "dose")
        missed += [not found.low <= 0 <= found.high, not found.pooled_low <= 0 <= found.pooled_high]
    within, pooled = missed / 400
    assert abs(within - 0.05) < 3 * np.sqrt(0.05 * 0.95 / 400)
    assert pooled > 0.25


def test_what_it_leaves_out_and_refuses() -> None:
    flat = D3.assign(pne=D3["pne"].where(D3["seed"] != "s0", 1.0))
    found = spearman(flat, "icl", "pne")
    assert (found.flat, found.df, found.runs) == (("s0",), 6, 56)
    for frame, message in (
        (D3[D3["seed"] == "s0"], "1 correlations"),
        (D3[D3["level"] < 3], "0 correlations"),
        (D3.assign(icl=D3["level"]), "does not vary"),
        (pd.concat([D3, D3]), "given twice"),
    ):
        with pytest.raises(InputError, match=message):
            spearman(frame, "icl", "pne")
    for arguments, message in (((0.5, 3), "n: 3"), ((1.2, 30), "rho: 1.2")):
        with pytest.raises(InputError, match=message):
            spearman_intervals(*arguments)
    assert spearman_intervals(1.0, 30)["fisher"] == pytest.approx((1.0, 1.0))
