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

import importlib
import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0.dev0"

__all__ = [
    "CheckpointError",
    "EnergyChain",
    "EnergyEnsemble",
    "EnergyRegressionModel",
    "EnergyRegressor",
    "History",
    "ImageEncoder",
    "ImageRegressor",
    "PredictiveDistribution",
    "TrainingError",
    "WeightedPoints",
    "augment",
    "bases",
    "calibration",
    "chain",
    "datasets",
    "encoders",
    "fit",
    "fit_chain",
    "fit_ensemble",
    "heads",
    "image_encoders",
    "images",
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
    "tables",
    "vision",
]

# Where the names above come from; the others are modules. They are imported when they are asked for, as torch takes
# seconds that `energyreg --help` should not.
_ORIGIN = {
    "CheckpointError": "checkpoint",
    "EnergyChain": "chain",
    "EnergyEnsemble": "ensemble",
    "EnergyRegressionModel": "model",
    "EnergyRegressor": "estimator",
    "History": "training",
    "ImageEncoder": "image_encoders",
    "ImageRegressor": "image_estimator",
    "PredictiveDistribution": "predictive",
    "TrainingError": "training",
    "WeightedPoints": "points",
    "fit": "training",
    "fit_chain": "chain_training",
    "fit_ensemble": "ensemble_training",
    "load": "checkpoint",
    "refine": "refine",
    "save": "checkpoint",
}


class _Package(ModuleType):
    """The package, where `refine` is the function for good: importing the module of that name would replace it."""

    @property
    def refine(self) -> Any:
        return importlib.import_module("energyreg.refine").refine

    @refine.setter
    def refine(self, module: ModuleType) -> None:
        pass


sys.modules[__name__].__class__ = _Package


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'energyreg' has no attribute {name!r}")
    module = importlib.import_module(f"energyreg.{_ORIGIN.get(name, name)}")
    value = getattr(module, name) if name in _ORIGIN else module
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


if TYPE_CHECKING:
    from energyreg import (
        augment,
        bases,
        calibration,
        chain,
        datasets,
        encoders,
        heads,
        image_encoders,
        images,
        integrators,
        losses,
        mcmc,
        metrics,
        noise,
        objectives,
        plots,
        proposals,
        report,
        spaces,
        tables,
        vision,
    )
    from energyreg.chain import EnergyChain
    from energyreg.chain_training import fit_chain
    from energyreg.checkpoint import CheckpointError, load, save
    from energyreg.ensemble import EnergyEnsemble
    from energyreg.ensemble_training import fit_ensemble
    from energyreg.estimator import EnergyRegressor
    from energyreg.image_encoders import ImageEncoder
    from energyreg.image_estimator import ImageRegressor
    from energyreg.model import EnergyRegressionModel
    from energyreg.points import WeightedPoints
    from energyreg.predictive import PredictiveDistribution
    from energyreg.refine import refine
    from energyreg.training import History, TrainingError, fit
