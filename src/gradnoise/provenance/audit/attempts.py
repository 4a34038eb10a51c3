"""Attempts at training as their records tell of them: how many, after what, and how each ended."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator
from itertools import pairwise
from typing import TYPE_CHECKING

from gradnoise.base import layout
from gradnoise.provenance.audit.evidence import Evidence, canonical, plain, sha256_of

if TYPE_CHECKING:
    from gradnoise.provenance.records import Record


def training(evidence: Evidence) -> list[Record]:
    """Attempts at training under this plan; a rehearsal's folder may still hold those of an older one."""
    tried = [record for record in evidence.records if record.phase == "train"]
    if evidence.registered:
        return tried
    plan = sha256_of(evidence.plan_document)
    return [record for record in tried if record.plan is not None and record.plan.sha256 == plan]


def attempt_faults(evidence: Evidence) -> Iterator[str]:
    """Jobs that the design lacks, too many attempts or after one that allows none, and broken records."""
    jobs = {"/".join(job) for job in evidence.study.jobs()}
    by_job: dict[str, list[Record]] = defaultdict(list)
    for record in training(evidence):
        by_job[record.name].append(record)
    yield from (f"{by_job[name][0].id} trained {name}, which is not planned" for name in by_job.keys() - jobs)
    for name in sorted(jobs):
        yield from _retry_faults(evidence, name, by_job[name])
        if not any(record.status == "finished" for record in by_job[name]):
            yield f"{name}: no attempt finished"
        planned = {run.run_id for run in evidence.planned.values() if run.job == name}
        for record in by_job[name]:
            if {run.run_id for run in record.runs} != planned:
                yield f"{record.id} did not train exactly the runs of {name}"
    yield from _number_faults(evidence)
    for record in evidence.records:
        yield from _course_faults(record)


def _retry_faults(evidence: Evidence, name: str, records: list[Record]) -> Iterator[str]:
    """Attempts at one job against the plan's rule. An empty record is of an attempt that was killed."""
    rule = evidence.plan.attempts
    for tries in _versions(evidence, records):
        status: dict[int, str] = {record.attempt: record.status for record in tries}
        if evidence.registered:
            there = _numbers(evidence).get(_stem("train", name), set())
            status = dict.fromkeys(there, "started") | status
        if len(status) > rule.maximum:
            yield f"{name} was tried {len(status)} times, {rule.maximum} are allowed"
        for earlier, later in pairwise(sorted(status)):
            if status[earlier] not in rule.retry_after:
                yield f"{name}: attempt {later} came after attempt {earlier}, which is {status[earlier]}"


def _versions(evidence: Evidence, records: list[Record]) -> list[list[Record]]:
    """All attempts at a job; of a rehearsal apart by code and settings, whose change asks for another run."""
    if evidence.registered:
        return [records]
    groups: dict[bytes, list[Record]] = defaultdict(list)
    for record in records:
        inputs = [file.sha256 for file in record.inputs]
        groups[canonical([record.code.sha256, record.settings, record.pins, inputs])].append(record)
    return list(groups.values())


def _stem(phase: str, name: str) -> str:
    """What the names of a job's records begin with."""
    return "-".join([phase, *re.findall(r"[A-Za-z0-9._-]+", name)])


def _numbers(evidence: Evidence) -> dict[str, set[int]]:
    """Numbers of the attempts that have a record, empty or not."""
    found: dict[str, set[int]] = defaultdict(set)
    for path in plain(layout.attempts(evidence.name)).glob("*.json"):
        stem, _, number = path.stem.rpartition("-")
        found[stem].add(int(number) if re.fullmatch(r"\d{4,}", number) else 0)
    return found


def _number_faults(evidence: Evidence) -> Iterator[str]:
    """Numbers that have no record although a later one has: a record was taken away. And names of others."""
    for stem, found in sorted(_numbers(evidence).items()):
        gone = set(range(1, max(found) + 1)) - found
        if gone:
            yield f"{stem}: attempt {min(gone)} has no record, attempt {max(found)} has"
    for record in evidence.records:
        if record.id != f"{_stem(record.phase, record.name)}-{record.attempt:04d}":
            yield f"{record.id} is of attempt {record.attempt} at {record.phase} {record.name}"


def _course_faults(record: Record) -> Iterator[str]:
    """A record whose status is not what the rest of it tells."""
    ended, wrote, failed = record.end is not None, bool(record.outputs), record.error is not None
    told = {"started": (False, False, False), "finished": (True, True, False), "failed": (True, False, True)}
    if (ended, wrote, failed) != told[record.status]:
        yield f"{record.id} is called {record.status}, and tells of another end"
