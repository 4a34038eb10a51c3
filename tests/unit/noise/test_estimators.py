"""The estimators against brute force and simulation. Statistical bounds are 4.5 standard errors of a fixed
seed's mean (1 in 150 000 by chance), so that a failure means a change of the code."""

import math

import pytest
import torch
from scipy.stats import t as student
from torch import Tensor, nn

from gradnoise import exposure
from gradnoise.noise.estimate import UNKNOWN, Estimate, ratio
from gradnoise.noise.estimators import (
    Statistics,
    effective_clipped_each,
    effective_projected,
    means,
)
from gradnoise.noise.options import Options

WIDTH = 20
# A preconditioner and a covariance with a wide spectrum, and a mean that is not small beside the noise.
P = torch.linspace(0.2, 3, WIDTH, dtype=torch.float64)
SCALE = torch.linspace(1, 8, WIDTH, dtype=torch.float64).pow(-0.5).flip(0)
MEAN = torch.linspace(-0.3, 0.5, WIDTH, dtype=torch.float64)


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=generator(seed), dtype=torch.float64)


def statistics(
    contributions: Tensor, shares: Tensor | None = None, gradient: Tensor | None = None, factor: float = 1.0
) -> Statistics:
    """Statistics of h (R, D) with P = `P`, by their definitions; two tensors, cut in the middle."""
    count = len(contributions)
    shares = torch.full((count,), 1 / count, dtype=torch.float64) if shares is None else shares
    gradient = contributions.sum(0) if gradient is None else gradient
    d = contributions - shares[:, None] * gradient
    cut = WIDTH // 2

    def squares(rows: Tensor) -> Tensor:
        return torch.stack([rows[..., :cut].square().sum(-1), rows[..., cut:].square().sum(-1)])

    return Statistics(
        shares=shares,
        pcp=squares(P * d),
        c=squares(d),
        signal_pcp=squares(P * gradient),
        signal_c=squares(gradient),
        inner_pcp=(P * d) @ (P * gradient),
        inner_c=d @ gradient,
        grams=((P * d) @ (P * d).T,),
        trace_p=torch.stack([P[:cut].sum(), P[cut:].sum()]),
        ratio=torch.ones(2, dtype=torch.float64),
        factor=factor,
    )


def estimates(examples: Tensor, contributions: int) -> tuple[Tensor, Tensor]:
    """Tr(P C/B P) and its error from each of S batches (S, B, D), split in equal micro-batches."""
    simulations, batch, width = examples.shape
    h = examples.view(simulations, contributions, batch // contributions, width).sum(2) / batch
    distances = (P * (h - h.mean(1, keepdim=True))).square().sum(-1)
    return means(distances, torch.full((contributions,), 1 / contributions, dtype=torch.float64))


def assert_mean(values: Tensor, truth: float) -> None:
    error = values.std() / math.sqrt(len(values))
    assert values.mean().item() == pytest.approx(truth, abs=4.5 * error.item())


def test_the_trace_does_not_depend_on_how_a_batch_is_split() -> None:
    """E [R/(R-1) (sum |P h_r|^2 - |P g|^2 / R)] = Tr(P C P) / B for any R (noise.md finding 1)."""
    batch = 32
    examples = MEAN + SCALE * normal(2000, batch, WIDTH, seed=0)
    truth = (P * SCALE).square().sum().item() / batch
    for count in (2, 4, 8, 16, 32):
        values, _ = estimates(examples, count)
        assert_mean(values, truth)
        h = examples[0].view(count, -1, WIDTH).sum(1) / batch
        closed = (P * h).square().sum() - (P * h.sum(0)).square().sum() / count
        assert values[0].item() == pytest.approx(count / (count - 1) * closed.item(), rel=1e-12)


def test_contributions_of_unequal_size_are_weighted_by_their_share() -> None:
    """Shares w_r of a mean over tokens: unbiased, where equal weights read a multiple of the truth."""
    tokens = torch.tensor([1, 2, 3, 5, 8, 13, 21, 43])
    shares = tokens.double() / tokens.sum()
    noise = SCALE * normal(4000, len(tokens), WIDTH, seed=1) / tokens.sqrt()[:, None]
    h = shares[:, None] * (MEAN + noise)
    gradient = h.sum(1, keepdim=True)
    truth = (P * SCALE).square().sum().item() / tokens.sum().item()
    values, _ = means((P * (h - shares[:, None] * gradient)).square().sum(-1), shares)
    assert_mean(values, truth)
    equal = torch.full_like(shares, 1 / len(shares))
    wrong, _ = means((P * (h - equal[:, None] * gradient)).square().sum(-1), equal)
    assert wrong.mean() > 3 * truth


def test_sequences_of_random_length_need_token_weights() -> None:
    """The trap of noise.md 2.1: the batch's gradient is a ratio, sum n_b g_b / sum n_b.

    Its real variance (20 000 batches) is what token shares give to within 5 %; the variance of g_b / B, each
    sequence counting the same, is nearly twice it.
    """
    simulations, batch = 20_000, 32
    lengths = torch.randint(1, 20, (simulations, batch), generator=generator(2)).double()
    g = 0.3 + (0.05 + 4 / lengths).sqrt() * normal(simulations, batch, seed=3)
    shares = lengths / lengths.sum(1, keepdim=True)
    truth = (shares * g).sum(1).var().item()
    d = shares * (g - (shares * g).sum(1, keepdim=True))
    weighted = d.square().sum(1) / (1 - shares.square().sum(1))
    assert weighted.mean().item() == pytest.approx(truth, rel=0.05)
    assert means(d[0].square(), shares[0])[0].item() == pytest.approx(weighted[0].item(), rel=1e-12)
    assert g.var(1).mean().item() / batch > 1.7 * truth


def test_some_contributions_around_the_whole_batchs_gradient_are_enough() -> None:
    """h_r of 8 of 32 examples, distances from w_r g with g of all 32: unbiased, and the error is right."""
    batch, looked_at = 32, 8
    examples = MEAN + SCALE * normal(4000, batch, WIDTH, seed=4)
    h = examples[:, :looked_at] / batch
    gradient = examples.mean(1, keepdim=True)
    shares = torch.full((looked_at,), 1 / batch, dtype=torch.float64)
    values, errors = means((P * (h - gradient / batch)).square().sum(-1), shares)
    assert_mean(values, (P * SCALE).square().sum().item() / batch)
    assert errors.square().mean().sqrt().item() == pytest.approx(values.std().item(), rel=0.08)


@pytest.mark.parametrize("count", [3, 8, 32])
def test_errors_are_the_delete_one_jackknifes(count: int) -> None:
    """Trace, signal and their covariance from the batch without contribution r, all by brute force."""
    h = (MEAN + SCALE * normal(count, WIDTH, seed=count)) / count
    found = statistics(h)
    traces, signals = torch.zeros(2, count, dtype=torch.float64)
    for r in range(count):
        rest = torch.cat([h[:r], h[r + 1 :]]) * count / (count - 1)  # adds up to the gradient without r
        noise = (P.square() * (count - 1) * rest.var(0)).sum()
        traces[r] = noise * (count - 1) / count  # the whole batch is larger
        signals[r] = (P * rest.sum(0)).square().sum() - noise
    traces, signals = traces - traces.mean(), signals - signals.mean()
    scale = (count - 1) / count
    assert found.trace().stderr == pytest.approx((scale * traces.square().sum()).sqrt().item(), rel=1e-9)
    signal, covariance = found.signal()
    assert signal.stderr == pytest.approx((scale * signals.square().sum()).sqrt().item(), rel=1e-9)
    assert covariance == pytest.approx((scale * signals * traces).sum().item(), rel=1e-9)


def test_the_jackknife_holds_for_unequal_shares_to_first_order() -> None:
    """Brute force: the rest's shares are w_s / (1 - w_r), its noise 1 / (1 - w_r) times the whole's."""
    tokens = torch.linspace(80, 120, 16, dtype=torch.float64)
    shares = tokens / tokens.sum()
    h = shares[:, None] * (MEAN + SCALE * normal(16, WIDTH, seed=7) / tokens.sqrt()[:, None])
    traces = torch.zeros(16, dtype=torch.float64)
    for r in range(16):
        kept = [n for n in range(16) if n != r]
        left, h_left = shares[kept] / (1 - shares[r]), h[kept] / (1 - shares[r])
        d = P * (h_left - left[:, None] * h_left.sum(0))
        traces[r] = d.square().sum() / (1 - left.square().sum()) * (1 - shares[r])
    brute = (15 / 16 * (traces - traces.mean()).square().sum()).sqrt().item()
    assert statistics(h, shares).trace().stderr == pytest.approx(brute, rel=0.03)


def test_two_contributions_have_a_value_and_no_error() -> None:
    found = statistics(normal(2, WIDTH, seed=0))
    assert found.trace().value > 0
    assert math.isnan(found.trace().stderr)
    assert math.isnan(found.signal()[0].stderr)


@pytest.mark.parametrize("tail", ["normal", "t5", "scales"])
@pytest.mark.parametrize("count", [8, 32])
def test_ninety_per_cent_intervals_cover_in_ninety_per_cent(count: int, tail: str) -> None:
    """Between 85 and 95 % of 4000 (the bar of issue 3); also for t5 coordinates and random loudness.

    "scales": each example's gradient times its own log-normal factor, as loud examples have. The standard
    error of a coverage is 0.5 %.
    """
    batch = 64
    x = normal(4000, batch, WIDTH, seed=8)
    variance = 1.0
    if tail == "t5":
        chi = torch._standard_gamma(torch.full(x.shape, 2.5, dtype=x.dtype), generator=generator(9)) * 2
        x, variance = x / (chi / 5).sqrt(), 5 / 3
    elif tail == "scales":
        x = x * (0.4 * normal(4000, batch, 1, seed=9)).exp()
        variance = math.exp(2 * 0.16)
    truth = variance * (P * SCALE).square().sum().item() / batch
    values, errors = estimates(MEAN + SCALE * x, count)
    low, high = Estimate(0.0, 1.0).interval(0.9, df=count - 1)
    covered = ((values + low * errors <= truth) & (truth <= values + high * errors)).double().mean().item()
    assert 0.85 <= covered <= 0.95


def test_the_signal_is_unbiased_and_so_is_its_covariance_with_the_trace() -> None:
    """|P g|^2 - Tr(P C/B P) has mean |P gbar|^2; the covariance is that of 2000 batches to within 15 %.

    Skewed noise, so that the two covary (correlation 0.67). At R = 8 the jackknife is not there yet: 0.77 of
    the covariance, 1.25 of the signal's variance.
    """
    x = torch.empty(2000, 32, WIDTH, dtype=torch.float64).exponential_(generator=generator(10)) - 1
    h = (MEAN.abs() + SCALE * x) / 32
    rows = [(f.trace(), *f.signal()) for f in map(statistics, h)]
    trace, trace_c, signal, covariance = (
        torch.tensor(column, dtype=torch.float64)
        for column in zip(*((t.value, t.stderr, s.value, c) for t, s, c in rows), strict=True)
    )
    assert_mean(signal, (P * MEAN).square().sum().item())
    joint = torch.cov(torch.stack([signal, trace]))
    assert covariance.mean().item() == pytest.approx(joint[0, 1].item(), rel=0.15)
    assert trace_c.square().mean().item() == pytest.approx(joint[1, 1].item(), rel=0.15)
    plain, _ = statistics(h[0]).signal_plain()
    closed = h[0].sum(0).square().sum() - 32 * h[0].var(0).sum()
    assert plain.value == pytest.approx(closed.item(), rel=1e-12)


def test_a_signal_beside_a_trace_of_some_examples_has_the_right_error() -> None:
    """|g|^2 of all 32, the trace of 8: variance and covariance of 3000 batches to within 20 %.

    Dropping one of the 8 moves the trace by an 8th and |g|^2 by a 32nd: scaled alike, the covariance would
    come out 4 times too large.
    """
    x = torch.empty(3000, 32, WIDTH, dtype=torch.float64).exponential_(generator=generator(10)) - 1
    h = (2 * MEAN.abs() + SCALE * x) / 32
    shares = torch.full((8,), 1 / 32, dtype=torch.float64)
    found = [statistics(batch[:8], shares, batch.sum(0)) for batch in h]
    signals = [f.signal() for f in found]
    values = torch.tensor([[s.value, f.trace().value] for (s, _), f in zip(signals, found, strict=True)])
    joint = torch.cov(values.double().T)
    errors, covariances = torch.tensor([[s.stderr, c] for s, c in signals], dtype=torch.float64).T
    assert errors.square().mean().item() == pytest.approx(joint[0, 0].item(), rel=0.2)
    assert covariances.mean().item() == pytest.approx(joint[0, 1].item(), rel=0.2)


def test_batches_without_replacement_have_less_noise() -> None:
    """Variance over draws of B of N is (1 - B/N) S^2/B: half of it at B = N/2; the signal follows."""
    data = MEAN + SCALE * normal(64, WIDTH, seed=11)
    draws = torch.rand(3000, 64, generator=generator(12)).argsort(1)[:, :32]
    h = data[draws] / 32
    gradients = P * h.sum(1)
    found = [statistics(batch, factor=0.5) for batch in h]
    truth = (P.square() * data.var(0)).sum().item() / 32 * (1 - 32 / 64)
    assert gradients.var(0).sum().item() == pytest.approx(truth, rel=0.03)
    assert_mean(torch.tensor([f.trace().value for f in found]), truth)
    assert_mean(torch.tensor([f.signal()[0].value for f in found]), (P * data.mean(0)).square().sum().item())


def test_parts_add_up_to_the_whole() -> None:
    found = statistics(normal(6, WIDTH, seed=13))
    members = torch.tensor([[1, 0], [0, 1], [1, 1]])
    values, errors = found.traces(members)
    assert values[0] + values[1] == pytest.approx(values[2].item(), rel=1e-12)
    assert (values[2].item(), errors[2].item()) == pytest.approx(tuple(found.trace()), rel=1e-12)
    plain, _ = found.traces_c(members)
    assert plain[2].item() == pytest.approx(found.trace_c().value, rel=1e-12)


def test_random_probes_add_to_the_error_alone() -> None:
    found = statistics(normal(6, WIDTH, seed=13))
    quiet = found.trace()
    found.probe_variance = (0.5, 0.0)
    assert found.trace().value == quiet.value
    assert found.trace().stderr == pytest.approx(math.sqrt(quiet.stderr**2 + 0.5))


def test_nothing_is_known_of_blank_statistics() -> None:
    blank = Statistics.blank(torch.full((4,), 0.25, dtype=torch.float64), 2)
    assert math.isnan(blank.trace().value)
    assert math.isnan(blank.signal()[0].value)
    assert math.isnan(blank.signal()[0].stderr)


def test_project_is_the_jacobian_of_clipping() -> None:
    """Tr(P J C J' P) for J = d (c g/|g|) / dg, by autograd, and C/B the sample's."""
    h = MEAN / 8 + SCALE * normal(8, WIDTH, seed=14) / 8
    gradient, clip = h.sum(0), 0.3
    threshold = clip * gradient.norm()
    jacobian = torch.func.jacrev(lambda g: g * threshold / g.norm())(gradient)
    covariance = 8 * torch.cov(h.T)
    expected = torch.trace(P[:, None] * jacobian @ covariance @ jacobian.T * P).item()
    assert effective_projected(statistics(h), clip) == pytest.approx(expected, rel=1e-10)
    assert effective_projected(statistics(h), 1.0) == statistics(h).trace().value


def test_clip_each_is_the_drafts_pseudocode() -> None:
    """P-NE draft 2: grads = [clip_fn(g) for g in grad_micro_list], then the variance of their mean.

    Micro-batch gradients are longer than their mean, so this reads far below s^2 times the trace.
    """
    h = (MEAN + 3 * SCALE * normal(8, WIDTH, seed=15)) / 8
    threshold = 0.5 * h.sum(0).norm().item()
    clipped = [micro * min(1.0, threshold / (micro.norm().item() + 1e-6)) for micro in 8 * h]
    expected = (P.square() * torch.stack(clipped).var(0)).sum().item() / 8
    assert effective_clipped_each(statistics(h), threshold) == pytest.approx(expected, rel=1e-9)
    assert expected < 0.7 * 0.5**2 * statistics(h).trace().value


@pytest.mark.parametrize("level", [0.8, 0.9, 0.95])
@pytest.mark.parametrize("df", [3, 4, 7, 31, 255, math.inf])
def test_intervals_are_students(level: float, df: float) -> None:
    """Cornish-Fisher against scipy: 0.5 % at worst."""
    low, high = Estimate(5.0, 2.0).interval(level, df)
    quantile = student.ppf((1 + level) / 2, df)
    assert (high - low) / 4 == pytest.approx(quantile, rel=5e-3)
    assert (high + low) / 2 == pytest.approx(5.0)


def test_a_ratio_has_the_delta_methods_error() -> None:
    """Against 200 000 draws of a correlated pair; no quotient over what is 0 or less."""
    covariance = torch.tensor([[0.04, 0.012], [0.012, 0.01]], dtype=torch.float64)
    draws = normal(200_000, 2, seed=16) @ torch.linalg.cholesky(covariance).T
    draws = draws + torch.tensor([6.0, 3.0]).double()
    found = ratio(Estimate(6.0, 0.2), Estimate(3.0, 0.1), covariance=0.012)
    quotients = draws[:, 0] / draws[:, 1]
    assert found.value == 2.0
    assert found.stderr == pytest.approx(quotients.std().item(), rel=0.01)
    for bottom in (0.0, -1.0, math.nan):
        assert math.isnan(ratio(Estimate(1.0, 0.1), Estimate(bottom, 0.1)).value)
    # An overshooting covariance gives no error of nan, an unknown error does.
    assert ratio(Estimate(6.0, 0.2), Estimate(3.0, 0.1), covariance=9.0).stderr == 0.0
    assert math.isnan(ratio(Estimate(6.0, math.nan), Estimate(3.0, 0.1)).stderr)
    assert math.isnan(UNKNOWN.scaled(2).value)
    assert Estimate(2.0, 1.0).scaled(-3) == Estimate(-6.0, 3.0)
    assert float(Estimate(2.0, 1.0)) == 2.0


@pytest.mark.parametrize("estimator", ["micro", "example"])
def test_counted_tokens_are_the_shares_of_a_loss_over_tokens(estimator: str) -> None:
    """meter.count: sum_r |h_r - w_r g|^2 / (1 - sum w_r^2), for micro-batches and for examples."""
    tokens = torch.tensor([1.0, 2.0, 4.0, 9.0])
    shares = tokens.double() / tokens.sum()
    net = nn.Linear(3, 1).double()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    meter = exposure(net, optimizer, every=1, estimator=estimator)
    x = normal(4, 3, seed=17)
    if estimator == "micro":
        for n in range(4):
            meter.count(tokens[n])
            (shares[n] * net(x[n : n + 1]).square().sum()).backward()
    else:
        meter.count(tokens)
        (shares @ net(x).square().squeeze(1)).backward()
    with torch.no_grad():
        inputs = torch.cat([x, torch.ones(4, 1)], 1)
        h = shares[:, None] * 2 * net(x) * inputs
    optimizer.step()
    expected = (h - shares[:, None] * h.sum(0)).square().sum() / (1 - shares.square().sum())
    assert meter.last is not None
    assert meter.last.trace.value == pytest.approx(expected.item(), rel=1e-12)


def test_a_population_scales_the_meters_traces() -> None:
    """Options.population = 32 at B = 8: 1 - 8/32."""
    readings = []
    for population in (None, 32):
        torch.manual_seed(0)
        net = nn.Linear(3, 1).double()
        optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
        meter = exposure(net, optimizer, every=1, **{} if population is None else {"population": population})
        for x in normal(8, 3, seed=18).chunk(4):
            (net(x).square().mean() / 4).backward()
        optimizer.step()
        assert meter.last is not None
        readings.append(meter.last.trace)
    assert readings[1].value == pytest.approx(0.75 * readings[0].value, rel=1e-12)
    assert readings[1].stderr == pytest.approx(0.75 * readings[0].stderr, rel=1e-12)
    assert Options().population is None
