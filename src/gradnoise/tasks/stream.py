"""What training and scoring need of a task, and the stream of each kind of task."""

from pathlib import Path
from typing import Protocol

from torch import Tensor

from gradnoise.base.errors import InputError
from gradnoise.base.study import PairTask, TextTask


class Stream(Protocol):
    """What training needs of a task: shapes, and numbered chunks of training data."""

    inputs: int
    outputs: int
    context: int
    readout: str
    token_inputs: bool

    def draw(self, chunk: int, count: int) -> tuple[Tensor, Tensor]:
        """Chunk `chunk` of the training stream: `count` inputs and targets."""

    def validation(self, count: int) -> tuple[Tensor, Tensor]:
        """`count` inputs and targets that no run trains on."""


def stream(task: PairTask | TextTask, seed: int, corpus: str | Path | None = None) -> Stream:
    """The stream of a task for one seed; text needs the prepared `corpus`."""
    if isinstance(task, PairTask):
        from gradnoise.tasks.pair import PairStream

        return PairStream(task, seed)
    if corpus is None:
        raise InputError("corpus", None, "text needs the prepared corpus: run `gradnoise run prepare` first")
    from gradnoise.tasks.text import TextStream

    return TextStream(task, seed, corpus)
