"""Two processes under DistributedDataParallel measure what one process with all the micro-batches measures.

Both processes start once for the whole module and run every case; the tests read what they left.
"""

import contextlib
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from tests.unit.gloo import on_ranks
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel

from gradnoise import exposure
from gradnoise.base.errors import InputError
from gradnoise.noise import norms

WORLD, STEPS, SEQUENCES, LENGTH, WORDS = 2, 3, 4, 5, 23
WIDTH, BLOCK = 96, 512

CASES: dict[str, dict[str, Any]] = {
    **{
        f"micro-{p}-{parts}": {"parts": parts, "options": {"estimator": "micro", "p": p}}
        for p in ("step", "expected")
        for parts in (1, 3)
    },
    "auto": {"parts": 1, "options": {}},
    "clipped": {"parts": 3, "options": {"estimator": "micro"}, "clip": 0.05},
    "clipped-by-others": {"parts": 3, "options": {"estimator": "micro"}, "clip": 0.05, "own": False},
    "sgd": {"parts": 3, "options": {"estimator": "micro"}, "optimizer": "SGD"},
    "adafactor": {"parts": 3, "options": {"estimator": "micro"}, "optimizer": "Adafactor"},
    "tokens": {"parts": 3, "options": {"estimator": "micro"}, "tokens": True},
    "bucket-views": {"parts": 3, "options": {"estimator": "micro"}, "ddp": {"gradient_as_bucket_view": True}},
    "comm-hook": {"parts": 1, "options": {"estimator": "micro"}, "hook": True},
    "inner": {"parts": 3, "options": {"estimator": "micro"}, "inner": True},
    "example-step": {"parts": 1, "whole": True, "options": {"estimator": "example", "p": "step"}},
    "example-expected": {"parts": 1, "whole": True, "options": {"estimator": "example"}},
    "example-adafactor": {
        "parts": 1,
        "whole": True,
        "options": {"estimator": "example"},
        "optimizer": "Adafactor",
    },
    "hutchinson": {"parts": 1, "whole": True, "options": {"estimator": "hutchinson"}, "losses": True},
    "norms-1": {"parts": 1, "options": {"estimator": "norms"}},
    "norms-3": {"parts": 3, "options": {"estimator": "norms"}},
    # Cases of which only agreement between processes is asked.
    "some-examples": {"parts": 3, "options": {"estimator": "example", "examples": 2}},
    "tails-and-sketch": {"parts": 3, "options": {"estimator": "micro", "tails": True, "sketch": 16}},
    "example-tails": {"parts": 1, "options": {"estimator": "example", "tails": True}},
    "share": {"parts": 3, "options": {"estimator": "micro", "share": 0.5}},
    "fisher": {"parts": 3, "options": {"estimator": "micro", "curvature": "mc_fisher"}},
    "kfac": {"parts": 3, "options": {"estimator": "micro", "curvature": "kfac"}},
    "hessian": {"parts": 3, "options": {"estimator": "micro", "curvature": "hessian"}, "losses": True},
}
ALONE = ("some-examples", "tails-and-sketch", "example-tails", "share", "fisher", "kfac", "hessian")


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Embedding(WORDS, WIDTH),
        nn.Linear(WIDTH, WIDTH),
        nn.Tanh(),
        nn.LayerNorm(WIDTH),
        nn.Linear(WIDTH, WORDS),
    ).double()


def micro_batches(step: int, parts: int) -> list[tuple[Tensor, Tensor]]:
    """All processes' micro-batches of an update, rank by rank."""
    draw = torch.Generator().manual_seed(step)
    ids = torch.randint(WORDS, (2, WORLD * parts, SEQUENCES, LENGTH), generator=draw)
    return list(zip(ids[0], ids[1], strict=True))


def per_sequence(outputs: Tensor, targets: Tensor) -> Tensor:
    losses = cross_entropy(outputs.flatten(0, 1), targets.flatten(), reduction="none")
    return losses.view(len(targets), -1).mean(1)


def train(case: dict[str, Any], rank: int | None, measure: bool = True) -> dict[str, Any]:
    """Train one case; `rank` None: alone, with all micro-batches (`whole`: as one batch)."""
    net, parts = network(), case["parts"]
    model = net if rank is None else DistributedDataParallel(net, **case.get("ddp", {}))
    kind = case.get("optimizer", "AdamW")
    optimizer = getattr(torch.optim, kind)(net.parameters(), lr=1e-2)
    now: list[tuple[Tensor, Tensor]] = []
    options = dict(case["options"])
    if case.get("losses"):
        options["losses"] = lambda call: torch.cat([per_sequence(call(x), y) for x, y in now])
    if case.get("hook") and rank is not None:
        model.register_comm_hook(None, allreduce_hook)
    measured = model
    if case.get("inner") and rank is not None:
        measured, options["process_group"] = net, dist.group.WORLD
    meter = exposure(measured, optimizer, every=1, **options) if measure else None
    for step in range(STEPS):
        everything = micro_batches(step, parts)
        now = everything if rank is None else everything[rank * parts : (rank + 1) * parts]
        if rank is None and case.get("whole"):
            now = [(torch.cat([x for x, _ in now]), torch.cat([y for _, y in now]))]
        # Shares of the batch: equal, or as if the n-th of all micro-batches had n tokens.
        tokens = [float(n) if case.get("tokens") else 1.0 for n in range(1, len(everything) + 1)]
        mine = tokens if rank is None else tokens[rank * parts : (rank + 1) * parts]
        mine = mine[: len(now)]
        whole = sum(tokens) / WORLD if rank is not None else sum(mine)
        for n, (x, y) in enumerate(now):
            last = rank is None or n == len(now) - 1
            with contextlib.nullcontext() if last else model.no_sync():
                if meter is not None and case.get("tokens"):
                    meter.count(mine[n])
                (per_sequence(model(x), y).mean() * mine[n] / whole).backward()
        if case.get("clip") and meter is not None and case.get("own", True):
            meter.clip_grad_norm_(case["clip"])
        elif case.get("clip"):
            nn.utils.clip_grad_norm_(net.parameters(), case["clip"])
        optimizer.step()
        optimizer.zero_grad()
    found: dict[str, Any] = {"weights": [p.detach().clone() for p in net.parameters()]}
    if meter is not None:
        meter.remove()
        assert meter.last is not None
        found |= {
            "events": [asdict(event) for event in meter.events],
            "parts": [asdict(part) for part in meter.parts],
            "reading": repr(meter.last),
            "state": repr(meter.state_dict()),
        }
    return found


def traffic(p: str) -> list[int]:
    """Sizes of the tensors that measuring sends (DistributedDataParallel's own go another way)."""
    sizes: list[int] = []
    reduce, gather = dist.all_reduce, dist.all_gather

    def reduced(tensor: Tensor, *args: Any, **given: Any) -> Any:
        sizes.append(tensor.numel())
        return reduce(tensor, *args, **given)

    def gathered(found: list[Tensor], tensor: Tensor, *args: Any, **given: Any) -> Any:
        sizes.append(tensor.numel())
        return gather(found, tensor, *args, **given)

    dist.all_reduce, dist.all_gather = reduced, gathered
    try:
        train(CASES[f"micro-{p}-3"], dist.get_rank())
    finally:
        dist.all_reduce, dist.all_gather = reduce, gather
    return sizes


def refused() -> str:
    """What a meter says that was given the module inside, without its group."""
    net = network()
    model, optimizer = DistributedDataParallel(net), torch.optim.SGD(net.parameters(), lr=0.1)
    exposure(net, optimizer, every=1, estimator="example")
    x, y = micro_batches(0, 1)[dist.get_rank()]
    per_sequence(model(x), y).mean().backward()
    try:
        optimizer.step()
    except InputError as error:
        return str(error)
    return ""


def work(rank: int, folder: Path) -> None:
    torch.set_num_threads(1)
    norms.BLOCK = BLOCK
    dist.init_process_group("gloo", f"file://{folder}/meeting", rank=rank, world_size=WORLD)
    found: dict[str, Any] = {}
    for name, case in CASES.items():
        found[name] = train(case, rank)
    found["plain"] = train(CASES["micro-expected-3"], rank, measure=False)
    found["traffic"] = {p: traffic(p) for p in ("step", "expected")}
    found["refused"] = refused()
    torch.save(found, folder / f"{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return on_ranks(work, tmp_path_factory.mktemp("ranks"), WORLD)


# Inner products between contributions of different processes are not sent.
LOCAL = ("effective_rank", "effective_rank_se", "top_share")


def close(found: list[dict[str, Any]], expected: list[dict[str, Any]]) -> None:
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        for name, value in other.items():
            if name not in LOCAL:
                same = value if isinstance(value, str) else pytest.approx(value, rel=1e-6, nan_ok=True)
                assert one[name] == same, name


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in CASES if name not in ALONE])
def test_two_processes_read_what_one_does(
    name: str, ranks: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every field of every event and of every layer, class and tensor, to 1e-6."""
    monkeypatch.setattr(norms, "BLOCK", BLOCK)
    alone = train(CASES[name], None)
    for found in ranks:
        for one, other in zip(found[name]["weights"], alone["weights"], strict=True):
            torch.testing.assert_close(one, other)
        close(found[name]["events"], alone["events"])
        close(found[name]["parts"], alone["parts"])
    events = alone["events"]
    assert all(event["trace_pcp"] > 0 for event in events)
    parts = CASES[name]["parts"]
    assert all(event["batch"] == WORLD * parts * SEQUENCES for event in events)
    if "clip" in CASES[name]:
        assert all(event["clip"] < 1 for event in events)


@pytest.mark.slow
@pytest.mark.parametrize("name", list(CASES))
def test_every_process_reads_the_same(name: str, ranks: list[dict[str, Any]]) -> None:
    """Bit for bit, with all that the meter carries on to later updates."""
    for field in ("reading", "state", "events", "parts"):
        assert repr(ranks[0][name][field]) == repr(ranks[1][name][field])


@pytest.mark.slow
def test_only_scalars_cross_the_network_but_for_the_expected_preconditioner(
    ranks: list[dict[str, Any]],
) -> None:
    size = sum(parameter.numel() for parameter in network().parameters())
    for found in ranks:
        sent = found["traffic"]
        assert sum(sent["step"]) < STEPS * 200
        assert [n for n in sent["expected"] if n > 200] == [size + 1] * STEPS


@pytest.mark.slow
def test_measuring_moves_nothing(ranks: list[dict[str, Any]]) -> None:
    for found in ranks:
        for name in ("micro-expected-3", "micro-step-3", "inner", "norms-3", "bucket-views"):
            for one, other in zip(found[name]["weights"], found["plain"]["weights"], strict=True):
                assert torch.equal(one, other)


@pytest.mark.slow
def test_the_module_inside_is_refused_without_its_group(ranks: list[dict[str, Any]]) -> None:
    for found in ranks:
        assert "is not one factor times the sum of this step's backward() calls" in found["refused"]


@pytest.mark.slow
def test_extra_options_read_numbers(ranks: list[dict[str, Any]]) -> None:
    (first, *_, last) = ranks[0]["tails-and-sketch"]["events"]
    assert first["hill_raw"] > 0
    assert last["norm_hill"] > 0
    assert ranks[0]["example-tails"]["events"][0]["hill"] > 0
    for name in ("fisher", "kfac", "hessian"):
        event = ranks[0][name]["events"][0]
        assert event["curvature"] > 5 * event["curvature_se"] > 0
