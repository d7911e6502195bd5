"""Laws of regions: their intervals hold what the region contains, up to the ends of the space and beyond all cells."""

import math

import pytest
import torch

from energyreg.inference.regions import intervals
from tests.inference.test_row_blocks import HIGH, LOW, clipped


@pytest.mark.parametrize("level", [0.2, 0.5, 0.9])
@pytest.mark.parametrize("kind", ["marginal", "proposal"])
def test_intervals_hold_the_ends_that_the_region_contains(kind: str, level: float) -> None:
    model, x = clipped(kind)
    region = model(x).highest_density_region(level)
    ends = torch.tensor([LOW, HIGH], dtype=torch.float64)[:, None, None].expand(-1, len(x), 1)
    inside = region.contains(ends).T
    found = [[bool(((a <= y) & (y <= b)).any()) for y in (LOW, HIGH)] for a, b in (p.T for p in region.intervals)]
    assert inside.tolist() == found
    assert inside.any()
    # What the intervals hold has the region's probability.
    for row, pieces in enumerate(region.intervals):
        assert bool((pieces >= LOW).all()) and bool((pieces <= HIGH).all())
        mass = model(x[row : row + 1]).cdf(pieces[..., None, None]).diff(dim=1).sum()
        assert float(mass) >= level - 0.005


def test_a_region_that_is_everything_is_the_whole_space() -> None:
    model, x = clipped("marginal")
    (block,) = model(x).blocks()
    density = block.point_density()
    threshold = density.median(0).values
    threshold[2] = -math.inf
    found = intervals(block, density, threshold)
    assert found[2].tolist() == [[LOW, HIGH]]
    assert torch.equal(found[1], intervals(block, density, density.median(0).values)[1])
