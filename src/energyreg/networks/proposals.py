"""Proposals q(y|x): modules that map a context to a torch distribution over model space."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.distributions import Distribution
from torch.nn import functional

from energyreg.checks import check_count
from energyreg.densities.angles import periodic_flags
from energyreg.densities.mixtures import GaussianMixture, Wrapped

__all__ = ["DistributionProposal", "GaussianMixture", "MixtureDensityNetwork"]


class MixtureDensityNetwork(nn.Module):
    """A mixture density network: context to a :class:`GaussianMixture` with full softmax weights.

    Args:
        context_dim: Context channels C.
        dim: Target dimensions D.
        num_components: Gaussians K.
        rank: Rank R of the covariances beyond their diagonal, 0 for diagonal ones.
        periodic: Whether each dimension is an angle; none by default.
        width: Width of the hidden layer.
        min_scale: Floor of the standard deviations, in units of the standardised target (radians for an angle). It
            bounds the density: without it a likelihood could grow without limit on a repeated target.

    Raises:
        ValueError: If an argument is out of its range, or rank > 0 meets a periodic dimension.

    Source:
        Bishop, "Mixture density networks", 1994.

    >>> q = MixtureDensityNetwork(context_dim=8, num_components=3)(torch.randn(5, 8))
    >>> q.sample((2,)).shape, q.log_prob(torch.zeros(5, 1)).shape
    (torch.Size([2, 5, 1]), torch.Size([5]))
    """

    def __init__(
        self,
        context_dim: int,
        dim: int = 1,
        num_components: int = 8,
        rank: int = 0,
        periodic: Sequence[bool] | None = None,
        width: int = 128,
        min_scale: float = 1e-3,
    ) -> None:
        super().__init__()
        sizes = {"context_dim": context_dim, "dim": dim, "num_components": num_components, "width": width}
        for name, size in sizes.items():
            check_count(name, size)
        check_count("rank", rank, 0)
        if not min_scale > 0:
            raise ValueError(f"min_scale is {min_scale}; expected a number > 0, in units of the standardised target.")
        self.context_dim, self.dim, self.num_components, self.rank = context_dim, dim, num_components, rank
        self.periodic = periodic_flags(dim, periodic)
        if rank and any(self.periodic):
            raise ValueError(f"rank is {rank}, but a dimension is periodic: low-rank covariances need real dimensions.")
        self.width, self.min_scale = width, min_scale
        self.hidden = nn.Linear(context_dim, width)
        self.output = nn.Linear(width, num_components * (1 + 2 * dim + dim * rank))
        # Components start spread over the standardised targets with a scale to match, so that none dies at once.
        with torch.no_grad():
            self.output.weight.mul_(0.1)
            bias = self.output.bias.zero_()[: num_components * (1 + 2 * dim)].reshape(num_components, 1 + 2 * dim)
            levels = (torch.arange(num_components) + 0.5) / num_components
            for d, angle in enumerate(self.periodic):
                # Each dimension in another order: the same one would put all components on a diagonal.
                order = torch.arange(num_components) if d == 0 else torch.randperm(num_components)
                bias[:, 1 + d] = (2 * levels[order] - 1) * math.pi if angle else torch.special.ndtri(levels[order])
            bias[:, 1 + dim :] = math.log(math.expm1(max(1.0 / num_components, 0.3)))

    def forward(self, context: Tensor) -> GaussianMixture:
        """Return q(y|x) for contexts of shape (B, C)."""
        raw = self.output(functional.silu(self.hidden(context)))
        k, d = self.num_components, self.dim
        parameters = raw[..., : k * (1 + 2 * d)].unflatten(-1, (k, 1 + 2 * d))
        scales = functional.softplus(parameters[..., 1 + d :]) + self.min_scale
        factor = raw[..., k * (1 + 2 * d) :].unflatten(-1, (k, d, self.rank)) if self.rank else None
        return GaussianMixture(parameters[..., 0], parameters[..., 1 : 1 + d], scales, factor, self.periodic)


class DistributionProposal(nn.Module):
    """Any conditional distribution module as a proposal: a zuko flow, or your own.

    Args:
        module: Maps contexts (B, C) to a torch distribution with batch shape (B,) and event shape (D,); for D = 1
            batch shape (B, 1) with a scalar event is taken too. Its density is over model space: standardised,
            unconstrained targets.
        dim: Target dimensions D.
        periodic: Whether each dimension is an angle; the distribution is wrapped there. None by default.

    Raises:
        TypeError: On the first call, if the module does not return a torch distribution.
        ValueError: If periodic has another length than dim; on the first call, if a batch or event shape is another.
    """

    def __init__(
        self, module: nn.Module | Callable[[Tensor], Distribution], dim: int = 1, periodic: Sequence[bool] | None = None
    ) -> None:
        super().__init__()
        self.module, self.dim = module, dim
        self.periodic = periodic_flags(dim, periodic)

    def forward(self, context: Tensor) -> Distribution:
        """Return q(y|x) for contexts of shape (B, C)."""
        q = self.module(context)
        if not isinstance(q, Distribution):
            raise TypeError(
                f"The proposal's module returned a {type(q).__name__}; expected a torch.distributions.Distribution "
                f"with batch shape ({len(context)},) and event shape ({self.dim},)."
            )
        if self.dim == 1 and q.event_shape == () and q.batch_shape == (context.shape[0], 1):
            q = torch.distributions.Independent(q, 1)
        if q.event_shape != (self.dim,) or q.batch_shape != (context.shape[0],):
            raise ValueError(
                f"The proposal's module returned batch shape {tuple(q.batch_shape)} and event shape "
                f"{tuple(q.event_shape)}; expected ({len(context)},) and ({self.dim},)."
            )
        return Wrapped(q, self.periodic) if any(self.periodic) else q
