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
from typing import TYPE_CHECKING, Any

from energyreg import aliases

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
    "CheckpointError": "files",
    "EnergyChain": "models.chain",
    "EnergyEnsemble": "models.ensemble",
    "EnergyRegressionModel": "models.model",
    "EnergyRegressor": "estimators.table",
    "History": "training.history",
    "ImageEncoder": "networks.image_encoders",
    "ImageRegressor": "estimators.image",
    "PredictiveDistribution": "models.predictive",
    "TrainingError": "training.failures",
    "WeightedPoints": "inference.points",
    "fit": "training.fitting",
    "fit_chain": "training.chains",
    "fit_ensemble": "training.ensembles",
    "load": "models.checkpoint",
    "refine": "inference.ascent",
    "save": "models.checkpoint",
}

aliases.install()
sys.modules[__name__].__class__ = aliases.FunctionsStay


def __getattr__(name: str) -> Any:
    if name not in __all__ and name not in aliases.ALIASES:
        raise AttributeError(f"module 'energyreg' has no attribute {name!r}")
    module = importlib.import_module(f"energyreg.{_ORIGIN.get(name, name)}")
    value = getattr(module, name) if name in _ORIGIN else module
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


if TYPE_CHECKING:
    from energyreg import datasets, images, plots, tables, vision
    from energyreg.densities import bases, noise, spaces
    from energyreg.estimators.image import ImageRegressor
    from energyreg.estimators.table import EnergyRegressor
    from energyreg.evaluation import metrics
    from energyreg.files import CheckpointError
    from energyreg.images import augment
    from energyreg.inference import integrators, mcmc
    from energyreg.inference.ascent import refine
    from energyreg.inference.points import WeightedPoints
    from energyreg.models import calibration, chain
    from energyreg.models.chain import EnergyChain
    from energyreg.models.checkpoint import load, save
    from energyreg.models.ensemble import EnergyEnsemble
    from energyreg.models.model import EnergyRegressionModel
    from energyreg.models.predictive import PredictiveDistribution
    from energyreg.networks import encoders, heads, image_encoders, proposals
    from energyreg.networks.image_encoders import ImageEncoder
    from energyreg.objectives import losses
    from energyreg.reports import page as report
    from energyreg.training.chains import fit_chain
    from energyreg.training.ensembles import fit_ensemble
    from energyreg.training.failures import TrainingError
    from energyreg.training.fitting import fit
    from energyreg.training.history import History
