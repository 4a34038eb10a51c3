"""The lock: what was fixed, and by which code, before there was anything to see."""

import math
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

from gradnoise.base import layout, strict_yaml
from gradnoise.base.closure import closure_hashes, code_closure
from gradnoise.base.digest import table_digest
from gradnoise.base.environment import LOCK
from gradnoise.base.errors import InputError
from gradnoise.base.files import sha256, sha256_of, write_json
from gradnoise.base.study import Study, TextTask, load_study
from gradnoise.registration.history import check_committed, head, outcome_seen
from gradnoise.registration.lockfile import Bytes, DryRun, Lock, LockedRun, Reached, lock_path, read_lock
from gradnoise.registration.plan import Plan, load_plan
from gradnoise.registration.reference import plan_schema
from gradnoise.registration.seeds import derive_seeds, run_id

# Where the code begins that carries out a plan, and the code that checks it.
Modules = Mapping[Literal["analysis", "audit"], str]

# A rate is held against its bound with this many standard errors to spare.
_ERRORS = 3


def lock(
    path: Path | str,
    dry_run: DryRun,
    reachability: Sequence[Reached],
    *,
    modules: Modules,
    beacon: str = "",
) -> Lock:
    """Lock the registered plan at `path`: write `plan.lock.json` beside it, and return what it says.

    `dry_run` and `reachability` come from `gradnoise.analysis.rehearse`, because this room knows no analysis;
    `modules` names where the code of analysis and audit begins; `beacon` is a public value that nobody could
    know when the plan was written, from which the seeds then follow too.

    Raises `InputError`, and writes nothing, where `check_ready` does; when a wrong verdict is more frequent
    than the family's alpha plus 3 Monte-Carlo standard errors; when a hypothesis cannot reach one of its
    verdicts, or reaches both; and when there is another lock already. The same lock stays as it is.
    """
    plan = check_ready(path, modules)
    _check_rates(plan, dry_run)
    _check_reached(plan, reachability)
    if beacon != beacon.strip() or not beacon.isprintable():
        raise InputError("beacon", repr(beacon), "must be one line without spaces at its ends")
    runs = planned_runs(plan, load_study(study_of(plan)), beacon)
    new = Lock(
        **facts(path, modules),
        beacon=beacon,
        runs=runs,
        runs_sha256=sha256_of([run.model_dump(mode="json") for run in runs]),
        dry_run=dry_run,
        reachability=tuple(reachability),
        commit=head(),
        utc=datetime.now(UTC).isoformat(timespec="seconds"),
    )
    if lock_path(path).is_file():
        return _same(path, new)
    write_json(lock_path(path), new.model_dump(mode="json"))
    return new


def check_ready(path: Path | str, modules: Modules) -> Plan:
    """The plan at `path`, if everything that a lock freezes is there and nothing has been seen.

    Raises `InputError` for a rehearsal; a plan, settings, pins, pilot file or code that HEAD does not hold as
    they are; a pilot file other than the plan's; code that runs from elsewhere; evaluation data that are not
    prepared; and any outcome of the study, in the work tree or in Git's history.
    """
    plan = load_plan(path)
    if plan.study.kind == "rehearsal":
        raise InputError(str(path), "is a rehearsal", "only a plan of kind registered is locked")
    for pilot in plan.study.pilot:
        if not Path(pilot.path).is_file() or sha256(pilot.path) != pilot.sha256:
            raise InputError(f"study.pilot: {pilot.path}", "is not the file of the plan", "mend its sha256")
    code = {file for module in modules.values() for file in code_closure(module)}
    files = {Path(path).as_posix(), plan.study.config, LOCK, *(pilot.path for pilot in plan.study.pilot)}
    check_committed(sorted(files | code))
    seen = outcome_seen(study_of(plan))
    if seen is not None:
        raise InputError(seen, "is an outcome of the study", "a plan is locked before there are any")
    facts(path, modules)
    return plan


def facts(path: Path | str, modules: Modules) -> dict[str, Any]:
    """What a lock says of files and code, as they are now: these fields of `Lock`."""
    plan = load_plan(path)
    study = study_of(plan)
    return {
        "plan": _bytes(Path(path).as_posix()),
        "config": _bytes(plan.study.config),
        "schema_sha256": sha256_of(plan_schema()),
        "code": {name: _code(module) for name, module in modules.items()},
        "requirements_sha256": sha256(LOCK),
        "data": {file: table_digest(file) for file in evaluation_data(study, load_study(study))},
    }


def planned_runs(plan: Plan, study: Study, beacon: str) -> tuple[LockedRun, ...]:
    """Every run that the plan asks for, in the order of blocks, cells and seeds."""
    key = plan.sha256 + beacon
    seeds = derive_seeds(key, max(block.seeds for block in study.blocks.values()))
    return tuple(
        LockedRun(
            run_id=run_id(key, name, cell.name, index),
            block=name,
            cell=cell.name,
            seed_index=index,
            seed=seeds[index],
        )
        for name, block in study.blocks.items()
        for cell in block.cells()
        for index in range(block.seeds)
    )


def evaluation_data(name: str, study: Study) -> list[str]:
    """Prepared files from which runs are scored; other tasks draw their evaluation from named streams."""
    text = any(isinstance(block.task, TextTask) for block in study.blocks.values())
    if text and not Path(layout.plays(name)).is_file():
        raise InputError(layout.plays(name), "missing", f"run gradnoise run prepare --study {name}")
    return [layout.plays(name)] if text else []


def study_of(plan: Plan) -> str:
    """Name of the plan's study: its settings are config/NAME.yaml."""
    return Path(plan.study.config).stem


def _bytes(path: str) -> Bytes:
    return Bytes(path=path, sha256=sha256(path), canonical_sha256=sha256_of(strict_yaml.load(path)))


def _code(module: str) -> dict[str, str]:
    """Hashes of the files behind a module, which must be the ones that run."""
    here = {path: sha256(path) for path in code_closure(module)}
    running = closure_hashes(module)
    for path in sorted(here | running):
        if here.get(path) != running.get(path):
            raise InputError(path, "is not the code that runs", "install this folder (make does it)")
    return here


def _check_rates(plan: Plan, dry_run: DryRun) -> None:
    """Refuse a dry run of another plan, and one whose wrong verdicts are too frequent."""
    asked = {
        (truth.id, hypothesis.id, verdict)
        for truth in plan.power.truths
        for hypothesis in plan.hypotheses
        for verdict in ("met", "not_met")
    }
    given = [(rate.truth, rate.hypothesis, rate.verdict) for rate in dry_run.rates]
    if set(given) != asked or len(given) != len(asked) or dry_run.simulations != plan.power.simulations:
        raise InputError("dry run", "is not of this plan", "simulate this plan's truths")
    alphas = {member: family.alpha for family in plan.families for member in family.members}
    for rate in dry_run.rates:
        alpha = alphas[rate.hypothesis]
        bound = alpha + _ERRORS * math.sqrt(alpha * (1 - alpha) / dry_run.simulations)
        if rate.wrong and rate.rate > bound:
            raise InputError(
                f"dry run: truth {rate.truth}, {rate.hypothesis} {rate.verdict}",
                f"wrong in {rate.rate:.3g} of {dry_run.simulations} simulations",
                f"at most {bound:.3g} may be (alpha {alpha:g} and {_ERRORS} standard errors): mend the rule",
            )


def _check_reached(plan: Plan, reachability: Sequence[Reached]) -> None:
    if [reached.hypothesis for reached in reachability] != [hypothesis.id for hypothesis in plan.hypotheses]:
        raise InputError("reachability", "is not of this plan", "find it for every hypothesis")
    for reached in reachability:
        if reached.both:
            raise InputError(reached.hypothesis, "can be met and not met at once", "mend its rule")
        for verdict in ("met", "not_met", "undecided"):
            if not getattr(reached, verdict):
                raise InputError(reached.hypothesis, f"can never be {verdict}", "mend its rule")


def _same(path: Path | str, new: Lock) -> Lock:
    """The lock that is there, if it says the same of all but the moment."""
    old = read_lock(path)
    now = new.model_copy(update={"commit": old.commit, "utc": old.utc})
    for name in Lock.model_fields:
        if getattr(old, name) != getattr(now, name):
            mend = "a lock is never overwritten: to lock anew, remove it by hand"
            raise InputError(str(lock_path(path)), f"{name} differs", mend)
    return old
