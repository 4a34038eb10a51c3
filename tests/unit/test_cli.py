import pytest
from typer.testing import CliRunner

from gradnoise import __version__, cli, phases

runner = CliRunner()


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
    ("arguments", "said"),
    [
        (["run", "measure", "--study", "absent"], "gradnoise: config/absent.yaml: missing: "),
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
def test_bad_input_is_one_line_and_status_2(
    arguments: list[str],
    said: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr("sys.argv", ["gradnoise", *arguments])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith(said)
    assert error.count("\n") == 1
