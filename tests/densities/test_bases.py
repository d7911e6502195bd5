"""Laws of the base measures: densities, their cdf, their inverse, their tails."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from energyreg.densities.bases import Lebesgue, Marginal, ProposalBase


def _generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _targets(name: str) -> Tensor:
    n = torch.randn(1000, generator=_generator(), dtype=torch.float64)
    return {
        "normal": n,
        "narrow_peaks": torch.cat([0.02 * n[:500] - 1, 0.02 * n[500:] + 1]),
        "skewed": n.exp(),
        "integers": (2 * n).round() / 2,
        "nearly_constant": torch.cat([torch.zeros(999, dtype=torch.float64), torch.ones(1, dtype=torch.float64)]),
        "outlier": torch.cat([n, torch.tensor([100.0], dtype=torch.float64)]),
        "two_rows": torch.tensor([-1.0, 1.0], dtype=torch.float64),
        "two_equal_but_for_rounding": torch.tensor([0.0, 1e-9], dtype=torch.float64),
    }[name]


def _angles(name: str) -> Tensor:
    n = torch.randn(1000, generator=_generator(), dtype=torch.float64)
    angles = {
        "across_the_cut": 0.3 * n + math.pi,
        "uniform": 100 * n,
        "narrow": 0.01 * n + 1,
        "two_rows": torch.tensor([-3.0, 3.0], dtype=torch.float64),
        "tied": (n * 2).round() * math.pi / 4,
    }[name]
    return torch.remainder(angles + math.pi, 2 * math.pi) - math.pi


LINES = ["normal", "narrow_peaks", "skewed", "integers", "nearly_constant", "outlier", "two_rows"]
CIRCLES = ["across_the_cut", "uniform", "narrow", "two_rows", "tied"]


def _line(name: str, **arguments: float) -> Marginal:
    base = Marginal(**arguments).double()
    base.fit(_targets(name)[:, None])
    return base


def _circle(name: str) -> Marginal:
    base = Marginal(periodic=[True]).double()
    base.fit(_angles(name)[:, None])
    return base


def _any(name: str) -> Marginal:
    kind, data = name.split(":")
    return _line(data) if kind == "line" else _circle(data)


EVERY = [f"line:{name}" for name in LINES] + [f"circle:{name}" for name in CIRCLES]


def _whole_range(base: Marginal, points: int = 100_001) -> Tensor:
    """A grid over the table, on the line with what is beyond: outside less than 1e-10 of mass remains."""
    start, length = base.start.item(), base.step.item() * base.num_knots
    beyond = 0.0 if base.periodic[0] else 0.1 * length
    return torch.linspace(start - beyond, start + length + beyond, points, dtype=torch.float64)[:, None]


# The table has 4096 knots, at least six to a scale of a component: cubic interpolation leaves about (1/6)⁴ / 384,
# 2e-6 of log p, where components are at their narrowest.
TABLE = 2e-5


@pytest.mark.parametrize("name", EVERY)
def test_density_integrates_to_one(name: str) -> None:
    z = _whole_range(base := _any(name))
    assert torch.trapezoid(base.log_prob(z).exp(), z[:, 0]).item() == pytest.approx(1, abs=TABLE)


@pytest.mark.parametrize("name", EVERY)
def test_unit_coordinates_are_the_integral_of_the_density(name: str) -> None:
    z = _whole_range(base := _any(name))
    integral = torch.cumulative_trapezoid(base.log_prob(z).exp(), z[:, 0])
    u = base.to_unit(z)[:, 0]
    torch.testing.assert_close(u[1:] - u[0], integral, rtol=0, atol=TABLE)
    assert (u.diff() >= 0).all()
    assert u[0].item() == pytest.approx(0, abs=1e-9)
    assert u[-1].item() == pytest.approx(1, abs=1e-9)


def test_density_of_one_component_in_closed_form() -> None:
    z = _targets("skewed")
    base = _line("skewed", num_components=1, broad_share=0.1, broad_scale=3.0)
    grid = torch.linspace(-30, 60, 5001, dtype=torch.float64)
    # The logistic distribution of scale s has the standard deviation s π / √3.
    broad = 3 * z.std() * math.sqrt(3) / math.pi
    t = (grid - z.mean()) / broad
    logistic = (-t - 2 * torch.nn.functional.softplus(-t) - broad.log()).exp()
    normal = torch.distributions.Normal(z.quantile(0.5), 1.5 * z.std()).log_prob(grid).exp()
    torch.testing.assert_close(base.log_prob(grid[:, None]), (0.9 * normal + 0.1 * logistic).log(), rtol=0, atol=1e-6)


def test_base_resembles_the_targets() -> None:
    # The kernels widen a standard normal sample a little; the bound on the KL to the truth is a matter of taste, so
    # stated.
    base, z = _line("normal"), torch.linspace(-8, 8, 4001, dtype=torch.float64)
    truth = torch.distributions.Normal(torch.zeros((), dtype=torch.float64), 1).log_prob(z)
    assert 0 <= torch.trapezoid(truth.exp() * (truth - base.log_prob(z[:, None])), z) < 0.03
    unfitted = Marginal().double()
    assert 0 <= torch.trapezoid(truth.exp() * (truth - unfitted.log_prob(z[:, None])), z) < 0.03


def test_product_density_integrates_to_one_in_two_dimensions() -> None:
    base = Marginal(dim=2, periodic=[False, True]).double()
    base.fit(torch.stack([_targets("skewed"), _angles("across_the_cut")], -1))
    # Equal steps in asinh(y) follow the line's tails to ±300 with few points; the trapezium rule converges fast on
    # both.
    t, angle = (
        torch.linspace(-6.5, 6.5, 2001, dtype=torch.float64),
        torch.linspace(-math.pi, math.pi, 201, dtype=torch.float64),
    )
    y = torch.sinh(t)
    grid = torch.stack(torch.meshgrid(y, angle, indexing="ij"), -1)
    density = base.log_prob(grid).exp() * torch.cosh(t)[:, None]
    assert torch.trapezoid(torch.trapezoid(density, angle), t).item() == pytest.approx(1, abs=1e-4)
    # A product: log p(a, b) - log p(a, c) does not depend on a.
    difference = base.log_prob(grid)[:, 10] - base.log_prob(grid)[:, 90]
    torch.testing.assert_close(difference, difference[:1].expand_as(difference))


@pytest.mark.parametrize("name", EVERY)
def test_from_unit_inverts_to_unit(name: str) -> None:
    base = _any(name)
    u = torch.linspace(0, 1, 10_001, dtype=torch.float64)[1:-1, None]
    z = base.from_unit(u)
    assert (z.diff(dim=0) > 0).all()
    torch.testing.assert_close(base.to_unit(z), u, rtol=0, atol=1e-9)
    # An error of 1e-9 in u is one of 1e-9 / p in z.
    again = base.from_unit(base.to_unit(z))
    assert ((again - z).abs()[:, 0] <= 1e-9 / base.log_prob(z).exp() + 1e-9).all()


@pytest.mark.parametrize("name", EVERY)
def test_single_precision_agrees_with_double(name: str) -> None:
    base, single = _any(name), Marginal(periodic=_any(name).periodic)
    single.fit((_targets if name.startswith("line") else _angles)(name.split(":")[1])[:, None])
    u = torch.linspace(0, 1, 2001, dtype=torch.float64)[1:-1, None]
    z = single.from_unit(u.float())
    assert z.dtype == single.log_prob(z).dtype == torch.float32
    # z is rounded by up to 6e-8 of the table's range, here and on the way in and out, and so u by p times that, and
    # its own 3e-7.
    rounding = 3 * 6e-8 * base.step.item() * base.num_knots * base.log_prob(z.double()).exp()
    assert ((single.to_unit(z).double() - u).abs()[:, 0] <= rounding + 3e-7).all()
    # Positions within the table of 4096 cells lose 12 of 24 bits; the log-density changes by less than 20 over a cell.
    torch.testing.assert_close(single.log_prob(z).double(), base.log_prob(z.double()), rtol=0, atol=5e-3)


@pytest.mark.parametrize("name", LINES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_tails_are_straight_and_finite(name: str, dtype: torch.dtype) -> None:
    base = Marginal().to(dtype)
    base.fit(_targets(name)[:, None])
    for sign in (-1, 1):
        z = torch.tensor([[0.5e6], [1e6], [1.5e6]], dtype=dtype) * sign
        z.requires_grad_()
        log_prob = base.log_prob(z)
        (gradient,) = torch.autograd.grad(log_prob.sum(), z)
        broad = (
            2 * _targets(name).std().item() * math.sqrt(3) / math.pi
        )  # the logistic's scale, so its slope is 1 / broad
        # At the end of the table the widest Gaussian, eight scales away, may have a trace of the slope yet.
        torch.testing.assert_close(gradient, torch.full_like(gradient, -sign / broad), rtol=1e-2, atol=0)
        torch.testing.assert_close(log_prob[2] - log_prob[1], log_prob[1] - log_prob[0], rtol=1e-5, atol=0)
        u = base.to_unit(z)
        assert (
            (u - (1 + sign) / 2).abs() <= 1e-9 if dtype == torch.float64 else (u - (1 + sign) / 2).abs() <= 1e-6
        ).all()


def test_points_at_infinity_and_not_a_number() -> None:
    base = _line("normal")
    log_prob = base.log_prob(torch.tensor([[math.inf], [-math.inf], [math.nan]], dtype=torch.float64))
    assert log_prob[:2].tolist() == [-math.inf, -math.inf]
    assert log_prob[2].isnan()


@pytest.mark.parametrize("name", EVERY)
def test_gradients_against_finite_differences(name: str) -> None:
    base = _any(name)
    # Points within the cells of the table: at a knot the third derivative jumps.
    index = torch.tensor([10, 700, 1500, 2047, 2100, 3000, 4000], dtype=torch.float64)
    z = (base.start + (index + 0.37) * base.step)[:, None].requires_grad_()
    step = base.step.item() / 100
    (slope,) = torch.autograd.grad(base.log_prob(z).sum(), z)
    (density,) = torch.autograd.grad(base.to_unit(z).sum(), z)
    with torch.no_grad():
        finite = (base.log_prob(z + step) - base.log_prob(z - step)) / (2 * step)
        finite_u = (base.to_unit(z + step) - base.to_unit(z - step))[:, 0] / (2 * step)
    # Central differences err by step² f''' / 6, and by rounding 1e-15 / step.
    torch.testing.assert_close(slope[:, 0], finite, rtol=1e-4, atol=1e-6 / base.step.item())
    torch.testing.assert_close(density[:, 0], finite_u, rtol=1e-4, atol=1e-8 / base.step.item())
    assert z.grad is None


@pytest.mark.parametrize("name", CIRCLES)
def test_circle_has_no_seam(name: str) -> None:
    base = _circle(name)
    ends = torch.tensor([[-math.pi], [math.pi]], dtype=torch.float64, requires_grad=True)
    log_prob = base.log_prob(ends)
    (slope,) = torch.autograd.grad(log_prob.sum(), ends)
    torch.testing.assert_close(log_prob[0], log_prob[1], rtol=0, atol=1e-6)
    torch.testing.assert_close(slope[0], slope[1], rtol=0, atol=1e-4)
    assert base.to_unit(ends.detach()).flatten().tolist() == pytest.approx([0, 1], abs=1e-12)


def test_targets_that_hardly_differ_give_finite_tables() -> None:
    for dtype in (torch.float32, torch.float64):
        base = Marginal().to(dtype)
        base.fit(_targets("two_equal_but_for_rounding")[:, None])
        z = base.from_unit(torch.linspace(0, 1, 101, dtype=dtype)[:, None])
        assert base.log_prob(z).isfinite().all()
        assert base.to_unit(z).isfinite().all()


def test_fit_sees_only_the_distribution() -> None:
    z = _targets("skewed")[:, None]
    first, second = Marginal(), Marginal()
    first.fit(z)
    second.fit(z.flip(0))
    assert first.fitted
    assert not Marginal().fitted
    for name, buffer in first.state_dict().items():
        torch.testing.assert_close(buffer, second.state_dict()[name])


SLABS = [(-0.01, 0.01), (1.0, 1.02), (-1.5, -1.5 + 1e-3)]


def _with_slabs() -> Marginal:
    """Half of the targets in the first slab, a tenth in the second, a hundredth in the last, and a normal rest."""
    n = torch.randn(1000, generator=_generator(), dtype=torch.float64)
    u = torch.rand(1000, generator=_generator(1), dtype=torch.float64)
    for rows, (low, high) in zip((slice(0, 500), slice(500, 600), slice(600, 610)), SLABS, strict=True):
        n[rows] = low + u[rows] * (high - low)
    base = Marginal(slabs=SLABS).double()
    base.fit(n[:, None])
    return base


def test_slabs_have_exact_edges_and_the_shares_of_the_targets() -> None:
    base = _with_slabs()
    for (low, high), share in zip(SLABS, (0.5, 0.1, 0.01), strict=True):
        edges = torch.tensor([low, high], dtype=torch.float64)[:, None]
        mass = base.to_unit(edges).diff(dim=0).item()
        # The other targets have a density of .16 or less (a share of .39 of a normal) in the slab too.
        assert share - 1e-9 <= mass <= share + 0.012 + 0.25 * (high - low)
        inside, outside = base.log_prob(edges + torch.tensor([[1e-9], [-1e-9]])), base.log_prob(edges - 1e-9)[:1]
        step = (inside[0].exp() - outside[0].exp()).item()
        assert step == pytest.approx(mass / (high - low), rel=0.05)


def test_a_density_with_slabs_integrates_to_its_unit_coordinates() -> None:
    base = _with_slabs()
    # Points on both sides of each edge, so that no trapezium spans a jump.
    edges = base.slab_ends.flatten()  # rounded to single precision
    z = torch.cat([_whole_range(base)[:, 0], edges - 1e-12, edges + 1e-12])
    for low, high in base.slab_ends.tolist():
        z = torch.cat([z, torch.linspace(low + 1e-12, high - 1e-12, 101, dtype=torch.float64)])
    z = z.sort().values[:, None]
    integral = torch.cumulative_trapezoid(base.log_prob(z).exp(), z[:, 0])
    u = base.to_unit(z)[:, 0]
    torch.testing.assert_close(u[1:] - u[0], integral, rtol=0, atol=TABLE)
    assert integral[-1].item() == pytest.approx(1, abs=TABLE)


def test_unit_coordinates_with_slabs_are_inverted() -> None:
    base = _with_slabs()
    u = torch.linspace(0, 1, 10_001, dtype=torch.float64)[1:-1, None]
    z = base.from_unit(u)
    assert (z.diff(dim=0) > 0).all()
    torch.testing.assert_close(base.to_unit(z), u, rtol=0, atol=1e-9)
    single = _with_slabs().float()
    torch.testing.assert_close(single.to_unit(single.from_unit(u.float())).double(), u, rtol=0, atol=2e-4)


def test_targets_that_are_all_in_slabs_leave_a_share_for_the_rest() -> None:
    base = Marginal(slabs=[(-0.1, 0.1)]).double()
    base.fit(torch.linspace(-0.1, 0.1, 50, dtype=torch.float64)[:, None])
    assert base.slab_shares.item() == pytest.approx(1 - base.broad_share)
    assert base.log_prob(torch.tensor([[3.0]], dtype=torch.float64)).isfinite().all()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"slabs": [(1.0, 1.0)]}, r"slabs has \(1.0, 1.0\); expected finite ends with low < high"),
        ({"slabs": [(0.0, math.inf)]}, "expected finite ends"),
        ({"slabs": [(0.0, 2.0), (1.0, 3.0)]}, "slabs overlap between 1.0 and 2.0"),
        ({"slabs": [(0.0, 1.0)], "dim": 2}, r"slabs are given for 2 dimension\(s\)"),
        ({"slabs": [(0.0, 1.0)], "periodic": [True]}, "expected one dimension that is no angle"),
    ],
)
def test_wrong_slabs_are_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Marginal(**arguments)


def test_lebesgue_is_uniform_on_its_window() -> None:
    base = Lebesgue(dim=2, periodic=[False, True], margin=0.25)
    base.fit(torch.stack([torch.linspace(-1, 3, 50), torch.linspace(0, 1, 50)], -1))
    assert base.low.tolist() == pytest.approx([-2, -math.pi])
    assert base.high.tolist() == pytest.approx([4, math.pi])
    points = torch.tensor([[0.0, 0.0], [3.99, -3.0], [4.01, 0.0], [-1e9, 0.0]])
    inside = -math.log(6 * 2 * math.pi)
    assert base.log_prob(points).tolist() == pytest.approx([inside, inside, -math.inf, -math.inf])
    u = torch.rand(100, 2, generator=_generator())
    torch.testing.assert_close(base.to_unit(base.from_unit(u)), u)
    assert base.to_unit(torch.tensor([[1e9, 0.0]])).tolist() == [[1.0, 0.5]]


def test_proposal_base_has_the_shape_of_its_reference() -> None:
    base = ProposalBase(Marginal(dim=2, periodic=[False, True]))
    assert (base.dim, base.periodic, bool(base.fitted)) == (2, (False, True), False)
    base.fit(torch.randn(20, 2, generator=_generator()))
    assert base.fitted
    assert base.reference.fitted
    assert isinstance(ProposalBase().reference, Marginal)
    with pytest.raises(ValueError, match="standardised is True, but the reference has periodic="):
        ProposalBase(Marginal(dim=2, periodic=[False, True]), standardised=True)


@pytest.mark.parametrize("kind", [Marginal, Lebesgue])
def test_wrong_dimensions_are_refused(kind: type) -> None:
    with pytest.raises(ValueError, match="dim is 0"):
        kind(dim=0)
    with pytest.raises(ValueError, match="periodic has 1 entries, but dim is 2"):
        kind(dim=2, periodic=[True])


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("num_components", 0),
        ("broad_share", 0.0),
        ("broad_share", 1.0),
        ("broad_scale", 0.0),
        ("broad_scale", math.nan),
        ("num_knots", 255),
    ],
)
def test_wrong_numbers_are_refused(name: str, value: float) -> None:
    with pytest.raises(ValueError, match=f"{name} is {value}"):
        Marginal(**{name: value})
    with pytest.raises(ValueError, match="margin is -1"):
        Lebesgue(margin=-1)
