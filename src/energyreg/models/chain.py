r"""Several outputs by the chain rule: each factor a one-dimensional energy-based model, normalised by quadrature.

.. math:: p(y|x) = \prod_{k=1}^D p(y_{o_k} | x, y_{o_1}, \dots, y_{o_{k-1}})

for an order o of the outputs. No factor needs a proposal or a sampler: every log Z is an integral over a line, draws
come from the inverse of the cdf, one output after the other, and have equal weights. The price is an integral for each
draw and factor but the first. Chains are trained by :func:`energyreg.fit_chain`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from energyreg.checks import check_count
from energyreg.densities.spaces import Circle, Interval, Positive, Product, Real, TargetSpace
from energyreg.inference.energy import EnergyFunction, ReferencedEnergy
from energyreg.inference.integrators import AdaptiveQuadrature
from energyreg.inference.nodes import Nodes
from energyreg.inference.points import WeightedPoints
from energyreg.inference.row_blocks import KEEP_SHARE, RowBlock, Rows
from energyreg.models.ensemble import EnergyEnsemble, EnsembleDistribution
from energyreg.models.model import EnergyRegressionModel
from energyreg.models.predictive import PredictiveDistribution
from energyreg.models.table_defaults import as_array, table_encoder, table_width

__all__ = ["AncestralSampling", "ChainDistribution", "ChainEncoder", "EnergyChain"]

FLOATS_PER_CHANNEL = 8
"""Working memory of a context, in floats per channel: what its encoder keeps at once."""


# ---------------------------------------------------------------------------------------------- parts


class ChainEncoder(nn.Module):
    """Encoder for a later factor of a chain: previous targets and inputs each by an encoder, joined by a hidden layer.

    So the many values of the previous targets that predictions take for one row of x encode x once.

    Args:
        previous: Encoder of the previous targets, which are the first columns; (B, P) to (B, C').
        inputs: Encoder of x, the other columns; (B, F) to (B, C'').
        context_dim: Context channels C.
        dropout: Dropout probability after the joining layer.

    Raises:
        ValueError: If an argument is out of its range, or a part does not say how many columns it takes.

    >>> from energyreg.networks.encoders import TableEncoder
    >>> encoder = ChainEncoder(TableEncoder(1, 8, 1), TableEncoder(3, 8, 1), context_dim=16)
    >>> encoder(torch.randn(5, 4)).shape
    torch.Size([5, 16])
    """

    def __init__(self, previous: nn.Module, inputs: nn.Module, context_dim: int = 256, dropout: float = 0.2) -> None:
        super().__init__()
        for name, part in (("previous", previous), ("inputs", inputs)):
            for attribute in ("num_features", "context_dim"):
                if not isinstance(getattr(part, attribute, None), int):
                    raise ValueError(
                        f"{name} is a {type(part).__name__}, which has no {attribute}; expected an encoder."
                    )
        check_count("context_dim", context_dim)
        if not 0 <= dropout < 1:
            raise ValueError(f"dropout is {dropout}; expected a probability in [0, 1).")
        self.previous, self.inputs, self.context_dim, self.dropout = previous, inputs, context_dim, dropout
        self.num_previous = int(previous.num_features)  # type: ignore[arg-type]
        self.num_features = self.num_previous + int(inputs.num_features)  # type: ignore[arg-type]
        self.from_previous = nn.Linear(int(previous.context_dim), context_dim)  # type: ignore[arg-type]
        self.from_inputs = nn.Linear(int(inputs.context_dim), context_dim, bias=False)  # type: ignore[arg-type]

    @property
    def fitted(self) -> bool:
        """Whether both encoders have seen the training rows."""
        return all(bool(getattr(part, "fitted", True)) for part in (self.previous, self.inputs))

    def fit(self, x: Tensor) -> None:
        """Fit both encoders, as far as they have anything to fit, x of shape (N, P + F)."""
        for part, columns in ((self.previous, x[:, : self.num_previous]), (self.inputs, x[:, self.num_previous :])):
            fit = getattr(part, "fit", None)
            if callable(fit) and not bool(getattr(part, "fitted", True)):
                fit(columns)

    def of_inputs(self, x: Tensor) -> Tensor:
        """What x alone contributes, (B, F) to (B, C)."""
        return self.from_inputs(self.inputs(x))

    def join(self, of_inputs: Tensor, previous: Tensor) -> Tensor:
        """Contexts from what x contributes, (B, C), and the previous targets, (B, P)."""
        hidden = functional.silu(of_inputs + self.from_previous(self.previous(previous)))
        return functional.dropout(hidden, self.dropout, self.training)

    def forward(self, x: Tensor) -> Tensor:
        """Map previous targets and features (B, P + F) to contexts (B, C).

        Raises:
            ValueError: If x has another number of columns.
        """
        if x.ndim != 2 or x.shape[1] != self.num_features:
            raise ValueError(f"x has shape {tuple(x.shape)}; this encoder takes (B, {self.num_features}).")
        return self.join(self.of_inputs(x[:, self.num_previous :]), x[:, : self.num_previous])


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


# ---------------------------------------------------------------------------------------------- the model


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
            width: As in :meth:`energyreg.models.model.EnergyRegressionModel.for_table`, as all that follow.
            depth: As there; the last of the hidden layers joins x and the previous targets.
            dropout: As there.
            num_components: As there.
            num_rows: As there.
            cardinalities: As there.

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
        return self._factors()[0]

    def _factors(self) -> list[EnergyRegressionModel | EnergyEnsemble]:
        return list(self.factors)  # type: ignore[arg-type]

    @property
    def space(self) -> Product:
        """The target space: the factors' in the order of the outputs."""
        spaces = {output: factor.space for output, factor in zip(self.order, self._factors(), strict=True)}
        return Product(*(spaces[output] for output in range(len(spaces))))

    @property
    def reference(self) -> _Reference:
        """The product of the factors' reference measures, in the order of the outputs."""
        bases = {output: _members(factor)[0].base for output, factor in zip(self.order, self._factors(), strict=True)}
        ordered = [bases[output] for output in range(len(bases))]
        return _Reference([getattr(base, "reference", base) for base in ordered])

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
        return all(factor.fitted for factor in self._factors())

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
        for value, factor in zip(z.unbind(-1), self._factors()[: z.shape[-1]], strict=True):
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


def _members(factor: EnergyRegressionModel | EnergyEnsemble) -> list[EnergyRegressionModel]:
    return list(factor.models()) if isinstance(factor, EnergyEnsemble) else [factor]


def _of_inputs(model: EnergyRegressionModel, x: Tensor) -> Tensor | None:
    """What a model's encoder makes of x alone, where it says so."""
    return model.encoder.of_inputs(x) if isinstance(model.encoder, ChainEncoder) else None


# ---------------------------------------------------------------------------------------------- its energy


class _Reference:
    """The product of the factors' reference measures, over the outputs in their own order."""

    def __init__(self, parts: Sequence[Any]) -> None:
        self.parts = parts
        self.dim, self.periodic = len(parts), tuple(part.periodic[0] for part in parts)

    def buffers(self) -> Iterator[Tensor]:
        """The tensors of all parts."""
        return (buffer for part in self.parts for buffer in part.buffers())

    def log_prob(self, z: Tensor) -> Tensor:
        """Log-density in nats, (*S, D) to (*S,)."""
        columns = [part.log_prob(z[..., [d]]) for d, part in enumerate(self.parts)]
        return torch.stack(columns).sum(0)

    def to_unit(self, z: Tensor) -> Tensor:
        """Unit coordinates, (*S, D) to (*S, D)."""
        return torch.cat([part.to_unit(z[..., [d]]) for d, part in enumerate(self.parts)], -1)

    def from_unit(self, u: Tensor) -> Tensor:
        """Inverse of :meth:`to_unit`."""
        return torch.cat([part.from_unit(u[..., [d]]) for d, part in enumerate(self.parts)], -1)


class ChainEnergy(ReferencedEnergy):
    """The log-density of a chain in model space, for R rows of x, and draws from it.

    Args:
        chain: The chain.
        x: Inputs, shape (R, F).
        memory_budget: Working memory in bytes.
    """

    normalised = True
    is_reference = conditional = False

    def __init__(self, chain: EnergyChain, x: Tensor, memory_budget: int) -> None:
        self.chain, self.x, self.budget = chain, x, memory_budget
        self._of_inputs = [[_of_inputs(model, x) for model in _members(factor)] for factor in chain._factors()]
        self.context = x
        self.reference: Any = chain.reference
        self._leading: list[PredictiveDistribution] | None = None

    def floats_per_point(self, shared: bool) -> int:
        """Working memory of one value of f, in floats: a context, and a quadrature's nodes for a gradient."""
        wide = max(self._channels(model) for factor in self.chain._factors() for model in _members(factor))
        return FLOATS_PER_CHANNEL * wide * (1 if shared else 4)

    @staticmethod
    def _channels(model: EnergyRegressionModel) -> int:
        return int(getattr(model.encoder, "context_dim", 256))

    def _context(self, position: int, member: int, rows: Tensor | None, z: Tensor) -> Tensor:
        """Contexts of one model at previous targets z (N, k) for some rows of x, (N,), or all of them."""
        model = _members(self.chain._factors()[position])[member]
        of_inputs = self._of_inputs[position][member]
        previous = self.chain.previous_features(z)
        if of_inputs is not None:
            assert isinstance(model.encoder, ChainEncoder)
            return model.encoder.join(of_inputs if rows is None else of_inputs[rows], previous)
        x = self.x if rows is None else self.x[rows]
        return model.encoder(torch.cat([previous, x], 1) if position else x)

    def _one(
        self, position: int, member: int, rows: Tensor | None, z: Tensor, quadrature: AdaptiveQuadrature
    ) -> PredictiveDistribution:
        """What one model predicts at previous targets."""
        model = _members(self.chain._factors()[position])[member]
        context = self._context(position, member, rows, z)

        def energy(chosen: Rows) -> EnergyFunction:
            return model.energy_of_context(context[chosen])

        return PredictiveDistribution(
            energy, len(context), model.space, quadrature, differentiable=torch.is_grad_enabled(), dtype=model.dtype,
            device=model.device, memory_budget=self.budget,
        )  # fmt: skip

    def factor(self, position: int, rows: Tensor | None, z: Tensor) -> PredictiveDistribution:
        """The distribution of an output given x and the outputs before it in the chain.

        Args:
            position: Place in the chain.
            rows: Rows of x, shape (N,); None for each once.
            z: Previous targets in model space, in the order of the chain, shape (N, position).

        Returns:
            A distribution of N rows, in one dimension.
        """
        factor = self.chain._factors()[position]
        parts = [self._one(position, m, rows, z, AdaptiveQuadrature()) for m in range(len(_members(factor)))]
        if len(parts) == 1:
            return parts[0]
        return EnsembleDistribution(
            parts, factor.space, AdaptiveQuadrature(), weights=getattr(factor, "weights", None),
            differentiable=torch.is_grad_enabled(), dtype=factor.dtype, device=factor.device, memory_budget=self.budget,
        )  # fmt: skip

    def __call__(self, z: Tensor) -> Tensor:
        """Return log p of shape (*S, R) for z in model space, shape (*S, R, D), or (*S, 1, D) shared by all rows."""
        z = z.expand(*z.shape[:-2], self.batch_size, z.shape[-1])
        flat = z.reshape(-1, *z.shape[-2:])
        parts = [self._log_density(part) for part in flat.split(self._block())]
        return torch.cat(parts).reshape(z.shape[:-1])

    def _block(self) -> int:
        """How many values per row fit the memory budget at once."""
        return max(self.budget // (4 * self.floats_per_point(True) * max(self.batch_size, 1)), 1)

    def _log_density(self, z: Tensor) -> Tensor:
        """The same for shape (S, R, D)."""
        ordered = z[..., self.chain.order]
        index = self._rows(len(z))
        total = torch.zeros(z.shape[:-1], dtype=z.dtype, device=z.device)
        for position in range(z.shape[-1]):
            value = ordered[..., [position]]
            if position == 0:  # the same density for all values of a row
                total = total + _log_density(self.factor(0, None, z[0, :, :0]), value)
            else:
                p = self.factor(position, index, ordered[..., :position].flatten(0, 1))
                total = total + _log_density(p, value.flatten(0, 1)).unflatten(0, z.shape[:-1])
        return total

    def _rows(self, count: int) -> Tensor:
        return torch.arange(self.batch_size, device=self.x.device).repeat(count)

    def relative(self, u: Tensor) -> Tensor:
        """Return f - log p₀ at unit coordinates of the reference p₀, (*S, R, D) or (*S, 1, D) to (*S, R)."""
        z = self.reference.from_unit(u)
        return self(z) - self.reference.log_prob(z)

    @torch.no_grad()
    def draw(self, uniforms: Tensor, quadrature: AdaptiveQuadrature) -> Tensor:
        """Draws in model space, from uniform numbers in double precision, (S, R, D) to (S, R, D)."""
        return torch.cat([self._draw(part, quadrature) for part in uniforms.split(self._block())])

    def _draw(self, uniforms: Tensor, quadrature: AdaptiveQuadrature) -> Tensor:
        count, rows, dim = uniforms.shape
        index = self._rows(count)
        ordered = torch.zeros(count * rows, dim, dtype=self.chain.dtype, device=self.x.device)
        for position, factor in enumerate(self.chain._factors()):
            # A draw of a mixture is one of a member, which the same uniform number chooses.
            shares = uniforms.new_tensor(factor.shares if isinstance(factor, EnergyEnsemble) else [1.0])
            ends = shares.cumsum(0)
            chosen = torch.searchsorted(ends, uniforms[..., position].contiguous(), right=True)
            chosen = chosen.clamp_max(len(shares) - 1)
            level = ((uniforms[..., position] - (ends - shares)[chosen]) / shares[chosen]).clamp(1e-9, 1 - 1e-9)
            for member in range(len(shares)):
                if position == 0:
                    values = _quantiles(self._one(0, member, None, ordered[:rows, :0], quadrature), level)
                    first = ordered[:, 0].view(count, rows)
                    ordered[:, 0] = torch.where(chosen == member, values, first).flatten()
                    continue
                here = (chosen == member).flatten().nonzero()[:, 0]
                if len(here):
                    p = self._one(position, member, index[here], ordered[here, :position], quadrature)
                    ordered[here, position] = _quantiles(p, level.flatten()[here][None])[0]
        result = torch.empty_like(ordered)
        result[:, self.chain.order] = ordered
        return result.view(count, rows, dim)


def _log_density(p: PredictiveDistribution, z: Tensor) -> Tensor:
    """Log-density in model space, (*S, B, 1) to (*S, B), with a gradient where one is wanted."""
    if torch.is_grad_enabled():
        block = p.block(slice(0, p.num_rows))
        return block.f(z) - block.log_partition
    return p.gather(lambda block: block.f(z[..., block.rows, :]) - block.log_partition, -1)


def _quantiles(p: PredictiveDistribution, level: Tensor) -> Tensor:
    """Model values at levels, (S, B) to (S, B)."""
    return p.gather(lambda block: block.nodes.quantiles(level[:, block.rows])[..., 0], -1)


# ---------------------------------------------------------------------------------------------- its prediction


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
            bytes_per_row=KEEP_SHARE * self.memory_budget / self.num_rows,
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
