"""The manifest lists every file with the attempt that wrote it, and refuses what nothing accounts for."""

import json
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from gradnoise.base import layout
from gradnoise.base.errors import InputError
from gradnoise.base.files import sha256
from gradnoise.provenance.manifest import check_manifest, check_stray, write_manifest

FILES = [
    "results/fake/analysis/curves.txt",
    "results/fake/analysis/results.json",
    "results/fake/figures/dose.svg",
    "results/fake/figures/dose.txt",
    "results/fake/figures/other.svg",
    "results/fake/runs/race/b016/s00-01.scores.txt",
    "results/fake/runs/race/b016/s02-02.scores.txt",
]
RUN = "results/fake/runs/race/b016/s00-01.scores.txt"
pytestmark = pytest.mark.usefixtures("study")


def test_every_file_is_listed_with_its_hash_and_its_record() -> None:
    write_manifest("fake", [*reversed(FILES), layout.manifest("fake")])
    manifest = json.loads(Path(layout.manifest("fake")).read_text())
    assert manifest["label"] == "REHEARSAL"
    assert [entry["path"] for entry in manifest["files"]] == FILES
    figure = manifest["files"][2]
    record = Path(layout.attempts("fake"), "draw-dose-0001.json")
    assert figure["record"] == record.stem
    assert figure["record_sha256"] == sha256(record)
    assert (figure["sha256"], figure["size"]) == (sha256(FILES[2]), Path(FILES[2]).stat().st_size)


def test_of_attempts_with_the_same_bytes_the_newest_is_named(perform: Callable[..., Path]) -> None:
    perform(name="race/b016/s00-01", outputs=(RUN,))
    write_manifest("fake", FILES)
    manifest = json.loads(Path(layout.manifest("fake")).read_text())
    assert manifest["files"][FILES.index(RUN)]["record"] == "train-race-b016-s00-01-0002"


def test_a_file_with_other_bytes_than_any_attempt_wrote_is_named() -> None:
    Path(FILES[1]).write_text("edited by hand")
    with pytest.raises(InputError, match=r"^results/fake/analysis/results.json: no finished attempt wrote"):
        write_manifest("fake", FILES)
    assert not Path(layout.manifest("fake")).exists()


def test_an_attempt_that_did_not_finish_accounts_for_nothing() -> None:
    path = Path(layout.attempts("fake"), "draw-dose-0001.json")
    path.write_text(path.read_text().replace('"finished"', '"started"'))
    with pytest.raises(InputError, match=r"^results/fake/figures/dose.svg: no finished attempt"):
        write_manifest("fake", FILES)


def test_a_missing_file_is_named() -> None:
    Path(FILES[0]).unlink()
    with pytest.raises(InputError, match=r"^results/fake/analysis/curves.txt: missing"):
        write_manifest("fake", FILES)


@pytest.mark.parametrize(
    "stray",
    [
        *("fake/figures/old.svg", "fake/runs/.s00.parquet.partial", "fake/notes.txt", "fake/new/deep/x.csv"),
        *("fake/provenance/notes.txt", "fake/provenance/attempts/notes.txt", "notes.txt"),
    ],
)
def test_a_stray_file_is_named_with_its_mend(stray: str) -> None:
    path = Path("results", stray)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch()
    with pytest.raises(InputError, match=rf"^{path}: .*: move it out of results/ or delete it$"):
        write_manifest("fake", FILES)
    path.unlink()
    write_manifest("fake", FILES)
    check_manifest("fake", FILES)
    path.touch()
    with pytest.raises(InputError, match=rf"^{path}: .*: move it out of results/ or delete it$"):
        check_manifest("fake", FILES)


def test_a_linked_folder_is_stray() -> None:
    Path("results/fake/link").symlink_to(Path("config").resolve())
    with pytest.raises(InputError, match=r"^results/fake/link: "):
        check_stray("fake", FILES)


def test_records_ignore_files_and_other_studies_are_not_stray() -> None:
    for path in ("results/fake/.gitignore", "results/.gitignore", "results/other/x.txt"):
        Path(path).parent.mkdir(exist_ok=True)
        Path(path).touch()
    check_stray("fake", FILES)


def test_a_check_reads_and_never_writes() -> None:
    with pytest.raises(InputError, match=r"^results/fake/provenance/manifest.json: missing"):
        check_manifest("fake", FILES)
    write_manifest("fake", FILES)
    before = {path: path.stat().st_mtime_ns for path in Path("results").rglob("*")}
    check_manifest("fake", FILES)
    assert {path: path.stat().st_mtime_ns for path in Path("results").rglob("*")} == before


def test_what_changed_since_the_manifest_is_named() -> None:
    write_manifest("fake", FILES)
    record = Path(layout.attempts("fake"), "draw-dose-0001.json")
    for path in (Path(FILES[2]), record):
        whole = path.read_text()
        path.write_text(f"{whole} ")
        with pytest.raises(InputError, match=rf"^{path}: changed since .*manifest.json listed it: restore"):
            check_manifest("fake", FILES)
        path.write_text(whole)
    with pytest.raises(InputError, match=r"^results/fake/scores.txt: is not a file that .* lists: run"):
        check_manifest("fake", [*FILES, "results/fake/scores.txt"])


def test_what_ran_in_a_dirty_work_tree_cannot_be_published(perform: Callable[..., Path]) -> None:
    identity = ("-c", "user.name=a", "-c", "user.email=a@b.c")
    subprocess.run(["git", "init", "--quiet"], check=True)
    subprocess.run(["git", *identity, "commit", "--quiet", "--allow-empty", "-m", "empty"], check=True)
    perform(name="race/b016/s00-01", outputs=(RUN,))
    write_manifest("fake", FILES)
    said = rf"^{RUN}: train-race-b016-s00-01-0002 wrote it in a work tree with uncommitted changes: "
    with pytest.raises(InputError, match=said):
        check_manifest("fake", FILES)
    # The same bytes again, from a commit that holds the code.
    subprocess.run(["git", "add", "--all"], check=True)
    subprocess.run(["git", *identity, "commit", "--quiet", "-m", "all"], check=True)
    perform(name="race/b016/s00-01", outputs=(RUN,))
    write_manifest("fake", FILES)
    check_manifest("fake", FILES)
