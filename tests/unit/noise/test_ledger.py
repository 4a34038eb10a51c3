"""Intervals, and every definition integrated over them, against sums by hand."""

import copy
import json
import math
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from typing import Any

import pytest
import torch
from torch import nn

from gradnoise import exposure
from gradnoise.noise.estimate import Estimate
from gradnoise.noise.integrals import DEFINITIONS, Event, averages, integrate, noise_scale


def event(**given: Any) -> Event:
    """An event of one update at lr 0.1, everything else told apart by its value."""
    fields: dict[str, Any] = dict.fromkeys(Event.__dataclass_fields__, 0.0) | {
        "step": 1,
        "updates": 1,
        "sum_lr": 0.1,
        "sum_lr2": 0.01,
        "sum_lr2_c": 0.01,
        "log_retention": 0.0,
        "trace_pcp": 4.0,
        "trace_pcp_se": 0.4,
        "trace_c": 3.0,
        "trace_c_se": 0.3,
        "trace_effective": 2.0,
        "trace_effective_se": 0.2,
        "learning_rate": 0.1,
        "batch": 8,
        "trace_p": 5.0,
        "signal_pcp": 6.0,
        "signal_c": 7.0,
        "signal_pcp_se": 0.5,
        "signal_c_se": 0.6,
        "curvature": math.nan,
        "curvature_se": math.nan,
        "population_factor": 1.0,
    }
    return Event(**fields | given)


class Run:
    """Two groups of AdamW with learning rates and decays of their own, and a meter."""

    def __init__(
        self, every: int | Callable[[int], bool] = 1, decays: tuple[float, ...] = (0.5, 0.05)
    ) -> None:
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2)).double()
        groups = [
            {"params": self.net[n].parameters(), "lr": lr, "weight_decay": decay}
            for n, lr, decay in zip((0, 2), (1e-1, 2e-2), decays, strict=True)
        ]
        self.optimizer = torch.optim.AdamW(groups)
        self.meter = exposure(self.net, self.optimizer, every)
        self.draw = torch.Generator().manual_seed(1)

    def updates(self, count: int, first: int = 0) -> None:
        """`count` updates at falling learning rates; micro-batches as the meter needs them."""
        for n in range(first, first + count):
            for group, lr in zip(self.optimizer.param_groups, (1e-1, 2e-2), strict=True):
                group["lr"] = lr * (1 - 0.05 * n)
            for x in torch.randn(6, 2, 4, generator=self.draw, dtype=torch.float64):
                (self.net(x).square().mean() / 6).backward()
            self.optimizer.step()
            self.optimizer.zero_grad()

    @property
    def rates(self) -> Iterator[list[float]]:
        for n in range(1000):
            yield [lr * (1 - 0.05 * n) for lr in (1e-1, 2e-2)]


def by_tensor(run: Run) -> list[dict[str, float]]:
    """Traces by tensor of each event, in order."""
    _, parts = run.meter._ledger.rows()
    steps = sorted({part.step for part in parts})
    return [
        {part.part: part.trace_pcp for part in parts if part.kind == "tensor" and part.step == step}
        for step in steps
    ]


def test_groups_with_rates_and_decays_of_their_own_add_up_by_tensor() -> None:
    """Brute force: E <- (1 - eta lambda)^2 E + eta^2 Tr(P C/B P) and the sums, tensor by tensor."""
    run = Run()
    run.updates(8)
    kept = dict.fromkeys(by_tensor(run)[0], 0.0)
    sums = {"pne": 0.0, "pne2": 0.0}
    for rates, traces in zip(run.rates, by_tensor(run), strict=False):
        for name, trace in traces.items():
            group = 0 if name.startswith("0") else 1
            lr, decay = rates[group], (0.5, 0.05)[group]
            kept[name] = (1 - lr * decay) ** 2 * kept[name] + lr**2 * trace
            sums["pne"] += lr * trace
            sums["pne2"] += lr**2 * trace
    last = run.meter.last
    assert last is not None
    assert last.retained.value == pytest.approx(sum(kept.values()), rel=1e-12)
    assert last.pne.value == pytest.approx(sums["pne"], rel=1e-12)
    assert last.pne2.value == pytest.approx(sums["pne2"], rel=1e-12)
    assert last.retained.value < 0.8 * last.pne2.value
    for layer in ("0", "2"):
        expected = sum(value for name, value in kept.items() if name.startswith(layer))
        assert last.by_layer[layer].retained.value == pytest.approx(expected, rel=1e-12)
    # A mean of the two groups' decays would not do.
    assert sum(part.retained.value for part in last.by_class.values()) == pytest.approx(last.retained.value)


def test_an_event_stands_for_the_updates_up_to_the_next() -> None:
    """Hold-last: exposure of stride 4 is sum over events of trace x exact sums of the rates covered."""
    run = Run(every=4, decays=(0.0, 0.0))
    run.updates(10)
    rates = [rate for rate, _ in zip(run.rates, range(10), strict=False)]
    expected = 0.0
    for first, traces in zip((0, 4, 8), by_tensor(run), strict=True):
        for name, trace in traces.items():
            group = 0 if name.startswith("0") else 1
            expected += trace * sum(r[group] ** 2 for r in rates[first : first + 4])
    last = run.meter.last
    assert last is not None
    assert last.pne2.value == pytest.approx(expected, rel=1e-12)
    assert [e.updates for e in run.meter._ledger.rows()[0]] == [4, 4, 2]


def test_strides_may_be_any_function_of_the_update() -> None:
    """step -> bool, steps from 1: here dense at first, sparse later; nothing before the first is counted."""
    run = Run(every=lambda step: step in (3, 4, 9))
    due = []
    for n in range(10):
        due.append(run.meter.due)
        run.updates(1, first=n)
    run.meter.remove()
    assert [n + 1 for n in range(10) if due[n]] == [3, 4, 9]
    assert [(e.step, e.updates) for e in run.meter.events] == [(3, 1), (4, 5), (9, 2)]


@pytest.mark.parametrize("stop", [1, 2, 3, 5, 8])
def test_a_state_taken_in_mid_interval_goes_on_identically(stop: int) -> None:
    """To the bit, through JSON as a checkpoint would: events, parts, running sums, what decay has left."""
    whole = Run(every=3)
    whole.updates(11)
    first = Run(every=3)
    first.updates(stop)
    state = json.loads(json.dumps(first.meter.state_dict()))
    second = Run(every=3)
    second.net.load_state_dict(first.net.state_dict())
    second.optimizer.load_state_dict(copy.deepcopy(first.optimizer.state_dict()))
    second.draw.set_state(first.draw.get_state())
    second.meter.load_state_dict(state)
    assert repr(second.meter.reading()) == repr(first.meter.reading())
    second.updates(11 - stop, first=stop)
    assert repr(second.meter.last) == repr(whole.meter.last)
    assert second.meter.ledger.equals(whole.meter.ledger)
    for run in (whole, second):
        run.meter.remove()
    assert repr(second.meter.parts) == repr(whole.meter.parts)


def test_the_open_interval_counts_and_reading_it_does_not_close_it() -> None:
    run = Run(every=100)
    run.updates(1)
    one = run.meter.reading()["pne2"].value
    run.updates(1, first=1)
    two = run.meter.reading()["pne2"].value
    assert one < two == run.meter.reading()["pne2"].value
    assert run.meter.events == []
    run.meter.remove()
    assert len(run.meter.events) == 1
    assert run.meter.reading()["pne2"].value == two
    run.meter.remove()
    assert len(run.meter.events) == 1


def test_every_definition_is_the_sum_that_it_says() -> None:
    injected = {"injected_pne": 0.7, "injected_pne2": 0.8, "injected_ne": 0.9}
    late = {"step": 2, "sum_lr": 0.3, "sum_lr2": 0.05, "sum_lr2_c": 0.06, "log_retention": math.log(0.25)}
    events = [event(**injected), event(**late)]
    found = integrate(events)
    expected = {
        "pne": 0.1 * 4 + 0.7 + 0.3 * 4,
        "pne2": 0.01 * 4 + 0.8 + 0.05 * 4,
        "ne": 0.01 * 3 + 0.9 + 0.06 * 3,
        "retained": 0.25 * (0.01 * 4 + 0.8) + 0.05 * 4,
        "pne_effective": 0.1 * 2 + 0.7 + 0.3 * 2,
        "pne2_effective": 0.01 * 2 + 0.8 + 0.05 * 2,
        "pne2_injected": 0.8,
    }
    assert set(expected) == set(DEFINITIONS) - {"pne_star"}
    assert {name: found[name].value for name in expected} == pytest.approx(expected, rel=1e-12)
    assert found["pne"].stderr == pytest.approx(math.hypot(0.1 * 0.4, 0.3 * 0.4))
    assert found["retained"].stderr == pytest.approx(math.hypot(0.25 * 0.01 * 0.4, 0.05 * 0.4))
    assert math.isnan(found["pne_star"].value)


def test_a_curvature_that_events_share_errs_for_all_of_them_at_once() -> None:
    """pne_star = sum eta Tr(PCP/B) / F: 3 events, of which two share F = 2 +- 0.2 (10 %).

    Simulated: F and traces drawn anew, 200 000 times.
    """
    events = [
        event(curvature=2.0, curvature_se=0.2, curvature_step=1),
        event(step=2, curvature=2.0, curvature_se=0.2, curvature_step=1),
        event(step=3, curvature=5.0, curvature_se=0.25, curvature_step=3),
    ]
    found = integrate(events)["pne_star"]
    assert found.value == pytest.approx(0.1 * 4 / 2 * 2 + 0.1 * 4 / 5)
    draw = torch.Generator().manual_seed(0)
    z = torch.randn(200_000, 5, generator=draw, dtype=torch.float64)
    traces = 4 + 0.4 * z[:, :3]
    # To first order, as the delta method has it.
    one, two = 1 / 2 * (1 - 0.1 * z[:, 3]), 1 / 5 * (1 - 0.05 * z[:, 4])
    simulated = 0.1 * (traces[:, 0] * one + traces[:, 1] * one + traces[:, 2] * two)
    assert found.stderr == pytest.approx(simulated.std().item(), rel=0.01)
    assert math.isnan(integrate([event(curvature=-1.0, curvature_se=0.1)])["pne_star"].value)


def test_the_noise_scale_is_a_ratio_of_averages() -> None:
    """B (T1 + T2) / (S1 + S2), where a mean of ratios would be another number; S = |g|^2 - T."""
    events = [
        event(trace_pcp=1.0, signal_pcp=11.0, trace_c=2.0, signal_c=4.0),
        event(trace_pcp=3.0, signal_pcp=5.0, trace_c=2.0, signal_c=12.0),
    ]
    preconditioned, plain = noise_scale(events)
    assert preconditioned.value == pytest.approx(8 * (1 + 3) / (10 + 2))
    assert plain.value == pytest.approx(8 * 4 / 12)
    mean_of_ratios = 8 * (1 / 10 + 3 / 2) / 2
    assert abs(preconditioned.value - mean_of_ratios) > 1
    # One event may have drowned its signal; the average decides.
    assert noise_scale([*events, event(trace_pcp=3.0, signal_pcp=2.0)])[0].value == pytest.approx(8 * 7 / 11)


def test_a_noise_scale_without_a_signal_is_unknown_not_negative() -> None:
    preconditioned, plain = noise_scale([event(trace_pcp=4.0, signal_pcp=3.0, trace_c=1.0, signal_c=5.0)])
    assert math.isnan(preconditioned.value)
    assert math.isnan(preconditioned.stderr)
    assert plain.value == pytest.approx(8 / 4)
    assert all(math.isnan(found.value) for found in noise_scale([]))


def test_the_noise_scale_is_the_datas_not_that_of_drawing_without_replacement() -> None:
    """Half the data set in a batch halves the trace; C is what it was."""
    half = event(trace_c=1.0, signal_c=9.0, population_factor=0.5)
    assert noise_scale([half])[1].value == pytest.approx(8 * 2 / 8)
    assert math.isnan(noise_scale([event(population_factor=0.0)])[1].value)


def test_a_half_life_weighs_new_events_more() -> None:
    """At half-life 1, weights 1/4, 1/2 and 1 over their sum."""
    events = [event(trace_c=t, signal_c=10 + t) for t in (1.0, 2.0, 5.0)]
    expected = 8 * (0.25 * 1 + 0.5 * 2 + 1 * 5) / 1.75 / 10
    assert noise_scale(events, half_life=1)[1].value == pytest.approx(expected)


def test_the_noise_scales_error_knows_that_trace_and_signal_covary() -> None:
    """Delta method: d(T/S) with Cov(T, S) = -0.5 se(T) se(S) of one event; B scales all."""
    one = event(trace_c=2.0, trace_c_se=0.2, signal_c=12.0, signal_c_se=0.5, covariance_c=-0.05)
    found = noise_scale([one])[1]
    b, t, s = 8, 2.0, 10.0
    variance = (b * 0.2 / s) ** 2 + (b * t / s**2 * 0.5) ** 2 + 2 * (b / s) * (b * t / s**2) * 0.05
    assert found.stderr == pytest.approx(math.sqrt(variance))
    # Four alike: half the error.
    assert noise_scale([one] * 4)[1].stderr == pytest.approx(found.stderr / 2)


def test_the_meters_noise_scale_is_b_trace_over_signal() -> None:
    """McCandlish's unbiased pair from one update: B Tr(C/B) / (|g|^2 - Tr(C/B)), B = 12 sequences."""
    run = Run()
    run.net[2].bias.data += 3.0  # a signal
    run.updates(1)
    last = run.meter.last
    assert last is not None
    row = run.meter.ledger.iloc[0]
    assert row["batch"] == 12
    assert last.gns.value == pytest.approx(12 * row["trace_c"] / (row["signal_c"] - row["trace_c"]))
    expected = 12 * row["trace_pcp"] / (row["signal_pcp"] - row["trace_pcp"])
    if expected > 0:
        assert last.gns_preconditioned.value == pytest.approx(expected)


def test_averages_are_over_updates_or_events_and_leave_out_what_is_unknown() -> None:
    known = {"effective_rank": 8.0, "effective_rank_se": 2.0, "top_share": 0.5}
    events = [
        event(clip=1.0, **known),
        event(updates=3, sum_lr=0.6, clip=0.25, effective_rank=math.nan, top_share=math.nan),
        event(clip=1.0, **(known | {"effective_rank": 4.0, "effective_rank_se": 0.0})),
    ]
    found = averages(events)
    # eta Tr(PCP/B) / (2 Tr P): 0.1 and 0.2 x 4 / 10, over 1, 3 and 1 updates.
    assert found["t_eff"][0].value == pytest.approx((0.04 + 3 * 0.08 + 0.04) / 5)
    assert found["t_eff"][1] == "loss"
    assert found["effective_rank"][0] == pytest.approx(Estimate(6.0, 1.0))
    assert found["top_share"][0].value == 0.5
    assert found["clip_rate"][0].value == 3 / 5
    assert found["effective_ratio"][0].value == pytest.approx(0.5)
    assert found["gns"][0] == noise_scale(events)[1]
    assert found["gns_preconditioned"][0] == noise_scale(events)[0]
    assert all(math.isnan(estimate.value) for estimate, _ in averages([]).values())


def test_an_event_that_measured_nothing_but_the_trace_still_counts() -> None:
    """The norms estimator has no error of the signal: its value stays, the error is unknown."""
    bare = replace(event(), signal_c_se=math.nan, covariance_c=math.nan, trace_p=math.nan)
    assert integrate([bare])["pne2"].value == pytest.approx(0.04)
    assert noise_scale([bare])[1].value == pytest.approx(8 * 3 / 4)
    assert math.isnan(noise_scale([bare])[1].stderr)
    assert math.isnan(bare.temperature.value)


def test_the_ledgers_columns_are_the_events_fields() -> None:
    run = Run()
    run.updates(2)
    assert list(run.meter.ledger.columns) == list(asdict(event()))
    assert len(run.meter.ledger) == 2
