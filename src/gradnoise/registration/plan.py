"""The plan: the one file that decides what is tested, how, and what the outcome is called.

Registered studies and rehearsals share the format. Code carries out a plan and holds no margin, alpha,
level, number of draws or target of its own.
"""

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, PrivateAttr

from gradnoise.base import strict_yaml
from gradnoise.base.errors import InputError
from gradnoise.base.files import sha256_of
from gradnoise.base.study import Strict, Study, validated
from gradnoise.base.vocabulary import LABELS, VERDICTS, Matching
from gradnoise.registration.faults import faults
from gradnoise.registration.kinds import (
    AnyTest,
    Draws,
    Exploration,
    Name,
    NotNegative,
    Number,
    Positive,
    Share,
    Text,
)
from gradnoise.registration.lockfile import read_beacon

Definition = Literal["pne", "pne2", "ne", "retained"]
# What may be known of a run without seeing any outcome: a rule that looks at anything else does not load.
BlindColumn = Literal["exposure", "exposure_relative_stderr", "events"]
Comparison = Literal["<", "<=", ">", ">="]
Method = Literal["wild_cluster_bootstrap", "sign_flip", "cluster_robust", "studentised_bootstrap"]


class Pilot(Strict):
    """What was seen before the plan was written: a file and its bytes."""

    path: Annotated[str, Field(pattern=r"^preregistration/pilot/[A-Za-z0-9_./-]+$")] = Field(
        description="where it lies"
    )
    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")] = Field(description="SHA-256 of its bytes")


class About(Strict):
    """Which study this is, and what its authors knew when they wrote the plan."""

    id: Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9-]*$")] = Field(description="name of the study")
    title: Text = Field(description="what it is about, for people")
    kind: Literal["rehearsal", "registered"] = Field(description="a rehearsal has no lock and no verdicts")
    config: Annotated[str, Field(pattern=r"^config/[a-z0-9][a-z0-9-]*\.yaml$")] = Field(
        description="settings of the study: its blocks and cells"
    )
    prior_access: Literal["none", "pilot", "outcome_known"] = Field(
        description="what its authors had seen of such runs when they wrote it"
    )
    pilot: tuple[Pilot, ...] = Field(default=(), description="files of the pilot, by their bytes")

    @property
    def label(self) -> str:
        """The word that every number of the study carries."""
        return LABELS[self.kind]

    @property
    def verdicts(self) -> tuple[str, str, str]:
        """Words for a hypothesis whose rule is met, not met, or neither."""
        return VERDICTS[self.kind]


class Seeds(Strict):
    """Seeds follow from the plan's hash; every cell uses the same ones."""

    derive: Literal["hmac-sha256"] = Field(description="seeds are HMAC-SHA256 of the plan's hash")
    crossed: Literal[True] = Field(
        description="every cell of a block uses the same seeds, so comparisons are paired"
    )
    minimum: Annotated[int, Field(ge=5, strict=True, description="seeds of a tested block")]
    fewest_analysed: Annotated[int, Field(ge=3, strict=True, description="a test on fewer has no p")]
    stopping: Literal["fixed"] = Field(
        description="the number of seeds is fixed: no looks, no seeds added or left out"
    )


class Attempts(Strict):
    """How often a training job may be tried; every attempt uses the same seeds and keeps its record."""

    maximum: Annotated[int, Field(ge=1, strict=True)] = Field(
        description="attempts at one training job, the first included"
    )
    retry_after: tuple[Literal["started", "failed"], ...] = Field(
        description="status of an attempt that another may follow; started: it was killed"
    )


class Outcome(Strict):
    """A score that is analysed, in absolute units."""

    id: Name = Field(description="name by which tests call it")
    role: Literal["primary", "secondary", "negative_control", "manipulation_check", "descriptive"] = Field(
        description="what it is for"
    )
    block: Name = Field(description="block of the study whose runs are scored")
    score: Name = Field(description="name of the score")
    unit: Text = Field(description="unit of the score; accuracy is in absolute points")
    direction: Literal["higher", "lower"] = Field(description="which way is better")


class Exposure(Strict):
    """Which integrated exposure is the dose, and on which scale."""

    primary: Definition = Field(description="definition of the dose, as in docs/exposure.md")
    transform: Literal["log10"] = Field(description="scale of doses as predictors, `log10_pne2`")
    secondary: tuple[Definition, ...] = Field(default=(), description="other definitions that tests may name")


class Limits(Strict):
    """How many planned runs may be missing from a test before it is undecided, as shares of its runs."""

    missing: Annotated[float, Field(ge=0, le=1, strict=True)] = Field(
        description="of all the test's planned runs"
    )
    difference: Annotated[float, Field(ge=0, le=1, strict=True)] = Field(
        description="between the cells of the test: more is informative truncation"
    )


class MatchingRule(Strict):
    """Where runs are compared."""

    block: Name = Field(description="block whose runs are compared")
    variable: Name = Field(description="score in which runs are matched")
    target: Positive = Field(description="its value at which they are compared")
    how: Literal["log-linear"] = Field(
        description="linear in the logarithm of `variable`, between the two branches that bracket `target`"
    )
    minimum_reliability: Share = Field(
        description="share of its variance between runs that is no error; below it nothing is adjusted for it"
    )
    also: tuple[Literal["updates", "tokens"], ...] = Field(
        default=(), description="other points at which runs are compared, beside it"
    )
    limits: Limits = Field(description="how many runs may be missing")

    @property
    def names(self) -> tuple[Matching, ...]:
        """Every matching, the deciding one first."""
        return ("loss", *self.also)


class Exclusion(Strict):
    """A run is left out where a blind column of it, over its branches, compares so with a value.

    `exposure` is the least primary exposure over the run's branches, `exposure_relative_stderr` the largest
    standard error of it over its value, `events` the fewest measured updates behind it.
    """

    id: Name = Field(description="name of the rule in the flow of runs")
    column: BlindColumn = Field(description="what is looked at")
    op: Comparison = Field(description="how it compares")
    value: Number = Field(description="with what")
    stage: Literal["before_outcome"] = Field(description="nothing is left out once an outcome was seen")
    reason: Text = Field(description="why, for people")


class Condition(Strict):
    """Holds when the test was read as one of `reading`."""

    test: Name = Field(description="a test of the plan")
    reading: tuple[str, ...] = Field(min_length=1, description="what it may be read as")


class All(Strict):
    """Every condition holds."""

    all: tuple[Condition, ...] = Field(min_length=1, description="conditions that must hold")


class AnyOf(Strict):
    """At least one condition holds."""

    any: tuple[Condition, ...] = Field(min_length=1, description="conditions one of which is enough")


class MaxOf(Strict):
    """The largest p of these tests: all must be small (intersection-union)."""

    max_of: tuple[Name, ...] = Field(
        min_length=1, description="tests whose p are counted, all that `met` needs among them"
    )


class Hypothesis(Strict):
    """A claim and its rule.

    `met` needs every condition and an adjusted p of at most the family's alpha; `not_met` needs any of its
    conditions; otherwise the outcome is undecided. Loading makes sure that both cannot hold. A registered
    study calls the three corroborated, falsified and inconclusive.
    """

    id: Name = Field(description="name of the hypothesis")
    text: Text = Field(description="the claim, for people")
    p: MaxOf = Field(description="its p")
    met: All = Field(description="when it is met (corroborated)")
    not_met: AnyOf = Field(description="when it is not met (falsified)")


class Family(Strict):
    """Hypotheses that share an error rate."""

    id: Name = Field(description="name of the family")
    members: tuple[Name, ...] = Field(min_length=1, description="its hypotheses")
    method: Literal["holm"] = Field(description="how their p are adjusted for one another")
    alpha: Share = Field(description="error rate of the family")
    missing_p: Annotated[float, Field(ge=1, le=1, strict=True)] = Field(
        description="a p that could not be computed counts as 1 and stays in the family"
    )


class Intervals(Strict):
    """Tests are read at alpha = 1 - level: two-sided intervals at `level`, TOST at 1 - 2 alpha."""

    level: Share = Field(description="level of two-sided intervals")


class Sensitivity(Strict):
    """A slope test once more, by other methods and at other places; exploratory, shown beside it."""

    test: Name = Field(description="a slope test")
    methods: tuple[Method, ...] = Field(default=(), description="other ways to the interval and p")
    resamples: Draws = Field(description="of each bootstrap")
    windows: tuple[Positive, ...] = Field(
        default=(), description="the branch nearest to the target, where it is within this of it"
    )
    unmatched: bool = Field(description="also at each run's last branch, without any matching")


class Descriptive(Strict):
    """What is drawn and set side by side without a test."""

    outcome: Name = Field(description="outcome that is drawn")
    predictor: Name = Field(description="dose that it is drawn against")
    rivals: tuple[Name, ...] = Field(description="what else might explain it")
    band_draws: Draws = Field(description="resamples of the seeds behind the bootstrap band of a trend")
    band_trials: Annotated[int, Field(ge=100, strict=True)] = Field(
        description="simulated studies behind that band's coverage"
    )


class Assumptions(Strict):
    """Spreads (standard deviations) behind simulated runs, in the units of the outcomes."""

    base: Number = Field(description="mean outcome")
    seed_sd: NotNegative = Field(description="between seeds, common to all cells")
    slope_sd: NotNegative = Field(description="of the seeds' slopes, per unit of the predictor")
    run_sd: Positive = Field(description="between runs of one cell and seed's expectation")
    loss_sd: NotNegative = Field(description="of the logarithm of the matching variable")
    exposure_sd: NotNegative = Field(description="of the primary exposure, on its transformed scale")


class Wrong(Strict):
    """Hypotheses of which a verdict would be an error, were this the truth."""

    met: tuple[Name, ...] = Field(default=(), description="errors if met")
    not_met: tuple[Name, ...] = Field(default=(), description="errors if not met")


class Truth(Strict):
    """A state of the world from which runs are simulated.

    An outcome of a run is base + seed + slope x (dose - mean dose) + shift of its cell + residual.
    """

    id: Name = Field(description="name of the truth")
    description: Text = Field(description="what holds in it, for people")
    slopes: dict[Name, Number] = Field(default={}, description="per outcome, per unit of the predictor")
    shifts: dict[Name, dict[str, Number]] = Field(default={}, description="per outcome and cell")
    wrong: Wrong = Field(default=Wrong(), description="verdicts that would be errors")


class Power(Strict):
    """What the dry run simulates before the plan is locked."""

    simulations: Annotated[int, Field(ge=1, strict=True)] = Field(
        description="simulated studies of each truth"
    )
    assumptions: Assumptions = Field(description="spreads behind them")
    truths: tuple[Truth, ...] = Field(min_length=1, description="what is simulated")


class Plan(Strict):
    """A whole plan; `sha256` names its content whatever its comments, spacing and order of keys."""

    study: About = Field(description="which study this is")
    seeds: Seeds = Field(description="where seeds come from, and how many")
    attempts: Attempts = Field(description="how often a job may be tried")
    outcomes: tuple[Outcome, ...] = Field(min_length=1, description="what is measured")
    exposure: Exposure = Field(description="the dose")
    matching: MatchingRule = Field(description="where runs are compared")
    exclusions: tuple[Exclusion, ...] = Field(default=(), description="runs that are left out")
    tests: tuple[AnyTest, ...] = Field(min_length=1, description="what is computed")
    hypotheses: tuple[Hypothesis, ...] = Field(
        min_length=1, description="what is claimed, and what tests must say"
    )
    families: tuple[Family, ...] = Field(min_length=1, description="which claims share an error rate")
    intervals: Intervals = Field(description="how tests are read")
    sensitivity: tuple[Sensitivity, ...] = Field(default=(), description="slope tests by other means")
    exploratory: tuple[Exploration, ...] = Field(default=(), description="what is computed besides")
    descriptive: Descriptive = Field(description="what is drawn without a test")
    power: Power = Field(description="what the dry run simulates")
    _sha256: str = PrivateAttr(default="")
    _beacon: str = PrivateAttr(default="")

    @property
    def sha256(self) -> str:
        """SHA-256 (hex) of the canonical JSON of the parsed document."""
        return self._sha256

    @property
    def key(self) -> str:
        """What seeds and run names follow from: the canonical hash, then the public value of the lock."""
        return self._sha256 + self._beacon

    @property
    def reading_alpha(self) -> float:
        """Alpha at which a test is read: 1 - level, free of the rounding of that difference."""
        return round(1 - self.intervals.level, 12)

    def outcome(self, name: str) -> Outcome:
        """The outcome of that id."""
        return next(outcome for outcome in self.outcomes if outcome.id == name)

    def test(self, name: str) -> AnyTest:
        """The test of that id."""
        return next(test for test in self.tests if test.id == name)


def load_plan(path: Path | str) -> Plan:
    """Read a plan and check it whole, against itself and against the study's settings it names.

    `study.config` is found from the working folder. Every fault is one `InputError` line naming the field. A
    registered plan takes the public value, from which with its hash the seeds follow, from its lock; without
    a lock it loads, but nothing trains under it.
    """
    document = strict_yaml.load(path)
    plan = checked(document, str(path))
    plan._sha256 = sha256_of(document)
    if plan.study.kind == "registered":
        plan._beacon = read_beacon(path)
    return plan


def checked(document: dict[str, object], where: str) -> Plan:
    """The plan that a parsed document holds, without the hash that belongs to a file."""
    plan = validated(Plan, document, where)
    study = validated(Study, strict_yaml.load(plan.study.config), plan.study.config)
    for field, value, mend in faults(plan, study):
        raise InputError(f"{where}: {field}", value, mend)
    return plan
