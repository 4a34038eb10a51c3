"""The diagonal preconditioner P of a step, read from the optimizer that made it."""

import torch
from torch import Tensor

from gradnoise.base.errors import InputError


def preconditioner(
    optimizer: torch.optim.Optimizer, parameter: Tensor, variance: Tensor | None = None
) -> Tensor:
    """P of the last step for one parameter, in parameter units per gradient unit, learning rate apart.

    Adam and AdamW: P = 1 / (sqrt(v / (1 - beta2^t)) + eps), v read after the step (`amsgrad`: its maximum).
    The first moment's bias correction belongs to the momentum filter, not to P. SGD without momentum: 1.

    With `variance`, the diagonal of C/B of the gradients that v was fed (clipped, if they were), v is
    replaced by v + (1 - beta2) C/B. A coordinate whose gradient happens to be near 0 has a tiny v while v is
    young, and 1/v is then no property of training: at Adam's first step P = 1/|g| and P^2 C/B has no mean.
    The replacement bounds P^2 C/B by (1 - beta2^t)/(1 - beta2).

    Raises `InputError` for an optimizer whose P is not known.
    """
    group = next(g for g in optimizer.param_groups if any(p is parameter for p in g["params"]))
    if isinstance(optimizer, torch.optim.Adam | torch.optim.AdamW):
        state = optimizer.state[parameter]
        second: Tensor = state["max_exp_avg_sq"] if group["amsgrad"] else state["exp_avg_sq"]
        beta2 = group["betas"][1]
        if variance is not None:
            second = second + (1 - beta2) * variance
        corrected = second / (1 - beta2 ** float(state["step"]))
        p: Tensor = 1 / (corrected.sqrt() + group["eps"])
        return p
    if isinstance(optimizer, torch.optim.SGD) and group["momentum"] == 0:
        return torch.ones_like(parameter)
    raise InputError(
        "optimizer", type(optimizer).__name__, "the preconditioner is known for Adam, AdamW and plain SGD"
    )
