"""Analysis: models and tests for few seeds, and the analysis that a plan lays down."""

from gradnoise.analysis.equivalence import Tost, tost
from gradnoise.analysis.families import holm
from gradnoise.analysis.isotonic import Trend, trend
from gradnoise.analysis.mixed import FitError, MixedFit, fit_mixed
from gradnoise.analysis.slopes import Slope, seed_slopes

__all__ = [
    "FitError",
    "MixedFit",
    "Slope",
    "Tost",
    "Trend",
    "fit_mixed",
    "holm",
    "seed_slopes",
    "tost",
    "trend",
]
