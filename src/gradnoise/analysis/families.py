"""Families of hypotheses."""

import math
from collections.abc import Sequence

from gradnoise.base.errors import InputError


def holm(p_values: Sequence[float | None], missing_p: float = 1.0) -> list[float]:
    """Holm-adjusted p-values, in the order given: p*_(i) = max over j <= i of min(1, (m - j + 1) p_(j)).

    An absent p (None or NaN) counts as `missing_p` and stays in the family, so a test that fails cannot make
    the others easier. Raises `InputError` for a number that is no probability.
    Source: Holm, Scandinavian Journal of Statistics 1979.
    """
    from statsmodels.stats.multitest import multipletests

    filled = [missing_p if p is None or math.isnan(p) else p for p in p_values]
    for p in filled:
        if not 0 <= p <= 1:
            raise InputError("p", p, "must lie between 0 and 1, or be None where it is missing")
    if not filled:
        return []
    return [float(p) for p in multipletests(filled, method="holm")[1]]
