"""`fit`: same seed same result, resume is exact, failures are explained, bad input is refused before work is lost."""

import dataclasses
import errno
import json
import math
import os
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import polars as pl
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

import energyreg as er
from energyreg.densities.bases import ProposalBase
from energyreg.models import checkpoint
from energyreg.networks.encoders import TableEncoder
from energyreg.networks.heads import SeparableHead
from energyreg.networks.proposals import MixtureDensityNetwork
from energyreg.objectives import (
    ExactMaximumLikelihood,
    Loss,
    MaximumLikelihoodWithLearnedProposal,
    NCEWithLearnedProposal,
    NonFiniteLossError,
    ProposalNLL,
    SelfNormalisedLikelihood,
)
from energyreg.randomness import mix
from energyreg.training import data, fitting
from energyreg.training import loop as training

N = 200


def table(n: int = N, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.rand(n, 2, generator=generator)
    return x, x[:, 0] + 0.1 * torch.randn(n, generator=generator)


X, Y = table()


def make_model(seed: int = 0, dropout: float = 0.2) -> er.EnergyRegressionModel:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return er.EnergyRegressionModel.for_table(2, width=8, dropout=dropout)


def fit(model: er.EnergyRegressionModel, x: Any = X, y: Any = Y, **settings: Any) -> er.History:
    settings = {"epochs": 3, "batch_size": 64, "objective": ExactMaximumLikelihood(32)} | settings
    return er.fit(model, x, y, **settings)


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def nll(model: er.EnergyRegressionModel, x: Tensor, y: Tensor) -> float:
    return float(-model(x).log_prob(y).double().mean())


@dataclasses.dataclass
class Sabotage:
    """An objective that does something to the loss in one step."""

    step: int
    change: Callable[[Tensor], Tensor]
    calls: int = 0

    def __call__(self, f: Any, q: Any, z: Tensor, *, generator: torch.Generator) -> Loss:
        per_example, diagnostics = ExactMaximumLikelihood(32)(f, q, z, generator=generator)
        self.calls += 1
        return Loss(self.change(per_example) if self.calls == self.step else per_example, diagnostics)

    def __repr__(self) -> str:  # the same before and after the interruption
        return "Sabotage()"


def interrupt(_: Tensor) -> Tensor:
    raise KeyboardInterrupt


# What fit does ----------------------------------------------------------------------------------------------------


def test_training_lowers_the_validation_nll() -> None:
    model = make_model(dropout=0.0)
    history = fit(model, epochs=10, learning_rate=0.02)
    assert history.validation_nll[-1] < history.validation_nll[0] - 0.2
    assert history.train_loss[-1] < history.train_loss[0]
    assert not model.training
    assert all(parameter.grad is None for parameter in model.parameters())
    for name in ("train_loss", "validation_nll", "learning_rate", "seconds"):
        assert len(getattr(history, name)) == 10
    assert {len(values) for values in history.diagnostics.values()} == {10}
    assert {"f_target", "log_partition", "effective_sample_size"} <= set(history.diagnostics)
    assert sum(history.seconds) <= history.total_seconds
    assert not history.interrupted and not history.stopped_early


def test_same_seed_same_weights_and_the_global_random_state_is_left_alone() -> None:
    torch.manual_seed(5)
    before = torch.get_rng_state()
    first, second, other = make_model(), make_model(), make_model()
    fit(first)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(6)
    fit(second)
    fit(other, seed=1)
    assert same(weights(first), weights(second))
    assert not same(weights(first), weights(other))


AS = {
    "float32 array": lambda t: t.numpy(),
    "float64 array": lambda t: t.numpy().astype(float),
    "data frame": lambda t: pd.DataFrame(t.numpy()) if t.ndim == 2 else pd.Series(t.numpy()),
    "polars": lambda t: pl.DataFrame(t.numpy()) if t.ndim == 2 else pl.Series(t.numpy()),
    "lists": lambda t: t.tolist(),
    "reversed array": lambda t: t.numpy()[::-1].copy()[::-1],
    "column": lambda t: t.numpy() if t.ndim == 2 else t.numpy()[:, None],
}


@pytest.mark.parametrize("kind", AS)
def test_every_container_gives_the_same_weights(kind: str) -> None:
    first, second = make_model(), make_model()
    fit(first, epochs=1)
    fit(second, AS[kind](X), AS[kind](Y), epochs=1)
    # float64 targets are standardised a last bit more exactly
    tolerance = 1e-4 if kind in ("float64 array", "lists") else 0.0
    for name, tensor in weights(first).items():
        assert torch.allclose(weights(second)[name], tensor, rtol=0, atol=tolerance)


def test_fit_equals_a_plain_loop() -> None:
    """Twelve lines of plain torch do the same, to rounding (the plain sum is a mean, the optimiser is not fused)."""
    first, second = make_model(dropout=0.0), make_model(dropout=0.0)
    objective = er.objectives.ProposalNLL()
    first, second = (er.EnergyRegressionModel.mixture_for_table(2, width=8, dropout=0.0) for _ in range(2))
    second.load_state_dict(first.state_dict())
    fit(first, objective=objective, validation=None, batch_size=N, epochs=5, schedule="constant", weight_decay=0.0)
    second.fit_preprocessing(X, Y)
    optimizer = torch.optim.AdamW(second.parameters(), lr=3e-3, weight_decay=0.0)
    for _ in range(5):
        f, q, z = second.condition(X, Y)
        loss = objective(f, q, z, generator=torch.Generator()).per_example.mean()
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(second.parameters(), 10.0)
        optimizer.step()
    for name, tensor in weights(first).items():
        assert torch.allclose(weights(second)[name], tensor, rtol=1e-4, atol=1e-5), name


@pytest.mark.parametrize(("eta", "shares"), [(0.0, [1, 1, 1, 1, 1, 1]), (1.0, [1, 2, 3, 4, 5, 6])])
def test_averaged_weights_are_those_of_all_steps(eta: float, shares: list[int]) -> None:
    """η = 0 is the plain mean of the weights after each step, and with η = 1 step t counts t times."""

    def one() -> er.EnergyRegressionModel:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            return er.EnergyRegressionModel.mixture_for_table(2, width=8, dropout=0.0)

    settings = {"validation": None, "batch_size": N // 2, "schedule": "constant"}
    averaged = one()
    fit(averaged, objective=er.objectives.ProposalNLL(), averaging=eta, epochs=3, **settings)
    steps: list[dict[str, Tensor]] = []

    class Recording:
        def __call__(self, f: Any, q: Any, y: Tensor, *, generator: torch.Generator) -> Loss:
            steps.append({name: tensor.clone() for name, tensor in weights(model).items()})
            return er.objectives.ProposalNLL()(f, q, y, generator=generator)

    model = one()
    fit(model, objective=Recording(), epochs=3, **settings)
    steps = [*steps[-5:], weights(model)]  # before the steps 2 to 6, and at the end
    for name, tensor in weights(averaged).items():
        mean = sum(share * step[name] for share, step in zip(shares, steps, strict=True)) / sum(shares)
        assert torch.allclose(tensor.double(), mean.double(), atol=1e-6), name  # rounding of single precision


@pytest.mark.parametrize("averaging", [None, 8.0])
def test_model_has_the_weights_of_its_best_epoch(averaging: float | None) -> None:
    model = make_model()
    x_val, y_val = table(seed=1)
    history = fit(
        model, validation=(x_val, y_val), epochs=8, learning_rate=0.1, schedule="constant", averaging=averaging
    )
    assert history.best_epoch == int(np.argmin(history.validation_nll)) + 1
    assert history.best_validation_nll == min(history.validation_nll) == pytest.approx(nll(model, x_val, y_val))


def test_patience_stops_after_as_many_epochs_without_gain() -> None:
    model = make_model()
    settings = {"learning_rate": 0.3, "schedule": "constant", "patience": 3, "epochs": 100}
    history = fit(model, validation=table(40, seed=1), **settings)
    assert history.stopped_early
    assert history.best_epoch is not None
    assert len(history.validation_nll) == history.best_epoch + 3 < 100


def test_validation_pairs_loaders_and_fractions_agree() -> None:
    x_val, y_val = table(100, seed=1)
    pair, loader, shuffled = make_model(), make_model(), make_model()
    dataset = TensorDataset(x_val, y_val)
    a = fit(pair, validation=(x_val.numpy(), y_val.numpy())).validation_nll
    b = fit(loader, validation=DataLoader(dataset, batch_size=33)).validation_nll
    c = fit(shuffled, validation=DataLoader(dataset, batch_size=33, shuffle=True)).validation_nll
    assert a == pytest.approx(b)
    assert a == pytest.approx(c)
    model = make_model()
    history = fit(model, validation=0.25)
    _, held_out = data.split(N, 0.25, 0)
    assert len(held_out) == 50
    assert history.best_validation_nll == pytest.approx(nll(model, X[held_out], Y[held_out]))


def test_without_validation_the_last_weights_stay() -> None:
    model = make_model()
    history = fit(model, validation=None)
    assert history.validation_nll == [] and history.best_epoch is None and history.best_validation_nll is None


@pytest.mark.parametrize("schedule", ["one-cycle", "cosine", "constant"])
def test_schedules(schedule: str) -> None:
    history = fit(make_model(), schedule=schedule, epochs=20, learning_rate=0.01)
    rates = history.learning_rate
    assert max(rates) <= 0.01 + 1e-12
    if schedule == "constant":
        assert set(rates) == {0.01}
    else:
        assert rates[-1] < 1e-3 * 0.01
        assert rates[2:] == sorted(rates[2:], reverse=True)


def test_weight_decay_shrinks_matrices_only() -> None:
    def decayed(decay: float) -> dict[str, Tensor]:
        model = make_model(dropout=0.0)
        fit(model, epochs=1, batch_size=N, validation=None, schedule="constant", learning_rate=0.1, weight_decay=decay)
        return weights(model)

    with_decay, without = decayed(1.0), decayed(0.0)
    for name, parameter in make_model().named_parameters():
        expected = 0.9 if parameter.ndim > 1 else 1.0
        start = dict(make_model().named_parameters())[name]
        assert torch.allclose(with_decay[name] - without[name], (expected - 1) * start, atol=1e-5), name


def test_fewer_rows_than_a_batch_are_one_batch() -> None:
    history = fit(make_model(), batch_size=10_000)
    assert len(history.train_loss) == 3


def test_gradient_clip_limits_the_step() -> None:
    free, clipped = make_model(dropout=0.0), make_model(dropout=0.0)
    fit(free, gradient_clip=None, epochs=1)
    fit(clipped, gradient_clip=1e-12, epochs=1, weight_decay=0.0)
    start = weights(make_model())
    moved = [
        max(float((weights(model)[name] - start[name]).abs().max()) for name, _ in model.named_parameters())
        for model in (free, clipped)
    ]
    # AdamW divides by the gradient's size, down to its eps of 1e-8
    assert moved[1] < 1e-2 * moved[0]


def test_unused_and_frozen_parameters_stay() -> None:
    model = er.EnergyRegressionModel(
        TableEncoder(2, 8),
        SeparableHead(8),
        proposal=MixtureDensityNetwork(8),
        base=ProposalBase(),
        space=er.spaces.Real(1),
    )
    model.encoder.frequencies.requires_grad_(False)
    before = weights(model)
    fit(model, objective=ProposalNLL())
    after = weights(model)
    assert all(torch.equal(before[name], after[name]) for name in before if name.startswith("head."))
    assert torch.equal(before["encoder.frequencies"], after["encoder.frequencies"])
    assert not torch.equal(before["proposal.output.weight"], after["proposal.output.weight"])


def test_second_fit_keeps_the_units_and_trains_on() -> None:
    model = make_model()
    fit(model, validation=None)
    space = weights(model.space)
    first = nll(model, X, Y)
    fit(model, X, 2 * Y, validation=None)
    assert same(weights(model.space), space)
    assert nll(model, X, Y) != first


def test_three_dimensions_train() -> None:
    space = er.spaces.Product(er.spaces.Real(2), er.spaces.Circle(360.0))
    model = er.EnergyRegressionModel.for_table(2, space, width=8, num_components=2)
    y = torch.cat([X, 360 * X[:, :1].clamp(0, 0.99)], 1) + torch.tensor([0.01, 0.0, 0.0]) * torch.randn(N, 1)
    history = er.fit(model, X, y, epochs=1, validation=(X[:20], y[:20]))
    assert np.isfinite(history.validation_nll[0])


# Loaders ----------------------------------------------------------------------------------------------------------


class Stream(IterableDataset):
    def __iter__(self) -> Any:
        return iter(zip(X, Y, strict=True))


def test_loader_in_order_gives_the_losses_of_whole_batches() -> None:
    settings = {"validation": None, "batch_size": N, "epochs": 5}
    a = fit(make_model(dropout=0.0), **settings)
    b = fit(make_model(dropout=0.0), DataLoader(TensorDataset(X, Y), batch_size=N), None, **settings)
    # the order of the rows in a sum of float32
    assert a.train_loss == pytest.approx(b.train_loss, rel=1e-5)


@pytest.mark.parametrize("shape", ["(B,)", "(B, 1)"])
@pytest.mark.parametrize("source", ["shuffled", "stream", "arrays"])
def test_loaders_of_any_kind(source: str, shape: str) -> None:
    y = Y if shape == "(B,)" else Y[:, None]
    loaders = {
        "shuffled": DataLoader(TensorDataset(X.double(), y.double()), batch_size=50, shuffle=True),
        "stream": DataLoader(Stream(), batch_size=50),
        "arrays": DataLoader(
            list(zip(X.numpy(), y.numpy(), strict=True)),
            batch_size=50,
            collate_fn=lambda rows: [np.stack(part) for part in zip(*rows, strict=True)],
        ),
    }
    model = make_model()
    history = fit(model, loaders[source], None, validation=(X, Y))
    assert model.fitted
    assert history.validation_nll[-1] < 1.5


def test_loader_without_validation_has_none() -> None:
    assert fit(make_model(), DataLoader(TensorDataset(X, Y), batch_size=50), None).validation_nll == []


# Resume -----------------------------------------------------------------------------------------------------------

RUNS: dict[str, dict[str, Any]] = {
    "one-cycle": {},
    "cosine": {"schedule": "cosine"},
    "constant with patience": {"schedule": "constant", "patience": 2, "learning_rate": 0.3},
    "no validation": {"validation": None},
    "averaging": {"averaging": 4.0},
    "averaging without validation": {"averaging": 4.0, "validation": None},
    "bf16": {"precision": "bf16-mixed"},
    "double": {"precision": "64-true"},
    "shuffling loader": {"x": DataLoader(TensorDataset(X, Y), batch_size=50, shuffle=True), "y": None},
}


@pytest.mark.parametrize(("name", "how"), [("one-cycle", KeyboardInterrupt), *((name, RuntimeError) for name in RUNS)])
def test_resumed_run_ends_with_the_very_weights_of_an_uninterrupted_one(
    name: str, how: type[BaseException], tmp_path: Path
) -> None:
    def stop(_: Tensor) -> Tensor:
        raise how

    settings = {"epochs": 5, "batch_size": 60} | RUNS[name]
    straight, broken, resumed = make_model(1), make_model(1), make_model(2)
    expected = fit(straight, objective=Sabotage(-1, stop), **settings)
    # three batches an epoch, four of the loader: in the midst of the third epoch
    objective = Sabotage(10 if name == "shuffling loader" else 8, stop)
    if how is KeyboardInterrupt:
        with pytest.warns(UserWarning, match="resume=True"):
            fit(broken, objective=objective, checkpoint_dir=tmp_path, **settings)
    else:
        with pytest.raises(how):
            fit(broken, objective=objective, checkpoint_dir=tmp_path, **settings)
    history = fit(resumed, objective=Sabotage(-1, stop), checkpoint_dir=tmp_path, resume=True, **settings)
    assert same(weights(straight), weights(resumed))
    ours, theirs = history.to_dict(), expected.to_dict()
    for timing in ("seconds", "total_seconds"):
        ours.pop(timing), theirs.pop(timing)
    assert ours == theirs


def test_finished_run_returns_at_once(tmp_path: Path) -> None:
    model, again = make_model(1), make_model(2)
    history = fit(model, checkpoint_dir=tmp_path)
    objective = ExactMaximumLikelihood(32)
    model_calls = Sabotage(1, interrupt)
    assert [path.name for path in tmp_path.iterdir()] == ["last.safetensors"]
    assert fit(again, checkpoint_dir=tmp_path, resume=True, objective=objective) == history
    assert model_calls.calls == 0
    assert same(weights(model), weights(again))
    assert not again.training


def test_resume_without_a_checkpoint_starts_afresh(tmp_path: Path) -> None:
    first, second = make_model(), make_model()
    fit(first)
    fit(second, checkpoint_dir=tmp_path / "new", resume=True)
    assert same(weights(first), weights(second))


def test_old_checkpoint_is_replaced_without_resume(tmp_path: Path) -> None:
    fit(make_model(), checkpoint_dir=tmp_path, epochs=1)
    fit(make_model(), checkpoint_dir=tmp_path, epochs=2)
    assert checkpoint.load_training_state(tmp_path / "last.safetensors")[1]["epoch"] == 2


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"learning_rate": 0.1}, r"learning_rate was 0\.003, is 0\.1\."),
        ({"epochs": 4, "seed": 3}, "epochs was 3, is 4; seed was 0, is 3"),
        ({"objective": ExactMaximumLikelihood(16)}, "objective was .*num_nodes=32.*, is .*num_nodes=16"),
        ({"x": X[:150], "y": Y[:150]}, "validation data: rows was 20, is 15; training data: rows was 180, is 135"),
        ({"y": Y + 1}, "training data: the values are others"),
        ({"validation": None}, "validation data was arrays, is None"),
        ({"precision": "bf16-mixed"}, "precision was '32-true', is 'bf16-mixed'"),
    ],
)
def test_resume_names_what_is_different(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    fit(make_model(), checkpoint_dir=tmp_path)
    model = make_model()
    with pytest.raises(er.CheckpointError, match=f"Cannot resume from .*last.safetensors.*{message}"):
        fit(model, checkpoint_dir=tmp_path, resume=True, **changes)


def test_resume_with_another_model_names_a_weight(tmp_path: Path) -> None:
    fit(make_model(), checkpoint_dir=tmp_path)
    model = er.EnergyRegressionModel.for_table(2, width=16)
    with pytest.raises(er.CheckpointError, match=r"the model's encoder\.\S+ was \(8, 66\), is \(16, 66\)"):
        fit(model, checkpoint_dir=tmp_path, resume=True)


@pytest.mark.parametrize(("field", "value"), [("histories", None), ("groups", 3), ("epoch", "two"), ("optimizer", [1])])
def test_a_checkpoint_of_wrong_values_is_refused(field: str, value: Any, tmp_path: Path) -> None:
    fit(make_model(), checkpoint_dir=tmp_path)
    path = tmp_path / "last.safetensors"
    tensors, state = checkpoint.load_training_state(path)
    checkpoint.save_training_state(path, tensors, state | {field: value})
    with pytest.raises(er.CheckpointError, match=r"last.safetensors.*cannot be read"):
        fit(make_model(), checkpoint_dir=tmp_path, resume=True)


def test_damaged_checkpoint_is_refused(tmp_path: Path) -> None:
    fit(make_model(), checkpoint_dir=tmp_path)
    path = tmp_path / "last.safetensors"
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(er.CheckpointError, match=r"last\.safetensors.*not a complete"):
        fit(make_model(), checkpoint_dir=tmp_path, resume=True)


# Interruption and failure -----------------------------------------------------------------------------------------


def test_interrupted_training_leaves_the_best_weights() -> None:
    model = make_model()
    x_val, y_val = table(seed=1)
    with pytest.warns(UserWarning, match=r"interrupted in epoch 3 of 5; the model has the weights of epoch \d\.$"):
        history = fit(model, validation=(x_val, y_val), objective=Sabotage(11, interrupt), epochs=5, batch_size=40)
    assert history.interrupted
    assert len(history.validation_nll) == 2
    assert nll(model, x_val, y_val) == pytest.approx(min(history.validation_nll))
    assert not model.training
    assert "interrupted" in repr(history)


def test_interruption_before_the_first_epoch_is_complete() -> None:
    model = make_model()
    with pytest.warns(UserWarning, match="as no epoch was complete"):
        history = fit(model, objective=Sabotage(2, interrupt))
    assert history.interrupted and history.train_loss == []


def spoiled(value: float, *rows: int) -> Callable[[Tensor], Tensor]:
    def change(per_example: Tensor) -> Tensor:
        factor = torch.ones_like(per_example)
        factor[list(rows)] = value
        return per_example * factor

    return change


@pytest.mark.parametrize("eager", [True, False])
def test_nan_loss_names_epoch_batch_quantity_and_rows(eager: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Once looked at before the weights change, as on one CPU; once some steps later, as on a GPU."""
    if not eager:
        prepare = training.Training.__init__

        def late(self: Any, *args: Any) -> None:
            prepare(self, *args)
            self.eager = False

        monkeypatch.setattr(training.Training, "__init__", late)
    model = make_model()
    x_val, y_val = table(seed=1)
    objective = Sabotage(6, spoiled(float("nan"), 0, 2))
    rows: list[Tensor] = []
    batches = data.Rows.batches

    def spy(self: Any, *args: Any) -> Any:
        for batch in batches(self, *args):
            rows.append(batch.rows)
            yield batch

    monkeypatch.setattr(data.Rows, "batches", spy)
    with pytest.raises(er.TrainingError) as caught:
        fit(model, validation=(x_val, y_val), objective=objective, batch_size=50)
    message = str(caught.value)
    assert "the loss is nan in epoch 2, batch 2 of 4" in message
    assert f"Affected: loss of 2 of 50 (rows {int(rows[5][0])}, {int(rows[5][2])})" in message
    assert "energy is finite at the targets" in message
    assert "The model has its weights of epoch 1." in message
    assert np.isfinite(nll(model, x_val, y_val))
    assert not model.training


def test_nan_in_the_first_epoch_leaves_the_initial_weights() -> None:
    model = make_model()
    model.fit_preprocessing(X, Y)
    before = weights(model)
    with pytest.raises(er.TrainingError, match="The model has its initial weights, as no epoch was complete"):
        fit(model, objective=Sabotage(2, spoiled(float("nan"), 0)))
    assert same(weights(model), before)


def test_exploding_loss_advises_a_lower_learning_rate() -> None:
    with pytest.raises(er.TrainingError, match=r"exploded to \S+ nats in epoch 1, batch 3.*learning rate is too high"):
        fit(make_model(), objective=Sabotage(3, lambda loss: loss.abs() + 1e9), batch_size=50)


def test_gradient_that_is_not_finite_is_found() -> None:
    def sqrt_at_zero(loss: Tensor) -> Tensor:
        return loss + (loss - loss.detach()).sqrt()

    model = make_model()
    with pytest.raises(
        er.TrainingError, match=r"norm of the gradient is (nan|inf) in epoch 1, batch 2.*set_detect_anomaly"
    ):
        fit(model, objective=Sabotage(2, sqrt_at_zero))
    assert all(bool(tensor.isfinite().all()) for tensor in weights(model).values())


def test_nan_in_a_loader_is_blamed_on_the_data() -> None:
    model = make_model()
    model.fit_preprocessing(X, Y)
    x = X.clone()
    x[70] = float("nan")
    with pytest.raises(er.TrainingError, match=r"epoch 1, batch 2.*x has values that are not finite"):
        fit(model, DataLoader(TensorDataset(x, Y), batch_size=50), None)


class Overflowing(SeparableHead):
    def forward(self, context: Tensor, v: Tensor) -> Tensor:
        return super().forward(context, v) + (1e38 * context.sum() * 1e38 if self.training else 0.0)


def test_energy_that_overflows_is_blamed_on_the_network() -> None:
    model = er.EnergyRegressionModel(TableEncoder(2, 8), Overflowing(8))
    with pytest.raises(
        er.TrainingError, match=r"f_target of \d+ of \d+.*energy f\(x, y\) is not finite at the targets"
    ):
        fit(model)


class NanInEvaluation(SeparableHead):
    def forward(self, context: Tensor, v: Tensor) -> Tensor:
        return super().forward(context, v) * (1.0 if self.training else float("nan"))


def test_nan_validation_is_an_error() -> None:
    with pytest.raises(er.TrainingError, match="validation NLL is nan after epoch 1"):
        fit(er.EnergyRegressionModel(TableEncoder(2, 8), NanInEvaluation(8)))


def test_objective_of_the_wrong_shape_is_named() -> None:
    with pytest.raises(ValueError, match=r"losses of shape \(\); expected \(60,\)"):
        fit(make_model(), objective=Sabotage(1, lambda loss: loss.mean()), batch_size=60)


# Bad input --------------------------------------------------------------------------------------------------------


def with_value(tensor: Tensor, value: float) -> Tensor:
    tensor = tensor.clone()
    tensor[3] = value
    return tensor


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "NaN in x": ({"x": with_value(X, float("nan"))}, "x .*NaN.*row 3"),
    "infinite x": ({"x": with_value(X, float("inf"))}, "x .*infinite.*row 3"),
    "NaN in y": ({"y": with_value(Y, float("nan"))}, "^y .*3"),
    "infinite y": ({"y": with_value(Y, float("-inf"))}, "^y .*3"),
    "lengths": ({"y": Y[:-1]}, "x has 200 rows, but y has 199"),
    "columns of x": ({"x": X[:, :1]}, r"x has shape \(200, 1\), but the model takes \(B, 2\)"),
    "x of one dimension": ({"x": X[:, 0]}, r"x has shape \(200,\)"),
    "columns of y": ({"y": torch.stack([Y, Y], 1)}, r"y has shape \(200, 2\)"),
    "y of three dimensions": ({"y": Y[:, None, None]}, r"y has shape \(200, 1, 1\)"),
    "scalar y": ({"y": 3.0}, r"y has shape \(\)"),
    "empty": ({"x": X[:0], "y": Y[:0]}, r"x is empty: its shape is \(0, 2\)"),
    "empty lists": ({"x": [], "y": []}, r"x is empty"),
    "one row": ({"x": X[:1], "y": Y[:1]}, "x has 1 row; expected at least 2"),
    "constant y": ({"y": torch.ones(N)}, "y .*1"),
    "object x": ({"x": np.array([["a", 1.0]] * N, dtype=object)}, "x has dtype object; expected numbers"),
    "object y": ({"y": np.array(["a"] * N, dtype=object)}, "y has dtype object; expected numbers"),
    "text y": ({"y": np.array(["a"] * N)}, "y has dtype <U1; expected numbers"),
    "complex y": ({"y": Y.to(torch.complex64)}, "y has dtype torch.complex64"),
    "ragged x": ({"x": [[1.0], [1.0, 2.0]] * 100}, "x"),
    "no y": ({"y": None}, "y is missing"),
    "outside": ({"space": er.spaces.Interval(0.0, 0.5)}, "^y .*outside"),
    "validation outside": (
        {"space": er.spaces.Interval(-9.0, 9.0), "validation": (X, Y + 10)},
        "^y_val.*outside",
    ),
    "validation of another width": ({"validation": (X[:, :1], Y)}, "x_val.*shape"),
    "validation lengths": ({"validation": (X, Y[:3])}, "x_val has 200 rows, but y_val has 3"),
    "NaN in validation": ({"validation": (X, with_value(Y, float("nan")))}, "^y_val"),
    "validation 0": ({"validation": 0.0}, r"validation is 0\.0; expected a fraction in \(0, 1\)"),
    "validation 1": ({"validation": 1}, r"validation is 1\.0; expected a fraction"),
    "validation leaves nothing": ({"validation": 0.995}, "leaves 1 to train on"),
    "validation of too few": ({"x": X[:2], "y": Y[:2]}, "leaves 1 to train on.*validation=None"),
    "validation True": ({"validation": True}, "validation is True"),
    "validation array": ({"validation": X}, "validation is a Tensor|validation is 'a Tensor'"),
    "epochs": ({"epochs": 0}, "epochs is 0; expected a whole number of at least 1"),
    "epochs float": ({"epochs": 1.5}, r"epochs is 1\.5"),
    "batch_size": ({"batch_size": 0}, "batch_size is 0"),
    "patience": ({"patience": 0}, "patience is 0"),
    "patience without validation": ({"patience": 2, "validation": None}, "patience needs validation data"),
    "learning_rate": ({"learning_rate": 0.0}, r"learning_rate is 0\.0; expected a finite number > 0"),
    "learning_rate NaN": ({"learning_rate": float("nan")}, "learning_rate is nan"),
    "weight_decay": ({"weight_decay": -1.0}, r"weight_decay is -1\.0; expected a finite number ≥ 0"),
    "gradient_clip": ({"gradient_clip": 0}, "gradient_clip is 0"),
    "averaging": ({"averaging": -1}, "averaging is -1; expected a finite number ≥ 0"),
    "schedule": ({"schedule": "linear"}, "schedule is 'linear'; expected one of 'one-cycle'"),
    "seed": ({"seed": "zero"}, "seed is 'zero'"),
    "objective": ({"objective": "nce"}, "objective is a str; expected an object"),
    "progress": ({"progress": "bar"}, "progress is 'bar'"),
    "resume without folder": ({"resume": True}, "resume=True needs checkpoint_dir="),
    "accelerator": ({"accelerator": "quantum"}, "accelerator='quantum' cannot be used"),
    "no such accelerator": ({"accelerator": "tpu"}, "accelerator='tpu' cannot be used"),
    "devices": ({"accelerator": "cpu", "devices": 0}, "devices=0 cannot be used"),
    "devices text": ({"accelerator": "cpu", "devices": "many"}, "devices='many' cannot be used"),
    "precision": ({"precision": "8-bit"}, "precision is '8-bit'; expected one of '32-true'"),
    "half precision": ({"precision": "bf16-true"}, "precision is 'bf16-true'"),
    "strategy": ({"strategy": "teamwork"}, "strategy='teamwork' cannot be used"),
    "loader and y": ({"x": DataLoader(TensorDataset(X, Y))}, "leave y out"),
    "loader as y": ({"y": DataLoader(TensorDataset(X, Y))}, "y is a DataLoader"),
    "loader and fraction": (
        {"x": DataLoader(TensorDataset(X, Y)), "y": None, "validation": 0.1},
        "whose rows cannot be split",
    ),
    "loader of one": ({"x": DataLoader(TensorDataset(X)), "y": None}, "Batch 1 .*length 1; expected a pair"),
    "loader of tensors": ({"x": DataLoader(X), "y": None}, "Batch 1 .* is a Tensor; expected a pair"),
    "loader of three": ({"x": DataLoader(TensorDataset(X, Y, Y)), "y": None}, "of length 3; expected a pair"),
    "loader of text": (
        {"x": DataLoader(list(zip(X, "a" * N, strict=True)), batch_size=9), "y": None},
        "has y = a (list|tuple); expected a tensor",
    ),
    "loader of truths": ({"x": DataLoader(TensorDataset(X, Y > 0)), "y": None}, "y = torch.bool of shape"),
    "loader with NaN": ({"x": DataLoader(TensorDataset(X, with_value(Y, float("nan")))), "y": None}, "^y "),
    "loader of other columns": ({"x": DataLoader(TensorDataset(X[:, :1], Y)), "y": None}, r"takes \(B, 2\)"),
    "loader of unequal rows": (
        {"x": DataLoader([0], collate_fn=lambda _: (X, Y[:-1])), "y": None},
        "x of shape .* but y of shape .*; rows differ",
    ),
    "empty loader": ({"x": DataLoader(TensorDataset(X[:0], Y[:0])), "y": None}, "without a batch"),
    "loader of one row": ({"x": DataLoader(TensorDataset(X[:1], Y[:1])), "y": None}, "at least 2 to learn from"),
    "validation loader": ({"validation": DataLoader(TensorDataset(X))}, "DataLoader validation is a list"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_refused_before_anything_changes(name: str) -> None:
    changes, message = BAD[name]
    model = make_model()
    if "space" in changes:
        model.space = changes["space"]
    before, training_mode = weights(model), model.training
    with pytest.raises(ValueError, match=message):
        fit(model, **{key: value for key, value in changes.items() if key != "space"})
    assert same(weights(model), before)
    assert model.training == training_mode


def test_frozen_model_is_refused() -> None:
    with pytest.raises(ValueError, match="no parameters to train"):
        fit(make_model().requires_grad_(False))


def test_model_of_another_kind_is_refused() -> None:
    with pytest.raises(
        ValueError,
        match=r"model is a Linear; expected an EnergyRegressionModel.*It lacks condition, default_obj",
    ):
        fit(nn.Linear(2, 1))  # type: ignore[arg-type]


def test_device_that_is_absent_is_named() -> None:
    if torch.cuda.is_available():
        pytest.skip("there is one")
    with pytest.raises(ValueError, match=r"accelerator='cuda' cannot be used.*not available"):
        fit(make_model(), accelerator="cuda")


@pytest.mark.parametrize("where", ["below a file", "a file"])
def test_unusable_checkpoint_folder_is_noticed_first(where: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    folder = tmp_path / "file" / "folder" if where == "below a file" else tmp_path / "file"
    objective = Sabotage(1, interrupt)
    with pytest.raises(OSError, match="file"):
        fit(make_model(), checkpoint_dir=folder, objective=objective)
    assert objective.calls == 0


def fill_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)


def test_full_disk_is_noticed_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fill_disk(monkeypatch)
    model = make_model()
    with pytest.raises(OSError, match="the disk is full"):
        fit(model, checkpoint_dir=tmp_path, objective=Sabotage(1, interrupt))
    assert not model.fitted
    assert not list(tmp_path.iterdir())


def test_disk_that_fills_up_later_does_not_cost_the_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fill(loss: Tensor) -> Tensor:
        fill_disk(monkeypatch)
        return loss

    with pytest.warns(UserWarning, match=r"the disk is full.*Training goes on") as caught:
        history = fit(make_model(), checkpoint_dir=tmp_path, objective=Sabotage(4, fill))
    assert len(caught) == 1
    assert len(history.train_loss) == 3
    assert checkpoint.load_training_state(tmp_path / "last.safetensors")[1]["epoch"] == 1
    assert [path.name for path in tmp_path.iterdir()] == ["last.safetensors"]


# Precision --------------------------------------------------------------------------------------------------------


def test_bf16_trains_on_exact_targets() -> None:
    seen = []

    def spy(f: Any, q: Any, z: Tensor, *, generator: torch.Generator) -> Loss:
        seen.append(z)
        return ExactMaximumLikelihood(32)(f, q, z, generator=generator)

    model = make_model(dropout=0.0)
    history = fit(
        model, precision="bf16-mixed", objective=spy, validation=None, batch_size=N, epochs=8, learning_rate=0.02
    )
    z = model.space.to_model(Y[:, None]).float()
    assert torch.equal(seen[0].sort(0).values, z.sort(0).values)
    assert model.dtype == torch.float32
    assert history.train_loss[-1] < history.train_loss[0] - 0.2


def test_double_precision_agrees_with_single() -> None:
    single, double = (er.EnergyRegressionModel.mixture_for_table(2, width=8, dropout=0.0) for _ in range(2))
    double.load_state_dict(single.state_dict())
    a = fit(single, objective=ProposalNLL())
    b = fit(double, objective=ProposalNLL(), precision="64-true")
    assert double.dtype == torch.float64
    # float32 rounding of losses near one, through six steps of AdamW
    assert a.train_loss == pytest.approx(b.train_loss, abs=1e-3)
    assert a.validation_nll == pytest.approx(b.validation_nll, abs=1e-3)


# Progress, history, silence ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("progress", [None, False])
def test_silent_without_a_terminal(progress: bool | None, capfd: pytest.CaptureFixture[str]) -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fit(make_model(), progress=progress, precision="bf16-mixed")
    assert caught == []
    assert capfd.readouterr() == ("", "")


def test_lines_without_a_terminal(capfd: pytest.CaptureFixture[str]) -> None:
    fit(make_model(), progress=True, epochs=50)
    out, lines = capfd.readouterr()
    assert out == ""
    assert len(lines.splitlines()) == 11  # the first, and every fifth
    assert "epoch 50/50 · loss " in lines.splitlines()[-1]
    assert "validation NLL" in lines and " left" in lines


@pytest.mark.parametrize("progress", [None, True])
def test_bar_on_a_terminal(
    progress: bool | None, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "160")
    fit(make_model(), progress=progress)
    shown = capfd.readouterr().err
    assert "3/3" in shown and "loss " in shown and "validation NLL" in shown and " left" in shown


def test_history_is_plain_data_and_says_what_happened() -> None:
    history = fit(make_model())
    assert er.History(**json.loads(json.dumps(history.to_dict()))) == history
    assert repr(history).startswith("History(3 epochs in ")
    assert "best validation NLL" in repr(history)
    assert repr(er.History()) == "History(0 epochs in 0.0 s)"


def test_history_plots(monkeypatch: pytest.MonkeyPatch) -> None:
    history = fit(make_model())
    figure = history.plot()
    assert [line.get_label() for line in figure.axes[0].lines if not line.get_label().startswith("_")] == [
        "training loss",
        "validation NLL",
    ]
    with pytest.raises(ValueError, match="no epoch was completed"):
        er.History().plot()
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ImportError, match=r"energyreg\[tables\]"):
        history.plot()


def test_seeds_of_different_purposes_differ() -> None:
    seeds = {mix(seed, purpose, index) for seed in range(5) for purpose in range(5) for index in range(100)}
    assert len(seeds) == 2500
    assert mix(-1, 0) >= 0


# Losses that an objective refuses ------------------------------------------------------------------------------------


class _Window(torch.distributions.Distribution):
    """Uniform on [-width, width] in model space, without density elsewhere."""

    def __init__(self, width: Tensor) -> None:
        super().__init__(width.shape[:1], torch.Size([1]), validate_args=False)
        self.width = width

    def sample(self, sample_shape: Any = ()) -> Tensor:
        return (2 * torch.rand((*sample_shape, *self.batch_shape, 1)) - 1) * self.width.detach()

    def log_prob(self, value: Tensor) -> Tensor:
        inside = (value.abs() <= self.width)[..., 0]
        return torch.where(inside, -(2 * self.width[..., 0]).log(), -torch.inf)


class _Narrowing(nn.Module):
    """A proposal with room for all targets, but from one training step on only for some."""

    def __init__(self, step: int) -> None:
        super().__init__()
        self.step, self.calls = step, 0
        self.scale = nn.Parameter(torch.tensor(0.0))

    def forward(self, context: Tensor) -> _Window:
        self.calls += self.training
        width = 0.2 if self.training and self.calls >= self.step else 20.0
        return _Window((width * self.scale.exp()).expand(len(context), 1))


class _Breaking(nn.Module):
    """A head that returns NaN for a few rows from one training step on."""

    def __init__(self, head: nn.Module, step: int) -> None:
        super().__init__()
        self.head, self.step, self.calls = head, step, 0

    def forward(self, context: Tensor, v: Tensor) -> Tensor:
        g = self.head(context, v)
        self.calls += self.training
        if self.training and self.calls >= self.step:
            g = torch.where(torch.arange(len(context)) < 2, torch.nan, g)
        return g


@pytest.mark.parametrize(
    "objective",
    [
        ProposalNLL(),
        NCEWithLearnedProposal(8, kl_weight=0.0, nll_weight=1.0),
        MaximumLikelihoodWithLearnedProposal(8, kl_weight=0.0, nll_weight=1.0),
        SelfNormalisedLikelihood(8),
    ],
)
def test_a_proposal_that_loses_targets_ends_the_training_with_the_best_weights(objective: Any) -> None:
    def make(step: int) -> er.EnergyRegressionModel:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            return er.EnergyRegressionModel(TableEncoder(2, 8), SeparableHead(8, width=8), proposal=_Narrowing(step))

    model, one = make(7), make(10**9)
    settings = {"objective": objective, "batch_size": 50, "schedule": "constant", "validation": table(seed=1)}
    fit(one, epochs=1, **settings)
    with pytest.raises(er.TrainingError) as caught:
        fit(model, epochs=3, **settings)
    message = str(caught.value)
    assert "in epoch 2, batch 3 of 4" in message
    assert "Affected: loss of " in message and "(rows " in message
    assert "The model has its weights of epoch 1." in message
    assert not model.training
    assert same(weights(model), weights(one))
    # Outside of `fit` the objective itself says what is wrong.
    model.train()
    model.proposal.step = 0
    with pytest.raises(NonFiniteLossError, match=r"q has no density at the target in \d+ of 200 rows"):
        objective(*model.condition(X, Y))


@pytest.mark.parametrize("objective", [ExactMaximumLikelihood(32), SelfNormalisedLikelihood(8)])
def test_an_energy_that_breaks_ends_the_training_with_the_best_weights(objective: Any) -> None:
    steps = 2 if isinstance(objective, ExactMaximumLikelihood) else 1  # calls of the head per step
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = er.EnergyRegressionModel(
            TableEncoder(2, 8), _Breaking(SeparableHead(8, width=8), 6 * steps + 1),
            proposal=MixtureDensityNetwork(8, num_components=2, width=8),
        )  # fmt: skip
    x_val, y_val = table(seed=1)
    with pytest.raises(er.TrainingError) as caught:
        fit(model, validation=(x_val, y_val), objective=objective, batch_size=50)
    message = str(caught.value)
    assert "the loss is nan in epoch 2, batch 3 of 4" in message
    assert "Affected: loss of 2 of 50; f_target of 2 of 50" in message and "(rows " in message
    assert "The energy f(x, y) is not finite at the targets themselves" in message
    assert "The model has its weights of epoch 1." in message
    assert np.isfinite(nll(model, x_val, y_val))


@pytest.mark.parametrize(("rows", "expected"), [(20, 20), (300, 32), (800, 32), (1710, 64), (3200, 128), (6400, 256)])
def test_few_rows_are_trained_on_in_small_batches(rows: int, expected: int) -> None:
    seen = []

    def objective(f: Any, q: Any, y: Tensor, *, generator: torch.Generator) -> Loss:
        seen.append(len(y))
        return ProposalNLL()(f, q, y)

    model = er.EnergyRegressionModel.mixture_for_table(1, width=8, num_components=1)
    x = torch.linspace(-1, 1, rows)[:, None]
    er.fit(model, x, x.sin(), objective=objective, validation=None, epochs=1, progress=False)
    assert set(seen) == {expected}


# ---------------------------------------------------------------------------------------------- weights of rows


def gradients(model: er.EnergyRegressionModel, x: Tensor, y: Tensor, **settings: Any) -> dict[str, Tensor]:
    """How far training in whole batches moves the weights."""
    start = weights(model)
    settings = {"epochs": 1, "batch_size": len(y), "validation": None, "weight_decay": 0.0} | settings
    fit(model, x, y, schedule="constant", gradient_clip=None, **settings)
    return {name: value - start[name] for name, value in weights(model).items() if value.is_floating_point()}


@dataclasses.dataclass
class PlainLikelihood:
    """The exact likelihood on a grid of fixed nodes: the loss of a row depends on nothing but the row."""

    def __call__(self, f: Any, q: Any, z: Tensor, *, generator: torch.Generator) -> Loss:
        grid = torch.linspace(-5, 5, 201)[:, None, None].to(z)
        return Loss((f(grid) + math.log(0.05)).logsumexp(0) - f(z), {})


def fitted(dropout: float = 0.0) -> er.EnergyRegressionModel:
    model = make_model(dropout=dropout)
    model.fit_preprocessing(X, Y)
    return model


def test_whole_weights_are_repeated_rows_and_zero_weights_absent_ones() -> None:
    counts = torch.arange(N) % 4
    rows = torch.arange(N).repeat_interleave(counts)
    # Double precision, as Adam makes a step of the same size of a gradient that is nothing but rounding.
    settings: dict[str, Any] = {"objective": PlainLikelihood(), "epochs": 3, "precision": "64-true"}
    a = gradients(fitted(), X[rows], Y[rows], **settings)
    b = gradients(fitted(), X, Y, sample_weight=counts, **settings)
    unweighted = gradients(fitted(), X, Y, **settings)
    assert max(float((a[name] - b[name]).abs().max()) for name in a) < 1e-6
    assert max(float((a[name] - unweighted[name]).abs().max()) for name in a) > 1e-3


def test_rows_of_weight_zero_change_nothing_at_all() -> None:
    keep = torch.arange(N) % 3 > 0
    weight = torch.where(keep, torch.rand(N, generator=torch.Generator().manual_seed(1)) + 0.1, 0.0)
    wild = torch.where(keep[:, None], X, 1e6)
    first, second = make_model(), make_model()
    a = fit(first, wild, Y, sample_weight=weight)
    b = fit(second, X[keep], Y[keep], sample_weight=weight[keep])
    assert same(weights(first), weights(second)) and a.validation_nll == b.validation_nll


def test_equal_weights_are_none_and_only_ratios_matter() -> None:
    histories = [
        fit(make_model(), sample_weight=weight)
        for weight in (None, np.full(N, 7.0), 1.0 + torch.arange(N) % 2, 8.0 * (1.0 + torch.arange(N) % 2))
    ]
    assert histories[0].validation_nll == histories[1].validation_nll
    assert histories[2].validation_nll == histories[3].validation_nll != histories[0].validation_nll


def test_validation_nll_is_weighted() -> None:
    x_val, y_val = table(50, 1)
    weight = torch.arange(50) % 3
    model = make_model()
    history = fit(model, validation=(x_val, y_val, weight), epochs=2)
    log_prob = model(x_val).log_prob(y_val).double()
    expected = -float((log_prob * weight).sum() / weight.sum())
    assert history.best_validation_nll == pytest.approx(expected, abs=1e-5)
    assert abs(expected + float(log_prob.mean())) > 1e-3


def test_weighted_training_resumes_exactly_and_refuses_other_weights(tmp_path: Path) -> None:
    weight = 1.0 + torch.arange(N) % 3
    straight, resumed = make_model(), make_model()
    fit(straight, sample_weight=weight, objective=Sabotage(0, interrupt))
    with pytest.warns(UserWarning, match="interrupted"):
        fit(resumed, sample_weight=weight, objective=Sabotage(5, interrupt), checkpoint_dir=tmp_path)
    again = make_model()
    with pytest.raises(er.CheckpointError, match="training data: the values are others"):
        fit(again, objective=Sabotage(0, interrupt), sample_weight=weight**2, checkpoint_dir=tmp_path, resume=True)
    fit(again, sample_weight=weight, objective=Sabotage(0, interrupt), checkpoint_dir=tmp_path, resume=True)
    assert same(weights(straight), weights(again))


@pytest.mark.parametrize(
    ("weight", "message"),
    [
        (np.ones(3), r"sample_weight has shape \(3,\); expected \(200,\), one weight for each row"),
        (np.ones((N, 1)), r"sample_weight has shape \(200, 1\)"),
        (np.where(np.arange(N) == 4, -1.0, 1.0), r"sample_weight has -1\.0 in row 4; expected finite numbers ≥ 0"),
        (np.where(np.arange(N) == 7, np.nan, 1.0), "sample_weight has nan in row 7"),
        (np.zeros(N), "sample_weight is 0 in every row"),
        (np.where(np.arange(N) == 7, 1.0, 0.0), "x has 1 row with a weight above 0; expected at least 2"),
        (["much"] * N, "sample_weight is a list; expected numbers, one a row"),
    ],
)
def test_wrong_weights_are_refused(weight: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        fit(make_model(), sample_weight=weight)


def test_weights_need_arrays() -> None:
    loader = DataLoader(TensorDataset(X, Y), batch_size=50)
    with pytest.raises(ValueError, match=r"sample_weight is given, but x is a DataLoader.*WeightedRandomSampler"):
        fit(make_model(), loader, None, batch_size=None, sample_weight=np.ones(N))


def test_units_of_many_rows_are_learned_on_some_of_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data, "PREPROCESSING_ROWS", 100)
    some, again, all_rows = make_model(), make_model(), make_model()
    fit(some, epochs=1)
    fit(again, epochs=1)
    monkeypatch.undo()
    fit(all_rows, epochs=1)
    assert same(weights(some), weights(again))
    assert not torch.equal(some.encoder.normalizer.knots, all_rows.encoder.normalizer.knots)
    assert torch.equal(some.base.cdf_table, all_rows.base.cdf_table)


# ---------------------------------------------------------------------------------------------- limit of time


class Clock:
    """Time as the test wants it; `training.time` is replaced by it.

    Args:
        validations: Seconds of each validation.
    """

    def __init__(self, *validations: float) -> None:
        self.now, self.steps, self.validations = 100.0, 0, list(validations)

    def perf_counter(self) -> float:
        return self.now

    def __call__(self, f: Any, q: Any, z: Tensor, *, generator: torch.Generator) -> Loss:
        """An objective that takes a second."""
        self.steps += 1
        self.now += 1.0
        return ExactMaximumLikelihood(32)(f, q, z, generator=generator)

    def use(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.undo()
        for module in (training, fitting):
            monkeypatch.setattr(module, "time", self)
        validate = training.Training._validate

        def slow(this: Any, model: Any) -> float:
            self.now += self.validations.pop(0) if self.validations else 0.0
            return validate(this, model)

        monkeypatch.setattr(training.Training, "_validate", slow)


# 4 steps an epoch.
TIMED: dict[str, Any] = {"validation": table(50, 1), "batch_size": 50, "epochs": 10}


def test_time_limit_stops_between_two_steps_with_the_best_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(2.0, 2.0)
    clock.use(monkeypatch)
    model = make_model()
    match = (
        r"stopped after 2 of 4 steps of epoch 2 of 10, as its time of 10\.5 s was up; the model has the weights of ep"
    )
    with pytest.warns(UserWarning, match=match):
        history = fit(model, objective=clock, time_limit=10.5, **TIMED)
    # 4 steps and their validation take 6 s, 2 more with theirs 4; a third would end after the limit.
    assert clock.steps == 6 and clock.now == 110
    assert history.timed_out and not history.interrupted and not history.stopped_early
    assert "out of time" in repr(history)
    assert len(history.validation_nll) == 2
    assert nll(model, *TIMED["validation"]) == pytest.approx(min(history.validation_nll), abs=1e-5)


def test_a_validation_that_would_be_late_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(0.0, 99.0)
    clock.use(monkeypatch)
    model, one = make_model(), make_model()
    with pytest.warns(UserWarning, match="the model has the weights of epoch 1"):
        history = fit(model, objective=clock, time_limit=7, **TIMED)
    assert clock.steps == 6 and len(history.train_loss) == 1 and history.timed_out
    clock = Clock()
    clock.use(monkeypatch)
    with pytest.warns(UserWarning, match="stopped after epoch 1 of 10"):
        fit(one, objective=clock, time_limit=4.5, **TIMED)
    assert same(weights(model), weights(one))


def test_time_limit_within_the_first_epoch_leaves_the_weights_of_the_moment(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock()
    clock.use(monkeypatch)
    model = make_model()
    before = weights(model)
    with pytest.warns(UserWarning, match="the model has the current weights, as no epoch was complete"):
        history = fit(model, objective=clock, time_limit=1e-3, **TIMED)
    assert clock.steps == 1 and history.timed_out and history.train_loss == [] and not model.training
    assert not same(weights(model), before)


def test_without_validation_the_weights_at_the_end_of_the_time_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock()
    clock.use(monkeypatch)
    model = make_model()
    with pytest.warns(UserWarning, match="2 of 4 steps of epoch 2"):
        history = fit(model, objective=clock, time_limit=7, **{**TIMED, "validation": None})
    after_one = make_model()
    clock = Clock()
    clock.use(monkeypatch)
    with pytest.warns(UserWarning, match="stopped after epoch 1 of 10"):
        fit(after_one, objective=clock, time_limit=4.5, **{**TIMED, "validation": None})
    assert len(history.train_loss) == 2 and not same(weights(model), weights(after_one))


def test_a_limit_that_is_not_reached_changes_nothing() -> None:
    first, second = make_model(), make_model()
    history = fit(first, time_limit=3600)
    fit(second)
    assert same(weights(first), weights(second)) and not history.timed_out


def test_a_run_out_of_time_resumes_to_the_very_weights_of_a_straight_one(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    straight, resumed = make_model(), make_model()
    settings = {**TIMED, "epochs": 4}
    fit(straight, **settings)
    now = iter(range(100, 10_000))
    for module in (training, fitting):
        monkeypatch.setattr(module, "time", type("Ticks", (), {"perf_counter": staticmethod(lambda: float(next(now)))}))
    with pytest.warns(UserWarning, match=r"Call fit\(\.\.\., resume=True\) to continue"):
        fit(resumed, time_limit=30, checkpoint_dir=tmp_path, **settings)
    monkeypatch.undo()
    again = make_model()
    history = fit(again, checkpoint_dir=tmp_path, resume=True, **settings)
    assert same(weights(straight), weights(again)) and len(history.train_loss) == 4


@pytest.mark.parametrize("limit", [0, -1.0, "long", True, float("nan")])
def test_a_wrong_time_limit_is_refused(limit: Any) -> None:
    with pytest.raises(ValueError, match=r"time_limit is .*; expected a number of seconds > 0, or None"):
        fit(make_model(), time_limit=limit)
