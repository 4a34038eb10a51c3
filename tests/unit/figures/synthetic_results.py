"""A small made-up study, as the analysis would leave it: what the tests of figures and report start from."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from gradnoise.base import layout
from gradnoise.base.files import write_json
from gradnoise.base.tables import CURVES, EXPLAINED, FLOW, MATCHED, write_table
from gradnoise.base.vocabulary import STAGES

BATCHES = (16, 64, 256)
RATES = (0.002, 0.008)
SEEDS = 5
POINTS = {"loss": ("nats", 0.05), "updates": ("updates", 96.0), "tokens": ("sequences", 9216.0)}
PREDICTORS = ("log10_pne2", "log10_updates", "log10_sum_lr")

Rows = list[dict[str, Any]]


def cell_name(batch: int, rate: float) -> str:
    return f"b{batch:03d}-lr{rate:g}"


def matched_rows(seeds: int = SEEDS, matchings: Sequence[str] = tuple(POINTS)) -> Rows:
    """Every run of the race block at each matching, with its outcome and predictors."""
    draw = np.random.default_rng(7)
    rows: Rows = []
    for matching in matchings:
        for batch in BATCHES:
            for rate in RATES:
                for seed in range(seeds):
                    updates = 96.0 if matching == "updates" else 9216.0 / batch * draw.uniform(0.9, 1.1)
                    exposure = math.log10(rate / batch) + 2.1 + draw.normal(0, 0.08)
                    quantities = {
                        "icl": 0.8 + 0.09 * exposure + 0.01 * seed + draw.normal(0, 0.02),
                        "log10_pne2": exposure,
                        "updates": updates,
                        "sum_lr": 0.83 * rate * updates,
                    }
                    run = {
                        "run_id": f"{cell_name(batch, rate)}-{seed}",
                        "block": "race",
                        "cell": cell_name(batch, rate),
                        "seed_index": seed,
                        "batch": batch,
                        "learning_rate": rate,
                        "matching": matching,
                    }
                    rows += [run | {"quantity": name, "value": value} for name, value in quantities.items()]
    return rows


def curve_rows(matched: Rows) -> Rows:
    """A line with a band and an isotonic step for every matching that has runs."""
    rows: Rows = []
    for matching in POINTS:
        exposures = sorted(
            row["value"] for row in matched if (row["matching"], row["quantity"]) == (matching, "log10_pne2")
        )
        if exposures:
            for x in np.linspace(exposures[0], exposures[-1], 20):
                rows.append(_curve(matching, "mixed_model", x, 0.82 + 0.09 * x, 0.03))
            for i, x in enumerate(exposures):
                rows.append(_curve(matching, "isotonic", x, 0.82 + 0.09 * exposures[i - i % 5], None))
    return rows


def _curve(matching: str, curve: str, x: float, y: float, half: float | None) -> dict[str, Any]:
    low, high = (None, None) if half is None else (y - half, y + half)
    return {"matching": matching, "curve": curve, "x": float(x), "y": y, "low": low, "high": high}


def explained_rows(runs: int) -> Rows:
    """R-squared of each predictor; updates are constant at matched updates and have no interval."""
    rows: Rows = []
    for i, matching in enumerate(POINTS):
        for j, predictor in enumerate(PREDICTORS):
            constant = (matching, predictor) == ("updates", "log10_updates")
            value = 0.0 if constant else 0.8 - 0.2 * j - 0.1 * i
            row = {
                "matching": matching,
                "predictor": predictor,
                "statistic": "r2_within_seed",
                "value": value,
            }
            ends = {"low": None, "high": None} if constant else {"low": value - 0.4, "high": value + 0.3}
            rows.append(row | ends | {"runs": runs})
    return rows


def flow_rows(matched: int) -> Rows:
    """`matched` of five runs reach the target in each race cell; one cell has a run that diverged."""
    rows: Rows = []
    for batch in BATCHES:
        for rate in RATES:
            lost = int((batch, rate) == (256, 0.008))
            reached = min(matched, SEEDS - lost)
            counts = (SEEDS, SEEDS, SEEDS - lost, reached, 0, reached)
            rows += _flow("race", cell_name(batch, rate), counts)
    for batch in (32, 128):
        rows += _flow("text", cell_name(batch, 0.003), (1, 1, 1))
    return rows


def _flow(block: str, cell: str, counts: Sequence[int]) -> Rows:
    """The stages that a cell has: those of a block that is not matched end early."""
    pairs = zip(STAGES, counts, strict=False)
    return [{"block": block, "cell": cell, "stage": stage, "runs": runs} for stage, runs in pairs]


def make_results(flow: Rows, label: str) -> dict[str, Any]:
    """results.json of the study; its numbers are made up and need not follow from the tables."""
    hypotheses = [
        _hypothesis("H1", "ICL rises monotonically with exposure", "undecided", 0.0504, 0.1008),
        _hypothesis("H3", "ICL after batch 16 and batch 64 is alike", "condition not met", 0.23, 0.23),
        _hypothesis("H4", "ICL rises and IWL falls with exposure", "condition met", 0.0004, 0.0012),
    ]
    members = [{"hypothesis": h["id"], "p": h["p"], "p_adjusted": h["p_adjusted"]} for h in hypotheses]
    return {
        "label": label,
        "study": "quick",
        "plan": {
            "id": "quick",
            "title": "Rehearsal of the noise study",
            "path": "preregistration/rehearsal.yaml",
            "sha256": "0123456789abcdef" * 4,
            "kind": "rehearsal",
            "prior_access": "pilot",
            "lock": None,
        },
        "descriptive": {
            "score": "icl",
            "unit": "accuracy",
            "predictor": PREDICTORS[0],
            "rivals": list(PREDICTORS[1:]),
        },
        "thresholds": {
            "target_loss": 0.05,
            "alpha": 0.05,
            "level": 0.95,
            "margin": 0.05,
            "reliability": 0.95,
            "trend_margin": None,
        },
        "matched_points": {name: {"unit": unit, "value": value} for name, (unit, value) in POINTS.items()},
        "tests": _tests(),
        "families": [{"id": "main", "method": "holm", "alpha": 0.05, "members": members}],
        "hypotheses": hypotheses,
        "reliability": {
            "quantity": "validation_loss",
            "value": 0.97134567,
            "minimum": 0.95,
            "reached": True,
        },
        "cells": _cells(),
        "arms": _arms(),
        "bands": [_band()],
        "sensitivity": _beside({"test": "icl-slope-loss", "method": "sign_flip"}),
        "exploratory": _beside({"id": "path", "kind": "mediation", "description": "exposure to IWL to ICL"}),
        "deviations": [],
        "deviated": None,
        "missing": _missing(),
        "fates": {
            **{"analysed": 28, "excluded": 0, "unmatched": 1, "diverged": 1, "missing": 0},
            "not compared": 2,
        },
        "flow": {s: sum(row["runs"] for row in flow if row["stage"] == s) for s in STAGES},
    }


def _hypothesis(id: str, text: str, outcome: str, p: float, p_adjusted: float) -> dict[str, Any]:
    rule = "met: icl-slope reads above zero; not met: icl-slope reads below zero"
    read = {"outcome": outcome, "p": p, "p_adjusted": p_adjusted, "label": "REHEARSAL"}
    return {"id": id, "text": text, "rule": rule, **read}


def _band() -> dict[str, Any]:
    ends = {"low": [0.42, 0.45], "high": [0.61, 0.66], "bootstrap_low": [0.5, 0.52]}
    ends |= {"fitted": [0.51, 0.55], "bootstrap_high": [0.53, 0.58]}
    coverage = {"trials": 400, "bootstrap_coverage": 0.8375, "bootstrap_coverage_se": 0.0123}
    return {"test": "icl-trend", "levels": [1, 2], "confidence": 0.95, **ends, **coverage}


def _beside(about: dict[str, Any]) -> Rows:
    """An entry with numbers, and one that could not be carried out."""
    numbers = {"estimate": 0.0777, "stderr": None, "df": None, "p": 0.03125, "low": None, "high": None}
    entry = about | {"label": "REHEARSAL", "level": 0.95, "runs": 30, "details": {}}
    reason = {"details": {"reason": "seed: 1 slopes: give at least 2 seeds with 2 doses each"}}
    return [entry | numbers, entry | dict.fromkeys(numbers) | reason]


def _missing() -> Rows:
    whole = {"planned": 5, "compared": 5, "missing_share": 0.0, "bounds": {"icl": [0.4, 0.4], "loss": None}}
    lacking = {
        "planned": 5,
        "compared": 4,
        "missing_share": 0.2,
        "bounds": {"icl": [0.32, 0.52], "loss": None},
    }
    return [{"cell": "b016-lr0.002", **whole}, {"cell": "b256-lr0.008", **lacking}]


def _tests() -> Rows:
    empty = dict.fromkeys(("estimate", "stderr", "df", "p", "low", "high", "level"))
    slope = {"kind": "slope", "hypothesis": "H1", "runs": 30, "seeds": 5, "details": {}}
    slope["label"] = "REHEARSAL"
    numbers = {
        "loss": (0.09123456, 0.0123, 0.0504, 0.0571, 0.1254),
        "updates": (0.0834, 0.02, 0.0141, 0.0279, 0.1389),
        "tokens": (-0.0012, 0.02, 0.955, -0.0567, 0.0543),
    }
    rows: Rows = []
    for matching, (estimate, stderr, p, low, high) in numbers.items():
        rows.append(
            {
                **slope,
                "id": f"icl-slope-{matching}",
                "outcome": "undecided",
                "matching": matching,
                "description": f"slope of ICL on log10 exposure at matched {matching}",
                "estimate": estimate,
                "stderr": stderr,
                "df": 4,
                "p": p,
                "low": low,
                "high": high,
                "level": 0.95,
            }
        )
    mixed = {
        **slope,
        **empty,
        "id": "icl-mixed",
        "kind": "mixed",
        "outcome": "above zero",
        "matching": "loss",
        "description": "mixed model of ICL on log10 exposure at matched loss",
        "estimate": 0.0917,
        "stderr": 0.0119,
        "df": 3.8571,
        "p": 0.0021,
        "details": {"singular": True, "alternative": "greater"},
    }
    terms = {
        "batch": {"F": 12.345, "p": 0.0021, "robust_p": 0.0033},
        "batch:learning_rate": {"F": 0.456, "p": 0.71, "robust_p": None},
    }
    factors = {
        **slope,
        **empty,
        "id": "icl-factors",
        "kind": "anova",
        "outcome": "reported",
        "matching": "loss",
        "description": "batch size and learning rate in ICL at matched loss",
        "details": {"terms": terms},
    }
    failed = {
        **slope,
        **empty,
        "id": "icl-batch",
        "kind": "tost",
        "outcome": "undecided",
        "matching": "loss",
        "description": "difference in ICL between two batches, at matched loss",
        "details": {"reason": "seeds: 2: the plan tests on 3 or more"},
    }
    lost = factors | {
        "id": "icl-lost",
        "outcome": "undecided",
        "details": {"reason": "runs: 0.5 of them missing"},
    }
    return [*rows, mixed, factors, lost | {"matching": "updates"}, failed]


def _cells() -> Rows:
    scores = {
        "race": (("icl", "accuracy", 0.7123), ("validation_loss", "nats", 0.01512)),
        "text": (("validation_loss", "nats", 2.0512), ("bits_per_character", "bits", 2.9592)),
    }
    cells = [("race", batch, rate) for batch in BATCHES for rate in RATES]
    cells += [("text", batch, 0.003) for batch in (32, 128)]
    return [
        {
            "block": block,
            "cell": cell_name(batch, rate),
            "batch": batch,
            "learning_rate": rate,
            "score": score,
            "unit": unit,
            "branch": "last",
            "mean": mean,
            "sd": 0.0123 if block == "race" else None,
            "stderr": 0.0055 if block == "race" else 0.0041,
            "runs": SEEDS if block == "race" else 1,
        }
        for block, batch, rate in cells
        for score, unit, mean in scores[block]
    ]


def _arms() -> Rows:
    """Two arms; of the second one no run finished."""
    numbers = {"icl": ("accuracy", 0.4242, 0.0212), "share_injected": ("", 0.8123, 0.0034)}
    noises = {
        "after-x4": {"kind": "inject", "scale": 4.0, "where": "post"},
        "reweight-b16": {"kind": "reweight", "to_batch": 16},
    }
    return [
        {
            "block": "race_noise",
            "arm": arm,
            "noise": noise,
            "branch": "last",
            "planned": 2,
            "finished": 2 if arm == "after-x4" else 0,
            "quantities": [
                {"quantity": name, "unit": unit}
                | ({"mean": mean, "stderr": se} if arm == "after-x4" else {"mean": None, "stderr": None})
                for name, (unit, mean, se) in numbers.items()
            ],
        }
        for arm, noise in noises.items()
    ]


def write_study(
    seeds: int = SEEDS,
    matchings: Sequence[str] = tuple(POINTS),
    curves: bool = True,
    label: str = "REHEARSAL",
) -> dict[str, Any]:
    """Write the analysis of study `quick` under the working folder; returns its results.json.

    `seeds` seeds of each race cell reach the points of `matchings`; none means no matched run at all.
    """
    matched = matched_rows(seeds, matchings)
    flow = flow_rows(seeds if "loss" in matchings else 0)
    contents = {
        MATCHED: matched,
        FLOW: flow,
        CURVES: curve_rows(matched) if curves else [],
        EXPLAINED: explained_rows(6 * seeds) if matched else [],
    }
    for table, rows in contents.items():
        columns = {column.name: [row[column.name] for row in rows] for column in table.columns}
        write_table(Path(layout.analysis("quick", table.name)), table, columns, label)
    results = make_results(flow, label)
    write_json(layout.results("quick"), results)
    return results
