"""Every fault of a plan that one field alone cannot show: against itself, and against its study."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from gradnoise.evaluation.names import NAMES
from gradnoise.registration.kinds import (
    COVARIATE,
    READINGS,
    AnovaTest,
    AnyTest,
    ContrastTest,
    Mediation,
    MixedTest,
    SlopeTest,
    TostTest,
    TrendTest,
)

if TYPE_CHECKING:
    from gradnoise.base.study import Block, Study
    from gradnoise.registration.plan import Hypothesis, Outcome, Plan, Truth

Fault = tuple[str, object, str]
_COUNTED = ["log10_updates", "log10_sequences", "log10_sum_lr"]


def faults(plan: Plan, study: Study) -> Iterable[Fault]:
    """(field, value, mend) of every fault, the simplest first."""
    for field in ("outcomes", "exclusions", "tests", "exploratory", "hypotheses", "families"):
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
    yield from _beside_faults(plan)
    for hypothesis in plan.hypotheses:
        yield from _hypothesis_faults(plan, hypothesis)
    yield from _family_faults(plan)
    for truth in plan.power.truths:
        yield from _truth_faults(plan, block, truth)


def predictors(plan: Plan) -> list[str]:
    """Names of the doses that the plan measures."""
    definitions = (plan.exposure.primary, *plan.exposure.secondary)
    return [f"{plan.exposure.transform}_{definition}" for definition in definitions]


def _repeated(field: str, names: Iterable[str]) -> Iterable[Fault]:
    names = list(names)
    for name in sorted({name for name in names if names.count(name) > 1}):
        yield field, name, "must appear once"


def _unknown(field: str, names: Iterable[str], known: list[str]) -> Iterable[Fault]:
    for name in names:
        if name not in known:
            yield field, name, f"must be one of {known}"


def _score_faults(study: Study, outcome: Outcome) -> Iterable[Fault]:
    where = f"outcomes.{outcome.id}"
    yield from _unknown(f"{where}.block", [outcome.block], sorted(study.blocks))
    if outcome.block in study.blocks:
        units = NAMES[study.blocks[outcome.block].task.kind]
        yield from _unknown(f"{where}.score", [outcome.score], list(units))
        if outcome.unit != units.get(outcome.score, outcome.unit):
            yield f"{where}.unit", outcome.unit, f"must be {units[outcome.score]}"


def _matched_outcomes(plan: Plan) -> list[str]:
    return [outcome.id for outcome in plan.outcomes if outcome.block == plan.matching.block]


def _place_faults(plan: Plan, where: str, outcome: str, matching: str) -> Iterable[Fault]:
    """An outcome that is not compared in the matched block, or a matching that is not made."""
    if outcome not in _matched_outcomes(plan):
        mend = f"must be an outcome of block {plan.matching.block}: {_matched_outcomes(plan)}"
        yield f"{where}.outcome", outcome, mend
    if matching not in plan.matching.names:
        yield f"{where}.matching", matching, f"must be one of {list(plan.matching.names)}"


def _test_faults(plan: Plan, block: Block, test: AnyTest) -> Iterable[Fault]:
    where = f"tests.{test.id}"
    yield from _place_faults(plan, where, test.outcome, test.matching)
    hypotheses = [hypothesis.id for hypothesis in plan.hypotheses]
    if test.hypothesis is not None:
        yield from _unknown(f"{where}.hypothesis", [test.hypothesis], hypotheses)
    known = [cell.name for cell in block.cells()]
    if isinstance(test, SlopeTest | MixedTest | AnovaTest) and test.cells is not None:
        yield from _cell_faults(f"{where}.cells", test.cells, known)
    match test:
        case SlopeTest():
            yield from _unknown(f"{where}.predictor", [test.predictor], predictors(plan))
        case MixedTest():
            # The deciding term first: a covariate is not what the test is about.
            yield from _unknown(f"{where}.fixed", test.fixed[:1], predictors(plan))
            yield from _unknown(f"{where}.fixed", test.fixed[1:], [*predictors(plan), COVARIATE])
            yield from _repeated(f"{where}.fixed", test.fixed)
            if COVARIATE in test.fixed and test.matching == "loss":
                yield f"{where}.matching", "loss", f"{COVARIATE} is the same for all runs there"
            for cluster, terms in test.random.items():
                yield from _unknown(f"{where}.random.{cluster}", terms, ["1", *test.fixed])
        case ContrastTest():
            yield from _cell_faults(f"{where}.first", [*test.first, *test.second], known)
        case TrendTest():
            yield from _cell_faults(f"{where}.levels", [c for level in test.levels for c in level], known)
        case TostTest():
            yield from _cell_faults(f"{where}.arms", test.arms, known)
            if test.low >= test.high:
                yield f"{where}.low", test.low, f"must be below high ({test.high})"
        case AnovaTest():
            yield from _repeated(f"{where}.factors", test.factors)


def _cell_faults(field: str, named: Iterable[str], known: list[str]) -> Iterable[Fault]:
    named = list(named)
    yield from _unknown(field, named, known)
    yield from _repeated(field, named)


def _beside_faults(plan: Plan) -> Iterable[Fault]:
    """Faults of what stands beside the tests: sensitivities, explorations, descriptions."""
    slopes = [test.id for test in plan.tests if isinstance(test, SlopeTest)]
    for item in plan.sensitivity:
        yield from _unknown("sensitivity.test", [item.test], slopes)
        yield from _repeated(f"sensitivity.{item.test}.methods", item.methods)
    yield from _repeated("sensitivity.test", [item.test for item in plan.sensitivity])
    for exploration in plan.exploratory:
        where = f"exploratory.{exploration.id}"
        yield from _place_faults(plan, where, exploration.outcome, exploration.matching)
        yield from _unknown(f"{where}.predictor", [exploration.predictor], predictors(plan))
        if isinstance(exploration, Mediation):
            mediators = [name for name in _matched_outcomes(plan) if name != exploration.outcome]
            yield from _unknown(f"{where}.mediator", [exploration.mediator], mediators)
    described = plan.descriptive
    yield from _place_faults(plan, "descriptive", described.outcome, "loss")
    yield from _unknown("descriptive.predictor", [described.predictor], predictors(plan))
    yield from _unknown("descriptive.rivals", described.rivals, predictors(plan) + _COUNTED)


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
    for required in hypothesis.met.all:
        # Otherwise a claim could be met by a test whose p is not adjusted with the family's.
        if required.test not in hypothesis.p.max_of:
            mend = f"must hold {required.test}, which met needs"
            yield f"{where}.p.max_of", list(hypothesis.p.max_of), mend
    for test in plan.tests:
        rests = any(c.test == test.id and "monotone" in c.reading for c in hypothesis.met.all)
        if rests and isinstance(test, TrendTest) and test.steps == "reported":
            yield f"tests.{test.id}.steps", test.steps, f"must be required: {hypothesis.id} rests on them"
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


def _truth_faults(plan: Plan, block: Block, truth: Truth) -> Iterable[Fault]:
    where = f"power.truths.{truth.id}"
    outcomes = _matched_outcomes(plan)
    hypotheses = [hypothesis.id for hypothesis in plan.hypotheses]
    yield from _unknown(f"{where}.slopes", truth.slopes, outcomes)
    yield from _unknown(f"{where}.shifts", truth.shifts, outcomes)
    for outcome, shifts in truth.shifts.items():
        yield from _unknown(f"{where}.shifts.{outcome}", shifts, [cell.name for cell in block.cells()])
    yield from _unknown(f"{where}.wrong.met", truth.wrong.met, hypotheses)
    yield from _unknown(f"{where}.wrong.not_met", truth.wrong.not_met, hypotheses)
