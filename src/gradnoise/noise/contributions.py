"""From what hooks recorded of one update to its `Statistics`."""

import copy
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor

from gradnoise.base.errors import InputError
from gradnoise.noise.capture import Capture, Put, Source, Take, is_table, visit
from gradnoise.noise.estimators import Statistics
from gradnoise.noise.preconditioners import Filter, Preconditioner, learning_filter, read
from gradnoise.noise.spectrum import Sketch

# Coordinates handled at once: enough that calls do not cost more than numbers, few enough for a cache.
CHUNK = 1 << 18
# A gradient in half precision is a sum up to its rounding.
ROUNDING = 0.02
# Per-example Gram matrices cost b^2 products a coordinate: no more examples than this enter the spectrum.
SPECTRUM_EXAMPLES = 16


@dataclass(frozen=True)
class Member:
    """A measured parameter: its name, group, layer and class, and which of its coordinates are kept.

    `index`: kept flat coordinates, None for all; each stands for `scale` of them.
    """

    name: str
    parameter: Tensor
    group: int
    layer: str
    part: str
    index: Tensor | None = None
    scale: float = 1.0

    @property
    def kept(self) -> int:
        return self.parameter.numel() if self.index is None else len(self.index)

    def take(self, flat: Tensor) -> Tensor:
        """The kept coordinates of a flat tensor."""
        return flat if self.index is None else flat[self.index]


@dataclass
class Update:
    """An update just made: the optimizer after its step, with the gradients that it used.

    `clip`: factor s by which the summed gradient was multiplied; `unscale`: what a recorded gradient is
    multiplied by to undo loss scaling and to count for one of `world` processes. `expected`: put the expected
    square of this batch's noise into P (else read it as it is). `previous`: P of the step before, to be used
    instead.
    """

    optimizer: torch.optim.Optimizer
    members: Sequence[Member]
    clip: float = 1.0
    unscale: float = 1.0
    expected: bool = True
    previous: dict[Tensor, Tensor] | None = None
    root_mean_squares: dict[Tensor, float] = field(default_factory=dict)
    process_group: "dist.ProcessGroup | None" = None
    # Every how many coordinates of each contribution are kept for tail indices; 0: none.
    sample_every: int = 0
    sketch: Sketch | None = None
    # Where given, P of every whole parameter is left here.
    kept: dict[Tensor, Tensor] | None = None

    @property
    def world(self) -> int:
        return 1 if self.process_group is None else dist.get_world_size(self.process_group)

    def preconditioner(self, member: Member) -> Preconditioner:
        """The member's P, full."""
        if self.previous is not None:
            before = self.previous[member.parameter]
            return Preconditioner(member.parameter, before, 0.0, torch.clone)
        return read(self.optimizer, member.parameter, self.optimizer.param_groups[member.group])

    def filter(self, member: Member) -> Filter:
        group = self.optimizer.param_groups[member.group]
        return learning_filter(
            self.optimizer, member.parameter, self.root_mean_squares.get(member.parameter, 0.0), group
        )

    def gradient(self, member: Member, dtype: torch.dtype) -> Tensor:
        """The batch's gradient before clipping, unscaled: flat, whole."""
        gradient = member.parameter.grad
        if gradient is None:
            return torch.zeros(member.parameter.numel(), dtype=dtype, device=member.parameter.device)
        return gradient.detach().flatten().to(dtype) / self.clip

    def total(self, values: Tensor) -> Tensor:
        """Sum over processes."""
        if self.process_group is not None:
            dist.all_reduce(values, group=self.process_group)
        return values

    def gathered(self, values: Tensor) -> list[Tensor]:
        """The same-shaped tensor of every process, in order of rank."""
        if self.process_group is None:
            return [values]
        found = [torch.empty_like(values) for _ in range(self.world)]
        dist.all_gather(found, values.contiguous(), group=self.process_group)
        return found


def wide(parameter: Tensor) -> torch.dtype:
    """The dtype to square and sum in: never below float32."""
    return torch.promote_types(parameter.dtype, torch.float32)


def chunks(members: Sequence[Member]) -> list[list[Member]]:
    """Consecutive members of one device and dtype that together have about CHUNK coordinates."""
    found: list[list[Member]] = []
    size = CHUNK
    for member in members:
        kind = member.parameter.device, member.parameter.dtype
        same = found and (found[-1][0].parameter.device, found[-1][0].parameter.dtype) == kind
        if not same or size + member.kept > CHUNK:
            found.append([])
            size = 0
        found[-1].append(member)
        size += member.kept
    return found


@dataclass
class _Sums:
    """What the pieces of one process add up to; columns are its contributions."""

    pcp: list[Tensor] = field(default_factory=list)
    c: list[Tensor] = field(default_factory=list)
    signal_pcp: list[Tensor] = field(default_factory=list)
    signal_c: list[Tensor] = field(default_factory=list)
    trace_p: list[Tensor] = field(default_factory=list)
    inner_pcp: Tensor | float = 0.0
    inner_c: Tensor | float = 0.0
    gram: Tensor | float = 0.0
    extra: list[float] = field(default_factory=lambda: [0.0, 0.0])
    sample: list[Tensor] = field(default_factory=list)
    sketch: Tensor | float = 0.0
    done: int = 0

    def statistics(self, update: Update, shares: Tensor) -> Statistics:
        """Join all processes' contributions; only scalars cross the network."""
        assert isinstance(self.inner_pcp, Tensor)
        assert isinstance(self.inner_c, Tensor)
        assert isinstance(self.gram, Tensor)
        pcp, c = torch.cat(self.pcp), torch.cat(self.c)
        device = pcp.device
        columns = torch.cat([pcp, c, self.inner_pcp[None], self.inner_c[None], shares.to(device)[None]])
        joined = torch.cat(update.gathered(columns), 1).cpu()
        count = len(pcp)
        grams = tuple(gram.cpu() for gram in update.gathered(self.gram))
        ratio = [update.filter(member).total for member in update.members]
        return Statistics(
            shares=joined[-1],
            pcp=joined[:count],
            c=joined[count : 2 * count],
            signal_pcp=torch.cat(self.signal_pcp).cpu(),
            signal_c=torch.cat(self.signal_c).cpu(),
            inner_pcp=joined[-3],
            inner_c=joined[-2],
            grams=grams,
            trace_p=torch.cat(self.trace_p).cpu(),
            ratio=torch.tensor(ratio, dtype=torch.float64),
            probe_variance=(self.extra[0], self.extra[1]),
            sample=torch.cat(self.sample, 1).cpu() if self.sample else None,
            sketch=self.sketch if isinstance(self.sketch, Tensor) else None,
        )


Rows = dict[str, list[Tensor]]


def from_rows(update: Update, rows: Rows, shares: Tensor) -> Statistics:
    """Statistics from whole contributions: `rows[name]` holds R flat gradients (the kept coordinates).

    `shares` (R,), float64: w_r of this process's contributions in the batch of all processes.
    """
    sums = _Sums()
    for chunk in chunks(update.members):
        _add_rows(sums, update, chunk, rows, shares)
    return sums.statistics(update, shares)


def _add_rows(sums: _Sums, update: Update, chunk: list[Member], rows: Rows, shares: Tensor) -> None:
    dtype, sizes = wide(chunk[0].parameter), [member.kept for member in chunk]
    contributions = torch.stack(
        [torch.cat([rows[member.name][r] for member in chunk]) for r in range(len(shares))]
    ).to(dtype)
    if update.unscale != 1.0:
        contributions = contributions * update.unscale
    if update.world == 1:
        gradient = contributions.sum(0)
    else:
        gradient = torch.cat([member.take(update.gradient(member, dtype)) for member in chunk])
    weights = shares.to(gradient)
    distances = contributions.addr_(weights, gradient, alpha=-1)  # d_r = h_r - w_r g
    within = (shares * (1 - shares)).sum()
    variance = None
    if update.expected:
        local = torch.cat([distances.square().sum(0), within.to(gradient)[None]])
        local = update.total(local)
        variance = local[:-1] * (update.clip**2 / local[-1])
    p = _preconditioners(update, chunk, variance)
    scales = None
    if any(member.index is not None for member in chunk):
        # A kept coordinate stands for several: weighted so that sums of squares are those of the whole
        # tensor.
        scales = torch.cat([torch.full((member.kept,), member.scale) for member in chunk]).to(gradient)
        _add_sampling_variance(sums, chunk, distances, p, within.item())
        distances, gradient = distances * scales.sqrt(), gradient * scales.sqrt()
    weighted = distances * p
    strong = gradient * p
    sums.pcp.append(_squares(weighted, sizes))
    sums.c.append(_squares(distances, sizes))
    sums.signal_pcp.append(_squares(strong[None], sizes)[:, 0])
    sums.signal_c.append(_squares(gradient[None], sizes)[:, 0])
    spread = p if scales is None else p * scales
    sums.trace_p.append(torch.stack([part.sum(dtype=torch.float64) for part in torch.split(spread, sizes)]))
    sums.inner_pcp = sums.inner_pcp + (weighted @ strong).double()
    sums.inner_c = sums.inner_c + (distances @ gradient).double()
    sums.gram = sums.gram + (weighted @ weighted.T).double()
    if update.sample_every:
        sums.sample.append(distances[:, :: update.sample_every])
    if update.sketch is not None:
        sums.sketch = sums.sketch + update.sketch.project(weighted, sums.done)
    sums.done += weighted.shape[1]


def _preconditioners(update: Update, chunk: list[Member], variance: Tensor | None) -> Tensor:
    """P of a chunk's kept coordinates, end to end."""
    parts = (
        [None] * len(chunk) if variance is None else torch.split(variance, [member.kept for member in chunk])
    )
    found = []
    for member, part in zip(chunk, parts, strict=True):
        p = update.preconditioner(member)
        if member.index is None or p.elementwise:
            found.append(p(part, member.take if member.index is not None else None))
            if update.kept is not None and member.index is None:
                update.kept[member.parameter] = found[-1]
        else:
            found.append(p(None, member.take))  # sampled coordinates do not show the whole tensor's variance
    return torch.cat(found)


def _squares(rows: Tensor, sizes: list[int]) -> Tensor:
    """(n, R) squared norms of the pieces of R vectors."""
    norms = [
        torch.linalg.vector_norm(part, dim=1, dtype=torch.float64) for part in torch.split(rows, sizes, 1)
    ]
    return torch.stack(norms).square()


def _add_sampling_variance(
    sums: _Sums, chunk: list[Member], distances: Tensor, p: Tensor, within: float
) -> None:
    """Variance of the traces from looking at some coordinates only (drawn without replacement)."""
    squares = distances.double().square().sum(0) / within
    for n, terms in enumerate((squares * p.double().square(), squares)):
        for member, part in zip(chunk, torch.split(terms, [member.kept for member in chunk]), strict=True):
            if member.index is not None and len(part) > 1:
                left = 1 - 1 / member.scale
                sums.extra[n] += left * len(part) * (part * member.scale).var().item()


def from_examples(update: Update, capture: Capture, shares: Tensor) -> Statistics:
    """Statistics from per-example gradients that hooks captured, formed and dropped piece by piece.

    `shares` (b,), float64: of the examples kept.
    """
    by_parameter = {source.parameter: source for source in capture.sources()}
    sums = _Sums()
    for member in update.members:
        _add_examples(sums, update, member, by_parameter.get(member.parameter), shares)
    return sums.statistics(update, shares)


def _add_examples(sums: _Sums, update: Update, member: Member, source: Source | None, shares: Tensor) -> None:
    """|P d_b|^2 = |P G_b|^2 - 2 w_b <P g, P G_b> + w_b^2 |P g|^2, for G_b the example's gradient."""
    dtype = wide(member.parameter)
    gradient = update.gradient(member, dtype)
    weights, within = shares.to(gradient), (shares * (1 - shares)).sum().item()
    reader = update.preconditioner(member)
    count = len(shares)
    sizes = torch.zeros(
        4, count, dtype=torch.float64, device=gradient.device
    )  # |PG|^2, <Pg,PG>, |G|^2, <g,G>
    norms = torch.zeros(3, dtype=torch.float64, device=gradient.device)  # |Pg|^2, |g|^2, sum P
    gram = torch.zeros(min(count, SPECTRUM_EXAMPLES), min(count, SPECTRUM_EXAMPLES)).to(norms)
    factor = update.clip**2 / within

    def variance_of(examples: Tensor, part: Tensor) -> Tensor:
        return (examples - weights[:, None] * part).square().sum(0) * factor

    whole = None
    if not reader.elementwise:
        spread = weights.square().sum() * factor * gradient.square()
        if update.expected and source is not None:

            def fill(examples: Tensor, take: Take, put: Put) -> None:
                put(spread, variance_of(examples * update.unscale, take(gradient)))

            visit(source, fill)
        whole = reader(spread if update.expected else None)

    if update.kept is not None:
        update.kept[member.parameter] = torch.zeros_like(gradient) if whole is None else whole

    def add(examples: Tensor, take: Take, put: Put) -> None:
        part = take(gradient)
        if update.unscale != 1.0:
            examples = examples * update.unscale
        if whole is not None:
            p = take(whole)
        else:
            p = reader(variance_of(examples, part) if update.expected else None, take)
            if update.kept is not None:
                put(update.kept[member.parameter], p)
        strong = part * p
        if update.sample_every:
            sums.sample.append((examples - weights[:, None] * part)[:, :: update.sample_every])
        sizes[3] += examples @ part
        sizes[1] += examples @ (strong * p)
        sizes[2] += torch.linalg.vector_norm(examples, dim=1).double().square()
        examples = examples * p
        sizes[0] += torch.linalg.vector_norm(examples, dim=1).double().square()
        some = examples[: len(gram)]
        gram.add_(some @ some.T)
        norms.add_(torch.stack([strong.square().sum(), part.square().sum(), p.sum()]))

    if source is not None:
        visit(source, add)
    if source is None or is_table(source):
        # Rows that no example kept here touched: their examples' gradients are 0.
        idle = torch.ones(len(member.parameter), dtype=torch.bool, device=gradient.device)
        if source is not None:
            for call in source.calls:
                idle[call.seen.flatten()] = False
        part = gradient.view(len(idle), -1)[idle].flatten()

        def take(flat: Tensor) -> Tensor:
            return flat.view(len(idle), -1)[idle].flatten()

        p = (
            take(whole)
            if whole is not None
            else reader(weights.square().sum() * factor * part.square() if update.expected else None, take)
        )
        if update.kept is not None:
            update.kept[member.parameter].view(len(idle), -1)[idle] = p.view(int(idle.sum()), -1)
        norms.add_(torch.stack([(part * p).square().sum(), part.square().sum(), p.sum()]))
    w = shares.to(norms)
    inner_pcp, inner_c = sizes[1] - w * norms[0], sizes[3] - w * norms[1]
    sums.pcp.append((sizes[0] - 2 * w * sizes[1] + w.square() * norms[0])[None])
    sums.c.append((sizes[2] - 2 * w * sizes[3] + w.square() * norms[1])[None])
    sums.signal_pcp.append(norms[:1])
    sums.signal_c.append(norms[1:2])
    sums.trace_p.append(norms[2:])
    sums.inner_pcp, sums.inner_c = sums.inner_pcp + inner_pcp, sums.inner_c + inner_c
    few, cross = w[: len(gram)], sizes[1][: len(gram)]
    centred = gram - few[:, None] * cross - cross[:, None] * few + few[:, None] * few * norms[0]
    sums.gram = sums.gram + centred


def left_out_updates(
    update: Update, before: torch.optim.Optimizer, rows: Rows, shares: Tensor, threshold: float | None
) -> tuple[Tensor, Tensor]:
    r"""(n, R) squared distances and (R, R) Gram matrix of the real update with one contribution left out.

    u_(-k) is what the optimizer, as it was `before` its step, does with (g - h_k)/(1 - w_k), clipped by norm
    at `threshold` (None: not). Its distance from their mean, times 1 - w_k, stands for P d_k, in long-run
    units (learning rate and `Filter.instant` divided out). This knows nothing of how the optimizer works:
    clipping, P's own noise, Adafactor's and Muon's normalisation are all in it. Costs R optimizer steps and R
    copies of its state.
    """
    members = update.members
    total = {m.name: torch.stack(rows[m.name]).sum(0) * update.unscale for m in members}
    place = {
        p: (g, n)
        for g, group in enumerate(update.optimizer.param_groups)
        for n, p in enumerate(group["params"])
    }
    start = [before.param_groups[g]["params"][n] for g, n in (place[m.parameter] for m in members)]
    moves: list[Tensor] = []
    for k, share in enumerate(shares.tolist()):
        twin = copy.deepcopy(before)
        ends = [twin.param_groups[g]["params"][n] for g, n in (place[m.parameter] for m in members)]
        gradients = [(total[m.name] - rows[m.name][k] * update.unscale) / (1 - share) for m in members]
        if threshold is not None:
            norm = torch.stack([torch.linalg.vector_norm(g) for g in gradients]).norm().item()
            gradients = [g * min(1.0, threshold / (norm + 1e-6)) for g in gradients]
        for end, member, gradient in zip(ends, members, gradients, strict=True):
            used = member.parameter.grad is not None
            end.grad = gradient.view_as(end).to(end.dtype) if used else None
        twin.step()
        parts = []
        for end, begin, member in zip(ends, start, members, strict=True):
            rate = float(update.optimizer.param_groups[member.group]["lr"]) * update.filter(member).instant
            parts.append((end.detach() - begin.detach()).flatten().double() / rate)
        moves.append(torch.cat(parts))
    stacked = torch.stack(moves)
    stacked = (stacked - stacked.mean(0)) * (1 - shares).to(stacked)[:, None]
    return _squares(stacked, [m.parameter.numel() for m in members]).cpu(), (stacked @ stacked.T).cpu()


def factor_used(update: Update, rows: Rows) -> float:
    """The one factor f with used gradient = f x sum of contributions, over all processes; 1 where all is 0.

    f = |used|^2 / <used, sum>. Raises `InputError` naming a parameter where used and sum are not proportional
    with the same f: clipped by value or by layer, or changed otherwise.
    """
    products = []
    for member in update.members:
        total = torch.stack(rows[member.name]).sum(0).double() * update.unscale
        used = member.take(update.gradient(member, wide(member.parameter))).double() * update.clip
        products.append(torch.stack([used @ used, used @ total, total @ total]))
    table = torch.stack(products).cpu()
    shared = update.total(table[:, 1].clone().to(products[0].device)).cpu()
    if not table[:, 0].sum() > 0:
        return 1.0
    factor = (table[:, 0].sum() / shared.sum()).item()
    for member, (used, cross, total), over in zip(
        update.members, table.tolist(), shared.tolist(), strict=True
    ):
        # One process compares vectors; of several, each sees its own sum only, so projections are compared.
        off = used - 2 * factor * cross + factor**2 * total if update.world == 1 else (used - factor * over)
        size = used if update.world == 1 else used / ROUNDING
        if not (factor > 0 and abs(off) <= ROUNDING**2 * size + 1e-300):
            raise InputError(
                f"gradient of {member.name}",
                "is not one factor times the sum of this step's backward() calls",
                "clip by total norm, not by value or by layer, and change gradients in no other way",
            )
    return factor
