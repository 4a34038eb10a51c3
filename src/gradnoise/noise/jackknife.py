"""The reference for effective noise: the real optimizer's update as one contribution loses weight."""

import copy

import torch
from torch import Tensor

from gradnoise.noise.update import Rows, Update

# Of a contribution's weight that is taken away.
FRACTION = 0.25


def lighter_updates(
    update: Update, before: torch.optim.Optimizer, rows: Rows, shares: Tensor, threshold: float | None
) -> tuple[Tensor, Tensor]:
    r"""(n, R) squared distances and (R, R) Gram matrix of real updates as one contribution loses weight.

    u_k is what the optimizer, as it was `before` its step, does with g - e d_k / (1 - w_k), clipped by norm
    at `threshold` (None: not); e = 1/4. Its distance from their mean, times (1 - w_k)/e, stands for P d_k, in
    long-run units (learning rate and `Filter.instant` divided out). This knows nothing of how the optimizer
    works: clipping, P's own noise, Adafactor's and Muon's normalisation are all in it. Leaving contributions
    out whole (e = 1) makes the gradient's norm that of a smaller batch, which clipping then divides by: with
    8 contributions it reads up to 12 % too low, against 1.5 % here (docs/exposure.md). Costs R optimizer
    steps and R copies of its state.
    """
    members = update.members
    total = {m.name: torch.stack(rows[m.name]).sum(0) * update.unscale for m in members}
    place = {
        p: (g, n)
        for g, group in enumerate(update.optimizer.param_groups)
        for n, p in enumerate(group["params"])
    }
    start = [before.param_groups[g]["params"][n] for g, n in (place[m.parameter] for m in members)]
    moves: list[Tensor] = []
    for k, share in enumerate(shares.tolist()):
        twin = copy.deepcopy(before)
        ends = [twin.param_groups[g]["params"][n] for g, n in (place[m.parameter] for m in members)]
        lighter = FRACTION / (1 - share)
        gradients = [
            total[m.name] - lighter * (rows[m.name][k] * update.unscale - share * total[m.name])
            for m in members
        ]
        if threshold is not None:
            norm = torch.stack([torch.linalg.vector_norm(g) for g in gradients]).norm().item()
            gradients = [g * min(1.0, threshold / (norm + 1e-6)) for g in gradients]
        # What was injected came after clipping.
        gradients = [
            gradient + update.injected[m.parameter][0] if m.parameter in update.injected else gradient
            for m, gradient in zip(members, gradients, strict=True)
        ]
        for end, member, gradient in zip(ends, members, gradients, strict=True):
            used = member.parameter.grad is not None
            end.grad = gradient.view_as(end).to(end.dtype) if used else None
        twin.step()
        parts = []
        for end, begin, member in zip(ends, start, members, strict=True):
            rate = float(update.optimizer.param_groups[member.group]["lr"]) * update.filter(member).instant
            parts.append((end.detach() - begin.detach()).flatten().double() / rate)
        moves.append(torch.cat(parts))
    stacked = torch.stack(moves)
    stacked = (stacked - stacked.mean(0)) * ((1 - shares) / FRACTION).to(stacked)[:, None]
    return _squares(stacked, [m.parameter.numel() for m in members]).cpu(), (stacked @ stacked.T).cpu()


def _squares(rows: Tensor, sizes: list[int]) -> Tensor:
    """(n, R) squared norms of the pieces of R vectors."""
    return torch.stack([part.square().sum(1) for part in torch.split(rows, sizes, 1)])
