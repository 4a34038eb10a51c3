"""Matched tables, the flow of runs, and the two descriptive measures, on figures worked out by hand."""

import numpy as np
import pandas as pd
import pytest

from gradnoise.analysis.explained import explained
from gradnoise.analysis.matching import branch_table, match
from gradnoise.analysis.reliability import reliability
from gradnoise.base.errors import InputError
from gradnoise.base.study import load_study
from gradnoise.registration import load_plan, run_id

PLAN = load_plan("preregistration/rehearsal.yaml")
STUDY = load_study("quick")
RULE = PLAN.matching

Branch = tuple[int, int, float | None, float]  # updates, sequences, loss (None: diverged), ICL


def tables_of(
    runs: dict[tuple[str, int], list[Branch]], pne2: float = 1e-3
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Scores and exposures of race runs (cell, seed index) with the given branches."""
    scores, exposure = [], []
    for (cell, index), branches in runs.items():
        run = {
            "run_id": run_id(PLAN.sha256, "race", cell, index),
            "block": "race",
            "cell": cell,
            "seed_index": index,
        }
        for number, (updates, sequences, loss, icl) in enumerate(branches, start=1):
            place = run | {
                "batch": int(cell[1:4]),
                "learning_rate": float(cell.split("lr")[1]),
                "branch": number,
                "updates": updates,
                "sequences": sequences,
                "sum_lr": updates * 2e-3,
                "status": "diverged" if loss is None else "finished",
            }
            values = {"validation_loss": loss, "icl": None if loss is None else icl}
            scores += [
                place | {"score": name, "value": value, "stderr": value and value / 10, "unit": ""}
                for name, value in values.items()
            ]
            exposure.append(run | {"branch": number, "definition": "pne2", "value": pne2 * updates})
    return pd.DataFrame(scores), pd.DataFrame(exposure)


def at(runs: dict[tuple[str, int], list[Branch]], matching: str, pne2: float = 1e-3) -> pd.DataFrame:
    return match(branch_table(*tables_of(runs, pne2)), RULE, "nats").wide(matching)  # type: ignore[arg-type]


A, B = ("b016-lr0.002", 0), ("b064-lr0.002", 0)


def test_at_loss_everything_is_linear_in_log_loss() -> None:
    # .05 lies halfway between .1 and .025 in the logarithm.
    row = at({A: [(50, 800, 1.0, 0.1), (100, 1600, 0.1, 0.4), (400, 6400, 0.025, 0.6)]}, "loss").iloc[0]
    assert row["icl"] == pytest.approx(0.5)
    assert row["validation_loss"] == 0.05
    assert row["updates"] == pytest.approx(200)  # geometric mean
    assert row["log10_pne2"] == pytest.approx(np.log10(1e-3 * 200))
    assert row["log10_updates"] == pytest.approx(np.log10(200))


def test_at_loss_branches_are_taken_by_sequences_and_the_first_crossing_counts() -> None:
    branches = [(400, 6400, 0.2, 0.9), (100, 1600, 0.1, 0.4), (200, 3200, 0.025, 0.6), (800, 9000, 0.01, 0.9)]
    assert at({A: branches}, "loss").iloc[0]["icl"] == pytest.approx(0.5)


def test_a_branch_on_the_target_is_taken_as_it_is() -> None:
    row = at({A: [(50, 800, 1.0, 0.1), (100, 1600, 0.05, 0.37), (200, 3200, 0.01, 0.9)]}, "loss").iloc[0]
    assert (row["icl"], row["updates"]) == (0.37, 100)


def test_runs_that_do_not_bracket_the_loss_are_not_matched_there() -> None:
    never = [(50, 800, 1.0, 0.1), (100, 1600, 0.06, 0.4)]
    already = [(50, 3200, 0.04, 0.1), (100, 6400, 0.03, 0.4)]
    assert at({A: never, B: already}, "loss").empty
    assert len(at({A: never, B: already}, "updates")) == 2


def test_at_updates_the_smallest_largest_branch_is_used_as_it_is() -> None:
    runs = {A: [(96, 1536, 0.5, 0.2), (192, 3072, 0.1, 0.4)], B: [(48, 3072, 0.5, 0.1), (96, 6144, 0.1, 0.3)]}
    found = match(branch_table(*tables_of(runs)), RULE, "nats")
    assert (found.points["updates"].value, found.points["updates"].interpolated) == (96, False)
    assert list(found.wide("updates")["icl"]) == [0.2, 0.3]
    assert list(found.wide("updates")["updates"]) == [96, 96]
    assert (found.points["tokens"].value, found.points["tokens"].interpolated) == (3072, False)
    assert list(found.wide("tokens")["icl"]) == [0.4, 0.1]


def test_at_updates_without_a_common_branch_it_is_interpolated_and_said() -> None:
    runs = {A: [(50, 800, 0.5, 0.2), (200, 3200, 0.1, 0.6)], B: [(25, 1600, 0.5, 0.1), (100, 6400, 0.1, 0.3)]}
    found = match(branch_table(*tables_of(runs)), RULE, "nats")
    assert (found.points["updates"].value, found.points["updates"].interpolated) == (100, True)
    assert found.wide("updates")["icl"].iloc[0] == pytest.approx(0.4)  # 100 is halfway from 50 to 200 in log


def test_a_diverged_run_is_matched_nowhere_and_does_not_move_the_point() -> None:
    runs = {A: [(96, 1536, 0.5, 0.2), (192, 3072, 0.02, 0.4)], B: [(48, 3072, 0.5, 0.1), (96, 6144, None, 0)]}
    found = match(branch_table(*tables_of(runs)), RULE, "nats")
    assert set(found.rows["cell"]) == {A[0]}
    assert found.points["updates"].value == 192


def test_an_exposure_without_logarithm_is_left_out_alone() -> None:
    row = at({A: [(50, 800, 0.1, 0.4), (100, 1600, 0.025, 0.6)]}, "loss", pne2=-1e-3)
    assert row["icl"].iloc[0] == pytest.approx(0.5)
    assert "log10_pne2" not in row


def test_no_finished_run_gives_empty_tables() -> None:
    found = match(branch_table(*tables_of({A: [(50, 800, 0.5, 0.2)], B: [(50, 800, None, 0)]})), RULE, "nats")
    assert found.wide("loss").empty
    scores, exposure = tables_of({A: [(50, 800, 0.5, 0.2)]})
    with pytest.raises(InputError, match="given twice"):
        branch_table(pd.concat([scores, scores]), exposure)


def test_explained_is_within_seeds() -> None:
    # Between seeds the outcome falls with the predictor; within each seed it rises without error.
    frame = pd.DataFrame(
        {"seed": np.repeat([0, 1, 2, 3], 3), "x": [0, 1, 2, 10, 11, 12, 20, 21, 22, 30, 31, 32]}
    )
    frame["y"] = 0.1 * (frame["x"] - 10 * frame["seed"]) - frame["seed"]
    found = explained(frame, "y", "x")
    assert found is not None
    assert (found.value, found.runs) == (pytest.approx(1), 12)
    assert (found.low, found.high) == (pytest.approx(1), pytest.approx(1))


def test_explained_by_a_constant_is_nothing() -> None:
    frame = pd.DataFrame(
        {"seed": [0, 0, 1, 1], "x": np.log10([96, 96 * (1 + 1e-15), 96, 96]), "y": [1, 2, 3, 5]}
    )
    found = explained(frame, "y", "x")
    assert found is not None
    assert (found.value, found.low, found.high) == (0, None, None)
    assert explained(frame.assign(y=1.0), "y", "x") is None


def test_explained_interval_is_the_jackknife_by_hand() -> None:
    draw = np.random.default_rng(5)
    frame = pd.DataFrame({"seed": np.repeat(range(6), 4), "x": draw.normal(size=24)})
    frame["y"] = frame["x"] + draw.normal(size=24)

    def r2(rows: pd.DataFrame) -> float:
        residual = rows[["x", "y"]] - rows.groupby("seed")[["x", "y"]].transform("mean")
        return float(residual.corr().iloc[0, 1] ** 2)

    pseudo = np.array([6 * r2(frame) - 5 * r2(frame[frame["seed"] != seed]) for seed in range(6)])
    half = 2.570581835636314 * pseudo.std(ddof=1) / np.sqrt(6)  # t quantile .975, 5 degrees of freedom
    found = explained(frame, "y", "x")
    assert found is not None
    assert found.value == pytest.approx(r2(frame))
    assert (found.low, found.high) == pytest.approx((pseudo.mean() - half, pseudo.mean() + half))


def test_reliability_is_that_of_the_last_branches_in_log_loss() -> None:
    runs = {
        (A[0], 0): [(50, 800, 9.0, 0), (100, 1600, 0.01, 0)],
        (A[0], 1): [(50, 800, 9.0, 0), (100, 1600, 0.02, 0)],
        (A[0], 2): [(50, 800, 9.0, 0), (100, 1600, 0.04, 0)],
        (A[0], 3): [(50, 800, 9.0, 0), (100, 1600, None, 0)],
    }
    scores, _ = tables_of(runs)
    # Errors of 10 % of the loss; log losses log 2 apart have variance (log 2)^2.
    assert reliability(scores, "race", "validation_loss") == pytest.approx(1 - 0.01 / np.log(2) ** 2)
    assert reliability(scores[scores["seed_index"] == 0], "race", "validation_loss") is None
