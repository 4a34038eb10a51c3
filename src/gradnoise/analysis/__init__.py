"""Analysis: models and tests for few seeds, and the analysis that a plan lays down."""

from gradnoise.analysis.reliability import centre_covariate
from gradnoise.analysis.statistics.anova import Anova, AnovaTerm, anova
from gradnoise.analysis.statistics.bands import IsotonicBand, isotonic_band
from gradnoise.analysis.statistics.cluster_robust import ClusterRobust, RobustTerm, cluster_robust
from gradnoise.analysis.statistics.contrasts import Contrast, contrast
from gradnoise.analysis.statistics.correlation import Spearman, spearman
from gradnoise.analysis.statistics.ebar2 import Ebar2, ebar2_test
from gradnoise.analysis.statistics.equivalence import Tost, tost
from gradnoise.analysis.statistics.families import holm
from gradnoise.analysis.statistics.isotonic import Reversal, Trend, trend
from gradnoise.analysis.statistics.mediation import Mediation, Path, mediation
from gradnoise.analysis.statistics.mixed import FitError, MixedFit, fit_mixed
from gradnoise.analysis.statistics.power import t_power, tost_power
from gradnoise.analysis.statistics.resampling import (
    SeedBootstrap,
    SignFlip,
    WildBootstrap,
    seed_bootstrap,
    sign_flip,
    wild_bootstrap,
)
from gradnoise.analysis.statistics.slopes import Slope, seed_slopes

__all__ = [
    "Anova",
    "AnovaTerm",
    "ClusterRobust",
    "Contrast",
    "Ebar2",
    "FitError",
    "IsotonicBand",
    "Mediation",
    "MixedFit",
    "Path",
    "Reversal",
    "RobustTerm",
    "SeedBootstrap",
    "SignFlip",
    "Slope",
    "Spearman",
    "Tost",
    "Trend",
    "WildBootstrap",
    "anova",
    "centre_covariate",
    "cluster_robust",
    "contrast",
    "ebar2_test",
    "fit_mixed",
    "holm",
    "isotonic_band",
    "mediation",
    "seed_bootstrap",
    "seed_slopes",
    "sign_flip",
    "spearman",
    "t_power",
    "tost",
    "tost_power",
    "trend",
    "wild_bootstrap",
]
