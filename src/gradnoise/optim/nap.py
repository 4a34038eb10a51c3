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
from fnmatch import fnmatchcase
from typing import Any, Literal, get_args

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import AdamW, Optimizer

from gradnoise.base.errors import InputError
from gradnoise.noise.capture import kind_of
from gradnoise.noise.exposure import Exposure, exposure, meters_of
from gradnoise.noise.injection import matches, places_of
from gradnoise.noise.sources import Place
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
    r"""Add noise aligned with a target to every later update of the optimizer.

    The optimizer stays what it is (AdamW, Adafactor, SGD, RMSprop: any whose preconditioner can be read); the
    loop stays too. Noise goes into the weights of the Linear layers (and Hugging Face's Conv1D) that `layers`
    matches: glob patterns joined by "|", e.g. "*.attention_out|*.mlp_out".

    - `temperature`: a number or a function of the update (from 1), kept as a float in the parameter groups,
      where schedulers may write it. `mode` "relative": injected over intrinsic exposure, unitless, portable
      over model sizes; read by the `meter` (the one that is attached, else one of its own, every 100
      updates), so before its first reading nothing is injected. "absolute": T itself, in units of the loss.
    - `alignment`: from 0 (isotropic) to 1, likewise; the trace, so the power, stays what it is.
    - `target`: "features", "tasks" (see `optim.targets`), or a function of (layer's name, layer) giving
      (U, S, lam) of the input side, or a mapping of "in", "out" or "whole" to that.
    - `structure`: "kronecker"; "vec": one covariance over all coordinates of a weight; "joint": one over all
      coordinates of all its weights, across layers. The latter two need target "tasks" or your own, and at
      most 100000 coordinates. A mapping from pattern to structure mixes them, e.g.
      {"head": "vec", "*": "kronecker"}.
    - `rank` r: memory is r (inputs + outputs) numbers a matrix. `explained` below 1: r is the most, and
      adapts to keep that share of the trace. `sketch_every`: updates between two of the sketch; `half_life`
      in its updates. `spectrum` "reversed" and "random" are controls of equal power.
    - `limit`: P counts at most this times that of a coordinate whose 1/P is its tensor's root mean square.
      Under Adam the P of a coordinate that gets no gradient is 1/eps = 1e8, and all noise would go there.
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
        if mode not in get_args(Mode):
            raise InputError("mode", mode, "must be relative or absolute")
        if not limit > 0:
            raise InputError("limit", limit, "must be above 0")
        if sketch_every < 1:
            raise InputError("sketch_every", sketch_every, "must be at least 1 update")
        if not callable(target) and target not in ("features", "tasks"):
            raise InputError("target", target, "must be features, tasks or a function of (name, layer)")
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
        self._feed: Features | Tasks | None = None
        if target == "features":
            self._feed = Features(self.shapes)
        elif target == "tasks":
            self._feed = Tasks(self.shapes)
        # Of the last measured update: Tr(P C/B P), and Tr(P Sigma P) of what is injected.
        self._intrinsic, self._unit = 0.0, 0.0
        names = {weight.place.name for weight in weights}
        source = Shaped(self.shapes, lambda group: self.setting("alignment", group))
        settings = {"temperature": temperature, "alignment": alignment}
        super().__init__(optimizer, source, settings, model=self._model, seed=seed, limit=limit)
        self.places = [place for place in self.places if place.name in names]
        self._meter, self._own_meter = meter, False
        if mode == "relative" and meter is None and (callable(temperature) or temperature > 0):
            attached = meters_of(optimizer)
            self._own_meter = not attached
            self._meter = attached[0] if attached else exposure(model, optimizer, EVERY)
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
            if self._own_meter:
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
        self._listen()

    # The sketches.

    def _listen(self) -> None:
        """Feed the sketches with the coming update's passes if it is their turn."""
        if self._feed is not None:
            self._feed.due = self.step % self._every == 0

    def _before(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        super()._before(optimizer, args, kwargs)
        if self._under_way and self._feed is not None and self._feed.due:
            self._sketch(self._feed)

    @torch.no_grad()
    def _sketch(self, feed: Features | Tasks) -> None:
        found = feed.collect()
        sketches = [sketch for shape in self.shapes for sketch in shape.sketches.values()]
        if self._group is not None:
            size = torch.zeros
            products = [found.get(s, size(s.basis.numel() + 2).to(s.basis)) for s in sketches]
            flat = torch.cat(products)
            dist.all_reduce(flat, group=self._group)
            parts = torch.split(flat, [len(part) for part in products])
            found = dict(zip(sketches, parts, strict=True))
        for sketch in sketches:
            if sketch in found:
                sketch.update(found[sketch])

    def settle(self) -> None:
        under_way = self._under_way
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
        return super().unit(place, p, ratio if self._mode == "absolute" else 1.0)

    def _refer(self) -> None:
        """After a measured update: what relative temperature is relative to, and what unit power injects."""
        meter = self._meter
        assert meter is not None
        channels = {self.channel(place) for place in self.places}
        self._intrinsic = meter.trace
        self._unit = sum(meter.unit(self, channel) for channel in sorted(channels))


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
        if "noise" in state_dict:
            self.noise.load_state_dict(state_dict["noise"])


def weights_of(optimizer: Optimizer, model: nn.Module, layers: str) -> list[Weight]:
    """The weights of the optimizer in Linear layers (and Conv1D) that the patterns match.

    Embeddings, norms and biases under a matching pattern are passed over. Raises `InputError` naming a
    matched layer of another kind that has parameters of its own, and a pattern that matches no weight.
    """
    place_of = {place.parameter: place for place in places_of(optimizer, model, "*")}
    found: dict[Tensor, Weight] = {}
    for pattern in layers.split("|"):
        before = len(found)
        hit = False
        for path, layer in model.named_modules():
            path = path.replace("_orig_mod.", "")
            own = [p for p in layer.parameters(recurse=False) if p in place_of]
            if not own or not (matches(f"{path}.weight", pattern) or fnmatchcase(path, pattern)):
                continue
            kind = kind_of(layer)
            if kind in ("linear", "conv1d"):
                hit = True
                weight = layer.weight
                if weight in place_of and weight not in found:
                    found[weight] = Weight(place_of[weight], path, layer, kind == "linear")
            elif kind is None and any(p.ndim > 1 for p in own):
                name = f"{path} ({type(layer).__name__})"
                raise InputError("layers", name, "is no Linear layer: name in layers= those that are")
        if not hit and len(found) == before:
            some = [path for path, layer in model.named_modules() if kind_of(layer) == "linear"][:4]
            raise InputError("layers", pattern, f"matches no Linear layer; there are {', '.join(some)}, ...")
    return list(found.values())


def _shapes(
    weights: list[Weight],
    target: Target,
    structure: Structure | Mapping[str, Structure],
    sketch: Making,
) -> list[Shape]:
    """One shape a weight, and one for all weights whose structure is "joint"."""
    table = {"*": structure} if isinstance(structure, str) else dict(structure)
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
        given = target(weight.path, weight.layer)
        given = given if isinstance(given, Mapping) else {"in": given}
        if not given or set(given) - {"in", "out"}:
            raise InputError(f"target of {weight.path}", sorted(given), 'must name "in", "out" or both')
        other = "left" if weight.inputs_are_columns else "right"
        for name, known in given.items():
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
    given = [target(weight.path, weight.layer) for weight in weights]
    parts = [known["whole"] if isinstance(known, Mapping) else known for known in given]
    tall = (torch.cat([directions for directions, _, _ in parts]), parts[0][1], parts[0][2])
    return Whole(weights, _known(names, tall, dimension, sketch))


def _known(name: str, known: Known, dimension: int, sketch: Making) -> Sketch:
    """A sketch that holds U diag(S) U' + lam I, whatever the lengths of U's columns."""
    directions, variances, rest = known
    if directions.shape != (dimension, len(variances)):
        shapes = f"U {tuple(directions.shape)}, S {tuple(variances.shape)}"
        raise InputError(f"target of {name}", shapes, f"U must be ({dimension}, r) and S (r,)")
    if (variances < 0).any() or not rest >= 0:
        raise InputError(f"target of {name}", "a negative variance", "S and lam must be 0 or more")
    basis, lengths, _ = torch.linalg.svd(directions * variances.sqrt(), full_matrices=False)
    sizes = lengths.square() + rest
    made = sketch(dimension, name, len(lengths))
    trace = sizes.sum() + rest * (dimension - len(sizes))
    state = {"basis": basis, "sizes": sizes, "trace": trace, "count": 1, "skipped": 0, "changed": 0}
    made.load_state_dict(state)
    return made
