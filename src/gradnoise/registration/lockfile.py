"""The lock of a registered plan as a file: its typed form, where it lies, and how it is read."""

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from gradnoise.base.errors import InputError
from gradnoise.base.files import read_json
from gradnoise.base.study import Strict, validated

Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


class Bytes(Strict):
    """A file of the registration by its bytes, and by the canonical JSON of what it says."""

    path: str
    sha256: Sha256
    canonical_sha256: Sha256


class LockedRun(Strict):
    """A run that the plan asks for: its name, its place in the design, and its seed."""

    run_id: str
    block: str
    cell: str
    seed_index: int
    seed: int


class Rate(Strict):
    """How often simulated studies of one truth came to a verdict on a hypothesis.

    `wrong`: the verdict would be an error there, so the rate is a type-I error. `stderr` is the Monte-Carlo
    standard error sqrt(r (1 - r) / n), at the bound rather than at r where the rate is held against it.
    """

    truth: str
    hypothesis: str
    verdict: Literal["met", "not_met"]
    rate: float
    stderr: float
    wrong: bool


class DryRun(Strict):
    """The whole analysis on simulated runs: rates of verdicts, and every verdict of every simulation.

    `verdicts`: per truth and hypothesis a string with one letter a simulation: m (met), n (not met) or
    u (undecided), so that any of them can be replayed.
    """

    simulations: int
    rates: tuple[Rate, ...]
    verdicts: dict[str, dict[str, str]]


class Reached(Strict):
    """Verdicts of a hypothesis over a grid of synthetic readings and p values; `both` at once must be 0."""

    hypothesis: str
    met: int
    not_met: int
    undecided: int
    both: int


class LockCommit(Strict):
    """The commit and tree in which the plan was locked."""

    sha: str
    tree: str


class Lock(Strict):
    """`plan.lock.json`. `data`: logical digests of the prepared evaluation data by path."""

    format: Literal[1] = 1
    plan: Bytes
    config: Bytes
    schema_sha256: Sha256
    code: dict[Literal["analysis", "audit"], dict[str, Sha256]]
    requirements_sha256: Sha256
    beacon: str
    runs: tuple[LockedRun, ...]
    runs_sha256: Sha256
    data: dict[str, Sha256]
    dry_run: DryRun
    reachability: tuple[Reached, ...]
    commit: LockCommit
    utc: str


def lock_path(plan: Path | str) -> Path:
    """Where the lock of a plan lies: `plan.lock.json` beside `plan.yaml`."""
    return Path(plan).with_suffix(".lock.json")


def deviations_path(plan: Path | str) -> Path:
    """Where the log of a plan lies: `deviations.jsonl` beside it."""
    return Path(plan).with_name("deviations.jsonl")


def read_lock(plan: Path | str) -> Lock:
    """The lock of a plan; `InputError` where there is none or it is damaged."""
    path = lock_path(plan)
    if not path.is_file():
        raise InputError(str(path), "missing", "a registered plan needs its lock: gradnoise plan lock")
    return validated(Lock, read_json(path), str(path))


def read_beacon(plan: Path | str) -> str:
    """The public value of the plan's lock; none while there is no lock."""
    return read_lock(plan).beacon if lock_path(plan).is_file() else ""
