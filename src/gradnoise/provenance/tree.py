"""A trace as a tree to read: one line a job, then what decided it and where it ran."""

from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from rich.console import Console
from rich.text import Text
from rich.tree import Tree

from gradnoise.base.environment import LOCK
from gradnoise.base.study import study_path
from gradnoise.provenance.records import File, Record, Run
from gradnoise.provenance.trace import Step, Trace, short


def show(trace: Trace, label: str, console: Console | None = None) -> None:
    """Print the study with its label, the tree of jobs behind a file, then what decided them and ran them.

    What follows the tree: configuration, plan, seeds, code and environment.
    """
    console = console or Console(highlight=False)
    if not console.is_terminal:
        console.width = 10_000  # a file or a pipe gets whole lines
    console.print(Text.assemble((label, "bold"), f"  study {trace.step.record.study}"))
    tree = Tree(Text("\n").join(_with_path(file) for file in (trace.file, *trace.beside)))
    _grow(tree, trace.step, (), set())
    console.print(tree)
    for topic, line in _summary(trace):
        console.print(Text.assemble((f"{topic:<15}", "bold"), line))


def _grow(tree: Tree, step: Step, used: Sequence[File], seen: set[str]) -> None:
    """Add a job, with the files of it that the job above read, and what lies behind it, once."""
    record = step.record
    job = record.name if record.name == record.phase else f"{record.phase} {record.name}"
    label = Text.assemble((job, "bold"), f"  attempt {record.attempt}")
    if record.runs:
        label.append(f"  seeds {_ranges(run.seed_index for run in record.runs)}")
    for file in used:
        label.append(f"  {Path(file.path).name} {short(file.sha256)}")
    if record.id in seen:
        tree.add(label.append("  (unfolded above)"))
        return
    seen.add(record.id)
    branch = tree.add(label)
    for source in step.sources:
        branch.add(_with_path(source))
    for earlier, files in step.inputs:
        _grow(branch, earlier, files, seen)


def _summary(trace: Trace) -> Iterator[tuple[str, str]]:
    """Lines of (topic, what was found)."""
    records = [step.record for step in trace.steps]
    yield "configuration", f"{study_path(records[0].study)}: gives each job the settings that it ran with"
    for plan in trace.plans:
        yield "plan", f"{plan.path}  canonical {short(plan.sha256)}"
    blocks: dict[str, list[Run]] = defaultdict(list)
    for record in records:
        for run in record.runs:
            blocks[run.block].append(run)
    for block, runs in sorted(blocks.items()):
        seeds = {run.seed_index: run.seed for run in runs}
        listed = ", ".join(str(seed) for _, seed in sorted(seeds.items()))
        yield "seeds", f"{block} {_ranges(seeds)}: {listed} ({len(runs)} runs)"
    for line in sorted({_commit(record) for record in records}):
        yield "code", line
    for line in sorted({_environment(record) for record in records}):
        yield "environment", line
    yield "verified", f"{trace.hashed} files behind {len(records)} jobs: every hash is the recorded one"


def _commit(record: Record) -> str:
    if record.commit is None:
        return "no Git commit known; the hash of each file of the code is recorded"
    return f"commit {record.commit.sha}{', with uncommitted changes' if record.commit.dirty else ''}"


def _environment(record: Record) -> str:
    environment = record.environment
    packages = " ".join(f"{name} {version}" for name, version in environment.packages.items())
    # A new linter is another lock file and the same results; what is checked is each job's own pins.
    lock = f"{LOCK} {short(environment.lock_sha256)} (not checked; the pins of each job are)"
    machine = (environment.platform, environment.processor, environment.cpu_capability, environment.gpu)
    return f"{lock}  python {environment.python} {packages}  {'  '.join(filter(None, machine))}"


def _with_path(file: File) -> Text:
    return Text(f"{file.path}  {short(file.sha256)}")


def _ranges(numbers: Iterable[int]) -> str:
    """`0-2 5` for 0, 1, 2, 5."""
    stretches: dict[int, list[int]] = defaultdict(list)
    for position, number in enumerate(sorted(set(numbers))):
        stretches[number - position].append(number)
    return " ".join(f"{s[0]}-{s[-1]}" if len(s) > 1 else str(s[0]) for s in stretches.values())
