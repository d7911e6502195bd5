"""The one-dimensional experiments: stacked networks, tasks with a known density, and a runner that resumes."""

from __future__ import annotations

import dataclasses
import json
import math
import shutil

import pytest
import torch
from torch import nn

from energyreg import objectives
from energyreg.densities.noise import GaussianNoise

pytest.importorskip("matplotlib")

from experiments.one_dimensional import networks, training
from experiments.one_dimensional.evaluation import cached_task, evaluate
from experiments.one_dimensional.networks import ConditionalMixture, EnergyNetwork, Linear, MixtureHead, Model
from experiments.one_dimensional.report import fill, report
from experiments.one_dimensional.run import blocks, run, select
from experiments.one_dimensional.settings import SETTINGS
from experiments.one_dimensional.tasks import TASKS


def generators(*seeds):
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def plain(layer: Linear, s: int) -> nn.Linear:
    """Layer of seed s as torch's own, with the same parameters."""
    linear = nn.Linear(*reversed(layer.weight.shape[1:]))
    with torch.no_grad():
        linear.weight.copy_(layer.weight[s])
        linear.bias.copy_(layer.bias[s, :, 0])
    return linear


class PlainEnergy(nn.Module):
    """f of one seed, written as in the papers: rows of x and y side by side."""

    def __init__(self, stacked: EnergyNetwork, s: int) -> None:
        super().__init__()
        branch = stacked.x_branch
        self.x_branch = nn.Sequential(plain(branch.first, s), nn.ReLU(), plain(branch.second, s), nn.ReLU())
        self.y_branch = nn.ModuleList([plain(layer, s) for layer in stacked.y_branch])
        self.joint, self.output = plain(stacked.joint, s), plain(stacked.output, s)
        self.residual = nn.ModuleList([plain(layer, s) for layer in stacked.residual])
        self.normaliser = None if stacked.normaliser is None else plain(stacked.normaliser, s)
        self.activation = torch.tanh if stacked.activation is torch.tanh_ else torch.relu

    def forward(self, x, y):
        features = h = self.x_branch(x)
        for layer in self.y_branch:
            y = self.activation(layer(y))
        h = self.activation(self.joint(torch.cat([h.expand(*y.shape[:-1], -1), y], -1)))
        for layer in self.residual:
            h = self.activation(layer(h)) + h
        b = 0 if self.normaliser is None else self.normaliser(features)
        return (self.output(h) - b)[..., 0]


ENERGIES = {
    "tanh": networks.tanh_network,
    "relu": EnergyNetwork,
    "with_normaliser": lambda g: EnergyNetwork(g, normaliser=True),
}


@pytest.mark.parametrize("build", ENERGIES.values(), ids=ENERGIES)
@pytest.mark.parametrize("lead", [(), (6,)])
def test_stacked_energy_equals_plain_networks(build, lead):
    s, b = 3, 5
    model = Model(build(generators(*range(s)))).double()
    x, y = torch.randn(s, b, dtype=torch.double), torch.randn(*lead, s * b, 1, dtype=torch.double)
    values = model(x)[0](y)
    assert values.shape == (*lead, s * b)
    values.square().sum().backward()
    for i in range(s):
        energy = PlainEnergy(model.energy, i).double()
        expected = energy(x[i, :, None], y[..., i * b : (i + 1) * b, :])
        torch.testing.assert_close(values[..., i * b : (i + 1) * b], expected)
        expected.square().sum().backward()
        for stacked, single in [
            (model.energy.x_branch.first, energy.x_branch[0]), (model.energy.joint, energy.joint),
            (model.energy.y_branch[0], energy.y_branch[0]), (model.energy.output, energy.output),
        ]:  # fmt: skip
            torch.testing.assert_close(stacked.weight.grad[i], single.weight.grad)
            torch.testing.assert_close(stacked.bias.grad[i, :, 0], single.bias.grad)


@pytest.mark.skipif(shutil.which("c++") is None, reason="no C++ compiler")
@pytest.mark.parametrize("build", ENERGIES.values(), ids=ENERGIES)
@pytest.mark.parametrize("m", [1, 64, 70])  # a tile is of 64 points
def test_compiled_energy_equals_the_stacked_one(build, m):
    s, b = 2, 3
    models = [Model(build(generators(*range(s)))) for _ in range(2)]
    models[1].energy.fused = False
    x, y, weights = torch.randn(s, b), 3 * torch.randn(m, s * b, 1), torch.randn(m, s * b)
    results = []
    for model in models:
        points = y.clone().requires_grad_()
        values = model(x)[0](points)
        gradients = torch.autograd.grad((values * weights).sum(), [points, *model.energy.parameters()])
        results.append([values, *gradients])
    for compiled, plain in zip(*results, strict=True):
        # Sums of some 200 terms in single precision, in another order.
        torch.testing.assert_close(compiled, plain, rtol=1e-4, atol=1e-5)
    # By the name of the function that made it: else this could pass without ever running what it tests.
    assert "FusedEnergy" in str(trace(results[0][0].grad_fn))


def trace(node):
    """Names of all functions behind a tensor."""
    return [] if node is None else [node.name(), *(name for parent, _ in node.next_functions for name in trace(parent))]


def test_stacked_energy_is_twice_differentiable_in_y():
    model = Model(networks.tanh_network(generators(0, 1))).double()
    x, y = torch.randn(2, 3, dtype=torch.double), torch.randn(6, 1, dtype=torch.double, requires_grad=True)
    f = model(x)[0]
    assert torch.autograd.gradgradcheck(lambda v: f(v), y)


def test_stacked_mixture_equals_plain_networks():
    s, b, k = 2, 4, 3
    model = Model(None, ConditionalMixture(generators(*range(s)), k))
    x = torch.randn(s, b)
    q = model(x)[1]
    branch, head = model.proposal.x_branch, model.proposal.head
    for i in range(s):
        h = plain(branch.second, i)(plain(branch.first, i)(x[i, :, None]).relu()).relu()
        logits, means, log_variances = (
            plain(net[2], i)(plain(net[0], i)(h).relu()) for net in (head.logits, head.means, head.log_variances)
        )
        rows = slice(i * b, (i + 1) * b)
        torch.testing.assert_close(q.log_mixing[rows], logits.log_softmax(-1))
        torch.testing.assert_close(q.means[rows, :, 0], means)
        torch.testing.assert_close(q.scales[rows, :, 0], (log_variances / 2).exp())


def test_proposal_does_not_train_the_features_of_the_energy():
    model = Model(EnergyNetwork(generators(0)), MixtureHead(generators(1), 2))
    model(torch.randn(1, 4))[1].log_prob(torch.zeros(4, 1)).sum().backward()
    assert all(p.grad is None for p in model.energy.parameters())
    assert all(p.grad is not None for p in model.proposal.parameters())


def tiny(name, **changes):
    """A setting of the list with little to do."""
    (setting,) = select(SETTINGS, name)
    return dataclasses.replace(setting, **{"epochs": 1, "seeds": 3, "block": 2, **changes})


def short(task, rows=64):
    x, y = task.train
    return dataclasses.replace(task, train=(x[:rows], y[:rows]))


@pytest.mark.parametrize("name", ["toy1-sm", "toy1-mdn-k4"])  # draw no samples
def test_a_seed_does_not_depend_on_its_block(name):
    setting, task = tiny(name, epochs=2), short(cached_task("toy1"))
    together, losses, _ = training.train(setting, task, [3, 4, 5])
    alone, loss, _ = training.train(setting, task, [4])
    assert losses[1] == pytest.approx(loss[0], rel=1e-5)
    for ours, single in zip(together.parameters(), alone.parameters(), strict=True):
        torch.testing.assert_close(ours[1], single[0])


def test_a_diverged_seed_is_reported_and_leaves_the_others_alone():
    class Diverging:
        def __call__(self, f, q, y, *, generator=None):
            loss = objectives.ProposalNLL()(f, q, y, generator=generator)
            factor = torch.ones_like(loss.per_example)
            factor[: len(y) // 2] = torch.nan
            per_example = loss.per_example * factor
            raise objectives.NonFiniteLossError("seed 0", objectives.Loss(per_example, {}))

    setting = tiny("toy1-mdn-k4", objective=lambda m: Diverging())
    _, losses, diverged = training.train(setting, short(cached_task("toy1")), [0, 1])
    assert diverged == [True, False]
    assert math.isfinite(losses[1])


@pytest.mark.parametrize("setting", [s for s in SETTINGS if isinstance(s, training.Papers)], ids=lambda s: s.name)
def test_every_setting_gives_every_parameter_a_gradient(setting):
    model = setting.network(generators(0, 1))
    y = torch.randn(8, 1, generator=generators(3)[0])
    objective = setting.objective(min(setting.samples, 8))
    loss = objective(*model(torch.rand(2, 4)), y, generator=generators(2)[0]).per_example
    assert loss.shape == (8,)
    loss.sum().backward()
    # The bias of the output cancels in every loss but the self-normalised one; score matching loses it altogether.
    optional = {"energy.output.bias"}
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None or name in optional, name


def test_names_of_settings_are_their_own():
    assert len({setting.name for setting in SETTINGS}) == len(SETTINGS)


@pytest.mark.parametrize("name", TASKS)
def test_density_integrates_to_one(name):
    task = cached_task(name)
    x = torch.linspace(*task.x_range, 23, dtype=torch.double)[1:-1]
    low, high = (-400.0, 400.0) if name == "slabs" else task.y_range
    edges = torch.linspace(low, high, 200_001 if name == "slabs" else 50_001, dtype=torch.double)
    y = (edges[1:] + edges[:-1]) / 2
    mass = torch.stack([task.log_prob(v, y).exp().sum() for v in x]) * (high - low) / len(y)
    # The midpoint rule errs by up to a cell at each jump. Paper IV's Beta has a pole where the slab of values that may
    # have been rounded across it, 5e-5 wide, gains 0.016.
    torch.testing.assert_close(mass, torch.ones_like(mass), rtol=0, atol=0.03 if name == "paper4" else 0.01)


@pytest.mark.parametrize("name", TASKS)
def test_data_agree_with_density(name):
    task = TASKS[name](seed=11)
    x, y = (part[:1000].double() for part in task.train)
    nll = -task.log_prob(x, y)[:, 0]
    entropy = []
    for values in x[:, 0].split(100):
        low, high = (-60.0, 60.0) if name == "slabs" else task.y_range
        grid = torch.linspace(low, high, 6_000, dtype=torch.double)
        log_density = task.log_prob(values, grid[:, None])
        density = log_density.exp()
        weight = (high - low) / (len(grid) - 1)
        entropy.append(-torch.where(density > 0, density * log_density, 0).sum(0) * weight)
    excess = nll - torch.cat(entropy)
    # 4 standard errors, and a hundredth for the quadrature.
    assert abs(excess.mean()) < 4 * excess.std() / len(excess) ** 0.5 + 0.01


@pytest.mark.parametrize("normalised", [True, False])
def test_true_density_scores_perfectly(normalised):
    task = cached_task("paper4")
    task = dataclasses.replace(task, x_points=50, test=tuple(part[:200] for part in task.test))
    shift = 0 if normalised else 3

    def density(x, y):
        return (task.log_prob(x.double()[:, 0], y.double()[..., 0])[None] + shift).clamp_min(-60)

    score = evaluate(task, density, normalised)
    assert score.kl[0] == pytest.approx(0, abs=1e-6)
    truth = -float(task.log_prob(*(part.double() for part in task.test)).mean())
    assert score.test_nll[0] == pytest.approx(truth, abs=0.01)


def test_run_resumes_and_reports(tmp_path, monkeypatch):
    small = dataclasses.replace(short(cached_task("toy1")), x_points=16, y_points=128)
    monkeypatch.setattr(training, "cached_task", lambda name: small)
    noise = GaussianNoise((0.1, 0.8), stratified=False)
    settings = [
        tiny("toy1-nce", objective=lambda m: objectives.NCE(noise, 8)),
        tiny("toy1-nce-jkl-k4", objective=lambda m: objectives.NCEWithLearnedProposal(8)),
        tiny("toy1-nce-m8"),
        tiny("toy1-mdn-k4"),
    ]
    work = blocks(settings)
    assert [seeds for _, seeds in work] == [[0, 1]] * 4 + [[2]] * 4

    assert run(settings, tmp_path, seeds=1)
    first = tmp_path / "toy1-nce" / "00-01.json"
    record = json.loads(first.read_text())
    assert record["seeds"] == [0, 1]
    assert len(record["kl"]) == len(record["train_loss"]) == 2
    assert not (tmp_path / "toy1-nce" / "02-02.json").exists()
    first.write_text(first.read_text().replace('"toy1-nce"', '"kept"'))
    # A claim that a killed process left behind stops nobody.
    (tmp_path / "toy1-nce" / "02-02.lock").touch()
    assert run(settings, tmp_path, jobs=2)
    assert json.loads(first.read_text())["setting"] == "kept"
    assert (tmp_path / "toy1-nce" / "02-02.json").exists()
    assert not list(tmp_path.glob("*/*.lock"))

    report(tmp_path)
    text = (tmp_path / "README.md").read_text()
    assert "| NCE | 1024 |" in text
    assert "its proposal" in text
    assert "| M = 8 |" in text
    assert (tmp_path / "toy1.png").stat().st_size > 10_000

    page = tmp_path / "page.md"
    page.write_text("a\n<!-- table -->\nold\n<!-- /table -->\nb\n<!-- study -->\n<!-- /study -->\nc\n")
    fill(page, tmp_path)
    text = page.read_text()
    assert "old" not in text
    assert "| NCE |" in text
    assert "| NCE | –" not in text
    assert "(3) |" in text  # seeds
    assert text.startswith("a\n")
    assert text.endswith("c\n")


def test_report_without_results_says_what_to_do(tmp_path):
    with pytest.raises(FileNotFoundError, match="run"):
        report(tmp_path)
