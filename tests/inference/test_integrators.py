"""Laws of the integrators: unbiased, exact where the rule is, of the stated order, and of one mind about log Z."""

import dataclasses
import math

import pytest
import torch
from torch import Tensor
from torch.distributions import Independent, Normal

from energyreg.densities.bases import Lebesgue, Marginal, ProposalBase
from energyreg.densities.mixtures import GaussianMixture
from energyreg.inference.cells import Cells
from energyreg.inference.energy import EnergyFunction
from energyreg.inference.integrators import AdaptiveQuadrature, ImportanceSampling, StratifiedQuadrature
from energyreg.networks.heads import SeparableHead

ROWS = 6


def _generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=_generator(seed), dtype=torch.float64)


def _base(dim: int = 1, periodic: list[bool] | None = None) -> Marginal:
    base = Marginal(dim, periodic).double()
    z = _randn(500, dim)
    base.fit(torch.remainder(z, math.pi) if periodic and any(periodic) else z)
    return base


def _slopes() -> Tensor:
    return torch.linspace(-0.9, 0.9, ROWS, dtype=torch.float64)[:, None]


def _linear(context: Tensor, v: Tensor) -> Tensor:
    """exp g = 1 + a v₁ (and times 1 + a v₂ / 2 ...), whose integral over the unit cube is one."""
    return sum((1 + context[:, 0] * v[..., d] / (d + 1)).log() for d in range(v.shape[-1]))


def _wave(context: Tensor, v: Tensor) -> Tensor:
    """exp g = 1 + a cos 3π v, whose integral is one too, and which is periodic."""
    return (1 + context[:, 0] * (3 * math.pi * v[..., 0]).cos()).log()


def _bump(context: Tensor, v: Tensor) -> Tensor:
    """Smooth, with an integral that differs from row to row."""
    return 2 * context[:, 0] * (2 * v + 1).sin().sum(-1)


def _proposal(dim: int = 1, scale: float = 1.5) -> GaussianMixture:
    means = torch.stack([-_slopes().expand(-1, dim), _slopes().expand(-1, dim)], 1)
    return GaussianMixture(torch.zeros(ROWS, 2, dtype=torch.float64), means, torch.full_like(means, scale))


def _light(head: object, dim: int = 1) -> EnergyFunction:
    """An energy with Gaussian tails, lighter than those of `_proposal`: importance weights of finite variance."""
    return EnergyFunction(head, _slopes(), ProposalBase(_base(dim)), _proposal(dim, 1.0))


def _log_partition(f: EnergyFunction, nodes: int = 200_000) -> Tensor:
    """By the midpoint rule with very many nodes."""
    return StratifiedQuadrature(nodes, jitter=False).log_weights(f).logsumexp(0)


@pytest.mark.parametrize("dim", [1, 2])
def test_midpoints_are_exact_for_a_linear_density(dim: int) -> None:
    f = EnergyFunction(_linear, _slopes(), _base(dim))
    for nodes in (1, 9, 64):
        log_z = StratifiedQuadrature(nodes, jitter=False).log_weights(f).logsumexp(0)
        torch.testing.assert_close(log_z, torch.zeros_like(log_z), rtol=0, atol=1e-12)


def test_midpoints_are_exact_for_a_short_trigonometric_sum() -> None:
    f = EnergyFunction(_wave, _slopes(), _base(periodic=[True]))
    log_z = StratifiedQuadrature(8, jitter=False).log_weights(f).logsumexp(0)  # needs more nodes than the 3 waves
    torch.testing.assert_close(log_z, torch.zeros_like(log_z), rtol=0, atol=1e-12)


@pytest.mark.parametrize("dim", [1, 2])
@pytest.mark.parametrize("graded", [False, True])
def test_stratified_quadrature_is_unbiased(dim: int, graded: bool) -> None:
    f, rule = EnergyFunction(_bump, _slopes(), _base(dim)), StratifiedQuadrature(9, graded=graded)
    truth = _log_partition(f).exp()
    z = torch.stack([rule.log_weights(f, generator=_generator(seed)).logsumexp(0).exp() for seed in range(1000)])
    # Standard error of the mean of 1000; four of them.
    assert ((z.mean(0) - truth).abs() < 4 * z.std(0) / math.sqrt(1000)).all()


def test_error_falls_with_the_power_three_halves_of_the_nodes() -> None:
    f = EnergyFunction(_bump, _slopes(), _base())
    truth = _log_partition(f)
    error = {}
    for nodes in (16, 256):
        rule = StratifiedQuadrature(nodes)
        errors = [rule.log_weights(f, generator=_generator(seed)).logsumexp(0) - truth for seed in range(200)]
        error[nodes] = torch.stack(errors).square().mean().sqrt().item()
    # 16^1.5 is 64; a root mean square of 1200 errors is known to 2 % or so, the asymptotic law to a few.
    assert error[16] / error[256] == pytest.approx(64, rel=0.2)


@pytest.mark.parametrize(("dim", "periodic"), [(1, None), (2, None), (1, [True]), (2, [True, False])])
def test_graded_cells_agree_with_equal_ones(dim: int, periodic: list[bool] | None) -> None:
    f = EnergyFunction(_bump, _slopes(), _base(dim, periodic))
    graded = StratifiedQuadrature(40_000, jitter=False, graded=True).log_weights(f).logsumexp(0)
    # The midpoint rule with 200 nodes a dimension at least: h² times second derivatives, over 24.
    torch.testing.assert_close(graded, _log_partition(f), rtol=0, atol=2e-3)


def test_graded_cells_are_better_where_the_energy_is_steep_in_the_tails() -> None:
    f = EnergyFunction(None, _slopes(), ProposalBase(_base()), _proposal(scale=1.5))  # log Z = 0, steep at both ends
    error = {
        graded: StratifiedQuadrature(256, jitter=False, graded=graded).log_weights(f).logsumexp(0).abs().max()
        for graded in (False, True)
    }
    assert error[True] < error[False] / 3


@pytest.mark.parametrize(
    ("dim", "nodes", "per_dimension"), [(1, 10, 10), (2, 100, 10), (2, 120, 10), (2, 3, 1), (3, 27, 3)]
)
def test_one_node_in_each_cell(dim: int, nodes: int, per_dimension: int) -> None:
    rule = StratifiedQuadrature(nodes)
    assert rule.per_dimension(dim) == per_dimension
    u, log_weights = rule.nodes(EnergyFunction(None, torch.zeros(ROWS, 1), _base(dim)), generator=_generator())
    torch.testing.assert_close(log_weights.logsumexp(0), torch.zeros(1, dtype=torch.float64))
    assert u.shape == (per_dimension**dim, 1, dim)
    cells = (u[:, 0] * per_dimension).floor().long()
    assert len(torch.unique(cells, dim=0)) == per_dimension**dim
    assert ((u > 0) & (u < 1)).all()


@pytest.mark.parametrize("base", ["marginal", "lebesgue", "proposal"])
def test_weighted_points_are_in_model_space(base: str) -> None:
    measure = {"marginal": _base(), "lebesgue": Lebesgue().double(), "proposal": ProposalBase(_base())}[base]
    q = _proposal(scale=0.7)
    f = EnergyFunction(_bump, _slopes(), measure, q)
    points = StratifiedQuadrature(20_000, jitter=False)(f)
    # Truth by the trapezium rule in z.
    z = (
        torch.linspace(-4, 4, 20_001, dtype=torch.float64)
        if base == "lebesgue"
        else torch.linspace(-40, 40, 80_001, dtype=torch.float64)
    )
    density = f(z[:, None, None]).exp()
    total = torch.trapezoid(density, z, dim=0)
    mean = torch.trapezoid(density * z[:, None], z, dim=0) / total
    # The tabulated base is the derivative of its cdf to about 1e-5.
    torch.testing.assert_close(points.log_partition, total.log(), rtol=0, atol=1e-4)
    torch.testing.assert_close(points.expectation()[:, 0], mean, rtol=0, atol=3e-4)
    assert not points.independent


@pytest.mark.parametrize("kind", ["mixture", "stratified", "torch"])
@pytest.mark.parametrize("dim", [1, 2])
def test_importance_sampling_agrees_with_quadrature(kind: str, dim: int) -> None:
    q = Independent(Normal(_slopes().expand(-1, dim), 1.6), 1) if kind == "torch" else _proposal(dim)
    f = _light(_bump, dim)
    truth = _log_partition(f)
    points = ImportanceSampling(20_000, stratified=kind == "stratified")(f, q, generator=_generator())
    assert points.y.shape == (20_000, ROWS, dim)
    # Four standard errors, and the two parts in 1e4 of the grid and the table.
    assert ((points.log_partition - truth).abs() < 4 * points.log_partition_stderr + 2e-4).all()
    assert (points.log_partition_stderr < 0.03).all()
    # On average, too, the errors are as large as they say: 300 squares of unit mean, standard error 0.08.
    small = ImportanceSampling(2000, stratified=False)
    repeats = [small(f, q, generator=_generator(seed)) for seed in range(50)]
    scaled = torch.stack([(p.log_partition - truth) / p.log_partition_stderr for p in repeats])
    assert 0.6 < scaled.square().mean() < 1.5


def test_importance_sampling_of_the_proposal_itself_has_no_error() -> None:
    q = _proposal()
    f = EnergyFunction(None, _slopes(), ProposalBase(_base()), q)
    points = ImportanceSampling(100)(f, q, generator=_generator())
    torch.testing.assert_close(points.log_partition, torch.zeros_like(points.log_partition), rtol=0, atol=1e-12)
    torch.testing.assert_close(points.effective_sample_size, torch.full_like(points.log_partition, 100))


@pytest.mark.parametrize("dim", [1, 2])
def test_quasi_random_points_are_better_than_random_ones(dim: int) -> None:
    q, f = _proposal(dim), _light(_bump, dim)
    truth, error = _log_partition(f), {}
    for quasi in (False, True):
        rule = ImportanceSampling(1024, stratified=False, quasi_random=quasi)
        estimates = [rule(f, q, generator=_generator(seed)).log_partition for seed in range(20)]
        error[quasi] = (torch.stack(estimates) - truth).square().mean().sqrt()
    assert error[True] < error[False] / 3


def test_quasi_random_points_of_a_row_do_not_depend_on_the_batch() -> None:
    q, rule = _proposal(), ImportanceSampling(64, quasi_random=True)
    part = GaussianMixture(q.log_mixing[2:4], q.means[2:4], q.scales[2:4])
    torch.testing.assert_close(
        rule.sample(q, generator=_generator())[:, 2:4], rule.sample(part, generator=_generator()), rtol=0, atol=1e-12
    )


@pytest.mark.parametrize("kind", ["mixture", "quasi_random", "torch"])
def test_same_generator_same_samples_and_the_global_one_untouched(kind: str) -> None:
    q = Independent(Normal(_slopes(), 1.0), 1) if kind == "torch" else _proposal()
    rule = ImportanceSampling(16, quasi_random=kind == "quasi_random")
    torch.manual_seed(0)
    before = torch.get_rng_state()
    first = rule.sample(q, generator=_generator(3))
    assert torch.equal(before, torch.get_rng_state())
    torch.manual_seed(1)
    assert torch.equal(first, rule.sample(q, generator=_generator(3)))
    assert not torch.equal(first, rule.sample(q, generator=_generator(4)))


def test_gradients_flow_through_the_weights_and_not_through_the_points() -> None:
    torch.manual_seed(0)
    head = SeparableHead(1, width=8, channels=4).double()
    torch.nn.init.normal_(head.context_map.weight)
    q = _proposal()
    means = q.means.clone().requires_grad_()
    f = EnergyFunction(head, _slopes(), _base())
    for points in (
        ImportanceSampling(32)(f, GaussianMixture(q.log_mixing, means, q.scales)),
        StratifiedQuadrature(32)(f),
    ):
        assert not points.y.requires_grad
        gradient = torch.autograd.grad(points.log_partition.sum(), [*head.parameters(), means], allow_unused=True)
        assert gradient[0].abs().sum() > 0
        assert gradient[-1] is None


def _adapt(rule: AdaptiveQuadrature, f: EnergyFunction) -> Cells:
    """As in prediction: each row is refined until its halves agree to the tolerance."""
    cells = kept = rule.own_cells(f, rule.shared_cells(f))
    for _ in range(rule.max_refinements - 1):
        pending = ~(kept.log_partition_stderr <= rule.tolerance)
        cells = rule.own_cells(f, cells)
        parts = [(getattr(cells, field.name), getattr(kept, field.name)) for field in dataclasses.fields(Cells)[:3]]
        kept = Cells(*(torch.where(pending, new, old) for new, old in parts))
    return kept


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-3), (torch.float32, 3e-3)])
def test_adaptive_quadrature_resolves_a_very_narrow_proposal(dtype: torch.dtype, tolerance: float) -> None:
    # σ = 1e-3 is a third of the shared cells where they are widest, and a third of a thousandth of the window.
    means = torch.tensor([-3.0, -0.7, 0.0, 0.4567, 1.0, 5.0], dtype=dtype)[:, None, None]
    q = GaussianMixture(torch.zeros(ROWS, 1, dtype=dtype), means, torch.full_like(means, 1e-3))
    base = Marginal().to(dtype)
    base.fit(_randn(500, 1))
    f = EnergyFunction(lambda context, v: context[:, 0] * v[..., 0] + 2, _slopes().to(dtype), ProposalBase(base), q)
    rule = AdaptiveQuadrature(512)
    assert rule.needs_refinement(f, rule.shared_cells(f)).all()
    cells = _adapt(rule, f)
    # Within the peak g is straight: Z = exp g at its centre, times exp of its slope squared times σ² / 2, 1e-6.
    v = 2 * base.to_unit(means[:, 0]) - 1
    expected = _slopes()[:, 0] * v[:, 0].double() + 2
    # Where |z| = 5 a step of σ in z is 1e-7 of u: float32 has no room for 512 cells at the upper end.
    rows = slice(0, ROWS if dtype == torch.float64 else ROWS - 1)
    torch.testing.assert_close(cells.log_partition.double()[rows], expected[rows], rtol=0, atol=tolerance)
    median = base.from_unit(cells.unit_quantiles(torch.full((1, ROWS), 0.5)).to(dtype)[0, :, None])
    assert ((median - means[:, 0]).abs()[rows] < 1e-4).all()


def test_adaptive_quadrature_finds_a_narrow_peak_beside_a_broad_one() -> None:
    means = torch.tensor([[0.5, -1.0]], dtype=torch.float64)[..., None].expand(ROWS, 2, 1)
    scales = torch.tensor([[1e-3, 1.0]], dtype=torch.float64)[..., None].expand(ROWS, 2, 1)
    shares = torch.stack([_slopes()[:, 0].abs() / 2, 1 - _slopes()[:, 0].abs() / 2], -1)
    q = GaussianMixture(shares.log(), means, scales)
    f = EnergyFunction(None, _slopes(), ProposalBase(_base()), q)
    cells = _adapt(AdaptiveQuadrature(512), f)
    torch.testing.assert_close(cells.log_partition, torch.zeros(ROWS, dtype=torch.float64), rtol=0, atol=1e-3)
    u = f.reference.to_unit(torch.tensor([[0.49], [0.51]], dtype=torch.float64))
    inside = cells.unit_cdf(u.expand(-1, ROWS)).diff(dim=0)[0]
    broad = (Normal(-1.0, 1.0).cdf(torch.tensor(0.51)) - Normal(-1.0, 1.0).cdf(torch.tensor(0.49))).double()
    torch.testing.assert_close(inside, shares[:, 0] + shares[:, 1] * broad, rtol=0, atol=2e-3)


@pytest.mark.parametrize("periodic", [None, [True]])
def test_shared_cells_suffice_for_a_smooth_energy(periodic: list[bool] | None) -> None:
    f, rule = EnergyFunction(_wave if periodic else _bump, _slopes(), _base(periodic=periodic)), AdaptiveQuadrature(256)
    cells = rule.shared_cells(f)
    assert not rule.needs_refinement(f, cells).any()
    # The midpoint rule with 256 cells, up to 1.5 / 256 wide: h² g'' / 24.
    torch.testing.assert_close(cells.log_partition, _log_partition(f), rtol=0, atol=1e-4)
    # A refinement of what was right stays right.
    torch.testing.assert_close(rule.own_cells(f, cells).log_partition, _log_partition(f), rtol=0, atol=1e-3)


def test_cells_cover_the_unit_interval() -> None:
    f, rule = EnergyFunction(_bump, _slopes(), _base()), AdaptiveQuadrature(64)
    for cells in (rule.shared_cells(f), _adapt(rule, f)):
        assert (cells.edges[0] == 0).all()
        assert (cells.edges[-1] == 1).all()
        assert (cells.edges.diff(dim=0) > 0).all()
        assert ((cells.centres >= cells.edges[:-1]) & (cells.centres <= cells.edges[1:])).all()


def test_importance_sampling_without_a_proposal_is_refused() -> None:
    with pytest.raises(ValueError, match="needs a proposal q"):
        ImportanceSampling(8)(EnergyFunction(None, _slopes(), _base()), None)


@pytest.mark.parametrize("number", [0, -3, 2.5, True, "many"])
def test_wrong_counts_are_refused(number: object) -> None:
    with pytest.raises(ValueError, match="num_nodes is"):
        StratifiedQuadrature(number)
    with pytest.raises(ValueError, match="num_samples is"):
        ImportanceSampling(number)
    with pytest.raises(ValueError, match="num_nodes is"):
        AdaptiveQuadrature(number)


def test_wrong_numbers_of_the_adaptive_rule_are_refused() -> None:
    with pytest.raises(ValueError, match="at least 8"):
        AdaptiveQuadrature(7)
    with pytest.raises(ValueError, match="max_refinements is -1"):
        AdaptiveQuadrature(max_refinements=-1)
    for tolerance in (0.0, math.nan):
        with pytest.raises(ValueError, match="tolerance is"):
            AdaptiveQuadrature(tolerance=tolerance)


def test_a_head_that_returns_the_wrong_shape_is_named() -> None:
    f = EnergyFunction(lambda context, v: v, _slopes(), _base())
    with pytest.raises(ValueError, match=r"The head returned shape \(8, 1, 1\) for 6 contexts .* expected \(8, 6\)"):
        StratifiedQuadrature(8).log_weights(f)
    with pytest.raises(ValueError, match="base is a ProposalBase, but q is None"):
        EnergyFunction(None, _slopes(), ProposalBase())


def test_cells_have_edges_where_the_reference_jumps():
    """A point mass spread over a narrow bin: cells across its ends cost a thousandth of the mass."""
    torch.manual_seed(0)
    z = torch.cat([torch.randn(400), torch.full((600,), -0.23)])[:, None].double()
    reference = Marginal(slabs=[(-0.24, -0.22)]).double()
    reference.fit(z)
    q = GaussianMixture(*(torch.tensor(v).double() for v in ([[0.0, 0.0]], [[[-0.65], [0.64]]], [[[0.49], [0.5]]])))
    f = EnergyFunction(None, torch.zeros(1, 1), ProposalBase(reference), q)
    integrator = AdaptiveQuadrature()
    cells = integrator.shared_cells(f)
    for found in (cells, integrator.own_cells(f, cells)):
        edges = reference.from_unit(found.edges.reshape(-1, 1))[:, 0]
        assert all((edges - place).abs().min() < 1e-7 for place in (-0.24, -0.22))
        assert found.log_partition.abs().item() < 1e-4
