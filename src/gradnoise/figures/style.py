"""One look for every figure: print-ready, colour-blind safe, and the same bytes on every machine."""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import matplotlib.style
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine

WIDTH = 7.4  # inches: two columns of a journal page

INK = "#1b1f24"
MUTED = "#5b6470"
LIGHT = "#c9ced6"
TAG = "#9a3412"

# Okabe and Ito (2008), safe for colour-blind readers; yellow is left out, it fades on white.
PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")

_STYLE: dict[str, Any] = {
    "figure.facecolor": "white",
    "figure.constrained_layout.use": True,
    "savefig.facecolor": "white",
    # Text stays text: it can be searched, read aloud and compared in Git. DejaVu Sans ships with matplotlib
    # and is the widest of the family list, so a fallback font never makes labels collide.
    "svg.fonttype": "none",
    "font.family": "DejaVu Sans",
    "font.size": 8,
    "axes.titlesize": 8.5,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.labelsize": 8,
    "axes.edgecolor": MUTED,
    "axes.labelcolor": INK,
    "axes.linewidth": 0.6,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#eceef1",
    "grid.linewidth": 0.6,
    "text.color": INK,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "xtick.labelsize": 7.5,
    "ytick.labelsize": 7.5,
    "xtick.major.width": 0.6,
    "ytick.major.width": 0.6,
    "legend.fontsize": 7.5,
    "legend.title_fontsize": 7.5,
    "legend.frameon": False,
    "lines.linewidth": 1.3,
}


@contextmanager
def applied(name: str) -> Iterator[None]:
    """Matplotlib's own defaults with this style on top, and `name` as the salt of the SVG's ids.

    Settings of the user's machine (a matplotlibrc) have no effect inside.
    """
    with matplotlib.style.context(["default", {**_STYLE, "svg.hashsalt": name}]):
        yield


def colours(values: Iterable[float]) -> dict[float, str]:
    """A colour for each distinct value, in ascending order; the palette starts again when it ends."""
    return {value: PALETTE[i % len(PALETTE)] for i, value in enumerate(sorted(set(values)))}


def markers(values: Iterable[float]) -> dict[float, str]:
    """A marker shape for each distinct value, in ascending order."""
    return {value: MARKERS[i % len(MARKERS)] for i, value in enumerate(sorted(set(values)))}


def note(axes: Axes, text: str) -> None:
    """Say in the middle of a panel why it has nothing to show, and hide its empty axes."""
    axes.text(0.5, 0.5, text, transform=axes.transAxes, ha="center", va="center", color=MUTED, style="italic")
    axes.tick_params(left=False, bottom=False, labelleft=False, labelbottom=False)
    axes.grid(visible=False)


def tag(figure: Figure, results: Mapping[str, Any]) -> None:
    """Write the label of a rehearsal in a strip of its own along the top; a registered study needs none."""
    if results["label"] != "REHEARSAL":
        return
    strip = 0.26 / figure.get_figheight()  # inches
    engine = figure.get_layout_engine()
    assert isinstance(engine, ConstrainedLayoutEngine)
    engine.set(rect=(0, 0, 1, 1 - strip))
    figure.text(
        0.993,
        1 - strip / 2,
        "REHEARSAL",
        ha="right",
        va="center",
        color=TAG,
        size=7,
        weight="bold",
        bbox={"boxstyle": "round,pad=0.3", "facecolor": "#fff7ed", "edgecolor": TAG, "linewidth": 0.6},
    )
