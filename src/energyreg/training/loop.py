"""Training: `fit` runs an objective over data on Lightning Fabric and returns a `History`.

Randomness: the order of the rows depends on (seed, epoch), the noise of the objective on (seed, step), dropout on
(seed, epoch, process). So there is no random state to store, and a resumed run continues as if nothing had happened;
the global random state of the caller is left as it was.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import hashlib
import logging
import math
import os
import secrets
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset

from energyreg import files
from energyreg.models import checkpoint
from energyreg.models.model import EnergyRegressionModel
from energyreg.objectives.contract import NonFiniteLossError
from energyreg.progress import TrainingProgress, duration
from energyreg.randomness import caller_random_state, mix, seed_global

if TYPE_CHECKING:
    from lightning_fabric import Fabric
    from matplotlib.figure import Figure

__all__ = ["History", "TrainingError", "TrainingStep", "fit"]

SCHEDULES = ("one-cycle", "cosine", "constant")
# Half weights would round the target's scale and the energies themselves; mixed precision keeps both.
PRECISIONS = ("32-true", "64-true", "bf16-mixed", "16-mixed")
# Losses are nats of standardised targets, where a sane model is within a few tens.
EXPLOSION = 1e6
# Steps between two looks at the losses where a look would make the host wait for the device.
WINDOW = 32
LAST = "last.safetensors"
# Purposes of randomness, so that no two draw the same numbers.
SPLIT, ORDER, NOISE, DROPOUT, EVALUATION, SUBSET = range(6)


LARGEST_BATCH = 256
"""Rows per step by default, where there are enough of them."""
VALIDATION_BYTES = 2**25
"""Working memory of the validation."""
PREPROCESSING_ROWS = 200_000
"""Rows that the units of x are fitted to, at most: more would cost memory, and change no quantile that matters."""
PREPROCESSING_BYTES = 2**24
"""Their size in float64, at most; but 20,000 rows in any case."""


class TrainingError(RuntimeError):
    """Training cannot go on, as a loss or gradient is not finite or the loss explodes."""


# ---------------------------------------------------------------------------------------------- what comes back


@dataclass(repr=False)
class History:
    """What happened in a training, one entry an epoch; epochs count from 1.

    Attributes:
        train_loss: Mean loss over the epoch's batches, in nats of the model space (with dropout, noise and all).
        validation_nll: Mean of -log p(y|x) on the validation data after the epoch, in nats and user units; empty
            without validation data.
        learning_rate: Learning rate at the end of the epoch.
        seconds: Duration of the epoch, validation included.
        diagnostics: The objective's diagnostics by name, means over the epoch.
        best_epoch: Epoch with the lowest validation NLL, whose weights the model has; None without validation data.
        stopped_early: Whether `patience` ended the training.
        interrupted: Whether a KeyboardInterrupt did.
        timed_out: Whether `time_limit` did; the last epoch is part of one then, unless it was just complete.
        total_seconds: Duration of all, preparation and resumed parts included.
    """

    train_loss: list[float] = field(default_factory=list)
    validation_nll: list[float] = field(default_factory=list)
    learning_rate: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    diagnostics: dict[str, list[float]] = field(default_factory=dict)
    best_epoch: int | None = None
    stopped_early: bool = False
    interrupted: bool = False
    total_seconds: float = 0.0
    timed_out: bool = False

    @property
    def best_validation_nll(self) -> float | None:
        """Validation NLL of the best epoch, in nats and user units; None without validation data."""
        return None if self.best_epoch is None else self.validation_nll[self.best_epoch - 1]

    def to_dict(self) -> dict[str, Any]:
        """All attributes as plain lists and numbers, for JSON."""
        return dataclasses.asdict(self)

    def plot(self, ax: Any = None) -> Figure:
        """Draw the training loss and the validation NLL against the epoch.

        The two differ by a constant (the loss is in model space) and by dropout, so compare their shapes, not their
        levels.

        Args:
            ax: Matplotlib axes to draw into; by default a new figure.

        Returns:
            The figure.

        Raises:
            ImportError: Matplotlib is not installed; ``pip install 'energyreg[tables]'`` brings it.
            ValueError: There is no completed epoch.
        """
        from energyreg import plots

        if not self.train_loss:
            raise ValueError("There is nothing to plot: no epoch was completed.")
        curves = {"training loss": _Curve(self.train_loss)}
        if self.validation_nll:
            curves["validation NLL"] = _Curve(self.validation_nll)
        return plots.learning_curves(curves, quantity="values", label="nats", ax=ax)

    def __repr__(self) -> str:
        parts = [f"{len(self.train_loss)} epochs in {duration(self.total_seconds)}"]
        if self.train_loss:
            parts.append(f"training loss {self.train_loss[-1]:.4f}")
        if self.best_epoch is not None:
            parts.append(f"best validation NLL {self.best_validation_nll:.4f} nats in epoch {self.best_epoch}")
        if self.stopped_early or self.interrupted or self.timed_out:
            parts.append(
                "stopped early" if self.stopped_early else "interrupted" if self.interrupted else "out of time"
            )
        return f"History({', '.join(parts)})"


@dataclass
class _Curve:
    values: list[float]


# ---------------------------------------------------------------------------------------------- the public function


def fit(
    model: EnergyRegressionModel,
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

    Ctrl-C ends the training: the model has its best weights so far, a warning says so, and `History.interrupted` is
    True. `time_limit` ends it in the same way between two steps, with `History.timed_out`; the weights of the moment
    are judged on the validation data once more before that, where the time suffices.

    Several processes (`devices=2`, or a script under torchrun with `devices` to match): every process takes its share
    of each batch, and the gradients are those of one process on the whole batch. A DataLoader is different, as always
    in PyTorch: its batch size is that of each process.

    Args:
        model: The model to train.
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
        averaging: η ≥ 0 to judge and keep, instead of the weights of the moment, their average over all steps so far,
            in which step t counts in proportion to about t^η (polynomial-decay averaging: Shamir and Zhang,
            "Stochastic gradient descent for non-smooth optimization", ICML 2013); 8 averages over the last ninth of the
            steps, mostly. It smooths the noise of the steps while the learning rate is high. None for no average.
            Running statistics, as of batch normalisation, stay those of the moment.
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
    return _fit(
        model, x, y, sample_weight=sample_weight, objective=objective, validation=validation, epochs=epochs,
        batch_size=batch_size, learning_rate=learning_rate, weight_decay=weight_decay, schedule=schedule,
        gradient_clip=gradient_clip, averaging=averaging, patience=patience, time_limit=time_limit, seed=seed,
        checkpoint_dir=checkpoint_dir, resume=resume, progress=progress, accelerator=accelerator, devices=devices,
        precision=precision, strategy=strategy,
    )[0]  # fmt: skip


class _Assemble(Protocol):
    """Makes one model of many, whose rows are those of the members, one member after the other."""

    num_members: int

    def __call__(self, preprocessing: tuple[Tensor | None, Tensor] | None, data: _Data) -> EnergyRegressionModel: ...

    def training(self, fabric: Fabric, job: _Job) -> _Training: ...


def _fit(
    model: EnergyRegressionModel,
    x: Any,
    y: Any,
    *,
    sample_weight: Any,
    time_limit: float | None,
    objective: Any,
    validation: Any,
    epochs: int,
    batch_size: int | None,
    learning_rate: float,
    weight_decay: float,
    schedule: str,
    gradient_clip: float | None,
    averaging: float | None,
    patience: int | None,
    seed: int,
    checkpoint_dir: str | os.PathLike[str] | None,
    resume: bool,
    progress: bool | None,
    accelerator: Any,
    devices: Any,
    precision: Any,
    strategy: Any,
    assemble: _Assemble | None = None,
) -> list[History]:
    """What `fit` does, for one model, or for many that `assemble` joins once the preprocessing of `model` is fitted."""
    started = time.perf_counter()
    weights = _checked_weights(sample_weight, x, y)
    if batch_size is None:
        batch_size = _default_batch_size(y if weights is None else weights[weights > 0])
    settings = _Settings(
        epochs, batch_size, learning_rate, weight_decay, schedule, gradient_clip, averaging, patience, seed,
        str(precision),
    )  # fmt: skip
    _check_progress_and_resume(progress, resume, checkpoint_dir)
    _check_time_limit(time_limit)
    if not isinstance(model, nn.Module) or not hasattr(model, "condition"):
        raise ValueError(f"model is a {type(model).__name__}; expected an EnergyRegressionModel.")
    objective = model.default_objective() if objective is None else objective
    if not callable(objective):
        raise ValueError(
            f"objective is a {type(objective).__name__}; expected an object such as energyreg.objectives."
            "ExactMaximumLikelihood(), to be called as objective(f, q, z, generator=...)."
        )
    accelerator, devices = _device_of(model, accelerator, devices)
    _make_fabric(accelerator, devices, precision, strategy)  # wrong arguments should fail before the data are read
    with caller_random_state(), _quiet_fabric():
        data, validation_data, preprocessing = _prepare(model, x, y, weights, validation, settings)
        if patience is not None and validation_data is None:
            raise ValueError("patience needs validation data; pass validation=(x_val, y_val), or patience=None.")
        folder = None if checkpoint_dir is None else Path(checkpoint_dir)
        if folder is not None:
            members = 1 if assemble is None else assemble.num_members
            _check_folder(folder, 5 * members * sum(tensor.nbytes for tensor in model.state_dict().values()))
        if preprocessing is not None:
            model.fit_preprocessing(*preprocessing)
        if assemble is not None:
            model = assemble(preprocessing, data)
        fabric = _make_fabric(accelerator, devices, precision, strategy)
        if fabric.world_size > 1:
            _check_processes(fabric.world_size, data, settings)
            unused = _has_unused_parameters(model, objective, data)
            fabric = _make_fabric(accelerator, devices, precision, strategy, find_unused_parameters=unused)
        with tempfile.TemporaryDirectory(prefix="energyreg-") as scratch:
            result = Path(scratch) / "result.safetensors"
            job = _Job(
                model,
                objective,
                data,
                validation_data,
                settings,
                folder,
                resume,
                progress,
                started,
                os.getpid(),
                result,
                _Training if assemble is None else assemble.training,
                1 if assemble is None else assemble.num_members,
                None if time_limit is None else float(time_limit),
            )
            histories = fabric.launch(partial(_run, job=job))
            if histories is None:
                trained, state = checkpoint.load_training_state(result)
                histories = [History(**state)]
                model.to(torch.float64 if settings.precision == "64-true" else model.dtype)
                model.load_state_dict(trained)
                model.eval()
    return histories


def _run(fabric: Fabric, job: _Job) -> list[History] | None:
    histories = job.training(fabric, job).run()
    if os.getpid() == job.process:
        return histories
    # A strategy that spawns or forks has trained a copy of the model. Its result travels back by a file: the queue that
    # Fabric has for it blocks where the result is larger than a pipe's buffer.
    if fabric.is_global_zero:
        checkpoint.save_training_state(job.scratch, job.model.state_dict(), histories[0].to_dict())
    return None


# ---------------------------------------------------------------------------------------------- arguments


@dataclass(frozen=True)
class _Settings:
    epochs: int
    batch_size: int
    learning_rate: float
    weight_decay: float
    schedule: str
    gradient_clip: float | None
    averaging: float | None
    patience: int | None
    seed: int
    precision: str

    def __post_init__(self) -> None:
        for name in ("epochs", "batch_size", "patience"):
            value = getattr(self, name)
            if name == "patience" and value is None:
                continue
            if isinstance(value, bool) or not isinstance(value, (int, np.integer)) or value < 1:
                raise ValueError(f"{name} is {value!r}; expected a whole number of at least 1.")
        if isinstance(self.seed, bool) or not isinstance(self.seed, (int, np.integer)):
            raise ValueError(f"seed is {self.seed!r}; expected a whole number.")
        for name, positive in (
            ("learning_rate", True), ("weight_decay", False), ("gradient_clip", True), ("averaging", False),
        ):  # fmt: skip
            value = getattr(self, name)
            if name in ("gradient_clip", "averaging") and value is None:
                continue
            if (
                not isinstance(value, (int, float, np.number))
                or not math.isfinite(value)
                or not (value > 0 or (value == 0 and not positive))
            ):
                raise ValueError(f"{name} is {value!r}; expected a finite number {'> 0' if positive else '≥ 0'}.")
        if self.schedule not in SCHEDULES:
            raise ValueError(f"schedule is {self.schedule!r}; expected one of {', '.join(map(repr, SCHEDULES))}.")
        if self.precision not in PRECISIONS:
            raise ValueError(
                f"precision is {self.precision!r}; expected one of {', '.join(map(repr, PRECISIONS))} (weights stay in "
                "float32 or float64: half precision would round densities and target scales)."
            )


def _check_progress_and_resume(progress: Any, resume: Any, checkpoint_dir: Any) -> None:
    if progress is not None and not isinstance(progress, bool):
        raise ValueError(f"progress is {progress!r}; expected True, False or None.")
    if not isinstance(resume, bool):
        raise ValueError(f"resume is {resume!r}; expected True or False; the folder goes to checkpoint_dir=.")
    if resume and checkpoint_dir is None:
        raise ValueError("resume=True needs checkpoint_dir=, the folder where the checkpoints of the earlier run are.")


def _check_time_limit(time_limit: Any) -> None:
    fine = isinstance(time_limit, (int, float, np.number)) and not isinstance(time_limit, (bool, np.bool_))
    if time_limit is not None and not (fine and time_limit > 0):
        raise ValueError(f"time_limit is {time_limit!r}; expected a number of seconds > 0, or None.")


def _checked_weights(sample_weight: Any, x: Any, y: Any, name: str = "sample_weight") -> Tensor | None:
    """Weights of the rows as float64, shape (N,), some of them above 0; None if there are none."""
    if sample_weight is None:
        return None
    if isinstance(x, DataLoader):
        raise ValueError(
            f"{name} is given, but x is a DataLoader, which yields pairs (x, y). Pass arrays, or draw rows by their "
            "weights with torch.utils.data.WeightedRandomSampler."
        )
    try:
        values = sample_weight.detach().cpu() if isinstance(sample_weight, Tensor) else np.asarray(sample_weight)
        weights = torch.as_tensor(np.asarray(values, dtype=np.float64))
    except (TypeError, ValueError) as error:
        raise ValueError(f"{name} is a {type(sample_weight).__name__}; expected numbers, one a row: {error}.") from None
    rows = len(y) if hasattr(y, "__len__") else None
    if weights.ndim != 1 or (rows is not None and len(weights) != rows):
        raise ValueError(f"{name} has shape {tuple(weights.shape)}; expected ({rows},), one weight for each row.")
    bad = ~(weights.isfinite() & (weights >= 0))
    if bool(bad.any()):
        row = int(bad.nonzero()[0])
        raise ValueError(f"{name} has {float(weights[row])} in row {row}; expected finite numbers ≥ 0.")
    if not bool((weights > 0).any()):
        raise ValueError(f"{name} is 0 in every row; expected a number above 0 for some.")
    return weights


def _device_of(model: nn.Module, accelerator: Any, devices: Any) -> tuple[Any, Any]:
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise ValueError(
            "The model has no parameters to train: all are frozen (requires_grad=False), or there are none."
        )
    if accelerator is not None:
        return accelerator, devices
    device = next(model.parameters()).device
    index_matters = device.index is not None and devices == 1 and not isinstance(devices, bool)
    return device.type, [device.index] if index_matters else devices


def _make_fabric(
    accelerator: Any, devices: Any, precision: Any, strategy: Any, find_unused_parameters: bool | None = None
) -> Fabric:
    """Fabric; find_unused_parameters is for a DDP strategy given by its name, None where it does not matter yet."""
    from lightning_fabric import Fabric
    from lightning_fabric.strategies.ddp import DDPStrategy

    arguments: dict[str, Any] = {
        "accelerator": accelerator,
        "devices": devices,
        "precision": precision,
        "strategy": strategy,
    }
    with _quiet_fabric():
        try:
            fabric = Fabric(**arguments)
        except Exception as error:
            culprit = _culprit(arguments)
            raise ValueError(f"{culprit} cannot be used: {error}") from error
        if fabric.device.type == "mps":
            raise ValueError(
                f"accelerator={accelerator!r} means Apple's GPU here, which has no float64; pass accelerator='cpu'."
            )
        if find_unused_parameters and isinstance(strategy, str) and isinstance(fabric.strategy, DDPStrategy):
            notebook = fabric.strategy.launcher is not None and fabric.strategy.launcher.is_interactive_compatible
            method: Any = {"ddp_spawn": "spawn"}.get(strategy, "fork" if notebook else "popen")
            arguments["strategy"] = DDPStrategy(start_method=method, find_unused_parameters=True)
            fabric = Fabric(**arguments)
    return fabric


def _culprit(arguments: dict[str, Any]) -> str:
    """The argument that Fabric refuses by itself, or all of them."""
    from lightning_fabric import Fabric

    alone: dict[str, Any] = {"accelerator": "cpu", "devices": 1, "precision": "32-true", "strategy": "auto"}
    tried = dict(alone)
    for name in ("accelerator", "precision", "devices", "strategy"):
        tried[name] = arguments[name]
        try:
            Fabric(**tried)
        except Exception:
            return f"{name}={arguments[name]!r}"
    return ", ".join(f"{name}={value!r}" for name, value in arguments.items())


def _check_folder(folder: Path, size: int) -> None:
    """Find out before the training whether checkpoints can be written: there is nothing to lose yet."""
    if folder.exists() and not folder.is_dir():
        raise NotADirectoryError(errno.ENOTDIR, "checkpoint_dir is a file; expected a folder", str(folder))
    trial = folder / f".trial-{os.getpid()}-{secrets.token_hex(4)}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with open(trial, "xb") as file:
            files.reserve(file, size)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise files.writing_error(folder, error, size) from error
    finally:
        with contextlib.suppress(OSError):
            trial.unlink(missing_ok=True)


def _check_processes(world_size: int, data: _Data, settings: _Settings) -> None:
    if isinstance(data, _Rows):
        size = min(settings.batch_size, len(data.y))
        if size < world_size:
            raise ValueError(f"A batch has {size} rows, which {world_size} processes cannot share; use fewer devices.")
    elif isinstance(data, _Loader) and isinstance(data.loader.dataset, IterableDataset):
        raise ValueError(
            "x is a DataLoader over an IterableDataset, which every process would read from start to end. Use one "
            "device, or a dataset with indices."
        )


# ---------------------------------------------------------------------------------------------- surroundings


@contextlib.contextmanager
def _quiet_fabric() -> Iterator[None]:
    logger = logging.getLogger("lightning_fabric")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", module=r"lightning_(fabric|utilities)")
            yield
    finally:
        logger.setLevel(level)


# ---------------------------------------------------------------------------------------------- data


class _Batch:
    """One step's data.

    No tensor and no container, so that Fabric neither rounds y to half precision nor walks through it.

    Attributes:
        x: Inputs of this process, (b, ...).
        y: Targets of this process in user units, (b, D).
        share: Weight of each row's loss here, such that the mean over the processes is the mean over the whole batch;
            one for all, or of shape (b,).
        rows: Row numbers in the caller's data; None for a DataLoader.
        loss: Filled by the training step: the weighted sum of the losses of each member's rows, (S,), S = 1 where one
            model is trained; without gradient, before Fabric rounds it to float32.
        per_example: The same: the losses, (b,).
        diagnostics: The same: the objective's diagnostics.
        finite: Whether all of x is finite, where that is not known beforehand.
        reason: What the objective says of a loss that is not finite.
    """

    __slots__ = ("diagnostics", "finite", "loss", "per_example", "reason", "rows", "share", "x", "y")

    loss: Tensor
    per_example: Tensor

    def __init__(self, x: Any, y: Tensor, share: float | Tensor, rows: Tensor | None) -> None:
        self.x, self.y, self.share, self.rows = x, y, share, rows
        self.finite: Tensor | None = None
        self.reason: str | None = None
        self.diagnostics: dict[str, Tensor] = {}

    def part(self, member: int, num_members: int) -> _Batch:
        """The rows of one member of an ensemble, after the step."""
        if num_members == 1:
            return self
        size = len(self.y) // num_members
        rows = slice(member * size, (member + 1) * size)
        x = self.x[rows] if isinstance(self.x, Tensor) else self.x
        share = self.share[rows] if isinstance(self.share, Tensor) else self.share
        part = _Batch(x, self.y[rows], share, None if self.rows is None else self.rows[rows])
        part.finite, part.reason = self.finite, self.reason
        part.loss, part.per_example = self.loss[member : member + 1], self.per_example[rows]
        part.diagnostics = {name: value[rows] for name, value in self.diagnostics.items() if len(value) == len(self.y)}
        return part


class _Data(Protocol):
    def num_batches(self) -> int: ...

    def place(self, fabric: Fabric, dtype: torch.dtype) -> None: ...

    def batches(self, epoch: int, settings: _Settings, fabric: Fabric) -> Iterator[_Batch]: ...

    def pairs(self, fabric: Fabric, chunk: int) -> Iterator[tuple[Any, Tensor, Tensor | None]]: ...

    def describe(self) -> dict[str, Any]: ...

    def sample(self) -> tuple[Any, Tensor]: ...


class _Rows:
    """Data in memory: batches are index lookups.

    The members of an ensemble take the rows each in an order of its own, that of a training with its own seed.

    Args:
        x: Inputs, shape (N, ...); they may be mapped from a file, as they are never copied as a whole on the CPU.
        y: Targets, shape (N, D).
        rows: Row numbers in the caller's data.
        batch_size: Rows of a step.
        weights: Weights of the rows, shape (N,), all > 0; they are divided by their mean. None for equal ones.
    """

    def __init__(
        self, x: Tensor, y: Tensor, rows: Tensor | None, batch_size: int, weights: Tensor | None = None
    ) -> None:
        self.x, self.y = x, y
        self.rows = torch.arange(len(y)) if rows is None else rows
        self.batch_size = min(batch_size, len(y))
        self.num_members = 1
        # Equal weights change nothing, not even the last digit.
        equal = weights is None or bool((weights == weights[0]).all())
        self.weights = None if weights is None or equal else weights / weights.mean()
        self.description: dict[str, Any] | None = None

    def num_batches(self) -> int:
        return len(self.y) // self.batch_size

    def place(self, fabric: Fabric, dtype: torch.dtype) -> None:
        x, y = self.x.to(dtype) if self.x.is_floating_point() else self.x, self.y
        # All at once where it fits with ease; then no step waits for a transfer.
        if fabric.device.type != "cuda" or x.nbytes + y.nbytes < torch.cuda.mem_get_info(fabric.device)[0] // 4:
            x, y = fabric.to_device(x), fabric.to_device(y)
        self.x, self.y = x, y
        self.weights = None if self.weights is None else self.weights.to(y.device)

    def batches(self, epoch: int, settings: _Settings, fabric: Fabric) -> Iterator[_Batch]:
        seeds = [mix(settings.seed + member, ORDER, epoch) for member in range(self.num_members)]
        orders = [torch.randperm(len(self.y), generator=torch.Generator().manual_seed(seed)) for seed in seeds]
        order = torch.stack(orders)
        world, share = fabric.world_size, fabric.world_size / self.batch_size
        index = order.to(self.x.device)
        there = self.x.device == fabric.device
        for start in range(0, self.num_batches() * self.batch_size, self.batch_size):
            rows = slice(start + fabric.global_rank, start + self.batch_size, world)
            chosen = index[:, rows].flatten()
            x, y = self.x.index_select(0, chosen), self.y.index_select(0, chosen)
            shares = share if self.weights is None else self.weights.index_select(0, chosen) * share
            if not there:
                x, y, shares = fabric.to_device(x), fabric.to_device(y), fabric.to_device(shares)
            yield _Batch(x, y, shares, order[:, rows].flatten())

    def pairs(self, fabric: Fabric, chunk: int) -> Iterator[tuple[Tensor, Tensor, Tensor | None]]:
        mine = range(fabric.global_rank, len(self.y), fabric.world_size)
        for start in range(0, len(mine), chunk):
            part = mine[start : start + chunk]
            rows = slice(part.start, part.stop, part.step)
            weights = None if self.weights is None else self.weights[rows]
            yield fabric.to_device(self.x[rows]), fabric.to_device(self.y[rows]), weights

    def describe(self) -> dict[str, Any]:
        if self.description is None:
            content = [_fingerprint(tensor) for tensor in (self.x, self.y, self.weights) if tensor is not None]
            self.description = {
                "rows": len(self.y), "x": _shape(self.x), "y": _shape(self.y), "content": "".join(content),
            }  # fmt: skip
        return self.description

    def sample(self) -> tuple[Tensor, Tensor]:
        return self.x[:8], self.y[:8]


class _Loader:
    """Data from a DataLoader, checked pair by pair."""

    def __init__(self, loader: DataLoader[Any], name: str) -> None:
        self.loader, self.name = loader, name
        self.prepared: Any = loader
        self.dtype = torch.float32
        self.count: int | None = None
        with contextlib.suppress(TypeError):  # an iterable dataset without a length
            self.count = len(loader)
        if self.count == 0:
            raise ValueError(
                f"{name} is a DataLoader without a batch: its dataset is empty, or drop_last drops all of it."
            )

    def num_batches(self) -> int:
        if self.count is None:
            self.count = sum(1 for _ in self.loader)
        return self.count

    def place(self, fabric: Fabric, dtype: torch.dtype) -> None:
        self.dtype = dtype
        self.prepared = fabric.setup_dataloaders(self.loader)
        if fabric.world_size > 1:
            self.count = len(self.prepared)

    def batches(self, epoch: int, settings: _Settings, fabric: Fabric) -> Iterator[_Batch]:
        # Fabric hands this number to a distributed sampler; a resumed run must not start counting from 0.
        self.prepared._num_iter_calls = epoch
        for number, batch in enumerate(islice(self.prepared, self.num_batches())):
            x, y = self.pair(batch, number)
            yield _Batch(x, y, 1 / len(y), None)

    def pairs(self, fabric: Fabric, chunk: int) -> Iterator[tuple[Any, Tensor, Tensor | None]]:
        # Not by a distributed sampler, which counts rows twice to make all shares equal.
        for number, batch in enumerate(self.loader):
            if number % fabric.world_size == fabric.global_rank:
                yield *self.pair(fabric.to_device(batch), number), None

    def pair(self, batch: Any, number: int) -> tuple[Any, Tensor]:
        where = f"Batch {number + 1} of the DataLoader {self.name}"
        if not isinstance(batch, (tuple, list)) or len(batch) != 2:
            length = f" of length {len(batch)}" if isinstance(batch, (tuple, list)) else ""
            raise ValueError(f"{where} is a {type(batch).__name__}{length}; expected a pair (x, y) of tensors.")
        x, y = (torch.as_tensor(part) if isinstance(part, np.ndarray) else part for part in batch)
        if not isinstance(y, Tensor) or y.ndim not in (1, 2) or y.is_complex() or y.dtype == torch.bool:
            found = f"{y.dtype} of shape {tuple(y.shape)}" if isinstance(y, Tensor) else f"a {type(y).__name__}"
            raise ValueError(
                f"{where} has y = {found}; expected a tensor of numbers of shape (B, D), or (B,) for D = 1."
            )
        if len(y) == 0:
            raise ValueError(f"{where} has no rows.")
        if isinstance(x, Tensor):
            if x.ndim == 0 or len(x) != len(y):
                raise ValueError(
                    f"{where} has x of shape {tuple(x.shape)}, but y of shape {tuple(y.shape)}; rows differ."
                )
            x = x.to(self.dtype) if x.is_floating_point() else x
        return x, y[:, None] if y.ndim == 1 else y

    def describe(self) -> dict[str, Any]:
        return {"batches": self.num_batches(), "loader's batch_size": self.loader.batch_size}

    def sample(self) -> tuple[Any, Tensor]:
        return self.pair(next(iter(self.loader)), 0)


def _prepare(
    model: EnergyRegressionModel, x: Any, y: Any, weights: Tensor | None, validation: Any, settings: _Settings
) -> tuple[_Data, _Data | None, tuple[Tensor | None, Tensor] | None]:
    """Training data, validation data, and what the preprocessing is to be fitted to (None if it is fitted)."""
    if isinstance(x, DataLoader):
        return _prepare_loader(model, x, y, validation, settings)
    if y is None:
        raise ValueError(f"y is missing: x is a {type(x).__name__}. Only a DataLoader brings y along.")
    if isinstance(y, DataLoader):
        raise ValueError("y is a DataLoader; pass one DataLoader as x that yields pairs (x, y), or arrays for both.")
    x, y = _checked_pair(model, x, y, "x", "y")
    rows: Tensor | None = None
    if weights is not None and not bool((weights > 0).all()):
        rows = (weights > 0).nonzero()[:, 0]
        x, y, weights = x[rows], y[rows], weights[rows]
    if len(y) < 2:
        weighty = "" if weights is None else " with a weight above 0"
        raise ValueError(f"x has {len(y)} row{weighty}; expected at least 2 to learn from.")
    if isinstance(validation, str) and validation == "auto":
        validation = 0.1
    held_out: _Data | None = None
    if isinstance(validation, (int, float, np.number)) and not isinstance(validation, bool):
        kept, chosen = _split(len(y), float(validation), settings.seed)
        rows = torch.arange(len(y)) if rows is None else rows
        parts = [
            _Rows(x[part], y[part], rows[part], settings.batch_size, None if weights is None else weights[part])
            for part in (kept, chosen)
        ]
        data, held_out = parts
    else:
        held_out = _prepare_validation(model, validation, settings, x)
        data = _Rows(x, y, rows, settings.batch_size, weights)
    return data, held_out, None if bool(model.fitted) else (_some_rows(data.x, settings.seed), data.y)


def _some_rows(x: Tensor, seed: int) -> Tensor:
    """What the units of x are fitted to: all rows, or 200,000 of them by chance (fewer if wide), which will do."""
    row_bytes = 8 * max(x[0].numel(), 1)
    most = min(PREPROCESSING_ROWS, max(PREPROCESSING_BYTES // row_bytes, 20_000))
    if len(x) <= most:
        return x
    generator = np.random.default_rng(mix(seed, SUBSET))
    chosen = np.sort(generator.choice(len(x), most, replace=False, shuffle=False))
    return x[torch.from_numpy(chosen)]


def _default_batch_size(y: Any) -> int:
    """Few rows need small batches, or an epoch is too few steps to learn anything sharp."""
    rows = len(y) if hasattr(y, "__len__") and not isinstance(y, DataLoader) else None
    if rows is None or rows >= 25 * LARGEST_BATCH:
        return LARGEST_BATCH
    return max(2 ** int(math.log2(max(rows / 25, 1))), 32)


def _split(n: int, fraction: float, seed: int) -> tuple[Tensor, Tensor]:
    if not 0 < fraction < 1:
        raise ValueError(
            f"validation is {fraction}; expected a fraction in (0, 1), (x_val, y_val), a DataLoader or None."
        )
    count = max(1, round(fraction * n))
    if n - count < 2:
        raise ValueError(
            f"validation={fraction} of {n} rows leaves {n - count} to train on; expected at least 2. Pass a smaller "
            "fraction, (x_val, y_val), or validation=None."
        )
    order = torch.randperm(n, generator=torch.Generator().manual_seed(mix(seed, SPLIT)))
    return order[count:].sort().values, order[:count].sort().values


def _prepare_validation(model: EnergyRegressionModel, validation: Any, settings: _Settings, x: Any) -> _Data | None:
    if validation is None:
        return None
    if isinstance(validation, DataLoader):
        loader = _Loader(validation, "validation")
        _check_first_batch(model, loader)
        return loader
    if not isinstance(validation, (tuple, list)) or len(validation) not in (2, 3):
        raise ValueError(
            f"validation is "
            f"{validation if isinstance(validation, (bool, str)) else 'a ' + type(validation).__name__!r}; expected a "
            "fraction in (0, 1), (x_val, y_val), a DataLoader or None."
        )
    x_val, y_val = _checked_pair(model, validation[0], validation[1], "x_val", "y_val")
    if isinstance(x, Tensor) and x_val.shape[1:] != x.shape[1:]:
        raise ValueError(
            f"x_val has shape {tuple(x_val.shape)}, but x has shape {tuple(x.shape)}; expected the same but for the "
            "rows."
        )
    weights = _checked_weights(validation[2], x_val, y_val, "The third of validation") if len(validation) == 3 else None
    if weights is None:
        return _Rows(x_val, y_val, None, settings.batch_size)
    kept = (weights > 0).nonzero()[:, 0]
    return _Rows(x_val[kept], y_val[kept], kept, settings.batch_size, weights[kept])


def _checked_pair(model: EnergyRegressionModel, x: Any, y: Any, x_name: str, y_name: str) -> tuple[Tensor, Tensor]:
    pair = []
    for value, name, check in ((x, x_name, model.check_inputs), (y, y_name, model.check_targets)):
        if not isinstance(value, Tensor):
            try:
                value = value.to_numpy() if hasattr(value, "to_numpy") else np.asarray(value)
            except ValueError as error:  # ragged lists
                raise ValueError(f"{name} is not an array of numbers: {error}") from None
            if value.dtype.kind not in "fiub":
                raise ValueError(
                    f"{name} has dtype {value.dtype}; expected numbers. Encode text and categories, fill missing "
                    f"values, and convert by {name}.astype(float)."
                )
        if value.ndim and len(value) == 0:
            raise ValueError(f"{name} is empty: its shape is {tuple(value.shape)}; expected at least one row.")
        try:
            pair.append(check(value))
        except ValueError as error:
            raise ValueError(f"{name}: {error}" if not str(error).startswith(name) else str(error)) from error
    if len(pair[0]) != len(pair[1]):
        raise ValueError(
            f"{x_name} has {len(pair[0])} rows, but {y_name} has {len(pair[1])}; expected one target for each row."
        )
    return pair[0], pair[1]


def _prepare_loader(
    model: EnergyRegressionModel, loader: DataLoader[Any], y: Any, validation: Any, settings: _Settings
) -> tuple[_Data, _Data | None, tuple[Tensor | None, Tensor] | None]:
    if y is not None:
        raise ValueError("x is a DataLoader, which yields pairs (x, y); leave y out.")
    if isinstance(validation, (int, float, np.number)) and not isinstance(validation, bool):
        raise ValueError(
            f"validation is the fraction {validation}, but x is a DataLoader, whose rows cannot be split; pass (x_val, "
            "y_val), another DataLoader, or None."
        )
    data = _Loader(loader, "x")
    held_out = (
        None
        if isinstance(validation, str) and validation == "auto"
        else _prepare_validation(model, validation, settings, None)
    )
    if bool(model.fitted):
        _check_first_batch(model, data)
        return data, held_out, None
    keep_x = hasattr(model.encoder, "fit")
    inputs, targets = [], []
    for number, batch in enumerate(loader):
        inputs_here, y_here = data.pair(batch, number)
        if number == 0 and isinstance(inputs_here, Tensor):
            model.check_inputs(inputs_here)
        targets.append(y_here)
        if keep_x:
            inputs.append(inputs_here)
    data.count = len(targets)
    if not targets:
        raise ValueError("x is a DataLoader that yields no batch.")
    y_all = model.check_targets(torch.cat(targets))
    if len(y_all) < 2:
        raise ValueError(f"x has {len(y_all)} row; expected at least 2 to learn from.")
    return data, held_out, (model.check_inputs(torch.cat(inputs)) if keep_x else None, y_all)


def _check_first_batch(model: EnergyRegressionModel, data: _Loader) -> None:
    x, y = data.sample()
    if isinstance(x, Tensor):
        model.check_inputs(x)
    model.check_targets(y)


def _shape(tensor: Tensor) -> str:
    return f"{tuple(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')}"


def _fingerprint(tensor: Tensor) -> str:
    """A checksum of at most 64 MB, rows taken at equal distances."""
    step = max(1, -(-tensor.nbytes // 2**26))
    content = tensor[::step].detach().cpu().contiguous()
    return hashlib.sha256(content.reshape(-1).view(torch.uint8).numpy().data).hexdigest()[:16]


# ---------------------------------------------------------------------------------------------- one step


class TrainingStep(nn.Module):
    """Model and objective as one module from a batch to its loss: what DDP wraps.

    Args:
        model: The model.
        objective: Called as ``objective(f, q, z, generator=...)``; returns an `energyreg.objectives.Loss`.
        num_members: Members S whose rows a batch holds, one member after the other.
    """

    def __init__(self, model: EnergyRegressionModel, objective: Any, num_members: int = 1) -> None:
        super().__init__()
        self.model, self.objective, self.num_members = model, objective, num_members

    def forward(self, batch: _Batch, generator: torch.Generator) -> Tensor:
        """The weighted sum of the losses; it, the losses themselves and the diagnostics are left in the batch, too."""
        f, q, z = self.model.condition(batch.x, batch.y)
        try:
            per_example, diagnostics = self.objective(f, q, z, generator=generator)
        except NonFiniteLossError as error:  # the loop has more to say about it: which rows, the likely cause
            per_example, diagnostics = error.loss
            batch.reason = str(error)
        if per_example.shape != (len(batch.y),):
            raise ValueError(
                f"The objective returned losses of shape {tuple(per_example.shape)}; expected ({len(batch.y)},), one a "
                "row."
            )
        batch.per_example = per_example.detach()
        batch.diagnostics = {name: value.detach() for name, value in diagnostics.items()}
        # The members share no parameter: the gradient of this sum is that of each member's loss by itself.
        share = batch.share
        if isinstance(share, Tensor):
            share = share.to(per_example.dtype)
            weighted = batch.per_example * share
            loss = (per_example * share).sum()
        else:
            weighted = batch.per_example
            loss = per_example.sum() * share
        if self.num_members == 1:
            batch.loss = loss.detach()[None]
        else:
            batch.loss = weighted.unflatten(0, (self.num_members, -1)).sum(1)
            batch.loss = batch.loss if isinstance(share, Tensor) else batch.loss * share
        return loss


def _has_unused_parameters(model: EnergyRegressionModel, objective: Any, data: _Data) -> bool:
    """Whether some parameters get no gradient (an idle proposal, for one): DDP must know beforehand."""
    device = next(model.parameters()).device
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    x, y = data.sample()
    x = x.to(device, next(model.parameters()).dtype if x.is_floating_point() else None) if isinstance(x, Tensor) else x
    model.train()
    TrainingStep(model, objective)(_Batch(x, y.to(device), 1.0, None), torch.Generator(device)).backward()
    unused = any(parameter.requires_grad and parameter.grad is None for parameter in model.parameters())
    model.zero_grad()
    model.load_state_dict(before)  # batch statistics moved
    return unused


# ---------------------------------------------------------------------------------------------- the loop


@dataclass
class _Job:
    """All that a process needs to train."""

    model: EnergyRegressionModel
    objective: Any
    data: _Data
    validation: _Data | None
    settings: _Settings
    folder: Path | None
    resume: bool
    progress: bool | None
    started: float
    process: int
    scratch: Path
    training: Callable[[Fabric, _Job], _Training]
    num_members: int
    time_limit: float | None


class _OutOfTimeError(Exception):
    """The time limit has passed."""


class _Training:
    """The training of a model, or of the members of an ensemble that a model stands for: all bookkeeping is by member.

    What is particular to an ensemble is in the methods that its own kind of training overrides: `_is_matrix`, `_clip`,
    `_models`, `_keep` and `_summary`.
    """

    def __init__(self, fabric: Fabric, job: _Job) -> None:
        self.fabric, self.job, self.settings, self.model = fabric, job, job.settings, job.model
        dtype = torch.float64 if job.settings.precision == "64-true" else next(job.model.parameters()).dtype
        fabric.to_device(job.model)
        for data in (job.data, job.validation):
            if data is not None:
                if job.folder is not None or fabric.world_size > 1:
                    data.describe()  # the values as they were given, whatever the precision of the training
                data.place(fabric, dtype)
        self.steps = job.data.num_batches()
        # A look at the loss costs nothing on one CPU process; then it comes before the weights are touched.
        self.eager = fabric.world_size == 1 and fabric.device.type == "cpu"
        self.scaled = job.settings.precision == "16-mixed" and fabric.device.type != "cpu"
        optimizer = self._make_optimizer()
        self.scheduler = self._make_scheduler(optimizer)
        step = TrainingStep(job.model, job.objective, job.num_members)
        self.module, self.optimizer = fabric.setup(step, optimizer)
        self.raw_optimizer = optimizer
        self.generator = torch.Generator(fabric.device)
        self.histories = [History() for _ in range(job.num_members)]
        self.epoch = 0
        averaged = job.settings.averaging is not None
        self.trained = {name: p for name, p in job.model.named_parameters() if p.requires_grad} if averaged else {}
        self.average = {name: p.detach().clone() for name, p in self.trained.items()}
        self.kept = self._copy_weights()  # the best weights so far; without validation the last
        self.first_losses: list[float | None] = [None] * job.num_members
        self.finished = False
        self.earlier_seconds = 0.0
        self.warned = False
        self.pending: list[tuple[int, _Batch, Tensor]] = []
        self.deadline = math.inf if job.time_limit is None else job.started + job.time_limit
        self.out_of_time = False
        self.step_seconds = self.validation_seconds = 0.0
        self.progress = TrainingProgress(
            job.progress if fabric.is_global_zero else False, job.settings.epochs, self.steps
        )
        if fabric.world_size > 1:
            self._compare_processes()

    def _compare_processes(self) -> None:
        """Stop in all processes if one has other data or settings, as in a script that draws data without a seed."""
        differences = list(_differences(self.fabric.broadcast(self._conditions()), self._conditions()))
        worst = self.fabric.all_reduce(torch.tensor(float(bool(differences))), reduce_op="sum")
        if float(worst) > 0:  # type: ignore[arg-type]
            here = f" Here: {differences[0]}." if differences else ""
            raise ValueError(
                "The processes were given different data or settings, but each must be given the same, of which it "
                f"then takes its share. Seed whatever makes the data.{here}"
            )

    @staticmethod
    def _is_matrix(parameter: Tensor) -> bool:
        """Whether a parameter gets weight decay."""
        return parameter.ndim >= 2

    def _make_optimizer(self) -> torch.optim.Optimizer:
        parameters = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        groups = [
            {"params": [p for p in parameters if self._is_matrix(p)], "weight_decay": self.settings.weight_decay},
            {"params": [p for p in parameters if not self._is_matrix(p)], "weight_decay": 0.0},
        ]
        # The fused kernel is five times as fast for small networks, but cannot be combined with a loss scale and
        # clipping.
        fused = self.fabric.device.type in ("cpu", "cuda") and not self.scaled
        return torch.optim.AdamW(
            [group for group in groups if group["params"]], lr=self.settings.learning_rate, fused=fused
        )

    def _make_scheduler(self, optimizer: torch.optim.Optimizer) -> torch.optim.lr_scheduler.LRScheduler:
        total, schedulers = self.settings.epochs * self.steps, torch.optim.lr_scheduler
        if self.settings.schedule == "one-cycle":
            # One step more than there are, so that the last step comes before the end; and torch divides by zero where
            # the way up has less than two steps.
            total = max(total + 1, 4)
            return schedulers.OneCycleLR(
                optimizer, self.settings.learning_rate, total_steps=total, pct_start=max(0.1, 2 / total)
            )
        if self.settings.schedule == "cosine":
            return schedulers.CosineAnnealingLR(optimizer, total)
        return schedulers.ConstantLR(optimizer, factor=1.0, total_iters=0)

    def run(self) -> list[History]:
        if self.job.resume and self.job.folder is not None:
            self._resume(self.job.folder / LAST)
        try:
            if not self.finished:
                self._loop()
        except KeyboardInterrupt:
            self._interrupt()
        finally:
            self.progress.stop()
            self.model.zero_grad()
            self.model.eval()
        return self.histories

    def _loop(self) -> None:
        self.progress.start(self.epoch)
        while self.epoch < self.settings.epochs and not self.histories[0].stopped_early:
            started = time.perf_counter()
            seed_global(mix(self.settings.seed, DROPOUT, self.epoch, self.fabric.global_rank), self.fabric.device)
            self.model.train()
            sums = _Sums(self.job.num_members)
            number = 0
            for number, batch in enumerate(self.job.data.batches(self.epoch, self.settings, self.fabric), 1):
                self._step(number - 1, batch, sums)
                if self._time_is_up(number, started):
                    break
            self._flush(sums)
            if self.out_of_time and number < self.steps:
                self._end_in_the_middle(sums, started, number)
                return
            try:
                self._end_epoch(sums, started)
            except _OutOfTimeError:
                self._give_up(self.steps)
                return
            over = self.epoch >= self.settings.epochs or self.histories[0].stopped_early
            if not over and self._time_is_up(0, started):
                self._give_up(0)
                return
        self._restore()
        self.finished = True
        self._take_time()
        self._save()

    def _time_is_up(self, number: int, started: float) -> bool:
        """Whether a further step, and the validation after it, would probably end after the time limit.

        Args:
            number: Steps of this epoch that were made; 0 between two epochs.
            started: When the epoch began.
        """
        if self.job.time_limit is None:
            return False
        now = time.perf_counter()
        if number:
            self.step_seconds = (now - started) / number
        late = now + self.step_seconds + self.validation_seconds >= self.deadline
        if self.fabric.world_size == 1:
            self.out_of_time = late
        elif number % WINDOW == 0:  # all processes must stop at the same step
            self.out_of_time = bool(self.fabric.broadcast(late))
        return self.out_of_time

    def _end_in_the_middle(self, sums: _Sums, started: float, number: int) -> None:
        """Let the weights of an epoch that was cut short compete with those of the others, if there is time."""
        checkpointed = self.epoch
        if checkpointed or self.job.validation is None:
            # The last checkpoint stays that of a whole epoch, from which an exact continuation is possible.
            with contextlib.suppress(_OutOfTimeError):
                self._end_epoch(sums, started, whole=False)
        self._give_up(number, checkpointed)

    def _give_up(self, number: int, epoch: int | None = None) -> None:
        """End with the best weights so far, as the time is up.

        Args:
            number: Steps of the epoch that were made.
            epoch: Whole epochs; by default `self.epoch`.
        """
        epoch = self.epoch if epoch is None else epoch
        for history in self.histories:
            history.timed_out = True
        self._take_time()
        if self.epoch > 0:
            self._restore()
        if self.fabric.is_global_zero:
            self.progress.stop()
            after = f"{number} of {self.steps} steps of epoch {epoch + 1}" if number else f"epoch {epoch}"
            warnings.warn(
                f"Training stopped after {after} of {self.settings.epochs}, as its time of {self.job.time_limit:.3g} s "
                f"was up; {self._who_has()} {self._which_weights()}.{self._how_to_resume()}",
                stacklevel=2,
            )

    def _take_time(self) -> None:
        for history in self.histories:
            history.total_seconds = self.earlier_seconds + time.perf_counter() - self.job.started

    def _step(self, number: int, batch: _Batch, sums: _Sums) -> None:
        step = self.epoch * self.steps + number
        self.optimizer.zero_grad()
        # The same in every process: noise that the rows of a batch share must be the same for all of them.
        self.generator.manual_seed(mix(self.settings.seed, NOISE, step))
        loss = self.module(batch, self.generator)
        if self.eager:
            self._check_losses(batch.loss.tolist(), number, batch)
        self.fabric.backward(loss)
        norm = self._clip(math.inf if self.settings.gradient_clip is None else self.settings.gradient_clip)
        if self.eager:
            self._check_norms(norm.tolist(), number, batch)
        self.optimizer.step()
        self.scheduler.step()
        if self.average:
            self._add_to_average(step + 1)
        if batch.rows is None and isinstance(batch.x, Tensor) and not self.eager:
            batch.finite = batch.x.isfinite().all()
        batch.x = None  # it may be large, and the losses of many steps wait to be looked at
        self.pending.append((number, batch, norm))
        if len(self.pending) >= WINDOW:
            self._flush(sums)

    @torch.no_grad()
    def _add_to_average(self, step: int) -> None:
        """Let the weights after a step, counted from 1, enter their average."""
        assert self.settings.averaging is not None
        share = (self.settings.averaging + 1) / (self.settings.averaging + step)
        torch._foreach_lerp_(list(self.average.values()), list(self.trained.values()), share)

    @contextlib.contextmanager
    def _averaged(self) -> Iterator[None]:
        """Puts the average of the weights in their place; in place, as the members of an ensemble are views of them."""

        @torch.no_grad()
        def swap() -> None:
            for name, parameter in self.trained.items():
                moment = parameter.detach().clone()
                parameter.copy_(self.average[name])
                self.average[name].copy_(moment)

        swap()
        try:
            yield
        finally:
            swap()

    def _clip(self, limit: float) -> Tensor:
        """Limit the norm of the gradient, and return what it was, one a member, shape (S,)."""
        norm = self.fabric.clip_gradients(self.module, self.optimizer, max_norm=limit, error_if_nonfinite=False)
        assert norm is not None
        return norm[None]

    def _flush(self, sums: _Sums) -> None:
        """Look at the losses of the last steps: one wait for the device, one message between processes."""
        if not self.pending:
            return
        pending, self.pending = self.pending, []
        losses = torch.stack([batch.loss for _, batch, _ in pending]).double()
        values = torch.stack([losses, torch.stack([norm for _, _, norm in pending]).double()], 1)  # (W, 2, S)
        if self.fabric.world_size > 1:
            values = self.fabric.all_reduce(values, reduce_op="mean")  # type: ignore[assignment]
        for (number, batch, _), (loss, norm) in zip(pending, values.tolist(), strict=True):
            if not self.eager:
                self._check_losses(loss, number, batch)
                self._check_norms(norm, number, batch)
            sums.add_losses(loss)
        sums.add_diagnostics([batch for _, batch, _ in pending])
        means = sums.mean_losses()
        self.progress.step(self.epoch, pending[-1][0] + 1, sum(means) / len(means))

    def _models(self) -> Sequence[EnergyRegressionModel]:
        """The members, for validation."""
        return [self.model]

    @torch.no_grad()
    def _validate(self, model: EnergyRegressionModel) -> float:
        """The weighted mean of -log p(y|x) over the validation data.

        Raises:
            _OutOfTimeError: If the time is up before it is known, in a single process.
        """
        assert self.job.validation is not None
        # All processes must see a shuffling loader in the same order.
        seed_global(mix(self.settings.seed, EVALUATION, self.epoch), self.fabric.device)
        total = torch.zeros(2, dtype=torch.float64)
        for x, y, weights in self.job.validation.pairs(self.fabric, max(self.settings.batch_size, 1024)):
            if self.fabric.world_size == 1 and time.perf_counter() >= self.deadline:
                raise _OutOfTimeError
            nll = -model(x, memory_budget=VALIDATION_BYTES).log_prob(y).double().cpu()
            weights = torch.ones_like(nll) if weights is None else weights.cpu()
            total += torch.stack([(nll * weights).sum(), weights.sum()])
        if self.fabric.world_size > 1:
            summed = self.fabric.all_reduce(self.fabric.to_device(total), reduce_op="sum")
            total = summed.cpu()  # type: ignore[union-attr]
        return float(total[0] / total[1])

    def _end_epoch(self, sums: _Sums, started: float, whole: bool = True) -> None:
        learning_rate = float(self.scheduler.get_last_lr()[0])
        diagnostics = sums.mean_diagnostics(self.fabric)
        with self._averaged():
            nlls = self._validation_nlls()
            self.epoch += 1
            for member, (history, loss) in enumerate(zip(self.histories, sums.mean_losses(), strict=True)):
                history.train_loss.append(loss)
                history.learning_rate.append(learning_rate)
                for name, values in diagnostics.items():
                    history.diagnostics.setdefault(name, []).append(values[member])
                if nlls is not None:
                    history.validation_nll.append(nlls[member])
                    best = history.best_validation_nll
                    if best is None or nlls[member] < best:
                        history.best_epoch = self.epoch
                        self._keep(member)
            if nlls is None:
                self.kept = self._copy_weights()
        patience = self.settings.patience
        if patience is not None and self.epoch - max(history.best_epoch or 0 for history in self.histories) >= patience:
            for history in self.histories:
                history.stopped_early = self.epoch < self.settings.epochs
        for history in self.histories:
            history.seconds.append(time.perf_counter() - started)
        self._take_time()
        self.progress.epoch(self.epoch, self._summary())
        if whole:
            self._save()

    def _validation_nlls(self) -> list[float] | None:
        """The members' validation NLLs; None without validation data."""
        if self.job.validation is None:
            return None
        self.model.eval()
        before = time.perf_counter()
        nlls = [self._validate(model) for model in self._models()]
        self.validation_seconds = time.perf_counter() - before
        for member, nll in enumerate(nlls):
            if math.isnan(nll):
                self._stop(
                    f"the validation NLL{self._of(member)} is nan after epoch {self.epoch + 1}",
                    "The model's density is not a number at some validation rows: check the head and the encoder "
                    "there, in evaluation mode. A lower learning rate (now "
                    f"{self.settings.learning_rate:g}) helps where the weights have grown out of bounds.",
                )
        return nlls

    def _summary(self) -> History:
        """What the progress shows."""
        return self.histories[0]

    # ------------------------------------------------------------------ weights

    def _copy_weights(self) -> dict[str, Any]:
        return {
            name: value.detach().clone() if isinstance(value, Tensor) else value
            for name, value in self.model.state_dict().items()
        }

    def _keep(self, member: int) -> None:
        """Keep the weights that a member has now as its best."""
        self.kept = self._copy_weights()

    def _restore(self) -> None:
        self.model.load_state_dict(self.kept)

    def _kept_epoch(self) -> str:
        """Which weights are kept, in words."""
        if self.job.num_members > 1 and self.histories[0].best_epoch is not None:
            return f"of their best epochs up to {self.epoch}"
        return f"of epoch {self.histories[0].best_epoch or self.epoch}"

    def _interrupt(self) -> None:
        for history in self.histories:
            history.interrupted = True
        self._take_time()
        if self.epoch > 0:
            self._restore()
        if self.fabric.is_global_zero:
            self.progress.stop()
            warnings.warn(
                f"Training was interrupted in epoch {self.epoch + 1} of {self.settings.epochs}; "
                f"{self._who_has()} {self._which_weights()}.{self._how_to_resume()}",
                stacklevel=2,
            )

    def _who_has(self) -> str:
        return "the model has" if self.job.num_members == 1 else "the members have"

    def _which_weights(self) -> str:
        if self.epoch == 0:
            return "the weights of the moment, as no epoch was complete"
        return f"the weights {self._kept_epoch()}"

    def _how_to_resume(self) -> str:
        if self.job.folder is None or self.epoch == 0:
            return ""
        return f" Call {'fit' if self.job.num_members == 1 else 'fit_ensemble'}(..., resume=True) to continue."

    # ------------------------------------------------------------------ failures

    def _of(self, member: int) -> str:
        """Names the member in a message, where there are several."""
        return "" if self.job.num_members == 1 else f" of member {member} (seed {self.settings.seed + member})"

    def _check_losses(self, losses: list[float], number: int, batch: _Batch) -> None:
        for member, loss in enumerate(losses):
            first = self.first_losses[member]
            if first is None and math.isfinite(loss):
                first = self.first_losses[member] = loss
            # False for NaN, and for infinity either way.
            if -math.inf < loss < EXPLOSION + abs(first or 0.0):
                continue
            where = f"in epoch {self.epoch + 1}, batch {number + 1} of {self.steps}"
            part, of = batch.part(member, self.job.num_members), self._of(member)
            if math.isfinite(loss):
                self._stop(
                    f"the loss{of} exploded to {loss:.3g} nats {where}",
                    f"The learning rate is too high (now {self.settings.learning_rate:g}; try a third of it), or "
                    f"gradients are not limited enough (gradient_clip is {self.settings.gradient_clip}).",
                    part,
                )
            self._stop(f"the loss{of} is {loss} {where}", self._cause(part), part)

    def _check_norms(self, norms: list[float], number: int, batch: _Batch) -> None:
        for member, norm in enumerate(norms):
            # With a loss scale, infinite gradients are its way to find the scale; that step is skipped.
            if math.isfinite(norm) or self.scaled:
                continue
            self._stop(
                f"the norm of the gradient{self._of(member)} is {norm} in epoch {self.epoch + 1}, batch {number + 1} "
                f"of {self.steps}, though the loss is finite",
                "A backward pass overflowed or divided by zero: look for sqrt, log, norm or a division at 0 in your "
                "encoder or head. torch.autograd.set_detect_anomaly(True) names the operation; precision='64-true' "
                "tells overflow from the rest.",
                batch.part(member, self.job.num_members),
            )

    def _cause(self, batch: _Batch) -> str:
        y, finite = batch.y, batch.finite
        if finite is None and isinstance(batch.x, Tensor):
            finite = batch.x.isfinite().all()
        if finite is not None and not bool(finite):
            return "x has values that are not finite in this batch: clean the dataset behind the DataLoader."
        if not bool(y.isfinite().all()):
            return "y has values that are not finite in this batch: clean the dataset behind the DataLoader."
        lower = (
            f"Lower the learning rate (now {self.settings.learning_rate:g}) or gradient_clip "
            f"(now {self.settings.gradient_clip})"
        )
        if self.settings.precision.endswith("mixed"):
            lower += f", or use precision='32-true' (now {self.settings.precision!r})"
        f_target = batch.diagnostics.get("f_target")
        if f_target is not None and not bool(f_target.isfinite().all()):
            return f"The energy f(x, y) is not finite at the targets themselves: the network has overflowed. {lower}."
        if batch.reason is not None and "q has no density" in batch.reason:
            return batch.reason
        return (
            f"The energy is finite at the targets, so look at the other quantities of the objective: log Z, or the "
            f"density of the noise. {lower}; a proposal that collapses needs a larger min_scale."
        )

    def _stop(self, what: str, cause: str, batch: _Batch | None = None) -> None:
        details = "" if batch is None else self._details(batch)
        self._restore()
        one = self.job.num_members == 1
        whose, model = ("its", "The model has") if one else ("their", "The members have")
        state = f"weights {self._kept_epoch()}" if self.epoch else "initial weights, as no epoch was complete"
        raise TrainingError(f"Training stopped: {what}. {details}Likely cause: {cause} {model} {whose} {state}.")

    def _details(self, batch: _Batch) -> str:
        """Which rows, and which quantities of them."""
        parts = []
        bad = torch.zeros(len(batch.y), dtype=torch.bool, device=batch.per_example.device)
        for name, value in {"loss": batch.per_example, **batch.diagnostics}.items():
            wrong = ~value.isfinite() | (value.abs() > EXPLOSION) if name == "loss" else ~value.isfinite()
            if value.shape == bad.shape:
                bad |= wrong
            if bool(wrong.any()):
                parts.append(f"{name} of {int(wrong.sum())} of {wrong.numel()}")
        if not parts:
            return ""
        places = bad.nonzero()[:5, 0].cpu()
        named = "rows" if batch.rows is not None else "rows of the batch"
        if batch.rows is not None:
            places = self.job.data.rows[batch.rows[places]]  # type: ignore[attr-defined]
        more = ", ..." if int(bad.sum()) > 5 else ""
        here = f" in process {self.fabric.global_rank}" if self.fabric.world_size > 1 else ""
        return f"Affected{here}: {'; '.join(parts)} ({named} {', '.join(map(str, places.tolist()))}{more}). "

    # ------------------------------------------------------------------ checkpoints

    def _conditions(self) -> dict[str, Any]:
        """What must be the same in a resumed run."""
        objective = self.job.objective
        return {
            **dataclasses.asdict(self.settings),
            "objective": repr(objective) if dataclasses.is_dataclass(objective) else type(objective).__qualname__,
            "number of processes": self.fabric.world_size,
            "number of members": self.job.num_members,
            "validation data": None if self.job.validation is None else self.job.validation.describe(),
            "training data": self.job.data.describe(),
        }

    def _save(self) -> None:
        if self.job.folder is None or not self.fabric.is_global_zero:
            return
        optimizer = self.raw_optimizer.state_dict()
        tensors = {f"model.{name}": value for name, value in self.model.state_dict().items()}
        if self.histories[0].best_epoch is not None and not self.finished:
            tensors |= {f"best.{name}": value for name, value in self.kept.items()}
        tensors |= {f"average.{name}": value for name, value in self.average.items()}
        plain: dict[str, dict[str, Any]] = {}
        for index, entries in optimizer["state"].items():
            for name, value in entries.items():
                if isinstance(value, Tensor):
                    tensors[f"optimizer.{index}.{name}"] = value
                else:
                    plain.setdefault(str(index), {})[name] = value
        state = {
            "conditions": self._conditions(),
            "epoch": self.epoch,
            "finished": self.finished,
            "first_losses": self.first_losses,
            "histories": [history.to_dict() for history in self.histories],
            "optimizer": plain,
            "groups": optimizer["param_groups"],
            "scheduler": self.scheduler.state_dict(),
            "precision": self.fabric.strategy.precision.state_dict(),
        }
        try:
            checkpoint.save_training_state(self.job.folder / LAST, tensors, state)
        except OSError as error:
            # Hours of training weigh more than the means to resume it.
            if not self.warned:
                warnings.warn(
                    f"{error}. Training goes on; its last checkpoint is that of an earlier epoch.", stacklevel=2
                )
            self.warned = True

    def _resume(self, path: Path) -> None:
        if not self.fabric.broadcast(path.exists()):
            return
        tensors, state = checkpoint.load_training_state(path)
        differences = list(_differences(state["conditions"], self._conditions()))
        weights = {name.removeprefix("model."): value for name, value in tensors.items() if name.startswith("model.")}
        mine = {name: tuple(value.shape) for name, value in self.model.state_dict().items()}
        theirs = {name: tuple(value.shape) for name, value in weights.items()}
        differences += _differences(theirs, mine, "the model's ")
        if differences:
            shown = "; ".join(differences[:4]) + (f"; and {len(differences) - 4} more" if len(differences) > 4 else "")
            raise checkpoint.CheckpointError(
                f"Cannot resume from {str(path)!r}, which comes from another training: {shown}. Use the same settings "
                "and data, or another checkpoint_dir, or resume=False to start afresh."
            )
        self.model.load_state_dict(weights)
        self.epoch, self.finished, self.first_losses = state["epoch"], state["finished"], state["first_losses"]
        self.histories = [History(**history) for history in state["histories"]]
        self.earlier_seconds = self.histories[0].total_seconds
        for name, value in self.average.items():
            value.copy_(tensors[f"average.{name}"])
        best = {name.removeprefix("best."): value for name, value in tensors.items() if name.startswith("best.")}
        with self._averaged():
            self.kept = {name: self.fabric.to_device(value) for name, value in best.items()} or self._copy_weights()
        entries: dict[int, dict[str, Any]] = {int(index): dict(value) for index, value in state["optimizer"].items()}
        for name, value in tensors.items():
            if name.startswith("optimizer."):
                _, index, key = name.split(".", 2)
                entries.setdefault(int(index), {})[key] = value
        self.raw_optimizer.load_state_dict({"state": entries, "param_groups": state["groups"]})
        # A file knows no memory format, and the fused kernel goes through weights and moments in the order of memory.
        for parameter, moments in self.raw_optimizer.state.items():
            for name, value in moments.items():
                if isinstance(value, Tensor) and value.shape == parameter.shape and value.ndim:
                    moments[name] = torch.empty_like(parameter, dtype=value.dtype).copy_(value)
        self.scheduler.load_state_dict(state["scheduler"])
        self.fabric.strategy.precision.load_state_dict(state["precision"])


def _differences(then: Mapping[str, Any], now: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    for name in dict.fromkeys([*then, *now]):
        a, b = then.get(name), now.get(name)
        if a == b:
            continue
        if isinstance(a, Mapping) and isinstance(b, Mapping):
            yield next(_differences(a, b, f"{name}: "))  # the others follow from the first
        elif name == "content":
            yield f"{prefix}the values are others"
        else:
            yield f"{prefix}{name} was {_brief(a)}, is {_brief(b)}"


def _brief(value: Any) -> str:
    if isinstance(value, Mapping):
        return "a DataLoader" if "batches" in value else "arrays"
    return repr(value)


class _Sums:
    """Means over an epoch, one a member."""

    def __init__(self, num_members: int) -> None:
        self.losses, self.steps = [0.0] * num_members, 0
        self.diagnostics: dict[str, tuple[Tensor, int]] = {}

    def add_losses(self, losses: list[float]) -> None:
        self.losses = [total + loss for total, loss in zip(self.losses, losses, strict=True)]
        self.steps += 1

    def add_diagnostics(self, batches: list[_Batch]) -> None:
        members = len(self.losses)
        for name in batches[0].diagnostics:
            values = torch.cat([batch.diagnostics[name].reshape(members, -1) for batch in batches], 1).double()
            total, count = self.diagnostics.get(name, (0.0, 0))
            self.diagnostics[name] = (values.sum(1) + total, count + values.shape[1])

    def mean_losses(self) -> list[float]:
        return [loss / self.steps if self.steps else math.nan for loss in self.losses]

    def mean_diagnostics(self, fabric: Fabric) -> dict[str, list[float]]:
        if not self.diagnostics:
            return {}
        sums = torch.stack(
            [torch.stack([total, torch.full_like(total, count)]) for total, count in self.diagnostics.values()]
        )
        if fabric.world_size > 1:
            sums = fabric.all_reduce(sums, reduce_op="sum")  # type: ignore[assignment]
        return dict(zip(self.diagnostics, (sums[:, 0] / sums[:, 1]).tolist(), strict=True))


# ---------------------------------------------------------------------------------------------- progress
