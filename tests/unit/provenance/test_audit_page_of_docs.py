"""docs/audit.md tells what each check is."""

from pathlib import Path

import gradnoise.provenance.audit.audit  # noqa: F401  (enters the checks)
from gradnoise.provenance.audit.findings import CHECKS

PAGE = Path("docs/audit.md")


def test_every_check_is_on_the_page_with_its_title_and_severity() -> None:
    rows = [line for line in PAGE.read_text(encoding="utf-8").splitlines() if line.startswith("| **A")]
    told = [tuple(cell.strip(" *") for cell in row.split("|")[1:4]) for row in rows]
    assert told == [(check.id, check.title, check.severity) for _, check in sorted(CHECKS.items())]
    assert [check for check, _, _ in told] == [f"A{number:02d}" for number in range(1, 31)]
