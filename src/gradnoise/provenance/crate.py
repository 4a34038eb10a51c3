"""A study as a Provenance Run Crate 0.5 (RO-Crate 1.1), for readers who have other software.

The crate holds copies of all files of the study and says how they came to be. It is a view of attempt
records, manifest and plan: of a run it says nothing that they do not. It is only written while every file of
the study traces. The same study gives the same bytes, anywhere and at any time.
"""

import json
import os
import re
import shutil
import zipfile
from collections import defaultdict
from importlib.util import find_spec
from pathlib import Path, PurePosixPath
from urllib.parse import unquote

from gradnoise.base import layout
from gradnoise.base.environment import LOCK, PROJECT
from gradnoise.base.errors import InputError
from gradnoise.base.files import atomic, full_disk_named, sha256
from gradnoise.base.study import study_path
from gradnoise.provenance.citation import read_citation
from gradnoise.provenance.crate_entities import WORKFLOW, Evidence, build, identifier
from gradnoise.provenance.manifest import Manifest, read_manifest
from gradnoise.provenance.records import File, Record, layout_path, read_records
from gradnoise.provenance.trace import Today, trace
from gradnoise.registration.lockfile import lock_path

METADATA = "ro-crate-metadata.json"
# Files of the repository that belong to every study.
SOURCES = ("config/config.yaml", LOCK, PROJECT, "LICENSE", "CITATION.cff")
RENEW = "restore it (git checkout, dvc pull), or run snakemake"


def write_crate(study: str, output: Path | str, today: Today, root: Path | str = ".") -> None:
    """Write the crate of a study to the folder `output`, or to one file if its name ends in `.zip`.

    `root` is the repository, `today(record)` what would decide a recorded job today, as `trace` asks. The
    crate appears whole or not at all. In its place there may be nothing, an empty folder, or an older crate
    of the same study and nothing else.

    Raises `InputError` where `output` is something else or lies in `results/`, where a file or a record is
    not what the manifest lists, and where a file of the repository is missing; `TraceBreak` where a file of
    the study no longer traces.
    """
    if find_spec("rocrate") is None:
        raise InputError("rocrate", "not installed", f"install {LOCK} (make does it)")
    root, output = Path(root), Path(output)
    target = _free(output, study, root)
    evidence = gather(study, today, root)
    crate = build(evidence, root)
    packed = output.suffix == ".zip"
    folder = target.with_name(f".{target.name}.{'folder' if packed else 'partial'}")
    shutil.rmtree(folder, ignore_errors=True)
    try:
        with full_disk_named(output):
            crate.write(folder)
            _check_copies(folder, evidence)
            if packed:
                _pack(folder, target)
            else:
                _move(folder, target)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def gather(study: str, today: Today, root: Path) -> Evidence:
    """Everything that a crate of the study is made from, after checking it."""
    settings = study_path(study).as_posix()
    manifest = read_manifest(study, root)
    records = {record.id: record for record in read_records(study, root)}
    named = _named(study, manifest, records, root)
    read = _trace_all(manifest, named, today, root)
    plans = sorted({record.plan.path for record in named if record.plan})
    plans += [lock for plan in plans if (root / (lock := lock_path(plan).as_posix())).is_file()]
    rules = _rules(root)
    for record in named:
        if record.phase not in rules:
            raise InputError(record.id, f"no rule runs phase {record.phase}", f"check the {WORKFLOW}'s rules")
    sources = [WORKFLOW, *_included(root), settings, *SOURCES, *plans, *read]
    return Evidence(
        study=study,
        label=manifest.label,
        citation=read_citation(root),
        manifest=_file(layout.manifest(study), root),
        results=tuple(_file(entry.path, root) for entry in manifest.files),
        wrote={entry.path: entry.record for entry in manifest.files},
        records=tuple(named),
        attempts={name: _file(layout_path(study, name).as_posix(), root) for name in sorted(records)},
        sources=tuple(_file(path, root) for path in dict.fromkeys(sources)),
        plans=tuple(plans),
        rules=rules,
    )


def _named(study: str, manifest: Manifest, records: dict[str, Record], root: Path) -> list[Record]:
    """The attempts that the manifest names, oldest first, once manifest, files and records agree."""
    listed = {entry.path: entry.sha256 for entry in manifest.files}
    named = {}
    for entry in manifest.files:
        where = layout_path(study, entry.record).as_posix()
        for path, digest in ((entry.path, entry.sha256), (where, entry.record_sha256)):
            if _file(path, root).sha256 != digest:
                raise InputError(path, f"changed since {layout.manifest(study)} listed it", RENEW)
        record = named[entry.record] = records[entry.record]
        if (entry.path, entry.sha256) not in {(file.path, file.sha256) for file in record.outputs}:
            raise InputError(entry.path, f"{record.id} did not write it, as the manifest says", RENEW)
    for record in named.values():
        for file in record.inputs:
            if file.path.startswith(f"results/{study}/") and listed.get(file.path) != file.sha256:
                found = f"is not what {record.id} read, which the manifest names"
                raise InputError(file.path, found, "run snakemake")
    if not named:
        raise InputError(layout.manifest(study), "lists no file", RENEW)
    return sorted(named.values(), key=lambda record: (record.end or record.start, record.id))


def _trace_all(manifest: Manifest, named: list[Record], today: Today, root: Path) -> list[str]:
    """Trace the files of every attempt; gives what the jobs read that none of them wrote."""
    first = {entry.record: entry.path for entry in reversed(manifest.files)}
    done: set[str] = set()
    # The newest first: most others lie behind it.
    for record in reversed(named):
        if record.id not in done:
            done |= {step.record.id for step in trace(first[record.id], today, root).steps}
    written = {entry.path for entry in manifest.files}
    return sorted({file.path for record in named for file in record.inputs} - written)


def _included(root: Path) -> list[str]:
    """The files of rules, in the order in which the Snakefile includes them."""
    return re.findall(r'^include:\s*"(.+)"$', _text(WORKFLOW, root), re.MULTILINE)


def _rules(root: Path) -> dict[str, str]:
    """The rule that runs each phase, or the rules, in the order of the workflow."""
    rules: dict[str, list[str]] = defaultdict(list)
    for path in _included(root):
        for rule, body in re.findall(r"^rule (\w+):\n((?:[ \t].*\n|\n)*)", _text(path, root), re.MULTILINE):
            if command := re.search(r"gradnoise run (\w+)", body):
                rules[command[1]].append(rule)
    return {phase: " or ".join(names) for phase, names in rules.items()}


def _text(path: str, root: Path) -> str:
    _file(path, root)
    return (root / path).read_text(encoding="utf-8")


def _file(path: str, root: Path) -> File:
    """A file of the repository as it is now; `InputError` for one that is missing or lies elsewhere."""
    pure = PurePosixPath(path)
    if pure.is_absolute() or ".." in pure.parts or pure.as_posix() != path:
        raise InputError("path", path, "must be a plain path inside the repository")
    if not (root / path).is_file():
        raise InputError(path, "missing", "restore it (git checkout, dvc pull)")
    return File(path=path, sha256=sha256(root / path), size=(root / path).stat().st_size)


def _free(output: Path, study: str, root: Path) -> Path:
    """Where to write; refuses a place with something in it that this study's crate did not put there."""
    target = Path(os.path.abspath(output))
    if target.resolve().is_relative_to((root / "results").resolve()):
        raise InputError("output", output, "must not lie in results/: only what rules write lies there")
    if target.is_symlink() or (target.exists() and target.is_dir() == (output.suffix == ".zip")):
        raise InputError("output", output, "give a folder, or the name of a file that ends in .zip")
    if not target.exists() or (target.is_dir() and not any(target.iterdir())):
        return target
    mend = "give another name, or delete it"
    listed, found = _older(target, study)
    if listed is None:
        raise InputError("output", output, f"is no crate of study {study}: {mend}")
    for path in sorted(found):
        if path not in listed:
            raise InputError(f"{output}/{path}", "the crate that lies there does not list it", mend)
    return target


def _older(target: Path, study: str) -> tuple[set[str] | None, list[str]]:
    """What the crate that lies there lists, None if it is none of the study; and the files that are there."""
    try:
        if target.is_dir():
            found = [path.relative_to(target).as_posix() for path in target.rglob("*") if not path.is_dir()]
            metadata = json.loads((target / METADATA).read_bytes())
        else:
            with zipfile.ZipFile(target) as archive:
                found, metadata = archive.namelist(), json.loads(archive.read(METADATA))
        parts = {part["@id"]: part for part in metadata["@graph"]}
        if parts["./"]["identifier"] == identifier(study):
            return {METADATA, *(unquote(part["@id"]) for part in parts["./"]["hasPart"])}, found
    except (OSError, ValueError, KeyError, TypeError, zipfile.BadZipFile):
        pass
    return None, []


def _check_copies(folder: Path, evidence: Evidence) -> None:
    """What was copied is what was checked: nothing changed meanwhile."""
    for file in evidence.files:
        if sha256(folder / file.path) != file.sha256:
            raise InputError(file.path, "changed while it was copied", "wait for running jobs, then repeat")


def _move(folder: Path, target: Path) -> None:
    """Put the new crate in the place of an older one."""
    older = target.with_name(f".{target.name}.older")
    shutil.rmtree(older, ignore_errors=True)
    if target.exists():
        os.rename(target, older)
    os.rename(folder, target)
    shutil.rmtree(older, ignore_errors=True)


def _pack(folder: Path, target: Path) -> None:
    """Pack the crate into one file: names in order and one date for all, so equal crates are equal bytes."""
    with atomic(target) as temporary, zipfile.ZipFile(temporary, "w", zipfile.ZIP_DEFLATED) as archive:
        for path in sorted(path for path in folder.rglob("*") if path.is_file()):
            entry = zipfile.ZipInfo(path.relative_to(folder).as_posix())
            entry.external_attr = 0o644 << 16
            archive.writestr(entry, path.read_bytes(), zipfile.ZIP_DEFLATED)
