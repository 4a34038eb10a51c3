import errno
import hashlib
import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tests.unit.conftest import SMALL

from gradnoise.base import layout
from gradnoise.base.errors import InputError
from gradnoise.base.study import Study, load_study
from gradnoise.base.tables import NOISE_EVENTS, NOISE_PARTS, SCORES, TRAJECTORY, read_table
from gradnoise.tasks.stream import stream
from gradnoise.training import checkpoint
from gradnoise.training.branching import new_state, run
from gradnoise.training.loop import CHUNK, Batches, Settings, train
from gradnoise.training.settings import anneal_updates, branch_points, job_runs, job_sequences, job_settings
from gradnoise.training.train import train as train_job

JOB = ("race", "b016-lr0.002", "s00-01")


def digests() -> dict[str, str]:
    paths = [Path(layout.run("small", *JOB, table)) for table in layout.RUN_TABLES]
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in paths}


def test_branch_points_ascend_and_a_budget_wins_over_the_update_branch(study: Study) -> None:
    block = study.block("race")
    assert branch_points(block, block.cell("b016-lr0.002")) == [
        (4, "updates"),
        (16, "sequences"),
        (32, "sequences"),
    ]
    assert branch_points(block, block.cell("b064-lr0.002")) == [(4, "sequences"), (8, "sequences")]
    assert anneal_updates(block, 1) == 1
    assert job_sequences(study, *JOB) == 2 * 16 * (32 + 2 + 8 + 16)


def test_what_a_run_that_stops_early_will_not_train_is_said_when_it_ends(study: Study) -> None:
    """Otherwise a progress bar jumps to its end when the job does."""
    settings = Path("config/small.yaml")
    settings.write_text(settings.read_text().replace("anneal: 0.5", "anneal: 0.5, stop_loss: 100.0"))
    told: list[int] = []
    train_job("small", *JOB, "x", advance=told.append, skip=lambda amount: told.append(-amount))
    # Of 32 + 2 + 8 + 16 updates each run did the first branch: 4 on the trunk, 2 annealed.
    run = 16 * (4 + 2)
    rest = 16 * (32 + 2 + 8 + 16) - run
    ends = [n for n, amount in enumerate(told) if amount < 0]
    assert [told[n] for n in ends] == [-rest, -rest]
    assert [sum(told[: ends[0]]), sum(told[ends[0] + 1 : ends[1]])] == [run, run]


def test_a_job_writes_what_was_trained(study: Study) -> None:
    done = []
    train_job("small", *JOB, code="x", advance=done.append)
    assert sum(done) == job_sequences(study, *JOB)
    scores = read_table(layout.run("small", *JOB, "scores"), SCORES).to_pandas()
    assert len(scores) == 2 * 3 * 5
    assert scores.run_id.unique().tolist() == [member["run_id"] for member in job_runs(study, *JOB)]
    last = scores[scores.branch == 3].iloc[0]
    assert (last.trunk_sequences, last.updates, last.sequences) == (512, 48, 768)
    # Trunk at 2e-3 for 32 updates; the branch falls linearly from 2e-3 over 16.
    assert last.sum_lr == pytest.approx(2e-3 * (32 + (16 + 1) / 2))
    events = read_table(layout.run("small", *JOB, "noise_events"), NOISE_EVENTS).to_pandas()
    assert (events.contributions == 4).all()
    assert (events.trace_pcp > 0).mean() > 0.9
    run_events = events[events.seed_index == 0]
    trunk = run_events[run_events.segment == 0]
    assert trunk.updates.sum() == 32
    assert trunk.step.iloc[0] == 1
    branch = run_events[run_events.segment == 3]
    assert branch.step.iloc[0] == 33
    assert trunk.sum_lr.sum() + branch.sum_lr.sum() == pytest.approx(last.sum_lr)
    # Curvature is measured at every second event of a stretch; steps count from the start of the run.
    assert branch.curvature_step.iloc[0] == 33
    assert (events.curvature > 0).all()
    assert (events.batch == 16).all()
    parts = read_table(layout.run("small", *JOB, "noise_parts"), NOISE_PARTS).to_pandas()
    expected = events.set_index(["run_id", "segment", "step"]).trace_pcp
    for _, rows in parts.groupby("kind"):
        total = rows.groupby(["run_id", "segment", "step"]).trace_pcp.sum()
        assert (total - expected).abs().max() < 1e-9 * expected.abs().max()
    trajectory = read_table(layout.run("small", *JOB, "trajectory"), TRAJECTORY).to_pandas()
    assert trajectory[trajectory.segment == 0].groupby("run_id").step.max().tolist() == [32, 32]
    assert not list(Path("scratch").rglob("*.safetensors")), (
        "checkpoints go when the job's tables are written"
    )


def test_the_same_job_gives_the_same_bytes(study: Study) -> None:
    train_job("small", *JOB, code="x")
    first = digests()
    torch.manual_seed(1)
    torch.randn(10)
    train_job("small", *JOB, code="x")
    assert digests() == first


def test_a_seed_does_not_depend_on_its_neighbours(study: Study) -> None:
    train_job("small", *JOB, code="x")
    rows = read_table(layout.run("small", *JOB, "scores"), SCORES).to_pandas()
    alone = ("race", "b016-lr0.002", "s01-01")
    train_job("small", *alone, code="x")
    single = read_table(layout.run("small", *alone, "scores"), SCORES).to_pandas()
    assert rows[rows.seed_index == 1].reset_index(drop=True).equals(single)


def test_a_killed_job_resumes_and_gives_the_bytes_of_an_uninterrupted_one(study: Study) -> None:
    train_job("small", *JOB, code="x")
    whole = digests()
    for table in layout.RUN_TABLES:
        Path(layout.run("small", *JOB, table)).unlink()
    program = (
        "import sys, time\nfrom gradnoise.training.train import train\n"
        "from gradnoise.training import checkpoint\n"
        "save = checkpoint.save\n"
        "def slow(*a):\n    save(*a); print('saved', flush=True); time.sleep(0.5)\n"
        "checkpoint.save = slow\n"
        f"train('small', *{JOB!r}, code='x')\n"
    )
    process = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE)
    assert process.stdout is not None
    for _ in range(4):  # the whole first run and one branch of the second
        process.stdout.readline()
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not list(Path("results").rglob("*.parquet"))
    assert len(list(Path("scratch").rglob("*.safetensors"))) == 2
    trained: list[int] = []
    skipped: list[int] = []
    train_job("small", *JOB, code="x", advance=trained.append, skip=skipped.append)
    assert 0 < sum(trained) < job_sequences(study, *JOB) / 2, "the first run is not trained again"
    assert sum(trained) + sum(skipped) == job_sequences(study, *JOB)
    assert digests() == whole


def test_a_checkpoint_of_other_code_or_settings_is_not_resumed(study: Study, tmp_path: Path) -> None:
    block = study.block("race")
    cell, data = block.cell("b016-lr0.002"), stream(block.task, 1)
    state = new_state(block, cell, 1, data, "cpu")
    checkpoint.save(tmp_path / "c.safetensors", state, {"done": 1}, "one")
    assert checkpoint.restore(tmp_path / "c.safetensors", state, "one") == {"done": 1}
    assert checkpoint.restore(tmp_path / "c.safetensors", state, "other") is None
    assert checkpoint.restore(tmp_path / "absent", state, "one") is None


def test_a_full_disk_at_a_checkpoint_is_one_line(
    study: Study, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    block = study.block("race")
    state = new_state(block, block.cell("b016-lr0.002"), 1, stream(block.task, 1), "cpu")

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "no space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(InputError, match="c.safetensors: cannot be written, no space left"):
        checkpoint.save(tmp_path / "c.safetensors", state, {}, "one")
    assert not list(tmp_path.glob("*c.safetensors*"))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device on this machine")
def test_a_gpu_repeats_itself_bit_for_bit(study: Study) -> None:
    Path("config/small.yaml").write_text(SMALL + "device: cuda\n")
    train_job("small", *JOB, code="x")
    first = digests()
    train_job("small", *JOB, code="x")
    assert digests() == first


@pytest.mark.parametrize("keep", [0, 7, 200, -1])
def test_a_truncated_checkpoint_is_named(study: Study, tmp_path: Path, keep: int) -> None:
    block = study.block("race")
    state = new_state(block, block.cell("b016-lr0.002"), 1, stream(block.task, 1), "cpu")
    path = tmp_path / "c.safetensors"
    checkpoint.save(path, state, {}, "one")
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(InputError, match=r"c.safetensors: is not a whole checkpoint: delete it"):
        checkpoint.restore(path, state, "one")


def test_a_diverging_run_is_an_outcome_with_null_scores(study: Study, tmp_path: Path) -> None:
    block = study.block("race")
    cell = block.cell("b016-lr0.002").model_copy(update={"learning_rate": 1e30})
    log = run(block, cell, 1, stream(block.task, 1), "cpu", tmp_path / "c", "x", lambda _: None)
    assert {row["status"] for row in log["scores"]} == {"diverged"}
    assert {row["branch"] for row in log["scores"]} == {1, 2, 3}
    assert all(row["value"] is None and row["stderr"] is None for row in log["scores"])
    assert json.dumps(log, allow_nan=False), "nothing that is not a number is left in the log"


def test_the_trunk_stops_once_a_branch_reached_the_loss(study: Study, tmp_path: Path) -> None:
    block = study.block("race")
    branches = block.branches.model_copy(update={"stop_loss": 100.0, "updates": 20})
    block = block.model_copy(update={"branches": branches})
    log = run(
        block,
        block.cell("b016-lr0.002"),
        1,
        stream(block.task, 1),
        "cpu",
        tmp_path / "c",
        "x",
        lambda _: None,
    )
    places = sorted({(row["branch"], row["at"], row["trunk_sequences"]) for row in log["scores"]})
    assert places == [(1, "sequences", 256), (2, "updates", 320)], "the update branch is still due"


def test_batches_cross_chunks_without_gap_or_repeat(study: Study) -> None:
    data = stream(study.block("race").task, 1)
    batches = Batches(data, "cpu")
    inputs, targets = batches(CHUNK - 5, 12)
    first, second = data.draw(0, CHUNK), data.draw(1, CHUNK)
    assert torch.equal(inputs, torch.cat([first[0][-5:], second[0][:7]]))
    assert torch.equal(targets, torch.cat([first[1][-5:], second[1][:7]]))


def test_the_loop_trains_as_a_plain_loop_does(study: Study) -> None:
    """Without logging steps the updates are those of the ten lines that anybody would write."""
    block = study.block("race")
    cell, data = block.cell("b064-lr0.002"), stream(block.task, 1)
    ours, plain = (new_state(block, cell, 1, data, "cpu") for _ in range(2))
    settings = Settings(batch=64, contributions=1, every=1000, clip=None)
    train(ours, Batches(data, "cpu"), settings, 6, lambda _: 2e-3, lambda _: None)
    inputs, targets = data.draw(0, CHUNK)
    for n in range(6):
        rows = slice(64 * n, 64 * (n + 1))
        torch.nn.functional.cross_entropy(plain.model(inputs[rows]), targets[rows]).backward()
        plain.optimizer.step()
        plain.optimizer.zero_grad()
    for one, other in zip(ours.model.parameters(), plain.model.parameters(), strict=True):
        assert torch.equal(one, other)


def test_settings_of_a_job_ignore_other_cells_and_seeds(study: Study) -> None:
    grown = SMALL.replace("batch: [16, 64]", "batch: [16, 32, 64]").replace("seeds: 2", "seeds: 4")
    Path("config/grown.yaml").write_text(grown + "    seeds_per_job: 2\n")
    assert job_settings(load_study("grown"), *JOB) == job_settings(study, *JOB)
    assert job_runs(load_study("grown"), *JOB) == job_runs(study, *JOB)
