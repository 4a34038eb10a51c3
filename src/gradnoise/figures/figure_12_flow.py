"""Figure 12: how many runs of each cell reached each stage of the study."""

from collections.abc import Mapping
from typing import Any

import pyarrow as pa
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from gradnoise.base.tables import FIGURE_FLOW
from gradnoise.base.vocabulary import STAGES
from gradnoise.base.wording import number
from gradnoise.figures import names, style
from gradnoise.figures.matched import matched_point

SPEC = names.FLOW
DATA = FIGURE_FLOW
_BAR = 0.62


def plot_data(tables: Mapping[str, pa.Table], results: Mapping[str, Any]) -> pa.Table:
    """The analysis's own table: one row a block, cell and stage."""
    return tables["flow"].select(DATA.schema().names).cast(DATA.schema())


def plot(data: pa.Table, results: Mapping[str, Any]) -> Figure:
    """A column a stage, a row a cell: bars with their counts, and each stage's total above."""
    runs = {(row["block"], row["cell"], row["stage"]): row["runs"] for row in data.to_pylist()}
    cells = list(dict.fromkeys((block, cell) for block, cell, _ in runs))
    figure = Figure(figsize=(style.WIDTH, 1.1 + 0.235 * max(len(cells), 3)))
    panels = figure.subplots(1, len(STAGES))
    widest = max(runs.values(), default=0) or 1
    heights = _heights(cells)
    for panel, stage in zip(panels, STAGES, strict=True):
        counts = [runs.get((*cell, stage)) for cell in cells]
        _column(panel, stage, dict(zip(heights, counts, strict=True)), widest)
    panels[0].set_yticks(heights, [cell for _, cell in cells])
    panels[0].tick_params(axis="y", labelleft=True, pad=2)
    for block in dict.fromkeys(block for block, _ in cells):
        first = min(h for h, (of, _) in zip(heights, cells, strict=True) if of == block)
        panels[0].annotate(
            f"block {block}",
            (0, first - 0.82),
            xycoords=("axes fraction", "data"),
            xytext=(-5.5, 0),
            textcoords="offset points",
            ha="right",
            va="center",
            weight="bold",
            annotation_clip=False,
        )
    if not cells:
        style.note(panels[0], "no runs")
    style.tag(figure, results)
    return figure


def _heights(cells: list[tuple[str, str]]) -> list[float]:
    """A line a cell, downwards, with one line left free above each block for its name."""
    heights: list[float] = []
    line = 0.0
    for index, (block, _) in enumerate(cells):
        line += 2.0 if index and cells[index - 1][0] != block else 1.0
        heights.append(line)
    return heights


def _column(panel: Axes, stage: str, counts: Mapping[float, int | None], widest: int) -> None:
    known = {height: count for height, count in counts.items() if count is not None}
    colour = style.PALETTE[1] if stage == "excluded" else style.PALETTE[0]
    # The pale bar behind is the full width of the planned column, so what is missing is seen.
    panel.barh(list(known), widest, _BAR, color="#f1f3f5")
    panel.barh(list(known), list(known.values()), _BAR, color=colour, alpha=0.8)
    for height, count in counts.items():
        text = "–" if count is None else number(count)
        panel.text(widest * 1.06, height, text, va="center", ha="left", size=7.5)
    total = sum(known.values())
    panel.set_title(f"{stage}\n", weight="normal", color=style.MUTED, size=8)
    panel.text(0, 1.02, number(total), transform=panel.transAxes, weight="bold", size=10)
    panel.set_xlim(0, widest * 1.3)
    panel.set_ylim(max(counts, default=1) + 0.5, -0.1)
    panel.spines[:].set_visible(False)
    panel.grid(visible=False)
    panel.tick_params(left=False, bottom=False, labelleft=False, labelbottom=False)


def caption(data: pa.Table, results: Mapping[str, Any]) -> str:
    """What each stage means, with the plan's target loss, and the totals over all cells."""
    totals = dict.fromkeys(STAGES, 0)
    for row in data.to_pylist():
        totals[row["stage"]] += row["runs"]
    listed = ", ".join(f"{number(total)} {stage}" for stage, total in totals.items())
    return (
        "Runs of each cell at each stage: planned, started, finished without diverging, matched (reached the "
        f"target loss of {matched_point(results, 'loss')}), excluded (matched, but left out by a rule of the "
        "plan), and analysed. A dash: the plan does not match the block, so its runs are not analysed. "
        f"In all {listed}. A cell is named by its batch size and learning rate, or is a noise arm under its "
        "own name; a full bar is the largest number of runs planned in a cell."
    )
