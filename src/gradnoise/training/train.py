"""Phase train: the seeds of one cell, run after run, into the four tables of a job."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from gradnoise.base import layout
from gradnoise.base.files import sha256, sha256_of
from gradnoise.base.study import Block, TextTask, load_study
from gradnoise.base.tables import NOISE_EVENTS, NOISE_PARTS, SCORES, TRAJECTORY, write_table
from gradnoise.base.vocabulary import study_label
from gradnoise.tasks.stream import stream
from gradnoise.training.branching import Log, run
from gradnoise.training.settings import job_runs, job_settings, run_sequences

SCRATCH = Path("scratch")
Rows = list[dict[str, Any]]


def train(
    study: str,
    block: str,
    cell: str,
    chunk: str,
    code: str,
    advance: Callable[[int], None] = lambda _: None,
    skip: Callable[[int], None] = lambda _: None,
) -> None:
    """Train every seed of a job and write its tables; finished runs and branches survive a kill.

    `code` names the version of the code (a hash of its sources): a checkpoint of other code, settings or
    data is not resumed. `advance` is told how many sequences were trained, `skip` how many of a run's budget
    will not be: the run stopped early, or a checkpoint had them.
    """
    # One thread: the same bytes on any number of cores, and jobs that do not fight over them.
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    # cuBLAS is deterministic only with a fixed workspace, which it reads when it is first used.
    os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"
    settings = load_study(study)
    chosen = settings.block(block)
    corpus = layout.plays(study) if isinstance(chosen.task, TextTask) else None
    decides = [job_settings(settings, block, cell, chunk), code, torch.__version__, corpus and sha256(corpus)]
    logs: list[tuple[dict[str, Any], Log]] = []
    scratch = []
    for member in job_runs(settings, block, cell, chunk):
        scratch.append(SCRATCH / study / f"{member['run_id']}.safetensors")
        data = stream(chosen.task, member["seed"], corpus)
        fingerprint = sha256_of([*decides, member])
        trained = _Sum(advance)
        log = run(
            chosen,
            chosen.cell(cell),
            member["seed"],
            data,
            settings.device,
            scratch[-1],
            fingerprint,
            trained,
        )
        skip(run_sequences(chosen, chosen.cell(cell)) - trained.total)
        logs.append((member, log))
    _write(study, chosen, (block, cell, chunk), logs, study_label(settings))
    for checkpoint in scratch:
        checkpoint.unlink()


class _Sum:
    """Pass amounts on and keep their sum."""

    def __init__(self, then: Callable[[int], None]) -> None:
        self.total, self._then = 0, then

    def __call__(self, amount: int) -> None:
        self.total += amount
        self._then(amount)


def _write(
    study: str, block: Block, job: tuple[str, str, str], logs: list[tuple[dict[str, Any], Log]], label: str
) -> None:
    cell = block.cell(job[1])
    identity = ("run_id", "block", "cell", "seed_index")
    tables: dict[str, Rows] = {name: [] for name in layout.RUN_TABLES}
    for member, log in logs:
        run_columns = {name: member[name] for name in identity}
        chosen = {"batch": cell.batch, "learning_rate": cell.learning_rate}
        tables["scores"] += [{**run_columns, **chosen, **row} for row in log["scores"]]
        tables["trajectory"] += [
            {**run_columns, "sequences": row["step"] * cell.batch, **row} for row in log["windows"]
        ]
        tables["noise_events"] += [{**run_columns, **row} for row in log["events"]]
        tables["noise_parts"] += [{"run_id": member["run_id"], **row} for row in log["parts"]]
    schemas = (SCORES, TRAJECTORY, NOISE_EVENTS, NOISE_PARTS)
    for name, schema in zip(layout.RUN_TABLES, schemas, strict=True):
        rows = tables[name]
        columns = {column.name: [row[column.name] for row in rows] for column in schema.columns}
        write_table(layout.run(study, *job, name), schema, columns, label)
