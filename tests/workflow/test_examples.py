"""Every example that is printed runs as it is printed: in `--help`, in the README and in docs/.

They are run on the small study, under its name and with its cells and seeds.
"""

import re
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path

import click
import pytest
import typer
from tests.workflow.project import NAME, RACE, ROOT, TEXT, Project, make_tiny
from tests.workflow.test_profiles import StubbedSlurm

from gradnoise.cli import app

PAGES = [
    ROOT / "README.md",
    *(path for folder in ("docs", "benchmarks") for path in (ROOT / folder).glob("*.md")),
]
STUDIES = {*(path.stem for path in (ROOT / "config").glob("*.yaml")), "laptop"} - {"config"}
RUN = ("gradnoise", "snakemake")
# Examples that are not run: they need a network or a version that only the reader has, or change the copy.
SHOWN = (
    "git",
    "dvc",
    "pip",
    "python",
    "python3.11",
    "ssh",
    "cd",
    ".",
    "source",
    "grep",
    "less",
    "cat",
    "rocrate-validator",
)


def commands(command: click.Command, path: str = "gradnoise") -> Iterator[tuple[str, click.Command]]:
    """Every command and group of the command line, by how it is called."""
    yield path, command
    for name, inner in getattr(command, "commands", {}).items():
        yield from commands(inner, f"{path} {name}")


HELP = dict(commands(typer.main.get_command(app)))
HELP_EXAMPLES = {
    name: re.findall(r"\[bold\](.+?)\[/bold\]", command.epilog or "") for name, command in HELP.items()
}


def blocks(page: Path, *languages: str) -> list[str]:
    """Code blocks of a page in these languages."""
    found = re.findall(r"^```(\w*)\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL)
    return [text for language, text in found if language in languages]


def lines(page: Path) -> list[str]:
    """Commands of a page: whole lines of shell blocks, those after the prompt of console blocks."""
    typed = "".join(blocks(page, "sh", "bash", "shell")).replace("\\\n", " ").splitlines()
    typed += re.findall(r"^\$ (.+)", "".join(blocks(page, "console")), re.MULTILINE)
    return [line for line in typed if line.strip() and not line.startswith("#")]


def program(line: str) -> str:
    """The program of a command line, after any settings of environment variables."""
    words = [word for word in shlex.split(line, comments=True) if not re.match(r"\w+=", word)]
    return Path(words[0]).name or words[0] if words else ""


SHELL = [(page.relative_to(ROOT).as_posix(), line) for page in PAGES for line in lines(page)]
WRITTEN = [example for name in HELP for example in HELP_EXAMPLES[name]]
EXAMPLES = dict.fromkeys([*WRITTEN, *(line for _, line in SHELL if program(line) in RUN)])
# Only for a registered plan, in this order.
REGISTERED = ("lock", "timestamp", "deviate")


def needs_registration(example: str) -> bool:
    return example.split()[1:2] == ["plan"] and example.split()[2] in REGISTERED


RUNNABLE = [example for example in EXAMPLES if not needs_registration(example)]


def on_tiny(example: str) -> str:
    """The example about the small study: its name, its cells and its seeds."""
    text = "text" in re.split(r"[\s/-]", example)
    example = re.sub(rf"\b({'|'.join(sorted(STUDIES))})\b", NAME, example)
    example = re.sub(r"\bb\d+-lr[\d.]*\d(e-?\d+)?", TEXT if text else RACE[0], example)
    return re.sub(r"\bs\d+-\d+", "s00-00" if text else "s00-04", example)


def test_every_command_shows_an_example() -> None:
    assert [name for name, examples in HELP_EXAMPLES.items() if not examples] == []
    assert [example for example in WRITTEN if program(example) != "gradnoise"] == []


@pytest.mark.slow
@pytest.mark.parametrize("example", RUNNABLE)
def test_an_example_runs(shared: Project, tiny: Project, tmp_path: Path, example: str) -> None:
    slurm = StubbedSlurm(tmp_path)
    path = f"{slurm.programs}:{shared.env['PATH']}"
    # An audit wants the study as it was published; rendering changes files of the repository.
    alone = example.startswith(("gradnoise audit", "gradnoise plan render"))
    project = tiny.copy(tmp_path / "copy") if alone else shared
    project.run("bash", "-euc", on_tiny(example), PATH=path, STUB_SLURM=str(slurm.state))


@pytest.mark.slow
def test_examples_on_a_registered_plan_run(tmp_path: Path) -> None:
    """A small study whose plan is registered: locked, stamped, and departed from, as the pages show it."""
    project = make_tiny(tmp_path / "registered", tmp_path)
    plan = f"preregistration/{NAME}.yaml"
    project.edit(plan, lambda text: text.replace('"rehearsal"', '"registered"'))
    project.edit(plan, lambda text: re.sub(r'"simulations": \d+', '"simulations": 4', text))
    project.run("gradnoise", "run", "prepare", "--study", NAME)
    project.git("commit", "--quiet", "--all", "--message", "A registered plan")
    examples = [example for example in EXAMPLES if needs_registration(example)]
    shown = {example.split()[2] for example in examples}
    assert shown == set(REGISTERED)
    for command in REGISTERED:
        for example in (example for example in examples if example.split()[2] == command):
            lock = project.path / f"preregistration/{NAME}.lock.json"
            if command == "lock":
                lock.unlink(missing_ok=True)
            project.run("bash", "-euc", on_tiny(example))
            assert lock.is_file()


@pytest.mark.slow
def test_examples_leave_nothing_stale(shared: Project) -> None:
    """Last of the module: a phase run by hand gave the bytes that were there."""
    shared.assert_nothing_to_do()


@pytest.mark.parametrize(("page", "line"), [(page, line) for page, line in SHELL if program(line) not in RUN])
def test_other_commands_name_what_exists(page: str, line: str) -> None:
    assert program(line) in (*SHOWN, "make"), f"{page} shows a command that no test knows: {line}"
    words = shlex.split(line, comments=True)
    if program(line) == "make":
        targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
        assert {word for word in words[1:] if not word.startswith("-")} <= targets
    if program(line).startswith("python"):
        assert [word for word in words if word.endswith(".py") and not (ROOT / word).is_file()] == []


@pytest.mark.slow
@pytest.mark.parametrize(
    "page", [page for page in PAGES if blocks(page, "python")], ids=lambda page: page.name
)
def test_python_on_a_page_runs(tiny: Project, tmp_path: Path, page: Path) -> None:
    """Blocks of a page follow one another, as a reader types them."""
    script = tmp_path / "page.py"
    script.write_text("\n".join(blocks(page, "python")))
    tiny.run("env", "--chdir", str(tmp_path), sys.executable, str(script))
