"""A lock freezes everything that decides, and is refused once there is anything to see."""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path

import pytest
from tests.unit.registration import conftest as made
from tests.unit.registration.conftest import MODULES, PLAN, commit, edit, git

from gradnoise.base.errors import InputError
from gradnoise.base.files import sha256_of
from gradnoise.base.strict_yaml import load
from gradnoise.base.study import load_study
from gradnoise.registration import derive_seeds, load_plan, lock, read_lock, run_id
from gradnoise.registration.lockfile import Lock, lock_path
from gradnoise.registration.plan import Plan

LOCK = Path("preregistration/plan.lock.json")


def lock_it(plan: Plan, beacon: str = "") -> Lock:
    return lock(PLAN, made.dry_run_of(plan), made.reached_by(plan), modules=MODULES, beacon=beacon)


def test_a_lock_holds_the_hashes_of_everything_that_decides(plan: Plan) -> None:
    found = lock_it(plan)
    assert read_lock(PLAN) == found
    assert found.plan.sha256 == hashlib.sha256(Path(PLAN).read_bytes()).hexdigest()
    assert found.plan.canonical_sha256 == plan.sha256 == sha256_of(load(PLAN))
    assert found.config.canonical_sha256 == sha256_of(load("config/quick.yaml"))
    assert set(found.data) == {"results/quick/data/plays.parquet"}
    seeds = "src/gradnoise/registration/seeds.py"
    assert found.code["analysis"][seeds] == hashlib.sha256(Path(seeds).read_bytes()).hexdigest()
    assert "src/gradnoise/registration/timestamp.py" in found.code["audit"]
    assert [found.commit.sha, found.commit.tree] == git("rev-parse", "HEAD", "HEAD^{tree}").split()


def test_the_run_list_is_every_planned_run_with_the_seed_that_training_will_use(plan: Plan) -> None:
    found = lock_it(plan)
    study = load_study("quick")
    assert len(found.runs) == sum(block.seeds * len(block.cells()) for block in study.blocks.values())
    assert len({run.run_id for run in found.runs}) == len(found.runs)
    seeds = derive_seeds(load_plan(PLAN).key, 5)
    for run in found.runs:
        assert run.seed == seeds[run.seed_index]
        assert run.run_id == run_id(plan.sha256, run.block, run.cell, run.seed_index)
    assert found.runs_sha256 == sha256_of(json.loads(LOCK.read_bytes())["runs"])


def test_a_public_value_moves_every_seed_and_the_plan_then_trains_with_it(plan: Plan) -> None:
    found = lock_it(plan, beacon="round 4711: 5f2c")
    assert load_plan(PLAN).key == plan.sha256 + "round 4711: 5f2c"
    assert found.runs[0].seed == derive_seeds(load_plan(PLAN).key, 1)[0]
    assert found.runs[0].seed != derive_seeds(plan.sha256, 1)[0]


def test_locking_again_changes_nothing_and_another_lock_is_refused(plan: Plan) -> None:
    first = lock_it(plan)
    before = LOCK.read_bytes()
    commit("Lock")
    assert lock_it(plan) == first
    edit(PLAN, "  target: 0.05 ", "  target: 0.06 ")
    commit()
    with pytest.raises(
        InputError, match=r"plan\.lock\.json: plan differs: .*to lock anew, remove it by hand"
    ):
        lock_it(load_plan(PLAN))
    with pytest.raises(InputError, match="differs"):
        lock_it(plan, beacon="another")
    assert LOCK.read_bytes() == before


def overlooked_edit() -> None:
    """An edit that `git status` is told not to see."""
    edit(PLAN, "    high: 0.05", "    high: 0.06")
    git("update-index", "--skip-worktree", PLAN)
    assert git("status", "--porcelain") == ""


def untracked_plan() -> None:
    git("rm", "--quiet", "--cached", PLAN)
    git("commit", "--quiet", "--message", "Forget the plan")


def result_of_the_past() -> None:
    """Results that were committed once and removed since."""
    figure = Path("results/quick/figures/figure.svg")
    figure.parent.mkdir(parents=True)
    figure.write_text("<svg/>")
    git("add", "--force", str(figure))
    commit("Publish")
    git("rm", "--quiet", str(figure))
    commit("Hide")


def runs_of_the_past() -> None:
    Path("dvc.lock").write_text("stages:\n  train:\n    outs:\n    - path: results/quick/runs\n")
    commit("Publish")
    Path("dvc.lock").unlink()
    commit("Hide")


def runs_on_another_branch() -> None:
    git("checkout", "--quiet", "-b", "pilot")
    runs_of_the_past()
    git("checkout", "--quiet", "main")


def pilot_is_not_the_plans() -> None:
    Path("preregistration/pilot").mkdir()
    Path("preregistration/pilot/rates.json").write_text("{}")
    where = "  prior_access: pilot\n"
    edit(PLAN, where, f"{where}  pilot: [{{path: preregistration/pilot/rates.json, sha256: {'ab' * 32}}}]\n")
    commit("Pilot")


def code_that_does_not_run() -> None:
    edit("src/gradnoise/registration/seeds.py", "so that nobody", "so that anybody")
    commit("Edit")


def edited_code() -> None:
    edit("src/gradnoise/registration/seeds.py", "so that nobody", "so that anybody")


REFUSED: dict[str, tuple[Callable[[], object], str]] = {
    "a rehearsal": (lambda: (edit(PLAN, "kind: registered", "kind: rehearsal"), commit()), "is a rehearsal"),
    "plan with an uncommitted edit": (
        lambda: edit(PLAN, "title: Rehearsal", "title: A"),
        "differs from HEAD",
    ),
    "an edit that Git overlooks": (overlooked_edit, "plan.yaml: is not what HEAD holds"),
    "a plan that is not tracked": (untracked_plan, "plan.yaml: is not what HEAD holds"),
    "edited code": (edited_code, "seeds.py: differs from HEAD"),
    "staged edit of another file": (
        lambda: edit("pyproject.toml", "0.1.0", "0.2.0"),
        "pyproject.toml: differs",
    ),
    "code that is not the code that runs": (code_that_does_not_run, "seeds.py: is not the code that runs"),
    "no prepared corpus": (
        lambda: Path("results/quick/data/plays.parquet").unlink(),
        "gradnoise run prepare",
    ),
    "a finished training job": (lambda: made.write_attempt("train", "finished"), "train-train-0001.json"),
    "a finished analysis": (lambda: made.write_attempt("analyse", "finished"), "is an outcome of the study"),
    "results that were published once": (result_of_the_past, "results/quick in commit"),
    "runs that were published once": (runs_of_the_past, "results/quick/runs in dvc.lock of commit"),
    "runs on another branch": (runs_on_another_branch, "results/quick/runs in dvc.lock of commit"),
    "other pilot files than the plan's": (pilot_is_not_the_plans, "rates.json: is not the file of the plan"),
    "no repository": (lambda: Path(".git").rename("gone"), "not a git repository"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_lock_is_refused_in_one_line_and_nothing_is_written(case: str, plan: Plan) -> None:
    spoil, named = REFUSED[case]
    spoil()
    with pytest.raises(InputError) as refusal:
        lock_it(plan)
    assert named in str(refusal.value)
    assert "\n" not in str(refusal.value)
    assert not LOCK.exists()


def test_what_shows_no_outcome_does_not_hinder_a_lock(plan: Plan) -> None:
    made.write_attempt("prepare", "finished")
    made.write_attempt("train", "failed")
    Path("notes.txt").write_text("not tracked")
    assert lock_it(plan).plan.canonical_sha256 == plan.sha256


@pytest.mark.parametrize(
    ("rate", "refused"),
    # 200 simulations at alpha .05: .05 + 3 sqrt(.05 x .95 / 200) = .0962
    [(0.095, False), (0.1, True)],
)
def test_a_rule_that_errs_too_often_is_refused(plan: Plan, rate: float, refused: bool) -> None:
    dry_run = made.dry_run_of(plan, rate)
    if not refused:
        assert lock(PLAN, dry_run, made.reached_by(plan), modules=MODULES).dry_run == dry_run
        return
    with pytest.raises(
        InputError, match=r"truth margin, H3 met: wrong in 0\.1 of 200 simulations: at most 0\.0962"
    ):
        lock(PLAN, dry_run, made.reached_by(plan), modules=MODULES)
    assert not lock_path(PLAN).exists()


def test_a_right_verdict_may_be_as_frequent_as_it_likes(plan: Plan) -> None:
    dry_run = made.dry_run_of(plan)
    power = [rate.model_copy(update={"rate": 1.0}) if not rate.wrong else rate for rate in dry_run.rates]
    asked = dry_run.model_copy(update={"rates": tuple(power)})
    assert lock(PLAN, asked, made.reached_by(plan), modules=MODULES).dry_run == asked


def test_a_dry_run_of_another_plan_is_refused(plan: Plan) -> None:
    whole = made.dry_run_of(plan)
    fewer = whole.model_copy(update={"simulations": 20})
    without = whole.model_copy(update={"rates": whole.rates[1:]})
    for dry_run in (fewer, without):
        with pytest.raises(InputError, match="dry run: is not of this plan"):
            lock(PLAN, dry_run, made.reached_by(plan), modules=MODULES)


@pytest.mark.parametrize(
    ("counts", "named"),
    [
        ({"met": 0}, "H1: can never be met"),
        ({"not_met": 0}, "H1: can never be not_met"),
        ({"undecided": 0}, "H1: can never be undecided"),
        ({"both": 1}, "H1: can be met and not met at once"),
    ],
)
def test_a_rule_that_cannot_speak_or_speaks_twice_is_refused(
    plan: Plan, counts: dict[str, int], named: str
) -> None:
    with pytest.raises(InputError, match=named):
        lock(PLAN, made.dry_run_of(plan), made.reached_by(plan, **counts), modules=MODULES)


def test_a_shallow_clone_cannot_tell_whether_there_were_results(
    plan: Plan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    commit("Another")
    git("clone", "--quiet", "--depth", "1", f"file://{Path.cwd()}", str(tmp_path / "shallow"))
    monkeypatch.chdir(tmp_path / "shallow")
    made.write_plays()
    with pytest.raises(InputError, match="shallow clone"):
        lock_it(plan)
