"""The meter in a Hugging Face Trainer: `Trainer(..., callbacks=[ExposureCallback(every=100)])`."""

import warnings
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback

from gradnoise.noise.exposure import exposure
from gradnoise.noise.integrations.tensorboard import Writer, scalars, write


class ExposureCallback(TrainerCallback):
    """`meter` measures the Trainer's model, as `exposure` does with `every` and `options`.

    Contributions weigh by labels other than -100. Readings join the log history and go to `writer` in full.
    """

    def __init__(self, every: Any = 100, writer: Writer | None = None, **options: Any) -> None:
        self.every, self.writer, self.options, self._fresh = every, writer, options, dict[str, float]()

    def on_train_begin(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        wrapped, world = given["optimizer"], torch.distributed.group.WORLD  # None in a single process
        options = {"scaler": getattr(wrapped, "scaler", None), "process_group": world} | self.options
        self.meter = exposure(given["model"], getattr(wrapped, "optimizer", wrapped), self.every, **options)
        self._hook = given["model"].register_forward_pre_hook(self._count, with_kwargs=True)
        path = Path(args.output_dir, f"checkpoint-{state.global_step}/exposure.pt")
        if path.exists():
            self.meter.load_state_dict(torch.load(path, weights_only=True))
        elif state.global_step:
            warnings.warn(f"there is no {path}: exposure counts from here on", stacklevel=2)

    def _count(self, model: Any, _: Any, given: dict[str, Any]) -> None:
        if self.meter.due and torch.is_grad_enabled() and {"labels", "num_items_in_batch"} <= given.keys():
            labels, causal = given["labels"], "CausalLM" in str(getattr(model, "loss_function", ""))
            used = labels[..., int(causal and not model.config.is_encoder_decoder) :].ne(-100)
            self.meter.count(used.view(len(labels), -1).sum(1) / given["num_items_in_batch"])

    def on_step_end(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        if self.meter.measured and self.meter.last is not None:
            self._fresh = {f"noise/{k}": v for k, v in scalars(self.meter.last, parts=False).items()}
            if self.writer is not None and state.is_world_process_zero:
                write(self.writer, self.meter.last)

    def on_log(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        given["logs"].update(self._fresh)
        state.log_history[-1].update(self._fresh)
        self._fresh = {}
        if "loss" in given["logs"]:
            self.meter.observe(given["logs"]["loss"])  # for stability: a log late

    def on_save(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        if args.should_save:
            path = f"{args.output_dir}/checkpoint-{state.global_step}/exposure.pt"
            torch.save(self.meter.state_dict(), path)

    def on_train_end(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        self.meter.remove()
        self._hook.remove()
