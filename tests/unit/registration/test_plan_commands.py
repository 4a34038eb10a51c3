"""The commands of `gradnoise plan`, from a plan that is not locked to a logged deviation."""

import json
import shutil
from pathlib import Path

import pytest
from tests.unit.registration import conftest as made
from tests.unit.registration.conftest import PLAN, commit, edit
from typer.testing import CliRunner

import gradnoise
from gradnoise.base.errors import InputError
from gradnoise.base.files import sha256
from gradnoise.cli_plan import app
from gradnoise.provenance.audit.registration import MODULES
from gradnoise.registration import read_deviations, read_lock
from gradnoise.registration.locking import facts
from gradnoise.registration.plan import Plan


def run(*arguments: str) -> str:
    """What a command prints; whatever it raises."""
    done = CliRunner().invoke(app, list(arguments), catch_exceptions=False, standalone_mode=False)
    assert isinstance(done.output, str)
    return done.output


@pytest.fixture
def quick_to_simulate(plan: Plan) -> None:
    """The repository with all of the code, and a plan that asks for few simulations."""
    source = Path(gradnoise.__file__).parent
    ignore = shutil.ignore_patterns("__pycache__")
    shutil.copytree(source, "src/gradnoise", ignore=ignore, dirs_exist_ok=True)
    edit(PLAN, "  simulations: 200\n", "  simulations: 2\n")
    commit("Fewer")


def test_lock_then_deviate(quick_to_simulate: None) -> None:
    said = run("lock", "--study", "quick", "--beacon", "round 4711")
    locked = read_lock(PLAN)
    assert f"plan.lock.json: {len(locked.runs)} runs, locked at {locked.utc}" in said
    assert locked.dry_run.simulations == 2
    assert {reached.hypothesis for reached in locked.reachability} == {"H1", "H3", "H4"}
    assert "src/gradnoise/analysis/decisions.py" in locked.code["analysis"]
    # All of it, not only where it begins.
    audit = {path.as_posix() for path in Path("src/gradnoise/provenance/audit").glob("*.py")}
    assert audit <= set(locked.code["audit"])
    commit("Lock")

    about = ("--reason", "error-in-plan", "--evidence", "evidence.md", "--effect", "none")
    said = run("deviate", "--study", "quick", "--pointer", "/matching/target", "--actual", "0.06", *about)
    assert "D1, discovered before an outcome could be seen" in said
    # What a lock froze and is otherwise now need not be typed.
    edit("src/gradnoise/analysis/verdicts.py", "From tests to verdicts", "From tests to words")
    with pytest.raises(InputError, match=r"verdicts\.py: is not the code that runs"):
        facts(PLAN, MODULES)
    edit("src/gradnoise/analysis/verdicts.py", "From tests to words", "From tests to verdicts")
    Path("requirements.lock").write_text("numpy==2.4.7\n")
    where = ("--document", "lock", "--pointer", "/requirements_sha256")
    run("deviate", "--study", "quick", *where, *about)
    first, second = read_deviations(PLAN)
    assert (first.actual, second.actual) == (0.06, sha256("requirements.lock"))
    for given in (("--actual", "0,06"), ()):
        with pytest.raises(InputError, match="--actual"):
            run("deviate", "--study", "quick", "--pointer", "/matching/target", *given, *about)


def test_nothing_is_simulated_for_a_plan_that_could_not_be_locked(
    quick_to_simulate: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gradnoise.analysis.rehearse.dry_run", None)
    made.write_attempt("train", "finished")
    with pytest.raises(InputError, match="is an outcome of the study"):
        run("lock", "--study", "quick")


def test_rehearse_prints_one_truth_or_the_rates_of_all(quick_to_simulate: None) -> None:
    said = run("rehearse", "--study", "quick", "--truth", "rise", "--number", "1")
    assert "SIMULATED, not measured: truth rise, simulation 1" in said
    assert "icl-slope" in said
    assert json.loads(Path("logs/rehearsal-quick-rise/results.json").read_bytes())["label"] == "SIMULATED"
    assert not Path("results/quick/analysis").exists()
    rates = run("rehearse", "--study", "quick")
    assert "2 simulated studies of each truth" in rates
    assert rates.count("an error there") == 6


def test_cost_counts_runs_sequences_and_the_time_so_far(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gradnoise.provenance.records.read_records", lambda study: RECORDS)
    rows = {
        line.split("│")[1].strip(): line.split("│")[2:-1]
        for line in run("cost", "--study", "quick").split("\n")
        if "│" in line
    }
    race = [cell.strip() for cell in rows["race"]]
    # 6 cells x 5 seeds; each run the trunk's 16,384 and half of every branch's trunk again.
    branches = {16: 1024, 64: 4096, 256: 16384}
    sequences = sum(
        16384 + sum(at // 2 for at in {2048, 6144, 16384, branches[batch]}) for batch in (16, 64, 256)
    )
    assert race == ["6", "5", "30", f"{2 * 5 * sequences:,}", "3.50"]
    assert [cell.strip() for cell in rows["text"]][-1] == "–"
    assert rows["all"][2].strip() == "46"


class Attempt:
    def __init__(self, phase: str, name: str, cpu_seconds: float | None) -> None:
        self.phase, self.name, self.cpu_seconds = phase, name, cpu_seconds


RECORDS = [
    Attempt("train", "race/b016-lr0.002/s00-04", 1.5),
    Attempt("train", "race/b016-lr0.002/s00-04", 2.0),
    Attempt("train", "race/b064-lr0.002/s00-04", None),
    Attempt("analyse", "analyse", 9.0),
]


def test_timestamp_says_none_or_why_not(plan: Plan) -> None:
    assert run("timestamp", "--study", "quick").startswith("none:")
    with pytest.raises(InputError, match=r"plan\.lock\.json: missing"):
        run("timestamp", "--study", "quick", "--request")
    for name in ("plan.lock.tsr", "plan.lock.json"):
        Path(f"preregistration/{name}").write_text("{}")
    done = CliRunner().invoke(app, ["timestamp", "--study", "quick"])
    assert (done.exit_code, done.output) == (1, "not verified: preregistration/plan.lock.pem: missing\n")
    assert run("timestamp", "--study", "quick", "--request").strip() == "preregistration/plan.lock.tsq"


def test_render_writes_what_is_generated(plan: Plan) -> None:
    said = run("render").split()
    assert said == [
        "workflow/schemas/plan.schema.json",
        "docs/plan-reference.md",
        "preregistration/README.md",
    ]
    assert all(Path(path).stat().st_size > 1000 for path in said)


@pytest.mark.parametrize("command", ["lock", "rehearse", "deviate", "cost", "render", "timestamp"])
def test_every_command_shows_an_example(command: str) -> None:
    assert f"Example: gradnoise plan {command}" in run(command, "--help")
