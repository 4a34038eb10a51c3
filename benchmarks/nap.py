"""What injected and aligned noise cost over the optimizer that they are attached to.

    OMP_NUM_THREADS=1 python benchmarks/nap.py [rounds] [rank width tokens sources optimizers memory]

CPU seconds of one thread on the GPT of benchmarks/exposure.py (1 063 680 parameters; T = 64, B = 32). Each
round times ten updates without and with noise, one after the other, taking turns which goes first; the median
of the rounds' ratios is given with its 95 % bootstrap interval. Prints sections in Markdown, all or those
that are named.
"""

import sys
from collections.abc import Callable
from typing import Any

import torch
from exposure import PARAMETERS, Case, Clock, Run, compare, timed
from torch import nn

from gradnoise import align_noise, gaussian, inject, student_t
from gradnoise.noise.injection.sources import Source
from gradnoise.optim.nap import Alignment

UPDATES, ROUNDS = 10, 9
# So little that training goes on as without; the work is the same.
TEMPERATURE, DEVIATION = 1e-12, 1e-9
Attach = Callable[[Run], object]


def updates(run: Run, parts: int) -> Clock:
    return lambda: timed(lambda: [run.step(parts) for _ in range(UPDATES)])


def case(name: str, attach: Attach, note: str = "", parts: int = 1, **settings: Any) -> Case:
    """The same run without and with what `attach` adds."""
    optimizer = settings.pop("optimizer", None)
    runs = Run(**settings), Run(**settings)
    if optimizer is not None:
        for run in runs:
            run.optimizer = optimizer(run.net)
    attach(runs[1])
    return Case(name, updates(runs[0], parts), updates(runs[1], parts), note)


def aligned(**options: Any) -> Attach:
    return lambda run: align_noise(
        run.optimizer, run.net, mode="absolute", temperature=TEMPERATURE, **options
    )


def injected(source: Source, where: Any) -> Attach:
    return lambda run: inject(run.optimizer, source, where=where, model=run.net)


def rank() -> list[Case]:
    found = [case(f"rank {r}", aligned(rank=r)) for r in (8, 16, 32, 64)]
    return [
        case("isotropic, no sketch", aligned(rank=1, alignment=0.0, sketch_every=1 << 30)),
        *found,
        case("rank 16, sketch every update", aligned(rank=16, sketch_every=1)),
        case("rank 16, target tasks, of 4 micro-batches", aligned(rank=16, target="tasks"), parts=4),
    ]


def width() -> list[Case]:
    return [
        case(
            f"width {w}",
            aligned(rank=16),
            f"{sum(p.numel() for p in Run(w).net.parameters()):,} parameters",
            width=w,
        )
        for w in (64, 128, 256)
    ]


def tokens() -> list[Case]:
    return [case(f"{64 * b:,} tokens an update", aligned(rank=16), batch=b) for b in (8, 32, 128)]


def sources() -> list[Case]:
    normal = gaussian(DEVIATION)
    return [
        case("gaussian, post", injected(normal, "post")),
        case("gaussian, pre", injected(normal, "pre")),
        case("gaussian, frozen_v", injected(normal, "frozen_v")),
        case("Student t iid, post", injected(student_t(DEVIATION), "post")),
        case("Student t elliptical, post", injected(student_t(DEVIATION, kind="elliptical"), "post")),
    ]


def optimizers() -> list[Case]:
    kinds: dict[str, Callable[[nn.Module], torch.optim.Optimizer]] = {
        "AdamW, fused": lambda net: torch.optim.AdamW(net.parameters(), lr=1e-3, fused=True),
        "Adafactor": lambda net: torch.optim.Adafactor(net.parameters(), lr=1e-2),
        "SGD, momentum": lambda net: torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9),
        "RMSprop": lambda net: torch.optim.RMSprop(net.parameters(), lr=1e-3),
    }
    return [case(name, aligned(rank=16), optimizer=kind) for name, kind in kinds.items()]


def memory() -> None:
    """Numbers that sketches hold, beside r (inputs + outputs) of their matrices and beside the model."""
    print(
        "\n| target | rank | numbers kept | r (i + o) of the matrices | of the model |\n|---|---|---|---|---|"
    )
    for target in ("features", "tasks"):
        for r in (8, 16, 32, 64):
            run = Run()
            noise = align_noise(run.optimizer, run.net, rank=r, target=target, temperature=0.0)
            kept = held(noise)
            sides = [weight.place.parameter.shape for shape in noise.shapes for weight in shape.weights]
            formula = sum(r * (rows + columns) for rows, columns in sides)
            print(f"| {target} | {r} | {kept:,} | {formula:,} | {kept / PARAMETERS:.1%} |")


def held(noise: Alignment) -> int:
    state = noise.state_dict()["sources"][1]
    return sum(
        value.numel() for sketch in state.values() for value in sketch.values() if hasattr(value, "numel")
    )


SECTIONS: dict[str, Callable[[], list[Case]]] = {
    "rank": rank,
    "width": width,
    "tokens": tokens,
    "sources": sources,
    "optimizers": optimizers,
}


def main(arguments: list[str]) -> None:
    torch.set_num_threads(1)
    rounds = int(arguments.pop(0)) if arguments and arguments[0].isdigit() else ROUNDS
    for name, section in SECTIONS.items():
        if arguments and name not in arguments:
            continue
        print(f"\n### {name}\n\n| | with noise / without | 95 % | |\n|---|---|---|---|")
        for found in compare(section(), rounds):
            if not found.ratios:
                print(f"| {found.name} | | | {found.note} |")
                continue
            ratio, low, high = found.estimate()
            print(f"| {found.name} | {ratio:.3f} | {low:.3f} to {high:.3f} | {found.note} |", flush=True)
    if not arguments or "memory" in arguments:
        memory()


if __name__ == "__main__":
    main(sys.argv[1:])
