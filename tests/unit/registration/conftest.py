"""A small repository with a registered plan that can be locked: nothing trained, everything committed."""

import shutil
import subprocess
from pathlib import Path

import pytest

from gradnoise.base import layout, tables
from gradnoise.base.closure import code_closure
from gradnoise.base.files import canonical_json
from gradnoise.registration import lock
from gradnoise.registration.lockfile import DryRun, Rate, Reached
from gradnoise.registration.plan import Plan, load_plan

PLAN = "preregistration/plan.yaml"
# Small stand-ins for where the code of analysis and audit begins.
MODULES = {"analysis": "gradnoise.registration.seeds", "audit": "gradnoise.registration.timestamp"}


def git(*arguments: str) -> str:
    who = ("-c", "user.name=test", "-c", "user.email=test@example.org", "-c", "commit.gpgsign=false")
    done = subprocess.run(["git", *who, *arguments], capture_output=True, text=True, check=True)
    return done.stdout.strip()


def commit(message: str = "Change") -> str:
    """Commit everything that is not ignored."""
    git("add", "--all")
    git("commit", "--quiet", "--allow-empty", "--message", message)
    return git("rev-parse", "HEAD")


def edit(path: str, old: str, new: str) -> None:
    text = Path(path).read_text(encoding="utf-8")
    assert text.count(old) == 1, f"{old!r} is there {text.count(old)} times"
    Path(path).write_text(text.replace(old, new), encoding="utf-8")


def write_plays(extra: str = "") -> None:
    """The prepared corpus, of one play."""
    text = "To be, or not to be" + extra
    row = {"play": "Hamlet", "split": "train", "text": text, "characters": len(text), "sha256": "ab" * 32}
    columns = {name: [value] for name, value in row.items()}
    tables.write_table(layout.plays("quick"), tables.PLAYS, columns, "REGISTERED")


def write_attempt(phase: str, status: str) -> None:
    """What an attempt record says of itself, as far as the history of a study asks."""
    path = Path(layout.attempts("quick"), f"{phase}-{phase}-0001.json")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(canonical_json({"phase": phase, "status": status}))


def dry_run_of(plan: Plan, rate: float = 0.0) -> DryRun:
    """A dry run in which every verdict had the same rate."""
    rates = [
        Rate(
            truth=truth.id,
            hypothesis=hypothesis.id,
            verdict=verdict,
            rate=rate,
            stderr=(rate * (1 - rate) / plan.power.simulations) ** 0.5,
            wrong=hypothesis.id in getattr(truth.wrong, verdict),
        )
        for truth in plan.power.truths
        for hypothesis in plan.hypotheses
        for verdict in ("met", "not_met")
    ]
    names = [hypothesis.id for hypothesis in plan.hypotheses]
    letters = {truth.id: dict.fromkeys(names, "u" * plan.power.simulations) for truth in plan.power.truths}
    return DryRun(simulations=plan.power.simulations, rates=tuple(rates), verdicts=letters)


def reached_by(plan: Plan, **counts: int) -> tuple[Reached, ...]:
    """Every verdict reached, unless `counts` say otherwise."""
    given = {"met": 1, "not_met": 2, "undecided": 3, "both": 0} | counts
    return tuple(Reached(hypothesis=hypothesis.id, **given) for hypothesis in plan.hypotheses)


@pytest.fixture(scope="session")
def registered_once(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("registered")
    with pytest.MonkeyPatch.context() as patch:
        root = Path.cwd()
        patch.chdir(folder)
        code = {file for module in MODULES.values() for file in code_closure(module, root / "src")}
        for name in ("requirements.lock", "pyproject.toml", "config/quick.yaml", PLAN, *code):
            Path(name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(root / name.replace(PLAN, "preregistration/rehearsal.yaml"), name)
        edit(PLAN, "  kind: rehearsal\n", "  kind: registered\n")
        edit("config/quick.yaml", "preregistration/rehearsal.yaml", PLAN)
        Path("evidence.md").write_text("What happened.\n")
        Path(".gitignore").write_text("/results/\n")
        git("init", "--quiet", "--initial-branch", "main")
        commit("Start")
        write_plays()
    return folder


@pytest.fixture
def plan(registered_once: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Plan:
    """The registered plan; the working folder is a copy of the repository, to do with as a test likes."""
    return use(registered_once, tmp_path, monkeypatch)


@pytest.fixture(scope="session")
def locked_once(registered_once: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    with pytest.MonkeyPatch.context() as patch:
        plan = use(registered_once, tmp_path_factory.mktemp("locked"), patch)
        lock(PLAN, dry_run_of(plan), reached_by(plan), modules=MODULES)
        commit("Lock")
        return Path.cwd()


@pytest.fixture
def locked(locked_once: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Plan:
    """The same, locked and committed."""
    return use(locked_once, tmp_path, monkeypatch)


def use(repository: Path, folder: Path, patch: pytest.MonkeyPatch) -> Plan:
    """Work in a copy of the repository."""
    shutil.copytree(repository, folder / "repository")
    patch.chdir(folder / "repository")
    return load_plan(PLAN)
