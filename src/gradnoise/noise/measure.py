"""Phase measure: the runs' raw noise logs become exposure tables, the runs' scores one table."""

import math
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import fields
from typing import Any

import pyarrow as pa

from gradnoise.base import layout
from gradnoise.base.study import load_study
from gradnoise.base.tables import (
    EXPOSURE,
    EXPOSURE_PARTS,
    NOISE_EVENTS,
    NOISE_PARTS,
    SCORES,
    Table,
    label_of,
    read_table,
    write_table,
)
from gradnoise.noise.estimate import Estimate
from gradnoise.noise.integrals import PART_DEFINITIONS, UNITS, Event, Part, Trace, averages, integrate

Row = dict[str, Any]

TRUNK = 0


def measure(study: str) -> None:
    """Integrate every run's events to the end of each of its branches, and gather the scores.

    The exposure of branch k is that of the trunk up to the branch plus that of the branch itself. Writes
    `layout.exposure`, `layout.exposure_parts` and `layout.scores`.
    """
    scores = _gather(study, "scores", SCORES)
    label = label_of(scores)
    write_table(layout.scores(study), SCORES, scores, label)
    events = _by_run(_gather(study, "noise_events", NOISE_EVENTS))
    parts = _by_run(_gather(study, "noise_parts", NOISE_PARTS))
    totals: dict[str, list[object]] = {column.name: [] for column in EXPOSURE.columns}
    shares: dict[str, list[object]] = {column.name: [] for column in EXPOSURE_PARTS.columns}
    for branch in _branches(scores):
        run = {name: branch[name] for name in ("run_id", "block", "cell", "seed_index", "branch")}
        _add_totals(totals, run, _covered(events[branch["run_id"]], branch))
        _add_parts(shares, run, _covered(parts[branch["run_id"]], branch))
    write_table(layout.exposure(study), EXPOSURE, totals, label)
    write_table(layout.exposure_parts(study), EXPOSURE_PARTS, shares, label)


def _gather(study: str, name: str, table: Table) -> pa.Table:
    jobs = load_study(study).jobs()
    return pa.concat_tables([read_table(layout.run(study, *job, name), table) for job in jobs])


def _by_run(rows: pa.Table) -> dict[str, list[Row]]:
    found: dict[str, list[Row]] = defaultdict(list)
    for row in rows.to_pylist():
        found[row["run_id"]].append(row)
    return found


def _branches(scores: pa.Table) -> list[Row]:
    """One row for each finished branch of each run."""
    seen: dict[tuple[str, int], Row] = {}
    for row in scores.to_pylist():
        if row["status"] == "finished":
            seen.setdefault((row["run_id"], row["branch"]), row)
    return list(seen.values())


def _covered(rows: list[Row], branch: Row) -> list[Row]:
    """Rows of the trunk before the branch left it, then rows of the branch."""
    first = min((row["step"] for row in rows if row["segment"] == branch["branch"]), default=None)
    return [
        row
        for row in rows
        if row["segment"] == branch["branch"]
        or (row["segment"] == TRUNK and (first is None or row["step"] < first))
    ]


def _as(kind: type[Any], row: Row) -> Any:
    """A row of a table as the meter's record: null is nan."""
    return kind(**{f.name: math.nan if row[f.name] is None else row[f.name] for f in fields(kind)})


def _add_totals(columns: dict[str, list[object]], run: Row, rows: list[Row]) -> None:
    events: list[Event] = [_as(Event, row) for row in rows]
    summed = {name: (estimate, UNITS[name]) for name, estimate in integrate(events).items()}
    for name, (estimate, unit) in (summed | averages(events)).items():
        _add(columns, {**run, "definition": name, "unit": unit, "events": len(events)}, estimate)


def _add_parts(columns: dict[str, list[object]], run: Row, rows: Iterable[Row]) -> None:
    by_part: dict[tuple[str, str], list[Trace]] = defaultdict(list)
    for row in rows:
        by_part[row["kind"], row["part"]].append(_as(Part, row))
    for (kind, part), traces in by_part.items():
        exposure = integrate(traces)
        for name in PART_DEFINITIONS:
            named = {**run, "kind": kind, "part": part, "definition": name, "unit": UNITS[name]}
            _add(columns, named, exposure[name])


def _add(columns: dict[str, list[object]], row: Row, estimate: Estimate) -> None:
    numbers = {"value": estimate.value, "stderr": estimate.stderr}
    for name, value in {**row, **{k: v if math.isfinite(v) else None for k, v in numbers.items()}}.items():
        columns[name].append(value)
