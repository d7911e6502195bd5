"""The sets: pictures with boxes, brought to one size, and which of them a fold trains on and is judged on."""

from __future__ import annotations

import csv
import io
import zlib
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from energyreg.files import write_atomically

__all__ = ["SETS", "BoxSet", "Fold", "Picture", "load"]

SIDE = 256
"""Longer side of a picture for the network, in pixels."""
PERSON = 0
"""The class of COCO that is taken: of each of the others there are too few to learn from nothing what it looks like."""
FOLDS = 3
"""Each picture outside of the development part is tested in one of them."""
DEVELOPMENT = 0.15
"""Share of the pictures by which settings are chosen; no fold trains on them or tests on them."""


@dataclass(frozen=True)
class Picture:
    """A picture and what is annotated in it.

    Attributes:
        name: Its file's name.
        pixels: uint8, shape (3, H, W), the longer side `SIDE`.
        boxes: Corners in these pixels, shape (N, 4).
        labels: Classes from 1 on, shape (N,).
    """

    name: str
    pixels: Tensor
    boxes: Tensor
    labels: Tensor

    @property
    def image(self) -> Tensor:
        """Floats in [0, 1], shape (3, H, W)."""
        return self.pixels.float() / 255

    @property
    def target(self) -> dict[str, Tensor]:
        """Boxes and labels as torchvision's detectors take them."""
        return {"boxes": self.boxes, "labels": self.labels}

    def flipped(self) -> Picture:
        """The mirror image."""
        width = self.pixels.shape[2]
        boxes = self.boxes.clone()
        boxes[:, [0, 2]] = width - self.boxes[:, [2, 0]]
        return Picture(self.name, self.pixels.flip(2), boxes, self.labels)


Rows = dict[str, list[tuple[str, float, float, float, float]]]
"""Boxes by file: class and corners, in pixels; or in sides of the picture where the set says so."""


@dataclass(frozen=True)
class BoxSet:
    """A set.

    Attributes:
        name: Its name in the results.
        classes: Names of the classes; label k stands for entry k - 1.
        read: Folder of the set to its rows.
        relative: Whether corners are in sides of the picture.
        smallest: Boxes with a shorter side than this, in pixels of the network, are left out.
    """

    name: str
    classes: tuple[str, ...]
    read: Callable[[Path], Rows]
    relative: bool = False
    smallest: float = 6.0


def _table(folder: Path) -> Rows:
    rows: Rows = defaultdict(list)
    with (folder / "boxes.csv").open(newline="") as file:
        for row in csv.DictReader(file):
            corners = [float(row[name]) for name in ("xmin", "ymin", "xmax", "ymax")]
            rows[f"images/{row['file']}"].append((row["class"], *corners))  # type: ignore[arg-type]
    return rows


def _yolo(folder: Path) -> Rows:
    rows: Rows = {}
    for path in sorted(folder.glob("labels/*/*.txt")):
        found = []
        for line in path.read_text().splitlines():
            kind, x, y, width, height = map(float, line.split()[:5])
            if kind == PERSON:
                found.append(("person", x - width / 2, y - height / 2, x + width / 2, y + height / 2))
        rows[f"images/{path.parent.name}/{path.stem}.jpg"] = found
    return rows


SETS = (
    BoxSet("pennfudan", ("person",), _table),
    BoxSet("bccd", ("RBC", "WBC", "Platelets"), _table),
    BoxSet("coco128", ("person",), _yolo, relative=True, smallest=8.0),  # it has many specks
)


def load(info: BoxSet, data: Path, cache: Path) -> list[Picture]:
    """The pictures of a set that have boxes, in the order of their names; decoded once, then from the cache.

    Args:
        info: The set.
        data: Folder with a folder for each set.
        cache: Folder of the cache, outside the repository.

    Raises:
        FileNotFoundError: The data is not there.
    """
    path = cache / info.name / f"pictures{SIDE}.npz"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        buffer = io.BytesIO()
        np.savez(buffer, **_decode(info, data / info.name))
        write_atomically(path, buffer.getvalue())
    with np.load(path) as arrays:
        names = sorted({key.partition("|")[0] for key in arrays.files})
        return [
            Picture(
                name, *(torch.from_numpy(arrays[f"{name}|{part}"]) for part in ("pixels", "boxes", "labels"))
            )
            for name in names
        ]  # fmt: skip


def _decode(info: BoxSet, folder: Path) -> dict[str, NDArray[np.generic]]:
    from PIL import Image

    arrays: dict[str, NDArray[np.generic]] = {}
    for file, rows in sorted(info.read(folder).items()):
        if not (folder / file).is_file():
            raise FileNotFoundError(f"{folder / file} does not exist; DATA must hold {info.name}/, see README.md.")
        with Image.open(folder / file) as opened:
            width, height = opened.size
            ratio = SIDE / max(width, height)
            size = (round(width * ratio), round(height * ratio))
            pixels = np.asarray(opened.convert("RGB").resize(size, Image.Resampling.BILINEAR))
        unit = np.array(size * 2) if info.relative else np.array([size[0] / width, size[1] / height] * 2)
        corners = np.array([row[1:] for row in rows], dtype=float).reshape(-1, 4) * unit
        corners = corners.clip(0, np.array(size * 2))
        labels = np.array([info.classes.index(row[0]) + 1 for row in rows], dtype=np.int64)
        kept = (corners[:, 2:] - corners[:, :2] >= info.smallest).all(1)
        if kept.any():
            name = Path(file).stem
            arrays[f"{name}|pixels"] = np.ascontiguousarray(pixels.transpose(2, 0, 1))
            arrays[f"{name}|boxes"] = corners[kept].astype(np.float32)
            arrays[f"{name}|labels"] = labels[kept]
    return arrays


@dataclass(frozen=True)
class Fold:
    """Pictures of one fold.

    Attributes:
        train: What detector and heads are trained on.
        development: What settings are chosen by; the same in all folds.
        test: What is judged.
    """

    train: list[Picture]
    development: list[Picture]
    test: list[Picture]


def split(info: BoxSet, pictures: list[Picture], number: int) -> Fold:
    """Pictures at random, by the set's name: the development part, and the others dealt to folds."""
    order = np.random.default_rng(zlib.crc32(info.name.encode())).permutation(len(pictures))
    count = round(DEVELOPMENT * len(pictures))
    held, rest = order[:count], order[count:]
    tested = set(rest[number::FOLDS].tolist())
    return Fold(
        [pictures[place] for place in rest if place not in tested],
        [pictures[place] for place in held],
        [pictures[place] for place in rest if place in tested],
    )
