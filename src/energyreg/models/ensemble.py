"""Ensembles: the mixture of several models' densities, with what they agree on and what they do not.

An ensemble predicts by the mean of its members' densities, which scores better than its average member whatever the
members are. Where they disagree the data did not decide: that part of the uncertainty is *epistemic* and more data
would lower it; the rest, which each member has by itself, is *aleatoric*. Members are trained by
:func:`energyreg.fit_ensemble`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributions import Distribution, constraints
from torch.nn import functional

from energyreg.densities.bases import Lebesgue, Marginal, ProposalBase
from energyreg.densities.mixtures import GaussianMixture
from energyreg.densities.spaces import TargetSpace
from energyreg.inference.energy import ReferencedEnergy
from energyreg.inference.row_blocks import RowBlock, Rows
from energyreg.models.model import EnergyRegressionModel
from energyreg.models.out_of_fold import OutOfFold
from energyreg.models.predictive import Integrator, PredictiveDistribution
from energyreg.modes import as_usual

__all__ = ["EnergyEnsemble", "EnsembleDistribution", "Uncertainty"]


class EnergyEnsemble(nn.Module):
    r"""Several models of one target as one: the mean of their densities, weighted if wanted.

    .. math:: p(y|x) = \sum_{s=1}^n w_s \, p_s(y|x), \qquad w_s = \frac1n \text{ by default}

    Args:
        members: The models. They must agree on the target space and on the reference measure of their bases, as they
            do when they are fitted to the same training targets.
        weights: Their weights, n numbers ≥ 0 that sum to 1; None for equal ones.

    Attributes:
        members: The models.
        weights: Their weights, a list; None where they are equal. :meth:`fit_weights` sets them.
        histories: How each of them was trained, a list of :class:`energyreg.training.History`, where
            :func:`energyreg.fit_ensemble` did it; else empty.

    Raises:
        ValueError: If there is no member, one is no EnergyRegressionModel, they do not agree, or the weights are none.

    Source:
        Lakshminarayanan et al., "Simple and scalable predictive uncertainty estimation using deep ensembles", NeurIPS
        2017.

    >>> ensemble = EnergyEnsemble([EnergyRegressionModel.for_table(num_features=3, width=16) for _ in range(4)])
    >>> p = ensemble(torch.randn(5, 3))
    >>> p.log_prob(torch.zeros(5)).shape, p.interval(0.9).shape, p.uncertainty().epistemic_variance.shape
    (torch.Size([5]), torch.Size([5, 2]), torch.Size([5, 1]))
    """

    def __init__(self, members: Iterable[EnergyRegressionModel], weights: Sequence[float] | None = None) -> None:
        super().__init__()
        members = list(members)
        if not members:
            raise ValueError("members is empty; expected at least one model.")
        for number, member in enumerate(members):
            if not isinstance(member, EnergyRegressionModel):
                raise ValueError(f"members[{number}] is a {type(member).__name__}; expected an EnergyRegressionModel.")
            difference = disagreement(members[0], member)
            if difference is not None:
                raise ValueError(
                    f"members[0] and members[{number}] have different {difference}; an ensemble is a mixture of "
                    "densities over one space with one reference. Fit the members to the same training targets, e.g. "
                    "by fit_ensemble."
                )
        self.members = nn.ModuleList(members)
        self.weights = None if weights is None else _check_weights(weights, len(members))
        self.histories: list[Any] = []  # of History, which belongs to a layer above this one

    def __len__(self) -> int:
        """How many members there are."""
        return len(self.members)

    @property
    def _first(self) -> EnergyRegressionModel:
        return next(iter(self.models()))

    def models(self) -> Sequence[EnergyRegressionModel]:
        return list(self.members)  # type: ignore[arg-type]

    @property
    def shares(self) -> list[float]:
        """The members' weights, written out where they are equal."""
        return [1 / len(self)] * len(self) if self.weights is None else self.weights

    @property
    def space(self) -> TargetSpace:
        """The target space of all members."""
        return self._first.space

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
        """Whether all members have seen training data."""
        return all(member.fitted for member in self.models())

    def check_inputs(self, x: Any) -> Tensor:
        """Inputs as a tensor of the members' dtype; see `EnergyRegressionModel.check_inputs`."""
        return self._first.check_inputs(x)

    def check_targets(self, y: Any) -> Tensor:
        """Targets of shape (N, D); see :meth:`energyreg.models.model.EnergyRegressionModel.check_targets`."""
        return self._first.check_targets(y)

    @as_usual
    def forward(
        self, x: Any, *, integrator: Integrator | None = None, seed: int = 0, memory_budget: int = 256 * 2**20
    ) -> EnsembleDistribution:
        """Return the predictive distribution, in user units.

        Args:
            x: Inputs, B rows: a tensor, an array or a data frame.
            integrator: How it is computed; by the number of target dimensions by default.
            seed: Of the points, where they are random.
            memory_budget: Working memory in bytes, of all members together.

        Raises:
            ValueError: If x is empty, of the wrong shape, not finite, or no array of numbers.
        """
        x = self.check_inputs(x)
        # Members may keep what they computed, each within its share.
        share = max(memory_budget // len(self), 1)
        members = [m(x, integrator=integrator, seed=seed, memory_budget=share) for m in self.models()]
        return EnsembleDistribution(
            members, self.space, self.default_integrator() if integrator is None else integrator, weights=self.weights,
            differentiable=self.training, dtype=self.dtype, device=self.device, seed=seed, memory_budget=memory_budget,
        )  # fmt: skip

    @torch.no_grad()
    def fit_weights(
        self,
        x: Any,
        y: Any,
        sample_weight: Any = None,
        *,
        prior: float = 20.0,
        integrator: Integrator | None = None,
        memory_budget: int = 256 * 2**20,
    ) -> list[float]:
        r"""Set the weights by the likelihood of rows that no member was trained on.

        .. math:: \max_w \sum_i \log \sum_s w_s \, p_s(y_i|x_i) + \frac{a}{n} \sum_s \log w_s

        With few rows the weights stay near equal ones; see :meth:`energyreg.models.out_of_fold.OutOfFold.weights`,
        also for members that have held out rows of their own.

        Args:
            x: Inputs of the rows.
            y: Their targets, shape (N, D), or (N,) for D = 1.
            sample_weight: Weights of the rows, shape (N,); equal by default.
            prior: How many rows the equal weights count as, a.
            integrator: As in :meth:`forward`.
            memory_budget: Working memory in bytes.

        Returns:
            The weights.

        Raises:
            ValueError: If x, y, the weights or the prior cannot be used.
        """
        targets = self.check_targets(y)
        p = self(x, integrator=integrator, memory_budget=memory_budget)
        self.weights = p.out_of_fold(targets, sample_weight).weights(prior=prior)
        return self.weights

    def default_integrator(self) -> Integrator:
        """The members' default; a grid for two dimensions if one of them has no proposal to draw points from."""
        without = [member for member in self.models() if member.proposal is None]
        return (without or self.models())[0].default_integrator()


def _check_weights(weights: Sequence[float], count: int) -> list[float]:
    values = [float(weight) for weight in weights]
    if len(values) != count or not all(0 <= value <= 1 for value in values) or abs(sum(values) - 1) > 1e-6:
        raise ValueError(f"weights is {weights!r}; expected {count} numbers ≥ 0 that sum to 1, one for each member.")
    return values


def _log_weights(weights: Sequence[float] | None, count: int) -> Tensor:
    """Log-weights, shape (n,), in double precision."""
    if weights is None:
        return torch.full((count,), -math.log(count), dtype=torch.double)
    return torch.tensor(weights, dtype=torch.double).log()


def disagreement(a: EnergyRegressionModel, b: EnergyRegressionModel) -> str | None:
    """What keeps the densities of two models from being mixed, in words; None if nothing does."""

    def reference(base: Lebesgue | Marginal | ProposalBase) -> Lebesgue | Marginal:
        return base.reference if isinstance(base, ProposalBase) else base

    pairs: list[tuple[str, nn.Module, nn.Module]] = [
        ("target spaces", a.space, b.space),
        ("reference measures", reference(a.base), reference(b.base)),
    ]
    for name, one, other in pairs:
        if one is not other and not _equal(one, other):
            return name
    if a.dtype != b.dtype:
        return f"dtypes ({a.dtype} and {b.dtype})"
    return None


def _equal(a: nn.Module, b: nn.Module) -> bool:
    """Whether two modules are of one class with the same tensors."""
    if type(a) is not type(b) or repr(a) != repr(b):
        return False
    mine, theirs = dict(a.named_buffers()), dict(b.named_buffers())
    mine |= dict(a.named_parameters())
    theirs |= dict(b.named_parameters())
    return mine.keys() == theirs.keys() and all(
        mine[name].shape == theirs[name].shape
        and (mine[name].is_meta or bool((mine[name] == theirs[name].to(mine[name].device)).all()))
        for name in mine
    )


# Their energy --------------------------------------------------------------------------------------------------------


class EnsembleEnergy(ReferencedEnergy):
    r"""The energy function of a mixture of models, for the B rows of a batch: the log of the mean of their densities.

    .. math:: f(x, z) = \log \sum_{s=1}^n w_s \exp(f_s(x, z) - \log Z_s(x))

    f is normalised, as each member is by its own integration; so the density is the mean of the members' exactly.

    Args:
        energies: The members' energy functions of these rows.
        log_partitions: Gives the members' log Z, shape (n, B); asked when f is first evaluated.
        log_weights: Log-weights of the members, shape (n,).
    """

    normalised = True
    is_reference = False

    def __init__(
        self, energies: Sequence[ReferencedEnergy], log_partitions: Callable[[], Tensor], log_weights: Tensor
    ) -> None:
        self.log_weights = log_weights.tolist()
        self.energies, self._log_partitions = [f.in_common() for f in energies], log_partitions
        self.context, self.reference = energies[0].context, energies[0].common
        self.conditional = any(f.conditional for f in self.energies)

    @cached_property
    def q(self) -> Distribution | None:
        """The mixture of the proposals of all members that have one; None without any."""
        return mixture([f.q for f in self.energies if f.q is not None])

    def floats_per_point(self, shared: bool) -> int:
        """Working memory of one value of f, in floats; what chunks are sized by."""
        components = getattr(getattr(self.q, "means", None), "shape", (0, 0))[1] if self.conditional else 0
        one = max(f.floats_per_point(shared) for f in self.energies)  # one member at a time
        return one + 3 * len(self.energies) + 3 * components

    def _mean(self, values: list[Tensor]) -> Tensor:
        log_z = self._log_partitions()
        each = zip(values, log_z, self.log_weights, strict=True)
        return torch.stack([f - z + w for f, z, w in each]).logsumexp(0)

    def __call__(self, z: Tensor) -> Tensor:
        """Return f(x, z) of shape (*S, B) for z in model space, shape (*S, B, D), or (*S, 1, D) shared by all rows."""
        return self._mean([f(z) for f in self.energies])

    def relative(self, u: Tensor) -> Tensor:
        """Return f - log p₀ at unit coordinates of the reference p₀, (*S, B, D) or (*S, 1, D) to (*S, B)."""
        return self._mean([f.relative(u) for f in self.energies])

    def relative_at_own(self, u: Tensor, z: Tensor | None = None) -> Tensor:
        """As :meth:`relative`, at many nodes of each row's own; model values are looked up once for all members."""
        z = self.reference.from_unit(u) if z is None and self.conditional else z
        return self._mean([f.relative_at_own(u, z) for f in self.energies])

    def member_log_densities(self, z: Tensor) -> Tensor:
        """Log-densities of the members in model space, (*S, B, D) to (n, *S, B)."""
        return torch.stack([f(z) - log_z for f, log_z in zip(self.energies, self._log_partitions(), strict=True)])


def mixture(parts: Sequence[Distribution]) -> Distribution | None:
    """The mixture of some distributions over the same rows with equal weights; None where there are none."""
    if len(parts) <= 1:
        return parts[0] if parts else None
    mixtures = [q for q in parts if isinstance(q, GaussianMixture)]
    if len(mixtures) < len(parts):
        return _Mixture(parts)
    rank = max(0 if q.factor is None else q.factor.shape[-1] for q in mixtures)

    def factor(q: GaussianMixture) -> Tensor:
        if q.factor is None:
            return q.means.new_zeros(*q.means.shape, rank)
        return functional.pad(q.factor, (0, rank - q.factor.shape[-1]))

    return GaussianMixture(
        torch.cat([q.log_mixing for q in mixtures], -1),
        torch.cat([q.means for q in mixtures], -2),
        torch.cat([q.scales for q in mixtures], -2),
        torch.cat([factor(q) for q in mixtures], -3) if rank else None,
        mixtures[0].periodic,
    )


class _Mixture(Distribution):
    """The mixture of n distributions of any kind, with equal weights."""

    arg_constraints: dict[str, Any] = {}  # noqa: RUF012 (torch's own convention)

    def __init__(self, parts: Sequence[Distribution]) -> None:
        self.parts = parts
        super().__init__(parts[0].batch_shape, parts[0].event_shape, validate_args=False)

    @property
    def support(self) -> constraints.Constraint:
        return constraints.real_vector

    def log_prob(self, value: Tensor) -> Tensor:
        """Log-density in nats, (*S, B, D) to (*S, B)."""
        return torch.stack([q.log_prob(value) for q in self.parts]).logsumexp(0) - math.log(len(self.parts))

    def sample(self, sample_shape: Any = ()) -> Tensor:
        """Draw samples, shape (*S, B, D)."""
        samples = torch.stack([q.sample(torch.Size(sample_shape)) for q in self.parts])
        shape = samples.shape[1:-1]
        choice = torch.randint(len(self.parts), shape, device=samples.device)
        return samples.gather(0, choice[None, ..., None].expand(1, *shape, samples.shape[-1]))[0]


# Their prediction ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Uncertainty:
    r"""How much of an ensemble's uncertainty more data would take away, per row.

    The entropy of the mixture is the members' mean entropy plus the mutual information between target and member,

    .. math:: H\left[\sum_s w_s p_s\right] = \sum_s w_s H[p_s] + I(y; s|x)

    with I between 0 (all members say the same) and log n (no two overlap). The variance of the mixture is the members'
    mean variance plus the variance of their means; for an angle, where that law does not hold, the epistemic part is
    what is left over by the aleatoric one.

    Attributes:
        total_entropy: Differential entropy of the mixture, in nats of user units, shape (B,).
        aleatoric_entropy: Mean of the members' entropies, shape (B,).
        epistemic_entropy: Mutual information, in nats, shape (B,).
        total_variance: Variance of the mixture, in squared user units, shape (B, D).
        aleatoric_variance: Mean of the members' variances, shape (B, D).
        epistemic_variance: Variance of the members' means, shape (B, D).
    """

    total_entropy: Tensor
    aleatoric_entropy: Tensor
    epistemic_entropy: Tensor
    total_variance: Tensor
    aleatoric_variance: Tensor
    epistemic_variance: Tensor


class EnsembleDistribution(PredictiveDistribution):
    """p(y|x) of an ensemble for B rows of x, in user units: the weighted mean of its members' densities.

    Made by calling an ensemble. See :class:`~energyreg.models.predictive.PredictiveDistribution` for what it can do.

    Args:
        members: The members' predictive distributions.
        space: Target space.
        integrator: How points are made.
        weights: The members' weights; equal by default.
        **settings: The rest of what a PredictiveDistribution takes.

    Attributes:
        members: The members' predictive distributions.
    """

    def __init__(
        self,
        members: Sequence[PredictiveDistribution],
        space: TargetSpace,
        integrator: Integrator,
        weights: Sequence[float] | None = None,
        **settings: Any,
    ) -> None:
        self.members = list(members)
        self._log_weights = _log_weights(weights, len(self.members))
        self._log_z: Tensor | None = None
        super().__init__(self._mixed, members[0].batch_shape[0], space, integrator, **settings)

    def select(self, rows: Any) -> PredictiveDistribution:
        """The distribution of some rows, which computes its own nodes."""
        members = [p.select(rows) for p in self.members]
        return type(self)(members, self.space, self.integrator, self._log_weights.exp().tolist(), **self.settings)

    def _mixed(self, rows: Rows) -> Any:
        # The same interface by another class: the type checker need not know.
        energies = [p.energy(rows) for p in self.members]
        return EnsembleEnergy(energies, partial(self._log_partitions, rows), self._log_weights)

    def _log_partitions(self, rows: Rows) -> Tensor:
        """Log Z of the members, (n, B); computed once, for all rows."""
        if self.differentiable and torch.is_grad_enabled():
            everything = slice(0, self.num_rows)
            return torch.stack([p.block(everything).log_partition for p in self.members])[:, rows]
        if self._log_z is None:
            self._log_z = torch.stack([p.log_partition for p in self.members])
        return self._log_z[:, rows]

    def of_members(self, members: Sequence[int], weights: Sequence[float] | None = None) -> EnsembleDistribution:
        """The mixture of some of the members, which keep what they have computed.

        Args:
            members: Their numbers.
            weights: Their weights, which sum to 1; equal by default.
        """
        chosen = [self.members[number] for number in members]
        return EnsembleDistribution(chosen, self.space, self.integrator, weights, **self.settings)

    def out_of_fold(self, y: Any, sample_weight: Any = None) -> OutOfFold:
        """What the members say of targets of rows that none of them has been trained on.

        Args:
            y: Targets, shape (B, D), or (B,) for D = 1.
            sample_weight: How many rows each stands for, shape (B,).
        """
        targets = self.as_targets(y)
        return OutOfFold(torch.stack([member.log_prob(targets) for member in self.members]), None, sample_weight)

    def uncertainty(self) -> Uncertainty:
        """Split entropy and variance into what the data leave open and what the members disagree on.

        All entropies come from the same nodes, those of the mixture; so the mutual information is no difference of
        large numbers, and never negative.
        """

        def entropies(block: RowBlock) -> Tensor:
            jacobian = block.jacobian(block.nodes.y)
            assert isinstance(block.f, EnsembleEnergy)
            log_p = block.f.member_log_densities(block.nodes.y.to(self.dtype))
            weights = self._log_weights.to(log_p).reshape(-1, *[1] * (log_p.ndim - 1))
            log_mean = (log_p + weights).logsumexp(0)
            shares = (log_p - log_mean).nan_to_num(-math.inf).exp()
            # 0 log 0 = 0
            mutual = (weights.exp() * torch.where(shares > 0, shares * (log_p - log_mean), 0.0)).sum(0)
            masses = block.masses
            total = -torch.where(masses > 0, masses * (log_mean + jacobian), 0.0).sum(0)
            epistemic = torch.where(masses > 0, masses * mutual, 0.0).sum(0)
            return torch.stack([total, total - epistemic, epistemic], -1)

        total, aleatoric, epistemic = self.gather(entropies).to(self.dtype).unbind(-1)
        means, shares = torch.stack([p.mean for p in self.members]), self._log_weights.exp()

        def average(values: Tensor) -> Tensor:
            return (shares.to(values)[:, None, None] * values).sum(0)

        inner = average(torch.stack([p.variance for p in self.members]))
        between = average((means - average(means)).square())
        if any(self.space.periodic):
            angle = torch.tensor(self.space.periodic, device=self.device)
            between = torch.where(angle, self.variance - inner, between)
        return Uncertainty(total, aleatoric, epistemic, inner + between, inner, between)
