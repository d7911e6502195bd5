"""Laws of what a block of rows says in user units: at the ends of an interval, for NaN, and in training."""

import math
import warnings

import pytest
import torch
from torch import Tensor, nn

import energyreg as er
from energyreg.densities.bases import Lebesgue, Marginal, ProposalBase
from energyreg.densities.spaces import Circle, Interval, Positive, Product, Real, TargetSpace
from energyreg.inference.integrators import AdaptiveQuadrature
from energyreg.networks.heads import JointHead, SeparableHead
from energyreg.networks.proposals import MixtureDensityNetwork

BASES = {
    "lebesgue": lambda: er.EnergyRegressionModel(nn.Linear(3, 16), SeparableHead(16), base=Lebesgue(), space=SPACE()),
    "marginal": lambda: er.EnergyRegressionModel(nn.Linear(3, 16), SeparableHead(16), base=Marginal(), space=SPACE()),
    "proposal": lambda: er.EnergyRegressionModel(
        nn.Linear(3, 16),
        SeparableHead(16),
        proposal=MixtureDensityNetwork(16),
        base=ProposalBase(detach=False),
        space=SPACE(),
    ),
    "mixture": lambda: er.EnergyRegressionModel.mixture_for_table(3, SPACE(), width=8),
}
LOW, HIGH = 0.0, 0.1  # of which single precision has no exact number


def SPACE() -> TargetSpace:
    return Interval(LOW, HIGH)


def clipped(kind: str, *, wiggly: bool = True) -> tuple[er.EnergyRegressionModel, Tensor]:
    """A model of targets of which a third stand at the ends, with an energy as uneven as after training."""
    with torch.random.fork_rng():
        torch.manual_seed(2)
        model = BASES[kind]().double()
        x, t = torch.randn(300, 3).double(), torch.randn(300, 1).double()
        model.fit_preprocessing(x, (0.05 + 0.05 * t).clamp(LOW, HIGH))
        if wiggly and model.head is not None:
            with torch.no_grad():
                for parameter in model.head.parameters():
                    parameter.add_(torch.randn_like(parameter) / 2)
    return model.eval(), x[:6]


def towards_the_ends() -> Tensor:
    steps = torch.cat([torch.zeros(1), torch.logspace(-14, 0, 20_001, dtype=torch.float64)]) * (HIGH - LOW) / 2
    return torch.cat([LOW + steps, HIGH - steps.flip(0)])


@pytest.mark.parametrize("kind", BASES)
def test_a_density_of_targets_at_the_ends_integrates_to_one_and_its_cdf_is_inverted(kind: str) -> None:
    model, x = clipped(kind)
    p, y = model(x), towards_the_ends()
    mass = torch.trapezoid(p.log_prob(y[:, None, None].expand(-1, len(x), 1)).exp(), y, dim=0)
    torch.testing.assert_close(mass, torch.ones_like(mass), rtol=0, atol=1e-3)
    level = torch.tensor([1e-6, 0.01, 0.1, 0.5, 0.9, 0.99, 1 - 1e-6], dtype=torch.float64)[:, None].expand(-1, len(x))
    found = p.cdf(p.icdf(level)[..., None])
    torch.testing.assert_close(found, level, rtol=0, atol=1e-8)
    ends = torch.tensor([LOW, HIGH], dtype=torch.float64)[:, None, None].expand(-1, len(x), 1)
    torch.testing.assert_close(p.cdf(ends)[:, 0], torch.tensor([0.0, 1.0]).double(), rtol=0, atol=1e-9)
    assert p.log_prob(ends).isfinite().all()


def test_quantiles_and_intervals_that_run_to_an_end_hold_it() -> None:
    model, x = clipped("marginal", wiggly=False)  # a sixth of the probability at each end
    p = model(x)
    assert p.quantile([0.001, 0.999])[:, 0].tolist() == [LOW, HIGH]
    assert p.interval(0.9).tolist() == [[LOW, HIGH]] * len(x)
    assert p.central_quantiles([0.5])[0].tolist() == p.icdf(0.5)[:, None].tolist()
    single = model.float()(x.float()).interval(0.9)
    assert bool(single.dtype == torch.float32) and bool(model.space.contains(single.T[..., None]).all())
    both = er.EnergyRegressionModel(
        nn.Linear(3, 16), JointHead(16, 2), base=Marginal(2), space=Product(Interval(LOW, HIGH), Real())
    ).double()
    y = torch.cat([torch.rand(300, 1).mul(2).sub(0.5).clamp(0, 1) * HIGH, torch.randn(300, 1)], 1)
    both.fit_preprocessing(torch.randn(300, 3), y)
    assert both.eval()(x.double()).interval(0.9)[:, 0].tolist() == [[LOW, HIGH]] * len(x)


@pytest.mark.parametrize("space", [Real(), Positive(), Interval(0, 1), Circle(), Product(Real(), Interval(0, 1))])
def test_nan_has_no_density(space: TargetSpace) -> None:
    dim = space.dim
    model = er.EnergyRegressionModel(nn.Linear(3, 8), JointHead(8, dim, space.periodic),
                                     base=Marginal(dim, space.periodic), space=space).eval()  # fmt: skip
    p = model(torch.zeros(2, 3))
    y = torch.full((2, dim), 0.5)
    y[1, -1] = math.nan
    assert p.log_prob(y).isnan().tolist() == p.prob(y).isnan().tolist() == [False, True]
    assert p.highest_density_region(0.9).contains(y).tolist()[1] is False
    if dim == 1:
        assert p.cdf(y).isnan().tolist() == [False, True]


@pytest.mark.parametrize("kind", ["lebesgue", "marginal", "proposal"])
def test_log_prob_in_training_has_the_gradient_of_its_value_where_rows_are_refined(kind: str) -> None:
    model, x = clipped(kind, wiggly=kind != "proposal")  # whose own density is uneven enough
    y = torch.tensor([LOW, HIGH, 0.02, 0.05, 0.08, HIGH - 1e-9], dtype=torch.float64)[:, None]
    integrator = AdaptiveQuadrature(num_nodes=64, max_mass=0.02)  # so that all rows get cells of their own
    part = model.encoder if isinstance(model.encoder, nn.Linear) else model.proposal
    parameter = next(parameter for parameter in part.parameters())
    direction = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)

    def total() -> Tensor:
        return model(x, integrator=integrator).log_prob(y).sum()

    model.train()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.eval()
    (gradient,) = torch.autograd.grad(total(), parameter)
    values = []
    with torch.no_grad():
        for step in (1e-5, -1e-5):
            parameter.add_(step * direction)
            values.append(total())
            parameter.sub_(step * direction)
    slope = float(values[0] - values[1]) / 2e-5
    # The nodes move with the parameters and carry no gradient, which costs what the rule errs by.
    assert float((gradient * direction).sum()) == pytest.approx(slope, rel=0.02, abs=0.02)


@pytest.mark.parametrize("space", [Interval(1e6, 1e6 + 1), Real(), Circle(1.0, 2.0**17)])
def test_single_precision_far_from_zero_is_said(space: TargetSpace) -> None:
    model = er.EnergyRegressionModel.for_table(2, space, width=8).eval()
    x = torch.zeros(3, 2)
    model.fit_preprocessing(torch.randn(50, 2), 1e6 + torch.rand(50, 1, dtype=torch.float64))
    with pytest.warns(UserWarning, match=r"float32 cannot tell targets apart that are closer than 0\.[01]"):
        model(x).quantile(0.5)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.double()(x).quantile(0.5)
        near = er.EnergyRegressionModel.for_table(2, Interval(100, 101), width=8).eval()
        assert near(x).mean.dtype == torch.float32
