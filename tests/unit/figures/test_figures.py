"""Figures: true to their tables, the same bytes everywhere, honest about what is missing."""

import re
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from contextlib import chdir
from pathlib import Path
from types import ModuleType
from typing import Any, get_args

import matplotlib
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tests.unit.figures.synthetic_results import write_study

from gradnoise.analysis.matching import AMOUNTS
from gradnoise.base import layout, tables
from gradnoise.base.errors import InputError
from gradnoise.base.files import read_json, sha256, sha256_of
from gradnoise.base.tables import read_table
from gradnoise.evaluation.names import NAMES
from gradnoise.figures import draw as drawing
from gradnoise.figures import figure_01_exposure, figure_07_confounders, figure_12_flow
from gradnoise.figures.matched import OUTCOMES, PREDICTORS
from gradnoise.figures.names import FIGURE_NAMES, SPECS
from gradnoise.registration.plan import Definition

SOURCES = {table.name: table for table in (tables.MATCHED, tables.CURVES, tables.EXPLAINED, tables.FLOW)}


def data_of(module: Any) -> pa.Table:
    return read_table(layout.figure("quick", module.SPEC.name, "parquet"), module.DATA)


def redraw(module: Any, data: pa.Table, results: dict[str, Any]) -> str:
    return drawing.svg(module, data, results, identifier="quick/x", source="0").decode()


def made(module: ModuleType, folder: Path, **study: Any) -> tuple[pa.Table, dict[str, Any]]:
    """Plot data and results of one figure for a study with these runs."""
    with chdir(folder):
        results = write_study(**study)
        given = {
            name: read_table(layout.analysis("quick", name), SOURCES[name]) for name in module.SPEC.tables
        }
    return module.plot_data(given, results), results


def words(svg: str) -> str:
    """What a reader of the picture sees written in it."""
    texts = parsed(svg).iter("{http://www.w3.org/2000/svg}text")
    return " ".join("".join(text.itertext()) for text in texts)


def parsed(svg: str) -> ElementTree.Element:
    return ElementTree.fromstring(svg)  # noqa: S314  (our own file)


def dots(svg: str, colours: tuple[str, ...] = ("#0072b2", "#d55e00")) -> int:
    """Markers of runs in a picture, those of the legend included."""
    return sum(len(re.findall(rf"<use [^>]*fill: {colour}", svg)) for colour in colours)


def test_names_cost_the_snakefile_no_heavy_import() -> None:
    code = "import sys, gradnoise.figures.names as n; print(*n.FIGURE_NAMES, *sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert loaded.split()[: len(FIGURE_NAMES)] == list(FIGURE_NAMES)
    assert not {"matplotlib", "pandas", "pyarrow", "torch"} & set(loaded.split())


def test_every_named_figure_is_drawn_once_with_its_data(drawn: Path) -> None:
    assert tuple(module.SPEC for module in drawing.FIGURES) == SPECS
    written = {path.name for path in (drawn / "results/quick/figures").iterdir()}
    assert written == {f"{name}.{suffix}" for name in FIGURE_NAMES for suffix in ("svg", "parquet")}


def test_same_bytes_whatever_the_users_matplotlib_settings(
    drawn: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "86400")
    monkeypatch.chdir(tmp_path)
    write_study()
    with matplotlib.rc_context(
        {"font.size": 22, "svg.hashsalt": "mine", "axes.grid": False, "lines.marker": "x"}
    ):
        drawing.draw("quick")
    for name in FIGURE_NAMES:
        for suffix in ("svg", "parquet"):
            path = layout.figure("quick", name, suffix)
            assert Path(path).read_bytes() == (drawn / path).read_bytes(), path


@pytest.mark.parametrize("module", drawing.FIGURES, ids=FIGURE_NAMES)
def test_the_picture_follows_from_its_plot_data_alone(drawn: Path, module: Any) -> None:
    results: Any = read_json(layout.results("quick"))
    source = drawing.source_sha256("quick", module.SPEC)
    again = drawing.svg(
        module, data_of(module), results, identifier=f"quick/{module.SPEC.name}", source=source
    )
    assert again == Path(layout.figure("quick", module.SPEC.name, "svg")).read_bytes()


@pytest.mark.parametrize("spec", SPECS, ids=FIGURE_NAMES)
def test_files_say_what_they_show_and_where_it_came_from(drawn: Path, spec: Any) -> None:
    notes = {
        key.decode(): value.decode()
        for key, value in pq.read_schema(layout.figure("quick", spec.name, "parquet")).metadata.items()
    }
    hashes = {name: sha256(layout.analysis("quick", name)) for name in spec.tables}
    assert notes["figure"] == spec.name
    assert notes["label"] == "REHEARSAL"
    assert notes["source_sha256"] == sha256_of(hashes)
    svg = Path(layout.figure("quick", spec.name, "svg")).read_text()
    said = {node.tag.split("}")[1]: (node.text or "") for node in parsed(svg).iter()}
    assert said["description"] == notes["caption"]
    assert said["identifier"] == f"quick/{spec.name}"
    assert said["source"] == f"sha256:{notes['source_sha256']}"
    assert "date" not in said


def test_every_matched_run_is_a_point_with_its_own_values(drawn: Path) -> None:
    matched = read_table(layout.analysis("quick", "matched"), tables.MATCHED).to_pylist()
    expected = {(row["run_id"], row["matching"], row["value"]) for row in matched if row["quantity"] == "icl"}
    points = [row for row in data_of(figure_01_exposure).to_pylist() if row["mark"] == "run"]
    assert {(row["run_id"], row["matching"], row["y"]) for row in points} == expected
    assert len(points) == len(expected) == 90
    svg = Path(layout.figure("quick", "figure-01-exposure", "svg")).read_text()
    assert dots(svg) == 90 + 2  # and one for each learning rate in the legend


def test_confounders_are_on_the_scale_of_their_statistic(drawn: Path) -> None:
    rows = data_of(figure_07_confounders).to_pylist()
    run = next(r for r in rows if r["predictor"] == "log10_updates" and r["run_id"] == "b016-lr0.002-0")
    matched = read_table(layout.analysis("quick", "matched"), tables.MATCHED).to_pylist()
    updates = next(
        row["value"]
        for row in matched
        if (row["run_id"], row["matching"], row["quantity"]) == ("b016-lr0.002-0", "loss", "updates")
    )
    assert 10 ** run["x"] == pytest.approx(updates)
    assert sum(row["mark"] == "r2_within_seed" for row in rows) == 9
    # Of the nine statistics, the one without interval is the one open circle.
    svg = Path(layout.figure("quick", "figure-07-confounders", "svg")).read_text()
    assert len(re.findall(r"<use [^>]*fill: #ffffff; stroke: #1b1f24", svg)) == 1


def test_flow_prints_every_count_and_the_totals(tmp_path: Path) -> None:
    data, results = made(figure_12_flow, tmp_path, seeds=4)
    written = words(redraw(figure_12_flow, data, results)).split()
    assert written.count("4") == 6 * 2 + 1  # matched and analysed, and the one cell where 4 finished
    assert {"32", "31", "24"} <= set(written)
    assert written.count("–") == 2 * 3  # the runs of block text are neither matched, excluded nor analysed
    caption = figure_12_flow.caption(data, results)
    assert "32 planned, 32 started, 31 finished, 24 matched, 0 excluded, 24 analysed" in caption


def test_captions_take_thresholds_from_the_plan_and_n_from_the_data(tmp_path: Path) -> None:
    for module in (figure_01_exposure, figure_07_confounders, figure_12_flow):
        data, results = made(module, tmp_path, seeds=4)
        results["matched_points"]["loss"]["value"] = 0.0725
        results["thresholds"]["level"] = 0.9
        caption = module.caption(data, results)
        assert "0.0725 nats" in caption
        if module is not figure_12_flow:
            assert "n = 24 runs, 4 seeds" in caption
            assert "90%" in caption


def test_outcome_and_predictors_are_those_of_the_plan(tmp_path: Path) -> None:
    """Another score, another exposure and one rival: no other run is drawn and no other name is said."""
    for module, marks in ((figure_01_exposure, 90), (figure_07_confounders, 2 * 30)):
        _, results = made(module, tmp_path)
        results["descriptive"] = {"score": "iwl", "predictor": "log10_ne", "rivals": ["log10_sum_lr"]}
        with chdir(tmp_path):
            given = {
                name: read_table(layout.analysis("quick", name), SOURCES[name]) for name in module.SPEC.tables
            }
        new = {"icl": "iwl", "log10_pne2": "log10_ne"}
        quantities = [new.get(name, name) for name in given["matched"]["quantity"].to_pylist()]
        place = given["matched"].schema.get_field_index("quantity")
        given["matched"] = given["matched"].set_column(place, "quantity", pa.array(quantities))
        data = module.plot_data(given, results)
        assert sum(row["mark"] == "run" for row in data.to_pylist()) == marks
        said = words(redraw(module, data, results)) + module.caption(data, results)
        assert "IWL accuracy" in said
        assert "In-weights learning accuracy" in said
        assert "Σ η² Tr(C/B) over all updates" in said
        assert "ICL" not in said
        assert "Updates" not in said


def test_every_score_and_predictor_of_a_plan_can_be_drawn() -> None:
    assert OUTCOMES.keys() == {name for names in NAMES.values() for name in names}
    exposures = {f"log10_{definition}" for definition in get_args(Definition)}
    assert PREDICTORS.keys() == exposures | {f"log10_{amount}" for amount in AMOUNTS}


def test_a_study_without_matched_runs_says_so(tmp_path: Path) -> None:
    for module, panels in ((figure_01_exposure, 3), (figure_07_confounders, 3)):
        data, results = made(module, tmp_path, seeds=0)
        svg = redraw(module, data, results)
        assert words(svg).count("no matched runs") == panels
        assert dots(svg) == 0
        assert "no run" in module.caption(data, results)


def test_one_empty_panel_and_no_fit(tmp_path: Path) -> None:
    data, results = made(figure_01_exposure, tmp_path, matchings=("loss", "tokens"), curves=False)
    del results["matched_points"]["updates"]
    written = words(redraw(figure_01_exposure, data, results))
    assert written.count("no matched runs") == 1
    assert "no common point" in written
    # Neither legend nor caption names a fit that is not drawn.
    assert "mixed model" not in written + figure_01_exposure.caption(data, results)


def test_label_of_a_rehearsal(drawn: Path, tmp_path: Path) -> None:
    for name in FIGURE_NAMES:
        assert words(Path(layout.figure("quick", name, "svg")).read_text()).count("REHEARSAL") == 1
    data, results = made(figure_12_flow, tmp_path, label="REGISTERED")
    assert "REHEARSAL" not in redraw(figure_12_flow, data, results)


def test_a_rehearsal_cannot_be_drawn_with_a_verdict(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_study()
    said = "The rise of ICL is significant."
    monkeypatch.setattr(figure_01_exposure, "caption", lambda data, results: said)
    with pytest.raises(InputError, match="figure-01-exposure: 'significant'"):
        drawing.draw("quick")
    assert not Path("results/quick/figures").exists()


def test_a_corrupt_source_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_study()
    path = Path(layout.analysis("quick", "matched"))
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(InputError, match=r"matched\.parquet: is not a whole Parquet file"):
        drawing.draw("quick")
