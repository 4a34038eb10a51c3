"""By how much the choice of curvature, of the covariance's data and of clipping changes what exposure says.

    OMP_NUM_THREADS=1 python benchmarks/curvature.py [batches]

A GPT (2 layers, width 64, 1024 tokens, T = 32, B = 32) learns a Markov chain of few common and many rare
tokens with AdamW. The first table takes the same update with each proxy of curvature at steps 20, 100 and
300; the second sets readings at steps 30 and 100 beside the truth, the variance of the real update over
`batches` resampled batches (default 64; as tests/unit/noise/test_truth.py does). Prints sections in Markdown;
every draw has a fixed seed, so that a machine kind prints the same twice.
"""

import copy
import math
import sys
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterator
from typing import Any

import torch
from exposure import Gpt  # benchmarks/exposure.py
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from gradnoise import exposure
from gradnoise.noise.curvature import Inputs, kfac_diagonal
from gradnoise.noise.estimate import Estimate, ratio
from gradnoise.noise.preconditioners import learning_filter, preconditioner

WIDTH, VOCABULARY, TOKENS, BATCH, PARTS, RATE = 64, 1024, 32, 32, 8, 1e-3
PROXIES = ("mc_fisher", "kfac", "hessian", "empirical_fisher")
SENSITIVITY, TRUTH = (20, 100, 300), (30, 100)
CLASSES = ("embedding", "head", "rest")
State = tuple[nn.Module, torch.optim.Optimizer]


class Chain:
    """Sequences of a Markov chain with a few common and many rare tokens, like words (Zipf)."""

    def __init__(self, seed: int = 1) -> None:
        self.draw = torch.Generator().manual_seed(1)
        rare = torch.arange(1, VOCABULARY + 1).log()
        scores = torch.randn(VOCABULARY, VOCABULARY, generator=self.draw)
        self.steps = torch.softmax(1.5 * scores - rare, -1)
        self.draw.manual_seed(seed)

    def __call__(self, count: int) -> Tensor:
        tokens = [torch.randint(VOCABULARY, (count,), generator=self.draw)]
        for _ in range(TOKENS):
            tokens.append(torch.multinomial(self.steps[tokens[-1]], 1, generator=self.draw)[:, 0])
        return torch.stack(tokens, 1)


def losses(ids: Tensor) -> Callable[[Callable[..., Tensor]], Tensor]:
    """From a model to one loss an example of `ids`."""

    def of(model: Callable[..., Tensor]) -> Tensor:
        return cross_entropy(model(ids[:, :-1]).transpose(1, 2), ids[:, 1:], reduction="none").mean(1)

    return of


def update(state: State, ids: Tensor, clip: float | None = None) -> None:
    """One update from PARTS micro-batches."""
    net, optimizer = state
    optimizer.zero_grad()
    for part in ids.chunk(PARTS):
        (losses(part)(net).mean() / PARTS).backward()
    if clip is not None:
        nn.utils.clip_grad_norm_(net.parameters(), clip)
    optimizer.step()


def trained() -> dict[int, State]:
    """The run just before the updates that are looked at: its state by the coming step."""
    torch.manual_seed(0)
    net, chain = Gpt(WIDTH, VOCABULARY, TOKENS, layers=2), Chain()
    state = net, torch.optim.AdamW(net.parameters(), lr=RATE)
    kept = {}
    for step in range(1, max(SENSITIVITY) + 1):
        if step in {*SENSITIVITY, *TRUTH}:
            kept[step] = copy.deepcopy(state)
        update(state, chain(BATCH))
    return kept


def read(state: State, ids: Tensor, clip: float | None = None, **options: Any) -> tuple[Any, Any, State]:
    """Take an update on a copy with a meter: its reading, its ledger's parts, and the copy."""
    twin = copy.deepcopy(state)
    meter = exposure(*twin, every=1, clip=clip, **options)
    update(twin, ids, clip)
    reading = meter.last
    meter.remove()
    assert reading is not None
    return reading, meter.parts, twin


COMMAND = "```sh\nOMP_NUM_THREADS=1 python benchmarks/curvature.py\n```\n"
TASK = (
    f"A GPT (2 layers, width {WIDTH}, {VOCABULARY} tokens, T = {TOKENS}, B = {BATCH} in {PARTS} parts)\n"
    "learns a Markov chain whose tokens are as unequal as words, with AdamW at learning rate"
    f" {RATE:g}.\n"
)


# --------------------------------------------------------------------------- the proxy of curvature


def sensitivity(states: dict[int, State]) -> Iterator[str]:
    """Tr(PFP), the update's P-NE* and rho by proxy: same update, same batch, same Tr(PCP)."""
    yield "## P-NE* by proxy of curvature\n"
    yield COMMAND
    yield f"{TASK}The same update and batch for every proxy of a step; the Hessian from 16 probes.\n"
    yield "| step | proxy F | Tr(P F P), F of a token | P-NE* of the update | ρ = Tr(P C P) / Tr(P F P) |"
    yield "|---|---|---|---|---|"
    for step in SENSITIVITY:
        ids = Chain(seed=100 + step)(BATCH)
        for proxy in PROXIES:
            options = {"curvature": proxy, "losses": losses(ids), "probes": 16}
            reading, _, twin = read(states[step], ids, **options)
            yield line(step, f"`{proxy}`", reading.trace, reading.curvature)
            if proxy == "kfac":
                found = kfac_without_key_biases(twin, ids)
                yield line(step, "`kfac`, key biases left out", reading.trace, found)
    yield f"\nP-NE* = η/(BT) ρ, and η/(BT) = {RATE / (BATCH * TOKENS):.3g} throughout."


def line(step: int, name: str, trace: Estimate, curvature: Estimate) -> str:
    """C is of sequences' gradients, F of tokens': F of sequences is F / T."""
    star = ratio(trace, curvature).scaled(RATE)
    rho = ratio(trace, curvature).scaled(BATCH * TOKENS)
    cells = (f"{found.value:.3g} ± {found.stderr:.1g}" for found in (curvature, star, rho))
    return f"| {step} | {name} | {' | '.join(cells)} |"


def kfac_without_key_biases(state: State, ids: Tensor) -> Estimate:
    """K-FAC's diagonal where P is 0 at the biases of attention keys.

    Softmax does not see them, so their gradient is 0 and AdamW's P about 1/eps. Their scores cancel within a
    sequence, which K-FAC, that takes tokens to be independent, does not know.
    """
    net, optimizer = state
    p = {q: preconditioner(optimizer, q).view_as(q).clone() for q in net.parameters()}
    for name, q in net.named_parameters():
        if name.endswith("qkv.bias"):
            p[q][WIDTH : 2 * WIDTH] = 0
    inputs: list[Inputs] = [((part[:, :-1],), {}) for part in ids.chunk(PARTS)]
    return kfac_diagonal(net, inputs, p, torch.Generator().manual_seed(0))


# --------------------------------------------------------------------------- against the truth


def moved(before: nn.Module, after: State) -> dict[str, Tensor]:
    """All that the update's gradient will ever add, by tensor, from what this step added."""
    net, optimizer = after
    found = {}
    for (name, new), old in zip(net.named_parameters(), before.parameters(), strict=True):
        filtered = learning_filter(optimizer, new, 1.0)
        found[name] = ((new - old).detach() * (filtered.total / filtered.instant)).double().flatten()
    return found


def class_of(name: str) -> str:
    first = name.split(".")[0]
    return {"tokens": "embedding", "positions": "embedding", "head": "head"}.get(first, "rest")


def by_class(parts: list[Any]) -> dict[str, float]:
    """eta^2 Tr(P C/B P) of one update, embeddings and head apart from the rest."""
    found: dict[str, float] = defaultdict(float)
    for part in parts:
        if part.kind == "tensor":
            found[class_of(part.part)] += part.sum_lr2 * part.trace_pcp
    return found


def clip_of(state: State) -> float:
    """Half the norm of a typical batch's gradient, so that every batch is clipped."""
    net, ids = copy.deepcopy(state[0]), Chain(seed=7)(BATCH)
    net.zero_grad()
    losses(ids)(net).mean().backward()
    return nn.utils.get_total_norm([p.grad for p in net.parameters() if p.grad is not None]).item() / 2


WAYS: dict[str, dict[str, Any]] = {
    "the meter (P expected, same batch)": {},
    "P of the step before (`p='state'`), same batch": {"p": "state"},
    "held-out shards, P of the step before": {"estimator": "held_out", "p": "state"},
}
WAYS_CLIPPED: dict[str, dict[str, Any]] = {
    "s² × potential (the meter)": {},
    "each micro-batch clipped (`clip_each`)": {"effective": "clip_each"},
    "the real step with lighter micro-batches (`jackknife`)": {"effective": "jackknife"},
}
Rows = dict[str, dict[str, list[float]]]  # by way of reading and class, one value a batch


def collect(state: State, batches: int, clip: float | None) -> tuple[Rows, dict[str, list[Tensor]]]:
    """Readings of every batch, by way and class, and the real updates by tensor."""
    chain, readings = Chain(seed=11), defaultdict(lambda: defaultdict(list))
    moves: dict[str, list[Tensor]] = defaultdict(list)
    ways = WAYS if clip is None else WAYS_CLIPPED
    for _ in range(batches):
        ids, held = chain(BATCH), chain(BATCH)
        for number, (way, options) in enumerate(ways.items()):
            reading, parts, twin = read(state, ids, clip, held_out=losses(held), **options)
            if clip is None:
                for name, value in by_class(parts).items():
                    readings[way][name].append(value)
            else:
                readings[way]["whole"].append(RATE**2 * reading.effective.value)
            if number == 0:
                for name, move in moved(state[0], twin).items():
                    moves[name].append(move)
    return readings, moves


def variances(moves: dict[str, list[Tensor]]) -> dict[str, tuple[float, float]]:
    """Total variance of the updates over batches by class and in all, with relative jackknife errors."""
    found = {}
    for kind in (*CLASSES, "whole"):
        names = [name for name in moves if kind in ("whole", class_of(name))]
        rows = torch.stack(
            [torch.cat([moves[name][n] for name in names]) for n in range(len(moves[names[0]]))]
        )
        squares = (rows - rows.mean(0)).square().sum(1) * len(rows) / (len(rows) - 1)
        found[kind] = squares.mean().item(), (squares.std() / math.sqrt(len(rows)) / squares.mean()).item()
    return found


def over(values: list[float], truth: tuple[float, float]) -> str:
    """Mean reading over the truth, with the standard error of both."""
    row = torch.tensor(values, dtype=torch.float64)
    mean = row.mean().item()
    error = math.hypot((row.std() / math.sqrt(len(row))).item() / mean, truth[1])
    found = mean / truth[0]
    return f"{found:.3f} ± {found * error:.3f}" if found < 100 else f"{found:.2g} ± {found * error:.1g}"


def misleading(states: dict[int, State], batches: int) -> Iterator[str]:
    """What papers propose over the truth: covariance of held-out data, and micro-batches clipped alone."""
    yield "## What papers propose, beside the truth\n"
    yield COMMAND
    yield "Mean reading over the variance of the real update from one state, both over the same"
    yield f"{batches} batches, with the standard error of both. Potential exposure, no clipping:\n"
    yield "| step | covariance and P | embeddings | head | rest |"
    yield "|---|---|---|---|---|"
    for step in TRUTH:
        readings, moves = collect(states[step], batches, None)
        truth = variances(moves)
        for way, found in readings.items():
            cells = (over(found[kind], truth[kind]) for kind in CLASSES)
            yield f"| {step} | {way} | {' | '.join(cells)} |"
    yield "\nEffective exposure of the whole model, every batch clipped at half a typical norm:\n"
    yield "| step | effective | reading / truth |"
    yield "|---|---|---|"
    for step in TRUTH:
        readings, moves = collect(states[step], batches, clip_of(states[step]))
        truth = variances(moves)
        for way, found in readings.items():
            yield f"| {step} | {way} | {over(found['whole'], truth['whole'])} |"


def main(batches: int) -> None:
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", message="curvature empirical_fisher")
    states = trained()
    for section in (sensitivity(states), misleading(states, batches)):
        for line in section:
            print(line, flush=True)
        print(flush=True)


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 64)
