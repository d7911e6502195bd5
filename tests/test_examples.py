"""The examples of image regression run on a user's folder: a few tiny images, a tiny network, an epoch."""

import json
import runpy
import sys
from pathlib import Path

import numpy as np
import pytest

matplotlib = pytest.importorskip("matplotlib")
pandas = pytest.importorskip("pandas")
Image = pytest.importorskip("PIL.Image")
pytest.importorskip("timm")
pytest.importorskip("torchvision")
pytest.importorskip("torchmetrics")
pytest.importorskip("sklearn")

EXAMPLES = Path(__file__).parents[1] / "examples"
ONE_COMMAND = ["age.py", "cell_count.py", "head_pose.py", "steering.py"]
TINY = ["--backbone", "timm:test_resnet", "--weights", "none", "--epochs", "1"]


def folder_of(path: Path, columns: dict[str, np.ndarray], rng: np.random.Generator, dots: bool = False) -> Path:
    """A user's folder: images/ and labels.csv; where asked for, dots in place of the column of counts."""
    (path / "images").mkdir(parents=True)
    table = pandas.DataFrame(columns)
    table.insert(0, "file", [f"{row}.png" for row in range(len(table))])
    for name in table["file"]:
        Image.fromarray(rng.integers(0, 255, (16, 16, 3), np.uint8)).save(path / "images" / name)
    if dots:
        table["dots"] = ["dots" + name for name in table["file"]]
        for name, count in zip(table["dots"], table.pop("count"), strict=True):
            marks = np.zeros(256, np.uint8)
            marks[rng.choice(256, count, replace=False)] = 255
            Image.fromarray(marks.reshape(16, 16)).save(path / "images" / name)
    table.to_csv(path / "labels.csv", index=False)
    return path


def run(name: str, *arguments: object, monkeypatch: pytest.MonkeyPatch) -> None:
    from matplotlib import pyplot

    matplotlib.use("Agg")
    monkeypatch.setattr(sys, "argv", [name, *map(str, arguments)])
    try:
        runpy.run_path(str(EXAMPLES / name), run_name="__main__")
    finally:
        pyplot.close("all")


@pytest.mark.parametrize("name", [*ONE_COMMAND, "detection.py"])
def test_an_example_fits_on_a_page(name: str) -> None:
    assert len((EXAMPLES / name).read_text(encoding="utf-8").splitlines()) < 60


@pytest.mark.parametrize("name", ONE_COMMAND)
def test_an_example_runs_on_a_folder_of_images(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    rng = np.random.default_rng(0)
    columns = {
        "age.py": {"age": rng.uniform(1, 90, 24)},
        "cell_count.py": {"count": rng.integers(1, 9, 24)},
        "head_pose.py": {angle: rng.uniform(-60, 60, 24) for angle in ("yaw", "pitch", "roll")},
        # Ties among the values show that they are rounded.
        "steering.py": {"angle": rng.choice([-1, -0.5, 0, 0.25, 0.5, 1], 24), "index": np.arange(24)},
    }[name]
    folder = folder_of(tmp_path / "folder", columns, rng, dots=name == "cell_count.py")
    monkeypatch.chdir(tmp_path)
    extra = {"steering.py": ["--block", 3, "--mirror", "--fine-tune", 1], "age.py": ["--size", 32]}.get(name, [])
    run(name, folder, *TINY, *extra, "--output", "picture.png", monkeypatch=monkeypatch)
    printed = capsys.readouterr().out
    assert "MAE" in printed and "nats" in printed and "nan" not in printed
    picture = np.asarray(Image.open("picture.png").convert("L"))
    assert (picture < 250).mean() > 0.05  # images and densities, not an empty page
    assert Path("picture.safetensors").stat().st_size > 1000
    assert list(Path("features").rglob("*.safetensors"))
    if name == "steering.py":
        assert "Fine-tuning" in printed and "P(-1), P(0), P(1)" in printed


def test_head_poses_of_given_features(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    rng = np.random.default_rng(0)
    for part, rows in (("train", 24), ("test", 3)):
        np.savez(tmp_path / f"{part}.npz", features=rng.normal(size=(rows, 88)), poses=rng.uniform(-60, 60, (rows, 3)))
    monkeypatch.chdir(tmp_path)
    run("head_pose.py", "--features", "train.npz", "test.npz", "--epochs", 1, monkeypatch=monkeypatch)
    assert "on 3 heads" in capsys.readouterr().out
    assert Path("poses.png").stat().st_size > 1000


def test_boxes_with_uncertainty(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Also from where it was interrupted, and from COCO's JSON."""
    rng = np.random.default_rng(0)
    (tmp_path / "images").mkdir()
    rows, annotations = ["image,x1,y1,x2,y2,label"], []
    for number in range(10):
        x, y = rng.integers(2, 20, 2).tolist()
        pixels = np.full((48, 64, 3), 90, np.uint8)
        pixels[y : y + 24, x : x + 36] = 220
        Image.fromarray(pixels).save(tmp_path / "images" / f"{number}.png")
        rows.append(f"{number}.png,{x},{y},{x + 36},{y + 24},box")
        annotations.append({"id": number, "image_id": number, "category_id": 7, "bbox": [x, y, 36, 24]})
    (tmp_path / "boxes.csv").write_text("\n".join(rows))
    images = [{"id": number, "file_name": f"{number}.png", "height": 48, "width": 64} for number in range(10)]
    content = {"images": images, "annotations": annotations, "categories": [{"id": 7, "name": "box"}]}
    (tmp_path / "boxes.json").write_text(json.dumps(content))
    monkeypatch.chdir(tmp_path)
    tiny = ["images", "--backbone", "timm:test_resnet", "--weights", "none", "--size", 64, "--epochs", 1]
    printed = []
    for boxes in ("boxes.csv", "boxes.csv", "boxes.json"):
        run("detection.py", *tiny[:1], boxes, *tiny[1:], monkeypatch=monkeypatch)
        printed.append([line for line in capsys.readouterr().out.splitlines() if line.startswith("AP ")])
    # The second goes on where the first has ended, so it does not train; the third is of the same boxes.
    assert len(printed[0]) == 1 and "AP50" in printed[0][0] and "nan" not in printed[0][0]
    assert printed[0] == printed[1] == printed[2]
    assert Path("boxes.training").is_dir()
    picture = np.asarray(Image.open("boxes.png").convert("L"))
    assert (picture < 250).mean() > 0.05
