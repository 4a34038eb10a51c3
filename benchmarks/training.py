"""Updates per second of the study's loop beside a plain one: same model, data, batch and optimizer, in pairs.

    python benchmarks/training.py [pairs]

The plain loop is what anybody would write after nanoGPT's train.py: take a batch, forward, backward, step.
Both draw their sequences in chunks of 4096. Times are CPU seconds of one thread, after three updates of
warm-up. The measured update is the first of these, so logging is left out (see pipeline.md); what remains of
the meter in the other updates is in. Prints a table in Markdown.
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

from gradnoise.base import layout
from gradnoise.base.study import Block, Cell, load_study
from gradnoise.registration.plan import load_plan
from gradnoise.registration.seeds import derive_seeds
from gradnoise.tasks.stream import Stream, stream
from gradnoise.training.branching import new_state
from gradnoise.training.loop import CHUNK, Batches, Settings, train

WARM_UP = 3


@dataclass
class Stopwatch:
    """A learning-rate schedule that notes when each update begins."""

    rate: float
    began: list[float] = field(default_factory=list)

    def __call__(self, _: int) -> float:
        self.began.append(time.process_time())
        return self.rate


def ours(block: Block, cell: Cell, data: Stream, updates: int) -> float:
    """CPU seconds for `updates` updates of the study's loop."""
    state, watch = new_state(block, cell, 1, data, "cpu"), Stopwatch(cell.learning_rate)
    updates += WARM_UP
    settings = Settings(cell.batch, block.noise.contributions, every=updates, clip=block.optimizer.clip)
    train(state, Batches(data, "cpu"), settings, updates, watch, lambda _: None)
    return time.process_time() - watch.began[WARM_UP]


def plain(block: Block, cell: Cell, data: Stream, updates: int, fused: bool) -> float:
    """CPU seconds for `updates` updates of a plain loop."""
    model = new_state(block, cell, 1, data, "cpu").model
    optimizer = torch.optim.AdamW(
        model.parameters(), cell.learning_rate, block.optimizer.betas, weight_decay=0.0, fused=fused
    )
    number, start = -1, 0.0
    for n in range(updates + WARM_UP):
        if n == WARM_UP:
            start = time.process_time()
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
    return time.process_time() - start


def interval(ratios: list[float]) -> str:
    """Geometric mean of paired ratios with its 95 % t interval."""
    logs = [math.log(ratio) for ratio in ratios]
    mean = statistics.mean(logs)
    half = float(student.ppf(0.975, len(logs) - 1)) * statistics.stdev(logs) / math.sqrt(len(logs))
    return f"{math.exp(mean):.3f} [{math.exp(mean - half):.3f}, {math.exp(mean + half):.3f}]"


def main(pairs: int) -> None:
    torch.set_num_threads(1)
    study = load_study("quick")
    seed = derive_seeds(load_plan(study.plan).sha256, 1)[0]
    print("| block | cell | ours / plain, default AdamW | ours / plain, fused AdamW | pairs |")
    print("|---|---|---|---|---|")
    for name, block in study.blocks.items():
        for cell in (cell for cell in block.cells() if cell.noise is None):
            corpus = Path(layout.plays("quick"))
            data = stream(block.task, seed, corpus if corpus.exists() else None)
            updates = max(8, (8192 if name == "race" else 512) // cell.batch)
            ratios: dict[bool, list[float]] = {False: [], True: []}
            for pair in range(pairs):
                for fused, found in ratios.items():
                    # Turn about, so that a machine that slows down or speeds up favours neither.
                    if pair % 2:
                        own = ours(block, cell, data, updates)
                        other = plain(block, cell, data, updates, fused)
                    else:
                        other = plain(block, cell, data, updates, fused)
                        own = ours(block, cell, data, updates)
                    found.append(other / own)
            cells = " | ".join(interval(found) for found in ratios.values())
            print(f"| {name} | {cell.name} | {cells} | {pairs} |", flush=True)


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 12)
