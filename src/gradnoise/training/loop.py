"""The training loop: a stretch of updates with the meter in the live step."""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from gradnoise.noise.exposure import exposure
from gradnoise.noise.integrals import Event, Part
from gradnoise.tasks.stream import Stream

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
    """A run in progress: what training changes."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    step: int = 0
    sum_lr: float = 0.0
    loss_hash: str = ""


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
) -> Stretch:
    """Do `updates` updates in place, the n-th at learning rate `rate(n)`, n from 0; stop on divergence.

    One update in `settings.every`, the first included, is made from `contributions` micro-batches of the
    same batch and measured. Losses are looked at once per window, so plain updates wait for nothing.
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
    parameters = list(model.parameters())
    windows: list[Window] = []
    losses: list[Tensor] = []
    for n in range(updates):
        inputs, targets = batches(state.step * settings.batch, settings.batch)
        now = rate(n)
        for group in optimizer.param_groups:
            group["lr"] = now
        losses.append(_backward(model, inputs, targets, settings.contributions if meter.due else 1))
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


def _backward(model: nn.Module, inputs: Tensor, targets: Tensor, parts: int) -> Tensor:
    """Accumulate the gradient of the batch's mean loss from `parts` micro-batches; return that loss."""
    if parts == 1:
        loss = cross_entropy(model(inputs).flatten(0, -2), targets.flatten())
        loss.backward()  # type: ignore[no-untyped-call]
        return loss.detach()
    total = torch.zeros((), device=inputs.device)
    for x, y in zip(inputs.chunk(parts), targets.chunk(parts), strict=True):
        loss = cross_entropy(model(x).flatten(0, -2), y.flatten()) / parts
        loss.backward()  # type: ignore[no-untyped-call]
        total += loss.detach()
    return total


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
