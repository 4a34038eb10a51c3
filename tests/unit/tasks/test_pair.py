import pytest
import torch

from gradnoise.base.study import PairTask
from gradnoise.evaluation.scores import scores
from gradnoise.tasks.pair import ContextOracle, PairStream, WeightsOracle

TASK = PairTask(
    kind="pair",
    classes=96,
    features=16,
    labels=16,
    context_classes=3,
    copies=2,
    item_noise=0.1,
    in_context=1.0,
)


def test_a_context_holds_each_class_as_often_and_the_query_without_label() -> None:
    inputs, targets = PairStream(TASK, 1).draw(0, 500)
    items, labels = inputs[..., :16], inputs[..., 16:]
    assert inputs.shape == (500, 7, 32)
    assert torch.equal(labels[:, -1], torch.zeros(500, 16))
    assert torch.equal(labels[:, :-1].sum(-1), torch.ones(500, 6))
    assert set(labels.sum(1).unique().tolist()) <= {0.0, 2.0, 4.0, 6.0}, (
        "labels come in whole classes of two copies"
    )
    assert labels.sum(1).gather(1, targets[:, None]).min() >= 2, "with pB = 1 the answer is in the context"
    # 3500 items of expected squared norm 1; relative sd of the mean is sqrt(2/16/96) over class means.
    assert items.square().sum(-1).mean().item() == pytest.approx(1.0, abs=0.15)


def test_the_stream_is_the_same_for_every_batch_size_and_differs_by_chunk_and_seed() -> None:
    one, other = PairStream(TASK, 1), PairStream(TASK, 1)
    assert torch.equal(one.draw(3, 64)[0], other.draw(3, 64)[0])
    assert not torch.equal(one.draw(3, 64)[0], one.draw(4, 64)[0])
    assert not torch.equal(one.draw(3, 64)[0], PairStream(TASK, 2).draw(3, 64)[0])


def test_in_context_share_is_pb() -> None:
    task = TASK.model_copy(update={"in_context": 0.8})
    inputs, targets = PairStream(task, 1).draw(0, 4096)
    shown = inputs[:, :-1, 16:].sum(1).gather(1, targets[:, None])[:, 0] > 0
    # An absent class's label is still shown when a context class shares it: 5 of 95 others, three times.
    by_chance = 1 - (1 - 5 / 95) ** 3
    expected = 0.8 + 0.2 * by_chance
    assert shown.float().mean().item() == pytest.approx(expected, abs=0.026)  # four standard errors


def test_no_evaluation_sequence_is_trained_on() -> None:
    stream = PairStream(TASK, 1)
    trained = {tuple(row) for row in stream.draw(0, 2048)[0][:, -1, :16].tolist()}
    for inputs in (stream.validation(512)[0], stream.no_support(512)[0], stream.swapped(512)[0]):
        assert not trained & {tuple(row) for row in inputs[:, -1, :16].tolist()}


def test_swapped_contexts_contradict_the_weights() -> None:
    inputs, by_context, by_weights = PairStream(TASK, 1).swapped(1000)
    assert (by_context != by_weights).all()
    shown = inputs[:, :-1, 16:].sum(1)
    assert (shown.gather(1, by_context[:, None]) == 2).all()
    assert (shown.gather(1, by_weights[:, None]) == 2).all(), "a rotation of the same three labels"


def test_oracles_have_the_scores_that_define_them() -> None:
    stream = PairStream(TASK, 5)
    context, weights = scores(ContextOracle(TASK), stream, 2000), scores(WeightsOracle(stream), stream, 2000)
    assert context["icl"].value > 0.99
    assert context["swap_context"].value > 0.99
    assert context["iwl"].value < 0.12, "1/16 is chance; shared labels add some"
    assert weights["iwl"].value > 0.99
    assert weights["swap_weights"].value > 0.99
    assert weights["icl"].value < 0.12


def test_the_context_oracle_is_calibrated_where_classes_overlap() -> None:
    """With heavy item noise the posterior is uncertain: its mean confidence must equal its accuracy."""
    task = TASK.model_copy(update={"item_noise": 1.0})
    inputs, targets = PairStream(task, 3).novel(20000)
    posterior = ContextOracle(task)(inputs).softmax(-1)
    confidence, choice = posterior.max(-1)
    hit = (choice == targets).double()
    assert 0.6 < hit.mean() < 0.95
    stderr = (hit - confidence).std().item() / 20000**0.5
    assert abs((hit - confidence).mean().item()) < 4 * stderr

    # Any other temperature is a worse posterior.
    def loss(scale: float) -> float:
        return torch.nn.functional.cross_entropy(scale * ContextOracle(task)(inputs), targets).item()

    assert loss(1.0) < min(loss(0.8), loss(1.25))
