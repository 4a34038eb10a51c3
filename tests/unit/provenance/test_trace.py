"""A trace ends well only on the recorded bytes; every kind of break is found and named."""

import io
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from rich.console import Console

from gradnoise.base.errors import InputError
from gradnoise.base.files import sha256
from gradnoise.provenance.records import Record
from gradnoise.provenance.trace import Trace, TraceBreak, trace
from gradnoise.provenance.tree import show

FIGURE = "results/fake/figures/dose.svg"
CURVES = "results/fake/analysis/curves.txt"
RUN = "results/fake/runs/race/b016/s02-02.scores.txt"
ATTEMPTS = Path("results/fake/provenance/attempts")
pytestmark = pytest.mark.usefixtures("study")


def shown(found: Trace) -> str:
    stream = io.StringIO()
    show(found, Console(file=stream, width=80, highlight=False))
    return stream.getvalue()


def broken(path: str = FIGURE, **options: object) -> TraceBreak:
    with pytest.raises(TraceBreak) as caught:
        trace(path, **options)  # type: ignore[arg-type]
    message = str(caught.value)
    assert "\n" not in message
    assert all(part in message for part in (caught.value.expected, caught.value.found, caught.value.mend))
    return caught.value


def append(path: str, text: str) -> None:
    with Path(path).open("a") as handle:
        handle.write(text)


def test_a_figure_leads_to_its_runs() -> None:
    found = trace(FIGURE)
    jobs = [step.record.name for step in found.steps]
    assert sorted(jobs) == ["analyse", "dose", "race/b016/s00-01", "race/b016/s02-02"]
    assert found.step.record.id == "draw-dose-0001"
    ((analysis, tables),) = found.step.inputs
    assert [file.path for file in tables] == [CURVES, "results/fake/analysis/results.json"]
    assert [file.path for file in found.step.sources] == ["config/fake.yaml"]
    assert [earlier.record.runs[0]["seed"] for earlier, _ in analysis.inputs] == [100, 102]
    assert {document.path for document in found.documents} == {
        "config/fake.yaml",
        "preregistration/plan.yaml",
    }


def test_the_tree_has_a_line_for_each_job_and_ends_with_code_and_environment() -> None:
    lines = shown(trace(FIGURE)).splitlines()
    assert lines[0].startswith(f"{FIGURE}  ")
    jobs = [line for line in lines if "attempt" in line]
    assert len(jobs) == 4
    assert jobs[0].startswith("└── draw dose  attempt 1")
    assert jobs[1].lstrip(" ├└─").startswith("analyse  attempt 1  curves.txt ")
    assert "train race/b016/s00-01  attempt 1  seeds 0-1  s00-01.scores.txt " in jobs[2]
    text = "\n".join(lines)
    assert "\nseeds        race 0-2 (3 runs)\n" in text
    assert "\ncode         no Git commit known" in text
    assert "\nenvironment  requirements.lock " in text
    assert lines[-1].startswith("verified     ")
    assert lines[-1].endswith("behind 4 jobs: every hash is the recorded one")


def test_a_job_that_two_jobs_read_is_unfolded_once(perform: Callable[..., Path]) -> None:
    late = "results/fake/figures/late.svg"
    perform(phase="draw", name="late", inputs=(CURVES, RUN), outputs=(late,))
    text = shown(trace(late))
    assert text.count("train race/b016/s02-02") == 2
    assert text.count("(unfolded above)") == 1


def test_a_fresh_copy_traces_from_anywhere(study: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    copy = study.parent / "copy"
    shutil.copytree(study, copy)
    shutil.rmtree(study)
    monkeypatch.chdir(copy.parent)
    assert len(trace(FIGURE, root=copy).steps) == 4
    monkeypatch.chdir(copy)
    assert len(trace(str(copy / FIGURE)).steps) == 4
    assert len(trace(f"./{FIGURE}").steps) == 4


def test_a_flipped_byte_is_named_at_the_top_and_below() -> None:
    for path in (FIGURE, RUN):
        content = bytearray(Path(path).read_bytes())
        content[0] ^= 1
        Path(path).write_bytes(content)
        found = broken()
        assert found.path == path
        assert "its bytes changed since" in found.meaning
        content[0] ^= 1
        Path(path).write_bytes(content)
    trace(FIGURE)


def test_a_missing_file_is_named_at_the_top_and_below() -> None:
    for path in (CURVES, FIGURE):
        Path(path).unlink()
        found = broken()
        assert (found.path, found.found) == (path, "no file")
        assert "dvc pull" in found.mend


def test_a_missing_record_is_named_by_the_file_that_it_accounted_for() -> None:
    (ATTEMPTS / "train-race-b016-s02-02-0001.json").unlink()
    found = broken()
    assert found.path == RUN
    assert found.meaning == "nothing says where these bytes come from"


def test_without_any_record_the_file_itself_is_named() -> None:
    shutil.rmtree(ATTEMPTS)
    assert broken().path == FIGURE


def test_an_unfinished_attempt_does_not_account_for_a_file() -> None:
    path = ATTEMPTS / "draw-dose-0001.json"
    path.write_text(path.read_text().replace('"finished"', '"failed"'))
    assert broken().meaning == "nothing says where these bytes come from"


def test_an_edited_deleted_or_added_file_of_the_code_is_named() -> None:
    code = "src/gradnoise/base/layout.py"  # behind the training jobs alone
    original = Path(code).read_text()
    append(code, "# edited\n")
    found = broken()
    assert found.path == code
    assert "train-race-b016-s00-01-0001" in found.meaning
    Path(code).unlink()
    assert broken().found == "no file"
    Path(code).write_text(original)
    Path("src/gradnoise/template.j2").touch()
    assert broken().path == "src/gradnoise/template.j2"


def test_an_edited_configuration_is_named_and_a_comment_is_not() -> None:
    tables = "results/fake/analysis/curves.txt"
    append("config/fake.yaml", "# only a comment\n")
    trace(tables)
    append("config/fake.yaml", "device: cuda\n")
    found = broken(tables)
    assert found.path == "config/fake.yaml"
    assert "the configuration changed since analyse-analyse-0001" in found.meaning


def test_an_edited_or_deleted_plan_is_named() -> None:
    append("preregistration/plan.yaml", "margin: 0.02\n")
    assert broken().path == "preregistration/plan.yaml"
    Path("preregistration/plan.yaml").unlink()
    assert broken().found == "no file"


def test_an_edited_lock_file_is_named() -> None:
    append("requirements.lock", "numpy==2.4.6\n")
    found = broken()
    assert found.path == "requirements.lock"
    assert "the locked environment changed" in found.meaning


def test_where_settings_are_recomputed_they_decide_instead_of_the_configuration() -> None:
    """A new block in the configuration does not touch the runs of another."""
    append("config/fake.yaml", "device: cpu\n")
    assert broken(RUN).path == "config/fake.yaml"
    found = trace(RUN, current_settings=lambda record: {"width": 8})
    assert found.settings == 1
    assert "settings     of 1 jobs recomputed: the same" in shown(found)
    changed = broken(RUN, current_settings=lambda record: {"width": 16, "layers": (1, 2)})
    assert (changed.path, changed.expected, changed.found) == ("config/fake.yaml: layers", "absent", "[1,2]")


def test_settings_are_asked_for_each_job_and_may_be_left_to_the_configuration() -> None:
    asked = []

    def settings(record: Record) -> dict[str, object] | None:
        asked.append(record.name)
        return {"width": 8} if record.phase == "train" else None

    assert trace(FIGURE, current_settings=settings).settings == 2
    assert sorted(asked) == ["analyse", "dose", "race/b016/s00-01", "race/b016/s02-02"]


def test_a_cell_that_is_no_longer_in_the_study_is_a_break() -> None:
    def settings(record: Record) -> dict[str, object] | None:
        raise InputError("cell", "b016", "must be one of ['b064']")

    found = broken(RUN, current_settings=settings)
    assert found.path == "config/fake.yaml"
    assert "must be one of" in found.found


def test_the_newest_of_several_attempts_with_the_same_bytes_counts(perform: Callable[..., Path]) -> None:
    """Code that changed without changing the result: running it again mends the trace."""
    path = ATTEMPTS / "train-race-b016-s02-02-0001.json"
    path.write_text(path.read_text().replace(sha256("src/gradnoise/base/layout.py"), "0" * 64))
    assert broken(RUN).path == "src/gradnoise/base/layout.py"
    perform(name="race/b016/s02-02", outputs=(RUN,))
    assert trace(RUN).step.record.attempt == 2
    assert len(trace(FIGURE).steps) == 4


def test_an_input_rebuilt_to_other_bytes_breaks_what_was_drawn_from_it(perform: Callable[..., Path]) -> None:
    perform(name="other", outputs=(RUN,))
    found = broken()
    assert found.path == RUN
    assert "since analyse-analyse-0001 read it" in found.meaning
    trace(RUN)


def test_a_list_of_code_files_cut_short_is_noticed() -> None:
    path = ATTEMPTS / "train-race-b016-s02-02-0001.json"
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(line for line in lines if "src/gradnoise/__init__.py" not in line))
    assert broken().path == "train-race-b016-s02-02-0001"


@pytest.mark.parametrize(
    "path",
    [
        "config/fake.yaml",
        "results/fake",
        "../elsewhere/results/a/b",
        "results/fake/figures/none.svg",
        "/etc/hosts",
    ],
)
def test_a_path_that_is_no_file_of_a_study_is_refused(path: str) -> None:
    with pytest.raises(InputError, match=r"^path: "):
        trace(path)
