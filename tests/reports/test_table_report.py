"""The numbers of a report on a table agree with independent ones, and its page says what it shows."""

import copy
import math
import re
from itertools import pairwise

import numpy as np
import pytest

pd = pytest.importorskip("pandas")
pytest.importorskip("sklearn")
pytest.importorskip("matplotlib")
pytest.importorskip("jinja2")
stats = pytest.importorskip("scipy.stats")

import energyreg as er  # noqa: E402
from energyreg import evaluation, plots  # noqa: E402
from energyreg.densities import spaces  # noqa: E402
from energyreg.evaluation import LEVELS, RowScores  # noqa: E402
from energyreg.reports import page as report  # noqa: E402
from energyreg.reports import row_sections, score_sections, table_report  # noqa: E402
from energyreg.reports import rows as report_rows  # noqa: E402
from energyreg.reports.page import Drawing, Gallery, GalleryItem, Section, SectionedReport, Table  # noqa: E402
from energyreg.reports.rows import ReportRows, bootstrap_means, by_chance, ends_of_bootstrap, marked  # noqa: E402
from tests.fitted import KINDS, fitted, rows, targets  # noqa: E402
from tests.html_page import Page  # noqa: E402

PAGES = {kind: names for kind, names in KINDS.items() if kind != "positive"}


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
    found = row_sections._modes_of_counts(np.arange(4.0), np.array([shares]))
    assert found.values[0][:, 0].tolist() == modes
    assert float(found.probabilities[0].sum()) == pytest.approx(1)
    assert found.counts.tolist() == [len(modes)]


def test_chance_is_the_binomial_distribution():
    low, high = by_chance(50, 0.9)
    inside = [k for k in range(51) if low <= k / 50 <= high]
    assert 0.95 <= stats.binom.pmf(inside, 50, 0.9).sum() < 0.99
    assert [marked(share, low, high)[-1] for share in (0.7, 0.9, 1.0)] == ["↓", "%", "↑"]


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
    found = score_sections._levels_of(pd.Series(values))
    assert [name for name, _ in found] == groups
    assert (np.sum([chosen for _, chosen in found], 0) == 1).all()


def test_dates_are_grouped_by_quarters():
    found = score_sections._levels_of(pd.Series(pd.date_range("2024-01-01", periods=40)))
    assert len(found) == 4 and found[0][0].startswith("2024-01-01 to 2024-01-1")


# ---------------------------------------------------------------------------------------------- the page


@pytest.fixture(scope="module")
def pages():
    table, y = rows(40, seed=10)
    made = {}
    with pytest.MonkeyPatch.context() as patch:
        for name in ("SPREAD", "SURPRISING", "SEVERAL"):  # fewer figures: they take most of the time
            patch.setattr(row_sections, name, 2)
        patch.setattr(table_report, "JOINT_MODE_ROWS", 2)
        patch.setattr(report_rows, "BOOTSTRAPS", 50)
        for kind, names in PAGES.items():
            steps = []
            described = table_report.describe(
                fitted(kind), table, targets(kind, y).reshape(40, -1), names, title="T", total=900,
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
    low, high = ends_of_bootstrap(bootstrap_means(values, 0)[:, 0])
    # A standard error of 0.1; the ends of 400 resamples are within 10% of its 1.96-fold.
    assert (high - low) / 2 == pytest.approx(1.96 * values.std() / 20, rel=0.15)
    assert (high + low) / 2 == pytest.approx(values.mean(), abs=0.03)


def test_an_infinite_score_is_said():
    table, y = rows(60, seed=11)
    y = targets("positive", y)[:, None]
    y[5] = -1.0
    scores = evaluation.evaluate(fitted("positive"), [(table, y)])
    some = ReportRows(
        fitted("positive"), table, y, [str(i) for i in range(60)], ["y"], scores, {}, {}, 60, 0
    )  # fmt: skip
    assert "zero at the observed values of 1 of 60 rows" in score_sections.summary(some)[0]
    assert score_sections.scores(some).tables[0].rows[0][1] == "infinite"


def test_the_verdict_says_how_much_higher_the_density_is(pages):
    sentence = pages["real"][0].summary[0]
    factor, gain = (
        float(re.search(p, sentence)[1].replace("−", "-")) for p in (r"typically (\S+) times", r"log p: (\S+) nats")
    )
    assert math.log(factor) == pytest.approx(gain, abs=0.01)


def test_a_model_without_a_linear_baseline_says_so(monkeypatch):
    for name in ("SPREAD", "SURPRISING", "SEVERAL"):
        monkeypatch.setattr(row_sections, name, 1)
    old = copy.copy(fitted("real"))
    old.linear_baseline_ = None
    table, y = rows(5, seed=12)
    page = table_report.describe(old, table, y[:, None], ["y"], title="T")
    assert list(page.sections[1].tables[0].headings) == ["Score", "Model", "Marginal", "Model − marginal"]
    assert any("no linear forecast to compare it with" in text for text in page.summary)
    assert "Linear" not in page.sections[1].terms


def scored(y, *errors, kind="real", width=1.0):
    """Rows whose forecasts (model, marginal, linear) have Gaussian scores of these errors."""
    count = len(y)

    def scores(error):
        shape = (count, len(LEVELS), 1)
        error = np.broadcast_to(np.asarray(error, float), (count,))
        return RowScores(
            error**2 / 2, np.abs(error)[:, None], error[:, None], error[:, None], np.ones(shape),
            np.broadcast_to(np.reshape(width, (-1, 1, 1)), shape), np.full((count, 1), 0.5),
        )  # fmt: skip

    model, marginal, linear = map(scores, errors)
    return ReportRows(
        fitted(kind), rows(count)[0], y[:, None], [str(i) for i in range(count)], ["y"],
        evaluation.Evaluation(model, marginal, linear), {}, {}, count, 0,
    )  # fmt: skip


def test_the_first_line_says_which_baseline_wins():
    y, noise = np.arange(60.0), np.random.default_rng(0).normal(size=60)
    first = score_sections.summary(scored(y, 2 + 0.1 * noise, 5, 1 + 0.1 * noise))[0]
    assert "the model predicts worse than a linear Gaussian forecast, fitted to the training rows" in first
    assert "The linear forecast has a lower CRPS, RMSE, MAE than the model." in first
    further = score_sections.summary(scored(y, 2 + 0.1 * noise, 5, 1 + 0.1 * noise))[1]
    assert further.startswith("Also, the model predicts better than a constant forecast")
    # Against the strongest of them, whichever that is.
    first = score_sections.summary(scored(y, 1 + 0.1 * noise, 2, 3))[0]
    assert "predicts better than a constant forecast" in first and "lower" not in first
    first = score_sections.summary(scored(y, 2 + noise, 5, 2 - noise))[0]
    assert "is not clearly better or worse than a linear" in first


@pytest.mark.parametrize(
    ("y", "kind", "relative"),
    [
        (np.linspace(100, 5_000, 60), "real", True),
        (-np.linspace(100, 5_000, 60), "real", True),
        (np.linspace(273, 300, 60), "real", False),  # temperatures: zero is far away
        (np.linspace(-5, 6, 60), "real", False),
        (np.linspace(10, 350, 60), "circle", False),
        (np.arange(60.0), "count", True),
    ],
)
def test_certainty_is_relative_to_values_of_one_sign(y, kind, relative):
    some = scored(y, 0, 0, 0, kind=kind, width=1 + np.abs(y) ** 0.5)
    assert some.relative(0) is relative
    assert ("relative to the predicted median" in some.by_width) is relative
    order = np.argsort(some.uncertainty)
    largest = int(np.abs(y).argmax())
    assert (order[0] == largest) if relative else (order[-1] == largest)


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
    drawing = Drawing(lambda: plots.pit_histogram([0.2, 0.7]), bad, bad, bad)
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


def test_spaces_of_the_circle_are_known():
    assert isinstance(fitted("circle").model_.space, spaces.Circle)


@pytest.mark.parametrize("dtype", ["Int64", "Float64", "int64[pyarrow]"])
def test_a_nullable_column_has_groups_and_its_missing_rows_are_one(dtype):
    groups = dict(score_sections._levels_of(pd.Series(pd.array([*range(59), None], dtype=dtype))))
    assert list(groups)[-1] == "missing" and groups["missing"].sum() == 1
    assert (np.sum(list(groups.values()), axis=0) == 1).all()  # each row is in one


def test_counts_of_an_enormous_range_get_a_density():
    rng = np.random.default_rng(0)
    x = pd.DataFrame({"a": rng.normal(size=80)})
    y = np.where(rng.random(80) < 0.5, rng.integers(0, 5, 80), rng.integers(10**9, 10**13, 80)).astype(float)
    regressor = er.EnergyRegressor(target="count", n_members=1, epochs=1, width=8, random_state=0).fit(x, y)
    page = report.render(table_report.describe(regressor, x, y[:, None], ["y"], title="t"))
    assert "Predicted density of y" in page
