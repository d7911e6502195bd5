"""Images with boxes from disk: annotations as COCO's JSON or as CSV, to a dataset that `DataLoader`s read.

>>> BoxDataset.from_coco("train", "train/annotations.json")  # doctest: +SKIP
BoxDataset(120 images, 240 boxes, classes: cat, dog)
"""

from __future__ import annotations

import csv
import json
import os
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from energyreg.images.reading import decode
from energyreg.vision.boxes.corners import check_boxes, torchvision

__all__ = ["BoxDataset", "BoxRecord"]

COLUMNS = {
    "image": ("file", "filename", "path"),
    "x1": ("xmin",),
    "y1": ("ymin",),
    "x2": ("xmax",),
    "y2": ("ymax",),
    "label": ("class", "name"),
}
"""Columns of a CSV file with boxes, and what else they may be called; their order is free, and others are ignored."""

Path_ = str | os.PathLike[str]


@dataclass(frozen=True)
class BoxRecord:
    """An image and what is annotated in it.

    Attributes:
        path: The file.
        boxes: Corners (x1, y1, x2, y2) in pixels, one tuple a box.
        labels: Their classes, from 1 on.
        size: Height and width that the annotations were made for; None if they do not say.
    """

    path: Path
    boxes: tuple[tuple[float, float, float, float], ...]
    labels: tuple[int, ...]
    size: tuple[int, int] | None = None


class BoxDataset(Dataset[tuple[Tensor, dict[str, Any]]]):
    """Pairs (image, target) as torchvision's detectors and transforms take them, read from disk one by one.

    The image is a :class:`torchvision.tv_tensors.Image` of floats in [0, 1], shape (3, H, W). The target has "boxes", a
    :class:`torchvision.tv_tensors.BoundingBoxes` of corners, shape (N, 4), "labels" from 1 on, shape (N,), and
    "image_id", the file's name. So a transform of :mod:`torchvision.transforms.v2` moves both alike.

    Args:
        records: Images and boxes.
        classes: Names of the classes; label k stands for entry k - 1, and 0 for the background.
        transforms: Called as ``transforms(image, target)``; None for nothing.

    Raises:
        ValueError: There are no records, or a label is out of range.
    """

    def __init__(
        self, records: Sequence[BoxRecord], classes: Sequence[str], transforms: Callable[..., Any] | None = None
    ) -> None:
        if not records:
            raise ValueError("records is empty; expected at least one image.")
        for record in records:
            for number, label in enumerate(record.labels):
                if not 1 <= label <= len(classes):
                    raise ValueError(
                        f"The label of box {number} of image {record.path} is {label}; expected 1 to {len(classes)}, "
                        f"as there are {len(classes)} classes."
                    )
        self.records, self.classes, self.transforms = list(records), list(classes), transforms

    @property
    def num_classes(self) -> int:
        """Classes with the background: what a detector of torchvision is made with."""
        return len(self.classes) + 1

    def __len__(self) -> int:
        return len(self.records)

    def __repr__(self) -> str:
        boxes = sum(len(record.boxes) for record in self.records)
        return f"BoxDataset({len(self)} images, {boxes} boxes, classes: {', '.join(self.classes)})"

    def __getitem__(self, index: int) -> tuple[Tensor, dict[str, Any]]:
        """Read an image.

        Raises:
            ValueError: The file is no image, has another size than the annotations say, or a box lies outside of it.
            ImportError: torchvision or Pillow is not installed.
        """
        record = self.records[index]
        vision = torchvision()
        from torchvision import tv_tensors

        image = _read_image(record.path)
        size = (int(image.shape[1]), int(image.shape[2]))
        if record.size is not None and record.size != size:
            raise ValueError(
                f"{record.path} has height {size[0]} and width {size[1]}, but its annotations are for height "
                f"{record.size[0]} and width {record.size[1]}; the boxes belong to another size of the image."
            )
        boxes = torch.tensor(record.boxes, dtype=torch.float32).reshape(-1, 4)
        check_boxes(boxes, size, image=record.path)
        boxes = vision.ops.clip_boxes_to_image(boxes, size)  # within the pixel that check_boxes forgives
        target: dict[str, Any] = {
            "boxes": tv_tensors.BoundingBoxes(boxes, format="XYXY", canvas_size=size),
            "labels": torch.tensor(record.labels, dtype=torch.long),
            "image_id": record.path.name,
        }
        picture = tv_tensors.Image(image)
        return (picture, target) if self.transforms is None else self.transforms(picture, target)

    def with_boxes(self) -> BoxDataset:
        """The images that have boxes: what an energy head can learn from."""
        records = [record for record in self.records if record.boxes]
        if not records:
            raise ValueError("No image has a box.")
        return BoxDataset(records, self.classes, self.transforms)

    def split(self, fraction: float, seed: int = 0) -> tuple[BoxDataset, BoxDataset]:
        """Two datasets, the second with a fraction of the images, chosen at random.

        Raises:
            ValueError: fraction is not in (0, 1), or leaves one of them without an image.
        """
        count = round(fraction * len(self)) if 0 < fraction < 1 else 0
        if not 0 < count < len(self):
            raise ValueError(
                f"fraction is {fraction}; expected a number in (0, 1) that leaves images to both, of {len(self)}."
            )
        order = torch.randperm(len(self), generator=torch.Generator().manual_seed(seed)).tolist()
        parts = ([self.records[place] for place in sorted(chosen)] for chosen in (order[count:], order[:count]))
        first, second = (BoxDataset(part, self.classes, self.transforms) for part in parts)
        return first, second

    @classmethod
    def from_coco(
        cls,
        folder: Path_,
        annotations: Path_,
        transforms: Callable[..., Any] | None = None,
        *,
        drop_empty: bool = False,
    ) -> BoxDataset:
        """Read COCO's JSON: "images", "annotations" with "bbox" as x, y, width, height, and "categories".

        Categories get the labels 1, 2, ... in the order of their ids. Crowds (`iscrowd`) are left out.

        Args:
            folder: Where the images are.
            annotations: The JSON file.
            transforms: As for the class.
            drop_empty: Leave out boxes without area, with a warning that counts them, in place of an error.

        Raises:
            FileNotFoundError: The JSON file or an image is missing.
            ValueError: The file is not in that format; an annotation is of an image or category that there is not, or
                has no proper box. The error names the annotation and its image.
        """
        folder, source = Path(folder), Path(annotations)
        try:
            content = json.loads(source.read_text(encoding="utf-8"))
        except json.JSONDecodeError as error:
            raise ValueError(f"{source} is no JSON file: {error}.") from error
        absent = [key for key in ("images", "annotations", "categories") if not isinstance(_entry(content, key), list)]
        if absent:
            raise ValueError(f"{source} has no list {absent[0]!r}; expected COCO's format for detection.")
        categories = sorted(content["categories"], key=lambda category: category["id"])
        label_of = {category["id"]: label for label, category in enumerate(categories, 1)}
        images = {image["id"]: image for image in content["images"]}
        if len(images) < len(content["images"]):
            raise ValueError(f"{source} has two images with the same id.")
        boxes: dict[Any, list[tuple[float, float, float, float]]] = {key: [] for key in images}
        labels: dict[Any, list[int]] = {key: [] for key in images}
        dropped = 0
        for place, annotation in enumerate(content["annotations"]):
            name = f"Annotation {annotation.get('id', place)} in {source}"
            if annotation.get("iscrowd"):
                continue
            key, category = annotation.get("image_id"), annotation.get("category_id")
            if key not in images:
                raise ValueError(f"{name} is of image {key!r}, which is not among the images.")
            file = images[key]["file_name"]
            if category not in label_of:
                raise ValueError(f"{name}, image {file}, is of category {category!r}, which is not one of the file.")
            box = annotation.get("bbox")
            if _is_box(box) and drop_empty and 0 in box[2:]:
                dropped += 1
                continue
            if not _is_box(box) or not (box[2] > 0 and box[3] > 0):
                raise ValueError(
                    f"{name}, image {file}, has bbox {box!r}; expected (x, y, width, height) with positive sides."
                )
            x, y, width, height = map(float, box)
            boxes[key].append((x, y, x + width, y + height))
            labels[key].append(label_of[category])
        records = []
        for key, image in images.items():
            sides = (image.get("height"), image.get("width"))
            size = (int(sides[0]), int(sides[1])) if all(isinstance(side, int) for side in sides) else None
            path = folder / image["file_name"]
            _check_record(path, boxes[key], size, source)
            records.append(BoxRecord(path, tuple(boxes[key]), tuple(labels[key]), size))
        _warn_dropped(dropped, source)
        return cls(records, [str(category["name"]) for category in categories], transforms)

    @classmethod
    def from_csv(
        cls,
        folder: Path_,
        annotations: Path_,
        transforms: Callable[..., Any] | None = None,
        *,
        drop_empty: bool = False,
    ) -> BoxDataset:
        """Read a CSV file with the columns image, x1, y1, x2, y2 and label, one row a box.

        Other names that are common are known, too: file, xmin, ymin, xmax, ymax, class.

        A row with an image and nothing else stands for an image without boxes. Labels are names; the classes are in
        alphabetical order.

        Args:
            folder: Where the images are.
            annotations: The CSV file.
            transforms: As for the class.
            drop_empty: Leave out boxes without area, with a warning that counts them, in place of an error.

        Raises:
            FileNotFoundError: The CSV file or an image is missing.
            ValueError: A column is missing, or a row has no proper box. The error names the line and the image.
        """
        folder, source = Path(folder), Path(annotations)
        boxes: dict[str, list[tuple[float, float, float, float]]] = {}
        names: dict[str, list[str]] = {}
        dropped = 0
        for line, row in _csv_rows(source):
            file = row["image"]
            boxes.setdefault(file, [])
            names.setdefault(file, [])
            values = [row[name] for name in list(COLUMNS)[1:]]
            if not any(values):
                continue
            try:
                x1, y1, x2, y2 = map(float, values[:4])
            except ValueError:
                raise ValueError(
                    f"Line {line} of {source}, image {file}, has {values[:4]}; expected numbers."
                ) from None
            if not values[4]:
                raise ValueError(f"Line {line} of {source}, image {file}, has no label.")
            if drop_empty and (x1 == x2 or y1 == y2):
                dropped += 1
                continue
            boxes[file].append((x1, y1, x2, y2))
            names[file].append(values[4])
        classes = sorted({name for each in names.values() for name in each})
        if not classes:
            raise ValueError(f"{source} has no box.")
        label_of = {name: label for label, name in enumerate(classes, 1)}
        records = []
        for file, own in boxes.items():
            _check_record(folder / file, own, None, source)
            records.append(BoxRecord(folder / file, tuple(own), tuple(label_of[name] for name in names[file])))
        _warn_dropped(dropped, source)
        return cls(records, classes, transforms)


def _entry(content: Any, key: str) -> Any:
    return content.get(key) if isinstance(content, Mapping) else None


def _is_box(box: Any) -> bool:
    numbers = isinstance(box, list) and len(box) == 4
    return numbers and all(isinstance(value, int | float) and not isinstance(value, bool) for value in box)


def _check_record(path: Path, boxes: Sequence[tuple[float, ...]], size: tuple[int, int] | None, source: Path) -> None:
    if not path.is_file():
        raise FileNotFoundError(f"{source} names the image {path}, which does not exist.")
    check_boxes(torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4), size, image=path)


def _csv_rows(source: Path) -> Iterator[tuple[int, dict[str, str]]]:
    with source.open(newline="", encoding="utf-8-sig") as file:
        reader = csv.DictReader(file)
        present = list(reader.fieldnames or ())
        columns = {name: [each for each in (name, *others) if each in present] for name, others in COLUMNS.items()}
        missing = [name for name, found in columns.items() if not found]
        if missing:
            raise ValueError(
                f"{source} has no column {missing[0]!r}, but {present}; expected a first line with "
                f"{', '.join(COLUMNS)}."
            )
        for row in reader:
            values = {name: (row[found[0]] or "").strip() for name, found in columns.items()}
            if not values["image"]:
                raise ValueError(f"Line {reader.line_num} of {source} names no image.")
            yield reader.line_num, values


def _warn_dropped(count: int, source: Path) -> None:
    if count:
        warnings.warn(f"{source} has {count} boxes without area, which are left out.", stacklevel=3)


def _read_image(path: Path) -> Tensor:
    """An image as RGB floats in [0, 1], shape (3, H, W), as it is meant to be looked at."""
    pixels = np.array(decode(path))
    return torch.from_numpy(pixels).permute(2, 0, 1).contiguous().float() / 255
