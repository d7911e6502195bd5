"""How far the numbers of a predictive distribution can be trusted."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from energyreg.inference.pareto import pareto_k
from energyreg.inference.points import WeightedPoints
from energyreg.inference.row_blocks import RowBlock

__all__ = ["Diagnostics", "diagnose"]


@dataclass(frozen=True)
class Diagnostics:
    """How far the numbers of a predictive distribution can be trusted, per row.

    Attributes:
        log_partition: Estimate of log Z(x), shape (B,).
        log_partition_stderr: Its standard error (for quadrature, half the disagreement of two interleaved halves),
            shape (B,).
        effective_sample_size: Kish's effective number of points, shape (B,).
        pareto_k: Shape of the weights' tail, shape (B,); above 0.7 do not trust the row. See
            :func:`energyreg.inference.pareto.pareto_k`.
        num_points: Points per row.
    """

    log_partition: Tensor
    log_partition_stderr: Tensor
    effective_sample_size: Tensor
    pareto_k: Tensor
    num_points: int


def diagnose(block: RowBlock) -> Tensor:
    """Log Z, its standard error, effective sample size and Pareto shape of each row, shape (B, 4)."""
    weights = block.nodes.log_weights
    none = torch.zeros(len(weights), 1, 1, device=weights.device)
    points = WeightedPoints(none, weights, block.nodes.independent)
    return torch.stack(
        [block.log_partition, points.log_partition_stderr, points.effective_sample_size, pareto_k(weights)], -1
    )
