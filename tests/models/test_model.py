"""The model's construction, its inputs and the errors that a user meets."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
import scipy.stats
import torch
from torch import nn

import energyreg as er
from energyreg.densities.bases import Lebesgue, Marginal, ProposalBase
from energyreg.densities.spaces import Circle, Interval, Positive, Product, Real
from energyreg.inference.integrators import AdaptiveQuadrature, ImportanceSampling, StratifiedQuadrature
from energyreg.networks.heads import JointHead, SeparableHead
from energyreg.networks.proposals import MixtureDensityNetwork

MODEL = er.EnergyRegressionModel


def encoder(width: int = 8) -> nn.Module:
    return nn.Sequential(nn.Linear(2, width), nn.SiLU())


def data(n: int = 64) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(n, 2, generator=generator)
    return x, x[:, 0] + 0.3 * torch.randn(n, generator=generator)


def test_a_plain_torch_loop_trains_a_model():
    x, y = data(256)
    torch.manual_seed(0)
    model = MODEL(encoder(), SeparableHead(8, channels=16, width=16))
    model.fit_preprocessing(x, y)
    objective = er.objectives.ExactMaximumLikelihood(num_nodes=64)
    optimiser = torch.optim.AdamW(model.parameters(), lr=1e-2)
    before = model(x).log_prob(y).mean()
    for _ in range(60):
        loss = objective(*model.condition(x, y)).per_example.mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    # The targets' spread given x is 0.3 of 1.04: a gain of up to log(1.04 / 0.3) = 1.2 nats.
    assert model.eval()(x).log_prob(y).mean() > before + 0.5


@pytest.mark.parametrize(
    "space", [Real(1), Positive(1), Interval(0.0, 2.0), Circle(), Real(2), Real(3), Product(Real(), Circle())]
)
def test_table_models_take_every_space(space):
    model = MODEL.for_table(2, space, width=8)
    baseline = MODEL.mixture_for_table(2, space, width=8, num_components=2)
    x = torch.randn(6, 2)
    for m in (model, baseline):
        p = m(x)
        y = p.sample((3,))
        assert y.shape == (3, 6, space.dim) and p.log_prob(y).shape == (3, 6)
        assert p.log_prob(y).isfinite().all()
        m.default_objective()(*m.condition(x, y[0])).per_example.sum().backward()


def test_inputs_may_be_arrays_tensors_or_frames():
    x, _ = data(5)
    model = MODEL.for_table(2, width=8).eval()
    expected = model(x).mean
    for other in (
        x.numpy(),
        x.double(),
        pd.DataFrame(x.numpy()),
        x.tolist(),
        x.numpy()[::-1][::-1],
        np.asfortranarray(x.numpy()),
    ):
        assert torch.equal(model(other).mean, expected)
    assert model(np.arange(10).reshape(5, 2)).mean.shape == (5, 1)


def test_a_model_on_integers_and_half_precision_inputs_keeps_its_dtype():
    model = MODEL.for_table(2, width=8).double().eval()
    assert model(np.ones((3, 2), dtype=np.float16)).log_prob(np.array([1, 2, 3])).dtype == torch.double


@pytest.mark.parametrize(
    ("x", "message"),
    [
        (np.zeros((0, 2)), r"x has shape \(0, 2\)"),
        (np.zeros((4, 3)), r"x has shape \(4, 3\).*\(B, 2\)"),
        (np.zeros(4), r"x has shape \(4,\)"),
        (np.array([[0.0, np.nan], [1.0, 2.0]]), "NaN or infinite values in 1 of 2 rows, the first in row 0"),
        (np.array([[0.0, 1.0], [np.inf, 2.0]]), "the first in row 1"),
        (np.array([["a", "b"]], dtype=object), "dtype object"),
        (pd.DataFrame({"a": ["x", "y"], "b": [1, 2]}), "dtype object"),
        (np.array([["a", "b"]]), "dtype <U1"),
        ([[1.0, 2.0], [3.0]], "x is not an array of numbers"),
        (np.ones((2, 2), dtype=complex), "complex"),
    ],
)
def test_bad_inputs_are_named(x, message):
    with pytest.raises(ValueError, match=message):
        MODEL.for_table(2, width=8)(x)


@pytest.mark.parametrize(
    ("space", "y", "message"),
    [
        (Real(1), np.zeros((0,)), r"y has shape \(0, 1\)"),
        (Real(1), np.ones((4, 2)), r"y has shape \(4, 2\).*\(n, 1\) or \(n,\)"),
        (Real(2), np.ones(4), r"y has shape \(4,\).*\(n, 2\)"),
        (Real(1), np.ones(4), "the same value in every row"),
        (Real(1), np.ones(1), "rows"),
        (Real(1), np.array([0.0, np.nan]), "NaN"),
        (Real(1), np.array([0.0, np.inf]), "inf"),
        (Positive(1), np.array([1.0, -2.0, 3.0]), "-2"),
        (Interval(0.0, 1.0), np.array([0.5, 0.2, 3.0]), "3"),
        (Real(1), np.array([None, 1.0], dtype=object), "dtype object"),
    ],
)
def test_bad_targets_are_named(space, y, message):
    model = MODEL.for_table(2, space, width=8)
    with pytest.raises(ValueError, match=message):
        model.fit_preprocessing(np.random.default_rng(0).normal(size=(len(y), 2)), y)


def test_parts_must_fit_together():
    with pytest.raises(ValueError, match="head is for 2 target dimension"):
        MODEL(encoder(), SeparableHead(8, dim=2))
    with pytest.raises(ValueError, match="proposal is for 1 target dimension"):
        MODEL(encoder(), SeparableHead(8, dim=2), proposal=MixtureDensityNetwork(8), space=Real(2))
    with pytest.raises(ValueError, match="periodic"):
        MODEL(encoder(), SeparableHead(8), space=Circle())
    with pytest.raises(ValueError, match="base has 1 dimension"):
        MODEL(encoder(), JointHead(8, dim=2), base=Marginal(1), space=Real(2))
    with pytest.raises(ValueError, match="proposal is None"):
        MODEL(encoder(), SeparableHead(8), base=ProposalBase())
    with pytest.raises(ValueError, match="head is None"):
        MODEL(encoder(), None, base=Marginal())
    with pytest.raises(ValueError, match="pass a proposal"):
        MODEL(encoder(), JointHead(8, dim=3), space=Real(3))
    with pytest.raises(ValueError, match="no proposal"):
        MODEL(encoder(), SeparableHead(8)).proposal_model()


def test_a_head_that_returns_the_wrong_shape_is_named():
    class Wrong(nn.Module):
        def forward(self, context, v):
            return v.new_zeros(*v.shape[:-2], len(context), 1)

    x, y = data(8)
    model = MODEL(encoder(), Wrong())
    with pytest.raises(ValueError, match=r"The head returned shape .*expected"):
        er.objectives.ExactMaximumLikelihood()(*model.condition(x, y))
    with pytest.raises(ValueError, match="The head returned shape"):
        model(x).log_prob(y)


def test_any_callable_module_is_a_head():
    class Mine(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = nn.Sequential(nn.Linear(9, 16), nn.Tanh(), nn.Linear(16, 1))

        def forward(self, context, v):
            shape = torch.broadcast_shapes(context.shape[:-1], v.shape[:-1])
            return self.net(torch.cat([context.expand(*shape, -1), v.expand(*shape, -1)], -1))[..., 0]

    x, y = data(8)
    model = MODEL(encoder(), Mine(), base=Lebesgue())
    model.fit_preprocessing(x, y)
    assert model.eval()(x).log_prob(y).isfinite().all()


@pytest.mark.parametrize("make", [
    lambda: ImportanceSampling(0), lambda: StratifiedQuadrature(0), lambda: AdaptiveQuadrature(tolerance=0.0),
    lambda: er.objectives.NCEWithLearnedProposal(num_samples=0),
    lambda: er.objectives.ExactMaximumLikelihood(num_nodes=0),
    lambda: er.objectives.MaximumLikelihoodWithLearnedProposal(num_samples=-1),
    lambda: er.objectives.ExactMaximumLikelihood(proposal_weight=-1.0),
    lambda: er.objectives.NCEWithLearnedProposal(kl_weight=0.0, nll_weight=0.0),
])  # fmt: skip
def test_bad_counts_and_weights_are_named(make):
    with pytest.raises(ValueError, match=r"num_samples|num_nodes|tolerance|weight"):
        make()


def test_bad_questions_to_a_distribution_are_named():
    x, _ = data(4)
    p = MODEL.for_table(2, width=8).eval()(x)
    with pytest.raises(ValueError, match=r"y has shape \(5, 1\)"):
        p.log_prob(torch.zeros(5))
    with pytest.raises(ValueError, match="level is 90"):
        p.interval(90)
    with pytest.raises(ValueError, match="level is 0"):
        p.highest_density_region(0)
    with pytest.raises(ValueError, match=r"outside \[0, 1\]"):
        p.icdf(torch.full((4,), 1.5))
    with pytest.raises(ValueError, match="does not broadcast"):
        p.icdf(torch.full((3,), 0.5))
    two = MODEL.for_table(2, Real(2), width=8).eval()(x)
    with pytest.raises(NotImplementedError, match="one target dimension"):
        two.cdf(torch.zeros(4, 2))
    with pytest.raises(ValueError, match="for one dimension"):
        MODEL.for_table(2, Real(2), width=8)(x, integrator=AdaptiveQuadrature())
    with pytest.raises(ValueError, match="needs a proposal"):
        MODEL.for_table(2, width=8)(x, integrator=ImportanceSampling(16)).log_prob(torch.zeros(4))


def test_preprocessing_is_fitted_once():
    x, y = data()
    model = MODEL.for_table(2, width=8)
    assert not model.fitted
    model.fit_preprocessing(x, y)
    assert model.fitted
    loc = model.space.loc.clone()
    model.fit_preprocessing(x + 1, y + 100)
    assert torch.equal(model.space.loc, loc)


def test_the_encoder_runs_once_per_row():
    calls = []

    class Counting(nn.Module):
        def forward(self, x):
            calls.append(len(x))
            return x

    x, y = data(10)
    model = MODEL(Counting(), SeparableHead(2, channels=4, width=4)).eval()
    p = model(x)
    _ = p.mean, p.interval(0.9), p.log_prob(y), p.sample((3,)), p.mode, p.diagnostics
    assert sum(calls) == 10


def test_a_model_is_a_plain_module():
    x, y = data()
    model = MODEL.for_table(2, width=8)
    model.fit_preprocessing(x, y)
    other = MODEL.for_table(2, width=8)
    other.load_state_dict(model.state_dict())
    assert other.fitted
    assert torch.equal(other.eval()(x).log_prob(y), model.eval()(x).log_prob(y))
    assert model.half().space.loc.dtype == torch.double


def twin(objective_dim: int = 1, base=None) -> er.EnergyRegressionModel:
    torch.manual_seed(0)
    return MODEL(
        er.encoders.TwinEncoder(encoder(), encoder(6)),
        er.heads.SelfNormalisedHead(SeparableHead(8, objective_dim, channels=16, width=16), 8),
        proposal=MixtureDensityNetwork(6, objective_dim, num_components=2, width=8),
        base=base,
        space=Real(objective_dim),
    )


@pytest.mark.parametrize("base", [None, ProposalBase()])
def test_the_halves_of_a_twin_model_teach_only_themselves(base):
    x, y = data()
    model = twin(base=base)
    model.fit_preprocessing(x, y)
    with torch.no_grad():  # away from g = 0, where no gradient reaches the head's context
        for parameter in model.head.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1))
    generator = torch.Generator()

    def gradients(**weights):
        model.zero_grad(set_to_none=True)
        objective = er.objectives.NCEWithLearnedProposal(8, **weights)
        loss = objective(*model.condition(x, y), generator=generator.manual_seed(0)).per_example.sum()
        loss.backward()
        return {name: None if p.grad is None else p.grad.clone() for name, p in model.named_parameters()}

    both, nll, kl = (gradients(kl_weight=a, nll_weight=b) for a, b in ((0.5, 0.5), (0.0, 1.0), (1.0, 0.0)))
    for name in both:
        assert (both[name] is not None and both[name].abs().sum() > 0) or name.startswith("head.log_normaliser"), name
        if name.startswith(("proposal", "encoder.proposal")):
            torch.testing.assert_close(both[name], (nll[name] + kl[name]) / 2, rtol=1e-4, atol=1e-4)
        else:  # whatever teaches the proposal, the energy's half does not feel it
            assert torch.equal(both[name], nll[name]) and torch.equal(both[name], kl[name]), name
    # By its likelihood the proposal's half learns as if it were alone.
    model.zero_grad(set_to_none=True)
    er.objectives.ProposalNLL()(*model.condition(x, y)).per_example.sum().backward()
    for name, parameter in model.named_parameters():
        if name.startswith(("proposal", "encoder.proposal")):
            torch.testing.assert_close(parameter.grad, nll[name])
        else:
            assert parameter.grad is None or not parameter.grad.any(), name


def test_a_twin_model_and_its_proposal_predict():
    x, y = data()
    model = twin()
    er.fit(
        model, x, y, epochs=3, batch_size=32, progress=False,
        objective=er.objectives.NCEWithLearnedProposal(16, kl_weight=0.5, nll_weight=0.5),
    )  # fmt: skip
    alone = model.proposal_model()
    q = model.energy(x).q
    z = model.space.to_model(y[:, None])
    expected = q.log_prob(z.float()) - model.space.scale.log().float()
    torch.testing.assert_close(alone(x).log_prob(y), expected.detach(), rtol=1e-4, atol=1e-4)
    assert alone(x).mean.shape == model(x).mean.shape == (64, 1)
    assert alone(x[:3]).interval(0.9).isfinite().all()
    # Of the energy's half it knows nothing.
    with torch.no_grad():
        for part in (model.head, model.encoder.energy):
            for parameter in part.parameters():
                parameter.fill_(7.0)
    torch.testing.assert_close(alone(x).log_prob(y), expected.detach(), rtol=1e-4, atol=1e-4)


def test_the_self_normalised_likelihood_trains_f_to_be_the_log_density():
    x, y = data(400)
    torch.manual_seed(0)
    model = twin()
    model.fit_preprocessing(x, y)
    with torch.no_grad():
        model.head.log_normaliser.bias.fill_(-1.0)  # log Z = 1 at the start
    optimiser = torch.optim.AdamW(model.parameters(), lr=5e-3)
    objective = er.objectives.SelfNormalisedLikelihood(32)
    before = model(x).log_prob(y).mean()
    for _ in range(150):
        loss = objective(*model.condition(x, y)).per_example.mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    f = model.energy(x)
    log_z = StratifiedQuadrature(4096).log_weights(f).logsumexp(0)
    # From 1.0; 150 steps with 32 samples a row leave 0.2 or so.
    assert log_z.abs().mean() < 0.4
    assert model.eval()(x).log_prob(y).mean() > before + 0.5


def test_with_few_rows_a_table_model_starts_as_its_mixture() -> None:
    torch.manual_seed(0)
    few, many, unknown = (er.EnergyRegressionModel.for_table(2, width=8, num_rows=n) for n in (9_999, 10_000, None))
    assert isinstance(few.base, er.bases.ProposalBase)
    assert many.proposal is None
    assert unknown.proposal is None
    x, y = torch.randn(6, 2), torch.randn(6)
    few.eval()
    torch.testing.assert_close(few(x).log_prob(y), few.proposal_model().eval()(x).log_prob(y), rtol=0, atol=1e-3)


def _standardised(dim: int = 1, detach: bool = True) -> er.EnergyRegressionModel:
    torch.manual_seed(0)
    head = er.heads.JointHead(8, dim, width=16)
    torch.nn.init.normal_(head.output.weight, std=0.5)
    proposal = er.proposals.MixtureDensityNetwork(8, dim, 2)
    base = er.bases.ProposalBase(er.bases.Marginal(dim), detach=detach, standardised=True)
    model = er.EnergyRegressionModel(
        er.encoders.VectorEncoder(3, 8, dropout=0), head, proposal=proposal, base=base, space=er.spaces.Real(dim)
    )
    model.fit_preprocessing(torch.randn(50, 3), torch.randn(50, dim))
    return model.double()


def test_a_standardised_head_sees_the_distance_from_the_proposal() -> None:
    model = _standardised()
    f = model.energy(torch.randn(4, 3, dtype=torch.double))
    z = torch.randn(5, 4, 1, dtype=torch.double)
    t = ((z - f.q.mean) / f.q.variance.sqrt()).detach()
    # 2 F(t) - 1 with the cdf of Student's t of two degrees of freedom.
    v = torch.as_tensor(2 * scipy.stats.t(2).cdf(t.numpy()) - 1)
    torch.testing.assert_close(f(z), f.q.log_prob(z) + model.head(f.context, v))
    # In the reference's coordinates, and for points that the rows share, it is the same function.
    u = model.base.reference.to_unit(z)
    expected = f(z) - model.base.reference.log_prob(z)
    torch.testing.assert_close(f.relative(u), expected, rtol=0, atol=1e-6)
    shared = torch.tensor([[[0.2]], [[0.7]]], dtype=torch.double)
    torch.testing.assert_close(f.relative(shared), f.relative(shared.expand(2, 4, 1)))


def test_a_standardised_density_integrates_to_one() -> None:
    p = _standardised().eval()(torch.randn(4, 3))
    grid = torch.linspace(-30, 30, 60_001, dtype=torch.double)
    mass = torch.trapezoid(p.prob(grid[:, None, None].expand(-1, 4, 1)), grid, dim=0)
    # The adaptive quadrature's tolerance of 1e-3 nats, and the tails beyond ±30.
    torch.testing.assert_close(mass, torch.ones_like(mass), rtol=0, atol=2e-3)


@pytest.mark.parametrize("detach", [True, False])
def test_the_proposal_hears_of_a_standardised_energy_unless_detached(detach: bool) -> None:
    model = _standardised(2, detach)
    f, _, z = model.condition(torch.randn(4, 3, dtype=torch.double), torch.randn(4, 2, dtype=torch.double))
    f(z).sum().backward()
    assert (model.proposal.output.weight.grad is None) == detach
    assert (model.encoder.layers[0].weight.grad is None) == detach
    assert model.head.output.weight.grad is not None


@pytest.mark.parametrize("integrator", [ImportanceSampling(200), StratifiedQuadrature(200)], ids=repr)
@pytest.mark.parametrize("space", [Real(), Interval(0.0, 2.0), Circle(360.0, low=-90.0)], ids=repr)
def test_a_cdf_of_points_rises_to_one_and_icdf_inverts_it(space, integrator):
    torch.manual_seed(0)
    model = MODEL.mixture_for_table(2, space, width=8).double().eval()
    p = model(torch.randn(3, 2, dtype=torch.double), integrator=integrator)
    level = torch.linspace(0, 1, 9, dtype=torch.double)[:, None].expand(-1, 3)
    y = p.icdf(level)
    assert (y.diff(dim=0) >= 0).all()
    cdf = p.cdf(y[..., None])
    # The smallest point that reaches the level; a point of the grid weighs a few per cent at most.
    assert (cdf >= level - 1e-9).all() and (cdf <= level + 0.1).all()
    assert torch.allclose(cdf[-1], torch.ones(3, dtype=torch.double))


def test_log_prob_has_a_gradient_where_rows_get_nodes_of_their_own():
    torch.manual_seed(0)
    x, y = data(8)
    model = MODEL.for_table(2, width=8, dropout=0.0, num_rows=100).double()
    model.fit_preprocessing(x.double(), y.double())
    weights = list(model.head.parameters())
    with torch.no_grad():
        for weight in weights:  # away from the start, where g = 0
            weight.add_(0.3 * torch.randn_like(weight))

    def total() -> torch.Tensor:
        return model(x, integrator=AdaptiveQuadrature(1024, tolerance=1e-300)).log_prob(y).sum()

    gradient = torch.autograd.grad(total(), weights)
    ways = [torch.randn_like(weight) for weight in weights]
    slope = sum(float((g * way).sum()) for g, way in zip(gradient, ways, strict=True))
    ends = []
    for sign in (1e-4, -2e-4):
        with torch.no_grad():
            for weight, way in zip(weights, ways, strict=True):
                weight.add_(sign * way)
        ends.append(float(total().detach()))  # with gradients on, as then no node reads a table
    # The nodes move with the weights, by which the difference errs as log Z does: 2 % with 64 nodes, 4e-6 with 1024.
    assert slope == pytest.approx((ends[0] - ends[1]) / 2e-4, rel=1e-4)
