"""A Reading as scalars for TensorBoard, or for any writer with its `add_scalar`."""

import math
from dataclasses import fields
from typing import Any, Protocol

from gradnoise.noise.estimate import Estimate
from gradnoise.noise.reading import Reading

PARTS = ("trace", "pne2")


class Writer(Protocol):
    """What is needed of a `torch.utils.tensorboard.SummaryWriter`."""

    def add_scalar(self, tag: str, scalar_value: float, global_step: int) -> Any:
        """Record one number."""


def scalars(reading: Reading, parts: bool = True) -> dict[str, float]:
    """Every number of a Reading by name, as "pne2" and its standard error "pne2_stderr".

    With `parts`, `trace` and `pne2` of layers and classes follow as "layer/blocks.3/pne2" and
    "class/embedding/pne2". What was not measured (nan) is left out, and so are words and the step.
    """
    found: dict[str, Any] = {f.name: getattr(reading, f.name) for f in fields(reading)}
    found["ratio"] = reading.ratio
    if parts:
        for kind, group in (("layer", reading.by_layer), ("class", reading.by_class)):
            for name, part in group.items():
                found |= {f"{kind}/{name}/{quantity}": getattr(part, quantity) for quantity in PARTS}
    numbers: dict[str, float] = {}
    for name, value in found.items():
        if isinstance(value, Estimate):
            numbers |= {name: value.value, f"{name}_stderr": value.stderr}
        elif isinstance(value, int | float) and name != "step":
            numbers[name] = float(value)
    return {name: value for name, value in numbers.items() if not math.isnan(value)}


def write(writer: Writer, reading: Reading, prefix: str = "noise") -> None:
    """Add a Reading's scalars (`scalars`) under "prefix/..." at the update that it measured.

    Example::

        writer = SummaryWriter("logs")
        meter = exposure(model, optimizer, every=100)
        for step, batch in enumerate(batches, start=1):
            loss(model, batch).backward()
            optimizer.step()
            optimizer.zero_grad()
            if meter.last is not None and meter.last.step == step:
                write(writer, meter.last)
    """
    for name, value in scalars(reading).items():
        writer.add_scalar(f"{prefix}/{name}", value, reading.step)
