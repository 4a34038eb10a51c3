"""Checks that do it again: simulations of the dry run, and on request training jobs."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

from gradnoise import phases
from gradnoise.analysis import rehearse
from gradnoise.base import layout
from gradnoise.base.study import Inject, Nap, Reweight
from gradnoise.provenance import records
from gradnoise.provenance.audit.evidence import Evidence, PlannedRun, plain
from gradnoise.provenance.audit.findings import Breach, NotApplicable, NotAsked, check, settle
from gradnoise.provenance.audit.registration import needs_lock

if TYPE_CHECKING:
    from gradnoise.registration.lockfile import Lock, Rate

# A rate is held against its bound with this many standard errors to spare, as when the plan was locked.
_ERRORS = 3
_ROUNDING = 1e-12
_LETTERS = {"met": "m", "not_met": "n"}
# What a job needs to run elsewhere.
_SOURCES = ("src", "config", "preregistration", "pyproject.toml", "requirements.lock")

Job = tuple[str, str, str]


@check("A26", "the dry run gives its rates of wrong and right verdicts again", "serious")
def dry_run(evidence: Evidence) -> str:
    """Rates from the stored verdicts, type-I error against alpha, verdicts reachable, some replayed."""
    needs_lock(evidence)
    lock, plan = evidence.lock, evidence.plan
    faults = [*_rate_faults(evidence, lock), *_reach_faults(lock)]
    for truth in plan.power.truths:
        # One simulation of each truth, by the hash of the lock.
        drawn = hashlib.sha256(f"{evidence.sha256(evidence.lock_file)}/{truth.id}".encode()).hexdigest()
        number = int(drawn, 16) % lock.dry_run.simulations
        stored = {name: word[number] for name, word in lock.dry_run.verdicts[truth.id].items()}
        again = rehearse.replay(plan, evidence.study, truth, number)
        if again != stored:
            faults.append(f"simulation {number} of truth {truth.id} gives {again}, stored is {stored}")
    simulated = f"{lock.dry_run.simulations} simulations of {len(plan.power.truths)} truths"
    return settle(faults, f"{len(lock.dry_run.rates)} rates from {simulated}, one of each replayed")


def _rate_faults(evidence: Evidence, lock: Lock) -> Iterator[str]:
    """Rates that are not those of the stored verdicts, and wrong verdicts that are too frequent."""
    plan, dry = evidence.plan, lock.dry_run
    alphas = {member: family.alpha for family in plan.families for member in family.members}
    shown: dict[tuple[str, str, str], Rate] = {(r.truth, r.hypothesis, r.verdict): r for r in dry.rates}
    for truth, hypothesis in product(plan.power.truths, plan.hypotheses):
        letters = dry.verdicts.get(truth.id, {}).get(hypothesis.id, "")
        about = f"truth {truth.id}, {hypothesis.id}"
        if len(letters) != dry.simulations or dry.simulations != plan.power.simulations:
            yield f"{about}: {len(letters)} verdicts, {plan.power.simulations} planned"
            continue
        for verdict, letter in _LETTERS.items():
            rate, found = shown.get((truth.id, hypothesis.id, verdict)), letters.count(letter) / len(letters)
            wrong = hypothesis.id in getattr(truth.wrong, verdict)
            if rate is None or abs(rate.rate - found) > _ROUNDING or rate.wrong != wrong:
                yield f"{about}: {verdict} in {found:.3g} of the stored verdicts, not as told"
            alpha = alphas[hypothesis.id]
            if wrong and found > alpha + _ERRORS * (alpha * (1 - alpha) / len(letters)) ** 0.5:
                yield f"{about}: wrongly {verdict} in {found:.3g} of the simulations"


def _reach_faults(lock: Lock) -> Iterator[str]:
    """Hypotheses that cannot reach each verdict, or reach two at once."""
    for reached in lock.reachability:
        if reached.both or not (reached.met and reached.not_met and reached.undecided):
            yield f"{reached.hypothesis} cannot reach each of its verdicts, or reaches two at once"


@check("A27", "training jobs chosen by hash give the same tables again", "serious")
def trained_again(evidence: Evidence) -> str:
    """In a scratch copy of code and settings, so that no record is added here."""
    jobs = _chosen(evidence)[: evidence.spot_runs]
    faults, strange = [], []
    for job in jobs:
        with TemporaryDirectory() as folder:
            _train(evidence, job, Path(folder))
            paths = [layout.run(evidence.name, *job, table) for table in layout.RUN_TABLES]
            differ = [p for p in paths if Path(folder, p).read_bytes() != plain(p).read_bytes()]
            if differ and _machine(evidence, job) != _machine(evidence, job, folder):
                strange.append("/".join(job))
            else:
                faults += [f"{path} has other bytes when it is trained again" for path in differ]
    if strange and not faults:
        raise NotApplicable(f"{strange[0]} was trained on another kind of machine, whose bytes are its own")
    return settle(faults, f"{', '.join('/'.join(job) for job in jobs)}: the same tables, byte for byte")


def _chosen(evidence: Evidence) -> list[Job]:
    """Every job, in an order that nobody could know before the results: by the hash of manifest and name."""
    if evidence.spot_runs < 1:
        raise NotAsked("it trains again: ask with --spot-runs")
    final = evidence.sha256(layout.manifest(evidence.name))

    def order(job: Job) -> str:
        return hashlib.sha256("/".join([final, *job]).encode()).hexdigest()

    return sorted(evidence.study.jobs(), key=order)


def _train(evidence: Evidence, job: Job, folder: Path) -> None:
    """Train a job with a copy of this repository's code, settings and prepared data."""
    block, cell, seeds = job
    for source in _SOURCES:
        if Path(source).is_dir():
            shutil.copytree(source, folder / source, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copyfile(source, folder / source)
    for path in phases.corpus(evidence.name, evidence.study, block):
        folder.joinpath(path).parent.mkdir(parents=True)
        shutil.copyfile(plain(path), folder / path)
    command = [sys.executable, "-m", "gradnoise", "run", "train", "--study", evidence.name]
    command += ["--block", block, "--cell", cell, "--seeds", seeds]
    environment = os.environ | {"PYTHONPATH": str(folder / "src"), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise Breach(f"{'/'.join(job)} cannot be trained again: {done.stderr.strip().splitlines()[-1:]}")


def _machine(evidence: Evidence, job: Job, folder: str = ".") -> tuple[str | None, ...]:
    """The kind of machine on which a job was trained: by the record of its tables, or here."""
    if folder == ".":
        found = [
            r.environment for r in evidence.listed_records if r.phase == "train" and r.name == "/".join(job)
        ]
        return found[-1].processor, found[-1].cpu_capability, found[-1].gpu
    again = records.read_records(evidence.name, folder)[-1].environment
    return again.processor, again.cpu_capability, again.gpu


@check("A28", "the first updates of runs chosen by hash give the same losses again", "serious")
def started_again(evidence: Evidence) -> str:
    """Up to their first branch, of other jobs than A27 takes: the rolling hash of every update's loss."""
    order = _chosen(evidence)
    jobs = [job for job in [*order[evidence.spot_runs :], *order] if _steady(evidence, job)]
    jobs = list(dict.fromkeys(jobs))[: evidence.spot_runs]
    if not jobs:
        raise NotApplicable("every job has noise that depends on the length of its trunk")
    faults, strange, windows = [], [], 0
    for job in jobs:
        run = next(run for run in evidence.planned.values() if run.job == "/".join(job))
        trajectory = evidence.frame(layout.run(evidence.name, *job, "trajectory"))
        own = trajectory[(trajectory["run_id"] == run.run_id) & (trajectory["segment"] == 0)]
        stored = dict(zip(own["step"], own["loss_hash"], strict=True))
        again = _first_losses(evidence, run)
        wrong = [step for step, digest in again.items() if stored.get(step) != digest]
        windows += len(again)
        if wrong and _machine(evidence, job) != _here():
            strange.append(
                f"{'/'.join(job)} was trained on another kind of machine, whose losses are its own"
            )
        elif wrong:
            faults.append(f"run {run.run_id}: other losses by update {min(wrong)} when it is trained again")
    if strange and not faults:
        raise NotApplicable(strange[0])
    return settle(faults, f"{len(jobs)} runs, {windows} windows: the losses of every update again")


def _steady(evidence: Evidence, job: Job) -> bool:
    """Whether the first updates of a job do not depend on how long its trunk is."""
    noise: Inject | Reweight | Nap | None = evidence.study.block(job[0]).cell(job[1]).noise
    return noise is None or noise.phase is None


def _first_losses(evidence: Evidence, run: PlannedRun) -> dict[int, str]:
    """Rolling hash of the losses by update, of the run trained to its first branches in this process."""
    import torch

    from gradnoise.tasks import stream as tasks
    from gradnoise.training import branching

    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    block = evidence.study.block(run.block)
    cell, first = block.cell(run.cell), block.branches.sequences[0]
    updates = block.branches.updates
    kept = updates if updates is not None and updates * cell.batch <= first else None
    branches = block.branches.model_copy(update={"sequences": (first,), "updates": kept})
    corpus = next(iter(phases.corpus(evidence.name, evidence.study, run.block)), None)
    stream = tasks.stream(block.task, run.seed, corpus)
    with TemporaryDirectory() as folder:
        log = branching.run(
            block.model_copy(update={"branches": branches}),
            cell,
            run.seed,
            stream,
            evidence.study.device,
            Path(folder, "run.safetensors"),
            run.run_id,
            lambda _: None,
        )
    return {row["step"]: row["loss_hash"] for row in log["windows"] if row["segment"] == 0}


def _here() -> tuple[str | None, ...]:
    import torch

    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return records.processor_model(), torch.backends.cpu.get_cpu_capability(), gpu
