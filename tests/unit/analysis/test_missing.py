"""Runs that are missing: counted by cell and seed, bounded, and too many of them decide nothing."""

from pathlib import Path

import pandas as pd
import pytest

from gradnoise.analysis.exclusions import blind_facts, excluded
from gradnoise.analysis.flow import fates, flow_of_runs
from gradnoise.analysis.missing import check_missing, missing_runs
from gradnoise.base.errors import InputError
from gradnoise.base.study import load_study
from gradnoise.registration import load_plan, run_id
from gradnoise.registration.plan import Exclusion, Limits, Plan

PLAN = Path("preregistration/rehearsal.yaml")


@pytest.fixture(scope="module")
def plan() -> Plan:
    return load_plan(PLAN)


def exposure(plan: Plan, values: dict[str, list[tuple[float, float, int]]]) -> pd.DataFrame:
    """Rows of the table for runs with (value, stderr, events) at each branch."""
    rows = [
        {
            "run_id": run,
            "block": block,
            "branch": k,
            "definition": name,
            "value": value,
            "stderr": stderr,
            "events": events,
        }
        for run, branches in values.items()
        for k, (value, stderr, events) in enumerate(branches, start=1)
        for name, block in ((plan.exposure.primary, "race"), ("gns", "race"), (plan.exposure.primary, "text"))
    ]
    return pd.DataFrame(rows)


def test_blind_facts_are_the_worst_of_a_runs_branches(plan: Plan) -> None:
    facts = blind_facts(plan, exposure(plan, {"a": [(4.0, 1.0, 9), (2.0, 1.0, 12)], "b": [(1.0, 0.1, 5)]}))
    assert facts.loc["a"].to_dict() == {"exposure": 2.0, "exposure_relative_stderr": 0.5, "events": 9}
    assert facts.loc["b"].to_dict() == {"exposure": 1.0, "exposure_relative_stderr": 0.1, "events": 5}


def test_a_rule_leaves_out_exactly_the_runs_that_break_it(plan: Plan) -> None:
    rows = exposure(plan, {"a": [(0.0, 1.0, 9)], "b": [(1e-9, 1.0, 9)], "c": [(1.0, 0.5, 3)]})
    assert excluded(plan, rows) == {"a": "X1"}
    rule = {"stage": "before_outcome", "reason": "too few"}
    more = (*plan.exclusions, Exclusion(id="X2", column="events", op="<", value=4, **rule))
    both = (*more, Exclusion(id="X3", column="exposure_relative_stderr", op=">=", value=0.5, **rule))
    changed = plan.model_copy(update={"exclusions": both})
    # The first rule names the run; an unknown relative error (of a) breaks no rule.
    assert excluded(changed, rows) == {"a": "X1", "b": "X3", "c": "X2"}


def test_every_planned_run_has_one_fate_and_the_stages_follow(plan: Plan) -> None:
    study = load_study("quick")
    cell, names = "b016-lr0.002", {}
    for index in range(5):
        names[index] = run_id(plan.key, "race", cell, index)
    scores = pd.DataFrame(
        [
            {"run_id": names[i], "block": "race", "cell": cell, "seed_index": i, "status": status}
            for i, status in ((0, "finished"), (1, "diverged"), (2, "finished"), (3, "finished"))
        ]
    )
    rows = fates(plan, study, scores, {names[0], names[3]}, {names[3]: "X1", names[2]: "X1"})
    here = [row for row in rows if (row["block"], row["cell"]) == ("race", cell)]
    assert [(row["fate"], row["rule"]) for row in here] == [
        *(("analysed", None), ("diverged", None), ("unmatched", None), ("excluded", "X1"), ("missing", None))
    ]
    assert len(rows) == sum(len(block.cells()) * block.seeds for block in study.blocks.values())
    stages = {row["stage"]: row["runs"] for row in flow_of_runs(plan, rows) if row["cell"] == cell}
    assert stages == {
        **{"planned": 5, "started": 4, "finished": 3, "matched": 2, "excluded": 1, "analysed": 1}
    }
    # Nothing of a block that the plan does not match is called matched or analysed.
    assert {row["stage"] for row in flow_of_runs(plan, rows) if row["block"] == "text"} == {
        *("planned", "started", "finished")
    }
    for odd in ({"seed_index": [1, 0, 2, 3]}, {"cell": "b256-lr0.008"}, {"run_id": "0" * 16}):
        with pytest.raises(InputError, match="no run of this plan"):
            fates(plan, study, scores.assign(**odd), set(), {})


def test_bounds_put_what_is_missing_at_the_ends_of_its_range(plan: Plan) -> None:
    frame = pd.DataFrame(
        {"cell": ["a", "a", "b"], "icl": [0.5, 0.7, 0.2], "iwl": 0.0, "validation_loss": 1.0}
    )
    rows = {row["cell"]: row for row in missing_runs(plan, frame, {"a": 3, "b": 1})}
    assert rows["a"]["bounds"]["icl"] == pytest.approx([1.2 / 3, 2.2 / 3])
    assert rows["a"]["missing_share"] == pytest.approx(1 / 3)
    assert rows["b"]["bounds"]["icl"] == [0.2, 0.2]
    assert rows["a"]["bounds"]["validation_loss"] is None


def test_too_many_or_too_uneven_gaps_stop_a_test() -> None:
    frame = pd.DataFrame({"cell": ["a"] * 5 + ["b"] * 3})
    planned = {"a": 5, "b": 5}
    check_missing(Limits(missing=0.2, difference=0.4), frame, planned, ["a", "b"])
    with pytest.raises(InputError, match="0.2 of them missing: the plan allows 0.1"):
        check_missing(Limits(missing=0.1, difference=0.4), frame, planned, ["a", "b"])
    with pytest.raises(InputError, match="differ by 0.4 between cells: the plan allows 0.3"):
        check_missing(Limits(missing=0.2, difference=0.3), frame, planned, ["a", "b"])
    check_missing(Limits(missing=0.0, difference=0.0), frame, planned, ["a"])
