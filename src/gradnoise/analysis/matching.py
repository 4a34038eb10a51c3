"""Where runs are compared: at the same loss, after the same updates, after the same tokens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from gradnoise.base.errors import InputError
from gradnoise.base.vocabulary import Matching
from gradnoise.registration.plan import MatchingRule

if TYPE_CHECKING:
    import pandas as pd

RUN = ["run_id", "block", "cell", "seed_index", "batch", "learning_rate"]
AMOUNTS = ["updates", "sequences", "sum_lr"]


@dataclass(frozen=True)
class Point:
    """A matched point: its unit and value, and whether a run's figures were interpolated to reach it."""

    unit: str
    value: float
    interpolated: bool


@dataclass(frozen=True)
class Matched:
    """`rows`: one row per matched run x matching x quantity (table `matched`); `points`: one per matching."""

    rows: pd.DataFrame
    points: dict[Matching, Point]

    def wide(self, matching: Matching) -> pd.DataFrame:
        """One row a run, one column a quantity, `seed` for the seed index, at that matching.

        Amounts are also given as `log10_updates`, `log10_sequences` and `log10_sum_lr`.
        """
        rows = self.rows[self.rows["matching"] == matching]
        index = ["run_id", "cell", "seed_index", "batch", "learning_rate"]
        wide = rows.pivot(index=index, columns="quantity", values="value")
        wide = wide.reset_index().rename(columns={"seed_index": "seed"})
        for amount in AMOUNTS:
            if amount in wide:
                wide[f"log10_{amount}"] = np.log10(wide[amount].astype(float))
        return wide.sort_values(["cell", "seed"], ignore_index=True)


def branch_table(scores: pd.DataFrame, exposure: pd.DataFrame) -> pd.DataFrame:
    """One row per branch of every finished run: amounts, scores, and log10 of each exposure.

    A run with a diverged branch is not finished: it is counted in the flow of runs and has no row here. An
    exposure estimate of 0 or less has no logarithm and is left missing. Raises `InputError` for
    repeated rows.
    """
    for table, key in ((scores, "score"), (exposure, "definition")):
        repeated = table.duplicated(["run_id", "branch", key])
        if repeated.any():
            row = table[repeated].iloc[0]
            raise InputError(
                "run_id", f"{row['run_id']}, branch {row['branch']}, {row[key]}", "is given twice"
            )
    diverged = set(scores.loc[scores["status"] != "finished", "run_id"])
    finished = scores[~scores["run_id"].isin(diverged)]
    index = [*RUN, "branch", *AMOUNTS]
    branches = finished.pivot(index=index, columns="score", values="value").reset_index()
    doses = exposure.pivot(index=["run_id", "branch"], columns="definition", values="value")
    doses = doses.where(doses > 0).apply(np.log10).add_prefix("log10_")
    merged = branches.merge(doses, how="left", on=["run_id", "branch"], validate="one_to_one")
    return merged.sort_values(["block", "cell", "seed_index", "sequences", "branch"], ignore_index=True)


def match(branches: pd.DataFrame, rule: MatchingRule, unit: str) -> Matched:
    """Bring every finished run of the rule's block to the matched points; `unit` is that of `rule.variable`.

    loss: between the first two consecutive branches (by sequences) whose `rule.variable` brackets
    `rule.target`, every quantity is interpolated linearly in the logarithm of that variable: with
    w = (log l_k - log target) / (log l_k - log l_(k+1)), q = (1 - w) q_k + w q_(k+1). Exposures and amounts
    are interpolated as logarithms, all on the scale on which they are compared as predictors.

    updates (sequences alike): at the smallest, over runs, of the run's largest `updates`. If every run has
    a branch that ends there, that branch; otherwise linear in log `updates`, which the point then says.

    A run that does not bracket the point is unmatched there: it has no rows, and the flow counts it.
    """
    import pandas as pd

    branches = branches[branches["block"] == rule.block]
    runs = [run for _, run in branches.groupby(["cell", "seed_index"], sort=True)]
    points: dict[Matching, Point] = {"loss": Point(unit, rule.target, True)}
    frames = [_at(run, rule.variable, rule.target).assign(matching="loss") for run in runs]
    for name in rule.also:
        column = "updates" if name == "updates" else "sequences"
        if not runs:
            break
        value = float(min(run[column].max() for run in runs))
        everywhere = all((run[column] == value).any() for run in runs)
        points[name] = Point(column, value, not everywhere)
        frames.extend(_at(run, column, value).assign(matching=name) for run in runs)
    columns = [*RUN, "matching", "quantity", "value"]
    rows = pd.concat(frames, ignore_index=True)[columns] if frames else pd.DataFrame(columns=columns)
    return Matched(rows, points)


def _at(run: pd.DataFrame, variable: str, target: float) -> pd.DataFrame:
    """Every quantity of one run where `variable` first reaches `target`, in long form.

    No rows if it never does. `run` is in the order of its branches; `variable` falls (a loss) or rises (an
    amount).
    """
    quantities = run.drop(columns=[*RUN, "branch"]).astype(float)
    # A score that a block does not have is missing everywhere.
    quantities = quantities.dropna(axis=1, how="all")
    values = quantities[variable].to_numpy()
    weights = _weights(values, target)
    if weights is None:
        return run.head(0).assign(quantity="", value=0.0)
    matched = {str(name): _mean(str(name), column.to_numpy(), weights) for name, column in quantities.items()}
    matched = {name: value for name, value in matched.items() if np.isfinite(value)} | {variable: target}
    run = run[RUN].iloc[[0] * len(matched)]
    return run.assign(quantity=list(matched), value=list(matched.values()))


def _mean(name: str, values: np.ndarray, weights: np.ndarray) -> float:
    used = weights > 0  # branches without weight must not pass their missing values on
    values, weights = values[used], weights[used]
    if len(values) == 1:
        return float(values[0])
    return float(np.exp(weights @ np.log(values)) if name in AMOUNTS else weights @ values)


def _weights(values: np.ndarray, target: float) -> np.ndarray | None:
    """Weight of each branch at the first crossing of `target`; None when it is never bracketed."""
    weights = np.zeros(len(values))
    for k, value in enumerate(values):
        if value == target:
            weights[k] = 1.0
            return weights
        if k and (values[k - 1] - target) * (value - target) < 0:
            share = np.log(values[k - 1] / target) / np.log(values[k - 1] / value)
            weights[k - 1 : k + 1] = 1 - share, share
            return weights
    return None
