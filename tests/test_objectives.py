"""Laws of the objectives: values against quadrature, gradients that go where they should and nowhere else."""

import dataclasses
import math
from typing import NamedTuple

import pytest
import torch
from torch import Tensor, nn

from energyreg.bases import Lebesgue, Marginal, ProposalBase
from energyreg.energy import EnergyFunction
from energyreg.heads import JointHead, SeparableHead
from energyreg.objectives import (
    ExactMaximumLikelihood,
    MaximumLikelihoodImportanceSampling,
    NCEWithLearnedProposal,
    ProposalNLL,
)
from energyreg.proposals import GaussianMixture, MixtureDensityNetwork

ROWS = 5
SAMPLED = [NCEWithLearnedProposal, MaximumLikelihoodImportanceSampling]


def _generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


class _Parts(NamedTuple):
    encoder: nn.Module
    head: nn.Module
    proposal: MixtureDensityNetwork
    base: Marginal | Lebesgue | ProposalBase
    x: Tensor
    y: Tensor

    def condition(self, detach_context: bool = True) -> tuple[EnergyFunction, GaussianMixture, Tensor]:
        context = self.encoder(self.x)
        q = self.proposal(context.detach() if detach_context else context)
        return EnergyFunction(self.head, context, self.base, q), q, self.y


def _parts(
    dim: int = 1, periodic: tuple[bool, ...] | None = None, base: str = "marginal", head: type = SeparableHead
) -> _Parts:
    """A small model in double precision, away from its start: g varies by about one nat."""
    torch.manual_seed(0)
    targets = torch.randn(200, dim, dtype=torch.float64)
    marginal = Marginal(dim, periodic).double()
    marginal.fit(targets)
    window = Lebesgue(dim, periodic).double()
    window.fit(targets)
    heads = head(4, dim, periodic, width=8, num_frequencies=3, frequency_scale=0.3).double()
    for parameter in heads.parameters():
        if not parameter.any():
            nn.init.normal_(parameter, std=0.3)
    return _Parts(
        nn.Linear(3, 4).double(), heads, MixtureDensityNetwork(4, dim, 3, periodic=periodic, width=8).double(),
        {"marginal": marginal, "lebesgue": window, "proposal": ProposalBase(marginal)}[base],
        torch.randn(ROWS, 3, dtype=torch.float64), targets[:ROWS],
    )  # fmt: skip


def _log_partition(f: EnergyFunction) -> Tensor:
    """By the trapezium rule in model space: equal steps in asinh z on the line, in the angle on a circle."""
    window = f.reference if isinstance(f.reference, Lebesgue) else None
    axes, log_steps = [], []
    points = 20_001 if f.reference.dim == 1 else 401
    for d, angle in enumerate(f.reference.periodic):
        if angle or window:
            low, high = (-math.pi, math.pi) if angle else (window.low[d].item(), window.high[d].item())
            z = low + (torch.arange(points, dtype=torch.float64) + 0.5) / points * (high - low)
            axes.append(z)
            log_steps.append(torch.full_like(z, math.log((high - low) / points)))
        else:
            t = torch.linspace(-5, 5, points, dtype=torch.float64)
            axes.append(t.sinh())
            log_steps.append(t.cosh().log() + math.log(10 / (points - 1)))
    grid = torch.stack(torch.meshgrid(*axes, indexing="ij"), -1).reshape(-1, 1, len(axes))
    steps = torch.stack(torch.meshgrid(*log_steps, indexing="ij"), -1).sum(-1).reshape(-1, 1)
    return (f(grid) + steps).logsumexp(0)


def _gradients(loss: Tensor, module: nn.Module) -> list[Tensor | None]:
    return list(torch.autograd.grad(loss, list(module.parameters()), retain_graph=True, allow_unused=True))


def _close(first: list[Tensor | None], second: list[Tensor | None], rtol: float = 1e-9, atol: float = 1e-12) -> None:
    for a, b in zip(first, second, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            torch.testing.assert_close(a, b, rtol=rtol, atol=atol)


CASES = [
    (1, None, "marginal", SeparableHead),
    (1, None, "marginal", JointHead),
    (1, None, "lebesgue", SeparableHead),
    (1, None, "proposal", SeparableHead),
    (1, (True,), "marginal", SeparableHead),
    (1, (True,), "proposal", JointHead),
    (2, None, "marginal", SeparableHead),
    (2, (False, True), "marginal", JointHead),
]


@pytest.mark.parametrize(("dim", "periodic", "base", "head"), CASES)
def test_exact_maximum_likelihood_is_the_negative_log_likelihood(
    dim: int, periodic: tuple[bool, ...] | None, base: str, head: type
) -> None:
    parts = _parts(dim, periodic, base, head)
    f, _, y = parts.condition()
    # G = 4096 jittered nodes leave a standard error of (Σ d² / 12)^½ / G in one dimension, d being the steps of exp(f
    # - log p₀) from node to node: 2e-5 for the smooth g, 3e-4 for a proposal that is 20 times its reference. Two
    # dimensions: G^-1 times a slope.
    tolerance = 2e-3 if dim == 2 else 1e-3 if base == "proposal" else 1e-4
    loss, diagnostics = ExactMaximumLikelihood(4096, proposal_weight=0.0)(f, None, y, generator=_generator())
    with torch.no_grad():
        log_z = _log_partition(f)
        expected = log_z - f(y)
    assert loss.shape == (ROWS,)
    torch.testing.assert_close(loss.detach(), expected, rtol=0, atol=tolerance)
    torch.testing.assert_close(diagnostics["log_partition"], log_z, rtol=0, atol=tolerance)
    assert expected.std() > 0.01


def test_gradient_of_exact_maximum_likelihood() -> None:
    parts = _parts()
    f, _, y = parts.condition()
    loss = ExactMaximumLikelihood(4096, proposal_weight=0.0)(f, None, y, generator=_generator()).per_example.mean()
    expected = (_log_partition(f) - f(y)).mean()
    _close(_gradients(loss, parts.head), _gradients(expected, parts.head), rtol=1e-3, atol=1e-4)
    _close(_gradients(loss, parts.encoder), _gradients(expected, parts.encoder), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("base", ["marginal", "proposal"])
def test_exact_maximum_likelihood_trains_the_proposal_by_its_own_likelihood(base: str) -> None:
    parts = _parts(base=base)
    f, q, y = parts.condition()
    nll = ProposalNLL()(f, q, y).per_example
    losses = {
        weight: ExactMaximumLikelihood(64, proposal_weight=weight)(f, q, y, generator=_generator()).per_example
        for weight in (0.0, 1.0, 2.5)
    }
    torch.testing.assert_close(losses[2.5] - losses[0.0], 2.5 * nll)
    torch.testing.assert_close(losses[1.0] - losses[0.0], nll)
    # A detached base takes no gradient from the likelihood of f, so all of the proposal's is its own.
    _close(_gradients(losses[2.5].sum(), parts.proposal), _gradients(2.5 * nll.sum(), parts.proposal))


def test_a_base_that_is_not_detached_learns_from_the_likelihood_of_f() -> None:
    parts = _parts(base="proposal")
    parts.base.detach = False
    f, q, y = parts.condition()
    loss = ExactMaximumLikelihood(4096, proposal_weight=0.0)(f, q, y, generator=_generator()).per_example.sum()
    expected = (_log_partition(f) - f(y)).sum()
    _close(_gradients(loss, parts.proposal), _gradients(expected, parts.proposal), rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("kind", SAMPLED)
@pytest.mark.parametrize("base", ["marginal", "proposal"])
def test_no_gradient_of_the_proposals_loss_reaches_the_energy(kind: type, base: str) -> None:
    parts = _parts(base=base)
    f, q, y = parts.condition(detach_context=True)
    light, heavy, other = (
        objective(f, q, y, generator=_generator()).per_example.sum()
        for objective in (
            kind(16, kl_weight=1.0),
            kind(16, kl_weight=7.0, nll_weight=3.0),
            kind(16, kl_weight=0.0, nll_weight=1.0),
        )
    )
    for module in (parts.head, parts.encoder):
        _close(_gradients(light, module), _gradients(heavy, module))
        _close(_gradients(light, module), _gradients(other, module))
        assert any(gradient.abs().sum() > 0 for gradient in _gradients(light, module) if gradient is not None)


@pytest.mark.parametrize("kind", SAMPLED)
@pytest.mark.parametrize("base", ["marginal", "proposal"])
def test_no_gradient_of_the_energys_loss_reaches_the_proposal(kind: type, base: str) -> None:
    parts = _parts(base=base)
    f, q, y = parts.condition()
    once, twice, own, both = (
        objective(f, q, y, generator=_generator()).per_example.sum()
        for objective in (
            kind(16, kl_weight=1.0),
            kind(16, kl_weight=2.0),
            kind(16, kl_weight=0.0, nll_weight=1.0),
            kind(16, kl_weight=1.0, nll_weight=1.0),
        )
    )
    kl = _gradients(once, parts.proposal)
    # Twice the weight, twice the gradient: there is nothing but the weighted term.
    _close([2 * g for g in kl], _gradients(twice, parts.proposal))
    nll = _gradients(-q.log_prob(y).sum(), parts.proposal)
    _close(nll, _gradients(own, parts.proposal))
    _close([a + b for a, b in zip(kl, nll, strict=True)], _gradients(both, parts.proposal))


@pytest.mark.parametrize("kind", SAMPLED)
def test_the_encoder_learns_from_the_proposal_where_the_context_is_attached(kind: type) -> None:
    parts = _parts()
    f, q, y = parts.condition(detach_context=False)
    light, heavy = (
        objective(f, q, y, generator=_generator()).per_example.sum() for objective in (kind(16, 1.0), kind(16, 7.0))
    )
    assert not torch.allclose(_gradients(light, parts.encoder)[0], _gradients(heavy, parts.encoder)[0])
    _close(_gradients(light, parts.head), _gradients(heavy, parts.head))


def test_nce_by_hand() -> None:
    parts = _parts()
    f, q, y = parts.condition()
    samples = q.sample((16,), generator=_generator(), stratified=True)
    with torch.no_grad():
        scores = torch.cat([(f(y) - q.log_prob(y))[None], f(samples) - q.log_prob(samples)])
        nce, log_z = scores.logsumexp(0) - scores[0], scores[1:].logsumexp(0) - math.log(16)
        nll = -q.log_prob(y)
    loss, diagnostics = NCEWithLearnedProposal(16, kl_weight=0.5, nll_weight=2.0)(f, q, y, generator=_generator())
    torch.testing.assert_close(loss.detach(), nce + 2 * nll)  # J_KL gives a gradient, no value
    torch.testing.assert_close(diagnostics["log_partition"], log_z)
    loss, _ = MaximumLikelihoodImportanceSampling(16, kl_weight=0.0, nll_weight=2.0)(f, q, y, generator=_generator())
    torch.testing.assert_close(loss.detach(), log_z - f(y).detach() + 2 * nll)


@pytest.mark.parametrize("kind", SAMPLED)
def test_gradient_of_the_proposals_loss_is_that_of_the_kl(kind: type) -> None:
    # 60 rows that are all alike, each with its own leaf: 60 independent estimates of one gradient.
    repeats, num_samples = 60, 4000
    logits, means = torch.tensor([0.3, -0.2], dtype=torch.float64), torch.tensor([[-0.8], [1.1]], dtype=torch.float64)
    scales = torch.tensor([[1.1], [0.9]], dtype=torch.float64)
    leaves = [t.expand(repeats, *t.shape).clone().requires_grad_() for t in (logits, means, scales)]
    # The energy has lighter tails than q: weights of finite variance.
    narrow = GaussianMixture(-logits[None], 0.7 * means[None], 0.7 * scales[None])

    def energy(rows: int) -> EnergyFunction:
        head = lambda context, v: context + (3 * v[..., 0]).sin()  # noqa: E731
        return EnergyFunction(
            head, torch.zeros(rows, dtype=torch.float64), ProposalBase(Marginal().double()), narrow.expand((rows,))
        )

    f = energy(repeats)
    y = torch.zeros(repeats, 1, dtype=torch.float64)
    loss = kind(num_samples, kl_weight=1.0)(f, GaussianMixture(*leaves), y, generator=_generator()).per_example.sum()
    estimates = torch.cat([g.flatten(1) for g in torch.autograd.grad(loss, leaves)], 1)

    # KL(p || q) = const - ∫ p log q, by the trapezium rule.
    truth = [t[None].clone().requires_grad_() for t in (logits, means, scales)]
    t = torch.linspace(-5, 5, 20_001, dtype=torch.float64)
    z = t.sinh()
    p = (energy(1)(z[:, None, None])[:, 0] + t.cosh().log()).softmax(0)
    kl = -(p * GaussianMixture(*truth).log_prob(z[:, None, None])[:, 0]).sum()
    expected = torch.cat([g.flatten(1) for g in torch.autograd.grad(kl, truth)], 1)[0]
    # The standard error of the mean of the 60 estimates is known to 9 %; the bias, of order 1 / M, is a tenth of it.
    # Four and a half of them for six numbers.
    stderr = estimates.std(0) / math.sqrt(repeats)
    assert ((estimates.mean(0) - expected).abs() < 4.5 * stderr).all()
    # And that says something: the error is small against the gradient itself.
    assert (stderr < 0.05 * expected.norm()).all()


def test_gradient_of_importance_sampling_is_that_of_the_likelihood() -> None:
    parts = _parts(base="proposal")  # the weights are exp g, bounded
    f, q, y = parts.condition()
    objective = MaximumLikelihoodImportanceSampling(2000)
    estimates = torch.stack([
        _gradients(objective(f, q, y, generator=_generator(seed)).per_example.mean(), parts.encoder)[0].flatten()
        for seed in range(40)
    ])  # fmt: skip
    expected = _gradients((_log_partition(f) - f(y)).mean(), parts.encoder)[0].flatten()
    # Twelve numbers, means of 40 estimates with a standard error known to 11 %; the bias, of order 1 / M, is small
    # beside it.
    assert ((estimates.mean(0) - expected).abs() < 5 * estimates.std(0) / math.sqrt(40)).all()


@pytest.mark.parametrize("objective", [ExactMaximumLikelihood(32), *(kind(8) for kind in SAMPLED), ProposalNLL()])
def test_losses_and_diagnostics_are_one_number_per_example(objective: ExactMaximumLikelihood) -> None:
    f, q, y = _parts().condition()
    loss, diagnostics = objective(f, q, y)
    assert loss.shape == (ROWS,)
    assert loss.requires_grad
    for name, value in diagnostics.items():
        assert value.shape == (ROWS,), name
        assert not value.requires_grad, name
        assert value.isfinite().all(), name
    if "effective_sample_size" in diagnostics:
        assert (diagnostics["effective_sample_size"] >= 1).all()


@pytest.mark.parametrize("objective", [ExactMaximumLikelihood(32), *(kind(8) for kind in SAMPLED)])
def test_same_generator_same_loss(objective: ExactMaximumLikelihood) -> None:
    f, q, y = _parts().condition()
    first, second, third = (objective(f, q, y, generator=_generator(seed)).per_example for seed in (0, 0, 1))
    assert torch.equal(first, second)
    assert not torch.equal(first, third)


@pytest.mark.parametrize("objective", [ProposalNLL(), *(kind(8) for kind in SAMPLED)])
def test_an_objective_without_its_proposal_is_refused(objective: ProposalNLL) -> None:
    f, _, y = _parts().condition()
    with pytest.raises(ValueError, match=f"{type(objective).__name__} needs a proposal"):
        objective(f, None, y)


def test_exact_maximum_likelihood_in_three_dimensions_is_refused() -> None:
    parts = _parts(dim=3)
    f, q, y = parts.condition()
    with pytest.raises(ValueError, match="y has 3 dimensions, but quadrature serves at most 2"):
        ExactMaximumLikelihood()(f, q, y)
    for kind in SAMPLED:
        assert kind(8)(f, q, y).per_example.isfinite().all()


@pytest.mark.parametrize("number", [0, -1, 1.5, True])
def test_wrong_counts_are_refused(number: float) -> None:
    with pytest.raises(ValueError, match="num_nodes is"):
        ExactMaximumLikelihood(num_nodes=number)
    for kind in SAMPLED:
        with pytest.raises(ValueError, match="num_samples is"):
            kind(num_samples=number)


@pytest.mark.parametrize("weight", [-0.1, math.nan])
def test_wrong_weights_are_refused(weight: float) -> None:
    with pytest.raises(ValueError, match="proposal_weight is"):
        ExactMaximumLikelihood(proposal_weight=weight)
    for kind in SAMPLED:
        with pytest.raises(ValueError, match="kl_weight is"):
            kind(kl_weight=weight)
        with pytest.raises(ValueError, match="nll_weight is"):
            kind(nll_weight=weight)
        with pytest.raises(ValueError, match="both 0"):
            kind(kl_weight=0.0, nll_weight=0.0)


@pytest.mark.parametrize("kind", [ExactMaximumLikelihood, *SAMPLED, ProposalNLL])
def test_objectives_are_values(kind: type) -> None:
    assert kind() == kind()
    assert hash(kind()) == hash(kind())
    for field in dataclasses.fields(kind):
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(kind(), field.name, 1)
