"""A meter beside injections: its ledger against what noise really did to the weights, and what it follows.

Coordinates are replicas: a sum of D squares errs by sqrt(2/D), 1 % at the 40 000 of unequal size here (draws
are fixed). A gradient's law is written by hand: the loss <theta, x> has gradient x whatever theta.
"""

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.optim import SGD, Adafactor, Adam, AdamW, Muon, Optimizer, RMSprop

from gradnoise import exposure, gaussian, inject, low_rank, student_t
from gradnoise.base.errors import InputError
from gradnoise.noise.exposure import Exposure
from gradnoise.noise.injection.inject import Injection, Where
from gradnoise.noise.injection.sources import Place
from gradnoise.noise.preconditioners import preconditioner

SIZES = {"a": 10_000, "b": 30_000}
WHERES: tuple[Where, ...] = ("pre", "post", "frozen_v")


class Vector(nn.Module):
    def __init__(self, size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(size, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        return (x * self.weight).sum(-1)


class Drift(nn.Module):
    """Two layers; the gradient of the mean output over a batch is the mean of x."""

    def __init__(self, sizes: dict[str, int] = SIZES) -> None:
        super().__init__()
        self.a, self.b = Vector(sizes["a"]), Vector(sizes["b"])

    def forward(self, x: Tensor) -> Tensor:
        sizes = [self.a.weight.numel(), self.b.weight.numel()]
        parts = torch.split(x, sizes, -1)
        return self.a(parts[0]) + self.b(parts[1])  # type: ignore[no-any-return]


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def back(loss: Tensor) -> None:
    loss.backward()  # type: ignore[no-untyped-call]


def update(net: nn.Module, optimizer: Optimizer, batches: list[Tensor]) -> None:
    """One update from equal micro-batches."""
    optimizer.zero_grad()
    for x in batches:
        back(net(x).mean() / len(batches))
    optimizer.step()


def flat(net: nn.Module) -> Tensor:
    return torch.cat([p.detach().flatten() for p in net.parameters()])


# The ledger against the weights.

MEAN = random(40_000).sign() * (0.5 + torch.rand(40_000, generator=torch.Generator().manual_seed(1)).double())
# SGD and its like; and those whose P, for a gradient that is always MEAN, is 1/|MEAN|. Effective over nominal
# learning rate, and whether P is that.
KINDS: dict[str, tuple[Callable[[Any], Optimizer], float, bool]] = {
    "SGD": (lambda p: SGD(p, lr=0.1), 1.0, False),
    "momentum": (lambda p: SGD(p, lr=0.1, momentum=0.8, dampening=0.5), 2.5, False),
    "nesterov": (lambda p: SGD(p, lr=0.1, momentum=0.8, nesterov=True), 5.0, False),
    "Adam": (lambda p: Adam(p, lr=0.1, betas=(0.8, 0.9), eps=0.0), 1.0, True),
    "RMSprop": (lambda p: RMSprop(p, lr=0.1, alpha=0.5, momentum=0.8, eps=0.0), 5.0, True),
}
STD = {
    "a.weight": 0.02 + 0.02 * random(10_000, seed=2).abs(),
    "b.weight": 0.01 + 0.02 * random(30_000, seed=3).abs(),
}


def power(n: int) -> float:
    """Nothing while P settles; then another value at each update; then nothing until momentum is spent."""
    return (0.0, 1.0, 2.5)[n % 3] if 40 < n <= 70 else 0.0


def trained(kind: str, where: Where | None, every: int = 7) -> tuple[Drift, Exposure]:
    """130 updates with gradient MEAN; sources swapped and gains set amid the noise, between measurements."""
    net = Drift()
    optimizer = KINDS[kind][0](net.parameters())
    meter = exposure(net, optimizer, every)
    noise: Injection | None = None
    if where is not None:
        sources = {1: gaussian(STD), 53: student_t(0.03, degrees=9)}
        noise = inject(optimizer, sources, where, model=net, power=power)
    for n in range(1, 131):
        if noise is not None:
            noise.gains = {"b": 0.25} if 60 <= n < 66 else {}
        spread = 0.1 * random(2, 1, 40_000, seed=n)
        update(net, optimizer, [*(MEAN + spread), *(MEAN - spread)])
    return net, meter


@pytest.mark.parametrize(
    ("kind", "where"),
    [
        *((kind, where) for kind in ("SGD", "momentum", "nesterov") for where in ("pre", "post")),
        *((kind, where) for kind in ("Adam", "RMSprop") for where in ("frozen_v", "post")),
    ],
)
def test_injected_exposure_is_the_mean_squared_displacement(kind: str, where: Where) -> None:
    """To rounding the sum over updates of eta^2 power Tr(PNP), within error what moved the weights.

    Powers change at every update, the source and the layers' gains in mid-interval, at stride 7.
    """
    clean, plain = trained(kind, None)
    moved, meter = trained(kind, where)
    p = 1 / MEAN.abs() if KINDS[kind][2] else torch.ones(40_000)
    variance = torch.zeros(40_000, dtype=torch.float64)
    for n in range(1, 131):
        now = torch.cat(list(STD.values())).square() if n < 53 else torch.full_like(variance, 0.03**2)
        gain = torch.cat([torch.ones(10_000), torch.full((30_000,), 0.25 if 60 <= n < 66 else 1.0)])
        variance += power(n) * gain * now
    eta = 0.1 * KINDS[kind][1]
    last, before = meter.last, plain.last
    assert last is not None
    assert before is not None
    expected = eta**2 * (p**2 * variance).sum().item()
    # RMSprop's v is MEAN^2 but for 2^-40 by then.
    assert last.pne2_injected.value == pytest.approx(expected, rel=1e-9)
    assert (flat(moved) - flat(clean)).square().sum().item() == pytest.approx(expected, rel=0.04)
    # Every definition contains it; the batch's own part is what it was.
    for name, injected in (
        ("pne2", expected),
        ("pne2_effective", expected),
        ("retained", expected),
        ("pne", expected / eta),
        ("pne_effective", expected / eta),
        ("ne", eta**2 * variance.sum().item()),
    ):
        own = getattr(before, name)
        assert own.value > 0
        assert getattr(last, name).value == pytest.approx(own.value + injected, rel=1e-9), name
        assert getattr(last, name).stderr == pytest.approx(own.stderr, rel=1e-9), name
    parts = meter.ledger_by_part
    for kind_of in ("layer", "class", "tensor"):
        chosen = parts[parts["kind"] == kind_of]
        assert chosen["injected_pne2"].sum() == pytest.approx(expected, rel=1e-9)
    for name, span in (("a", slice(0, 10_000)), ("b", slice(10_000, 40_000))):
        chosen = parts[(parts["kind"] == "layer") & (parts["part"] == name)]
        one = eta**2 * (p**2 * variance)[span].sum().item()
        assert chosen["injected_pne2"].sum() == pytest.approx(one, rel=1e-9)
        grown = last.by_layer[name].pne2.value - before.by_layer[name].pne2.value
        assert grown == pytest.approx(one, rel=1e-7)


def test_retained_exposure_is_what_decay_left_of_the_displacement() -> None:
    """AdamW at eta lambda = 0.05 and 0.005, a gradient of constant size; of 60 updates much is forgotten."""
    found = []
    for noisy in (False, True):
        net = Drift()
        groups: list[dict[str, Any]] = [
            {"params": [net.a.weight], "weight_decay": 0.5},
            {"params": [net.b.weight]},
        ]
        optimizer = AdamW(groups, lr=0.1, betas=(0.0, 0.9), eps=0.0, weight_decay=0.05)
        meter = exposure(net, optimizer, every=1)
        if noisy:
            inject(optimizer, gaussian({"a.weight": 0.3, "b.weight": 0.1}), model=net)
        for n in range(60):
            spread = 0.1 * random(40_000, seed=n)
            update(net, optimizer, [(MEAN + spread)[None], (MEAN - spread)[None]])
        assert meter.last is not None
        found.append((flat(net), meter.last))
    (clean, before), (moved, last) = found
    realised = (moved - clean).square().sum().item()
    assert last.retained.value - before.retained.value == pytest.approx(realised, rel=0.04)
    assert last.pne2_injected.value > 2 * realised


@pytest.mark.parametrize("where", ["pre", "post"])
def test_adafactors_own_learning_rate_is_in_the_ledger(where: Where) -> None:
    """Each update against a copy of the optimizer that steps without noise; rates differ by tensor.

    So late (update 10 000) that the second moment takes in 0.06 % of the noise; before that "pre" changes P.
    Noise in the gradient also shortens the step, g included, because it raises the update's size above 1.
    """
    net = Drift()
    net.a.weight.data += 3.0
    net.b.weight.data += random(30_000)
    optimizer = Adafactor(net.parameters(), lr=0.03)
    meter = exposure(net, optimizer, every=1)
    realised = torch.zeros(2, dtype=torch.float64)
    for n in range(12):
        spread = 0.1 * random(40_000, seed=n)
        if n == 1:
            for p in net.parameters():
                optimizer.state[p]["step"] += 1e4
            inject(optimizer, gaussian(0.5), where, model=net)
        twin = copy.deepcopy(optimizer)
        update(net, optimizer, [(MEAN + spread)[None], (MEAN - spread)[None]])
        for p, q in zip(net.parameters(), twin.param_groups[0]["params"], strict=True):
            q.grad = p.grad
        twin.step()  # type: ignore[no-untyped-call]
        pairs = zip(net.parameters(), twin.param_groups[0]["params"], strict=True)
        moved = torch.cat([(p - q).detach() for p, q in pairs]) * MEAN.sign()
        for k, part in enumerate((moved[:10_000], moved[10_000:])):
            realised[k] += (part - part.mean()).square().sum()
    parts = meter.ledger_by_part
    for n, name in enumerate("ab"):
        chosen = parts[(parts["kind"] == "layer") & (parts["part"] == name)]
        assert chosen["injected_pne2"].sum() == pytest.approx(realised[n].item(), rel=0.03)


@pytest.mark.parametrize(
    ("signal", "where", "trace", "drift"),
    [
        (0.0, None, 1.0, 0.0),
        (0.0, "pre", 1.0, 0.0),
        (0.0, "post", 16.0, 0.0),
        (1.0, None, 0.5, math.sqrt(1 / 2)),
        (1.0, "pre", 16 / 17, math.sqrt(1 / 17)),
        (1.0, "post", 8.0, math.sqrt(1 / 2)),
    ],
)
def test_under_adam_noise_in_gradients_cancels_itself(
    signal: float, where: Where | None, trace: float, drift: float
) -> None:
    """Injected 15 times the gradient's own variance: (1 + c)/(1 + SNR) after, (1 + c)/(1 + c + SNR) before.

    Traces per coordinate by the ledger and by the weights' displacement; drift in learning rates an update.
    """
    size, burn_in, updates = 5000, 400, 250
    net = Drift({"a": size // 2, "b": size // 2})
    optimizer = Adam(net.parameters(), lr=1e-3, betas=(0.9, 0.999), eps=0.0)
    if where is not None:
        inject(optimizer, gaussian(math.sqrt(15)), where, model=net)
    draw = torch.Generator().manual_seed(7)
    meter: Exposure | None = None
    start = flat(net)
    for n in range(burn_in + updates):
        if n == burn_in:
            start, meter = flat(net), exposure(net, optimizer, every=10)
        noise = torch.randn(2, 1, size, generator=draw, dtype=torch.float64) * math.sqrt(2)
        update(net, optimizer, list(math.sqrt(signal) + noise))
    assert meter is not None
    assert meter.last is not None
    moved = (flat(net) - start) / 1e-3
    found = meter.last.pne2.value / (1e-6 * updates * size)
    assert found == pytest.approx(trace, rel=0.02)
    if where is not None:
        # 5000 displacements know their variance to 2 %. Without injection and at SNR 1 they have less (0.42):
        # noise along the signal raises v too, which a trace with P as it is cannot know.
        assert moved.var().item() / updates == pytest.approx(trace, rel=0.06)
    assert -moved.mean().item() / updates == pytest.approx(drift, abs=0.01)
    share = {None: 0.0, "pre": 15 / 16, "post": 15 / 16}[where]
    assert meter.last.pne2_injected.value == pytest.approx(share * meter.last.pne2.value, rel=0.02)


# A small model with data, for what must agree to the bit or to rounding.


def model(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 3)).double()


def step(
    net: nn.Module, optimizer: Optimizer, n: int = 0, parts: int = 4, meter: Exposure | None = None
) -> None:
    """One update on batch n; `meter` clips."""
    x = random(32, 5, seed=n)
    y = torch.randint(3, (32,), generator=torch.Generator().manual_seed(n))
    optimizer.zero_grad()
    for one, other in zip(x.chunk(parts), y.chunk(parts), strict=True):
        back(cross_entropy(net(one), other) / parts)
    if meter is not None:
        meter.clip_grad_norm_(0.05)
    optimizer.step()


@pytest.mark.parametrize("where", WHERES)
@pytest.mark.parametrize("kind", [AdamW, Adafactor])
def test_it_does_not_matter_which_was_attached_first(kind: Any, where: Where) -> None:
    found = []
    for first in ("meter", "noise"):
        net = model()
        optimizer = kind(net.parameters(), lr=1e-2)
        meter = exposure(net, optimizer, every=2) if first == "meter" else None
        inject(optimizer, gaussian(0.1), where, model=net)
        meter = meter or exposure(net, optimizer, every=2)
        for n in range(5):
            step(net, optimizer, n)
        found.append((flat(net).tolist(), repr(meter.last), repr(meter.rows())))
    assert found[0] == found[1]


@pytest.mark.parametrize("estimator", ["micro", "example"])
def test_noise_in_the_gradient_leaves_what_the_meter_reads_of_the_batch(estimator: Any) -> None:
    """C, clipping and norm as without; P is that of the step, made with the noise, in closed form.

    p = "expected": where this batch put (g + n)^2 into v, the larger of that and C/B + N.
    """
    found, parts = [], 4 if estimator == "micro" else 1
    for scale in (0.0, 2.0):
        net = model()
        optimizer = AdamW(net.parameters(), lr=1e-2, betas=(0.9, 0.9))
        meter = exposure(net, optimizer, every=1, estimator=estimator)
        first = inject(optimizer, gaussian(0.01), "pre", model=net, power=scale)
        second = inject(optimizer, gaussian(0.02), "pre", model=net, power=scale, seed=1)
        std = meter.std()
        step(net, optimizer, 0, parts, meter)
        (event,), _ = meter.rows()
        assert event.clip < 1
        found.append(event)
        total = 0.0
        for k, place in enumerate(first.places):
            g, deviations = place.parameter.grad, std(place)
            assert g is not None
            assert deviations is not None
            seen = g + first.added[k][1] + second.added[k][1] if scale else g
            fed = deviations.square() + scale * (0.01**2 + 0.02**2) - seen.square()
            p = preconditioner(optimizer, place.parameter, fed.clamp_min(0))
            total += (p * deviations / event.clip).square().sum().item()
        assert event.trace_pcp == pytest.approx(total, rel=1e-9)
    for name in ("trace_c", "trace_c_se", "signal_c", "clip", "gradient_norm", "contributions", "batch"):
        assert getattr(found[0], name) == getattr(found[1], name), name
    assert found[1].trace_pcp < 0.9 * found[0].trace_pcp


@pytest.mark.parametrize("kind", [Adam, Adafactor, RMSprop])
def test_examples_and_micro_batches_of_one_agree_about_noise_in_the_gradient(kind: Any) -> None:
    """With rows of a table that no example looked up: there the expected P holds the noise alone."""
    found = []
    for estimator in ("micro", "example"):
        torch.manual_seed(0)
        net = nn.Sequential(nn.Embedding(12, 4), nn.Linear(4, 3)).double()
        optimizer = kind(net.parameters(), lr=1e-2)
        meter = exposure(net, optimizer, every=1, estimator=estimator)
        inject(optimizer, gaussian(0.1), "pre", model=net)
        ids, targets = torch.tensor([1, 2, 3, 3, 5, 5]), torch.tensor([0, 1, 2, 0, 1, 1])
        for n in range(3):
            optimizer.zero_grad()
            rows = (ids + n)[:, None] if estimator == "micro" else (ids + n)[None]
            wanted = targets[:, None] if estimator == "micro" else targets[None]
            for one, other in zip(rows, wanted, strict=True):
                back(cross_entropy(net(one), other) / len(rows))
            optimizer.step()
        assert meter.last is not None
        found.append(meter.last)
    assert found[0].trace.value == pytest.approx(found[1].trace.value, rel=1e-7)
    assert found[0].pne2_injected.value == pytest.approx(found[1].pne2_injected.value, rel=1e-7)


def test_the_jackknife_repeats_the_update_with_its_noise() -> None:
    """SGD: the effective trace of the run without. Adam's first update, drowned in noise, knows no batch."""
    effective = {}
    for scale in (0.0, 1.0):
        net = model()
        optimizer = SGD(net.parameters(), lr=1e-2)
        meter = exposure(net, optimizer, every=1, effective="jackknife")
        inject(optimizer, gaussian(0.3), "pre", model=net, power=scale)
        step(net, optimizer, 0, 4, meter)
        assert meter.last is not None
        assert meter.last.clip < 1
        effective[scale] = meter.last.effective
    assert tuple(effective[0.0]) == pytest.approx(tuple(effective[1.0]), rel=1e-9)
    net = model()
    adam = Adam(net.parameters(), lr=1e-2, eps=0.0)
    meter = exposure(net, adam, every=1, effective="jackknife")
    inject(adam, gaussian(1e3), "pre", model=net)
    step(net, adam)
    assert meter.last is not None
    assert meter.last.effective.value < 1e-9


# What follows the meter.


def test_following_noise_is_scale_times_what_was_measured_last() -> None:
    """SGD, where Tr(PNP) = Tr(N): in every shape four times Tr(C/B), after clipping, of the update before."""
    for shape in ("diagonal", "tensor", "isotropic"):
        net = model()
        optimizer = SGD(net.parameters(), lr=0.1)
        meter = exposure(net, optimizer, every=1)
        inject(optimizer, gaussian(meter.std(scale=4, shape=shape)), model=net)
        injected = []
        for n in range(6):
            step(net, optimizer, n, 4, meter)
            assert meter.last is not None
            injected.append(meter.last.injected.value)
        events = meter.rows()[0]
        assert injected[0] == 0.0
        for before, event, found in zip(events, events[1:], injected[1:], strict=False):
            assert before.clip < 1
            assert found == pytest.approx(4 * before.clip**2 * before.trace_c, rel=1e-9)
            assert event.injected_pne2 == pytest.approx(0.01 * found, rel=1e-9)


def test_following_noise_has_the_shape_of_several_measurements() -> None:
    """In each tensor an average in which an update counts half after 2 more, at the last level."""
    net = model()
    optimizer = SGD(net.parameters(), lr=0.1)
    meter = exposure(net, optimizer, every=1)
    # At a half-life near 0 the last diagonal is all there is.
    latest, smooth = meter.std(half_life=1e-9), meter.std(scale=4, half_life=2)
    flatter = {shape: meter.std(scale=4, half_life=2, shape=shape) for shape in ("tensor", "isotropic")}
    places = [Place(name, p, 0, "") for name, p in net.named_parameters()]
    means = [torch.zeros_like(p) for p in net.parameters()]
    for n in range(6):
        step(net, optimizer, n)
        sums = []
        for k, place in enumerate(places):
            now, found = latest(place), smooth(place)
            assert now is not None
            assert found is not None
            means[k] += max(1 - 0.5**0.5, 1 / (n + 1)) * (now.square() - means[k])
            expected = 4 * means[k] / means[k].sum() * now.square().sum()
            torch.testing.assert_close(found.square(), expected)
            level = flatter["tensor"](place)
            assert level is not None
            torch.testing.assert_close(level.square(), expected.mean())
            sums.append(expected.sum())
        total = torch.stack(sums).sum() / sum(p.numel() for p in net.parameters())
        for place in places:
            assert flatter["isotropic"](place) == pytest.approx(total.sqrt().item(), rel=1e-9)


def test_following_factors_are_the_sample_covariance_across_layers() -> None:
    """Of 3 contributions rank 2 is all of it, clipped as they were; of a lower rank the diagonal is right."""
    net = model()
    optimizer = AdamW(net.parameters(), lr=1e-2)
    meter = exposure(net, optimizer, every=1, p="step")
    full, one = meter.factors(scale=4.0, rank=2), meter.factors(scale=4.0, rank=1)
    rows = []
    for n in range(3):
        optimizer.zero_grad()
        back(cross_entropy(net(random(8, 5, seed=n)), torch.arange(8) % 3) / 3)
        rows.append(torch.cat([p.grad.flatten() for p in net.parameters() if p.grad is not None]))
    optimizer.zero_grad()
    for n in range(3):
        back(cross_entropy(net(random(8, 5, seed=n)), torch.arange(8) % 3) / 3)
    meter.clip_grad_norm_(0.05)
    optimizer.step()
    h = torch.stack(rows)
    assert meter.last is not None
    # Independent contributions h_r = g_r / 3: their sum has variance 3 Var(h).
    covariance = 4 * 3 * meter.last.clip**2 * torch.cov(h.T)
    places = [Place(name, p, 0, "") for name, p in net.named_parameters()]

    def dense(factors: Any) -> Tensor:
        found = [factors(place) for place in places]
        tall = torch.cat([u for u, _, _ in found])
        rest = torch.cat([lam for _, _, lam in found])
        return tall @ found[0][1].diag() @ tall.T + rest.diag()  # type: ignore[no-any-return]

    torch.testing.assert_close(dense(full), covariance, rtol=1e-9, atol=1e-15)
    torch.testing.assert_close(dense(one).diag(), covariance.diag(), rtol=1e-9, atol=1e-15)
    # The one direction holds most of Tr(P C/B P) that one can.
    p = torch.cat([preconditioner(optimizer, q).flatten() for q in net.parameters()])
    largest = torch.linalg.eigvalsh(p[:, None] * covariance * p)[-1].item()
    tall = torch.cat([one(place)[0] for place in places]) * 2  # type: ignore[index]
    assert (p[:, None] * tall).square().sum().item() == pytest.approx(largest, rel=1e-6)


def test_following_factors_inject_scale_times_the_measured_trace() -> None:
    """To rounding, under AdamW and between measurements, because the same P weighs both."""
    net = model()
    optimizer = AdamW(net.parameters(), lr=1e-2)
    meter = exposure(net, optimizer, every=3)
    inject(optimizer, low_rank(meter.factors(scale=4.0, rank=2)), model=net)
    for n in range(9):
        step(net, optimizer, n)
        assert meter.last is not None
        if n % 3:
            assert meter.last.trace.value > 0
            assert meter.last.injected.value == pytest.approx(4 * meter.last.trace.value, rel=1e-9)


def test_an_injection_without_names_follows_all_the_same() -> None:
    """The example of the README: no model is given, so the injection calls parameters by number."""
    net = model()
    optimizer = AdamW(net.parameters(), lr=1e-2)
    meter = exposure(net, optimizer, every=1)
    noise = inject(optimizer, gaussian(std=meter.std(scale=4)), where="post")
    step(net, optimizer)
    step(net, optimizer)
    assert {place.parameter for place in noise.places} == noise.reached
    assert meter.last is not None
    assert meter.last.pne2_injected.value > 0


def test_the_reading_tells_what_was_injected_into_its_own_update() -> None:
    """Not what will be from the next one on, with the covariance just measured; and still after remove()."""
    net = model()
    optimizer = SGD(net.parameters(), lr=0.1)
    meter = exposure(net, optimizer, every=1)
    noise = inject(optimizer, gaussian(meter.std(scale=4)), model=net)
    step(net, optimizer)
    assert meter.last is not None
    assert (meter.last.injected.value, meter.last.pne2_injected.value) == (0, 0)
    step(net, optimizer, 1)
    noise.gains = {"0": 100.0}
    last = meter.last
    assert last is not None
    assert last.injected.value == pytest.approx(100 * last.pne2_injected.value, rel=1e-9)
    # eta Tr(P (C/B + N) P) / (2 Tr P).
    size = sum(p.numel() for p in net.parameters())
    assert last.t_eff.value == pytest.approx(0.1 * (last.trace.value + last.injected.value) / 2 / size)
    noise.remove()
    meter.remove()
    assert meter.last == last


@pytest.mark.parametrize("where", WHERES)
def test_a_run_resumed_anywhere_goes_on_bit_identically(where: Where) -> None:
    """Between measurements, amid swaps and a power that comes and goes, following standard deviations."""

    def attached() -> tuple[nn.Module, Optimizer, Exposure, Injection]:
        net = model()
        optimizer = AdamW(net.parameters(), lr=1e-2)
        meter = exposure(net, optimizer, every=4)
        sources: dict[int, Any] = {
            1: gaussian(meter.std(scale=4, shape="tensor")),
            4: low_rank(meter.factors(scale=2, rank=2)),
            7: student_t(meter.std(scale=4), kind="elliptical"),
            8: gaussian(0.01),
        }
        turns = (0.0, 1.0, 3.0)
        noise = inject(optimizer, sources, where, model=net, power=lambda n: turns[n % 3], seed=3)
        return net, optimizer, meter, noise

    def go(parts: tuple[Any, ...], first: int, last: int) -> None:
        for n in range(first, last):
            if n == 5:
                parts[3].gains = {"2": 2.0}
            step(parts[0], parts[1], n)

    whole = attached()
    go(whole, 0, 10)
    for stop in range(1, 10):
        before, after = attached(), attached()
        go(before, 0, stop)
        for one, other in zip(before, after, strict=True):
            other.load_state_dict(copy.deepcopy(one.state_dict()))  # type: ignore[attr-defined]
        assert repr(after[2].last) == repr(before[2].last)
        go(after, stop, 10)
        assert torch.equal(flat(after[0]), flat(whole[0]))
        assert repr(after[2].last) == repr(whole[2].last)
        assert repr(after[2].rows()) == repr(whole[2].rows())


# What the ledger must not get wrong.


def test_another_injection_in_mid_interval_is_accounted_as_itself() -> None:
    net = model()
    optimizer = SGD(net.parameters(), lr=1e-2)
    meter = exposure(net, optimizer, every=100)
    first = inject(optimizer, gaussian(0.1), model=net)
    step(net, optimizer)
    first.remove()
    second = inject(optimizer, gaussian(1.0), model=net)
    step(net, optimizer, 1)
    assert meter.last is not None
    one = meter.last.injected.value
    (event,), _ = meter.rows()
    assert event.injected_pne == pytest.approx(1e-2 * one * (1 + 0.01), rel=1e-9)
    second.remove()
    step(net, optimizer, 2)
    assert meter.last.injected.value == 0
    assert meter.last.pne2_injected.value == pytest.approx(1e-4 * one * (1 + 0.01), rel=1e-9)


def test_several_injections_add_up_in_the_ledger() -> None:
    net = model()
    optimizer = SGD(net.parameters(), lr=0.1)
    meter = exposure(net, optimizer, every=2)
    inject(optimizer, gaussian(0.1), "pre", model=net)
    inject(optimizer, gaussian(0.2), "pre", model=net, layers="0", seed=1)
    inject(optimizer, gaussian(0.3), "post", model=net, layers="2", seed=2)
    for n in range(3):
        step(net, optimizer, n)
    sizes = [sum(p.numel() for p in layer.parameters()) for layer in (net[0], net[2])]
    expected = 0.01 * (0.05 * sizes[0] + 0.1 * sizes[1])
    assert meter.last is not None
    assert meter.last.pne2_injected.value == pytest.approx(3 * expected, rel=1e-9)
    assert meter.last.clip == 1.0


def test_parameters_that_an_update_did_not_reach_count_for_nothing() -> None:
    net = model()
    optimizer = SGD(net.parameters(), lr=0.1)
    meter = exposure(net, optimizer, every=1)
    inject(optimizer, gaussian(1.0), model=net)
    for x in random(8, 5).chunk(4):
        (net[0](x).square().mean() / 4).backward()
    optimizer.step()
    assert meter.last is not None
    assert meter.last.pne2_injected.value == pytest.approx(0.01 * sum(p.numel() for p in net[0].parameters()))


@pytest.mark.parametrize("estimator", ["norms", "hutchinson", "held_out"])
def test_every_estimator_accounts_for_injections(estimator: Any) -> None:
    """SGD: eta^2 sum of variances, told by tensor or in one number."""
    net = model()
    optimizer = SGD(net.parameters(), lr=0.1)

    def losses(call: Any) -> Tensor:
        return cross_entropy(call(random(8, 5)), torch.arange(8) % 3, reduction="none")

    meter = exposure(net, optimizer, every=1, estimator=estimator, losses=losses, held_out=losses)
    std = {name: random(*p.shape, seed=n).abs() for n, (name, p) in enumerate(net.named_parameters())}
    inject(optimizer, gaussian(std), "pre", model=net)
    for n in range(2):
        step(net, optimizer, n)
    assert meter.last is not None
    expected = 2 * 0.01 * sum(x.square().sum().item() for x in std.values())
    assert meter.last.pne2_injected.value == pytest.approx(expected, rel=1e-9)


def test_where_no_preconditioner_is_known_the_ledger_says_so() -> None:
    """Muon takes noise in gradients; what it displaces is unknown, Tr(N) is not, nor what the batch does."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(5, 8, bias=False), nn.Tanh(), nn.Linear(8, 3, bias=False)).double()
    optimizer = Muon(net.parameters(), lr=0.1)
    meter = exposure(net, optimizer, every=2, effective="jackknife")
    inject(optimizer, gaussian(0.1), "pre", model=net)
    for n in range(3):
        step(net, optimizer, n)
    assert meter.last is not None
    assert math.isnan(meter.last.pne2_injected.value)
    assert math.isnan(meter.last.pne2.value)
    assert meter.last.trace.value > 0
    assert meter.rows()[0][0].injected_ne == pytest.approx(2 * 0.01 * 0.01 * 64, rel=1e-9)


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("where", WHERES)
def test_a_skipped_update_leaves_no_entry(where: Where, fused: bool) -> None:
    """Of a loss scaled by 1024, where update 3 overflows: the ledger of a run in plain numbers without it."""
    found = []
    for scaled in (False, True):
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 3))
        optimizer = AdamW(net.parameters(), lr=1e-2, fused=fused)
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, enabled=scaled)
        meter = exposure(net, optimizer, every=2, scaler=scaler)
        inject(optimizer, gaussian(meter.std(scale=4)), where, model=net)
        for n in range(6):
            if n == 2 and not scaled:
                continue
            optimizer.zero_grad()
            for x in random(8, 5, seed=n).float().chunk(4):
                scaler.scale(net(x).square().mean() * (math.inf if n == 2 else 0.25)).backward()
            scaler.step(optimizer)
            scaler.update()
        found.append((flat(net).tolist(), meter.rows()[0]))
    assert found[0][0] == found[1][0]
    for one, other in zip(found[0][1], found[1][1], strict=True):
        assert (one.step, one.updates) == (other.step, other.updates)
        assert one.injected_pne2 == pytest.approx(other.injected_pne2, rel=1e-6)
    assert found[0][1][-1].injected_pne2 > 0


def _factors_of_examples() -> None:
    net = model()
    optimizer = SGD(net.parameters(), lr=0.1)
    meter = exposure(net, optimizer, every=1)
    inject(optimizer, low_rank(meter.factors()), model=net)
    step(net, optimizer, parts=1)


def _meter(kind: type[Optimizer] = SGD, **options: Any) -> Exposure:
    net = nn.Linear(70, 70, bias=False)
    return exposure(net, kind(net.parameters(), lr=0.1), **options)  # type: ignore[call-arg]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: _meter().std(scale=-1.0), "scale: -1.0: must be 0 or more"),
        (lambda: _meter().std(scale=math.inf), "scale: inf: must be 0 or more, and finite"),
        (lambda: _meter().std(shape="full"), "shape: full: must be diagonal, tensor or isotropic"),  # type: ignore[arg-type]
        (lambda: _meter().std(half_life=0.0), "half_life: 0.0: must be above 0 measured updates"),
        (lambda: _meter(share=0.9).std(), "estimator: auto: sees no whole diagonal"),
        (lambda: _meter(estimator="norms").std(), "estimator: norms: sees no whole diagonal: take micro"),
        (lambda: _meter(Muon, effective="jackknife").std(), "optimizer: Muon: .* sees no diagonal"),
        (lambda: _meter().factors(rank=0), "rank: 0: must be at least 1"),
        (lambda: _meter().factors(scale=math.nan), "scale: nan"),
        (lambda: _meter(estimator="example").factors(), "factors: example: needs micro-batches"),
        (_factors_of_examples, r"factors: example: needs two or more backward\(\) calls an update"),
    ],
)
def test_what_cannot_be_followed_is_refused(call: Callable[[], object], message: str) -> None:
    """Above all factors of an update of one backward(), whose contributions are not there to be read."""
    with pytest.raises(InputError, match=message):
        call()
