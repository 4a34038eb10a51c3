"""Two processes under DistributedDataParallel with aligned noise: the same weights on both, bit for bit.

Both processes start once for the whole module and run every case; the tests read what they left.
"""

import contextlib
import io
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from tests.unit.gloo import on_ranks
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel

from gradnoise import NAP, align_noise, exposure
from gradnoise.noise.schedules import ramp

WORLD, UPDATES, PARTS, ROWS = 2, 50, 4, 6
INPUTS, WIDTH, CLASSES = 5, 7, 3

HOT: dict[str, Any] = {"temperature": 1e-5, "mode": "absolute", "rank": 3, "sketch_every": 2}
CASES: dict[str, dict[str, Any]] = {
    "features": {"noise": HOT},
    "tasks": {"noise": HOT | {"target": "tasks"}},
    "labelled": {
        "noise": HOT | {"target": "tasks", "structure": {"layers.0": "vec", "*": "kronecker"}},
        "labels": 2,
    },
    "relative": {"noise": {"temperature": 0.5, "rank": 3, "alignment": ramp(0, 1, 30)}, "meter": True},
    "own meter": {"noise": {"temperature": 0.5, "rank": 3, "explained": 0.7}},
    "inner": {"noise": HOT, "inner": True},
    "inner own meter": {"noise": {"temperature": 0.5, "rank": 3}, "inner": True},
    "bucket views": {"noise": HOT | {"target": "tasks"}, "ddp": {"gradient_as_bucket_view": True}},
    "one part": {"noise": HOT | {"target": "tasks"}, "parts": 1},
    "uneven": {"noise": HOT | {"sketch_every": 1}, "uneven": True, "ddp": {"find_unused_parameters": True}},
}


class Net(nn.Module):
    """`branch` is used where it is asked for."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(nn.Linear(INPUTS, WIDTH), nn.Tanh(), nn.Linear(WIDTH, CLASSES))
        self.branch: nn.Linear | None = None

    def forward(self, x: Tensor, branch: bool = False) -> Tensor:
        out: Tensor = self.layers(x)
        return out + self.branch(x) if branch and self.branch is not None else out


def micro_batch(update: int, number: int) -> tuple[Tensor, Tensor]:
    draw = torch.Generator().manual_seed(1000 * update + number)
    x = torch.randn(ROWS, INPUTS, generator=draw, dtype=torch.float64) * torch.linspace(2, 0.2, INPUTS)
    return x, torch.randint(CLASSES, (ROWS,), generator=draw)


class Run:
    """One training run of a process; `rank` None: alone, with all micro-batches."""

    def __init__(self, case: dict[str, Any], rank: int | None) -> None:
        self.case, self.rank, self.parts = case, rank, case.get("parts", PARTS)
        self.net = Net()
        if case.get("uneven"):
            self.net.branch = nn.Linear(INPUTS, CLASSES)
        self.net.double()
        self.model: nn.Module = self.net
        if rank is not None:
            self.model = DistributedDataParallel(self.net, **case.get("ddp", {}))
        self.optimizer = torch.optim.AdamW(self.net.parameters(), lr=1e-2)
        options = dict(case["noise"])
        if case.get("meter"):
            options["meter"] = exposure(self.model, self.optimizer, every=3)
        aligned = self.model
        if case.get("inner") and rank is not None:
            aligned, options["process_group"] = self.net, dist.group.WORLD
        self.noise = align_noise(self.optimizer, aligned, **options)

    def train(self, first: int, updates: int) -> None:
        for update in range(first, first + updates):
            numbers = list(range(WORLD * self.parts))
            if self.rank is not None:
                numbers = numbers[self.rank * self.parts :][: self.parts]
            for n, number in enumerate(numbers):
                if "labels" in self.case:
                    self.noise.task(n // self.case["labels"])
                x, y = micro_batch(update, number)
                waits = self.rank is not None and n < len(numbers) - 1
                with self.model.no_sync() if waits else contextlib.nullcontext():  # type: ignore[operator]
                    branch = self.case.get("uneven", False) and number < self.parts
                    (cross_entropy(self.model(x, branch), y) / len(numbers)).backward()
            self.optimizer.step()
            self.optimizer.zero_grad()

    def found(self) -> dict[str, Any]:
        sketches = {s.name: s for shape in self.noise.shapes for s in shape.sketches.values()}
        return {
            "weights": {name: p.detach().clone() for name, p in self.net.named_parameters()},
            "shapes": {name: sketch.matrix(1.0) for name, sketch in sketches.items()},
            "counts": {name: int(sketch.count) for name, sketch in sketches.items()},
            "power": self.noise.powers()["0"],
        }


def whole(case: dict[str, Any], rank: int | None) -> dict[str, Any]:
    run = Run(case, rank)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        run.train(0, UPDATES)
    said = [str(warning.message) for warning in caught if "target" in str(warning.message)]
    return run.found() | {"warnings": said}


def resumed(case: dict[str, Any], rank: int, at: int = 23) -> dict[str, Any]:
    """Stopped, saved, and gone on with by new objects."""
    warnings.simplefilter("ignore")
    early = Run(case, rank)
    early.train(0, at)
    meter = case["noise"].get("meter") or early.noise._meter
    file = io.BytesIO()
    states = {
        "net": early.net.state_dict(),
        "optimizer": early.optimizer.state_dict(),
        "noise": early.noise.state_dict(),
        "meter": meter.state_dict() if case.get("meter") and meter is not None else None,
    }
    torch.save(states, file)
    file.seek(0)
    states = torch.load(file, weights_only=True)
    late = Run(case, rank)
    late.net.load_state_dict(states["net"])
    late.optimizer.load_state_dict(states["optimizer"])
    late.noise.load_state_dict(states["noise"])
    if states["meter"] is not None and late.noise._meter is not None:
        late.noise._meter.load_state_dict(states["meter"])
    late.train(at, UPDATES - at)
    return late.found()


def nap(rank: int) -> dict[str, Tensor]:
    """The optimizer that has it all in one."""
    net = Net().double()
    model = DistributedDataParallel(net)
    optimizer = NAP(model, lr=1e-2, **HOT)
    for update in range(5):
        x, y = micro_batch(update, rank)
        cross_entropy(model(x), y).backward()
        optimizer.step()
        optimizer.zero_grad()
    return {name: p.detach() for name, p in net.named_parameters()}


def work(rank: int, folder: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{folder}/meeting", rank=rank, world_size=WORLD)
    found: dict[str, Any] = {name: whole(case, rank) for name, case in CASES.items()}
    found["resumed"] = {name: resumed(CASES[name], rank) for name in RESUMED}
    found["nap"] = nap(rank)
    torch.save(found, folder / f"{rank}.pt")
    dist.destroy_process_group()


RESUMED = ("features", "labelled", "relative", "own meter")


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return on_ranks(work, tmp_path_factory.mktemp("ranks"), WORLD)


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return set(one) == set(other) and all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_both_processes_have_the_same_weights(name: str, ranks: list[dict[str, Any]]) -> None:
    """After 50 updates on different data, with the same shapes of noise; and there was noise."""
    one, other = (found[name] for found in ranks)
    assert same(one["weights"], other["weights"])
    assert same(one["shapes"], other["shapes"])
    assert one["power"] == other["power"] > 0
    plain = {"noise": CASES[name]["noise"] | {"temperature": 0.0}, "uneven": CASES[name].get("uneven", False)}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        still = whole(plain, None)["weights"]
    assert (one["weights"]["layers.0.weight"] - still["layers.0.weight"]).abs().max() > 1e-3


@pytest.mark.slow
@pytest.mark.parametrize("name", ["features", "relative", "inner", "inner own meter", "uneven"])
def test_two_processes_see_what_one_does(name: str, ranks: list[dict[str, Any]]) -> None:
    """Features: rows of both, as of one process with all micro-batches; sketches are in single precision."""
    alone = whole(CASES[name], None)
    assert ranks[0][name]["counts"] == alone["counts"]
    for what, within in (("shapes", 2e-3), ("weights", 2e-3)):
        for part, value in alone[what].items():
            torch.testing.assert_close(ranks[0][name][what][part], value, rtol=within, atol=within)
    assert ranks[0][name]["power"] == pytest.approx(alone["power"], rel=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("name", RESUMED)
def test_a_run_resumed_in_the_middle_is_bit_for_bit_the_same(name: str, ranks: list[dict[str, Any]]) -> None:
    for found in ranks:
        assert same(found["resumed"][name]["weights"], found[name]["weights"])
        assert same(found["resumed"][name]["shapes"], found[name]["shapes"])


@pytest.mark.slow
def test_tasks_are_told_apart_within_each_process(ranks: list[dict[str, Any]]) -> None:
    """Counts add up over processes; one backward() in each is one task in each, which says nothing."""
    for found in ranks:
        assert set(found["tasks"]["counts"].values()) == {UPDATES // 2}
        assert found["one part"]["counts"] == dict.fromkeys(found["one part"]["counts"], 0)
        assert any("one task in an update says nothing" in text for text in found["one part"]["warnings"])
        for shape in found["one part"]["shapes"].values():
            torch.testing.assert_close(shape, torch.eye(len(shape)))


@pytest.mark.slow
def test_a_layer_that_one_process_does_not_use_is_no_fault(ranks: list[dict[str, Any]]) -> None:
    for found in ranks:
        assert found["uneven"]["warnings"] == []
        assert set(found["uneven"]["counts"].values()) == {UPDATES}


@pytest.mark.slow
def test_nap_works_on_a_distributed_model(ranks: list[dict[str, Any]]) -> None:
    assert same(ranks[0]["nap"], ranks[1]["nap"])
