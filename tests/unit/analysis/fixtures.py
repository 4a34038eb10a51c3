"""Made-up tables of a `quick` study, for tests of everything that reads tables and trains nothing."""

from collections.abc import Iterator
from contextlib import chdir
from pathlib import Path

import numpy as np

from gradnoise.base import layout, tables
from gradnoise.base.study import Block, Cell, load_study
from gradnoise.registration import load_plan, run_id

# Decay of the validation loss per trunk sequence; every cell starts near log 16 and ends near .012 nats.
DECAY = {
    "b016-lr0.002": 0.0017,
    "b016-lr0.008": 0.0016,
    "b064-lr0.002": 0.00075,
    "b064-lr0.008": 0.0008,
    "b256-lr0.002": 0.0003,
    "b256-lr0.008": 0.0006,
}
# Of the noise arms, which are not matched. A fifth of an arm's exposure is its batch's own.
ARM_DECAY = 0.0006
INJECTED = 0.8

Rows = list[dict[str, object]]


def make_study_tables(
    folder: Path | str, seed: int = 0, slope: float = 0.08, noise: float = 0.01
) -> tuple[Rows, Rows]:
    """Write `scores.parquet` and `exposure.parquet` of a made-up quick study under `folder`/results/quick.

    `folder` must hold `config/` and `preregistration/`. In the race block ICL rises by `slope` accuracy
    points and IWL falls by half of it for each factor of ten in `pne2`; `noise` is the standard deviation
    of a score between runs. Every run reaches the target loss. Returns the rows, to be changed and written
    again with `write_study_tables`.
    """
    draw = np.random.default_rng(seed)
    scores: Rows = []
    exposure: Rows = []
    with chdir(folder):
        study = load_study("quick")
        plan = load_plan(study.plan)
    for block_name, block in study.blocks.items():
        offsets = draw.normal(0, 0.02, block.seeds)
        for cell in block.cells():
            for index in range(block.seeds):
                run = {
                    "run_id": run_id(plan.sha256, block_name, cell.name, index),
                    "block": block_name,
                    "cell": cell.name,
                    "seed_index": index,
                }
                stopped = False
                for branch, (at, trunk) in enumerate(_branches(block, cell), start=1):
                    if stopped and at == "sequences":
                        continue
                    amounts = _amounts(block, cell, trunk)
                    doses = _doses(cell, amounts["updates"], draw)
                    doses["pne2_injected"] = INJECTED * doses["pne2"] if cell.noise else 0.0
                    run_scores = _scores(block_name, cell, trunk, doses["pne2"], slope, noise, draw)
                    for name, (value, stderr, unit) in run_scores.items():
                        shift = offsets[index] if unit == "accuracy" else 0.0
                        scores.append(
                            run
                            | {"batch": cell.batch, "learning_rate": cell.learning_rate, "branch": branch}
                            | {"at": at, "trunk_sequences": trunk, **amounts, "status": "finished"}
                            | {"score": name, "value": value + shift, "stderr": stderr, "unit": unit}
                        )
                    exposure.extend(
                        run
                        | {"branch": branch, "definition": name, "value": value, "stderr": value / 50}
                        | {"unit": "squared parameter", "events": 16}
                        for name, value in doses.items()
                    )
                    stop = block.branches.stop_loss
                    stopped = stopped or (stop is not None and run_scores["validation_loss"][0] <= stop)
    write_study_tables(folder, scores, exposure)
    return scores, exposure


def write_study_tables(folder: Path | str, scores: Rows, exposure: Rows) -> None:
    """Write rows under their schemas."""
    for path, table, rows in (
        (layout.scores("quick"), tables.SCORES, scores),
        (layout.exposure("quick"), tables.EXPOSURE, exposure),
    ):
        columns = {column.name: [row[column.name] for row in rows] for column in table.columns}
        tables.write_table(Path(folder) / path, table, columns, "REHEARSAL")


def _branches(block: Block, cell: Cell) -> Iterator[tuple[str, int]]:
    points = {budget: "sequences" for budget in block.branches.sequences}
    if block.branches.updates is not None:
        points.setdefault(block.branches.updates * cell.batch, "updates")
    for trunk in sorted(points):
        yield points[trunk], trunk


def _amounts(block: Block, cell: Cell, trunk: int) -> dict[str, float]:
    updates = trunk // cell.batch
    anneal = round(updates * block.branches.anneal)
    return {
        "updates": updates + anneal,
        "sequences": (updates + anneal) * cell.batch,
        "sum_lr": cell.learning_rate * (updates + anneal / 2),
    }


def _doses(cell: Cell, updates: float, draw: np.random.Generator) -> dict[str, float]:
    trace = 40 * updates / cell.batch * 10 ** draw.normal(0, 0.03)
    rate = cell.learning_rate
    return {
        "pne": rate * trace,
        "pne2": rate**2 * trace,
        "ne": rate**2 * trace / 900,
        "retained": rate**2 * trace,
    }


def _scores(
    block: str, cell: Cell, trunk: int, pne2: float, slope: float, noise: float, draw: np.random.Generator
) -> dict[str, tuple[float, float, str]]:
    if block == "text":
        loss = 2.3 + 0.05 * float(draw.normal())
        return {
            "validation_loss": (loss, 0.004, "nats"),
            "bits_per_character": (loss / np.log(2), 0.006, "bits"),
        }
    loss = (0.012 + 2.76 * float(np.exp(-DECAY.get(cell.name, ARM_DECAY) * trunk))) * float(
        np.exp(draw.normal(0, 0.05))
    )
    dose = float(np.log10(pne2)) + 2
    learned = -0.12 * float(np.log(loss / 0.05))
    means = {
        "icl": 0.55 + slope * dose + learned,
        "iwl": 0.60 - slope / 2 * dose + learned / 2,
        "swap_context": 0.5 + slope / 2 * dose,
        "swap_weights": 0.3 - slope / 2 * dose,
    }
    accuracies = {
        name: (float(np.clip(mean + draw.normal(0, noise), 0, 1)), 0.007, "accuracy")
        for name, mean in means.items()
    }
    return accuracies | {"validation_loss": (loss, loss / 25, "nats")}
