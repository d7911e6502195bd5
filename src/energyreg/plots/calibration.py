"""Figures of calibration and sharpness, from PIT values and widths of intervals."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from statistics import NormalDist
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from energyreg.plots.style import COLORS, axes_of_size, colors_of, figure_of, flat, name_curves, neutral, styled

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["coverage_curve", "pit_histogram", "reliability_curve", "sharpness"]

LEVELS = np.linspace(0.0, 1.0, 201)
"""Levels at which curves are drawn."""


@styled
def pit_histogram(
    values: Any, *, bins: int = 20, level: float = 0.99, title: str = "", color: str = COLORS[0], ax: Axes | None = None
) -> Figure:
    """Draw the histogram of the PIT values of one model; flat where the model is calibrated.

    Args:
        values: PIT values of the test rows, from :func:`energyreg.evaluation.metrics.pit`, shape (B,).
        bins: Number of bars.
        level: Probability of the grey band in which each bar of a calibrated model falls (normal approximation of the
            binomial distribution).
        title: Heading, the name of the model for one.
        color: Colour of the bars.
        ax: Axes to draw into; by default a new figure.

    Raises:
        ValueError: No values, values outside [0, 1] or NaN, or `bins` below 2.
    """
    values = _pit_values(values, "values")
    if bins < 2:
        raise ValueError(f"bins is {bins}, but a histogram needs at least 2 bars.")
    ax = axes_of_size(ax, (3.5, 2.1))
    heights = np.histogram(values, bins, range=(0.0, 1.0))[0] * bins / len(values)
    half = NormalDist().inv_cdf((1 + level) / 2) * math.sqrt((bins - 1) / len(values))
    ax.axhspan(max(0.0, 1 - half), 1 + half, color=neutral(ax), alpha=0.16, linewidth=0, zorder=0)
    ax.axhline(1.0, color=neutral(ax), linewidth=0.8, linestyle=(0, (3, 2)), zorder=1)
    ax.bar((np.arange(bins) + 0.5) / bins, heights, width=0.86 / bins, color=color, alpha=0.85, linewidth=0, zorder=2)
    ax.set(xlim=(0, 1), ylim=(0, max(1.6, 1.08 * heights.max())), title=title, xlabel="predicted probability below y")
    ax.set_ylabel("relative frequency")
    ax.set_xticks([0, 0.25, 0.5, 0.75, 1], ["0", "¼", "½", "¾", "1"])
    return figure_of(ax)


@styled
def coverage_curve(models: Mapping[str, Any], *, gap: bool = False, ax: Axes | None = None) -> Figure:
    """Draw the fraction of targets inside the equal-tailed intervals against their nominal probability.

    The band is where the whole curve of a calibrated model stays in 95 of 100 test sets of this size (Kolmogorov).

    Args:
        models: Name → PIT values of the test rows, from :func:`energyreg.evaluation.metrics.pit`, shape (B,).
        gap: Draw the difference of the two, in percentage points, which shows more where all models do well.
        ax: Axes to draw into; by default a new figure.

    Raises:
        ValueError: No model, no values, or values outside [0, 1] or NaN.
    """
    ax = axes_of_size(ax, (3.5, 2.9))
    # A target lies in the equal-tailed interval of probability c exactly where |2F − 1| ≤ c.
    centred = {name: np.abs(2 * pit - 1) for name, pit in _pits_of(models).items()}
    half = _kolmogorov_band(ax, min(map(len, centred.values())), gap=gap)
    gaps = [_draw_distribution(ax, name, values, color, gap) for (name, values), color in _colored(centred)]
    ax.set(xlim=(0, 100), xlabel="nominal probability (%)")
    if gap:
        largest = 100 * max(2 * half, 1.1 * max(gaps))
        ax.set(ylim=(-largest, largest), ylabel="empirical − nominal (points)")
        ax.text(1, 0.96 * largest, "intervals too wide ↑", va="top", size=8)
        ax.text(1, -0.96 * largest, "intervals too narrow ↓", va="bottom", size=8)
    else:
        ax.set(ylim=(0, 100), ylabel="targets inside (%)")
        name_curves(ax, loc="upper left")
    return figure_of(ax)


@styled
def reliability_curve(models: Mapping[str, Any], *, ax: Axes | None = None) -> Figure:
    """Draw the fraction of targets below the predicted quantiles against the quantiles' level: the diagonal is right.

    A curve above the diagonal at low levels and below it at high ones means densities that are too narrow; one that
    lies above it everywhere, predictions that are too high. The band is where the whole curve of a calibrated model
    stays in 95 of 100 test sets of this size (Kolmogorov).

    Args:
        models: Name → PIT values of the test rows, from :func:`energyreg.evaluation.metrics.pit`, shape (B,).
        ax: Axes to draw into; by default a new figure.

    Raises:
        ValueError: No model, no values, or values outside [0, 1] or NaN.
    """
    ax = axes_of_size(ax, (3.5, 2.9))
    pits = _pits_of(models)
    _kolmogorov_band(ax, min(map(len, pits.values())))
    for (name, pit), color in _colored(pits):
        _draw_distribution(ax, name, pit, color)
    ax.set(xlim=(0, 100), ylim=(0, 100), xlabel="level of the quantile (%)", ylabel="targets below (%)")
    name_curves(ax, loc="upper left")
    return figure_of(ax)


@styled
def sharpness(models: Mapping[str, Any], *, label: str = "width of the interval", ax: Axes | None = None) -> Figure:
    """Draw the distribution of the widths of intervals: the fraction of rows with an interval up to each width.

    Args:
        models: Name → widths of the intervals of the test rows, shape (B,).
        label: Name and unit of the width.
        ax: Axes to draw into; by default a new figure.

    Raises:
        ValueError: No model, or no finite width.
    """
    curves = {name: np.sort(flat(widths, f"models[{name!r}]")) for name, widths in models.items()}
    curves = {name: curve[np.isfinite(curve)] for name, curve in curves.items()}
    if not curves or min(map(len, curves.values())) == 0:
        raise ValueError("models has no finite width. Pass at least one name with the widths of its rows.")
    ax = axes_of_size(ax, (3.5, 2.9))
    for (name, curve), color in _colored(curves):
        ax.plot(np.quantile(curve, LEVELS), 100 * LEVELS, color=color, label=name)
    right = max(float(np.quantile(curve, 0.99)) for curve in curves.values())
    ax.set(xlim=(0, 1.05 * right or 1.0), ylim=(0, 100), xlabel=label, ylabel="rows (%)")
    name_curves(ax, loc="lower right")
    return figure_of(ax)


def _colored(curves: Mapping[str, NDArray[np.float64]]) -> Iterator[tuple[tuple[str, NDArray[np.float64]], str]]:
    return zip(curves.items(), colors_of(curves), strict=True)


def _kolmogorov_band(ax: Axes, rows: int, *, gap: bool = False) -> float:
    """Draw, in percent, what a calibrated model's curve is, and the band that it stays in; return half its width."""
    half = 1.358 / math.sqrt(rows)
    centre = np.zeros_like(LEVELS) if gap else LEVELS
    low, high = centre - half, centre + half
    if not gap:
        low, high = low.clip(0, 1), high.clip(0, 1)
    ax.fill_between(100 * LEVELS, 100 * low, 100 * high, color=neutral(ax), alpha=0.16, linewidth=0)
    ax.plot(100 * LEVELS, 100 * centre, color=neutral(ax), linewidth=0.8, linestyle=(0, (3, 2)))
    return half


def _draw_distribution(ax: Axes, name: str, values: NDArray[np.float64], color: str, gap: bool = False) -> float:
    """Draw the distribution function of values in [0, 1], in percent; return its largest distance from the diagonal."""
    below = np.searchsorted(np.sort(values), LEVELS, side="right") / len(values)
    ax.plot(100 * LEVELS, 100 * (below - LEVELS if gap else below), color=color, label=name)
    return float(np.abs(below - LEVELS).max())


def _pits_of(models: Mapping[str, Any]) -> dict[str, NDArray[np.float64]]:
    if not models:
        raise ValueError("models is empty. Pass at least one name with its PIT values.")
    return {name: _pit_values(values, f"models[{name!r}]") for name, values in models.items()}


def _pit_values(values: Any, name: str) -> NDArray[np.float64]:
    pit = flat(values, name)
    if len(pit) == 0:
        raise ValueError(f"{name} has no rows. Pass the PIT values of at least one row.")
    if not ((pit >= 0) & (pit <= 1)).all():
        raise ValueError(
            f"{name} has values outside [0, 1] or NaN, but PIT values are probabilities. Compute them by "
            "energyreg.evaluation.metrics.pit."
        )
    return pit
