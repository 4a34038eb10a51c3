"""Aligned noise in a training loop: a drop-in that changes nothing at temperature 0, and what it refuses."""

import copy
import io
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.optim import Optimizer

from gradnoise import NAP, align_noise, exposure
from gradnoise.base.errors import InputError
from gradnoise.noise.exposure import meters_of
from gradnoise.noise.schedules import cosine, ramp, window
from gradnoise.optim.nap import Alignment, weights_of

INPUTS, WIDTH, CLASSES = 6, 8, 3

pytestmark = pytest.mark.filterwarnings("ignore:target tasks")


def network(dtype: torch.dtype = torch.float32) -> nn.Sequential:
    torch.manual_seed(0)
    layers = nn.Linear(INPUTS, WIDTH), nn.Tanh(), nn.LayerNorm(WIDTH), nn.Linear(WIDTH, CLASSES)
    return nn.Sequential(*layers).to(dtype)


def batch(seed: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    draw = torch.Generator().manual_seed(seed)
    x = torch.randn(8, INPUTS, generator=draw) * torch.linspace(2, 0.2, INPUTS)
    return x.to(dtype), torch.randint(CLASSES, (8,), generator=draw)


def backward(net: nn.Module, update: int, parts: int = 4, scale: float = 1.0) -> None:
    for part in range(parts):
        x, y = batch(100 * update + part, next(net.parameters()).dtype)
        (scale * cross_entropy(net(x).float(), y) / parts).backward()


def train(net: nn.Module, optimizer: Optimizer, updates: int, first: int = 0, **options: Any) -> None:
    for update in range(first, first + updates):
        backward(net, update, **options)
        optimizer.step()
        optimizer.zero_grad()


def equal(one: nn.Module, other: nn.Module) -> bool:
    pairs = zip(one.parameters(), other.parameters(), strict=True)
    return all(torch.equal(p, q) for p, q in pairs)


def known(_: str, layer: nn.Module) -> tuple[Tensor, Tensor, float]:
    """Most of the noise along the first input."""
    return torch.eye(int(layer.in_features))[:, :1], torch.ones(1), 0.01


# --- A drop-in ----------------------------------------------------------------------------------------------

OPTIMIZERS: dict[str, Callable[[Iterator[nn.Parameter]], Optimizer]] = {
    "adamw": lambda p: torch.optim.AdamW(p, lr=1e-2, foreach=False),
    "fused": lambda p: torch.optim.AdamW(p, lr=1e-2, fused=True),
    "foreach": lambda p: torch.optim.AdamW(p, lr=1e-2, foreach=True, amsgrad=True),
    "sgd": lambda p: torch.optim.SGD(p, lr=1e-2, momentum=0.9, nesterov=True),
    "adafactor": lambda p: torch.optim.Adafactor(p, lr=1e-2),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=1e-2, centered=True),
}


@pytest.mark.parametrize("target", ["features", "tasks"])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_at_temperature_0_nothing_changes(name: str, target: Any) -> None:
    """30 updates, sketches running: weights bit-equal, with a meter of the same optimizer as well."""
    nets = [network() for _ in range(2)]
    optimizers = [OPTIMIZERS[name](net.parameters()) for net in nets]
    noise = align_noise(optimizers[1], nets[1], target=target, rank=3, sketch_every=3)
    exposure(nets[1], optimizers[1], every=7)
    for net, optimizer in zip(nets, optimizers, strict=True):
        train(net, optimizer, 30)
    assert equal(*nets)
    assert all(int(s.count) == 10 for shape in noise.shapes for s in shape.sketches.values())


def test_nap_is_adamw_with_its_options() -> None:
    options: dict[str, Any] = {"betas": (0.8, 0.95), "eps": 1e-7, "weight_decay": 0.3, "amsgrad": True}
    for lr in (1e-2, torch.tensor(1e-2)):
        nets = [network() for _ in range(2)]
        plain = torch.optim.AdamW(nets[0].parameters(), lr=lr, foreach=False, **options)
        aligned = NAP(nets[1], lr=lr, foreach=False, rank=4, alignment=ramp(0, 1, 10), **options)
        assert isinstance(aligned, torch.optim.Optimizer)
        assert aligned.defaults == plain.defaults
        train(nets[0], plain, 30)
        train(nets[1], aligned, 30)
        assert equal(*nets)


def test_nap_with_its_noise_is_align_noise_on_adamw() -> None:
    nets = [network() for _ in range(2)]
    options: dict[str, Any] = {"rank": 4, "temperature": 0.5, "seed": 3, "target": "tasks", "limit": 5.0}
    plain = torch.optim.AdamW(nets[0].parameters(), lr=1e-2)
    align_noise(plain, nets[0], **options)
    train(nets[0], plain, 10)
    train(nets[1], NAP(nets[1], lr=1e-2, **options), 10)
    assert equal(*nets)
    still = network()
    train(still, torch.optim.AdamW(still.parameters(), lr=1e-2), 10)
    assert not equal(nets[0], still)


def test_schedulers_of_torch_and_of_temperature_work() -> None:
    """One that writes the learning rate, one that writes temperature and alignment; groups of their own."""
    net = network()
    groups = [
        {"params": net[0].parameters(), "lr": 1e-3},
        {"params": [*net[2].parameters(), *net[3].parameters()]},
    ]
    optimizer = NAP(net, lr=1e-2, params=groups, temperature=0.2, mode="absolute", target=known)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda t: 1 / (t + 1))
    for update in range(4):
        for group in optimizer.param_groups:
            group["temperature"], group["alignment"] = 0.1 / (update + 1), update / 4
        train(net, optimizer, 1, update)
        first, second = optimizer.noise.places
        powers = optimizer.noise.powers()
        for place, lr in ((first, 1e-3), (second, 1e-2)):
            now = 2 * (0.1 / (update + 1)) / (lr / (update + 1))
            assert powers[optimizer.noise.channel(place)] == pytest.approx(now)
            variance = optimizer.noise.variance(place) / now
            assert variance.mean().item() == pytest.approx(1, rel=1e-5)
            along = 1 + update / 4 * (place.parameter.shape[1] - 1)
            assert variance[0, 0].item() == pytest.approx(along, rel=0.1)
        scheduler.step()
    cycle = torch.optim.lr_scheduler.OneCycleLR(NAP(network(), lr=1.0), max_lr=0.1, total_steps=4)
    cycle.optimizer.step()
    cycle.step()


def test_added_groups_train_without_noise() -> None:
    net, late = network(), nn.Linear(CLASSES, CLASSES)
    both = nn.Sequential(net, late)
    optimizer = NAP(both, lr=1e-2, params=net.parameters(), temperature=0.5, mode="absolute")
    optimizer.add_param_group({"params": late.parameters(), "lr": 1e-3})
    before = late.weight.detach().clone()
    train(both, optimizer, 3)
    assert optimizer.param_groups[1]["temperature"] == 0.5
    assert not torch.equal(late.weight, before)
    assert len(optimizer.noise.places) == 2


@pytest.mark.parametrize("target", ["features", "tasks"])
def test_closures_work(target: Any) -> None:
    """The passes are made within step(); sketches still see the update's own."""
    nets = [network() for _ in range(2)]
    optimizers = [
        NAP(n, lr=1e-2, target=target, temperature=0.1, mode="absolute", sketch_every=2) for n in nets
    ]
    train(nets[0], optimizers[0], 6)
    for update in range(6):

        def closure(update: int = update) -> float:
            optimizers[1].zero_grad()
            backward(nets[1], update)
            return 0.0

        optimizers[1].step(closure)
    assert equal(*nets)


def test_clipping_and_accumulation_act_on_gradients_alone() -> None:
    """The noise of an update is the same whatever its gradient is, P aside: with SGD bit for bit."""
    added = []
    for clip in (None, 1e-3):
        net = network()
        optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
        align_noise(optimizer, net, temperature=0.1, mode="absolute", target=known)
        still = copy.deepcopy(net)
        backward(net, 0)
        backward(still, 0)
        for model in (net, still):
            if clip is not None:
                nn.utils.clip_grad_norm_(model.parameters(), clip)
        optimizer.step()
        torch.optim.SGD(still.parameters(), lr=0.1).step()
        added.append((net[0].weight - still[0].weight).detach())
    torch.testing.assert_close(added[0], added[1], rtol=0, atol=1e-6)
    assert added[0].std() > 0.1


# --- State --------------------------------------------------------------------------------------------------


def through_a_file(state: Any) -> Any:
    """What torch.load gives without pickles."""
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


RESUMED: dict[str, dict[str, Any]] = {
    "features": {"temperature": 0.1, "mode": "absolute"},
    "tasks": {
        "temperature": 0.1,
        "mode": "absolute",
        "target": "tasks",
        "structure": {"0": "vec", "*": "joint"},
    },
    "relative": {"temperature": cosine(2.0, 0.1, 20), "alignment": ramp(0, 1, 15)},
    "number": {"temperature": 0.7, "alignment": 0.3, "explained": 0.8, "spectrum": "reversed"},
}


@pytest.mark.parametrize("name", RESUMED)
@pytest.mark.parametrize("at", [1, 6, 10])
def test_a_resumed_run_is_bit_for_bit_the_same(name: str, at: int) -> None:
    options = {"rank": 5, "sketch_every": 3, "half_life": 2.0} | RESUMED[name]
    whole = network()
    optimizer = NAP(whole, lr=1e-2, **options)
    train(whole, optimizer, 20)
    early = network()
    first = NAP(early, lr=1e-2, **options)
    train(early, first, at)
    saved = through_a_file({"net": early.state_dict(), "optimizer": first.state_dict()})
    # What the first run does next does not reach into what it saved.
    kept = copy.deepcopy(first.state_dict()["noise"]["sources"])
    train(early, first, 3, at)
    late = network()
    second = NAP(late, lr=1e-2, **options)
    late.load_state_dict(saved["net"])
    second.load_state_dict(saved["optimizer"])
    again = second.state_dict()["noise"]["sources"]
    assert repr(again) == repr(kept)
    train(late, second, 20 - at, at)
    assert equal(whole, late)
    meters = [o.noise._meter for o in (optimizer, second)]
    if meters[0] is not None:
        assert repr(meters[0].state_dict()) == repr(meters[1].state_dict())


def test_written_settings_are_in_the_checkpoint() -> None:
    nets = [network() for _ in range(2)]
    optimizers = [NAP(n, lr=1e-2, temperature=0.1, mode="absolute") for n in nets]
    optimizers[0].param_groups[0]["temperature"] = 0.9
    optimizers[1].load_state_dict(optimizers[0].state_dict())
    assert optimizers[1].param_groups[0]["temperature"] == 0.9


def test_checkpoints_of_adamw_and_without_noise_are_taken_over() -> None:
    nets = [network() for _ in range(3)]
    adamw = torch.optim.AdamW(nets[0].parameters(), lr=1e-2)
    train(nets[0], adamw, 10)
    saved = copy.deepcopy(adamw.state_dict())
    train(nets[0], adamw, 5, 10)
    for net, temperature in ((nets[1], 0.0), (nets[2], lambda t: 0.1 * t)):
        optimizer = NAP(net, lr=1.0, temperature=temperature, mode="absolute")
        train(net, torch.optim.AdamW(net.parameters(), lr=1e-2), 10)
        optimizer.load_state_dict(saved)
        assert optimizer.param_groups[0]["lr"] == 1e-2
        train(net, optimizer, 5, 10)
    assert equal(nets[0], nets[1])
    assert not equal(nets[0], nets[2])
    assert optimizer.param_groups[0]["temperature"] == pytest.approx(0.5)
    # And the other way: AdamW takes NAP's, whose noise it does not know.
    back = torch.optim.AdamW(network().parameters(), lr=1e-2)
    back.load_state_dict(optimizer.state_dict())


def test_a_copy_has_no_noise_and_takes_over_a_state() -> None:
    """copy.deepcopy of an optimizer keeps no hooks; it is AdamW then."""
    net = network()
    optimizer = NAP(net, lr=1e-2, temperature=0.1, mode="absolute")
    train(net, optimizer, 2)
    twin, twins = copy.deepcopy((net, optimizer))
    assert "noise" not in twins.state_dict()
    twins.load_state_dict(optimizer.state_dict())
    train(twin, twins, 2, 2)
    assert len(optimizer.state_dict()["noise"]["sources"]) == 1


# --- Precision ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("target", ["features", "tasks"])
def test_an_update_that_a_scaler_skips_gets_no_noise(fused: bool, target: Any) -> None:
    """Under autocast in bf16, with gradients that overflow at update 2: not counted, nothing heard of it."""

    def run(overflow: bool) -> tuple[nn.Module, NAP]:
        net = network()
        optimizer = NAP(
            net, lr=1e-2, fused=fused, target=target, temperature=0.1, mode="absolute", sketch_every=1
        )
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=10**6)
        for update in (0, 1, 99, 2, 3) if overflow else (0, 1, 2, 3):
            before = [p.detach().clone() for p in net.parameters()]
            for part in range(4):
                x, y = batch(100 * update + part)
                with torch.autocast("cpu", torch.bfloat16):
                    out = net(x)
                loss = cross_entropy(out.float(), y) / 4 * (torch.inf if update == 99 else 1)
                scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update(1024.0)
            optimizer.zero_grad()
            if update == 99:
                assert all(torch.equal(p, q) for p, q in zip(net.parameters(), before, strict=True))
        return net, optimizer

    (net, optimizer), (plain, straight) = run(True), run(False)
    assert optimizer.noise.step == straight.noise.step == 4
    sketches = [s for shape in optimizer.noise.shapes for s in shape.sketches.values()]
    assert all(int(s.count) == 4 and int(s.skipped) == 0 for s in sketches)
    if fused or target == "tasks":
        assert equal(net, plain)
    # Without a call of step(), inputs that the skipped update's layers saw count as rows of the next one.


def test_weights_in_half_precision_are_warned_of() -> None:
    net = network(torch.bfloat16)
    optimizer = NAP(net, lr=1e-3, temperature=1e-9, mode="absolute")
    with pytest.warns(UserWarning, match=r"of the coordinates in bfloat16 are too coarse .* float32"):
        train(net, optimizer, 2)
    assert all(
        s.basis.dtype == torch.float32 for shape in optimizer.noise.shapes for s in shape.sketches.values()
    )


@pytest.mark.parametrize("where", ["before", "after"])
def test_compiled_models_are_seen(where: str) -> None:
    torch._dynamo.reset()
    nets = [network() for _ in range(2)]
    options: dict[str, Any] = {"temperature": 0.1, "mode": "absolute", "sketch_every": 2, "layers": "0|3"}
    plain = NAP(nets[0], lr=1e-2, **options)
    if where == "before":
        model = torch.compile(nets[1], backend="eager")
        optimizer = NAP(model, lr=1e-2, **options)
    else:
        optimizer = NAP(nets[1], lr=1e-2, **options)
        model = torch.compile(nets[1], backend="eager")
    train(nets[0], plain, 6)
    train(model, optimizer, 6)
    assert [s.weights[0].path for s in optimizer.noise.shapes] == ["0", "3"]
    assert all(int(s.count) == 3 for shape in optimizer.noise.shapes for s in shape.sketches.values())
    for p, q in zip(*(net.parameters() for net in nets), strict=True):
        torch.testing.assert_close(p, q)


# --- Layers that are frozen, unused or tied -----------------------------------------------------------------


class Branching(nn.Module):
    """Layer b is used where it is asked for; `tied` has a's weight."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b = nn.Linear(INPUTS, INPUTS), nn.Linear(INPUTS, INPUTS)
        self.frozen, self.head = nn.Linear(INPUTS, INPUTS), nn.Linear(INPUTS, CLASSES)
        self.frozen.weight.requires_grad_(False)
        self.used = True

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.a(x))
        if self.used:
            x = x + self.b(x)
        out: Tensor = self.head(self.frozen(x))
        return out


@pytest.mark.parametrize("to_none", [True, False])
@pytest.mark.parametrize("mode", ["absolute", "relative"])
def test_unused_and_frozen_layers_stay_as_they_are(to_none: bool, mode: Any) -> None:
    """Also where zero_grad leaves zeros: P of a weight that never had a gradient is 1/eps."""
    net = Branching()
    net.used = False
    optimizer = NAP(net, lr=1e-3, weight_decay=0.0, temperature=1e-6, mode=mode, sketch_every=1)
    assert [place.name for place in optimizer.noise.places] == ["a.weight", "b.weight", "head.weight"]
    start = {name: p.detach().clone() for name, p in net.named_parameters()}
    for p in net.b.parameters():
        p.grad = None if to_none else torch.zeros_like(p)
    for update in range(4):
        backward(net, update)
        optimizer.step()
        optimizer.zero_grad(set_to_none=to_none)
    for name in ("b.weight", "frozen.weight"):
        assert torch.equal(net.get_parameter(name), start[name])
    assert not torch.equal(net.a.weight, start["a.weight"])
    assert optimizer.noise.powers()["0"] > 0
    assert all(meter.account.unit(optimizer.noise, "0") < 1e12 for meter in meters_of(optimizer))
    net.used = True
    train(net, optimizer, 2, 4)
    assert not torch.equal(net.b.weight, start["b.weight"])
    assert (net.b.weight - start["b.weight"]).abs().max() < 1


def test_joint_noise_has_the_alignment_of_its_first_weights_group() -> None:
    net = network()
    groups = [
        {"params": net[3].parameters(), "alignment": 0.0},
        {"params": [*net[0].parameters(), *net[2].parameters()], "alignment": 1.0},
    ]
    optimizer = torch.optim.SGD(groups, lr=0.1)
    size = INPUTS * WIDTH

    def along_first(name: str, layer: nn.Module) -> tuple[Tensor, Tensor, float]:
        directions = torch.zeros(layer.weight.numel(), 1)
        directions[0] = float(name == "0")
        return directions, torch.ones(1), 0.0

    noise = align_noise(
        optimizer, net, temperature=0.1, mode="absolute", structure="joint", target=along_first
    )
    train(net, optimizer, 1)
    (one, other) = (noise.variance(place) / (2 * 0.1 / 0.1) for place in noise.places)
    assert {place.name for place in noise.places} == {"0.weight", "3.weight"}
    assert [w.path for w in noise.shapes[0].weights] == ["0", "3"]
    assert other[0, 0].item() == pytest.approx(size + WIDTH * CLASSES, rel=0.02)
    assert one.max() < 0.01


def test_tied_weights_get_noise_once() -> None:
    net = nn.Sequential(nn.Embedding(9, 4), nn.Linear(4, 4), nn.Linear(4, 9, bias=False))
    net[2].weight = net[0].weight
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    noise = align_noise(optimizer, net, temperature=0.1, mode="absolute", sketch_every=1)
    assert [place.name for place in noise.places] == ["0.weight", "1.weight"]
    for _ in range(3):
        cross_entropy(net(torch.arange(9)), torch.arange(9)).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert all(int(s.count) == 3 for shape in noise.shapes for s in shape.sketches.values())


def test_memory_is_r_numbers_an_input_and_an_output() -> None:
    """The state, and what the sketches hold between updates; no more gradients after a step."""
    net = nn.Sequential(nn.Linear(300, 200, bias=False), nn.Linear(200, 100, bias=False))
    optimizer = torch.optim.SGD(net.parameters(), lr=1e-3)
    noise = align_noise(
        optimizer, net, target="tasks", rank=4, temperature=0.1, mode="absolute", sketch_every=1
    )
    for _ in range(2):
        for _ in range(4):
            net(torch.randn(8, 300)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()

    def numbers(state: Any) -> int:
        if isinstance(state, dict):
            return sum(numbers(value) for value in state.values())
        return state.numel() if isinstance(state, Tensor) else 1

    sides = (300 + 200) + (200 + 100)
    assert numbers(noise.state_dict()) < 4 * sides + 4 * 10 + 20
    held = [h for h in noise._feed._heard]  # type: ignore[union-attr]
    assert all(not h._single.mean and not h._labelled for h in held)


# --- Meters -------------------------------------------------------------------------------------------------


def test_a_meter_is_given_found_or_attached() -> None:
    net = network()
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-3)
    noise = align_noise(optimizer, net, temperature=0.5)
    (own,) = meters_of(optimizer)
    train(net, optimizer, 3)
    assert noise.powers()["0"] > 0
    assert noise.state_dict()["meter"] is not None
    noise.remove()
    assert meters_of(optimizer) == []

    meter = exposure(net, optimizer, every=2)
    found = align_noise(optimizer, net, temperature=0.5)
    assert meters_of(optimizer) == [meter]
    assert found.state_dict()["meter"] is None
    train(net, optimizer, 3)
    assert found.powers()["0"] > 0
    found.remove()
    assert meters_of(optimizer) == [meter]
    assert meter.after == []

    second = exposure(net, optimizer, every=1)
    given = align_noise(optimizer, net, meter=second, temperature=0.5)
    train(net, optimizer, 1)
    expected = 0.5 * second.trace / second.account.unit(given, "0")
    train(net, optimizer, 1)
    assert given.powers() == {"0": pytest.approx(expected, rel=1e-9)}
    other = torch.optim.AdamW(net.parameters())
    with pytest.raises(InputError, match=r"meter: of another optimizer: give exposure\(model, optimizer\)"):
        align_noise(other, net, meter=own, temperature=0.5)


def test_a_shared_meter_outlives_the_noise_that_attached_it() -> None:
    net = network()
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-3)
    one = align_noise(optimizer, net, layers="0", temperature=0.5)
    two = align_noise(optimizer, net, layers="3", temperature=0.25)
    (meter,) = meters_of(optimizer)
    train(net, optimizer, 1)
    # Each is relative to the whole model's noise.
    expected = [t * meter.trace / meter.account.unit(noise, "0") for noise, t in ((one, 0.5), (two, 0.25))]
    train(net, optimizer, 1)
    assert [one.powers()["0"], two.powers()["0"]] == pytest.approx(expected, rel=1e-9)
    one.remove()
    assert meters_of(optimizer) == [meter]
    train(net, optimizer, 4, 3)
    assert two.powers()["0"] > 0


def test_a_temperature_that_rises_without_a_meter_is_refused() -> None:
    net = network()
    optimizer = NAP(net, lr=1e-2)
    train(net, optimizer, 2)
    optimizer.param_groups[0]["temperature"] = 0.1
    with pytest.raises(
        InputError, match=r"temperature: 0\.1: relative to what nobody measures: give meter="
    ) as said:
        train(net, optimizer, 1)
    assert "\n" not in str(said.value)
    # A schedule is known to rise: it has a meter from the start.
    rising = NAP(network(), lr=1e-2, temperature=window(0.1, 5, 9))
    assert len(meters_of(rising)) == 1


def test_a_run_that_diverges_keeps_the_last_finite_reading() -> None:
    net = network()
    optimizer = torch.optim.SGD(net.parameters(), lr=1e-2)
    exposure(net, optimizer, every=1, estimator="micro")
    noise = align_noise(optimizer, net, temperature=0.1)
    train(net, optimizer, 2)
    last = noise.state_dict()["intrinsic"]
    with torch.no_grad():
        net[3].weight.fill_(torch.nan)
    train(net, optimizer, 2, 2)
    assert noise.state_dict()["intrinsic"] == last > 0


# --- Bad input ----------------------------------------------------------------------------------------------

BAD: dict[str, tuple[dict[str, Any], str]] = {
    "mode": ({"mode": "both"}, "mode: both: must be relative or absolute"),
    "limit": ({"limit": 0.0}, r"limit: 0\.0: must be above 0"),
    "sketch_every": ({"sketch_every": 0}, "sketch_every: 0: must be at least 1 update"),
    "target": ({"target": "prompts"}, r"target: prompts: must be features, tasks or a function"),
    "temperature": ({"temperature": -0.1}, r"temperature: -0\.1: must be 0 or more, and finite"),
    "alignment": ({"alignment": 1.5}, r"alignment: 1\.5: must be from 0 \(isotropic\) to 1"),
    "rank": ({"rank": 0}, "rank: 0: must be 1 or more"),
    "half_life": ({"half_life": 0.0}, r"half_life: 0\.0: must be more than 0 updates"),
    "explained": ({"explained": 0.0}, r"explained: 0\.0: must be a share above 0, at most 1"),
    "spectrum": ({"spectrum": "flat"}, "spectrum: flat: must be aligned, reversed or random"),
    "layers": ({"layers": "7"}, "layers: 7: matches no Linear layer that is trained; there are 0, 3"),
    "norm alone": ({"layers": "2"}, "layers: 2: matches no Linear layer that is trained"),
    "second pattern": ({"layers": "0|nope*"}, r"layers: nope\*: matches no Linear layer"),
    "structure": ({"structure": "full"}, "structure: full: must be kronecker, vec or joint"),
    "structure table": (
        {"structure": {"0": "vec"}, "target": "tasks"},
        r"structure: \['0'\]: has no pattern for 3",
    ),
    "structure typo": (
        {"structure": {"head": "vec", "*": "kronecker"}},
        "structure: head: matches none of the layers: 0, 3",
    ),
    "features whole": ({"structure": "vec"}, "target: features: has no covariance over whole weights"),
    "target sides": (
        {"target": lambda *_: {"inn": None}},
        r"""target of 0: \['inn'\]: must be for "in" or "out\"""",
    ),
    "target none": ({"target": lambda *_: None}, r"target of 0: NoneType: must be a tuple \(U, S, lam\)"),
    "target whole": (
        {"target": lambda *_: {"in": None}, "structure": "vec"},
        r"""target of 0: \['in'\]: must be for "whole\"""",
    ),
    "target shape": (
        {"target": lambda *_: (torch.ones(3, 2), torch.ones(1), 0.1)},
        r"target of 0 in: U \(3, 2\), S \(1,\): U must be \(6, r\) and S \(r,\)",
    ),
    "target negative": (
        {"target": lambda *_: (torch.ones(6, 1), -torch.ones(1), 0.1)},
        r"target of 0 in: S \[-1\.0\], lam 0\.1: S and lam must be 0 or more, not all 0, and finite",
    ),
    "target nan": (
        {"target": lambda *_: (torch.full((6, 1), torch.nan), torch.ones(1), 0.1)},
        "target of 0 in: .*: S and lam must be 0 or more, not all 0, and finite",
    ),
    "target zero": (
        {"target": lambda *_: (torch.ones(6, 1), torch.zeros(1), 0.0)},
        r"target of 0 in: S \[0\.0\], lam 0\.0: S and lam must be 0 or more, not all 0",
    ),
    "joint sizes": (
        {
            "structure": "joint",
            "target": lambda name, layer: (
                torch.ones(layer.weight.numel(), 1),
                torch.ones(1) + int(name),
                0.1,
            ),
        },
        "target of 0, 3: several S or lam: weights that share a covariance share both",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_named_with_its_mend(name: str) -> None:
    """One line with field, value and mend; and nothing stays attached to the model or the optimizer."""
    options, message = BAD[name]
    net = network()
    optimizer = torch.optim.AdamW(net.parameters())
    with pytest.raises(InputError, match=message) as said:
        align_noise(optimizer, net, **options)
    assert "\n" not in str(said.value)
    assert not any(layer._forward_pre_hooks for layer in net.modules())
    assert not optimizer._optimizer_step_post_hooks
    assert "temperature" not in optimizer.param_groups[0]
    train(net, optimizer, 1)


def test_large_weights_and_unknown_optimizers_are_refused() -> None:
    net = nn.Sequential(nn.Linear(400, 300))
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    with pytest.raises(
        InputError, match="structure: 120000 coordinates of 0: vec and joint hold at most 100000"
    ):
        align_noise(optimizer, net, target="tasks", structure="vec")
    muon = torch.optim.Muon([net[0].weight], lr=0.1)
    with pytest.raises(InputError, match="optimizer: Muon: its preconditioner is not known"):
        align_noise(muon, net)
    assert not net[0]._forward_pre_hooks
    with pytest.raises(InputError, match="model: generator: give the model itself, .* as params="):
        NAP(net.parameters(), lr=0.1)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="model: lacks a parameter of the optimizer"):
        align_noise(optimizer, network())
    noise = align_noise(optimizer, net)
    with pytest.raises(InputError, match="task: one: is for target='tasks'"):
        noise.task("one")


def test_layers_are_chosen_by_pattern_and_unknown_kinds_refused_by_name() -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(2, 2))

    net = nn.ModuleDict(
        {
            "tokens": nn.Embedding(5, 4),
            "block": nn.ModuleDict(
                {"mlp_out": nn.Linear(4, 4), "attention_out": nn.Linear(4, 4), "odd": Odd()}
            ),
            "norm": nn.LayerNorm(4),
            "head": nn.Linear(4, 5),
        }
    )
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)

    def paths(layers: str) -> list[str]:
        return [weight.path for weight in weights_of(optimizer, net, layers)]

    assert paths("*") == ["block.mlp_out", "block.attention_out", "head"]
    assert paths("*.mlp_out|head") == ["block.mlp_out", "head"]
    assert paths("*_out|*_out") == ["block.mlp_out", "block.attention_out"]
    assert paths("*.mlp_out.weight") == ["block.mlp_out"]
    with pytest.raises(
        InputError, match=r"layers: block\.odd \(Odd\): is no Linear layer: name in layers= those"
    ):
        paths("block*")
    net["head"].weight.requires_grad_(False)
    with pytest.raises(InputError, match="layers: head: matches no Linear layer that is trained"):
        paths("head")


def test_removal_leaves_the_plain_optimizer() -> None:
    nets = [network() for _ in range(2)]
    plain = torch.optim.AdamW(nets[0].parameters(), lr=1e-2)
    optimizer = NAP(nets[1], lr=1e-2, temperature=0.5, target="tasks")
    optimizer.noise.remove()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for net, base in zip(nets, (plain, optimizer), strict=True):
            train(net, base, 5)
    assert equal(*nets)
    assert meters_of(optimizer) == []
    assert isinstance(optimizer.noise, Alignment)
