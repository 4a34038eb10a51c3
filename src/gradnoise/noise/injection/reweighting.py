r"""The gradient noise of a smaller batch, through random weights on the losses of the user's own examples.

n examples with gradients g_b, mean g and unbiased sample covariance S get weights w_b = 1 + s u_b. The u_b
are exchangeable with mean 0 and variance 1, and sum to 0, so that E u_b u_c = -1/(n - 1) for b != c. Given
the examples, the weighted mean gradient then has

.. math:: E = g, \quad \operatorname{Cov} = \frac{s^2}{n^2} \sum_{b, c} E[u_b u_c] g_b g_c' = s^2 S / n,

and over independent examples of covariance C it has (1 + s^2) C/n: all of C, across coordinates and layers,
through the one backward pass that there is. Micro-batch r with n_r = w_r B of the batch's B examples,
weighted by itself, contributes h_r with Var h_r = w_r (1 + s^2) C/B. These are independent and add up to
(1 + s^2) C/B = C/B' for s^2 = B/B' - 1, and E |P d_r|^2 = w_r (1 - w_r) Tr(P C/B' P), which is what a meter
of micro-batches reads (`estimators`).

Source: Wu et al., On the noisy gradient descent that generalizes as SGD, ICML 2020, arXiv 1906.07405.
"""

import math
import operator
from typing import Literal, get_args

import torch
from torch import Tensor

from gradnoise.base.errors import InputError
from gradnoise.base.streams import generator
from gradnoise.noise.injection.sources import student

Law = Literal["gaussian", "student_t", "bernoulli", "multinomial", "subset"]


def reweight(
    n: int,
    *,
    step: int,
    to_batch: float | None = None,
    batch: int | None = None,
    temperature: float | None = None,
    law: Law = "gaussian",
    degrees: float | None = None,
    part: int = 0,
    seed: int = 0,
    device: torch.device | str | None = None,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    r"""(n,) random weights that give a mean of n losses the gradient noise of a smaller batch.

    `loss = (reweight(n, to_batch=16, step=t) * losses).mean()`, with `losses` (n,) one an example. The
    weights have mean 1 and sum to n, to rounding. How much noise, by one of:

    - `to_batch`: the batch B' <= B whose noise C/B' is wanted. `batch` is B, the examples of the whole update
      (default n). Batches drawn without replacement from N examples get that of B' drawn so, C (1/B' - 1/N).
    - `temperature` >= 1: noise over that of the unweighted batch, which is B/B' of the above.

    `law` of the weights, all with the same first two moments:

    - "gaussian"; "student_t" with `degrees` > 2 (default 5): heavy tails. Both give negative weights too.
    - "bernoulli": each example is kept with probability B'/B; centred, so those left out weigh about 0.
    - "multinomial": how often each is among n B'/B draws with replacement, shrunk by sqrt((n - n B'/B) /
      (n - 1)), because such draws are noisier than a batch of B' distinct examples. Those left out keep some
      weight.
    - "subset": n B'/B of the examples, drawn without replacement, with weight B/B', the others 0. This is the
      batch of B' itself, in every moment.

    Under gradient accumulation call it for each micro-batch, with `n` its size, `batch` that of the whole
    update and `part` its number; in a distributed run give every rank parts of its own (rank * K + k of K
    micro-batches). The same part gives the same weights everywhere, and noise of fewer dimensions. Draws are
    a function of (seed, step, part) alone, made on the CPU in float64.

    What the meter compares must not be what is weighted. With K whole micro-batches weighted against one
    another (`loss_k * reweight(K, temperature=4, step=t)[k]`) the noise is right, s^2 times the sample
    covariance of their gradients over K, but the mean gradient's share s^2 |P g|^2 / (K - 1) is then in what
    differs between micro-batches, and estimator "micro" reads that much too much; "example" does alike, with
    n for K, where examples are weighted. Right: weighted examples, measured by "micro".

    Where the loss is a mean over tokens, weight both sums: `(w * sums).sum() / (w * tokens).sum()`, with
    `sums` and `tokens` (n,) one a sequence, which is right to first order in the weights.

    Raises `InputError` for fewer than 2 examples, a batch of fewer than n, to_batch above the batch,
    temperature below 1, both or neither of them, an unknown law, degrees of 2 or fewer or of another law, a
    number of draws ("multinomial", "subset") that is not whole, a negative step or part, and a dtype that is
    not floating.
    """
    n = _whole("n", n, 2)
    counters = _whole("step", step, 0), _whole("part", part, 0)
    ratio = _ratio(n, to_batch, batch, temperature)
    _check(law, degrees, dtype)
    if law in ("multinomial", "subset") and not _drawn(n, ratio):
        field, value = ("to_batch", to_batch) if temperature is None else ("temperature", temperature)
        raise InputError(field, value, f"law {law} draws {n / ratio:.6g} of {n}: must be a whole number")
    draw = generator(seed, "reweight", *counters)
    weights = 1 + _deviations(1, n, ratio, law, 5.0 if degrees is None else degrees, draw)[0]
    return weights.to(device=device, dtype=dtype)


def _deviations(count: int, n: int, ratio: float, law: Law, degrees: float, draw: torch.Generator) -> Tensor:
    """(count, n) draws of s u: rows of mean 0, entries of variance s^2 = ratio - 1; float64."""
    scale, shape = math.sqrt(ratio - 1), (count, n)
    if law == "gaussian":
        return scale * _centred(torch.randn(shape, generator=draw, dtype=torch.float64))
    if law == "student_t":
        return scale * _centred(student(shape, degrees, draw))
    if law == "bernoulli":
        kept = torch.rand(shape, generator=draw, dtype=torch.float64) * ratio < 1
        return _centred(ratio * kept.double())
    drawn = _drawn(n, ratio)
    if law == "multinomial":
        picks = torch.randint(n, (count, drawn), generator=draw)
        counts = torch.zeros(shape, dtype=torch.int64).scatter_add_(1, picks, torch.ones_like(picks))
        return math.sqrt((n - drawn) / (n - 1)) * (n / drawn * counts.double() - 1)
    ranks = torch.rand(shape, generator=draw, dtype=torch.float64).argsort(-1)
    return n / drawn * (ranks < drawn).double() - 1


def _centred(values: Tensor) -> Tensor:
    """Rows less their mean, at the variance that independent entries had before."""
    n = values.shape[-1]
    return (values - values.mean(-1, keepdim=True)) * math.sqrt(n / (n - 1))


def _drawn(n: int, ratio: float) -> int:
    """n B'/B; 0 where that is no whole number."""
    drawn = round(n / ratio)
    return drawn if abs(n / ratio - drawn) < 1e-9 * n else 0


def _ratio(n: int, to_batch: float | None, batch: int | None, temperature: float | None) -> float:
    """1 + s^2, the noise wanted over that of the unweighted batch."""
    batch = n if batch is None else _whole("batch", batch, n)
    if temperature is not None:
        if to_batch is not None:
            raise InputError(
                "to_batch", to_batch, f"goes without temperature={temperature}: give one of them"
            )
        if not 1 <= temperature < math.inf:
            raise InputError("temperature", temperature, "must be 1 or more: weights take no noise away")
        return float(temperature)
    if to_batch is None:
        raise InputError("to_batch", None, "give to_batch or temperature")
    if not 0 < to_batch <= batch:
        mend = f"must be above 0 and at most the batch of {batch}: weights take no noise away"
        raise InputError("to_batch", to_batch, mend)
    return batch / to_batch


def _check(law: str, degrees: float | None, dtype: torch.dtype) -> None:
    laws = get_args(Law)
    if law not in laws:
        raise InputError("law", law, f"must be {', '.join(laws[:-1])} or {laws[-1]}")
    if degrees is not None and law != "student_t":
        raise InputError("degrees", degrees, f"are for law student_t, not {law}")
    if degrees is not None and not 2 < degrees < math.inf:
        raise InputError(
            "degrees", degrees, "must be above 2 and finite: with fewer the variance is infinite"
        )
    if not dtype.is_floating_point:
        raise InputError("dtype", dtype, "must be a floating dtype")


def _whole(field: str, value: int, least: int) -> int:
    try:
        number = operator.index(value)
    except TypeError:
        number = least - 1
    if number < least:
        raise InputError(field, value, f"must be a whole number, {least} or more")
    return number
