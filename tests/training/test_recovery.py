"""Objectives recover known conditional densities: two humps, skew, a circle, two dimensions."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn
from torch.distributions import LogNormal, Normal

import energyreg as er
from energyreg.densities.bases import Marginal, ProposalBase
from energyreg.densities.spaces import Circle, Positive, Real
from energyreg.networks.heads import JointHead, SeparableHead
from energyreg.networks.proposals import MixtureDensityNetwork


class TwoHumps:
    """y = ±x with shares 0.7 and 0.3, and noise of 0.15."""

    space, bound = Real, 2.0

    @staticmethod
    def log_prob(x, y):
        shares = torch.tensor([0.7, 0.3], dtype=y.dtype).log()
        return torch.stack([Normal(x, 0.15).log_prob(y), Normal(-x, 0.15).log_prob(y)], -1).add(shares).logsumexp(-1)

    @staticmethod
    def sample(x, generator):
        sign = torch.where(torch.rand(x.shape, generator=generator) < 0.7, 1.0, -1.0)
        return sign * x + 0.15 * torch.randn(x.shape, generator=generator)

    @staticmethod
    def grid():
        return torch.linspace(-2.5, 2.5, 2001)


class Skewed:
    """Log-normal with a location of x."""

    space = Positive

    @staticmethod
    def log_prob(x, y):
        return LogNormal(x, 0.5, validate_args=False).log_prob(y.clamp_min(1e-9))

    @staticmethod
    def sample(x, generator):
        return (x + 0.5 * torch.randn(x.shape, generator=generator)).exp()

    @staticmethod
    def grid():
        return torch.linspace(1e-4, 20, 8001)


class Wrapped:
    """An angle in degrees around 180 x, so that the density goes over the cut, with noise of 40 degrees."""

    @staticmethod
    def space():
        return Circle(360.0)

    @staticmethod
    def log_prob(x, y):
        turns = torch.arange(-3, 4, dtype=y.dtype) * 360
        return Normal(180 * x[..., None], 40.0).log_prob(y[..., None] + turns).logsumexp(-1)

    @staticmethod
    def sample(x, generator):
        return (180 * x + 40 * torch.randn(x.shape, generator=generator)) % 360

    @staticmethod
    def grid():
        return torch.linspace(0, 360, 1441)


TASKS = {"two humps": TwoHumps, "skewed": Skewed, "circle": Wrapped}
OBJECTIVES = {
    "exact": er.objectives.ExactMaximumLikelihood(num_nodes=64),
    "nce": er.objectives.NCEWithLearnedProposal(num_samples=32),
    "ml-is": er.objectives.MaximumLikelihoodWithLearnedProposal(num_samples=64),
}


def around_the_target(periodic):
    """The objectives with noise around the target; enough samples for their bias of order 1/M to be small."""
    noise = er.noise.GaussianNoise([0.1, 0.4, 1.6], periodic)
    return {
        "nce, noise": er.objectives.NCE(noise, num_samples=96),
        "nce+, noise": er.objectives.NCE(noise, num_samples=96, beta=0.05),
        "ml-is, noise": er.objectives.MaximumLikelihoodImportanceSampling(noise, num_samples=96),
        "kld-is": er.objectives.KLDImportanceSampling(noise, 0.02, num_samples=96),
    }


NOISY = list(around_the_target(None))


def train(model, objective, sample, steps: int, learning_rate: float = 1e-2):
    generator = torch.Generator().manual_seed(1)
    model.fit_preprocessing(None, sample(2000, generator)[1])
    optimiser = torch.optim.Adam(model.parameters(), lr=learning_rate)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, learning_rate, total_steps=max(steps, 1))
    for _ in range(steps):
        x, y = sample(128, generator)
        loss = objective(*model.condition(x, y), generator=generator).per_example.mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        schedule.step()
    return model.eval()


def make(objective: str, space, dim: int = 1):
    torch.manual_seed(0)
    encoder = nn.Sequential(nn.Linear(1, 32), nn.SiLU(), nn.Linear(32, 32), nn.SiLU())
    proposal = None if objective == "exact" else MixtureDensityNetwork(32, dim, 2, periodic=space.periodic, width=32)
    head = (SeparableHead if objective == "exact" else JointHead)(32, dim, space.periodic, width=32)
    return er.EnergyRegressionModel(encoder, head, proposal=proposal, space=space)


def kl(task, model) -> float:
    x = torch.linspace(-0.95, 0.95, 21)
    grid = task.grid().double()
    truth = task.log_prob(x.double(), grid[:, None])
    learned = model(x[:, None]).log_prob(grid[:, None, None].expand(-1, len(x), 1)).double()
    return float(torch.trapezoid(truth.exp() * (truth - learned), grid, dim=0).mean())


@pytest.mark.slow
@pytest.mark.parametrize("objective", [*OBJECTIVES, *NOISY])
@pytest.mark.parametrize("task", TASKS)
def test_objectives_recover_a_known_density(task, objective):
    task = TASKS[task]
    chosen = {**OBJECTIVES, **around_the_target(task.space().periodic)}[objective]

    def sample(n, generator):
        x = 2 * torch.rand(n, generator=generator) - 1
        return x[:, None], task.sample(x, generator)

    model = train(make(objective, task.space()), chosen, sample, steps=1500)
    # 192,000 fresh examples: what is left is the network's error and that of the last steps.
    assert kl(task, model) < 0.03


def test_exact_maximum_likelihood_recovers_two_humps_quickly():
    def sample(n, generator):
        x = 2 * torch.rand(n, generator=generator) - 1
        return x[:, None], TwoHumps.sample(x, generator)

    model = make("exact", Real())
    start = kl(TwoHumps, train(model, OBJECTIVES["exact"], sample, steps=0))
    assert kl(TwoHumps, train(model.train(), OBJECTIVES["exact"], sample, steps=300)) < min(0.1, start / 5)


@pytest.mark.slow
def test_the_self_normalised_likelihood_recovers_a_known_density_and_its_normaliser():
    def sample(n, generator):
        x = 2 * torch.rand(n, generator=generator) - 1
        return x[:, None], TwoHumps.sample(x, generator)

    model = make("nce", Real())
    head = er.heads.SelfNormalisedHead(model.head, 32)
    model = er.EnergyRegressionModel(model.encoder, head, proposal=model.proposal, space=model.space)
    train(model, er.objectives.SelfNormalisedLikelihood(num_samples=128), sample, steps=2000)
    assert kl(TwoHumps, model) < 0.03
    # Its exponentials, seen at a rate that falls to zero at the end, leave log Z near zero: a tenth of a nat.
    assert model(torch.linspace(-0.95, 0.95, 21)[:, None]).diagnostics.log_partition.abs().mean() < 0.1


@pytest.mark.slow
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_objectives_recover_a_ring_in_two_dimensions(objective):
    """A ring of radius 1 whose side is chosen by x, in a density that no mixture of two Gaussians has."""

    def log_prob(x, y):
        angle = torch.atan2(y[..., 1], y[..., 0])
        radius = y.norm(dim=-1)
        # Radius normal about 1 (± 0.2), angle von Mises about π x with concentration 2.
        log_angle = 2 * torch.cos(angle - math.pi * x) - math.log(
            2 * math.pi * float(torch.special.i0(torch.tensor(2.0)))
        )
        return Normal(1.0, 0.2).log_prob(radius) + log_angle - radius.clamp_min(1e-9).log()

    def sample(n, generator):
        x = 2 * torch.rand(n, generator=generator) - 1
        # Rejection from the uniform angle, with numbers to spare.
        angle = (2 * torch.rand(n, 64, generator=generator) - 1) * math.pi
        keep = torch.rand(n, 64, generator=generator) < (2 * angle.cos() - 2).exp()
        angle = angle.gather(1, keep.float().argmax(1, keepdim=True))[:, 0] + math.pi * x
        radius = 1 + 0.2 * torch.randn(n, generator=generator)
        return x[:, None], torch.stack([radius * angle.cos(), radius * angle.sin()], -1)

    objective_ = (
        er.objectives.ExactMaximumLikelihood(num_nodes=24**2) if objective == "exact" else OBJECTIVES[objective]
    )
    model = train(make(objective, Real(2), dim=2), objective_, sample, steps=2000)
    # By samples of the truth: its density has a pole at the origin, which a grid would hit. Standard error: 0.005.
    x, y = sample(4000, torch.Generator().manual_seed(9))
    assert float((log_prob(x[:, 0], y) - model(x).log_prob(y)).mean()) < 0.06


@pytest.mark.slow
def test_an_energy_improves_on_the_proposal_that_it_starts_from():
    """Two uniform slabs whose shares change with x, which no mixture of two Gaussians has."""

    def sample(n, generator):
        x = 2 * torch.rand(n, generator=generator) - 1
        side = torch.where(torch.rand(n, generator=generator) < (1 + x) / 2, 1.0, -1.0)
        return x[:, None], side + torch.rand(n, generator=generator) - 0.5

    torch.manual_seed(0)
    encoder = nn.Sequential(nn.Linear(1, 32), nn.SiLU(), nn.Linear(32, 32), nn.SiLU())
    model = er.EnergyRegressionModel(
        encoder, SeparableHead(32, width=64), proposal=MixtureDensityNetwork(32, 1, 2), base=ProposalBase(Marginal())
    )
    train(model, er.objectives.ExactMaximumLikelihood(num_nodes=128), sample, steps=800, learning_rate=5e-3)
    x, y = sample(4000, torch.Generator().manual_seed(9))
    gain = (model(x).log_prob(y) - model.proposal_model()(x).log_prob(y)).mean()
    # A Gaussian with the moments of a uniform slab is 0.18 nats behind it.
    assert gain > 0.1
