"""Vision: an energy head for detectors, on exact and differentiable pooling of boxes.

Training and prediction are those of the rest of the library; torchvision comes with ``pip install 'energyreg[vision]'``
and is imported when it is needed.
"""

import sys

from energyreg.aliases import FunctionsStay
from energyreg.vision.boxes.batch import BoxBatch, BoxCollate
from energyreg.vision.boxes.corners import check_boxes, paired_iou, variance_voting
from energyreg.vision.boxes.distribution import BoxDistribution, box_noise
from energyreg.vision.boxes.energy import BoxEnergy, BoxEnergyHead
from energyreg.vision.boxes.postprocessing import Inference
from energyreg.vision.boxes.spaces import BoxSpace
from energyreg.vision.detection.average_precision import average_precision
from energyreg.vision.detection.data import BoxDataset, BoxRecord
from energyreg.vision.detection.detector import EnergyDetector, WithDetectorLoss, add_energy_head
from energyreg.vision.detection.files import load_head, save_head
from energyreg.vision.detection.small_detector import small_detector
from energyreg.vision.pooling.roi_pool import Pyramid, assign_levels, roi_pool
from energyreg.vision.pooling.rotated_pool import rotated_roi_pool

sys.modules[__name__].__class__ = FunctionsStay

__all__ = [
    "BoxBatch",
    "BoxCollate",
    "BoxDataset",
    "BoxDistribution",
    "BoxEnergy",
    "BoxEnergyHead",
    "BoxRecord",
    "BoxSpace",
    "EnergyDetector",
    "Inference",
    "Pyramid",
    "WithDetectorLoss",
    "add_energy_head",
    "assign_levels",
    "average_precision",
    "box_noise",
    "check_boxes",
    "load_head",
    "paired_iou",
    "roi_pool",
    "rotated_roi_pool",
    "save_head",
    "small_detector",
    "variance_voting",
]
