"""An audit for people and for programs: a table on the screen, a page and a JSON file."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gradnoise.base.files import write_bytes, write_json
from gradnoise.provenance.audit.audit import LIMIT, Audit, audit

if TYPE_CHECKING:
    from rich.console import Console
    from rich.text import Text

_COLOURS = {"passed": "green", "breach": "bold red", "not applicable": "dim", "not asked": "dim"}


def command(study: str, spot_runs: int = 0, json: Path | None = None, html: Path | None = None) -> int:
    """Audit a study of the working folder, show and write what was found; 1 if anything is breached, else 0.

    The files go to `json` and `html`, by default `logs/<study>-audit.json` and `.html`.
    """
    found = audit(study, ".", spot_runs)
    json, html = json or Path(f"logs/{study}-audit.json"), html or Path(f"logs/{study}-audit.html")
    write_json(json, document(found))
    write_bytes(html, page(found).encode())
    show(found)
    print(f"Written: {json} and {html}")
    return 1 if found.breaches else 0


def document(found: Audit) -> dict[str, Any]:
    """An audit as JSON."""
    return {
        "study": found.study,
        "label": found.label,
        "trust": found.trust,
        "levels": [asdict(level) for level in found.levels],
        "breaches": [finding.id for finding in found.breaches],
        "findings": [asdict(finding) for finding in found.findings],
        "limit": LIMIT,
    }


def page(found: Audit) -> str:
    """An audit as one self-contained page."""
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("gradnoise.provenance.audit", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    return environment.get_template("audit.html.j2").render(audit=found, limit=LIMIT)


def show(found: Audit, console: Console | None = None) -> None:
    """Print the level of trust, then a line a check."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = console or Console(highlight=False, soft_wrap=True)
    console.print(Text.assemble((f"Trust: {found.trust}", "bold"), f"  study {found.study} ({found.label})"))
    for level in found.levels:
        why = "" if level.reached else f"  no: {level.why}"
        console.print(Text(f"  {level.name}  {level.meaning}{why}"))
    rows = Table(box=None, pad_edge=False)
    for name in ("Check", "Status", "Severity", "Evidence"):
        rows.add_column(name, no_wrap=name != "Evidence")
    for finding in found.findings:
        status, said = finding.status, Text(f"{finding.title}: {finding.evidence}")
        rows.add_row(finding.id, Text(status, style=_COLOURS[status]), finding.severity, said)
    # A file or a pipe gets whole lines.
    console.print(rows if console.is_terminal else Text("\n").join(_lines(found)))
    names = ", ".join(finding.id for finding in found.breaches)
    console.print(Text(f"Breached: {names}" if names else "No check was breached", style="bold"))
    console.print(Text(LIMIT))


def _lines(found: Audit) -> Iterator[Text]:
    from rich.text import Text

    for item in found.findings:
        yield Text(f"{item.id}  {item.status:<14}  {item.severity:<8}  {item.title}: {item.evidence}")
