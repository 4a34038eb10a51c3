r"""What noise is aligned with: feeds for the sketches, from the run's own passes.

- "features": Sigma = E[phi phi'] of the layer's inputs phi; the output side stays the identity.
- "tasks": what differs between tasks in their gradients, on every side. Each backward() is a task, or all
  those under one `label`; with two or more of a task's calls the part that comes from within tasks is
  subtracted (one-way analysis of variance): between - within.

Only shapes matter: traces are normalised away, the amount of noise is set by temperature.
"""

import warnings
from collections.abc import Hashable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch._C import _current_graph_task_id

from gradnoise.noise.capture import heard
from gradnoise.optim.shapes import Shape, Weight
from gradnoise.optim.sketch import Sketch

# Rows of a layer's input that one forward pass gives to a sketch.
ROWS = 256
# Fewer tasks than this in an update say little about what differs between tasks.
FEW = 4


class Features:
    """Sees the inputs of every weight's layer, at most `ROWS` evenly spaced rows a forward pass."""

    def __init__(self, shapes: Sequence[Shape]) -> None:
        self.due = False
        self._found: dict[Sketch, Tensor] = {}
        self._hooks = [
            weight.layer.register_forward_pre_hook(self._hook(shape.sketches[weight.input_side]))
            for shape in shapes
            for weight in shape.weights
        ]

    def _hook(self, sketch: Sketch) -> Any:
        def hook(_: nn.Module, inputs: tuple[Any, ...]) -> None:
            if not (self.due and heard()):
                return
            rows = inputs[0].detach().flatten(0, -2)
            products = sketch.products(rows[:: -(-len(rows) // ROWS)])
            before = self._found.get(sketch)
            self._found[sketch] = products if before is None else before + products

        return hook

    def collect(self) -> dict[Sketch, Tensor]:
        """Products of what was seen since the last call, for layers that were used."""
        found, self._found = self._found, {}
        return found

    def forget(self) -> None:
        """Drop what was seen."""
        self._found = {}

    def remove(self) -> None:
        """Detach."""
        for hook in self._hooks:
            hook.remove()


class Tasks:
    """Sees each backward()'s gradient of every weight; `label`: task of the coming ones, None: their own."""

    def __init__(self, shapes: Sequence[Shape]) -> None:
        self.due = False
        self.label: Hashable = None
        self._shapes = shapes
        # By weight: task and gradient of each backward().
        self._heard: dict[str, list[tuple[Hashable, Tensor]]] = {}
        self._warned: set[str] = set()
        self._hooks = [
            weight.place.parameter.register_hook(self._hook(weight))  # type: ignore[no-untyped-call]
            for shape in shapes
            for weight in shape.weights
        ]

    def _hook(self, weight: Weight) -> Any:
        heard_here = self._heard.setdefault(weight.place.name, [])

        def hook(gradient: Tensor) -> None:
            if self.due:
                own = ("call", _current_graph_task_id())
                task = own if self.label is None else ("task", self.label)
                # Accumulation may adopt this tensor as .grad and then add to it.
                heard_here.append((task, gradient.detach().clone()))

        return hook

    def collect(self) -> dict[Sketch, Tensor]:
        """Products of (between - within) tasks since the last call; none from fewer than two tasks."""
        found: dict[Sketch, Tensor] = {}
        for shape in self._shapes:
            heard_of = [self._heard[weight.place.name] for weight in shape.weights]
            between, within = _centred(heard_of)
            if len(between) < 2:
                continue
            self._warn(len(between), bool(within))
            for side, sketch in shape.sketches.items():
                products = sketch.products(_rows([d for d in between], side), count=len(between) - 1)
                for weight, parts in within:
                    rows = _rows(parts, side)
                    products = products + sketch.products(rows, weight=-weight, count=0)
                found[sketch] = products
        self.forget()
        return found

    def forget(self) -> None:
        """Drop what was heard."""
        for calls in self._heard.values():
            calls.clear()

    def remove(self) -> None:
        """Detach."""
        for hook in self._hooks:
            hook.remove()

    def _warn(self, tasks: int, corrected: bool) -> None:
        messages = []
        if tasks < FEW:
            messages.append(f"target tasks: {tasks} tasks in an update say little: accumulate {FEW} or more")
        if not corrected:
            messages.append(
                "target tasks: one backward() a task, so noise within tasks counts as difference between"
                " them: split each into two or more under one label (noise.task)"
            )
        for message in messages:
            if message not in self._warned:
                self._warned.add(message)
                warnings.warn(message, stacklevel=2)


# Several weights' tensors of one task or call.
Joined = list[Tensor]


def _centred(
    heard_of: list[list[tuple[Hashable, Tensor]]],
) -> tuple[list[Joined], list[tuple[float, list[Joined]]]]:
    r"""Task gradients less their mean, and of each task with several calls those less theirs, with a weight.

    With K tasks, T_k the sum of J_k calls h_kj, and L tasks of several calls, the covariance between tasks is
    estimated without bias by

    .. math:: \frac{1}{K-1} \sum_k (T_k - \bar T)(T_k - \bar T)'
              - \frac1L \sum_k \frac{J_k}{J_k - 1} \sum_j (h_{kj} - \bar h_k)(h_{kj} - \bar h_k)'

    (the weight is that of the second sum times K - 1).
    """
    calls = min((len(heard) for heard in heard_of), default=0)
    by_task: dict[Hashable, list[Joined]] = {}
    for n in range(calls):
        by_task.setdefault(heard_of[0][n][0], []).append([heard[n][1] for heard in heard_of])
    tasks = [_sum(parts) for parts in by_task.values()]
    several = [parts for parts in by_task.values() if len(parts) > 1]
    within = [
        ((len(tasks) - 1) * len(parts) / ((len(parts) - 1) * len(several)), _less_mean(parts))
        for parts in several
    ]
    return _less_mean(tasks), within


def _sum(parts: list[Joined]) -> Joined:
    return [torch.stack(tensors).sum(0) for tensors in zip(*parts, strict=True)]


def _less_mean(parts: list[Joined]) -> list[Joined]:
    means = [tensor / len(parts) for tensor in _sum(parts)] if parts else []
    return [[t - mean for t, mean in zip(part, means, strict=True)] for part in parts]


def _rows(parts: list[Joined], side: str) -> Tensor:
    """Vectors that a side's covariance is of: columns of the tensors (left), rows (right), all in one."""
    if side == "whole":
        return torch.stack([torch.cat([tensor.flatten() for tensor in part]) for part in parts])
    return torch.cat([tensor.T if side == "left" else tensor for (tensor,) in parts])
