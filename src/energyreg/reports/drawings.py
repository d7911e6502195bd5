"""Figures that several kinds of page have, with what they show in words."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from energyreg import plots
from energyreg.reports.content import Drawing

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from energyreg.models.predictive import PredictiveDistribution

Array = NDArray[np.float64]


def pit_drawing(pit: Array, what: str, title: str, index: int = 0, highest: float = 0.0) -> Drawing:
    """Histogram of the PIT values of the model with this number; `highest` is the least upper end of its axis."""
    bars = np.histogram(pit, 20, range=(0, 1))[0] * 20 / len(pit)

    def draw() -> Figure:
        figure = plots.pit_histogram(pit, color=plots.COLORS[index % len(plots.COLORS)])
        ax = figure.axes[0]
        ax.set_ylim(0, max(ax.get_ylim()[1], highest))
        return figure

    return Drawing(
        draw,
        f"Histogram of the PIT values of {what}, 20 bars. A calibrated model has bars of height 1; here they lie "
        f"between {bars.min():.2f} and {bars.max():.2f}.",
        title,
    )


def interval_drawings(pits: Mapping[str, Array], suffix: str = "") -> list[Drawing]:
    """Empirical against nominal coverage of the equal-tailed intervals of every level, and the difference of the two.

    Args:
        pits: Name → PIT values of the rows.
        suffix: What the titles end in, such as the name of an output.
    """
    inside = "; ".join(f"{name} {np.mean(np.abs(2 * pit - 1) <= 0.9):.1%}" for name, pit in pits.items())
    alternative = (
        f"Fraction of targets inside the intervals{suffix} against their nominal probability. At a nominal 90%: "
        f"{inside}."
    )
    return [
        Drawing(lambda: plots.coverage_curve(pits), alternative, f"Reliability of intervals{suffix}"),
        Drawing(
            lambda: plots.coverage_curve(pits, gap=True), f"Difference of the two. {alternative}",
            f"The difference, enlarged{suffix}",
        ),
    ]  # fmt: skip


def region_in_words(p: PredictiveDistribution, row: int, level: float, show: Callable[[float], str]) -> str:
    """The smallest region of a row: "90% region 1 to 2 and 3 to 4"."""
    intervals = p.highest_density_region(level).intervals
    assert intervals is not None
    parts = " and ".join(f"{show(float(low))} to {show(float(high))}" for low, high in intervals[row])
    return f"{level:.0%} region {parts}"


def tall_log_partition(diagnostics: Any, *, reference: Any = None, index: int = 0) -> Figure:
    """log Z and its diagnostics, in a figure as narrow as the others of a page."""
    from matplotlib.figure import Figure

    return plots.log_partition(
        diagnostics, reference=reference, max_rows=40, color=plots.COLORS[index % len(plots.COLORS)],
        figure=Figure(figsize=(3.5, 3.5), layout="constrained"),
    )  # fmt: skip
