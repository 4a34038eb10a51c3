"""Budgets of exposure, against the ledgers of whole runs: within 2 %."""

import json
import math
from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.optim import SGD, AdamW, Optimizer

from gradnoise import exposure, gaussian, inject, reweight
from gradnoise.base.errors import InputError
from gradnoise.noise.matching.phases import PhaseBudget
from gradnoise.noise.matching.trajectory import Trajectory

PARTS = 8
BATCH = 64
UPDATES = 150
TRUTH = torch.randn(8, 4, generator=torch.Generator().manual_seed(9))
PHASES = ("early", "middle", "late", "uniform")


def data(count: int, seed: int, step: int) -> tuple[Tensor, Tensor]:
    draw = torch.Generator().manual_seed(100_000 * seed + step)
    inputs = torch.randn(count, 8, generator=draw)
    return inputs, (inputs @ TRUTH + 2 * torch.randn(count, 4, generator=draw)).argmax(1)


def new(kind: str) -> tuple[nn.Module, Optimizer]:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 4))
    if kind == "AdamW":
        return net, AdamW(net.parameters(), lr=3e-3, betas=(0.9, 0.99))
    return net, SGD(net.parameters(), lr=0.1)


def train(
    net: nn.Module,
    optimizer: Optimizer,
    updates: range,
    size: Callable[[int], int] = lambda _: BATCH,
    temperature: Callable[[int], float] = lambda _: 1.0,
    rate: Callable[[int], float] | None = None,
) -> None:
    for step in updates:
        for group in optimizer.param_groups if rate is not None else ():
            group["lr"] = rate(step)  # type: ignore[misc]
        inputs, targets = data(size(step), 3, step)
        pairs = zip(inputs.chunk(PARTS), targets.chunk(PARTS), strict=True)
        for part, (x, y) in enumerate(pairs):
            losses = cross_entropy(net(x), y, reduction="none")
            if temperature(step) > 1:
                losses = losses * reweight(len(x), temperature=temperature(step), step=step, part=part)
            (losses.mean() / PARTS).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        optimizer.zero_grad()


@cache
def baseline(kind: str, every: int = 1) -> Trajectory:
    net, optimizer = new(kind)
    meter = exposure(net, optimizer, every, estimator="micro")
    train(net, optimizer, range(1, UPDATES + 1))
    return Trajectory.of(meter)


def budget_of(kind: str, phase: Any, share: float, every: int = 1) -> tuple[PhaseBudget, float]:
    """A budget, and what the whole run is to have with it."""
    own = baseline(kind, every).exposure(1, UPDATES).value
    return PhaseBudget(share * own, UPDATES, phase), (1 + share) * own


class Run:
    """A run that spends a budget by one of the three ways."""

    def __init__(self, kind: str, budget: PhaseBudget, way: str, every: int = 1, **options: Any) -> None:
        self.net, self.optimizer = new(kind)
        self.meter = exposure(self.net, self.optimizer, budget.due(every), estimator="micro")
        self.way: dict[str, Any] = {}
        self.noise: Any = None
        if way == "noise":
            self.noise = inject(self.optimizer, gaussian(self.meter.std()), model=self.net, power=0.0)
            self.part: Any = budget.attach(self.meter, self.noise, **options)
        elif way == "batch":
            options = {"multiple": PARTS, **options}
            self.part = budget.batches(self.meter, baseline(kind, every), BATCH, **options)
            self.way["size"] = self.part
        else:
            self.part = budget.temperatures(self.meter, baseline(kind, every), **options)
            self.way["temperature"] = self.part

    def go(self, first: int = 1, last: int = UPDATES, **settings: Any) -> "Run":
        train(self.net, self.optimizer, range(first, last + 1), **self.way, **settings)
        return self

    @property
    def total(self) -> float:
        return self.meter.reading()["pne2"].value

    def parts(self) -> list[Any]:
        found = [self.net, self.optimizer, self.meter, self.part]
        return found if self.noise is None else [*found, self.noise]


# --- which updates ---------------------------------------------------------------------------------------


def test_thirds_share_no_update_and_leave_none_out() -> None:
    for updates in (3, 100, 101, 1000):
        windows = [PhaseBudget(1.0, updates, phase).window for phase in PHASES]
        assert windows[0][0] == 1
        assert windows[0][1] + 1 == windows[1][0]
        assert windows[1][1] + 1 == windows[2][0]
        assert windows[2][1] == updates
        assert windows[3] == (1, updates)
    assert PhaseBudget(1.0, 10, (4, 6)).window == (4, 6)
    due = PhaseBudget(1.0, 30, (12, 15)).due(10)
    assert [step for step in range(1, 31) if due(step)] == [1, 11, 12, 16, 21]


def test_wrong_budgets_are_refused() -> None:
    for field, wrong in (
        ("extra", {"extra": 0.0}),
        ("extra", {"extra": math.inf}),
        ("phase", {"phase": "soon"}),
        ("phase", {"phase": (5, 4)}),
        ("phase", {"phase": (0, 4)}),
        ("phase", {"phase": (90, 101)}),
        ("phase", {"updates": 0}),
    ):
        with pytest.raises(InputError, match=field):
            PhaseBudget(**{"extra": 1.0, "updates": 100, "phase": "early", **wrong})  # type: ignore[arg-type]
    budget, _ = budget_of("SGD", "middle", 0.5)
    net, optimizer = new("SGD")
    meter = exposure(net, optimizer, 7)
    with pytest.raises(InputError, match="passes over update 51"):
        budget.batches(meter, baseline("SGD"), BATCH)
    with pytest.raises(InputError, match="multiple"):
        budget.batches(exposure(net, optimizer, 1), baseline("SGD"), BATCH, multiple=7)
    with pytest.raises(InputError, match="most"):
        budget.attach(meter, inject(optimizer, gaussian(1.0), model=net), most=0.0)
    scheduled = inject(optimizer, gaussian(1.0), model=net, seed=1, power=lambda _: 1.0)
    with pytest.raises(InputError, match="an amount of its own"):
        budget.attach(meter, scheduled)


# --- through injection -----------------------------------------------------------------------------------


@pytest.mark.parametrize("phase", PHASES)
@pytest.mark.parametrize(("kind", "every"), [("SGD", 1), ("AdamW", 10)])
def test_what_is_injected_is_the_budget_and_in_its_window(kind: str, every: int, phase: str) -> None:
    budget, _ = budget_of(kind, phase, 0.3)
    run = Run(kind, budget, "noise", every)
    first, last = budget.window
    sums = [0.0]
    for step in range(1, UPDATES + 1):
        run.go(step, step)
        sums.append(run.meter.reading()["pne2_injected"].value)
    assert sums[-1] == pytest.approx(budget.extra, rel=0.01)
    assert sums[first - 1] == 0
    assert sums[last] == sums[-1]
    # Evenly: half in the first half.
    assert sums[(first + last) // 2] == pytest.approx(budget.extra / 2, rel=0.15)
    found = run.part.report()
    assert found.spent.value == pytest.approx(sums[-1], rel=1e-9)
    assert found.ratio.value == pytest.approx(sums[-1] / budget.extra, rel=1e-9)
    assert found.at_most == 0


@pytest.mark.parametrize("phase", PHASES)
@pytest.mark.parametrize("kind", ["SGD", "AdamW"])
def test_with_a_baseline_the_total_of_the_run_is_what_is_held(kind: str, phase: str) -> None:
    budget, total = budget_of(kind, phase, 0.3)
    run = Run(kind, budget, "noise", baseline=baseline(kind)).go()
    assert run.total == pytest.approx(total, rel=0.02)
    assert run.part.report().ratio.value == pytest.approx(run.total / total, rel=1e-9)


def test_a_learning_rate_that_falls() -> None:
    """At one trace: update s gets eta_s^2 / sum of eta^2 of the budget."""

    def rate(step: int) -> float:
        return 0.1 * (1 - step / (UPDATES + 1))

    budget, _ = budget_of("SGD", "uniform", 0.3)
    run = Run("SGD", budget, "noise", 10, rate=rate)
    run.go(1, 75, rate=rate)
    half = run.meter.reading()["pne2_injected"].value
    run.go(76, rate=rate)
    squares = [rate(step) ** 2 for step in range(1, UPDATES + 1)]
    assert run.meter.reading()["pne2_injected"].value == pytest.approx(budget.extra, rel=0.01)
    assert half == pytest.approx(budget.extra * sum(squares[:75]) / sum(squares), rel=0.03)


def test_a_power_at_its_bound_is_reported() -> None:
    budget, _ = budget_of("SGD", "late", 3.0)
    run = Run("SGD", budget, "noise", 10, most=2.0).go()
    found = run.part.report()
    assert found.ratio.value < 0.9
    assert found.at_most > 0.9


# --- through the batch, and through weights --------------------------------------------------------------


@pytest.mark.parametrize("phase", PHASES)
@pytest.mark.parametrize("way", ["batch", "temperature"])
def test_under_sgd_the_total_is_that_of_the_budget(way: str, phase: str) -> None:
    budget, total = budget_of("SGD", phase, 0.5)
    run = Run("SGD", budget, way, hold=False)
    first, last = budget.window
    used = []
    for step in range(1, UPDATES + 1):
        used.append(run.part(step))
        run.go(step, step)
    assert run.total == pytest.approx(total, rel=0.02)
    found = run.part.report()
    assert found.ratio.value == pytest.approx(run.total / total, rel=1e-9)
    assert found.window.value == pytest.approx(1, abs=0.03)
    assert found.at_most == 0
    base = BATCH if way == "batch" else 1
    outside = [x for step, x in enumerate(used, start=1) if not first <= step <= last]
    assert set(outside) <= {base}
    if way == "batch":
        assert all(isinstance(x, int) and x % PARTS == 0 for x in used)
        assert sum(used[first - 1 : last]) / (last - first + 1) < 0.85 * BATCH
    else:
        assert sum(used[first - 1 : last]) / (last - first + 1) > 1.2


@pytest.mark.parametrize("phase", PHASES)
@pytest.mark.parametrize("way", ["batch", "temperature"])
def test_under_adam_holding_the_baseline_afterwards_keeps_the_total(way: str, phase: str) -> None:
    budget, total = budget_of("AdamW", phase, 0.1)
    run = Run("AdamW", budget, way).go()
    assert run.total == pytest.approx(total, rel=0.02)
    assert run.part.report().ratio.value == pytest.approx(run.total / total, rel=1e-9)


@pytest.mark.parametrize("way", ["batch", "temperature"])
def test_under_adam_an_early_phase_takes_away_more_than_it_gives(way: str) -> None:
    """The second moment keeps the phase's noise, so the run's own counts less after it: told, not hidden."""
    budget, total = budget_of("AdamW", "early", 0.1)
    run = Run("AdamW", budget, way, hold=False).go()
    found = run.part.report()
    assert found.window.value == pytest.approx(1, abs=0.02)
    assert run.total < 0.9 * total
    assert found.ratio.value == pytest.approx(run.total / total, rel=1e-9)


def test_measured_now_and_then() -> None:
    """A window of 10 measured updates leaves the error of the last one, a tenth of the window."""
    every = 5
    budget, total = budget_of("SGD", "late", 0.5, every)
    run = Run("SGD", budget, "batch", every)
    used = []
    for step in range(1, UPDATES + 1):
        used.append(run.part(step))
        run.go(step, step)
    assert run.total == pytest.approx(total, rel=0.06)
    # The meter holds a trace from one measured update to the next, so the batch must be one too.
    due = budget.due(every)
    changes = [step for step in range(2, UPDATES + 1) if used[step - 1] != used[step - 2]]
    assert changes
    assert all(due(step) for step in changes)


def test_a_batch_at_its_bound_is_reported() -> None:
    budget, _ = budget_of("SGD", "late", 3.0)
    run = Run("SGD", budget, "batch", least=32).go()
    found = run.part.report()
    assert found.ratio.value < 0.9
    assert found.at_most > 0.8


# --- the loop around it ----------------------------------------------------------------------------------


@pytest.mark.parametrize("way", ["noise", "batch", "temperature"])
def test_a_resumed_run_is_the_same_bit_for_bit(way: str) -> None:
    budget = PhaseBudget(0.3 * baseline("AdamW", 5).exposure(1, 50).value, UPDATES, (12, 40))
    whole = Run("AdamW", budget, way, 5).go(1, 60)
    for cut_at in (8, 23):
        cut, again = Run("AdamW", budget, way, 5).go(1, cut_at), Run("AdamW", budget, way, 5)
        json.dumps(cut.part.state_dict())
        for part, other in zip(again.parts(), cut.parts(), strict=True):
            part.load_state_dict(other.state_dict())
        again.go(cut_at + 1, 60)
        for mine, theirs in zip(again.net.parameters(), whole.net.parameters(), strict=True):
            assert torch.equal(mine, theirs)
        assert again.part.state_dict() == whole.part.state_dict()
        assert again.part.report() == whole.part.report()


def test_a_run_in_stretches_with_a_meter_each() -> None:
    budget, total = budget_of("SGD", "middle", 0.3)
    first = Run("SGD", budget, "noise", baseline=baseline("SGD")).go(1, 70)
    first.meter.remove()
    first.part.remove()
    second = Run("SGD", budget, "noise", baseline=baseline("SGD"), offset=70)
    for n in (0, 1, 3, 4):
        second.parts()[n].load_state_dict(first.parts()[n].state_dict())
    second.go(71)
    assert first.total + second.total == pytest.approx(total, rel=0.02)
    ratio = second.part.report().ratio.value
    assert ratio == pytest.approx((first.total + second.total) / total, rel=1e-9)


def test_removed_noise_is_silent() -> None:
    budget, _ = budget_of("SGD", "uniform", 0.3)
    run = Run("SGD", budget, "noise").go(1, 10)
    run.part.remove()
    before = run.meter.reading()["pne2_injected"].value
    run.go(11, 20)
    assert before > 0
    assert run.meter.reading()["pne2_injected"].value == before
