"""The fixture study, built once; and memories of pure functions, so that a hundred audits take minutes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import wraps
from pathlib import Path
from typing import Any

import pytest
from tests.audit.fixture_study import Repository, build

from gradnoise.analysis import rehearse
from gradnoise.base.files import sha256_of
from gradnoise.figures import draw


@pytest.fixture(scope="session", autouse=True)
def remembered() -> Iterator[None]:
    """Figures and simulated studies are made once for the same input.

    Every attack redraws and replays the same things over and over, the cheat as well as the audit. That they
    come out the same each time is tested where these functions are.
    """
    with pytest.MonkeyPatch.context() as patches:
        patches.setattr(rehearse, "replay", _remember(rehearse.replay, _of_replay))
        patches.setattr(draw, "svg", _remember(draw.svg, _of_picture))
        yield


@pytest.fixture(scope="session")
def study(tmp_path_factory: pytest.TempPathFactory) -> Repository:
    """The repository of the fixture study, published. Only for reading."""
    return build(tmp_path_factory.mktemp("audit") / "repository")


@pytest.fixture
def copy(study: Repository, tmp_path: Path) -> Repository:
    """A copy to change."""
    return study.copy(tmp_path / "repository")


def _remember(function: Callable[..., Any], name: Callable[..., object]) -> Callable[..., Any]:
    found: dict[object, Any] = {}

    @wraps(function)
    def remembering(*given: Any, **named: Any) -> Any:
        key = name(*given, **named)
        if key not in found:
            found[key] = function(*given, **named)
        return found[key]

    return remembering


def _of_replay(plan: Any, study: Any, truth: Any, number: int) -> object:
    return plan.key, sha256_of([each.model_dump(mode="json") for each in (plan, study, truth)]), number


def _of_picture(module: Any, data: Any, results: Any, **named: str) -> object:
    # The function that plots is part of the input: an attack replaces it.
    values = [data.to_pylist(), results, named]
    return module.SPEC.name, module.plot, sha256_of(values), str(data.schema)
