"""Nothing of a rehearsal can be taken for the registered study, whichever file of it is looked at."""

import json
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from tests.workflow.project import NAME, Project

from gradnoise import phases
from gradnoise.base import layout
from gradnoise.base.study import Study
from gradnoise.base.wording import check_rehearsal

pytestmark = pytest.mark.slow


def outputs(project: Project) -> list[Path]:
    """Every file of the study that a rule writes."""
    study = Study.model_validate(json.loads((project.path / f"config/{NAME}.yaml").read_text()))
    return [project.path / path for path in (*phases.outputs(NAME, study), layout.manifest(NAME))]


def said(path: Path) -> str:
    """The text of a file; of a table the schema and all metadata, because its rows are data."""
    if path.suffix != ".parquet":
        return path.read_text(encoding="utf-8")
    return pq.read_schema(path).to_string(truncate_metadata=False)


def test_every_file_is_labelled_and_none_sounds_like_a_verdict(tiny: Project) -> None:
    files = outputs(tiny)
    assert {path.suffix for path in files} == {".parquet", ".svg", ".html", ".json"}
    for path in files:
        text = said(path)
        if path.suffix == ".parquet":
            assert pq.read_schema(path).metadata[b"label"] == b"REHEARSAL", path
        elif path.suffix == ".json":
            assert json.loads(text)["label"] == "REHEARSAL", path
        else:
            assert "REHEARSAL" in text, path
        check_rehearsal(text, str(path))


def test_snakemakes_own_report_is_labelled(tiny: Project, tmp_path: Path) -> None:
    page = tmp_path / "report.html"
    tiny.copy(tmp_path / "copy").snakemake("--report", str(page))
    # Its description and the caption of every figure.
    assert page.read_text().count("REHEARSAL</strong>, not the registered study") >= 4
