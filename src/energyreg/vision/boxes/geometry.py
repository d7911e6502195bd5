"""What a box is: the one object by which energies, densities, refinement and postprocessing know their boxes.

:class:`Geometry` is the contract, and :class:`Boxes2D` is that of upright boxes in an image. Boxes with a heading,
or in a point cloud, are further instances; nothing else in this room changes for them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from energyreg.densities.noise import GaussianNoise
from energyreg.vision.boxes.corners import check_boxes, paired_iou, torchvision, variance_voting
from energyreg.vision.boxes.spaces import BoxSpace

__all__ = ["Boxes2D", "Geometry", "Pooler", "RelativeSpace", "by_coordinate"]


class RelativeSpace(Protocol):
    """Coordinates of boxes relative to B reference boxes, which are at 0 themselves: model space.

    An angle of model space is one of the box, at the same place in both, in radians.
    """

    @property
    def reference(self) -> Tensor:
        """The reference boxes, shape (B, D)."""
        ...

    def to_model(self, boxes: Tensor, /) -> Tensor:
        """Boxes to model space, both of shape (*S, B, D)."""
        ...

    def to_user(self, z: Tensor, /) -> Tensor:
        """Points of model space to boxes, both of shape (*S, B, D)."""
        ...

    def log_abs_det_jacobian(self, boxes: Tensor, /) -> Tensor:
        """log |det dz/dy| at boxes, (*S, B, D) to (*S, B)."""
        ...

    def contains(self, boxes: Tensor, /) -> Tensor:
        """Which boxes are finite and have positive sides, (*S, B, D) to (*S, B)."""
        ...


class Pooler(Protocol):
    """What an energy of boxes asks of the features of images."""

    @property
    def channels(self) -> int:
        """Features C of a node."""
        ...

    def pool(self, boxes: Tensor, image: Tensor, output_size: int) -> Tensor:
        """Features of boxes (R, D) in the frame of the maps, of the images with these indices, shape (R, C, P, P)."""
        ...


class Geometry(Protocol):
    """What boxes y of dimension D are, and what is done with them.

    Attributes:
        kinds: For each of the D coordinates of model space which of the numbers it takes that are given for kinds of
            coordinates: scales of noise, step lengths, half-widths of a window. Such as (0, 0, 1, 1): first the centre,
            then the size.
        periodic: Whether each coordinate is an angle.
    """

    @property
    def kinds(self) -> tuple[int, ...]: ...

    @property
    def periodic(self) -> tuple[bool, ...]: ...

    def space(self, reference: Tensor, /) -> RelativeSpace:
        """The coordinates relative to reference boxes, shape (B, D)."""
        ...

    def noise(self, scales: Sequence[Sequence[float]], *, antithetic: bool = False) -> GaussianNoise:
        """Gaussians in model space, which is the frame of the box; K scales for each kind of coordinate."""
        ...

    def valid(self, boxes: Tensor, /) -> Tensor:
        """Which boxes can be measured by, (*S, D) to (*S)."""
        ...

    def usable(self, boxes: Tensor, instead: Tensor | None = None) -> Tensor:
        """Boxes (N, D), with others, or any valid one, in the place of those that are not valid."""
        ...

    def in_maps(self, boxes: Tensor, ratio: Tensor) -> Tensor:
        """Boxes (*S, B, D) in the frame of the feature maps, by what is known of each box's image, (B, ...)."""
        ...

    def pool(self, features: Pooler, boxes: Tensor, image: Tensor, output_size: int) -> Tensor:
        """Features of boxes (R, D) in the frame of the maps, shape (R, C, P, P)."""
        ...

    def iou(self, boxes: Tensor, others: Tensor) -> Tensor:
        """Overlap of boxes with their counterparts, (*S, D) to (*S)."""
        ...

    def check(self, boxes: Tensor, size: tuple[int, int] | None = None, *, image: object = None) -> None:
        """Refuse annotated boxes (N, D) that cannot be what was meant; see :func:`check_boxes`."""
        ...

    def clip(self, boxes: Tensor, size: Tensor) -> Tensor:
        """Boxes (N, D) cut off at the ends of what was seen, of height and width (N, 2)."""
        ...

    def suppress(self, boxes: Tensor, scores: Tensor, labels: Tensor, threshold: float) -> Tensor:
        """Numbers of the boxes that stay, by falling score, when those that overlap a better one of their class go."""
        ...

    def vote(self, boxes: Tensor, stddevs: Tensor, labels: Tensor, width: float) -> Tensor:
        """Boxes of one image moved to what those around them say; see :func:`variance_voting`."""
        ...


def by_coordinate(geometry: Geometry, values: Sequence[float], name: str) -> list[float]:
    """Numbers for the kinds of coordinates as numbers for the D coordinates.

    Raises:
        ValueError: If there are not as many as kinds.

    >>> by_coordinate(Boxes2D(), (0.1, 0.2), "window")
    [0.1, 0.1, 0.2, 0.2]
    """
    count = max(geometry.kinds) + 1
    if len(values) != count:
        raise ValueError(f"{name} is {values!r}; expected {count} numbers, one for each kind of coordinate.")
    return [values[kind] for kind in geometry.kinds]


@dataclass(frozen=True)
class Boxes2D:
    """Upright boxes in an image: corners (x1, y1, x2, y2) in pixels, measured by :class:`BoxSpace`."""

    kinds: tuple[int, ...] = (0, 0, 1, 1)
    periodic: tuple[bool, ...] = (False,) * 4

    def space(self, reference: Tensor) -> BoxSpace:
        """Centres in sides of the reference box, and logarithms of the sides."""
        return BoxSpace(reference)

    def noise(self, scales: Sequence[Sequence[float]], *, antithetic: bool = False) -> GaussianNoise:
        """One component for all four numbers; scales of the centre in sides of the box, and of the sides' logarithms.

        Raises:
            ValueError: If the two differ in length, or a scale is not a finite number > 0.

        Source:
            Gustafsson et al., BMVC 2020, as in its code.
        """
        centre, size = scales
        if len(centre) != len(size):
            raise ValueError(
                f"centre has {len(centre)} scales and size {len(size)}; expected as many, one for each component."
            )
        return GaussianNoise([(c, c, s, s) for c, s in zip(centre, size, strict=True)], antithetic=antithetic)

    def valid(self, boxes: Tensor) -> Tensor:
        """Which boxes have positive sides, (*S, 4) to (*S)."""
        return (boxes[..., 2:] > boxes[..., :2]).all(-1)

    def usable(self, boxes: Tensor, instead: Tensor | None = None) -> Tensor:
        """Boxes (N, 4), with others, or one pixel, in the place of those without area."""
        other = boxes.new_tensor([0.0, 0.0, 1.0, 1.0]) if instead is None else instead
        return torch.where(self.valid(boxes)[:, None], boxes, other)

    def in_maps(self, boxes: Tensor, ratio: Tensor) -> Tensor:
        """Boxes in pixels of the resized image, by its pixels per given one along x, y, x and y, (B, 4)."""
        return boxes * ratio

    def pool(self, features: Pooler, boxes: Tensor, image: Tensor, output_size: int) -> Tensor:
        """Means over the bins of upright boxes."""
        return features.pool(boxes, image, output_size)

    def iou(self, boxes: Tensor, others: Tensor) -> Tensor:
        """Intersection over union; see :func:`~energyreg.vision.boxes.corners.paired_iou`."""
        return paired_iou(boxes, others)

    def check(self, boxes: Tensor, size: tuple[int, int] | None = None, *, image: object = None) -> None:
        """See :func:`~energyreg.vision.boxes.corners.check_boxes`."""
        check_boxes(boxes, size, image=image)

    def clip(self, boxes: Tensor, size: Tensor) -> Tensor:
        """Corners within images of height and width (N, 2)."""
        return torch.minimum(boxes.clamp_min(0), size.flip(1).repeat(1, 2))

    def suppress(self, boxes: Tensor, scores: Tensor, labels: Tensor, threshold: float) -> Tensor:
        """As torchvision's `batched_nms`."""
        return torchvision().ops.batched_nms(boxes, scores, labels, threshold)

    def vote(self, boxes: Tensor, stddevs: Tensor, labels: Tensor, width: float) -> Tensor:
        """See :func:`~energyreg.vision.boxes.corners.variance_voting`."""
        return variance_voting(boxes, stddevs, labels, width)
