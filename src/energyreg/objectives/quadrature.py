"""Maximum likelihood with the partition function by quadrature."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from energyreg.inference.cells import half_disagreement
from energyreg.inference.energy import AnyEnergy, require_reference
from energyreg.inference.integrators import StratifiedQuadrature
from energyreg.objectives.contract import EnergyObjective, Terms

__all__ = ["ExactMaximumLikelihood"]


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


@dataclass(frozen=True)
class ExactMaximumLikelihood(EnergyObjective):
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
        super().__post_init__()
        StratifiedQuadrature(self.num_nodes)

    def energy_loss(self, f: AnyEnergy, y: Tensor, generator: torch.Generator | None) -> Terms:
        """Return the loss of f for targets y in model space, shape (B, D).

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
        with torch.no_grad():
            diagnostics = {
                "f_target": f_target,
                "log_partition": log_z,
                "log_partition_stderr": half_disagreement(shares),
                "effective_sample_size": shares.square().sum(0).reciprocal(),
            }
        return Terms(log_z - f_target, diagnostics, {"f": f_target, "Z": log_z})
