"""A model's log-density as a plain module with fixed work, for `torch.export`, `torch.compile` and other runtimes."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from energyreg.checks import check_count
from energyreg.inference.integrators import StratifiedQuadrature
from energyreg.models.model import EnergyRegressionModel

__all__ = ["LogDensity"]


class LogDensity(nn.Module):
    """log p(y|x) of a model as one graph: no branch depends on the data, and any number of rows will do.

    The partition function is taken on a fixed grid of quadrature nodes, finer towards both tails. A
    :class:`~energyreg.models.predictive.PredictiveDistribution` adds nodes where a row needs them, which no fixed graph
    can; for smooth densities the two agree to single precision.

    Args:
        model: The model, for one or two target dimensions, or a proposal alone, which needs no nodes.
        num_nodes: Quadrature nodes in all; 512 by default, and 128² for two dimensions.

    Raises:
        ValueError: If the target has more than two dimensions and the model an energy, or num_nodes is not a whole
            number ≥ 1.

    >>> model = EnergyRegressionModel.for_table(num_features=3, width=16).eval()
    >>> x, y = torch.randn(8, 3), torch.randn(8, 1)
    >>> rows = torch.export.Dim("rows", min=2)
    >>> program = torch.export.export(LogDensity(model), (x, y), dynamic_shapes=({0: rows}, {0: rows}))
    >>> program.module()(torch.randn(50, 3), torch.randn(50, 1)).shape
    torch.Size([50])
    """

    def __init__(self, model: EnergyRegressionModel, num_nodes: int | None = None) -> None:
        super().__init__()
        dim = model.space.dim
        if model.head is not None and dim > 2:
            raise ValueError(
                f"The target has {dim} dimensions; a fixed grid of nodes serves at most 2. Call the model, which draws "
                "samples of its proposal."
            )
        num_nodes = (512 if dim == 1 else 128**2) if num_nodes is None else num_nodes
        check_count("num_nodes", num_nodes)
        self.model, self.num_nodes = model, num_nodes

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """Log-density in nats and user units, (B,), of targets (B, D) for inputs with first dimension B; unchecked."""
        space, f = self.model.space, self.model.energy(x)
        log_density = f(space.to_model(y).to(self.model.dtype))
        if not f.normalised:
            rule = StratifiedQuadrature(self.num_nodes, jitter=False, graded=True)
            log_density = log_density - rule.log_weights(f).logsumexp(0)
        log_density = log_density + space.log_abs_det_jacobian(y).to(self.model.dtype)
        return torch.where(space.contains(y), log_density, -torch.inf)
