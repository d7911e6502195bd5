"""Boxes as targets: their space, noise, geometry and densities; nothing here knows a detector."""

from energyreg.vision.boxes.corners import check_boxes, paired_iou, variance_voting
from energyreg.vision.boxes.distribution import BoxDistribution, box_noise
from energyreg.vision.boxes.spaces import BoxSpace

__all__ = ["BoxDistribution", "BoxSpace", "box_noise", "check_boxes", "paired_iou", "variance_voting"]
