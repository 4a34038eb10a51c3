"""Scores of a model on its task, each with its standard error and unit.

Pair-token classification (names after Chan et al., 2022, and Singh et al., 2023):

- `icl`: accuracy on novel classes; guessing among the context's labels gives 1/(context classes).
- `iwl`: accuracy on known classes without support in the context; chance is 1/labels.
- `swap_context`, `swap_weights`: share of answers that follow the context, or the weights, when the known
  classes' labels are rotated in the context.
- `validation_loss` in nats.

Text: `validation_loss` in nats per character and `bits_per_character` = loss / ln 2.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from gradnoise.tasks.pair import PairStream
from gradnoise.tasks.stream import Stream

# Sequences scored at once: bounds the memory of text logits.
_BATCH = 1024


class Score(NamedTuple):
    """A score's value and its standard error over sequences; its unit is in `evaluation.names`."""

    value: float
    stderr: float


def scores(model: nn.Module, stream: Stream, count: int) -> dict[str, Score]:
    """Every score of the stream's task, on `count` sequences each.

    `model` maps inputs to logits: (count, labels) for pair tokens, (count, context, symbols) for text.
    """
    answer = _answers(model)
    inputs, targets = stream.validation(count)
    if isinstance(stream, PairStream):
        return {**_pair_accuracies(answer, stream, count), "validation_loss": _loss(answer, inputs, targets)}
    loss = _loss(answer, inputs, targets)
    bits = Score(loss.value / math.log(2), loss.stderr / math.log(2))
    return {"validation_loss": loss, "bits_per_character": bits}


def _answers(model: nn.Module) -> Callable[[Tensor], Tensor]:
    device = next(iter(model.parameters()), torch.empty(0)).device

    def answer(inputs: Tensor) -> Tensor:
        with torch.no_grad():
            logits: Tensor = model(inputs.to(device)).cpu()
        return logits

    return answer


def _loss(answer: Callable[[Tensor], Tensor], inputs: Tensor, targets: Tensor) -> Score:
    """Mean over sequences of the mean cross-entropy over a sequence's targets."""
    parts = []
    for start in range(0, len(inputs), _BATCH):
        x, y = inputs[start : start + _BATCH], targets[start : start + _BATCH]
        losses = cross_entropy(answer(x).flatten(0, -2), y.flatten(), reduction="none")
        parts.append(losses.view(len(y), -1).double().mean(1))
    loss = torch.cat(parts)
    return Score(loss.mean().item(), (loss.std() / math.sqrt(len(loss))).item())


def _pair_accuracies(answer: Callable[[Tensor], Tensor], stream: PairStream, count: int) -> dict[str, Score]:
    novel, novel_targets = stream.novel(count)
    unsupported, unsupported_targets = stream.no_support(count)
    swapped, by_context, by_weights = stream.swapped(count)
    choice = answer(swapped).argmax(-1)
    return {
        "icl": _accuracy(answer(novel).argmax(-1) == novel_targets),
        "iwl": _accuracy(answer(unsupported).argmax(-1) == unsupported_targets),
        "swap_context": _accuracy(choice == by_context),
        "swap_weights": _accuracy(choice == by_weights),
    }


def _accuracy(hit: Tensor) -> Score:
    share = hit.double().mean().item()
    return Score(share, math.sqrt(share * (1 - share) / len(hit)))
