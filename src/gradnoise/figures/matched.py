"""What figures 1 and 7 share: the matched scores as one row a run, and how they are drawn."""

from collections.abc import Mapping
from typing import Any

import pyarrow as pa
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.legend import Legend
from matplotlib.lines import Line2D
from matplotlib.transforms import ScaledTranslation

from gradnoise.base.wording import threshold
from gradnoise.figures import style

MATCHINGS = ("loss", "updates", "tokens")
OUTCOME = "icl"
OUTCOME_LABEL = "Novel-class ICL accuracy"
EXPOSURE = "log10_pne2"
EXPOSURE_LABEL = r"$\log_{10}\,\sum\,\eta^2\,\mathrm{Tr}(P\,C/B\,P)$"
EXPOSURE_MEANING = "Σ η² Tr(P C/B P) over all updates up to the matched point, in squared parameter units"

Row = dict[str, Any]
_DOT: Row = {
    "linestyle": "",
    "markersize": 5,
    "markeredgecolor": "white",
    "markeredgewidth": 0.5,
    "alpha": 0.9,
}


def runs(matched: pa.Table, matching: str) -> list[Row]:
    """Runs that have the outcome at this matched point: identity, condition and one key a quantity."""
    found: dict[str, Row] = {}
    for row in matched.to_pylist():
        if row["matching"] == matching:
            run = found.setdefault(row["run_id"], {**row})
            run[row["quantity"]] = row["value"]
    return [run for run in found.values() if OUTCOME in run]


def point(run: Row, matching: str, x: float) -> Row:
    """A run as a mark of the plot data, at `x` and its outcome."""
    identity = {key: run[key] for key in ("run_id", "cell", "seed_index", "batch", "learning_rate")}
    return {"mark": "run", "matching": matching, **identity, "x": x, "y": run[OUTCOME]}


def to_table(rows: list[Row], schema: pa.Schema) -> pa.Table:
    """Rows as a table of that schema; a key that a row lacks is null."""
    return pa.table({name: [row.get(name) for row in rows] for name in schema.names}, schema=schema)


def marks(data: pa.Table, **wanted: str) -> list[Row]:
    """Rows of the plot data with these values."""
    return [row for row in data.to_pylist() if all(row[key] == value for key, value in wanted.items())]


def matched_point(results: Mapping[str, Any], matching: str) -> str:
    """The registered or common point of a matching with its unit: `0.05 nats`."""
    at = results["matched_points"].get(matching)
    return f"{threshold(at['value'])} {at['unit']}" if at else "no common point"


def count(rows: list[Row]) -> tuple[int, int]:
    """Runs and distinct seeds behind a list of run marks."""
    return len(rows), len({row["seed_index"] for row in rows})


def scatter(axes: Axes, all_points: list[Row], points: list[Row]) -> bool:
    """Draw runs by learning rate (colour) and batch (shape); false if there are none.

    Colours and shapes follow `all_points`, so the panels of one figure agree.
    """
    colours, shapes = _keys(all_points)
    for row in points:
        colour = colours[row["learning_rate"]]
        axes.plot(row["x"], row["y"], shapes[row["batch"]], color=colour, **_DOT)
    return bool(points)


def limits(values: list[float]) -> tuple[float, float]:
    """Both ends of an axis that shows these values with a margin; 0 to 1 when there are none."""
    if not values:
        return 0.0, 1.0
    margin = 0.06 * (max(values) - min(values)) or 0.05
    return min(values) - margin, max(values) + margin


def condition_legends(axes: Axes, points: list[Row], fits: list[Artist] | None = None) -> None:
    """Fill an empty panel with the keys: learning rates, batch sizes and, where given, fits."""
    colours, shapes = _keys(points)
    rates = [Line2D([], [], color=c, marker="o", label=f"{rate:g}", **_DOT) for rate, c in colours.items()]
    batches = [
        Line2D([], [], color=style.MUTED, marker=shape, label=f"{batch:g}", **_DOT)
        for batch, shape in shapes.items()
    ]
    axes.set_axis_off()
    figure = axes.figure
    line, gap = 11.5, 7.0  # points
    down = 0.0
    for title, handles in (("Learning rate", rates), ("Batch size", batches), ("Fit", fits or [])):
        if handles:
            below_top = ScaledTranslation(0, -down / 72, figure.dpi_scale_trans)
            legend = Legend(
                axes,
                handles,
                [str(handle.get_label()) for handle in handles],
                title=title,
                loc="upper left",
                bbox_to_anchor=(0, 1),
                bbox_transform=axes.transAxes + below_top,
                alignment="left",
                borderaxespad=0,
                borderpad=0,
                handlelength=1.6,
                handletextpad=0.6,
                labelspacing=0.35,
            )
            axes.add_artist(legend)
            down += line * (len(handles) + 1) + gap


def _keys(points: list[Row]) -> tuple[dict[float, str], dict[float, str]]:
    colours = style.colours(row["learning_rate"] for row in points)
    return colours, style.markers(row["batch"] for row in points)
