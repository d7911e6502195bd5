"""Where target spaces end, and which values stand for their ends."""

import math

import pytest
import torch

from energyreg.densities import ends
from energyreg.densities.spaces import Circle, Interval, Positive, Product, Real, TargetSpace

SPACES = {
    "real": (Real(), (-math.inf, math.inf)),
    "positive": (Positive(), (0.0, math.inf)),
    "interval": (Interval(-2.0, 0.1), (-2.0, 0.1)),
    "circle": (Circle(360.0, -180.0), (-180.0, 180.0)),
}


def fitted(space: TargetSpace) -> TargetSpace:
    y = torch.rand(50, space.dim, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    space.fit(0.01 + 0.05 * y)
    return space


@pytest.mark.parametrize("name", SPACES)
def test_bounds_are_those_of_the_space(name: str) -> None:
    space, (low, high) = SPACES[name]
    assert ends.bounds(space).tolist() == [[low], [high]]
    both = Product(Real(), fitted(SPACES[name][0]))
    assert ends.bounds(both)[:, 1].tolist() == [low, high]
    torch.testing.assert_close(ends.window(both)[:, 1:], ends.window(fitted(space)))


@pytest.mark.parametrize("name", SPACES)
def test_only_values_within_the_resolution_of_an_interval_become_its_end(name: str) -> None:
    space = SPACES[name][0]
    y = torch.tensor([[-2.0 + 1e-6], [-2.0 + 1e-4], [math.nan], [0.1 - 1e-4], [0.1 - 1e-6], [-math.inf], [math.inf]])
    y = y.double()
    found = ends.snap(space, y)
    if name != "interval":
        assert found.nan_to_num(7.0).tolist() == y.nan_to_num(7.0).tolist()
        return
    assert found[[0, 4]].tolist() == [[-2.0], [0.1]]
    assert torch.equal(found[[1, 3]], y[[1, 3]]) and bool(found[2].isnan())


@pytest.mark.parametrize("name", SPACES)
def test_the_window_reaches_the_ends_and_not_beyond(name: str) -> None:
    space = fitted(SPACES[name][0])
    window = ends.window(space)
    first, last = space.to_user(window)[:, 0].tolist()
    if name == "circle":
        assert window.flatten().tolist() == [-math.pi, math.pi]
    elif name == "interval":
        assert first == pytest.approx(-2.0, abs=1e-5) and last == pytest.approx(0.1, abs=1e-5)
        inner = space.to_model(torch.tensor([[-2.0], [0.1]]))
        torch.testing.assert_close(window - inner, torch.tensor([[-1.0], [1.0]]) / space.scale)
    else:
        assert space.to_user(window + torch.tensor([[-1.0], [1.0]]))[:, 0].tolist() == [first, last]


def test_spacing_is_that_of_the_numbers_where_the_targets_are() -> None:
    space = Product(Interval(1e6, 1e6 + 1), Circle(1.0, 2.0**20), Real())
    space.fit(torch.tensor([[1e6 + 0.1, 0.0, 1e9], [1e6 + 0.9, 0.3, 1e9 + 2]], dtype=torch.float64))
    assert ends.spacing(space, torch.float32) == pytest.approx([0.12, 0.125, 119], rel=0.05)
    assert ends.unit(space) == pytest.approx([1, 1, 1], rel=1e-5)
