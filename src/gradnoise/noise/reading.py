"""What the meter reads: frozen, every number with its standard error."""

from collections.abc import Mapping
from dataclasses import dataclass

from gradnoise.noise.estimate import UNKNOWN, Estimate
from gradnoise.noise.integrals import DEFINITIONS, Event, noise_scale
from gradnoise.noise.ledger import Ledger
from gradnoise.noise.stability import Marker

# Events over which the noise scales' numerator and denominator are averaged before they are divided.
HALF_LIFE = 10


@dataclass(frozen=True)
class PartReading:
    """A layer's or parameter class's part: the batch's trace in the last measured update, exposure up to now.

    The exposures hold what was injected, the traces do not.
    """

    trace: Estimate
    trace_c: Estimate
    pne: Estimate
    pne2: Estimate
    ne: Estimate
    retained: Estimate


@dataclass(frozen=True)
class Reading:
    """The last measured update, and the exposure integrated up to now.

    Of the update: `step` (from 1), `lr`, `estimator` and `preconditioner` (how they were read),
    `contributions` R, `trace` = Tr(P C/B P), `trace_c` = Tr(C/B), `effective` (the trace that the update
    carried after clipping), `injected` = Tr(P N P) of what `inject` and NAP added to the update just made,
    `clip` (the factor), `t_eff` = eta Tr(P (C/B + N) P) / (2 Tr P), `effective_rank` and `top_share` of its
    spectrum, `hill`, `hill_gaussian`, `hill_raw`, `norm_hill`, `norm_hill_gaussian` (with `tails=True`),
    `overlap` with the directions of earlier updates (with `sketch=`), `curvature` = Tr(P F P) in the unit
    `fisher_unit`, `markers` of stability. Up to now: `pne`, `pne2`, `ne`, `retained`, `pne_effective`,
    `pne2_effective` (all with what was injected), `pne2_injected`, `pne_star`; `gns` = Tr(C)/|g|^2 and
    `gns_preconditioned` = Tr(PCP)/|P g|^2 (in sequences, averaged over recent events); `clip_rate`; `tokens`
    and `sequences` seen. `over`: names of exceeded caps. By part: `by_layer`, `by_class`. What was not
    measured is nan. Units and formulas: docs/exposure.md.
    """

    step: int
    lr: float
    estimator: str
    preconditioner: str
    contributions: int
    trace: Estimate
    trace_c: Estimate
    effective: Estimate
    injected: Estimate
    clip: float
    clip_rate: float
    pne: Estimate
    pne2: Estimate
    ne: Estimate
    retained: Estimate
    pne_effective: Estimate
    pne2_effective: Estimate
    pne2_injected: Estimate
    pne_star: Estimate
    t_eff: Estimate
    gns: Estimate
    gns_preconditioned: Estimate
    curvature: Estimate
    fisher_unit: str
    effective_rank: Estimate
    top_share: float
    hill: Estimate
    hill_gaussian: float
    hill_raw: float
    norm_hill: float
    norm_hill_gaussian: float
    overlap: float
    tokens: float
    sequences: float
    population: float
    markers: Mapping[str, Marker]
    over: tuple[str, ...]
    by_layer: Mapping[str, PartReading]
    by_class: Mapping[str, PartReading]

    @property
    def stable(self) -> bool:
        """Whether no marker of instability is raised."""
        return not any(marker.raised for marker in self.markers.values())

    @property
    def ratio(self) -> Estimate:
        """Effective over potential exposure, `pne2_effective` / `pne2`, errors taken as shared.

        Injected noise is not clipped: it is in both.
        """
        return self.pne2_effective.scaled(1 / self.pne2.value) if self.pne2.value > 0 else UNKNOWN

    def per_token(self, definition: str = "pne2") -> Estimate:
        """An exposure over the tokens seen; nan if no token was counted."""
        return self._over(definition, self.tokens)

    def per_epoch(self, definition: str = "pne2") -> Estimate:
        """An exposure over passes through the data; nan without `population=`."""
        return self._over(definition, self.sequences / self.population)

    def _over(self, definition: str, amount: float) -> Estimate:
        found: Estimate = getattr(self, definition)
        return found.scaled(1 / amount) if amount > 0 else UNKNOWN


def reading(
    ledger: Ledger,
    estimator: str,
    preconditioner: str,
    fisher_unit: str,
    predictions: float,
    population: float,
    overlap: float,
    markers: Mapping[str, Marker],
    injected: float,
    over: tuple[str, ...],
) -> Reading | None:
    """The Reading of a ledger's last event, or None before the first."""
    events, _ = ledger.rows()
    if not events or ledger.open is None:
        return None
    event = events[-1]
    total, by_part = ledger.estimates()
    parts: dict[str, dict[str, PartReading]] = {"layer": {}, "class": {}}
    for share in ledger.open.shares:
        if share.kind in parts:
            sums = by_part[share.kind, share.part]
            parts[share.kind][share.part] = PartReading(
                Estimate(share.trace_pcp, share.trace_pcp_se),
                Estimate(share.trace_c, share.trace_c_se),
                *(sums[name] for name in ("pne", "pne2", "ne", "retained")),
            )
    scale = 1.0 if fisher_unit == "token" else 1 / predictions
    star = total["pne_star"].scaled(1.0 if fisher_unit == "token" else predictions)
    recent = noise_scale(events[-8 * HALF_LIFE :], HALF_LIFE)
    return Reading(
        step=event.step,
        lr=event.learning_rate,
        estimator=estimator,
        preconditioner=preconditioner,
        contributions=event.contributions,
        trace=Estimate(event.trace_pcp, event.trace_pcp_se),
        trace_c=Estimate(event.trace_c, event.trace_c_se),
        effective=Estimate(event.trace_effective, event.trace_effective_se),
        injected=Estimate(injected, 0.0),
        clip=event.clip,
        clip_rate=event.clip_rate,
        **{name: total[name] for name in DEFINITIONS if name != "pne_star"},
        pne_star=star,
        t_eff=event.temperature,
        gns=recent[1],
        gns_preconditioned=recent[0],
        curvature=Estimate(event.curvature, event.curvature_se).scaled(scale),
        fisher_unit=fisher_unit,
        effective_rank=Estimate(event.effective_rank, event.effective_rank_se),
        top_share=event.top_share,
        hill=Estimate(event.hill, event.hill_se),
        hill_gaussian=event.hill_gaussian,
        hill_raw=event.hill_raw,
        norm_hill=event.norm_hill,
        norm_hill_gaussian=event.norm_hill_gaussian,
        overlap=overlap,
        tokens=_seen(events, "tokens"),
        sequences=_seen(events, "batch"),
        population=population,
        markers=markers,
        over=over,
        by_layer=parts["layer"],
        by_class=parts["class"],
    )


def _seen(events: list[Event], name: str) -> float:
    """Amount seen, each event standing for its interval."""
    return float(sum(getattr(event, name) * event.updates for event in events))
