"""A small repository with a three-job study: two training jobs, an analysis, a figure."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from gradnoise.provenance.closure import code_closure
from gradnoise.provenance.records import Job, attempt

SOURCE = Path(__file__).parents[3] / "src"
RESULTS = "results/fake"
# Real modules of the package, small ones, stand for the phases' modules.
TRAIN, ANALYSE, DRAW = "gradnoise.base.layout", "gradnoise.base.strict_yaml", "gradnoise.base.errors"


@pytest.fixture
def repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory: lock file, configuration, plan and the code, but no result and no Git."""
    root = tmp_path / "repository"
    for module in (TRAIN, ANALYSE, DRAW):
        for path in code_closure(module, SOURCE):
            (root / path).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(SOURCE.parent / path, root / path)
    for path, text in {
        "requirements.lock": "torch==2.13.0\n",
        "config/fake.yaml": "# a study\nblocks: {race: {width: 8}}\n",
        "preregistration/plan.yaml": "alpha: 0.05\n",
    }.items():
        (root / path).parent.mkdir(exist_ok=True)
        (root / path).write_text(text)
    monkeypatch.chdir(root)
    return root


@pytest.fixture
def make_job() -> Callable[..., Job]:
    """A job of the fake study; keywords override."""

    def make(**changes: object) -> Job:
        fields: dict[str, object] = {
            "phase": "train",
            "name": "race/b016/s00-04",
            "study": "fake",
            "module": TRAIN,
            "inputs": (),
            "outputs": (f"{RESULTS}/runs/race/b016/s00-04.scores.txt",),
            "settings": {"width": 8},
            "plan": "preregistration/plan.yaml",
            "config": "config/fake.yaml",
        }
        return Job(**{**fields, **changes})  # type: ignore[arg-type]

    return make


@pytest.fixture
def perform(make_job: Callable[..., Job]) -> Callable[..., Path]:
    """Attempt a job whose outputs are what it is called and what it read; gives the record's path."""

    def run(**changes: object) -> Path:
        job = make_job(**changes)
        with attempt(job) as record:
            for output in job.outputs:
                Path(output).parent.mkdir(parents=True, exist_ok=True)
                Path(output).write_text(job.name + "".join(Path(path).read_text() for path in job.inputs))
        return record

    return run


@pytest.fixture
def study(repository: Path, perform: Callable[..., Path]) -> Path:
    """The repository after the whole study ran."""
    runs = []
    for chunk, seeds in (("s00-01", (0, 1)), ("s02-02", (2,))):
        runs.append(f"{RESULTS}/runs/race/b016/{chunk}.scores.txt")
        entries = tuple(
            {"run_id": f"r{i}", "block": "race", "cell": "b016", "seed_index": i, "seed": 100 + i}
            for i in seeds
        )
        perform(name=f"race/b016/{chunk}", outputs=(runs[-1],), runs=entries)
    tables = (f"{RESULTS}/analysis/curves.txt", f"{RESULTS}/analysis/results.json")
    perform(phase="analyse", name="analyse", module=ANALYSE, inputs=tuple(runs), outputs=tables, settings={})
    figure = (f"{RESULTS}/figures/dose.svg",)
    inputs = (*tables, "config/fake.yaml")
    perform(phase="draw", name="dose", module=DRAW, inputs=inputs, outputs=figure, settings={}, plan=None)
    return repository
