"""Checks of the runs: seeds, completeness, attempts, and the plan and settings that they ran under."""

from __future__ import annotations

import hashlib
import re
from collections import defaultdict
from collections.abc import Iterator
from itertools import pairwise
from typing import TYPE_CHECKING

from gradnoise.base import layout
from gradnoise.provenance.audit.evidence import Evidence, canonical, plain, seed_of, sha256_of
from gradnoise.provenance.audit.findings import check, settle

if TYPE_CHECKING:
    import pandas as pd

    from gradnoise.provenance.records import Record


@check("A06", "seeds and names of runs follow from the plan and its lock", "critical")
def seeds(evidence: Evidence) -> str:
    """Derived here once more: HMAC-SHA256 under the plan's hash and the lock's public value."""
    faults = []
    for record in _training(evidence):
        for run in record.runs:
            name = sha256_of([evidence.key, run.block, run.cell, run.seed_index])[:16]
            if (run.run_id, run.seed) != (name, seed_of(evidence.key, run.seed_index)):
                faults.append(
                    f"{record.id}: {run.block}/{run.cell} #{run.seed_index} has another name or seed"
                )
    for table in layout.RUN_TABLES:
        faults += _misplaced(evidence, table)
    count = len({run.seed for run in evidence.planned.values()})
    return settle(
        faults, f"{count} seeds of {len(evidence.planned)} runs derived again: the same in every attempt"
    )


def _misplaced(evidence: Evidence, table: str) -> Iterator[str]:
    """Rows of the jobs' tables that are no run of their job."""
    for job in evidence.study.jobs():
        path = layout.run(evidence.name, *job, table)
        frame = evidence.frame(path)
        places = ["run_id", *(name for name in ("block", "cell", "seed_index") if name in frame)]
        own = {name: run for name, run in evidence.planned.items() if run.job == "/".join(job)}
        for row in frame[places].drop_duplicates().to_dict("records"):
            run = own.get(row["run_id"])
            if run is None or any(getattr(run, name) != row[name] for name in places):
                yield f"{path} has rows of {row['run_id']}, which is none of its runs"


def _training(evidence: Evidence) -> list[Record]:
    """Attempts at training under this plan; a rehearsal's folder may still hold those of an older one."""
    return [
        r for r in evidence.records if r.phase == "train" and (evidence.registered or _current(evidence, r))
    ]


def _current(evidence: Evidence, record: Record) -> bool:
    return record.plan is not None and record.plan.sha256 == sha256_of(evidence.plan_document)


@check("A07", "every planned run is there, none besides, and each was tried as often as allowed", "critical")
def completeness(evidence: Evidence) -> str:
    """Runs in records and tables against the design; attempts against the plan's rule."""
    faults = [*_attempt_faults(evidence), *_absent(evidence)]
    tried = len(_training(evidence))
    return settle(
        faults, f"{len(evidence.planned)} runs planned and there; {tried} attempts at training, as allowed"
    )


def _attempt_faults(evidence: Evidence) -> Iterator[str]:
    """Jobs that the design lacks, attempts too many or after one that allows none, gaps in numbers."""
    jobs = {"/".join(job) for job in evidence.study.jobs()}
    by_job: dict[str, list[Record]] = defaultdict(list)
    for record in _training(evidence):
        by_job[record.name].append(record)
    yield from (f"{by_job[name][0].id} trained {name}, which is not planned" for name in by_job.keys() - jobs)
    rule = evidence.plan.attempts
    for name in sorted(jobs):
        for tries in _versions(evidence, by_job[name]):
            ordered = sorted(tries, key=lambda record: record.attempt)
            if len(ordered) > rule.maximum:
                yield f"{name} was tried {len(ordered)} times, {rule.maximum} are allowed"
            for earlier, later in pairwise(ordered):
                if earlier.status not in rule.retry_after:
                    yield f"{later.id} came after {earlier.id}, which is {earlier.status}"
        if not any(record.status == "finished" for record in by_job[name]):
            yield f"{name}: no attempt finished"
        planned = {run.run_id for run in evidence.planned.values() if run.job == name}
        for record in by_job[name]:
            if {run.run_id for run in record.runs} != planned:
                yield f"{record.id} did not train exactly the runs of {name}"
    yield from _gaps(evidence)


def _versions(evidence: Evidence, records: list[Record]) -> list[list[Record]]:
    """All attempts at a job; of a rehearsal apart by code and settings, whose change asks for another run."""
    if evidence.registered:
        return [records]
    groups: dict[bytes, list[Record]] = defaultdict(list)
    for record in records:
        inputs = [file.sha256 for file in record.inputs]
        groups[canonical([record.code.sha256, record.settings, record.pins, inputs])].append(record)
    return list(groups.values())


def _gaps(evidence: Evidence) -> Iterator[str]:
    """Numbers of attempts that have no record although a later one has: a record was taken away."""
    numbers: dict[str, set[int]] = defaultdict(set)
    for path in plain(layout.attempts(evidence.name)).glob("*.json"):
        match = re.fullmatch(r"(.+)-(\d{4,})", path.stem)
        if match is None:
            yield f"{path} is no attempt record"
        else:
            numbers[match[1]].add(int(match[2]))
    for stem, found in sorted(numbers.items()):
        gone = set(range(1, max(found))) - found
        if gone:
            yield f"{stem}: attempt {min(gone)} has no record, attempt {max(found)} has"


def _absent(evidence: Evidence) -> Iterator[str]:
    """Planned runs that tables lack, runs that they have besides, and scores that no job wrote."""
    for table in ("scores", "trajectory", "noise_events"):
        there = set(evidence.runs_frame(table)["run_id"])
        yield from (
            f"run {name} ({_place(evidence, name)}) is not in the jobs' {table}"
            for name in evidence.planned.keys() - there
        )
    path = layout.scores(evidence.name)
    gathered, raw = evidence.frame(path), evidence.runs_frame("scores")
    for name in sorted(set(gathered["run_id"]) ^ set(raw["run_id"])):
        yield f"run {name} ({_place(evidence, name)}) is in one of the jobs' scores and {path} only"
    if not _rows(gathered).equals(_rows(raw)):
        yield f"{path} is not what the jobs scored"


def _place(evidence: Evidence, name: str) -> str:
    run = evidence.planned.get(name)
    return f"{run.block}/{run.cell} #{run.seed_index}" if run else "not planned"


def _rows(frame: pd.DataFrame) -> pd.DataFrame:
    return frame.sort_values(["run_id", "branch", "score"], ignore_index=True)


@check("A08", "every attempt ran under this plan, its lock and settings, from a clean work tree", "critical")
def conditions(evidence: Evidence) -> str:
    """Hashes in the records, settings as the design gives them, code as the commit holds it, and tables."""
    records = evidence.records if evidence.registered else evidence.listed_records
    faults = [fault for record in records for fault in _record_faults(evidence, record)]
    faults += [*_commit_faults(evidence, records), *_condition_faults(evidence)]
    under = "the lock" if evidence.registered else "this plan (no lock: rehearsal)"
    return settle(
        faults, f"{len(records)} attempts under {under}, with their jobs' settings and commits' code"
    )


def _record_faults(evidence: Evidence, record: Record) -> Iterator[str]:
    """What a record says of study, plan, lock and settings."""
    from gradnoise.training.settings import job_settings

    if record.study != evidence.name:
        yield f"{record.id} is of study {record.study}"
    if record.commit is None or record.commit.dirty:
        yield f"{record.id} ran in a work tree that its commit does not describe"
    if record.phase not in ("train", "analyse"):
        return
    plan = (evidence.study.plan, sha256_of(evidence.plan_document))
    if record.plan is None or (record.plan.path, record.plan.sha256) != plan:
        yield f"{record.id} did not run under this plan"
    if evidence.registered:
        lock = (evidence.lock_file, evidence.sha256(evidence.lock_file))
        if record.lock is None or (record.lock.path, record.lock.sha256) != lock:
            yield f"{record.id} did not run under this lock"
    jobs = {"/".join(job): job for job in evidence.study.jobs()} if record.phase == "train" else {}
    wanted = job_settings(evidence.study, *jobs[record.name]) if record.name in jobs else record.settings
    if canonical(record.settings) != canonical(wanted):
        yield f"{record.id} ran with other settings than {record.name} has"


def _commit_faults(evidence: Evidence, records: list[Record]) -> Iterator[str]:
    """Files that ran and that the commit, said to be clean, does not hold."""
    git = evidence.git
    seen: set[tuple[str, str, str]] = set()
    for record in records:
        commit = record.commit.sha if record.commit else ""
        if commit not in git.history:
            continue
        files = {(commit, path, digest) for path, digest in record.code.files.items()} - seen
        seen |= files
        ordered = sorted(files)
        blobs = git.blobs([(sha, path) for sha, path, _ in ordered]) if ordered else []
        for (_, path, digest), blob in zip(ordered, blobs, strict=True):
            if blob is None or hashlib.sha256(blob).hexdigest() != digest:
                yield f"{record.id} ran a {path} that its commit {commit[:12]} does not hold"


def _condition_faults(evidence: Evidence) -> Iterator[str]:
    """Batch and learning rate in the tables against the cells of the design."""
    for table, names in (("scores", ["batch", "learning_rate"]), ("noise_events", ["batch"])):
        rows = evidence.runs_frame(table)[["block", "cell", *names]].drop_duplicates()
        for row in rows.to_dict("records"):
            cell = evidence.study.block(row["block"]).cell(row["cell"])
            for name in names:
                if row[name] != getattr(cell, name):
                    yield f"{row['block']}/{row['cell']}: {table} are of {name} {row[name]}"
