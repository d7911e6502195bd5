"""The page stands alone, is sound HTML, says in words what it shows, and trusts none of the texts that it is given."""

import math
import re
from dataclasses import replace
from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch

import energyreg as er
from energyreg.reports import page as report
from energyreg.reports.numbers import fixed, number, small
from energyreg.reports.page import Example, ModelResult, Partition, Report, Score
from tests.html_page import Page

pytest.importorskip("matplotlib")
pytest.importorskip("jinja2")

BAD = """<b>&'"$\\frac{</svg>"""
HOSTILE = """<script>alert("1")</script> & 'quotes' {{ 7 * 7 }} {% raw %}"""


@pytest.fixture(scope="module")
def plain():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(60, 2, generator=generator)
    y = x[:, :1] + 0.3 * torch.randn(60, 1, generator=generator)
    torch.manual_seed(0)
    models = {
        "Mixture": er.EnergyRegressionModel.mixture_for_table(2, num_components=3, width=8),
        "Energy": er.EnergyRegressionModel.for_table(2, width=8),
    }
    for model in models.values():
        model.fit_preprocessing(x, y)
        model.eval()
    examples = [Example("First", "The first row.", 0.5), Example("Second", "The second row.", -1.0)]
    history = SimpleNamespace(validation_nll=[2.0, 1.0], train_loss=[1.0, 0.5])
    scores = {"Mixture": {"nll": 1.25, "rate": 0.92}, "Energy": {"nll": 1.125, "rate": 0.84}}
    energy = models["Energy"]
    with torch.no_grad():
        q = models["Mixture"].energy(x).q
        points = er.integrators.ImportanceSampling(num_samples=64)(energy.energy(x), q)
    return Report(
        title="Two models",
        summary=["One paragraph.", "Another one."],
        models=[
            ModelResult(name, "a density", scores[name], er.metrics.pit(model(x), y), history, model(x[:2]))
            for name, model in models.items()
        ],
        scores=[Score("nll", "NLL (nats)", "Lower is better."), Score("rate", "Coverage", "Best at 90%.", 0.9, ".1%")],
        examples=examples,
        target="y (m)",
        code='def f(x: int) -> str:  # a comment\n    """Text."""\n    return "<b>" * (1 + x)\n',
        setup={"Seed": "0"},
        partition=Partition("Energy", energy(x).diagnostics, points, 64, "mixture"),
        choice="By rule.",
        footer=["The end."],
    )


@pytest.fixture(scope="module")
def html(plain):
    return report.render(plain)


@pytest.fixture(scope="module")
def page(html):
    return Page(html)


def test_html_is_balanced_with_unique_ids(page):
    assert page.mistakes == []
    ids = [attributes["id"] for _, attributes in page.elements if "id" in attributes]
    assert len(ids) == len(set(ids))


def test_references_inside_the_page_lead_somewhere(html, page):
    ids = {attributes["id"] for _, attributes in page.elements if "id" in attributes}
    targets = [a["href"] for _, a in page.elements if a.get("href", "").startswith("#")]
    targets += re.findall(r"url\((#[^)]+)\)", html)
    assert targets and {target[1:] for target in targets} <= ids
    assert {a["aria-labelledby"] for _, a in page.elements if "aria-labelledby" in a} <= ids


def test_nothing_is_loaded_from_anywhere(html, page):
    assert "http:" not in html and "https:" not in html  # no link either: the plain report names none
    assert "@import" not in html
    assert "data:" not in html.replace("img-src data:", "")  # the policy of the page, which may have photographs
    assert all(reference.startswith("#") for reference in re.findall(r"url\(\s*['\"]?([^)]*)", html))
    for tag, attributes in page.elements:
        assert tag not in {"script", "link", "img", "iframe", "object", "embed", "base"}
        assert not {"src", "srcset", "poster", "background", "action", "xlink:href"} & attributes.keys()
        assert not any(name.startswith("on") for name in attributes)


def test_every_figure_has_an_alternative_text(page):
    pictures = page.all("svg")
    # Two examples, two PIT histograms, two coverage curves, two learning curves, one for log Z.
    assert len(pictures) == len(page.all("figure")) == 9
    labels = [picture["aria-label"] for picture in pictures]
    assert all(picture["role"] == "img" for picture in pictures)
    assert all(len(label) > 40 for label in labels) and len(set(labels)) == len(labels)
    assert "Observed: 0.5" in labels[0] and "Mixture: 90% region" in labels[0]


def test_headings_are_in_order_and_sections_named(page):
    levels = [int(tag[1]) for tag, _ in page.elements if re.fullmatch("h[1-6]", tag)]
    assert levels[0] == 1 and levels.count(1) == 1
    assert all(b <= a + 1 for a, b in pairwise(levels))
    assert all("aria-labelledby" in section for section in page.all("section"))
    assert page.all("html") == [{"lang": "en"}]


def test_fits_a_phone_and_both_colour_schemes(html, page):
    assert {"name": "viewport", "content": "width=device-width, initial-scale=1"} in page.all("meta")
    assert "prefers-color-scheme: dark" in html and "@media print" in html
    # Neutral parts take the colour of the text, models that of the scheme; a fixed size would not scale.
    assert "currentColor" in html and "var(--model-0)" in html and "#7a7b7c" not in html
    assert all("width" not in svg and "viewbox" in svg for svg in page.all("svg"))
    scrolling = [a for _, a in page.elements if a.get("class") == "scroll"]
    assert len(scrolling) == 2 and all(box["tabindex"] == "0" and box["aria-label"] for box in scrolling)


def test_best_value_of_each_column_is_bold(html):
    assert re.findall(r'<td [^>]*class="best">([^<]+)</td>', html) == ["92.0%", "1.125"]  # the order of the rows
    assert re.findall(r'<td role="cell" data-label="[^"]*">([^<]+)</td>', html) == ["1.250", "84.0%"]


@pytest.mark.parametrize(
    ("aim", "format", "best"),
    [(float("-inf"), ".2f", "a"), (float("inf"), ".2f", "c"), (1.9, ".2f", "b"), (None, ".2f", ""), (0.0, ".0f", "ab")],
)
def test_best_score_depends_on_the_aim(aim, format, best):
    score = Score("s", "S", "", aim, format)
    values = {"a": {"s": 1.0}, "b": {"s": 2.0}, "c": {"s": 3.0}, "d": {"s": float("nan")}, "e": {}}
    if aim == 0.0:
        values = {"a": {"s": 1.0}, "b": {"s": 1.2}, "c": {"s": 3.0}}  # equal as shown: both are best
    assert "".join(name for name in values if score.is_best(name, values)) == best


def test_thousands_are_compared_as_numbers():
    score = Score("s", "S", "", float("inf"), ",.0f")
    assert score.show(12345.0) == "12,345"
    assert score.is_best("b", {"a": {"s": 9000.0}, "b": {"s": 12345.0}})


def test_hostile_texts_are_shown_not_obeyed(plain):
    models = [replace(model, name=BAD + model.name, description=HOSTILE) for model in plain.models]
    hostile = replace(
        plain,
        title=HOSTILE,
        summary=[HOSTILE],
        models=models,
        scores=[replace(score, name=HOSTILE, explanation=HOSTILE) for score in plain.scores],
        examples=[replace(example, title=HOSTILE, note=HOSTILE) for example in plain.examples],
        target=BAD,
        code=HOSTILE,
        setup={HOSTILE: HOSTILE},
        partition=replace(plain.partition, model=models[1].name, proposal=HOSTILE),
        choice=HOSTILE,
        footer=[HOSTILE],
    )
    html = report.render(hostile)
    page = Page(html)
    assert page.mistakes == [] and not page.all("script") and not page.all("b")
    assert "<script" not in html
    # Title twice, the summary, and so on: each text as it is.
    assert "".join(page.text).count(HOSTILE) >= 10 and "".join(page.text).count(BAD) >= 10
    assert BAD in page.all("svg")[0]["aria-label"]


def test_code_is_shown_as_it_is(html):
    block = re.search(r"<pre><code>(.*?)</code></pre>", html, re.DOTALL)[1]
    shown = "".join(Page(f"<p>{block}</p>").text)
    assert shown == 'def f(x: int) -> str:  # a comment\n    """Text."""\n    return "<b>" * (1 + x)'
    assert '<span class="keyword">def</span>' in block and '<span class="comment"># a comment</span>' in block


@pytest.mark.parametrize("code", ["def f(:\n", "x = (1,\n", '"""open', "  a\n b\n", "", "f'{x:>{w}} é'\n\n# ende"])
def test_broken_code_is_shown_too(code):
    shown = "".join(Page(f"<p>{report._highlight(code)}</p>").text)
    assert shown.rstrip() == code.rstrip()


def test_partition_is_optional(plain):
    page = Page(report.render(replace(plain, partition=None)))
    assert page.mistakes == [] and len(page.all("svg")) == 8
    assert "#partition" not in [a.get("href") for a in page.all("a")]


def test_the_same_report_gives_the_same_page(plain, html):
    assert report.render(plain) == html


def test_write_replaces_the_file_and_makes_its_folder(plain, html, tmp_path):
    path = tmp_path / "new" / "report.html"
    assert report.write(plain, path) == path
    assert path.read_text(encoding="utf-8") == html
    path.write_text("old")
    report.write(plain, str(path))
    assert path.read_text(encoding="utf-8") == html
    assert [p.name for p in path.parent.iterdir()] == ["report.html"]


def test_a_page_that_cannot_be_made_leaves_the_old_one(plain, tmp_path):
    path = tmp_path / "report.html"
    path.write_text("old")
    with pytest.raises(ValueError, match="no models"):
        report.write(replace(plain, models=[]), path)
    with pytest.raises(ValueError, match=r"but report\.examples has 1"):
        report.write(replace(plain, examples=plain.examples[:1]), path)
    assert path.read_text() == "old"


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.0, "0"), (0.0123, "0.012"), (4.84e-7, "4.8·10⁻⁷"), (2e-12, "2.0·10⁻¹²"), (float("nan"), "nan")],
)
def test_small_numbers_read_well(value, text):
    assert small(value) == text


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (74123.4, "74,123"),
        (-2.5e6, "−2,500,000"),
        (2026.0, "2026"),
        (9999.7, "10,000"),
        (0.12345, "0.1235"),
        (1e-7, "1·10⁻⁷"),
        (-1.23456e-8, "−1.235·10⁻⁸"),
        (3e17, "3·10¹⁷"),
        (514_600.0, "514,600"),
        (-0.0, "0"),
        (12.0, "12"),
        (0.00012, "0.00012"),
        (0.99996, "1"),
        (math.inf, "∞"),
        (-math.inf, "−∞"),
    ],
)
def test_numbers_have_no_exponent_that_nobody_needs(value, text):
    assert number(value) == text


def test_numbers_of_one_size_have_the_same_decimals():
    assert [fixed(74_123.0)(value) for value in (74_123.4, -12.0)] == ["74,123", "−12"]
    assert [fixed(0.5)(value) for value in (0.5, 12.0)] == ["0.5000", "12.0000"]


def test_sections_are_sound_and_trust_no_text(html):
    from energyreg import plots
    from energyreg.reports.page import Drawing, Section, SectionedReport, Table

    sections = [
        Section("one", HOSTILE, [HOSTILE], [
            Table(HOSTILE, [HOSTILE, "Share"], [[HOSTILE, {"text": "1", "share": 0.5}]]),
        ]),
        Section("two", "Two", terms={HOSTILE: HOSTILE}, facts={HOSTILE: HOSTILE}, short=HOSTILE, drawings=[
            Drawing(lambda: plots.pit_histogram([0.1, 0.6]), BAD, HOSTILE, HOSTILE),
        ]),
    ]  # fmt: skip
    text = report.render(SectionedReport(HOSTILE, [HOSTILE], sections, [HOSTILE]))
    page = Page(text)
    assert page.mistakes == [] and "<script" not in text and "49" not in "".join(page.text)
    assert page.all("svg")[0]["aria-label"] == BAD
    ids = [attributes["id"] for _, attributes in page.elements if "id" in attributes]
    assert len(ids) == len(set(ids)) and {"one", "two"} <= set(ids)
    assert (
        text.partition("</style>")[0].partition("<style>")[2] == html.partition("</style>")[0].partition("<style>")[2]
    )
