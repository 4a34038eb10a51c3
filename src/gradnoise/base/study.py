"""What a study runs: the typed form of `config/<study>.yaml`.

Science only: no threads, no folders, no memory. The JSON schemas in `workflow/schemas/` are generated from
these models by `python -m gradnoise.base.study`. An arm or a cell is data, so a new one needs no code.
"""

import re
from collections.abc import Iterator
from difflib import get_close_matches
from pathlib import Path
from typing import Annotated, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from pydantic_core import PydanticCustomError

from gradnoise.base import strict_yaml
from gradnoise.base.errors import InputError
from gradnoise.base.files import write_json

M = TypeVar("M", bound=BaseModel)
STUDY_NAME = r"^[a-z0-9][a-z0-9-]*$"

Count = Annotated[int, Field(ge=1, strict=True)]
# Strict: a quoted number is a fault in a study, not something to convert.
Positive = Annotated[float, Field(gt=0, strict=True)]
NotNegative = Annotated[float, Field(ge=0, strict=True)]
Fraction = Annotated[float, Field(ge=0, le=1, strict=True)]
Decay = Annotated[float, Field(ge=0, lt=1, strict=True)]


class Strict(BaseModel):
    """No unknown key, no NaN, no change after loading."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _no_unknown_key(cls, given: object) -> object:
        """Refuse a misspelt key by its name, before what it was meant to be is called missing."""
        for key in given if isinstance(given, dict) else ():
            if key not in cls.model_fields:
                near = get_close_matches(str(key), cls.model_fields, 1)
                mend = f"did you mean {near[0]}?" if near else f"must be one of {sorted(cls.model_fields)}"
                raise PydanticCustomError(
                    "unknown_key", "no such setting: {mend}", {"key": key, "mend": mend}
                )
        return given


class PairTask(Strict):
    """Pair-token few-shot classification (blocks A and B)."""

    kind: Literal["pair"]
    classes: Count = Field(description="K, classes with a fixed label")
    features: Count = Field(description="D, dimension of an item")
    labels: Count = Field(description="L, labels; chance of an in-weights answer is 1/L")
    context_classes: Count = Field(description="distinct classes in a context")
    copies: Count = Field(description="items of each class in a context")
    item_noise: NotNegative = Field(description="eps, item noise relative to class spread")
    in_context: Fraction = Field(description="pB, probability that the query's class is in the context")

    @model_validator(mode="after")
    def _fits(self) -> "PairTask":
        if self.context_classes >= self.classes:
            raise ValueError("context_classes must be below classes")
        if self.context_classes > self.labels:
            raise ValueError("context_classes must not exceed labels")
        if self.labels > self.classes:
            raise ValueError("labels must not exceed classes: every label needs a class")
        return self


class TextTask(Strict):
    """Characters of the Shakespeare plays (block D)."""

    kind: Literal["text"]
    context: Count = Field(description="characters a sequence predicts")
    validation_plays: Count = Field(description="plays held out whole")


class Model(Strict):
    """A decoder-only transformer: pre-layer-norm, learned positions, ReLU."""

    width: Count
    layers: Count
    heads: Count
    mlp_ratio: Count = 4

    @model_validator(mode="after")
    def _divides(self) -> "Model":
        if self.width % self.heads:
            raise ValueError("width must be a multiple of heads")
        return self


class Optimizer(Strict):
    """AdamW with a constant learning rate on the trunk (the cell gives it)."""

    betas: tuple[Decay, Decay] = (0.9, 0.99)
    eps: Positive = 1e-8
    weight_decay: NotNegative = 0.0
    clip: Positive | None = Field(default=None, description="largest gradient norm; null: no clipping")


class Branches(Strict):
    """Where the trunk is branched, annealed to learning rate 0 and scored."""

    sequences: tuple[Count, ...] = Field(min_length=1, description="budgets; the last is the trunk's cap")
    updates: Count | None = Field(default=None, description="one more branch, at this number of updates")
    anneal: Positive = Field(default=0.5, description="length of a branch, as a share of its trunk")
    stop_loss: Positive | None = Field(
        default=None, description="no budget is trained after a branch scored this validation loss or less"
    )

    @model_validator(mode="after")
    def _ascending(self) -> "Branches":
        if list(self.sequences) != sorted(set(self.sequences)):
            raise ValueError("branches.sequences must ascend")
        return self


class Noise(Strict):
    """How often and from how many micro-batches the live step is measured."""

    contributions: Annotated[int, Field(ge=3, strict=True)] = Field(
        default=8, description="micro-batches of a measured update; a standard error needs 3"
    )
    every_sequences: Count = Field(description="sequences between two measured updates")
    curvature_every: Count | None = Field(
        default=None, description="measured updates between two passes for the curvature of P-NE*; null: none"
    )


class Grid(Strict):
    """Cells: every combination of the listed values."""

    batch: tuple[Count, ...] = Field(min_length=1)
    learning_rate: tuple[Positive, ...] = Field(min_length=1)


class Cell(Strict):
    """One noise condition of a block."""

    batch: Count
    learning_rate: Positive

    @property
    def name(self) -> str:
        return f"b{self.batch:03d}-lr{self.learning_rate:g}"


class Block(Strict):
    """One task with everything trained on it."""

    task: PairTask | TextTask = Field(discriminator="kind")
    model: Model
    optimizer: Optimizer = Optimizer()
    branches: Branches
    evaluation_sequences: Annotated[int, Field(ge=2, strict=True)] = Field(
        description="sequences behind each score; a standard error needs 2"
    )
    noise: Noise
    seeds: Count = Field(description="the first n of the plan's derived seeds")
    seeds_per_job: Count = Field(default=5, description="seeds trained in one job; part of the design")
    grid: Grid

    @model_validator(mode="after")
    def _whole_updates(self) -> "Block":
        names = [cell.name for cell in self.cells()]
        if len(set(names)) < len(names):
            raise ValueError(f"grid gives the same cell twice: {names}")
        for batch in self.grid.batch:
            if batch % self.noise.contributions:
                raise ValueError(f"grid.batch {batch} must be a multiple of noise.contributions")
            for budget in self.branches.sequences:
                if budget % batch:
                    raise ValueError(f"branches.sequences {budget} must be a multiple of grid.batch {batch}")
        extra = self.branches.updates
        if extra is not None and extra > self.branches.sequences[-1] // max(self.grid.batch):
            raise ValueError(f"branches.updates {extra} is past the cap of batch {max(self.grid.batch)}")
        return self

    def cells(self) -> list[Cell]:
        """The block's cells in the order of its grid."""
        return [
            Cell(batch=batch, learning_rate=rate)
            for batch in self.grid.batch
            for rate in self.grid.learning_rate
        ]

    def cell(self, name: str) -> Cell:
        """The cell of that name; `InputError` names those that exist."""
        for cell in self.cells():
            if cell.name == name:
                return cell
        raise InputError("cell", name, f"must be one of {[cell.name for cell in self.cells()]}")

    def chunks(self) -> list[str]:
        """Names of the jobs of a cell, `s00-04` for seeds 0 to 4."""
        starts = range(0, self.seeds, self.seeds_per_job)
        return [f"s{start:02d}-{min(start + self.seeds_per_job, self.seeds) - 1:02d}" for start in starts]


class Config(Strict):
    """`config/config.yaml`: the study that a bare `snakemake` and dvc.yaml work on."""

    study: str = Field(pattern=STUDY_NAME, description="its settings are config/<study>.yaml")


class Study(Strict):
    """A study: its plan and its blocks."""

    plan: str = Field(pattern=r"^preregistration/[a-z0-9_.-]+\.yaml$", description="the plan that decides")
    device: Literal["cpu", "cuda"] = Field(
        default="cpu", description="machine kind; draws of different kinds differ, each is reproducible"
    )
    blocks: dict[Annotated[str, Field(pattern=r"^[a-z][a-z0-9_]*$")], Block] = Field(min_length=1)

    def block(self, name: str) -> Block:
        """The block of that name; `InputError` names those that exist."""
        if name not in self.blocks:
            raise InputError("block", name, f"must be one of {sorted(self.blocks)}")
        return self.blocks[name]

    def jobs(self) -> Iterator[tuple[str, str, str]]:
        """Every training job: (block, cell, chunk)."""
        for block_name, block in self.blocks.items():
            for cell in block.cells():
                for chunk in block.chunks():
                    yield block_name, cell.name, chunk


def chunk_seeds(chunk: str) -> range:
    """Seed indices of a job's name: `s00-04` is 0, 1, 2, 3, 4."""
    match = re.fullmatch(r"s(\d+)-(\d+)", chunk)
    if match is None:
        raise InputError("chunk", chunk, "must look like s00-04")
    return range(int(match[1]), int(match[2]) + 1)


def study_path(study: str) -> Path:
    """Where a study's settings are."""
    if re.fullmatch(STUDY_NAME, study) is None:
        raise InputError("study", study, "must be lower-case letters, digits and hyphens")
    return Path("config") / f"{study}.yaml"


def load_study(study: str) -> Study:
    """Read and check `config/<study>.yaml`; every fault is one `InputError` line."""
    path = study_path(study)
    if not path.is_file():
        there = sorted(file.stem for file in path.parent.glob("*.yaml") if file.stem != "config")
        mend = f"the studies are {', '.join(there)}" if there else "run from the repository root"
        raise InputError(str(path), "missing", mend)
    return validated(Study, strict_yaml.load(path), str(path))


def validated(model: type[M], value: object, where: str) -> M:
    """Check `value` against a typed model; the first fault becomes an `InputError` naming its field."""
    try:
        return model.model_validate(value)
    except ValidationError as error:
        first = error.errors()[0]
        loc, fault, given = first["loc"], first["type"], first["input"]
        if fault == "unknown_key":
            key = first["ctx"]["key"]
            loc, given = (*loc, key), given[key]
        # The kind of a task, by which its model was chosen, is no part of the field's path.
        path = [
            str(part) for n, part in enumerate(loc) if n == 0 or loc[n - 1] != "task" or n + 1 == len(loc)
        ]
        if fault == "missing":
            value = "missing"
        elif isinstance(given, dict) and fault != "unknown_key":
            value = "these settings do not fit together"
        else:
            value = repr(given)[:120]
        mend = first["msg"].removeprefix("Value error, ")
        raise InputError(f"{where}: {'.'.join(path)}", value, mend) from error


def write_schemas(folder: Path) -> None:
    """Write the JSON schemas of `config.yaml` and of a study's settings, for editors."""
    models: dict[str, type[Strict]] = {"config": Config, "study": Study}
    for name, model in models.items():
        schema = {"$schema": "https://json-schema.org/draft/2020-12/schema", **model.model_json_schema()}
        write_json(folder / f"{name}.schema.json", schema)


if __name__ == "__main__":
    write_schemas(Path("workflow/schemas"))
