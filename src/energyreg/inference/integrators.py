"""Integrators: from an energy function to weighted points, the same objects in training and in prediction."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.distributions import Distribution

from energyreg.checks import check_count
from energyreg.densities.mixtures import GaussianMixture
from energyreg.inference.cells import Cells
from energyreg.inference.energy import ReferencedEnergy, require_reference
from energyreg.inference.importance import AdaptiveImportanceSampling, ImportanceSampling
from energyreg.inference.points import WeightedPoints
from energyreg.randomness import random_like

__all__ = ["AdaptiveImportanceSampling", "AdaptiveQuadrature", "ImportanceSampling", "StratifiedQuadrature"]


def graded(t: Tensor) -> Tensor:
    """A map of (0, 1) onto itself that is flat at both ends, so that even points become finer towards the tails."""
    return t.square() * (3 - 2 * t)


def _aligned(edges: Tensor, centres: Tensor, reference: Any) -> tuple[Tensor, Tensor]:
    """Cells with an edge wherever the reference's density jumps: within a cell the energy is taken as smooth.

    Args:
        edges: Ascending, shape (G + 1,) or (G + 1, B).
        centres: Shape (G,) or (G, B).
        reference: A measure that may have `breaks`.
    """
    breaks = getattr(reference, "breaks", None)
    if breaks is None:
        return edges, centres
    moved, taken = edges.clone(), torch.zeros_like(edges, dtype=torch.bool)
    taken[0] = taken[-1] = True
    for place in breaks.to(edges):  # two of them may be nearest to the same edge
        nearest = (moved - place).abs().masked_fill(taken, math.inf).argmin(0, keepdim=True)
        moved, taken = moved.scatter(0, nearest, place.expand(nearest.shape)), taken.scatter(0, nearest, True)
    moved = moved.sort(0).values
    changed = moved != edges
    touched = changed[1:] | changed[:-1]
    return moved, torch.where(touched, (moved[1:] + moved[:-1]) / 2, centres)


@dataclass(frozen=True)
class StratifiedQuadrature:
    r"""Quadrature in the unit coordinates of the reference measure, with one node in each cell of a regular grid.

    .. math:: Z = \int_{(0,1)^D} \exp(f - \log p_0) du \approx \frac1G \sum_m \exp(f - \log p_0)(u_m)

    The nodes are shared by all rows, so that a separable head costs one matrix product. With jitter each node is
    uniform in its cell, and the estimate of Z is unbiased; for a smooth energy its error falls as G^(-3/2) in one
    dimension. Without, the nodes are the cells' centres.

    Args:
        num_nodes: Nodes G in all; for D > 1 rounded down to a whole number per dimension.
        jitter: Whether nodes are random within their cells.
        graded: Whether the cells are finer towards both tails (not on a circle), for energies that are steep there,
            such as those with the proposal as base; equal otherwise.

    Raises:
        ValueError: If num_nodes is not a whole number ≥ 1.
    """

    num_nodes: int = 256
    jitter: bool = True
    graded: bool = False

    def __post_init__(self) -> None:
        """Check the arguments."""
        check_count("num_nodes", self.num_nodes)

    def per_dimension(self, dim: int) -> int:
        """Nodes per dimension for D = dim."""
        return max(int(self.num_nodes ** (1 / dim) + 1e-9), 1)

    def num_points(self, dim: int) -> int:
        """Points per row for D = dim."""
        return self.per_dimension(dim) ** dim

    def nodes(self, f: ReferencedEnergy, *, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
        """Unit coordinates of the nodes, shape (G, 1, D), and their log-weights, shape (G, 1)."""
        f = require_reference(f, "Quadrature")
        dim = len(f.periodic)
        n = self.per_dimension(dim)
        cells = torch.arange(n, dtype=f.dtype, device=f.device)
        grid = torch.stack(torch.meshgrid(*[cells] * dim, indexing="ij"), -1).reshape(-1, 1, dim)
        offset = random_like(torch.rand, grid.shape, grid, generator) if self.jitter else 0.5
        return self.unit((grid + offset) / n, f)

    def unit(self, t: Tensor, f: ReferencedEnergy) -> tuple[Tensor, Tensor]:
        """Unit coordinates and log-weights of points that are uniform in (0, 1)^D before the grading."""
        log_weights = torch.full_like(t[..., 0], -math.log(len(t)))
        if not self.graded:
            return t, log_weights
        straight = torch.tensor(f.periodic, device=t.device)
        u = torch.where(straight, t, graded(t))
        slope = torch.where(straight, torch.ones_like(t), 6 * t * (1 - t))
        return u, log_weights + slope.log().sum(-1)

    def within_cells(self, f: Any, index: Tensor, offset: Tensor, dtype: torch.dtype) -> Tensor:
        """Model values of nodes spread over their grid cells.

        Args:
            f: Energy.
            index: Numbers of nodes, shape (S, B).
            offset: Places within their cells, in (0, 1), shape (S, B, D).
            dtype: Of the unit coordinates.
        """
        dim = offset.shape[-1]
        n = self.per_dimension(dim)
        powers = n ** torch.arange(dim - 1, -1, -1, device=index.device)  # the last dimension runs fastest
        t = (index[..., None] // powers % n + offset) / n
        return f.reference.from_unit(self.unit(t.to(dtype), f)[0])

    def log_weights(self, f: ReferencedEnergy, *, generator: torch.Generator | None = None) -> Tensor:
        """Log-weights of the nodes, shape (G, B); their logsumexp is log Z."""
        u, log_weights = self.nodes(f, generator=generator)
        return f.relative(u) + log_weights

    def __call__(
        self, f: ReferencedEnergy, q: Distribution | None = None, *, generator: torch.Generator | None = None
    ) -> WeightedPoints:
        """Return the weighted points, in model space. The proposal q is not used."""
        u, log_weights = self.nodes(f, generator=generator)
        return WeightedPoints(f.reference.from_unit(u), f.relative(u) + log_weights, independent=False)


@dataclass(frozen=True)
class AdaptiveQuadrature:
    """Quadrature in one dimension for prediction: shared cells first, then own cells for the rows that need them.

    The first cells are the same for all rows, finer towards both tails (or equal on a circle). A row gets new cells, at
    quantiles of the density found so far, where one cell holds too much of its mass (or of its proposal's, if that is
    the base), and as long as two interleaved halves of its cells disagree on log Z.

    Args:
        num_nodes: Cells per row.
        tolerance: Disagreement on log Z between the halves, in nats, above which a row is refined.
        max_refinements: How often at most.
        max_mass: Probability in one cell above which a row is refined: within a cell the density is taken as linear.

    Raises:
        ValueError: If an argument is out of its range.
    """

    num_nodes: int = 512
    tolerance: float = 1e-3
    max_refinements: int = 4
    max_mass: float = 0.1

    def __post_init__(self) -> None:
        """Check the arguments."""
        check_count("num_nodes", self.num_nodes, 8)
        check_count("max_refinements", self.max_refinements, 0)
        if not self.tolerance > 0:
            raise ValueError(f"tolerance is {self.tolerance}; expected a number > 0, in nats.")
        if not self.max_mass > 0:
            raise ValueError(f"max_mass is {self.max_mass}; expected a number > 0.")

    def num_points(self, dim: int) -> int:
        """Points per row; there is one dimension."""
        return self.num_nodes

    def shared_cells(self, f: ReferencedEnergy) -> Cells:
        """The cells that all rows share."""
        f = require_reference(f, "AdaptiveQuadrature")
        t = torch.linspace(0, 1, 2 * self.num_nodes + 1, dtype=torch.double, device=f.device)
        u = t if f.periodic[0] else graded(t)
        edges, centres = _aligned(u[::2], u[1::2], f.reference)
        log_widths = edges.diff().log()
        values = f.relative(centres.to(f.dtype)[:, None, None])
        return Cells(edges, centres.to(f.dtype), values + log_widths[:, None].to(f.dtype), f.reference)

    def own_cells(self, f: ReferencedEnergy, cells: Cells) -> Cells:
        """Cells of their own for the rows of f, at quantiles of the density that the given cells show."""
        dtype = cells.log_masses.dtype
        masses = cells.log_masses.detach().double().softmax(0)
        # A peak may stand between two nodes: each cell lends its neighbours its mass.
        pooled = torch.nn.functional.max_pool1d(masses.T[:, None], 3, 1, 1)[:, 0].T
        # The square root of the density reaches further down a peak's flanks, where the rule errs most.
        flanks = (pooled * cells.widths).sqrt()
        guess = 0.45 * pooled / pooled.sum(0) + 0.35 * flanks / flanks.sum(0) + 0.1 / len(masses)
        guess = guess + 0.1 * (self._proposal_masses(f, cells) if self._has_cdf(f) else pooled / pooled.sum(0))
        # Where nodes stand carries no gradient, also not the proposal's.
        source = Cells(cells.edges, cells.centres, guess.log().detach())
        levels = torch.linspace(0, 1, 2 * self.num_nodes + 1, dtype=torch.double, device=masses.device)
        u = source.unit_quantiles(levels[:, None].expand(-1, masses.shape[1]))
        edges, centres = u[::2].clone(), u[1::2]
        edges[0], edges[-1] = 0.0, 1.0
        edges, centres = _aligned(edges, centres, f.reference)
        log_widths = edges.diff(dim=0).clamp_min(1e-300).log()
        values = f.relative_at_own(centres.to(dtype)[..., None])
        return Cells(edges, centres.to(dtype), values + log_widths.to(dtype), f.reference)

    @staticmethod
    def _has_cdf(f: ReferencedEnergy) -> bool:
        return f.conditional and isinstance(f.q, GaussianMixture)

    @staticmethod
    def _proposal_masses(f: ReferencedEnergy, cells: Cells, rows: Tensor | None = None) -> Tensor:
        """Masses of the proposal in the cells, of all rows or of some, which share their cells then."""
        assert isinstance(f.q, GaussianMixture)
        q = f.q if rows is None else f.q[rows]
        edges = cells.edges if cells.edges.ndim == 2 else cells.edges[:, None]
        z = f.reference.from_unit(edges[..., None].to(q.means.dtype))
        cdf = q.cdf(z).double().clone()
        cdf[0], cdf[-1] = 0.0, 1.0
        masses = cdf.diff(dim=0).clamp_min(0)
        return masses / masses.sum(0).clamp_min(1e-300)

    def needs_refinement(self, f: ReferencedEnergy, cells: Cells) -> Tensor:
        """Which rows need cells of their own, shape (B,)."""
        with torch.no_grad():
            needed = ~(cells.log_partition_stderr <= self.tolerance) | (cells.masses.amax(0) > self.max_mass)
            if self._has_cdf(f):
                suspect = (~needed & self._coarse_for_proposal(f, cells)).nonzero()[:, 0]
                if len(suspect):
                    heavy = self._proposal_masses(f, cells, suspect).amax(0) > self.max_mass
                    needed = needed.index_put((suspect,), heavy)
        return needed

    def _coarse_for_proposal(self, f: ReferencedEnergy, cells: Cells) -> Tensor:
        """Rows whose proposal may put more than max_mass into one of the shared cells, shape (B,).

        At most the height of a Gaussian times the width of the cell is in it. That takes a look at the cells around
        each component's mean, where the cdf at every edge of every row would cost more than all the rest.
        """
        assert isinstance(f.q, GaussianMixture) and cells.edges.ndim == 1
        edges = f.reference.from_unit(cells.edges[:, None].to(f.q.means.dtype))[:, 0].contiguous()
        mean, scale = f.q.means[..., 0], f.q.scales[..., 0]
        near = torch.stack([mean - 2 * scale, mean - scale, mean, mean + scale, mean + 2 * scale])
        cell = (torch.searchsorted(edges, near) - 1).clamp(0, len(edges) - 2)
        width = edges.diff()[cell].amax(0)
        mass = (width / (scale * math.sqrt(2 * math.pi))).clamp_max(1)
        # Twice as much is allowed for, as the cells between those that are looked at may be wider.
        return 2 * (f.q.log_mixing.exp() * mass).sum(-1) > self.max_mass
