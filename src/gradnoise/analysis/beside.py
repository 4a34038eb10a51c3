"""What stands beside the tests: the deciding slopes by other means and at other places, and explorations.

None of it decides: no rule of a plan can rest on it, and a registered study labels it exploratory.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import numpy as np

from gradnoise.analysis.decisions import enough_seeds, levels_of, permutation_seed
from gradnoise.analysis.gather import Gathered
from gradnoise.analysis.statistics.bands import isotonic_band
from gradnoise.analysis.statistics.cluster_robust import cluster_robust
from gradnoise.analysis.statistics.correlation import spearman
from gradnoise.analysis.statistics.mediation import mediation
from gradnoise.analysis.statistics.resampling import seed_bootstrap, sign_flip, wild_bootstrap
from gradnoise.analysis.statistics.slopes import seed_slopes
from gradnoise.base.errors import InputError
from gradnoise.base.vocabulary import EXPLORATORY
from gradnoise.registration import Plan
from gradnoise.registration.kinds import Correlation, Mediation, SlopeTest, TrendTest
from gradnoise.registration.plan import Sensitivity

if TYPE_CHECKING:
    import pandas as pd

Entry = dict[str, Any]

_NUMBERS = ("estimate", "stderr", "df", "p", "low", "high")


def sensitivities(plan: Plan, gathered: Gathered) -> list[Entry]:
    """Each slope test of the plan's `sensitivity`: by its other methods, then at its other places.

    `cluster_robust` is CR2 with Satterthwaite df on differences within seeds; the bootstraps and the sign
    flip are those of `resampling`, the wild bootstrap on values centred in each seed. A window takes each
    run's branch nearest to the target as it is, where it lies within the window; `unmatched` takes the last.
    """
    entries: list[Entry] = []
    for asked in plan.sensitivity:
        test = plan.test(asked.test)
        assert isinstance(test, SlopeTest)  # the plan's loader saw to it
        frame = _of_cells(test, gathered.frames[test.matching])
        for method in asked.methods:
            about = {"test": test.id, "method": method, **_size(frame)}
            entries.append(_entry(plan, about, _METHODS[method], asked, test, frame))
        for place, rows in _places(plan, asked, gathered):
            rows = _of_cells(test, rows)
            about = {"test": test.id, "method": place, **_size(rows)}
            entries.append(_entry(plan, about, _slope, asked, test, rows))
    return entries


def bands(plan: Plan, gathered: Gathered) -> list[Entry]:
    """The isotonic fit of each trend test with its two bands, by level; none where the levels lack runs."""
    entries: list[Entry] = []
    for test in plan.tests:
        if not isinstance(test, TrendTest):
            continue
        try:
            found = isotonic_band(
                levels_of(test, gathered.frames[test.matching]),
                plan.outcome(test.outcome).score,
                "level",
                "seed",
                alternative=test.alternative,
                confidence=plan.intervals.level,
                draws=plan.descriptive.band_draws,
                trials=plan.descriptive.band_trials,
                seed=permutation_seed(plan, f"{test.id}/band"),
            )
        except InputError:
            continue
        entries.append({"test": test.id, **asdict(found)})
    return entries


def explorations(plan: Plan, gathered: Gathered) -> list[Entry]:
    """The plan's `exploratory` entries: rank correlations and mediations."""
    entries: list[Entry] = []
    for asked in plan.exploratory:
        frame = gathered.frames[asked.matching]
        about = {name: getattr(asked, name) for name in ("id", "kind", "description", "matching")}
        function = _correlation if isinstance(asked, Correlation) else _mediation
        entries.append(_entry(plan, about | _size(frame), function, asked, frame))
    return entries


def _entry(
    plan: Plan, about: Entry, function: Callable[..., Entry], asked: object, *arguments: object
) -> Entry:
    """What `function` finds, or nothing but the reason why it cannot."""
    label = EXPLORATORY if plan.study.kind == "registered" else plan.study.label
    entry = about | dict.fromkeys(_NUMBERS) | {"label": label, "level": plan.intervals.level, "details": {}}
    try:
        enough_seeds(plan, about["seeds"])
        return entry | function(plan, asked, *arguments)
    except InputError as error:
        return entry | {"details": {"reason": str(error)}}


def _size(frame: pd.DataFrame) -> dict[str, int]:
    return {"runs": len(frame), "seeds": int(frame["seed"].nunique())}


def _of_cells(test: SlopeTest, frame: pd.DataFrame) -> pd.DataFrame:
    return frame if test.cells is None else frame[frame["cell"].isin(test.cells)].reset_index(drop=True)


def _places(plan: Plan, asked: Sensitivity, gathered: Gathered) -> Iterator[tuple[str, pd.DataFrame]]:
    """Runs at other places than matched points: one row a run, by its branch there."""
    rows = gathered.branches
    # With no finished run at all there are no columns of scores either.
    rows = rows.reindex(columns=list(dict.fromkeys([*rows.columns, plan.matching.variable])))
    rows = rows[rows["block"] == plan.matching.block].rename(columns={"seed_index": "seed"})
    rows = rows[~rows["run_id"].isin(list(gathered.excluded))]
    gap = (rows[plan.matching.variable].astype(float) - plan.matching.target).abs()
    nearest = rows.assign(gap=gap).sort_values(["run_id", "gap"]).groupby("run_id", sort=True).head(1)
    for window in asked.windows:
        yield f"window {window:g}", nearest[nearest["gap"] <= window]
    if asked.unmatched:
        yield "unmatched", rows.groupby("run_id", sort=True).tail(1)


def _slope(plan: Plan, asked: Sensitivity, test: SlopeTest, frame: pd.DataFrame) -> Entry:
    score, level = plan.outcome(test.outcome).score, plan.intervals.level
    found = seed_slopes(frame, score, test.predictor, alternative=test.alternative, level=level)
    numbers = {"estimate": found.estimate, "stderr": found.se, "df": found.df, "p": found.p}
    return numbers | {"low": found.low, "high": found.high, "details": {"alternative": test.alternative}}


def _slopes(plan: Plan, test: SlopeTest, frame: pd.DataFrame) -> np.ndarray:
    score = plan.outcome(test.outcome).score
    found = seed_slopes(frame, score, test.predictor, level=plan.intervals.level)
    return np.array(list(found.slopes.values()))


def _wild(plan: Plan, asked: Sensitivity, test: SlopeTest, frame: pd.DataFrame) -> Entry:
    score = plan.outcome(test.outcome).score
    means = frame.groupby("seed")[[score, test.predictor]].transform("mean")
    centred = frame[["run_id", "seed"]].join(frame[[score, test.predictor]] - means)
    seed = permutation_seed(plan, f"{test.id}/wild_cluster_bootstrap")
    found = wild_bootstrap(
        centred,
        score,
        test.predictor,
        "seed",
        alternative=test.alternative,
        draws=asked.resamples,
        seed=seed,
    )
    details = {"alternative": test.alternative, "t": found.t, "exact": found.exact, "draws": found.draws}
    return {"estimate": found.estimate, "p": found.p, "details": details | {"seed": seed}}


def _flip(plan: Plan, asked: Sensitivity, test: SlopeTest, frame: pd.DataFrame) -> Entry:
    slopes = _slopes(plan, test, frame)
    found = sign_flip(slopes, test.alternative)
    details = {"alternative": test.alternative, "smallest_p": found.smallest_p}
    return {"estimate": float(slopes.mean()), "p": found.p, "details": details}


def _robust(plan: Plan, asked: Sensitivity, test: SlopeTest, frame: pd.DataFrame) -> Entry:
    score, level = plan.outcome(test.outcome).score, plan.intervals.level
    found = cluster_robust(frame, score, [test.predictor], "seed", within=True, level=level)
    term = found.terms[test.predictor]
    numbers = {"estimate": term.estimate, "stderr": term.se, "df": term.df, "p": term.p}
    return numbers | {"low": term.low, "high": term.high, "details": {"alternative": "two-sided"}}


def _studentised(plan: Plan, asked: Sensitivity, test: SlopeTest, frame: pd.DataFrame) -> Entry:
    seed = permutation_seed(plan, f"{test.id}/studentised_bootstrap")
    slopes, level = _slopes(plan, test, frame), plan.intervals.level
    found = seed_bootstrap(slopes, level=level, draws=asked.resamples, seed=seed)
    numbers = {"estimate": found.estimate, "stderr": found.se, "p": found.p}
    details = {"alternative": "two-sided", "exact": found.exact, "draws": asked.resamples, "seed": seed}
    return numbers | {"low": found.low, "high": found.high, "details": details}


_METHODS = {
    "wild_cluster_bootstrap": _wild,
    "sign_flip": _flip,
    "cluster_robust": _robust,
    "studentised_bootstrap": _studentised,
}


def _correlation(plan: Plan, asked: Correlation, frame: pd.DataFrame) -> Entry:
    score, level = plan.outcome(asked.outcome).score, plan.intervals.level
    found = spearman(frame, score, asked.predictor, "seed", level=level)
    details = {
        "by_seed": list(found.by_cluster.values()),
        "pooled": {"estimate": found.pooled_rho, "low": found.pooled_low, "high": found.pooled_high},
    }
    numbers = {"estimate": found.rho, "df": found.df, "low": found.low, "high": found.high}
    return numbers | {"runs": found.runs, "details": details}


def _mediation(plan: Plan, asked: Mediation, frame: pd.DataFrame) -> Entry:
    scores = [plan.outcome(name).score for name in (asked.outcome, asked.mediator)]
    seed = permutation_seed(plan, f"{asked.id}/mediation")
    found = mediation(
        frame,
        scores[0],
        asked.predictor,
        scores[1],
        "seed",
        level=plan.intervals.level,
        draws=asked.resamples,
        seed=seed,
    )
    paths = {name: asdict(getattr(found, name)) for name in ("a", "b", "total", "direct")}
    details = paths | {"rho_at_zero": found.rho_at_zero, "exact": found.exact, "seed": seed}
    numbers = {"estimate": found.indirect, "stderr": found.se, "p": found.p}
    return numbers | {"low": found.low, "high": found.high, "runs": found.runs, "details": details}
