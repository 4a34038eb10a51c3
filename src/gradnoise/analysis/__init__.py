"""Analysis: models and tests for few seeds, and the analysis that a plan lays down."""

from gradnoise.analysis.anova import Anova, AnovaTerm, anova
from gradnoise.analysis.bands import IsotonicBand, isotonic_band
from gradnoise.analysis.cluster_robust import ClusterRobust, RobustTerm, cluster_robust
from gradnoise.analysis.contrasts import Contrast, contrast
from gradnoise.analysis.correlation import Spearman, spearman
from gradnoise.analysis.ebar2 import Ebar2, ebar2_test
from gradnoise.analysis.equivalence import Tost, tost
from gradnoise.analysis.families import holm
from gradnoise.analysis.isotonic import Reversal, Trend, trend
from gradnoise.analysis.mediation import Mediation, Path, mediation
from gradnoise.analysis.mixed import FitError, MixedFit, fit_mixed
from gradnoise.analysis.power import t_power, tost_power
from gradnoise.analysis.reliability import centre_covariate
from gradnoise.analysis.resampling import (
    SeedBootstrap,
    SignFlip,
    WildBootstrap,
    seed_bootstrap,
    sign_flip,
    wild_bootstrap,
)
from gradnoise.analysis.slopes import Slope, seed_slopes

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
