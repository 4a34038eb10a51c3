"""Both profiles: the laptop's is found by itself, and `--profile slurm` is taken literally."""

import json
import os
import shutil
import sys
from pathlib import Path

import pytest
from tests.workflow import stub_slurm
from tests.workflow.project import NAME, ROOT, Project

from gradnoise.base import layout

READ = """
import json, sys
from snakemake.cli import parse_args
_, args = parse_args(sys.argv[1:])
names = ["executor", "cores", "jobs", "max_checksum_file_size", "rerun_incomplete"]
print(json.dumps({name: str(getattr(args, name)) for name in names}))
"""


def settings(*arguments: str, **env: str) -> dict[str, str]:
    """What Snakemake understands, asked in a process of its own: the laptop's profile reads sys.argv."""
    project = Project(ROOT, Path("unused"))
    return json.loads(project.run(sys.executable, "-c", READ, *arguments, **env).out)


@pytest.fixture(scope="module")
def laptop() -> dict[str, str]:
    return settings()


def test_a_bare_snakemake_uses_all_cores_of_the_laptop(laptop: dict[str, str]) -> None:
    assert laptop["executor"] in ("None", "local")
    assert int(laptop["cores"]) == len(os.sched_getaffinity(0))


@pytest.mark.parametrize(
    ("arguments", "env"),
    [
        (["--profile", "slurm"], {}),
        (["--profile=slurm"], {}),
        (["--profile", "slurm", "--", "prepare"], {}),
        ([], {"SNAKEMAKE_PROFILE": "slurm"}),
    ],
)
def test_profile_slurm_submits_and_is_not_bound_to_the_cores_of_this_machine(
    arguments: list[str], env: dict[str, str], laptop: dict[str, str]
) -> None:
    cluster = settings(*arguments, **env)
    assert (cluster["executor"], cluster["cores"], cluster["jobs"]) == ("slurm", "None", "500")
    # What was recorded with checksums must be judged with checksums, on either machine.
    assert cluster["max_checksum_file_size"] == laptop["max_checksum_file_size"]
    assert cluster["rerun_incomplete"] == laptop["rerun_incomplete"] == "True"


class StubbedSlurm:
    """Slurm's commands, and what was submitted to them."""

    def __init__(self, folder: Path) -> None:
        self.state = folder / "state"
        self.state.mkdir(parents=True)
        self.programs = folder / "bin"
        self.programs.mkdir()
        for name in stub_slurm.COMMANDS:
            program = self.programs / name
            program.write_text(f'#!/bin/sh\nexec "{sys.executable}" "{stub_slurm.__file__}" {name} "$@"\n')
            program.chmod(0o755)

    def snakemake(self, project: Project, *arguments: str) -> None:
        # Asks for the jobs' state after 1 second, then after 11 more.
        quick = ["--slurm-init-seconds-before-status-checks", "1"]
        command = ["snakemake", "--profile", "slurm", *quick, "--latency-wait", "10", *arguments]
        path = f"{self.programs}:{project.env['PATH']}"
        self.result = project.run(*command, PATH=path, STUB_SLURM=str(self.state))

    def submitted(self) -> list[str]:
        """The arguments of the one job."""
        (job,) = self.state.glob("*.json")
        return json.loads(job.read_text())


@pytest.fixture
def slurm(tmp_path: Path) -> StubbedSlurm:
    return StubbedSlurm(tmp_path / "slurm")


@pytest.mark.slow
def test_profile_slurm_builds_a_phase(copy: Project, slurm: StubbedSlurm) -> None:
    plays = copy.path / layout.plays(NAME)
    before = plays.read_bytes()
    plays.unlink()
    slurm.snakemake(copy, "--", "prepare")
    assert plays.read_bytes() == before, slurm.result
    submitted = slurm.submitted()
    assert "rule_prepare_corpus" in submitted[submitted.index("--comment") + 1]
    assert "--cpus-per-task=1" in submitted
    # The job's record knows the cluster's number for it.
    (job,) = slurm.state.glob("*.json")
    records = (copy.path / layout.attempts(NAME)).glob("prepare-*.json")
    numbers = {json.loads(path.read_text())["environment"]["slurm_job_id"] for path in records}
    assert numbers == {None, job.stem}
    assert list((copy.path / "logs/slurm").rglob(f"{job.stem}.log")), "logs of good jobs are kept too"
    copy.assert_nothing_to_do()


@pytest.mark.slow
def test_threads_and_resources_reach_sbatch(tmp_path: Path, tiny: Project, slurm: StubbedSlurm) -> None:
    other = Project(tmp_path / "other", tiny.scratch)
    for folder in ("slurm", "profiles"):
        shutil.copytree(ROOT / folder, other.path / folder)
    rule = 'rule wide:\n    output: "done"\n    threads: 8\n    shell: "touch {output}"\n'
    (other.path / "Snakefile").write_text(rule)
    slurm.snakemake(other)
    assert (other.path / "done").is_file(), slurm.result
    submitted = slurm.submitted()
    assert "--cpus-per-task=8" in submitted
    assert "--requeue" in submitted
    given = {option: submitted[submitted.index(option) + 1] for option in ("-p", "-t", "--mem")}
    assert given == {"-p": "main", "-t": "30", "--mem": "1500"}
