"""Hooks for one measured update: what each backward() adds, and what the model and its layers saw."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch._C import _current_graph_task_id

from gradnoise.base.errors import InputError
from gradnoise.noise.capture import Capture, heard
from gradnoise.noise.curvature import Inputs, batch_of, describe, tokens_of
from gradnoise.noise.update import Member, Rows


class Listener:
    """Listens until `stop`. `capture`: examples of the first micro-batch to keep (None: all, 0: none);
    `always`: even if there are more micro-batches (else what layers saw is then forgotten).

    A leaf's hook sees what one backward() adds before it is added, and before DistributedDataParallel reduces
    it. Calls of backward() are told apart by the engine's number of the graph task.
    """

    def __init__(
        self,
        model: nn.Module,
        members: Sequence[Member],
        capture: int | None,
        keep_inputs: bool,
        always: bool = False,
    ) -> None:
        self._members, self._always = members, always
        self._keep_inputs = keep_inputs
        self._tasks: list[int] = []
        self._rows: dict[str, list[tuple[int, Tensor]]] = {member.name: [] for member in members}
        # One entry a forward pass.
        self.batches: list[int] = []
        self.tokens: list[int] = []
        self.inputs: list[Inputs] = []
        self.capture: Capture | None = None
        if capture != 0:
            self.capture = Capture(model, {member.parameter for member in members}, capture)
        self._handles: list[Any] = [model.register_forward_pre_hook(self._given, with_kwargs=True)]
        self._handles += [
            m.parameter.register_hook(self._recorder(m))  # type: ignore[no-untyped-call]
            for m in members
        ]

    def stop(self) -> None:
        """Detach every hook; what was recorded stays."""
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def forget_layers(self) -> None:
        """Drop what layers saw, with their hooks."""
        if self.capture is not None:
            self.capture.remove()

    def _given(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if not heard():
            return
        if self.batches and not self._members and not self._keep_inputs:
            # For norms, at every update: its micro-batches are taken to be alike, which saves looking.
            self.batches.append(self.batches[-1])
            self.tokens.append(self.tokens[-1])
            return
        self.batches.append(batch_of(args, kwargs))
        self.tokens.append(tokens_of(args, kwargs))
        if self._keep_inputs:
            self.inputs.append((args, kwargs))
        if self.capture is not None:
            describe(self.capture, args, kwargs)

    def _recorder(self, member: Member) -> Callable[[Tensor], None]:
        rows = self._rows[member.name]

        def record(gradient: Tensor) -> None:
            task = _current_graph_task_id()
            if task not in self._tasks:
                self._begin(task)
            flat = gradient.detach().flatten()
            if member.index is not None:
                flat = flat[member.index]
            elif member.parameter.grad is None and flat.data_ptr() == gradient.data_ptr():
                # Accumulation may adopt this tensor as .grad and then add to it; later ones are only read.
                flat = flat.clone()
            rows.append((task, flat))

        return record

    def _begin(self, task: int) -> None:
        """A new backward(). If nothing is accumulated, zero_grad() threw away what came before."""
        if self._tasks and all(m.parameter.grad is None or not m.parameter.grad.any() for m in self._members):
            self._tasks.clear()
            for rows in self._rows.values():
                rows.clear()
            del self.batches[:-1], self.tokens[:-1], self.inputs[:-1]
            if self.capture is not None:
                self.capture.keep(task)  # the last layers' outputs come before the first parameter
        self._tasks.append(task)
        if len(self._tasks) > 1 and self.capture is not None:
            if self._always:
                self.capture.stop()
                self.capture.keep(self._tasks[0])
            else:
                self.forget_layers()

    def contributions(self) -> Rows:
        """R flat gradients of every member that had any; where one backward() did not reach it, zeros.

        Nested backward() calls of reentrant checkpointing count as one, since each reaches its own parameters
        once.
        """
        counts = {len(rows) for rows in self._rows.values()} - {0}
        found: Rows = {}
        for member in self._members:
            rows = self._rows[member.name]
            zero = torch.zeros(member.kept, dtype=member.parameter.dtype, device=member.parameter.device)
            if not rows:
                found[member.name] = [zero] * max(counts, default=0)
            elif len(counts) == 1:
                found[member.name] = [row for _, row in rows]
            else:
                at = dict(rows)
                if len(at) != len(rows):
                    raise InputError(
                        f"gradient of {member.name}",
                        "arrives twice in one backward()",
                        "use non-reentrant activation checkpointing",
                    )
                found[member.name] = [at.get(task, zero) for task in self._tasks]
        return found
