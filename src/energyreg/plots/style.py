"""What all figures share: sizes, colours, legends, and numbers out of whatever was given."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import wraps
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar, cast

import numpy as np
import torch
from numpy.typing import NDArray

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["COLORS"]

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


def styled(function: Callable[_P, _R]) -> Callable[_P, _R]:
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


def axes_of_size(ax: Axes | None, size: tuple[float, float]) -> Axes:
    """The given axes, or those of a new figure of this size."""
    if ax is not None:
        return ax
    from matplotlib.figure import Figure

    return Figure(figsize=size, layout="constrained").subplots()


def figure_of(ax: Axes) -> Figure:
    """The figure that holds the axes."""
    return ax.figure.figure  # from a subfigure to the figure that holds it


def neutral(ax: Axes) -> Any:
    """The user's colour of what belongs to no model."""
    return ax.xaxis.label.get_color()


def colors_of(models: Mapping[str, Any]) -> list[str]:
    """One of `COLORS` for each model."""
    return [COLORS[i % len(COLORS)] for i in range(len(models))]


def name_curves(ax: Axes, loc: str) -> None:
    """Legend whose words have the colours of their curves, so that nothing has to be matched by eye."""
    words: dict[str, Any] = {"weight": "bold", "size": 8.5}
    legend = ax.legend(loc=cast(Any, loc), labelcolor="linecolor", handlelength=0, handletextpad=0, prop=words)
    for handle in legend.legend_handles:
        if handle is not None:
            handle.set_visible(False)


def signed(value: float) -> str:
    """A number with its sign and two digits."""
    return f"{value:+.2f}".replace("-", "−").replace("+inf", "∞").replace("inf", "∞")


def array(values: Any) -> NDArray[np.float64]:
    """Numbers as a numpy array, from a tensor on any device or what numpy takes."""
    if isinstance(values, torch.Tensor):
        values = values.detach().cpu().numpy()
    return np.asarray(values, dtype=np.float64)


def flat(values: Any, name: str) -> NDArray[np.float64]:
    """A flat array of numbers, from shape (B,) or (B, 1)."""
    numbers = array(values)
    if numbers.ndim == 2 and numbers.shape[1] == 1:
        numbers = numbers[:, 0]
    if numbers.ndim != 1:
        raise ValueError(f"{name} has shape {numbers.shape}, but one number per row was expected, shape (B,).")
    return numbers
