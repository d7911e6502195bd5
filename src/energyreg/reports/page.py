"""Reports as one HTML page that needs nothing else: no network, no other file.

A `Report` compares models: scores with their meaning, densities of chosen rows, calibration, learning curves, the trust
in log Z, the code and the facts of the run. A `SectionedReport` holds whatever sections it is given; tables that can be
sorted or filtered and galleries bring a script of their own, without which all of them is shown. Both kinds of page
follow the reader's light or dark setting, fit a phone, and print.
"""

from __future__ import annotations

import base64
import io
import keyword
import math
import os
import re
import tokenize
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from energyreg import plots
from energyreg.files import write_atomically

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from energyreg.inference.points import WeightedPoints
    from energyreg.models.predictive import Diagnostics, PredictiveDistribution

__all__ = [
    "Drawing",
    "Example",
    "Gallery",
    "GalleryItem",
    "ModelResult",
    "Partition",
    "Report",
    "Score",
    "Section",
    "SectionedReport",
    "Table",
    "render",
    "write",
]

# Matplotlib draws neutral parts in this colour, which no model has; in the page it becomes the colour of the text.
_NEUTRAL = "#7a7b7c"
_COLOR_KEYS = ("text.color", "axes.labelcolor", "axes.edgecolor", "axes.titlecolor", "xtick.color", "ytick.color")


@dataclass(frozen=True)
class Score:
    """A column of the table of scores.

    Args:
        key: Key of the value in `ModelResult.scores`.
        name: Heading of the column, with its unit.
        explanation: What it means, in a sentence or two for a reader who has never met it.
        aim: The best possible value: −inf where lower is better, inf where higher is, or a number to come close to.
            None where no value is better than another.
        format: Format of the value, as for `format()`.
    """

    key: str
    name: str
    explanation: str
    aim: float | None = -math.inf
    format: str = ".3f"

    def distance(self, value: float) -> float:
        """How far a value, as it is shown, is from the best: comparable between models, lower is better."""
        shown = float(self.show(value).replace(",", "").rstrip("%"))
        if self.format.endswith("%"):
            shown /= 100
        if self.aim is None or math.isnan(shown):
            return math.inf
        return shown * -math.copysign(1.0, self.aim) if math.isinf(self.aim) else abs(shown - self.aim)

    def is_best(self, name: str, scores: Mapping[str, Mapping[str, float]]) -> bool:
        """Whether no other of several models (name → scores) shows a better value than the named one."""
        distances = {other: self.distance(values[self.key]) for other, values in scores.items() if self.key in values}
        mine = distances.get(name, math.inf)
        return len(distances) > 1 and math.isfinite(mine) and mine <= min(distances.values())

    def show(self, value: float) -> str:
        """The value as the table shows it."""
        return format(value, self.format)


@dataclass(frozen=True)
class ModelResult:
    """What one model did.

    Args:
        name: Short name, used in all figures.
        description: One sentence: what kind of density it predicts.
        scores: Key of a `Score` → value.
        pit: PIT values of the test rows, shape (B,); see :func:`energyreg.evaluation.metrics.pit`.
        history: `History` of the training, with lists `train_loss` and `validation_nll`.
        examples: Predictive distribution of the rows of `Report.examples`.
    """

    name: str
    description: str
    scores: Mapping[str, float]
    pit: Any
    history: Any
    examples: PredictiveDistribution


@dataclass(frozen=True)
class Example:
    """A row whose densities are drawn.

    Args:
        title: Short heading: what kind of row it is.
        note: One sentence: how it was chosen.
        y: The observed target.
    """

    title: str
    note: str
    y: float


@dataclass(frozen=True)
class Partition:
    """log Z of one model's test rows, and an independent estimate of it for some of them.

    Args:
        model: Name of the model.
        quadrature: `model(x).diagnostics`, for B rows.
        sampled: log Z of the same rows by importance sampling: `WeightedPoints`, or `Diagnostics`.
        num_samples: Samples per row of it.
        proposal: Name of what was sampled from.
    """

    model: str
    quadrature: Diagnostics
    sampled: WeightedPoints | Diagnostics
    num_samples: int
    proposal: str


@dataclass(frozen=True)
class Report:
    """Everything on the page. All texts are plain: markup in them is shown, not obeyed.

    Args:
        title: Heading of the page.
        summary: Paragraphs below it: the question and the answer.
        models: Results, in one order for all figures and tables.
        scores: Columns of the table.
        examples: Rows whose densities are drawn.
        target: Name and unit of y.
        level: Probability of the highlighted regions.
        code: The Python lines that made it.
        setup: Term → fact: data, split, sizes, machine, seed, versions.
        partition: What is known about log Z of the energy-based model. Optional.
        choice: How the examples were chosen.
        footer: Licence and citation of the data.
    """

    title: str
    summary: Sequence[str]
    models: Sequence[ModelResult]
    scores: Sequence[Score]
    examples: Sequence[Example]
    target: str
    code: str
    setup: Mapping[str, str]
    level: float = 0.9
    partition: Partition | None = None
    choice: str = ""
    footer: Sequence[str] = field(default_factory=tuple)


@dataclass(frozen=True)
class Table:
    """A table in a section; the first cell of a row is its heading.

    Args:
        label: What it is, for those who hear the page.
        headings: Of its columns.
        rows: Texts, or mappings of `text` with any of `share` (a number from 0 to 1 that is drawn as a bar), `sort`
            (what it is sorted by) and `href` (where it leads, in the page).
        sortable: Whether a click on a heading sorts the rows.
        filters: What can be chosen → the value of each row. The first value is chosen at first.
        words: Columns of words, which may take several lines; the first column is one anyway.
    """

    label: str
    headings: Sequence[str]
    rows: Sequence[Sequence[Any]]
    sortable: bool = False
    filters: Mapping[str, Sequence[str]] = field(default_factory=dict)
    words: Sequence[int] = ()


@dataclass(frozen=True)
class Drawing:
    """A figure in a section.

    Args:
        draw: Makes the Matplotlib figure.
        alternative: What it shows, in words.
        title: Short heading.
        caption: A sentence below it.
        photo: A JPEG file, small, that stands above the figure; none where it is empty.
        photo_alternative: What that one shows, in words.
    """

    draw: Callable[[], Figure]
    alternative: str
    title: str = ""
    caption: str = ""
    photo: bytes = b""
    photo_alternative: str = ""


@dataclass(frozen=True)
class GalleryItem:
    """A figure of a gallery.

    Args:
        key: Its id in the page.
        drawing: The figure; its title names it in the list.
        tags: Groups that it belongs to.
        facts: Term → fact, beside the figure.
    """

    key: str
    drawing: Drawing
    tags: Sequence[str] = ()
    facts: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Gallery:
    """Figures of which one is shown at a time, to choose from; all of them without a script.

    Args:
        label: What it is, for those who hear the page.
        items: The figures.
    """

    label: str
    items: Sequence[GalleryItem]

    @property
    def tags(self) -> list[str]:
        """The groups, in the order of their first figure."""
        return list(dict.fromkeys(tag for item in self.items for tag in item.tags))

    def tags_of(self, item: GalleryItem) -> str:
        """Positions of an item's tags among those of the gallery, as the page holds them."""
        tags = self.tags
        return " ".join(str(tags.index(tag)) for tag in item.tags)


@dataclass(frozen=True)
class Section:
    """A part of a page, with whatever it has.

    Args:
        key: Its id in the page.
        title: Heading.
        paragraphs: Text below it.
        tables: Tables, below that.
        terms: Term → what it means, in a sentence or two.
        drawings: Figures.
        facts: Term → fact.
        short: What it is called in the navigation, if not by its title.
        gallery: Figures to choose from.
    """

    key: str
    title: str
    paragraphs: Sequence[str] = ()
    tables: Sequence[Table] = ()
    terms: Mapping[str, str] = field(default_factory=dict)
    drawings: Sequence[Drawing] = ()
    facts: Mapping[str, str] = field(default_factory=dict)
    short: str = ""
    gallery: Gallery | None = None

    @property
    def interactive(self) -> bool:
        """Whether it has something to operate."""
        return bool(self.gallery) or any(table.sortable or table.filters for table in self.tables)


@dataclass(frozen=True)
class SectionedReport:
    """A page of sections. All texts are plain: markup in them is shown, not obeyed.

    Args:
        title: Heading of the page.
        summary: Paragraphs below it: the question and the answer.
        sections: Its parts.
        footer: Last lines.
    """

    title: str
    summary: Sequence[str]
    sections: Sequence[Section]
    footer: Sequence[str] = ()

    @property
    def num_figures(self) -> int:
        """How many figures `render` draws."""
        return sum(len(s.drawings) + (len(s.gallery.items) if s.gallery else 0) for s in self.sections)


def render(report: Report | SectionedReport, *, progress: Callable[[int], None] = lambda figures: None) -> str:
    """Build the page.

    Args:
        report: What to show.
        progress: Called with 1 after each figure of a `SectionedReport`.

    Returns:
        A complete HTML document.

    Raises:
        ImportError: Matplotlib or Jinja2 is not installed.
        ValueError: `report` has no models, or numbers of examples that differ.
    """
    try:
        import jinja2
    except ImportError as error:
        raise ImportError(
            "Reports are laid out by Jinja2, which is not installed. Install it with: pip install 'energyreg[tables]'"
        ) from error
    environment = jinja2.Environment(
        autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined,
        loader=jinja2.FunctionLoader(lambda name: files("energyreg").joinpath(name).read_text(encoding="utf-8")),
    )  # fmt: skip
    if isinstance(report, SectionedReport):

        def picture(drawing: Drawing, name: str) -> _Picture:
            photo = base64.b64encode(drawing.photo).decode()
            drawn = _Picture(
                _svg(drawing.draw, drawing.alternative, name), drawing.caption, drawing.title,
                f"data:image/jpeg;base64,{photo}" if photo else "", drawing.photo_alternative,
            )  # fmt: skip
            progress(1)
            return drawn

        pictures = {s.key: [picture(d, f"{s.key}-{i}") for i, d in enumerate(s.drawings)] for s in report.sections}
        galleries = {
            s.key: [picture(item.drawing, f"{s.key}-item-{i}") for i, item in enumerate(s.gallery.items)]
            for s in report.sections
            if s.gallery
        }
        interactive = any(section.interactive for section in report.sections)
        sections = environment.get_template("sections.html.jinja")
        return sections.render(report=report, pictures=pictures, galleries=galleries, interactive=interactive)
    if not report.models:
        raise ValueError("report has no models. Pass at least one ModelResult.")
    for model in report.models:
        if int(model.examples.batch_shape[0]) != len(report.examples):
            raise ValueError(
                f"{model.name!r} predicts {int(model.examples.batch_shape[0])} example rows, but report.examples has "
                f"{len(report.examples)}. Predict exactly the rows of the examples, in their order."
            )
    return environment.get_template("report.html.jinja").render(
        report=report,
        rows=[_table_row(model, report) for model in report.models],
        densities=[_density(report, row) for row in range(len(report.examples))],
        calibration=_calibration(report),
        coverage=_coverage(report),
        learning=_learning(report),
        partition=_partition(report),
        code=[_highlight(report.code)],
        colors=plots.COLORS,
    )


def write(
    report: Report | SectionedReport,
    path: str | os.PathLike[str],
    *,
    progress: Callable[[int], None] = lambda figures: None,
) -> Path:
    """Render the page into a file, all or nothing.

    Args:
        report: What to show.
        path: The file; its folder is made where it is missing.
        progress: Called with 1 after each figure of a `SectionedReport`.

    Returns:
        The path.

    Raises:
        OSError: The folder cannot be made or written to.
    """
    path = Path(path)
    page = render(report, progress=progress)
    write_atomically(path, page.encode())
    return path


@dataclass(frozen=True)
class _Picture:
    """A figure in the page: its SVG, which carries its alternative text, and the address of a photo beside it."""

    svg: Any
    caption: str = ""
    title: str = ""
    photo: str = ""
    photo_alternative: str = ""


def _table_row(model: ModelResult, report: Report) -> dict[str, Any]:
    scores = {other.name: other.scores for other in report.models}
    cells = [
        {
            "text": score.show(model.scores[score.key]) if score.key in model.scores else "–",
            "best": score.is_best(model.name, scores),
        }
        for score in report.scores
    ]
    return {"name": model.name, "description": model.description, "cells": cells}


def _density(report: Report, row: int) -> _Picture:
    example = report.examples[row]
    models = {model.name: model.examples for model in report.models}
    observed = [example.y for example in report.examples]

    def draw() -> Figure:
        return plots.densities(models, observed, rows=[row], level=report.level, label=report.target, columns=1)

    regions = []
    for name, p in models.items():
        intervals = p.highest_density_region(report.level).intervals
        assert intervals is not None
        parts = " and ".join(f"{float(low):.3g} to {float(high):.3g}" for low, high in intervals[row])
        regions.append(f"{name}: {report.level:.0%} region {parts}")
    alternative = (
        f"{example.title}. Predicted densities of {report.target}. {'; '.join(regions)}. Observed: {example.y:.3g}."
    )
    return _Picture(_svg(draw, alternative, f"density-{row}"), example.note, example.title)


def _calibration(report: Report) -> list[_Picture]:
    pictures = []
    bars = [np.histogram(np.asarray(model.pit), 20, range=(0, 1))[0] * 20 / len(model.pit) for model in report.models]
    for index, (model, counts) in enumerate(zip(report.models, bars, strict=True)):
        color = plots.COLORS[index % len(plots.COLORS)]

        def draw(model: ModelResult = model, color: str = color) -> Figure:
            figure = plots.pit_histogram(model.pit, color=color)
            figure.axes[0].set_ylim(0, max(1.6, 1.08 * np.max(bars)))  # the same for all, to compare
            return figure

        alternative = (
            f"Histogram of the PIT values of {model.name}, 20 bars. A calibrated model has bars of height 1; "
            f"here they lie between {counts.min():.2f} and {counts.max():.2f}."
        )
        pictures.append(_Picture(_svg(draw, alternative, f"pit-{index}"), title=model.name))
    return pictures


def _coverage(report: Report) -> list[_Picture]:
    pits = {model.name: model.pit for model in report.models}
    kept = "; ".join(f"{name}: {np.mean(np.abs(2 * np.asarray(pit) - 1) <= 0.9):.1%}" for name, pit in pits.items())
    alternative = f"Share of targets inside the intervals against the promised probability. At a promised 90%, {kept}."
    return [
        _Picture(_svg(lambda: plots.coverage_curve(pits), alternative, "coverage"), title="Promised and kept"),
        _Picture(
            _svg(lambda: plots.coverage_curve(pits, gap=True), f"Difference of the two. {alternative}", "coverage-gap"),
            title="The difference, enlarged",
        ),
    ]


def _learning(report: Report) -> list[_Picture]:
    histories = {model.name: model.history for model in report.models}
    pictures = []
    for quantity, label, title in (
        ("validation_nll", "nats", "Validation NLL"),
        ("train_loss", "loss", "Training loss"),
    ):
        lowest = "; ".join(
            f"{name}: {np.nanmin(values):.3f} after epoch {int(np.nanargmin(values)) + 1} of {len(values)}"
            for name, values in ((name, getattr(history, quantity)) for name, history in histories.items())
        )

        def draw(quantity: str = quantity, label: str = label) -> Figure:
            return plots.learning_curves(histories, quantity=quantity, label=label, legend=quantity == "validation_nll")

        pictures.append(_Picture(_svg(draw, f"{title} by epoch. Lowest values: {lowest}.", quantity), title=title))
    return pictures


def _partition(report: Report) -> dict[str, Any] | None:
    if report.partition is None:
        return None
    from matplotlib.figure import Figure

    quadrature, sampled = report.partition.quadrature, report.partition.sampled
    names = [model.name for model in report.models]
    color = plots.COLORS[names.index(report.partition.model) % len(plots.COLORS)]
    reference = _numbers(quadrature.log_partition)
    k_hat, stderr = _numbers(sampled.pareto_k), _numbers(sampled.log_partition_stderr)
    trusted = k_hat <= 0.7
    agree = np.abs(_numbers(sampled.log_partition) - reference) <= 2 * stderr

    def draw() -> Figure:
        figure = Figure(figsize=(3.5, 3.5), layout="constrained")
        return plots.log_partition(sampled, reference=reference, max_rows=40, color=color, figure=figure)

    error = _numbers(quadrature.log_partition_stderr)
    facts = {
        "rows": f"{len(reference):,}",
        "max_error": _small(float(np.nanmax(error))),
        "median_stderr": f"{np.nanmedian(stderr):.2g}",
        "trusted": f"{trusted.mean():.0%}",
        "agree": f"{agree[trusted].mean() if trusted.any() else math.nan:.0%}",
        "median_ess": f"{np.nanmedian(_numbers(sampled.effective_sample_size)):,.0f}",
    }
    alternative = (
        "Difference of two estimates of log Z with error bars, Pareto k-hat and effective sample size, for some of "
        f"{facts['rows']} "
        f"test rows. The estimates agree within two standard errors for {facts['agree']} of the rows with k-hat up to "
        "0.7."
    )
    return facts | {"picture": _Picture(_svg(draw, alternative, "partition"))}


def _small(value: float) -> str:
    """A small number as people write it: 0.012, but 4.8·10⁻⁷."""
    if value == 0 or not math.isfinite(value) or abs(value) >= 1e-3:
        return f"{value:.2g}"
    digits, exponent = f"{value:.1e}".split("e")
    return f"{digits}·10{str(int(exponent)).translate(str.maketrans('-0123456789', '⁻⁰¹²³⁴⁵⁶⁷⁸⁹'))}"


def _numbers(values: Any) -> NDArray[np.float64]:
    return np.asarray(values, dtype=np.float64)


def _svg(draw: Any, alternative: str, name: str) -> Any:
    """Draw a figure into inline SVG that takes its colours and typeface from the page.

    Args:
        draw: Makes the figure; called inside the page's Matplotlib settings.
        alternative: What the picture shows, in words.
        name: Unique in the page; the prefix of all ids inside.

    Returns:
        The `<svg>` element, as markup that needs no escaping.
    """
    try:
        import matplotlib
    except ImportError as error:
        raise ImportError(
            "Figures are drawn by Matplotlib, which is not installed. Install it with: pip install 'energyreg[tables]'"
        ) from error
    from markupsafe import Markup, escape

    settings: dict[Any, Any] = dict.fromkeys(_COLOR_KEYS, _NEUTRAL) | {"svg.fonttype": "none", "svg.hashsalt": name}
    buffer = io.StringIO()
    with matplotlib.rc_context(settings):
        draw().savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r"<!--.*?-->\s*", "", text, flags=re.DOTALL)
    # Ids are unique in a figure only, and the page has many.
    text = re.sub(r'\bid="([^"]+)"', rf'id="{name}-\1"', text)
    text = re.sub(r'xlink:href="#([^"]+)"', rf'href="#{name}-\1"', text)
    text = re.sub(r"url\(#([^)]+)\)", rf"url(#{name}-\1)", text)
    text = text.replace(_NEUTRAL, "currentColor")
    for index, color in enumerate(plots.COLORS):
        text = text.replace(color, f"var(--model-{index})")
    # Keep size and weight of the letters, and leave the typeface to the page.
    text = re.sub(
        r"font: (?:(\w+) )?([\d.]+px) [^;\"]+", lambda m: f"font-weight: {m[1] or 400}; font-size: {m[2]}", text
    )
    text = re.sub(r"(\d+\.\d\d)\d+", r"\1", text)
    box = re.search(r'viewBox="([^"]+)"', text)
    assert box is not None
    head = f'<svg viewBox="{box[1]}" role="img" aria-label="{escape(alternative)}">'
    return Markup(head + text[text.index(">") + 1 :].strip())


def _highlight(code: str) -> Any:
    """Python source as HTML with its keywords, strings, numbers and comments marked."""
    from markupsafe import Markup, escape

    lines = code.splitlines(keepends=True)
    parts: list[str] = []
    row, column = 1, 0

    def copy_until(end: tuple[int, int]) -> None:
        nonlocal row, column
        while row < end[0]:
            parts.append(str(escape(lines[row - 1][column:])))
            row, column = row + 1, 0
        if row <= len(lines):
            parts.append(str(escape(lines[row - 1][column : end[1]])))
        column = end[1]

    kinds = {tokenize.COMMENT: "comment", tokenize.STRING: "string", tokenize.NUMBER: "number"}
    try:
        for token in tokenize.generate_tokens(io.StringIO(code).readline):
            kind = kinds.get(token.type)
            if token.type == tokenize.NAME and keyword.iskeyword(token.string):
                kind = "keyword"
            copy_until(token.start)
            if kind:
                parts.append(f'<span class="{kind}">')
            copy_until(token.end)
            if kind:
                parts.append("</span>")
    except (tokenize.TokenError, SyntaxError):
        return escape(code)  # a fragment that is no complete Python: shown as it is
    return Markup("".join(parts).rstrip())
