"""What must hold of the meter for any model, data and split (noise.md 2.8)."""

import random
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.optim import SGD, Adafactor, Adam, AdamW, Optimizer, RMSprop

from gradnoise import exposure
from gradnoise.noise.estimators import means
from gradnoise.noise.integrals import integrate
from gradnoise.noise.reading import Reading

SEEDS = st.integers(0, 2**31 - 1)
OPTIMIZERS: dict[str, Callable[..., Optimizer]] = {
    "SGD": SGD,
    "momentum": lambda given, lr: SGD(given, lr=lr, momentum=0.9),
    "Adam": Adam,
    "AdamW": AdamW,
    "Adafactor": Adafactor,
    "RMSprop": lambda given, lr: RMSprop(given, lr=lr, centered=True),
}
KINDS = st.sampled_from(sorted(OPTIMIZERS))
PROPERTY = settings(max_examples=15, deadline=None, derandomize=True)


def model(seed: int) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(4, 5), nn.LayerNorm(5), nn.Tanh(), nn.Linear(5, 3)).double()


def data(seed: int, count: int = 24) -> tuple[Tensor, Tensor]:
    draw = torch.Generator().manual_seed(seed)
    inputs = torch.randn(count, 4, dtype=torch.float64, generator=draw)
    return inputs, torch.randint(3, (count,), generator=draw)


def update(
    net: nn.Module, optimizer: Optimizer, seed: int, parts: int, factor: float = 1.0, order: Any = None
) -> None:
    """One update from `parts` micro-batches, in any order, the loss times a factor."""
    inputs, targets = data(seed)
    micro = list(zip(inputs.chunk(parts), targets.chunk(parts), strict=True))
    if order is not None:
        order.shuffle(micro)
    for x, y in micro:
        (factor * cross_entropy(net(x), y) / parts).backward()
    optimizer.step()
    optimizer.zero_grad()


def reading(
    seed: int,
    kind: str = "AdamW",
    parts: int = 6,
    updates: int = 3,
    groups: Callable[[Sequence[nn.Parameter]], Any] = list,
    make: Callable[..., Optimizer] | None = None,
    factor: float = 1.0,
    order: Any = None,
    **options: Any,
) -> Reading:
    """The reading after some updates of the same model on the same data."""
    net = model(seed)
    optimizer = (make or OPTIMIZERS[kind])(groups(list(net.parameters())), lr=1e-2)
    meter = exposure(net, optimizer, every=1, **options)
    for n in range(updates):
        update(net, optimizer, seed + n, parts, factor, order)
    assert meter.last is not None
    meter.remove()
    return meter.last


def assert_same(one: Reading, other: Reading, rel: float = 1e-10) -> None:
    """Every estimate of the two readings, with its error, and every part."""
    for name in ("trace", "trace_c", "pne", "pne2", "ne", "retained", "effective", "t_eff", "gns"):
        first, second = getattr(one, name), getattr(other, name)
        assert tuple(first) == pytest.approx(tuple(second), rel=rel, nan_ok=True), name
    assert one.effective_rank.value == pytest.approx(other.effective_rank.value, rel=1e-6, nan_ok=True)
    assert one.top_share == pytest.approx(other.top_share, rel=1e-6)
    for mine, yours in ((one.by_layer, other.by_layer), (one.by_class, other.by_class)):
        assert set(mine) == set(yours)
        for name, part in mine.items():
            assert part.trace.value == pytest.approx(yours[name].trace.value, rel=rel)
            assert part.retained.value == pytest.approx(yours[name].retained.value, rel=rel)


@PROPERTY
@given(seed=SEEDS, kind=KINDS, order=st.randoms(use_true_random=False))
def test_the_order_of_parameters_does_not_matter(seed: int, kind: str, order: random.Random) -> None:
    def shuffled(parameters: Sequence[nn.Parameter]) -> list[nn.Parameter]:
        return order.sample(list(parameters), len(parameters))

    assert_same(reading(seed, kind), reading(seed, kind, groups=shuffled))


@PROPERTY
@given(seed=SEEDS, kind=KINDS, cut=st.integers(1, 5))
def test_how_parameters_are_grouped_does_not_matter(seed: int, kind: str, cut: int) -> None:
    """Split in two groups, and these in the other order."""

    def split(parameters: Sequence[nn.Parameter]) -> list[dict[str, Any]]:
        return [{"params": parameters[:cut]}, {"params": parameters[cut:]}]

    whole = reading(seed, kind)
    assert_same(whole, reading(seed, kind, groups=split))
    assert_same(whole, reading(seed, kind, groups=lambda parameters: split(parameters)[::-1]))


@PROPERTY
@given(seed=SEEDS, kind=KINDS, order=st.randoms(use_true_random=False))
def test_the_order_of_micro_batches_does_not_matter(seed: int, kind: str, order: random.Random) -> None:
    assert_same(reading(seed, kind), reading(seed, kind, order=order), rel=1e-9)


@PROPERTY
@given(seed=SEEDS, workers=st.sampled_from([1, 2, 3, 4, 6, 12]))
def test_contributions_may_be_spread_over_workers(seed: int, workers: int) -> None:
    """W x K = 12: each worker's squared distances from w_r g joined, or one's of 12; any shares."""
    draw = torch.Generator().manual_seed(seed)
    h = torch.randn(12, 7, dtype=torch.float64, generator=draw)
    shares = torch.rand(12, dtype=torch.float64, generator=draw) + 0.1
    shares = shares / shares.sum()
    value, error = means((h - shares[:, None] * h.sum(0)).square().sum(1), shares)
    total = torch.stack([part.sum(0) for part in h.chunk(workers)]).sum(0)  # all-reduce
    local = [
        ((part - w[:, None] * total).square().sum(1), w)
        for part, w in zip(h.chunk(workers), shares.chunk(workers), strict=True)
    ]
    joined = means(*(torch.cat(column) for column in zip(*local, strict=True)))
    assert joined[0].item() == pytest.approx(value.item(), rel=1e-10)
    assert joined[1].item() == pytest.approx(error.item(), rel=1e-10)


@PROPERTY
@given(seed=SEEDS, kind=KINDS)
def test_micro_batches_of_one_example_are_the_examples(seed: int, kind: str) -> None:
    micro = reading(seed, kind, parts=24, updates=2, estimator="micro")
    example = reading(seed, kind, parts=1, updates=2, estimator="example")
    for name in ("trace", "trace_c", "pne2", "t_eff", "gns"):
        expected = tuple(getattr(example, name))
        assert tuple(getattr(micro, name)) == pytest.approx(expected, rel=1e-7, nan_ok=True)
    for name, part in micro.by_layer.items():
        assert part.trace.value == pytest.approx(example.by_layer[name].trace.value, rel=1e-7)


@PROPERTY
@given(seed=SEEDS, parts=st.sampled_from([2, 3, 8]))
def test_without_a_preconditioner_pne2_is_ne(seed: int, parts: int) -> None:
    found = reading(seed, "SGD", parts)
    for one, other in (
        (found.pne2, found.ne),
        (found.trace, found.trace_c),
        (found.gns, found.gns_preconditioned),
    ):
        assert tuple(one) == pytest.approx(tuple(other), rel=1e-12, nan_ok=True)


@PROPERTY
@given(seed=SEEDS, factor=st.floats(1e-3, 1e3))
def test_a_loss_times_c_is_noise_times_c_squared_under_sgd(seed: int, factor: float) -> None:
    """Signal and noise alike, so that their ratio, the noise scale, has no unit of loss."""
    one = reading(seed, "SGD", updates=1)
    scaled = reading(seed, "SGD", updates=1, factor=factor)
    for name in ("trace", "pne", "pne2", "ne"):
        expected = tuple(getattr(one, name).scaled(factor**2))
        assert tuple(getattr(scaled, name)) == pytest.approx(expected, rel=1e-9)
    assert tuple(scaled.gns) == pytest.approx(tuple(one.gns), rel=1e-6, nan_ok=True)
    assert scaled.effective_rank.value == pytest.approx(one.effective_rank.value, rel=1e-6)


@PROPERTY
@given(seed=SEEDS, factor=st.floats(1e-2, 1e2), read=st.sampled_from(["expected", "step", "state"]))
def test_adam_does_not_see_the_unit_of_the_loss(seed: int, factor: float, read: str) -> None:
    """At eps = 0 and whichever way P is read; `ne` alone, without P, goes with its square."""

    def make(given: Any, lr: float) -> Optimizer:
        return Adam(given, lr=lr, eps=0.0, betas=(0.9, 0.95))

    # The last layer's bias after LayerNorm and a softmax always has a gradient: no P is infinite.
    one = reading(seed, make=make, updates=5, p=read)
    scaled = reading(seed, make=make, updates=5, p=read, factor=factor)
    for name in ("trace", "pne", "pne2", "gns_preconditioned"):
        expected = tuple(getattr(one, name))
        assert tuple(getattr(scaled, name)) == pytest.approx(expected, rel=1e-5, nan_ok=True)
    assert scaled.ne.value == pytest.approx(one.ne.value * factor**2, rel=1e-5)
    assert scaled.t_eff.value == pytest.approx(one.t_eff.value * factor, rel=1e-5)  # in units of loss


@PROPERTY
@given(seed=SEEDS, kind=KINDS, parts=st.integers(2, 6))
def test_identical_micro_batches_have_no_noise(seed: int, kind: str, parts: int) -> None:
    net = model(seed)
    optimizer = OPTIMIZERS[kind](net.parameters(), lr=1e-2)
    meter = exposure(net, optimizer, every=1)
    inputs, targets = data(seed, 6)
    for _ in range(parts):
        (cross_entropy(net(inputs), targets) / parts).backward()
    optimizer.step()
    assert meter.last is not None
    signal = meter.events or meter._ledger.rows()[0]
    assert 0 <= meter.last.trace.value <= 1e-25 * signal[0].signal_pcp
    assert 0 <= meter.last.trace_c.value <= 1e-25 * signal[0].signal_c
    assert meter.last.pne2.value <= 1e-25 * signal[0].signal_pcp


@PROPERTY
@given(seed=SEEDS, decay=st.floats(0, 1), kind=st.sampled_from(["AdamW", "Adafactor"]))
def test_decoupled_decay_enters_no_reading_of_its_update(seed: int, decay: float, kind: str) -> None:
    """Bit for bit in one step: it is drift, no noise; it only forgets what came before."""

    def make(given: Any, lr: float) -> Optimizer:
        return {"AdamW": AdamW, "Adafactor": Adafactor}[kind](given, lr=lr, weight_decay=decay)

    def without(given: Any, lr: float) -> Optimizer:
        return {"AdamW": AdamW, "Adafactor": Adafactor}[kind](given, lr=lr, weight_decay=0.0)

    assert repr(reading(seed, updates=1, make=make)) == repr(reading(seed, updates=1, make=without))


@PROPERTY
@given(seed=SEEDS, kind=KINDS, mode=st.sampled_from(["scale", "project"]))
def test_an_update_that_was_not_clipped_is_as_noisy_as_it_could_be(seed: int, kind: str, mode: str) -> None:
    found = reading(seed, kind, effective=mode)
    assert found.clip == 1.0
    assert found.effective == found.trace
    assert found.pne2_effective == found.pne2
    assert found.ratio.value == pytest.approx(1.0, rel=1e-12)


@PROPERTY
@given(seed=SEEDS, kind=KINDS, limit=st.floats(0.05, 0.9))
def test_clipping_scales_the_effective_trace_by_the_square_of_its_factor(
    seed: int, kind: str, limit: float
) -> None:
    """s = min(1, c / (|g| + 1e-6)), as torch has it; the estimate of C is that before clipping."""
    net = model(seed)
    optimizer = OPTIMIZERS[kind](net.parameters(), lr=1e-2)
    meter = exposure(net, optimizer, every=1)
    inputs, targets = data(seed)
    for x, y in zip(inputs.chunk(4), targets.chunk(4), strict=True):
        (cross_entropy(net(x), y) / 4).backward()
    norm = torch.nn.utils.get_total_norm([p.grad for p in net.parameters() if p.grad is not None]).item()
    torch.nn.utils.clip_grad_norm_(net.parameters(), limit * norm)  # not the meter's: it must notice
    optimizer.step()
    assert meter.last is not None
    assert meter.last.clip == pytest.approx(limit * norm / (norm + 1e-6), rel=1e-6)
    assert meter.last.effective.value == pytest.approx(meter.last.clip**2 * meter.last.trace.value, rel=1e-9)
    unclipped = reading(seed, "SGD", parts=4, updates=1)
    assert meter.last.trace_c.value == pytest.approx(unclipped.trace_c.value, rel=1e-6)


@PROPERTY
@given(seed=SEEDS, kind=KINDS, every=st.integers(1, 4), updates=st.integers(1, 7))
def test_exposure_is_the_sum_over_events(seed: int, kind: str, every: int, updates: int) -> None:
    """Of every definition, and at stride 1 each event is eta or eta^2 times its own trace."""
    net = model(seed)
    optimizer = OPTIMIZERS[kind](net.parameters(), lr=1e-2)
    meter = exposure(net, optimizer, every)
    for n in range(updates):
        update(net, optimizer, seed + n, parts=3)
    last, total = meter.last, meter.reading()
    meter.remove()
    assert last is not None
    assert repr(integrate(meter.events)) == repr(total)
    assert last.pne2 == total["pne2"]
    assert sum(event.updates for event in meter.events) == updates
    assert last.pne.value == pytest.approx(sum(e.sum_lr * e.trace_pcp for e in meter.events), rel=1e-12)
    assert last.pne2.value == pytest.approx(sum(e.sum_lr2 * e.trace_pcp for e in meter.events), rel=1e-12)
    if every == 1 and kind not in ("momentum", "Adafactor"):
        assert last.pne2.value == pytest.approx(1e-4 * sum(e.trace_pcp for e in meter.events), rel=1e-12)
    # Layers add up to the whole.
    for name in ("pne", "pne2", "ne"):
        parts = sum(getattr(part, name).value for part in last.by_layer.values())
        assert parts == pytest.approx(getattr(last, name).value, rel=1e-9)
