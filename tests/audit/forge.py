"""What a skilled cheat does to cover his tracks: every file that names another is made to agree with it."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Collection
from functools import cache
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
from ruamel.yaml import YAML
from tests.audit.fixture_study import NAME, PLAN, Repository

from gradnoise.analysis.analyse import analyse
from gradnoise.analysis.rehearse import dry_run, reachability
from gradnoise.base import layout, strict_yaml, tables
from gradnoise.base.files import canonical_json, read_json, sha256, sha256_of, write_json
from gradnoise.base.study import load_study
from gradnoise.figures.draw import draw
from gradnoise.noise.measure import measure
from gradnoise.phases import outputs
from gradnoise.provenance.audit.registration import MODULES
from gradnoise.provenance.manifest import write_manifest
from gradnoise.registration.history import head
from gradnoise.registration.lockfile import DryRun, Reached, deviations_path, lock_path, read_lock
from gradnoise.registration.locking import facts, planned_runs
from gradnoise.registration.plan import checked, load_plan
from gradnoise.report.render import render

TABLES = {table.name: table for table in vars(tables).values() if isinstance(table, tables.Table)}
PHASES: dict[str, Callable[[str], None]] = {
    "measure": measure,
    "analyse": analyse,
    "draw": draw,
    "report": render,
}
RESULTS, MANIFEST = layout.results(NAME), layout.manifest(NAME)
LOCK, LOG = lock_path(PLAN).as_posix(), deviations_path(PLAN).as_posix()
Json = dict[str, Any]


def rewrite(repository: Repository, path: str, change: Callable[[pd.DataFrame], pd.DataFrame]) -> None:
    """Change the rows of a table and write it as the project does: checksums and statistics are right."""
    with repository.inside():
        notes = {key.decode(): value.decode() for key, value in (pq.read_schema(path).metadata or {}).items()}
        table, label = TABLES[notes.pop("table")], notes.pop("label")
        frame = change(pq.read_table(path).to_pandas())
        columns = pa.Table.from_pandas(frame, schema=table.schema(), preserve_index=False)
        tables.write_table(path, table, columns, label, notes)


def rewrite_json(repository: Repository, path: str, change: Callable[[Any], object]) -> None:
    """Change a JSON file and write it as the project writes it."""
    value = read_json(repository.file(path))
    change(value)
    write_json(repository.file(path), value)


def records(repository: Repository) -> dict[str, Json]:
    """Every attempt record by its id."""
    folder = repository.file(layout.attempts(NAME))
    found = [read_json(path) for path in folder.glob("*.json") if path.stat().st_size]
    return {record["id"]: record for record in found if isinstance(record, dict)}


def write_record(repository: Repository, record: Json) -> None:
    """Write a record under its own id."""
    write_json(repository.file(f"{layout.attempts(NAME)}/{record['id']}.json"), record)


def analyse_under(repository: Repository, change: Callable[[Json], object]) -> None:
    """Carry the analysis out under another plan than the registered one, whose names and draws it keeps."""
    with repository.inside():
        plan = load_plan(PLAN)
        document: Json = json.loads(canonical_json(strict_yaml.load(PLAN)))
        change(document)
        other = checked(document, PLAN)
        other._sha256, other._beacon = plan._sha256, plan._beacon
        with patch("gradnoise.analysis.analyse.load_plan", lambda _: other):
            analyse(NAME)


def disguise(repository: Repository) -> None:
    """Let results.json say that everything was asked as registered, whatever was computed."""
    honest = json.loads(repository.git("show", f"HEAD:{RESULTS}"))

    def change(results: Json) -> None:
        for name in ("plan", "thresholds", "descriptive", "deviations", "deviated"):
            results[name] = honest[name]
        for entry, before in zip(results["tests"], honest["tests"], strict=True):
            for name in ("asked", "alpha", "level", "matching", "description", "kind", "hypothesis", "label"):
                entry[name] = before[name]
            for name in ("alternative", "margin_low", "margin_high", "margin", "draws"):
                if name in before["details"]:
                    entry["details"][name] = before["details"][name]
        for entry, before in zip(results["hypotheses"], honest["hypotheses"], strict=True):
            entry |= {name: before[name] for name in ("text", "rule", "label")}
        for entry, before in zip(results["families"], honest["families"], strict=True):
            entry |= {name: before[name] for name in ("method", "alpha")}

    rewrite_json(repository, RESULTS, change)


def rerun(repository: Repository, *phases: str) -> None:
    """Carry phases out again; nothing is recorded."""
    with repository.inside():
        for phase in phases:
            PHASES[phase](NAME)


def seal(repository: Repository, keep: Collection[str] = ()) -> None:
    """Records (but those to `keep`), manifest and dvc.lock name the bytes that lie there now."""
    for record in records(repository).values():
        for file in (*record["inputs"], *record["outputs"]):
            path = repository.file(file["path"])
            if record["id"] not in keep and path.is_file():
                file |= {"sha256": sha256(path), "size": path.stat().st_size}
                if file["rows"] is not None:
                    file["rows"] = pq.read_metadata(path).num_rows
        write_record(repository, record)
    with repository.inside():
        write_manifest(NAME, outputs(NAME, load_study(NAME)))
        seal_dvc()


def seal_dvc() -> None:
    """dvc.lock names the bytes that lie there now, as `dvc commit` would."""
    yaml = YAML()
    yaml.width = 1000
    lock = yaml.load(Path("dvc.lock").read_text())
    for stage in lock["stages"].values():
        for file in (*stage.get("deps", ()), *stage.get("outs", ())):
            path = Path(file["path"])
            if path.is_dir():
                inside = sorted(each for each in path.rglob("*") if each.is_file())
                listing = [
                    {"md5": _md5(each.read_bytes()), "relpath": each.relative_to(path).as_posix()}
                    for each in inside
                ]
                listing.sort(key=lambda entry: entry["relpath"])
                for each in inside:
                    _keep(each.read_bytes())
                file["md5"] = _keep(json.dumps(listing, sort_keys=True).encode(), ".dir")
                file["size"] = sum(each.stat().st_size for each in inside)
                file["nfiles"] = len(inside)
            elif path.is_file():
                file |= {"md5": _keep(path.read_bytes()), "size": path.stat().st_size}
    with Path("dvc.lock").open("w") as handle:
        yaml.dump(lock, handle)


def amend(repository: Repository) -> None:
    """The last commit holds what lies there now, as if it always had."""
    repository.git("add", "--all")
    repository.git("commit", "--quiet", "--amend", "--no-edit", "--allow-empty")


def cover(repository: Repository, *phases: str, keep: Collection[str] = ()) -> None:
    """Carry out what follows from the forged files, seal everything, and change the last commit."""
    rerun(repository, *phases)
    seal(repository, keep)
    amend(repository)


def relock(change: Callable[[Json], object] = lambda _: None) -> None:
    """Write a lock of the plan as it is, at the commit that is checked out; `change` may add lies."""
    plan, study, old = load_plan(PLAN), load_study(NAME), read_lock(PLAN)
    runs = planned_runs(plan, study, old.beacon)
    tried, reached = _tried(plan.sha256)
    new = old.model_copy(
        update={
            "runs": runs,
            "runs_sha256": sha256_of([run.model_dump(mode="json") for run in runs]),
            "dry_run": tried,
            "reachability": reached,
            "commit": head(),
        }
    )
    value = new.model_dump(mode="json") | json.loads(canonical_json(_plain(facts(PLAN, MODULES))))
    change(value)
    write_json(LOCK, value)


@cache
def _tried(plan_sha256: str) -> tuple[DryRun, tuple[Reached, ...]]:
    """The dry run of the plan with this hash, which lies in the working folder."""
    plan = load_plan(PLAN)
    assert plan.sha256 == plan_sha256
    return dry_run(plan, load_study(NAME)), reachability(plan)


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return value.model_dump(mode="json") if hasattr(value, "model_dump") else value


def rename(repository: Repository, *, seeds: bool) -> None:
    """Give every run the name that today's plan gives it, and its record the seed, but not the training."""
    with repository.inside():
        plan, study = load_plan(PLAN), load_study(NAME)
        new = {(run.block, run.cell, run.seed_index): run for run in planned_runs(plan, study, plan._beacon)}
        jobs = list(study.jobs())
    names: dict[str, str] = {}
    for record in records(repository).values():
        for run in record["runs"]:
            now = new[run["block"], run["cell"], run["seed_index"]]
            names[run["run_id"]] = now.run_id
            run |= {"run_id": now.run_id} | ({"seed": now.seed} if seeds else {})
        write_record(repository, record)
    for job in jobs:
        for table in layout.RUN_TABLES:
            path = layout.run(NAME, *job, table)
            rewrite(repository, path, lambda frame: frame.assign(run_id=frame["run_id"].map(names)))


def claim(repository: Repository, commit: str) -> None:
    """Let every record say that it ran at a commit, under the plan and the lock as they are now."""
    with repository.inside():
        plan, lock = load_plan(PLAN).sha256, sha256(LOCK)
    for record in records(repository).values():
        record["commit"]["sha"] = commit
        if record["plan"] is not None:
            record["plan"]["sha256"], record["lock"]["sha256"] = plan, lock
        write_record(repository, record)


def rewrite_history(
    repository: Repository,
    plan: Callable[[Json], object] | None = None,
    lock: Callable[[Json], object] = lambda _: None,
    log: Callable[[list[Json]], object] = lambda _: None,
) -> None:
    """Tell the whole history anew, in a repository without a past: registered so from the start.

    `plan`, `lock` and `log` change these documents first; runs get the names and seeds that follow.
    """
    with repository.inside():
        entries = [json.loads(line) for line in Path(LOG).read_bytes().splitlines()]
        held = {path: Path(path).read_bytes() for path in (LOCK, "docs/slip.md")}
        if plan is not None:
            document: Json = json.loads(canonical_json(strict_yaml.load(PLAN)))
            plan(document)
            write_json(PLAN, document)
        for path in (*held, LOG):
            Path(path).unlink()
        shutil.rmtree(".git")
        repository.git("init", "--quiet", "--initial-branch", "main")
        _commit_all_but_results(repository, "Plan")
        Path(LOCK).write_bytes(held.pop(LOCK))
        relock(lock)
        _commit_all_but_results(repository, "Lock")
        for path, content in held.items():
            Path(path).write_bytes(content)
        log(entries)
        write_log(entries, commit=head().sha)
        _commit_all_but_results(repository, "Deviation")
        commit = head().sha
    claim(repository, commit)
    rename(repository, seeds=True)
    rerun(repository, "measure", "analyse", "draw", "report")
    seal(repository)
    repository.commit("Results")


def write_log(entries: list[Json], commit: str | None = None) -> None:
    """Write a log of deviations whose chain of hashes holds; `commit`: where all of them were logged."""
    previous = ""
    for number, entry in enumerate(entries, start=1):
        entry |= {"id": f"D{number}", "previous": previous} | ({"commit": commit} if commit else {})
        entry["hash"] = sha256_of({name: value for name, value in entry.items() if name != "hash"})
        previous = entry["hash"]
    Path(LOG).write_bytes(b"".join(canonical_json(entry) + b"\n" for entry in entries))


def _commit_all_but_results(repository: Repository, message: str) -> None:
    repository.git("add", "--all", "--", ".", ":(exclude)results", ":(exclude)dvc.lock")
    repository.git("commit", "--quiet", "--allow-empty", "--message", message)


def _keep(content: bytes, suffix: str = "") -> str:
    """Put content into DVC's cache; gives its MD5."""
    digest = _md5(content) + suffix
    place = Path(".dvc/cache/files/md5", digest[:2], digest[2:])
    if not place.is_file():
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_bytes(content)
    return digest


def _md5(content: bytes) -> str:
    return hashlib.md5(content, usedforsecurity=False).hexdigest()
