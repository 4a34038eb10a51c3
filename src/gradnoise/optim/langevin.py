"""Langevin noise on top of any optimizer: a temperature in its parameter groups, instead of a power.

Each update is followed by theta <- theta + sqrt(2 eta T) P^metric n with n of covariance Sigma, which is an
injection of power 2 T / eta: it adds 2 T Tr(P^metric Sigma P^metric) to `pne`, times eta to `pne2`. eta as in
`noise.integrals`.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from gradnoise.base.errors import InputError
from gradnoise.noise.injection.inject import Injection, injections_of
from gradnoise.noise.injection.sources import Place, Source

Schedule = float | Callable[[int], float]


class Langevin(Injection):
    """An injection after the step whose amount is a temperature.

    `settings`, by name: a number or a function of the update (from 1). They are kept in every parameter group
    as plain floats, so a scheduler may write them (a number) or they are written before each update (a
    function). `temperature` is one of them; in units of the loss. `keys`: their names there; those of the
    `number`-th noise on an optimizer end in "_2", "_3", ...
    """

    def __init__(
        self,
        optimizer: Optimizer,
        source: Source | Mapping[int, Source | None],
        settings: Mapping[str, Schedule],
        *,
        model: nn.Module | None = None,
        layers: str = "*",
        seed: int = 0,
        metric: float = 1.0,
        limit: float = math.inf,
    ) -> None:
        before = [noise.number for noise in injections_of(optimizer) if isinstance(noise, Langevin)]
        self.number: int = max(before, default=0) + 1
        self.keys = {name: name if self.number == 1 else f"{name}_{self.number}" for name in settings}
        super().__init__(
            optimizer, source, "post", model=model, layers=layers, seed=seed, metric=metric, limit=limit
        )
        self._settings = dict(settings)
        self._write(1)

    def remove(self) -> None:
        """Detach: later updates get no noise, and the parameter groups are without its settings."""
        super().remove()
        for group in self.optimizer.param_groups:
            for key in self.keys.values():
                group.pop(key, None)

    def setting(self, name: str, group: int) -> float:
        """A setting as the parameter group has it now."""
        kept = self.optimizer.param_groups[group].get(self.keys[name])
        if kept is None:  # the groups were loaded from a checkpoint without it
            given = self._settings[name]
            kept = given(max(self.step, 1)) if callable(given) else given
        return float(kept)

    def channel(self, place: Place) -> str:
        return str(place.group)

    def _write(self, update: int) -> None:
        for group in self.optimizer.param_groups:
            for name, given in self._settings.items():
                if callable(given):
                    group[self.keys[name]] = float(given(update))
                else:
                    group.setdefault(self.keys[name], float(given))

    def _before(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._write(self.step + 1)
        super()._before(optimizer, args, kwargs)

    def _power(self, place: Place, update: int) -> float:
        temperature = self.setting("temperature", place.group)
        if not 0 <= temperature < math.inf:
            raise InputError("temperature", temperature, "must be 0 or more, and finite")
        rate = float(self.optimizer.param_groups[place.group]["lr"])
        return 2 * temperature / rate if rate > 0 else 0.0

    def _rate(self, place: Place) -> float:
        """eta of the power is that of the group; the rest of the effective one enters as a square root."""
        group = self.optimizer.param_groups[place.group]
        return float(group["lr"]) * math.sqrt(self._filter(place).total)

    def unit(self, place: Place, p: Tensor, ratio: float) -> tuple[float, float]:
        with_p, plain = super().unit(place, p, ratio)
        return with_p / ratio, plain / ratio
