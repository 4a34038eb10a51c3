"""Block D's text as a stream: next-character prediction on the prepared plays."""

import hashlib
from pathlib import Path

import torch
from torch import Tensor

from gradnoise.base.errors import InputError
from gradnoise.base.streams import generator
from gradnoise.base.study import TextTask
from gradnoise.base.tables import PLAYS, read_table


class TextStream:
    """Next-character prediction on the plays.

    Training sequence n starts at a uniform position of the training text, drawn from stream `data`;
    validation windows are evenly spaced over the held-out plays and the same for every run.
    """

    readout = "all"
    token_inputs = True

    def __init__(self, task: TextTask, seed: int, corpus: Path | str) -> None:
        rows = read_table(corpus, PLAYS).to_pydict()
        texts: dict[str, str] = {"train": "", "validation": ""}
        for name, part, text, digest in zip(
            rows["play"], rows["split"], rows["text"], rows["sha256"], strict=True
        ):
            if hashlib.sha256(text.encode()).hexdigest() != digest:
                raise InputError(f"{corpus}: {name}", "text does not match its hash", "rebuild the corpus")
            texts[part] += text
        self.symbols = sorted(set(texts["train"] + texts["validation"]))
        self.inputs = self.outputs = len(self.symbols)
        self.context = task.context
        self._seed = seed
        self._train, self._validation = (self._encode(texts[part]) for part in ("train", "validation"))

    def _encode(self, text: str) -> Tensor:
        # Cleaned text is ASCII, so a table of 128 codes maps five million characters at once.
        table = torch.zeros(128, dtype=torch.int64)
        table[[ord(symbol) for symbol in self.symbols]] = torch.arange(len(self.symbols))
        return table[torch.frombuffer(bytearray(text.encode("ascii")), dtype=torch.uint8).long()]

    def draw(self, chunk: int, count: int) -> tuple[Tensor, Tensor]:
        """Chunk `chunk` of the training stream: inputs and next characters, both (count, context)."""
        highest = len(self._train) - self.context
        starts = torch.randint(highest, (count,), generator=generator(self._seed, "data", chunk))
        return self._windows(self._train, starts)

    def _windows(self, text: Tensor, starts: Tensor) -> tuple[Tensor, Tensor]:
        windows = text[starts[:, None] + torch.arange(self.context + 1)]
        return windows[:, :-1], windows[:, 1:]

    def validation(self, count: int) -> tuple[Tensor, Tensor]:
        """`count` evenly spaced windows of the held-out plays: inputs and next characters."""
        starts = torch.linspace(0, len(self._validation) - self.context - 1, count, dtype=torch.float64)
        return self._windows(self._validation, starts.long())
