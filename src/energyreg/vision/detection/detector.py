"""An energy head for any detector of torchvision: better boxes, and for each what is known about it.

.. code-block:: python

    model = er.vision.add_energy_head(detector)  # a trained Faster R-CNN, Mask R-CNN, FCOS or RetinaNet
    loader = DataLoader(dataset, batch_size=4, shuffle=True, collate_fn=model.collate)
    er.fit(model, loader, epochs=5)
    detections = model(images)  # the detector's dictionaries, with refined boxes

The detector stays as it is. A small network f(image, box) learns from annotated boxes which ones are right, by any
objective of :mod:`energyreg.objectives`, and a detected box climbs f from where the detector has put it.
"""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, fields, replace
from itertools import pairwise
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from energyreg.checks import check_count
from energyreg.densities.noise import GaussianNoise
from energyreg.files import BOX_HEAD, CheckpointError, fingerprint, with_suffix
from energyreg.inference.ascent import refine_with_values
from energyreg.models.checkpoint import load_state, save_state
from energyreg.objectives.contract import NCE, Loss
from energyreg.vision.boxes.boxes import (
    BoxDistribution,
    BoxSpace,
    box_noise,
    check_boxes,
    torchvision,
    variance_voting,
)
from energyreg.vision.pooling.roi_pool import Pyramid, roi_pool

__all__ = [
    "BoxBatch",
    "BoxCollate",
    "BoxEnergy",
    "BoxEnergyHead",
    "EnergyDetector",
    "Inference",
    "WithDetectorLoss",
    "add_energy_head",
    "load_head",
    "save_head",
]

POOL_BYTES = 2**28
"""Pooled features that are held at once; more boxes than fit go through the head in chunks."""
DENSITY_SCALES = (0.0375, 0.075, 0.15)
"""Scales of the importance sampler for densities over boxes: those of ML-IS (Gustafsson et al., ECCV 2020)."""
NUM_SAMPLES = 128
"""Noise samples per box in training, and importance samples where a density is wanted: those of paper II."""
PROBE = 128
"""Side in pixels of the blank image that shows what feature maps a backbone makes."""


# What a step of training gets -----------------------------------------------------------------------------------------


@dataclass
class BoxBatch:
    """Images, and which boxes of them a training step is about: the x that goes with the boxes y, shape (B, 4).

    Attributes:
        images: Images (C, H, W) in [0, 1], as torchvision's detectors take them, of any sizes.
        image: Index of each box's image, shape (B,).
        labels: Class of each box, shape (B,).
        names: What errors call the images.
    """

    images: list[Tensor]
    image: Tensor
    labels: Tensor
    names: list[str] = field(default_factory=list)

    def to(self, *args: Any, **kwargs: Any) -> Self:
        """The batch on another device, as for a tensor; labels and indices stay whole numbers."""
        return self._each(lambda tensor: tensor.to(*args, **kwargs))

    def pin_memory(self) -> Self:
        """The batch in pinned memory, for a DataLoader with `pin_memory=True`."""
        return self._each(Tensor.pin_memory)

    def _each(self, move: Callable[[Tensor], Tensor]) -> Self:
        images = [move(image) for image in self.images]
        return replace(self, images=images, image=move(self.image), labels=move(self.labels))

    def targets(self, boxes: Tensor) -> list[dict[str, Tensor]]:
        """The boxes image by image, as torchvision's detectors take their targets."""
        chosen = [self.image == number for number in range(len(self.images))]
        return [{"boxes": boxes[rows], "labels": self.labels[rows]} for rows in chosen]


@dataclass(frozen=True)
class BoxCollate:
    """Joins examples of a detection dataset to pairs (x, y) for :func:`energyreg.fit`: a DataLoader's `collate_fn`.

    An example is (image, target): an image (C, H, W) of floats in [0, 1] and a dictionary with "boxes", corners in
    pixels of shape (N, 4), and "labels", shape (N,), as torchvision's detectors take them. Further entries are ignored,
    but for "image_id", by which errors call the image.

    Args:
        num_classes: Classes that the detector knows, the background among them where it counts as one.
        first_label: Smallest label of an object: 1 where 0 is the background.
    """

    num_classes: int
    first_label: int = 1

    def __call__(self, examples: Sequence[tuple[Tensor, Mapping[str, Any]]]) -> tuple[BoxBatch, Tensor]:
        """Return the batch and its boxes, shape (B, 4).

        Raises:
            ValueError: Boxes or labels are wrong (see :func:`~energyreg.vision.boxes.check_boxes`), or there are none.
            TypeError: An example is no such pair.
        """
        images, boxes, labels, index, names = [], [], [], [], []
        for place, example in enumerate(examples):
            if not isinstance(example, tuple | list) or len(example) != 2 or not isinstance(example[1], Mapping):
                raise TypeError(
                    f"Example {place} of the batch is a {type(example).__name__}; expected a pair (image, target) with "
                    'target = {"boxes": (N, 4), "labels": (N,)}.'
                )
            image, target = example
            name = _name(target.get("image_id", f"{place} of the batch"))
            image = _checked_image(image, name)
            missing = [key for key in ("boxes", "labels") if key not in target]
            if missing:
                raise ValueError(f"The target of image {name} has no {missing[0]!r}, but {sorted(target)}.")
            own = _corners(target["boxes"])
            check_boxes(own, (image.shape[-2], image.shape[-1]), image=name)
            kinds = torch.as_tensor(target["labels"])
            self._check_labels(kinds, len(own), name)
            images.append(image)
            names.append(name)
            boxes.append(own.to(torch.get_default_dtype()))
            labels.append(kinds.long())
            index.append(torch.full((len(own),), place))
        if not sum(map(len, boxes)):
            raise ValueError(
                f"No image of this batch has a box: {', '.join(names)}. Leave images without boxes out of the dataset: "
                "there is nothing to learn from them here."
            )
        return BoxBatch(images, torch.cat(index), torch.cat(labels), names), torch.cat(boxes)

    def _check_labels(self, labels: Tensor, count: int, name: str) -> None:
        if labels.shape != (count,) or labels.is_floating_point():
            raise ValueError(
                f"labels of image {name} has shape {tuple(labels.shape)} and dtype {labels.dtype}; expected ({count},) "
                "whole numbers, one for each box."
            )
        wrong = (labels < self.first_label) | (labels >= self.num_classes)
        if bool(wrong.any()):
            number = int(wrong.nonzero()[0])
            raise ValueError(
                f"The label of box {number} of image {name} is {int(labels[number])}, but the detector knows "
                f"{self.first_label} to {self.num_classes - 1}"
                + (", with 0 as the background" if self.first_label else "")
                + ". Renumber the labels, or train a detector for these classes."
            )


def _name(identity: Any) -> str:
    return str(identity.item() if isinstance(identity, Tensor) and identity.numel() == 1 else identity)


def _checked_image(image: Any, name: str) -> Tensor:
    if not isinstance(image, Tensor) or not image.is_floating_point() or image.ndim != 3:
        found = f"{image.dtype} of shape {tuple(image.shape)}" if isinstance(image, Tensor) else type(image).__name__
        raise ValueError(
            f"Image {name} is {found}; expected floats in [0, 1] of shape (C, H, W): torchvision.transforms.v2.ToImage "
            "and ToDtype(torch.float32, scale=True) make them."
        )
    return image.as_subclass(Tensor)


def _corners(boxes: Any) -> Tensor:
    """Plain corners; torchvision's tensors know their own format."""
    form = getattr(boxes, "format", None)
    if isinstance(boxes, Tensor) and form is not None and form.value != "XYXY":
        return torchvision().ops.box_convert(boxes.as_subclass(Tensor), form.value.lower(), "xyxy")
    return boxes.as_subclass(Tensor) if isinstance(boxes, Tensor) else boxes


# The energy -----------------------------------------------------------------------------------------------------------


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
        pyramid: Feature maps of the images.
        space: The coordinates, in pixels of the images as they were given.
        image: Index of each box's image, shape (B,).
        labels: Class of each box, shape (B,).
        ratio: Pixels of the resized image per pixel of the given one, along x, y, x, y, shape (B, 4).
        detector_loss: The detector's own loss of the batch, where it is trained along.
        pool_bytes: Pooled features that are held at once. Beyond it a training computes them a second time.
    """

    def __init__(
        self,
        head: BoxEnergyHead,
        pyramid: Pyramid,
        space: BoxSpace,
        image: Tensor,
        labels: Tensor,
        ratio: Tensor,
        *,
        detector_loss: Tensor | None = None,
        pool_bytes: int = POOL_BYTES,
    ) -> None:
        self.head, self.pyramid, self.space = head, pyramid, space
        self.image, self.labels, self.ratio = image, labels, ratio
        self.detector_loss, self.pool_bytes = detector_loss, pool_bytes

    def __call__(self, z: Tensor) -> Tensor:
        """Return f of shape (*S, B) for z of shape (*S, B, 4)."""
        boxes = self.space.to_user(z) * self.ratio
        shape = boxes.shape[:-1]
        rows = torch.arange(len(self.image), device=boxes.device).expand(shape).reshape(-1)
        boxes = boxes.reshape(-1, 4)
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
        return self.head(roi_pool(self.pyramid, boxes, image, output_size=self.head.pool_size), labels)


@dataclass(frozen=True)
class WithDetectorLoss:
    """An objective for f together with the detector's own loss, for a detector that is trained along.

    Args:
        objective: Any objective of :mod:`energyreg.objectives`.
        weight: Weight of the detector's loss, which is the sum of its parts.

    Raises:
        ValueError: If weight is not a finite number > 0.
    """

    objective: Any
    weight: float = 1.0

    def __post_init__(self) -> None:
        """Check the weight."""
        if not isinstance(self.weight, int | float) or not 0 < self.weight < math.inf:
            raise ValueError(f"weight is {self.weight!r}; expected a finite number > 0.")

    def __call__(self, f: BoxEnergy, q: None, y: Tensor, *, generator: torch.Generator | None = None) -> Loss:
        """Return the loss for boxes y in model space, shape (B, 4), each with an equal share in the detector's.

        Raises:
            ValueError: If the detector is frozen.
        """
        if f.detector_loss is None:
            raise ValueError(
                "WithDetectorLoss has no detector's loss to add: the detector is frozen. Use add_energy_head(..., "
                "freeze=False) to train it along, or the objective by itself."
            )
        loss, diagnostics = self.objective(f, q, y, generator=generator)
        own = f.detector_loss.to(loss.dtype)
        return Loss(loss + self.weight * own, {**diagnostics, "detector_loss": own.detach().expand(len(loss))})


# The detector ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Inference:
    """What is done with the boxes of the detector, and what is said about each.

    Args:
        num_steps: Steps T of the ascent; 0 leaves the boxes as they are.
        step_size: Step lengths λ for the centre and for the logarithm of the sides, in the coordinates of
            :class:`~energyreg.vision.boxes.BoxSpace`. They are paper II's for NCE+; 4e-4 and 1.6e-3 for the
            other objectives by importance sampling, 2.5e-5 and 1e-4 for DSM and ML-MCMC.
        decay: Factor that shortens the step of a box whose f would fall.
        num_samples: Importance samples M per box for its density; 0 for none, and the following need some.
        box_samples: Boxes to draw from the density, S.
        iou_thresholds: Values of IoU with the true box, whose probability of being exceeded is wanted.
        rescore: Whether scores are multiplied by the expected IoU with the true box, and detections sorted anew.
        noise: The importance sampler, around the refined box.
        voting: Whether borders move to the mean of what overlapping boxes of their class say, weighted by the boxes'
            variances: σ_t of :func:`~energyreg.vision.boxes.variance_voting`, 0.02 in He et al. (CVPR 2019); 0 for no
            vote. A detector that keeps few overlapping boxes leaves little to vote on: raise the threshold of its own
            suppression (`roi_heads.nms_thresh`, or `nms_thresh` of FCOS and RetinaNet), and give `nms`.
        nms: Suppress, in the end, boxes whose IoU with a box of their class and a higher score exceeds this, after
            refinement, vote and rescoring; None for no suppression but the detector's own.

    Raises:
        ValueError: If an argument is out of its range.
    """

    num_steps: int = 10
    step_size: tuple[float, float] = (8e-4, 3.2e-3)
    decay: float = 0.5
    num_samples: int = 0
    box_samples: int = 0
    iou_thresholds: tuple[float, ...] = ()
    rescore: bool = False
    noise: GaussianNoise = field(default_factory=lambda: box_noise(DENSITY_SCALES))
    voting: float = 0.0
    nms: float | None = None

    def __post_init__(self) -> None:
        """Check the arguments."""
        for name in ("num_steps", "num_samples", "box_samples"):
            check_count(name, getattr(self, name), 0)
        steps = self.step_size
        if not isinstance(steps, tuple | list) or len(steps) != 2 or not all(0 < step < math.inf for step in steps):
            raise ValueError(f"step_size is {steps!r}; expected two finite numbers > 0, for the centre and the sides.")
        if not 0 < self.decay < 1:
            raise ValueError(f"decay is {self.decay!r}; expected a number in (0, 1).")
        if not all(0 <= threshold < 1 for threshold in self.iou_thresholds):
            raise ValueError(f"iou_thresholds is {self.iou_thresholds!r}; expected numbers in [0, 1).")
        if not isinstance(self.voting, int | float) or not 0 <= self.voting < math.inf:
            raise ValueError(f"voting is {self.voting!r}; expected a finite number ≥ 0.")
        if self.nms is not None and not (isinstance(self.nms, int | float) and 0 <= self.nms <= 1):
            raise ValueError(f"nms is {self.nms!r}; expected a number in [0, 1], or None.")
        if not self.num_samples and (self.box_samples or self.iou_thresholds or self.rescore or self.voting):
            raise ValueError(
                "num_samples is 0, but box_samples, iou_thresholds, rescore and voting need a density; pass "
                "num_samples=128 or more."
            )


class EnergyDetector(nn.Module):
    """A detector with an energy head; made by :func:`add_energy_head`.

    Called with images in evaluation mode it returns the detector's dictionaries (see :meth:`detect`); in training mode,
    with targets, a dictionary of losses, as torchvision's detectors do. :func:`energyreg.fit` trains it from a
    DataLoader with `collate_fn=model.collate`.

    Args:
        detector: A detector of torchvision.
        head: Pooled features to energies.
        names: Feature maps to pool from, by their names in the backbone's output, from the finest on.
        num_classes: Classes that the detector knows.
        first_label: Smallest label of an object.
        frozen: Whether the detector stays as it is.
        inference: What is done with detected boxes.
        objective: What :func:`energyreg.fit` minimises by default.
    """

    # What `fit` asks of a model: there is no preprocessing to be fitted.
    fitted = True
    detector: Any

    def __init__(
        self,
        detector: nn.Module,
        head: BoxEnergyHead,
        *,
        names: Sequence[str],
        num_classes: int,
        first_label: int,
        frozen: bool,
        inference: Inference,
        objective: Any,
    ) -> None:
        super().__init__()
        self.detector, self.head = detector, head
        self.names, self.num_classes, self.first_label = tuple(names), num_classes, first_label
        self.frozen, self.inference, self.objective = frozen, inference, objective
        if frozen:
            detector.requires_grad_(False)
        self.train(self.training)

    def train(self, mode: bool = True) -> Self:
        """Set the mode; a frozen detector stays in evaluation mode, so that no statistic of it moves."""
        super().train(mode)
        if self.frozen:
            self.detector.eval()
        return self

    @property
    def collate(self) -> BoxCollate:
        """The `collate_fn` of a DataLoader for this detector."""
        return BoxCollate(self.num_classes, self.first_label)

    @property
    def dtype(self) -> torch.dtype:
        """Floating-point type of the head."""
        return self.head.fc6.weight.dtype

    @property
    def device(self) -> torch.device:
        """Device of the head."""
        return self.head.fc6.weight.device

    # Training ---------------------------------------------------------------------------------------------------------

    def default_objective(self) -> Any:
        """The objective that the model was made with."""
        return self.objective

    def check_targets(self, y: Tensor) -> Tensor:
        """Refuse boxes that cannot be meant; see :func:`~energyreg.vision.boxes.check_boxes`."""
        check_boxes(y)
        return y

    def condition(self, x: BoxBatch, y: Tensor) -> tuple[BoxEnergy, None, Tensor]:
        """What an objective takes of one batch: f relative to the annotated boxes, no proposal, and these boxes, at 0.

        Args:
            x: Images, and what the boxes belong to.
            y: Annotated boxes in pixels of the images as they are given, shape (B, 4).

        Raises:
            TypeError: x comes from another `collate_fn`.
        """
        if not isinstance(x, BoxBatch):
            raise TypeError(
                f"x is a {type(x).__name__}; expected a BoxBatch: make the DataLoader with collate_fn=model.collate."
            )
        y = y.to(self.dtype)
        loss = None
        if self.frozen or not self.training:
            with torch.set_grad_enabled(torch.is_grad_enabled() and not self.frozen):
                resized, _ = self.detector.transform([image.to(self.dtype) for image in x.images])
                maps = self.detector.backbone(resized.tensors)
        else:
            with self._watch() as seen:
                losses = self.detector([image.to(self.dtype) for image in x.images], x.targets(y))
            loss = torch.stack([value.float() for value in losses.values()]).sum()
            resized, maps = seen["transform"][0], seen["backbone"]
        f = self._energy(x.images, resized, maps, y, x.image, x.labels, loss)
        return f, None, torch.zeros_like(y)

    @contextmanager
    def _watch(self) -> Iterator[dict[str, Any]]:
        """Remember what the detector's transform and backbone return while it runs."""
        seen: dict[str, Any] = {}

        def remember(name: str) -> Callable[..., None]:
            return lambda module, inputs, output: seen.__setitem__(name, output)

        hooks = [
            getattr(self.detector, name).register_forward_hook(remember(name)) for name in ("transform", "backbone")
        ]
        try:
            yield seen
        finally:
            for hook in hooks:
                hook.remove()

    def _energy(
        self,
        images: Sequence[Tensor],
        resized: Any,
        maps: Any,
        boxes: Tensor,
        image: Tensor,
        labels: Tensor,
        detector_loss: Tensor | None = None,
    ) -> BoxEnergy:
        levels, scales = _pyramid(maps, self.names, resized.tensors.shape[-2:])
        ratio = boxes.new_tensor(
            [
                (after[1] / before.shape[-1], after[0] / before.shape[-2]) * 2
                for before, after in zip(images, resized.image_sizes, strict=True)
            ]
        )
        pyramid = Pyramid.of(levels, scales)
        return BoxEnergy(self.head, pyramid, BoxSpace(boxes), image, labels, ratio[image], detector_loss=detector_loss)

    # Prediction -------------------------------------------------------------------------------------------------------

    def forward(
        self,
        images: Any,
        targets: Sequence[Mapping[str, Tensor]] | None = None,
        *,
        memory_budget: int | None = None,
    ) -> Any:
        """Images to detections; with targets and in training mode, to losses.

        Args:
            images: Images (C, H, W) in [0, 1], of any sizes. A :class:`BoxBatch` for the densities around annotated
                boxes, whose `log_prob` is what :func:`energyreg.fit` validates by.
            targets: In training mode: "boxes" and "labels" of each image.
            memory_budget: Not needed here: memory is bounded anyway; :func:`energyreg.fit` passes it.
        """
        if isinstance(images, BoxBatch):
            return _Densities(self, images)
        if not self.training:
            return self.detect(images)
        if targets is None:
            raise ValueError("targets is None, but the model is in training mode; pass targets, or call model.eval().")
        batch, boxes = self.collate(list(zip(images, targets, strict=True)))
        device = self.device
        f, q, z = self.condition(batch.to(device), boxes.to(device))
        loss, diagnostics = self.objective(f, q, z)
        own = diagnostics.get("detector_loss")
        if own is None:
            return {"loss_energy": loss.mean()}
        assert f.detector_loss is not None
        weighted = self.objective.weight * f.detector_loss
        return {"loss_energy": loss.mean() - weighted, "loss_detector": weighted}

    @torch.no_grad()
    def detect(
        self, images: Sequence[Tensor], inference: Inference | None = None, *, seed: int = 0
    ) -> list[dict[str, Tensor]]:
        """Detect objects, let their boxes climb f, and say what is asked about each.

        All boxes of all images climb at once, each with its own step length, and keep their scores and their order,
        unless `rescore` or `nms` is on. Masks and keypoints stay those that the detector made of its own boxes.

        Args:
            images: Images (C, H, W) in [0, 1], of any sizes.
            inference: What is to be done; by default what the model was made with.
            seed: Of the importance samples and of the boxes drawn.

        Returns:
            The detector's dictionary for each image, with "boxes" refined and clipped to the image, and:

            - "detector_boxes": the boxes before, (N, 4), unless `num_steps` is 0.
            - "energies": f of the boxes before clipping and vote, (N,), unless `num_steps` is 0.
            - "box_stddevs": standard deviations of the corners in pixels, (N, 4); this and the rest need `num_samples`.
            - "box_effective_samples": samples that the weighted ones are worth, (N,); with few the density is unknown.
            - "box_samples": boxes drawn from the density, (N, S, 4).
            - "iou_probabilities": probability that the IoU with the true box exceeds each threshold, (N, T).
            - "detector_scores": the scores before, where `rescore` is on; "scores" are multiplied by "expected_ious".

            After a vote, "boxes" and all that is said of IoU are of the boxes that came out of it, while "box_stddevs"
            and "box_samples" are of the density around each refined box.

        Raises:
            ValueError: The model is in training mode, or an image is none.
        """
        if self.training or self.detector.training:
            raise ValueError("The model is in training mode, where a detector detects nothing; call model.eval().")
        inference = self.inference if inference is None else inference
        images = [_checked_image(image, str(place)) for place, image in enumerate(images)]
        with self._watch() as seen:
            detections = self.detector(images)
        counts = [len(detection["boxes"]) for detection in detections]
        if not inference.num_steps and not inference.num_samples and inference.nms is None:
            return detections
        boxes = torch.cat([detection["boxes"] for detection in detections])
        labels = torch.cat([detection["labels"] for detection in detections])
        image = torch.repeat_interleave(torch.arange(len(counts), device=boxes.device), boxes.new_tensor(counts).long())
        found = self._study(images, seen, boxes, labels, image, inference, seed)
        for place, detection in enumerate(detections):
            detection.update({name: values[image == place] for name, values in found.items()})
            if "expected_ious" in detection:
                detection["detector_scores"] = detection["scores"]
                detection["scores"] = detection["scores"] * detection["expected_ious"]
                order = detection["scores"].argsort(descending=True, stable=True)
                detection.update({name: values[order] for name, values in detection.items()})
            if inference.nms is not None:
                suppress = torchvision().ops.batched_nms
                kept = suppress(detection["boxes"], detection["scores"], detection["labels"], inference.nms)
                detection.update({name: values[kept] for name, values in detection.items()})
        return detections

    def _study(
        self,
        images: Sequence[Tensor],
        seen: Mapping[str, Any],
        boxes: Tensor,
        labels: Tensor,
        image: Tensor,
        inference: Inference,
        seed: int,
    ) -> dict[str, Tensor]:
        """The new entries for all boxes of all images, (N, ...) each."""
        resized, maps = seen["transform"][0], seen["backbone"]
        # A box that was clipped to nothing at the border has no sides to measure by; it stays.
        valid = (boxes[:, 2:] > boxes[:, :2]).all(1)
        usable = torch.where(valid[:, None], boxes, boxes.new_tensor([0.0, 0.0, 1.0, 1.0]))
        f = self._energy(images, resized, maps, usable, image, labels)
        limit = boxes.new_tensor([each.shape[:-3:-1] * 2 for each in images])[image]  # width, height, width, height
        found: dict[str, Tensor] = {}
        refined = usable
        if inference.num_steps:
            steps = [step for step in inference.step_size for _ in range(2)]
            z, energies = refine_with_values(
                f, torch.zeros_like(boxes), num_steps=inference.num_steps, step_size=steps, decay=inference.decay
            )
            refined = torch.minimum(f.space.to_user(z).clamp_min(0), limit)
            refined = torch.where(valid[:, None], refined, boxes)
            found = {"detector_boxes": boxes, "energies": energies, "boxes": refined}
            # Clipping may, in principle, leave nothing of a box that has climbed out of its image.
            remains = (refined[:, 2:] > refined[:, :2]).all(1)
            usable = torch.where(remains[:, None], refined, usable)
        if inference.num_samples:
            around = self._energy(images, resized, maps, usable, image, labels)
            p = BoxDistribution.around(
                around,
                usable,
                noise=inference.noise,
                num_samples=inference.num_samples,
                shared=True,
                generator=torch.Generator(boxes.device).manual_seed(seed),
            )
            found["box_stddevs"], found["box_effective_samples"] = p.stddev, p.effective_sample_size
            if inference.voting:
                usable = refined.clone()
                for place in range(len(images)):
                    rows = image == place
                    usable[rows] = variance_voting(refined[rows], p.stddev[rows], labels[rows], inference.voting)
                found.setdefault("detector_boxes", boxes)
                found["boxes"] = usable
            if inference.box_samples:
                generator = torch.Generator(boxes.device).manual_seed(seed + 1)
                found["box_samples"] = p.sample(inference.box_samples, generator=generator).transpose(0, 1)
            if inference.iou_thresholds:
                found["iou_probabilities"] = p.iou_probability(usable, inference.iou_thresholds)
            if inference.rescore:
                found["expected_ious"] = p.expected_iou(usable)
        return found


@dataclass(frozen=True)
class _Densities:
    """Densities around annotated boxes, for validation: their normalisers are estimated around these boxes."""

    model: EnergyDetector
    batch: BoxBatch

    def log_prob(self, y: Tensor) -> Tensor:
        """Log-density at boxes (B, 4), in nats per pixel⁴, shape (B,)."""
        f, _, _ = self.model.condition(self.batch, y)
        inference = self.model.inference
        count = inference.num_samples or NUM_SAMPLES
        return BoxDistribution.around(f, f.space.reference, noise=inference.noise, num_samples=count).log_prob(y)


def add_energy_head(
    detector: Any,
    *,
    class_specific: bool = True,
    num_classes: int | None = None,
    pool_size: int = 7,
    width: int = 1024,
    freeze: bool = True,
    inference: Inference | None = None,
    objective: Any = None,
) -> EnergyDetector:
    """Give a trained detector an energy head, which pools from the same feature maps as its own heads.

    Where the detector has a second stage with two hidden layers of the same sizes (Faster R-CNN, Mask R-CNN), the
    head's start as copies of them; its last layer starts near 0.

    Args:
        detector: A Faster R-CNN, Mask R-CNN, FCOS or RetinaNet of torchvision, or a module with its parts: `transform`,
            `backbone`, and detections as dictionaries.
        class_specific: Whether each class has an output of its own.
        num_classes: Classes that the detector knows, the background among them; read from the detector by default.
        pool_size: Bins along either side of a box.
        width: Width of the head's hidden layers.
        freeze: Whether the detector stays as it is: no gradient, and always in evaluation mode. Otherwise it is trained
            along, by its own loss and through the features: see :class:`WithDetectorLoss`.
        inference: What is done with detected boxes; by default ten steps of ascent.
        objective: What :func:`energyreg.fit` minimises by default; NCE+ with M = 128 samples and β = 0.1 by default.

    Returns:
        The detector and its head as one module, on the device of the detector and in its mode.

    Raises:
        TypeError: detector is no such module.
        ValueError: Its feature maps are no pyramid, the number of classes is another or not to be found out, or it is
            to be trained along and none of its parameters requires a gradient.
        ImportError: torchvision is not installed.

    Source:
        Gustafsson et al., ECCV 2020 and BMVC 2020.
    """
    _check_detector(detector)
    torchvision()
    if not freeze and not any(parameter.requires_grad for parameter in detector.parameters()):
        raise ValueError(
            "freeze is False, but no parameter of the detector requires a gradient, as after an earlier "
            "add_energy_head(detector). Call detector.requires_grad_(True) first, or for its trainable parts."
        )
    classes, first_label = _classes(detector, num_classes)
    names, channels, _ = _probe(detector)
    head = BoxEnergyHead(channels, classes if class_specific else 1, pool_size=pool_size, width=width)
    _copy_hidden_layers(detector, head)
    backbone: Any = detector.backbone
    parameter = next(backbone.parameters())
    head.to(parameter.device, parameter.dtype)
    if objective is None:
        objective = NCE(box_noise(), num_samples=NUM_SAMPLES, beta=0.1)
        objective = objective if freeze else WithDetectorLoss(objective)
    model = EnergyDetector(
        detector,
        head,
        names=names,
        num_classes=classes,
        first_label=first_label,
        frozen=freeze,
        inference=Inference() if inference is None else inference,
        objective=objective,
    )
    return model.train(detector.training)


def _check_detector(detector: Any) -> None:
    missing = [name for name in ("transform", "backbone") if not isinstance(getattr(detector, name, None), nn.Module)]
    if not isinstance(detector, nn.Module) or missing:
        raise TypeError(
            f"detector is a {type(detector).__name__}, which has no {' and no '.join(missing)}; expected a Faster "
            "R-CNN, Mask R-CNN, FCOS or RetinaNet of torchvision."
        )


def _declared_classes(detector: Any) -> int | None:
    """Number of classes, where the detector says it."""
    if hasattr(detector, "roi_heads"):
        return getattr(getattr(detector.roi_heads.box_predictor, "cls_score", None), "out_features", None)
    return getattr(getattr(getattr(detector, "head", None), "classification_head", None), "num_classes", None)


def _classes(detector: Any, num_classes: int | None) -> tuple[int, int]:
    """Number of classes, and the first label of an object."""
    found = _declared_classes(detector)
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
def _probe(detector: Any) -> tuple[tuple[str, ...], int, tuple[float, ...]]:
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
    levels, scales = _pyramid(maps, names, blank.shape[-2:])
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


def _pyramid(maps: Any, names: Iterable[str], size: Sequence[int]) -> tuple[list[Tensor], list[float]]:
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


def _copy_hidden_layers(detector: Any, head: BoxEnergyHead) -> None:
    box_head = getattr(getattr(detector, "roi_heads", None), "box_head", None)
    for name in ("fc6", "fc7"):
        theirs, mine = getattr(box_head, name, None), getattr(head, name)
        if not isinstance(theirs, nn.Linear) or theirs.weight.shape != mine.weight.shape:
            return
        mine.load_state_dict(theirs.state_dict())


# Saving and loading ---------------------------------------------------------------------------------------------------


def save_head(model: EnergyDetector, path: str | os.PathLike[str]) -> Path:
    """Write the energy head to one safetensors file: its weights, its sizes, and what is done with detected boxes.

    The detector is not in it: save that as you always do. The file remembers what feature maps and classes it has, and
    a checksum of its backbone. A checksum over the whole file detects damage; nothing in it is ever run.

    Args:
        model: What :func:`add_energy_head` made.
        path: File to write. The suffix ``.safetensors`` is appended where it is missing; missing folders are created.

    Returns:
        The path of the file, with its suffix.

    Raises:
        TypeError: model is no such module.
        OSError: The file cannot be written; an older one is intact.
    """
    if not isinstance(model, EnergyDetector):
        raise TypeError(f"model is a {type(model).__name__}; expected what add_energy_head() makes.")
    head, inference = model.head, model.inference
    settings = {each.name: getattr(inference, each.name) for each in fields(inference)}
    state = {
        "detector": _interface(model.detector, model.num_classes),
        "backbone": fingerprint(model.detector.backbone),
        "head": {
            "class_specific": head.num_outputs > 1,
            "pool_size": head.pool_size,
            "width": head.fc6.out_features,
        },
        "inference": settings
        | {"noise": {each.name: getattr(inference.noise, each.name) for each in fields(inference.noise)}},
    }
    path = with_suffix(path)
    save_state(path, head.state_dict(), state, BOX_HEAD)
    return path


def load_head(
    detector: Any, path: str | os.PathLike[str], *, freeze: bool = True, objective: Any = None
) -> EnergyDetector:
    """Give a detector the energy head that :func:`save_head` wrote.

    Args:
        detector: The detector that the head was trained on, with its weights.
        path: File to read, with or without its suffix ``.safetensors``.
        freeze: As for :func:`add_energy_head`.
        objective: As for :func:`add_energy_head`; it is not in the file.

    Returns:
        As :func:`add_energy_head`, with the settings of inference of the saved model.

    Raises:
        FileNotFoundError: There is no such file.
        CheckpointError: The file is no head's, is damaged, or is of a detector with other feature maps or classes.
        TypeError: As for :func:`add_energy_head`.
        ValueError: As for :func:`add_energy_head`.

    Warns:
        UserWarning: The backbone has other weights than the one that the head was trained on.
    """
    _check_detector(detector)
    path = with_suffix(path)
    tensors, state = load_state(path, BOX_HEAD)
    try:
        wanted = state["detector"]
        sizes = {name: state["head"][name] for name in ("class_specific", "pool_size", "width")}
        settings = state["inference"]
        inference = Inference(**{**settings, "noise": GaussianNoise(**settings["noise"])})
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"Cannot load {str(path)!r}: its description cannot be read ({error!r}).") from None
    classes = wanted.get("classes") if _declared_classes(detector) is None else None
    for name, value in _interface(detector, classes).items():
        if wanted.get(name) != value:
            raise CheckpointError(
                f"Cannot load {str(path)!r}: it is the head of a detector with {name} = {wanted.get(name)}, but this "
                f"detector has {name} = {value}. Build the detector as it was when the head was saved."
            )
    # New layers draw initial weights; the caller's random state is none of their business.
    with torch.random.fork_rng(devices=[]):
        model = add_energy_head(
            detector, num_classes=classes, freeze=freeze, inference=inference, objective=objective, **sizes
        )
    try:
        model.head.load_state_dict(tensors)
    except RuntimeError as error:
        raise CheckpointError(f"Cannot load {str(path)!r}: its weights are of another head ({error}).") from None
    if state.get("backbone") != fingerprint(detector.backbone):
        warnings.warn(
            f"{path} was saved with other weights of the detector's backbone. The head reads its feature maps, so that "
            "its energies mean nothing on others; load the weights of the detector before the head.",
            stacklevel=2,
        )
    return model


def _interface(detector: Any, num_classes: int | None) -> dict[str, Any]:
    """What a head depends on."""
    classes, first_label = _classes(detector, num_classes)
    names, channels, scales = _probe(detector)
    return {
        "feature maps": names,
        "channels": channels,
        "nodes per pixel": scales,
        "classes": classes,
        "first label": first_label,
    }
