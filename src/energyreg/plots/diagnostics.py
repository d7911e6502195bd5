"""Figures of a training, and of how well log Z is known."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from energyreg.plots.style import COLORS, array, axes_of_size, colors_of, figure_of, flat, name_curves, neutral, styled

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["learning_curves", "log_partition"]


@styled
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

    Raises:
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
    ax = axes_of_size(ax, (3.5, 2.9))
    for (name, curve), color in zip(curves.items(), colors_of(histories), strict=True):
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
        name_curves(ax, loc="best")
    return figure_of(ax)


@styled
def log_partition(
    diagnostics: Any, *, reference: Any = None, max_rows: int = 60, color: str = COLORS[2], figure: Figure | None = None
) -> Figure:
    r"""Draw log Z of some rows with error bars of two standard errors, and its diagnostics below.

    The strips below show the Pareto :math:`\hat k` of the weights, where values above 0.7 (crosses) are not to be
    trusted, and the effective sample size.

    Args:
        diagnostics: `model(x).diagnostics`, or `WeightedPoints` of an integrator, for B rows.
        reference: Another estimate of the same log Z, shape (B,): the difference is drawn then, which should be 0
            within the bars for 19 of 20 rows.
        max_rows: Rows to draw, evenly spaced in the order of log Z.
        color: Colour of the marks.
        figure: Figure to draw into; by default a new one.

    Raises:
        ValueError: No row, or a reference of another number of rows.
    """
    from matplotlib.figure import Figure

    log_z = flat(diagnostics.log_partition, "diagnostics.log_partition")
    if len(log_z) == 0:
        raise ValueError("diagnostics has no rows. Pass those of at least one input.")
    order = np.argsort(log_z)
    label = "log Z (nats)"
    if reference is not None:
        reference = flat(reference, "reference")
        if len(reference) != len(log_z):
            raise ValueError(
                f"reference has {len(reference)} rows, but diagnostics has {len(log_z)}. Pass the same rows."
            )
        log_z, label = log_z - reference, "Δ log Z (nats)"
    pick = order[np.unique(np.linspace(0, len(order) - 1, min(max_rows, len(order))).round().astype(int))]
    place = np.arange(len(pick))
    figure = Figure(figsize=(7.2, 3.6), layout="constrained") if figure is None else figure
    top, middle, bottom = figure.subplots(3, 1, sharex=True, height_ratios=(2.4, 1, 1))
    bars = 2 * np.nan_to_num(array(diagnostics.log_partition_stderr)[pick])
    if reference is not None:
        top.axhline(0.0, color=neutral(top), linewidth=0.8, linestyle=(0, (3, 2)))
    top.errorbar(place, log_z[pick], yerr=bars, fmt="o", color=color, markersize=3, elinewidth=1.1)
    top.set_ylabel(label)
    k_hat = array(diagnostics.pareto_k)[pick].clip(-1.0, 1.5)
    bad = k_hat > 0.7
    middle.axhline(0.7, color=neutral(middle), linewidth=0.8, linestyle=(0, (3, 2)))
    middle.plot(place[~bad], k_hat[~bad], "o", color=color, markersize=3)
    middle.plot(place[bad], k_hat[bad], "x", color=neutral(middle), markersize=4.5)
    middle.set(ylabel="Pareto k̂", ylim=(-1.15, 1.65))
    bottom.plot(place, array(diagnostics.effective_sample_size)[pick], "o", color=color, markersize=3)
    bottom.set(ylabel="ESS", ylim=(0, None), xlabel=f"{len(pick)} of {len(log_z):,} rows, in the order of log Z")
    bottom.set_xticks([])
    figure.align_ylabels()
    return figure
