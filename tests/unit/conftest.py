"""A study small enough to train in a test."""

from pathlib import Path

import pytest

from gradnoise.base.study import Study, load_study

SMALL = """
plan: preregistration/rehearsal.yaml
blocks:
  race:
    task: {kind: pair, classes: 12, features: 8, labels: 4, context_classes: 2, copies: 2, item_noise: 0.1,
      in_context: 1.0}
    model: {width: 8, layers: 1, heads: 1}
    branches: {sequences: [256, 512], updates: 4, anneal: 0.5}
    evaluation_sequences: 256
    noise: {contributions: 4, every_sequences: 64, curvature_every: 2}
    seeds: 2
    grid: {batch: [16, 64], learning_rate: [2.0e-3]}
"""


@pytest.fixture
def study(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Study:
    given = {name: Path(name).read_text() for name in ("preregistration/rehearsal.yaml", "config/quick.yaml")}
    monkeypatch.chdir(tmp_path)
    for name, text in {**given, "config/small.yaml": SMALL}.items():
        Path(name).parent.mkdir(exist_ok=True)
        Path(name).write_text(text)
    return load_study("small")
