"""Calibrated densities integrate to one, leave good models alone and repair bad ones; conformal sets cover."""

from __future__ import annotations

import math
from contextlib import nullcontext

import numpy as np
import pytest
import torch
from torch import nn

from energyreg import EnergyEnsemble, EnergyRegressionModel
from energyreg.densities.bases import Marginal, ProposalBase
from energyreg.densities.spaces import Circle, Real
from energyreg.inference.integrators import ImportanceSampling
from energyreg.models.calibration import Calibration, ConformalIntervals, ConformalRegions
from energyreg.models.chain import AncestralSampling, EnergyChain

MODEL = EnergyRegressionModel


class Truth(nn.Module):
    """A proposal: the normal density with mean x and a standard deviation of `scale`."""

    def __init__(self, scale: float = 0.5) -> None:
        super().__init__()
        self.scale, self.dim, self.periodic = scale, 1, None
        self.weight = nn.Parameter(torch.zeros(()))

    def forward(self, context):
        from energyreg.densities.mixtures import GaussianMixture

        mean = context[:, :1, None]
        return GaussianMixture(torch.zeros_like(mean[..., 0]), mean, torch.full_like(mean, self.scale))


def data(rows: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, 1, generator=generator, dtype=torch.double)
    return x, x[:, 0] + 0.5 * torch.randn(rows, generator=generator, dtype=torch.double)


def model(scale: float = 0.5) -> EnergyRegressionModel:
    """The truth for a scale of 0.5; too sharp below, too flat above. Its units are y's."""
    return EnergyRegressionModel(nn.Identity(), None, proposal=Truth(scale), base=ProposalBase()).double().eval()


def integral(p, low: float = -30.0, high: float = 30.0) -> torch.Tensor:
    grid = torch.linspace(low, high, 24_001, dtype=torch.double)
    values = p.prob(grid[:, None, None].expand(-1, p.batch_shape[0], 1))
    return torch.trapezoid(values, grid, dim=0)


@pytest.mark.parametrize("t", [0.5, 1.0, 2.0])
@pytest.mark.parametrize("share", [0.0, 0.1])
@pytest.mark.parametrize("source", ["one", "ensemble"])
def test_a_calibrated_density_integrates_to_one(t, share, source):
    members = model(0.3) if source == "one" else EnergyEnsemble([model(0.3), model(0.6)])
    p = Calibration(t, share)(members(data(3)[0]))
    torch.testing.assert_close(integral(p), torch.ones(3, dtype=torch.double), atol=2e-3, rtol=0)
    assert (p.diagnostics.log_partition == 0).all()
    assert p.sample((5,)).shape == (5, 3, 1) and p.mean.isfinite().all() and p.interval(0.9).isfinite().all()


def test_the_share_bounds_the_loss_in_a_hole():
    p = Calibration(1.0, 0.01)(model(0.01)(data(3)[0]))
    base = p.energy(slice(0, 3)).reference
    far = torch.tensor([[4.0]] * 3, dtype=torch.double)
    torch.testing.assert_close(p.log_prob(far), base.log_prob(far) + math.log(0.01))


def test_nothing_to_change_changes_nothing():
    p = model()(data(3)[0])
    assert Calibration()(p) is p


def test_the_true_density_is_left_alone():
    x, y = data(300)
    calibration = Calibration.fit(model()(x), y)
    # A gain of more than one standard error by chance is possible, but then a small one.
    assert abs(math.log(calibration.inverse_temperature)) < 0.25 and calibration.base_share <= 0.01


@pytest.mark.parametrize(("scale", "sharper"), [(0.3, False), (0.7, True)])
def test_temperature_repairs_a_wrong_spread(scale, sharper):
    """With a marginal ten times as wide as p(y|x), where the shift towards it that comes with t is small."""

    def wide(rows: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
        x, y = data(rows, seed)
        return 5 * x, y + 4 * x[:, 0]

    x, y = wide(400, 0)
    wrong = model(scale)
    wrong.base.fit(y[:, None])
    # By three tenths of the true spread the best temperature lies beyond what is tried, which is said.
    with nullcontext() if sharper else pytest.warns(UserWarning, match=r"inverse temperature 0.5 .* the end of what"):
        calibration = Calibration.fit(wrong(x), y)
    assert (calibration.inverse_temperature > 1) is sharper
    x, y = wide(2000, 1)
    before, after = (-(p.log_prob(y).mean()) for p in (wrong(x), calibration(wrong(x))))
    truth = 0.5 * math.log(2 * math.pi * math.e * 0.25)
    assert after < before and after < truth + 0.05


def test_a_share_is_chosen_where_targets_fall_into_holes():
    x, y = data(400)
    y = torch.where(torch.arange(400) % 20 == 0, -y - 3, y)
    calibration = Calibration.fit(model()(x), y)
    assert calibration.base_share >= 0.02 or calibration.inverse_temperature < 0.8


def test_few_rows_decide_nothing_but_buy_the_insurance():
    x, y = data(4)
    assert Calibration.fit(model()(x), y).base_share == 0.02


@pytest.mark.parametrize("rows", [3, 5, 10])
def test_few_rows_change_little_even_where_all_of_them_agree(rows):
    """Targets at the mode say the same each, so that the standard error of their gain is nothing."""
    x, _ = data(rows)
    p = model()(x)
    with pytest.warns(UserWarning, match="the end of what it tries"):
        bold = Calibration.fit(p, p.mode, prior=0.0)
    careful = Calibration.fit(p, p.mode)
    assert bold.inverse_temperature == 2.0 and careful.inverse_temperature <= 1 + rows / 10


def test_a_model_like_the_rows_pays_for_every_change():
    """What the prior counts is KL(p || p_t): 0 for t = 1, and that of two Gaussians where p is one."""
    x, y = data(50)
    with pytest.raises(ValueError, match=r"prior is -1.0; expected a finite number of rows"):
        Calibration.fit(model()(x), y, prior=-1.0)
    assert Calibration.fit(model(0.3)(x), y, prior=1e6).inverse_temperature == 1


def test_weights_count_rows():
    x, y = data(60)
    twice = Calibration.fit(model(0.3)(torch.cat([x, x])), torch.cat([y, y]), least_share=0.0)
    weighted = Calibration.fit(model(0.3)(x), y, np.full(60, 2.0), least_share=0.0)
    assert twice.inverse_temperature == weighted.inverse_temperature


def test_rows_of_several_folds_count_as_those_of_one():
    x, y = data(60)
    sharp = model(0.3)
    whole = Calibration.fit(sharp(x), y, np.arange(60))
    assert Calibration.fit([sharp(x[:20]), sharp(x[20:])], y, np.arange(60)) == whole


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: Calibration(0.0), "inverse_temperature is 0.0"),
        (lambda: Calibration(1.0, 1.0), "base_share is 1.0"),
        (lambda: Calibration.fit(model()(data(3)[0]), data(3)[1], [1.0]), r"sample_weight has shape \(1,\)"),
        (lambda: Calibration.fit([model()(data(3)[0])] * 2, data(3)[1]), r"y has shape \(3,\); expected targets of 6"),
        (lambda: ConformalRegions(model(), *data(9), score="x"), "score is 'x'"),
        (lambda: ConformalRegions(model(), *data(9), groups=[1]), r"groups has shape \(1,\)"),
        (lambda: ConformalRegions("no", *data(9)), "source is a str"),
        (lambda: ConformalRegions(model(), *data(9))(data(2)[0], level=1.0), "level is 1.0"),
        (lambda: ConformalRegions(model(), *data(9))(data(2)[0], groups=[0, 0]), "groups were not given"),
        (lambda: ConformalRegions(model(), *data(9), groups=[0] * 9)(data(2)[0]), "groups were given"),
        (lambda: ConformalRegions(model(), *data(2), groups=[0, 1])(data(1)[0], groups=[7]), "groups has 7"),
        (
            lambda: ConformalIntervals(EnergyRegressionModel.for_table(1, Circle(), width=4), torch.zeros(1, 1), [0.0]),
            "use ConformalRegions",
        ),
    ],
)
def test_a_bad_argument_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()


# ---------------------------------------------------------------------------------------------- conformal sets


ROUNDS, CALIBRATION, NEW = 60, 39, 20


def methods():
    return {
        "mass": ConformalRegions,
        "density": lambda *arguments: ConformalRegions(*arguments, score="density"),
        "intervals": ConformalIntervals,
    }


@pytest.mark.parametrize("method", ["mass", "density", "intervals"])
@pytest.mark.parametrize("scale", [0.15, 1.5])
def test_coverage_holds_in_finite_samples_whatever_the_density(method, scale):
    """The expected coverage is exactly ⌈0.8 · 40⌉ / 40 = 0.8 for continuous scores.

    Given the calibration rows, coverage is Beta(32, 8): variance 0.16 / 41; new rows add 0.16 / 20 each round. The mean
    of 60 rounds has a standard error of √((0.16 / 41 + 0.16 / 20) / 60) = 0.014; four of them are allowed.
    """
    covered = []
    for number in range(ROUNDS):
        x, y = data(CALIBRATION + NEW, seed=100 + number)
        sets = methods()[method](model(scale), x[:CALIBRATION], y[:CALIBRATION])(x[CALIBRATION:], 0.8)
        target = y[CALIBRATION:]
        if method == "intervals":
            inside = (sets[:, 0] <= target) & (target <= sets[:, 1])
        else:
            inside = sets.contains(target[:, None])
            listed = torch.stack(
                [((i[:, 0] <= t) & (t <= i[:, 1])).any() for i, t in zip(sets.intervals, target, strict=True)]
            )
            assert (listed != inside).double().mean() <= 0.1  # intervals end within a cell of the quadrature
        covered.append(float(inside.double().mean()))
    assert abs(np.mean(covered) - 0.8) < 4 * 0.014


def test_coverage_holds_within_each_group():
    """Group 1 is four times as noisy as the model says: without groups it would be covered far too seldom."""
    covered: dict[int, list[float]] = {0: [], 1: []}
    for number in range(40):
        x, y = data(120, seed=number)
        group = np.arange(120) % 2
        y = torch.where(torch.as_tensor(group) == 1, x[:, 0] + 4 * (y - x[:, 0]), y)
        regions = ConformalRegions(model(), x[:78], y[:78], groups=group[:78])(x[78:], 0.8, groups=group[78:])
        inside = regions.contains(y[78:, None]).double().numpy()
        for label in (0, 1):
            covered[label].append(inside[group[78:] == label].mean())
    # As above with 39 rows a group, 21 new ones and 40 rounds: a standard error of 0.017.
    assert all(abs(np.mean(values) - 0.8) < 4 * 0.017 for values in covered.values())


def test_too_few_rows_give_everything():
    x, y = data(5)
    region = ConformalRegions(model(), x, y)(x, 0.9)
    assert (region.log_threshold == -math.inf).all()
    assert region.contains(torch.full((5, 1), 25.0, dtype=torch.double)).all()
    interval = ConformalIntervals(model(), x, y)(x, 0.9)
    assert (interval[:, 0] == -math.inf).all() and (interval[:, 1] == math.inf).all()


def test_the_rank_is_that_of_the_textbook():
    regions = ConformalRegions(model(), *data(9))
    scores = regions.scores[None]
    assert regions.quantile(0.9) == scores[8] and regions.quantile(0.5) == scores[4]
    assert regions.quantile(0.91) == math.inf


# ---------------------------------------------------------------------------------------------- several outputs


class Several(nn.Module):
    """A proposal in three dimensions: independent normal densities with means x, -x and x."""

    def __init__(self, scale: float) -> None:
        super().__init__()
        self.scale, self.dim, self.periodic = scale, 3, None
        self.weight = nn.Parameter(torch.zeros(()))

    def forward(self, context):
        from energyreg.densities.mixtures import GaussianMixture

        mean = context[:, :1, None] * context.new_tensor([1.0, -1.0, 1.0])
        return GaussianMixture(torch.zeros_like(mean[..., 0]), mean, torch.full_like(mean, self.scale))


def data_of_several(rows: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = 2 * torch.randn(rows, 1, generator=generator, dtype=torch.double)
    noise = torch.randn(rows, 3, generator=generator, dtype=torch.double)
    return x, x * torch.tensor([1.0, -1.0, 1.0], dtype=torch.double) + 0.5 * noise


def joint(scale: float) -> EnergyRegressionModel:
    base = ProposalBase(Marginal(3))
    base.fit(data_of_several(4000, 7)[1])
    return EnergyRegressionModel(nn.Identity(), None, proposal=Several(scale), base=base, space=Real(3)).double().eval()


def chained(scale: float) -> EnergyChain:
    """The same density as a chain, whose factors look at x alone, the last column."""

    def factor(d: int) -> EnergyRegressionModel:
        own = EnergyRegressionModel(
            Last((1.0, -1.0, 1.0)[d]), None, proposal=Truth(scale), base=ProposalBase(Marginal())
        ).double()
        own.base.fit(data_of_several(4000, 7)[1][:, [d]])
        return own

    return EnergyChain([factor(d) for d in range(3)]).eval()


class Last(nn.Module):
    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = factor

    def forward(self, x):
        return self.factor * x[:, -1:]


MODELS = {"joint": joint, "chain": chained}
MANY_POINTS = {"joint": ImportanceSampling(4096), "chain": AncestralSampling(4096)}
FEW_POINTS = {"joint": ImportanceSampling(256), "chain": AncestralSampling(256, 64)}


@pytest.mark.parametrize("kind", MODELS)
def test_the_power_of_a_density_of_several_outputs_is_normalised(kind):
    """Normal densities to the power t relative to p₀: the normaliser is a product of three integrals on the line."""
    x = data_of_several(3, 1)[0]
    p = MODELS[kind](0.5)(x, integrator=MANY_POINTS[kind])
    points = torch.linspace(-12, 12, 4801, dtype=torch.double)
    reference = p.energy(slice(0, 3)).reference
    tables = [base.log_prob(points[:, None]) for base in (reference.parts if kind == "chain" else marginals(reference))]
    y = data_of_several(3, 2)[1]
    for t, share in ((0.6, 0.0), (1.4, 0.1), (1.0, 0.05)):
        q = Calibration(t, share)(p)
        mean = x * torch.tensor([1.0, -1.0, 1.0], dtype=torch.double)
        expected, log_p0 = torch.zeros(3, dtype=torch.double), reference.log_prob(y)
        for d, table in enumerate(tables):
            log_p = torch.distributions.Normal(mean[:, d], 0.5).log_prob(points[:, None])
            log_z = torch.trapezoid((t * log_p + (1 - t) * table[:, None]).exp(), points, dim=0).log()
            expected = expected + t * torch.distributions.Normal(mean[:, d], 0.5).log_prob(y[:, d]) - log_z
        expected = expected + (1 - t) * log_p0
        if share:
            expected = torch.logaddexp(expected + math.log1p(-share), log_p0 + math.log(share))
        torch.testing.assert_close(q.log_prob(y), expected, atol=0.05, rtol=0)
        assert (q.diagnostics.log_partition == 0).all() and q.mean.isfinite().all()
        masses = torch.cat([chunk.masses for chunk in q.blocks()], 1).sum(0)
        torch.testing.assert_close(masses, torch.ones(3, dtype=torch.double))
        draws = q.sample((500,), generator=torch.Generator().manual_seed(0))
        inside = q.highest_density_region(0.8).contains(draws).double().mean()
        assert inside == pytest.approx(0.8, abs=0.05)


def marginals(reference: Marginal) -> list[Marginal]:
    """The dimensions of a product measure by themselves."""
    y = data_of_several(4000, 7)[1]
    parts = [Marginal() for _ in range(3)]
    for d, part in enumerate(parts):
        part.double().fit(y[:, [d]])
    return parts


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize(("scale", "power"), [(0.42, 0.69), (0.6, 1.48)])
def test_a_known_wrong_temperature_is_recovered(kind, scale, power):
    """Of a marginal with variance 4.25: t / s² + (1 - t) / 4.25 = 1 / 0.25 gives the power that makes the truth.

    With 300 targets in three dimensions log t has a standard error of √(2 / 900) = 0.05, the grid's steps are as long.
    """
    x, y = data_of_several(300)
    wrong = MODELS[kind](scale)
    p = wrong(x, integrator=FEW_POINTS[kind])
    calibration = Calibration.fit(p, y)
    assert calibration.inverse_temperature == pytest.approx(power, rel=0.2)
    assert Calibration(power)(p).log_prob(y).mean() > p.log_prob(y).mean() + 0.05


def test_a_good_density_of_several_outputs_is_left_alone():
    x, y = data_of_several(300)
    calibration = Calibration.fit(joint(0.5)(x, integrator=FEW_POINTS["joint"]), y)
    assert abs(math.log(calibration.inverse_temperature)) < 0.2 and calibration.base_share <= 0.01


def test_boxes_of_several_outputs_cover_together():
    """As in one dimension: a standard error of 0.014 over 60 rounds; here 30 of them, 0.02."""
    covered, single = [], []
    several = joint(0.3)

    def predict(x):
        return several(x, integrator=FEW_POINTS["joint"])

    for number in range(30):
        x, y = data_of_several(CALIBRATION + NEW, seed=100 + number)
        boxes = ConformalIntervals(predict, x[:CALIBRATION], y[:CALIBRATION])(x[CALIBRATION:], 0.8)
        assert boxes.shape == (NEW, 3, 2)
        inside = (boxes[..., 0] <= y[CALIBRATION:]) & (y[CALIBRATION:] <= boxes[..., 1])
        covered.append(float(inside.all(1).double().mean()))
        single.append(float(inside.double().mean()))
    assert abs(np.mean(covered) - 0.8) < 4 * 0.02
    assert np.mean(single) > np.mean(covered)


@pytest.mark.parametrize("score", ["mass", "density"])
@pytest.mark.parametrize("kind", MODELS)
def test_regions_of_several_outputs_cover_within_groups(kind, score):
    """Group 1 is four times as noisy as the model says. 12 rounds of 39 calibration rows and 15 new ones in each group:
    a standard error of √((0.16 / 41 + 0.16 / 15) / 12) = 0.035; four of them are allowed."""
    covered: dict[int, list[float]] = {0: [], 1: []}
    source = Calibration(0.8, 0.02)
    several = MODELS[kind](0.5)

    def predict(x):
        return source(several(x, integrator=AncestralSampling(48, 32) if kind == "chain" else ImportanceSampling(128)))

    for number in range(12):
        x, y = data_of_several(108, seed=number)
        group = np.arange(108) % 2
        mean = x * torch.tensor([1.0, -1.0, 1.0], dtype=torch.double)
        y = torch.where(torch.as_tensor(group)[:, None] == 1, mean + 4 * (y - mean), y)
        regions = ConformalRegions(predict, x[:78], y[:78], groups=group[:78], score=score)
        inside = regions(x[78:], 0.8, groups=group[78:]).contains(y[78:]).double().numpy()
        for label in (0, 1):
            covered[label].append(inside[group[78:] == label].mean())
    assert all(abs(np.mean(values) - 0.8) < 4 * 0.035 for values in covered.values())


def test_boxes_with_too_few_rows_are_everything():
    x, y = data_of_several(5)
    boxes = ConformalIntervals(joint(0.5), x, y)(x, 0.9)
    assert (boxes[..., 0] == -math.inf).all() and (boxes[..., 1] == math.inf).all()


def test_regions_of_several_dimensions_are_thresholds():
    several = EnergyRegressionModel.mixture_for_table(1, Real(3), width=4).eval()
    x = torch.randn(30, 1)
    y = several(x).sample((1,))[0]
    region = ConformalRegions(several, x, y)(x, 0.8)
    assert region.intervals is None and region.contains(y).double().mean() >= 0.8
