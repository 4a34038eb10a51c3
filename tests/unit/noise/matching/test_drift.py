"""Adam's second moment and noise, against Adam written out here and against displacements."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.optim import SGD, Adam, AdamW, Optimizer

from gradnoise import exposure, gaussian, inject
from gradnoise.base.errors import InputError
from gradnoise.noise.injection.sources import Draws
from gradnoise.noise.matching.drift import DriftMatch, borrow_second_moment
from gradnoise.noise.preconditioners import preconditioner

BETAS = (0.8, 0.95)
EPS = 1e-3
KINDS: dict[str, dict[str, Any]] = {
    "single": {"foreach": False},
    "foreach": {"foreach": True},
    "fused": {"fused": True},
}


def model(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 3)).double()


def adam(net: nn.Module, kind: str = "single", **settings: Any) -> AdamW:
    chosen: dict[str, Any] = {"lr": 1e-2, "betas": BETAS, "eps": EPS, "weight_decay": 0.1, **settings}
    return AdamW(net.parameters(), **chosen, **KINDS[kind])


def step(net: nn.Module, optimizer: Optimizer, number: int, parts: int = 1, clear: bool = True) -> None:
    draw = torch.Generator().manual_seed(number)
    inputs = torch.randn(32, 5, dtype=torch.float64, generator=draw)
    targets = torch.randint(3, (32,), generator=draw)
    for x, y in zip(inputs.chunk(parts), targets.chunk(parts), strict=True):
        (cross_entropy(net(x), y) / parts).backward()  # type: ignore[no-untyped-call]
    optimizer.step()
    if clear:
        optimizer.zero_grad()


def flat(tensors: Any) -> Tensor:
    return torch.cat([tensor.detach().flatten() for tensor in tensors])


def gradients(net: nn.Module) -> Tensor:
    return flat(p.grad for p in net.parameters())


def moments(optimizer: Optimizer, name: str) -> Tensor:
    return flat(optimizer.state[p][name] for g in optimizer.param_groups for p in g["params"])


class Written:
    """Adam by its equations, on flat vectors; it moves by any v_hat."""

    def __init__(self, start: Tensor) -> None:
        self.theta, self.m, self.v, self.t = (
            start.clone(),
            torch.zeros_like(start),
            torch.zeros_like(start),
            0,
        )

    def feed(self, g: Tensor) -> None:
        self.t += 1
        self.m = BETAS[0] * self.m + (1 - BETAS[0]) * g
        self.v = BETAS[1] * self.v + (1 - BETAS[1]) * g**2

    @property
    def v_hat(self) -> Tensor:
        return self.v / (1 - BETAS[1] ** self.t)

    def move(self, v_hat: Tensor, rate: float = 1e-2, decay: float = 0.1) -> None:
        self.theta = self.theta * (1 - rate * decay)
        self.theta -= rate * self.m / (1 - BETAS[0] ** self.t) / (v_hat.sqrt() + EPS)


# --- the learning rate that keeps the drift --------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_the_factor_is_the_least_squares_one_of_two_adams(kind: str) -> None:
    """kappa = sum P Q m^2 / sum P^2 m^2, Q and m of the clean gradients, P of the noisy ones."""
    net = model()
    optimizer = adam(net, kind)
    noise = inject(optimizer, gaussian(0.05), "pre", model=net)
    match = DriftMatch(optimizer)
    assert match.factor == 1
    clean, noisy = Written(flat(net.parameters())), Written(flat(net.parameters()))
    for number in range(12):
        step(net, optimizer, number, clear=False)
        added = flat(n for _, n in noise.added)
        clean.feed(gradients(net))
        noisy.feed(gradients(net) + added)
        optimizer.zero_grad()
        p, q = (1 / (a.v_hat.sqrt() + EPS) for a in (noisy, clean))
        expected = ((p * q * clean.m**2).sum() / (p**2 * clean.m**2).sum()).item()
        assert match.factor == pytest.approx(expected, rel=1e-9)
    assert match.factor > 1.1


def test_without_noise_nothing_changes() -> None:
    nets = [model(), model()]
    optimizers = [adam(net) for net in nets]
    inject(optimizers[0], gaussian(1.0), "pre", model=nets[0], power=0.0)
    match = DriftMatch(optimizers[0], apply=True)
    for number in range(10):
        for net, optimizer in zip(nets, optimizers, strict=True):
            step(net, optimizer, number)
        assert match.factor == 1
    assert torch.equal(flat(nets[0].parameters()), flat(nets[1].parameters()))


class Slope(nn.Module):
    """Loss of gradient 0.5, 1 or 2 in every one of 6000 coordinates: drift is seen in their mean."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.zeros(6000))
        self.slope = torch.tensor([0.5, 1.0, 2.0]).repeat(2000)

    def go(self, optimizer: Optimizer, updates: int) -> Tensor:
        """Mean displacement by slope, in units of the noiseless one."""
        for _ in range(updates):
            self.w.grad = self.slope.clone()
            optimizer.step()
        return -self.w.detach().view(2000, 3).mean(0) / (1e-3 * updates)


@pytest.mark.parametrize("relative", [False, True])
def test_noise_slows_the_drift_and_the_factor_gives_it_back(relative: bool) -> None:
    """Noise of 2 times the slope (relative) or of 2: the drift falls to 1 / sqrt(1 + c), c = N / g^2.

    Relative, all coordinates get it back. Else kappa is their weighted mean, with weights P^2 g^2: the slow
    ones get less than all, the fast ones more, as its docstring says. The means are known to 0.5 %; about 2 %
    are lost because P and the noise go together, by 1 - beta2 and more in the first updates.
    """
    found = {}
    for apply in (False, True):
        net = Slope()
        optimizer = AdamW(net.parameters(), lr=1e-3, betas=(0.9, 0.99), weight_decay=0)
        std: Any = {"w": 2 * net.slope} if relative else 2.0
        inject(optimizer, gaussian(std), "pre", model=net)
        match = DriftMatch(optimizer, apply=apply)
        found[apply] = net.go(optimizer, 800)
    c = torch.full((3,), 4.0) if relative else 4 / torch.tensor([0.25, 1.0, 4.0])
    lost = (1 + c).rsqrt()
    kappa = (lost.sum() / lost.square().sum()).item()
    torch.testing.assert_close(found[False], lost, rtol=0.06, atol=0)
    torch.testing.assert_close(found[True], kappa * lost, rtol=0.06, atol=0)
    assert match.factor == pytest.approx(kappa, rel=0.02)
    if relative:
        torch.testing.assert_close(found[True], torch.ones(3), rtol=0.04, atol=0)


@pytest.mark.parametrize("meter_first", [True, False])
def test_meters_and_schedulers_see_the_rate_that_is_theirs(meter_first: bool) -> None:
    """The ledger sums the rates that were used; a scheduler finds what it wrote."""
    net = model()
    optimizer = adam(net)
    meters = [exposure(net, optimizer, 1, estimator="micro")] if meter_first else []
    inject(optimizer, gaussian(0.05), "pre", model=net)
    match = DriftMatch(optimizer, apply=True)
    meters = meters or [exposure(net, optimizer, 1, estimator="micro")]
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
    used = []
    for number in range(6):
        used.append(optimizer.param_groups[0]["lr"] * match.factor)
        step(net, optimizer, number, parts=4)
        assert optimizer.param_groups[0]["lr"] == pytest.approx(1e-2 * 0.9**number, rel=1e-12)
        scheduler.step()
    assert used[-1] != optimizer.param_groups[0]["lr"]
    assert [event.sum_lr for event in meters[0].rows()[0]] == pytest.approx(used, rel=1e-12)


def test_a_step_that_fails_leaves_no_scaled_rate() -> None:
    net = model()
    optimizer = adam(net)
    noise = inject(optimizer, gaussian(0.05), "pre", model=net)
    match = DriftMatch(optimizer, apply=True)
    for number in range(3):
        step(net, optimizer, number)
    noise.remove()

    def broken() -> float:
        assert optimizer.param_groups[0]["lr"] > 1.1e-2
        raise RuntimeError("no loss")

    for _ in range(2):
        with pytest.raises(RuntimeError, match="no loss"):
            optimizer.step(broken)
    match.remove()
    assert optimizer.param_groups[0]["lr"] == 1e-2


def test_a_resumed_drift_match_is_the_same_bit_for_bit() -> None:
    def new() -> tuple[nn.Module, Optimizer, Any, DriftMatch]:
        net = model()
        optimizer = adam(net)
        noise = inject(optimizer, gaussian(0.05), "pre", model=net)
        return net, optimizer, noise, DriftMatch(optimizer, apply=True)

    whole, cut, again = new(), new(), new()
    for number in range(10):
        step(whole[0], whole[1], number)
    for number in range(4):
        step(cut[0], cut[1], number)
    for part, other in zip(again, cut, strict=True):
        part.load_state_dict(other.state_dict())
    for number in range(4, 10):
        step(again[0], again[1], number)
    assert torch.equal(flat(again[0].parameters()), flat(whole[0].parameters()))
    assert again[3].factor == whole[3].factor


def test_attached_in_mid_run_it_begins_with_the_optimizers_moments() -> None:
    net = model()
    optimizer = adam(net)
    clean = Written(flat(net.parameters()))
    for number in range(5):
        step(net, optimizer, number, clear=False)
        clean.feed(gradients(net))
        optimizer.zero_grad()
    match = DriftMatch(optimizer)
    assert match.factor == pytest.approx(1, abs=1e-12)
    inject(optimizer, gaussian(0.05), "pre", model=net)
    for number in range(5, 10):
        step(net, optimizer, number, clear=False)
        clean.feed(gradients(net))
        optimizer.zero_grad()
    noisy = moments(optimizer, "exp_avg_sq") / (1 - BETAS[1] ** 10)
    p, q = (1 / (v.sqrt() + EPS) for v in (noisy, clean.v_hat))
    expected = ((p * q * clean.m**2).sum() / (p**2 * clean.m**2).sum()).item()
    assert match.factor == pytest.approx(expected, rel=1e-9)


# --- a second moment from elsewhere ----------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_v_of_a_twin(kind: str) -> None:
    """Parameters, m and v after each step are those of Adam with the twin's v."""
    net, other = model(), model(1)
    optimizer, twin = adam(net, kind), adam(other, lr=3e-3)
    borrow_second_moment(optimizer, twin)
    mine, theirs = Written(flat(net.parameters())), Written(flat(other.parameters()))
    for number in range(15):
        step(other, twin, 100 + number, clear=False)
        theirs.feed(gradients(other))
        theirs.move(theirs.v_hat, 3e-3)
        step(net, optimizer, number, clear=False)
        mine.feed(gradients(net))
        mine.move(theirs.v_hat)
        for a in (optimizer, twin):
            a.zero_grad()
        torch.testing.assert_close(flat(net.parameters()), mine.theta, rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(moments(optimizer, "exp_avg"), mine.m, rtol=1e-10, atol=1e-14)
        torch.testing.assert_close(moments(optimizer, "exp_avg_sq"), theirs.v, rtol=1e-10, atol=1e-16)
        torch.testing.assert_close(flat(other.parameters()), theirs.theta, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("kind", KINDS)
def test_v_held_from_an_update_on(kind: str) -> None:
    """v_hat stays what it was, so P does, although the bias correction is still at work."""
    net = model()
    optimizer = adam(net, kind)
    written = Written(flat(net.parameters()))
    for number in range(3):  # before it is attached
        step(net, optimizer, number, clear=False)
        written.feed(gradients(net))
        written.move(written.v_hat)
        optimizer.zero_grad()
    borrow_second_moment(optimizer, "hold", first=4)
    held = None
    for number in range(3, 15):
        step(net, optimizer, number, clear=False)
        if number == 6:  # its fourth
            held = written.v_hat.clone()
        written.feed(gradients(net))
        written.move(written.v_hat if held is None else held)
        optimizer.zero_grad()
        torch.testing.assert_close(flat(net.parameters()), written.theta, rtol=1e-10, atol=1e-12)
        p = flat(preconditioner(optimizer, q) for q in net.parameters())
        now = written.v_hat if held is None else held
        torch.testing.assert_close(p, 1 / (now.sqrt() + EPS), rtol=1e-10, atol=0)


def test_in_single_precision_it_is_as_good_as_rounding() -> None:
    """Fused float32 over 200 updates beside float64 written out, with given gradients: nothing feeds back."""
    start = torch.randn(500, generator=torch.Generator().manual_seed(0))
    p, q = (nn.Parameter(start.clone()) for _ in range(2))
    optimizer, twin = (
        AdamW([x], lr=1e-2, betas=BETAS, eps=EPS, weight_decay=0.1, fused=True) for x in (p, q)
    )
    borrow_second_moment(optimizer, twin)
    mine, theirs = Written(start.double()), Written(start.double())
    for number in range(200):
        draw = torch.Generator().manual_seed(number)
        # The borrowed v is a hundredth of its own, so most of each step is added afterwards.
        p.grad = torch.randn(500, generator=draw)
        q.grad = 0.1 * torch.randn(500, generator=draw)
        theirs.feed(q.grad.double())
        mine.feed(p.grad.double())
        mine.move(theirs.v_hat)
        twin.step()
        optimizer.step()
    assert (p.detach() - mine.theta).abs().max().item() < 2e-5 * mine.theta.abs().max().item()


@pytest.mark.parametrize("injected_first", [True, False])
def test_meters_and_injected_noise_see_the_borrowed_p(injected_first: bool) -> None:
    """Whatever was attached first: the displacement is lr P n, and the trace is that of P."""
    net, other = model(), model()
    optimizer, twin = adam(net), adam(other, lr=0.0)
    meter = noise = None

    def attach() -> None:
        nonlocal meter, noise
        meter = exposure(net, optimizer, 1, estimator="micro", p="step")
        noise = inject(optimizer, gaussian(0.1), "post", model=net)

    for action in (attach, lambda: borrow_second_moment(optimizer, twin))[:: 1 if injected_first else -1]:
        action()
    written = Written(flat(net.parameters()))
    borrowed = Written(flat(net.parameters()))
    step(other, twin, 1, clear=False)
    borrowed.feed(gradients(other))
    step(net, optimizer, 2, parts=32, clear=False)
    written.feed(gradients(net))
    written.move(borrowed.v_hat)
    p = 1 / (borrowed.v_hat.sqrt() + EPS)
    drawn = flat(net.parameters()) - written.theta
    assert noise is not None
    assert meter is not None
    assert meter.last is not None
    draws = Draws(noise.seed, noise.step)
    units = flat(noise._source(1).draw(place, draws) for place in noise.places)
    torch.testing.assert_close(drawn, -1e-2 * p * units.to(drawn), rtol=1e-9, atol=1e-12)
    assert meter.last.injected.value == pytest.approx((p**2).sum().item() * 0.01, rel=1e-9)
    expected = (p**2 * _examples(2).var(0)).sum().item() / 32
    assert meter.last.trace.value == pytest.approx(expected, rel=1e-9)


def _examples(number: int) -> Tensor:
    """Gradients of the examples of an update, at the start, one by one."""
    net = model()
    draw = torch.Generator().manual_seed(number)
    inputs = torch.randn(32, 5, dtype=torch.float64, generator=draw)
    targets = torch.randint(3, (32,), generator=draw)
    rows = []
    for x, y in zip(inputs, targets, strict=True):
        rows.append(flat(torch.autograd.grad(cross_entropy(net(x[None]), y[None]), list(net.parameters()))))
    return torch.stack(rows)


def test_with_a_noiseless_twins_v_the_drift_stays() -> None:
    """Every coordinate's, which one learning rate cannot do."""
    net, other = Slope(), Slope()
    optimizer, twin = (
        AdamW(n.parameters(), lr=1e-3, betas=(0.9, 0.99), weight_decay=0) for n in (net, other)
    )
    inject(optimizer, gaussian(2.0), "pre", model=net)
    borrow_second_moment(optimizer, twin)
    for _ in range(400):
        other.go(twin, 1)
        net.go(optimizer, 1)
    # Noise of 2 over 400 updates and 2000 coordinates, P = 1 / slope: 0.5 % for the slowest.
    torch.testing.assert_close(-net.w.detach().view(2000, 3).mean(0) / 0.4, torch.ones(3), rtol=0.025, atol=0)


def test_a_resumed_hold_is_the_same_bit_for_bit() -> None:
    def new() -> tuple[nn.Module, Optimizer, Any]:
        net = model()
        optimizer = adam(net, "fused")
        return net, optimizer, borrow_second_moment(optimizer, "hold", first=5)

    whole = new()
    for number in range(12):
        step(whole[0], whole[1], number)
    for cut_at in (2, 4, 8):
        cut, again = new(), new()
        for number in range(cut_at):
            step(cut[0], cut[1], number)
        for part, other in zip(again, cut, strict=True):
            part.load_state_dict(other.state_dict())
        for number in range(cut_at, 12):
            step(again[0], again[1], number)
        assert torch.equal(flat(again[0].parameters()), flat(whole[0].parameters()))


def test_removed_it_is_adam_again() -> None:
    nets = [model(), model()]
    optimizers = [adam(net) for net in nets]
    step(nets[0], optimizers[0], 0)
    held = borrow_second_moment(optimizers[0], "hold")
    step(nets[0], optimizers[0], 1)
    held.remove()
    nets[1].load_state_dict(nets[0].state_dict())
    optimizers[1].load_state_dict(copy.deepcopy(optimizers[0].state_dict()))
    for net, optimizer in zip(nets, optimizers, strict=True):
        step(net, optimizer, 2)
    assert torch.equal(flat(nets[0].parameters()), flat(nets[1].parameters()))


def test_wrong_uses_are_refused() -> None:
    net, other = model(), model()
    for wrong in (SGD(net.parameters(), lr=0.1), Adam(net.parameters(), amsgrad=True)):
        for use in (DriftMatch, lambda o: borrow_second_moment(o, "hold")):
            with pytest.raises(InputError, match="optimizer"):
                use(wrong)
        with pytest.raises(InputError, match="optimizer"):
            borrow_second_moment(adam(net), wrong)
    with pytest.raises(InputError, match="weight decay"):
        DriftMatch(Adam(net.parameters(), weight_decay=0.1))
    DriftMatch(Adam(net.parameters()))
    with pytest.raises(InputError, match="of"):
        borrow_second_moment(adam(net), "keep")  # type: ignore[arg-type]
    with pytest.raises(InputError, match="first"):
        borrow_second_moment(adam(net), "hold", first=0)
    with pytest.raises(InputError, match="first"):
        borrow_second_moment(adam(net), adam(other), first=3)
    with pytest.raises(InputError, match="other parameters"):
        borrow_second_moment(adam(net), adam(nn.Linear(2, 2)))
    optimizer = adam(net)
    borrow_second_moment(optimizer, "hold")
    with pytest.raises(InputError, match="no second moment to hold"):
        step(net, optimizer, 0)
    optimizer, twin = adam(net), adam(other)
    borrow_second_moment(optimizer, twin)
    with pytest.raises(InputError, match="made 0 updates where this one made 1"):
        step(net, optimizer, 0)
