"""Updates per second of the study's loop beside a plain one: same model, data, batch and optimizer, in pairs.

    python benchmarks/training.py [pairs]

The plain loop is what anybody would write after nanoGPT's train.py: take a batch, forward, backward, step. Both
draw their sequences in chunks of 4096. Logging updates are left out of the time (see pipeline.md for them);
what remains of the meter in the other updates is in it. Prints a table in Markdown.
"""

import math
import statistics
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import torch
from scipy.stats import t as student
from torch.nn.functional import cross_entropy

from gradnoise import layout
from gradnoise.registration.plan import load_plan
from gradnoise.registration.seeds import derive_seeds
from gradnoise.study import Block, Cell, load_study
from gradnoise.tasks.stream import Stream, stream
from gradnoise.training.branching import new_state
from gradnoise.training.loop import CHUNK, Batches, Settings, train


@dataclass
class Stopwatch:
    """A learning-rate schedule that notes when each update begins."""

    rate: float
    began: list[float] = field(default_factory=list)

    def __call__(self, _: int) -> float:
        self.began.append(time.perf_counter())
        return self.rate


def ours(block: Block, cell: Cell, data: Stream, updates: int) -> float:
    """Seconds for `updates` updates of the study's loop, after the one that is measured."""
    state, watch = new_state(block, cell, 1, data, "cpu"), Stopwatch(cell.learning_rate)
    settings = Settings(cell.batch, block.noise.contributions, every=updates + 1, clip=block.optimizer.clip)
    train(state, Batches(data, "cpu"), settings, updates + 1, watch, lambda _: None)
    return time.perf_counter() - watch.began[1]


def plain(block: Block, cell: Cell, data: Stream, updates: int, fused: bool) -> float:
    """Seconds for `updates` updates of a plain loop, after one update of warm-up."""
    model = new_state(block, cell, 1, data, "cpu").model
    optimizer = torch.optim.AdamW(
        model.parameters(), cell.learning_rate, block.optimizer.betas, weight_decay=0.0, fused=fused
    )
    number, start = -1, 0.0
    for n in range(updates + 1):
        if n == 1:
            start = time.perf_counter()
        chunk, offset = divmod(n * cell.batch, CHUNK)
        if chunk != number:
            number, (inputs, targets) = chunk, data.draw(chunk, CHUNK)
        x, y = inputs[offset : offset + cell.batch], targets[offset : offset + cell.batch]
        loss = cross_entropy(model(x).flatten(0, -2), y.flatten())
        loss.backward()
        if block.optimizer.clip is not None:
            torch.nn.utils.clip_grad_norm_(model.parameters(), block.optimizer.clip)
        optimizer.step()
        optimizer.zero_grad()
    return time.perf_counter() - start


def interval(ratios: list[float]) -> str:
    """Geometric mean of paired ratios with its 95 % t interval."""
    logs = [math.log(ratio) for ratio in ratios]
    mean, half = statistics.mean(logs), 0.0
    half = float(student.ppf(0.975, len(logs) - 1)) * statistics.stdev(logs) / math.sqrt(len(logs))
    return f"{math.exp(mean):.3f} [{math.exp(mean - half):.3f}, {math.exp(mean + half):.3f}]"


def main(pairs: int) -> None:
    torch.set_num_threads(1)
    study = load_study("quick")
    seed = derive_seeds(load_plan(study.plan).sha256, 1)[0]
    print(
        "| block | cell | ours / plain, default AdamW | ours / plain, fused AdamW | pairs |\n|---|---|---|---|---|"
    )
    for name, block in study.blocks.items():
        for cell in block.cells():
            corpus = Path(layout.plays("quick"))
            data = stream(block.task, seed, corpus if corpus.exists() else None)
            updates = max(8, (8192 if name == "race" else 512) // cell.batch)
            ratios: dict[bool, list[float]] = {False: [], True: []}
            for _ in range(pairs):
                for fused, found in ratios.items():
                    other = plain(block, cell, data, updates, fused)
                    found.append(other / ours(block, cell, data, updates))
            cells = " | ".join(interval(found) for found in ratios.values())
            print(f"| {name} | {cell.name} | {cells} | {pairs} |", flush=True)


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 12)
