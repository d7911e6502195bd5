"""AFLW2000-3D and 300W-LP: faces with the pose of a fitted 3-D model."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from energyreg.datasets.angles import POSE, AngleUnit, pose_fields, without_wide_angles
from energyreg.datasets.files import PathLike, existing_folder, numbers, pictures, read_csv, read_mat
from energyreg.datasets.tasks import ArrayTask, ImageTask

__all__ = ["load_300w_lp", "load_aflw2000", "load_aflw2000_landmarks"]

SOURCE_AFLW = "AFLW2000-3D, http://www.cbsr.ia.ac.cn/users/xiangyuzhu/projects/3DDFA/main.htm; Zhu et al., CVPR 2016"
LICENCE_AFLW = "research only (AFLW)"
SOURCE_300W = "300W-LP, http://www.cbsr.ia.ac.cn/users/xiangyuzhu/projects/3DDFA/main.htm; Zhu et al., CVPR 2016"
LICENCE_300W = "see the authors' page; the pictures are those of 300-W, for research only"
USUAL_LIMIT = 99.0
"""Degrees beyond which the literature leaves rows of AFLW2000 out: 31 of 2,000."""
NUM_LANDMARKS = 68
SETS_300W = ("AFW", "HELEN", "IBUG", "LFPW")


def load_aflw2000(path: PathLike, *, units: AngleUnit = "radians", limit: float | None = USUAL_LIMIT) -> ImageTask:
    """Load AFLW2000-3D from its folder: 2,000 pictures `imageXXXXX.jpg` of 450×450 pixels, each with a `.mat`.

    `Pose_Para` of a `.mat` is (pitch, yaw, roll, ...) **in radians**; the targets are put into this package's order,
    (yaw, pitch, roll). Signs are those of the file.

    Traps:

    - 31 rows have an angle beyond ±99°; the literature leaves them out, and so does the default. Some are beyond ±180°.
    - The sign of yaw differs between copies: see :func:`load_aflw2000_landmarks`.
    - It is a test set: models are trained on 300W-LP, never on it.

    Args:
        path: The folder.
        units: Unit of the angles that are returned.
        limit: Rows with an angle beyond ±limit degrees are left out, and listed in `skipped`; None keeps all.

    Returns:
        Files in natural order, with targets (yaw, pitch, roll).
    """
    folder = existing_folder(path, "AFLW2000's folder of imageXXXXX.jpg with .mat")
    files = pictures(folder)
    if not files:
        raise ValueError(f"{folder} holds no .jpg; expected AFLW2000's imageXXXXX.jpg.")
    return _poses(files, units, limit, SOURCE_AFLW, LICENCE_AFLW, None)


def load_300w_lp(path: PathLike, *, units: AngleUnit = "radians", limit: float | None = USUAL_LIMIT) -> ImageTask:
    """Load 300W-LP from its folders: 122,450 pictures of 450×450 pixels, each with a `.mat`.

    The folders `AFW`, `HELEN`, `IBUG` and `LFPW`, and their mirror images `AFW_Flip` and so on, hold `NAME_k.jpg` with
    `NAME_k.mat`, read as in :func:`load_aflw2000`. The pictures NAME_0, NAME_1, ... are one photograph, turned to
    larger and larger yaw by a 3-D model.

    Traps:

    - All turns of a photograph, and their mirror images, show one face: split by `groups`, never by file.
    - Large yaws are rendered, with smeared cheeks and ears.
    - The pictures are mirrored already: a random flip doubles nothing.

    Args:
        path: The folder that holds these folders.
        units: Unit of the angles that are returned.
        limit: Rows with an angle beyond ±limit degrees are left out, and listed in `skipped`; None keeps all.

    Returns:
        Files in natural order by folder, with targets (yaw, pitch, roll); `groups` is the photograph.
    """
    folder = existing_folder(path, "300W-LP's folder, with AFW, HELEN, IBUG and LFPW in it")
    files: list[Path] = []
    groups: list[str] = []
    for name in SETS_300W:
        for sub in (folder / name, folder / f"{name}_Flip"):
            if not sub.is_dir():
                continue
            found = pictures(sub)
            files += found
            groups += [f"{name}/{re.sub(r'_[0-9]+$', '', file.stem)}" for file in found]
    if not files:
        raise ValueError(f"{folder} holds no .jpg in the folders {', '.join(SETS_300W)}; expected 300W-LP.")
    return _poses(files, units, limit, SOURCE_300W, LICENCE_300W, np.array(groups))


def _poses(
    files: list[Path], units: AngleUnit, limit: float | None, source: str, licence: str, groups: NDArray[np.str_] | None
) -> ImageTask:
    """The task of pictures with a `.mat` beside each."""
    radians = np.empty((len(files), 3))
    for row, file in enumerate(files):
        mat = file.with_suffix(".mat")
        (pose,) = read_mat(mat, ["Pose_Para"], "a pose of AFLW2000 or 300W-LP")
        if pose.size < 3 or not np.isfinite(pose.reshape(-1)[:3]).all():
            raise ValueError(
                f"{mat} has Pose_Para of shape {pose.shape}; expected pitch, yaw and roll in radians first, all finite."
            )
        pitch, yaw, roll = pose.reshape(-1)[:3]
        radians[row] = yaw, pitch, roll
    task = ImageTask(
        files=files, **pose_fields(radians, "radians", units), source=source, licence=licence, groups=groups
    )
    return without_wide_angles(task, np.degrees(radians), limit, lambda row: str(files[row]))


def load_aflw2000_landmarks(
    path: PathLike, *, units: AngleUnit = "radians", limit: float | None = USUAL_LIMIT, mat_signs: bool = True
) -> ArrayTask:
    """Load the poses and 68 landmarks of AFLW2000 from one CSV: image, yaw, pitch, roll, x0, y0, ..., x67, y67.

    Angles are in degrees there. **Its yaw has the other sign than the .mat files'**: 16 pictures that both have agree
    in pitch and roll to three decimals and in yaw but for the sign. It is turned here, unless `mat_signs` is False.

    Args:
        path: The CSV file.
        units: Unit of the angles that are returned.
        limit: Rows with an angle beyond ±limit degrees are left out (31 of 2,000), and listed in `skipped`; None keeps
            all.
        mat_signs: Whether yaw gets the sign of the .mat files and of the rest of this package.

    Returns:
        Landmarks (x, y) in pixels of the 450×450 picture, float64, shape (N, 68, 2), with targets (yaw, pitch, roll);
        `groups` is the picture's name.
    """
    columns = [f"{axis}{k}" for k in range(NUM_LANDMARKS) for axis in "xy"]
    rows = read_csv(path, ["image", *POSE, *columns], "landmarks of AFLW2000")
    degrees, points = (
        np.stack([numbers([row[name] for row in rows], path, name) for name in chosen], axis=1)
        for chosen in (POSE, columns)
    )
    names = np.array([row["image"] for row in rows])
    task = ArrayTask(
        x=points.reshape(len(rows), NUM_LANDMARKS, 2),
        **pose_fields(degrees * np.array([-1.0 if mat_signs else 1.0, 1.0, 1.0]), "degrees", units),
        source=f"{SOURCE_AFLW}; landmarks by pcr-upm/opal23_headpose",
        licence=f"MIT; the pictures: {LICENCE_AFLW}",
        groups=names,
    )
    return without_wide_angles(task, degrees, limit, lambda row: f"{path}, {names[row]}")
