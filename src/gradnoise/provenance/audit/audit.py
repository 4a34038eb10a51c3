"""The audit of a study: every check, and how far what it found can be trusted."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from gradnoise.base.study import load_study, study_path

# Each module enters its checks.
from gradnoise.provenance.audit import (
    asked,
    deviating,
    files,
    flow,
    history,
    pages,
    recompute,
    registration,
    reruns,
    runs,
)
from gradnoise.provenance.audit.evidence import Evidence
from gradnoise.provenance.audit.findings import CHECKS, Finding

MODULES = (registration, history, runs, files, flow, asked, recompute, pages, deviating, reruns)

# What no tool can find; said on every page.
LIMIT = (
    "No tool can find a study that was run in full, and in private, with other seeds before this plan was "
    "written, nor records that were forged as a whole by somebody with the time to train everything."
)
_ORDER, _ANCHOR, _AGAIN = ("A03", "A04", "A10"), ("A30",), ("A27", "A28")
_SEEDS = ("A02", "A06", "A08")


@dataclass(frozen=True)
class Level:
    """A level of trust: its name, what it means, whether it is reached, and if not, why."""

    name: str
    meaning: str
    reached: bool
    why: str


@dataclass(frozen=True)
class Audit:
    """What was found in a study. `label`: that of its results; `levels`: T0 to T4."""

    study: str
    label: str
    findings: tuple[Finding, ...]
    levels: tuple[Level, ...]

    @property
    def breaches(self) -> tuple[Finding, ...]:
        """Findings that must not be."""
        return tuple(finding for finding in self.findings if finding.status == "breach")

    @property
    def trust(self) -> str:
        """The levels that are reached, in one line."""
        names = [level.name for level in self.levels if level.reached]
        return ", ".join(names) if names else "none"


def audit(study: str, root: Path | str = ".", spot_runs: int = 0) -> Audit:
    """Carry out checks A01 to A30 on a study of the repository at `root`.

    `spot_runs`: so many training jobs are run again (A27, A28); they are chosen by the hash of the manifest.
    A check that damaged files break is a breach of that check; nothing is raised for them. Raises
    `InputError` for a study that does not exist.
    """
    with contextlib.chdir(root):
        if not study_path(study).is_file():
            load_study(study)
        evidence = Evidence(study, spot_runs)
        findings = tuple(CHECKS[name].find(evidence) for name in sorted(CHECKS))
        return Audit(study, _label(evidence), findings, levels(findings, _registered(evidence)))


def _label(evidence: Evidence) -> str:
    try:
        return evidence.plan.study.label
    except Exception:
        return "UNKNOWN"


def _registered(evidence: Evidence) -> bool:
    try:
        return evidence.registered
    except Exception:
        return False


def levels(findings: Iterable[Finding], registered: bool) -> tuple[Level, ...]:
    """T0 to T4: each says something of its own, and none is reached while the files contradict each other."""
    by_id = {finding.id: finding for finding in findings}
    beyond = {*_ORDER, *_ANCHOR, *_AGAIN}
    consistent = _first(by_id, [name for name in by_id if name not in beyond], ("breach",))
    rehearsal = None if registered else "a rehearsal has no lock"
    anchored = by_id["A30"].status == "passed" and by_id["A30"].evidence.startswith("verified")
    no_anchor = None if anchored else by_id["A30"].evidence
    told = (
        ("T0", "the files agree with each other", None),
        ("T1", "lock, runs and results came in this order, if Git's history is honest",
         rehearsal or _first(by_id, _ORDER, ("breach", "not applicable"))),
        ("T2", "an outside party vouches for when the lock existed", rehearsal or no_anchor),
        ("T3", "seeds follow from the lock, so no run is older than the plan",
         rehearsal or _first(by_id, _SEEDS, ("breach", "not applicable"))),
        ("T4", "runs chosen by hash were trained again with the same result",
         _first(by_id, _AGAIN, ("breach", "not asked", "not applicable"))),
    )  # fmt: skip
    because = [(name, meaning, consistent or why) for name, meaning, why in told]
    return tuple(Level(name, meaning, why is None, why or "") for name, meaning, why in because)


def _first(by_id: dict[str, Finding], names: Iterable[str], bad: tuple[str, ...]) -> str | None:
    """The first of these checks with such a status, in words."""
    said = (f"{name}: {by_id[name].status}" for name in sorted(names) if by_id[name].status in bad)
    return next(said, None)
