"""Whoever departs from a locked plan says so in a log that nobody can bend, and labels follow by rule."""

import json
from pathlib import Path

import pytest
from tests.unit.registration import conftest as made
from tests.unit.registration.conftest import PLAN, commit, edit

from gradnoise.base import strict_yaml
from gradnoise.base.errors import InputError
from gradnoise.base.files import canonical_json, sha256, sha256_of
from gradnoise.registration import deviate, load_plan, read_deviations
from gradnoise.registration.deviations import (
    Deviation,
    effective,
    label_of,
    resolve,
    touched,
    under_deviations,
)
from gradnoise.registration.plan import Plan

LOG = Path("preregistration/deviations.jsonl")
SAID = {"reason": "error-in-plan", "evidence": "evidence.md", "effect": "wider"}


def pointer(plan: Plan, test: str, field: str) -> str:
    return f"/tests/{[item.id for item in plan.tests].index(test)}/{field}"


def log(place: str, actual: object, **other: object) -> Deviation:
    return deviate(PLAN, place, actual, **(SAID | other))  # type: ignore[arg-type]


def test_an_entry_says_what_was_registered_without_being_told(locked: Plan) -> None:
    found = log(pointer(locked, "icl-batch", "high"), 0.08)
    assert (found.id, found.registered, found.actual, found.tests) == ("D1", 0.05, 0.08, ("icl-batch",))
    assert (found.discovered, found.commit) == ("before", made.git("rev-parse", "HEAD"))
    assert (found.beside, found.previous) == ("tests.icl-batch", "")
    assert read_deviations(PLAN) == [found]
    second = log("/matching/target", 0.06)
    assert (second.id, second.previous) == ("D2", found.hash)
    assert read_deviations(PLAN) == [found, second]


def test_discovered_follows_from_what_the_repository_holds(locked: Plan) -> None:
    assert log("/matching/target", 0.06).discovered == "before"
    made.write_attempt("train", "finished")
    assert log("/matching/target", 0.07).discovered == "after"


def test_results_in_the_history_make_it_after_although_they_are_gone(locked: Plan) -> None:
    results = Path("results/quick/analysis/results.json")
    results.parent.mkdir(parents=True)
    results.write_text("{}")
    made.git("add", "--force", str(results))
    commit("Publish")
    made.git("rm", "--quiet", str(results))
    commit("Hide")
    assert log("/matching/target", 0.06).discovered == "after"


CHANGES = {
    "a value": lambda line: line.replace(b'"actual":0.06', b'"actual":0.07'),
    "a value and its hash": lambda line: rehashed(line, actual=0.07),
    "the time of discovery and its hash": lambda line: rehashed(line, discovered="before"),
    "the spelling": lambda line: line.replace(b'"actual":0.06', b'"actual": 0.06'),
    "the id": lambda line: rehashed(line, id="D7"),
    "a field more": lambda line: line.replace(b'{"actual"', b'{"Note":1,"actual"'),
    "the line's end": lambda line: line[:-1],
    "the line is cut": lambda line: line[:-20],
    "the line is gone": lambda line: b"",
}


def rehashed(line: bytes, **changes: object) -> bytes:
    """The line with a change, and with the hash that fits the change."""
    entry = json.loads(line) | changes
    entry.pop("hash")
    return canonical_json(entry | {"hash": sha256_of(entry)}) + b"\n"


@pytest.mark.parametrize("change", CHANGES)
def test_no_line_but_the_last_can_be_changed(change: str, locked: Plan) -> None:
    made.write_attempt("train", "finished")
    log("/matching/target", 0.06)
    log("/matching/target", 0.07)
    first, second = LOG.read_bytes().splitlines(keepends=True)
    LOG.write_bytes(CHANGES[change](first) + second)
    with pytest.raises(InputError, match=r"deviations\.jsonl, line [12]") as refusal:
        read_deviations(PLAN)
    assert "\n" not in str(refusal.value)


def test_a_swap_of_lines_breaks_the_chain(locked: Plan) -> None:
    log("/matching/target", 0.06)
    log("/matching/target", 0.07)
    LOG.write_bytes(b"".join(reversed(LOG.read_bytes().splitlines(keepends=True))))
    with pytest.raises(InputError, match="line 1: breaks the chain"):
        read_deviations(PLAN)


REFUSED = {
    "unknown pointer": (("/matching/tarjet", 0.06), {}, "'tarjet' must be one of"),
    "index past the end": (("/tests/99/margin", 0.06), {}, "'99' must be one of"),
    "index with a zero before": (("/tests/01/draws", 9999), {}, "'01' must be one of"),
    "new place at the end": (("/tests/-", {}), {}, "'-' must be one of"),
    "into a number": (("/matching/target/unit", 0.06), {}, "'unit' must be one of []"),
    "no pointer": (("matching.target", 0.06), {}, "must be a JSON Pointer"),
    "the whole plan": (("", {}), {}, "must be a JSON Pointer"),
    "wrong escape": (("/matching/~2", 0.06), {}, "must be a JSON Pointer"),
    "the registered value": (("/matching/target", 0.05), {}, "nothing deviates"),
    "the same as a whole number": (("/exclusions/0/value", 0.0), {}, "nothing deviates"),
    "a quoted number": (("/matching/target", "0.06"), {}, "matching.target"),
    "a negative margin": (("/matching/target", -1), {}, "matching.target"),
    "NaN": (("/matching/target", float("nan")), {}, "must be a JSON value"),
    "fewer seeds than can be tested": (("/seeds/minimum", 3), {}, "seeds.minimum"),
    "a family without a hypothesis": (("/families/0/members", ["H1", "H3"]), {}, "families.members: H4"),
    "another study": (("/study/id", "other"), {}, "needs a plan of its own"),
    "a rehearsal after all": (("/study/kind", "rehearsal"), {}, "needs a plan of its own"),
    "no such reason": (("/matching/target", 0.06), {"reason": "better-p"}, "reason"),
    "no effect": (("/matching/target", 0.06), {"effect": ""}, "effect"),
    "missing evidence": (("/matching/target", 0.06), {"evidence": "gone.md"}, "must be a file"),
    "a folder as evidence": (("/matching/target", 0.06), {"evidence": "src"}, "must be a file"),
    "evidence elsewhere": (("/matching/target", 0.06), {"evidence": "/etc/passwd"}, "must be a file"),
    "evidence above": (("/matching/target", 0.06), {"evidence": "../outside.md"}, "must be a file"),
    "evidence by a link": (("/matching/target", 0.06), {"evidence": "link.md"}, "must be a file"),
    "what a lock derives": (("/runs/0/seed", 1), {"document": "lock"}, "must begin with one of"),
    "no hash": (("/requirements_sha256", "abc"), {"document": "lock"}, "requirements_sha256"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_refusal_is_one_line_and_writes_nothing(case: str, locked: Plan) -> None:
    place, other, named = REFUSED[case]
    Path("../outside.md").write_text("Elsewhere.\n")
    Path("link.md").symlink_to("../outside.md")
    with pytest.raises(InputError) as refusal:
        log(*place, **other)
    assert named in str(refusal.value)
    assert "\n" not in str(refusal.value)
    assert not LOG.exists()


def test_without_a_lock_there_is_nothing_to_deviate_from(plan: Plan) -> None:
    with pytest.raises(InputError, match=r"plan\.lock\.json: missing"):
        log("/matching/target", 0.06)
    edit(PLAN, "kind: registered", "kind: rehearsal")
    with pytest.raises(InputError, match="is a rehearsal"):
        log("/matching/target", 0.06)


def test_a_plan_that_was_edited_after_its_lock_is_not_the_registered_one(locked: Plan) -> None:
    edit(PLAN, "  target: 0.05 ", "  target: 0.06 ")
    with pytest.raises(InputError, match="is not the plan that was locked"):
        log("/matching/target", 0.07)


def test_code_and_pins_of_the_lock_may_deviate(locked: Plan) -> None:
    place = "/code/analysis/src~1gradnoise~1registration~1seeds.py"
    found = log(place, "ab" * 32, document="lock")
    assert found.registered == sha256("src/gradnoise/registration/seeds.py")
    assert found.tests == tuple(test.id for test in locked.tests)
    assert under_deviations(locked, PLAN, [found]) is None
    audit = log("/code/audit/src~1gradnoise~1registration~1timestamp.py", "ab" * 32, document="lock")
    assert (audit.tests, audit.beside) == ((), "")


def test_the_plan_as_carried_out_keeps_the_seeds_of_the_registered_one(locked: Plan) -> None:
    assert under_deviations(locked, PLAN, []) is None
    batch = pointer(locked, "icl-batch", "high")
    entries = [log(batch, 0.08), log("/matching/target", 0.06), log("/matching/target", 0.07)]
    changed = under_deviations(locked, PLAN, entries)
    assert changed is not None
    assert (changed.test("icl-batch").high, changed.matching.target) == (0.08, 0.07)  # type: ignore[union-attr]
    assert changed.key == locked.key
    assert effective(strict_yaml.load(PLAN), entries)["matching"]["target"] == 0.07
    assert load_plan(PLAN) == locked


def test_a_deviation_must_load_together_with_the_earlier_ones(locked: Plan) -> None:
    log(pointer(locked, "icl-batch", "low"), 0.04)
    with pytest.raises(InputError, match="low"):
        log(pointer(locked, "icl-batch", "high"), 0.03)


TOUCHED = {
    "/matching/target": {"matched at loss"},
    "/matching/minimum_reliability": {"icl-ancova"},
    "/hypotheses/1/met": {"icl-batch"},
    "/families/0/alpha": {"icl-slope", "icl-mixed", "icl-trend", "icl-batch", "iwl-slope"},
    "/outcomes/1": {"iwl-slope"},
    "/power/truths/0": set(),
    "/study/title": set(),
    "/exclusions/0": {"all"},
    "/tests": {"all"},
}


@pytest.mark.parametrize("place", TOUCHED)
def test_tests_follow_from_the_pointer(place: str, plan: Plan) -> None:
    groups = {
        "all": {test.id for test in plan.tests},
        "matched at loss": {test.id for test in plan.tests if test.matching == "loss"},
    }
    expected = set().union(*(groups.get(name, {name}) for name in TOUCHED[place]))
    assert set(touched(plan, place)) == expected


def test_only_what_was_found_after_an_outcome_takes_a_label_away(locked: Plan) -> None:
    early = log(pointer(locked, "icl-batch", "high"), 0.08)
    made.write_attempt("train", "finished")
    late = log(pointer(locked, "icl-trend", "margin"), 0.08)
    labels = {test: label_of(locked, test, [early, late]) for test in ("icl-batch", "icl-trend", "icl-slope")}
    assert labels == {
        "icl-batch": "CONFIRMATORY",
        "icl-trend": "CONFIRMATORY-DEVIATED",
        "icl-slope": "CONFIRMATORY",
    }
    assert label_of(locked, "icl-rank", [early, late]) == "EXPLORATORY"
    edit(PLAN, "kind: registered", "kind: rehearsal")
    assert label_of(load_plan(PLAN), "icl-slope", []) == "REHEARSAL"


def test_pointers_are_those_of_the_standard() -> None:
    document = {"foo": ["bar", "baz"], "": 0, "a/b": 1, "m~n": 8, "~1": 3}
    assert resolve(document, "/foo/1") == "baz"
    assert [resolve(document, place) for place in ("/", "/a~1b", "/m~0n", "/~01")] == [0, 1, 8, 3]
