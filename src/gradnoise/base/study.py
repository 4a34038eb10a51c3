"""What a study runs: the typed form of `config/<study>.yaml`.

Science only: no threads, no folders, no memory. The JSON schemas in `workflow/schemas/` are generated from
these models by `python -m gradnoise.base.study`. A cell or an arm is data, so a new one needs no code.
"""

import re
from collections.abc import Iterator
from difflib import get_close_matches
from itertools import product
from pathlib import Path
from typing import Annotated, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from pydantic_core import PydanticCustomError

from gradnoise.base import strict_yaml
from gradnoise.base.errors import InputError
from gradnoise.base.files import write_json

M = TypeVar("M", bound=BaseModel)
STUDY_NAME = r"^[a-z0-9][a-z0-9-]*$"
# Fields that hold one of several models, and the kinds by which the model is chosen.
_KINDS = {"task": ("pair", "text"), "noise": ("inject", "reweight", "nap")}

Count = Annotated[int, Field(ge=1, strict=True)]
# Strict: a quoted number is a fault in a study, not something to convert.
Positive = Annotated[float, Field(gt=0, strict=True)]
NotNegative = Annotated[float, Field(ge=0, strict=True)]
Fraction = Annotated[float, Field(ge=0, le=1, strict=True)]
Decay = Annotated[float, Field(ge=0, lt=1, strict=True)]
Degrees = Annotated[float, Field(gt=2, strict=True)]


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


class Phased(Strict):
    """Noise that may be on in a part of the trunk only."""

    phase: tuple[Fraction, Fraction] | None = Field(
        default=None, description="when the noise is on, as shares of the trunk's cap; null: always"
    )

    def updates(self, cap: int) -> tuple[int, int]:
        """First and last update with noise of a trunk of `cap` updates; adjacent phases share none."""
        first, last = (0.0, 1.0) if self.phase is None else self.phase
        return round(first * cap) + 1, round(last * cap)


class Inject(Phased):
    """Noise of the measured gradient noise's covariance, or of a coarser one, added to the updates."""

    kind: Literal["inject"]
    source: Literal["gaussian", "student_t", "low_rank"]
    scale: Positive = Field(description="variance injected over the gradient noise's own")
    where: Literal["pre", "post", "frozen_v"] = Field(
        description="before the preconditioner, after it, or before it but unseen by the second moment"
    )
    layers: str = Field(default="*", description="glob patterns of parameters or modules, joined by |")
    shape: Literal["diagonal", "tensor", "isotropic"] = Field(
        default="diagonal", description="gaussian and student_t: variances by coordinate, by tensor, or one"
    )
    degrees: Degrees = Field(default=5.0, description="of student_t")
    tails: Literal["iid", "elliptical", "tensor"] = Field(
        default="iid", description="student_t: stretched by coordinate, by update or by tensor and update"
    )
    rank: Count = Field(default=4, description="low_rank: directions beside the diagonal")

    @model_validator(mode="after")
    def _belongs(self) -> "Inject":
        own = {"gaussian": {"shape"}, "student_t": {"shape", "degrees", "tails"}, "low_rank": {"rank"}}
        for field in ("shape", "degrees", "tails", "rank"):
            if field in self.model_fields_set - own[self.source]:
                raise ValueError(f"{field} is no setting of source {self.source}")
        return self


class Reweight(Phased):
    """Losses weighted at random: the gradient noise of a smaller batch, in the same pass."""

    kind: Literal["reweight"]
    to_batch: Count = Field(description="the batch whose noise it is")
    law: Literal["gaussian", "student_t", "bernoulli", "multinomial", "subset"] = "gaussian"
    degrees: Degrees | None = Field(default=None, description="of student_t")

    @model_validator(mode="after")
    def _belongs(self) -> "Reweight":
        if self.degrees is not None and self.law != "student_t":
            raise ValueError(f"degrees is no setting of law {self.law}")
        return self


class Nap(Phased):
    """Noise aligned with the layers' inputs, or with what differs between the gradients of micro-batches."""

    kind: Literal["nap"]
    rank: Count
    temperature: NotNegative = Field(description="exposure injected over the gradient noise's own")
    alignment: Fraction = Field(description="0: isotropic; 1: as the target; the power is the same")
    target: Literal["features", "tasks"] = "features"
    layers: str = Field(default="*", description="glob patterns of linear layers, joined by |")


Condition = Annotated[Inject | Reweight | Nap, Field(discriminator="kind")]


class Grid(Strict):
    """Cells: every combination of the listed values."""

    batch: tuple[Count, ...] = Field(min_length=1)
    learning_rate: tuple[Positive, ...] = Field(min_length=1)


class Arm(Strict):
    """A cell that is written out: it may have a noise condition, on its trunk."""

    batch: Count
    learning_rate: Positive
    noise: Condition | None = Field(default=None, description="null: the batch's own noise alone")

    @model_validator(mode="after")
    def _adds(self) -> "Arm":
        if isinstance(self.noise, Reweight) and self.noise.to_batch > self.batch:
            raise ValueError(f"noise.to_batch {self.noise.to_batch} must be at most batch {self.batch}")
        return self


class Cell(Arm):
    """One noise condition of a block: a cell of its grid, or an arm under its name."""

    name: str


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
    grid: Grid | None = Field(default=None, description="cells without injected noise")
    arms: dict[Annotated[str, Field(pattern=r"^[a-z][a-z0-9-]*$")], Arm] = Field(
        default={}, description="further cells by name, each with its noise condition"
    )

    @model_validator(mode="after")
    def _whole_updates(self) -> "Block":
        names = [cell.name for cell in self.cells()]
        if not names:
            raise ValueError("needs a grid, or arms, or both")
        if len(set(names)) < len(names):
            raise ValueError(f"grid and arms give the same cell twice: {names}")
        for cell in self.cells():
            self._check(cell, f"arms.{cell.name}" if cell.name in self.arms else "grid")
        return self

    def _check(self, cell: Cell, where: str) -> None:
        """Refuse a cell whose batch does not fit the block's settings."""
        batch, parts = cell.batch, self.noise.contributions
        if batch % parts:
            raise ValueError(f"{where}.batch {batch} must be a multiple of noise.contributions")
        for budget in self.branches.sequences:
            if budget % batch:
                raise ValueError(f"branches.sequences {budget} must be a multiple of {where}.batch {batch}")
        if self.branches.updates is not None and self.branches.updates > self.cap(cell):
            raise ValueError(f"branches.updates {self.branches.updates} is past the cap of batch {batch}")
        if cell.noise is not None:
            first, last = cell.noise.updates(self.cap(cell))
            if first > last:
                raise ValueError(f"{where}.noise.phase holds none of the trunk's {self.cap(cell)} updates")
        if isinstance(cell.noise, Reweight):
            size, drawn = batch // parts, cell.noise.to_batch / parts
            if size < 2:
                raise ValueError(f"{where}.batch {batch} must be at least twice noise.contributions")
            if cell.noise.law in ("multinomial", "subset") and not drawn.is_integer():
                told = f"law {cell.noise.law} draws {drawn:g} of a micro-batch of {size}"
                raise ValueError(f"{where}.noise.to_batch: {told}: must be a whole number")

    def cap(self, cell: Cell) -> int:
        """Updates of a trunk that uses its whole budget."""
        return self.branches.sequences[-1] // cell.batch

    def cells(self) -> list[Cell]:
        """The block's cells in the order of its grid, then its arms."""
        pairs = product(self.grid.batch, self.grid.learning_rate) if self.grid else ()
        grid = [Cell(name=f"b{b:03d}-lr{rate:g}", batch=b, learning_rate=rate) for b, rate in pairs]
        return grid + [Cell(name=name, **dict(arm)) for name, arm in self.arms.items()]

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
        # The kind of a task or noise, by which its model was chosen, is no part of the field's path.
        path = [str(part) for n, part in enumerate(loc) if part not in _KINDS.get(str(loc[n - 1]), ())]
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
