"""The meter: exposure to gradient noise, measured in the step that training really took.

meter = exposure(model, optimizer, every=100)
...                                    # K calls of backward() before step() are K micro-batches
meter.last.trace, meter.last.pne2      # each an Estimate(value, stderr)
"""

import copy
import math
import warnings
from collections.abc import Callable, Mapping
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import clip_grad_norm_

from gradnoise.base.errors import InputError
from gradnoise.noise.estimate import Estimate
from gradnoise.noise.injection.account import Account
from gradnoise.noise.injection.followed import Followed, FollowedDeviations, FollowedFactors, Shape
from gradnoise.noise.injection.inject import Injection, injections_of, skipped
from gradnoise.noise.integrals import Event, Part
from gradnoise.noise.ledger import Ledger, Measurement
from gradnoise.noise.listener import Listener
from gradnoise.noise.members import members_of
from gradnoise.noise.options import Options
from gradnoise.noise.preconditioners import KNOWN, decoupled_decay, is_diagonal, read
from gradnoise.noise.reading import Reading, reading
from gradnoise.noise.stability import Cap, Marker, Stability
from gradnoise.noise.survey import Survey

if TYPE_CHECKING:
    import pandas as pd

Schedule = Callable[[int], bool]

# Kept by the optimizer itself, so that both go together.
_METERS = "_gradnoise_meters"
# Updates that are looked ahead for the next one to measure.
AHEAD = 10_000


def meters_of(optimizer: torch.optim.Optimizer) -> "list[Exposure]":
    """Meters attached to the optimizer, the first one first."""
    found: list[Exposure] = optimizer.__dict__.setdefault(_METERS, [])
    return found


def exposure(
    model: nn.Module, optimizer: torch.optim.Optimizer, every: int | Schedule = 100, **options: Any
) -> "Exposure":
    """Attach a meter that measures one update in `every`, or those for which `every(step)` is true (from 1).

    Keyword options are the fields of `gradnoise.noise.options.Options`, documented there; the main ones:
    `estimator` ("auto"), `p` (how P is read), `effective` ("scale"), `curvature` (None), `examples`,
    `losses`, `scaler`, `population`, `tails`, `sketch`, `thresholds`, `caps`.

    With "auto" an update of two or more backward() calls is measured from these micro-batches ("micro"), one
    of a single call from the per-example gradients of its first 8 examples ("example"). Nothing else in the
    loop changes: no layer is replaced, no closure is needed, updates that are not measured cost a few
    microseconds.

    Raises `InputError` for an option out of range, an optimizer that is not known, parameters unknown to the
    model; and at a measured step for layers whose per-example gradients are not known (by name) and gradients
    that are not one factor times the sum of the step's `backward()` calls.
    """
    return Exposure(model, optimizer, every, Options(**options))


class Exposure:
    """See `exposure`. `events`, `parts`: the ledger of closed intervals; `skipped`: due but not measured."""

    def __init__(
        self, model: nn.Module, optimizer: torch.optim.Optimizer, every: int | Schedule, options: Options
    ) -> None:
        if not callable(every) and every < 1:
            raise InputError("every", every, "must be at least 1 update")
        options.check(optimizer)
        self.options = options
        self._model, self._group = model, options.process_group
        if isinstance(model, DistributedDataParallel):
            self._model, self._group = model.module, model.process_group
        self._optimizer = optimizer
        self._due: Schedule = every if callable(every) else lambda step: (step - 1) % every == 0
        self._members = members_of(self._model, optimizer, options)
        self._survey = Survey(self._model, optimizer, self._members, options, self._group)
        self._stability = Stability(options.thresholds)
        self._ledger = Ledger()
        self._step = 0
        self._listener: Listener | None = None
        # Clipping by the meter: the threshold, this update's norm, and on the device how many were clipped of
        # how many.
        self._norm: Tensor | None = None
        self._clipped: Tensor | float = 0.0
        self._seen = 0
        # Measured updates, and those among them that were clipped.
        self._events = self._clipped_events = 0
        self._loss: Tensor | float | None = None
        self._markers: Mapping[str, Marker] = {}
        self._spent = dict.fromkeys(options.caps, 0.0)
        self._last: Reading | None = None
        self._last_step = 0
        self._followed: list[Followed] = []
        # What injections add: traces at unit power for whoever sets their power.
        self.account = Account(optimizer, self._members, self._survey, self._ledger)
        # Called after each measured update.
        self.after: list[Callable[[], None]] = []
        # By measured update, the shares of its largest sample eigenvalues (see `spectrum`).
        self.shares: dict[int, tuple[float, ...]] = {}
        self.skipped = 0
        self._hooks = [
            optimizer.register_step_pre_hook(self._before_step),
            optimizer.register_step_post_hook(self._stepped),
        ]
        meters_of(optimizer).append(self)
        self._arm()

    @property
    def due(self) -> bool:
        """Whether the next update will be measured: a loop may then split its batch."""
        return self._listener is not None

    @property
    def measured(self) -> bool:
        """Whether the update just made was measured: `last` is new."""
        now = self._ledger.open
        return now is not None and now.event["step"] == self._step

    @property
    def events(self) -> list[Event]:
        return self._ledger.events

    @property
    def parts(self) -> list[Part]:
        return self._ledger.parts

    def rows(self) -> tuple[list[Event], list[Part]]:
        """`events` and `parts`, with the interval that is open."""
        return self._ledger.rows()

    @property
    def interval(self) -> tuple[Event, list[Part]] | None:
        """The open interval, from the last measured update up to now; None before the first."""
        covered = self._ledger.covered()
        return None if covered is None else covered[:2]

    def measures(self, step: int) -> bool:
        """Whether an update is to be measured."""
        return bool(self._due(step))

    @property
    def stride(self) -> int:
        """Updates from now up to the next one to be measured, itself included."""
        return next((n for n in range(1, AHEAD) if self._due(self._step + n)), AHEAD)

    @property
    def last(self) -> Reading | None:
        """The last measured update and the exposure up to now; None before the first."""
        if self._last is None or self._last_step != self._step:
            self._last, self._last_step = self._read(), self._step
        return self._last

    def _read(self) -> Reading | None:
        survey = self._survey
        if self._ledger.open is None:
            return None
        return reading(
            self._ledger,
            survey.estimator,
            survey.preconditioner,
            self.options.fisher_unit,
            survey.predictions,
            math.nan if self.options.population is None else float(self.options.population),
            survey.overlap,
            self._markers,
            self.account.injected,
            tuple(name for name, cap in self.options.caps.items() if self._in_phase(name, cap) > cap.most),
        )

    def reading(self) -> dict[str, Estimate]:
        """Exposure of all updates so far, by definition."""
        return self._ledger.estimates()[0]

    @property
    def ledger(self) -> "pd.DataFrame":
        """The events so far, one row each (fields of `Event`); needs pandas."""
        import pandas as pd

        return pd.DataFrame([asdict(event) for event in self._ledger.rows()[0]])

    @property
    def ledger_by_part(self) -> "pd.DataFrame":
        """The same by layer, class and tensor, one row an event and part (fields of `Part`); needs pandas."""
        import pandas as pd

        return pd.DataFrame([asdict(part) for part in self._ledger.rows()[1]])

    def std(
        self, scale: float = 1.0, shape: Shape = "diagonal", half_life: float = 4.0
    ) -> FollowedDeviations:
        """Standard deviations sqrt(scale x diag(C/B)) for `gaussian` and `student_t`, following the noise.

        C/B is the gradient noise of measured updates as it entered the step (after clipping), so `scale` is
        injected over intrinsic variance in gradient units, tensor by tensor. Its shape within a tensor is
        averaged over measured updates with a `half_life` counted in them, its level is the last one's. It
        changes at them only, and before the first one nothing is injected.
        `shape`: "diagonal", "tensor" (in each tensor one number of the same trace) or "isotropic" (one number
        for all). Keeps one or two buffers of the gradient's size.

        Raises `InputError` where no diagonal is seen: estimators "norms" and "hutchinson", `share` under 1,
        an optimizer whose P is not diagonal.
        """
        found = FollowedDeviations(scale, shape, half_life, self._names())
        self._follow(found)
        return found

    def factors(self, scale: float = 1.0, rank: int = 4) -> FollowedFactors:
        """Low rank + diagonal covariance for `low_rank`, following the noise.

        Of the last measured update's sample covariance, the `rank` largest directions in the metric of P
        (across all tensors) and the diagonal of the rest: its trace is that of C/B, in gradient and in update
        units. Keeps rank + 1 buffers of the gradient's size. Micro-batches of one process only; raises
        `InputError` for others, and as `std`.
        """
        if self.options.estimator not in ("auto", "micro") or self._group is not None:
            raise InputError("factors", self.options.estimator, "needs micro-batches, in one process")
        found = FollowedFactors(scale, rank, self._names())
        self._follow(found)
        self._survey.rank = max(self._survey.rank, rank)
        return found

    def _names(self) -> dict[Tensor, str]:
        return {member.parameter: member.name for member in self._members}

    def _follow(self, provider: Followed) -> None:
        options = self.options
        if options.estimator in ("norms", "hutchinson") or options.share < 1:
            raise InputError("estimator", options.estimator, "sees no whole diagonal: take micro or example")
        if not is_diagonal(self._optimizer):
            mend = f"is measured by the jackknife alone, which sees no diagonal ({KNOWN} are not)"
            raise InputError("optimizer", type(self._optimizer).__name__, mend)
        self._followed.append(provider)
        self._survey.follows = True

    def clip_grad_norm_(self, largest: float) -> Tensor:
        """Clip as `torch.nn.utils.clip_grad_norm_` does, and count how often it bites.

        Another's clipping by total norm is noticed at measured updates without this; the clip rate then
        covers those alone. Unscale first (`scaler.unscale_(optimizer)`) where a GradScaler is used.
        """
        norm = clip_grad_norm_([member.parameter for member in self._members], largest)
        self._survey.threshold, self._norm = largest, norm
        self._clipped = self._clipped + (norm > largest)
        self._seen += 1
        return norm

    def count(self, tokens: Tensor | float) -> None:
        """Tell how many tokens the loss of the coming backward() averages over, before it.

        Needed where a batch's loss is a mean over tokens and its parts have unequal numbers: one number for
        each micro-batch, or a (B,) tensor of one for each example.
        """
        if self.due:
            self._survey.counts.append(torch.as_tensor(tokens, dtype=torch.float64).flatten())

    def observe(self, loss: Tensor | float) -> None:
        """Give the loss of the coming update to the stability markers; it is looked at when measured only."""
        self._loss = loss.detach() if isinstance(loss, Tensor) else loss

    def remove(self) -> None:
        """End the open interval and detach every hook; the ledger and the last reading stay."""
        self._last, self._last_step = self.last, self._step
        self._spend()
        self._ledger.close()
        for hook in self._hooks:
            hook.remove()
        self._hooks = []
        if self in meters_of(self._optimizer):
            meters_of(self._optimizer).remove(self)
        self._disarm()

    def state_dict(self) -> dict[str, Any]:
        """All that a run resumed between two updates needs to go on as if never stopped: plain data."""
        return {
            "step": self._step,
            "ledger": self._ledger.state_dict(),
            "survey": self._survey.state_dict(),
            "stability": {
                "history": copy.deepcopy(self._stability.history),
                "lowest": self._stability.lowest,
            },
            "markers": {name: tuple(marker) for name, marker in self._markers.items()},
            "clipped": float(self._clipped),
            "seen": self._seen,
            "measured": self._events,
            "clipped_events": self._clipped_events,
            "spent": dict(self._spent),
            "skipped": self.skipped,
            "account": self.account.state_dict(),
            "shares": [[step, list(found)] for step, found in self.shares.items()],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over what `state_dict` of a meter with the same options gave."""
        state = copy.deepcopy(state)
        self._disarm()
        self._step, self.skipped = state["step"], state["skipped"]
        self._ledger.load_state_dict(state["ledger"])
        self._survey.load_state_dict(state["survey"])
        self._stability.history = state["stability"]["history"]
        self._stability.lowest = state["stability"]["lowest"]
        self._markers = {name: Marker(*marker) for name, marker in state["markers"].items()}
        self._clipped, self._seen, self._spent = state["clipped"], state["seen"], state["spent"]
        self._events, self._clipped_events = state["measured"], state["clipped_events"]
        self.account.load_state_dict(state["account"])
        self.shares = {step: tuple(found) for step, found in state["shares"]}
        self._last = None
        self._arm()

    def _arm(self) -> None:
        """Listen to the coming update if it is to be measured."""
        if not self._due(self._step + 1):
            return
        self._norm = None
        self._listener = self._survey.listen(self._step + 1)

    def _disarm(self) -> None:
        if self._listener is not None:
            self._listener.stop()
            self._listener.forget_layers()
        self._listener = None
        self._survey.stop()

    def _before_step(self, *_: object) -> None:
        if self.due:
            self._survey.before_step()

    def _stepped(self, optimizer: torch.optim.Optimizer, *_: object) -> None:
        # Runs after every update, so it does next to nothing where nothing is measured.
        if skipped(optimizer):
            return
        injections = injections_of(optimizer)
        for injection in injections:
            injection.settle()
        self._step += 1
        rates = tuple(_kept(group["lr"]) for group in optimizer.param_groups)
        if self.due:
            self._measure(rates)
        self._ledger.advance(rates)
        if self.measured:
            self.account.forget()
        self.account.add(injections)
        if self.measured:
            self._inform(injections)
        self._arm()

    @property
    def trace(self) -> float:
        """Tr(P C/B P) of the last measured update, `last.trace` without the rest; nan before the first."""
        now = self._ledger.open
        return math.nan if now is None else float(now.event["trace_pcp"])

    def _inform(self, injections: list[Injection]) -> None:
        """Pass the new covariance on: it holds from the next update."""
        covariance, self._survey.covariance = self._survey.covariance, None
        if covariance is not None:
            for provider in self._followed:
                provider.feed(covariance)
            self.account.forget()
        for follower in self.after:
            follower()
        self.account.keep(injections)

    @torch.no_grad()
    def _measure(self, rates: tuple[Any, ...]) -> None:
        listener, self._listener = self._listener, None
        assert listener is not None
        listener.stop()
        norm = None if self._norm is None else self._norm.item()
        try:
            found = self._survey.measure(listener, self._step, float(rates[0]), norm)
        finally:
            self._survey.stop()
        if found is None:
            self.skipped += 1
            return
        event, by_tensor, shares = found
        self.shares[self._step] = self._survey.top
        self._events += 1
        self._clipped_events += event["clip"] < 1
        event |= {
            "clip_rate": float(self._clipped) / self._seen
            if self._seen
            else self._clipped_events / self._events,
            "loss": math.nan if self._loss is None else float(self._loss),
            "second_moment": self._second_moment(),
        }
        self._spend()
        groups = tuple(member.group for member in self._members) if shares else (0,)
        decays = tuple(decoupled_decay(self._optimizer, g) for g in self._optimizer.param_groups)
        self._ledger.start(Measurement(event, *by_tensor, groups, decays, shares))
        values = {name: event[name] for name in ("gradient_norm", "clip_rate", "second_moment", "loss")}
        # Unknown is what nobody gave; a loss or gradient that is no number any more is as bad as can be.
        for name, known in (
            ("loss", self._loss is not None),
            ("gradient_norm", is_diagonal(self._optimizer)),
        ):
            values[name] = math.inf if known and math.isnan(values[name]) else values[name]
        self._markers = self._stability.update(values)

    def _second_moment(self) -> float:
        """Mean of the optimizer's second moment v; nan for one that has none, and for norms (too dear)."""
        if not is_diagonal(self._optimizer) or self.options.estimator == "norms":
            return math.nan
        moments = [read(self._optimizer, member.parameter).second for member in self._members[:64]]
        known = [moment.float().mean() for moment in moments if moment is not None]
        return torch.stack(known).mean().item() if known else math.nan

    def _in_phase(self, name: str, cap: Cap) -> float:
        """Exposure of a cap's phase up to now."""
        covered = self._ledger.covered()
        return self._spent[name] + (0.0 if covered is None else _within(covered[0], cap))

    def _spend(self) -> None:
        """Add the interval about to end to the phases that it is in; warn once where a cap is exceeded."""
        covered = self._ledger.covered()
        for name, cap in self.options.caps.items():
            before = self._spent[name]
            self._spent[name] += 0.0 if covered is None else _within(covered[0], cap)
            if before <= cap.most < self._spent[name]:
                warnings.warn(
                    f"exposure cap {name}: {cap.definition} {self._spent[name]:.3g} exceeds {cap.most:.3g}",
                    stacklevel=2,
                )


def _kept(rate: Any) -> Any:
    """A learning rate as it is now; one on a device is copied there, so that nothing waits."""
    return rate.detach().clone() if isinstance(rate, Tensor) else float(rate)


def _within(event: Event, cap: Cap) -> float:
    """The share of an interval's exposure that falls into a cap's phase."""
    last = event.step + event.updates - 1
    share = max(0, min(last, cap.last) - max(event.step, cap.first) + 1) / event.updates
    exposure = {
        "pne": event.sum_lr * event.trace_pcp + event.injected_pne,
        "pne2": event.sum_lr2 * event.trace_pcp + event.injected_pne2,
        "ne": event.sum_lr2_c * event.trace_c + event.injected_ne,
    }[cap.definition]
    return share * exposure
