"""Deviations from a locked plan: a log that only grows, and what it does to the labels of results.

`deviations.jsonl` beside the plan holds one canonical JSON object a line. Each names the hash of the one
before, so that no line can be changed, moved or taken out of the middle without breaking the chain.
"""

import copy
import json
import re
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, JsonValue

from gradnoise.base import strict_yaml
from gradnoise.base.errors import InputError
from gradnoise.base.files import canonical_json, sha256_of, write_bytes
from gradnoise.base.study import Strict, validated
from gradnoise.registration.history import head, outcome_seen
from gradnoise.registration.kinds import COVARIATE, AnyTest, MixedTest, Text
from gradnoise.registration.lockfile import Lock, Sha256, deviations_path, read_lock
from gradnoise.registration.plan import Plan, checked, load_plan

# Why a study departs from its plan. Source: Lakens, Collabra: Psychology 2024, 117094.
Reason = Literal[
    "unforeseen-event", "error-in-plan", "missing-detail", "violated-assumption", "falsified-auxiliary"
]
DocumentName = Literal["plan", "lock"]

# Parts of a plan that no test's number depends on.
_BESIDE = ("sensitivity", "exploratory", "descriptive", "power")
# What can turn out otherwise than locked; the rest of a lock is what the plan makes it.
_LOCKED_FACTS = ("/code", "/config", "/data", "/requirements_sha256", "/schema_sha256")


class Deviation(Strict):
    """One departure from what was registered.

    `pointer` (JSON Pointer, RFC 6901) names the value in the plan or its lock, `registered` what stands there
    and `actual` what was done instead. `discovered`, by Git: before or after an outcome was there to be seen.
    `tests`: those that it may move. `beside`: where in results.json the as-registered result stands.
    `effect`: its authors' judgement. `hash`: SHA-256 of the canonical JSON of all else.
    """

    id: Annotated[str, Field(pattern=r"^D[1-9][0-9]*$")]
    utc: str
    document: DocumentName
    pointer: Annotated[str, Field(pattern=r"^/")]
    registered: JsonValue
    actual: JsonValue
    reason: Reason
    discovered: Literal["before", "after"]
    commit: str
    evidence: Text
    tests: tuple[str, ...]
    effect: Text
    beside: str
    previous: Annotated[str, Field(pattern=r"^([0-9a-f]{64})?$")]
    hash: Sha256


def read_deviations(plan: Path | str) -> list[Deviation]:
    """The log of a plan with its chain verified; empty where there is none.

    Raises `InputError` naming the first line that is not canonical JSON, does not follow from the one before,
    or was changed. A cut at the end leaves the chain whole: Git's history shows that.
    """
    path = deviations_path(plan)
    if not path.is_file():
        return []
    mend = "restore it with git checkout: it is only ever appended to, by gradnoise plan deviate"
    found: list[Deviation] = []
    for number, line in enumerate(path.read_bytes().splitlines(keepends=True), start=1):
        where = f"{path}, line {number}"
        try:
            value = json.loads(line)
            spelt = canonical_json(value) + b"\n"
        except ValueError as error:
            raise InputError(where, "is no whole line of JSON", mend) from error
        entry = validated(Deviation, value, where)
        chain = (f"D{number}", found[-1].hash if found else "", _hash(value), spelt)
        if (entry.id, entry.previous, entry.hash, line) != chain:
            raise InputError(where, "breaks the chain of hashes", mend)
        found.append(entry)
    return found


def deviate(
    path: Path | str,
    pointer: str,
    actual: JsonValue,
    *,
    reason: Reason,
    evidence: str,
    effect: str,
    document: DocumentName = "plan",
) -> Deviation:
    """Append one deviation to the log of the locked plan at `path`, and return it.

    What can be found out is never asked for: the registered value comes from the locked document, the tests
    from the pointer, before or after from Git, the time from the clock. `actual` is what was done at the
    pointer, `evidence` a file of the repository that shows why, `effect` what it does to the conclusions.

    Raises `InputError`, and writes nothing, for a rehearsal, a plan without its lock or other than the locked
    one, an unknown pointer, a value that is the registered one or under which the plan does not load, an
    unknown reason, and evidence that is no file of the repository.
    """
    plan, lock = _locked(path)
    earlier = read_deviations(path)
    registered = _registered(path, lock, document, pointer)
    _check_actual(path, lock, earlier, document, pointer, actual)
    tests = touched(plan, pointer, document)
    seen = outcome_seen(Path(plan.study.config).stem)
    entry: dict[str, Any] = {
        "id": f"D{len(earlier) + 1}",
        "utc": datetime.now(UTC).isoformat(timespec="seconds"),
        "document": document,
        "pointer": pointer,
        "registered": registered,
        "actual": actual,
        "reason": reason,
        "discovered": "before" if seen is None else "after",
        "commit": head().sha,
        "evidence": _evidence(evidence),
        "tests": list(tests),
        "effect": effect,
        "beside": f"tests.{tests[0]}" if len(tests) == 1 else "tests" if tests else "",
        "previous": earlier[-1].hash if earlier else "",
    }
    added = validated(Deviation, entry | {"hash": sha256_of(entry)}, "deviation")
    lines = [canonical_json(item.model_dump(mode="json")) + b"\n" for item in [*earlier, added]]
    write_bytes(deviations_path(path), b"".join(lines))
    return added


def effective(document: dict[str, Any], deviations: Iterable[Deviation]) -> dict[str, Any]:
    """A copy of the plan's parsed document with the actual values of its deviations put in, in order."""
    found = copy.deepcopy(document)
    for deviation in deviations:
        if deviation.document == "plan":
            _put(found, deviation.pointer, deviation.actual)
    return found


def under_deviations(plan: Plan, path: Path | str, deviations: Sequence[Deviation]) -> Plan | None:
    """The plan as it was carried out, with the seeds of the registered one; None where it is that one.

    `path`: where `plan` was loaded from.
    """
    if all(deviation.document != "plan" for deviation in deviations):
        return None
    changed = checked(effective(_document(path), deviations), f"{path} with its deviations")
    changed._sha256, changed._beacon = plan._sha256, plan._beacon
    return changed


def label_of(plan: Plan, test: str, deviations: Iterable[Deviation]) -> str:
    """What the result of a test may be called, one of `STANDING`.

    Of a registered plan: EXPLORATORY for a test that is not in it, CONFIRMATORY-DEVIATED for one that is
    touched by a deviation discovered after an outcome could be seen, else CONFIRMATORY.
    """
    if plan.study.kind == "rehearsal":
        return "REHEARSAL"
    if all(test != known.id for known in plan.tests):
        return "EXPLORATORY"
    late = any(test in entry.tests for entry in deviations if entry.discovered == "after")
    return "CONFIRMATORY-DEVIATED" if late else "CONFIRMATORY"


def touched(plan: Plan, pointer: str, document: DocumentName = "plan") -> tuple[str, ...]:
    """Tests whose numbers or verdicts a change at the pointer may move, in the plan's order.

    Where nobody can say in advance how far a change reaches (exclusions, seeds, exposure, code), every test
    counts as touched.
    """
    steps = _steps(pointer)
    if document == "lock":
        return () if steps[:2] == ["code", "audit"] else tuple(test.id for test in plan.tests)
    if steps[0] in _BESIDE or pointer == "/study/title":
        return ()
    return tuple(test.id for test in plan.tests if _touches(plan, steps, test))


def resolve(document: JsonValue, pointer: str) -> JsonValue:
    """The value that a JSON Pointer (RFC 6901) names in a document; `InputError` where it names none."""
    value = document
    for step in _steps(pointer):
        if isinstance(value, dict) and step in value:
            value = value[step]
        elif isinstance(value, list) and re.fullmatch("0|[1-9][0-9]*", step) and int(step) < len(value):
            value = value[int(step)]
        else:
            known = (
                sorted(value)
                if isinstance(value, dict)
                else range(len(value))
                if isinstance(value, list)
                else ()
            )
            raise InputError("pointer", pointer, f"{step!r} must be one of {list(known)}")
    return value


def _touches(plan: Plan, steps: Sequence[str], test: AnyTest) -> bool:
    match steps:
        case ["tests", index, *_]:
            return test.id == plan.tests[int(index)].id
        case ["hypotheses", index, *_]:
            # Loading makes sure that these are all the tests of its rule.
            return test.id in plan.hypotheses[int(index)].p.max_of
        case ["families", index, *_]:
            members = plan.families[int(index)].members
            return any(test.id in item.p.max_of for item in plan.hypotheses if item.id in members)
        case ["outcomes", index, *_]:
            return test.outcome == plan.outcomes[int(index)].id
        case ["matching", "target" | "how"]:
            return test.matching == "loss"
        case ["matching", "minimum_reliability"]:
            return isinstance(test, MixedTest) and COVARIATE in test.fixed
    return True


def _locked(path: Path | str) -> tuple[Plan, Lock]:
    plan = load_plan(path)
    if plan.study.kind == "rehearsal":
        raise InputError(
            str(path), "is a rehearsal", "nothing binds it: change it, and its seeds change with it"
        )
    lock = read_lock(path)
    if plan.sha256 != lock.plan.canonical_sha256:
        mend = "put it back with git checkout: a deviation is logged, not written into the plan"
        raise InputError(str(path), "is not the plan that was locked", mend)
    return plan, lock


def _registered(path: Path | str, lock: Lock, document: DocumentName, pointer: str) -> JsonValue:
    if document == "plan":
        return resolve(_document(path), pointer)
    if not any(f"{pointer}/".startswith(f"{fact}/") for fact in _LOCKED_FACTS):
        raise InputError("pointer", pointer, f"must begin with one of {list(_LOCKED_FACTS)}")
    return resolve(lock.model_dump(mode="json"), pointer)


def _check_actual(
    path: Path | str,
    lock: Lock,
    earlier: Sequence[Deviation],
    document: DocumentName,
    pointer: str,
    actual: JsonValue,
) -> None:
    """Refuse a value that is no JSON, that changes nothing, or with which the document does not load."""
    try:
        canonical_json(actual)
    except (TypeError, ValueError) as error:
        raise InputError("actual", actual, "must be a JSON value without NaN or infinity") from error
    where = f"{path} with {pointer} so"
    if document == "lock":
        unchanged = validated(Lock, _with(lock.model_dump(mode="json"), pointer, actual), where) == lock
    else:
        written = _document(path)
        registered, changed = checked(written, str(path)), checked(_with(written, pointer, actual), where)
        checked(_with(effective(written, earlier), pointer, actual), where)
        for name in ("id", "kind", "config"):
            if getattr(changed.study, name) != getattr(registered.study, name):
                mend = "names the study itself: another study needs a plan of its own"
                raise InputError("pointer", pointer, mend)
        unchanged = changed == registered
    if unchanged:
        raise InputError("actual", actual, "is what was registered: nothing deviates")


def _with(document: dict[str, Any], pointer: str, value: JsonValue) -> dict[str, Any]:
    found = copy.deepcopy(document)
    _put(found, pointer, value)
    return found


def _put(document: dict[str, Any], pointer: str, value: JsonValue) -> None:
    """Replace what stands at the pointer."""
    resolve(document, pointer)
    above = pointer.rpartition("/")[0]
    parent, last = resolve(document, above) if above else document, _steps(pointer)[-1]
    if isinstance(parent, list):
        parent[int(last)] = value
    elif isinstance(parent, dict):
        parent[last] = value


def _steps(pointer: str) -> list[str]:
    first, *steps = pointer.split("/")
    if first or not steps or re.search("~(?![01])", pointer):
        raise InputError("pointer", pointer, "must be a JSON Pointer such as /tests/0/margin")
    return [step.replace("~1", "/").replace("~0", "~") for step in steps]


def _document(path: Path | str) -> dict[str, Any]:
    document: dict[str, Any] = json.loads(canonical_json(strict_yaml.load(path)))
    return document


def _hash(entry: dict[str, Any]) -> str:
    return sha256_of({key: value for key, value in entry.items() if key != "hash"})


def _evidence(path: str) -> str:
    """The path as the log names it: of a file inside the repository, links followed."""
    root = Path.cwd().resolve()
    file = (root / path).resolve()
    if not file.is_relative_to(root) or not file.is_file():
        raise InputError("evidence", path, "must be a file of this repository, by its path from the root")
    return file.relative_to(root).as_posix()
