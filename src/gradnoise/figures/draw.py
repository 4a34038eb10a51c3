"""Draw every figure of a study from the tables of its analysis."""

import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import pyarrow as pa

from gradnoise.base import layout, tables
from gradnoise.base.files import read_json, sha256, sha256_of, write_bytes
from gradnoise.base.tables import Table, read_table, write_table
from gradnoise.base.wording import check_rehearsal
from gradnoise.figures import figure_01_exposure, figure_07_confounders, figure_12_flow, style
from gradnoise.figures.names import FigureSpec

_SOURCES = {table.name: table for table in (tables.MATCHED, tables.FLOW, tables.CURVES, tables.EXPLAINED)}


class FigureModule(Protocol):
    """What a module of a figure offers."""

    SPEC: FigureSpec
    DATA: Table

    def plot_data(self, tables: Mapping[str, pa.Table], results: Mapping[str, Any]) -> pa.Table:
        """What will be drawn, from the source tables."""

    def plot(self, data: pa.Table, results: Mapping[str, Any]) -> Any:
        """The matplotlib figure; every position in it comes from `data`."""

    def caption(self, data: pa.Table, results: Mapping[str, Any]) -> str:
        """Plain text; thresholds come from the plan, n from the data."""


FIGURES: tuple[FigureModule, ...] = (figure_01_exposure, figure_07_confounders, figure_12_flow)


def draw(study: str, into: Path | str = ".") -> None:
    """Write each figure of `study` as SVG, with its plot data beside it, under the folder `into`.

    The plot data carries notes: `figure`, `title`, `caption` and `source_sha256`. Raises `InputError` when a
    source is missing or corrupt, and when a rehearsal would use a word of the registered study.
    """
    results = read_json(layout.results(study))
    assert isinstance(results, dict)
    for module in FIGURES:
        spec = module.SPEC
        source = source_sha256(study, spec)
        given = {name: read_table(layout.analysis(study, name), _SOURCES[name]) for name in spec.tables}
        data = module.plot_data(given, results)
        caption = module.caption(data, results)
        image = svg(module, data, results, identifier=f"{study}/{spec.name}", source=source)
        if results["label"] == "REHEARSAL":
            check_rehearsal(caption, f"caption of {spec.name}")
            check_rehearsal(image.decode(), layout.figure(study, spec.name, "svg"))
        notes = {"figure": spec.name, "title": spec.title, "caption": caption, "source_sha256": source}
        path = Path(into, layout.figure(study, spec.name, "svg"))
        write_table(path.with_suffix(".parquet"), module.DATA, data, results["label"], notes)
        write_bytes(path, image)


def source_sha256(study: str, spec: FigureSpec) -> str:
    """One hash for a figure's sources: SHA-256 of the canonical JSON {table name: SHA-256 of its file}."""
    return sha256_of({name: sha256(layout.analysis(study, name)) for name in spec.tables})


def svg(
    module: FigureModule, data: pa.Table, results: Mapping[str, Any], *, identifier: str, source: str
) -> bytes:
    """The figure as SVG bytes: the same for the same data, whatever the time, host or user settings."""
    metadata = {
        "Title": module.SPEC.title,
        "Description": module.caption(data, results),
        "Identifier": identifier,
        "Source": f"sha256:{source}",
        "Creator": "gradnoise",
        "Date": None,
    }
    buffer = io.BytesIO()
    with style.applied(module.SPEC.name):
        module.plot(data, results).savefig(buffer, format="svg", metadata=metadata)
    return buffer.getvalue()
