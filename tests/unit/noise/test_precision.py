"""Half precision, loss scaling, recomputed activations and compiled models leave the reading what it is."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.checkpoint import checkpoint

from gradnoise import exposure
from gradnoise.base.errors import InputError
from gradnoise.noise.exposure import Exposure

WORDS, WIDTH, LENGTH, BATCH, PARTS = 29, 32, 6, 16, 4


class Net(nn.Module):
    """A few layers over tokens; `recompute`: None, or activation checkpointing, reentrant or not."""

    def __init__(self, recompute: bool | None = None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(WORDS, WIDTH)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WIDTH), nn.GELU(), nn.Linear(WIDTH, WIDTH))
            for _ in range(2)
        )
        self.head = nn.Linear(WIDTH, WORDS)
        self.recompute = recompute

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        for block in self.blocks:
            inner = x if self.recompute is None else checkpoint(block, x, use_reentrant=self.recompute)
            x = x + (block(x) if self.recompute is None else inner)
        return self.head(x)  # type: ignore[no-any-return]


def batch(step: int, parts: int) -> list[tuple[Tensor, Tensor]]:
    draw = torch.Generator().manual_seed(step)
    ids = torch.randint(WORDS, (2, BATCH, LENGTH), generator=draw)
    return list(zip(ids[0].chunk(parts), ids[1].chunk(parts), strict=True))


def loss_of(outputs: Tensor, targets: Tensor) -> Tensor:
    return cross_entropy(outputs.float().flatten(0, 1), targets.flatten())


def train(
    net: nn.Module,
    parts: int = PARTS,
    steps: int = 3,
    scaler: torch.amp.GradScaler | None = None,
    clip: float | None = None,
    autocast: bool = False,
    call: Callable[..., Tensor] | None = None,
    kept: bool = False,
    spoiled: int | None = None,
    left_out: int | None = None,
    fused: bool = False,
    told: bool = True,
    **options: Any,
) -> Exposure:
    """`spoiled`: the attempt whose loss overflows; `kept`: gradients are zeroed in place."""
    call = net if call is None else call
    step_of = torch.optim.AdamW(net.parameters(), lr=1e-2, fused=fused)
    meter = exposure(net, step_of, every=1, scaler=scaler if told else None, **options)
    for step in range(steps):
        if step == left_out:
            continue
        for x, y in batch(step, parts):
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                loss = loss_of(call(x), y) / parts
            if step == spoiled:
                loss = loss * math.inf
            (loss if scaler is None else scaler.scale(loss)).backward()
        if clip is not None:
            if scaler is not None:
                scaler.unscale_(step_of)
            meter.clip_grad_norm_(clip)
        if scaler is None:
            step_of.step()
        else:
            scaler.step(step_of)
            scaler.update()
        step_of.zero_grad(set_to_none=not kept)
    meter.remove()
    return meter


def traces(meter: Exposure) -> list[float]:
    return [value for event in meter.events for value in (event.trace_pcp, event.trace_c)]


@pytest.mark.parametrize("estimator", ["micro", "example"])
def test_autocast_reads_what_full_precision_reads(estimator: str) -> None:
    parts = PARTS if estimator == "micro" else 1
    full = train(Net(), parts, steps=1, estimator=estimator)
    mixed = train(Net(), parts, steps=1, estimator=estimator, autocast=True)
    assert traces(mixed) == pytest.approx(traces(full), rel=0.02)
    assert traces(mixed) != traces(full)
    assert mixed.events[0].clip == 1.0


@pytest.mark.parametrize("estimator", ["micro", "example"])
def test_a_model_in_bfloat16_reads_what_its_twin_in_full_precision_reads(estimator: str) -> None:
    parts = PARTS if estimator == "micro" else 1
    half = train(Net().bfloat16(), parts, steps=1, estimator=estimator)
    full = train(Net().bfloat16().float(), parts, steps=1, estimator=estimator)
    assert traces(half) == pytest.approx(traces(full), rel=0.05)
    later = train(Net().bfloat16(), parts, steps=5, estimator=estimator, clip=0.1)
    assert [event.step for event in later.events] == [1, 2, 3, 4, 5]
    assert all(math.isfinite(value) for value in traces(later))


@pytest.mark.parametrize("estimator", ["micro", "example", "norms"])
@pytest.mark.parametrize("fused", [False, True])
def test_the_scale_of_a_scaled_loss_cancels(estimator: str, fused: bool) -> None:
    parts = 1 if estimator == "example" else PARTS
    plain = train(Net().double(), parts, estimator=estimator, fused=fused)
    for power in (4, 12, 30):
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**power)
        scaled = train(Net().double(), parts, scaler=scaler, estimator=estimator, fused=fused)
        assert traces(scaled) == pytest.approx(traces(plain), rel=1e-9)
        assert [event.clip for event in scaled.events] == [1.0] * len(plain.events)


@pytest.mark.parametrize("kept", [False, True])
@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("estimator", ["micro", "example"])
def test_an_update_that_the_scaler_skips_is_not_there(estimator: str, fused: bool, kept: bool) -> None:
    """Attempts 0, 1, 2 of which 1 overflows are the updates 1 and 2, of batches 0 and 2; the scale halves."""
    parts = 1 if estimator == "example" else PARTS
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    spoiled = train(Net().double(), parts, 3, scaler, spoiled=1, fused=fused, kept=kept, estimator=estimator)
    assert scaler.get_scale() == 2.0**9
    assert [event.step for event in spoiled.events] == [1, 2]
    assert [event.updates for event in spoiled.events] == [1, 1]
    assert spoiled.skipped == 0
    assert all(event.batch == BATCH for event in spoiled.events)
    plain = train(Net().double(), parts, 3, fused=fused, kept=kept, estimator=estimator)
    assert traces(spoiled)[:2] == pytest.approx(traces(plain)[:2], rel=1e-9)
    without = train(Net().double(), parts, 3, left_out=1, fused=fused, estimator=estimator)
    assert traces(spoiled) == pytest.approx(traces(without), rel=1e-9)


def test_a_scaler_that_the_meter_was_not_told_of_is_refused() -> None:
    with pytest.raises(InputError, match="times the sum of backward.. calls: give the GradScaler as scaler="):
        train(Net(), scaler=torch.amp.GradScaler("cpu", init_scale=2.0**16), told=False)


@pytest.mark.parametrize("estimator", ["micro", "example"])
def test_clipping_after_unscaling(estimator: str) -> None:
    parts = 1 if estimator == "example" else PARTS
    plain = train(Net().double(), parts, clip=0.05, estimator=estimator)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    scaled = train(Net().double(), parts, scaler=scaler, clip=0.05, estimator=estimator)
    assert all(event.clip < 0.5 for event in plain.events)
    for one, other in zip(scaled.events, plain.events, strict=True):
        for name in ("clip", "trace_pcp", "trace_c", "trace_effective", "gradient_norm", "second_moment"):
            assert getattr(one, name) == pytest.approx(getattr(other, name), rel=1e-9)


@pytest.mark.parametrize("reentrant", [False, True])
def test_recomputed_activations_change_nothing_for_micro_batches(reentrant: bool) -> None:
    net = Net(reentrant).double()
    if reentrant:  # the first block's input must require a gradient, which an embedding's output does
        net.embed.requires_grad_(True)
    assert traces(train(net)) == pytest.approx(traces(train(Net().double())), rel=1e-12)


def test_recomputed_activations_change_nothing_for_examples() -> None:
    plain = train(Net().double(), 1, estimator="example")
    assert traces(train(Net(False).double(), 1, estimator="example")) == pytest.approx(
        traces(plain), rel=1e-12
    )


def test_reentrant_recomputation_is_read_right_or_refused_for_examples() -> None:
    plain = train(Net().double(), 1, estimator="example")
    try:
        found = traces(train(Net(True).double(), 1, estimator="example"))
    except InputError as error:
        assert "checkpoint" in str(error)  # noqa: PT017
    else:
        assert found == pytest.approx(traces(plain), rel=1e-12)


@pytest.mark.parametrize("given", ["module", "compiled"])
def test_a_compiled_model(given: str) -> None:
    torch._dynamo.reset()
    net = Net().double()
    compiled = torch.compile(net, backend="eager")
    meter = train(net if given == "module" else compiled, call=compiled, estimator="micro")
    plain = train(Net().double(), estimator="micro")
    assert traces(meter) == pytest.approx(traces(plain), rel=1e-12)
    assert [event.batch for event in meter.events] == [BATCH] * 3
    assert [event.tokens for event in meter.events] == [BATCH * LENGTH] * 3
    assert {(part.kind, part.part) for part in meter.parts} == {
        (part.kind, part.part) for part in plain.parts
    }


@pytest.mark.parametrize("parts", [1, PARTS])
@pytest.mark.parametrize("estimator", ["auto", "norms"])
def test_gradients_zeroed_in_place(parts: int, estimator: str) -> None:
    kept = train(Net().double(), parts, kept=True, estimator=estimator)
    freed = train(Net().double(), parts, estimator=estimator)
    assert kept.events == freed.events or repr(kept.events) == repr(freed.events)
    assert len(freed.events) == (
        0 if estimator == "norms" and parts == 1 else 2 if estimator == "norms" else 3
    )
