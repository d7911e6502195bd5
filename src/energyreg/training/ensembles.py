"""Training of ensembles: `fit_ensemble` trains all members in one pass, as one model whose layers are batched products.

The members' weights are stacked, and the rows of a step are those of all members, one member after the other: row
s B + b is row b of member s. An objective knows nothing of this, and neither does AdamW, which works element by
element; so n trainings in one are n separate trainings, in as many operations as one.
"""

from __future__ import annotations

import copy
import os
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from energyreg.checks import check_count
from energyreg.models.ensemble import EnergyEnsemble, disagreement
from energyreg.models.model import EnergyRegressionModel
from energyreg.modes import make_trainable, with_gradients
from energyreg.networks.encoders import QuantileNormalizer
from energyreg.randomness import RandomSource
from energyreg.training.data import Examples, Rows, TrainingData
from energyreg.training.devices import device_of, make_fabric
from energyreg.training.failures import TrainingError
from energyreg.training.fitting import check_folder, ready, train
from energyreg.training.history import History
from energyreg.training.settings import TrainingSettings
from energyreg.training.stacking import CannotStackError, Stack, StackedTraining

__all__ = ["fit_ensemble"]

Build = Callable[[], EnergyRegressionModel]


@with_gradients
def fit_ensemble(
    build: Build | Sequence[EnergyRegressionModel],
    x: Any,
    y: Any = None,
    *,
    n_members: int | None = None,
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
) -> EnergyEnsemble:
    """Train several models on the same data, all in one pass, and return them as an ensemble.

    Member i has the initial weights that ``torch.manual_seed(seed + i)`` gives, and the order of rows that
    ``fit(..., seed=seed + i)`` would take; its own dropout, its own limit on the gradient, and at the end the weights
    of its own best epoch. All members share the rows held out for validation, the units of x and y, and the random
    points of the objective where its rows share them.

    What cannot be batched is trained one after the other by :func:`energyreg.fit`, with the same kind of result: with a
    DataLoader, several devices or precision "16-mixed"; members of different structure; and parts that keep running
    statistics (batch normalisation) or that :func:`torch.func.vmap` refuses. A warning says so where it is not plain
    from the arguments. Then each member has its own folder in `checkpoint_dir`, `patience` counts for each member by
    itself, Ctrl-C ends the ensemble with the members that were reached, and each member that is left gets an equal
    share of the time that is left.

    Args:
        build: Makes an untrained model, called without arguments; or the models, of which those that were fitted before
            keep their units and are trained further.
        x: As in :func:`energyreg.fit`, like all arguments that are not described here.
        y: As in `fit`.
        n_members: How many models to build; 5 by default. Models that are given are counted.
        sample_weight: As in `fit`.
        objective: As in `fit`.
        validation: As in `fit`; the fraction is chosen by `seed`, the same rows for all members.
        epochs: As in `fit`.
        batch_size: As in `fit`: rows of each member per step.
        learning_rate: As in `fit`.
        weight_decay: As in `fit`.
        schedule: As in `fit`.
        gradient_clip: As in `fit`: largest norm of the gradient of each member.
        averaging: As in `fit`.
        patience: Stop after this many epochs in which no member has improved; None for never.
        time_limit: As in `fit`: seconds for all members together.
        seed: Seed of the first member; member i has seed + i.
        checkpoint_dir: As in `fit`.
        resume: As in `fit`.
        progress: As in `fit`; it shows means over the members.
        accelerator: As in `fit`.
        devices: As in `fit`.
        precision: As in `fit`.
        strategy: As in `fit`.

    Returns:
        The ensemble, in evaluation mode, with the history of each member as its `histories`.

    Raises:
        ValueError: If data or arguments cannot be used, or the members have different units or base measures.
        TrainingError: If a loss or gradient of one of the members is not finite, or its loss explodes; the message
            names the member.
        energyreg.CheckpointError: If resume finds a damaged checkpoint, or one of other settings or
        data. OSError: If `checkpoint_dir` cannot be written, or has no room.

    >>> import torch
    >>> x = torch.rand(200, 2)
    >>> y = x[:, 0] + 0.1 * torch.randn(200)
    >>> def build():
    ...     return EnergyRegressionModel.for_table(num_features=2, width=16)
    >>> ensemble = fit_ensemble(build, x, y, n_members=3, epochs=2)
    >>> ensemble(x).log_prob(y).shape
    torch.Size([200])
    """
    started = time.perf_counter()
    settings = TrainingSettings(
        objective=objective, epochs=epochs, batch_size=batch_size, learning_rate=learning_rate,
        weight_decay=weight_decay, schedule=schedule, gradient_clip=gradient_clip, averaging=averaging,
        patience=patience, time_limit=time_limit, seed=seed, checkpoint_dir=checkpoint_dir, resume=resume,
        progress=progress, accelerator=accelerator, devices=devices, precision=precision, strategy=strategy,
    )  # fmt: skip
    members = _build(build, n_members, settings.seed)
    for member in members:
        make_trainable(member)
    # Preprocessing that is there serves the members that have none.
    first = next((member for member in members if member.fitted), members[0])
    data = ready(first, Examples(x, y, sample_weight, validation), settings, len(members))
    with RandomSource(settings.seed).everywhere():
        _fit_preprocessing(members, first, data.units)
    try:
        histories = _in_one_pass(members, data, settings, started)
    except CannotStackError as error:
        if str(error):
            warnings.warn(f"The members are trained one after the other, which takes longer: {error}.", stacklevel=2)
        histories = _one_after_the_other(members, data, settings, started)
    ensemble = EnergyEnsemble(members[: len(histories)])
    ensemble.histories = histories
    return ensemble.eval()


def time_left(time_limit: float | None, started: float, parts: int) -> float | None:
    """Seconds that each of the parts that are left may take; more than 0, as each makes a step at least."""
    if time_limit is None:
        return None
    return max((started + time_limit - time.perf_counter()) / parts, 1e-3)


def _in_one_pass(
    members: list[EnergyRegressionModel], data: TrainingData, settings: TrainingSettings, started: float
) -> list[History]:
    if not isinstance(data.training, Rows) or _needs_separate_trainings(members[0], settings):
        raise CannotStackError  # as is plain from the arguments
    with RandomSource(settings.seed).everywhere():
        stack = Stack(members)
        x, y = data.training.sample()
        stack.try_out(x[:4], y[:4])
    try:
        return train(stack.model, data, settings, started, partial(StackedTraining, stack=stack), len(members))
    finally:
        stack.release()


def _needs_separate_trainings(model: EnergyRegressionModel, settings: TrainingSettings) -> bool:
    """Whether the settings need a training for each member: a loss scale, a strategy, several devices."""
    if settings.precision == "16-mixed" or settings.strategy != "auto":
        return True
    return settings.devices != 1 and make_fabric(*device_of(model, settings), settings).world_size > 1


def _one_after_the_other(
    members: list[EnergyRegressionModel], data: TrainingData, settings: TrainingSettings, started: float
) -> list[History]:
    histories: list[History] = []
    for number, member in enumerate(members):
        begun, folder, seed = time.perf_counter(), None, settings.seed + number
        if settings.checkpoint_dir is not None:
            folder = Path(settings.checkpoint_dir) / f"member-{number}"
            check_folder(folder, 5 * sum(tensor.nbytes for tensor in member.state_dict().values()))
        limit = time_left(settings.time_limit, started, len(members) - number)
        own = replace(settings, seed=seed, checkpoint_dir=folder, time_limit=limit)
        try:
            histories += train(member, data, own, begun)
        except TrainingError as error:
            raise TrainingError(f"Member {number} (seed {seed}): {error}") from error
        if histories[-1].interrupted:
            break
    return histories


# ---------------------------------------------------------------------------------------------- the members


def built(build: Callable[[], Any], count: int, seed: int) -> list[Any]:
    """Call `build` so many times; what it draws is what `torch.manual_seed(seed + i)` gives."""
    made = []
    for number in range(count):
        with RandomSource(seed + number).everywhere():
            made.append(build())
    return made


def _build(build: Any, n_members: int | None, seed: int) -> list[EnergyRegressionModel]:
    if isinstance(build, (list, tuple)):
        members = list(build)
        if n_members not in (None, len(members)):
            raise ValueError(f"n_members is {n_members}, but build has {len(members)} models; leave n_members out.")
        if not members:
            raise ValueError("build is empty; expected at least one model, or a callable that makes one.")
        if len({id(member) for member in members}) < len(members):
            raise ValueError("build holds one model several times; expected models with weights of their own.")
    else:
        if isinstance(build, nn.Module) or not callable(build):
            raise ValueError(
                f"build is a {type(build).__name__}; expected a callable without arguments that makes an untrained "
                "model, such as lambda: EnergyRegressionModel.for_table(num_features=3), or a sequence of models."
            )
        n_members = 5 if n_members is None else n_members
        check_count("n_members", n_members)
        members = built(build, n_members, seed)
    for number, member in enumerate(members):
        if not isinstance(member, EnergyRegressionModel):
            what = "build returned" if callable(build) else f"build[{number}] is"
            raise ValueError(f"{what} a {type(member).__name__}; expected an EnergyRegressionModel.")
    owner: dict[int, int] = {}
    for number, member in enumerate(members):
        for name, parameter in member.named_parameters():
            if parameter.requires_grad and owner.setdefault(id(parameter), number) != number:
                raise ValueError(
                    f"Members {owner[id(parameter)]} and {number} share the parameter {name!r}; expected members with "
                    "weights of their own. Build each part again for each member, or freeze what they are to share "
                    "(requires_grad=False)."
                )
    return members


def _fit_preprocessing(
    members: Sequence[EnergyRegressionModel],
    first: EnergyRegressionModel,
    preprocessing: tuple[Tensor | None, Tensor] | None,
) -> None:
    """Give all members the units of the first, which has been fitted."""
    for number, member in enumerate(members):
        if member is first:
            continue
        for part in ("space", "base"):
            if not bool(getattr(member, part).fitted) and type(getattr(member, part)) is type(getattr(first, part)):
                setattr(member, part, copy.deepcopy(getattr(first, part)))
        for mine, fitted in zip(member.encoder.modules(), first.encoder.modules(), strict=False):
            same = isinstance(mine, QuantileNormalizer) and isinstance(fitted, QuantileNormalizer)
            if same and not bool(mine.fitted) and mine.knots.shape == fitted.knots.shape:
                mine.load_state_dict(fitted.state_dict())
        if not member.fitted and preprocessing is not None:
            member.fit_preprocessing(*preprocessing)
        if difference := disagreement(first, member):
            raise ValueError(
                f"Members {members.index(first)} and {number} have different {difference}, so that their densities "
                "cannot be mixed. Build all members with the same space and base, and fit none of them to other data."
            )
