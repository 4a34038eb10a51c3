"""The diagonal preconditioner P of a step, read from the optimizer that made it."""

import torch
from torch import Tensor

from gradnoise.errors import InputError


def preconditioner(optimizer: torch.optim.Optimizer, parameter: Tensor) -> Tensor | float:
    """P of the last step for one parameter, in parameter units per gradient unit, learning rate apart.

    Adam and AdamW: P = 1 / (sqrt(v / (1 - beta2^t)) + eps), v read after the step (`amsgrad`: its maximum).
    The first moment's bias correction belongs to the momentum filter, not to P. SGD without momentum: 1.
    Raises `InputError` for an optimizer whose P is not known. Source: noise study, P of each optimizer.
    """
    group = next(g for g in optimizer.param_groups if any(p is parameter for p in g["params"]))
    if isinstance(optimizer, torch.optim.Adam | torch.optim.AdamW):
        state = optimizer.state[parameter]
        second = state["max_exp_avg_sq"] if group["amsgrad"] else state["exp_avg_sq"]
        correction = 1 - group["betas"][1] ** float(state["step"])
        return 1 / ((second / correction).sqrt() + group["eps"])
    if isinstance(optimizer, torch.optim.SGD) and group["momentum"] == 0:
        return 1.0
    raise InputError(
        "optimizer", type(optimizer).__name__, "the preconditioner is known for Adam, AdamW and plain SGD"
    )
