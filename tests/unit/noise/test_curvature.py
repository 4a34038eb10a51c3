"""Curvature against exact Fishers and Hessians of small models, and the forward-mode probes of "hutchinson".

Statistical bounds are 4.5 standard errors at fixed seeds.
"""

import math
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, hessian, jacrev
from torch.nn.functional import cross_entropy, scaled_dot_product_attention

from gradnoise import exposure
from gradnoise.base.errors import InputError
from gradnoise.noise.curvature import (
    Inputs,
    covariance_probes,
    hessian_trace,
    kfac_diagonal,
    logits_of,
    monte_carlo_fisher,
    weighted_mean,
)

BATCH, LENGTH, WORDS = 6, 4, 5


class Words(nn.Module):
    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.tokens = nn.Embedding(WORDS, 4)
        self.drop = nn.Dropout(dropout)
        self.head = nn.Linear(4, WORDS)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.drop(self.tokens(ids)).tanh())


def words(dropout: float = 0.0) -> tuple[nn.Module, Tensor, dict[Tensor, Tensor]]:
    torch.manual_seed(0)
    net = Words(dropout).double()
    ids = torch.randint(WORDS, (BATCH, LENGTH))
    p = {q: torch.rand_like(q) + 0.5 for q in net.parameters()}
    return net, ids, p


def jacobian(net: nn.Module, *inputs: Tensor) -> tuple[Tensor, Tensor]:
    """Outputs, one row a prediction, and their Jacobian (predictions, outputs, parameters)."""
    values = {name: q.detach() for name, q in net.named_parameters()}

    def outputs(values: dict[str, Tensor]) -> Tensor:
        return functional_call(net, values, inputs).flatten(0, -2)

    found = jacrev(outputs)(values)
    return outputs(values), torch.cat([found[name].flatten(2) for name in values], 2)


def flat(p: dict[Tensor, Tensor]) -> Tensor:
    return torch.cat([value.flatten() for value in p.values()])


def exact_fisher(net: nn.Module, ids: Tensor, p: dict[Tensor, Tensor]) -> float:
    """Mean over predictions of sum_y prob(y) |P grad log prob(y)|^2, every label enumerated."""
    logits, jac = jacobian(net, ids)
    chance = logits.softmax(-1)
    scores = torch.eye(WORDS, dtype=logits.dtype) - chance[:, None]  # (n, label, logit)
    gradients = scores @ jac * flat(p)
    return (chance * gradients.square().sum(-1)).sum(-1).mean().item()


def test_the_monte_carlo_fisher_is_the_exact_one_on_average_and_knows_its_error() -> None:
    """400 label draws over four micro-batches: mean within 4.5 errors of labels enumerated.

    The reported error covers the differences between micro-batches too: at least what labels alone vary.
    """
    net, _, p = words()
    torch.manual_seed(1)
    parts = [torch.randint(WORDS, (2, LENGTH)) for _ in range(4)]
    inputs: list[Inputs] = [((part,), {}) for part in parts]
    found = [monte_carlo_fisher(net, inputs, p, torch.Generator().manual_seed(n)) for n in range(400)]
    values = torch.tensor([f.value for f in found], dtype=torch.float64)
    exact = exact_fisher(net, torch.cat(parts), p)
    assert values.mean().item() == pytest.approx(exact, abs=4.5 * values.std().item() / 20)
    errors = torch.tensor([f.stderr for f in found], dtype=torch.float64)
    assert 0.95 * values.std() < errors.square().mean().sqrt() < 2 * values.std()


def test_micro_batches_of_unequal_size_count_by_their_predictions() -> None:
    net, ids, p = words()
    inputs: list[Inputs] = [((ids[:1],), {}), ((ids[1:],), {})]
    found = [monte_carlo_fisher(net, inputs, p, torch.Generator().manual_seed(n)).value for n in range(400)]
    values, exact = torch.tensor(found, dtype=torch.float64), exact_fisher(net, ids, p)
    assert values.mean().item() == pytest.approx(exact, abs=4.5 * values.std().item() / 20)
    assert weighted_mean([1.0, 4.0], [3.0, 1.0]).value == 1.75
    assert math.isnan(weighted_mean([1.0], [3.0]).stderr)


def test_a_gaussian_likelihood_has_the_jacobians_fisher() -> None:
    """Unit variance: F = mean over predictions of J'J, for half the squared distance."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()
    x = torch.randn(8, 3, dtype=torch.float64)
    p = {q: torch.rand_like(q) + 0.5 for q in net.parameters()}
    _, jac = jacobian(net, x)
    exact = (jac * flat(p)).square().sum().item() / 8
    found = [
        monte_carlo_fisher(net, [((x,), {})], p, torch.Generator().manual_seed(n), "gaussian").value
        for n in range(400)
    ]
    values = torch.tensor(found, dtype=torch.float64)
    assert values.mean().item() == pytest.approx(exact, abs=4.5 * values.std().item() / 20)


def test_kfac_is_exact_for_one_linear_layer_and_gaussian_targets() -> None:
    """Scores do not depend on inputs there: Tr(P F P) = sum_ij P_ij^2 mean(a_j^2) + sum_i P_i^2 (bias)."""
    torch.manual_seed(0)
    net = nn.Linear(3, 2).double()
    x = torch.randn(64, 3, dtype=torch.float64)
    p = {q: torch.rand_like(q) + 0.5 for q in net.parameters()}
    exact = (p[net.weight].square() * x.square().mean(0)).sum() + p[net.bias].square().sum()
    found = [
        kfac_diagonal(net, [((x,), {})], p, torch.Generator().manual_seed(n), "gaussian").value
        for n in range(200)
    ]
    values = torch.tensor(found, dtype=torch.float64)
    assert values.mean().item() == pytest.approx(exact.item(), abs=4.5 * values.std().item() / math.sqrt(200))
    # Far tighter than the Fisher itself from the same labels.
    plain = [
        monte_carlo_fisher(net, [((x,), {})], p, torch.Generator().manual_seed(n), "gaussian").value
        for n in range(50)
    ]
    assert values.std() < 0.3 * torch.tensor(plain).std()


def test_kfac_is_near_the_exact_fisher() -> None:
    """An approximation: within a third here."""
    net, _, p = words()
    torch.manual_seed(2)
    many = torch.randint(WORDS, (64, LENGTH))
    inputs: list[Inputs] = [((many,), {})]
    found = [kfac_diagonal(net, inputs, p, torch.Generator().manual_seed(n)).value for n in range(50)]
    mean = sum(found) / len(found)
    assert mean == pytest.approx(exact_fisher(net, many, p), rel=0.33)
    only = {q: (v if q is net.tokens.weight else torch.zeros_like(v)) for q, v in p.items()}
    part = [kfac_diagonal(net, inputs, only, torch.Generator().manual_seed(n)).value for n in range(50)]
    # One-hot inputs make an embedding's block diagonal: K-FAC errs by the words' differing scores only.
    assert sum(part) / 50 == pytest.approx(exact_fisher(net, many, only), rel=0.2)


def test_kfac_leaves_out_the_padding_row() -> None:
    """It is never trained: v is 0 and P is 1/eps there, which must not carry the figure."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Embedding(WORDS, 4, padding_idx=0), nn.Linear(4, WORDS)).double()
    p = {q: torch.ones_like(q) for q in net.parameters()}
    inputs: list[Inputs] = [((torch.randint(WORDS, (BATCH, LENGTH)),), {})]
    usual = kfac_diagonal(net, inputs, p, torch.Generator().manual_seed(0))
    p[net[0].weight][0] = 1e8  # type: ignore[index]
    assert kfac_diagonal(net, inputs, p, torch.Generator().manual_seed(0)) == usual


def test_kfac_refuses_unknown_layers_by_name_and_leaves_no_hook() -> None:
    net = nn.Sequential(nn.Linear(3, 3), nn.PReLU())
    p = {q: torch.ones_like(q) for q in net.parameters()}
    with pytest.raises(InputError, match="1 \\(PReLU\\)"):
        kfac_diagonal(net, [((torch.randn(4, 3),), {})], p, torch.Generator())
    assert not any(module._forward_hooks for module in net.modules())


def loss_of(ids: Tensor) -> Callable[[Callable[..., Any]], Tensor]:
    """Cross-entropy of each example's next words, from the model or its stand-in."""

    def losses(model: Callable[..., Any]) -> Tensor:
        targets = ids.roll(1, 1)
        return (
            cross_entropy(model(ids).flatten(0, 1), targets.flatten(), reduction="none")
            .view(ids.shape)
            .mean(1)
        )

    return losses


def explicit_hessian(net: nn.Module, losses: Callable[[Callable[..., Any]], Tensor]) -> Tensor:
    shapes = {name: q.shape for name, q in net.named_parameters()}

    def mean(vector: Tensor) -> Tensor:
        parts = vector.split([shape.numel() for shape in shapes.values()])
        values = {n: part.view(shape) for (n, shape), part in zip(shapes.items(), parts, strict=True)}
        return losses(lambda *args: functional_call(net, values, args)).mean()

    return hessian(mean)(torch.cat([q.detach().flatten() for q in net.parameters()]))


def test_the_hessians_trace_is_that_of_the_explicit_matrix() -> None:
    """400 probes within 4.5 of their own error; its variance is 2 sum of squares off the diagonal."""
    net, ids, p = words()
    losses = loss_of(ids)
    matrix = flat(p)[:, None] * explicit_hessian(net, losses) * flat(p)
    found = hessian_trace(net, losses, p, torch.Generator().manual_seed(0), probes=400)
    assert found.value == pytest.approx(matrix.trace().item(), abs=4.5 * found.stderr)
    off = matrix - matrix.diagonal().diag()
    assert found.stderr == pytest.approx((2 * off.square().sum() / 400).sqrt().item(), rel=0.15)


def test_a_diagonal_hessian_needs_one_probe_and_may_be_negative() -> None:
    net = nn.Linear(3, 1, bias=False).double()
    p = {net.weight: torch.full_like(net.weight, 2.0)}
    found = hessian_trace(net, lambda _: -net.weight.square().sum(1), p, torch.Generator(), probes=2)
    assert found.value == pytest.approx(-2 * 4 * 3, rel=1e-12)
    assert found.stderr == pytest.approx(0.0, abs=1e-12)


def test_parameters_without_curvature_are_no_obstacle_to_the_hessian() -> None:
    """One that the loss does not use, and one that it uses linearly."""
    net = nn.ModuleDict({"used": nn.Linear(2, 2), "idle": nn.Linear(2, 2), "straight": nn.Linear(2, 2)})
    p = {q: torch.ones_like(q) for q in net.parameters()}

    def losses(_: object) -> Tensor:
        return net["used"].weight.square().sum(1) + net["straight"].weight.sum(1)

    found = hessian_trace(nn.Module(), losses, p, torch.Generator(), probes=2)
    assert found.value == pytest.approx(4.0)


@pytest.mark.parametrize("kind", ["mc_fisher", "kfac", "hessian", "probes"])
def test_extra_passes_move_neither_random_numbers_nor_gradients(kind: str) -> None:
    """With dropout, which draws from the global state; gradients of the run stay as they are."""
    net, ids, p = words(dropout=0.5)
    loss_of(ids)(net).mean().backward()
    gradients = [q.grad.clone() for q in net.parameters() if q.grad is not None]
    state, draw = torch.random.get_rng_state(), torch.Generator().manual_seed(0)
    inputs: list[Inputs] = [((ids,), {})]
    if kind == "mc_fisher":
        monte_carlo_fisher(net, inputs, p, draw)
    elif kind == "kfac":
        kfac_diagonal(net, inputs, p, draw)
    elif kind == "hessian":
        hessian_trace(net, loss_of(ids), p, draw)
    else:
        covariance_probes(net, loss_of(ids), p, draw, 2)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert all(torch.equal(q.grad, g) for q, g in zip(net.parameters(), gradients, strict=True))  # type: ignore[arg-type]
    assert not any(module._forward_hooks for module in net.modules())


@pytest.mark.parametrize("kind", ["mc_fisher", "hessian", "probes"])
def test_extra_passes_do_not_move_running_statistics(kind: str) -> None:
    net = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2)).double()
    x, p = torch.randn(8, 3, dtype=torch.float64), {q: torch.ones_like(q) for q in net.parameters()}
    before = [buffer.clone() for buffer in net.buffers()]

    def losses(model: Callable[..., Any]) -> Tensor:
        return model(x).square().sum(1)

    if kind == "mc_fisher":
        monte_carlo_fisher(net, [((x,), {})], p, torch.Generator())
    elif kind == "hessian":
        hessian_trace(net, losses, p, torch.Generator())
    else:
        covariance_probes(net, losses, p, torch.Generator(), 2)
    assert all(torch.equal(a, b) for a, b in zip(net.buffers(), before, strict=True))


def test_inputs_of_t_rows_are_not_cut_like_examples() -> None:
    """T = B: positions (T,) beside tokens (B, T). No halves, so no error, but the value is right."""

    class Placed(Words):
        def forward(self, ids: Tensor, places: Tensor | None = None) -> Tensor:
            assert places is not None
            return self.head((self.tokens(ids) + self.tokens(places)).tanh())

    torch.manual_seed(0)
    net = Placed().double()
    ids = torch.randint(WORDS, (LENGTH, LENGTH))
    p = {q: torch.ones_like(q) for q in net.parameters()}
    inputs: list[Inputs] = [((ids, torch.arange(LENGTH)), {})]
    found = [monte_carlo_fisher(net, inputs, p, torch.Generator().manual_seed(n)) for n in range(200)]
    assert all(math.isnan(f.stderr) for f in found)
    assert sum(f.value for f in found) / 200 == pytest.approx(
        monte_carlo_fisher(net, inputs * 200, p, torch.Generator().manual_seed(9)).value, rel=0.15
    )


def test_logits_are_found_in_what_models_return() -> None:
    class Output:
        logits = torch.ones(2)

    assert torch.equal(logits_of(Output()), Output.logits)
    assert torch.equal(logits_of((Output.logits, None)), Output.logits)
    with pytest.raises(InputError, match="logits="):
        logits_of({"scores": Output.logits})


def reading(curvature: str, **options: Any) -> Any:
    """One AdamW update of the words model by examples."""
    net, ids, _ = words()
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-2, eps=1e-3)
    meter = exposure(
        net, optimizer, every=1, estimator="example", curvature=curvature, losses=loss_of(ids), **options
    )
    loss_of(ids)(net).mean().backward()
    optimizer.step()
    assert meter.last is not None
    return meter.last


@pytest.mark.parametrize("curvature", ["mc_fisher", "kfac", "hessian"])
def test_labels_and_probes_follow_the_seed(curvature: str) -> None:
    """The same seed draws the same, another seed something else (not only its low bits count)."""
    first, again, other = (reading(curvature, seed=seed).curvature for seed in (0, 0, 1))
    assert first == again
    assert first.value != other.value


@pytest.mark.parametrize("curvature", ["mc_fisher", "kfac", "hessian"])
def test_the_unit_of_the_fisher_is_a_factor_of_the_length(curvature: str) -> None:
    """F_token = T F_sequence; P-NE* is divided by F, so it grows by T."""
    token, sequence = (reading(curvature, fisher_unit=unit) for unit in ("token", "sequence"))
    assert token.curvature.value == pytest.approx(LENGTH * sequence.curvature.value, rel=1e-12)
    if token.curvature.value > 0:
        assert sequence.pne_star.value == pytest.approx(LENGTH * token.pne_star.value, rel=1e-12)
        star = 1e-2 * token.trace.value / token.curvature.value
        assert token.pne_star.value == pytest.approx(star, rel=1e-12)


def test_a_classifier_of_sequences_makes_one_prediction_each() -> None:
    """T tokens in, one label out: F_token and F_sequence are the same, and the empirical Fisher has no T."""

    class Classifier(Words):
        def forward(self, ids: Tensor) -> Tensor:
            return self.head(self.tokens(ids).mean(1).tanh())

    found = {}
    for curvature in ("mc_fisher", "empirical_fisher"):
        for unit in ("token", "sequence"):
            torch.manual_seed(0)
            net, ids = Classifier().double(), torch.randint(WORDS, (256, LENGTH))
            optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
            meter = exposure(
                net, optimizer, every=1, estimator="example", curvature=curvature, fisher_unit=unit
            )
            # Labels from the model itself: then the empirical Fisher is the Fisher.
            labels = torch.distributions.Categorical(logits=net(ids)).sample()
            cross_entropy(net(ids), labels).backward()
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                optimizer.step()
            assert meter.last is not None
            found[curvature, unit] = meter.last.curvature
    for curvature in ("mc_fisher", "empirical_fisher"):
        assert found[curvature, "token"] == found[curvature, "sequence"]
    exact = exact_fisher(net, ids, {q: torch.ones_like(q) for q in net.parameters()})
    empirical = found["empirical_fisher", "token"]
    assert empirical.value == pytest.approx(exact, rel=0.35)  # lr 0.1 has moved the model since


def test_the_empirical_fisher_is_a_tautology_and_warned_of() -> None:
    """Finding 3: F_emp = C + g g', so rho = Tr(PCP) / Tr(P F_sequence P) is about 1: eta/B is logged.

    Closed form: Tr(P F P) = mean_b |P g_b|^2 = (B - 1) Tr(P C/B P) + |P g|^2.
    """
    with pytest.warns(UserWarning, match="P-NE. logs eta/B"):
        found = reading("empirical_fisher", fisher_unit="sequence", p="step")
    rho = BATCH * found.trace.value / found.curvature.value
    # The signal's share of the second moment is all that keeps it from 1.
    assert 0.75 < rho < 1.25
    assert found.pne_star.value == pytest.approx(1e-2 / BATCH * rho, rel=1e-12)


class Attention(nn.Module):
    """Fused attention and a layer of a kind that no hook knows."""

    class Scale(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.by = nn.Parameter(torch.linspace(0.5, 1.5, 8))

        def forward(self, x: Tensor) -> Tensor:
            return x * self.by

    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.mix, self.scale = nn.Embedding(WORDS, 8), nn.Linear(8, 24), self.Scale()
        self.head = nn.Linear(8, WORDS)

    def forward(self, ids: Tensor) -> Tensor:
        q, k, v = self.mix(self.tokens(ids)).unflatten(-1, (3, 2, 4)).permute(2, 0, 3, 1, 4)
        mixed = scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)
        return self.head(self.scale(mixed))


def examples_of(net: nn.Module, ids: Tensor) -> Tensor:
    """(B, D) gradients of single examples, one backward() each."""
    rows = []
    for n in range(len(ids)):
        gradients = torch.autograd.grad(loss_of(ids[n : n + 1])(net).sum(), list(net.parameters()))
        rows.append(torch.cat([g.flatten() for g in gradients]))
    return torch.stack(rows)


def test_probes_vary_over_examples_as_their_gradients_do() -> None:
    """E_z Var_b(g_b' P z) = Tr(P C P): 600 probes through attention and an unknown layer."""
    torch.manual_seed(0)
    net = Attention().double()
    ids = torch.randint(WORDS, (BATCH, LENGTH))
    p = {q: torch.rand_like(q) + 0.5 for q in net.parameters()}
    rows = covariance_probes(net, loss_of(ids), p, torch.Generator().manual_seed(0), 600)
    values = rows.var(1)
    exact = (examples_of(net, ids) * flat(p)).var(0).sum().item()
    assert values.mean().item() == pytest.approx(exact, abs=4.5 * values.std().item() / math.sqrt(600))


def attention_reading(estimator: str, **options: Any) -> Any:
    """One AdamW update of `Attention` on the same 16 sequences."""
    torch.manual_seed(0)
    net = Attention().double()
    ids = torch.randint(WORDS, (16, LENGTH))
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-2, eps=1e-3)
    meter = exposure(net, optimizer, every=1, estimator=estimator, losses=loss_of(ids), p="step", **options)
    for part in ids.chunk(16 if estimator == "micro" else 1):
        (loss_of(part)(net).mean() * len(part) / 16).backward()
    optimizer.step()
    return meter.last


def test_hutchinson_agrees_with_single_examples_within_its_error() -> None:
    """On a model that "example" refuses: 60 draws of 4 probes on the same update, against micro-batches of
    one sequence each. Their mean is exact, and the reported error covers what draws vary by."""
    with pytest.raises(InputError, match="scale \\(Scale\\)"):
        attention_reading("example")
    exact = attention_reading("micro")
    found = [attention_reading("hutchinson", probes=4, seed=n) for n in range(60)]
    assert found[0].contributions == 16
    assert found[0].preconditioner == "step"
    for name in ("trace", "trace_c"):
        values = torch.tensor([getattr(f, name).value for f in found], dtype=torch.float64)
        errors = torch.tensor([getattr(f, name).stderr for f in found], dtype=torch.float64)
        truth = getattr(exact, name)
        error = values.std().item() / math.sqrt(60)
        assert values.mean().item() == pytest.approx(truth.value, abs=4.5 * error)
        # Both the probes' and the examples' part are in it.
        expected = math.sqrt(values.var().item() + truth.stderr**2)
        assert errors.square().mean().sqrt().item() == pytest.approx(expected, rel=0.35)
