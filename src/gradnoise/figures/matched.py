"""What figures 1 and 7 share: the matched scores as one row a run, and how they are drawn."""

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import pyarrow as pa
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.legend import Legend
from matplotlib.lines import Line2D
from matplotlib.transforms import ScaledTranslation

from gradnoise.base.wording import threshold
from gradnoise.figures import style


class Predictor(NamedTuple):
    """How a predictor is called: title of its panel, label of its axis, in a caption; and its unit."""

    title: str
    axis: str
    said: str
    unit: str


class Outcome(NamedTuple):
    """How a score is called: label of its axis, and in a caption."""

    axis: str
    said: str


# Every predictor that a plan can describe; each is log10 of a quantity at the matched point.
PREDICTORS = {
    "log10_pne2": Predictor(
        "Exposure (pne2)",
        r"$\log_{10}\,\sum\,\eta^2\,\mathrm{Tr}(P\,C/B\,P)$",
        "Σ η² Tr(P C/B P)",
        "squared parameters",
    ),
    "log10_pne": Predictor(
        "Exposure (pne)",
        r"$\log_{10}\,\sum\,\eta\,\mathrm{Tr}(P\,C/B\,P)$",
        "Σ η Tr(P C/B P)",
        "learning rate × squared preconditioned gradient",
    ),
    "log10_ne": Predictor(
        "Exposure (ne)",
        r"$\log_{10}\,\sum\,\eta^2\,\mathrm{Tr}(C/B)$",
        "Σ η² Tr(C/B)",
        "squared learning rate × squared gradient",
    ),
    "log10_retained": Predictor(
        "Exposure (retained)",
        r"$\log_{10}$ retained $\sum\,\eta^2\,\mathrm{Tr}(P\,C/B\,P)$",
        "Σ η² Tr(P C/B P), less what weight decay has taken of it,",
        "squared parameters",
    ),
    "log10_updates": Predictor("Updates", r"$\log_{10}$ updates", "the number of updates", "updates"),
    "log10_sequences": Predictor(
        "Sequences", r"$\log_{10}$ sequences", "the number of sequences", "sequences"
    ),
    "log10_sum_lr": Predictor(
        "Learning-rate sum", r"$\log_{10}\,\sum\,\eta$", "the sum of learning rates", "learning rate"
    ),
}
# Every score that a plan can describe.
OUTCOMES = {
    "icl": Outcome("Novel-class ICL accuracy", "Novel-class in-context learning accuracy"),
    "iwl": Outcome("IWL accuracy", "In-weights learning accuracy"),
    "swap_context": Outcome("Swap to context", "Share of answers that follow swapped labels"),
    "swap_weights": Outcome(
        "Swap to weights", "Share of answers that keep to the weights when labels are swapped"
    ),
    "validation_loss": Outcome("Validation loss (nats)", "Validation loss"),
    "bits_per_character": Outcome("Bits per character", "Validation loss in bits per character"),
}

Row = dict[str, Any]
_DOT: Row = {
    "linestyle": "",
    "markersize": 5,
    "markeredgecolor": "white",
    "markeredgewidth": 0.5,
    "alpha": 0.9,
}


def points(matched: pa.Table, matching: str, score: str, predictor: str) -> list[Row]:
    """Marks of the plot data: every run that has both at this matched point, with its condition."""
    found: dict[str, Row] = {}
    for row in matched.to_pylist():
        if row["matching"] == matching:
            run = found.setdefault(row["run_id"], {**row})
            run[row["quantity"]] = row["value"]
    identity = ("run_id", "cell", "seed_index", "batch", "learning_rate")
    return [
        {"mark": "run", "matching": matching, **{key: run[key] for key in identity}, "x": x, "y": run[score]}
        for run in found.values()
        if score in run and (x := _value(run, predictor)) is not None
    ]


def _value(run: Row, predictor: str) -> float | None:
    """Exposures are matched as logarithms, amounts as they are."""
    if predictor in run:
        return float(run[predictor])
    amount = run.get(predictor.removeprefix("log10_"))
    return math.log10(amount) if amount else None


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
    # A condition at a time: a call for each run would write its markup again for each.
    for rate, batch in dict.fromkeys((row["learning_rate"], row["batch"]) for row in points):
        mine = [row for row in points if (row["learning_rate"], row["batch"]) == (rate, batch)]
        x, y = ([row[axis] for row in mine] for axis in "xy")
        axes.plot(x, y, shapes[batch], color=colours[rate], **_DOT)
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
