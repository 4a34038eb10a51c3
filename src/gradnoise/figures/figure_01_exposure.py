"""Figure 1: integrated exposure against in-context learning, at each of the three matchings."""

from collections.abc import Mapping
from typing import Any

import pyarrow as pa
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from gradnoise.base.tables import FIGURE_EXPOSURE
from gradnoise.base.vocabulary import MATCHINGS
from gradnoise.base.wording import counted, percent
from gradnoise.figures import names, style
from gradnoise.figures.matched import (
    OUTCOMES,
    PREDICTORS,
    Row,
    condition_legends,
    count,
    limits,
    marks,
    matched_point,
    points,
    scatter,
    to_table,
)

SPEC = names.EXPOSURE
DATA = FIGURE_EXPOSURE
_LINE: dict[str, Any] = {"color": style.INK, "linewidth": 1.3}
_STEP: dict[str, Any] = {"color": style.MUTED, "linewidth": 1.1, "linestyle": (0, (3, 1.5))}


def plot_data(tables: Mapping[str, pa.Table], results: Mapping[str, Any]) -> pa.Table:
    """One row a mark: every matched run, and the grid points of the fitted curves."""
    described = results["descriptive"]
    rows = [
        row
        for matching in MATCHINGS
        for row in points(tables["matched"], matching, described["score"], described["predictor"])
    ]
    rows += [{"mark": curve["curve"], **curve} for curve in tables["curves"].to_pylist()]
    return to_table(rows, DATA.schema())


def plot(data: pa.Table, results: Mapping[str, Any]) -> Figure:
    """Three panels (loss, updates, tokens) and a column of legends."""
    figure = Figure(figsize=(style.WIDTH, 3.1))
    *panels, legend = figure.subplots(1, 4, width_ratios=(1, 1, 1, 0.62))
    for panel, matching in zip(panels, MATCHINGS, strict=True):
        panel.set_title(f"Matched {matching}\n")
        panel.text(0, 1.03, matched_point(results, matching), transform=panel.transAxes, color=style.MUTED)
        _fits(panel, data, matching)
        if not scatter(panel, marks(data, mark="run"), marks(data, mark="run", matching=matching)):
            style.note(panel, "no matched runs")
    # One scale for all three, so that slopes can be compared.
    rows = data.to_pylist()
    for panel in panels:
        panel.set_xlim(limits([row["x"] for row in rows]))
        panel.set_ylim(
            limits([row[end] for row in rows for end in ("y", "low", "high") if row[end] is not None])
        )
    for panel in panels[1:]:
        panel.tick_params(labelleft=False)
    described = results["descriptive"]
    exposure = PREDICTORS[described["predictor"]]
    panels[0].set_ylabel(OUTCOMES[described["score"]].axis)
    figure.supxlabel(f"Integrated exposure, {exposure.axis}  ({exposure.unit})", size=8)
    condition_legends(legend, marks(data, mark="run"), _fit_handles(data))
    style.tag(figure, results)
    return figure


def _fits(panel: Axes, data: pa.Table, matching: str) -> None:
    line = marks(data, mark="mixed_model", matching=matching)
    band = _band(line)
    panel.fill_between(
        [row["x"] for row in band],
        [row["low"] for row in band],
        [row["high"] for row in band],
        color=style.LIGHT,
        alpha=0.5,
        linewidth=0,
    )
    panel.plot([row["x"] for row in line], [row["y"] for row in line], **_LINE)
    steps = marks(data, mark="isotonic", matching=matching)
    panel.step([row["x"] for row in steps], [row["y"] for row in steps], where="post", **_STEP)


def _band(line: list[Row]) -> list[Row]:
    return [row for row in line if row["low"] is not None and row["high"] is not None]


def _fit_handles(data: pa.Table) -> list[Artist]:
    line = marks(data, mark="mixed_model")
    handles: list[Artist] = []
    if line:
        handles.append(Line2D([], [], label="mixed model", **_LINE))
    if _band(line):
        handles.append(Patch(color=style.LIGHT, alpha=0.5, label="pointwise band"))
    if marks(data, mark="isotonic"):
        handles.append(Line2D([], [], label="isotonic", **_STEP))
    return handles


def caption(data: pa.Table, results: Mapping[str, Any]) -> str:
    """What is shown, the plan's thresholds, and how many runs and seeds are behind each panel."""
    panels = []
    for matching in MATCHINGS:
        n, seeds = count(marks(data, mark="run", matching=matching))
        behind = f"n = {counted(n, 'run')}, {counted(seeds, 'seed')}" if n else "no run"
        panels.append(f"{matching} ({matched_point(results, matching)}; {behind})")
    described = results["descriptive"]
    exposure = PREDICTORS[described["predictor"]]
    return (
        f"{OUTCOMES[described['score']].said} against the gradient noise that training was exposed to, "
        f"at matched {panels[0]}, matched {panels[1]} and matched {panels[2]}. "
        f"Exposure is {exposure.said} over all updates up to the matched point, in units of "
        f"{exposure.unit}, on a log₁₀ scale. "
        "Each point is one run: colour shows its learning rate, shape its batch size. "
        f"{_fits_said(data, results)}"
    ).rstrip()


def _fits_said(data: pa.Table, results: Mapping[str, Any]) -> str:
    said = ""
    line = marks(data, mark="mixed_model")
    if line:
        said += "Solid line: mixed model with seed as the random factor"
        level = results["thresholds"].get("level")
        said += f", with a pointwise {percent(level)} band (Kenward-Roger). " if _band(line) else ". "
    if marks(data, mark="isotonic"):
        said += "Dashed step: isotonic fit, descriptive."
    return said
