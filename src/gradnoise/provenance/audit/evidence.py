"""What the checks look at: a study's files, each read by itself and read once."""

from __future__ import annotations

import hashlib
import hmac
import json
import math
import os
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

from gradnoise.base import layout, strict_yaml
from gradnoise.base.study import Study, study_path, validated
from gradnoise.provenance.audit.findings import Breach
from gradnoise.provenance.audit.git import Git
from gradnoise.provenance.manifest import Manifest
from gradnoise.provenance.records import Record
from gradnoise.registration.lockfile import Lock, deviations_path, lock_path
from gradnoise.registration.plan import Plan, load_plan

if TYPE_CHECKING:
    import pandas as pd
    import pyarrow as pa

    from gradnoise.provenance.audit.compared import Compared
    from gradnoise.provenance.audit.mirror import Mirror
    from gradnoise.registration.deviations import Deviation


@dataclass(frozen=True)
class PlannedRun:
    """A run that plan and settings ask for, named and seeded by the auditor's own code."""

    run_id: str
    block: str
    cell: str
    seed_index: int
    seed: int
    job: str


class Evidence:
    """A study in the working folder. What cannot be read raises whenever a check asks for it."""

    def __init__(self, name: str, spot_runs: int = 0) -> None:
        self.name, self.spot_runs = name, spot_runs
        self.git = Git()
        self._hashes: dict[str, str] = {}
        self._documents: dict[str, dict[str, Any]] = {}
        self._tables: dict[str, pa.Table] = {}
        self._gathered: dict[str, pd.DataFrame] = {}

    @cached_property
    def study(self) -> Study:
        """The study's settings."""
        path = study_path(self.name).as_posix()
        return validated(Study, self.document(path), path)

    @cached_property
    def plan(self) -> Plan:
        """The plan that decides."""
        plain(self.study.plan)
        return load_plan(self.study.plan)

    @cached_property
    def plan_document(self) -> dict[str, Any]:
        """The plan as it is written."""
        return self.document(self.study.plan)

    @property
    def registered(self) -> bool:
        """Whether the study is a registered one, which has a lock."""
        return self.plan.study.kind == "registered"

    @cached_property
    def lock(self) -> Lock:
        """The lock of a registered plan."""
        path = str(lock_path(self.study.plan))
        return validated(Lock, read_json(path), path)

    @cached_property
    def allowed(self) -> Lock:
        """The lock with what its deviations say was done instead."""
        document = self.lock.model_dump(mode="json")
        for deviation in self.deviations:
            if deviation.document == "lock":
                *above, last = [
                    s.replace("~1", "/").replace("~0", "~") for s in deviation.pointer.split("/")[1:]
                ]
                place: Any = document
                for step in above:
                    place = place[step]
                place[last] = deviation.actual
        return validated(Lock, document, f"{self.lock_file} with its deviations")

    @property
    def lock_file(self) -> str:
        """Where the lock is."""
        return lock_path(self.study.plan).as_posix()

    @cached_property
    def key(self) -> str:
        """What seeds and run names follow from: canonical hash of the plan, then the lock's public value."""
        beacon = self.lock.beacon if self.registered else ""
        return sha256_of(self.plan_document) + beacon

    @cached_property
    def planned(self) -> dict[str, PlannedRun]:
        """Every run of the design by its name."""
        runs = {}
        for block_name, block in self.study.blocks.items():
            for cell in block.cells():
                for index in range(block.seeds):
                    start = index - index % block.seeds_per_job
                    last = min(start + block.seeds_per_job, block.seeds) - 1
                    name = sha256_of([self.key, block_name, cell.name, index])[:16]
                    job = f"{block_name}/{cell.name}/s{start:02d}-{last:02d}"
                    place = (block_name, cell.name, index)
                    runs[name] = PlannedRun(name, *place, seed_of(self.key, index), job)
        return runs

    @cached_property
    def manifest(self) -> Manifest:
        """The inventory of the study."""
        path = layout.manifest(self.name)
        return validated(Manifest, read_json(path), path)

    @cached_property
    def records(self) -> list[Record]:
        """Every attempt record, oldest first."""
        found = []
        for path in sorted(plain(layout.attempts(self.name)).glob("*.json")):
            if path.stat().st_size:  # else killed before it could say anything
                record = validated(Record, read_json(path), str(path))
                if record.id != path.stem:
                    raise Breach(f"{path} is the record {record.id}")
                found.append(record)
        return sorted(found, key=lambda record: (record.end or record.start, record.id))

    @cached_property
    def listed_records(self) -> list[Record]:
        """The records that the manifest names, each once."""
        by_id = {record.id: record for record in self.records}
        return [by_id[name] for name in dict.fromkeys(entry.record for entry in self.manifest.files)]

    @cached_property
    def results(self) -> dict[str, Any]:
        """`results.json`."""
        value = read_json(layout.results(self.name))
        if not isinstance(value, dict):
            raise Breach(f"{layout.results(self.name)} is no object")
        return value

    @cached_property
    def deviation_lines(self) -> list[bytes]:
        """Lines of the log of deviations; a rehearsal has none."""
        log = plain(deviations_path(self.study.plan))
        return log.read_bytes().splitlines(keepends=True) if self.registered and log.is_file() else []

    @cached_property
    def deviations(self) -> list[Deviation]:
        """What the log says, whether its chain holds or not: A25 sees to that."""
        from gradnoise.registration.deviations import Deviation

        where = deviations_path(self.study.plan).as_posix()
        return [validated(Deviation, parse_json(line, where), where) for line in self.deviation_lines]

    @cached_property
    def compared(self) -> Compared:
        """Which runs are compared where under the plan, by the auditor's own code."""
        return self.compared_under(self.plan)

    def compared_under(self, plan: Plan) -> Compared:
        """The same under another plan, such as the one that deviations make."""
        from gradnoise.provenance.audit.compared import Compared

        scores, exposure = layout.scores(self.name), layout.exposure(self.name)
        return Compared(plan, self.study, self.planned, self.frame(scores), self.frame(exposure))

    @cached_property
    def mirror(self) -> Mirror:
        """What results.json must hold, by the auditor's own code."""
        from gradnoise.provenance.audit.mirror import Mirror

        return Mirror(self.compared, self.key, self.results["tests"])

    @cached_property
    def tests(self) -> list[dict[str, Any]]:
        """Entries of `tests` as they must be, without labels."""
        return self.mirror.tests()

    def document(self, path: str) -> dict[str, Any]:
        """A YAML file as it is written."""
        if path not in self._documents:
            self._documents[path] = strict_yaml.load(plain(path))
        return self._documents[path]

    def table(self, path: str) -> pa.Table:
        """A Parquet file, its page checksums verified."""
        if path not in self._tables:
            from pyarrow.parquet import ParquetFile

            if not plain(path).is_file():
                raise Breach(f"{path} is missing: rebuild it with snakemake, or fetch it with dvc pull")
            self._tables[path] = ParquetFile(plain(path), page_checksum_verification=True).read()
        return self._tables[path]

    def frame(self, path: str) -> pd.DataFrame:
        """A table as a frame."""
        frame: pd.DataFrame = self.table(path).to_pandas()
        return frame

    def rows(self, path: str) -> list[dict[str, Any]]:
        """A table as rows; what is null is None."""
        rows: list[dict[str, Any]] = self.table(path).to_pylist()
        return rows

    def runs_frame(self, name: str) -> pd.DataFrame:
        """One table of all training jobs, in the order of the jobs."""
        if name not in self._gathered:
            import pyarrow as pa

            paths = [layout.run(self.name, *job, name) for job in self.study.jobs()]
            self._gathered[name] = pa.concat_tables([self.table(path) for path in paths]).to_pandas()
        return self._gathered[name]

    def sha256(self, path: str) -> str:
        """SHA-256 of a file of the repository, taken once."""
        if path not in self._hashes:
            self._hashes[path] = hashlib.sha256(plain(path).read_bytes()).hexdigest()
        return self._hashes[path]


def seed_of(key: str, index: int) -> int:
    """HMAC-SHA256(key, "seed/" + index) >> 193."""
    digest = hmac.new(key.encode(), f"seed/{index}".encode(), hashlib.sha256).digest()
    return int.from_bytes(digest, "big") >> 193


def canonical(value: object) -> bytes:
    """Canonical JSON: sorted keys, no spaces, UTF-8."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False, ensure_ascii=False)
    return text.encode()


def sha256_of(value: object) -> str:
    """SHA-256 of the canonical JSON of a value."""
    return hashlib.sha256(canonical(value)).hexdigest()


def plain(path: Path | str) -> Path:
    """A path inside the repository with no symbolic link on the way; else a breach."""
    text = Path(path).as_posix()
    parts = PurePosixPath(text).parts
    if not parts or text.startswith("/") or ".." in parts or "\\" in text or not text.isprintable():
        raise Breach(f"{text!r} leads out of the repository")
    for length in range(1, len(parts) + 1):
        step = os.path.join(*parts[:length])
        if os.path.islink(step):
            raise Breach(f"{step} is a symbolic link")
    return Path(text)


def read_json(path: Path | str) -> Any:
    """A JSON file without repeated keys and without NaN."""
    file = plain(path)
    if not file.is_file():
        raise Breach(f"{file} is missing: rebuild it with snakemake, or fetch it with dvc pull")
    return parse_json(file.read_bytes(), str(file))


def parse_json(text: bytes, where: str) -> Any:
    """The value of JSON text; a breach for repeated keys, numbers that are not finite, and bad syntax."""

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            names = [name for name, _ in pairs]
            raise Breach(f"{where}: {max(names, key=names.count)} is given twice")
        return found

    def refused(text: str) -> float:
        raise Breach(f"{where}: {text} is no number of JSON")

    def finite(text: str) -> float:
        value = float(text)
        return value if math.isfinite(value) else refused(text)

    try:
        return json.loads(text, object_pairs_hook=once, parse_constant=refused, parse_float=finite)
    except (ValueError, RecursionError) as error:
        raise Breach(f"{where} is not whole JSON ({error})") from error
