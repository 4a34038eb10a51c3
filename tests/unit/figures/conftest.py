"""One drawn study for the tests of this folder."""

from collections.abc import Iterator
from contextlib import chdir
from pathlib import Path

import pytest
from tests.unit.figures.synthetic_results import write_study

from gradnoise.figures.draw import draw


@pytest.fixture(scope="session")
def _drawn(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("drawn")
    with chdir(root):
        write_study()
        draw("quick")
    return root


@pytest.fixture
def drawn(_drawn: Path) -> Iterator[Path]:
    """The working folder of a study whose figures are drawn; to be read only."""
    with chdir(_drawn):
        yield _drawn
