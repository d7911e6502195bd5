"""Laws that every model obeys that `fit` trains; a new model gets its tests by one entry in MODELS."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import energyreg as er
from energyreg.training.trainable import check_trainable

GENERATOR = torch.Generator().manual_seed(0)
X = torch.rand(120, 2, generator=GENERATOR)
Y = X[:, :1] + 0.1 * torch.randn(120, 1, generator=GENERATOR)
Model = er.EnergyRegressionModel
MODELS: dict[str, Callable[[], Any]] = {
    "marginal as base": lambda: Model.for_table(2, width=16, dropout=0.0),
    "proposal as base": lambda: Model.for_table(2, width=16, dropout=0.0, num_rows=120),
    "mixture": lambda: Model.mixture_for_table(2, width=16, dropout=0.0),
    "factor of a chain": lambda: er.EnergyChain.for_table(1, er.spaces.Real(2), width=16, dropout=0.0).factors[1],
}


@pytest.fixture(params=MODELS)
def make(request: pytest.FixtureRequest) -> Callable[[], Any]:
    def seeded() -> Any:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            return MODELS[request.param]()

    return seeded


def fit(model: Any, **settings: Any) -> er.History:
    return er.fit(model, X, Y, **{"epochs": 4, "batch_size": 30, "learning_rate": 0.01, "progress": False} | settings)


def same(a: nn.Module, b: nn.Module) -> bool:
    return all(torch.equal(value, b.state_dict()[name]) for name, value in a.state_dict().items())


def test_fit_lowers_the_loss_by_the_seed_alone_and_ends_in_evaluation_mode(make: Callable[[], Any]) -> None:
    first, second = make(), make()
    check_trainable(first)
    history = fit(first)
    torch.manual_seed(9)
    fit(second)
    assert history.train_loss[-1] < history.train_loss[0]
    assert same(first, second) and first.fitted and not first.training


def test_resumed_training_ends_bit_equal(make: Callable[[], Any], tmp_path: Path) -> None:
    straight, resumed = make(), make()
    fit(straight, checkpoint_dir=tmp_path)
    fit(resumed, checkpoint_dir=tmp_path, resume=True)
    assert same(straight, resumed)


def test_double_precision_trains(make: Callable[[], Any]) -> None:
    model = make()
    assert fit(model, precision="64-true").train_loss[-1] < 10 and model.dtype == torch.float64


def test_bad_targets_are_refused_before_anything_changes(make: Callable[[], Any]) -> None:
    model, untouched = make(), make()
    with pytest.raises(ValueError, match="y "):
        er.fit(model, X, torch.full_like(Y, torch.nan))
    assert same(model, untouched) and not model.fitted
