"""Boxes as targets: their space, noise, geometry and densities."""

from energyreg.vision.boxes.boxes import (
    BoxDistribution,
    BoxSpace,
    box_noise,
    check_boxes,
    paired_iou,
    variance_voting,
)

__all__ = [
    "BoxDistribution",
    "BoxSpace",
    "box_noise",
    "check_boxes",
    "paired_iou",
    "variance_voting",
]
