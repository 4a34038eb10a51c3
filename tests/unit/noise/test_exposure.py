import copy
import math
from collections.abc import Callable, Iterator
from pathlib import Path

import pandas as pd
import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from gradnoise import exposure
from gradnoise.base.errors import InputError
from gradnoise.noise.exposure import Exposure
from gradnoise.noise.integrals import integrate
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
    parts = meter.ledger_by_part
    for kind in ("layer", "class", "tensor"):
        total = parts[parts["kind"] == kind]["trace_pcp"].sum()
        assert total == pytest.approx(meter.last.trace.value, rel=1e-10)


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


def test_rows_that_one_contribution_touched_are_read_as_they_are() -> None:
    """A rare token's noise is its gradient: nothing is to be expected beyond what v was fed."""
    found = {}
    for p in ("expected", "step"):
        torch.manual_seed(0)
        net = nn.Sequential(nn.Embedding(8, 4), nn.Linear(4, 3)).double()
        optimizer = torch.optim.AdamW(net.parameters(), lr=1e-2)
        meter = exposure(net, optimizer, every=1, p=p)
        for token in range(8):
            (cross_entropy(net(torch.tensor([token])), torch.tensor([token % 3])) / 8).backward()
        optimizer.step()
        assert meter.last is not None
        found[p] = meter.last.by_class
    assert found["expected"]["embedding"].trace.value == pytest.approx(found["step"]["embedding"].trace.value)
    assert found["expected"]["matrix"].trace.value < found["step"]["matrix"].trace.value


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
        before = {name: estimate for name, estimate in meter.reading().items() if name != "pne_star"}
        meter.remove()
        after = integrate(meter.events)
        assert math.isnan(after.pop("pne_star").value)  # no curvature was asked for
        assert after == before
        assert [event.step for event in meter.events] == list(range(1, 11, every))
        assert sum(event.updates for event in meter.events) == 10
        assert sum(event.sum_lr for event in meter.events) == pytest.approx(sum(rates))
        assert sum(event.sum_lr2 for event in meter.events) == pytest.approx(sum(r * r for r in rates))
        # Within one event nothing is forgotten yet.
        assert (before["retained"].value < before["pne2"].value) == (every < 10)


def test_exposure_per_token_counts_what_the_model_was_given() -> None:
    """Token ids (B, T) of 4 micro-batches, measured at one update in two and held for the other."""
    net = nn.Sequential(nn.Embedding(7, 4), nn.Linear(4, 7)).double()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    meter = exposure(net, optimizer, every=2)
    for _ in range(4):
        for n in range(4):
            ids = (torch.arange(10).view(2, 5) + n) % 7
            (cross_entropy(net(ids).flatten(0, 1), ids.flatten().roll(1)) / 4).backward()
        optimizer.step()
        optimizer.zero_grad()
    last = meter.last
    assert last is not None
    assert (last.sequences, last.tokens) == (4 * 8, 4 * 40)
    assert last.per_token("pne").value == pytest.approx(last.pne.value / 160)
    assert last.per_token("pne").stderr == pytest.approx(last.pne.stderr / 160)


def test_a_schedule_is_any_function_of_the_step() -> None:
    net = model()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    meter = exposure(net, optimizer, every=lambda n: n in (2, 3, 7))
    for _ in range(8):
        step(net, optimizer, parts=4)
    meter.remove()
    assert [(event.step, event.updates) for event in meter.events] == [(2, 1), (3, 4), (7, 2)]


def test_single_backward_steps_are_skipped_by_micro_and_read_by_auto() -> None:
    for estimator, read in (("micro", False), ("auto", True)):
        net = model()
        optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
        meter = exposure(net, optimizer, every=3, estimator=estimator)
        step(net, optimizer, parts=1)
        assert (meter.last is not None) == read
        assert meter.skipped == (not read)
        for due in (False, True):
            step(net, optimizer, parts=2)
            assert meter.due == due
        step(net, optimizer, parts=2)
        assert meter.last is not None
        assert (meter.last.step, meter.last.estimator) == (4, "micro")


def test_auto_looks_at_the_first_eight_examples_of_a_single_call() -> None:
    """Against per-example gradients by torch.func, about the whole batch's mean, P read after the step."""
    net = model()
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-2)
    meter = exposure(net, optimizer, every=1, p="step")
    examples = per_example(net, *data())
    step(net, optimizer, parts=1)
    p = torch.cat([preconditioner(optimizer, q).flatten() for q in net.parameters()])
    distances = ((examples[:8] - examples.mean(0)) * p).square().sum(1)
    assert meter.last is not None
    assert (meter.last.estimator, meter.last.contributions) == ("example", 8)
    assert meter.last.trace.value == pytest.approx(distances.mean().item() / 32 / (1 - 1 / 32), rel=1e-10)


def test_auto_needs_no_known_layers_where_micro_batches_are_accumulated() -> None:
    net = nn.Sequential(nn.Conv1d(1, 4, 3), nn.Flatten(), nn.Linear(12, 3)).double()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    meter = exposure(net, optimizer, every=1)
    inputs, targets = data()
    for x, y in zip(inputs[:, None].chunk(4), targets.chunk(4), strict=True):
        (cross_entropy(net(x), y) / 4).backward()
    optimizer.step()
    optimizer.zero_grad()
    assert meter.last is not None
    # The update after the first one of a single call is the first to be listened to for examples.
    for _ in range(2):
        cross_entropy(net(inputs[:, None]), targets).backward()
        if meter.skipped == 0:
            optimizer.step()
            optimizer.zero_grad()
    with pytest.raises(InputError, match=r"0 \(Conv1d\): is not one of Linear, .* accumulate micro-batches"):
        optimizer.step()


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


@pytest.mark.parametrize(
    ("build", "options", "message"),
    [
        (
            lambda ps: torch.optim.Adagrad(ps, lr=0.1),
            {},
            "Adagrad: its preconditioner is not a known diagonal one .* take effective='jackknife'",
        ),
        (
            lambda ps: torch.optim.SGD(ps, lr=0.1),
            {"estimator": "norm"},
            "estimator: norm: must be auto, norms, micro, example, hutchinson or held_out",
        ),
        (lambda ps: torch.optim.SGD(ps, lr=0.1), {"p": "old"}, "p: old: must be expected, step or state"),
        (lambda ps: torch.optim.SGD(ps, lr=0.1), {"share": 0.0}, "share: 0.0: must be above 0 and at most 1"),
        (lambda ps: torch.optim.SGD(ps, lr=0.1), {"probes": 1}, "probes: 1: must be at least 2"),
        (
            lambda ps: torch.optim.SGD(ps, lr=0.1),
            {"estimator": "hutchinson"},
            "losses: None: give a function of the model that returns one loss an example",
        ),
        (
            lambda ps: torch.optim.SGD(ps, lr=0.1),
            {"estimator": "example", "effective": "jackknife"},
            "effective: jackknife: needs micro-batches",
        ),
        (
            lambda ps: torch.optim.SGD(ps, lr=0.1),
            {"estimator": "norms", "p": "step"},
            "p: step: estimator norms has the P of the step before only",
        ),
    ],
)
def test_what_cannot_be_measured_is_refused_at_once(
    build: Callable[[Iterator[nn.Parameter]], torch.optim.Optimizer],
    options: dict[str, object],
    message: str,
) -> None:
    net = model()
    with pytest.raises(InputError, match=message):
        exposure(net, build(net.parameters()), every=1, **options)


def test_a_foreign_parameter_and_a_stride_of_zero_are_refused() -> None:
    net = model()
    with pytest.raises(InputError, match="give the model that it trains"):
        exposure(net, torch.optim.SGD(copy.deepcopy(net).parameters(), lr=0.1))
    with pytest.raises(InputError, match="every: 0: must be at least 1"):
        exposure(net, torch.optim.SGD(net.parameters(), lr=0.1), every=0)


def test_groups_of_different_learning_rates_are_summed_each_by_its_own() -> None:
    """pne2 of the whole is the sum of that of meters which see one group each."""
    rates = (0.1, 0.03)
    net = model()
    groups = [
        {"params": list(net[n].parameters()), "lr": rate} for n, rate in zip((0, 2), rates, strict=True)
    ]
    optimizer = torch.optim.SGD(groups)
    meter = exposure(net, optimizer, every=2)
    for n in range(4):
        step(net, optimizer, parts=4, seed=n)
    meter.remove()
    first, second = (
        sum(rate**2 * 2 * part.trace_pcp for part in meter.parts if part.part == name)
        for name, rate in zip(("0", "2"), rates, strict=True)
    )
    assert meter.reading()["pne2"].value == pytest.approx(first + second, rel=1e-12)
    assert meter.last is not None
    assert meter.last.by_layer["2"].pne2.value == pytest.approx(second, rel=1e-12)


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


def accumulate(net: nn.Module, parts: int = 4) -> None:
    inputs, targets = data()
    for x, y in zip(inputs.chunk(parts), targets.chunk(parts), strict=True):
        (cross_entropy(net(x), y) / parts).backward()


def test_clipping_by_others_is_noticed() -> None:
    """A trainer that clips by total norm by itself: the factor is read off the gradients."""
    net = model()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    meter = exposure(net, optimizer, every=1)
    accumulate(net)
    norm = nn.utils.clip_grad_norm_(net.parameters(), 0.01).item()
    optimizer.step()
    assert meter.last is not None
    assert meter.last.clip == pytest.approx(0.01 / (norm + 1e-6), rel=1e-9)
    assert meter.last.clip_rate == 1.0
    assert meter.last.effective.value == pytest.approx(meter.last.clip**2 * meter.last.trace.value)


@pytest.mark.parametrize("how", ["by value", "by layer", "rescaled", "replaced"])
def test_gradients_changed_behind_the_meter_are_refused(how: str) -> None:
    """Whatever is not one factor of at most 1 would be read as noise."""
    net = model()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    exposure(net, optimizer, every=1)
    accumulate(net)
    parameters = list(net.parameters())
    if how == "by value":
        nn.utils.clip_grad_value_(parameters, 0.01)
    for n, parameter in enumerate(parameters):
        assert parameter.grad is not None
        if how == "by layer":
            parameter.grad *= 0.5 if n else 1.0
        elif how == "rescaled":
            parameter.grad *= 3.0
        elif how == "replaced":
            parameter.grad = torch.ones_like(parameter)
    with pytest.raises(InputError, match="backward\\(\\) calls: .*change gradients in no other way"):
        optimizer.step()


def test_muon_is_measured_by_the_jackknife_alone() -> None:
    """Its update is that of the optimizer itself; noise falls with the batch."""
    found = []
    for batch in (8, 64):
        net = nn.Sequential(nn.Linear(5, 8, bias=False), nn.Tanh(), nn.Linear(8, 3, bias=False))
        torch.manual_seed(0)
        for parameter in net.parameters():
            nn.init.normal_(parameter)
        optimizer = torch.optim.Muon(net.parameters(), lr=0.01)
        meter = exposure(net, optimizer, every=1, effective="jackknife")
        inputs, targets = data(batch)
        for x, y in zip(inputs.float().chunk(4), targets.chunk(4), strict=True):
            (cross_entropy(net(x), y) / 4).backward()
        optimizer.step()
        assert meter.last is not None
        assert meter.last.preconditioner == "none"
        assert meter.last.trace == meter.last.effective
        assert math.isnan(meter.last.t_eff.value)
        found.append(meter.last.trace.value)
    assert found[0] > found[1] > 0


def test_coordinates_can_be_sampled_without_bias() -> None:
    """`share`: mean over draws of coordinates is the whole trace, and the error says how far one is off."""
    net = nn.Linear(200, 60)
    inputs, targets = torch.randn(32, 200, generator=torch.Generator().manual_seed(0)), data()[1]
    readings = []
    for seed, share in ((0, 1.0), *((seed, 0.4) for seed in range(40))):
        twin = copy.deepcopy(net)
        optimizer = torch.optim.SGD(twin.parameters(), lr=0.1)
        meter = exposure(twin, optimizer, every=1, share=share, seed=seed)
        for x, y in zip(inputs.chunk(4), targets.chunk(4), strict=True):
            (cross_entropy(twin(x), y) / 4).backward()
        optimizer.step()
        assert meter.last is not None
        readings.append(meter.last.trace)
    whole, sampled = readings[0], torch.tensor([reading.value for reading in readings[1:]])
    spread = sampled.std().item()
    assert sampled.mean().item() == pytest.approx(whole.value, abs=4 * spread / 40**0.5)
    added = readings[1].stderr ** 2 - whole.stderr**2
    assert 0.5 * spread < math.sqrt(max(added, 0.0) + spread**2 * 0.5) < 2 * spread


def test_norms_sum_to_what_micro_sums_to() -> None:
    """Over many updates of SGD (whose P has no history to be late with) blocks add up to the whole."""
    totals = {}
    for estimator in ("micro", "norms"):
        layers = (nn.Linear(5, 400), nn.Tanh(), nn.Linear(400, 100), nn.Tanh(), nn.Linear(100, 3))
        net = nn.Sequential(*layers)
        torch.manual_seed(1)
        for parameter in net.parameters():
            nn.init.normal_(parameter, std=0.1)
        optimizer = torch.optim.SGD(net.parameters(), lr=0.05)
        meter = exposure(net, optimizer, every=1, estimator=estimator)
        for n in range(150):
            inputs, targets = data(32, n)
            for x, y in zip(inputs.float().chunk(4), targets.chunk(4), strict=True):
                (cross_entropy(net(x), y) / 4).backward()
            meter.clip_grad_norm_(1.0)
            optimizer.step()
            optimizer.zero_grad()
        assert meter.last is not None
        assert len(meter.ledger) == 150
        totals[estimator] = meter.last.pne2
    exact, sampled = totals["micro"].value, totals["norms"]
    assert sampled.value == pytest.approx(exact, abs=4 * sampled.stderr)
    assert sampled.stderr < 0.5 * exact


def test_without_replacement_there_is_less_noise() -> None:
    """A batch of all there is has none; half of it has half (1 - B/N)."""
    found = {}
    for population in (None, 64):
        net = model()
        optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
        meter = exposure(net, optimizer, every=1, population=population)
        step(net, optimizer, parts=4)
        assert meter.last is not None
        found[population] = meter.last
    assert found[64].trace.value == pytest.approx(found[None].trace.value / 2)
    assert found[64].trace.stderr == pytest.approx(found[None].trace.stderr / 2)
    assert found[64].per_epoch("pne2").value == pytest.approx(2 * found[64].pne2.value)
    assert math.isnan(found[None].per_epoch("pne2").value)
    net = model()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    exposure(net, optimizer, every=1, population=20)
    with pytest.raises(InputError, match="population: 20: is less than the batch of 32"):
        step(net, optimizer, parts=4)


def test_held_out_data_gives_the_covariance_of_other_data() -> None:
    """On the very batch of the update it is what micro reads, up to its own splitting."""
    net = model()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    inputs, targets = data()

    def losses(net: Callable[..., torch.Tensor]) -> torch.Tensor:
        return cross_entropy(net(inputs), targets, reduction="none")

    twin = copy.deepcopy(net)
    twins = torch.optim.SGD(twin.parameters(), lr=0.0)
    held = exposure(twin, twins, every=1, estimator="held_out", held_out=losses)
    micro = exposure(net, optimizer, every=1)
    step(twin, twins, parts=1)
    step(net, optimizer, parts=8)
    assert held.last is not None
    assert micro.last is not None
    assert held.last.trace.value == pytest.approx(micro.last.trace.value, rel=1e-9)


def test_unequal_numbers_of_tokens_are_weighted() -> None:
    """A mean over tokens, its micro-batches of 4 to 16 tokens: each counts with its share of them."""
    net = model()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    meter = exposure(net, optimizer, every=1)
    inputs, targets = data(40)
    sizes = [4, 6, 14, 16]
    rows = []
    for x, y in zip(inputs.split(sizes), targets.split(sizes), strict=True):
        meter.count(len(x))
        (cross_entropy(net(x), y, reduction="sum") / 40).backward()
        rows.append(per_example(net, x, y).sum(0) / 40)
    optimizer.step()
    h, w = torch.stack(rows), torch.tensor(sizes).double() / 40
    expected = (h - w[:, None] * h.sum(0)).square().sum() / (1 - w.square().sum())
    assert meter.last is not None
    assert meter.last.trace.value == pytest.approx(expected.item(), rel=1e-9)


def test_a_resumed_meter_goes_on_as_if_never_stopped(tmp_path: Path) -> None:
    def run(stop: int | None) -> Exposure:
        net = model()
        optimizer = torch.optim.AdamW(net.parameters(), lr=1e-2)
        options = {"curvature": "mc_fisher", "curvature_every": 2, "tails": True, "sketch": 16}
        meter = exposure(net, optimizer, every=3, **options)
        for n in range(20):
            if n == stop:
                torch.save(meter.state_dict(), tmp_path / "meter.pt")
                meter.remove()
                meter = exposure(net, optimizer, every=3, **options)
                meter.load_state_dict(torch.load(tmp_path / "meter.pt", weights_only=True))
            meter.observe(1.0 / (n + 1))
            step(net, optimizer, parts=8, seed=n)
            if n % 2:
                optimizer.param_groups[0]["lr"] *= 0.9
        return meter

    whole = run(None)
    for stop in (1, 6, 11, 18):
        resumed = run(stop)
        assert repr(resumed.last) == repr(whole.last)
        assert repr(resumed.events) == repr(whole.events)
        pd.testing.assert_frame_equal(resumed.ledger_by_part, whole.ledger_by_part)


def test_removal_leaves_no_trace() -> None:
    net = model()
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-2)
    meter = exposure(net, optimizer, every=1, estimator="example", curvature="kfac")
    step(net, optimizer, parts=1)
    meter.remove()
    modules = list(net.modules())
    assert not any(m._forward_hooks or m._forward_pre_hooks or m._backward_hooks for m in modules)
    assert not any(p._backward_hooks for p in net.parameters())
    assert not optimizer._optimizer_step_pre_hooks
    assert not optimizer._optimizer_step_post_hooks
    reading = meter.last
    step(net, optimizer, parts=1)
    assert meter.last == reading or repr(meter.last) == repr(reading)


def test_updates_that_are_not_measured_carry_no_hooks() -> None:
    net = model()
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-2)
    exposure(net, optimizer, every=5)
    for n in range(10):
        step(net, optimizer, parts=2)
        due = (n + 1) % 5 == 0
        assert any(p._backward_hooks for p in net.parameters()) == due
        assert any(m._forward_pre_hooks for m in net.modules()) == due


def test_pne_star_is_exposure_over_curvature() -> None:
    """By hand: sum of lr Tr(P C/B P) / Tr(P F P), the curvature of every second event kept for the next."""
    net = model()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    meter = exposure(net, optimizer, every=1, curvature="mc_fisher", curvature_every=2)
    for n in range(4):
        step(net, optimizer, parts=4, seed=n)
    meter.remove()
    assert [event.curvature_step for event in meter.events] == [1, 1, 3, 3]
    expected = sum(0.1 * event.trace_pcp / event.curvature for event in meter.events)
    assert meter.reading()["pne_star"].value == pytest.approx(expected)
    assert all(event.curvature_se > 0 for event in meter.events)


@pytest.mark.parametrize("name", ["sgd", "adam"])
def test_pne2_is_invariant_under_the_scaling_rules_and_pne_is_not(name: str) -> None:
    """kappa times the batch: SGD with kappa times the rate, Adam with its root and kappa times 1 - beta.

    A linear loss with noise of fixed covariance, kappa = 1 to 8 for as many sequences: E_2 within 1 %, E_1
    falls as 1/kappa (SGD) and 1/sqrt(kappa) (Adam).
    """
    width, batch, updates = 1000, 16, 512
    found = {}
    for kappa in (1, 2, 4, 8):
        draw = torch.Generator().manual_seed(kappa)
        net = nn.Linear(width, 1, bias=False)
        if name == "sgd":
            optimizer: torch.optim.Optimizer = torch.optim.SGD(net.parameters(), lr=1e-3 * kappa)
        else:
            betas = (1 - 0.001 * kappa, 1 - 0.001 * kappa)
            optimizer = torch.optim.Adam(net.parameters(), lr=1e-3 * math.sqrt(kappa), betas=betas)
        meter = exposure(net, optimizer, every=1, p="step" if name == "sgd" else "expected")
        scale = torch.linspace(0.5, 2, width)
        for _ in range(1024 // kappa):  # v of Adam becomes old
            examples = torch.randn(8, width, generator=draw) * scale / math.sqrt(batch * kappa / 8)
            for row in examples.chunk(8):
                (net(row).sum() / 8).backward()
            optimizer.step()
            optimizer.zero_grad()
        events = meter.events[-updates // kappa :]
        found[kappa] = integrate(events)
    for kappa in (2, 4, 8):
        exponent = 1.0 if name == "sgd" else 0.5
        assert found[kappa]["pne2"].value == pytest.approx(found[1]["pne2"].value, rel=0.01)
        assert found[kappa]["pne"].value == pytest.approx(found[1]["pne"].value / kappa**exponent, rel=0.01)


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
