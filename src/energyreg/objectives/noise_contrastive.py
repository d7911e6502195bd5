"""Objectives that contrast the target with noise around it: ML-IS, KLD-IS, NCE and NCE+."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from energyreg.checks import check_count
from energyreg.densities.noise import GaussianNoise
from energyreg.inference.energy import AnyEnergy, periodic_of
from energyreg.objectives import losses
from energyreg.objectives.contract import (
    EnergyObjective,
    Terms,
    check_length,
    check_scale,
    check_weights,
    target_first,
    weight_diagnostics,
)

__all__ = ["KLDImportanceSampling", "MaximumLikelihoodImportanceSampling", "NCE"]


def _check_noise(noise: GaussianNoise) -> None:
    if not isinstance(noise, GaussianNoise):
        raise TypeError(f"noise is a {type(noise).__name__}; expected an energyreg.noise.GaussianNoise.")


def _check_angles(noise: GaussianNoise, f: AnyEnergy, dim: int) -> None:
    """Noise that took an angle for a real number would have a wrong density beyond the cut, and say nothing."""
    periodic_of(f, dim, noise.periodic or (False,) * dim, name="noise.periodic")


@dataclass(frozen=True)
class MaximumLikelihoodImportanceSampling(EnergyObjective):
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
        super().__post_init__()

    def energy_loss(self, f: AnyEnergy, y: Tensor, generator: torch.Generator | None) -> Terms:
        """Return the loss of f for targets y in model space, shape (B, D)."""
        _check_angles(self.noise, f, y.shape[-1])
        samples = self.noise.sample(y, self.num_samples, generator=generator)
        log_noise = self.noise.log_prob(samples, y)
        f_target, f_samples = target_first(f(torch.cat([y[None], samples])))
        loss = losses.maximum_likelihood_importance_sampling(f_target, f_samples, log_noise)
        diagnostics = weight_diagnostics(f_target, f_samples - log_noise - math.log(self.num_samples))
        return Terms(loss, diagnostics, {"f": (f_target, f_samples)})


@dataclass(frozen=True)
class KLDImportanceSampling(EnergyObjective):
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
        object.__setattr__(self, "label_scale", check_scale("label_scale", self.label_scale))
        check_count("num_samples", self.num_samples)
        super().__post_init__()

    def energy_loss(self, f: AnyEnergy, y: Tensor, generator: torch.Generator | None) -> Terms:
        """Return the loss of f for targets y in model space, shape (B, D)."""
        check_length("label_scale", self.label_scale, y.shape[-1])
        label = GaussianNoise(np.atleast_2d(self.label_scale).tolist(), self.noise.periodic)
        _check_angles(self.noise, f, y.shape[-1])
        samples = self.noise.sample(y, self.num_samples, generator=generator)
        log_noise = self.noise.log_prob(samples, y)
        f_samples = f(samples)
        loss = losses.kld_importance_sampling(f_samples, log_noise, label.log_prob(samples, y), self.self_normalised)
        with torch.no_grad():
            f_target = f(y)
        diagnostics = weight_diagnostics(f_target, f_samples - log_noise - math.log(self.num_samples))
        return Terms(loss, diagnostics, {"f": f_samples})


@dataclass(frozen=True)
class NCE(EnergyObjective):
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
        check_weights(beta=self.beta)
        super().__post_init__()

    def energy_loss(self, f: AnyEnergy, y: Tensor, generator: torch.Generator | None) -> Terms:
        """Return the loss of f for targets y in model space, shape (B, D)."""
        _check_angles(self.noise, f, y.shape[-1])
        samples = self.noise.sample(y, self.num_samples, generator=generator)
        positive = self._positive(y, generator)
        points = torch.cat([positive[None], samples])
        f_target, f_samples = target_first(f(points))
        log_noise_target, log_noise = target_first(self.noise.log_prob(points, y))
        loss = losses.nce(f_target, f_samples, log_noise_target, log_noise)
        diagnostics = weight_diagnostics(f_target, f_samples - log_noise - math.log(self.num_samples))
        diagnostics["target_share"] = (-loss).exp()
        return Terms(loss, diagnostics, {"f": (f_target, f_samples)})

    def _positive(self, y: Tensor, generator: torch.Generator | None) -> Tensor:
        if not self.beta:
            return y
        scales = [[self.beta * scale for scale in row] for row in self.noise.scales]  # type: ignore[union-attr]
        near = GaussianNoise(scales, self.noise.periodic, stratified=False)
        return near.sample(y, 1, generator=generator)[0]
