"""Checks of the plan and its lock: read strictly, unchanged, and older than everything else."""

from __future__ import annotations

import hashlib
import os
import re
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Literal

import gradnoise
from gradnoise import phases
from gradnoise.base import layout
from gradnoise.base.closure import code_closure
from gradnoise.base.digest import table_digest
from gradnoise.base.study import TextTask, study_path
from gradnoise.provenance.audit.evidence import Evidence, plain, sha256_of
from gradnoise.provenance.audit.findings import Breach, NotApplicable, check, settle
from gradnoise.registration.lockfile import deviations_path
from gradnoise.registration.reference import plan_schema

REHEARSAL = "rehearsal"
REQUIREMENTS, PROJECT = "requirements.lock", "pyproject.toml"
# Where the code begins that judges and that is judged, as a lock names it.
MODULES: dict[Literal["analysis", "audit"], str] = {
    "analysis": phases.MODULES["analyse"],
    "audit": "gradnoise.provenance.audit.page",
}


def needs_lock(evidence: Evidence) -> None:
    """A rehearsal has no lock, and nothing that is held against one."""
    if not evidence.registered:
        raise NotApplicable(REHEARSAL)


@check("A01", "plan, settings and lock are read strictly and fit their schemas", "critical")
def read_strictly(evidence: Evidence) -> str:
    """Duplicate keys, NaN, misspelt fields, rules on outcomes and loose references do not load."""
    plan, study = evidence.plan, evidence.study
    if plan.study.config != str(study_path(evidence.name)):
        raise Breach(f"{study.plan} is the plan of {plan.study.config}")
    if evidence.registered:
        _ = evidence.lock
    counted = f"{len(plan.tests)} tests, {len(plan.hypotheses)} hypotheses, {len(evidence.planned)} runs"
    return f"{study.plan}: {counted}; canonical {sha256_of(evidence.plan_document)[:12]}"


@check("A02", "plan and settings are those that were locked", "critical")
def locked_documents(evidence: Evidence) -> str:
    """Raw and canonical hashes, and the list of runs that follows from both."""
    needs_lock(evidence)
    lock, faults = evidence.lock, []
    # What a lock says of settings can be deviated from, with an entry in the log; a plan cannot be exchanged.
    for document, path in (
        (lock.plan, evidence.study.plan),
        (evidence.allowed.config, evidence.plan.study.config),
    ):
        if document.path != path:
            faults.append(f"the lock is of {document.path}, not of {path}")
        if document.sha256 != evidence.sha256(path):
            faults.append(f"{path}: sha256 {evidence.sha256(path)[:12]}, locked {document.sha256[:12]}")
        if document.canonical_sha256 != sha256_of(evidence.document(path)):
            faults.append(f"{path}: its values are not those that were locked")
    names = ("run_id", "block", "cell", "seed_index", "seed")
    runs = [{name: getattr(run, name) for name in names} for run in evidence.planned.values()]
    if [run.model_dump() for run in lock.runs] != runs or lock.runs_sha256 != sha256_of(runs):
        faults.append("the locked list of runs is not the one that plan and settings give")
    return settle(faults, f"raw and canonical hashes agree; {len(runs)} runs as locked ({lock.utc})")


@check("A03", "plan, lock and settings are, byte for byte, in the commits that hold them", "critical")
def committed_documents(evidence: Evidence) -> str:
    """Compared by bytes with Git's objects, because Git can be told not to see an edit."""
    git, plan = evidence.git, evidence.study.plan
    faults = [f"Git is told to overlook edits of {path}" for path in git.hidden]
    files = [plan, evidence.plan.study.config]
    at_lock: list[str] = []
    if evidence.registered:
        commit = evidence.lock.commit
        if git.tree(commit.sha) != commit.tree:
            faults.append(f"commit {commit.sha[:12]} has another tree than the lock says")
        at_lock = [plan] if evidence.allowed.config != evidence.lock.config else list(files)
        files += [evidence.lock_file, *filter(os.path.isfile, [deviations_path(plan).as_posix()])]
    places = [(git.head, path) for path in files]
    places += [(evidence.lock.commit.sha, path) for path in at_lock]
    for (sha, path), blob in zip(places, git.blobs(places), strict=True):
        if blob != plain(path).read_bytes():
            faults.append(f"{path} {'is not in' if blob is None else 'differs from'} commit {sha[:12]}")
    where = (
        f"and the lock's commit {evidence.lock.commit.sha[:12]}"
        if evidence.registered
        else "(no lock: rehearsal)"
    )
    return settle(faults, f"{len(files)} files as in HEAD {where}; no edit is hidden from Git")


@check("A05", "the code is the code that ran and that was locked", "critical")
def code(evidence: Evidence) -> str:
    """On disk, in this process, in the records of the newest attempts, and in the lock."""
    faults = [*_not_running(evidence), *_not_recorded(evidence)]
    if not evidence.registered:
        return settle(faults, "the code on disk runs, and made the results; no lock: rehearsal")
    allowed = evidence.allowed
    if allowed.schema_sha256 != sha256_of(plan_schema()):
        faults.append("the schema of plans is not the one that was locked, and no deviation says so")
    for name, module in MODULES.items():
        locked = allowed.code.get(name, {})
        for path in sorted(locked.keys() | set(code_closure(module))):
            found = evidence.sha256(path) if Path(path).is_file() else None
            if found != locked.get(path):
                faults.append(f"{path} ({name}) is not as locked, and no deviation says so")
    count = len({path for files in allowed.code.values() for path in files})
    return settle(faults, f"{count} files of analysis and audit as locked; they run, and made the results")


def _not_running(evidence: Evidence) -> list[str]:
    """Files of the auditor's code that run from elsewhere and are not those of this repository."""
    source = Path(gradnoise.__file__).parents[1]
    if source == Path("src").resolve():
        return []
    faults = []
    for path in code_closure(MODULES["audit"], source):
        running = source / path.removeprefix("src/")
        if not Path(path).is_file() or running.read_bytes() != plain(path).read_bytes():
            faults.append(f"the audit runs another {path}: install this repository (make does it)")
    return faults


def _not_recorded(evidence: Evidence) -> list[str]:
    """Files of the code that are not what the jobs behind the results ran."""
    faults: dict[str, str] = {}
    for record in evidence.listed_records:
        there = set(code_closure(record.module)) if record.module in phases.MODULES.values() else set()
        if not there:
            faults[record.module] = f"{record.id} ran {record.module}, which is no phase"
        for path in sorted(there | record.code.files.keys()):
            found = evidence.sha256(path) if Path(path).is_file() else None
            if found != record.code.files.get(path):
                faults.setdefault(path, f"{path} is not what {record.id} ran")
    return list(faults.values())


@check("A12", "data of evaluation and pilot are those that were registered", "critical")
def data(evidence: Evidence) -> str:
    """Logical digests of prepared data, the hashes inside them, and the bytes of the pilot's files."""
    faults, said = [], []
    for pilot in evidence.plan.study.pilot:
        if evidence.sha256(pilot.path) != pilot.sha256:
            faults.append(f"{pilot.path} is not the pilot of the plan")
        said.append(pilot.path)
    texts = any(isinstance(block.task, TextTask) for block in evidence.study.blocks.values())
    if texts:
        plays = layout.plays(evidence.name)
        faults += [
            f"{plays}: {row['play']} is not the text of its own hash"
            for row in evidence.rows(plays)
            if hashlib.sha256(row["text"].encode()).hexdigest() != row["sha256"]
            or len(row["text"]) != row["characters"]
        ]
        said.append(plays)
    if evidence.registered:
        there = {layout.plays(evidence.name)} if texts else set()
        locked = evidence.allowed.data
        faults += [
            f"{path}: its content is not what was locked"
            for path in sorted(there | locked.keys())
            if path not in locked or table_digest(plain(path)) != locked[path]
        ]
    elif not said:
        raise NotApplicable(f"{REHEARSAL}; no prepared data and no pilot file")
    return settle(faults, f"{', '.join(said) or 'nothing prepared'}: as registered")


@check("A29", "the environment is the pinned one", "serious")
def environment(evidence: Evidence) -> str:
    """Pins of every job, the versions that this audit computes with, and the bytes that were locked."""
    pins, faults = _pins(), []
    for record in evidence.listed_records:
        for package, pinned in record.pins.items():
            ran, wanted = record.environment.packages.get(package, pinned), pins.get(_normal(package))
            if {pinned, ran.partition("+")[0]} != {wanted}:
                faults.append(f"{record.id} ran with {package} {ran}, pinned is {wanted}")
    needed = sorted({package for record in evidence.listed_records for package in record.pins} - {"torch"})
    for package in needed:
        try:
            found: str | None = version(package)
        except PackageNotFoundError:
            found = None
        if found is None or found.partition("+")[0] != pins.get(_normal(package)):
            faults.append(f"{package} {found} is installed here, pinned is {pins.get(_normal(package))}")
    if evidence.registered and evidence.sha256(REQUIREMENTS) != evidence.allowed.requirements_sha256:
        faults.append(f"{REQUIREMENTS} is not the one that was locked, and no deviation says so")
    locked = f"{REQUIREMENTS} as locked" if evidence.registered else "no lock: rehearsal"
    return settle(faults, f"{len(needed)} packages in their pinned versions, here and in every job; {locked}")


def _pins() -> dict[str, str]:
    """Versions by normal name; torch is pinned in the project's extra `study`."""
    text = plain(REQUIREMENTS).read_text(encoding="utf-8")
    pinned = {_normal(name): version for name, version in re.findall(r"(?m)^([\w.-]+)==([^\s;\\]+)", text)}
    torch = re.search(r'"torch==([^"]+)"', plain(PROJECT).read_text(encoding="utf-8"))
    return pinned | ({"torch": torch[1]} if torch else {})


def _normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


@check("A30", "an outside party vouches for when the lock existed", "minor")
def anchor(evidence: Evidence) -> str:
    """A time-stamp token (RFC 3161) over the bytes of the lock; none is no breach, a wrong one is."""
    needs_lock(evidence)
    # Loads the libraries of signatures, which nothing else here needs.
    from gradnoise.registration.timestamp import verify_timestamp

    found = verify_timestamp(evidence.study.plan)
    if found is None:
        return "none: when the lock existed rests on this repository alone"
    if not found.verified:
        raise Breach(f"the time-stamp token does not hold: {found.reason}")
    return f"verified: the lock existed at {found.utc}, by the word of {found.authority}"
