"""A plan tried out on made-up runs, by the code that will carry it out: how often it errs, what it finds."""

from __future__ import annotations

import math
import shutil
import tempfile
from collections.abc import Callable
from contextlib import chdir
from itertools import product
from pathlib import Path
from typing import Any, Literal

from gradnoise.analysis.analyse import analyse
from gradnoise.analysis.decisions import run_test
from gradnoise.analysis.gather import gather
from gradnoise.analysis.simulate import simulate, simulation_seed
from gradnoise.analysis.verdicts import read_hypotheses
from gradnoise.base import layout, strict_yaml, tables
from gradnoise.base.errors import InputError
from gradnoise.base.files import read_json, write_json
from gradnoise.base.study import Study, load_study, study_path
from gradnoise.base.wording import BANNED_IN_REHEARSAL
from gradnoise.registration import Plan, load_plan
from gradnoise.registration.kinds import READINGS
from gradnoise.registration.lockfile import DryRun, Rate, Reached
from gradnoise.registration.plan import Hypothesis, Truth

# The label of everything that comes from made-up runs.
SIMULATED = "SIMULATED"
# One letter a verdict, in the order of a study's words for them.
LETTERS = {"met": "m", "not_met": "n", "undecided": "u"}

# Tables of a rehearsal: those made up, then the analysis' in the order of `layout.ANALYSIS_TABLES`.
_MADE = (tables.SCORES, tables.EXPOSURE)
_TABLES = (*_MADE, tables.MATCHED, tables.FATES, tables.FLOW, tables.CURVES, tables.EXPLAINED)
# Fields of a plan that are for people.
_TEXTS = ("title", "text", "description", "reason")


def dry_run(plan: Plan, study: Study, told: Callable[[], None] = lambda: None) -> DryRun:
    """Rates of every verdict under every truth of the plan, over `plan.power.simulations` studies each.

    Every simulated study goes through the same code as the real one, from tables of scores and exposure to
    verdicts; only the cross-check of mixed models is left out. `told` is called after each.
    """
    verdicts: dict[str, dict[str, str]] = {}
    for truth in plan.power.truths:
        letters = {hypothesis.id: "" for hypothesis in plan.hypotheses}
        for number in range(plan.power.simulations):
            for name, letter in replay(plan, study, truth, number).items():
                letters[name] += letter
            told()
        verdicts[truth.id] = letters
    rates = tuple(
        _rate(truth, hypothesis.id, verdict, verdicts[truth.id][hypothesis.id])
        for truth in plan.power.truths
        for hypothesis in plan.hypotheses
        for verdict in ("met", "not_met")
    )
    return DryRun(simulations=plan.power.simulations, rates=rates, verdicts=verdicts)


def replay(plan: Plan, study: Study, truth: Truth, number: int) -> dict[str, str]:
    """Verdicts of one simulated study: hypothesis to `m` (met), `n` (not met) or `u` (undecided).

    They follow from the plan's hash, the truth and the number alone, before the lock as after it.
    """
    plan = _decisive(plan)
    seed = simulation_seed(plan, truth, number)
    gathered = gather(plan, study, *simulate(plan, study, truth, seed, [plan.matching.block]))
    tests = [run_test(plan, test, gathered, cross_check=False) for test in plan.tests]
    letters = dict(zip(plan.study.verdicts, LETTERS.values(), strict=True))
    return {entry["id"]: letters[entry["outcome"]] for entry in read_hypotheses(plan, tests)[1]}


def reachability(plan: Plan) -> tuple[Reached, ...]:
    """What each hypothesis can come to, over all readings of its tests with small and with large p.

    The other tests have small p, so that nothing but the hypothesis' own rule stands in its way.
    """
    return tuple(_reached(plan, hypothesis) for hypothesis in plan.hypotheses)


def rehearse(study: str, truth: str, folder: Path | str, number: int = 0) -> Path:
    """Carry out the whole phase `analyse` on one simulated study, and write its files into `folder`.

    They are the two tables of made-up runs, the analysis' tables and `results.json`, all labelled SIMULATED.
    A registered plan is carried out as a rehearsal, whose words decide nothing. `number`: which of the
    truth's simulations. Gives the path of `results.json`. Raises `InputError` for an unknown truth and for a
    folder inside `results/`.
    """
    settings = load_study(study)
    plan = load_plan(settings.plan)
    known = {item.id: item for item in plan.power.truths}
    if truth not in known:
        raise InputError("truth", truth, f"must be one of {list(known)}")
    folder = Path(folder).resolve()
    if folder.is_relative_to(Path("results").resolve()):
        raise InputError("folder", folder, "must lie outside results/, which holds what was found")
    with tempfile.TemporaryDirectory() as scratch:
        for path in (study_path(study), Path(settings.plan)):
            Path(scratch, path).parent.mkdir()
            shutil.copy(path, Path(scratch, path))
        with chdir(scratch):
            if plan.study.kind == "registered":
                write_json(settings.plan, _as_rehearsal(strict_yaml.load(settings.plan)))
            carried_out = load_plan(settings.plan)
            made = simulate(carried_out, settings, known[truth], simulation_seed(plan, known[truth], number))
            for file, table, rows in zip(_inputs(study), _MADE, made, strict=True):
                columns = rows[table.schema().names].to_dict("list")
                tables.write_table(file, table, columns, SIMULATED)
            analyse(study)
            _collect(study, folder, {"truth": known[truth].model_dump(mode="json"), "number": number})
    return folder / "results.json"


def _inputs(study: str) -> tuple[str, str]:
    return layout.scores(study), layout.exposure(study)


def _decisive(plan: Plan) -> Plan:
    """The plan as it is before its lock, with only those tests and matchings that verdicts rest on."""
    used = {name for hypothesis in plan.hypotheses for name in hypothesis.p.max_of}
    tests = tuple(test for test in plan.tests if test.id in used)
    also = tuple(name for name in plan.matching.also if any(test.matching == name for test in tests))
    matching = plan.matching.model_copy(update={"also": also})
    found = plan.model_copy(update={"tests": tests, "matching": matching})
    found._beacon = ""
    return found


def _rate(truth: Truth, hypothesis: str, verdict: Literal["met", "not_met"], letters: str) -> Rate:
    rate = letters.count(LETTERS[verdict]) / len(letters)
    return Rate(
        truth=truth.id,
        hypothesis=hypothesis,
        verdict=verdict,
        rate=rate,
        stderr=math.sqrt(rate * (1 - rate) / len(letters)),
        wrong=hypothesis in getattr(truth.wrong, verdict),
    )


def _reached(plan: Plan, hypothesis: Hypothesis) -> Reached:
    kinds = {test.id: READINGS[test.kind] for test in plan.tests}
    names = dict(zip(plan.study.verdicts, LETTERS, strict=True))
    counts = dict.fromkeys([*LETTERS, "both"], 0)
    used = hypothesis.p.max_of
    for *readings, p in product(*(kinds[name] for name in used), (0.0, 1.0)):
        read = dict(zip(used, readings, strict=True))
        tests = [{"id": test.id, "outcome": "", "p": 0.0} for test in plan.tests]
        tests += [{"id": name, "outcome": read[name], "p": p} for name in used]
        entries = read_hypotheses(plan, tests)[1]
        outcome = next(entry["outcome"] for entry in entries if entry["id"] == hypothesis.id)
        counts[names[outcome]] += 1
        met = all(read[condition.test] in condition.reading for condition in hypothesis.met.all)
        not_met = any(read[condition.test] in condition.reading for condition in hypothesis.not_met.any)
        counts["both"] += met and not_met and p == 0
    return Reached(hypothesis=hypothesis.id, **counts)


def _as_rehearsal(document: dict[str, Any]) -> dict[str, Any]:
    """The plan as a rehearsal's; its texts without the words that a rehearsal must not use."""

    def mild(key: str, value: Any) -> Any:
        if isinstance(value, dict):
            return {name: mild(name, item) for name, item in value.items()}
        if isinstance(value, list):
            return [mild(key, item) for item in value]
        return BANNED_IN_REHEARSAL.sub("(...)", value) if key in _TEXTS else value

    found: dict[str, Any] = mild("", document)
    found["study"]["kind"] = "rehearsal"
    return found


def _collect(study: str, folder: Path, about: dict[str, Any]) -> None:
    """Write what the phase read and wrote into the folder, labelled for what it is."""
    paths = [*_inputs(study), *(layout.analysis(study, table) for table in layout.ANALYSIS_TABLES)]
    for path, table in zip(paths, _TABLES, strict=True):
        tables.write_table(folder / Path(path).name, table, tables.read_table(path, table), SIMULATED)
    results = _relabelled(read_json(layout.results(study)))
    write_json(folder / "results.json", results | {"simulated": about})


def _relabelled(value: Any) -> Any:
    """The same with every label replaced."""
    if isinstance(value, dict):
        return {key: SIMULATED if key == "label" else _relabelled(item) for key, item in value.items()}
    return [_relabelled(item) for item in value] if isinstance(value, list) else value
