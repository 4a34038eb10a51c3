"""From what hooks recorded of one update to its `Statistics`.

Contributions are handled in pieces of some coordinates, small enough for a processor's cache: their distances
d_r = h_r - w_r g from the batch's gradient, P there, and what both add to the sums.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor

from gradnoise.base.errors import InputError
from gradnoise.noise.capture import MEND, Capture, Put, Source, Take, is_table, visit
from gradnoise.noise.estimators import Statistics
from gradnoise.noise.preconditioners import Preconditioner
from gradnoise.noise.update import ROUNDING, Member, Rows, Update, wide

# Numbers in a piece of R contributions.
PIECE = 1 << 19
# Injected noise and the diagonal of its covariance, at the same coordinates.
Injected = tuple[Tensor, Tensor]
# Inner products between contributions cost R products a coordinate: of more than MANY, only FEW are compared.
MANY, FEW = 16, 8


class _Sums:
    """What the pieces of one process add up to: of n tensors and its R contributions."""

    def __init__(self, update: Update, shares: Tensor) -> None:
        device, tensors = update.members[0].parameter.device, len(update.members)
        self.update, self.shares = update, shares
        self.few = len(shares) if len(shares) <= MANY else FEW
        self.within = (shares * (1 - shares)).sum().item()

        def zeros(*shape: int) -> Tensor:
            return torch.zeros(*shape, dtype=torch.float64, device=device)

        self.pcp, self.c = zeros(tensors, len(shares)), zeros(tensors, len(shares))
        self.signal_pcp, self.signal_c, self.trace_p = zeros(tensors), zeros(tensors), zeros(tensors)
        self.inner = zeros(2, self.few)
        self.gram = zeros(self.few, self.few)
        self.extra = [0.0, 0.0]
        self.sample: list[Tensor] = []
        self.sketch: Tensor | None = None
        self._done = 0

    def absorb(
        self, places: list[tuple[int, int]], distances: Tensor, squares: Tensor, gradient: Tensor, p: Tensor
    ) -> None:
        """Add a piece: `places`: (tensor, coordinates) end to end; d and d^2 (R, m), gradient and P (m,)."""
        weighted = distances[: self.few] * p
        weights, strong = p.square(), gradient * p
        first = 0
        for tensor, size in places:
            span = slice(first, first + size)
            first += size
            self.pcp[tensor] += squares[:, span] @ weights[span]
            self.c[tensor] += squares[:, span].sum(1)
            self.signal_pcp[tensor] += strong[span] @ strong[span]
            self.signal_c[tensor] += gradient[span] @ gradient[span]
            self.trace_p[tensor] += p[span].sum()
        self.inner[0] += weighted @ strong
        self.inner[1] += distances[: self.few] @ gradient
        self.gram += weighted @ weighted.T
        if self.update.sample_every:
            self.sample.append(distances[:, :: self.update.sample_every])
        if self.update.sketch is not None:
            part = self.update.sketch.project(distances * p, self._done)
            self.sketch = part if self.sketch is None else self.sketch + part
        self._done += distances.shape[1]

    def untouched(self, tensor: int, gradient: Tensor, p: Tensor) -> None:
        """Add coordinates that no contribution here touched: there d_r = -w_r g."""
        sums = torch.stack([(gradient * p).square(), gradient.square(), p]).sum(1, dtype=torch.float64)
        shares = self.shares.to(sums)
        self.pcp[tensor] += shares.square() * sums[0]
        self.c[tensor] += shares.square() * sums[1]
        self.signal_pcp[tensor] += sums[0]
        self.signal_c[tensor] += sums[1]
        self.trace_p[tensor] += sums[2]
        some = shares[: self.few]
        self.inner -= some * sums[:2, None]
        self.gram += some[:, None] * some * sums[0]

    def statistics(self) -> Statistics:
        """Join all processes' contributions; only scalars cross the network."""
        update, count = self.update, len(self.pcp)
        shares = self.shares.to(self.pcp)
        joined = torch.cat(update.gathered(torch.cat([self.pcp, self.c, shares[None]])), 1).cpu()
        inner = torch.cat(update.gathered(self.inner), 1).cpu()
        # The batch's, so the same for all but for the order of summation: all take the first process's.
        totals = update.gathered(torch.stack([self.signal_pcp, self.signal_c, self.trace_p]))[0].cpu()
        extra = torch.stack(update.gathered(torch.tensor(self.extra).to(self.pcp))).mean(0).tolist()
        chosen = [r * len(shares) + n for r in range(update.world) for n in range(self.few)]
        ratio = [update.filter(member).total for member in update.members]
        return Statistics(
            shares=joined[-1],
            pcp=joined[:count],
            c=joined[count : 2 * count],
            signal_pcp=totals[0],
            signal_c=totals[1],
            inner_pcp=inner[0],
            inner_c=inner[1],
            few=None if self.few == len(shares) else torch.tensor(chosen),
            grams=tuple(gram.cpu() for gram in update.gathered(self.gram)),
            trace_p=totals[2],
            ratio=torch.tensor(ratio, dtype=torch.float64),
            probe_variance=(extra[0], extra[1]),
            sample=torch.cat(self.sample, 1).cpu() if self.sample else None,
            sketch=None if self.sketch is None else torch.cat(update.gathered(self.sketch)),
        )


@dataclass(frozen=True)
class _Stretch:
    """Some kept coordinates of a member, from `first` to before `last`."""

    tensor: int
    member: Member
    first: int
    last: int

    def of(self, kept: Tensor) -> Tensor:
        """Of a flat tensor of the kept coordinates, those of the stretch."""
        return kept if self.last - self.first == len(kept) else kept[self.first : self.last]

    def take(self, flat: Tensor) -> Tensor:
        """The stretch's coordinates of a flat tensor of the whole parameter."""
        if self.member.index is None:
            return self.of(flat)
        return flat[self.member.index[self.first : self.last]]


def _pieces(members: Sequence[Member], limit: int) -> Iterator[list[_Stretch]]:
    """Stretches end to end, of one device and dtype, together up to `limit` coordinates."""
    piece: list[_Stretch] = []
    room, kind = limit, None
    for tensor, member in enumerate(members):
        own = member.parameter.device, member.parameter.dtype
        first = 0
        while first < member.kept:
            if piece and (room == 0 or own != kind):
                yield piece
                piece, room = [], limit
            last = min(member.kept, first + room)
            piece.append(_Stretch(tensor, member, first, last))
            kind, room, first = own, room - (last - first), last
    if piece:
        yield piece


def from_rows(update: Update, rows: Rows, shares: Tensor) -> Statistics:
    """Statistics from whole contributions.

    `shares` (R,), float64: w_r of this process's contributions in the batch of all processes.
    """
    sums = _Sums(update, shares)
    readers = {m.parameter: update.preconditioner(m) for m in update.members}
    whole = {
        m.parameter: _whole(update, readers[m.parameter], m, rows, shares)
        for m in update.members
        if not readers[m.parameter].elementwise
    }
    for piece in _pieces(update.members, max(1, PIECE // len(shares))):
        distances, gradient = _distances(update, piece, rows, shares)
        squares = distances.square()
        injected = _injected(update, piece) if update.injected else None
        fed = _added(update, squares, gradient, sums.within, injected) if update.expected else None
        p = torch.cat(_read(update, piece, readers, whole, fed))
        if update.squares is not None:
            _leave(update.squares, piece, squares)
        if any(stretch.member.index is not None for stretch in piece):
            distances, squares, gradient = _scaled(sums, piece, distances, gradient, p)
        sums.absorb([(s.tensor, s.last - s.first) for s in piece], distances, squares, gradient, p)
    for tensor, member in enumerate(update.members):
        sums.trace_p[tensor] *= member.scale
    return sums.statistics()


def principal(
    update: Update, rows: Rows, shares: Tensor, p: dict[str, Tensor], rank: int, scale: float
) -> dict[str, Tensor]:
    """Rows f_k (rank, coordinates) by name: the contributions' largest directions in the metric of P.

    With the Gram matrix G of P d_r and its eigenvectors v_k, f_k = scale sum_r v_kr d_r; all k together make
    scale^2 sum_r d_r d_r'. Fewer than `rank` rows where there are fewer contributions.
    """
    distances = {
        m.name: _distances(update, [_Stretch(n, m, 0, m.kept)], rows, shares)[0]
        for n, m in enumerate(update.members)
    }
    gram = torch.zeros(len(shares), len(shares), dtype=torch.float64)
    for name, found in distances.items():
        weighted = found * p[name]
        gram += (weighted @ weighted.T).double().cpu()
    # Gradients that diverged have no eigenvectors; the nan in their distances make the result nan.
    vectors = torch.linalg.eigh(gram.nan_to_num(0.0, 0.0, 0.0)).eigenvectors.flip(1)[:, :rank].T * scale
    return {name: vectors.to(found) @ found for name, found in distances.items()}


def _distances(update: Update, piece: list[_Stretch], rows: Rows, shares: Tensor) -> tuple[Tensor, Tensor]:
    """d_r = h_r - w_r g, (R, m), and g (m,), unscaled and before clipping."""
    parameter = piece[0].member.parameter
    dtype = wide(parameter)
    distances = torch.empty(
        len(shares), sum(s.last - s.first for s in piece), dtype=dtype, device=parameter.device
    )
    first = 0
    for stretch in piece:
        span = slice(first, first + stretch.last - stretch.first)
        first = span.stop
        for r, row in enumerate(rows[stretch.member.name]):
            distances[r, span] = stretch.of(row)
    if update.unscale != 1.0:
        distances *= update.unscale
    if update.world == 1:
        gradient = distances.sum(0)
    else:
        gradient = torch.cat([s.take(update.gradient(s.member, dtype)) for s in piece])
    return distances.addr_(shares.to(gradient), gradient, alpha=-1), gradient


def _injected(update: Update, piece: list[_Stretch]) -> Injected:
    """Injected noise and its variance at the piece's coordinates, 0 where none is."""
    parts = []
    for stretch in piece:
        parameter = stretch.member.parameter
        found = update.injected.get(parameter)
        none = torch.zeros(stretch.last - stretch.first, dtype=wide(parameter), device=parameter.device)
        parts.append((none, none) if found is None else (stretch.take(found[0]), stretch.take(found[1])))
    noise, variance = zip(*parts, strict=True)
    return torch.cat(noise), torch.cat(variance)


def _leave(kept: dict[Tensor, Tensor], piece: list[_Stretch], squares: Tensor) -> None:
    """Leave sum_r d_r^2 of whole parameters."""
    total, first = squares.sum(0), 0
    for stretch in piece:
        parameter = stretch.member.parameter
        last = first + stretch.last - stretch.first
        if stretch.member.index is None:
            flat = kept.setdefault(parameter, torch.zeros_like(parameter, dtype=total.dtype).flatten())
            flat[stretch.first : stretch.last] = total[first:last]
        first = last


def _added(
    update: Update, squares: Tensor, gradient: Tensor, within: float, injected: Injected | None = None
) -> Tensor:
    """`_added_all` from this process's d_r^2 (R, m)."""
    ones = torch.ones(len(squares), dtype=squares.dtype, device=squares.device)
    return _added_all(update, ones @ squares, gradient, within, injected)


def _added_all(
    update: Update,
    squares: Tensor,
    gradient: Tensor | None,
    within: float,
    injected: Injected | None = None,
) -> Tensor:
    """What "expected" adds to the square g^2 that the second moment was fed: max(0, C/B - g^2).

    Where the second moment is a mean over rows and columns (no `gradient`): C/B. Its diagonal is
    sum_r d_r^2 / sum_r w_r (1 - w_r) over all processes; `squares`: this one's sum_r d_r^2. What was injected
    into the gradient is in both: (g + n)^2, and C/B + N. Every process must call this alike.
    """
    if update.world > 1:
        both = update.total(torch.cat([squares, torch.full_like(squares[:1], within)]))
        squares, within = both[:-1], both[-1].item()
    noise = squares * (update.clip**2 / within)
    if injected is not None:
        noise += injected[1]
        gradient = None if gradient is None else gradient * update.clip + injected[0]
    if gradient is not None:
        weight = update.clip**2 if injected is None else 1.0
        noise.addcmul_(gradient, gradient, value=-weight).clamp_min_(0)
    return noise


def _read(
    update: Update,
    piece: list[_Stretch],
    readers: dict[Tensor, Preconditioner],
    whole: dict[Tensor, Tensor],
    fed: Tensor | None,
) -> list[Tensor]:
    """P of each stretch."""
    found, first = [], 0
    for stretch in piece:
        parameter = stretch.member.parameter
        last = first + stretch.last - stretch.first
        if parameter in whole:
            p = stretch.take(whole[parameter])
        else:
            p = readers[parameter](None if fed is None else fed[first:last], stretch.take)
        if update.kept is not None and stretch.member.index is None:
            kept = update.kept.setdefault(parameter, torch.empty_like(parameter, dtype=p.dtype).flatten())
            kept[stretch.first : stretch.last] = p
        found.append(p)
        first = last
    return found


def _whole(update: Update, reader: Preconditioner, member: Member, rows: Rows, shares: Tensor) -> Tensor:
    """P of a parameter whose optimizer mixes coordinates; sampled ones do not show all's variance."""
    fed = None
    if update.expected and member.index is None:
        piece = [_Stretch(0, member, 0, member.kept)]
        distances, _ = _distances(update, piece, rows, shares)
        within = (shares * (1 - shares)).sum().item()
        injected = _injected(update, piece) if update.injected else None
        fed = _added_all(update, distances.square().sum(0), None, within, injected)
    return reader(fed)


def _scaled(
    sums: _Sums, piece: list[_Stretch], distances: Tensor, gradient: Tensor, p: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Kept coordinates weighted so that sums of squares are those of whole tensors.

    What looking at some coordinates only (drawn without replacement) adds to the variance goes into `extra`.
    """
    scales = torch.cat([torch.full((s.last - s.first,), s.member.scale) for s in piece]).to(gradient)
    distances, gradient = distances * scales.sqrt(), gradient * scales.sqrt()
    squares = distances.square()
    terms = squares.sum(0, dtype=torch.float64) / sums.within
    first = 0
    for stretch in piece:
        span = slice(first, first + stretch.last - stretch.first)
        first = span.stop
        if stretch.member.index is not None and span.stop - span.start > 1:
            left = (1 - 1 / stretch.member.scale) * (span.stop - span.start)
            sums.extra[0] += left * (terms[span] * p[span].double().square()).var().item()
            sums.extra[1] += left * terms[span].var().item()
    return distances, squares, gradient


def from_examples(update: Update, capture: Capture, shares: Tensor, whole: bool = False) -> Statistics:
    """Statistics from per-example gradients that hooks captured, formed and dropped piece by piece.

    `shares` (b,), float64: of the examples kept. `whole`: the update has no other backward pass than the
    captured one. Raises `InputError` naming a parameter whose gradient then comes from elsewhere too.
    """
    by_parameter = {source.parameter: source for source in capture.sources()}
    sums = _Sums(update, shares)
    complete = whole and abs(shares.sum().item() - 1) < 1e-9
    for tensor, member in enumerate(update.members):
        source = by_parameter.get(member.parameter)
        if whole:
            _check_source(update, member, source)
        _Examples(sums, tensor, member, source, complete).add()
    return sums.statistics()


class _Examples:
    """The per-example gradients of one parameter. `complete`: these are all, so their distances sum to 0."""

    def __init__(
        self, sums: _Sums, tensor: int, member: Member, source: Source | None, complete: bool
    ) -> None:
        update = sums.update
        self.sums, self.tensor, self.member, self.source = sums, tensor, member, source
        self.gradient = update.gradient(member, wide(member.parameter))
        self.reader = update.preconditioner(member)
        self.weights = sums.shares.to(self.gradient)
        # Equal shares are subtracted while gradients are formed.
        self.centre = self.gradient * self.weights[0] if bool((sums.shares == sums.shares[0]).all()) else None
        self.unchecked = complete

    def add(self) -> None:
        """Add all of the parameter's coordinates to the sums."""
        update = self.sums.update
        self.whole = None
        if update.expected and (update.world > 1 or not self.reader.elementwise):
            # The whole parameter's at once: the rows that were looked up differ between processes.
            self.spread = self.weights.square().sum() * self.gradient.square()
            if self.source is not None:
                visit(self.source, self._fill, update.unscale, self.centre)
            part = self.gradient if self.reader.elementwise else None
            injected = update.injected.get(self.member.parameter)
            self.whole = self.reader(_added_all(update, self.spread, part, self.sums.within, injected))
        elif not self.reader.elementwise:
            self.whole = self.reader(None)
        if update.kept is not None:
            kept = torch.zeros_like(self.gradient) if self.whole is None else self.whole
            update.kept[self.member.parameter] = kept
        if update.squares is not None:
            # Where no example kept here put anything, d_r = -w_r g.
            spread = self.weights.square().sum() * self.gradient.square()
            update.squares[self.member.parameter] = spread
        if self.source is not None:
            visit(self.source, self._piece, update.unscale, self.centre)
        if self.source is None or is_table(self.source):
            self._add_untouched()

    def _from_mean(self, examples: Tensor, part: Tensor) -> Tensor:
        return examples if self.centre is not None else examples.addr_(self.weights, part, alpha=-1)

    def _fill(self, examples: Tensor, take: Take, put: Put) -> None:
        put(self.spread, self._from_mean(examples, take(self.gradient)).square().sum(0))

    def _piece(self, examples: Tensor, take: Take, put: Put) -> None:
        update, part = self.sums.update, take(self.gradient)
        distances = self._from_mean(examples, part)
        if self.unchecked:
            rest, size = distances.sum(0).norm(), distances.norm()
            if rest > ROUNDING * part.norm() + 1e-5 * size:
                raise _elsewhere(self.member)
            self.unchecked = False
        squares = distances.square()
        if update.squares is not None:
            put(update.squares[self.member.parameter], squares.sum(0))
        if self.whole is not None:
            p = take(self.whole)
        else:
            found = update.injected.get(self.member.parameter)
            injected = None if found is None else (take(found[0]), take(found[1]))
            fed = _added(update, squares, part, self.sums.within, injected) if update.expected else None
            p = self.reader(fed, take)
            if update.kept is not None:
                put(update.kept[self.member.parameter], p)
        self.sums.absorb([(self.tensor, distances.shape[1])], distances, squares, part, p)

    def _add_untouched(self) -> None:
        """Rows that no example kept here looked up."""
        rows = len(self.member.parameter)
        idle = torch.ones(rows, dtype=torch.bool, device=self.gradient.device)
        for call in self.source.calls if self.source is not None else ():
            idle[call.seen.flatten()] = False
        if not idle.any():
            return

        def take(flat: Tensor) -> Tensor:
            return flat.view(rows, -1)[idle].flatten()

        update, part = self.sums.update, take(self.gradient)
        if self.whole is not None:
            p = take(self.whole)
        else:
            # Their noise is less than their gradient, so only what was injected adds to the expected P.
            found, fed = update.injected.get(self.member.parameter), None
            if found is not None and update.expected:
                added = take(found[0]), take(found[1])
                fed = _added_all(update, torch.zeros_like(part), part, self.sums.within, added)
            p = self.reader(fed, take)
            if update.kept is not None:
                update.kept[self.member.parameter].view(rows, -1)[idle] = p.view(int(idle.sum()), -1)
        self.sums.untouched(self.tensor, part, p)


def _check_source(update: Update, member: Member, source: Source | None) -> None:
    """Where no layer was seen to use it, or a table's row was not looked up, a gradient must be 0."""
    gradient = update.gradient(member, wide(member.parameter))
    if source is not None:
        if not is_table(source):
            return
        idle = torch.ones(len(member.parameter), dtype=torch.bool, device=gradient.device)
        for call in source.calls:
            idle[cast(Tensor, call.looked_up).flatten()] = False
        gradient = gradient.view(len(idle), -1)[idle]
    if (gradient.abs() > 0).any():  # not where it is nan
        raise _elsewhere(member)


def _elsewhere(member: Member) -> InputError:
    return InputError(
        f"gradient of {member.name}",
        "does not come from its layers' forward passes alone",
        f"use the weight in layers only, change no layer's output in place, checkpoint without reentrance: or"
        f" {MEND}",
    )
