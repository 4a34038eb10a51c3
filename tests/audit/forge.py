"""What a skilled cheat does to cover his tracks: every file that names another one is made to agree with it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
from ruamel.yaml import YAML
from tests.audit.fixture_study import NAME, Repository

from gradnoise.analysis.analyse import analyse
from gradnoise.base import layout, tables
from gradnoise.base.files import read_json, sha256, write_json
from gradnoise.base.study import load_study
from gradnoise.figures.draw import draw
from gradnoise.noise.measure import measure
from gradnoise.phases import outputs
from gradnoise.provenance.manifest import write_manifest
from gradnoise.report.render import render

TABLES = {table.name: table for table in vars(tables).values() if isinstance(table, tables.Table)}
PHASES = {"measure": measure, "analyse": analyse, "draw": draw, "report": render}
RESULTS = layout.results(NAME)
Change = Callable[[pd.DataFrame], pd.DataFrame]


def rewrite(repository: Repository, path: str, change: Change) -> None:
    """Change the rows of a table and write it as the project writes it: checksums and statistics are right."""
    with repository.inside():
        notes = {key.decode(): value.decode() for key, value in (pq.read_schema(path).metadata or {}).items()}
        table, label = TABLES[notes.pop("table")], notes.pop("label")
        frame = change(pq.read_table(path).to_pandas())
        columns = pa.Table.from_pandas(frame, schema=table.schema(), preserve_index=False)
        tables.write_table(path, table, columns, label, notes)


def rewrite_json(repository: Repository, path: str, change: Callable[[Any], None]) -> None:
    """Change a JSON file and write it as the project writes it."""
    value = read_json(repository.file(path))
    change(value)
    write_json(repository.file(path), value)


def rerun(repository: Repository, *phases: str) -> None:
    """Carry phases out again; nothing is recorded."""
    with repository.inside():
        for phase in phases:
            PHASES[phase](NAME)


def seal(repository: Repository) -> None:
    """Records, manifest and dvc.lock name the bytes that lie there now."""
    with repository.inside():
        for path in sorted(Path(layout.attempts(NAME)).glob("*.json")):
            record = read_json(path)
            assert isinstance(record, dict)
            for file in (*record["inputs"], *record["outputs"]):
                if Path(file["path"]).is_file():
                    file |= {"sha256": sha256(file["path"]), "size": Path(file["path"]).stat().st_size}
                    if file["rows"] is not None:
                        file["rows"] = pq.read_metadata(file["path"]).num_rows
            write_json(path, record)
        write_manifest(NAME, outputs(NAME, load_study(NAME)))
        seal_dvc()


def seal_dvc() -> None:
    """dvc.lock names the bytes that lie there now, as `dvc commit` would."""
    yaml = YAML()
    yaml.width = 1000
    lock = yaml.load(Path("dvc.lock").read_text())
    for stage in lock["stages"].values():
        for file in (*stage.get("deps", ()), *stage.get("outs", ())):
            path = Path(file["path"])
            if path.is_dir():
                inside = sorted(
                    each for each in path.rglob("*") if each.is_file() and "__pycache__" not in each.parts
                )
                listing = [
                    {"md5": _md5(each.read_bytes()), "relpath": each.relative_to(path).as_posix()}
                    for each in inside
                ]
                listing.sort(key=lambda entry: entry["relpath"])
                file["md5"] = _md5(json.dumps(listing, sort_keys=True).encode()) + ".dir"
                file["size"] = sum(each.stat().st_size for each in inside)
                file["nfiles"] = len(inside)
            elif path.is_file():
                file |= {"md5": _md5(path.read_bytes()), "size": path.stat().st_size}
    with Path("dvc.lock").open("w") as handle:
        yaml.dump(lock, handle)


def amend(repository: Repository) -> None:
    """The last commit holds what lies there now, as if it always had."""
    repository.git("add", "--all")
    repository.git("commit", "--quiet", "--amend", "--no-edit", "--allow-empty")


def _md5(content: bytes) -> str:
    return hashlib.md5(content, usedforsecurity=False).hexdigest()
