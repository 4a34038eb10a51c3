"""Where noise goes, and that nothing else changes; gradients are written by hand or a small model's."""

import copy
import gc
import math
import warnings
import weakref
from collections.abc import Callable, Iterator, Mapping
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import SGD, Adafactor, Adam, AdamW, Muon, Optimizer, RMSprop

from gradnoise import gaussian, inject, low_rank, student_t
from gradnoise.base.errors import InputError
from gradnoise.noise.injection.inject import Injection, Where, injections_of, places_of
from gradnoise.noise.injection.sources import Draws, Place, Source
from gradnoise.noise.preconditioners import preconditioner

Make = Callable[[Any], Optimizer]
KINDS: dict[str, Make] = {
    "SGD": lambda p: SGD(p, lr=0.1),
    "momentum": lambda p: SGD(p, lr=0.1, momentum=0.9, dampening=0.2),
    "nesterov": lambda p: SGD(p, lr=0.1, momentum=0.9, nesterov=True),
    "Adam": lambda p: Adam(p, lr=0.1, betas=(0.8, 0.9)),
    "AdamW": lambda p: AdamW(p, lr=0.1, betas=(0.8, 0.9), weight_decay=0.3),
    "amsgrad": lambda p: AdamW(p, lr=0.1, betas=(0.8, 0.9), weight_decay=0.3, amsgrad=True),
    "RMSprop": lambda p: RMSprop(p, lr=0.1, alpha=0.9, momentum=0.7),
    "centered": lambda p: RMSprop(p, lr=0.1, alpha=0.9, centered=True),
    "Adafactor": lambda p: Adafactor(p, lr=0.1),
}
WHERES: tuple[Where, ...] = ("pre", "post", "frozen_v")


def model(dtype: torch.dtype = torch.float64, bias: bool = True) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6, bias=bias), nn.Tanh(), nn.Linear(6, 3, bias=bias)).to(dtype)


def give(net: nn.Module, n: int) -> None:
    """Gradients of update n, which do not depend on the parameters."""
    draw = torch.Generator().manual_seed(n)
    for p in net.parameters():
        p.grad = torch.randn(p.shape, generator=draw, dtype=torch.float64).to(p.dtype)


def run(
    net: nn.Module, optimizer: Optimizer, updates: int = 8, first: int = 1, rate: float | None = None
) -> nn.Module:
    for n in range(first, first + updates):
        give(net, n)
        for group in optimizer.param_groups:
            group["lr"] = (0.1 / n) if rate is None else rate
        optimizer.step()
    return net


def weights(net: nn.Module) -> list[Tensor]:
    return [p.detach().clone() for p in net.parameters()]


def same(one: nn.Module | list[Tensor], other: nn.Module | list[Tensor]) -> bool:
    """Bit for bit."""
    first, second = (weights(x) if isinstance(x, nn.Module) else x for x in (one, other))
    return all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def noise_of(source: Source, net: nn.Module, update: int, seed: int = 0) -> dict[str, Tensor]:
    """What an injection under the model's names draws for an update."""
    found = {}
    for name, p in net.named_parameters():
        noise = source.draw(Place(name, p, 0, ""), Draws(seed, update))
        assert noise is not None
        found[name] = noise
    return found


# The three places.


@pytest.mark.parametrize("kind", [*KINDS, "Muon"])
def test_before_the_step_is_as_if_gradients_had_come_with_the_noise(kind: str) -> None:
    """Bit for bit, and the loop finds the gradients that it made, in the same tensors."""
    make: Make = KINDS.get(kind, lambda p: Muon(p, lr=0.1))
    injected, by_hand = (model(bias=kind != "Muon") for _ in range(2))
    one, other = make(injected.parameters()), make(by_hand.parameters())
    source = gaussian(0.3)
    inject(one, source, "pre", model=injected)
    for n in range(1, 9):
        give(injected, n)
        before = [(p.grad, p.grad.clone()) for p in injected.parameters() if p.grad is not None]
        one.step()
        for p, (kept, values) in zip(injected.parameters(), before, strict=True):
            assert p.grad is kept
            assert torch.equal(kept, values)
        give(by_hand, n)
        for p, noise in zip(by_hand.parameters(), noise_of(source, by_hand, n).values(), strict=True):
            assert p.grad is not None
            p.grad += noise
        other.step()
    assert same(injected, by_hand)
    plain = model(bias=kind != "Muon")
    optimizer = make(plain.parameters())
    for n in range(1, 9):
        give(plain, n)
        optimizer.step()
    assert not same(injected, plain)


@pytest.mark.parametrize("kind", KINDS)
def test_after_the_step_moments_do_not_see_the_noise(kind: str) -> None:
    """State bit-equal to the run without; displaced by eta P n with eta all that one gradient ever adds."""
    clean, injected = model(), model()
    one, other = KINDS[kind](clean.parameters()), KINDS[kind](injected.parameters())
    source = gaussian(0.3)
    inject(other, source, "post", model=injected, power=4.0)
    before = weights(injected)
    run(clean, one)
    run(injected, other)
    for p, q in zip(clean.parameters(), injected.parameters(), strict=True):
        for name, value in one.state[p].items():
            assert torch.equal(torch.as_tensor(value), torch.as_tensor(other.state[q][name])), name
    if kind in ("AdamW", "amsgrad", "Adafactor"):  # whose step depends on the weights
        assert not same(clean, injected)
        return
    factor = {"momentum": 0.8 / 0.1, "nesterov": 1 / 0.1, "RMSprop": 1 / 0.3}.get(kind, 1.0)
    moved = {name: torch.zeros_like(p) for name, p in injected.named_parameters()}
    twin = model()
    again = KINDS[kind](twin.parameters())
    for n in range(1, 9):
        run(twin, again, 1, first=n)
        for (name, p), noise in zip(twin.named_parameters(), noise_of(source, twin, n).values(), strict=True):
            moved[name] -= 0.1 / n * factor * 2 * noise * preconditioner(again, p)
    for p, q, old, (name, _) in zip(
        clean.parameters(), injected.parameters(), before, twin.named_parameters(), strict=True
    ):
        assert moved[name].abs().mean() > 0.01
        torch.testing.assert_close(q - p, moved[name], rtol=1e-9, atol=1e-12)
        assert not torch.equal(q, old)


def by_hand(kind: str, net: nn.Module, source: Source, updates: int) -> tuple[list[Tensor], list[Tensor]]:
    """Weights and first moments (or momentum) where only the first moment gets g + n."""
    theta = weights(net)
    m, v, most = ([torch.zeros_like(p) for p in theta] for _ in range(3))
    for t in range(1, updates + 1):
        give(net, t)
        noises, lr = noise_of(source, net, t).values(), 0.1 / t
        for i, (p, n) in enumerate(zip(net.parameters(), noises, strict=True)):
            assert p.grad is not None
            g = p.grad
            v[i] = 0.9 * v[i] + 0.1 * g * g
            if kind == "RMSprop":
                m[i] = 0.7 * m[i] + (g + n) / (v[i].sqrt() + 1e-8)
                theta[i] = theta[i] - lr * m[i]
                continue
            m[i] = 0.8 * m[i] + 0.2 * (g + n)
            most[i] = torch.maximum(most[i], v[i])
            second = (most if kind == "amsgrad" else v)[i] / (1 - 0.9**t)
            decay = 0.0 if kind == "Adam" else 0.3
            theta[i] = theta[i] * (1 - lr * decay) - lr * m[i] / (1 - 0.8**t) / (second.sqrt() + 1e-8)
    return theta, m


@pytest.mark.parametrize("kind", ["Adam", "AdamW", "amsgrad", "RMSprop"])
def test_a_frozen_second_moment_sees_clean_gradients_only(kind: str) -> None:
    """v bit-equal to the run without noise over 30 updates; weights and m those of the equations."""
    clean, injected = model(), model()
    one, other = KINDS[kind](clean.parameters()), KINDS[kind](injected.parameters())
    source = gaussian(0.5)
    inject(other, source, "frozen_v", model=injected)
    run(clean, one, 30)
    run(injected, other, 30)
    theta, m = by_hand(kind, model(), source, 30)
    first, second = ("momentum_buffer", "square_avg") if kind == "RMSprop" else ("exp_avg", "exp_avg_sq")
    for p, q, w, x in zip(clean.parameters(), injected.parameters(), theta, m, strict=True):
        for name in {second, "max_exp_avg_sq"} & set(one.state[p]):
            assert torch.equal(one.state[p][name], other.state[q][name])
        torch.testing.assert_close(other.state[q][first], x, rtol=1e-6, atol=1e-9)
        torch.testing.assert_close(q.detach(), w, rtol=1e-6, atol=1e-9)
        assert (p - q).abs().max() > 0.01


@pytest.mark.parametrize("kind", ["SGD", "momentum", "nesterov"])
def test_without_a_second_moment_frozen_is_before(kind: str) -> None:
    found = []
    for where in ("pre", "frozen_v"):
        net = model()
        optimizer = KINDS[kind](net.parameters())
        inject(optimizer, gaussian(0.3), where, model=net)
        found.append(run(net, optimizer))
    assert same(*found)


# How much, where and when.


@pytest.mark.parametrize("where", WHERES)
@pytest.mark.parametrize("kind", KINDS)
def test_no_power_no_source_and_layers_left_out_change_no_bit(kind: str, where: Where) -> None:
    plain = run(*_pair(kind))
    for given in (
        {"power": 0.0},
        {"power": lambda n: 0.0},
        {"source": {1: None}},
        {"source": {20: gaussian(1.0)}},
        {"source": gaussian({})},
    ):
        net, optimizer = _pair(kind)
        inject(optimizer, **({"source": gaussian(1.0), "where": where, "model": net} | given))
        assert same(run(net, optimizer), plain)
    net, optimizer = _pair(kind)
    inject(optimizer, gaussian(1.0), where, model=net, layers="0")
    masked, before = weights(run(net, optimizer)), weights(plain)
    assert same(masked[2:], before[2:])
    assert not torch.equal(masked[0], before[0])
    assert not torch.equal(masked[1], before[1])


def _pair(kind: str) -> tuple[nn.Module, Optimizer]:
    net = model()
    return net, KINDS[kind](net.parameters())


def test_power_and_gains_scale_the_variance_and_may_change_at_any_time() -> None:
    """SGD at learning rate 1 and gradient 0: each update moves by sqrt(power x gain) n."""
    net = model()
    optimizer = SGD(net.parameters(), lr=1.0)
    source = gaussian(0.5)
    noise = inject(optimizer, source, model=net, power=lambda n: float(n))
    expected = {1: (1.0, 1.0), 2: (2.0, 2.0), 3: (9.0, 9.0), 4: (9.0, 0.0), 5: (2.25, 9.0)}
    for n, (first, last) in expected.items():
        if n == 3:
            noise.power = 9.0
        noise.gains = {4: {"2": 0.0}, 5: {"0": 0.25}}.get(n, {})
        before = weights(net)
        for p in net.parameters():
            p.grad = torch.zeros_like(p)
        optimizer.step()
        drawn = noise_of(source, net, n).items()
        for (name, x), p, old in zip(drawn, net.parameters(), before, strict=True):
            power = first if name.startswith("0") else last
            torch.testing.assert_close(p.detach() - old, -math.sqrt(power) * x)


def test_a_swap_in_mid_training_takes_the_source_in_force() -> None:
    net = model()
    optimizer = SGD(net.parameters(), lr=1.0)
    sources: Mapping[int, Any] = {2: gaussian(0.1), 4: None, 5: student_t(2.0, kind="tensor")}
    inject(optimizer, sources, model=net)
    for n in range(1, 7):
        before = weights(net)
        for p in net.parameters():
            p.grad = torch.zeros_like(p)
        optimizer.step()
        source = {2: sources[2], 3: sources[2], 5: sources[5], 6: sources[5]}.get(n)
        drawn = None if source is None else noise_of(source, net, n)
        for (name, p), old in zip(net.named_parameters(), before, strict=True):
            moved = torch.zeros_like(old) if drawn is None else -drawn[name]
            torch.testing.assert_close(p.detach() - old, moved)


def test_the_rate_is_what_the_step_used_whoever_wrote_it() -> None:
    """A scheduler steps after the optimizer; a learning rate may be a tensor."""
    found = []
    for lr in (0.5, torch.tensor(0.5, dtype=torch.float64)):
        net = model()
        optimizer = SGD(net.parameters(), lr=lr)
        scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
        inject(optimizer, gaussian(1.0), model=net)
        start = weights(net)
        for _ in range(3):
            for p in net.parameters():
                p.grad = torch.zeros_like(p)
            optimizer.step()
            scheduler.step()
        found.append(weights(net))
        for n, (name, _) in enumerate(net.named_parameters()):
            noise = sum(0.5**t * noise_of(gaussian(1.0), net, t)[name] for t in (1, 2, 3))
            torch.testing.assert_close(found[-1][n], start[n] - noise)
    assert same(*found)


# Names: the same noise whatever the grouping.


def test_grouping_order_and_wrapping_change_no_draw() -> None:
    """Of the parameters in groups; under torch.compile; named by the model or by the optimizer."""

    def moved(
        order: Callable[[nn.Module], Any], given: Callable[[nn.Module], Any], layers: str
    ) -> list[Tensor]:
        net = model()
        optimizer = SGD(order(net), lr=1.0)
        inject(optimizer, low_rank(_factors(net), joint=True), model=given(net), layers=layers)
        return weights(run(net, optimizer, 3, rate=1.0))

    expected = moved(lambda net: net.parameters(), lambda net: net, "*")
    reordered = [
        lambda net: list(net.parameters())[::-1],
        lambda net: [{"params": net[2].parameters()}, {"params": net[0].parameters(), "lr": 1.0}],
    ]
    for order in reordered:
        assert same(moved(order, lambda net: net, "0|2"), expected)
    assert same(moved(lambda net: net.parameters(), lambda net: torch.compile(net), "*"), expected)
    assert same(moved(lambda net: net.named_parameters(), lambda _: None, "0.*|2.weight|2.bias"), expected)


def _factors(net: nn.Module) -> dict[str, tuple[Tensor, Tensor, float]]:
    draw = torch.Generator().manual_seed(5)
    return {
        name: (torch.randn(p.numel(), 2, generator=draw), torch.ones(2), 0.1)
        for name, p in net.named_parameters()
    }


def test_micro_batches_change_no_draw() -> None:
    """Eighths add up exactly in any order, so weights are bit-equal too."""
    found = []
    x = (torch.arange(32).view(8, 4) % 5).double() / 8
    for parts in (1, 2, 8):
        net = nn.Linear(4, 1).double()
        nn.init.zeros_(net.weight)
        nn.init.zeros_(net.bias)
        optimizer = SGD(net.parameters(), lr=0.25)
        inject(optimizer, gaussian(1.0), "pre", model=net)
        for _ in range(3):
            for chunk in x.chunk(parts):
                net(chunk).sum().backward()
            optimizer.step()
            optimizer.zero_grad()
        found.append(weights(net))
    assert same(found[0], found[1])
    assert same(found[0], found[2])


def test_tied_weights_get_noise_once() -> None:
    embed, head = nn.Embedding(5, 3).double(), nn.Linear(3, 5, bias=False).double()
    head.weight = embed.weight
    net = nn.Sequential(embed, head)
    optimizer = SGD(net.parameters(), lr=1.0)
    noise = inject(optimizer, gaussian(1.0), model=net)
    assert [place.name for place in noise.places] == ["0.weight"]
    before = embed.weight.detach().clone()
    (0 * net(torch.tensor([1])).sum()).backward()
    optimizer.step()
    torch.testing.assert_close(before - embed.weight, noise_of(gaussian(1.0), net, 1)["0.weight"])


@pytest.mark.parametrize("where", WHERES)
def test_parameters_without_a_gradient_stay(where: Where) -> None:
    """Frozen ones, and those that an update did not reach; the latter get noise when it does."""
    net = model()
    first, frozen, _, last = net.parameters()
    frozen.requires_grad = False
    optimizer = Adam(net.parameters(), lr=0.1)
    inject(optimizer, gaussian(1.0), where, model=net)
    before = weights(net)
    first.grad = torch.ones_like(first)
    optimizer.step()
    after = weights(net)
    assert not torch.equal(after[0], before[0])
    assert same(after[1:], before[1:])
    last.grad = torch.zeros_like(last)
    optimizer.step()
    assert not torch.equal(last, before[3])


# Loops of every kind.


def test_gradients_zeroed_in_place_stay_clean() -> None:
    """With set_to_none=False backward() adds to the very tensors that the step saw."""
    found = []
    for kept in (True, False):
        net, optimizer = _pair("AdamW")
        inject(optimizer, gaussian(1.0), "pre", model=net)
        for n in range(5):
            x = torch.randn(8, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(n))
            (net(x) ** 2).mean().backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=not kept)
        found.append(net)
    assert same(*found)


def test_a_closure_is_refused_where_the_gradient_is_needed_before_it() -> None:
    """After the step it is fine, and does as a loop without."""
    net, optimizer = _pair("AdamW")
    noise = inject(optimizer, gaussian(1.0), "pre", model=net)

    def closure() -> float:
        give(net, 1)
        return 0.0

    before = weights(net)
    refused = r"where: pre: .* call backward\(\) before step\(\)"
    with pytest.raises(InputError, match=refused):
        optimizer.step(closure)
    with pytest.raises(InputError, match=refused):
        optimizer.step(closure=closure)
    assert same(net, before)
    assert noise.step == 0
    noise.remove()
    inject(optimizer, gaussian(1.0), "post", model=net)
    optimizer.step(closure)
    plain, other = _pair("AdamW")
    inject(other, gaussian(1.0), "post", model=plain)
    give(plain, 1)
    other.step()
    assert same(net, plain)


def test_several_injections_add_up_and_give_the_clean_gradient_back() -> None:
    net, optimizer = _pair("momentum")
    for n, where in enumerate(("pre", "post", "pre")):
        inject(optimizer, gaussian(1.0 + n), where, model=net, seed=n)  # type: ignore[arg-type]
    give(net, 1)
    clean, before = [p.grad.clone() for p in net.parameters() if p.grad is not None], weights(net)
    optimizer.step()
    parts = [noise_of(gaussian(1.0 + n), net, 1, seed=n) for n in range(3)]
    for (name, p), g, old in zip(net.named_parameters(), clean, before, strict=True):
        assert p.grad is not None
        assert torch.equal(p.grad, g)
        # The first step of torch's SGD is not dampened.
        expected = g + parts[0][name] + parts[2][name] + 8 * parts[1][name]
        torch.testing.assert_close(p.detach(), old - 0.1 * expected)


def test_a_removed_injection_is_gone() -> None:
    net, optimizer = _pair("AdamW")
    plain, other = _pair("AdamW")
    for where in WHERES:
        noise = inject(optimizer, gaussian(1.0), where, model=net)
        assert injections_of(optimizer) == [noise]
        noise.remove()
        noise.remove()
    assert injections_of(optimizer) == []
    assert same(run(net, optimizer), run(plain, other))


def test_an_optimizer_with_an_injection_can_be_forgotten_and_copied() -> None:
    """A study trains thousands of models in a process; a copy of an optimizer has no noise."""
    net, optimizer = _pair("AdamW")
    inject(optimizer, gaussian(1.0), model=net)
    run(net, optimizer, 1)
    twin = copy.deepcopy(optimizer)
    assert injections_of(twin) == []
    gone = weakref.ref(optimizer)
    del optimizer
    gc.collect()
    assert gone() is None


@pytest.mark.parametrize("where", WHERES)
@pytest.mark.parametrize("kind", ["momentum", "AdamW"])
def test_a_resumed_run_is_bit_identical(kind: str, where: Where) -> None:
    """From state dicts alone: seed, updates done, power and gains are in the injection's."""

    def attached(seed: int) -> tuple[nn.Module, Optimizer, Injection]:
        net, optimizer = _pair(kind)
        source = {1: gaussian(0.3), 4: student_t(0.3, kind="elliptical")}
        return net, optimizer, inject(optimizer, source, where, model=net, seed=seed)

    whole, first, second = attached(7), attached(7), attached(0)
    for noise in (whole[2], first[2]):
        noise.gains, noise.power = {"0": 3.0}, 2.0
    run(whole[0], whole[1], 8)
    run(first[0], first[1], 3)
    states = copy.deepcopy([part.state_dict() for part in first])
    second[0].load_state_dict(states[0])
    second[1].load_state_dict(states[1])
    second[2].load_state_dict(states[2])
    run(second[0], second[1], 5, first=4)
    assert same(whole[0], second[0])


# Loss scaling and half precision.


def scaled(
    kind: str,
    where: Where | None,
    fused: bool,
    scale: float | None,
    bad: int | None = None,
    left_out: int = 0,
) -> tuple[list[Tensor], list[Tensor], int]:
    """Weights, last gradients and updates counted after 5 attempts; attempt `bad` overflows."""
    net = model(torch.float32)
    makers: dict[str, Any] = {"AdamW": AdamW, "SGD": SGD}
    optimizer = makers[kind](net.parameters(), lr=0.1, fused=fused)
    noise = None if where is None else inject(optimizer, gaussian(0.5), where, model=net)
    scaler = torch.amp.GradScaler("cpu", init_scale=scale or 1.0, enabled=scale is not None)
    for n in range(1, 6):
        if n == left_out:
            continue
        optimizer.zero_grad()
        x = torch.randn(8, 4, generator=torch.Generator().manual_seed(n))
        loss = net(x).square().mean() * (math.inf if n == bad else 1)
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
    gradients = [p.grad.clone() for p in net.parameters() if p.grad is not None]
    return weights(net), gradients, 0 if noise is None else noise.step


@pytest.mark.parametrize("where", WHERES)
@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("kind", ["AdamW", "SGD"])
def test_loss_scaling_scales_no_noise_and_a_skipped_update_gets_none(
    kind: str, fused: bool, where: Where
) -> None:
    """Scales are powers of 2, so runs are bit-equal, as are the gradients that are left, unscaled."""
    plain = scaled(kind, where, fused, None, left_out=3)
    skipping = scaled(kind, where, fused, 1024.0, bad=3)
    assert (plain[2], skipping[2]) == (4, 4)
    assert same(plain[0], skipping[0])
    assert same(plain[1], skipping[1])
    assert not same(plain[0], scaled(kind, None, fused, None, left_out=3)[0])


def test_weights_too_coarse_for_the_noise_are_warned_of_once_with_the_share_lost() -> None:
    """At 1 a bfloat16 rounds moves from -2^-9 to 2^-8 away: with sd 2^-9, P(-1 < z < 2) = 82 %."""
    net = nn.Linear(1000, 100, bias=False).bfloat16()
    nn.init.ones_(net.weight)
    optimizer = SGD(net.parameters(), lr=1.0)
    inject(optimizer, gaussian(2.0**-9), model=net)
    net.weight.grad = torch.zeros_like(net.weight)
    with pytest.warns(UserWarning, match="82% of the coordinates in bfloat16 .* master weights in float32"):
        optimizer.step()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer.step()


@pytest.mark.parametrize(
    ("dtype", "std"),
    [
        (torch.float32, 2.0**-9),
        (torch.bfloat16, 1.0),
        # Coordinates that get no noise lose none.
        (torch.bfloat16, torch.eye(100)),
    ],
)
def test_weights_that_hold_the_noise_are_not_warned_of(dtype: torch.dtype, std: Tensor | float) -> None:
    net = nn.Linear(100, 100, bias=False).to(dtype)
    nn.init.ones_(net.weight)
    optimizer = SGD(net.parameters(), lr=1.0)
    inject(optimizer, gaussian(std if isinstance(std, float) else {"weight": std}), model=net)
    net.weight.grad = torch.zeros_like(net.weight)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer.step()


# What is refused.


def _adamw(net: nn.Module) -> Optimizer:
    return AdamW(net.parameters())


def _twice(net: nn.Module) -> None:
    optimizer = _adamw(net)
    inject(optimizer, gaussian(1.0), "post", model=net, layers="0")
    inject(optimizer, gaussian(1.0), "post", model=net, layers="2")  # elsewhere: fine
    inject(optimizer, gaussian(2.0), "pre", model=net, layers="0.weight")


def _other_sources(net: nn.Module) -> None:
    state = inject(_adamw(net), gaussian(1.0), model=net).state_dict()
    inject(_adamw(net), {2: gaussian(1.0)}, model=net).load_state_dict(state)


REFUSED: list[tuple[Callable[[nn.Module], object], str]] = [
    (lambda net: inject(_adamw(net), gaussian(1.0), "mid"), "where: mid: must be pre, post or frozen_v"),  # type: ignore[arg-type]
    (
        lambda net: inject(Muon([net.get_parameter("0.weight")]), gaussian(1.0)),
        "optimizer: Muon: .* take where='pre'",
    ),
    (lambda net: inject(_adamw(net), {0: gaussian(1.0)}), r"source: \[0\]: updates of a swap"),
    (lambda net: inject(_adamw(net), {}), r"source: \[\]: updates of a swap"),
    (lambda net: inject(_adamw(net), 0.1), "source: float: must be gaussian"),  # type: ignore[arg-type]
    (
        lambda net: inject(_adamw(net), gaussian(1.0), model=net, layers="0|blocks.*"),
        r"layers: blocks.\*: matches none of 0.weight, .*: mend the pattern",
    ),
    (lambda net: inject(_adamw(net), gaussian(1.0), layers="0.*"), r"layers: 0.\*: .*: give model="),
    (
        lambda net: inject(_adamw(net), gaussian(1.0), model=model()),
        "model: lacks a parameter of the optimizer",
    ),
    (
        lambda net: inject(_adamw(net), gaussian({"0.wieght": 1.0}), model=net),
        "source: 0.wieght: no parameter has that name",
    ),
    (
        lambda net: inject(_adamw(net), student_t({"0.weight": 1.0}, kind="tensor")),
        "source: 0.weight: .* give model=",
    ),
    (_twice, "seed: 0: another injection there draws the same numbers"),
    (_other_sources, "state_dict: a source at update 1: attach the same sources first"),
]


@pytest.mark.parametrize(("attach", "message"), REFUSED)
def test_what_cannot_be_is_refused_when_attached(attach: Callable[[nn.Module], object], message: str) -> None:
    with pytest.raises(InputError, match=message):
        attach(model())


@pytest.mark.parametrize("power", [-1.0, math.nan, math.inf])
def test_a_power_that_cannot_be_is_refused_at_its_update(power: float) -> None:
    net, optimizer = _pair("SGD")
    inject(optimizer, gaussian(1.0), model=net, power=lambda n: power if n == 2 else 1.0)
    run(net, optimizer, 1)
    before = weights(net)
    with pytest.raises(InputError, match=f"power at update 2: {power}: must be 0 or more, and finite"):
        run(net, optimizer, 1)
    assert same(net, before)


def test_names_are_those_of_the_module_inside_of_every_wrapper() -> None:
    """DistributedDataParallel and torch.compile in either order, which draw what one process draws."""

    class Inside(DistributedDataParallel):
        def __init__(self, module: nn.Module) -> None:
            nn.Module.__init__(self)  # no process group
            self.module = module

    net = model()
    expected = [name for name, _ in net.named_parameters()]

    def wrapped() -> Iterator[nn.Module]:
        yield net
        yield Inside(net)
        yield Inside(torch.compile(net))  # type: ignore[arg-type]
        yield torch.compile(Inside(net))  # type: ignore[misc]

    for outer in wrapped():
        places = places_of(SGD(net.parameters(), lr=0.1), outer, "*")
        assert [place.name for place in places] == expected


def test_noise_that_would_go_to_dead_units_is_warned_of_and_can_be_limited() -> None:
    """Isotropic noise after Adam's P moves a unit without gradient by eta n / eps."""

    def moved(limit: float, std: Any) -> float:
        net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2)).double()
        with torch.no_grad():
            net[0].bias[:2] = -100.0  # type: ignore[index, operator]
        optimizer = AdamW(net.parameters(), lr=1e-3)
        noise = inject(optimizer, gaussian(std), model=net, limit=limit)
        before = [p.detach().clone() for p in net.parameters()]
        generator = torch.Generator().manual_seed(0)
        x = torch.randn(32, 4, generator=generator, dtype=torch.float64)
        net(x).square().mean().backward()
        optimizer.step()
        noise.remove()
        return max((p - q).abs().max().item() for p, q in zip(net.parameters(), before, strict=True))

    with pytest.warns(UserWarning, match=r"injected noise: 100% of it moves coordinates .* with limit=10"):
        assert moved(math.inf, 0.01) > 100
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert moved(10.0, 0.01) < 10
    for where, limit in (("pre", 10.0), ("frozen_v", 10.0), ("post", 0.0)):
        optimizer = AdamW(nn.Linear(2, 2).parameters())
        with pytest.raises(InputError, match=rf"limit: {limit}: must be above 0, and is for where='post'"):
            inject(optimizer, gaussian(0.01), cast(Where, where), limit=limit)
