"""Training objectives: (f, q, y) to a loss per example. They say what to sample, how many, and which loss."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.distributions import Distribution

from energyreg import losses
from energyreg.energy import EnergyFunction
from energyreg.integrators import ImportanceSampling, StratifiedQuadrature
from energyreg.points import WeightedPoints

__all__ = [
    "ExactMaximumLikelihood",
    "Loss",
    "MaximumLikelihoodImportanceSampling",
    "NCEWithLearnedProposal",
    "ProposalNLL",
]


class Loss(NamedTuple):
    """What an objective returns.

    Attributes:
        per_example: The loss of each example, in nats, shape (B,).
        diagnostics: Named quantities of each example, without gradient, shape (B,).
    """

    per_example: Tensor
    diagnostics: dict[str, Tensor]


def _check_weights(**weights: float) -> None:
    for name, weight in weights.items():
        if not weight >= 0:
            raise ValueError(f"{name} is {weight}; expected a number ≥ 0.")


def _require_proposal(q: Distribution | None, objective: str) -> Distribution:
    if q is None:
        raise ValueError(f"{objective} needs a proposal q(y|x), but the model has none; pass proposal= to the model.")
    return q


def _diagnostics(f_target: Tensor, log_weights: Tensor) -> dict[str, Tensor]:
    with torch.no_grad():
        points = WeightedPoints(log_weights.new_zeros(len(log_weights), 1, 1), log_weights)
        return {
            "f_target": f_target.detach(),
            "log_partition": points.log_partition,
            "effective_sample_size": points.effective_sample_size,
        }


@dataclass(frozen=True)
class ExactMaximumLikelihood:
    """Maximum likelihood with the partition function by quadrature in the unit coordinates of the reference (D ≤ 2).

    Args:
        num_nodes: Quadrature nodes, shared by the rows of a batch and jittered at each step.
        proposal_weight: Weight of the proposal's own negative log-likelihood, where the model has a proposal. With the
            proposal as a detached base this is what trains it.

    Raises:
        ValueError: If num_nodes is not a whole number ≥ 1 or proposal_weight is negative.
    """

    num_nodes: int = 256
    proposal_weight: float = 1.0

    def __post_init__(self) -> None:
        """Check the arguments."""
        _check_weights(proposal_weight=self.proposal_weight)
        StratifiedQuadrature(self.num_nodes)

    def __call__(
        self, f: EnergyFunction, q: Distribution | None, y: Tensor, *, generator: torch.Generator | None = None
    ) -> Loss:
        """Return the loss for targets y in model space, shape (B, D).

        Raises:
            ValueError: If D > 2, where a grid would be too coarse to be called exact.
        """
        if y.shape[-1] > 2:
            raise ValueError(
                f"y has {y.shape[-1]} dimensions, but quadrature serves at most 2; use NCEWithLearnedProposal or "
                "MaximumLikelihoodImportanceSampling with a proposal."
            )
        f_target = f(y)
        log_weights = StratifiedQuadrature(self.num_nodes).log_weights(f, generator=generator)
        loss = losses.maximum_likelihood_quadrature(f_target, log_weights)
        if q is not None and self.proposal_weight:
            loss = loss + self.proposal_weight * losses.proposal_nll(q.log_prob(y))
        return Loss(loss, _diagnostics(f_target, log_weights))


class _Sampled(NamedTuple):
    f_target: Tensor
    f_samples: Tensor
    log_q_target: Tensor
    log_q_samples: Tensor


def _sample(
    f: EnergyFunction, q: Distribution, y: Tensor, num_samples: int, generator: torch.Generator | None
) -> _Sampled:
    """Evaluate f and q at the target and at samples of q, in one pass each; the samples carry no gradient."""
    samples = ImportanceSampling(num_samples).sample(q, generator=generator)
    points = torch.cat([y[None], samples])
    f_points, log_q = f(points), q.log_prob(points)
    return _Sampled(f_points[0], f_points[1:], log_q[0], log_q[1:])


def _proposal_loss(s: _Sampled, kl_weight: float, nll_weight: float) -> Tensor:
    loss = torch.zeros_like(s.log_q_target)
    if kl_weight:
        # Its gradient is what counts: its value estimates log Z, which would blur that of the loss.
        kl = losses.proposal_kl(s.f_samples, s.log_q_samples)
        loss = loss + kl_weight * (kl - kl.detach())
    if nll_weight:
        loss = loss + nll_weight * losses.proposal_nll(s.log_q_target)
    return loss


@dataclass(frozen=True)
class NCEWithLearnedProposal:
    """NCE for f with the proposal as noise, and J_KL (or its likelihood, or both) for the proposal, as in paper IV.

    The gradient of the NCE term reaches f alone, that of the proposal's terms q alone: the samples and log q in the
    former, and f in the latter, are detached.

    Args:
        num_samples: Samples M of the proposal per example.
        kl_weight: Weight of J_KL, which draws q towards the energy-based density. It adds its gradient, not its value.
        nll_weight: Weight of the proposal's own negative log-likelihood.

    Raises:
        ValueError: If num_samples is not a whole number ≥ 1, a weight is negative, or both are zero.

    Source:
        Gustafsson et al., "Learning proposals for practical energy-based regression", AISTATS 2022, as in its code
        (weights 1 and 0).
    """

    num_samples: int = 256
    kl_weight: float = 1.0
    nll_weight: float = 0.0

    def __post_init__(self) -> None:
        """Check the arguments."""
        ImportanceSampling(self.num_samples)
        _check_weights(kl_weight=self.kl_weight, nll_weight=self.nll_weight)
        if not self.kl_weight + self.nll_weight:
            raise ValueError(
                "kl_weight and nll_weight are both 0, so that the proposal would never learn; raise one of them."
            )

    def __call__(
        self, f: EnergyFunction, q: Distribution | None, y: Tensor, *, generator: torch.Generator | None = None
    ) -> Loss:
        """Return the loss for targets y in model space, shape (B, D)."""
        s = _sample(f, _require_proposal(q, "NCEWithLearnedProposal"), y, self.num_samples, generator)
        log_q_target, log_q_samples = s.log_q_target.detach(), s.log_q_samples.detach()
        loss = losses.nce(s.f_target, s.f_samples, log_q_target, log_q_samples)
        loss = loss + _proposal_loss(s, self.kl_weight, self.nll_weight)
        return Loss(loss, _diagnostics(s.f_target, s.f_samples - log_q_samples - math.log(self.num_samples)))


@dataclass(frozen=True)
class MaximumLikelihoodImportanceSampling:
    """Maximum likelihood for f with the partition function by importance sampling from the learned proposal.

    With kl_weight = 1 this is the joint objective of paper IV: one value, log Z by importance sampling minus f, whose
    gradient in θ is that of the likelihood and whose gradient in φ is that of J_KL.

    Args:
        num_samples: Samples M of the proposal per example.
        kl_weight: Weight of J_KL for the proposal.
        nll_weight: Weight of the proposal's own negative log-likelihood.

    Raises:
        ValueError: If num_samples is not a whole number ≥ 1, a weight is negative, or both are zero.

    Source:
        Gustafsson et al., ECCV 2020 (ML-IS) and AISTATS 2022 (the proposal).
    """

    num_samples: int = 256
    kl_weight: float = 1.0
    nll_weight: float = 0.0

    def __post_init__(self) -> None:
        """Check the arguments."""
        NCEWithLearnedProposal(self.num_samples, self.kl_weight, self.nll_weight)

    def __call__(
        self, f: EnergyFunction, q: Distribution | None, y: Tensor, *, generator: torch.Generator | None = None
    ) -> Loss:
        """Return the loss for targets y in model space, shape (B, D)."""
        s = _sample(f, _require_proposal(q, "MaximumLikelihoodImportanceSampling"), y, self.num_samples, generator)
        log_q_samples = s.log_q_samples.detach()
        loss = losses.maximum_likelihood_importance_sampling(s.f_target, s.f_samples, log_q_samples)
        loss = loss + _proposal_loss(s, self.kl_weight, self.nll_weight)
        return Loss(loss, _diagnostics(s.f_target, s.f_samples - log_q_samples - math.log(self.num_samples)))


@dataclass(frozen=True)
class ProposalNLL:
    """The proposal's own negative log-likelihood: trains a mixture density network, or any proposal, by itself."""

    def __call__(
        self, f: EnergyFunction, q: Distribution | None, y: Tensor, *, generator: torch.Generator | None = None
    ) -> Loss:
        """Return the loss for targets y in model space, shape (B, D)."""
        loss = losses.proposal_nll(_require_proposal(q, "ProposalNLL").log_prob(y))
        return Loss(loss, {"log_q_target": -loss.detach()})
