"""The phase as a whole, on made-up tables of a quick study."""

import json
import math
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tests.unit.analysis.fixtures import INJECTED, Rows, make_study_tables, write_study_tables

from gradnoise.analysis.analyse import analyse
from gradnoise.base import layout, tables
from gradnoise.base.errors import InputError
from gradnoise.base.study import load_study
from gradnoise.registration import load_plan

ROOT = Path.cwd()
Results = dict[str, Any]


def new_study(folder: Path, **settings: float) -> tuple[Rows, Rows]:
    for name in ("config", "preregistration"):
        shutil.copytree(ROOT / name, folder / name)
    # Fewer draws, for speed: another plan, so other names of runs.
    plan = folder / "preregistration/rehearsal.yaml"
    plan.write_text(plan.read_text(encoding="utf-8").replace("draws: 9999", "draws: 999"), encoding="utf-8")
    return make_study_tables(folder, **settings)


def analysed(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Results:
    monkeypatch.chdir(folder)
    analyse("quick")
    found: Results = json.loads((folder / layout.results("quick")).read_text(encoding="utf-8"))
    return found


def by_id(entries: list[Results]) -> dict[str, Results]:
    return {entry["id"]: entry for entry in entries}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("study")
    new_study(path)
    with pytest.MonkeyPatch.context() as patch:
        analysed(path, patch)
    return path


@pytest.fixture(scope="module")
def results(folder: Path) -> Results:
    found: Results = json.loads((folder / layout.results("quick")).read_text(encoding="utf-8"))
    return found


def test_it_finds_what_was_put_in(results: Results) -> None:
    tests = by_id(results["tests"])
    assert tests["icl-slope"]["low"] < 0.08 < tests["icl-slope"]["high"]
    assert tests["iwl-slope"]["low"] < -0.04 < tests["iwl-slope"]["high"]
    assert tests["icl-mixed"]["estimate"] == pytest.approx(tests["icl-slope"]["estimate"], abs=0.002)
    assert tests["icl-trend"]["outcome"] == "monotone"
    assert {name: entry["outcome"] for name, entry in by_id(results["hypotheses"]).items()} == {
        "H1": "condition met",
        "H3": "condition not met",
        "H4": "condition met",
    }
    assert results["reliability"]["reached"]
    assert (results["flow"]["finished"], results["flow"]["analysed"]) == (46, 30)


def test_every_number_of_the_plan_is_reported_as_registered(results: Results, folder: Path) -> None:
    tests = by_id(results["tests"])
    asked = {test.id: test for test in load_plan(folder / "preregistration/rehearsal.yaml").tests}
    assert list(tests) == list(asked)
    assert results["label"] == "REHEARSAL"
    assert results["descriptive"] == {
        "score": "icl",
        "unit": "accuracy",
        "predictor": "log10_pne2",
        "rivals": ["log10_pne", "log10_updates", "log10_sum_lr"],
    }
    assert results["matched_points"]["loss"]["unit"] == "nats"
    assert results["thresholds"]["margin"] == 0.05
    assert results["thresholds"]["target_loss"] == 0.05
    assert tests["icl-trend"]["details"]["draws"] == 999
    assert tests["icl-batch"]["level"] == 0.9
    assert tests["icl-batch"]["p"] == max(tests["icl-batch"]["details"][name] for name in ("p_low", "p_high"))
    assert by_id(results["hypotheses"])["H4"]["p"] == max(tests["icl-slope"]["p"], tests["iwl-slope"]["p"])
    trend = tests["icl-trend"]
    assert trend["p"] == max(trend["details"]["trend_p"], trend["details"]["noninferior_p"])
    for name, test in tests.items():
        assert test["asked"] == asked[name].model_dump(mode="json")
        assert (test["alpha"], test["label"]) == (0.05, "REHEARSAL")
    assert results["matched_points"]["updates"] == {"unit": "updates", "value": 96, "interpolated": False}


def test_the_mixed_model_has_the_degrees_of_freedom_of_its_seeds(results: Results) -> None:
    mixed, slope = (by_id(results["tests"])[name] for name in ("icl-mixed", "icl-slope"))
    # Small df make it stricter than a normal approximation, and never looser than the slopes of the seeds.
    assert 2 < mixed["df"] <= 24
    assert mixed["low"] < slope["estimate"] < mixed["high"]
    assert mixed["details"]["cross_check"]["agrees"] in (True, None)
    assert by_id(results["tests"])["icl-ancova"]["details"]["terms"].keys() == {"1", "log10_pne2", "loss_c"}


def test_what_was_assigned_is_tested_too(results: Results) -> None:
    tests = by_id(results["tests"])
    contrast = tests["icl-assigned"]
    assert contrast["outcome"] == "above zero"  # smaller batches have more noise, and ICL rises with it
    assert contrast["estimate"] == pytest.approx(sum(contrast["details"]["differences"]) / 5)
    terms = tests["icl-factors"]["details"]["terms"]
    assert {"batch", "learning_rate", "batch:learning_rate", "seed"} == set(terms)
    assert terms["batch"]["p"] < 1e-6
    assert tests["icl-factors"]["outcome"] == "reported"


def test_what_stands_beside_the_slope_agrees_with_it_and_decides_nothing(results: Results) -> None:
    slope = by_id(results["tests"])["icl-slope"]
    entries = {entry["method"]: entry for entry in results["sensitivity"]}
    assert list(entries) == [
        *("wild_cluster_bootstrap", "sign_flip", "cluster_robust", "studentised_bootstrap"),
        *("window 0.02", "window 0.05", "unmatched"),
    ]
    for entry in entries.values():
        assert (entry["test"], entry["label"]) == ("icl-slope", "REHEARSAL")
        assert "outcome" not in entry
    assert entries["sign_flip"]["p"] == entries["sign_flip"]["details"]["smallest_p"] == 2**-5
    assert entries["cluster_robust"]["estimate"] == pytest.approx(slope["estimate"], abs=0.01)
    assert entries["studentised_bootstrap"]["estimate"] == pytest.approx(slope["estimate"])
    assert entries["wild_cluster_bootstrap"]["p"] < 0.05
    assert entries["unmatched"]["runs"] == 30
    assert entries["window 0.02"]["runs"] < entries["window 0.05"]["runs"] <= 30
    rank, path = results["exploratory"]
    assert "does not vary between clusters" in rank["details"]["reason"]  # made-up runs are in perfect order
    assert {"a", "b", "total", "direct", "rho_at_zero"} <= set(path["details"])
    (band,) = results["bands"]
    assert (band["test"], len(band["levels"])) == ("icl-trend", 4)
    assert 0.5 < band["bootstrap_coverage"] < 0.95  # what makes it descriptive


def test_cells_of_one_run_have_no_deviation(results: Results) -> None:
    sizes = {(cell["block"], cell["runs"], cell["sd"] is None) for cell in results["cells"]}
    assert sizes == {("race", 5, False), ("race_noise", 2, False), ("text", 1, True)}


def test_every_mean_of_a_cell_has_its_standard_error(results: Results) -> None:
    for cell in results["cells"]:
        own = {"validation_loss": 0.004, "bits_per_character": 0.006}.get(cell["score"])
        expected = own if cell["runs"] == 1 else cell["sd"] / math.sqrt(cell["runs"])
        assert cell["stderr"] == pytest.approx(expected, rel=1e-12), cell


def test_arms_are_described_at_their_last_branch(results: Results, folder: Path) -> None:
    arms = {arm["arm"]: arm for arm in results["arms"]}
    assert list(arms) == list(load_study("quick").block("race_noise").arms)
    scores = tables.read_table(folder / layout.scores("quick"), tables.SCORES).to_pandas()
    exposure = tables.read_table(folder / layout.exposure("quick"), tables.EXPOSURE).to_pandas()
    for name, arm in arms.items():
        assert (arm["planned"], arm["finished"]) == (2, 2)
        of = [entry["quantity"] for entry in arm["quantities"]]
        assert of == ["icl", "iwl", "validation_loss", "log10_pne2", "share_injected"]
        found = {entry["quantity"]: entry for entry in arm["quantities"]}
        own = scores[(scores.cell == name) & (scores.branch == 2) & (scores.score == "icl")].value
        assert found["icl"]["mean"] == pytest.approx(own.mean())
        assert found["icl"]["stderr"] == pytest.approx(abs(own.iloc[0] - own.iloc[1]) / 2)
        doses = exposure[(exposure.cell == name) & (exposure.branch == 2) & (exposure.definition == "pne2")]
        logs = [math.log10(dose) for dose in doses.value]
        assert found["log10_pne2"]["mean"] == pytest.approx(sum(logs) / 2)
        share = 0.0 if arm["noise"] is None else INJECTED
        assert found["share_injected"]["mean"] == pytest.approx(share)
    assert arms["reweight-b16"]["noise"] == {"kind": "reweight", "to_batch": 16}


def test_an_arm_whose_runs_all_diverged_is_still_listed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scores, exposure = new_study(tmp_path)
    for row in scores:
        if (row["cell"], row["seed_index"]) in {("after-x4", 0), ("before-x4", 0), ("before-x4", 1)}:
            diverge(row)
    write_study_tables(tmp_path, scores, exposure)
    arms = {arm["arm"]: arm for arm in analysed(tmp_path, monkeypatch)["arms"]}
    assert [arms[name]["finished"] for name in ("before-x4", "after-x4", "nap-aligned")] == [0, 1, 2]
    assert {(entry["mean"], entry["stderr"]) for entry in arms["before-x4"]["quantities"]} == {(None, None)}
    assert all(entry["mean"] is not None for entry in arms["after-x4"]["quantities"])
    assert {entry["stderr"] for entry in arms["after-x4"]["quantities"]} == {None}


def test_nothing_of_a_rehearsal_sounds_like_a_verdict(folder: Path, results: Results) -> None:
    # The plan's own prose too: it is printed in the report.
    text = json.dumps(results) + (folder / "preregistration/rehearsal.yaml").read_text(encoding="utf-8")
    assert not re.search(r"confirm|significan|corroborat|falsif|equivalen|prove[ns]|supports the", text, re.I)


def test_tables_hold_every_matching_and_the_line_its_band(folder: Path) -> None:
    def read(name: str, table: tables.Table) -> Rows:
        return tables.read_table(folder / layout.analysis("quick", name), table).to_pylist()

    matchings = {"loss", "updates", "tokens"}
    matched = read("matched", tables.MATCHED)
    assert {row["matching"] for row in matched} == matchings
    assert {row["block"] for row in matched} == {"race"}
    curves = read("curves", tables.CURVES)
    assert {(row["matching"], row["curve"]) for row in curves} == {
        (matching, curve) for matching in matchings for curve in ("mixed_model", "isotonic")
    }
    assert all((row["low"] is None) == (row["curve"] == "isotonic") for row in curves)
    assert all(row["low"] < row["y"] < row["high"] for row in curves if row["low"] is not None)
    steps = [row["y"] for row in curves if (row["matching"], row["curve"]) == ("loss", "isotonic")]
    assert steps == sorted(steps)
    explained = {(row["matching"], row["predictor"]): row for row in read("explained", tables.EXPLAINED)}
    assert len(explained) == 12
    assert explained["updates", "log10_updates"]["value"] == 0


def test_the_same_tables_give_the_same_bytes(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = sorted((folder / "results/quick/analysis").iterdir())
    before = [file.read_bytes() for file in files]
    analysed(folder, monkeypatch)
    assert len(files) == 6
    assert [file.read_bytes() for file in files] == before


def test_a_flat_study_meets_no_rule_on_slopes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    new_study(tmp_path, slope=0.0)
    results = analysed(tmp_path, monkeypatch)
    outcomes = {name: entry["outcome"] for name, entry in by_id(results["hypotheses"]).items()}
    assert outcomes == {"H1": "undecided", "H3": "condition met", "H4": "undecided"}


def test_a_falling_study_is_said_to_fall(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    new_study(tmp_path, slope=-0.08)
    hypotheses = by_id(analysed(tmp_path, monkeypatch)["hypotheses"])
    assert hypotheses["H1"]["outcome"] == hypotheses["H4"]["outcome"] == "condition not met"
    assert hypotheses["H1"]["p"] > 0.9


def diverge(row: Results) -> None:
    row |= {"status": "diverged", "value": None, "stderr": None}


@pytest.mark.parametrize(
    ("lost", "started", "finished", "seeds"),
    [
        pytest.param(lambda row: row["seed_index"] > 1, 46, 28, 2, id="three seeds diverge"),
        pytest.param(lambda row: row["block"] == "race", 46, 16, 0, id="every run of the block diverges"),
        pytest.param(lambda row: True, 46, 0, 0, id="every run of the study diverges"),
    ],
)
def test_too_few_seeds_decide_nothing(
    lost: Callable[[Results], bool],
    started: int,
    finished: int,
    seeds: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    scores, exposure = new_study(tmp_path)
    for row in scores:
        if lost(row):
            diverge(row)
    write_study_tables(tmp_path, scores, exposure)
    results = analysed(tmp_path, monkeypatch)
    assert (results["flow"]["started"], results["flow"]["finished"]) == (started, finished)
    for test in results["tests"]:
        assert (test["p"], test["estimate"], test["outcome"]) == (None, None, "undecided")
        assert test["seeds"] == seeds
        assert test["details"]["reason"]
    assert {entry["outcome"] for entry in results["hypotheses"]} == {"undecided"}
    assert {entry["p_adjusted"] for entry in results["hypotheses"]} == {1.0}


def test_a_cell_that_never_learns_stops_the_tests_that_need_it_and_is_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scores, exposure = new_study(tmp_path)
    for row in scores:
        if row["cell"] == "b016-lr0.008" and row["score"] == "validation_loss":
            row["value"] = 1.0
    write_study_tables(tmp_path, scores, exposure)
    results = analysed(tmp_path, monkeypatch)
    tests = by_id(results["tests"])
    assert (tests["icl-trend"]["p"], tests["icl-trend"]["outcome"]) == (None, "undecided")
    for test in ("icl-trend", "icl-slope", "icl-mixed", "icl-factors"):
        assert tests[test]["outcome"] == "undecided"
        assert "shares missing differ by 1 between cells" in tests[test]["details"]["reason"]
    assert tests["icl-batch"]["p"] is not None  # it needs other cells
    (cell,) = (cell for cell in results["missing"] if cell["missing_share"])
    assert cell == {
        **{"cell": "b016-lr0.008", "planned": 5, "compared": 0, "missing_share": 1.0},
        "bounds": {"icl": [0.0, 1.0], "iwl": [0.0, 1.0], "validation_loss": None},
    }
    assert results["fates"]["unmatched"] == 5
    assert tests["icl-slope"]["runs"] == 25
    assert tests["icl-slope-updates"]["runs"] == 30
    assert by_id(results["hypotheses"])["H1"]["outcome"] == "undecided"
    assert (results["flow"]["finished"], results["flow"]["matched"]) == (46, 25)


def test_a_run_without_measurable_exposure_is_excluded_and_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scores, exposure = new_study(tmp_path)
    for row in exposure:
        if (row["cell"], row["seed_index"], row["definition"]) == ("b256-lr0.008", 0, "pne2"):
            row["value"] = -1e-6
    write_study_tables(tmp_path, scores, exposure)
    results = analysed(tmp_path, monkeypatch)
    assert (results["flow"]["matched"], results["flow"]["excluded"], results["flow"]["analysed"]) == (
        30,
        1,
        29,
    )
    assert by_id(results["tests"])["icl-slope"]["runs"] == 29
    fates = tables.read_table(tmp_path / layout.analysis("quick", "fates"), tables.FATES).to_pylist()
    assert [(row["cell"], row["seed_index"], row["rule"]) for row in fates if row["fate"] == "excluded"] == [
        ("b256-lr0.008", 0, "X1")
    ]
    assert results["fates"] == {
        **{"analysed": 29, "excluded": 1, "unmatched": 0, "diverged": 0, "missing": 0},
        "not compared": 16,
    }
    # The level that lost one of its two cells in this seed is not half a level: the seed is incomplete.
    assert by_id(results["tests"])["icl-trend"]["details"]["incomplete_seeds"] == 1


def test_tables_of_another_plan_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    new_study(tmp_path)
    plan = tmp_path / "preregistration/rehearsal.yaml"
    plan.write_text(plan.read_text(encoding="utf-8").replace("high: 0.05", "high: 0.06"), encoding="utf-8")
    with pytest.raises(InputError, match="no run of this plan"):
        analysed(tmp_path, monkeypatch)
