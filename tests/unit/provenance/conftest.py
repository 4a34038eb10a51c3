"""A small repository with a three-job study: two training jobs, an analysis, a figure."""

import json
import shutil
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import pytest

from gradnoise.base import strict_yaml
from gradnoise.base.closure import code_closure
from gradnoise.base.environment import pins
from gradnoise.provenance.records import Decided, Job, Record, Run, attempt

SOURCE = Path(__file__).parents[3] / "src"
RESULTS = "results/fake"
# Real modules of the package, small ones, stand for the phases' modules.
TRAIN, ANALYSE, DRAW = "gradnoise.base.layout", "gradnoise.base.strict_yaml", "gradnoise.base.errors"
PACKAGES = {"train": ("torch", "pyarrow"), "analyse": ("pandas",), "draw": ()}


def decided(phase: str, name: str) -> Decided:
    """What decides a job of the fake study, by its configuration, plan and pins as they are now."""
    settings, runs = {}, []
    if phase == "train":
        settings = strict_yaml.load("config/fake.yaml")["blocks"]["race"]
        first = strict_yaml.load("preregistration/plan.yaml")["first_seed"]
        block, cell, chunk = name.split("/")
        start, stop = int(chunk[1:3]), int(chunk[4:])
        for index in range(start, stop + 1):
            place = {"block": block, "cell": cell, "seed_index": index}
            runs.append(Run(run_id=f"r{index}", **place, seed=first + index))
    return Decided(settings=settings, runs=tuple(runs), pins=pins(PACKAGES[phase]))


def today(record: Record) -> Decided:
    return decided(record.phase, record.name)


@pytest.fixture
def repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory: lock file, configuration, plan and the code, but no result and no Git."""
    root = tmp_path / "repository"
    for module in (TRAIN, ANALYSE, DRAW):
        for path in code_closure(module, SOURCE):
            (root / path).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(SOURCE.parent / path, root / path)
    locked = [f"{name}=={version(name)} \\\n    --hash=sha256:0\n" for name in ("pandas", "pyarrow", "ruff")]
    torch = version("torch").partition("+")[0]
    for path, text in {
        "requirements.lock": "".join(locked),
        "pyproject.toml": f'[project]\noptional-dependencies.study = ["torch=={torch}"]\n',
        "config/fake.yaml": "# a study\nblocks: {race: {width: 8}}\n",
        "preregistration/plan.yaml": "first_seed: 100\n",
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
            "plan": "preregistration/plan.yaml",
        }
        fields |= changes
        return Job(**{"decided": decided(str(fields["phase"]), str(fields["name"])), **fields})

    return make


@pytest.fixture
def perform(make_job: Callable[..., Job]) -> Callable[..., Path]:
    """Attempt a job whose outputs are what it is called and what it read; gives the record's path."""

    def run(**changes: object) -> Path:
        job = make_job(**changes)
        with attempt(job) as record:
            for output in job.outputs:
                Path(output).parent.mkdir(parents=True, exist_ok=True)
                text = job.name + "".join(Path(path).read_text() for path in job.inputs)
                results = json.dumps({"label": "REHEARSAL", "text": text})
                Path(output).write_text(results if output.endswith(".json") else text)
        return record

    return run


@pytest.fixture
def study(repository: Path, perform: Callable[..., Path]) -> Path:
    """The repository after the whole study ran."""
    runs = []
    for chunk in ("s00-01", "s02-02"):
        runs.append(f"{RESULTS}/runs/race/b016/{chunk}.scores.txt")
        perform(name=f"race/b016/{chunk}", outputs=(runs[-1],))
    tables = (f"{RESULTS}/analysis/curves.txt", f"{RESULTS}/analysis/results.json")
    perform(phase="analyse", name="analyse", module=ANALYSE, inputs=tuple(runs), outputs=tables)
    figures = tuple(f"{RESULTS}/figures/{name}" for name in ("dose.svg", "dose.txt", "other.svg"))
    inputs = (*tables, "config/fake.yaml")
    perform(phase="draw", name="dose", module=DRAW, inputs=inputs, outputs=figures, plan=None)
    return repository
