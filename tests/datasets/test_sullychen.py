"""SullyChen's driving data: both formats of data.txt, our table and CcGAN's HDF5."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from energyreg.datasets import load_steering_h5, load_sullychen

FORMATS = {
    "2017": "0.jpg 0.000000\n1.jpg -90.5\n10.jpg 180\n",
    "2018": "0.jpg 0.0,2018-07-01 17:09:44:912\r\n1.jpg -90.5,2018-07-01 17:09:44:945\r\n"
    "10.jpg 180,2018-07-01 17:09:45:1\r\n",
    "blank lines": "\n0.jpg 0.0\n\n1.jpg -90.5\n10.jpg 180\n\n",
}


def drive(folder: Path, text: str, place: str = ".") -> Path:
    (folder / place).mkdir(exist_ok=True)
    for name in ("0.jpg", "1.jpg", "10.jpg"):
        (folder / place / name).touch()
    (folder / "data.txt").write_text(text, newline="")
    return folder


@pytest.mark.parametrize("place", [".", "data", "images"])
@pytest.mark.parametrize("text", FORMATS.values(), ids=FORMATS)
def test_angles_are_read_in_degrees_and_in_order(tmp_path: Path, text: str, place: str) -> None:
    task = load_sullychen(drive(tmp_path, text, place), units="degrees")
    assert task.targets.tolist() == [[0.0], [-90.5], [180.0]] and task.units == ("degrees",)
    assert [file.name for file in task.files] == ["0.jpg", "1.jpg", "10.jpg"]
    assert all(file.is_file() for file in task.files)
    assert task.time is not None and task.time.tolist() == [0, 1, 2]
    np.testing.assert_allclose(load_sullychen(tmp_path).targets, np.radians(task.targets))


@pytest.mark.parametrize(
    ("text", "error", "problem"),
    [
        ("", ValueError, r"data\.txt is empty"),
        ("0.jpg\n", ValueError, r"data\.txt, line 1: is '0.jpg'; expected 'FILE ANGLE"),
        ("0.jpg 1 2 3\n", ValueError, "line 1"),
        ("0.jpg 0\n1.jpg left\n", ValueError, r"data\.txt, row 2: the angle is 'left'"),
        ("0.jpg 0\n1.jpg inf\n", ValueError, "row 2: the angle is 'inf'"),
        ("0.jpg 0\n7.jpg 1\n", FileNotFoundError, r"7\.jpg does not exist; expected a frame that .*data\.txt names"),
    ],
)
def test_a_broken_line_is_named(tmp_path: Path, text: str, error: type[Exception], problem: str) -> None:
    with pytest.raises(error, match=problem):
        load_sullychen(drive(tmp_path, text))


def test_a_folder_without_labels_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"data\.txt does not exist"):
        load_sullychen(tmp_path)


def test_ccgans_file_is_in_degrees(tmp_path: Path) -> None:
    h5py = pytest.importorskip("h5py")
    images = np.zeros((3, 3, 8, 8), dtype=np.uint8)
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file["images"], file["labels"] = images, np.array([-71.9, 0, 72], dtype=np.float32)
    task = load_steering_h5(tmp_path / "a.h5")
    np.testing.assert_allclose(task.targets, [[-71.9], [0], [72]], rtol=1e-6)
    assert task.x.shape == (3, 3, 8, 8) and task.time is not None and task.time.tolist() == [0, 1, 2]
    with h5py.File(tmp_path / "b.h5", "w") as file:
        file["images"], file["labels"] = images, np.zeros(4)
    with pytest.raises(ValueError, match=r"b\.h5 has images of shape .*, and 4 labels"):
        load_steering_h5(tmp_path / "b.h5")


def test_the_real_frames(real: Callable[[str], Path]) -> None:
    task = load_sullychen(real("steering/sullychen_100"), units="degrees")
    assert len(task) == 101 and (task.targets.min(), task.targets.max()) == (-2.22, 11.7)
    assert [file.name for file in task.files[:2]] == ["0.jpg", "1.jpg"]
