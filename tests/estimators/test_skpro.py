"""The adapter passes skpro's own checks, and its numbers are those of known densities and of the estimator."""

from __future__ import annotations

import inspect
import math
import runpy
import sys

import numpy as np
import pytest
import torch

import energyreg as er
from energyreg.densities.bases import Marginal, ProposalBase
from energyreg.densities.spaces import Circle, Interval, Positive, Real, TargetSpace
from energyreg.networks.proposals import MixtureDensityNetwork

pd = pytest.importorskip("pandas")
pytest.importorskip("skpro")

from skpro.metrics import CRPS, LogLoss, SquaredDistrLoss  # noqa: E402
from skpro.utils import check_estimator  # noqa: E402

from energyreg.estimators.skpro import EnergyDistribution, EnergyProbaRegressor  # noqa: E402

WEIGHTS, MEANS, SCALES = [0.35, 0.65], [-1.1, 0.9], [0.3, 0.5]
SMALL = {"n_members": 1, "epochs": 2, "width": 8, "depth": 1, "random_state": 0}


def mixture(space: TargetSpace, weights: list[float], means: list[float], scales: list[float]):
    """A model whose p(z|x) is a Gaussian mixture in model space, the same for every x."""
    q = MixtureDensityNetwork(1, space.dim, len(weights), periodic=space.periodic, min_scale=1e-6)
    shape = len(weights), space.dim
    table = torch.zeros(len(weights), 1 + 2 * space.dim, dtype=torch.double)
    table[:, 0] = torch.tensor(weights).log()
    table[:, 1 : 1 + space.dim] = torch.tensor(means, dtype=torch.double).reshape(shape)
    table[:, 1 + space.dim :] = (torch.tensor(scales, dtype=torch.double).reshape(shape) - 1e-6).expm1().log()
    with torch.no_grad():
        q.output.weight.zero_()
        q.output.bias.copy_(table.reshape(-1))
    base = ProposalBase(Marginal(space.dim, space.periodic))
    return er.EnergyRegressionModel(torch.nn.Identity(), None, proposal=q, base=base, space=space).double().eval()


def predictive(space: TargetSpace, rows: int = 5, weights=WEIGHTS, means=MEANS, scales=SCALES):
    return mixture(space, weights, means, scales)(torch.zeros(rows, 1, dtype=torch.double))


def gaussian(mean: float = 0.3, scale: float = 0.7, rows: int = 5) -> EnergyDistribution:
    return EnergyDistribution(predictive(Real(), rows, [1.0], [mean], [scale]))


def different(rows: int = 5) -> EnergyDistribution:
    """Rows that differ, with labels that do not stand in order."""
    torch.manual_seed(0)
    model = er.EnergyRegressionModel.for_table(2, width=16).double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape))
    index = [f"row {i}" for i in (3, 0, 4, 1, 2)][:rows]
    return EnergyDistribution(model(torch.randn(rows, 2, dtype=torch.double)), index=index, columns=["price"])


def absolute_mean(distance, scale):
    """E|d + s N| of a standard normal N."""
    distance = np.asarray(distance)
    root = math.sqrt(2) * scale
    return distance * np.vectorize(math.erf)(distance / root) + scale * math.sqrt(2 / math.pi) * np.exp(
        -((distance / root) ** 2)
    )


def table(rows: int = 80):
    rng = np.random.default_rng(0)
    X = pd.DataFrame(
        {
            "size": rng.normal(size=rows),
            "town": rng.choice(["north", "south"], rows),
            "sold": pd.Timestamp("2024-01-01") + pd.to_timedelta(rng.integers(0, 99, rows), unit="D"),
        },
        index=pd.Index(rng.permutation(rows) + 1000, name="id"),
    )
    X.loc[X.index[3], "size"] = np.nan
    y = pd.DataFrame({"price": X["size"].fillna(0) + rng.normal(size=rows)}, index=X.index)
    return X, y


@pytest.fixture(scope="module")
def fitted():
    X, y = table()
    return EnergyProbaRegressor(er.EnergyRegressor(**SMALL)).fit(X, y), X, y


# skpro's own checks ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [EnergyDistribution, EnergyProbaRegressor])
def test_skpros_own_checks_pass(kind) -> None:
    results = check_estimator(kind, raise_exceptions=True, verbose=False)
    assert len(results) > 50 and set(results.values()) == {"PASSED"}


# The distribution: known densities ------------------------------------------------------------------------------------


def test_a_gaussian_has_its_closed_forms() -> None:
    mean, scale = 0.3, 0.7
    d = gaussian(mean, scale)
    y = mean + scale * np.array([[-4.0], [-1.0], [0.0], [0.5], [3.0]])
    z = (y - mean) / scale
    density = np.exp(-(z**2) / 2) / (scale * math.sqrt(2 * math.pi))
    below = np.vectorize(lambda t: 0.5 * math.erfc(-t / math.sqrt(2)))(z)
    np.testing.assert_allclose(d.mean(), np.full((5, 1), mean), rtol=1e-5)
    np.testing.assert_allclose(d.var(), np.full((5, 1), scale**2), rtol=1e-5)
    np.testing.assert_allclose(d.pdf(y), density, rtol=1e-5)
    np.testing.assert_allclose(d.log_pdf(y), np.log(density), atol=1e-5)
    np.testing.assert_allclose(d.cdf(y), below, rtol=1e-3, atol=1e-6)
    np.testing.assert_allclose(d.ppf(below), y, atol=1e-3)
    # Of 512 points: distances are right to about 2e-5 of the scale.
    np.testing.assert_allclose(d.energy(), np.full((5, 1), 2 * scale / math.sqrt(math.pi)), rtol=5e-5)
    np.testing.assert_allclose(d.energy(y), absolute_mean(y - mean, scale), rtol=5e-5)
    np.testing.assert_allclose(d.pdfnorm(2), np.full((5, 1), 1 / (2 * scale * math.sqrt(math.pi))), rtol=1e-5)
    np.testing.assert_allclose(d.pdfnorm(3), np.full((5, 1), 1 / (2 * math.pi * scale**2 * math.sqrt(3))), rtol=1e-5)


@pytest.mark.parametrize(
    ("means", "scales", "error"),
    # The last is just too broad to get points of its own, so that a tenth of its mass falls on one.
    [([-1.1, 0.9], [0.3, 0.5], 5e-5), ([-3.0, 3.0], [0.05, 0.02], 5e-5), ([0.3, 0.3], [0.05, 0.05], 2e-3)],
    ids=["near", "far", "sharp"],
)
def test_the_energy_of_a_mixture_is_its_closed_form(means, scales, error) -> None:
    d = EnergyDistribution(predictive(Real(), 5, WEIGHTS, means, scales))
    y = np.linspace(-3.0, 3.0, 5)[:, None]
    parts = list(zip(WEIGHTS, means, scales, strict=True))
    to_point = sum(w * absolute_mean(y - m, s) for w, m, s in parts)
    to_self = sum(v * w * absolute_mean(m - n, math.hypot(s, t)) for v, m, s in parts for w, n, t in parts)
    np.testing.assert_allclose(d.energy(y), to_point, rtol=error)
    np.testing.assert_allclose(d.energy(), np.full((5, 1), to_self), rtol=error)


@pytest.mark.parametrize(
    "space", [Positive(), Interval(-1.0, 3.0), Circle(360.0, low=-180.0)], ids=lambda s: str(s)[:8]
)
def test_cdf_and_energy_are_integrals_of_the_density(space: TargetSpace) -> None:
    d = EnergyDistribution(predictive(space, 1))
    low, high = {Positive: (0.0, 60.0), Interval: (-1.0, 3.0), Circle: (-180.0, 180.0)}[type(space)]
    edges = np.linspace(low, high, 20_001)
    y = (edges[1:] + edges[:-1]) / 2
    mass = np.exp(d.distribution.log_prob(torch.as_tensor(y)[:, None, None])[:, 0].numpy()) * np.diff(edges)
    assert mass.sum() == pytest.approx(1, abs=1e-3)
    at = d.ppf([[0.3]]).iloc[0, 0]
    assert d.cdf([[at]]).iloc[0, 0] == pytest.approx(0.3, abs=1e-6)
    assert mass[y <= at].sum() == pytest.approx(0.3, abs=1e-3)
    below = mass.cumsum() - mass / 2
    assert d.energy([[at]]).iloc[0, 0] == pytest.approx((mass * np.abs(y - at)).sum(), rel=2e-3)
    assert d.energy().iloc[0, 0] == pytest.approx(2 * (mass * (2 * below - 1) * y).sum(), rel=2e-3)
    assert d.pdfnorm(2).iloc[0, 0] == pytest.approx((mass**2 / np.diff(edges)).sum(), rel=2e-3)


def test_outside_the_space_there_is_no_density() -> None:
    d = EnergyDistribution(predictive(Positive(), 2))
    assert (d.pdf(-1.0) == 0).all(axis=None) and (d.log_pdf(-1.0) == -np.inf).all(axis=None)
    assert (d.cdf(-1.0) == 0).all(axis=None)


def test_the_energy_of_weighted_points_is_that_of_their_discrete_distribution() -> None:
    model = mixture(Real(), WEIGHTS, MEANS, SCALES)
    p = model(torch.zeros(2, 1, dtype=torch.double), integrator=er.integrators.ImportanceSampling(300))
    y, w = (
        part.numpy() for part in p.gather(lambda c: torch.stack([c.nodes.y[..., 0].expand_as(c.masses), c.masses]), 2)
    )
    expected = [(np.abs(np.subtract.outer(y[:, i], y[:, i])) * np.outer(w[:, i], w[:, i])).sum() for i in range(2)]
    d = EnergyDistribution(p)
    np.testing.assert_allclose(d.energy()["energy"], expected, rtol=1e-6)
    np.testing.assert_allclose(d.energy(0.2)["energy"], (w * np.abs(y - 0.2)).sum(0), rtol=1e-6)


def test_missing_points_give_missing_values() -> None:
    d = gaussian(rows=2)
    for values in (d.pdf([[np.nan], [0.0]]), d.cdf([[np.nan], [0.0]]), d.energy(pd.DataFrame([[np.nan], [0.0]]))):
        assert values.isna().iloc[:, 0].tolist() == [True, False]


def test_samples_follow_the_cdf_and_numpys_seed() -> None:
    d = different()
    np.random.seed(1)
    draws = d.sample(2000)
    assert draws.index.equals(pd.MultiIndex.from_product([range(2000), d.index]))
    levels = d.distribution.cdf(torch.tensor(draws.to_numpy().reshape(2000, 5, 1))).sort(0).values.numpy()
    # Kolmogorov-Smirnov of each row: 1.95 / √n is passed once in a thousand.
    assert np.abs(levels - (np.arange(2000)[:, None] + 0.5) / 2000).max() < 1.95 / math.sqrt(2000)
    np.random.seed(1)
    pd.testing.assert_frame_equal(d.sample(2000), draws)
    np.random.seed(2)
    assert not d.sample(2000).equals(draws)


# The distribution: rows -----------------------------------------------------------------------------------------------

METHODS = ["mean", "var", "pdf", "log_pdf", "cdf", "ppf", "energy", "pdfnorm"]


def ask(d: EnergyDistribution, method: str):
    return getattr(d, method)(*([0.4] if method in ("pdf", "log_pdf", "cdf", "ppf") else []))


@pytest.mark.parametrize("method", METHODS)
def test_rows_that_are_taken_keep_their_numbers(method: str) -> None:
    d = different()
    whole = ask(d, method)
    assert np.diff(np.sort(whole.to_numpy(), axis=0), axis=0).min() > 1e-5  # no two rows are the same
    taken = {
        "numbers": (d.iloc[[2, 0]], whole.iloc[[2, 0]]),
        "slice": (d.iloc[1:4], whole.iloc[1:4]),
        "mask": (d.iloc[np.arange(5) > 2], whole.iloc[np.arange(5) > 2]),
        "last": (d.iloc[-1], whole.iloc[[-1]]),
        "labels": (d.loc[["row 1", "row 3"]], whole.loc[["row 1", "row 3"]]),
        "label": (d.loc["row 2"], whole.loc[["row 2"]]),
        "label slice": (d.loc["row 0":"row 1"], whole.loc["row 0":"row 1"]),
        "twice": (d.iloc[[3, 1, 4]].iloc[[2, 0]], whole.iloc[[4, 3]]),
        "column": (d.loc[["row 1"], ["price"]], whole.loc[["row 1"]]),
    }
    for name, (part, expected) in taken.items():
        pd.testing.assert_frame_equal(ask(part, method), expected, rtol=1e-6, obj=name)
    for one in (d.iat[3, 0], d.at["row 1", "price"], d.iloc[3, 0], d.loc["row 1", "price"]):
        assert one.shape == () and isinstance(ask(one, method), float)
        assert ask(one, method) == pytest.approx(whole.iloc[3, 0], rel=1e-6)


def test_a_frame_of_points_chooses_rows_by_its_labels() -> None:
    d = different()
    y = pd.DataFrame({"price": [0.1, -0.2]}, index=["row 2", "row 3"])
    expected = [d.loc[[label]].pdf(y.loc[[label]]).iloc[0, 0] for label in y.index]
    result = d.pdf(y)
    assert result.index.equals(y.index) and result["price"].tolist() == pytest.approx(expected)


def test_labels_may_have_levels_or_be_there_twice() -> None:
    p = different().distribution
    levels = pd.MultiIndex.from_tuples([("a", 0), ("a", 1), ("b", 0), ("b", 1), ("c", 0)], names=["town", "day"])
    d = EnergyDistribution(p, index=levels)
    pd.testing.assert_index_equal(d.loc[[("b", 1)]].mean().index, levels[[3]])
    pd.testing.assert_index_equal(d.sample().index, levels)
    assert d.sample(2).index.names == [None, "town", "day"]
    twice = EnergyDistribution(p, index=["u", "u", "v", "w", "w"])
    points = pd.DataFrame(np.arange(5.0)[:, None], index=twice.index, columns=twice.columns)
    np.testing.assert_array_equal(twice.cdf(points), different().cdf(points.to_numpy()))


def test_a_calibrated_distribution_keeps_its_rows() -> None:
    p = er.calibration.Calibration(0.7, 0.1)(different().distribution)
    d = EnergyDistribution(p)
    pd.testing.assert_frame_equal(d.iloc[[4, 1]].pdf(0.3), d.pdf(0.3).iloc[[4, 1]], rtol=1e-6)
    assert not np.allclose(d.pdf(0.3), different().pdf(0.3))


def test_a_clone_gives_the_same() -> None:
    for d in (different(), different().iat[2, 0]):
        copy = d.clone()
        assert copy is not d and np.array_equal(copy.mean(), d.mean()) and np.array_equal(copy.cdf(0.3), d.cdf(0.3))


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda p: EnergyDistribution(3.0), TypeError, "distribution is a float"),
        (lambda p: EnergyDistribution(p, index=[1]), ValueError, r"index has 1 label\(s\); expected 5"),
        (lambda p: EnergyDistribution(p, columns=["a", "b"]), ValueError, r"columns has 2 label\(s\); expected 1"),
        (lambda p: EnergyDistribution(p, row=5), ValueError, "row is 5; expected a row of the 5"),
        (lambda p: EnergyDistribution(p, row=0, columns=["a"]), ValueError, "expected no index and no columns"),
        (lambda p: EnergyDistribution(p).loc[[7]], KeyError, "7"),
        (lambda p: EnergyDistribution(p).at[7, 0], KeyError, "7"),
        (lambda p: EnergyDistribution(p).at[7], ValueError, "two keys"),
        (lambda p: EnergyDistribution(p).iloc[[5]], IndexError, "out of bounds"),
        (lambda p: EnergyDistribution(p).iloc[:, [0, 0]], ValueError, "2 columns were asked for; expected 1"),
        (lambda p: EnergyDistribution(p).iloc[[]], ValueError, "No rows were asked for"),
        (lambda p: EnergyDistribution(p).ppf(1.5), ValueError, "expected probabilities"),
    ],
)
def test_wrong_arguments_are_named(call, error, message) -> None:
    with pytest.raises(error, match=message):
        call(predictive(Real()))


def test_several_dimensions_are_refused() -> None:
    with pytest.raises(ValueError, match="distribution has 2 target dimensions; expected one"):
        EnergyDistribution(predictive(er.spaces.Product(Real(), Real()), means=[0.0] * 4, scales=[1.0] * 4))


# The regressor --------------------------------------------------------------------------------------------------------


def test_the_parameters_are_those_of_the_estimator() -> None:
    estimator = er.EnergyRegressor(**SMALL)
    ours = EnergyProbaRegressor(estimator).get_params()
    assert ours.pop("regressor") is estimator
    assert ours == {f"regressor__{name}": value for name, value in estimator.get_params().items()}


def test_predictions_are_those_of_the_estimator(fitted) -> None:
    regressor, X, y = fitted
    estimator = er.EnergyRegressor(**SMALL).fit(X, y["price"].to_numpy())
    new = X[10:17]
    for frame in (regressor.predict(new), regressor.predict_var(new)):
        assert frame.index.equals(new.index) and list(frame.columns) == ["price"]
    p = estimator.predict_distribution(new)
    np.testing.assert_array_equal(regressor.predict(new)["price"], estimator.predict(new))
    np.testing.assert_array_equal(regressor.predict_var(new), p.variance)
    levels = [0.9, 0.2]
    intervals = regressor.predict_interval(new, coverage=levels)
    assert intervals.columns.tolist() == [("price", c, end) for c in levels for end in ("lower", "upper")]
    for level in levels:
        np.testing.assert_array_equal(intervals.xs(level, axis=1, level=1), estimator.predict_interval(new, level))
    quantiles = regressor.predict_quantiles(new, alpha=levels)
    np.testing.assert_array_equal(quantiles["price"], estimator.predict_quantiles(new, levels))
    d = regressor.predict_proba(new)
    assert d.index.equals(new.index) and list(d.columns) == ["price"]
    np.testing.assert_allclose(d.quantile(levels), quantiles, rtol=1e-9)
    np.testing.assert_allclose(d.log_pdf(y[10:17])["price"], estimator.score_samples(new, y["price"][10:17]))


def test_skpros_metrics_agree_with_ours(fitted) -> None:
    regressor, X, y = fitted
    d, p = regressor.predict_proba(X), regressor.estimator_.predict_distribution(X)
    assert LogLoss()(y, d) == pytest.approx(er.metrics.negative_log_likelihood(p, y.to_numpy(copy=True)), rel=1e-9)
    assert CRPS()(y, d) == pytest.approx(er.metrics.crps(p, y.to_numpy(copy=True)), rel=1e-3)
    expected = (d.pdfnorm() - 2 * d.pdf(y)).to_numpy().mean()
    assert SquaredDistrLoss()(y, d) == pytest.approx(expected, rel=1e-9)


def test_a_clone_with_other_parameters_is_a_fresh_one(fitted) -> None:
    regressor, X, y = fitted
    again = regressor.clone()
    assert not again.is_fitted and repr(again.get_params()) == repr(regressor.get_params())
    np.testing.assert_array_equal(again.fit(X, y).predict(X), regressor.predict(X))
    other = again.clone().set_params(regressor__random_state=1)
    assert not np.array_equal(other.fit(X, y).predict(X), regressor.predict(X))


def test_conformal_intervals_and_whole_counts_come_through() -> None:
    X, y = table()
    conformal = EnergyProbaRegressor(er.EnergyRegressor(**SMALL, conformal=True)).fit(X, y)
    np.testing.assert_array_equal(
        conformal.predict_interval(X, coverage=0.8), conformal.estimator_.predict_interval(X, 0.8)
    )
    assert not np.allclose(conformal.predict_interval(X, coverage=0.8), conformal.predict_quantiles(X, [0.1, 0.9]))
    counts = pd.DataFrame({"visits": np.random.default_rng(0).poisson(3, len(X))}, index=X.index)
    visits = EnergyProbaRegressor(er.EnergyRegressor(**SMALL, target="count")).fit(X, counts)
    quantiles = visits.predict_quantiles(X, [0.1, 0.5])
    assert (quantiles == quantiles.round()).all(axis=None) and (quantiles >= 0).all(axis=None)


def test_arrays_come_back_as_arrays() -> None:
    X = np.random.default_rng(0).normal(size=(40, 2))
    regressor = EnergyProbaRegressor(er.EnergyRegressor(**SMALL)).fit(X, X[:, 0])
    assert isinstance(regressor.predict(X), np.ndarray) and regressor.predict(X).shape == (40,)
    assert regressor.predict_proba(X).shape == (40, 1)


def test_several_outputs_are_refused(fitted) -> None:
    _, X, y = fitted
    with pytest.raises(ValueError, match="y has 2 columns; expected one"):
        EnergyProbaRegressor(er.EnergyRegressor(**SMALL)).fit(X, y.assign(other=1.0))


@pytest.mark.parametrize("method", ["predict", "predict_proba", "predict_var", "predict_interval", "predict_quantiles"])
def test_an_unfitted_regressor_says_so(method: str) -> None:
    with pytest.raises(Exception, match="has not been fitted"):
        getattr(EnergyProbaRegressor(), method)(table()[0])


def test_without_skpro_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.split(".")[0] == "skpro"]:
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ImportError, match=r"needs skpro, which is not installed. .* pip install 'energyreg\[skpro\]'"):
        runpy.run_path(inspect.getfile(EnergyProbaRegressor))
