"""The meter in other people's loops: TensorBoard, Hugging Face's Trainer, Lightning's."""

import math
import os
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from tests.unit.gloo import on_ranks
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from gradnoise import exposure
from gradnoise.noise.exposure import Exposure
from gradnoise.noise.integrations.tensorboard import scalars, write

VOCABULARY, LENGTH, CLIP = 32, 8, 0.2


class Recorder:
    """What a callback writes to."""

    def __init__(self) -> None:
        self.rows: dict[tuple[str, int], float] = {}

    def add_scalar(self, tag: str, scalar_value: float, global_step: int) -> None:
        self.rows[tag, global_step] = scalar_value


def small_meter(updates: int = 3, **options: Any) -> Exposure:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Embedding(7, 4), nn.Linear(4, 7))
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-2)
    meter = exposure(net, optimizer, every=2, **options)
    for _ in range(updates):
        for _ in range(4):
            ids = torch.randint(7, (8, 3))
            cross_entropy(net(ids).flatten(0, 1), ids.flatten()).div(4).backward()
        optimizer.step()
        optimizer.zero_grad()
    return meter


def test_scalars_are_a_readings_numbers_with_their_errors() -> None:
    reading = small_meter().last
    assert reading is not None
    found = scalars(reading)
    assert found["pne2"] == reading.pne2.value
    assert found["pne2_stderr"] == reading.pne2.stderr
    assert found["class/embedding/trace"] == reading.by_class["embedding"].trace.value
    assert found["layer/1/pne2_stderr"] == reading.by_layer["1"].pne2.stderr
    assert found["lr"] == 1e-2
    assert not any(math.isnan(value) for value in found.values())
    assert not {"hill", "curvature", "step", "estimator"} & set(found)
    assert not any("/" in name for name in scalars(reading, parts=False))


def test_tensorboard_gives_back_what_was_written(tmp_path: Path) -> None:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    from torch.utils.tensorboard import SummaryWriter

    reading = small_meter(tails=True, curvature="mc_fisher").last
    assert reading is not None
    with SummaryWriter(str(tmp_path)) as writer:
        write(writer, reading, prefix="exposure")
    events = accumulator.EventAccumulator(str(tmp_path))
    events.Reload()
    assert set(events.Tags()["scalars"]) == {f"exposure/{name}" for name in scalars(reading)}
    for name, value in scalars(reading).items():
        (event,) = events.Scalars(f"exposure/{name}")
        assert event.step == reading.step == 3
        assert event.value == pytest.approx(value, rel=1e-6)


def same_ledger(one: Exposure, other: Exposure) -> None:
    pd.testing.assert_frame_equal(one.ledger, other.ledger, check_exact=True)
    pd.testing.assert_frame_equal(one.ledger_by_part, other.ledger_by_part, check_exact=True)
    assert repr(one.reading()) == repr(other.reading())  # nan is not nan


# Hugging Face


def gpt2(dropout: float = 0.1) -> Any:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    sizes = {"vocab_size": VOCABULARY, "n_positions": LENGTH, "n_embd": 16, "n_layer": 2, "n_head": 2}
    drops = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), dropout)
    return transformers.GPT2LMHeadModel(
        transformers.GPT2Config(**sizes, **drops, bos_token_id=0, eos_token_id=0)
    )


def texts(count: int = 96, masked: bool = False) -> list[dict[str, Tensor]]:
    draw = torch.Generator().manual_seed(1)
    found = []
    for n in range(count):
        ids = torch.randint(VOCABULARY, (LENGTH,), generator=draw)
        labels = ids.clone()
        if masked:
            labels[: n % (LENGTH - 2)] = -100
        found.append({"input_ids": ids, "labels": labels})
    return found


def train(
    folder: Path,
    callbacks: list[Any],
    net: Any = None,
    resume: bool = False,
    count: int = 96,
    masked: bool = False,
    **given: Any,
) -> Any:
    transformers = pytest.importorskip("transformers")
    settings = {
        "per_device_train_batch_size": 4,
        "max_steps": 6,
        "logging_steps": 1,
        "save_steps": 3,
        "learning_rate": 1e-2,
        "weight_decay": 0.1,
        "max_grad_norm": CLIP,
        "report_to": [],
        "disable_tqdm": True,
        "use_cpu": True,
        "seed": 3,
    }
    arguments = transformers.TrainingArguments(str(folder), **(settings | given))
    data = texts(count, masked)
    net = gpt2() if net is None else net
    trainer = transformers.Trainer(net, arguments, train_dataset=data, callbacks=callbacks)
    trainer.train(resume_from_checkpoint=resume or None)
    return trainer


def weights(model: nn.Module) -> list[Tensor]:
    return [parameter.detach() for parameter in model.parameters()]


@pytest.mark.parametrize("parts", [1, 4])
def test_the_trainer_is_measured_and_not_moved(parts: int, tmp_path: Path) -> None:
    module = pytest.importorskip("gradnoise.noise.integrations.huggingface")
    plain = train(tmp_path / "plain", [], gradient_accumulation_steps=parts)
    writer = Recorder()
    callback = module.ExposureCallback(every=2, writer=writer)
    measured = train(tmp_path / "measured", [callback], gradient_accumulation_steps=parts)
    assert all(torch.equal(a, b) for a, b in zip(weights(plain.model), weights(measured.model), strict=True))
    meter = callback.meter
    assert [event.step for event in meter.events] == [1, 3, 5]
    assert [event.updates for event in meter.events] == [2, 2, 2]
    assert meter.last.estimator == ("example" if parts == 1 else "micro")
    assert meter.last.contributions == 4
    assert all(event.batch == 4 * parts and event.tokens == 4 * parts * LENGTH for event in meter.events)
    # The Trainer clips by itself: the factor is noticed.
    norms = [entry["grad_norm"] for entry in measured.state.log_history if "grad_norm" in entry]
    for event in meter.events:
        norm = norms[event.step - 1]
        assert norm > CLIP
        assert event.clip == pytest.approx(CLIP / norm, rel=1e-3)
        assert event.gradient_norm == pytest.approx(norm, rel=1e-3)
    # New readings are in the log history, and with the writer at their own step.
    logged = [entry["step"] for entry in measured.state.log_history if "noise/pne2" in entry]
    assert logged == [1, 3, 5]
    assert {step for _, step in writer.rows} == {1, 3, 5}
    last = next(entry for entry in measured.state.log_history if entry["step"] == 5)
    assert last["noise/trace"] == writer.rows["noise/trace", 5] == meter.events[2].trace_pcp
    assert "noise/layer/transformer.h.0/pne2" in {tag for tag, _ in writer.rows}
    # Stability markers saw the loss that was logged before the update.
    losses = [entry["loss"] for entry in measured.state.log_history if "loss" in entry]
    assert math.isnan(meter.events[0].loss)
    assert meter.events[1].loss == losses[1]
    assert not any(parameter._backward_hooks for parameter in measured.model.parameters())


@pytest.mark.parametrize("parts", [1, 4])
def test_a_resumed_trainer_has_the_same_ledger(parts: int, tmp_path: Path) -> None:
    module = pytest.importorskip("gradnoise.noise.integrations.huggingface")
    whole = module.ExposureCallback(every=2)
    train(tmp_path, [whole], gradient_accumulation_steps=parts)
    for late in (tmp_path / "checkpoint-6").iterdir():
        late.unlink()
    (tmp_path / "checkpoint-6").rmdir()
    resumed = module.ExposureCallback(every=2)
    train(tmp_path, [resumed], resume=True, gradient_accumulation_steps=parts)
    same_ledger(whole.meter, resumed.meter)


def test_a_checkpoint_without_a_meter_is_resumed_with_a_warning(tmp_path: Path) -> None:
    module = pytest.importorskip("gradnoise.noise.integrations.huggingface")
    train(tmp_path, [], max_steps=3)
    callback = module.ExposureCallback(every=2)
    with pytest.warns(UserWarning, match=r"checkpoint-3/exposure.pt: exposure counts from here on"):
        train(tmp_path, [callback], resume=True)
    assert sum(event.updates for event in callback.meter.events) == 3


@pytest.mark.parametrize("parts", [1, 4])
def test_masked_labels_weigh_as_in_the_trainers_loss(parts: int, tmp_path: Path) -> None:
    """Closed form for SGD: sum_r |h_r - w_r g|^2 / (1 - sum w_r^2), w_r the share of predicted tokens."""
    module = pytest.importorskip("gradnoise.noise.integrations.huggingface")
    callback = module.ExposureCallback(every=1, estimator="example" if parts == 1 else "micro")
    net, seen = gpt2(dropout=0.0), list[dict[str, Any]]()
    net.register_forward_pre_hook(lambda _, __, given: seen.append(dict(given)), with_kwargs=True)
    settings = {"max_steps": 1, "gradient_accumulation_steps": parts, "optim": "sgd", "max_grad_norm": 0}
    train(tmp_path, [callback], net, masked=True, **settings)
    assert len(seen) == parts
    if parts == 1:
        (batch,) = seen
        seen = [{k: v if v.ndim == 0 else v[n : n + 1] for k, v in batch.items()} for n in range(4)]
    twin, rows, tokens = gpt2(dropout=0.0), [], []
    for contribution in seen:
        loss = twin(**contribution).loss
        rows.append(torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(twin.parameters()))]))
        tokens.append(contribution["labels"][:, 1:].ne(-100).sum().item())
    assert len(set(tokens)) > 1
    shares = torch.tensor(tokens).double() / sum(tokens)
    contributions = torch.stack(rows).double()
    distances = contributions - shares[:, None] * contributions.sum(0)
    expected = distances.square().sum() / (1 - shares.square().sum())
    (event,) = callback.meter.events
    assert event.trace_c == pytest.approx(expected.item(), rel=1e-5)
    assert event.trace_pcp == pytest.approx(expected.item(), rel=1e-5)


def test_the_shorter_update_at_an_epochs_end_is_left_out(tmp_path: Path) -> None:
    """5 micro-batches an epoch, 4 an update: every second update has one, and nothing to compare."""
    module = pytest.importorskip("gradnoise.noise.integrations.huggingface")
    callback = module.ExposureCallback(every=1)
    train(tmp_path, [callback], count=20, max_steps=4, gradient_accumulation_steps=4)
    assert [event.step for event in callback.meter.events] == [1, 3]
    assert [event.updates for event in callback.meter.events] == [2, 2]
    assert callback.meter.skipped == 2


def train_in_two(rank: int, folder: Path) -> None:
    module = pytest.importorskip("gradnoise.noise.integrations.huggingface")
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}  # the meeting is in a file
    torch.distributed.init_process_group("gloo", f"file://{folder}/meeting", rank=rank, world_size=2)
    callback = module.ExposureCallback(every=2)
    trainer = train(folder, [callback], gpt2(0.0), masked=True, gradient_accumulation_steps=2)
    assert type(trainer.model_wrapped).__name__ == "DistributedDataParallel"
    found = {"state": repr(callback.meter.state_dict()), "last": repr(callback.meter.last)}
    rows = [(event.contributions, event.batch) for event in callback.meter.events]
    torch.save(found | {"rows": rows}, folder / f"{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_a_trainer_of_two_processes_reads_one_number(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    one, other = on_ranks(train_in_two, tmp_path, 2)
    assert one == other
    assert one["rows"] == [(4, 16)] * 3


# Lightning


def fit(
    folder: Path,
    callbacks: list[Any],
    checkpoint: Path | None = None,
    count: int = 96,
    dropout: float = 0.1,
    **given: Any,
) -> Any:
    pytorch = pytest.importorskip("lightning.pytorch")

    class Module(pytorch.LightningModule):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            super().__init__()
            self.net = gpt2(dropout)

        def training_step(self, batch: Any, _: int) -> Any:
            loss = self.net(**batch).loss
            self.log("loss", loss)
            return loss

        def configure_optimizers(self) -> Any:
            optimizer = torch.optim.AdamW(self.parameters(), lr=1e-2, weight_decay=0.1)
            schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.1, total_iters=6)
            return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    torch.manual_seed(2)
    trainer = pytorch.Trainer(
        default_root_dir=folder,
        max_steps=6,
        accelerator="cpu",
        devices=1,
        gradient_clip_val=CLIP,
        callbacks=callbacks,
        enable_progress_bar=False,
        enable_model_summary=False,
        log_every_n_steps=1,
        **({"logger": False, "enable_checkpointing": False} | given),
    )
    network = Module()
    loader = torch.utils.data.DataLoader(texts(count), batch_size=4)  # type: ignore[arg-type]
    trainer.fit(network, loader, ckpt_path=checkpoint, weights_only=None if checkpoint is None else True)
    return network.net


@pytest.mark.parametrize("parts", [1, 4])
def test_lightning_is_measured_and_not_moved(parts: int, tmp_path: Path) -> None:
    module = pytest.importorskip("gradnoise.noise.integrations.lightning")
    loggers = pytest.importorskip("lightning.pytorch.loggers")
    plain = fit(tmp_path / "plain", [], accumulate_grad_batches=parts)
    callback = module.ExposureCallback(every=2)
    logger = loggers.CSVLogger(tmp_path, "run")
    net = fit(tmp_path, [callback], accumulate_grad_batches=parts, logger=logger)
    assert all(torch.equal(a, b) for a, b in zip(weights(plain), weights(net), strict=True))
    meter = callback.meter
    assert [event.step for event in meter.events] == [1, 3, 5]
    assert [event.updates for event in meter.events] == [2, 2, 2]
    assert meter.last.estimator == ("example" if parts == 1 else "micro")
    assert all(event.batch == 4 * parts and event.tokens == 4 * parts * LENGTH for event in meter.events)
    # Lightning clips inside the closure that it hands to step().
    for event in meter.events:
        assert event.gradient_norm > CLIP
        assert event.clip == pytest.approx(CLIP / event.gradient_norm, rel=1e-3)
        assert 2.5 < event.loss < 4.5  # of the whole update: log 32 = 3.47
    logged = pd.read_csv(Path(logger.log_dir) / "metrics.csv")
    logged = logged[logged["noise/pne2"].notna()]
    assert logged["step"].tolist() == [1, 3, 5]
    assert logged["noise/trace"].tolist() == pytest.approx([event.trace_pcp for event in meter.events])
    assert "noise/layer/transformer.h.0/pne2" in logged
    assert not any(parameter._backward_hooks for parameter in net.parameters())


@pytest.mark.parametrize("parts", [1, 4])
def test_a_resumed_fit_has_the_same_ledger(parts: int, tmp_path: Path) -> None:
    module = pytest.importorskip("gradnoise.noise.integrations.lightning")
    callbacks = pytest.importorskip("lightning.pytorch.callbacks")
    whole, resumed = module.ExposureCallback(every=2), module.ExposureCallback(every=2)
    saver = callbacks.ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=3, save_top_k=-1)
    # Lightning restores neither the place in an epoch nor the random state: 3 updates an epoch, no dropout.
    settings = {"accumulate_grad_batches": parts, "count": 12 * parts, "dropout": 0.0}
    fit(tmp_path, [whole, saver], enable_checkpointing=True, **settings)
    fit(tmp_path, [resumed], tmp_path / "step=3.ckpt", **settings)
    same_ledger(whole.meter, resumed.meter)


def test_lightning_without_an_only_child_watches_the_module_itself(tmp_path: Path) -> None:
    module = pytest.importorskip("gradnoise.noise.integrations.lightning")
    pytorch = pytest.importorskip("lightning.pytorch")

    class Module(pytorch.LightningModule):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Embedding(VOCABULARY, 8), nn.Linear(8, VOCABULARY)

        def forward(self, ids: Tensor) -> Tensor:
            return self.second(self.first(ids))

        def training_step(self, batch: Any, _: int) -> Tensor:
            return cross_entropy(self(batch["input_ids"]).flatten(0, 1), batch["labels"].flatten())

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=0.1)

    torch.manual_seed(0)
    callback = module.ExposureCallback(every=1)
    quiet = dict.fromkeys(
        ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False
    )
    trainer = pytorch.Trainer(
        max_steps=2, accelerator="cpu", default_root_dir=tmp_path, callbacks=[callback], **quiet
    )
    trainer.fit(Module(), torch.utils.data.DataLoader(texts(16), batch_size=4))  # type: ignore[arg-type]
    assert [event.batch for event in callback.meter.events] == [4, 4]
    assert set(callback.meter.last.by_layer) == {"first", "second"}
