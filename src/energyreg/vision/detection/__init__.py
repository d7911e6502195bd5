"""An energy head for detectors."""

from energyreg.vision.boxes.batch import BoxBatch, BoxCollate
from energyreg.vision.boxes.energy import BoxEnergy, BoxEnergyHead
from energyreg.vision.boxes.postprocessing import Inference
from energyreg.vision.detection.detector import EnergyDetector, WithDetectorLoss, add_energy_head
from energyreg.vision.detection.files import load_head, save_head

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
