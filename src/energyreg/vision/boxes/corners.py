"""Geometry of axis-parallel boxes: overlap, votes between them, and what an annotated box must be."""

from __future__ import annotations

from types import ModuleType

import torch
from torch import Tensor

__all__ = ["check_boxes", "paired_iou", "torchvision", "variance_voting"]

OUTSIDE = 1.0
"""Pixels that an annotated box may reach beyond its image: annotation tools round."""


SMALLEST_STDDEV = 1e-3
"""Pixels; a smaller standard deviation counts as this in a vote, so that one of 0 has no infinite weight."""


def torchvision() -> ModuleType:
    """torchvision, imported when it is needed.

    Raises:
        ImportError: It is not installed.
    """
    try:
        import torchvision
    except ImportError as error:
        raise ImportError(
            "Detection needs torchvision, which is not installed. Install it with: pip install 'energyreg[vision]'"
        ) from error
    return torchvision


def paired_iou(boxes: Tensor, others: Tensor) -> Tensor:
    """Intersection over union of boxes with their counterparts, where `torchvision.ops.box_iou` takes all pairs.

    Args:
        boxes: Corners, shape (*S, 4).
        others: Corners, of a shape that broadcasts with it.

    Returns:
        Numbers in [0, 1], shape (*S); 0 where neither has an area.
    """
    first, last = torch.maximum(boxes[..., :2], others[..., :2]), torch.minimum(boxes[..., 2:], others[..., 2:])
    areas = [(each[..., 2:] - each[..., :2]).clamp_min(0).prod(-1) for each in (boxes, others)]
    overlap = (last - first).clamp_min(0).prod(-1)
    union = areas[0] + areas[1] - overlap
    return torch.where(union > 0, overlap / torch.where(union > 0, union, 1.0), 0.0)


def variance_voting(boxes: Tensor, stddevs: Tensor, labels: Tensor, width: float) -> Tensor:
    r"""Move each border of each box to the weighted mean of what the boxes of its class around it say.

    .. math:: x_j' = \frac{\sum_i p_{ij} x_i / \sigma_i^2}{\sum_i p_{ij} / \sigma_i^2}, \qquad
        p_{ij} = e^{-(1 - \mathrm{IoU}_{ij})^2 / \sigma_t} \text{ where IoU}_{ij} > 0

    So a border that one box does not know moves to where another sees it. Scores do not count, nor does a coordinate
    whose σ is not finite. A width of 0.02 listens to close neighbours only: p is 0.14 at an IoU of 0.8, 4e-6 at 0.5.

    Args:
        boxes: Boxes of one image, corners, shape (N, 4).
        stddevs: Standard deviations σ of their coordinates, shape (N, 4).
        labels: Their classes, shape (N,).
        width: σ_t, how far the influence of a box reaches; > 0.

    Returns:
        Boxes, shape (N, 4). One that overlaps none of its class, or that would lose its area, stays bit-equal.

    Source:
        He et al., "Bounding box regression with uncertainty for accurate object detection", CVPR 2019 (variance
        voting), whose suppression goes by the boxes before the vote.

    >>> boxes = torch.tensor([[0.0, 0.0, 10.0, 10.0], [1.0, 0.0, 10.0, 10.0]])
    >>> stddevs = torch.tensor([[3.0, 1.0, 1.0, 1.0], [1.0, 1.0, 1.0, 1.0]])
    >>> variance_voting(boxes, stddevs, torch.tensor([1, 1]), 1e6)
    tensor([[ 0.9000,  0.0000, 10.0000, 10.0000],
            [ 0.9000,  0.0000, 10.0000, 10.0000]])
    """
    iou = paired_iou(boxes[:, None], boxes[None])
    neighbours = (iou > 0) & (labels[:, None] == labels[None])
    closeness = torch.where(neighbours, (-(1 - iou).square() / width).exp(), 0.0)
    closeness.fill_diagonal_(1.0)  # also where a box without area does not even overlap itself
    precision = torch.where(stddevs.isfinite(), stddevs.clamp_min(SMALLEST_STDDEV) ** -2, 0.0)
    weights = closeness[..., None] * precision
    # Written as a shift, so that a box by itself stays what it is, bit for bit.
    voted = boxes + (weights * (boxes[None] - boxes[:, None])).sum(1) / weights.sum(1)
    # Each border has weights of its own, so that in principle they may cross; NaN compares as False.
    return torch.where((voted[:, 2:] > voted[:, :2]).all(1, keepdim=True), voted, boxes)


def check_boxes(boxes: Tensor, size: tuple[int, int] | None = None, *, image: object = None) -> None:
    """Refuse annotated boxes that cannot be what was meant, by the name of their image and their number in it.

    Args:
        boxes: Corners (x1, y1, x2, y2) in pixels, shape (N, 4).
        size: Height and width of the image; None to skip what needs them.
        image: What errors call the image: a file name, an id.

    Raises:
        ValueError: The shape is wrong, a coordinate is not finite, a box has no positive width or height or reaches
            more than a pixel beyond the image, or the boxes are certain to be (x, y, width, height).
        TypeError: boxes is no tensor of real numbers.
    """
    where = "" if image is None else f" of image {image}"
    if not isinstance(boxes, Tensor) or boxes.is_complex():
        raise TypeError(f"boxes{where} is a {type(boxes).__name__}; expected a tensor of shape (N, 4).")
    if boxes.ndim != 2 or boxes.shape[1] != 4:
        raise ValueError(f"boxes{where} has shape {tuple(boxes.shape)}; expected (N, 4): corners (x1, y1, x2, y2).")
    first, last = boxes[:, :2], boxes[:, 2:]
    for bad, what in (
        (~boxes.isfinite().all(1), "expected finite numbers"),
        (~(last > first).all(1), "expected corners (x1, y1, x2, y2) with x1 < x2 and y1 < y2"),
    ):
        if bool(bad.any()):
            number = int(bad.nonzero()[0])
            raise ValueError(f"Box {number}{where} is {_numbers(boxes[number])}; {what}.{_hint(boxes, size)}")
    if size is None:
        return
    height, width = size
    limit = boxes.new_tensor([width, height])
    outside = (first < -OUTSIDE).any(1) | (last > limit + OUTSIDE).any(1)
    if bool(outside.any()):
        number = int(outside.nonzero()[0])
        raise ValueError(
            f"Box {number}{where} is {_numbers(boxes[number])}, which lies outside of the image of width {width} and "
            f"height {height}; expected 0 ≤ x1 < x2 ≤ {width} and 0 ≤ y1 < y2 ≤ {height}. Clip it, or look whether the "
            "boxes belong to another size of the image."
        )


def _numbers(box: Tensor) -> str:
    return f"({', '.join(f'{value:.6g}' for value in box.tolist())})"


def _hint(boxes: Tensor, size: tuple[int, int] | None) -> str:
    """Corners that are not in order, while all boxes fit into the image as (x, y, width, height), are just that."""
    first, last = boxes[:, :2], boxes[:, 2:]
    fits = bool(boxes.isfinite().all()) and bool((last > 0).all()) and bool((first >= 0).all())
    if size is not None:
        fits = fits and bool((first + last <= boxes.new_tensor([size[1], size[0]]) + OUTSIDE).all())
    if not fits:
        return ""
    return (
        " The boxes look like (x, y, width, height); convert them: torchvision.ops.box_convert(boxes, 'xywh', 'xyxy')."
    )
