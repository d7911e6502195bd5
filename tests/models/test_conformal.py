"""Conformal sets in every space: at levels that the rows cannot promise they are the whole space, and never more."""

import math

import numpy as np
import pytest
import torch
from torch import nn

import energyreg as er
from energyreg.densities.bases import Marginal
from energyreg.densities.spaces import Circle, Interval, Positive, Product, Real, TargetSpace
from energyreg.models.conformal import ConformalIntervals, ConformalRegions
from energyreg.networks.heads import JointHead

SPACES = {
    "real": (lambda: Real(), [[-math.inf, math.inf]]),
    "positive": (lambda: Positive(), [[0.0, math.inf]]),
    "interval": (lambda: Interval(0.0, 0.1), [[0.0, 0.1]]),
    "circle": (lambda: Circle(1.0, -0.5), [[-0.5, 0.5]]),
    "several": (lambda: Product(Positive(), Interval(0.0, 0.1)), [[0.0, math.inf], [0.0, 0.1]]),
}


def model_of(space: TargetSpace) -> tuple[er.EnergyRegressionModel, torch.Tensor, torch.Tensor]:
    """A model, and 15 rows with targets inside the space, two of them at the end of an interval."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        if space.dim == 1:
            model = er.EnergyRegressionModel(nn.Linear(2, 8), JointHead(8, 1, space.periodic),
                                             base=Marginal(1, space.periodic), space=space)  # fmt: skip
        else:
            model = er.EnergyRegressionModel.mixture_for_table(2, space, width=8)
        x, y = torch.randn(15, 2), torch.rand(15, space.dim).double() / 10
    y[:2] = 0.1
    model = model.double().eval()
    model.fit_preprocessing(x, y)
    return model, x, y


@pytest.mark.parametrize("name", SPACES)
@pytest.mark.parametrize("score", ["mass", "density"])
def test_a_level_that_the_rows_cannot_promise_gives_the_whole_space(name: str, score: str) -> None:
    make, whole = SPACES[name]
    model, x, y = model_of(make())
    region = ConformalRegions(model, x, y, score=score)(x[:3], level=0.99)
    outside = torch.tensor([math.nan, 1e30, -1.0, 0.05]).double()[:, None, None].expand(-1, 3, model.space.dim)
    assert torch.equal(region.contains(outside), model.space.contains(outside))
    if model.space.dim == 1:
        assert [pieces.tolist() for pieces in region.intervals] == [whole] * 3
    if name != "circle":
        found = ConformalIntervals(model, x, y)(x[:3], level=0.99)
        assert found.reshape(3, -1, 2).tolist() == [whole] * 3


@pytest.mark.parametrize("name", [name for name in SPACES if name != "circle"])
@pytest.mark.parametrize("level", [0.5, 0.85])
def test_intervals_cover_their_own_rows_and_stay_in_the_space(name: str, level: float) -> None:
    make, whole = SPACES[name]
    model, x, y = model_of(make())
    found = ConformalIntervals(model, x, y)(x, level=level).reshape(15, -1, 2)
    inside = ((found[..., 0] <= y) & (y <= found[..., 1])).all(1)
    # ⌈16 level⌉ of 15 rows have at most the quantile as their score.
    assert int(inside.sum()) >= math.ceil(16 * level)
    low, high = torch.tensor(whole).double().unbind(-1)
    assert bool((found[..., 0] >= low).all()) and bool((found[..., 1] <= high).all())


def test_targets_at_an_end_do_not_make_every_interval_the_whole_space() -> None:
    model, x, _ = model_of(Interval(0.0, 0.1))
    y = (torch.arange(15).double()[:, None] / 100).clamp_max(0.1)  # a third at the upper end
    found = ConformalIntervals(model, x, y)(x, level=0.6)
    assert not bool((found == torch.tensor([0.0, 0.1])).all())


@pytest.mark.filterwarnings("ignore:y, column .*(has point masses|takes only)")
@pytest.mark.parametrize("target", ["count", "positive", ["positive", ("interval", 0, 0.1)]])
def test_the_estimators_intervals_stay_where_targets_can_be(target: object) -> None:
    rng = np.random.default_rng(0)
    x, several = rng.normal(size=(60, 2)), isinstance(target, list)
    y = np.stack([rng.poisson(3, 60) + (target != "count"), rng.uniform(-0.05, 0.15, 60).clip(0, 0.1)], 1)
    regressor = er.EnergyRegressor(
        target=target, n_members=1, epochs=1, width=8, random_state=0, conformal=True, calibrate=False
    )
    regressor.fit(x, y if several else y[:, 0])
    found = regressor.predict_interval(x[:2], 0.999).reshape(2, -1, 2)
    assert found[:, 0].tolist() == [[0.0, math.inf]] * 2
    if several:
        assert found[:, 1].tolist() == [[0.0, 0.1]] * 2
        quantiles = regressor.predict_quantiles(x[:2], [0.001, 0.999])
        assert bool(((quantiles[..., 1] >= 0) & (quantiles[..., 1] <= 0.1)).all())
