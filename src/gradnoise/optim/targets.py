"""What noise is aligned with: feeds for the sketches, from the run's own passes.

- "features": Sigma = E[phi phi'] of the layer's inputs phi; the output side stays the identity.
- "tasks": what differs between tasks in their mean gradients, on every side. Each backward() is a task, or
  all those under one `label`; with two or more of a task's calls the part that comes from within tasks is
  subtracted (one-way analysis of variance).

Only shapes matter: traces are normalised away, the amount of noise is set by temperature.
"""

import math
import warnings
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch._C import _current_graph_task_id

from gradnoise.noise.capture import heard
from gradnoise.optim.shapes import Shape
from gradnoise.optim.sketch import Sketch

# Rows of a layer's input that one forward pass gives to a sketch.
ROWS = 256
# Fewer tasks than this in an update say little about what differs between tasks.
FEW = 4


class Features:
    """Sees the inputs of every weight's layers, at most `ROWS` rows a forward pass."""

    def __init__(self, shapes: Sequence[Shape]) -> None:
        self.due = False
        self._found: dict[Sketch, Tensor] = {}
        self._of = {shape.sketches[w.input_side]: w for shape in shapes for w in shape.weights}
        self._unseen: set[str] = set()
        self._hooks = [
            layer.register_forward_pre_hook(self._hook(sketch), with_kwargs=True)
            for sketch, weight in self._of.items()
            for layer in weight.layers
        ]

    def _hook(self, sketch: Sketch) -> Any:
        def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if self.due:
                self._see(sketch, *args, *kwargs.values())

        return hook

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _see(self, sketch: Sketch, inputs: Tensor, *_: Any) -> None:
        if not heard():
            return
        products = sketch.products(_spread(inputs.detach().reshape(-1, inputs.shape[-1])))
        before = self._found.get(sketch)
        self._found[sketch] = products if before is None else before + products

    def collect(self) -> dict[Sketch, Tensor]:
        """Products of what was seen since the last call, for layers that were used."""
        found, self._found = self._found, {}
        return found

    def warn(self, missed: Sequence[Sketch]) -> None:
        """Say once of each layer that was used, but not seen, that its noise cannot be aligned."""
        for weight in (self._of[sketch] for sketch in missed):
            gradient = weight.place.parameter.grad
            if weight.path in self._unseen or gradient is None or not gradient.any():
                continue
            self._unseen.add(weight.path)
            warnings.warn(
                f"target features: {weight.path} got a gradient, but its forward() was not seen (not called,"
                " or compiled before): its noise stays isotropic; leave it out of layers=, or give a target",
                stacklevel=2,
            )

    def forget(self) -> None:
        """Drop what was seen."""
        self._found = {}

    def remove(self) -> None:
        """Detach."""
        for hook in self._hooks:
            hook.remove()


def _spread(rows: Tensor) -> Tensor:
    """At most `ROWS` of the rows, evenly spread, by steps that share no divisor with their number.

    Rows at a fixed distance could be the same position of every sequence.
    """
    count = len(rows)
    if count <= ROWS:
        return rows
    step = next(n for n in range(round(0.618 * count), count) if math.gcd(n, count) == 1)
    return rows[torch.arange(ROWS, device=rows.device) * step % count]


@dataclass
class _Moments:
    """Number and mean of gradients, and their sums of squares about it as a sketch's products (Welford)."""

    count: int = 0
    mean: list[Tensor] = field(default_factory=list)
    about: dict[Sketch, Tensor] = field(default_factory=dict)

    @torch.no_grad()
    def add(self, shape: Shape, gradients: Sequence[Tensor]) -> None:
        self.count += 1
        if self.count == 1:
            self.mean = [g.to(torch.promote_types(g.dtype, torch.float32), copy=True) for g in gradients]
            return
        off = [gradient - mean for gradient, mean in zip(gradients, self.mean, strict=True)]
        for side, sketch in shape.sketches.items():
            products = sketch.products(_rows(off, side), weight=1 - 1 / self.count, count=0)
            before = self.about.get(sketch)
            self.about[sketch] = products if before is None else before + products
        for mean, distance in zip(self.mean, off, strict=True):
            mean.add_(distance, alpha=1 / self.count)


def _rows(gradients: Sequence[Tensor], side: str) -> Tensor:
    """Vectors that a side's covariance is of: columns of the matrix (left), its rows (right), all in one."""
    if side == "whole":
        return torch.cat([gradient.flatten() for gradient in gradients])[None]
    (gradient,) = gradients
    return gradient.T if side == "left" else gradient


class _Heard:
    """Gradients of one shape in the update under way.

    Of a task under a label its mean is kept; of tasks of one call each only theirs, so one gradient in all.
    """

    def __init__(self, shape: Shape) -> None:
        self._shape = shape
        self._single, self._labelled = _Moments(), dict[Hashable, _Moments]()
        # Of several weights, each one's calls: number, label and gradient. They are small (`nap.LARGEST`).
        self._calls: list[list[tuple[int, Hashable, Tensor]]] = [[] for _ in shape.weights]

    def take(self, weight: int, call: int, label: Hashable, gradient: Tensor) -> None:
        if len(self._calls) > 1:
            self._calls[weight].append((call, label, gradient.clone()))
        else:
            self._add(label, [gradient])

    def _add(self, label: Hashable, gradients: Sequence[Tensor]) -> None:
        task = self._single if label is None else self._labelled.setdefault(label, _Moments())
        task.add(self._shape, gradients)

    def _join(self) -> None:
        """Put the weights' gradients of each call together; a weight that a call did not reach has zeros.

        Nested backward() calls of reentrant checkpointing, each with its own weights, count as one.
        """
        if len({len(calls) for calls in self._calls}) == 1:
            for calls in zip(*self._calls, strict=True):
                self._add(calls[0][1], [gradient for _, _, gradient in calls])
            return
        labels = {call: label for calls in self._calls for call, label, _ in calls}
        tables = [{call: gradient for call, _, gradient in calls} for calls in self._calls]
        zeros = [torch.zeros_like(weight.place.parameter) for weight in self._shape.weights]
        for call, label in labels.items():
            self._add(label, [table.get(call, zero) for table, zero in zip(tables, zeros, strict=True)])

    def products(self) -> tuple[int, bool, dict[Sketch, Tensor]]:
        r"""Tasks, whether there was a correction, and products of the covariance between tasks, if of two.

        With K tasks, of which L have several calls h_kj (J_k of them) and M one, and means h_k, it is

        .. math:: \frac{1}{K-1} \sum_k (h_k - \bar h)(h_k - \bar h)' - \frac{1}{K} \sum_{J_k > 1}
                  \Big(\frac{1}{J_k} + \frac{M}{L}\Big) W_k, \quad
                  W_k = \frac{1}{J_k - 1} \sum_j (h_{kj} - h_k)(h_{kj} - h_k)'

        without bias: the variance within is each task's own, that of a task of one call the others' mean.
        """
        self._join()
        between, several = self._single, [task for task in self._labelled.values() if task.count > 1]
        for task in self._labelled.values():
            between.add(self._shape, task.mean)
        tasks, found = between.count, dict[Sketch, Tensor]()
        for sketch, total in between.about.items():
            for task in several:
                share = 1 / task.count + (tasks - len(several)) / len(several)
                total = total - (tasks - 1) / tasks * share / (task.count - 1) * task.about[sketch]
            total[-1] = tasks - 1
            found[sketch] = total
        return tasks, bool(several), found


class Tasks:
    """Sees each backward()'s gradient of every weight; `label`: task of the coming ones, None: their own."""

    def __init__(self, shapes: Sequence[Shape]) -> None:
        self.due = False
        self.label: Hashable = None
        self._shapes = shapes
        self._parameters = [weight.place.parameter for shape in shapes for weight in shape.weights]
        self._calls: set[int] = set()
        self._warned: set[str] = set()
        self.forget()
        self._hooks = [
            weight.place.parameter.register_hook(self._hook(number, n))  # type: ignore[no-untyped-call]
            for number, shape in enumerate(shapes)
            for n, weight in enumerate(shape.weights)
        ]

    def _hook(self, shape: int, weight: int) -> Any:
        def hook(gradient: Tensor) -> None:
            if not self.due:
                return
            call = _current_graph_task_id()
            if call not in self._calls:
                # If nothing is accumulated, what came before was thrown away (a GradScaler skipped its step).
                if self._calls and all(p.grad is None or not p.grad.any() for p in self._parameters):
                    self.forget()
                self._calls.add(call)
            self._heard[shape].take(weight, call, self.label, gradient.detach())

        return hook

    def collect(self) -> dict[Sketch, Tensor]:
        """Products of what differed between tasks since the last call; none from fewer than two tasks."""
        found: dict[Sketch, Tensor] = {}
        for heard_of in self._heard:
            tasks, corrected, products = heard_of.products()
            found |= products
            if tasks:
                self._warn(tasks, corrected)
        self.forget()
        return found

    def forget(self) -> None:
        """Drop what was heard."""
        self._calls.clear()
        self._heard = [_Heard(shape) for shape in self._shapes]

    def remove(self) -> None:
        """Detach."""
        for hook in self._hooks:
            hook.remove()

    def _warn(self, tasks: int, corrected: bool) -> None:
        messages = {}
        if tasks < FEW:
            few = (
                "one task in an update says nothing"
                if tasks == 1
                else f"{tasks} tasks in an update say little"
            )
            messages["few"] = f"target tasks: {few}: accumulate {FEW} or more"
        if not corrected:
            messages["corrected"] = (
                "target tasks: one backward() a task, so noise within tasks counts as difference between"
                " them: split each into two or more under one label (noise.task)"
            )
        for kind, message in messages.items():
            if kind not in self._warned:
                self._warned.add(kind)
                warnings.warn(message, stacklevel=2)
