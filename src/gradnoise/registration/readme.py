"""The plans for people: preregistration/README.md, rendered from the plans, their locks and deviations."""

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from textwrap import fill

from gradnoise.base.files import canonical_json, write_bytes
from gradnoise.base.study import Block, load_study
from gradnoise.base.wording import counted, threshold
from gradnoise.registration.deviations import read_deviations
from gradnoise.registration.kinds import (
    AnovaTest,
    AnyTest,
    ContrastTest,
    MixedTest,
    SlopeTest,
    TostTest,
    TrendTest,
)
from gradnoise.registration.lockfile import DryRun, lock_path, read_lock
from gradnoise.registration.plan import Condition, Hypothesis, Plan, load_plan

FOLDER = Path("preregistration")

_HEAD = """\
A plan is one YAML file that fixes, before the runs, what is tested, how, and what each outcome is called.
The code holds no margin, alpha, level, number of draws or target of its own; it carries out the plan. Every
field is explained in [docs/plan-reference.md](../docs/plan-reference.md). This page is rendered from the
plans by `gradnoise plan render`."""
_KINDS = {
    "rehearsal": """\
It exists to run every step, from data to report. It is not evidence for or against anything. It has no lock,
so nothing but honesty keeps it from being changed after a look. Therefore its outcomes are only called
{words}, and everything built from it carries the label REHEARSAL.""",
    "registered": """\
It is written and locked before any of its runs; its outcomes are called {words}. The lock holds hashes of the
plan, of the code that carries it out, of the data and of the list of runs. Whatever is done otherwise is
logged in `deviations.jsonl`, and its results stand beside the registered ones.""",
}
_ACCESS = {
    "none": "Its authors had seen no outcome of such runs when they wrote it.",
    "pilot": "Its authors had seen a pilot when they wrote it.",
    "outcome_known": "Its authors knew outcomes when they wrote it.",
}
_SEEDS = """\
The seeds follow from the hash of the plan's content (HMAC-SHA256), so they cannot be picked; changing any
value in the file changes them all. All cells of a block share them, so every comparison is paired. Their
number is fixed: there are no looks, and no seed is added or left out afterwards."""
_LOSS = """\
The loss is itself an effect of the noise, so the same contrasts are also shown at equal {also}. A run that
never reaches the point is not in the comparison and is counted in the flow of runs."""
_RULES = """\
The p of a hypothesis is the largest of its tests' p; it is {met} only when that is at most alpha after Holm's
adjustment within the family. Tests are read at {level} intervals. A test that cannot be carried out (fewer
than {fewest} seeds at the point, too many runs missing, a fit that breaks down) counts as p = 1 in the
family. Families: {families}."""
_LEFT_OUT = """\
**Runs left out.** Before any outcome is seen: {rules}. A test is undecided when more than {missing} of its
planned runs are missing, or when the shares that are missing differ between its cells by more than
{difference}: which runs reach the point is itself an outcome. A training job may be tried {maximum}{retry},
always with the same seeds; every attempt stays on record."""
_COMPARED = """\
**What is compared.** Runs of block `{block}` where their {variable} is {target}: interpolated, linearly in
its logarithm, between the two annealed branches that bracket it. {also} The reliability of the {variable}
should be at least {reliability}; below it nothing is adjusted for it."""
_POWER = """\
**Tried out on made-up runs.** {simulations} studies of each truth go through the real analysis
(`gradnoise plan rehearse`), with {spreads} (all but the base are standard deviations)."""
_RIVALS = """\
**What cannot be answered here.** Levels of noise differ in batch size and learning rate, and so also in the
number of updates and the sum of learning rates. How much each of {rivals} explains is shown side by side,
without a test."""
_SIDES = {"greater": "above zero", "less": "below zero", "two-sided": "two-sided"}
_BLIND = {
    "exposure": "the least exposure of its branches",
    "exposure_relative_stderr": "the largest relative standard error of its exposure",
    "events": "the fewest measured updates behind its exposure",
}


def readme() -> str:
    """The page for every plan of the folder, registered ones first."""
    loaded = [(path, load_plan(path)) for path in sorted(FOLDER.glob("*.yaml"))]
    plans = sorted(loaded, key=lambda item: item[1].study.kind == "rehearsal")
    files = [
        (f"`{path.name}`", f"the plan of the study `{plan.study.id}`, **{plan.study.kind}**")
        for path, plan in plans
    ]
    parts = ["# Plans", _say(_HEAD), _table(("file", "what it is"), files)]
    if all(plan.study.kind == "rehearsal" for _, plan in plans):
        parts.append("There is no registered plan yet.")
    return "\n\n".join([*parts, *(part for path, plan in plans for part in _of_plan(path, plan))]) + "\n"


def write_readme() -> Path:
    """Write the page, from the repository root; gives its path."""
    path = FOLDER / "README.md"
    write_bytes(path, readme().encode())
    return path


def _of_plan(path: Path, plan: Plan) -> Iterator[str]:
    """The parts of one plan's section."""
    words = ", ".join(f"`{word}`" for word in plan.study.verdicts)
    yield f"## `{path.name}`: {plan.study.title}"
    yield _say(f"{_KINDS[plan.study.kind].format(words=words)} {_ACCESS[plan.study.prior_access]}")
    if lock_path(path).is_file():
        yield from _lock(path)
    yield from _runs(plan)
    yield from _compared(plan)
    yield "**Tests.**"
    yield _table(("test", "what it asks", "how", "decides"), [_test(plan, test) for test in plan.tests])
    yield from _rules(plan)
    yield from _left_out(plan)
    yield from _beside(plan)
    yield from _power(path, plan)


def _runs(plan: Plan) -> Iterator[str]:
    study = load_study(Path(plan.study.config).stem)
    rows = []
    for name, block in study.blocks.items():
        use = "compared" if name == plan.matching.block else "shown, never tested"
        rows.append(
            (f"`{name}`", _cells(block), f"{block.seeds}", f"{block.seeds * len(block.cells())}", use)
        )
    yield "**Runs.** " + _say(_SEEDS, len("**Runs.** "))
    yield _table(("block", "cells", "seeds", "runs", "use"), rows)


def _cells(block: Block) -> str:
    found = []
    if block.grid is not None:
        batches = ", ".join(map(threshold, block.grid.batch))
        found.append(f"batch {batches} × learning rate {', '.join(map(threshold, block.grid.learning_rate))}")
    return "; ".join(found + [f"`{name}`" for name in block.arms])


def _compared(plan: Plan) -> Iterator[str]:
    rule, dose = plan.matching, plan.exposure
    compared = _COMPARED.format(
        block=rule.block,
        variable=_words(rule.variable),
        target=threshold(rule.target),
        also=_LOSS.format(also=" and at equal ".join(rule.also)) if rule.also else "",
        reliability=threshold(rule.minimum_reliability),
    )
    yield _say(compared)
    rows = [
        (f"`{o.id}`", _words(o.role), f"`{o.block}`", _words(o.score), f"{o.unit}, {o.direction} is better")
        for o in plan.outcomes
    ]
    yield _table(("outcome", "role", "block", "score", "unit"), rows)
    secondary = f" Beside it: {_listed(dose.secondary)}." if dose.secondary else ""
    yield _say(f"**Dose.** {dose.transform} of the integrated noise exposure `{dose.primary}`.{secondary}")


def _test(plan: Plan, test: AnyTest) -> tuple[str, str, str, str]:
    deciding = [hypothesis.id for hypothesis in plan.hypotheses if test.id in hypothesis.p.max_of]
    return f"`{test.id}`", test.description, _how(test), ", ".join(deciding) or "reported only"


def _how(test: AnyTest) -> str:
    match test:
        case SlopeTest():
            return f"line in each seed, t over seeds; {_SIDES[test.alternative]}{_only(test.cells)}"
        case MixedTest():
            random = " + ".join(term for terms in test.random.values() for term in terms)
            model = f"{' + '.join(test.fixed)} + ({random} per seed)"
            side = _SIDES[test.alternative]
            return f"mixed model `{model}`, REML, Kenward-Roger; {side}{_only(test.cells)}"
        case ContrastTest():
            groups = f"mean of {_listed(test.first)} minus mean of {_listed(test.second)}"
            return f"{groups}, paired by seed, t over seeds; {_SIDES[test.alternative]}"
        case TrendTest():
            levels = " → ".join(" = ".join(f"`{cell}`" for cell in level) for level in test.levels)
            steps = (
                "every step must be shown to" if test.steps == "required" else "reported whether every step"
            )
            lose = "lose less than" if test.steps == "required" else "loses less than"
            return (
                f"isotonic trend over {levels}, {test.alternative}, {threshold(test.draws)} permutations "
                f"within seeds; each step tested for a reversal; {steps} {lose} {threshold(test.margin)}"
            )
        case TostTest():
            arms = f"`{test.arms[0]}` minus `{test.arms[1]}`"
            margins = f"{threshold(test.low)} and {threshold(test.high)}"
            return f"two one-sided tests of {arms}, paired by seed, margins {margins}"
        case AnovaTest():
            factors = " × ".join(_words(factor) for factor in test.factors)
            return f"analysis of variance {factors}, type III, blocked by seed, HC3 beside{_only(test.cells)}"


def _rules(plan: Plan) -> Iterator[str]:
    met, not_met, neither = plan.study.verdicts
    rows = [
        (
            hypothesis.id,
            hypothesis.text,
            _met(plan, hypothesis),
            _say_conditions(hypothesis.not_met.any, "or"),
        )
        for hypothesis in plan.hypotheses
    ]
    yield "**Hypotheses.**"
    yield _table(("id", "claim", met, not_met), rows)
    told = _RULES.format(
        met=met,
        level=f"{100 * plan.intervals.level:.15g}%",
        fewest=plan.seeds.fewest_analysed,
        families="; ".join(f"{_listed(f.members)} at alpha {threshold(f.alpha)}" for f in plan.families),
    )
    yield _say(f"Anything else is {neither}. {told}")


def _met(plan: Plan, hypothesis: Hypothesis) -> str:
    alpha = next(family.alpha for family in plan.families if hypothesis.id in family.members)
    return f"{_say_conditions(hypothesis.met.all, 'and')}, and adjusted p ≤ {threshold(alpha)}"


def _say_conditions(conditions: Iterable[Condition], link: str) -> str:
    return f" {link} ".join(f"`{c.test}` {' or '.join(c.reading)}" for c in conditions)


def _left_out(plan: Plan) -> Iterator[str]:
    limits, attempts = plan.matching.limits, plan.attempts
    rules = [
        f"{rule.id}: {_BLIND[rule.column]} {rule.op} {threshold(rule.value)} ({rule.reason})"
        for rule in plan.exclusions
    ]
    retries = [{"started": "was killed", "failed": "failed"}[status] for status in attempts.retry_after]
    told = _LEFT_OUT.format(
        rules="; ".join(rules) or "none",
        missing=threshold(limits.missing),
        difference=threshold(limits.difference),
        maximum=counted(attempts.maximum, "time"),
        retry=f", again only after one that {' or '.join(retries)}" if retries else "",
    )
    yield _say(told)


def _beside(plan: Plan) -> Iterator[str]:
    """Sensitivities, explorations and what is only drawn."""
    places = [
        f"`{item.test}` by {_listed(map(_words, item.methods), code=False) or 'no other method'}"
        + (
            f", at branches within {_listed(map(threshold, item.windows), code=False)}"
            if item.windows
            else ""
        )
        + (", and without any matching" if item.unmatched else "")
        for item in plan.sensitivity
    ]
    others = [f"{item.description} ({item.kind})" for item in plan.exploratory]
    if places or others:
        yield _say(
            f"**Exploratory, shown beside the tests.** {'; '.join([*places, *others])}. None of it decides."
        )
    yield _say(_RIVALS.format(rivals=_listed((plan.descriptive.predictor, *plan.descriptive.rivals))))


def _power(path: Path, plan: Plan) -> Iterator[str]:
    spreads = ", ".join(f"{_words(n)} {threshold(v)}" for n, v in plan.power.assumptions.model_dump().items())
    yield _say(_POWER.format(simulations=threshold(plan.power.simulations), spreads=spreads))
    rows = []
    for truth in plan.power.truths:
        effects = [f"slope of {name} {threshold(slope)}" for name, slope in truth.slopes.items()]
        effects += [
            f"{name} of `{cell}` shifted by {threshold(shift)}"
            for name, shifts in truth.shifts.items()
            for cell, shift in shifts.items()
        ]
        met, not_met, _ = plan.study.verdicts
        errors = [f"{name} {met}" for name in truth.wrong.met] + [
            f"{name} {not_met}" for name in truth.wrong.not_met
        ]
        rows.append(
            (f"`{truth.id}`", truth.description, "; ".join(effects) or "none", ", ".join(errors) or "none")
        )
    yield _table(("truth", "what holds", "effects", "would be an error"), rows)
    if lock_path(path).is_file():
        yield _rates(plan, read_lock(path).dry_run)


def _rates(plan: Plan, dry_run: DryRun) -> str:
    words = dict(zip(("met", "not_met"), plan.study.verdicts, strict=False))
    rows = [
        (
            f"`{rate.truth}`",
            rate.hypothesis,
            words[rate.verdict],
            f"{rate.rate:.3f} ± {rate.stderr:.3f}",
            "error" if rate.wrong else "",
        )
        for rate in dry_run.rates
    ]
    return _table(("truth", "hypothesis", "verdict", "rate ± standard error", ""), rows)


def _lock(path: Path) -> Iterator[str]:
    lock = read_lock(path)
    facts = (
        ("locked", f"{lock.utc}, at commit `{lock.commit.sha}`"),
        ("plan", f"`{lock.plan.canonical_sha256}`"),
        ("public value", f"`{lock.beacon}`" if lock.beacon else "none"),
        ("runs", f"{len(lock.runs)}, list `{lock.runs_sha256}`"),
    )
    yield _table(("lock", ""), facts)
    entries = [
        (
            entry.id,
            f"`{entry.pointer}`" + (" of the lock" if entry.document == "lock" else ""),
            f"`{_short(entry.registered)}`",
            f"`{_short(entry.actual)}`",
            _words(entry.reason),
            f"{entry.discovered} an outcome could be seen",
        )
        for entry in read_deviations(path)
    ]
    yield "**Deviations.**" + ("" if entries else " None.")
    if entries:
        yield _table(("id", "where", "registered", "actual", "reason", "discovered"), entries)


def _short(value: object) -> str:
    text = canonical_json(value).decode()
    return text if len(text) <= 60 else text[:57] + "..."


def _only(cells: Sequence[str] | None) -> str:
    return f"; only {_listed(cells)}" if cells else ""


def _listed(names: Iterable[str], code: bool = True) -> str:
    return ", ".join(f"`{name}`" if code else name for name in names)


def _words(name: str) -> str:
    return name.replace("_", " ").replace("-", " ")


def _say(text: str, indent: int = 0) -> str:
    """A paragraph in lines of one width."""
    return fill(
        " " * indent + " ".join(text.split()), 110, break_long_words=False, break_on_hyphens=False
    ).lstrip()


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    def line(cells: Sequence[str]) -> str:
        return "| " + " | ".join(" ".join(cell.split()).replace("|", "\\|") for cell in cells) + " |"

    return "\n".join([line(head), "|" + "---|" * len(head), *map(line, rows)])
