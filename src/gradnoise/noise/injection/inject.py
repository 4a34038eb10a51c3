"""Noise injected into an optimizer's updates: `noise = inject(optimizer, gaussian(std=...), where="post")`.

With unit-power noise n of covariance N in gradient units, power c, learning rate eta and preconditioner P:

- "pre": the optimizer steps with g + sqrt(c) n. It moves the first and the second moment: under Adam v grows
  with the noise, which P then cancels, and the signal shrinks (docs/injection.md).
- "post": after the step, theta <- theta - eta sqrt(c) P n. Moments do not see it.
- "frozen_v": the first moment gets sqrt(c) n, the second moment only g.

Each adds eta^2 c Tr(P N P) to `pne2` for one update and eta c Tr(P N P) to `pne`; eta as in
`noise.integrals`. Noise enters after clipping and unscaling; an update that a GradScaler skips gets none and
is not counted.
"""

import math
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from fnmatch import fnmatchcase
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import SGD, Adafactor, Adam, AdamW, Optimizer, RMSprop

from gradnoise.base.errors import InputError
from gradnoise.noise.injection.sources import Draws, Place, Source
from gradnoise.noise.members import layer_of
from gradnoise.noise.preconditioners import KNOWN, Filter, is_diagonal, learning_filter, read

Where = Literal["pre", "post", "frozen_v"]
# Noise smaller than this share of coordinates' rounding is worth a warning.
LOST = 0.01
# A coordinate whose P is this many times a typical one's gets hardly any gradient.
SCARCE = 100.0

# Kept by the optimizer itself, so that both go together.
_INJECTIONS = "_gradnoise_injections"


def injections_of(optimizer: Optimizer) -> "list[Injection]":
    """What is injected into the optimizer's updates, in the order of attachment."""
    found: list[Injection] = optimizer.__dict__.setdefault(_INJECTIONS, [])
    return found


def inject(
    optimizer: Optimizer,
    source: Source | Mapping[int, Source | None],
    where: Where = "post",
    *,
    model: nn.Module | None = None,
    layers: str = "*",
    power: float | Callable[[int], float] = 1.0,
    seed: int = 0,
    limit: float = math.inf,
) -> "Injection":
    """Add noise to every later update of the optimizer; nothing else in the loop changes.

    - `source`: `gaussian`, `student_t` or `low_rank`; or a mapping from the update (from 1) at which each
      comes into force to a source, None for none: a swap in mid-training.
    - `where`: "pre", "post" or "frozen_v", see the module.
    - `layers`: glob patterns joined by "|", held against parameters' names and their modules', such as
      "blocks.0.*|head". Names come from `model`, or from an optimizer that was given `named_parameters()`;
      without either a name is the position in the optimizer.
    - `power`: the variance is times this, a number or a function of the update (0 outside of a phase).
    - `seed`: draws are keyed by (seed, update, parameter name), the same on every rank. Two injections at one
      place need two seeds.
    - `limit`: after the step P counts at most this times the P of a coordinate whose 1/P is the root mean
      square of its tensor's. Under Adam the P of a coordinate that gets no gradient is 1/eps = 1e8, and noise
      that does not fade where gradients do would go there, which is warned of.

    A meter on the same optimizer adds what is injected to its ledger by itself.

    Raises `InputError` for an optimizer whose preconditioner is not known (but for "pre"), patterns that
    match nothing, and at a step for a closure with noise in the gradient.
    """
    return Injection(
        optimizer, source, where, model=model, layers=layers, power=power, seed=seed, limit=limit
    )


class Injection:
    """See `inject`. `step`: updates done; `power` may be set at any time, `gains` scale it layer by layer.

    `metric`: the displacement is eta sqrt(c) P^metric n; 1, but for noises whose temperature is defined with
    another power (pSGLD: 1/2).
    """

    def __init__(
        self,
        optimizer: Optimizer,
        source: Source | Mapping[int, Source | None],
        where: Where = "post",
        *,
        model: nn.Module | None = None,
        layers: str = "*",
        power: float | Callable[[int], float] = 1.0,
        seed: int = 0,
        metric: float = 1.0,
        limit: float = math.inf,
    ) -> None:
        if where not in get_args(Where):
            raise InputError("where", where, "must be pre, post or frozen_v")
        if where != "pre" and not is_diagonal(optimizer):
            mend = f"its preconditioner is not known ({KNOWN} are): take where='pre'"
            raise InputError("optimizer", type(optimizer).__name__, mend)
        if not limit > 0 or (limit < math.inf and where != "post"):
            raise InputError("limit", limit, "must be above 0, and is for where='post'")
        self.places = places_of(optimizer, model, layers)
        self._sources = {1: source} if not isinstance(source, Mapping) else dict(source)
        _check_sources(self._sources, optimizer, model)
        self.optimizer, self.where, self.power, self.seed = optimizer, where, power, seed
        for other in injections_of(optimizer):
            both = {place.parameter for place in self.places} & {place.parameter for place in other.places}
            if other.seed == seed and both:
                mend = "another injection there draws the same numbers: give another seed"
                raise InputError("seed", seed, mend)
        self._metric, self._limit = metric, limit
        self.gains: dict[str, float] = {}
        self.step = 0
        self._under_way = False
        # Of the update under way: power by channel, gradients without noise, noise that was added to them,
        # and sizes of parameters before the step (Adafactor).
        self._powers: dict[str, float] = {}
        self._clean: dict[Tensor, Tensor] = {}
        self._scale: Tensor | None = None
        self.added: list[tuple[Place, Tensor]] = []
        # Parameters that the update just made put noise into.
        self.reached: set[Tensor] = set()
        self._sizes: dict[Tensor, float] = {}
        self._checked = False
        self._hooks = [
            optimizer.register_step_pre_hook(self._before),
            optimizer.register_step_post_hook(lambda *_: self.settle()),
        ]
        injections_of(optimizer).append(self)

    def remove(self) -> None:
        """Detach: later updates get no noise."""
        for hook in self._hooks:
            hook.remove()
        self._hooks = []
        if self in injections_of(self.optimizer):
            injections_of(self.optimizer).remove(self)

    def state_dict(self) -> dict[str, Any]:
        """All that a resumed run needs to draw the same noise: plain data and tensors."""
        return {
            "seed": self.seed,
            "step": self.step,
            "gains": dict(self.gains),
            "power": None if callable(self.power) else self.power,
            "sources": {
                at: source.state_dict() for at, source in self._sources.items() if source is not None
            },
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over what `state_dict` of an injection with the same arguments gave."""
        self.seed, self.step = state["seed"], state["step"]
        self.gains = dict(state["gains"])
        if state["power"] is not None and not callable(self.power):
            self.power = state["power"]
        for at, values in state["sources"].items():
            source = self._sources.get(int(at))
            if source is None:
                raise InputError("state_dict", f"a source at update {at}", "attach the same sources first")
            source.load_state_dict(values)

    # What a meter asks.

    def channel(self, place: Place) -> str:
        """Places of one channel always have the same power, and its unit power means the same noise."""
        at = max((at for at in self._sources if at <= self.step), default=0)
        return f"{at}/{place.layer if self.gains else ''}"

    def powers(self) -> Mapping[str, float]:
        """Power of the update just made, by channel."""
        return self._powers

    def unit(self, place: Place, p: Tensor, ratio: float) -> tuple[float, float]:
        """Tr(P N P) and Tr(N) at unit power, `p` the place's P (flat), `ratio` as `Filter.total`.

        N is what noise in gradients would have to be for the same displacement.
        """
        del ratio
        source = self._source(self.step)
        variance = None if source is None else source.variance(place)
        if variance is None:
            return 0.0, 0.0
        p = self._limited(p.double())
        if isinstance(variance, Tensor) and variance.ndim:
            variance = variance.flatten().double()
        traces = [(p.pow(2 * self._metric - less) * variance).sum().item() for less in (0, 2)]
        return traces[0], traces[1]

    def variance(self, place: Place) -> Tensor:
        """Diagonal of the covariance of what the update just made got there, of the parameter's shape."""
        source = self._source(self.step)
        found = None if source is None else source.variance(place)
        power = self._powers.get(self.channel(place), 0.0)
        dtype = torch.promote_types(place.parameter.dtype, torch.float32)
        none = torch.zeros_like(place.parameter, dtype=dtype)
        return none if found is None else none + power * found

    # The update.

    def _source(self, update: int) -> Source | None:
        found = max((at for at in self._sources if at <= update), default=None)
        return None if found is None else self._sources[found]

    def _power(self, place: Place, update: int) -> float:
        """Power at a place for the update."""
        power = self.power(update) if callable(self.power) else self.power
        return power * self.gains.get(place.layer, 1.0)

    def _before(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if skipped(optimizer):
            return
        if self._in_gradient and (
            kwargs.get("closure") is not None or (len(args) > 1 and args[1] is not None)
        ):
            mend = "call backward() before step(), without a closure"
            raise InputError("where", self.where, f"needs the gradient before the step: {mend}")
        self.step += 1
        self._under_way = True
        powers: dict[str, float] = {}
        for place in self.places:
            channel = self.channel(place)
            if channel not in powers:
                powers[channel] = self._power(place, self.step)
        odd = [power for power in powers.values() if not 0 <= power < math.inf]
        if odd:
            raise InputError(f"power at update {self.step}", odd[0], "must be 0 or more, and finite")
        self._powers, self.added, self.reached, self._clean = powers, [], set(), {}
        if self._in_gradient and any(powers.values()):
            self._perturb()
        elif isinstance(optimizer, Adafactor) and any(powers.values()):
            self._sizes = {
                place.parameter: place.parameter.norm().item() / math.sqrt(place.parameter.numel())
                for place in self.places
            }

    @property
    def _in_gradient(self) -> bool:
        """SGD has no second moment, so there "frozen_v" and "pre" are the same."""
        return self.where == "pre" or (self.where == "frozen_v" and isinstance(self.optimizer, SGD))

    def _drawn(self) -> Iterator[tuple[Place, Tensor]]:
        """Noise of the update under way, sqrt(power) included; none where the optimizer has no gradient."""
        source, draws = self._source(self.step), Draws(self.seed, self.step)
        for place in self.places if source is not None else ():
            power = self._powers[self.channel(place)]
            if power == 0 or place.parameter.grad is None:
                continue
            noise = source.draw(place, draws)  # type: ignore[union-attr]
            if noise is not None:
                self.reached.add(place.parameter)
                yield place, noise if power == 1 else noise.mul_(math.sqrt(power))

    @torch.no_grad()
    def _perturb(self) -> None:
        """Let the optimizer see noisy gradients; `settle` gives the clean ones back."""
        # A fused optimizer under a GradScaler unscales the gradient that it finds, in its step.
        self._scale = scale = getattr(self.optimizer, "grad_scale", None)
        self.added = list(self._drawn())
        attached = injections_of(self.optimizer)
        earlier = attached[: attached.index(self)]
        for place, noise in self.added:
            gradient = place.parameter.grad
            assert gradient is not None
            # Of several injections the first has the clean gradient.
            if not any(place.parameter in other._clean for other in earlier):
                self._clean[place.parameter] = gradient
            place.parameter.grad = gradient + (noise if scale is None else noise * scale).to(gradient.dtype)

    @torch.no_grad()
    def settle(self) -> None:
        """Finish the update just made: called by the optimizer, or by a meter that needs it finished."""
        if not self._under_way:
            return
        self._under_way = False
        for parameter, gradient in self._clean.items():
            parameter.grad = gradient if self._scale is None else gradient.div_(self._scale)
        self._clean = {}
        if not self._in_gradient and any(self._powers.values()):
            add = self._through_momentum if self.where == "frozen_v" else self._displace
            first, rounding, scarce = not self._checked, Rounding(), [0.0, 0.0]
            for place, noise in self._drawn():
                self._checked = True
                if first and self._metric == 1:
                    scarce = [x + y for x, y in zip(scarce, self._power_at(place, noise), strict=True)]
                with rounding.of(place.parameter, noise) if first else nullcontext():
                    add(place, noise)
            rounding.warn()
            if scarce[0] > scarce[1] / 2:
                warnings.warn(
                    f"injected noise: {scarce[0] / scarce[1]:.0%} of it moves coordinates that get hardly any"
                    " gradient, where P is largest: take noise that fades there (meter.std), or where='post'"
                    " with limit=10",
                    stacklevel=2,
                )

    def _power_at(self, place: Place, noise: Tensor) -> tuple[float, float]:
        """|P n|^2 where P is over `SCARCE` times that of a typical coordinate, and everywhere."""
        p = self._limited(self._reader(place))
        moved = (noise * p).square()
        rare = p > SCARCE * p.pow(-2).mean().rsqrt()
        return moved[rare].sum().item(), moved.sum().item()

    def _reader(self, place: Place) -> Tensor:
        """P of the step just made, in the parameter's shape."""
        group = self.optimizer.param_groups[place.group]
        return read(self.optimizer, place.parameter, group)().view_as(place.parameter)

    def _displace(self, place: Place, noise: Tensor) -> None:
        """theta <- theta - eta P^metric n."""
        p = self._limited(self._reader(place))
        noise = noise.mul_(p if self._metric == 1 else p.pow(self._metric))
        place.parameter.add_(noise.to(place.parameter.dtype), alpha=-self._rate(place))

    def _limited(self, p: Tensor) -> Tensor:
        """P, at most `limit` times that of a coordinate whose 1/P is the tensor's root mean square."""
        if self._limit == math.inf:
            return p
        return torch.minimum(p, self._limit * p.pow(-2).mean().rsqrt())

    def _rate(self, place: Place) -> float:
        """eta: effective learning rate, all that one gradient ever adds."""
        group = self.optimizer.param_groups[place.group]
        return float(group["lr"]) * self._filter(place).total

    def _filter(self, place: Place) -> Filter:
        size = self._sizes.get(place.parameter, 0.0)
        group = self.optimizer.param_groups[place.group]
        return learning_filter(self.optimizer, place.parameter, size, group)

    def _through_momentum(self, place: Place, noise: Tensor) -> None:
        """What g + n would have added to the first moment and, through it, to this step."""
        parameter, optimizer = place.parameter, self.optimizer
        group, state = optimizer.param_groups[place.group], optimizer.state[parameter]
        if isinstance(optimizer, Adam | AdamW):
            beta1 = float(group["betas"][0])
            state["exp_avg"].add_(noise.to(state["exp_avg"].dtype), alpha=1 - beta1)
        moved = noise * self._reader(place)
        if isinstance(optimizer, RMSprop) and group["momentum"] > 0:
            state["momentum_buffer"].add_(moved.to(state["momentum_buffer"].dtype))
        rate = float(group["lr"]) * self._filter(place).instant
        parameter.add_(moved.to(parameter.dtype), alpha=-rate)


class Rounding:
    """How much of the noise parameters in half precision are too coarse to hold."""

    def __init__(self) -> None:
        self._lost = self._all = 0
        self._kinds: set[str] = set()

    @contextmanager
    def of(self, parameter: Tensor, noise: Tensor) -> Iterator[None]:
        """Look at a parameter before and after noise is added to it."""
        half = parameter.element_size() < 4
        before, noisy = (parameter.clone(), noise != 0) if half else (parameter, noise)
        yield
        if half:
            self._lost += int(((parameter == before) & noisy).sum().item())
            self._all += int(noisy.sum().item())
            self._kinds.add(str(parameter.dtype).removeprefix("torch."))

    def warn(self) -> None:
        """Say so if it is more than a little."""
        if self._lost > LOST * self._all:
            warnings.warn(
                f"injected noise: {self._lost / self._all:.0%} of the coordinates in"
                f" {', '.join(sorted(self._kinds))} are too coarse to change by it and the rest is rounded:"
                " keep master weights in float32",
                stacklevel=3,
            )


def skipped(optimizer: Optimizer) -> bool:
    """Whether a GradScaler with a fused optimizer calls step() for an update that it skips."""
    infinite = getattr(optimizer, "found_inf", None)
    return infinite is not None and bool(infinite.item())


def _check_sources(
    sources: Mapping[int, Source | None], optimizer: Optimizer, model: nn.Module | None
) -> None:
    """Raises `InputError` for updates that are none, what is no source, and names that no parameter has."""
    if not sources or any(not isinstance(at, int) or at < 1 for at in sources):
        raise InputError("source", list(sources), "updates of a swap are whole numbers from 1")
    names = _names(model).values() if model is not None else ()
    known = {*names, *(place.name for place in places_of(optimizer, model, "*"))}
    mend = "give model=, or an optimizer with named_parameters()" if model is None else "mend the name"
    for source in sources.values():
        if source is not None and not hasattr(source, "draw"):
            name = type(source).__name__
            raise InputError("source", name, "must be gaussian(...), student_t(...) or the like")
        for unknown in sorted(set(getattr(source, "names", ())) - known):
            raise InputError("source", unknown, f"no parameter has that name: {mend}")


def places_of(optimizer: Optimizer, model: nn.Module | None, layers: str) -> list[Place]:
    """The optimizer's trainable parameters that `layers` matches, in its order.

    Raises `InputError` for a pattern that matches nothing and a parameter that `model` lacks.
    """
    names = {} if model is None else _names(model)
    found, number = [], 0
    for index, group in enumerate(optimizer.param_groups):
        given = group.get("param_names", [None] * len(group["params"]))
        for parameter, own in zip(group["params"], given, strict=True):
            if model is not None and parameter not in names:
                raise InputError("model", "lacks a parameter of the optimizer", "give the model it trains")
            name = names.get(parameter) or own or f"parameters.{number}"
            number += 1
            if parameter.requires_grad:
                found.append(Place(name, parameter, index, layer_of(name)))
    chosen: set[str] = set()
    for pattern in layers.split("|"):
        here = {place.name for place in found if matches(place.name, pattern)}
        if not here:
            known = ", ".join(place.name for place in found[:4])
            mend = "give model=, " if model is None else ""
            raise InputError("layers", pattern, f"matches none of {known}, ...: {mend}mend the pattern")
        chosen |= here
    return [place for place in found if place.name in chosen]


def _names(model: nn.Module) -> dict[Tensor, str]:
    """Names of parameters in the model, without those that torch.compile and DDP put in front."""
    while not isinstance(model, DistributedDataParallel) and hasattr(model, "_orig_mod"):
        model = model._orig_mod  # type: ignore[assignment]
    inner = model.module if isinstance(model, DistributedDataParallel) else model
    return {p: name.replace("_orig_mod.", "") for name, p in inner.named_parameters()}


def matches(name: str, pattern: str) -> bool:
    """Whether a glob pattern matches a parameter's name or that of its module."""
    return fnmatchcase(name, pattern) or fnmatchcase(name.rpartition(".")[0], pattern)
