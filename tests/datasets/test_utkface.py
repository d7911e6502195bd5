"""UTKFace is read from its names, from our table and from CcGAN's HDF5; whatever is broken is named."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from energyreg.datasets import load_utkface, load_utkface_h5

NAMES = [
    "100_1_0_20170112213001988.jpg.chip.jpg",
    "9_1_2_20161219160530530.jpg.chip.jpg",
    "26_0_4_20170104231540630.jpg.chip.jpg",
]
BROKEN = ["39_1_20170116174525125.jpg.chip.jpg", "117_0_0_20170116174525125.jpg.chip.jpg", "me.jpg"]


def folder(path: Path, names: list[str]) -> Path:
    path.mkdir(exist_ok=True)
    for name in names:
        (path / name).touch()
    (path / "readme.txt").touch()
    return path


def test_ages_are_in_the_names(tmp_path: Path) -> None:
    task = load_utkface(folder(tmp_path, NAMES))
    assert [file.name for file in task.files] == [NAMES[1], NAMES[2], NAMES[0]]
    assert task.targets.tolist() == [[9.0], [26.0], [100.0]] and task.targets.dtype == np.float64
    assert (task.names, task.units, task.split, task.groups) == (("age",), ("years",), None, None)
    assert "non-commercial" in task.licence


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_name_is_named_or_skipped(tmp_path: Path, name: str) -> None:
    path = folder(tmp_path, [*NAMES, name])
    with pytest.raises(ValueError, match=rf"{name} has no name of UTKFace"):
        load_utkface(path)
    task = load_utkface(path, on_error="skip")
    assert len(task) == 3 and len(task.skipped) == 1 and name in task.skipped[0]


def test_the_table_brings_the_split(tmp_path: Path) -> None:
    folder(tmp_path / "images", NAMES)
    lines = ["file,age,gender,race,split", f"{NAMES[0]},100,1,0,train", f"{NAMES[2]},26,0,4,test"]
    (tmp_path / "labels.csv").write_text("\n".join(lines) + "\n")
    task = load_utkface(tmp_path)
    assert [file.name for file in task.files] == [NAMES[0], NAMES[2]] and task.targets.ravel().tolist() == [100, 26]
    assert task.rows("train").tolist() == [0] and task.rows("test").tolist() == [1]


@pytest.mark.parametrize(
    ("table", "error", "problem"),
    [
        ("file,age\na.jpg,3\n", ValueError, r"labels\.csv has the columns .*with split"),
        ("file,age,split\n", ValueError, r"labels\.csv has a header, but no rows"),
        ("file,age,split\n9_1_2_20161219160530530.jpg.chip.jpg,old,train\n", ValueError, "row 1: age is 'old'"),
        ("file,age,split\n9_1_2_20161219160530530.jpg.chip.jpg,nan,train\n", ValueError, "row 1: age is 'nan'"),
        ("file,age,split\n9_1_2_20161219160530530.jpg.chip.jpg,3\n", ValueError, "row 1: has more or fewer than 3"),
        ("file,age,split\n9_1_2_20161219160530530.jpg.chip.jpg,3,a,b\n", ValueError, "row 1: has more or fewer"),
        ("file,age,split\ngone.jpg,3,train\n", FileNotFoundError, r"gone\.jpg does not exist"),
        (b"\xff\xfe\x00", ValueError, r"labels\.csv is not text"),
    ],
)
def test_a_broken_table_is_named(tmp_path: Path, table: str | bytes, error: type[Exception], problem: str) -> None:
    folder(tmp_path, NAMES)
    (tmp_path / "labels.csv").write_bytes(table if isinstance(table, bytes) else table.encode())
    with pytest.raises(error, match=problem):
        load_utkface(tmp_path)


def test_a_missing_or_empty_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="nowhere does not exist"):
        load_utkface(tmp_path / "nowhere")
    (tmp_path / "file").touch()
    with pytest.raises(NotADirectoryError, match="file is a file"):
        load_utkface(tmp_path / "file")
    with pytest.raises(ValueError, match="holds no files of UTKFace"):
        load_utkface(folder(tmp_path / "empty", []))


def test_ccgans_file_keeps_the_ages_of_paper_iv(tmp_path: Path) -> None:
    h5py = pytest.importorskip("h5py")
    images = np.arange(4 * 3 * 8 * 8, dtype=np.uint8).reshape(4, 3, 8, 8)
    with h5py.File(tmp_path / "UTKFace_64x64.h5", "w") as file:
        file["images"], file["labels"], file["races"] = images, np.array([1, 60, 61, 116]), np.zeros(4)
    task = load_utkface_h5(tmp_path / "UTKFace_64x64.h5")
    assert task.targets.ravel().tolist() == [1, 60] and np.array_equal(task.x, images[:2])
    assert len(load_utkface_h5(tmp_path / "UTKFace_64x64.h5", ages=None)) == 4
    with pytest.raises(ValueError, match=r"no age in \(70, 80\)"):
        load_utkface_h5(tmp_path / "UTKFace_64x64.h5", ages=(70, 80))
    with h5py.File(tmp_path / "other.h5", "w") as file:
        file["images"] = images
    with pytest.raises(ValueError, match=r"other\.h5 cannot be read as CcGAN's UTKFace: .*not labels"):
        load_utkface_h5(tmp_path / "other.h5")
    with h5py.File(tmp_path / "shape.h5", "w") as file:
        file["images"], file["labels"] = images.astype(float), np.zeros(4)
    with pytest.raises(ValueError, match=r"shape\.h5 has images of shape \(4, 3, 8, 8\), float64"):
        load_utkface_h5(tmp_path / "shape.h5")
    (tmp_path / "cut.h5").write_bytes((tmp_path / "other.h5").read_bytes()[:500])
    with pytest.raises(ValueError, match=r"cut\.h5 cannot be read"):
        load_utkface_h5(tmp_path / "cut.h5")


def test_the_real_faces(real: Callable[[str], Path]) -> None:
    task = load_utkface(real("age"))
    assert (len(task.rows("train")), len(task.rows("test"))) == (5120, 1280)
    assert (task.targets.min(), task.targets.max(), np.median(task.targets)) == (1, 116, 29)
    by_name = load_utkface(real("age/images"))
    age = {file.name: y for file, y in zip(by_name.files, by_name.targets[:, 0], strict=True)}
    assert len(by_name) == 6400
    assert all(age[file.name] == y for file, y in zip(task.files, task.targets[:, 0], strict=True))
