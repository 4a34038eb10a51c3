r"""What noise does to Adam's second moment, undone: a learning rate that keeps the drift, or another's v.

Noise in the gradient (injected "pre", or of a small batch) makes v grow, so P = 1/(sqrt(v_hat) + eps) and
with it the drift P m shrink. `DriftMatch` says by how much, and scales the learning rate;
`borrow_second_moment` steps with a v that has not seen the noise.
"""

from collections import OrderedDict
from collections.abc import Iterator, Sequence
from typing import Any, Literal, cast

import torch
from torch import Tensor
from torch.optim import Adam, AdamW, Optimizer

from gradnoise.base.errors import InputError
from gradnoise.noise.injection.inject import injections_of, skipped
from gradnoise.noise.preconditioners import decoupled_decay

Group = dict[str, Any]


class DriftMatch:
    r"""The multiplier of the learning rate that keeps the drift of an Adam that sees injected noise.

    match = DriftMatch(optimizer, apply=True)

    The moments that a noiseless twin would have are followed along the run's own trajectory, from the
    gradient g of each update as it was after clipping and before anything was injected:

    .. math:: \bar m \leftarrow \beta_1 \bar m + (1 - \beta_1) g, \quad
              \bar v \leftarrow \beta_2 \bar v + (1 - \beta_2) g^2, \quad
              \kappa = \frac{\sum P \bar P \bar m^2}{\sum P^2 \bar m^2},

    P of the optimizer, \bar P the same of \bar v: kappa minimises |kappa P m - \bar P m|^2 over all
    coordinates. One number for all: coordinates that noise slowed less than the mean get too much.

    `factor` is kappa after the last update, 1 before the first: multiply it into the learning rate of the
    next. `apply`: the optimizer steps with kappa times the learning rates of its groups, and the groups get
    theirs back after every other hook of the step, so that a meter counts the rate that was used and a
    scheduler sees its own. Attached in mid-run the twin begins with the optimizer's moments, so no noise
    should be in them yet. Memory: two buffers of the gradient's size.

    Raises `InputError` for an optimizer other than Adam and AdamW, for `amsgrad`, and for weight decay in
    the gradient (v holds it, the gradient here does not).
    """

    def __init__(self, optimizer: Optimizer, apply: bool = False) -> None:
        check_adam(optimizer)
        if any(
            group["weight_decay"] and not decoupled_decay(optimizer, group) for group in _groups(optimizer)
        ):
            raise InputError("optimizer", "weight decay in the gradient", "take AdamW")
        self.optimizer, self._apply = optimizer, apply
        self._moments: dict[Tensor, tuple[Tensor, Tensor]] = {}
        for parameter, _ in _parameters(optimizer):
            state = optimizer.state.get(parameter, {})
            if "exp_avg" in state:
                self._moments[parameter] = state["exp_avg"].clone(), state["exp_avg_sq"].clone()
        self._rates: list[Any] = []
        self._before = optimizer.register_step_pre_hook(self._scale)
        self._after = optimizer.register_step_post_hook(self._follow)

    @property
    @torch.no_grad()
    def factor(self) -> float:
        """kappa after the last update."""
        sums = []
        for parameter, group in _parameters(self.optimizer):
            state = self.optimizer.state.get(parameter, {})
            if parameter in self._moments and "step" in state:
                first, second = self._moments[parameter]
                drift = preconditioned(state["exp_avg_sq"], state, group).mul_(first)
                twin = preconditioned(second, state, group).mul_(first)
                sums.append(torch.stack([(drift * twin).sum(), drift.square().sum()]).double().cpu())
        top, bottom = torch.stack(sums).sum(0).tolist() if sums else (0.0, 0.0)
        return float(top / bottom) if bottom > 0 else 1.0

    def remove(self) -> None:
        """Detach: the learning rate is the optimizer's own again."""
        self._restore()
        self._before.remove()
        self._after.remove()

    def _scale(self, optimizer: Optimizer, *_: object) -> None:
        self._restore()  # a step that raised has left them scaled
        # The hook registered last runs last: rates go back when every other hook has seen them.
        self._after.remove()
        self._after = optimizer.register_step_post_hook(self._follow)
        if self._apply and not skipped(optimizer):
            factor = self.factor
            self._rates = [group["lr"] for group in optimizer.param_groups]
            for group in optimizer.param_groups:
                group["lr"] = group["lr"] * factor

    def _restore(self) -> None:
        for group, rate in zip(self.optimizer.param_groups, self._rates, strict=False):
            group["lr"] = rate
        self._rates = []

    @torch.no_grad()
    def _follow(self, optimizer: Optimizer, *_: object) -> None:
        self._restore()
        if skipped(optimizer):
            return
        for injection in injections_of(optimizer):
            injection.settle()  # gives the clean gradient back
        for parameter, group in _parameters(optimizer):
            if parameter.grad is not None:
                gradient, betas = parameter.grad, group["betas"]
                if parameter not in self._moments:
                    self._moments[parameter] = torch.zeros_like(parameter), torch.zeros_like(parameter)
                first, second = self._moments[parameter]
                first.lerp_(gradient, 1 - float(betas[0]))
                second.mul_(float(betas[1])).addcmul_(gradient, gradient, value=1 - float(betas[1]))

    def state_dict(self) -> dict[str, Any]:
        """The twin's moments, in the optimizer's order of parameters."""
        found = [self._moments.get(parameter) for parameter, _ in _parameters(self.optimizer)]
        return {"moments": [None if pair is None else [part.clone() for part in pair] for pair in found]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over what `state_dict` gave; load the optimizer's too."""
        pairs = zip(_parameters(self.optimizer), state["moments"], strict=True)
        self._moments = {
            parameter: (pair[0].to(parameter), pair[1].to(parameter))
            for (parameter, _), pair in pairs
            if pair is not None
        }


def borrow_second_moment(
    optimizer: Optimizer, of: Optimizer | Literal["hold"], first: int | None = None
) -> "Borrowed":
    r"""Let Adam or AdamW step with another's second moment: its own never decides an update.

    `of`: an optimizer of the same shapes in the same order, whose v is taken over at every update: a
    noiseless twin. It must make its step before this one makes its own, and as many in all (load the same
    checkpoint into both). Or "hold": v as it is before update `first` of those from now on (default: the
    next), for good: v frozen late.

    What is borrowed is v_hat = v / (1 - beta2^t): a held v_hat does not change as the bias correction wears
    off. After each step,

    .. math:: \theta \leftarrow \theta + \eta \hat m (P_{\text{used}} - P_{\text{wanted}}), \quad
              v \leftarrow (1 - \beta_2^t) \hat v_{\text{wanted}},

    so parameters and moments are those of an optimizer with that v, to rounding, whatever made the step
    (fused, foreach); it comes before all other hooks of the step, so meters and injected noise see that P.
    P has the optimizer's own eps.

    Raises `InputError` for other optimizers and `amsgrad`, for shapes that differ, and at a step for a twin
    that has not made it or has no second moment, and where there is none yet to hold.
    """
    return Borrowed(optimizer, of, first)


class Borrowed:
    """See `borrow_second_moment`; `remove()` gives the optimizer a v of its own again, from what it has."""

    def __init__(self, optimizer: Optimizer, of: Optimizer | Literal["hold"], first: int | None) -> None:
        check_adam(optimizer)
        if isinstance(of, str) and of != "hold":
            raise InputError("of", of, "must be an optimizer, or 'hold'")
        if first is not None and (first < 1 or of != "hold"):
            raise InputError("first", first, "is an update from 1 on, and goes with of='hold'")
        self.optimizer, self._of, self._first = optimizer, of, first or 1
        self.step = 0
        # v_hat that is held, in the optimizer's order of parameters; None for those that had no state.
        self._held: Sequence[Tensor | None] = ()
        if not isinstance(of, str):
            check_adam(of)
            shapes = [[parameter.shape for parameter, _ in _parameters(o)] for o in (optimizer, of)]
            if shapes[0] != shapes[1]:
                raise InputError("of", "other parameters", "must have the same shapes in the same order")
        self._before = optimizer.register_step_pre_hook(self._hold)
        self._after = optimizer.register_step_post_hook(self._correct)
        # Torch has no public way to be the first hook.
        hooks = cast("OrderedDict[int, Any]", optimizer._optimizer_step_post_hooks)
        hooks.move_to_end(self._after.id, last=False)

    def remove(self) -> None:
        """Detach."""
        self._before.remove()
        self._after.remove()

    def _hold(self, optimizer: Optimizer, *_: object) -> None:
        if self._of != "hold" or self.step + 1 != self._first or skipped(optimizer) or self._held:
            return
        self._held = [_unbiased(optimizer, *place) for place in _parameters(optimizer)]
        if all(held is None for held in self._held):
            raise InputError(
                "first", self._first, "there is no second moment to hold before the first update"
            )

    @torch.no_grad()
    def _correct(self, optimizer: Optimizer, *_: object) -> None:
        if skipped(optimizer):
            return
        self.step += 1
        if self.step < self._first:
            return
        others = self._held if isinstance(self._of, str) else self._theirs(self._of)
        for (parameter, group), wanted in zip(_parameters(optimizer), others, strict=True):
            state = optimizer.state.get(parameter, {})
            if parameter.grad is None or wanted is None or "exp_avg" not in state:
                continue
            wanted = wanted.to(state["exp_avg_sq"])
            beta1, beta2 = (float(beta) for beta in group["betas"])
            steps = float(state["step"])
            surplus = preconditioned(state["exp_avg_sq"], state, group)
            surplus -= wanted.sqrt().add_(group["eps"]).reciprocal_()
            mean = state["exp_avg"] / (1 - beta1**steps)
            parameter.add_((mean * surplus).to(parameter.dtype), alpha=float(group["lr"]))
            state["exp_avg_sq"].copy_(wanted * (1 - beta2**steps))

    def _theirs(self, other: Optimizer) -> list[Tensor | None]:
        found: list[Tensor | None] = []
        for (mine, _), place in zip(_parameters(self.optimizer), _parameters(other), strict=True):
            steps = [
                float(o.state.get(p, {}).get("step", 0))
                for o, p in ((self.optimizer, mine), (other, place[0]))
            ]
            if mine.grad is not None and steps[0] != steps[1]:
                mend = (
                    f"made {steps[1]:g} updates where this one made {steps[0]:g}: step it first, in lockstep"
                )
                raise InputError("of", type(other).__name__, mend)
            found.append(_unbiased(other, *place))
        return found

    def state_dict(self) -> dict[str, Any]:
        """Updates counted, and what is held."""
        return {"step": self.step, "held": [None if v is None else v.clone() for v in self._held]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over what `state_dict` gave; load the optimizers' too."""
        self.step = state["step"]
        self._held = [None if held is None else held.clone() for held in state["held"]]


def check_adam(optimizer: Optimizer) -> None:
    """Raises `InputError` for what is not Adam or AdamW, and for amsgrad."""
    if not isinstance(optimizer, Adam | AdamW):
        raise InputError("optimizer", type(optimizer).__name__, "must be Adam or AdamW")
    if any(group["amsgrad"] for group in _groups(optimizer)):
        raise InputError("optimizer", "amsgrad", "its P is of the largest v so far: take amsgrad=False")


def preconditioned(second: Tensor, state: dict[str, Any], group: Group) -> Tensor:
    """P = 1 / (sqrt(v / (1 - beta2^t)) + eps) of a second moment."""
    correction = 1 - float(group["betas"][1]) ** float(state["step"])
    found: Tensor = (second / correction).sqrt_().add_(group["eps"]).reciprocal_()
    return found


def _unbiased(optimizer: Optimizer, parameter: Tensor, group: Group) -> Tensor | None:
    """v_hat of a parameter."""
    state = optimizer.state.get(parameter, {})
    if "exp_avg_sq" not in state:
        return None
    found: Tensor = state["exp_avg_sq"] / (1 - float(group["betas"][1]) ** float(state["step"]))
    return found


def _groups(optimizer: Optimizer) -> list[Group]:
    return optimizer.param_groups


def _parameters(optimizer: Optimizer) -> Iterator[tuple[Tensor, Group]]:
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            yield parameter, group
