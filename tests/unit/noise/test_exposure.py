import copy
import math

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from gradnoise import exposure
from gradnoise.base.errors import InputError
from gradnoise.noise.estimators import diagonal, gram, trace
from gradnoise.noise.exposure import Exposure
from gradnoise.noise.integrals import Event, integrate
from gradnoise.noise.preconditioners import preconditioner


def model(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 3)).double()


def data(count: int = 32, seed: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
    draw = torch.Generator().manual_seed(seed)
    inputs = torch.randn(count, 5, dtype=torch.float64, generator=draw)
    return inputs, torch.randint(3, (count,), generator=draw)


def step(
    net: nn.Module, optimizer: torch.optim.Optimizer, parts: int, batch: int = 32, seed: int = 1
) -> None:
    inputs, targets = data(batch, seed)
    for x, y in zip(inputs.chunk(parts), targets.chunk(parts), strict=True):
        (cross_entropy(net(x), y) / parts).backward()
    optimizer.step()
    optimizer.zero_grad()


def per_example(net: nn.Module, inputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Gradients of single examples by torch.func, the independent way."""
    parameters = {name: p.detach() for name, p in net.named_parameters()}

    def loss(values: dict[str, torch.Tensor], x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return cross_entropy(torch.func.functional_call(net, values, x[None]), y[None])

    gradients = torch.func.vmap(torch.func.grad(loss), (None, 0, 0))(parameters, inputs, targets)
    return torch.cat([gradients[name].flatten(1) for name in parameters], 1)


def test_micro_batches_of_one_give_the_trace_of_the_sample_covariance() -> None:
    """Closed form: Tr(P C/B P) = sum over parameters of P^2 Var(g_b) / B."""
    net = model()
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-2)
    meter = exposure(net, optimizer, every=1, p="step")
    examples = per_example(net, *data())
    step(net, optimizer, parts=32)
    p = torch.cat([preconditioner(optimizer, q).flatten() for q in net.parameters()])
    expected = (p.square() * examples.var(0)).sum().item() / 32
    assert meter.last is not None
    assert meter.last.trace.value == pytest.approx(expected, rel=1e-10)
    assert meter.last.ne.value == pytest.approx(1e-4 * examples.var(0).sum().item() / 32, rel=1e-10)
    assert sum(t.trace_pcp for t in meter.tensors) == pytest.approx(meter.last.trace.value, rel=1e-10)


def test_the_expected_preconditioner_bounds_every_coordinate() -> None:
    """P^2 C/B <= (1 - beta2^t) / (1 - beta2): one update of noise a coordinate at step 1, beta2 = 0.9."""
    net = model()
    optimizer = torch.optim.Adam(net.parameters(), lr=1e-2, betas=(0.9, 0.9), eps=1e-30)
    meter = exposure(net, optimizer, every=1)
    size = sum(p.numel() for p in net.parameters())
    for n in range(1, 6):
        step(net, optimizer, parts=8, seed=n)
        assert meter.last is not None
        assert 0 < meter.last.trace.value <= size * (1 - 0.9**n) / (1 - 0.9)


def test_the_preconditioner_is_that_of_the_step_taken() -> None:
    """Adam's first step moves every weight by lr * g * P."""
    net = model()
    optimizer = torch.optim.Adam(net.parameters(), lr=1e-3, eps=1e-3)
    before = [p.detach().clone() for p in net.parameters()]
    inputs, targets = data()
    cross_entropy(net(inputs), targets).backward()
    gradients = [p.grad.clone() for p in net.parameters() if p.grad is not None]
    optimizer.step()
    for old, new, g in zip(before, net.parameters(), gradients, strict=True):
        torch.testing.assert_close(new.detach(), old - 1e-3 * preconditioner(optimizer, new) * g)


def test_the_estimate_is_unbiased_for_every_number_of_parts() -> None:
    """Over random splits of random batches, plain SGD (P = 1): the truth is Var(g)/B over the population."""
    net = model()
    inputs, targets = data(4096, seed=3)
    examples = per_example(net, inputs, targets)
    truth = examples.var(0).sum().item() / 32
    draw = torch.Generator().manual_seed(4)
    for parts in (2, 4, 8, 16, 32):
        found = []
        for _ in range(300):
            rows = examples[torch.randint(4096, (32,), generator=draw)]
            contributions = torch.stack([chunk.sum(0) / 32 for chunk in rows.chunk(parts)])
            found.append(trace(gram(contributions)).value)
        mean, stderr = torch.tensor(found).mean().item(), torch.tensor(found).std().item() / math.sqrt(300)
        assert abs(mean - truth) < 4 * stderr, parts


def test_the_jackknife_error_covers() -> None:
    """Standard errors against the spread of repeated estimates, and 90 % intervals against the truth."""
    draw = torch.Generator().manual_seed(0)
    contributions = torch.randn(2000, 8, 200, generator=draw, dtype=torch.float64)
    found = [trace(gram(rows)) for rows in contributions]
    values = torch.tensor([estimate.value for estimate in found])
    errors = torch.tensor([estimate.stderr for estimate in found])
    assert errors.square().mean().sqrt().item() == pytest.approx(values.std().item(), rel=0.15)
    covered = ((values - 8 * 200).abs() < 1.895 * errors).double().mean().item()  # t(7), 90 %
    assert 0.85 <= covered <= 0.95


def test_identical_contributions_have_no_noise_and_two_have_no_error() -> None:
    rows = torch.ones(4, 10)
    assert trace(gram(rows)).value == pytest.approx(0.0, abs=1e-12)
    assert math.isnan(trace(gram(torch.randn(2, 10))).stderr)


def test_the_diagonal_is_the_variance_of_each_coordinate() -> None:
    rows = torch.randn(8, 50, generator=torch.Generator().manual_seed(0), dtype=torch.float64) + 3
    torch.testing.assert_close(diagonal(rows), 8 * rows.var(0))
    assert (diagonal(torch.full((8, 50), 0.1)) >= 0).all()


def test_measuring_leaves_the_trajectory_alone() -> None:
    plain, measured = model(), model()
    optimizers = [torch.optim.AdamW(net.parameters(), lr=1e-2) for net in (plain, measured)]
    exposure(measured, optimizers[1], every=2)
    for n in range(5):
        step(plain, optimizers[0], parts=4, seed=n)
        step(measured, optimizers[1], parts=4, seed=n)
    assert all(torch.equal(a, b) for a, b in zip(plain.parameters(), measured.parameters(), strict=True))


def test_every_update_is_covered_once_whatever_the_stride() -> None:
    for every in (1, 3, 10):
        net = model()
        optimizer = torch.optim.AdamW(net.parameters(), lr=1e-2, weight_decay=0.1)
        meter = exposure(net, optimizer, every)
        rates = [1e-2 * (1 - n / 10) for n in range(10)]
        for n, rate in enumerate(rates):
            optimizer.param_groups[0]["lr"] = rate
            step(net, optimizer, parts=4 if meter.due else 1, seed=n)
        before = meter.reading()
        meter.remove()
        assert integrate(meter.events) == before
        assert [event.step for event in meter.events] == list(range(1, 11, every))
        assert sum(event.updates for event in meter.events) == 10
        assert sum(event.sum_lr for event in meter.events) == pytest.approx(sum(rates))
        assert sum(event.sum_lr2 for event in meter.events) == pytest.approx(sum(r * r for r in rates))
        # Within one event nothing is forgotten yet.
        assert (before["retained"].value < before["pne2"].value) == (every < 10)


def test_single_backward_steps_are_skipped_not_guessed() -> None:
    net = model()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    meter = exposure(net, optimizer, every=3)
    step(net, optimizer, parts=1)
    assert meter.last is None
    assert meter.skipped == 1
    assert [meter.due, *(step(net, optimizer, parts=2) or meter.due for _ in range(2))] == [
        False,
        False,
        True,
    ]
    step(net, optimizer, parts=2)
    assert meter.last is not None
    assert meter.last.step == 4


def test_clipping_is_torchs_and_remembered() -> None:
    net, twin = model(), model()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    meter = exposure(net, optimizer, every=1)
    inputs, targets = data()
    for x, y in zip(inputs.chunk(4), targets.chunk(4), strict=True):
        (cross_entropy(net(x), y) / 4).backward()
        (cross_entropy(twin(x), y) / 4).backward()
    norm = torch.nn.utils.clip_grad_norm_(twin.parameters(), 0.01)
    assert torch.equal(meter.clip_grad_norm_(0.01), norm)
    assert all(torch.equal(a.grad, b.grad) for a, b in zip(net.parameters(), twin.parameters(), strict=True))  # type: ignore[arg-type]
    optimizer.step()
    meter.remove()
    assert meter.events[0].clip == pytest.approx(0.01 / norm.item(), rel=1e-3)


def test_scaling_the_loss_scales_sgd_noise_by_the_square() -> None:
    found = []
    for factor in (1.0, 3.0):
        net = model()
        optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
        meter = exposure(net, optimizer, every=1)
        inputs, targets = data()
        for x, y in zip(inputs.chunk(4), targets.chunk(4), strict=True):
            (factor * cross_entropy(net(x), y) / 4).backward()
        optimizer.step()
        assert meter.last is not None
        found.append(meter.last.trace.value)
    assert found[1] == pytest.approx(9 * found[0], rel=1e-12)


def test_pne2_of_adam_is_invariant_under_square_root_scaling_and_pne_is_not() -> None:
    """eta and batch noise scaled together: E_2 counts the same diffusion, E_1 falls as 1/sqrt(kappa)."""
    event = Event(1, 1, 0.1, 0.1, 0.01, 0.0, 8, 1.0, 2.0, 0.1, 3.0, 0.1, 1.0, 1.0)
    base = integrate([event] * 64)
    kappa = 4
    scaled = Event(1, 1, 0.2, 0.2, 0.04, 0.0, 8, 1.0, 2.0, 0.1, 3.0, 0.1, 1.0, 1.0)
    fewer = integrate([scaled] * (64 // kappa))
    assert fewer["pne2"].value == pytest.approx(base["pne2"].value)
    assert fewer["pne"].value == pytest.approx(base["pne"].value / math.sqrt(kappa))


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (
            lambda net: torch.optim.Adagrad(net.parameters(), lr=0.1),
            "Adagrad: the preconditioner is known for",
        ),
        (
            lambda net: torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9),
            "SGD: the preconditioner is known",
        ),
        (
            lambda net: torch.optim.SGD(
                [{"params": [p], "lr": 0.1 * (n + 1)} for n, p in enumerate(net.parameters())]
            ),
            "groups of different lr: give all parameter groups one lr",
        ),
    ],
)
def test_what_cannot_be_measured_is_refused(build: object, message: str) -> None:
    net = model()
    optimizer = build(net)  # type: ignore[operator]
    exposure(net, optimizer, every=1)
    with pytest.raises(InputError, match=message):
        step(net, optimizer, parts=4)


def test_a_foreign_parameter_and_a_stride_of_zero_are_refused() -> None:
    net = model()
    with pytest.raises(InputError, match="give the model that it trains"):
        exposure(net, torch.optim.SGD(copy.deepcopy(net).parameters(), lr=0.1))
    with pytest.raises(InputError, match="every: 0: must be at least 1"):
        exposure(net, torch.optim.SGD(net.parameters(), lr=0.1), every=0)
    with pytest.raises(InputError, match="estimator: norms: must be auto or micro"):
        exposure(net, torch.optim.SGD(net.parameters(), lr=0.1), estimator="norms")  # type: ignore[arg-type]


def _ratios(clip: float | None) -> dict[str, dict[int, float]]:
    """Mean of clip^2 x trace over the variance of Adam's updates over resampled batches, by p and step."""
    ratios: dict[str, dict[int, float]] = {"expected": {}, "step": {}}
    inputs, targets = data(2048, seed=5)
    draw = torch.Generator().manual_seed(6)

    def update(
        net: nn.Module, optimizer: torch.optim.Optimizer, rows: torch.Tensor, meter: Exposure | None
    ) -> None:
        for part in rows.chunk(8):
            (cross_entropy(net(inputs[part]), targets[part]) / 8).backward()
        if clip is not None:
            if meter is None:
                nn.utils.clip_grad_norm_(net.parameters(), clip)
            else:
                meter.clip_grad_norm_(clip)
        optimizer.step()
        optimizer.zero_grad()

    for measured in (1, 10, 60):
        net = model()
        # Without a first moment, so that an update is the noise of one batch.
        optimizer = torch.optim.Adam(net.parameters(), lr=1e-3, betas=(0.0, 0.99))
        for _ in range(measured - 1):
            update(net, optimizer, torch.randint(2048, (32,), generator=draw), None)
        updates: list[torch.Tensor] = []
        estimates: dict[str, list[float]] = {"expected": [], "step": []}
        for _ in range(60):
            rows = torch.randint(2048, (32,), generator=draw)
            for kind, found in estimates.items():
                twin, twins_optimizer = copy.deepcopy((net, optimizer))
                before = torch.cat([p.detach().flatten() for p in twin.parameters()])
                meter = exposure(twin, twins_optimizer, every=1, p=kind)  # type: ignore[arg-type]
                update(twin, twins_optimizer, rows, meter)
                meter.remove()
                found.append(meter.events[0].clip ** 2 * meter.events[0].trace_pcp)
            updates.append((torch.cat([p.detach().flatten() for p in twin.parameters()]) - before) / 1e-3)
        truth = torch.stack(updates).var(0).sum().item()
        for kind, values in estimates.items():
            ratios[kind][measured] = torch.tensor(values).mean().item() / truth
    return ratios


@pytest.mark.parametrize("clip", [None, 0.02])
def test_the_trace_is_the_variance_of_the_update_from_the_first_step_on(clip: float | None) -> None:
    """Clipped or not. At step 1 the plug-in P of the step has no mean (P = 1/|g|) and is far off."""
    ratios = _ratios(clip)
    assert all(0.6 < ratio < 1.3 for ratio in ratios["expected"].values()), ratios
    assert ratios["step"][1] > 10, ratios
    assert 0.6 < ratios["step"][60] < 1.5, ratios


def test_a_backward_whose_gradient_was_thrown_away_does_not_count() -> None:
    found = []
    for probes in (0, 3):
        net = model()
        optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
        meter = exposure(net, optimizer, every=1)
        for n in range(probes):
            x, y = data(8, seed=n)
            cross_entropy(net(x), y).backward()
            optimizer.zero_grad()
        step(net, optimizer, parts=4)
        assert meter.last is not None
        found.append(meter.last.trace)
    assert found[0] == found[1]


def test_gradients_changed_behind_the_meter_are_refused() -> None:
    """Another's clipping or loss scaling would be read as noise."""
    net = model()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    exposure(net, optimizer, every=1)
    inputs, targets = data()
    for x, y in zip(inputs.chunk(4), targets.chunk(4), strict=True):
        (cross_entropy(net(x), y) / 4).backward()
    nn.utils.clip_grad_norm_(net.parameters(), 0.01)
    with pytest.raises(InputError, match="not the sum of this step's backward.. calls: clip with meter"):
        optimizer.step()


def test_the_ledger_is_the_events_as_a_frame() -> None:
    net = model()
    optimizer = torch.optim.Adam(net.parameters(), lr=1e-2, weight_decay=0.1, decoupled_weight_decay=True)
    meter = exposure(net, optimizer, every=2)
    for n in range(4):
        step(net, optimizer, parts=4, seed=n)
    ledger = meter.ledger
    assert ledger["step"].tolist() == [1, 3]
    assert ledger["updates"].sum() == 4
    assert (ledger["log_retention"] < 0).all()
    assert (ledger["sum_lr2"] * ledger["trace_pcp"]).sum() == pytest.approx(meter.reading()["pne2"].value)
