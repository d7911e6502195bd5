"""Pooling of rotated boxes: the mean of the same surface, wherever the box turns to."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck

from energyreg.vision.pooling.roi_pool import Pyramid, roi_pool
from energyreg.vision.pooling.rotated_pool import rotated_roi_pool

BOXES = [
    [5.5, 5.3, 8.4, 6.3, 0.4],
    [1.4, 1.6, 7.8, 5.6, -2.1],  # beyond the map's first corner
    [12.0, 9.4, 11.8, 8.4, 1.2],  # beyond its last
    [3.55, 3.5, 0.7, 0.4, 0.7],  # inside of one cell
]
KAPPA = {2: 0.023, 4: 0.0092, 8: 0.0028}


def _maps(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def _boxes(rows: list[list[float]] = BOXES) -> Tensor:
    return torch.tensor(rows, dtype=torch.float64)


def _by_integration(features: Tensor, boxes: Tensor, bins: tuple[int, int], points: int) -> Tensor:
    """The midpoint rule in the frame of the box, node by node, (C, H, W) and (R, 5) to (R, C, P, Q)."""
    _, height, width = features.shape
    rows, columns = (torch.arange(size, dtype=features.dtype) for size in (height, width))
    pooled = []
    for cx, cy, w, h, angle in boxes.tolist():
        u = w * ((torch.arange(points * bins[1], dtype=features.dtype) + 0.5) / (points * bins[1]) - 0.5)
        v = h * ((torch.arange(points * bins[0], dtype=features.dtype) + 0.5) / (points * bins[0]) - 0.5)
        x = cx + math.cos(angle) * u - math.sin(angle) * v[:, None]
        y = cy + math.sin(angle) * u + math.cos(angle) * v[:, None]
        along_x = (1 - (x[..., None] - columns).abs()).clamp_min(0)
        along_y = (1 - (y[..., None] - rows).abs()).clamp_min(0)
        surface = torch.einsum("abi,abj,cij->cab", along_y, along_x, features)
        pooled.append(surface.unflatten(2, (bins[1], points)).unflatten(1, (bins[0], points)).mean((2, 4)))
    return torch.stack(pooled)


def test_is_the_mean_of_the_bilinear_surface_over_each_rotated_bin() -> None:
    maps = _maps(1, 3, 11, 14)
    truth = _by_integration(maps[0], _boxes(), (4, 3), 80)  # itself within 1e-4
    errors = {}
    for points in (2, 4, 8):
        pooled = rotated_roi_pool(maps, _boxes(), output_size=(4, 3), points=points)
        assert pooled.shape == (len(BOXES), 3, 4, 3)
        errors[points] = float((pooled - truth).abs().max())
    # Kinks of features of size 1 have slopes of about 2.5, on about three lines of nodes a bin along either axis.
    assert all(error < 20 * KAPPA[points] * 3 for points, error in errors.items())
    assert errors[8] < 0.4 * errors[4] < 0.4 * errors[2] and errors[8] < 0.03


@pytest.mark.parametrize("points", [2, 4, 8])
def test_the_error_of_a_kink_is_within_its_bound(points: int) -> None:
    """One column of ones has kinks of slopes 1, -2, 1 along x; a bin of b nodes errs by at most κ b (1 + 2 + 1)."""
    maps = torch.zeros(1, 1, 9, 9, dtype=torch.float64)
    maps[..., 4] = 1
    left = torch.linspace(0.5, 3.5, 61, dtype=torch.float64)
    upright = torch.stack([left, torch.full_like(left, 3), left + 4, torch.full_like(left, 5)], 1)
    for bins in (1, 2, 3):
        exact = roi_pool(maps, upright, output_size=(1, bins))
        centres = torch.stack([left + 2, torch.full_like(left, 4)], 1)
        sides = left.new_tensor([4.0, 2.0, 0.0]).expand(len(left), 3)
        pooled = rotated_roi_pool(maps, torch.cat([centres, sides], 1), output_size=(1, bins), points=points)
        error = float((pooled - exact).abs().max())
        assert 0 < error <= KAPPA[points] * 4 / bins * 4


def test_without_rotation_it_is_roi_pool() -> None:
    """Within the error of the kinks, which 24 points a side make small."""
    maps = [_maps(2, 3, 16, 20), _maps(2, 3, 8, 10, seed=1)]
    boxes = torch.tensor([[3.0, 4.0, 41.0, 30.0], [-5.0, 10.0, 60.0, 70.0], [8.0, 8.0, 12.0, 9.0]]).double()
    image, level = torch.tensor([1, 0, 1]), torch.tensor([0, 1, 0])
    turned = torch.cat([(boxes[:, :2] + boxes[:, 2:]) / 2, boxes[:, 2:] - boxes[:, :2], boxes.new_zeros(3, 1)], 1)
    options = {"output_size": (3, 5), "scales": (1 / 4, 1 / 8)}
    for choice in ({"level": level}, {}):
        exact = roi_pool(maps, boxes, image, **options, **choice)
        pooled = rotated_roi_pool(maps, turned, image, points=24, **options, **choice)
        torch.testing.assert_close(pooled, exact, rtol=0, atol=0.02)


def test_a_plane_is_pooled_exactly() -> None:
    """A linear surface has no kinks; its mean over a bin is its value at the bin's centre."""
    y, x = torch.meshgrid(torch.arange(20.0).double(), torch.arange(30.0).double(), indexing="ij")
    pooled = rotated_roi_pool((2 * x - 3 * y + 1)[None, None], _boxes([[14.0, 9.0, 8.0, 6.0, 0.6]]), points=1)[0, 0]
    step = (torch.arange(7, dtype=torch.float64) + 0.5) / 7 - 0.5
    u, v = 8 * step, 6 * step[:, None]
    expected = 2 * (14 + math.cos(0.6) * u - math.sin(0.6) * v) - 3 * (9 + math.sin(0.6) * u + math.cos(0.6) * v) + 1
    torch.testing.assert_close(pooled, expected, rtol=0, atol=1e-12)


def test_a_quarter_turn_of_map_and_box_changes_nothing() -> None:
    maps, boxes = _maps(1, 2, 11, 14), _boxes()
    turned = maps.rot90(-1, (2, 3))  # (x, y) goes to (H - 1 - y, x)
    cx, cy, w, h, angle = boxes.unbind(1)
    there = torch.stack([10 - cy, cx, w, h, angle + math.pi / 2], 1)
    torch.testing.assert_close(rotated_roi_pool(turned, there), rotated_roi_pool(maps, boxes), rtol=0, atol=1e-12)


def test_a_half_turn_of_the_box_turns_the_bins() -> None:
    maps, boxes = _maps(1, 2, 11, 14), _boxes()
    half = boxes + boxes.new_tensor([0, 0, 0, 0, math.pi])
    expected = rotated_roi_pool(maps, boxes).flip((2, 3))
    torch.testing.assert_close(rotated_roi_pool(maps, half), expected, rtol=0, atol=1e-12)


def test_gradients_of_both_orders_in_features_and_all_five_numbers() -> None:
    maps = _maps(1, 2, 6, 7).requires_grad_(True)
    boxes = _boxes([[3.13, 2.7, 3.4, 2.3, 0.4], [1.4, 1.6, 4.1, 3.3, -2.1]]).requires_grad_(True)

    def pool(f: Tensor, b: Tensor) -> Tensor:
        return rotated_roi_pool(f, b, output_size=(2, 1), points=2)

    assert gradcheck(pool, (maps, boxes))
    assert gradgradcheck(pool, (maps, boxes), nondet_tol=1e-12)
    (gradient,) = torch.autograd.grad(pool(maps, boxes).square().sum(), boxes)
    assert bool((gradient.abs() > 1e-4).all())  # each of the five counts


def test_no_boxes_no_area_and_nothing_finite() -> None:
    maps = _maps(1, 2, 6, 7).requires_grad_(True)
    none = torch.zeros(0, 5, dtype=torch.float64, requires_grad=True)
    pooled = rotated_roi_pool(maps, none)
    assert pooled.shape == (0, 2, 7, 7)
    pooled.sum().backward()
    assert maps.grad is not None and not maps.grad.any()

    boxes = _boxes([[3.0, 3.0, 0.0, 2.0, 0.3], [3.0, 3.0, 2.0, -1.0, 0.3], [3.0, 3.0, 2.0, 2.0, math.nan],
                    [1e12, 3.0, 2.0, 2.0, 0.3], [3.0, 3.0, 2.0, 2.0, 0.3]]).requires_grad_(True)  # fmt: skip
    pooled = rotated_roi_pool(maps, boxes)
    assert not pooled[[0, 1, 3]].any() and pooled[2].isnan().all() and bool((pooled[4] != 0).all())
    (gradient,) = torch.autograd.grad(pooled[[0, 1, 3, 4]].sum(), boxes)
    assert bool(gradient.isfinite().all()) and not gradient[[0, 1, 3]].any() and bool(gradient[4].any())


def test_results_do_not_depend_on_the_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    maps = Pyramid.of(_maps(1, 3, 11, 14))
    whole = rotated_roi_pool(maps, _boxes())
    monkeypatch.setattr("energyreg.vision.pooling.rotated_pool.BLOCK", 1)  # one box at a time
    torch.testing.assert_close(rotated_roi_pool(maps, _boxes()), whole, rtol=0, atol=1e-14)


def test_half_precision_features_meet_full_precision_coordinates() -> None:
    maps = _maps(1, 2, 11, 14)
    pooled, exact = (
        rotated_roi_pool(maps.bfloat16(), _boxes().float()),
        rotated_roi_pool(maps.bfloat16().double(), _boxes()),
    )
    assert pooled.dtype == torch.bfloat16
    torch.testing.assert_close(pooled.double(), exact, rtol=5e-3, atol=5e-3)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"boxes": torch.zeros(2, 4)}, ValueError, r"boxes has shape \(2, 4\); expected \(R, 5\): centre, sides"),
        ({"boxes": torch.zeros(2, 5, dtype=torch.long)}, TypeError, r"floating-point tensor of shape \(R, 5\)"),
        ({"points": 0}, ValueError, "points is 0; expected a whole number"),
        ({"output_size": (0, 2)}, ValueError, r"output_size is \(0, 2\)"),
        ({"image": torch.tensor([0, 2])}, ValueError, "image has values from 0 to 2"),
    ],
)  # fmt: skip
def test_bad_input_is_named(change: dict[str, object], error: type[Exception], message: str) -> None:
    arguments = {"features": torch.zeros(2, 1, 3, 3), "boxes": torch.ones(2, 5), "image": torch.tensor([0, 1])} | change
    with pytest.raises(error, match=message):
        rotated_roi_pool(arguments.pop("features"), arguments.pop("boxes"), **arguments)
