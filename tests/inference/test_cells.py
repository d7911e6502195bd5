"""Laws of cells: a cdf in closed form, and its inverse."""

import math

import pytest
import torch

from energyreg.inference.cells import Cells


def _randn(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def _cells(num_rows: int = 3, shared: bool = True) -> Cells:
    shape = (20,) if shared else (20, num_rows)
    widths = torch.rand(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64) + 0.1
    widths = widths / widths.sum(0)
    edges = torch.cat([torch.zeros_like(widths[:1]), widths.cumsum(0)])
    edges[-1] = 1
    return Cells(edges, (edges[1:] + edges[:-1]) / 2, 2 * _randn(20, num_rows))


@pytest.mark.parametrize("shared", [True, False])
def test_cells_cdf_is_the_sum_of_the_masses_before(shared: bool) -> None:
    cells = _cells(shared=shared)
    torch.testing.assert_close(cells.masses.sum(0), torch.ones(3, dtype=torch.float64))
    edges = cells.edges[:, None].expand(-1, 3) if shared else cells.edges
    cdf = cells.unit_cdf(edges)
    torch.testing.assert_close(cdf.diff(dim=0), cells.masses, rtol=1e-9, atol=1e-12)
    assert (cdf[0] == 0).all()
    torch.testing.assert_close(cdf[-1], torch.ones(3, dtype=torch.float64))
    torch.testing.assert_close(
        cells.log_widths.exp().sum(0), torch.ones(cells.log_widths.shape[1], dtype=torch.float64)
    )
    torch.testing.assert_close(cells.log_partition, cells.log_masses.exp().sum(0).log())


@pytest.mark.parametrize("shared", [True, False])
def test_cells_icdf_inverts_cdf(shared: bool) -> None:
    cells = _cells(shared=shared)
    u = torch.rand(500, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    torch.testing.assert_close(cells.unit_quantiles(cells.unit_cdf(u)), u, rtol=0, atol=1e-9)
    torch.testing.assert_close(cells.unit_cdf(cells.unit_quantiles(u)), u, rtol=0, atol=1e-12)
    assert (cells.unit_quantiles(u.sort(0).values).diff(dim=0) >= 0).all()


def test_cells_of_no_mass_hold_no_quantile_and_give_no_nan() -> None:
    edges = torch.tensor([0.0, 0.25, 0.5, 0.75, 1.0], dtype=torch.float64)
    log_masses = torch.tensor([-math.inf, 0.0, -math.inf, 0.0], dtype=torch.float64)[:, None]
    cells = Cells(edges, edges[:-1] + 0.125, log_masses)
    u = torch.tensor([0.0, 0.2, 0.25, 0.375, 0.5, 0.6, 0.75, 1.0], dtype=torch.float64)[:, None]
    assert cells.unit_cdf(u).flatten().tolist() == [0, 0, 0, 0.25, 0.5, 0.5, 0.5, 1]
    quantiles = cells.unit_quantiles(torch.linspace(0, 1, 101, dtype=torch.float64)[:, None]).flatten()
    assert quantiles.isfinite().all()
    assert not ((quantiles > 0.5) & (quantiles < 0.75)).any()
    assert not (quantiles < 0.25).any()


def test_equal_cells_are_the_uniform_distribution() -> None:
    edges = torch.linspace(0, 1, 17, dtype=torch.float64)
    cells = Cells(edges, (edges[1:] + edges[:-1]) / 2, torch.full((16, 2), -math.log(16), dtype=torch.float64))
    u = torch.rand(100, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    torch.testing.assert_close(cells.unit_cdf(u), u)
    torch.testing.assert_close(cells.unit_quantiles(u), u)
    torch.testing.assert_close(cells.log_partition, torch.zeros(2, dtype=torch.float64), rtol=0, atol=1e-12)
    torch.testing.assert_close(cells.log_partition_stderr, torch.zeros(2, dtype=torch.float64), rtol=0, atol=1e-12)
