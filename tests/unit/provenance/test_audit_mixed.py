"""The auditor's mixed models against R, and what they refuse to certify."""

from typing import Any

import numpy as np
import pandas as pd
import pytest
from tests.unit.analysis.oracle import D1, D2, D3, D5, R_CENTRE, R

from gradnoise.provenance.audit.dense_mixed import Array, Certificate, certify, covariance, optimum

# Data, columns of X besides the intercept, random effects, cluster, R's answer, and its coefficients' names.
CASES: dict[str, tuple[pd.DataFrame, list[str], list[str], str, dict[str, Any]]] = {
    "one covariate": (D1, ["pne", "lossc"], ["1"], "seed", R["d1"]["lmm"]),
    "unbalanced": (D2, ["pne", "lossc", "source1"], ["1"], "seed", R["d2"]["lmm"]),
    "random slope": (D3, ["pne"], ["1", "pne"], "seed", R["d3"]["lmm_rs"]),
    "rows within runs": (D5, ["pne"], ["1"], "run", R["d5"]["lmm"]),
}


def columns(frame: pd.DataFrame, names: list[str]) -> Array:
    known = {"1": np.ones(len(frame)), "lossc": frame.get("loss", pd.Series(0.0, frame.index)) - R_CENTRE}
    if "source" in frame:
        known["source1"] = np.where(frame["source"] == sorted(set(frame["source"]))[0], 1.0, -1.0)
    return np.column_stack([known.get(name, frame.get(name)) for name in names])


def parts(case: str) -> tuple[Array, Array, Array, np.ndarray, dict[str, Any]]:
    frame, fixed, random, cluster, answer = CASES[case]
    y, codes = frame["icl"].to_numpy(), frame[cluster].factorize()[0]
    return y, columns(frame, ["1", *fixed]), columns(frame, random), codes, answer


def certified(case: str, scale: float = 1.0, sigma: float = 1.0) -> tuple[Certificate, dict[str, Any]]:
    """R's fit, or one with other variances, as a report would give it."""
    y, x, z, codes, answer = parts(case)
    theta = answer["theta"] if isinstance(answer["theta"], list) else [answer["theta"]]
    relative = covariance([scale * value for value in theta])
    return certify(y, x, z, codes, relative, sigma * answer["sigma"]), answer


@pytest.mark.parametrize("case", CASES)
def test_r_fits_are_certified_with_r_numbers(case: str) -> None:
    found, answer = certified(case)
    assert found.score < 1e-5
    assert found.loglik == pytest.approx(answer["loglik_reml"], abs=1e-8)
    for row, term in zip(np.eye(len(found.beta)), answer["fixed_KR"].values(), strict=True):
        estimate, error, _, df = found.combination(row)
        assert estimate == pytest.approx(term["Estimate"], rel=1e-6)
        assert error == pytest.approx(term["Std. Error"], rel=1e-6)
        assert df == pytest.approx(term["df"], rel=1e-5)


@pytest.mark.parametrize("change", [{"scale": 0.9}, {"scale": 1.1}, {"sigma": 0.98}])
@pytest.mark.parametrize("case", CASES)
def test_other_variances_are_not_certified(case: str, change: dict[str, float]) -> None:
    assert certified(case, **change)[0].score > 1e-3


def test_maximum_likelihood_passes_for_no_reml_fit() -> None:
    # ML divides by n instead of n - p, here 30 and 27.
    assert certified("one covariate", sigma=np.sqrt(27 / 30))[0].score > 1e-2


@pytest.mark.parametrize("case", CASES)
def test_search_ends_at_r_optimum(case: str) -> None:
    y, x, z, codes, answer = parts(case)
    relative, sigma = optimum(y, x, z, codes)
    assert certify(y, x, z, codes, relative, sigma).loglik == pytest.approx(answer["loglik_reml"], abs=1e-7)


def test_variance_of_zero_is_certified_and_keeps_the_degrees_of_freedom_of_seeds() -> None:
    # Slopes that do not differ between seeds: their variance is estimated as 0, and df stays S - 1.
    generator = np.random.default_rng(5)
    seeds = np.repeat(np.arange(5), 6)
    dose = np.tile(np.linspace(-1, 1, 6), 5)
    noise = generator.normal(0, 0.01, (5, 6))
    slope = dose[:6] / (dose[:6] @ dose[:6])
    noise -= np.outer(noise @ slope - (noise @ slope).mean(), dose[:6])
    y = 0.5 + generator.normal(0, 0.02, 5)[seeds] + 0.02 * dose + noise.ravel()
    x = np.column_stack([np.ones(30), dose])
    relative, sigma = optimum(y, x, x, seeds)
    found = certify(y, x, x, seeds, relative, sigma)
    assert found.score < 1e-3
    assert found.least < 1e-3
    assert found.combination(np.array([0.0, 1.0]))[3] == pytest.approx(4, abs=0.05)
    # A slope variance that is made up is not certified.
    assert certify(y, x, x, seeds, relative + np.diag([0, 0.5]), sigma).score > 1e-2


def test_theta_of_the_wrong_length_is_refused() -> None:
    with pytest.raises(ValueError, match="no lower triangle"):
        covariance([1.0, 2.0])
