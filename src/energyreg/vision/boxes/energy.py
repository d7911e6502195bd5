"""The energy f(image, box) on pooled features."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from energyreg.checks import check_count
from energyreg.vision.boxes.geometry import Boxes2D, Geometry, Pooler, RelativeSpace

__all__ = ["BoxEnergy", "BoxEnergyHead"]

POOL_BYTES = 2**28
"""Pooled features that are held at once; more boxes than fit go through the head in chunks."""


class BoxEnergyHead(nn.Module):
    """Pooled features of a box to its energy: two hidden layers, and one output a class.

    The last layer starts near 0, so that f starts flat.

    Args:
        channels: Features C of a node of the maps.
        num_outputs: Classes with an energy of their own; 1 for one energy for all.
        pool_size: Bins along either side of a box.
        width: Width of the hidden layers.

    Source:
        Gustafsson et al., ECCV 2020 and BMVC 2020: the second stage of Faster R-CNN (Ren et al., NeurIPS 2015) on
        Precise RoI Pooling.
    """

    def __init__(self, channels: int, num_outputs: int = 1, *, pool_size: int = 7, width: int = 1024) -> None:
        super().__init__()
        counts = {"channels": channels, "num_outputs": num_outputs, "pool_size": pool_size, "width": width}
        for name, number in counts.items():
            check_count(name, number)
        self.channels, self.num_outputs, self.pool_size = channels, num_outputs, pool_size
        self.fc6 = nn.Linear(channels * pool_size**2, width)
        self.fc7 = nn.Linear(width, width)
        self.output = nn.Linear(width, num_outputs)
        for layer in (self.fc6, self.fc7):
            nn.init.kaiming_uniform_(layer.weight, a=1)
            nn.init.zeros_(layer.bias)
        nn.init.normal_(self.output.weight, std=0.001)
        nn.init.zeros_(self.output.bias)

    def hidden(self, pooled: Tensor) -> Tensor:
        """Pooled features (R, C, P, P) to those before the output, (R, width)."""
        return self.fc7(self.fc6(pooled.flatten(1)).relu()).relu()

    def forward(self, pooled: Tensor, labels: Tensor) -> Tensor:
        """Pooled features (R, C, P, P) and classes (R,) to energies, in float32 at least, shape (R,)."""
        values = self.output(self.hidden(pooled)).to(torch.promote_types(pooled.dtype, torch.float32))
        return values[:, 0] if self.num_outputs == 1 else values.gather(1, labels[:, None])[:, 0]


class BoxEnergy:
    """f(image, ·) of B boxes in the coordinates relative to their reference boxes: what objectives and `refine` take.

    Args:
        head: Pooled features and classes to energies.
        pyramid: Feature maps of the images, which boxes are pooled from.
        space: The coordinates, of boxes in the images as they were given.
        image: Index of each box's image, shape (B,).
        labels: Class of each box, shape (B,).
        ratio: What brings each box into the frame of the maps: pixels of the resized image per pixel of the given one,
            along x, y, x, y, shape (B, 4).
        geometry: What the boxes are.
        detector_loss: The detector's own loss of the batch, where it is fine-tuned jointly.
        pool_bytes: Pooled features that are held at once. Beyond it a training computes them a second time.
    """

    def __init__(
        self,
        head: BoxEnergyHead,
        pyramid: Pooler,
        space: RelativeSpace,
        image: Tensor,
        labels: Tensor,
        ratio: Tensor,
        *,
        geometry: Geometry | None = None,
        detector_loss: Tensor | None = None,
        pool_bytes: int = POOL_BYTES,
    ) -> None:
        self.head, self.pyramid, self.space = head, pyramid, space
        self.image, self.labels, self.ratio = image, labels, ratio
        self.detector_loss, self.pool_bytes = detector_loss, pool_bytes
        self.geometry = Boxes2D() if geometry is None else geometry
        self.periodic, self.batch_size = self.geometry.periodic, len(labels)
        self.dtype, self.device = ratio.dtype, ratio.device

    def __call__(self, z: Tensor) -> Tensor:
        """Return f of shape (*S, B) for z of shape (*S, B, D)."""
        boxes = self.geometry.in_maps(self.space.to_user(z), self.ratio)
        shape = boxes.shape[:-1]
        rows = torch.arange(len(self.image), device=boxes.device).expand(shape).reshape(-1)
        boxes = boxes.reshape(-1, boxes.shape[-1])
        image, labels = self.image[rows], self.labels[rows]
        row_bytes = self.pyramid.channels * self.head.pool_size**2 * 4
        step = max(self.pool_bytes // row_bytes, 1)
        if len(boxes) <= step:
            return self._evaluate(boxes, image, labels).view(shape)
        parts = zip(boxes.split(step), image.split(step), labels.split(step), strict=True)
        # The first pass keeps nothing of a chunk, and the backward pass repeats it.
        if torch.is_grad_enabled():
            values = [
                checkpoint(self._evaluate, *part, use_reentrant=False, preserve_rng_state=False) for part in parts
            ]
        else:
            values = [self._evaluate(*part) for part in parts]
        return torch.cat(values).view(shape)

    def _evaluate(self, boxes: Tensor, image: Tensor, labels: Tensor) -> Tensor:
        return self.head(self.geometry.pool(self.pyramid, boxes, image, self.head.pool_size), labels)
