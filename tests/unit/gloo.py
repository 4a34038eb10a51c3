"""Two processes on this machine that talk over gloo, for tests of distributed training."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch


def on_ranks(work: Callable[[int, Path], None], folder: Path, world: int) -> list[dict[str, Any]]:
    """Run `work(rank, folder)` in `world` processes; what each left in `folder`/<rank>.pt."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GLOO_SOCKET_IFNAME", "lo")
        torch.multiprocessing.spawn(work, (folder,), nprocs=world)  # type: ignore[attr-defined, no-untyped-call]
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(world)]
