"""Noise arms: data that train, with the noise where and when they say, and the same bytes after a kill."""

import copy
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.unit.conftest import SMALL
from torch import Tensor

from gradnoise.base import layout
from gradnoise.base.files import canonical_json
from gradnoise.base.study import Block, Cell, Study, load_study
from gradnoise.base.tables import NOISE_EVENTS, read_table
from gradnoise.noise.injection.inject import injections_of
from gradnoise.noise.integrals import Event
from gradnoise.tasks.stream import stream
from gradnoise.training import checkpoint
from gradnoise.training.branching import Log, new_state, run
from gradnoise.training.conditions import TrunkNoise, trunk_noise
from gradnoise.training.loop import Batches, Settings, State, Stretch, train
from gradnoise.training.settings import job_settings
from gradnoise.training.train import train as train_job

PAGE = Path(__file__).parents[3] / "docs/pipeline.md"
NAP = "kind: nap, rank: 4, temperature: 4, layers: blocks.*"
CONDITIONS = {
    "before": "kind: inject, source: gaussian, scale: 4, where: pre",
    "after": "kind: inject, source: gaussian, scale: 4, where: post, shape: isotropic",
    "frozen-v": "kind: inject, source: gaussian, scale: 4, where: frozen_v, layers: head|blocks.*",
    "stretched": "kind: inject, source: student_t, tails: elliptical, degrees: 3, scale: 4, where: post",
    "low-rank": "kind: inject, source: low_rank, rank: 2, scale: 4, where: post",
    "second-half": "kind: inject, source: gaussian, scale: 4, where: pre, phase: [0.5, 1]",
    "reweight": "kind: reweight, to_batch: 4",
    "reweight-late": "kind: reweight, to_batch: 8, law: subset, phase: [0.5, 1]",
    "aligned": f"{NAP}, alignment: 1",
    "tasks-late": f"{NAP}, alignment: 1, target: tasks, phase: [0.5, 1]",
}


def arms(conditions: dict[str, str]) -> str:
    lines = [
        f"      {name}: {{batch: 16, learning_rate: 2.0e-3, noise: {{{condition}}}}}\n"
        for name, condition in conditions.items()
    ]
    return "    arms:\n" + "".join(lines)


@pytest.fixture
def block(study: Study) -> Block:
    """The small block with an arm of every kind; 32 updates on a trunk, branches at 4, 16 and 32."""
    Path("config/arms.yaml").write_text(SMALL + arms(CONDITIONS))
    return load_study("arms").block("race")


def run_of(block: Block, name: str, path: Path, **changes: Any) -> Log:
    cell = block.cell(name).model_copy(update=changes)
    return run(block, cell, 1, stream(block.task, 1), "cpu", path, "x", lambda _: None)


def trained(
    block: Block, name: str, optimizer: type[torch.optim.Optimizer] | None = None
) -> tuple[State, Stretch]:
    """A trunk of 32 updates, each measured, in one stretch; with `optimizer` the model stands still."""
    cell, data = block.cell(name), stream(block.task, 1)
    state, rate = new_state(block, cell, 1, data, "cpu"), cell.learning_rate
    if optimizer is not None:
        rate = 1e-7
        state.optimizer = optimizer(state.model.parameters(), lr=rate)
    settings = Settings(batch=16, contributions=4, every=1, clip=None)
    noise = trunk_noise(block, cell, 1)
    return state, train(state, Batches(data, "cpu"), settings, 32, lambda _: rate, lambda _: None, noise)


def weights(state: State) -> Tensor:
    return torch.cat([parameter.detach().flatten() for parameter in state.model.parameters()])


def test_the_arms_of_the_documentation_are_data(study: Study) -> None:
    """The page's example, pasted into a study, trains; the phase of its second arm is kept."""
    (example,) = re.findall(r"```yaml\n(.+?)```", PAGE.read_text(), re.DOTALL)
    Path("config/arms.yaml").write_text(SMALL + example)
    found = load_study("arms")
    names = list(found.block("race").arms)
    assert [job for job in found.jobs() if job not in list(study.jobs())] == [
        ("race", name, "s00-01") for name in names
    ]
    injected = {}
    for name in names:
        train_job("arms", "race", name, "s00-01", code="x")
        path = layout.run("arms", "race", name, "s00-01", "noise_events")
        events = read_table(path, NOISE_EVENTS).to_pandas()
        own = events[(events.seed_index == 0) & (events.segment == 0)]
        injected[name] = own[own.injected_pne2 > 0].step.tolist()
    # Of 8 updates: all but the first, which nothing was measured before; the last third; none.
    assert list(injected.values()) == [[2, 3, 4, 5, 6, 7, 8], [6, 7, 8], []]


def test_a_new_arm_changes_no_job_that_is_there(study: Study, block: Block) -> None:
    job = ("race", "b016-lr0.002", "s00-01")
    assert job_settings(load_study("arms"), *job) == job_settings(study, *job)


def test_every_kind_of_noise_trains_to_other_weights_than_none(block: Block) -> None:
    names = ["b016-lr0.002", *CONDITIONS]
    ends = {name: weights(trained(block, name)[0]) for name in names}
    assert all(end.isfinite().all() for end in ends.values())
    for name, end in ends.items():
        others = [other for other in names if other != name and torch.equal(end, ends[other])]
        assert others == [], name


@pytest.mark.parametrize("name", CONDITIONS)
def test_what_is_injected_is_in_the_ledger_and_nothing_stays_attached(block: Block, name: str) -> None:
    state, stretch = trained(block, name)
    assert injections_of(state.optimizer) == []
    first = {"second-half": 17, "tasks-late": 17}.get(name, 2)
    for event in stretch.events:
        amounts = (event.injected_pne, event.injected_pne2, event.injected_ne)
        if "reweight" in name or event.step < first:
            assert amounts == (0, 0, 0)
        else:
            assert min(amounts) > 0, event.step
    by_part = sum(part.injected_pne2 for part in stretch.parts if part.kind == "layer")
    assert by_part == pytest.approx(sum(event.injected_pne2 for event in stretch.events))


def share(events: list[Event]) -> float:
    """Injected over intrinsic exposure, without the first update, which gets nothing."""
    own = sum(event.sum_lr2 * event.trace_pcp for event in events[1:])
    return sum(event.injected_pne2 for event in events[1:]) / own


def test_amounts_are_those_asked_for(block: Block) -> None:
    """Of a model that stands still, so that the noise that the meter follows does not change."""
    plain = trained(block, "b016-lr0.002", torch.optim.SGD)[1].events
    for name in ("before", "after", "low-rank"):
        assert share(trained(block, name, torch.optim.SGD)[1].events) == pytest.approx(4, rel=0.25), name
    assert share(trained(block, "aligned", torch.optim.SGD)[1].events) == pytest.approx(4, rel=0.25)
    weighted = trained(block, "reweight", torch.optim.SGD)[1].events
    ratio = sum(event.trace_pcp for event in weighted) / sum(event.trace_pcp for event in plain)
    assert ratio == pytest.approx(4, rel=0.25)


def test_weights_move_training_and_not_the_loss_that_is_logged(block: Block) -> None:
    plain, weighted = (trained(block, name)[1].windows for name in ("b016-lr0.002", "reweight"))
    assert weighted[0].loss == pytest.approx(plain[0].loss, rel=1e-6)
    assert weighted[5].loss != pytest.approx(plain[5].loss, rel=1e-4)


@pytest.mark.parametrize("name", CONDITIONS)
def test_branches_are_annealed_without_noise(
    block: Block, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: Counter[int] = Counter()
    give = TrunkNoise.weights

    def counted(self: TrunkNoise, update: int, part: int, size: int, device: torch.device) -> Tensor | None:
        asked[update] += part == 0
        return give(self, update, part, size, device)

    monkeypatch.setattr(TrunkNoise, "weights", counted)
    log = run_of(block, name, tmp_path / "c")
    assert asked == Counter(range(1, 33)), "once an update of the trunk, never in a branch"
    branches = [event for event in log["events"] if event["segment"] > 0]
    assert len(branches) > 3
    assert all(event["injected_pne2"] == 0 for event in branches)
    assert {row["status"] for row in log["scores"]} == {"finished"}


class Killed(Exception):
    pass


@pytest.fixture
def killed_after_each_branch(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    save = checkpoint.save

    def save_and_die(*args: Any) -> None:
        save(*args)
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "save", save_and_die)
        yield


@pytest.mark.parametrize("name", CONDITIONS)
@pytest.mark.usefixtures("killed_after_each_branch")
def test_a_killed_run_with_noise_resumes_to_the_same_bytes(block: Block, name: str, tmp_path: Path) -> None:
    for _ in range(3):
        with pytest.raises(Killed):
            run_of(block, name, tmp_path / "killed")
    resumed = run_of(block, name, tmp_path / "killed")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checkpoint, "save", lambda *_: None)
        whole = run_of(block, name, tmp_path / "whole")
    assert canonical_json(resumed) == canonical_json(whole)


def test_noise_is_keyed_by_the_update_of_the_run(block: Block) -> None:
    """Two stretches draw what one draws, where a new meter changes nothing: the model stands still."""
    cell, data = block.cell("after"), stream(block.task, 1)
    noise = trunk_noise(block, cell, 1)
    states = [new_state(block, cell, 1, data, "cpu") for _ in range(2)]
    settings = Settings(batch=16, contributions=4, every=1, clip=None)
    for state, pieces in zip(states, ([12], [5, 7]), strict=True):
        state.optimizer = torch.optim.SGD(state.model.parameters(), lr=1e-3)
        for updates in pieces:
            train(state, Batches(data, "cpu"), settings, updates, lambda _: 1e-3, lambda _: None, noise)
            assert state.noise["step"] == state.step
    assert torch.equal(weights(states[0]), weights(states[1]))


@pytest.mark.parametrize("name", ["b016-lr0.002", *CONDITIONS])
@pytest.mark.parametrize("last", [2, 3], ids=["before a plain update", "before a measured update"])
def test_divergence_is_noticed_whatever_the_noise(block: Block, name: str, last: int) -> None:
    cell, data = block.cell(name), stream(block.task, 1)
    state, noise = new_state(block, cell, 1, data, "cpu"), trunk_noise(block, cell, 1)
    settings = Settings(batch=16, contributions=4, every=4, clip=None)

    def rate(n: int) -> float:
        return 1e30 if n == last else 2e-3

    assert train(state, Batches(data, "cpu"), settings, 32, rate, lambda _: None, noise).diverged


def test_a_nested_state_comes_back_from_a_checkpoint(block: Block, tmp_path: Path) -> None:
    cell: Cell = block.cell("after")
    state = new_state(block, cell, 1, stream(block.task, 1), "cpu")
    state.noise = {
        "seed": 2**62,
        "power": None,
        "sources": {1: {"mean": {"a.b": torch.ones(2, 3), "0": torch.zeros(())}, "tensor": 0.1}, 7: {}},
        "found": [torch.tensor([1, 2]), [torch.tensor([True]), 0.5]],
        "device": "not a tensor's",
    }
    kept = copy.deepcopy(state.noise)
    checkpoint.save(tmp_path / "c", state, {}, "one")
    state.noise = {}
    checkpoint.restore(tmp_path / "c", state, "one")
    assert repr(state.noise) == repr(kept)
