"""What is read from a detector of torchvision: its classes, its feature maps, and its hidden layers."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from energyreg.checks import check_count
from energyreg.vision.boxes.energy import BoxEnergyHead

__all__ = [
    "check_detector", "classes_of", "copy_hidden_layers", "declared_classes", "interface", "probe", "pyramid_of",
    "watch",
]  # fmt: skip

PROBE = 128
"""Side in pixels of the blank image that shows what feature maps a backbone makes."""


def check_detector(detector: Any) -> None:
    """Refuse, by a TypeError, a module without a transform and a backbone."""
    missing = [name for name in ("transform", "backbone") if not isinstance(getattr(detector, name, None), nn.Module)]
    if not isinstance(detector, nn.Module) or missing:
        raise TypeError(
            f"detector is a {type(detector).__name__}, which has no {' and no '.join(missing)}; expected a Faster "
            "R-CNN, Mask R-CNN, FCOS or RetinaNet of torchvision."
        )


def declared_classes(detector: Any) -> int | None:
    """Number of classes, where the detector says it."""
    if hasattr(detector, "roi_heads"):
        return getattr(getattr(detector.roi_heads.box_predictor, "cls_score", None), "out_features", None)
    return getattr(getattr(getattr(detector, "head", None), "classification_head", None), "num_classes", None)


def classes_of(detector: Any, num_classes: int | None) -> tuple[int, int]:
    """Number of classes, and the first label of an object."""
    found = declared_classes(detector)
    if num_classes is not None:
        check_count("num_classes", num_classes)
        if found is not None and found != num_classes:
            raise ValueError(f"num_classes is {num_classes}, but the detector has {found} classes.")
        found = num_classes
    if found is None:
        raise ValueError(
            "The detector does not say how many classes it knows; pass num_classes, with the background among them."
        )
    return int(found), int(hasattr(detector, "roi_heads"))


@torch.no_grad()
def probe(detector: Any) -> tuple[tuple[str, ...], int, tuple[float, ...]]:
    """Names of the maps that the detector's own heads pool from, features of a node, and nodes per pixel."""
    parameter = next(detector.backbone.parameters())
    bands = len(getattr(detector.transform, "image_mean", (0, 0, 0)))
    blank = torch.zeros(1, bands, PROBE, PROBE, dtype=parameter.dtype, device=parameter.device)
    modes = [(module, module.training) for module in detector.modules()]
    detector.eval()
    try:
        maps = detector.backbone(blank)
    finally:
        for module, mode in modes:
            module.training = mode
    wanted = getattr(getattr(getattr(detector, "roi_heads", None), "box_roi_pool", None), "featmap_names", None)
    available = _named(maps)
    names = tuple(name for name in available if wanted is None or name in wanted)
    levels, scales = pyramid_of(maps, names, blank.shape[-2:])
    return names, int(levels[0].shape[1]), tuple(scales)


def _named(maps: Any) -> dict[str, Tensor]:
    named = {"0": maps} if isinstance(maps, Tensor) else dict(maps) if isinstance(maps, Mapping) else {}
    if not named or not all(isinstance(each, Tensor) and each.ndim == 4 for each in named.values()):
        shapes = {name: tuple(getattr(each, "shape", ())) for name, each in named.items()}
        raise ValueError(
            f"The detector's backbone returned {shapes or type(maps).__name__}; expected a feature map (N, C, H, W), "
            "or a dictionary of them, such as a feature pyramid's."
        )
    return named


def pyramid_of(maps: Any, names: Iterable[str], size: Sequence[int]) -> tuple[list[Tensor], list[float]]:
    """The maps with these names, and their nodes per pixel of a batch of images of this size.

    Of neighbours with the same number of nodes the first counts, as for torchvision's own pooling: the pyramid of its
    MobileNet has two maps of stride 32.
    """
    named = _named(maps)
    levels = [named[name] for name in names]
    scales = []
    for level in levels:
        ratios = [math.log2(have / full) for have, full in zip(level.shape[-2:], size, strict=True)]
        scales.append(2.0 ** round(sum(ratios) / 2))
    exact = all(
        abs(have - full * scale) < 1 + scale * 32
        for level, scale in zip(levels, scales, strict=True)
        for have, full in zip(level.shape[-2:], size, strict=True)
    )
    kept = [place for place, scale in enumerate(scales) if place == 0 or scale != scales[place - 1]]
    levels, scales = [levels[place] for place in kept], [scales[place] for place in kept]
    halving = all(finer == 2 * coarser for finer, coarser in pairwise(scales))
    if not levels or not exact or not halving or len({level.shape[1] for level in levels}) > 1:
        shapes = ", ".join(f"{name}: {tuple(named[name].shape)}" for name in named)
        raise ValueError(
            f"The detector's feature maps are no pyramid: for images of {size[0]} × {size[1]} pixels they are "
            f"{shapes}. Expected maps of the same number of channels, each with half as many nodes per side as the one "
            "before, such as FeaturePyramidNetwork makes."
        )
    return levels, scales


def copy_hidden_layers(detector: Any, head: BoxEnergyHead) -> None:
    """Let the head start as the detector's second stage, where that has hidden layers of the same sizes."""
    box_head = getattr(getattr(detector, "roi_heads", None), "box_head", None)
    for name in ("fc6", "fc7"):
        theirs, mine = getattr(box_head, name, None), getattr(head, name)
        if not isinstance(theirs, nn.Linear) or theirs.weight.shape != mine.weight.shape:
            return
        mine.load_state_dict(theirs.state_dict())


@contextmanager
def watch(detector: nn.Module) -> Iterator[dict[str, Any]]:
    """Remember what the detector's transform and backbone return while it runs."""
    seen: dict[str, Any] = {}

    def remember(name: str) -> Callable[..., None]:
        return lambda module, inputs, output: seen.__setitem__(name, output)

    hooks = [getattr(detector, name).register_forward_hook(remember(name)) for name in ("transform", "backbone")]
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()


def interface(detector: Any, num_classes: int | None) -> dict[str, Any]:
    """What of a detector a head depends on, as a file of the head tells it."""
    classes, first_label = classes_of(detector, num_classes)
    names, channels, scales = probe(detector)
    return {
        "feature maps": names, "channels": channels, "nodes per pixel": scales, "classes": classes,
        "first label": first_label,
    }  # fmt: skip
