"""The geometry of boxes is all that energies, densities and postprocessing know of them: a second one shows it.

Rotated boxes (cx, cy, w, h, θ) with an angle that is periodic, pooled by `rotated_roi_pool`, take the whole way.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from energyreg import objectives
from energyreg.densities.angles import wrap_angles
from energyreg.densities.noise import GaussianNoise
from energyreg.inference.energy import periodic_of
from energyreg.vision.boxes.distribution import BoxDistribution
from energyreg.vision.boxes.energy import BoxEnergy, BoxEnergyHead
from energyreg.vision.boxes.geometry import Boxes2D, Geometry, Pooler, by_coordinate
from energyreg.vision.boxes.postprocessing import Inference, postprocess, select
from energyreg.vision.pooling.roi_pool import Pyramid
from energyreg.vision.pooling.rotated_pool import rotated_roi_pool

DOUBLE = torch.float64
ANGLE = torch.tensor([False, False, False, False, True])


@dataclass(frozen=True)
class RotatedSpace:
    """Centre in sides of the reference box, in its own frame; logarithms of the sides; angle to the reference."""

    reference: Tensor

    def to_model(self, boxes: Tensor) -> Tensor:
        way, size = boxes[..., :2] - self.reference[:, :2], self.reference[:, 2:4]
        cos, sin = self.reference[:, 4].cos(), self.reference[:, 4].sin()
        turned = torch.stack([cos * way[..., 0] + sin * way[..., 1], cos * way[..., 1] - sin * way[..., 0]], -1)
        angle = boxes[..., 4:] - self.reference[:, 4:]
        return wrap_angles(torch.cat([turned / size, (boxes[..., 2:4] / size).log(), angle], -1), ANGLE)

    def to_user(self, z: Tensor) -> Tensor:
        size = self.reference[:, 2:4]
        right, down = (z[..., :2] * size).unbind(-1)
        cos, sin = self.reference[:, 4].cos(), self.reference[:, 4].sin()
        way = torch.stack([cos * right - sin * down, sin * right + cos * down], -1)
        angle = self.reference[:, 4:] + z[..., 4:]
        return wrap_angles(torch.cat([self.reference[:, :2] + way, size * z[..., 2:4].exp(), angle], -1), ANGLE)

    def log_abs_det_jacobian(self, boxes: Tensor) -> Tensor:
        return -(self.reference[:, 2:4].log() + boxes[..., 2:4].log()).sum(-1)

    def contains(self, boxes: Tensor) -> Tensor:
        return boxes.isfinite().all(-1) & (boxes[..., 2:4] > 0).all(-1)


@dataclass(frozen=True)
class Rotated:
    """Rotated boxes in an image."""

    kinds: tuple[int, ...] = (0, 0, 1, 1, 2)
    periodic: tuple[bool, ...] = (False, False, False, False, True)

    def space(self, reference: Tensor) -> RotatedSpace:
        return RotatedSpace(reference)

    def noise(self, scales: Sequence[Sequence[float]], *, antithetic: bool = False) -> GaussianNoise:
        rows = [tuple(by_coordinate(self, row, "scales")) for row in zip(*scales, strict=True)]
        return GaussianNoise(rows, self.periodic, antithetic=antithetic)

    def valid(self, boxes: Tensor) -> Tensor:
        return (boxes[..., 2:4] > 0).all(-1)

    def usable(self, boxes: Tensor, instead: Tensor | None = None) -> Tensor:
        other = boxes.new_tensor([0.0, 0.0, 1.0, 1.0, 0.0]) if instead is None else instead
        return torch.where(self.valid(boxes)[:, None], boxes, other)

    def in_maps(self, boxes: Tensor, ratio: Tensor) -> Tensor:
        return torch.cat([boxes[..., :4] * ratio, boxes[..., 4:]], -1)

    def pool(self, features: Pooler, boxes: Tensor, image: Tensor, output_size: int) -> Tensor:
        assert isinstance(features, Pyramid)
        return rotated_roi_pool(features, boxes, image, output_size=output_size)

    def iou(self, boxes: Tensor, others: Tensor) -> Tensor:
        """Any overlap in [0, 1] that falls with the distance will do here."""
        return (-(boxes[..., :2] - others[..., :2]).square().sum(-1) / 100).exp()

    def check(self, boxes: Tensor, size: tuple[int, int] | None = None, *, image: object = None) -> None:
        assert boxes.shape[1] == 5

    def clip(self, boxes: Tensor, size: Tensor) -> Tensor:
        return torch.cat([torch.minimum(boxes[:, :2].clamp_min(0), size.flip(1)), boxes[:, 2:]], 1)

    def suppress(self, boxes: Tensor, scores: Tensor, labels: Tensor, threshold: float) -> Tensor:
        kept: list[int] = []
        for place in scores.argsort(descending=True).tolist():
            if all(float(self.iou(boxes[place], boxes[other])) <= threshold for other in kept):
                kept.append(place)
        return torch.tensor(kept)

    def vote(self, boxes: Tensor, stddevs: Tensor, labels: Tensor, width: float) -> Tensor:
        return boxes


GEOMETRY: Geometry = Rotated()
BOXES = torch.tensor([[30.0, 30, 20, 10, 0.3], [33.0, 28, 16, 12, 3.1], [10.0, 50, 8, 8, -3.1]], dtype=DOUBLE)


def _energy(reference: Tensor) -> BoxEnergy:
    torch.manual_seed(0)
    head = BoxEnergyHead(4, pool_size=3, width=8).double().requires_grad_(False)
    head.output.weight.normal_(std=3.0)
    pyramid = Pyramid.of(torch.randn(1, 4, 16, 16, dtype=DOUBLE), 1 / 4)
    count = len(reference)
    zeros, ratio = torch.zeros(count, dtype=torch.long), torch.ones(count, 4, dtype=DOUBLE)
    return BoxEnergy(head, pyramid, GEOMETRY.space(reference), zeros, zeros, ratio, geometry=GEOMETRY)


def _postprocess(boxes: Tensor, inference: Inference) -> dict[str, Tensor]:
    size = torch.full((len(boxes), 2), 64.0, dtype=DOUBLE)
    zeros = torch.zeros(len(boxes), dtype=torch.long)
    return postprocess(_energy, boxes, zeros, zeros, size, inference, GEOMETRY)


NOISE = GEOMETRY.noise([(0.05, 0.1), (0.05, 0.1), (0.1, 0.3)])
ASK = Inference(
    step_size=(1e-3, 1e-3, 1e-3), num_samples=60, box_samples=4, iou_thresholds=(0.5,), rescore=True, noise=NOISE,
    window=(0.5, 0.7, math.pi), nms=0.99,
)  # fmt: skip


def test_the_energy_says_which_coordinate_is_an_angle_and_an_objective_trains_on_it() -> None:
    f = _energy(BOXES)
    assert periodic_of(f, 5) == GEOMETRY.periodic
    z = torch.zeros(3, 5, dtype=DOUBLE)
    turned = torch.tensor([0, 0, 0, 0, 2 * math.pi], dtype=DOUBLE)
    torch.testing.assert_close(f(z + turned), f(z))
    loss = objectives.NCE(NOISE, num_samples=16)(f, None, z, generator=torch.Generator().manual_seed(0))
    assert objectives.contract.as_loss(loss, None)[0].isfinite().all()


def test_boxes_with_an_angle_take_the_whole_way() -> None:
    found = _postprocess(BOXES, ASK)
    assert found["boxes"].shape == (3, 5) and found["box_samples"].shape == (3, 4, 5)
    before, after = _energy(BOXES), _energy(found["boxes"])
    origin = torch.zeros(3, 5, dtype=DOUBLE)
    assert (after(origin) >= before(origin) - 1e-9).all() and (after(origin) > before(origin)).any()
    assert (found["boxes"][:, 4].abs() <= math.pi).all()
    detection = {**found, "scores": torch.tensor([0.9, 0.8, 0.7]), "labels": torch.zeros(3, dtype=torch.long)}
    select(detection, ASK, GEOMETRY)
    assert detection["boxes"].shape[1] == 5 and detection["scores"].diff().le(0).all()


def test_a_box_without_area_stays_and_spoils_no_other() -> None:
    flat = BOXES.clone()
    flat[1, 2] = 0.0
    found, alone = _postprocess(flat, ASK), _postprocess(BOXES[[0, 2]], ASK)
    assert torch.equal(found["boxes"][1], flat[1])
    for name in ("boxes", "box_stddevs", "box_samples", "iou_probabilities"):
        torch.testing.assert_close(found[name][[0, 2]], alone[name])


@pytest.mark.parametrize("adaptive", [False, True])
def test_moments_of_an_angle_do_not_see_its_cut(adaptive: bool) -> None:
    """Two references on either side of ±π, and one away from it, with the same density around each."""
    centre = torch.tensor([0.02, 0.0, 0.0, 0.0, 0.1], dtype=DOUBLE)

    def f(z: Tensor) -> Tensor:
        return -0.5 * ((z - centre) / 0.1).square().sum(-1)

    references = BOXES[:1].repeat(3, 1)
    references[:, 4] = torch.tensor([math.pi - 0.05, -math.pi + 0.02, 0.4])
    p = BoxDistribution.around(
        f, references, noise=GEOMETRY.noise([(0.1, 0.2), (0.1, 0.2), (0.1, 0.2)]), num_samples=3000,
        window=(0.5, 0.7, math.pi), geometry=GEOMETRY, shared=True, adaptive=adaptive,
        generator=torch.Generator().manual_seed(0),
    )  # fmt: skip
    expected = torch.tensor([-math.pi + 0.05, -math.pi + 0.12, 0.5], dtype=DOUBLE)
    # Some 1,000 effective samples of σ = 0.1: three standard errors of a mean are 0.01, of a deviation 7 %.
    assert (p.effective_sample_size > 900).all() and (p.pareto_k < 0.7).all()
    torch.testing.assert_close(p.mean[:, 4], expected, rtol=0, atol=0.01)
    torch.testing.assert_close(p.stddev[:, 4], torch.full((3,), 0.1, dtype=DOUBLE), rtol=0.07, atol=0)
    log_z = 2.5 * math.log(2 * math.pi * 0.01)
    torch.testing.assert_close(p.points.log_partition, torch.full((3,), log_z, dtype=DOUBLE), rtol=0, atol=0.1)


def test_adaptive_samples_of_upright_boxes_find_a_density_beside_the_noise() -> None:
    """Half of a small scale away, with a log Z that is known; plain samples are worth a tenth."""
    reference = torch.tensor([[10.0, 20.0, 30.0, 60.0], [0.0, 0.0, 8.0, 8.0]], dtype=DOUBLE)

    def f(z: Tensor) -> Tensor:
        return -0.5 * ((z - 0.08) / 0.04).square().sum(-1)

    def around(adaptive: bool, rows: slice = slice(None)) -> BoxDistribution:
        generator = torch.Generator().manual_seed(0)
        noise = Boxes2D().noise([(0.0375, 0.075, 0.15)] * 2)
        return BoxDistribution.around(
            f, reference[rows], noise=noise, num_samples=384, adaptive=adaptive, shared=True, generator=generator
        )

    p, plain = around(True), around(False)
    truth = 2 * math.log(2 * math.pi * 0.04**2)
    assert (p.effective_sample_size > 3 * plain.effective_sample_size).all()
    torch.testing.assert_close(p.points.log_partition, torch.full((2,), truth, dtype=DOUBLE), rtol=0, atol=0.4)
    assert len(p.points.y) == 384
    torch.testing.assert_close(around(True, slice(1, 2)).stddev, p.stddev[1:])


def test_numbers_for_kinds_of_coordinates_are_as_many_as_kinds() -> None:
    assert by_coordinate(GEOMETRY, (1.0, 2.0, 3.0), "step_size") == [1.0, 1.0, 2.0, 2.0, 3.0]
    with pytest.raises(ValueError, match=r"step_size is \(1.0, 2.0\); expected 3 numbers"):
        _postprocess(BOXES, Inference(step_size=(1.0, 2.0), noise=NOISE))
    with pytest.raises(ValueError, match="centre has 2 scales and size 1"):
        Boxes2D().noise([(0.1, 0.2), (0.1,)])
