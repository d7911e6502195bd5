"""Chains of one-dimensional models: densities that integrate to one, draws that follow them, and known truths."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import nn

import energyreg as er
from energyreg.densities.bases import Marginal, ProposalBase
from energyreg.densities.spaces import Circle, Interval, Positive, Product, Real
from energyreg.evaluation import metrics
from energyreg.models.chain import AncestralSampling, ChainEncoder, EnergyChain
from energyreg.networks.encoders import MixedTableEncoder, TableEncoder

DOUBLE = torch.double


class Normal(nn.Module):
    """A proposal: the normal density whose mean is a weighted sum of the inputs."""

    def __init__(self, weights: list[float], scale: float) -> None:
        super().__init__()
        self.weights, self.scale, self.dim, self.periodic = weights, scale, 1, None
        self.nothing = nn.Parameter(torch.zeros(()))

    def forward(self, context):
        from energyreg.densities.mixtures import GaussianMixture

        mean = (context @ context.new_tensor(self.weights))[:, None, None]
        return GaussianMixture(torch.zeros_like(mean[..., 0]), mean, torch.full_like(mean, self.scale))


def factor(weights: list[float], scale: float) -> er.EnergyRegressionModel:
    return er.EnergyRegressionModel(
        nn.Identity(), None, proposal=Normal(weights, scale), base=ProposalBase(Marginal()), space=Real(1)
    )


MEMBERS = {"models": 1, "ensembles": 3}


def normal_chain(members: int = 1, order=(0, 1, 2)) -> EnergyChain:
    """Three correlated normal outputs of one input; an ensemble's members differ in their means."""
    weights = [[[1.0]], [[0.8, 0.5]], [[-0.7, 0.4, 0.2]]]
    factors = []
    for parts, scale in zip(weights, (0.6, 0.3, 0.5), strict=True):
        models = [factor([w + 0.4 * m for w in parts[0]], scale) for m in range(members)]
        factors.append(models[0] if members == 1 else er.EnergyEnsemble(models))
    return EnergyChain(factors, order).double().eval()


def random_chain(space, order=None, width: int = 8, seed: int = 0, features: int = 2, **options) -> EnergyChain:
    """A chain with the given random weights, whose energies are far from flat."""
    torch.manual_seed(seed)
    chain = EnergyChain.for_table(features, space, order=order, width=width, dropout=0.0, **options)
    with torch.no_grad():
        for part in chain.factors:
            part.head.context_map.weight.normal_(0, 0.5)
            part.head.context_map.bias.normal_(0, 1.0)
    return chain.double().eval()


X = torch.randn(4, 2, generator=torch.Generator().manual_seed(1), dtype=DOUBLE)


# ---------------------------------------------------------------------------------------------- the density


@pytest.mark.parametrize("members", MEMBERS)
def test_the_density_is_that_of_the_known_factors(members):
    count = MEMBERS[members]
    chain = normal_chain(count, order=(2, 0, 1))
    x = X[:, :1]
    y = torch.randn(5, 4, 3, generator=torch.Generator().manual_seed(0), dtype=DOUBLE)
    p = chain(x)
    first, second, third = y[..., 2], y[..., 0], y[..., 1]
    expected = torch.zeros(5, 4, dtype=DOUBLE)
    inputs = [x[:, 0].expand(5, 4)]
    for value, weights, scale in zip(
        (first, second, third), ([1.0], [0.8, 0.5], [-0.7, 0.4, 0.2]), (0.6, 0.3, 0.5), strict=True
    ):
        # The columns of the k-th factor: previous targets in the order of the chain, then x.
        columns = [*inputs[1:], inputs[0]]
        means = [sum((w + 0.4 * m) * c for w, c in zip(weights, columns, strict=True)) for m in range(count)]
        shift = [torch.distributions.Normal(mean, scale) for mean in means]
        expected = expected + torch.stack([q.log_prob(value) for q in shift]).logsumexp(0) - math.log(count)
        inputs.append(value)
    torch.testing.assert_close(p.log_prob(y), expected, atol=2e-3, rtol=0)


SPACES = {
    "real": (lambda: Real(2), (-8.0, 8.0), (-8.0, 8.0)),
    "interval and circle": (lambda: Product(Interval(0.0, 2.0), Circle(360.0)), (0.0, 2.0), (0.0, 360.0)),
    "circle and real": (lambda: Product(Circle(), Real()), (0.0, 2 * math.pi), (-8.0, 8.0)),
}


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
@pytest.mark.parametrize("space", SPACES)
def test_the_density_integrates_to_one_on_a_grid(space, order):
    """Midpoints of 120² cells; on the line the mass beyond ±8 of the base is about 2e-4."""
    make, *ranges = SPACES[space]
    p = random_chain(make(), order)(X[:2])
    axes = [low + (high - low) * (torch.arange(120, dtype=DOUBLE) + 0.5) / 120 for low, high in ranges]
    grid = torch.cartesian_prod(*axes)[:, None].expand(-1, 2, -1)
    area = math.prod((high - low) / 120 for low, high in ranges)
    total = p.log_prob(grid).exp().sum(0) * area
    torch.testing.assert_close(total, torch.ones(2, dtype=DOUBLE), atol=3e-3, rtol=0)


@pytest.mark.parametrize("members", MEMBERS)
def test_draws_follow_the_density(members):
    """By the probability integral transform of each factor, and against each other.

    The smallest of 12 p-values of exact draws is below 1e-4 in one seed of a thousand.
    """
    from scipy import stats

    chain = normal_chain(MEMBERS[members])
    x = X[:, :1]
    draws = chain(x).sample((400,), generator=torch.Generator().manual_seed(0))
    f = chain(x).energy(slice(0, 4))
    z = chain.space.to_model(draws)
    index = torch.arange(4).repeat(400)
    for position in range(3):
        p = f.factor(position, index, z[..., :position].flatten(0, 1))
        levels = p.cdf(z[..., position].flatten()).view(400, 4).numpy()
        for row in range(4):
            assert stats.kstest(levels[:, row], "uniform").pvalue > 1e-4


def test_draws_of_a_bent_density_follow_it():
    """Means over draws against integrals over a grid; 2,000 draws, four standard errors."""
    p = random_chain(Real(2), width=16, seed=3)(X[:2])
    draws = p.sample((2000,), generator=torch.Generator().manual_seed(2))
    axis = torch.linspace(-8, 8, 161, dtype=DOUBLE)
    grid = torch.cartesian_prod(axis, axis)[:, None].expand(-1, 2, -1)
    mass = p.log_prob(grid).softmax(0)
    for function in (
        lambda y: y[..., 0],
        lambda y: y[..., 1],
        lambda y: y[..., 0] * y[..., 1],
        lambda y: y[..., 1] ** 2,
    ):
        values, exact = function(draws), (mass * function(grid)).sum(0)
        assert ((values.mean(0) - exact).abs() < 4 * values.std(0) / math.sqrt(2000)).all()


def test_summaries_are_those_of_the_known_normal():
    """512 Sobol points: a marginal quantile is right to 1 / 512 in probability or so, a mean to a hundredth."""
    chain = normal_chain()
    x = X[:, :1]
    p = chain(x, integrator=AncestralSampling(1024))
    c = x[:, 0]
    mean = torch.stack([c, 0.8 * c + 0.5 * c, -0.7 * c + 0.4 * 1.3 * c + 0.2 * c], -1)
    variance = torch.tensor([0.36, 0.09 + 0.64 * 0.36, 0.0], dtype=DOUBLE)
    variance[2] = 0.25 + (-0.7 + 0.4 * 0.8) ** 2 * 0.36 + 0.16 * 0.09
    torch.testing.assert_close(p.mean, mean, atol=0.02, rtol=0)
    torch.testing.assert_close(p.variance, variance.expand(4, 3), atol=0.02, rtol=0)
    torch.testing.assert_close(p.median, mean, atol=0.03, rtol=0)
    half = 1.6449 * variance.sqrt()
    torch.testing.assert_close(p.interval(0.9), torch.stack([mean - half, mean + half], -1), atol=0.06, rtol=0)
    entropy = 3 * 0.5 * math.log(2 * math.pi * math.e) + math.log(0.6 * 0.3 * 0.5)
    torch.testing.assert_close(p.entropy(), torch.full((4,), entropy, dtype=DOUBLE), atol=0.05, rtol=0)
    torch.testing.assert_close(p.mode, mean, atol=0.02, rtol=0)
    threshold = p.highest_density_region(0.8).log_threshold  # of the normal: by the quantile of χ² of three degrees
    torch.testing.assert_close(threshold, torch.full_like(threshold, entropy * -1 + 1.5 - 4.6416 / 2), atol=0.1, rtol=0)
    assert (p.diagnostics.log_partition == 0).all()
    torch.testing.assert_close(
        p.marginal().interval(0.9), torch.stack([c - half[0], c + half[0]], -1), atol=1e-2, rtol=0
    )
    draws = p.sample((2000,), generator=torch.Generator().manual_seed(0))
    assert p.highest_density_region(0.8).contains(draws).double().mean() == pytest.approx(0.8, abs=0.03)
    assert math.isfinite(metrics.energy_score(p, draws[0], num_samples=32))


def test_several_modes_are_found():
    x = torch.zeros(1, 1, dtype=DOUBLE)
    two = er.EnergyEnsemble([factor([0.0], 0.2), factor([0.0], 0.2)]).double()
    with torch.no_grad():
        for member, shift in zip(two.members, (-1.0, 1.0), strict=True):
            member.encoder = Shift(shift)
            member.proposal.weights = [1.0]
    chain = EnergyChain([two, factor([1.0, 0.0], 0.3).double()]).eval()
    modes = chain(x).modes(num_starts=16, num_steps=40)
    assert int(modes.counts) == 2
    assert sorted(modes.values[0][:, 0].tolist()) == pytest.approx([-1.0, 1.0], abs=0.03)
    torch.testing.assert_close(modes.values[0][:, 0], modes.values[0][:, 1], atol=0.03, rtol=0)


class Shift(nn.Module):
    def __init__(self, by: float) -> None:
        super().__init__()
        self.by = by

    def forward(self, x):
        return x + self.by


def test_results_do_not_depend_on_the_memory_budget():
    chain = random_chain(Product(Real(), Circle()))
    x = torch.randn(9, 2, generator=torch.Generator().manual_seed(0), dtype=DOUBLE)
    y = chain(x).sample((3,), generator=torch.Generator().manual_seed(0))
    whole, small = (chain(x, memory_budget=budget) for budget in (2**28, 2**21))
    torch.testing.assert_close(whole.log_prob(y), small.log_prob(y))
    torch.testing.assert_close(whole.mean, small.mean)
    torch.testing.assert_close(
        whole.highest_density_region().log_threshold, small.highest_density_region().log_threshold
    )
    again = small.sample((3,), generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(again, y)


@pytest.mark.parametrize("previous", ["own", "plain"])
def test_the_gradient_is_that_of_finite_differences(previous):
    chain = random_chain(Product(Real(), Circle()), width=4)
    if previous == "plain":  # any encoder of the whole table will do
        torch.manual_seed(0)
        chain.factors[1].encoder = TableEncoder(3, 4, 1, 0.0).double()
        chain.factors[1].head.context_map = nn.Linear(4, 64).double()
    f = chain(X).energy(slice(0, 4))
    z = torch.rand(2, 4, 2, dtype=DOUBLE, generator=torch.Generator().manual_seed(0), requires_grad=True)
    assert torch.autograd.gradcheck(f, (z,), eps=1e-6, atol=1e-4)
    values = f(z.detach())
    with torch.no_grad():
        torch.testing.assert_close(f(z), values)


def test_training_mode_carries_gradients_to_every_factor():
    chain = random_chain(Real(2)).train()
    chain(X).log_prob(torch.zeros(4, 2)).sum().backward()
    for part in chain.factors:
        assert all(p.grad is not None and p.grad.isfinite().all() for p in part.parameters())


# ---------------------------------------------------------------------------------------------- training


def bent(rows: int, seed: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """x, a bent pair y, and its true log-density."""
    generator = torch.Generator().manual_seed(seed)
    x = 2 * torch.rand(rows, 1, generator=generator, dtype=DOUBLE) - 1
    noise = torch.randn(rows, 2, generator=generator, dtype=DOUBLE)
    first = x[:, 0] + noise[:, 0]
    second = first.square() + 0.3 * noise[:, 1]
    truth = torch.distributions.Normal(0, 1).log_prob(noise).sum(1) - math.log(0.3)
    return x, torch.stack([first, second], 1), truth


@pytest.mark.parametrize("members", [1, 2])
def test_training_recovers_a_bent_density(members, tmp_path):
    """A normal density would be 0.5 log(2.09 / 0.09) = 1.57 nats away: it does not know how y₂ bends with y₁."""
    x, y, _ = bent(300, 0)
    chain = er.fit_chain(
        lambda: EnergyChain.for_table(1, Real(2), width=32), x, y, n_members=members, epochs=12, batch_size=32, seed=0
    )
    assert [len(histories) for histories in chain.histories] == [members] * 2
    x, y, truth = bent(500, 1)
    assert float((truth - chain(x).log_prob(y)).mean()) < 0.4
    again = er.load(er.save(chain, tmp_path / "chain"))
    assert isinstance(again, EnergyChain) and again.order == chain.order
    assert torch.equal(again(x).log_prob(y), chain(x).log_prob(y))
    assert torch.equal(again(x[:5]).mean, chain(x[:5]).mean)


def test_a_seed_gives_the_same_chain_whatever_else_happens():
    x, y, _ = bent(80, 0)

    def trained(seed: int) -> torch.Tensor:
        chain = er.fit_chain(lambda: EnergyChain.for_table(1, Real(2), width=8), x, y, epochs=1, seed=seed)
        return chain(x).log_prob(y)

    before = torch.get_rng_state()
    first = trained(0)
    assert torch.equal(before, torch.get_rng_state())
    torch.rand(3)
    assert torch.equal(first, trained(0)) and not torch.equal(first, trained(1))


def test_categories_weights_and_orders_are_taken():
    rng = np.random.default_rng(0)
    x = np.stack([rng.normal(size=90), rng.integers(0, 3, 90)], 1)
    y = np.stack([x[:, 0], np.exp(x[:, 1]), rng.uniform(0, 6, 90)], 1)
    space = Product(Real(), Positive(), Circle())
    chain = er.fit_chain(
        lambda: EnergyChain.for_table(2, space, order=[2, 0, 1], width=8, cardinalities=[3]), x, y, epochs=1,
        sample_weight=rng.uniform(0, 1, 90), validation=(x[:9], y[:9]), seed=1,
    )  # fmt: skip
    encoder = chain.factors[2].encoder
    assert isinstance(encoder, ChainEncoder) and isinstance(encoder.inputs, MixedTableEncoder)
    assert encoder.num_previous == 3  # an angle is two columns
    assert chain.fitted and chain(x).log_prob(y).isfinite().all()
    assert repr(chain.space) == repr(space)


def test_a_chain_sees_the_previous_targets_in_model_space():
    x, y, _ = bent(60, 0)
    chain = EnergyChain.for_table(1, Product(Real(), Circle(360.0)), order=[1, 0], width=8)
    chain.space.fit(torch.stack([y[:, 0], 50 * y[:, 1]], 1))
    table = chain.table(1, x, torch.stack([y[:, 0], 50 * y[:, 1]], 1))
    angle = chain.space.to_model(torch.stack([y[:, 0], 50 * y[:, 1]], 1))[:, 1]
    torch.testing.assert_close(table, torch.stack([angle.sin(), angle.cos(), x[:, 0]], 1))


# ---------------------------------------------------------------------------------------------- bad input


def small() -> EnergyChain:
    return EnergyChain.for_table(1, Real(2), width=4)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: EnergyChain([]), "factors is empty"),
        (lambda: EnergyChain([nn.Linear(1, 1)]), r"factors\[0\] is a Linear"),
        (lambda: EnergyChain([er.EnergyRegressionModel.for_table(1, Real(2), width=4)]), "2 target dimensions"),
        (
            lambda: EnergyChain([factor([1.0], 1.0), factor([1.0], 1.0).double()]),
            r"factors\[1\] has dtype torch.float64",
        ),
        (lambda: EnergyChain.for_table(1, Real(2), order=[0, 0]), r"order is \[0, 0\]; expected each of the outputs"),
        (lambda: small()(torch.zeros(2, 3)), r"x has shape \(2, 3\), but the model takes"),
        (lambda: small()(torch.zeros(2, 1)).log_prob(torch.zeros(2, 3)), r"y has shape \(2, 3\)"),
        (lambda: small()(torch.zeros(2, 1), integrator=er.integrators.ImportanceSampling(8)), "AncestralSampling"),
        (lambda: small().check_targets([[0.0]]), r"y has shape \(1, 1\), but the chain has 2 outputs"),
        (lambda: small().check_targets([[0.0, math.nan]]), "y has NaN"),
        (lambda: AncestralSampling(0), "num_samples is 0"),
        (lambda: AncestralSampling(8, 4), "num_nodes is 4"),
        (lambda: ChainEncoder(nn.Linear(1, 1), TableEncoder(1)), "previous is a Linear, which has no num_features"),
        (lambda: ChainEncoder(TableEncoder(1), TableEncoder(1), dropout=1.0), "dropout is 1.0"),
        (lambda: er.fit_chain(small(), [[0.0]], [[0.0, 1.0]]), "build is a EnergyChain; expected a callable"),
        (lambda: er.fit_chain(small, [[0.0]], [[0.0, 1.0]]), "x has 1 row; expected at least 2"),
        (lambda: er.fit_chain(small, [[0.0], [1.0]], [[0.0, 1.0]]), "x has 2 rows, but y has 1"),
        (lambda: er.fit_chain(small, *bent(20, 0)[:2], n_members=0), "n_members is 0"),
        (lambda: er.fit_chain(small, *bent(20, 0)[:2], resume=True), "resume is given"),
        (lambda: er.fit_chain(small, *bent(20, 0)[:2], validation="half"), "validation is 'half'"),
        (lambda: er.fit_chain(lambda: 3, *bent(20, 0)[:2]), "build returned a int; expected an EnergyChain"),
    ],
)
def test_a_bad_argument_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()


# ---------------------------------------------------------------------------------------------- the estimator

RNG = np.random.default_rng(0)
INPUTS = RNG.normal(size=(150, 2))
OUTPUTS = np.stack([INPUTS[:, 0] + 0.3 * RNG.normal(size=150), np.exp(INPUTS[:, 1] + 0.2 * RNG.normal(size=150))], 1)
FAST = {
    "target": ["real", "positive"], "n_members": 1, "epochs": 2, "width": 8, "num_components": 2, "random_state": 0,
}  # fmt: skip


@pytest.mark.parametrize("outputs", ["joint", "chain"])
def test_the_estimator_calibrates_and_conformalises_several_outputs(outputs, tmp_path):
    from sklearn.base import clone

    regressor = er.EnergyRegressor(**FAST, outputs=outputs, conformal=True).fit(INPUTS, OUTPUTS)
    assert isinstance(regressor.model_, EnergyChain) is (outputs == "chain")
    assert regressor.calibration_.base_share > 0
    assert clone(regressor).outputs == outputs
    few = INPUTS[:5]
    box = regressor.predict_interval(few, 0.8)
    assert box.shape == (5, 2, 2) and (box[:, 1, 0] > 0).all() and (box[..., 0] < box[..., 1]).all()
    # By itself each interval is longer than the model's, as all must hold together.
    assert regressor.sample(few, 3).shape == (5, 3, 2) and regressor.predict_quantiles(few, [0.1, 0.9]).shape == (
        5,
        2,
        2,
    )
    region = regressor.predict_highest_density_region(few, 0.8)
    again = er.EnergyRegressor.load(regressor.save(tmp_path / "model"))
    assert type(again.model_) is type(regressor.model_) and again.n_members_ == 1
    assert np.array_equal(again.predict_interval(few, 0.8), box)
    assert torch.equal(again.predict_highest_density_region(few, 0.8).log_threshold, region.log_threshold)
    assert np.array_equal(again.score_samples(few, OUTPUTS[:5]), regressor.score_samples(few, OUTPUTS[:5]))


def test_members_of_a_chain_and_a_time_budget(tmp_path):
    settings = {**FAST, "n_members": 2, "outputs": "chain"}
    regressor = er.EnergyRegressor(**settings, time_budget=60).fit(INPUTS, OUTPUTS)
    assert regressor.n_members_ == 2 and len(regressor.histories_) == 4  # of each factor
    assert all(isinstance(part, er.EnergyEnsemble) for part in regressor.model_.factors)
    again = er.EnergyRegressor.load(regressor.save(tmp_path / "model"))
    assert again.n_members_ == 2
    assert np.array_equal(again.predict(INPUTS[:4]), regressor.predict(INPUTS[:4]))


def test_boxes_of_the_estimator_cover_together():
    """60 rows for the scores, 150 new ones: four standard errors of √(0.16 / 61 + 0.16 / 150) = 0.061."""
    rng = np.random.default_rng(1)
    x = rng.normal(size=(350, 1))
    y = np.concatenate([x, -x], 1) + rng.normal(size=(350, 2)) * (1 + (x > 0))
    settings = {**FAST, "target": "real", "validation_fraction": 0.3, "outputs": "chain", "conformal": True}
    regressor = er.EnergyRegressor(**settings).fit(x[:200], y[:200])
    box = regressor.predict_interval(x[200:], 0.8)
    inside = ((box[..., 0] <= y[200:]) & (y[200:] <= box[..., 1])).all(1)
    assert abs(inside.mean() - 0.8) < 4 * 0.061


def test_a_bad_choice_of_outputs_is_named():
    with pytest.raises(ValueError, match="outputs is 'both'; expected one of 'auto', 'joint', 'chain'"):
        er.EnergyRegressor(**FAST, outputs="both").fit(INPUTS, OUTPUTS)


def test_weights_of_a_factors_members_count():
    chain, first = normal_chain(3), normal_chain(1)
    x = torch.linspace(-1, 1, 4, dtype=DOUBLE)[:, None]
    y = torch.zeros(4, 3, dtype=DOUBLE)
    for part in chain.factors:
        part.weights = [1.0, 0.0, 0.0]
    assert torch.allclose(chain(x).log_prob(y), first(x).log_prob(y), atol=1e-4)
    for part in chain.factors:
        part.weights = [0.25, 0.0, 0.75]
    draws = chain(x).sample((4000,), generator=torch.Generator().manual_seed(0))
    # The first output's mean is x times 1, 1.4 or 1.8.
    expected = x[:, 0] * (0.25 * 1.0 + 0.75 * 1.8)
    assert torch.allclose(draws[..., 0].mean(0), expected, atol=5 * 0.7 / 4000**0.5)
