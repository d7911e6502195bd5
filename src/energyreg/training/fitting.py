"""`fit` trains a model in place, by an objective over data, on Lightning Fabric."""

from __future__ import annotations

import contextlib
import errno
import os
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import nn

from energyreg import files
from energyreg.models import checkpoint
from energyreg.modes import make_trainable, with_gradients
from energyreg.randomness import RandomSource, mix
from energyreg.training.data import Examples, TrainingData, prepare
from energyreg.training.devices import device_of, make_fabric, quiet_fabric
from energyreg.training.history import History
from energyreg.training.loop import Job, Training
from energyreg.training.settings import SUBSET, TrainingSettings
from energyreg.training.step import has_unused_parameters
from energyreg.training.trainable import Trainable, check_trainable

if TYPE_CHECKING:
    from lightning_fabric import Fabric

__all__ = ["fit"]


@with_gradients
def fit(
    model: Trainable,
    x: Any,
    y: Any = None,
    *,
    sample_weight: Any = None,
    objective: Any = None,
    validation: Any = "auto",
    epochs: int = 100,
    batch_size: int | None = None,
    learning_rate: float = 3e-3,
    weight_decay: float = 1e-2,
    schedule: str = "one-cycle",
    gradient_clip: float | None = 10.0,
    averaging: float | None = None,
    patience: int | None = None,
    time_limit: float | None = None,
    seed: int = 0,
    checkpoint_dir: str | os.PathLike[str] | None = None,
    resume: bool = False,
    progress: bool | None = None,
    accelerator: Any = None,
    devices: Any = 1,
    precision: Any = "32-true",
    strategy: Any = "auto",
) -> History:
    """Train a model in place; it is left in evaluation mode with its best weights, on the device of the training.

    The encoder, base and target space are fitted to the training rows first (`model.fit_preprocessing`), unless the
    model has been fitted before: then its units stay as they are and its weights are trained further. The optimiser is
    AdamW, with weight decay on matrices only.

    With validation data, the NLL of `model(x_val)` is computed after each epoch, in evaluation mode, and the weights of
    the best epoch are restored at the end. The default schedule needs all its epochs to anneal the learning rate, so by
    default nothing stops earlier; `patience` does, and is meant for the constant schedule or for saving time.

    Ctrl-C or SIGTERM ends the training: the model has its best weights so far, a warning says so, and
    `History.interrupted` is True. `time_limit` ends it in the same way between two steps, with `History.timed_out`; the
    current weights are judged on the validation data once more before that, where the time suffices.

    Several processes (`devices=2`, or a script under torchrun with `devices` to match): every process takes its share
    of each batch, and the gradients are those of one process on the whole batch. A DataLoader is different, as always
    in PyTorch: its batch size is that of each process.

    Args:
        model: The model to train: an EnergyRegressionModel, or anything that is `Trainable`.
        x: Inputs: an array, tensor or data frame with N rows, or a DataLoader that yields pairs (x, y) of tensors;
            `batch_size` is the loader's own then. A loader is read once before the training, for the units of y (and x,
            where the encoder is fitted). To resume exactly it must shuffle by PyTorch's global random state, not by a
            generator of its own.
        y: Targets in user units, shape (N, D), or (N,) for D = 1. None with a DataLoader.
        sample_weight: Weight of each row, shape (N,), finite and ≥ 0: the losses' mean and the validation NLL are
            weighted by them, divided by their mean over the training rows and over the validation rows. A whole number
            counts a row as often; rows with 0 are left out before anything else. The units of x and y, and the base,
            are fitted to the rows without weights. Not for a DataLoader.
        objective: What to minimise, such as `energyreg.objectives.ExactMaximumLikelihood()`; the model's default by
            default.
        validation: The fraction of rows to hold out (chosen by `seed`), or (x_val, y_val), or (x_val, y_val, weights),
            or a DataLoader, or None. By default 0.1 with arrays, and None with a DataLoader.
        epochs: Passes over the training rows.
        batch_size: Rows per step, over all processes. By default 256, and for fewer than 6,400 rows the power of two
            from 32 on that makes 25 steps an epoch or more. Rows that do not fill a last batch are left out of that
            epoch; fewer rows than this are one batch.
        learning_rate: Peak learning rate.
        weight_decay: Weight decay of AdamW.
        schedule: "one-cycle" (up over the first 10 % of the steps, then down to almost 0), "cosine" (down from the
            start) or "constant".
        gradient_clip: Largest norm of the gradient; None for no limit.
        averaging: η ≥ 0 to judge and keep, instead of the current weights, their average over all steps so far,
            in which step t counts in proportion to about t^η (polynomial-decay averaging: Shamir and Zhang,
            "Stochastic gradient descent for non-smooth optimization", ICML 2013); 8 averages over the last ninth of the
            steps, mostly. It smooths the noise of the steps while the learning rate is high. None for no average.
            Running statistics, as of batch normalisation, stay the current ones.
        patience: Stop after this many epochs without a lower validation NLL; None for never.
        time_limit: Seconds that the call may take, about; None for no limit. No step is begun that would probably end
            after it (but one is made at least), nor a validation that would. The schedule stays that of all epochs, so
            choose `epochs` such that the limit is not needed. Several processes look at the clock every 32 steps.
        seed: Seed of all randomness; the same seed gives the same result on the same kind of device.
        checkpoint_dir: Folder for a checkpoint after each epoch, ``last.safetensors``; one from an earlier run is
            replaced unless `resume` is True.
        resume: Continue from the checkpoint in `checkpoint_dir`, to the same final weights as a run without
            interruption. Settings and data must be the same. Without a checkpoint the training starts afresh; a
            finished one returns at once.
        progress: True for a progress bar, or a line of text now and then where there is no terminal; None for a bar on
            a terminal only; False for silence.
        accelerator: "cpu", "cuda" or "auto", as in Lightning Fabric; None for the device that the model is on.
        devices: How many devices, or a list of their numbers, as in Fabric.
        precision: "32-true", "64-true" (which leaves the model in float64), "bf16-mixed" or "16-mixed".
        strategy: "auto", "ddp", "ddp_spawn", "ddp_notebook" or a strategy object, as in Fabric.

    Returns:
        Losses, validation NLL, learning rates, times and diagnostics per epoch.

    Raises:
        ValueError: If data or arguments cannot be used; the message says which, why, and what to do. Nothing is changed
            then.
        TrainingError: If a loss or gradient is not finite or the loss explodes.
        energyreg.CheckpointError: If resume finds a damaged checkpoint, or one of other settings or
        data. OSError: If `checkpoint_dir` cannot be written, or has no room.
    """
    started = time.perf_counter()
    settings = TrainingSettings(
        objective=objective, epochs=epochs, batch_size=batch_size, learning_rate=learning_rate,
        weight_decay=weight_decay, schedule=schedule, gradient_clip=gradient_clip, averaging=averaging,
        patience=patience, time_limit=time_limit, seed=seed, checkpoint_dir=checkpoint_dir, resume=resume,
        progress=progress, accelerator=accelerator, devices=devices, precision=precision, strategy=strategy,
    )  # fmt: skip
    data = ready(model, Examples(x, y, sample_weight, validation), settings)
    return train(model, data, settings, started)[0]


def ready(model: Trainable, examples: Examples, settings: TrainingSettings, num_members: int = 1) -> TrainingData:
    """Check all that can be checked, then fit the model's preprocessing, where that is left to do.

    Args:
        model: The model, or the first member of an ensemble.
        examples: What to learn from.
        settings: How.
        num_members: How many models will be trained.

    Raises:
        ValueError: If model, examples or settings cannot be used; nothing is changed then.
        OSError: If there is no room for checkpoints.
    """
    check_trainable(model)
    make_trainable(cast(nn.Module, model))
    make_fabric(*device_of(model, settings), settings)  # wrong arguments should fail before the data are read
    with RandomSource(mix(settings.seed, SUBSET)).everywhere(), quiet_fabric():
        data = prepare(model, examples, settings.batch_size, settings.seed)
        if settings.patience is not None and data.validation is None:
            raise ValueError("patience needs validation data; pass validation=(x_val, y_val), or patience=None.")
        if settings.checkpoint_dir is not None:
            size = sum(tensor.nbytes for tensor in model.state_dict().values())
            check_folder(Path(settings.checkpoint_dir), 5 * num_members * size)
        if data.units is not None:
            model.fit_preprocessing(*data.units)
    return data


def train(
    model: Trainable,
    data: TrainingData,
    settings: TrainingSettings,
    started: float,
    training: Callable[[Fabric, Job], Training] = Training,
    num_members: int = 1,
) -> list[History]:
    """Train a model that is ready.

    Args:
        model: The model, or one that stands for several.
        data: What it reads.
        settings: How.
        started: When the caller began, for the time limit.
        training: Makes the loop.
        num_members: How many models it stands for.

    Returns:
        What happened, one entry a member.
    """
    settings = replace(settings, batch_size=data.batch_size)
    objective = model.default_objective() if settings.objective is None else settings.objective
    source = RandomSource(mix(settings.seed, SUBSET))
    with source.in_use(), quiet_fabric(), contextlib.ExitStack() as stack:
        place = device_of(model, settings)
        fabric = make_fabric(*place, settings, in_memory=data.in_memory)
        if fabric.world_size > 1:
            data.check_processes(fabric.world_size)
            with source.everywhere():
                unused = has_unused_parameters(model, objective, data.training.sample())
            fabric = make_fabric(*place, settings, find_unused_parameters=unused)
        scratch = None
        if getattr(getattr(fabric, "strategy", None), "launcher", None) is not None:  # other processes will train
            folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="energyreg-"))
            scratch = Path(folder) / "result.safetensors"
        job = Job(model, objective, data, settings, started, num_members, os.getpid(), scratch)
        histories = fabric.launch(partial(_run, job=job, training=training))
        if histories is None:
            assert scratch is not None
            trained, state = checkpoint.load_training_state(scratch)
            histories = [History(**state)]
            module = cast(nn.Module, model)
            module.to(torch.float64 if settings.precision == "64-true" else model.dtype)
            module.load_state_dict(trained)
            module.eval()
    return histories


def _run(fabric: Fabric, job: Job, training: Callable[[Fabric, Job], Training]) -> list[History] | None:
    histories = training(fabric, job).run()
    if os.getpid() == job.process:
        return histories
    # A strategy that spawns or forks has trained a copy of the model. Its result travels back by a file: the queue that
    # Fabric has for it blocks where the result is larger than a pipe's buffer.
    if fabric.is_global_zero and job.scratch is not None:
        checkpoint.save_training_state(job.scratch, job.model.state_dict(), histories[0].to_dict())
    return None


def check_folder(folder: Path, size: int) -> None:
    """Find out before the training whether checkpoints can be written: there is nothing to lose yet."""
    if folder.exists() and not folder.is_dir():
        raise NotADirectoryError(errno.ENOTDIR, "checkpoint_dir is a file; expected a folder", str(folder))
    files.check_room(folder / "trial", size, named=folder)
