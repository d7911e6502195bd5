"""AFLW2000 and 300W-LP come as yaw, pitch, roll, whatever the order and the sign in the file."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from energyreg.datasets import load_300w_lp, load_aflw2000, load_aflw2000_landmarks

io = pytest.importorskip("scipy.io")


def picture(folder: Path, name: str, yaw: float, pitch: float, roll: float) -> None:
    """A picture and its `.mat`, of angles in degrees."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}.jpg").touch()
    para = np.array([[*np.radians([pitch, yaw, roll]), 50.0, 60.0, 0.0, 1e-3]], dtype=np.float32)
    io.savemat(folder / f"{name}.mat", {"Pose_Para": para, "pt3d_68": np.zeros((3, 68))})


def test_pose_para_is_put_in_order(tmp_path: Path) -> None:
    picture(tmp_path, "image00010", 20, -10, 5)
    picture(tmp_path, "image00002", -60, 30, -15)
    task = load_aflw2000(tmp_path, units="degrees")
    assert [file.name for file in task.files] == ["image00002.jpg", "image00010.jpg"]
    np.testing.assert_allclose(task.targets, [[-60, 30, -15], [20, -10, 5]], atol=1e-5)
    assert task.names == ("yaw", "pitch", "roll") and task.units == ("degrees",) * 3
    np.testing.assert_allclose(load_aflw2000(tmp_path).targets, np.radians(task.targets), rtol=1e-6)


def test_rows_beyond_99_degrees_are_left_out_unless_asked_for(tmp_path: Path) -> None:
    picture(tmp_path, "image00001", 20, -10, 5)
    picture(tmp_path, "image00002", 0, -327, 0)
    task = load_aflw2000(tmp_path)
    assert len(task) == 1 and len(task.skipped) == 1 and "image00002.jpg" in task.skipped[0]
    assert len(load_aflw2000(tmp_path, limit=None)) == 2


def test_all_turns_of_a_photograph_are_one_group(tmp_path: Path) -> None:
    for folder in ("AFW", "AFW_Flip"):
        for turn in (0, 10, 2):
            picture(tmp_path / folder, f"AFW_1051618982_1_{turn}", turn, 0, 0)
    picture(tmp_path / "LFPW", "LFPW_image_test_0001_0", 1, 2, 3)
    (tmp_path / "landmarks").mkdir()
    task = load_300w_lp(tmp_path, units="degrees")
    assert task.groups is not None and len(task) == 7
    assert task.groups.tolist() == ["AFW/AFW_1051618982_1"] * 6 + ["LFPW/LFPW_image_test_0001"]
    np.testing.assert_allclose(task.targets[:, 0], [0, 2, 10, 0, 2, 10, 1], atol=1e-5)


def test_a_missing_or_broken_mat_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"holds no \.jpg"):
        load_aflw2000(tmp_path)
    with pytest.raises(ValueError, match="in the folders AFW, HELEN, IBUG, LFPW"):
        load_300w_lp(tmp_path)
    picture(tmp_path, "image00001", 20, -10, 5)
    mat = tmp_path / "image00001.mat"
    content = mat.read_bytes()
    for broken in (content[:200], b"", b"<html>Not found</html>" * 20, content[:128] + b"\xff" * 300):
        mat.write_bytes(broken)
        with pytest.raises(ValueError, match=r"image00001\.mat cannot be read as a pose"):
            load_aflw2000(tmp_path)
    io.savemat(mat, {"other": np.zeros(3)})
    with pytest.raises(ValueError, match=r"image00001\.mat cannot be read .*no variable Pose_Para"):
        load_aflw2000(tmp_path)
    for para in (np.zeros((1, 2)), np.array([[0.1, np.nan, 0.2]])):
        io.savemat(mat, {"Pose_Para": para})
        with pytest.raises(ValueError, match=r"image00001\.mat has Pose_Para of shape"):
            load_aflw2000(tmp_path)
    mat.unlink()
    with pytest.raises(FileNotFoundError, match=r"image00001\.mat does not exist"):
        load_aflw2000(tmp_path)


HEADER = ",".join(["image", "yaw", "pitch", "roll", *(f"{axis}{k}" for k in range(68) for axis in "xy")])


def test_landmarks_have_the_signs_of_the_mat_files(tmp_path: Path) -> None:
    points = ",".join(map(str, range(136)))
    (tmp_path / "a.csv").write_text(f"{HEADER}\nimage00002,-10,20,30,{points}\nimage00004,0,150,0,{points}\n")
    task = load_aflw2000_landmarks(tmp_path / "a.csv", units="degrees")
    assert task.targets.tolist() == [[10, 20, 30]] and "image00004" in task.skipped[0]
    assert task.x.shape == (1, 68, 2) and task.x[0, 3].tolist() == [6, 7]
    assert task.groups is not None and task.groups.tolist() == ["image00002"]
    as_is = load_aflw2000_landmarks(tmp_path / "a.csv", units="degrees", mat_signs=False, limit=None)
    assert as_is.targets.tolist() == [[-10, 20, 30], [0, 150, 0]]
    (tmp_path / "b.csv").write_text(f"{HEADER}\nimage00002,-10,20,30,{points.replace('135', 'x')}\n")
    with pytest.raises(ValueError, match=r"b\.csv, row 1: y67 is 'x'"):
        load_aflw2000_landmarks(tmp_path / "b.csv")


def test_the_real_landmarks_and_mat_files_agree(real: Callable[[str], Path]) -> None:
    table = load_aflw2000_landmarks(real("headpose/aflw2000_landmarks.csv"), units="degrees")
    assert len(table) == 1969 and len(table.skipped) == 31 and np.abs(table.targets).max() <= 99
    pictures = load_aflw2000(real("headpose/aflw2000_images"), units="degrees")
    assert len(pictures) == 16 and table.groups is not None
    for file, pose in zip(pictures.files, pictures.targets, strict=True):
        np.testing.assert_allclose(table.targets[table.groups == file.stem][0], pose, atol=2e-3)
