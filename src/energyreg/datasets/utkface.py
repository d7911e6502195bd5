"""UTKFace: faces, and the age of the person."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, Literal

import numpy as np

from energyreg.datasets.files import (
    PathLike,
    existing_file,
    existing_folder,
    images_of,
    numbers,
    pictures,
    read_csv,
    read_h5_images,
)
from energyreg.datasets.tasks import ArrayTask, ImageTask

__all__ = ["load_utkface", "load_utkface_h5"]

SOURCE = "UTKFace, https://susanqq.github.io/UTKFace/; Zhang, Song and Qi, CVPR 2017"
LICENCE = "non-commercial research only"
NAME = re.compile(r"(\d{1,3})_([01])_([0-4])_(\d+)\.jpg(\.chip)?\.jpg")
"""[age]_[gender]_[race]_[date and time].jpg.chip.jpg; `.jpg` once in the release that is not aligned."""
FIELDS: dict[str, Any] = {"names": ("age",), "units": ("years",), "source": SOURCE, "licence": LICENCE}
"""What is the same in every task of UTKFace."""
OLDEST = 116
PAPER_IV = (1, 60)
"""The ages that paper IV keeps of the HDF5 file, in years."""


def load_utkface(path: PathLike, *, on_error: Literal["raise", "skip"] = "raise") -> ImageTask:
    """Load UTKFace from its folder: 23,708 aligned faces of 200×200 pixels, ages 1 to 116.

    The labels are in the names, `[age]_[gender]_[race]_[date and time].jpg.chip.jpg`. A folder with a `labels.csv`
    (columns file, age and split; further ones are ignored) and the pictures in `images/` or beside it is read by that
    file, with its split.

    Traps:

    - The public release has a few names that lack a field or are misspelt (`39_1_20170116174525125.jpg.chip.jpg`):
      they are named, or left out with `on_error="skip"`.
    - Ages are partly estimated by a model and checked by people, so they carry noise of their own, and they are
      integers: dequantise before you compare likelihoods.
    - Nobody is named, and some people are there more than once: a split by file shares people.

    No checksum of the release is published.

    Args:
        path: The folder.
        on_error: Whether a name that does not follow the pattern is an error, or is left out and listed in `skipped`.

    Returns:
        Files in natural order, with age in years.
    """
    if on_error not in ("raise", "skip"):
        raise ValueError(f"on_error is {on_error!r}; expected 'raise' or 'skip'.")
    folder = existing_folder(path, "UTKFace's folder of files [age]_[gender]_[race]_[date].jpg.chip.jpg")
    if (folder / "labels.csv").is_file():
        return _by_table(folder)
    files, ages, skipped = [], [], []
    for file in pictures(folder):
        match = NAME.fullmatch(file.name)
        if match is None or not 0 <= int(match[1]) <= OLDEST:
            if on_error == "raise":
                raise ValueError(
                    f"{file} has no name of UTKFace; expected [age]_[gender]_[race]_[date].jpg.chip.jpg with an age "
                    f"of 0 to {OLDEST}; rename or remove it, or pass on_error='skip'."
                )
            skipped.append(f"{file}: its name does not give the age")
            continue
        files.append(file)
        ages.append(float(match[1]))
    if not files:
        raise ValueError(f"{folder} holds no files of UTKFace, [age]_[gender]_[race]_[date].jpg.chip.jpg.")
    return ImageTask(files=files, targets=np.array(ages)[:, None], **FIELDS, skipped=tuple(skipped))


def _by_table(folder: Path) -> ImageTask:
    table = folder / "labels.csv"
    rows = read_csv(table, ["file", "age", "split"], "labels of UTKFace")
    images = images_of(folder)
    return ImageTask(
        files=[existing_file(images / row["file"], f"an image that {table} names") for row in rows],
        targets=numbers([row["age"] for row in rows], table, "age")[:, None],
        **FIELDS,
        split=np.array([row["split"] for row in rows]),
    )


def load_utkface_h5(path: PathLike, *, ages: tuple[int, int] | None = PAPER_IV) -> ArrayTask:
    """Load UTKFace as prepared for CcGAN and used in paper IV: one HDF5 file with `images` and `labels`.

    Paper IV splits it 80/20 by an unseeded shuffle, so that its split cannot be had again: compare only methods that
    ran on one split of your own.

    Args:
        path: `UTKFace_64x64.h5`, or another size.
        ages: Least and greatest age to keep, in years; paper IV keeps 1 to 60. None keeps all.

    Returns:
        Images as uint8, shape (N, 3, H, W), RGB, with age in years.

    Source:
        Ding et al., CcGAN, ICLR 2021 (github.com/UBCDingXin/improved_CcGAN); Gustafsson et al., AISTATS 2022.
    """
    images, labels = read_h5_images(path, "CcGAN's UTKFace")
    keep = np.ones(len(labels), dtype=bool) if ages is None else (labels >= ages[0]) & (labels <= ages[1])
    if not keep.any():
        raise ValueError(f"{path} has no age in {ages}; expected some rows with such labels.")
    return ArrayTask(
        x=images[keep],
        targets=labels[keep, None],
        **{**FIELDS, "source": f"{SOURCE}; prepared by Ding et al., ICLR 2021"},
    )
