"""Postprocessing of boxes: gradient ascent on f, densities, vote, rescoring and suppression."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from energyreg.checks import check_count
from energyreg.densities.noise import GaussianNoise
from energyreg.inference.ascent import refine_with_values
from energyreg.vision.boxes.distribution import WINDOW, BoxDistribution, box_noise
from energyreg.vision.boxes.energy import BoxEnergy
from energyreg.vision.boxes.geometry import Geometry, by_coordinate

__all__ = ["Inference", "postprocess", "select"]

DENSITY_SCALES = (0.0375, 0.075, 0.15)
"""Scales of the importance sampler for densities over boxes: those of ML-IS (Gustafsson et al., ECCV 2020)."""


@dataclass(frozen=True)
class Inference:
    """Postprocessing of detected boxes: their refinement, and what is reported about each.

    Args:
        num_steps: Steps T of the ascent; 0 leaves the boxes as they are.
        step_size: Step lengths λ for the kinds of coordinates: the centre and the logarithm of the sides, in those of
            :class:`~energyreg.vision.boxes.BoxSpace`. They are paper II's for NCE+; 4e-4 and 1.6e-3 for the
            other objectives by importance sampling, 2.5e-5 and 1e-4 for DSM and ML-MCMC.
        decay: Factor that shortens the step of a box whose f would fall.
        num_samples: Importance samples M per box for its density; 0 for none, and the following need some.
        box_samples: Boxes to draw from the density, S.
        iou_thresholds: Values of IoU with the true box, whose probability of being exceeded is wanted.
        rescore: Whether scores are multiplied by the expected IoU with the true box, and detections sorted again.
        noise: The importance sampler, around the refined box.
        voting: Whether borders move to the mean of what overlapping boxes of their class say, weighted by the boxes'
            variances: σ_t of :func:`~energyreg.vision.boxes.variance_voting`, 0.02 in He et al. (CVPR 2019); 0 for no
            vote. A detector that keeps few overlapping boxes leaves little to vote on: raise the threshold of its own
            suppression (`roi_heads.nms_thresh`, or `nms_thresh` of FCOS and RetinaNet), and give `nms`.
        nms: Suppress, in the end, boxes whose IoU with a box of their class and a higher score exceeds this, after
            refinement, vote and rescoring; None for no suppression but the detector's own.
        window: Half-widths of a density's support around the refined box, for the kinds of coordinates.

    Raises:
        ValueError: If an argument is out of its range.
    """

    num_steps: int = 10
    step_size: tuple[float, ...] = (8e-4, 3.2e-3)
    decay: float = 0.5
    num_samples: int = 0
    box_samples: int = 0
    iou_thresholds: tuple[float, ...] = ()
    rescore: bool = False
    noise: GaussianNoise = field(default_factory=lambda: box_noise(DENSITY_SCALES))
    voting: float = 0.0
    nms: float | None = None
    window: tuple[float, ...] = WINDOW

    def __post_init__(self) -> None:
        """Check the arguments."""
        for name in ("num_steps", "num_samples", "box_samples"):
            check_count(name, getattr(self, name), 0)
        steps = self.step_size
        if not isinstance(steps, tuple | list) or not all(0 < step < math.inf for step in steps):
            raise ValueError(
                f"step_size is {steps!r}; expected finite numbers > 0, such as for the centre and the sides."
            )
        window = self.window
        if not isinstance(window, tuple | list) or not all(isinstance(w, int | float) and w > 0 for w in window):
            raise ValueError(f"window is {window!r}; expected numbers > 0, such as for the centre and the sides.")
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


def postprocess(
    energy: Callable[[Tensor], BoxEnergy],
    boxes: Tensor,
    labels: Tensor,
    image: Tensor,
    size: Tensor,
    inference: Inference,
    geometry: Geometry,
    *,
    seed: int = 0,
) -> dict[str, Tensor]:
    """Refine boxes of several images at once, and describe each.

    Args:
        energy: Reference boxes (N, D) to f in the coordinates relative to them, which knows what the boxes are.
        boxes: Detected boxes, shape (N, D).
        labels: Classes, shape (N,).
        image: Index of each box's image, shape (N,).
        size: Height and width of each box's image, shape (N, 2).
        inference: What is to be done.
        geometry: What the boxes are.
        seed: Of the importance samples and of the boxes drawn.

    Returns:
        Entries of a detection, (N, ...) each: "boxes" and the others that `EnergyDetector.detect` lists.
    """
    # A box that was clipped to nothing at the border has no sides to measure by; it stays.
    usable = geometry.usable(boxes)
    valid = geometry.valid(boxes)
    f = energy(usable)
    found: dict[str, Tensor] = {}
    refined = usable
    if inference.num_steps:
        steps = by_coordinate(geometry, inference.step_size, "step_size")
        z, energies = refine_with_values(
            f, torch.zeros_like(boxes), num_steps=inference.num_steps, step_size=steps, decay=inference.decay
        )
        refined = geometry.clip(f.space.to_user(z), size)
        refined = torch.where(valid[:, None], refined, boxes)
        found = {"detector_boxes": boxes, "energies": energies, "boxes": refined}
        # Clipping may, in principle, leave nothing of a box that has moved out of its image.
        usable = geometry.usable(refined, usable)
    if not inference.num_samples:
        return found
    p = BoxDistribution.around(
        energy(usable),
        usable,
        noise=inference.noise,
        num_samples=inference.num_samples,
        window=inference.window,
        geometry=geometry,
        shared=True,
        generator=torch.Generator(boxes.device).manual_seed(seed),
    )
    found["box_stddevs"], found["box_effective_samples"] = p.stddev, p.effective_sample_size
    if inference.voting:
        usable = refined.clone()
        for place in image.unique():
            rows = image == place
            usable[rows] = geometry.vote(refined[rows], p.stddev[rows], labels[rows], inference.voting)
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


def select(detection: dict[str, Tensor], inference: Inference, geometry: Geometry) -> None:
    """Sort the boxes of one image by their new scores, and suppress doubles, where `inference` asks for it."""
    if "expected_ious" in detection:
        detection["detector_scores"] = detection["scores"]
        detection["scores"] = detection["scores"] * detection["expected_ious"]
        order = detection["scores"].argsort(descending=True, stable=True)
        detection.update({name: values[order] for name, values in detection.items()})
    if inference.nms is not None:
        kept = geometry.suppress(detection["boxes"], detection["scores"], detection["labels"], inference.nms)
        detection.update({name: values[kept] for name, values in detection.items()})
