"""The commands of `gradnoise plan`: try a plan out, lock it, log deviations from it, see what it costs."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from gradnoise.base.errors import InputError
from gradnoise.base.files import read_json
from gradnoise.base.study import Strict, Study, load_study
from gradnoise.base.wording import number as in_figures
from gradnoise.base.wording import p_value
from gradnoise.registration.deviations import DocumentName, Reason
from gradnoise.registration.plan import Plan, load_plan

if TYPE_CHECKING:
    from gradnoise.registration.lockfile import DryRun

app = typer.Typer(
    no_args_is_help=True,
    help="The plan of a study: try it out on made-up runs, lock it, log deviations, see what it costs.",
    epilog="Example: [bold]gradnoise plan rehearse --study quick --truth rise[/bold]",
)

StudyName = Annotated[
    str,
    typer.Option("--study", help="Name of the study: its settings are config/NAME.yaml.", show_default=False),
]


@app.command(epilog="Example: [bold]gradnoise plan lock --study laptop --beacon 'drand 5281234 9c1f'[/bold]")
def lock(
    study: StudyName,
    beacon: Annotated[
        str, typer.Option(help="A public value that nobody knew before; the seeds follow from it too.")
    ] = "",
) -> None:
    """Simulate the plan, then write plan.lock.json: nothing of it can change unseen from then on.

    Refused in one line: a plan or code that is not committed, data that are not prepared, any outcome of the
    study that is there already, and a rule that errs too often or cannot reach one of its verdicts.
    """
    from gradnoise.analysis.rehearse import reachability
    from gradnoise.provenance.audit.registration import MODULES
    from gradnoise.registration.lockfile import lock_path
    from gradnoise.registration.locking import check_ready
    from gradnoise.registration.locking import lock as write_lock

    settings = load_study(study)
    plan = check_ready(settings.plan, MODULES)
    simulated = _dry_run(plan, settings)
    locked = write_lock(settings.plan, simulated, reachability(plan), modules=MODULES, beacon=beacon)
    _print_rates(simulated)
    print(f"{lock_path(settings.plan)}: {len(locked.runs)} runs, locked at {locked.utc}")
    print("Commit it now. For an outside party's word on the time: gradnoise plan timestamp --request")


@app.command(epilog="Example: [bold]gradnoise plan rehearse --study quick --truth rise[/bold]")
def rehearse(
    study: StudyName,
    truth: Annotated[
        str | None, typer.Option(help="A truth of the plan's power block; without it the rates of all.")
    ] = None,
    number: Annotated[int, typer.Option(min=0, help="Which of the truth's simulations.")] = 0,
    folder: Annotated[
        Path | None,
        typer.Option(help="Where to write; by default logs/rehearsal-STUDY-TRUTH.", show_default=False),
    ] = None,
) -> None:
    """Carry out the plan on made-up runs: the whole analysis of one truth, or rates of all verdicts."""
    from gradnoise.analysis.rehearse import rehearse as carry_out

    settings = load_study(study)
    if truth is None:
        _print_rates(_dry_run(load_plan(settings.plan), settings))
        return
    chosen = folder or Path(f"logs/rehearsal-{study}-{truth}")
    path = carry_out(study, truth, chosen, number)
    results: Any = read_json(path)
    _print(
        f"{results['label']}, not measured: truth {truth}, simulation {number}",
        ("test", "read as", "estimate", "p"),
        [(t["id"], t["outcome"], in_figures(t["estimate"]), p_value(t["p"])) for t in results["tests"]],
    )
    _print(
        f"{results['label']}: what the rules say",
        ("hypothesis", "outcome", "adjusted p"),
        [(h["id"], h["outcome"], p_value(h["p_adjusted"])) for h in results["hypotheses"]],
    )
    print(chosen)


@app.command(
    epilog="Example: [bold]gradnoise plan deviate --study laptop --pointer /matching/target --actual 0.06"
    " --reason error-in-plan --evidence docs/registration.md --effect 'none on H1'[/bold]"
)
def deviate(
    study: StudyName,
    pointer: Annotated[str, typer.Option(help="JSON Pointer into the document.", show_default=False)],
    reason: Annotated[Reason, typer.Option(help="Why.", show_default=False)],
    evidence: Annotated[str, typer.Option(help="A file of the repository.", show_default=False)],
    effect: Annotated[str, typer.Option(help="What it does to the conclusions.", show_default=False)],
    actual: Annotated[
        str | None, typer.Option(help="What was done, as JSON; of a lock, by default what is there now.")
    ] = None,
    document: Annotated[DocumentName, typer.Option(help="What is deviated from.")] = "plan",
) -> None:
    """Append a deviation to deviations.jsonl; registered value, tests touched and moment are found out."""
    from gradnoise.provenance.audit.registration import MODULES
    from gradnoise.registration.deviations import deviate as append
    from gradnoise.registration.deviations import resolve
    from gradnoise.registration.lockfile import deviations_path
    from gradnoise.registration.locking import facts

    path = load_study(study).plan
    if actual is not None:
        value = _json(actual)
    elif document == "lock":
        now = {name: _plain(fact) for name, fact in facts(path, MODULES).items()}
        value = resolve(now, pointer)
    else:
        raise InputError("--actual", "missing", "give the value that was used instead, as JSON")
    found = append(path, pointer, value, reason=reason, evidence=evidence, effect=effect, document=document)
    print(f"{deviations_path(path)}: {found.id}, discovered {found.discovered} an outcome could be seen")
    print(f"tests touched: {', '.join(found.tests) or 'none'}. Commit it now.")


@app.command(epilog="Example: [bold]gradnoise plan cost --study quick[/bold]")
def cost(study: StudyName) -> None:
    """What the study trains, by block, and the processor time of the attempts so far."""
    from gradnoise.provenance.records import read_records
    from gradnoise.training.settings import job_sequences

    settings = load_study(study)
    seconds: dict[str, float] = {}
    for record in read_records(study):
        if record.phase == "train" and record.cpu_seconds is not None:
            trained = record.name.partition("/")[0]
            seconds[trained] = seconds.get(trained, 0.0) + record.cpu_seconds
    rows = []
    for name, block in settings.blocks.items():
        sequences = sum(job_sequences(settings, *job) for job in settings.jobs() if job[0] == name)
        cells = len(block.cells())
        rows.append((name, cells, block.seeds, cells * block.seeds, sequences, seconds.get(name)))
    spent = sum(seconds.values()) if seconds else None
    total = ("all", None, None, sum(row[3] for row in rows), sum(row[4] for row in rows), spent)
    _print(
        f"Study {study}: runs and sequences if every budget is used",
        ("block", "cells", "seeds", "runs", "sequences", "CPU seconds so far"),
        [(name, *map(in_figures, figures)) for name, *figures in [*rows, total]],
    )


@app.command(epilog="Example: [bold]gradnoise plan render[/bold]")
def render() -> None:
    """Write what is generated: the plan's JSON Schema, docs/plan-reference.md, preregistration/README.md."""
    from gradnoise.registration.readme import write_readme
    from gradnoise.registration.reference import write_reference

    for path in (*write_reference(), write_readme()):
        print(path)


@app.command(epilog="Example: [bold]gradnoise plan timestamp --study laptop --request[/bold]")
def timestamp(
    study: StudyName,
    request: Annotated[
        bool, typer.Option("--request", help="Write the request that a time-stamp authority signs.")
    ] = False,
) -> None:
    """Verify the time-stamp token (RFC 3161) beside the lock (exit 1 if it fails), or write the request.

    Nothing is sent. Send the request to any authority, put its answer into plan.lock.tsr and its root
    certificate into plan.lock.pem.
    """
    from gradnoise.registration.timestamp import verify_timestamp, write_request

    path = load_study(study).plan
    if request:
        print(write_request(path))
        return
    found = verify_timestamp(path)
    if found is None:
        print("none: no time-stamp token beside the lock")
    elif found.verified:
        print(f"verified: the lock existed at {found.utc}, by the word of {found.authority}")
    else:
        print(f"not verified: {found.reason}")
        raise typer.Exit(1)


def _dry_run(plan: Plan, settings: Study) -> DryRun:
    """The dry run with a bar on standard error."""
    from gradnoise.analysis.rehearse import dry_run

    total = plan.power.simulations * len(plan.power.truths)
    with typer.progressbar(length=total, label="simulated studies", file=sys.stderr) as bar:
        return dry_run(plan, settings, lambda: bar.update(1))


def _print_rates(simulated: DryRun) -> None:
    _print(
        f"{simulated.simulations} simulated studies of each truth",
        ("truth", "hypothesis", "verdict", "rate", "standard error", ""),
        [
            (
                rate.truth,
                rate.hypothesis,
                rate.verdict.replace("_", " "),
                f"{rate.rate:.3f}",
                f"{rate.stderr:.3f}",
                "an error there" if rate.wrong else "",
            )
            for rate in simulated.rates
        ],
    )


def _print(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = 10_000  # a file or a pipe gets whole lines
    table = Table(title=title, title_justify="left")
    for column in columns:
        table.add_column(column)
    for row in rows:
        table.add_row(*row)
    console.print(table)


def _json(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError as error:
        raise InputError("--actual", text, 'must be JSON, such as 0.06 or "greater"') from error


def _plain(value: Any) -> Any:
    """A fact of a lock as its file has it."""
    return value.model_dump(mode="json") if isinstance(value, Strict) else value
