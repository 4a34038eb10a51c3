"""The fixture study as it is: honest, so nothing is found; the forger's tools leave no trace of their own."""

from __future__ import annotations

import shutil
import time
from collections import Counter

import pytest
from tests.audit import forge
from tests.audit.fixture_study import NAME, PLAN, Repository, publish

from gradnoise.base.files import read_json
from gradnoise.provenance.audit.audit import Audit, audit
from gradnoise.registration.deviations import deviate


def reached(found: Audit) -> list[str]:
    """Names of the levels of trust that are reached."""
    return [level.name for level in found.levels if level.reached]


def test_nothing_is_found_in_an_honest_study(study: Repository, capsys: pytest.CaptureFixture[str]) -> None:
    audit(NAME, study.path)  # imports
    start = time.perf_counter()
    found = audit(NAME, study.path)
    seconds = time.perf_counter() - start
    with capsys.disabled():
        print(f"\nfixture study audited in {seconds:.2f} s")
    assert found.breaches == ()
    assert [finding.id for finding in found.findings] == [f"A{number:02d}" for number in range(1, 31)]
    assert [finding.id for finding in found.findings if finding.status == "not asked"] == ["A27", "A28"]
    assert seconds < 6


def test_the_study_has_what_can_go_wrong(study: Repository) -> None:
    results = read_json(study.file(forge.RESULTS))
    assert isinstance(results, dict)
    fates = results["fates"]
    assert min(fates["analysed"], fates["excluded"], fates["unmatched"], fates["not compared"]) > 0
    assert Counter(record["status"] for record in forge.records(study).values())["failed"] == 1
    assert len(results["deviations"]) == 1
    assert results["deviated"] is not None
    for entry in results["tests"]:
        assert entry["outcome"]
        assert entry["p"] is not None or entry["kind"] == "anova"


def test_runs_trained_again_are_the_same(study: Repository) -> None:
    found = audit(NAME, study.path, spot_runs=1)
    assert found.breaches == ()
    assert reached(found) == ["T0", "T1", "T3", "T4"]


def test_nothing_is_found_in_a_clone(study: Repository, tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.mktemp("clone") / "repository"
    study.git("clone", "--quiet", "--no-local", str(study.path), str(path))
    for name in ("data", "runs", "noise", "scores", "analysis", "provenance"):
        # As `dvc pull` would.
        folder = f"results/{NAME}/{name}"
        shutil.copytree(study.file(folder), path / folder, dirs_exist_ok=True)
    assert audit(NAME, path).breaches == ()


def test_nothing_is_found_after_a_late_deviation_that_is_logged(copy: Repository) -> None:
    with copy.inside():
        deviate(
            PLAN,
            "/tests/7/high",
            0.06,
            reason="unforeseen-event",
            evidence=forge.RESULTS,
            effect="A wider margin.",
        )
        copy.commit("Late deviation")
        publish(copy)
    copy.commit("Results beside the registered ones")
    assert audit(NAME, copy.path).breaches == ()
    results = read_json(copy.file(forge.RESULTS))
    assert isinstance(results, dict)
    labels = {entry["id"]: entry["label"] for entry in results["tests"]}
    assert [name for name, label in labels.items() if label == "CONFIRMATORY-DEVIATED"] == ["icl-batch"]
    assert results["tests"][7]["details"]["margin_high"] == 0.05
    assert results["deviated"]["tests"][7]["details"]["margin_high"] == 0.06


def test_the_forger_leaves_no_trace_of_his_tools(study: Repository, copy: Repository) -> None:
    forge.seal(copy)
    assert copy.git("status", "--porcelain") == ""
    for path in study.file(f"results/{NAME}").rglob("*"):
        if path.is_file():
            assert path.read_bytes() == copy.file(str(path.relative_to(study.path))).read_bytes(), path


def test_a_history_told_anew_is_not_found_while_nothing_was_changed(copy: Repository) -> None:
    forge.rewrite_history(copy)
    assert audit(NAME, copy.path).breaches == ()
