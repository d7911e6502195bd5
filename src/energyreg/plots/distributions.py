"""Figures of predictive distributions, and of numbers."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from energyreg.plots.style import COLORS, array, axes_of_size, colors_of, figure_of, flat, neutral, signed, styled

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["densities", "histogram", "joint_draws", "probabilities"]


class Distribution(Protocol):
    """What a figure asks of a predictive distribution of B inputs."""

    @property
    def batch_shape(self) -> torch.Size:
        """Shape (B,)."""

    @property
    def event_shape(self) -> torch.Size:
        """Shape (1,)."""

    @property
    def mean(self) -> torch.Tensor:
        """Means, shape (B, 1)."""

    def log_prob(self, y: Any, /) -> torch.Tensor:
        """Log-density at y, shape (*S, B, 1) to (*S, B)."""

    def quantile(self, levels: Any, /) -> torch.Tensor:
        """Quantiles of L levels, shape (L, B)."""

    def highest_density_region(self, level: float, /) -> Any:
        """A region with its `log_threshold`, shape (B,)."""


@styled
def densities(
    models: Mapping[str, Distribution] | Distribution,
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
        models: Name → predictive distribution of the same B inputs, or one distribution without a name.
        y: Observed targets, shape (B,) or (B, 1), to mark. Optional.
        rows: Which of the B rows to draw; the first six by default.
        titles: A heading for each of `rows`.
        level: Probability of the highlighted region, in (0, 1).
        label: Name and unit of y, at the horizontal axis.
        num_points: Points of each curve, about half of them where the models see most probability.
        columns: Panels side by side, at most.
        circle: Where y lies on a circle, the ends of its range: the panel shows the whole turn, cut opposite the mean
            of the first model, with the ticks of the range.

    Raises:
        ValueError: No model, a model with D > 1, numbers of rows that differ, a row out of range, or `level` not in (0,
            1).
    """
    from matplotlib.figure import Figure

    models = models if isinstance(models, Mapping) else {"": models}
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
    observed = None if y is None else flat(y, "y")
    if observed is not None and len(observed) != num_rows:
        raise ValueError(
            f"y has {len(observed)} rows, but the models predict {num_rows}. Pass the targets of the same rows."
        )

    if circle is None:
        grid = _density_grid(models, observed, num_points)
    else:
        grid, observed = _circle_grid(models, observed, num_points, circle)
    curves = {name: _on_grid(p, grid) for name, p in models.items()}
    thresholds = {name: array(p.highest_density_region(level).log_threshold) for name, p in models.items()}
    scores = None if observed is None else {name: _on_grid(p, observed[None])[0] for name, p in models.items()}

    columns = min(columns, len(rows))
    lines = math.ceil(len(rows) / columns)
    figure = Figure(figsize=(3.5 * columns, (0.62 * len(models) + 0.75) * lines), layout="constrained")
    panels = figure.subfigures(lines, columns, squeeze=False, wspace=0.04, hspace=0.02).flat
    for panel, row, index in zip(panels, rows, range(len(rows)), strict=False):
        axes = panel.subplots(len(models), 1, sharex=True, sharey=True, squeeze=False)[:, 0]
        top = max(float(np.exp(curve[:, row]).max()) for curve in curves.values())
        for ax, (name, curve), color in zip(axes, curves.items(), colors_of(models), strict=True):
            density = np.exp(curve[:, row])
            inside = curve[:, row] >= thresholds[name][row]
            ax.fill_between(grid[:, row], density, color=color, alpha=0.16, linewidth=0)
            ax.fill_between(grid[:, row], density, where=inside, color=color, alpha=0.5, linewidth=0)
            ax.plot(grid[:, row], density, color=color, linewidth=1.3)
            ax.text(0.0, 0.97, name, transform=ax.transAxes, color=color, va="top", weight="bold", size=8.5)
            if observed is not None and scores is not None:
                ax.plot([observed[row]] * 2, [0, 1.04 * top], color=neutral(ax), linewidth=1.0, linestyle=(0, (3, 2)))
                ax.text(1.0, 0.97, signed(scores[name][row]), transform=ax.transAxes, ha="right", va="top", size=8.5)
            ax.set_ylim(0.0, 1.5 * top)  # room for the names above the highest mode
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


@styled
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

    Raises:
        ValueError: No value, or numbers of values and probabilities that differ.
    """
    from matplotlib.ticker import MaxNLocator

    values, shares = flat(values, "values"), flat(shares, "shares")
    if len(values) == 0 or len(values) != len(shares):
        raise ValueError(f"values has {len(values)} entries and shares {len(shares)}. Pass one probability for each.")
    ax = axes_of_size(ax, (3.5, 1.4))
    step = float(np.diff(np.sort(values)).min()) if len(values) > 1 else 1.0
    ax.bar(values, shares, width=0.82 * step, color=color, alpha=0.75, linewidth=0)
    top = max(float(shares.max()), 1e-12)
    if y is not None:
        ax.plot([y, y], [0, 1.1 * top], color=neutral(ax), linewidth=1.0, linestyle=(0, (3, 2)))
        at = np.flatnonzero(values == y)
        if len(at):
            with np.errstate(divide="ignore"):
                score = float(np.log(shares[at[0]]))
            ax.text(1.0, 0.97, signed(score), transform=ax.transAxes, ha="right", va="top", size=8.5)
    ax.set(ylim=(0, 1.4 * top), xlabel=label)
    ax.set_yticks([])
    ax.spines["left"].set_visible(False)
    ax.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True))
    return figure_of(ax)


@styled
def joint_draws(draws: Any, y: Any = None, *, labels: Sequence[str], color: str = COLORS[0]) -> Figure:
    """Draw samples of one row's joint density: of two outputs against each other, of more each by itself.

    The observed target is a cross among two outputs, and a dashed line with more. Histograms show at most six outputs.

    Args:
        draws: Samples, shape (S, D), D ≥ 2.
        y: Observed targets, shape (D,). Optional.
        labels: Names and units of the D outputs.
        color: Colour of the samples.

    Raises:
        ValueError: Shapes that do not fit each other, or D < 2.
    """
    from matplotlib.figure import Figure

    draws = array(draws)
    observed = None if y is None else array(y)
    if draws.ndim != 2 or len(draws) == 0 or draws.shape[1] < 2:
        raise ValueError(f"draws has shape {draws.shape}, but samples of two outputs or more were expected, (S, D).")
    outputs = draws.shape[1]
    if len(labels) != outputs or (observed is not None and observed.shape != (outputs,)):
        raise ValueError(f"draws has {outputs} outputs. Pass a label for each, and an observed value for each or none.")
    if outputs == 2:
        ax = axes_of_size(None, (3.5, 2.7))
        ax.plot(*draws.T, "o", color=color, markersize=2.6, alpha=0.45, markeredgewidth=0)
        if observed is not None:
            ax.plot(*observed[:, None], "x", color=neutral(ax), markersize=8, markeredgewidth=1.8)
        ax.set(xlabel=labels[0], ylabel=labels[1])
        return figure_of(ax)
    shown = min(outputs, 6)
    figure = Figure(figsize=(3.5, 0.95 * shown), layout="constrained")
    axes = figure.subplots(shown, 1, squeeze=False)[:, 0]
    for d, ax in enumerate(axes):
        ax.hist(draws[:, d], bins=24, color=color, alpha=0.75, linewidth=0)
        if observed is not None:
            ax.axvline(observed[d], color=neutral(ax), linewidth=1.0, linestyle=(0, (3, 2)))
        ax.set_xlabel(labels[d])
        ax.set_yticks([])
        ax.spines["left"].set_visible(False)
    return figure


@styled
def histogram(
    values: Any, *, label: str = "y", bins: int = 30, color: str = COLORS[1], ax: Axes | None = None
) -> Figure:
    """Draw the distribution of numbers, from their 0.5% to their 99.5% quantile.

    Args:
        values: Numbers, shape (B,); what is not finite is left out.
        label: Their name and unit.
        bins: Number of bars, at most; whole numbers with fewer values get one each.
        color: Colour of the bars.
        ax: Axes to draw into; by default a new figure.

    Raises:
        ValueError: No finite value.
    """
    values = flat(values, "values")
    values = values[np.isfinite(values)]
    if len(values) == 0:
        raise ValueError("values has no finite number. Pass at least one.")
    ax = axes_of_size(ax, (3.5, 1.9))
    low, high = np.quantile(values, [0.005, 0.995])
    whole = bool((values == np.floor(values)).all())
    if whole and high - low < bins:
        edges = np.arange(math.floor(low), math.ceil(high) + 2) - 0.5
    else:
        edges = np.linspace(low, high if high > low else low + 1.0, bins + 1)
    ax.hist(values, bins=edges.tolist(), color=color, alpha=0.8, linewidth=0, rwidth=0.9)
    ax.set(xlabel=label, ylabel="rows")
    return figure_of(ax)


def _common_rows(models: Mapping[str, Distribution]) -> int:
    """The number of rows that all models predict."""
    if not models:
        raise ValueError("models is empty. Pass at least one name with its predictive distribution.")
    for name, p in models.items():
        if tuple(p.event_shape) != (1,):
            who = repr(name) if name else "The model"
            raise ValueError(
                f"{who} predicts {tuple(p.event_shape)}-shaped targets, but a curve can only be drawn for one target "
                "dimension."
            )
    counts = {name: int(p.batch_shape[0]) for name, p in models.items()}
    if len(set(counts.values())) > 1:
        raise ValueError(f"The models predict different numbers of rows, {counts}. Call all of them with the same x.")
    return next(iter(counts.values()))


def _density_grid(
    models: Mapping[str, Distribution], observed: NDArray[np.float64] | None, num_points: int
) -> NDArray[np.float64]:
    """Points of each row's curves, shape (G, B): between the tails of all models, and the target in sight."""
    quantiles = _quantiles(models, num_points)
    low, high = quantiles.min(0), quantiles.max(0)
    if observed is not None:
        low, high = np.fmin(low, observed), np.fmax(high, observed)
    margin = 0.04 * (high - low) + 1e-12
    steps = np.linspace(low - margin, high + margin, max(2, num_points - len(quantiles)))
    return np.sort(np.concatenate([steps, quantiles]), axis=0)


def _circle_grid(
    models: Mapping[str, Distribution],
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
    start = array(first.mean)[:, 0] - period / 2
    quantiles = _quantiles(models, num_points)
    steps = np.linspace(start, start + period, max(2, num_points - len(quantiles)))
    grid = np.sort(np.concatenate([steps, start + (quantiles - start) % period]), axis=0)
    return grid, None if observed is None else start + (observed - start) % period


def _quantiles(models: Mapping[str, Distribution], num_points: int) -> NDArray[np.float64]:
    """Quantiles of every model: besides equal steps, they let a mode much narrower than the panel keep its shape."""
    levels = torch.linspace(0.02, 0.98, max(2, num_points // 6), dtype=torch.float64)
    return np.concatenate([array(p.quantile(levels)) for p in models.values()])


def _circle_ticks(ax: Axes, circle: tuple[float, float]) -> None:
    """Ticks at eighths of the turn at most, named as the range names them."""
    low, high = circle
    period = high - low
    left, right = ax.get_xlim()
    step = period / 4
    ticks = low + step * np.arange(math.ceil((left - low) / step), math.floor((right - low) / step) + 1)
    ax.set_xticks(ticks, [f"{low + (tick - low) % period:.4g}" for tick in ticks])


def _on_grid(p: Distribution, grid: NDArray[np.float64]) -> NDArray[np.float64]:
    """log p at points of shape (G, B), same shape."""
    return array(p.log_prob(torch.from_numpy(grid)[..., None]))
