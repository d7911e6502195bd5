"""Laws of modes, and of estimates refined on p(y|x): tops of known densities, whose basins share all probability."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import energyreg as er
from energyreg.densities.bases import Lebesgue, Marginal, ProposalBase
from energyreg.densities.spaces import Circle, Interval, Positive, Product, Real, TargetSpace
from energyreg.inference.integrators import ImportanceSampling, StratifiedQuadrature
from energyreg.networks.heads import SeparableHead
from energyreg.networks.proposals import MixtureDensityNetwork

SPACES: dict[str, Callable[[], TargetSpace]] = {
    "real": lambda: Real(),
    "positive": lambda: Positive(),
    "interval": lambda: Interval(-1.0, 3.0),
    "circle": lambda: Circle(360.0, low=-180.0),
    "product": lambda: Product(Real()),
}
ROWS = 3


def mixture(
    space: TargetSpace, weights: list[float], means: list, scales: list, dtype: torch.dtype = torch.float64
) -> er.EnergyRegressionModel:
    """A model whose p(z|x) is a Gaussian mixture with the given parameters in model space, the same for every x."""
    components, dim = len(weights), space.dim
    q = MixtureDensityNetwork(1, dim, components, periodic=space.periodic, min_scale=1e-6)
    table = torch.zeros(components, 1 + 2 * dim, dtype=torch.double)
    table[:, 0] = torch.tensor(weights).log()
    table[:, 1 : 1 + dim] = torch.tensor(means).reshape(components, dim)
    table[:, 1 + dim :] = (torch.tensor(scales, dtype=torch.double).reshape(components, dim) - 1e-6).expm1().log()
    with torch.no_grad():
        q.output.weight.zero_()
        q.output.bias.copy_(table.reshape(-1))
    base = ProposalBase(Marginal(dim, space.periodic))
    return er.EnergyRegressionModel(nn.Identity(), None, proposal=q, base=base, space=space).to(dtype).eval()


def two_peaks(space: TargetSpace, dtype: torch.dtype = torch.float64) -> er.EnergyRegressionModel:
    return mixture(space, [0.35, 0.65], [-1.1, 0.9], [0.3, 0.5], dtype)


def x(dtype: torch.dtype = torch.float64, rows: int = ROWS) -> Tensor:
    return torch.zeros(rows, 1, dtype=dtype)


class Curve(nn.Module):
    """A head that is a given function of v = 2u - 1, whatever the context."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, context: Tensor, v: Tensor) -> Tensor:
        return self.function(v).sum(-1).expand(*v.shape[:-2], len(context))


def curve(function: Callable[[Tensor], Tensor], dtype: torch.dtype = torch.float64) -> er.EnergyRegressionModel:
    """A model on the window [-4, 4], where exp f is a given function of v = z / 4."""
    return er.EnergyRegressionModel(nn.Identity(), Curve(function), base=Lebesgue(), space=Real()).to(dtype).eval()


def learned(space: TargetSpace, rows: int = ROWS, seed: int = 0) -> tuple[er.EnergyRegressionModel, Tensor]:
    """A model with random weights, whose rows differ, and its inputs."""
    torch.manual_seed(seed)
    q = MixtureDensityNetwork(4, space.dim, 3, periodic=space.periodic)
    head = SeparableHead(4, space.dim, space.periodic, 16, 16)
    base = ProposalBase(Marginal(space.dim, space.periodic))
    model = er.EnergyRegressionModel(nn.Identity(), head, proposal=q, base=base, space=space).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape))
    return model, torch.randn(rows, 4)


def grid_of(space: TargetSpace, n: int = 40_001) -> Tensor:
    """User values from end to end, even in model space, (n,)."""
    end = math.pi * (1 - 1e-9) if space.periodic[0] else 8.0
    z = torch.linspace(-end, end, n, dtype=torch.double)[:, None]
    y = space.to_user(z)[:, 0]
    return y


# One dimension: known densities ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("space", SPACES)
def test_modes_are_the_tops_of_a_known_density_and_share_it_at_the_valleys(space: str, dtype: torch.dtype) -> None:
    model = two_peaks(SPACES[space](), dtype)
    modes = model(x(dtype)).modes()
    grid = grid_of(model.space)
    exact = two_peaks(SPACES[space]())(x(rows=1)).log_prob(grid[:, None, None])[:, 0]
    top = (1 + ((exact[1:-1] > exact[:-2]) & (exact[1:-1] >= exact[2:])).nonzero()[:, 0]).tolist()
    assert len(top) == 2
    valley = top[0] + int(exact[top[0] : top[1]].argmin())
    mass = torch.trapezoid(exact[: valley + 1].exp(), grid[: valley + 1])
    if model.space.periodic[0]:  # the other valley is beyond the second top
        beyond = top[1] + int(exact[top[1] :].argmin()), int(exact[: top[0]].argmin())
        cut = beyond[0] if exact[beyond[0]] < exact[beyond[1]] else beyond[1]
        step = slice(min(cut, valley), max(cut, valley) + 1)
        inside = torch.trapezoid(exact[step].exp(), grid[step])
        mass = inside if cut < valley else 1 - inside
    expected = torch.stack([mass, 1 - mass])
    order = expected.argsort(descending=True)
    for row in range(ROWS):
        assert modes.values[row].shape == (2, 1) and modes.values[row].dtype == dtype
        found, known = model.space.to_model(modes.values[row])[:, 0], model.space.to_model(grid[top][order, None])[:, 0]
        # A log-density of size 5 is known to 5e-7 in float32, so that its top is flat over about 1e-3 scales; the grid
        # steps by 4e-4.
        torch.testing.assert_close(found, known, rtol=0, atol=1e-3)
        # The cdf is quadratic within cells: its own law allows it 2e-3 at any point.
        torch.testing.assert_close(modes.probabilities[row].double(), expected[order], rtol=0, atol=2e-3)
        torch.testing.assert_close(modes.log_prob[row].double(), exact[top][order], rtol=0, atol=1e-4)


@pytest.mark.parametrize("angle", [0.0, math.pi - 0.01, -math.pi + 0.01, 2.0])
@pytest.mark.parametrize("low", [0.0, -180.0])
def test_a_basin_across_a_cut_is_one(angle: float, low: float) -> None:
    model = mixture(Circle(360.0, low=low), [0.7, 0.3], [angle, angle + 2.5], [0.3, 0.4])
    modes = model(x()).modes()
    assert modes.counts.tolist() == [2] * ROWS
    known = torch.tensor([angle, angle + 2.5], dtype=torch.double)
    arc = (model.space.to_model(modes.values[0])[:, 0] - known + math.pi).remainder(2 * math.pi) - math.pi
    # The other peak's flank moves a top by its slope over the curvature: less than 1e-4 here.
    assert arc.abs().max() < 1e-3
    # Each component has less than 1e-3 beyond its valleys, which are more than 3.3 scales away.
    torch.testing.assert_close(modes.probabilities[0], torch.tensor([0.7, 0.3]).double(), rtol=0, atol=3e-3)


def test_a_flat_density_has_one_mode() -> None:
    for model in (curve(torch.zeros_like), mixture(Circle(), [1.0], [0.0], [5.0])):
        modes = model(x()).modes()
        assert modes.counts.tolist() == [1] * ROWS
        assert torch.cat(modes.probabilities).tolist() == [1.0] * ROWS
    assert curve(torch.zeros_like)(x()).modes().log_prob[0].item() == pytest.approx(-math.log(8.0))


def test_a_plateau_is_one_mode_and_a_terrace_none() -> None:
    def table(v: Tensor) -> Tensor:  # two table mountains, and a terrace halfway up the first
        return torch.where(v.abs() < 0.2, -5.0, torch.where((v > -0.6) & (v < -0.4), -1.0, 0.0)) - 5 * (v.abs() > 0.8)

    # Log-densities of size 10 round in the fifteenth digit, which 0 would take for ripples.
    modes = curve(table)(x()).modes(min_prominence=1e-9)
    assert modes.counts.tolist() == [3] * ROWS  # the terrace is a valley between two plateaus of the same height
    modes = curve(lambda v: table(v) - (v < -0.6) * 2.0)(x()).modes(min_prominence=1e-9)
    assert modes.counts.tolist() == [2] * ROWS


def test_a_mode_may_stand_at_the_border() -> None:
    modes = curve(lambda v: (8 * v).abs())(x()).modes()  # highest at both ends of the window
    assert modes.counts.tolist() == [2] * ROWS
    # Not quite the ends, for the sake of rounding: 1e-6 of the window, which the grids may leave by a 1024th of a cell.
    torch.testing.assert_close(
        modes.values[0].sort(0).values[:, 0], torch.tensor([-4.0, 4.0]).double(), atol=1e-4, rtol=0
    )
    torch.testing.assert_close(modes.probabilities[0], torch.full((2,), 0.5).double(), atol=1e-3, rtol=0)
    # On an interval a density can grow towards the very end: uniform logits of scale 2.
    wide = mixture(Interval(0.0, 1.0), [1.0], [0.0], [3.0])(x()).modes()
    assert wide.counts.tolist() == [2] * ROWS
    assert ((wide.values[0] < 0.01) | (wide.values[0] > 0.99)).all()


def test_ripples_count_by_their_prominence() -> None:
    ripples = 8

    def function(v: Tensor) -> Tensor:  # valleys are 0.2 nats below the tops
        return 0.1 * (math.pi * ripples * (v + 1)).cos()

    # cos starts and ends on a top: one more than there are waves.
    for prominence, count in ((0.0, ripples + 1), (0.19, ripples + 1), (0.21, 1)):
        modes = curve(function)(x()).modes(min_prominence=prominence)
        assert modes.counts.tolist() == [count] * ROWS, prominence
        torch.testing.assert_close(modes.probabilities[0].sum().item(), 1.0)
    # The end waves are half as wide.
    shares = curve(function)(x()).modes().probabilities[0] * ripples
    expected = torch.tensor([1.0] * (ripples - 1) + [0.5] * 2).double()
    torch.testing.assert_close(shares, expected, rtol=0, atol=0.02)


def test_modes_within_the_tolerance_are_one() -> None:
    for space in (Real(), Circle()):
        p = two_peaks(space)(x())  # 2.0 apart
        assert p.modes(tolerance=1.9).counts.tolist() == [2] * ROWS
        assert p.modes(tolerance=2.1).counts.tolist() == [1] * ROWS
        assert p.modes(tolerance=2.1).probabilities[0].item() == pytest.approx(1.0)
    # Across the cut of a circle, which lies at the lowest point, between the two that are close.
    p = mixture(Circle(), [0.3, 0.3, 0.4], [math.pi - 0.3, -math.pi + 0.3, 0.0], [0.05, 0.05, 1.2])(x())
    assert p.modes().counts.tolist() == [3] * ROWS
    assert p.modes(tolerance=0.7).counts.tolist() == [2] * ROWS
    assert sum(p.modes(tolerance=0.7).probabilities[0].tolist()) == pytest.approx(1.0)


def test_modes_of_little_probability_belong_to_their_neighbours_unless_highest() -> None:
    p = mixture(Real(), [0.9995, 0.0005], [0.0, 3.0], [0.3, 0.3])(x())
    assert p.modes().counts.tolist() == [1] * ROWS
    assert p.modes(min_probability=1e-4).counts.tolist() == [2] * ROWS
    # The basin of the spike holds all that lies beyond it, 0.16.
    spike = mixture(Real(), [0.995, 0.005], [0.0, 1.0], [1.0, 0.005])(x())
    modes = spike.modes(min_probability=0.3)
    assert modes.counts.tolist() == [2] * ROWS
    assert modes.log_prob[0][1] > modes.log_prob[0][0] and modes.probabilities[0][1] < 0.3
    torch.testing.assert_close(modes.values[0][:, 0], torch.tensor([0.0, 1.0]).double(), rtol=0, atol=1e-3)


# More dimensions ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("space", ["real", "product"])
@pytest.mark.parametrize("integrator", [None, StratifiedQuadrature(64**2, jitter=False)], ids=["samples", "grid"])
def test_modes_in_two_dimensions(space: str, dtype: torch.dtype, integrator: StratifiedQuadrature | None) -> None:
    target = Real(2) if space == "real" else Product(Positive(), Circle(360.0))
    means = [[-1.0, 3.0], [1.0, -1.0]] if space == "product" else [[-1.0, 1.0], [1.0, -1.0]]
    model = mixture(target, [0.3, 0.7], means, [[0.2, 0.3], [0.2, 0.3]], dtype)
    modes = model(x(dtype), integrator=integrator).modes()
    # A lognormal with scale 0.2 has its mode at exp(mean - 0.04).
    known = torch.tensor(means).double() - (torch.tensor([0.04, 0.0]) if space == "product" else 0.0)
    for row in range(ROWS):
        assert modes.values[row].shape == (2, 2)
        torch.testing.assert_close(model.space.to_model(modes.values[row]), known.flip(0), rtol=0, atol=2e-3)
        # Five standard errors of a share of 128 starts.
        error = 5 * math.sqrt(0.3 * 0.7 / 128)
        torch.testing.assert_close(
            modes.probabilities[row].double(), torch.tensor([0.7, 0.3]).double(), rtol=0, atol=error
        )


def test_the_share_of_the_starts_that_end_in_a_mode_is_its_probability() -> None:
    weights = torch.tensor([0.5, 0.2, 0.2, 0.1]).double()
    means = [[1.0, 1.0, 1.0], [-1.0, -1.0, 1.0], [1.0, -1.0, -1.0], [-1.0, 1.0, -1.0]]
    modes = mixture(Real(3), weights.tolist(), means, [[0.3] * 3] * 4)(x(rows=1)).modes(num_starts=512, num_steps=30)
    assert modes.counts.tolist() == [4]
    error = 5 * math.sqrt(0.25 / 512)
    torch.testing.assert_close(modes.probabilities[0], weights, rtol=0, atol=error)


def test_starts_that_have_not_arrived_are_one_mode_for_want_of_a_valley() -> None:
    # A ridge fifty times as long as it is wide, on which three steps of gradient ascent leave the starts spread out.
    p = mixture(Real(2), [1.0], [[0.0, 0.0]], [[0.02, 1.0]])(x())
    assert p.modes(num_steps=3).counts.tolist() == [1] * ROWS


@pytest.mark.parametrize("space", ["real", "positive", "circle"])
def test_samples_and_cells_find_the_same_modes(space: str) -> None:
    model = two_peaks(SPACES[space]())
    cells, samples = model(x()).modes(), model(x(), integrator=ImportanceSampling(2048)).modes()
    for row in range(ROWS):
        a, b = model.space.to_model(cells.values[row]), model.space.to_model(samples.values[row])
        torch.testing.assert_close(a, b, rtol=0, atol=1e-3)
        torch.testing.assert_close(cells.probabilities[row], samples.probabilities[row], rtol=0, atol=0.22)


# Laws of all modes ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("space", [*SPACES, "plane", "cylinder"])
def test_modes_share_all_probability_and_hold_the_mode(space: str, seed: int) -> None:
    target = {"plane": lambda: Real(2), "cylinder": lambda: Product(Positive(), Circle())} | SPACES
    model, inputs = learned(target[space](), seed=seed)
    p = model(inputs)
    modes = p.modes(num_starts=32)
    highest = []
    for row in range(ROWS):
        values, log_prob, mass = modes.values[row], modes.log_prob[row], modes.probabilities[row]
        assert len(values) == len(log_prob) == len(mass) >= 1
        assert (mass >= 0).all() and (mass.diff() <= 0).all() and mass.sum().item() == pytest.approx(1, abs=1e-5)
        assert model.space.contains(values).all()
        every = values[:, None].expand(-1, ROWS, -1)
        torch.testing.assert_close(p.log_prob(every)[:, row], log_prob, rtol=1e-4, atol=1e-4)
        highest.append(values[log_prob.argmax()])
    # As high as `mode`, and at the same place: there are no ties here.
    best = p.log_prob(torch.stack(highest)) - p.log_prob(p.mode)
    assert (best > -1e-4).all()
    arc = model.space.to_model(torch.stack(highest)) - model.space.to_model(p.mode)
    assert torch.where(best.abs()[:, None] < 1e-4, arc.abs(), 0.0).max() < 0.02


@pytest.mark.parametrize(("space", "budget"), [("real", 2**21), ("circle", 2**21), ("plane", 2**22)])
def test_chunks_change_nothing_and_the_seed_decides(space: str, budget: int) -> None:
    rows = 70
    target = Real(2) if space == "plane" else SPACES[space]()
    model, inputs = learned(target, rows)
    integrator = ImportanceSampling(512) if space == "plane" else None
    options = {"num_starts": 16, "num_steps": 10}
    whole, parts, other, reseeded = (
        model(inputs, integrator=integrator, memory_budget=memory, seed=seed)
        for memory, seed in ((2**31, 0), (budget, 0), (2**31, 0), (2**31, 1))
    )
    assert parts.block_rows() < rows / 2 and whole.block_rows() >= rows
    a, b, again = whole.modes(**options), parts.modes(**options), other.modes(**options)
    for first, second in zip(a.values, again.values, strict=True):
        assert torch.equal(first, second)
    if space == "plane":  # one dimension is not random
        shares = [torch.cat(modes.probabilities) for modes in (a, reseeded.modes(**options))]
        assert shares[0].shape != shares[1].shape or not torch.equal(*shares)
    # Sums of another length round differently; where two tops are equal to the last digit, their order may change.
    same = [
        len(v) == len(w) and torch.allclose(v, w, atol=5e-3, rtol=5e-3) for v, w in zip(a.values, b.values, strict=True)
    ]
    assert sum(same) >= rows - 2
    start = whole.sample((3,), generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(whole.refine(start, num_steps=3), parts.refine(start, num_steps=3), rtol=1e-3, atol=1e-3)
    mass = torch.stack([m.sum() for m in b.probabilities])
    torch.testing.assert_close(mass, torch.ones(rows), rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"tolerance": -1.0}, "tolerance is -1.0"),
        ({"tolerance": math.nan}, "tolerance is nan"),
        ({"min_prominence": math.inf}, "min_prominence is inf"),
        ({"min_probability": 1.0}, "min_probability is 1.0"),
        ({"num_starts": 0}, "num_starts is 0"),
        ({"num_steps": 1.5}, "num_steps is 1.5"),
    ],
)
def test_wrong_arguments_of_modes_are_refused(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        two_peaks(Real())(x()).modes(**arguments)


# Refined estimates ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("step_size", [None, 1e-3, 0.1, 10.0])
@pytest.mark.parametrize("space", [*SPACES, "plane", "cylinder"])
def test_refining_never_lowers_the_density_and_stays_in_the_space(space: str, step_size: float | None) -> None:
    target = {"plane": lambda: Real(2), "cylinder": lambda: Product(Positive(), Circle())} | SPACES
    model, inputs = learned(target[space]())
    p = model(inputs)
    start = p.sample((20,), generator=torch.Generator().manual_seed(0))
    found = p.refine(start, step_size=step_size, num_steps=5)
    assert found.shape == start.shape and found.dtype == start.dtype
    assert model.space.contains(found).all()
    before, after = p.log_prob(start), p.log_prob(found)
    # Evaluated among other points, a float32 sum of a few tens rounds in its sixth digit.
    assert (after >= before - 1e-5 * before.abs().clamp_min(1)).all()
    assert after.mean() > before.mean()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("space", SPACES)
def test_refined_estimates_arrive_at_the_mode_uphill(space: str, dtype: torch.dtype) -> None:
    model = two_peaks(SPACES[space](), dtype)
    p = model(x(dtype))
    modes = p.modes()
    z = model.space.to_model(modes.values[0])[:, 0]
    # A third of the smallest scale, 0.3, off each top: well inside its basin.
    start = model.space.to_user((z[:, None, None] + torch.tensor([-0.1, 0.1]).reshape(1, 2, 1)).reshape(-1, 1, 1))
    start = start.expand(-1, ROWS, -1).to(dtype)
    found = model.space.to_model(p.refine(start, num_steps=100, step_size=0.1))[..., 0]
    # Twice the flatness of the top in the arithmetic of float32, see above.
    torch.testing.assert_close(found, z.repeat_interleave(2)[:, None].expand_as(found), rtol=0, atol=3e-3)


def test_steps_may_differ_by_dimension() -> None:
    model = mixture(Product(Real(), Circle()), [1.0], [[0.0, 0.0]], [[0.5, 0.5]])
    start = torch.tensor([[0.3, 0.3]]).double().expand(ROWS, 2)
    found = model(x()).refine(start, num_steps=1, step_size=[0.25, 0.125])
    # The gradient is -z / 0.25: the first dimension arrives, the second comes half the way (2e-8 for the wrapping).
    torch.testing.assert_close(found[:, 0], torch.zeros(ROWS).double(), rtol=0, atol=1e-6)
    torch.testing.assert_close(found[:, 1], torch.full((ROWS,), 0.15).double(), rtol=0, atol=1e-6)


def test_shapes_of_initial_estimates() -> None:
    p = two_peaks(Real())(x())
    assert p.refine(torch.zeros(ROWS)).shape == (ROWS, 1)
    assert p.refine([0.0] * ROWS).shape == (ROWS, 1)
    assert p.refine(torch.zeros(2, 4, ROWS, 1)).shape == (2, 4, ROWS, 1)
    assert p.refine(torch.zeros(ROWS, 1, dtype=torch.float32)).dtype == torch.float64
    assert torch.equal(p.refine(torch.full((ROWS,), 0.3), num_steps=0), torch.full((ROWS, 1), 0.3).double())


def test_an_estimate_without_density_stays() -> None:
    p = curve(lambda v: -(v**2))(x())  # no density beyond the window [-4, 4]
    start = torch.tensor([-9.0, 0.5, 9.0]).double()
    found = p.refine(start, num_steps=50)[:, 0]
    assert found[0] == -9 and found[2] == 9
    assert found[1].abs() < 0.1


@pytest.mark.parametrize("bad", [-1.0, 0.0, math.nan, math.inf])
def test_initial_estimates_outside_the_space_are_refused(bad: float) -> None:
    p = two_peaks(Positive())(x())
    with pytest.raises(ValueError, match=r"initial has 2 of 3 rows .*Positive\(dim=1\).*index \(0,\)"):
        p.refine(torch.tensor([bad, 1.0, bad]))


@pytest.mark.parametrize(
    ("initial", "arguments", "message"),
    [
        (torch.zeros(ROWS, 2), {}, "initial has shape"),
        (torch.zeros(ROWS + 1, 1), {}, "initial has shape"),
        (torch.zeros(ROWS), {"step_size": [0.1, 0.1]}, "step_size has length 2; expected one number, or 1"),
        (torch.zeros(ROWS), {"step_size": torch.ones(ROWS, 1)}, r"step_size has shape \(3, 1\)"),
        (torch.zeros(ROWS), {"step_size": -0.1}, "step_size is -0.1"),
        (torch.zeros(ROWS), {"num_steps": -1}, "num_steps is -1"),
        (torch.zeros(ROWS), {"decay": 1.0}, "decay is 1.0"),
    ],
)
def test_wrong_arguments_of_refine_are_refused(initial: Tensor, arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        two_peaks(Real())(x()).refine(initial, **arguments)
