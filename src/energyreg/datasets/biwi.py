"""BIWI Kinect head poses: video of 20 people who turn their heads, and the angles of the head."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from energyreg.datasets.angles import AngleUnit, pose_fields, without_wide_angles
from energyreg.datasets.files import PathLike, existing_file, existing_folder, read_csv, read_npz
from energyreg.datasets.tasks import ArrayTask, ImageTask

__all__ = ["load_biwi", "load_biwi_npz", "load_headpose_features"]

SOURCE = "BIWI Kinect Head Pose Database; Fanelli et al., International Journal of Computer Vision 101, 2013"
LICENCE = "non-commercial use such as university research and education"
FRAME = re.compile(r"frame_(\d{5})_rgb\.png")
_ORDER = (
    "F01", "F02", "F03", "F04", "F05", "F06", "M01", "M02", "M03", "M04", "M05", "M06",
    "M07", "M08", "F03", "M09", "M10", "F05", "M11", "M12", "F02", "M01", "M13", "M14",
)  # fmt: skip
PEOPLE = {f"{number:02d}": person for number, person in enumerate(_ORDER, start=1)}
"""Sequence → person, as in the data set's readme: F02, F03, F05 and M01 were recorded twice."""
NUM_FEATURES = 88
# A row of the rotation matrix is a unit vector up to the six digits that the files print.
ORTHONORMAL = 1e-3


def load_biwi(
    path: PathLike, *, units: AngleUnit = "radians", group: Literal["person", "sequence"] = "person"
) -> ImageTask:
    r"""Load BIWI from its folders: 24 sequences, over 15,000 frames of 640×480 pixels.

    Each folder `01` to `24` (under `path`, or under `path/hpdb`) holds `frame_XXXXX_rgb.png` with
    `frame_XXXXX_pose.txt`: a rotation matrix R of three rows, then the head's centre in millimetres. The files hold no
    angles; they are taken from R as the head pose literature does,

    .. math::
        \text{yaw} = \operatorname{atan2}(R_{13}, \sqrt{R_{23}^2 + R_{33}^2}),\quad
        \text{pitch} = \operatorname{atan2}(R_{23}, R_{33}),\quad
        \text{roll} = -\operatorname{atan2}(R_{12}, R_{11}),

    which is FSA-Net's formula, and gives the angles of :func:`load_headpose_features` to six digits. (Hopenet takes
    those of the transposed matrix, whose pitch and roll differ by up to some degrees.) Frames are in the range of about
    ±75° yaw, ±60° pitch and ±50° roll.

    Traps:

    - Frames are video, 30 a second: never split them at random. Hand `groups` to
      :func:`energyreg.datasets.split_by_group`.
    - A split by sequence still shares people: F02, F03, F05 and M01 were recorded twice. Hence group="person".
    - The pictures are whole frames: the head is a small part, which the benchmarks crop first.

    Args:
        path: The folder that holds the sequences.
        units: Unit of the angles that are returned.
        group: What `groups` holds: the person ("F03") or the sequence ("15").

    Returns:
        Frames in order, targets (yaw, pitch, roll), `time` the number of the frame in its sequence.
    """
    _check_group(group)
    folder = existing_folder(path, "the folder of BIWI's sequences 01 to 24")
    if (folder / "hpdb").is_dir():
        folder = folder / "hpdb"
    frames: list[tuple[Path, str, int]] = []
    for sequence, person in PEOPLE.items():
        if not (folder / sequence).is_dir():
            continue
        found = sorted(file for file in (folder / sequence).iterdir() if FRAME.fullmatch(file.name))
        if not found:
            raise ValueError(f"{folder / sequence} holds no frame_XXXXX_rgb.png; expected a sequence of BIWI.")
        for file in found:
            frames.append((file, person if group == "person" else sequence, int(file.name[6:11])))
    if not frames:
        raise ValueError(f"{folder} holds none of the folders 01 to 24; expected BIWI's sequences.")
    files, groups, time = zip(*frames, strict=True)
    angles = [_angles(_rotation(file.with_name(file.name.replace("rgb.png", "pose.txt")))) for file in files]
    return ImageTask(
        files=list(files),
        **pose_fields(np.stack(angles), "radians", units),
        source=SOURCE,
        licence=LICENCE,
        groups=np.array(groups),
        time=np.array(time, dtype=np.int64),
    )


def _check_group(group: str) -> None:
    if group not in ("person", "sequence"):
        raise ValueError(f"group is {group!r}; expected 'person' or 'sequence'.")


def _rotation(path: Path) -> NDArray[np.float64]:
    """The rotation matrix of a pose file, shape (3, 3)."""
    what = "a pose of BIWI: three rows of a rotation matrix, then the head's centre"
    try:
        content = np.array(existing_file(path, what).read_text(encoding="ascii").split(), dtype=np.float64)
        if len(content) != 12:
            raise ValueError(f"it has {len(content)} numbers, not 12")
        rotation = content[:9].reshape(3, 3)
        if not np.allclose(rotation @ rotation.T, np.eye(3), atol=ORTHONORMAL) or np.linalg.det(rotation) < 0:
            raise ValueError("its first three rows are no rotation")
    except ValueError as error:
        raise ValueError(f"{path} is broken ({error}); expected {what}.") from error
    return rotation


def _angles(rotation: NDArray[np.float64]) -> NDArray[np.float64]:
    """Yaw, pitch and roll in radians, shape (3,)."""
    r = rotation
    yaw = np.arctan2(r[0, 2], np.hypot(r[1, 2], r[2, 2]))
    return np.array([yaw, np.arctan2(r[1, 2], r[2, 2]), -np.arctan2(r[0, 1], r[0, 0])])


def load_biwi_npz(path: PathLike, *, units: AngleUnit = "radians", bgr: bool = True) -> ArrayTask:
    """Load the crops of BIWI that paper IV uses: `BIWI_train.npz` (10,613) or `BIWI_test.npz` (5,065).

    FSA-Net's scripts made them: faces found by MTCNN, resized to 64×64, in `image`; (yaw, pitch, roll) in degrees in
    `pose`.

    Traps:

    - The scripts read pictures with OpenCV, so the channels are in the order blue, green, red; they are turned here.
      (Paper IV's code does not turn them, though its normalisation is for red, green, blue.)
    - The rows do not say which sequence they are from. The files split the 24 sequences 16 to 8 by a draw without a
      seed, so copies from other hands may differ; take validation rows as a block from the end, never at random.
    - Paper IV's loader flips a view of the poses in place, so that a flipped label stays flipped in the next epoch
      where workers live on. Here augmentation never writes into its input.

    Args:
        path: The npz file.
        units: Unit of the angles that are returned.
        bgr: Whether the file holds blue, green, red.

    Returns:
        Images as uint8, shape (N, 3, 64, 64), RGB, with targets (yaw, pitch, roll); `time` is the row's number.
    """
    what = "crops of BIWI"
    image, pose = read_npz(path, ["image", "pose"], what)
    if image.ndim != 4 or image.shape[3] != 3 or image.dtype != np.uint8 or pose.shape != (len(image), 3):
        raise ValueError(
            f"{path} has image of shape {image.shape}, {image.dtype}, and pose of shape {pose.shape}; expected {what}: "
            f"uint8 (N, H, W, 3) and (N, 3)."
        )
    rgb = image[..., ::-1] if bgr else image
    return ArrayTask(
        x=np.ascontiguousarray(rgb.transpose(0, 3, 1, 2)),
        **pose_fields(_finite(pose, path, "pose"), "degrees", units),
        source=f"{SOURCE}; crops by FSA-Net, Yang et al., CVPR 2019",
        licence=LICENCE,
        time=np.arange(len(pose)),
    )


def load_headpose_features(
    path: PathLike,
    *,
    units: AngleUnit = "radians",
    limit: float | None = None,
    group: Literal["person", "sequence"] = "person",
) -> ArrayTask:
    """Load the 88 features a face of `biwi_train.npz`, `biwi_test.npz` or `aflw2000.npz` (arrays features and poses).

    The order of the columns of `poses` is not documented with the files. It is **yaw, pitch, roll, in degrees, with the
    signs of AFLW2000's .mat files**, which is established thus:

    - Each of the 1,793 poses of `aflw2000.npz` is found, to 0.01°, in the 2,000 of AFLW2000 that
      :func:`energyreg.datasets.load_aflw2000_landmarks` reads with named columns, in this order and with that sign of
      yaw; in any other order, or with the other sign, at most one is.
    - BIWI's frame 3 of sequence 12 has the rotation that gives (9.3275, -0.4049, -6.3944)° by the formula of
      :func:`load_biwi`; that row of `biwi_train.npz` reads (9.327469, -0.404924, -6.394386).
    - Ridge regression fitted on BIWI and tested on AFLW2000 correlates with the columns by .96, .74 and .83 (and by at
      most .2 with another column): the order and the signs are the same in both.

    Traps:

    - BIWI's frames are video: split by `groups`. They come from `biwi_*_frames.csv` beside the file. A tenth of its
      rows are blank; such a row lies in the sequence of its neighbours where both agree, and has the group "" (not
      known) otherwise.
    - The train and test files share no sequence, but they share **people**: sequences 15, 18 and 21 of the test file
      show F03, F05 and F02, whom the training file has as 03, 05 and 02.
    - `aflw2000.npz` has rows far beyond ±99°, even beyond ±180°: pass limit=99 for the usual set.
    - Some features hardly vary on the training file and are huge in the test file. Standardise with a clip, or by
      quantiles (:class:`energyreg.networks.encoders.QuantileNormalizer`).

    Args:
        path: The npz file.
        units: Unit of the angles that are returned.
        limit: Rows with an angle beyond ±limit degrees are left out, and listed in `skipped`.
        group: What `groups` holds, where the frames are known: the person or the sequence.

    Returns:
        Features, float32, shape (N, 88), with targets (yaw, pitch, roll); `time` is the row's number in the file.
    """
    _check_group(group)
    path = Path(path)
    features, poses = read_npz(path, ["features", "poses"], "features of head poses")
    if features.ndim != 2 or features.shape[1] != NUM_FEATURES or poses.shape != (len(features), 3):
        raise ValueError(
            f"{path} has features of shape {features.shape} and poses of shape {poses.shape}; expected "
            f"(N, {NUM_FEATURES}) and (N, 3)."
        )
    degrees = _finite(poses, path, "poses")
    _finite(features, path, "features")
    frames = path.with_name(f"{path.stem}_frames.csv")
    groups = _groups(frames, len(features), group) if frames.is_file() else None
    task = ArrayTask(
        x=features.astype(np.float32, copy=False),
        **pose_fields(degrees, "degrees", units),
        source=f"{SOURCE}; AFLW2000-3D, Zhu et al., CVPR 2016; features by Maaz77/Head-Pose-Estimation-Model",
        licence="research only (BIWI and AFLW)",
        groups=groups,
        time=np.arange(len(features)),
    )
    return without_wide_angles(task, degrees, limit, lambda row: f"{path}, row {row}")


def _groups(path: Path, n: int, group: str) -> NDArray[np.str_]:
    """Group of each of the n rows, "" where it is not known."""
    names = [row["subject"] for row in read_csv(path, ["row", "subject", "frame"], "the frames of BIWI")]
    if len(names) != n:
        raise ValueError(f"{path} has {len(names)} rows; expected {n}, one for each row of the features.")
    before, after, last = list(names), list(names), ""
    for rows, filled in ((range(n), before), (range(n - 1, -1, -1), after)):
        last = ""
        for row in rows:
            last = filled[row] = names[row] or last
    if unknown := set(before) - set(PEOPLE) - {""}:
        raise ValueError(f"{path} has the subjects {sorted(unknown)}; expected BIWI's sequences 01 to 24.")
    sequences = [one if one == other else "" for one, other in zip(before, after, strict=True)]
    return np.array([PEOPLE.get(name, "") if group == "person" else name for name in sequences])


def _finite(values: NDArray[np.floating], path: PathLike, name: str) -> NDArray[np.float64]:
    if not np.isfinite(values).all():
        row = int(np.argmin(np.isfinite(values).all(axis=1)))
        raise ValueError(f"{path}, row {row}: {name} holds a NaN or an infinite number.")
    return values.astype(np.float64)
