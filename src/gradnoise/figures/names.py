"""Which figures exist: name, title and source tables. Nothing heavy is imported, the Snakefile reads this."""

from dataclasses import dataclass


@dataclass(frozen=True)
class FigureSpec:
    """One figure: its name (of its files too), its title, and the analysis tables it is made from."""

    name: str
    title: str
    tables: tuple[str, ...]

    @property
    def number(self) -> int:
        """The figure's number in the study: `figure-07-confounders` is 7."""
        return int(self.name.split("-")[1])


EXPOSURE = FigureSpec(
    "figure-01-exposure", "Integrated exposure and in-context learning", ("matched", "curves")
)
CONFOUNDERS = FigureSpec(
    "figure-07-confounders", "Integrated exposure and its rivals", ("matched", "explained")
)
FLOW = FigureSpec("figure-12-flow", "Flow of runs", ("flow",))

SPECS = (EXPOSURE, CONFOUNDERS, FLOW)
FIGURE_NAMES = tuple(spec.name for spec in SPECS)
