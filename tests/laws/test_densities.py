"""Laws of every predictive density: it integrates to one in user units, whatever the temperature, base and space.

A new base or space gets all of these tests by one entry.
"""

from __future__ import annotations

import itertools
from functools import cache

import pytest
import torch
from torch import Tensor

from energyreg.densities import ends
from energyreg.densities.bases import Lebesgue, Marginal, ProposalBase, ProposalReference
from energyreg.densities.mixtures import GaussianMixture
from energyreg.densities.spaces import Interval, Positive, Real, TargetSpace
from energyreg.inference.energy import EnergyFunction
from energyreg.inference.integrators import AdaptiveQuadrature
from energyreg.models.calibration import Calibration
from energyreg.models.ensemble import EnsembleDistribution
from energyreg.models.predictive import PredictiveDistribution
from energyreg.networks.heads import SeparableHead

DOUBLE = torch.float64
PROPOSALS = {"narrow": (0.0, 0.05), "usual": (0.5, 0.5), "wide": (0.0, 2.0), "far": (6.0, 1.5), "far, wide": (5.0, 4.0)}
"""Mean and standard deviation, in those of the targets, of the larger component of each row's proposal."""
ROWS = len(PROPOSALS)
NORMAL = torch.randn(1000, 1, generator=torch.Generator().manual_seed(0), dtype=DOUBLE)
SPACES = {
    "symmetric": (Real, 5 + 2 * NORMAL),
    "skewed": (Real, NORMAL.exp()),
    "heavy-tailed": (Real, NORMAL / NORMAL.flip(0).abs().clamp_min(0.05)),
    "positive": (Positive, (1.5 * NORMAL).exp()),
    "positive, wide": (Positive, (3 * NORMAL).exp()),
    "positive, one tiny": (Positive, torch.cat([(0.2 * NORMAL[1:]).exp(), NORMAL.new_full((1, 1), 1e-10)])),
    "interval": (lambda: Interval(0.0, 10.0), 10 * torch.sigmoid(NORMAL)),
}
BASES = ("marginal", "lebesgue", "proposal", "standardised", "own cdf")


@cache
def _predictions(kind: str, base: str, members: int) -> tuple[PredictiveDistribution, TargetSpace]:
    space, y = SPACES[kind][0](), SPACES[kind][1]
    space.fit(y)
    reference = (Lebesgue() if base == "lebesgue" else Marginal()).double()
    reference.fit(space.to_model(y))
    made = ProposalBase(reference, standardised=base == "standardised") if base in BASES[2:4] else reference
    made = ProposalReference(reference) if base == "own cdf" else made
    mean, scale = torch.tensor(list(PROPOSALS.values()), dtype=DOUBLE).unbind(1)
    logits = torch.tensor([2.0, 0.0], dtype=DOUBLE).expand(ROWS, 2)
    means, scales = torch.stack([mean, 0 * mean], 1)[..., None], torch.stack([scale, scale / scale], 1)[..., None]
    q = GaussianMixture(logits, means, scales)

    def member(seed: int) -> PredictiveDistribution:
        torch.manual_seed(seed)
        head = SeparableHead(4, 1, width=8, num_frequencies=4).double().requires_grad_(False)
        for parameter in head.parameters():
            if not parameter.any():
                parameter.normal_(std=0.5)
        context = torch.randn(ROWS, 4, dtype=DOUBLE)
        return PredictiveDistribution(
            lambda rows: EnergyFunction(head, context[rows], made, q[rows]), ROWS, space, AdaptiveQuadrature(),
            dtype=DOUBLE,
        )  # fmt: skip

    single = [member(seed) for seed in range(members)]
    if members == 1:
        return single[0], space
    return EnsembleDistribution(single, space, AdaptiveQuadrature(), dtype=DOUBLE), space


def _integrate(p: PredictiveDistribution, space: TargetSpace, values: Tensor) -> Tensor:
    """∫ p(y|x) dy in user units by the trapezoidal rule, between and at the given model values."""
    y = space.to_user(values[:, None])[:, 0].unique()
    if isinstance(space, Interval):
        y = torch.cat([y.new_tensor([space.low]), y, y.new_tensor([space.high])]).unique()
    prob = p.prob(y[:, None, None].expand(-1, ROWS, 1))
    return torch.trapezoid(prob, y, dim=0)


@pytest.mark.parametrize("members", [1, 2])
@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("kind", SPACES)
def test_every_calibrated_density_integrates_to_one_in_user_units(kind: str, base: str, members: int) -> None:
    p, space = _predictions(kind, base, members)
    grid = torch.linspace(-60, 60, 6_001, dtype=DOUBLE)
    if base == "own cdf":  # the energy varies within the narrowest proposal
        grid = torch.cat([grid, torch.linspace(-0.5, 0.5, 1_001, dtype=DOUBLE)]).unique()
    if base == "lebesgue":  # which has edges
        reference = (p.members[0] if members > 1 else p).energy(slice(0, 1)).reference
        edges = torch.cat([reference.low, reference.high])
        grid = torch.cat([grid, edges, edges.new_tensor([1 - 1e-12, 1 + 1e-12]).outer(edges).flatten()]).sort().values
    if kind == "interval":
        grid = grid.clamp(*ends.window(space)[:, 0].tolist())
    for t, weight in ((0.5, 0.0), (1.0, 0.01), (1.4, 0.01), (2.0, 0.0)):
        mass = _integrate(Calibration(t, weight)(p), space, grid)
        assert mass.allclose(torch.ones_like(mass), rtol=0, atol=1e-3), (t, weight, mass)


@pytest.mark.parametrize("kind", ["symmetric", "skewed", "positive"])
@pytest.mark.parametrize("base", ["marginal", "proposal", "own cdf"])
def test_tails_are_no_heavier_than_those_of_the_model_and_its_reference(kind: str, base: str) -> None:
    p, space = _predictions(kind, base, 2)
    reference = p.members[0].energy(slice(0, 1)).common
    z = torch.tensor([-30.0, -15.0, 15.0, 30.0], dtype=DOUBLE)
    y = space.to_user(z[:, None])[:, None].expand(-1, ROWS, 1)
    jacobian = space.log_abs_det_jacobian(y)
    heaviest = torch.maximum(p.log_prob(y), reference.log_prob(z[:, None])[:, None] + jacobian)
    for t, weight in itertools.product((0.5, 1.4, 2.0), (0.0, 0.01)):
        # By no more than a constant, which the power and the normalisation add; a heavier tail adds ever more.
        excess = Calibration(t, weight)(p).log_prob(y) - heaviest
        assert (excess < 20).all() and (excess[[0, 3]] <= excess[[1, 2]].clamp_min(0) + 1e-6).all(), (t, weight, excess)


@pytest.mark.parametrize("base", ["marginal", "proposal", "standardised", "own cdf"])
@pytest.mark.parametrize("kind", SPACES)
def test_moments_are_those_of_the_draws(kind: str, base: str) -> None:
    """In every space: no tail that no draw shows carries the mean or the variance, whatever the defensive weight."""
    p, _ = _predictions(kind, base, 1)
    levels = (torch.arange(100_000, dtype=DOUBLE) + 0.5) / 100_000
    for calibrated in (p, Calibration(0.7, 0.02)(p)):
        draws = calibrated.quantile(levels)
        for moment, drawn in ((calibrated.mean, draws.mean(0)), (calibrated.stddev, draws.std(0))):
            assert moment[:, 0].allclose(drawn, rtol=0.05), (moment[:, 0], drawn)
