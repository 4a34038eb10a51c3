"""The inventory of a study: every file, its hash, and the attempt that wrote exactly these bytes."""

import os
from collections.abc import Sequence
from pathlib import Path

from gradnoise.base import layout
from gradnoise.base.errors import InputError
from gradnoise.base.files import read_json, sha256, write_json
from gradnoise.base.study import Strict, validated
from gradnoise.provenance.records import file_of, layout_path, producers, read_records


class Entry(Strict):
    """A file of the study, and the newest finished record that names these bytes, itself by its bytes."""

    path: str
    sha256: str
    size: int
    record: str
    record_sha256: str


class Manifest(Strict):
    """Every file of a study, in the order of their names; the label is that of the results."""

    files: tuple[Entry, ...]
    label: str
    study: str


def write_manifest(study: str, files: Sequence[str]) -> None:
    """Write the manifest over `files`, all that the study's rules write; the DAG's last rule.

    Raises `InputError` naming the first file that is missing, that no finished record accounts for, or that
    lies in the study's folder although no rule writes it.
    """
    check_stray(study, files)
    wrote = producers(read_records(study))
    entries = []
    for path in sorted(set(files) - {layout.manifest(study)}):
        file = file_of(path)
        record = wrote.get((path, file.sha256))
        if record is None:
            raise InputError(
                path,
                f"no finished attempt wrote these bytes (sha256 {file.sha256[:12]})",
                "delete it and rebuild it with snakemake",
            )
        digest = sha256(layout_path(study, record.id))
        entries.append(
            Entry(path=path, sha256=file.sha256, size=file.size, record=record.id, record_sha256=digest)
        )
    results = read_json(layout.results(study))
    assert isinstance(results, dict)
    manifest = Manifest(files=tuple(entries), label=results["label"], study=study)
    write_json(layout.manifest(study), manifest.model_dump(mode="json"))


def read_manifest(study: str, root: Path | str = ".") -> Manifest:
    """The manifest of a study; `InputError` where there is none or it is damaged."""
    path = Path(root, layout.manifest(study))
    return validated(Manifest, read_json(path), str(path))


def check_manifest(study: str, files: Sequence[str]) -> None:
    """Whether a study can be published as it lies there; nothing is written.

    Snakemake looks at what its rules read and write, so it calls a study fresh beside a file that somebody
    put there, and it cannot know in which work tree a job ran. Raises `InputError` naming the first file that
    is stray, that is not what the manifest lists (results and records), or that was written in a work tree
    with uncommitted changes: its commit does not hold the code that made it.
    """
    check_stray(study, files)
    listed = {entry.path: entry for entry in read_manifest(study).files}
    if odd := listed.keys() ^ set(files):
        raise InputError(min(odd), f"is not a file that {layout.manifest(study)} lists", "run snakemake")
    records = {record.id: record for record in read_records(study)}
    for entry in listed.values():
        where = layout_path(study, entry.record).as_posix()
        for path, digest in ((entry.path, entry.sha256), (where, entry.record_sha256)):
            if file_of(path).sha256 != digest:
                mend = "restore it (git checkout, dvc pull), or delete it and run snakemake"
                raise InputError(path, f"changed since {layout.manifest(study)} listed it", mend)
        commit = records[entry.record].commit
        if commit is not None and commit.dirty:
            found = f"{entry.record} wrote it in a work tree with uncommitted changes"
            mend = "commit, then rebuild it (delete it and run snakemake; all of them: snakemake --forceall)"
            raise InputError(entry.path, found, mend)


def check_stray(study: str, files: Sequence[str]) -> None:
    """Refuse any file under `results/<study>/`, or directly in `results/`, that nothing accounts for.

    Accounted for are `files`, the manifest, the attempt records and DVC's `.gitignore` files; a hidden
    leftover of a killed job is not. Raises `InputError` naming the first one in alphabetical order.
    """
    folder = Path(layout.manifest(study)).parent.parent
    known = {*files, layout.manifest(study)}
    known |= {path.as_posix() for path in Path(layout.attempts(study)).glob("*.json")}
    found = [path for path in folder.parent.glob("*") if path.is_file()]
    for parent, folders, names in os.walk(folder):
        links = [name for name in folders if Path(parent, name).is_symlink()]  # os.walk does not enter them
        found += [Path(parent, name) for name in [*names, *links]]
    stray = [path.as_posix() for path in found if path.name != ".gitignore" and path.as_posix() not in known]
    if stray:
        raise InputError(min(stray), "no rule writes it", "move it out of results/ or delete it")
