"""What a meter can be told."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch
from torch import Tensor

from gradnoise.base.errors import InputError
from gradnoise.noise.curvature import Curvature, Likelihood, Losses, logits_of
from gradnoise.noise.preconditioners import KNOWN, is_diagonal
from gradnoise.noise.stability import Cap, Thresholds

if TYPE_CHECKING:
    from torch.amp import GradScaler
    from torch.distributed import ProcessGroup

Estimator = Literal["auto", "norms", "micro", "example", "hutchinson", "held_out"]
Read = Literal["expected", "step", "state"]
Effective = Literal["scale", "jackknife", "project", "clip_each"]
FisherUnit = Literal["token", "sequence"]


@dataclass(frozen=True)
class Options:
    """Options of `exposure`; each with the value that it has if nothing is said.

    How noise is estimated:

    - `estimator`: "auto" (micro with two or more backward() calls an update, else example), "micro"
      (contributions of the calls), "example" (exact per-example gradients through hooks on Linear, LayerNorm,
      RMSNorm and Embedding), "hutchinson" (forward-mode probes; any layer; needs `losses`), "norms" (every
      update, a few blocks of coordinates, with the P of the step before), "held_out" (covariance of held-out
      data, as a paper proposes; misleading: docs/exposure.md; needs `held_out`).
    - `examples`: of the batch's first examples, how many "example" looks at; None: all, but 8 under "auto".
    - `probes`: of "hutchinson" and of curvature "hessian".
    - `share`: of the coordinates of tensors over 4096, how many "micro" keeps; each then stands for several,
      which the standard error counts. For models whose R gradients do not fit.
    - `losses`: function of the model (or a stand-in called alike) that gives the (B,) losses of the current
      batch's examples; `held_out`: the same for a held-out shard.
    - `population`: sequences in the data set, N, where batches are drawn without replacement: variances are
      then times (1 - B/N).
    - `batch`: sequences in an update, where the leading dimension of the model's first input is not that.
    - `process_group`: of the run's DistributedDataParallel, where the module inside it is given as the model.

    How P is read: `p` "expected" (after the step, the larger of g^2 and its noise C/B in the second moment
    where this batch put g^2; default of micro, example and held_out), "step" (after the step as it is;
    default of hutchinson), "state" (before the step, as papers write it; all that norms can do). How clipping
    enters `effective`: "scale" (s^2 x trace), "project" (through the Jacobian of clipping; a diagnostic),
    "jackknife" (the real update with each micro-batch at less weight: the reference, R optimizer steps; the
    only one for Muon), "clip_each" (each micro-batch clipped by itself, as a paper proposes; misleading).
    `clip`: the run's threshold, where `meter.clip_grad_norm_` is not used. `scaler`: the run's GradScaler.

    Curvature for P-NE*: `curvature` "mc_fisher" (labels sampled from the model), "kfac" (its diagonal in
    K-FAC's approximation), "hessian" (needs `losses`), "empirical_fisher" (a tautology: P-NE* then logs
    eta/B; warned of); None: not measured. Measured at every `curvature_every`-th event and kept in between.
    `fisher_unit` "token" (on the Hessian's scale) or "sequence" (F_token / T, T predictions in a sequence).
    `likelihood` "categorical" or "gaussian"; `logits`: from the model's output to the logits that enter the
    loss.

    More: `tails` (Hill indices), `sketch` (width of a sketch that follows directions across updates, e.g.
    256; 0: none), `classes` (from name and parameter to class), `thresholds` and `caps` of stability, `seed`
    of probes and sampling.
    """

    estimator: Estimator = "auto"
    p: Read | None = None
    effective: Effective = "scale"
    examples: int | None = None
    probes: int = 4
    share: float = 1.0
    losses: Losses | None = None
    held_out: Losses | None = None
    population: int | None = None
    batch: int | None = None
    process_group: "ProcessGroup | None" = None
    clip: float | None = None
    scaler: "GradScaler | None" = None
    curvature: Curvature | None = None
    curvature_every: int = 10
    fisher_unit: FisherUnit = "token"
    likelihood: Likelihood = "categorical"
    logits: Callable[[Any], Tensor] = logits_of
    tails: bool = False
    sketch: int = 0
    classes: Callable[[str, Tensor], str] | None = None
    thresholds: Thresholds = field(default_factory=Thresholds)
    caps: Mapping[str, Cap] = field(default_factory=dict)
    seed: int = 0

    def __post_init__(self) -> None:
        for name, kind in (
            ("estimator", Estimator),
            ("p", Read),
            ("effective", Effective),
            ("curvature", Curvature),
            ("fisher_unit", FisherUnit),
            ("likelihood", Likelihood),
        ):
            value, allowed = getattr(self, name), get_args(kind)
            if value not in allowed and not (value is None and name in ("p", "curvature")):
                raise InputError(name, value, f"must be {', '.join(allowed[:-1])} or {allowed[-1]}")
        for name, least in (("probes", 2), ("curvature_every", 1), ("sketch", 0)):
            if getattr(self, name) < least:
                raise InputError(name, getattr(self, name), f"must be at least {least}")
        for name, least in (("examples", 2), ("population", 2), ("batch", 1)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise InputError(name, value, f"must be at least {least}, or None")
        if not 0 < self.share <= 1:
            raise InputError("share", self.share, "must be above 0 and at most 1")
        for name, cap in self.caps.items():
            if cap.definition not in ("pne", "pne2", "ne"):
                raise InputError(f"caps.{name}.definition", cap.definition, "must be pne, pne2 or ne")
        self._check_together()

    def _check_together(self) -> None:
        needs = (
            (self.estimator == "hutchinson", "losses"),
            (self.curvature == "hessian", "losses"),
            (self.estimator == "held_out", "held_out"),
        )
        for needed, name in needs:
            if needed and getattr(self, name) is None:
                raise InputError(name, None, "give a function of the model that returns one loss an example")
        if self.estimator == "norms" and self.p not in (None, "state"):
            raise InputError("p", self.p, "estimator norms has the P of the step before only: take p='state'")
        if self.estimator == "hutchinson" and self.p == "expected":
            raise InputError("p", self.p, "estimator hutchinson sees no diagonal: take p='step' or 'state'")
        whole = self.estimator in ("auto", "micro")
        if self.effective in ("jackknife", "clip_each") and not whole:
            raise InputError("effective", self.effective, "needs micro-batches: take estimator='micro'")
        if self.effective == "project" and self.estimator in ("norms", "hutchinson", "held_out"):
            raise InputError("effective", self.effective, "take estimator='micro' or 'example'")
        if self.share < 1 and (not whole or self.effective == "jackknife"):
            raise InputError(
                "share", self.share, "only estimator='micro' without jackknife can sample coordinates"
            )
        if self.sketch and not whole:
            raise InputError("sketch", self.sketch, "needs micro-batches: take estimator='micro'")

    def check(self, optimizer: torch.optim.Optimizer) -> None:
        """Raises `InputError` where the optimizer has no known P and the jackknife is not taken."""
        if not is_diagonal(optimizer) and self.effective != "jackknife":
            raise InputError(
                "optimizer",
                type(optimizer).__name__,
                f"its preconditioner is not a known diagonal one ({KNOWN}): take effective='jackknife'",
            )
