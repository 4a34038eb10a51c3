"""One small study for all workflow tests, built once; tests that change anything work on copies of it."""

from collections.abc import Callable
from pathlib import Path

import pytest
from tests.workflow.project import JOBS, Project, make_tiny


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Project:
    """The project with study `tiny` built, kept by DVC, committed and tagged v1. Only for reading."""
    scratch = tmp_path_factory.mktemp("workflow")
    project = make_tiny(scratch / "tiny", scratch)
    built = project.snakemake()
    assert built.jobs == JOBS, built
    project.commit("Version 1")
    project.git("tag", "v1")
    return project


@pytest.fixture
def copy(tiny: Project, tmp_path: Path) -> Project:
    """A working copy to change."""
    return tiny.copy(tmp_path / "copy")


@pytest.fixture(scope="module")
def shared(tiny: Project, tmp_path_factory: pytest.TempPathFactory) -> Project:
    """A working copy for a module's tests that leave everything but times and provenance as it was."""
    return tiny.copy(tmp_path_factory.mktemp("shared") / "copy")


@pytest.fixture
def edited(shared: Project) -> Callable[..., "Edit"]:
    """`with edited(file, change):` edits a file of the shared copy and puts it back."""
    return lambda file, change: Edit(shared, file, change)


class Edit:
    """An edit that is undone at the end of the block: content comes back, the time does not."""

    def __init__(self, project: Project, file: str, change: Callable[[str], str]) -> None:
        self.project, self.file, self.change = project, file, change

    def __enter__(self) -> None:
        self.before = (self.project.path / self.file).read_bytes()
        self.project.edit(self.file, self.change)

    def __exit__(self, *_: object) -> None:
        (self.project.path / self.file).write_bytes(self.before)
