"""Made-up studies are what they say they are, and the plan is tried out by the code that carries it out."""

import json
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from gradnoise.analysis.rehearse import SIMULATED, dry_run, reachability, rehearse, replay
from gradnoise.analysis.simulate import simulate, simulation_seed
from gradnoise.base import tables
from gradnoise.base.errors import InputError
from gradnoise.base.study import Study, load_study
from gradnoise.registration import Plan, load_plan
from gradnoise.registration.plan import Truth

PLAN = "preregistration/rehearsal.yaml"


@pytest.fixture(scope="module")
def plan() -> Plan:
    return load_plan(PLAN)


@pytest.fixture(scope="module")
def study() -> Study:
    return load_study("quick")


def truth_of(plan: Plan, name: str) -> Truth:
    return next(truth for truth in plan.power.truths if truth.id == name)


def with_power(plan: Plan, simulations: int | None = None, **spreads: float) -> Plan:
    """The plan with other spreads or another number of simulations."""
    assumptions = plan.power.assumptions.model_copy(update=spreads)
    update = {"assumptions": assumptions, "simulations": simulations or plan.power.simulations}
    return plan.model_copy(update={"power": plan.power.model_copy(update=update)})


def outcomes(plan: Plan, study: Study, truth: Truth, score: str, number: int = 0) -> np.ndarray:
    """Score of every run, cells x seeds."""
    scores, _ = simulate(plan, study, truth, simulation_seed(plan, truth, number), ["race"])
    rows = scores[(scores["score"] == score) & (scores["branch"] == 1)]
    return rows["value"].to_numpy().reshape(-1, study.blocks["race"].seeds)


def test_without_noise_outcomes_are_the_stated_slopes_and_shifts(plan: Plan, study: Study) -> None:
    exact = with_power(plan, seed_sd=0, slope_sd=0, run_sd=1e-12, loss_sd=0, exposure_sd=0)
    rise = outcomes(exact, study, truth_of(plan, "rise"), "icl")
    # Cells in the order of the grid: at one batch, four times the learning rate is 16 times the exposure.
    np.testing.assert_allclose(rise[1] - rise[0], 0.06 * np.log10(16), atol=1e-9)
    # At one learning rate and the same sequences, four times the batch is a sixteenth of the exposure.
    np.testing.assert_allclose(rise[2] - rise[0], -0.06 * np.log10(16), atol=1e-9)
    np.testing.assert_allclose(rise.mean(), 0.5, atol=1e-9)
    iwl = outcomes(exact, study, truth_of(plan, "rise"), "iwl")
    np.testing.assert_allclose(iwl - 0.5, 0.5 - rise, atol=1e-9)
    margin = outcomes(exact, study, truth_of(plan, "margin"), "icl")
    np.testing.assert_allclose(margin[0], 0.55, atol=1e-9)
    np.testing.assert_allclose(margin[1:], 0.5, atol=1e-9)


def test_spreads_are_the_stated_standard_deviations(plan: Plan, study: Study) -> None:
    many = study.model_copy(
        update={"blocks": {"race": study.blocks["race"].model_copy(update={"seeds": 2000})}}
    )
    spread = with_power(plan, seed_sd=0.03, slope_sd=0.02, run_sd=0.01)
    flat = outcomes(spread, many, truth_of(plan, "flat"), "icl")
    # The mean over cells holds the seed and the mean residual; doses are centred, so the slopes drop out.
    assert flat.mean(axis=0).std() == pytest.approx(np.sqrt(0.03**2 + 0.01**2 / 6), rel=0.06)
    # Within a batch the dose differs by log10(16).
    steps = flat[1] - flat[0]
    assert steps.std() == pytest.approx(np.sqrt(2 * 0.01**2 + (0.02 * np.log10(16)) ** 2), rel=0.06)
    scores, exposure = simulate(spread, many, truth_of(plan, "flat"), 1, ["race"])
    last = scores[(scores["score"] == "validation_loss") & (scores["cell"] == "b016-lr0.002")]
    assert np.log(last[last["branch"] == 4]["value"]).std() == pytest.approx(0.05, rel=0.06)
    dose = exposure[(exposure["definition"] == "pne2") & (exposure["cell"] == "b016-lr0.002")]
    first = dose[dose["branch"] == 1]
    assert np.log10(first["value"]).std() == pytest.approx(0.02, rel=0.06)
    # The stated standard error is that of the drawn error: d log10(x) = dx / (x ln 10).
    np.testing.assert_allclose(first["stderr"] / first["value"], 0.02 * np.log(10))


def test_every_run_reaches_the_target_and_tables_are_valid(plan: Plan, study: Study, tmp_path: Path) -> None:
    for number in range(5):
        scores, exposure = simulate(plan, study, truth_of(plan, "rise"), number)
        loss = scores[(scores["score"] == "validation_loss") & (scores["block"] == "race")]
        ends = loss.groupby("run_id")["value"].agg(["first", "last"])
        assert len(ends) == 30
        assert (ends["first"] > plan.matching.target).all()
        assert (ends["last"] < plan.matching.target).all()
    for table, rows in ((tables.SCORES, scores), (tables.EXPOSURE, exposure)):
        columns = rows[table.schema().names].to_dict("list")
        tables.write_table(tmp_path / f"{table.name}.parquet", table, columns, SIMULATED)


def test_a_simulation_follows_from_plan_truth_and_number_alone(plan: Plan, study: Study) -> None:
    rise, flat = truth_of(plan, "rise"), truth_of(plan, "flat")
    first = outcomes(plan, study, rise, "icl")
    np.testing.assert_array_equal(outcomes(plan, study, rise, "icl"), first)
    assert (outcomes(plan, study, rise, "icl", number=1) != first).all()
    assert (outcomes(plan, study, flat, "icl") != first).all()
    # The other blocks change nothing of the matched one.
    scores, _ = simulate(plan, study, rise, simulation_seed(plan, rise, 0))
    rows = scores[(scores["block"] == "race") & (scores["score"] == "icl") & (scores["branch"] == 1)]
    np.testing.assert_array_equal(rows["value"].to_numpy().reshape(first.shape), first)


def test_a_single_budget_cannot_be_matched(plan: Plan, study: Study) -> None:
    race = study.blocks["race"]
    branches = race.branches.model_copy(update={"sequences": (2048,)})
    one = study.model_copy(update={"blocks": {"race": race.model_copy(update={"branches": branches})}})
    with pytest.raises(InputError, match=r"blocks\.race\.branches\.sequences: one budget"):
        simulate(plan, one, truth_of(plan, "flat"), 0)


def test_the_dry_run_counts_what_replays_say(plan: Plan, study: Study) -> None:
    few = with_power(plan, simulations=6)
    told: list[None] = []
    found = dry_run(few, study, lambda: told.append(None))
    assert len(told) == 18
    for rate in found.rates:
        letters = found.verdicts[rate.truth][rate.hypothesis]
        assert rate.rate == letters.count({"met": "m", "not_met": "n"}[rate.verdict]) / 6
        assert rate.stderr == pytest.approx(np.sqrt(rate.rate * (1 - rate.rate) / 6))
    # Any single one alone, also after a lock with a public value, says the same.
    locked = plan.model_copy()
    locked._beacon = "round 4711"
    rise = truth_of(plan, "rise")
    letters = {name: found.verdicts["rise"][name][4] for name in found.verdicts["rise"]}
    assert replay(plan, study, rise, 4) == letters
    assert replay(locked, study, rise, 4) == letters
    wrong = {(rate.truth, rate.hypothesis, rate.verdict) for rate in found.rates if rate.wrong}
    assert wrong == {
        *(("margin", "H3", "met"), ("flat", "H1", "met"), ("flat", "H4", "met"), ("flat", "H3", "not_met")),
        *(("rise", "H1", "not_met"), ("rise", "H4", "not_met")),
    }


def test_a_clear_truth_is_found_and_its_opposite_is_not(plan: Plan, study: Study) -> None:
    clear = with_power(plan, simulations=4, seed_sd=0.01, slope_sd=0.002, run_sd=0.004)
    found = dry_run(clear, study)
    assert found.verdicts["rise"] == {"H1": "mmmm", "H3": "nnnn", "H4": "mmmm"}
    assert found.verdicts["flat"]["H3"] == "mmmm"
    assert "m" not in found.verdicts["flat"]["H1"]


def test_every_hypothesis_reaches_every_verdict_and_never_two(plan: Plan) -> None:
    found = {reached.hypothesis: reached for reached in reachability(plan)}
    # H3: four readings of one test, with small and large p.
    three = found["H3"]
    assert (three.met, three.not_met, three.undecided) == (2, 2, 4)
    for reached in found.values():
        assert reached.both == 0
        assert min(reached.met, reached.not_met, reached.undecided) > 0


def test_a_rule_that_asks_for_too_much_is_never_met(plan: Plan) -> None:
    """Its readings exist, but its p cannot be small: `missing_p` and the like would hide here."""
    family = plan.families[0].model_copy(update={"alpha": -1.0})
    assert all(reached.met == 0 for reached in reachability(plan.model_copy(update={"families": (family,)})))


def test_a_rehearsal_is_the_whole_analysis_labelled_as_simulated(
    plan: Plan, study: Study, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = sorted(Path("results").rglob("*"))
    path = rehearse("quick", "rise", tmp_path / "made", number=3)
    assert sorted(Path("results").rglob("*")) == before
    results = json.loads(path.read_bytes())
    assert results["label"] == "SIMULATED"
    assert results["simulated"]["truth"]["id"] == "rise"
    assert results["simulated"]["number"] == 3
    assert {entry["label"] for entry in (*results["tests"], *results["hypotheses"])} == {"SIMULATED"}
    assert [test["id"] for test in results["tests"]] == [test.id for test in plan.tests]
    words = dict(zip("mnu", plan.study.verdicts, strict=True))
    letters = replay(plan, study, truth_of(plan, "rise"), 3)
    assert {entry["id"]: entry["outcome"] for entry in results["hypotheses"]} == {
        name: words[letter] for name, letter in letters.items()
    }
    files = sorted(file.name for file in path.parent.glob("*.parquet"))
    assert files == [f"{name}.parquet" for name in sorted(NAMES)]
    for file in path.parent.glob("*.parquet"):
        assert pq.read_schema(file).metadata[b"label"] == b"SIMULATED"


NAMES = ("scores", "exposure", "matched", "fates", "flow", "curves", "explained")


def test_a_registered_plan_is_rehearsed_without_a_lock_and_without_verdicts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts = {path: Path(path).read_text() for path in ("config/quick.yaml", PLAN)}
    monkeypatch.chdir(tmp_path)
    texts[PLAN] = texts[PLAN].replace("kind: rehearsal", "kind: registered")
    texts[PLAN] = texts[PLAN].replace("differs by less than", "is equivalent within")
    for path, text in texts.items():
        Path(path).parent.mkdir()
        Path(path).write_text(text)
    results = json.loads(rehearse("quick", "flat", "logs/made").read_bytes())
    assert results["label"] == "SIMULATED"
    said = json.dumps(results)
    assert "corroborated" not in said
    assert "falsified" not in said
    assert "equivalent" not in said
    assert not Path("results").exists()


def test_unknown_truths_and_folders_of_real_results_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"truth: fall: must be one of \['margin', 'flat', 'rise'\]"):
        rehearse("quick", "fall", tmp_path)
    for folder in ("results", "results/quick/analysis", "logs/../results/made"):
        with pytest.raises(InputError, match="must lie outside results/"):
            rehearse("quick", "flat", folder)
