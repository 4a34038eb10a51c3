r"""Curvature as the optimizer sees it, Tr(P F P), for the denominator of P-NE*.

F stands for the Hessian of the training loss, a mean over tokens. Its proxies differ in unit: the second
moment of per-sequence gradients of the token-mean loss is F_sequence = F_token / T for sequences of T tokens,
and only F_token is on the Hessian's scale. Every function here returns F_token; `fisher_unit="sequence"`
divides by T.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import cross_entropy

from gradnoise.base.errors import InputError
from gradnoise.noise.capture import Call, Capture, factors
from gradnoise.noise.estimate import Estimate

Curvature = Literal["mc_fisher", "kfac", "hessian", "empirical_fisher"]
Likelihood = Literal["categorical", "gaussian"]
Inputs = tuple[tuple[Any, ...], dict[str, Any]]
Preconditioners = dict[Tensor, Tensor]
# From the model (or a stand-in that is called alike) to the loss of each example of the current batch, (B,).
Losses = Callable[[Callable[..., Any]], Tensor]


def logits_of(outputs: Any) -> Tensor:
    """The tensor of logits in what a model returned: itself, `.logits`, or the first of a tuple."""
    if isinstance(outputs, Tensor):
        return outputs
    found = getattr(outputs, "logits", None)
    found = outputs[0] if found is None and isinstance(outputs, tuple) else found
    if not isinstance(found, Tensor):
        raise InputError(
            "model output", type(outputs).__name__, "give logits= a function that finds the logits"
        )
    return found


@contextmanager
def _undisturbed(model: nn.Module) -> Iterator[None]:
    """Extra passes must not move the run: global random state is put back (dropout draws from it), and so
    are buffers (BatchNorm's running statistics)."""
    devices = sorted({p.device.index for p in model.parameters() if p.device.type == "cuda"})
    buffers = [(buffer, buffer.clone()) for buffer in model.buffers()]
    try:
        with torch.random.fork_rng(devices=devices), torch.enable_grad():
            yield
    finally:
        with torch.no_grad():
            for buffer, before in buffers:
                if not torch.equal(buffer, before):
                    buffer.copy_(before)


def sampled_loss(logits: Tensor, likelihood: Likelihood, generator: torch.Generator) -> Tensor:
    """Mean loss over all predictions against targets drawn from the model itself.

    categorical: cross-entropy, labels from softmax of the last dimension. gaussian: half the squared distance
    to a draw of unit variance around the output.
    """
    if likelihood == "gaussian":
        noise = torch.randn(logits.shape, generator=generator, dtype=torch.float64).to(logits)
        return (logits - (logits.detach() + noise)).square().flatten(0, -2).sum(-1).mean() / 2
    flat = logits.flatten(0, -2).float()
    chosen = torch.rand(len(flat), 1, generator=generator, dtype=torch.float64).to(flat.device)
    steps = flat.detach().softmax(-1).double().cumsum(-1)
    labels = (steps < chosen * steps[:, -1:]).sum(-1)
    return cross_entropy(flat, labels)


def monte_carlo_fisher(
    model: nn.Module,
    inputs: list[Inputs],
    p: Preconditioners,
    generator: torch.Generator,
    likelihood: Likelihood = "categorical",
    logits: Callable[[Any], Tensor] = logits_of,
) -> Estimate:
    r"""Tr(P F_token P) with labels sampled from the model.

    Under the model's own labels the score's mean is exactly 0, so the gradient g_k of the mean loss over the
    n_k predictions of a micro-batch has E |P g_k|^2 = Tr(P F P) / n_k: no per-example gradient is needed, and
    any model will do. Each micro-batch gives one value n_k |P g_k|^2; the result is their mean weighted by
    n_k with its standard error. Micro-batches of several sequences are cut in two, so that there is one (nan
    for a single sequence, and where inputs of T rows cannot be told from inputs of B rows).
    """
    parameters = list(p)
    values, weights = [], []
    with _undisturbed(model):
        for args, kwargs in _halved(inputs):
            outputs = logits(model(*args, **kwargs))
            loss = sampled_loss(outputs, likelihood, generator)
            square = sum(
                (gradient * p[parameter]).double().square().sum().item()
                for parameter, gradient in zip(
                    parameters, torch.autograd.grad(loss, parameters, allow_unused=True), strict=True
                )
                if gradient is not None
            )
            predictions = outputs[..., 0].numel()
            values.append(predictions * square)
            weights.append(float(predictions))
    return weighted_mean(values, weights)


def kfac_diagonal(
    model: nn.Module,
    inputs: list[Inputs],
    p: Preconditioners,
    generator: torch.Generator,
    likelihood: Likelihood = "categorical",
    logits: Callable[[Any], Tensor] = logits_of,
) -> Estimate:
    r"""sum_ij P_ij^2 A_jj G_ii, Tr(P F_token P) in K-FAC's approximation, with labels sampled from the model.

    Per layer, A = mean over tokens of the squared inputs and G = that of the squared scores (an embedding's
    input is one-hot, a bias's is 1; a normalisation's gain takes the mean square of each normalised input
    times that of its score). Each micro-batch gives one value; the error is that of their mean.

    Raises `InputError` for layers other than Linear, LayerNorm, RMSNorm and Embedding, by name.
    """
    values, weights = [], []
    for args, kwargs in _halved(inputs):
        capture = Capture(model, set(p), None)
        describe(capture, args, kwargs)
        try:
            with _undisturbed(model):
                outputs = logits(model(*args, **kwargs))
                predictions = outputs[..., 0].numel()
                total = sampled_loss(outputs, likelihood, generator) * predictions
                torch.autograd.grad(total, list(p), allow_unused=True)
            if capture.fault is not None:
                raise capture.fault
            value = sum(
                _kronecker(call, source.parameter, p[source.parameter])
                for source in capture.sources()
                for call in source.calls
            )
        finally:
            capture.remove()
        values.append(value / predictions)
        weights.append(float(predictions))
    return weighted_mean(values, weights)


def _kronecker(call: Call, parameter: Tensor, p: Tensor) -> float:
    """sum_ij P_ij^2 (sum_t a_tj^2) (sum_t s_ti^2) / tokens of one call."""
    ins, outs, tokens = factors(call, parameter)
    if p.ndim == 1 or call.role in ("layer_norm", "rms_norm"):
        outer = (ins * outs).view_as(p)
    elif call.role == "linear":
        outer = outs[:, None] * ins
    else:
        outer = ins[:, None] * outs
    return ((p.double().square() * outer).sum() / tokens).item()


def hessian_trace(
    model: nn.Module, losses: Losses, p: Preconditioners, generator: torch.Generator, probes: int = 4
) -> Estimate:
    """Tr(P H P) of the mean loss by Hutchinson probes, z' P H P z with z = +-1; may be negative.

    Double backward, so attention runs on the math kernel. The error is that of the mean over `probes`.
    """
    parameters = list(p)
    values = []
    with _undisturbed(model), sdpa_kernel(SDPBackend.MATH):
        gradients = torch.autograd.grad(
            losses(model).mean(), parameters, create_graph=True, allow_unused=True
        )
        # The rows of H of a parameter that is not used, or used linearly only, are 0.
        bent = [n for n, g in enumerate(gradients) if g is not None and g.requires_grad]
        for _ in range(probes):
            directions = [rademacher(q, generator) * p[q] for q in parameters]
            products = torch.autograd.grad(
                [gradients[n] for n in bent],
                parameters,
                [directions[n] for n in bent],
                retain_graph=True,
                allow_unused=True,
            )
            values.append(
                sum(
                    (v.double() * h.double()).sum().item()
                    for v, h in zip(directions, products, strict=True)
                    if h is not None
                )
            )
    return weighted_mean(values, [1.0] * probes)


def covariance_probes(
    model: nn.Module, losses: Losses, p: Preconditioners, generator: torch.Generator, probes: int
) -> Tensor:
    r"""(probes, B) directional derivatives g_b' P z of per-example losses, z = +-1: estimator "hutchinson".

    Their variance over b has mean Tr(P C P) over z. Forward mode: one pass of about a forward and a backward
    pass a probe, no per-layer code, any layer. Attention runs on the math kernel, which forward mode needs.
    """
    rows = []
    with _undisturbed(model), sdpa_kernel(SDPBackend.MATH), forward_ad.dual_level():
        for _ in range(probes):
            duals = {
                name: forward_ad.make_dual(q.detach(), rademacher(q, generator) * p[q])  # type: ignore[no-untyped-call]
                if q in p
                else q.detach()
                for name, q in model.named_parameters()
            }

            def call(*args: Any, duals: dict[str, Tensor] = duals, **kwargs: Any) -> Any:
                return functional_call(model, duals, args, kwargs)

            tangent = forward_ad.unpack_dual(losses(call)).tangent  # type: ignore[no-untyped-call]
            rows.append(tangent.detach().double())
    return torch.stack(rows)


def rademacher(like: Tensor, generator: torch.Generator) -> Tensor:
    """+-1 with equal chance, in the shape of a tensor, drawn on the CPU so that devices agree."""
    signs = torch.randint(0, 2, like.shape, generator=generator, dtype=torch.int8)
    return (signs * 2 - 1).to(like)


def _first(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
    return next((v for v in [*args, *kwargs.values()] if isinstance(v, Tensor) and v.ndim > 0), None)


def batch_of(args: tuple[Any, ...], kwargs: dict[str, Any]) -> int:
    """Sequences in a model's inputs: the leading dimension of the first tensor."""
    first = _first(args, kwargs)
    return 1 if first is None else len(first)


def predictions_of(model: nn.Module, inputs: Inputs, logits: Callable[[Any], Tensor]) -> float:
    """Predictions that the loss averages over, a sequence: T of a language model, 1 of a classifier."""
    args, kwargs = inputs
    with _undisturbed(model), torch.no_grad():
        return logits(model(*args, **kwargs))[..., 0].numel() / batch_of(args, kwargs)


def tokens_of(args: tuple[Any, ...], kwargs: dict[str, Any]) -> int:
    """Tokens in a model's inputs: ids (B, T), or vectors (B, T, width); else one a sequence."""
    first = _first(args, kwargs)
    if first is None:
        return 1
    return first[..., 0].numel() if first.is_floating_point() and first.ndim > 1 else first.numel()


def has_tokens(args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether the first tensor has a dimension of tokens: ids (B, T), or vectors (B, T, width)."""
    first = _first(args, kwargs)
    return first is not None and first.ndim > (2 if first.is_floating_point() else 1)


def describe(capture: Capture, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Tell a capture what the model's inputs say of the forward pass to come."""
    first, size = _first(args, kwargs), batch_of(args, kwargs)
    capture.batch, capture.has_tokens = size, has_tokens(args, kwargs)
    capture.length = 0 if first is None or not capture.has_tokens else first.shape[1]
    capture.given = [v for v in [*args, *kwargs.values()] if isinstance(v, Tensor) and v.ndim == 1]


def _halved(inputs: list[Inputs]) -> list[Inputs]:
    return [part for args, kwargs in inputs for part in _halves(args, kwargs)]


def _halves(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Iterator[Inputs]:
    first, size = _first(args, kwargs), batch_of(args, kwargs)
    if first is not None and has_tokens(args, kwargs) and first.shape[1] == size:
        # As many sequences as tokens in each: positions or a mask (T, T) look like a row for each sequence.
        alike = [v for v in [*args, *kwargs.values()] if isinstance(v, Tensor) and v.shape[:1] == (size,)]
        if any((v.shape, v.dtype) != (first.shape, first.dtype) for v in alike):
            yield args, kwargs
            return

    def cut(value: Any, part: slice) -> Any:
        return value[part] if isinstance(value, Tensor) and value.ndim > 0 and len(value) == size else value

    for part in (slice(0, size // 2), slice(size // 2, size)) if size > 1 else (slice(0, size),):
        yield tuple(cut(v, part) for v in args), {name: cut(v, part) for name, v in kwargs.items()}


def weighted_mean(values: list[float], weights: list[float]) -> Estimate:
    """Mean and its standard error (nan for one value)."""
    total = math.fsum(weights)
    mean = math.fsum(w * v for w, v in zip(weights, values, strict=True)) / total
    if len(values) < 2:
        return Estimate(mean, math.nan)
    squares = math.fsum((w / total * (v - mean)) ** 2 for w, v in zip(weights, values, strict=True))
    return Estimate(mean, math.sqrt(squares * len(values) / (len(values) - 1)))
