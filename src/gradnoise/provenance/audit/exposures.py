"""Exposures once more: summed from the raw noise logs, and all tables of that phase made again."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from contextlib import chdir
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

import numpy as np

from gradnoise import phases
from gradnoise.base import layout
from gradnoise.noise.measure import measure
from gradnoise.provenance.audit.evidence import Evidence, plain

if TYPE_CHECKING:
    import pandas as pd

_TRUNK = 0
# Sums are in another order here; nothing else differs.
_ROUNDING = 1e-9
# Of each definition: weight of an event, its trace, and what was injected.
_SUMS = {
    "pne": ("sum_lr", "trace_pcp", "injected_pne"),
    "pne2": ("sum_lr2", "trace_pcp", "injected_pne2"),
    "ne": ("sum_lr2_c", "trace_c", "injected_ne"),
    "pne_effective": ("sum_lr", "trace_effective", "injected_pne"),
    "pne2_effective": ("sum_lr2", "trace_effective", "injected_pne2"),
}
DEFINITIONS = (*_SUMS, "retained", "pne2_injected")


def exposure_faults(evidence: Evidence) -> Iterator[str]:
    """Exposures that are not the sums of their events, and branches that the table lacks or has besides."""
    path = layout.exposure(evidence.name)
    rows = evidence.rows(path)
    shown = {(row["run_id"], row["branch"], row["definition"]): row for row in rows}
    scores = evidence.runs_frame("scores")
    finished = scores[scores["status"] == "finished"].drop_duplicates(["run_id", "branch"]).to_dict("records")
    there = {(row["run_id"], row["branch"]) for row in rows}
    for run, branch in there ^ {(row["run_id"], row["branch"]) for row in finished}:
        yield f"{path}: run {run}, branch {branch} is in one of exposures and scores only"
    events = dict(tuple(evidence.runs_frame("noise_events").groupby("run_id")))
    for row in finished:
        where = f"run {row['run_id']}, branch {row['branch']}"
        own = events.get(row["run_id"])
        if own is None:
            yield f"{where} has no measured update"
            continue
        trunk = (own["segment"] == _TRUNK) & (own["step"] <= row["trunk_sequences"] // row["batch"])
        own = own[trunk | (own["segment"] == row["branch"])]
        for name, (value, stderr) in _sums(own).items():
            at = shown.get((row["run_id"], row["branch"], name))
            if at is None:
                yield f"{path}: {where} has no {name}"
            elif not (_near(at["value"], value) and _near(at["stderr"], stderr) and at["events"] == len(own)):
                yield f"{path}: {name} of {where} is {at['value']}, its {len(own)} events sum to {value}"


def remade_faults(evidence: Evidence) -> Iterator[str]:
    """Tables of phase measure that are not what its code makes of the runs: parts, averages, units."""
    here, runs = Path.cwd(), Path("results", evidence.name, "runs")
    with TemporaryDirectory() as folder:
        Path(folder, runs).parent.mkdir(parents=True)
        for source in ("config", "preregistration", runs):
            os.symlink(here / source, Path(folder, source))
        with chdir(folder):
            measure(evidence.name)
        for path in phases.measure_outputs(evidence.name):
            if Path(folder, path).read_bytes() != plain(path).read_bytes():
                yield f"{path} is not what the runs' tables make"


def _sums(events: pd.DataFrame) -> dict[str, tuple[float, float]]:
    """Value and standard error of each definition over these events, in the order of their updates."""
    column = {name: events[name].to_numpy(dtype=float) for name in events.select_dtypes("number")}
    found = {}
    for name, (weight, trace, injected) in _SUMS.items():
        added = column[weight] * column[trace] + column[injected]
        found[name] = (math.fsum(added), _root(column[weight] * column[f"{trace}_se"]))
    # Weight decay shrinks what was there before an event.
    decay = column["log_retention"]
    kept = np.exp(decay.sum() - np.cumsum(decay))
    added = column["sum_lr2"] * column["trace_pcp"] + column["injected_pne2"]
    found["retained"] = (math.fsum(kept * added), _root(kept * column["sum_lr2"] * column["trace_pcp_se"]))
    return found | {"pne2_injected": (math.fsum(column["injected_pne2"]), 0.0)}


def _root(errors: np.ndarray) -> float:
    return math.sqrt(math.fsum(errors**2))


def _near(found: float | None, expected: float) -> bool:
    if found is None or not math.isfinite(expected):
        return found is None and not math.isfinite(expected)
    return math.isclose(found, expected, rel_tol=_ROUNDING)
