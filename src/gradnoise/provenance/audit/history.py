"""Checks of Git's history: what came first, and what was changed afterwards."""

from __future__ import annotations

import json
from datetime import datetime
from pathlib import Path
from typing import Any

from gradnoise.base import layout
from gradnoise.provenance.audit.evidence import Evidence, parse_json
from gradnoise.provenance.audit.findings import Breach, check, settle
from gradnoise.provenance.audit.registration import needs_lock
from gradnoise.registration.lockfile import deviations_path

DVC_LOCK = "dvc.lock"
# What a rebuild may change while every number stays what it was.
_GROWS = "provenance"
# Outs that follow from others; raw ones change only with a deviation that names them.
_DERIVED = ("noise", "scores", "analysis", "figures", "report")


@check("A04", "the lock is older than every run, in a whole and honest history", "critical")
def order(evidence: Evidence) -> str:
    """No shallow clone, grafts or replaced objects; every attempt's commit is there and holds the lock."""
    git = evidence.git
    # Data are prepared before the lock, which names their content.
    records = [record for record in evidence.records if record.phase != "prepare"]
    faults = [*git.tampering, *(f"{r.id} ran at no known commit" for r in records if r.commit is None)]
    commits = {record.commit.sha: record.id for record in records if record.commit is not None}
    for sha, name in commits.items():
        if sha not in git.history:
            faults.append(f"{name} ran at commit {sha[:12]}, which this history does not have")
    known = [sha for sha in commits if sha in git.history]
    if not evidence.registered:
        return settle(faults, f"{len(known)} commits of attempts are in a whole history; no lock: rehearsal")
    locked, path = evidence.lock.commit.sha, evidence.lock_file
    if locked not in git.history:
        faults.append(f"the lock's commit {locked[:12]} is not in this history")
    since = datetime.fromisoformat(evidence.lock.utc)
    early = [record for record in records if datetime.fromisoformat(record.start) < since]
    faults += [f"{r.id} started at {r.start}, before the lock of {evidence.lock.utc}" for r in early]
    now = Path(path).read_bytes()
    for sha, blob in zip(known, git.blobs([(sha, path) for sha in known]), strict=True):
        if sha == locked or not git.is_ancestor(locked, sha):
            faults.append(f"{commits[sha]} ran at commit {sha[:12]}, which does not come after the lock's")
        elif blob != now:
            what = "no lock" if blob is None else "another lock"
            faults.append(f"{commits[sha]} ran at commit {sha[:12]}, which has {what}")
    return settle(faults, f"the lock is in the history of all {len(known)} commits at which attempts ran")


@check("A10", "results did not change after they were first committed", "critical")
def unchanged(evidence: Evidence) -> str:
    """Every version of dvc.lock, and of the results in Git, since the first one under this lock."""
    needs_lock(evidence)
    versions = _versions(evidence)
    if not versions:
        raise Breach("no commit of this history holds results under this lock")
    faults: list[str] = []
    before: dict[str, str] = {}
    for commit, outs in versions:
        for path, digest in outs.items():
            if before.get(path, digest) != digest and not _explained(
                evidence, path, before[path], digest, commit
            ):
                faults.append(f"{path} changed in commit {commit[:12]}, and no deviation says why")
        faults += [f"{path} is gone in commit {commit[:12]}" for path in before.keys() - outs.keys()]
        before = outs
    return settle(faults, f"{len(before)} outs, the same in {len(versions)} commits or changed as logged")


def _versions(evidence: Evidence) -> list[tuple[str, dict[str, str]]]:
    """Outs of the study by path in every commit that changed some, from the first one with runs."""
    git, folder = evidence.git, f"results/{evidence.name}"
    lock = Path(evidence.lock_file).read_bytes()
    found: list[tuple[str, dict[str, str]]] = []
    commits = git.touching(DVC_LOCK, folder)
    tracked = git.blobs([(commit, DVC_LOCK) for commit in commits])
    locks = git.blobs([(commit, evidence.lock_file) for commit in commits])
    for commit, text, locked in zip(commits, tracked, locks, strict=True):
        outs = _outs(text or b"", folder)
        outs |= git.listing(commit, folder)
        results = layout.results(evidence.name)
        if locked == lock and (found or f"{folder}/runs" in outs or results in outs):
            found.append((commit, outs))
    return found


def _outs(text: bytes, folder: str) -> dict[str, str]:
    """md5 of each out of a dvc.lock that lies in the folder."""
    return {
        out["path"]: out["md5"]
        for out in dvc_outs(text)
        if out["path"] == folder or out["path"].startswith(f"{folder}/")
    }


def dvc_outs(text: bytes) -> list[dict[str, Any]]:
    """The outs that the text of a dvc.lock names."""
    from ruamel.yaml import YAML

    document = YAML(typ="safe", pure=False).load(text.decode()) or {}
    return [out for stage in document.get("stages", {}).values() for out in stage.get("outs", ())]


def _explained(evidence: Evidence, path: str, old: str, new: str, commit: str) -> bool:
    """Whether a change of an out is a record more, or what a deviation that was logged by then names."""
    room = path.removeprefix(f"results/{evidence.name}/").split("/")[0]
    if room == _GROWS and _only_grew(old, new):
        return True
    log = deviations_path(evidence.study.plan).as_posix()
    lines = (evidence.git.blob(commit, log) or b"").splitlines()
    entries = [parse_json(line, log) for line in lines]
    if any(entry["evidence"] == path or entry["evidence"].startswith(f"{path}/") for entry in entries):
        return True
    return room in _DERIVED and bool(entries)


def _only_grew(old: str, new: str) -> bool:
    """Whether a folder lost nothing but its old manifest, by DVC's listings of both versions."""
    before, after = _listing(old), _listing(new)
    if before is None or after is None:
        return False
    return all(after.get(path) == digest for path, digest in before.items() if path != "manifest.json")


def _listing(digest: str) -> dict[str, str] | None:
    """md5 of the files of a folder, from DVC's store or cache."""
    for store in ("dvc-store", ".dvc/cache"):
        path = Path(store, "files", "md5", digest[:2], digest[2:])
        if path.is_file():
            return {entry["relpath"]: entry["md5"] for entry in json.loads(path.read_bytes())}
    return None
