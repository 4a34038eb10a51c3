"""When a run is called unstable, and caps on exposure; through the meter and without it."""

import math
import warnings
from typing import Any

import pytest
import torch
from torch import nn

from gradnoise import exposure
from gradnoise.base.errors import InputError
from gradnoise.noise.reading import Reading
from gradnoise.noise.stability import Cap, Stability, Thresholds

UNKNOWN = math.nan


def values(**given: float) -> dict[str, float]:
    return {"gradient_norm": 1.0, "second_moment": 1.0, "clip_rate": 0.0, "loss": 2.0} | given


def test_a_norm_is_measured_against_the_median_of_the_window() -> None:
    """One spike does not make the next one usual, and what left the window is forgotten."""
    stability = Stability(Thresholds(gradient_norm=3.0, window=5))
    first = stability.update(values(gradient_norm=2.0))["gradient_norm"]
    assert math.isnan(first.value)
    assert not first.raised
    for _ in range(4):
        assert not stability.update(values(gradient_norm=2.0))["gradient_norm"].raised
    for _ in range(2):
        spike = stability.update(values(gradient_norm=7.0))["gradient_norm"]
        assert spike == (3.5, 3.0, True)
    for _ in range(3):
        last = stability.update(values(gradient_norm=7.0))["gradient_norm"]
    assert last == (1.0, 3.0, False)
    assert len(stability.history["gradient_norm"]) == 5


def test_a_threshold_itself_is_not_above_it() -> None:
    stability = Stability(Thresholds(clip_rate=0.5))
    assert not stability.update(values(clip_rate=0.5))["clip_rate"].raised
    assert stability.update(values(clip_rate=0.501))["clip_rate"].raised


def test_the_loss_is_measured_against_the_lowest_seen() -> None:
    stability = Stability(Thresholds(loss=0.5))
    rises = [stability.update(values(loss=loss))["loss"] for loss in (3.0, 1.0, 1.4, 1.6, UNKNOWN, 0.8, 1.4)]
    assert [round(rise.value, 6) for rise in rises[:4]] == [0.0, 0.0, 0.4, 0.6]
    assert [rise.raised for rise in rises] == [False, False, False, True, False, False, True]


@pytest.mark.parametrize("name", ["gradient_norm", "second_moment", "clip_rate", "loss"])
def test_what_is_unknown_raises_nothing_and_is_not_remembered(name: str) -> None:
    stability = Stability(Thresholds())
    stability.update(values())
    found = stability.update(values(**{name: UNKNOWN}))
    assert math.isnan(found[name].value)
    assert not any(marker.raised for marker in found.values())
    assert not any(marker.raised for marker in stability.update(values()).values())


@pytest.mark.parametrize("name", ["gradient_norm", "second_moment", "loss"])
def test_what_is_infinite_is_raised_even_at_the_first_event(name: str) -> None:
    stability = Stability(Thresholds())
    assert stability.update(values(**{name: math.inf}))[name].raised
    assert not any(marker.raised for marker in stability.update(values()).values())


def test_thresholds_must_be_positive() -> None:
    with pytest.raises(InputError, match="thresholds.window.*0.*above 0"):
        Thresholds(window=0)
    with pytest.raises(InputError, match="thresholds.loss"):
        Thresholds(loss=math.nan)


class Run:
    """A linear model on AdamW with a meter; `update(scale)` makes one update, gradients times `scale`."""

    def __init__(self, **options: Any) -> None:
        torch.manual_seed(0)
        self.net = nn.Linear(3, 1).double()
        self.optimizer = torch.optim.AdamW(self.net.parameters(), lr=1e-2, betas=(0.9, 0.9))
        self.meter = exposure(self.net, self.optimizer, **{"every": 1, **options})

    def update(self, scale: float = 1.0, loss: float | None = None) -> Reading:
        for _ in range(2):
            (scale * self.net(torch.randn(4, 3).double()).square().mean() / 2).backward()
        if loss is not None:
            self.meter.observe(torch.tensor(loss))
        self.optimizer.step()
        self.optimizer.zero_grad()
        assert self.meter.last is not None
        return self.meter.last


def test_the_meter_raises_markers_of_norm_second_moment_and_loss() -> None:
    run = Run(thresholds=Thresholds(gradient_norm=20.0, second_moment=20.0, loss=1.0))
    for _ in range(4):
        assert run.update(loss=1.0).stable
    found = run.update(scale=1000.0, loss=3.0)
    assert not found.stable
    assert [name for name in found.markers if found.markers[name].raised] == [
        "gradient_norm",
        "second_moment",
        "loss",
    ]
    assert found.markers["loss"].value == pytest.approx(2.0)
    assert found.markers["gradient_norm"].threshold == 20.0
    # The event keeps what the markers came from.
    assert run.meter.ledger["loss"].iloc[-1] == 3.0
    assert run.meter.ledger["gradient_norm"].iloc[-1] > 20 * run.meter.ledger["gradient_norm"].iloc[0]


def test_the_meter_raises_the_clip_rate() -> None:
    run = Run(thresholds=Thresholds(clip_rate=0.5))
    raised = []
    for threshold in (1e9, 1e-3, 1e-3, 1e9, 1e9):
        for _ in range(2):
            (run.net(torch.randn(4, 3).double()).square().mean() / 2).backward()
        run.meter.clip_grad_norm_(threshold)
        run.optimizer.step()
        run.optimizer.zero_grad()
        assert run.meter.last is not None
        marker = run.meter.last.markers["clip_rate"]
        raised.append((round(marker.value, 3), marker.raised))
    assert raised == [(0.0, False), (0.5, False), (0.667, True), (0.5, False), (0.4, False)]


def test_without_a_loss_its_marker_is_unknown() -> None:
    found = Run().update()
    assert math.isnan(found.markers["loss"].value)
    assert found.stable


def test_a_loss_that_is_no_number_is_unstable() -> None:
    run = Run()
    run.update(loss=1.0)
    found = run.update(loss=math.nan)
    assert found.markers["loss"].raised
    assert not found.stable
    assert math.isnan(run.meter.ledger["loss"].iloc[-1])


def test_gradients_that_are_no_numbers_are_unstable() -> None:
    run = Run()
    run.update()
    found = run.update(scale=math.nan)
    assert found.markers["gradient_norm"].raised
    assert not found.stable
    assert math.isnan(found.trace.value)


@pytest.mark.parametrize("definition", ["pne", "pne2", "ne"])
def test_a_cap_counts_the_updates_of_its_phase(definition: str) -> None:
    """Updates 4 to 8 of 10 measured at 1, 4, 7 and 10: all of the second event, 2 of 3 of the third."""
    probe = Run(every=3)
    for _ in range(10):
        probe.update()
    probe.meter.remove()
    parts = [
        {
            "pne": e.sum_lr * e.trace_pcp,
            "pne2": e.sum_lr2 * e.trace_pcp,
            "ne": e.sum_lr2_c * e.trace_c,
        }[definition]
        for e in probe.meter.events
    ]
    expected = parts[1] + 2 / 3 * parts[2]
    for most, over in ((1.001 * expected, ()), (0.999 * expected, ("middle",))):
        run = Run(every=3, caps={"middle": Cap(4, 8, most, definition)})
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            readings = [run.update() for _ in range(10)]
        assert readings[-1].over == over
        assert len([w for w in caught if "exposure cap middle" in str(w.message)]) == len(over)  # once
        assert readings[2].over == ()


def test_a_cap_is_noticed_within_an_interval() -> None:
    """`over` counts the updates of the open interval; the warning comes when it ends."""
    run = Run(every=100, caps={"start": Cap(1, 5, 0.0)})
    assert run.update().over == ("start",)
    with pytest.warns(UserWarning, match="exposure cap start: pne2 .* exceeds 0"):
        run.meter.remove()


def test_a_cap_goes_on_after_a_checkpoint() -> None:
    run = Run(every=2, caps={"all": Cap(1, 100, math.inf)})
    for _ in range(3):
        run.update()
    state = run.meter.state_dict()
    other = Run(every=2, caps={"all": Cap(1, 100, math.inf)})
    other.meter.load_state_dict(state)
    assert other.meter.state_dict()["spent"] == state["spent"]
    assert state["spent"]["all"] > 0


def test_caps_of_unknown_definitions_are_refused() -> None:
    with pytest.raises(InputError, match="caps.warmup.definition"):
        Run(caps={"warmup": Cap(1, 2, 1.0, "retained")})


def test_a_saved_state_does_not_change_with_the_run() -> None:
    """The history of markers is copied, so that a state kept in memory is that of its moment."""
    run = Run()
    for _ in range(3):
        run.update(loss=1.0)
    state = run.meter.state_dict()
    before = repr(state)
    for _ in range(3):
        run.update(loss=2.0)
    assert repr(state) == before
