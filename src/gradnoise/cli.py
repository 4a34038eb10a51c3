"""The command line: one command a phase. Each rule of the workflow calls one, so each can be run by hand."""

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

# Before numpy loads: sums in another order would be other bytes.
for _threads in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ[_threads] = "1"

import typer

from gradnoise import __version__, cli_plan, phases
from gradnoise.base import layout
from gradnoise.base.environment import pins
from gradnoise.base.errors import InputError
from gradnoise.base.study import load_study
from gradnoise.base.vocabulary import study_label
from gradnoise.provenance import records
from gradnoise.registration import load_plan
from gradnoise.registration.lockfile import read_lock

app = typer.Typer(
    name="gradnoise",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    help="Does the gradient noise of training shape in-context learning? "
    "Rebuild the study phase by phase, and trace every figure to its runs.",
    epilog="Example: [bold]gradnoise trace results/quick/figures/figure-01-exposure.svg[/bold]",
)
phase = typer.Typer(
    no_args_is_help=True,
    help="Run one phase of a study, as the workflow's rules do.",
    epilog="Example: [bold]gradnoise run analyse --study quick[/bold]",
)
app.add_typer(phase, name="run")
app.add_typer(cli_plan.app, name="plan")

StudyName = Annotated[
    str,
    typer.Option("--study", help="Name of the study: its settings are config/NAME.yaml.", show_default=False),
]


def _record(
    phase_name: str,
    study: str,
    inputs: list[str],
    outputs: list[str],
    work: Callable[[], None],
    *,
    name: str | None = None,
    plan: str | None = None,
) -> None:
    """Do the work as a recorded attempt at a job; nothing runs under a registered plan without its lock."""
    name = name or phase_name
    if plan is not None and (registered := load_plan(plan)).study.kind == "registered":
        read_lock(plan)
        if phase_name == "train":
            limits = registered.attempts
            records.check_attempts(study, phase_name, name, limits.maximum, limits.retry_after)
    job = records.Job(
        phase=phase_name,
        name=name,
        study=study,
        module=phases.MODULES[phase_name],
        inputs=tuple(inputs),
        outputs=tuple(outputs),
        decided=_decided(phase_name, study, name),
        plan=plan,
    )
    with records.attempt(job):
        work()


def _decided(phase_name: str, study: str, name: str) -> records.Decided:
    """What decides a job by the study, the plan and the pins as they are now: recorded, and traced against.

    Raises `InputError` for a job that the study does not have.
    """
    if phase_name not in phases.PACKAGES:
        raise InputError("phase", phase_name, f"must be one of {list(phases.PACKAGES)}")
    chosen = load_study(study)
    settings: dict[str, Any] = {}
    runs: list[dict[str, Any]] = []
    if phase_name == "prepare":
        settings = phases.prepare_settings(chosen)
    elif phase_name == "train":
        from gradnoise.training.settings import job_runs, job_settings

        job = next((job for job in chosen.jobs() if "/".join(job) == name), None)
        if job is None:
            raise InputError("job", name, "is none of the study: see its blocks, grids and seeds")
        settings, runs = job_settings(chosen, *job), job_runs(chosen, *job)
    elif phase_name == "analyse":
        settings = phases.design(chosen)
    return records.Decided(
        settings=settings,
        runs=tuple(records.Run(**run) for run in runs),
        pins=pins(phases.PACKAGES[phase_name]),
    )


@phase.command(epilog="Example: [bold]gradnoise run prepare --study quick[/bold]")
def prepare(study: StudyName) -> None:
    """Read, clean, split and hash the corpus."""
    from gradnoise.tasks.corpus import prepare as work

    settings = load_study(study)
    _record(
        "prepare",
        study,
        [],
        phases.prepare_outputs(study, settings),
        lambda: work(study),
    )


@phase.command(
    epilog="Example: [bold]gradnoise run train --study quick --block race"
    " --cell b016-lr0.002 --seeds s00-04[/bold]"
)
def train(
    study: StudyName,
    block: Annotated[str, typer.Option(help="Block of the study, such as race.", show_default=False)],
    cell: Annotated[str, typer.Option(help="Cell of the block, such as b016-lr0.002.", show_default=False)],
    seeds: Annotated[str, typer.Option(help="Seed indices of the job, such as s00-04.", show_default=False)],
) -> None:
    """Train the seeds of one cell, measure noise in the live step, score annealed branches."""
    settings = load_study(study)
    settings.block(block).cell(cell)
    if seeds not in settings.block(block).chunks():
        raise InputError("seeds", seeds, f"must be one of {settings.block(block).chunks()}")
    from gradnoise.base.closure import closure_sha256
    from gradnoise.base.progress import progress
    from gradnoise.training.settings import job_sequences
    from gradnoise.training.train import train as work_on

    total = job_sequences(settings, block, cell, seeds)

    def work() -> None:
        with progress(f"{block}/{cell}/{seeds}", total) as told:
            code = closure_sha256(phases.MODULES["train"])
            work_on(study, block, cell, seeds, code, told.advance, told.skip)

    _record(
        "train",
        study,
        phases.corpus(study, settings, block),
        [layout.run(study, block, cell, seeds, table) for table in layout.RUN_TABLES],
        work,
        name=f"{block}/{cell}/{seeds}",
        plan=settings.plan,
    )


@phase.command(epilog="Example: [bold]gradnoise run measure --study quick[/bold]")
def measure(study: StudyName) -> None:
    """Integrate the runs' noise logs into exposure tables."""
    from gradnoise.noise.measure import measure as work

    inputs = phases.measure_inputs(study, load_study(study))
    _record("measure", study, inputs, phases.measure_outputs(study), lambda: work(study))


@phase.command(epilog="Example: [bold]gradnoise run analyse --study quick[/bold]")
def analyse(study: StudyName) -> None:
    """Match runs and carry out the plan's tests."""
    from gradnoise.analysis.analyse import analyse as work

    settings = load_study(study)
    _record(
        "analyse",
        study,
        phases.analyse_inputs(study, settings),
        phases.analyse_outputs(study),
        lambda: work(study),
        plan=settings.plan,
    )


@phase.command(epilog="Example: [bold]gradnoise run draw --study quick[/bold]")
def draw(study: StudyName) -> None:
    """Draw the figures, each with its plot data."""
    from gradnoise.figures.draw import draw as work

    _record("draw", study, phases.analyse_outputs(study), phases.draw_outputs(study), lambda: work(study))


@phase.command(epilog="Example: [bold]gradnoise run report --study quick[/bold]")
def report(study: StudyName) -> None:
    """Render the self-contained HTML report from the results."""
    from gradnoise.report.render import render as work

    _record("report", study, phases.report_inputs(study), [layout.report(study)], lambda: work(study))


@phase.command(epilog="Example: [bold]gradnoise run provenance --study quick[/bold]")
def provenance(
    study: StudyName,
    check: Annotated[
        bool, typer.Option("--check", help="Write nothing; say whether the study can be published as it is.")
    ] = False,
) -> None:
    """List every file of the study with its hash and the attempt that wrote it; refuse stray files."""
    from gradnoise.provenance.manifest import check_manifest, write_manifest

    (check_manifest if check else write_manifest)(study, phases.outputs(study, load_study(study)))


def _today(record: records.Record) -> records.Decided:
    return _decided(record.phase, record.study, record.name)


@app.command(epilog="Example: [bold]gradnoise trace results/quick/figures/figure-01-exposure.svg[/bold]")
def trace(
    file: Annotated[
        Path, typer.Argument(help="A file under results/, such as a figure.", show_default=False)
    ],
) -> None:
    """Walk a figure back to its runs, verifying every hash offline; exit 1 at the first break."""
    from gradnoise.provenance.trace import TraceBreak
    from gradnoise.provenance.trace import trace as follow
    from gradnoise.provenance.tree import show

    try:
        found = follow(str(file), _today)
    except TraceBreak as fault:
        print(f"gradnoise: broken: {fault}", file=sys.stderr)
        raise typer.Exit(1) from None
    show(found, study_label(load_study(found.step.record.study)))


@app.command(epilog="Example: [bold]gradnoise audit --study quick[/bold]")
def audit(
    study: StudyName,
    spot_runs: Annotated[
        int, typer.Option(min=0, help="Training jobs to run again, chosen by hash; each takes its time.")
    ] = 0,
) -> None:
    """Check a study against its plan, lock and history (A01 to A30); exit 1 on any breach.

    The same goes to logs/STUDY-audit.json and logs/STUDY-audit.html. What a check means: docs/audit.md.
    """
    from gradnoise.provenance.audit.page import command

    if status := command(study, spot_runs):
        raise typer.Exit(status)


@app.command(epilog="Example: [bold]gradnoise crate --study quick --output logs/quick-crate.zip[/bold]")
def crate(
    study: StudyName,
    output: Annotated[
        Path | None,
        typer.Option(help="Folder, or file ending in .zip; default logs/STUDY-crate.", show_default=False),
    ] = None,
) -> None:
    """Export the study as a Provenance Run Crate (RO-Crate 1.1); exit 1 if it does not trace."""
    from gradnoise.provenance.crate import write_crate
    from gradnoise.provenance.trace import TraceBreak

    try:
        write_crate(study, output or Path("logs", f"{study}-crate"), _today)
    except TraceBreak as fault:
        print(f"gradnoise: broken: {fault}", file=sys.stderr)
        raise typer.Exit(1) from None


def _version(wanted: bool) -> None:
    if wanted:
        print(f"gradnoise {__version__}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Options before the command."""


def main() -> None:
    """Entry point: bad input is one line on standard error and status 2."""
    try:
        app()
    except InputError as fault:
        print(f"gradnoise: {fault}", file=sys.stderr)
        raise SystemExit(2) from None
