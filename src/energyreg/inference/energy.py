"""The energy function y → f(x, y) for a batch of contexts: all that objectives and inference see of a model."""

from __future__ import annotations

from collections.abc import Callable
from copy import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributions import Distribution

from energyreg.densities.bases import Lebesgue, Marginal, ProposalBase

__all__ = ["EnergyFunction"]


def _detached(q: Distribution) -> Distribution:
    """A copy of q whose tensors carry no gradient, also inside of the distributions that it is made of."""
    q = copy(q)
    for name, value in vars(q).items():
        if isinstance(value, Tensor):
            vars(q)[name] = value.detach()
        elif isinstance(value, Distribution):
            vars(q)[name] = _detached(value)
    return q


def _in_one_pass(head: Any) -> Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]] | None:
    """The head's way to take targets of its rows and shared ones at once, unless a subclass changed only `forward`."""
    for kind in type(head).__mro__:
        if "own_and_shared" in vars(kind):
            return head.own_and_shared
        if "forward" in vars(kind):
            return None
    return None


class EnergyFunction:
    r"""f(x, ·) in model space, for the B rows of a batch: f(x, z) = log base(z|x) + g(context, v(z)).

    Args:
        head: (context, v) to g, or None for g = 0.
        context: Contexts, first dimension B.
        base: Base measure.
        q: The proposal q(y|x) of these rows, needed if it is the base.

    >>> from energyreg.networks.heads import SeparableHead
    >>> f = EnergyFunction(SeparableHead(context_dim=8), torch.randn(5, 8), Marginal())
    >>> f(torch.zeros(3, 5, 1)).shape
    torch.Size([3, 5])
    """

    def __init__(
        self,
        head: nn.Module | Callable[[Tensor, Tensor], Tensor] | None,
        context: Tensor,
        base: Lebesgue | Marginal | ProposalBase,
        q: Distribution | None = None,
    ) -> None:
        if isinstance(base, ProposalBase) and q is None:
            raise ValueError("base is a ProposalBase, but q is None; the proposal must be given.")
        self.head, self.context, self.base, self.q = head, context, base, q

    @property
    def reference(self) -> Lebesgue | Marginal:
        """The unconditional measure whose unit coordinates the head sees and the quadrature integrates over."""
        return self.base.reference if isinstance(self.base, ProposalBase) else self.base

    @property
    def batch_size(self) -> int:
        """Rows B."""
        return self.context.shape[0]  # not len(), which would fix the batch size in an exported graph

    @property
    def normalised(self) -> bool:
        """Whether log Z = 0 for certain: there is no head, so that f is the log-density of the base."""
        return self.head is None

    @property
    def is_reference(self) -> bool:
        """Whether f is the log-density of the reference itself: there is neither a head nor a proposal as base."""
        return self.head is None and not self.conditional

    def floats_per_point(self, shared: bool) -> int:
        """Working memory of one value of f, in floats; what chunks are sized by."""
        shared = shared and not self._standardised
        head = 1 if self.head is None else getattr(self.head, "floats_per_point", lambda shared: 2048)(shared)
        mixture = 6 * getattr(getattr(self.q, "means", None), "shape", (0, 0))[1] if self.conditional else 0
        return head + mixture

    @property
    def conditional(self) -> bool:
        """Whether the base is the proposal."""
        return isinstance(self.base, ProposalBase)

    @property
    def _standardised(self) -> bool:
        """Whether the head sees targets standardised by the proposal, so that no two rows share their coordinates."""
        return isinstance(self.base, ProposalBase) and self.base.standardised

    def _coordinates(self, z: Tensor) -> Tensor:
        """The head's coordinates v in (-1, 1), of points in model space."""
        if self.head is None:
            return z  # whose shape is all that counts
        if not self._standardised:
            return 2 * self.reference.to_unit(z) - 1
        assert self.q is not None
        mean, scale = self.q.mean, self.q.variance.clamp_min(torch.finfo(z.dtype).tiny).sqrt()
        if self.base.detach:
            mean, scale = mean.detach(), scale.detach()
        t = (z - mean) / scale
        return t * (2 + t.square()).rsqrt()

    def _g(self, v: Tensor) -> Tensor:
        if self.head is None:
            return torch.zeros((), dtype=v.dtype, device=v.device).expand(*v.shape[:-2], self.batch_size)
        return self._checked(self.head(self.context, v), v)

    def _checked(self, g: Tensor, v: Tensor) -> Tensor:
        shape = (*v.shape[:-2], self.batch_size)
        if g.shape != shape:
            raise ValueError(
                f"The head returned shape {tuple(g.shape)} for {self.batch_size} contexts and targets of shape "
                f"{tuple(v.shape)}; expected {shape}, one value per target and row."
            )
        return g

    def _log_q(self, z: Tensor) -> Tensor:
        assert self.q is not None
        if not self.base.detach:
            return self.q.log_prob(z)
        if z.requires_grad:  # a gradient in y, none in the parameters of q
            return _detached(self.q).log_prob(z)
        with torch.no_grad():
            return self.q.log_prob(z)

    def __call__(self, z: Tensor) -> Tensor:
        """Return f(x, z) of shape (*S, B) for z in model space, shape (*S, B, D), or (*S, 1, D) shared by all rows."""
        return self._log_base(z) + self._g(self._coordinates(z))

    def _log_base(self, z: Tensor) -> Tensor:
        return self._log_q(z) if self.conditional else self.reference.log_prob(z)

    def relative(self, u: Tensor) -> Tensor:
        r"""Return f - log p₀ at unit coordinates of the reference p₀.

        .. math:: Z = \int_{(0,1)^D} \exp(f - \log p_0) du

        Args:
            u: Unit coordinates, shape (*S, B, D), or (*S, 1, D) shared by all rows.

        Returns:
            The log-density relative to the reference, unnormalised, shape (*S, B).
        """
        z = self.reference.from_unit(u) if self.conditional else None
        v = self._coordinates(z) if z is not None and self._standardised else 2 * u - 1
        return self._log_relative_base(z, self._g(v))

    def _log_relative_base(self, z: Tensor | None, g: Tensor) -> Tensor:
        return g if z is None else self._log_q(z) - self.reference.log_prob(z) + g

    def target_and_relative(self, z: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
        """Return f at the rows' targets and f - log p₀ at nodes, as two calls do, in one where the head can.

        Args:
            z: Targets in model space, shape (B, D).
            u: Unit coordinates of nodes shared by all rows, shape (G, 1, D).

        Returns:
            f of shape (B,), and f - log p₀ of shape (G, B).
        """
        both = None if self._standardised else _in_one_pass(self.head)
        if both is None:
            return self(z), self.relative(u)
        own, shared = 2 * self.reference.to_unit(z) - 1, 2 * u - 1
        g_own, g_shared = both(self.context, own, shared)
        f_target = self._log_base(z) + self._checked(g_own, own)
        nodes = self.reference.from_unit(u) if self.conditional else None
        return f_target, self._log_relative_base(nodes, self._checked(g_shared, shared))
