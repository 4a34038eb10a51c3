"""What a measured update costs beside a plain one, by cell of the quick study.

    python benchmarks/logging_steps.py [rounds]

CPU seconds of one thread: updates that are all measured over updates of which only the first is, in turn. The
last column is what the study's stride makes of it: the time that measuring adds to training. Prints Markdown.
"""

import statistics
import sys
import time
from pathlib import Path

import torch

from gradnoise.base import layout
from gradnoise.base.study import Block, Cell, load_study
from gradnoise.tasks.stream import Stream, stream
from gradnoise.training.branching import new_state
from gradnoise.training.loop import Batches, Settings, train


def seconds(block: Block, cell: Cell, data: Stream, updates: int, every: int) -> float:
    state, batches = new_state(block, cell, 1, data, "cpu"), Batches(data, "cpu")
    settings = Settings(cell.batch, block.noise.contributions, every, block.optimizer.clip)
    began = time.process_time()
    train(state, batches, settings, updates, lambda _: cell.learning_rate, lambda _: None)
    return (time.process_time() - began) / updates


def main(rounds: int) -> None:
    torch.set_num_threads(1)
    study = load_study("quick")
    print("| block | cell | measured / plain update | one in | adds |\n|---|---|---|---|---|")
    for name, block in study.blocks.items():
        for cell in (cell for cell in block.cells() if cell.noise is None):
            data = stream(block.task, 1, Path(layout.plays("quick")))
            updates = max(4, (2048 if name == "race" else 256) // cell.batch)
            ratios = []
            for _ in range(rounds):
                plain = seconds(block, cell, data, updates, every=updates)
                ratios.append(seconds(block, cell, data, updates, every=1) / plain)
            # The plain stretch holds one measured update too: r = m n / (m + (n - 1) p), solved for m / p.
            ratio = statistics.median(ratios)
            ratio = ratio * (updates - 1) / (updates - ratio)
            stride = max(1, block.noise.every_sequences // cell.batch)
            added = (ratio - 1) / stride
            print(f"| {name} | {cell.name} | {ratio:.2f} | {stride} | {added:.1%} |", flush=True)


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 7)
