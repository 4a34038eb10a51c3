"""The kinds of tests that a plan may hold. There are no free formulas: every term is a named field."""

from typing import Annotated, Literal

from pydantic import Field

from gradnoise.base.study import Strict
from gradnoise.base.vocabulary import Matching

Name = Annotated[str, Field(pattern=r"^[A-Za-z][A-Za-z0-9_-]*$")]
Text = Annotated[str, Field(min_length=1)]
# Strict: a quoted number is a fault in a plan, not something to convert.
Number = Annotated[float, Field(strict=True)]
Positive = Annotated[float, Field(gt=0, strict=True)]
NotNegative = Annotated[float, Field(ge=0, strict=True)]
Share = Annotated[float, Field(gt=0, lt=1, strict=True)]
Draws = Annotated[int, Field(ge=999, strict=True)]
Cells = Annotated[tuple[str, ...], Field(min_length=1)]
Alternative = Literal["greater", "less", "two-sided"]

# The covariate of an analysis of covariance: the logarithm of the matching variable, centred over the runs.
COVARIATE = "loss_c"

# What a test may be read as. A test that is only reported has no reading, so no rule can rest on it.
_SIGN = ("above zero", "below zero", "undecided")
READINGS: dict[str, tuple[str, ...]] = {
    "slope": _SIGN,
    "mixed": _SIGN,
    "contrast": _SIGN,
    "trend": ("monotone", "ordered", "reversal", "undecided"),
    "tost": ("inside margins", "outside zero", "both", "undecided"),
    "anova": (),
}


class Test(Strict):
    """What every test has: what it looks at, and where."""

    id: Name = Field(description="name of the test")
    hypothesis: Name | None = Field(default=None, description="the hypothesis it is reported under")
    description: Text = Field(description="what it asks, for people")
    outcome: Name = Field(description="an outcome of the matched block")
    matching: Matching = Field(description="where runs are compared")


class SlopeTest(Test):
    """Least-squares slope within each seed, then a one-sample t over seeds."""

    kind: Literal["slope"] = Field(description="which test this is")
    predictor: Name = Field(description="the dose")
    cells: Cells | None = Field(default=None, description="only the runs of these cells; null: all")
    cluster: Literal["seed"] = Field(description="unit that is independent")
    alternative: Alternative = Field(description="side of zero that p is about")


class MixedTest(Test):
    """Linear mixed model with Kenward-Roger degrees of freedom; read by its first fixed term.

    With `loss_c` among the fixed terms it is an analysis of covariance, which is undecided while the loss is
    measured less reliably than the plan asks for.
    """

    kind: Literal["mixed"] = Field(description="which test this is")
    fixed: tuple[Name, ...] = Field(
        min_length=1, description="fixed terms, the deciding one first; an intercept is always there"
    )
    random: dict[Annotated[str, Field(pattern="^seed$")], tuple[str, ...]] = Field(
        min_length=1, description='terms that differ between seeds: "1" and fixed terms'
    )
    cells: Cells | None = Field(default=None, description="only the runs of these cells; null: all")
    estimator: Literal["reml"] = Field(description="restricted maximum likelihood")
    degrees_of_freedom: Literal["kenward-roger"] = Field(description="of every t and F")
    alternative: Alternative = Field(description="side of zero that p is about")


class ContrastTest(Test):
    """Mean of some cells minus mean of others, paired by seed: one-sample t over seeds."""

    kind: Literal["contrast"] = Field(description="which test this is")
    first: Cells = Field(description="cells whose mean counts")
    second: Cells = Field(description="cells whose mean is taken off")
    cluster: Literal["seed"] = Field(description="unit that is independent")
    alternative: Alternative = Field(description="side of zero that p is about")


class TrendTest(Test):
    """Isotonic trend over assigned levels, blocked by seed, with reversals and a margin for each step.

    Read as `reversal` when a step against the direction is found, else `monotone` when the trend is found and
    every step is shown to lose less than the margin, else `ordered` when the trend is found.
    """

    kind: Literal["trend"] = Field(description="which test this is")
    levels: tuple[Cells, ...] = Field(
        min_length=3, description="cells of each level in order; cells of one level are averaged in each seed"
    )
    cluster: Literal["seed"] = Field(description="unit within which levels are permuted")
    alternative: Literal["increasing", "decreasing"] = Field(description="direction of the trend")
    margin: Positive = Field(description="a step against the direction that loses less is tolerated")
    steps: Literal["required", "reported"] = Field(
        description="required: p is the larger of the trend's and the steps', all of which must hold"
    )
    draws: Draws = Field(description="permutations")


class TostTest(Test):
    """Two one-sided tests of the mean difference first arm - second arm, paired by seed."""

    kind: Literal["tost"] = Field(description="which test this is")
    arms: tuple[str, str] = Field(description="the two cells")
    cluster: Literal["seed"] = Field(description="unit that is independent")
    low: Number = Field(description="lower margin of the difference")
    high: Number = Field(description="upper margin of the difference")


class AnovaTest(Test):
    """Factorial analysis of variance, type III with Sum coding, blocked by seed; reported, never decisive."""

    kind: Literal["anova"] = Field(description="which test this is")
    factors: tuple[Literal["batch", "learning_rate"], ...] = Field(
        min_length=1, description="factors with all their interactions"
    )
    cells: Cells | None = Field(default=None, description="only the runs of these cells; null: all")
    block: Literal["seed"] = Field(description="what is taken off first")
    type: Literal["III"] = Field(description="of sums of squares")
    robust: Literal["hc3"] = Field(description="covariance of the F tests that are shown beside")


AnyTest = Annotated[
    SlopeTest | MixedTest | ContrastTest | TrendTest | TostTest | AnovaTest, Field(discriminator="kind")
]


class Correlation(Strict):
    """Spearman's rank correlation of runs within seeds; exploratory."""

    id: Name = Field(description="name of the exploration")
    kind: Literal["correlation"] = Field(description="what is computed")
    description: Text = Field(description="what it asks, for people")
    outcome: Name = Field(description="an outcome of the matched block")
    matching: Matching = Field(description="where runs are compared")
    predictor: Name = Field(description="the dose")


class Mediation(Strict):
    """Predictor to mediator to outcome, with an interval over seeds; exploratory: nothing is randomised."""

    id: Name = Field(description="name of the exploration")
    kind: Literal["mediation"] = Field(description="what is computed")
    description: Text = Field(description="what it asks, for people")
    outcome: Name = Field(description="an outcome of the matched block")
    matching: Matching = Field(description="where runs are compared")
    predictor: Name = Field(description="the dose")
    mediator: Name = Field(description="the outcome in between")
    resamples: Draws = Field(description="of the bootstrap over seeds")


Exploration = Annotated[Correlation | Mediation, Field(discriminator="kind")]
