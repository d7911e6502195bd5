"""Training objectives: (f, q, y) to a loss per example. They say what to sample, how many, and which loss.

All have one contract: ``objective(f, q, y, generator=...)`` returns a :class:`Loss`. f is any function of y that knows
its rows (an :class:`~energyreg.inference.energy.EnergyFunction`, or your own), q the proposal or None, y the targets in
model space. None sees a model.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.distributions import Distribution

from energyreg.checks import check_count
from energyreg.densities.angles import wrap_angles
from energyreg.densities.noise import GaussianNoise
from energyreg.inference.energy import AnyEnergy, periodic_of, require_reference
from energyreg.inference.integrators import ImportanceSampling, StratifiedQuadrature
from energyreg.inference.mcmc import Langevin
from energyreg.inference.points import half_disagreement
from energyreg.objectives import losses

__all__ = [
    "DenoisingScoreMatching",
    "ExactMaximumLikelihood",
    "KLDImportanceSampling",
    "Loss",
    "MaximumLikelihoodImportanceSampling",
    "MaximumLikelihoodMCMC",
    "MaximumLikelihoodWithLearnedProposal",
    "NCE",
    "NCEWithLearnedProposal",
    "NonFiniteLossError",
    "ProposalKL",
    "ProposalNLL",
    "ScoreMatching",
    "SelfNormalisedLikelihood",
]


class Loss(NamedTuple):
    """What an objective returns.

    Attributes:
        per_example: The loss of each example, in nats, shape (B,).
        diagnostics: Named quantities of each example, without gradient, shape (B,).
    """

    per_example: Tensor
    diagnostics: dict[str, Tensor]


class NonFiniteLossError(ValueError):
    """A loss is not finite: f or q is NaN or infinite somewhere, or q has no density at a target.

    Attributes:
        loss: The loss as it is.
    """

    def __init__(self, message: str, loss: Loss) -> None:
        super().__init__(message)
        self.loss = loss


def _finish(per_example: Tensor, diagnostics: dict[str, Tensor], **parts: Tensor | Sequence[Tensor]) -> Loss:
    """The loss, unless it is not finite: then an error that says which part of it is not, and in how many rows.

    Args:
        per_example: The loss of each example.
        diagnostics: What comes with it.
        **parts: Ingredients by the name of the argument that they came from: q at the targets, f at the targets first.
    """
    loss = Loss(per_example, {name: value.detach() for name, value in diagnostics.items()})
    # On a GPU this question would wait for the step; `fit` looks at many losses at once, later.
    if per_example.is_cuda or bool(per_example.isfinite().all()):
        return loss
    rows, found = per_example.numel(), []
    for name, part in parts.items():
        values = [value.detach() for value in ([part] if isinstance(part, Tensor) else part)]
        nowhere = int((values[0] == -torch.inf).sum()) if values[0].ndim == 1 else 0
        if nowhere and name == "q":
            found.append(
                f"q has no density at the target in {nowhere} of {rows} rows ({nowhere / rows:.1%}): give it support "
                "wherever a target may be, e.g. by a broad component"
            )
        elif nowhere and name == "f":
            found.append(
                f"f is -inf at the target in {nowhere} of {rows} rows ({nowhere / rows:.1%}): its base has no density "
                "there"
            )
        wrong = sum(int((value.isnan() | (value == torch.inf)).sum()) for value in values)
        if wrong:
            found.append(f"{name} is NaN or infinite at {wrong} of {sum(value.numel() for value in values)} points")
    bad = int((~per_example.isfinite()).sum())
    reason = "; ".join(found) or "f is -inf at every sample of a row, or the loss itself has overflowed"
    raise NonFiniteLossError(f"The loss of {bad} of {rows} rows is not finite: {reason}.", loss)


def _check_weights(**weights: float) -> None:
    for name, weight in weights.items():
        if not isinstance(weight, (int, float, np.number)) or not 0 <= weight < math.inf:
            raise ValueError(f"{name} is {weight!r}; expected a finite number ≥ 0.")


def _check_noise(noise: GaussianNoise) -> None:
    if not isinstance(noise, GaussianNoise):
        raise TypeError(f"noise is a {type(noise).__name__}; expected an energyreg.noise.GaussianNoise.")


def _check_angles(noise: GaussianNoise, f: AnyEnergy, dim: int) -> None:
    """Noise that took an angle for a real number would have a wrong density beyond the cut, and say nothing."""
    periodic_of(f, dim, noise.periodic or (False,) * dim, name="noise.periodic")


def _check_scale(name: str, scale: float | Sequence[float]) -> float | tuple[float, ...]:
    """The scale as a number or a tuple, so that the objective stays a value."""
    try:
        values = torch.as_tensor(scale, dtype=torch.double)
    except (TypeError, ValueError, RuntimeError):
        values = torch.full((1, 1), torch.nan)
    if values.ndim > 1 or not values.numel() or not bool(((values > 0) & values.isfinite()).all()):
        raise ValueError(f"{name} is {scale}; expected a finite number > 0, or one per target dimension.")
    return tuple(values.tolist()) if values.ndim else float(values)


def _check_length(name: str, scale: float | Sequence[float], dim: int) -> None:
    if isinstance(scale, tuple) and len(scale) != dim:
        raise ValueError(f"{name} has {len(scale)} numbers, but y has {dim} dimensions.")


def _require_proposal(q: Distribution | None, objective: str) -> Distribution:
    if q is None:
        raise ValueError(f"{objective} needs a proposal q(y|x), but the model has none; pass proposal= to the model.")
    return q


def _target_first(values: Tensor) -> tuple[Tensor, Tensor]:
    """Values at the target, (B,), and at the samples behind it, (M, B), which went through f in one pass."""
    target, samples = values.split([1, len(values) - 1])
    return target[0], samples


def _weight_diagnostics(f_target: Tensor, log_weights: Tensor) -> dict[str, Tensor]:
    """What the weights of independent samples say, as :class:`~energyreg.inference.points.WeightedPoints` does."""
    with torch.no_grad():
        log_weights = log_weights.detach()
        log_z = log_weights.logsumexp(0)
        # Kish's effective sample size from Σ w², and the delta method's variance of log Z, which is Σ w² - 1/M over
        # (M - 1)/M for normalised weights w.
        second = (2 * (log_weights - log_z)).exp_().sum(0)
        m = len(log_weights)
        stderr = ((second - 1 / m).clamp_min(0) * m / (m - 1 or math.nan)).sqrt()
        return {
            "f_target": f_target,
            "log_partition": log_z,
            "log_partition_stderr": stderr,
            "effective_sample_size": second.reciprocal(),
        }


class _LogSumExp(torch.autograd.Function):
    """logsumexp over the first dimension, with the shares of the terms, which the gradient needs and diagnostics too.

    torch's own computes them once in each direction, and every diagnostic would once more. Differentiable once.
    """

    @staticmethod
    def forward(ctx: Any, terms: Tensor) -> tuple[Tensor, Tensor]:
        peak = terms.amax(0)
        peak = torch.where(peak.isfinite(), peak, torch.zeros_like(peak))
        shares = (terms - peak).exp_()
        total = shares.sum(0)
        shares /= total
        ctx.save_for_backward(shares)
        ctx.mark_non_differentiable(shares)
        return total.log() + peak, shares

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor, _: Tensor) -> Tensor:
        (shares,) = ctx.saved_tensors
        return shares * gradient


def _share_diagnostics(f_target: Tensor, log_z: Tensor, shares: Tensor) -> dict[str, Tensor]:
    """Diagnostics from the nodes' weights in Z, shape (G, B); see `WeightedPoints`."""
    with torch.no_grad():
        return {
            "f_target": f_target,
            "log_partition": log_z,
            "log_partition_stderr": half_disagreement(shares),
            "effective_sample_size": shares.square().sum(0).reciprocal(),
        }


def _with_proposal(loss: Tensor, q: Distribution | None, y: Tensor, weight: float) -> tuple[Tensor, dict[str, Tensor]]:
    """Add the proposal's own likelihood where the model has a proposal that nothing else would train.

    Returns:
        The loss, and log q at the targets where it was added, for messages.
    """
    if q is None or not weight:
        return loss, {}
    log_q = q.log_prob(y)
    return loss + weight * losses.proposal_nll(log_q), {"q": log_q}


# Quadrature ----------------------------------------------------------------------------------------------------------


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
        self, f: AnyEnergy, q: Distribution | None, y: Tensor, *, generator: torch.Generator | None = None
    ) -> Loss:
        """Return the loss for targets y in model space, shape (B, D).

        Raises:
            ValueError: If D > 2, where a grid would be too coarse to be called exact.
        """
        if y.shape[-1] > 2:
            raise ValueError(
                f"y has {y.shape[-1]} dimensions, but quadrature serves at most 2; use NCEWithLearnedProposal or "
                "MaximumLikelihoodWithLearnedProposal with a proposal."
            )
        f = require_reference(f, "ExactMaximumLikelihood")
        u, log_node_weights = StratifiedQuadrature(self.num_nodes).nodes(f, generator=generator)
        f_target, relative = f.target_and_relative(y, u)
        log_sum, shares = _LogSumExp.apply(relative)
        log_z = log_sum + log_node_weights[0]  # the nodes' weights are equal
        loss, own = _with_proposal(log_z - f_target, q, y, self.proposal_weight)
        return _finish(loss, _share_diagnostics(f_target, log_z, shares), f=f_target, Z=log_z, **own)


# Noise around the target ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class MaximumLikelihoodImportanceSampling:
    """Maximum likelihood with the partition function by importance sampling from noise around the target (ML-IS).

    Biased low by about half the relative variance of the estimate of Z, which falls as 1/M.

    Args:
        noise: Noise around the target, which is the importance sampler.
        num_samples: Samples M per example.
        proposal_weight: Weight of the proposal's own negative log-likelihood, where the model has a proposal.

    Raises:
        ValueError: If num_samples is not a whole number ≥ 1 or proposal_weight is negative.
        TypeError: If noise is of another type.

    Source:
        Gustafsson et al., ECCV 2020.
    """

    noise: GaussianNoise
    num_samples: int = 256
    proposal_weight: float = 1.0

    def __post_init__(self) -> None:
        """Check the arguments."""
        _check_noise(self.noise)
        check_count("num_samples", self.num_samples)
        _check_weights(proposal_weight=self.proposal_weight)

    def __call__(
        self, f: AnyEnergy, q: Distribution | None, y: Tensor, *, generator: torch.Generator | None = None
    ) -> Loss:
        """Return the loss for targets y in model space, shape (B, D)."""
        _check_angles(self.noise, f, y.shape[-1])
        samples = self.noise.sample(y, self.num_samples, generator=generator)
        log_noise = self.noise.log_prob(samples, y)
        f_target, f_samples = _target_first(f(torch.cat([y[None], samples])))
        loss = losses.maximum_likelihood_importance_sampling(f_target, f_samples, log_noise)
        loss, own = _with_proposal(loss, q, y, self.proposal_weight)
        diagnostics = _weight_diagnostics(f_target, f_samples - log_noise - math.log(self.num_samples))
        return _finish(loss, diagnostics, f=(f_target, f_samples), **own)


@dataclass(frozen=True)
class KLDImportanceSampling:
    """KL divergence from a Gaussian label density around the target to the model, by importance sampling (KLD-IS).

    It treats the label as uncertain: what it learns is the conditional density convolved with that Gaussian.

    Args:
        noise: Noise around the target, which is the importance sampler.
        label_scale: Standard deviation of the label density in model space, a number or one per dimension.
        num_samples: Samples M per example.
        self_normalised: Whether the weights of the second term are normalised; see
            :func:`~energyreg.objectives.losses.kld_importance_sampling`.
        proposal_weight: Weight of the proposal's own negative log-likelihood, where the model has a proposal.

    Raises:
        ValueError: If num_samples is not a whole number ≥ 1, label_scale is not > 0, or proposal_weight is negative.
        TypeError: If noise is of another type.

    Source:
        Gustafsson et al., BMVC 2020.
    """

    noise: GaussianNoise
    label_scale: float | Sequence[float]
    num_samples: int = 256
    self_normalised: bool = True
    proposal_weight: float = 1.0

    def __post_init__(self) -> None:
        """Check the arguments."""
        _check_noise(self.noise)
        object.__setattr__(self, "label_scale", _check_scale("label_scale", self.label_scale))
        check_count("num_samples", self.num_samples)
        _check_weights(proposal_weight=self.proposal_weight)

    def __call__(
        self, f: AnyEnergy, q: Distribution | None, y: Tensor, *, generator: torch.Generator | None = None
    ) -> Loss:
        """Return the loss for targets y in model space, shape (B, D)."""
        _check_length("label_scale", self.label_scale, y.shape[-1])
        label = GaussianNoise(np.atleast_2d(self.label_scale).tolist(), self.noise.periodic)
        _check_angles(self.noise, f, y.shape[-1])
        samples = self.noise.sample(y, self.num_samples, generator=generator)
        log_noise = self.noise.log_prob(samples, y)
        f_samples = f(samples)
        loss = losses.kld_importance_sampling(f_samples, log_noise, label.log_prob(samples, y), self.self_normalised)
        loss, own = _with_proposal(loss, q, y, self.proposal_weight)
        with torch.no_grad():
            f_target = f(y)
        diagnostics = _weight_diagnostics(f_target, f_samples - log_noise - math.log(self.num_samples))
        return _finish(loss, diagnostics, f=f_samples, **own)


@dataclass(frozen=True)
class NCE:
    """Ranking noise contrastive estimation with noise around the target; with beta > 0 it is NCE+.

    As the noise is centred at the target, its samples give a hint at which point that is: the estimate is biased by an
    amount that falls as 1/M, as is that of ML-IS. Noise that does not depend on the target,
    :class:`NCEWithLearnedProposal`, has no such bias.

    NCE+ takes for the positive not the target but a point near it, drawn from the noise with its scales multiplied by
    beta, while the noise stays centred at the target and its density is the one with the unscaled scales.

    Args:
        noise: Noise around the target.
        num_samples: Noise samples M per example.
        beta: Scale of the positive's noise, relative to the noise's own; 0 for plain NCE.
        proposal_weight: Weight of the proposal's own negative log-likelihood, where the model has a proposal.

    Raises:
        ValueError: If num_samples is not a whole number ≥ 1, or beta or proposal_weight is negative.
        TypeError: If noise is of another type.

    Source:
        Gustafsson et al., BMVC 2020 (NCE+); ECCV 2020.
    """

    noise: GaussianNoise
    num_samples: int = 256
    beta: float = 0.0
    proposal_weight: float = 1.0

    def __post_init__(self) -> None:
        """Check the arguments."""
        _check_noise(self.noise)
        check_count("num_samples", self.num_samples)
        _check_weights(beta=self.beta, proposal_weight=self.proposal_weight)

    def __call__(
        self, f: AnyEnergy, q: Distribution | None, y: Tensor, *, generator: torch.Generator | None = None
    ) -> Loss:
        """Return the loss for targets y in model space, shape (B, D)."""
        _check_angles(self.noise, f, y.shape[-1])
        samples = self.noise.sample(y, self.num_samples, generator=generator)
        positive = self._positive(y, generator)
        points = torch.cat([positive[None], samples])
        f_target, f_samples = _target_first(f(points))
        log_noise_target, log_noise = _target_first(self.noise.log_prob(points, y))
        loss = losses.nce(f_target, f_samples, log_noise_target, log_noise)
        diagnostics = _weight_diagnostics(f_target, f_samples - log_noise - math.log(self.num_samples))
        diagnostics["target_share"] = (-loss).exp()
        loss, own = _with_proposal(loss, q, y, self.proposal_weight)
        return _finish(loss, diagnostics, f=(f_target, f_samples), **own)

    def _positive(self, y: Tensor, generator: torch.Generator | None) -> Tensor:
        if not self.beta:
            return y
        scales = [[self.beta * scale for scale in row] for row in self.noise.scales]  # type: ignore[union-attr]
        near = GaussianNoise(scales, self.noise.periodic, stratified=False)
        return near.sample(y, 1, generator=generator)[0]


# The proposal as noise -----------------------------------------------------------------------------------------------


class _Sampled(NamedTuple):
    f_target: Tensor
    f_samples: Tensor
    log_q_target: Tensor
    log_q_samples: Tensor

    def diagnostics(self) -> dict[str, Tensor]:
        log_weights = self.f_samples - self.log_q_samples - math.log(len(self.f_samples))
        return _weight_diagnostics(self.f_target, log_weights)

    def finish(self, loss: Tensor, diagnostics: dict[str, Tensor]) -> Loss:
        return _finish(loss, diagnostics, q=self.log_q_target, f=(self.f_target, self.f_samples))


def _sample(f: AnyEnergy, q: Distribution, y: Tensor, num_samples: int, generator: torch.Generator | None) -> _Sampled:
    """Evaluate f and q at the target and at samples of q, in one pass each; the samples carry no gradient."""
    samples = ImportanceSampling(num_samples).sample(q, generator=generator)
    points = torch.cat([y[None], samples])
    return _Sampled(*_target_first(f(points)), *_target_first(q.log_prob(points)))


def _proposal_loss(s: _Sampled, kl_weight: float, nll_weight: float) -> Tensor:
    loss = torch.zeros_like(s.log_q_target)
    if kl_weight:
        # Its gradient is what counts: its value estimates log Z, which would blur that of the loss.
        kl = losses.proposal_kl(s.f_samples, s.log_q_samples)
        loss = loss + kl_weight * (kl - kl.detach())
    if nll_weight:
        loss = loss + nll_weight * losses.proposal_nll(s.log_q_target)
    return loss


def _check_learned(num_samples: int, kl_weight: float, nll_weight: float) -> None:
    check_count("num_samples", num_samples)
    _check_weights(kl_weight=kl_weight, nll_weight=nll_weight)
    if not kl_weight + nll_weight:
        raise ValueError(
            "kl_weight and nll_weight are both 0, so that the proposal would never learn; raise one of them."
        )


@dataclass(frozen=True)
class NCEWithLearnedProposal:
    """NCE for f with the proposal as noise, and J_KL (or its likelihood, or both) for the proposal, as in paper IV.

    The gradient of the NCE term reaches f alone, that of the proposal's terms q alone: the samples and log q in the
    former, and f in the latter, are detached.

    With both weights ½ and a proposal that has a network of its own
    (:class:`~energyreg.networks.encoders.TwinEncoder`), it is paper IV's mixture with an energy-based teacher; the
    mixture is then ``model.proposal_model()``.

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
        _check_learned(self.num_samples, self.kl_weight, self.nll_weight)

    def __call__(
        self, f: AnyEnergy, q: Distribution | None, y: Tensor, *, generator: torch.Generator | None = None
    ) -> Loss:
        """Return the loss for targets y in model space, shape (B, D)."""
        s = _sample(f, _require_proposal(q, "NCEWithLearnedProposal"), y, self.num_samples, generator)
        nce = losses.nce(s.f_target, s.f_samples, s.log_q_target.detach(), s.log_q_samples.detach())
        loss = nce + _proposal_loss(s, self.kl_weight, self.nll_weight)
        return s.finish(loss, {**s.diagnostics(), "target_share": (-nce).exp()})


@dataclass(frozen=True)
class MaximumLikelihoodWithLearnedProposal:
    """Maximum likelihood for f with the partition function by importance sampling from the learned proposal.

    With kl_weight = 1 this is the joint objective J(θ, φ) of paper IV: one value, log Z by importance sampling minus f,
    whose gradient in θ is that of the likelihood and whose gradient in φ is that of J_KL.

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
        _check_learned(self.num_samples, self.kl_weight, self.nll_weight)

    def __call__(
        self, f: AnyEnergy, q: Distribution | None, y: Tensor, *, generator: torch.Generator | None = None
    ) -> Loss:
        """Return the loss for targets y in model space, shape (B, D)."""
        s = _sample(f, _require_proposal(q, "MaximumLikelihoodWithLearnedProposal"), y, self.num_samples, generator)
        loss = losses.maximum_likelihood_importance_sampling(s.f_target, s.f_samples, s.log_q_samples.detach())
        return s.finish(loss + _proposal_loss(s, self.kl_weight, self.nll_weight), s.diagnostics())


@dataclass(frozen=True)
class SelfNormalisedLikelihood:
    """Self-normalised likelihood: an unbiased upper bound of the negative log-likelihood, for any number of samples.

    f must be able to move by a learned log-normaliser b(x): wrap the head in
    :class:`~energyreg.networks.heads.SelfNormalisedHead`. At the optimum log Z(x) = 0, so that f itself is log p(y|x).

    Args:
        num_samples: Samples M of the proposal per example.
        kl_weight: Weight of J_KL for the proposal.
        nll_weight: Weight of the proposal's own negative log-likelihood.

    Raises:
        ValueError: If num_samples is not a whole number ≥ 1, a weight is negative, or both are zero.

    Source:
        Senetaire et al., arXiv 2503.07021.
    """

    num_samples: int = 256
    kl_weight: float = 0.0
    nll_weight: float = 1.0

    def __post_init__(self) -> None:
        """Check the arguments."""
        _check_learned(self.num_samples, self.kl_weight, self.nll_weight)

    def __call__(
        self, f: AnyEnergy, q: Distribution | None, y: Tensor, *, generator: torch.Generator | None = None
    ) -> Loss:
        """Return the loss for targets y in model space, shape (B, D)."""
        s = _sample(f, _require_proposal(q, "SelfNormalisedLikelihood"), y, self.num_samples, generator)
        loss = losses.self_normalised_likelihood(s.f_target, s.f_samples, s.log_q_samples.detach())
        return s.finish(loss + _proposal_loss(s, self.kl_weight, self.nll_weight), s.diagnostics())


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
        diagnostics = _weight_diagnostics(f_target, f_samples - log_q.detach() - math.log(self.num_samples))
        return _finish(loss, diagnostics, f=f_samples)


@dataclass(frozen=True)
class ProposalNLL:
    """The proposal's own negative log-likelihood: trains a mixture density network, or any proposal, by itself."""

    def __call__(
        self, f: AnyEnergy | None, q: Distribution | None, y: Tensor, *, generator: torch.Generator | None = None
    ) -> Loss:
        """Return the loss for targets y in model space, shape (B, D)."""
        loss = losses.proposal_nll(_require_proposal(q, "ProposalNLL").log_prob(y))
        return _finish(loss, {"log_q_target": -loss}, q=-loss)


# Gradients of f in y -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class MaximumLikelihoodMCMC:
    """Maximum likelihood with samples of the model from L Langevin steps that start at the target (ML-MCMC-L).

    Short chains do not reach the model's density, so this is contrastive divergence: biased for any finite L.

    Args:
        num_steps: Langevin steps L.
        step_size: Their size λ in model space, a number or one per dimension.
        num_chains: Chains M per example.
        proposal_weight: Weight of the proposal's own negative log-likelihood, where the model has a proposal.

    Raises:
        ValueError: If a count is not a whole number ≥ 1, step_size is not > 0, or proposal_weight is negative.

    Source:
        Gustafsson et al., BMVC 2020 (ML-MCMC).
    """

    num_steps: int
    step_size: float | Sequence[float]
    num_chains: int = 256
    proposal_weight: float = 1.0

    def __post_init__(self) -> None:
        """Check the arguments."""
        check_count("num_steps", self.num_steps)
        check_count("num_chains", self.num_chains)
        object.__setattr__(self, "step_size", _check_scale("step_size", self.step_size))
        _check_weights(proposal_weight=self.proposal_weight)

    def __call__(
        self, f: AnyEnergy, q: Distribution | None, y: Tensor, *, generator: torch.Generator | None = None
    ) -> Loss:
        """Return the loss for targets y in model space, shape (B, D)."""
        sampler = Langevin(num_steps=self.num_steps, step_size=self.step_size, num_chains=self.num_chains)
        samples = sampler.sample(f, y, generator=generator)
        f_target, f_samples = f(y), f(samples)
        loss = losses.maximum_likelihood_mcmc(f_target, f_samples)
        loss, own = _with_proposal(loss, q, y, self.proposal_weight)
        diagnostics = {"f_target": f_target, "f_samples": f_samples.mean(0)}
        return _finish(loss, diagnostics, f=(f_target, f_samples), **own)


def _score(f: AnyEnergy, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """y as a leaf, f and its gradient in y with a graph for the parameters."""
    with torch.enable_grad():
        leaf = y.detach().requires_grad_(True)
        value = f(leaf)
        score = _derivative(value.sum(), leaf)
    return leaf, value, score


def _derivative(of: Tensor, y: Tensor) -> Tensor:
    """Gradient in y with a graph; zero where there is no dependence, as the score of a straight line has none."""
    gradient = None
    if of.requires_grad:
        (gradient,) = torch.autograd.grad(of, y, create_graph=True, allow_unused=True)
    return torch.zeros_like(y) if gradient is None else gradient


@dataclass(frozen=True)
class ScoreMatching:
    """Score matching: the gradient of f in y learns that of the log-density; no samples, no partition function.

    Blind to the masses of modes that are far apart, and wrong where the density ends abruptly (a window, a border).

    Args:
        num_probes: Random probes of Hutchinson's estimator of the trace; None for the exact trace, with one backward
            pass per dimension.
        proposal_weight: Weight of the proposal's own negative log-likelihood, where the model has a proposal.

    Raises:
        ValueError: If num_probes is not None or a whole number ≥ 1, or proposal_weight is negative.

    Source:
        Hyvärinen, JMLR 2005; Gustafsson et al., BMVC 2020; Song et al., UAI 2019 (random projections of the trace).
    """

    num_probes: int | None = None
    proposal_weight: float = 1.0

    def __post_init__(self) -> None:
        """Check the arguments."""
        if self.num_probes is not None:
            check_count("num_probes", self.num_probes)
        _check_weights(proposal_weight=self.proposal_weight)

    def __call__(
        self, f: AnyEnergy, q: Distribution | None, y: Tensor, *, generator: torch.Generator | None = None
    ) -> Loss:
        """Return the loss for targets y in model space, shape (B, D)."""
        leaf, value, score = _score(f, y)
        with torch.enable_grad():
            if self.num_probes is None:
                trace = sum(_derivative(score[:, d].sum(), leaf)[:, d] for d in range(y.shape[1]))
            else:
                source = generator.device if generator is not None else y.device
                shape = (self.num_probes, *y.shape)
                # Signs have the smallest variance of all probes: only what is off the diagonal is random.
                probes = torch.randint(2, shape, generator=generator, device=source).to(y) * 2 - 1
                trace = sum(
                    (_derivative((score * probe).sum(), leaf) * probe).sum(-1)
                    for probe in probes
                ) / len(probes)  # fmt: skip
            assert isinstance(trace, Tensor)
            loss = losses.score_matching(score, trace)
        loss, own = _with_proposal(loss, q, y, self.proposal_weight)
        diagnostics = {"f_target": value, "score_norm": score.norm(dim=-1)}
        return _finish(loss, diagnostics, f=value, score=score.sum(-1), trace=trace, **own)


@dataclass(frozen=True)
class DenoisingScoreMatching:
    """Denoising score matching: f learns the conditional density convolved with Gaussian noise.

    Args:
        scale: Standard deviation σ of the noise in model space, a number or one per dimension.
        num_samples: Noisy targets M per example.
        proposal_weight: Weight of the proposal's own negative log-likelihood, where the model has a proposal.

    Raises:
        ValueError: If scale is not > 0, num_samples is not a whole number ≥ 1, or proposal_weight is negative.

    Source:
        Vincent, Neural Computation 2011; Gustafsson et al., BMVC 2020.
    """

    scale: float | Sequence[float]
    num_samples: int = 256
    proposal_weight: float = 1.0

    def __post_init__(self) -> None:
        """Check the arguments."""
        object.__setattr__(self, "scale", _check_scale("scale", self.scale))
        check_count("num_samples", self.num_samples)
        _check_weights(proposal_weight=self.proposal_weight)

    def __call__(
        self, f: AnyEnergy, q: Distribution | None, y: Tensor, *, generator: torch.Generator | None = None
    ) -> Loss:
        """Return the loss for targets y in model space, shape (B, D)."""
        _check_length("scale", self.scale, y.shape[-1])
        scale = torch.as_tensor(self.scale).to(y)
        source = generator.device if generator is not None else y.device
        shape = (self.num_samples, *y.shape)
        normal = torch.randn(shape, generator=generator, dtype=y.dtype, device=source).to(y.device)
        noisy = there = y + scale * normal
        periodic = periodic_of(f, y.shape[-1])
        if any(periodic):
            # f knows angles in [-π, π) alone; the noise stays the way that was gone, however often around.
            angle = torch.tensor(periodic, device=y.device)
            there = wrap_angles(noisy, angle)
        _, value, score = _score(f, there)
        loss = losses.denoising_score_matching(score, noisy, y, scale)
        loss, own = _with_proposal(loss, q, y, self.proposal_weight)
        diagnostics = {"f_noisy": value.mean(0), "score_norm": score.norm(dim=-1).mean(0)}
        return _finish(loss, diagnostics, f=value, score=score.sum(-1), **own)
