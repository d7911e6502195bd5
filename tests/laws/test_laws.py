"""Laws that every predictive distribution obeys, whatever its space, base, head and training."""

from __future__ import annotations

import math

import pytest
import torch
from scipy import stats

import energyreg as er
from energyreg.densities.bases import Lebesgue, Marginal, ProposalBase, ProposalReference
from energyreg.densities.spaces import Circle, Interval, Positive, Product, Real
from energyreg.inference.importance import AdaptiveImportanceSampling, ImportanceSampling
from energyreg.inference.integrators import AdaptiveQuadrature, StratifiedQuadrature
from energyreg.networks.encoders import TableEncoder
from energyreg.networks.heads import JointHead, SeparableHead
from energyreg.networks.proposals import MixtureDensityNetwork

SPACES = {
    "real": lambda: Real(),
    "positive": lambda: Positive(),
    "interval": lambda: Interval(-1.0, 3.0),
    "circle": lambda: Circle(360.0),
    "degrees": lambda: Circle(360.0, low=-180.0),
    "product": lambda: Product(Real()),
}
MODELS = ("marginal", "lebesgue", "proposal", "own cdf", "mixture", "joint")
ROWS = 5


def make_model(name: str, space: er.spaces.TargetSpace, trained: bool, dtype=torch.float32):
    """A small model on made-up data; `trained` moves its weights away from the start, where g = 0."""
    torch.manual_seed(0)
    dim, periodic = space.dim, space.periodic
    x = torch.randn(400, 2)
    noise = torch.randn(400, dim)
    y = 0.5 * x[:, :1] + 0.4 * noise
    columns = []
    for d, part in enumerate(part for s in getattr(space, "spaces", [space]) for part in [s] * s.dim):
        column = y[:, d]
        if isinstance(part, Positive):
            column = (0.5 * column).exp()
        elif isinstance(part, Interval):
            column = -1 + 4 * torch.sigmoid(column)
        elif isinstance(part, Circle):
            column = (350 + 60 * column - part.low) % 360 + part.low
        columns.append(column)
    y = torch.stack(columns, -1)
    encoder = TableEncoder(2, context_dim=16, dropout=0.0)
    proposal = MixtureDensityNetwork(16, dim, 3, periodic=periodic)
    head = JointHead(16, dim, periodic, width=16) if name == "joint" else SeparableHead(16, dim, periodic, 16, 16)
    bases = ProposalReference if name == "own cdf" else ProposalBase
    base = {"lebesgue": Lebesgue, "marginal": Marginal, "joint": Marginal}.get(name)
    model = er.EnergyRegressionModel(
        encoder,
        None if name == "mixture" else head,
        proposal=proposal,
        base=bases(Marginal(dim, periodic)) if base is None else base(dim, periodic),
        space=space,
    ).to(dtype)
    model.fit_preprocessing(x, y)
    if trained:
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.1 * torch.randn(parameter.shape))
    return model.eval(), x[:ROWS].to(dtype), y


def widen(proposal: MixtureDensityNetwork) -> None:
    """Scales of at least two standard deviations, so that importance weights under any base here have a finite "
    "variance."""
    k, d = proposal.num_components, proposal.dim
    with torch.no_grad():
        proposal.output.bias.reshape(k, 1 + 2 * d)[:, 1 + d :] += 2.0


def user_grid(space, n: int = 40_001) -> torch.Tensor:
    """A fine grid in user units over all of the space where a density can be, dense where the space is squeezed."""
    part = space.spaces[0] if isinstance(space, Product) else space
    if isinstance(part, Circle):
        return torch.linspace(part.low, part.low + part.period, n, dtype=torch.double)
    z = torch.linspace(-25, 25, n, dtype=torch.double)
    return part.to_user(z[:, None])[:, 0].unique()


@pytest.mark.parametrize("trained", [False, True], ids=["start", "trained"])
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("space", SPACES)
def test_density_integrates_to_one(space, name, trained):
    # The trapezoidal rule on the grid is exact to 1e-6 here; 1e-3 is for the quadrature of log Z.
    space = SPACES[space]()
    model, x, _ = make_model(name, space, trained)
    grid = user_grid(space)
    density = model(x).prob(grid[:, None, None].expand(-1, ROWS, 1)).double()
    assert density.isfinite().all()
    torch.testing.assert_close(torch.trapezoid(density, grid, dim=0), torch.ones(ROWS).double(), atol=1e-3, rtol=0)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("space", SPACES)
def test_cdf_is_the_integral_of_the_density_and_inverts_icdf(space, name):
    space = SPACES[space]()
    model, x, _ = make_model(name, space, trained=True)
    p, grid = model(x), user_grid(space)
    values = grid[:, None, None].expand(-1, ROWS, 1)
    integral = torch.cumulative_trapezoid(p.prob(values).double(), grid, dim=0)
    # Linear within each of 512 cells: the error is of the order of the largest mass of a cell squared.
    torch.testing.assert_close(p.cdf(values[1:-1]).double(), integral[:-1], atol=2e-3, rtol=0)
    levels = torch.linspace(0.01, 0.99, 99)[:, None].expand(-1, ROWS)
    torch.testing.assert_close(p.cdf(p.icdf(levels)[..., None]), levels, atol=1e-4, rtol=0)


@pytest.mark.parametrize("name", ["marginal", "proposal", "own cdf"])
@pytest.mark.parametrize("space", SPACES)
def test_samples_follow_the_cdf(space, name):
    model, x, _ = make_model(name, SPACES[space](), trained=True)
    p = model(x)
    samples = p.sample((4000,), generator=torch.Generator().manual_seed(1))
    assert model.space.contains(samples).all()
    u = p.cdf(samples).numpy()
    # Kolmogorov-Smirnov at level 1e-4 for each of the rows, with fixed seeds.
    assert min(stats.kstest(u[:, row], "uniform").pvalue for row in range(ROWS)) > 1e-4


@pytest.mark.parametrize("name", ["marginal", "proposal", "own cdf", "mixture"])
@pytest.mark.parametrize("space", ["real", "positive", "interval"])
def test_moments_and_mode_agree_with_the_density(space, name):
    space = SPACES[space]()
    model, x, _ = make_model(name, space, trained=True)
    p, grid = model(x), user_grid(space)
    density = p.prob(grid[:, None, None].expand(-1, ROWS, 1)).double()
    mean = torch.trapezoid(density * grid[:, None], grid, dim=0)
    variance = torch.trapezoid(density * (grid[:, None] - mean).square(), grid, dim=0)
    torch.testing.assert_close(p.mean[:, 0].double(), mean, atol=1e-3, rtol=1e-2)
    torch.testing.assert_close(p.variance[:, 0].double(), variance, atol=1e-3, rtol=3e-2)
    best = p.log_prob(p.mode)
    assert (best >= density.log().amax(0) - 1e-3).all()


def test_moments_on_a_circle_go_round_the_cut():
    space = Circle(360.0)
    model, x, _ = make_model("marginal", space, trained=True)
    p = model(x)
    samples = p.sample((20_000,), generator=torch.Generator().manual_seed(0)).double().deg2rad()
    mean = torch.atan2(samples.sin().mean(0), samples.cos().mean(0)).rad2deg() % 360
    difference = (p.mean.double() - mean + 180) % 360 - 180
    assert difference.abs().max() < 4  # 5 s.e. of an angle with a standard deviation of 60° or less, over 20,000
    interval = p.interval(0.9)
    assert (interval[:, 0] < interval[:, 1]).all() and (interval[:, 1] - interval[:, 0] < 360).all()
    inside = (samples.rad2deg()[..., 0] - interval[:, 0]) % 360 <= interval[:, 1] - interval[:, 0]
    torch.testing.assert_close(inside.double().mean(0), torch.full((ROWS,), 0.9).double(), atol=0.012, rtol=0)


@pytest.mark.parametrize("name", ["marginal", "proposal", "own cdf"])
@pytest.mark.parametrize("space", SPACES)
def test_highest_density_region_has_its_probability_and_is_the_smallest(space, name):
    model, x, _ = make_model(name, SPACES[space](), trained=True)
    p = model(x)
    region = p.highest_density_region(0.8)
    samples = p.sample((20_000,), generator=torch.Generator().manual_seed(2))
    # 0.8 ± 5 s.e. of 20,000 samples, and the mass of one cell of 512 beside.
    torch.testing.assert_close(region.contains(samples).float().mean(0), torch.full((ROWS,), 0.8), atol=0.02, rtol=0)
    assert region.intervals is not None and len(region.intervals) == ROWS
    period = getattr(model.space, "period", None)
    for row, intervals in enumerate(region.intervals):
        assert (intervals[:, 1] > intervals[:, 0]).all()
        y = samples[:, row]
        offset = (y - intervals[:, 0]) % period if period else y - intervals[:, 0]
        inside = ((offset >= 0) & (offset <= intervals[:, 1] - intervals[:, 0])).any(1)
        assert (inside == region.contains(samples)[:, row]).float().mean() > 0.98
    equal_tailed = p.interval(0.8)
    length = torch.stack([(i[:, 1] - i[:, 0]).sum() for i in region.intervals])
    assert (length <= (equal_tailed[:, 1] - equal_tailed[:, 0]) * 1.01).all()


@pytest.mark.parametrize("name", ["marginal", "proposal", "joint"])
@pytest.mark.parametrize("space", ["real", "circle"])
def test_importance_sampling_agrees_with_quadrature(space, name):
    model, x, _ = make_model(name, SPACES[space](), trained=True)
    widen(model.proposal)
    exact = model(x).diagnostics.log_partition
    f = model.energy(x)
    points = ImportanceSampling(20_000, stratified=False)(f, f.q, generator=torch.Generator().manual_seed(0))
    assert ((points.log_partition - exact).abs() <= 4 * points.log_partition_stderr + 1e-4).all()
    for integrator in (ImportanceSampling(8192), AdaptiveImportanceSampling(2048, 2, 1024)):
        sampled = model(x, integrator=integrator).diagnostics
        assert ((sampled.log_partition - exact).abs() <= 4 * sampled.log_partition_stderr + 1e-3).all()
        assert sampled.num_points == integrator.num_points(1)


@pytest.mark.parametrize("name", ["marginal", "proposal", "joint"])
def test_two_dimensions(name):
    space = Product(Positive(), Circle(360.0))
    model, x, _ = make_model(name, space, trained=True)
    widen(model.proposal)
    radius = user_grid(Positive(), 1601)
    angle = torch.linspace(0, 360, 91, dtype=torch.double)  # a periodic sum converges fast
    grid = torch.stack(torch.meshgrid(radius, angle, indexing="ij"), -1).reshape(-1, 1, 2)
    grid_rule = StratifiedQuadrature(128**2, jitter=False, graded=True)
    # The grid lies in the coordinates of the marginal; a proposal that is wider has its own points by default.
    for integrator in (ImportanceSampling(8192),) if name == "proposal" else (grid_rule, ImportanceSampling(8192)):
        p = model(x, integrator=integrator)
        density = p.prob(grid.expand(-1, ROWS, 2)).double().reshape(len(radius), len(angle), ROWS)
        mass = torch.trapezoid(torch.trapezoid(density, angle, dim=1), radius, dim=0)
        # Importance sampling is as good as its own standard error says.
        tolerance = (
            1e-3 if isinstance(integrator, StratifiedQuadrature) else 4 * p.diagnostics.log_partition_stderr + 1e-3
        )
        assert ((mass - 1).abs() <= tolerance).all(), (integrator, mass)
        samples = p.sample((4000,), generator=torch.Generator().manual_seed(0))
        assert samples.shape == (4000, ROWS, 2) and space.contains(samples).all()
        assert p.interval(0.9).shape == (ROWS, 2, 2) and p.mean.shape == p.mode.shape == p.median.shape == (ROWS, 2)
        mean = torch.trapezoid(torch.trapezoid(density * radius[:, None, None], angle, dim=1), radius, dim=0) / mass
        torch.testing.assert_close(p.mean[:, 0].double(), mean, atol=0.02, rtol=0.02)
        torch.testing.assert_close(samples[..., 0].double().mean(0), mean, atol=0.06, rtol=0.05)
        assert p.highest_density_region(0.5).contains(samples).float().mean(0).sub(0.5).abs().max() < 0.06
        assert (p.log_prob(p.mode) >= p.log_prob(samples).amax(0) - 1e-3).all()


def test_three_dimensions_by_importance_sampling():
    space = Real(3)
    model, x, _ = make_model("proposal", space, trained=True)
    p = model(x)
    d = p.diagnostics
    assert (d.log_partition_stderr < 0.2).all() and (d.effective_sample_size > 100).all()
    # An independent estimate of the integral: the trapezoidal rule on a cube that holds all but 1e-4 of the density.
    axis = torch.linspace(-5, 5, 61)
    cube = space.to_user(torch.stack(torch.meshgrid(axis, axis, axis, indexing="ij"), -1).reshape(-1, 1, 3)).float()
    cell = float((axis[1] - axis[0]) ** 3 * space.scale.prod())
    mass = p.prob(cube.expand(-1, ROWS, 3)).sum(0) * cell
    assert ((mass - 1).abs() <= 4 * d.log_partition_stderr + 0.02).all()


@pytest.mark.parametrize("name", MODELS)
def test_points_outside_the_space_have_no_density(name):
    for space, outside in ((Positive(), [-1.0, 0.0, -math.inf]), (Interval(-1.0, 3.0), [-1.5, 3.5, math.inf])):
        model, x, _ = make_model(name, space, trained=True)
        y = torch.tensor(outside)[:, None, None].expand(-1, ROWS, 1)
        assert (model(x).log_prob(y) == -math.inf).all()
        assert model(x).log_prob(torch.full_like(y, math.nan)).isnan().all()
        assert (model(x).prob(y) == 0).all()


@pytest.mark.parametrize("space", ["real", "positive"])
@pytest.mark.parametrize("name", ["marginal", "proposal", "own cdf", "mixture"])
def test_far_away_targets_have_a_finite_density(name, space):
    model, x, _ = make_model(name, SPACES[space](), trained=True)
    y = torch.tensor([1e-6, 1e3, 1e6])[:, None, None].expand(-1, ROWS, 1)
    log_prob = model(x).log_prob(y)
    assert log_prob.isfinite().all()


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("space", ["real", "circle"])
def test_the_chunk_size_changes_nothing(name, space):
    model, x, y = make_model(name, SPACES[space](), trained=True)
    x = torch.randn(500, 2, generator=torch.Generator().manual_seed(3))
    y = y[torch.arange(500) % len(y)]
    whole, parts = model(x), model(x, memory_budget=2**21)
    assert parts.block_rows() < 250
    generators = [torch.Generator().manual_seed(0) for _ in range(2)]
    for a, b in (
        (whole.log_prob(y), parts.log_prob(y)),
        (whole.mean, parts.mean),
        (whole.interval(0.9), parts.interval(0.9)),
        (whole.cdf(y), parts.cdf(y)),
        (whole.sample((3,), generator=generators[0]), parts.sample((3,), generator=generators[1])),
        (whole.diagnostics.log_partition, parts.diagnostics.log_partition),
    ):
        # Matrix products of other shapes round differently: the same to a few float32 roundings.
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4 * float(b.abs().max()))


def test_the_chunk_size_changes_nothing_in_three_dimensions():
    model, _, y = make_model("proposal", Real(3), trained=True)
    x = torch.randn(200, 2, generator=torch.Generator().manual_seed(3))
    whole, parts = model(x, memory_budget=2**31), model(x, memory_budget=2**25)
    assert parts.block_rows() < 200 <= whole.block_rows()
    torch.testing.assert_close(whole.log_prob(y[:200]), parts.log_prob(y[:200]), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(whole.mean, parts.mean, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", MODELS)
def test_double_precision_agrees_with_single(name):
    single, x, y = make_model(name, Real(), trained=True)
    double, _, _ = make_model(name, Real(), trained=True, dtype=torch.double)
    double.load_state_dict(
        {key: value.double() if value.is_floating_point() else value for key, value in single.state_dict().items()}
    )
    p, q = single(x), double(x.double())
    assert q.log_prob(y[:ROWS]).dtype == q.mean.dtype == torch.double
    # float32 has 7 digits; energies of a few tens and sums over 512 cells cost about two of them.
    torch.testing.assert_close(p.log_prob(y[:ROWS]).double(), q.log_prob(y[:ROWS]), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(p.mean.double(), q.mean, atol=1e-4, rtol=1e-4)


def test_the_same_seed_gives_the_same_result():
    model, x, _ = make_model("proposal", Real(3), trained=True)
    a, b, c = model(x, seed=1), model(x, seed=1), model(x, seed=2)
    assert torch.equal(a.mean, b.mean) and not torch.equal(a.mean, c.mean)
    draw = [p.sample((5,), generator=torch.Generator().manual_seed(0)) for p in (a, b)]
    assert torch.equal(*draw)


def test_a_narrow_peak_is_resolved():
    # A mixture with scales of a thousandth of the targets' spread, as noise-free data give.
    torch.manual_seed(0)
    model, x, _ = make_model("proposal", Real(), trained=False)
    with torch.no_grad():
        bias = model.proposal.output.bias.reshape(3, 3)
        bias[:, 2] = -8.0
    p = model(x)
    assert p.diagnostics.log_partition.abs().max() < 1e-3  # log Z = 0: g is zero, so that p is the mixture
    q = model.energy(x).q
    torch.testing.assert_close(model.space.to_model(p.mean).float(), q.mean, atol=1e-3, rtol=1e-3)
    torch.testing.assert_close(p.stddev / model.space.scale.float(), q.stddev, atol=1e-3, rtol=2e-2)


def test_the_proposal_is_a_model_too():
    model, x, y = make_model("marginal", Positive(), trained=True)
    q = model.proposal_model()
    z = model.space.to_model(y[:ROWS])
    expected = model.energy(x).q.log_prob(z.float()) + model.space.log_abs_det_jacobian(y[:ROWS]).float()
    torch.testing.assert_close(q(x).log_prob(y[:ROWS]), expected)
    assert q.proposal is model.proposal


def test_log_prob_has_a_gradient_in_training_mode_only():
    model, x, y = make_model("marginal", Real(), trained=True)
    assert not model(x).log_prob(y[:ROWS]).requires_grad
    model.train()
    loss = -model(x).log_prob(y[:ROWS]).mean()
    loss.backward()
    assert all(p.grad is not None for p in (*model.encoder.parameters(), *model.head.parameters()))


def test_adaptive_quadrature_agrees_with_a_fine_rule():
    model, x, _ = make_model("proposal", Real(), trained=True)
    coarse = model(x).diagnostics.log_partition
    fine = model(x, integrator=AdaptiveQuadrature(num_nodes=8192)).diagnostics.log_partition
    torch.testing.assert_close(coarse, fine, atol=1e-3, rtol=0)
