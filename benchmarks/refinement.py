"""Inference of torchvision's detectors with refined boxes, against the same detector alone."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from benchmarks.rows import Benchmark, Measurement, Options, Skipped
from benchmarks.timing import paired
from energyreg.vision.boxes.postprocessing import Inference
from energyreg.vision.detection.detector import add_energy_head

__all__ = ["BENCHMARKS", "actions"]

IMAGES, SIZE = 2, (480, 640)
"""Images of a batch, and their height and width, which each detector resizes as it is made to."""


def actions(name: str, boxes: int, tiny: bool, device: str) -> dict[str, Callable[[], list[dict[str, Any]]]]:
    """What is compared: detections of a batch, as they are and with T = 10 steps of ascent by heads of two widths.

    The weights are random, so every proposal scores about one half, and the best `boxes` that suppression leaves are
    kept. Their sizes are those of proposals.

    Args:
        name: A detector of torchvision.
        boxes: Boxes that each image has.
        tiny: Whether small images and a narrow head will do.
        device: Where.

    Raises:
        Skipped: If torchvision is not installed.
    """
    try:
        from torchvision.models import get_model
    except ImportError:
        raise Skipped("torchvision is not installed") from None
    torch.manual_seed(0)
    size = {"min_size": 64, "max_size": 64} if tiny else {}
    detector = get_model(
        name, weights=None, weights_backbone=None, num_classes=2, box_detections_per_img=boxes, box_score_thresh=0.0,
        **size,
    ).to(device).eval()  # fmt: skip
    models = []
    for width in (1024, 256):
        model = add_energy_head(detector, width=16 if tiny else width, inference=Inference(num_steps=10)).eval()
        # A head that has learned something has a slope to climb.
        torch.nn.init.normal_(model.head.output.weight, std=0.1)
        models.append(model)
    images = [torch.rand(3, *SIZE, device=device) for _ in range(IMAGES)]

    def alone() -> list[dict[str, Any]]:
        with torch.no_grad():
            return detector(images)

    return {
        "detector": alone,
        "refined": lambda: models[0].detect(images),
        "refined, width 256": lambda: models[1].detect(images),
    }


def _measure(name: str, boxes: int, options: Options) -> Measurement:
    compared = actions(name, boxes, options.tiny, options.device)
    found = [len(each["boxes"]) for each in compared["detector"]()]
    if not options.tiny and found != [boxes] * IMAGES:
        raise AssertionError(f"{name} has found {found} boxes, not {boxes} an image")
    times = paired(compared, options.rounds, device=options.device, warm_up=1)
    seconds = {each: times.median(each) for each in compared}
    both, narrow = (times.ratio(each, "detector") for each in ("refined", "refined, width 256"))
    details = {"images": IMAGES, "share with a head of width 256": f"{narrow.median - 1:.2f} ×"}
    return Measurement(both.median - 1, (both.low - 1, both.high - 1), seconds=seconds, details=details)


BENCHMARKS = [
    Benchmark(
        f"refinement-{short}-{boxes}", f"refinement of {boxes} boxes an image, T = 10, as a share of the detector's "
        f"own inference: {title}", "≤ 0.5 ×", partial(_measure, name, boxes), 0.5, guarded="value",
    )
    for short, name, title in (
        ("resnet", "fasterrcnn_resnet50_fpn", "Faster R-CNN with ResNet-50, 800 × 1066 pixels"),
        ("mobilenet", "fasterrcnn_mobilenet_v3_large_fpn", "Faster R-CNN with MobileNetV3, 800 × 1066 pixels"),
        ("small", "fasterrcnn_mobilenet_v3_large_320_fpn", "Faster R-CNN with MobileNetV3, 320 × 427 pixels"),
    )
    for boxes in (10, 50)
]  # fmt: skip
