"""Figures: densities of chosen rows, calibration, learning curves, and whether log Z can be trusted.

Every function returns a Matplotlib `Figure` and draws into an `Axes` of yours where it takes one. They never touch the
global backend or pyplot, so they work in scripts, servers and notebooks alike. Neutral colours follow your `rcParams`;
models get the colours of `COLORS` in the order of the mapping, so the same mapping order gives a model the same colour
in every figure. These colours (Okabe and Ito's) can be told apart with any common colour vision and stand out from
white as from near-black.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import wraps
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar, cast

import numpy as np
import torch
from numpy.typing import NDArray

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from energyreg.models.predictive import PredictiveDistribution

__all__ = [
    "COLORS",
    "coverage_curve",
    "densities",
    "histogram",
    "joint_draws",
    "learning_curves",
    "log_partition",
    "pit_histogram",
    "probabilities",
    "reliability_curve",
    "sharpness",
]

COLORS = ("#009e73", "#0072b2", "#d55e00", "#cc79a7", "#8c6d31")
"""One colour per model, in the order in which the models are given."""

_P = ParamSpec("_P")
_R = TypeVar("_R")

# Sizes and spines only. Colours of text and frames stay the user's own.
_STYLE: dict[Any, Any] = {
    "axes.grid": False,
    "axes.linewidth": 0.8,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlelocation": "left",
    "axes.titlesize": 10.0,
    "axes.labelsize": 9.0,
    "font.size": 9.0,
    "legend.fontsize": 9.0,
    "legend.frameon": False,
    "text.parse_math": False,  # names of models and targets are texts, whatever dollars they hold
    "lines.linewidth": 1.6,
    "lines.solid_capstyle": "round",
    "xtick.labelsize": 8.5,
    "xtick.major.size": 3.0,
    "xtick.major.width": 0.8,
    "ytick.labelsize": 8.5,
    "ytick.major.size": 3.0,
    "ytick.major.width": 0.8,
}


def _styled(function: Callable[_P, _R]) -> Callable[_P, _R]:
    """Run `function` with our sizes, and say what to install where Matplotlib is missing."""

    @wraps(function)
    def wrapper(*args: _P.args, **kwargs: _P.kwargs) -> _R:
        try:
            import matplotlib
        except ImportError as error:
            raise ImportError(
                "Figures are drawn by Matplotlib, which is not installed. Install it with: "
                "pip install 'energyreg[tables]'"
            ) from error
        with matplotlib.rc_context(_STYLE):
            return function(*args, **kwargs)

    return wrapper


@_styled
def densities(
    models: Mapping[str, PredictiveDistribution],
    y: Any = None,
    *,
    rows: Sequence[int] | None = None,
    titles: Sequence[str] | None = None,
    level: float = 0.9,
    label: str = "y",
    num_points: int = 320,
    columns: int = 3,
    circle: tuple[float, float] | None = None,
) -> Figure:
    """Draw p(y|x) of chosen rows, one panel a row, the models one below the other on shared axes (D = 1).

    The strongly filled part of a density is its highest-density region; a dashed line through all models of a panel
    marks the target that came true. The number at the right is log p of that target, in nats: higher is better.

    Args:
        models: Name → predictive distribution of the same B inputs.
        y: Observed targets, shape (B,) or (B, 1), to mark. Optional.
        rows: Which of the B rows to draw; the first six by default.
        titles: A heading for each of `rows`.
        level: Probability of the highlighted region, in (0, 1).
        label: Name and unit of y, at the horizontal axis.
        num_points: Points of each curve, about half of them where the models see most probability.
        columns: Panels side by side, at most.
        circle: Where y lies on a circle, the ends of its range: the panel shows the whole turn, cut opposite the mean
            of the first model, with the ticks of the range.

    Returns:
        The figure.

    Raises:
        ImportError: Matplotlib is not installed.
        ValueError: No model, a model with D > 1, numbers of rows that differ, a row out of range, or `level` not in (0,
            1).
    """
    from matplotlib.figure import Figure

    num_rows = _common_rows(models)
    rows = list(range(min(num_rows, 6))) if rows is None else [int(row) for row in rows]
    if not rows or min(rows) < -num_rows or max(rows) >= num_rows:
        raise ValueError(
            f"rows is {rows}, but it must name at least one of the {num_rows} predicted rows (0 to {num_rows - 1})."
        )
    if titles is not None and len(titles) != len(rows):
        raise ValueError(f"titles has {len(titles)} entries for {len(rows)} rows. Pass one for each row, or none.")
    if not 0.0 < level < 1.0:
        raise ValueError(f"level is {level}, but a probability strictly between 0 and 1 was expected, such as 0.9.")
    observed = None if y is None else _values(y, "y")
    if observed is not None and len(observed) != num_rows:
        raise ValueError(
            f"y has {len(observed)} rows, but the models predict {num_rows}. Pass the targets of the same rows."
        )

    if circle is None:
        grid = _density_grid(models, observed, num_points)
    else:
        grid, observed = _circle_grid(models, observed, num_points, circle)
    curves = {name: _on_grid(p, grid) for name, p in models.items()}
    thresholds = {name: _array(p.highest_density_region(level).log_threshold) for name, p in models.items()}
    scores = None if observed is None else {name: _on_grid(p, observed[None])[0] for name, p in models.items()}

    columns = min(columns, len(rows))
    lines = math.ceil(len(rows) / columns)
    figure = Figure(figsize=(3.5 * columns, (0.62 * len(models) + 0.75) * lines), layout="constrained")
    panels = figure.subfigures(lines, columns, squeeze=False, wspace=0.04, hspace=0.02).flat
    for panel, row, index in zip(panels, rows, range(len(rows)), strict=False):
        axes = panel.subplots(len(models), 1, sharex=True, sharey=True, squeeze=False)[:, 0]
        top = max(float(np.exp(curve[:, row]).max()) for curve in curves.values())
        for ax, (name, curve), color in zip(axes, curves.items(), _colors(models), strict=True):
            density = np.exp(curve[:, row])
            inside = curve[:, row] >= thresholds[name][row]
            ax.fill_between(grid[:, row], density, color=color, alpha=0.16, linewidth=0)
            ax.fill_between(grid[:, row], density, where=inside, color=color, alpha=0.5, linewidth=0)
            ax.plot(grid[:, row], density, color=color, linewidth=1.3)
            neutral = ax.xaxis.label.get_color()
            ax.text(0.0, 0.97, name, transform=ax.transAxes, color=color, va="top", weight="bold", size=8.5)
            if observed is not None and scores is not None:
                ax.plot([observed[row]] * 2, [0, 1.04 * top], color=neutral, linewidth=1.0, linestyle=(0, (3, 2)))
                ax.text(1.0, 0.97, _signed(scores[name][row]), transform=ax.transAxes, ha="right", va="top", size=8.5)
            ax.set_ylim(0.0, 1.5 * top)  # room for the names above the highest hump
            ax.set_yticks([])
            ax.spines["left"].set_visible(False)
        axes[-1].set_xlim(grid[0, row], grid[-1, row])
        if circle is not None:
            _circle_ticks(axes[-1], circle)
        axes[-1].set_xlabel(label)
        for ax in axes[:-1]:
            ax.tick_params(bottom=False)
        if titles is not None:
            panel.suptitle(titles[index], x=0.02, ha="left", size=10, weight="bold")
    return figure


@_styled
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

    Returns:
        The figure.

    Raises:
        ImportError: Matplotlib is not installed.
        ValueError: No values, values outside [0, 1] or NaN, or `bins` below 2.
    """
    values = _pit_values(values, "values")
    if bins < 2:
        raise ValueError(f"bins is {bins}, but a histogram needs at least 2 bars.")
    ax = _axes(ax, (3.5, 2.1))
    heights = np.histogram(values, bins, range=(0.0, 1.0))[0] * bins / len(values)
    half = _normal_quantile((1 + level) / 2) * math.sqrt((bins - 1) / len(values))
    ax.axhspan(max(0.0, 1 - half), 1 + half, color=_neutral(ax), alpha=0.16, linewidth=0, zorder=0)
    ax.axhline(1.0, color=_neutral(ax), linewidth=0.8, linestyle=(0, (3, 2)), zorder=1)
    ax.bar((np.arange(bins) + 0.5) / bins, heights, width=0.86 / bins, color=color, alpha=0.85, linewidth=0, zorder=2)
    ax.set(xlim=(0, 1), ylim=(0, max(1.6, 1.08 * heights.max())), title=title, xlabel="predicted probability below y")
    ax.set_ylabel("relative frequency")
    ax.set_xticks([0, 0.25, 0.5, 0.75, 1], ["0", "¼", "½", "¾", "1"])
    return _figure(ax)


def _kolmogorov_band(ax: Axes, levels: NDArray[np.float64], rows: int, *, gap: bool = False) -> float:
    """Draw, in percent, what a calibrated model's curve is, and the band that it stays in; return half its width."""
    half = 1.358 / math.sqrt(rows)
    centre = np.zeros_like(levels) if gap else levels
    low, high = centre - half, centre + half
    if not gap:
        low, high = low.clip(0, 1), high.clip(0, 1)
    ax.fill_between(100 * levels, 100 * low, 100 * high, color=_neutral(ax), alpha=0.16, linewidth=0)
    ax.plot(100 * levels, 100 * centre, color=_neutral(ax), linewidth=0.8, linestyle=(0, (3, 2)))
    return half


@_styled
def coverage_curve(models: Mapping[str, Any], *, gap: bool = False, ax: Axes | None = None) -> Figure:
    """Draw the share of targets inside the equal-tailed intervals against the promised probability, for every level.

    The band is where the whole curve of a calibrated model stays in 95 of 100 test sets of this size (Kolmogorov).

    Args:
        models: Name → PIT values of the test rows, from :func:`energyreg.evaluation.metrics.pit`, shape (B,).
        gap: Draw the difference of the two, in percentage points, which shows more where all models do well.
        ax: Axes to draw into; by default a new figure.

    Returns:
        The figure.

    Raises:
        ImportError: Matplotlib is not installed.
        ValueError: No model, no values, or values outside [0, 1] or NaN.
    """
    if not models:
        raise ValueError("models is empty. Pass at least one name with its PIT values.")
    ax = _axes(ax, (3.5, 2.9))
    levels = np.linspace(0.0, 1.0, 201)
    # A target lies in the equal-tailed interval of probability c exactly where |2F − 1| ≤ c.
    shares = {}
    for name, values in models.items():
        centred = np.sort(np.abs(2 * _pit_values(values, f"models[{name!r}]") - 1))
        shares[name] = (np.searchsorted(centred, levels, side="right") / len(centred), len(centred))
    unit = 100.0
    half = _kolmogorov_band(ax, levels, min(count for _, count in shares.values()), gap=gap)
    for (name, (share, _)), color in zip(shares.items(), _colors(models), strict=True):
        ax.plot(unit * levels, unit * (share - levels if gap else share), color=color, label=name)
    ax.set(xlim=(0, 100), xlabel="promised probability (%)")
    if gap:
        largest = max(2 * half, 1.1 * max(np.abs(share - levels).max() for share, _ in shares.values()))
        ax.set(ylim=(-unit * largest, unit * largest), ylabel="kept − promised (points)")
        ax.text(1, unit * 0.96 * largest, "intervals too wide ↑", va="top", size=8)
        ax.text(1, -unit * 0.96 * largest, "intervals too narrow ↓", va="bottom", size=8)
    else:
        ax.set(ylim=(0, 100), ylabel="targets inside (%)")
        _colored_legend(ax, loc="upper left")
    return _figure(ax)


@_styled
def reliability_curve(models: Mapping[str, Any], *, ax: Axes | None = None) -> Figure:
    """Draw the share of targets below the predicted quantiles against the quantiles' level: the diagonal is right.

    A curve above the diagonal at low levels and below it at high ones means densities that are too narrow; one that
    lies above it everywhere, predictions that are too high. The band is where the whole curve of a calibrated model
    stays in 95 of 100 test sets of this size (Kolmogorov).

    Args:
        models: Name → PIT values of the test rows, from :func:`energyreg.evaluation.metrics.pit`, shape (B,).
        ax: Axes to draw into; by default a new figure.

    Returns:
        The figure.

    Raises:
        ImportError: Matplotlib is not installed.
        ValueError: No model, no values, or values outside [0, 1] or NaN.
    """
    if not models:
        raise ValueError("models is empty. Pass at least one name with its PIT values.")
    ax = _axes(ax, (3.5, 2.9))
    levels = np.linspace(0.0, 1.0, 201)
    values = {name: np.sort(_pit_values(pit, f"models[{name!r}]")) for name, pit in models.items()}
    _kolmogorov_band(ax, levels, min(map(len, values.values())))
    for (name, pit), color in zip(values.items(), _colors(models), strict=True):
        ax.plot(100 * levels, 100 * np.searchsorted(pit, levels, side="right") / len(pit), color=color, label=name)
    ax.set(xlim=(0, 100), ylim=(0, 100), xlabel="level of the quantile (%)", ylabel="targets below (%)")
    _colored_legend(ax, loc="upper left")
    return _figure(ax)


@_styled
def sharpness(models: Mapping[str, Any], *, label: str = "width of the interval", ax: Axes | None = None) -> Figure:
    """Draw how the widths of the rows' intervals are spread: the share of rows with an interval up to that width.

    Args:
        models: Name → widths of the intervals of the test rows, shape (B,).
        label: Name and unit of the width.
        ax: Axes to draw into; by default a new figure.

    Returns:
        The figure.

    Raises:
        ImportError: Matplotlib is not installed.
        ValueError: No model, or no finite width.
    """
    curves = {name: np.sort(_values(widths, f"models[{name!r}]")) for name, widths in models.items()}
    curves = {name: curve[np.isfinite(curve)] for name, curve in curves.items()}
    if not curves or min(map(len, curves.values())) == 0:
        raise ValueError("models has no finite width. Pass at least one name with the widths of its rows.")
    ax = _axes(ax, (3.5, 2.9))
    levels = np.linspace(0.0, 1.0, 201)
    for (name, curve), color in zip(curves.items(), _colors(curves), strict=True):
        ax.plot(np.quantile(curve, levels), 100 * levels, color=color, label=name)
    right = max(float(np.quantile(curve, 0.99)) for curve in curves.values())
    ax.set(xlim=(0, 1.05 * right or 1.0), ylim=(0, 100), xlabel=label, ylabel="rows (%)")
    _colored_legend(ax, loc="lower right")
    return _figure(ax)


@_styled
def probabilities(
    values: Any, shares: Any, y: float | None = None, *, label: str = "y", color: str = COLORS[0],
    ax: Axes | None = None,
) -> Figure:  # fmt: skip
    """Draw the probabilities of the values that a count can take, as bars.

    Args:
        values: The values, shape (V,).
        shares: Their probabilities, shape (V,).
        y: Observed value, to mark by a dashed line; its log-probability stands at the right. Optional.
        label: Name and unit of y.
        color: Colour of the bars.
        ax: Axes to draw into; by default a new figure.

    Returns:
        The figure.

    Raises:
        ImportError: Matplotlib is not installed.
        ValueError: No value, or numbers of values and probabilities that differ.
    """
    from matplotlib.ticker import MaxNLocator

    values, shares = _values(values, "values"), _values(shares, "shares")
    if len(values) == 0 or len(values) != len(shares):
        raise ValueError(f"values has {len(values)} entries and shares {len(shares)}. Pass one probability for each.")
    ax = _axes(ax, (3.5, 1.4))
    step = float(np.diff(np.sort(values)).min()) if len(values) > 1 else 1.0
    ax.bar(values, shares, width=0.82 * step, color=color, alpha=0.75, linewidth=0)
    top = max(float(shares.max()), 1e-12)
    if y is not None:
        ax.plot([y, y], [0, 1.1 * top], color=_neutral(ax), linewidth=1.0, linestyle=(0, (3, 2)))
        at = np.flatnonzero(values == y)
        if len(at):
            with np.errstate(divide="ignore"):
                score = float(np.log(shares[at[0]]))
            ax.text(1.0, 0.97, _signed(score), transform=ax.transAxes, ha="right", va="top", size=8.5)
    ax.set(ylim=(0, 1.4 * top), xlabel=label)
    ax.set_yticks([])
    ax.spines["left"].set_visible(False)
    ax.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True))
    return _figure(ax)


@_styled
def joint_draws(draws: Any, y: Any = None, *, labels: Sequence[str], color: str = COLORS[0]) -> Figure:
    """Draw samples of one row's joint density: of two outputs against each other, of more each by itself.

    The observed target is a cross among two outputs, and a dashed line with more. Histograms show at most six outputs.

    Args:
        draws: Samples, shape (S, D), D ≥ 2.
        y: Observed targets, shape (D,). Optional.
        labels: Names and units of the D outputs.
        color: Colour of the samples.

    Returns:
        The figure.

    Raises:
        ImportError: Matplotlib is not installed.
        ValueError: Shapes that do not fit each other, or D < 2.
    """
    from matplotlib.figure import Figure

    draws = _array(draws)
    observed = None if y is None else _array(y)
    if draws.ndim != 2 or len(draws) == 0 or draws.shape[1] < 2:
        raise ValueError(f"draws has shape {draws.shape}, but samples of two outputs or more were expected, (S, D).")
    outputs = draws.shape[1]
    if len(labels) != outputs or (observed is not None and observed.shape != (outputs,)):
        raise ValueError(f"draws has {outputs} outputs. Pass a label for each, and an observed value for each or none.")
    if outputs == 2:
        ax = _axes(None, (3.5, 2.7))
        ax.plot(*draws.T, "o", color=color, markersize=2.6, alpha=0.45, markeredgewidth=0)
        if observed is not None:
            ax.plot(*observed[:, None], "x", color=_neutral(ax), markersize=8, markeredgewidth=1.8)
        ax.set(xlabel=labels[0], ylabel=labels[1])
        return _figure(ax)
    shown = min(outputs, 6)
    figure = Figure(figsize=(3.5, 0.95 * shown), layout="constrained")
    axes = figure.subplots(shown, 1, squeeze=False)[:, 0]
    for d, ax in enumerate(axes):
        ax.hist(draws[:, d], bins=24, color=color, alpha=0.75, linewidth=0)
        if observed is not None:
            ax.axvline(observed[d], color=_neutral(ax), linewidth=1.0, linestyle=(0, (3, 2)))
        ax.set_xlabel(labels[d])
        ax.set_yticks([])
        ax.spines["left"].set_visible(False)
    return figure


@_styled
def histogram(
    values: Any, *, label: str = "y", bins: int = 30, color: str = COLORS[1], ax: Axes | None = None
) -> Figure:
    """Draw how numbers are spread, from their 0.5% to their 99.5% quantile.

    Args:
        values: Numbers, shape (B,); what is not finite is left out.
        label: Their name and unit.
        bins: Number of bars, at most; whole numbers with fewer values get one each.
        color: Colour of the bars.
        ax: Axes to draw into; by default a new figure.

    Returns:
        The figure.

    Raises:
        ImportError: Matplotlib is not installed.
        ValueError: No finite value.
    """
    values = _values(values, "values")
    values = values[np.isfinite(values)]
    if len(values) == 0:
        raise ValueError("values has no finite number. Pass at least one.")
    ax = _axes(ax, (3.5, 1.9))
    low, high = np.quantile(values, [0.005, 0.995])
    whole = bool((values == np.floor(values)).all())
    if whole and high - low < bins:
        edges = np.arange(math.floor(low), math.ceil(high) + 2) - 0.5
    else:
        edges = np.linspace(low, high if high > low else low + 1.0, bins + 1)
    ax.hist(values, bins=edges.tolist(), color=color, alpha=0.8, linewidth=0, rwidth=0.9)
    ax.set(xlabel=label, ylabel="rows")
    return _figure(ax)


@_styled
def learning_curves(
    histories: Mapping[str, Any],
    *,
    quantity: str = "validation_nll",
    label: str = "validation NLL (nats)",
    legend: bool = True,
    ax: Axes | None = None,
) -> Figure:
    """Draw one quantity of several training histories against the epoch, the lowest value marked by a dot.

    Args:
        histories: Name → `History` of `er.fit`, or anything with a list of that name.
        quantity: Attribute to draw: a list with one number per epoch, such as `validation_nll` or `train_loss`.
        label: Name and unit of the quantity, at the vertical axis.
        legend: Whether to name the curves.
        ax: Axes to draw into; by default a new figure.

    Returns:
        The figure.

    Raises:
        ImportError: Matplotlib is not installed.
        ValueError: No history, or one without a finite value of `quantity`.
    """
    from matplotlib.ticker import MaxNLocator

    curves = {name: np.asarray(getattr(history, quantity), dtype=float) for name, history in histories.items()}
    empty = [name for name, curve in curves.items() if not np.isfinite(curve).any()]
    if empty or not curves:
        raise ValueError(
            f"histories has no finite value of {quantity!r} for {empty or 'any model'}. Pass histories of at least "
            "one epoch."
        )
    ax = _axes(ax, (3.5, 2.9))
    for (name, curve), color in zip(curves.items(), _colors(histories), strict=True):
        epochs = np.arange(1, len(curve) + 1)
        best = int(np.nanargmin(curve))
        ax.plot(epochs, curve, color=color, label=name)
        ax.plot(epochs[best], curve[best], "o", color=color, markersize=4.5)
    # The first epochs lie so far above the rest that they would flatten all that matters.
    finite = np.concatenate([curve[np.isfinite(curve)] for curve in curves.values()])
    low, high = float(finite.min()), float(np.quantile(finite, 0.95))
    margin = 0.06 * (high - low) or 0.5
    ax.set(ylim=(low - margin, high + margin), xlabel="epoch", ylabel=label)
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    if legend:
        _colored_legend(ax, loc="best")
    return _figure(ax)


@_styled
def log_partition(
    diagnostics: Any,
    *,
    reference: Any = None,
    max_rows: int = 60,
    color: str = COLORS[2],
    figure: Figure | None = None,
) -> Figure:
    r"""Draw log Z of some rows with error bars of two standard errors, and below it what its trust rests on.

    The strips below show the Pareto :math:`\hat k` of the weights, where values above 0.7 (crosses) are not to be
    trusted, and the effective sample size.

    Args:
        diagnostics: `model(x).diagnostics`, or `WeightedPoints` of an integrator, for B rows.
        reference: Another estimate of the same log Z, shape (B,): the difference is drawn then, which should be 0
            within the bars for 19 of 20 rows.
        max_rows: Rows to draw, evenly spaced in the order of log Z.
        color: Colour of the marks.
        figure: Figure to draw into; by default a new one.

    Returns:
        The figure.

    Raises:
        ImportError: Matplotlib is not installed.
        ValueError: No row, or a reference of another number of rows.
    """
    from matplotlib.figure import Figure

    log_z = _values(diagnostics.log_partition, "diagnostics.log_partition")
    if len(log_z) == 0:
        raise ValueError("diagnostics has no rows. Pass those of at least one input.")
    order = np.argsort(log_z)
    label = "log Z (nats)"
    if reference is not None:
        reference = _values(reference, "reference")
        if len(reference) != len(log_z):
            raise ValueError(
                f"reference has {len(reference)} rows, but diagnostics has {len(log_z)}. Pass the same rows."
            )
        log_z, label = log_z - reference, "Δ log Z (nats)"
    pick = order[np.unique(np.linspace(0, len(order) - 1, min(max_rows, len(order))).round().astype(int))]
    place = np.arange(len(pick))
    figure = Figure(figsize=(7.2, 3.6), layout="constrained") if figure is None else figure
    top, middle, bottom = figure.subplots(3, 1, sharex=True, height_ratios=(2.4, 1, 1))
    bars = 2 * np.nan_to_num(_array(diagnostics.log_partition_stderr)[pick])
    if reference is not None:
        top.axhline(0.0, color=_neutral(top), linewidth=0.8, linestyle=(0, (3, 2)))
    top.errorbar(place, log_z[pick], yerr=bars, fmt="o", color=color, markersize=3, elinewidth=1.1)
    top.set_ylabel(label)
    k_hat = _array(diagnostics.pareto_k)[pick].clip(-1.0, 1.5)
    bad = k_hat > 0.7
    middle.axhline(0.7, color=_neutral(middle), linewidth=0.8, linestyle=(0, (3, 2)))
    middle.plot(place[~bad], k_hat[~bad], "o", color=color, markersize=3)
    middle.plot(place[bad], k_hat[bad], "x", color=_neutral(middle), markersize=4.5)
    middle.set(ylabel="Pareto k̂", ylim=(-1.15, 1.65))
    bottom.plot(place, _array(diagnostics.effective_sample_size)[pick], "o", color=color, markersize=3)
    bottom.set(ylabel="ESS", ylim=(0, None), xlabel=f"{len(pick)} of {len(log_z):,} rows, in the order of log Z")
    bottom.set_xticks([])
    figure.align_ylabels()
    return figure


def _axes(ax: Axes | None, size: tuple[float, float]) -> Axes:
    if ax is not None:
        return ax
    from matplotlib.figure import Figure

    return Figure(figsize=size, layout="constrained").subplots()


def _figure(ax: Axes) -> Figure:
    return ax.figure.figure  # from a subfigure to the figure that holds it


def _neutral(ax: Axes) -> Any:
    return ax.xaxis.label.get_color()


def _colors(models: Mapping[str, Any]) -> list[str]:
    return [COLORS[i % len(COLORS)] for i in range(len(models))]


def _colored_legend(ax: Axes, loc: str) -> None:
    """Legend whose words have the colours of their curves, so that nothing has to be matched by eye."""
    words: dict[str, Any] = {"weight": "bold", "size": 8.5}
    legend = ax.legend(loc=cast(Any, loc), labelcolor="linecolor", handlelength=0, handletextpad=0, prop=words)
    for handle in legend.legend_handles:
        if handle is not None:
            handle.set_visible(False)


def _signed(value: float) -> str:
    return f"{value:+.2f}".replace("-", "−").replace("+inf", "∞").replace("inf", "∞")


def _array(values: Any) -> NDArray[np.float64]:
    if isinstance(values, torch.Tensor):
        values = values.detach().cpu().numpy()
    return np.asarray(values, dtype=np.float64)


def _values(values: Any, name: str) -> NDArray[np.float64]:
    """A flat array of numbers, from shape (B,) or (B, 1)."""
    array = _array(values)
    if array.ndim == 2 and array.shape[1] == 1:
        array = array[:, 0]
    if array.ndim != 1:
        raise ValueError(f"{name} has shape {array.shape}, but one number per row was expected, shape (B,).")
    return array


def _pit_values(values: Any, name: str) -> NDArray[np.float64]:
    array = _values(values, name)
    if len(array) == 0:
        raise ValueError(f"{name} has no rows. Pass the PIT values of at least one row.")
    if not ((array >= 0) & (array <= 1)).all():
        raise ValueError(
            f"{name} has values outside [0, 1] or NaN, but PIT values are probabilities. Compute them by "
            "energyreg.evaluation.metrics.pit."
        )
    return array


def _common_rows(models: Mapping[str, PredictiveDistribution]) -> int:
    """The number of rows that all models predict."""
    if not models:
        raise ValueError("models is empty. Pass at least one name with its predictive distribution.")
    for name, p in models.items():
        if tuple(p.event_shape) != (1,):
            raise ValueError(
                f"{name!r} predicts {tuple(p.event_shape)}-shaped targets, but a curve can only be drawn for "
                "one target dimension."
            )
    counts = {name: int(p.batch_shape[0]) for name, p in models.items()}
    if len(set(counts.values())) > 1:
        raise ValueError(f"The models predict different numbers of rows, {counts}. Call all of them with the same x.")
    return next(iter(counts.values()))


def _density_grid(
    models: Mapping[str, PredictiveDistribution], observed: NDArray[np.float64] | None, num_points: int
) -> NDArray[np.float64]:
    """Points of each row's curves, shape (G, B): between the tails of all models, and the target in sight."""
    # Levels of every model besides equal steps: a hump much narrower than the panel keeps its shape with few points.
    levels = torch.linspace(0.02, 0.98, max(2, num_points // 6), dtype=torch.float64)
    quantiles = np.concatenate([_array(p.quantile(levels)) for p in models.values()])
    low, high = quantiles.min(0), quantiles.max(0)
    if observed is not None:
        low, high = np.fmin(low, observed), np.fmax(high, observed)
    margin = 0.04 * (high - low) + 1e-12
    steps = np.linspace(low - margin, high + margin, max(2, num_points - len(quantiles)))
    return np.sort(np.concatenate([steps, quantiles]), axis=0)


def _circle_grid(
    models: Mapping[str, PredictiveDistribution],
    observed: NDArray[np.float64] | None,
    num_points: int,
    circle: tuple[float, float],
) -> tuple[NDArray[np.float64], NDArray[np.float64] | None]:
    """Points of a whole turn around each row's mean, shape (G, B), and the targets on the same turn, shape (B,)."""
    low, high = circle
    if not low < high:
        raise ValueError(f"circle is {circle}, but the ends of a range were expected, such as (0.0, 360.0).")
    period = high - low
    first = next(iter(models.values()))
    start = _array(first.mean)[:, 0] - period / 2
    levels = torch.linspace(0.02, 0.98, max(2, num_points // 6), dtype=torch.float64)
    quantiles = np.concatenate([_array(p.quantile(levels)) for p in models.values()])
    steps = np.linspace(start, start + period, max(2, num_points - len(quantiles)))
    grid = np.sort(np.concatenate([steps, start + (quantiles - start) % period]), axis=0)
    return grid, None if observed is None else start + (observed - start) % period


def _circle_ticks(ax: Axes, circle: tuple[float, float]) -> None:
    """Ticks at eighths of the turn at most, named as the range names them."""
    low, high = circle
    period = high - low
    left, right = ax.get_xlim()
    step = period / 4
    ticks = low + step * np.arange(math.ceil((left - low) / step), math.floor((right - low) / step) + 1)
    ax.set_xticks(ticks, [f"{low + (tick - low) % period:.4g}" for tick in ticks])


def _on_grid(p: PredictiveDistribution, grid: NDArray[np.float64]) -> NDArray[np.float64]:
    """log p at points of shape (G, B), same shape."""
    return _array(p.log_prob(torch.from_numpy(grid)[..., None]))


def _normal_quantile(level: float) -> float:
    return math.sqrt(2) * float(torch.erfinv(torch.tensor(2 * level - 1, dtype=torch.float64)))
