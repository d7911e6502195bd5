"""The experiment on detectors: every method on made-up pictures, the scores, and the report."""

from __future__ import annotations

import csv
import dataclasses
import json
import math
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

pytest.importorskip("torchvision")
pytest.importorskip("timm")
pytest.importorskip("faster_coco_eval")
pytest.importorskip("PIL")

from energyreg.inference.points import WeightedPoints
from energyreg.vision import BoxDistribution, BoxSpace
from experiments.detection import data, detector, methods, report, scores
from experiments.detection import run as run_module
from experiments.detection.data import SETS, Picture, load, split
from experiments.detection.detector import Boxes
from experiments.detection.methods import METHODS
from experiments.detection.run import path_of, prepare, run, work

PICTURES = 9
PENN = next(info for info in SETS if info.name == "pennfudan")


def scene(seed: int) -> tuple[np.ndarray, list[tuple[int, int, int, int]]]:
    """A picture of 64 × 48 pixels with two bright rectangles, and their boxes."""
    rng = np.random.default_rng(seed)
    pixels = rng.integers(0, 80, (48, 64, 3), dtype=np.uint8)
    boxes = []
    for left in (2, 34):
        x, y = left + int(rng.integers(0, 6)), int(rng.integers(2, 16))
        box = (x, y, x + int(rng.integers(14, 22)), y + int(rng.integers(18, 28)))
        pixels[box[1] : box[3], box[0] : box[2]] = 220
        boxes.append(box)
    return pixels, boxes


@pytest.fixture(scope="module", autouse=True)
def small_and_quick() -> Iterator[None]:
    """Small pictures and few steps: what is tested does not depend on their number."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(data, "SIDE", 64)
        patch.setattr(detector, "SIDE", 64)
        patch.setattr(detector, "EPOCHS", {"pennfudan": 2})
        for name, value in {"BATCH": 4, "SAMPLES": 8, "ASCENT": 2, "DRAWS": 8}.items():
            patch.setattr(methods, name, value)
        patch.setattr(methods, "FACTORS", (1.0, 4.0))
        patch.setattr(run_module, "TIMED", 1)
        patch.setitem(methods.STEPS, "pennfudan", 2)
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Files as the set has them."""
    from PIL import Image

    place = tmp_path_factory.mktemp("data") / "pennfudan"
    (place / "images").mkdir(parents=True)
    with (place / "boxes.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["file", "width", "height", "xmin", "ymin", "xmax", "ymax", "class"])
        for number in range(PICTURES):
            pixels, boxes = scene(number)
            Image.fromarray(pixels).save(place / "images" / f"{number}.jpg")
            writer.writerows([f"{number}.jpg", 64, 48, *box, "person"] for box in boxes)
    return place.parent


@pytest.fixture(scope="module")
def results(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Results of every method on one fold, and of some on a second."""
    cache, found = tmp_path_factory.mktemp("cache"), tmp_path_factory.mktemp("results")
    # A detector of two epochs is sure of nothing; without a threshold there are boxes to be refined.
    make = detector.make

    def eager(*arguments: object) -> object:
        made = make(*arguments)
        made.roi_heads.score_thresh, made.roi_heads.detections_per_img = 0.0, 10
        return made

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(detector, "make", eager)
        assert run(work([PENN], METHODS, 1), folder, cache, found, weights=None)
        few = [method for method in METHODS if method.name in ("detector", "direct", "nce+")]
        assert run(work([PENN], few, 2), folder, cache, found, weights=None)
    return found


def test_every_method_gives_finite_scores(results: Path) -> None:
    seen = set()
    for path in results.glob("*/*/0.json"):
        record = json.loads(path.read_text())
        seen.add(record["method"])
        for score in ("AP", "AP50", "AP75", "AP90", "milliseconds", "detector_milliseconds"):
            assert math.isfinite(record[score]) and record[score] >= 0, (path, score)
        assert record["detections"] > 0 and record["boxes"] == 2 * record["pictures"]
        if "calibration" in record and record["matched"]:
            assert 0 <= record["calibration"]["coverage"] <= 1
    assert seen == {method.name for method in METHODS}


def test_a_result_that_is_there_is_not_made_again(results: Path) -> None:
    piece = (PENN, 0, METHODS[0])
    before = path_of(piece, results).stat().st_mtime_ns
    assert run([piece], Path(), Path(), results)
    assert path_of(piece, results).stat().st_mtime_ns == before


def test_report_has_a_table_and_verdicts(results: Path) -> None:
    report.report(results)
    text = (results / "README.md").read_text()
    for part in ("## Targets", "- nce+: at least +2.0 AP", "- ours: refinement", "## pennfudan"):
        assert part in text
    for method in METHODS:
        assert f"| {method.name} |" in text


def test_a_target_is_reached_only_beyond_the_standard_error() -> None:
    def records(gains: list[float]) -> report.Records:
        rows = {name: {fold: {"AP": 50.0} for fold in range(3)} for name in ("detector", "direct")}
        rows["nce+"] = {fold: {"AP": 50.0 + gain} for fold, gain in enumerate(gains)}
        return {("bccd", name): found for name, found in rows.items()}

    gain = report.difference(records([1.0, 3.0, 5.0]), "bccd", "nce+", "detector")
    np.testing.assert_allclose(gain, [1.0, 3.0, 5.0])
    assert report.standard_error(gain) == pytest.approx(2 / math.sqrt(3))
    assert report.beyond(gain, 2.0) and not report.beyond(gain, 3.5) and not report.beyond(-gain)
    assert not report.beyond(np.array([-4.0, 0.0, 10.0]), 2.0)  # a mean of 2 with an error of 4
    assert not report.beyond(gain[:1])


def test_no_picture_is_in_two_parts_of_a_fold_and_each_is_tested_once() -> None:
    pictures = [Picture(str(n), torch.zeros(3, 8, 8, dtype=torch.uint8), torch.zeros(1, 4), torch.ones(1).long())
                for n in range(40)]  # fmt: skip
    folds = [split(PENN, pictures, number) for number in range(data.FOLDS)]
    tested = [picture.name for fold in folds for picture in fold.test]
    held = {picture.name for picture in folds[0].development}
    assert len(tested) == len(set(tested)) and set(tested) | held == {picture.name for picture in pictures}
    for fold in folds:
        parts = [{picture.name for picture in part} for part in (fold.train, fold.development, fold.test)]
        assert sum(map(len, parts)) == 40 == len(set.union(*parts)) and parts[1] == held


def test_mirroring_twice_is_nothing() -> None:
    pixels = torch.arange(3 * 4 * 6, dtype=torch.uint8).view(3, 4, 6)
    picture = Picture("a", pixels, torch.tensor([[1.0, 0.0, 3.0, 2.0]]), torch.tensor([1]))
    assert picture.flipped().boxes.tolist() == [[3.0, 0.0, 5.0, 2.0]]
    again = picture.flipped().flipped()
    assert torch.equal(again.pixels, pixels) and torch.equal(again.boxes, picture.boxes)


def test_cached_pictures_are_those_of_the_files(folder: Path, tmp_path: Path) -> None:
    first, again = (load(PENN, folder, tmp_path) for _ in range(2))
    assert [picture.name for picture in first] == [str(number) for number in range(PICTURES)]
    for picture, same in zip(first, again, strict=True):
        assert torch.equal(picture.boxes, torch.tensor(scene(int(picture.name))[1]).float())
        assert picture.pixels.shape == (3, 48, 64) and torch.equal(picture.pixels, same.pixels)


def test_frozen_half_and_the_rest_make_the_whole_detector(folder: Path, tmp_path: Path) -> None:
    """Training goes on from stored maps of the lower stages; detection from the picture: the same pyramid."""
    torch.manual_seed(0)
    made = detector.make(2, weights=None).eval()
    pictures = load(PENN, folder, tmp_path)[:2]
    seen = detector.see(made, pictures)
    for place, picture in enumerate(pictures):
        lower = detector._lower(made, picture)
        with torch.no_grad():
            found = made.backbone.upper([each[None] for each in lower.maps])["0"]
            expected = made([picture.image])[0]
        rows = seen.pyramid.table[place * 256 : (place + 1) * 256].T.reshape(-1, 16, 16)
        # Sums in another order, in single precision.
        torch.testing.assert_close(rows[:, : found.shape[2], : found.shape[3]], found[0], rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(seen.detections[place]["boxes"], expected["boxes"])


def boxes(corners: list[list[float]], labels: list[int]) -> Boxes:
    """Boxes of one picture."""
    return Boxes(torch.zeros(len(corners)).long(), torch.tensor(corners), torch.tensor(labels))


def test_boxes_match_by_overlap_within_their_class() -> None:
    true = boxes([[0, 0, 10, 10], [20, 0, 30, 10], [50, 0, 60, 10]], [1, 1, 2])
    found = boxes([[0, 0, 10, 9], [0, 0, 10, 8], [20, 0, 30, 4], [50, 0, 60, 10]], [1, 1, 1, 1])
    rows, chosen = scores.matched(found, true)
    assert rows.tolist() == [0] and chosen.tolist() == [0]  # the second overlaps by 0.4, the third is of another class
    rows, chosen = scores.matches(found, true)
    assert rows.tolist() == [0, 1] and chosen.tolist() == [0, 0]


def normal_density(truth_scale: float, count: int = 400) -> tuple[BoxDistribution, Tensor]:
    """Normal densities of scale 0.1, and boxes drawn around the references with another scale."""
    generator = torch.Generator().manual_seed(0)
    space = BoxSpace(torch.tensor([[0.0, 0.0, 40.0, 40.0]]).expand(count, 4))
    z = 0.1 * torch.randn(1000, count, 4, generator=generator)
    points = WeightedPoints(z, torch.full((1000, count), -math.log(1000)))

    def log_prob(z: Tensor) -> Tensor:
        return torch.distributions.Normal(0.0, 0.1).log_prob(z).sum(-1)

    true = space.to_user(truth_scale * torch.randn(count, 4, generator=generator))
    return BoxDistribution(log_prob, space, points, (math.inf, math.inf)), true


@pytest.mark.parametrize(("scale", "coverage"), [(0.1, 0.9), (0.2, 0.59)])
def test_calibration_tells_honest_densities_from_sure_ones(scale: float, coverage: float) -> None:
    found = scores.calibration(*normal_density(scale))
    # 1,600 coordinates, two and two of a box dependent: three standard errors of a share are 0.03 and 0.05.
    assert found["coverage"] == pytest.approx(coverage, abs=0.05)
    assert found["standardised"] == pytest.approx(scale / 0.1, rel=0.08)
    assert (found["pit"] < 0.05) == (scale == 0.1)


def test_nll_is_in_pixels() -> None:
    density, true = normal_density(0.1)
    z = density.space.to_model(true)
    sides = (true[:, 2:] - true[:, :2]).log().sum(1) + 2 * math.log(40)
    expected = -(torch.distributions.Normal(0.0, 0.1).log_prob(z).sum(1) - sides).mean()
    assert scores.calibration(density, true)["nll"] == pytest.approx(float(expected), abs=1e-3)


def test_regression_of_true_offsets_finds_the_true_boxes() -> None:
    """`near` says where the true box is, relative to each crop; going there is the way back."""
    true = boxes([[10.0, 10, 30, 50], [5, 5, 45, 25]], [1, 1])
    generator = torch.Generator().manual_seed(0)
    crops, z = methods.near(true, methods.box_noise(methods.WIDE), 5, generator)
    torch.testing.assert_close(BoxSpace(crops.boxes).to_user(z), true.boxes.repeat(5, 1), atol=1e-4, rtol=1e-4)
    assert len(crops) == 10 and not torch.allclose(crops.boxes[:2], true.boxes)


def test_our_product_with_a_flat_energy_is_the_gaussian(folder: Path, tmp_path: Path) -> None:
    torch.manual_seed(0)
    pictures = load(PENN, folder, tmp_path)
    fold = dataclasses.replace(split(PENN, pictures, 0), train=pictures[:2], development=pictures[:1], test=[])
    study, _ = prepare(dataclasses.replace(fold, test=pictures[2:3]), detector.make(2, None).eval(), 1)
    gaussian, energy = methods.second_stage(study.detector, 8), methods.second_stage(study.detector)
    torch.nn.init.normal_(gaussian.output.weight, std=0.1)
    torch.nn.init.zeros_(energy.output.weight)
    rows = study.train.true[:2]
    with torch.no_grad():
        density = methods.Product(gaussian, energy, 1.0).around(study.train, rows, 4096)
        q = methods._normal(methods.outputs_of(gaussian, study.train, rows))
        space = BoxSpace(rows.boxes)
        expected = q.log_prob(torch.zeros(len(rows), 4)) + space.log_abs_det_jacobian(rows.boxes)
        # By 4,096 samples from a Gaussian 1.5 times as wide, whose weights have a relative variance of 1.1 in four
        # dimensions: a standard error of 0.016 for log Z.
        torch.testing.assert_close(density.log_prob(rows.boxes), expected, atol=0.08, rtol=0)
        torch.testing.assert_close(density.points.expectation(lambda z: z), q.mean, atol=0.03, rtol=0)
