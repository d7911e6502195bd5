"""Cells are counted from their dots, whatever the layout; a missing image of dots is named."""

import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from energyreg.datasets import (
    crops_with_counts,
    load_adipocytes,
    load_aflw2000,
    load_cell200,
    load_mbm_cells,
    load_vgg_cells,
)
from energyreg.datasets.files import read_csv

Image = pytest.importorskip("PIL.Image")


def pair(image: Path, dots: Path, count: int, side: int = 48) -> np.ndarray:
    """An image and its dots, 5 pixels apart."""
    for path in (image, dots):
        path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (side, side)).save(image)
    places = np.array([(row, column) for row in range(3, side - 3, 6) for column in range(3, side - 3, 6)])[:count]
    pixels = np.zeros((side, side), dtype=np.uint8)
    pixels[places[:, 0], places[:, 1]] = 255
    Image.fromarray(pixels).save(dots)
    return places


def vgg(folder: Path) -> list[int]:
    for number, count in ((1, 4), (2, 0), (10, 7)):
        pair(folder / f"{number:03d}cell.png", folder / f"{number:03d}dots.png", count)
    return [4, 0, 7]


def mbm_released(folder: Path) -> list[int]:
    for name, count in (("0001_01_000", 3), ("0001_02_001", 5), ("0020_01_000", 2)):
        person, slide, number = name.split("_")
        dots = folder / f"BM_GRAZ_HE_{person}_{slide}_dots_{number}.png"
        pair(folder / f"BM_GRAZ_HE_{name}.png", dots, count)
    return [3, 5, 2]


def mbm_at_hand(folder: Path) -> list[int]:
    for name, count in (("0001_01_000", 3), ("0001_02_001", 5), ("0020_01_000", 2)):
        pair(folder / f"BM_GRAZ_HE_{name}.jpg", folder / f"BM_GRAZ_HE_{name}_dots.png", count)
    return [3, 5, 2]


def adipocytes(folder: Path) -> list[int]:
    for name, count in (("0-11900_GTEX-13QJC", 6), ("10200-5100_GTEX-OOBK", 9), ("11900-10200_GTEX-13QJC", 1)):
        file = f"{name}_Adipose-Subcutaneous.jpeg"
        pair(folder / "images" / file, folder / "annotations" / file, count)
    return [6, 9, 1]


LAYOUTS = [
    (load_vgg_cells, vgg, None),
    (load_mbm_cells, mbm_released, ["0001", "0001", "0020"]),
    (load_mbm_cells, mbm_at_hand, ["0001", "0001", "0020"]),
    (load_adipocytes, adipocytes, ["GTEX-13QJC", "GTEX-OOBK", "GTEX-13QJC"]),
]
IDS = ["VGG", "MBM as released", "MBM at hand", "adipocytes"]


@pytest.mark.parametrize(("load", "make", "groups"), LAYOUTS, ids=IDS)
def test_cells_are_counted(tmp_path: Path, load: Callable, make: Callable, groups: list[str] | None) -> None:
    counts = make(tmp_path)
    task = load(tmp_path)
    assert task.targets.ravel().tolist() == counts == [len(dots) for dots in task.dots]
    assert task.targets.shape == (3, 1) and task.names == task.units == ("cells",)
    assert (task.groups if task.groups is None else task.groups.tolist()) == groups
    assert not any("dots" in file.name or "annotations" in file.parts for file in task.files)


@pytest.mark.parametrize(("load", "make", "groups"), LAYOUTS, ids=IDS)
def test_missing_and_broken_dots_are_named(
    tmp_path: Path, load: Callable, make: Callable, groups: list[str] | None
) -> None:
    make(tmp_path)
    dots = sorted(file for file in tmp_path.rglob("*.*g") if "dots" in file.name or "annotations" in file.parts)
    dots[1].write_bytes(dots[1].read_bytes()[:50])
    with pytest.raises(ValueError, match=f"{dots[1].name} cannot be read as an image of dots"):
        load(tmp_path)
    dots[1].unlink()
    with pytest.raises(FileNotFoundError, match="does not exist; expected the dots of"):
        load(tmp_path)


@pytest.mark.parametrize("load", [load_vgg_cells, load_mbm_cells, load_adipocytes])
def test_a_folder_without_images_is_named(tmp_path: Path, load: Callable) -> None:
    (tmp_path / "images").mkdir()
    with pytest.raises(ValueError, match="holds no images; expected files such as"):
        load(tmp_path)
    with pytest.raises(FileNotFoundError, match="nowhere does not exist"):
        load(tmp_path / "nowhere")


def test_a_name_without_a_donor_is_named(tmp_path: Path) -> None:
    pair(tmp_path / "images" / "mine.jpeg", tmp_path / "annotations" / "mine.jpeg", 3)
    with pytest.raises(ValueError, match=r"mine\.jpeg has no donor in its name"):
        load_adipocytes(tmp_path)


@pytest.mark.parametrize("shape", [(2, 1, 8, 8), (2, 8, 8)])
def test_cell_200_is_read_from_hdf5(tmp_path: Path, shape: tuple[int, ...]) -> None:
    h5py = pytest.importorskip("h5py")
    path = tmp_path / "Cell200_64x64.h5"
    with h5py.File(path, "w") as file:
        file["IMGs_grey"], file["CellCounts"] = np.ones(shape, dtype=np.uint8), np.array([3.0, 200.0])
    task = load_cell200(path)
    assert task.x.shape == (2, 1, 8, 8) and task.targets.ravel().tolist() == [3, 200]
    with pytest.raises(ValueError, match="not IMGs_grey_test, CellCounts_test"):
        load_cell200(path, part="test")
    with h5py.File(path, "a") as file:
        file["IMGs_grey_test"], file["CellCounts_test"] = np.ones(shape, dtype=np.uint8), np.array([1, 2, 3])
    with pytest.raises(ValueError, match=r"Cell200_64x64\.h5 has images of shape .* and 3 labels"):
        load_cell200(path, part="test")
    with pytest.raises(ValueError, match="part is 'train'"):
        load_cell200(path, part="train")


@pytest.mark.parametrize(
    ("load", "name", "number", "least", "most"),
    [(load_vgg_cells, "vgg", 200, 74, 317), (load_mbm_cells, "mbm", 44, 65, 195)],
)
def test_the_real_cells(
    real: Callable[[str], Path], load: Callable, name: str, number: int, least: int, most: int
) -> None:
    task = load(real(f"cells/{name}"))
    assert len(task) == number and (task.targets.min(), task.targets.max()) == (least, most)
    rows = read_csv(real(f"cells/{name}_counts.csv"), ["file", "count"], "counts")
    counts = {Path(row["file"]).name: float(row["count"]) for row in rows}
    assert {file.name: y for file, y in zip(task.files, task.targets[:, 0], strict=True)} == counts


def test_tiles_of_the_real_marrow_add_up(real: Callable[[str], Path]) -> None:
    task = load_mbm_cells(real("cells/mbm"))
    assert task.groups is not None and len(set(task.groups.tolist())) == 8
    pixels = np.broadcast_to(np.uint8(0), (600, 600, 3))
    for dots, count in zip(task.dots, task.targets[:, 0], strict=True):
        _, counts, _ = crops_with_counts(pixels, dots, size=150)
        assert counts.shape == (16, 1) and counts.sum() == count


@pytest.mark.parametrize(
    ("module", "load", "name", "advice"),
    [
        ("PIL", load_vgg_cells, "001cell.png", r"pip install 'energyreg\[vision\]'"),
        ("h5py", load_cell200, "cells.h5", "pip install h5py"),
        ("scipy.io", load_aflw2000, "image00001.jpg", "pip install scipy"),
    ],
)
def test_a_missing_package_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, module: str, load: Callable, name: str, advice: str
) -> None:
    for file in (name, "001dots.png", "image00001.mat"):
        (tmp_path / file).touch()
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ImportError, match=advice):
        load(tmp_path / name if name.endswith(".h5") else tmp_path)
