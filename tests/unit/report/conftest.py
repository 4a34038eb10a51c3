"""One rendered study for the tests of this folder."""

from collections.abc import Iterator
from contextlib import chdir
from pathlib import Path

import pytest
from tests.unit.figures.synthetic_results import write_study

from gradnoise.figures.draw import draw
from gradnoise.report.render import render


@pytest.fixture(scope="session")
def _rendered(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("rendered")
    with chdir(root):
        write_study()
        draw("quick")
        render("quick")
    return root


@pytest.fixture
def rendered(_rendered: Path) -> Iterator[Path]:
    """The working folder of a study with its report; to be read only."""
    with chdir(_rendered):
        yield _rendered
