"""How trainings end and begin in a rough world: SIGTERM, a full temporary folder, units that nobody fitted."""

import os
import signal
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import energyreg as er


def test_sigterm_ends_a_training_as_an_interrupt_does(tmp_path: Path) -> None:
    model, before = er.EnergyRegressionModel.for_table(2, width=8), signal.getsignal(signal.SIGTERM)
    losses = []

    def objective(f: Any, q: Any, z: Tensor, generator: Any) -> Tensor:
        losses.append(1)
        if len(losses) == 6:
            os.kill(os.getpid(), signal.SIGTERM)
        return er.objectives.ExactMaximumLikelihood()(f, q, z, generator=generator).per_example

    x = torch.rand(64, 2)
    with pytest.warns(UserWarning, match="was interrupted in epoch 3"):
        history = er.fit(
            model, x, x[:, 0], objective=objective, batch_size=32, validation=None, epochs=50, checkpoint_dir=tmp_path
        )
    assert history.interrupted and len(history.train_loss) == 2
    assert signal.getsignal(signal.SIGTERM) is before
    assert [path.name for path in tmp_path.iterdir()] == ["last.safetensors"]


def test_a_training_in_one_process_needs_no_temporary_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr(tempfile, "mkdtemp", full)
    x = torch.rand(64, 2)
    assert len(er.fit(er.EnergyRegressionModel.for_table(2, width=8), x, x[:, 0], epochs=1).train_loss) == 1


def test_an_own_loop_without_fitted_units_is_warned() -> None:
    model, x = er.EnergyRegressionModel.for_table(2, width=8), torch.rand(64, 2)
    y = 1e5 + torch.rand(64, 1)
    with pytest.warns(UserWarning, match=r"fit_preprocessing\(x, y\)"):
        model.condition(x, y)
    with pytest.warns(UserWarning, match=r"1e\+05 from 0 in model space"):
        model.eval()(x).log_prob(y)
    model.fit_preprocessing(x, y)
    assert bool(model(x).log_prob(y).isfinite().all())
