"""Two processes under DistributedDataParallel inject the same noise, which is that of one process.

Both processes start once for the whole module and run every case; the tests read what they left.
"""

import contextlib
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from tests.unit.gloo import on_ranks
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel

from gradnoise import exposure, gaussian, inject, low_rank, student_t

WORLD, STEPS = 2, 50
CASES: dict[str, dict[str, Any]] = {
    **{where: {"where": where} for where in ("pre", "post", "frozen_v")},
    **{f"{where}-measured": {"where": where, "measured": True} for where in ("pre", "post")},
    **{
        f"{where}-following": {"where": where, "measured": True, "source": "std"} for where in ("pre", "post")
    },
    "joint": {"where": "post", "source": "joint"},
    "stretched": {"where": "pre", "source": "stretched"},
    "views": {"where": "pre", "measured": True, "ddp": {"gradient_as_bucket_view": True}},
    "examples": {"where": "pre", "measured": True, "source": "std", "options": {"estimator": "example"}},
}


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Embedding(11, 6), nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 11)).double()


def source_of(name: str | None, net: nn.Module, std: Any) -> Any:
    if name == "std":
        return gaussian(std)
    if name == "stretched":
        return student_t(0.05, kind="elliptical")
    if name == "joint":
        draw = torch.Generator().manual_seed(1)
        factors = {
            key: (0.1 * torch.randn(p.numel(), 2, generator=draw), torch.ones(2), 0.01)
            for key, p in net.named_parameters()
        }
        return low_rank(factors, joint=True)
    return gaussian(0.05)


def train(case: dict[str, Any], rank: int | None) -> dict[str, Any]:
    """`rank` None: alone, with all micro-batches; estimator "example" sees them as one batch."""
    net = network()
    model: Any = net if rank is None else DistributedDataParallel(net, **case.get("ddp", {}))
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-2)
    options = case.get("options", {})
    parts = 1 if options else 2
    meter = exposure(model, optimizer, every=5, **options) if case.get("measured") else None
    std = None if meter is None else meter.std(scale=4)
    noise = inject(optimizer, source_of(case.get("source"), net, std), case["where"], model=model)
    drawn: list[list[Tensor]] = []
    for step in range(STEPS):
        draw = torch.Generator().manual_seed(step)
        ids, targets = torch.randint(11, (2, WORLD * parts, 4, 3), generator=draw)
        mine = slice(None) if rank is None else slice(rank * parts, (rank + 1) * parts)
        ids, targets = ids[mine], targets[mine]
        if rank is None and options:
            ids, targets = ids.flatten(0, 1)[None], targets.flatten(0, 1)[None]
        for n, (x, y) in enumerate(zip(ids, targets, strict=True)):
            last = rank is None or n == len(ids) - 1
            with contextlib.nullcontext() if last else model.no_sync():
                loss = cross_entropy(model(x).flatten(0, 1), y.flatten()) / len(ids)
                loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        drawn.append([tensor.clone() for _, tensor in noise.added])
        optimizer.zero_grad()
    return {
        "weights": [p.detach().clone() for p in net.parameters()],
        "drawn": drawn,
        "injected": 0.0 if meter is None or meter.last is None else meter.last.pne2_injected.value,
        "ledger": "" if meter is None else repr((meter.rows(), meter.last)),
    }


def work(rank: int, folder: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{folder}/meeting", rank=rank, world_size=WORLD)
    torch.save({name: train(case, rank) for name, case in CASES.items()}, folder / f"{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return on_ranks(work, tmp_path_factory.mktemp("ranks"), WORLD)


@pytest.mark.slow
@pytest.mark.parametrize("name", list(CASES))
def test_replicas_stay_bit_equal_for_50_updates(name: str, ranks: list[dict[str, Any]]) -> None:
    """Weights and the ledger, with all that follows it."""
    one, other = (found[name] for found in ranks)
    for mine, yours in zip(one["weights"], other["weights"], strict=True):
        assert torch.equal(mine, yours)
    assert one["ledger"] == other["ledger"]


@pytest.mark.slow
@pytest.mark.parametrize("name", list(CASES))
def test_the_noise_is_that_of_one_process(name: str, ranks: list[dict[str, Any]]) -> None:
    """Bit for bit where its size does not depend on sums, whose order differs; then so do the weights."""
    alone = train(CASES[name], None)
    found = ranks[0][name]
    exact = CASES[name].get("source") != "std"
    assert CASES[name]["where"] != "pre" or any(alone["drawn"])
    for mine, yours in zip(found["drawn"], alone["drawn"], strict=True):
        for one, other in zip(mine, yours, strict=True):
            assert torch.equal(one, other) if exact else torch.allclose(one, other, rtol=1e-6, atol=1e-12)
    for one, other in zip(found["weights"], alone["weights"], strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-9)
    if CASES[name].get("measured"):
        assert alone["injected"] > 0
        assert found["injected"] == pytest.approx(alone["injected"], rel=1e-6)
