"""SullyChen's driving data: frames of a car's camera, and the angle of the steering wheel."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from energyreg.datasets.angles import AngleUnit, converted
from energyreg.datasets.files import (
    PathLike,
    existing_file,
    existing_folder,
    numbers,
    read_csv,
    read_h5_images,
    read_text,
)
from energyreg.datasets.tasks import ArrayTask, ImageTask

__all__ = ["load_steering_h5", "load_sullychen"]

SOURCE = "Sully Chen, driving-datasets, https://github.com/SullyChen/driving-datasets"
LICENCE = "see the repository; its author: purely for research and statistics, never to pilot a car"


def load_sullychen(path: PathLike, *, units: AngleUnit = "radians") -> ImageTask:
    """Load SullyChen's driving data from its folder: `data.txt`, and about 45,500 (2017) or 63,000 (2018) frames.

    A line of `data.txt` is `0.jpg 0.000000` (2017) or `0.jpg 0.000000,2018-07-01 17:09:44:912` (2018): the file, the
    angle of the steering wheel **in degrees**, and the time. Frames are beside it or in `data/`. A folder with
    `labels.csv` (columns file and angle_deg) and the frames in `images/` is read too. No checksum is published.

    Traps:

    - It is a video, a few frames long in every scene: never split it at random. Split `time` by
      :func:`energyreg.datasets.split_by_blocks`, with blocks of a minute or more.
    - Straight roads make a point mass at 0; see :func:`energyreg.datasets.atoms`. Turns at crossings are rare and
      far out in the tails.
    - The angle is the wheel's, not that of the tyres.

    Args:
        path: The folder.
        units: Unit of the angles that are returned.

    Returns:
        Frames in the order of the file, with the wheel's angle; `time` is the number of the line, from 0.
    """
    folder = existing_folder(path, "SullyChen's folder, with data.txt in it")
    if (folder / "labels.csv").is_file():
        table = folder / "labels.csv"
        rows = read_csv(table, ["file", "angle_deg"], "labels of SullyChen's frames")
        names, text = [row["file"] for row in rows], [row["angle_deg"] for row in rows]
    else:
        table = folder / "data.txt"
        lines = read_text(table, "SullyChen's labels, lines 'FILE ANGLE'").split("\n")
        pairs = [(number, line.split()) for number, line in enumerate(lines, start=1) if line.strip()]
        for number, fields in pairs:
            if len(fields) not in (2, 3):
                raise ValueError(f"{table}, line {number}: is {lines[number - 1]!r}; expected 'FILE ANGLE[,TIME]'.")
        if not pairs:
            raise ValueError(f"{table} is empty; expected lines 'FILE ANGLE'.")
        names, text = [fields[0] for _, fields in pairs], [fields[1].split(",")[0] for _, fields in pairs]
    angles = numbers(text, table, "the angle")
    return ImageTask(files=[_frame(folder, name, table) for name in names], **_fields(angles, units))


def _fields(degrees: NDArray[np.float64], units: AngleUnit) -> dict[str, Any]:
    """All fields of a task but its inputs, for angles in degrees, shape (N,)."""
    return {
        "targets": converted(degrees[:, None], "degrees", units),
        "names": ("steering wheel angle",),
        "units": (units,),
        "source": SOURCE,
        "licence": LICENCE,
        "time": np.arange(len(degrees)),
    }


def _frame(folder: Path, name: str, table: Path) -> Path:
    for place in (folder / name, folder / "data" / name):
        if place.is_file():
            return place
    return existing_file(folder / "images" / name, f"a frame that {table} names, here, in data/ or beside {table.name}")


def load_steering_h5(path: PathLike, *, units: AngleUnit = "degrees") -> ArrayTask:
    """Load the frames that CcGAN prepared of SullyChen's, used in paper IV: HDF5 with `images` and `labels`.

    Labels are the wheel's angle **in degrees**. Paper IV splits the rows at random, 80/20 and unseeded, though they are
    frames of a video: neighbours of a test frame are in its training set, and its split cannot be had again.

    Args:
        path: `SteeringAngle_64x64.h5`, or another size.
        units: Unit of the angles that are returned; degrees by default, in which paper IV states its scores.

    Returns:
        Images as uint8, shape (N, 3, H, W), RGB, with the wheel's angle; `time` is the row's number in the file.

    Source:
        Ding et al., CcGAN, ICLR 2021 (github.com/UBCDingXin/improved_CcGAN); Gustafsson et al., AISTATS 2022.
    """
    images, labels = read_h5_images(path, "CcGAN's steering angles")
    return ArrayTask(x=images, **{**_fields(labels, units), "source": f"{SOURCE}; prepared by Ding et al., ICLR 2021"})
