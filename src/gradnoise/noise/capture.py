"""Per-example gradients from a run's own forward and backward pass, without another pass.

Hooks keep what each layer saw (its input a) and what came back (the gradient at its output), for some of the
batch's examples. Once the optimizer has stepped and P is known, each tensor's per-example gradient is formed
piece by piece, used, and dropped. No layer is replaced.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch._C import _current_graph_task_id
from torch._C._functorch import peek_interpreter_stack

from gradnoise.base.errors import InputError

# Coordinates of per-example gradients formed at once: small enough to stay in a processor's cache.
PIECE = 1 << 19
SUPPORTED = "Linear, LayerNorm, RMSNorm, Embedding"
MEND = "accumulate micro-batches (estimator='micro') or take estimator='hutchinson'"


@dataclass
class Call:
    """One use of a layer: input and output gradient of the first examples, (b, ...) each."""

    layer: nn.Module
    role: str
    seen: Tensor
    back: Tensor | None = None
    # Of a table: the rows that the whole batch looked up. The number of the backward pass.
    looked_up: Tensor | None = None
    task: int = -1


@dataclass
class Source:
    """What made a parameter's gradient: the calls of its layer or layers (a tied weight has several)."""

    parameter: Tensor
    calls: list[Call] = field(default_factory=list)


def kind_of(layer: nn.Module) -> str | None:
    """linear, conv1d (Hugging Face's transposed linear), layer_norm, rms_norm, embedding; None if unknown."""
    if isinstance(layer, nn.Linear):
        return "linear"
    if isinstance(layer, nn.LayerNorm):
        return "layer_norm"
    if isinstance(layer, nn.Embedding):
        plain = layer.max_norm is None and not layer.scale_grad_by_freq and not layer.sparse
        return "embedding" if plain else None
    own = dict(layer.named_parameters(recurse=False))
    if isinstance(layer, nn.RMSNorm) or (type(layer).__name__.endswith("RMSNorm") and set(own) == {"weight"}):
        return "rms_norm"
    if type(layer).__name__ == "Conv1D" and set(own) == {"weight", "bias"} and own["weight"].ndim == 2:
        return "conv1d"
    return None


def unsupported(model: nn.Module, parameters: set[Tensor]) -> list[str]:
    """Names of layers that own some of the parameters and whose per-example gradients are not known."""
    found = []
    for name, layer in model.named_modules():
        own = [p for p in layer.parameters(recurse=False) if p in parameters]
        if own and kind_of(layer) is None:
            found.append(f"{name or 'the model'} ({type(layer).__name__})")
    return found


def heard() -> bool:
    """Whether a backward() may follow a forward pass made now: gradients are on, no function transform."""
    return torch.is_grad_enabled() and peek_interpreter_stack() is None


class Capture:
    """Hooks on the layers that own `parameters`; `examples`: how many of the batch's first examples to keep.

    `calls` are in the order of the backward pass. What cannot be captured is a `fault`, for whoever needs it.
    """

    def __init__(self, model: nn.Module, parameters: set[Tensor], examples: int | None) -> None:
        self._parameters, self.examples = parameters, examples
        # Of the forward pass under way, told by whoever sees the model's inputs: examples, whether tokens
        # have a dimension of their own and how long it is, and inputs of one dimension.
        self.batch, self.has_tokens, self.length = 0, True, 0
        self.given: list[Tensor] = []
        self.calls: list[Call] = []
        self.fault: InputError | None = None
        self._handles: list[Any] = []
        missing = unsupported(model, parameters)
        if missing:
            self.fault = InputError(
                "estimator example", ", ".join(missing), f"is not one of {SUPPORTED}: {MEND}"
            )
            return
        self._handles = [
            layer.register_forward_hook(self._forward)
            for layer in model.modules()
            if any(p in parameters for p in layer.parameters(recurse=False))
        ]

    def remove(self) -> None:
        """Detach every hook and drop what was kept."""
        self.stop()
        self.calls = []

    def stop(self) -> None:
        """Detach every hook; what was kept stays."""
        for handle in self._handles:
            handle.remove()
        self._handles, self.given = [], []

    def keep(self, task: int) -> None:
        """Drop what other backward passes than this one left."""
        self.calls = [call for call in self.calls if call.task == task]

    def _forward(self, layer: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> Tensor | None:
        if self.fault is not None or not (heard() and output.requires_grad):
            return None
        seen, replaced = inputs[0], None
        kind = str(kind_of(layer))
        looked_up = seen.detach() if kind == "embedding" else None
        if kind == "embedding" and self.batch > 1 and self._is_shared(layer, seen):
            # Position ids of shape (1, T) or (T,) serve every example. Expanded here, the gradient that comes
            # back is still one per example; summing it is then done by expand's backward instead of by
            # broadcasting's.
            rows = seen if seen.ndim > 1 else seen[None]
            seen = rows.expand(self.batch, *rows.shape[1:]).contiguous()
            wide = output if output.ndim == rows.ndim + 1 else output[None]
            replaced = output = wide.expand(self.batch, *rows.shape[1:], -1)
        elif kind == "embedding" and seen.ndim == 1 and self.has_tokens and self.batch == 1 < len(seen):
            seen = seen[None]
        if self.fault is not None:
            return None
        if len(seen) != self.batch:
            name = f"layer {type(layer).__name__}"
            mend = f"must be the batch's {self.batch} examples: {MEND}"
            self.fault = InputError(name, f"leading dimension {len(seen)}", mend)
            return None
        call = Call(layer, kind, self._kept(seen.detach()), looked_up=looked_up)
        output.register_hook(lambda gradient: self._backward(call, gradient))  # type: ignore[no-untyped-call]
        return replaced

    def _is_shared(self, layer: nn.Module, ids: Tensor) -> bool:
        """Whether ids serve every example, as positions do: (1, T) or (T,); classes of examples are (B,)."""
        if ids.ndim != 1 or not self.has_tokens:
            return ids.ndim > 1 and len(ids) == 1
        if len(ids) != self.batch or self.length != self.batch:
            return len(ids) != self.batch
        # As many examples as tokens: positions count up and are made by the model, classes are its input.
        counts_up, given = bool((ids.diff() == 1).all()), any(torch.equal(ids, v) for v in self.given)
        if counts_up == given:
            self.fault = InputError(
                f"layer {type(layer).__name__}",
                f"ids of shape ({len(ids)},)",
                f"may be positions or classes of {self.batch} examples: give positions as (1, T), or {MEND}",
            )
        return counts_up

    def _kept(self, rows: Tensor) -> Tensor:
        if self.examples is None or self.examples >= len(rows):
            return rows
        return rows[: self.examples].clone()  # a view would keep the whole batch alive

    def _backward(self, call: Call, gradient: Tensor) -> None:
        if not self._handles:  # removed since the forward pass
            return
        rows = gradient.detach()
        call.back = self._kept(
            rows.reshape(self.batch, -1, rows.shape[-1]) if len(rows) != self.batch else rows
        )
        call.task = _current_graph_task_id()
        self.calls.append(call)

    def sources(self) -> Iterator[Source]:
        """What made each parameter's gradient, in the order of first use in the backward pass."""
        found: dict[Tensor, Source] = {}
        for call in self.calls:
            for parameter in call.layer.parameters(recurse=False):
                if parameter in self._parameters:
                    found.setdefault(parameter, Source(parameter)).calls.append(call)
        yield from found.values()


Take = Callable[[Tensor], Tensor]
Put = Callable[[Tensor, Tensor], None]


def is_table(source: Source) -> bool:
    """Whether embedding layers alone made the gradient: it is 0 but for the rows that were looked up."""
    return all(call.role == "embedding" for call in source.calls)


def visit(
    source: Source, do: Callable[[Tensor, Take, Put], None], scale: float = 1.0, centre: Tensor | None = None
) -> None:
    """Call do(G, take, put) for pieces of the per-example gradients; of a table, its touched rows only.

    G (b, coordinates) is times `scale` less `centre` (flat, of the parameter's size). `take(flat)` gives the
    same coordinates of a flat tensor of that size, and `put(flat, values)` writes them.
    """
    parameter = source.parameter
    width = parameter[0].numel() if parameter.ndim > 1 else 1
    examples, length = len(source.calls[0].seen), len(parameter)
    dtype = torch.promote_types(parameter.dtype, torch.float32)
    step = max(1, PIECE // (examples * width))
    touched = None
    if is_table(source):
        touched = torch.unique(torch.cat([call.seen.flatten() for call in source.calls]))
        length = len(touched)
    for first in range(0, length, step):
        last = min(first + step, length)
        rows = slice(first, last) if touched is None else touched[first:last]

        def take(flat: Tensor, rows: slice | Tensor = rows) -> Tensor:
            return flat.view(len(parameter), -1)[rows].flatten()

        def put(flat: Tensor, values: Tensor, rows: slice | Tensor = rows) -> None:
            flat.view(len(parameter), -1)[rows] = values.view(-1, width)

        start = None if centre is None else take(centre).view(-1, *parameter.shape[1:])
        piece = _piece(source.calls[0], parameter, rows, dtype, scale, start)
        for call in source.calls[1:]:
            piece = piece + _piece(call, parameter, rows, dtype, scale, None)
        do(piece.reshape(examples, -1), take, put)


def _tokens(call: Call, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Ids (b, T) and output gradients (b, T, width) of an embedding call, 0 at the padding row."""
    assert call.back is not None
    ids = call.seen.reshape(len(call.seen), -1)
    back = call.back.reshape(*ids.shape, -1).to(dtype)
    padding = call.layer.padding_idx
    return ids, back if padding is None else back * (ids != cast(int, padding)).unsqueeze(-1)


def _piece(
    call: Call,
    parameter: Tensor,
    rows: slice | Tensor,
    dtype: torch.dtype,
    scale: float,
    centre: Tensor | None,
) -> Tensor:
    """Some rows of the parameter's gradient by one call, for each example, as in `visit`: (b, rows, ...)."""
    layer, kind = call.layer, call.role
    assert call.back is not None
    if kind in ("linear", "conv1d") and parameter is not getattr(layer, "bias", None):
        left, right = _flat(call.back, 1, dtype), _flat(call.seen, 1, dtype)
        if kind == "conv1d":
            left, right = right, left
        left = left[..., rows].transpose(1, 2)
        if centre is not None:  # in one go with the product
            return torch.baddbmm(centre, left, right, beta=-1, alpha=scale)
        piece = left @ right
    elif kind == "embedding":
        piece = _looked_up(call, rows, dtype)
    elif parameter is getattr(layer, "bias", None):
        piece = _flat(call.back, _output_dims(layer, kind), dtype)[..., rows].sum(1)
    else:
        normal = _normalised(call, dtype)
        piece = (normal * call.back.to(dtype).view_as(normal))[:, :, rows].sum(1)
    piece = piece if scale == 1.0 else piece * scale
    return piece if centre is None else piece - centre


def _looked_up(call: Call, rows: slice | Tensor, dtype: torch.dtype) -> Tensor:
    ids, back = _tokens(call, dtype)
    wanted = torch.arange(rows.start, rows.stop, device=ids.device) if isinstance(rows, slice) else rows
    place = torch.searchsorted(wanted, ids.contiguous()).clamp_max(len(wanted) - 1)
    example, token = (wanted[place] == ids).nonzero(as_tuple=True)
    piece = torch.zeros(len(ids), len(wanted), back.shape[-1], dtype=dtype, device=back.device)
    return piece.index_put_((example, place[example, token]), back[example, token], accumulate=True)


def _normalised(call: Call, dtype: torch.dtype) -> Tensor:
    """(b, everything between, *gain): the input as normalised, before the gain."""
    layer, shape = call.layer, _shape(call.layer)
    seen = call.seen.to(dtype).reshape(len(call.seen), -1, *shape)
    if call.role == "layer_norm":
        return nn.functional.layer_norm(seen, shape, eps=cast(float, layer.eps))
    epsilon = getattr(layer, "eps", None)
    epsilon = getattr(layer, "variance_epsilon", None) if epsilon is None else epsilon
    return nn.functional.rms_norm(seen, shape, eps=epsilon)


def _shape(layer: nn.Module) -> list[int]:
    return list(cast(Tensor, layer.weight).shape)


def _flat(values: Tensor, dims: int, dtype: torch.dtype) -> Tensor:
    """(b, everything between, last `dims` dimensions), at least one row between."""
    return values.reshape(len(values), -1, *values.shape[values.ndim - dims :]).to(dtype)


def _output_dims(layer: nn.Module, kind: str) -> int:
    """How many last dimensions of the output the bias spans."""
    return len(_shape(layer)) if kind in ("layer_norm", "rms_norm") else 1


def factors(call: Call, parameter: Tensor) -> tuple[Tensor, Tensor, int]:
    """What K-FAC multiplies: sums over tokens of squared inputs and squared scores, and the tokens.

    For a gain both have its width; a bias has inputs of 1; an embedding has one-hot ones.
    """
    dtype = torch.promote_types(parameter.dtype, torch.float32)
    if call.role == "embedding":
        ids, back = _tokens(call, dtype)
        counts = torch.bincount(ids.flatten(), minlength=len(parameter))
        if call.layer.padding_idx is not None:
            counts[cast(int, call.layer.padding_idx)] = 0  # never trained: P there is 1/eps
        return counts.double(), _squares(back.flatten(0, 1)), ids.numel()
    assert call.back is not None
    back = _flat(call.back, _output_dims(call.layer, call.role), dtype).flatten(0, 1).flatten(1)
    if parameter is getattr(call.layer, "bias", None):
        return (
            torch.full((back.shape[1],), float(len(back)), device=back.device).double(),
            _squares(back),
            len(back),
        )
    seen = (
        _flat(call.seen, 1, dtype).flatten(0, 1)
        if call.role in ("linear", "conv1d")
        else _normalised(call, dtype).flatten(0, 1).flatten(1)
    )
    return _squares(seen), _squares(back), len(back)


def _squares(rows: Tensor) -> Tensor:
    return rows.double().square().sum(0)
