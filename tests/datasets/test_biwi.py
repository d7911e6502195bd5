"""BIWI's angles are those of its rotations, in one order, with groups that keep people together."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from energyreg.datasets import load_aflw2000_landmarks, load_biwi, load_biwi_npz, load_headpose_features

# Frame 3 of sequence 12, as published in the data set's card.
ROTATION = [[0.980639, 0.109899, 0.162077], [-0.11023, 0.993882, -0.00697376], [-0.161851, -0.011027, 0.986754]]
ANGLES = (9.327469, -0.404924, -6.394386)


def pose_text(rotation: list[list[float]]) -> str:
    return "\n".join(" ".join(map(str, row)) + " " for row in rotation) + "\n\n43.4019 -30.7038 906.864 \n"


def frame(folder: Path, sequence: str, number: int, text: str) -> None:
    (folder / sequence).mkdir(parents=True, exist_ok=True)
    (folder / sequence / f"frame_{number:05d}_rgb.png").touch()
    (folder / sequence / f"frame_{number:05d}_depth.bin").touch()
    (folder / sequence / f"frame_{number:05d}_pose.txt").write_text(text)
    (folder / sequence / "rgb.cal").touch()


def rotation(yaw: float, pitch: float, roll: float) -> list[list[float]]:
    """Rx(-pitch) Ry(yaw) Rz(roll), of angles in degrees, as SciPy has it."""
    spatial = pytest.importorskip("scipy.spatial.transform")
    return spatial.Rotation.from_euler("XYZ", [-pitch, yaw, roll], degrees=True).as_matrix().tolist()


@pytest.mark.parametrize("nested", [False, True])
def test_frames_have_the_angles_of_their_rotations(tmp_path: Path, nested: bool) -> None:
    folder = tmp_path / "hpdb" if nested else tmp_path
    frame(folder, "12", 3, pose_text(ROTATION))
    poses = {("03", 7): (60.0, -20.0, 30.0), ("15", 4): (-75.0, 55.0, -45.0), ("15", 12): (0.0, 0.0, 0.0)}
    for (sequence, number), angles in poses.items():
        frame(folder, sequence, number, pose_text(rotation(*angles)))
    task = load_biwi(tmp_path, units="degrees")
    assert [file.parent.name + file.name[6:11] for file in task.files] == ["0300007", "1200003", "1500004", "1500012"]
    expected = [poses["03", 7], ANGLES, poses["15", 4], poses["15", 12]]
    np.testing.assert_allclose(task.targets, expected, atol=2e-6)
    assert task.names == ("yaw", "pitch", "roll") and task.units == ("degrees",) * 3
    assert task.groups is not None and task.time is not None
    # F03 is on sequences 03 and 15.
    assert task.groups.tolist() == ["F03", "M06", "F03", "F03"] and task.time.tolist() == [7, 3, 4, 12]
    by_sequence = load_biwi(tmp_path, group="sequence")
    assert by_sequence.groups is not None and by_sequence.groups.tolist() == ["03", "12", "15", "15"]
    np.testing.assert_allclose(by_sequence.targets, np.radians(expected), atol=1e-7)


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("", "it has 0 numbers, not 12"),
        ("1 0 0\n0 1 0\n0 0 1\n", "it has 9 numbers, not 12"),
        ("1 0 0\n0 1 0\n0 0 one\n\n1 2 3\n", "could not convert string"),
        ("1 0 0\n0 1 0\n0 0 -1\n\n1 2 3\n", "are no rotation"),
        ("1 0 0\n0 1 0\n0 0 2\n\n1 2 3\n", "are no rotation"),
        ("nan 0 0\n0 1 0\n0 0 1\n\n1 2 3\n", "are no rotation"),
    ],
)
def test_a_broken_pose_is_named(tmp_path: Path, text: str, problem: str) -> None:
    frame(tmp_path, "01", 5, text)
    with pytest.raises(ValueError, match=rf"frame_00005_pose\.txt is broken \(.*{problem}"):
        load_biwi(tmp_path)


def test_what_is_missing_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="holds none of the folders 01 to 24"):
        load_biwi(tmp_path)
    frame(tmp_path, "01", 5, pose_text(ROTATION))
    (tmp_path / "01" / "frame_00005_pose.txt").unlink()
    with pytest.raises(FileNotFoundError, match=r"frame_00005_pose\.txt does not exist"):
        load_biwi(tmp_path)
    (tmp_path / "01" / "frame_00005_rgb.png").unlink()
    with pytest.raises(ValueError, match=r"01 holds no frame_XXXXX_rgb\.png"):
        load_biwi(tmp_path)
    with pytest.raises(ValueError, match="units is 'gon'; expected 'radians' or 'degrees'"):
        load_biwi_npz(npz(tmp_path), units="gon")  # type: ignore[arg-type]


def npz(folder: Path) -> Path:
    image = np.zeros((2, 64, 64, 3), dtype=np.uint8)
    image[..., 0] = 200  # blue, in OpenCV's order
    np.savez(folder / "BIWI_train.npz", image=image, pose=np.array([ANGLES, (1.0, 2.0, 3.0)]), img_size=64)
    return folder / "BIWI_train.npz"


def test_crops_of_paper_iv_come_in_rgb(tmp_path: Path) -> None:
    task = load_biwi_npz(npz(tmp_path), units="degrees")
    assert task.x.shape == (2, 3, 64, 64) and task.x.dtype == np.uint8
    assert task.x[:, 2].min() == 200 and task.x[:, :2].max() == 0
    assert load_biwi_npz(npz(tmp_path), bgr=False).x[:, 0].min() == 200
    np.testing.assert_allclose(task.targets, [ANGLES, (1, 2, 3)])


def test_broken_crops_are_named(tmp_path: Path) -> None:
    path = npz(tmp_path)
    np.savez(tmp_path / "no_pose.npz", image=np.zeros(3))
    np.savez(tmp_path / "shape.npz", image=np.zeros((2, 4, 4, 3), dtype=np.uint8), pose=np.zeros((3, 3)))
    np.savez(tmp_path / "pickled.npz", image=np.array([{}], dtype=object), pose=np.zeros(3))
    nan = np.full((1, 3), np.nan)
    np.savez(tmp_path / "nan.npz", image=np.zeros((1, 4, 4, 3), dtype=np.uint8), pose=nan)
    (tmp_path / "cut.npz").write_bytes(path.read_bytes()[:900])
    for name, problem in {
        "no_pose": "but not pose",
        "shape": r"pose of shape \(3, 3\)",
        "pickled": "allow_pickle",
        "cut": "cannot be read",
        "nan": "row 0: pose holds a NaN",
    }.items():
        with pytest.raises(ValueError, match=rf"{name}\.npz.*{problem}"):
            load_biwi_npz(tmp_path / f"{name}.npz")


def features(folder: Path, subjects: list[str] | None, poses: np.ndarray) -> Path:
    path = folder / "biwi_train.npz"
    np.savez(path, features=np.ones((len(poses), 88), dtype=np.float32), poses=poses.astype(np.float32))
    if subjects is not None:
        rows = [f"{row},{subject},{'frame' if subject else ''}" for row, subject in enumerate(subjects)]
        (folder / "biwi_train_frames.csv").write_text("\n".join(["row,subject,frame", *rows]) + "\n")
    return path


def test_blank_rows_get_the_sequence_of_their_neighbours(tmp_path: Path) -> None:
    subjects = ["", "03", "", "", "03", "", "15", ""]
    path = features(tmp_path, subjects, np.zeros((8, 3)))
    task = load_headpose_features(path, group="sequence")
    # Before the first and after the last named row, and between two sequences, it is not known.
    assert task.groups is not None and task.groups.tolist() == ["", "03", "03", "03", "03", "", "15", ""]
    assert task.time is not None and task.time.tolist() == list(range(8))
    people = load_headpose_features(path).groups
    assert people is not None and people.tolist() == ["", "F03", "F03", "F03", "F03", "", "F03", ""]


def test_rows_beyond_the_limit_are_left_out_and_listed(tmp_path: Path) -> None:
    poses = np.array([[10, 20, 30], [-104, 0, 0], [0, 99, -99], [0, 0, 333]])
    task = load_headpose_features(features(tmp_path, None, poses), units="degrees", limit=99)
    assert task.targets.tolist() == [[10, 20, 30], [0, 99, -99]] and task.groups is None
    assert task.time is not None and task.time.tolist() == [0, 2]
    assert [line.split(", ")[1][:5] for line in task.skipped] == ["row 1", "row 3"]
    with pytest.raises(ValueError, match="limit is 0; expected a positive angle"):
        load_headpose_features(features(tmp_path, None, poses), limit=0)


def test_features_that_do_not_fit_are_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"frames\.csv has 2 rows; expected 3"):
        load_headpose_features(features(tmp_path, ["01", "01"], np.zeros((3, 3))))
    with pytest.raises(ValueError, match=r"frames\.csv has the subjects \['99'\]"):
        load_headpose_features(features(tmp_path, ["01", "99"], np.zeros((2, 3))))
    np.savez(tmp_path / "wide.npz", features=np.zeros((2, 87)), poses=np.zeros((2, 3)))
    with pytest.raises(ValueError, match=r"wide\.npz has features of shape \(2, 87\)"):
        load_headpose_features(tmp_path / "wide.npz")


@pytest.mark.parametrize(
    ("name", "rows", "sequences", "unknown"), [("biwi_train", 10284, 16, 10), ("biwi_test", 4826, 8, 0)]
)
def test_the_real_features(real: Callable[[str], Path], name: str, rows: int, sequences: int, unknown: int) -> None:
    task = load_headpose_features(real(f"headpose/features/{name}.npz"), units="degrees", group="sequence")
    assert task.x.shape == (rows, 88) and task.x.dtype == np.float32 and task.groups is not None
    assert len(set(task.groups.tolist()) - {""}) == sequences and (task.groups == "").sum() == unknown
    # Ranges that the data set's authors state: yaw ±75°, pitch ±60°, with a margin for the few beyond.
    assert (np.abs(task.targets).max(0) < [80, 80, 60]).all()
    assert (np.diff(task.targets.std(0)) < 0).all()  # yaw varies most, roll least


def test_the_real_test_set_shares_people_but_no_sequence_with_training(real: Callable[[str], Path]) -> None:
    paths = [real(f"headpose/features/biwi_{part}.npz") for part in ("train", "test")]
    train, test = ({*load_headpose_features(path, group="sequence").groups} - {""} for path in paths)  # type: ignore[misc]
    assert not train & test
    train, test = ({*load_headpose_features(path).groups} - {""} for path in paths)  # type: ignore[misc]
    assert train & test == {"F02", "F03", "F05"}


def test_the_columns_of_the_real_features_are_yaw_pitch_roll(real: Callable[[str], Path]) -> None:
    biwi = load_headpose_features(real("headpose/features/biwi_train.npz"), units="degrees")
    # Frame 3 of sequence 12 is row 5589; its rotation is the one above.
    np.testing.assert_allclose(biwi.targets[5589], ANGLES, atol=1e-5)
    aflw = load_headpose_features(real("headpose/features/aflw2000.npz"), units="degrees").targets
    named = load_aflw2000_landmarks(real("headpose/aflw2000_landmarks.csv"), units="degrees", limit=None).targets

    spatial = pytest.importorskip("scipy.spatial")

    def found(poses: np.ndarray) -> int:
        """How many of the features' poses are among these, to 0.01°."""
        return int((spatial.cKDTree(poses).query(aflw, p=np.inf)[0] < 0.01).sum())

    assert len(aflw) == 1793 and found(named) == 1793
    for order in ([1, 0, 2], [0, 2, 1], [2, 1, 0], [1, 2, 0], [2, 0, 1]):
        assert found(named[:, order]) <= 1
    assert found(named * [-1, 1, 1]) <= 1
