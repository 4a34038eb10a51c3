"""One measured update, from what was heard of it to the fields of its event."""

import copy
import math
import warnings
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import SGD, Adafactor

from gradnoise.base.errors import InputError
from gradnoise.base.streams import generator
from gradnoise.noise import curvature as curvatures
from gradnoise.noise.contributions import MANY, from_examples, from_rows, principal
from gradnoise.noise.estimate import UNKNOWN, Estimate
from gradnoise.noise.estimators import Statistics, effective_clipped_each, effective_projected, means
from gradnoise.noise.injection.followed import Covariance
from gradnoise.noise.injection.inject import injections_of
from gradnoise.noise.jackknife import lighter_updates
from gradnoise.noise.ledger import Share
from gradnoise.noise.listener import Listener
from gradnoise.noise.norms import Norms
from gradnoise.noise.options import Options
from gradnoise.noise.preconditioners import is_diagonal
from gradnoise.noise.spectrum import Sketch, spectrum
from gradnoise.noise.tails import SAMPLE, tails
from gradnoise.noise.update import ROUNDING, Member, Rows, Update, factor_used

# Examples that "auto" looks at, micro-batches that a held-out shard is cut into, blocks that "norms" draws.
EXAMPLES = 8
HELD_OUT_PARTS = 8
BLOCKS = 2
# Norms of contributions that the norm tail pools.
POOLED = 1024
# Eigenvalues of a measured update that are kept.
LARGEST = 8

Floats = tuple[float, ...]
# Fields of the event; traces with and without P and learning-rate ratios by tensor; parts.
Measured = tuple[dict[str, Any], tuple[Floats, Floats, Floats], tuple[Share, ...]]


class Survey:
    """Measures the update just made, by the options' estimator."""

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        members: Sequence[Member],
        options: Options,
        process_group: "dist.ProcessGroup | None",
    ) -> None:
        self._model, self._optimizer, self._members = model, optimizer, members
        self._options, self._group = options, process_group
        self.estimator = options.estimator
        self.threshold = options.clip
        self.counts: list[Tensor] = []
        self.overlap = math.nan
        self.top: Floats = ()  # shares of the largest sample eigenvalues
        self.predictions = math.nan  # of a sequence, T of a language model; where the unit of F needs it
        self._population_factor = 1.0  # 1 - B/N where batches are drawn without replacement
        self._events = 0
        self._calls = 1  # of backward() in the update under way, by this process
        self._accumulates = False  # whether the last measured update had several micro-batches
        self._pooled: list[float] = []
        self._curvature, self._curvature_step = UNKNOWN, 0
        self._sketch = Sketch(options.sketch, seed=options.seed) if options.sketch else None
        self._norms: Norms | None = None
        self._blind = False
        if options.estimator == "norms":
            self._norms = Norms(Update(optimizer, members, process_group=process_group), BLOCKS, options.seed)
        self._before: torch.optim.Optimizer | None = None
        self._previous: dict[Tensor, Tensor] | None = None
        self._sizes: dict[Tensor, float] = {}
        self._membership, self._parts = _parts(members)
        # For injectors: what is to be kept of measured updates, and of the last one P and C/B as it entered.
        self.follows, self.rank = False, 0
        self.p: dict[Tensor, Tensor] = {}
        self.covariance: Covariance | None = None

    @property
    def preconditioner(self) -> str:
        """How P is read: expected, step or state; "none" where the update has no diagonal P."""
        if not is_diagonal(self._optimizer):
            return "none"
        usual = {"hutchinson": "step", "norms": "state"}
        return self._options.p or usual.get(self._options.estimator, "expected")

    @property
    def _needs_curvature(self) -> bool:
        return self._options.curvature is not None and self._events % self._options.curvature_every == 0

    def listen(self, step: int) -> Listener:
        """Listen to the coming update."""
        self.counts = []
        if self._norms is not None:
            self._norms.listen(step)
            # An adaptive optimizer has no P before its first update.
            self._blind = not self._optimizer.state and not isinstance(self._optimizer, SGD)
            return Listener(self._model, (), 0, self._needs_curvature)
        capture: int | None = 0
        if self._options.estimator == "example":
            capture = self._options.examples
        elif self._options.estimator == "auto" and not self._accumulates:
            capture = self._options.examples or EXAMPLES
        always = self._options.estimator == "example"
        return Listener(self._model, self._members, capture, self._needs_curvature, always)

    def stop(self) -> None:
        """Forget the update under way."""
        if self._norms is not None:
            self._norms.stop()
            self._norms.drawn = []
        self._before = self._previous = None

    @torch.no_grad()
    def before_step(self) -> None:
        """Keep what only the optimizer before its step knows."""
        if self.preconditioner == "state" and self._norms is None and self._optimizer.state:
            update = Update(self._optimizer, self._members, expected=False)
            self._previous = {m.parameter: update.preconditioner(m)() for m in self._members}
        if isinstance(self._optimizer, Adafactor):
            self._sizes = {
                m.parameter: m.parameter.norm().item() / math.sqrt(m.parameter.numel()) for m in self._members
            }
        if self._options.effective == "jackknife":
            self._before = copy.deepcopy(self._optimizer)

    def measure(self, listener: Listener, step: int, rate: float, norm: float | None) -> Measured | None:
        """The update's event; None if it had nothing to compare. `norm`: found by the meter's clipping."""
        update = Update(
            self._optimizer,
            self._members,
            unscale=self._unscale(),
            expected=self.preconditioner == "expected",
            root_mean_squares=self._sizes,
            process_group=self._group,
            sketch=self._sketch,
        )
        injections = injections_of(self._optimizer)
        if self._needs_curvature or injections or self.rank:
            update.kept = {}
        update.squares = {} if self.follows else None
        for injection in injections:
            for place, noise in injection.added:
                part = noise.flatten(), injection.variance(place).flatten()
                before = update.injected.get(place.parameter)
                both = part if before is None else (before[0] + part[0], before[1] + part[1])
                update.injected[place.parameter] = both
        if self._norms is not None:
            found = self._measure_norms(update, norm)
        else:
            found = self._measure_heard(update, listener, norm)
        listener.forget_layers()  # passes for curvature must not be recorded
        if found is None:
            return None
        event, by_tensor, shares = found
        if self._needs_curvature:
            self._measure_curvature(update, listener, step, event)
        self.p = {}
        if injections and is_diagonal(self._optimizer):
            self.p = {m.parameter: self._p(update, m) for m in self._members}
        self._events += 1
        batch, tokens = self._amounts(update, listener)
        event |= {
            "step": step,
            "learning_rate": rate,
            "batch": batch,
            "tokens": tokens,
            "population_factor": self._population_factor,
            "curvature": self._curvature.value,
            "curvature_se": self._curvature.stderr,
            "curvature_step": self._curvature_step,
        }
        return event, by_tensor, shares

    def _unscale(self) -> float:
        scaler = self._options.scaler
        scale = scaler.get_scale() if scaler is not None and scaler.is_enabled() else 1.0
        return 1 / (scale * (1 if self._group is None else dist.get_world_size(self._group)))

    def _amounts(self, update: Update, listener: Listener) -> tuple[int, int]:
        """Sequences and tokens of the update, over all processes; 0 where nobody knows."""
        # Forward passes whose gradient is not in the update came before (an evaluation with gradients on).
        batch = sum(listener.batches[-self._calls :]) * update.world
        tokens = sum(listener.tokens[-self._calls :]) * update.world
        if self._options.batch is not None:
            tokens = round(tokens * self._options.batch / batch) if batch else 0
            batch = self._options.batch
        return batch, tokens

    def _clip(self, factor: float, norm: float | None) -> float:
        """The factor s of clipping; `factor`: found between used gradients and summed contributions."""
        if norm is not None and self.threshold is not None:
            known = min(1.0, self.threshold / (norm + 1e-6))
            if abs(factor - known) > ROUNDING * known:
                raise InputError(
                    "gradients", f"are {factor:.3g} times the sum of backward() calls", _SCALED.format(known)
                )
            return known
        if factor > 1 + ROUNDING:
            raise InputError(
                "gradients", f"are {factor:.3g} times the sum of backward() calls", _SCALED.format(1)
            )
        power = math.log2(factor)
        if self._options.scaler is None and power < -0.5 and abs(power - round(power)) < 1e-5:
            raise InputError(
                "gradients",
                f"are {factor:.3g} times the sum of backward() calls",
                "give the GradScaler as scaler=",
            )
        # Summing in another order is not clipping.
        return factor if factor < 1 - 1e-4 else 1.0

    def _measure_heard(self, update: Update, listener: Listener, norm: float | None) -> Measured | None:
        options = self._options
        rows = listener.contributions()
        local = len(next(iter(rows.values()), []))
        if local == 0:
            return None
        self._calls = local
        several = local * update.world >= 2
        self._accumulates = several
        kind = options.estimator
        if kind == "auto":
            kind = "micro" if several else "example"
            if not several and listener.capture is None:
                return None  # shorter than the accumulated updates before: an epoch's end
        if (kind == "micro" and not several) or (self.preconditioner == "state" and self._previous is None):
            return None
        self.estimator = kind
        update.previous = self._previous
        update.clip = self._clip(factor_used(update, rows), norm)
        if options.tails:
            coordinates = sum(member.kept for member in self._members)
            update.sample_every = max(1, coordinates * max(local, 2) // SAMPLE)
        if kind == "micro":
            statistics = self._from_micro(update, rows, local)
        elif kind == "example":
            statistics = self._from_examples(update, listener, local)
        elif kind == "hutchinson":
            statistics = self._from_probes(update)
        else:
            statistics = self._from_held_out(update, listener)
        if options.population is not None:
            batch, _ = self._amounts(update, listener)
            if batch > options.population:
                raise InputError("population", options.population, f"is less than the batch of {batch}")
            self._population_factor = 1 - batch / options.population
            statistics.factor *= self._population_factor
        if update.squares is not None:
            self._follow(update, statistics, rows)
        effective, statistics = self._effective(update, statistics, rows)
        return self._event(update, statistics, effective)

    def _from_micro(self, update: Update, rows: Rows, local: int) -> Statistics:
        if len(self.counts) == local:
            self.counts = [tokens.sum()[None] for tokens in self.counts]  # of a micro-batch's examples
        shares = self._shares(update, local, local)
        if not is_diagonal(self._optimizer):
            # All there is to know comes from the jackknife.
            return Statistics.blank(shares, len(self._members))
        return from_rows(update, rows, shares)

    def _from_examples(self, update: Update, listener: Listener, local: int) -> Statistics:
        capture = listener.capture
        assert capture is not None
        if capture.fault is not None:
            raise capture.fault
        batch = listener.batches[-local]
        kept = batch if capture.examples is None else min(capture.examples, batch)
        if kept < 2:
            raise InputError("batch", batch, "of one example has no noise to show: accumulate two or more")
        shares = self._shares(update, batch, batch * local)[:kept]
        return from_examples(update, capture, shares, whole=local * update.world == 1)

    def _shares(self, update: Update, count: int, total: int) -> Tensor:
        """w_r of `count` contributions here, of `total` here; by tokens where they were counted."""
        if not self.counts:
            return torch.full((count,), 1 / (total * update.world), dtype=torch.float64)
        tokens = torch.cat(self.counts)
        if len(tokens) not in (count, total):
            raise InputError(
                "count", f"{len(tokens)} numbers of tokens", f"this update has {count} contributions"
            )
        everywhere = update.total(tokens.sum().to(self._members[0].parameter.device)).item()
        return tokens[:count] / everywhere

    def _from_probes(self, update: Update) -> Statistics:
        """Directional derivatives of per-example losses: each probe's variance over examples is a trace."""
        assert self._options.losses is not None
        draw = generator(self._options.seed, "probes", self._events)
        p = {m.parameter: update.preconditioner(m)().view_as(m.parameter) for m in self._members}
        ones = {q: torch.ones_like(q) for q in p}
        if update.kept is not None:
            update.kept |= p
        norms = torch.zeros(2, dtype=torch.float64)
        for member in self._members:
            gradient = update.gradient(member, torch.float64)
            norms += torch.stack(
                [(gradient * p[member.parameter].flatten()).square().sum(), gradient.square().sum()]
            ).cpu()
        columns, extra = [], []
        for weights in (p, ones):
            rows = curvatures.covariance_probes(
                self._model, self._options.losses, weights, draw, self._options.probes
            ).to(self._members[0].parameter.device)
            rows = torch.cat(update.gathered(rows), 1).cpu()
            rows = rows / rows.shape[1]  # g_b / B, what an example adds to the batch's gradient
            centred = (rows - rows.mean(1, keepdim=True)).square()
            columns.append(centred.mean(0))
            size = rows.shape[1]
            extra.append((centred.sum(1) * size / (size - 1)).var().item() / len(rows))
        table = torch.stack(columns)
        shares = torch.full((table.shape[1],), 1 / table.shape[1], dtype=torch.float64)
        unknown = torch.full_like(shares, math.nan)
        return Statistics(
            shares=shares,
            pcp=table[:1],
            c=table[1:],
            signal_pcp=norms[:1],
            signal_c=norms[1:],
            inner_pcp=unknown,
            inner_c=unknown,
            grams=(),
            trace_p=torch.stack([value.double().sum().cpu() for value in p.values()]).sum()[None],
            ratio=torch.tensor([self._one_ratio(update)], dtype=torch.float64),
            probe_variance=(extra[0], extra[1]),
        )

    def _one_ratio(self, update: Update) -> float:
        """Effective over nominal learning rate where the estimate cannot be told apart by tensor."""
        firsts = {member.group: member for member in reversed(self._members)}.values()
        ratios = {update.filter(member).total for member in firsts}
        rates = {float(group["lr"]) for group in self._optimizer.param_groups}
        if len(ratios) > 1 or len(rates) > 1 or isinstance(self._optimizer, Adafactor):
            raise InputError(
                f"estimator {self._options.estimator}",
                "learning rates that differ by tensor",
                "take estimator='micro' or 'example', which tell tensors apart",
            )
        return ratios.pop()

    def _from_held_out(self, update: Update, listener: Listener) -> Statistics:
        """C from other data: gradients of a held-out shard, scaled from its size to the batch's."""
        assert self._options.held_out is not None
        if update.world > 1:
            raise InputError("estimator", "held_out", "is for one process")
        parameters = [member.parameter for member in self._members]
        with torch.enable_grad():
            losses = self._options.held_out(self._model)
            size = len(losses)
            parts = (losses / size).tensor_split(HELD_OUT_PARTS)
            gradients = [
                torch.autograd.grad(part.sum(), parameters, retain_graph=True, allow_unused=True)
                for part in parts
            ]
        rows: Rows = {
            member.name: [
                torch.zeros_like(member.parameter).flatten() if given[n] is None else given[n].flatten()
                for given in gradients
            ]
            for n, member in enumerate(self._members)
        }
        update.unscale = 1.0
        shares = torch.tensor([len(part) / size for part in parts], dtype=torch.float64)
        statistics = from_rows(update, rows, shares)
        batch, _ = self._amounts(update, listener)
        statistics.factor = size / batch
        return statistics

    def _effective(self, update: Update, statistics: Statistics, rows: Rows) -> tuple[Estimate, Statistics]:
        """The trace that the update carried; an optimizer without a known P gets its statistics here too."""
        mode, clip = self._options.effective, update.clip
        if mode == "jackknife" and self.estimator == "micro":
            if update.world > 1:
                raise InputError("effective", mode, "is for one process")
            assert self._before is not None
            threshold = self.threshold
            if threshold is None and clip < 1:
                norm = sum(
                    torch.stack(rows[m.name]).sum(0).double().square().sum().item() for m in self._members
                )
                threshold = clip * (math.sqrt(norm) * update.unscale + 1e-6)
            distances, gram = lighter_updates(update, self._before, rows, statistics.shares, threshold)
            value, error = means(distances.sum(0), statistics.shares)
            if not is_diagonal(self._optimizer):
                statistics.pcp, statistics.grams = distances, (gram,)
            return Estimate(value.item(), error.item()).scaled(statistics.factor), statistics
        trace = statistics.trace()
        if mode == "project":
            return Estimate(effective_projected(statistics, clip), trace.stderr * clip**2), statistics
        if mode == "clip_each" and self.estimator == "micro":
            if self.threshold is None or update.world > 1:
                raise InputError("effective", mode, "needs clip=, or meter.clip_grad_norm_, in one process")
            if statistics.few is not None:
                raise InputError("effective", mode, f"compares at most {MANY} micro-batches")
            return Estimate(effective_clipped_each(statistics, self.threshold), math.nan), statistics
        return trace.scaled(clip**2), statistics

    def _measure_norms(self, update: Update, norm: float | None) -> Measured | None:
        assert self._norms is not None
        if self._blind:
            return None
        self._norms.update = update
        found = self._norms.reading()
        if found is None:
            return None
        self._calls = found.contributions // update.world
        clip = self._clip(found.factor, norm)
        event = _blank_event() | {
            "contributions": found.contributions,
            "clip": clip,
            "trace_pcp": found.trace.value,
            "trace_pcp_se": found.trace.stderr,
            "trace_c": found.trace_c.value,
            "trace_c_se": found.trace_c.stderr,
            "trace_effective": found.trace.value * clip**2,
            "trace_effective_se": found.trace.stderr * clip**2,
            "trace_p": found.trace_p,
            "signal_pcp": found.signal_pcp,
            "signal_c": found.signal_c,
            "gradient_norm": math.sqrt(found.signal_c),
        }
        ratio = self._one_ratio(update)
        return event, ((found.trace.value,), (found.trace_c.value,), (ratio,)), ()

    def _event(self, update: Update, statistics: Statistics, effective: Estimate) -> Measured:
        trace, trace_c = statistics.trace(), statistics.trace_c()
        signal, covariance = statistics.signal()
        plain, covariance_c = statistics.signal_plain()
        shape = spectrum(statistics.grams, LARGEST, statistics.shares)
        self.top = shape.top
        found = self._tails(update, statistics, shape.effective_rank.value)
        if statistics.sketch is not None and self._sketch is not None:
            self.overlap, _ = self._sketch.update(statistics.sketch)
        event = _blank_event() | {
            "contributions": statistics.contributions,
            "clip": update.clip,
            "trace_pcp": trace.value,
            "trace_pcp_se": trace.stderr,
            "trace_c": trace_c.value,
            "trace_c_se": trace_c.stderr,
            "trace_effective": effective.value,
            "trace_effective_se": effective.stderr,
            "trace_p": statistics.trace_p.sum().item(),
            "signal_pcp": statistics.signal_pcp.sum().item(),
            "signal_pcp_se": signal.stderr,
            "covariance_pcp": covariance,
            "signal_c": statistics.signal_c.sum().item(),
            "signal_c_se": plain.stderr,
            "covariance_c": covariance_c,
            "effective_rank": shape.effective_rank.value,
            "effective_rank_se": shape.effective_rank.stderr,
            "top_share": shape.top[0] if shape.top else math.nan,
            "gradient_norm": math.sqrt(statistics.signal_c.sum().item()),
            **found,
        }
        single = len(statistics.pcp) != len(self._members)
        membership, parts = (None, ()) if single else (self._membership, self._parts)
        shares: tuple[Share, ...] = ()
        if membership is not None:
            values, errors = statistics.traces(membership)
            plain_values, plain_errors = statistics.traces_c(membership)
            columns = (values, errors, plain_values, plain_errors)
            shares = tuple(
                Share(*part, *numbers)
                for part, numbers in zip(parts, zip(*(c.tolist() for c in columns), strict=True), strict=True)
            )
        by_tensor = (
            tuple(s.trace_pcp for s in shares if s.kind == "tensor") or (trace.value,),
            tuple(s.trace_c for s in shares if s.kind == "tensor") or (trace_c.value,),
            tuple(statistics.ratio.tolist()),
        )
        return event, by_tensor, shares

    def _tails(self, update: Update, statistics: Statistics, rank: float) -> dict[str, float]:
        # |d_r|^2 goes with w_r (1 - w_r): contributions of unequal size must not pass for heavy tails.
        weights = statistics.shares * (1 - statistics.shares)
        distances = statistics.pcp.sum(0) / weights
        if not self._options.tails or statistics.sample is None or not distances.sum() > 0:
            return {}
        self._pooled = [*self._pooled, *(distances / distances.mean()).tolist()][-POOLED:]
        # A process keeps coordinates of its own contributions: their indices are averaged.
        first = update.rank * len(statistics.sample)
        here = weights[first : first + len(statistics.sample)]
        sample = statistics.sample / here.sqrt().to(statistics.sample)[:, None]
        found = tails(sample, torch.tensor(self._pooled, dtype=torch.float64), rank)
        index = self._averaged(update, found.standardised)
        return {
            "hill": index.value,
            "hill_se": index.stderr,
            "hill_gaussian": self._averaged(update, Estimate(found.gaussian, 0.0)).value,
            "hill_raw": self._averaged(update, found.raw).value,
            "norm_hill": found.norm.value,
            "norm_hill_gaussian": found.norm_gaussian,
        }

    def _averaged(self, update: Update, found: Estimate, same_draws: bool = False) -> Estimate:
        """Mean over processes, whose errors are independent, or as one where they drew the same probes."""
        own = torch.tensor(found, dtype=torch.float64, device=self._members[0].parameter.device)
        values, errors = torch.stack(update.gathered(own)).cpu().unbind(1)
        error = errors.mean() if same_draws else errors.norm() / len(errors)
        return Estimate(values.mean().item(), error.item())

    def _p(self, update: Update, member: Member) -> Tensor:
        """P of a whole parameter, flat."""
        kept = (update.kept or {}).get(member.parameter)
        return update.preconditioner(member)() if kept is None else kept.flatten()

    def p_of(self, member: Member) -> Tensor:
        """P of the update just measured, flat; else as it is now; nan if it is not known."""
        if member.parameter in self.p:
            return self.p[member.parameter]
        if not is_diagonal(self._optimizer):
            return torch.full_like(member.parameter, math.nan).flatten()
        return Update(self._optimizer, self._members).preconditioner(member)()

    def _follow(self, update: Update, statistics: Statistics, rows: Rows) -> None:
        """Keep C/B as it entered the step: after clipping."""
        assert update.squares is not None
        own = (statistics.shares * (1 - statistics.shares)).sum().item()  # of all processes
        scale = statistics.factor * update.clip**2 / own
        diagonal, directions = {}, None
        for m in self._members:
            squares = update.squares.get(m.parameter)
            if squares is None:
                squares = torch.zeros(m.parameter.numel(), device=m.parameter.device)
            diagonal[m.name] = update.total(squares).view_as(m.parameter) * scale
        if self.rank:
            if self.estimator != "micro":
                raise InputError("factors", self.estimator, "needs two or more backward() calls an update")
            p = {m.name: self._p(update, m) for m in self._members}
            directions = principal(update, rows, statistics.shares, p, self.rank, math.sqrt(scale))
        self.covariance = Covariance(diagonal, directions)

    def _measure_curvature(
        self, update: Update, listener: Listener, step: int, event: dict[str, Any]
    ) -> None:
        options = self._options
        # Labels are drawn anew by each process, directions through parameters alike.
        own = 0 if options.curvature == "hessian" else update.rank
        draw = generator(options.seed, "curvature", self._events, own)
        p = {m.parameter: self._p(update, m).view_as(m.parameter) for m in self._members}
        inputs = listener.inputs[-self._calls :]
        if options.curvature == "empirical_fisher" or options.fisher_unit == "sequence":
            self.predictions = curvatures.predictions_of(self._model, inputs[0], options.logits)
        if options.curvature == "mc_fisher":
            found = curvatures.monte_carlo_fisher(
                self._model, inputs, p, draw, options.likelihood, options.logits
            )
        elif options.curvature == "kfac":
            found = curvatures.kfac_diagonal(self._model, inputs, p, draw, options.likelihood, options.logits)
        elif options.curvature == "hessian":
            assert options.losses is not None
            found = curvatures.hessian_trace(self._model, options.losses, p, draw, options.probes)
        else:
            warnings.warn(
                "curvature empirical_fisher: F = C + g g', so P-NE* logs eta/B: take mc_fisher",
                stacklevel=2,
            )
            batch, _ = self._amounts(update, listener)
            # Tr(P F_sequence P) = B Tr(P C/B P) + |P g|^2 without bias; F_token = T F_sequence.
            noise = Estimate(event["trace_pcp"], event["trace_pcp_se"])
            value = batch * noise.value + event["signal_pcp"] - noise.value
            found = Estimate(value, (batch - 1) * noise.stderr).scaled(self.predictions)
        if options.curvature != "empirical_fisher":
            found = self._averaged(update, found, same_draws=options.curvature == "hessian")
        self._curvature, self._curvature_step = found, step

    def state_dict(self) -> dict[str, Any]:
        """What later events depend on."""
        return {
            "events": self._events,
            "estimator": self.estimator,
            "accumulates": self._accumulates,
            "pooled": list(self._pooled),
            "curvature": tuple(self._curvature),
            "curvature_step": self._curvature_step,
            "overlap": self.overlap,
            "predictions": self.predictions,
            "sketch": None if self._sketch is None else self._sketch.covariance.clone(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over what `state_dict` gave."""
        self._events, self.estimator = state["events"], state["estimator"]
        self._accumulates, self._pooled = state["accumulates"], list(state["pooled"])
        self._curvature, self._curvature_step = Estimate(*state["curvature"]), state["curvature_step"]
        self.overlap, self.predictions = state["overlap"], state["predictions"]
        if self._sketch is not None and state["sketch"] is not None:
            self._sketch.covariance = state["sketch"].clone()


_SCALED = (
    "expected {:.3g}: clip by total norm, or with meter.clip_grad_norm_; give a DistributedDataParallel model"
    " itself; change gradients in no other way"
)


def _parts(members: Sequence[Member]) -> tuple[Tensor, tuple[tuple[str, str, tuple[int, ...]], ...]]:
    """(k, n) membership of tensors in parts, and each part's kind, name and positions."""
    parts: list[tuple[str, str, tuple[int, ...]]] = []
    for kind, of in (("layer", "layer"), ("class", "part"), ("tensor", "name")):
        names = dict.fromkeys(getattr(member, of) for member in members)
        parts += [
            (kind, name, tuple(n for n, m in enumerate(members) if getattr(m, of) == name)) for name in names
        ]
    membership = torch.zeros(len(parts), len(members), dtype=torch.float64)
    for row, (_, _, positions) in zip(membership, parts, strict=True):
        row[list(positions)] = 1.0
    return membership, tuple(parts)


def _blank_event() -> dict[str, Any]:
    names = (
        "trace_p signal_pcp signal_pcp_se covariance_pcp signal_c signal_c_se covariance_c effective_rank"
        " effective_rank_se top_share hill hill_se hill_gaussian hill_raw norm_hill norm_hill_gaussian"
        " gradient_norm"
    )
    return dict.fromkeys(names.split(), math.nan)
