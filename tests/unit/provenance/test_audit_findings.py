"""From checks to findings, levels of trust and the page."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from gradnoise.base.errors import InputError
from gradnoise.provenance.audit import audit as whole
from gradnoise.provenance.audit import page
from gradnoise.provenance.audit.audit import Audit, audit, levels
from gradnoise.provenance.audit.findings import (
    CHECKS,
    Breach,
    Check,
    Finding,
    NotApplicable,
    NotAsked,
    check,
    line,
    settle,
)
from gradnoise.provenance.audit.trees import Text, differences


def found(run: Any) -> Finding:
    return Check("A99", "title", "minor", run).find(None)  # type: ignore[arg-type]


def raising(error: Exception) -> Any:
    def run(_: object) -> str:
        raise error

    return run


def test_every_check_is_there_under_its_permanent_name() -> None:
    assert sorted(CHECKS) == [f"A{number:02d}" for number in range(1, 31)]
    assert all(item.severity in ("critical", "serious", "minor") and item.title for item in CHECKS.values())
    with pytest.raises(ValueError, match="A01 is taken"):
        check("A01", "another", "minor")(lambda _: "")


@pytest.mark.parametrize(
    ("error", "status", "evidence"),
    [
        (Breach("x differs"), "breach", "x differs"),
        (NotApplicable("rehearsal"), "not applicable", "not applicable: rehearsal"),
        (NotAsked("costs time"), "not asked", "costs time"),
        (InputError("plan.yaml", "nan", "mend it"), "breach", "cannot be checked: "),
        (KeyError("tests"), "breach", "cannot be checked: there is no 'tests'"),
        (
            ZeroDivisionError("division\nby zero"),
            "breach",
            "cannot be checked: ZeroDivisionError: division by zero",
        ),
        (RecursionError("too deep"), "breach", "cannot be checked: RecursionError"),
    ],
)
def test_whatever_happens_is_one_line_of_evidence(error: Exception, status: str, evidence: str) -> None:
    finding = found(raising(error))
    assert finding.status == status
    assert finding.evidence.startswith(evidence)
    assert "\n" not in finding.evidence


def test_first_fault_is_told_and_the_others_counted() -> None:
    assert settle([], "fine") == "fine"
    with pytest.raises(Breach, match=r"^first \(and 2 more\)$"):
        settle(["first", "second", "third"], "fine")
    with pytest.raises(Breach) as long:
        settle(["x" * 999, "y"], "fine")
    assert len(str(long.value)) <= 300
    assert str(long.value).endswith("(and 1 more)")
    assert line("a\x1b[31mb\nc\u202ed") == "a [31mb c d"


def verdicts(**status: str) -> list[Finding]:
    """Findings of a registered study, audited without spot re-runs, with these changes."""
    usual = {name: "passed" for name in CHECKS} | {"A27": "not asked", "A28": "not asked"} | status
    none = Finding("A30", "", "minor", "passed", "none: Git alone")
    return [
        none if name == "A30" and word == "passed" else Finding(name, "t", "minor", word, "e")  # type: ignore[arg-type]
        for name, word in usual.items()
    ]


def reached(findings: list[Finding], registered: bool = True) -> str:
    return " ".join(level.name for level in levels(findings, registered) if level.reached)


def test_levels_of_trust() -> None:
    assert reached(verdicts()) == "T0 T1 T3"
    assert reached(verdicts(A27="passed", A28="passed")) == "T0 T1 T3 T4"
    anchored = [replace(f, evidence="verified: 2026") if f.id == "A30" else f for f in verdicts()]
    assert reached(anchored) == "T0 T1 T2 T3"
    # History that is not honest takes the order away, and no more; files that disagree take all.
    assert reached(verdicts(A04="breach")) == "T0 T3"
    assert reached(verdicts(A06="breach")) == ""
    assert reached(verdicts(A17="breach", A27="passed", A28="passed")) == ""
    assert reached(verdicts(A02="not applicable"), registered=False) == "T0"


def test_reasons_are_given_for_levels_that_are_not_reached() -> None:
    why = {level.name: level.why for level in levels(verdicts(A10="breach"), True)}
    assert why["T1"] == "A10: breach"
    assert why["T2"].startswith("none")
    assert why["T4"] == "A27: not asked"
    assert why["T0"] == ""


def test_page_and_json_say_what_was_found(capsys: pytest.CaptureFixture[str]) -> None:
    findings = tuple(
        replace(f, evidence="<script>alert(1)</script>") if f.id == "A09" else f
        for f in verdicts(A09="breach")
    )
    result = Audit("quick", "REGISTERED", findings, levels(findings, True))
    html = page.page(result)
    assert "<script>alert" not in html
    assert html.index("Trust: none") < html.index("A01")
    assert whole.LIMIT in html.replace("&#39;", "'")
    document = page.document(result)
    assert document["breaches"] == ["A09"]
    assert len(document["findings"]) == 30
    page.show(result)
    shown = capsys.readouterr().out.splitlines()
    assert shown[0].startswith("Trust: none")
    assert sum(text.startswith("A") and "passed" in text for text in shown) == 27
    assert "Breached: A09" in shown


def test_study_that_does_not_exist_is_bad_input(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="missing"):
        audit("nosuch", tmp_path)
    with pytest.raises(InputError, match="lower-case"):
        audit("../x", tmp_path)


def test_nothing_but_settings_is_thirty_findings_and_no_traceback(tmp_path: Path) -> None:
    (tmp_path / "config").mkdir()
    (tmp_path / "config" / "empty.yaml").write_text("{}")
    result = audit("empty", tmp_path)
    assert len(result.findings) == 30
    assert result.trust == "none"
    assert {finding.status for finding in result.findings if finding.id < "A27"} == {"breach"}


def test_differences_name_the_place() -> None:
    expected = {"tests": [{"id": "a", "p": 0.05, "n": 5, "why": Text()}], "ok": True}
    same = {"tests": [{"id": "a", "p": 0.05 + 1e-9, "n": 5, "why": "too few"}], "ok": True}
    assert list(differences(same, expected)) == []
    other = {"tests": [{"id": "a", "p": 0.0504, "n": 5.5, "why": None, "q": 1}], "ok": 1}
    assert [".".join(found.path) for found in differences(other, expected)] == [
        "ok",
        "tests.a.n",
        "tests.a.p",
        "tests.a.q",
        "tests.a.why",
    ]
    assert [str(found) for found in differences([1], [1, 2])] == [" is a list of 1, should be a list of 2"]
