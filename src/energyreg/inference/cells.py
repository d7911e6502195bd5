"""Cells of a line with the masses of a density: nodes whose cdf and its inverse have closed forms."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

__all__ = ["Cells", "half_disagreement"]


def half_disagreement(masses: Tensor) -> Tensor:
    """Half-sample error estimate of log Z, from the masses of all nodes, (G, B) to (B,)."""
    half = len(masses) // 2
    even, odd = masses[: 2 * half].unflatten(0, (half, 2)).sum(0).log()
    return (even - odd).abs() / 2


@dataclass(frozen=True)
class Cells:
    """Weighted points in one dimension with the cells that they stand for, in unit coordinates.

    The density is linear within each cell, with the cell's mass and a slope from its neighbours, so that the cdf is
    quadratic there and its inverse has a closed form.

    It implements :class:`~energyreg.inference.nodes.Nodes` where it knows the measure whose unit coordinates it is in.

    Args:
        edges: Ascending edges of the cells from 0 to 1, shape (G + 1,), shared by all rows, or (G + 1, B).
        centres: The point within each cell where the energy was evaluated, shape (G,) or (G, B).
        log_masses: Unnormalised log-masses of the cells, shape (G, B).
        reference: The measure that maps the unit coordinates to model space and back.
    """

    edges: Tensor
    centres: Tensor
    log_masses: Tensor
    reference: Any = None

    independent = False

    @cached_property
    def log_partition(self) -> Tensor:
        """Log Z, shape (B,)."""
        return self.log_masses.logsumexp(0)

    @property
    def log_partition_stderr(self) -> Tensor:
        """Half-sample error estimate of log Z, from the even and the odd cells, shape (B,)."""
        return half_disagreement(self.masses)

    @staticmethod
    def _columns(table: Tensor) -> Tensor:
        """A table with a column per row, or one column where all rows share it, in double precision."""
        return (table if table.ndim == 2 else table[:, None]).double()

    @property
    def widths(self) -> Tensor:
        """Widths of the cells, above zero, shape (G, 1) or (G, B), in double precision."""
        return self._columns(self.edges).diff(dim=0).clamp_min(1e-300)

    @property
    def log_widths(self) -> Tensor:
        """Their logarithms."""
        return self.widths.log()

    @property
    def row_centres(self) -> Tensor:
        """The centres of each row, shape (G, B), in double precision."""
        return self._columns(self.centres).expand(-1, self.log_masses.shape[1])

    @cached_property
    def masses(self) -> Tensor:
        """Masses that sum to one, shape (G, B)."""
        return self.log_masses.softmax(0)

    @cached_property
    def _cumulative(self) -> Tensor:
        """Cumulative probabilities at the edges, shape (B, G + 1), in double precision."""
        cumulative = torch.cumsum(self.masses.T.contiguous(), 1, dtype=torch.double)
        return functional.pad(cumulative / cumulative[:, -1:], (1, 0))

    @staticmethod
    def _at(table: Tensor, index: Tensor) -> Tensor:
        """Entries of a table (G,) or (G, B) at indices (B, S), in double precision."""
        return (table[index] if table.ndim == 1 else table.gather(0, index.T).T).double()

    @staticmethod
    def _find(table: Tensor, value: Tensor) -> Tensor:
        """Index of the cell of each value, row by row: a table (G + 1,) or (B, G + 1), values (B, S)."""
        return torch.searchsorted(table, value, right=True).sub_(1).clamp_(0, table.shape[-1] - 2)

    def _slope(self, index: Tensor) -> Tensor:
        """Half the relative change of the density across the cells, from their neighbours, at indices (B, S).

        At most what keeps the density positive; zero in the first and the last cell.
        """
        count = len(self.masses)
        if count < 3:
            return torch.zeros(index.shape, dtype=torch.double, device=index.device)
        masses = self.masses.detach()  # no gradient: quotients of tiny numbers have none
        inner = index.clamp(1, count - 2)
        width, density, centre = [], [], []
        for cell in (inner - 1, inner, inner + 1):
            width.append((self._at(self.edges, cell + 1) - self._at(self.edges, cell)).clamp_min(1e-300))
            density.append(self._at(masses, cell) / width[-1])
            centre.append(self._at(self.centres, cell))
        rise = (density[2] - density[0]) / (centre[2] - centre[0]).clamp_min(1e-300)
        slope = (rise * width[1] / (2 * density[1]).clamp_min(1e-300)).clamp(-1, 1)
        return torch.where(inner == index, slope, 0.0)

    def unit_cdf(self, u: Tensor) -> Tensor:
        """Cumulative probabilities at unit coordinates, (S, B) to (S, B), in double precision."""
        value, cumulative = u.double().T.contiguous(), self._cumulative
        edges = self.edges.double()
        edges = (edges if edges.ndim == 1 else edges.T).contiguous()
        index = self._find(edges, value)
        start, stop = self._at(self.edges, index), self._at(self.edges, index + 1)
        t = ((value - start) / (stop - start).clamp_min(1e-300)).clamp(0, 1)
        fraction = t + self._slope(index) * t * (t - 1)
        return torch.lerp(cumulative.gather(1, index), cumulative.gather(1, index + 1), fraction).T

    def unit_quantiles(self, level: Tensor) -> Tensor:
        """Unit coordinates at probabilities, (S, B) to (S, B), in double precision."""
        value, cumulative = level.double().T.contiguous(), self._cumulative
        index = self._find(cumulative, value)
        start, stop = cumulative.gather(1, index), cumulative.gather(1, index + 1)
        fraction = ((value - start) / (stop - start).clamp_min(1e-300)).clamp(0, 1)
        slope = self._slope(index)
        # The root of slope t² + (1 - slope) t = fraction in (0, 1), in the form that does not cancel.
        linear = 1 - slope
        t = 2 * fraction / (linear + (linear.square() + 4 * slope * fraction).clamp_min(0).sqrt()).clamp_min(1e-300)
        return torch.lerp(self._at(self.edges, index), self._at(self.edges, index + 1), t.clamp(0, 1)).T

    # The same in model space -----------------------------------------------------------------------------------------

    @property
    def log_weights(self) -> Tensor:
        """The cells' log-masses, shape (G, B)."""
        return self.log_masses

    @cached_property
    def y(self) -> Tensor:
        """The centres in model space, shape (G, B, 1), or (G, 1, 1) where all rows share them."""
        return self.reference.from_unit(self.centres.reshape(len(self.centres), -1, 1))

    def log_density(self, f: Callable[[Tensor], Tensor]) -> Tensor:
        """f at the centres, from the masses, shape (G, B); the energy itself is not asked again."""
        relative = self.log_masses - self.log_widths.to(self.log_masses.dtype)
        return relative + self.reference.log_prob(self.y.to(self.log_masses.dtype))

    def cdf(self, z: Tensor) -> Tensor:
        """Probability of model values up to z, (S, B) to (S, B), in double precision; on a circle from -π on."""
        return self.unit_cdf(self.reference.to_unit(z[..., None])[..., 0])

    def from_unit(self, u: Tensor) -> Tensor:
        """Model values at unit coordinates, on a circle also beyond (0, 1); any shape."""
        if self.reference.periodic[0]:
            u = u.remainder(1)
        return self.reference.from_unit(u[..., None].to(self.log_masses.dtype))[..., 0]

    def quantiles(self, levels: Tensor, middle: Tensor | None = None, angle: Tensor | None = None) -> Tensor:
        """Model values at probabilities, (L, B) to (L, B, 1); see :class:`~energyreg.inference.nodes.Nodes`."""
        levels = levels.double()
        if middle is not None and self.reference.periodic[0]:
            opposite = (middle[:, 0] + 2 * math.pi).remainder(2 * math.pi) - math.pi
            levels = (levels + self.cdf(opposite[None].to(self.log_masses.dtype))).remainder(1)
        return self.reference.from_unit(self.unit_quantiles(levels)[..., None].to(self.log_masses.dtype))

    def draw(self, uniforms: Tensor) -> Tensor:
        """Draws in model space, by the inverse of the cdf, (S, B) to (S, B, 1)."""
        return self.quantiles(uniforms)
