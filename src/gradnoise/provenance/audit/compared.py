"""Which runs are compared where, worked out once more from scores, noise logs and the plan."""

from __future__ import annotations

import math
import operator
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from gradnoise.evaluation.names import NAMES

if TYPE_CHECKING:
    import pandas as pd

    from gradnoise.base.study import Study
    from gradnoise.provenance.audit.evidence import PlannedRun
    from gradnoise.registration.plan import Exclusion, Plan

Branch = dict[str, float]

AMOUNTS = ("updates", "sequences", "sum_lr")
_COMPARE = {"<": operator.lt, "<=": operator.le, ">": operator.gt, ">=": operator.ge}


@dataclass(frozen=True)
class Compared:
    """The runs of a study under a plan. `planned` are all runs of the design, `exposure` that table."""

    plan: Plan
    study: Study
    planned: Mapping[str, PlannedRun]
    scores: pd.DataFrame
    exposure: pd.DataFrame

    @cached_property
    def branches(self) -> dict[str, list[Branch]]:
        """The branches of each run that finished, in order: amounts, scores and log10 of exposures."""
        lost = set(self.scores.loc[self.scores["status"] != "finished", "run_id"])
        found: dict[str, dict[int, Branch]] = {}
        for row in self.scores.to_dict("records"):
            if row["run_id"] not in lost:
                branch = found.setdefault(row["run_id"], {}).setdefault(row["branch"], {})
                branch |= {name: row[name] for name in AMOUNTS} | {row["score"]: row["value"]}
        for row in self.exposure.to_dict("records"):
            of_run = found.get(row["run_id"], {}).get(row["branch"])
            if of_run is not None and row["value"] > 0:
                of_run[f"log10_{row['definition']}"] = math.log10(row["value"])
        return {
            run: [by[number] for number in sorted(by, key=lambda number: (by[number]["sequences"], number))]
            for run, by in found.items()
        }

    @cached_property
    def points(self) -> dict[str, dict[str, Any]]:
        """Unit, value and kind of each matched point, as in results.json."""
        rule = self.plan.matching
        unit = NAMES[self.study.blocks[rule.block].task.kind][rule.variable]
        found = {"loss": {"unit": unit, "value": rule.target, "interpolated": True}}
        runs = [self.branches[run] for run in self._runs]
        for name in rule.also if runs else ():
            column = "updates" if name == "updates" else "sequences"
            value = float(min(max(branch[column] for branch in run) for run in runs))
            there = all(any(branch[column] == value for branch in run) for run in runs)
            found[name] = {"unit": column, "value": value, "interpolated": not there}
        return found

    @cached_property
    def matched(self) -> dict[tuple[str, str], Branch]:
        """By run and matching: every quantity at the matched point."""
        found = {}
        for name, point in self.points.items():
            variable = self.plan.matching.variable if name == "loss" else point["unit"]
            for run in self._runs:
                at = _at(self.branches[run], variable, point["value"])
                if at is not None:
                    found[run, name] = at
        return found

    @cached_property
    def excluded(self) -> dict[str, str]:
        """Run to the first rule of the plan that leaves it out, by blind columns alone."""
        rows = self.exposure[
            (self.exposure["block"] == self.plan.matching.block)
            & (self.exposure["definition"] == self.plan.exposure.primary)
        ]
        found: dict[str, str] = {}
        for run, own in rows.groupby("run_id"):
            rule = next((rule.id for rule in self.plan.exclusions if _breaks(own, rule)), None)
            if rule is not None:
                found[str(run)] = rule
        return found

    @cached_property
    def fates(self) -> dict[str, tuple[str, str | None]]:
        """What became of every planned run, and the rule that left it out."""
        started = set(self.scores["run_id"])
        found: dict[str, tuple[str, str | None]] = {}
        for name, run in self.planned.items():
            rule = self.excluded.get(name)
            if name not in started:
                found[name] = ("missing", None)
            elif name not in self.branches:
                found[name] = ("diverged", None)
            elif run.block != self.plan.matching.block:
                found[name] = ("not compared", None)
            elif (name, "loss") not in self.matched:
                found[name] = ("unmatched", None)
            else:
                found[name] = ("excluded", rule) if rule else ("analysed", None)
        return found

    def frame(self, matching: str) -> pd.DataFrame:
        """One row a run that is compared at this point, in the order of cells and seeds."""
        rows = [
            self._row(run, quantities)
            for (run, name), quantities in self.matched.items()
            if name == matching and run not in self.excluded
        ]
        return self._frame(rows)

    def branch_frame(self, gap: float | None) -> pd.DataFrame:
        """One row a run at its branch nearest to the target, if within `gap` of it; None: at its last."""
        rows = []
        variable, target = self.plan.matching.variable, self.plan.matching.target
        for run in self._runs:
            if run in self.excluded:
                continue
            branch = self.branches[run][-1]
            if gap is not None:
                branch = min(self.branches[run], key=lambda branch: abs(branch[variable] - target))
                if not abs(branch[variable] - target) <= gap:
                    continue
            rows.append(self._row(run, branch))
        return self._frame(rows)

    @property
    def _runs(self) -> list[str]:
        """Finished runs of the matched block, in the order of the design."""
        return [
            name
            for name, run in self.planned.items()
            if run.block == self.plan.matching.block and name in self.branches
        ]

    def _row(self, name: str, quantities: Branch) -> dict[str, Any]:
        run = self.planned[name]
        cell = self.study.blocks[run.block].cell(run.cell)
        logs = {f"log10_{amount}": math.log10(quantities[amount]) for amount in AMOUNTS}
        place = {"run_id": name, "cell": run.cell, "seed": run.seed_index}
        return {**place, "batch": cell.batch, "learning_rate": cell.learning_rate, **quantities, **logs}

    def _frame(self, rows: list[dict[str, Any]]) -> pd.DataFrame:
        import pandas as pd

        if not rows:
            return pd.DataFrame(columns=["run_id", "cell", "seed", "batch", "learning_rate"])
        return pd.DataFrame(rows).sort_values(["cell", "seed"], ignore_index=True)


def _at(branches: list[Branch], variable: str, target: float) -> Branch | None:
    """Quantities where `variable` first reaches `target`: interpolated in its logarithm, amounts as logs."""
    for before, after in zip([None, *branches], branches, strict=False):
        if after[variable] == target:
            return {**after, variable: target}
        if before is None or (before[variable] > target) == (after[variable] > target):
            continue
        ends = sorted((before, after), key=lambda branch: branch[variable])
        at = np.log([end[variable] for end in ends])
        found = {}
        for name in before.keys() & after.keys():
            values = np.array([end[name] for end in ends], dtype=float)
            if name in AMOUNTS:
                found[name] = float(np.exp(np.interp(np.log(target), at, np.log(values))))
            else:
                found[name] = float(np.interp(np.log(target), at, values))
        return {**found, variable: target}
    return None


def _breaks(own: pd.DataFrame, rule: Exclusion) -> bool:
    """Whether a run, by its rows of the primary exposure, breaks an exclusion rule."""
    values = own["value"].to_numpy(dtype=float)
    if rule.column == "exposure":
        known = values[~np.isnan(values)]
        fact = known.min() if len(known) else math.nan
    elif rule.column == "events":
        fact = own["events"].min()
    else:
        positive = values > 0
        errors = own["stderr"].to_numpy(dtype=float)[positive] / values[positive]
        known = errors[~np.isnan(errors)]
        fact = known.max() if len(known) else math.nan
    return bool(_COMPARE[rule.op](fact, rule.value))
