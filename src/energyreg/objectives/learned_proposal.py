"""Objectives with a learned proposal: those that train f with its samples, and those of the proposal alone."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.distributions import Distribution

from energyreg.checks import check_count
from energyreg.inference.energy import AnyEnergy
from energyreg.inference.integrators import ImportanceSampling
from energyreg.objectives import losses
from energyreg.objectives.contract import Loss, check_weights, checked_loss, target_first, weight_diagnostics

__all__ = [
    "LearnedProposalObjective",
    "MaximumLikelihoodWithLearnedProposal",
    "NCEWithLearnedProposal",
    "ProposalKL",
    "ProposalNLL",
    "SelfNormalisedLikelihood",
]


def _require_proposal(q: Distribution | None, objective: str) -> Distribution:
    if q is None:
        raise ValueError(f"{objective} needs a proposal q(y|x), but the model has none; pass proposal= to the model.")
    return q


class _Sampled(NamedTuple):
    """f and log q at the targets (B,) and at samples of q (M, B), which carry no gradient."""

    f_target: Tensor
    f_samples: Tensor
    log_q_target: Tensor
    log_q_samples: Tensor


@dataclass(frozen=True)
class LearnedProposalObjective(ABC):
    """An objective that trains f with samples of the proposal, and the proposal by J_KL, its own likelihood, or both.

    The loss of f sends no gradient to q, nor the loss of q to f: samples and log q in the one, f in the other are
    detached.

    Args:
        num_samples: Samples M of the proposal per example.
        kl_weight: Weight of J_KL, which draws q towards the energy-based density. It adds its gradient, not its value.
        nll_weight: Weight of the proposal's own negative log-likelihood.

    Raises:
        ValueError: If num_samples is not a whole number ≥ 1, a weight is negative, or both are zero.
    """

    num_samples: int = 256
    kl_weight: float = 1.0
    nll_weight: float = 0.0

    def __post_init__(self) -> None:
        """Check the arguments."""
        check_count("num_samples", self.num_samples)
        check_weights(kl_weight=self.kl_weight, nll_weight=self.nll_weight)
        if not self.kl_weight + self.nll_weight:
            raise ValueError(
                "kl_weight and nll_weight are both 0, so that the proposal would never learn; raise one of them."
            )

    @abstractmethod
    def energy_loss(self, s: _Sampled) -> Tensor:
        """Return the loss of f at the targets and samples, shape (B,); log q is detached."""

    def __call__(
        self, f: AnyEnergy, q: Distribution | None, y: Tensor, *, generator: torch.Generator | None = None
    ) -> Loss:
        """Return the loss for targets y in model space, shape (B, D)."""
        q = _require_proposal(q, type(self).__name__)
        samples = ImportanceSampling(self.num_samples).sample(q, generator=generator)
        points = torch.cat([y[None], samples])
        s = _Sampled(*target_first(f(points)), *target_first(q.log_prob(points)))
        energy_loss = self.energy_loss(
            _Sampled(s.f_target, s.f_samples, s.log_q_target.detach(), s.log_q_samples.detach())
        )
        loss = energy_loss + self._proposal_loss(s)
        log_weights = s.f_samples - s.log_q_samples - math.log(len(s.f_samples))
        diagnostics = {**weight_diagnostics(s.f_target, log_weights), **self._own_diagnostics(energy_loss)}
        return checked_loss(loss, diagnostics, q=s.log_q_target, f=(s.f_target, s.f_samples))

    def _proposal_loss(self, s: _Sampled) -> Tensor:
        loss = torch.zeros_like(s.log_q_target)
        if self.kl_weight:
            # Its gradient is what counts: its value estimates log Z, which would blur that of the loss.
            kl = losses.proposal_kl(s.f_samples, s.log_q_samples)
            loss = loss + self.kl_weight * (kl - kl.detach())
        if self.nll_weight:
            loss = loss + self.nll_weight * losses.proposal_nll(s.log_q_target)
        return loss

    def _own_diagnostics(self, energy_loss: Tensor) -> dict[str, Tensor]:
        return {}


@dataclass(frozen=True)
class NCEWithLearnedProposal(LearnedProposalObjective):
    """NCE for f with the proposal as noise, and J_KL (or its likelihood, or both) for the proposal, as in paper IV.

    With both weights ½ and a proposal that has a network of its own
    (:class:`~energyreg.networks.encoders.TwinEncoder`), it is paper IV's mixture with an energy-based teacher; the
    mixture is then ``model.proposal_model()``.

    The arguments are those of :class:`LearnedProposalObjective`.

    Source:
        Gustafsson et al., "Learning proposals for practical energy-based regression", AISTATS 2022, as in its code
        (weights 1 and 0).
    """

    def energy_loss(self, s: _Sampled) -> Tensor:
        """NCE with the proposal as noise."""
        return losses.nce(s.f_target, s.f_samples, s.log_q_target, s.log_q_samples)

    def _own_diagnostics(self, energy_loss: Tensor) -> dict[str, Tensor]:
        return {"target_share": (-energy_loss).exp()}


@dataclass(frozen=True)
class MaximumLikelihoodWithLearnedProposal(LearnedProposalObjective):
    """Maximum likelihood for f with the partition function by importance sampling from the learned proposal.

    With kl_weight = 1 this is the joint objective J(θ, φ) of paper IV: one value, log Z by importance sampling minus f,
    whose gradient in θ is that of the likelihood and whose gradient in φ is that of J_KL.

    The arguments are those of :class:`LearnedProposalObjective`.

    Source:
        Gustafsson et al., ECCV 2020 (ML-IS) and AISTATS 2022 (the proposal).
    """

    def energy_loss(self, s: _Sampled) -> Tensor:
        """Log Z by importance sampling, minus f."""
        return losses.maximum_likelihood_importance_sampling(s.f_target, s.f_samples, s.log_q_samples)


@dataclass(frozen=True)
class SelfNormalisedLikelihood(LearnedProposalObjective):
    """Self-normalised likelihood: an unbiased upper bound of the negative log-likelihood, for any number of samples.

    f must be able to move by a learned log-normaliser b(x): wrap the head in
    :class:`~energyreg.networks.heads.SelfNormalisedHead`. At the optimum log Z(x) = 0, so that f itself is log p(y|x).

    The arguments are those of :class:`LearnedProposalObjective`; by default the proposal learns by its own likelihood.

    Source:
        Senetaire et al., arXiv 2503.07021.
    """

    kl_weight: float = 0.0
    nll_weight: float = 1.0

    def energy_loss(self, s: _Sampled) -> Tensor:
        """The bound."""
        return losses.self_normalised_likelihood(s.f_target, s.f_samples, s.log_q_samples)


@dataclass(frozen=True)
class ProposalKL:
    """J_KL alone: draws the proposal to a given f, which stays as it is.

    The loss has the gradient of J_KL and the value of a self-normalised estimate of KL(p || q), between 0 and log M.

    Args:
        num_samples: Samples M of the proposal per example.

    Raises:
        ValueError: If num_samples is not a whole number ≥ 1.

    Source:
        Gustafsson et al., AISTATS 2022.
    """

    num_samples: int = 256

    def __post_init__(self) -> None:
        """Check the arguments."""
        check_count("num_samples", self.num_samples)

    def __call__(
        self, f: AnyEnergy, q: Distribution | None, y: Tensor, *, generator: torch.Generator | None = None
    ) -> Loss:
        """Return the loss; the targets y in model space, shape (B, D), give the diagnostics only."""
        q = _require_proposal(q, "ProposalKL")
        samples = ImportanceSampling(self.num_samples).sample(q, generator=generator)
        with torch.no_grad():
            f_target, f_samples = f(y), f(samples)
        log_q = q.log_prob(samples)
        kl = losses.proposal_kl(f_samples, log_q)
        log_weights = (f_samples - log_q.detach()).log_softmax(0)
        weights = log_weights.exp()
        # 0 log 0 = 0
        value = torch.where(weights > 0, weights * log_weights, torch.zeros_like(weights)).sum(0)
        loss = kl - kl.detach() + value + math.log(self.num_samples)
        diagnostics = weight_diagnostics(f_target, f_samples - log_q.detach() - math.log(self.num_samples))
        return checked_loss(loss, diagnostics, f=f_samples)


@dataclass(frozen=True)
class ProposalNLL:
    """The proposal's own negative log-likelihood: trains a mixture density network, or any proposal, by itself."""

    def __call__(
        self, f: AnyEnergy | None, q: Distribution | None, y: Tensor, *, generator: torch.Generator | None = None
    ) -> Loss:
        """Return the loss for targets y in model space, shape (B, D)."""
        loss = losses.proposal_nll(_require_proposal(q, "ProposalNLL").log_prob(y))
        return checked_loss(loss, {"log_q_target": -loss}, q=-loss)
