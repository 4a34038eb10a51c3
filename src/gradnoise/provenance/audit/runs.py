"""Checks of the runs: seeds, completeness, attempts, and the plan and settings that they ran under."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from typing import TYPE_CHECKING

from gradnoise.base import layout
from gradnoise.provenance.audit.attempts import attempt_faults, training
from gradnoise.provenance.audit.evidence import Evidence, canonical, seed_of, sha256_of
from gradnoise.provenance.audit.findings import check, settle

if TYPE_CHECKING:
    import pandas as pd

    from gradnoise.provenance.records import Record


@check("A06", "seeds and names of runs follow from the plan and its lock", "critical")
def seeds(evidence: Evidence) -> str:
    """Derived here once more: HMAC-SHA256 under the plan's hash and the lock's public value."""
    faults = []
    for record in training(evidence):
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


@check("A07", "every planned run is there, none besides, and each was tried as often as allowed", "critical")
def completeness(evidence: Evidence) -> str:
    """Runs in records and tables against the design; attempts against the plan's rule."""
    faults = [*attempt_faults(evidence), *_absent(evidence)]
    tried = len(training(evidence))
    return settle(
        faults, f"{len(evidence.planned)} runs planned and there; {tried} attempts at training, as allowed"
    )


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
    """Batches, learning rates and places of branches in the tables against the cells of the design."""
    conditions = {"scores": ["batch", "learning_rate"], "noise_events": ["batch", "learning_rate"]}
    for table, names in (conditions | {"trajectory": ["learning_rate"]}).items():
        rows = evidence.runs_frame(table)
        # A branch is annealed: only on the trunk is the learning rate the cell's.
        rows = rows[rows["segment"] == 0] if "segment" in rows else rows
        for row in rows[["block", "cell", *names]].drop_duplicates().to_dict("records"):
            cell = evidence.study.block(row["block"]).cell(row["cell"])
            for name in names:
                if row[name] != getattr(cell, name):
                    yield f"{row['block']}/{row['cell']}: {table} are of {name} {row[name]}"
    amounts = ["block", "cell", "trunk_sequences", "updates", "sequences"]
    for row in evidence.runs_frame("scores")[amounts].drop_duplicates().to_dict("records"):
        block = evidence.study.block(row["block"])
        batch, trunk = block.cell(row["cell"]).batch, row["trunk_sequences"]
        planned = {*block.branches.sequences, (block.branches.updates or 0) * batch}
        updates = trunk // batch + max(1, round(block.branches.anneal * (trunk // batch)))
        if trunk not in planned or (row["updates"], row["sequences"]) != (updates, updates * batch):
            yield f"{row['block']}/{row['cell']}: a branch leaves the trunk after {trunk} sequences"
