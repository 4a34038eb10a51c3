"""What is described and not tested, once more: cells, arms, reliability, flow, bands, curves."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from gradnoise.base.vocabulary import FATES, STAGES
from gradnoise.evaluation.names import NAMES
from gradnoise.provenance.audit.second_path import ROUNDING, Unable
from gradnoise.provenance.audit.trends import draws_seed, isotonic

if TYPE_CHECKING:
    import pandas as pd

    from gradnoise.provenance.audit.compared import Compared
    from gradnoise.registration.kinds import TrendTest
    from gradnoise.registration.plan import Plan

Array = NDArray[np.float64]
Entry = dict[str, Any]

# Ends of the range of a score, by its unit.
_RANGES = {"accuracy": (0.0, 1.0)}
_SAME_DOSE = 1e-9
# Stages that a run of each fate has reached; after them come `excluded` and `analysed` by its own name.
_REACHED = {
    "missing": 1,
    "diverged": 2,
    "not compared": 3,
    "unmatched": 3,
    "excluded": 4,
    "analysed": 4,
}


def cells(compared: Compared) -> list[Entry]:
    """Mean, standard deviation and standard error of every score at the last branches of each cell's runs."""
    scores = compared.scores
    units = {(row["block"], row["score"]): row["unit"] for row in scores.to_dict("records")}
    found = []
    for block_name, block in compared.study.blocks.items():
        for cell in block.cells():
            runs = _finished(compared, block_name, cell.name)
            for score in sorted(NAMES[block.task.kind]) if runs else ():
                values = np.array([compared.branches[run][-1][score] for run in runs])
                sd = float(np.std(values, ddof=1)) if len(values) > 1 else None
                stderr = _score_error(compared, runs[0], score) if sd is None else sd / math.sqrt(len(values))
                found.append(
                    {
                        **{"block": block_name, "cell": cell.name, "batch": cell.batch},
                        **{"learning_rate": cell.learning_rate, "score": score, "branch": "last"},
                        **{"unit": units[block_name, score], "mean": float(values.mean()), "sd": sd},
                        **{"stderr": stderr, "runs": len(values)},
                    }
                )
    return found


def arms(compared: Compared) -> list[Entry]:
    """Every noise arm at the last branches of its finished runs."""
    plan, found = compared.plan, []
    dose = f"{plan.exposure.transform}_{plan.exposure.primary}"
    for block_name, block in compared.study.blocks.items():
        units = NAMES[block.task.kind]
        scores = dict.fromkeys(outcome.score for outcome in plan.outcomes)
        wanted = {score: units[score] for score in scores if score in units}
        for name, arm in block.arms.items():
            last = [compared.branches[run][-1] for run in _finished(compared, block_name, name)]
            columns = {score: [branch[score] for branch in last] for score in wanted}
            columns |= {dose: [branch[dose] for branch in last if dose in branch]}
            columns |= {"share_injected": [_share(branch) for branch in last if "log10_pne2" in branch]}
            quantities = [
                {"quantity": quantity, "unit": wanted.get(quantity, ""), **_mean(values)}
                for quantity, values in columns.items()
            ]
            noise = arm.noise and arm.noise.model_dump(mode="json", exclude_unset=True)
            counts = {"planned": block.seeds, "finished": len(last)}
            about = {"block": block_name, "arm": name, "noise": noise, "branch": "last"}
            found.append(about | counts | {"quantities": quantities})
    return found


def _share(branch: dict[str, float]) -> float:
    injected = branch.get("log10_pne2_injected")
    return 0.0 if injected is None else float(10.0 ** (injected - branch["log10_pne2"]))


def _mean(values: list[float]) -> Entry:
    if not values:
        return {"mean": None, "stderr": None}
    stderr = float(np.std(values, ddof=1)) / math.sqrt(len(values)) if len(values) > 1 else None
    return {"mean": float(np.mean(values)), "stderr": stderr}


def _finished(compared: Compared, block: str, cell: str) -> list[str]:
    return [
        name
        for name, run in compared.planned.items()
        if (run.block, run.cell) == (block, cell) and name in compared.branches
    ]


def _score_error(compared: Compared, run: str, score: str) -> float:
    scores = compared.scores
    rows = scores[(scores["run_id"] == run) & (scores["score"] == score)]
    return float(rows.sort_values(["sequences", "branch"])["stderr"].iloc[-1])


def reliability(compared: Compared) -> float | None:
    """1 - mean(se^2) / variance of the log of the matching variable at the runs' last branches."""
    rule = compared.plan.matching
    runs = [
        name
        for name, run in compared.planned.items()
        if run.block == rule.block and name in compared.branches
    ]
    values = np.array([compared.branches[run][-1][rule.variable] for run in runs])
    if len(values) < 2 or np.var(np.log(values), ddof=1) == 0:
        return None
    errors = np.array([_score_error(compared, run, rule.variable) for run in runs])
    return float(1 - np.mean((errors / values) ** 2) / np.var(np.log(values), ddof=1))


def missing(compared: Compared, frame: pd.DataFrame) -> list[Entry]:
    """Of each cell of the matched block: planned and compared runs, and worst-case bounds of its means."""
    plan, found = compared.plan, []
    block = compared.study.blocks[plan.matching.block]
    for cell in block.cells():
        rows = frame[frame["cell"] == cell.name] if len(frame) else frame
        absent = block.seeds - len(rows)
        bounds: dict[str, list[float] | None] = {}
        for outcome in plan.outcomes:
            if outcome.block == plan.matching.block:
                ends = _RANGES.get(outcome.unit)
                total = math.fsum(rows[outcome.score]) if len(rows) else 0.0
                bounds[outcome.id] = ends and [(total + absent * end) / block.seeds for end in ends]
        counts = {"planned": block.seeds, "compared": len(rows), "missing_share": absent / block.seeds}
        found.append({"cell": cell.name, **counts, "bounds": bounds})
    return found


def fates(compared: Compared) -> dict[str, int]:
    """Runs of each fate."""
    counted = [fate for fate, _ in compared.fates.values()]
    return {fate: counted.count(fate) for fate in FATES}


def flow(compared: Compared) -> dict[tuple[str, str, str], int]:
    """Runs of each block and cell at each stage; a block that is not matched ends at `finished`."""
    found: dict[tuple[str, str, str], int] = {}
    for name, (fate, _) in compared.fates.items():
        run = compared.planned[name]
        last = len(STAGES) if run.block == compared.plan.matching.block else STAGES.index("finished") + 1
        for place, stage in enumerate(STAGES[:last]):
            key = (run.block, run.cell, stage)
            reached = place < _REACHED[fate] or stage == fate
            found[key] = found.get(key, 0) + int(reached)
    return found


def totals(compared: Compared) -> dict[str, int]:
    """Runs at each stage."""
    counted = flow(compared)
    return {stage: sum(n for (_, _, at), n in counted.items() if at == stage) for stage in STAGES}


def explained(plan: Plan, frame: pd.DataFrame, predictor: str) -> tuple[Any, ...] | None:
    """(R^2 within seeds, low, high, runs) with its jackknife over seeds; None where nothing is to explain."""
    from scipy import stats

    score = plan.outcome(plan.descriptive.outcome).score
    rows = frame[["seed", score, predictor]].dropna() if predictor in frame else frame.head(0)
    if len(rows) == 0 or np.ptp(rows[score].to_numpy(dtype=float)) == 0:
        return None
    centred = rows[[predictor, score]].astype(float)
    centred = centred - centred.groupby(rows["seed"]).transform("mean")
    if centred[predictor].abs().max() <= _SAME_DOSE * rows[predictor].abs().max():
        return 0.0, None, None, len(rows)
    whole = _squared(centred)
    seeds = sorted(set(rows["seed"]))
    if len(seeds) < 3:
        return whole, None, None, len(rows)
    pseudo = [len(seeds) * whole - (len(seeds) - 1) * _squared(centred[rows["seed"] != s]) for s in seeds]
    half = float(stats.t.ppf((1 + plan.intervals.level) / 2, len(seeds) - 1) * stats.sem(pseudo))
    return whole, float(np.mean(pseudo)) - half, float(np.mean(pseudo)) + half, len(rows)


def _squared(centred: pd.DataFrame) -> float:
    x, y = centred.to_numpy(dtype=float).T
    scale = float((x @ x) * (y @ y))
    return float((x @ y) ** 2 / scale) if scale > 0 else 0.0


def isotonic_curve(plan: Plan, frame: pd.DataFrame, direction: str) -> list[tuple[float, float]]:
    """Isotonic fit of the described outcome on its predictor; runs of one dose are averaged first."""
    outcome, predictor = plan.outcome(plan.descriptive.outcome).score, plan.descriptive.predictor
    sign = 1.0 if direction == "increasing" else -1.0
    by_dose = frame.groupby(predictor)[outcome].agg(["mean", "size"])
    fit = sign * isotonic(sign * by_dose["mean"].to_numpy(), by_dose["size"].to_numpy(dtype=float))
    return list(zip(by_dose.index.to_numpy(dtype=float).tolist(), fit.tolist(), strict=True))


def band(plan: Plan, test: TrendTest, y: Array, seeds: list[int], incomplete: list[int], key: str) -> Entry:
    """The isotonic fit of a trend's levels with both bands; `y` is seeds x levels of complete seeds."""
    sign = 1.0 if test.alternative == "increasing" else -1.0
    turned, confidence = sign * y, plan.intervals.level
    draws, trials = plan.descriptive.band_draws, plan.descriptive.band_trials
    low, high = _simultaneous(turned, confidence)
    generator = np.random.default_rng(draws_seed(key, f"{test.id}/band"))
    ends = _percentile(turned, confidence, draws, generator)
    fitted = isotonic(turned.mean(axis=0))
    covered = [
        float(((a <= fitted) & (fitted <= b)).mean())
        for a, b in (
            _percentile(trial, confidence, draws, generator)
            for trial in _studies_like(turned, fitted, trials, generator)
        )
    ]
    lower, upper = (low, high) if sign > 0 else (-high, -low)
    boot = ends if sign > 0 else (-ends[1], -ends[0])
    return {
        "test": test.id,
        "levels": list(range(1, y.shape[1] + 1)),
        **{"fitted": (sign * fitted).tolist(), "low": lower.tolist(), "high": upper.tolist()},
        **{"bootstrap_low": boot[0].tolist(), "bootstrap_high": boot[1].tolist()},
        "bootstrap_coverage": float(np.mean(covered)),
        "bootstrap_coverage_se": float(np.std(covered, ddof=1) / math.sqrt(trials)),
        **{"confidence": confidence, "alternative": test.alternative, "draws": draws, "trials": trials},
        **{"clusters": len(seeds), "incomplete": incomplete},
    }


def _simultaneous(y: Array, confidence: float) -> tuple[Array, Array]:
    """Bonferroni t intervals of the levels, made monotone."""
    from scipy import stats

    if (np.std(y, axis=0, ddof=1) <= ROUNDING * np.abs(y).max()).any():
        raise Unable("a level does not vary between seeds")
    t = stats.t.ppf(1 - (1 - confidence) / (2 * y.shape[1]), len(y) - 1)
    half = t * stats.sem(y, axis=0)
    low, high = y.mean(axis=0) - half, y.mean(axis=0) + half
    return np.maximum.accumulate(low), np.minimum.accumulate(high[::-1])[::-1]


def _percentile(
    y: Array, confidence: float, draws: int, generator: np.random.Generator
) -> tuple[Array, Array]:
    counts = generator.multinomial(len(y), np.full(len(y), 1 / len(y)), size=draws)
    fits = many_isotonic(counts @ y / len(y))
    low, high = np.quantile(fits, [(1 - confidence) / 2, (1 + confidence) / 2], axis=0)
    return low, high


def many_isotonic(means: Array) -> Array:
    """Increasing fit to each row: fit_k = min over t >= k of max over s <= k of mean(m_s, ..., m_t)."""
    levels = means.shape[1]
    sums = np.concatenate([np.zeros((len(means), 1)), np.cumsum(means, axis=1)], axis=1)
    fits = np.full_like(means, np.inf)
    for k in range(levels):
        for t in range(k, levels):
            sizes = t + 1 - np.arange(k + 1)
            most = ((sums[:, [t + 1]] - sums[:, : k + 1]) / sizes).max(axis=1)
            fits[:, k] = np.minimum(fits[:, k], most)
    return fits


def _studies_like(y: Array, truth: Array, trials: int, generator: np.random.Generator) -> Array:
    """Simulated studies around `truth`, with the variances of offsets and residuals that moments give."""
    rows, columns = y.shape
    means = y.mean(axis=1)
    left = y - means[:, None] - y.mean(axis=0) + y.mean()
    residual = float((left**2).sum()) / ((rows - 1) * (columns - 1))
    offset = max(0.0, float(np.var(means, ddof=1)) - residual / columns)
    offsets = generator.normal(0, math.sqrt(offset), (trials, rows, 1))
    return np.asarray(truth + offsets + generator.normal(0, math.sqrt(residual), (trials, rows, columns)))
