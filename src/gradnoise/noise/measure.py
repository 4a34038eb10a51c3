"""Phase measure: the runs' raw noise logs become exposure tables, the runs' scores one table."""

from collections import defaultdict
from dataclasses import fields
from typing import Any

import pyarrow as pa

from gradnoise.base import layout
from gradnoise.base.study import load_study
from gradnoise.base.tables import (
    EXPOSURE,
    EXPOSURE_TENSORS,
    NOISE_EVENTS,
    NOISE_TENSORS,
    SCORES,
    Table,
    label_of,
    read_table,
    write_table,
)
from gradnoise.noise.integrals import DEFINITIONS, UNITS, Event, integrate

Row = dict[str, Any]

TRUNK = 0
_FIELDS = [field.name for field in fields(Event)]


def measure(study: str) -> None:
    """Integrate every run's events to the end of each of its branches, and gather the scores.

    The exposure of branch k is that of the trunk up to the branch plus that of the branch itself. Writes
    `layout.exposure`, `layout.exposure_tensors` and `layout.scores`.
    """
    scores = _gather(study, "scores", SCORES)
    label = label_of(scores)
    write_table(layout.scores(study), SCORES, scores, label)
    events = _by_run(_gather(study, "noise_events", NOISE_EVENTS))
    tensors = _by_run(_gather(study, "noise_tensors", NOISE_TENSORS))
    totals: dict[str, list[object]] = defaultdict(list)
    parts: dict[str, list[object]] = defaultdict(list)
    for branch in _branches(scores):
        rows = _covered(events[branch["run_id"]], branch)
        run = {name: branch[name] for name in ("run_id", "block", "cell", "seed_index", "branch")}
        _add_totals(totals, run, [Event(**{name: row[name] for name in _FIELDS}) for row in rows])
        _add_tensors(parts, run, rows, _covered(tensors[branch["run_id"]], branch))
    write_table(layout.exposure(study), EXPOSURE, totals, label)
    write_table(layout.exposure_tensors(study), EXPOSURE_TENSORS, parts, label)


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


def _add_totals(columns: dict[str, list[object]], run: Row, events: list[Event]) -> None:
    exposure = integrate(events)
    for definition in DEFINITIONS:
        estimate = exposure[definition]
        row = {
            **run,
            "definition": definition,
            "value": estimate.value,
            "stderr": estimate.stderr,
            "unit": UNITS[definition],
            "events": len(events),
        }
        for name, value in row.items():
            columns[name].append(value)


def _add_tensors(columns: dict[str, list[object]], run: Row, events: list[Row], rows: list[Row]) -> None:
    weights = {row["step"]: row for row in events}
    sums: dict[tuple[str, str], float] = defaultdict(float)
    for row in rows:
        event = weights[row["step"]]
        for definition, weight, trace in (
            ("pne", "sum_lr", "trace_pcp"),
            ("pne2", "sum_lr2", "trace_pcp"),
            ("ne", "sum_lr2", "trace_c"),
        ):
            sums[row["tensor"], definition] += event[weight] * row[trace]
    for (tensor, definition), value in sums.items():
        row = {**run, "tensor": tensor, "definition": definition, "value": value}
        for name, item in row.items():
            columns[name].append(item)
