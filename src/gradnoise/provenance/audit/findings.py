"""What a check is and what it finds."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from gradnoise.base.errors import InputError

if TYPE_CHECKING:
    from gradnoise.provenance.audit.evidence import Evidence

Status = Literal["passed", "breach", "not applicable", "not asked"]
# critical: an outcome may be wrong, or no longer be the registered one. serious: evidence for how it came
# about is broken or incomplete. minor: how it is shown or could be rebuilt.
Severity = Literal["critical", "serious", "minor"]

_LONGEST = 300


class Breach(Exception):
    """What was found is not as it must be; the message says it in one line."""


class NotApplicable(Exception):
    """The study has nothing that this check is about; the message says why."""


class NotAsked(Exception):
    """The check costs time and was not asked for."""


@dataclass(frozen=True)
class Finding:
    """What a check found, in one line of evidence."""

    id: str
    title: str
    severity: Severity
    status: Status
    evidence: str


@dataclass(frozen=True)
class Check:
    """A check under its permanent id; `run` gives a line of evidence or raises what else it found."""

    id: str
    title: str
    severity: Severity
    run: Callable[[Evidence], str]

    def find(self, evidence: Evidence) -> Finding:
        """Carry the check out. What breaks it is a breach too: damaged evidence is no evidence."""
        status: Status = "passed"
        try:
            said = self.run(evidence)
        except Breach as found:
            status, said = "breach", str(found)
        except NotApplicable as found:
            status, said = "not applicable", f"not applicable: {found}"
        except NotAsked as found:
            status, said = "not asked", str(found)
        except InputError as fault:
            status, said = "breach", f"cannot be checked: {fault}"
        except KeyError as fault:
            status, said = "breach", f"cannot be checked: there is no {fault}"
        except Exception as fault:
            status, said = "breach", f"cannot be checked: {type(fault).__name__}: {fault}"
        return Finding(self.id, self.title, self.severity, status, line(said))


CHECKS: dict[str, Check] = {}


def check(
    name: str, title: str, severity: Severity
) -> Callable[[Callable[[Evidence], str]], Callable[[Evidence], str]]:
    """Enter a function as the check `name`."""

    def enter(run: Callable[[Evidence], str]) -> Callable[[Evidence], str]:
        if name in CHECKS:
            raise ValueError(f"{name} is taken")
        CHECKS[name] = Check(name, title, severity, run)
        return run

    return enter


def settle(faults: Sequence[str], passed: str) -> str:
    """`passed` if there are no faults; else a breach with the first of them and the number of the others."""
    if not faults:
        return passed
    others = f" (and {len(faults) - 1} more)" if len(faults) > 1 else ""
    raise Breach(line(faults[0], _LONGEST - len(others)) + others)


def line(text: str, longest: int = _LONGEST) -> str:
    """`text` as one printable line of bounded length: evidence may quote what a forger wrote."""
    text = " ".join("".join(c if c.isprintable() else " " for c in text).split())
    return text if len(text) <= longest else text[: longest - 1] + "…"
