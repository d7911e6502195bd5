"""Ensembles: the mixture of the members' densities, its uncertainty, and the training of all members in one pass."""

from __future__ import annotations

import copy
import inspect
import math
import re
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import energyreg as er
from energyreg.densities import spaces
from energyreg.densities.bases import ProposalBase
from energyreg.inference.integrators import ImportanceSampling, StratifiedQuadrature
from energyreg.networks.encoders import TableEncoder, TwinEncoder
from energyreg.networks.heads import SeparableHead
from energyreg.networks.proposals import DistributionProposal, MixtureDensityNetwork
from energyreg.objectives import ExactMaximumLikelihood, Loss
from energyreg.training import data, fitting, stacking
from energyreg.training import ensembles as ensemble_training
from energyreg.training import loop as training

generator = torch.Generator().manual_seed(0)
X = torch.rand(160, 2, generator=generator)
Y = X[:, 0] + 0.1 * torch.randn(160, generator=generator)
VALIDATION = (torch.rand(40, 2, generator=generator), torch.rand(40, generator=generator))
Model = er.EnergyRegressionModel


@dataclass(frozen=True)
class Quadrature:
    """Maximum likelihood on fixed nodes, so that a training by itself sees the same ones."""

    def __call__(self, f: Any, q: Any, y: Tensor, *, generator: torch.Generator | None = None) -> Loss:
        u, log_weights = StratifiedQuadrature(32, jitter=False).nodes(f)
        f_target, relative = f.target_and_relative(y, u)
        loss = (relative + log_weights).logsumexp(0) - f_target
        return Loss(loss if q is None else loss - q.log_prob(y), {"f_target": f_target.detach()})


def marginal() -> Model:
    return Model.for_table(2, width=8, dropout=0.0)


def few_rows() -> Model:
    return Model.for_table(2, width=8, dropout=0.0, num_rows=100, num_components=3)


def mixture() -> Model:
    return Model.mixture_for_table(2, width=8, dropout=0.0, num_components=3)


def twins() -> Model:
    encoder = TwinEncoder(TableEncoder(2, 8, dropout=0.0), TableEncoder(2, 6, dropout=0.0))
    return Model(encoder, SeparableHead(8), proposal=MixtureDensityNetwork(6, num_components=2))


def fit_ensemble(build: Any = marginal, x: Any = X, y: Any = Y, **settings: Any) -> er.EnergyEnsemble:
    settings = {"epochs": 2, "batch_size": 32, "progress": False, "n_members": 3, **settings}
    if isinstance(build, list):
        del settings["n_members"]
    return er.fit_ensemble(build, x, y, **settings)


def seeded(build: Callable[[], Model], seed: int) -> Model:
    torch.manual_seed(seed)
    return build()


def disturbed(model: Model, size: float = 0.3) -> Model:
    """A model as after a training: other weights than the initial ones, with which heads are zero."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += size * torch.randn_like(parameter) / max(parameter.shape[-1:] or [1]) ** 0.5
    return model


def untrained(build: Callable[[], Model], y: Tensor = Y, count: int = 3) -> er.EnergyEnsemble:
    members = [disturbed(seeded(build, seed)) for seed in range(count)]
    for member in members:
        member.fit_preprocessing(X[: len(y)], y)
    return er.EnergyEnsemble(members).eval()


# The density ------------------------------------------------------------------------------------------------------


def circle() -> Model:
    return Model.for_table(2, space=spaces.Circle(360.0), width=8)


def plane() -> Model:
    return Model.for_table(2, space=spaces.Product(spaces.Real(1), spaces.Positive(1)), width=8)


def solid() -> Model:
    return Model.for_table(2, space=spaces.Real(3), width=8, num_components=2)


TARGETS = {
    circle: (40 * Y).remainder(360),
    plane: torch.stack([Y, Y.exp()], -1),
    solid: torch.stack([Y, Y.square(), -Y], -1) + X[:, :1] * torch.tensor([1.0, 0.2, -0.5]),
}
MODELS = [marginal, few_rows, mixture, circle, plane, solid]


def targets(build: Callable[[], Model]) -> Tensor:
    return TARGETS.get(build, Y)


@pytest.mark.parametrize("build", MODELS)
def test_density_is_the_mean_of_the_members(build: Callable[[], Model]) -> None:
    ensemble, y = untrained(build, targets(build)), targets(build)[:6]
    p = ensemble(X[:6])
    density = torch.stack([member(X[:6]).prob(y) for member in ensemble.members]).mean(0)
    assert torch.allclose(p.prob(y), density, rtol=1e-4)
    assert len(p.members) == len(ensemble) == 3
    assert torch.allclose(torch.stack([member.prob(y) for member in p.members]).mean(0), density, rtol=1e-4)


@pytest.mark.parametrize("build", [marginal, few_rows, mixture, circle])
def test_density_integrates_to_one(build: Callable[[], Model]) -> None:
    p = untrained(build, targets(build))(X[:4])
    low, high = (0.0, 360.0) if build is circle else (-40.0, 40.0)
    grid = torch.linspace(low, high, 40_001, dtype=torch.double)
    # The rule's error is that of the members' own log Z, which is refined to 1e-3.
    total = torch.trapezoid(p.prob(grid[:, None, None].expand(-1, 4, 1)).double(), grid, dim=0)
    assert torch.allclose(total, torch.ones(4, dtype=torch.double), atol=2e-3)


def test_density_of_two_dimensions_integrates_to_one() -> None:
    p = untrained(plane, targets(plane))(X[:2])
    a = torch.linspace(-6, 8, 281, dtype=torch.double)
    b = torch.linspace(-8, 8, 401, dtype=torch.double)  # log of the positive one
    points = torch.stack(torch.meshgrid(a, b.exp(), indexing="ij"), -1).reshape(-1, 1, 2)
    density = (p.log_prob(points.expand(-1, 2, 2)).double() + points[..., 1].log()).exp()
    total = density.reshape(len(a), len(b), 2).sum((0, 1)) * (a[1] - a[0]) * (b[1] - b[0])
    assert torch.allclose(total, torch.ones(2, dtype=torch.double), atol=0.02)


def test_density_of_three_dimensions_integrates_to_one() -> None:
    p = untrained(solid, targets(solid))(X[:2])
    normal = torch.distributions.Normal(0.5, 2.0)
    points = normal.sample((60_000, 1, 3)).to(torch.float32)
    weights = (p.log_prob(points.expand(-1, 2, 3)) - normal.log_prob(points).sum(-1)).exp().double()
    stderr = weights.std(0) / len(weights) ** 0.5
    assert ((weights.mean(0) - 1).abs() < 5 * stderr + 0.03).all()  # 0.03 for the members' own log Z


@pytest.mark.parametrize("build", [marginal, few_rows, circle])
def test_one_dimensional_summaries_agree_with_numerics(build: Callable[[], Model]) -> None:
    p = untrained(build, targets(build))(X[:3])
    low, high = (0.0, 360.0) if build is circle else (-40.0, 40.0)
    grid = torch.linspace(low, high, 40_001, dtype=torch.double)
    density = p.prob(grid[:, None, None].expand(-1, 3, 1)).double()
    cdf = torch.cumulative_trapezoid(density, grid, dim=0)
    for place in (8_000, 20_000, 20_300):
        assert torch.allclose(p.cdf(grid[place].expand(3)).double(), cdf[place - 1], atol=5e-3)
    level = torch.tensor([0.1, 0.5, 0.9])
    assert torch.allclose(p.cdf(p.quantile(level)[..., None]), level[:, None].expand(-1, 3), atol=1e-4)
    if build is not circle:
        mean = torch.trapezoid(density * grid[:, None], grid, dim=0)
        assert torch.allclose(p.mean[:, 0].double(), mean, atol=2e-2)
    for row, heights in enumerate(p.modes().log_prob):
        assert float(heights.max().exp()) == pytest.approx(float(density[:, row].max()), rel=1e-2)
    region = p.highest_density_region(0.8)
    assert region.intervals is not None
    inside = (density >= region.log_threshold.exp().double()).double()
    assert torch.allclose(torch.trapezoid(density * inside, grid, dim=0), torch.tensor(0.8).double(), atol=0.02)


@pytest.mark.parametrize("build", MODELS)
def test_everything_a_distribution_does(build: Callable[[], Model]) -> None:
    y = targets(build)
    p = untrained(build, y)(X[:3])
    dim = p.event_shape[0]
    assert p.sample((5,), generator=torch.Generator().manual_seed(0)).shape == (5, 3, dim)
    assert p.mean.shape == p.variance.shape == p.median.shape == p.mode.shape == (3, dim)
    assert p.interval(0.9).shape == ((3, 2) if dim == 1 else (3, dim, 2))
    assert p.modes(num_starts=8, num_steps=5).counts.min() >= 1
    start = p.mean
    assert (p.log_prob(p.refine(start, num_steps=3)) >= p.log_prob(start) - 1e-4).all()
    assert p.highest_density_region(0.5).contains(p.mode).all()
    assert (p.diagnostics.log_partition == 0).all()
    assert p.diagnostics.effective_sample_size.min() > 1
    assert p.entropy().isfinite().all()


@pytest.mark.parametrize("build", [marginal, few_rows, plane, solid])
def test_chunks_change_nothing(build: Callable[[], Model]) -> None:
    ensemble, y = untrained(build, targets(build)), targets(build)[:130]
    integrator = {plane: StratifiedQuadrature(256), solid: ImportanceSampling(64)}.get(build)
    whole, parts = (ensemble(X[:130], integrator=integrator, memory_budget=budget) for budget in (2**28, 2**19))
    assert parts.block_rows() < 130
    for ask in (
        lambda p: p.log_prob(y),
        lambda p: p.mean,
        lambda p: p.interval(0.9),
        lambda p: p.uncertainty().epistemic_entropy,
    ):
        assert torch.allclose(ask(whole), ask(parts), atol=1e-5)


def test_gradients_flow_in_training_mode() -> None:
    ensemble = untrained(marginal).train()
    ensemble(X[:4]).log_prob(Y[:4]).sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in ensemble.parameters())


def test_members_of_different_kind_and_proposals_of_any_kind() -> None:
    class Normal(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(8, 2)

        def forward(self, context: Tensor) -> torch.distributions.Distribution:
            loc, scale = self.layer(context)[:, None].unbind(-1)
            normal = torch.distributions.Normal(loc, scale.exp() + 0.3)
            return torch.distributions.Independent(normal, 1)

    own = Model(
        TableEncoder(2, 8), SeparableHead(8), proposal=DistributionProposal(Normal()), base=ProposalBase()
    )  # fmt: skip
    members = [marginal(), few_rows(), own]
    for member in members:
        member.fit_preprocessing(X, Y)
    ensemble = er.EnergyEnsemble(members).eval()
    density = torch.stack([member(X).prob(Y) for member in members]).mean(0)
    assert torch.allclose(ensemble(X).prob(Y), density, rtol=1e-4)
    q = ensemble(X[:2]).energy(slice(0, 2)).q
    samples = q.sample((20_000,))
    assert torch.allclose(samples.mean(0), torch.stack([part.mean for part in q.parts]).mean(0), atol=0.05)


def test_members_may_differ_in_what_made_their_initial_weights() -> None:
    scales = iter([0.1, 0.5, 2.0])

    def build() -> Model:
        return Model.for_table(2, width=8, dropout=0.0, frequency_scale=next(scales))

    with warnings.catch_warnings():
        warnings.simplefilter("error")  # there would be a warning if they were trained one after the other
        ensemble = fit_ensemble(build)
    frequencies = [float(member.encoder.frequencies.detach().std()) for member in ensemble.members]
    assert frequencies == sorted(frequencies)
    assert frequencies[2] > 5 * frequencies[0]


# Weights ----------------------------------------------------------------------------------------------------------


def test_weights_are_those_of_the_mixture(tmp_path: Path) -> None:
    ensemble = untrained(few_rows)
    ensemble.weights = [0.7, 0.3, 0.0]
    p, y = ensemble(X[:6]), Y[:6]
    densities = torch.stack([member.prob(y).double() for member in p.members])
    assert torch.allclose(p.prob(y).double(), 0.7 * densities[0] + 0.3 * densities[1], rtol=1e-4)
    means = torch.stack([member.mean for member in p.members])
    assert torch.allclose(p.mean, 0.7 * means[0] + 0.3 * means[1], atol=2e-3)
    found = p.uncertainty()
    assert torch.allclose(found.total_variance, p.variance, rtol=0.05)
    entropies = torch.stack([member.entropy() for member in p.members])
    assert torch.allclose(found.aleatoric_entropy, 0.7 * entropies[0] + 0.3 * entropies[1], atol=2e-2)
    again = er.load(er.save(ensemble, tmp_path / "weighted"))
    assert again.weights == [0.7, 0.3, 0.0]
    assert torch.equal(again(X[:6]).log_prob(y), p.log_prob(y))


def test_fitted_weights_are_the_best() -> None:
    ensemble = untrained(few_rows, count=2)
    x, y = X[:200], Y[:200]
    first, second = torch.stack([member(x).log_prob(y).double() for member in ensemble.members])
    rows = torch.linspace(0, 2, len(y), dtype=torch.double)
    fitted = ensemble.fit_weights(x, y, rows, prior=4.0)
    # One weight is free: a grid tells the maximum.
    grid = torch.linspace(1e-4, 1 - 1e-4, 9_999, dtype=torch.double)[:, None]
    value = (rows * torch.logaddexp(first + grid.log(), second + (1 - grid).log())).sum(1)
    value = value + 2 * (grid.log() + (1 - grid).log())[:, 0]
    assert fitted[0] == pytest.approx(float(grid[value.argmax()]), abs=2e-3)
    assert sum(fitted) == pytest.approx(1)
    far = ensemble.fit_weights(x, y, prior=1e9)
    assert far == pytest.approx([0.5, 0.5], abs=1e-3)


def test_bad_weights_are_refused() -> None:
    ensemble = untrained(marginal)
    for weights in ([0.5, 0.5], [0.5, 0.6, -0.1], [0.2, 0.2, 0.2], [math.nan, 0.5, 0.5]):
        with pytest.raises(ValueError, match=r"weights is .*expected 3 numbers"):
            er.EnergyEnsemble(ensemble.members, weights)
    with pytest.raises(ValueError, match="prior is 0"):
        ensemble.fit_weights(X, Y, prior=0)
    with pytest.raises(ValueError, match=r"sample_weight has shape \(3,\)"):
        ensemble.fit_weights(X, Y, [1.0, 1.0, 1.0])


# Uncertainty ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("build", [marginal, few_rows, circle])
def test_entropy_splits_as_brute_force_says(build: Callable[[], Model]) -> None:
    p = untrained(build, targets(build))(X[:3])
    low, high = (0.0, 360.0) if build is circle else (-60.0, 60.0)
    grid = torch.linspace(low, high, 60_001, dtype=torch.double)
    densities = torch.stack([m.prob(grid[:, None, None].expand(-1, 3, 1)).double() for m in p.members])

    def entropy(density: Tensor) -> Tensor:
        return -torch.trapezoid(torch.special.xlogy(density, density), grid, dim=-2)

    total, aleatoric = entropy(densities.mean(0)), entropy(densities).mean(0)
    found = p.uncertainty()
    # 512 cells, and log Z to 1e-3.
    assert torch.allclose(found.total_entropy.double(), total, atol=1e-2)
    assert torch.allclose(found.aleatoric_entropy.double(), aleatoric, atol=1e-2)
    assert torch.allclose(found.epistemic_entropy.double(), total - aleatoric, atol=1e-2)
    assert torch.allclose(p.entropy().double(), total, atol=1e-2)
    assert torch.allclose(p.members[0].entropy().double(), entropy(densities[0]), atol=1e-2)
    assert (found.epistemic_entropy >= 0).all() and (found.epistemic_entropy <= math.log(3) + 1e-4).all()
    assert torch.allclose(found.total_entropy, found.aleatoric_entropy + found.epistemic_entropy, atol=1e-5)


@pytest.mark.parametrize("build", MODELS)
def test_variance_splits(build: Callable[[], Model]) -> None:
    ensemble = untrained(build, targets(build))
    p = ensemble(X[:3])
    found = p.uncertainty()
    assert torch.allclose(found.total_variance, p.variance, rtol=0.05)
    assert torch.allclose(found.aleatoric_variance, torch.stack([m.variance for m in p.members]).mean(0))
    assert torch.allclose(found.total_variance, found.aleatoric_variance + found.epistemic_variance, rtol=1e-4)


def test_members_that_agree_leave_nothing_epistemic() -> None:
    member = untrained(few_rows, count=1).members[0]
    found = er.EnergyEnsemble([member, member])(X[:3]).uncertainty()
    assert torch.allclose(found.epistemic_entropy, torch.zeros(3), atol=1e-5)
    assert torch.allclose(found.epistemic_variance, torch.zeros(3, 1), atol=1e-5)


@pytest.mark.parametrize(("build", "tolerance"), [(plane, 0.05), (solid, 0.1)])
def test_entropy_of_more_dimensions(build: Callable[[], Model], tolerance: float) -> None:
    p = untrained(build, targets(build))(X[:3])
    log_p = p.log_prob(p.sample((4_000,), generator=torch.Generator().manual_seed(0)))
    # Monte Carlo with 4,000 samples has a standard error of about 0.02.
    assert torch.allclose(p.entropy(), -log_p.mean(0), atol=tolerance)
    assert torch.allclose(p.uncertainty().total_entropy, p.entropy(), atol=1e-3)


# Training ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("build", "clip", "averaging"),
    [
        (marginal, None, None), (marginal, 0.3, 2.0), (few_rows, 0.3, None), (mixture, 0.3, None),
        (mixture, 10.0, 2.0), (twins, 10.0, None),
    ],
)  # fmt: skip
def test_members_are_what_fit_makes_of_them(
    build: Callable[[], Model], clip: float | None, averaging: float | None
) -> None:
    settings: dict[str, Any] = {
        "epochs": 3, "validation": VALIDATION, "gradient_clip": clip, "averaging": averaging,
        "objective": None if build is mixture else Quadrature(),
    }  # fmt: skip
    ensemble = fit_ensemble(build, seed=7, precision="64-true", **settings)
    for number, member in enumerate(ensemble.members):
        alone = seeded(build, 7 + number)
        history = er.fit(alone, X, Y, seed=7 + number, batch_size=32, progress=False, precision="64-true", **settings)
        # In double precision, where sums in another order differ by 1e-15 a step.
        for name, tensor in member.state_dict().items():
            assert torch.allclose(tensor, alone.state_dict()[name], atol=1e-9), name
        ours = ensemble.histories[number]
        assert ours.best_epoch == history.best_epoch
        assert ours.train_loss == pytest.approx(history.train_loss, abs=1e-9)
        assert ours.validation_nll == pytest.approx(history.validation_nll, abs=1e-6)
        for name, values in history.diagnostics.items():
            assert ours.diagnostics[name] == pytest.approx(values, abs=1e-6)


def test_each_member_has_the_weights_of_its_own_best_epoch() -> None:
    ensemble = fit_ensemble(
        epochs=6, learning_rate=0.05, schedule="constant", n_members=4, validation=VALIDATION
    )  # fmt: skip
    epochs = set()
    for member, history in zip(ensemble.members, ensemble.histories, strict=True):
        nll = float(-member(VALIDATION[0]).log_prob(VALIDATION[1]).double().mean())
        assert history.best_validation_nll == min(history.validation_nll) == pytest.approx(nll, abs=1e-5)
        epochs.add(history.best_epoch)
    assert len(epochs) > 1


def test_patience_waits_for_every_member() -> None:
    ensemble = fit_ensemble(epochs=60, patience=2, learning_rate=0.1, schedule="constant", validation=VALIDATION)
    last = max(history.best_epoch or 0 for history in ensemble.histories)
    assert all(history.stopped_early for history in ensemble.histories)
    assert {len(history.train_loss) for history in ensemble.histories} == {last + 2}


def test_dropout_masks_are_the_members_own() -> None:
    members = [seeded(lambda: Model.for_table(2, width=16, dropout=0.5), 0) for _ in range(3)]
    stacked = stacking.Stack(members).model.train()
    context = stacked.encoder(X[:8].repeat(3, 1)).unflatten(0, (3, 8))
    zero = context == 0
    assert 0.3 < float(zero.float().mean()) < 0.7
    assert not torch.equal(zero[0], zero[1]) and not torch.equal(zero[1], zero[2])
    stacked.eval()
    context = stacked.encoder(X[:8].repeat(3, 1)).unflatten(0, (3, 8))
    assert torch.equal(context[0], context[1])


def test_members_have_their_own_probabilities_of_dropout() -> None:
    rates = [0.0, 0.25, 0.75]
    members = [seeded(lambda rate=rate: Model.for_table(2, width=64, dropout=rate), 0) for rate in rates]  # type: ignore[misc]
    stacked = stacking.Stack(members).model.train()
    context = stacked.encoder(X[:50].repeat(3, 1)).unflatten(0, (3, 50))
    shares = (context == 0).double().mean((1, 2))
    # Five standard deviations of a share of 3,200 draws.
    assert torch.allclose(shares, torch.tensor(rates).double(), atol=5 * (0.25 / 3200) ** 0.5)
    assert float(shares[0]) == 0.0
    kept = context[2] != 0
    stacked.eval()
    plain = stacked.encoder(X[:50].repeat(3, 1)).unflatten(0, (3, 50))
    assert torch.equal(plain[0], plain[2])  # the same weights
    assert bool(kept.any())


def test_the_default_settings_train() -> None:
    ensemble = fit_ensemble(lambda: Model.for_table(2, width=16), epochs=8, validation="auto")
    assert [len(history.validation_nll) for history in ensemble.histories] == [8] * 3
    assert all(history.validation_nll[-1] < history.validation_nll[0] for history in ensemble.histories)
    mean = sum(history.best_validation_nll or 0.0 for history in ensemble.histories) / 3
    held_out = data.split(len(Y), 0.1, 0)[1]
    assert float(-ensemble(X[held_out]).log_prob(Y[held_out]).mean()) < mean  # the concave log
    assert not ensemble.training and ensemble.fitted and not any(m.training for m in ensemble.modules())


def test_random_state_of_the_caller_is_untouched() -> None:
    torch.manual_seed(3)
    expected = torch.rand(4)
    torch.manual_seed(3)
    one = fit_ensemble(lambda: Model.for_table(2, width=8))
    assert torch.equal(torch.rand(4), expected)
    again = fit_ensemble(lambda: Model.for_table(2, width=8))
    assert all(torch.equal(a, b) for a, b in zip(one.state_dict().values(), again.state_dict().values(), strict=True))


def test_resumed_training_ends_as_an_uninterrupted_one(tmp_path: Path) -> None:
    def build() -> Model:
        return Model.for_table(2, width=8, num_rows=100, num_components=2)

    settings: dict[str, Any] = {"epochs": 4, "validation": VALIDATION, "learning_rate": 0.02}
    expected = fit_ensemble(build, objective=Interrupted(-1), **settings)
    with pytest.warns(UserWarning, match=r"interrupted in epoch 3 of 4; the members have the weights of their best"):
        early = fit_ensemble(build, objective=Interrupted(12), checkpoint_dir=tmp_path, **settings)
    assert all(history.interrupted and len(history.train_loss) == 2 for history in early.histories)
    resumed = fit_ensemble(build, objective=Interrupted(-1), checkpoint_dir=tmp_path, resume=True, **settings)
    for name, tensor in resumed.state_dict().items():
        assert torch.equal(tensor, expected.state_dict()[name]), name
    for ours, theirs in zip(resumed.histories, expected.histories, strict=True):
        assert ours.train_loss == theirs.train_loss and ours.validation_nll == theirs.validation_nll
    again = fit_ensemble(build, objective=Interrupted(1), checkpoint_dir=tmp_path, resume=True, **settings)
    assert torch.equal(again(X).log_prob(Y), resumed(X).log_prob(Y))
    with pytest.raises(er.CheckpointError, match="number of members was 3, is 2"):
        fit_ensemble(build, objective=Interrupted(-1), checkpoint_dir=tmp_path, resume=True, n_members=2, **settings)


@dataclass
class Interrupted:
    """An objective that is interrupted in one of its calls."""

    step: int
    calls: int = 0

    def __call__(self, f: Any, q: Any, y: Tensor, *, generator: torch.Generator) -> Loss:
        self.calls += 1
        if self.calls == self.step:
            raise KeyboardInterrupt
        return ExactMaximumLikelihood(16)(f, q, y, generator=generator)

    def __repr__(self) -> str:
        return "Interrupted()"


def test_fitted_models_keep_their_units_and_are_trained_further() -> None:
    members = [seeded(marginal, seed) for seed in range(2)]
    members[1].fit_preprocessing(X, 5 * Y)
    ensemble = fit_ensemble(members)
    assert ensemble.members[0] is members[0]
    assert torch.equal(members[0].space.scale, members[1].space.scale)
    assert float(members[0].space.scale) == pytest.approx(float((5 * Y).std(correction=0)))


def test_every_objective_that_fit_takes_trains_an_ensemble() -> None:
    noise = er.noise.GaussianNoise([[0.3]])
    for objective in (
        er.objectives.NCE(noise, 8), er.objectives.ScoreMatching(), er.objectives.DenoisingScoreMatching(0.2, 8),
        er.objectives.NCEWithLearnedProposal(8), er.objectives.MaximumLikelihoodMCMC(2, 0.01, 4),
    ):  # fmt: skip
        ensemble = fit_ensemble(twins, objective=objective, epochs=1, n_members=2, validation=None)
        assert all(math.isfinite(history.train_loss[0]) for history in ensemble.histories)


def test_three_dimensions_train() -> None:
    ensemble = fit_ensemble(solid, y=targets(solid), epochs=2, n_members=2)
    assert all(len(history.validation_nll) == 2 for history in ensemble.histories)


def test_mixed_precision_trains() -> None:
    ensemble = fit_ensemble(few_rows, precision="bf16-mixed", n_members=2, epochs=1)
    assert ensemble.dtype == torch.float32 and math.isfinite(ensemble.histories[0].train_loss[0])


def test_arguments_and_defaults_are_those_of_fit() -> None:
    ours = dict(inspect.signature(er.fit_ensemble).parameters)
    theirs = dict(inspect.signature(er.fit).parameters)
    assert ours.pop("build").name == "build" and theirs.pop("model").name == "model"
    assert ours.pop("n_members").default is None
    assert {name: p.default for name, p in ours.items()} == {name: p.default for name, p in theirs.items()}


# One after the other ----------------------------------------------------------------------------------------------


class Normalising(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(2, 8), nn.BatchNorm1d(8), nn.SiLU())

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


class Branching(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(2, 8)

    def forward(self, x: Tensor) -> Tensor:
        h = self.layer(x)
        return h.relu() if bool((h.sum() > 0).all()) else h


@pytest.mark.parametrize(
    ("encoder", "reason"), [(Normalising, "keeps running statistics"), (Branching, r"torch\.func\.vmap refuses")]
)
def test_what_cannot_be_stacked_is_trained_one_after_the_other(encoder: type[nn.Module], reason: str) -> None:
    def build() -> Model:
        return Model(encoder(), SeparableHead(8))

    with pytest.warns(UserWarning, match=reason):
        ensemble = fit_ensemble(build, epochs=1)
    assert isinstance(ensemble, er.EnergyEnsemble) and len(ensemble.histories) == 3
    assert ensemble(X).log_prob(Y).shape == (160,)
    weights = [next(iter(member.encoder.parameters())) for member in ensemble.members]
    assert not torch.equal(weights[0], weights[1])


def test_members_of_different_structure(tmp_path: Path) -> None:
    members = [seeded(marginal, 0), seeded(few_rows, 1)]
    with pytest.warns(UserWarning, match="members 0 and 1 differ in their structure"):
        ensemble = fit_ensemble(members, checkpoint_dir=tmp_path)
    assert [len(history.validation_nll) for history in ensemble.histories] == [2, 2]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["member-0", "member-1"]
    assert math.isfinite(float(ensemble(X).log_prob(Y).mean()))


def test_both_ways_train_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    together = fit_ensemble(objective=Quadrature(), validation=0.2)
    monkeypatch.setattr(ensemble_training, "_needs_separate_trainings", lambda *_: True)
    apart = fit_ensemble(objective=Quadrature(), validation=0.2)
    # Single precision, 10 steps of AdamW.
    for name, tensor in together.state_dict().items():
        other = apart.state_dict()[name]
        if name.endswith("target_map.5.bias"):
            # A constant in g changes no density: its gradient is a rounding error, of which AdamW makes whole steps.
            tensor, other = tensor[:-1], other[:-1]
        assert torch.allclose(tensor, other, atol=1e-3), name
    torch.testing.assert_close(together(X).log_prob(Y), apart(X).log_prob(Y), rtol=0, atol=1e-3)


def test_loader() -> None:
    loader = DataLoader(TensorDataset(X, Y), batch_size=40, shuffle=True)
    ensemble = fit_ensemble(marginal, loader, None, batch_size=None, n_members=2, validation=VALIDATION)
    assert [len(history.validation_nll) for history in ensemble.histories] == [2, 2]


# Errors -----------------------------------------------------------------------------------------------------------


class Sabotaged(SeparableHead):
    """A head whose parameter can make it overflow."""

    def __init__(self, dim: int) -> None:
        super().__init__(dim)
        self.gain = nn.Parameter(torch.zeros(1))

    def forward(self, context: Tensor, v: Tensor) -> Tensor:
        return super().forward(context, v) + self.gain * 1e38

    own_and_shared = None


def test_the_member_that_diverges_is_named() -> None:
    members = [Model(TableEncoder(2, 8), Sabotaged(8)) for _ in range(3)]
    with torch.no_grad():
        members[1].head.gain.fill_(1e5)
    before = {name: tensor.clone() for name, tensor in members[2].state_dict().items() if "frequencies" in name}
    with pytest.raises(er.TrainingError, match=r"loss of member 1 \(seed 6\) is (nan|inf).*initial weights"):
        fit_ensemble(members, seed=5)
    for name, tensor in before.items():
        assert torch.equal(members[2].state_dict()[name], tensor)


@pytest.mark.parametrize(
    ("build", "settings", "message"),
    [
        (marginal, {"n_members": 0}, "n_members is 0; expected a whole number of at least 1"),
        (lambda: nn.Linear(2, 1), {}, "build returned a Linear; expected an EnergyRegressionModel"),
        (3, {}, "build is a int; expected a callable"),
        ([nn.Linear(2, 1)], {}, r"build[0] is a Linear"),
        ([], {}, "build is empty"),
        (marginal, {"patience": 2, "validation": None}, "patience needs validation data"),
        (marginal, {"epochs": 0}, "epochs is 0"),
        (marginal, {"seed": 1.5}, "seed is 1.5"),
        (marginal, {"y": Y[:10]}, "x has 160 rows, but y has 10"),
    ],
)
def test_wrong_arguments(build: Any, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        fit_ensemble(build, **settings)


def test_members_must_have_weights_of_their_own() -> None:
    model = marginal()
    with pytest.raises(ValueError, match="build holds one model several times"):
        fit_ensemble([model, model])
    other = Model(model.encoder, SeparableHead(8, 1, (False,)))
    with pytest.raises(ValueError, match=r"Members 0 and 1 share the parameter 'encoder\.frequencies'"):
        fit_ensemble([model, other])
    model.encoder.requires_grad_(False)
    ensemble = fit_ensemble([model, other], epochs=1)
    assert ensemble.members[0].encoder is ensemble.members[1].encoder


def test_members_must_agree_on_space_and_base() -> None:
    members = [marginal(), marginal()]
    members[0].fit_preprocessing(X, Y)
    members[1].fit_preprocessing(X, 2 * Y)
    for make in (er.EnergyEnsemble, fit_ensemble):
        with pytest.raises(ValueError, match=r"0.* and .*1.* have different target spaces"):
            make(members)
    with pytest.raises(ValueError, match="members is empty"):
        er.EnergyEnsemble([])
    with pytest.raises(ValueError, match=r"members\[0\] is a Linear"):
        er.EnergyEnsemble([nn.Linear(1, 1)])
    members = [marginal(), Model(TableEncoder(2, 8), SeparableHead(8), base=er.bases.Lebesgue())]
    with pytest.raises(ValueError, match="different reference measures"):
        er.EnergyEnsemble(members)


# Files ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("build", [marginal, few_rows, twins, circle])
def test_saved_ensemble_predicts_the_same(build: Callable[[], Model], tmp_path: Path) -> None:
    ensemble, y = untrained(build, targets(build)), targets(build)
    loaded = er.load(er.save(ensemble, tmp_path / "ensemble"))
    assert isinstance(loaded, er.EnergyEnsemble) and len(loaded) == 3 and loaded.histories == []
    assert torch.equal(loaded(X).log_prob(y), ensemble(X).log_prob(y))


def test_saved_ensemble_with_an_encoder_of_the_users(tmp_path: Path) -> None:
    def build() -> Model:
        return Model(Normalising(), SeparableHead(8))

    ensemble = untrained(build)
    path = er.save(ensemble, tmp_path / "ensemble")
    with pytest.raises(er.CheckpointError, match=r"Normalising.*pass it as load\(\.\.\., encoder=\.\.\.\)"):
        er.load(path)
    loaded = er.load(path, encoder=Normalising())
    assert torch.equal(loaded(X).log_prob(Y), ensemble(X).log_prob(Y))
    assert loaded.members[0].encoder is not loaded.members[1].encoder


# Weights of rows, and a limit of time ---------------------------------------------------------------------------------


def test_members_with_weights_are_those_of_separate_trainings() -> None:
    weight = torch.arange(len(X)) % 3
    settings = {"epochs": 3, "batch_size": 32, "validation": (X, Y, weight), "precision": "64-true"}
    ensemble = fit_ensemble(sample_weight=weight, seed=5, **settings)
    unweighted = fit_ensemble(seed=5, **settings)
    for number, history in enumerate(ensemble.histories):
        alone = er.fit(seeded(marginal, 5 + number), X, Y, sample_weight=weight, seed=5 + number, **settings)
        assert history.validation_nll == pytest.approx(alone.validation_nll, abs=1e-3)
        assert history.validation_nll != pytest.approx(unweighted.histories[number].validation_nll, abs=1e-3)


def test_weights_and_limit_reach_members_that_are_trained_one_after_the_other() -> None:
    weight = torch.where(torch.arange(len(X)) % 2 == 0, 1.0, 0.0)
    models = [Model.for_table(2, width=width) for width in (8, 9)]
    with pytest.warns(UserWarning, match="one after the other"):
        one = fit_ensemble(copy.deepcopy(models), sample_weight=weight)
    with pytest.warns(UserWarning, match="one after the other"):
        other = fit_ensemble(copy.deepcopy(models), X[::2], Y[::2])
    assert [h.validation_nll for h in one.histories] == [h.validation_nll for h in other.histories]
    with pytest.warns(UserWarning) as told:
        late = fit_ensemble(copy.deepcopy(models), time_limit=1e-3, epochs=50)
    assert sum("time of" in str(warning.message) for warning in told) == 2
    assert len(late) == 2 and all(history.timed_out for history in late.histories)


def test_the_limit_of_time_is_that_of_all_members_together(monkeypatch: pytest.MonkeyPatch) -> None:
    ticks = iter(range(10_000))
    monkeypatch.setattr(training, "time", type("Ticks", (), {"perf_counter": staticmethod(lambda: float(next(ticks)))}))
    for module in (ensemble_training, fitting):
        monkeypatch.setattr(module, "time", training.time)
    with pytest.warns(UserWarning, match="the members have the weights of their best epochs up to"):
        ensemble = fit_ensemble(epochs=1000, time_limit=100)
    assert all(history.timed_out and all(map(math.isfinite, history.validation_nll)) for history in ensemble.histories)
    assert next(ticks) < 120 and torch.isfinite(ensemble(X).log_prob(Y)).all()
