"""One run: a trunk at constant learning rate, branched, annealed to 0 and scored at registered points.

The loss of a noisy run at constant learning rate holds weight jitter, so scores are taken on annealed
branches only; the trunk goes on from where the branch left it. How branches are matched: docs/pipeline.md.
"""

import copy
import math
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from gradnoise.base.streams import generator
from gradnoise.base.study import Block, Cell
from gradnoise.evaluation.names import NAMES
from gradnoise.evaluation.scores import scores
from gradnoise.models.decoder import Decoder
from gradnoise.tasks.stream import Stream
from gradnoise.training import checkpoint
from gradnoise.training.conditions import trunk_noise
from gradnoise.training.loop import Batches, Settings, State, Stretch, train
from gradnoise.training.settings import anneal_updates, branch_points

TRUNK = 0
Log = dict[str, Any]


def new_state(block: Block, cell: Cell, seed: int, stream: Stream, device: str) -> State:
    """Model from stream `init` of the seed, and a fresh AdamW."""
    model = Decoder(
        block.model,
        stream.inputs,
        stream.outputs,
        stream.context,
        stream.readout,
        stream.token_inputs,
        generator(seed, "init"),
    ).to(device)
    return State(model, _optimizer(model, block, cell))


def _optimizer(model: torch.nn.Module, block: Block, cell: Cell) -> torch.optim.AdamW:
    settings = block.optimizer
    return torch.optim.AdamW(
        model.parameters(),
        lr=cell.learning_rate,
        betas=settings.betas,
        eps=settings.eps,
        weight_decay=settings.weight_decay,
        fused=True,
    )


def _settings(block: Block, cell: Cell) -> Settings:
    return Settings(
        batch=cell.batch,
        contributions=block.noise.contributions,
        every=max(1, block.noise.every_sequences // cell.batch),
        clip=block.optimizer.clip,
        curvature_every=block.noise.curvature_every,
    )


def run(
    block: Block,
    cell: Cell,
    seed: int,
    stream: Stream,
    device: str,
    resume: Path,
    fingerprint: str,
    advance: Callable[[int], None],
) -> Log:
    """Train one run to the end of its budget; the log holds rows for the job's four tables.

    After every branch the run is checkpointed to `resume` and goes on from there after a kill. A run whose
    trunk diverges is an outcome: its remaining branches are logged as diverged, with null scores. A trunk
    that stops at its loss still goes on to the branch at `branches.updates`, which every run needs.
    """
    state = new_state(block, cell, seed, stream, device)
    log = checkpoint.restore(resume, state, fingerprint)
    if log is None:
        log = {
            "windows": [],
            "events": [],
            "parts": [],
            "scores": [],
            "done": 0,
            "stopped": False,
            "lost": False,
        }
    batches, noise = Batches(stream, device), trunk_noise(block, cell, seed)
    for number, (step, at) in enumerate(branch_points(block, cell), start=1):
        if number <= log["done"]:
            continue
        if log["stopped"] and step != block.branches.updates:
            continue
        if not log["lost"] and step > state.step:
            stretch = train(
                state,
                batches,
                _settings(block, cell),
                step - state.step,
                lambda _: cell.learning_rate,
                advance,
                noise,
            )
            _add(log, TRUNK, stretch)
            log["lost"] = stretch.diverged
        _score_branch(state, batches, block, cell, stream, number, at, step, log, advance)
        log["done"] = number
        checkpoint.save(resume, state, log, fingerprint)
    return log


def _score_branch(
    trunk: State,
    batches: Batches,
    block: Block,
    cell: Cell,
    stream: Stream,
    number: int,
    at: str,
    step: int,
    log: Log,
    advance: Callable[[int], None],
) -> None:
    """Anneal a copy of the trunk linearly to learning rate 0, without its noise, and log its scores."""
    updates = anneal_updates(block, step)
    lost, branch = log["lost"], trunk
    if not lost:
        model = copy.deepcopy(trunk.model)
        optimizer = _optimizer(model, block, cell)
        optimizer.load_state_dict(copy.deepcopy(trunk.optimizer.state_dict()))
        branch = State(model, optimizer, trunk.step, trunk.sum_lr, trunk.loss_hash)

        def rate(n: int) -> float:
            return cell.learning_rate * (1 - n / updates)

        stretch = train(branch, batches, _settings(block, cell), updates, rate, advance)
        _add(log, number, stretch)
        lost = stretch.diverged
    found = {} if lost else scores(branch.model, stream, block.evaluation_sequences)
    lost = lost or not all(math.isfinite(score.value) for score in found.values())
    place = {
        "branch": number,
        "at": at,
        "trunk_sequences": step * cell.batch,
        "updates": step + updates,
        "sequences": (step + updates) * cell.batch,
        "sum_lr": branch.sum_lr,
        "status": "diverged" if lost else "finished",
    }
    for name, unit in NAMES[block.task.kind].items():
        value, stderr = (None, None) if lost else found[name]
        log["scores"].append({**place, "score": name, "value": value, "stderr": stderr, "unit": unit})
    stop = block.branches.stop_loss
    if not lost and stop is not None and found["validation_loss"].value <= stop:
        log["stopped"] = True


def _add(log: Log, segment: int, stretch: Stretch) -> None:
    for name in ("windows", "events", "parts"):
        rows = [asdict(row) for row in getattr(stretch, name)]
        # What was not measured is nan in the meter and null in a table.
        log[name] += [
            {"segment": segment, **{key: None if value != value else value for key, value in row.items()}}
            for row in rows
        ]
