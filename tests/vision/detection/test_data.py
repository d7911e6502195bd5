"""Boxes from files: what is read is what was written, and what is wrong is named."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

from energyreg.vision.detection.data import BoxDataset, BoxRecord

pytest.importorskip("torchvision")

from PIL import Image
from torchvision import tv_tensors
from torchvision.transforms import v2


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Three images of height 20 and width 30."""
    for number in range(3):
        Image.new("RGB", (30, 20), (80 * number,) * 3).save(tmp_path / f"{number}.png")
    return tmp_path


def _coco(**changes: Any) -> dict[str, Any]:
    content = {
        "images": [{"id": 7 + n, "file_name": f"{n}.png", "height": 20, "width": 30} for n in range(3)],
        "categories": [{"id": 9, "name": "dog"}, {"id": 4, "name": "cat"}],
        "annotations": [
            {"id": 1, "image_id": 7, "category_id": 9, "bbox": [1, 2, 10, 12.5]},
            {"id": 2, "image_id": 8, "category_id": 4, "bbox": [0, 0, 30, 20]},
            {"id": 3, "image_id": 7, "category_id": 4, "bbox": [5, 5, 4, 4], "iscrowd": 0},
            {"id": 4, "image_id": 7, "category_id": 4, "bbox": [5, 5, 4, 4], "iscrowd": 1},
        ],
    }
    return content | changes


def _annotation(**changes: Any) -> dict[str, Any]:
    return _coco(annotations=[{"id": 1, "image_id": 7, "category_id": 9, "bbox": [1, 2, 10, 12]} | changes])


def _write(folder: Path, content: Any) -> Path:
    path = folder / "boxes.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


CSV = """image,x1,y1,x2,y2,label,extra
0.png,1,2,11,14.5,dog,
1.png,0,0,30,20,cat,5
0.png,5,5,9,9,cat,
2.png,,,,,,
"""


def test_coco_and_csv_say_the_same(folder: Path) -> None:
    first = BoxDataset.from_coco(folder, _write(folder, _coco()))
    (folder / "boxes.csv").write_text(CSV)
    second = BoxDataset.from_csv(folder, folder / "boxes.csv")
    assert first.classes == second.classes == ["cat", "dog"] and first.num_classes == 3
    assert repr(first) == repr(second) == "BoxDataset(3 images, 3 boxes, classes: cat, dog)"
    for (image, target), (other, same) in zip(first, second, strict=True):
        assert torch.equal(image, other) and torch.equal(target["boxes"], same["boxes"])
        assert torch.equal(target["labels"], same["labels"]) and target["image_id"] == same["image_id"]
    image, target = first[0]
    assert target["boxes"].tolist() == [[1, 2, 11, 14.5], [5, 5, 9, 9]] and target["labels"].tolist() == [2, 1]
    image, target = first[2]
    assert isinstance(image, tv_tensors.Image) and image.shape == (3, 20, 30)
    assert torch.allclose(image, torch.tensor(160 / 255)) and target["boxes"].shape == (0, 4)


def test_other_names_of_columns_and_boxes_without_area(folder: Path) -> None:
    path = folder / "boxes.csv"
    path.write_text("file,width,height,xmin,ymin,xmax,ymax,class\n0.png,30,20,1,2,11,14,a\n0.png,30,20,3,3,3,9,b\n")
    with pytest.raises(ValueError, match=r"Box 1 of image .*0.png is \(3, 3, 3, 9\)"):
        BoxDataset.from_csv(folder, path)
    with pytest.warns(UserWarning, match="has 1 boxes without area"):
        data = BoxDataset.from_csv(folder, path, drop_empty=True)
    assert data[0][1]["boxes"].tolist() == [[1, 2, 11, 14]]
    with pytest.warns(UserWarning, match="has 1 boxes without area"):
        data = BoxDataset.from_coco(folder, _write(folder, _annotation(bbox=[1, 2, 0, 5])), drop_empty=True)
    assert not any(record.boxes for record in data.records)


@pytest.mark.parametrize(("name", "boxes"), [("pennfudan", 423), ("bccd", 4886)])
def test_real_annotations_are_read(name: str, boxes: int) -> None:
    folder = Path(__file__).resolve().parents[4] / "shared" / "data" / "detection" / name
    if not folder.is_dir():
        pytest.skip("the data are not beside the repository")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # BCCD has two boxes without area
        data = BoxDataset.from_csv(folder / "images", folder / "boxes.csv", drop_empty=True)
    assert sum(len(record.boxes) for record in data.records) == boxes
    image, target = data[0]
    assert image.shape[0] == 3 and len(target["boxes"]) > 0


def test_transforms_move_image_and_boxes(folder: Path) -> None:
    flip = v2.Compose([v2.RandomHorizontalFlip(1.0), v2.Resize((40, 60))])
    _, target = BoxDataset.from_coco(folder, _write(folder, _coco()), flip)[0]
    assert target["boxes"][0].tolist() == [38, 4, 58, 29]


def test_parts(folder: Path) -> None:
    data = BoxDataset.from_coco(folder, _write(folder, _coco()))
    assert [record.path.name for record in data.with_boxes().records] == ["0.png", "1.png"]
    first, second = data.split(0.34, seed=1)
    assert len(first) == 2 and len(second) == 1
    assert sorted(r.path.name for r in first.records + second.records) == ["0.png", "1.png", "2.png"]
    with pytest.raises(ValueError, match=r"fraction is 1.0"):
        data.split(1.0)
    with pytest.raises(ValueError, match="No image has a box"):
        BoxDataset([BoxRecord(folder / "0.png", (), ())], ["a"]).with_boxes()
    with pytest.raises(ValueError, match=r"label of box 0 of image .*0.png is 2; expected 1 to 1"):
        BoxDataset([BoxRecord(folder / "0.png", ((0.0, 0.0, 1.0, 1.0),), (2,))], ["a"])
    with pytest.raises(ValueError, match="records is empty"):
        BoxDataset([], ["a"])


@pytest.mark.parametrize(
    ("content", "error", "message"),
    [
        ("{", ValueError, r"boxes.json is no JSON file"),
        ([], ValueError, "has no list 'images'"),
        (_coco(categories=None), ValueError, "has no list 'categories'"),
        (_annotation(image_id=99), ValueError, "Annotation 1 in .* is of image 99, which is not"),
        (_annotation(category_id=3), ValueError, r"Annotation 1 in .*, image 0.png, is of category 3"),
        (_annotation(bbox=[1, 2, 0, 5]), ValueError, r"Annotation 1 in .*, image 0.png, has bbox \[1, 2, 0, 5\]"),
        (_annotation(bbox=[1, 2, 3]), ValueError, "has bbox"),
        (_annotation(bbox=[1, 2, 40, 5]), ValueError, r"Box 0 of image .*0.png .* outside"),
        (
            _coco(images=[{"id": 7, "file_name": "no.png"}], annotations=[]),
            FileNotFoundError,
            r"no.png, which does not",
        ),
    ],
)
def test_bad_coco_files_are_named(folder: Path, content: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        BoxDataset.from_coco(folder, _write(folder, content))


@pytest.mark.parametrize(
    ("text", "error", "message"),
    [
        ("image,x1,y1,x2,y2\n", ValueError, "has no column 'label'"),
        ("image,x1,y1,x2,y2,label\n0.png,1,2,three,4,a\n", ValueError, r"Line 2 of .*, image 0.png, has"),
        ("image,x1,y1,x2,y2,label\n0.png,1,2,3,4,\n", ValueError, r"Line 2 of .*, image 0.png, has no label"),
        ("image,x1,y1,x2,y2,label\n,1,2,3,4,a\n", ValueError, "Line 2 of .* names no image"),
        ("image,x1,y1,x2,y2,label\n0.png,5,5,3,4,a\n", ValueError, r"Box 0 of image .*0.png .*width, height"),
        ("image,x1,y1,x2,y2,label\nno.png,1,2,3,4,a\n", FileNotFoundError, r"no.png, which does not exist"),
        ("image,x1,y1,x2,y2,label\n0.png,,,,,\n", ValueError, "has no box"),
    ],
)
def test_bad_csv_files_are_named(folder: Path, text: str, error: type[Exception], message: str) -> None:
    (folder / "boxes.csv").write_text(text)
    with pytest.raises(error, match=message):
        BoxDataset.from_csv(folder, folder / "boxes.csv")


def test_bad_images_are_named(folder: Path) -> None:
    box = ((1.0, 1.0, 40.0, 5.0),)
    with pytest.raises(ValueError, match=r"Box 0 of image .*0.png .* outside"):
        BoxDataset([BoxRecord(folder / "0.png", box, (1,))], ["a"])[0]
    with pytest.raises(ValueError, match=r"0.png has height 20 and width 30, but its annotations are for height 9"):
        BoxDataset([BoxRecord(folder / "0.png", (), (), (9, 9))], ["a"])[0]
    (folder / "1.png").write_text("no image")
    with pytest.raises(ValueError, match=r"1.png cannot be read as an image"):
        BoxDataset([BoxRecord(folder / "1.png", (), ())], ["a"])[0]
