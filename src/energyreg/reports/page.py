"""Reports as one HTML page that needs nothing else: no network, no other file.

A `Report` compares models: scores with their meaning, densities of chosen rows, calibration, learning curves, the trust
in log Z, the code and the facts of the run. A `SectionedReport` holds whatever sections it is given; tables that can be
sorted or filtered and galleries bring a script of their own, without which all of them is shown. Both kinds of page
follow the reader's light or dark setting, fit a phone, and print.
"""

from __future__ import annotations

import base64
import io
import os
import re
from collections.abc import Callable
from importlib.resources import files
from itertools import groupby
from pathlib import Path
from typing import Any

from energyreg import plots
from energyreg.files import write_atomically
from energyreg.reports.comparison import Example, ModelResult, Partition, Report, Score, sections_of
from energyreg.reports.content import Drawing, Gallery, GalleryItem, Section, SectionedReport, Table
from energyreg.reports.numbers import number

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


def render(report: Report | SectionedReport, *, progress: Callable[[int], None] = lambda figures: None) -> str:
    """Build the page.

    Args:
        report: What to show.
        progress: Called with 1 after each figure.

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
    if isinstance(report, Report):
        report = sections_of(report)
    environment = jinja2.Environment(
        autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined,
        loader=jinja2.FunctionLoader(lambda name: files("energyreg.reports").joinpath(name).read_text("utf-8")),
    )  # fmt: skip

    environment.filters["intervals"] = _intervals

    def picture(drawing: Drawing, name: str) -> dict[str, Any]:
        photo = base64.b64encode(drawing.photo).decode()
        drawn = {
            "svg": _svg(drawing.draw, drawing.alternative, name), "title": drawing.title, "caption": drawing.caption,
            "photo": f"data:image/jpeg;base64,{photo}" if photo else "", "photo_alternative": drawing.photo_alternative,
        }  # fmt: skip
        progress(1)
        return drawn

    pictures = {s.key: [picture(d, f"{s.key}-{i}") for i, d in enumerate(s.drawings)] for s in report.sections}
    galleries = {
        s.key: [picture(item.drawing, f"{s.key}-item-{i}") for i, item in enumerate(s.gallery.items)]
        for s in report.sections
        if s.gallery
    }
    return environment.get_template("sections.html.jinja").render(
        report=report, pictures=pictures, galleries=galleries, highlight=_highlight, num_colors=len(plots.COLORS),
        interactive=any(section.interactive for section in report.sections),
    )  # fmt: skip


def write(
    report: Report | SectionedReport,
    path: str | os.PathLike[str],
    *,
    progress: Callable[[int], None] = lambda figures: None,
) -> Path:
    """Render the page into a file, all or nothing, and return its path; a missing folder is made.

    Args and errors are those of :func:`render`, and OSError where the file cannot be written.
    """
    write_atomically(Path(path), render(report, progress=progress).encode())
    return Path(path)


def _svg(draw: Any, alternative: str, name: str) -> Any:
    """Draw a figure as inline SVG that takes its colours and typeface from the page.

    The name is unique in the page: the prefix of all ids inside. What `draw` shows, the alternative says in words.
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
        figure = draw()
        _write_out_numbers(figure)
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
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


def _intervals(text: Any) -> Any:
    """A cell's text in which an interval in brackets is an element, which lists keep on one line."""
    from markupsafe import Markup, escape

    return Markup(
        re.sub(r"\([^() ]{1,12} to [^() ]{1,12}\)", r'<span class="interval">\g<0></span>', str(escape(text)))
    )


def _write_out_numbers(figure: Any) -> None:
    """Numbers of axes as people write them: 1,500,000, not 1.5 and 1e6 at the end."""
    from matplotlib.ticker import FuncFormatter, MaxNLocator, ScalarFormatter

    for axes in figure.axes:
        for axis, limits in ((axes.xaxis, axes.get_xlim()), (axes.yaxis, axes.get_ylim())):
            size = max(map(abs, limits))
            plain = type(axis.get_major_formatter()) is ScalarFormatter and axis.get_scale() == "linear"
            if plain and (size >= 1e4 or size < 1e-3 or abs(limits[1] - limits[0]) < 1e-3 * size):
                axis.set_major_formatter(FuncFormatter(lambda value, _: number(value, 6)))
                if axis is axes.xaxis:  # long numbers side by side
                    axis.set_major_locator(MaxNLocator(3))


def _highlight(code: str) -> Any:
    """Python source as HTML with its keywords, strings, numbers and comments marked."""
    from markupsafe import Markup, escape
    from pygments.lexers import PythonLexer
    from pygments.token import Comment, Keyword, Number, Operator, String

    kinds = {Keyword: "keyword", Operator.Word: "keyword", String: "string", Number: "number", Comment: "comment"}
    parts = []
    for kind, tokens in groupby(
        PythonLexer(stripnl=False).get_tokens(code),
        lambda token: next((kind for family, kind in kinds.items() if token[0] in family), ""),
    ):
        text = escape("".join(text for _, text in tokens))
        parts.append(f'<span class="{kind}">{text}</span>' if kind else text)
    return Markup("".join(parts).rstrip())
