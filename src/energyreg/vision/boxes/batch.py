"""Batches of annotated boxes, and the collate function that makes them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Self

import torch
from torch import Tensor

from energyreg.vision.boxes.corners import torchvision
from energyreg.vision.boxes.geometry import Boxes2D, Geometry

__all__ = ["BoxBatch", "BoxCollate", "check_image"]


@dataclass
class BoxBatch:
    """Images, and which boxes of them a training step is about: the x that goes with the boxes y, shape (B, D).

    Attributes:
        images: Images (C, H, W) in [0, 1], as torchvision's detectors take them, of any sizes.
        image: Index of each box's image, shape (B,).
        labels: Class of each box, shape (B,).
        names: What errors call the images.
    """

    images: list[Tensor]
    image: Tensor
    labels: Tensor
    names: list[str] = field(default_factory=list)

    def to(self, *args: Any, **kwargs: Any) -> Self:
        """The batch on another device, as for a tensor; labels and indices stay whole numbers."""
        return self._each(lambda tensor: tensor.to(*args, **kwargs))

    def pin_memory(self) -> Self:
        """The batch in pinned memory, for a DataLoader with `pin_memory=True`."""
        return self._each(Tensor.pin_memory)

    def _each(self, move: Callable[[Tensor], Tensor]) -> Self:
        images = [move(image) for image in self.images]
        return replace(self, images=images, image=move(self.image), labels=move(self.labels))

    def targets(self, boxes: Tensor) -> list[dict[str, Tensor]]:
        """The boxes image by image, as torchvision's detectors take their targets."""
        chosen = [self.image == number for number in range(len(self.images))]
        return [{"boxes": boxes[rows], "labels": self.labels[rows]} for rows in chosen]


@dataclass(frozen=True)
class BoxCollate:
    """Joins examples of a detection dataset to pairs (x, y) for :func:`energyreg.fit`: a DataLoader's `collate_fn`.

    An example is (image, target): an image (C, H, W) of floats in [0, 1] and a dictionary with "boxes", corners in
    pixels of shape (N, 4), and "labels", shape (N,), as torchvision's detectors take them. Further entries are ignored,
    but for "image_id", by which errors call the image.

    Args:
        num_classes: Classes that the detector knows, the background among them where it counts as one.
        first_label: Smallest label of an object: 1 where 0 is the background.
        geometry: What the boxes are.
    """

    num_classes: int
    first_label: int = 1
    geometry: Geometry = Boxes2D()  # noqa: RUF009 (it is frozen)

    def __call__(self, examples: Sequence[tuple[Tensor, Mapping[str, Any]]]) -> tuple[BoxBatch, Tensor]:
        """Return the batch and its boxes, shape (B, 4).

        Raises:
            ValueError: Boxes or labels are wrong (see :func:`~energyreg.vision.boxes.check_boxes`), or there are none.
            TypeError: An example is no such pair.
        """
        images, boxes, labels, index, names = [], [], [], [], []
        for place, example in enumerate(examples):
            if not isinstance(example, tuple | list) or len(example) != 2 or not isinstance(example[1], Mapping):
                raise TypeError(
                    f"Example {place} of the batch is a {type(example).__name__}; expected a pair (image, target) with "
                    'target = {"boxes": (N, 4), "labels": (N,)}.'
                )
            image, target = example
            name = _name(target.get("image_id", f"{place} of the batch"))
            image = check_image(image, name)
            missing = [key for key in ("boxes", "labels") if key not in target]
            if missing:
                raise ValueError(f"The target of image {name} has no {missing[0]!r}, but {sorted(target)}.")
            own = _corners(target["boxes"])
            self.geometry.check(own, (image.shape[-2], image.shape[-1]), image=name)
            kinds = torch.as_tensor(target["labels"])
            self._check_labels(kinds, len(own), name)
            images.append(image)
            names.append(name)
            boxes.append(own.to(torch.get_default_dtype()))
            labels.append(kinds.long())
            index.append(torch.full((len(own),), place))
        if not sum(map(len, boxes)):
            raise ValueError(
                f"No image of this batch has a box: {', '.join(names)}. Leave images without boxes out of the dataset: "
                "there is nothing to learn from them here."
            )
        return BoxBatch(images, torch.cat(index), torch.cat(labels), names), torch.cat(boxes)

    def _check_labels(self, labels: Tensor, count: int, name: str) -> None:
        if labels.shape != (count,) or labels.is_floating_point():
            raise ValueError(
                f"labels of image {name} has shape {tuple(labels.shape)} and dtype {labels.dtype}; expected ({count},) "
                "whole numbers, one for each box."
            )
        wrong = (labels < self.first_label) | (labels >= self.num_classes)
        if bool(wrong.any()):
            number = int(wrong.nonzero()[0])
            raise ValueError(
                f"The label of box {number} of image {name} is {int(labels[number])}, but the detector knows "
                f"{self.first_label} to {self.num_classes - 1}"
                + (", with 0 as the background" if self.first_label else "")
                + ". Renumber the labels, or train a detector for these classes."
            )


def _name(identity: Any) -> str:
    return str(identity.item() if isinstance(identity, Tensor) and identity.numel() == 1 else identity)


def check_image(image: Any, name: str) -> Tensor:
    """An image as a plain tensor.

    Raises:
        ValueError: It is no floating-point tensor (C, H, W).
    """
    if not isinstance(image, Tensor) or not image.is_floating_point() or image.ndim != 3:
        found = f"{image.dtype} of shape {tuple(image.shape)}" if isinstance(image, Tensor) else type(image).__name__
        raise ValueError(
            f"Image {name} is {found}; expected floats in [0, 1] of shape (C, H, W): torchvision.transforms.v2.ToImage "
            "and ToDtype(torch.float32, scale=True) make them."
        )
    return image.as_subclass(Tensor)


def _corners(boxes: Any) -> Tensor:
    """Plain corners; torchvision's tensors know their own format."""
    form = getattr(boxes, "format", None)
    if isinstance(boxes, Tensor) and form is not None and form.value != "XYXY":
        return torchvision().ops.box_convert(boxes.as_subclass(Tensor), form.value.lower(), "xyxy")
    return boxes.as_subclass(Tensor) if isinstance(boxes, Tensor) else boxes
