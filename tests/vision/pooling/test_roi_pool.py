"""Precise RoI Pooling: an exact integral, with exact derivatives, whatever the boxes and however they are batched."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck

from energyreg.vision.pooling.roi_pool import Pyramid, assign_levels, roi_pool

BOXES = [
    [1.3, 2.1, 9.7, 8.4],
    [-2.5, -1.2, 5.3, 4.4],  # beyond the map's first corner
    [6.1, 5.2, 17.9, 13.6],  # beyond its last
    [3.2, 3.3, 3.9, 3.7],  # inside of one cell
    [0.0, 0.0, 13.0, 10.0],  # edges on nodes
    [-0.6, 2.2, -0.1, 8.0],  # outside, but on the slope of the first column
]
# Edges of bins off the rows and columns of nodes, where second derivatives exist.
SMOOTH = [[1.3, 2.1, 9.7, 8.4], [-2.5, -1.2, 5.3, 4.4], [6.13, 5.2, 17.71, 9.62]]


def _maps(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def _boxes(rows: list[list[float]] = BOXES) -> Tensor:
    return torch.tensor(rows, dtype=torch.float64)


def _by_integration(features: Tensor, boxes: Tensor, bins: tuple[int, int], points: int) -> Tensor:
    """The midpoint rule on the bilinear surface, (C, H, W) and (R, 4) to (R, C, P, Q)."""
    _, height, width = features.shape
    rows, columns = (torch.arange(size, dtype=features.dtype) for size in (height, width))
    pooled = []
    for x1, y1, x2, y2 in boxes.tolist():
        x = x1 + (x2 - x1) * (torch.arange(points * bins[1], dtype=features.dtype) + 0.5) / (points * bins[1])
        y = y1 + (y2 - y1) * (torch.arange(points * bins[0], dtype=features.dtype) + 0.5) / (points * bins[0])
        along_x = (1 - (x[:, None] - columns).abs()).clamp_min(0)
        along_y = (1 - (y[:, None] - rows).abs()).clamp_min(0)
        surface = along_y @ features @ along_x.T
        pooled.append(surface.unflatten(2, (bins[1], points)).unflatten(1, (bins[0], points)).mean((2, 4)))
    return torch.stack(pooled)


def test_is_the_mean_of_the_bilinear_surface_over_each_bin() -> None:
    maps = _maps(1, 3, 11, 14)
    pooled = roi_pool(maps, _boxes(), output_size=(4, 3))
    assert pooled.shape == (len(BOXES), 3, 4, 3)
    # The midpoint rule errs by (1/24) (bin / points)² f'' inside of cells and by as much at kinks: 2e-5 of the values.
    torch.testing.assert_close(pooled, _by_integration(maps[0], _boxes(), (4, 3), 400), rtol=0, atol=5e-5)


def test_a_plane_is_pooled_exactly() -> None:
    """Away from the border the mean of a linear function over a bin is its value at the bin's centre."""
    y, x = torch.meshgrid(torch.arange(20.0), torch.arange(30.0), indexing="ij")
    maps = torch.stack([2 * x - 3 * y + 1, torch.ones_like(x)])[None].double()
    (x1, y1, x2, y2), bins = (3.3, 4.1, 25.7, 14.9), 7
    pooled = roi_pool(maps, _boxes([[x1, y1, x2, y2]]))[0]
    step = (torch.arange(bins, dtype=torch.float64) + 0.5) / bins
    expected = 2 * (x1 + (x2 - x1) * step) - 3 * (y1 + (y2 - y1) * step)[:, None] + 1
    torch.testing.assert_close(pooled[0], expected, rtol=0, atol=1e-12)
    torch.testing.assert_close(pooled[1], torch.ones(bins, bins, dtype=torch.float64), rtol=0, atol=1e-12)


def test_gradients_in_features_and_corners() -> None:
    maps, boxes = _maps(1, 2, 10, 12).requires_grad_(True), _boxes(SMOOTH).requires_grad_(True)
    assert gradcheck(lambda f, b: roi_pool(f, b, output_size=(3, 2)), (maps, boxes))


@pytest.mark.parametrize("which", ["both", "features", "boxes"])
def test_second_gradients(which: str) -> None:
    maps = _maps(1, 2, 6, 7).requires_grad_(which != "boxes")
    boxes = (_boxes(SMOOTH[:2]) / 2 + 0.05).requires_grad_(which != "features")
    assert gradgradcheck(lambda f, b: roi_pool(f, b, output_size=(2, 1)), (maps, boxes), nondet_tol=1e-12)


def test_third_derivative_in_a_corner() -> None:
    """The gradients' gradients are bags too, so there is no last order; here against differences of the second."""
    maps, box = _maps(1, 1, 6, 7), torch.tensor([[0.7, 0.6, 4.3, 3.9]], dtype=torch.float64)

    def second(x1: float) -> Tensor:
        corner = torch.tensor(x1, dtype=torch.float64, requires_grad=True)
        boxes = torch.cat([corner[None], box[0, 1:]])[None]
        value = roi_pool(maps, boxes, output_size=2).sin().sum()
        (first,) = torch.autograd.grad(value, corner, create_graph=True)
        (result,) = torch.autograd.grad(first, corner, create_graph=True)
        return torch.stack([result, torch.autograd.grad(result, corner)[0]])

    step = 1e-5
    difference = (second(0.7 + step)[0] - second(0.7 - step)[0]).detach() / (2 * step)
    torch.testing.assert_close(second(0.7)[1].detach(), difference, rtol=1e-6, atol=1e-6)


def test_the_gradient_in_a_corner_is_continuous_across_nodes() -> None:
    maps = _maps(1, 2, 10, 12)

    def gradient(x1: float) -> Tensor:
        boxes = torch.tensor([[x1, 1.2, 9.1, 8.3]], dtype=torch.float64, requires_grad=True)
        (result,) = torch.autograd.grad(roi_pool(maps, boxes, output_size=3).square().sum(), boxes)
        return result

    torch.testing.assert_close(gradient(2 - 1e-9), gradient(2 + 1e-9), rtol=0, atol=1e-6)


def test_gradients_accumulate_when_asked_twice() -> None:
    boxes = _boxes(SMOOTH).requires_grad_(True)
    value = roi_pool(_maps(1, 2, 10, 12), boxes).sum()
    first, second = (torch.autograd.grad(value, boxes, retain_graph=True)[0] for _ in range(2))
    assert torch.equal(first, second)


@pytest.mark.parametrize("box", [[4.0, 4.0, 4.0, 6.0], [4.0, 4.0, 6.0, 4.0], [5.0, 5.0, 3.0, 3.0]])
def test_a_box_without_area_pools_to_zero_without_gradient(box: list[float]) -> None:
    maps, boxes = _maps(1, 2, 9, 9).requires_grad_(True), _boxes([box, BOXES[0]]).requires_grad_(True)
    pooled = roi_pool(maps, boxes)
    assert (pooled[0] == 0).all()
    pooled.sum().backward()
    assert (boxes.grad[0] == 0).all()
    assert (boxes.grad[1] != 0).all() and maps.grad.isfinite().all()


@pytest.mark.parametrize("box", [[20.0, 20.0, 25.0, 25.0], [-9.0, 1.0, -1.0, 5.0], [1.0, 1e8, 5.0, 2e8]])
def test_a_box_outside_of_the_map_pools_to_zero(box: list[float]) -> None:
    assert (roi_pool(_maps(1, 2, 9, 9), _boxes([box])) == 0).all()


def test_a_huge_box_spreads_the_sum_over_its_area() -> None:
    maps, side = _maps(1, 2, 9, 11), 1e6
    pooled = roi_pool(maps, _boxes([[-side, -side, side, side]]), output_size=1)
    torch.testing.assert_close(pooled[0, :, 0, 0] * (2 * side) ** 2, maps[0].sum((1, 2)), rtol=1e-9, atol=1e-9)
    assert (roi_pool(maps.float(), torch.tensor([[-1e30, -1e30, 1e30, 1e30]])) == 0).all()


def test_a_box_that_is_not_finite_is_nan_and_harms_no_other() -> None:
    boxes = _boxes([[torch.nan, 0.0, 1.0, 1.0], BOXES[0], [0.0, 0.0, torch.inf, 1.0]])
    pooled = roi_pool(_maps(1, 2, 9, 9), boxes)
    assert pooled[[0, 2]].isnan().all()
    assert torch.equal(pooled[1:2], roi_pool(_maps(1, 2, 9, 9), boxes[1:2]))


def test_small_boxes_keep_their_digits_far_from_the_origin() -> None:
    maps = _maps(1, 2, 200, 200)
    boxes = torch.tensor([[190.25, 181.5, 190.28125, 181.53125]])  # exact in float32
    exact = roi_pool(maps, boxes.double())
    # One bin is 1/224 wide: the areas, differences of numbers near 1/2, keep 1e-7 · 224 of it along either side.
    torch.testing.assert_close(roi_pool(maps.float(), boxes).double(), exact, rtol=0, atol=2e-4)


def test_float32_equals_float64() -> None:
    maps, boxes = _maps(1, 3, 11, 14), _boxes()
    single = roi_pool(maps.float(), boxes.float())
    assert single.dtype == torch.float32
    torch.testing.assert_close(single.double(), roi_pool(maps, boxes), rtol=0, atol=1e-5)


def test_half_precision_features_meet_full_precision_coordinates() -> None:
    maps, boxes = _maps(1, 3, 11, 14).bfloat16(), _boxes().float()
    pooled = roi_pool(maps, boxes)
    assert pooled.dtype == torch.bfloat16
    torch.testing.assert_close(pooled, roi_pool(maps.float(), boxes).bfloat16(), rtol=0, atol=0)


def test_no_boxes_give_no_rows_and_zero_gradient() -> None:
    maps, boxes = _maps(2, 3, 8, 8).requires_grad_(True), torch.zeros(0, 4, dtype=torch.float64, requires_grad=True)
    pooled = roi_pool(maps, boxes, torch.zeros(0, dtype=torch.long))
    assert pooled.shape == (0, 3, 7, 7) and pooled.dtype == torch.float64
    pooled.sum().backward()
    assert (maps.grad == 0).all() and boxes.grad.shape == (0, 4)


def _random_boxes(count: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    corner = 60 * torch.rand(count, 2, generator=generator) - 5
    return torch.cat([corner, corner + 40 * torch.rand(count, 2, generator=generator) ** 2], 1)


def test_levels_and_images_are_pooled_as_each_alone() -> None:
    maps = [_maps(3, 2, 64 // 2**place, 48 // 2**place, seed=place).float() for place in range(3)]
    scales, boxes = (1.0, 0.5, 0.25), _random_boxes(40, 1)
    image, level = torch.arange(40) % 3, torch.arange(40) // 3 % 3
    pyramid = Pyramid.of(maps, scales)
    pooled = roi_pool(pyramid, boxes, image, level=level, output_size=3)
    assert torch.equal(pooled, roi_pool(maps, boxes, image, scales=scales, level=level, output_size=3))
    for row in range(40):
        alone = maps[level[row]][image[row]][None]
        one = roi_pool(alone, boxes[row : row + 1], scales=scales[level[row]], output_size=3)
        torch.testing.assert_close(pooled[row : row + 1], one, rtol=1e-5, atol=1e-5)


def test_results_do_not_depend_on_the_order_or_the_batch() -> None:
    maps, boxes = _maps(1, 5, 70, 60).float(), _random_boxes(300, 2)
    pooled = roi_pool(maps, boxes)
    order = torch.randperm(300, generator=torch.Generator().manual_seed(3))
    torch.testing.assert_close(roi_pool(maps, boxes[order]), pooled[order], rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(
        torch.cat([roi_pool(maps, part) for part in boxes.split(37)]), pooled, rtol=1e-6, atol=1e-6
    )


def test_a_shift_by_whole_nodes_shifts_the_result() -> None:
    maps = torch.nn.functional.pad(_maps(1, 2, 10, 10), (5, 25, 5, 25))
    shifted = maps.roll((8, 12), (2, 3))
    boxes = _boxes([[6.3, 7.2, 12.9, 11.4], [4.1, 3.9, 16.2, 15.5]])
    moved = boxes + torch.tensor([12.0, 8.0, 12.0, 8.0], dtype=torch.float64)
    torch.testing.assert_close(roi_pool(shifted, moved), roi_pool(maps, boxes), rtol=0, atol=1e-12)


def test_levels_are_those_of_the_paper() -> None:
    side = torch.tensor([1.0, 111.0, 113.0, 223.0, 225.0, 447.0, 449.0, 5000.0])
    boxes = torch.stack([torch.zeros(8), torch.zeros(8), side, side], 1)
    levels = assign_levels(boxes, [1 / 4, 1 / 8, 1 / 16, 1 / 32])
    assert levels.tolist() == [0, 0, 1, 1, 2, 2, 3, 3]
    assert assign_levels(boxes, [1 / 8, 1 / 16]).tolist() == [0, 0, 0, 0, 1, 1, 1, 1]
    assert assign_levels(torch.tensor([[3.0, 3.0, 1.0, 1.0], [torch.nan] * 4]), [1 / 4, 1 / 8]).tolist() == [0, 0]


def test_levels_equal_torchvisions() -> None:
    poolers = pytest.importorskip("torchvision.ops.poolers")
    boxes = _random_boxes(300, 4) * 12
    theirs = poolers.LevelMapper(2, 5)([boxes])
    assert torch.equal(assign_levels(boxes, [1 / 4, 1 / 8, 1 / 16, 1 / 32]), theirs)


def test_roi_align_approaches_it_as_its_samples_grow() -> None:
    ops = pytest.importorskip("torchvision.ops")
    maps, boxes = _maps(1, 3, 30, 30), _boxes([[2.3, 3.1, 20.7, 17.9], [8.1, 9.4, 12.2, 27.0]])
    errors = [
        (ops.roi_align(maps, [boxes], 7, sampling_ratio=samples) - roi_pool(maps, boxes)).abs().max().item()
        for samples in (2, 8, 32)
    ]
    # The midpoint rule on a surface with kinks: the error falls with the square of the samples.
    assert errors[2] < errors[1] / 8 < errors[0] / 32


def test_runs_between_compiled_parts() -> None:
    maps, boxes = _maps(1, 3, 11, 14).float(), _boxes().float()

    def function(b: Tensor) -> Tensor:
        return roi_pool(maps, b * 2).square().sum() * 2

    compiled = torch.compile(function, backend="eager")
    torch.testing.assert_close(compiled(boxes), function(boxes))


def test_export_is_refused_with_the_reason() -> None:
    class Pool(torch.nn.Module):
        def forward(self, maps: Tensor, boxes: Tensor) -> Tensor:
            return roi_pool(maps, boxes)

    with pytest.raises(RuntimeError, match="roi_pool cannot be exported"):
        torch.export.export(Pool(), (_maps(1, 3, 11, 14), _boxes()))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"boxes": torch.zeros(3, 5)}, ValueError, r"boxes has shape \(3, 5\)"),
        ({"boxes": torch.zeros(3, 4, dtype=torch.long)}, TypeError, "boxes has dtype torch.int64"),
        ({"boxes": [[0.0, 0.0, 1.0, 1.0]]}, TypeError, "boxes has type list"),
        ({"image": None}, ValueError, "image is None, but there are 2 images"),
        ({"image": torch.tensor([0, 2, 1])}, ValueError, "image has values from 0 to 2; expected 0 to 1"),
        ({"image": torch.zeros(2, dtype=torch.long)}, ValueError, r"image has shape \(2,\)"),
        ({"level": torch.tensor([0, 1, 0])}, ValueError, "level has values from 0 to 1; expected 0 to 0"),
        ({"output_size": 0}, ValueError, "output_size is 0"),
        ({"features": torch.zeros(3, 4, 4)}, ValueError, r"maps has shapes \(3, 4, 4\)"),
        ({"features": torch.zeros(2, 3, 4, 4, dtype=torch.long)}, TypeError, "maps has an entry of dtype torch.int64"),
        ({"features": []}, ValueError, "maps is empty"),
        ({"scales": (1.0, 0.5)}, ValueError, "scales has 2 numbers for 1 feature maps"),
        ({"scales": 0.0}, ValueError, r"scales is \[0.0\]"),
        (
            {"features": [torch.zeros(2, 3, 8, 8), torch.zeros(2, 3, 3, 3)], "scales": (1.0, 0.3)},
            ValueError,
            "powers of",
        ),
    ],
)
def test_bad_input_is_named(change: dict[str, object], error: type[Exception], message: str) -> None:
    arguments = {"features": torch.zeros(2, 3, 4, 4), "boxes": torch.zeros(3, 4), "image": torch.tensor([0, 1, 1])}
    arguments |= change
    features, boxes = arguments.pop("features"), arguments.pop("boxes")
    with pytest.raises(error, match=message):
        roi_pool(features, boxes, **arguments)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")
def test_cuda_equals_cpu() -> None:
    maps, boxes = _maps(1, 3, 11, 14), _boxes().requires_grad_(True)
    pooled = roi_pool(maps.cuda(), boxes)
    torch.testing.assert_close(pooled.cpu(), roi_pool(maps, boxes), rtol=0, atol=1e-12)
    (there,) = torch.autograd.grad(pooled.square().sum(), boxes)
    (here,) = torch.autograd.grad(roi_pool(maps, boxes).square().sum(), boxes)
    torch.testing.assert_close(there, here, rtol=0, atol=1e-10)
