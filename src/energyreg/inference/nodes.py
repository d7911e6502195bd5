"""The contract of nodes: points with weights that stand for exp f(x, y) dy, whoever made them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from torch import Tensor

__all__ = ["Nodes"]


class Nodes(Protocol):
    r"""Points y_m in model space with weights w_m that stand for the measure exp(f(x, y)) dy, for B rows of x.

    .. math:: \sum_m w_m h(y_m) \approx \int e^{f(x, y)} h(y) dy \quad \text{for any function } h

    Implemented by :class:`~energyreg.inference.points.WeightedPoints` (samples, or the nodes of a grid) and by
    :class:`~energyreg.inference.cells.Cells` (a quadrature of one dimension, with a cdf in closed form).
    """

    @property
    def y(self) -> Tensor:
        """The points, shape (M, B, D), or (M, 1, D) where all rows share them."""
        ...

    @property
    def log_weights(self) -> Tensor:
        """Log-weights, unnormalised, shape (M, B)."""
        ...

    @property
    def independent(self) -> bool:
        """Whether the points are independent draws; otherwise the error of log Z is judged from two halves of them."""
        ...

    @property
    def masses(self) -> Tensor:
        """Weights that sum to one, shape (M, B)."""
        ...

    @property
    def log_partition(self) -> Tensor:
        """Estimate of log Z, shape (B,)."""
        ...

    @property
    def log_partition_stderr(self) -> Tensor:
        """Its standard error, shape (B,)."""
        ...

    def log_density(self, f: Callable[[Tensor], Tensor]) -> Tensor:
        """f at the points, shape (M, B)."""
        ...

    def cdf(self, z: Tensor) -> Tensor:
        """Probability of values up to z in one dimension, (S, B) to (S, B); on a circle from -π on."""
        ...

    def quantiles(self, levels: Tensor, middle: Tensor | None = None, angle: Tensor | None = None) -> Tensor:
        """Quantiles of each marginal, (L, B) to (L, B, D); those of an `angle` count from opposite `middle` (B, D)."""
        ...

    def draw(self, uniforms: Tensor) -> Tensor:
        """Draws from uniform numbers, (S, B) to (S, B, D)."""
        ...
