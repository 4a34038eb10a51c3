"""Kills, strays, damage and misspelling: each is named in a line, and nothing half-written stays."""

import json
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TypeVar

import psutil
import pytest
from tests.workflow.project import NAME, RACE, TEXT, Project, stop

from gradnoise.base import layout

pytestmark = pytest.mark.slow
SETTINGS, PLAN = f"config/{NAME}.yaml", f"preregistration/{NAME}.yaml"
JOB = ("race", RACE[0], "s00-04")
TABLES = [layout.run(NAME, *JOB, table) for table in layout.RUN_TABLES]
T = TypeVar("T")


def wait_for(condition: Callable[[], T], what: str) -> T:
    """Wait at most a minute."""
    for _ in range(6000):
        if found := condition():
            return found
        time.sleep(0.01)
    raise AssertionError(f"waited in vain for {what}")


def training(process: subprocess.Popen[str]) -> psutil.Process | None:
    """The training job that a running snakemake started."""
    for child in psutil.Process(process.pid).children(recursive=True):
        with suppress(psutil.Error):  # it has just ended
            command = child.cmdline()
            if command[1:] and Path(command[1]).name == "gradnoise":
                return child
    return None


def statuses(project: Project) -> list[str]:
    records = sorted((project.path / layout.attempts(NAME)).glob(f"train-race-{RACE[0]}-*.json"))
    return [json.loads(path.read_text())["status"] for path in records]


def checkpoints(project: Project) -> set[tuple[str, int]]:
    """Checkpoints by name and time."""
    return {
        (path.name, path.stat().st_mtime_ns) for path in project.path.glob(f"scratch/{NAME}/*.safetensors")
    }


@contextmanager
def paused(project: Project) -> Iterator[tuple[subprocess.Popen[str], psutil.Process]]:
    """A snakemake that trains, its job halted after a checkpoint of its own; both end with the block."""
    earlier = checkpoints(project)
    # In a session of its own, so that it can be ended as a whole.
    run = subprocess.Popen(
        ["snakemake", "--", TABLES[0]],
        cwd=project.path,
        env=project.env,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        job = wait_for(lambda: training(run), "the training job")
        wait_for(lambda: checkpoints(project) - earlier, "a checkpoint")
        job.suspend()
        yield run, job
    finally:
        stop(run)


def assert_nothing_half_written(project: Project) -> None:
    assert [table for table in TABLES if (project.path / table).exists()] == []
    assert list((project.path / "results").rglob("*.partial")) == []


def test_a_killed_job_resumes_and_two_runs_never_mix(copy: Project) -> None:
    before = copy.science()
    for table in TABLES:
        (copy.path / table).unlink()

    with paused(copy) as (first, job):
        second = copy.try_run("snakemake")
        assert second.status != 0, second
        assert "LockException" in second.text, second
        assert "directory cannot be locked" in second.text.lower(), second
        # The job alone is killed, as by the kernel when memory runs out.
        job.kill()
        said, _ = first.communicate(timeout=60)
        assert first.returncode != 0, said
    assert_nothing_half_written(copy)
    assert statuses(copy) == ["finished", "started"]

    # Everything is killed at once, as by a power cut: the lock stays.
    with paused(copy):
        pass
    assert_nothing_half_written(copy)
    locked = copy.try_run("snakemake", "--", TABLES[0])
    assert locked.status != 0, locked
    assert "--unlock" in locked.text, locked
    copy.snakemake("--unlock")

    again = copy.snakemake("--", TABLES[0])
    assert again.jobs == {"train_seeds": 1}, again
    assert statuses(copy) == ["finished", "started", "started", "finished"]
    log = (copy.path / f"logs/{NAME}/train/race/{RACE[0]}/s00-04.log").read_text()
    sequences = int(log.split("finished after ")[1].split()[0].replace(",", ""))
    assert 0 < sequences < 5 * 960, f"resumed after a checkpoint: {log}"
    assert copy.science() == before
    assert checkpoints(copy) == set()
    copy.assert_nothing_to_do()


def test_a_stray_file_is_named_and_stops_the_study(shared: Project) -> None:
    stray = shared.path / f"results/{NAME}/runs/race/b999-lr0.002/s00-04.scores.parquet"
    stray.parent.mkdir()
    stray.write_bytes(b"")
    (shared.path / layout.manifest(NAME)).unlink()
    failed = shared.try_run("snakemake")
    assert failed.status != 0
    assert f"{stray.relative_to(shared.path)}: no rule writes it" in failed.text, failed
    assert not (shared.path / layout.manifest(NAME)).exists()
    stray.unlink()
    stray.parent.rmdir()
    mended = shared.snakemake()
    assert mended.jobs == {"write_manifest": 1}, mended


@pytest.mark.parametrize("command", [("make", f"QUICK={NAME}", "results"), ("dvc", "repro")], ids=" ".join)
def test_who_rebuilds_sees_which_cell_trains_and_why_a_job_failed(
    copy: Project, command: tuple[str, ...]
) -> None:
    for table in TABLES:
        (copy.path / table).unlink()
    broken = copy.path / layout.run(NAME, "text", TEXT, "s00-00", "scores")
    whole = broken.read_bytes()
    broken.write_bytes(whole[: len(whole) // 2])
    failed = copy.make(*command[1:]) if command[0] == "make" else copy.try_run(*command)
    assert failed.status != 0, failed
    assert f"train race/{RACE[0]}, seeds s00-04" in failed.text, failed
    said = [line for line in failed.text.splitlines() if line.startswith("gradnoise: ")]
    assert len(said) == 1, failed
    assert said[0].startswith(f"gradnoise: {broken.relative_to(copy.path)}: is not a whole Parquet file")


@pytest.mark.parametrize(
    ("phase", "file"),
    [
        ("measure", TABLES[0]),
        ("analyse", layout.scores(NAME)),
        ("draw", layout.analysis(NAME, "matched")),
        ("report", layout.results(NAME)),
        ("provenance", layout.figure(NAME, "figure-12-flow", "svg")),
    ],
)
def test_a_truncated_input_is_one_line(shared: Project, phase: str, file: str) -> None:
    path = shared.path / file
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    try:
        failed = shared.try_run("gradnoise", "run", phase, "--study", NAME)
    finally:
        path.write_bytes(whole)
    assert failed.status == 2, failed
    assert len(failed.err.splitlines()) == 1, failed
    assert failed.err.startswith(f"gradnoise: {file}: "), failed


@pytest.mark.parametrize(
    ("file", "old", "new", "said"),
    [
        (
            "config/tiny.yaml",
            '"width": 8',
            '"width": 8, "dropout": 2',
            "config/tiny.yaml: blocks.race.model.dropout: 2: no such setting: must be one of ['heads', ",
        ),
        ("config/tiny.yaml", '"layers": 1', '"layers": 0', "config/tiny.yaml: blocks.race.model.layers: 0:"),
        (
            "config/tiny.yaml",
            '"item_noise": 0.1',
            '"item_noise": .nan',
            "item_noise: nan: must be a finite number",
        ),
        ("preregistration/tiny.yaml", '"target": 1.38', '"target": -1', "matching.target: -1:"),
    ],
)
def test_a_fault_in_the_settings_is_named_before_anything_runs(
    shared: Project, edited: Callable, file: str, old: str, new: str, said: str
) -> None:
    with edited(file, lambda text: text.replace(old, new, 1)):
        failed = shared.try_run("snakemake", "--dry-run")
        command = shared.try_run("gradnoise", "run", "analyse", "--study", NAME)
    assert failed.status != 0, failed
    assert len([line for line in failed.text.splitlines() if said in line]) == 1, failed
    assert "Traceback" not in failed.text, failed
    assert command.status == 2, command
    assert len(command.err.splitlines()) == 1, command
    assert said in command.err, command


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (f"study: {NAME}\nstudies: 2\n", "studies: 2: no such setting: did you mean study?"),
        ("study: 5\n", "study: 5: Input should be a valid string"),
        ("study: ../tiny\n", "study: '../tiny': String should match"),
        ("{}\n", "study: missing: Field required"),
    ],
)
def test_a_fault_in_the_name_of_the_published_study_is_one_line(
    shared: Project, edited: Callable, text: str, said: str
) -> None:
    with edited("config/config.yaml", lambda _: text):
        failed = shared.try_run("snakemake", "--dry-run")
    assert failed.status != 0, failed
    assert f"\nconfig/config.yaml: {said}" in failed.text, failed
    assert "Traceback" not in failed.text, failed


def test_a_missing_file_is_rebuilt(shared: Project) -> None:
    report = shared.path / layout.report(NAME)
    before = report.read_bytes()
    report.unlink()
    rebuilt = shared.snakemake()
    assert rebuilt.jobs == {"render_report": 1, "write_manifest": 1}, rebuilt
    assert report.read_bytes() == before
