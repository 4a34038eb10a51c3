"""Checks of the files: their bytes, and of tables what the bytes say."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gradnoise import phases
from gradnoise.base import layout, tables
from gradnoise.base.digest import table_digest
from gradnoise.evaluation.names import NAMES
from gradnoise.provenance.audit.evidence import Evidence, plain
from gradnoise.provenance.audit.findings import check, settle
from gradnoise.provenance.audit.history import DVC_LOCK, dvc_outs

if TYPE_CHECKING:
    import pyarrow as pa

# What identifies a row of each table.
KEYS = {
    "plays": ("play",),
    "scores": ("run_id", "branch", "score"),
    "trajectory": ("run_id", "segment", "step"),
    "noise_events": ("run_id", "segment", "step"),
    "noise_parts": ("run_id", "segment", "step", "kind", "part"),
    "exposure": ("run_id", "branch", "definition"),
    "exposure_parts": ("run_id", "branch", "kind", "part", "definition"),
    "matched": ("run_id", "matching", "quantity"),
    "fates": ("run_id",),
    "flow": ("block", "cell", "stage"),
    "curves": ("matching", "curve", "x"),
    "explained": ("matching", "predictor", "statistic"),
}


@check(
    "A09",
    "every file has the bytes that manifest, records and dvc.lock name; none is there besides",
    "critical",
)
def bytes_of_files(evidence: Evidence) -> str:
    """Hashed here, file by file: `dvc status` trusts times and sizes."""
    folder = f"results/{evidence.name}"
    faults = list(_strays(evidence, folder))
    about = (evidence.manifest.study, evidence.manifest.label)
    if about != (evidence.name, evidence.plan.study.label):
        faults.append(f"the manifest is of study {about[0]}, labelled {about[1]}")
    listed = {entry.path: entry for entry in evidence.manifest.files}
    wrote = {
        (record.id, output.path, output.sha256)
        for record in evidence.records
        if record.status == "finished"
        for output in record.outputs
    }
    for path, entry in listed.items():
        record = f"{layout.attempts(evidence.name)}/{entry.record}.json"
        if not path.startswith(f"{folder}/") or not plain(path).is_file():
            faults.append(f"{path} is listed and is no file of the study")
            continue
        if (evidence.sha256(path), plain(path).stat().st_size) != (entry.sha256, entry.size):
            faults.append(f"{path}: its bytes are not those that the manifest lists{_content(path, folder)}")
        if (entry.record, path, entry.sha256) not in wrote:
            faults.append(f"{path}: {entry.record} did not write the bytes that the manifest lists")
        if evidence.sha256(record) != entry.record_sha256:
            faults.append(f"{record}: its bytes are not those that the manifest lists")
    faults += [
        f"{path} is {'listed, but no rule writes it' if path in listed else 'not listed'}"
        for path in sorted(listed.keys() ^ set(phases.outputs(evidence.name, evidence.study)))
    ]
    faults += _dvc_faults(evidence, folder, sorted({*listed, layout.manifest(evidence.name)}))
    count = len(listed) + len(evidence.records) + 1
    return settle(
        faults, f"{count} files hashed: SHA-256 as in the manifest, MD5 as in {DVC_LOCK}; no other file"
    )


def _strays(evidence: Evidence, folder: str) -> Iterator[str]:
    """Files that nothing accounts for, and symbolic links."""
    records = {f"{layout.attempts(evidence.name)}/{path.name}" for path in _attempts(evidence)}
    known = {entry.path for entry in evidence.manifest.files} | records | {layout.manifest(evidence.name)}
    for path in _walk(folder):
        if os.path.islink(path):
            yield f"{path} is a symbolic link"
        elif path not in known and not _written_by_dvc(path):
            yield f"{path}: nothing accounts for it"
    for place in plain("results").iterdir():
        if place.is_file() and not _written_by_dvc(place.as_posix()):
            yield f"{place.as_posix()}: nothing accounts for it"


def _written_by_dvc(path: str) -> bool:
    """Whether a file is DVC's note to Git: a .gitignore that names outs beside it, and nothing else."""
    if os.path.basename(path) != ".gitignore":
        return False
    outs = {str(out["path"]) for out in dvc_outs(plain(DVC_LOCK).read_bytes())}
    lines = plain(path).read_bytes().decode(errors="replace").splitlines()
    return all(line.startswith("/") and f"{os.path.dirname(path)}{line}" in outs for line in lines)


def _attempts(evidence: Evidence) -> list[Path]:
    return sorted(plain(layout.attempts(evidence.name)).glob("*.json"))


def _walk(folder: str) -> Iterator[str]:
    """Every file and every link under a folder."""
    plain(folder)
    for parent, folders, names in os.walk(folder):
        for name in [*names, *folders]:
            path = Path(parent, name).as_posix()
            if name in names or os.path.islink(path):
                yield path


def _dvc_faults(evidence: Evidence, folder: str, files: list[str]) -> Iterator[str]:
    """Outs of the study in dvc.lock against the files, and files that no out covers."""
    outs = [out for out in dvc_outs(plain(DVC_LOCK).read_bytes()) if _inside(str(out["path"]), folder)]
    for out in outs:
        found = _md5(str(out["path"]))
        if found is None or (found[0], found[1]) != (out["md5"], out.get("size", found[1])):
            what = (
                "is missing" if found is None else f"has MD5 {found[0][:12]}, {out['md5'][:12]} in {DVC_LOCK}"
            )
            yield f"{out['path']} {what}"
    covered = [str(out["path"]) for out in outs]
    for path in files:
        if not any(_inside(path, out) for out in covered):
            yield f"{path}: no out of {DVC_LOCK} covers it"


def _inside(path: str, folder: str) -> bool:
    return path == folder or path.startswith(f"{folder}/")


def _md5(path: str) -> tuple[str, int] | None:
    """MD5 and size as DVC 3 has them: of a folder, that of the JSON list of its files by relative path."""
    place = plain(path)
    if place.is_file():
        content = place.read_bytes()
        return hashlib.md5(content, usedforsecurity=False).hexdigest(), len(content)
    if not place.is_dir():
        return None
    entries, size = [], 0
    for file in sorted(_walk(path), key=lambda file: os.path.relpath(file, path)):
        found = _md5(file)
        if found is not None:
            entries.append({"md5": found[0], "relpath": os.path.relpath(file, path)})
            size += found[1]
    text = json.dumps(entries, sort_keys=True).encode()
    return hashlib.md5(text, usedforsecurity=False).hexdigest() + ".dir", size


def _content(path: str, folder: str) -> str:
    """Of a table whose bytes differ: whether its content does, by the version that DVC's store has."""
    if not path.endswith(".parquet"):
        return ""
    original = _original(path, folder)
    if original is None:
        return ""
    try:
        equal = table_digest(original) == table_digest(Path(path))
    except Exception:
        return "; it is no whole table"
    return "; bytes differ, content equal" if equal else "; its content differs too"


def _original(path: str, folder: str) -> Path | None:
    """The file in DVC's store or cache that dvc.lock names for a path."""
    for out in dvc_outs(plain(DVC_LOCK).read_bytes()):
        where, digest = str(out["path"]), str(out["md5"])
        if not _inside(path, where) or not _inside(where, folder):
            continue
        listing = _stored(digest)
        if digest.endswith(".dir") and listing is not None:
            names = {entry["relpath"]: entry["md5"] for entry in json.loads(listing.read_bytes())}
            digest = names.get(os.path.relpath(path, where), "")
        return _stored(digest)
    return None


def _stored(digest: str) -> Path | None:
    for store in ("dvc-store", ".dvc/cache"):
        path = Path(store, "files", "md5", digest[:2], digest[2:])
        if digest and path.is_file():
            return path
    return None


@check("A11", "every table is whole: checksums, statistics, schema, rows, keys", "critical")
def whole_tables(evidence: Evidence) -> str:
    """Page checksums, minima and maxima of row groups against their content, no row twice or missing."""
    recorded = {o.path: o.rows for record in evidence.listed_records for o in record.outputs}
    faults: list[str] = []
    paths = [entry.path for entry in evidence.manifest.files if entry.path.endswith(".parquet")]
    for path in paths:
        try:
            faults += [f"{path}: {fault}" for fault in _table_faults(evidence, path, recorded.get(path))]
        except Exception as error:
            faults.append(f"{path} cannot be read whole: {error}")
    faults += _score_faults(evidence) if not faults else []
    return settle(faults, f"{len(paths)} tables: checksums verified, statistics as the content, no row twice")


def _table_faults(evidence: Evidence, path: str, rows: int | None) -> Iterator[str]:
    from pyarrow.parquet import ParquetFile

    file = ParquetFile(plain(path), page_checksum_verification=True)
    content = file.read()
    metadata = content.schema.metadata or {}
    table = _TABLES.get(metadata.get(b"table", b"").decode())
    stem = Path(path).name.split(".")[-2]
    if table is None or (stem in KEYS and table.name != stem):
        yield "names no table of this place"
        return
    if not content.schema.equals(table.schema(), check_metadata=False):
        yield f"is not the schema of table {table.name}"
        return
    if any(content.schema.field(f.name).metadata != f.metadata for f in table.schema()):
        yield "its columns have other units or meanings"
    if metadata.get(b"label", b"").decode() != evidence.plan.study.label:
        yield "carries the label of another study"
    if content.num_rows != rows or file.metadata.num_rows != rows:
        yield f"has {content.num_rows} rows, {rows} were recorded"
    yield from _value_faults(table, content)
    for group in range(file.num_row_groups):
        yield from _statistics_faults(file, group)


def _value_faults(table: tables.Table, content: pa.Table) -> Iterator[str]:
    import pyarrow.compute as pc

    for column in table.columns:
        values = content[column.name]
        if values.null_count and not column.nullable:
            yield f"{column.name} has nulls"
        if column.type == "float" and not pc.all(pc.is_finite(values), min_count=0).as_py():
            yield f"{column.name} has NaN or infinity"
    key = KEYS.get(table.name)
    if key:
        groups = content.select(list(key)).group_by(list(key)).aggregate([]).num_rows
        if groups != content.num_rows:
            yield f"{content.num_rows - groups} rows are there twice"


def _statistics_faults(file: Any, group: int) -> Iterator[str]:
    """What the footer says of a row group's columns against the values themselves."""
    import pyarrow.compute as pc

    about, values = file.metadata.row_group(group), file.read_row_group(group)
    for place in range(about.num_columns):
        column = about.column(place)
        said, own = column.statistics, values[column.path_in_schema]
        if said is None or not said.has_min_max:
            continue
        ends = pc.min_max(own).as_py()
        if (said.min, said.max) != (ends["min"], ends["max"]):
            found = f"found {ends['min']} to {ends['max']}"
            yield f"{column.path_in_schema}: statistics say {said.min} to {said.max}, {found}"
        if said.has_null_count and said.null_count != own.null_count:
            yield f"{column.path_in_schema}: statistics say {said.null_count} nulls, found {own.null_count}"


def _score_faults(evidence: Evidence) -> Iterator[str]:
    """Branches without every score of their task, or with scores that their status does not allow."""
    path = layout.scores(evidence.name)
    branches: dict[tuple[str, str, int], list[dict[str, Any]]] = {}
    for row in evidence.rows(path):
        branches.setdefault((row["block"], row["run_id"], row["branch"]), []).append(row)
    for (block, run, branch), rows in branches.items():
        where = f"{path}: run {run}, branch {branch}"
        if {row["score"]: row["unit"] for row in rows} != NAMES[evidence.study.block(block).task.kind]:
            yield f"{where} has not exactly the scores of its task"
        told = {row["status"] for row in rows}
        there = {None not in (row["value"], row["stderr"]) for row in rows}
        if (told, there) not in (({"finished"}, {True}), ({"diverged"}, {False})):
            yield f"{where} is called {' and '.join(sorted(told))}, and its scores tell otherwise"


_TABLES = {value.name: value for value in vars(tables).values() if isinstance(value, tables.Table)}
