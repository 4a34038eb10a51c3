"""A copy of the repository whose published study takes seconds, and the tools that work on it."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from gradnoise.base import strict_yaml

ROOT = Path(__file__).parents[2]
NAME = "tiny"
RATE = "lr0.002"
RACE = [f"b{batch:03d}-{RATE}" for batch in (16, 32, 64)]
TEXT = f"b016-{RATE}"
# `snakemake` and its jobs, in the order of the DAG, on the published study.
JOBS = {
    "prepare_corpus": 1,
    "train_seeds": 4,
    "measure_exposure": 1,
    "analyse_plan": 1,
    "draw_figures": 1,
    "render_report": 1,
    "write_manifest": 1,
}

SETTINGS = {
    "plan": f"preregistration/{NAME}.yaml",
    "blocks": {
        "race": {
            "task": {
                **{"kind": "pair", "classes": 12, "features": 8, "labels": 4, "context_classes": 2},
                **{"copies": 2, "item_noise": 0.1, "in_context": 1.0},
            },
            "model": {"width": 8, "layers": 1, "heads": 1},
            "branches": {"sequences": [128, 256, 512], "updates": 8, "anneal": 0.5},
            "evaluation_sequences": 256,
            "noise": {"contributions": 4, "every_sequences": 128},
            "seeds": 5,
            "grid": {"batch": [16, 32, 64], "learning_rate": [0.002]},
        },
        "text": {
            "task": {"kind": "text", "context": 16, "validation_plays": 4},
            "model": {"width": 8, "layers": 1, "heads": 1},
            "branches": {"sequences": [64], "anneal": 0.25},
            "evaluation_sequences": 64,
            "noise": {"contributions": 4, "every_sequences": 32},
            "seeds": 1,
            "grid": {"batch": [16], "learning_rate": [0.002]},
        },
    },
}


def published_study() -> str:
    """The study that the real repository publishes."""
    return str(strict_yaml.load(ROOT / "config/config.yaml")["study"])


def published_plan() -> str:
    """Its plan."""
    return str(strict_yaml.load(ROOT / f"config/{published_study()}.yaml")["plan"])


def holds(folder: str, path: str) -> bool:
    """Whether a path is the folder or lies in it."""
    return path == folder or path.startswith(f"{folder}/")


def no_network() -> tuple[str, ...]:
    """The prefix that runs a command without any network; empty where the host does not allow that."""
    prefix = ("unshare", "--net", "--map-root-user")
    allowed = (
        shutil.which("unshare") and subprocess.run([*prefix, "true"], capture_output=True).returncode == 0
    )
    return prefix if allowed else ()


# The next best: every request goes to a proxy that is not there (port 9 is closed).
DEAD_PROXY = {f"{kind}_proxy": "http://127.0.0.1:9" for kind in ("http", "https", "all")}


class Result:
    """What a command said."""

    def __init__(self, command: list[str], status: int, out: str, err: str) -> None:
        self.command, self.status, self.out, self.err = command, status, out, err

    @property
    def text(self) -> str:
        return self.out + self.err

    @property
    def jobs(self) -> dict[str, int]:
        """Snakemake's counts of jobs by rule, without the targets that do nothing."""
        table = re.search(r"^job +count\n[- ]+\n(.*?)^total", self.text, re.DOTALL | re.MULTILINE)
        rows = [line.rsplit(maxsplit=1) for line in table[1].splitlines()] if table else []
        return {rule: int(count) for rule, count in rows if rule in JOBS}

    def __repr__(self) -> str:
        return f"{' '.join(self.command)} -> {self.status}\n{self.out}\n{self.err}"


class Project:
    """A working copy; every command runs in it with its own sources, caches and Git identity."""

    def __init__(self, path: Path, scratch: Path, prefix: tuple[str, ...] = ()) -> None:
        self.path, self.scratch, self.prefix = path, scratch, prefix
        programs = os.pathsep.join([str(Path(sys.prefix, "bin")), os.environ["PATH"]])
        kept = {
            k: v for k, v in os.environ.items() if not k.startswith(("GIT_", "SNAKEMAKE_", "DVC_", "MAKE"))
        }
        self.env = {
            **kept,
            "PATH": programs,
            "PYTHONPATH": str(path / "src"),
            "OMP_NUM_THREADS": "1",
            "DVC_SITE_CACHE_DIR": str(scratch / "dvc-site"),
            "GIT_CONFIG_GLOBAL": os.devnull,
            "GIT_CONFIG_NOSYSTEM": "1",
            **{f"GIT_{who}_NAME": "test" for who in ("AUTHOR", "COMMITTER")},
            **{f"GIT_{who}_EMAIL": "test@example.org" for who in ("AUTHOR", "COMMITTER")},
            "TERM": "dumb",
        }

    def copy(self, path: Path) -> Project:
        """Another working copy with the same files, the same Git history and the same times."""
        subprocess.run(["cp", "-a", str(self.path), str(path)], check=True)
        return Project(path, self.scratch)

    def clone(self, path: Path, revision: str = "HEAD") -> Project:
        """A fresh `git clone`: what somebody else gets."""
        self.git("clone", "--quiet", "--no-local", str(self.path), str(path))
        other = Project(path, self.scratch)
        if revision != "HEAD":
            other.git("checkout", "--quiet", revision)
        return other

    def offline(self) -> Project:
        """The same working copy without any network, or at least with no way to a web server."""
        other = Project(self.path, self.scratch, no_network())
        if not other.prefix:
            other.env |= DEAD_PROXY | {"no_proxy": ""}
        return other

    def try_run(self, *command: str, timeout: float = 300, **env: str) -> Result:
        done = subprocess.run(
            [*self.prefix, *command],
            cwd=self.path,
            env=self.env | env,
            capture_output=True,
            text=True,
            timeout=timeout,
        )
        return Result(list(command), done.returncode, done.stdout, done.stderr)

    def run(self, *command: str, **env: str) -> Result:
        result = self.try_run(*command, **env)
        assert result.status == 0, result
        return result

    def git(self, *arguments: str) -> Result:
        return self.run("git", *arguments)

    def dvc(self, *arguments: str) -> Result:
        return self.run("dvc", *arguments)

    def snakemake(self, *arguments: str) -> Result:
        return self.run("snakemake", *arguments)

    def plan(self, *arguments: str) -> Result:
        """What `snakemake` would do; `.jobs` of the answer counts it."""
        return self.snakemake("--dry-run", *arguments)

    def make(self, *arguments: str) -> Result:
        """`make` in the environment that is there already: it must not build another one."""
        return self.try_run("make", "-o", ".venv/installed", *arguments)

    def commit(self, message: str) -> None:
        """Keep what was built, as `make publish` does."""
        self.dvc("commit", "--force", "--quiet")
        self.dvc("push", "--quiet")
        self.git("add", "--all")
        self.git("commit", "--quiet", "--message", message)

    def edit(self, file: str, change: Callable[[str], str]) -> None:
        path = self.path / file
        before = path.read_text()
        after = change(before)
        assert after != before, f"the edit does not change {file}"
        path.write_text(after)

    def settings(self, change: Callable[[dict], None], study: str = NAME) -> None:
        """Change the settings of a study."""

        def changed(text: str) -> str:
            value = json.loads(text)
            change(value)
            return json.dumps(value, indent=1)

        self.edit(f"config/{study}.yaml", changed)

    def science(self, study: str = NAME) -> dict[str, bytes]:
        """Every result but its provenance, by path."""
        folder = self.path / "results" / study
        files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != ".gitignore")
        return {
            str(path.relative_to(self.path)): path.read_bytes()
            for path in files
            if path.relative_to(folder).parts[0] != "provenance"
        }

    def assert_nothing_to_do(self) -> None:
        answer = self.plan()
        assert "Nothing to be done" in answer.text, answer

    def assert_fresh(self) -> None:
        """Snakemake has nothing to do and DVC sees no change."""
        self.assert_nothing_to_do()
        status = self.dvc("status")
        assert "up to date" in status.text, status


def make_tiny(path: Path, scratch: Path) -> Project:
    """Copy the repository's files and publish study `tiny` in place of the real one; nothing is built."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        check=True,
        text=True,
    )
    for name in filter(None, listed.stdout.split("\0")):
        if name.startswith(("dvc-store/", "results/")) or name == "dvc.lock" or not (ROOT / name).is_file():
            continue
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / name, path / name)
    project = Project(path, scratch)
    real, real_plan = published_study(), published_plan()
    project.edit("config/config.yaml", lambda text: text.replace(f"study: {real}", f"study: {NAME}"))
    project.edit("dvc.yaml", lambda text: text.replace(real_plan, f"preregistration/{NAME}.yaml"))
    project.edit(".gitignore", lambda text: text.replace(f"results/{real}/", f"results/{NAME}/"))
    (path / f"config/{NAME}.yaml").write_text(json.dumps(SETTINGS, indent=1))
    (path / f"preregistration/{NAME}.yaml").write_text(json.dumps(tiny_plan(), indent=1))
    project.git("init", "--quiet", "--initial-branch", "main")
    project.git("add", "--all")
    project.git("commit", "--quiet", "--message", "Start")
    return project


def tiny_plan() -> dict[str, object]:
    """The rehearsal's plan over the arms of `tiny`. JSON is YAML."""
    plan: dict = strict_yaml.load(ROOT / "preregistration/rehearsal.yaml")
    plan["study"] |= {"id": NAME, "config": f"config/{NAME}.yaml"}
    plan["matching"]["target"] = 1.38
    for test in plan["tests"]:
        if test["kind"] == "trend":
            test |= {"levels": [[cell] for cell in reversed(RACE)], "draws": 999}
        if test["kind"] == "tost":
            test["arms"] = [RACE[0], RACE[-1]]
        if test["kind"] == "contrast":
            test |= {"first": [RACE[0]], "second": [RACE[-1]]}
        if test["kind"] == "anova":
            test["factors"] = ["batch"]
    for truth in plan["power"]["truths"]:
        if "shifts" in truth:
            truth["shifts"] = {"icl": {RACE[0]: 0.05}}
    plan["descriptive"]["band_trials"] = 100
    return plan


def stop(process: subprocess.Popen[str]) -> None:
    """End a process group that a test started."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
