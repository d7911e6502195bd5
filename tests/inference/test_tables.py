"""Laws of tables of a head: fourth order, within the tolerance, and none where a table is too coarse."""

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from energyreg.densities.bases import Marginal, ProposalBase
from energyreg.inference.energy import EnergyFunction
from energyreg.inference.tables import Table, tabulate
from energyreg.networks.heads import SeparableHead
from energyreg.networks.proposals import MixtureDensityNetwork

PHASES = torch.tensor([0.0, 1.0, 2.0], dtype=torch.float64)


def waves(frequency: float) -> Callable[[Tensor], Tensor]:
    return lambda v: (2 * math.pi * frequency * v[..., 0] + PHASES).sin()


def _places(rows: int = 3) -> Tensor:
    return 2 * torch.rand(500, rows, generator=torch.Generator().manual_seed(0), dtype=torch.float64) - 1


def test_cubic_polynomials_are_exact_up_to_the_ends() -> None:
    def cubic(v: Tensor) -> Tensor:
        return (v**3 - 2 * v**2 + v - 1) * torch.tensor([1.0, -2.0, 0.5]).double()

    table = Table(cubic(torch.linspace(-1, 1, 9, dtype=torch.float64)[:, None]))
    v = torch.cat([_places(), torch.tensor([[-1.0], [1.0]]).double().expand(-1, 3)])
    torch.testing.assert_close(table(v), cubic(v), rtol=0, atol=1e-13)


def test_the_error_falls_with_the_fourth_power() -> None:
    function, errors = waves(2.0), []
    for count in (64, 128, 256):
        grid = torch.linspace(-1, 1, count + 1, dtype=torch.float64)
        middles = (grid[1:] + grid[:-1]) / 2
        table = Table(function(grid[:, None, None]))
        errors.append(float((table(middles[:, None].expand(-1, 3)) - function(middles[:, None, None])).abs().max()))
    assert math.log2(errors[0] / errors[1]) > 3.8
    assert math.log2(errors[1] / errors[2]) > 3.8


@pytest.mark.parametrize("frequency", [0.1, 1.0, 5.0, 20.0, 60.0])
def test_a_table_is_as_fine_as_its_function_asks_or_there_is_none(frequency: float) -> None:
    function = waves(frequency)
    table = tabulate(function, PHASES, tolerance=1e-5)
    if frequency == 60.0:
        assert table is None
        return
    assert table is not None
    v = _places()
    torch.testing.assert_close(table(v), function(v[..., None]), rtol=0, atol=1e-5)


@pytest.mark.parametrize("base", ["marginal", "proposal", "standardised"])
def test_nodes_of_the_rows_own_have_the_energy_of_the_head(base: str) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        head = SeparableHead(8).double()
        with torch.no_grad():
            for parameter in head.parameters():
                parameter.add_(0.3 * torch.randn_like(parameter))
        context = torch.randn(3, 8).double()
        q = MixtureDensityNetwork(8).double()(context)
    measure = Marginal() if base == "marginal" else ProposalBase(standardised=base == "standardised")
    f = EnergyFunction(head, context, measure.double(), q)
    u = (_places()[..., None] + 1) / 2
    with torch.no_grad():
        found, exact = f.relative_at_own(u), f.relative(u)
    assert not torch.equal(found, exact)
    torch.testing.assert_close(found, exact, rtol=0, atol=1e-4)
    with torch.enable_grad():
        assert torch.equal(f.relative_at_own(u), exact)
