"""An energy head for detectors."""

from energyreg.vision.detection.detector import (
    BoxBatch,
    BoxCollate,
    BoxEnergy,
    BoxEnergyHead,
    EnergyDetector,
    Inference,
    WithDetectorLoss,
    add_energy_head,
    load_head,
    save_head,
)

__all__ = [
    "BoxBatch",
    "BoxCollate",
    "BoxEnergy",
    "BoxEnergyHead",
    "EnergyDetector",
    "Inference",
    "WithDetectorLoss",
    "add_energy_head",
    "load_head",
    "save_head",
]
