"""The training loop: a stretch of updates with the meter in the live step."""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from gradnoise.noise.exposure import exposure
from gradnoise.noise.integrals import Event, Part
from gradnoise.tasks.stream import Stream
from gradnoise.training.conditions import TrunkNoise

# Of a part of the batch, by its number, size and device: weights of its losses, None for their plain mean.
Weights = Callable[[int, int, torch.device], Tensor | None]

# Training sequences are drawn in numbered chunks, so sequence n is the same whatever the batch size.
CHUNK = 4096


class Batches:
    """Consecutive training sequences of a stream, on a device; only the current chunk is held."""

    def __init__(self, stream: Stream, device: str) -> None:
        self._stream, self._device = stream, device
        self._number, self._chunk = -1, (torch.empty(0), torch.empty(0))

    def __call__(self, start: int, count: int) -> tuple[Tensor, Tensor]:
        """Inputs and targets of sequences `start` to `start + count - 1`."""
        number, offset = divmod(start, CHUNK)
        if number != self._number:
            inputs, targets = self._stream.draw(number, CHUNK)
            self._number, self._chunk = number, (inputs.to(self._device), targets.to(self._device))
        inputs, targets = (part[offset : offset + count] for part in self._chunk)
        if len(inputs) < count:
            more = self(start + len(inputs), count - len(inputs))
            inputs, targets = torch.cat([inputs, more[0]]), torch.cat([targets, more[1]])
        return inputs, targets


@dataclass
class State:
    """A run in progress: what training changes. `noise`: state of what is injected, empty at the start."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    step: int = 0
    sum_lr: float = 0.0
    loss_hash: str = ""
    noise: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Window:
    """Training loss over the updates between two measured ones; fields as in table `trajectory`."""

    step: int
    learning_rate: float
    loss: float | None
    loss_hash: str


@dataclass(frozen=True)
class Settings:
    """What a stretch needs beside its state."""

    batch: int
    contributions: int
    every: int
    clip: float | None
    curvature_every: int | None = None


@dataclass(frozen=True)
class Stretch:
    """What a stretch of updates logged; `diverged` if a loss or a measured trace was not finite.

    `parts` are layers and classes; single tensors would make most of a run's bytes.
    """

    windows: list[Window]
    events: list[Event]
    parts: list[Part]
    diverged: bool


def train(
    state: State,
    batches: Batches,
    settings: Settings,
    updates: int,
    rate: Callable[[int], float],
    advance: Callable[[int], None],
    noise: TrunkNoise | None = None,
) -> Stretch:
    """Do `updates` updates in place, the n-th at learning rate `rate(n)`, n from 0; stop on divergence.

    One update in `settings.every`, the first included, is made from `contributions` micro-batches of the
    same batch and measured. Losses are looked at once per window, so plain updates wait for nothing. `noise`
    goes on from where `state` left it, and is detached at the end.
    """
    model, optimizer, start = state.model, state.optimizer, state.step
    meter = exposure(
        model,
        optimizer,
        settings.every,
        estimator="micro",
        curvature=None if settings.curvature_every is None else "mc_fisher",
        curvature_every=settings.curvature_every or 1,
    )
    injection = None if noise is None else noise.attach(model, optimizer, meter, settings.every)
    if injection is not None and state.noise:
        injection.load_state_dict(state.noise)
    parameters = list(model.parameters())
    windows: list[Window] = []
    losses: list[Tensor] = []
    for n in range(updates):
        inputs, targets = batches(state.step * settings.batch, settings.batch)
        now = rate(n)
        for group in optimizer.param_groups:
            group["lr"] = now
        weights = None if noise is None else partial(noise.weights, state.step + 1)
        parts = settings.contributions if meter.due else 1
        losses.append(_backward(model, inputs, targets, parts, weights))
        meter.observe(losses[-1])
        if settings.clip is not None:
            meter.clip_grad_norm_(settings.clip)
        optimizer.step()
        # What optimizer.zero_grad() does, without its bookkeeping: that costs 1 % of a small model's update.
        for parameter in parameters:
            parameter.grad = None
        state.step += 1
        state.sum_lr += now
        if len(losses) == settings.every or n == updates - 1:
            windows.append(_window(state, now, torch.stack(losses)))
            advance(len(losses) * settings.batch)
            losses.clear()
            if windows[-1].loss is None:
                break
    meter.remove()
    if injection is not None:
        state.noise = injection.state_dict()
        injection.remove()
    # From the first number that is not finite on, the run is lost and its noise has no meaning.
    finite = [event for event in meter.events if _finite(event)]
    lost = min((event.step for event in meter.events if not _finite(event)), default=None)
    return Stretch(
        windows,
        [_shifted(e, start) for e in finite if lost is None or e.step < lost],
        [
            replace(p, step=p.step + start)
            for p in meter.parts
            if p.kind != "tensor" and (lost is None or p.step < lost)
        ],
        diverged=lost is not None or windows[-1].loss is None,
    )


def _backward(
    model: nn.Module, inputs: Tensor, targets: Tensor, parts: int, weights: Weights | None
) -> Tensor:
    """Accumulate the gradient of the batch's loss from `parts` micro-batches; return the unweighted loss."""
    if parts == 1:
        loss, minimised = _losses(model, inputs, targets, 0, weights)
        minimised.backward()  # type: ignore[no-untyped-call]
        return loss.detach()
    total = torch.zeros((), device=inputs.device)
    for part, (x, y) in enumerate(zip(inputs.chunk(parts), targets.chunk(parts), strict=True)):
        loss, minimised = _losses(model, x, y, part, weights)
        (minimised / parts).backward()  # type: ignore[no-untyped-call]
        total += loss.detach() / parts
    return total


def _losses(
    model: nn.Module, inputs: Tensor, targets: Tensor, part: int, weights: Weights | None
) -> tuple[Tensor, Tensor]:
    """Mean loss of a part of the batch, and what is minimised: the same, or the weighted mean."""
    logits = model(inputs).flatten(0, -2)
    chosen = None if weights is None else weights(part, len(inputs), inputs.device)
    if chosen is None:
        loss = cross_entropy(logits, targets.flatten())
        return loss, loss
    # One loss a sequence, because sequences are what a batch draws.
    losses = cross_entropy(logits, targets.flatten(), reduction="none").view(len(inputs), -1).mean(1)
    return losses.mean(), (chosen * losses).mean()


def _window(state: State, rate: float, losses: Tensor) -> Window:
    content = losses.float().cpu().numpy().tobytes()
    state.loss_hash = hashlib.sha256(state.loss_hash.encode() + content).hexdigest()
    finite = bool(losses.isfinite().all())
    mean = losses.double().mean().item() if finite else None
    return Window(state.step, rate, mean, state.loss_hash)


def _shifted(event: Event, start: int) -> Event:
    """The meter counts from the start of its stretch, the run from its own."""
    curvature = event.curvature_step + start if event.curvature_step else 0
    return replace(event, step=event.step + start, curvature_step=curvature)


def _finite(event: Event) -> bool:
    numbers = (event.trace_pcp, event.trace_pcp_se, event.trace_c, event.trace_c_se)
    return bool(torch.tensor([*numbers, event.signal_pcp, event.signal_c]).isfinite().all())
