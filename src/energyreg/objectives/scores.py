"""Objectives that follow the gradient of f in y: score matching, and maximum likelihood with short chains."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from energyreg.checks import check_count
from energyreg.densities.angles import wrap_angles
from energyreg.inference.energy import AnyEnergy, periodic_of
from energyreg.inference.mcmc import Langevin
from energyreg.objectives import losses
from energyreg.objectives.contract import EnergyObjective, Terms, check_length, check_scale
from energyreg.randomness import random_like

__all__ = ["DenoisingScoreMatching", "MaximumLikelihoodMCMC", "ScoreMatching"]


@dataclass(frozen=True)
class MaximumLikelihoodMCMC(EnergyObjective):
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
        object.__setattr__(self, "step_size", check_scale("step_size", self.step_size))
        super().__post_init__()

    def energy_loss(self, f: AnyEnergy, y: Tensor, generator: torch.Generator | None) -> Terms:
        """Return the loss of f for targets y in model space, shape (B, D)."""
        sampler = Langevin(num_steps=self.num_steps, step_size=self.step_size, num_chains=self.num_chains)
        samples = sampler.sample(f, y, generator=generator)
        f_target, f_samples = f(y), f(samples)
        loss = losses.maximum_likelihood_mcmc(f_target, f_samples)
        diagnostics = {"f_target": f_target, "f_samples": f_samples.mean(0)}
        return Terms(loss, diagnostics, {"f": (f_target, f_samples)})


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
class ScoreMatching(EnergyObjective):
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
        super().__post_init__()

    def energy_loss(self, f: AnyEnergy, y: Tensor, generator: torch.Generator | None) -> Terms:
        """Return the loss of f for targets y in model space, shape (B, D)."""
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
        diagnostics = {"f_target": value, "score_norm": score.norm(dim=-1)}
        return Terms(loss, diagnostics, {"f": value, "score": score.sum(-1), "trace": trace})


@dataclass(frozen=True)
class DenoisingScoreMatching(EnergyObjective):
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
        object.__setattr__(self, "scale", check_scale("scale", self.scale))
        check_count("num_samples", self.num_samples)
        super().__post_init__()

    def energy_loss(self, f: AnyEnergy, y: Tensor, generator: torch.Generator | None) -> Terms:
        """Return the loss of f for targets y in model space, shape (B, D)."""
        check_length("scale", self.scale, y.shape[-1])
        scale = torch.as_tensor(self.scale).to(y)
        normal = random_like(torch.randn, (self.num_samples, *y.shape), y, generator)
        noisy = there = y + scale * normal
        periodic = periodic_of(f, y.shape[-1])
        if any(periodic):
            # f knows angles in [-π, π) alone; the noise stays the way that was gone, however often around.
            angle = torch.tensor(periodic, device=y.device)
            there = wrap_angles(noisy, angle)
        _, value, score = _score(f, there)
        loss = losses.denoising_score_matching(score, noisy, y, scale)
        diagnostics = {"f_noisy": value.mean(0), "score_norm": score.norm(dim=-1).mean(0)}
        return Terms(loss, diagnostics, {"f": value, "score": score.sum(-1)})
