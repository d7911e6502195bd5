"""A small detector: an ordinary Faster R-CNN, of which the upper part is trained, with an energy head if wanted."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("torchvision")
pytest.importorskip("timm")

from energyreg.objectives import NCE
from energyreg.vision import WithDetectorLoss, add_energy_head, box_noise, small_detector

TINY: dict[str, Any] = {"backbone": "timm:test_resnet", "weights": None, "channels": 16, "width": 32}


def _scenes(count: int) -> list[tuple[Tensor, dict[str, Tensor]]]:
    """Grey images of 64 × 96 pixels with a bright rectangle."""
    generator = torch.Generator().manual_seed(0)
    scenes = []
    for _ in range(count):
        image = torch.full((3, 64, 96), 0.4)
        x, y = torch.randint(4, 30, (2,), generator=generator).tolist()
        image[:, y : y + 26, x : x + 40] = 1.0
        scenes.append((image, {"boxes": torch.tensor([[x, y, x + 40.0, y + 26.0]]), "labels": torch.tensor([1])}))
    return scenes


def _detector(**change: Any) -> Any:
    torch.manual_seed(0)
    return small_detector(2, **{**TINY, "size": 96, "trainable": 2, **change})


def test_is_an_ordinary_detector_of_torchvision() -> None:
    detector = _detector()
    images, targets = zip(*_scenes(2), strict=True)
    losses = detector(list(images), list(targets))
    assert all(bool(value.isfinite()) for value in losses.values()) and len(losses) == 4
    (found, _) = detector.eval()(list(images))
    assert {"boxes", "labels", "scores"} == set(found)
    with torch.no_grad():
        maps = detector.backbone(torch.zeros(1, 3, 64, 96))
    assert [tuple(each.shape) for each in maps.values()] == [(1, 16, 64 // s, 96 // s) for s in (4, 8, 16, 32)]


@pytest.mark.parametrize("size", [64, 160])
def test_the_longer_side_becomes_the_size(size: int) -> None:
    resized, _ = _detector(size=size).transform([torch.zeros(3, 64, 96)])
    assert resized.image_sizes == [(64 * size // 96, size)]


def test_a_training_moves_the_upper_part_alone() -> None:
    detector = _detector()
    before = {name: value.clone() for name, value in detector.state_dict().items()}
    images, targets = zip(*_scenes(4), strict=True)
    free = [parameter for parameter in detector.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(free, 1e-3)
    totals = []
    for _ in range(12):
        optimizer.zero_grad()
        loss = torch.stack(list(detector(list(images), list(targets)).values())).sum()
        loss.backward()
        optimizer.step()
        totals.append(float(loss.detach()))
    assert totals[-1] < 0.8 * totals[0]
    after = detector.state_dict()
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    network = {name for name in moved if name.startswith("backbone.network")}
    assert network and all(".layer3." in name or ".layer4." in name for name in network), network
    # Neither statistics nor factors of batch normalisation.
    assert not any(".bn" in name or "running" in name for name in network)
    assert any(name.startswith("backbone.pyramid") for name in moved)


def test_a_head_is_trained_along_and_starts_from_the_second_stage() -> None:
    detector = _detector()
    model = add_energy_head(
        detector, freeze=False, width=32, objective=WithDetectorLoss(NCE(box_noise(), num_samples=4))
    )
    torch.testing.assert_close(model.head.fc6.weight, detector.roi_heads.box_head.fc6.weight)
    batch, boxes = model.collate(_scenes(2))
    f, q, z = model.train().condition(batch, boxes)
    model.objective(f, q, z)[0].mean().backward()
    for part in (model.head.fc6.weight, detector.backbone.pyramid.layer_blocks[0][0].weight):
        assert part.grad is not None and bool(part.grad.any())
    assert all(not module.training for module in detector.backbone.network.modules())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"backbone": "torchvision:mobilenet_v3_small"}, "does not show the maps of its stages; expected a network of"),
        ({"backbone": "timm:test_vit"}, r"The last maps of 'timm:test_vit' for images of 64 × 64 pixels are .*strides"),
        ({"size": 16}, "size is 16; expected a whole number of at least 32"),
        ({"channels": 0}, "channels is 0"),
        ({"trainable": 99}, "trainable is 99, but the network has"),
    ],
)
def test_what_cannot_be_used_is_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        _detector(**change)


def test_a_detector_needs_a_class_beside_the_background() -> None:
    with pytest.raises(ValueError, match="num_classes is 1; expected a whole number of at least 2"):
        small_detector(1, **TINY)
