"""The published study as this repository holds it."""

from pathlib import Path
from typing import Any

import pytest
from tests.workflow.project import ROOT

from gradnoise import phases
from gradnoise.base import strict_yaml
from gradnoise.base.study import load_study

LIMIT = 4_000_000
STUDY = strict_yaml.load(ROOT / "config/config.yaml")["study"]


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


def test_what_git_keeps_of_the_results_is_all_that_dvc_does_not() -> None:
    """Figures, results.json and the report can be read on the web; the rest is in DVC's store."""
    outs = _outs()
    for path in phases.outputs(str(STUDY), load_study(str(STUDY))):
        in_dvc = any(path == out or path.startswith(f"{out}/") for out in outs)
        assert in_dvc, path
        if Path(path).suffix in (".svg", ".html", ".json"):
            assert (ROOT / path).is_file(), f"{path} must be in Git"
