"""Estimator "norms": every update, a few blocks of coordinates, weighted by the previous step's P.

Nothing of the gradient's size is kept. The P of the step before is used, which reads too high while v is
young. Blocks are drawn at random for each update with chance proportional to their size; each stands for the
whole model, so the sum over updates is unbiased.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from gradnoise.base.streams import generator
from gradnoise.noise.estimate import Estimate
from gradnoise.noise.preconditioners import read
from gradnoise.noise.update import Update, wide

BLOCK = 1 << 12


@dataclass
class Block:
    """Some rows of a member, their chance, P^2 there, and the contributions h_r there."""

    member: int
    rows: slice
    chance: float
    squares: Tensor
    heard: list[Tensor] = field(default_factory=list)


@dataclass(frozen=True)
class NormsReading:
    """Traces with errors over blocks, squared norms of P g and g, sum of P, contributions, factor."""

    trace: Estimate
    trace_c: Estimate
    signal_pcp: float
    signal_c: float
    trace_p: float
    contributions: int
    factor: float


@dataclass
class Norms:
    """Draws blocks and listens to them for one update."""

    update: Update
    blocks: int
    seed: int
    drawn: list[Block] = field(default_factory=list)
    _handles: list[Any] = field(default_factory=list)

    def __post_init__(self) -> None:
        # Whole rows of a matrix: its gradient may be a transpose, which has no flat view.
        self._places: list[tuple[int, slice, slice]] = []
        for n, member in enumerate(self.update.members):
            length, width = len(member.parameter), member.parameter[0].numel()
            step = max(1, BLOCK // width)
            for first in range(0, length, step):
                last = min(first + step, length)
                self._places.append((n, slice(first, last), slice(first * width, last * width)))
        sizes = torch.tensor([float(flat.stop - flat.start) for _, _, flat in self._places])
        self._chances = sizes / sizes.sum()

    @torch.no_grad()
    def listen(self, step: int) -> None:
        """Draw blocks for update `step` and read P there, as it is before that update."""
        draw = generator(self.seed, "blocks", step)
        chosen = torch.multinomial(self._chances, self.blocks, replacement=True, generator=draw).tolist()
        self.drawn = []
        for place in chosen:
            n, rows, flat = self._places[place]
            member = self.update.members[n]
            group = self.update.optimizer.param_groups[member.group]
            p = read(self.update.optimizer, member.parameter, group)(None, partial(_part, flat))
            squares = p.to(wide(member.parameter)).square_()
            block = Block(n, rows, self._chances[place].item(), squares)
            self.drawn.append(block)
            self._handles.append(member.parameter.register_hook(self._listener(block, member.parameter)))

    def _listener(self, block: Block, parameter: Tensor) -> Callable[[Tensor], None]:
        def record(gradient: Tensor) -> None:
            if parameter.grad is None:
                block.heard.clear()  # what came before was thrown away by zero_grad()
            block.heard.append(gradient[block.rows].clone())

        return record

    def stop(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles = []

    @torch.no_grad()
    def reading(self) -> NormsReading | None:
        """What this update's blocks give; None for less than two contributions."""
        self.stop()
        counts = {len(block.heard) for block in self.drawn}
        size = min(counts) * self.update.world
        if len(counts) != 1 or size < 2:
            return None
        # Rows: |P h_r|^2 and |h_r|^2 summed over r, <used, sum of h_r>; |P used|^2, |used|^2, sum of P.
        table = torch.stack([self._sums(block) for block in self.drawn]).double()
        if self.update.world > 1:
            table[:, :3] = self.update.total(table[:, :3].contiguous())
        table = table.cpu()
        used = table[:, 4].sum()
        factor = (used / table[:, 2].sum()).item() if used > 0 else 1.0
        table[:, 3:5] /= factor**2
        table /= torch.tensor([[block.chance] for block in self.drawn], dtype=torch.float64)
        traces = size / (size - 1) * (table[:, :2] - table[:, 3:5] / size)
        means, errors = traces.mean(0).tolist(), (traces.var(0) / len(traces)).sqrt().tolist()
        whole = table[:, 3:].mean(0).tolist()
        return NormsReading(
            trace=Estimate(means[0], errors[0]),
            trace_c=Estimate(means[1], errors[1]),
            signal_pcp=whole[0],
            signal_c=whole[1],
            trace_p=whole[2],
            contributions=size,
            factor=factor,
        )

    def _sums(self, block: Block) -> Tensor:
        gradient = self.update.members[block.member].parameter.grad
        assert gradient is not None  # its hook was called
        rows = torch.stack([*block.heard, gradient[block.rows]]).flatten(1).to(block.squares.dtype)
        if self.update.unscale != 1.0:
            rows[:-1] *= self.update.unscale
        squares = rows.square()
        weighted, plain = squares @ block.squares, squares.sum(1)
        return torch.stack(
            [
                weighted[:-1].sum(),
                plain[:-1].sum(),
                torch.dot(rows[-1], rows[:-1].sum(0)),
                weighted[-1],
                plain[-1],
                block.squares.sqrt().sum(),
            ]
        )


def _part(rows: slice, flat: Tensor) -> Tensor:
    return flat[rows]
