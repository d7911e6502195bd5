"""Laws of every energy: what objectives, integrators, chains and refinement rely on, whatever model it comes from.

A new energy gets all of these tests by one entry in `MAKE`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor

from energyreg.densities.bases import Lebesgue, Marginal, ProposalBase, ProposalReference
from energyreg.densities.noise import GaussianNoise
from energyreg.densities.spaces import Circle, Product, Real
from energyreg.inference.ascent import refine
from energyreg.inference.energy import Energy, EnergyFunction, ReferencedEnergy, periodic_of
from energyreg.inference.integrators import AdaptiveQuadrature, ImportanceSampling, StratifiedQuadrature
from energyreg.inference.mcmc import MALA, Langevin, langevin_step
from energyreg.models.calibration import CalibratedEnergy
from energyreg.models.chain import ChainEnergy, EnergyChain
from energyreg.models.ensemble import EnsembleEnergy
from energyreg.networks.heads import JointHead, SeparableHead
from energyreg.networks.proposals import MixtureDensityNetwork
from energyreg.objectives import (
    NCE,
    DenoisingScoreMatching,
    ExactMaximumLikelihood,
    KLDImportanceSampling,
    MaximumLikelihoodImportanceSampling,
    MaximumLikelihoodMCMC,
    ScoreMatching,
)
from energyreg.vision.boxes.energy import BoxEnergy, BoxEnergyHead
from energyreg.vision.boxes.spaces import BoxSpace
from energyreg.vision.pooling.roi_pool import Pyramid

ROWS = 3
DOUBLE = torch.float64
PERIODIC = (False, True)
GRID = StratifiedQuadrature(128**2, jitter=False, graded=True)


def _generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _function(
    rows: slice, base: str = "marginal", head: type = SeparableHead, periodic: Any = PERIODIC
) -> EnergyFunction:
    """An energy on a line and a circle, in double precision, away from the start, where g = 0."""
    torch.manual_seed(0)
    targets = torch.randn(200, 2)
    reference = Lebesgue(2, periodic) if base == "lebesgue" else Marginal(2, periodic)
    reference.fit(targets)
    network = head(4, 2, periodic, width=8, num_frequencies=3, frequency_scale=0.3).double().requires_grad_(False)
    for parameter in network.parameters():
        if not parameter.any():
            parameter.normal_(std=0.3)
    context = torch.randn(ROWS, 4, dtype=DOUBLE)[rows]
    q = MixtureDensityNetwork(4, 2, 3, periodic=periodic, width=8).double().requires_grad_(False)(context)
    made = ProposalBase(reference, standardised=not any(periodic)) if base == "proposal" else reference
    return EnergyFunction(network, context, made.double(), q)


def _own_cdf(rows: slice, periodic: bool = False) -> EnergyFunction:
    """An energy of one dimension whose reference is its own proposal."""
    torch.manual_seed(0)
    head = SeparableHead(4, 1, (periodic,), width=8, num_frequencies=3, frequency_scale=0.3)
    head.context_map.weight.data.normal_(std=0.3)
    context = torch.randn(ROWS, 4, dtype=DOUBLE)[rows]
    q = MixtureDensityNetwork(4, 1, 3, periodic=(periodic,), width=8).double().requires_grad_(False)(context)
    reference = Marginal(1, (periodic,)).double()
    return EnergyFunction(head.double().requires_grad_(False), context, ProposalReference(reference), q)


def _ensemble(rows: slice) -> EnsembleEnergy:
    members = [_function(rows, "marginal"), _function(rows, "proposal")]
    log_z, weights = torch.stack([_log_partition(f) for f in members]), torch.tensor([0.3, 0.7], dtype=DOUBLE)
    return EnsembleEnergy(members, lambda: log_z, weights.log())


def _calibrated(rows: slice) -> CalibratedEnergy:
    f = _function(rows)
    return CalibratedEnergy(f, 0.7, 0.05, _log_partition(CalibratedEnergy(f, 0.7)))


@cache
def _chain_model() -> EnergyChain:
    torch.manual_seed(0)
    chain = EnergyChain.for_table(2, Product(Real(), Circle(360.0)), width=8, dropout=0.0).double()
    with torch.no_grad():
        for parameter in chain.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape))
    return chain.eval()


def _chain(rows: slice) -> ChainEnergy:
    return ChainEnergy(_chain_model(), torch.linspace(-1, 1, 2 * ROWS, dtype=DOUBLE).reshape(ROWS, 2)[rows], 2**28)


def _boxes(rows: slice) -> BoxEnergy:
    torch.manual_seed(0)
    pyramid = Pyramid.of(torch.randn(2, 4, 16, 16, dtype=DOUBLE), 1 / 4)
    head = BoxEnergyHead(4, num_outputs=2, pool_size=3, width=8).double().requires_grad_(False)
    head.output.weight.normal_()
    reference = torch.tensor([[4.0, 6.0, 30.0, 40.0], [20.0, 8.0, 50.0, 33.0], [9.0, 9.0, 41.0, 25.0]], dtype=DOUBLE)
    image, labels, ratio = torch.tensor([0, 1, 1]), torch.tensor([1, 0, 1]), torch.ones(ROWS, 4, dtype=DOUBLE)
    return BoxEnergy(head, pyramid, BoxSpace(reference[rows]), image[rows], labels[rows], ratio[rows])


class _Yaw:
    """What a detector in three dimensions will have: an energy without a reference, of which one dimension is a yaw."""

    periodic, batch_size, dtype, device = PERIODIC, ROWS, DOUBLE, torch.device("cpu")

    def __call__(self, z: Tensor) -> Tensor:
        return (z[..., 1] - 2.5).cos() - z[..., 0].square() / 2


REFERENCED: dict[str, Callable[[slice], ReferencedEnergy]] = {
    "marginal": _function,
    "lebesgue": lambda rows: _function(rows, "lebesgue"),
    "proposal": lambda rows: _function(rows, "proposal"),
    "joint head": lambda rows: _function(rows, head=JointHead),
    "ensemble": _ensemble,
    "calibrated": _calibrated,
    "chain": _chain,
}
MAKE: dict[str, Callable[[slice], Any]] = {
    **REFERENCED,
    "standardised": lambda rows: _function(rows, "proposal", periodic=(False, False)),
    "boxes": _boxes,
}
ANGLES: dict[str, Callable[[slice], Any]] = {**REFERENCED, "yaw": lambda rows: _Yaw()}
"""Those of a line and a circle."""
REFERENCED |= {
    "own cdf": _own_cdf,
    "own cdf of an angle": lambda rows: _own_cdf(rows, True),
    "own cdf, common reference": lambda rows: _own_cdf(rows).in_common(),
}
MAKE |= REFERENCED
ALL = slice(None)


def _points(f: Energy, *shape: int, scale: float = 0.3) -> Tensor:
    return scale * torch.randn(*shape, len(f.periodic), generator=_generator(), dtype=DOUBLE)


def _log_partition(f: ReferencedEnergy) -> Tensor:
    return GRID.log_weights(f).logsumexp(0)


@pytest.mark.parametrize("make", MAKE.values(), ids=MAKE)
def test_an_energy_knows_its_dimensions_examples_type_and_device(make: Callable[[slice], Any]) -> None:
    f = make(ALL)
    z = _points(f, 4, 2, ROWS)
    assert f(z).shape == (4, 2, ROWS) and f(z).isfinite().all()
    assert (f.batch_size, f.dtype, f.device) == (ROWS, z.dtype, z.device)
    assert f(z).dtype == f.dtype and f(z).device == f.device
    assert all(isinstance(flag, bool) for flag in f.periodic)


@pytest.mark.parametrize("make", REFERENCED.values(), ids=REFERENCED)
def test_points_may_be_shared_by_all_examples(make: Callable[[slice], Any]) -> None:
    f = make(ALL)
    z = _points(f, 6, 1)
    torch.testing.assert_close(f(z), f(z.expand(-1, ROWS, -1).contiguous()))
    u = torch.rand(z.shape, generator=_generator(), dtype=DOUBLE)
    torch.testing.assert_close(f.relative(u), f.relative(u.expand(-1, ROWS, -1).contiguous()))
    z = f.reference.from_unit(u)
    torch.testing.assert_close(f.relative(u), f(z) - f.reference.log_prob(z), rtol=1e-5, atol=1e-5)
    target, relative = f.target_and_relative(z[0].expand(ROWS, -1), u)
    torch.testing.assert_close((target, relative), (f(z)[0], f.relative(u)))


@pytest.mark.parametrize("make", MAKE.values(), ids=MAKE)
def test_the_gradient_is_that_of_finite_differences(make: Callable[[slice], Any]) -> None:
    f = make(ALL)
    z = _points(f, 2, ROWS).requires_grad_()
    (gradient,) = torch.autograd.grad(f(z).sum(), z)
    # Tables of the references are read by cubic pieces, and a chain's log Z is of single knots: 1e-5 of a second
    # derivative of order one.
    for d, step in enumerate(1e-5 * torch.eye(z.shape[-1], dtype=DOUBLE)):
        with torch.no_grad():
            slope = (f(z + step) - f(z - step)) / 2e-5
        torch.testing.assert_close(gradient[..., d], slope, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("make", REFERENCED.values(), ids=REFERENCED)
def test_the_partition_function_is_that_of_the_quadrature(make: Callable[[slice], Any]) -> None:
    f = make(ALL)
    t, angle = torch.linspace(-4, 4, 201, dtype=DOUBLE), torch.linspace(-math.pi, math.pi, 101, dtype=DOUBLE)[:-1]
    window = f.reference if isinstance(f.reference, Lebesgue) else None
    line = (window.low[0] + (window.high[0] - window.low[0]) * (t + 4) / 8) if window else t.sinh()
    weights = torch.full_like(t, float(window.high[0] - window.low[0]) / 200) if window else t.cosh() * 0.04
    if window:
        weights[[0, -1]] /= 2
    axes = [angle if flag else line for flag in f.periodic]
    sides = [torch.full_like(angle, 2 * math.pi / 100) if flag else weights for flag in f.periodic]
    z = torch.stack(torch.meshgrid(*axes, indexing="ij"), -1).reshape(-1, 1, len(axes))
    steps = torch.stack(torch.meshgrid(*sides, indexing="ij"), -1).log().sum(-1).reshape(-1, 1)
    with torch.no_grad():
        by_hand, log_z = (f(z) + steps).logsumexp(0), _log_partition(f)
    torch.testing.assert_close(by_hand, log_z, rtol=0, atol=3e-3)
    if f.normalised:
        torch.testing.assert_close(log_z, torch.zeros_like(log_z), rtol=0, atol=3e-3)


@pytest.mark.parametrize("make", MAKE.values(), ids=MAKE)
def test_examples_in_blocks_give_the_same(make: Callable[[slice], Any]) -> None:
    f = make(ALL)
    z = _points(f, 5, ROWS)
    parts = [make(rows)(z[:, rows]) for rows in (slice(0, 1), slice(1, ROWS))]
    torch.testing.assert_close(torch.cat(parts, -1), f(z), rtol=1e-6, atol=1e-6)


def test_boxes_in_chunks_give_the_same() -> None:
    f = _boxes(ALL)
    z = _points(f, 5, ROWS).requires_grad_()
    whole = f(z)
    f.pool_bytes = 1000
    parts = f(z)
    torch.testing.assert_close(
        (whole, *torch.autograd.grad(whole.sum(), z)), (parts, *torch.autograd.grad(parts.sum(), z))
    )


@pytest.mark.parametrize("make", ANGLES.values(), ids=ANGLES)
def test_an_angle_has_no_beginning(make: Callable[[slice], Any]) -> None:
    f = make(ALL)
    assert f.periodic == PERIODIC
    edge = _points(f, 5, ROWS)
    edge[..., 1] = -math.pi
    other = edge.clone()
    other[..., 1] = math.pi
    torch.testing.assert_close(f(edge), f(other), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("make", ANGLES.values(), ids=ANGLES)
@pytest.mark.parametrize(
    "sampler", [Langevin(8, 2.0, 4), MALA(8, 4, num_warmup=4, step_size=1.0)], ids=["langevin", "mala"]
)
def test_chains_wrap_the_angles_of_every_energy(sampler: Langevin | MALA, make: Callable[[slice], Any]) -> None:
    start = torch.tensor([0.0, 3.1], dtype=DOUBLE).expand(ROWS, 2)
    chains = sampler.run(make(ALL), start=start, generator=_generator())
    assert chains.periodic == PERIODIC
    assert chains.rhat.shape == chains.effective_sample_size.shape == (ROWS, 2)
    angle = chains.samples[..., 1]
    assert angle.min() >= -math.pi and angle.max() < math.pi
    assert angle.min() < 0 < angle.max()  # they cross the cut


@pytest.mark.parametrize("make", ANGLES.values(), ids=ANGLES)
def test_every_objective_knows_the_angles_of_every_energy(make: Callable[[slice], Any]) -> None:
    f, y = make(ALL), torch.tensor([[0.0, 3.1], [0.3, -3.0], [-0.2, 0.5]], dtype=DOUBLE)
    straight = GaussianNoise([0.3, 2.0])
    for kind in (NCE, MaximumLikelihoodImportanceSampling, lambda noise: KLDImportanceSampling(noise, 0.1)):
        with pytest.raises(ValueError, match=r"noise.periodic is \(False, False\), but f.periodic is \(False, True\)"):
            kind(straight)(f, None, y)
    round_noise = GaussianNoise([0.3, 2.0], PERIODIC)
    seen = []

    def watched(z: Tensor) -> Tensor:
        seen.append(z.detach())
        return f(z)

    watched.periodic = PERIODIC  # type: ignore[attr-defined]
    wandering = DenoisingScoreMatching(1.5, 16), MaximumLikelihoodMCMC(3, 0.1, 8)
    for objective in (NCE(round_noise, 16), *wandering, ScoreMatching()):
        assert objective(watched, None, y, generator=_generator()).per_example.isfinite().all()
    assert all(z[..., 1].min() >= -math.pi - 1e-9 and z[..., 1].max() <= math.pi + 1e-9 for z in seen)
    # A turn more is the same target.
    turn = torch.tensor([0.0, 2 * math.pi], dtype=DOUBLE)
    here, there = (wandering[0](f, None, z, generator=_generator()).per_example for z in (y, y + turn))
    torch.testing.assert_close(here, there, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("make", ANGLES.values(), ids=ANGLES)
def test_refinement_goes_round_the_circle_of_every_energy(make: Callable[[slice], Any]) -> None:
    start = torch.tensor([0.0, 3.1], dtype=DOUBLE).expand(ROWS, 2)
    top = refine(make(ALL), start + torch.tensor([0.0, 2 * math.pi], dtype=DOUBLE), num_steps=3)
    torch.testing.assert_close(top, refine(make(ALL), start, num_steps=3), rtol=1e-6, atol=1e-6)
    assert top[:, 1].abs().max() <= math.pi


def test_energy_and_caller_must_not_contradict_each_other() -> None:
    f, y = _function(ALL), torch.zeros(2, ROWS, 2, dtype=DOUBLE)
    assert periodic_of(f, 2) == periodic_of(f, 2, [False, True]) == PERIODIC
    assert periodic_of(lambda z: z.sum(-1), 2) == (False, False)
    with pytest.raises(ValueError, match=r"periodic is \(True, False\), but f.periodic is \(False, True\)"):
        langevin_step(f, y, 0.1, periodic=[True, False])
    with pytest.raises(ValueError, match=r"periodic is \(False, False\), but f.periodic"):
        refine(f, y, periodic=[False, False])
    with pytest.raises(ValueError, match=r"f.periodic has 2 entries, but y has 3 dimensions"):
        periodic_of(f, 3)


def test_a_function_without_a_reference_is_refused_where_one_is_needed() -> None:
    y = torch.zeros(ROWS, 2, dtype=DOUBLE)
    for call in (
        lambda f: ExactMaximumLikelihood()(f, None, y),
        lambda f: StratifiedQuadrature()(f),
        lambda f: AdaptiveQuadrature().shared_cells(f),
    ):
        with pytest.raises(TypeError, match="f is a function without one"):
            call(lambda z: -z.square().sum(-1))
    with pytest.raises(ValueError, match="needs a proposal"):
        ImportanceSampling()(lambda z: -z.square().sum(-1))


@pytest.mark.parametrize("make", REFERENCED.values(), ids=REFERENCED)
def test_exact_maximum_likelihood_takes_every_energy_with_a_reference(make: Callable[[slice], Any]) -> None:
    f = make(ALL)
    y = torch.zeros(ROWS, len(f.periodic), dtype=DOUBLE)
    with torch.no_grad():
        loss = ExactMaximumLikelihood(64**2)(f, None, y, generator=_generator()).per_example
        # 4,096 random nodes, one in each cell: the estimate is off by at most a twentieth of a nat here.
        torch.testing.assert_close(loss, _log_partition(f) - f(y), rtol=0, atol=0.1)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA")
def test_an_energy_says_where_it_is_on_a_gpu() -> None:
    f = _function(ALL)
    f = EnergyFunction(f.head.cuda(), f.context.cuda(), f.base.cuda())
    assert f.device.type == "cuda" and f(torch.zeros(ROWS, 2, dtype=DOUBLE, device="cuda")).is_cuda
