r"""The energy y → f(x, y) of the examples of a batch: all that objectives and inference see of a model.

:class:`Energy` is the contract. Any function of y, shape (\*S, B, D) to (\*S, B), serves objectives and chains too;
:func:`periodic_of` then asks the caller which dimensions are angles. Quadrature and predictive distributions need a
:class:`ReferencedEnergy`, of which :class:`EnergyFunction` is the one of a single model.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from copy import copy
from functools import cached_property
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.distributions import Distribution

from energyreg.densities.angles import periodic_flags
from energyreg.densities.bases import Lebesgue, Marginal, ProposalBase, ProposalReference
from energyreg.densities.mixtures import MixtureReference
from energyreg.inference.tables import Table, tabulate

__all__ = ["Energy", "EnergyFunction", "ReferencedEnergy", "periodic_of"]

FEWEST = 64
"""Nodes a row from which on a table of the head is worth its price."""


class Energy(Protocol):
    """f(x, ·) of the B examples of a batch, in model space; f[b] knows the context of example b.

    Attributes:
        periodic: Whether each dimension of y is an angle in [-π, π).
        batch_size: Examples B.
        dtype: Of y.
        device: Of y.
    """

    @property
    def periodic(self) -> tuple[bool, ...]: ...

    @property
    def batch_size(self) -> int: ...

    @property
    def dtype(self) -> torch.dtype: ...

    @property
    def device(self) -> torch.device: ...

    def __call__(self, z: Tensor, /) -> Tensor:
        """Return f(x, y), shape (*S, B), at y of shape (*S, B, D), differentiable in y."""
        ...


AnyEnergy = Energy | Callable[[Tensor], Tensor]
"""y of shape (*S, B, D) in model space to f of shape (*S, B): an :class:`Energy`, or any function of y."""


def periodic_of(
    f: AnyEnergy, dim: int, given: Sequence[bool] | None = None, name: str = "periodic"
) -> tuple[bool, ...]:
    """Which dimensions of y are angles: what the energy says, or else the caller, or else none.

    Args:
        f: An energy. Any function may say it too, by an attribute `periodic`.
        dim: Dimensions D of y.
        given: What the caller says.
        name: Name of that argument, for the message.

    Raises:
        ValueError: If the two contradict each other, or have another length than dim.

    >>> periodic_of(lambda y: y.cos().sum(-1), dim=2, given=[True, False])
    (True, False)
    """
    own = getattr(f, "periodic", None)
    for who, flags in ((name, given), ("f.periodic", own)):
        if flags is not None and len(flags) != dim:
            raise ValueError(
                f"{who} has {len(flags)} entries, but y has {dim} dimensions; expected one flag per dimension."
            )
    said = periodic_flags(dim, given)
    if own is None:
        return said
    own = periodic_flags(dim, own)
    if given is not None and said != own:
        raise ValueError(
            f"{name} is {said}, but f.periodic is {own}: they must agree on which dimensions are "
            "angles. Pass periodic=space.periodic."
        )
    return own


class ReferencedEnergy(ABC):
    r"""An energy relative to a reference measure p₀, in whose unit coordinates u its partition function is an integral.

    .. math:: Z = \int_{(0,1)^D} \exp(f - \log p_0) du

    An :class:`Energy`, and all that quadrature and predictive distributions ask for.

    Attributes:
        reference: The measure p₀, with `log_prob`, `to_unit` and `from_unit`.
        common: The measure that this energy has in common with others of its model and of its ensemble; the reference
            itself, unless that is the row's own.
        context: What the energy knows of its examples, first dimension B.
        q: The proposal q(y|x), if there is one.
        conditional: Whether f is relative to the proposal.
        normalised: Whether log Z = 0 for certain.
        is_reference: Whether f is the log-density of p₀ itself.
    """

    reference: Any
    context: Tensor
    conditional: bool
    normalised: bool
    is_reference: bool

    @property
    def periodic(self) -> tuple[bool, ...]:
        """Whether each dimension of y is an angle."""
        return tuple(self.reference.periodic)

    @property
    def batch_size(self) -> int:
        """Examples B."""
        return self.context.shape[0]  # not len(), which would fix the batch size in an exported graph

    @property
    def dtype(self) -> torch.dtype:
        """Type of y."""
        return self._buffer.dtype

    @property
    def device(self) -> torch.device:
        """Where y is."""
        return self._buffer.device

    @property
    def common(self) -> Any:
        """The reference that all rows and all members of an ensemble share."""
        return self.reference

    def in_common(self) -> ReferencedEnergy:
        """The same energy, relative to the common reference."""
        return self if self.common is self.reference else _Rereferenced(self)

    def reference_of(self, rows: Tensor) -> Any:
        """The reference of some rows, (N,), which may be named several times: `from_unit` of it takes (*S, N, D)."""
        return self.reference[rows] if isinstance(self.reference, MixtureReference) else self.reference

    @cached_property
    def q(self) -> Distribution | None:
        """The proposal, or None."""
        return None

    @property
    def _buffer(self) -> Tensor:
        return next(buffer for buffer in self.reference.buffers() if buffer.is_floating_point())

    @abstractmethod
    def __call__(self, z: Tensor, /) -> Tensor:
        """Return f(x, z) of shape (*S, B) for z in model space, shape (*S, B, D), or (*S, 1, D) shared by all rows."""

    @abstractmethod
    def relative(self, u: Tensor) -> Tensor:
        """Return f - log p₀ at unit coordinates of the reference, (*S, B, D) or (*S, 1, D) to (*S, B)."""

    def relative_at_own(self, u: Tensor, z: Tensor | None = None) -> Tensor:
        """Return :meth:`relative` at many nodes of each row's own, (G, B, 1) to (G, B); it may interpolate.

        Args:
            u: Unit coordinates.
            z: The same points in model space, where the caller knows them.
        """
        return self.relative(u)

    @abstractmethod
    def floats_per_point(self, shared: bool) -> int:
        """Working memory of one value of f, in floats; what chunks are sized by."""

    def target_and_relative(self, z: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
        """Return f at the examples' targets and f - log p₀ at nodes, as two calls do, in one where that is possible.

        Args:
            z: Targets in model space, shape (B, D).
            u: Unit coordinates of nodes shared by all examples, shape (G, 1, D).

        Returns:
            f of shape (B,), and f - log p₀ of shape (G, B).
        """
        return self(z), self.relative(u)


def require_reference(f: AnyEnergy, user: str) -> ReferencedEnergy:
    """Return f if it has a reference measure.

    Args:
        f: An energy, or any function of y.
        user: What needs the reference, for the message.

    Raises:
        TypeError: If it has none.
    """
    if isinstance(f, ReferencedEnergy) or all(hasattr(f, name) for name in ("reference", "relative")):
        return f  # type: ignore[return-value]
    raise TypeError(
        f"{user} needs an energy with a reference measure to integrate over, but f is a {type(f).__name__} without "
        "one. Pass model.energy(x), an energyreg.inference.energy.EnergyFunction, or a subclass of ReferencedEnergy; "
        "any function of y is enough for NCE, score matching and Markov chains."
    )


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


class EnergyFunction(ReferencedEnergy):
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
        self.conditional, self.normalised = isinstance(base, ProposalBase), head is None
        self.reference: Lebesgue | Marginal | MixtureReference
        self.reference = self._common = base.reference if isinstance(base, ProposalBase) else base
        if isinstance(base, ProposalReference):
            assert q is not None
            self.reference = MixtureReference(_detached(q) if base.detach else q)  # type: ignore[arg-type]
            self.conditional = False
        self.is_reference = self.normalised and not self.conditional

    @property
    def common(self) -> Lebesgue | Marginal:
        """The reference of the base, which all rows share."""
        return self._common

    def floats_per_point(self, shared: bool) -> int:
        """Working memory of one value of f, in floats; what chunks are sized by."""
        shared = shared and not self._standardised
        head = 1 if self.head is None else getattr(self.head, "floats_per_point", lambda shared: 2048)(shared)
        mixture = 6 * getattr(getattr(self.q, "means", None), "shape", (0, 0))[1] if self.conditional else 0
        return head + mixture

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
        """Return f(x, z), (*S, B, D) or (*S, 1, D) to (*S, B)."""
        return self._log_base(z) + self._g(self._coordinates(z))

    def _log_base(self, z: Tensor) -> Tensor:
        return self._log_q(z) if self.conditional else self.reference.log_prob(z)

    def relative(self, u: Tensor) -> Tensor:
        """Return f - log p₀ at unit coordinates of the reference, (*S, B, D) or (*S, 1, D) to (*S, B)."""
        z = self.reference.from_unit(u) if self.conditional else None
        v = self._coordinates(z) if z is not None and self._standardised else 2 * u - 1
        return self._log_relative_base(z, self._g(v))

    def relative_at_own(self, u: Tensor, z: Tensor | None = None) -> Tensor:
        """Return f - log p₀ at nodes of the rows' own, (G, B, 1) to (G, B), from a table of g where one is exact."""
        table = None if torch.is_grad_enabled() or len(u) < FEWEST else self._table
        if table is None:
            return self.relative(u)
        z = self.reference.from_unit(u) if z is None and self.conditional else z
        v = self._coordinates(z) if z is not None and self._standardised else 2 * u - 1
        return self._log_relative_base(z if self.conditional else None, table(v[..., 0]))

    @cached_property
    def _table(self) -> Table | None:
        """g along v, for heads whose values at shared places cost next to nothing."""
        cost = getattr(self.head, "floats_per_point", None)
        if self.head is None or cost is None or len(self.periodic) > 1 or 8 * cost(True) > cost(False):
            return None
        return tabulate(self._g, self._buffer)

    def _log_relative_base(self, z: Tensor | None, g: Tensor) -> Tensor:
        return g if z is None else self._log_q(z) - self.reference.log_prob(z) + g

    def target_and_relative(self, z: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
        """Return f at the targets (B, D) and f - log p₀ at nodes (G, 1, D), in one pass through the head if it can."""
        both = None if self._standardised else _in_one_pass(self.head)
        if both is None:
            return self(z), self.relative(u)
        own, shared = 2 * self.reference.to_unit(z) - 1, 2 * u - 1
        g_own, g_shared = both(self.context, own, shared)
        f_target = self._log_base(z) + self._checked(g_own, own)
        nodes = self.reference.from_unit(u) if self.conditional else None
        return f_target, self._log_relative_base(nodes, self._checked(g_shared, shared))


class _Rereferenced(ReferencedEnergy):
    """An energy whose reference is the rows' own, relative to the common one.

    Args:
        energy: The energy, whose proposal is its reference.
    """

    conditional = True

    def __init__(self, energy: ReferencedEnergy) -> None:
        self.energy, self.context, self.reference = energy, energy.context, energy.common
        self.normalised, self.is_reference = energy.normalised, False

    @cached_property
    def q(self) -> Distribution | None:
        """The energy's proposal."""
        return self.energy.q

    def floats_per_point(self, shared: bool) -> int:
        """Working memory of one value of f, in floats: no two rows share their unit coordinates."""
        return self.energy.floats_per_point(False) + 6 * getattr(getattr(self.q, "means", None), "shape", (0, 0))[1]

    def __call__(self, z: Tensor) -> Tensor:
        """Return f(x, z), as the energy does."""
        return self.energy(z)

    def relative(self, u: Tensor) -> Tensor:
        """Return f - log p₀ at unit coordinates of the common reference p₀, (*S, B, D) or (*S, 1, D) to (*S, B)."""
        if u.ndim == 3 and not torch.is_grad_enabled():
            return self.relative_at_own(u)
        z = self.reference.from_unit(u)
        return self.energy(z) - self.reference.log_prob(z)

    def relative_at_own(self, u: Tensor, z: Tensor | None = None) -> Tensor:
        """As :meth:`relative`, at many nodes of each row's own."""
        z = self.reference.from_unit(u) if z is None else z
        own = self.energy.reference
        return self.energy.relative_at_own(own.to_unit(z), z) + own.log_prob(z) - self.reference.log_prob(z)
