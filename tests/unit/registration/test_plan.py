"""The plan decides, so a plan with any fault in it must not load."""

import json
from pathlib import Path

import pytest

from gradnoise.base import strict_yaml
from gradnoise.base.errors import InputError
from gradnoise.registration import load_plan
from gradnoise.registration.kinds import TostTest

REHEARSAL = Path("preregistration/rehearsal.yaml")


def changed(folder: Path, old: str, new: str) -> Path:
    """The rehearsal's plan with one place changed."""
    text = REHEARSAL.read_text(encoding="utf-8")
    assert text.count(old) == 1, f"{old!r} is there {text.count(old)} times"
    path = folder / "plan.yaml"
    path.write_text(text.replace(old, new), encoding="utf-8")
    return path


FAULTS = {
    "duplicate key": ("  target: 0.05 ", "  target: 0.02\n  target: 0.05 ", "target"),
    "NaN alpha": ("alpha: 0.05,", "alpha: .nan,", "alpha"),
    "infinite margin": ("    high: 0.05", "    high: .inf", "high"),
    "quoted margin": ("    high: 0.05", '    high: "0.05"', "high"),
    "margin that YAML 1.1 reads otherwise": ("    margin: 0.05 ", "    margin: 5e ", "margin"),
    "misspelt key": ("    margin: 0.05 ", "    margn: 0.05 ", "margn"),
    "key too many": ("    margin: 0.05 ", "    margin: 0.05\n    window: 3 ", "window"),
    "anchor": ("  level: 0.95", "  level: &level 0.95", "anchor"),
    "low at high": ("    low: -0.05 ", "    low: 0.05 ", "low"),
    "low above high": ("    low: -0.05 ", "    low: 0.1 ", "low"),
    "alpha of 0": ("alpha: 0.05,", "alpha: 0,", "alpha"),
    "alpha of 1": ("alpha: 0.05,", "alpha: 1.0,", "alpha"),
    "level in per cent": ("  level: 0.95", "  level: 95", "level"),
    "draws as a fraction": ("    draws: 9999", "    draws: 9999.5", "draws"),
    "missing p that shrinks": ("missing_p: 1.0", "missing_p: 0.5", "missing_p"),
    "too few seeds": ("  minimum: 5 ", "  minimum: 3 ", "minimum"),
    "more seeds than the study has": ("  minimum: 5 ", "  minimum: 8 ", "minimum"),
    "seeds that are not crossed": ("  crossed: true ", "  crossed: false ", "crossed"),
    "hypothesis in two families": (
        "families:\n",
        "families:\n  - {id: other, members: [H3], method: holm, alpha: 0.05, missing_p: 1.0}\n",
        "H3",
    ),
    "hypothesis in no family": ("members: [H1, H3, H4]", "members: [H1, H4]", "H3"),
    "hypothesis twice in a family": ("members: [H1, H3, H4]", "members: [H1, H3, H3, H4]", "H3"),
    "family of an unknown hypothesis": ("members: [H1, H3, H4]", "members: [H1, H3, H4, H9]", "H9"),
    "unknown test in p": ("p: {max_of: [icl-batch]}", "p: {max_of: [icl-bach]}", "icl-bach"),
    "unknown test in a rule": ("icl-batch, reading: [outside", "batch, reading: [outside", "not_met.any"),
    "rule on a test without readings": (
        "p: {max_of: [icl-batch]}",
        "p: {max_of: [icl-factors]}",
        "H3.p.max_of: icl-factors: must be one of",
    ),
    "p without a test that met needs": (
        "p: {max_of: [icl-slope, icl-mixed, icl-trend]}",
        "p: {max_of: [icl-slope, icl-trend]}",
        "must hold icl-mixed, which met needs",
    ),
    "no falsification rule": (
        "    not_met:\n      any:\n        - {test: icl-batch, reading: [outside zero]}\n",
        "",
        "not_met: missing",
    ),
    "unknown reading": ("reading: [inside margins, both]", "reading: [equal]", "met.all"),
    "met and not met at once": ("reading: [outside zero]", "reading: [both]", "not_met"),
    "no way to be not met": (
        "    not_met:\n      any:\n        - {test: icl-batch, reading: [outside zero]}\n",
        "    not_met: {any: []}\n",
        "not_met",
    ),
    "same test id twice": ("  - id: iwl-slope\n", "  - id: icl-slope\n", "icl-slope"),
    "unknown outcome": ("    outcome: iwl\n", "    outcome: recall\n", "recall"),
    "outcome of another block": (
        "    outcome: iwl\n",
        "    outcome: bits_per_character\n",
        "iwl-slope.outcome",
    ),
    "misspelt score": ("score: icl,", "score: icll,", "outcomes.icl.score"),
    "score of another task": ("score: iwl,", "score: bits_per_character,", "outcomes.iwl.score"),
    "unit of another score": (
        "score: icl, unit: accuracy",
        "score: icl, unit: nats",
        "outcomes.icl.unit: nats: must be accuracy",
    ),
    "outcome in an unknown block": (
        "role: primary, block: race",
        "role: primary, block: rase",
        "outcomes.icl.block",
    ),
    "misspelt matching variable": (
        "variable: validation_loss",
        "variable: validation_los",
        "matching.variable: validation_los: must be one of",
    ),
    "unknown block": ("  block: race\n", "  block: rase\n", "rase"),
    "unknown arm": ("arms: [b016-lr0.002,", "arms: [b032-lr0.002,", "b032-lr0.002"),
    "an arm against itself": ("[b016-lr0.002, b064-lr0.002]", "[b016-lr0.002, b016-lr0.002]", "arms"),
    "unknown cell in a level": ("      - [b016-lr0.008]", "      - [b016-lr0.009]", "levels"),
    "cell in two levels": ("      - [b016-lr0.008]", "      - [b256-lr0.002]", "levels"),
    "matching that is not made": ("also: [updates, tokens]", "also: [tokens]", "icl-slope-updates.matching"),
    "predictor that is not measured": (
        "    outcome: iwl\n    matching: loss\n    predictor: log10_pne2",
        "    outcome: iwl\n    matching: loss\n    predictor: log10_retained",
        "predictor",
    ),
    "free formula": ("    fixed: [log10_pne2]", '    fixed: ["log10_pne2 * batch"]', "fixed"),
    "random term without fixed one": ('{seed: ["1", log10_pne2]}', '{seed: ["1", log10_pne]}', "random"),
    "items as clusters": ("    cluster: seed\n    low", "    cluster: task\n    low", "cluster"),
    "study outside config": ("config: config/quick.yaml", "config: /etc/passwd", "config"),
    "sexagesimal margin": ("    margin: 0.05 ", "    margin: 1:30 ", "margin"),
    "no for a truth value": ("  crossed: true ", "  crossed: no ", "crossed"),
    "quoted draws": ("    draws: 9999\n", '    draws: "9999"\n', "draws"),
    "too few draws": ("    draws: 9999\n", "    draws: 99\n", "draws"),
    "alias": ("  level: 0.95", "  level: *level", "alias"),
    "tag": ("  level: 0.95", "  level: !!float 0.95", "tag"),
    "merge key": ("  level: 0.95", "  level: 0.95\n  <<: {level: 0.5}", "merge key"),
    "margin per seed": ("    margin: 0.05 ", "    margin: [0.05] ", "margin"),
    "truth value for a margin": ("    margin: 0.05 ", "    margin: true ", "margin"),
    "exclusion on an outcome": ("column: exposure,", "column: icl,", "exclusions.0.column"),
    "exclusion after the outcome": ("stage: before_outcome", "stage: after_outcome", "stage"),
    "exclusion by another comparison": ('op: "<="', 'op: "!="', "op"),
    "looks": ("  stopping: fixed ", "  stopping: sequential ", "stopping"),
    "no stopping rule": ("  stopping: fixed ", "  # ", "stopping: missing"),
    "seeds of one's own": ("  derive: hmac-sha256", "  derive: [1, 2, 3]", "derive"),
    "a retry after a finished attempt": ("[started, failed]", "[started, finished]", "retry_after"),
    "no attempt": ("  maximum: 3\n", "  maximum: 0\n", "attempts.maximum"),
    "z instead of t": (
        "degrees_of_freedom: kenward-roger\n    alternative: greater",
        "degrees_of_freedom: none",
        "freedom",
    ),
    "maximum likelihood": (
        "    estimator: reml\n    degrees_of_freedom: kenward-roger\n    alternative: greater",
        "    estimator: ml\n    degrees_of_freedom: kenward-roger\n    alternative: greater",
        "estimator",
    ),
    "tasks as random": ('{seed: ["1", log10_pne2]}', '{task: ["1"]}', "random"),
    "Treatment coding": ("    type: III\n", "    type: II\n", "type"),
    "covariate at matched loss": (
        "    fixed: [log10_pne2]\n",
        "    fixed: [log10_pne2, loss_c]\n",
        "icl-mixed.matching",
    ),
    "contrast of a cell with itself": (
        "first: [b016-lr0.002, b016-lr0.008]",
        "first: [b016-lr0.002, b256-lr0.008]",
        "icl-assigned.first",
    ),
    "more missing runs than runs": ("    missing: 0.25\n", "    missing: 1.25\n", "limits.missing"),
    "no limit on missing runs": ("    missing: 0.25\n", "", "limits.missing: missing"),
    "monotone although steps are only reported": (
        "    steps: required ",
        "    steps: reported ",
        "icl-trend.steps",
    ),
    "sensitivity of no slope": (
        "  - test: icl-slope\n    methods",
        "  - test: icl-batch\n    methods",
        "sensitivity.test",
    ),
    "sensitivity by z": ("[wild_cluster_bootstrap, sign_flip", "[wald, sign_flip", "methods"),
    "mediator that is the outcome": ("mediator: iwl,", "mediator: icl,", "icl-path.mediator"),
    "no residual spread": ("run_sd: 0.02", "run_sd: 0", "run_sd"),
    "truth about an unknown outcome": (
        "slopes: {icl: 0.06, iwl: -0.06}",
        "slopes: {icll: 0.06}",
        "truths.rise.slopes: icll",
    ),
    "truth about an unknown cell": (
        "shifts: {icl: {b016-lr0.002: 0.05}}",
        "shifts: {icl: {b016: 0.05}}",
        "truths.margin.shifts.icl: b016",
    ),
    "error of an unknown hypothesis": (
        "wrong: {met: [H3]}",
        "wrong: {met: [H2]}",
        "truths.margin.wrong.met: H2",
    ),
    "pilot outside its folder": (
        "prior_access: pilot\n",
        "prior_access: pilot\n  pilot: [{path: ../x.json, sha256: " + "ab" * 32 + "}]\n",
        "pilot.0.path",
    ),
    "registered with a rehearsal's name of a kind": ("kind: rehearsal", "kind: confirmatory", "kind"),
    "date for a title": ("  title: Rehearsal of", "  title: 2026-01-01\n  subtitle: Rehearsal of", "title"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_faulty_plan_is_one_line_that_names_the_field(fault: str, tmp_path: Path) -> None:
    old, new, named = FAULTS[fault]
    path = changed(tmp_path, old, new)
    with pytest.raises(InputError) as refusal:
        load_plan(path)
    message = str(refusal.value).removeprefix(str(path))
    assert named in message
    assert "\n" not in message


def test_the_rehearsal_loads_and_its_hash_ignores_comments_and_order(tmp_path: Path) -> None:
    plan = load_plan(REHEARSAL)
    assert plan.study.label == "REHEARSAL"
    assert plan.matching.names == ("loss", "updates", "tokens")
    reworded = changed(tmp_path, "# The plan of the rehearsal study", "# A plan, of the rehearsal study")
    assert load_plan(reworded).sha256 == plan.sha256
    document = strict_yaml.load(REHEARSAL)
    reordered = tmp_path / "reordered.yaml"
    reordered.write_text(json.dumps(dict(reversed(document.items()))))
    assert load_plan(reordered).sha256 == plan.sha256


def test_numbers_are_those_of_yaml_1_2(tmp_path: Path) -> None:
    """Other readers take the first for a text and the second for ten."""
    tested = load_plan(changed(tmp_path, "    high: 0.05", "    high: 5e-2")).test("icl-batch")
    assert isinstance(tested, TostTest)
    assert tested.high == 0.05
    assert load_plan(changed(tmp_path, "  maximum: 3\n", "  maximum: 012\n")).attempts.maximum == 12


def test_any_value_changes_the_hash(tmp_path: Path) -> None:
    moved = load_plan(changed(tmp_path, "    high: 0.05", "    high: 0.051"))
    assert moved.sha256 != load_plan(REHEARSAL).sha256


def test_a_plan_for_a_study_that_is_not_there_says_so(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"config/slow\.yaml: missing"):
        load_plan(changed(tmp_path, "config: config/quick.yaml", "config: config/slow.yaml"))
