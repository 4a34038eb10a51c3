r"""Noise-aligned preconditioning (NAP): noise of a chosen shape added to any optimizer's updates.

After the step of the optimizer, with its learning rate eta and preconditioner P,

.. math:: \theta \leftarrow \theta + \sqrt{2 \eta T} \, P n, \qquad n \sim N(0, \Sigma),

Sigma per weight matrix a Kronecker product of streaming low-rank sketches (`optim.sketch`), its trace that of
the identity: temperature T sets the amount of noise, `alignment` and the target only its shape. Not pSGLD,
whose noise has covariance P and whose stationary law is Gibbs'; this one's is not, unless Sigma is P^-1
(docs/nap.md: what is and is not known).
"""

import inspect
import math
from collections.abc import Callable, Hashable, Mapping
from glob import escape
from typing import Any, Literal, get_args

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import AdamW, Optimizer

from gradnoise.base.errors import InputError
from gradnoise.noise.capture import kind_of
from gradnoise.noise.exposure import Exposure, exposure, meters_of
from gradnoise.noise.injection.inject import matches, places_of
from gradnoise.noise.injection.sources import Place
from gradnoise.optim.langevin import Langevin, Schedule
from gradnoise.optim.shapes import Kronecker, Shape, Shaped, Weight, Whole
from gradnoise.optim.sketch import Sketch, Spectrum
from gradnoise.optim.targets import Features, Tasks

Mode = Literal["relative", "absolute"]
Structure = Literal["kronecker", "vec", "joint"]
# U (d, r), S (r,) and lam: covariance U diag(S) U' + lam I.
Known = tuple[Tensor, Tensor, float]
Custom = Callable[[str, nn.Module], "Known | Mapping[str, Known]"]
Target = Literal["features", "tasks"] | Custom

# A new sketch of a dimension under a name, adapting or with a known number of directions.
Making = Callable[..., Sketch]
# Coordinates that one covariance over all of them may have: U holds rank times as many.
LARGEST = 100_000
# Updates between two measured ones of a meter that relative temperature attaches by itself.
EVERY = 100


def _often_at_first(step: int) -> bool:
    """Updates 1, 2, 4, ..., 64, then one in `EVERY`: P of a young second moment changes fast."""
    return step % EVERY == 1 or (step < EVERY and step.bit_count() == 1)


def align_noise(
    optimizer: Optimizer,
    model: nn.Module,
    *,
    rank: int = 16,
    temperature: Schedule = 0.0,
    alignment: Schedule = 1.0,
    layers: str = "*",
    target: Target = "features",
    structure: Structure | Mapping[str, Structure] = "kronecker",
    mode: Mode = "relative",
    meter: Exposure | None = None,
    seed: int = 0,
    sketch_every: int = 10,
    half_life: float = 35.0,
    explained: float = 1.0,
    spectrum: Spectrum = "aligned",
    limit: float = 10.0,
    process_group: "dist.ProcessGroup | None" = None,
) -> "Alignment":
    """Add noise aligned with a target to every later update of the optimizer.

    The optimizer stays what it is (AdamW, Adafactor, SGD, RMSprop: any whose preconditioner can be read); the
    loop stays too. Noise goes into the weights of the Linear layers (and Hugging Face's Conv1D) that `layers`
    matches: glob patterns joined by "|", e.g. "*.attention_out|*.mlp_out".

    - `temperature`: a number or a function of the update (from 1), kept as a float in the parameter groups,
      where schedulers may write it. `mode` "relative": injected over intrinsic exposure, unitless, portable
      over model sizes; read by the `meter` (the one that is attached, else one of its own, every 100
      updates, at first more often), so before its first reading nothing is injected. "absolute": T itself, in
      units of the loss.
    - `alignment`: from 0 (isotropic) to 1, likewise; the trace, so the power, stays what it is.
    - `target`: "features", "tasks" (see `optim.targets`), or a function of (layer's name, layer) giving
      (U, S, lam) of the input side, or a mapping of "in", "out" or "whole" to that.
    - `structure`: "kronecker"; "vec": one covariance over all coordinates of a weight; "joint": one over all
      coordinates of all its weights, across layers. The latter two need target "tasks" or your own, and at
      most 100000 coordinates. A mapping from pattern to structure mixes them, e.g.
      {"head": "vec", "*": "kronecker"}.
    - `rank` r: memory is r (inputs + outputs) numbers a matrix; target "tasks" holds on to one gradient more,
      or one a label, during updates of the sketch. `explained` below 1: r is the most, and adapts to keep
      that share of the trace. `sketch_every`: updates between two of the sketch; `half_life` in its updates.
      `spectrum` "reversed" and "random" are controls of equal power.
    - `limit`: P counts at most this times that of a coordinate whose 1/P is its tensor's root mean square.
      Under Adam the P of a coordinate that gets no gradient is 1/eps = 1e8, and all noise would go there. A
      weight whose gradient is 0 throughout, or None, gets no noise.
    - `seed`: draws are keyed by (seed, update, weight's name), the same on every rank; under
      DistributedDataParallel (or with `process_group`) sketches are summed over ranks.

    Raises `InputError` for patterns that match no such layer, matched layers of another kind (by name),
    numbers out of range and an optimizer whose preconditioner is not known.
    """
    return Alignment(
        optimizer,
        model,
        rank=rank,
        temperature=temperature,
        alignment=alignment,
        layers=layers,
        target=target,
        structure=structure,
        mode=mode,
        meter=meter,
        seed=seed,
        sketch_every=sketch_every,
        half_life=half_life,
        explained=explained,
        spectrum=spectrum,
        limit=limit,
        process_group=process_group,
    )


class Alignment(Langevin):
    """See `align_noise`. `shapes`: by weight, their sketches; `task(label)`: names the coming tasks."""

    def __init__(
        self,
        optimizer: Optimizer,
        model: nn.Module,
        *,
        rank: int,
        temperature: Schedule,
        alignment: Schedule,
        layers: str,
        target: Target,
        structure: Structure | Mapping[str, Structure],
        mode: Mode,
        meter: Exposure | None,
        seed: int,
        sketch_every: int,
        half_life: float,
        explained: float,
        spectrum: Spectrum,
        limit: float,
        process_group: "dist.ProcessGroup | None",
    ) -> None:
        if not (callable(temperature) or 0 <= temperature < math.inf):
            raise InputError("temperature", temperature, "must be 0 or more, and finite")
        if not (callable(alignment) or 0 <= alignment <= 1):
            raise InputError("alignment", alignment, "must be from 0 (isotropic) to 1")
        if mode not in get_args(Mode):
            raise InputError("mode", mode, "must be relative or absolute")
        if not limit > 0:
            raise InputError("limit", limit, "must be above 0")
        if sketch_every < 1:
            raise InputError("sketch_every", sketch_every, "must be at least 1 update")
        if not callable(target) and target not in ("features", "tasks"):
            raise InputError("target", target, "must be features, tasks or a function of (name, layer)")
        if meter is not None and meter not in meters_of(optimizer):
            raise InputError("meter", "of another optimizer", "give exposure(model, optimizer) of this one")
        self._model, self._group = model, process_group
        if isinstance(model, DistributedDataParallel):
            self._model, self._group = model.module, model.process_group
        self._mode, self._every = mode, sketch_every
        weights = weights_of(optimizer, self._model, layers)

        def sketch(dimension: int, name: str, known: int | None = None) -> Sketch:
            device = weights[0].place.parameter.device
            most, share = (rank, explained) if known is None else (known, 1.0)
            return Sketch(dimension, most, half_life, seed, name, device, explained=share, spectrum=spectrum)

        self.shapes = _shapes(weights, target, structure, sketch)
        # Of the last measured update: Tr(P C/B P), and Tr(P Sigma P) of what is injected.
        self._intrinsic, self._unit = 0.0, 0.0
        names = "|".join(escape(weight.place.name) for weight in weights)
        source = Shaped(self.shapes, lambda group: self.setting("alignment", group))
        settings = {"temperature": temperature, "alignment": alignment}
        super().__init__(optimizer, source, settings, model=self._model, layers=names, seed=seed, limit=limit)
        self._feed: Features | Tasks | None = None
        if not callable(target):
            self._feed = Features(self.shapes) if target == "features" else Tasks(self.shapes)
        self._meter, self._own_meter = meter, False
        if mode == "relative" and meter is None and (callable(temperature) or temperature > 0):
            self._own_meter = not meters_of(optimizer)
            if self._own_meter:
                exposure(model, optimizer, _often_at_first, process_group=process_group)
            self._meter = meters_of(optimizer)[0]
        if self._meter is not None:
            self._meter.after.append(self._refer)
        self._listen()

    def task(self, label: Hashable) -> None:
        """Name the task of the coming backward() calls; None: each is one of its own."""
        if not isinstance(self._feed, Tasks):
            raise InputError("task", label, "is for target='tasks'")
        self._feed.label = label

    def remove(self) -> None:
        """Detach, with the meter if it was attached for this."""
        super().remove()
        if self._feed is not None:
            self._feed.remove()
        if self._meter is not None and self._refer in self._meter.after:
            self._meter.after.remove(self._refer)
            if self._own_meter and not self._meter.after:
                self._meter.remove()

    def state_dict(self) -> dict[str, Any]:
        own = self._meter if self._own_meter else None
        return {
            **super().state_dict(),
            "intrinsic": self._intrinsic,
            "unit": self._unit,
            "meter": None if own is None else own.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self._intrinsic, self._unit = state["intrinsic"], state["unit"]
        if self._own_meter and self._meter is not None and state["meter"] is not None:
            self._meter.load_state_dict(state["meter"])
        if self._feed is not None:
            self._feed.forget()
        self._listen()

    # The sketches.

    def _listen(self) -> None:
        """Feed the sketches with the coming update's passes if it is their turn."""
        if self._feed is not None:
            self._feed.due = self.step % self._every == 0

    @torch.no_grad()
    def _sketch(self, feed: Features | Tasks) -> None:
        found = feed.collect()
        sketches = [sketch for shape in self.shapes for sketch in shape.sketches.values()]
        missed = [sketch for sketch in sketches if sketch not in found]
        if self._group is not None:
            nothing = [sketch.basis.new_zeros(sketch.basis.numel() + 2) for sketch in sketches]
            products = [found.get(sketch, none) for sketch, none in zip(sketches, nothing, strict=True)]
            flat = torch.cat(products)
            dist.all_reduce(flat, group=self._group)
            parts = torch.split(flat, [len(part) for part in products])
            found = dict(zip(sketches, parts, strict=True))
            missed = [sketch for sketch in missed if not found[sketch][-1] > 0]
        if isinstance(feed, Features):
            feed.warn(missed)
        for sketch in sketches:
            if sketch in found:
                sketch.update(found[sketch])

    def settle(self) -> None:
        """Finish the update just made: update the sketches with it if they are due, then add the noise."""
        under_way = self._under_way
        if self._feed is not None and self._feed.due:
            if under_way:
                self._sketch(self._feed)
            else:
                self._feed.forget()  # a GradScaler skips this update
        super().settle()
        if under_way:
            self._listen()

    # The temperature.

    def _power(self, place: Place, update: int) -> float:
        if self._mode == "absolute":
            return super()._power(place, update)
        temperature = self.setting("temperature", place.group)
        if not 0 <= temperature < math.inf:
            raise InputError("temperature", temperature, "must be 0 or more, and finite")
        if temperature > 0 and self._meter is None:
            mend = "give meter=exposure(model, optimizer), or mode='absolute', or a schedule from the start"
            raise InputError("temperature", temperature, f"relative to what nobody measures: {mend}")
        return temperature * self._intrinsic / self._unit if self._unit > 0 else 0.0

    def _rate(self, place: Place) -> float:
        if self._mode == "absolute":
            return super()._rate(place)
        return float(self.optimizer.param_groups[place.group]["lr"]) * self._filter(place).total

    def unit(self, place: Place, p: Tensor, ratio: float) -> tuple[float, float]:
        gradient = place.parameter.grad
        if gradient is None or not gradient.any():
            return 0.0, 0.0
        return super().unit(place, p, ratio if self._mode == "absolute" else 1.0)

    def _displace(self, place: Place, noise: Tensor) -> None:
        """As of any injection, but no noise where the gradient is 0 throughout: P may be 1/eps there."""
        gradient = place.parameter.grad
        assert gradient is not None
        super()._displace(place, noise.mul_(gradient.any()))

    def _refer(self) -> None:
        """After a measured update: what relative temperature is relative to, and what unit power injects."""
        meter = self._meter
        assert meter is not None
        channels = {self.channel(place) for place in self.places}
        unit = sum(meter.account.unit(self, channel) for channel in sorted(channels))
        # What is no number (a run that diverges) is nothing to be relative to: the last reading stays.
        if 0 <= meter.trace < math.inf and unit < math.inf:
            self._intrinsic, self._unit = meter.trace, unit


class NAP(AdamW):
    """AdamW with aligned noise, in one optimizer with one state_dict; see `align_noise`.

    optimizer = NAP(model, lr=3e-4, rank=16, temperature=0.5)

    Options of `align_noise` by keyword, every other keyword goes to `torch.optim.AdamW` (`betas`, `eps`,
    `weight_decay`, `fused`, ...). `params`: parameter groups, by default all of the model's parameters. At
    temperature 0 every update is bit-equal to AdamW's. A checkpoint of AdamW can be loaded. `noise` is the
    `Alignment`: `optimizer.noise.task(label)`, `optimizer.noise.remove()`.
    """

    def __init__(
        self, model: nn.Module, lr: float | Tensor = 1e-3, *, params: Any = None, **options: Any
    ) -> None:
        if not isinstance(model, nn.Module):
            mend = "give the model itself, and parameter groups as params="
            raise InputError("model", type(model).__name__, mend)
        names = set(inspect.signature(align_noise).parameters) - {"optimizer", "model"}
        own = {name: options.pop(name) for name in names & set(options)}
        super().__init__(model.parameters() if params is None else params, lr=lr, **options)
        self.noise = align_noise(self, model, **own)

    def state_dict(self) -> dict[str, Any]:
        """AdamW's, and the noise's under "noise"."""
        noise = getattr(self, "noise", None)  # a copy made by copy.deepcopy has no hooks, so no noise
        return super().state_dict() | ({} if noise is None else {"noise": noise.state_dict()})

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over a state of NAP, or of AdamW."""
        own = {name: value for name, value in state_dict.items() if name != "noise"}
        super().load_state_dict(own)
        if "noise" in state_dict and hasattr(self, "noise"):
            self.noise.load_state_dict(state_dict["noise"])


def weights_of(optimizer: Optimizer, model: nn.Module, layers: str) -> list[Weight]:
    """The weights of the optimizer in Linear layers (and Conv1D) that the patterns match, tied ones once.

    Embeddings, norms and biases under a matching pattern are passed over, and with "*" every other layer.
    Raises `InputError` naming a layer of unknown kind with matrices of its own that a narrower pattern
    matches, and a pattern that matches no weight.
    """
    place_of = {place.parameter: place for place in places_of(optimizer, model, "*")}
    found: dict[Tensor, Weight] = {}
    for pattern in layers.split("|"):
        hit = False
        for path, layer in model.named_modules():
            path = path.replace("_orig_mod.", "")
            own = [p for p in layer.parameters(recurse=False) if p in place_of]
            if not own or not matches(f"{path}.weight", pattern):
                continue
            kind = kind_of(layer)
            if kind in ("linear", "conv1d"):
                weight = layer.weight
                if weight not in place_of:
                    continue
                hit = True
                known = found.setdefault(weight, Weight(place_of[weight], path, [], kind == "linear"))
                if layer not in known.layers:
                    known.layers.append(layer)
            elif pattern != "*" and kind is None and any(p.ndim > 1 for p in own):
                name = f"{path} ({type(layer).__name__})"
                raise InputError("layers", name, "is no Linear layer: name in layers= those that are")
        if not hit:
            some = [path for path, layer in model.named_modules() if kind_of(layer) == "linear"][:4]
            mend = f"matches no Linear layer that is trained; there are {', '.join(some)}, ..."
            raise InputError("layers", pattern, mend)
    return list(found.values())


def _shapes(
    weights: list[Weight],
    target: Target,
    structure: Structure | Mapping[str, Structure],
    sketch: Making,
) -> list[Shape]:
    """One shape a weight, and one for all weights whose structure is "joint"."""
    table = {"*": structure} if isinstance(structure, str) else dict(structure)
    for pattern in table:
        if pattern != "*" and not any(matches(weight.place.name, pattern) for weight in weights):
            some = ", ".join(weight.path for weight in weights[:4])
            raise InputError("structure", pattern, f"matches none of the layers: {some}, ...")
    shapes: list[Shape] = []
    joint: list[Weight] = []
    for weight in weights:
        kinds = [kind for pattern, kind in table.items() if matches(weight.place.name, pattern)]
        if not kinds:
            raise InputError("structure", list(table), f"has no pattern for {weight.path}: add '*'")
        if kinds[0] not in get_args(Structure):
            raise InputError("structure", kinds[0], "must be kronecker, vec or joint")
        if kinds[0] == "joint":
            joint.append(weight)
        elif kinds[0] == "vec":
            shapes.append(_whole([weight], target, sketch))
        else:
            shapes.append(_kronecker(weight, target, sketch))
    return [*shapes, _whole(joint, target, sketch)] if joint else shapes


def _kronecker(weight: Weight, target: Target, sketch: Making) -> Kronecker:
    rows, columns = weight.place.parameter.shape
    shape = Kronecker(weight)
    sides = {"left": rows, "right": columns}
    if callable(target):
        other = "left" if weight.inputs_are_columns else "right"
        for name, known in _given(target, weight, "in", "out").items():
            side = weight.input_side if name == "in" else other
            found = _known(f"{weight.path} {name}", known, sides[side], sketch)
            setattr(shape, side, found)
        return shape
    for side, dimension in sides.items():
        if target == "tasks" or side == weight.input_side:
            setattr(shape, side, sketch(dimension, f"{weight.place.name}/{side}"))
    return shape


def _whole(weights: list[Weight], target: Target, sketch: Making) -> Whole:
    names = ", ".join(weight.path for weight in weights)
    dimension = sum(weight.place.parameter.numel() for weight in weights)
    if dimension > LARGEST:
        raise InputError(
            "structure", f"{dimension} coordinates of {names}", f"vec and joint hold at most {LARGEST}"
        )
    if target == "features":
        raise InputError("target", target, "has no covariance over whole weights: take tasks or your own")
    if not callable(target):
        return Whole(weights, sketch(dimension, names + "/whole"))
    parts = [_given(target, weight, "whole")["whole"] for weight in weights]
    _, variances, rest = parts[0]
    if any(not torch.equal(part[1], variances) or part[2] != rest for part in parts):
        raise InputError(
            f"target of {names}", "several S or lam", "weights that share a covariance share both"
        )
    tall = (torch.cat([part[0] for part in parts]), variances, rest)
    return Whole(weights, _known(names, tall, dimension, sketch))


def _given(target: Custom, weight: Weight, *sides: str) -> dict[str, Known]:
    """What the caller's function gives for a layer, by side; one alone is for the first of them."""
    known = target(weight.path, weight.layers[0])
    given = dict(known) if isinstance(known, Mapping) else {sides[0]: known}
    if not given or set(given) - set(sides):
        names = " or ".join(f'"{side}"' for side in sides)
        raise InputError(f"target of {weight.path}", sorted(given), f"must be for {names}")
    for value in given.values():
        if not isinstance(value, tuple) or len(value) != 3:
            raise InputError(f"target of {weight.path}", type(value).__name__, "must be a tuple (U, S, lam)")
    return given


def _known(name: str, known: Known, dimension: int, sketch: Making) -> Sketch:
    """A sketch that holds U diag(S) U' + lam I, whatever the lengths of U's columns."""
    directions, variances, rest = known
    if directions.shape != (dimension, variances.numel()) or variances.ndim != 1:
        shapes = f"U {tuple(directions.shape)}, S {tuple(variances.shape)}"
        raise InputError(f"target of {name}", shapes, f"U must be ({dimension}, r) and S (r,)")
    total = (directions.square() @ variances).sum() + rest * dimension
    if not (variances >= 0).all() or not rest >= 0 or not 0 < total < math.inf:
        mend = "S and lam must be 0 or more, not all 0, and finite"
        raise InputError(f"target of {name}", f"S {variances.tolist()[:4]}, lam {rest}", mend)
    basis, lengths, _ = torch.linalg.svd(directions * variances.sqrt(), full_matrices=False)
    sizes = lengths.square() + rest
    made = sketch(dimension, name, len(lengths))
    trace = sizes.sum() + rest * (dimension - len(sizes))
    state = {"basis": basis, "sizes": sizes, "trace": trace, "count": 1, "skipped": 0, "changed": 0}
    made.load_state_dict(state)
    return made
