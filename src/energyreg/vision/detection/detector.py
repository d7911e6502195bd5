"""An energy head for any detector of torchvision: better boxes, and for each what is known about it.

.. code-block:: python

    model = er.vision.add_energy_head(detector)  # a trained Faster R-CNN, Mask R-CNN, FCOS or RetinaNet
    loader = DataLoader(dataset, batch_size=4, shuffle=True, collate_fn=model.collate)
    er.fit(model, loader, epochs=5)
    detections = model(images)  # the detector's dictionaries, with refined boxes

The detector stays as it is. A small network f(image, box) learns from annotated boxes which ones are right, by any
objective of `energyreg.objectives`. A detected box is refined by gradient ascent on f.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor, nn

from energyreg.modes import as_usual
from energyreg.objectives import NCE, Loss
from energyreg.objectives.contract import as_loss
from energyreg.vision.boxes.batch import BoxBatch, BoxCollate, check_image
from energyreg.vision.boxes.corners import torchvision
from energyreg.vision.boxes.distribution import BoxDistribution, box_noise
from energyreg.vision.boxes.energy import BoxEnergy, BoxEnergyHead
from energyreg.vision.boxes.geometry import Boxes2D, Geometry
from energyreg.vision.boxes.postprocessing import Inference, postprocess, select
from energyreg.vision.detection import adapter
from energyreg.vision.pooling.roi_pool import Pyramid

__all__ = ["EnergyDetector", "WithDetectorLoss", "add_energy_head"]

NUM_SAMPLES = 128
"""Noise samples per box in training, and importance samples where a density is wanted: those of paper II."""


@dataclass(frozen=True)
class WithDetectorLoss:
    """An objective for f together with the detector's own loss, for a detector that is fine-tuned jointly.

    Args:
        objective: Any objective of `energyreg.objectives`.
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
        """Return the loss for boxes y in model space, shape (B, 4), with the detector's own spread evenly over them.

        Raises:
            ValueError: If the detector is frozen.
        """
        if f.detector_loss is None:
            raise ValueError(
                "WithDetectorLoss has no detector's loss to add: the detector is frozen. Use add_energy_head(..., "
                "freeze=False) to fine-tune it jointly, or the objective by itself."
            )
        loss, diagnostics = as_loss(self.objective(f, q, y, generator=generator), self.objective)
        own = f.detector_loss.to(loss.dtype)
        return Loss(loss + self.weight * own, {**diagnostics, "detector_loss": own.detach().expand(len(loss))})


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

    # There is no preprocessing to be fitted; see `energyreg.training.Trainable`.
    fitted = True
    preprocesses_inputs = False
    detector: Any
    geometry: Geometry = Boxes2D()

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
        return BoxCollate(self.num_classes, self.first_label, self.geometry)

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

    def fit_preprocessing(self, x: Any, y: Any) -> None:
        """Nothing: boxes are measured by their own sides."""

    def check_inputs(self, x: Any) -> Any:
        """Return the batch.

        Raises:
            ValueError: It is none.
        """
        if not isinstance(x, BoxBatch):
            raise ValueError(
                f"x is a {type(x).__name__}; expected a BoxBatch, of a DataLoader with collate_fn=model.collate."
            )
        return x

    def check_targets(self, y: Tensor) -> Tensor:
        """Refuse invalid boxes; see :func:`~energyreg.vision.boxes.check_boxes`."""
        self.geometry.check(y)
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
            with adapter.watch(self.detector) as seen:
                losses = self.detector([image.to(self.dtype) for image in x.images], x.targets(y))
            loss = torch.stack([value.float() for value in losses.values()]).sum()
            resized, maps = seen["transform"][0], seen["backbone"]
        f = self._energy(x.images, resized, maps, y, x.image, x.labels, loss)
        return f, None, torch.zeros_like(y)

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
        levels, scales = adapter.pyramid_of(maps, self.names, resized.tensors.shape[-2:])
        ratio = boxes.new_tensor(
            [
                (after[1] / before.shape[-1], after[0] / before.shape[-2]) * 2
                for before, after in zip(images, resized.image_sizes, strict=True)
            ]
        )
        pyramid = Pyramid.of(levels, scales)
        return BoxEnergy(
            self.head,
            pyramid,
            self.geometry.space(boxes),
            image,
            labels,
            ratio[image],
            geometry=self.geometry,
            detector_loss=detector_loss,
        )

    # Prediction -------------------------------------------------------------------------------------------------------

    @as_usual
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
        loss, diagnostics = as_loss(self.objective(f, q, z), self.objective)
        own = diagnostics.get("detector_loss")
        if own is None:
            return {"loss_energy": loss.mean()}
        assert f.detector_loss is not None
        weighted = self.objective.weight * f.detector_loss
        return {"loss_energy": loss.mean() - weighted, "loss_detector": weighted}

    @torch.no_grad()
    @as_usual
    def detect(
        self, images: Sequence[Tensor], inference: Inference | None = None, *, seed: int = 0
    ) -> list[dict[str, Tensor]]:
        """Detect objects, refine their boxes by gradient ascent on f, and describe each as `inference` asks.

        All boxes of all images are refined at once, each with its own step length. They keep their scores and their
        order, unless `rescore` or `nms` is on. Masks and keypoints stay those that the detector made of its own boxes.

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
        images = [check_image(image, str(place)) for place, image in enumerate(images)]
        with adapter.watch(self.detector) as seen:
            detections = self.detector(images)
        counts = [len(detection["boxes"]) for detection in detections]
        if not inference.num_steps and not inference.num_samples and inference.nms is None:
            return detections
        boxes = torch.cat([detection["boxes"] for detection in detections])
        labels = torch.cat([detection["labels"] for detection in detections])
        image = torch.repeat_interleave(torch.arange(len(counts), device=boxes.device), boxes.new_tensor(counts).long())
        size = boxes.new_tensor([each.shape[-2:] for each in images])[image]
        resized, maps = seen["transform"][0], seen["backbone"]

        def energy(reference: Tensor) -> BoxEnergy:
            return self._energy(images, resized, maps, reference, image, labels)

        found = postprocess(energy, boxes, labels, image, size, inference, self.geometry, seed=seed)
        for place, detection in enumerate(detections):
            detection.update({name: values[image == place] for name, values in found.items()})
            select(detection, inference, self.geometry)
        return detections


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
        return BoxDistribution.around(
            f,
            f.space.reference,
            noise=inference.noise,
            num_samples=count,
            window=inference.window,
            geometry=self.model.geometry,
        ).log_prob(y)


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
        freeze: Whether the detector stays as it is: no gradient, and always in evaluation mode. Otherwise it is
            fine-tuned jointly, by its own loss and through the features: see :class:`WithDetectorLoss`.
        inference: What is done with detected boxes; by default ten steps of ascent.
        objective: What :func:`energyreg.fit` minimises by default; NCE+ with M = 128 samples and β = 0.1 by default.

    Returns:
        The detector and its head as one module, on the device of the detector and in its mode.

    Raises:
        TypeError: detector is no such module.
        ValueError: Its feature maps are no pyramid, the number of classes is another or not to be found out, or it is
            to be fine-tuned and none of its parameters requires a gradient.
        ImportError: torchvision is not installed.

    Source:
        Gustafsson et al., ECCV 2020 and BMVC 2020.
    """
    adapter.check_detector(detector)
    torchvision()
    if not freeze and not any(parameter.requires_grad for parameter in detector.parameters()):
        raise ValueError(
            "freeze is False, but no parameter of the detector requires a gradient, as after an earlier "
            "add_energy_head(detector). Call detector.requires_grad_(True) first, or for its trainable parts."
        )
    classes, first_label = adapter.classes_of(detector, num_classes)
    names, channels, _ = adapter.probe(detector)
    head = BoxEnergyHead(channels, classes if class_specific else 1, pool_size=pool_size, width=width)
    adapter.copy_hidden_layers(detector, head)
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
