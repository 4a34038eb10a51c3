"""Estimator "norms": every update, a few blocks of coordinates, weighted by the previous step's P.

Contributions are squared as they arrive, so nothing of the gradient's size is kept; the P of this step does
not exist yet and that of the step before is used, which reads too high while v is young. Blocks are drawn at
random for each update with chance proportional to their size; each stands for the whole model, so the sum
over updates is unbiased.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from gradnoise.noise.contributions import Update, wide
from gradnoise.noise.estimate import Estimate
from gradnoise.noise.preconditioners import read

BLOCK = 1 << 14


@dataclass
class Block:
    """A drawn block: sums of |P h_r|^2 and |h_r|^2, of h_r, and how many there were."""

    member: int
    rows: slice
    squares: Tensor  # P^2 there
    weighted: Tensor
    plain: Tensor
    total: Tensor
    count: int = 0


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
        self._places = [
            (n, slice(first, min(first + BLOCK, member.parameter.numel())))
            for n, member in enumerate(self.update.members)
            for first in range(0, member.parameter.numel(), BLOCK)
        ]
        self._sizes = torch.tensor([float(rows.stop - rows.start) for _, rows in self._places])

    @torch.no_grad()
    def listen(self, step: int) -> None:
        """Draw blocks for update `step` and read P there, as it is before that update."""
        draw = torch.Generator().manual_seed((self.seed << 32) + step)
        chosen = torch.multinomial(self._sizes, self.blocks, replacement=True, generator=draw).tolist()
        self.drawn = []
        for n, rows in (self._places[place] for place in chosen):
            member = self.update.members[n]
            group = self.update.optimizer.param_groups[member.group]
            p = read(self.update.optimizer, member.parameter, group)(None, partial(_part, rows))
            zero = torch.zeros((), dtype=wide(member.parameter), device=member.parameter.device)
            block = Block(n, rows, p.to(zero.dtype).square(), zero, zero.clone(), torch.zeros_like(p))
            self.drawn.append(block)
            self._handles.append(member.parameter.register_hook(self._listener(block, member.parameter)))

    def _listener(self, block: Block, parameter: Tensor) -> Callable[[Tensor], None]:
        def record(gradient: Tensor) -> None:
            if parameter.grad is None and block.count:  # what came before was thrown away by zero_grad()
                block.count = 0
                for sums in (block.weighted, block.plain, block.total):
                    sums.zero_()
            part = gradient.detach().flatten()[block.rows].to(block.weighted.dtype)
            block.weighted += torch.dot(part, part * block.squares)
            block.plain += torch.dot(part, part)
            block.total += part
            block.count += 1

        return record

    def stop(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles = []

    @torch.no_grad()
    def reading(self) -> NormsReading | None:
        """What this update's blocks give; None for less than two contributions."""
        self.stop()
        counts = {block.count for block in self.drawn}
        world = self.update.world
        size = min(counts) * world
        if len(counts) != 1 or size < 2:
            return None
        rows = []
        for block in self.drawn:
            member = self.update.members[block.member]
            used = self.update.gradient(member, block.total.dtype)[block.rows]
            rows.append(
                torch.stack(
                    [
                        block.weighted,
                        block.plain,
                        torch.dot(used, block.total),
                        torch.dot(used, used * block.squares),
                        torch.dot(used, used),
                        block.squares.sqrt().sum(),
                    ]
                ).double()
            )
        table = torch.stack(rows)
        scale = self.update.unscale
        table[:, :2] *= scale**2
        table[:, 2] *= scale
        table[:, :3] = self.update.total(table[:, :3].contiguous())
        table = table.cpu()
        factor = (table[:, 4].sum() / table[:, 2].sum()).item() if table[:, 4].sum() > 0 else 1.0
        table[:, 3:5] /= factor**2
        chances = (
            torch.tensor([float(b.rows.stop - b.rows.start) for b in self.drawn]).double()
            / self._sizes.double().sum()
        )
        traces = size / (size - 1) * (table[:, :2] - table[:, 3:5] / size) / chances[:, None]
        spread = (traces.var(0) / len(traces)).sqrt() if len(traces) > 1 else torch.full((2,), math.nan)
        whole = (table[:, 3:] / chances[:, None]).mean(0)
        return NormsReading(
            Estimate(traces[:, 0].mean().item(), spread[0].item()),
            Estimate(traces[:, 1].mean().item(), spread[1].item()),
            whole[0].item(),
            whole[1].item(),
            whole[2].item(),
            size,
            factor,
        )


def _part(rows: slice, flat: Tensor) -> Tensor:
    return flat[rows]
