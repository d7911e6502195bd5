"""Laws that every target space obeys, and the errors of each."""

import copy
import inspect
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from energyreg.densities import precision, spaces
from energyreg.densities.spaces import Circle, Interval, Positive, Product, Real, TargetSpace

TAU = 2 * math.pi


def _rand(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def _randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# Each case: how to construct the space, and targets (N, D) of it that do not come near an end.
CASES: dict[str, tuple[Callable[[], TargetSpace], Tensor]] = {
    "real": (Real, 5 + 2 * _randn(200, 1)),
    "real-far": (lambda: Real(2), torch.tensor([1e9, -3.0]) + _randn(200, 2)),
    "positive": (lambda: Positive(2), (torch.tensor([0.0, 40.0]) + _randn(200, 2)).exp()),
    "interval": (lambda: Interval(-1.0, 0.1), -1 + 1.1 * (0.05 + 0.9 * _rand(200, 1))),
    "interval-per-dim": (
        lambda: Interval([0.0, -90.0], [1.0, 90.0]),
        torch.tensor([0.0, -90.0]) + torch.tensor([1.0, 180.0]) * (0.05 + 0.9 * _rand(200, 2)),
    ),
    "circle": (Circle, 3 + 0.8 * _randn(200, 1)),
    "circle-degrees": (lambda: Circle(360.0, low=-180.0, dim=2), 170 + 40 * _randn(200, 2)),
    "circle-tenth": (lambda: Circle(0.1, low=0.3), 0.3 + 0.1 * _rand(200, 1)),
    "product": (
        lambda: Product(Real(), Product(Positive(), Interval(0.0, 0.1)), Circle(360.0)),
        torch.cat([_randn(200, 1), _randn(200, 1).exp(), 0.01 + 0.08 * _rand(200, 1), 40 * _randn(200, 1)], dim=1),
    ),
}


@pytest.fixture(params=CASES)
def case(request: pytest.FixtureRequest) -> tuple[TargetSpace, Tensor]:
    construct, y = CASES[request.param]
    return construct(), y


@pytest.fixture(params=["unfitted", "fitted"])
def space_and_y(request: pytest.FixtureRequest, case: tuple[TargetSpace, Tensor]) -> tuple[TargetSpace, Tensor]:
    space, y = case
    if request.param == "fitted":
        space.fit(y)
    return space, y


def _user_difference(space: TargetSpace, y: Tensor, other: Tensor) -> Tensor:
    """y - other, by the shorter way round where the space is periodic."""
    period = TAU * space.scale
    difference = y - other
    return torch.where(torch.tensor(space.periodic), difference - period * (difference / period).round(), difference)


def test_shapes_dtypes_and_attributes(space_and_y: tuple[TargetSpace, Tensor]) -> None:
    space, y = space_and_y
    assert len(space.periodic) == space.dim == y.shape[1]
    for values in (space.loc, space.scale):
        assert values.shape == (space.dim,)
        assert values.dtype == torch.float64
    assert space.fitted.shape == ()
    for dtype in (torch.float64, torch.float32, torch.float16, torch.bfloat16):
        z = space.to_model(y.to(dtype))
        assert z.dtype == space.to_user(z.to(dtype)).dtype == space.log_abs_det_jacobian(y.to(dtype)).dtype
        assert z.dtype == torch.float64
    assert space.contains(y).dtype == torch.bool


def test_round_trip(space_and_y: tuple[TargetSpace, Tensor]) -> None:
    # The log of 1e17 has an absolute error of 7e-15, so its exponential has this relative error; the rest is less.
    space, y = space_and_y
    back = space.to_user(space.to_model(y))
    assert (_user_difference(space, back, y).abs() <= 1e-13 * (1 + y.abs())).all()
    # A unit in the last place of 1e9 is 1.2e-7.
    torch.testing.assert_close(space.to_model(back), space.to_model(y), rtol=1e-12, atol=2e-7)


def test_round_trip_from_model_space(case: tuple[TargetSpace, Tensor]) -> None:
    space, y = case
    space.fit(y)
    z = 2 * _randn(50, space.dim, seed=1)
    z = torch.where(torch.tensor(space.periodic), z.clamp(-3.1, 3.1), z)
    # A circle's last float32 number below low + period stands for the numbers after it.
    torch.testing.assert_close(space.to_model(space.to_user(z)), z, rtol=1e-9, atol=2e-6)


def test_log_det_is_the_log_derivative(space_and_y: tuple[TargetSpace, Tensor]) -> None:
    space, y = space_and_y
    y = y[:20].clone().requires_grad_()
    (derivative,) = torch.autograd.grad(space.to_model(y).sum(), y)
    torch.testing.assert_close(space.log_abs_det_jacobian(y), derivative.log().sum(-1))


def test_gradient_to_user_is_the_inverse_of_the_gradient_to_model(space_and_y: tuple[TargetSpace, Tensor]) -> None:
    space, y = space_and_y
    z = space.to_model(y[:20]).requires_grad_()
    user = space.to_user(z)
    (derivative,) = torch.autograd.grad(user.sum(), z)
    torch.testing.assert_close(derivative.log().sum(-1), -space.log_abs_det_jacobian(user), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("space", "low", "high"),
    [
        (Real(), -9.0, 9.0),
        (Positive(), 1e-9, 99.0),
        (Interval(-1, 0.1), -1.0, 0.1),
        (Circle(5.0, low=1.0), 1.0, 6.0),
    ],
    ids=repr,
)
def test_density_in_user_units_integrates_to_one(space: TargetSpace, low: float, high: float) -> None:
    # A normal density in model space, or (1 + cos z) / 2π on the circle: smooth, so 1e-4 is ample for this grid.
    space.fit(torch.tensor([[0.01], [0.05], [0.09]], dtype=torch.float64))
    y = torch.linspace(low, high, 400_001, dtype=torch.float64)[:, None]
    z = space.to_model(y)[:, 0]
    log_density = (1 + z.cos()).log() if space.periodic[0] else -z.square() / 2 + math.log(TAU) / 2
    density = (log_density + space.log_abs_det_jacobian(y)).exp() / TAU
    assert torch.trapezoid(density, y[:, 0]).item() == pytest.approx(1, abs=1e-4)


def test_fit_standardises(case: tuple[TargetSpace, Tensor]) -> None:
    space, y = case
    assert not space.fitted
    space.fit(y)
    assert space.fitted
    z = space.to_model(y)
    for column, periodic in enumerate(space.periodic):
        if periodic:
            assert z[:, column].sin().mean().item() == pytest.approx(0, abs=1e-7)
            assert z[:, column].cos().mean().item() > 0
        else:
            assert z[:, column].mean().item() == pytest.approx(0, abs=1e-6)
            assert z[:, column].std(correction=0).item() == pytest.approx(1, abs=1e-6)


def test_unfitted_space_does_not_standardise(case: tuple[TargetSpace, Tensor]) -> None:
    space, _ = case
    linear = ~torch.tensor(space.periodic)
    assert (space.loc == 0).all()
    assert (space.scale[linear] == 1).all()


def test_second_fit_replaces_the_first(case: tuple[TargetSpace, Tensor]) -> None:
    space, y = case
    space.fit(y[:50])
    space.fit(y)
    fresh = copy.deepcopy(space)
    fresh.fit(y)
    assert torch.equal(space.loc, fresh.loc)
    assert torch.equal(space.scale, fresh.scale)


@pytest.mark.parametrize("size", [0.1, 1.0, 10.0, 1e3, 1e10, 1e100, 1e300])
def test_every_finite_z_is_inside_even_after_a_cast(space_and_y: tuple[TargetSpace, Tensor], size: float) -> None:
    space, _ = space_and_y
    z = torch.cat([size * _randn(2000, space.dim), torch.zeros(1, space.dim), torch.full((1, space.dim), math.pi)])
    z = torch.cat([z, -z])
    y = space.to_user(z)
    for cast in (y, y.float(), y.float().double()):
        assert space.contains(cast).all()
    space.check(y.float())
    assert not space.to_model(y.float()).isnan().any()
    assert space.log_abs_det_jacobian(y.float()).isfinite().all()


@pytest.mark.parametrize(
    ("space", "low", "high"),
    [
        (Interval(-1.0, 0.1), -1.0, 0.1),
        (Interval(0.1, 0.7), 0.1, 0.7),
        (Circle(), 0.0, math.nextafter(TAU, 0)),
        (Circle(360.0, low=-180.0), -180.0, math.nextafter(180.0, 0)),
        (Circle(0.1, low=0.3), 0.3, math.nextafter(0.4, 0)),
        (Positive(), math.nextafter(0, 1), 3.5e38),
    ],
    ids=repr,
)
def test_ends_hold_for_the_values_of_a_cast_sample(space: TargetSpace, low: float, high: float) -> None:
    # float32(0.1) > 0.1: rounding to nearest must not carry a sample over the end.
    z = torch.linspace(-800, 800, 100_001, dtype=torch.float64)[:, None]
    y = space.to_user(z)
    for values in (y, y.float().double()):
        assert low <= values.min().item()
        assert values.max().item() <= high


def test_points_that_are_not_numbers(space_and_y: tuple[TargetSpace, Tensor]) -> None:
    space, y = space_and_y
    for value in (math.nan, math.inf, -math.inf):
        for column in range(space.dim):
            bad = y[:4].clone()
            bad[1, column] = value
            bad.requires_grad_()
            assert space.contains(bad).tolist() == [True, False, True, True]
            z, log_det = space.to_model(bad), space.log_abs_det_jacobian(bad)
            assert z.isfinite().all()
            assert log_det.isfinite().all()
            (gradient,) = torch.autograd.grad(z.sum() + log_det.sum(), bad)
            assert gradient.isfinite().all()
            with pytest.raises(ValueError, match=rf"NaN or infinite values in 1 of 4 rows.*row 1, column {column}: "):
                space.check(bad)
    assert space.to_user(torch.full((1, space.dim), math.nan)).isnan().all()


@pytest.mark.parametrize(
    ("space", "value", "bounds"),
    [
        (Positive(), 0.0, "y > 0"),
        (Positive(), -1e-300, "y > 0"),
        (Positive(), 1e39, "to 3.4e\\+38"),
        (Real(), -1e39, "3.4e\\+38"),
        (Interval(0, 1), -1e-9, "0 <= y <= 1"),
        (Interval(0, 1), 1.0000001, "0 <= y <= 1"),
        (Interval(-2.5, 7), 8.0, "-2.5 <= y <= 7"),
        (Circle(), 1e39, "3.4e\\+38"),
    ],
    ids=repr,
)
def test_outside_points(space: TargetSpace, value: float, bounds: str) -> None:
    y = torch.tensor([[0.5], [value], [value]], dtype=torch.float64, requires_grad=True)
    assert space.contains(y).tolist() == [True, False, False]
    total = space.to_model(y).sum() + space.log_abs_det_jacobian(y).sum()
    (gradient,) = torch.autograd.grad(total, y)
    assert total.isfinite()
    assert gradient.isfinite().all()
    message = rf"^targets has values outside .* in 2 of 3 rows, the first in row 1, column 0: .*; expected .*{bounds}"
    with pytest.raises(ValueError, match=message):
        space.check(y, name="targets")
    with pytest.raises(ValueError, match=bounds):
        space.fit(y)
    assert not space.fitted


def test_state_dict_restores_the_standardisation(case: tuple[TargetSpace, Tensor]) -> None:
    space, y = case
    fresh = copy.deepcopy(space)
    space.fit(y)
    fresh.load_state_dict(space.state_dict())
    assert fresh.fitted
    assert torch.equal(fresh.to_model(y), space.to_model(y))
    assert {name.rsplit(".")[-1] for name in space.state_dict()} - {"knee"} == {"loc", "scale", "fitted"}


def test_constructor_arguments_rebuild_the_space(case: tuple[TargetSpace, Tensor]) -> None:
    def rebuild(space: nn.Module) -> TargetSpace:
        if isinstance(space, Product):
            return Product(*map(rebuild, space.spaces))
        names = list(inspect.signature(type(space)).parameters)
        arguments: dict[str, Any] = {name: getattr(space, name) for name in names}
        assert all(isinstance(value, float | int | list) for value in arguments.values())
        return getattr(spaces, type(space).__name__)(**arguments)

    space, y = case
    fresh = rebuild(space)
    assert repr(fresh) == repr(space)
    assert repr(eval(repr(space), vars(spaces))) == repr(space)
    space.fit(y)
    fresh.load_state_dict(space.state_dict())
    assert torch.equal(fresh.to_model(y), space.to_model(y))
    assert torch.equal(fresh.to_user(_randn(9, space.dim)), space.to_user(_randn(9, space.dim)))


CASTS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "float": lambda module: module.float(),
    "half": lambda module: module.half(),
    "bfloat16": lambda module: module.bfloat16(),
    "double": lambda module: module.double(),
    "to-dtype": lambda module: module.to(torch.float16),
    "to-device-and-dtype": lambda module: module.to("cpu", torch.bfloat16),
    "type": lambda module: module.type(torch.float32),
    "share-memory": lambda module: module.share_memory(),
    "deepcopy": copy.deepcopy,
}


@pytest.mark.parametrize("cast", CASTS.values(), ids=CASTS)
def test_casts_of_a_model_leave_the_space_exact(
    case: tuple[TargetSpace, Tensor], cast: Callable[[nn.Module], nn.Module]
) -> None:
    space, y = case
    space.fit(y)
    z = space.to_model(y)
    model = nn.ModuleDict({"network": nn.Linear(2, 2), "space": space})
    moved = cast(model)["space"]  # type: ignore[index]
    assert moved.loc.dtype == moved.scale.dtype == torch.float64
    assert moved.fitted.dtype == torch.bool
    assert torch.equal(moved.to_model(y), z)
    if cast is CASTS["half"]:
        assert model["network"].weight.dtype == torch.float16
    if cast is CASTS["share-memory"]:
        assert all(buffer.is_shared() for buffer in moved.buffers())


def test_a_device_without_float64_gets_float32(
    case: tuple[TargetSpace, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    space, y = case
    space.fit(y)
    assert copy.deepcopy(space).to("meta").loc.dtype == torch.float64
    monkeypatch.setattr(precision, "DEVICES_WITHOUT_FLOAT64", {"meta"})
    there = copy.deepcopy(space).to("meta")
    for buffer in there.buffers():
        assert buffer.is_meta
        assert buffer.dtype in (torch.float32, torch.bool)
    z = there.to_model(torch.empty(7, space.dim, device="meta"))
    assert z.dtype == there.to_user(z).dtype == torch.float32
    assert there.log_abs_det_jacobian(z).shape == there.contains(z).shape == (7,)
    assert there.to_empty(device="cpu").loc.dtype == torch.float64


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_space_follows_the_device(case: tuple[TargetSpace, Tensor]) -> None:
    space, y = case
    space.fit(y)
    there = copy.deepcopy(space).to("cuda")
    there.fit(y)
    there.check(y)
    torch.testing.assert_close(there.to_model(y.cuda()).cpu(), space.to_model(y), rtol=1e-9, atol=1e-7)
    torch.testing.assert_close(there.cpu().loc, space.loc)


def test_far_targets_keep_their_precision() -> None:
    y = 1e9 + _randn(1000, 1)
    space = Real()
    space.fit(y)
    assert space.loc.item() == pytest.approx(y.mean().item(), rel=1e-15)
    # One unit in the last place of 1e9 is 1.2e-7.
    torch.testing.assert_close(space.to_model(y), (y - y.mean()) / y.std(correction=0), rtol=0, atol=1e-6)


def test_interval_includes_its_ends() -> None:
    for dtype in (torch.float64, torch.float32):
        space = Interval(0.1, 0.7)
        y = torch.tensor([[0.1], [0.3], [0.7]], dtype=dtype)
        assert space.contains(y).all()
        assert space.contains(y.double()).all()
        space.fit(y)
        assert space.to_model(y).isfinite().all()
        assert space.log_abs_det_jacobian(y).isfinite().all()
    # A millionth of the width is as near as the logit goes.
    assert Interval(0, 1).to_model(torch.zeros(1, 1)).item() == pytest.approx(math.log(1e-6), rel=1e-5)
    assert Interval(0, 1).to_model(torch.ones(1, 1)).item() == pytest.approx(-math.log(1e-6), rel=1e-5)


def test_targets_stored_in_float32_stay_inside() -> None:
    # float32(128.1) > 128.1, by 1e-5 of this width.
    space = Interval(127.0, 128.1)
    assert space.contains(torch.tensor([[127.0], [128.1]])).all()
    assert not space.contains(torch.tensor([[128.1 + 1e-6]], dtype=torch.float64)).any()


def test_interval_too_narrow_for_float32_is_exact_in_float64() -> None:
    space = Interval(1e9 + 1, 1e9 + 2)
    y = torch.tensor([[1e9 + 0.9], [1e9 + 1], [1e9 + 1.5], [1e9 + 2], [1e9 + 2.1]], dtype=torch.float64)
    assert space.contains(y).tolist() == [False, True, True, True, False]
    torch.testing.assert_close(space.to_user(space.to_model(y[2:3])), y[2:3], rtol=0, atol=0)


def test_circle_reports_one_turn_and_wraps_any_other() -> None:
    space = Circle(360.0, low=-180.0)
    y = torch.tensor([[-180.0], [-90.0], [0.0], [179.0]])
    for turns in (-1000, -1, 1, 1000):
        torch.testing.assert_close(space.to_user(space.to_model(y + 360.0 * turns)).float(), y, rtol=0, atol=1e-4)
    assert space.log_abs_det_jacobian(y).tolist() == pytest.approx([math.log(TAU / 360)] * 4)


@settings(deadline=None)
@given(st.floats(-1e12, 1e12), st.floats(1e-6, 1e6), st.floats(-1e3, 1e3))
def test_circle_angles_are_in_the_half_open_turn(y: float, period: float, low: float) -> None:
    space = Circle(period, low) if math.ulp(low) < 1e-7 * period else Circle(period)
    z = space.to_model(torch.tensor([[y]], dtype=torch.float64))
    assert -math.pi <= z.item() < math.pi
    assert space.low <= space.to_user(z).item() < space.low + period


def test_circle_centres_across_the_seam() -> None:
    space = Circle(360.0)
    space.fit(torch.tensor([[350.0], [0.0], [10.0], [721.0 - 361.0]]))
    assert math.cos(space.loc.item() * TAU / 360) == pytest.approx(1)
    assert space.scale.item() == 360 / TAU


def test_positive_takes_the_range_of_float32() -> None:
    y = torch.tensor([[1.2e-38], [1.0], [3.4e38]])
    space = Positive()
    space.fit(y)
    torch.testing.assert_close(space.to_user(space.to_model(y)).float(), y)


def test_positive_is_a_logarithm_up_to_the_largest_training_target_and_linear_beyond() -> None:
    space = Positive()
    assert space.to_model(torch.tensor([[1e30]])).item() == pytest.approx(math.log(1e30))  # unfitted: a logarithm
    y = torch.tensor([[0.01], [1.0], [20.0]], dtype=torch.float64)
    space.fit(y)
    torch.testing.assert_close(space.to_model(y) * space.scale + space.loc, y.log())
    knee = space.to_model(y[-1:])
    far = space.to_user(knee + torch.tensor([[1.0], [2.0], [4.0], [1e6]]) / space.scale)
    torch.testing.assert_close(far, 20.0 * torch.tensor([[2.0], [3.0], [5.0], [1.0 + 1e6]], dtype=torch.float64))
    torch.testing.assert_close(space.to_model(far), knee + torch.tensor([[1.0], [2.0], [4.0], [1e6]]) / space.scale)
    near = torch.tensor([[20 - 1e-9], [20 + 1e-9]], dtype=torch.float64)  # neither a jump nor an edge
    assert space.to_model(near).diff(dim=0).item() == pytest.approx(2e-9 / 20 / space.scale.item(), rel=1e-4)
    assert space.log_abs_det_jacobian(near).diff().abs() < 1e-9
    grown = near.clone().requires_grad_()
    space.to_model(grown).sum().backward()
    torch.testing.assert_close(grown.grad[:, 0].log(), space.log_abs_det_jacobian(near))
    space.fit(y / 100)  # a second fit knows nothing of the first
    assert space.knee.item() == 0.2 and space.loc.item() == pytest.approx((y / 100).log().mean().item())


def test_product_concatenates_its_parts() -> None:
    parts = Positive(2), Circle(4.0)
    product = Product(Product(*parts), Real())
    y = _rand(6, 4)
    assert product.dim == 4
    assert product.periodic == (False, False, True, False)
    assert [type(part) for part in product.spaces] == [Positive, Circle, Real]
    expected = torch.cat([parts[0].to_model(y[:, :2]), parts[1].to_model(y[:, 2:3]), y[:, 3:]], dim=1)
    assert torch.equal(product.to_model(y), expected)
    product.fit(y)
    assert torch.equal(product.loc[:2], parts[0].loc)
    with pytest.raises(ValueError, match=r"column 1: -1; expected y > 0"):
        product.check(torch.tensor([[1.0, -1.0, 0.0, 0.0]]))
    with pytest.raises(ValueError, match=r"same value in every row of column 3: 7"):
        product.fit(torch.cat([y[:, :3], torch.full((6, 1), 7.0)], dim=1))


def test_product_is_fitted_when_all_its_parts_are() -> None:
    part = Real()
    product = Product(part, Real())
    part.fit(_randn(5, 1))
    assert not product.fitted


@settings(deadline=None, max_examples=25)
@given(name=st.sampled_from(sorted(CASES)), sample_shape=st.lists(st.integers(0, 4), max_size=3))
def test_any_leading_shape(name: str, sample_shape: list[int]) -> None:
    construct, y = CASES[name]
    space = construct()
    space.fit(y)
    points = y[torch.arange(math.prod(sample_shape)) % len(y)].reshape(*sample_shape, space.dim)
    z = space.to_model(points)
    assert z.shape == space.to_user(z).shape == points.shape
    assert space.log_abs_det_jacobian(points).shape == space.contains(points).shape == tuple(sample_shape)
    space.check(points)
    flat = points.reshape(-1, space.dim)
    assert torch.equal(space.to_model(flat).reshape(points.shape), z)


@settings(deadline=None)
@given(
    st.floats(-1e6, 1e6),
    st.floats(1e-3, 1e6),
    st.lists(st.floats(allow_nan=False, allow_infinity=False), min_size=1, max_size=9),
)
def test_interval_of_any_ends_returns_inside_points(low: float, width: float, z: list[float]) -> None:
    space = Interval(low, low + width)
    y = space.to_user(torch.tensor(z, dtype=torch.float64)[:, None])
    assert low <= y.min().item()
    assert y.max().item() <= low + width
    assert space.contains(y).all()
    assert space.contains(y.float()).all()


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda y: y[:1], "y has 1 row; expected at least 2"),
        (lambda y: y[:0], "y has no rows; expected at least 2"),
        (
            lambda y: torch.cat([y, y], dim=1),
            r"shape \(200, \d\); expected \(\.\.\., \d\) for .*; pass \d column",
        ),
        (lambda y: y[:, 0], r"y has shape \(200,\); expected"),
        (lambda y: y[0, 0], r"y has shape \(\); expected"),
        (lambda y: y[None], r"y has shape \(1, 200, \d\); expected \(N, \d\)"),
        (lambda y: y[3:4].expand(9, -1), "y has the same value in every row of column 0: .*; expected targets"),
    ],
    ids=["one-row", "no-row", "wrong-columns", "vector", "scalar", "three-dims", "constant"],
)
def test_fit_names_what_is_wrong(name: str, spoil: Callable[[Tensor], Tensor], message: str) -> None:
    construct, y = CASES[name]
    space = construct()
    with pytest.raises(ValueError, match=message):
        space.fit(spoil(y))
    assert not space.fitted


def test_constant_angles_are_constant_whatever_the_turn() -> None:
    turns = TAU * torch.arange(10.0, dtype=torch.float64)[:, None]
    with pytest.raises(ValueError, match=r"same value in every row of column 0: 0\.3"):
        Circle().fit(0.3 + turns)


@pytest.mark.parametrize("y", [np.zeros((3, 1)), [[1.0]], None, torch.zeros(3, 1, dtype=torch.complex64)])
def test_targets_must_be_real_tensors(y: Any) -> None:
    for method in ("fit", "check", "to_model", "to_user", "contains", "log_abs_det_jacobian"):
        with pytest.raises(TypeError, match=r"has (type|dtype) .*; expected a tensor of real numbers"):
            getattr(Real(), method)(y)


def test_integers_are_targets() -> None:
    space = Real()
    space.fit(torch.tensor([[1], [2], [3]]))
    assert space.to_model(torch.tensor([[2]])).item() == 0


@pytest.mark.parametrize(
    ("construct", "message"),
    [
        (lambda: Real(0), "^dim is 0; expected a whole number of at least 1"),
        (lambda: Real(-2), "^dim is -2"),
        (lambda: Real(1.5), "^dim is 1.5"),  # type: ignore[arg-type]
        (lambda: Real(True), "^dim is True"),
        (lambda: Positive("2"), "^dim is '2'"),  # type: ignore[arg-type]
        (lambda: Circle(dim=0), "^dim is 0"),
        (lambda: Interval(0, 1, dim=0), "^dim is 0"),
        (lambda: Interval(1, 1), r"^low has the value 1\.0 and high has 1\.0 in dimension 0; expected low < high"),
        (lambda: Interval([0, 2], [1, 1]), r"^low has the value 2\.0 and high has 1\.0 in dimension 1"),
        (lambda: Interval(math.nan, 1), "^low has the value nan; expected a finite number"),
        (lambda: Interval(0, math.inf), "^high has the value inf"),
        (lambda: Interval(0, "x"), "^high has the value 'x'"),
        (lambda: Interval(0, [1, None]), "^high has the value None"),  # type: ignore[list-item]
        (lambda: Interval([0, 0], 1, dim=3), "^low has 2 values; expected 3, one per dimension"),
        (lambda: Interval([0, 0], [1, 1, 1]), "^low has 2 values; expected 3"),
        (lambda: Interval(0, []), "^high has 0 values; expected 1"),
        (lambda: Circle(0.0), r"^period has the value 0\.0; expected a positive number"),
        (lambda: Circle(-TAU), r"^period has the value -6\.28"),
        (lambda: Circle(math.nan), "^period has the value nan"),
        (lambda: Circle(low=math.inf), "^low has the value inf"),
        (lambda: Circle(1e-9, low=1e9), r"^low has the value 1000000000\.0, to which a period"),
        (lambda: Product(), "^spaces has no entries"),
        (lambda: Product(*[Real()] * 2), "^spaces has the same object twice"),
    ],
)
def test_bad_constructor_arguments(construct: Callable[[], TargetSpace], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        construct()


def test_product_of_something_else() -> None:
    with pytest.raises(TypeError, match=r"spaces has an argument of type list; expected target spaces"):
        Product([Real(), Real()])  # type: ignore[arg-type]


def test_interval_takes_arrays() -> None:
    space = Interval(np.array([0.0, 1.0]), torch.tensor([2.0, 3.0]), dim=2)  # type: ignore[arg-type]
    assert (space.low, space.high, space.dim) == ([0.0, 1.0], [2.0, 3.0], 2)
    assert Interval(np.float64(0), 1, dim=3).dim == 3


def test_the_base_class_is_abstract() -> None:
    with pytest.raises(TypeError, match="abstract"):
        TargetSpace(1, [False])  # type: ignore[abstract]
