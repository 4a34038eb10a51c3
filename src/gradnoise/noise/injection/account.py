"""What injections add to a meter's ledger, update by update."""

import math
from collections.abc import Sequence
from typing import Any

import torch

from gradnoise.base.errors import InputError
from gradnoise.noise.injection.inject import Injection, injections_of
from gradnoise.noise.ledger import Ledger
from gradnoise.noise.survey import Survey
from gradnoise.noise.update import Member

# Tr(P N P) and Tr(N) at unit power, by tensor.
Unit = list[tuple[float, float]]


class Account:
    """Powers are known at every update; traces at unit power are found with P of the last measured one.

    A channel that is new between measured updates (a swap) is found with P as it is then.

    `injected`: Tr(P N P) of the update just made.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        members: Sequence[Member],
        survey: Survey,
        ledger: Ledger,
    ) -> None:
        self._optimizer, self._members = optimizer, members
        self._survey, self._ledger = survey, ledger
        self._number = {member.parameter: n for n, member in enumerate(members)}
        self.injected = 0.0
        # By position of the injection and channel; and of which injections (None: what a loaded state says).
        self._units: dict[tuple[int, str], Unit] = {}
        self._of: list[Injection] | None = []

    def forget(self) -> None:
        """Find traces at unit power anew: P or a source has changed."""
        self._units = {}

    def keep(self, injections: list[Injection]) -> None:
        """Find every channel's traces with P as just measured, and let P go: it is of the model's size."""
        for injection in injections:
            for channel in dict.fromkeys(injection.channel(place) for place in injection.places):
                self._unit(injection, channel)
        self._survey.p = {}

    def add(self, injections: list[Injection]) -> None:
        """Add what was injected into the update just counted to the ledger."""
        self.injected = 0.0
        if self._ledger.open is None or not injections:
            return
        rates, traces = self._ledger.last_rates, []
        amounts = [[0.0] * len(self._members) for _ in range(3)]
        for injection in injections:
            powers = injection.powers()
            for place in injection.places:
                n, channel = self._number.get(place.parameter), injection.channel(place)
                if n is not None and powers.get(channel) and place.parameter in injection.reached:
                    power, (unit, unit_c) = powers[channel], self._unit(injection, channel)[n]
                    rate = rates[place.group] * self._ratio(n)
                    traces.append(power * unit)
                    amounts[0][n] += rate * power * unit
                    amounts[1][n] += rate**2 * power * unit
                    amounts[2][n] += rate**2 * power * unit_c
        self.injected = math.fsum(traces)
        self._ledger.inject(amounts)

    def unit(self, injection: Injection, channel: str) -> float:
        """Tr(P N P) of a channel at unit power; `InputError` before the first measured update."""
        self._check()
        return math.fsum(trace for trace, _ in self._unit(injection, channel))

    def unit_pne2(self, injection: Injection, channel: str) -> dict[str, float]:
        """By layer, what an update of a channel at unit power adds to `pne2`, at the last learning rates."""
        self._check()
        rates = self._ledger.last_rates
        found = dict.fromkeys((member.layer for member in self._members), 0.0)
        some = any(member.parameter.grad is not None for member in self._members)
        for n, (unit, _) in enumerate(self._unit(injection, channel)):
            member = self._members[n]
            # A parameter that alone has no gradient gets no noise; under Adam its P would be 1/eps.
            if member.parameter.grad is None and some:
                continue
            found[member.layer] += (rates[member.group] * self._ratio(n)) ** 2 * unit
        return found

    def _check(self) -> None:
        if not self._ledger.last_rates:
            raise InputError("meter", "has measured nothing yet", "make a measured update first")

    def _unit(self, injection: Injection, channel: str) -> Unit:
        attached = injections_of(self._optimizer)
        if self._of not in (None, attached):
            self._units = {}  # their positions changed
        self._of = list(attached)
        key = (attached.index(injection), channel)
        if key not in self._units:
            found = [(0.0, 0.0)] * len(self._members)
            for place in injection.places:
                n = self._number.get(place.parameter)
                if n is not None and injection.channel(place) == channel:
                    p = self._survey.p_of(self._members[n])
                    found[n] = injection.unit(place, p, self._ratio(n))
            self._units[key] = found
        return self._units[key]

    def _ratio(self, n: int) -> float:
        now = self._ledger.open
        assert now is not None
        return now.ratios[n if len(now.ratios) > 1 else 0]

    def state_dict(self) -> dict[str, Any]:
        """Plain data."""
        units = [[*key, list(found)] for key, found in self._units.items()]
        return {"units": units, "injected": self.injected}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over what `state_dict` gave; the same injections must be attached."""
        self._units = {(n, channel): [tuple(u) for u in found] for n, channel, found in state["units"]}
        self._of, self.injected = None, state["injected"]
