"""Made-up runs of a stated truth, in the form of the tables of scores and exposure."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from gradnoise.base.errors import InputError
from gradnoise.base.files import sha256_of
from gradnoise.base.study import Block, Study
from gradnoise.evaluation.names import NAMES
from gradnoise.registration import Plan, run_id
from gradnoise.registration.plan import Truth
from gradnoise.training.settings import anneal_updates, branch_points

if TYPE_CHECKING:
    import pandas as pd

Array = NDArray[np.float64]

# Power of the learning rate in each definition of exposure.
_POWERS = {"pne": 1, "pne2": 2, "ne": 2, "retained": 2}
# Distance of the log loss from the target's at a run's ends: so much, and so many standard deviations.
_REACH, _SPREADS = 1.0, 6.0


def simulation_seed(plan: Plan, truth: Truth, number: int) -> int:
    """Seed of the numbered simulation of a truth: it follows from the plan's hash, like all its seeds."""
    return int(sha256_of([plan.sha256, "simulation", truth.id, number]), 16)


def simulate(
    plan: Plan, study: Study, truth: Truth, seed: int, blocks: Sequence[str] | None = None
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Scores and exposure of one simulated study, the same for the same plan, truth and seed.

    For a run of cell c and seed s of the matched block, with the truth's slopes b and shifts d and the
    spreads of `plan.power.assumptions`:

    outcome = base + seed_s + (b + slope_s) (dose_c - mean dose) + d_c + residual, the same at every branch;
    log loss = log target - a (log sequences - m) + error, where m is the middle of the run's budgets in log
    sequences and a is so large that every run crosses the target between two branches;
    exposure = (learning rate)^k updates / batch x 10^error, k = 1 for pne, else 2.

    dose_c is the cell's log10 of the primary exposure at the target, without error. Seeds, slopes, residuals
    and errors are normal and independent, also between outcomes; an error of loss or exposure is one number a
    run. Every other score, and scores of other blocks, are base + residual. Nothing is given an error of
    measurement but the exposure, its relative standard error being log(10) exposure_sd.

    `blocks`: those to simulate; all by default. Raises `InputError` for a matched block with a single budget.
    """
    import pandas as pd

    draw = np.random.default_rng(seed)
    # The matched block first, so that it is the same with and without the others.
    names = sorted(study.blocks if blocks is None else blocks, key=lambda name: name != plan.matching.block)
    parts = [_block(plan, truth, name, study.blocks[name], draw) for name in names]
    scores, exposures = zip(*parts, strict=True)
    return pd.concat(scores, ignore_index=True), pd.concat(exposures, ignore_index=True)


def _block(
    plan: Plan, truth: Truth, name: str, block: Block, draw: np.random.Generator
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Rows of both tables for one block."""
    import pandas as pd

    runs = _runs(plan, name, block)
    if name == plan.matching.block and not (runs["half"] > 0).all():
        raise InputError(f"blocks.{name}.branches.sequences", "one budget", "matching needs two or more")
    branches = _branches(block, runs)
    of = branches.pop("run").to_numpy()
    units = NAMES[block.task.kind]
    scores = [
        branches.assign(
            status="finished",
            score=score,
            value=_loss(plan, runs, branches, of, draw)
            if score == plan.matching.variable
            else _score(plan, truth, block, score, runs, draw)[of],
            stderr=0.0,
            unit=unit,
        )
        for score, unit in units.items()
    ]
    error = draw.normal(0, plan.power.assumptions.exposure_sd, len(runs))[of]
    relative = np.log(10) * plan.power.assumptions.exposure_sd
    events = np.maximum(branches["trunk_sequences"] // block.noise.every_sequences, 1)
    columns = ["run_id", "block", "cell", "seed_index", "branch"]
    exposures = [
        branches[columns].assign(
            definition=definition,
            value=(value := 10 ** (_dose(definition, branches) + error)),
            stderr=relative * value,
            unit="arbitrary",
            events=events,
        )
        for definition in _POWERS
    ]
    return pd.concat(scores, ignore_index=True), pd.concat(exposures, ignore_index=True)


def _runs(plan: Plan, name: str, block: Block) -> pd.DataFrame:
    """One row a run; in log sequences its budgets reach from `middle` - `half` to `middle` + `half`."""
    import pandas as pd

    rows = []
    for cell in block.cells():
        budgets = [step for step, at in branch_points(block, cell) if at == "sequences"]
        steps = [step + anneal_updates(block, step) for step in budgets]
        low, high = np.log(cell.batch * steps[0]), np.log(cell.batch * steps[-1])
        middle, half = (low + high) / 2, (high - low) / 2
        # At the middle, where the loss is the target; updates are sequences over batch.
        sequences = np.exp(middle)
        place = {"block": name, "cell": cell.name, "batch": cell.batch, "learning_rate": cell.learning_rate}
        for index in range(block.seeds):
            run = {"run_id": run_id(plan.key, name, cell.name, index), **place, "seed_index": index}
            rows.append(run | {"middle": middle, "half": half, "updates": sequences / cell.batch})
    return pd.DataFrame(rows)


def _branches(block: Block, runs: pd.DataFrame) -> pd.DataFrame:
    """One row a branch with what is known of it before it is scored; `run`: number of its run."""
    import pandas as pd

    rows = []
    for number, run in enumerate(runs.drop(columns=["middle", "half", "updates"]).to_dict("records")):
        points = branch_points(block, block.cell(run["cell"]))
        for branch, (trunk, at) in enumerate(points, start=1):
            anneal = anneal_updates(block, trunk)
            rows.append(
                {
                    "run": number,
                    **run,
                    "branch": branch,
                    "at": at,
                    "trunk_sequences": trunk * run["batch"],
                    "updates": trunk + anneal,
                    "sequences": (trunk + anneal) * run["batch"],
                    "sum_lr": run["learning_rate"] * (trunk + anneal / 2),
                }
            )
    return pd.DataFrame(rows)


def _dose(definition: str, rows: pd.DataFrame) -> Array:
    """log10 of an exposure without its error, up to a constant."""
    rate = _POWERS[definition] * np.log10(rows["learning_rate"])
    return np.asarray(rate + np.log10(rows["updates"]) - np.log10(rows["batch"]), dtype=float)


def _loss(
    plan: Plan, runs: pd.DataFrame, branches: pd.DataFrame, of: NDArray[np.int64], draw: np.random.Generator
) -> Array:
    spread = plan.power.assumptions.loss_sd
    error = draw.normal(0, spread, len(runs))
    half = runs["half"].to_numpy()
    fall = (_REACH + _SPREADS * spread) / np.where(half > 0, half, 1)
    beyond = np.log(branches["sequences"].to_numpy()) - runs["middle"].to_numpy()[of]
    return np.asarray(plan.matching.target * np.exp(error[of] - fall[of] * beyond))


def _score(
    plan: Plan, truth: Truth, block: Block, score: str, runs: pd.DataFrame, draw: np.random.Generator
) -> Array:
    """A score of every run at any of its branches."""
    spreads = plan.power.assumptions
    values = spreads.base + draw.normal(0, spreads.run_sd, len(runs))
    name = runs["block"].iloc[0]
    outcome = next((item.id for item in plan.outcomes if (item.block, item.score) == (name, score)), None)
    if name != plan.matching.block or outcome is None:
        return values
    seed = runs["seed_index"].to_numpy()
    seeds = draw.normal(0, spreads.seed_sd, block.seeds)[seed]
    slopes = truth.slopes.get(outcome, 0.0) + draw.normal(0, spreads.slope_sd, block.seeds)[seed]
    dose = _dose(plan.exposure.primary, runs)
    shift_of = truth.shifts.get(outcome, {})
    shifts = np.array([shift_of.get(cell, 0.0) for cell in runs["cell"]])
    return np.asarray(values + seeds + slopes * (dose - dose.mean()) + shifts)
