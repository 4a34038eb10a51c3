"""The plan decides, so a plan with any fault in it must not load."""

from pathlib import Path

import pytest

from gradnoise.base.errors import InputError
from gradnoise.registration import load_plan

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
    "rule on a test without readings": ("p: {max_of: [icl-batch]}", "p: {max_of: [icl-mixed]}", "icl-mixed"),
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
    reordered = changed(tmp_path, "  low: -0.05 ", "  # moved\n    low: -0.05 ")
    assert load_plan(reordered).sha256 == plan.sha256


def test_any_value_changes_the_hash(tmp_path: Path) -> None:
    moved = load_plan(changed(tmp_path, "    high: 0.05", "    high: 0.051"))
    assert moved.sha256 != load_plan(REHEARSAL).sha256


def test_a_plan_for_a_study_that_is_not_there_says_so(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"config/slow\.yaml: missing"):
        load_plan(changed(tmp_path, "config: config/quick.yaml", "config: config/slow.yaml"))
