"""The crate passes the validator's REQUIRED checks offline, says what the records say, and nothing else.

`ro-crate-1.1-context.json` is the context https://w3id.org/ro/crate/1.1/context, version 1.1.0, as the
package rocrate 0.15.0 ships it (data/ro-crate.jsonld). It is in the public domain (CC0 1.0).
"""

import io
import json
import os
import shutil
import socket
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import pytest
from tests.unit.provenance.conftest import today
from tests.workflow.project import ROOT, published_study

from gradnoise.base import layout
from gradnoise.base.errors import InputError
from gradnoise.base.files import read_json, sha256, write_json
from gradnoise.provenance.crate import METADATA, write_crate
from gradnoise.provenance.manifest import write_manifest
from gradnoise.provenance.records import Decided, Record
from gradnoise.provenance.trace import TraceBreak

CONTEXT_URL = "https://w3id.org/ro/crate/1.1/context"
CONTEXT = Path(__file__).with_name("ro-crate-1.1-context.json")
PROFILE = "provenance-run-crate-0.5"
RUN = "results/fake/runs/race/b016/s00-01.scores.txt"
FIGURE = "results/fake/figures/dose.svg"
FILES = [
    *(RUN, "results/fake/runs/race/b016/s02-02.scores.txt"),
    *("results/fake/analysis/curves.txt", "results/fake/analysis/results.json"),
    *(FIGURE, "results/fake/figures/dose.txt", "results/fake/figures/other.svg"),
]
ATTEMPTS = Path("results/fake/provenance/attempts")


def as_recorded(record: Record) -> Decided:
    return Decided(record.settings, record.runs, record.pins)


@pytest.fixture
def place(study: Path) -> Path:
    """A finished study in a repository with the workflow's own files; the working directory."""
    for path in ("Snakefile", "LICENSE", "CITATION.cff", "config/config.yaml"):
        shutil.copyfile(ROOT / path, study / path)
    shutil.copytree(ROOT / "workflow/rules", study / "workflow/rules")
    write_manifest("fake", FILES)
    return study


@pytest.fixture
def crate(place: Path, tmp_path: Path) -> Path:
    """The crate of that study."""
    write_crate("fake", tmp_path / "crate", today)
    return tmp_path / "crate"


@pytest.fixture
def issues(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[Path], list[str]]:
    """What the validator finds wrong among the REQUIRED, without any network."""
    import urllib3
    from requests import PreparedRequest, Response
    from requests.adapters import HTTPAdapter
    from requests_cache import CachedSession
    from rocrate_validator.models import Severity, ValidationSettings
    from rocrate_validator.services import validate

    def no_network(*arguments: object, **keywords: object) -> None:
        raise AssertionError(f"asks the network: {arguments}")

    monkeypatch.setattr(socket.socket, "connect", no_network)
    monkeypatch.setattr(socket, "getaddrinfo", no_network)

    class Vendored(HTTPAdapter):
        def send(self, request: PreparedRequest, *_: object, **__: object) -> Response:
            body = io.BytesIO(CONTEXT.read_bytes())
            kind = {"Content-Type": "application/ld+json"}
            answer = urllib3.HTTPResponse(body, headers=kind, status=200, preload_content=False)
            return self.build_response(request, answer)

    cache = tmp_path / "contexts"
    with CachedSession(str(cache), backend="sqlite") as session:
        session.mount("https://", Vendored())
        session.get(CONTEXT_URL)

    def found(crate: Path) -> list[str]:
        settings = ValidationSettings(
            rocrate_uri=crate,
            profile_identifier=PROFILE,
            requirement_severity=Severity.REQUIRED,
            offline=True,
            cache_path=cache,
        )
        result = validate(settings)
        assert len(result.executed_checks) > 80
        assert not result.skipped_checks
        said = [str(issue.message) for issue in result.get_issues()]
        assert result.passed() == (not said)
        return said

    return found


def entities(crate: Path) -> dict[str, dict[str, Any]]:
    graph = json.loads((crate / METADATA).read_bytes())["@graph"]
    assert len({entity["@id"] for entity in graph}) == len(graph)
    return {entity["@id"]: entity for entity in graph}


def referred(value: Any) -> list[str]:
    values = value if isinstance(value, list) else [value]
    return [item["@id"] for item in values if isinstance(item, dict)]


def files_of(folder: Path) -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()
    }


def test_the_crate_passes_every_required_check(crate: Path, issues: Callable[[Path], list[str]]) -> None:
    assert issues(crate) == []


def test_the_packed_crate_does_too(place: Path, tmp_path: Path, issues: Callable[[Path], list[str]]) -> None:
    write_crate("fake", tmp_path / "crate.zip", today)
    assert issues(tmp_path / "crate.zip") == []


def test_the_crate_of_the_published_study_does_too(
    tmp_path: Path, issues: Callable[[Path], list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    name = published_study()
    if not Path(layout.manifest(name)).is_file():
        pytest.skip("no results here: dvc pull")
    try:
        write_crate(name, tmp_path / "crate", as_recorded)
    except TraceBreak as fault:
        pytest.skip(f"these results are not what this code gives: {fault}")
    assert issues(tmp_path / "crate") == []


@pytest.mark.parametrize(
    ("entity", "lost", "said"),
    [
        ("./", "license", "specify a license"),
        ("./", "mainEntity", "Main Workflow must be specified"),
        ("Snakefile", "hasPart", "refer to orchestrated tools via hasPart"),
        ("#attempt/draw-dose-0001", "instrument", "instrument property that references the executed tool"),
        ("#control/draw-dose-0001", "object", "action representing the corresponding tool run"),
        ("#draw/output/dose.svg", "additionalType", "FormalParameter MUST have an additionalType"),
    ],
)
def test_the_validator_misses_what_is_taken_away(
    crate: Path, issues: Callable[[Path], list[str]], entity: str, lost: str, said: str
) -> None:
    metadata: Any = read_json(crate / METADATA)
    next(part for part in metadata["@graph"] if part["@id"] == entity).pop(lost)
    write_json(crate / METADATA, metadata)
    assert any(said in issue for issue in issues(crate))


def test_the_validator_misses_a_file(crate: Path, issues: Callable[[Path], list[str]]) -> None:
    (crate / FIGURE).unlink()
    assert any(FIGURE in issue for issue in issues(crate))


def test_every_file_is_there_with_its_hash_and_size(crate: Path) -> None:
    found = entities(crate)
    parts = [found[part] for part in referred(found["./"]["hasPart"])]
    assert {unquote(part["@id"]) for part in parts} == files_of(crate).keys() - {METADATA}
    for part in parts:
        path = crate / unquote(part["@id"])
        assert (part["sha256"], part["contentSize"]) == (sha256(path), str(path.stat().st_size))
    attempts = {path.as_posix() for path in ATTEMPTS.glob("*.json")}
    read = {
        "Snakefile",
        "workflow/rules/train.smk",
        "config/fake.yaml",
        "preregistration/plan.yaml",
        "LICENSE",
    }
    assert {*FILES, *attempts, layout.manifest("fake"), *read} <= files_of(crate).keys()


def test_an_action_says_what_its_record_says(crate: Path) -> None:
    found = entities(crate)
    record: Any = read_json(ATTEMPTS / "train-race-b016-s00-01-0001.json")
    action = found["#attempt/train-race-b016-s00-01-0001"]
    assert (action["startTime"], action["endTime"]) == (record["start"], record["end"])
    assert referred(action["result"]) == [RUN]
    assert referred(action["subjectOf"]) == [f"{ATTEMPTS}/{record['id']}.json"]
    assert record["environment"]["host"] not in (crate / METADATA).read_text()
    given = {found[value]["name"]: found[value].get("value") for value in referred(action["object"])}
    assert json.loads(given["width"]) == 8
    assert [run["seed"] for run in json.loads(given["runs"])] == [100, 101]
    assert "preregistration/plan.yaml" in referred(action["object"])
    tool = found[action["instrument"]["@id"]]
    assert (tool["name"], tool["identifier"]) == ("gradnoise run train", record["code"]["sha256"])
    packages = {found[package]["name"]: found[package] for package in referred(tool["softwareRequirements"])}
    assert packages.keys() == record["pins"].keys()
    assert packages["torch"]["softwareVersion"] == record["pins"]["torch"]
    used = {found[value]["name"]: found[value]["value"] for value in referred(action["resourceUsage"])}
    assert used["peak_memory_bytes"] == str(record["peak_memory_bytes"])


def test_a_figure_leads_to_its_runs_by_the_actions(crate: Path) -> None:
    found = entities(crate)
    wrote = {
        result: action
        for action in found.values()
        if action["@id"].startswith("#attempt/")
        for result in referred(action["result"])
    }
    assert wrote.keys() == set(FILES)
    behind, waiting = set(), [FIGURE]
    while waiting:
        action = wrote[waiting.pop()]
        behind.add(action["name"])
        waiting += [path for path in referred(action["object"]) if path.startswith("results/")]
    assert behind == {
        *("draw dose, attempt 1", "analyse, attempt 1"),
        *("train race/b016/s00-01, attempt 1", "train race/b016/s02-02, attempt 1"),
    }


def test_steps_are_the_rules_and_follow_what_they_read(crate: Path) -> None:
    found = entities(crate)
    steps = [found[step] for step in referred(found["Snakefile"]["step"])]
    assert [(step["name"], step["position"]) for step in steps] == [
        ("train_seeds", "1"),
        ("analyse_plan", "2"),
        ("draw_figures", "3"),
    ]
    (connection,) = referred(steps[1]["connection"])
    assert found[connection]["sourceParameter"] == {"@id": "#train/output/scores.txt"}
    assert found[connection]["targetParameter"] == {"@id": "#analyse/input/scores.txt"}
    controls = referred(found["#organise"]["object"])
    assert [found[control]["instrument"]["@id"] for control in controls] == [
        *("#step/train", "#step/train", "#step/analyse", "#step/draw")
    ]


def test_rules_that_run_the_same_phase_are_one_step(place: Path, tmp_path: Path) -> None:
    rules = Path("workflow/rules/draw.smk")
    rules.write_text(rules.read_text() + '\nrule draw_more:\n    shell:\n        "gradnoise run draw"\n')
    write_crate("fake", tmp_path / "crate", today)
    assert entities(tmp_path / "crate")["#step/draw"]["name"] == "draw_figures or draw_more"


def test_the_root_says_what_the_crate_is(crate: Path) -> None:
    found = entities(crate)
    root = found["./"]
    assert root["name"].startswith("Study fake (REHEARSAL)")
    assert root["datePublished"] == max(
        json.loads(path.read_bytes())["end"] for path in ATTEMPTS.glob("*.json")
    )
    assert found[root["author"]["@id"]]["name"] == "The gradnoise developers"
    assert found[root["license"]["@id"]]["name"] == "Apache-2.0"
    assert {uri.rpartition("/")[0] for uri in referred(root["conformsTo"])} == {
        *(f"https://w3id.org/ro/wfrun/{profile}" for profile in ("process", "workflow", "provenance")),
        "https://w3id.org/workflowhub/workflow-ro-crate",
    }


def test_every_reference_within_the_crate_leads_somewhere(crate: Path) -> None:
    found = entities(crate)
    outside = ("https://w3id.org/ro/crate/1.1", "https://doi.org/", "https://snakemake.readthedocs.io")
    missing = {
        target
        for entity in found.values()
        for value in entity.values()
        for target in referred(value)
        if target not in found and not target.startswith(outside)
    }
    assert missing == set()


def test_the_same_study_gives_the_same_bytes_later_and_elsewhere(
    place: Path, crate: Path, tmp_path: Path
) -> None:
    write_crate("fake", tmp_path / "first.zip", today)
    elsewhere = tmp_path / "else/where"
    shutil.copytree(place, elsewhere)
    for path in elsewhere.rglob("*"):
        os.utime(path, (0, 0))
    code = (
        "from gradnoise.provenance.crate import write_crate\n"
        "from gradnoise.provenance.records import Decided\n"
        "for output in ('second', 'second.zip'):\n"
        "    write_crate('fake', output, lambda r: Decided(r.settings, r.runs, r.pins), root='else/where')\n"
    )
    for seed in ("1", "2"):  # in the place of what the one before wrote
        other = os.environ | {"PYTHONHASHSEED": seed, "TZ": "Asia/Tokyo", "LC_ALL": "C", "HOSTNAME": "other"}
        subprocess.run([sys.executable, "-c", code], check=True, cwd=tmp_path, env=other)
        assert files_of(tmp_path / "second") == files_of(crate)
        assert (tmp_path / "second.zip").read_bytes() == (tmp_path / "first.zip").read_bytes()
    with zipfile.ZipFile(tmp_path / "second.zip") as archive:
        assert {name: archive.read(name) for name in archive.namelist()} == files_of(crate)


def test_an_attempt_that_the_manifest_does_not_name_is_a_file_and_no_action(
    place: Path, tmp_path: Path, perform: Callable[..., Path]
) -> None:
    perform(name="race/b016/s00-01", outputs=(RUN,))
    failed = ATTEMPTS / "train-race-b016-s02-02-0002.json"
    text = (ATTEMPTS / "train-race-b016-s02-02-0001.json").read_text()
    failed.write_text(text.replace('"finished"', '"failed"').replace("s02-02-0001", "s02-02-0002"))
    write_manifest("fake", FILES)
    write_crate("fake", tmp_path / "crate", today)
    found = entities(tmp_path / "crate")
    assert "#attempt/train-race-b016-s00-01-0002" in found
    for name in ("train-race-b016-s00-01-0001", failed.stem):
        assert f"#attempt/{name}" not in found
        assert "about" not in found[f"{ATTEMPTS}/{name}.json"]
    assert found[f"{ATTEMPTS}/train-race-b016-s00-01-0002.json"]["about"] == {
        "@id": "#attempt/train-race-b016-s00-01-0002"
    }


def test_the_lock_that_the_jobs_ran_under_is_told_from_another(
    place: Path, crate: Path, tmp_path: Path
) -> None:
    before = sha256("requirements.lock")
    assert entities(crate)["requirements.lock"]["description"] == "The lock file that every job ran under."
    with Path("requirements.lock").open("a") as handle:
        handle.write("linter==1\n")
    write_crate("fake", tmp_path / "late", today)
    assert before in entities(tmp_path / "late")["requirements.lock"]["description"]


def test_a_lock_of_the_plan_comes_along(place: Path, tmp_path: Path) -> None:
    Path("preregistration/plan.lock.json").write_text("{}")
    write_crate("fake", tmp_path / "crate", today)
    found = entities(tmp_path / "crate")
    assert {"preregistration/plan.yaml", "preregistration/plan.lock.json"} <= set(
        referred(found["#run"]["object"])
    )


def test_a_name_with_a_space_is_a_uri(
    place: Path, tmp_path: Path, perform: Callable[..., Path], issues: Callable[[Path], list[str]]
) -> None:
    Path("config/two words.txt").write_text("x")
    late = "results/fake/figures/late.svg"
    perform(phase="draw", name="late", inputs=("config/two words.txt",), outputs=(late,), plan=None)
    write_manifest("fake", [*FILES, late])
    write_crate("fake", tmp_path / "crate", today)
    assert (tmp_path / "crate/config/two words.txt").is_file()
    assert referred(entities(tmp_path / "crate")["#attempt/draw-late-0001"]["object"]) == [
        "config/two%20words.txt"
    ]
    assert issues(tmp_path / "crate") == []


@pytest.mark.parametrize("path", [FIGURE, f"{ATTEMPTS}/draw-dose-0001.json"])
def test_what_changed_since_the_manifest_is_named(place: Path, tmp_path: Path, path: str) -> None:
    Path(path).write_text(Path(path).read_text() + " ")
    with pytest.raises(InputError, match=rf"^{path}: changed since .*manifest.json listed it"):
        write_crate("fake", tmp_path / "crate", today)
    assert not list(tmp_path.glob("*crate*"))


@pytest.mark.parametrize(
    ("path", "old", "new"),
    [
        ("preregistration/plan.yaml", "100", "101"),
        ("config/fake.yaml", "width: 8", "width: 9"),
        ("src/gradnoise/base/errors.py", "one line", "a line"),
    ],
)
def test_a_study_that_does_not_trace_gets_no_crate(
    place: Path, tmp_path: Path, path: str, old: str, new: str
) -> None:
    text = Path(path).read_text()
    assert old in text
    Path(path).write_text(text.replace(old, new))
    with pytest.raises(TraceBreak):
        write_crate("fake", tmp_path / "crate", today)
    assert not list(tmp_path.glob("*crate*"))


def test_a_manifest_older_than_what_its_attempts_read_is_refused(place: Path, tmp_path: Path) -> None:
    """A figure was drawn from other numbers, then again to the same bytes; the manifest names the first."""
    manifest: Any = read_json(layout.manifest("fake"))
    first: Any = read_json(ATTEMPTS / "draw-dose-0001.json")
    write_json(ATTEMPTS / "draw-dose-0002.json", first | {"id": "draw-dose-0002", "attempt": 2})
    next(file for file in first["inputs"] if file["path"].endswith("curves.txt"))["sha256"] = "0" * 64
    write_json(ATTEMPTS / "draw-dose-0001.json", first)
    for entry in manifest["files"]:
        if entry["record"] == "draw-dose-0001":
            entry["record_sha256"] = sha256(ATTEMPTS / "draw-dose-0001.json")
    write_json(layout.manifest("fake"), manifest)
    with pytest.raises(InputError, match=r"curves.txt: is not what draw-dose-0001 read.*: run snakemake"):
        write_crate("fake", tmp_path / "crate", today)


def test_a_manifest_that_names_another_attempt_is_refused(place: Path, tmp_path: Path) -> None:
    manifest: Any = read_json(layout.manifest("fake"))
    named = next(entry for entry in manifest["files"] if entry["path"] == RUN)
    figure = next(entry for entry in manifest["files"] if entry["path"] == FIGURE)
    figure |= {"record": named["record"], "record_sha256": named["record_sha256"]}
    write_json(layout.manifest("fake"), manifest)
    with pytest.raises(InputError, match=rf"^{FIGURE}: train-race-b016-s00-01-0001 did not write it"):
        write_crate("fake", tmp_path / "crate", today)


@pytest.mark.parametrize("path", ["../secret.txt", "/etc/hostname", "results/fake/../../../secret.txt"])
def test_nothing_from_outside_the_repository_gets_in(place: Path, tmp_path: Path, path: str) -> None:
    (place.parent / "secret.txt").write_text("secret")
    manifest: Any = read_json(layout.manifest("fake"))
    manifest["files"][0]["path"] = path
    write_json(layout.manifest("fake"), manifest)
    with pytest.raises(InputError, match="must be a plain path inside the repository"):
        write_crate("fake", tmp_path / "crate", today)


def test_a_file_that_changes_while_it_is_copied_is_named(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from rocrate.rocrate import ROCrate

    before, whole = Path(FIGURE).read_bytes(), ROCrate.write

    def late(self: ROCrate, folder: Path) -> None:
        Path(FIGURE).write_text("edited")
        whole(self, folder)

    monkeypatch.setattr(ROCrate, "write", late)
    for name in ("crate", "crate.zip"):
        with pytest.raises(InputError, match=rf"^{FIGURE}: changed while it was copied"):
            write_crate("fake", tmp_path / name, today)
        Path(FIGURE).write_bytes(before)
    assert not list(tmp_path.glob("*crate*"))


def test_missing_parts_are_named(place: Path, tmp_path: Path) -> None:
    for path in ("LICENSE", "workflow/rules/train.smk", layout.manifest("fake")):
        whole = Path(path).read_bytes()
        Path(path).unlink()
        with pytest.raises(InputError, match=rf"^{path}: missing"):
            write_crate("fake", tmp_path / "crate", today)
        Path(path).write_bytes(whole)
    rules = Path("workflow/rules/draw.smk")
    rules.write_text(rules.read_text().replace("gradnoise run draw", "gradnoise run paint"))
    with pytest.raises(InputError, match=r"^draw-dose-0001: no rule runs phase draw"):
        write_crate("fake", tmp_path / "crate", today)
    write_json(layout.manifest("fake"), {"files": [], "label": "REHEARSAL", "study": "fake"})
    with pytest.raises(InputError, match=r"manifest.json: lists no file"):
        write_crate("fake", tmp_path / "crate", today)
    with pytest.raises(InputError, match=r"^study: \.\./x: must be"):
        write_crate("../x", tmp_path / "crate", today)


def test_an_older_crate_of_the_study_is_replaced_and_nothing_else(
    place: Path, tmp_path: Path, perform: Callable[..., Path]
) -> None:
    folder, packed = tmp_path / "crate", tmp_path / "crate.zip"
    folder.mkdir()  # an empty folder is free
    for output in (folder, packed):
        write_crate("fake", output, today)
    before = files_of(folder)
    perform(name="race/b016/s00-01", outputs=(RUN,))
    write_manifest("fake", FILES)
    for output in (folder, packed):
        write_crate("fake", output, today)
    assert files_of(folder) != before
    assert sorted(path.name for path in tmp_path.glob("*crate*")) == ["crate", "crate.zip"]
    (folder / "notes.txt").write_text("mine")
    with pytest.raises(InputError, match=r"notes.txt: the crate that lies there does not list it"):
        write_crate("fake", folder, today)
    assert (folder / "notes.txt").read_text() == "mine"


def test_a_failed_export_leaves_the_older_crate(place: Path, crate: Path, tmp_path: Path) -> None:
    before = files_of(crate)
    Path(FIGURE).write_text("edited")
    with pytest.raises(InputError, match="changed since"):
        write_crate("fake", crate, today)
    assert files_of(crate) == before
    assert [path.name for path in tmp_path.glob("*crate*")] == ["crate"]


def test_other_peoples_files_are_never_replaced(place: Path, crate: Path, tmp_path: Path) -> None:
    full = tmp_path / "full"
    full.mkdir()
    (full / "thesis.txt").write_text("mine")
    (tmp_path / "file").write_text("mine")
    (tmp_path / "plain.zip").write_text("mine")
    (tmp_path / "link").symlink_to(crate)
    (tmp_path / "folder.zip").mkdir()
    other: Any = read_json(crate / METADATA)
    next(part for part in other["@graph"] if part["@id"] == "./")["identifier"] = "gradnoise study other"
    shutil.copytree(crate, tmp_path / "other")
    write_json(tmp_path / "other" / METADATA, other)
    before = files_of(tmp_path)
    for name in ("full", "file", "plain.zip", "link", "folder.zip", "other"):
        with pytest.raises(InputError, match=r"^output: "):
            write_crate("fake", tmp_path / name, today)
    for output in ("results", "results/fake/crate", "results/../results/x.zip", "."):
        with pytest.raises(InputError, match=r"^output: "):
            write_crate("fake", output, today)
    assert files_of(tmp_path) == before


def test_without_rocrate_one_line_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gradnoise.provenance.crate.find_spec", lambda name: None)
    with pytest.raises(InputError, match="^rocrate: not installed: install requirements.lock"):
        write_crate("fake", tmp_path / "crate", today)


def test_rocrate_is_imported_when_it_is_needed() -> None:
    code = "import sys, gradnoise.provenance.crate; sys.exit('rocrate' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
