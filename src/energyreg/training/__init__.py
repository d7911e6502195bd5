"""Training: an objective over data, on Lightning Fabric."""

from energyreg.training.failures import TrainingError
from energyreg.training.fitting import fit
from energyreg.training.history import History
from energyreg.training.settings import TrainingSettings
from energyreg.training.step import TrainingStep
from energyreg.training.trainable import Trainable

__all__ = ["History", "Trainable", "TrainingError", "TrainingSettings", "TrainingStep", "fit"]
