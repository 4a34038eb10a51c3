import math

import pytest
import torch

from gradnoise.base.study import PairTask
from gradnoise.evaluation.names import NAMES
from gradnoise.evaluation.scores import scores
from gradnoise.tasks.pair import PairStream

TASK = PairTask(
    kind="pair",
    classes=48,
    features=8,
    labels=16,
    context_classes=3,
    copies=2,
    item_noise=0.1,
    in_context=1.0,
)


class FirstLabelShown(torch.nn.Module):
    """Answers the label of the first context item."""

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return 10.0 * inputs[:, 0, TASK.features :]


def test_guessing_among_the_context_scores_one_third() -> None:
    found = scores(FirstLabelShown(), PairStream(TASK, 0), 8000)
    assert list(found) == list(NAMES["pair"])
    for name in ("icl", "swap_context", "swap_weights"):
        assert found[name].stderr == pytest.approx(math.sqrt(2 / 9 / 8000), rel=0.05)
        assert abs(found[name].value - 1 / 3) < 4 * found[name].stderr


def test_the_loss_is_the_mean_cross_entropy() -> None:
    found = scores(FirstLabelShown(), PairStream(TASK, 0), 1500)
    inputs, targets = PairStream(TASK, 0).validation(1500)
    expected = torch.nn.functional.cross_entropy(FirstLabelShown()(inputs), targets)
    assert found["validation_loss"].value == pytest.approx(expected.item(), rel=1e-5)


def test_scores_are_the_same_again() -> None:
    one, other = (scores(FirstLabelShown(), PairStream(TASK, 4), 256) for _ in range(2))
    assert one == other
