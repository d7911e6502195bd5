"""What a page of sections is made of. All texts are plain: markup in them is shown, not obeyed."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["Drawing", "Gallery", "GalleryItem", "Section", "SectionedReport", "Table"]


@dataclass(frozen=True)
class Table:
    """A table in a section; the first cell of a row is its heading.

    Args:
        label: What it is, for screen readers.
        headings: Headings of its columns.
        rows: Texts, or mappings of `text` with any of `share` (a number from 0 to 1 that is drawn as a bar), `sort`
            (what it is sorted by), `href` (where it leads, in the page), `best` (whether it is bold), `note` (a line
            below it) and `model` (number of the model whose colour marks it).
        sortable: Whether a click on a heading sorts the rows.
        filters: Name of a filter → the value of each row. The first value is the default.
        words: Columns of words, which may take several lines; the first column always is one.
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
        photo_alternative: What the photo shows, in words.
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
        label: What it is, for screen readers.
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
    """A part of a page.

    Args:
        key: Its id in the page.
        title: Heading.
        paragraphs: Text below it.
        tables: Tables, below that.
        terms: Term → what it means, in a sentence or two.
        drawings: Figures.
        facts: Term → fact.
        short: Its name in the navigation; its title by default.
        gallery: Figures to choose from.
        code: Python lines.
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
    code: str = ""

    @property
    def interactive(self) -> bool:
        """Whether it has controls."""
        return bool(self.gallery) or any(table.sortable or table.filters for table in self.tables)


@dataclass(frozen=True)
class SectionedReport:
    """A page of sections.

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
