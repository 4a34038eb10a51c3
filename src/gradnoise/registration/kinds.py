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

    id: Name
    hypothesis: Name | None = Field(default=None, description="the hypothesis it is reported under")
    description: Text
    outcome: Name
    matching: Matching


class SlopeTest(Test):
    """Least-squares slope within each seed, then a one-sample t over seeds."""

    kind: Literal["slope"]
    predictor: Name
    cells: Cells | None = Field(default=None, description="only the runs of these cells; null: all")
    cluster: Literal["seed"]
    alternative: Alternative


class MixedTest(Test):
    """Linear mixed model with Kenward-Roger degrees of freedom; read by its first fixed term.

    With `loss_c` among the fixed terms it is an analysis of covariance, which is undecided while the loss is
    measured less reliably than the plan asks for.
    """

    kind: Literal["mixed"]
    fixed: tuple[Name, ...] = Field(min_length=1)
    random: dict[Annotated[str, Field(pattern="^seed$")], tuple[str, ...]] = Field(min_length=1)
    cells: Cells | None = Field(default=None, description="only the runs of these cells; null: all")
    estimator: Literal["reml"]
    degrees_of_freedom: Literal["kenward-roger"]
    alternative: Alternative


class ContrastTest(Test):
    """Mean of some cells minus mean of others, paired by seed: one-sample t over seeds."""

    kind: Literal["contrast"]
    first: Cells
    second: Cells
    cluster: Literal["seed"]
    alternative: Alternative


class TrendTest(Test):
    """Isotonic trend over assigned levels, blocked by seed, with reversals and a margin for each step.

    Read as `reversal` when a step against the direction is found, else `monotone` when the trend is found and
    every step is shown to lose less than the margin, else `ordered` when the trend is found.
    """

    kind: Literal["trend"]
    levels: tuple[Cells, ...] = Field(min_length=3)
    cluster: Literal["seed"]
    alternative: Literal["increasing", "decreasing"]
    margin: Positive
    steps: Literal["required", "reported"] = Field(
        description="required: p is the larger of the trend's and the steps', all of which must hold"
    )
    draws: Draws


class TostTest(Test):
    """Two one-sided tests of the mean difference first arm - second arm, paired by seed."""

    kind: Literal["tost"]
    arms: tuple[str, str]
    cluster: Literal["seed"]
    low: Number
    high: Number


class AnovaTest(Test):
    """Factorial analysis of variance, type III with Sum coding, blocked by seed; reported, never decisive."""

    kind: Literal["anova"]
    factors: tuple[Literal["batch", "learning_rate"], ...] = Field(min_length=1)
    cells: Cells | None = Field(default=None, description="only the runs of these cells; null: all")
    block: Literal["seed"]
    type: Literal["III"]
    robust: Literal["hc3"] = Field(description="covariance of the F tests that are shown beside")


AnyTest = Annotated[
    SlopeTest | MixedTest | ContrastTest | TrendTest | TostTest | AnovaTest, Field(discriminator="kind")
]


class Correlation(Strict):
    """Spearman's rank correlation of runs within seeds; exploratory."""

    id: Name
    kind: Literal["correlation"]
    description: Text
    outcome: Name
    matching: Matching
    predictor: Name


class Mediation(Strict):
    """Predictor to mediator to outcome, with an interval over seeds; exploratory: nothing is randomised."""

    id: Name
    kind: Literal["mediation"]
    description: Text
    outcome: Name
    matching: Matching
    predictor: Name
    mediator: Name
    resamples: Draws


Exploration = Annotated[Correlation | Mediation, Field(discriminator="kind")]
