r"""Several outputs by the chain rule: each factor a one-dimensional energy-based model, normalised by quadrature.

.. math:: p(y|x) = \prod_{k=1}^D p(y_{o_k} | x, y_{o_1}, \dots, y_{o_{k-1}})

for an order o of the outputs. No factor needs a proposal or a sampler: every log Z is an integral over a line, draws
come from the inverse of the cdf, one output after the other, and have equal weights. The price is an integral for each
draw and factor but the first. Chains are trained by :func:`energyreg.fit_chain`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor, nn

from energyreg.checks import check_count
from energyreg.densities.spaces import Circle, Interval, Positive, Product, Real, TargetSpace
from energyreg.inference.integrators import AdaptiveQuadrature
from energyreg.inference.nodes import Nodes
from energyreg.inference.points import WeightedPoints
from energyreg.inference.row_blocks import KEPT_FRACTION, RowBlock, Rows
from energyreg.models.chain_energy import ChainEncoder, ChainEnergy, ChainReference, members_of
from energyreg.models.ensemble import EnergyEnsemble
from energyreg.models.model import EnergyRegressionModel
from energyreg.models.predictive import PredictiveDistribution
from energyreg.models.table_defaults import as_array, table_encoder, table_width
from energyreg.modes import as_usual

__all__ = ["AncestralSampling", "ChainDistribution", "ChainEncoder", "EnergyChain"]


@dataclass(frozen=True)
class AncestralSampling:
    """How the points of a chain's predictive distribution are made: by the inverse cdf, one output after the other.

    The uniform numbers are scrambled Sobol points shared by all rows, so that a mean over the points has a smaller
    error than one over independent draws.

    Args:
        num_samples: Points M per row, of equal weight.
        num_nodes: Nodes of the quadrature behind each draw; `log_prob` has its own, finer one. Nodes that all draws
            share cost little, so that more of them are cheaper than to refine those of single draws.

    Raises:
        ValueError: If an argument is no whole number, or too small.
    """

    num_samples: int = 512
    num_nodes: int = 256

    def __post_init__(self) -> None:
        """Check the arguments."""
        check_count("num_samples", self.num_samples)
        check_count("num_nodes", self.num_nodes, 8)

    @property
    def quadrature(self) -> AdaptiveQuadrature:
        """The quadrature behind each draw; only where it is clearly too coarse nodes of its own are made."""
        return AdaptiveQuadrature(self.num_nodes, tolerance=0.05, max_refinements=1, max_mass=0.3)


def lines(space: TargetSpace) -> list[TargetSpace]:
    """The dimensions of a target space as spaces of their own, unfitted.

    Raises:
        ValueError: If the space is of a kind that this library does not know how to split.
    """
    if isinstance(space, Product):
        return [line for part in space.parts for line in lines(part)]
    if type(space) in (Real, Positive):
        return [type(space)(1) for _ in range(space.dim)]  # type: ignore[call-arg]
    if isinstance(space, Interval):
        return [Interval(low, high) for low, high in space.ends]
    if isinstance(space, Circle):
        return [Circle(space.period, space.low) for _ in range(space.dim)]
    if space.dim == 1:
        return [space]
    raise ValueError(f"space is {space!r}, whose dimensions cannot be taken apart; pass a Product of their spaces.")


class EnergyChain(nn.Module):
    r"""Several outputs as a chain of one-dimensional models: a joint density that is normalised exactly.

    Args:
        factors: D one-dimensional models or ensembles. The k-th predicts output ``order[k]`` from a table whose first
            columns are the previous targets in model space, in the order of the chain (an angle as its sine and
            cosine), before those of x.
        order: Which output each factor predicts, a permutation of 0 to D - 1; by default as they are.

    Attributes:
        factors: The factors, in the order of the chain.
        order: The order, a list.
        histories: How each factor was trained, a list of lists of :class:`energyreg.training.History`, where
            :func:`energyreg.fit_chain` did it; else empty.

    Raises:
        ValueError: If there is no factor, one is no model of one dimension, the order is no permutation, or they
            differ in dtype.

    >>> chain = EnergyChain.for_table(num_features=3, space=Real(2), width=16)
    >>> p = chain(torch.randn(5, 3))
    >>> p.log_prob(torch.zeros(5, 2)).shape, p.mean.shape, p.interval(0.9).shape, p.sample((10,)).shape
    (torch.Size([5]), torch.Size([5, 2]), torch.Size([5, 2, 2]), torch.Size([10, 5, 2]))
    """

    def __init__(
        self, factors: Iterable[EnergyRegressionModel | EnergyEnsemble], order: Sequence[int] | None = None
    ) -> None:
        super().__init__()
        factors = list(factors)
        if not factors:
            raise ValueError("factors is empty; expected a one-dimensional model for each output.")
        for number, factor in enumerate(factors):
            if not isinstance(factor, (EnergyRegressionModel, EnergyEnsemble)):
                raise ValueError(
                    f"factors[{number}] is a {type(factor).__name__}; expected an EnergyRegressionModel or an "
                    "EnergyEnsemble."
                )
            if factor.space.dim != 1:
                raise ValueError(f"factors[{number}] is for {factor.space.dim} target dimensions; expected one.")
            if factor.dtype != factors[0].dtype:
                raise ValueError(f"factors[{number}] has dtype {factor.dtype}, but factors[0] {factors[0].dtype}.")
        self.order = _permutation(order, len(factors))
        self.factors = nn.ModuleList(factors)
        self.histories: list[Any] = []  # of History, which belongs to a layer above this one

    @classmethod
    def for_table(
        cls,
        num_features: int,
        space: TargetSpace,
        *,
        order: Sequence[int] | None = None,
        width: int | None = None,
        depth: int = 2,
        dropout: float | None = None,
        num_components: int = 8,
        num_rows: int | None = None,
        cardinalities: Sequence[int] = (),
    ) -> EnergyChain:
        """A chain whose factors have the defaults for tables of one output.

        Args:
            num_features: Columns of x.
            space: Target space, whose dimensions become the factors' spaces.
            order: Which output each factor predicts, a permutation of 0 to D - 1; by default as they are.
            width: Width of the encoders. It and all that follow are those of
                :meth:`energyreg.models.model.EnergyRegressionModel.for_table`.
            depth: Hidden layers; the last of them joins x and the previous targets.
            dropout: Dropout probability after each of them.
            num_components: Gaussians of the mixtures, where there are some.
            num_rows: Training rows, by which defaults are chosen.
            cardinalities: Codes of each categorical column.

        Raises:
            ValueError: If an argument cannot be used.
        """
        spaces = lines(space)
        order = _permutation(order, len(spaces))
        factors, previous = [], 0
        for output in order:
            columns = num_features + previous
            size = table_width(columns, num_rows) if width is None else width
            model = EnergyRegressionModel.for_table(
                columns, spaces[output], width=size, depth=depth, dropout=dropout, num_components=num_components,
                num_rows=num_rows, cardinalities=cardinalities,
            )  # fmt: skip
            if previous:
                drop = 0.2 if dropout is None else dropout
                of_previous = table_encoder(previous, size, max(depth - 1, 1), drop, (), num_rows)
                of_inputs = table_encoder(num_features, size, max(depth - 1, 1), drop, cardinalities, num_rows)
                model.encoder = ChainEncoder(of_previous, of_inputs, size, drop)
            factors.append(model)
            previous += 2 if spaces[output].periodic[0] else 1
        return cls(factors, order)

    @property
    def _first(self) -> EnergyRegressionModel | EnergyEnsemble:
        return self.in_order()[0]

    def in_order(self) -> list[EnergyRegressionModel | EnergyEnsemble]:
        """The factors, in the order of the chain."""
        return list(self.factors)  # type: ignore[arg-type]

    @property
    def space(self) -> Product:
        """The target space: the factors' in the order of the outputs."""
        spaces = {output: factor.space for output, factor in zip(self.order, self.in_order(), strict=True)}
        return Product(*(spaces[output] for output in range(len(spaces))))

    @property
    def reference(self) -> ChainReference:
        """The product of the factors' reference measures, in the order of the outputs."""
        bases = {output: members_of(factor)[0].base for output, factor in zip(self.order, self.in_order(), strict=True)}
        ordered = [bases[output] for output in range(len(bases))]
        return ChainReference([getattr(base, "reference", base) for base in ordered])

    @property
    def dtype(self) -> torch.dtype:
        """Floating-point type of the parameters."""
        return self._first.dtype

    @property
    def device(self) -> torch.device:
        """Device of the parameters."""
        return self._first.device

    @property
    def fitted(self) -> bool:
        """Whether all factors have seen training data."""
        return all(factor.fitted for factor in self.in_order())

    def check_inputs(self, x: Any) -> Tensor:
        """Inputs as a tensor of the factors' dtype; see `EnergyRegressionModel.check_inputs`."""
        return self._first.check_inputs(x)

    def check_targets(self, y: Any) -> Tensor:
        """Targets of shape (N, D), in the precision they came in.

        Raises:
            ValueError: If y is empty, has the wrong shape, holds NaN or infinite values, lies outside the space, or is
                no array of numbers.
        """
        y = as_array(y, "y")
        y = y if y.is_floating_point() else y.to(torch.double)
        if y.ndim != 2 or y.shape[1] != len(self.order) or len(y) == 0:
            raise ValueError(
                f"y has shape {tuple(y.shape)}, but the chain has {len(self.order)} outputs; expected (n, "
                f"{len(self.order)}) with at least one row."
            )
        self.space.check(y, "y")
        return y

    def previous_features(self, z: Tensor) -> Tensor:
        """Columns that a later factor sees of the targets before it.

        Args:
            z: Their values in model space, in the order of the chain, shape (B, k).

        Returns:
            The same, but for each angle its sine and cosine, shape (B, P).
        """
        columns = []
        for value, factor in zip(z.unbind(-1), self.in_order()[: z.shape[-1]], strict=True):
            columns += [value.sin(), value.cos()] if factor.space.periodic[0] else [value]
        return torch.stack(columns, -1) if columns else z

    def table(self, position: int, x: Tensor, y: Tensor) -> Tensor:
        """The table that factor number `position` is trained on.

        Args:
            position: Place in the chain, from 0 on.
            x: Inputs, shape (B, F).
            y: Targets in user units, shape (B, D); the space must have been fitted.

        Returns:
            Previous targets and x, shape (B, P + F).
        """
        z = self.space.to_model(y)[:, self.order[:position]].to(x)
        return torch.cat([self.previous_features(z), x], 1)

    @as_usual
    def forward(
        self,
        x: Any,
        *,
        integrator: AncestralSampling | None = None,
        seed: int = 0,
        memory_budget: int = 256 * 2**20,
    ) -> ChainDistribution:
        """Return the predictive distribution p(y|x), in user units.

        Args:
            x: Inputs, B rows: a tensor, an array or a data frame.
            integrator: How its points are made; 512 of them by default.
            seed: Of the points.
            memory_budget: Working memory in bytes.

        Raises:
            ValueError: If x is empty, of the wrong shape, not finite, or no array of numbers; or the integrator is
                another.
        """
        x = self.check_inputs(x)
        integrator = AncestralSampling() if integrator is None else integrator
        if not isinstance(integrator, AncestralSampling):
            raise ValueError(f"integrator is {integrator!r}; expected AncestralSampling, the one for a chain.")
        return ChainDistribution(
            self, x, integrator, differentiable=self.training, dtype=self.dtype, device=self.device, seed=seed,
            memory_budget=memory_budget,
        )  # fmt: skip


def _permutation(order: Sequence[int] | None, dim: int) -> list[int]:
    numbers = list(range(dim)) if order is None else [int(output) for output in order]
    if sorted(numbers) != list(range(dim)):
        raise ValueError(f"order is {order!r}; expected each of the outputs 0 to {dim - 1} once.")
    return numbers


@dataclass(frozen=True)
class _ChainBlock(RowBlock):
    """A block that keeps the log-density at its draws, each of which costs an integral, where the memory allows it."""

    heights: dict[tuple[int, int], Tensor] | None
    bytes_per_row: float

    def point_density(self) -> Tensor:
        key = (self.rows.start, self.rows.stop)
        if self.heights is not None and key in self.heights:
            return self.heights[key]
        height = super().point_density()
        if self.heights is not None and height.nbytes <= self.bytes_per_row * height.shape[1]:
            self.heights[key] = height
        return height


class ChainDistribution(PredictiveDistribution):
    """p(y|x) of a chain for B rows of x, in user units.

    The density is exact up to quadrature. What is computed from points (means, intervals, regions, modes) comes from
    draws of equal weight. Made by calling a chain; see :class:`~energyreg.models.predictive.PredictiveDistribution` for
    what it can do.

    Args:
        chain: The chain.
        x: Inputs, shape (B, F).
        integrator: How the points are made.
        **settings: The rest of what a PredictiveDistribution takes.

    Attributes:
        chain: The chain.
    """

    integrator: Any

    def __init__(self, chain: EnergyChain, x: Tensor, integrator: AncestralSampling, **settings: Any) -> None:
        self.chain, self.x = chain, x
        self._heights: dict[tuple[int, int], Tensor] = {}
        super().__init__(self._of_rows, len(x), chain.space, integrator, **settings)  # type: ignore[arg-type]

    def select(self, rows: Any) -> PredictiveDistribution:
        """The distribution of some rows, which makes its own draws."""
        return type(self)(self.chain, self.x[self.row_numbers(rows)], self.integrator, **self.settings)

    def _of_rows(self, rows: Rows) -> ChainEnergy:
        return ChainEnergy(self.chain, self.x[rows].to(self.device), self.memory_budget)

    def num_points(self) -> int:
        return int(self.integrator.num_samples)

    def block_rows(self) -> int:
        f = self._of_rows(slice(0, 1))
        floats = self.num_points() * (f.floats_per_point(True) + 16 + 4 * self.dim)
        return max(self.memory_budget // (4 * floats), 1)

    def integrate(self, f: Any, rows: slice) -> Nodes:
        count = self.num_points()
        sobol = torch.quasirandom.SobolEngine(self.dim, scramble=True, seed=self.seed)
        uniforms = sobol.draw(count, dtype=torch.double).to(self.device)[:, None].expand(-1, f.batch_size, -1)
        z = f.draw(uniforms, self.integrator.quadrature)
        log_weights = torch.full(z.shape[:-1], -math.log(count), dtype=z.dtype, device=z.device)
        return WeightedPoints(z, log_weights, independent=False)

    def block(self, rows: slice) -> RowBlock:
        plain = super().block(rows)
        return _ChainBlock(
            **{field.name: getattr(plain, field.name) for field in fields(plain)},
            heights=None if self.differentiable else self._heights,
            bytes_per_row=KEPT_FRACTION * self.memory_budget / self.num_rows,
        )

    def marginal(self) -> PredictiveDistribution:
        """The marginal of the chain's first output by itself, ``chain.order[0]``: exact, in one dimension."""
        with torch.no_grad():
            f = self._of_rows(slice(0, self.num_rows))
            return f.factor(0, None, f.x[:, :0])

    def sample(self, sample_shape: Any = (), *, generator: torch.Generator | None = None) -> Tensor:
        """Draw independent samples in user units, exactly, by the inverse of the cdf, one output after the other.

        Args:
            sample_shape: Leading shape S.
            generator: Source of randomness, on the CPU; torch's global one by default.

        Returns:
            Samples, shape (*S, B, D).
        """
        shape = torch.Size(sample_shape)
        uniforms = torch.rand((shape.numel(), self.num_rows, self.dim), generator=generator, dtype=torch.double)
        parts = []
        step = max(self.block_rows(), 1)
        with torch.no_grad():
            for start in range(0, self.num_rows, step):
                rows = slice(start, min(start + step, self.num_rows))
                draws = self._of_rows(rows).draw(uniforms[:, rows].to(self.device), self.integrator.quadrature)
                parts.append(self.space.to_user(draws))
        return torch.cat(parts, 1).to(self.dtype).reshape(*shape, self.num_rows, self.dim)
