"""Check of the deviations: a whole log that only grew, and results that depart from the plan nowhere else."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from gradnoise.provenance.audit.evidence import Evidence, canonical, parse_json, plain, sha256_of
from gradnoise.provenance.audit.findings import NotApplicable, check, settle
from gradnoise.provenance.audit.history import DVC_LOCK, dvc_outs
from gradnoise.provenance.audit.mirror import Mirror, labels
from gradnoise.provenance.audit.trees import differences
from gradnoise.registration.lockfile import deviations_path

Entry = dict[str, Any]


@check("A25", "every departure from the plan is logged, in a log that only grew", "critical")
def deviations(evidence: Evidence) -> str:
    """The chain of hashes, Git's versions of the log, what was known when, and what results made of it."""
    if not evidence.registered:
        raise NotApplicable("rehearsal")
    log = deviations_path(evidence.study.plan).as_posix()
    entries = [parse_json(line, log) for line in evidence.deviation_lines]
    faults = [*_chain_faults(evidence.deviation_lines, entries), *_growth_faults(evidence, log)]
    faults += _result_faults(evidence, entries)
    for entry in entries:
        faults += _entry_faults(evidence, entry)
    said = f"{len(entries)} logged" if entries else "none logged"
    return settle(faults, f"{said}; results.json departs from the plan nowhere else")


def _chain_faults(lines: list[bytes], entries: list[Entry]) -> Iterator[str]:
    """Lines that were changed, moved or taken out."""
    previous = ""
    for number, (text, entry) in enumerate(zip(lines, entries, strict=True), start=1):
        content = {name: value for name, value in entry.items() if name != "hash"}
        if entry["id"] != f"D{number}" or entry["previous"] != previous:
            yield f"deviation {entry['id']} does not follow from the one before"
        if entry["hash"] != sha256_of(content) or text != canonical(entry) + b"\n":
            yield f"deviation {entry['id']} was changed after it was logged"
        previous = entry["hash"]


def _growth_faults(evidence: Evidence, log: str) -> Iterator[str]:
    """Versions of the log in Git's history that are no beginning of today's."""
    now = b"".join(evidence.deviation_lines)
    commits = evidence.git.touching(log)
    for commit, blob in zip(commits, evidence.git.blobs([(commit, log) for commit in commits]), strict=True):
        if not now.startswith(blob or b""):
            yield f"{log}: what commit {commit[:12]} held was changed or taken out"


def _entry_faults(evidence: Evidence, entry: Entry) -> Iterator[str]:
    """A deviation against the document that it departs from and against what could be seen by then."""
    from gradnoise.registration.deviations import resolve, touched

    document: Any = (
        evidence.plan_document if entry["document"] == "plan" else evidence.lock.model_dump(mode="json")
    )
    if canonical(resolve(document, entry["pointer"])) != canonical(entry["registered"]):
        yield f"deviation {entry['id']}: {entry['pointer']} was not registered as it says"
    if list(touched(evidence.plan, entry["pointer"], entry["document"])) != entry["tests"]:
        yield f"deviation {entry['id']} touches other tests than it says"
    if not plain(entry["evidence"]).is_file():
        yield f"deviation {entry['id']}: its evidence {entry['evidence']} is no file"
    if entry["commit"] not in evidence.git.history:
        yield f"deviation {entry['id']} was logged at commit {entry['commit'][:12]}, which this history lacks"
    elif entry["discovered"] == "before":
        seen = _seen(evidence, entry)
        if seen:
            yield f"deviation {entry['id']} is said to be found before any outcome, but {seen}"


def _seen(evidence: Evidence, entry: Entry) -> str | None:
    """Where an outcome of the study was to be seen when a deviation was logged, or when it was committed."""
    git, folder = evidence.git, f"results/{evidence.name}"
    log = deviations_path(evidence.study.plan).as_posix()
    versions = git.touching(log)
    texts = git.blobs([(sha, log) for sha in versions])
    held = [sha for sha, text in zip(versions, texts, strict=True) if canonical(entry) in (text or b"")]
    for sha in git.touching(folder, DVC_LOCK):
        outs = dvc_outs(git.blob(sha, DVC_LOCK) or b"")
        if git.listing(sha, folder) or any(out["path"] == f"{folder}/runs" for out in outs):
            if git.is_ancestor(sha, entry["commit"]):
                return f"commit {sha[:12]} in its past has results"
            if held and git.is_ancestor(sha, held[0]):
                return f"it was committed in {held[0][:12]}, and commit {sha[:12]} has results"
    done = (r for r in evidence.records if r.phase != "prepare" and r.status == "finished")
    early = (record.id for record in done if (record.end or "") <= entry["utc"])
    return next((f"{name} had finished" for name in early), None)


def _result_faults(evidence: Evidence, entries: list[Entry]) -> Iterator[str]:
    """What results.json says of deviations, what it made of them, and departures that no entry names."""
    results, plan = evidence.results, evidence.plan
    yield from map(str, differences(results.get("deviations"), entries, ("deviations",)))
    for entry, test in zip(results["tests"], plan.tests, strict=False):
        if entry["asked"] != test.model_dump(mode="json"):
            yield f"{test.id} was carried out otherwise than registered, and stands as the registered test"
    changed = _effective(evidence)
    if changed is None:
        if results.get("deviated") is not None:
            yield "results.json holds results under deviations, and the plan was not deviated from"
        return
    shown = results.get("deviated") or {"tests": []}
    mirror = Mirror(evidence.compared_under(changed), evidence.key, shown["tests"])
    names = labels(plan, evidence.deviations)
    tests = [test | {"label": names[test["id"]]} for test in mirror.tests()]
    hypotheses = [item | {"label": names[item["id"]]} for item in mirror.hypotheses(tests)]
    wanted = {"tests": tests, "families": mirror.families(tests), "hypotheses": hypotheses}
    yield from map(str, differences(shown, wanted, ("deviated",)))


def _effective(evidence: Evidence) -> Any:
    """The plan with its deviations put in; None where none changes the plan."""
    from gradnoise.registration.deviations import under_deviations

    return under_deviations(evidence.plan, evidence.study.plan, evidence.deviations)
