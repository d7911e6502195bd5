"""The scores agree with closed forms, and refuse what they cannot score."""

import builtins
import math
import warnings

import numpy as np
import pytest
import torch
from scipy.special import ndtr

from energyreg.densities.spaces import Circle
from energyreg.evaluation import metrics
from energyreg.models.model import EnergyRegressionModel

scoringrules = pytest.importorskip("scoringrules")


class KnownMixture:
    """Gaussian mixture with the interface of a predictive distribution; weights, means, scales of shape (B, K)."""

    def __init__(self, weights, means, scales):
        self.weights, self.means, self.scales = (
            torch.as_tensor(v, dtype=torch.float64) for v in (weights, means, scales)
        )
        self.batch_shape, self.event_shape = torch.Size(self.means.shape[:1]), torch.Size((1,))

    def log_prob(self, y):
        z = (y - self.means) / self.scales
        return (self.weights.log() - self.scales.log() - 0.5 * math.log(2 * math.pi) - 0.5 * z**2).logsumexp(-1)

    def cdf(self, y):
        return (self.weights * torch.special.ndtr((y - self.means) / self.scales)).sum(-1)

    def quantile(self, levels):
        levels = torch.as_tensor(levels, dtype=torch.float64)
        low = (self.means - 9 * self.scales).amin(-1).expand(*levels.shape, -1).clone()
        high = (self.means + 9 * self.scales).amax(-1).expand(*levels.shape, -1).clone()
        for _ in range(60):
            middle = (low + high) / 2
            below = self.cdf(middle[..., None]) < levels[..., None]
            low, high = torch.where(below, middle, low), torch.where(below, high, middle)
        return (low + high) / 2

    def interval(self, level):
        return self.quantile(torch.tensor([(1 - level) / 2, (1 + level) / 2])).T

    def sample(self, sample_shape=(), *, generator=None):
        weights = self.weights.expand(*sample_shape, *self.weights.shape).reshape(-1, self.weights.shape[-1])
        component = torch.multinomial(weights, 1, generator=generator).reshape(*sample_shape, -1, 1)
        noise = torch.randn(component.shape, generator=generator, dtype=torch.float64)
        pick = [v.expand(*sample_shape, *v.shape).gather(-1, component) for v in (self.means, self.scales)]
        return pick[0] + pick[1] * noise


class KnownGaussian2D:
    """Standard normal in the plane for every row."""

    def __init__(self, rows):
        self.batch_shape, self.event_shape = torch.Size((rows,)), torch.Size((2,))

    def log_prob(self, y):
        return -0.5 * (y**2).sum(-1) - math.log(2 * math.pi)

    def sample(self, sample_shape=(), *, generator=None):
        return torch.randn(*sample_shape, *self.batch_shape, 2, generator=generator, dtype=torch.float64)

    def highest_density_region(self, level):
        class Disc:
            def contains(self, y):
                return (y**2).sum(-1) <= -2 * math.log(1 - level)

        return Disc()


def gaussian(rows, loc=0.0, scale=1.0):
    return KnownMixture(torch.ones(rows, 1), torch.full((rows, 1), loc), torch.full((rows, 1), scale))


def two_modes(rows):
    generator = torch.Generator().manual_seed(1)
    weights = torch.rand(rows, 3, generator=generator) + 0.1
    means = 4 * torch.randn(rows, 3, generator=generator)
    return KnownMixture(weights / weights.sum(-1, keepdim=True), means, torch.rand(rows, 3, generator=generator) + 0.05)


@pytest.fixture
def mixture():
    p = two_modes(300)
    return p, p.sample(generator=torch.Generator().manual_seed(2))


def test_nll_is_the_closed_form():
    y = np.array([0.0, 1.0, -3.0])
    expected = np.mean(0.5 * math.log(2 * math.pi) + math.log(2.0) + 0.5 * ((y - 1.0) / 2.0) ** 2)
    assert metrics.negative_log_likelihood(gaussian(3, 1.0, 2.0), y) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("scale", [1e-3, 1.0, 50.0])
def test_crps_is_the_closed_form_of_a_gaussian(scale):
    y = scale * np.linspace(-3.5, 3.5, 101)
    expected = scoringrules.crps_normal(y, 0.0, scale, backend="numpy").mean()
    assert metrics.crps(gaussian(101, 0.0, scale), y) == pytest.approx(expected, rel=1e-3)


def test_crps_is_the_closed_form_of_a_mixture(mixture):
    p, y = mixture
    arguments = (v.numpy() for v in (y[:, 0], p.means, p.scales, p.weights))
    expected = scoringrules.crps_mixnorm(*arguments, backend="numpy").mean()
    assert metrics.crps(p, y) == pytest.approx(expected, rel=1e-3)


def test_crps_does_not_depend_on_the_chunks(mixture, monkeypatch):
    p, y = mixture
    whole, sampled = metrics.crps(p, y), metrics.energy_score(p, y, num_samples=20)
    monkeypatch.setattr(metrics, "_BUDGET", 1700)
    assert metrics.crps(p, y) == pytest.approx(whole, rel=1e-12)
    assert metrics.energy_score(p, y, num_samples=20) == pytest.approx(sampled, rel=1e-12)


def test_energy_score_of_one_dimension_is_the_crps(mixture):
    p, y = mixture
    # 300 rows of 512 samples: the estimate scatters by about 0.1 σ / √(300 · 512) · few, far below 1 %.
    assert metrics.energy_score(p, y, num_samples=512) == pytest.approx(metrics.crps(p, y), rel=0.01)


def test_energy_score_is_the_closed_form_in_the_plane():
    # E‖Y‖ = √(π/2) and E‖Y − Y'‖ = √π for standard normals in the plane, so the score at y = 0 is √(π/2) − √π / 2.
    expected = math.sqrt(math.pi / 2) - math.sqrt(math.pi) / 2
    # Standard error of the mean: about 0.66 / √(400 · 200) = 0.0023, so 3e-2 relative is 5 of them.
    score = metrics.energy_score(KnownGaussian2D(400), torch.zeros(400, 2), num_samples=200)
    assert score == pytest.approx(expected, rel=3e-2)


def test_true_density_is_calibrated(mixture):
    p, y = mixture
    rows = y.shape[0]
    assert metrics.kolmogorov_smirnov(p, y) < 1.95 / math.sqrt(rows)  # exceeded by chance once in 1,000
    assert metrics.calibration_error(p, y) < 0.8 / math.sqrt(rows)  # 0.31 / √B expected
    for level in (0.5, 0.9):
        assert abs(metrics.coverage(p, y, level) - level) < 4 * math.sqrt(level * (1 - level) / rows)


def test_pit_is_the_cdf_and_uniform_on_its_own_quantiles():
    levels = (np.arange(50) + 0.5) / 50
    p = gaussian(50, 2.0, 3.0)
    y = p.quantile(torch.from_numpy(levels))[torch.arange(50), torch.arange(50)]
    np.testing.assert_allclose(metrics.pit(p, y), levels, atol=1e-9)
    np.testing.assert_allclose(metrics.pit(p, y), ndtr((y.numpy() - 2.0) / 3.0), atol=1e-12)
    # Each empirical step of 1/50 is centred on the diagonal: KS is half a step, the mean gap a quarter of one.
    assert metrics.kolmogorov_smirnov(p, y) == pytest.approx(0.01, abs=1e-9)
    assert metrics.calibration_error(p, y) == pytest.approx(0.005, abs=1e-9)


def test_calibration_error_of_a_sure_and_wrong_model_is_one_half():
    p = gaussian(20, 0.0, 1e-6)
    assert metrics.calibration_error(p, torch.full((20,), 5.0)) == pytest.approx(0.5, abs=1e-9)
    assert metrics.kolmogorov_smirnov(p, torch.full((20,), 5.0)) == pytest.approx(1.0, abs=1e-9)


def test_coverage_and_width_of_a_gaussian():
    p = gaussian(4)
    half = 1.6448536269514722
    assert metrics.interval_width(p, 0.9) == pytest.approx(2 * half, rel=1e-6)
    assert metrics.coverage(p, [0.0, half - 1e-6, half + 1e-6, -half - 1e-6], 0.9) == 0.5


def test_coverage_of_several_dimensions_is_that_of_the_highest_density_region():
    p = KnownGaussian2D(20_000)
    y = p.sample(generator=torch.Generator().manual_seed(3))
    assert abs(metrics.coverage(p, y, 0.9) - 0.9) < 4 * math.sqrt(0.09 / 20_000)


def test_coverage_goes_around_the_circle():
    class Arc:  # 0.9 of the probability from 350° to 370°, which is 10°
        batch_shape, event_shape, space = torch.Size((4,)), torch.Size((1,)), Circle(360.0)

        def interval(self, level):
            return torch.tensor([[350.0, 370.0]], dtype=torch.float64).expand(4, 2)

    assert metrics.coverage(Arc(), [[355.0], [5.0], [-3.0], [180.0]]) == 0.75


def test_coverage_of_a_model_of_angles_does_not_depend_on_the_turn():
    torch.manual_seed(0)
    model = EnergyRegressionModel.for_table(2, Circle(360.0), width=8)
    x, y = torch.randn(40, 2), 360 * torch.rand(40, 1)
    model.fit_preprocessing(x, y)
    p = model.eval()(x)
    low, high = p.interval(0.9)[:, :1].double(), p.interval(0.9)[:, 1:].double()
    within = low + 0.5 * (high - low)
    assert metrics.coverage(p, within) == metrics.coverage(p, within % 360) == metrics.coverage(p, within - 360) == 1


def test_a_read_only_array_does_not_warn():
    y = np.zeros(3)
    y.flags.writeable = False
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        metrics.negative_log_likelihood(gaussian(3), y)


def test_evaluate_gathers_the_scores(mixture):
    p, y = mixture
    scores = metrics.evaluate(p, y, level=0.8)
    assert scores.keys() == {"nll", "crps", "coverage", "interval_width", "calibration_error", "ks"}
    assert all(type(value) is float for value in scores.values())
    assert scores["coverage"] == metrics.coverage(p, y, 0.8)
    plane = KnownGaussian2D(30)
    assert metrics.evaluate(plane, torch.zeros(30, 2)).keys() == {"nll", "energy_score", "coverage"}


def test_targets_may_be_a_column_or_flat_in_numpy_or_torch(mixture):
    p, y = mixture
    for same in (y, y[:, 0], y.numpy(), y[:, 0].float()):
        assert metrics.negative_log_likelihood(p, same) == pytest.approx(
            metrics.negative_log_likelihood(p, y), rel=1e-5
        )


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: metrics.crps(gaussian(3), np.zeros(4)), r"shape \(4, 1\).*3 rows"),
        (lambda: metrics.pit(gaussian(3), np.zeros((3, 2))), r"shape \(3, 2\)"),
        (lambda: metrics.coverage(gaussian(3), [0.0, math.nan, 1.0]), r"1 row.*row 1"),
        (lambda: metrics.coverage(gaussian(1), [0.0], level=90), "level is 90"),
        (lambda: metrics.interval_width(gaussian(1), level=0.0), "level is 0"),
        (lambda: metrics.crps(gaussian(0), np.zeros((0, 1))), "no rows"),
        (lambda: metrics.crps(gaussian(1), [0.0], num_quantiles=0), "num_quantiles is 0"),
        (lambda: metrics.energy_score(gaussian(1), [0.0], num_samples=1), "num_samples is 1"),
        (lambda: metrics.crps(KnownGaussian2D(2), np.zeros((2, 2))), "one target dimension.*Use energy_score"),
        (lambda: metrics.interval_width(KnownGaussian2D(2)), "one target dimension"),
    ],
)
def test_bad_input_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_missing_scoringrules_names_the_extra(monkeypatch):
    imported = builtins.__import__

    def without(name, *args, **kwargs):
        if name == "scoringrules":
            raise ImportError(name)
        return imported(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ImportError, match=r"energyreg\[tables\]"):
        metrics.crps(gaussian(1), [0.0])
