"""A trace ends well only on the recorded bytes; every kind of break is found and named."""

import io
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from rich.console import Console
from tests.unit.provenance.conftest import today

from gradnoise.base import layout
from gradnoise.base.errors import InputError
from gradnoise.base.files import sha256, write_json
from gradnoise.provenance.manifest import write_manifest
from gradnoise.provenance.records import Decided, Record
from gradnoise.provenance.trace import Today, Trace, TraceBreak, trace
from gradnoise.provenance.tree import show

FIGURE = "results/fake/figures/dose.svg"
CURVES = "results/fake/analysis/curves.txt"
RUN = "results/fake/runs/race/b016/s02-02.scores.txt"
ATTEMPTS = Path("results/fake/provenance/attempts")
pytestmark = pytest.mark.usefixtures("study")


def shown(found: Trace) -> str:
    stream = io.StringIO()
    show(found, "REHEARSAL", Console(file=stream, width=80, highlight=False))
    return stream.getvalue()


def broken(path: str = FIGURE, now: Today = today) -> TraceBreak:
    with pytest.raises(TraceBreak) as caught:
        trace(path, now)
    message = str(caught.value)
    assert "\n" not in message
    assert all(part in message for part in (caught.value.expected, caught.value.found, caught.value.mend))
    return caught.value


def append(path: str, text: str) -> None:
    with Path(path).open("a") as handle:
        handle.write(text)


def edit(path: str, old: str, new: str) -> None:
    text = Path(path).read_text()
    assert old in text
    Path(path).write_text(text.replace(old, new))


def test_a_figure_leads_to_its_runs() -> None:
    found = trace(FIGURE, today)
    jobs = [step.record.name for step in found.steps]
    assert sorted(jobs) == ["analyse", "dose", "race/b016/s00-01", "race/b016/s02-02"]
    assert found.step.record.id == "draw-dose-0001"
    ((analysis, tables),) = found.step.inputs
    assert [file.path for file in tables] == [CURVES, "results/fake/analysis/results.json"]
    assert [file.path for file in found.step.sources] == ["config/fake.yaml"]
    assert [earlier.record.runs[0].seed for earlier, _ in analysis.inputs] == [100, 102]
    assert [plan.path for plan in found.plans] == ["preregistration/plan.yaml"]


def test_the_tree_has_a_line_for_each_job_and_ends_with_what_decided_and_ran_them() -> None:
    lines = shown(trace(FIGURE, today)).splitlines()
    assert lines[0] == "REHEARSAL  study fake"
    assert lines[1].startswith(f"{FIGURE}  ")
    jobs = [line for line in lines if "attempt" in line]
    assert len(jobs) == 4
    assert jobs[0].startswith("└── draw dose  attempt 1")
    assert jobs[1].lstrip(" ├└─").startswith("analyse  attempt 1  curves.txt ")
    assert "train race/b016/s00-01  attempt 1  seeds 0-1  s00-01.scores.txt " in jobs[2]
    text = "\n".join(lines)
    assert "\nconfiguration  config/fake.yaml: " in text
    assert "\nplan           preregistration/plan.yaml  canonical " in text
    assert "\nseeds          race 0-2: 100, 101, 102 (3 runs)\n" in text
    assert "\ncode           no Git commit known" in text
    assert f"  {trace(FIGURE, today).step.record.environment.processor}" in text
    lock = sha256("requirements.lock")[:12]
    assert (
        f"\nenvironment    requirements.lock {lock} (not checked; the pins of each job are)  python " in text
    )
    assert lines[-1].startswith("verified       ")
    assert lines[-1].endswith("behind 4 jobs: every hash is the recorded one")


def test_a_job_that_two_jobs_read_is_unfolded_once(perform: Callable[..., Path]) -> None:
    late = "results/fake/figures/late.svg"
    perform(phase="draw", name="late", inputs=(CURVES, RUN), outputs=(late,))
    text = shown(trace(late, today))
    assert text.count("train race/b016/s02-02") == 2
    assert text.count("(unfolded above)") == 1


def test_a_fresh_copy_traces_from_anywhere(study: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    copy = study.parent / "copy"
    shutil.copytree(study, copy)
    shutil.rmtree(study)
    monkeypatch.chdir(copy.parent)

    def as_recorded(record: Record) -> Decided:
        return Decided(record.settings, record.runs, record.pins)

    assert len(trace(FIGURE, as_recorded, root=copy).steps) == 4
    monkeypatch.chdir(copy)
    assert len(trace(str(copy / FIGURE), today).steps) == 4
    assert len(trace(f"./{FIGURE}", today).steps) == 4


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
    trace(FIGURE, today)


def test_the_plot_data_of_a_figure_is_checked_and_shown_with_it() -> None:
    data, other = Path(FIGURE).with_suffix(".txt"), Path(FIGURE).with_name("other.svg")
    found = trace(FIGURE, today)
    assert [file.path for file in found.beside] == [str(data)]
    assert shown(found).splitlines()[2] == f"{data}  {sha256(data)[:12]}"
    append(str(other), "another figure of the same job")
    trace(FIGURE, today)
    append(str(data), "one more point")
    assert (broken().path, broken().meaning) == (
        str(data),
        "its bytes changed since draw-dose-0001 wrote it",
    )
    data.unlink()
    assert (broken().path, broken().found) == (str(data), "no file")


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


def test_an_edited_setting_is_named_and_what_decides_no_job_is_not() -> None:
    append("config/fake.yaml", "# only a comment\ndevice: cpu\n")
    trace(CURVES, today)
    edit("config/fake.yaml", "width: 8", "layers: [1, 2], width: 8")
    found = broken(RUN)
    assert (found.path, found.expected, found.found) == ("config/fake.yaml: layers", "absent", "[1,2]")
    assert found.meaning == "the settings changed since train-race-b016-s02-02-0001 ran"


def test_an_edited_damaged_or_deleted_plan_is_named() -> None:
    plan = "preregistration/plan.yaml"
    append(plan, "margin: 0.02\n")
    assert broken().path == plan
    append(plan, "margin: 0.03\n")
    assert "duplicate key" in broken().found
    Path(plan).unlink()
    assert broken().found == "no file"


def test_a_package_that_no_phase_runs_may_change_its_pin() -> None:
    edit("requirements.lock", "ruff==", "ruff==1")
    trace(FIGURE, today)


@pytest.mark.parametrize(
    ("file", "package", "job"),
    [
        ("requirements.lock", "pandas", "analyse-analyse-0001"),
        ("requirements.lock", "pyarrow", "train-race-b016-s00-01-0001"),
        ("pyproject.toml", "torch", "train-race-b016-s00-01-0001"),
    ],
)
def test_another_pin_of_a_package_is_named_with_both_versions(file: str, package: str, job: str) -> None:
    pinned = next(
        step.record.pins[package] for step in trace(FIGURE, today).steps if package in step.record.pins
    )
    edit(file, f"{package}=={pinned}", f"{package}==99.1")
    found = broken()
    assert (found.path, found.expected, found.found) == (f"package {package}", f'"{pinned}"', '"99.1"')
    assert found.meaning == f"another version is pinned since {job} ran"


def test_a_seed_that_the_plan_does_not_give_is_named_with_its_run() -> None:
    record = ATTEMPTS / "train-race-b016-s02-02-0001.json"
    edit(str(record), '"seed": 102', '"seed": 7')
    found = broken()
    assert (found.path, found.expected, found.found) == ("run race/b016 #2.seed", "7", "102")
    edit(str(record), '"seed": 7', '"seed": 102')
    edit(str(record), '"run_id": "r2"', '"run_id": "r9"')
    found = broken()
    assert (found.path, found.expected, found.found) == ("run race/b016 #2.run_id", '"r9"', '"r2"')


def test_a_record_edited_after_the_manifest_is_named(perform: Callable[..., Path]) -> None:
    files = [output.path for step in trace(FIGURE, today).steps for output in step.record.outputs]
    write_manifest("fake", files)
    assert trace(FIGURE, today).hashed
    perform(name="race/b016/s02-02", outputs=(RUN,))  # a later attempt is no edit
    trace(FIGURE, today)
    record = str(ATTEMPTS / "analyse-analyse-0001.json")
    edit(record, '"cpu_seconds": ', '"cpu_seconds": 1')
    found = broken()
    assert found.path == record
    assert "since the manifest listed it" in found.meaning


@pytest.mark.parametrize("manifest", [{}, {"files": [{"record": 1}]}])
def test_a_damaged_manifest_is_named(manifest: dict) -> None:
    write_json(layout.manifest("fake"), manifest)
    with pytest.raises(InputError, match=r"^results/fake/provenance/manifest.json: files"):
        trace(FIGURE, today)


def test_each_job_is_decided_once() -> None:
    asked = []

    def now(record: Record) -> Decided:
        asked.append(record.name)
        return today(record)

    trace(FIGURE, now)
    assert sorted(asked) == ["analyse", "dose", "race/b016/s00-01", "race/b016/s02-02"]


def test_a_cell_that_is_no_longer_in_the_study_is_a_break() -> None:
    def now(record: Record) -> Decided:
        raise InputError("cell", "b016", "must be one of ['b064']")

    found = broken(RUN, now)
    assert found.path == "train-race-b016-s02-02-0001"
    assert "must be one of" in found.found


def test_the_newest_of_several_attempts_with_the_same_bytes_counts(perform: Callable[..., Path]) -> None:
    """Code that changed without changing the result: running it again mends the trace."""
    path = ATTEMPTS / "train-race-b016-s02-02-0001.json"
    path.write_text(path.read_text().replace(sha256("src/gradnoise/base/layout.py"), "0" * 64))
    assert broken(RUN).path == "src/gradnoise/base/layout.py"
    perform(name="race/b016/s02-02", outputs=(RUN,))
    assert trace(RUN, today).step.record.attempt == 2
    assert len(trace(FIGURE, today).steps) == 4


def test_an_input_rebuilt_to_other_bytes_breaks_what_was_drawn_from_it(perform: Callable[..., Path]) -> None:
    perform(name="race/b016/s03-03", outputs=(RUN,))
    found = broken()
    assert found.path == RUN
    assert "since analyse-analyse-0001 read it" in found.meaning
    trace(RUN, today)


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
        trace(path, today)


@pytest.mark.parametrize("path", [layout.manifest("fake"), str(ATTEMPTS / "draw-dose-0001.json")])
def test_evidence_is_no_result(path: str) -> None:
    with pytest.raises(InputError, match=r"^path: .* is evidence, not a result: give a result, such as "):
        trace(path, today)
