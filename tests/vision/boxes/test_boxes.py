"""Boxes as targets: the map to relative coordinates, its log-determinant, noise, overlap, and densities."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from energyreg.vision.boxes.corners import check_boxes, paired_iou, variance_voting
from energyreg.vision.boxes.distribution import BoxDistribution, box_noise
from energyreg.vision.boxes.spaces import BoxSpace


def _random_boxes(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    corner = 50 * torch.rand((*shape, 2), generator=generator, dtype=torch.float64)
    return torch.cat([corner, corner + 5 + 40 * torch.rand((*shape, 2), generator=generator, dtype=torch.float64)], -1)


# The space ------------------------------------------------------------------------------------------------------------


def test_there_and_back() -> None:
    space, boxes = BoxSpace(_random_boxes(6)), _random_boxes(3, 6, seed=1)
    torch.testing.assert_close(space.to_user(space.to_model(boxes)), boxes, rtol=0, atol=1e-12)
    assert (space.to_model(space.reference) == 0).all()


def test_coordinates_are_the_papers_up_to_a_constant() -> None:
    reference, boxes = _random_boxes(6), _random_boxes(6, seed=1)

    def papers(b: Tensor) -> Tensor:
        side = reference[:, 2:] - reference[:, :2]
        return torch.cat([(b[:, :2] + b[:, 2:]) / 2 / side, (b[:, 2:] - b[:, :2]).log()], 1)

    torch.testing.assert_close(BoxSpace(reference).to_model(boxes), papers(boxes) - papers(reference))


def test_coordinates_do_not_change_with_the_size_of_the_image() -> None:
    reference, boxes, factor = _random_boxes(6), _random_boxes(6, seed=1), torch.tensor([2.0, 3.0, 2.0, 3.0])
    resized = BoxSpace(reference * factor).to_model(boxes * factor)
    torch.testing.assert_close(resized, BoxSpace(reference).to_model(boxes))


def test_log_determinant_equals_that_of_finite_differences() -> None:
    space, boxes, step = BoxSpace(_random_boxes(1)), _random_boxes(1, seed=1), 1e-4
    columns = []
    for corner in range(4):
        shift = torch.zeros(4, dtype=torch.float64)
        shift[corner] = step
        columns.append((space.to_model(boxes + shift) - space.to_model(boxes - shift))[0] / (2 * step))
    expected = torch.linalg.det(torch.stack(columns, 1)).abs().log()
    torch.testing.assert_close(space.log_abs_det_jacobian(boxes)[0], expected, rtol=0, atol=1e-8)


def test_boxes_without_area_are_not_in_the_space() -> None:
    boxes = torch.tensor([[0.0, 0.0, 1.0, 1.0], [1.0, 0.0, 1.0, 1.0], [0.0, 2.0, 1.0, 1.0], [0.0, torch.nan, 1.0, 1.0]])
    assert BoxSpace(boxes).contains(boxes).tolist() == [True, False, False, False]


# Noise ----------------------------------------------------------------------------------------------------------------


def test_noise_has_its_scales_in_fractions_of_the_box() -> None:
    """σ of a fraction of the side for the centre, of the logarithm for the side: 4 % is 6 s.e. of 20,000 draws' std."""
    reference = torch.tensor([[10.0, 20.0, 30.0, 60.0]], dtype=torch.float64)
    z = box_noise([0.1], [0.02]).sample(torch.zeros_like(reference), 20_000, generator=torch.Generator().manual_seed(0))
    boxes = BoxSpace(reference).to_user(z)[:, 0]
    centre, side = (boxes[:, :2] + boxes[:, 2:]) / 2, boxes[:, 2:] - boxes[:, :2]
    expected = torch.tensor([2.0, 4.0, 0.02, 0.02], dtype=torch.float64)
    torch.testing.assert_close(torch.cat([centre, side.log()], 1).std(0), expected, rtol=0.04, atol=0)


def test_noise_is_the_papers_mixture() -> None:
    noise, z = box_noise(), torch.randn(5, 1, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64) / 5
    scales = torch.tensor([0.075, 0.15, 0.3], dtype=torch.float64)
    total = sum(torch.distributions.Normal(0 * scale, scale).log_prob(z).sum(-1).exp() / 3 for scale in scales)
    torch.testing.assert_close(noise.log_prob(z, torch.zeros(1, 4, dtype=torch.float64)), total.log())
    with pytest.raises(ValueError, match="centre has 3 scales and size 1"):
        box_noise((0.1, 0.2, 0.3), (0.1,))


# Overlap and checks ---------------------------------------------------------------------------------------------------


def test_paired_iou_is_the_diagonal_of_torchvisions() -> None:
    ops = pytest.importorskip("torchvision.ops")
    boxes, others = _random_boxes(50), _random_boxes(50, seed=1)
    torch.testing.assert_close(paired_iou(boxes, others), ops.box_iou(boxes, others).diagonal())
    assert paired_iou(boxes, boxes).tolist() == [1.0] * 50
    empty = torch.tensor([[3.0, 3.0, 3.0, 3.0]])
    assert paired_iou(empty, empty).item() == 0 and paired_iou(empty, boxes[:1]).item() == 0


GOOD = [1.0, 1.0, 5.0, 5.0]


@pytest.mark.parametrize(
    ("boxes", "message"),
    [
        ([GOOD, [1.0, torch.nan, 5.0, 5.0]], r"Box 1 of image a.jpg is \(1, nan, 5, 5\); expected finite"),
        ([GOOD, [5.0, 1.0, 5.0, 5.0]], r"Box 1 of image a.jpg is \(5, 1, 5, 5\); expected corners"),
        ([[5.0, 5.0, 1.0, 6.0]], r"Box 0 of image a.jpg is \(5, 5, 1, 6\).* look like \(x, y, width, height\)"),
        ([GOOD, [1.0, 1.0, 33.0, 5.0]], r"Box 1 of image a.jpg .* outside of the image of width 30 and height 20"),
        ([[-9.0, 1.0, 5.0, 5.0]], "Box 0 of image a.jpg .* outside"),
        ([[1.0, 1.0, 5.0]], r"boxes of image a.jpg has shape \(1, 3\)"),
    ],
)
def test_bad_boxes_are_named(boxes: list[list[float]], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_boxes(torch.tensor(boxes), (20, 30), image="a.jpg")


def test_corners_out_of_order_that_do_not_fit_as_sizes_give_no_hint() -> None:
    with pytest.raises(ValueError, match="expected corners") as error:
        check_boxes(torch.tensor([[25.0, 5.0, 10.0, 6.0]]), (20, 30))
    assert "width, height" not in str(error.value)


def test_good_boxes_pass_and_may_be_rounded_beyond_the_border() -> None:
    check_boxes(torch.tensor([GOOD, [0.0, 0.0, 30.5, 20.0]]), (20, 30))
    check_boxes(torch.zeros(0, 4), (20, 30))
    with pytest.raises(TypeError, match="boxes is a list"):
        check_boxes([GOOD])


# Densities ------------------------------------------------------------------------------------------------------------

CENTRE = torch.tensor([0.05, -0.02, 0.05, 0.0], dtype=torch.float64)
SCALE = torch.tensor([0.03, 0.05, 0.04, 0.06], dtype=torch.float64)


def _gaussian(z: Tensor) -> Tensor:
    """An energy whose normaliser is known: that of a Gaussian, far inside of the window."""
    return -0.5 * ((z - CENTRE) / SCALE).square().sum(-1) + 3.0


def _distribution(samples: int = 20_000, seed: int = 0) -> BoxDistribution:
    reference = torch.tensor([[10.0, 20.0, 30.0, 60.0], [0.0, 0.0, 8.0, 8.0]], dtype=torch.float64)
    noise = box_noise((0.07,), (0.08,))
    generator = torch.Generator().manual_seed(seed)
    return BoxDistribution.around(_gaussian, reference, noise=noise, num_samples=samples, generator=generator)


SIZE = torch.tensor([[20.0, 40.0], [8.0, 8.0]], dtype=torch.float64)


def _corner_variance() -> Tensor:
    """That of a Gaussian centre plus half a log-normal side, in pixels, shape (2, 4)."""
    half = SIZE * (CENTRE[2:] + SCALE[2:] ** 2 / 2).exp() / 2
    return ((SIZE * SCALE[:2]) ** 2 + half**2 * (SCALE[2:] ** 2).expm1()).repeat(1, 2)


def test_log_partition_and_log_prob_equal_the_closed_form() -> None:
    p = _distribution()
    log_z = 3.0 + SCALE.log().sum() + 2 * math.log(2 * math.pi)
    # The effective sample size is some 3,700 of 20,000, so log Z has a standard error of 1.5 %: nearly 5 of them.
    assert (p.effective_sample_size > 3300).all()
    torch.testing.assert_close(p.points.log_partition, log_z.expand(2), rtol=0, atol=0.07)
    boxes = p.space.to_user(torch.tensor([[0.06, 0.0, 0.1, 0.0]], dtype=torch.float64).expand(2, 4))
    normal = torch.distributions.Normal(CENTRE, SCALE).log_prob(p.space.to_model(boxes)).sum(-1)
    expected = normal + p.space.log_abs_det_jacobian(boxes)
    torch.testing.assert_close(p.log_prob(boxes), expected, rtol=0, atol=0.07)


def test_density_per_pixel_integrates_to_one() -> None:
    """By uniform samples of corners in pixels, which know nothing of the relative coordinates."""
    p = _distribution()
    middle = p.space.to_user(CENTRE.expand(2, 4))
    reach = 5 * _corner_variance().sqrt()
    generator, count = torch.Generator().manual_seed(1), 400_000
    offsets = 2 * torch.rand(count, 2, 4, generator=generator, dtype=torch.float64) - 1
    density = p.log_prob(middle + reach * offsets).exp()
    total = density.mean(0) * (2 * reach).prod(1)
    error = density.std(0) / math.sqrt(count) * (2 * reach).prod(1)
    assert (error < 0.02).all()
    assert ((total - 1).abs() < 5 * error + 0.07).all()


def test_moments_and_samples_equal_the_closed_form() -> None:
    p = _distribution()
    size = SIZE
    centre = torch.tensor([[20.0, 40.0], [4.0, 4.0]], dtype=torch.float64)
    half = size * (CENTRE[2:] + SCALE[2:] ** 2 / 2).exp() / 2  # mean of a log-normal
    place = centre + size * CENTRE[:2]
    torch.testing.assert_close(p.mean, torch.cat([place - half, place + half], 1), rtol=0, atol=0.1)
    torch.testing.assert_close(p.stddev, _corner_variance().sqrt(), rtol=0.06, atol=0)
    samples = p.sample(4000, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(samples.std(0), p.stddev, rtol=0.1, atol=0)


def test_iou_probability_is_the_share_of_samples_beyond_the_threshold() -> None:
    p = _distribution()
    boxes = p.space.reference
    z = CENTRE + SCALE * torch.randn(20_000, 2, 4, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    overlap = paired_iou(p.space.to_user(z), boxes)
    expected = torch.stack([(overlap > threshold).double().mean(0) for threshold in (0.0, 0.7, 0.9)], 1)
    # 5 standard errors of a share from 3,000 independent draws.
    torch.testing.assert_close(p.iou_probability(boxes, (0.0, 0.7, 0.9)), expected, rtol=0, atol=0.046)
    torch.testing.assert_close(p.expected_iou(boxes), overlap.mean(0), rtol=0, atol=0.01)
    with pytest.raises(ValueError, match=r"thresholds is \(1.0,\)"):
        p.iou_probability(boxes, (1.0,))


def test_no_density_outside_of_the_window() -> None:
    p = _distribution(100)
    outside = p.space.to_user(torch.tensor([[0.6, 0.0, 0.0, 0.0]], dtype=torch.float64).expand(2, 4))
    assert (p.log_prob(outside) == -math.inf).all()
    assert (p.log_prob(torch.zeros(2, 4, dtype=torch.float64)) == -math.inf).all()
    with pytest.raises(ValueError, match="window is"):
        BoxDistribution.around(_gaussian, p.space.reference, noise=box_noise(), window=(0.5, 0.0))


# Votes ----------------------------------------------------------------------------------------------------------------


def test_votes_are_those_of_the_formula_in_a_loop() -> None:
    boxes, labels, width = _random_boxes(12), torch.tensor([1, 2]).repeat(6), 0.3
    stddevs = 0.5 + torch.rand(12, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    expected = boxes.clone()
    for j in range(12):
        for border in range(4):
            above = below = 0.0
            for i in range(12):
                iou = float(paired_iou(boxes[i], boxes[j]))
                if iou > 0 and labels[i] == labels[j]:
                    weight = math.exp(-((1 - iou) ** 2) / width) / float(stddevs[i, border]) ** 2
                    above, below = above + weight * float(boxes[i, border]), below + weight
            expected[j, border] = above / below
    voted = variance_voting(boxes, stddevs, labels, width)
    torch.testing.assert_close(voted, expected)
    assert (voted - boxes).abs().max() > 1


def test_a_border_that_is_not_known_moves_to_where_a_close_neighbour_sees_it() -> None:
    boxes = torch.tensor([[0.0, 0, 100, 100], [10.0, 0, 100, 100], [60.0, 0, 160, 100]])
    stddevs = torch.tensor([[8.0, 1, 1, 1], [1.0, 1, 1, 1], [1.0, 1, 1, 1]])
    voted = variance_voting(boxes, stddevs, torch.ones(3), 0.02)
    share = math.exp(-0.5)  # IoU = 0.9
    left = (10 * share) / (1 / 64 + share)
    torch.testing.assert_close(voted[0], torch.tensor([left, 0, 100, 100]), rtol=1e-5, atol=1e-4)
    assert abs(float(voted[1, 0]) - 10) < 0.3  # it knows better
    torch.testing.assert_close(voted[2], boxes[2], rtol=0, atol=1e-3)  # IoU = 0.25 and 0.27: hardly heard


def test_who_has_nobody_to_listen_to_stays_to_the_last_bit() -> None:
    """Another class, another place, no area; a deviation that is no number neither moves a box nor is it heard."""
    generator = torch.Generator().manual_seed(0)
    place = torch.tensor([[0.0], [0.0], [40.0], [7.0]])
    boxes = torch.cat([place, place, place + 30, place + 30], 1) + torch.rand(4, 4, generator=generator)
    boxes[3, 2] = boxes[3, 0]
    labels, stddevs = torch.tensor([1, 2, 1, 1]), torch.rand(4, 4, generator=generator)
    assert torch.equal(variance_voting(boxes, stddevs, labels, 10.0), boxes)
    beside = torch.cat([boxes[:1], boxes[:1] + 1])
    unknown = torch.tensor([[1.0], [math.nan]]).expand(2, 4)
    voted = variance_voting(beside, unknown, torch.ones(2), 1.0)
    torch.testing.assert_close(voted, beside[:1].expand(2, 4))  # the unknown one listens, and is not heard
    alone = variance_voting(boxes[:1], torch.full((1, 4), math.nan), labels[:1], 1.0)
    assert torch.equal(alone, boxes[:1])
    assert variance_voting(boxes[:0], stddevs[:0], labels[:0], 1.0).shape == (0, 4)


def test_a_deviation_of_zero_decides_and_divides_nothing_by_zero() -> None:
    boxes = torch.tensor([[0.0, 0, 100, 100], [4.0, 0, 100, 100]])
    stddevs = torch.tensor([[0.0, 1, 1, 1], [1.0, 1, 1, 1]])
    voted = variance_voting(boxes, stddevs, torch.ones(2), 0.02)
    torch.testing.assert_close(voted, boxes[:1].expand(2, 4), rtol=0, atol=1e-4)


def test_borders_do_not_cross() -> None:
    """Of the middle box, the left neighbour knows the right border only, and the right one the left border."""
    boxes = torch.tensor([[-10.0, 0, 4.2, 10], [4.0, 0, 6, 10], [5.8, 0, 20, 10]])
    stddevs = torch.tensor([[9.0, 1, 0.01, 1], [9.0, 1, 9, 1], [0.01, 1, 9, 1]])
    voted = variance_voting(boxes, stddevs, torch.ones(3), 1e6)
    assert torch.equal(voted[1], boxes[1])
