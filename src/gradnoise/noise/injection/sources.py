r"""Noises that can be injected, in gradient units and at unit power: what they draw, and their covariance.

- `gaussian(std)`: independent coordinates; one number (isotropic) or one a coordinate (diagonal).
- `student_t(std, degrees)`: the same variances with heavy tails, independent or elliptical.
- `low_rank(factors)`: covariance U diag(S) U' + diag(lam), of each tensor by itself or across tensors.

`std` and `factors` may come from a meter (`meter.std(scale=4)`, `meter.factors(scale=4)`), which follows the
gradient noise that it measures. A draw is a function of (seed, update, parameter's name) alone: the same on
every process of a distributed run, in any grouping of named parameters, and after a resume. It is made on the
parameter's device; a CPU and a GPU draw different numbers.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from gradnoise.base.errors import InputError
from gradnoise.base.streams import generator


@dataclass(frozen=True)
class Place:
    """A parameter that noise may be put into: its name, parameter group and layer."""

    name: str
    parameter: Tensor
    group: int
    layer: str


@dataclass(frozen=True)
class Draws:
    """Random numbers of one update: keyed by (seed, update) and, where it is a place's own, its name."""

    seed: int
    update: int

    def of(self, place: Place, part: str = "") -> torch.Generator:
        """A generator on the place's device that no other place shares."""
        name = place.name + part
        return generator(self.seed, "noise", self.update, name, device=place.parameter.device)

    def shared(self, part: str = "") -> torch.Generator:
        """A CPU generator that gives every place the same numbers."""
        return generator(self.seed, "noise", self.update, "*" + part)

    def normal(self, place: Place) -> Tensor:
        """Standard normal numbers of the place's shape; float32 where the parameter is in half precision."""
        parameter = place.parameter
        dtype = torch.promote_types(parameter.dtype, torch.float32)
        return torch.randn(parameter.shape, generator=self.of(place), dtype=dtype, device=parameter.device)


class Source(Protocol):
    """What can be injected."""

    def draw(self, place: Place, draws: Draws) -> Tensor | None:
        """Noise of the parameter's shape at unit power; None where there is none (yet)."""

    def variance(self, place: Place) -> Tensor | float | None:
        """Diagonal of its covariance, of the parameter's shape or a number for all; None where none."""

    def state_dict(self) -> dict[str, Any]:
        """What later draws depend on, beside seed and update."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over what `state_dict` gave."""


# Standard deviations at a place, None where there is no noise.
Deviations = Callable[[Place], Tensor | float | None]
# U (d, r), S (r,) and lam (a number or (d,)) at a place of d coordinates.
Factors = tuple[Tensor, Tensor, Tensor | float]


class _Stateless:
    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        del state


class Gaussian(_Stateless):
    """See `gaussian`."""

    def __init__(self, deviations: Deviations) -> None:
        self._deviations = deviations

    @property
    def names(self) -> frozenset[str]:
        """Parameters that it was given numbers for by name."""
        return getattr(self._deviations, "names", frozenset())

    def draw(self, place: Place, draws: Draws) -> Tensor | None:
        std = self._deviations(place)
        return None if std is None else draws.normal(place).mul_(std)

    def variance(self, place: Place) -> Tensor | float | None:
        std = self._deviations(place)
        return None if std is None else std * std

    def state_dict(self) -> dict[str, Any]:
        return _state(self._deviations)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        _load(self._deviations, state)


class StudentT(Gaussian):
    """Independent coordinates; see `student_t`."""

    def __init__(self, deviations: Deviations, degrees: float) -> None:
        super().__init__(deviations)
        self.degrees = degrees

    def draw(self, place: Place, draws: Draws) -> Tensor | None:
        std = self._deviations(place)
        if std is None:
            return None
        dtype = torch.promote_types(place.parameter.dtype, torch.float32)
        return student(place.parameter.shape, self.degrees, draws.of(place)).to(dtype).mul_(std)


def student(shape: Sequence[int], degrees: float, draw: torch.Generator) -> Tensor:
    r"""Independent Student's t numbers scaled to variance 1, on the generator's device; float64.

    t = sqrt(nu (U^(-2/nu) - 1)) cos(2 pi V), with U and V uniform. In float64, because the 24 bits of a
    float32 would cut the tail that most of the variance is in. Source: Bailey, Polar generation of random
    variates with the t-distribution, Mathematics of Computation 62 (1994), 779-781.
    """
    u, v = torch.rand((2, *shape), generator=draw, dtype=torch.float64, device=draw.device)
    # 1 - u is never 0, and expm1 keeps the digits that many degrees would cancel.
    squares = (degrees - 2) * torch.expm1(-2 / degrees * torch.log1p(-u))
    return squares.sqrt() * torch.cos(2 * math.pi * v)


class Elliptical:
    """Another noise times sqrt((nu - 2) / chi2_nu), one number an update or one a tensor and update."""

    def __init__(self, base: Source, degrees: float, by_tensor: bool) -> None:
        self.base, self.degrees, self._by_tensor = base, degrees, by_tensor

    @property
    def names(self) -> frozenset[str]:
        """Parameters that it was given numbers for by name."""
        return getattr(self.base, "names", frozenset())

    def draw(self, place: Place, draws: Draws) -> Tensor | None:
        noise = self.base.draw(place, draws)
        if noise is None:
            return None
        stretch = "/stretch"
        draw = draws.shared(stretch + place.name if self._by_tensor else stretch)
        half = torch.tensor(self.degrees / 2, dtype=torch.float64)
        chi2 = 2 * torch._standard_gamma(half, generator=draw).item()
        return noise.mul_(math.sqrt((self.degrees - 2) / chi2))

    def variance(self, place: Place) -> Tensor | float | None:
        return self.base.variance(place)

    def state_dict(self) -> dict[str, Any]:
        return self.base.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.base.load_state_dict(state)


class LowRank(_Stateless):
    """See `low_rank`."""

    def __init__(self, factors: Callable[[Place], Factors | None], joint: bool) -> None:
        self._factors, self.joint = factors, joint

    @property
    def names(self) -> frozenset[str]:
        """Parameters that it was given factors for by name."""
        return getattr(self._factors, "names", frozenset())

    def draw(self, place: Place, draws: Draws) -> Tensor | None:
        found = self._factors(place)
        if found is None:
            return None
        directions, variances, rest = found
        noise = draws.normal(place).flatten()
        if self.joint:
            numbers = torch.randn(len(variances), generator=draws.shared("/directions")).to(noise)
        else:
            draw = draws.of(place, "/directions")
            numbers = torch.randn(len(variances), generator=draw, device=noise.device, dtype=noise.dtype)
        noise.mul_(rest**0.5 if isinstance(rest, float | int) else rest.sqrt())
        return noise.addmv_(directions, variances.sqrt() * numbers).view_as(place.parameter)

    def variance(self, place: Place) -> Tensor | float | None:
        found = self._factors(place)
        if found is None:
            return None
        directions, variances, rest = found
        diagonal: Tensor = directions.square() @ variances + rest
        return diagonal.view_as(place.parameter)

    def state_dict(self) -> dict[str, Any]:
        return _state(self._factors)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        _load(self._factors, state)


def gaussian(std: float | Mapping[str, Tensor | float] | Deviations) -> Gaussian:
    """Gaussian noise N(0, std^2), coordinates independent.

    `std` in gradient units (injected before the preconditioner; after it, P times that is added to the
    update): a number for every coordinate (isotropic), a mapping from parameter names to a number or a tensor
    of the parameter's shape (names left out get none), or what a meter follows: `meter.std(scale=4)`.

    Raises `InputError` for a negative or non-finite number, and at a step for a tensor of another shape.
    """
    return Gaussian(_deviations(std))


def student_t(
    std: "float | Mapping[str, Tensor | float] | Deviations | Source",
    degrees: float = 5.0,
    kind: Literal["iid", "elliptical", "tensor"] = "iid",
) -> Source:
    """Heavy-tailed noise of the same covariance: Student's t with `degrees` > 2, scaled to variance std^2.

    `kind` "iid": each coordinate by itself; norms over a large tensor then look Gaussian. "elliptical": one
    chi-squared number stretches the whole update, so its norm is heavy-tailed; "tensor": one a tensor. The
    two elliptical kinds also take another source in place of `std`, e.g. `low_rank(...)`; one that is joint
    across tensors must be "elliptical". A law without a second moment (alpha-stable, degrees <= 2) cannot be
    matched in variance and is not offered.

    Raises `InputError` for degrees out of range and a kind that does not go with `std`.
    """
    if not 2 < degrees < math.inf:
        mend = "must be above 2 and finite: with fewer the variance is infinite"
        raise InputError("degrees", degrees, mend)
    if kind not in ("iid", "elliptical", "tensor"):
        raise InputError("kind", kind, "must be iid, elliptical or tensor")
    given = hasattr(std, "draw")
    if kind == "iid":
        if given:
            raise InputError("std", type(std).__name__, "kind iid needs standard deviations, not a source")
        return StudentT(_deviations(std), degrees)  # type: ignore[arg-type]
    base: Source = std if given else gaussian(std)  # type: ignore[assignment, arg-type]
    if kind == "tensor" and getattr(base, "joint", False):
        mend = "would loosen the covariance between tensors of a joint source: take elliptical"
        raise InputError("kind", kind, mend)
    return Elliptical(base, degrees, by_tensor=kind == "tensor")


def low_rank(
    factors: Mapping[str, Factors] | Callable[[Place], Factors | None], joint: bool = False
) -> LowRank:
    """Gaussian noise of covariance U diag(S) U' + diag(lam).

    `factors`: by parameter name (U (d, r), S (r,), lam a number or (d,)), d the parameter's coordinates in
    row-major order, columns of U of any length, S and lam variances; or what a meter follows:
    `meter.factors(scale=4)`. `joint`: the r random numbers are shared by all tensors, so U is one tall matrix
    cut into tensors and the covariance reaches across layers (the meter's always does); else tensors are
    independent.

    Raises `InputError` for shapes that do not fit or a negative variance.
    """
    if callable(factors):
        return LowRank(factors, joint or getattr(factors, "joint", False))
    for name, (directions, variances, rest) in factors.items():
        size = torch.as_tensor(rest).shape
        if (
            directions.ndim != 2
            or variances.shape != directions.shape[1:]
            or size not in ((), directions.shape[:1])
        ):
            shapes = f"U {tuple(directions.shape)}, S {tuple(variances.shape)}, lam {tuple(size)}"
            mend = "U must be (coordinates, r), S (r,) and lam a number or (coordinates,)"
            raise InputError(f"factors.{name}", shapes, mend)
        if not directions.isfinite().all():
            raise InputError(f"factors.{name}", "U", "must be finite")
        _check(f"factors.{name}", variances)
        _check(f"factors.{name}", rest)
    return LowRank(_NamedFactors(factors), joint)


class _NamedDeviations:
    """Standard deviations from a mapping."""

    def __init__(self, table: Mapping[str, Tensor | float]) -> None:
        self._table, self.names = dict(table), frozenset(table)

    def __call__(self, place: Place) -> Tensor | float | None:
        found = self._table.get(place.name)
        if isinstance(found, Tensor) and found.ndim and found.shape != place.parameter.shape:
            mend = f"give one number, or a tensor of the parameter's shape {tuple(place.parameter.shape)}"
            raise InputError(f"std.{place.name}", f"of shape {tuple(found.shape)}", mend)
        return found


class _NamedFactors:
    """Factors from a mapping, in the dtype and on the device of the noise."""

    def __init__(self, table: Mapping[str, Factors]) -> None:
        self._table, self.names = dict(table), frozenset(table)

    def __call__(self, place: Place) -> Factors | None:
        found = self._table.get(place.name)
        if found is None:
            return None
        parameter = place.parameter
        if len(found[0]) != parameter.numel():
            mend = f"parameter has {parameter.numel()} coordinates"
            raise InputError(f"factors.{place.name}", f"U of {len(found[0])} rows", mend)
        dtype, device = torch.promote_types(parameter.dtype, torch.float32), parameter.device
        directions, variances, rest = found
        rest = rest.to(device, dtype) if isinstance(rest, Tensor) else rest
        self._table[place.name] = directions.to(device, dtype), variances.to(device, dtype), rest
        return self._table[place.name]


def _deviations(std: float | Mapping[str, Tensor | float] | Deviations) -> Deviations:
    if callable(std):
        return std
    if isinstance(std, Mapping):
        for name, value in std.items():
            _check(f"std.{name}", value)
        return _NamedDeviations(std)
    _check("std", std)
    number = float(std)
    return lambda _: number


def _check(field: str, value: Tensor | float) -> None:
    numbers = torch.as_tensor(value)
    if not (numbers.isfinite().all() and (numbers >= 0).all()):
        raise InputError(field, value if isinstance(value, float | int) else "tensor", "must be 0 or more")


def _state(provider: object) -> dict[str, Any]:
    state = getattr(provider, "state_dict", None)
    return {} if state is None else state()


def _load(provider: object, state: dict[str, Any]) -> None:
    load = getattr(provider, "load_state_dict", None)
    if load is not None:
        load(state)
