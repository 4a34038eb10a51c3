"""Per-example gradients from hooks against torch.func.vmap(grad), and what must not be guessed."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.nn.functional import cross_entropy
from torch.utils.checkpoint import checkpoint

from gradnoise import exposure
from gradnoise.base.errors import InputError
from gradnoise.noise.capture import Capture, Put, Take, visit
from gradnoise.noise.listener import Listener
from gradnoise.noise.update import Member

BATCH, LENGTH, WIDTH, WORDS = 5, 7, 6, 11


class LlamaRMSNorm(nn.Module):
    """Alike transformers' own, which is no nn.RMSNorm and has its epsilon under another name."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.linspace(0.5, 2, WIDTH))
        self.variance_epsilon = 1e-3

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)


class GemmaRMSNorm(LlamaRMSNorm):
    """Gemma multiplies by 1 + weight."""

    def forward(self, x: Tensor) -> Tensor:
        return (1 + self.weight) * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)


class Conv1D(nn.Module):
    """Alike transformers' transposed linear layer of GPT-2."""

    def __init__(self, out: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(WIDTH, out))
        self.bias = nn.Parameter(torch.randn(out))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight + self.bias


class Words(nn.Module):
    """Tokens, positions given as `positions` says, a body, a head that may be tied to the tokens."""

    def __init__(self, positions: str = "none", tied: bool = False, padding: int | None = None) -> None:
        super().__init__()
        self.tokens = nn.Embedding(WORDS, WIDTH, padding_idx=padding)
        self.places = nn.Embedding(LENGTH, WIDTH) if positions != "none" else None
        self.positions = positions
        self.norm = nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, WORDS, bias=False)
        if tied:
            self.head.weight = self.tokens.weight

    def forward(self, ids: Tensor) -> Tensor:
        x = self.tokens(ids)
        if self.places is not None:
            place = torch.arange(ids.shape[1])
            place = {"1T": place[None], "T": place, "BT": place.expand_as(ids)}[self.positions]
            x = x + self.places(place)
        return self.head(self.norm(x).tanh())


class Twice(nn.Module):
    """One layer used twice."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(self.layer(x).tanh())


class Classes(nn.Module):
    """Class ids, one an example, with or without tokens beside them."""

    def __init__(self, tokens: bool) -> None:
        super().__init__()
        self.tokens = nn.Embedding(WORDS, WIDTH) if tokens else None
        self.classes = nn.Embedding(WORDS, WIDTH)
        self.head = nn.Linear(WIDTH, WORDS)

    def forward(self, *inputs: Tensor) -> Tensor:
        x = self.classes(inputs[-1])
        if self.tokens is not None:
            x = self.tokens(inputs[0]) + x[:, None]
        return self.head(x.tanh())


def vectors(*shape: int) -> Callable[[], Tensor]:
    return lambda: torch.randn(BATCH, *shape, WIDTH, dtype=torch.float64)


def ids(batch: int = BATCH, length: int | None = LENGTH) -> Tensor:
    return torch.randint(WORDS, (batch,) if length is None else (batch, length))


CASES: dict[str, tuple[Callable[[], nn.Module], Callable[[], Any]]] = {
    "linear": (lambda: nn.Linear(WIDTH, 4), vectors()),
    "linear of sequences": (lambda: nn.Linear(WIDTH, 4), vectors(LENGTH)),
    "linear of grids": (lambda: nn.Linear(WIDTH, 4), vectors(2, 3)),
    "linear without bias": (lambda: nn.Linear(WIDTH, 4, bias=False), vectors(LENGTH)),
    "layer norm": (lambda: nn.LayerNorm(WIDTH), vectors()),
    "layer norm of sequences": (lambda: nn.LayerNorm(WIDTH, eps=1e-2), vectors(LENGTH)),
    "layer norm over two dimensions": (lambda: nn.LayerNorm([LENGTH, WIDTH]), vectors(LENGTH)),
    "layer norm without bias": (lambda: nn.LayerNorm(WIDTH, bias=False), vectors(LENGTH)),
    "rms norm": (lambda: nn.RMSNorm(WIDTH), vectors(LENGTH)),
    "rms norm with eps": (lambda: nn.RMSNorm(WIDTH, eps=1e-2), vectors()),
    "rms norm of Llama": (LlamaRMSNorm, vectors(LENGTH)),
    "rms norm of Gemma": (GemmaRMSNorm, vectors(LENGTH)),
    "conv1d": (lambda: Conv1D(4), vectors(LENGTH)),
    "words": (Words, ids),
    "words with padding": (lambda: Words(padding=3), ids),
    "tied": (lambda: Words(tied=True), ids),
    "tied with padding": (lambda: Words(tied=True, padding=3), ids),
    "layer used twice": (Twice, vectors(LENGTH)),
    "positions (1, T)": (lambda: Words("1T"), ids),
    "positions (T,)": (lambda: Words("T"), ids),
    "positions (T,), T = B": (lambda: Words("T"), lambda: ids(LENGTH)),
    "positions (B, T)": (lambda: Words("BT"), ids),
    "one example, positions (T,)": (lambda: Words("T"), lambda: ids(1)),
    "class ids": (lambda: Classes(tokens=False), lambda: ids(length=None)),
    "class ids beside tokens": (lambda: Classes(tokens=True), lambda: (ids(), ids(length=None))),
    "class ids beside tokens, T = B": (
        lambda: Classes(tokens=True),
        lambda: (ids(LENGTH), torch.tensor([3, 0, 0, 5, 9, 2, 1])),
    ),
    "stack": (
        lambda: nn.Sequential(
            nn.Linear(WIDTH, WIDTH), nn.ReLU(), nn.LayerNorm(WIDTH), Conv1D(3), nn.RMSNorm(3)
        ),
        vectors(LENGTH),
    ),
}


def losses(outputs: Tensor) -> Tensor:
    """Of each example: a loss that bends, with weights so that no gradient vanishes by symmetry."""
    flat = outputs.flatten(1)
    return (flat.sin() * torch.linspace(0.5, 2, flat.shape[1], dtype=flat.dtype)).sum(1)


def listener(net: nn.Module, examples: int | None = None, always: bool = False) -> Listener:
    members = [Member(name, p, 0, "", "") for name, p in net.named_parameters()]
    return Listener(net, members, examples, False, always)


def by_hooks(net: nn.Module, inputs: tuple[Tensor, ...], examples: int | None = None) -> dict[str, Tensor]:
    """(b, ...) gradients of single examples' losses, from hooks in one backward pass."""
    heard = listener(net, examples)
    losses(net(*inputs)).sum().backward()
    heard.stop()
    assert heard.capture is not None
    assert heard.capture.fault is None
    names = {p: name for name, p in net.named_parameters()}
    found = {}
    for source in heard.capture.sources():
        rows = torch.zeros(len(source.calls[0].seen), *source.parameter.shape, dtype=torch.float64)

        def fill(piece: Tensor, take: Take, put: Put, rows: Tensor = rows) -> None:
            assert take(rows[0]).shape == piece[0].shape
            for row, values in zip(rows, piece, strict=True):
                put(row.view(-1), values)

        visit(source, fill)
        found[names[source.parameter]] = rows
    heard.forget_layers()
    return found


def by_vmap(net: nn.Module, inputs: tuple[Tensor, ...]) -> dict[str, Tensor]:
    parameters = {name: p.detach() for name, p in net.named_parameters()}

    def loss(values: dict[str, Tensor], *example: Tensor) -> Tensor:
        return losses(functional_call(net, values, tuple(x[None] for x in example)))[0]

    return vmap(grad(loss), (None, *[0] * len(inputs)))(parameters, *inputs)


def case(name: str) -> tuple[nn.Module, tuple[Tensor, ...]]:
    torch.manual_seed(0)
    net, given = CASES[name][0]().double(), CASES[name][1]()
    return net, given if isinstance(given, tuple) else (given,)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("examples", [None, 3])
def test_hooks_give_the_gradients_of_single_examples(name: str, examples: int | None) -> None:
    """Every coordinate of every example to 1e-10, of all examples and of the first three."""
    net, inputs = case(name)
    found, expected = by_hooks(net, inputs, examples), by_vmap(net, inputs)
    assert set(found) == set(expected)
    kept = len(inputs[0]) if examples is None else min(examples, len(inputs[0]))
    for parameter, rows in expected.items():
        torch.testing.assert_close(found[parameter], rows[:kept], rtol=1e-10, atol=1e-10)


def test_large_layers_are_formed_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gradnoise.noise.capture.PIECE", 2 * WIDTH * BATCH)  # two rows at a time
    for name in ("linear of sequences", "tied", "words", "conv1d", "layer norm"):
        net, inputs = case(name)
        found = by_hooks(net, inputs)
        for parameter, rows in by_vmap(net, inputs).items():
            torch.testing.assert_close(found[parameter], rows, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", CASES)
def test_listening_changes_no_bit_of_the_pass_and_leaves_nothing(name: str) -> None:
    """Outputs and gradients in float32 as without hooks; afterwards no hook is left anywhere."""
    torch.manual_seed(0)
    net = CASES[name][0]().float()
    given = CASES[name][1]()
    inputs = tuple(
        x.float() if x.is_floating_point() else x for x in (given if isinstance(given, tuple) else (given,))
    )
    results = []
    for listening in (False, True):
        heard = listener(net) if listening else None
        outputs = net(*inputs)
        losses(outputs).mean().backward()
        results.append([outputs.detach(), *[p.grad for p in net.parameters()]])
        net.zero_grad()
        if heard is not None:
            heard.stop()
            heard.forget_layers()
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    for module in net.modules():
        assert not module._forward_hooks
        assert not module._forward_pre_hooks
        assert not module._backward_hooks
    assert not any(p._backward_hooks for p in net.parameters())


def test_removed_hooks_see_no_more() -> None:
    net, inputs = case("stack")
    heard = listener(net)
    outputs = net(*inputs)
    heard.forget_layers()
    losses(outputs).sum().backward()  # a pass that began under hooks
    assert heard.capture is not None
    assert heard.capture.calls == []


@pytest.mark.parametrize(
    ("layer", "name"),
    [
        (nn.BatchNorm1d(WIDTH), "1 \\(BatchNorm1d\\)"),
        (nn.Bilinear(WIDTH, WIDTH, 2), "1 \\(Bilinear\\)"),
        (nn.MultiheadAttention(WIDTH, 2), "1 \\(MultiheadAttention\\)"),
        (nn.Embedding(3, WIDTH, max_norm=1.0), "1 \\(Embedding\\)"),
        (nn.Embedding(3, WIDTH, scale_grad_by_freq=True), "1 \\(Embedding\\)"),
        (nn.Embedding(3, WIDTH, sparse=True), "1 \\(Embedding\\)"),
    ],
)
def test_layers_whose_examples_are_not_known_are_refused_by_name(layer: nn.Module, name: str) -> None:
    net = nn.Sequential(nn.Linear(WIDTH, WIDTH), layer)
    capture = Capture(net, set(net.parameters()), None)
    assert capture.fault is not None
    with pytest.raises(InputError, match=name):
        raise capture.fault
    assert not any(module._forward_hooks for module in net.modules())


def test_unknown_layers_that_are_not_trained_are_no_hindrance() -> None:
    net = nn.Sequential(nn.BatchNorm1d(WIDTH), nn.Linear(WIDTH, 2))
    assert Capture(net, set(net[1].parameters()), None).fault is None


def measured(net: nn.Module, optimizer_of: Any = torch.optim.SGD, **options: Any) -> Any:
    """A meter by examples on SGD."""
    optimizer = optimizer_of(net.parameters(), lr=0.1)
    return exposure(net, optimizer, every=1, **{"estimator": "example", **options}), optimizer


def test_rows_that_are_not_examples_are_refused() -> None:
    """A layer that sees tokens of all examples in one dimension shows no single example."""

    class Flat(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(WIDTH, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(x.flatten(0, 1))

    meter, optimizer = measured(net := Flat())
    net(torch.randn(BATCH, LENGTH, WIDTH)).square().mean().backward()
    with pytest.raises(InputError, match="Linear.*leading dimension 35"):
        optimizer.step()
    meter.remove()


@pytest.mark.parametrize("given", [False, True])
def test_positions_and_classes_that_look_alike_are_refused(given: bool) -> None:
    """T = B: ids that count up but came as an input, or that do not and did not, may be either."""

    class Shuffled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.tokens, self.places = nn.Embedding(WORDS, 4), nn.Embedding(LENGTH, 4)

        def forward(self, ids: Tensor, places: Tensor | None = None) -> Tensor:
            return self.tokens(ids) + self.places(torch.arange(LENGTH).flip(0) if places is None else places)

    meter, optimizer = measured(net := Shuffled())
    net(ids(LENGTH), *([torch.arange(LENGTH)] if given else [])).square().mean().backward()
    with pytest.raises(InputError, match="positions or classes"):
        optimizer.step()
    meter.remove()


@pytest.mark.parametrize("examples", [None, 2])
def test_a_weight_used_outside_its_layer_is_refused_by_name(examples: int | None) -> None:
    """A head tied by hand, x @ tokens.weight.T, passes no layer: half of the gradient would be missing."""

    class ByHand(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.tokens, self.body = nn.Embedding(WORDS, WIDTH), nn.Linear(WIDTH, WIDTH)

        def forward(self, ids: Tensor) -> Tensor:
            return self.body(self.tokens(ids)).tanh() @ self.tokens.weight.T

    meter, optimizer = measured(net := ByHand(), examples=examples)
    given = torch.randint(WORDS - 2, (BATCH, LENGTH))
    cross_entropy(net(given).flatten(0, 1), given.flatten()).backward()
    with pytest.raises(InputError, match="tokens.weight.*estimator='micro'"):
        optimizer.step()
    meter.remove()


def test_an_output_changed_in_place_is_refused() -> None:
    """A Linear layer's output for sequences is a view: changed in place, its gradient never comes back."""
    net = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.ReLU(inplace=True), nn.Linear(WIDTH, 2))
    meter, optimizer = measured(net)
    net(torch.randn(BATCH, LENGTH, WIDTH)).square().mean().backward()
    with pytest.raises(InputError, match="0.weight.*in place"):
        optimizer.step()
    meter.remove()


def test_reentrant_checkpointing_is_refused_and_the_other_kind_exact() -> None:
    traces = []
    for kind in ("none", "other", "reentrant"):
        torch.manual_seed(0)
        body = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh(), nn.Linear(WIDTH, WIDTH))

        class Checkpointed(nn.Module):
            def __init__(self, body: nn.Module = body, kind: str = kind) -> None:
                super().__init__()
                self.body, self.head, self.kind = body, nn.Linear(WIDTH, 2), kind

            def forward(self, x: Tensor) -> Tensor:
                if self.kind == "none":
                    return self.head(self.body(x))
                again = self.kind == "reentrant"
                return self.head(checkpoint(self.body, x, use_reentrant=again))

        meter, optimizer = measured(net := Checkpointed().double())
        x = torch.randn(BATCH, WIDTH, dtype=torch.float64, requires_grad=True)
        net(x).square().mean().backward()
        if kind == "reentrant":
            with pytest.raises(InputError, match="reentrance"):
                optimizer.step()
        else:
            optimizer.step()
            traces.append(meter.last.trace)
        meter.remove()
    assert traces[0] == traces[1]


def test_examples_of_the_first_micro_batch_stand_for_an_update_of_several() -> None:
    """estimator="example" under accumulation: Tr(C/B) = Var(first micro-batch's g_b) / B, centred on all.

    Closed form: sum over b of the first of |h_b - g/B|^2 over b (1/B)(1 - 1/B), h_b = g_b / B.
    """
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(WIDTH, 4), nn.Tanh(), nn.Linear(4, 2)).double()
    meter, optimizer = measured(net)
    x = torch.randn(12, WIDTH, dtype=torch.float64)
    rows = torch.cat([g.flatten(1) for g in by_vmap(net, (x,)).values()], 1)
    assert meter.due
    for part in x.chunk(3):
        (losses(net(part)).mean() / 3).backward()
    optimizer.step()
    d = rows[:4] / 12 - rows.mean(0) / 12
    expected = d.square().sum().item() / (4 * (1 / 12) * (11 / 12))
    assert meter.last.trace.value == pytest.approx(expected, rel=1e-10)
    assert meter.last.contributions == 4


def test_a_discarded_backward_does_not_reach_the_examples() -> None:
    """backward(), zero_grad(), backward(): the last layers' outputs come before any parameter does."""
    traces = []
    for discarded in (False, True):
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(WIDTH, 4), nn.Tanh(), nn.Linear(4, 2)).double()
        meter, optimizer = measured(net)
        x, other = torch.randn(2, 8, WIDTH, dtype=torch.float64)
        if discarded:
            losses(net(other)).mean().backward()
            optimizer.zero_grad()
        losses(net(x)).mean().backward()
        optimizer.step()
        traces.append(meter.last.trace)
    assert traces[0].value == pytest.approx(traces[1].value, rel=1e-12)
    assert traces[0].stderr == pytest.approx(traces[1].stderr, rel=1e-12)


@pytest.mark.parametrize("estimator", ["auto", "micro", "example", "norms", "hutchinson"])
def test_a_removed_meter_leaves_no_trace(estimator: str) -> None:
    """In the middle of an update that it listens to: no hook on model, parameters or optimizer."""
    net, inputs = case("stack")
    options = {"losses": lambda model: losses(model(*inputs))} if estimator == "hutchinson" else {}
    meter, optimizer = measured(net, estimator=estimator, **options)
    losses(net(*inputs)).mean().backward()
    meter.remove()
    losses(net(*inputs)).mean().backward()
    optimizer.step()
    for module in net.modules():
        assert not any((module._forward_hooks, module._forward_pre_hooks, module._backward_hooks))
    assert not any(p._backward_hooks for p in net.parameters())
    assert not any((optimizer._optimizer_step_pre_hooks, optimizer._optimizer_step_post_hooks))


def test_passes_without_gradients_are_not_kept() -> None:
    net, inputs = case("stack")
    heard = listener(net)
    with torch.no_grad():
        net(*inputs)
    assert heard.capture is not None
    assert heard.capture.calls == []
    assert heard.batches == []
    losses(net(*inputs)).sum().backward()
    heard.stop()
    assert len(heard.capture.calls) == 4
    heard.forget_layers()
