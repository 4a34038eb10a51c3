"""Every attack on a copy of the fixture study, and the checks that notice it."""

from __future__ import annotations

import time

import pytest
from tests.audit.attacks import ATTACKS, Attack
from tests.audit.fixture_study import NAME, Repository

from gradnoise.provenance.audit.audit import audit

# Checks that no attack trips alone, and why.
NEVER_ALONE = {
    "A01": "where plan or settings do not load, nothing can be held against them",
    "A28": "what it looks at is in a table that A27 makes again",
    "A10": "what is changed after its commit, A13 (tables made again) or A25 (the log) sees too",
    "A11": "what a table hides, A13 sees too: it makes the tables of phase measure again",
    "A23": "what is typed into the page trips A22, into a caption A24, into the template A05",
}

tripped: dict[str, tuple[str, ...]] = {}
seconds: dict[str, float] = {}


@pytest.mark.slow
@pytest.mark.parametrize("attack", ATTACKS, ids=[f"{each.number:02d}-{each.name}" for each in ATTACKS])
def test_attack_is_caught(attack: Attack, copy: Repository) -> None:
    start = time.perf_counter()
    attack.apply(copy)
    found = audit(NAME, copy.path, attack.spot_runs)
    seconds[attack.name] = time.perf_counter() - start
    tripped[attack.name] = tuple(finding.id for finding in found.breaches)
    assert set(attack.trips) <= set(tripped[attack.name]), [f"{f.id}: {f.evidence}" for f in found.breaches]


def test_all_attacks_are_caught(capsys: pytest.CaptureFixture[str]) -> None:
    """Prints the count and what each attack tripped; every check is the only one to see some attack."""
    if len(tripped) < len(ATTACKS):
        pytest.skip("not every attack was carried out")
    caught = {each.number for each in ATTACKS}
    caught -= {each.number for each in ATTACKS if not set(each.trips) <= set(tripped[each.name])}
    specified = range(1, 41)
    with capsys.disabled():
        print()
        for each in ATTACKS:
            print(f"{each.number:3} {each.name:48} {' '.join(tripped[each.name])}")
        print(f"{len(caught & set(specified))} of {len(specified)} attacks caught")
        own = {each.number for each in ATTACKS} - set(specified)
        total = sum(seconds.values())
        print(f"{len(caught & own)} of {len(own)} attacks of our own caught, {total:.0f} s in all")
    assert caught == {each.number for each in ATTACKS}
    alone = {checks[0] for checks in tripped.values() if len(checks) == 1}
    wanted = {f"A{number:02d}" for number in range(1, 29)} - NEVER_ALONE.keys()
    assert wanted - alone == set()
    assert alone & NEVER_ALONE.keys() == set()


def test_another_order_of_rows_is_told_apart_from_other_content(copy: Repository) -> None:
    """Attack 18: the bytes differ, the content does not."""
    next(each for each in ATTACKS if each.name == "rows_in_another_order").apply(copy)
    evidence = next(finding.evidence for finding in audit(NAME, copy.path).breaches if finding.id == "A09")
    assert "bytes differ, content equal" in evidence
