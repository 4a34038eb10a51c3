"""What the sketches are fed with: layers' inputs, and differences between tasks in their gradients."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from gradnoise import align_noise
from gradnoise.optim.nap import Alignment
from gradnoise.optim.sketch import Sketch
from gradnoise.optim.targets import ROWS, Tasks

# Updates over the same data, after which a sketch of full rank is their second moment.
UPDATES = 150


def normalised(covariance: Tensor) -> Tensor:
    return (covariance * len(covariance) / covariance.trace()).float()


def moment(rows: Tensor) -> Tensor:
    return normalised(rows.T @ rows)


def attached(net: nn.Module, **options: Any) -> tuple[torch.optim.Optimizer, Alignment]:
    optimizer = torch.optim.SGD(net.parameters(), lr=0.0)
    settings: dict[str, Any] = {"rank": 99, "half_life": 5.0, "sketch_every": 1, "mode": "absolute"}
    return optimizer, align_noise(optimizer, net, **settings | options)


def only(noise: Alignment, side: str = "right", weight: str = "weight") -> Sketch:
    (shape,) = [shape for shape in noise.shapes if shape.weights[0].place.name == weight]
    return shape.sketches[side]


def close(found: Tensor, expected: Tensor, within: float = 0.01) -> None:
    assert ((found - expected).norm() / expected.norm()).item() <= within


@contextmanager
def quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


# --- Features -----------------------------------------------------------------------------------------------


def inputs(*shape: int, seed: int = 0) -> Tensor:
    draw = torch.Generator().manual_seed(seed)
    scale = torch.tensor([2.0, 1.0, 0.5, 0.2])
    return (torch.randn(*shape, 4, generator=draw) + 0.5) * scale


def test_features_are_the_second_moment_of_all_passes() -> None:
    """Several passes of an update with different numbers of rows: each row counts once, none without grad."""
    net = nn.Linear(4, 3)
    optimizer, noise = attached(net)
    passes = [inputs(30), inputs(5, 4, seed=1), inputs(seed=2)]  # the last is a single vector
    with quiet():
        for _ in range(UPDATES):
            for x in passes:
                net(x).sum().backward()
            with torch.no_grad():
                net(100 * inputs(50, seed=3))
            torch.func.vmap(lambda x: net(100 * x))(inputs(50, seed=4))
            torch.func.functional_call(net, dict(net.named_parameters()), (x,))
            optimizer.step()
            optimizer.zero_grad()
    seen = torch.cat([x.reshape(-1, 4) for x in [*passes, passes[-1]]])
    close(only(noise).matrix(1.0), moment(seen))
    assert only(noise).trace.item() == pytest.approx(seen.square().sum().item() / len(seen), rel=1e-4)


@pytest.mark.parametrize("length", [7, 16, 64])
def test_long_batches_are_sampled_at_all_positions(length: int) -> None:
    """Inputs that depend on the position: at a fixed distance all rows would be the first of a sequence."""
    net = nn.Linear(4, 3)
    optimizer, noise = attached(net)
    growing = torch.linspace(0, 3, length)[:, None] * torch.tensor([1.0, -1.0, 0.5, 0.0])
    x = inputs(ROWS, length) * torch.linspace(2, 0.5, length)[:, None] + growing
    for _ in range(UPDATES):
        net(x).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    close(only(noise).matrix(1.0), moment(x.flatten(0, 1)), within=0.1)


def test_an_update_sees_its_own_passes_only() -> None:
    """Not due: nothing is looked at. Due: what came since the last update."""
    net = nn.Linear(4, 3)
    optimizer, noise = attached(net, sketch_every=3)
    for step in range(9):
        x = inputs(20, seed=0) if step % 3 == 0 else 1e6 * inputs(20, seed=1)
        net(x).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    sketch = only(noise)
    assert int(sketch.count) == 3
    assert sketch.trace.item() == pytest.approx(inputs(20).square().sum().item() / 20, rel=1e-4)


def test_a_tied_weight_sees_the_inputs_of_all_its_layers() -> None:
    net = nn.ModuleDict({"one": nn.Linear(4, 3), "two": nn.Linear(4, 3)})
    net["two"].weight = net["one"].weight
    optimizer, noise = attached(net)
    first, second = inputs(30), inputs(10, seed=1) * torch.tensor([0.1, 1.0, 5.0, 1.0])
    for _ in range(UPDATES):
        (net["one"](first).sum() + net["two"](second).sum()).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert len(noise.places) == 1
    close(only(noise, weight="one.weight").matrix(1.0), moment(torch.cat([first, second])))


def test_inputs_of_a_transposed_layer_are_its_rows() -> None:
    """Hugging Face's Conv1D keeps (inputs, outputs)."""
    utils = pytest.importorskip("transformers.pytorch_utils")
    net = utils.Conv1D(3, 4)
    optimizer, noise = attached(net)
    x = inputs(30)
    for _ in range(UPDATES):
        net(x).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    (shape,) = noise.shapes
    assert list(shape.sketches) == ["left"]
    close(only(noise, "left").matrix(1.0), moment(x))


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointed_layers_are_seen(reentrant: bool) -> None:
    """Twice where the pass is made twice, which leaves the mean as it is."""
    net = nn.Linear(4, 3)
    optimizer, noise = attached(net)
    x = inputs(30).requires_grad_()
    with quiet():
        for _ in range(UPDATES):
            checkpoint(net, x, use_reentrant=reentrant).sum().backward()
            optimizer.step()
            optimizer.zero_grad()
    close(only(noise).matrix(1.0), moment(x.detach()))


def test_half_precision_passes_are_summed_in_single() -> None:
    net = nn.Linear(4, 3)
    optimizer, noise = attached(net)
    x = inputs(4000)
    for _ in range(UPDATES):
        with torch.autocast("cpu", torch.bfloat16):
            net(x).float().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    close(only(noise).matrix(1.0), moment(x), within=0.1)


def test_keyword_inputs_are_seen() -> None:
    net = nn.Linear(4, 3)
    optimizer, noise = attached(net)
    net(input=inputs(30)).sum().backward()
    optimizer.step()
    assert only(noise).trace.item() == pytest.approx(inputs(30).square().sum().item() / 30, rel=1e-4)


def test_a_layer_whose_forward_is_not_called_is_named() -> None:
    """Attention uses out_proj's weight without calling it; a layer that the update does not use is fine."""
    net = nn.ModuleDict({"attention": nn.MultiheadAttention(4, 1), "unused": nn.Linear(4, 4)})
    optimizer, noise = attached(net)
    x = inputs(5, 2)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(3):
            net["attention"](x, x, x)[0].sum().backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=False)
    (said,) = caught
    assert "attention.out_proj got a gradient, but its forward() was not seen" in str(said.message)
    out = only(noise, weight="attention.out_proj.weight")
    torch.testing.assert_close(out.matrix(1.0), torch.eye(4))


# --- Tasks --------------------------------------------------------------------------------------------------

OUT, IN = 3, 4
# Covariances between tasks and within, over the columns of a gradient (rows are independent).
BETWEEN = torch.tensor([2.0, 0.6, 0.3, 0.1]).diag()
WITHIN = 2 * torch.tensor([[1.0, 0.6, 0, 0], [0.6, 1.0, 0, 0], [0, 0, 2.0, -0.9], [0, 0, -0.9, 3.0]])


class Simulated:
    """Calls h_kj = T_k + e_kj as gradients of one weight, and the sums that its feed gives to the sketch."""

    def __init__(self, seed: int = 0) -> None:
        self.net = nn.Linear(IN, OUT, bias=False)
        self.optimizer, self.noise = attached(self.net, target="tasks")
        self.draw = torch.Generator().manual_seed(seed)
        self.roots = [torch.linalg.cholesky(covariance) for covariance in (BETWEEN, WITHIN)]
        (shape,) = self.noise.shapes
        self.shape = shape
        self.feed = Tasks([shape])
        self.feed.due = True

    def gradient(self, kind: int) -> Tensor:
        return torch.randn(OUT, IN, generator=self.draw) @ self.roots[kind].T

    def call(self, label: Any, gradient: Tensor) -> None:
        self.feed.label = label
        (self.net.weight * gradient).sum().backward()

    def products(self, side: str = "right") -> Tensor:
        """U' X'X U / n of the update: with U square and orthonormal, the second moment turned back."""
        sketch = self.shape.sketches[side]
        found = self.feed.collect()[sketch]
        self.net.zero_grad()
        moved = found[:-2].view_as(sketch.basis) / found[-1]
        return moved @ sketch.basis.T


@pytest.mark.parametrize(
    "calls", [(2, 2, 2, 2), (1, 2, 3, 6), (1, 1, 1, 4), (5, 2)], ids=["equal", "unequal", "one", "two tasks"]
)
def test_the_part_from_within_tasks_is_subtracted(calls: tuple[int, ...]) -> None:
    """Over 1500 updates the mean is the covariance between tasks; without the subtraction it is not."""
    made = Simulated()
    total, plain, mean = torch.zeros(IN, IN), torch.zeros(IN, IN), 3 * torch.ones(OUT, IN)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for _ in range(1500):
            averages = []
            for task, count in enumerate(calls):
                centre = mean + made.gradient(0)
                parts = [centre + made.gradient(1) for _ in range(count)]
                averages.append(torch.stack(parts).mean(0))
                for part in parts:
                    made.call(task, part)
            total += made.products() / 1500
            off = torch.stack(averages) - torch.stack(averages).mean(0)
            plain += torch.einsum("koi,koj->ij", off, off) / (len(calls) - 1) / 1500
    # Rows are OUT independent vectors of the covariance each.
    close(total / OUT, BETWEEN, within=0.12)
    close(total / OUT, plain / OUT - expected_within(calls), within=0.06)
    assert ((plain / OUT - BETWEEN).norm() / BETWEEN.norm()).item() > 0.3


def expected_within(calls: tuple[int, ...]) -> Tensor:
    return WITHIN * sum(1 / count for count in calls) / len(calls)


def test_calls_may_come_in_any_order_and_sides_agree() -> None:
    """Labels that come back are the same task; left and right side and the trace from the same numbers."""
    parts = {(task, n): Simulated(7).gradient(0) * (task + 1) + n for task in range(4) for n in range(2)}
    found = []
    for order in (sorted(parts), sorted(parts, key=lambda at: at[::-1])):
        made = Simulated()
        for task, n in order:
            made.call(("task", task), parts[task, n])
        sketches = made.shape.sketches
        products = made.feed.collect()
        traces = [products[sketches[side]][-2].item() for side in ("left", "right")]
        assert traces[0] == pytest.approx(traces[1], rel=1e-5)
        found.append(products[sketches["right"]])
    torch.testing.assert_close(found[0], found[1], rtol=1e-4, atol=1e-3)


@pytest.mark.filterwarnings("ignore:target tasks")
def test_a_large_common_gradient_does_not_drown_the_differences() -> None:
    """Sums of squares about the mean, not sums of squares less that of the mean."""
    made = Simulated()
    tasks = [made.gradient(0) for _ in range(6)]
    for task in tasks:
        made.call(None, 1e4 + task)
    off = torch.stack(tasks) - torch.stack(tasks).mean(0)
    expected = torch.einsum("koi,koj->ij", off, off) / 5
    torch.testing.assert_close(made.products(), expected, rtol=0.02, atol=0.02)


def test_layers_of_a_joint_covariance_are_put_together_by_call() -> None:
    """A layer that a call does not reach has no gradient there: zeros."""
    net = nn.ModuleDict({"a": nn.Linear(2, 1, bias=False), "b": nn.Linear(1, 2, bias=False)})
    optimizer, noise = attached(net, target="tasks", structure="joint")
    draw = torch.Generator().manual_seed(0)
    gradients = torch.randn(5, 4, generator=draw)
    gradients[1, 2:] = 0
    for n, gradient in enumerate(gradients):
        loss = (net["a"].weight * gradient[:2].view(1, 2)).sum()
        if n != 1:
            loss = loss + (net["b"].weight * gradient[2:].view(2, 1)).sum()
        loss.backward()
    with pytest.warns(UserWarning, match="one backward"):
        optimizer.step()
    (shape,) = noise.shapes
    off = gradients - gradients.mean(0)
    assert shape.sketches["whole"].trace.item() == pytest.approx(off.square().sum().item() / 4, rel=1e-4)


@pytest.mark.parametrize("tasks", [1, 3])
def test_few_tasks_and_tasks_of_one_call_are_warned_of_once(tasks: int) -> None:
    net = nn.Linear(IN, OUT)
    optimizer, noise = attached(net, target="tasks")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(4):
            for _ in range(tasks):
                net(inputs(5)).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
    said = [str(warning.message) for warning in caught]
    few = "one task in an update says nothing" if tasks == 1 else "3 tasks in an update say little"
    assert sum(few in text and "accumulate 4 or more" in text for text in said) == 1
    assert sum("split each into two or more under one label" in text for text in said) == 1
    assert len(said) == 2
    if tasks == 1:
        torch.testing.assert_close(only(noise).matrix(1.0), torch.eye(IN))


def test_enough_tasks_of_several_calls_are_not_warned_of() -> None:
    net = nn.Linear(IN, OUT)
    optimizer, noise = attached(net, target="tasks")
    with quiet():
        for n in range(8):
            noise.task(n % 4)
            net(inputs(5, seed=n)).square().mean().backward()
        optimizer.step()
    assert int(only(noise).count) == 1


def test_directions_that_claim_more_than_there_is_count_for_what_there_is() -> None:
    """sum S = 4 tr: a quarter of the shape, three quarters of the identity."""
    sketch = Sketch(5, 2, 10.0, 0, "sketch")
    state = sketch.state_dict() | {"sizes": torch.tensor([3.0, 1.0]), "trace": torch.tensor(1.0), "count": 9}
    sketch.load_state_dict(state)
    basis = sketch.basis
    shape = normalised((basis * torch.tensor([3.0, 1.0])) @ basis.T)
    torch.testing.assert_close(sketch.matrix(1.0), 0.25 * shape + 0.75 * torch.eye(5), rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(sketch.matrix(0.4), 0.1 * shape + 0.9 * torch.eye(5), rtol=1e-3, atol=1e-3)


def learned(signal: float, width: int = 16) -> tuple[float, float]:
    """Mean largest variance of any direction, and of the one that tasks differ along with size `signal`."""
    torch.manual_seed(0)
    net = nn.Linear(width, OUT, bias=False)
    optimizer, noise = attached(net, target="tasks", rank=4)
    along, found = torch.eye(width)[0], []
    for _ in range(300):
        for task in range(4):
            noise.task(task)
            centre = signal * torch.randn(OUT, 1) * along
            for _ in range(2):
                (net.weight * (centre + torch.randn(OUT, width))).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        shape = only(noise).matrix(1.0)
        found.append(torch.stack([torch.linalg.eigvalsh(shape)[-1], along @ shape @ along]))
    largest, towards = torch.stack(found[50:]).mean(0).tolist()
    return largest, towards


def test_without_differences_between_tasks_no_direction_gets_most_of_the_noise() -> None:
    """All that is left after the subtraction is sampling noise. Where tasks do differ, one direction does."""
    largest, towards = learned(0.0)
    assert largest < 2.8  # 3.9 if the directions were believed
    assert towards == pytest.approx(1, abs=0.3)
    assert learned(2.0)[1] > 11


@pytest.mark.parametrize("to_none", [True, False])
def test_an_update_that_is_thrown_away_leaves_nothing_behind(to_none: bool) -> None:
    net = nn.Linear(IN, OUT)
    optimizer, noise = attached(net, target="tasks")
    for _ in range(3):
        (net(inputs(4)).sum() * torch.inf).backward()
    optimizer.zero_grad(set_to_none=to_none)
    with quiet():
        for n in range(8):
            noise.task(n % 4)
            net(inputs(5, seed=n)).square().mean().backward()
        optimizer.step()
    sketch = only(noise)
    assert int(sketch.count) == 1
    assert int(sketch.skipped) == 0
    assert sketch.trace.isfinite()


@pytest.mark.parametrize("target", ["features", "tasks"])
def test_loading_a_state_drops_what_was_heard(target: str) -> None:
    found = []
    for early in (0, 3):
        torch.manual_seed(0)
        net = nn.Linear(IN, OUT)
        optimizer, noise = attached(net, target=target)
        before = noise.state_dict()
        for n in range(early):
            (100 * net(inputs(4, seed=20 + n))).square().mean().backward()
        noise.load_state_dict(before)
        optimizer.zero_grad()
        for n in range(8):
            if target == "tasks":
                noise.task(n % 4)
            net(inputs(5, seed=n)).square().mean().backward()
        optimizer.step()
        found.append(only(noise).state_dict())
    assert torch.equal(found[0]["basis"], found[1]["basis"])
    assert torch.equal(found[0]["trace"], found[1]["trace"])


def test_removal_ends_the_hooks() -> None:
    for target in ("features", "tasks"):
        net = nn.Linear(IN, OUT)
        _, noise = attached(net, target=target)
        noise.remove()
        assert not net._forward_pre_hooks
        assert not net.weight._backward_hooks
