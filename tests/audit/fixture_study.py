"""A registered study of seconds, with an honest history: what the audit's tests attack copies of."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from gradnoise import cli
from gradnoise.analysis.rehearse import dry_run, reachability
from gradnoise.base import layout
from gradnoise.base.files import sha256
from gradnoise.base.study import load_study
from gradnoise.provenance.audit.registration import MODULES
from gradnoise.registration.deviations import deviate
from gradnoise.registration.locking import lock
from gradnoise.registration.plan import load_plan

ROOT = Path(__file__).parents[2]
PARTS = Path(__file__).parent / "fixture"
NAME = "fixture"
PLAN = "preregistration/plan.yaml"
PILOT = "preregistration/pilot/pilot.json"
CONFIG = f"config/{NAME}.yaml"
CELLS = ("b016-lr0.0015", "b032-lr0.0015", "b064-lr0.0015")
CHUNK = "s00-04"
# Everything that a study's repository needs and that is not the study's own.
SHARED = ("pyproject.toml", "requirements.lock", ".dvcignore", ".dvc/config")
PEOPLE = {
    **{f"GIT_{who}_NAME": "test" for who in ("AUTHOR", "COMMITTER")},
    **{f"GIT_{who}_EMAIL": "test@example.org" for who in ("AUTHOR", "COMMITTER")},
    "GIT_CONFIG_GLOBAL": os.devnull,
    "GIT_CONFIG_NOSYSTEM": "1",
}


@dataclass(frozen=True)
class Repository:
    """A Git repository with the study; commands run in it."""

    path: Path

    def git(self, *arguments: str, **env: str) -> str:
        return self.run("git", *arguments, **env)

    def run(self, *command: str, **env: str) -> str:
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("GIT_", "DVC_"))}
        done = subprocess.run(
            command, cwd=self.path, env=kept | PEOPLE | env, capture_output=True, text=True, timeout=120
        )
        assert done.returncode == 0, (command, done.stdout, done.stderr)
        return done.stdout.strip()

    def commit(self, message: str, **env: str) -> None:
        self.git("add", "--all")
        self.git("commit", "--quiet", "--allow-empty", "--message", message, **env)

    @contextlib.contextmanager
    def inside(self) -> Iterator[None]:
        """Work in the repository, as a command started there does."""
        with contextlib.chdir(self.path):
            yield

    def copy(self, path: Path) -> Repository:
        """The same files with the same times, and the same history."""
        shutil.copytree(self.path, path, symlinks=True)
        return Repository(path)

    def file(self, name: str) -> Path:
        return self.path / name

    def edit(self, name: str, old: str, new: str) -> None:
        """Replace text that a file holds."""
        text = self.file(name).read_text(encoding="utf-8")
        assert old in text, f"{name} does not hold {old!r}"
        self.file(name).write_text(text.replace(old, new), encoding="utf-8")


def build(path: Path) -> Repository:
    """Register the study, lock it, train it, and keep what came out: one commit a step."""
    repository = Repository(path)
    _found(repository)
    with repository.inside():
        cli.prepare(NAME)
        _lock()
        repository.commit("Lock")
        _deviate(repository)
        repository.commit("Deviation")
        _train()
        publish(repository)
    repository.commit("Results")
    return repository


def _found(repository: Repository) -> None:
    path = repository.path
    shutil.copytree(ROOT / "src", path / "src", ignore=shutil.ignore_patterns("__pycache__", "*.egg-info"))
    for name in SHARED:
        path.joinpath(name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / name, path / name)
    ignored = (ROOT / ".gitignore").read_text().replace("/results/quick/", f"/results/{NAME}/")
    stages = (ROOT / "dvc.yaml").read_text().replace("preregistration/rehearsal.yaml", PLAN)
    pilot = json.dumps({"runs": 4, "standard deviation of ICL between runs": 0.012}) + "\n"
    plan = (PARTS / "plan.yaml").read_text()
    for name, text in {
        ".gitignore": ignored,
        # Snakemake's metadata is no part of this study: nothing here was run by Snakemake.
        "dvc.yaml": stages.replace("      - .snakemake/metadata: {persist: true}\n", ""),
        "config/config.yaml": f"study: {NAME}\n",
        CONFIG: (PARTS / "study.yaml").read_text(),
        PILOT: pilot,
    }.items():
        path.joinpath(name).parent.mkdir(parents=True, exist_ok=True)
        path.joinpath(name).write_text(text)
    path.joinpath(PLAN).write_text(plan.replace("PILOT", sha256(path / PILOT)))
    repository.git("init", "--quiet", "--initial-branch", "main")
    repository.commit("Plan")


def _lock() -> None:
    plan, study = load_plan(PLAN), load_study(NAME)
    lock(PLAN, dry_run(plan, study), reachability(plan), modules=MODULES)


def _deviate(repository: Repository) -> None:
    """A slip in the plan that is found before there is any outcome."""
    evidence = "docs/slip.md"
    repository.file(evidence).parent.mkdir()
    repository.file(evidence).write_text("The slope at matched updates was meant to be tested one-sided.\n")
    effect = "None on any hypothesis: the test is only reported."
    deviate(PLAN, "/tests/3/alternative", "greater", reason="error-in-plan", evidence=evidence, effect=effect)


def _train() -> None:
    """Every training job; the first attempt at one of them is killed by the machine."""
    for block, cell, chunk in load_study(NAME).jobs():
        if cell == CELLS[1]:
            _failed_attempt(block, cell, chunk)
        cli.train(NAME, block, cell, chunk)


def _failed_attempt(block: str, cell: str, chunk: str) -> None:
    def work() -> None:
        raise MemoryError("out of memory")

    outputs = [layout.run(NAME, block, cell, chunk, table) for table in layout.RUN_TABLES]
    with contextlib.suppress(MemoryError):
        cli._record("train", NAME, [], outputs, work, name=f"{block}/{cell}/{chunk}", plan=PLAN)


def publish(repository: Repository) -> None:
    """All phases after training, the manifest, and DVC's hashes of everything."""
    for phase in (cli.measure, cli.analyse, cli.draw, cli.report):
        phase(NAME)
    cli.provenance(NAME)
    programs = os.pathsep.join([str(Path(sys.prefix, "bin")), os.environ["PATH"]])
    site = str(repository.path.parent / "dvc-site")
    repository.run("dvc", "commit", "--force", "--quiet", PATH=programs, DVC_SITE_CACHE_DIR=site)
