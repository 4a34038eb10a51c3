"""The inventory of a study: every file, its hash, and the attempt that wrote exactly these bytes."""

import os
from collections.abc import Sequence
from pathlib import Path

from gradnoise.base import layout
from gradnoise.base.errors import InputError
from gradnoise.base.files import read_json, sha256, write_json
from gradnoise.provenance.records import file_of, layout_path, producers, read_records


def write_manifest(study: str, files: Sequence[str]) -> None:
    """Write the manifest over `files`, all that the study's rules write; the DAG's last rule.

    Each file is listed with SHA-256, size, the newest finished record that names these bytes, and that
    record's own SHA-256; the label is that of the results. Raises `InputError` naming the first file that is
    missing, that no finished record accounts for, or that lies in the study's folder although no rule
    writes it.
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
        entries.append(
            {
                "path": path,
                "sha256": file.sha256,
                "size": file.size,
                "record": record.id,
                "record_sha256": sha256(layout_path(study, record.id)),
            }
        )
    results = read_json(layout.results(study))
    assert isinstance(results, dict)
    write_json(layout.manifest(study), {"label": results["label"], "study": study, "files": entries})


def check_stray(study: str, files: Sequence[str]) -> None:
    """Refuse any file under `results/<study>/` that is not in `files`, hidden leftovers included.

    The folder `provenance/` and DVC's `.gitignore` files are not looked at. Raises `InputError` naming the
    first stray file in alphabetical order.
    """
    folder = Path(layout.manifest(study)).parent.parent
    known = set(files)
    stray = []
    for parent, folders, names in os.walk(folder):
        if Path(parent) == folder and "provenance" in folders:
            folders.remove("provenance")
        links = [name for name in folders if Path(parent, name).is_symlink()]  # os.walk does not enter them
        paths = [Path(parent, name).as_posix() for name in [*names, *links] if name != ".gitignore"]
        stray += [path for path in paths if path not in known]
    if stray:
        raise InputError(min(stray), "no rule writes it", "move it out of results/ or delete it")
