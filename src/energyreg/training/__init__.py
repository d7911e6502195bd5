"""Training: an objective over data, on Lightning Fabric."""

from energyreg.training.loop import (
    History,
    TrainingError,
    TrainingStep,
    fit,
)

__all__ = [
    "History",
    "TrainingError",
    "TrainingStep",
    "fit",
]
