"""Pair-token few-shot classification (blocks A and B), with its exact oracles.

A token is the pair (item ; one-hot label). A context shows `copies` items of each of `context_classes`
classes, then a query item without its label. Items are (mu_c + eps n) / sqrt(1 + eps^2) with class means
mu_c and noise n from N(0, I/D), so every item has unit expected squared norm. The K training classes have
fixed labels, so the query can be answered from the weights or copied from the context.
Source: the minimal model of Nguyen and Reddy (arXiv 2412.00104), with the scores that Chan et al. name.
"""

import math

import torch
from torch import Tensor
from torch.nn.functional import one_hot

from gradnoise.base.streams import generator
from gradnoise.base.study import PairTask


class PairStream:
    """The task of one seed: its class table (stream `world`), training stream and evaluation sets."""

    readout = "last"
    token_inputs = False

    def __init__(self, task: PairTask, seed: int) -> None:
        self.task = task
        self._seed = seed
        self.inputs, self.outputs = task.features + task.labels, task.labels
        self.context = task.context_classes * task.copies + 1
        draw = generator(seed, "world")
        self.means = torch.randn(task.classes, task.features, generator=draw) / math.sqrt(task.features)
        # Labels as equal in number as K allows.
        order = torch.randperm(task.classes, generator=draw)
        self.labels = (torch.arange(task.classes) % task.labels)[order]

    def draw(self, chunk: int, count: int) -> tuple[Tensor, Tensor]:
        """Chunk `chunk` of the training stream: inputs (count, tokens, D + L), query labels (count,)."""
        draw = generator(self._seed, "data", chunk)
        means, labels, other_means, other_labels = self._known(count, draw)
        inside = torch.rand(count, generator=draw) < self.task.in_context
        return self._sequences(means, labels, other_means, other_labels, inside, draw)

    def validation(self, count: int) -> tuple[Tensor, Tensor]:
        """Sequences of the training distribution that no run trains on."""
        return self.draw(-1, count)

    def novel(self, count: int) -> tuple[Tensor, Tensor]:
        """Classes never seen in training, with random distinct labels: only the context has the answer."""
        draw, task = generator(self._seed, "evaluation", 1), self.task
        shape = (count, task.context_classes, task.features)
        means = torch.randn(shape, generator=draw) / math.sqrt(task.features)
        return self._sequences(means, self._distinct_labels(count, draw), None, None, None, draw)

    def no_support(self, count: int) -> tuple[Tensor, Tensor]:
        """Known classes, the query's class not in the context: only the weights have the answer."""
        draw = generator(self._seed, "evaluation", 2)
        means, labels, other_means, other_labels = self._known(count, draw)
        inside = torch.zeros(count, dtype=torch.bool)
        return self._sequences(means, labels, other_means, other_labels, inside, draw)

    def swapped(self, count: int) -> tuple[Tensor, Tensor, Tensor]:
        """Known classes of distinct labels whose labels are rotated in the context.

        Returns inputs, the label that the context gives to the query and the one that the weights hold.
        """
        draw = generator(self._seed, "evaluation", 3)
        wanted = self._distinct_labels(count, draw)
        # One class of each wanted label, uniformly.
        keys = torch.rand(count, 1, self.task.classes, generator=draw)
        keys = keys.masked_fill(self.labels != wanted[..., None], -1.0)
        classes = keys.argmax(-1)
        held = self.labels[classes]
        inputs, given = self._sequences(self.means[classes], held.roll(1, 1), None, None, None, draw)
        position = (held.roll(1, 1) == given[:, None]).long().argmax(1)
        return inputs, given, held.gather(1, position[:, None])[:, 0]

    def _known(self, count: int, draw: torch.Generator) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Context classes without replacement, and one more class outside the context."""
        size = self.task.context_classes
        chosen = torch.rand(count, self.task.classes, generator=draw).topk(size + 1).indices
        means, labels = self.means[chosen], self.labels[chosen]
        return means[:, :size], labels[:, :size], means[:, size], labels[:, size]

    def _distinct_labels(self, count: int, draw: torch.Generator) -> Tensor:
        keys = torch.rand(count, self.task.labels, generator=draw)
        return keys.topk(self.task.context_classes).indices

    def _sequences(
        self,
        means: Tensor,
        labels: Tensor,
        other_means: Tensor | None,
        other_labels: Tensor | None,
        inside: Tensor | None,
        draw: torch.Generator,
    ) -> tuple[Tensor, Tensor]:
        """Shuffle the copies, pick a query (outside the context where `inside` is False), add item noise."""
        task, count = self.task, len(means)
        size = task.context_classes * task.copies
        order = torch.rand(count, size, generator=draw).argsort(1) % task.context_classes
        query = torch.randint(task.context_classes, (count,), generator=draw)
        rows = torch.arange(count)
        query_mean, target = means[rows, query], labels[rows, query]
        if inside is not None and other_means is not None and other_labels is not None:
            query_mean = torch.where(inside[:, None], query_mean, other_means)
            target = torch.where(inside, target, other_labels)
        items = torch.cat([means[rows[:, None], order], query_mean[:, None]], 1)
        noise = torch.randn(items.shape, generator=draw) / math.sqrt(task.features)
        items = (items + task.item_noise * noise) / math.sqrt(1 + task.item_noise**2)
        shown = torch.zeros(count, size + 1, task.labels)
        shown[:, :size] = one_hot(labels.gather(1, order), task.labels)
        return torch.cat([items, shown], -1), target


class ContextOracle(torch.nn.Module):
    """Bayes-optimal answer for novel classes, with the model's call signature.

    With n context items x of a class, its mean has posterior N(m, v I): for items of signal variance
    a = 1/(D (1 + eps^2)) and noise variance b = eps^2 a, m = n a xbar / (n a + b), v = a b / (n a + b).
    The query under that class is N(m, (v + b) I). Logits are log densities of the labels shown, up to a
    constant; labels not shown get -inf.
    """

    def __init__(self, task: PairTask) -> None:
        super().__init__()
        self.task = task

    def forward(self, inputs: Tensor) -> Tensor:
        task = self.task
        items, shown = inputs[:, :-1, : task.features], inputs[:, :-1, task.features :]
        a = 1 / (task.features * (1 + task.item_noise**2))
        b = task.item_noise**2 * a
        n = shown.sum(1)
        mean = torch.einsum("bnl,bnd->bld", shown, items) / n.clamp(min=1)[..., None]
        m = mean * (n * a / (n * a + b))[..., None]
        variance = a * b / (n * a + b) + b
        distance = (inputs[:, -1:, : task.features] - m).square().sum(-1)
        logits = -distance / (2 * variance) - task.features / 2 * variance.log()
        return logits.masked_fill(n == 0, -math.inf)


class WeightsOracle(torch.nn.Module):
    """Bayes-optimal answer from the class table alone, with the model's call signature.

    The query under class c is N(mu_c / sqrt(1 + eps^2), b I); classes of one label are summed.
    """

    def __init__(self, stream: PairStream) -> None:
        super().__init__()
        self.stream = stream

    def forward(self, inputs: Tensor) -> Tensor:
        task, stream = self.stream.task, self.stream
        scale = 1 + task.item_noise**2
        query = inputs[:, -1, : task.features]
        distance = torch.cdist(query, stream.means / math.sqrt(scale)).square()
        b = task.item_noise**2 / (task.features * scale)
        member = one_hot(stream.labels, task.labels).T.bool()
        by_class = (-distance / (2 * b))[:, None].expand(-1, task.labels, -1)
        return by_class.masked_fill(~member, -math.inf).logsumexp(-1)
