"""An update just made: which parameters are measured, and what the optimizer did with their gradients."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor

from gradnoise.base.errors import InputError
from gradnoise.noise.preconditioners import Filter, Preconditioner, learning_filter, read
from gradnoise.noise.spectrum import Sketch

# A gradient in half precision is a sum up to its rounding.
ROUNDING = 0.02

# Coordinates of a tensor by which used gradients are compared with summed contributions.
LOOKED_AT = 1 << 12

# By name, the R flat gradients that contributions added: their kept coordinates.
Rows = dict[str, list[Tensor]]


@dataclass(frozen=True)
class Member:
    """A measured parameter: its name, group, layer and class, and which of its coordinates are kept.

    `index`: kept flat coordinates, None for all; each stands for `scale` of them.
    """

    name: str
    parameter: Tensor
    group: int
    layer: str
    part: str
    index: Tensor | None = None
    scale: float = 1.0

    @property
    def kept(self) -> int:
        return self.parameter.numel() if self.index is None else len(self.index)

    def take(self, flat: Tensor) -> Tensor:
        """The kept coordinates of a flat tensor."""
        return flat if self.index is None else flat[self.index]


@dataclass
class Update:
    """An update just made: the optimizer after its step, with the gradients that it used.

    `clip`: factor s by which the summed gradient was multiplied; `unscale`: what a recorded gradient is
    multiplied by to undo loss scaling and to count for one of `world` processes. `expected`: put the expected
    square of this batch's noise into P (else read it as it is). `previous`: P of the step before, to be used
    instead.
    """

    optimizer: torch.optim.Optimizer
    members: Sequence[Member]
    clip: float = 1.0
    unscale: float = 1.0
    expected: bool = True
    previous: dict[Tensor, Tensor] | None = None
    root_mean_squares: dict[Tensor, float] = field(default_factory=dict)
    process_group: "dist.ProcessGroup | None" = None
    # Every how many coordinates of each contribution are kept for tail indices; 0: none.
    sample_every: int = 0
    sketch: Sketch | None = None
    # Where given, P of every whole parameter is left here, and the sum over this process's contributions of
    # squared distances d_r^2.
    kept: dict[Tensor, Tensor] | None = None
    squares: dict[Tensor, Tensor] | None = None
    # Noise that was injected into the gradient of this step, and the diagonal of its covariance (flat).
    injected: dict[Tensor, tuple[Tensor, Tensor]] = field(default_factory=dict)

    @property
    def world(self) -> int:
        return 1 if self.process_group is None else dist.get_world_size(self.process_group)

    @property
    def rank(self) -> int:
        return 0 if self.process_group is None else dist.get_rank(self.process_group)

    def preconditioner(self, member: Member) -> Preconditioner:
        """The member's P, full."""
        if self.previous is not None:
            before = self.previous[member.parameter]
            return Preconditioner(member.parameter, before, 0.0, torch.clone)
        return read(self.optimizer, member.parameter, self.optimizer.param_groups[member.group])

    def filter(self, member: Member) -> Filter:
        group = self.optimizer.param_groups[member.group]
        size = self.root_mean_squares.get(member.parameter, 0.0)
        used = self.used(member) if self.injected else None
        return learning_filter(self.optimizer, member.parameter, size, group, used)

    def gradient(self, member: Member, dtype: torch.dtype) -> Tensor:
        """The batch's gradient before clipping, unscaled: flat, whole."""
        gradient = member.parameter.grad
        if gradient is None:
            return torch.zeros(member.parameter.numel(), dtype=dtype, device=member.parameter.device)
        return gradient.detach().flatten().to(dtype) / self.clip

    def used(self, member: Member) -> Tensor | None:
        """The gradient that the optimizer stepped with, injected noise included: flat, whole."""
        gradient = member.parameter.grad
        if gradient is None:
            return None
        flat = gradient.detach().flatten().to(wide(member.parameter))
        found = self.injected.get(member.parameter)
        return flat if found is None else flat + found[0]

    def total(self, values: Tensor) -> Tensor:
        """Sum over processes."""
        if self.process_group is not None:
            dist.all_reduce(values, group=self.process_group)
        return values

    def gathered(self, values: Tensor) -> list[Tensor]:
        """The same-shaped tensor of every process, in order of rank."""
        if self.process_group is None:
            return [values]
        found = [torch.empty_like(values) for _ in range(self.world)]
        dist.all_gather(found, values.contiguous(), group=self.process_group)
        return found


def wide(parameter: Tensor) -> torch.dtype:
    """The dtype to square and sum in: never below float32."""
    return torch.promote_types(parameter.dtype, torch.float32)


def factor_used(update: Update, rows: Rows) -> float:
    """The one factor f with used gradient = f x sum of contributions, over all processes; 1 where all is 0.

    f = |used|^2 / <used, sum>. Raises `InputError` naming a parameter where used and sum are not proportional
    with the same f: clipped by value or by layer, or changed otherwise.
    """
    products = []
    for member in update.members:
        stride = -(-member.kept // LOOKED_AT)
        total = torch.stack([row[::stride] for row in rows[member.name]]).double().sum(0) * update.unscale
        used = member.take(update.gradient(member, wide(member.parameter)))[::stride].double() * update.clip
        products.append(torch.stack([used @ used, used @ total, total @ total]))
    table = torch.stack(products).cpu()
    shared = update.total(table[:, 1].clone().to(products[0].device)).cpu()
    if not table[:, 0].sum() > 0:
        return 1.0
    factor = (table[:, 0].sum() / shared.sum()).item()
    for member, (used, cross, total), over in zip(
        update.members, table.tolist(), shared.tolist(), strict=True
    ):
        # One process compares vectors; of several, each sees its own sum only, so projections are compared.
        off = used - 2 * factor * cross + factor**2 * total if update.world == 1 else (used - factor * over)
        size = used if update.world == 1 else used / ROUNDING
        if not (factor > 0 and abs(off) <= ROUNDING**2 * size + 1e-300):
            raise InputError(
                f"gradient of {member.name}",
                "is not one factor times the sum of this step's backward() calls",
                "clip by total norm, not by value or by layer, and change gradients in no other way; give a"
                " DistributedDataParallel model itself",
            )
    return factor
