"""Two independent implementations that agree are stronger evidence than either: Opacus, curvlinops, powerlaw.

Skipped where a library is not installed (they are extras for tests).
"""

import math
import warnings

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from gradnoise import exposure
from gradnoise.noise.curvature import hessian_trace, monte_carlo_fisher
from gradnoise.noise.preconditioners import preconditioner
from gradnoise.noise.tails import hill

BATCH, LENGTH, WIDTH, WORDS = 8, 5, 6, 11


class Words(nn.Module):
    """Every kind of layer that hooks know, and a layer used twice; positions (B, T), as Opacus needs them."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.places = nn.Embedding(WORDS, WIDTH), nn.Embedding(LENGTH, WIDTH)
        self.norm, self.body = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WIDTH)
        self.scale, self.head = nn.RMSNorm(WIDTH, eps=1e-3), nn.Linear(WIDTH, WORDS, bias=False)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.norm(self.tokens(ids) + self.places(torch.arange(LENGTH).expand_as(ids)))
        return self.head(self.scale(self.body(self.body(x).tanh())))


def loss_of(net: nn.Module, ids: Tensor) -> Tensor:
    return cross_entropy(net(ids).flatten(0, 1), ids.roll(1, 1).flatten())


@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.AdamW, torch.optim.Adafactor])
def test_the_meter_by_examples_agrees_with_opacus(kind: type[torch.optim.Optimizer]) -> None:
    """Tr(P C/B P) = sum P^2 Var_b(grad_sample) / B, tensor by tensor, to 1e-9."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        opacus = pytest.importorskip("opacus.grad_sample", exc_type=ImportError)
    torch.manual_seed(0)
    net, ids = Words().double(), torch.randint(WORDS, (BATCH, LENGTH))
    start = {name: value.clone() for name, value in net.state_dict().items()}
    optimizer = kind(net.parameters(), lr=1e-2)
    meter = exposure(net, optimizer, every=1, estimator="example", p="step")
    loss_of(net, ids).backward()
    optimizer.step()
    expected = {name: preconditioner(optimizer, q).square() for name, q in net.named_parameters()}
    found = {p.part: p.trace_pcp for p in meter._ledger.rows()[1] if p.kind == "tensor"}
    meter.remove()
    net.load_state_dict(start)
    net.zero_grad()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        other = opacus.GradSampleModule(net, loss_reduction="mean", strict=False)
        loss_of(other, ids).backward()
    for name, parameter in net.named_parameters():
        samples = parameter.grad_sample
        samples = samples[-1] if isinstance(samples, list) else samples
        # Opacus keeps gradients as if the loss were a sum: g_b itself.
        assert samples.mean(0).allclose(parameter.grad, rtol=1e-9)
        variance = (expected[name] * samples.var(0)).sum().item() / BATCH
        assert found[name] == pytest.approx(variance, rel=1e-9)


def classifier() -> tuple[nn.Module, Tensor, Tensor, dict[Tensor, Tensor]]:
    """One prediction an example, so that curvlinops' mean is that over tokens."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()
    x, y = torch.randn(16, 4, dtype=torch.float64), torch.randint(3, (16,))
    return net, x, y, {q: torch.rand_like(q) + 0.5 for q in net.parameters()}


def diagonal(kind: str, net: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """Of curvlinops' operator, as a dense matrix."""
    curvlinops = pytest.importorskip("curvlinops")
    loss = nn.CrossEntropyLoss(reduction="mean")
    operator = getattr(curvlinops, kind)(net, loss, list(net.parameters()), [(x, y)])
    found: Tensor = (operator @ torch.eye(operator.shape[1], dtype=torch.float64)).diagonal()
    return found


def weighted(p: dict[Tensor, Tensor], diagonal: Tensor) -> float:
    return (torch.cat([value.flatten() for value in p.values()]).square() * diagonal).sum().item()


def test_the_monte_carlo_fisher_agrees_with_curvlinops_ggn() -> None:
    """For a softmax the generalised Gauss-Newton matrix is the Fisher; 400 label draws, 4.5 errors."""
    net, x, y, p = classifier()
    expected = weighted(p, diagonal("GGNLinearOperator", net, x, y))
    found = [monte_carlo_fisher(net, [((x,), {})], p, torch.Generator().manual_seed(n)) for n in range(400)]
    values = torch.tensor([f.value for f in found], dtype=torch.float64)
    assert values.mean().item() == pytest.approx(expected, abs=4.5 * values.std().item() / 20)
    assert values.std().item() / 20 < 0.05 * expected  # enough draws to tell


def test_the_hessians_trace_agrees_with_curvlinops() -> None:
    net, x, y, p = classifier()
    expected = weighted(p, diagonal("HessianLinearOperator", net, x, y))
    draw = torch.Generator().manual_seed(0)
    found = hessian_trace(net, lambda f: cross_entropy(f(x), y, reduction="none"), p, draw, probes=400)
    assert found.value == pytest.approx(expected, abs=4.5 * found.stderr)


def test_the_empirical_fisher_agrees_with_curvlinops_exactly() -> None:
    """(B - 1) Tr(P C/B P) + |P g|^2 = mean_b |P g_b|^2, P of AdamW's first step."""
    net, x, y, _ = classifier()
    expected = diagonal("EFLinearOperator", net, x, y)
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-2, eps=1e-2)
    meter = exposure(net, optimizer, every=1, estimator="example", curvature="empirical_fisher", p="step")
    cross_entropy(net(x), y).backward()
    with pytest.warns(UserWarning, match="empirical_fisher"):
        optimizer.step()
    p = {q: preconditioner(optimizer, q) for q in net.parameters()}
    assert meter.last is not None
    assert meter.last.curvature.value == pytest.approx(weighted(p, expected), rel=1e-9)


@pytest.mark.parametrize("degrees", [2, 3, 5])
def test_hill_is_powerlaws_exponent_less_one_if_its_range_is_widened(degrees: int) -> None:
    """powerlaw 2.0.0 clips alpha at 3 by default, so that it finds index 2 for any lighter tail, unwarned."""
    powerlaw = pytest.importorskip("powerlaw")
    draw = torch.Generator().manual_seed(0)
    z = torch.randn(20_000, generator=draw, dtype=torch.float64)
    chi = torch._standard_gamma(torch.full_like(z, degrees / 2), generator=draw) * 2 / degrees
    values = (z / chi.sqrt()).abs()
    ordered = values.sort(descending=True).values
    found = hill(values, 500).value
    options = {"xmin": ordered[500].item(), "verbose": 0}
    data = ordered[:500].numpy()
    wide = powerlaw.Fit(data, parameter_ranges={"alpha": [1.01, 10]}, **options)
    assert wide.power_law.alpha - 1 == pytest.approx(found, rel=1e-9)
    if degrees == 5:
        assert powerlaw.Fit(data, **options).power_law.alpha - 1 < 0.7 * found
    assert not math.isnan(found)
