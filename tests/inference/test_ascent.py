"""Laws of refinement: it never falls, finds a maximum, and treats each point by itself."""

import math
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from energyreg.inference.ascent import refine


def _randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def _peaks(y: Tensor) -> Tensor:
    """Two Gaussian peaks of different heights in each dimension, shape (*S, B, D) to (*S, B)."""
    return torch.logaddexp(-2 * (y - 1).square(), -1 - 2 * (y + 1).square()).sum(-1)


def test_finds_the_maximum_of_a_quadratic() -> None:
    centre = _randn(4, 2, seed=1)
    curvature = torch.tensor([1.0, 5.0], dtype=torch.float64)
    y = refine(lambda y: -(curvature * (y - centre).square()).sum(-1), _randn(3, 4, 2), num_steps=200)
    # The slower dimension contracts by 0.8 a step at first, and by no less than 0.9 after a halving: 0.9^200 is 7e-10.
    torch.testing.assert_close(y, centre.expand(3, -1, -1), rtol=0, atol=1e-6)


@pytest.mark.parametrize("step_size", [1e-3, 0.1, 1.0, 100.0])
def test_never_falls_and_rises_with_the_steps(step_size: float) -> None:
    start = 2 * _randn(50, 3, 2)
    values = [_peaks(refine(_peaks, start, num_steps=steps, step_size=step_size)) for steps in (0, 1, 5, 25)]
    for before, after in pairwise(values):
        assert (after >= before).all()
    assert values[-1].mean() > values[0].mean()


def test_a_step_is_the_gradient_times_its_length() -> None:
    start = _randn(6, 2)
    y = refine(_peaks, start, num_steps=1, step_size=torch.tensor([0.01, 0.02], dtype=torch.float64))
    leaf = start.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(_peaks(leaf).sum(), leaf)
    torch.testing.assert_close(y, start + torch.tensor([0.01, 0.02], dtype=torch.float64) * gradient)


def test_a_rejected_step_is_shortened() -> None:
    # From y = 1 on -y² a step of 1.5 lands at -2 and falls; with decay 0.2 the next is 0.3 and lands at 0.4.
    start = torch.ones(1, 1, dtype=torch.float64)
    function = lambda y: -y.square().sum(-1)  # noqa: E731
    assert refine(function, start, num_steps=1, step_size=1.5, decay=0.2).item() == 1.0
    assert refine(function, start, num_steps=2, step_size=1.5, decay=0.2).item() == pytest.approx(0.4)


def test_points_do_not_see_each_other() -> None:
    start = 2 * _randn(7, 3, 2)
    together = refine(_peaks, start, num_steps=15, step_size=0.6)
    alone = torch.stack([refine(_peaks, row[None], num_steps=15, step_size=0.6)[0] for row in start])
    torch.testing.assert_close(together, alone, rtol=0, atol=1e-12)


@pytest.mark.parametrize("step_size", [[0.3, 0.1], torch.tensor([[0.3, 0.1]] * 3), torch.full((4, 3, 2), 0.2)])
def test_steps_may_differ_by_dimension_and_by_point(step_size: list[float] | Tensor) -> None:
    start = _randn(4, 3, 2)
    step = torch.as_tensor(step_size).double().expand_as(start)
    together = refine(_peaks, start, num_steps=4, step_size=step_size)
    alone = [
        refine(_peaks, start[s, b][None], num_steps=4, step_size=step[s, b])[0] for s in range(4) for b in range(3)
    ]
    torch.testing.assert_close(together, torch.stack(alone).reshape(4, 3, 2), rtol=0, atol=1e-6)


def test_angles_are_wrapped_and_nothing_else() -> None:
    def function(y: Tensor) -> Tensor:  # highest at the angle 3.5, beyond the cut, and at the number 5
        return (y[..., 0] - 3.5).cos() - (y[..., 1] - 5).square()

    start = torch.tensor([[3.0, 4.0], [-2.0 + 4 * math.pi, 6.0]], dtype=torch.float64)
    y = refine(function, start, num_steps=200, step_size=0.3, periodic=(True, False))
    # cos is 1 to the last digit of float64 within 1e-8 of its top: no ascent gets closer.
    torch.testing.assert_close(y, torch.tensor([[3.5 - 2 * math.pi, 5.0]] * 2).double(), rtol=0, atol=1e-6)
    free = refine(function, start, num_steps=200, step_size=0.3)
    torch.testing.assert_close(free[0], torch.tensor([3.5, 5.0]).double(), rtol=0, atol=1e-6)
    assert refine(function, start, num_steps=0, periodic=(True, False))[1, 0].item() == pytest.approx(-2.0)


def test_no_steps_no_change() -> None:
    start = _randn(2, 3, 1)
    assert torch.equal(refine(_peaks, start, num_steps=0), start)


def test_steps_into_impossible_regions_are_rejected() -> None:
    def log_of_gamma(y: Tensor) -> Tensor:  # -inf or NaN at y <= 0; its maximum is at 1
        return (y.log() - y).sum(-1)

    y = refine(log_of_gamma, torch.tensor([[3.0], [0.01], [30.0]], dtype=torch.float64), num_steps=2000, step_size=20.0)
    torch.testing.assert_close(y, torch.ones_like(y), rtol=0, atol=1e-3)

    def window(y: Tensor) -> Tensor:
        return torch.where(y > 1, -math.inf, y).sum(-1)

    y = refine(window, torch.zeros(1, 1, dtype=torch.float64), num_steps=60, step_size=0.3)
    assert 0.99 < y.item() <= 1


def test_a_start_that_is_not_a_number_stays_and_harms_no_other() -> None:
    y = refine(_peaks, torch.tensor([[math.nan], [0.8]], dtype=torch.float64), num_steps=50)
    assert y[0].isnan()
    assert y[1].item() == pytest.approx(1, abs=1e-2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_keeps_dtype_and_start_and_carries_no_gradient(dtype: torch.dtype) -> None:
    start = torch.zeros(2, 1, dtype=dtype, requires_grad=True)
    with torch.no_grad():  # as in prediction
        y = refine(_peaks, start, num_steps=3)
    assert y.dtype == dtype
    assert not y.requires_grad
    assert start.grad is None
    assert (start == 0).all()
    assert (y != 0).all()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_steps": -1}, "num_steps is -1"),
        ({"step_size": 0.0}, "step_size is 0.0"),
        ({"step_size": torch.tensor([0.1, -0.1])}, "step_size is"),
        ({"step_size": math.nan}, "step_size is nan"),
        ({"step_size": torch.ones(3)}, "step_size has length 3; expected one number, or 2"),
        ({"step_size": [0.1]}, "step_size has length 1; expected one number, or 2"),
        ({"step_size": torch.ones(4, 2)}, r"step_size has shape \(4, 2\)"),
        ({"periodic": [True]}, "periodic has 1 entries, but y has 2 dimensions"),
        ({"decay": 0.0}, "decay is 0.0"),
        ({"decay": 1.0}, "decay is 1.0"),
    ],
)
def test_wrong_arguments_are_refused(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        refine(_peaks, torch.zeros(1, 2), **arguments)
