"""Families of hypotheses."""

import math
from collections.abc import Sequence

import numpy as np

from gradnoise.base.errors import InputError


def holm(p_values: Sequence[float | None], missing_p: float = 1.0) -> list[float]:
    """Holm-adjusted p-values, in the order given: p*_(i) = max over j <= i of min(1, (m - j + 1) p_(j)).

    An absent p (None or NaN) counts as `missing_p` and stays in the family, so a test that fails cannot make
    the others easier. Raises `InputError` for a number that is no probability.
    Source: Holm, Scandinavian Journal of Statistics 1979.
    """
    filled = [missing_p if p is None or math.isnan(p) else float(p) for p in p_values]
    for p in filled:
        if not 0 <= p <= 1:
            raise InputError("p", p, "must lie between 0 and 1, or be None where it is missing")
    # Not statsmodels' multipletests, against which it is tested: that collects garbage at every call, which
    # takes longer than all of a simulated analysis.
    order = np.argsort(filled, kind="stable")
    stepped = np.array(filled)[order] * np.arange(len(filled), 0, -1)
    adjusted = np.empty(len(filled))
    adjusted[order] = np.minimum(np.maximum.accumulate(stepped), 1)
    return [float(p) for p in adjusted]
