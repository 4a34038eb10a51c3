"""Shaped noise: which covariance the noise of which weights has, and its draws.

A weight's noise has covariance Sigma_left (x) Sigma_right over its rows and columns (`Kronecker`), or one
covariance over all coordinates of one or several weights (`Whole`); each a `Sketch`, with trace equal to its
dimension, or the identity.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from gradnoise.noise.injection.sources import Draws, Place
from gradnoise.optim.sketch import Sketch


@dataclass
class Weight:
    """A matrix that gets aligned noise: its place, its layers, and whether its columns are their inputs.

    They are in torch's Linear; in Hugging Face's Conv1D the rows are. A tied weight has several layers, of
    which `path` names the first.
    """

    place: Place
    path: str
    layers: list[nn.Module]
    inputs_are_columns: bool = True

    @property
    def input_side(self) -> str:
        return "right" if self.inputs_are_columns else "left"


@dataclass
class Kronecker:
    """Noise of one weight (rows, columns) with covariance Sigma_left (x) Sigma_right."""

    weight: Weight
    left: Sketch | None = None
    right: Sketch | None = None

    @property
    def weights(self) -> list[Weight]:
        return [self.weight]

    @property
    def sketches(self) -> dict[str, Sketch]:
        """The sketches that there are, by side."""
        both = {"left": self.left, "right": self.right}
        return {side: sketch for side, sketch in both.items() if sketch is not None}

    def colour(self, white: Sequence[Tensor], alignment: float) -> list[Tensor]:
        """Noise of the weight's shape from standard normal numbers."""
        (noise,) = white
        if self.right is not None:
            noise = self.right.colour(noise, alignment, "right")
        if self.left is not None:
            noise = self.left.colour(noise, alignment, "left")
        return [noise]

    def variances(self, alignment: float) -> list[Tensor]:
        """The diagonal of its covariance, of the weight's shape."""
        parameter = self.weight.place.parameter
        ones = torch.ones((), device=parameter.device)
        left = ones if self.left is None else self.left.variances(alignment)[:, None]
        right = ones if self.right is None else self.right.variances(alignment)
        return [(left * right).expand(parameter.shape)]


@dataclass
class Whole:
    """Noise of one or several weights with one covariance over all their coordinates, row-major, in order."""

    weights: list[Weight]
    sketch: Sketch

    @property
    def sketches(self) -> dict[str, Sketch]:
        """The sketch, under "whole"."""
        return {"whole": self.sketch}

    def colour(self, white: Sequence[Tensor], alignment: float) -> list[Tensor]:
        """Noise of the weights' shapes from standard normal numbers."""
        return self._cut(self.sketch.colour(torch.cat([z.flatten() for z in white]), alignment))

    def variances(self, alignment: float) -> list[Tensor]:
        """The diagonal of its covariance, of the weights' shapes."""
        return self._cut(self.sketch.variances(alignment))

    def _cut(self, flat: Tensor) -> list[Tensor]:
        parameters = [weight.place.parameter for weight in self.weights]
        pieces = torch.split(flat, [parameter.numel() for parameter in parameters])
        return [piece.view_as(p) for piece, p in zip(pieces, parameters, strict=True)]


Shape = Kronecker | Whole


@dataclass
class Shaped:
    """The source of aligned noise: of unit power, variances with mean 1 in every weight.

    `alignment(group)`: that of a parameter group now, from 0 (isotropic) to 1; of weights that share a
    covariance, their first one's group counts. They are drawn with the one that is asked for first.
    """

    shapes: list[Shape]
    alignment: Callable[[int], float]
    _of: dict[str, tuple[Shape, int]] = field(default_factory=dict)
    _drawn: dict[str, Tensor] = field(default_factory=dict)
    _update: int = 0

    def __post_init__(self) -> None:
        self._of = {
            weight.place.name: (shape, n) for shape in self.shapes for n, weight in enumerate(shape.weights)
        }

    def draw(self, place: Place, draws: Draws) -> Tensor | None:
        if self._update != draws.update:
            self._drawn, self._update = {}, draws.update
        if place.name not in self._drawn:
            shape, _ = self._of[place.name]
            white = [draws.normal(weight.place) for weight in shape.weights]
            noises = shape.colour(white, self._aligned(shape))
            self._drawn |= {
                weight.place.name: noise for weight, noise in zip(shape.weights, noises, strict=True)
            }
        return self._drawn.pop(place.name)

    def variance(self, place: Place) -> Tensor | None:
        shape, n = self._of[place.name]
        return shape.variances(self._aligned(shape))[n]

    def _aligned(self, shape: Shape) -> float:
        return self.alignment(shape.weights[0].place.group)

    def state_dict(self) -> dict[str, Any]:
        return {
            f"{shape.weights[0].place.name}/{side}": sketch.state_dict()
            for shape in self.shapes
            for side, sketch in shape.sketches.items()
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for shape in self.shapes:
            for side, sketch in shape.sketches.items():
                sketch.load_state_dict(state[f"{shape.weights[0].place.name}/{side}"])
