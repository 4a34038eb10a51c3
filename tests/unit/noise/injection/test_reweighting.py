"""Random weights: the noise that they add, against covariances worked out by hand.

Covariances are compared after whitening: distance(found, truth) is |L^-1 found L^-T - I|_F / sqrt(p), which
over N Gaussian draws of p numbers squares to (p + 1)/N on average. Bounds are 3 times its root and more: with
40 other sets of seeds none of these tests failed (1800 checks), and with the seeds here none can.
"""

import math
from itertools import pairwise
from typing import Any, get_args

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import kstest
from scipy.stats import t as student
from torch import Tensor, nn

from gradnoise import exposure
from gradnoise.base.errors import InputError
from gradnoise.base.streams import generator
from gradnoise.noise.estimators import means
from gradnoise.noise.injection import sources
from gradnoise.noise.injection.reweighting import Law, _deviations, reweight

LAWS: tuple[Law, ...] = get_args(Law)


def draws(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def deviations(count: int, n: int, ratio: float, law: Law, seed: int, degrees: float = 5.0) -> Tensor:
    return _deviations(count, n, ratio, law, degrees, draws(seed))


def distance(found: Tensor, truth: Tensor) -> float:
    root = torch.linalg.cholesky(truth)
    white = torch.linalg.solve(root, torch.linalg.solve(root, found).T)
    return ((white - torch.eye(len(truth))).norm() / math.sqrt(len(truth))).item()


def second_moment(rows: Tensor) -> Tensor:
    return rows.T @ rows / len(rows)


# --- the noise -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("n", "ratio"), [(8, 4.0), (8, 1.6), (3, 3.0)])
@pytest.mark.parametrize("law", LAWS)
def test_given_the_examples_the_noise_is_their_sample_covariance(law: Law, n: int, ratio: float) -> None:
    """s^2 S / n within 1 % at 400 000 draws, S unbiased, of correlated gradients with a mean; no bias."""
    width = min(3, n - 1)
    mix = torch.tensor([[2.0, 0.0, 0.0], [1.0, 1.0, 0.0], [-1.0, 0.3, 0.1]]).double()[:width, :width]
    gradients = 5 + torch.randn(n, width, generator=draws(1), dtype=torch.float64) @ mix.T
    weights = deviations(400_000, n, ratio, law, seed=2)
    assert weights.dtype == torch.float64
    noise = weights @ gradients / n
    truth = (ratio - 1) * torch.cov(gradients.T) / n
    assert distance(second_moment(noise), truth) < 0.01
    mean = torch.linalg.solve(torch.linalg.cholesky(truth), noise.mean(0))
    assert len(noise) * mean.square().sum().item() < 30  # chi^2 with up to 3 degrees of freedom


@pytest.mark.parametrize("law", LAWS)
def test_weights_of_other_parts_and_steps_are_independent(law: Law) -> None:
    """The public function over 4000 steps and two parts: variance s^2 within 2 %, no correlation above 2 %.

    One error of each is 0.4 % (for Student's t with 5 degrees of freedom 0.8 % of the variance).
    """
    calls = [[reweight(16, to_batch=4, step=t, part=k, law=law) - 1 for k in (0, 1)] for t in range(4000)]
    first, second = (torch.stack(part).double() / math.sqrt(3) for part in zip(*calls, strict=True))
    for one in (first, second):
        assert one.square().mean().item() == pytest.approx(1, abs=0.035 if law == "student_t" else 0.02)
    assert abs((first * second).mean().item()) < 0.02
    assert abs((first[1:] * first[:-1]).mean().item()) < 0.02
    # What the tests above draw many of at once is what it returns.
    one = 1 + _deviations(1, 16, 4.0, law, 5.0, generator(0, "reweight", 7, 1))[0]
    assert torch.equal(reweight(16, to_batch=4, step=7, part=1, law=law, dtype=torch.float64), one)


MEAN = torch.tensor([2.0, -1.0]).double()
MIX = torch.tensor([[1.0, 0.0], [0.8, 0.5]]).double()
COVARIANCE = MIX @ MIX.T


def examples(count: int, batch: int, seed: int) -> Tensor:
    """(count, batch, 2) skewed gradients of mean MEAN and covariance COVARIANCE."""
    raw = torch.empty(count, batch, 2, dtype=torch.float64).exponential_(generator=draws(seed)) - 1
    return MEAN + raw @ MIX.T


def contributions(gradients: Tensor, sizes: tuple[int, ...], ratio: float, law: Law) -> Tensor:
    """(count, R, 2) what micro-batches of these sizes, each weighted by itself, add to the gradient."""
    count, batch = gradients.shape[:2]
    parts = []
    for k, (n, some) in enumerate(zip(sizes, gradients.split(sizes, 1), strict=True)):
        weights = 1 + deviations(count, n, ratio, law, seed=100 + k)
        parts.append((weights[:, :, None] * some).sum(1) / batch)
    return torch.stack(parts, 1)


def readings(parts: Tensor, shares: Tensor) -> Tensor:
    """(count,) the trace that a meter reads from each update's contributions, with P = 1."""
    return means((parts - shares[:, None] * parts.sum(1, keepdim=True)).square().sum(-1), shares)[0]


def assert_mean(values: Tensor, truth: float) -> None:
    """Within 4.5 standard errors."""
    error = values.std().item() / math.sqrt(len(values))
    assert values.mean().item() == pytest.approx(truth, abs=4.5 * error)
    assert error < 0.01 * truth


@pytest.mark.parametrize("sizes", [(16,), (4, 4, 4, 4), (4, 12)])
@pytest.mark.parametrize("law", LAWS)
def test_over_batches_the_noise_is_that_of_the_smaller_batch(law: Law, sizes: tuple[int, ...]) -> None:
    """16 examples at to_batch 4, 100 000 updates: the gradient has covariance C/4 within 2 %, contribution r
    has w_r C/4, and the meter's estimate is Tr C/4 without bias.
    """
    parts = contributions(examples(100_000, 16, seed=3), sizes, 4.0, law)
    shares = torch.tensor(sizes).double() / 16
    means_of = shares[:, None] * MEAN
    assert distance(torch.cov(parts.sum(1).T), COVARIANCE / 4) < 0.02
    for part, share, mean in zip(parts.unbind(1), shares, means_of, strict=True):
        # Few examples with heavy weights have a large fourth moment: at most 2.9 % over 40 sets of seeds.
        assert distance(second_moment(part - mean), share * COVARIANCE / 4) < 0.035
    if len(sizes) > 1:
        assert_mean(readings(parts, shares), COVARIANCE.trace().item() / 4)


@pytest.mark.parametrize("law", LAWS)
def test_without_replacement_the_noise_is_that_of_the_smaller_batch_drawn_so(law: Law) -> None:
    """10 of a population of 20, to_batch 4: S (1/4 - 1/20) within 2 %, where S/4 would be a fifth more."""
    population = examples(1, 20, seed=4)[0]
    picks = torch.rand(100_000, 20, generator=draws(5)).argsort(1)[:, :10]
    gradient = contributions(population[picks], (10,), 2.5, law)[:, 0]
    truth = torch.cov(population.T) * (1 / 4 - 1 / 20)
    assert distance(torch.cov(gradient.T), truth) < 0.02


def test_weighting_what_the_meter_compares_reads_too_much() -> None:
    """4 micro-batches of 3 weighted whole, at temperature 4: the noise is 4 C/B, and the meter reads
    s^2 |mean gradient|^2 / (K - 1) more.
    """
    micro = examples(200_000, 12, seed=6).view(-1, 4, 3, 2).mean(2)
    weights = 1 + deviations(len(micro), 4, 4.0, "gaussian", seed=7)
    parts = weights[:, :, None] * micro / 4
    assert distance(torch.cov(parts.sum(1).T), 4 * COVARIANCE / 12) < 0.02
    shares = torch.full((4,), 0.25, dtype=torch.float64)
    noise, excess = 4 * COVARIANCE.trace().item() / 12, 3 * MEAN.square().sum().item() / 3
    assert excess > 5 * noise
    assert_mean(readings(parts, shares), noise + excess)


@pytest.mark.parametrize("estimator", ["micro", "example"])
def test_what_the_meter_reads(estimator: str) -> None:
    """Linear regression in 5 dimensions, 32 examples at to_batch 8, 300 updates measured without moving.

    Gradients y x with y = b.x + e have C = (|b|^2 + 1) I + b b' and mean b. In 4 micro-batches "micro" reads
    Tr C/8; "example", which compares what is weighted, s^2 |b|^2 / 31 more.
    """
    slopes = torch.tensor([1.0, -2.0, 2.0, 0.0, 4.0]).double()
    square = slopes.square().sum().item()
    model = nn.Linear(5, 1, bias=False).double()
    nn.init.zeros_(model.weight)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    meter = exposure(model, optimizer, every=1, estimator=estimator)
    found, parts, data = [], 4 if estimator == "micro" else 1, draws(8)
    for step in range(1, 301):
        for k in range(parts):
            n = 32 // parts
            inputs = torch.randn(n, 5, generator=data, dtype=torch.float64)
            targets = inputs @ slopes + torch.randn(n, generator=data, dtype=torch.float64)
            losses = 0.5 * (model(inputs)[:, 0] - targets).square()
            weights = reweight(n, to_batch=8, batch=32, step=step, part=k)
            ((weights * losses).mean() / parts).backward()
        optimizer.step()
        optimizer.zero_grad()
        found.append(meter.last.trace_c.value)
    read = torch.tensor(found).double()
    truth = (5 * (square + 1) + square) / 8 + (0 if estimator == "micro" else 3 * square / 31)
    error = read.std().item() / math.sqrt(len(read))
    assert error < 0.05 * truth
    assert read.mean().item() == pytest.approx(truth, abs=4.5 * error)


def test_a_mean_over_tokens() -> None:
    """Both sums weighted: s^2 times the sample covariance of n_b (g_b - g) / mean n_b, over n, within 5 %.

    To first order in the weights, here 64 examples at temperature 1.5; of weighted losses alone over fixed
    tokens the noise is another.
    """
    tokens = torch.randint(1, 20, (64,), generator=draws(9)).double()
    gradients = examples(1, 64, seed=10)[0]
    sums = tokens[:, None] * gradients
    weights = 1 + deviations(100_000, 64, 1.5, "gaussian", seed=11)
    mean = sums.sum(0) / tokens.sum()
    truth = 0.5 * torch.cov((tokens[:, None] * (gradients - mean) / tokens.mean()).T) / 64
    both = weights @ sums / (weights @ tokens)[:, None]
    assert distance(torch.cov(both.T), truth) < 0.05
    alone = weights @ sums / tokens.sum()
    assert distance(torch.cov(alone.T), truth) > 1


# --- the laws --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("degrees", [2.1, 3.0, 5.0, 1e6])
def test_student_t_numbers_have_their_law(degrees: float) -> None:
    """Kolmogorov and Smirnov against scipy at 100 000 numbers; in the tail at 1 in 1000 as well."""
    values = sources.student((100_000,), degrees, draws(12)) / math.sqrt((degrees - 2) / degrees)
    law = student(degrees)
    assert kstest(values.numpy(), law.cdf).pvalue > 1e-3
    beyond = (values.abs() > law.ppf(1 - 0.0005)).sum().item()
    assert beyond == pytest.approx(100, abs=45)  # Poisson: 4.5 errors


def test_student_t_weights_have_heavy_tails() -> None:
    """Kurtosis over 3: of 64 weights with 5 degrees of freedom, near 9 less what centring takes."""
    light = deviations(20_000, 64, 2.0, "gaussian", seed=13).pow(4).mean().item()
    heavy = deviations(20_000, 64, 2.0, "student_t", seed=13).pow(4).mean().item()
    assert 2.9 < light < 3.1
    assert heavy > 5


def test_a_subset_is_the_small_batch() -> None:
    """Weights 0 and B/B' exactly, so that loss and gradient are those of the batch of B' that was kept."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 1)).double()
    inputs, targets = torch.randn(24, 4).double(), torch.randn(24).double()

    def gradient(some: slice | Tensor, weights: Tensor | float) -> Tensor:
        model.zero_grad()
        losses = (model(inputs[some])[:, 0] - targets[some]).square()
        (weights * losses).mean().backward()
        return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])

    for step in range(5):
        weights = reweight(24, to_batch=9, batch=72, step=step, law="subset")
        assert weights.unique().tolist() == [0.0, 8.0]
        kept = weights.nonzero()[:, 0]
        assert len(kept) == 3
        assert torch.allclose(gradient(slice(None), weights), gradient(kept, 1.0), rtol=1e-12, atol=1e-14)


def test_every_subset_is_as_likely() -> None:
    """2 of 4, 60 000 draws: six subsets of 10 000, chi^2 with 5 degrees of freedom."""
    kept = deviations(60_000, 4, 2.0, "subset", seed=14) > 0
    counts = (kept.long() @ torch.tensor([1, 2, 4, 8])).bincount(minlength=16)
    found = counts[torch.tensor([3, 5, 6, 9, 10, 12])].double()
    assert found.sum() == 60_000
    assert ((found - 10_000).square() / 10_000).sum().item() < 25


def test_multinomial_weights_are_shrunk_counts() -> None:
    """Of 4 draws from 12: whole counts that sum to 4, and no negative weight."""
    weights = 1 + deviations(1000, 12, 3.0, "multinomial", seed=15)
    counts = ((weights - 1) / math.sqrt(8 / 11) + 1) * 4 / 12
    assert torch.allclose(counts, counts.round(), rtol=0, atol=1e-12)
    assert torch.equal(counts.round().sum(1), torch.full((1000,), 4.0).double())
    assert counts.round().max() >= 2
    assert weights.min() > 0


def test_bernoulli_weights_take_two_values_and_keep_the_share_wanted() -> None:
    """A quarter of 12 on average; weights are B/B' apart, times sqrt(n/(n - 1)) for the centring."""
    weights = deviations(20_000, 12, 4.0, "bernoulli", seed=16)
    low, high = weights.min(1, keepdim=True).values, weights.max(1, keepdim=True).values
    gaps = (high - low)[high > low]
    assert torch.allclose(gaps, torch.tensor(4 * math.sqrt(12 / 11)).double())
    kept = ((weights > low + 1).sum(1)).double()
    assert kept.mean().item() == pytest.approx(3, abs=4.5 * 1.5 / math.sqrt(20_000))
    assert kept.var().item() == pytest.approx(12 * 3 / 16, rel=0.05)


# --- invariants ------------------------------------------------------------------------------------------


@st.composite
def arguments(draw: st.DrawFn) -> dict[str, Any]:
    law = draw(st.sampled_from(LAWS))
    kept, ratio = draw(st.integers(1, 12)), draw(st.integers(1, 8))
    n = max(2, kept * ratio)
    return {
        "n": n,
        "temperature": n / draw(st.integers(1, n)),
        "law": law,
        "degrees": draw(st.floats(2.05, 100)) if law == "student_t" else None,
        "step": draw(st.integers(0, 10**9)),
        "part": draw(st.integers(0, 10**6)),
        "seed": draw(st.integers(0, 2**63 - 1)),
    }


@settings(max_examples=150, deadline=None, derandomize=True)
@given(arguments())
def test_invariants(given_arguments: dict[str, Any]) -> None:
    """Shape, sum n to rounding, no hidden state, and the two ways to say how much noise."""
    before = torch.get_rng_state()
    weights = reweight(**given_arguments, dtype=torch.float64)
    assert torch.equal(torch.get_rng_state(), before)
    n, temperature = given_arguments["n"], given_arguments["temperature"]
    assert weights.shape == (n,)
    assert weights.isfinite().all()
    size = weights.abs().sum().item()
    assert weights.sum().item() == pytest.approx(n, abs=1e-14 * size)
    single = reweight(**given_arguments)
    assert single.dtype == torch.float32
    assert torch.equal(single, weights.float())
    assert single.double().sum().item() == pytest.approx(n, abs=1e-7 * size)
    torch.manual_seed(0)
    assert torch.equal(reweight(**given_arguments, dtype=torch.float64), weights)
    # The batch of the update may be larger than the call's: only their ratio counts.
    other = {k: v for k, v in given_arguments.items() if k != "temperature"}
    same = reweight(**other, to_batch=3 * n / temperature, batch=3 * n, dtype=torch.float64)
    assert torch.allclose(same, weights, rtol=1e-9, atol=1e-9)
    if given_arguments["law"] in ("multinomial", "subset"):
        assert weights.min() >= 0
    if temperature == 1:
        assert torch.equal(weights, torch.ones(n).double())


@settings(max_examples=50, deadline=None, derandomize=True)
@given(st.integers(2, 40), st.floats(1.0, 50.0), st.floats(1.0, 50.0), st.sampled_from(LAWS[:2]))
def test_the_temperature_scales_the_same_draw(n: int, one: float, other: float, law: Law) -> None:
    """w - 1 is proportional to sqrt(temperature - 1), so a schedule changes the amount alone."""
    left, right = (
        reweight(n, temperature=temperature, step=3, law=law, dtype=torch.float64) - 1
        for temperature in (one, other)
    )
    assert torch.allclose(left * math.sqrt(other - 1), right * math.sqrt(one - 1), atol=1e-12)


@pytest.mark.parametrize("law", LAWS)
def test_a_resumed_run_draws_the_same(law: Law) -> None:
    """Update 5 is itself whether or not 1 to 4 were drawn; step, part and seed each give other weights."""
    through = [reweight(12, to_batch=4, step=t, law=law) for t in range(1, 9)]
    resumed = [reweight(12, to_batch=4, step=t, law=law) for t in range(5, 9)]
    assert all(torch.equal(a, b) for a, b in zip(through[4:], resumed, strict=True))
    assert not any(torch.equal(a, b) for a, b in pairwise(through))
    for change in ({"part": 1}, {"seed": 1}, {"step": 2}):
        assert not torch.equal(reweight(12, to_batch=4, law=law, **{"step": 1, **change}), through[0])


def test_degrees_are_5_if_nothing_is_said() -> None:
    default, five, three = (
        reweight(8, temperature=2, step=1, law="student_t", degrees=degrees) for degrees in (None, 5, 3)
    )
    assert torch.equal(default, five)
    assert not torch.equal(default, three)


def test_weights_go_where_they_are_wanted() -> None:
    assert reweight(4, temperature=2, step=1, device="meta").device.type == "meta"
    half = reweight(4, temperature=2, step=1, dtype=torch.bfloat16)
    assert torch.equal(half, reweight(4, temperature=2, step=1, dtype=torch.float64).bfloat16())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"n": 1}, "n: 1: must be a whole number, 2 or more"),
        ({"n": 8.0}, "n: 8.0: must be a whole number, 2 or more"),
        ({"step": -1}, "step: -1: must be a whole number, 0 or more"),
        ({"part": 0.5}, "part: 0.5: must be a whole number, 0 or more"),
        ({"batch": 7}, "batch: 7: must be a whole number, 8 or more"),
        ({"to_batch": None}, "to_batch: None: give to_batch or temperature"),
        ({"temperature": 2}, "to_batch: 4: goes without temperature=2: give one of them"),
        (
            {"to_batch": 9},
            "to_batch: 9: must be above 0 and at most the batch of 8: weights take no noise away",
        ),
        ({"to_batch": 0}, "to_batch: 0: must be above 0 and at most the batch of 8"),
        ({"to_batch": math.nan}, "to_batch: nan: must be above 0"),
        ({"to_batch": None, "temperature": 0.5}, "temperature: 0.5: must be 1 or more"),
        ({"to_batch": None, "temperature": math.inf}, "temperature: inf: must be 1 or more"),
        ({"to_batch": None, "temperature": math.nan}, "temperature: nan: must be 1 or more"),
        ({"law": "cauchy"}, "law: cauchy: must be gaussian, student_t, bernoulli, multinomial or subset"),
        ({"degrees": 5}, "degrees: 5: are for law student_t, not gaussian"),
        ({"law": "student_t", "degrees": 2}, "degrees: 2: must be above 2 and finite"),
        ({"law": "student_t", "degrees": math.inf}, "degrees: inf: must be above 2 and finite"),
        ({"law": "subset", "to_batch": 4, "batch": 12}, "to_batch: 4: law subset draws 2.66667 of 8"),
        (
            {"law": "multinomial", "to_batch": None, "temperature": 3},
            "temperature: 3: law multinomial draws 2.66667 of 8: must be a whole number",
        ),
        (
            {"law": "subset", "to_batch": None, "temperature": 1e12},
            "temperature: 1000000000000.0: law subset draws 8e-12 of 8",
        ),
        ({"dtype": torch.int64}, "dtype: torch.int64: must be a floating dtype"),
    ],
)
def test_bad_input(change: dict[str, Any], message: str) -> None:
    arguments = {"n": 8, "step": 1, "to_batch": 4, **change}
    with pytest.raises(InputError) as caught:
        reweight(**arguments)
    assert str(caught.value).startswith(message)
    assert "\n" not in str(caught.value)
