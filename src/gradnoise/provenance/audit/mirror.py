"""results.json once more: what it must hold, worked out from tables and plan without the analysis's code."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from gradnoise.base.vocabulary import CONFIRMATORY, DEVIATED, EXPLORATORY, STANDING
from gradnoise.provenance.audit import described, resampled, second_path, trends, verdicts
from gradnoise.provenance.audit.compared import Compared
from gradnoise.provenance.audit.second_path import Unable
from gradnoise.provenance.audit.trees import Text
from gradnoise.registration.kinds import (
    COVARIATE,
    AnovaTest,
    AnyTest,
    ContrastTest,
    Correlation,
    MixedTest,
    SlopeTest,
    TostTest,
    TrendTest,
)

if TYPE_CHECKING:
    import pandas as pd

    from gradnoise.base.vocabulary import Matching
    from gradnoise.registration.deviations import Deviation
    from gradnoise.registration.plan import Plan

Entry = dict[str, Any]

_NUMBERS = ("estimate", "stderr", "df", "p", "low", "high")
# Points of a drawn line.
_POINTS = 50


class Mirror:
    """What results.json must hold under a plan.

    `compared`: the runs; `key`: what draws are seeded by; `shown`: entries of `tests` as reported, from
    which a mixed model's variances are taken to be certified.
    """

    def __init__(self, compared: Compared, key: str, shown: Sequence[Entry]) -> None:
        self.plan, self.compared, self.key = compared.plan, compared, key
        self.shown = {entry["id"]: entry for entry in shown}
        self.frames = {name: compared.frame(name) for name in compared.plan.matching.names}
        self.reliability = described.reliability(compared)

    def thresholds(self) -> Entry:
        """Section `thresholds`: numbers of the plan as captions print them."""
        plan = self.plan
        margins = [test.high for test in plan.tests if isinstance(test, TostTest)]
        steps = [(test.margin, test.draws) for test in plan.tests if isinstance(test, TrendTest)]
        margin, draws = steps[0] if steps else (None, None)
        return {
            **{"target_loss": plan.matching.target, "alpha": plan.families[0].alpha},
            **{"reading_alpha": round(1 - plan.intervals.level, 12), "level": plan.intervals.level},
            **{"margin": margins[0] if margins else None, "trend_margin": margin, "draws": draws},
            "reliability": plan.matching.minimum_reliability,
            "fewest_seeds": plan.seeds.fewest_analysed,
            "missing": plan.matching.limits.missing,
            "missing_difference": plan.matching.limits.difference,
        }

    def descriptive(self) -> Entry:
        """Section `descriptive`."""
        asked = self.plan.descriptive
        outcome = self.plan.outcome(asked.outcome)
        about = {"score": outcome.score, "unit": outcome.unit}
        return about | {"predictor": asked.predictor, "rivals": list(asked.rivals)}

    def tests(self) -> list[Entry]:
        """Section `tests`, without labels."""
        return [self.test(test) for test in self.plan.tests]

    def test(self, test: AnyTest) -> Entry:
        """One entry of `tests`; where it cannot be carried out, without numbers and with any reason."""
        frame = self.used(test)
        entry: Entry = {
            **{name: getattr(test, name) for name in ("id", "kind", "hypothesis", "matching", "description")},
            **dict.fromkeys((*_NUMBERS, "level")),
            **{"outcome": "undecided", "asked": test.model_dump(mode="json")},
            **{"alpha": round(1 - self.plan.intervals.level, 12), "details": {"reason": Text()}},
            **{"runs": len(frame), "seeds": len(set(frame["seed"]))},
        }
        fewest = self.plan.seeds.fewest_analysed
        if entry["seeds"] < fewest or self.too_many_missing(test, frame):
            return entry
        try:
            found = self.carried_out(test, frame)
        except Unable:
            return entry
        return entry | found if found.get("seeds", fewest) >= fewest else entry

    def used(self, test: AnyTest) -> pd.DataFrame:
        """The runs that a test is about."""
        frame = self.frames[test.matching]
        return frame[frame["cell"].isin(self.cells(test))].reset_index(drop=True)

    def cells(self, test: AnyTest) -> list[str]:
        """The cells that a test is about."""
        if isinstance(test, ContrastTest):
            return [*test.first, *test.second]
        if isinstance(test, TrendTest):
            return [cell for level in test.levels for cell in level]
        if isinstance(test, TostTest):
            return list(test.arms)
        block = self.compared.study.blocks[self.plan.matching.block]
        return list(test.cells or [cell.name for cell in block.cells()])

    def too_many_missing(self, test: AnyTest, frame: pd.DataFrame) -> bool:
        """Whether more of the planned runs are missing, at all or in one cell, than the plan allows."""
        seeds, limits = self.compared.study.blocks[self.plan.matching.block].seeds, self.plan.matching.limits
        shares = [1 - int((frame["cell"] == cell).sum()) / seeds for cell in self.cells(test)]
        return sum(shares) / len(shares) > limits.missing or max(shares) - min(shares) > limits.difference

    def carried_out(self, test: AnyTest, frame: pd.DataFrame) -> Entry:
        """The numbers of a test by the second path."""
        plan, needed = self.plan, [self.plan.outcome(test.outcome).score]
        if isinstance(test, SlopeTest):
            needed.append(test.predictor)
        if isinstance(test, MixedTest):
            needed += [plan.matching.variable if name == COVARIATE else name for name in test.fixed]
        if any(name not in frame or frame[name].isna().any() for name in needed):
            raise Unable("a value is missing")
        match test:
            case SlopeTest():
                return second_path.slope(plan, test, frame)
            case MixedTest():
                return self.mixed(test, frame)
            case ContrastTest():
                return second_path.contrast(plan, test, frame)
            case TrendTest():
                return trends.trend(plan, test, frame, self.key)
            case TostTest():
                return second_path.tost(plan, test, frame)
            case AnovaTest():
                return second_path.anova(plan, test, frame)

    def mixed(self, test: MixedTest, frame: pd.DataFrame) -> Entry:
        """A mixed model: the reported fit certified, or that there is none."""
        minimum = self.plan.matching.minimum_reliability
        if COVARIATE in test.fixed and not (self.reliability is not None and self.reliability >= minimum):
            raise Unable("the loss is not reliable enough to adjust for it")
        details = self.shown.get(test.id, {}).get("details", {})
        if "theta" in details:
            return second_path.mixed(self.plan, test, frame, details)
        # Said to be impossible: then it must be.
        return {"estimate": float(second_path.searched(self.plan, test, frame).beta[1])}

    def hypotheses(self, tests: Sequence[Entry]) -> list[Entry]:
        """Section `hypotheses`, from these tests, without labels."""
        return verdicts.hypotheses(self.plan, {test["id"]: test for test in tests})

    def families(self, tests: Sequence[Entry]) -> list[Entry]:
        """Section `families`, from these tests."""
        return verdicts.families(self.plan, {test["id"]: test for test in tests})

    def bands(self) -> list[Entry]:
        """Section `bands`."""
        found = []
        for test in self.plan.tests:
            if isinstance(test, TrendTest):
                try:
                    y, seeds, incomplete = trends.levels(self.plan, test, self.used(test))
                    found.append(described.band(self.plan, test, y, seeds, incomplete, self.key))
                except Unable:
                    continue
        return found

    def sensitivity(self) -> list[Entry]:
        """Section `sensitivity`, without labels."""
        found = []
        for asked in self.plan.sensitivity:
            test = self.plan.test(asked.test)
            assert isinstance(test, SlopeTest)  # the plan's loader saw to it
            places: list[tuple[str, pd.DataFrame]] = [(m, self.frames[test.matching]) for m in asked.methods]
            places += [(f"window {gap:g}", self.compared.branch_frame(gap)) for gap in asked.windows]
            if asked.unmatched:
                places.append(("unmatched", self.compared.branch_frame(None)))
            for method, frame in places:
                frame = frame[frame["cell"].isin(self.cells(test))].reset_index(drop=True)
                carry_out = partial(resampled.sensitivity, self.plan, asked, test, method, frame, self.key)
                found.append({"test": test.id, "method": method, **self._beside(frame, carry_out)})
        return found

    def exploratory(self) -> list[Entry]:
        """Section `exploratory`, without labels."""
        found = []
        for asked in self.plan.exploratory:
            frame = self.frames[asked.matching]
            about = {name: getattr(asked, name) for name in ("id", "kind", "description", "matching")}
            if isinstance(asked, Correlation):
                carry_out = partial(resampled.correlation, self.plan, asked, frame)
            else:
                carry_out = partial(resampled.mediation, self.plan, asked, frame, self.key)
            found.append(about | self._beside(frame, carry_out))
        return found

    def _beside(self, frame: pd.DataFrame, carry_out: Callable[[], Entry]) -> Entry:
        """What an entry beside the tests must hold; without numbers and with any reason where it cannot."""
        seeds = len(set(frame["seed"]))
        entry: Entry = {"runs": len(frame), "seeds": seeds, "level": self.plan.intervals.level}
        entry |= dict.fromkeys(_NUMBERS)
        try:
            if seeds < self.plan.seeds.fewest_analysed:
                raise Unable("too few seeds")
            return entry | carry_out()
        except Unable:
            return entry | {"details": {"reason": Text()}}


def labels(plan: Plan, deviations: Sequence[Deviation]) -> Mapping[str, str]:
    """What each test and each hypothesis may be called."""
    if plan.study.kind == "rehearsal":
        names = [item.id for item in (*plan.tests, *plan.hypotheses)]
        return dict.fromkeys(names, plan.study.label)
    late = {test for deviation in deviations if deviation.discovered == "after" for test in deviation.tests}
    found = {test.id: DEVIATED if test.id in late else CONFIRMATORY for test in plan.tests}
    for hypothesis in plan.hypotheses:
        deciding = [*hypothesis.p.max_of, *(c.test for c in (*hypothesis.met.all, *hypothesis.not_met.any))]
        found[hypothesis.id] = max((found[name] for name in deciding), key=STANDING.index)
    return found


def beside_label(plan: Plan) -> str:
    """What sensitivities and explorations are called."""
    return EXPLORATORY if plan.study.kind == "registered" else plan.study.label


def curves(mirror: Mirror, matching: Matching) -> list[Entry]:
    """Rows of table `curves` at one matching: the mixed model's line with its band, and the isotonic step."""
    plan, frame = mirror.plan, mirror.frames[matching]
    asked = plan.descriptive
    models = [test for test in plan.tests if isinstance(test, MixedTest)]
    model = next((t for t in models if (t.outcome, t.fixed) == (asked.outcome, (asked.predictor,))), None)
    rows: list[Entry] = []
    if model is not None and len(frame):
        rows += _line(plan, model, frame)
    trend = next((t for t in plan.tests if isinstance(t, TrendTest) and t.outcome == asked.outcome), None)
    if trend is not None and len(frame):
        steps = described.isotonic_curve(plan, frame, trend.alternative)
        rows += [{"curve": "isotonic", "x": x, "y": y, "low": None, "high": None} for x, y in steps]
    return [{"matching": matching, **row} for row in rows]


def _line(plan: Plan, model: MixedTest, frame: pd.DataFrame) -> list[Entry]:
    try:
        found = second_path.searched(plan, model, frame)
    except Unable:
        return []
    dose, line = frame[model.fixed[0]].to_numpy(dtype=float), []
    for at in np.linspace(dose.min(), dose.max(), _POINTS):
        point = second_path.term(found, np.array([1.0, at]), plan.intervals.level)
        ends = {"low": point["low"], "high": point["high"]}
        line.append({"curve": "mixed_model", "x": float(at), "y": point["estimate"], **ends})
    return line
