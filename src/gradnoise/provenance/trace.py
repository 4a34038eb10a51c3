"""From a file of `results/` back to runs, seeds, settings, code and environment, checking every hash.

Offline, from results and attempt records alone. A trace ends well only if today's files are, byte for byte,
those that were recorded all the way down; otherwise the first break is raised.
"""

import os
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from gradnoise.base import strict_yaml
from gradnoise.base.errors import InputError
from gradnoise.base.files import canonical_json, sha256, sha256_of
from gradnoise.base.study import study_path
from gradnoise.provenance.closure import code_closure
from gradnoise.provenance.records import LOCK, Document, File, Record, producers, read_records

# What would decide a recorded job today, beyond its inputs; None: the whole study configuration decides.
CurrentSettings = Callable[[Record], dict[str, object] | None]

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

    `steps` is every job, each once; `documents` the configurations and plans that mean what they meant then;
    `settings` the number of jobs whose settings were recomputed; `hashed` the number of files hashed.
    """

    file: File
    step: Step
    steps: tuple[Step, ...]
    documents: tuple[Document, ...]
    settings: int
    hashed: int


def trace(path: str, root: Path | str = ".", current_settings: CurrentSettings | None = None) -> Trace:
    """Trace one file of a study.

    For the file, and then for every input of the job behind it, and so on down: its bytes are those that the
    reading job recorded, and a finished attempt wrote exactly these bytes (of several, the newest counts).
    For every job: its code closure has the same files with the same bytes; its settings are what
    `current_settings(record)` gives today, or, where that gives None, its configuration has the same
    canonical hash; so has its plan; and the lock file of the environment has the same bytes.

    `root` is the repository. Raises `InputError` for a path outside `results/` or one that neither exists nor
    is recorded, and `TraceBreak` for the first thing that differs.
    """
    relative = Path(os.path.relpath(Path(root, path), root))
    parts = relative.parts
    if len(parts) < 3 or parts[0] != "results":
        raise InputError("path", path, "give a file of a study, such as results/quick/analysis/results.json")
    tracer = _Tracer(Path(root), parts[1], current_settings)
    name = relative.as_posix()
    if not Path(root, name).is_file() and name not in tracer.named:
        raise InputError("path", path, "no such file, and no attempt names it")
    file = tracer.top(name)
    step = tracer.step(tracer.producer(file))
    return Trace(
        file=file,
        step=step,
        steps=tuple(tracer.steps.values()),
        documents=tuple(tracer.documents.values()),
        settings=tracer.settings,
        hashed=len(tracer.hashes),
    )


class _Tracer:
    """One walk over the records of a study; every file is hashed and every job checked once."""

    def __init__(self, root: Path, study: str, current_settings: CurrentSettings | None) -> None:
        self.root = root
        self.current_settings = current_settings
        records = read_records(study, root)
        self.wrote = producers(records)
        # The newest finished record of each path, whatever bytes it wrote.
        self.named = {
            output.path: (output.sha256, record)
            for record in records
            if record.status == "finished"
            for output in record.outputs
        }
        self.hashes: dict[str, str] = {}
        self.steps: dict[str, Step] = {}
        self.documents: dict[str, Document] = {}
        self.settings = 0

    def step(self, record: Record) -> Step:
        """Check a job, then everything that it read."""
        if record.id not in self.steps:
            self.check_code(record)
            self.check_decisions(record)
            self.check_lock(record)
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

    def check_decisions(self, record: Record) -> None:
        """Settings or configuration, and the plan, decide today what they decided then."""
        where = record.config.path if record.config else study_path(record.study).as_posix()
        try:
            settings = self.current_settings(record) if self.current_settings else None
        except InputError as error:
            meaning = f"{record.id} cannot be decided by today's settings"
            raise TraceBreak(where, "its settings", str(error), meaning, REBUILD) from error
        if settings is None:
            self.check_document(record, record.config, "configuration")
        else:
            self.settings += 1
            if difference := _first_difference(record.settings, settings):
                setting, then, now = difference
                meaning = f"the settings changed since {record.id} ran"
                raise TraceBreak(f"{where}: {setting}", then, now, meaning, REBUILD)
        self.check_document(record, record.plan, "plan")

    def check_document(self, record: Record, document: Document | None, what: str) -> None:
        """A configuration or plan means today what it meant then."""
        if document is None or document == self.documents.get(document.path):
            return
        meaning = f"the {what} changed since {record.id} ran under it"
        if not Path(self.root, document.path).is_file():
            raise TraceBreak(document.path, short(document.sha256), "no file", meaning, REBUILD)
        found = sha256_of(strict_yaml.load(Path(self.root, document.path)))
        if found != document.sha256:
            expected = f"canonical {short(document.sha256)}"
            raise TraceBreak(document.path, expected, f"canonical {short(found)}", meaning, REBUILD)
        self.documents[document.path] = document

    def check_lock(self, record: Record) -> None:
        """The environment's lock file has the same bytes."""
        expected = record.environment.lock_sha256
        found = self.hash(LOCK) if Path(self.root, LOCK).is_file() else None
        if found != expected:
            meaning = f"the locked environment changed since {record.id} ran in it"
            raise TraceBreak(LOCK, short(expected), short(found) if found else "no file", meaning, REBUILD)

    def hash(self, path: str) -> str:
        """SHA-256 of a file of the repository, taken once."""
        if path not in self.hashes:
            self.hashes[path] = sha256(Path(self.root, path))
        return self.hashes[path]


def _first_difference(then: dict[str, object], now: dict[str, object]) -> tuple[str, str, str] | None:
    """The first setting that differs, with both values; None if none does."""
    before, after = dict(_flat(then)), dict(_flat(now))
    for name in sorted(before.keys() | after.keys()):
        if before.get(name, "absent") != after.get(name, "absent"):
            return name, before.get(name, "absent"), after.get(name, "absent")
    return None


def _flat(value: object, name: str = "") -> Iterator[tuple[str, str]]:
    """Settings as dotted names with canonical JSON values."""
    if isinstance(value, dict) and value:
        for key, item in value.items():
            yield from _flat(item, f"{name}.{key}" if name else str(key))
    else:
        yield name, canonical_json(value).decode()


def short(digest: str) -> str:
    """Enough of a hash to tell files apart on a line."""
    return digest[:12]
