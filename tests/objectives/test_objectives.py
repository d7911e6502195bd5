"""Laws of the objectives: values against quadrature, gradients that go where they should and nowhere else."""

import dataclasses
import math
from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.distributions import Distribution

from energyreg.densities.bases import Lebesgue, Marginal, ProposalBase
from energyreg.densities.mixtures import GaussianMixture
from energyreg.densities.noise import GaussianNoise
from energyreg.inference.energy import EnergyFunction
from energyreg.networks.heads import JointHead, SeparableHead
from energyreg.networks.proposals import MixtureDensityNetwork
from energyreg.objectives import (
    NCE,
    DenoisingScoreMatching,
    ExactMaximumLikelihood,
    KLDImportanceSampling,
    MaximumLikelihoodImportanceSampling,
    MaximumLikelihoodMCMC,
    MaximumLikelihoodWithLearnedProposal,
    NCEWithLearnedProposal,
    NonFiniteLossError,
    ProposalKL,
    ProposalNLL,
    ScoreMatching,
    SelfNormalisedLikelihood,
)
from energyreg.objectives.contract import as_loss

ROWS = 5
SAMPLED = [NCEWithLearnedProposal, MaximumLikelihoodWithLearnedProposal]


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


@cache  # no test changes them
def _references(dim: int, periodic: tuple[bool, ...] | None) -> tuple[Marginal, Lebesgue]:
    torch.manual_seed(0)
    targets = torch.randn(200, dim, dtype=torch.float64)
    marginal, window = Marginal(dim, periodic).double(), Lebesgue(dim, periodic).double()
    marginal.fit(targets)
    window.fit(targets)
    return marginal, window


def _parts(
    dim: int = 1, periodic: tuple[bool, ...] | None = None, base: str = "marginal", head: type = SeparableHead
) -> _Parts:
    """A small model in double precision, away from its start: g varies by about one nat."""
    marginal, window = _references(dim, periodic)
    torch.manual_seed(0)
    targets = torch.randn(200, dim, dtype=torch.float64)
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
    loss, _ = MaximumLikelihoodWithLearnedProposal(16, kl_weight=0.0, nll_weight=2.0)(f, q, y, generator=_generator())
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
    objective = MaximumLikelihoodWithLearnedProposal(2000)
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


def test_exact_maximum_likelihood_in_three_dimensions_is_refused() -> None:
    parts = _parts(dim=3)
    f, q, y = parts.condition()
    with pytest.raises(ValueError, match="y has 3 dimensions, but quadrature serves at most 2"):
        ExactMaximumLikelihood()(f, q, y)
    for kind in SAMPLED:
        assert kind(8)(f, q, y).per_example.isfinite().all()


# Every objective ----------------------------------------------------------------------------------------------------

NOISE = GaussianNoise([0.3, 1.5])
MAKE: dict[str, Callable[..., Any]] = {
    "ML-IS": lambda **a: MaximumLikelihoodImportanceSampling(NOISE, 8, **a),
    "KLD-IS": lambda **a: KLDImportanceSampling(NOISE, 0.2, 8, **a),
    "KLD-IS, plain": lambda **a: KLDImportanceSampling(NOISE, 0.2, 8, self_normalised=False, **a),
    "NCE": lambda **a: NCE(NOISE, 8, **a),
    "NCE+": lambda **a: NCE(NOISE, 8, beta=0.1, **a),
    "ML-MCMC": lambda **a: MaximumLikelihoodMCMC(3, 0.1, 4, **a),
    "SM": lambda **a: ScoreMatching(**a),
    "SM, probes": lambda **a: ScoreMatching(2, **a),
    "DSM": lambda **a: DenoisingScoreMatching(0.2, 4, **a),
}
"""Those that do without a proposal, and take a proposal_weight."""

JOINT: dict[str, Callable[..., Any]] = {
    "NCE, proposal": lambda **a: NCEWithLearnedProposal(8, **a),
    "ML-IS, proposal": lambda **a: MaximumLikelihoodWithLearnedProposal(8, **a),
    "SNL": lambda **a: SelfNormalisedLikelihood(8, **a),
}
OBJECTIVES = {**{name: make() for name, make in (MAKE | JOINT).items()}, "J_KL": ProposalKL(8)}
SPACES = [(1, None), (1, (True,)), (2, None), (2, (False, True)), (3, None)]


def _with_angles(objective: Any, periodic: tuple[bool, ...] | None) -> Any:
    """The same objective with noise that knows which dimensions are angles."""
    if periodic is None or not hasattr(objective, "noise"):
        return objective
    return dataclasses.replace(objective, noise=dataclasses.replace(objective.noise, periodic=periodic))


@pytest.mark.parametrize("name", OBJECTIVES)
@pytest.mark.parametrize("base", ["marginal", "lebesgue", "proposal"])
@pytest.mark.parametrize("head", [SeparableHead, JointHead])
@pytest.mark.parametrize(("dim", "periodic"), SPACES)
def test_every_objective_trains_every_model(
    name: str, base: str, head: type, dim: int, periodic: tuple[bool, ...] | None
) -> None:
    objective = _with_angles(OBJECTIVES[name], periodic)
    parts = _parts(dim, periodic, base, head)
    f, q, y = parts.condition()
    loss, diagnostics = objective(f, q, y, generator=_generator())
    assert loss.shape == (ROWS,) and loss.isfinite().all()
    for key, value in diagnostics.items():
        assert value.shape == (ROWS,) and not value.requires_grad, key
    again = objective(f, q, y, generator=_generator()).per_example
    assert torch.equal(loss, again)
    module = parts.proposal if name == "J_KL" else parts.head
    gradients = [
        torch.zeros_like(parameter) if gradient is None else gradient
        for parameter, gradient in zip(module.parameters(), _gradients(loss.sum(), module), strict=True)
    ]
    assert all(gradient.isfinite().all() for gradient in gradients)
    silent = {
        key
        for (key, _), gradient in zip(module.named_parameters(), gradients, strict=True)
        if not gradient.abs().sum() > 0
    }
    # All learn, but for two kinds: an angle has whole harmonics in place of frequencies, and a constant of f has no
    # derivative in y.
    unused = {"target_map.0.frequencies"} if periodic and all(periodic) else set()
    constant = {"target_map.5.bias"} if name in ("SM", "SM, probes", "DSM") else set()
    assert silent <= unused | constant
    # One step of the optimiser along the gradient lowers the loss of the same samples.
    step = 1e-3 / sum(gradient.square().sum() for gradient in gradients).sqrt()
    with torch.no_grad():
        for parameter, gradient in zip(module.parameters(), gradients, strict=True):
            parameter -= step * gradient
    if name != "J_KL":  # its value is no J_KL
        f, q, y = parts.condition()
        assert objective(f, q, y, generator=_generator()).per_example.sum() < loss.sum()


@pytest.mark.parametrize("name", MAKE)
@pytest.mark.parametrize("base", ["marginal", "proposal"])
def test_proposal_weight_adds_the_proposals_likelihood_and_nothing_else(name: str, base: str) -> None:
    parts = _parts(base=base)
    f, q, y = parts.condition()
    alone, weighted = (
        MAKE[name](proposal_weight=weight)(f, q, y, generator=_generator()).per_example for weight in (0.0, 2.5)
    )
    nll = -q.log_prob(y)
    torch.testing.assert_close(weighted - alone, 2.5 * nll)
    # The proposal learns from that alone, also where it is the (detached) base of f.
    assert all(gradient is None for gradient in _gradients(alone.sum(), parts.proposal))
    _close(_gradients(weighted.sum(), parts.proposal), _gradients(2.5 * nll.sum(), parts.proposal))
    _close(_gradients(weighted.sum(), parts.head), _gradients(alone.sum(), parts.head))
    # Without a proposal there is nothing to add.
    if base == "marginal":
        none = MAKE[name](proposal_weight=2.5)(f, None, y, generator=_generator()).per_example
        torch.testing.assert_close(none, alone)


@pytest.mark.parametrize("base", ["marginal", "proposal"])
def test_self_normalised_likelihood_keeps_energy_and_proposal_apart(base: str) -> None:
    parts = _parts(base=base)
    f, q, y = parts.condition()
    by_nll, by_kl, by_both = (
        SelfNormalisedLikelihood(16, kl_weight=kl, nll_weight=nll)(f, q, y, generator=_generator()).per_example.sum()
        for kl, nll in ((0.0, 1.0), (2.0, 0.0), (2.0, 3.0))
    )
    for module in (parts.head, parts.encoder):
        _close(_gradients(by_nll, module), _gradients(by_kl, module))
        _close(_gradients(by_nll, module), _gradients(by_both, module))
    own = _gradients(-q.log_prob(y).sum(), parts.proposal)
    _close(_gradients(by_nll, parts.proposal), own)
    kl = _gradients(by_kl, parts.proposal)
    _close(_gradients(by_both, parts.proposal), [k + 3 * n for k, n in zip(kl, own, strict=True)])
    samples = q.sample((16,), generator=_generator(), stratified=True)
    weights = (f(samples) - q.log_prob(samples)).detach().softmax(0)
    by_hand = _gradients(-2 * (weights * q.log_prob(samples)).sum(), parts.proposal)
    _close(kl, by_hand)


@pytest.mark.parametrize("base", ["marginal", "proposal"])
def test_proposal_kl_leaves_the_energy_alone(base: str) -> None:
    parts = _parts(base=base)
    f, q, y = parts.condition(detach_context=True)
    loss, _ = ProposalKL(16)(f, q, y, generator=_generator())
    assert all(gradient is None for gradient in _gradients(loss.sum(), parts.head))
    assert all(gradient is None for gradient in _gradients(loss.sum(), parts.encoder))
    samples = q.sample((16,), generator=_generator(), stratified=True)
    log_weights = (f(samples) - q.log_prob(samples)).detach().log_softmax(0)
    expected = _gradients(-(log_weights.exp() * q.log_prob(samples)).sum(), parts.proposal)
    _close(_gradients(loss.sum(), parts.proposal), expected)
    # Its value is Σ w log(M w), between 0 for equal weights and log M for one.
    torch.testing.assert_close(loss.detach(), (log_weights.exp() * (log_weights + math.log(16))).sum(0))
    torch.testing.assert_close(
        ProposalKL(16)(lambda y: q.log_prob(y) + 7, q, y).per_example.detach(), torch.zeros(ROWS, dtype=torch.float64)
    )


def test_self_normalised_likelihood_is_above_importance_sampling_with_the_same_samples() -> None:
    f, q, y = _parts().condition()
    for kl, nll in ((0.0, 1.0), (1.0, 0.0)):
        weights = {"kl_weight": kl, "nll_weight": nll}
        upper = SelfNormalisedLikelihood(8, **weights)(f, q, y, generator=_generator()).per_example
        lower = MaximumLikelihoodWithLearnedProposal(8, **weights)(f, q, y, generator=_generator()).per_example
        assert (upper >= lower).all()


@pytest.mark.parametrize("name", [name for name in MAKE if name.startswith("NCE") or "IS" in name])
def test_objectives_with_noise_by_hand(name: str) -> None:
    f, _, y = _parts().condition()
    objective = MAKE[name]()
    loss = objective(f, None, y, generator=_generator()).per_example.detach()
    generator = _generator()
    samples = NOISE.sample(y, 8, generator=generator)
    with torch.no_grad():
        log_weights = f(samples) - NOISE(y).log_prob(samples)
        log_z = log_weights.logsumexp(0) - math.log(8)
        if name == "ML-IS":
            expected = log_z - f(y)
        elif name.startswith("NCE"):
            positive = y
            if name == "NCE+":
                near = GaussianNoise([0.03, 0.15], stratified=False)
                (positive,) = near.sample(y, 1, generator=generator)
                assert (positive != y).all()
            scores = torch.cat([(f(positive) - NOISE(y).log_prob(positive))[None], log_weights])
            expected = scores.logsumexp(0) - scores[0]
        else:
            label = torch.distributions.Normal(y[:, 0], 0.2).log_prob(samples[..., 0])
            ratio = label - NOISE(y).log_prob(samples)
            weights = ratio.exp() / 8 if name.endswith("plain") else ratio.softmax(0)
            expected = log_z - (weights * f(samples)).sum(0)
    torch.testing.assert_close(loss, expected)


# Gradients of f in y ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("base", ["marginal", "lebesgue"])
@pytest.mark.parametrize("head", [SeparableHead, JointHead])
@pytest.mark.parametrize("dim", [1, 2, 3])
def test_score_matching_against_finite_differences(base: str, head: type, dim: int) -> None:
    f, _, y = _parts(dim, None, base, head).condition()
    loss, diagnostics = ScoreMatching()(f, None, y)
    step, trace = 1e-4, torch.zeros(ROWS, dtype=torch.float64)
    score = torch.zeros(ROWS, dim, dtype=torch.float64)
    with torch.no_grad():
        for d in range(dim):
            shift = step * torch.eye(dim, dtype=torch.float64)[d]
            above, here, below = f(y + shift), f(y), f(y - shift)
            score[:, d] = (above - below) / (2 * step)
            trace += (above - 2 * here + below) / step**2
    # Rounding leaves 1e-15 / 1e-8 = 1e-7 times |f|; the differences are exact up to 1e-8 times a fourth derivative,
    # which the marginal's table, cubic between knots, has in jumps of its own: its second derivative is linear there.
    torch.testing.assert_close(loss.detach(), trace + score.square().sum(-1) / 2, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(diagnostics["score_norm"], score.norm(dim=-1), rtol=1e-5, atol=1e-5)


def test_score_matching_and_its_probes_on_a_gaussian() -> None:
    # f = -½ yᵀ A y: score -A y, trace -tr A.
    generator = _generator()
    root = torch.randn(3, 3, generator=generator, dtype=torch.float64)
    matrix, y = root @ root.T, torch.randn(4000, 3, generator=generator, dtype=torch.float64)
    expected = (y @ matrix).square().sum(-1) / 2 - matrix.trace()
    torch.testing.assert_close(
        ScoreMatching()(lambda y: -((y @ matrix) * y).sum(-1) / 2, None, y).per_example, expected
    )
    # One probe of signs in each row: right in the mean, with the variance of what is off the diagonal alone.
    probed = ScoreMatching(1)(lambda y: -((y @ matrix) * y).sum(-1) / 2, None, y, generator=generator).per_example
    error = probed - expected
    assert abs(error.mean()) < 4 * error.std() / math.sqrt(len(y))
    off = matrix - matrix.diag().diag()
    # The relative error of a variance from 4,000 numbers with a kurtosis of some 2 is below 3 %; four of these.
    assert error.var().item() == pytest.approx(2 * off.square().sum().item(), rel=0.12)
    more = ScoreMatching(16)(lambda y: -((y @ matrix) * y).sum(-1) / 2, None, y, generator=generator).per_example
    assert (more - expected).var().item() == pytest.approx(error.var().item() / 16, rel=0.25)
    # A diagonal Hessian leaves nothing to chance.
    diagonal = lambda y: -(y**4 @ matrix.diag()) / 12  # noqa: E731
    exact, probed = (ScoreMatching(n)(diagonal, None, y, generator=generator).per_example for n in (None, 1))
    torch.testing.assert_close(probed, exact)


@pytest.mark.parametrize("objective", [ScoreMatching(), ScoreMatching(2), DenoisingScoreMatching(0.2, 4)])
def test_objectives_of_the_gradient_ask_nothing_of_f_but_a_gradient(objective: ScoreMatching) -> None:
    # A straight line has a score, and no second derivative.
    slope = torch.tensor([2.0, -1.0], dtype=torch.float64, requires_grad=True)
    y = torch.randn(ROWS, 2, dtype=torch.float64)
    loss = objective(lambda y: y @ slope, None, y, generator=_generator()).per_example
    if isinstance(objective, ScoreMatching):
        torch.testing.assert_close(loss.detach(), torch.full((ROWS,), 2.5, dtype=torch.float64))
    (gradient,) = torch.autograd.grad(loss.sum(), slope)
    assert gradient.isfinite().all()


def test_objectives_of_the_gradient_work_where_gradients_are_off() -> None:
    f, _, y = _parts().condition()
    for name in ("SM", "SM, probes", "DSM", "ML-MCMC"):
        objective = MAKE[name]()
        expected = objective(f, None, y, generator=_generator()).per_example.detach()
        with torch.no_grad():
            loss = objective(f, None, y, generator=_generator()).per_example
        torch.testing.assert_close(loss.detach(), expected)


def test_denoising_score_matching_by_hand() -> None:
    parts = _parts(2)
    f, _, y = parts.condition()
    for scale in (0.3, [0.3, 0.1]):
        loss = DenoisingScoreMatching(scale, 4)(f, None, y, generator=_generator()).per_example
        noise = torch.randn(4, ROWS, 2, generator=_generator(), dtype=torch.float64)
        sigma = torch.tensor(scale, dtype=torch.float64)
        points = (y + sigma * noise).requires_grad_()
        (score,) = torch.autograd.grad(f(points).sum(), points)
        expected = (score + noise / sigma).square().sum(-1).mean(0)
        torch.testing.assert_close(loss.detach(), expected)


def test_denoising_score_matching_goes_around_a_circle() -> None:
    # Beside the seam, half of the noisy targets are beyond it: there f is that of the same angle on the other side.
    parts = _parts(1, (True,), "lebesgue", JointHead)
    f, _, _ = parts.condition()
    y = torch.full((ROWS, 1), math.pi - 0.01, dtype=torch.float64)
    noise = torch.randn(64, ROWS, 1, generator=_generator(), dtype=torch.float64)
    points = torch.remainder(y + 0.3 * noise + math.pi, 2 * math.pi) - math.pi
    points.requires_grad_()
    (score,) = torch.autograd.grad(f(points).sum(), points)
    expected = (score + noise / 0.3).square().sum(-1).mean(0)
    loss = DenoisingScoreMatching(0.3, 64)(f, None, y, generator=_generator()).per_example
    torch.testing.assert_close(loss.detach(), expected)


def test_chains_start_at_the_target_and_carry_no_gradient() -> None:
    parts = _parts()
    f, _, y = parts.condition()
    # Steps that go nowhere: no contrast.
    loss = MaximumLikelihoodMCMC(5, 1e-12, 4)(f, None, y).per_example
    assert loss.abs().max() < 1e-9
    # The gradient is that at fixed samples.
    loss = MaximumLikelihoodMCMC(1, 0.3, 4)(f, None, y, generator=_generator()).per_example
    leaf = y.clone().requires_grad_()
    (score,) = torch.autograd.grad(f(leaf).sum(), leaf)
    noise = torch.randn(4, ROWS, 1, generator=_generator(), dtype=torch.float64)
    samples = y + 0.3**2 / 2 * score + 0.3 * noise
    expected = f(samples).mean(0) - f(y)
    torch.testing.assert_close(loss, expected)
    _close(_gradients(loss.sum(), parts.head), _gradients(expected.sum(), parts.head))


# Bad input, and losses that are not finite --------------------------------------------------------------------------


COUNTS: list[tuple[Callable[[Any], Any], str]] = [
    (ExactMaximumLikelihood, "num_nodes"),
    *((kind, "num_samples") for kind in (*SAMPLED, ProposalKL, SelfNormalisedLikelihood)),
    (lambda n: MaximumLikelihoodImportanceSampling(NOISE, n), "num_samples"),
    (lambda n: KLDImportanceSampling(NOISE, 0.1, n), "num_samples"),
    (lambda n: NCE(NOISE, n), "num_samples"),
    (lambda n: DenoisingScoreMatching(0.1, n), "num_samples"),
    (lambda n: MaximumLikelihoodMCMC(n, 0.1), "num_steps"),
    (lambda n: MaximumLikelihoodMCMC(1, 0.1, n), "num_chains"),
    (ScoreMatching, "num_probes"),
]
SCALES: list[tuple[Callable[[Any], Any], str]] = [
    (lambda s: KLDImportanceSampling(NOISE, s), "label_scale"),
    (DenoisingScoreMatching, "scale"),
    (lambda s: MaximumLikelihoodMCMC(1, s), "step_size"),
]
WEIGHTS: list[tuple[Callable[[Any], Any], str]] = [
    *((make, "proposal_weight") for make in (ExactMaximumLikelihood, *MAKE.values())),
    *((kind, name) for kind in (*SAMPLED, SelfNormalisedLikelihood) for name in ("kl_weight", "nll_weight")),
    (lambda w: NCE(NOISE, beta=w), "beta"),
]
REFUSED = [
    ("counts", COUNTS, [0, -1, 1.5, 2.0, True, "3", None, math.nan]),
    ("scales", SCALES, [0.0, -0.1, math.nan, math.inf, [], [0.1, 0.0], [0.1, math.nan], [[0.1]]]),
    ("weights", WEIGHTS, [-0.1, math.nan, math.inf]),
]


@pytest.mark.parametrize(
    ("makes", "value"), [pytest.param(m, v, id=f"{what}-{v}") for what, m, values in REFUSED for v in values]
)
def test_wrong_numbers_of_every_objective_are_refused(makes: list[tuple[Any, str]], value: Any) -> None:
    for make, field in makes:
        if field == "num_probes" and value is None:
            continue  # the exact trace
        by_name = isinstance(make, type) or field == "proposal_weight"
        with pytest.raises(ValueError, match=f"{field} is"):
            make(**{field: value}) if by_name else make(value)


@pytest.mark.parametrize("kind", SAMPLED)
def test_a_proposal_that_learns_from_nothing_is_refused(kind: type) -> None:
    with pytest.raises(ValueError, match="both 0"):
        kind(kl_weight=0.0, nll_weight=0.0)


def test_scales_of_another_length_than_the_targets_are_refused() -> None:
    f, _, y = _parts(2).condition()
    for objective in (
        KLDImportanceSampling(NOISE, [0.1, 0.2, 0.3]),
        DenoisingScoreMatching([0.1, 0.2, 0.3]),
        MaximumLikelihoodMCMC(1, [0.1, 0.2, 0.3], 2),
        NCE(GaussianNoise([[0.1, 0.2, 0.3]])),
        NCE(GaussianNoise([0.1], (True, False, False))),
    ):
        with pytest.raises(ValueError, match=r"3.*2 dimensions"):
            objective(f, None, y)


@pytest.mark.parametrize("noise", [None, 0.3, [0.3], torch.distributions.Normal(0.0, 1.0), GaussianNoise])
def test_noise_of_another_type_is_refused(noise: Any) -> None:
    for kind in (MaximumLikelihoodImportanceSampling, NCE, lambda n: KLDImportanceSampling(n, 0.1)):
        with pytest.raises(TypeError, match=r"expected an energyreg\.noise\.GaussianNoise"):
            kind(noise)


@pytest.mark.parametrize(
    "objective", [ProposalNLL(), ProposalKL(8), SelfNormalisedLikelihood(8), *(kind(8) for kind in SAMPLED)]
)
def test_an_objective_without_its_proposal_is_refused(objective: Any) -> None:
    f, _, y = _parts().condition()
    with pytest.raises(ValueError, match=f"{type(objective).__name__} needs a proposal"):
        objective(f, None, y)


VALUES = [
    *(make for make in (MAKE | JOINT).values()),
    lambda: KLDImportanceSampling(NOISE, [0.1, 0.2]),
    lambda: DenoisingScoreMatching([0.1, 0.2]),
    lambda: MaximumLikelihoodMCMC(1, [0.1, 0.2]),
    lambda: ProposalKL(8),
    ExactMaximumLikelihood,
    *SAMPLED,
    ProposalNLL,
]


@pytest.mark.parametrize("make", VALUES)
def test_every_objective_is_a_value(make: Callable[[], Any]) -> None:
    assert make() == make()
    assert hash(make()) == hash(make())
    for field in dataclasses.fields(make()):
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(make(), field.name, 1)


class _Box(Distribution):
    """Uniform on [-1, 1], without density elsewhere."""

    def __init__(self, rows: int) -> None:
        super().__init__(torch.Size([rows]), torch.Size([1]), validate_args=False)

    def sample(self, sample_shape: Any = ()) -> Tensor:
        return 2 * torch.rand((*sample_shape, *self.batch_shape, 1), dtype=torch.float64) - 1

    def log_prob(self, value: Tensor) -> Tensor:
        return torch.where(value[..., 0].abs() <= 1, -math.log(2.0), -torch.inf)


FAR = torch.tensor([[0.0], [0.5], [2.0], [-0.3]], dtype=torch.float64)
"""Four targets, one of them outside of [-1, 1]."""


def _parabola(y: Tensor) -> Tensor:
    return -y.square().sum(-1)


@pytest.mark.parametrize("name", ["NCE, proposal", "ML-IS, proposal", "SNL", "NLL", *MAKE])
def test_a_proposal_without_density_at_a_target_is_named(name: str) -> None:
    objective = {"NLL": ProposalNLL(), "ML-IS, proposal": JOINT["ML-IS, proposal"](nll_weight=1.0)}.get(name)
    objective = objective or OBJECTIVES[name]
    with pytest.raises(NonFiniteLossError, match=r"q has no density at the target in 1 of 4 rows \(25\.0%\)") as caught:
        objective(_parabola, _Box(4), FAR)
    loss = caught.value.loss
    assert loss.per_example.isfinite().tolist() == [True, True, False, True]


@pytest.mark.parametrize("name", [name for name in OBJECTIVES if name != "J_KL"])
def test_an_energy_that_is_nan_is_named(name: str) -> None:
    def f(y: Tensor) -> Tensor:
        return _parabola(y) * torch.where(torch.arange(4) == 1, torch.nan, 1.0)

    with pytest.raises(
        NonFiniteLossError, match=r"The loss of 1 of 4 rows is not finite.*f is NaN or infinite at \d+ of"
    ):
        OBJECTIVES[name](f, _Box(4), FAR.clamp(-0.9, 0.9))


@pytest.mark.parametrize("name", ["ML-IS", "NCE", "ML-MCMC"])
def test_an_energy_without_density_at_a_target_is_named(name: str) -> None:
    def f(y: Tensor) -> Tensor:
        return torch.where(y[..., 0] > 1, -torch.inf, _parabola(y))

    with pytest.raises(NonFiniteLossError, match="f is -inf at the target in 1 of 4 rows"):
        OBJECTIVES[name](f, None, FAR)


@pytest.mark.parametrize("name", ["ML-IS", "NCE", "NCE, proposal", "ML-IS, proposal", "SNL", "J_KL"])
def test_samples_where_the_energy_has_no_density_are_no_error(name: str) -> None:
    scale = torch.tensor(1.0, dtype=torch.float64, requires_grad=True)

    def f(y: Tensor) -> Tensor:
        return torch.where(y[..., 0] > 0.6, -torch.inf, scale * _parabola(y))

    q = GaussianMixture(*(t.double().expand(4, *t.shape[1:]) for t in (torch.zeros(1, 1), *torch.ones(2, 1, 1, 1))))
    loss = OBJECTIVES[name](f, q, FAR.clamp(-0.5, 0.5), generator=_generator()).per_example
    assert loss.isfinite().all()
    if name != "J_KL":
        assert torch.autograd.grad(loss.sum(), scale)[0].isfinite()


def test_a_finite_loss_costs_no_error_however_large() -> None:
    for name, objective in OBJECTIVES.items():
        loss = objective(
            lambda y: 1e4 * _parabola(y), _Box(4), FAR.clamp(-0.9, 0.9), generator=_generator()
        ).per_example
        assert loss.isfinite().all(), name


def test_a_tensor_is_a_loss_without_diagnostics_and_anything_else_is_refused() -> None:
    per_example = torch.zeros(ROWS)
    assert as_loss(per_example, None).diagnostics == {}
    assert as_loss((per_example, {"a": per_example}), None).diagnostics["a"] is per_example
    for wrong in (0.5, None, (per_example,), (per_example, 1.0, {})):
        with pytest.raises(TypeError, match=rf"ProposalNLL returned a {type(wrong).__name__}; expected energyreg"):
            as_loss(wrong, ProposalNLL())
