"""An energy head on tiny detectors with random weights: its laws, its training, and what it refuses."""

from __future__ import annotations

import itertools
import math
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

import energyreg as er
from energyreg import objectives
from energyreg.files import BOX_HEAD, CheckpointError
from energyreg.models import checkpoint
from energyreg.objectives import NCE
from energyreg.vision.boxes.batch import BoxBatch, BoxCollate
from energyreg.vision.boxes.corners import paired_iou, variance_voting
from energyreg.vision.boxes.distribution import BoxDistribution, box_noise
from energyreg.vision.boxes.postprocessing import Inference
from energyreg.vision.boxes.spaces import BoxSpace
from energyreg.vision.detection.detector import EnergyDetector, WithDetectorLoss, add_energy_head
from energyreg.vision.detection.files import load_head, save_head

pytest.importorskip("torchvision")

from torchvision import tv_tensors
from torchvision.models.detection import FCOS, FasterRCNN, MaskRCNN, RetinaNet
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor
from torchvision.ops import MultiScaleRoIAlign
from torchvision.transforms import v2

CHANNELS, CLASSES, LEVELS = 32, 3, 3
NOISE = box_noise((0.05, 0.1, 0.2))


class Backbone(nn.Module):
    """Maps with 1/4, 1/8 and 1/16 nodes per pixel, with batch normalisation, whose statistics may move."""

    out_channels = CHANNELS

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, CHANNELS, 5, 4, 2), nn.BatchNorm2d(CHANNELS), nn.ReLU())
        self.down = nn.ModuleList(nn.Conv2d(CHANNELS, CHANNELS, 3, 2, 1) for _ in range(LEVELS - 1))

    def forward(self, images: Tensor) -> OrderedDict[str, Tensor]:
        maps = [self.stem(images)]
        for layer in self.down:
            maps.append(layer(maps[-1]).relu())
        return OrderedDict((str(place), each) for place, each in enumerate(maps))


def _detector(kind: str, seed: int = 0, backbone: nn.Module | None = None, **arguments: Any) -> nn.Module:
    torch.manual_seed(seed)
    backbone = Backbone() if backbone is None else backbone
    sizes = tuple((8.0 * 2**level,) for level in range(LEVELS))
    common: dict[str, Any] = {"min_size": 64, "max_size": 96}
    if kind in ("FCOS", "RetinaNet"):
        anchors = AnchorGenerator(sizes, ((1.0,),) * LEVELS)
        common |= {"score_thresh": 0.0, "detections_per_img": 6, "topk_candidates": 20}
        make = FCOS if kind == "FCOS" else RetinaNet
        return make(backbone, CLASSES, anchor_generator=anchors, **common, **arguments).eval()
    names = [str(level) for level in range(LEVELS)]
    common |= {
        "rpn_anchor_generator": AnchorGenerator(sizes, ((0.5, 1.0, 2.0),) * LEVELS),
        "box_roi_pool": MultiScaleRoIAlign(names, 7, 2),
        "box_head": TwoMLPHead(CHANNELS * 49, 24),
        "box_predictor": FastRCNNPredictor(24, CLASSES),
        "rpn_pre_nms_top_n_test": 30,
        "rpn_post_nms_top_n_test": 10,
        "box_score_thresh": 0.0,
        "box_detections_per_img": 6,
    }
    if kind == "MaskRCNN":
        common |= {
            "mask_roi_pool": MultiScaleRoIAlign(names, 4, 2),
            "mask_head": MaskRCNNHeads(CHANNELS, (8,), 1),
            "mask_predictor": MaskRCNNPredictor(8, 8, CLASSES),
        }
    return (MaskRCNN if kind == "MaskRCNN" else FasterRCNN)(backbone, **common, **arguments).eval()


def _model(kind: str = "FasterRCNN", seed: int = 0, steep: float = 0.5, **arguments: Any) -> EnergyDetector:
    model = add_energy_head(_detector(kind, seed), **{"width": 24, **arguments})
    # The head starts nearly flat; a law about a flat function says little.
    nn.init.normal_(model.head.output.weight, std=steep)
    return model


KINDS = ["FasterRCNN", "MaskRCNN", "FCOS", "RetinaNet"]


def _scene(seed: int, size: tuple[int, int] = (64, 64)) -> tuple[Tensor, dict[str, Tensor]]:
    """A bright and a dark rectangle on noise, whose borders are the boxes; classes 1 and 2."""
    generator = torch.Generator().manual_seed(seed)

    def number(low: int, high: int) -> int:
        return int(torch.randint(low, high, (), generator=generator))

    height, width = size
    image = 0.5 + 0.05 * torch.randn(3, height, width, generator=generator)
    boxes = []
    for left, value in ((0, 1.0), (width // 2, 0.0)):
        w, h = number(12, width // 2 - 4), number(12, height // 2)
        x, y = left + number(1, width // 2 - w), number(1, height - h)
        image[:, y : y + h, x : x + w] = value
        boxes.append([x, y, x + w, y + h])
    return image, {"boxes": torch.tensor(boxes, dtype=torch.float32), "labels": torch.tensor([1, 2])}


def _scenes(count: int, first: int = 0) -> list[tuple[Tensor, dict[str, Tensor]]]:
    return [_scene(seed) for seed in range(first, first + count)]


def _batch(model: EnergyDetector, count: int = 2) -> tuple[BoxBatch, Tensor]:
    return model.collate(_scenes(count))


def _loader(model: EnergyDetector, count: int = 4, first: int = 0, **arguments: Any) -> DataLoader[Any]:
    return DataLoader(_scenes(count, first), batch_size=2, collate_fn=model.collate, **arguments)


# The detector stays what it is ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_without_steps_the_boxes_are_bit_equal_to_the_bare_detectors(kind: str) -> None:
    images = [_scene(0)[0], _scene(1, (48, 80))[0]]
    with torch.no_grad():
        bare = _detector(kind)(images)
    model = _model(kind, inference=Inference(num_steps=0))
    for mine, theirs in zip(model(images), bare, strict=True):
        assert len(theirs["boxes"]) and mine.keys() == theirs.keys()
        assert all(torch.equal(mine[name], theirs[name]) for name in theirs)


@pytest.mark.parametrize("kind", KINDS)
def test_detections_keep_torchvisions_entries_and_gain_new_ones(kind: str) -> None:
    images = [_scene(0)[0], _scene(1, (48, 80))[0]]
    with torch.no_grad():
        bare = _detector(kind)(images)
    inference = Inference(num_samples=32, box_samples=5, iou_thresholds=(0.5, 0.9))
    for mine, theirs, image in zip(_model(kind).detect(images, inference), bare, images, strict=True):
        count = len(theirs["boxes"])
        for name in theirs.keys() - {"boxes"}:
            assert torch.equal(mine[name], theirs[name])
        assert torch.equal(mine["detector_boxes"], theirs["boxes"])
        assert not torch.equal(mine["boxes"], theirs["boxes"])
        assert mine["boxes"].min() >= 0 and (mine["boxes"][:, 2:] <= torch.tensor(image.shape[:0:-1])).all()
        assert mine["energies"].shape == (count,) == mine["box_effective_samples"].shape
        assert mine["box_stddevs"].shape == (count, 4) and (mine["box_stddevs"] > 0).all()
        assert mine["box_samples"].shape == (count, 5, 4)
        probability = mine["iou_probabilities"]
        assert probability.shape == (count, 2) and (probability[:, 0] >= probability[:, 1]).all()
        assert probability.min() >= 0 and probability.max() <= 1


def _energy_at(model: EnergyDetector, images: list[Tensor], found: list[dict[str, Tensor]], name: str) -> Tensor:
    boxes = torch.cat([each[name] for each in found])
    labels = torch.cat([each["labels"] for each in found])
    index = torch.cat([torch.full((len(each["labels"]),), place) for place, each in enumerate(found)])
    with torch.no_grad():
        f, _, origin = model.condition(BoxBatch(images, index, labels), boxes)
        return f(origin)


@pytest.mark.parametrize("step", [8e-4, 0.05, 10.0])
def test_refinement_never_lowers_the_energy(step: float) -> None:
    model, images = _model(steep=2.0), [_scene(0)[0], _scene(1)[0]]
    found = model.detect(images, Inference(step_size=(step, 4 * step)))
    energies, before = (
        torch.cat([each["energies"] for each in found]),
        _energy_at(model, images, found, "detector_boxes"),
    )
    assert (energies >= before - 1e-5 * before.abs()).all()
    assert (energies > before + 1e-4).any()


def test_energies_are_those_of_the_refined_boxes() -> None:
    """Steps are too small to leave the image, so nothing is clipped but what the detector has clipped."""
    model, images = _model(steep=2.0), [_scene(0)[0], _scene(1, (48, 80))[0]]
    found = model(images)
    inside = torch.cat([(each["boxes"] > 0).all(1) & (each["boxes"][:, 2:] < 48).all(1) for each in found])
    assert inside.any()
    energies = torch.cat([each["energies"] for each in found])
    torch.testing.assert_close(
        _energy_at(model, images, found, "boxes")[inside], energies[inside], rtol=1e-4, atol=1e-4
    )


def test_results_do_not_depend_on_the_batch() -> None:
    model, images = _model(steep=2.0), [_scene(seed)[0] for seed in range(3)]
    inference = Inference(num_samples=16, box_samples=2, iou_thresholds=(0.7,))
    together = model.detect(images, inference)
    for image, mine in zip(images, together, strict=True):
        alone = model.detect([image], inference)[0]
        assert mine.keys() == alone.keys()
        for name in alone:
            torch.testing.assert_close(mine[name], alone[name], rtol=1e-3, atol=1e-3)


def test_rescoring_multiplies_by_the_expected_overlap_and_sorts_again() -> None:
    model, images = _model(steep=2.0), [_scene(0)[0]]
    found = model.detect(images, Inference(num_samples=32, rescore=True))[0]
    torch.testing.assert_close(found["scores"], found["detector_scores"] * found["expected_ious"])
    assert (found["scores"].diff() <= 0).all() and not torch.equal(found["scores"], found["detector_scores"])
    plain = model.detect(images, Inference(num_samples=32))[0]
    order = (plain["boxes"][None] == found["boxes"][:, None]).all(-1).int().argmax(1)
    assert torch.equal(plain["labels"][order], found["labels"])
    assert torch.equal(plain["scores"][order], found["detector_scores"])


def test_images_without_detections_pass_through() -> None:
    model = _model()
    model.detector.roi_heads.score_thresh = 0.999
    (found,) = model([_scene(0)[0]])
    assert found["boxes"].shape == (0, 4) and found["energies"].shape == (0,)
    (found,) = model.detect([_scene(0)[0]], Inference(num_samples=8, box_samples=3, iou_thresholds=(0.5,)))
    assert found["box_samples"].shape == (0, 3, 4) and found["iou_probabilities"].shape == (0, 1)


class Fixed(nn.Module):
    """A detector of another making: transform and backbone, and the boxes that it is told."""

    def __init__(self, boxes: list[list[float]]) -> None:
        super().__init__()
        other = _detector("FasterRCNN")
        self.transform, self.backbone, self.boxes = other.transform, other.backbone, torch.tensor(boxes)

    def forward(self, images: list[Tensor]) -> list[dict[str, Tensor]]:
        self.backbone(self.transform(images)[0].tensors)
        count = len(self.boxes)
        entries = {"labels": torch.ones(count).long(), "scores": torch.linspace(1, 0.5, count)}
        return [{"boxes": self.boxes.clone(), **entries} for _ in images]


def _fixed(boxes: list[list[float]]) -> EnergyDetector:
    model = add_energy_head(Fixed(boxes).eval(), num_classes=2, width=24)
    nn.init.normal_(model.head.output.weight)
    return model


def test_boxes_without_area_stay_and_harm_no_other() -> None:
    good = [8.0, 8.0, 30.0, 40.0]
    model = _fixed([good, [64.0, 5.0, 64.0, 20.0]])
    inference = Inference(num_samples=16, iou_thresholds=(0.5,))
    (found,) = model.detect([_scene(0)[0]], inference)
    assert torch.equal(found["boxes"][1], found["detector_boxes"][1])
    model.detector.boxes = torch.tensor([good])
    (alone,) = model.detect([_scene(0)[0]], inference)
    for name in ("boxes", "energies", "box_stddevs"):
        torch.testing.assert_close(found[name][:1], alone[name])


CLOSE = [[8.0, 8.0, 40.0, 40.0], [9.0, 8.0, 40.0, 42.0], [30.0, 30.0, 60.0, 62.0]]
"""Two boxes of one object, and one of another."""


def test_suppression_keeps_the_best_of_boxes_that_overlap() -> None:
    model = _fixed(CLOSE)
    (every,) = model.detect([_scene(0)[0]], Inference(num_steps=0, num_samples=16))
    (kept,) = model.detect([_scene(0)[0]], Inference(num_steps=0, num_samples=16, nms=0.5))
    assert kept.keys() == every.keys()
    for name in every:
        assert torch.equal(kept[name], every[name][[0, 2]])
    (alone,) = model.detect([_scene(0)[0]], Inference(num_steps=0, nms=0.5))
    assert alone["boxes"].tolist() == [CLOSE[0], CLOSE[2]]


def test_what_the_detector_has_suppressed_itself_needs_no_suppression() -> None:
    images = [_scene(0)[0], _scene(1, (48, 80))[0]]
    with torch.no_grad():
        bare = _detector("MaskRCNN")(images)
    found = _model("MaskRCNN", inference=Inference(num_steps=0, nms=0.5))(images)
    for mine, theirs in zip(found, bare, strict=True):
        assert len(theirs["boxes"]) and all(torch.equal(mine[name], theirs[name]) for name in theirs)


def test_rescoring_decides_whom_suppression_keeps() -> None:
    """The second box has the lower score and the higher expected overlap, by a factor that turns the order around."""
    model = _fixed(CLOSE)
    (every,) = model.detect([_scene(0)[0]], Inference(num_steps=0, num_samples=64, rescore=True))
    (kept,) = model.detect([_scene(0)[0]], Inference(num_steps=0, num_samples=64, rescore=True, nms=0.5))
    best = every["scores"].argmax()
    assert torch.equal(kept["boxes"][0], every["boxes"][best])
    overlap = paired_iou(every["boxes"], every["boxes"][best])
    assert torch.equal(kept["boxes"], every["boxes"][(overlap <= 0.5) | (overlap == 1)])


def test_votes_move_boxes_image_by_image_and_probabilities_are_of_the_moved_ones() -> None:
    model, images = _fixed(CLOSE), [_scene(0)[0], _scene(1)[0]]
    plain = Inference(num_steps=0, num_samples=64, iou_thresholds=(0.9,))
    apart = model.detect(images, plain)
    together = model.detect(images, replace(plain, voting=0.05))
    for before, after in zip(apart, together, strict=True):
        expected = variance_voting(before["boxes"], before["box_stddevs"], before["labels"], 0.05)
        assert torch.equal(after["boxes"], expected) and torch.equal(after["detector_boxes"], before["boxes"])
        assert (expected[:2] - before["boxes"][:2]).abs().max() > 0.1
        assert torch.equal(after["box_stddevs"], before["box_stddevs"])
        assert not torch.equal(after["iou_probabilities"], before["iou_probabilities"])
    assert not torch.equal(together[0]["boxes"], together[1]["boxes"])  # their densities differ
    refined = model.detect(images, Inference(num_samples=64, voting=0.05, nms=0.5))
    assert all(len(each["boxes"]) == 2 and torch.equal(each["detector_boxes"], torch.tensor(CLOSE)[[0, 2]])
               for each in refined)  # fmt: skip


def test_after_suppression_no_two_boxes_of_a_class_overlap_by_more() -> None:
    model, images = _model(steep=2.0), [_scene(seed)[0] for seed in range(3)]
    model.detector.roi_heads.nms_thresh, model.detector.roi_heads.detections_per_img = 0.9, 30
    inference = Inference(num_samples=16, rescore=True, voting=0.1)
    counts = []
    for nms in (None, 0.3):
        found = model.detect(images, replace(inference, nms=nms))
        counts.append(sum(len(each["boxes"]) for each in found))
    assert 0 < counts[1] < counts[0]
    for each in found:
        iou = paired_iou(each["boxes"][:, None], each["boxes"])
        iou = iou * (each["labels"][:, None] == each["labels"]) * (1 - torch.eye(len(iou)))
        assert iou.max() <= 0.3 and (each["scores"].diff() <= 0).all()


# The energy function --------------------------------------------------------------------------------------------------


def test_the_head_starts_from_the_second_stage_and_nearly_flat() -> None:
    detector = _detector("FasterRCNN")
    model = add_energy_head(detector, width=24)
    assert torch.equal(model.head.fc6.weight, detector.roi_heads.box_head.fc6.weight)
    assert torch.equal(model.head.fc7.bias, detector.roi_heads.box_head.fc7.bias)
    assert model.head.fc6.weight.data_ptr() != detector.roi_heads.box_head.fc6.weight.data_ptr()
    assert model.head.output.weight.abs().max() < 0.01 and (model.head.output.bias == 0).all()
    assert add_energy_head(detector, width=8).head.fc6.out_features == 8  # other sizes start at random


def test_class_specific_energies_are_the_outputs_of_their_classes() -> None:
    model = _model(steep=2.0)
    batch, boxes = _batch(model)
    z = 0.1 * torch.randn(5, len(boxes), 4, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        f, _, _ = model.condition(batch, boxes)
        values = f(z)
        f.labels = 3 - f.labels  # 1 and 2 swapped
        swapped = f(z)
        model.head.output.weight[[1, 2]] = model.head.output.weight[[2, 1]]
        model.head.output.bias[[1, 2]] = model.head.output.bias[[2, 1]]
        torch.testing.assert_close(f(z), values)
    assert not torch.allclose(values, swapped)
    assert _model(class_specific=False).head.output.out_features == 1


def test_energy_and_its_gradient_move_with_image_and_box_by_whole_strides() -> None:
    """The background is blank, and the borders are beyond the reach of the features that the boxes see."""
    model = _model(steep=2.0, seed=1)
    model.detector.transform.min_size, model.detector.transform.max_size = (192,), 192
    pattern = torch.rand(3, 24, 24, generator=torch.Generator().manual_seed(0))
    values = []
    for x, y in ((64, 64), (96, 80)):
        image = torch.zeros(3, 192, 192)
        image[:, y : y + 24, x : x + 24] = pattern
        boxes = torch.tensor([[x - 3.3, y - 2.7, x + 25.1, y + 21.6]])
        f, _, z = model.condition(BoxBatch([image], torch.tensor([0]), torch.tensor([1])), boxes)
        z = (z + torch.tensor([0.03, -0.05, 0.1, 0.02])).requires_grad_(True)
        value = f(z)
        values.append((value.detach(), *torch.autograd.grad(value.sum(), z)))
    for here, there in zip(*values, strict=True):
        torch.testing.assert_close(there, here, rtol=1e-4, atol=1e-5)
    assert values[0][1].abs().max() > 1e-3


def test_resizing_by_the_transform_does_not_move_the_boxes() -> None:
    """An image that is given at twice the size is resized to the same one, so that f is the same in relative terms."""
    model = _model(steep=2.0)
    small = torch.rand(3, 64, 96, generator=torch.Generator().manual_seed(0))
    large = small.repeat_interleave(2, 1).repeat_interleave(2, 2)
    boxes, index = torch.tensor([[10.0, 12.0, 40.0, 50.0]]), torch.tensor([0])
    z = torch.tensor([[0.03, -0.05, 0.1, 0.02]])
    with torch.no_grad():
        at_small, at_large = (
            model.condition(BoxBatch([image], index, index + 1), boxes * factor)[0](z)
            for image, factor in ((small, 1), (large, 2))
        )
    # Bilinear halving of doubled pixels gives the pixels back.
    torch.testing.assert_close(at_large, at_small, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("second_order", [False, True])
def test_chunks_change_nothing_but_the_memory(second_order: bool) -> None:
    model = _model()
    batch, boxes = _batch(model)
    objective = (
        objectives.DenoisingScoreMatching(0.1, num_samples=6) if second_order else NCE(NOISE, num_samples=6, beta=0.1)
    )
    results = []
    for pool_bytes in (2**28, 5 * CHANNELS * 49 * 4):  # all 24 to 28 boxes at once, or 5
        f, q, z = model.condition(batch, boxes)
        f.pool_bytes = pool_bytes
        loss, _ = objective(f, q, z, generator=torch.Generator().manual_seed(0))
        model.zero_grad()
        loss.sum().backward()
        results.append((loss.detach(), model.head.fc6.weight.grad.clone()))
    torch.testing.assert_close(results[1], results[0], rtol=1e-4, atol=1e-5)


def test_density_of_the_head_integrates_to_one_by_quadrature() -> None:
    """log Z from importance samples against the midpoint rule in all four coordinates; densities follow from it."""
    model = _model(steep=3.0, pool_size=2, width=8)
    batch, boxes = model.collate([_scene(0)])
    window, nodes = (0.3, 0.3), 8
    with torch.no_grad():
        f, _, _ = model.condition(batch, boxes)
        generator = torch.Generator().manual_seed(0)
        p = BoxDistribution.around(
            f, boxes, noise=box_noise((0.25,)), num_samples=6000, window=window, generator=generator
        )
        line = 0.3 * ((torch.arange(nodes) + 0.5) * 2 / nodes - 1)
        grid = torch.tensor(list(itertools.product(line.tolist(), repeat=4)))[:, None].expand(-1, 2, -1)
        densities = p.log_prob(p.space.to_user(grid)) - p.space.log_abs_det_jacobian(p.space.to_user(grid))
    assert densities.std(0).min() > 0.05  # not flat
    total = densities.exp().mean(0) * 0.6**4
    # Of 6,000 samples some 2,000 count, a standard error of 2 %; the rule errs by less.
    torch.testing.assert_close(total, torch.ones(2), rtol=0, atol=0.1)


def test_export_of_the_energy_is_refused_with_the_reason() -> None:
    model = _model()
    f, _, z = model.condition(*_batch(model))

    class Energy(nn.Module):
        def forward(self, z: Tensor) -> Tensor:
            return f(z)

    with pytest.raises(RuntimeError, match="roi_pool cannot be exported"):
        torch.export.export(Energy(), (z,))


# Training -------------------------------------------------------------------------------------------------------------

OBJECTIVES = [
    NCE(NOISE, num_samples=8),
    NCE(NOISE, num_samples=8, beta=0.1),
    objectives.MaximumLikelihoodImportanceSampling(NOISE, num_samples=8),
    objectives.KLDImportanceSampling(NOISE, 0.0225, num_samples=8),
    objectives.DenoisingScoreMatching(0.075, num_samples=8),
    objectives.MaximumLikelihoodMCMC(num_steps=2, step_size=1e-2, num_chains=8),
    objectives.ScoreMatching(),
]


@pytest.mark.parametrize("objective", OBJECTIVES, ids=lambda objective: type(objective).__name__)
def test_every_objective_of_the_core_trains_the_head(objective: Callable[..., Any]) -> None:
    model = _model().train()
    f, q, z = model.condition(*_batch(model))
    loss, _ = objective(f, q, z, generator=torch.Generator().manual_seed(0))
    assert loss.shape == (4,) and loss.isfinite().all()
    loss.mean().backward()
    # Not the biases: those of a network of kinks and planes are not seen by the gradient in y.
    assert all(layer.weight.grad.abs().sum() > 0 for layer in (model.head.fc6, model.head.fc7, model.head.output))
    assert all(p.grad is None for p in model.detector.parameters())


def test_a_frozen_detector_is_untouched_by_a_training() -> None:
    model = _model()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    er.fit(model, _loader(model, shuffle=True), objective=NCE(NOISE, num_samples=8), epochs=1, progress=False)
    after = model.state_dict()
    assert any("running_mean" in name for name in before)
    for name, value in before.items():
        assert torch.equal(after[name], value) == name.startswith("detector."), name
    assert all(parameter.grad is None and not parameter.requires_grad for parameter in model.detector.parameters())
    assert not model.train().detector.training and model.head.training


@pytest.mark.parametrize("kind", KINDS[::2])
def test_a_detector_that_is_trained_along_learns_by_both_losses(kind: str) -> None:
    model = add_energy_head(_detector(kind), width=24, freeze=False)
    objective = WithDetectorLoss(NCE(NOISE, num_samples=8))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    history = er.fit(model, _loader(model), objective=objective, epochs=1, progress=False)
    changed = {name for name, value in model.state_dict().items() if not torch.equal(before[name], value)}
    assert {"head.fc6.weight", "detector.backbone.stem.0.weight", "detector.backbone.stem.1.running_mean"} <= changed
    own = "detector.roi_heads.box_head.fc6.weight" if kind == "FasterRCNN" else "detector.head.classification_head"
    assert any(name.startswith(own) for name in changed)
    assert history.diagnostics["detector_loss"][0] > 0
    assert history.train_loss[0] > history.diagnostics["detector_loss"][0]  # the energy's own is log 9 at the start


def test_losses_in_torchvisions_own_protocol() -> None:
    images, targets = zip(*_scenes(2), strict=True)
    losses = _model().train()(list(images), list(targets))
    assert losses.keys() == {"loss_energy"} and losses["loss_energy"].requires_grad
    model = add_energy_head(_detector("RetinaNet"), width=24, freeze=False).train()
    losses = model(list(images), list(targets))
    assert losses.keys() == {"loss_energy", "loss_detector"}
    # The head starts flat: its loss is that of f = 0, up to the noise of 128 samples.
    flat, _ = model.objective.objective(lambda z: z.new_zeros(z.shape[:-1]), None, torch.zeros(4, 4))
    assert abs(losses["loss_energy"] - flat.mean()) < 1 and losses["loss_detector"] > 0
    with pytest.raises(ValueError, match="targets is None"):
        model(list(images))


def test_training_improves_boxes_it_has_not_seen() -> None:
    model = add_energy_head(_detector("FasterRCNN", seed=3), width=64)
    objective = NCE(NOISE, num_samples=24, beta=0.1)
    loader, held_out = _loader(model, 16, shuffle=True), _loader(model, 6, 100)
    history = er.fit(
        model, loader, objective=objective, validation=held_out, epochs=8, learning_rate=3e-3, progress=False
    )
    assert history.validation_nll[-1] < history.validation_nll[0] - 1
    before, after = [], []
    for batch, boxes in held_out:
        f, _, origin = model.condition(batch, boxes)
        start = 0.12 * torch.randn(4, *origin.shape, generator=torch.Generator().manual_seed(0))
        found = er.refine(f, start, num_steps=30, step_size=2e-3)
        for z, overlaps in ((start, before), (found, after)):
            overlaps.append(paired_iou(f.space.to_user(z), boxes).mean())
    assert torch.stack(after).mean() > torch.stack(before).mean() + 0.08


class Interrupting:
    """An objective that ends the training at a call, as Ctrl-C does."""

    def __init__(self, call: int) -> None:
        self.objective, self.left = NCE(NOISE, num_samples=4), call

    def __call__(self, *arguments: Any, generator: torch.Generator) -> Any:
        self.left -= 1
        if self.left == 0:
            raise KeyboardInterrupt
        return self.objective(*arguments, generator=generator)


def test_a_resumed_training_ends_as_one_without_interruption(tmp_path: Path) -> None:
    def run(call: int, resume: bool = False, folder: Path | None = None) -> EnergyDetector:
        model = _model()
        er.fit(
            model, _loader(model, shuffle=True), objective=Interrupting(call), epochs=2, progress=False,
            checkpoint_dir=folder, resume=resume,
        )  # fmt: skip
        return model

    whole = run(0)
    with pytest.warns(UserWarning, match="interrupted in epoch 2"):
        run(4, folder=tmp_path)
    continued = run(0, resume=True, folder=tmp_path)
    for name, value in whole.state_dict().items():
        assert torch.equal(continued.state_dict()[name], value), name


def test_mixed_precision_trains_it() -> None:
    model = _model()
    history = er.fit(
        model, _loader(model, 2), objective=NCE(NOISE, num_samples=4), epochs=1, progress=False, precision="bf16-mixed"
    )
    assert math.isfinite(history.train_loss[0]) and model.dtype == torch.float32


def test_state_dict_round_trip() -> None:
    model, other = _model(steep=2.0), _model(seed=5)
    other.load_state_dict(model.state_dict())
    image = _scene(0)[0]
    assert all(torch.equal(a, b) for a, b in zip(model([image])[0].values(), other([image])[0].values(), strict=True))


def _equal(some: list[dict[str, Tensor]], others: list[dict[str, Tensor]]) -> bool:
    return all(
        mine.keys() == theirs.keys() and all(torch.equal(mine[name], theirs[name]) for name in mine)
        for mine, theirs in zip(some, others, strict=True)
    )


@pytest.mark.parametrize("class_specific", [True, False])
def test_a_saved_head_returns_on_the_users_own_detector(class_specific: bool, tmp_path: Path) -> None:
    inference = Inference(
        3, (1e-3, 2e-3), 0.7, 16, 2, (0.5, 0.75), True, box_noise((0.1,), (0.2,), antithetic=True), 0.05, 0.6
    )
    model = _model(steep=2.0, inference=inference, class_specific=class_specific, pool_size=3)
    path = save_head(model, tmp_path / "folder" / "head")
    assert path == tmp_path / "folder" / "head.safetensors"
    detector = _detector("FasterRCNN")
    random = torch.random.get_rng_state()
    back = load_head(detector, tmp_path / "folder" / "head")
    assert torch.equal(random, torch.random.get_rng_state())
    assert back.detector is detector and back.inference == inference
    image = _scene(0)[0]
    found = model([image])
    assert len(found[0]["boxes"]) and _equal(back([image]), found)


def test_a_head_of_a_detector_that_does_not_say_its_classes(tmp_path: Path) -> None:
    model, image = _fixed(CLOSE), _scene(0)[0]
    back = load_head(Fixed(CLOSE).eval(), save_head(model, tmp_path / "head"))
    assert back.num_classes == 2 and _equal(back([image]), model([image]))


def _other_detector(kind: str) -> nn.Module:
    """A detector that differs in one respect."""
    if kind == "classes":
        detector = _detector("FasterRCNN")
        detector.roi_heads.box_predictor = FastRCNNPredictor(24, 5)
        return detector
    backbone = Backbone()
    if kind == "nodes per pixel":
        backbone.stem[0] = nn.Conv2d(3, CHANNELS, 5, 2, 2)
    if kind == "channels":

        class Wide(Backbone):
            def forward(self, images: Tensor) -> OrderedDict[str, Tensor]:
                return OrderedDict((name, torch.cat([m, m], 1)) for name, m in super().forward(images).items())

        backbone = Wide()
    detector = _detector("FasterRCNN", backbone=backbone)
    if kind == "feature maps":
        detector.roi_heads.box_roi_pool.featmap_names = ["0", "1"]
    return detector


@pytest.mark.parametrize("kind", ["classes", "channels", "nodes per pixel", "feature maps"])
def test_a_head_is_not_put_on_a_detector_of_another_make(kind: str, tmp_path: Path) -> None:
    path = save_head(_model(), tmp_path / "head")
    with pytest.raises(CheckpointError, match=f"head.safetensors.*with {kind} = .*, but this detector has {kind} = "):
        load_head(_other_detector(kind), path)


def test_a_head_warns_of_a_detector_with_other_weights(tmp_path: Path) -> None:
    path = save_head(_model(), tmp_path / "head")
    with pytest.warns(UserWarning, match="other weights of the detector's backbone"):
        load_head(_detector("FasterRCNN", seed=1), path)


def test_files_that_are_no_heads_are_refused(tmp_path: Path) -> None:
    detector = _detector("FasterRCNN")
    with pytest.raises(FileNotFoundError):
        load_head(detector, tmp_path / "none")
    path = save_head(_model(), tmp_path / "head")
    with pytest.raises(CheckpointError, match=r"head of a detector: read it by energyreg\.vision\.load_head"):
        er.load(path)
    checkpoint.save_training_state(tmp_path / "state.safetensors", {}, {})
    with pytest.raises(CheckpointError, match="training state: continue it"):
        load_head(detector, tmp_path / "state")
    checkpoint.save_state(tmp_path / "forged.safetensors", {}, {"detector": {}}, BOX_HEAD)
    with pytest.raises(CheckpointError, match="description cannot be read"):
        load_head(detector, tmp_path / "forged")
    tensors, state = checkpoint.load_state(path, BOX_HEAD)
    checkpoint.save_state(path, tensors, state | {"head": state["head"] | {"width": 9}}, BOX_HEAD)
    with pytest.raises(CheckpointError, match=r"'fc6.weight' has shape \(24, \d+\) in the file, but \(9"):
        load_head(detector, path)
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match="checksum"):
        load_head(detector, path)
    with pytest.raises(TypeError, match="model is a Linear"):
        save_head(nn.Linear(1, 1), path)
    with pytest.raises(TypeError, match="detector is a Linear"):
        load_head(nn.Linear(1, 1), path)


@pytest.mark.slow
def test_two_processes_train_it() -> None:
    model = _model()
    before = model.head.fc6.weight.detach().clone()
    history = er.fit(
        model, _loader(model), objective=NCE(NOISE, num_samples=4), epochs=1, progress=False, accelerator="cpu",
        devices=2, strategy="ddp_spawn",
    )  # fmt: skip
    assert math.isfinite(history.train_loss[0]) and not torch.equal(before, model.head.fc6.weight)


# Data -----------------------------------------------------------------------------------------------------------------


def test_transforms_of_torchvision_move_the_boxes_along() -> None:
    image, target = _scene(0)
    boxes = tv_tensors.BoundingBoxes(target["boxes"], format="XYXY", canvas_size=(64, 64))
    flip = v2.Compose([v2.RandomHorizontalFlip(1.0), v2.ConvertBoundingBoxFormat("XYWH")])
    example = flip(tv_tensors.Image(image), {"boxes": boxes, "labels": target["labels"]})
    batch, y = BoxCollate(CLASSES)([example])
    expected = target["boxes"][:, [2, 1, 0, 3]] * torch.tensor([-1, 1, -1, 1]) + torch.tensor([64, 0, 64, 0])
    torch.testing.assert_close(y, expected)
    assert type(y) is Tensor and type(batch.images[0]) is Tensor
    assert torch.equal(batch.images[0], image.flip(2))


def test_images_of_mixed_size_and_without_boxes_share_a_batch() -> None:
    empty = {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.long)}
    model = _model()
    batch, boxes = model.collate([_scene(0), (torch.rand(3, 40, 50), empty), _scene(1, (48, 80))])
    assert batch.image.tolist() == [0, 0, 2, 2] and boxes.shape == (4, 4)
    f, _, z = model.condition(batch, boxes)
    assert f(z).shape == (4,) and f(z).isfinite().all()


def _change(**changes: Any) -> tuple[Tensor, dict[str, Any]]:
    image, target = _scene(0)
    image = changes.pop("image", image)
    return image, {key: value for key, value in ({"image_id": "a.jpg"} | target | changes).items() if value is not None}


@pytest.mark.parametrize(
    ("examples", "error", "message"),
    [
        ([_change(labels=torch.tensor([1, 3]))], ValueError, "label of box 1 of image a.jpg is 3.* knows 1 to 2"),
        ([_change(labels=torch.tensor([0, 1]))], ValueError, "label of box 0 of image a.jpg is 0.*the background"),
        ([_change(labels=torch.tensor([1]))], ValueError, r"labels of image a.jpg has shape \(1,\)"),
        ([_change(labels=None)], ValueError, "target of image a.jpg has no 'labels'"),
        ([_change(boxes=torch.tensor([[0.0, 0, 9, 9], [0, 0, 70, 9]]))], ValueError, "Box 1 of image a.jpg .* outside"),
        ([_change(boxes=torch.tensor([[0.0, 0, 9, 9], [9, 0, 9, 9]]))], ValueError, "Box 1 of image a.jpg is"),
        ([_change(boxes=torch.tensor([[40.0, 30, 9, 9], [9, 0, 9, 9]]))], ValueError, "x, y, width, height"),
        ([_change(boxes=[[0.0, 0, 9, 9]])], TypeError, "boxes of image a.jpg is a list"),
        ([_change(image=torch.zeros(3, 9, 9, dtype=torch.uint8))], ValueError, "Image a.jpg is torch.uint8"),
        ([_change(boxes=torch.zeros(0, 4), labels=torch.zeros(0).long())], ValueError, "No image .* a box: a.jpg"),
        ([torch.zeros(3, 9, 9)], TypeError, "Example 0 of the batch is a Tensor"),
    ],
)
def test_bad_examples_are_named(examples: list[Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        BoxCollate(CLASSES)(examples)


class Broken(Backbone):
    """Maps that are no pyramid."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind

    def forward(self, images: Tensor) -> Any:
        maps = super().forward(images)
        if self.kind == "list":
            return list(maps.values())
        maps["1"] = {"size": maps["0"], "channels": maps["1"][:, :5], "vector": maps["1"].mean((2, 3))}[self.kind]
        return maps


@pytest.mark.parametrize(
    ("kind", "message"),
    [("size", "no pyramid"), ("channels", "no pyramid"), ("vector", "backbone returned"), ("list", "returned list")],
)
def test_feature_maps_that_are_no_pyramid_are_refused(kind: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        add_energy_head(_detector("RetinaNet", backbone=Broken(kind)))


def test_one_map_is_a_pyramid_of_one_level() -> None:
    class Single(Backbone):
        def forward(self, images: Tensor) -> Any:
            return super().forward(images)["1"]

    anchors = AnchorGenerator(((16.0,),), ((1.0,),))
    detector = RetinaNet(Single(), CLASSES, anchor_generator=anchors, min_size=64, max_size=96, score_thresh=0.0).eval()
    (found,) = add_energy_head(detector, width=24)([_scene(0)[0]])
    assert found["energies"].isfinite().all() and len(found["energies"])


def test_of_two_maps_of_one_size_the_first_counts() -> None:
    """As in torchvision's MobileNet with a feature pyramid, whose own pooling never looks at the second."""

    class Doubled(Backbone):
        def forward(self, images: Tensor) -> Any:
            maps = super().forward(images)
            return OrderedDict([("0", maps["1"]), ("1", 7 * maps["1"]), ("2", maps["2"])])

    torch.manual_seed(0)
    model = add_energy_head(_detector("FasterRCNN", backbone=Doubled()), width=24)
    f, _, _ = model.condition(*_batch(model))
    assert f.pyramid.scales == (1 / 8, 1 / 16)
    images = model.detector.transform([image for image, _ in _scenes(2)])[0].tensors
    first = model.detector.backbone(images)["0"]
    assert torch.equal(f.pyramid.table[: first[:, 0].numel()], first.permute(0, 2, 3, 1).reshape(-1, CHANNELS))


def test_what_cannot_be_used_is_refused() -> None:
    with pytest.raises(TypeError, match="detector is a Linear, which has no transform and no backbone"):
        add_energy_head(nn.Linear(1, 1))
    with pytest.raises(ValueError, match="num_classes is 5, but the detector has 3 classes"):
        add_energy_head(_detector("FCOS"), num_classes=5)
    with pytest.raises(ValueError, match="does not say how many classes"):
        add_energy_head(Fixed([[0.0, 0.0, 9.0, 9.0]]))
    with pytest.raises(ValueError, match="no parameter of the detector requires a gradient"):
        add_energy_head(_model().detector, freeze=False)
    with pytest.raises(ValueError, match="detector is frozen"):
        model = _model()
        WithDetectorLoss(NCE(NOISE))(*model.condition(*_batch(model)))
    with pytest.raises(ValueError, match="training mode"):
        _model().train().detect([_scene(0)[0]])
    with pytest.raises(TypeError, match=r"collate_fn=model\.collate"):
        _model().condition(torch.zeros(2, 3, 9, 9), torch.zeros(2, 4))
    for arguments, message in (
        ({"num_steps": -1}, "num_steps is -1"),
        ({"step_size": 0.1}, "step_size is 0.1"),
        ({"step_size": (0.1, 0.0)}, "step_size is"),
        ({"decay": 1.0}, "decay is 1.0"),
        ({"iou_thresholds": (1.0,), "num_samples": 8}, "iou_thresholds is"),
        ({"rescore": True}, "num_samples is 0"),
        ({"voting": 0.02}, "num_samples is 0"),
        ({"voting": -0.1, "num_samples": 8}, "voting is -0.1"),
        ({"nms": 1.5}, "nms is 1.5"),
        ({"window": (0.5, 0.0)}, "window is"),
    ):
        with pytest.raises(ValueError, match=message):
            Inference(**arguments)


def test_the_space_of_the_energy_is_that_of_the_boxes() -> None:
    model = _model()
    batch, boxes = _batch(model)
    f, q, z = model.condition(batch, boxes)
    assert q is None and isinstance(f.space, BoxSpace)
    torch.testing.assert_close(f.space.to_user(z), boxes)
