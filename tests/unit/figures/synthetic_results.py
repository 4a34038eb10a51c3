"""A small made-up study, as the analysis would leave it: what the tests of figures and report start from."""

import math
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from gradnoise import layout
from gradnoise.files import write_json
from gradnoise.tables import CURVES, EXPLAINED, FLOW, MATCHED, write_table

BATCHES = (16, 64, 256)
RATES = (0.002, 0.008)
POINTS = {"loss": (0.05, "nats"), "updates": (96, "updates"), "tokens": (9216, "sequences")}
PREDICTORS = ("log10_pne2", "log10_updates", "log10_sum_lr")


def cell_name(batch: int, rate: float) -> str:
    return f"b{batch:03d}-lr{rate:g}"


def matched_rows(seeds: int, matchings: Sequence[str] = tuple(POINTS)) -> list[dict[str, Any]]:
    draw = random.Random(7)
    rows = []
    for matching in matchings:
        for batch in BATCHES:
            for rate in RATES:
                for seed in range(seeds):
                    updates = 96.0 if matching == "updates" else 9216.0 / batch
                    exposure = math.log10(rate / batch) + 4.1 + draw.gauss(0, 0.08)
                    quantities = {
                        "icl": 0.62 + 0.09 * exposure + 0.01 * seed + draw.gauss(0, 0.02),
                        "log10_pne2": exposure,
                        "updates": updates,
                        "sum_lr": 0.83 * rate * updates,
                    }
                    identity = {
                        "run_id": f"{cell_name(batch, rate)}-{seed}",
                        "block": "race",
                        "cell": cell_name(batch, rate),
                        "seed_index": seed,
                        "batch": batch,
                        "learning_rate": rate,
                        "matching": matching,
                    }
                    rows += [{**identity, "quantity": q, "value": v} for q, v in quantities.items()]
    return rows


def curve_rows(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    curves = []
    for matching in POINTS:
        exposures = sorted(
            r["value"] for r in rows if (r["matching"], r["quantity"]) == (matching, "log10_pne2")
        )
        if exposures:
            low, high = exposures[0], exposures[-1]
            for i in range(41):
                x = low + (high - low) * i / 40
                half = 0.01 + 0.02 * abs(i / 20 - 1)
                y = 0.64 + 0.09 * x
                curves.append(_curve(matching, "mixed_model", x, y, y - half, y + half))
            for i, x in enumerate(exposures):
                curves.append(_curve(matching, "isotonic", x, 0.64 + 0.09 * exposures[i - i % 5], None, None))
    return curves


def _curve(
    matching: str, curve: str, x: float, y: float, low: float | None, high: float | None
) -> dict[str, Any]:
    return {"matching": matching, "curve": curve, "x": x, "y": y, "low": low, "high": high}


def explained_rows(runs: int) -> list[dict[str, Any]]:
    rows = []
    for i, matching in enumerate(POINTS):
        for j, predictor in enumerate(PREDICTORS):
            if (matching, predictor) != ("updates", "log10_updates"):  # constant there
                value = 0.8 - 0.2 * j - 0.1 * i
                rows.append(
                    {
                        "matching": matching,
                        "predictor": predictor,
                        "statistic": "r2_within_seed",
                        "value": value,
                        "low": max(value - 0.15, 0),
                        "high": min(value + 0.1, 1),
                        "runs": runs,
                    }
                )
    return rows


def flow_rows(seeds: int, matched: int) -> list[dict[str, Any]]:
    rows = []
    for batch in BATCHES:
        for rate in RATES:
            counts = {
                "planned": seeds, "started": seeds, "finished": seeds - (batch == 256 and rate == 0.008),
                "matched": matched if batch != 256 else max(matched - 1, 0), "excluded": int(batch == 256 and matched > 0),
                "analysed": matched if batch != 256 else max(matched - 1, 0),
            }  # fmt: skip
            cell = cell_name(batch, rate)
            rows += [{"block": "race", "cell": cell, "stage": s, "runs": n} for s, n in counts.items()]
    for batch in (32, 128):
        for stage, n in {
            "planned": 1,
            "started": 1,
            "finished": 1,
            "matched": 0,
            "excluded": 0,
            "analysed": 1,
        }.items():
            rows.append({"block": "text", "cell": cell_name(batch, 0.003), "stage": stage, "runs": n})
    return rows


def columns(rows: list[dict[str, Any]], names: Sequence[str]) -> dict[str, list[Any]]:
    return {name: [row[name] for row in rows] for name in names}


def make_results(flow: list[dict[str, Any]], label: str = "REHEARSAL") -> dict[str, Any]:
    def test(
        id: str, kind: str, hypothesis: str | None, outcome: str, matching: str, what: str, **numbers: Any
    ) -> dict[str, Any]:
        empty = dict.fromkeys(("estimate", "stderr", "df", "p", "low", "high"))
        return {"id": id, "kind": kind, "hypothesis": hypothesis, "outcome": outcome, "matching": matching,
                "description": f"{what} at matched {matching}", "level": 0.95, "runs": 30, "seeds": 5, "details": {},
                **empty, **numbers}  # fmt: skip

    slope = "slope of ICL on log10 exposure"
    tests = [
        test("icl-slope", "slope", "H1", "icl", "loss", slope,
             estimate=0.09123456, stderr=0.0123, df=4.0, p=0.0504, low=0.0571, high=0.1254),
        test("icl-mixed", "mixed", "H1", "icl", "loss", "mixed model of ICL on log10 exposure",
             estimate=0.0917, stderr=0.0119),
        test("icl-trend", "trend", "H1", "icl", "loss", "isotonic trend of ICL over assigned noise levels",
             estimate=0.71, p=0.00011),
        test("icl-slope-updates", "slope", "H1", "icl", "updates", slope,
             estimate=0.0834, stderr=0.02, df=4.0, p=0.0141, low=0.0279, high=0.1389),
        test("icl-slope-tokens", "slope", "H1", "icl", "tokens", slope,
             estimate=-0.0012, stderr=0.02, df=4.0, p=0.955, low=-0.0567, high=0.0543),
        test("icl-batch", "tost", "H3", "icl", "loss", "difference in ICL between batch 16 and batch 64",
             estimate=0.041, stderr=0.011, df=4.0, p=0.23, low=0.0175, high=0.0645, level=0.9),
    ]  # fmt: skip
    totals: dict[str, int] = {}
    for row in flow:
        totals[row["stage"]] = totals.get(row["stage"], 0) + row["runs"]
    cells = [
        {"block": "race", "cell": cell_name(batch, rate), "batch": batch, "learning_rate": rate, "score": score,
         "unit": unit, "branch": "last", "mean": mean, "sd": 0.0123, "runs": 5}
        for batch in BATCHES for rate in RATES
        for score, unit, mean in (("icl", "accuracy", 0.7123), ("validation_loss", "nats", 0.0151))
    ] + [
        {"block": "text", "cell": cell_name(batch, 0.003), "batch": batch, "learning_rate": 0.003, "score": score,
         "unit": unit, "branch": "last", "mean": mean, "sd": None, "runs": 1}
        for batch in (32, 128)
        for score, unit, mean in (("validation_loss", "nats", 2.0512), ("bits_per_character", "bits", 2.9592))
    ]  # fmt: skip
    return {
        "label": label,
        "study": "quick",
        "plan": {"id": "quick", "title": "Rehearsal of the noise-exposure study", "path": "preregistration/rehearsal.yaml",
                 "sha256": "0123456789abcdef" * 4},
        "thresholds": {"target_loss": 0.05, "alpha": 0.05, "level": 0.95, "margin": 0.05, "reliability": 0.95},
        "matched_points": {k: {"value": v, "unit": unit} for k, (v, unit) in POINTS.items()},
        "tests": tests,
        "families": [{"id": "main", "method": "holm", "alpha": 0.05, "members": [
            {"hypothesis": "H1", "p": 0.0504, "p_adjusted": 0.1008}, {"hypothesis": "H3", "p": 0.23, "p_adjusted": 0.23}]}],
        "hypotheses": [
            {"id": "H1", "text": "At matched loss, ICL rises monotonically with exposure.",
             "rule": "met: icl-slope is above zero and icl-trend is ordered; not met: icl-slope is below zero or icl-trend is a reversal",
             "outcome": "undecided", "p": 0.0504, "p_adjusted": 0.1008},
            {"id": "H3", "text": "At matched loss, ICL after batch 16 and after batch 64 differs by less than the margin.",
             "rule": "met: icl-batch is inside margins; not met: icl-batch is outside zero",
             "outcome": "condition not met", "p": 0.23, "p_adjusted": 0.23},
        ],
        "reliability": {"quantity": "validation_loss", "value": 0.9713, "minimum": 0.95, "reached": True},
        "cells": cells,
        "flow": totals,
    }  # fmt: skip


def write_study(
    seeds: int = 5, matchings: Sequence[str] = tuple(POINTS), curves: bool = True, label: str = "REHEARSAL"
) -> dict[str, Any]:
    """Write the four tables and results.json of study `quick` under the working folder."""
    matched = matched_rows(seeds, matchings)
    flow = flow_rows(5, seeds if "loss" in matchings else 0)
    rows = {
        MATCHED: matched,
        FLOW: flow,
        CURVES: curve_rows(matched) if curves else [],
        EXPLAINED: explained_rows(6 * seeds) if matched else [],
    }
    for table, content in rows.items():
        names = [column.name for column in table.columns]
        write_table(Path(layout.analysis("quick", table.name)), table, columns(content, names))
    results = make_results(flow, label)
    write_json(layout.results("quick"), results)
    return results
