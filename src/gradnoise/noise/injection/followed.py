"""What a meter follows for injectors: the covariance of the gradient noise that it measures."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from gradnoise.base.errors import InputError
from gradnoise.noise.injection.sources import Factors, Place

Shape = Literal["diagonal", "tensor", "isotropic"]
# The meter's names of parameters: an injector without the model does not know them.
Names = Mapping[Tensor, str]


@dataclass(frozen=True)
class Covariance:
    """C/B of a measured update as it entered the step (after clipping), by parameter name.

    `diagonal`: of the parameter's shape. `directions` (r, coordinates), if asked for: rows f_k with
    sum_k f_k f_k' the part of the sample covariance along its r largest directions in the metric of P.
    """

    diagonal: Mapping[str, Tensor]
    directions: Mapping[str, Tensor] | None = None


class FollowedDeviations:
    """sqrt(scale x diag(C/B)); see `Exposure.std`.

    In each tensor the shape of the diagonal is an average over measured updates, and its level is the last
    one's: while noise falls fast an average of it would lag behind.
    """

    def __init__(self, scale: float, shape: Shape, half_life: float, names: Names) -> None:
        if not 0 <= scale < math.inf:
            raise InputError("scale", scale, "must be 0 or more, and finite")
        if shape not in get_args(Shape):
            raise InputError("shape", shape, "must be diagonal, tensor or isotropic")
        if not half_life > 0:
            raise InputError("half_life", half_life, "must be above 0 measured updates")
        self._scale, self._shape, self._names = scale, shape, names
        self._least = 1 - 2 ** (-1 / half_life)
        self._count = 0
        self._mean: dict[str, Tensor] = {}
        self._level: dict[str, float] = {}  # sum of the last diagonal, by name
        self._deviations: dict[str, Tensor] = {}

    def __call__(self, place: Place) -> Tensor | None:
        return self._deviations.get(self._names.get(place.parameter, place.name))

    def feed(self, covariance: Covariance) -> None:
        """Take in a measured update."""
        self._count += 1
        rate = max(self._least, 1 / self._count)
        for name, found in covariance.diagonal.items():
            mean = self._mean.setdefault(name, torch.zeros_like(found))
            mean.lerp_(found, rate)
            self._level[name] = found.sum(dtype=torch.float64).item()
        self._refresh()

    def _refresh(self) -> None:
        totals = {name: mean.sum(dtype=torch.float64).item() for name, mean in self._mean.items()}
        shaped = {
            name: mean * (self._level[name] / totals[name]) if totals[name] > 0 else mean
            for name, mean in self._mean.items()
        }
        if self._shape == "tensor":
            shaped = {name: mean.mean() for name, mean in shaped.items()}
        elif self._shape == "isotropic":
            size = sum(mean.numel() for mean in self._mean.values())
            level = math.fsum(self._level.values()) / max(size, 1)
            shaped = {name: mean.new_tensor(level) for name, mean in self._mean.items()}
        self._deviations = {name: (self._scale * value).sqrt() for name, value in shaped.items()}

    def state_dict(self) -> dict[str, Any]:
        """Averages and how many measured updates they are of."""
        means = {name: mean.clone() for name, mean in self._mean.items()}
        return {"count": self._count, "mean": means, "level": dict(self._level)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over what `state_dict` gave."""
        self._count = state["count"]
        self._mean = {name: mean.clone() for name, mean in state["mean"].items()}
        self._level = dict(state["level"])
        self._refresh()


class FollowedFactors:
    """The last measured update's covariance as r directions and a diagonal rest; see `Exposure.factors`.

    `gains` multiply the variances along the directions, `rest_gain` that of the rest; a matcher sets them.
    """

    joint = True

    def __init__(self, scale: float, rank: int, names: Names) -> None:
        if not 0 <= scale < math.inf:
            raise InputError("scale", scale, "must be 0 or more, and finite")
        if rank < 1:
            raise InputError("rank", rank, "must be at least 1")
        self._scale, self.rank, self._names = scale, rank, names
        self.gains, self.rest_gain = (1.0,) * rank, 1.0
        self._found: dict[str, tuple[Tensor, Tensor]] = {}

    def __call__(self, place: Place) -> Factors | None:
        found = self._found.get(self._names.get(place.parameter, place.name))
        if found is None:
            return None
        directions, rest = found
        variances = self._scale * directions.new_tensor(self.gains[: len(directions)])
        return directions.T, variances, self._scale * self.rest_gain * rest

    def feed(self, covariance: Covariance) -> None:
        """Take in a measured update."""
        assert covariance.directions is not None
        for name, directions in covariance.directions.items():
            largest = directions[: self.rank]
            rest = covariance.diagonal[name].flatten() - largest.square().sum(0)
            # The rest of a sample covariance is 0 or more, up to rounding.
            self._found[name] = largest.clone(), rest.clamp_min(0)

    def state_dict(self) -> dict[str, Any]:
        """Directions and rests by name, and their gains."""
        return {
            "found": {name: (d.clone(), r.clone()) for name, (d, r) in self._found.items()},
            "gains": list(self.gains),
            "rest_gain": self.rest_gain,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over what `state_dict` gave."""
        self._found = {name: (d.clone(), r.clone()) for name, (d, r) in state["found"].items()}
        self.gains, self.rest_gain = tuple(state["gains"]), state["rest_gain"]


Followed = FollowedDeviations | FollowedFactors
