"""What is generated from the plan's model and the plans is what the repository holds, and says it all."""

import json
from pathlib import Path

import pytest
from tests.unit.registration import conftest as made
from tests.unit.registration.conftest import MODULES, PLAN, edit

from gradnoise.base.strict_yaml import load
from gradnoise.base.wording import threshold
from gradnoise.registration import deviate, load_plan, lock
from gradnoise.registration.plan import Plan
from gradnoise.registration.readme import readme
from gradnoise.registration.reference import PAGE, SCHEMA, plan_reference, plan_schema


@pytest.mark.parametrize(
    ("path", "content"),
    [
        ("preregistration/README.md", readme),
        (PAGE, plan_reference),
        (SCHEMA, lambda: json.dumps(plan_schema(), indent=2, sort_keys=True, ensure_ascii=False) + "\n"),
    ],
)
def test_generated_files_are_up_to_date(path: str, content: object) -> None:
    assert Path(path).read_text(encoding="utf-8") == content(), "run gradnoise plan render"  # type: ignore[operator]


def test_the_reference_has_a_row_for_every_field_of_every_mapping() -> None:
    page = plan_reference()
    for name, model in plan_schema()["$defs"].items():
        section = next(part for part in page.split("\n## ") if model["description"].strip() in part)
        for field in model["properties"]:
            assert f"| `{field}` |" in section, f"{name}.{field}"


def test_the_readme_names_everything_that_decides() -> None:
    plan = load_plan("preregistration/rehearsal.yaml")
    page = readme()
    for test in plan.tests:
        assert f"| `{test.id}` | {test.description} |" in page
    for hypothesis in plan.hypotheses:
        assert hypothesis.text in page
    for exclusion in plan.exclusions:
        assert f"{exclusion.id}: " in page
    for truth in plan.power.truths:
        assert f"| `{truth.id}` |" in page
    assert "condition met" in page
    assert "corroborated" not in page


def test_another_value_is_another_page(plan: Plan) -> None:
    changes = {
        "    margin: 0.05 ": ("    margin: 0.07 ", "lose less than 0.07"),
        "  target: 0.05 ": ("  target: 0.06 ", "validation loss is 0.06"),
        "alpha: 0.05,": ("alpha: 0.01,", "adjusted p ≤ 0.01"),
        "  maximum: 3\n": ("  maximum: 2\n", "may be tried 2 times"),
        "    missing: 0.25\n": ("    missing: 0.2\n", "more than 0.2 of its planned runs"),
        "    draws: 9999\n": ("    draws: 19999\n", "19,999 permutations"),
    }
    before = readme()
    for old, (new, said) in changes.items():
        assert said not in before
        edit(PLAN, old, new)
    page = readme()
    for _, said in changes.values():
        assert said in " ".join(page.split()), said


def test_a_registered_plan_speaks_of_verdicts_and_once_locked_of_its_lock(plan: Plan) -> None:
    page = " ".join(readme().split())
    assert "`corroborated`, `falsified`, `inconclusive`" in page
    assert "There is no registered plan yet" not in page
    assert "Deviations" not in page
    dry_run = made.dry_run_of(plan, rate=0.045)
    locked = lock(PLAN, dry_run, made.reached_by(plan), modules=MODULES, beacon="round 4711")
    page = readme()
    for fact in (locked.utc, locked.commit.sha, plan.sha256, "`round 4711`", f"{len(locked.runs)}, list"):
        assert fact in page
    assert f"| `flat` | H1 | corroborated | 0.045 ± {dry_run.rates[0].stderr:.3f} | error |" in page
    assert "**Deviations.** None." in page
    deviate(PLAN, "/matching/target", 0.06, reason="error-in-plan", evidence="evidence.md", effect="none")
    assert "| D1 | `/matching/target` | `0.05` | `0.06` | error in plan | before an outcome" in readme()


def test_a_plan_without_what_may_be_left_out_has_a_page(plan: Plan) -> None:
    document = load(PLAN)
    del document["exclusions"], document["sensitivity"], document["exploratory"]
    document["exposure"]["secondary"] = ["pne"]
    document["attempts"] = {"maximum": 1, "retry_after": []}
    Path(PLAN).write_text(json.dumps(document))
    page = " ".join(readme().split())
    assert "Before any outcome is seen: none." in page
    assert "may be tried 1 time, always with the same seeds" in page
    assert "Exploratory" not in page
    assert threshold(0.95) in page
