"""What augmentation does to the target is what it does to the picture, measured from the pixels."""

import math
import pickle
import sys
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from energyreg.images import augment
from energyreg.images.augment import (
    ColorJitter,
    Compose,
    Erase,
    Grayscale,
    HorizontalFlip,
    Noise,
    RandomCropCount,
    RandomResizedCrop,
    Rotate,
    rotated_pose,
)

pytest.importorskip("torchvision")

SIDE = 65


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def arrow(degrees: float) -> Tensor:
    """A blurred wedge from the centre, which points in this direction, counter-clockwise from the right as seen."""
    row, column = torch.meshgrid(torch.arange(SIDE) - SIDE // 2, torch.arange(SIDE) - SIDE // 2, indexing="ij")
    along = column * math.cos(math.radians(degrees)) - row * math.sin(math.radians(degrees))
    across = column * math.sin(math.radians(degrees)) + row * math.cos(math.radians(degrees))
    value = torch.exp(-0.5 * ((along - 12) / 5) ** 2 - 0.5 * (across / 2.5) ** 2)
    return value.float().expand(3, SIDE, SIDE).clone()


def direction(image: Tensor) -> float:
    """The direction in which the picture's centre of mass lies from its centre, by first moments, in degrees."""
    mass = image[0].double()
    row, column = torch.meshgrid(torch.arange(SIDE) - SIDE // 2, torch.arange(SIDE) - SIDE // 2, indexing="ij")
    return math.degrees(math.atan2(-(mass * row).sum().item(), (mass * column).sum().item()))


def apart(one: float, other: float) -> float:
    """The difference of two angles in degrees, in [0, 180]."""
    return abs((one - other + 180) % 360 - 180)


@pytest.mark.parametrize("degrees", [0.0, 37.0, 90.0, -120.0])
def test_the_arrow_is_measured_as_it_was_drawn(degrees: float) -> None:
    assert apart(direction(arrow(degrees)), degrees) < 0.5


# -------------------------------------------------------------------------------------------------------- flips


def test_a_flip_mirrors_the_pixels_and_the_arrow() -> None:
    image = torch.arange(3 * 4 * 5, dtype=torch.uint8).reshape(3, 4, 5)
    flipped, _ = HorizontalFlip(p=1)(image, torch.zeros(1))
    assert torch.equal(flipped, image[..., torch.arange(4, -1, -1)]) and not torch.equal(flipped, image)
    # An arrow at 30° to the right of straight up (a steering to the right) points as far to the left.
    right_of_up = 30.0
    mirrored, target = HorizontalFlip.steering(p=1)(arrow(90 - right_of_up), torch.tensor([right_of_up]))
    assert apart(direction(mirrored), 90 - target.item()) < 0.5 and target.item() == -30


def test_a_flip_of_a_pose_negates_yaw_and_roll() -> None:
    _, pose = HorizontalFlip.pose(p=1)(arrow(0), torch.tensor([0.3, 0.2, 0.1]))
    assert pose.tolist() == torch.tensor([-0.3, 0.2, -0.1]).tolist()
    _, other = HorizontalFlip.pose(p=1, yaw=1, roll=2)(arrow(0), torch.tensor([0.2, 0.3, 0.1]))
    assert other.tolist() == torch.tensor([0.2, -0.3, -0.1]).tolist()


def test_a_flip_keeps_the_atoms_of_steering() -> None:
    for value, mirrored in ((0.0, 0.0), (1.0, -1.0), (-1.0, 1.0)):
        _, target = HorizontalFlip.steering(p=1)(arrow(0), torch.tensor([value]))
        assert target.item() == mirrored and math.copysign(1, target.item()) == math.copysign(1, mirrored)


def test_a_flip_takes_a_function_and_leaves_other_targets_alone() -> None:
    target = torch.tensor([30.0, 5.0])
    assert HorizontalFlip(p=1)(arrow(0), target)[1].tolist() == [30, 5]
    assert HorizontalFlip(p=1, negate=lambda y: 180 - y)(arrow(0), target)[1].tolist() == [150, 175]
    image, same = HorizontalFlip.steering(p=0)(arrow(10), target)
    assert torch.equal(image, arrow(10)) and same.tolist() == [30, 5]


# ----------------------------------------------------------------------------------------------------- rotations


@pytest.mark.parametrize("units", ["degrees", "radians"])
@pytest.mark.parametrize("seed", range(6))
def test_the_target_turns_as_the_arrow_does(units: str, seed: int) -> None:
    unit = 1.0 if units == "degrees" else math.pi / 180
    turn = Rotate(170, column=1, units=units)  # type: ignore[arg-type]
    image, target = turn(arrow(20), torch.tensor([7.0, 20 * unit]), seeded(seed))
    assert apart(direction(image), target[1].item() / unit) < 0.5 and target[0] == 7
    assert apart(direction(image), 20) > 1 and -180 <= target[1].item() / unit < 180
    clockwise = Rotate(170, column=1, sign=-1, units=units)  # type: ignore[arg-type]
    image, target = clockwise(arrow(20), torch.tensor([7.0, -20 * unit]), seeded(seed))
    assert apart(direction(image), -target[1].item() / unit) < 0.5


def test_angles_are_uniform_within_the_bounds() -> None:
    generator = seeded()
    step = Rotate(40, column=0, units="degrees")
    image = torch.zeros(3, 4, 4)
    found = np.array([step(image, torch.zeros(1, dtype=torch.float64), generator)[1].item() for _ in range(2000)])
    assert np.abs(found).max() <= 40
    # Kolmogorov-Smirnov against the uniform: 1.95 / sqrt(n) is exceeded with probability .001.
    distance = np.abs(np.sort((found + 40) / 80) - (np.arange(2000) + 0.5) / 2000).max() + 0.5 / 2000
    assert distance < 1.95 / math.sqrt(2000)


def head(pose: Tensor, scale: float = 16.0) -> Tensor:
    """Where three marks of a head are seen, (x, y) in pixels from the centre, y down; yaw, pitch, roll in radians."""
    rotation = pytest.importorskip("scipy.spatial.transform").Rotation
    yaw, pitch, roll = pose.tolist()
    marks = np.array([[1.0, 0.2, 0.3], [-0.7, 0.4, 0.6], [0.1, -1.0, -0.2]])
    # x right, y down, z into the scene; the photograph is taken from afar.
    return torch.from_numpy(scale * rotation.from_euler("XYZ", [-pitch, yaw, roll]).apply(marks)[:, :2])


def photograph(marks: Tensor) -> Tensor:
    """One blurred mark in each colour channel."""
    row, column = torch.meshgrid(torch.arange(SIDE) - SIDE // 2, torch.arange(SIDE) - SIDE // 2, indexing="ij")
    return torch.stack([torch.exp(-((column - x) ** 2 + (row - y) ** 2) / 8) for x, y in marks.tolist()]).float()


def seen(image: Tensor) -> Tensor:
    """Where the marks of a photograph are, by first moments."""
    row, column = torch.meshgrid(torch.arange(SIDE) - SIDE // 2, torch.arange(SIDE) - SIDE // 2, indexing="ij")
    mass = image.double().sum((1, 2))
    return torch.stack([(image * column).sum((1, 2)) / mass, (image * row).sum((1, 2)) / mass], dim=1)


POSES = [(0.0, 0.0, 0.0), (1.0, 0.0, 0.0), (-0.9, 0.5, 0.4), (0.4, -0.8, -2.9), (1.4, 0.2, 0.7)]


@pytest.mark.parametrize("pose", POSES)
@pytest.mark.parametrize("seed", range(3))
def test_the_head_that_the_new_pose_describes_is_the_head_in_the_rotated_picture(
    pose: tuple[float, float, float], seed: int
) -> None:
    before = torch.tensor(pose, dtype=torch.float64)
    image = photograph(head(before))
    torch.testing.assert_close(seen(image), head(before), atol=0.01, rtol=0)
    turned, after = Rotate.pose(60)(image, before, seeded(seed))
    torch.testing.assert_close(seen(turned), head(after), atol=0.1, rtol=0)


@pytest.mark.parametrize("pose", POSES)
def test_the_mirrored_pose_is_that_of_the_mirrored_head(pose: tuple[float, float, float]) -> None:
    rotation = pytest.importorskip("scipy.spatial.transform").Rotation

    def matrix(yaw: float, pitch: float, roll: float) -> np.ndarray:
        return rotation.from_euler("XYZ", [-pitch, yaw, roll]).as_matrix()

    _, after = HorizontalFlip.pose(p=1)(arrow(0), torch.tensor(pose, dtype=torch.float64))
    mirror = np.diag([-1.0, 1.0, 1.0])
    np.testing.assert_allclose(matrix(*after.tolist()), mirror @ matrix(*pose) @ mirror, atol=1e-12)


def test_only_a_face_from_the_front_has_its_roll_alone_changed() -> None:
    turn = math.radians(20)
    frontal = rotated_pose(torch.tensor([0.0, 0.0, 0.1], dtype=torch.float64), turn)
    torch.testing.assert_close(frontal, torch.tensor([0.0, 0.0, 0.1 - turn], dtype=torch.float64))
    side = rotated_pose(torch.tensor([math.radians(60), 0.0, 0.0], dtype=torch.float64), turn)
    wrong = side - torch.tensor([math.radians(60), 0.0, -turn], dtype=torch.float64)
    assert wrong.abs().max() > math.radians(10)


def test_rotations_of_a_pose_add_up_and_come_back() -> None:
    # atan2 returns no yaw beyond 90°, so these poses are within.
    pose = (torch.rand(50, 3, generator=seeded(), dtype=torch.float64) - 0.5) * torch.tensor([3.1, 6.2, 6.2])
    there = rotated_pose(rotated_pose(pose, 0.3), 0.5)
    torch.testing.assert_close(there, rotated_pose(pose, 0.8))
    torch.testing.assert_close(rotated_pose(there, -0.8), pose)


def test_a_rotation_fills_its_corners_and_keeps_the_type() -> None:
    white = torch.full((3, 20, 20), 255, dtype=torch.uint8)
    turned, _ = Rotate(45, fill=7)(white, torch.zeros(1), seeded(1))
    assert turned.dtype == torch.uint8 and turned[:, 0, 0].tolist() == [7, 7, 7] and turned[:, 10, 10].min() == 255


def test_the_order_of_flip_and_rotation_does_not_break_the_target() -> None:
    for steps in (
        [HorizontalFlip(1, lambda y: 180 - y), Rotate(80, column=0, units="degrees")],
        [Rotate(80, column=0, units="degrees"), HorizontalFlip(1, lambda y: 180 - y)],
    ):
        image, target = Compose(steps)(arrow(25), torch.tensor([25.0]), seeded(3))
        assert apart(direction(image), target.item()) < 0.5


# --------------------------------------------------------------------------------------------------------- crops


@pytest.mark.parametrize("seed", range(20))
def test_a_crop_counts_the_dots_that_it_shows(seed: int) -> None:
    mask = torch.rand(23, 31, generator=seeded(seed)) < 0.1
    image = mask.to(torch.uint8).mul(255).expand(3, -1, -1)
    crop, count = RandomCropCount(10)(image, mask.nonzero(), seeded(seed + 100))
    assert crop.shape == (3, 10, 10) and count.shape == (1,) and count.dtype == torch.float32
    assert (crop[0] > 0).sum() == count.item()


def test_every_place_of_a_crop_is_as_likely() -> None:
    generator, numbers = seeded(), torch.zeros(4, 3)
    image = torch.arange(7 * 6, dtype=torch.float32).reshape(1, 7, 6)
    for _ in range(3000):
        crop, _ = RandomCropCount(4)(image, torch.zeros(0, 2), generator)
        first = int(crop[0, 0, 0])
        numbers[first // 6, first % 6] += 1
    # Chi square with 11 degrees of freedom: 31.3 is exceeded with probability .001.
    assert ((numbers - 250) ** 2 / 250).sum() < 31.3


def test_a_crop_that_is_the_picture_has_all_dots() -> None:
    dots = torch.tensor([[0, 0], [7, 7], [3, 7]])
    crop, count = RandomCropCount(8)(torch.zeros(3, 8, 8), dots)
    assert crop.shape == (3, 8, 8) and count.item() == 3


def test_a_resized_crop_shows_a_part_of_the_picture_of_the_right_size() -> None:
    ramp = torch.linspace(0, 1, 100).expand(3, 80, 100).clone()  # brightness says where in the picture
    generator, widths = seeded(), []
    for _ in range(300):
        crop, target = RandomResizedCrop(32, scale=(0.3, 0.6), ratio=(0.8, 1.25))(ramp, torch.tensor([5.0]), generator)
        assert crop.shape == (3, 32, 32) and target.tolist() == [5]
        widths.append((crop[0, 16, -5] - crop[0, 16, 4]).item() / (23 / 32) * 99)
    # Width = sqrt(area × ratio): from sqrt(2400 × .8) = 43.8 to sqrt(4800 × 1.25) = 77.5, to a pixel and the rounding.
    assert 42 < min(widths) < 50 and 70 < max(widths) < 79.5


def test_a_resized_crop_of_a_long_picture_is_its_middle() -> None:
    long = torch.zeros(3, 10, 500)
    long[..., 245:255] = 1
    crop, _ = RandomResizedCrop(10, scale=(1, 1), ratio=(1, 1))(long, torch.zeros(1))
    assert torch.equal(crop, torch.ones(3, 10, 10))


# -------------------------------------------------------------------------------------------------------- colours


def picture() -> Tensor:
    return torch.randint(40, 200, (3, 16, 18), generator=seeded(5), dtype=torch.uint8)


def test_brightness_is_a_factor_in_its_range() -> None:
    image, generator = torch.full((3, 4, 4), 0.25), seeded()
    step = ColorJitter(brightness=0.4)
    factors = np.array([step(image, torch.zeros(1), generator)[0].mean().item() / 0.25 for _ in range(1000)])
    assert factors.min() >= 0.6 - 1e-6 and factors.max() <= 1.4 + 1e-6
    # Standard error of the mean of a uniform on a range of .8: .8 / sqrt(12 × 1000); four of them.
    assert abs(factors.mean() - 1) < 4 * 0.8 / math.sqrt(12_000)


def test_each_change_of_colour_does_its_own() -> None:
    image = picture().float() / 255
    grey = Grayscale(p=1)(image, torch.zeros(1))[0]
    assert torch.equal(grey[0], grey[1]) and torch.equal(grey[0], grey[2]) and grey[0].std() > 0
    less = ColorJitter(saturation=0.9)(image, torch.zeros(1), seeded(2))[0]
    torch.testing.assert_close(Grayscale(p=1)(less, torch.zeros(1))[0], grey, atol=0.02, rtol=0)  # same luminance
    assert abs(less.std(0).mean() - image.std(0).mean()) > 0.01
    hue = ColorJitter(hue=0.5)(image, torch.zeros(1), seeded(2))[0]
    torch.testing.assert_close(hue.amax(0), image.amax(0))  # the value of HSV stays
    assert (hue - image).abs().max() > 0.1
    flat = ColorJitter(contrast=0.9)(image, torch.zeros(1), seeded(4))[0]
    assert abs(flat.std() - image.std()) > 0.01


@pytest.mark.parametrize("kind", ["bytes", "floats"])
def test_noise_has_its_standard_deviation(kind: str) -> None:
    image = torch.full((3, 100, 100), 128, dtype=torch.uint8) if kind == "bytes" else torch.full((3, 100, 100), 0.5)
    noisy = Noise(0.05)(image, torch.zeros(1), seeded())[0]
    assert noisy.dtype == image.dtype
    off = (noisy.double() - image.double()) / (255 if kind == "bytes" else 1)
    # Standard error of a standard deviation from 30,000 values: σ / sqrt(60,000) = .4 % of it; rounding adds less.
    assert abs(off.std() / 0.05 - 1) < 0.02 and abs(off.mean()) < 4 * 0.05 / math.sqrt(30_000)
    extreme = Noise(5.0)(image, torch.zeros(1), seeded())[0]
    assert (extreme.min(), extreme.max()) == ((0, 255) if kind == "bytes" else (0, 1))


def test_a_rectangle_of_the_right_size_is_erased() -> None:
    generator, fractions = seeded(), []
    for _ in range(300):
        image, target = Erase(1, scale=(0.1, 0.3), ratio=(0.5, 2))(torch.ones(3, 40, 50), torch.ones(1), generator)
        gone = (image[0] == 0).nonzero()
        height, width = (gone.max(0).values - gone.min(0).values + 1).tolist()
        assert len(gone) == height * width and (image.sum(0) % 3 == 0).all() and target.item() == 1
        fractions.append(len(gone) / 2000)
    assert 0.09 < min(fractions) < 0.12 and 0.28 < max(fractions) < 0.32


# ------------------------------------------------------------------------------------------------- laws of all steps

STEPS: list[tuple[str, augment.Step]] = [
    ("flip", HorizontalFlip.pose()),
    ("rotate", Rotate.pose(30)),
    ("rotate a column", Rotate(30, column=2)),
    ("resized crop", RandomResizedCrop(12)),
    ("colours", ColorJitter(0.4, 0.4, 0.4, 0.1)),
    ("grey", Grayscale(0.5)),
    ("noise", Noise(0.1)),
    ("erase", Erase()),
    ("compose", Compose([RandomResizedCrop(12), HorizontalFlip.pose(), Rotate.pose(30), ColorJitter(0.4), Noise(0.1)])),
]
all_steps = pytest.mark.parametrize("step", [step for _, step in STEPS], ids=[name for name, _ in STEPS])
COLOUR = {"colours", "grey", "noise", "erase", "resized crop"}


@all_steps
@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
def test_the_input_is_never_written_to_and_types_stay(step: augment.Step, dtype: torch.dtype) -> None:
    image = picture() if dtype == torch.uint8 else picture() / 255
    target = torch.tensor([0.3, -0.2, 0.1])
    before = image.clone(), target.clone()
    for seed in range(8):
        out, new = step(image, target, seeded(seed))
        assert out.dtype == dtype and new.dtype == target.dtype and new.shape == target.shape
        assert out.shape[0] == 3 and torch.isfinite(out.float()).all()
    assert torch.equal(image, before[0]) and torch.equal(target, before[1])


@all_steps
@pytest.mark.parametrize("own", [True, False])
def test_the_seed_decides_of_a_generator_or_without_one_torchs_global_seed(step: augment.Step, own: bool) -> None:
    def run(seed: int) -> list[Tensor]:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0 if own else seed)
            generator = seeded(seed) if own else None
            return [part for _ in range(8) for part in step(picture(), torch.tensor([0.3, -0.2, 0.1]), generator)]

    assert all(torch.equal(one, other) for one, other in zip(run(1), run(1), strict=True))
    assert any(not torch.equal(one, other) for one, other in zip(run(1), run(2), strict=True))


@all_steps
def test_a_given_generator_leaves_the_global_one_alone(step: augment.Step) -> None:
    state = torch.random.get_rng_state()
    step(picture(), torch.zeros(3), seeded())
    assert torch.equal(torch.random.get_rng_state(), state)


@pytest.mark.parametrize("name", sorted(COLOUR))
def test_colour_leaves_the_target_alone(name: str) -> None:
    target = torch.tensor([0.3, -0.2, 0.1])
    for seed in range(8):
        assert torch.equal(dict(STEPS)[name](picture(), target, seeded(seed))[1], target)


@all_steps
def test_steps_travel_to_workers(step: augment.Step) -> None:
    copy = pickle.loads(pickle.dumps(step))
    target = torch.tensor([0.3, -0.2, 0.1])
    for one, other in zip(step(picture(), target, seeded()), copy(picture(), target, seeded()), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("p", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("make", [lambda p: HorizontalFlip(p), lambda p: Grayscale(p), lambda p: Erase(p, (0.2, 0.3))])
def test_a_step_happens_with_its_probability(make: Callable[[float], augment.Step], p: float) -> None:
    generator, step, image = seeded(), make(p), picture()
    happened = np.mean([not torch.equal(step(image, torch.zeros(1), generator)[0], image) for _ in range(600)])
    # Four standard errors of a fraction of 600.
    assert abs(happened - p) <= 4 * math.sqrt(p * (1 - p) / 600)


class _Frames(torch.utils.data.Dataset[Tensor]):
    """The draw that each item gets, by the angle of a rotation."""

    def __len__(self) -> int:
        return 8

    def __getitem__(self, index: int) -> Tensor:
        return Rotate(90, column=0)(torch.zeros(3, 2, 2), torch.zeros(1, dtype=torch.float64))[1]


def test_workers_draw_differently_and_an_epoch_can_be_repeated() -> None:
    def epoch(seed: int) -> list[float]:
        loader = torch.utils.data.DataLoader(_Frames(), num_workers=2, generator=seeded(seed))
        return [y.item() for y in loader]

    first = epoch(0)
    assert len(set(first)) == 8  # batches alternate between the two workers
    assert epoch(0) == first and not set(epoch(1)) & set(first)


# ---------------------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("image", "problem"),
    [
        (torch.zeros(4, 4), r"image has shape \(4, 4\)"),
        (torch.zeros(2, 3, 4, 4), "one picture at a time"),
        (torch.zeros(4, 4, 3), r"image has shape \(4, 4, 3\)"),
        (torch.zeros(3, 0, 4), r"image has shape \(3, 0, 4\)"),
        (torch.zeros(3, 4, 4, dtype=torch.int64), r"image has type torch\.int64"),
    ],
)
@all_steps
def test_a_wrong_image_is_refused(step: augment.Step, image: Tensor, problem: str) -> None:
    with pytest.raises(ValueError, match=problem):
        step(image, torch.zeros(3))
    with pytest.raises(TypeError, match="image is a ndarray"):
        step(np.zeros((3, 4, 4)), torch.zeros(3))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("make", "problem"),
    [
        (lambda: HorizontalFlip(1.5), "p is 1.5; expected a probability"),
        (lambda: Rotate(-1), "max_degrees is -1"),
        (lambda: Rotate(10, units="turns"), "units is 'turns'"),  # type: ignore[arg-type]
        (lambda: Rotate(10, sign=0), "sign is 0"),  # type: ignore[arg-type]
        (lambda: Rotate(10, column=0, angles=(0, 1, 2)), "column and angles are both given"),
        (lambda: RandomCropCount(0), "size is 0"),
        (lambda: RandomResizedCrop(8, scale=(0.5, 1.5)), r"scale is \(0\.5, 1\.5\)"),
        (lambda: RandomResizedCrop(8, ratio=(0.0, 1.0)), r"ratio is \(0\.0, 1\.0\)"),
        (lambda: ColorJitter(brightness=-1), "brightness is -1"),
        (lambda: ColorJitter(hue=0.6), "hue is 0.6"),
        (lambda: Noise(math.nan), "std is nan"),
        (lambda: Erase(0.5, scale=(0.3, 0.1)), r"scale is \(0\.3, 0\.1\)"),
    ],
)
def test_a_wrong_setting_is_refused(make: Callable[[], object], problem: str) -> None:
    with pytest.raises(ValueError, match=problem):
        make()


@pytest.mark.parametrize(
    ("step", "target", "problem"),
    [
        (HorizontalFlip.pose(p=1), torch.zeros(2), r"negate is column 2 of a target of shape \(2,\)"),
        (HorizontalFlip.steering(p=1), torch.zeros(1, 1, 1), r"of shape \(1, 1, 1\)"),
        (Rotate.pose(5), torch.zeros(2), "angles is column 2"),
        (Rotate(5, column=1), torch.zeros(1), "column is column 1"),
        (RandomCropCount(4), torch.zeros(3), r"target has shape \(3,\); expected the dots"),
        (RandomCropCount(99), torch.zeros(0, 2), "size is 99, but the image has 65 by 65 pixels"),
    ],
)
def test_a_wrong_target_is_refused(step: augment.Step, target: Tensor, problem: str) -> None:
    with pytest.raises(ValueError, match=problem):
        step(arrow(0), target)


def test_without_torchvision_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torchvision.transforms.v2", None)
    with pytest.raises(ImportError, match=r"pip install 'energyreg\[vision\]'"):
        HorizontalFlip(1)(arrow(0), torch.zeros(1))
