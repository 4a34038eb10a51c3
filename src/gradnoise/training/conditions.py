"""A noise condition of the study's settings, as the training loop carries it out on a trunk."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from gradnoise.base.streams import key
from gradnoise.base.study import Block, Cell, Inject, Nap, Reweight
from gradnoise.noise.exposure import Exposure
from gradnoise.noise.injection.inject import Injection, inject
from gradnoise.noise.injection.reweighting import reweight
from gradnoise.noise.injection.sources import Source, gaussian, low_rank, student_t
from gradnoise.noise.schedules import window
from gradnoise.optim.nap import align_noise


@dataclass(frozen=True)
class TrunkNoise:
    """Noise of a run's trunk: on at updates `first` to `last`, drawn under `seed` and the update's number."""

    condition: Inject | Reweight | Nap
    batch: int
    seed: int
    first: int
    last: int

    def attach(self, model: nn.Module, optimizer: Optimizer, meter: Exposure, every: int) -> Injection | None:
        """Put noise into the optimizer's updates, as large as the meter says; None if losses are weighted.

        `every`: updates between two measured ones. Sketches are fed at these, whose batch comes in parts.
        """
        condition = self.condition
        if isinstance(condition, Inject):
            return inject(
                optimizer,
                _source(condition, meter),
                condition.where,
                model=model,
                layers=condition.layers,
                power=window(1.0, self.first, self.last),
                seed=self.seed,
            )
        if isinstance(condition, Nap):
            return align_noise(
                optimizer,
                model,
                rank=condition.rank,
                temperature=window(condition.temperature, self.first, self.last),
                alignment=condition.alignment,
                layers=condition.layers,
                target=condition.target,
                meter=meter,
                seed=self.seed,
                sketch_every=every,
            )
        return None

    def weights(self, update: int, part: int, size: int, device: torch.device) -> Tensor | None:
        """(size,) weights of the losses of a part of the update's batch; None for the plain mean."""
        condition = self.condition
        if not isinstance(condition, Reweight) or not self.first <= update <= self.last:
            return None
        return reweight(
            size,
            step=update,
            to_batch=condition.to_batch,
            batch=self.batch,
            law=condition.law,
            degrees=condition.degrees,
            part=part,
            seed=self.seed,
            device=device,
        )


def trunk_noise(block: Block, cell: Cell, seed: int) -> TrunkNoise | None:
    """The noise of a cell in the run of `seed`; None for a cell that has none but its batch's own."""
    if cell.noise is None:
        return None
    first, last = cell.noise.updates(block.cap(cell))
    return TrunkNoise(cell.noise, cell.batch, key(seed, "noise"), first, last)


def _source(condition: Inject, meter: Exposure) -> Source:
    if condition.source == "low_rank":
        return low_rank(meter.factors(condition.scale, condition.rank))
    std = meter.std(condition.scale, condition.shape)
    if condition.source == "gaussian":
        return gaussian(std)
    return student_t(std, condition.degrees, condition.tails)
