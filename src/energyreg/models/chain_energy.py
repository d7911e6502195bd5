"""The log-density of a chain in model space and draws from it, factor by factor; the encoder of later factors."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional

from energyreg.checks import check_count
from energyreg.inference.energy import EnergyFunction, ReferencedEnergy
from energyreg.inference.integrators import AdaptiveQuadrature
from energyreg.inference.row_blocks import Rows
from energyreg.models.ensemble import EnergyEnsemble, EnsembleDistribution
from energyreg.models.model import EnergyRegressionModel
from energyreg.models.predictive import PredictiveDistribution
from energyreg.randomness import generator_for

__all__ = ["ChainEncoder", "ChainEnergy", "ChainReference", "members_of"]

FLOATS_PER_CHANNEL = 8
"""Working memory of a context, in floats per channel: what its encoder keeps at once."""


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
        if not (self.training and self.dropout):
            return hidden
        kept = torch.empty_like(hidden).bernoulli_(1 - self.dropout, generator=generator_for(hidden.device))
        return hidden * kept.div_(1 - self.dropout)

    def forward(self, x: Tensor) -> Tensor:
        """Map previous targets and features (B, P + F) to contexts (B, C).

        Raises:
            ValueError: If x has another number of columns.
        """
        if x.ndim != 2 or x.shape[1] != self.num_features:
            raise ValueError(f"x has shape {tuple(x.shape)}; this encoder takes (B, {self.num_features}).")
        return self.join(self.of_inputs(x[:, self.num_previous :]), x[:, : self.num_previous])


def members_of(factor: EnergyRegressionModel | EnergyEnsemble) -> list[EnergyRegressionModel]:
    """The models of a factor: the members of an ensemble, or the one."""
    return list(factor.models()) if isinstance(factor, EnergyEnsemble) else [factor]


def _of_inputs(model: EnergyRegressionModel, x: Tensor) -> Tensor | None:
    """What a model's encoder makes of x alone, where it says so."""
    return model.encoder.of_inputs(x) if isinstance(model.encoder, ChainEncoder) else None


class ChainReference:
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


class Factors(Protocol):
    """What an energy asks of its chain: :class:`~energyreg.models.chain.EnergyChain`."""

    order: list[int]

    @property
    def dtype(self) -> torch.dtype: ...

    @property
    def reference(self) -> Any: ...

    def in_order(self) -> Sequence[EnergyRegressionModel | EnergyEnsemble]:
        """The factors, in the order of the chain."""
        ...

    def previous_features(self, z: Tensor) -> Tensor:
        """What a factor sees of previous targets in model space, (N, k) to (N, P)."""
        ...


class ChainEnergy(ReferencedEnergy):
    """The log-density of a chain in model space, for R rows of x, and draws from it.

    Args:
        chain: The chain.
        x: Inputs, shape (R, F).
        memory_budget: Working memory in bytes.
    """

    normalised = True
    is_reference = conditional = False

    def __init__(self, chain: Factors, x: Tensor, memory_budget: int) -> None:
        self.chain, self.x, self.budget = chain, x, memory_budget
        self._of_inputs = [[_of_inputs(model, x) for model in members_of(factor)] for factor in chain.in_order()]
        self.context = x
        self.reference: Any = chain.reference
        self._leading: list[PredictiveDistribution] | None = None

    def floats_per_point(self, shared: bool) -> int:
        """Working memory of one value of f, in floats: a context, and a quadrature's nodes for a gradient."""
        wide = max(self._channels(model) for factor in self.chain.in_order() for model in members_of(factor))
        return FLOATS_PER_CHANNEL * wide * (1 if shared else 4)

    @staticmethod
    def _channels(model: EnergyRegressionModel) -> int:
        return int(getattr(model.encoder, "context_dim", 256))

    def _context(self, position: int, member: int, rows: Tensor | None, z: Tensor) -> Tensor:
        """Contexts of one model at previous targets z (N, k) for some rows of x, (N,), or all of them."""
        model = members_of(self.chain.in_order()[position])[member]
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
        model = members_of(self.chain.in_order()[position])[member]
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
        factor = self.chain.in_order()[position]
        parts = [self._one(position, m, rows, z, AdaptiveQuadrature()) for m in range(len(members_of(factor)))]
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
        for position, factor in enumerate(self.chain.in_order()):
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
