"""Energy-based probabilistic regression: the whole conditional density p(y|x) of a continuous target.

>>> import torch
>>> import energyreg as er
>>> x = torch.rand(200, 2)
>>> y = x[:, 0] + 0.1 * torch.randn(200)
>>> model = er.EnergyRegressionModel.for_table(num_features=2, width=16)
>>> history = er.fit(model, x, y, epochs=2, batch_size=32, seed=0)
>>> p = model(x)  # a torch distribution in the units of y
>>> p.log_prob(y).shape, p.mean.shape, p.interval(0.9).shape
(torch.Size([200]), torch.Size([200, 1]), torch.Size([200, 2]))
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from energyreg import bases, encoders, heads, integrators, losses, mcmc, noise, objectives, proposals, spaces
from energyreg.checkpoint import CheckpointError, load, save
from energyreg.model import EnergyRegressionModel
from energyreg.points import WeightedPoints
from energyreg.predictive import PredictiveDistribution
from energyreg.refine import refine
from energyreg.training import History, TrainingError, fit

__version__ = "0.1.0.dev0"

__all__ = [
    "CheckpointError",
    "EnergyRegressionModel",
    "History",
    "PredictiveDistribution",
    "TrainingError",
    "WeightedPoints",
    "bases",
    "datasets",
    "encoders",
    "fit",
    "heads",
    "integrators",
    "load",
    "losses",
    "mcmc",
    "metrics",
    "noise",
    "objectives",
    "plots",
    "proposals",
    "refine",
    "report",
    "save",
    "spaces",
]

_LAZY = ("datasets", "metrics", "plots", "report")


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        import importlib

        return importlib.import_module(f"energyreg.{name}")
    raise AttributeError(f"module 'energyreg' has no attribute {name!r}")


if TYPE_CHECKING:
    from energyreg import datasets, metrics, plots, report
