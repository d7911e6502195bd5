"""Precise RoI Pooling, with the gradient in the boxes, against torchvision's RoIAlign, which has none."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.children import call
from benchmarks.memory import MIB, _require_linux, _reset_peak, _status
from benchmarks.rows import Benchmark, Measurement, Options, Skipped
from benchmarks.timing import paired
from energyreg.vision.pooling.roi_pool import Pyramid, roi_pool

__all__ = ["BENCHMARKS", "step_peak"]

BINS = 7
SIZES = {"pyramid": (7.0, 28.0), "wide": (4.0, 90.0)}
"""Sides of the boxes in nodes: as the levels of a pyramid make them, and from very small to most of a map."""


def actions(sides: str, tiny: bool, device: str) -> dict[str, Callable[[], object]]:
    """What is compared: pooling and its gradient, of the sum of squares, for the same boxes on the same map.

    Args:
        sides: Which boxes.
        tiny: Whether a small map and few boxes will do.
        device: Where.

    Raises:
        Skipped: If torchvision is not installed.
    """
    try:
        from torchvision.ops import roi_align
    except ImportError:
        raise Skipped("torchvision is not installed") from None
    torch.manual_seed(0)
    count, channels, (height, width) = (8, 4, (30, 40)) if tiny else (512, 256, (100, 150))
    features = torch.randn(1, channels, height, width, device=device)
    low, high = SIZES[sides]
    corner = torch.rand(count, 2) * torch.tensor([0.8 * width, 0.8 * height])
    boxes = torch.cat([corner, corner + low + (high - low) * torch.rand(count, 2)], 1).to(device)
    pyramid = Pyramid.of(features)

    def gradient(pool: Callable[..., Tensor], *wanted: Tensor) -> tuple[Tensor, ...]:
        leaves = [each.detach().requires_grad_(True) for each in wanted]
        return torch.autograd.grad(pool(*leaves).square().sum(), leaves)

    def align(f: Tensor) -> Tensor:
        return roi_align(f, [boxes], BINS, sampling_ratio=2)

    return {
        "boxes": lambda: gradient(lambda b: roi_pool(pyramid, b, output_size=BINS), boxes),
        "boxes and features": lambda: gradient(lambda f, b: roi_pool(f, b, output_size=BINS), features, boxes),
        "RoIAlign, features": lambda: gradient(align, features),
    }


def step_peak(name: str, sides: str, tiny: bool, device: str) -> float:
    """Bytes at the peak of pooling and gradient, above the features and boxes."""
    act = actions(sides, tiny, device)[name]
    if device.startswith("cuda"):
        act()
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        act()
        return float(torch.cuda.max_memory_allocated(device) - before)
    _require_linux()
    actions(sides, True, device)[name]()  # what is loaded at the first use does not count
    before = _reset_peak()
    act()
    return float(_status("VmHWM") - before)


def _measure(sides: str, options: Options) -> Measurement:
    compared = actions(sides, options.tiny, options.device)
    times = paired(compared, options.rounds, device=options.device, warm_up=1)
    threads = torch.get_num_threads()
    peaks: dict[str, Any] = {
        name: call("benchmarks.roi_pool", "step_peak", name, sides, options.tiny, options.device, threads=threads)
        for name in compared
    }
    seconds = {name: times.median(name) for name in compared}
    details = {f"peak memory, {name}": f"{peak / MIB:.0f} MiB" for name, peak in peaks.items()}
    return Measurement.of(times.ratio("boxes", "RoIAlign, features"), seconds, **details)


BENCHMARKS = [
    Benchmark(
        "roi-pool", "exact pooling of 512 boxes, 7 × 7 bins, 256 channels, and its gradient in the boxes, against "
        "RoIAlign and its gradient in the features; boxes of 7 to 28 nodes", "≤ 1 ×",
        partial(_measure, "pyramid"), 1.0, guarded="value",
    ),
    Benchmark(
        "roi-pool-wide", "the same for boxes of 4 to 90 nodes", "≤ 1 ×", partial(_measure, "wide"), 1.0,
        guarded="value",
    ),
]  # fmt: skip
