"""Who and what to cite: `CITATION.cff`, as the crate and codecheck.yml repeat it."""

from pathlib import Path

from pydantic import BaseModel, Field

from gradnoise.base import strict_yaml
from gradnoise.base.study import validated


class Author(BaseModel):
    """An author: an entity with a `name`, or a person with given and family names; ORCID as a URL."""

    name: str = ""
    given_names: str = Field(default="", alias="given-names")
    family_names: str = Field(default="", alias="family-names")
    orcid: str | None = None

    @property
    def known_as(self) -> str:
        """The name to print."""
        return self.name or f"{self.given_names} {self.family_names}".strip()


class Citation(BaseModel):
    """The parts of `CITATION.cff` that other files repeat."""

    title: str
    version: str
    license: str
    keywords: tuple[str, ...] = ()
    authors: tuple[Author, ...] = Field(min_length=1)


def read_citation(root: Path | str = ".") -> Citation:
    """`CITATION.cff` of the repository; `InputError` where it is missing or lacks a field."""
    path = Path(root, "CITATION.cff")
    return validated(Citation, strict_yaml.load(path), str(path))
