"""From a file of `results/` back to runs, seeds, settings, code and environment, checking every hash.

Offline, from results and attempt records alone. A trace ends well only if today's files are, byte for byte,
those that were recorded all the way down; otherwise the first break is raised.
"""

import os
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from gradnoise.base import layout, strict_yaml
from gradnoise.base.closure import code_closure
from gradnoise.base.errors import InputError
from gradnoise.base.files import canonical_json, sha256, sha256_of
from gradnoise.base.study import study_path
from gradnoise.provenance.manifest import read_manifest
from gradnoise.provenance.records import (
    Decided,
    Document,
    File,
    Record,
    Run,
    layout_path,
    producers,
    read_records,
)

# What would decide a recorded job today, beyond its inputs.
Today = Callable[[Record], Decided]

RESTORE = "restore it (git checkout, dvc pull) or rebuild it with snakemake"
REBUILD = "rebuild with snakemake, or check out the version that the results belong to"


class TraceBreak(Exception):
    """The first place where what is there is not what was recorded."""

    def __init__(self, path: str, expected: str, found: str, meaning: str, mend: str) -> None:
        super().__init__(f"{path}: expected {expected}, found {found}: {meaning}: {mend}")
        self.path, self.expected, self.found, self.meaning, self.mend = path, expected, found, meaning, mend


@dataclass(frozen=True)
class Step:
    """A job of the trace.

    `inputs` are the earlier jobs, each with those of its files that this job read; `sources` are the files
    that this job read and no job wrote.
    """

    record: Record
    inputs: tuple[tuple["Step", tuple[File, ...]], ...]
    sources: tuple[File, ...]


@dataclass(frozen=True)
class Trace:
    """A traced file and the job that wrote it, with what was checked on the way down.

    `beside` is what the job wrote under the same name with another ending: a figure's plot data. `steps` is
    every job, each once; `plans` the plans that mean what they meant then; `hashed` the number of files
    hashed.
    """

    file: File
    beside: tuple[File, ...]
    step: Step
    steps: tuple[Step, ...]
    plans: tuple[Document, ...]
    hashed: int


def trace(path: str, today: Today, root: Path | str = ".") -> Trace:
    """Trace one file of a study.

    For the file, and then for every input of the job behind it, and so on down: its bytes are those that the
    reading job recorded, and a finished attempt wrote exactly these bytes (of several, the newest counts).
    So is what that attempt wrote beside the traced file under the same name: a figure's plot data.
    For every job: its record has the bytes that the manifest lists, if there is one; its code closure has the
    same files with the same bytes; its plan has the same canonical hash; its settings, its runs with their
    seeds, and the pins of its packages are what `today(record)` gives.

    `root` is the repository. Raises `InputError` for a path outside `results/`, for evidence (a record, the
    manifest) and for a path that neither exists nor is recorded, and `TraceBreak` for the first thing that
    differs.
    """
    relative = Path(os.path.relpath(Path(root, path), root))
    parts = relative.parts
    if len(parts) < 3 or parts[0] != "results":
        raise InputError("path", path, "give a file of a study, such as results/quick/analysis/results.json")
    if parts[2] == "provenance":
        meaning = "is evidence, not a result"
        raise InputError("path", path, f"{meaning}: give a result, such as {layout.results(parts[1])}")
    tracer = _Tracer(Path(root), parts[1], today)
    name = relative.as_posix()
    if not Path(root, name).is_file() and name not in tracer.named:
        raise InputError("path", path, "no such file, and no attempt names it")
    file = tracer.top(name)
    record = tracer.producer(file)
    beside = tuple(
        tracer.unchanged(output.path, output.sha256, f"{record.id} wrote it")
        for output in record.outputs
        if output.path != name and Path(output.path).with_suffix("") == relative.with_suffix("")
    )
    step = tracer.step(record)
    return Trace(
        file=file,
        beside=beside,
        step=step,
        steps=tuple(tracer.steps.values()),
        plans=tuple(tracer.plans.values()),
        hashed=len(tracer.hashes),
    )


class _Tracer:
    """One walk over the records of a study; every file is hashed and every job checked once."""

    def __init__(self, root: Path, study: str, today: Today) -> None:
        self.root = root
        self.today = today
        records = read_records(study, root)
        self.wrote = producers(records)
        # The newest finished record of each path, whatever bytes it wrote.
        self.named = {
            output.path: (output.sha256, record)
            for record in records
            if record.status == "finished"
            for output in record.outputs
        }
        entries = read_manifest(study, root).files if Path(root, layout.manifest(study)).is_file() else ()
        self.listed = {entry.record: entry.record_sha256 for entry in entries}
        self.hashes: dict[str, str] = {}
        self.steps: dict[str, Step] = {}
        self.plans: dict[str, Document] = {}

    def step(self, record: Record) -> Step:
        """Check a job, then everything that it read."""
        if record.id not in self.steps:
            self.check_record(record)
            self.check_code(record)
            self.check_plan(record)
            self.check_decided(record)
            read: dict[str, list[File]] = defaultdict(list)
            sources = []
            for recorded in record.inputs:
                file = self.unchanged(recorded.path, recorded.sha256, f"{record.id} read it")
                if file.path.startswith("results/"):
                    read[self.producer(file).id].append(file)
                else:
                    sources.append(file)
            inputs = [(self.step(self.producer(files[0])), tuple(files)) for files in read.values()]
            self.steps[record.id] = Step(record, tuple(inputs), tuple(sources))
        return self.steps[record.id]

    def top(self, path: str) -> File:
        """The traced file; if no attempt wrote its bytes, it is held against the newest one that wrote it."""
        there = Path(self.root, path).is_file()
        if path in self.named and not (there and (path, self.hash(path)) in self.wrote):
            digest, newest = self.named[path]
            return self.unchanged(path, digest, f"{newest.id} wrote it")
        return self.unchanged(path, self.hash(path), "")

    def unchanged(self, path: str, expected: str, since: str) -> File:
        """A file that is there with the bytes it had."""
        if not Path(self.root, path).is_file():
            meaning = f"it is gone since {since}"
            raise TraceBreak(path, short(expected), "no file", meaning, RESTORE)
        if self.hash(path) != expected:
            meaning = f"its bytes changed since {since}"
            raise TraceBreak(path, short(expected), short(self.hash(path)), meaning, RESTORE)
        return File(path=path, sha256=expected, size=Path(self.root, path).stat().st_size)

    def producer(self, file: File) -> Record:
        """The newest finished attempt that wrote exactly these bytes."""
        record = self.wrote.get((file.path, file.sha256))
        if record is None:
            raise TraceBreak(
                file.path,
                "the record of a finished attempt",
                f"none for {short(file.sha256)}",
                "nothing says where these bytes come from",
                "fetch the attempt records with dvc pull, or delete the file and rebuild it with snakemake",
            )
        return record

    def check_record(self, record: Record) -> None:
        """The record has the bytes that the manifest lists; a newer one is not in it."""
        if record.id in self.listed:
            path = layout_path(record.study, record.id).as_posix()
            self.unchanged(path, self.listed[record.id], "the manifest listed it")

    def check_code(self, record: Record) -> None:
        """Today's closure has the same files, and each the same bytes."""
        for path, digest in record.code.files.items():
            if not Path(self.root, path).is_file():
                raise TraceBreak(
                    path, short(digest), "no file", f"code that {record.id} ran is gone", REBUILD
                )
            if self.hash(path) != digest:
                meaning = f"the code changed since {record.id} ran it"
                raise TraceBreak(path, short(digest), short(self.hash(path)), meaning, REBUILD)
        whole = sha256_of(record.code.files)
        if whole != record.code.sha256:
            meaning = "the hash of its list of code files is not that of the list"
            raise TraceBreak(record.id, short(record.code.sha256), short(whole), meaning, RESTORE)
        for path in code_closure(record.module, self.root / "src"):
            if path not in record.code.files:
                meaning = f"not part of the code when {record.id} ran"
                raise TraceBreak(path, "no file", "a file of the code", meaning, REBUILD)

    def check_plan(self, record: Record) -> None:
        """The plan means today what it meant then, and its lock has the same bytes."""
        plan = record.plan
        if record.lock is not None:
            self.unchanged(record.lock.path, record.lock.sha256, f"{record.id} ran under this lock")
        if plan is None or plan == self.plans.get(plan.path):
            return
        expected, meaning = (
            f"canonical {short(plan.sha256)}",
            f"the plan changed since {record.id} ran under it",
        )
        if not Path(self.root, plan.path).is_file():
            raise TraceBreak(plan.path, expected, "no file", meaning, REBUILD)
        try:
            found = sha256_of(strict_yaml.load(Path(self.root, plan.path)))
        except InputError as error:
            raise TraceBreak(plan.path, expected, f"a fault ({error})", meaning, REBUILD) from error
        if found != plan.sha256:
            raise TraceBreak(plan.path, expected, f"canonical {short(found)}", meaning, REBUILD)
        self.plans[plan.path] = plan

    def check_decided(self, record: Record) -> None:
        """Settings, runs with their seeds, and pins of packages are today what they were then."""
        where = study_path(record.study).as_posix()
        try:
            today = self.today(record)
        except InputError as error:
            meaning = "today's study does not give this job"
            raise TraceBreak(record.id, "its settings", f"a fault ({error})", meaning, REBUILD) from error
        for before, prefix, then, now in (
            ("the settings changed", f"{where}: ", record.settings, today.settings),
            ("today's plan gives other runs", "run ", _by_place(record.runs), _by_place(today.runs)),
            ("another version is pinned", "package ", record.pins, today.pins),
        ):
            if difference := _first_difference(then, now):
                name, expected, found = difference
                meaning = f"{before} since {record.id} ran"
                raise TraceBreak(f"{prefix}{name}", expected, found, meaning, REBUILD)

    def hash(self, path: str) -> str:
        """SHA-256 of a file of the repository, taken once."""
        if path not in self.hashes:
            self.hashes[path] = sha256(Path(self.root, path))
        return self.hashes[path]


def _by_place(runs: Iterable[Run]) -> dict[str, object]:
    """Name and seed of each run, by block, cell and seed index."""
    return {
        f"{run.block}/{run.cell} #{run.seed_index}": {"seed": run.seed, "run_id": run.run_id} for run in runs
    }


def _first_difference(then: Mapping[str, object], now: Mapping[str, object]) -> tuple[str, str, str] | None:
    """The first value that differs, with both values; None if none does."""
    before, after = dict(_flat(then)), dict(_flat(now))
    for name in sorted(before.keys() | after.keys()):
        if before.get(name, "absent") != after.get(name, "absent"):
            return name, before.get(name, "absent"), after.get(name, "absent")
    return None


def _flat(value: object, name: str = "") -> Iterator[tuple[str, str]]:
    """Nested values as dotted names with canonical JSON values."""
    if isinstance(value, Mapping) and (value or not name):
        for key, item in value.items():
            yield from _flat(item, f"{name}.{key}" if name else str(key))
    else:
        yield name, canonical_json(value).decode()


def short(digest: str) -> str:
    """Enough of a hash to tell files apart on a line."""
    return digest[:12]
