"""The plan: the one file that decides what is tested, how, and what the outcome is called.

Registered studies and rehearsals share the format. Code carries out a plan and holds no margin, alpha,
level, number of draws or target of its own. There are no free formulas: every term is a named field.
"""

from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, PrivateAttr

from gradnoise.base import strict_yaml
from gradnoise.base.errors import InputError
from gradnoise.base.files import sha256_of
from gradnoise.base.study import Block, Strict, Study, validated
from gradnoise.base.vocabulary import LABELS, Matching
from gradnoise.evaluation.names import NAMES

Name = Annotated[str, Field(pattern=r"^[A-Za-z][A-Za-z0-9_-]*$")]
Text = Annotated[str, Field(min_length=1)]
# Strict: a quoted number is a fault in a plan, not something to convert.
Number = Annotated[float, Field(strict=True)]
Positive = Annotated[float, Field(gt=0, strict=True)]
Share = Annotated[float, Field(gt=0, lt=1, strict=True)]
Definition = Literal["pne", "pne2", "ne", "retained"]

# What a test may be read as. A test that is only reported has no reading, so no rule can rest on it.
READINGS: dict[str, tuple[str, ...]] = {
    "slope": ("above zero", "below zero", "undecided"),
    "trend": ("ordered", "reversal", "undecided"),
    "tost": ("inside margins", "outside zero", "both", "undecided"),
    "mixed": (),
}


class About(Strict):
    """Which study this is, and what its authors knew when they wrote the plan."""

    id: Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9-]*$")]
    title: Text
    kind: Literal["rehearsal", "registered"]
    config: Annotated[str, Field(pattern=r"^config/[a-z0-9][a-z0-9-]*\.yaml$")]
    prior_access: Literal["none", "pilot", "outcome_known"]

    @property
    def label(self) -> str:
        """The word that every number of the study carries."""
        return LABELS[self.kind]


class Seeds(Strict):
    """Seeds follow from the plan's hash; every cell uses the same ones."""

    derive: Literal["hmac-sha256"]
    crossed: Literal[True]
    minimum: Annotated[int, Field(ge=5, strict=True, description="seeds of a tested block")]
    fewest_analysed: Annotated[int, Field(ge=3, strict=True, description="a test on fewer has no p")]


class Outcome(Strict):
    """A score that is analysed, in absolute units."""

    id: Name
    role: Literal["primary", "secondary", "negative_control", "manipulation_check", "descriptive"]
    block: Name
    score: Name
    unit: Text
    direction: Literal["higher", "lower"] = Field(description="which way is better")


class Exposure(Strict):
    """Which integrated exposure is the dose, and on which scale."""

    primary: Definition
    transform: Literal["log10"]
    secondary: tuple[Definition, ...] = ()


class MatchingRule(Strict):
    """Where runs are compared."""

    block: Name
    variable: Name
    target: Positive
    how: Literal["log-linear"] = Field(
        description="linear in the logarithm of `variable`, between the two branches that bracket `target`"
    )
    minimum_reliability: Share
    also: tuple[Literal["updates", "tokens"], ...] = ()

    @property
    def names(self) -> tuple[Matching, ...]:
        """Every matching, the deciding one first."""
        return ("loss", *self.also)


class Test(Strict):
    """What every test has: what it looks at, and where."""

    id: Name
    hypothesis: Name | None = Field(default=None, description="the hypothesis it is reported under")
    description: Text
    outcome: Name
    matching: Matching


class SlopeTest(Test):
    """Least-squares slope within each seed, then a one-sample t over seeds."""

    kind: Literal["slope"]
    predictor: Name
    cluster: Literal["seed"]
    alternative: Literal["greater", "less", "two-sided"]


class MixedTest(Test):
    """Linear mixed model; reported, never decisive, while it has no degrees of freedom."""

    kind: Literal["mixed"]
    fixed: tuple[Name, ...] = Field(min_length=1)
    random: dict[Annotated[str, Field(pattern="^seed$")], tuple[str, ...]] = Field(min_length=1)
    estimator: Literal["reml"]
    degrees_of_freedom: Literal["none"]


class TrendTest(Test):
    """Isotonic trend over assigned levels, blocked by seed, with reversals and a margin for each step."""

    kind: Literal["trend"]
    levels: tuple[Annotated[tuple[str, ...], Field(min_length=1)], ...] = Field(min_length=3)
    cluster: Literal["seed"]
    alternative: Literal["increasing", "decreasing"]
    margin: Positive
    draws: Annotated[int, Field(ge=999, strict=True)]


class TostTest(Test):
    """Two one-sided tests of the mean difference first arm - second arm, paired by seed."""

    kind: Literal["tost"]
    arms: tuple[str, str]
    cluster: Literal["seed"]
    low: Number
    high: Number


AnyTest = Annotated[SlopeTest | MixedTest | TrendTest | TostTest, Field(discriminator="kind")]


class Condition(Strict):
    """Holds when the test was read as one of `reading`."""

    test: Name
    reading: tuple[str, ...] = Field(min_length=1)


class All(Strict):
    """Every condition holds."""

    all: tuple[Condition, ...] = Field(min_length=1)


class AnyOf(Strict):
    """At least one condition holds."""

    any: tuple[Condition, ...] = Field(min_length=1)


class MaxOf(Strict):
    """The largest p of these tests: all must be small (intersection-union)."""

    max_of: tuple[Name, ...] = Field(min_length=1)


class Hypothesis(Strict):
    """A claim and its rule.

    `met` needs every condition and an adjusted p of at most the family's alpha; `not_met` needs any of its
    conditions; otherwise the outcome is undecided. Loading makes sure that both cannot hold.
    """

    id: Name
    text: Text
    p: MaxOf
    met: All
    not_met: AnyOf


class Family(Strict):
    """Hypotheses that share an error rate."""

    id: Name
    members: tuple[Name, ...] = Field(min_length=1)
    method: Literal["holm"]
    alpha: Share
    missing_p: Annotated[float, Field(ge=1, le=1, strict=True)] = Field(
        description="a p that could not be computed counts as 1 and stays in the family"
    )


class Intervals(Strict):
    """Tests are read at alpha = 1 - level: two-sided intervals at `level`, TOST at 1 - 2 alpha."""

    level: Share


class Descriptive(Strict):
    """What is drawn and set side by side without a test."""

    outcome: Name
    predictor: Name
    rivals: tuple[Name, ...]


class Plan(Strict):
    """A whole plan; `sha256` names its content whatever its comments, spacing and order of keys."""

    study: About
    seeds: Seeds
    outcomes: tuple[Outcome, ...] = Field(min_length=1)
    exposure: Exposure
    matching: MatchingRule
    tests: tuple[AnyTest, ...] = Field(min_length=1)
    hypotheses: tuple[Hypothesis, ...] = Field(min_length=1)
    families: tuple[Family, ...] = Field(min_length=1)
    intervals: Intervals
    descriptive: Descriptive
    _sha256: str = PrivateAttr(default="")

    @property
    def sha256(self) -> str:
        """SHA-256 (hex) of the canonical JSON of the parsed document. Seeds and run names follow from it."""
        return self._sha256

    def outcome(self, name: str) -> Outcome:
        """The outcome of that id."""
        return next(outcome for outcome in self.outcomes if outcome.id == name)


def load_plan(path: Path | str) -> Plan:
    """Read a plan and check it whole, against itself and against the study's settings it names.

    `study.config` is found from the working folder. Every fault is one `InputError` line naming the field.
    """
    document = strict_yaml.load(path)
    plan = validated(Plan, document, str(path))
    study = validated(Study, strict_yaml.load(plan.study.config), plan.study.config)
    for field, value, mend in _faults(plan, study):
        raise InputError(f"{path}: {field}", value, mend)
    plan._sha256 = sha256_of(document)
    return plan


Fault = tuple[str, object, str]


def _faults(plan: Plan, study: Study) -> Iterable[Fault]:
    """Every fault that one field alone cannot show."""
    for field in ("outcomes", "tests", "hypotheses", "families"):
        yield from _repeated(field, [item.id for item in getattr(plan, field)])
    for outcome in plan.outcomes:
        yield from _score_faults(study, outcome)
    if plan.matching.block not in study.blocks:
        yield "matching.block", plan.matching.block, f"must be one of {sorted(study.blocks)}"
        return
    block = study.blocks[plan.matching.block]
    yield from _unknown("matching.variable", [plan.matching.variable], list(NAMES[block.task.kind]))
    if block.seeds < plan.seeds.minimum:
        yield "seeds.minimum", plan.seeds.minimum, f"block {plan.matching.block} has {block.seeds} seeds"
    yield from _repeated("matching.also", plan.matching.also)
    for test in plan.tests:
        yield from _test_faults(plan, block, test)
    yield from _descriptive_faults(plan)
    for hypothesis in plan.hypotheses:
        yield from _hypothesis_faults(plan, hypothesis)
    yield from _family_faults(plan)


def _repeated(field: str, names: Iterable[str]) -> Iterable[Fault]:
    names = list(names)
    for name in sorted({name for name in names if names.count(name) > 1}):
        yield field, name, "must appear once"


def _score_faults(study: Study, outcome: Outcome) -> Iterable[Fault]:
    where = f"outcomes.{outcome.id}"
    yield from _unknown(f"{where}.block", [outcome.block], sorted(study.blocks))
    if outcome.block in study.blocks:
        units = NAMES[study.blocks[outcome.block].task.kind]
        yield from _unknown(f"{where}.score", [outcome.score], list(units))
        if outcome.unit != units.get(outcome.score, outcome.unit):
            yield f"{where}.unit", outcome.unit, f"must be {units[outcome.score]}"


def _predictors(plan: Plan) -> list[str]:
    definitions = (plan.exposure.primary, *plan.exposure.secondary)
    return [f"{plan.exposure.transform}_{definition}" for definition in definitions]


def _outcome_fault(plan: Plan, field: str, name: str) -> Iterable[Fault]:
    matched = [outcome.id for outcome in plan.outcomes if outcome.block == plan.matching.block]
    if name not in matched:
        yield field, name, f"must be an outcome of block {plan.matching.block}: {matched}"


def _test_faults(plan: Plan, block: Block, test: AnyTest) -> Iterable[Fault]:
    where = f"tests.{test.id}"
    yield from _outcome_fault(plan, f"{where}.outcome", test.outcome)
    if test.matching not in plan.matching.names:
        yield f"{where}.matching", test.matching, f"must be one of {list(plan.matching.names)}"
    hypotheses = [hypothesis.id for hypothesis in plan.hypotheses]
    if test.hypothesis is not None and test.hypothesis not in hypotheses:
        yield f"{where}.hypothesis", test.hypothesis, f"must be one of {hypotheses}"
    cells = [cell.name for cell in block.cells()]
    match test:
        case SlopeTest():
            yield from _unknown(f"{where}.predictor", [test.predictor], _predictors(plan))
        case MixedTest():
            yield from _unknown(f"{where}.fixed", test.fixed, _predictors(plan))
            for cluster, terms in test.random.items():
                yield from _unknown(f"{where}.random.{cluster}", terms, ["1", *test.fixed])
        case TrendTest():
            named = [cell for level in test.levels for cell in level]
            yield from _unknown(f"{where}.levels", named, cells)
            yield from _repeated(f"{where}.levels", named)
        case TostTest():
            yield from _unknown(f"{where}.arms", test.arms, cells)
            yield from _repeated(f"{where}.arms", test.arms)
            if test.low >= test.high:
                yield f"{where}.low", test.low, f"must be below high ({test.high})"


def _unknown(field: str, names: Iterable[str], known: list[str]) -> Iterable[Fault]:
    for name in names:
        if name not in known:
            yield field, name, f"must be one of {known}"


def _descriptive_faults(plan: Plan) -> Iterable[Fault]:
    described, known = plan.descriptive, _predictors(plan)
    yield from _outcome_fault(plan, "descriptive.outcome", described.outcome)
    yield from _unknown("descriptive.predictor", [described.predictor], known)
    counted = ["log10_updates", "log10_sequences", "log10_sum_lr"]
    yield from _unknown("descriptive.rivals", described.rivals, known + counted)


def _hypothesis_faults(plan: Plan, hypothesis: Hypothesis) -> Iterable[Fault]:
    where = f"hypotheses.{hypothesis.id}"
    kinds = {test.id: test.kind for test in plan.tests}
    decisive = [name for name, kind in kinds.items() if READINGS[kind]]
    yield from _unknown(f"{where}.p.max_of", hypothesis.p.max_of, decisive)
    rules = (("met.all", hypothesis.met.all), ("not_met.any", hypothesis.not_met.any))
    for rule, conditions in rules:
        for condition in conditions:
            if condition.test not in decisive:
                yield f"{where}.{rule}", condition.test, f"must be one of {decisive}"
                return
            known = list(READINGS[kinds[condition.test]])
            yield from _unknown(f"{where}.{rule}.{condition.test}", condition.reading, known)
    for against in hypothesis.not_met.any:
        # Then no set of readings can satisfy `met` and `not_met` at once.
        if not any(
            required.test == against.test and not set(required.reading) & set(against.reading)
            for required in hypothesis.met.all
        ):
            mend = "must exclude a condition of met: the same test with other readings"
            yield f"{where}.not_met.any", against.test, mend


def _family_faults(plan: Plan) -> Iterable[Fault]:
    hypotheses = [hypothesis.id for hypothesis in plan.hypotheses]
    members = [member for family in plan.families for member in family.members]
    for family in plan.families:
        yield from _unknown(f"families.{family.id}.members", family.members, hypotheses)
    for name in hypotheses:
        if members.count(name) != 1:
            yield "families.members", name, f"is in {members.count(name)} families, must be in exactly one"
