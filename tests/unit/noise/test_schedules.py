"""Schedules at their ends, in between, and outside."""

import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gradnoise.base.errors import InputError
from gradnoise.noise.schedules import constant, cosine, ramp, window

VALUES = st.floats(-1e6, 1e6)
STRETCHES = st.sampled_from([ramp, cosine])


def test_at_known_steps() -> None:
    assert [ramp(0.0, 1.0, 4)(step) for step in range(1, 7)] == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]
    assert [ramp(2.0, 1.0, 2, first=3)(step) for step in range(1, 7)] == [2.0, 2.0, 2.0, 1.5, 1.0, 1.0]
    slopes = [cosine(1.0, 0.0, 3)(step) for step in range(5)]
    assert slopes == pytest.approx([1.0, 0.75, 0.25, 0.0, 0.0], abs=1e-15)
    assert [window(3.0, 2, 4)(step) for step in range(1, 6)] == [0.0, 3.0, 3.0, 3.0, 0.0]
    assert window(3.0, 2, 2)(2) == 3.0
    assert [constant(7)(step) for step in (1, 10**9)] == [7.0, 7.0]


@given(STRETCHES, VALUES, VALUES, st.integers(1, 10**6), st.integers(0, 10**6), st.integers(0, 3 * 10**6))
def test_a_stretch_is_exact_at_its_ends_held_outside_and_monotone_between(
    kind: type[ramp], start: float, end: float, updates: int, first: int, step: int
) -> None:
    schedule = kind(start, end, updates, first)
    assert schedule(0) == schedule(first) == start
    assert schedule(first + updates) == schedule(first + updates + step) == end
    slack = 1e-9 * (1 + abs(start) + abs(end))
    assert min(start, end) - slack <= schedule(step) <= max(start, end) + slack
    rise = schedule(step + 1) - schedule(step)
    assert rise * (end - start) >= -slack * abs(end - start)


@given(STRETCHES, VALUES, st.integers(1, 1000), st.integers(0, 2000))
def test_between_equal_ends_nothing_moves(kind: type[ramp], value: float, updates: int, step: int) -> None:
    assert kind(value, value, updates)(step) == value


@given(VALUES, VALUES, st.integers(1, 1000), st.integers(0, 1000))
def test_a_cosine_is_a_ramp_bent(start: float, end: float, updates: int, step: int) -> None:
    """Half way the same, and symmetric around it."""
    bent = cosine(start, end, 2 * updates)
    size = 1 + abs(start) + abs(end)
    assert bent(updates) == pytest.approx(ramp(start, end, 2 * updates)(updates), abs=1e-12 * size)
    assert bent(updates - step) + bent(updates + step) == pytest.approx(start + end, abs=1e-12 * size)


def test_whole_numbers_become_floats() -> None:
    for schedule in (constant(1), ramp(1, 2, 3), cosine(1, 2, 3), window(1, 2, 3)):
        assert all(type(schedule(step)) is float for step in range(8))


def test_they_print_and_compare() -> None:
    assert repr(cosine(0.5, 0.0, 100)) == "cosine(start=0.5, end=0.0, updates=100, first=0)"
    assert repr(window(4.0, 1, 9)) == "window(value=4.0, first=1, last=9)"
    assert ramp(0, 1, 5) == ramp(0.0, 1.0, 5, first=0) != ramp(0.0, 1.0, 6)
    assert ramp(0.0, 1.0, 5) != cosine(0.0, 1.0, 5)
    assert len({constant(1.0), constant(1.0), constant(2.0)}) == 2


@pytest.mark.parametrize(
    ("kind", "arguments", "message"),
    [
        (constant, (math.nan,), "value: nan: must be finite"),
        (window, (math.inf, 1, 2), "value: inf: must be finite"),
        (window, (1.0, 0, 2), "first: 0: must be 1 or more: 1 is the first update"),
        (window, (1.0, 3, 2), "last: 2: must be first=3 or later"),
        (ramp, (math.inf, 1.0, 5), "start: inf: must be finite"),
        (cosine, (0.0, math.nan, 5), "end: nan: must be finite"),
        (ramp, (0.0, 1.0, 0), "updates: 0: must be 1 or more"),
        (cosine, (0.0, 1.0, 5, -1), "first: -1: must be 0 or more"),
    ],
)
def test_bad_input(kind: Any, arguments: tuple[float, ...], message: str) -> None:
    with pytest.raises(InputError) as caught:
        kind(*arguments)
    assert str(caught.value) == message
