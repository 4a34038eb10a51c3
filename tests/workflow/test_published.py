"""The published study as this repository holds it."""

import subprocess
from typing import Any

import pytest
from tests.workflow.project import ROOT, holds, published_study

from gradnoise import phases
from gradnoise.base import layout, strict_yaml
from gradnoise.base.study import load_study

LIMIT = 5_000_000
STUDY = published_study()


def _outs() -> dict[str, Any]:
    if not (ROOT / "dvc.lock").is_file():
        pytest.skip("nothing is published yet")
    stages: dict[str, Any] = strict_yaml.load(ROOT / "dvc.lock")["stages"]  # type: ignore[assignment]
    return {out["path"]: out for stage in stages.values() for out in stage["outs"]}


def test_the_published_artifacts_are_small() -> None:
    """Every publication stays in the history."""
    if STUDY != "quick":
        pytest.skip("the bound is for the time while the quick study is published")
    assert sum(out["size"] for out in _outs().values()) < LIMIT


def test_dvc_records_every_result() -> None:
    outs = _outs()
    paths = phases.outputs(STUDY, load_study(STUDY))
    assert [path for path in paths if not any(holds(out, path) for out in outs)] == []


def test_git_holds_what_people_read() -> None:
    """Figures with their data, results.json and the report can be read on the web without DVC."""
    _outs()
    read = [*phases.draw_outputs(STUDY), layout.results(STUDY), layout.report(STUDY)]
    listed = subprocess.run(
        ["git", "ls-files", "--error-unmatch", *read], cwd=ROOT, capture_output=True, text=True
    )
    assert listed.returncode == 0, listed.stderr
