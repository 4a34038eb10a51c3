"""The meter in Lightning: `Trainer(callbacks=[ExposureCallback(every=100)])`."""

from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from gradnoise.noise.exposure import exposure
from gradnoise.noise.integrations.tensorboard import scalars


class ExposureCallback(Callback):
    """`meter` measures the module, as `exposure` does with `every` and `options`; automatic optimization.

    Loggers get "noise/pne2", ... at once; the state is in Lightning's checkpoints. `network` names the
    submodule that the inputs go to; by default the only child, if it holds all parameters, else the module
    (whose `training_step` must call `self(inputs)`). It may call `callback.meter.count(tokens)`.
    """

    def __init__(self, every: Any = 100, network: str | None = None, **options: Any) -> None:
        self.every, self.network, self.options = every, network, options
        self._saved: dict[str, Any] | None = None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        group = getattr(trainer.strategy.model, "process_group", None)  # of DistributedDataParallel
        options = {"scaler": getattr(trainer.precision_plugin, "scaler", None), "process_group": group}
        whole = [c for c in pl_module.children() if set(c.parameters()) == set(pl_module.parameters())]
        network = (whole or [pl_module])[0] if self.network is None else pl_module.get_submodule(self.network)
        self.meter = exposure(network, trainer.optimizers[0], self.every, **(options | self.options))
        self._loss: Tensor | float = 0.0
        self._logged, saved, self._saved = 0, self._saved, None
        if saved is not None:
            self.meter.load_state_dict(saved)

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        if self.meter.due:
            scaler = self.meter.options.scaler
            loss = loss.detach() / (1.0 if scaler is None else scaler.get_scale())
            self._loss = self._loss + trainer.strategy.reduce(loss)

    def on_before_optimizer_step(self, trainer: Trainer, *_: Any) -> None:
        self.meter.observe(self._loss)
        self._loss = 0.0

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        reading = self.meter.last if self.meter.measured else None
        if reading is not None and reading.step != self._logged:
            self._logged = reading.step
            for logger in trainer.loggers:
                logger.log_metrics({f"noise/{k}": v for k, v in scalars(reading).items()}, step=reading.step)

    def state_dict(self) -> dict[str, Any]:
        return self.meter.state_dict() if hasattr(self, "meter") else {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._saved = state_dict

    def teardown(self, *_: Any, **__: Any) -> None:
        if hasattr(self, "meter"):
            self.meter.remove()
