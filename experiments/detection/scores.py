"""What is said of boxes: average precision, overlap with the true boxes, and how honest their densities are."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from energyreg.vision import BoxDistribution, average_precision, paired_iou
from experiments.detection.detector import Boxes, Seen

__all__ = ["THRESHOLDS", "calibration", "matched", "matches", "mean_iou", "precision", "with_boxes"]

THRESHOLDS = ("AP", "AP50", "AP75", "AP90")
OVERLAP = 0.5
"""IoU from which on a detected box is about a true one."""


def matched(detected: Boxes, true: Boxes) -> tuple[Tensor, Tensor]:
    """Pairs of boxes: each true one with the detected one of its class that overlaps it most, where by half at least.

    Returns:
        Rows of the detected boxes and of the true ones, shape (K,).
    """
    if not len(detected) or not len(true):
        return torch.zeros(0, dtype=torch.long), torch.zeros(0, dtype=torch.long)
    iou = paired_iou(true.boxes[:, None], detected.boxes[None])
    same = (true.image[:, None] == detected.image) & (true.labels[:, None] == detected.labels)
    best, row = torch.where(same, iou, 0.0).max(1)
    found = (best >= OVERLAP).nonzero()[:, 0]
    return row[found], found


def matches(detected: Boxes, true: Boxes) -> tuple[Tensor, Tensor]:
    """Pairs of boxes: each detected one with the true one of its class that it overlaps most, where by half at least.

    Returns:
        Rows of the detected boxes and of the true ones, shape (K,).
    """
    true_rows, rows = matched(true, detected)
    return rows, true_rows


def mean_iou(seen: Seen, boxes: Tensor) -> float:
    """Mean IoU of detected boxes, in another place (N, 4) by now, with the true boxes that the detector's matched."""
    rows, true = matched(seen.detected, seen.true)
    return float(paired_iou(boxes[rows], seen.true.boxes[true]).mean()) if len(rows) else math.nan


def with_boxes(seen: Seen, boxes: Tensor, scores: Tensor | None = None) -> list[dict[str, Tensor]]:
    """The detections with other boxes, (N, 4), and perhaps other scores, (N,)."""
    counts = [len(detection["boxes"]) for detection in seen.detections]
    found = [{**old, "boxes": new} for old, new in zip(seen.detections, boxes.split(counts), strict=True)]
    if scores is not None:
        found = [{**old, "scores": new} for old, new in zip(found, scores.split(counts), strict=True)]
    return found


def precision(seen: Seen, detections: Sequence[Mapping[str, Tensor]]) -> dict[str, float]:
    """Average precision in percent: AP over all thresholds, AP50, AP75 and AP90."""
    values = average_precision(detections, [picture.target for picture in seen.pictures])
    return {name: 100 * values[name] for name in THRESHOLDS}


def calibration(density: BoxDistribution, true: Tensor) -> dict[str, float]:
    """How honest densities are about the corners' coordinates of true boxes (K, 4).

    Returns:
        "nll": mean negative log-density, in nats per pixel⁴. "coverage": share of coordinates in their central 90 %
        interval. "standardised": root mean square of (true - mean) / standard deviation; 1 where honest, above it
        where too sure. "pit": Kolmogorov's distance of the coordinates' probability integral transforms from uniform
        ones; 0 is best.
    """
    boxes, weights = density.space.to_user(density.points.y), density.points.log_weights.softmax(0)[..., None]
    # Half of the weight on ties and, with few points, on the next one: the middle of the step.
    pit = (weights * ((boxes < true).double() + 0.5 * (boxes == true).double())).sum(0).flatten().double()
    error = ((true - density.mean) / density.stddev.clamp_min(1e-6)).square().mean().sqrt()
    ordered = pit.sort().values
    steps = torch.arange(len(ordered) + 1, dtype=torch.double) / len(ordered)
    distance = torch.maximum((steps[1:] - ordered).abs(), (ordered - steps[:-1]).abs()).max()
    log_prob = density.log_prob(true)
    inside = log_prob.isfinite()
    return {
        "nll": -float(log_prob[inside].double().mean()),
        "outside": float((~inside).double().mean()),
        "coverage": float(((pit > 0.05) & (pit < 0.95)).double().mean()),
        "standardised": float(error),
        "pit": float(distance),
        "effective_samples": float(density.effective_sample_size.median()),
    }
