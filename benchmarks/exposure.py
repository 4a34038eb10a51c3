"""What the meter costs: a measured step beside a plain AdamW step, and other people's libraries beside it.

    OMP_NUM_THREADS=1 python benchmarks/exposure.py [rounds] [ours every idle peers cost]
    python benchmarks/exposure.py plot    # draws exposure-cost.svg anew from exposure-cost.csv

CPU seconds of one thread on a GPT of 1 063 680 parameters (4 layers, width 128, 4 heads, 1024 tokens, untied
head; T = 64, B = 32). Each round times a plain and a measured step (or a stretch of steps) of every case one
after the other and takes turns which goes first; the median of the rounds' ratios is given with its 95 %
bootstrap interval. Prints sections in Markdown, all or those that are named. `cost` writes exposure-cost.csv
and exposure-cost.svg too.
"""

import copy
import csv
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import cross_entropy, gelu, scaled_dot_product_attention

from gradnoise import exposure
from gradnoise.figures import style
from gradnoise.noise.preconditioners import preconditioner

HERE = Path(__file__).parent
PARAMETERS = 1_063_680
STRIDE, STRETCH, ROUNDS = 100, 20, 9
Clock = Callable[[], float]  # does something, and returns its CPU seconds


# --------------------------------------------------------------------------- the model and its steps


class Block(nn.Module):
    """Pre-norm attention and MLP."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm, self.norm_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm(x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        mixed = scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(mixed.transpose(1, 2).flatten(2))
        moved: Tensor = x + self.down(gelu(self.up(self.norm_2(x))))
        return moved


class Gpt(nn.Module):
    """Untied head without bias, learned positions; `expand`: position ids (B, T), as Opacus needs them."""

    def __init__(
        self,
        width: int = 128,
        vocabulary: int = 1024,
        tokens: int = 64,
        layers: int = 4,
        expand: bool = False,
    ) -> None:
        super().__init__()
        self.expand = expand
        self.tokens, self.positions = nn.Embedding(vocabulary, width), nn.Embedding(tokens, width)
        self.layers = nn.Sequential(*(Block(width, 4) for _ in range(layers)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, vocabulary, bias=False)
        for table in (self.tokens, self.positions):
            nn.init.normal_(table.weight, std=0.02)

    def forward(self, ids: Tensor) -> Tensor:
        places = torch.arange(ids.shape[1])[None]
        x = self.tokens(ids) + self.positions(places.expand_as(ids) if self.expand else places)
        logits: Tensor = self.head(self.norm(self.layers(x)))
        return logits


class Run:
    """A model in training, some updates old: random tokens, AdamW as PyTorch has it by default."""

    def __init__(self, width: int = 128, batch: int = 32, expand: bool = False) -> None:
        torch.manual_seed(0)
        self.net = Gpt(width, expand=expand)
        self.call: Callable[[Tensor], Tensor] = self.net
        self.optimizer = torch.optim.AdamW(self.net.parameters(), lr=1e-3)
        self.draw = torch.Generator().manual_seed(1)
        self.batch = batch
        self.ids = self.new()
        for _ in range(3):
            self.step()

    def new(self) -> Tensor:
        return torch.randint(1024, (self.batch, 65), generator=self.draw)

    def loss(self, ids: Tensor) -> Tensor:
        return cross_entropy(self.call(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten())

    def losses(self, model: Callable[..., Tensor]) -> Tensor:
        """One loss an example of the current batch, as the meter's `losses` asks for."""
        rows = cross_entropy(model(self.ids[:, :-1]).transpose(1, 2), self.ids[:, 1:], reduction="none")
        return rows.mean(1)

    def backward(self, parts: int = 1) -> None:
        self.ids = self.new()
        self.optimizer.zero_grad()
        for part in self.ids.chunk(parts):
            (self.loss(part) / parts).backward()

    def step(self, parts: int = 1) -> None:
        """One update, its batch in `parts` micro-batches."""
        self.backward(parts)
        self.optimizer.step()


def timed(work: Callable[[], object]) -> float:
    began = time.process_time()
    work()
    return time.process_time() - began


def plain(run: Run, parts: int = 1, steps: int = 1) -> Clock:
    """Updates without a meter."""
    return lambda: timed(lambda: [run.step(parts) for _ in range(steps)])


def measured(run: Run, parts: int = 1, steps: int = 1, every: Any = 1, **options: Any) -> Clock:
    """Updates with a meter, attached before and removed after the clock runs; its reading is taken once.

    Arming the meter for the next update is in, since one attached earlier armed itself in the update before.
    """

    def clock() -> float:
        meter = exposure(run.net, run.optimizer, every=every, losses=run.losses, **options)

        def work() -> None:
            for _ in range(steps):
                run.step(parts)
            if every == 1:
                assert meter.last is not None
                assert meter.last.trace.value > 0

        try:
            return timed(work)
        finally:
            meter.remove()

    return clock


# --------------------------------------------------------------------------- pairs in turns


@dataclass
class Case:
    """What is compared with what, and the ratios found. `note`: said beside it in the table."""

    name: str
    base: Clock
    other: Clock
    note: str = ""
    ratios: list[float] = field(default_factory=list)

    def estimate(self) -> tuple[float, float, float]:
        """Median of the ratios and its 95 % bootstrap interval (10 000 draws, fixed seed)."""
        values = np.array(self.ratios)
        chosen = np.random.default_rng(0).integers(len(values), size=(10_000, len(values)))
        low, high = np.quantile(np.median(values[chosen], axis=1), [0.025, 0.975])
        return float(np.median(values)), float(low), float(high)


def compare(cases: list[Case], rounds: int) -> list[Case]:
    """Time every case `rounds` times, after one pair for warming up; those that cannot run say why."""
    for case in cases:
        try:
            case.base(), case.other()
        except Exception as error:  # a peer's refusal is a result
            case.note = f"does not run: {type(error).__name__}: {str(error).splitlines()[0][:110]}"
    running = [case for case in cases if not case.note.startswith("does not run")]
    for number in range(rounds):
        for case in running:
            # Turn about, so that a machine that slows down or speeds up favours neither.
            if number % 2:
                other, base = case.other(), case.base()
            else:
                base, other = case.base(), case.other()
            case.ratios.append(other / base)
    return cases


def shown(estimate: tuple[float, float, float], form: str) -> str:
    value, low, high = (format(number, form) for number in estimate)
    return f"{value} [{low}, {high}]"


def table(cases: list[Case], columns: tuple[str, str, str], stride: int = STRIDE) -> Iterator[str]:
    """Lines of a Markdown table: name, ratio, and what a measured step in `stride` adds."""
    yield f"| {' | '.join(columns)} | |"
    yield "|---|---|---|---|"
    for case in cases:
        if case.ratios:
            found = case.estimate()
            adds = tuple((number - 1) / stride for number in found)
            yield f"| {case.name} | {shown(found, '.3f')} | {shown(adds, '.2%')} | {case.note} |"
        else:
            yield f"| {case.name} | | | {case.note} |"


# --------------------------------------------------------------------------- sections


def command(section: str) -> str:
    return f"```sh\nOMP_NUM_THREADS=1 python benchmarks/exposure.py {ROUNDS} {section}\n```\n"


def ours(rounds: int) -> Iterator[str]:
    """Measured steps by estimator and option."""
    run = Run()
    count = sum(p.numel() for p in run.net.parameters())
    assert count == PARAMETERS, count
    one, eight = plain(run), plain(run, 8)
    own = {"parts": 8, "estimator": "micro"}
    cases = [
        Case("no meter, batch split into 8", one, eight, "of the rows with own splitting, the splitting"),
        Case("`micro`, own splitting into 8", one, measured(run, **own)),
        Case("`micro`, the run accumulates 8", eight, measured(run, **own)),
        Case("`micro`, the run accumulates 8, `share=0.1`", eight, measured(run, share=0.1, **own)),
        Case("`example`, all 32", one, measured(run, estimator="example")),
        Case("`example`, first 16", one, measured(run, estimator="example", examples=16)),
        Case("`example`, first 8", one, measured(run, estimator="example", examples=8)),
        Case("`auto` (one backward: `example`, first 8)", one, measured(run)),
        Case("`hutchinson`, 2 probes", one, measured(run, estimator="hutchinson", probes=2)),
        Case("`micro` + `tails`", one, measured(run, tails=True, **own), "own splitting"),
        Case("`micro` + `sketch=256`", one, measured(run, sketch=256, **own), "own splitting"),
        Case("`micro` + jackknife", one, measured(run, effective="jackknife", **own), "own splitting"),
        Case("`micro` + `mc_fisher`", one, measured(run, curvature="mc_fisher", **own), RARE),
        Case("`micro` + `kfac`", one, measured(run, curvature="kfac", **own), RARE),
        Case("`micro` + `hessian`, 2 probes", one, measured(run, curvature="hessian", probes=2, **own), RARE),
    ]
    yield "## A measured step beside a plain one\n"
    yield command("ours")
    yield (
        "A plain step is one backward pass of the whole batch, or eight where the run accumulates 8.\n"
        "The meter's reading is taken once a measured step, in the clock.\n"
    )
    yield from table(
        compare(cases, rounds), ("measured step", "measured / plain", f"adds at one in {STRIDE}")
    )


RARE = "own splitting; every 10th event by default"


def every(rounds: int) -> Iterator[str]:
    """Estimator norms at every step of runs that accumulate, by long stretches."""
    run = Run()
    cases = [
        Case(
            f"`norms`, the run accumulates {parts}",
            plain(run, parts, STRETCH),
            measured(run, parts, STRETCH, estimator="norms"),
        )
        for parts in (4, 8)
    ]
    yield f"## Every step measured, in stretches of {STRETCH} steps\n"
    yield command("every")
    yield "`norms` in runs that accumulate anyway; one reading a stretch.\n"
    columns = ("every step", "meter on / off", "adds")
    yield from table(compare(cases, rounds), columns, 1)


def idle(rounds: int) -> Iterator[str]:
    """A meter that is attached and measures nothing."""
    run = Run()
    cases = [
        Case(
            f"{parts} backward() an update",
            plain(run, parts, STRETCH),
            measured(run, parts, STRETCH, every=lambda _: False),
        )
        for parts in (1, 8)
    ]
    yield f"## Updates that are not measured, in stretches of {STRETCH} steps\n"
    yield command("idle")
    yield "A meter is attached whose schedule never says yes.\n"
    columns = ("meter attached, nothing due", "attached / none", "adds")
    yield from table(compare(cases, rounds), columns, 1)


# --------------------------------------------------------------------------- peers

Traces = dict[str, float]  # Tr(P C/B P) by tensor, P as it is after the step


def noise_of(square: Tensor, gradient: Tensor, p: Tensor, size: int) -> float:
    """B/(B-1) [sum_b |P h_b|^2 - |P g|^2 / B] of a tensor from sum_b h_b^2 (elementwise), g and P."""
    centred = square - gradient.square() / size
    return size / (size - 1) * (centred * p.square()).sum().item()


def traces_of(run: Run, square: Callable[[nn.Parameter], Tensor | None]) -> Traces:
    """What a peer's second moments make of the step just done; tensors without one are left out."""
    found = {}
    for name, q in run.net.named_parameters():
        moment = square(q)
        if moment is not None and q.grad is not None:
            found[name] = noise_of(moment, q.grad, preconditioner(run.optimizer, q), run.batch)
    return found


def opacus_step(run: Run) -> Callable[[], Traces]:
    """GradSampleModule: grad_sample (B, ...) = B h_b by hooks in the run's own backward pass."""
    from opacus import GradSampleModule

    run.call = GradSampleModule(run.net)

    def step() -> Traces:
        run.step()
        found = traces_of(run, lambda q: (q.grad_sample / run.batch).square_().sum(0))
        for q in run.net.parameters():
            q.grad_sample = None
        return found

    return step


def backpack_step(run: Run) -> Callable[[], Traces]:
    """SumGradSquared on Linear layers: sum_b h_b^2 without h_b, in the run's own backward pass."""
    from backpack import backpack, extend
    from backpack.extensions import SumGradSquared

    for layer in run.net.modules():
        if isinstance(layer, nn.Linear):
            extend(layer)

    def step() -> Traces:
        with backpack(SumGradSquared()):
            run.backward()
        run.optimizer.step()
        found = traces_of(run, lambda q: getattr(q, "sum_grad_squared", None))
        for q in run.net.parameters():
            if hasattr(q, "sum_grad_squared"):
                del q.sum_grad_squared
        return found

    return step


def vmap_step(run: Run, chunk: int | None, replace: bool) -> Callable[[], Traces]:
    """vmap(grad) beside or in place of the run's own backward pass."""

    def loss(values: dict[str, Tensor], ids: Tensor) -> Tensor:
        logits = functional_call(run.net, values, (ids[None, :-1],))
        return cross_entropy(logits[0], ids[1:]) / run.batch

    examples = vmap(grad(loss), in_dims=(None, 0), chunk_size=chunk)

    def step() -> Traces:
        if replace:
            run.ids = run.new()
        else:
            run.backward()
        values = {name: q.detach() for name, q in run.net.named_parameters()}
        with sdpa_kernel(SDPBackend.MATH):  # vmap falls back to a loop over the fused one
            rows = examples(values, run.ids)
        by_parameter = {q: rows[name] for name, q in run.net.named_parameters()}
        if replace:
            for q, row in by_parameter.items():
                q.grad = row.sum(0)
        run.optimizer.step()
        return traces_of(run, lambda q: by_parameter[q].square_().sum(0))

    return step


def curvlinops_step(run: Run, kind: str) -> Callable[[], float]:
    """A plain step, then one Hutchinson probe z' P F P z, z = +-1: one product with curvlinops' operator."""
    import curvlinops

    flat = nn.Sequential(run.net, nn.Flatten(0, 1))
    parameters = list(run.net.parameters())

    def step() -> float:
        run.step()
        data = [(run.ids[:, :-1], run.ids[:, 1:].flatten())]
        operator = getattr(curvlinops, kind)(
            flat, nn.CrossEntropyLoss(), parameters, data, check_deterministic=False
        )
        p = torch.cat([preconditioner(run.optimizer, q).flatten() for q in parameters])
        probe = p * (torch.randint(0, 2, p.shape, generator=run.draw) * 2 - 1)
        with sdpa_kernel(SDPBackend.MATH):  # the fused one has neither forward mode nor double backward
            return torch.dot(probe, operator @ probe).item()

    return step


def agreement(step: Callable[[], Traces], run: Run) -> str:
    """A peer's next step against ours on a run in the same state: relative difference of the traces."""
    twin = Run(expand=run.net.expand)
    twin.draw.set_state(run.draw.get_state())
    twin.net.load_state_dict(run.net.state_dict())
    twin.optimizer.load_state_dict(copy.deepcopy(run.optimizer.state_dict()))
    meter = exposure(twin.net, twin.optimizer, every=1, estimator="example", p="step")
    twin.step()
    meter.remove()
    own = {part.part: part.trace_pcp for part in meter.parts if part.kind == "tensor"}
    theirs = step()
    apart = abs(sum(theirs.values()) / sum(own[name] for name in theirs) - 1)
    return f"{len(theirs)} of {len(own)} tensors; from ours by {apart:.0e}"


def peer(
    name: str, make: Callable[[Run], Callable[[], Any]], same: bool = True, expand: bool = False
) -> Case:
    """A peer's step beside a plain one of another run; `same`: it gives our quantity; values are compared."""
    run, base = Run(expand=expand), plain(Run())
    try:
        step = make(run)
        note = agreement(step, run) if same else "one product with the operator"
    except Exception as error:
        return Case(name, base, base, f"does not run: {type(error).__name__}: {str(error)[:110]}")
    return Case(name, base, lambda: timed(step), note)


def peers(rounds: int) -> Iterator[str]:
    """Other people's libraries on the same model, as far as they give the same quantity."""
    run = Run()
    cases = [
        Case("ours, `example`, all 32", plain(run), measured(run, estimator="example")),
        Case("ours, `example`, first 8", plain(run), measured(run, estimator="example", examples=8)),
        peer("Opacus 1.6.0 `GradSampleModule`", opacus_step, expand=True),
        peer("BackPACK 1.7.1 `SumGradSquared`, Linear layers", backpack_step),
        peer("`vmap(grad)`, an extra pass, chunks of 8", lambda run: vmap_step(run, 8, replace=False)),
        peer("`vmap(grad)` in place of backward()", lambda run: vmap_step(run, None, replace=True)),
        Case("ours, `example`, first 8, + `mc_fisher`", plain(run), measured(run, curvature="mc_fisher")),
        Case(
            "ours, the same + `hessian`, 2 probes", plain(run), measured(run, curvature="hessian", probes=2)
        ),
        *(
            peer(f"curvlinops 3.0.1 `{kind}`", lambda run, kind=kind: curvlinops_step(run, kind), same=False)
            for kind in ("EFLinearOperator", "GGNLinearOperator", "HessianLinearOperator")
        ),
    ]
    yield "## Beside other libraries\n"
    yield command("peers")
    yield (
        "The same model, and the trace Tr(P C/B P) with P of the step just done, from what a library gives.\n"
        "Before timing, its value is compared with ours on the same step. curvlinops gives one Hutchinson\n"
        "probe of Tr(P F P) a product; the meter's curvature is beside it.\n"
    )
    yield from table(compare(cases, rounds), ("step", "with / plain", f"adds at one in {STRIDE}"))


# --------------------------------------------------------------------------- cost against width and batch

WAYS: dict[str, dict[str, Any]] = {
    "micro, own splitting into 8": {"parts": 8, "estimator": "micro"},
    "example, first 8": {"estimator": "example", "examples": 8},
    "example, all": {"estimator": "example"},
}
SIZES = ((64, 32), (128, 32), (256, 32), (128, 8), (128, 128))
COLUMNS = ("width", "batch", "parameters", "estimator", "ratio", "low", "high", "rounds")


def cost(rounds: int) -> Iterator[str]:
    """Measured over plain step by model width and batch; leaves the figure and its data."""
    rows: list[dict[str, Any]] = []
    for width, batch in SIZES:
        run = Run(width, batch)
        count = sum(p.numel() for p in run.net.parameters())
        for case in compare([Case(n, plain(run), measured(run, **o)) for n, o in WAYS.items()], rounds):
            values = (width, batch, count, case.name, *case.estimate(), rounds)
            rows.append(dict(zip(COLUMNS, values, strict=True)))
    with (HERE / "exposure-cost.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    draw()
    yield "## Against width and batch\n"
    yield command("cost")
    yield "![Measured over plain step against model width and batch size](exposure-cost.svg)\n"
    yield f"| width | batch | {' | '.join(f'`{name}`' for name in WAYS)} |"
    yield f"|---|---|{'---|' * len(WAYS)}"
    for first in range(0, len(rows), len(WAYS)):
        of_size = rows[first : first + len(WAYS)]
        cells = (shown((r["ratio"], r["low"], r["high"]), ".2f") for r in of_size)
        yield f"| {of_size[0]['width']} | {of_size[0]['batch']} | {' | '.join(cells)} |"
    yield "\nData: [exposure-cost.csv](exposure-cost.csv)."


def draw() -> None:
    """exposure-cost.svg from exposure-cost.csv: the same bytes for the same data."""
    with (HERE / "exposure-cost.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    with style.applied("exposure-cost"):
        figure = Figure(figsize=(style.WIDTH, 2.6))
        left, right = figure.subplots(1, 2, sharey=True)
        of_width = [row for row in rows if row["batch"] == "32"]
        of_batch = [row for row in rows if row["width"] == "128"]
        panel(left, of_width, "width", "width of the model (B = 32)")
        panel(right, of_batch, "batch", "sequences in a batch (d = 128)")
        left.set_ylabel("measured / plain step")
        right.legend(loc="upper right")
        metadata = {
            "Title": "Cost of a measured step against model width and batch size",
            "Creator": "gradnoise",
            "Date": None,
        }
        figure.savefig(HERE / "exposure-cost.svg", format="svg", metadata=metadata)


def panel(axes: Axes, rows: list[dict[str, str]], along: str, label: str) -> None:
    """Ratio with its interval against `along`, a line a way of measuring."""
    for n, name in enumerate(WAYS):
        own = sorted((r for r in rows if r["estimator"] == name), key=lambda r: int(r[along]))
        x = np.array([int(r[along]) for r in own]) * 1.04 ** (n - 1)  # beside each other, not on top
        y, low, high = (np.array([float(r[column]) for r in own]) for column in ("ratio", "low", "high"))
        look = {"color": style.PALETTE[n], "marker": style.MARKERS[n], "markersize": 4, "capsize": 2}
        axes.errorbar(x, y, [y - low, high - y], label=name, **look)
    axes.axhline(1, color=style.MUTED, linewidth=0.8)
    ticks = sorted({int(r[along]) for r in rows})
    axes.set_xscale("log", base=2)
    axes.set_xticks(ticks, [str(tick) for tick in ticks])
    axes.set_xlabel(label)
    axes.set_title(f"Against {along}")


SECTIONS = {"ours": ours, "every": every, "idle": idle, "peers": peers, "cost": cost}


def main(arguments: list[str]) -> None:
    if arguments == ["plot"]:
        draw()
        return
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")  # peers' deprecations
    rounds = int(arguments[0]) if arguments else ROUNDS
    for name in arguments[1:] or SECTIONS:
        for line in SECTIONS[name](rounds):
            print(line, flush=True)
        print(flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
