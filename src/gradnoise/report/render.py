"""The report: one self-contained HTML page, rendered from the results and figures alone.

It holds no time, host or commit, so the same results give the same bytes.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast
from urllib.parse import quote

import pyarrow as pa
import pyarrow.parquet as pq
from jinja2 import Environment, PackageLoader, StrictUndefined

from gradnoise.base import layout, wording
from gradnoise.base.errors import InputError
from gradnoise.base.files import read_json, write_bytes
from gradnoise.base.vocabulary import MATCHINGS, STAGES
from gradnoise.figures.names import SPECS, FigureSpec

KINDS = {
    "slope": "slope within seeds, t test over seeds",
    "mixed": "mixed model, restricted maximum likelihood, Kenward-Roger",
    "contrast": "planned contrast, paired by seed",
    "anova": "analysis of variance, type III, blocked by seed",
    "trend": "isotonic trend, permutations within seeds",
    "tost": "two one-sided tests, paired by seed",
}
# Thresholds of the plan in this order and wording; one that is not listed follows under its own name.
THRESHOLDS = {
    "target_loss": "Target loss (nats)",
    "alpha": "Family-wise error rate α",
    "level": "Level of intervals",
    "reading_alpha": "α at which one test is read",
    "margin": "Margin of a difference (accuracy)",
    "trend_margin": "Margin of a step of the trend (accuracy)",
    "draws": "Permutations of the trend",
    "reliability": "Least reliability of the validation loss",
    "fewest_seeds": "Fewest seeds a test is carried out on",
    "missing": "Largest share of a test's runs that may be missing",
    "missing_difference": "Largest difference in that share between cells",
}


@dataclass(frozen=True)
class Picture:
    """A drawn figure: its number, title and caption, its file, and the SVG as a data URI."""

    number: int
    title: str
    caption: str
    path: str
    uri: str


@dataclass(frozen=True)
class Comparison:
    """One question put at each matching: what is estimated, and the tests by matching."""

    description: str
    kind: str
    tests: Mapping[str, Mapping[str, Any]]


@dataclass(frozen=True)
class CellTable:
    """Scores of one block at the end of training: a row a cell, a column a score."""

    block: str
    scores: tuple[tuple[str, str], ...]
    rows: tuple[tuple[str, Mapping[str, Mapping[str, Any]]], ...]

    @property
    def single(self) -> bool:
        """Whether no cell has more than one run, so that nothing is known of the differences between runs."""
        return all(cell["runs"] == 1 for _, scores in self.rows for cell in scores.values())


def render(study: str) -> None:
    """Write `results/<study>/report/report.html`.

    Raises `InputError` when a source is missing or corrupt, and when a rehearsal's page would use a word of
    the registered study.
    """
    write_bytes(layout.report(study), page(study).encode())


def page(study: str) -> str:
    """The page of a study as it must be; raises as `render` does."""
    results = cast("dict[str, Any]", read_json(layout.results(study)))
    html = fill(study, results, [picture(study, spec) for spec in SPECS])
    if results["label"] == "REHEARSAL":
        wording.check_rehearsal(_without_data(html), layout.report(study))
        for spec in SPECS:
            image = layout.figure(study, spec.name, "svg")
            wording.check_rehearsal(Path(image).read_text(encoding="utf-8"), image)
    return html


def picture(study: str, spec: FigureSpec) -> Picture:
    """A figure with the caption that its plot data carries; `InputError` when either file is not there."""
    path, data = (Path(layout.figure(study, spec.name, suffix)) for suffix in ("svg", "parquet"))
    try:
        notes = pq.read_schema(data).metadata or {}
        image = path.read_bytes()
    except FileNotFoundError as error:
        raise InputError(str(error.filename or data), "missing", "draw the figures again") from error
    except pa.ArrowInvalid as error:
        raise InputError(str(data), "is not a whole Parquet file", "draw the figures again") from error
    if notes.get(b"figure", b"").decode() != spec.name or b"caption" not in notes:
        raise InputError(str(data), "carries no caption of this figure", "draw the figures again")
    # Not base64: that is a tenth longer, and no version of it looks like the one before to Git.
    uri = "data:image/svg+xml," + quote(image, safe=" !$()*+,/:;=?@[]^`{|}~")
    return Picture(spec.number, spec.title, notes[b"caption"].decode(), path.as_posix(), uri)


def comparisons(tests: list[dict[str, Any]]) -> list[Comparison]:
    """Tests that ask the same of different matchings, gathered in the plan's order."""
    gathered: dict[tuple[str, str], dict[str, Any]] = {}
    for test in tests:
        description = re.sub(r",? at matched (loss|updates|tokens)", "", test["description"])
        gathered.setdefault((test["kind"], description), {})[test["matching"]] = test
    return [Comparison(description, kind, by) for (kind, description), by in gathered.items()]


def cell_tables(cells: list[dict[str, Any]]) -> list[CellTable]:
    """The cells of each block, in the order of the results."""
    tables = []
    for block in dict.fromkeys(cell["block"] for cell in cells):
        mine = [cell for cell in cells if cell["block"] == block]
        scores = tuple(dict.fromkeys((cell["score"], cell["unit"]) for cell in mine))
        rows: dict[str, dict[str, Any]] = {}
        for cell in mine:
            rows.setdefault(cell["cell"], {})[cell["score"]] = cell
        tables.append(CellTable(block, scores, tuple(rows.items())))
    return tables


def thresholds(given: Mapping[str, Any]) -> dict[str, Any]:
    """The plan's thresholds by the wording that the page shows."""
    names = [*(name for name in THRESHOLDS if name in given), *sorted(given.keys() - THRESHOLDS.keys())]
    return {THRESHOLDS.get(name, name.replace("_", " ").capitalize()): given[name] for name in names}


def fill(study: str, results: Mapping[str, Any], pictures: list[Picture], words: Any = wording) -> str:
    """The template filled in; every number reaches it through the functions of `words`."""
    environment = Environment(
        loader=PackageLoader("gradnoise.report", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    for name in ("number", "threshold", "percent", "p_value", "counted"):
        environment.filters[name] = getattr(words, name)
    environment.filters["zip"] = zip
    return environment.get_template("report.html.j2").render(
        study=study,
        results=results,
        rehearsal=results["label"] == "REHEARSAL",
        pictures=pictures,
        comparisons=comparisons(results["tests"]),
        cell_tables=cell_tables(results["cells"]),
        matchings=MATCHINGS,
        stages=STAGES,
        kinds=KINDS,
        thresholds=thresholds(results["thresholds"]),
        interval=words.interval,
        results_path=layout.results(study),
    )


def _without_data(html: str) -> str:
    """The page's own words; the pictures are read as files."""
    return re.sub(r'"data:[^"]*"', '""', html)
