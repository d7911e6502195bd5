"""A small detector for who has none: Faster R-CNN on an ImageNet network, which a CPU trains in minutes.

.. code-block:: python

    detector = er.vision.small_detector(dataset.num_classes)
    model = er.vision.add_energy_head(detector, freeze=False, width=256)  # detector and head are trained together
    er.fit(model, loader, epochs=10, learning_rate=1e-3)
"""

from __future__ import annotations

import os
from collections import OrderedDict
from typing import Any, Self

import torch
from torch import Tensor, nn

from energyreg.checks import check_count
from energyreg.networks.image_encoders import ImageEncoder
from energyreg.vision.boxes.corners import torchvision

__all__ = ["PyramidBackbone", "small_detector"]

STRIDES = (4, 8, 16, 32)
"""Pixels per node of the pyramid's maps."""
ANCHOR = 6
"""Side of an anchor, in nodes of its map: 24 to 192 pixels."""


class PyramidBackbone(nn.Module):
    """A network of timm with a feature pyramid on its last four stages.

    Batch normalisation keeps the statistics and factors of its weights, also in training: the few images of a batch
    have no statistics of their own.

    Args:
        encoder: A network of timm, with what of it is trained.
        channels: Channels C of the pyramid.

    Raises:
        ValueError: The network is none of timm, or its last four maps are not of strides 4, 8, 16 and 32.
    """

    def __init__(self, encoder: ImageEncoder, channels: int) -> None:
        super().__init__()
        check_count("channels", channels)
        network: Any = encoder.network
        if not hasattr(network, "forward_intermediates"):
            raise ValueError(
                f"backbone is {encoder.backbone!r}, which does not show the maps of its stages; expected a network of "
                'timm, such as "timm:resnet18".'
            )
        self.mean, self.std, self.network, self.out_channels = encoder.mean, encoder.std, network, channels
        side = 2 * STRIDES[-1]
        with torch.no_grad():
            maps = self._maps(torch.zeros(1, 3, side, side))
        if [each.shape[-1] for each in maps] != [side // stride for stride in STRIDES]:
            shapes = ", ".join(str(tuple(each.shape)) for each in maps)
            raise ValueError(
                f"The last maps of {encoder.backbone!r} for images of {side} × {side} pixels are {shapes}; expected "
                f"strides {STRIDES}."
            )
        self.pyramid = torchvision().ops.FeaturePyramidNetwork([each.shape[1] for each in maps], channels)
        for module in network.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.requires_grad_(False)
        self.train(self.training)

    def _maps(self, images: Tensor) -> list[Tensor]:
        return self.network.forward_intermediates(images, indices=len(STRIDES), intermediates_only=True)

    def train(self, mode: bool = True) -> Self:
        """Set the mode; the network under the pyramid stays in evaluation mode."""
        super().train(mode)
        self.network.eval()
        return self

    def forward(self, images: Tensor) -> OrderedDict[str, Tensor]:
        """Map normalised images (N, 3, H, W) to maps (N, C, H / s, W / s) for the strides s."""
        return self.pyramid(OrderedDict((str(place), each) for place, each in enumerate(self._maps(images))))


def small_detector(
    num_classes: int,
    *,
    backbone: str = "timm:efficientnet_lite0",
    weights: str | os.PathLike[str] | None = "package",
    trainable: str | int = 4,
    size: int = 320,
    channels: int = 64,
    width: int = 256,
) -> Any:
    """A Faster R-CNN that is to be trained: torchvision's, a quarter as wide, on a network that knows ImageNet.

    Nothing is downloaded unless `weights` is "pretrained". The detector is an ordinary one of torchvision, and
    :func:`~energyreg.vision.detection.add_energy_head` takes it with `freeze=False`, to train both together.

    Args:
        num_classes: Classes with the background, as in `BoxDataset.num_classes`.
        backbone: "timm:NAME", a convolutional network.
        weights: As for :class:`~energyreg.networks.image_encoders.ImageEncoder`: "package", a file, "pretrained" or
            None.
        trainable: How much of the backbone is trained: "none", "all", or its last n stages. Earlier stages know edges
            and textures already, and cost less where they stay.
        size: Longer side that images are resized to, in pixels.
        channels: Channels of the feature pyramid.
        width: Width of the second stage's hidden layers; an energy head of that width starts as their copy.

    Returns:
        A :class:`torchvision.models.detection.FasterRCNN` in training mode.

    Raises:
        ImportError: torchvision or timm is not installed, or the package with the weights.
        ValueError: An argument is out of its range, or the backbone cannot be used.

    Source:
        Ren et al., NeurIPS 2015; Lin et al., CVPR 2017 (feature pyramid).
    """
    for name, number, least in (("num_classes", num_classes, 2), ("size", size, STRIDES[-1]), ("width", width, 1)):
        check_count(name, number, least)
    detection, ops = torchvision().models.detection, torchvision().ops
    body = PyramidBackbone(ImageEncoder(backbone, weights, trainable), channels)
    anchors = detection.anchor_utils.AnchorGenerator(
        tuple((ANCHOR * stride,) for stride in STRIDES), ((0.5, 1.0, 2.0),) * len(STRIDES)
    )
    return detection.FasterRCNN(
        body,
        image_mean=list(body.mean),
        image_std=list(body.std),
        min_size=size,
        max_size=size,
        rpn_anchor_generator=anchors,
        rpn_pre_nms_top_n_train=500,
        rpn_post_nms_top_n_train=300,
        rpn_pre_nms_top_n_test=500,
        rpn_post_nms_top_n_test=200,
        box_roi_pool=ops.MultiScaleRoIAlign([str(place) for place in range(len(STRIDES))], 7, 2),
        box_head=detection.faster_rcnn.TwoMLPHead(channels * 49, width),
        box_predictor=detection.faster_rcnn.FastRCNNPredictor(width, num_classes),
        box_batch_size_per_image=128,
    )
