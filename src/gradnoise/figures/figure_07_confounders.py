"""Figure 7: exposure beside its rivals, and how much of the differences within seeds each predicts."""

from collections.abc import Mapping
from typing import Any

import pyarrow as pa
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from gradnoise.base.tables import FIGURE_CONFOUNDERS
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

SPEC = names.CONFOUNDERS
DATA = FIGURE_CONFOUNDERS
STATISTIC = "r2_within_seed"


def plot_data(tables: Mapping[str, pa.Table], results: Mapping[str, Any]) -> pa.Table:
    """One row a mark: runs at matched loss by predictor, and each predictor's statistic by matching."""
    predictors, score = _predictors(results), results["descriptive"]["score"]
    rows = [
        {"predictor": predictor, **row}
        for predictor in predictors
        for row in points(tables["matched"], "loss", score, predictor)
    ]
    rows += [
        {"mark": STATISTIC, **row, "x": row["value"]}
        for row in tables["explained"].to_pylist()
        if row["statistic"] == STATISTIC and row["predictor"] in predictors
    ]
    return to_table(rows, DATA.schema())


def _predictors(results: Mapping[str, Any]) -> list[str]:
    """The plan's predictor, then its rivals."""
    return [results["descriptive"]["predictor"], *results["descriptive"]["rivals"]]


def plot(data: pa.Table, results: Mapping[str, Any]) -> Figure:
    """A column a predictor: its scatter at matched loss above, its statistic at each matching below."""
    figure = Figure(figsize=(style.WIDTH, 4.5))
    predictors = _predictors(results)
    panels = len(predictors)
    grid = figure.subplots(2, panels + 1, width_ratios=(*[1] * panels, 0.62), height_ratios=(1, 0.5))
    shown = marks(data, mark="run")
    for column, predictor in enumerate(predictors):
        upper, lower = grid[0, column], grid[1, column]
        upper.set_title(PREDICTORS[predictor].title)
        upper.set_xlabel(PREDICTORS[predictor].axis)
        if not scatter(upper, shown, marks(data, mark="run", predictor=predictor)):
            style.note(upper, "no matched runs")
        upper.set_ylim(limits([row["y"] for row in shown]))
        _statistics(lower, marks(data, mark=STATISTIC, predictor=predictor))
        if column:
            upper.tick_params(labelleft=False)
            lower.tick_params(left=False, labelleft=False)
    grid[0, 0].set_ylabel(OUTCOMES[results["descriptive"]["score"]].axis)
    condition_legends(grid[0, panels], shown)
    grid[1, panels].set_axis_off()
    style.tag(figure, results)
    return figure


def _statistics(axes: Axes, rows: list[Row]) -> None:
    """Dots with intervals cut at 0 and 1, one line a matching; open dots have no interval."""
    axes.set_xlim(-0.03, 1.03)
    axes.set_ylim(len(MATCHINGS) - 0.5, -0.5)
    axes.set_xticks([0, 0.25, 0.5, 0.75, 1], ["0", "", ".5", "", "1"])
    axes.set_yticks(range(len(MATCHINGS)), [f"matched {matching}" for matching in MATCHINGS])
    axes.set_xlabel("$R^2$ within seeds")
    by_matching = {row["matching"]: row for row in rows}
    for height, matching in enumerate(MATCHINGS):
        row = by_matching.get(matching)
        if row is None:
            axes.text(0.5, height, "no estimate", ha="center", va="center", color=style.MUTED, style="italic")
            continue
        measured = row["low"] is not None and row["high"] is not None
        if measured:
            ends = [min(max(row[end], 0.0), 1.0) for end in ("low", "high")]
            axes.plot(ends, [height, height], color=style.MUTED, linewidth=2, solid_capstyle="butt")
        fill = style.INK if measured else "white"
        axes.plot(row["x"], height, "o", color=style.INK, markerfacecolor=fill, markersize=4, clip_on=False)


def caption(data: pa.Table, results: Mapping[str, Any]) -> str:
    """What is shown, the target loss and level of the plan, and the runs and seeds behind it."""
    described = results["descriptive"]
    exposure = PREDICTORS[described["predictor"]]
    rivals = ", ".join(PREDICTORS[rival].said for rival in described["rivals"])
    n, seeds = count(marks(data, mark="run", predictor=described["predictor"]))
    level = results["thresholds"].get("level")
    behind = f"n = {counted(n, 'run')}, {counted(seeds, 'seed')}" if n else "no run"
    return (
        f"{OUTCOMES[described['score']].said} against integrated exposure and its rivals. "
        f"Above: runs at matched loss ({matched_point(results, 'loss')}; {behind}). "
        f"Exposure is {exposure.said} over all updates up to the matched point, in units of {exposure.unit}. "
        f"Rivals, up to the same point: {rivals or 'none'}. All are on log₁₀ scales. "
        "Colour shows the learning rate, shape the batch size. "
        "Below: share of the variance within seeds that each predicts by itself, at matched loss, updates "
        f"({matched_point(results, 'updates')}) and tokens ({matched_point(results, 'tokens')}), "
        f"with {percent(level) + ' ' if level else ''}intervals (delete-one-seed jackknife, drawn within "
        "0 and 1). Open circles have none: a predictor that the matching holds constant explains 0. "
        "Descriptive: a predictor that explains more is not thereby the cause."
    )
