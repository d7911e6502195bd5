"""The numbers of a report on a table agree with independent ones, and its page says what it shows."""

import math
import re
from html.parser import HTMLParser
from itertools import pairwise

import numpy as np
import pytest
import torch

pd = pytest.importorskip("pandas")
pytest.importorskip("sklearn")
pytest.importorskip("matplotlib")
pytest.importorskip("jinja2")
stats = pytest.importorskip("scipy.stats")

from energyreg.densities import spaces  # noqa: E402
from energyreg.densities.spaces import Real  # noqa: E402
from energyreg.estimators.table import EnergyRegressor  # noqa: E402
from energyreg.evaluation import forecasts as evaluation  # noqa: E402
from energyreg.evaluation.forecasts import LEVELS, LinearForecast, MarginalForecast, circular_crps  # noqa: E402
from energyreg.models.chain import EnergyChain  # noqa: E402
from energyreg.reports import page as report  # noqa: E402
from energyreg.reports import table_report  # noqa: E402
from energyreg.reports.page import Drawing, Gallery, GalleryItem, Section, SectionedReport, Table  # noqa: E402

KINDS = {"real": ["y"], "positive": ["y"], "count": ["y"], "circle": ["y"], "two": ["y", "z"]}
PAGES = {kind: names for kind, names in KINDS.items() if kind != "positive"}
VOID = {"meta", "br"}


def rows(count, seed=0):
    """A table with a number, a category and a missing value, and targets that are linear in the number."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=count)
    table = pd.DataFrame({"x": x, "w": rng.normal(size=count), "group": rng.choice(["a", "b", "c"], count)})
    table.loc[3, "w"] = np.nan
    return table, 2 * x + rng.normal(size=count)


def targets(kind, y):
    if kind == "positive":
        return np.exp(y / 3)
    if kind == "count":
        return np.maximum(np.round(y + 5), 0)
    if kind == "circle":
        return (350 + 20 * y) % 360
    return np.stack([y, y**2 + np.cos(7 * y)], 1) if kind == "two" else y


def target_of(kind):
    return {"circle": ("circle", 0, 360), "two": "real"}.get(kind, kind)


@pytest.fixture(scope="module")
def fitted():
    """Kind → an estimator that has seen one epoch."""
    table, y = rows(120)
    made = {}
    for kind in KINDS:
        regressor = EnergyRegressor(target=target_of(kind), n_members=1, epochs=1, random_state=0)
        made[kind] = regressor.fit(table, targets(kind, y))
    return made


class Page(HTMLParser):
    """Elements with their attributes, their text, and every tag that does not match."""

    def __init__(self, text):
        super().__init__()
        self.open, self.mistakes, self.elements, self.text = [], [], [], []
        self.feed(text)
        self.close()
        self.mistakes += self.open

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        if not self.open or self.open.pop() != tag:
            self.mistakes.append(f"/{tag}")

    def handle_data(self, data):
        if self.open and self.open[-1] not in ("style", "script"):
            self.text.append(data)

    def all(self, tag):
        return [attributes for name, attributes in self.elements if name == tag]


# ---------------------------------------------------------------------------------------------- scores


def test_circular_crps_is_the_expectation_over_all_pairs_and_knows_no_cut():
    rng = np.random.default_rng(0)
    points, y = rng.uniform(0, 24, (5, 30)), rng.uniform(0, 24, 5)

    def arc(a, b):
        return np.abs((a - b + 12) % 24 - 12)

    pairs = arc(points[:, :, None], points[:, None, :]).mean((1, 2))
    expected = arc(points, y[:, None]).mean(1) - 0.5 * pairs
    np.testing.assert_allclose(circular_crps(points, y, 24.0), expected, rtol=1e-12)
    np.testing.assert_allclose(circular_crps((points + 7) % 24, (y + 7) % 24, 24.0), expected, rtol=1e-9)


def test_circular_crps_of_a_narrow_forecast_is_that_on_the_line():
    levels = (np.arange(128) + 0.5) / 128
    points = 100 + 5 * stats.norm.ppf(levels)[None]
    y = 107.0
    z = (y - 100) / 5
    closed = 5 * (z * (2 * stats.norm.cdf(z) - 1) + 2 * stats.norm.pdf(z) - 1 / math.sqrt(math.pi))
    assert circular_crps(points, np.array([y]), 360.0)[0] == pytest.approx(closed, rel=0.01)


@pytest.mark.parametrize("kind", ["real", "positive", "circle"])
def test_linear_density_integrates_to_one(fitted, kind):
    table, y = rows(300, seed=1)
    forecast = LinearForecast(fitted[kind], table, targets(kind, y)[:, None])
    ends = {"real": (-40, 40), "positive": (1e-6, 400), "circle": (0, 360)}[kind]
    grid = np.linspace(*ends, 200_001) if kind != "positive" else np.geomspace(*ends, 200_001)
    for row in (0, 7):
        density = np.exp(forecast.log_density(table.iloc[[row] * len(grid)], grid[:, None]))
        assert np.trapezoid(density, grid) == pytest.approx(1, abs=1e-3)


def test_linear_forecast_is_least_squares_with_gaussian_noise(fitted):
    table, y = rows(400, seed=2)
    table[["x", "w"]] = table[["x", "w"]].fillna(0.0).clip(-1, 1)  # a missing or extreme value is coded otherwise
    forecast = LinearForecast(fitted["real"], table, y[:, None])
    x = np.column_stack([np.ones(400), table["x"], table["w"], table["group"] == "a", table["group"] == "b"])
    solution, rest, *_ = np.linalg.lstsq(x.astype(float), y, rcond=None)
    mean, scale = x.astype(float) @ solution, math.sqrt(rest[0] / (400 - 5))
    new = y[::-1].copy()
    expected = stats.norm.logpdf(new, mean, scale)
    # The penalty of 1e-3 and the rounding of the features to float32 move the line by little.
    np.testing.assert_allclose(forecast.log_density(table, new[:, None]), expected, atol=0.05, rtol=0.01)
    quantiles = forecast.quantiles(table, [0.05, 0.5])[..., 0]
    np.testing.assert_allclose(quantiles, mean[:, None] + scale * stats.norm.ppf([0.05, 0.5]), atol=0.05)


def test_linear_forecast_of_two_outputs_is_a_joint_gaussian(fitted):
    table, y = rows(200, seed=3)
    both = targets("two", y)
    forecast = LinearForecast(fitted["two"], table, both)
    space = fitted["two"].model_.space
    location = forecast.location(table)
    z = space.to_model(torch.as_tensor(both)).numpy()
    jacobian = space.log_abs_det_jacobian(torch.as_tensor(both)).numpy()
    for row in (0, 50):
        expected = stats.multivariate_normal.logpdf(z[row], location[row], forecast.covariance) + jacobian[row]
        assert forecast.log_density(table, both)[row] == pytest.approx(expected, rel=1e-9)
    draws = forecast.sample(table.iloc[:1], 40_000, np.random.default_rng(0))[0]
    drawn = np.cov(space.to_model(torch.as_tensor(draws)).numpy().T)
    np.testing.assert_allclose(drawn, forecast.covariance, rtol=0.05, atol=0.02)  # 1/√40,000 is 0.5%


def test_linear_forecast_of_more_columns_than_rows_keeps_its_noise():
    # One direction of 300 columns tells y; the noise of the target has a variance of 1.
    rng = np.random.default_rng(0)
    factor = rng.normal(size=500)
    x = factor[:, None] + 0.1 * rng.normal(size=(500, 300))
    y = 2 * factor[:, None] + rng.normal(size=(500, 1))
    regressor = EnergyRegressor(n_members=1, epochs=1, width=8, random_state=0).fit(x[:60], y[:60, 0])
    forecast = LinearForecast(regressor, x[:100], y[:100])
    nll = -forecast.log_density(x[100:], y[100:]).mean()
    assert nll == pytest.approx(0.5 * math.log(2 * math.pi * math.e), abs=0.3)


def test_linear_probabilities_of_counts_sum_to_one(fitted):
    table, y = rows(200, seed=4)
    forecast = LinearForecast(fitted["count"], table, targets("count", y)[:, None])
    values = np.arange(0.0, 60.0)
    assert np.exp(forecast.log_density(table.iloc[[5] * 60], values[:, None])).sum() == pytest.approx(1, abs=1e-9)


def test_normal_mass_is_exact_in_both_tails():
    low, high = np.array([-40.0, -1.0, 0.5, 39.0]), np.array([-39.0, 1.0, 0.6, 40.0])
    expected = [
        stats.norm.logcdf(-39), math.log(stats.norm.cdf(1) - stats.norm.cdf(-1)),
        math.log(stats.norm.cdf(0.6) - stats.norm.cdf(0.5)), stats.norm.logcdf(-39),
    ]  # fmt: skip
    np.testing.assert_allclose(evaluation._log_normal_mass(low, high), expected, rtol=1e-9)


@pytest.mark.parametrize("kind", KINDS)
def test_no_row_is_predicted_from_itself(fitted, kind):
    table, y = rows(60, seed=5)
    y = targets(kind, y).reshape(60, -1)
    scores, forecasts = evaluation.evaluate_linear(fitted[kind], table, y, seed=0)
    assert sorted(np.concatenate([held for held, _ in forecasts])) == list(range(60))
    changed = y.copy()
    changed[7] = y[8]
    again, _ = evaluation.evaluate_linear(fitted[kind], table, changed, seed=0)
    np.testing.assert_allclose(again.width[7], scores.width[7])  # its own target moved nothing of its forecast
    assert not np.allclose(again.width, scores.width)
    assert np.isfinite(scores.nll).all() and scores.crps.shape == y.shape


def test_linear_forecast_is_calibrated_where_the_truth_is_linear(fitted):
    table, y = rows(1_000, seed=6)
    scores, _ = evaluation.evaluate_linear(fitted["real"], table, y[:, None])
    # The largest distance of 1,000 uniform values from their level stays below 1.63/√1,000 in 99 of 100 samples.
    assert stats.kstest(scores.pit[:, 0], "uniform").statistic < 1.63 / math.sqrt(1_000)
    assert scores.inside[:, LEVELS.index(0.9)].mean() == pytest.approx(0.9, abs=3 * math.sqrt(0.09 / 1_000))


@pytest.mark.parametrize("kind", KINDS)
def test_scores_of_the_model_are_those_of_the_estimator(fitted, kind):
    table, y = rows(40, seed=7)
    y = targets(kind, y).reshape(40, -1)
    regressor = fitted[kind]
    scores = evaluation.evaluate(regressor, [(table, y)]).model
    np.testing.assert_allclose(scores.nll, -regressor.score_samples(table, y), rtol=1e-4, atol=1e-4)
    ends = regressor.predict_interval(table, 0.9).reshape(40, -1, 2)
    width = ends[..., 1] - ends[..., 0]
    np.testing.assert_allclose(scores.width[:, LEVELS.index(0.9)], width, rtol=1e-3, atol=1e-3)
    mean = regressor.predict(table).reshape(40, -1)
    difference = scores.error - (mean - y)
    if kind == "circle":
        difference = (difference + 180) % 360 - 180
    np.testing.assert_allclose(difference, 0, atol=1e-3)


def test_energy_score_is_that_of_the_metrics(fitted):
    table, y = rows(30, seed=8)
    both = targets("two", y)
    regressor = fitted["two"]
    model, marginal, line = evaluation.evaluate_jointly(regressor, table, both, seed=1)
    assert line is None and marginal.level is None
    scoringrules = pytest.importorskip("scoringrules")
    rng = np.random.default_rng(1)
    draws = regressor.sample(table, evaluation.JOINT_SAMPLES, random_state=int(rng.integers(2**31)))
    scale = MarginalForecast(regressor).points.std(0)
    expected = scoringrules.es_ensemble(both / scale, draws / scale, m_axis=-2, v_axis=-1, estimator="fair")
    np.testing.assert_allclose(model.energy_score, expected, rtol=1e-6)


def test_joint_levels_of_targets_drawn_from_the_model_are_uniform(fitted):
    table, _ = rows(60, seed=9)
    drawn = fitted["two"].sample(table, 1, random_state=3)[:, 0]
    model, _, _ = evaluation.evaluate_jointly(fitted["two"], table, drawn, seed=2)
    assert stats.kstest(model.level, "uniform").pvalue > 0.001


def test_angles_are_far_apart_by_the_circle_in_the_energy_score():
    embedded = evaluation._embed(np.array([[1.0, 359.0], [1.0, 1.0]]), [0.0, 360.0], np.array([2.0, 1.0]))
    assert embedded.shape == (2, 3)
    assert np.linalg.norm(embedded[0] - embedded[1]) == pytest.approx(2 * math.sin(math.radians(1)))


def test_marginals_of_a_chain_are_in_the_order_of_the_outputs():
    chain = EnergyChain.for_table(1, Real(2), order=[1, 0], width=4)
    for scale, part in zip((2.0, 3.0), chain.factors, strict=True):
        part.base.fit(scale * torch.randn(200, 1, generator=torch.Generator().manual_seed(0)))
    z = torch.tensor([[1.0, 10.0]])
    second, first = (part.base for part in chain.factors)
    expected = first.log_prob(z[:, :1]) + second.log_prob(z[:, 1:])
    reference = evaluation._reference(chain)
    assert torch.equal(reference.log_prob(z), expected)
    assert not torch.equal(reference.log_prob(z.flip(-1)), expected)


# ---------------------------------------------------------------------------------------------- parts of the page


@pytest.mark.parametrize(
    ("shares", "modes"),
    [
        ([0.5, 0.3, 0.15, 0.05], [0]),
        ([0.3, 0.05, 0.3, 0.35], [3, 0]),  # 0.65 around the one, 0.35 around the other
        ([0.31, 0.28, 0.3, 0.11], [0]),  # the valley is too shallow
        ([0.04, 0.01, 0.45, 0.5], [3]),  # the peak is too small
        ([0.25, 0.25, 0.25, 0.25], [0]),
    ],
)
def test_modes_of_counts(shares, modes):
    found = table_report._modes_of_counts(np.arange(4.0), np.array([shares]))
    assert found.values[0][:, 0].tolist() == modes
    assert float(found.probabilities[0].sum()) == pytest.approx(1)
    assert found.counts.tolist() == [len(modes)]


def test_chance_is_the_binomial_distribution():
    low, high = table_report._by_chance(50, 0.9)
    inside = [k for k in range(51) if low <= k / 50 <= high]
    assert 0.95 <= stats.binom.pmf(inside, 50, 0.9).sum() < 0.99
    assert [table_report._marked(share, low, high)[-1] for share in (0.7, 0.9, 1.0)] == ["↓", "%", "↑"]


@pytest.mark.parametrize(
    ("values", "groups"),
    [
        (["a", "b", "a", None], ["a", "b", "missing"]),
        ([1.0, 2.0, 1.0, 2.0], ["1.0", "2.0"]),
        (list(range(100)), ["0 to 24.75", "above 24.75 to 49.5", "above 49.5 to 74.25", "above 74.25 to 99"]),
        ([f"n{i % 12}" for i in range(80)], [*[f"n{i}" for i in range(7)], "5 others"]),
        ([True, False, True, True], ["True", "False"]),
    ],
)
def test_groups_part_the_rows(values, groups):
    found = table_report._levels_of(pd.Series(values))
    assert [name for name, _ in found] == groups
    assert (np.sum([chosen for _, chosen in found], 0) == 1).all()


def test_dates_are_grouped_by_quarters():
    found = table_report._levels_of(pd.Series(pd.date_range("2024-01-01", periods=40)))
    assert len(found) == 4 and found[0][0].startswith("2024-01-01 to 2024-01-1")


# ---------------------------------------------------------------------------------------------- the page


@pytest.fixture(scope="module")
def pages(fitted):
    table, y = rows(40, seed=10)
    made = {}
    with pytest.MonkeyPatch.context() as patch:
        for name in ("SPREAD", "SURPRISING", "SEVERAL"):  # fewer figures: they take most of the time
            patch.setattr(table_report, name, 2)
        patch.setattr(table_report, "JOINT_MODE_ROWS", 2)
        patch.setattr(table_report, "BOOTSTRAPS", 50)
        for kind, names in PAGES.items():
            steps = []
            described = table_report.describe(
                fitted[kind], table, targets(kind, y).reshape(40, -1), names, title="T", total=900,
                labels=[f"<{i}>" for i in range(40)], facts={"Model": "m"}, progress=steps.append,
            )  # fmt: skip
            assert sum(steps) == table_report.number_of_steps(table)
            drawn = []
            made[kind] = described, report.render(described, progress=drawn.append)
            assert sum(drawn) == described.num_figures
    return made


@pytest.mark.parametrize("kind", PAGES)
def test_page_is_sound_and_says_what_it_shows(pages, kind):
    described, html = pages[kind]
    page = Page(html)
    assert page.mistakes == []
    ids = [a["id"] for _, a in page.elements if "id" in a]
    assert len(ids) == len(set(ids))
    assert {a["href"][1:] for a in page.all("a")} <= set(ids)
    labels = [svg["aria-label"] for svg in page.all("svg")]
    assert len(labels) == described.num_figures == len(page.all("figure"))
    assert all(len(label) > 40 for label in labels)
    assert all(th["scope"] in ("row", "col") for th in page.all("th"))
    levels = [int(tag[1]) for tag, _ in page.elements if re.fullmatch("h[1-6]", tag)]
    assert levels[0] == 1 and levels.count(1) == 1 and all(b <= a + 1 for a, b in pairwise(levels))
    assert "nan" not in " ".join(page.text).lower().split()
    keys = "data scores calibration sharpness groups densities rows surprises modes importance partition setup"
    assert keys.split() == [section.key for section in described.sections]
    assert "chosen at random from 900" in html and re.search(r"Row &lt;\d+&gt;", html)
    assert not re.search(r"<\d+>", html)
    assert len(html) < 3e6


@pytest.mark.parametrize("kind", PAGES)
def test_page_names_no_other_address(pages, kind):
    html = pages[kind][1]
    assert not re.search(r"https?:|//[a-z]", html.replace("// ", ""))
    assert not {"src", "srcset", "action", "xlink:href"} & {k for _, a in Page(html).elements for k in a}
    assert "default-src &#39;none&#39;" in html or "default-src 'none'" in html


def test_pages_of_several_outputs_have_joint_parts(pages):
    text = pages["two"][1]
    assert "Energy score" in text and "Smallest joint regions" in text and "Pareto" in text
    assert "Draws from the predicted joint density" in text and "<option>z</option>" in text
    assert "Energy score" not in pages["real"][1]


def test_counts_have_bars_and_angles_a_whole_turn(pages):
    assert "Predicted probabilities of y" in pages["count"][1]
    angles = [svg["aria-label"] for svg in Page(pages["circle"][1]).all("svg")]
    regions = re.findall(r"90% region (.*?)\. Observed", " ".join(angles))
    numbers = [float(n) for region in regions for n in re.findall(r"[\d.]+", region)]
    assert numbers and min(numbers) >= 0 and max(numbers) <= 360


def test_differences_to_baselines_have_their_intervals(pages):
    scores = pages["real"][0].sections[1].tables[0]
    assert list(scores.headings) == ["Score", "Model", "Marginal", "Model − marginal", "Linear", "Model − linear"]
    for line in scores.rows:
        own, marginal, _, linear, _ = (float(cell.split()[0].rstrip("%").replace("−", "-")) for cell in line[1:])
        for value, other, cell in ((own, marginal, line[3]), (own, linear, line[5])):
            mean, low, high = (float(n.rstrip("%").replace("−", "-")) for n in re.findall(r"[−\d.]+", cell))
            assert mean == pytest.approx(value - other, abs=0.02 + 0.002 * abs(value)) and low <= mean <= high


def test_bootstrap_interval_is_that_of_the_mean():
    values = np.random.default_rng(0).normal(3, 2, (400, 1))
    low, high = table_report._ends(table_report._bootstrap_means(values, 0)[:, 0])
    # A standard error of 0.1; the ends of 400 resamples are within 10% of its 1.96-fold.
    assert (high - low) / 2 == pytest.approx(1.96 * values.std() / 20, rel=0.15)
    assert (high + low) / 2 == pytest.approx(values.mean(), abs=0.03)


def test_an_infinite_score_is_said(fitted):
    table, y = rows(60, seed=11)
    y = targets("positive", y)[:, None]
    y[5] = -1.0
    scores = evaluation.evaluate(fitted["positive"], [(table, y)])
    some = table_report._Rows(
        fitted["positive"], table, y, [str(i) for i in range(60)], ["y"], scores, None, {}, {}, 60, 0
    )  # fmt: skip
    assert "zero at the observed values of 1 of 60 rows" in table_report._summary(some)[0]
    assert table_report._scores(some).tables[0].rows[0][1] == "infinite"


def test_few_rows_have_no_linear_baseline(fitted, monkeypatch):
    for name in ("SPREAD", "SURPRISING", "SEVERAL"):
        monkeypatch.setattr(table_report, name, 1)
    table, y = rows(5, seed=12)
    page = table_report.describe(fitted["real"], table, y[:, None], ["y"], title="T")
    assert list(page.sections[1].tables[0].headings) == ["Score", "Model", "Marginal", "Model − marginal"]
    with pytest.raises(ValueError, match="5 rows; expected at least 8"):
        evaluation.evaluate_linear(fitted["real"], table, y[:, None])


# ---------------------------------------------------------------------------------------------- colours


def luminance(color):
    color = color if len(color) == 7 else "#" + "".join(2 * c for c in color[1:])
    parts = [int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(a, b):
    """WCAG 2.2's ratio of two colours."""
    light, dark = sorted([luminance(a), luminance(b)], reverse=True)
    return (light + 0.05) / (dark + 0.05)


def schemes(html):
    """The colours of the page: light, dark (which overrides some), print."""
    style = html.partition("<style>")[2].partition("</style>")[0]

    def variables(block):
        return dict(re.findall(r"--([\w-]+):\s*(#[0-9a-f]{3,6})\b", block))

    light = variables(style[style.index(":root {") : style.index("}", style.index(":root {"))])
    dark_at = style.index("(prefers-color-scheme: dark)")
    dark = variables(style[dark_at : style.index("}", dark_at)])
    print_at = style.index("@media print")
    return {"light": light, "dark": light | dark, "print": light | variables(style[print_at : print_at + 300])}


@pytest.mark.parametrize("scheme", ["light", "dark", "print"])
def test_contrast_is_enough_to_read(pages, scheme):
    colors = schemes(pages["real"][1])[scheme]
    assert contrast("#000000", "#ffffff") == pytest.approx(21) and contrast("#777777", "#fff") == pytest.approx(
        4.48, abs=0.01
    )
    texts = ["text", "soft", "keyword", "string", "number", "comment", *[f"model-{i}" for i in range(5)]]
    for text in texts:
        for ground in ("page", "card"):
            assert contrast(colors[text], colors[ground]) >= 4.5, (text, ground)
    assert contrast(colors["text"], colors["mark"]) >= 4.5
    for mark in ("control", "focus"):  # borders of controls and the outline of what has the focus
        assert contrast(colors[mark], colors["page"]) >= 3 and contrast(colors[mark], colors["card"]) >= 3


def test_every_colour_of_a_figure_follows_the_scheme(pages):
    html = pages["real"][1]
    figures = "".join(re.findall(r"<svg.*?</svg>", html, re.DOTALL))
    left = set(re.findall(r"(?:fill|stroke): (#[0-9a-f]{6})", figures))
    assert left <= {"#ffffff", "#000000"} and "var(--model-0)" in figures
    for color in left:  # of clips and invisible patches only
        assert not re.search(rf"<text[^>]*{color}", figures)


# ---------------------------------------------------------------------------------------------- without a script


def test_without_a_script_everything_is_shown(pages):
    page = Page(pages["real"][1])
    controls = [a for _, a in page.elements if a.get("class") == "controls"]
    assert len(controls) == 2 and all("hidden" in a for a in controls)
    items = [a for _, a in page.elements if a.get("class") == "item"]
    assert len(items) >= 4 and not any("hidden" in a for a in items)
    assert not any("hidden" in a for a in page.all("tr"))
    assert len(page.all("script")) == 1 and page.all("script")[0] == {}


def test_hostile_texts_in_tables_and_galleries_are_shown_not_obeyed():
    bad = """<script>alert(1)</script>"'&</style>{{ 7 * 7 }}"""
    drawing = Drawing(lambda: table_report.plots.pit_histogram([0.2, 0.7]), bad, bad, bad)
    section = Section(
        "s", bad, [bad],
        [Table(bad, [bad, "n"], [[{"text": bad, "href": "#s"}, {"text": "1", "sort": 1}]], True, {bad: [bad]}, (1,))],
        gallery=Gallery(bad, [GalleryItem("row-1", drawing, [bad], {bad: bad})]),
    )  # fmt: skip
    html = report.render(SectionedReport(bad, [bad], [section], [bad]))
    page = Page(html)
    assert page.mistakes == [] and len(page.all("script")) == 1
    assert "".join(page.text).count(bad) >= 10
    assert [a["data-filter0"] for a in page.all("tr") if "data-filter0" in a] == [bad]


def test_a_page_without_controls_has_no_script():
    html = report.render(SectionedReport("T", ["S"], [Section("s", "S", tables=[Table("t", ["a"], [["b"]])])]))
    assert "<script" not in html


def test_spaces_of_the_circle_are_known(fitted):
    assert isinstance(fitted["circle"].model_.space, spaces.Circle)
