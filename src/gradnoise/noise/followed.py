"""What a meter follows for injectors: the covariance of the gradient noise that it measures."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from gradnoise.base.errors import InputError
from gradnoise.noise.sources import Factors, Place

Shape = Literal["diagonal", "tensor", "isotropic"]


@dataclass(frozen=True)
class Covariance:
    """C/B of a measured update as it entered the step (after clipping), by parameter name.

    `diagonal`: of the parameter's shape. `directions` (r, coordinates), if asked for: rows f_k with
    sum_k f_k f_k' the part of the sample covariance along its r largest directions in the metric of P.
    """

    diagonal: Mapping[str, Tensor]
    directions: Mapping[str, Tensor] | None = None


class FollowedDeviations:
    """sqrt(scale x diag(C/B)), an average over measured updates; see `Exposure.std`."""

    rank = 0

    def __init__(self, scale: float, shape: Shape, half_life: float) -> None:
        if not scale >= 0:
            raise InputError("scale", scale, "must be 0 or more")
        if shape not in get_args(Shape):
            raise InputError("shape", shape, "must be diagonal, tensor or isotropic")
        if not half_life > 0:
            raise InputError("half_life", half_life, "must be above 0 measured updates")
        self._scale, self._shape = scale, shape
        self._least = 1 - 2 ** (-1 / half_life)
        self._count = 0
        self._mean: dict[str, Tensor] = {}
        self._deviations: dict[str, Tensor] = {}

    def __call__(self, place: Place) -> Tensor | None:
        return self._deviations.get(place.name)

    def feed(self, covariance: Covariance) -> None:
        """Take in a measured update."""
        self._count += 1
        rate = max(self._least, 1 / self._count)
        for name, found in covariance.diagonal.items():
            mean = self._mean.setdefault(name, torch.zeros_like(found))
            mean.lerp_(found, rate)
        self._refresh()

    def _refresh(self) -> None:
        shaped = dict(self._mean)
        if self._shape == "tensor":
            shaped = {name: mean.mean() for name, mean in self._mean.items()}
        elif self._shape == "isotropic":
            size = sum(mean.numel() for mean in self._mean.values())
            level = sum(mean.sum(dtype=torch.float64) for mean in self._mean.values()) / max(size, 1)
            shaped = {name: torch.as_tensor(level).to(mean) for name, mean in self._mean.items()}
        self._deviations = {name: (self._scale * value).sqrt() for name, value in shaped.items()}

    def state_dict(self) -> dict[str, Any]:
        """Averages and how many measured updates they are of."""
        return {"count": self._count, "mean": {name: mean.clone() for name, mean in self._mean.items()}}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over what `state_dict` gave."""
        self._count = state["count"]
        self._mean = {name: mean.clone() for name, mean in state["mean"].items()}
        self._refresh()


class FollowedFactors:
    """The last measured update's covariance as r directions and a diagonal rest; see `Exposure.factors`."""

    joint = True

    def __init__(self, scale: float, rank: int) -> None:
        if not scale >= 0:
            raise InputError("scale", scale, "must be 0 or more")
        if rank < 1:
            raise InputError("rank", rank, "must be at least 1")
        self._scale, self.rank = scale, rank
        self._found: dict[str, tuple[Tensor, Tensor]] = {}

    def __call__(self, place: Place) -> Factors | None:
        found = self._found.get(place.name)
        if found is None:
            return None
        directions, rest = found
        return directions.T, directions.new_full((len(directions),), self._scale), self._scale * rest

    def feed(self, covariance: Covariance) -> None:
        """Take in a measured update."""
        assert covariance.directions is not None
        for name, directions in covariance.directions.items():
            largest = directions[: self.rank]
            rest = covariance.diagonal[name].flatten() - largest.square().sum(0)
            # The rest of a sample covariance is 0 or more, up to rounding.
            self._found[name] = largest.clone(), rest.clamp_min(0)

    def state_dict(self) -> dict[str, Any]:
        """Directions and rests by name."""
        return {"found": {name: (d.clone(), r.clone()) for name, (d, r) in self._found.items()}}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over what `state_dict` gave."""
        self._found = {name: (d.clone(), r.clone()) for name, (d, r) in state["found"].items()}


Followed = FollowedDeviations | FollowedFactors
